"""The loading of the model that a command works on, and what else the options of several commands stand for."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

from jlora import data, hub, lora, quant
from jlora.cli.parsers.options import MESH
from jlora.ends import end_ids
from jlora.errors import UserError
from jlora.models import Model
from jlora.sharding import MeshConfig, make_mesh
from jlora.train.config import TrainConfig
from jlora.types import Params


def require_out(options: argparse.Namespace, inputs: Mapping[str, str | Path | None]) -> None:
    """Checks, before any work, that writing --out replaces no input and nothing that jlora did not write.

    Args:
        inputs: of `hub.refuse_inputs`.

    Raises:
        UserError: it would; nothing was touched.
    """
    hub.refuse_inputs(options.out, inputs)
    if not options.force:
        hub.require_own(options.out)


def adapter_layout(options: argparse.Namespace, train: TrainConfig | None = None) -> dict[str, Any]:
    """What --fold, --experts and --force say to `hub.save_adapter`; what they leave out, a run's settings do."""
    return {
        "fold": options.fold or (train is not None and train.fold),
        "experts": options.experts or (train.experts if train else "stacked"),
        "force": options.force,
    }


def refuse_layout(options: argparse.Namespace, what: str) -> None:
    """Raises UserError if --fold or --experts is given; `what` says what they are for."""
    if given := [f"--{name}" for name in ("fold", "experts") if getattr(options, name)]:
        raise UserError(f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for {what}")


def say_adapter(path: str, *, gguf: bool = False) -> None:
    """Prints where an adapter was written, and what readers of one rank and one scale would read differently."""
    print(f"adapter ({'GGUF' if gguf else 'PEFT'}): {path}")
    if not gguf and (note := hub.scales_note(path)):
        print(f"note: {note}")


def require_gguf(options: argparse.Namespace, *, adapter: bool) -> None:
    """Checks, before any work, what --gguf, --modelfile and --system ask for.

    Raises:
        UserError: it cannot be written.
    """
    if options.system is not None and not options.modelfile:
        raise UserError("--system is for the Modelfile: give --modelfile too")
    if options.modelfile and not options.gguf:
        raise UserError("--modelfile is for a GGUF file: give --gguf too")
    if options.gguf:
        hub.require_gguf(options.out, options.gguf, adapter=adapter)
    if options.modelfile:
        hub.require_modelfile(options.out, options.system, force=options.force)


def write_modelfile(options: argparse.Namespace, model: Model, base: str, tokenizer: Any, *, adapter: bool) -> None:
    """Writes what --modelfile asks for beside --out, and prints where and how Ollama takes it.

    Args:
        base: where the model came from.
        tokenizer: the one whose tokens end an answer.
    """
    ends = end_ids(tokenizer, model.config.eos_token_ids, model.config.vocab_size)
    path = hub.save_modelfile(
        options.out,
        base,
        stops=[tokenizer.decode([end]) for end in ends],
        adapter=adapter,
        system=options.system,
        force=options.force,
    )
    print(f"Modelfile: {path} (ollama create {Path(options.out).stem} -f {path})")


@contextlib.contextmanager
def tensor_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; call what it yields with the tensors written so far and their total."""
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task("tensors", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def open_model(source: str, *, quiet: bool = False, **settings: Any) -> tuple[Model, Params]:
    """What `hub.load` returns; unless `quiet`, a note says what the weights are kept in.

    Args:
        settings: of `hub.load`.
    """
    model, params = hub.load(source, **settings)
    if not quiet:
        say_kept(source, params)
    return model, params


def load_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_base_options` says to `hub.load`.

    Raises:
        UserError: the devices that are there cannot form the mesh.
    """
    sizes = {name.removeprefix("mesh."): vars(options)[name] for name in MESH}
    mesh = make_mesh(MeshConfig(**sizes))
    return dict(dtype=options.dtype, quant=options.quant, vocab=options.vocab, mesh=mesh if mesh.size > 1 else None)


def say_kept(source: str, params: Params) -> None:
    """Prints, to standard error, what the base's weights are kept in, if any are packed or those of experts."""
    if kinds := quant.kept_in(lora.strip(params)):
        print_note(f"{source}: {kinds}")


def load_model(options: argparse.Namespace) -> tuple[Model, Params, Any]:
    """The model, its params with the adapter applied, and the tokenizer, fitted to the model.

    A note says what the weights are kept in, but not with --json. Of several adapters none is applied; a command need
    not have the option.
    """
    options = argparse.Namespace(**{"adapter": None} | vars(options))
    model, params = open_model(options.model, quiet=getattr(options, "json", False), **load_settings(options))
    if isinstance(options.adapter, str):
        params = hub.load_adapter(params, options.adapter, options.model)
    tokenizer = data.fitted(_tokenizer(options), model.config.vocab_size)
    if options.fold_system:
        data.fold_system(tokenizer)
    return model, params, tokenizer


def _tokenizer(options: argparse.Namespace) -> Any:
    """The tokenizer of the model or of its one adapter; those of several adapters are reported as unused."""
    adapters = {options.adapter} if isinstance(options.adapter, str) else set(options.adapter or ())
    if len(adapters) == 1:
        return hub.load_tokenizer(options.model, adapters.pop() or None)
    tokenizer = hub.load_tokenizer(options.model)
    for adapter in sorted(adapters - {""}):
        hub.say_unused_tokenizer(tokenizer, adapter)
    return tokenizer


def read_records(options: argparse.Namespace) -> list[data.Record] | None:
    """The records of --data that can be read, subject to --on_error; None if the option is not given."""
    return data.read_records(options.data, on_error=options.on_error, note=print_note) if options.data else None


def encodable(
    options: argparse.Namespace, records: list[data.Record] | None, tokenizer: Any, rows: int
) -> list[data.Record] | None:
    """Those of the records that can also be encoded, for a model whose embedding has `rows` rows."""
    if records is None:
        return None
    return data.encodable(records, data.fitted(tokenizer, rows), on_error=options.on_error, note=print_note)


def print_note(message: str) -> None:
    """Prints a note to standard error, apart from the command's results."""
    print(message, file=sys.stderr)
