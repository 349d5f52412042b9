"""Writes the Modelfile with which Ollama takes a GGUF file."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.errors import ExistingFileError, UserError
from jlora.hub.cards import license_of
from jlora.hub.checkpoints.folder import OVERWRITE, replacing_file
from jlora.hub.checkpoints.source import locate, open_description
from jlora.hub.signing import is_as_signed, signed

FILE = "Modelfile"
# The generation config's name → Ollama's.
SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
PARAMETERS = SAMPLING | {"repetition_penalty": "repeat_penalty", "max_new_tokens": "num_predict"}
WHOLE = ("top_k", "num_predict")
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


def save_modelfile(
    path: str | Path,
    base: str | Path,
    *,
    stops: Sequence[str] = (),
    adapter: bool = False,
    system: str | None = None,
    force: bool = False,
) -> Path:
    """Writes the Modelfile of a GGUF file beside it, for `ollama create NAME -f Modelfile`, and returns its path.

    It says how the base's generation config draws tokens, what ends an answer, and the base's licence. It has no
    TEMPLATE: Ollama takes the chat template of the GGUF file.

    Args:
        base: the folder, Hub id or GGUF file that the model or the adapter was made from.
        stops: texts that end an answer, besides those in the generation config.
        adapter: whether the file is an adapter, which Ollama puts on the base.
        system: what every conversation begins with.
        force: also replace a Modelfile that jlora did not write, or that was changed since.

    Raises:
        UserError: Ollama would not read the file's name or `system` as they are.
        FileExistsError: there is such a Modelfile.
    """
    require_modelfile(path, system, force=force)
    path = Path(path).expanduser().resolve()
    lines = [f"# For: ollama create {path.stem} -f {FILE}"]
    if adapter:
        lines += [*_base(locate(base), path.parent), _line("ADAPTER", f"./{path.name}")]
    else:
        lines.append(_line("FROM", f"./{path.name}"))
    generation = open_description(base).generation_config or {}
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(generation)]
    more = generation.get("stop_strings") or ()
    ends = dict.fromkeys((*stops, *([more] if isinstance(more, str) else more)))
    lines += [_line("PARAMETER stop", end) for end in ends if end and not _fault(end)]
    if system:
        lines.append(_line("SYSTEM", system))
    if text := _license(base):
        lines.append(_line("LICENSE", text))
    target = path.parent / FILE
    with replacing_file(target, magic=b"") as fresh:
        fresh.write_text(signed("\n".join(lines) + "\n", "# {}"), encoding="utf-8")
    return target


def require_modelfile(path: str | Path, system: str | None = None, *, force: bool = False) -> None:
    """Checks that the Modelfile of a GGUF file at `path` can be written; raises as `save_modelfile`."""
    path = Path(path).expanduser().resolve()
    texts = {"--out": path.name, "--system": system or ""}
    if faults := [f"{name}: {fault}" for name, text in texts.items() if (fault := _fault(text))]:
        raise UserError("Ollama would not read this as it is:\n  " + "\n  ".join(faults))
    there = path.parent / FILE
    if there.is_file() and not force and not is_as_signed(there.read_text("utf-8", "replace")):
        raise ExistingFileError(
            f"{there} is not from jlora, or was changed since, so it is left alone; choose another folder for the GGUF "
            f"file, or {OVERWRITE}"
        )


def _base(base: Path, folder: Path) -> Iterator[str]:
    """The lines that name an adapter's base."""
    if base.suffix != ".gguf":
        yield "# Ollama converts this folder if it knows the architecture. If not, name the model's GGUF file here, or"
        yield "# the model in Ollama's library."
    base = base.resolve()
    yield _line("FROM", f"./{base.name}" if base.parent == folder else str(base))


def _parameters(generation: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Ollama's name and the value of what the generation config says."""
    greedy = generation.get("do_sample") is False
    if greedy:
        yield "temperature", 0
    for name, own in PARAMETERS.items():
        value = generation.get(name)
        usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if usable and not (greedy and name in SAMPLING):
            yield own, int(value) if own in WHOLE else value


def _license(base: str | Path) -> str | None:
    """The licence's text, or its name and address; None if the base has none that Ollama would read as it is."""
    place = Path(base).expanduser()
    files = [(place.parent if place.is_file() else place) / name for name in LICENSES]
    said = license_of(str(base))
    names = [said.get("license_name") or said.get("license"), said.get("license_link")]
    texts = [*(file.read_text("utf-8", "replace") for file in files if file.is_file()), " ".join(filter(None, names))]
    return next((text for text in texts if text.strip() and not _fault(text)), None)


def _line(instruction: str, text: str) -> str:
    """The instruction, with quotes if the text does not end with its line or would lose its own."""
    plain = text == text.strip() and not text.startswith('"') and not set("\r\n") & set(text)
    return f"{instruction} {text}" if plain else f'{instruction} """{text}"""'


def _fault(text: str) -> str | None:
    """Why Ollama would read another text."""
    lost = sorted({character for character in text if not character.isprintable() and character not in "\t\r\n"})
    if lost:
        return f"it leaves out characters that it cannot print: {', '.join(f'U+{ord(one):04X}' for one in lost)}"
    ends = (text[:at] for at, character in enumerate(text) if character in "\r\n")
    return (
        "three quotes at the end of a line end the text" if any(end.rstrip().endswith('"""') for end in ends) else None
    )
