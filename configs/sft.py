"""Supervised fine-tuning: the library's defaults.

    jlora train --config=sft --config.model.path=MODEL --config.data.path=FILE.jsonl --config.train.epochs=1

Requires model.path, data.path, train.steps or train.epochs. `jlora train --help` lists every setting.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """Everything at its default."""
    config = default_config()
    config.algorithm = "sft"
    return config
