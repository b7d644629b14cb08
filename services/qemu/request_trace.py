"""Notes in the trace what becomes of the requests of one queue of a device."""

from __future__ import annotations

import time

from protocol.trace import RequestMoved, RequestStep
from services.runtime.cause import CAUSE
from services.runtime.tracer import Tracer


class RequestTrace:
    """Who notes looks at `tracer.on` first. `device` is its name for the operator."""

    __slots__ = ("_device", "_lpid", "_queue", "tracer")

    def __init__(self, tracer: Tracer, lpid: int, device: str, queue: int) -> None:
        self.tracer = tracer
        self._lpid, self._device, self._queue = lpid, device, queue

    def moved(self, step: RequestStep, head: int, n_bytes: int) -> None:
        """Request `head` begins, or has ended."""
        of = (self._lpid, self._device, self._queue)
        self.tracer.request_moved(RequestMoved(time.monotonic_ns(), *of, head, step, n_bytes, CAUSE.get()))
