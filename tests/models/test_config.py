"""Two models of one architecture compute the same from the same weights."""

import pytest
import transformers

from jlora.models import build

LLAMA = transformers.LlamaConfig(
    vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3
).to_dict()
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 8}
GPT = {"model_type": "gpt2", "n_embd": 24, "n_head": 3, "n_layer": 2, "vocab_size": 37}


@pytest.mark.parametrize(
    ("one", "other", "faults"),
    [
        (LLAMA, {"max_position_embeddings": 99, "eos_token_id": 5, "dtype": "float16", "use_cache": False}, []),
        (LLAMA, {"rms_norm_eps": 0.5, "tie_word_embeddings": True}, ["norm_eps: 1e-06 and 0.5", "tie_word_embeddings"]),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, ["ropes[0]: Rope"]),
        (LLAMA | YARN, {"max_position_embeddings": 99}, ["original_max_position_embeddings=99"]),
        (MISTRAL, {"sliding_window": 9}, ["layers[0]: Layer(window=8", "layers[1]: Layer(window=8"]),
        (GPT, {"n_positions": 99}, ["max_position_embeddings: 1024 and 99"]),
        (GPT, LLAMA, ["model_type: 'gpt2' and 'llama'", "names: Names("]),
    ],
)
def test_what_differs_is_named(one, other, faults):
    models = build(one), build(one | other)
    if not faults:
        models[0].config.require_same(models[1].config, "one", "other")
        return
    with pytest.raises(ValueError, match=r"^one and other are not models of one architecture") as error:
        models[0].config.require_same(models[1].config, "one", "other")
    assert all(fault in str(error.value) for fault in faults)
    assert len(str(error.value).splitlines()) > len(faults)
