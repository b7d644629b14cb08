"""Notes in the trace which interrupts were raised and which the guest took, and keeps on whose behalf each came.

A guest takes an interrupt by a call of its own, H_XIRR, which says nothing of what raised it; so the cause of the last
raising of each source is kept. It is no state of the machine: nothing depends on it.
"""

from __future__ import annotations

from protocol.trace import InterruptStep
from services.kvm.xics import MAX_SOURCES
from services.runtime.tracer import Tracer

_SOURCE_MASK = 0x00FFFFFF


class InterruptTrace:
    """Of one VM; costs nothing but a comparison while nobody records."""

    def __init__(self, lpid: int, tracer: Tracer) -> None:
        self._lpid = lpid
        self._tracer = tracer
        self._causes: dict[int, int] = {}

    def raised(self, source: int, cause: int) -> None:
        """`source` came up."""
        if not self._tracer.on:
            return
        if source in self._causes or len(self._causes) < MAX_SOURCES:
            self._causes[source] = cause
        self._tracer.interrupt_moved(self._lpid, source, InterruptStep.RAISED, cause)

    def accepted(self, result: list[int]) -> None:
        """What H_XIRR gave; without an interrupt it is none."""
        if not self._tracer.on or len(result) < 2 or not result[1] & _SOURCE_MASK:
            return
        source = result[1] & _SOURCE_MASK
        self._tracer.interrupt_moved(self._lpid, source, InterruptStep.ACCEPTED, self._causes.pop(source, 0))
