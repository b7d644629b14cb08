"""What the monitor tells its clients unasked, and the hub that brings it to every session.

Source: QEMU `qapi/run-state.json` (events) and `docs/interop/qmp-spec.rst`, "Asynchronous events".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

import msgspec

from services.qemu.qmp.schema import ShutdownCause

Deliver = Callable[[bytes], None]


class Event(msgspec.Struct, frozen=True):
    """Base of the events: the fields are the event's data."""

    name: ClassVar[str]


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


class MonitorEvents:
    """Brings each event to every session that listens. Never waits and never fails: a session that does not keep
    up ends itself."""

    def __init__(self, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._now_ns = now_ns
        self._listeners: list[Deliver] = []

    def emit(self, event: Event) -> None:
        """Tell all sessions now. To be called in the trio thread."""
        if not self._listeners:
            return
        line = encode_event(event, self._now_ns())
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
