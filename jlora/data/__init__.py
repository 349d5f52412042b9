"""Training data: records from files, chat templates, packing plans and the loader that feeds the training step."""

from jlora.data.batches import Batch, collate, describe, filled
from jlora.data.cache import cached
from jlora.data.chat import EncodeReport, answer_text, encodable, encode, split_prompt
from jlora.data.config import DataConfig
from jlora.data.ends import stop_ids
from jlora.data.files import digest
from jlora.data.items import (
    Item,
    Singles,
    collate_items,
    count_tokens,
    documents_of,
    encode_preferences,
    in_order,
    lengths_of,
    loader,
    plan_items,
    with_mismatched,
)
from jlora.data.packing import Step, plan
from jlora.data.preference import read_preferences
from jlora.data.prompts import Prompt, PromptReport, encode_prompt, encode_prompts, read_prompts, with_answers
from jlora.data.records import OnError, Record, iterate_records, read_records
from jlora.data.store import Example, Examples, Writer
from jlora.data.template import fold_system, template_tail, template_variables
from jlora.data.vocabulary import RESIZE, fitted, unfitted

__all__ = [
    "RESIZE",
    "Batch",
    "DataConfig",
    "EncodeReport",
    "Example",
    "Examples",
    "Item",
    "OnError",
    "Prompt",
    "PromptReport",
    "Record",
    "Singles",
    "Step",
    "Writer",
    "answer_text",
    "cached",
    "collate",
    "collate_items",
    "count_tokens",
    "describe",
    "digest",
    "documents_of",
    "encodable",
    "encode",
    "encode_preferences",
    "encode_prompt",
    "encode_prompts",
    "filled",
    "fitted",
    "fold_system",
    "in_order",
    "iterate_records",
    "lengths_of",
    "loader",
    "plan",
    "plan_items",
    "read_preferences",
    "read_prompts",
    "read_records",
    "split_prompt",
    "stop_ids",
    "template_tail",
    "template_variables",
    "unfitted",
    "with_answers",
    "with_mismatched",
]
