"""Training data: JSONL records, chat templates, packing plans and the loader that feeds the training step."""

from jlora.data.chat import EncodeReport, Example, encode, split_prompt
from jlora.data.config import DataConfig
from jlora.data.loader import Batch, collate, loader
from jlora.data.packing import Step, plan
from jlora.data.records import Record, read_records

__all__ = [
    "Batch",
    "DataConfig",
    "EncodeReport",
    "Example",
    "Record",
    "Step",
    "collate",
    "encode",
    "loader",
    "plan",
    "read_records",
    "split_prompt",
]
