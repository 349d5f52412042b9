"""`python -m jlora` runs `jlora`."""

import sys

from jlora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
