"""Supervised fine-tuning: the library's defaults.

    jlora train --config=configs/sft.py --config.model.path=MODEL --config.data.path=FILE.jsonl --config.train.epochs=1

`jlora train --help` lists every setting.
"""

from ml_collections import ConfigDict

from jlora.train.config import default_config


def get_config() -> ConfigDict:
    """Everything at its default; requires model.path, data.path and train.steps or train.epochs."""
    config = default_config()
    config.algorithm = "sft"
    return config
