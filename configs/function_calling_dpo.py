"""DPO of SmolLM2-135M on function calling, from the quickstart's adapter and its own wrong calls.

    python scripts/function_calling.py pairs --model=MODEL --adapter=runs/quickstart/adapter \
        --data=runs/quickstart/data/train.jsonl --samples=1 --out=pairs.jsonl     (and test.jsonl into held_out.jsonl)
    jlora train --config=function_calling_dpo --config.model.path=MODEL --config.data.path=pairs.jsonl \
        --config.data.eval_path=held_out.jsonl --config.model.adapter=runs/quickstart/adapter

Requires model.path, data.path, data.eval_path; model.adapter to start from.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """About half a pass over the pairs; besides the margin, the loss keeps up the likelihood of the right calls."""
    config = default_config()
    config.algorithm = "dpo"
    config.dpo.loss_type = ("sigmoid", "sft")
    config.dpo.loss_weights = (1.0, 3.0)
    config.dpo.beta = 0.2
    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 4
    config.train.epochs = 1.0
    config.train.steps = 72
    config.train.batch_size = 4
    config.train.seq_len = 576
    config.train.eval_every = 24
    config.train.remat = False
    config.data.packing = False
    config.data.bucket = 128
    return config
