"""What a run knows before its model is loaded: its tokenizer, and the plan of its data."""

import datetime
from collections.abc import Mapping
from typing import Any

from jlora import data, hub
from jlora.train import many
from jlora.train.algorithms import ALGORITHMS
from jlora.train.algorithms.algorithm import Note, Plan
from jlora.train.config import RunConfig
from jlora.train.evaluation.metrics import measured
from jlora.types import Params


def run_tokenizer(config: RunConfig, vocab_size: int, date: datetime.datetime) -> Any:
    """The run's tokenizer, which refuses tokens that the model has no row for.

    Args:
        date: what chat templates see.
    """
    tokenizer = data.fitted(hub.load_tokenizer(config.model.path), vocab_size, date)
    if config.model.adapter:
        hub.say_unused_tokenizer(tokenizer, config.model.adapter)
    if config.data.system == "fold":
        data.fold_system(tokenizer)
    return tokenizer


def run_plan(config: RunConfig, tokenizer: Any, fixed: Mapping[str, Params], note: Note) -> Plan:
    """The plan of the run, whose data are read and encoded.

    Args:
        fixed: for a resumed run of several adapters, see `many.plan`.
    """
    plan = measured(ALGORITHMS[config.algorithm].plan)
    return many.plan(config, tokenizer, note, plan, fixed) if config.adapters else plan(config, tokenizer, note)
