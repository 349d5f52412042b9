"""The best evaluation is watched, kept and left as the adapter; a run that waits for it too long ends as done."""

import io
import json
import math

import pytest
from safetensors.numpy import load_file

from jlora import tree
from jlora.errors import UserError
from jlora.train import Interrupted, TrainConfig, loop, resolve, run
from jlora.train.best import Best
from jlora.train.reporting.metrics import read_metrics
from jlora.train.reporting.progress import Progress
from jlora.train.restore import load_run


def watch(name, **settings):
    return Best(TrainConfig(steps=1, eval_every=1, best_metric=name, **settings))


@pytest.mark.parametrize(
    ("name", "settings", "better"),
    [
        ("eval_loss", {}, -1),
        ("loss", {}, -1),
        ("eval_loss/shop", {}, -1),
        ("eval_perplexity", {}, -1),
        ("eval_exact_match", {}, 1),
        ("eval_rewards/accuracies", {}, 1),
        ("eval_loss", {"greater_is_better": True}, 1),
        ("eval_words", {"greater_is_better": False}, -1),
    ],
)
def test_which_of_two_values_is_better_is_in_the_name_or_a_setting(name, settings, better):
    best = watch(name, **settings)
    seen = [best.see(step, {best.metric: value}) for step, value in enumerate((1.0, 1.0, math.nan, 1.0 + better), 1)]
    assert seen == [True, False, False, True]
    assert best.record() == {"metric": best.metric, "step": 4, "value": 1.0 + better}


def test_patience_counts_evaluations_in_a_row_across_a_resume():
    best = watch("loss", patience=2)
    for step, value in enumerate((3.0, 4.0, 2.0, 2.0), 1):
        best.see(step, {"eval_loss": value})
    again = watch("loss", patience=2)
    again.set_state(json.loads(json.dumps(best.get_state())))
    assert not again.ended and again.get_state() == best.get_state()
    again.see(5, {"eval_loss": math.inf})
    assert again.ended
    other = watch("accuracy", patience=2)
    other.set_state(best.get_state())  # what is best by another number is not known
    assert other.step is None and other.waited == 0


def test_a_number_that_the_evaluation_does_not_give_is_named_with_those_that_it_gives():
    with pytest.raises(UserError, match=r"best_metric is eval_f1, which .* it gives eval_loss, eval_tokens"):
        watch("f1").see(1, {"loss": 1.0, "eval_loss": 1.0, "eval_tokens": 2.0})


@pytest.fixture(scope="module")
def model_folder(make_llama):
    return make_llama(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1)


@pytest.fixture
def settings(model_folder, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} is ", "completion": f"{i}."}) + "\n" for i in range(40)))
    return {
        "model": {"path": model_folder},
        "data": {"path": str(path), "eval_path": str(path)},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "optim": {"learning_rate": 1e-2, "schedule": "constant"},
        "train": {"steps": 20, "batch_size": 2, "seq_len": 24, "save_every": 3, "eval_every": 2, "keep_checkpoints": 1}
        | {"best_metric": "score", "patience": 3},
    }


def changed(settings, **train):
    return resolve(settings | {"train": settings["train"] | train})


def steps_kept(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_leaves_its_best_step_and_ends_early_and_goes_on(settings, tmp_path, monkeypatch):
    scores = {2: 0.1, 4: 0.5, 6: 0.2, 8: 0.3, 10: 0.5, 12: 0.2, 14: 0.9}
    monkeypatch.setattr(loop, "_evaluation", lambda this: {"eval_score": scores[int(this.state.step)]})
    told = io.StringIO()
    run(changed(settings), tmp_path / "run", progress=Progress(told))
    folder = tmp_path / "run"
    assert [record["step"] for record in read_metrics(folder)] == list(range(1, 11))
    assert "ended after step 10 of 20: 3 evaluations in a row without a better one than" in told.getvalue()
    best = {"metric": "eval_score", "step": 4, "value": 0.5}
    assert json.loads((folder / "best.json").read_text()) == best and steps_kept(folder) == [4, 10]
    # The adapter is that of the best step: what a run of as many steps leaves.
    run(changed(settings, steps=4, best_metric=None, patience=0, eval_every=0), tmp_path / "short")
    assert adapter(folder) == adapter(tmp_path / "short")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run(changed(settings), folder)  # ended already: nothing is trained or lost
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    # What is exported of it is the same, by default; the last step is left if it is asked for.
    leaves = tree.flatten(load_run(folder)[2])
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert (next(saved[name] for name in sorted(saved)) == leaves["layers/self_attn/q_proj/lora_a"][0].T).all()
    run(changed(settings, load_best=False), folder)
    assert adapter(folder) != adapter(tmp_path / "short")
    # It waits for longer, and is what it would have been without the end.
    run(changed(settings, steps=14, patience=9), folder)
    whole = tmp_path / "whole"
    with pytest.raises(Interrupted):  # stopped between evaluations, with the best step already behind it
        asked = iter(range(100))
        run(changed(settings, steps=14, patience=9), whole, stop=lambda: next(asked) == 4)
    assert steps_kept(whole)[0] == 4 < steps_kept(whole)[-1]
    run(changed(settings, steps=14, patience=9), whole)
    assert steps_kept(folder) == steps_kept(whole) == [14]
    assert adapter(folder) == adapter(whole) != adapter(tmp_path / "short")
    assert (folder / "best.json").read_bytes() == (whole / "best.json").read_bytes()
