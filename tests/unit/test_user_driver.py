"""What a process makes of the device that it drives by itself."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TypeVar

from services.guest.model.cpu import Step
from services.guest.model.state import Queue
from services.guest.model.user_driver import QUEUE_SIZE, UserDriver
from services.guest.model.virtio_pci import Transport
from tests.unit.model_cpu import make_cpu

RING = 0x100
N_BYTES = 512
T = TypeVar("T")


class Registers(Transport):
    """Those of a device that gives up, after `last_deed`, while they are read."""

    def __init__(self, last_deed: Callable[[], None]) -> None:
        self._last_deed = last_deed

    def queue_size(self, index: int) -> Step[int]:
        yield from ()
        return QUEUE_SIZE

    def enable_queue(self, queue: Queue, vector: int) -> Step[None]:
        yield from ()

    def start(self) -> Step[None]:
        yield from ()

    def kick(self, queue: Queue) -> Step[None]:
        yield from ()

    def needs_reset(self) -> Step[bool]:
        yield from ()
        self._last_deed()
        return True


def run(step: Step[T]) -> T:
    try:
        next(step)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("the step waits")


class Process:
    """A process with one request open, at a device of which `last_deed` is the last."""

    def __init__(self, last_deed: Callable[[Process], None]) -> None:
        self.cpu = make_cpu()
        self.queue = Queue()
        self.driver = UserDriver(self.cpu, Registers(lambda: last_deed(self)), self.queue)
        run(self.driver.start(RING))
        run(self.driver.ask(0x1000, N_BYTES))

    def use(self) -> None:
        (head,) = self.queue.chains
        self.cpu.store(self.queue.used, struct.pack("<HHII", 0, 1, head, N_BYTES))


def test_what_a_device_used_just_before_it_gave_up_counts() -> None:
    """Else a ring that it spoiled at the end is never looked at, and nobody learns of it."""
    process = Process(Process.use)
    assert run(process.driver.answer()) == N_BYTES


def test_a_device_that_gave_up_and_used_nothing() -> None:
    process = Process(lambda process: None)
    assert run(process.driver.answer()) == -1
