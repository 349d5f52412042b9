import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jlora import hub, lora, quant, tree
from jlora.train.evaluation.sensitivity import divergence, measure

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


def test_reward_models_are_compared_by_their_preferences(model_and_params, byte_tokenizer):
    model, params = model_and_params
    base = {name: leaves for name, leaves in params.items() if name != "lm_head"}
    with pytest.raises(ValueError, match="they make no logits"):
        divergence(model, base, base, byte_tokenizer, RECORDS[:1])
    before, after = (base | {"score": {"kernel": jnp.full((24, 1), value)}} for value in (0.2, -0.1))
    found = divergence(model, before, after, byte_tokenizer, RECORDS[:1], seq_len=16)
    tokens = [*byte_tokenizer(RECORDS[0]["prompt"] + RECORDS[0]["completion"])["input_ids"], 0][-16:]
    hidden = np.asarray(model.hidden(base, jnp.asarray([tokens]))[0][0], np.float64)
    p, q = (1 / (1 + np.exp(-hidden.sum(axis=-1) * value)) for value in (0.2, -0.1))
    assert found == pytest.approx(np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))), rel=1e-4)
    adapted = model.add_score(base, jax.random.key(0))
    assert divergence(model, adapted, lora.merge(adapted), byte_tokenizer, RECORDS[:1], seq_len=16) == 0
