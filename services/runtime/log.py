"""JSON lines of a process. Bytes are never written: they could be a guest's (S1)."""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from time import monotonic
from typing import Any

from services.runtime.absent_module import absent_module
from services.runtime.line_limit import LineLimit

# It would load rich for a renderer of tracebacks that no service uses: a fifth of what a service takes to start.
with absent_module("rich"):
    import structlog

Log = structlog.typing.FilteringBoundLogger
Processor = structlog.typing.Processor


class _LineFile:
    """Lines at the end of a file. What a full disk does not take is lost: nobody ends for want of a log."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._is_cut = False

    def msg(self, line: str) -> None:
        """Write a line, and before it end one that was not written whole."""
        data = f"{line}\n".encode(errors="backslashreplace")
        if self._is_cut:
            data = b"\n" + data
        try:
            self._is_cut = os.write(self._fd, data) < len(data)
        except OSError:
            return

    debug = info = warning = error = critical = msg


def open_service_log(fd: int, target: str) -> Log:
    """As `open_log`, for a service.

    Most of its lines are caused by peers (S5): of each event of a VM or link only as many are written as `LineLimit`
    admits.
    """
    return open_log(fd, target, Limiter(monotonic))


def open_log(fd: int, target: str, *first: Processor) -> Log:
    """A logger that writes JSON lines about `target` to a duplicate of descriptor `fd`.

    `first` may drop or change them.
    """
    log: Log = structlog.wrap_logger(
        _LineFile(os.dup(fd)),
        processors=[
            *first,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _redact,
            structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        cache_logger_on_first_use=True,
        process=target,
    )
    return log


class Limiter:
    """Drops what is above the allowance; the next line of the kind says how many."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._limit = LineLimit(now)

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        left_out = self._limit.admit(f"{event.get('vm', '')} {event.get('link', '')}", event["event"])
        if left_out is None:
            raise structlog.DropEvent
        if left_out:
            event["left_out_before"] = left_out
        return event


def _redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if isinstance(value, (bytes, bytearray, memoryview)):
            event[key] = f"<{len(value)} bytes>"
    return event
