"""Where fetched and converted models, and the digests of their files, are kept between starts."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """~/.cache/tandem, or below XDG_CACHE_HOME when that is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"
