"""Every algorithm with every feature at once: NF4, DoRA, dropout, packing, accumulation, a mesh, interruption."""

import io
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora.train import Interrupted, resolve, run
from jlora.train.reporting.metrics import read_metrics
from jlora.train.reporting.progress import Progress

PAIRS = [{"prompt": f"q{i} ", "chosen": f"good {i}", "rejected": f"bad {7 * i}"} for i in range(10)]
PROMPTS = [{"prompt": [{"role": "user", "content": f"say {i}"}], "n": i} for i in range(10)]
REWARDS = """
def vowels(completions, n, **columns):
    return [sum(c in "aeiou\\u00e9" or ord(c) % 2 for c in m[0]["content"]) / 8 for m in completions]

def told(completions, completion_ids, trainer_state, log_extra, log_metric):
    log_extra("length", [len(ids) for ids in completion_ids])
    log_metric("steps_left", trainer_state.max_steps - trainer_state.global_step)
    return [len(set(ids)) for ids in completion_ids]

def brittle(completion_ids, log_extra):
    log_extra("length", [len(ids) for ids in completion_ids])
    return [ValueError("odd") if ids[0] % 2 else -10.0 + len(set(ids)) for ids in completion_ids]

async def short(completions, **columns):
    return [None if not m[0]["content"] else -len(m[0]["content"]) / 20 for m in completions]
"""
# TRL's names of what its trainers log.
PAIR_NAMES = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")} | {
    f"{kind}/{side}" for kind in ("logps", "logits") for side in ("chosen", "rejected")
}
ROLLOUT_NAMES = {"reward", "rewards/vowels/mean", "rewards/vowels/std", "completions/clipped_ratio"} | {
    f"completions/{name}_{kind}length" for name in ("mean", "min", "max") for kind in ("", "terminated_")
}
NAMES = {
    "dpo": PAIR_NAMES | {"entropy", "mean_token_accuracy"},
    "cpo": PAIR_NAMES | {"nll_loss"},
    "orpo": PAIR_NAMES | {"nll_loss", "log_odds_ratio", "log_odds_chosen"},
    "kto": {"kl", "entropy", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"},
    "reward": {"accuracy", "margin", "min_reward", "mean_reward", "max_reward"},
    "grpo": ROLLOUT_NAMES
    | {"reward_std", "frac_reward_zero_std", "kl", "entropy", "sampling/sampling_logp_difference/max"}
    | {f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")},
    "ppo": ROLLOUT_NAMES
    | {f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores")}
    | {"policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg"}
    | {"val/clipfrac_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens"},
}
COMMON = {"loss", "grad_norm", "learning_rate", "num_tokens"}
ROLLOUTS = ("grpo", "ppo")
# This one is run on one device too: it has most parts, and the others differ from it in their formulas alone.
COMPARED = ("ppo",)
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
# The others, which are less than this one, with -m slow.
ALGORITHMS = [pytest.param(name, marks=[pytest.mark.slow] * (name not in COMPARED)) for name in NAMES]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, records in (("pairs", PAIRS), ("prompts", PROMPTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in texts))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def settings(files, small_model_folder):
    """settings(algorithm, group={…}): a run of two steps with everything at once."""

    def make(algorithm, **groups):
        data = "prompts" if algorithm in ROLLOUTS else "texts" if algorithm == "sft" else "pairs"
        config = {
            "algorithm": algorithm,
            "model": {"path": small_model_folder, "quant": "nf4"},
            "data": {"path": str(files / f"{data}.jsonl"), "bucket": 16},
            "lora": {
                "r": 4,
                "use_dora": True,
                "lora_dropout": 0.1,
                "target_modules": ["q_proj", "v_proj", "down_proj"],
            },
            "optim": {"learning_rate": 1e-2},
            "train": {"steps": 2, "batch_size": 4, "grad_accum": 2, "seq_len": 64, "remat": False},
        }
        if algorithm in ROLLOUTS:
            rewards = tuple(str(files / f"rewards.py:{name}") for name in ("vowels", "short"))
            config["rollout"] = {"rewards": rewards, "max_completion_length": 6, "num_generations": 4, "rows": 4}
        if algorithm == "grpo":
            config["grpo"] = {"beta": 0.04, "scale_rewards": "batch"}
        if algorithm == "ppo":
            config["ppo"] = {"num_ppo_epochs": 1}  # every step reports a rollout
        for name, group in groups.items():
            config[name] = config.get(name, {}) | group
        return config

    return make


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_everything_at_once_on_a_mesh_is_as_on_one_device_and_logs_trls_names(algorithm, settings, tmp_path):
    run(resolve(settings(algorithm, mesh=MESH)), tmp_path / "many")
    many = read_metrics(tmp_path / "many")
    assert set(many[0]) >= NAMES[algorithm] | COMMON
    assert all(np.isfinite([record[name] for name in NAMES[algorithm] | COMMON]).all() for record in many)
    assert many[1]["loss"] != many[0]["loss"] and many[0]["grad_norm"] > 0
    if algorithm not in COMPARED:
        return
    run(resolve(settings(algorithm)), tmp_path / "one")
    one = read_metrics(tmp_path / "one")
    for name in ("loss", "grad_norm", *sorted(NAMES[algorithm] - {"rewards/accuracies"})):  # at first 0 > 0 or not
        expected = [record[name] for record in one]
        assert [record[name] for record in many] == pytest.approx(expected, rel=2e-3, abs=1e-4), name
    for folder in ("adapter", "value") if algorithm == "ppo" else ("adapter",):
        ours, theirs = (load_file(tmp_path / name / folder / "adapter_model.safetensors") for name in ("one", "many"))
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], atol=5e-3, err_msg=name)


@pytest.mark.parametrize(
    ("algorithm", "group"),
    [
        pytest.param("ppo", {"num_ppo_epochs": 2, "target_kl": 1.0}, marks=pytest.mark.slow),
        ("grpo", {"num_iterations": 2, "dynamic_sampling": 1, "beta": 0.0}),
    ],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(settings, tmp_path, algorithm, group):
    groups = {algorithm: group, "lora": {"use_dora": False}}
    config = resolve(settings(algorithm, train={"steps": 4, "grad_accum": 1}, **groups))
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted, match="after step 2"):  # a rollout is used up before the run is saved
        run(config, tmp_path / "parts", stop=lambda: True)
    last = run(config, tmp_path / "parts")
    assert {**last, "tokens_per_second": 0} == {**whole, "tokens_per_second": 0}
    assert set(read_metrics(tmp_path / "parts")[0]) >= (NAMES[algorithm] | COMMON) - {"kl"}  # of GRPO, only with a beta
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert adapters[0] == adapters[1]
    logs = [(tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 8  # four of each rollout


# (settings of a variant, what its advantages are of rewards [groups, 4] and lengths in the first rollout)
def by_group(rewards, lengths):
    return (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)


def over_the_others(rewards, lengths):
    return rewards - (rewards.sum(1, keepdims=True) - rewards) / 3


def over_tokens(values, lengths):
    mean = (values * lengths).sum() / lengths.sum()
    return (values - mean) / np.sqrt((lengths * (values - mean) ** 2).sum() / (lengths.sum() - 1) + 1e-8)


ADVANTAGES = {
    "dapo": (
        dict(loss_type="dapo_prompt", epsilon_high=0.28, overlong_cache=3, dynamic_sampling=1)
        | dict(num_iterations=2, steps_per_generation=2, mask_truncated_completions=True),
        by_group,
    ),
    "rloo": (
        dict(loss_type="grpo", importance_sampling_level="sequence_sum", advantage="leave_one_out")
        | dict(beta=0.05, kl_in_reward=True),
        over_the_others,
    ),
    "reinforce++": (dict(advantage="reinforce++", beta=0.01, kl_in_reward=True), over_tokens),
    "reinforce++_baseline": (
        dict(advantage="reinforce++_baseline", beta=0.01, kl_in_reward=True),
        lambda rewards, lengths: over_tokens(rewards - rewards.mean(1, keepdims=True), lengths),
    ),
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * (name == "reinforce++")) for name in ADVANTAGES]
)
def test_relatives_of_grpo_learn_from_the_advantages_of_their_papers(variant, files, settings, tmp_path):
    grpo, expected = ADVANTAGES[variant]
    config = settings(
        "grpo",
        lora={"use_dora": False, "lora_dropout": 0.0},
        rollout={"rewards": (str(files / "rewards.py:told"),), "log_completions": 32},
    )
    config["grpo"] = grpo
    run(resolve(config), tmp_path)
    first, second = read_metrics(tmp_path)
    assert (first["steps_left"], second.get("steps_left", 1)) == (2, 1)  # dapo's second step is of the first rollout
    assert first["grad_norm"] > 0 and second["grad_norm"] > 0
    found = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    found = [record for record in found if record["step"] == 1]
    rewards, lengths = (np.array([record[name] for record in found]).reshape(-1, 4) for name in ("reward", "length"))
    for record in found:
        late = -np.clip((record["length"] - 3) / 3, 0, 1) if variant == "dapo" else 0
        assert record["reward"] == pytest.approx(record["rewards"]["told"] + late)
    trained = lengths * (lengths < 6 if variant == "dapo" else 1)
    advantages = np.array([record["advantage"] for record in found]).reshape(-1, 4)
    np.testing.assert_allclose(advantages, np.where(trained, expected(rewards, lengths), 0), atol=2e-5)
    assert np.abs(advantages).max() > 0.1


def test_ppo_leaves_out_what_could_not_be_judged_and_loses_no_numbers(files, settings, tmp_path):
    config = settings(
        "ppo",
        lora={"use_dora": False, "lora_dropout": 0.0},
        rollout={"rewards": (str(files / "rewards.py:brittle"),), "on_error": "skip", "log_completions": 32},
        ppo={"num_ppo_epochs": 2, "num_mini_batches": 2, "whiten_rewards": True, "missing_eos_penalty": 1.0}
        | {"kl_estimator": "k3"},
        train={"steps": 3, "grad_accum": 1, "batch_size": 4, "log_every": 2},
    )
    run(resolve(config), tmp_path)
    logged = read_metrics(tmp_path)
    assert [record["step"] for record in logged] == [2, 3]
    found = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    failed = np.array([record["score"] is None for record in found])
    assert len(found) == 8 and 0 < failed.sum() < 8
    judged = [record for record in found if record["score"] is not None]
    for record in judged:
        assert record["score"] == pytest.approx(record["rewards"]["brittle"] - (record["length"] == 6))
    # The rollout's numbers come with its first step, and are written with the second.
    assert logged[0]["objective/scores"] == pytest.approx(np.mean([record["score"] for record in judged]), rel=1e-5)
    assert logged[0]["rewards/brittle/errors"] == failed.sum()
    assert (tmp_path / "checkpoints" / "3").exists()  # within a rollout, but the end


def test_ppo_by_a_reward_model(settings, tmp_path):
    plain = {"use_dora": False, "lora_dropout": 0.0}
    run(resolve(settings("reward", lora=plain, train={"steps": 1})), tmp_path / "reward")
    judge = tmp_path / "reward" / "adapter"
    config = settings(
        "ppo",
        lora=plain,
        rollout={"rewards": ("model",), "reward_model": str(judge), "log_completions": 8},
        train={"steps": 1, "grad_accum": 1},
    )
    run(resolve(config), tmp_path / "ppo")
    [logged] = read_metrics(tmp_path / "ppo")
    found = [json.loads(line) for line in (tmp_path / "ppo" / "completions.jsonl").read_text().splitlines()]
    assert logged["rewards/model/mean"] == pytest.approx(np.mean([r["rewards"]["model"] for r in found]), abs=1e-5)
    assert len({record["score"] for record in found}) > 1
    weights = load_file(judge / "adapter_model.safetensors")
    save_file(
        {name: np.sign(value) * 3e38 if "score" in name else value for name, value in weights.items()},  # overflows
        judge / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match="gave 4 of 4 completions no finite score"):
        run(resolve(config), tmp_path / "broken")


@pytest.mark.parametrize("algorithm", ["cpo", pytest.param("orpo", marks=pytest.mark.slow)])
def test_evaluation_means_what_training_does(algorithm, settings, tmp_path):
    config = settings(algorithm, lora={"lora_dropout": 0.0}, train={"steps": 1, "batch_size": 2, "grad_accum": 5})
    config["data"] |= {"packing": False, "eval_path": config["data"]["path"]}
    config["train"] |= {"eval_every": 5, "eval_on_start": True}
    run(resolve(config), tmp_path)
    before, step = read_metrics(tmp_path)[:2]
    for name in ("nll_loss", "rewards/margins"):
        assert before[f"eval_{name}"] == pytest.approx(step[name], rel=1e-4), name


def test_training_and_evaluation_against_two_references_is_refused(settings, tmp_path):
    judged = [pair | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for pair in PAIRS]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in judged))
    config = settings("dpo", data={"eval_path": str(tmp_path / "judged.jsonl")})
    with pytest.raises(ValueError, match=r"judged\.jsonl brings the reference's .*pairs\.jsonl does not"):
        run(resolve(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def first_loss(config, folder):
    run(resolve(config), folder)
    return read_metrics(folder)[0]


def test_the_reference_is_where_the_run_starts(settings, tmp_path):
    plain = {"use_dora": False, "lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"]}
    start = settings("dpo", lora=plain, train={"steps": 1, "grad_accum": 1})
    from_base = first_loss(start, tmp_path / "base")
    assert from_base["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert abs(from_base["rewards/chosen"]) < 1e-5
    train = {"steps": 2, "grad_accum": 1}
    going_on = settings("dpo", train=train, model={"adapter": str(tmp_path / "base" / "adapter")})
    del going_on["lora"]
    shown = io.StringIO()
    run(resolve(going_on), tmp_path / "dpo", progress=Progress(shown))
    found = read_metrics(tmp_path / "dpo")
    assert found[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)  # the starting adapter, not the base
    assert found[0]["logps/chosen"] != pytest.approx(from_base["logps/chosen"], rel=1e-3)
    assert "the reference policy is the adapter" in shown.getvalue()
    before = settings("dpo", train=train, model=going_on["model"], dpo={"precompute_ref_log_probs": True})
    del before["lora"]
    run(resolve(before), tmp_path / "before")
    for left, right in zip(found, read_metrics(tmp_path / "before"), strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected"):
            assert right[name] == pytest.approx(left[name], rel=1e-4, abs=1e-5)
