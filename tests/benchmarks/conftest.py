"""Makes ``benchmarks`` importable: a folder of the repository, not a part of the wheel that is tested."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
