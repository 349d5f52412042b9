"""Results on the Hub: a folder of nothing but the files that belong there and a model card, and its upload."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from jlora.errors import ExistingFileError, Failed, MissingFileError, UserError, describe_faults
from jlora.hub.adapters import check_adapter
from jlora.hub.cards import FILE as CARD
from jlora.hub.cards import hub_id, is_as_written, is_own
from jlora.hub.checkpoints.beside import PROCESSOR
from jlora.hub.checkpoints.folder import refuse_inputs, replacing
from jlora.hub.checkpoints.source import open_source
from jlora.hub.checkpoints.weights import INDEX, SINGLE, read_json
from jlora.hub.checkpoints.writing import TOKENIZER
from jlora.hub.peft.config import CONFIG
from jlora.hub.peft.reading import WEIGHTS

Kind = Literal["adapter", "model"]
CURVES = "curves.png"
MARKER: dict[Kind, str] = {"adapter": CONFIG, "model": "config.json"}
WEIGHT_FILES: dict[Kind, tuple[str, ...]] = {
    "adapter": (WEIGHTS,),
    "model": (SINGLE, "model-*-of-*.safetensors", INDEX, "generation_config.json"),
}
# Fields that name where a model was on the machine that wrote the file.
PLACES = ("base_model_name_or_path", "_name_or_path")


def kind_of(folder: str | Path) -> Kind | None:
    """What the folder holds; None if it is neither."""
    kinds: tuple[Kind, ...] = ("adapter", "model")
    return next(
        (kind for kind in kinds if all((Path(folder) / name).is_file() for name in _needed(folder, kind))), None
    )


def result_files(folder: str | Path, kind: Kind) -> tuple[list[Path], list[str]]:
    """(the files and folders of the result, the names of all others, which are not for others to see).

    Raises:
        UserError: the folder does not hold such a result, or not all of it.
    """
    folder = Path(folder).expanduser()
    if missing := [name for name in _needed(folder, kind) if not (folder / name).is_file()]:
        raise MissingFileError(f"{folder} holds no {kind} to publish: it has no {' and no '.join(missing)}")
    if kind == "adapter":
        check_adapter(folder)
    else:
        open_source(folder)  # the weights are complete
    patterns = (MARKER[kind], *WEIGHT_FILES[kind], *TOKENIZER, *PROCESSOR)
    found = sorted(path for path in folder.iterdir() if any(path.match(pattern) for pattern in patterns))
    others = sorted(path.name for path in folder.iterdir() if path not in found and path.name not in (CARD, CURVES))
    return found, others


def stage(
    source: str | Path,
    out: str | Path,
    kind: Kind,
    card: str,
    *,
    base: str | None = None,
    curves: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder for the Hub, complete or not at all: the result's own files, the card and the curves.

    Args:
        base: the Hub id of the base, which the adapter's config then names; where that names a place on this machine,
            it is left out.
        overwrite: also replace a folder that jlora did not make for the Hub, or a card that was changed since.

    Raises:
        UserError: the source is incomplete or is `out` itself.
        FileExistsError: `out` holds something else.
    """
    found, _ = result_files(source, kind)
    refuse_inputs(out, {f"the {kind}": source})
    if not overwrite and not _is_staged(Path(out).expanduser()):
        raise ExistingFileError(
            f"{out} holds something that was not written by jlora, so it is left alone; choose another folder, or say "
            "--force"
        )
    if not overwrite and not is_as_written(out):
        raise ExistingFileError(
            f"{Path(out) / CARD} was changed since jlora wrote it, so it is left alone; choose another folder, or say "
            "--force (--out with --repo alone uploads the folder as it is)"
        )
    own = (MARKER[kind], *WEIGHT_FILES[kind], *TOKENIZER, *PROCESSOR, CARD, CURVES)
    with replacing(out, marker=MARKER[kind], stale=own) as folder:
        for path in found:
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            elif path.name == MARKER[kind]:
                _write_json(folder / path.name, _public(read_json(path), base))
            else:
                shutil.copyfile(path, folder / path.name)
        (folder / CARD).write_text(card, encoding="utf-8")
        if curves is not None:
            shutil.copyfile(curves, folder / CURVES)


def upload(
    folder: str | Path, repo: str, *, private: bool | None = None, revision: str | None = None, message: str = ""
) -> str:
    """The address of the commit that has the folder's files in the repository, which is made if there is none.

    Only a folder of `stage` is uploaded: one with a card and no file that is not part of a result.

    Raises:
        UserError: the folder holds anything else, the repository's name is malformed, or there is no token.
        Failed: the Hub refused, or could not be reached.
    """
    require_repo(repo)
    folder = Path(folder).expanduser()
    kind = kind_of(folder) if folder.is_dir() else None
    if kind is None or not is_own(folder) or not _is_public(read_json(folder / MARKER[kind])):
        raise UserError(
            f"{folder} is no folder that `jlora publish --out` wrote, or its settings name places on this machine: "
            "give --adapter or --model too"
        )
    files, others = result_files(folder, kind)
    if others:
        raise UserError(describe_faults(f"{folder}: not uploaded, these are no part of the {kind}; remove", others))
    patterns = [f"{path.name}/*" if path.is_dir() else path.name for path in files]
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=message or f"{kind.capitalize()} from jlora",
            allow_patterns=[*patterns, CARD, CURVES],
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise Failed(
            f"{repo}: the Hub did not take {folder}: {error}. The folder is complete; upload it again"
        ) from error
    return str(commit.commit_url)


def require_repo(repo: str) -> None:
    """Raises UserError unless `repo` can be the name of a repository on the Hub, and there is a token to write with."""
    require_name("--repo", repo)
    if "/" not in repo:
        raise UserError(f"--repo={repo}: expected OWNER/NAME of the Hub, found no OWNER")
    if huggingface_hub.get_token() is None:
        raise UserError("there is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN")


def require_name(option: str, name: str) -> None:
    """Raises UserError unless `name` can be that of a repository on the Hub; `option` says where it was given."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{option}={name}: expected OWNER/NAME of the Hub: {error}") from error


def _needed(folder: str | Path, kind: Kind) -> tuple[str, ...]:
    if kind == "adapter":
        return CONFIG, WEIGHTS
    return "config.json", INDEX if (Path(folder).expanduser() / INDEX).is_file() else SINGLE


def _is_staged(out: Path) -> bool:
    """Whether `out` is not there, is empty, or was written by jlora."""
    if not out.is_dir() or not any(out.iterdir()):
        return not out.exists() or out.is_dir()
    return is_own(out)


def _public(config: dict[str, Any], base: str | None) -> dict[str, Any]:
    """The settings without places on this machine."""

    def named(name: str) -> str | None:
        return base or hub_id(config[name])

    return config | {name: named(name) for name in PLACES if isinstance(config.get(name), str)}


def _is_public(config: dict[str, Any]) -> bool:
    """Whether the settings name no place on this machine."""
    return config == _public(config, None)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
