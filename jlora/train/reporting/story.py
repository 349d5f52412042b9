"""What a model card tells of a run: its base, data, settings, results and cost, without places on this machine."""

import importlib.metadata
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jlora import checkpoint
from jlora.data.paths import locate
from jlora.errors import UserError, size_of
from jlora.train.config import completed
from jlora.train.reporting.compare import UNSEEN, Run
from jlora.train.reporting.metrics import series
from jlora.train.reporting.trackers import flat
from jlora.train.resume import CONTENTS

# Settings that are told even if they are the defaults.
ALWAYS = (
    *("algorithm", "model.quant", "model.dtype", "lora.r", "lora.lora_alpha", "lora.target_modules"),
    *("optim.learning_rate", "train.batch_size", "train.seq_len", "train.seed"),
)
# Settings that the card tells in words of its own, or that matter to nobody else.
LEFT_OUT = ("model.path", "data.path", "data.eval_path", "data.cache", *UNSEEN)
PACKAGES = ("jlora", "jax", "transformers", "peft", "huggingface_hub")


def sections(run: Run, *, curves: bool) -> list[str]:
    """The card's sections about the run, in Markdown.

    Args:
        curves: whether the card's folder has curves.png.
    """
    return [text for text in (_data(run), _settings(run), _results(run, curves=curves), _cost(run)) if text]


def datasets(run: Run) -> list[str]:
    """The Hub ids of the data that the run trained and evaluated on."""
    return list(dict.fromkeys(found for _, name, _ in _read_data(run) if (found := _on_hub(name))))


def versions() -> str:
    """The section that says which packages wrote the card."""
    rows = [(name, version) for name in PACKAGES if (version := _version(name))]
    return f"## Versions\n\nOf the packages that wrote this folder.\n\n{table(('package', 'version'), rows)}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def _data(run: Run) -> str:
    rows = [(used, _shown(name), digest) for used, name, digest in _read_data(run)]
    return f"## Data\n\n{table(('used for', 'name', 'CRC-32'), rows)}" if rows else ""


def _read_data(run: Run) -> Iterator[tuple[str, str, str]]:
    """(what for, name, digest) of all that the run read, as its newest checkpoint has it."""
    try:
        _, manifest, _ = checkpoint.newest(run.workdir / "checkpoints")
    except UserError:  # of another version
        manifest = {}
    for used, setting in (("training", "data.path"), ("evaluation", "data.eval_path")):
        found: Mapping[str, str] = manifest.get(f"{CONTENTS}{setting}") or {}
        if not found and isinstance(given := run.settings.get(setting), str):
            found = {given: "not recorded"}
        yield from ((used, name, digest) for name, digest in found.items())


def _on_hub(name: str) -> str | None:
    """The id of a data set of the Hub; None for files."""
    try:
        parts = locate(name)
    except UserError:  # a file that is no longer there
        return None
    return parts[0].hub[0] if len(parts) == 1 and parts[0].hub else None


def _settings(run: Run) -> str:
    defaults = flat(completed({group: {} for group in ("model", "data", "train", "lora")}))
    told = {
        name: value
        for name, value in run.settings.items()
        if name not in LEFT_OUT and not name.endswith(".path")
        if name in ALWAYS or repr(_plain(defaults.get(name))) != repr(_plain(value))
    }
    first = {name: told.pop(name) for name in ALWAYS if told.get(name) is not None}
    rows = [
        (f"`{name}`", f"`{_shown(value)}`") for name, value in (first | told).items() if value not in (None, {}, ())
    ]
    title = "## Settings\n\nThe most common, and those that are not jlora's defaults."
    return f"{title}\n\n{table(('setting', 'value'), rows)}"


def _results(run: Run, *, curves: bool) -> str:
    numbers = run.numbers()
    rows = [("loss", f"{series(run.records, 'loss')[1][0]:.4g}", f"{numbers['loss']:.4g}")] if "loss" in numbers else []
    for name in run.evaluated():
        values = series(run.records, name)[1]
        rows.append((name, f"{values[0]:.4g}" if len(values) > 1 else "", f"{values[-1]:.4g}"))
    parts = ["## Results"]
    if rows:
        parts.append(table(("number", "first", "last"), rows))
        parts.append("The last loss is the mean of the last twentieth of the steps.")
    if run.best and run.best.get("step") is not None:
        best = run.best
        kept = " The weights are those of this step." if run.settings.get("train.load_best") else ""
        parts.append(f"Best `{best['metric']}`: {best['value']:.4g}, at step {best['step']}.{kept}")
    if curves:
        parts.append("![Curves of the run](curves.png)")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _cost(run: Run) -> str:
    numbers, usage = run.numbers(), run.usage
    of = run.settings.get("train.steps")
    known = {
        "steps": f"{numbers['steps']:,}" + ("" if run.finished or not of else f" of {of:,} (unfinished)"),
        "tokens": f"{numbers['tokens']:,}" if "tokens" in numbers else None,
        "trained parameters": f"{usage['trainable_parameters']:,}" if usage.get("trainable_parameters") else None,
        "devices": f"{usage['devices']} × {usage['device']}" if "device" in usage and "devices" in usage else None,
        "tokens a second": f"{usage['tokens_per_second']:,.0f}" if "tokens_per_second" in usage else None,
        "peak memory": size_of(usage["peak_bytes"]) if usage.get("peak_bytes") else None,
        "MFU": f"{usage['mfu']:.1%}" if usage.get("mfu") else None,
    }
    rows = [(name, value) for name, value in known.items() if value]
    return f"## Cost\n\n{table(('', ''), rows)}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _shown(value: Any) -> Any:
    """The value; a place on this machine as its last part, since the rest is nobody else's business."""
    if isinstance(value, list | tuple):
        return [_shown(one) for one in value]
    if isinstance(value, str) and (value.startswith("~") or pathlib.Path(value).is_absolute()):
        return pathlib.Path(value).name
    return value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
