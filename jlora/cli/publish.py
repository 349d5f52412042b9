"""`jlora publish`: a result as a folder for the Hub, with a model card made of its run, and its upload."""

import argparse
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

from jlora.cli.model import print_note
from jlora.errors import MissingFileError, UserError
from jlora.hub import cards, publishing
from jlora.hub.checkpoints.weights import read_json
from jlora.train.many import FOLDER
from jlora.train.reporting import story
from jlora.train.reporting.compare import Run, read_runs
from jlora.train.reporting.metrics import CURVES
from jlora.train.reporting.metrics import FILE as METRICS
from jlora.train.restore import read_config
from jlora.train.results import MODEL

LICENSE_ID = r"[a-z0-9][a-z0-9.+-]*"


class Result(NamedTuple):
    """What is published: a folder, what it holds, and the run that it came from, if that is known."""

    folder: pathlib.Path
    kind: publishing.Kind
    run: Run | None


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns 0; mistakes and failures raise."""
    _require(options)
    if options.repo:
        publishing.require_repo(options.repo)
    if options.base:
        publishing.require_name("--base", options.base)
    if options.license and not re.fullmatch(LICENSE_ID, options.license):
        raise UserError(f"--license={options.license}: expected an id of the Hub's, as apache-2.0, mit or other")
    result = _result(options)
    with tempfile.TemporaryDirectory() as unnamed:
        out = pathlib.Path(options.out or pathlib.Path(unnamed) / "out")
        if result is not None:
            _stage(result, out, options)
            if options.out:
                print(f"{result.kind} with its card: {out}")
        if options.repo:
            address = publishing.upload(out, options.repo, private=options.private or None, revision=options.revision)
            print(f"uploaded: {address}")
    return 0


def _require(options: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    if options.adapter and options.model:
        raise UserError("--adapter and --model: publish one of them, and the other by another command")
    if not (options.out or options.repo):
        raise UserError("--out and --repo: give one of them, the folder to write or the repository to upload to")
    if not (options.adapter or options.model or options.workdir or (options.out and options.repo)):
        raise UserError(
            "give what to publish: --adapter, --model or --workdir; or --out and --repo, to upload a folder"
        )
    if not options.repo and (options.private or options.revision):
        raise UserError("--private and --revision are of the upload: they need --repo")


def _result(options: argparse.Namespace) -> Result | None:
    """What to publish; None if it is in --out already."""
    given = options.adapter or options.model
    if given is None and options.workdir is None:
        return None
    folder = pathlib.Path(given or options.workdir).expanduser()
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder; expected the folder of an adapter, a model or a run")
    if _is_run(folder) or given is None:
        folder = _left_by(folder)
    workdir = pathlib.Path(options.workdir).expanduser() if options.workdir else _run_around(folder)
    kind = "adapter" if options.adapter else "model" if options.model else publishing.kind_of(folder)
    if kind is None:
        raise MissingFileError(f"{folder} holds no adapter and no model")
    _, left_out = publishing.result_files(folder, kind)
    if left_out:
        print_note(f"{folder}: left out, as no part of the {kind}: {', '.join(left_out)}")
    return Result(folder, kind, _read_run(workdir, folder.name) if workdir else None)


def _is_run(folder: pathlib.Path) -> bool:
    return (folder / METRICS).is_file() and (folder / "config.json").is_file()


def _run_around(folder: pathlib.Path) -> pathlib.Path | None:
    """The workdir that the folder is the result of, by where it is."""
    place = folder.resolve()
    workdir = place.parent.parent if place.parent.name == FOLDER else place.parent
    is_result = place.parent.name == FOLDER or place.name in ("adapter", MODEL)
    return workdir if is_result and _is_run(workdir) else None


def _left_by(workdir: pathlib.Path) -> pathlib.Path:
    """The folder of the run's result."""
    config = read_config(workdir)
    if config.adapters:
        names = ",".join(config.adapters)
        raise UserError(f"{workdir} is a run of several adapters: give one, --adapter={workdir / FOLDER}/{{{names}}}")
    left = workdir / (MODEL if config.lora is None else "adapter")
    if not left.is_dir():
        raise MissingFileError(
            f"{workdir} has not finished: there is no {left.name}/ in it yet. Finish the run, or write a checkpoint "
            f"with `jlora export --workdir={workdir} --out=DIR` and publish that folder"
        )
    return left


def _read_run(workdir: pathlib.Path, name: str) -> Run:
    runs = read_runs(workdir, workdir.name)
    return next((one for one in runs if pathlib.PurePath(one.name).name == name), runs[0])


def _stage(result: Result, out: pathlib.Path, options: argparse.Namespace) -> None:
    """Writes the folder for the Hub and says what its card could not tell."""
    config = read_json(result.folder / publishing.MARKER[result.kind])
    header = cards.header_of(result.folder)
    places = _places(result, config, header)
    bases = [options.base] if options.base else [name for place in places if (name := cards.hub_id(place))]
    if len(bases) < max(1, len(places)) and not options.base:
        found = f"{', '.join(places)}, which is not a name on the Hub" if places else "not known"
        print_note(f"base: {found}, so the card names no base: --base=OWNER/NAME does")
        bases = []
    license = {"license": options.license} if options.license else {}
    for place in (*places, *bases):
        license = license or cards.license_of(place)
    if not license:
        print_note("licence of the base: not known, so the card names none: --license=ID does")
    curves = result.run.workdir / CURVES if result.run else None
    curves = curves if curves is not None and curves.is_file() else None
    card = _card(result, config, header, bases, license, options, curves=curves is not None)
    base = bases[0] if len(bases) == 1 else None
    publishing.stage(result.folder, out, result.kind, str(card), base=base, curves=curves, overwrite=options.force)


def _places(result: Result, config: dict[str, Any], header: dict[str, Any]) -> list[str]:
    """Where the result's bases are, as the run or the folder says: Hub ids, and places on this machine."""
    if result.run is not None:
        return [result.run.settings["model.path"]]
    said = header.get("base_model") or config.get("base_model_name_or_path") or []
    return [said] if isinstance(said, str) else list(map(str, said))


def _card(
    result: Result,
    config: dict[str, Any],
    header: dict[str, Any],
    bases: list[str],
    license: dict[str, str],
    options: argparse.Namespace,
    *,
    curves: bool,
) -> cards.Card:
    """The card of the result; what no run tells, that of the folder itself does."""
    is_adapter, run = result.kind == "adapter", result.run
    name = pathlib.Path(options.repo or options.out).resolve().name
    base = bases[0] if len(bases) == 1 else "path/to/the/base"
    scored = "SEQ_CLS" in str(config.get("task_type")) or "SequenceClassification" in str(config.get("architectures"))
    where = options.repo or "path/to/this/folder"
    tuned = _how_made(result, config, bases)
    return cards.Card(
        title=name,
        library="peft" if is_adapter else "transformers",
        bases=bases,
        relation="adapter" if is_adapter else header.get("base_model_relation") or _relation(config),
        task="text-classification" if scored else "text-generation",
        license=license,
        datasets=story.datasets(run) if run else [],
        tags=_tags(result, config, header),
        sections=[
            tuned,
            cards.how_to_use(result.kind, base, where, scored=scored),
            *(story.sections(run, curves=curves) if run else filter(None, [cards.how_made(result.folder)])),
            story.versions(),
        ],
    )


def _how_made(result: Result, config: dict[str, Any], bases: list[str]) -> str:
    """The card's first sentence."""
    of = ", ".join(f"[{base}](https://huggingface.co/{base})" for base in bases)
    by = f"{'trained' if result.run else 'written'} with jlora."
    if result.kind == "model":
        return f"A model made from {of}, {by}" if of else f"A model {by}"
    kind = str(config.get("peft_type", "LORA")).replace("LORA", "LoRA")
    rank = f" of rank {config['r']}" if "r" in config else ""
    return f"{kind} adapter{rank}{f' for {of}' if of else ''}, {by}"


def _relation(config: dict[str, Any]) -> str:
    return "quantized" if "quantization_config" in config else "finetune"


def _tags(result: Result, config: dict[str, Any], header: dict[str, Any]) -> list[str]:
    if result.kind == "adapter":
        dora = ["dora"] if config.get("use_dora") else []
        return [str(config.get("peft_type", "LORA")).lower(), *dora]
    with_adapter = "lora" in (header.get("tags") or ()) or (result.run is not None and "lora.r" in result.run.settings)
    return ["lora"] if with_adapter else []
