"""Finds the system's Chromium; run as a script, says in one sentence what to install where there is none."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ON_A_MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
MISSING = (
    "There is no Chromium: install it (Debian: apt-get install -y chromium; Fedora: dnf install chromium; as root) or "
    "Chrome, or name one by DSPY_MLFLOW_ASYNC_CHROMIUM, and run this again."
)


def find_chromium() -> str | None:
    """Return the path of the system's browser: Playwright's own cannot be downloaded everywhere."""
    said = os.environ.get("DSPY_MLFLOW_ASYNC_CHROMIUM")
    found = shutil.which(said) if said else next(filter(None, map(shutil.which, NAMES)), None)
    return found or (str(ON_A_MAC) if not said and ON_A_MAC.exists() else None)


if __name__ == "__main__" and find_chromium() is None:
    sys.exit(MISSING)
