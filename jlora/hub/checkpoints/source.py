"""Model sources: a folder, a GGUF file or a Hub id, opened as an object that reads tensors by their Hub names."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jlora.errors import MissingFileError, UserError, describe_faults, number_of
from jlora.hub.checkpoints.beside import set_aside
from jlora.hub.checkpoints.fp8 import unscaled
from jlora.hub.checkpoints.tied import settle_head
from jlora.hub.checkpoints.weights import DTYPES, INDEX, SINGLE, SafetensorsFolder, TensorInfo, read_json
from jlora.hub.gguf.reading import GGUFFile

TEMPLATES = "additional_chat_templates"  # the folder of named templates
ALLOW = (
    *("*.json", "*.safetensors", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "chat_template.jinja"),
    f"{TEMPLATES}/*.jinja",
)
# Some repositories have the same weights again in another layout or in folders. No folder is fetched except that of the
# templates: the patterns match all names that differ from it in a letter, are a prefix of it, or go on after it.
IGNORE = (
    "consolidated*",
    *(f"{TEMPLATES[:i]}[!{letter}]*/*" for i, letter in enumerate(TEMPLATES)),
    *(f"{TEMPLATES[:i]}/*" for i in range(1, len(TEMPLATES))),
    f"{TEMPLATES}[!/]*",
)
GENERATION = "generation_config.json"
HUB_ID = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"


# An open checkpoint: `config`, `generation_config`, `tensors` (name → TensorInfo) and `read(name)`, by the Hub's names.
Source = SafetensorsFolder | GGUFFile


def open_source(location: str | Path) -> Source:
    """The checkpoint at `location`; its headers are read, but no tensors (unless a tied head must be compared).

    Raises:
        FileNotFoundError: nothing is there, or files are missing.
        ValueError: files are broken or of a kind that jlora does not read.
    """
    path = locate(location)
    return GGUFFile(path) if path.suffix == ".gguf" else _settled(SafetensorsFolder(path))


def _settled(checkpoint: SafetensorsFolder) -> SafetensorsFolder:
    """The checkpoint with its language model's tensors only, and with what config.json does not say settled."""
    return settle_head(unscaled(set_aside(checkpoint)))


class Description:
    """A folder opened for its config.json only; weights, if there are any, are ignored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        generation = folder / GENERATION
        self.generation_config: dict[str, Any] | None = read_json(generation) if generation.is_file() else None
        self.tensors: dict[str, TensorInfo] = {}

    def read(self, name: str) -> NoReturn:
        """Raises MissingFileError: no weights were opened."""
        raise MissingFileError(f"{self.folder} was opened without its weights; {name} was asked for")


def open_description(location: str | Path) -> "Source | Description":
    """The checkpoint at `location`, or only its description if it has no weights or they would have to be fetched."""
    path = Path(location).expanduser()
    if path.is_dir() and (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
        return Description(path)
    if path.exists() or path.is_absolute() or not re.fullmatch(HUB_ID, str(location)):
        return open_source(location)
    return Description(_download(str(location), ("config.json", GENERATION)))


def locate(location: str | Path) -> Path:
    """The local folder or .gguf file at `location`; a Hub id is downloaded, without any pickles."""
    path = Path(location).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise UserError(f"{path} is a file that is not .gguf; give the folder that holds config.json and the weights")
    if path.is_dir():
        return _gguf_in(path) or path
    if re.fullmatch(HUB_ID, str(location)) and not path.is_absolute():
        return _download(str(location))
    raise MissingFileError(f"no folder or file {path}, and {str(location)!r} is not a Hub id (owner/name)")


def locate_adapter(location: str | Path) -> Path:
    """The local adapter folder at `location`, even if it has GGUF files; a Hub id is downloaded.

    Raises:
        FileNotFoundError: nothing is there.
        UserError: `location` is a file.
    """
    path = Path(location).expanduser()
    if path.is_file():
        raise UserError(f"{path} is a file; give the folder of the adapter, which holds adapter_config.json")
    return path if path.is_dir() else locate(location)


def gguf_files(folder: Path) -> list[Path]:
    """The folder's .gguf files, or none if it has safetensors, which then are its model."""
    has_others = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    return [] if has_others else sorted(file for file in folder.glob("*.gguf") if file.is_file())


def check_tensors(
    found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], *, harmless: set[str]
) -> None:
    """Checks that the checkpoint holds exactly the expected tensors in the expected shapes.

    Args:
        harmless: names of tensors that may be there without being expected.

    Raises:
        ValueError: tensors are missing, unknown, misshapen or not of a floating type; all are listed.
    """
    problems = [f"missing {name} {shape}" for name, shape in sorted(expected.items()) if name not in found]
    for name, info in sorted(found.items()):
        if name in expected and info.shape != expected[name]:
            problems.append(f"{name} has shape {info.shape}, expected {expected[name]} ({info.file.name})")
        if name in expected and info.dtype not in DTYPES and info.file.suffix == ".safetensors":
            problems.append(f"{name} is {info.dtype}, expected one of {', '.join(sorted(DTYPES))} ({info.file.name})")
        if name not in expected and name not in harmless:
            problems.append(f"unknown {name} {info.shape} ({info.file.name})")
    if problems:
        raise UserError(
            describe_faults(
                f"the checkpoint does not fit its config.json ({number_of(len(problems), 'tensor')})", problems
            )
        )


def _gguf_in(folder: Path) -> Path | None:
    """The only .gguf file of a folder without safetensors, or None.

    Raises:
        ValueError: there are several, so the user must name one.
    """
    files = gguf_files(folder)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{folder} holds {len(files)} GGUF files, give the path of one: {names}")
    return files[0] if files else None


def _download(hub_id: str, files: Sequence[str] = ALLOW) -> Path:
    # Slow to import, and not needed to load from a folder.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(hub_id, allow_patterns=list(files), ignore_patterns=list(IGNORE))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingFileError(
            f"no local folder {hub_id!r}, and it could not be fetched from the Hugging Face Hub either ({reason}). "
            "Check the name and the connection, log in with `hf auth login` if the model is gated, or download it "
            "elsewhere and give the folder's path"
        ) from error
    return Path(folder)
