"""A run on two hosts, here two processes of four devices each: what one process with all devices gives."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora.train import resolve, run
from jlora.train.reporting.metrics import read_metrics

HOST = """
import json, sys
import jax
jax.config.update("jax_cpu_enable_async_dispatch", False)  # CPUs run programs side by side, whose collectives mix
number, port, workdir, settings = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
from jlora.train import Interrupted, resolve, run
try:
    run(resolve(settings), workdir, stop=lambda: number == 1)  # a signal that reaches one of them
except Interrupted:
    pass
jax.experimental.multihost_utils.sync_global_devices("paused")
run(resolve(settings), workdir)
"""


def on_two_hosts(settings, workdir):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", HOST]
    hosts = [
        subprocess.Popen([*command, str(number), str(port), str(workdir), json.dumps(settings)], env=environment)
        for number in range(2)
    ]
    try:
        assert [host.wait(timeout=400) for host in hosts] == [0, 0]
    finally:
        for host in hosts:
            host.kill()


@pytest.mark.slow
def test_two_hosts_give_what_one_gives_and_stop_together(model_folder, tmp_path):
    records = [{"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}."} for i in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = str(tmp_path / "train.jsonl")
    settings = {
        "model": {"path": model_folder, "dtype": "float32"},
        "data": {"path": path, "eval_path": path},
        "lora": {"r": 4, "use_dora": True, "target_modules": "all-linear", "modules_to_save": ["norm"]},
        "optim": {"learning_rate": 1e-3},
        "train": {"steps": 4, "batch_size": 8, "seq_len": 64, "save_every": 2, "eval_every": 2},
        "mesh": {"fsdp": -1},
    }
    run(resolve(settings), tmp_path / "one")
    on_two_hosts(settings, tmp_path / "two")
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [record["step"] for record in two] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm"):
        assert [record[name] for record in two] == pytest.approx([record[name] for record in one], rel=1e-4)
    assert two[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=1e-4)
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(second[name], first[name], atol=1e-4, err_msg=name)
