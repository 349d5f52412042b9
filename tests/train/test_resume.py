"""A resume is the same run, or is refused by name; it may be longer, and holds nothing before its first checkpoint."""

import datetime
import io
import json
import pathlib
import shutil

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from jlora import checkpoint, data
from jlora.errors import UserError
from jlora.train import Interrupted, loop, resolve, resume, run
from jlora.train.algorithms.algorithm import Plan
from jlora.train.reporting.metrics import read_metrics
from jlora.train.reporting.progress import Progress


@pytest.fixture(scope="module")
def model_folder(make_llama):
    return make_llama(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1)


@pytest.fixture(scope="module", autouse=True)
def runs_draw_nothing():
    """Here they draw: curves are among the files that are compared."""


@pytest.fixture(scope="module")
def settings(model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    chats = [
        [{"role": "user", "content": f"{i} plus {i} is "}, {"role": "assistant", "content": f"{2 * i}."}]
        for i in range(20)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return {
        "model": {"path": model_folder},
        "data": {"path": str(path)},
        "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "optim": {"learning_rate": 1e-3, "schedule": "constant"},
        "train": {"steps": 2, "batch_size": 2, "seq_len": 48},
    }


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    run(resolve(settings), workdir)
    return workdir


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def changed(settings, group, **values):
    return settings | {group: settings.get(group, {}) | values}


def test_a_run_goes_on_to_more_steps_as_if_they_had_been_asked_for(settings, finished, tmp_path):
    longer = changed(settings, "train", steps=4)
    workdir = copy(finished, tmp_path)
    run(resolve(longer), workdir)
    run(resolve(longer), tmp_path / "whole")
    assert [record["loss"] for record in read_metrics(workdir)] == [
        record["loss"] for record in read_metrics(tmp_path / "whole")
    ]
    one, other = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (workdir, tmp_path / "whole")
    )
    assert all((one[name] == other[name]).all() for name in one)
    with pytest.raises(UserError, match="has done 4 steps, and the settings ask for 3: expected at least as many"):
        run(resolve(changed(settings, "train", steps=3)), workdir)


def test_a_finished_run_is_left_alone_or_goes_on_by_the_longer_schedule(settings, tmp_path):
    falling = settings | {"optim": {"learning_rate": 1e-3, "schedule": "linear"}}
    run(resolve(falling), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    told = io.StringIO()
    run(resolve(falling), tmp_path, progress=Progress(told))
    assert "finished already, after 2 steps: nothing is trained" in told.getvalue()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    run(resolve(changed(falling, "train", steps=5)), tmp_path)
    rates = [record["learning_rate"] for record in read_metrics(tmp_path)]
    assert rates == pytest.approx([1e-3, 5e-4, 6e-4, 4e-4, 2e-4])
    for name in ("adapter/adapter_model.safetensors", "curves.png", "usage.json", "config.json"):
        assert (tmp_path / name).read_bytes() != before[tmp_path / name], name


def test_what_is_said_of_other_steps():
    said = []
    begun = resume.Begun(pathlib.Path("run"), 2, manifest={"steps": 4})
    resume.refuse_fewer_steps(begun, 8, said.append)
    assert said == [
        "the run was to have 4 steps and now has 8: from step 3 on the learning rate is that of a schedule over 8 steps"
    ]


def test_settings_of_an_older_version_are_read_with_todays_defaults(settings, finished, tmp_path):
    workdir = copy(finished, tmp_path)
    path = workdir / "config.json"
    stored = json.loads(path.read_text())
    del stored["train"]["on_nonfinite"], stored["kto"], stored["lora"]["use_dora"]
    path.write_text(json.dumps(stored))
    run(resolve(settings), workdir)
    stored["train"]["of_yesterday"] = 3
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"train\.of_yesterday: the run has 3, given None"):
        run(resolve(settings), workdir)


def test_messages_say_which_value_is_the_runs(settings, finished):
    with pytest.raises(UserError, match=r"lora\.r: the run has 2, given 4"):
        run(resolve(changed(settings, "lora", r=4)), finished)


def test_a_run_that_failed_before_its_first_checkpoint_holds_nothing(settings, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(resume.to_dict(resolve(changed(settings, "lora", r=7)))))
    begun = resume.read_begun(tmp_path)
    resume.refuse_other_settings(begun, resolve(settings))
    assert begun.step is None and resume.with_dtype(begun, resolve(settings)).model.dtype == "float32"


@pytest.fixture
def manifest(settings, tmp_path, model_folder):
    """manifest(): of a run with rewards and a reward model, from what lies there at the time."""
    (tmp_path / "reward.py").write_text("def reward(completions, **_):\n    return [0.0] * len(completions)\n")
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "adapter_model.safetensors").write_bytes(b"one")
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "a"}\n')
    rollout = {
        "rewards": [f"{tmp_path}/reward.py:reward", f"metric:{tmp_path}/reward.py:key", "model"],
        "reward_model": str(tmp_path / "judge"),
        "max_completion_length": 8,
        "num_generations": 2,
    }
    own = {group: settings[group] for group in ("model", "train", "optim")} | {
        "algorithm": "grpo",
        "rollout": rollout,
        "data": settings["data"] | {"eval_path": str(tmp_path / "held_out.jsonl")},
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    day = datetime.datetime(2026, 1, 2)

    def make(tokens="0", **rest):
        return resume.manifest(resolve(own | rest), tokenizer, Plan(2, lambda base: None, tokens=tokens), day)

    return tokenizer, make


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("reward.py", "rollout.rewards"),
        ("judge/adapter_model.safetensors", "rollout.reward_model"),
        ("held_out.jsonl", "data.eval_path"),
    ],
)
def test_files_that_changed_meanwhile_are_named(manifest, tmp_path, file, setting):
    _, make = manifest
    begun = resume.Begun(tmp_path, 1, manifest=json.loads(json.dumps(make())))
    resume.refuse_other_files(begun, make())
    (tmp_path / file).write_text("something else")
    with pytest.raises(UserError) as error:
        resume.refuse_other_files(begun, make())
    said = []
    resume.refuse_other_files(begun, make(), said.append)
    assert said[0].endswith(str(error.value).partition(":\n")[2])
    assert f"contents of {setting}: {tmp_path / file} has changed" in str(error.value)


def test_other_evaluation_data_may_be_watched(manifest, tmp_path, settings):
    _, make = manifest
    begun = resume.Begun(tmp_path, 1, manifest=make())
    resume.refuse_other_files(begun, make(data=settings["data"] | {"eval_path": settings["data"]["path"]}))


def test_tokenizer_template_and_tokens_that_changed_meanwhile_are_named(manifest, tmp_path):
    tokenizer, make = manifest
    begun = resume.Begun(tmp_path, 1, manifest=make())
    tokenizer.chat_template += "{# other #}"
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError) as error:
        resume.refuse_other_files(begun, make("1"))
    for part in ("chat template: has changed", "vocabulary: has changed", "tokens of the data: have changed"):
        assert part in str(error.value)


def test_templates_see_the_date_of_the_runs_beginning(settings, model_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{{ strftime_now('%Y-%m-%d') }}\n{%- set _ = strftime_now('%-d %B') %}" + tokenizer.chat_template
    )
    tokenizer.save_pretrained(folder)
    dated = changed(settings, "model", path=str(folder))
    with pytest.raises(Interrupted):
        run(resolve(dated), tmp_path / "run", stop=lambda: True)
    today = datetime.datetime.now()

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return today + datetime.timedelta(days=1)

    monkeypatch.setattr(datetime, "datetime", Tomorrow)
    encoded = data.fitted(tokenizer, 257, today).apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    assert encoded.startswith(f"{today:%Y-%m-%d}")
    run(resolve(dated), tmp_path / "run")  # other tokens than those that it began with would be refused
    text = checkpoint.newest(tmp_path / "run" / "checkpoints")[1][resume.DATE]
    assert text.startswith(f"{today:%Y-%m-%d}")
    with pytest.raises(UserError, match="tokens of the data: have changed"):
        monkeypatch.setattr(resume, "DATE", "unknown")
        run(resolve(dated), tmp_path / "run")
    assert np.isfinite(read_metrics(tmp_path / "run")[-1]["loss"])


def test_without_config_json_the_checkpoint_says_what_the_run_is(settings, finished, tmp_path):
    workdir = copy(finished, tmp_path)
    (workdir / "config.json").unlink()
    begun = resume.read_begun(workdir)
    assert begun.step == 2 and begun.fixed
    with pytest.raises(UserError, match=r"lora\.r: the run has 2, given 4"):
        run(resolve(changed(settings, "lora", r=4)), workdir)
    with pytest.raises(UserError, match="expected at least as many"):
        run(resolve(changed(settings, "train", steps=1)), workdir)
    run(resolve(changed(settings, "train", steps=3)), workdir)
    assert len(read_metrics(workdir)) == 3


def test_the_config_of_an_adapter_is_watched_where_the_checkpoint_knows_it(manifest, tmp_path):
    _, make = manifest
    before = make()
    path = tmp_path / "judge" / "adapter_config.json"
    path.write_text('{"r": 2}')
    resume.refuse_other_files(resume.Begun(tmp_path, 1, manifest=before), make())
    begun = resume.Begun(tmp_path, 1, manifest=make())
    path.write_text('{"r": 3}')
    with pytest.raises(UserError, match=r"adapter_config\.json has changed"):
        resume.refuse_other_files(begun, make())


def test_every_process_sees_the_date_of_the_first(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    told = []
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.broadcast_one_to_all",
        lambda now: told.append(now) or np.array([2026, 3, 4, 5, 6, 7], np.int32),
    )
    assert resume.Begun(pathlib.Path("run")).date == datetime.datetime(2026, 3, 4, 5, 6, 7)
    assert len(told) == 1


def test_a_reward_that_fails_in_evaluation_loses_no_step(settings, tmp_path, monkeypatch):
    def fails(this):
        raise UserError("rewards failed")

    monkeypatch.setattr(loop, "_evaluation", fails)
    watched = changed(settings, "data", eval_path=settings["data"]["path"])
    with pytest.raises(UserError, match="rewards failed"):
        run(resolve(changed(watched, "train", eval_every=2, steps=3, save_every=100)), tmp_path)
    assert checkpoint.newest(tmp_path / "checkpoints")[0] == 2
