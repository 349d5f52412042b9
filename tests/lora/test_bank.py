"""A bank of adapters: every row of a batch is as if it were alone with its adapter, and nothing is compiled anew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import jlora
from jlora import lora, quant, sharding, tree
from jlora.generate import decode
from jlora.lora import Bank
from jlora.models import build
from jlora.train.evaluation.records import example_sums

CONFIG = transformers.Qwen2Config(
    vocab_size=37,
    hidden_size=64,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
).to_dict()
MODEL = build(CONFIG)
KINDS = {
    "narrow": dict(r=2, target_modules=["q_proj", "down_proj"]),
    "wide": dict(r=5, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "uneven": dict(
        r=3, rank_pattern={"q_proj": 4}, layers_to_transform=[1], lora_bias=True, target_modules=["q_proj", "v_proj"]
    ),
    "pissa": dict(r=2, init_lora_weights="pissa", target_modules=["q_proj"]),
}


@functools.cache
def base():
    return jax.jit(MODEL.random_params)(jax.random.key(0))


@functools.cache
def adapted(kind):
    params = lora.init(base(), jlora.LoraConfig(**KINDS[kind]), jax.random.key(1))
    frozen, trainable = lora.split(params)

    def moved(path, leaf):
        moves = np.random.default_rng(len(path + kind)).normal(0, 0.1, leaf.shape)
        return jnp.asarray(np.asarray(leaf) + moves.astype(np.float32))

    return lora.combine(frozen, tree.map_with_path(moved, trainable))


@functools.cache
def bank():
    return Bank.of(base(), {kind: adapted(kind) for kind in KINDS}, places=7)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 37, (7, 9)), jnp.int32)
LOGITS = jax.jit(lambda params, tokens: MODEL(params, tokens))


def logits_of(kind, row):
    return np.asarray(MODEL(base() if kind is None else adapted(kind), TOKENS[row : row + 1])[0])


def test_every_row_is_as_if_it_were_alone_with_its_adapter():
    choices = ["wide", None, "uneven", "narrow", "wide", "uneven", "pissa"]
    found = LOGITS(bank().choose(choices), TOKENS)
    for row, kind in enumerate(choices):
        np.testing.assert_allclose(found[row], logits_of(kind, row), atol=2e-5, err_msg=str(kind))
    assert np.abs(found[0] - logits_of(None, 0)).max() > 0.1


def test_weighted_sums_are_those_of_mixed_adapters():
    weights = {"narrow": 0.5, "uneven": -0.3, "pissa": 1.0}
    found = LOGITS(bank().choose([weights, "wide", None, *[weights] * 4]), TOKENS)
    mixed, _ = lora.mix(base(), [adapted(kind) for kind in weights], list(weights.values()))
    expected = MODEL(mixed, TOKENS)
    for row in (0, 3, 6):
        np.testing.assert_allclose(found[row], expected[row], atol=2e-5)
    np.testing.assert_allclose(found[1], logits_of("wide", 1), atol=2e-5)
    np.testing.assert_allclose(found[2], logits_of(None, 2), atol=2e-5)


def test_adding_removing_and_choosing_never_recompiles():
    held = bank()
    compiled = LOGITS._cache_size()
    LOGITS(held.choose(["wide"] * 7), TOKENS)
    assert LOGITS._cache_size() <= compiled + 1
    compiled = LOGITS._cache_size()
    held = held.remove("wide").add("again", adapted("narrow")).add("narrow", adapted("uneven"))
    assert held.names == ("narrow", "again", "uneven", "pissa", None, None, None)
    found = LOGITS(held.choose(["again", "narrow", None, "pissa", "again", "narrow", None]), TOKENS)
    assert LOGITS._cache_size() == compiled
    for row, kind in enumerate(["narrow", "uneven", None, "pissa", "narrow"]):
        np.testing.assert_allclose(found[row], logits_of(kind, row), atol=2e-5, err_msg=str(kind))
    alone = held.remove("narrow").alone("uneven")
    np.testing.assert_allclose(MODEL(alone, TOKENS)[3], logits_of("uneven", 3), atol=2e-5)


def test_in_bfloat16_factors_take_half_the_memory_and_rows_differ_by_rounding():
    given = {kind: adapted(kind) for kind in ("narrow", "wide", "uneven")}
    half = Bank.of(base(), given, places=7, dtype="bfloat16").add("pissa", adapted("pissa")).remove("narrow")
    half = half.add("wide", adapted("wide")).add("narrow", adapted("narrow"))
    names = ("lora_a", "lora_b")
    flats = [tree.flatten(lora.adapter_leaves(held.params)) for held in (half, bank())]
    for path, leaf in flats[0].items():
        expected = flats[1][path].nbytes // 2 if path.endswith(names) else flats[1][path].nbytes
        assert leaf.nbytes == expected, path
    choices = ["wide", None, "uneven", "narrow", {"narrow": 0.5, "wide": -0.3}, "uneven", "pissa"]
    found, expected = (LOGITS(held.choose(choices), TOKENS) for held in (half, bank()))
    updates = expected - LOGITS(base(), TOKENS)
    errors, sizes = (jnp.linalg.norm(rows.reshape(7, -1), axis=1) for rows in (found - expected, updates))
    np.testing.assert_array_equal(found[1], expected[1])
    assert (errors <= 0.01 * sizes).all() and (errors[jnp.asarray([0, 2, 3, 4, 5, 6])] > 0).all()
    one = half.alone("wide")
    assert {leaf.dtype for leaf in tree.flatten(lora.adapter_leaves(one)).values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(MODEL(one, TOKENS)[0], found[0], atol=0.02)
    with pytest.raises(ValueError, match="dtype: found 'float8', expected one of float32, bfloat16"):
        Bank.of(base(), given, dtype="float8")


def test_mixtures_compile_once_or_not_at_all_within_the_width():
    mixture = {"narrow": 0.5, "uneven": -0.3}
    wide = Bank.of(base(), {kind: adapted(kind) for kind in KINDS}, places=7, width=2)
    expected = LOGITS(bank().choose([mixture] * 7), TOKENS)
    np.testing.assert_allclose(LOGITS(wide.choose(["wide"] * 7), TOKENS)[0], logits_of("wide", 0), atol=2e-5)
    compiled = LOGITS._cache_size()
    np.testing.assert_allclose(LOGITS(wide.choose([mixture] * 7), TOKENS), expected, atol=2e-5)
    LOGITS(wide.remove("wide").add("wide", adapted("wide")).choose(["wide", mixture, None, *["wide"] * 4]), TOKENS)
    assert LOGITS._cache_size() == compiled
    assert bank().places(["wide", mixture]).numbers.shape == (2, 2)
    assert bank().places(["wide", None]).numbers.shape == (2, 1)
    assert wide.places([None, {"narrow": 1, "wide": 1, "pissa": 1}]).numbers.shape == (2, 3)


def test_adapters_of_experts_and_routers_are_refused():
    config = transformers.Qwen3MoeConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=20,
        num_experts=3,
        num_experts_per_tok=2,
    )
    params = jax.eval_shape(build(config.to_dict()).random_params, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    of_parameters = dict(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj", "mlp.gate.weight"])
    adapter = lora.init(params, jlora.LoraConfig(r=2, **of_parameters), jax.random.key(0))
    plain = lora.init(params, jlora.LoraConfig(r=2, target_modules=["q_proj"]), jax.random.key(0))
    held = Bank.of(params, {"plain": plain}, places=2)
    refused = (
        lambda: held.add("moe", adapter),
        lambda: Bank.of(params, {"moe": adapter}),
        lambda: Bank.of(params, {"plain": plain}, config=jlora.LoraConfig(r=2, **of_parameters)),
    )
    for make in refused:
        with pytest.raises(ValueError) as error:
            make()
        for module in ("layers/mlp/experts/down_proj", "layers/mlp/gate"):
            assert f"{module} is a router or a kernel of experts" in str(error.value)


@functools.cache
def packed(format):
    return tree.map_with_path(
        lambda path, leaf: quant.quantize(leaf, format) if path.endswith("proj/kernel") else leaf, base()
    )


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_beside_a_packed_base_rows_are_those_of_its_adapters_alone(format):
    held = Bank.of(packed(format), {kind: adapted(kind) for kind in KINDS})
    choices = ["wide", None, "uneven", "narrow", "wide", "uneven", "pissa"]
    found = LOGITS(held.choose(choices), TOKENS)
    for row, kind in enumerate(choices):
        alone = lora.overlay(packed(format), {} if kind is None else lora.adapter_leaves(adapted(kind)))
        expected = LOGITS(alone, TOKENS)[row]
        np.testing.assert_allclose(found[row], expected, atol=5e-5, err_msg=str(kind))
        np.testing.assert_allclose(LOGITS(held.alone(kind), TOKENS)[row], expected, atol=5e-5, err_msg=str(kind))
    assert np.abs(found - LOGITS(bank().choose(choices), TOKENS)).max() > 1e-3


def test_on_a_mesh_a_bank_lies_as_its_base_does_and_stays_there():
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    held = Bank.of(sharding.shard(base(), mesh), {kind: adapted(kind) for kind in KINDS}, places=7)

    def lies_by_the_rules():
        flat = tree.flatten(held.params)
        return all(leaf.sharding == sharding.leaf_sharding(path, leaf, mesh) for path, leaf in flat.items())

    assert lies_by_the_rules()
    assert not held.params["layers"]["self_attn"]["q_proj"]["lora_a"].sharding.is_fully_replicated
    LOGITS(held.choose(["wide"] * 7), TOKENS)
    compiled = LOGITS._cache_size()
    held = held.remove("wide").add("again", adapted("narrow")).add("narrow", adapted("uneven"))
    assert lies_by_the_rules()
    found = LOGITS(held.choose(["again", "narrow", None, "pissa", "again", "narrow", None]), TOKENS)
    assert LOGITS._cache_size() == compiled
    for row, kind in enumerate(["narrow", "uneven", None, "pissa", "narrow"]):
        np.testing.assert_allclose(found[row], logits_of(kind, row), atol=5e-5, err_msg=str(kind))


@pytest.mark.parametrize("start", ["pissa", "olora", "eva", "loftq", "lora_ga"])
def test_there_is_room_for_what_a_start_makes_without_its_data(start):
    config = jlora.LoraConfig(
        r=2, init_lora_weights=start, rank_pattern={"v_proj": 3}, target_modules=["q_proj", "v_proj"]
    )
    shapes = Bank.of(base(), {}, places=2, config=config).params["layers"]["self_attn"]
    wider = {"eva": 2, "loftq": 1}.get(start, 2)
    assert shapes["q_proj"]["lora_a"].shape == (2, 3, 64, 2 * wider)
    assert shapes["v_proj"]["lora_b"].shape == (2, 3, 3 * wider, 32)
    if start in ("pissa", "olora"):
        held = Bank.of(base(), {}, places=2, config=config)
        held.add("it", lora.init(base(), config, jax.random.key(0)))


def test_room_for_adapters_that_come_later():
    config = jlora.LoraConfig(r=6, target_modules="all-linear")
    held = Bank.of(base(), {}, places=2, config=config).add("narrow", adapted("narrow"))
    found = MODEL(held.choose(["narrow"] * 7), TOKENS)
    np.testing.assert_allclose(found[2], logits_of("narrow", 2), atol=2e-5)
    with pytest.raises(ValueError) as error:
        held.add("wide", adapted("wide"))
    for words in ("no room at embed_tokens/lora_a", "no room at lm_head/lora_a"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="2 places, none of them free"):
        held.add("pissa", adapted("pissa")).add("third", adapted("narrow"))


def test_prompts_decode_with_their_adapters_on_packed_weights_and_a_mesh():
    adapters = {kind: adapted(kind) for kind in ("narrow", "wide", "uneven")}
    held = Bank.of(packed("nf4"), adapters)
    choices = ["narrow", "wide", None, "uneven", {"narrow": 1, "wide": 1}, "wide", "narrow"]
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    lengths = np.full(7, 9, np.int32)
    keys = jax.random.split(jax.random.key(0), 7)
    settings = dict(max_new_tokens=4, stop_ids=(), greedy=True)
    found = decode(
        MODEL,
        Bank.of(sharding.shard(packed("nf4"), mesh), adapters).params,
        TOKENS,
        lengths,
        keys,
        rows=2,
        adapters=held.places(choices),
        **settings,
    )
    for row, choice in enumerate(choices):
        params = held.choose([choice])
        sequence = np.concatenate([TOKENS[row], found.tokens[row]])
        log_probs = jax.nn.log_softmax(MODEL(params, jnp.asarray(sequence[None])))[0, 8:-1]
        np.testing.assert_allclose(
            found.log_probs[row], log_probs[np.arange(4), sequence[9:]], atol=1e-4, err_msg=str(choice)
        )
        np.testing.assert_array_equal(np.argmax(log_probs, axis=-1), found.tokens[row])


def test_faults_are_named_all_at_once():
    held = bank()
    with pytest.raises(KeyError, match="there is no adapter 'none' in the bank; it holds 'narrow', 'wide'"):
        held.choose(["none"])
    dora = lora.init(base(), jlora.LoraConfig(r=9, use_dora=True, target_modules=["q_proj"]), jax.random.key(0))
    with pytest.raises(ValueError) as error:
        held.add("dora", dora)
    for words in (
        "q_proj/lora_magnitude is more than a bank holds",
        "q_proj/lora_a: found (2, 64, 9), expected at most (2, 64, 5)",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="found 1 place for 2 adapters"):
        Bank.of(base(), {"a": adapted("narrow"), "b": adapted("wide")}, places=1)
    with pytest.raises(ValueError, match="do not go into one bank"):
        Bank.of(base(), {"dora": dora})


def faults(make):
    with pytest.raises(ValueError) as error:
        make()
    return str(error.value)


def test_what_is_no_whole_adapter_is_refused():
    settings, trainable = lora.split(lora.adapter_leaves(adapted("pissa")))
    for make in (lambda part: Bank.of(base(), {"it": part}), lambda part: bank().add("it", part)):
        assert "it: found no lora_a, expected an adapter" in faults(lambda make=make: make(base()))
        assert "self_attn/q_proj lacks lora_scale" in faults(lambda make=make: make(trainable))
        assert "self_attn/q_proj lacks lora_a, lora_b" in faults(lambda make=make: make(settings))


def test_adapters_of_another_base_are_refused():
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3, "vocab_size": 41}
    other = build(CONFIG | sizes)
    params = jax.eval_shape(other.random_params, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    targets = ["q_proj", "down_proj", "embed_tokens"]
    adapter = lora.init(params, jlora.LoraConfig(r=2, target_modules=targets), jax.random.key(0))
    adapter["layers"]["self_attn"]["qkv_proj"] = adapter["layers"]["self_attn"]["q_proj"]
    found = faults(lambda: Bank.of(base(), {"other": adapter, "fits": adapted("narrow")}))
    for fault in (
        "other: layers/self_attn/q_proj/lora_a: found (3, 96, 2), expected at most (2, 64, 2)",
        "other: layers/self_attn/q_proj/lora_scale: found (3,), expected at most (2,)",
        "other: layers/mlp/down_proj/lora_b: found (3, 2, 96), expected at most (2, 2, 64)",
        "other: embed_tokens/lora_a: found (41, 2), expected at most (37, 2)",
        "other: the base has no matrix at layers/self_attn/qkv_proj/lora_b",
    ):
        assert fault in found
    assert "fits:" not in found


def test_only_strings_are_names():
    def unchecked(function):  # by the annotations that tests check and a user's run does not
        return getattr(function, "__wrapped__", function)

    with pytest.raises(KeyError, match="None is the base alone"):
        unchecked(Bank.remove)(bank(), None)
    for name in (None, 3):
        with pytest.raises(ValueError, match=rf"adapters' names: found \[{name}\], expected strings"):
            unchecked(Bank.add)(bank(), name, adapted("narrow"))
    with pytest.raises(ValueError, match="found neither adapters nor config: one of them says"):
        Bank.of(base(), {}, places=2)


def test_a_tied_heads_own_adapters_are_chosen_for_every_row():
    tied = build(CONFIG | {"tie_word_embeddings": True})
    params = jax.jit(tied.random_params)(jax.random.key(0))
    config = jlora.LoraConfig(r=2, init_lora_weights=False, target_modules=["lm_head"])
    adapter = lora.init(params, config, jax.random.key(1))
    held = Bank.of(params, {"it": adapter})
    found, base_alone = tied(held.choose(["it", *[None] * 6]), TOKENS), tied(params, TOKENS)
    np.testing.assert_allclose(found[0], tied(adapter, TOKENS)[0], atol=2e-5)
    np.testing.assert_allclose(found[1:], base_alone[1:], atol=2e-5)
    assert np.abs(found[0] - base_alone[0]).max() > 0.1
    with pytest.raises(ValueError, match="adapters chosen for 1 row, and a batch of 7"):
        tied(held.choose(["it"]), TOKENS)
    with pytest.raises(ValueError, match="params of a bank of 1 adapter"):
        tied(held.params, TOKENS)


def test_a_bank_itself_is_refused_where_adapters_are_to_be_chosen():
    with pytest.raises(ValueError, match="params of a bank of 7 adapters: give the model those of"):
        MODEL(bank().params, TOKENS)
    with pytest.raises(ValueError, match="adapters chosen for 2 rows, and a batch of 7"):
        MODEL(bank().choose(["narrow", None]), TOKENS)
    with pytest.raises(ValueError, match=r"params of Bank.choose, .* give those of Bank.alone"):
        example_sums(MODEL, bank().choose(["narrow"]), [], batch_size=1, seq_len=8)  # it sorts its rows
