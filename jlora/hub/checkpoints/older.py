"""What older readers (transformers 4, vLLM, mlx-lm) need in a model's folder besides what transformers 5 reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora.families import FAMILIES
from jlora.families.family import Older

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_CONFIG = "tokenizer_config.json"
# transformers 5's name → transformers 4's.
RENAMED = {"dtype": "torch_dtype"}
# Classes of transformers 4 that add the begin and end tokens by add_bos_token and add_eos_token, whatever
# tokenizer.json says.
ADDS_BY_SETTING = ("CodeLlamaTokenizer", "CohereTokenizer", "GPTNeoXTokenizer", "GemmaTokenizer", "LlamaTokenizer")


def for_every_reader(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with its dtype, rotary positions and experts under the names of transformers 4 and 5."""
    family = FAMILIES.get(str(config.get("model_type")))  # a model that only recipes merge may be of another family
    if family and family.half and isinstance(inner := config.get(family.half.field), Mapping):
        config = {**config, family.half.field: for_every_reader(inner)}
    older = family.older if family else Older()
    renamed = {**RENAMED, **(older.renamed if older else {})}
    named = {before: config[now] for now, before in renamed.items() if config.get(now) is not None}
    return {**config, **named, **(_rope(config, older) if older else {})}


def _rope(config: Mapping[str, Any], older: Older) -> dict[str, Any]:
    """transformers 4's fields for what `rope_parameters` says in 5."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return {}
    scaled = bool(config.get("rope_scaling"))
    if isinstance(full := rope.get("full_attention"), Mapping):  # layers with windows have other positions
        found = _flat(full, config, older)
        local, name = rope.get("sliding_attention"), older.local_theta
        if name and isinstance(local, Mapping) and "rope_theta" in local:
            found[name] = local["rope_theta"]
        return {key: value for key, value in found.items() if not (scaled and key == "rope_scaling")}
    # transformers 5 ignores `rope_parameters` if there is a `rope_scaling`.
    return {} if scaled else _flat(rope, config, older)


def _flat(rope: Mapping[str, Any], config: Mapping[str, Any], older: Older) -> dict[str, Any]:
    found = {name: rope[key] for key, name in older.rotary.items() if rope.get(key) is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return found
    scaling = {key: value for key, value in rope.items() if key not in (*older.rotary, "type")} | {"rope_type": kind}
    if older.scaling:
        scaling = older.scaling(scaling, config)
    return found | ({"rope_scaling": scaling} if scaling else {})


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Writes the tokenizer so that transformers 4 and 5 load it with the same ids and the same chat template."""
    tokenizer.save_pretrained(folder)
    file = folder / TOKENIZER_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # its earlier name, which transformers 5 knows too
    if isinstance(extra := config.get("extra_special_tokens"), list):  # transformers 4 accepts only a mapping
        del config["extra_special_tokens"]
        config |= {"additional_special_tokens": extra} if extra else {}
    if config.get("tokenizer_class", "").removesuffix("Fast") in ADDS_BY_SETTING:
        config |= _ends(tokenizer)
    if tokenizer.chat_template and "chat_template" not in config:
        config["chat_template"] = _templates(tokenizer.chat_template)
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _ends(tokenizer: "PreTrainedTokenizerBase") -> dict[str, bool]:
    """transformers 4's settings for whether begin and end tokens are added to a text."""
    ids = tokenizer("a").input_ids
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        "add_bos_token": bool(ids) and begin is not None and ids[0] == begin,
        "add_eos_token": bool(ids) and end is not None and ids[-1] == end,
    }


def _templates(found: str | Mapping[str, str]) -> str | list[dict[str, str]]:
    if isinstance(found, str):
        return found
    return [{"name": name, "template": template} for name, template in found.items()]
