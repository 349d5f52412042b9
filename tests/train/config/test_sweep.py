"""From the texts of --sweep to adapters, and everything that can be wrong with them."""

import pytest

from jlora.train.config import resolve, swept

BASE = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"steps": 3}}


def own(*sweeps, base=BASE):
    return dict(swept(base, sweeps).adapters)


def test_every_combination_is_an_adapter_named_by_its_values():
    assert own("optim.learning_rate=1e-4,2e-4", "lora.r=8,16") == {
        "learning_rate-1e-4_r-8": {"optim": {"learning_rate": 1e-4}, "lora": {"r": 8}},
        "learning_rate-1e-4_r-16": {"optim": {"learning_rate": 1e-4}, "lora": {"r": 16}},
        "learning_rate-2e-4_r-8": {"optim": {"learning_rate": 2e-4}, "lora": {"r": 8}},
        "learning_rate-2e-4_r-16": {"optim": {"learning_rate": 2e-4}, "lora": {"r": 16}},
    }


def test_settings_of_one_sweep_go_together():
    assert own("lora.r=8,8, 16 lora.lora_alpha=8,16,16") == {
        f"r-{r}_lora_alpha-{alpha}": {"lora": {"r": r, "lora_alpha": alpha}} for r, alpha in ((8, 8), (8, 16), (16, 16))
    }


@pytest.mark.parametrize(
    ("sweep", "names"),
    [
        (
            "lora.target_modules=all-linear,('q_proj','v_proj')",
            ["target_modules-all-linear", "target_modules-q_proj-v_proj"],
        ),
        ("data.path=a/shop.jsonl,'law, new.jsonl'", ["path-a-shop.jsonl", "path-law-new.jsonl"]),
        ("optim.schedule=wsd,constant", ["schedule-wsd", "schedule-constant"]),
        ("lora.use_dora=True,False", ["use_dora-True", "use_dora-False"]),
        ("optim.weight_decay=0,1e-2", ["weight_decay-0", "weight_decay-1e-2"]),
        ("lora.rank_pattern={'v_proj': 4, 'q_proj': 2},{}", ["rank_pattern-v_proj-4-q_proj-2", "rank_pattern-"]),
    ],
)
def test_values_are_python_literals_or_texts(sweep, names):
    assert list(own(sweep)) == names
    assert all(member.algorithm == "sft" for member in swept(BASE, [sweep]).members().values())


def test_data_of_each_need_no_data_of_all():
    base = {**BASE, "data": {}}
    members = swept(base, ["data.path=a.jsonl,b.jsonl"]).members()
    assert [member.data.path for member in members.values()] == ["a.jsonl", "b.jsonl"]


def test_a_sweep_is_the_run_of_its_adapters():
    assert swept(BASE, ["train.seed=1,2"]) == resolve(
        BASE | {"adapters": {f"seed-{seed}": {"train": {"seed": seed}} for seed in (1, 2)}}
    )


ALIKE = "is the same for all adapters of a run; a sweep may be over data, lora, model.adapter, optim.learning_rate"


@pytest.mark.parametrize(
    ("sweeps", "faults"),
    [
        (["lora.rank=1,2"], ["lora.rank: unknown key; did you mean lora.r"]),
        (["rank=1,2"], ["rank: unknown key; "]),
        (["lora.r"], ["--sweep: found 'lora.r', expected GROUP.KEY=VALUE,VALUE"]),
        (["--config.lora.r=1,2"], ["--sweep: found '--config.lora.r=1,2', expected GROUP.KEY=VALUE,VALUE"]),
        (["train.batch_size=2,4"], [f"train.batch_size: {ALIKE}"]),
        (["optim.b1=0.8,0.9"], [f"optim.b1: {ALIKE}"]),
        (["algorithm=sft,dft"], [f"algorithm: {ALIKE}"]),
        (["lora.r=8"], ["lora.r: found one value, expected two or more; one is set by --config.lora.r=8"]),
        (["lora.r=8,,9"], ["lora.r: found an empty value in 'lora.r=8,,9'", "lora.r: found '' (str), expected int"]),
        (["lora.r=8,x"], ["lora.r: found 'x' (str), expected int"]),
        (["lora.r=8,True"], ["lora.r: found True (bool), expected int"]),
        (["optim.learning_rate=1e-4,-1"], ["optim:\n    learning_rate=-1.0: expected a positive, finite number"]),
        (["optim.learning_rate=1e-4,0.0001"], ["optim.learning_rate: found 0.0001 twice, expected values that differ"]),
        (["lora.r=8,16", "lora.r=4,2"], ["lora.r: is swept 2 times, expected once"]),
        (
            ["lora.r=8,16 lora.lora_alpha=1,2,3"],
            ["lora.r and lora.lora_alpha: found 2 and 3 values, expected as many of each, since they go together"],
        ),
        (
            ["data.path=a/b,a-b"],
            ["--sweep: {'data.path': 'a/b'} and {'data.path': 'a-b'} would both be in the folder path-a-b; give one"],
        ),
        (["data.path=a," + 200 * "b"], ["--sweep: path-bbb"]),
        (["data.system=template,fold"], ["adapters['system-fold']: data.system: expected"]),
    ],
)
def test_each_fault_is_said(sweeps, faults):
    with pytest.raises(ValueError) as error:
        swept(BASE, sweeps)
    title, *lines = str(error.value).split("\n  ")
    found = "\n  ".join(lines)
    assert title == "the settings are invalid:"
    for fault in faults:
        assert fault in found
    assert found.count(": found") + found.count(": unknown") <= len(faults), found


def test_all_faults_come_in_one_message():
    base = BASE | {"algorithm": "dpo", "train": {"steps": 0}, "adapters": {"a": {}}}
    with pytest.raises(ValueError) as error:
        swept(base, ["optim.learnin_rate=1,2", "lora.r=x,0 train.steps=1,2", "nothing"])
    for fault in (
        "--sweep: found 'nothing'",
        "optim.learnin_rate: unknown key; did you mean optim.learning_rate?",
        "train.steps: is the same for all adapters",
        "the settings have adapters already (a)",
        "several are trained side by side by sft and dft; train those of dpo alone",
        "lora.r: found 'x'",
        "r=0",
    ):
        assert str(error.value).count(fault) == 1, fault


def test_full_fine_tuning_has_no_adapters_to_sweep():
    with pytest.raises(ValueError, match=r"full fine-tuning .lora=None. trains no adapters"):
        swept(BASE | {"lora": None}, ["optim.learning_rate=1e-5,2e-5"])
