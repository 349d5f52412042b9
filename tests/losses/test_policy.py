"""Policy losses against TRL's GRPO and RLOO trainers, and PPO's against its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import trl

from jlora import losses
from jlora.losses import aggregate, by_document, kl3, policy_loss, ratios

PROMPTS = ([40, 41, 42], [50], [60, 61, 62, 63, 64, 65, 66], [70, 71], [80, 81, 82, 83], [90, 91, 92, 93, 94])
# The fifth completion has no token that counts.
LENGTHS = (5, 2, 7, 1, 0, 6)
ADVANTAGES = (2.5, -0.7, -0.4, 1.4, 0.9, 1.8)
# Slots 1 and 5 are empty.
NUMBERS, COUNT, ITEMS = (0, 2, 3, 4, 6, 7), 8, (1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0)
LIMIT = 11  # max_completion_length
TOKENS = sum(LENGTHS)


def reward(completions, **_):
    return [0.0] * len(completions)


def make(make_trainer, trainer, config, **settings):
    return make_trainer(
        trainer,
        config,
        [{"prompt": "ab"}] * 12,
        extra={"reward_funcs": reward},
        per_device_train_batch_size=6,
        num_generations=3,
        max_completion_length=LIMIT,
        **settings,
    )


@pytest.fixture(scope="module")
def inputs():
    """A handmade batch as GRPOTrainer generates it: prompts padded on the left, completions on the right."""
    width = max(map(len, PROMPTS))
    prompts = torch.tensor([[257] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long()
    completions = torch.randint(5, 250, mask.shape, generator=torch.Generator().manual_seed(3)) * mask + 257 * (
        1 - mask
    )
    return {
        "prompt_ids": prompts,
        "prompt_mask": (prompts != 257).long(),
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES),
        "num_items_in_batch": torch.tensor(float(TOKENS)),
    }


@pytest.fixture(scope="module")
def grpo(make_trainer, documents_of, ours, inputs):
    trainer = make(make_trainer, trl.GRPOTrainer, trl.GRPOConfig, beta=0.1)
    trainer.current_gradient_accumulation_steps = 1
    ids, attention, completion = joined(inputs)
    with torch.no_grad():
        log_probs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, max(LENGTHS))[0]
    noise = torch.randn((3, *log_probs.shape), generator=torch.Generator().manual_seed(4))
    old = log_probs + 0.4 * noise[0] + 0.1 * noise[1, :, :1]
    reference = log_probs + 0.5 * noise[2]
    documents = documents_of(ids, attention, completion, NUMBERS, old=old, kl=reference)
    inputs = inputs | {"old_per_token_logps": old, "ref_per_token_logps": reference}
    return trainer, inputs, ours.rows(documents, COUNT)


def joined(inputs):
    prompt, mask = inputs["prompt_mask"], inputs["completion_mask"]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    return ids, torch.cat([prompt, mask], 1), torch.cat([0 * prompt, mask], 1)


def totals(**changes):
    values = dict(items=6.0, tokens=float(TOKENS), micro_batches=1.0, prompts=2.0) | changes
    return {name: jnp.float32(value) for name, value in values.items()}


def per_item(values):
    return jnp.zeros(COUNT).at[jnp.asarray(NUMBERS)].set(jnp.asarray(values))


def where(batch):
    return batch["weights"], batch["documents"], COUNT


def advantages(batch):
    return losses.to_tokens(per_item(ADVANTAGES), batch["documents"])


CASES = {
    "grpo": dict(loss_type="grpo", beta=0.2),
    "grpo, plain KL": dict(loss_type="grpo", beta=0.2, bias_correction=False),
    "bnpo": dict(loss_type="bnpo", epsilon_high=0.28),
    "dr_grpo": dict(loss_type="dr_grpo", delta=1.3),
    "dapo": dict(loss_type="dapo", epsilon_high=0.28, delta=1.6, beta=0.1),
    "luspo": dict(loss_type="luspo", level="sequence", epsilon=0.05),
    "cispo": dict(loss_type="cispo", epsilon_high=1.1),
    "sapo": dict(loss_type="sapo", sapo_temperature_pos=1.3, sapo_temperature_neg=0.8),
    "gspo": dict(loss_type="grpo", level="sequence", epsilon=0.05, epsilon_high=0.04, beta=0.3),
    "gspo, dapo": dict(loss_type="dapo", level="sequence", epsilon=0.05, beta=0.3, bias_correction=False),
    "cispo, sequence": dict(loss_type="cispo", level="sequence", epsilon_high=1.02),
}


def of_case(level="token", beta=0.0, bias_correction=True, **settings):
    """(loss of a micro-batch, (clipped low, clipped high)) as a function of log-probabilities and their batch."""

    def objective(log_probs, batch):
        old = batch["old"]
        loss, *clipped = policy_loss(log_probs, old, advantages(batch), *where(batch), level=level, **settings)
        if beta:
            ratio = ratios(log_probs, old, *where(batch), level) if bias_correction else None
            loss += beta * kl3(batch["kl"], log_probs, ratio)
        how = losses.POLICY_LOSS_TYPES[settings["loss_type"]][1]
        items = jnp.asarray(ITEMS)
        return aggregate(loss, *where(batch)[:2], items, how=how, totals=totals(), max_completion_length=LIMIT), clipped

    return objective


def set_grpo(trainer, level="token", beta=0.0, bias_correction=True, **settings):
    settings = dict(epsilon=0.2, delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05) | settings
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = settings["loss_type"], level, beta
    trainer.epsilon_low, trainer.epsilon_high = settings["epsilon"], settings.get("epsilon_high", settings["epsilon"])
    trainer.args.use_bias_correction_kl, trainer.args.delta = bias_correction, settings["delta"]
    trainer.args.sapo_temperature_pos = settings["sapo_temperature_pos"]
    trainer.args.sapo_temperature_neg = settings["sapo_temperature_neg"]
    trainer._metrics["train"].clear()


@pytest.mark.parametrize("case", CASES)
def test_grpo(case, grpo, ours, agree):
    trainer, inputs, rows = grpo
    objective = of_case(**CASES[case])
    set_grpo(trainer, **CASES[case])
    found = [ours.loss(lambda log_probs, _, batch: objective(log_probs, batch)[0], row) for row in rows]
    agree(case, trainer, lambda: trainer._compute_loss(trainer.model, inputs), found)
    logged = trainer._metrics["train"]
    _, (low, high) = objective(ours.log_probs(rows[1]), rows[1])
    weights = rows[1]["weights"]
    low, high = (float(jnp.sum(which * weights)) for which in (low, high))
    sequence = CASES[case].get("level") == "sequence"
    if "clip_ratio/low_mean" in logged and not sequence:
        assert low and high
        np.testing.assert_allclose([low / TOKENS], logged["clip_ratio/low_mean"], rtol=1e-5)
        np.testing.assert_allclose([high / TOKENS], logged["clip_ratio/high_mean"], rtol=1e-5)
    if "cispo_clip_ratio" in logged:
        assert high and not low
        if not sequence:
            np.testing.assert_allclose([high / TOKENS], logged["cispo_clip_ratio"], rtol=1e-5)


def test_rloo(make_trainer, grpo, ours, agree):
    trainer = make(make_trainer, trl.RLOOTrainer, trl.RLOOConfig, beta=0.0)
    _, inputs, rows = grpo
    old = (inputs["old_per_token_logps"] * inputs["completion_mask"]).sum(1)
    # TRL adds -advantage for a completion without tokens, a constant that we leave out.
    scored = inputs["advantages"] * (inputs["completion_mask"].sum(1) > 0)
    inputs = inputs | {"old_logps": old, "advantages": scored}
    settings = dict(loss_type="grpo", level="sequence_sum", epsilon=0.9)
    trainer.epsilon_low = trainer.epsilon_high = 0.9
    found = [ours.loss(lambda log_probs, _, batch: of_case(**settings)(log_probs, batch)[0], row) for row in rows]
    agree("rloo", trainer, lambda: trainer._compute_loss(trainer.model, inputs), found)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
def test_micro_batches_add_up(loss_type, grpo, ours):
    """TRL's two calls of an accumulated step, and our two parts."""
    trainer, inputs, (row, _) = grpo
    set_grpo(trainer, loss_type=loss_type)
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 2
    halves = [slice(0, 3), slice(3, 6)]
    with torch.no_grad():
        parts = [
            trainer._compute_loss(trainer.model, {k: v if v.ndim == 0 else v[half] for k, v in inputs.items()})
            for half in halves
        ]
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    log_probs, how = ours.log_probs(row), losses.POLICY_LOSS_TYPES[loss_type][1]
    for half, part in zip(halves, parts, strict=True):
        batch = {name: value[half] for name, value in row.items()}
        loss, *_ = policy_loss(
            log_probs[half], batch["old"], advantages(batch), *where(batch), loss_type=loss_type, level="token"
        )
        items = jnp.asarray(ITEMS) * np.isin(np.arange(COUNT), NUMBERS[half])
        step = totals(micro_batches=2.0)
        found = aggregate(loss, *where(batch)[:2], items, how=how, totals=step, max_completion_length=LIMIT)
        np.testing.assert_allclose(found, part.item(), rtol=1e-5)


def test_tokens_and_prompts():
    """DAPO twice: all tokens of the step alike, or all prompts alike and the tokens within each."""
    documents = jnp.asarray([[0, 0, 1, 1, 1, 4], [2, 2, 2, 3, 3, 4]])
    weights = jnp.asarray([[1.0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    per_token = jnp.arange(12.0).reshape(2, 6)
    items, step = jnp.ones(4), {"tokens": jnp.float32(6), "prompts": jnp.float32(2)}
    groups = jnp.asarray([4.0, 4, 2, 2])
    settings = dict(totals=step, group_tokens=groups)
    found = aggregate(per_token, weights, documents, items, how="prompt_tokens", **settings)
    assert found == ((0 + 2 + 3 + 4) / 4 + (6 + 7) / 2) / 2
    assert aggregate(per_token, weights, documents, items, how="tokens", **settings) == (0 + 2 + 3 + 4 + 6 + 7) / 6
    with pytest.raises(ValueError, match="how 'mean': expected one of sequence_mean, "):
        aggregate(per_token, weights, documents, items, how="mean", totals=step)
    with pytest.raises(ValueError, match="level 'word': expected one of token, sequence, sequence_sum"):
        ratios(per_token, per_token, weights, documents, 4, "word")


@pytest.mark.parametrize("how", losses.AGGREGATIONS)
@pytest.mark.parametrize("level", losses.LEVELS)
def test_nothing_that_counts_is_zero_in_value_and_gradient(how, level):
    documents, nothing = jnp.asarray([[0, 0, 1, 2]]), jnp.zeros((1, 4))
    step = {name: jnp.float32(0) for name in ("items", "tokens", "prompts")} | {"micro_batches": jnp.float32(1)}
    settings = dict(how=how, totals=step, max_completion_length=5, group_tokens=jnp.zeros(2))

    def loss(log_probs):
        per_token, *_ = policy_loss(
            log_probs, nothing, nothing + 1, nothing, documents, 2, loss_type="grpo", level=level
        )
        return aggregate(per_token, nothing, documents, jnp.ones(2), **settings)

    # A token that does not count may hold anything: e to these is infinite.
    value, gradient = jax.value_and_grad(loss)(jnp.asarray([[200.0, -200, -200, 200]]))
    assert value == 0 and not np.any(gradient)
    assert aggregate(nothing + jnp.inf, nothing, documents, jnp.ones(2), **settings) == 0


def test_ppo():
    keys = jax.random.split(jax.random.key(0), 5)
    ratio, advantage = jnp.exp(0.3 * jax.random.normal(keys[0], (3, 7))), jax.random.normal(keys[1], (3, 7))
    values, old, returns = (jax.random.normal(key, (3, 7)) for key in keys[2:])
    rho, a, v, o, r = (np.asarray(of, np.float64) for of in (ratio, advantage, values, old, returns))
    loss, clipped = losses.ppo_policy(ratio, advantage, clip=0.1)
    np.testing.assert_allclose(loss, np.where(a > 0, -a * np.minimum(rho, 1.1), -a * np.maximum(rho, 0.9)), rtol=1e-5)
    np.testing.assert_array_equal(clipped, ((a > 0) & (rho > 1.1)) | ((a < 0) & (rho < 0.9)))
    loss, clipped = losses.ppo_value(values, old, returns, clip=0.3)
    held = o + np.sign(v - o) * np.minimum(np.abs(v - o), 0.3)
    np.testing.assert_allclose(loss, np.maximum((v - r) ** 2, (held - r) ** 2) / 2, rtol=1e-5)
    np.testing.assert_array_equal(clipped, (held - r) ** 2 > (v - r) ** 2)


def test_documents():
    documents = jnp.asarray([[3, 3, 0, 0, 5, 5], [1, 1, 1, 1, 1, 4]])
    weights = jnp.asarray([[1.0, 1, 0, 1, 1, 1], [0, 1, 1, 0, 1, 1]])
    np.testing.assert_array_equal(by_document(weights, documents, 5), [1, 3, 0, 2, 1])
    per_document = jnp.asarray([10.0, 11, 12, 13, 14])
    tokens = losses.to_tokens(per_document, documents)
    np.testing.assert_array_equal(tokens, [[13, 13, 10, 10, 0, 0], [11, 11, 11, 11, 11, 14]])
    last = losses.last_token(documents, 5)
    np.testing.assert_array_equal(last, [[0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1]])
    ranks = losses.rank(weights, documents, 5)
    np.testing.assert_array_equal(ranks, [[1, 2, 0, 1, 0, 0], [0, 1, 2, 0, 3, 1]])
