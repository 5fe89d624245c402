"""Tries what may go wrong on the way of a trace, and shows for each case where every trace is."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parent.parent
# Stores, proxies and databases that the tests of the export have; programs of the cases are started without pytest.
sys.path += [path for path in (str(_TESTS), str(_TESTS / "export")) if path not in sys.path]
