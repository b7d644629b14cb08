"""A process collects no garbage while it loads, and afterwards only its own."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

from shared.quick_imports import quick_imports

_LATER = """
import gc
from shared.quick_imports import quick_imports
with quick_imports():
    assert not gc.isenabled()
    kept = [[number] for number in range(1000)]
assert gc.isenabled()
n_frozen = gc.get_freeze_count()
assert n_frozen > 1000
with quick_imports():
    more = [[number] for number in range(1000)]
assert gc.get_freeze_count() > n_frozen + 1000 - 10
print(len(gc.get_objects()))
"""


def test_what_was_made_meanwhile_is_looked_at_no_more() -> None:
    done = subprocess.run([sys.executable, "-c", _LATER], capture_output=True, text=True, check=False)

    assert done.stderr == ""
    assert int(done.stdout) < 500


def test_garbage_of_later_is_collected() -> None:
    class Node:
        def __init__(self) -> None:
            self.itself = self

    try:
        with quick_imports():
            pass
        node = Node()
        seen = weakref.ref(node)
        del node
        gc.collect()
        assert seen() is None
    finally:
        gc.unfreeze()


def test_a_failed_import_leaves_the_collector_on() -> None:
    try:
        with quick_imports():
            raise ImportError
    except ImportError:
        pass
    finally:
        gc.unfreeze()
    assert gc.isenabled()
