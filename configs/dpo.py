"""Direct preference optimisation: the library's defaults, with a tenth of supervised fine-tuning's learning rate.

    jlora train --config=dpo --config.model.path=MODEL --config.data.path=PAIRS.jsonl \
        --config.model.adapter=runs/mine/adapter --config.train.epochs=1

Requires model.path, data.path, train.steps or train.epochs. Without model.adapter a new adapter is trained, and the
base is the reference.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """Everything else at its default."""
    config = default_config()
    config.algorithm = "dpo"
    config.optim.learning_rate = 2e-5
    return config
