import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jlora import hub, quant, tree
from jlora.train.sensitivity import measure

RECORDS = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}, as always"} for i in range(5)]
CONFIG = quant.QuantConfig(rules=((r"layers/.*/kernel", "fp4"), (r".*", None)), double_quant=False)


@pytest.fixture
def model_and_params(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model, params = hub.load(tmp_path)
    return model, tree.map_with_path(lambda path, leaf: 8 * leaf if path.endswith("kernel") else leaf, params)


def test_it_is_the_divergence_from_the_unpacked_model(model_and_params, byte_tokenizer):
    model, params = model_and_params
    damage = measure(model, params, byte_tokenizer, RECORDS, CONFIG, count=3, seq_len=16)
    assert len(damage) == 14
    kernel = params["layers"]["mlp"]["down_proj"]["kernel"]
    packed = quant.dequantize(quant.quantize(kernel[1], "fp4", double_quant=False))
    changed = tree.unflatten({**tree.flatten(params), "layers/mlp/down_proj/kernel": jnp.stack([kernel[0], packed])})
    total, count = 0.0, 0
    for record in RECORDS[:3]:
        text = record["prompt"] + record["completion"]
        tokens = [*byte_tokenizer(text)["input_ids"], byte_tokenizer.eos_token_id][-16:]
        before, after = (jax.nn.log_softmax(model(p, np.array([tokens], np.int32))) for p in (params, changed))
        total, count = total + float(jnp.sum(jnp.exp(before) * (before - after))), count + len(tokens)
    assert damage["layers/1/mlp/down_proj/kernel"] == pytest.approx(total / count, rel=1e-3)
    assert all(value > 0 for value in damage.values())
