#!/usr/bin/env python3
"""`jlora train` as a script, to start on every host of a TPU VM slice.

python scripts/train.py --config=sft --workdir=DIR --distributed ...
"""

import sys

from jlora.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
