#!/usr/bin/env bash
# Teaches SmolLM2-135M to call functions with QLoRA, on whatever this machine has: CPU, NVIDIA GPU or TPU.
# Makes .venv, installs jlora there, and leaves an adapter in runs/quickstart.
#
#   scripts/quickstart.sh [--accelerator=cpu|cuda12|cuda13|tpu] [options of scripts/quickstart.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The jax extra for the devices found here.
detect_accelerator() {
  local version device
  if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'; then
    version=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' | head -n 1)
    if [[ -n $version && $version -ge 13 ]]; then echo cuda13; else echo cuda12; fi
    return
  fi
  for device in /dev/accel[0-9]*; do
    if [[ -e $device ]]; then echo tpu; return; fi
  done
  # Newer TPU VMs show their chips through vfio, as other machines do with other devices: 0x1ae0 is Google.
  for device in /dev/vfio/[0-9]*; do
    if [[ -e $device ]] && grep -qsx 0x1ae0 /sys/bus/pci/devices/*/vendor; then echo tpu; return; fi
  done
  echo cpu
}

accelerator=""
arguments=()
for argument in "$@"; do
  case $argument in
    --accelerator=*) accelerator=${argument#*=} ;;
    *) arguments+=("$argument") ;;
  esac
done
accelerator=${accelerator:-$(detect_accelerator)}
case $accelerator in
  cpu) extras=quickstart ;;
  cuda12 | cuda13 | tpu) extras=quickstart,$accelerator ;;
  *)
    echo "--accelerator=$accelerator is not one of cpu, cuda12, cuda13, tpu" >&2
    exit 2
    ;;
esac

if [[ ! -x .venv/bin/python ]]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "jlora needs Python 3.11 or newer; set PYTHON=python3.12 (for example) to choose one." >&2
    exit 2
  }
  echo "Making .venv"
  "${PYTHON:-python3}" -m venv .venv
fi
echo "Installing jlora for $accelerator into .venv (the first time takes minutes)"
.venv/bin/python -m pip install --quiet --editable ".[$extras]"

exec .venv/bin/python scripts/quickstart.py ${arguments[@]+"${arguments[@]}"}
