import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import quant

CONFIG = quant.QuantConfig(rules=((r"layers/.*/kernel", "nf4"), (r".*", None)))


def params():
    """Two stacks of kernels, one twice as large, and leaves that are not packed."""
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "layers": {
            "a": {"kernel": jax.random.normal(keys[0], (4, 64, 64)) * jnp.array([1.0, 3, 1, 1])[:, None, None]},
            "b": {"kernel": jax.random.normal(keys[1], (4, 64, 128)), "scale": jnp.ones((4, 64))},
        },
        "lm_head": {"kernel": jnp.ones((64, 64))},
    }


def kept(config):
    return {
        (name, layer): quant.leaf_format(f"layers/{name}/kernel", config, layer) for name in "ab" for layer in range(4)
    }


def test_candidates_are_the_packed_kernels_layer_by_layer():
    found = quant.candidates(params(), CONFIG)
    assert [(c.name, c.index, c.format, c.size) for c in found[2:5]] == [
        ("layers/2/a/kernel", 2, "nf4", 4096),
        ("layers/3/a/kernel", 3, "nf4", 4096),
        ("layers/0/b/kernel", 0, "nf4", 8192),
    ]
    assert len(found) == 8


def test_weight_damage_is_the_squared_error():
    damage = quant.weight_damage(params(), CONFIG)
    kernel = params()["layers"]["b"]["kernel"][2]
    error = jnp.sum((kernel - quant.dequantize(quant.quantize(kernel))) ** 2)
    assert damage["layers/2/b/kernel"] == pytest.approx(float(error), rel=1e-5)
    assert max(damage, key=damage.get) == "layers/1/a/kernel"


@pytest.mark.parametrize(("spare", "bits"), [("int8", 5.3), (None, 5.3)])
def test_the_most_damaged_a_weight_are_kept_within_the_bits(spare, bits):
    found = quant.candidates(params(), CONFIG)
    damage = {c.name: 0.1 * c.size for c in found} | {"layers/1/a/kernel": 9e4, "layers/3/b/kernel": 9e4}
    config = quant.choose(found, damage, bits, CONFIG, spare=spare)
    formats = kept(config)
    sizes = {"a": 4096, "b": 8192}
    mean = sum(sizes[name] * (4.127 if format else 16) for (name, _), format in formats.items()) / 49152
    if spare:
        mean = sum(sizes[name] * (4.127 if format == "nf4" else 8) for (name, _), format in formats.items()) / 49152
    assert mean <= bits
    assert formats["a", 1] == spare
    # In 16 bits the other does not fit: 5.3 bits are 4,855 weights more, so a smaller one may take its place.
    assert (formats["b", 3] == spare) == (spare == "int8")
    assert formats["b", 0] == "nf4"
    assert quant.leaf_format("lm_head/kernel", config) is None


def test_what_else_the_config_says_stays():
    found = quant.candidates(params(), CONFIG)
    config = quant.QuantConfig(CONFIG.rules, double_quant=False, merge_aware=True)
    chosen = quant.choose(found, {c.name: 1.0 for c in found}, 6.0, config)
    assert chosen.merge_aware and not chosen.double_quant


@pytest.mark.parametrize("bits", [4.0, 16.0, np.nan])
def test_bits_that_cannot_be_are_refused(bits):
    found = quant.candidates(params(), CONFIG)
    with pytest.raises(ValueError, match=r"expected from 4\.13\d to less than 16"):
        quant.choose(found, {}, bits, CONFIG)
