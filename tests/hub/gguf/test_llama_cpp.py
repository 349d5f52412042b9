"""SmolLM2 with an adapter, written for llama.cpp and answering there (`pip install llama-cpp-python`; -m slow)."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import hub, lora, tree

SCRIPT = Path(__file__).parents[3] / "scripts" / "function_calling.py"
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "My favourite food is",
    "In 1969 the first man",
    "To bake bread you need",
    "A prime number is",
    "The largest ocean is",
    "Dear Sir or Madam,",
    "She opened the door and",
    "SELECT name FROM",
    "The opposite of hot is",
    "Two plus two equals",
    "Roses are red,",
    "The Great Wall of",
    "Photosynthesis is the process",
    "An apple a day",
    "The meeting is on",
]
NEW = 24


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(file of the base, model, params with an adapter that changes what it says, tokenizer)."""
    spec = importlib.util.spec_from_file_location("function_calling", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    [path] = module.fetch(module.MODEL, Path.home() / ".cache" / "jlora")
    model, base = jlora.load(path)
    params = tree.map_with_path(
        lambda leaf_path, leaf: (
            0.15 * jax.random.normal(jax.random.key(len(leaf_path)), leaf.shape)
            if leaf_path.endswith("lora_b")
            else leaf
        ),
        lora.init(base, jlora.LoraConfig(r=4, lora_alpha=8), jax.random.key(0)),
    )
    return path, model, params, hub.load_tokenizer(path)


def answers(opened, tokenizer, model):
    """(prompt, greedy continuation with the token that ends it) of every prompt, as token ids."""
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        assert opened.tokenize(prompt.encode(), special=True) == ids
        opened.reset()
        answer = []
        for token in opened.generate(ids, temp=0.0, repeat_penalty=1.0):
            answer.append(token)
            if token in model.config.eos_token_ids or len(answer) == NEW:
                break
        found.append((ids, answer))
    return found


def shortfalls(model, params, answered):
    """By how much each token's logit is less than that of the token which jlora would have taken in its place."""
    found = []
    for ids, answer in answered:
        logits = np.asarray(model(params, jnp.asarray([ids + answer])))[0, len(ids) - 1 : -1]
        found.append(logits.max(-1) - logits[np.arange(len(answer)), answer])
    return np.concatenate(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "limit", "same"), [("f32", 0, 0.95), ("f16", 0.05, 0.95), ("q8_0", 0.5, 0.95), ("q4_k_m", 1, 0.93)]
)
def test_a_merged_model_answers_alike(smollm2, llama_cpp, tmp_path, dtype, limit, same):
    """jlora on what it reads from the file, and llama.cpp, which rounds what f16 and packed matrices multiply as well:
    there it may choose otherwise where two tokens are all but equally likely. The base would not say the same.
    """
    path, model, params, tokenizer = smollm2
    hub.save_gguf(tmp_path / "model.gguf", model, params, path, dtype=dtype)
    _, merged = hub.load(tmp_path / "model.gguf", dtype=jnp.float32)
    answered = answers(llama_cpp(tmp_path / "model.gguf"), tokenizer, model)
    found = shortfalls(model, merged, answered)
    assert found.max() <= limit
    assert np.mean(found == 0) > same
    assert shortfalls(model, lora.strip(params), answered).max() > 1


@pytest.mark.slow
def test_an_adapter_beside_its_base_answers_alike(smollm2, llama_cpp, tmp_path):
    path, model, params, tokenizer = smollm2
    hub.save_gguf(tmp_path / "base.gguf", model, lora.strip(params), path, dtype="f32")
    hub.save_gguf_adapter(tmp_path / "adapter.gguf", model, params)
    answered = answers(llama_cpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf"), tokenizer, model)
    assert shortfalls(model, params, answered).max() == 0
    assert (
        answered[0][1]
        == tokenizer(jlora.generate(model, params, tokenizer, PROMPTS[:1], max_new_tokens=NEW)[0]).input_ids
    )
