"""What the monitor tells its clients unasked, and the hub that brings it to every session.

Source: QEMU `qapi/run-state.json`, `qapi/machine.json` (events), `monitor/monitor.c` (how often) and
`docs/interop/qmp-spec.rst`, "Asynchronous events".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import msgspec
import trio

from services.qemu.qmp.schema import ShutdownCause

Deliver = Callable[[bytes], None]


class Event(msgspec.Struct, frozen=True):
    """Base of the events: the fields are the event's data."""

    name: ClassVar[str]
    period_seconds: ClassVar[float] = 0.0
    """It is told once in so many seconds at most; of several the latest."""


class Stopped(Event, frozen=True):
    """The processor stands still."""

    name: ClassVar[str] = "STOP"


class Resumed(Event, frozen=True):
    """The processor runs again."""

    name: ClassVar[str] = "RESUME"


class _Caused(Event, frozen=True):
    """Events that say who did it."""

    guest: bool
    reason: ShutdownCause


class Reset(_Caused, frozen=True):
    """The machine was reset; `Reset.by(cause)`."""

    name: ClassVar[str] = "RESET"

    @classmethod
    def by(cls, cause: ShutdownCause) -> Reset:
        """The event of this cause."""
        return cls(cause.by_guest, cause)


class Shutdown(_Caused, frozen=True):
    """The machine ends; `Shutdown.by(cause)`."""

    name: ClassVar[str] = "SHUTDOWN"

    @classmethod
    def by(cls, cause: ShutdownCause) -> Shutdown:
        """The event of this cause."""
        return cls(cause.by_guest, cause)


class BalloonChange(Event, frozen=True):
    """The guest has another amount of memory: `actual` bytes."""

    name: ClassVar[str] = "BALLOON_CHANGE"
    period_seconds: ClassVar[float] = 1.0
    actual: int


@dataclass(slots=True)
class _Pause:
    """An event of limited rate was told; until `end_s` the next one waits in `line`, then a new pause begins."""

    period_seconds: float
    end_s: float
    line: bytes | None = None


class MonitorEvents:
    """Brings each event to every session that listens. Never waits and never fails: a session that does not keep
    up ends itself. What is held back for its rate is told by `run`."""

    def __init__(self, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._now_ns = now_ns
        self._listeners: list[Deliver] = []
        self._pauses: dict[str, _Pause] = {}
        self._held_back = trio.Event()

    def emit(self, event: Event) -> None:
        """Tell all sessions, now unless the event was told too recently. To be called in the trio thread."""
        if not self._listeners:
            return
        line = encode_event(event, self._now_ns())
        if event.period_seconds and self._is_early(event, line):
            return
        self._tell(line)

    async def run(self) -> None:
        """Tell what was held back as its time comes, until cancelled."""
        while True:
            await self._held_back.wait()
            self._held_back = trio.Event()
            while waiting := [(pause.end_s, name) for name, pause in self._pauses.items() if pause.line is not None]:
                end_s, name = min(waiting)
                await trio.sleep_until(end_s)
                self._end_pause(name)

    def _is_early(self, event: Event, line: bytes) -> bool:
        """Whether the event must wait; it is kept then, in the place of an earlier one."""
        now_s = trio.current_time()
        pause = self._pauses.get(event.name)
        if pause is None or (pause.line is None and pause.end_s <= now_s):
            self._pauses[event.name] = _Pause(event.period_seconds, now_s + event.period_seconds)
            return False
        pause.line = line
        self._held_back.set()
        return True

    def _end_pause(self, name: str) -> None:
        """Tell what waits; the next one waits again."""
        pause = self._pauses[name]
        line, pause.line = pause.line, None
        pause.end_s = trio.current_time() + pause.period_seconds
        if line is not None:
            self._tell(line)

    def _tell(self, line: bytes) -> None:
        for deliver in tuple(self._listeners):
            deliver(line)

    def subscribe(self, deliver: Deliver) -> None:
        """Call `deliver` with the line of every event from now on."""
        self._listeners.append(deliver)

    def unsubscribe(self, deliver: Deliver) -> None:
        """No more."""
        self._listeners.remove(deliver)


def encode_event(event: Event, now_ns: int) -> bytes:
    """The line of an event that happened at `now_ns` (nanoseconds since 1970)."""
    seconds, rest_ns = divmod(now_ns, 1_000_000_000)
    message: dict[str, object] = {
        "timestamp": {"seconds": seconds, "microseconds": rest_ns // 1000},
        "event": event.name,
    }
    if event.__struct_fields__:
        message["data"] = event
    return msgspec.json.encode(message) + b"\r\n"
