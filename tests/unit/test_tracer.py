"""The tracer of a process: what it notes, what it does when there is no room, on and off."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.trace.events import EventKind
from protocol.hcalls import H_CEDE
from protocol.trace import InterruptStep, MessageSeen
from protocol.wire import MessageKind, encode
from services.runtime import tracer as tracer_module
from services.runtime.tracer import LARGE_BYTES, UNTRACED, Tracer
from tests.unit.trace_rig import End, Recording, config_of, events_of

FRAME = encode(MessageKind.CALL, H_CEDE.number, 1, 2, [0])


def test_everything_that_was_noted_is_in_the_file_in_its_order(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "vm1/guest", seed=42)
    link = recording.link(clock=lambda: 99)
    recording.saw(link, FRAME)
    recording.tracer.page_changed(7, 16, "SECURE", "SHARE", "HV_SHARING", 5)
    recording.tracer.interrupt_moved(7, 0x1000, InterruptStep.RAISED, 5)
    recording.tracer.migration_stepped(7, "source", "active", 5)

    events = events_of(recording.close())

    assert [event.kind for event in events] == [
        EventKind.BEGAN,
        EventKind.CALL,
        EventKind.PAGE,
        EventKind.INTERRUPT,
        EventKind.MIGRATION,
    ]
    assert "seed 42" in events[0].text
    assert (events[1].time_ns, events[1].vm, events[1].process, events[1].cause) == (99, "vm1", "vm1/guest", 2)
    assert events[2].text == "gfn 0x10 SECURE -> HV_SHARING (SHARE)"
    assert {event.vm for event in events[1:]} == {"vm1"}


def test_a_link_has_a_tap_only_while_recording_is_on(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "vm1/guest")
    link = recording.link()
    recording.tracer.switch(on=False)
    assert recording._ends[link].tap is None

    recording.tracer.switch(on=True)
    recording.saw(link, FRAME)

    assert [event.kind for event in events_of(recording.close())] == [EventKind.BEGAN, EventKind.BEGAN, EventKind.CALL]


def test_a_closed_link_is_forgotten_and_its_successor_is_not(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "vm1/guest")
    link = recording.link()
    earlier = recording._ends[link]
    recording.link()
    recording.tracer.forget_end(link, earlier)
    recording.tracer.switch(on=False)
    earlier.tap = None
    recording.tracer.switch(on=True)

    assert earlier.tap is None
    assert recording._ends[link].tap is not None
    recording.close()


def test_what_the_queue_does_not_take_is_counted_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording(tmp_path, "vm1/guest")
    link = recording.link()
    monkeypatch.setattr(tracer_module, "MAX_QUEUED", 5)
    for _ in range(6):
        recording.saw(link, FRAME)

    events = events_of(recording.close())

    assert [event.kind for event in events] == [EventKind.BEGAN, EventKind.CALL, EventKind.CALL, EventKind.LOST]
    assert events[-1].text == "4 entries are missing: the queue was full"


def test_large_frames_have_a_bound_of_their_own_and_are_taken_again_once_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracer_module, "MAX_LARGE_BYTES", 2 * LARGE_BYTES)
    recording = Recording(tmp_path, "vm1/qemu")
    link = recording.link()
    for _ in range(2):
        for _ in range(3):
            recording.saw(link, bytes(LARGE_BYTES))
        recording.tracer.flush()

    kinds = [event.kind for event in events_of(recording.close())]

    assert kinds.count(EventKind.MALFORMED) == 4
    assert kinds.count(EventKind.LOST) == 2


def test_frames_of_any_size_take_a_bounded_part_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk stands still: 65,536 frames of 4 KiB would be 256 MiB."""
    monkeypatch.setattr(tracer_module, "MAX_QUEUED", 1 << 10)
    monkeypatch.setattr(tracer_module, "MAX_LARGE_BYTES", 1 << 18)
    for n_bytes in (100, LARGE_BYTES - 1, LARGE_BYTES, 1000, 4095):
        recording = Recording(tmp_path, f"vm{n_bytes}/qemu")
        link = recording.link()
        for _ in range(1 << 10):
            recording.saw(link, bytes(n_bytes))

        kept = [entry.frame for entry in recording.tracer._queue if isinstance(entry, MessageSeen)]

        assert kept
        assert sum(map(len, kept)) <= 1 << 18
        recording.close()


def test_a_file_has_its_bound_over_all_incarnations_of_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracer_module, "MAX_FILE_BYTES", 2000)
    sizes, full = [], []
    for _ in range(6):
        recording = Recording(tmp_path, "vm1/guest")
        if recording.tracer.on:
            link = recording.link()
            for _ in range(10):
                recording.saw(link, FRAME)
        sizes.append(recording.close().stat().st_size)
        full.append(recording.tracer.is_full)

    assert sizes[0] < 2000 <= sizes[-1] < 2000 + sizes[0] + 100
    assert (full[0], full[-1], sizes[-2]) == (False, True, sizes[-1])


def test_a_disk_that_takes_half_an_entry_gets_the_other_half_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = Recording(tmp_path, "vm1/guest")
    link = recording.link()
    recording.saw(link, FRAME)
    write, takes = os.write, [3, None]

    def short(fd: int, data: bytes) -> int:
        n = takes.pop(0) if takes else len(data)
        if n is None:
            raise OSError(28, "No space left on device")
        return write(fd, data[:n])

    monkeypatch.setattr(os, "write", short)
    recording.tracer.flush()
    assert recording.path.stat().st_size == 3
    recording.saw(link, FRAME)

    kinds = [event.kind for event in events_of(recording.close())]

    assert kinds == [EventKind.BEGAN, EventKind.CALL, EventKind.CALL]


def test_a_full_file_says_so_and_recording_ends_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracer_module, "MAX_FILE_BYTES", 300)
    recording = Recording(tmp_path, "vm1/guest")
    link = recording.link()
    for _ in range(20):
        recording.saw(link, FRAME)
    recording.tracer.flush()
    assert recording.tracer.is_full
    for _ in range(20):
        recording.saw(link, FRAME)
    recording.tracer.flush()
    n_bytes = recording.path.stat().st_size
    recording.tracer.switch(on=False)
    recording.tracer.switch(on=True)

    assert not recording.tracer.on
    assert not recording.tracer.has_work
    assert recording._ends[link].tap is None
    assert recording.path.stat().st_size == n_bytes
    assert events_of(recording.close())[-1].text == "the file is full: recording has ended"


def test_what_belongs_to_no_process_never_records() -> None:
    UNTRACED.switch(on=True)
    assert not UNTRACED.on
    tracer = Tracer(None, config_of("vm1/guest"))
    end = End()
    tracer.switch(on=True)
    tracer.flush()
    assert (tracer.on, tracer.has_work, end.tap) == (False, False, None)
