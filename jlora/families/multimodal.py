"""Models that also see or hear. Their language model is a family of its own; its half of config.json, and of the names.

jlora computes and trains the language model. What belongs to the other parts is never read, and written back as it was.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.kinds import FLAG, OBJECT, TEXT

TIED = "tie_word_embeddings"


class TextHalf(NamedTuple):
    """Where the language model lies in a model of several parts.

    Attributes:
        families: those that the language model can be of; the first if its settings do not say.
        others: a pattern of the names of all other parts' tensors.
        fields: the fields of config.json that only the other parts read.
        defaults: settings that transformers takes where config.json has none.
        tied: whether head and embedding are tied if config.json does not say.
        field: the field of config.json with the language model's settings.
        module: the module that holds it; the head lies beside it.
        older: (the beginning of a name in older checkpoints, what transformers makes of it).
    """

    families: tuple[Family, ...]
    others: str
    fields: tuple[str, ...]
    defaults: Mapping[str, Any] = {}
    tied: bool = True
    field: str = "text_config"
    module: str = "language_model"
    older: tuple[tuple[str, str], ...] = ()

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The language model's own config.json, from the whole model's."""
        own = config.get(self.field)
        given = {name: value for name, value in own.items() if value is not None} if isinstance(own, dict) else {}
        return {**self.defaults, "model_type": self.families[0].model_types[0], **given}

    def with_field(self, config: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
        """config.json with another value of a setting of the language model, wherever readers look for it."""
        outside = {name: value} if name in config or name == TIED else {}
        return {**config, **outside, self.field: {**(config.get(self.field) or {}), name: value}}

    def family(self, settings: Mapping[str, Any]) -> Family | None:
        """The language model's family, by its own settings; None if it is not one of `families`."""
        kind = settings.get("model_type")
        return next((family for family in self.families if kind in family.model_types), None)

    def is_other(self, name: str) -> bool:
        """Whether the tensor of this name, older or not, belongs to another part."""
        return re.fullmatch(self.others, name) is not None

    def today(self, name: str) -> str:
        """transformers' name of a tensor that may have an older one."""
        if any(name.startswith(new) for _, new in self.older):
            return name
        return next((new + name.removeprefix(old) for old, new in self.older if name.startswith(old)), name)

    def formerly(self, name: str) -> str:
        """The older name of a tensor: the inverse of `today`."""
        return next((old + name.removeprefix(new) for old, new in self.older if name.startswith(new)), name)


# How transformers 4 named the parts of LLaVA and its kin, and 5 still does in files.
LLAVA_NAMES = (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."))
LLAVA_OTHERS = r"(model\.)?(vision_tower|multi_modal_projector)\..+"


def multimodal(half: TextHalf, *, model_types: tuple[str, ...], class_name: str, score: str | None = None) -> Family:
    """The family of models whose language model is one of `half.families`, which have all names in common."""
    text = half.families[0]
    return dataclasses.replace(
        text,
        model_types=model_types,
        class_name=class_name,
        read=functools.partial(_read, half),
        names=text.names.below(half.module),
        score=score,
        mlx_names=(),
        gguf=None,  # written as the language model alone
        half=half,
    )


def _read(half: TextHalf, fields: Fields) -> Values:
    fields.get(half.field, kind=OBJECT)
    fields.seen.update(half.fields)
    settings = half.settings(fields.config)
    text = fields.inside(half.field, settings)
    family = half.family(settings)
    if family is None:
        text.only("model_type", *(kind for family in half.families for kind in family.model_types))
        fields.finish()
    text.get("model_type", kind=TEXT)
    return family.read(text) | {TIED: fields.get(TIED, half.tied, FLAG)}
