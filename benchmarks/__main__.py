"""Runs the suite: ``python -m benchmarks``."""

import sys

from benchmarks.cli import main

if __name__ == "__main__":  # the processes that are measured import this module too
    sys.exit(main())
