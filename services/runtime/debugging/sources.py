"""Source lines for whoever shows them in a confined process, which may open no file (Landlock)."""

from __future__ import annotations

import linecache
import sys
import tokenize
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
_LIBRARIES = ("trio", "outcome")


def load_sources() -> None:
    """Keep the source of every loaded module of pefbox and of the libraries that its tasks stand in."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and file.endswith(".py") and _is_wanted(name, file):
            _keep(file)


def short_name(file: str) -> str:
    """A source file as people name it: from the root of pefbox, or of the library."""
    path = Path(file)
    if path.is_relative_to(_ROOT) and "site-packages" not in path.parts:
        return str(path.relative_to(_ROOT))
    return "/".join(path.parts[-2:])


def _is_wanted(name: str, file: str) -> bool:
    return name.partition(".")[0] in _LIBRARIES or (file.startswith(f"{_ROOT}/") and "site-packages" not in file)


def _keep(file: str) -> None:
    try:
        with tokenize.open(file) as source:
            lines = source.readlines()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return
    # Without a time of change it is never compared with the file, which would not be found.
    linecache.cache[file] = (sum(map(len, lines)), None, lines, file)
