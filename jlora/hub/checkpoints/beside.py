"""What a folder holds beside its language model, a vision tower say: set aside when read, copied when written."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora import tree
from jlora.errors import UserError, number_of
from jlora.families import FAMILIES
from jlora.families.multimodal import TIED, TextHalf
from jlora.hub.checkpoints.weights import SafetensorsFolder, TensorInfo
from jlora.types import Params

if TYPE_CHECKING:
    from jlora.models import Model

# What a processor of images or sounds needs besides the tokenizer.
PROCESSOR = ("*processor_config.json",)


@dataclasses.dataclass(frozen=True)
class Beside:
    """The other parts of a model in its folder.

    Attributes:
        half: which of the folder's names are whose.
        tensors: the other parts' tensors, by the folder's names.
        older: whether the folder's names for the language model are older ones.
    """

    folder: Path
    half: TextHalf
    tensors: Mapping[str, TensorInfo]
    older: bool

    def name(self, name: str) -> str:
        """The folder's name of one of the language model's tensors."""
        return self.half.formerly(name) if self.older else name

    def copy_files(self, folder: Path, patterns: tuple[str, ...]) -> None:
        """Copies the files and folders whose names match, unless they are there already."""
        for found in sorted({path for pattern in patterns for path in self.folder.glob(pattern)}):
            target = folder / found.name
            if found.is_dir():
                shutil.copytree(found, target, dirs_exist_ok=True)
            elif not target.exists():
                shutil.copyfile(found, target)


def half_of(config: Mapping[str, Any]) -> TextHalf | None:
    """The half of a parsed config.json that is the language model; None if all of it is."""
    family = FAMILIES.get(str(config.get("model_type")))
    return family.half if family else None


def set_aside(checkpoint: SafetensorsFolder) -> SafetensorsFolder:
    """The checkpoint with only the language model's tensors, by transformers' names; the others are in `aside`."""
    half = half_of(checkpoint.config)
    if half is None:
        return checkpoint
    checkpoint.aside = {name: info for name, info in checkpoint.tensors.items() if half.is_other(name)}
    for name in checkpoint.aside:
        del checkpoint.tensors[name]
    today = {name: half.today(name) for name in checkpoint.tensors}
    checkpoint.rename({new: old for old, new in today.items() if new not in checkpoint.tensors})
    return checkpoint


def say_left_alone(checkpoint: SafetensorsFolder) -> None:
    """Warns that only the language model was loaded: what was left alone, by part."""
    found: dict[str, list[TensorInfo]] = {}
    for name, info in checkpoint.aside.items():
        found.setdefault(part_of(name), []).append(info)
    if found:
        parts = ", ".join(
            f"{part} ({number_of(len(infos), 'tensor')}, {sum(info.nbytes for info in infos):,} bytes)"
            for part, infos in sorted(found.items())
        )
        warnings.warn(f"{checkpoint.folder}: only the language model was loaded. Left alone: {parts}", stacklevel=3)


def part_of(name: str) -> str:
    """The part that a tensor belongs to: vision_tower."""
    return name.removeprefix("model.").partition(".")[0]


def beside(model: "Model") -> Beside | None:
    """What is to be copied when the model is written; None for a language model alone.

    Raises:
        UserError: the folder that the model was loaded from is no longer there, or holds another model.
    """
    config, half = model.config.to_hf(), half_of({"model_type": model.config.model_type})
    if half is None:
        return None
    what = f"the tensors of a {model.config.model_type} model beside its language model"
    if model.config.folder is None:
        raise UserError(f"{what} are not known: load the model (jlora.load) from the folder that holds them")
    folder = Path(model.config.folder)
    try:
        checkpoint = SafetensorsFolder(folder)
    except UserError as error:
        raise UserError(f"{what} must be copied from {folder}, which cannot be opened: {error}") from error
    if changed := [name for name in half.fields if checkpoint.config.get(name) != config.get(name)]:
        raise UserError(
            f"{what} must be copied from {folder}, which has changed since the model was loaded "
            f"({', '.join(changed)} in config.json): put the folder back, or load the model again"
        )
    return beside_of(set_aside(checkpoint))


def beside_of(checkpoint: SafetensorsFolder) -> Beside:
    """What is to be copied from a checkpoint of several parts."""
    half = half_of(checkpoint.config)
    older = any(info.stored == half.formerly(name) for name, info in checkpoint.tensors.items() if info.stored)
    return Beside(checkpoint.folder, half, checkpoint.aside, older)


def alone(model: "Model", params: Params) -> tuple["Model", Params]:
    """The language model without the other parts, as a model of its own family; the same if there are none.

    language_model/layers/self_attn/q_proj/kernel  →  layers/self_attn/q_proj/kernel

    Raises:
        UserError: there is no such family: transformers has the language model only beside the other parts.
    """
    config = model.config
    if (half := half_of({"model_type": config.model_type})) is None:
        return model, params
    settings = half.settings(config.to_hf()) | {TIED: config.tie_word_embeddings}
    family = half.family(settings)
    if family not in FAMILIES.values():
        raise UserError(
            f"the language model of a {config.model_type} model cannot be written alone: transformers has no such "
            "model; write the whole one with jlora.save_model"
        )
    settings |= {"architectures": [family.class_name], "eos_token_id": list(config.eos_token_ids)}
    own = dataclasses.replace(
        config,
        model_type=settings["model_type"],
        names=family.names,
        source=json.dumps(settings, sort_keys=True),
        folder=None,
    )
    flat = {path.removeprefix(f"{half.module}/"): leaf for path, leaf in tree.flatten(params).items()}
    return dataclasses.replace(model, config=own), tree.unflatten(flat)
