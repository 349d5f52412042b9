"""Training data: records from files, chat templates, packing plans and the loader that feeds the training step."""

from jlora.data import shown
from jlora.data.batches import Batch, collate, describe, filled
from jlora.data.cache import cached
from jlora.data.chat import Arrange, EncodeReport, Progress, answer_text, encodable, encode, encode_items, split_prompt
from jlora.data.config import DataConfig
from jlora.data.ends import stop_ids
from jlora.data.hosts import require_same
from jlora.data.items import collate_items, count_tokens, in_order, loader, plan_items
from jlora.data.notes import LeftOut, Notes, as_notes
from jlora.data.packing import Step, Steps, plan
from jlora.data.paths import digest
from jlora.data.preference import iterate_preferences, read_preferences
from jlora.data.prompts import Prompt, encode_prompt, encode_prompts, iterate_prompts, read_prompts
from jlora.data.records import OnError, Record, iterate_records, read_records, source_of
from jlora.data.sides import encode_preferences, with_mismatched
from jlora.data.sources import Source, Sources
from jlora.data.store import Example, Examples, Item, Items
from jlora.data.template import fold_system, template_tail, template_variables
from jlora.data.vocabulary import RESIZE, fitted, unfitted
from jlora.data.writer import Writer, flat

__all__ = [
    "RESIZE",
    "Arrange",
    "Batch",
    "DataConfig",
    "EncodeReport",
    "Example",
    "Examples",
    "Item",
    "Items",
    "LeftOut",
    "Notes",
    "OnError",
    "Progress",
    "Prompt",
    "Record",
    "Source",
    "Sources",
    "Step",
    "Steps",
    "Writer",
    "answer_text",
    "as_notes",
    "cached",
    "collate",
    "collate_items",
    "count_tokens",
    "describe",
    "digest",
    "encodable",
    "encode",
    "encode_items",
    "encode_preferences",
    "encode_prompt",
    "encode_prompts",
    "filled",
    "fitted",
    "flat",
    "fold_system",
    "in_order",
    "iterate_preferences",
    "iterate_prompts",
    "iterate_records",
    "loader",
    "plan",
    "plan_items",
    "read_preferences",
    "read_prompts",
    "read_records",
    "require_same",
    "shown",
    "source_of",
    "split_prompt",
    "stop_ids",
    "template_tail",
    "template_variables",
    "unfitted",
    "with_mismatched",
]
