"""Turns mergekit's recipes into jlora's form: other spellings are replaced, idle settings dropped with a warning."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora.errors import number_of
from jlora.hub.recipes.methods import METHODS
from jlora.hub.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Settings for how masks are kept in memory, and those of mergekit's other methods, which it ignores in these.
IDLE = (
    *("int8_mask", "rescale_norm", "epsilon", "gamma", "embed_slerp", "nuslerp_flatten", "nuslerp_row_wise"),
    *("noise_scale", "noise_variance", "noise_seed", "select_topk", "filter_wise", "max_iter", "tol", "cur_rank"),
)
TOKENIZER = ("source", "tokens", "pad_to_multiple_of")


def in_own_form(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the settings under jlora's names, faults of mergekit's own); warns of settings that change nothing."""
    found, faults, idle = dict(settings), [], []
    method = METHODS.get(found.get("merge_method")) if isinstance(found.get("merge_method"), str) else None

    def parameters(value: Any) -> Any:
        if not isinstance(value, Mapping) or method is None:
            return value
        known = {*method.of_models, *method.of_all}
        kept = {name: _numbers(own) for name, own in value.items() if name in known or not _is_idle(name, own, method)}
        idle.extend(name for name in value if name not in kept)
        return kept

    def entries(value: Any) -> Any:
        return [_changed(entry, "parameters", parameters) for entry in value] if isinstance(value, list) else value

    found = _changed(found, "parameters", parameters)
    found = _changed(found, "models", entries)
    if isinstance(found.get("slices"), list):
        slices = [_changed(_changed(part, "parameters", parameters), "sources", entries) for part in found["slices"]]
        found["slices"] = slices
    if "tokenizer" in found:
        faults += _tokenizer(found)
    if idle:
        names = ", ".join(dict.fromkeys(idle))
        warnings.warn(f"the recipe's {names}: have no effect on {found['merge_method']}", stacklevel=4)
    return found, faults


def sum_of_adapter(model: str) -> str | None:
    """What to do about a model "base+adapter"; None for any other name, and for a path that exists."""
    base, plus, adapter = model.partition("+")
    if not plus or Path(model).exists():
        return None
    return f"{model}: merge it first (jlora merge --model={base} --adapter={adapter} --out=DIR), and name DIR here"


def common_tokenizer(models: Sequence[str]) -> tuple[str | None, list[str]]:
    """(a model whose vocabulary all have, or None; faults if they differ), for mergekit's "union"."""
    vocabularies = {model: load_tokenizer(model).get_vocab() for model in models}
    first = vocabularies[models[0]]
    others = [model for model, vocabulary in vocabularies.items() if vocabulary != first]
    if not others:
        return models[0], []
    count = len(first.items() ^ vocabularies[others[0]].items())
    return None, [
        f"tokenizer_source: found 'union', but {models[0]} and {others[0]} differ in {number_of(count, 'token')}, and "
        "models of different vocabularies are not combined: name one model, or leave the other out"
    ]


def set_template(tokenizer: "PreTrainedTokenizerBase", template: str | None, models: Sequence[str]) -> None:
    """Gives the tokenizer the recipe's chat template; "auto" is the most common one of the models."""
    if template == "auto":
        found = [made for model in models if (made := load_tokenizer(model).chat_template)]
        texts = Counter(made for made in found if isinstance(made, str))
        template = texts.most_common(1)[0][0] if texts else None
    if template:
        tokenizer.chat_template = template


def _changed(found: Any, key: str, change: Any) -> Any:
    return {**found, key: change(found[key])} if isinstance(found, Mapping) and key in found else found


def _is_idle(name: str, value: Any, method: Any) -> bool:
    """Whether a setting that the method does not have changes nothing in mergekit either."""
    return name in IDLE or (name == "rescale" and value in (method.rescales, float(method.rescales)))


def _numbers(value: Any) -> Any:
    """The value with numbers that were written as text turned into numbers."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _changed(value, "value", _numbers)


def _tokenizer(found: dict[str, Any]) -> list[str]:
    """Replaces `tokenizer` by `tokenizer_source` in the settings, and returns the faults."""
    asked = found.pop("tokenizer")
    if not isinstance(asked, Mapping):
        return [f"tokenizer: found {asked!r}, expected a mapping with source"]
    faults = [f"tokenizer.{key}: is unknown; expected source" for key in asked if key not in TOKENIZER]
    faults += [
        f"tokenizer.{key}: a merge does not change rows of tokens here: leave it out, and resize the result"
        for key in TOKENIZER[1:]
        if asked.get(key)
    ]
    if found.get("tokenizer_source"):
        faults.append("tokenizer, tokenizer_source: give one of them")
    found["tokenizer_source"] = asked.get("source", "union")
    return faults
