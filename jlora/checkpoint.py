"""Checkpoints of a run through Orbax: what training changes, where the data stands, and what base it belongs to."""

import json
import pathlib
import zlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from jlora import tree
from jlora.types import Params


class Checkpoints:
    """The newest `keep` checkpoints of a run, under `folder`/<step>/. Writing goes on in the background.

    Args:
        manifest: what a checkpoint belongs to (base weights, settings); one that differs is refused when restoring.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int, manifest: dict[str, Any]) -> None:
        self._folder, self._manifest = folder, json.loads(json.dumps(manifest))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Starts writing a checkpoint; the arrays are copied before this returns."""
        if self.latest == step:
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            manifest=ocp.args.JsonSave(self._manifest),
        )
        self._manager.save(step, args=args)

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """(state, data position) of the newest checkpoint.

        Args:
            state: a state of the wanted structure, shapes and shardings; its values are not looked at.

        Raises:
            ValueError: the checkpoint belongs to another base or other settings; every difference is listed.
        """
        step = self.latest
        found = self._manager.restore(step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore())).manifest
        if differences := compare(found, self._manifest):
            raise ValueError(f"{self._folder / str(step)} belongs to another run:\n  " + "\n  ".join(differences))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored.state, restored.data

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def compare(found: dict[str, Any], expected: dict[str, Any], path: str = "") -> list[str]:
    """A line for every value that differs between two nested dicts."""
    differences = []
    for name in sorted(found.keys() | expected.keys()):
        there, here = found.get(name), expected.get(name)
        where = f"{path}.{name}".lstrip(".")
        if isinstance(there, dict) and isinstance(here, dict):
            differences += compare(there, here, where)
        elif there != here:
            differences.append(f"{where}: found {there!r}, expected {here!r}")
    return differences


def fingerprint(params: Params) -> str:
    """Eight hex digits that follow from every bit, shape and path of a tree, however it is sharded."""
    digest = jax.jit(tree.digest)
    digests = {path: digest(leaf) for path, leaf in tree.flatten(params).items()}
    lines = [f"{path} {leaf.shape} {[int(d) for d in digests[path]]}" for path, leaf in tree.flatten(params).items()]
    return f"{zlib.crc32(chr(10).join(lines).encode()):08x}"
