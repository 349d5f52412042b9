"""The table of memory: its cases, the figures of one of them, and what a run that has only some leaves in the file."""

import importlib
import json
import pathlib

import pytest

from jlora.kernels import attention
from jlora.models import decoder
from jlora.train.planning.topology import COMPILERS

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("memory")


@pytest.fixture
def models(memory, tmp_path):
    return memory._write_models(tmp_path)


def test_a_case_is_compiled_from_shapes_and_held_against_its_aims(memory, models):
    case = memory.DRY
    found = memory.measure(case._replace(aim=memory.Aim(peak=1.0, cpu_seconds=1e-3)), models)
    assert found["missed"] == ["cpu_seconds"] and found["aim"] == {"peak": 1.0, "cpu_seconds": 1e-3}
    assert found["cpu_seconds"] > 0
    assert found["peak"] == pytest.approx(found["arguments"] + found["temporaries"], abs=2e-3)


def test_a_case_has_the_forms_that_it_asks_for(memory, models, monkeypatch):
    monkeypatch.setattr(decoder, "TILE", decoder.TILE)
    monkeypatch.setitem(attention.PLAIN, "gpu", attention.PLAIN["gpu"])
    monkeypatch.setattr(memory, "row", lambda case, found, seconds: found)

    def seen(*_):
        return decoder._tiles((2, 2048, 4096), 14336) > 1, attention.PLAIN["gpu"] < 1 << 40

    monkeypatch.setattr(memory, "forecast", seen)
    cases = [
        memory.DRY._replace(whole_mlp=whole, plain_attention=plain)
        for whole, plain in ((False, False), (True, False), (False, True))
    ]
    assert [memory.measure(case, models) for case in cases] == [(True, True), (False, True), (False, False)]


def test_every_case_is_a_run_that_may_be_asked_for(memory, models):
    configs = {case.name: memory.config_of(case, models) for case in memory.CASES}
    assert len(configs) == len(memory.CASES)
    assert {config.train.remat for config in configs.values()} == {"full", "offload", "none"}
    assert configs["8b-1x32768-offload"].lora.r == 32 and configs["0-bf16"].model.quant is None
    assert memory._names("8b-2x2048,1-remat") == ["8b-2x2048", "1-remat"]


def test_without_its_compiler_a_case_says_so_and_keeps_its_figures(memory, tmp_path, monkeypatch):
    monkeypatch.setitem(COMPILERS, "tpu", (("a_package_that_is_not_there",), "tpu"))
    name = memory.TPU[0].name
    found = memory.apart(memory.TPU[0], tmp_path)
    assert "pip install 'jlora[tpu]'" in found["fault"]
    monkeypatch.setattr(memory.record, "RESULTS", tmp_path)
    assert memory.kept({name: found}) == {}
    earlier = {"8b-2x2048": {"peak": 1.0}, name: {"peak": 2.0}, "no such case": {"peak": 3.0}}
    (tmp_path / "memory.json").write_text(json.dumps({"figures": {"cases": earlier}}))
    kept = memory.kept({name: found, "8b-2x2048": {"peak": 4.0}})
    assert kept == {"8b-2x2048": {"peak": 4.0}, name: {"peak": 2.0}}
    assert memory._table([memory.TPU[0]], {name: found}).row_count == 1
