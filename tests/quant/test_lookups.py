"""Every form of a lookup gives the table's own values, to the bit."""

import functools

import jax
import numpy as np
import pytest

from jlora.quant.four_bit import CODEBOOKS
from jlora.quant.lookups import BEST, FORMS, lookup
from jlora.quant.scales import dynamic_map

TABLES = {
    **CODEBOOKS,
    "bytes": np.arange(16, dtype=np.uint8)[::-1].copy(),
    "dynamic": dynamic_map(),
    "one short of a power of two": dynamic_map(signed=False)[:-1],
    "seven": np.logspace(0, 6, 7, dtype=np.float32),
    "ends": np.float32([-np.inf, 0, np.inf]),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("table", TABLES)
def test_every_form_gives_the_table(table, name):
    values = TABLES[table]
    index = np.random.default_rng(0).integers(0, len(values), (5, 33)).astype(np.uint8)
    index.ravel()[:2] = 0, len(values) - 1
    found = np.asarray(jax.jit(functools.partial(FORMS[name], table=values))(index))
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values[index])


@pytest.mark.parametrize("table", ["nf4", "dynamic"])
@pytest.mark.parametrize(("device", "gathers"), [("tpu", False), ("gpu", True)])
def test_a_tpu_gathers_nothing(monkeypatch, table, device, gathers):
    monkeypatch.setattr("jlora.quant.lookups.target", lambda: device)
    program = jax.jit(functools.partial(lookup, table=TABLES[table])).lower(np.zeros((8, 128), np.uint8))
    assert ("gather" in program.as_text()) == gathers


def test_every_form_is_the_best_somewhere():
    assert {name for names in BEST.values() for name in names} == FORMS.keys()
