"""Saves a benchmark's figures as JSON in benchmarks/results, with their device, versions and commit."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess

import jax

RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "peft", "bitsandbytes", "libtpu", "jax-cuda13-plugin")


def save(name: str, figures: dict, *, device: str | None = None, path: pathlib.Path | None = None) -> pathlib.Path:
    """Writes results/<name>.json, or the file at `path`, and returns its path.

    Args:
        device: the device's kind, for a process that must not initialise the device to ask.
    """
    if device is None:
        device = jax.devices()[0].device_kind
    content = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": f"{_cpu_name()}, {os.cpu_count()} cores" if device == "cpu" else device,
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
        "figures": figures,
    }
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def commit() -> str:
    """The commit that is checked out, followed by "+changes" if files differ from it."""
    return _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    extras = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return (names[0] if names else platform.processor()) + (f" ({', '.join(extras)})" if extras else "")
