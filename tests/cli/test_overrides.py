"""Overrides are parsed by the type of the setting, not by what they look like."""

import json

import pytest

from jlora.cli.overrides import read_config, read_run
from jlora.errors import MissingFileError, UserError
from jlora.train.config import resolve, to_dict


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("--config.model.path=123", "model.path", "123"),
        ("--config.data.path=True", "data.path", "True"),
        ("--config.optim.learning_rate=1e-3", "optim.learning_rate", 1e-3),
        ("--config.train.epochs=2", "train.epochs", 2.0),
        ("--config.train.remat=false", "train.remat", False),
        ("--noconfig.train.remat", "train.remat", False),
        ("--config.model.quant=nf4", "model.quant", "nf4"),
        ("--config.lora.target_modules=.*_proj", "lora.target_modules", ".*_proj"),
        ("--config.lora.target_modules=['q_proj','v_proj']", "lora.target_modules", ("q_proj", "v_proj")),
        ("--config.lora.rank_pattern={'layers.1.self_attn.q_proj':4}", "lora.rank_pattern",
         (("layers.1.self_attn.q_proj", 4),)),
        ("--config.mesh.fsdp=-1", "mesh.fsdp", -1),
    ],
)  # fmt: skip
def test_values(recipe, override, path, value):
    group, key = path.split(".")
    found = getattr(getattr(resolve(read_config(recipe, [override])), group), key)
    assert (found, type(found)) == (value, type(value))


def test_the_value_may_follow_as_an_argument_of_its_own_and_the_last_one_counts(recipe):
    config = resolve(read_config(recipe, ["--config.lora.r", "3", "--config.lora.r=5"]))
    assert config.lora.r == 5


def test_a_word_behind_the_file_goes_to_get_config(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from jlora.train.config import default_config\n\n\n"
        "def get_config(word='small'):\n    config = default_config()\n"
        "    config.model.path = word\n    return config\n"
    )
    assert read_config(str(path), []).model.path == "small"
    assert read_config(f"{path}:large", []).model.path == "large"


def test_two_commands_in_one_process_do_not_meet(recipe):
    first = resolve(read_config(recipe, ["--config.lora.r=7"]))
    assert (first.lora.r, resolve(read_config(recipe, [])).lora.r) == (7, 2)


SETTINGS = {
    "algorithm": "dpo",
    "model": {"path": "m", "quant": None},
    "data": {"path": "d.jsonl"},
    "lora": {"r": 3, "target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 4}},
    "optim": {"learning_rate": 1e-4},
    "train": {"epochs": 2},
}


def test_settings_may_stand_in_yaml_or_json(tmp_path):
    lines = [f"{group}: {json.dumps(values)}\n" for group, values in SETTINGS.items()]
    lines[4] = "optim:\n  learning_rate: 1e-4\n"
    (tmp_path / "a.yaml").write_text("".join(lines))
    (tmp_path / "a.json").write_text(json.dumps(SETTINGS))
    yaml, plain = (resolve(read_config(str(tmp_path / name), [])) for name in ("a.yaml", "a.json"))
    assert yaml == plain
    assert (yaml.algorithm, yaml.lora.r, yaml.optim.learning_rate, yaml.train.epochs) == ("dpo", 3, 1e-4, 2)
    assert yaml.lora.rank_pattern == (("layers.1.self_attn.q_proj", 4),)
    assert resolve(read_config(str(tmp_path / "a.yaml"), ["--config.lora.r=5"])).lora.r == 5
    # What a run wrote of itself.
    (tmp_path / "config.json").write_text(json.dumps(to_dict(yaml)))
    assert resolve(read_config(str(tmp_path / "config.json"), [])) == yaml


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "base_model: m\ndatasets:\n- path: d\n", "found none of jlora's settings, expected groups of them"),
        ("a.yaml", "- 1\n", "found none of jlora's settings"),
        ("a.yaml", "3: {}\n", "found none of jlora's settings"),
        ("a.yaml", "", "found none of jlora's settings"),
        ("a.yaml", "model: [", "not valid YAML or JSON"),
        ("a.yaml", "model: !!python/object/apply:os.getcwd []", "not valid YAML or JSON"),
        ("a.json", "{", "not valid YAML or JSON"),
    ],
)
def test_what_is_not_a_recipe_says_what_one_looks_like(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_config(str(tmp_path / name), [])
    assert words in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_a_group_that_may_be_missing_is_left_out_by_none(recipe, tmp_path):
    (tmp_path / "a.yaml").write_text("model: {path: m}\ndata: {path: d}\nlora: null\ntrain: {steps: 1}\n")
    assert resolve(read_config(str(tmp_path / "a.yaml"), [])).lora is None
    for given in ([], ["--config.lora.r=3"]):
        assert resolve(read_config(recipe, [*given, "--config.lora=None"])).lora is None


def test_wrong_settings_in_yaml_are_named_all_at_once(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model: {path: m, nope: 1}\ndata: {path: d}\ntrain: {steps: many}\nbla: 3\nlora: 3\n"
    )
    with pytest.raises(UserError) as error:
        resolve(read_config(str(tmp_path / "a.yaml"), []))
    for words in ("model.nope", "train.steps", "bla", "lora"):
        assert words in str(error.value)
    with pytest.raises(MissingFileError, match=r"none.yaml is not a file"):
        read_config(str(tmp_path / "none.yaml"), [])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "lora: {r: 4}\nmodel: {path: m}\nlora: {alpha: 8}\n", "a.yaml, line 1: found lora more than once"),
        ("a.yaml", "model: {path: m}\nlora:\n  r: 4\n  r: 8\n", "a.yaml, line 3: found r more than once"),
        ("a.json", '{"model": {"path": "m"}, "lora": {"r": 4, "r": 8}}', "a.json: found r more than once"),
        ("a.yaml", "model: {path: m}\nlora: {3: 4}\n", "a.yaml: lora: found the key 3, expected the name of a setting"),
        ("a.yaml", "model: {path: m}\nlora: &a\n  r: *a\n", "a.yaml: lora: r: found a value that contains itself"),
        ("a.yaml", "model: {path: m}\nlora: {target_modules: &a [*a]}\n", "found a value that contains itself"),
    ],
)
def test_settings_that_stand_twice_or_have_no_name_are_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_config(str(tmp_path / name), [])
    assert words in str(error.value)


def test_an_anchor_may_be_used_again(tmp_path):
    text = "model: {path: &p m}\ndata: {path: *p}\nlora: &l {r: 4}\noptim:\n  learning_rate: 1e-3\n"
    (tmp_path / "a.yaml").write_text(text)
    assert read_config(str(tmp_path / "a.yaml"), []).data.path == "m"


# A setting's value in YAML, and what becomes of it; YAML 1.1 would read some of them otherwise.
FORMS = [
    ("optim.learning_rate", "1e-4", 1e-4),
    ("optim.learning_rate", "2.5E-04", 2.5e-4),
    ("optim.learning_rate", "1", 1.0),
    ("optim.weight_decay", ".5", 0.5),
    ("train.max_rise", "null", None),
    ("train.max_rise", "", None),
    ("train.max_rise", "~", None),
    ("train.max_rise", ".inf", float("inf")),
    ("train.steps", "010", 10),
    ("train.steps", "0x10", 16),
    ("train.seed", "+7", 7),
    ("train.load_best", "False", False),
    ("train.remat", "offload", "offload"),
    ("train.remat", "true", True),
    ("train.metrics", "[exact_match, 'a.py:f']", ("exact_match", "a.py:f")),
    ("train.metrics", "\n  - exact_match", ("exact_match",)),
    ("train.project", "no", "no"),
    ("train.project", "off", "off"),
    ("train.run_name", "2026-11-30", "2026-11-30"),
    ("train.run_name", "12:30", "12:30"),
    ("train.run_name", "1_000", "1_000"),
    ("train.run_name", "'7'", "7"),
    ("data.path", "[a.jsonl, b.jsonl]", ("a.jsonl", "b.jsonl")),
    ("data.columns", "{prompt: problem}", {"prompt": "problem"}),
    ("lora.target_modules", "[q_proj, v_proj]", ("q_proj", "v_proj")),
    ("lora.init_lora_weights", "pissa_niter_4", "pissa_niter_4"),
    ("lora.rank_pattern", "{'layers.1.self_attn.q_proj': 4}", (("layers.1.self_attn.q_proj", 4),)),
    ("lora.rank_pattern", "[[q_proj, 4]]", (("q_proj", 4),)),
    ("lora.trainable_token_indices", "[3, 5]", (3, 5)),
    ("mesh.fsdp", "-1", -1),
]


@pytest.mark.parametrize(("name", "text", "value"), FORMS)
def test_a_value_in_yaml_is_what_it_reads_as(tmp_path, name, text, value):
    group, _, key = name.partition(".")
    least = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"steps": 3, "eval_every": 1}}
    least["data"]["eval_share"] = 0.5
    least.setdefault(group, {}).pop(key, None)
    lines = [f"{one}:\n" + "".join(f"  {k}: {json.dumps(v)}\n" for k, v in least[one].items()) for one in least]
    place = list(least).index(group)
    lines[place] += f"  {key}: {text}\n"
    (tmp_path / "a.yaml").write_text("".join(lines))
    found = getattr(getattr(read_run(str(tmp_path / "a.yaml"), []), group), key)
    assert (found, type(found)) == (value, type(value))


MIXTURE = """
algorithm: sft
model: {path: m}
data:
  sources:
    sums: {path: a.jsonl, weight: 2, form: prompt}
    rest: {path: [b.jsonl, c.jsonl], weight: 1e0}
train: {steps: 3}
"""
ADAPTERS = """
model: {path: m}
train: {steps: 3}
adapters:
  shop: {data: {path: shop.jsonl}, lora: {r: 8}}
  law: {data: {path: law.jsonl}, optim: {learning_rate: 1e-4}}
"""


def test_mixtures_adapters_and_sweeps_may_be_of_a_yaml_file(tmp_path):
    (tmp_path / "mixture.yaml").write_text(MIXTURE)
    (tmp_path / "adapters.yml").write_text(ADAPTERS)
    run = read_run(str(tmp_path / "mixture.yaml"), ["--config.train.steps=5"])
    assert (run.train.steps, sorted(run.data.sources)) == (5, ["rest", "sums"])
    assert (run.data.sources["sums"].weight, run.data.sources["rest"].path) == (2.0, ("b.jsonl", "c.jsonl"))
    members = read_run(str(tmp_path / "adapters.yml"), []).members()
    assert (members["shop"].lora.r, members["law"].optim.learning_rate) == (8, 1e-4)
    swept = read_run(str(tmp_path / "mixture.yaml"), [], ["lora.r=4,8"])
    assert list(swept.adapters) == ["r-4", "r-8"]


WRONG = """
model: {path: m, adaptor: x}
data:
  path: d
  sources: {sums: {pth: a.jsonl}}
train:
  stps: many
  epochs: many
  seq_len: 7.5
bla: 3
lora: {r: 0}
adapters:
  shop:
    lora:
      rnk: 4
"""


def test_each_fault_of_a_yaml_file_has_its_line_and_the_name_that_was_meant(tmp_path):
    path = str(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text(WRONG)
    with pytest.raises(UserError) as error:
        read_run(path, [])
    told = str(error.value)
    for fault, line in (
        ("model.adaptor: unknown key; did you mean model.adapter?", 2),
        ("data.sources.sums.pth: unknown key; did you mean data.sources.sums.path?", 5),
        ("train.stps: unknown key; did you mean train.steps?", 7),
        ("train.epochs: found 'many' (str), expected float or None", 8),
        ("bla: unknown key", 10),
    ):
        assert any(fault in one and one.endswith(f" ({path}, line {line})") for one in told.splitlines()), (fault, told)


def test_lines_are_told_of_json_and_of_adapters_but_not_of_what_the_command_line_says(tmp_path):
    path = str(tmp_path / "a.json")
    text = json.dumps({"model": {"path": "m"}, "data": {"path": "d"}, "train": {"steps": 0, "seed": -1}}, indent=1)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_run(path, ["--config.train.seed=-2"])
    assert f"train.steps: found 0, expected at least 1 ({path}, line 9)" in str(error.value)
    assert "train.seed: found -2, expected at least 0\n" in f"{error.value}\n"
    (tmp_path / "a.yaml").write_text(ADAPTERS.replace("{r: 8}", "{rr: 8}"))
    with pytest.raises(UserError, match=r"adapters\['shop'\]: lora.rr: unknown key.*a.yaml, line 5\)"):
        read_run(str(tmp_path / "a.yaml"), [])
