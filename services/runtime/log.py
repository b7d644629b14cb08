"""JSON lines of a process. Bytes are never written: they could be a guest's (S1)."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, MutableMapping
from time import monotonic
from typing import Any, TextIO

from services.runtime.absent_module import absent_module
from services.runtime.line_limit import LineLimit

# It would load rich for a renderer of tracebacks that no service uses: a fifth of what a service takes to start.
with absent_module("rich"):
    import structlog

Log = structlog.typing.FilteringBoundLogger
Processor = structlog.typing.Processor


def open_log(fd: int, target: str) -> Log:
    """The logger of a service: it writes JSON lines about `target` to descriptor `fd`.

    Most lines are caused by peers (S5): of each event of a VM or link no more are written than `LineLimit` admits.
    """
    stream = io.TextIOWrapper(io.FileIO(os.dup(fd), "a"), write_through=True, errors="backslashreplace")
    return log_to(stream, target, Limiter(monotonic))


def log_to(stream: TextIO, target: str, *first: Processor) -> Log:
    """A logger that writes JSON lines about `target`; `first` may drop or change them."""
    log: Log = structlog.wrap_logger(
        structlog.WriteLogger(stream),
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
