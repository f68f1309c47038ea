"""`python -m bench` measures the ops."""

import sys

from .run import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
