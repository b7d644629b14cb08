"""The frame for devices beside the disk, of whatever kind: found, started, and called when they interrupt.

A device that breaks its rules, or does not answer within ANSWER_LIMIT_NS, is given up by name; the kernel goes on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from services.guest.model.cpu import Clock, NoDevice, Step
from services.guest.model.state import DmaPath, ExtraDevice
from services.guest.model.virtqueue import ANSWER_LIMIT_NS, QueueError


class ExtraDriver(ABC):
    """A driver over `state`; `name` is what the console calls its device."""

    name: str

    def __init__(self, clock: Clock, state: ExtraDevice) -> None:
        self._clock = clock
        self.state = state

    @property
    @abstractmethod
    def irq(self) -> int:
        """The interrupt source of the device; 0 when it has none."""

    @property
    @abstractmethod
    def path(self) -> DmaPath:
        """How buffers reach the device."""

    @property
    @abstractmethod
    def liobn(self) -> int:
        """The DMA window that its buffers are mapped through when `path` says that they are."""

    @abstractmethod
    def find(self) -> Step[None]:
        """Take a function of this kind and set `state.present`, where there is one; raises NoDevice."""

    @abstractmethod
    def bring_up(self) -> Step[None]:
        """Make the device ready for requests, with an interrupt; raises NoDevice with the reason."""

    @abstractmethod
    def interrupted(self) -> Step[None]:
        """The device has something to say."""

    @abstractmethod
    def quiesce(self) -> Step[None]:
        """Stop the device, so that it touches no memory any more, and be no longer ready."""

    def start(self) -> Step[None]:
        """As `bring_up`, and ready after it."""
        state = self.state
        state.ready, state.error, state.calls, state.submitted_ns = False, "", False, 0
        yield from self.bring_up()
        self.state.ready = True

    def work(self) -> Step[None] | None:
        """What is to do without an interrupt, in one step; None when there is nothing."""
        return None

    def rest(self) -> Step[None] | None:
        """The kernel is about to idle: `work`, and None once an interrupt tells of the next."""
        return self.work()

    def deadline_ns(self) -> int | None:
        """When the device is `overdue`, as what it was asked counts as unanswered; None while nothing is."""
        state = self.state
        return state.submitted_ns + ANSWER_LIMIT_NS if state.ready and state.submitted_ns else None

    def attend(self) -> Step[None]:
        """Look at a device that `calls`; Busy leaves it calling."""
        yield from self.interrupted()
        self.state.calls = False

    def overdue(self) -> Step[None]:
        """The limit is over: an interrupt may have been lost, so look before giving up."""
        yield from self.interrupted()
        deadline_ns = self.deadline_ns()
        if deadline_ns is not None and self._clock.now_ns() >= deadline_ns:
            self.give_up(QueueError.NO_ANSWER.value)

    def guarded(self, step: Step[None]) -> Step[None]:
        """Run a step that uses the device; one that is gone is given up."""
        try:
            yield from step
        except NoDevice as error:
            self.give_up(str(error))

    def give_up(self, reason: str) -> None:
        """No more of this device; its memory stays taken, since it may still write to it."""
        state = self.state
        state.ready, state.error, state.calls, state.submitted_ns = False, reason, False, 0
