"""Which tokens can be drawn, how often, and what is said of them: by the definitions, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generate.sampling import Settings, log_prob, penalized, sample, sample_rows

LOGITS = np.log(np.array([0.02, 0.3, 0.05, 0.2, 0.1, 0.25, 0.01, 0.07])) + 3
DRAWS = 600


def frequencies(logits=LOGITS, *, temperature=1.0, top_k=0, top_p=1.0):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    rows = jnp.broadcast_to(jnp.float32(logits), (DRAWS, len(logits)))
    # Not compiled: every number would be a program of its own.
    tokens = sample(rows, keys, temperature=temperature, top_k=top_k, top_p=top_p)
    return np.bincount(tokens, minlength=len(logits)) / DRAWS


def expected(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution, token by token from the likeliest: each is kept while those before it do not reach top_p."""
    weights = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-weights)[: top_k or None]
    shares = weights[order] / weights[order].sum()
    kept = [token for place, token in enumerate(order) if shares[:place].sum() < top_p]
    found = np.zeros(len(logits))
    found[kept] = weights[kept] / weights[kept].sum()
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(temperature=0.5),
        dict(temperature=2.0),
        dict(top_k=1),
        dict(top_k=3),
        dict(top_k=50),
        # the sums of the likeliest: 0.3, 0.55, 0.75, 0.85, 0.92, …
        *[dict(top_p=top_p) for top_p in (0.05, 0.29, 0.31, 0.54, 0.56, 0.74, 0.76, 0.84, 0.86, 0.91, 0.999)],
        dict(top_k=4, top_p=0.9),  # of what top_k leaves: 0.35, 0.65, 0.88, 1
        dict(top_k=4, top_p=0.87),
        dict(temperature=0.5, top_p=0.8),
    ],
    ids=str,
)
def test_draws_follow_the_cut_distribution(settings):
    found, wanted = frequencies(**settings), expected(LOGITS, **settings)
    assert not found[wanted == 0].any()
    assert found[wanted > 0.03].all()  # missed by chance once in 10⁸ times
    np.testing.assert_allclose(found, wanted, atol=5 * np.sqrt(0.25 / DRAWS))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_log_probs_are_the_policys_before_it_is_cut(temperature):
    logits = jnp.float32(np.random.default_rng(0).normal(size=(4, 9)) * 3)
    tokens = jnp.arange(4, dtype=jnp.int32)
    scaled = np.asarray(logits, np.float64) / temperature
    wanted = scaled[np.arange(4), np.arange(4)] - np.log(np.exp(scaled).sum(axis=1))
    np.testing.assert_allclose(log_prob(logits, tokens, temperature=temperature), wanted, rtol=1e-5)


def test_a_row_has_a_draw_of_its_own():
    keys = jax.random.split(jax.random.key(1), 64)
    rows = jnp.broadcast_to(jnp.float32(LOGITS), (64, 8))
    tokens = sample(rows, keys, temperature=1.0, top_k=0, top_p=1.0)
    assert len(set(tokens.tolist())) > 4
    alone = [sample(rows[:1], keys[i : i + 1], temperature=1.0, top_k=0, top_p=1.0)[0] for i in range(5)]
    np.testing.assert_array_equal(tokens[:5], alone)


def settings(count, **given):
    """Neutral settings for so many rows, but for those given."""
    neutral = dict.fromkeys(Settings._fields, 0.0) | dict(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    dtype = {"top_k": jnp.int32}
    return Settings(
        **{
            name: jnp.broadcast_to(jnp.asarray(given.get(name, value), dtype.get(name, jnp.float32)), (count,))
            for name, value in neutral.items()
        }
    )


def test_rows_with_settings_of_their_own_draw_what_each_would_alone():
    """Among negative, equal and infinite logits too."""
    rows = [dict(), dict(temperature=0.0), dict(temperature=0.5, top_k=3), dict(top_p=0.54), dict(top_p=0.999)]
    rows += [
        dict(top_k=4, top_p=0.87),
        dict(temperature=2.0, top_k=1),
        dict(top_k=50),
        dict(temperature=0.7, top_p=0.05),
    ]
    logits = np.random.default_rng(0).normal(size=(len(rows), 101)) * 3
    logits[:, 7], logits[:, 8], logits[:, 9] = logits[:, 6], -np.inf, 0
    logits = jnp.float32(logits)
    found = {
        name: [row.get(name, value) for row in rows]
        for name, value in dict(temperature=1.0, top_k=0, top_p=1.0).items()
    }
    draw = jax.jit(sample_rows)
    for seed in range(4):
        keys = jax.random.split(jax.random.key(seed), len(rows))
        tokens = draw(logits, keys, settings(len(rows), **found))
        for number, row in enumerate(rows):
            own = logits[number : number + 1]
            if row.get("temperature") == 0:
                assert tokens[number] == jnp.argmax(own)
                continue
            alone = dict(temperature=1.0, top_k=0, top_p=1.0) | row
            assert tokens[number] == sample(own, keys[number : number + 1], **alone)[0], row


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 8), (0.2, 5), (0.5, 3), (1.0, 1)])
def test_tokens_less_likely_than_a_share_of_the_likeliest_are_left_out(min_p, kept):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    rows = jnp.broadcast_to(jnp.float32(LOGITS), (DRAWS, len(LOGITS)))
    found = np.bincount(sample_rows(rows, keys, settings(DRAWS, min_p=min_p)), minlength=len(LOGITS))
    assert set(np.flatnonzero(found)) == set(np.argsort(-LOGITS)[:kept].tolist())


def test_penalties_are_of_what_was_read_and_of_what_was_drawn():
    logits = jnp.asarray([[2.0, -2.0, 1.0, 1.0], [2.0, -2.0, 1.0, 1.0]])
    read, drawn = jnp.asarray([[True, True, False, False]] * 2), jnp.asarray([[0, 0, 3, 0]] * 2, jnp.int32)
    penalties = settings(2, repetition_penalty=[2.0, 1.0], presence_penalty=[0.0, 0.5], frequency_penalty=[0.0, 0.25])
    found = penalized(logits, read, drawn, penalties)
    np.testing.assert_allclose(found, [[1.0, -4.0, 0.5, 1.0], [2.0, -2.0, 1.0 - 0.5 - 0.75, 1.0]])
