"""Model cards: a README.md whose header tells the Hub what a folder holds and what it was made from."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.repocard import metadata_load

from jlora.errors import UserError
from jlora.hub.checkpoints.source import HUB_ID
from jlora.hub.checkpoints.weights import read_json
from jlora.hub.signing import is_as_signed, signed, unsigned

FILE = "README.md"
TAG = "jlora"
LICENSE = ("license", "license_name", "license_link")
MADE = "## How it was made"
RELATIONS = ("adapter", "merge", "finetune", "quantized")


@dataclasses.dataclass(frozen=True)
class Card:
    """A model card; as text, what README.md holds.

    Attributes:
        bases: Hub ids of what it was made from; a place on one machine means nothing to others.
        relation: to the bases, one of `RELATIONS`; None if it is not known.
        library: the Hub's name of the library that opens the folder.
        task: the Hub's name of what the model does.
        license: those of the Hub's fields `LICENSE` that are known.
        datasets: Hub ids.
        sections: what follows the title, in Markdown.
    """

    title: str
    library: str = "transformers"
    bases: Sequence[str] = ()
    relation: str | None = None
    task: str = "text-generation"
    license: Mapping[str, str] = dataclasses.field(default_factory=dict)
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ("lora",)
    sections: Sequence[str] = ()

    def __str__(self) -> str:
        own = list(self.bases)
        data = huggingface_hub.ModelCardData(
            base_model=own[0] if len(own) == 1 else own or None,
            base_model_relation=self.relation if own else None,
            datasets=list(self.datasets) or None,
            library_name=self.library,
            pipeline_tag=self.task,
            tags=[TAG, *self.tags],
            **self.license,
        )
        text = "\n\n".join([f"# {self.title}", *self.sections])
        return signed(f"---\n{data.to_yaml()}\n---\n\n{text}\n\n", "<!-- {} -->")


def header_of(folder: str | Path) -> dict[str, Any]:
    """The header of the folder's README.md; {} if it has none that can be read."""
    file = Path(folder).expanduser() / FILE
    try:
        found = metadata_load(file) if file.is_file() else None
        return found if isinstance(found, dict) else {}
    except (yaml.YAMLError, ValueError):
        return {}


def hub_id(base: str | None) -> str | None:
    """The base's name on the Hub; None if it is a place on this machine."""
    is_id = base is not None and re.fullmatch(HUB_ID, base) and not Path(base).exists()
    return base if is_id else None


def license_of(base: str) -> dict[str, str]:
    """What the base says of its licence: those of the fields `LICENSE` that it has. Nothing is fetched.

    Args:
        base: a folder, or a Hub id whose card is in the Hub's cache.
    """
    folder = Path(base).expanduser()
    if hub_id(base):
        cached = huggingface_hub.try_to_load_from_cache(base, FILE)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    config = folder / "config.json"
    try:
        said = read_json(config) if config.is_file() else {}
    except UserError:
        said = {}
    said |= header_of(folder)
    return {name: said[name] for name in LICENSE if isinstance(said.get(name), str)}


def model_card(
    out: str | Path,
    bases: Sequence[str],
    how: str = "",
    *,
    relation: str = "finetune",
    lora: bool = False,
    scored: bool = False,
) -> Card:
    """The card of a folder that a command writes.

    Args:
        out: the folder, whose name is the title.
        bases: Hub ids or places of what the model was made from. If one is a place on this machine, none is named.
        how: what was done, in Markdown.
        relation: to the bases, one of `RELATIONS`.
        lora: whether adapters are part of it.
        scored: whether it is a reward model.
    """
    ids = [name for base in bases if (name := hub_id(base))]
    return Card(
        title=Path(out).expanduser().resolve().name,
        bases=ids if len(ids) == len(bases) else (),
        relation=relation,
        task="text-classification" if scored else "text-generation",
        license=next(filter(None, map(license_of, bases)), {}),
        tags=["lora"] if lora else [],
        sections=[
            "A model written with jlora.",
            *([f"{MADE}\n\n{how}"] if how else []),
            how_to_use("model", "", "path/to/this/folder", scored=scored),
        ],
    )


def shown(place: str | Path) -> str:
    """A model or an adapter as others may see it: its name on the Hub, or the last part of its place."""
    return hub_id(str(place)) or Path(place).expanduser().resolve().name


def how_made(folder: str | Path) -> str:
    """The section of the folder's card on how the model was made; "" if jlora did not write it."""
    text = (Path(folder).expanduser() / FILE).read_text(encoding="utf-8") if is_own(folder) else ""
    found = re.search(rf"^{MADE}\n.*?(?=^## |\Z)", unsigned(text), re.MULTILINE | re.DOTALL)
    return found[0].strip() if found else ""


def is_own(folder: str | Path) -> bool:
    """Whether jlora wrote the folder, as its card tells."""
    tags = header_of(folder).get("tags")
    return isinstance(tags, list) and TAG in tags


def is_as_written(folder: str | Path) -> bool:
    """Whether the folder's card is one that jlora wrote and nobody changed, or is missing."""
    file = Path(folder).expanduser() / FILE
    return not file.exists() or is_as_signed(file.read_text(encoding="utf-8", errors="replace"))


def how_to_use(kind: str, base: str, where: str, *, scored: bool = False) -> str:
    """The section that shows how to open an adapter or a model, in every library that does.

    Args:
        kind: "adapter" or "model".
        base: what to write for the base of an adapter.
        where: what to write for the folder.
        scored: whether it is a reward model.
    """
    auto, labels = ("SequenceClassification", ", num_labels=1") if scored else ("CausalLM", "")
    auto = f"AutoModelFor{auto}"
    opened = f'{auto}.from_pretrained("{base if kind == "adapter" else where}"{labels})'
    peft = kind == "adapter"
    lines = [
        *(["from peft import PeftModel"] if peft else []),
        f"from transformers import {auto}",
        "",
        f"{'base' if peft else 'model'} = {opened}",
        *([f'model = PeftModel.from_pretrained(base, "{where}")'] if peft else []),
    ]
    own = [
        "import jlora",
        "",
        f'model, params = jlora.load("{base if peft else where}")',
        *([f'params = jlora.load_adapter(params, "{where}")'] if peft else []),
    ]
    fences = [f"```python\n{text}\n```" for text in map("\n".join, (lines, own))]
    return "\n\n".join(
        ["## How to use", f"With {'PEFT' if peft else 'transformers'}:", fences[0], "With jlora:", fences[1]]
    )
