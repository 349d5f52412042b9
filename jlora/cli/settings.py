"""What `jlora train --help` says of the settings of a run."""

import dataclasses
import textwrap
import typing
from collections.abc import Iterator

from jlora.train.config import RunConfig
from jlora.train.config.typed import describe, group_of, is_required


def described() -> str:
    """One entry for every setting."""
    return "settings and their defaults:\n\n" + "\n".join(_settings(RunConfig))


def _settings(cls: type, path: str = "") -> Iterator[str]:
    """One entry for every setting: its path, type and default."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if group := group_of(field, hint):
            yield from _settings(group, f"{path}{field.name}.")
            if group is not hint:
                yield f"  --config.{path + field.name:<26} None: without"
            continue
        made = field.default_factory is not dataclasses.MISSING
        default = (
            "required" if is_required(field) else f"default {field.default_factory() if made else field.default!r}"
        )
        line = f"  --config.{path + field.name:<26} {describe(hint)}; {default}"
        yield textwrap.fill(line, width=120, subsequent_indent=" " * 38, break_on_hyphens=False)
