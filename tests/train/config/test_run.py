import dataclasses
import json

import pytest
from ml_collections import ConfigDict, config_dict

from jlora.lora import LoraConfig
from jlora.train.config import ModelSource, TrainConfig, completed, default_config, resolve, to_dict, typed
from jlora.train.resume import Begun, refuse_other_settings

GRPO = {"algorithm": "grpo", "train__batch_size": 8, "rollout__rewards": ("r.py",)}
GIVEN = {"model.path": "m", "data.path": "d", "train.steps": 3}


def config(**changes):
    """A complete config with `group__key` arguments on top."""
    made = default_config()
    for path, value in {**GIVEN, **{name.replace("__", "."): value for name, value in changes.items()}}.items():
        group, _, key = path.rpartition(".")
        (made[group] if group else made)[key] = value
    return made


def faults(made):
    with pytest.raises(ValueError) as error:
        resolve(made)
    first, *rest = str(error.value).split("\n")
    assert first == "the settings are invalid:"
    return [line.strip() for line in rest]


def test_defaults_are_those_of_the_dataclasses():
    resolved = resolve(config())
    assert resolved.model == ModelSource("m")
    assert resolved.train == TrainConfig(steps=3)
    assert resolved.algorithm == "sft"


def test_everything_missing_is_named_at_once():
    assert faults(default_config()) == [
        "model.path: is required",
        "data.path: is required (or data.sources)",
        "train.steps or train.epochs: one of them is required",
    ]
    assert faults({}) == faults(default_config())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"train__step": 3}, "train.step: unknown key; did you mean train.steps?"),
        ({"lora__alpha": 3}, "lora.alpha: unknown key; did you mean lora.lora_alpha?"),
        ({"train__learning_rate": 3}, "train.learning_rate: unknown key; did you mean optim.learning_rate?"),
        ({"learning_rate": 3}, "learning_rate: unknown key; did you mean optim.learning_rate?"),
        ({"lr": 3}, "lr: unknown key; did you mean optim.learning_rate?"),
        ({"train__lr": 3}, "train.lr: unknown key; did you mean optim.learning_rate?"),
        (
            {"qqq": 3},
            "qqq: unknown key; known here: algorithm, model, lora, full, data, optim, train, mesh, "
            "dpo, cpo, orpo, kto, reward, rollout, grpo, ppo, adapters",
        ),
        ({"modle": ConfigDict({"path": "x"})}, "modle.path: unknown key; did you mean model.path?"),
        ({"mesh__qqq": 3}, "mesh.qqq: unknown key; known here: mesh.data, mesh.fsdp, mesh.tensor, mesh.sequence"),
        ({"train__steps": True}, "train.steps: found True (bool), expected int or None"),
        ({"train__steps": 3.5}, "train.steps: found 3.5 (float), expected int or None"),
        ({"train__batch_size": "4"}, "train.batch_size: found '4' (str), expected int"),
        ({"train__remat": 1}, "train.remat: found 1 (int), expected bool or one of 'full', 'offload', 'none'"),
        ({"optim__learning_rate": "fast"}, "optim.learning_rate: found 'fast' (str), expected float"),
        ({"data__path": None}, "data.path: is required (or data.sources)"),
        (
            {"model": "m"},
            "model: found 'm', expected a group with the keys path, dtype, quant, adapter, resize_vocab, attention",
        ),
        (
            {"algorithm": "gpo"},
            "algorithm: found 'gpo' (str), "
            "expected one of 'sft', 'dft', 'dpo', 'cpo', 'orpo', 'kto', 'reward', 'grpo', 'ppo'",
        ),
        ({"model__dtype": "fp8"}, "model.dtype: found 'fp8', expected one of float32, bfloat16, float16, or None"),
        ({"train__batch_size": 0}, "train.batch_size: found 0, expected at least 1"),
        ({"train__epochs": 0}, "train.epochs: found 0.0, expected more than 0"),
        ({"train__eval_every": 5}, "train.eval_every is 5, so data.eval_path (or data.eval_share) is required"),
        (
            {"algorithm": "cpo", "cpo__label_smoothing": 0.6},
            "cpo.label_smoothing: found 0.6, expected less than 0.5",
        ),
        (
            {"algorithm": "cpo", "cpo__loss_type": "hinge", "cpo__label_smoothing": 0.1},
            "cpo.label_smoothing: has no effect with cpo.loss_type='hinge'",
        ),
        (
            {"algorithm": "cpo", "cpo__simpo_gamma": 0.3},
            "cpo.simpo_gamma: has no effect with cpo.loss_type='sigmoid'",
        ),
        (
            GRPO | {"grpo__overlong_cache": 300},
            "grpo.overlong_cache is 300: expected at most rollout.max_completion_length = 256",
        ),
        (
            GRPO | {"grpo__loss_type": "cispo"},
            "grpo.epsilon_high: cispo needs it: the largest ratio that counts, such as 5.0",
        ),
        (
            GRPO | {"grpo__advantage": "leave_one_out", "grpo__kl_in_reward": True},
            "grpo.kl_in_reward: has no effect without grpo.beta",
        ),
        (
            GRPO | {"grpo__normalize_advantages": True},
            "grpo.normalize_advantages: has no effect with grpo.advantage='group'",
        ),
        (
            GRPO | {"grpo__sapo_temperature_pos": 0.0},
            "grpo.sapo_temperature_pos: found 0.0, expected a number of at least 1e-06",
        ),
    ],
)
def test_each_fault_says_where_what_was_found_and_what_was_expected(changes, fault):
    assert faults(config(**changes)) == [fault]


def test_a_truth_value_is_no_number():
    made = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"epochs": True}, "optim": {"learning_rate": True}}
    assert faults(made) == [
        "optim.learning_rate: found True (bool), expected float",
        "train.epochs: found True (bool), expected float or None",
    ]


def test_faults_of_several_groups_come_together():
    found = faults(config(train__steps=0, train__seq_len=1, model__path="", lora__rnk=4, optim__learning_rate="x"))
    assert [fault.split(":")[0] for fault in found] == [
        "lora.rnk",
        "model.path",
        "optim.learning_rate",
        "train.steps",
        "train.seq_len",
    ]


def test_what_the_groups_say_is_passed_on():
    assert any("nf5" in fault for fault in faults(config(model__quant="nf5")))
    assert any("r=0" in fault for fault in faults(config(lora__r=0)))


def test_a_whole_number_is_taken_for_a_float():
    resolved = resolve(config(optim__learning_rate=1, train__epochs=2))
    assert (resolved.optim.learning_rate, resolved.train.epochs) == (1.0, 2.0)
    assert type(resolved.optim.learning_rate) is float


def test_lists_and_mappings_become_what_the_fields_say():
    pattern = {"model.layers.0.self_attn.q_proj": 4}
    resolved = resolve(config(lora__target_modules=["q_proj", "v_proj"], lora__rank_pattern=pattern))
    assert resolved.lora.target_modules == ("q_proj", "v_proj")
    assert resolved.lora.rank_pattern == (("model.layers.0.self_attn.q_proj", 4),)


def test_a_quantisation_group_is_taken():
    resolved = resolve(config(model__quant={"double_quant": False}))
    assert resolved.model.quant.double_quant is False
    assert faults(config(model__quant={"double_quants": False})) == [
        "model.quant.double_quants: unknown key; did you mean model.quant.double_quant?"
    ]


def test_a_required_placeholder_left_open_is_a_missing_setting():
    made = config()
    del made.model.path
    made.model.path = config_dict.required_placeholder(str)
    assert faults(made) == ["model.path: is required"]
    made.model.path = "given"
    assert resolve(made).model.path == "given"


def test_config_json_gives_the_same_settings_back():
    resolved = resolve(config(model__quant={"double_quant": False}, lora__rank_pattern={"q_proj": 2}))
    assert resolve(json.loads(json.dumps(to_dict(resolved)))) == resolved


@pytest.mark.parametrize(
    "settings",
    [
        dict(trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [3]}),
        dict(trainable_token_indices=[1, 2]),
        dict(layers_to_transform=3, target_modules=["q_proj"], rank_pattern={"q_proj": 2}),
        dict(modules_to_save=["norm"], target_parameters=["experts.down_proj"]),
    ],
)
def test_an_adapters_settings_come_back_from_json(settings):
    made = LoraConfig(**settings)
    again, problems = typed.build(LoraConfig, json.loads(json.dumps(dataclasses.asdict(made))))
    assert not problems and again == made and hash(again) == hash(made)


def of_adapters(**changes):
    """The README's recipe of two adapters: what they train on is their own."""
    made = config(data__path=None, **changes)
    made.adapters = {
        "shop": {"data": {"path": "shop.jsonl"}, "lora": {"r": 8}},
        "law": {"data": {"path": "law.jsonl"}, "optim": {"learning_rate": 1e-4}},
    }
    return made


def test_adapters_of_one_run_share_no_data():
    resolved = resolve(of_adapters())
    members = resolved.members()
    assert list(members) == ["law", "shop"]  # whatever order they are given in: checkpoints know their places only
    assert {name: member.data.path for name, member in members.items()} == {"law": "law.jsonl", "shop": "shop.jsonl"}
    again = resolve(json.loads(json.dumps(to_dict(resolved), sort_keys=True)))
    assert again == resolved and list(again.members()) == list(members)


def test_what_adapters_lack_is_asked_of_each():
    made = of_adapters(train__eval_every=2)
    made.adapters["shop"]["data"]["eval_path"] = "shop_test.jsonl"
    assert faults(made) == [
        "adapters['law']: train.eval_every is 2, so data.eval_path (or data.eval_share) is required"
    ]
    made.data.eval_path = "test.jsonl"
    assert resolve(made).members()["law"].data.eval_path == "test.jsonl"
    made.adapters["other"] = {"optim": {}, "model": {}}
    assert faults(made) == ["adapters['other']: data.path: is required (or data.sources)"]
    made.data.path = "all.jsonl"
    assert resolve(made).members()["other"].data.path == "all.jsonl"
    made.adapters["other"] = {"mesh": {}, "optim": {"b1": 0.8}}
    assert [fault.split(": is the same")[0] for fault in faults(made)] == [
        "adapters['other']: mesh",
        "adapters['other']: optim.b1",
    ]


def test_adapters_of_one_run_fold_system_texts_alike():
    made = of_adapters(data__system="fold")
    assert {member.data.system for member in resolve(made).members().values()} == {"fold"}
    made.adapters["shop"]["data"]["system"] = "template"
    assert faults(made) == ["adapters['shop']: data.system: expected 'fold', as in the run: they share a tokenizer"]


MIXTURE = {"a": {"path": "a.jsonl", "weight": 3}, "b": {"path": ["b.csv", "c.csv"], "weight": 1, "limit": 5}}


def with_data(**data):
    values = {"model": {"path": "m"}, "train": {"steps": 1, "seq_len": 8}, "data": data}
    return resolve(values)


def test_sources_are_settings_like_others():
    config = with_data(sources=MIXTURE, eval_share=0.25)
    assert config.data.train.weights == (3.0, 1.0)
    assert config.data.sources["b"].path == ("b.csv", "c.csv")
    assert config.data.evaluation.held_out and config.data.evaluation.share == 0.25
    again = resolve(json.loads(json.dumps(to_dict(config))))
    assert again == config
    without = json.loads(json.dumps(to_dict(config)))
    del without["data"]["sources"]["a"]["columns"], without["data"]["eval_share"]
    assert completed(without)["data"]["sources"] == json.loads(json.dumps(to_dict(config)))["data"]["sources"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"path": "a", "sources": MIXTURE}, "data.path: found it beside data.sources"),
        ({"sources": {"a": {"path": "a", "weight": 0}}}, "weight: found 0.0, expected a number above 0"),
        ({"sources": {"a": {"path": "a", "wight": 1}}}, "data.sources.a.wight: unknown key"),
        ({"sources": {"a": {"path": "a", "limit": "5"}}}, "data.sources['a'].limit: found '5' (str)"),
        ({"sources": {"a": {}}}, "data.sources['a'].path: is required"),
        ({"sources": {"a": {"path": "a", "weight": 1}, "b": {"path": "b"}}}, "found no weight for b"),
        ({"sources": MIXTURE, "limit": 5}, "with data.sources, each source has its own"),
        ({"path": "a", "eval_share": 1.0}, "data.eval_share: found 1.0, expected a number from 0 to below 1"),
        ({"path": "a", "eval_share": 0.1, "eval_path": "b"}, "data.eval_share: found it beside data.eval_path"),
        ({"path": "a", "form": "alpaca"}, "data.form: found 'alpaca'"),
        ({"path": "a", "window_overlap": 8}, "data.window_overlap: found 8, expected less than train.seq_len=8"),
        ({"path": []}, "data.path: found (), expected the path of a file"),
    ],
)
def test_data_that_cannot_be_meant_are_refused(data, words):
    with pytest.raises(ValueError) as error:
        with_data(**data)
    assert words in str(error.value)


def test_another_mixture_is_another_run(tmp_path):
    config = with_data(sources=MIXTURE)
    begun = Begun(tmp_path, 1, completed(to_dict(config)))
    refuse_other_settings(begun, config)
    for change in ({"weight": 4}, {"limit": 3}, {"form": "text"}):
        other = with_data(sources=MIXTURE | {"a": MIXTURE["a"] | change})
        with pytest.raises(ValueError, match="belongs to a run with other settings"):
            refuse_other_settings(begun, other)
