"""Where every trio task of a process stands."""

from __future__ import annotations

import linecache
from collections.abc import Iterator

import trio

from services.runtime.debugging.sources import short_name

MAX_TASKS = 500
_HOW_TRIO_WAITS = "trio."


def task_lines(root: trio.lowlevel.Task) -> Iterator[str]:
    """The tree of tasks below `root`, each with its stack, outermost first."""
    n_left = MAX_TASKS
    waiting = [(root, 0)]
    while waiting and n_left:
        task, depth = waiting.pop()
        n_left -= 1
        yield from _lines_of(task, "  " * depth)
        children = [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        waiting += [(child, depth + 1) for child in sorted(children, key=lambda child: child.name, reverse=True)]
    if waiting:
        yield f"... and {len(waiting)} more with what is below them"


def _lines_of(task: trio.lowlevel.Task, indent: str) -> Iterator[str]:
    yield f"{indent}task {task.name}"
    for frame, number in task.iter_await_frames():
        if str(frame.f_globals.get("__name__")).startswith(_HOW_TRIO_WAITS):
            continue
        file = frame.f_code.co_filename
        source = linecache.getline(file, number, frame.f_globals).strip()
        yield f"{indent}    {short_name(file)}:{number} {frame.f_code.co_name}: {source}"
