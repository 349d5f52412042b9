"""`jlora serve`: the model and its adapters behind OpenAI's API."""

import argparse
import os
from pathlib import Path

from jlora import allocator, lora
from jlora.cli.model import load_model, print_note
from jlora.cli.parsers.serve import KEY
from jlora.errors import Failed, UserError, number_of
from jlora.lora import Bank
from jlora.serve import Engine, Limits
from jlora.serve.folder import Folder, Signature, bank, opened, subfolders
from jlora.types import Params, require

WATCHED = 1.0  # seconds between two looks at the folder of adapters


def run(options: argparse.Namespace) -> int:
    """Runs the command until a signal ends it, and returns 0; mistakes and failures raise."""
    require("starlette", "serve"), require("uvicorn", "serve"), require("prometheus_client", "serve")
    from jlora.serve import app, server

    keys = tuple(options.api_key or filter(None, [os.environ.get(KEY)]))
    if not all(keys):
        raise UserError("--api_key: found an empty text, expected a key")
    limits = Limits(options.rows, options.length, options.queue, options.chunk)
    name = options.name or Path(options.model.rstrip("/")).name.removesuffix(".gguf")
    body = int(options.body_mib * (1 << 20))
    # Before the model is loaded: that takes long, and the port may be taken.
    with server.listen(options.host, options.port) as at:
        allocator.keep_freed_pages()
        model, params, tokenizer = load_model(options)
        params, done = _with_adapters(params, options, name)
        engine = Engine(model, params, tokenizer, limits, note=print_note)
        engine.start()
        folder = _folder(options, engine, name, done)
        print(f"{_told(name, engine, options)}: {_address(options.host, at.getsockname()[1])}", flush=True)
        application = app.application(app.Service(engine, tokenizer, name, folder, keys, body))
        server.run(application, at, engine, drain=options.drain)
    if folder:
        folder.stop()
    if engine.failure:
        raise Failed(f"the engine failed: {type(engine.failure).__name__}: {engine.failure}")
    return 0


def _told(name: str, engine: Engine, options: argparse.Namespace) -> str:
    return f"{name} and {number_of(len(engine.adapters), 'adapter')}" if options.adapters else name


def _address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _with_adapters(
    params: Params, options: argparse.Namespace, name: str
) -> tuple[Params | Bank, dict[str, Signature]]:
    """The params, or a bank with the adapters of the folder, and `done` of that folder."""
    if options.adapters is None:
        of_adapters = ("places", "rank", "modules", "adapters_dtype")
        if given := [f"--{one}" for one in of_adapters if getattr(options, one) is not None]:
            raise UserError(f"{', '.join(given)}: expected --adapters with it")
        return params, {}
    there = subfolders(Path(options.adapters))  # before they are read: what changes meanwhile is read again
    adapters = opened(params, Path(options.adapters), options.model, taken=(name,), note=print_note)
    modules = options.modules.split(",") if options.modules else "all-linear"
    wanted = options.rank or options.modules
    config = lora.LoraConfig(r=options.rank or 16, target_modules=modules) if wanted else None
    dtype = options.adapters_dtype or "float32"
    held = bank(params, adapters, places=options.places or 32, config=config, dtype=dtype)
    waits = adapters.keys() - set(held.names)
    return held, {name: signature for name, signature in there.items() if name not in waits}


def _folder(options: argparse.Namespace, engine: Engine, name: str, done: dict[str, Signature]) -> Folder | None:
    if options.adapters is None:
        return None
    folder = Folder(Path(options.adapters), engine, source=options.model, taken=(name,), note=print_note, done=done)
    folder.watch(WATCHED)
    return folder
