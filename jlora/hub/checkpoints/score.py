"""The scalar head of reward and value models, in transformers' form.

It is `score.weight` of a …ForSequenceClassification with one label, which has no other head.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax

from jlora import lora, tree
from jlora.errors import UserError
from jlora.families import FAMILIES
from jlora.families.family import SCORE
from jlora.hub.checkpoints.source import Description, Source
from jlora.lora.kinds import COPIES
from jlora.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jlora.models import Model

KERNEL = f"{SCORE}/kernel"
TENSOR = f"{SCORE}.weight"
SUFFIX = "ForSequenceClassification"
# model_type → transformers' class; other families have no such class.
CLASSES = {kind: f"{family.score}{SUFFIX}" for kind, family in FAMILIES.items() if family.score}


def has_score(params: Params) -> bool:
    """Whether the tree of any model has a score head: a module of that name with a kernel [D, 1] and no bias."""
    module = params.get(SCORE)
    if not isinstance(module, dict):
        return False
    own = lora.resolve({name: leaf for name, leaf in module.items() if COPIES.holds(name) or not lora.is_adapter(name)})
    return own.keys() == {"kernel"} and own["kernel"].shape[1:] == (1,)


def is_scored(checkpoint: Source | Description) -> bool:
    """Whether the checkpoint is a reward model's.

    Raises:
        ValueError: its head has several labels.
    """
    tensor = checkpoint.tensors.get(TENSOR)
    if tensor is not None and tensor.shape[0] != 1:
        raise UserError(
            f"{TENSOR} has shape {tensor.shape}, a classifier of {tensor.shape[0]} labels; jlora reads heads of one "
            "label (num_labels=1), as reward models have"
        )
    named = checkpoint.config.get("architectures")
    names = named if isinstance(named, list) else [named]  # transformers accepts files where this is not a list
    return tensor is not None or any(isinstance(name, str) and name.endswith(SUFFIX) for name in names)


def scored_leaves(model: "Model", leaves: Mapping[str, Any], heads: Collection[str]) -> dict[str, Any]:
    """Path → abstract leaf, for the model with a score head; its other head is kept if its path is in `heads`.

    Args:
        leaves: the leaves of the model without a score head.
    """
    head = f"{model.config.names.head}/kernel"
    kept = {path: leaf for path, leaf in leaves.items() if path != head or path in heads}
    embedding = leaves[f"{model.config.names.embedding}/embedding"]
    return kept | {KERNEL: jax.ShapeDtypeStruct((model.config.hidden_size, 1), embedding.dtype)}


def only_scored(model: "Model", params: Params) -> Params:
    """The params with the score head as a leaf of the base, and without the head that makes logits."""
    flat = tree.flatten(params)
    heads = (f"{model.config.names.head}/", f"{SCORE}/")
    kept = {path: leaf for path, leaf in flat.items() if not path.startswith(heads)}
    # Resolve first, so that a trained copy keeps its own dtype.
    return tree.unflatten(kept | {KERNEL: lora.merged_leaf(lora.resolve(params[SCORE]), "kernel")})


def scored_config(
    model: "Model", config: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase | None"
) -> dict[str, Any]:
    """config.json of the model with its score head.

    transformers scores a text at its last token that is not `pad_token_id`. That is the tokenizer's or the config's,
    unless the token also ends texts, which then would not be scored at their ends, or the model has no row for it.
    Without one, transformers scores only single texts.

    Raises:
        ValueError: transformers has no such class for the model's family.
    """
    kind = model.config.model_type
    if kind not in CLASSES:
        raise UserError(
            f"transformers has no {SUFFIX} for model_type {kind!r}, so no folder can hold this score head; save the "
            f"adapter instead (save_adapter). Families with such a class: {', '.join(CLASSES)}"
        )
    ends = (None, None if tokenizer is None else tokenizer.eos_token_id, *model.config.eos_token_ids)
    family = FAMILIES[kind]
    settings = {**config, **family.settings(config)}
    pads = (None if tokenizer is None else tokenizer.pad_token_id, settings.get("pad_token_id"))
    pad = next((token for token in pads if token not in ends and token < model.config.vocab_size), None)
    return {
        **family.with_field(config, "pad_token_id", pad),
        "architectures": [CLASSES[kind]],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
