"""Full fine-tuning against transformers' Trainer: on one device and a mesh, resumed, exported, of chosen leaves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jlora import hub, tree
from jlora.cli.main import main
from jlora.errors import UserError
from jlora.train import Interrupted, loop, resolve, resume, run
from jlora.train.algorithms.files import FileSource
from jlora.train.reporting.metrics import read_metrics
from jlora.train.restore import load_run


@pytest.fixture(scope="module")
def settings(model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    texts = [{"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}."} for i in range(10, 30)]
    path.write_text("".join(json.dumps(record) + "\n" for record in texts))
    return {
        "model": {"path": model_folder, "dtype": "float32"},
        "data": {"path": str(path), "packing": False},
        "lora": None,
        "optim": {"learning_rate": 3e-3, "schedule": "linear", "warmup_steps": 1, "weight_decay": 0.1},
        "train": {"steps": 5, "batch_size": 4, "seq_len": 32},
    }


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """(the workdir of a run on one device, the batches that its steps took)."""
    workdir, batches, own = tmp_path_factory.mktemp("run"), [], FileSource.next

    def noted(source, state):
        found = own(source, state)
        batches.append(jax.device_get(found[0]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSource, "next", noted)
        run(resolve(settings), workdir)
    return workdir, batches


def losses(workdir):
    return [record["loss"] for record in read_metrics(workdir)]


@pytest.fixture(scope="module")
def trainer(settings, finished, tmp_path_factory):
    """(losses, model) of transformers' Trainer on the same batches."""
    _, batches = finished
    rows = [
        {
            "input_ids": row,
            "attention_mask": (segments != 0).astype(int),
            # The model moves labels one to the left: jlora's targets are there already.
            "labels": np.concatenate([[-100], np.where(weights, targets, -100)[:-1]]),
        }
        for batch in batches
        for row, segments, targets, weights in zip(
            *(batch[name][0] for name in ("tokens", "segment_ids", "targets", "weights")), strict=True
        )
    ]
    optim, train = settings["optim"], settings["train"]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(rows)

    model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"]["path"], dtype=torch.float32)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("trainer")),
        per_device_train_batch_size=train["batch_size"],
        max_steps=train["steps"],
        learning_rate=optim["learning_rate"],
        lr_scheduler_type=optim["schedule"],
        warmup_steps=optim["warmup_steps"],
        weight_decay=optim["weight_decay"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    judge = InOrder(model=model, args=arguments, train_dataset=rows, data_collator=transformers.default_data_collator)
    judge.train()
    return [record["loss"] for record in judge.state.log_history if "loss" in record], model


def test_five_steps_are_those_of_transformers_trainer(finished, trainer):
    workdir, _ = finished
    expected, model = trainer
    assert expected[-1] < expected[0] - 0.1
    assert losses(workdir) == pytest.approx(expected, abs=1e-5)
    found = transformers.AutoModelForCausalLM.from_pretrained(workdir / "model")
    for name, weight in model.state_dict().items():
        np.testing.assert_allclose(found.state_dict()[name], weight, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    "mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"fsdp": 4, "sequence": 2}, marks=pytest.mark.slow)]
)
def test_on_a_mesh_they_are_too(settings, trainer, tmp_path, mesh):
    run(resolve(settings | {"mesh": mesh}), tmp_path)
    assert losses(tmp_path) == pytest.approx(trainer[0], abs=1e-5)


def test_a_resume_is_the_same_to_the_bit(settings, finished, tmp_path):
    with pytest.raises(Interrupted):
        run(resolve(settings), tmp_path, stop=lambda: True)
    run(resolve(settings), tmp_path)
    assert losses(tmp_path) == losses(finished[0])
    one, other = (tree.flatten(hub.load(folder / "model")[1]) for folder in (finished[0], tmp_path))
    assert one.keys() == other.keys() and all((one[path] == other[path]).all() for path in one)


def test_the_export_is_what_the_run_left_and_transformers_logits(finished, tmp_path):
    workdir, batches = finished
    assert main(["export", f"--workdir={workdir}", f"--out={tmp_path / 'model'}"]) == 0
    _, model, params = load_run(workdir)
    tokens = batches[0]["tokens"][0]
    ours = model(params, jnp.asarray(tokens))
    for folder in (workdir / "model", tmp_path / "model"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits = theirs(torch.tensor(tokens)).logits
        np.testing.assert_allclose(ours, logits, atol=2e-5)
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template


def prepared(settings, tmp_path):
    return loop._prepare(resolve(settings), tmp_path, resume.read_begun(tmp_path), lambda message: None)


@pytest.mark.parametrize("weights", ["masters", "stochastic"])
def test_of_16_bits_moments_and_copies_have_32_and_lie_where_their_weights_do(settings, tmp_path, weights):
    narrow = {
        "model": settings["model"] | {"dtype": "bfloat16"},
        "full": {"weights": weights},
        "mesh": {"fsdp": 4, "tensor": 2},
    }
    this = prepared(settings | narrow, tmp_path)
    state = this.state
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("bfloat16")}
    arrays = [leaf for leaf in jax.tree.leaves(state.moments) if leaf.ndim]
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("float32")}
    copies = 3 if weights == "masters" else 2
    assert len(arrays) == copies * len(jax.tree.leaves(state.trainable))
    held = sorted((leaf.shape, str(leaf.sharding.spec)) for leaf in jax.tree.leaves(state.trainable))
    assert sorted((leaf.shape, str(leaf.sharding.spec)) for leaf in arrays) == sorted(held * copies)
    assert any("fsdp" in spec for _, spec in held)
    # The state took the loaded arrays over: there is no second copy of the model.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(this.base.trainable))


@pytest.mark.parametrize("weights", ["masters", pytest.param("stochastic", marks=pytest.mark.slow)])
def test_in_bfloat16_the_losses_are_near_and_a_resume_is_the_same_to_the_bit(settings, finished, tmp_path, weights):
    narrow = {"model": settings["model"] | {"dtype": "bfloat16"}, "full": {"weights": weights}}
    narrow["train"] = settings["train"] | {"grad_accum": 1, "steps": 3}
    narrow["optim"] = settings["optim"] | {"schedule": "constant"}
    run(resolve(settings | narrow), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(resolve(settings | narrow), tmp_path / "run", stop=lambda: True)
    run(resolve(settings | narrow), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert losses(tmp_path / "run")[:2] == pytest.approx(losses(finished[0])[:2], abs=0.02)
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_no_pattern_chooses_stays_the_same_to_the_bit(settings, tmp_path):
    """Here on a packed base, of which only what is not packed is trained."""
    model = settings["model"] | {"quant": "nf4"}
    chosen = {"model": model, "full": {"trainable": [".*layernorm/scale", "embed_tokens/.*"]}}
    run(resolve(settings | chosen | {"train": settings["train"] | {"steps": 2}}), tmp_path)
    before = tree.flatten(hub.load(model["path"], dtype="float32", quant="nf4")[1])
    after = tree.flatten(load_run(tmp_path)[2])
    assert before.keys() == after.keys()
    for path in before:
        pairs = zip(jax.tree.leaves(before[path]), jax.tree.leaves(after[path]), strict=True)
        same = all((one == other).all() for one, other in pairs)
        assert same == (not ("layernorm" in path or "embed" in path)), path


def test_packed_weights_are_refused_with_the_reason_and_so_are_patterns_that_match_nothing(settings, tmp_path):
    packed = settings | {"model": settings["model"] | {"quant": "nf4"}}
    with pytest.raises(
        UserError, match=r"model\.quant: full fine-tuning .* codes are integers, which have no gradients"
    ):
        resolve(packed)
    with pytest.raises(UserError) as error:
        run(resolve(packed | {"full": {"trainable": ["layers/.*", "layer/.*"]}}), tmp_path)
    for part in ("'layer/.*' matches no leaf", "packed (nf4): layers/mlp/down_proj/kernel", "no gradients"):
        assert part in str(error.value)


def test_settings_that_do_not_go_together_are_named_at_once(settings):
    wrong = {
        "model": {"path": "m", "adapter": "a"},
        "adapters": {"one": {}},
        "optim": {"loraplus_lr_ratio": 2.0},
        "full": {"weights": "stochastic"},
    }
    with pytest.raises(UserError) as error:
        resolve(settings | wrong)
    for part in ("model.adapter: full", "adapters: full", "optim.loraplus_lr_ratio: has no effect"):
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"full\.weights: has no effect without lora=None"):
        resolve({group: value for group, value in settings.items() if group != "lora"} | {"full": wrong["full"]})
    with pytest.raises(UserError, match="'half', expected one of masters"):
        resolve(settings | {"full": {"weights": "half"}})
    with pytest.raises(UserError, match=r"full\.trainable: '\(' is not a regular"):
        resolve(settings | {"full": {"trainable": ["("]}})


def test_a_preference_is_compared_with_the_weights_as_they_were(settings, tmp_path):
    rows = [{"prompt": f"{i} ", "chosen": f"{i}{i}", "rejected": "no"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"algorithm": "dpo", "data": {"path": str(tmp_path / "pairs.jsonl")}}
    own |= {"train": settings["train"] | {"steps": 3}, "optim": {"schedule": "constant", "learning_rate": 1e-3}}
    run(resolve(settings | own), tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(np.log(2), abs=1e-6) and found[-1] < found[0] - 1e-3


def test_a_reward_model_is_trained_whole_and_opens_as_a_classifier(settings, tmp_path):
    rows = [{"prompt": f"{i} ", "chosen": f"{i}{i}", "rejected": "no"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"algorithm": "reward", "data": {"path": str(tmp_path / "pairs.jsonl")}}
    run(resolve(settings | own | {"train": settings["train"] | {"steps": 1}}), tmp_path / "run")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.score.weight.shape == (1, 256) and model.score.weight.any()
