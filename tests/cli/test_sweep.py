"""A sweep's adapters are what each is alone, from one compiled step; it resumes, and says which is best."""

import itertools
import json
import logging
import os
import pathlib
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import data
from jlora.cli.main import main
from jlora.train.reporting.metrics import read_metrics
from jlora.train.reporting.progress import Progress

RATES, RANKS = ("1e-2", "2e-3"), (2, 5)
NAMES = {f"learning_rate-{rate}_r-{r}": (rate, r) for rate, r in itertools.product(RATES, RANKS)}
SWEEP = [f"--sweep=optim.learning_rate={','.join(RATES)}", "--sweep=lora.r=2,5"]


@pytest.fixture(scope="module")
def command(recipe, data_file):
    return ["train", f"--config={recipe}", f"--config.data.eval_path={data_file}", "--config.train.eval_every=3"]


def compilations(run):
    """What compiled steps the run says that it compiles."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("jax._src.interpreters.pxla")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        run()
    finally:
        logger.propagate = propagate
        logger.setLevel(level)
        logger.removeHandler(handler)
    return [line.partition(" with ")[0] for line in lines if line.startswith("Compiling jit(step)")]


@pytest.fixture(scope="module")
def swept(command, tmp_path_factory):
    """(workdir, compilations, records that were read) of a sweep that is stopped after a step and resumed."""
    workdir, seen = tmp_path_factory.mktemp("sweep"), []
    update, read = Progress.update, data.iterate_records

    def preempted(progress, step, metrics):
        update(progress, step, metrics)
        os.kill(os.getpid(), signal.SIGTERM)

    def counting(*arguments, **settings):
        for record in read(*arguments, **settings):
            seen.append(record)
            yield record

    def run(code):
        assert main([*command, *SWEEP, f"--workdir={workdir}"]) == code

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "update", preempted)
        run(75)
        patch.setattr(Progress, "update", update)
        patch.setattr(data, "iterate_records", counting)
        return workdir, compilations(lambda: run(0)), seen


def test_one_step_is_compiled_and_each_record_is_read_once(swept, data_file):
    _, compiled, seen = swept
    assert len(compiled) == 1, compiled
    assert len(seen) == 2 * pathlib.Path(data_file).read_text().count("\n")  # to train, and to evaluate


@pytest.mark.slow  # train/test_many.py has the same of runs that were not given by --sweep
def test_each_adapter_is_what_it_is_alone(swept, command, tmp_path):
    workdir, _, _ = swept
    together = read_metrics(workdir)
    for name, (rate, r) in NAMES.items():
        alone = [*command, f"--config.optim.learning_rate={rate}", f"--config.lora.r={r}"]
        assert main([*alone, f"--workdir={tmp_path / name}"]) == 0
        for mine, theirs in zip(together, read_metrics(tmp_path / name), strict=True):
            assert mine[f"learning_rate/{name}"] == theirs["learning_rate"]
            for number in ("loss", "grad_norm"):
                assert mine[f"{number}/{name}"] == pytest.approx(theirs[number], rel=1e-5)
        assert mine[f"eval_loss/{name}"] == pytest.approx(theirs["eval_loss"], rel=1e-6)
        folders = workdir / "adapters" / name, tmp_path / name / "adapter"
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(ours[key], theirs[key], atol=1e-6, err_msg=key)


def test_at_the_end_a_table_names_the_best(swept, command, capsys):
    """Of the same command again, which changes nothing."""
    workdir, _, _ = swept
    files = sorted(workdir.glob("adapters/*/*.safetensors"))
    before = [file.read_bytes() for file in files]
    assert main([*command, *SWEEP, f"--workdir={workdir}"]) == 0
    printed = capsys.readouterr().out
    assert [file.read_bytes() for file in files] == before
    last = read_metrics(workdir)[-1]
    ranked = sorted(NAMES, key=lambda name: last[f"eval_loss/{name}"])
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if line.startswith("│")
    ]
    assert [row[-1] for row in rows] == ranked
    for row, name in zip(rows, ranked, strict=True):
        rate, r = NAMES[name]
        loss, evaluated = (f"{last[f'{number}/{name}']:.4f}" for number in ("loss", "eval_loss"))
        assert row[:-1] == [str(float(rate)), str(r), loss, evaluated]
    assert f"best by eval loss: {workdir}/adapters/{ranked[0]}\n" in printed


def test_other_values_are_another_run(swept, command, capsys):
    workdir, _, _ = swept
    assert main([*command, SWEEP[0], "--sweep=lora.r=2,6", f"--workdir={workdir}"]) == 2
    said = capsys.readouterr().err
    assert "belongs to a run with other settings" in said and "learning_rate-1e-2_r-6" in said


def test_a_plan_is_that_of_all_adapters(recipe, capsys):
    sizes = []
    for sweep in ([], ["--sweep=optim.learning_rate=1e-4,2e-4,3e-4 lora.r=2,4,8"]):
        assert main(["plan", f"--config={recipe}", "--topology=cpu", "--json", *sweep]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["bytes_by_kind"])
    one, three = sizes
    assert three["adapters"] == 3 * 4 * one["adapters"]  # at the widest rank, four times the recipe's
    assert three["base, not packed"] == pytest.approx(one["base, not packed"], rel=0.01)


@pytest.mark.parametrize("what", [["train"], ["plan", "--topology=cpu"]])
def test_faults_of_sweep_and_settings_come_in_one_message(what, recipe, capsys):
    assert main([*what, f"--config={recipe}", "--sweep=lora.r=8", "--config.train.seq_len=1"]) == 2
    said = capsys.readouterr().err
    assert "lora.r: found one value" in said and "train.seq_len: found 1" in said
