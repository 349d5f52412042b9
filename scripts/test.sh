#!/usr/bin/env bash
# Lint, format check and tests, in a virtual environment at $VENV (.venv) that is made on the first run.
# Arguments go to pytest: `scripts/test.sh tests/lora -x`, `scripts/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
python=$venv/bin/python
installed=$venv/installed-from-pyproject.toml

if [[ ! -x $python ]]; then
  echo "Making $venv"
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "jlora needs Python 3.11 or newer; set PYTHON=python3.12 (for example) to choose one." >&2
    exit 2
  }
  "${PYTHON:-python3}" -m venv "$venv"
fi

if ! cmp --silent pyproject.toml "$installed"; then
  echo "Installing jlora and its test packages into $venv"
  # By its exact pin and before anything that depends on it: otherwise pip may choose another build of torch.
  "$python" -m pip install --quiet torch==2.13.0
  "$python" -m pip install --quiet --editable '.[test]'
  cp pyproject.toml "$installed"
fi

"$python" -m ruff check .
"$python" -m ruff format --check .
# One process a core, but not more than memory allows; -n 0 after it runs all in this one.
# A file's tests stay in one process, which compiles once what they share.
exec "$python" -m pytest -n auto --maxprocesses=8 --dist loadfile "$@"
