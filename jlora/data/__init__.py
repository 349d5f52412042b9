"""Training data: JSONL records, chat templates, packing plans and the loader that feeds the training step."""

from jlora.data.chat import EncodeReport, Example, encode, split_prompt
from jlora.data.config import DataConfig
from jlora.data.loader import collate, loader
from jlora.data.packing import Step, plan
from jlora.data.records import read_records

__all__ = [
    "DataConfig",
    "EncodeReport",
    "Example",
    "Step",
    "collate",
    "encode",
    "loader",
    "plan",
    "read_records",
    "split_prompt",
]
