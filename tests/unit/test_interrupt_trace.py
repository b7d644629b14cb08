"""Interrupts keep the cause of what raised them, until the guest takes them."""

from __future__ import annotations

from pathlib import Path

from deploy.trace.events import EventKind
from services.kvm.interrupt_trace import InterruptTrace
from services.kvm.xics import MAX_SOURCES
from services.runtime.tracer import UNTRACED
from tests.unit.trace_rig import LPID, Recording, events_of

XIRR = 0xFF001300


def moves(path: Path) -> list[tuple[str, int]]:
    return [(event.text, event.cause) for event in events_of(path) if event.kind is EventKind.INTERRUPT]


def test_an_accepted_interrupt_has_the_cause_of_its_last_raising(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "alpha/kvm")
    trace = InterruptTrace(LPID, recording.tracer)

    trace.raised(0x1300, 5)
    trace.raised(0x1300, 6)
    trace.accepted([0, XIRR])
    trace.accepted([0, XIRR])

    assert moves(recording.close()) == [
        ("interrupt 0x1300 raised", 5),
        ("interrupt 0x1300 raised", 6),
        ("interrupt 0x1300 accepted", 6),
        ("interrupt 0x1300 accepted", 0),
    ]


def test_no_interrupt_is_none_and_a_refusal_is_none(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "alpha/kvm")
    trace = InterruptTrace(LPID, recording.tracer)

    trace.accepted([0, 0xFF000000])
    trace.accepted([-4])

    assert moves(recording.close()) == []


def test_sources_without_end_take_no_memory_without_end(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "alpha/kvm")
    trace = InterruptTrace(LPID, recording.tracer)

    for source in range(MAX_SOURCES + 10):
        trace.raised(source, 1)

    assert len(trace._causes) == MAX_SOURCES
    recording.close()


def test_while_nobody_records_nothing_is_kept() -> None:
    trace = InterruptTrace(LPID, UNTRACED)

    trace.raised(0x1300, 5)
    trace.accepted([0, XIRR])

    assert trace._causes == {}
