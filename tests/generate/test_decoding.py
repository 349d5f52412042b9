"""The decode loop against transformers and against the forward pass, for any number of rows; rollouts and digests."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jlora
from jlora import lora, quant, sharding, tree
from jlora.generate import decode, policy_digest, rollout
from jlora.generate.rollouts import queues
from jlora.models import build

# the second only fills the queue
LENGTHS = (3, 0, 13, 1, 7, 5, 2)
WIDTH, NEW = 13, 7
SIZES = dict(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, initializer_range=0.15),
    # as many positions as the longest row has places: one more would not be a number
    "gpt2": transformers.GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=3, n_positions=WIDTH + NEW),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=10, sliding_window=6, query_pre_attn_scalar=12),
    "qwen3_5_text": transformers.Qwen3_5TextConfig(
        **SIZES,
        **dict(head_dim=16, layer_types=["linear_attention", "full_attention"], linear_conv_kernel_dim=4),
        **dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=10, linear_value_head_dim=14),
    ),
    "falcon_h1": transformers.FalconH1Config(
        **SIZES, **dict(mamba_d_ssm=48, mamba_n_heads=4, mamba_n_groups=2, mamba_d_state=10, mamba_d_conv=3)
    ),
}


def prompts_of(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(1, 101, length).tolist() for length in lengths]


@functools.cache
def made(family):
    model = build(FAMILIES[family].to_dict())
    return model, jax.jit(model.random_params)(jax.random.key(3))


@functools.cache
def adapted():
    """A Llama in NF4 with adapters that do something."""
    model, params = made("llama")

    def start(path, leaf):
        return jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape) if "lora_b" in path else leaf

    @jax.jit
    def adapt(params):
        packed = tree.map_with_path(lambda path, leaf: quant.quantize(leaf) if "_proj" in path else leaf, params)
        config = jlora.LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
        return tree.map_with_path(start, lora.init(packed, config, key=jax.random.key(0)))

    return model, adapt(params)


def run(model, params, order=None, **settings):
    order = np.arange(len(LENGTHS)) if order is None else order
    prompts, keys = prompts_of(), jax.random.split(jax.random.key(5), len(LENGTHS))
    tokens = np.zeros((len(LENGTHS), WIDTH), np.int32)
    for row, number in enumerate(order):
        tokens[row, WIDTH - len(prompts[number]) :] = prompts[number]
    lengths = np.array([LENGTHS[number] for number in order], np.int32)
    settings = dict(rows=2, max_new_tokens=NEW, stop_ids=(), greedy=False) | settings
    return jax.device_get(decode(model, params, tokens, lengths, keys[np.asarray(order)], **settings))


def forward_log_probs(model, params, found, temperature):
    """Of the tokens found, from one pass over every prompt with what followed it."""
    rows = np.zeros((len(LENGTHS), WIDTH + NEW), np.int32)
    for row, prompt, tokens in zip(rows, prompts_of(), found.tokens, strict=True):
        row[: len(prompt) + NEW] = [*prompt, *tokens]
    log_probs = jax.nn.log_softmax(model(params, rows) / temperature, axis=-1)
    places = np.maximum(np.array(LENGTHS)[:, None] + np.arange(NEW) - 1, 0)
    expected = np.asarray(log_probs)[np.arange(len(rows))[:, None], places, found.tokens]
    return np.where(np.arange(NEW) < found.counts[:, None], expected, 0)


@pytest.fixture(scope="module")
def greedy(tmp_path_factory):
    """(model, params, transformers' greedy tokens of every prompt)."""
    torch.manual_seed(3)
    theirs = transformers.LlamaForCausalLM(FAMILIES["llama"]).eval()
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    expected = []
    for prompt in prompts_of():
        ids = torch.tensor([prompt], dtype=torch.int64)
        settings = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
        ids = ids if not prompt else theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        expected.append(ids[0, len(prompt) :].tolist())
    return *jlora.load(folder), expected


@pytest.mark.parametrize("rows", [1, 3, len(LENGTHS)])
def test_greedy_tokens_are_transformers_up_to_the_stop_token(greedy, rows):
    model, params, expected = greedy
    stops = (expected[0][2], expected[2][4])
    ends = [min([ids.index(stop) + 1 for stop in stops if stop in ids], default=len(ids)) for ids in expected]
    assert 0 in ends and NEW in ends and len(set(ends)) > 3
    found = run(model, params, rows=rows, stop_ids=stops, greedy=True)
    np.testing.assert_array_equal(found.counts, ends)
    for tokens, log_probs, ids, end in zip(found.tokens, found.log_probs, expected, ends, strict=True):
        np.testing.assert_array_equal(tokens, np.pad(ids[:end], (0, NEW - end)))
        assert (log_probs[:end] < 0).all() and not log_probs[end:].any()


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name == "falcon_h1")) for name in FAMILIES]
)
def test_samples_do_not_depend_on_the_rows_and_log_probs_are_the_forward_pass(family):
    model, params = made(family)
    settings = dict(temperature=0.7, top_k=30, top_p=0.9, stop_ids=(*range(1, 20),))
    found = [run(model, params, rows=rows, **settings) for rows in (2, len(LENGTHS))]
    assert len(set(found[0].counts.tolist())) > 3 and found[0].counts[1] == 0
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_array_equal(found[0].counts, found[1].counts)
    expected = forward_log_probs(model, params, found[0], 0.7)
    for one in found:
        np.testing.assert_allclose(one.log_probs, expected, atol=2e-5)


def test_prompts_that_are_read_once_are_answered_as_if_read_by_themselves():
    model, params = made("llama")
    settings = dict(temperature=0.7, stop_ids=(*range(1, 20),), order=[0, 1, 2, 2, 5, 5, 5])
    plain = run(model, params, **settings)
    different, copies = np.array([0, 2, 4, len(LENGTHS)], np.int32), np.array([0, 0, 1, 1, 2, 2, 2], np.int32)
    for rows in (2, len(LENGTHS)):
        found = run(model, params, rows=rows, prompts=different, copies=copies, **settings)
        np.testing.assert_array_equal(found.tokens, plain.tokens)
        np.testing.assert_array_equal(found.counts, plain.counts)
        np.testing.assert_allclose(found.log_probs, plain.log_probs, atol=2e-5)


def test_samples_follow_their_keys_through_any_order():
    order = [6, 2, 0, 5, 1, 4, 3]
    plain, mixed = run(*made("llama")), run(*made("llama"), order=order)
    np.testing.assert_array_equal(mixed.tokens, plain.tokens[order])
    np.testing.assert_allclose(mixed.log_probs, plain.log_probs[order], atol=1e-5)
    assert len({tuple(tokens) for tokens in plain.tokens.tolist()}) == len(LENGTHS)


def test_every_token_has_a_key_of_its_own():
    """Where the model says nothing, what is drawn follows from the prompt's key and the number of the token alone."""
    model, params = made("llama")
    found = run(model, params | {"lm_head": {"kernel": jnp.zeros_like(params["lm_head"]["kernel"])}})
    keys = jax.random.split(jax.random.key(5), len(LENGTHS))
    for number in (0, 2):
        draws = [jax.random.categorical(jax.random.fold_in(keys[number], step), jnp.zeros(101)) for step in range(NEW)]
        np.testing.assert_array_equal(found.tokens[number], draws)
    np.testing.assert_allclose(found.log_probs[0], -np.log(101), rtol=1e-5)


def test_packed_weights_and_adapters_sample_the_same_on_a_mesh():
    model, params = adapted()
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    alone, spread = run(model, params), run(model, sharding.shard(params, mesh))
    np.testing.assert_array_equal(alone.tokens, spread.tokens)
    np.testing.assert_allclose(alone.log_probs, forward_log_probs(model, params, alone, 1.0), atol=5e-5)
    np.testing.assert_allclose(alone.log_probs, spread.log_probs, atol=5e-5)
    base = forward_log_probs(model, lora.strip(params), alone, 1.0)
    assert np.abs(alone.log_probs - base).max() > 0.1  # the adapters do something


def test_rollouts_come_back_in_order_and_say_which_policy_drew_them():
    model, params = adapted()
    prompts, keys = prompts_of((9, 2, 20, 3, 18)), jax.random.split(jax.random.key(1), 5)
    settings = dict(max_new_tokens=4, stop_ids=[*range(1, 30)])
    found = rollout(model, params, prompts, keys, rows=2, bucket=16, **settings)
    assert found.policy_digest == int(jax.jit(policy_digest)(lora.split(params)[1]))
    again = rollout(model, params, prompts[::-1], keys[::-1], rows=9, bucket=32, **settings)
    for one, same in zip(found.completions, again.completions[::-1], strict=True):
        np.testing.assert_array_equal(one.tokens, same.tokens)
        np.testing.assert_allclose(one.log_probs, same.log_probs, atol=5e-5)
        assert one.tokens.dtype == np.int32 and len(one.tokens) == len(one.log_probs)
        stops = np.isin(one.tokens, settings["stop_ids"])
        assert one.finished == stops[-1] and not stops[:-1].any() and (one.finished or len(one.tokens) == 4)
    assert {one.finished for one in found.completions} == {True, False}
    assert len({tuple(one.tokens.tolist()) for one in found.completions}) == 5


def test_a_digest_sees_every_adapter_weight_and_nothing_else():
    _, params = adapted()
    digest = jax.jit(lambda params: policy_digest(lora.split(params)[1]))
    seen = int(digest(params))
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    assert int(digest(sharding.shard(params, mesh))) == seen
    norm = {"scale": params["norm"]["scale"] + 1}
    assert int(digest(params | {"norm": norm})) == seen
    a, b = jnp.linspace(1, 2, 12).reshape(3, 4), jnp.zeros((1, 2))
    trainable = {"a": {"lora_a": a}, "b": {"lora_b": b}}
    signs = [{"a": {"lora_a": a.at[i].multiply(-1)}, "b": {"lora_b": b}} for i in np.ndindex(3, 4)]
    two = trainable | {"a": {"lora_a": a.at[:2, 1].multiply(-1)}}  # whose sums of words are the same modulo 2³²
    named = {"a": {"lora_a": a}, "c": {"lora_b": b}}
    shaped = trainable | {"b": {"lora_b": b.T}}
    changed = [trainable, *signs, two, named, shaped]
    assert len({int(jax.jit(policy_digest)(one)) for one in changed}) == len(changed)


def test_queues_hold_every_prompt_once_in_few_shapes():
    lengths = [*range(1, 45), 100, 101, 130]
    prompts, keys = prompts_of(lengths), jax.random.split(jax.random.key(0), len(lengths))
    made = list(queues(prompts, keys, rows=4, bucket=16))
    assert sorted(number for queue in made for number in queue.numbers) == list(range(len(lengths)))
    assert [queue.tokens.shape for queue in made] == [(16, 16), (16, 32), (16, 48), (4, 144)]
    for queue in made:
        for number, tokens, length, key in zip(queue.numbers, queue.tokens, queue.lengths, queue.keys, strict=False):
            assert tokens[len(tokens) - length :].tolist() == prompts[number] and key == keys[number]
        assert not queue.lengths[len(queue.numbers) :].any()
    assert max(len(queue.tokens) for queue in queues(prompts, keys, rows=4, bucket=16, most=2)) == 8
    assert all(queue.prompts is None for queue in made)


def test_queues_of_repeated_prompts_name_the_different_ones():
    prompts = [prompt for prompt in prompts_of((5, 3, 9, 7)) for _ in range(6)]
    made = list(queues(prompts, jax.random.split(jax.random.key(0), 24), rows=4, bucket=16))
    # Five times `rows`, one less than there are repetitions, filled up to a power of two.
    assert [(len(queue.numbers), queue.tokens.shape) for queue in made] == [(20, (32, 16)), (4, (4, 16))]
    assert [len(queue.prompts) for queue in made] == [4, 1]
    for queue in made:
        for place, number in enumerate(queue.numbers):
            same = queue.tokens[queue.prompts[queue.copies[place]]]
            np.testing.assert_array_equal(same, queue.tokens[place], err_msg=str(number))


def test_what_cannot_be_rolled_out_is_said_at_once():
    model, params = made("llama")
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(ValueError) as error:
        rollout(model, params, [[1], []], keys, rows=0, max_new_tokens=0, stop_ids=(), temperature=-1.0, top_p=0)
    for text in (
        "rows=0: expected 1 or more",
        "max_new_tokens=0: expected 1 or more",
        "temperature=-1.0: expected 0 (greedy) or more",
        "top_p=0.0: expected a probability",
        "empty prompts [1]: expected at least one token",
        "keys of shape (1,): expected one for each of 2 prompts",
    ):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="no prompts: expected at least one"):
        rollout(model, params, [], keys[:0], rows=1, max_new_tokens=1, stop_ids=())
    bank = lora.Bank.of(params, {"it": lora.init(params, jlora.LoraConfig(r=1), keys[0])})
    with pytest.raises(ValueError, match=r"params of Bank.choose, .* give those of Bank.alone"):
        rollout(model, bank.choose(["it"]), [[1]], keys, rows=1, max_new_tokens=1, stop_ids=())


def test_adapters_of_another_number_of_prompts_are_refused():
    model, params = made("llama")
    bank = lora.Bank.of(params, {"it": lora.init(params, jlora.LoraConfig(r=1), jax.random.key(0))})
    tokens, keys = jnp.ones((3, 4), jnp.int32), jax.random.split(jax.random.key(0), 3)
    settings = dict(rows=3, max_new_tokens=2, stop_ids=(), greedy=True, adapters=bank.places(["it", None]))
    with pytest.raises(ValueError, match="adapters: found those of 2 prompts, expected 3"):
        inspect.unwrap(decode)(model, bank.params, tokens, jnp.full(3, 4), keys, **settings)  # past what tests check


def test_a_rollout_at_temperature_0_takes_the_likeliest_tokens():
    model, params = made("llama")
    prompts = [[3, 4, 5], [7]]
    settings = dict(rows=2, max_new_tokens=5, stop_ids=(), temperature=0.0)
    first, second = (
        rollout(model, params, prompts, jax.random.split(jax.random.key(s), 2), **settings) for s in (0, 1)
    )
    for prompt, one, other in zip(prompts, first.completions, second.completions, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        logits = model(params, np.array([[*prompt, *one.tokens]], np.int32))[0]
        np.testing.assert_array_equal(one.tokens, np.argmax(logits, axis=-1)[len(prompt) - 1 : -1])
