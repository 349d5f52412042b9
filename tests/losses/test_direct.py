"""DPO and its relatives against TRL's trainer: values and LoRA gradients, one document a row and packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trl

from jlora import losses
from jlora.losses import Pairs, check_dpo


@pytest.fixture(scope="module")
def dpo(make_trainer, documents_of, ours, slots):
    trainer = make_trainer(trl.DPOTrainer, trl.DPOConfig, slots.records, per_device_train_batch_size=3)
    batch = next(iter(trainer.get_train_dataloader()))
    documents = documents_of(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], slots.numbers)
    return trainer, batch, ours.rows(documents, slots.count)


DPO_NAMES = losses.DPO_LOSS_TYPES
DPO = {
    **{name: dict(loss_type=name) for name in DPO_NAMES if name not in ("exo_pair", "sigmoid_smooth")},
    "exo_pair": dict(loss_type="exo_pair", label_smoothing=0.03),
    "robust, ε .1": dict(loss_type="robust", label_smoothing=0.1, beta=0.3),
    "aot, ε .1": dict(loss_type="aot", label_smoothing=0.1, beta=0.3),
    "aot_unpaired, ε .1": dict(loss_type="aot_unpaired", label_smoothing=0.1),
    "discopop, τ .2": dict(loss_type="discopop", discopop_tau=0.2),
    "forward_kl": dict(loss_type="sigmoid", f_divergence_type="forward_kl"),
    "js_divergence": dict(loss_type="ipo", f_divergence_type="js_divergence", beta=0.5),
    "alpha_divergence": dict(loss_type="sigmoid_norm", f_divergence_type="alpha_divergence"),
    "alpha_divergence, α .8": dict(
        loss_type="hinge", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.8
    ),
}
DEFAULTS = dict(
    beta=0.1, label_smoothing=0.0, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, discopop_tau=0.05
)


def set_dpo(trainer, loss_types, weights, ld_alpha=None, **settings):
    trainer.loss_types, trainer.loss_weights, trainer.ld_alpha = loss_types, weights, ld_alpha
    for name, value in (DEFAULTS | settings).items():
        setattr(trainer, name, value)
    trainer.args.discopop_tau = trainer.discopop_tau


@pytest.mark.parametrize("case", DPO)
def test_dpo(case, dpo, ours, agree, slots):
    trainer, batch, rows = dpo
    settings = dict(DPO[case])

    def objective(log_probs, reference, batch):
        pairs = slots.of(log_probs, reference, batch)
        return slots.mean(losses.dpo(pairs, **settings))

    loss_type = settings["loss_type"]
    others = {name: value for name, value in settings.items() if name != "loss_type"}
    assert check_dpo([loss_type], **others) == []
    set_dpo(trainer, [loss_type], [1.0], **others)
    found = [ours.loss(objective, row) for row in rows]
    tolerance = 1e-4 if case == "discopop" else 2e-5  # its sigmoid is of 20 times the margin
    agree(f"DPO {case}", trainer, lambda: trainer.compute_loss(trainer.model, batch), found, tolerance)


def test_dpo_with_sft_and_desensitised_to_length(dpo, ours, agree, slots):
    trainer, batch, rows = dpo

    def objective(log_probs, reference, batch):
        where = batch["weights"], batch["documents"], slots.count
        policy, reference = (losses.length_desensitised(of, *where, 0.3) for of in (log_probs, reference))
        pairs = slots.pairs(policy, reference, batch)
        nll = slots.chosen_nll(log_probs, batch["weights"], batch)
        return 0.8 * slots.mean(losses.dpo(pairs, loss_type="bco_pair")) + 0.5 * nll

    set_dpo(trainer, ["bco_pair", "sft"], [0.8, 0.5], ld_alpha=0.3)
    found = [ours.loss(objective, row) for row in rows]
    agree("DPO ld_alpha + sft", trainer, lambda: trainer.compute_loss(trainer.model, batch), found)


def test_the_whole_gradient_in_one_piece(dpo, ours, slots):
    """value_and_grad through the model at once is what the tests here take in two halves."""
    row = dpo[2][1]

    def objective(log_probs, reference, batch):
        return slots.mean(losses.dpo(slots.of(log_probs, reference, batch), loss_type="sigmoid"))

    @jax.jit
    @jax.value_and_grad
    def whole(trainable):
        return objective(ours.scores(trainable, row), ours.reference(row), row)

    value, gradients = whole(ours.trainable)
    expected, named = ours.loss(objective, row)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for name, gradient in ours.named(gradients).items():
        np.testing.assert_allclose(gradient, named[name], rtol=1e-4, atol=1e-6 * np.abs(named[name]).max())


def test_dpo_rewards(dpo, ours, slots):
    trainer, batch, rows = dpo
    set_dpo(trainer, ["sigmoid"], [1.0], beta=0.3)
    trainer._metrics["train"].clear()
    trainer.compute_loss(trainer.model, batch)
    pairs = slots.of(ours.log_probs(rows[1]), ours.reference(rows[1]), rows[1])
    for side, rewards in zip(("chosen", "rejected"), losses.dpo_rewards(pairs, beta=0.3), strict=True):
        np.testing.assert_allclose(slots.mean(rewards), trainer._metrics["train"][f"rewards/{side}"], rtol=1e-4)


@pytest.mark.parametrize("name", DPO_NAMES)
def test_an_empty_slot_changes_nothing(name, empty_slot):
    empty_slot(lambda pairs: losses.dpo(pairs, loss_type=name, label_smoothing=0.1))


def test_formulas_that_trl_does_not_have(random_pairs):
    pairs = Pairs(*(jnp.delete(leaf, 1) for leaf in random_pairs))
    margin = np.asarray(pairs.chosen - pairs.reference_chosen - pairs.rejected + pairs.reference_rejected, np.float64)
    expected = 0.9 * np.log1p(np.exp(-0.3 * margin)) + 0.1 * np.log1p(np.exp(0.3 * margin))
    found = losses.dpo(pairs, loss_type="sigmoid_smooth", beta=0.3, label_smoothing=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    limit = dict(loss_type="sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    np.testing.assert_array_equal(losses.dpo(pairs, **limit), losses.dpo(pairs, loss_type="sigmoid"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(loss_types=["sigmod"]), "loss_type sigmod: expected names among sigmoid, "),
        (dict(loss_types=["sigmoid"], beta=0.0), "beta 0.0: must be above 0"),
        (dict(loss_types=["sigmoid"], label_smoothing=0.1), "label_smoothing 0.1 is not read by sigmoid; aot, "),
        (dict(loss_types=["aot"], label_smoothing=1.0), r"label_smoothing 1.0: must be in [0, 1)"),
        (dict(loss_types=["exo_pair"]), "exo_pair needs label_smoothing above 0"),
        (dict(loss_types=["robust", "sft"], label_smoothing=0.5), "label_smoothing 0.5: must be below 0.5 for robust"),
        (dict(loss_types=["sigmoid"], f_divergence_type="kl"), "f_divergence_type 'kl': expected one of reverse_kl, "),
        (
            dict(loss_types=["bco_pair", "sft"], f_divergence_type="forward_kl"),
            "f_divergence_type forward_kl is not read by bco_pair + sft; discopop, ",
        ),
        (dict(loss_types=["sigmoid"], f_alpha_divergence_coef=0.3), "f_alpha_divergence_coef 0.3 is read by"),
        (dict(loss_types=["sigmoid"], discopop_tau=0.1), "discopop_tau 0.1 is read by discopop only"),
        (dict(loss_types=["discopop"], discopop_tau=0.0), "discopop_tau 0.0: must be above 0"),
    ],
)
def test_faults(settings, message):
    (fault,) = check_dpo(**settings)
    assert fault.startswith(message)


def test_all_faults_at_once():
    faults = check_dpo(["apo_zero"], beta=-1.0, label_smoothing=0.6, f_divergence_type="js_divergence")
    assert [fault.split()[0] for fault in faults] == ["beta", "label_smoothing", "f_divergence_type"]
    settings = dict(label_smoothing=0.1, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3)
    assert check_dpo(["robust", "sft"], **settings) == []
