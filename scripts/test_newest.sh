#!/usr/bin/env bash
# What scripts/test.sh does, on the newest JAX, which needs a newer Python (3.12) than jlora does: in .venv-newest.
set -euo pipefail
VENV=.venv-newest PYTHON=${PYTHON:-python3.12} exec bash "$(dirname "${BASH_SOURCE[0]}")/test.sh" "$@"
