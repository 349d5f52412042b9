"""An engine on several devices answers as on one."""

import itertools

import jax
import numpy as np
import pytest

import jlora
from jlora import lora, sharding
from jlora.lora import Bank
from jlora.serve import Engine, Limits, Request, Sampling

PROMPTS = ("a", "What is it?", "The quick brown fox jumps over the lazy dog. " * 4)
DRAWN = Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def divided(make_llama):
    """A model of which two devices have heads of their own, in a folder."""
    return make_llama(hidden_size=24, intermediate_size=40, num_attention_heads=6, num_key_value_heads=2)


def started(folder, mesh=None, quant=None):
    """(an engine with two adapters, the params of a third)."""
    model, params = jlora.load(folder, dtype="float32", quant=quant, mesh=mesh)
    config = jlora.LoraConfig(r=2, lora_alpha=200, target_modules="all-linear", init_lora_weights=False)
    one, two, three = (lora.init(params, config, jax.random.key(seed)) for seed in range(3))
    bank = Bank.of(params, {"one": one, "two": two}, places=4, config=jlora.LoraConfig(r=4))
    limits = Limits(rows=4, length=256, chunk=32)
    return Engine(model, bank, jlora.load_tokenizer(folder), limits), three


def conversation(engine, third, *, warm=False):
    """The tokens of all answers: long prompts and short ones, that share beginnings, drawn and not, with any adapter.

    After the first few steps there is one more adapter, and if the engine is warm, nothing is compiled.
    """
    if warm:
        engine.programs.warm()
        engine.programs.resize(128, 256), engine.programs.resize(256, 128)
        engine.shelf.warm()
    heard = []

    def ask(prompt, adapter, sampling):
        heard.append([])
        tokens = engine.tokenizer(prompt)["input_ids"]
        engine.submit(Request(tokens, 8, adapter, sampling, seed=7, top=3, ignore_end=True), heard[-1].append)

    def run(turns=500):
        while turns and engine.turn():
            turns -= 1

    for prompt, adapter in ((PROMPTS[0], "one"), (PROMPTS[2], "two"), (PROMPTS[1], None)):
        ask(prompt, adapter, Sampling(temperature=0.0))
    run(6)
    with pytest.MonkeyPatch.context() as patch:
        if warm:
            patch.setattr("jax._src.compiler.compile_or_get_cached", None)  # whoever compiles fails
        added = engine.put_adapter("three", third)
        engine.turn()
        assert added.result() is None
        for prompt, adapter in ((PROMPTS[2] + "!", "two"), (PROMPTS[2], "three"), (PROMPTS[1], "one"), ("b", None)):
            ask(prompt, adapter, DRAWN)
        run()
    assert engine.failure is None and all(pieces[-1].finish == "length" for pieces in heard), heard
    return [[token for piece in pieces for token in piece.tokens] for pieces in heard]


@pytest.mark.parametrize(
    ("folder", "sizes", "quant"),
    [
        ("divided", {"tensor": 2}, "nf4"),
        pytest.param("divided", {"data": 2, "fsdp": 2, "tensor": 2}, None, marks=pytest.mark.slow),
        # One head of keys and three of queries: each device has all of them.
        pytest.param("model_folder", {"tensor": 4}, "nf4", marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_of_one_device(folder, sizes, quant, request):
    folder = request.getfixturevalue(folder)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = sharding.make_mesh(sharding.MeshConfig(**sizes), devices)
    alone, (engine, third) = conversation(*started(folder, quant=quant)), started(folder, mesh, quant)
    before = placements(engine)
    found = conversation(engine, third, warm=True)
    numbers, expected = ([[token.number for token in tokens] for tokens in answers] for answers in (found, alone))
    assert numbers == expected and len(set(map(tuple, numbers))) > 5
    for pair in zip(itertools.chain(*found), itertools.chain(*alone), strict=True):
        np.testing.assert_allclose(*(token.log_prob for token in pair), atol=1e-3)
    assert engine.numbers["prompt_tokens_cached"] > 100 and placements(engine) == before


def placements(engine):
    return [leaf.sharding for leaf in jax.tree.leaves(engine._params)]
