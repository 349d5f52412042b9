"""A run's first step logs what TRL's trainer logs for the same records, model and adapter, under the same names."""

import json
import warnings

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from jlora.train import resolve, run
from jlora.train.reporting.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS = dict(
    report_to="none",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    disable_tqdm=True,
    max_steps=1,
    logging_steps=1,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
)
PAIRS = [
    {"prompt": "ab", "chosen": "cdefg", "rejected": "hi"},
    {"prompt": "jklmno", "chosen": "p", "rejected": "qrstuvw"},
    {"prompt": "xyz", "chosen": "0123", "rejected": "4567"},
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": pair["prompt"]}],
        "chosen": [{"role": "assistant", "content": pair["chosen"]}],
        "rejected": [{"role": "assistant", "content": pair["rejected"]}],
    }
    for pair in PAIRS
]
JUDGED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]
TEXTS = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
CASES = {
    "sft": (SFTTrainer, SFTConfig, TEXTS, {}, {}),
    "dft": (SFTTrainer, SFTConfig, TEXTS, dict(loss_type="dft"), {}),
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {}, {}),
    "dpo, chats": (DPOTrainer, DPOConfig, CHATS, {}, {}),
    "dpo, three terms": (
        DPOTrainer,
        DPOConfig,
        PAIRS,
        dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], ld_alpha=0.3),
        dict(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0), ld_alpha=0.3),
    ),
    "cpo": (CPOTrainer, CPOConfig, PAIRS, {}, {}),
    "cpo, simpo": (
        CPOTrainer,
        CPOConfig,
        PAIRS,
        dict(loss_type="simpo", cpo_alpha=0.0),
        dict(loss_type="simpo", cpo_alpha=0.0),
    ),
    "cpo, alphapo": (
        CPOTrainer,
        CPOConfig,
        PAIRS,
        dict(loss_type="alphapo", alpha=0.2),
        dict(loss_type="simpo", cpo_alpha=0.0, alpha=0.2),
    ),
    "orpo": (ORPOTrainer, ORPOConfig, PAIRS, {}, {}),
    "kto": (KTOTrainer, KTOConfig, JUDGED, dict(undesirable_weight=1.5), dict(undesirable_weight=1.5)),
    "reward": (
        RewardTrainer,
        RewardConfig,
        PAIRS,
        dict(center_rewards_coefficient=0.1),
        dict(center_rewards_coefficient=0.1),
    ),
}
# What TRL logs of the trainer itself, and what jlora counts otherwise.
OTHER = {"epoch", "learning_rate", "train_loss", "total_flos", "step", "grad_norm"}


@pytest.fixture(scope="module")
def adapters(model_folder, tmp_path_factory):
    """Random adapters of the model: one for a policy, one for a reward model."""
    found = {}
    for task_type, loader in (
        ("CAUSAL_LM", transformers.AutoModelForCausalLM),
        ("SEQ_CLS", transformers.AutoModelForSequenceClassification),
    ):
        torch.manual_seed(2)
        extra = {"num_labels": 1} if task_type == "SEQ_CLS" else {}
        model = peft.get_peft_model(
            loader.from_pretrained(model_folder, **extra),
            peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type=task_type),
        )
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_" in name or "score.modules_to_save" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        found[task_type] = str(tmp_path_factory.mktemp(task_type))
        model.save_pretrained(found[task_type])
    return found


# What other cases do with a term or a factor more.
LESS = ("dpo", "cpo, simpo")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in LESS else case for case in CASES]
)
def test_the_first_step_is_trls(case, model_folder, adapters, byte_tokenizer, tmp_path, parity):
    trainer_class, config_class, records, theirs, ours = CASES[case]
    algorithm = case.partition(",")[0]
    task_type = "SEQ_CLS" if algorithm == "reward" else "CAUSAL_LM"
    expected = trl_log(trainer_class, config_class, records, theirs, model_folder, adapters[task_type], byte_tokenizer)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {
        "algorithm": algorithm,
        "model": {"path": model_folder, "adapter": adapters[task_type]},
        "data": {"path": str(path), "packing": False, "bucket": 8},
        "optim": {"learning_rate": 1e-3, "schedule": "constant", "max_grad_norm": 0.0},
        "train": {"steps": 1, "batch_size": len(records), "seq_len": 48},
    } | ({algorithm: ours} if ours else {})
    run(resolve(settings), tmp_path / "run")
    [found] = read_metrics(tmp_path / "run")
    # CPO's and ORPO's mean logits take in prompts and padding; TRL says that a term it does not use is 0.
    skipped = {"logits/chosen", "logits/rejected"} if algorithm in ("cpo", "orpo") else set()
    skipped |= {"entropy"} if algorithm in ("sft", "dft") else set()  # which jlora does not compute there
    skipped |= {"nll_loss"} if ours.get("cpo_alpha") == 0 else set()
    names = sorted(set(expected) - OTHER - skipped)
    assert set(names) <= set(found), sorted(set(names) - set(found))
    scale = max(abs(expected["loss"]), 1.0)
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-5 * scale), name
    parity("objective", algorithm, "loss", abs(found["loss"] - expected["loss"]) / scale)


def trl_log(trainer_class, config_class, records, settings, model_folder, adapter, tokenizer):
    """What TRL's trainer logs of one step on all records."""
    sequence = "Reward" in trainer_class.__name__
    loader = transformers.AutoModelForSequenceClassification if sequence else transformers.AutoModelForCausalLM
    extra = dict(num_labels=1) if sequence else {}
    base = loader.from_pretrained(model_folder, attn_implementation="eager", **extra)
    model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    own = transformers.AutoTokenizer.from_pretrained(model_folder)
    own.pad_token = (
        "ÿ"  # a byte that is in no text: transformers' classifiers look for the last token that is no padding
    )
    base.config.pad_token_id = own.pad_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(
            model=model,
            args=config_class(
                output_dir=adapter + "/trainer", per_device_train_batch_size=len(records), **(SETTINGS | settings)
            ),
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=own,
        )
        trainer.train()
    return {name: float(np.mean(value)) for name, value in trainer.state.log_history[0].items()}
