"""K-quants, judged by gguf's own unpacking; by llama.cpp's packing and unpacking with -m slow."""

import ctypes
import pathlib

import gguf
import numpy as np
import pytest

from jlora.hub.gguf import kquants

EACH = pytest.mark.parametrize("type", kquants.KINDS)


def weights(rows=64, columns=768):
    """Weights as models have them: normal, heavy-tailed, and with columns of sizes of their own."""
    rng = np.random.default_rng(0)
    shape = rows, columns
    scales = np.exp(rng.normal(size=(1, columns)))
    return {
        "normal": rng.normal(size=shape).astype(np.float32) * 0.02,
        "heavy": rng.standard_t(3, size=shape).astype(np.float32) * 0.02,
        "uneven": (rng.normal(size=shape) * scales).astype(np.float32) * 0.02,
    }


def read(packed, type):
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[type])


def error(packed, type, values):
    """Root mean square, as a share of the values' own."""
    return float(np.sqrt(np.mean(np.square(read(packed, type) - values)) / np.mean(np.square(values))))


@EACH
def test_readers_see_the_values_that_were_meant(type, monkeypatch):
    """Every bit is where gguf's unpacking takes it from."""
    kept = []
    for search in ("_with_minima", "_without_minima"):
        found = getattr(kquants, search)
        monkeypatch.setattr(kquants, search, lambda *given, found=found: kept.append(found(*given)) or kept[-1])
    values = weights()["heavy"][:4]
    packed = kquants.quantize(values, type)
    [meant] = kept
    groups = meant.codes.reshape(*meant.scales.shape, -1).astype(np.float32)
    units = [None if unit is None else unit.astype(np.float32)[:, None] for unit in (meant.unit, meant.minimum_unit)]
    half = {"Q3_K": 4, "Q6_K": 32}.get(type, 0)
    expected = (units[0] * meant.scales)[..., None] * (groups - half)
    if meant.minima is not None:
        expected = expected - (units[1] * meant.minima)[..., None]
    np.testing.assert_array_equal(read(packed, type), expected.reshape(values.shape))
    # All codes and the whole range of scales are in use, so that no bit goes unseen.
    bits = int(type[1])
    assert (meant.codes.min(), meant.codes.max()) == (0, 2**bits - 1)
    limit = {"Q2_K": 15, "Q3_K": -32, "Q6_K": -128}.get(type, 63)
    assert limit in meant.scales and len(np.unique(meant.scales)) > 12


# type → (error, that of llama.cpp's own packing) on normal, heavy-tailed and uneven weights.
ERRORS = {
    "Q2_K": [(0.2822, 0.2960), (0.3309, 0.3511), (0.3504, 0.3768)],
    "Q3_K": [(0.1461, 0.1519), (0.1832, 0.1882), (0.1761, 0.1801)],
    "Q4_K": [(0.07134, 0.07136), (0.09341, 0.09371), (0.1002, 0.1001)],
    "Q5_K": [(0.03621, 0.03624), (0.04737, 0.04744), (0.05164, 0.05166)],
    "Q6_K": [(0.01744, 0.01781), (0.02561, 0.02594), (0.0276, 0.0279)],
}


@EACH
def test_the_error_is_no_larger_than_llama_cpps(type):
    for (name, values), (ours, theirs) in zip(weights().items(), ERRORS[type], strict=True):
        found = error(kquants.quantize(values, type), type, values)
        assert found == pytest.approx(ours, rel=0.002), name
        assert found < 1.002 * theirs, name


@EACH
def test_blocks_do_not_depend_on_what_is_packed_beside_them(type):
    values = np.concatenate([*weights(rows=70).values()])
    whole = kquants.quantize(values.reshape(3, 70, -1), type)
    assert whole.shape == (3, 70, 3 * kquants.KINDS[type].nbytes) and 2 * kquants.CHUNK < 3 * 70 * 3
    for i in (0, 69, 71, 209):
        np.testing.assert_array_equal(whole.reshape(210, -1)[i], kquants.quantize(values[i], type))


@EACH
def test_extremes(type):
    """Rows without a scale, with one value, of one sign, tiny and huge: nothing is NaN, and nothing is far off."""
    at = np.arange(256)
    rows = np.stack(
        [
            np.zeros(256),
            np.full(256, 0.7),
            np.full(256, -0.7),
            np.where(at == 77, 0.5, 0),
            np.where(at == 77, -0.5, 0),
            np.linspace(0.5, 1, 256),
            np.linspace(-1, -0.5, 256),
            np.where(at < 128, 65504, -65504),
            65504 * np.sin(at),
        ]
    ).astype(np.float32)
    found = read(kquants.quantize(rows, type), type)
    bits = int(type[1])
    for row, own in zip(rows, found, strict=True):
        assert np.abs(own - row).max() <= np.abs(row).max() / 2 ** (bits - 1), row
    np.testing.assert_array_equal(found[0], 0)
    for tiny in (1e-6, 1e-12, 1e-30, 1e-38, 1e-42):  # below 1e-7, float16 scales are zero or too coarse
        found = read(kquants.quantize((tiny * np.sin(at)[None]).astype(np.float32), type), type)
        assert np.all(np.isfinite(found)) and np.abs(found).max() < 2 * max(tiny, 1e-6)


@EACH
def test_small_weights_keep_their_scales(type):
    """The largest scale of a block is in range although float16 has few digits for its unit.

    llama.cpp's own packing of these has errors up to 1.9 times as large as those of larger weights.
    """
    values = weights(rows=4)["normal"]
    expected = error(kquants.quantize(values, type), type, values)
    small = values * np.float32(2**-6)
    assert error(kquants.quantize(small, type), type, small) < 1.03 * expected


def ggml():
    """llama.cpp's library of types."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    [path] = (pathlib.Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*")
    return ctypes.CDLL(str(path))


@pytest.mark.slow
@EACH
def test_llama_cpp_packs_no_better_and_unpacks_the_same(type):
    library, number = ggml(), int(gguf.GGMLQuantizationType[type])
    for values in weights(rows=256).values():
        packed = kquants.quantize(values, type)
        theirs, unpacked = np.empty_like(packed), np.empty_like(values)
        pack = library.ggml_quantize_chunk
        pack.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        pack(number, values.ctypes.data, theirs.ctypes.data, 0, *values.shape, None)
        assert error(packed, type, values) < 1.002 * error(theirs, type, values)
        unpack = getattr(library, f"dequantize_row_{type.replace('Q', 'q')}")
        unpack.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        unpack(packed.ctypes.data, unpacked.ctypes.data, values.size)
        np.testing.assert_allclose(unpacked, read(packed, type), rtol=1e-6, atol=1e-7)
