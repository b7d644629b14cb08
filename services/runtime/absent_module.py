"""Importing a library without a module that it uses only when it is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def absent_module(name: str) -> Iterator[None]:
    """Meanwhile an import of `name` fails, unless it was imported before."""
    if name in sys.modules:
        yield
        return
    # What the import system does with this value is documented: ModuleNotFoundError.
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
