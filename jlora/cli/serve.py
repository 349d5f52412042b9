"""`jlora serve`: the model and its adapters behind OpenAI's API."""

import argparse
import os
from pathlib import Path
from typing import Any

from jlora import allocator, lora
from jlora.cli.model import add_base_options, command, load_model, positive, print_note
from jlora.errors import Failed, UserError
from jlora.serve import Engine, Limits
from jlora.serve.folder import Folder, bank, opened
from jlora.types import Params, require

KEY = "JLORA_API_KEY"
WATCHED = 1.0  # seconds between two looks at the folder of adapters


def run(arguments: list[str]) -> int:
    """Runs the command until a signal ends it, and returns 0; mistakes and failures raise."""
    options = _parser().parse_args(arguments)
    require("starlette", "serve"), require("uvicorn", "serve"), require("prometheus_client", "serve")
    from jlora.serve import app, server

    keys = tuple(options.api_key or filter(None, [os.environ.get(KEY)]))
    if not all(keys):
        raise UserError("--api_key: found an empty text, expected a key")
    limits = Limits(options.rows, options.length, options.queue, options.chunk)
    name = options.name or Path(options.model.rstrip("/")).name
    body = int(options.body_mib * (1 << 20))
    # Before the model is loaded: that takes long, and the port may be taken.
    with server.listen(options.host, options.port) as at:
        allocator.keep_freed_pages()
        model, params, tokenizer = load_model(options)
        engine = Engine(model, _with_adapters(params, options, name), tokenizer, limits)
        engine.start()
        folder = _folder(options, engine, name)
        print(f"{_told(name, engine, options)}: {_address(options.host, at.getsockname()[1])}", flush=True)
        application = app.application(app.Service(engine, tokenizer, name, folder, keys, body))
        server.run(application, at, drain=options.drain, leaving=engine.close)
    if folder:
        folder.stop()
    engine.stop(drain=False)
    if engine.failure:
        raise Failed(f"the engine failed: {engine.failure}")
    return 0


def _told(name: str, engine: Engine, options: argparse.Namespace) -> str:
    count = len(engine.adapters)
    return f"{name} and {count} adapter{'' if count == 1 else 's'}" if options.adapters else name


def _address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _with_adapters(params: Params, options: argparse.Namespace, name: str) -> Any:
    """The params, or a bank with the adapters of the folder."""
    if options.adapters is None:
        if given := [f"--{one}" for one in ("places", "rank", "modules") if getattr(options, one) is not None]:
            raise UserError(f"{', '.join(given)}: expected --adapters with it")
        return params
    adapters = opened(params, Path(options.adapters), options.model, taken=(name,), note=print_note)
    modules = options.modules.split(",") if options.modules else "all-linear"
    wanted = options.rank or options.modules
    config = lora.LoraConfig(r=options.rank or 16, target_modules=modules) if wanted else None
    return bank(params, adapters, places=options.places or 32, config=config, note=print_note)


def _folder(options: argparse.Namespace, engine: Engine, name: str) -> Folder | None:
    if options.adapters is None:
        return None
    folder = Folder(Path(options.adapters), engine, source=options.model, taken=(name,), note=print_note)
    folder.watch(WATCHED)
    return folder


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"found {number}, expected 0 to 65535")
    return number


def _megabytes(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1024:
        raise argparse.ArgumentTypeError(f"found {number}, expected more than 0, at most 1024")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = command("serve", "Answer requests to OpenAI's API, with every adapter of a folder as a model.")
    add_base_options(parser)
    parser.add_argument("--name", help="the base's name as a model (default: the last part of --model)")
    parser.add_argument(
        "--adapters", metavar="DIR", help="a folder: each PEFT folder in it is a model, as it comes, changes and goes"
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: this machine alone)")
    parser.add_argument("--port", type=_port, default=8000, help="default: 8000; 0: any that is free")
    parser.add_argument(
        "--api_key",
        action="append",
        metavar="KEY",
        help=f"a key that requests must have; may be repeated (default: that of the variable {KEY}, if it is set)",
    )
    parser.add_argument("--rows", type=positive, default=16, help="requests that run at a time (default: 16)")
    parser.add_argument("--queue", type=int, default=256, help="requests that may wait (default: 256)")
    parser.add_argument(
        "--length", type=positive, help="the most tokens of a prompt with its answer (default: the model's, up to 8192)"
    )
    parser.add_argument(
        "--chunk", type=positive, default=128, help="the most tokens of a prompt between two steps (default: 128)"
    )
    parser.add_argument("--body_mib", type=_megabytes, default=4.0, help="the largest request (default: 4)")
    parser.add_argument("--places", type=positive, help="adapters to make room for (default: 32)")
    parser.add_argument(
        "--rank", type=positive, help="the rank to make room for (default: that of the adapters that are there, or 16)"
    )
    parser.add_argument(
        "--modules", metavar="NAMES", help="the linears to make room at (default: those of the adapters, or all)"
    )
    parser.add_argument(
        "--drain", type=positive, default=60, metavar="SECONDS", help="for answers after SIGTERM (default: 60)"
    )
    return parser
