"""Checkpoints of a run through Orbax.

They hold the training state, the adapters' fixed leaves, the position in the data, and the base that they belong to.
"""

import dataclasses
import errno
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora import tree
from jlora.errors import Failed, UserError, is_of_the_system
from jlora.types import Params

# The version of the checkpoint format; a checkpoint of another version is refused.
VERSION = 2
# The operating system's messages for a full disk and an exhausted quota.
FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))


Pinned = Callable[[Sequence[int]], Collection[int]]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Which checkpoints Orbax keeps, as its PreservationPolicy: the newest, and those that are pinned."""

    newest: int
    pinned: Pinned

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether each checkpoint is kept; they have a `step`, and are in its order."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.newest :], *self.pinned(steps)}
        return [step in kept for step in steps]


class Checkpoints:
    """The newest `keep` checkpoints of a run, under `folder`/<step>/, written in the background.

    Args:
        pinned: (steps of the checkpoints, newest last) → those that are kept besides the newest `keep`.
        manifest: what a checkpoint belongs to (base weights, settings, data). `restore` refuses a checkpoint whose
            manifest differs, except in the entries named in `refused_before`.
        refused_before: names of manifest entries that the caller has compared already.
        fixed: the adapters' leaves that training does not change. Some follow from the base (what PiSSA takes out of
            it, DoRA's lengths), and recomputed on other devices they would differ in their last bits.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        keep: int,
        manifest: dict[str, Any],
        fixed: Params,
        refused_before: Collection[str] = (),
        pinned: Pinned = lambda steps: (),
    ) -> None:
        self._folder, self._manifest = folder, {"version": VERSION} | json.loads(json.dumps(manifest))
        self._refused_before = refused_before
        self._fixed = fixed
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(keep, pinned), create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def kept(self) -> list[int]:
        """The steps of all complete checkpoints, newest last; waits for the one being written."""
        with self._writing():
            self._manager.wait_until_finished()
        return sorted(self._manager.all_steps())

    def check(self) -> None:
        """Raises Failed if a background write failed; does not wait for one that is still in progress.

        Only Orbax's own thread may consume the checkpointer's error: otherwise that thread would delete an older
        checkpoint in favour of one that was never completed.
        """
        if jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            with self._writing():
                self._manager.wait_until_finished()  # raises that thread's error

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Starts writing a checkpoint; the arrays are copied before this returns.

        Raises:
            Failed: this checkpoint or the previous one cannot be written, for example because the disk is full.
        """
        if self.latest == step:
            return
        # Orbax writes no empty tree: full fine-tuning has no adapter.
        fixed = {"fixed": ocp.args.StandardSave(self._fixed)} if self._fixed else {}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            **fixed,
            data=ocp.args.JsonSave(data),
            manifest=ocp.args.JsonSave(self._manifest),
        )
        with self._writing():
            self._manager.save(step, args=args)

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """(state, data position) of the checkpoint of `step`; None: of the newest.

        Args:
            state: a state with the structure, shapes and shardings to restore to; its values are ignored.

        Raises:
            ValueError: the checkpoint belongs to another base or other settings (every difference is listed), or was
                written by another version of jlora.
        """
        step = self.latest if step is None else step
        found = read_manifest(self._manager, step)
        # Manifests written by older versions lack some entries; those cannot be compared.
        names = (found.keys() & self._manifest.keys()) - set(self._refused_before)
        if differences := compare(*({name: of[name] for name in names} for of in (found, self._manifest))):
            raise UserError(f"{self._folder / str(step)} belongs to another run:\n  " + "\n  ".join(differences))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored.state, restored.data

    def close(self) -> None:
        """Waits until everything is written; raises Failed if something could not be."""
        with self._writing():
            self._manager.wait_until_finished()
        self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the operating system's errors, some of which TensorStore wraps in its own, into Failed."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if not is_of_the_system(error):
                raise
            reasons = (
                [error.strerror or str(error)]
                if isinstance(error, OSError)
                else re.findall(r": ([^:]+) \[os_error", str(error)) or [str(error)]
            )
            room = "With room on the disk, " if any(full in reasons[0] for full in FULL) else "Once that is fixed, "
            kept = max(ocp.utils.checkpoint_steps(self._folder), default=None)
            after = "nothing was saved before" if kept is None else f"that of step {kept} is complete"
            raise Failed(
                f"a checkpoint could not be written to {self._folder}: {reasons[0]}; {after}. "
                f"{room}the same command resumes from there"
            ) from error


def reader(folder: pathlib.Path) -> ocp.CheckpointManager:
    """The checkpoints in a folder, read-only; the caller closes the manager."""
    return ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(read_only=True))


def read_manifest(saved: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The manifest of a checkpoint: what it belongs to.

    Raises:
        ValueError: the checkpoint was written by another version of jlora.
    """
    found = saved.restore(step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore())).manifest
    if found.get("version") != VERSION:
        raise UserError(
            f"{saved.directory / str(step)} was written by another version of jlora (format {found.get('version', 1)}, "
            f"expected {VERSION}): resume with that version, or start a new run in another workdir"
        )
    return found


def read_fixed(saved: ocp.CheckpointManager, step: int) -> Params:
    """The `fixed` leaves (see `Checkpoints`) of a checkpoint, as host arrays, whatever devices they were saved from.

    {} if the run trains no adapter.
    """
    folder = saved.directory / str(step) / "fixed"
    if not folder.exists():
        return {}
    held = dict(ocp.PyTreeCheckpointHandler().metadata(folder))
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), held)
    args = ocp.args.Composite(fixed=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return saved.restore(step, args=args).fixed


def newest_fixed(folder: pathlib.Path) -> Params:
    """`read_fixed` of the newest checkpoint in the folder; {} if there is none."""
    return newest(folder)[2]


def newest(folder: pathlib.Path) -> tuple[int | None, dict[str, Any], Params]:
    """(step, manifest, `read_fixed`) of the newest checkpoint in the folder; (None, {}, {}) if there is none.

    Raises:
        ValueError: the checkpoint was written by another version of jlora.
    """
    if not folder.is_dir():
        return None, {}, {}
    with reader(folder) as saved:
        step = saved.latest_step()
        if step is None:
            return None, {}, {}
        return step, read_manifest(saved, step), read_fixed(saved, step)


def compare(found: dict[str, Any], expected: dict[str, Any], path: str = "") -> list[str]:
    """One line for every value that differs between two nested dicts."""
    differences = []
    for name in sorted(found.keys() | expected.keys()):
        there, here = found.get(name), expected.get(name)
        where = f"{path}.{name}".lstrip(".")
        if isinstance(there, dict) and isinstance(here, dict):
            differences += compare(there, here, where)
        elif there != here:
            differences.append(f"{where}: the run has {there!r}, given {here!r}")
    return differences


def fingerprint(params: Params) -> str:
    """Eight hex digits that depend on every bit, shape and path of a tree, and not on its sharding."""
    digest = jax.jit(tree.digest)
    digests = {path: digest(leaf) for path, leaf in tree.flatten(params).items()}
    lines = [f"{path} {leaf.shape} {[int(d) for d in digests[path]]}" for path, leaf in tree.flatten(params).items()]
    return f"{zlib.crc32(chr(10).join(lines).encode()):08x}"
