"""A processor with machine code under its owner's debugger, which works from another thread as the real one does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from services.guest.debugger import User
from services.runtime.gdb.target import Point, Stop
from tests.unit.machine_rig import ENTRY
from tests.unit.power_asm import program
from tests.unit.test_processor_migration import Rig

SECONDS = 5.0


class Owner:
    """The guest owner's debugger, as its target uses the processor from another thread."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.debugger = rig.processor.debugger
        self.stops: queue.SimpleQueue[Stop] = queue.SimpleQueue()

    def do(self, work: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Run `work` in the processor's thread; what it gives or raises."""
        done = threading.Event()
        results: list[Any] = []

        def run() -> None:
            try:
                results.append(work())
            except Exception as error:
                results.append(error)
            done.set()

        self.rig.processor.post(run)
        assert done.wait(SECONDS)
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    def attach(self) -> Stop:
        def take() -> None:
            self.debugger.take(User.OWNER, self.stops.put)
            self.debugger.halt(User.OWNER)

        self.do(take)
        return self.stopped()

    def stopped(self) -> Stop:
        return self.stops.get(timeout=SECONDS)

    def go(self, *, step: bool = False) -> None:
        self.do(lambda: self.debugger.go(User.OWNER, step=step))

    def step(self) -> Stop:
        self.go(step=True)
        return self.stopped()

    def register(self, name: str) -> int:
        values = self.do(self.debugger.values).values
        value = values[self.debugger.description.number[name]]
        assert isinstance(value, int)
        return value

    def points(self, *points: Point) -> None:
        self.do(lambda: self.debugger.set_points(User.OWNER, frozenset(points)))

    def release(self) -> None:
        self.do(lambda: self.debugger.release(User.OWNER))


def put(rig: Rig, *words: int) -> None:
    """Have the processor run `words` once it is started."""
    code = program(*words)
    rig.memory.normal[ENTRY : ENTRY + len(code)] = code
