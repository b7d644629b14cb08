"""JSON lines of a process. Bytes are never written: they could be a guest's (S1)."""

from __future__ import annotations

import io
import os
from collections.abc import MutableMapping
from typing import Any, TextIO

from services.runtime.absent_module import absent_module

# It would load rich for a renderer of tracebacks that no service uses: a fifth of what a service takes to start.
with absent_module("rich"):
    import structlog

Log = structlog.typing.FilteringBoundLogger


def open_log(fd: int, target: str) -> Log:
    """A logger that writes JSON lines about `target` to descriptor `fd`."""
    return log_to(io.TextIOWrapper(io.FileIO(os.dup(fd), "a"), write_through=True, errors="backslashreplace"), target)


def log_to(stream: TextIO, target: str) -> Log:
    """A logger that writes JSON lines about `target`."""
    log: Log = structlog.wrap_logger(
        structlog.WriteLogger(stream),
        processors=[
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


def _redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if isinstance(value, (bytes, bytearray, memoryview)):
            event[key] = f"<{len(value)} bytes>"
    return event
