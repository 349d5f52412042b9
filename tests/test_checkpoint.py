"""Checkpoints: exact, pruned, and refused when they belong to something else."""

import errno
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jlora import checkpoint, quant, sharding
from jlora.errors import Failed

FIXED = {"layers@0-1": {"q_proj": {"lora_scale": jnp.ones(2)}}}
STATE = {"a": jnp.arange(6.0).reshape(2, 3), "step": jnp.int32(3)}


def test_round_trip_newest_kept_and_other_bases_refused(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path / "c", keep=2, manifest={"base": "x", "lora": {"r": 4}}, fixed=FIXED)
    assert saved.latest is None
    for step in (1, 2, 3):
        saved.save(step, {**STATE, "step": jnp.int32(step)}, {"next": step})
    saved.close()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2", "3"]

    again = checkpoint.Checkpoints(tmp_path / "c", keep=2, manifest={"base": "x", "lora": {"r": 4}}, fixed=FIXED)
    state, data = again.restore(jax.tree.map(jnp.zeros_like, STATE))
    again.close()
    assert data == {"next": 3}
    jax.tree.map(np.testing.assert_array_equal, state, STATE)
    found = checkpoint.newest_fixed(tmp_path / "c")
    jax.tree.map(np.testing.assert_array_equal, found, FIXED)
    assert checkpoint.newest_fixed(tmp_path / "nothing") == {}

    other = checkpoint.Checkpoints(tmp_path / "c", keep=2, manifest={"base": "y", "lora": {"r": 8}}, fixed=FIXED)
    with pytest.raises(ValueError) as error:
        other.restore(STATE)
    other.close()
    assert "base: the run has 'x', given 'y'" in str(error.value) and "lora.r: the run has 4, given 8" in str(
        error.value
    )


def test_every_difference_is_a_line():
    found = {"base": "x", "lora": {"r": 4, "gone": 1}, "same": [1]}
    expected = {"base": "x", "lora": {"r": 8, "new": None, "more": 2}, "same": [1], "seed": 3}
    assert checkpoint.compare(found, expected) == [
        "lora.gone: the run has 1, given None",
        "lora.more: the run has None, given 2",
        "lora.r: the run has 4, given 8",
        "seed: the run has None, given 3",
    ]
    assert not checkpoint.compare(found, found)


def test_what_another_version_wrote_is_refused(tmp_path):
    with ocp.CheckpointManager(tmp_path) as old:
        held = {"state": ocp.args.StandardSave(STATE), "manifest": ocp.args.JsonSave({"base": "x"})}
        old.save(1, args=ocp.args.Composite(**held))
    saved = checkpoint.Checkpoints(tmp_path, keep=2, manifest={"base": "x"}, fixed=FIXED)
    with pytest.raises(ValueError, match=r"written by another version of jlora \(format 1, expected 2\)"):
        saved.restore(STATE)
    saved.close()
    with pytest.raises(ValueError, match="another version of jlora"):
        checkpoint.newest_fixed(tmp_path)


def test_fingerprints_see_every_bit_and_no_sharding():
    params = {"q_proj": {"kernel": quant.quantize(jnp.ones((512, 32)))}, "norm": {"scale": jnp.arange(8.0)}}
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    assert checkpoint.fingerprint(params) == checkpoint.fingerprint(sharding.shard(params, mesh))
    swapped = {**params, "norm": {"scale": params["norm"]["scale"].at[jnp.array([1, 2])].set(jnp.array([2.0, 1.0]))}}
    flipped = {**params, "norm": {"scale": jnp.nextafter(params["norm"]["scale"], 9.0)}}
    renamed = {"k_proj": params["q_proj"], "norm": params["norm"]}
    prints = {checkpoint.fingerprint(p) for p in (params, swapped, flipped, renamed)}
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.ENOSPC, "With room on the disk"), (errno.EACCES, "Once that is fixed")]
)
def test_what_failed_in_the_background_is_raised_by_check_and_the_older_checkpoint_stays(
    tmp_path, monkeypatch, code, advice
):
    saved = checkpoint.Checkpoints(tmp_path / "c", keep=1, manifest={"base": "x"}, fixed=FIXED)
    saved.save(1, STATE, {})
    assert saved.kept() == [1]

    def full(self):
        if threading.current_thread() is not threading.main_thread():
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", full)
    saved.save(2, STATE, {})
    with pytest.raises(Failed, match=f"{os.strerror(code)}; that of step .*{advice}"):
        for _ in range(100):
            saved.check()
            time.sleep(0.05)
    monkeypatch.undo()
    saved.close()
    assert (tmp_path / "c" / "1").is_dir()


def test_checking_leaves_the_error_to_the_thread_that_removes_older_checkpoints(tmp_path, monkeypatch):
    saved = checkpoint.Checkpoints(tmp_path / "c", keep=1, manifest={"base": "x"}, fixed=FIXED)
    taken = []
    monkeypatch.setattr(ocp.AsyncCheckpointer, "check_for_errors", lambda self: taken.append(1))
    saved.check()
    assert not taken
    saved.close()
