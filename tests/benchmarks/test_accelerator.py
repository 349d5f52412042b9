"""The benchmark of one accelerator, tiny on the CPU: what a run on a lent device must not be the first to find out."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "accelerator.py"


def run(tmp_path, *arguments):
    """(exit code, rows, all that it printed)."""
    out = tmp_path / "out" / "figures.json"
    command = [sys.executable, str(SCRIPT), "--dry", "--out", str(out), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, json.loads(out.read_text())["figures"]["rows"], done.stdout + done.stderr


@pytest.mark.slow
def test_every_part_runs_and_what_holds_on_the_cpu_passes(tmp_path):
    code, rows, said = run(tmp_path, "--parts", "train,attention,decode")
    assert code == 0, said
    assert {row["part"] for row in rows} == {"train", "attention", "decode"}
    trained = [row for row in rows if row["part"] == "train"]
    assert [row["format"] for row in trained] == ["nf4", "bfloat16"]
    assert all(row["passed"] and row["plan_gib"] > 0 and len(row["loss"]) == 6 for row in trained)
    timed = {row["form"]: row for row in rows if row["part"] == "attention"}
    assert timed["plain"]["milliseconds"] > 0 and timed["blocked"]["milliseconds"] > 0
    assert "note" in timed["jax.nn, cudnn"]
    assert "attention, ms" in said


def test_parts_for_which_no_time_is_left_are_named(tmp_path):
    code, rows, said = run(tmp_path, "--minutes", "0")
    assert code == 0, said
    assert {row["part"] for row in rows} == {"checks", "train", "attention", "decode", "kernels", "peft"}
    assert all(row["note"] == "left out: no time left" for row in rows)


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import device_checks

    return device_checks


def test_a_check_tells_a_form_that_is_wrong(checks, monkeypatch):
    from jlora.kernels import attention

    right = attention.FORMS["plain"]
    wrong = right._replace(forward=lambda rule, *x: right.forward(rule._replace(scale=rule.scale * 1.01), *x))
    monkeypatch.setitem(attention.FORMS, "wrong", wrong)
    monkeypatch.setitem(attention.FORMS, "right", right)
    found = {name: check for name, check in checks.attention_checks(dry=True) if "packed, float32" in name}
    assert "attention, splash, packed, float32" not in found  # a TPU's
    assert found["attention, right, packed, float32"]()["passed"]
    assert not found["attention, wrong, packed, float32"]()["passed"]


def test_a_check_tells_numbers_that_differ(checks):
    assert checks.compared("abc", "abc") == {"passed": True}
    assert not checks.compared("abc", "abd")["passed"]
    assert not checks.compared("abc", None)["passed"]
    assert checks.compared([1.0, 2.0], [1.0, 2.0001])["passed"]
    assert not checks.compared([1.0, 2.0], [1.0, 2.1])["passed"]
    assert not checks.compared([1.0, float("nan")], [1.0, 2.0])["passed"]
    assert not checks.compared([1.0], [1.0, 2.0])["passed"]
