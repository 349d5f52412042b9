"""Preference losses against TRL's trainers: values and LoRA gradients, one document a row and packed."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trl

from jlora import losses
from jlora.losses import by_document

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from trl.experimental import cpo as trl_cpo
    from trl.experimental import orpo as trl_orpo


@pytest.fixture(scope="module")
def cpo(make_trainer, documents_of, ours, slots):
    trainer = make_trainer(
        trl_cpo.CPOTrainer, trl_cpo.CPOConfig, slots.records, per_device_train_batch_size=3, max_length=64
    )
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer, batch, ours.rows(both_sides(documents_of, batch, slots), slots.count)


def both_sides(documents_of, batch, slots):
    return [
        document
        for side, numbers in (("chosen", slots.numbers[:3]), ("rejected", slots.numbers[3:]))
        for document in documents_of(
            batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"] != -100, numbers
        )
    ]


CPO = {
    "CPO sigmoid": dict(loss_type="sigmoid", label_smoothing=0.1),
    "CPO hinge": dict(loss_type="hinge"),
    "CPO ipo": dict(loss_type="ipo", beta=0.4),
    "SimPO": dict(loss_type="simpo", beta=2.0, simpo_gamma=0.7),
    "AlphaPO": dict(loss_type="simpo", beta=2.0, alpha=0.1),
}


@pytest.mark.parametrize("case", CPO)
def test_cpo(case, cpo, ours, agree, slots):
    trainer, batch, rows = cpo
    settings, nll_weight = CPO[case], 1.0 if case.startswith("CPO") else 0.0
    changed = dict(beta=0.1, label_smoothing=0.0, simpo_gamma=0.5, alpha=0.0, cpo_alpha=nll_weight) | settings
    for name, value in changed.items():
        setattr(trainer, name, value)

    def objective(log_probs, _, batch):
        pairs = slots.of(log_probs, jnp.zeros_like(log_probs), batch)
        return slots.mean(losses.cpo(pairs, **settings)) + nll_weight * slots.chosen_nll(
            log_probs, batch["weights"], batch
        )

    found = [ours.loss(objective, row) for row in rows]
    agree(case, trainer, lambda: trainer.compute_loss(trainer.model, batch), found)


def test_orpo(make_trainer, documents_of, ours, agree, slots):
    trainer = make_trainer(
        trl_orpo.ORPOTrainer, trl_orpo.ORPOConfig, slots.records, per_device_train_batch_size=3, max_length=64, beta=0.4
    )
    batch = next(iter(trainer.get_train_dataloader()))
    rows = ours.rows(both_sides(documents_of, batch, slots), slots.count)

    def terms(log_probs, batch):
        return losses.orpo(slots.of(log_probs, jnp.zeros_like(log_probs), batch), beta=0.4)

    def objective(log_probs, _, batch):
        return slots.mean(terms(log_probs, batch)[0]) + slots.chosen_nll(log_probs, batch["within"], batch)

    found = [ours.loss(objective, row, weights="within") for row in rows]
    agree("ORPO", trainer, lambda: trainer.compute_loss(trainer.model, batch), found)
    logged = trainer._stored_metrics["train"]
    _, ratio, odds = terms(ours.log_probs(rows[1]), rows[1])
    np.testing.assert_allclose(slots.mean(ratio), logged["log_odds_ratio"][0], rtol=1e-4)
    np.testing.assert_allclose(slots.mean(odds), logged["log_odds_chosen"][0], rtol=1e-4)


ANSWERS = ("cdefg", "hi", "p", "qrstuvw", "0123", "4567")
LABELS = (True, False, True, True, True, False)


@pytest.fixture(scope="module")
def kto(make_trainer, documents_of, ours, slots):
    records = [
        {"prompt": slots.records[i // 2]["prompt"], "completion": text, "label": label}
        for i, (text, label) in enumerate(zip(ANSWERS, LABELS, strict=True))
    ]
    trainer = make_trainer(trl.KTOTrainer, trl.KTOConfig, records, per_device_train_batch_size=6)
    batch = next(iter(trainer.get_train_dataloader()))
    names = "input_ids", "attention_mask", "completion_mask"
    matched, mismatched = (
        ours.rows(documents_of(*(batch[f"{prefix}{name}"] for name in names), slots.numbers), slots.count)
        for prefix in ("", "KL_")
    )
    return trainer, batch, matched, mismatched


@pytest.mark.parametrize("loss_type", losses.KTO_LOSS_TYPES)
def test_kto(loss_type, kto, ours, agree, slots):
    trainer, batch, matched, mismatched = kto
    settings = dict(loss_type=loss_type, beta=0.3, desirable_weight=0.7, undesirable_weight=1.3)
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer.calculate_KL = loss_type == "kto"
    items = jnp.tile(jnp.asarray(slots.items), 2)
    label = jnp.zeros(slots.count, bool).at[jnp.asarray(slots.numbers)].set(jnp.asarray(LABELS))
    found = []
    for row, other in zip(matched, mismatched, strict=True):
        kl = losses.kto_kl(slots.sums(ours.log_probs(other), other), slots.sums(ours.reference(other), other), items)
        assert kl > 0.04

        def objective(log_probs, reference, batch, kl=kl):
            policy, reference = slots.sums(log_probs, batch), slots.sums(reference, batch)
            return jnp.sum(losses.kto(policy, reference, label, items, kl=kl, **settings)) / 6

        found.append(ours.loss(objective, row))
    agree(loss_type, trainer, lambda: trainer.compute_loss(trainer.model, batch), found)


def test_reward_model(make_trainer, documents_of, ours, agree, slots):
    settings = dict(per_device_train_batch_size=3, center_rewards_coefficient=0.2)
    trainer = make_trainer(trl.RewardTrainer, trl.RewardConfig, slots.records, task_type="SEQ_CLS", **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    documents = documents_of(batch["input_ids"], batch["attention_mask"], batch["attention_mask"], slots.numbers)
    head = jnp.asarray(trainer.model.base_model.model.score.modules_to_save["default"].weight.detach().numpy()[0])
    margin = jnp.pad(jnp.asarray(batch["margin"].numpy()), (0, 1))

    @jax.jit
    @jax.value_and_grad
    def objective(trainable, batch):
        ends = losses.last_token(batch["documents"], slots.count)
        rewards = by_document((ours.hidden(trainable, batch) @ head) * ends, batch["documents"], slots.count)
        halves = jnp.split(rewards, 2)
        return slots.mean(
            losses.reward_model(*halves, jnp.asarray(slots.items), margin=margin, center_rewards_coefficient=0.2)
        )

    found = [objective(ours.trainable, row) for row in ours.rows(documents, slots.count)]
    found = [(float(value), ours.named(gradients)) for value, gradients in found]
    agree("reward model", trainer, lambda: trainer.compute_loss(trainer.model, dict(batch)), found)


ALL = {
    **{f"cpo {name}": lambda pairs, name=name: losses.cpo(pairs, loss_type=name) for name in losses.CPO_LOSS_TYPES},
    "alphapo": lambda pairs: losses.cpo(pairs, loss_type="simpo", alpha=0.2),
    "orpo": lambda pairs: losses.orpo(pairs)[0],
    "mean_nll": lambda pairs: losses.mean_nll(pairs.chosen, pairs.items, jnp.float32(7)),
    "kto": lambda pairs: losses.kto(
        pairs.chosen, pairs.reference_chosen, pairs.chosen > pairs.rejected, pairs.items, kl=jnp.float32(0.3)
    ),
    "reward_model": lambda pairs: losses.reward_model(
        pairs.chosen, pairs.rejected, pairs.items, center_rewards_coefficient=0.1
    ),
}


@pytest.mark.parametrize("name", ALL)
def test_an_empty_slot_changes_nothing(name, empty_slot):
    empty_slot(ALL[name])


def test_kl_is_never_negative_and_has_no_gradient():
    policy, reference, items = jnp.array([-3.0, -9.0, 0.0]), jnp.array([-4.0, -2.0, 0.0]), jnp.array([1.0, 1.0, 0.0])
    assert losses.kto_kl(policy, reference, items) == 0
    assert losses.kto_kl(reference, policy, items) == 3
    assert not np.any(jax.grad(losses.kto_kl)(reference, policy, items))


def test_certain_completions_have_finite_odds(random_pairs):
    pairs = random_pairs._replace(chosen=jnp.zeros(4))
    value, gradients = jax.value_and_grad(lambda pairs: jnp.sum(losses.orpo(pairs)[0]))(pairs)
    assert np.isfinite(value) and all(np.all(np.isfinite(leaf)) for leaf in gradients)


def test_a_margin_of_zero_is_none(random_pairs):
    sides = random_pairs.chosen, random_pairs.rejected, random_pairs.items
    np.testing.assert_array_equal(losses.reward_model(*sides, margin=jnp.zeros(4)), losses.reward_model(*sides))
