"""Imports of a process that lives long, without the garbage collector, which finds nothing in them.

It runs again and again while hundreds of modules are made, for a tenth of the time that they take. What they made is
there until the process ends, so no later collection looks at it either.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Nothing is collected meanwhile, and what exists at the end never is."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
