"""What `jlora plan` takes."""

import argparse

from jlora.cli.parsers.options import add_config_option, add_sweep_option, command, suggest
from jlora.devices import DEVICES
from jlora.names import COMPILERS


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora plan`."""
    extras = ", ".join(f"jlora[{extra}]" for extra in COMPILERS)
    parser = command(
        "plan",
        usage="jlora plan --config=RECIPE [--config.GROUP.KEY=VALUE ...] --topology=DEVICES [--max_seq_len] [--json]",
        description="What a run needs, before any weight is read: parameters, the peak memory of a device by XLA's own "
        "compiler, FLOPs, and what moves between devices. The model's config.json is enough; no data is read, "
        "and every row is assumed to be full.",
        epilog=f"Compilers come with {extras}; without one the memory is an estimate.",
    )
    add_config_option(parser)
    topology = parser.add_argument(
        "--topology",
        required=True,
        metavar="DEVICES",
        help=f"one of {', '.join(DEVICES)}; several as v5e:2x4, v5p:2x2x1, h100x8, cpu:4",
    )
    suggest(topology, tuple(DEVICES))
    add_sweep_option(parser)
    parser.add_argument(
        "--max_seq_len", action="store_true", help="search the longest train.seq_len that fits (a few compilations)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
