"""Trace files as they grow, are cut off, or were written by somebody else."""

from __future__ import annotations

from pathlib import Path

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.trace.events import Event, EventDecoder
from deploy.trace.filters import Filter
from deploy.trace.merge import Selection, Tail, Trace, survey
from deploy.trace.reader import TraceDamaged, TraceReader, trace_files
from protocol import trace as t
from protocol.errors import UserError
from protocol.hcalls import H_CEDE
from protocol.wire import MessageKind
from tests.unit.trace_rig import Recording, events_of


def recorded(directory: Path, n_calls: int = 3) -> Path:
    recording = Recording(directory, "vm1/guest")
    link = recording.link()
    for number in range(n_calls):
        recording.sent(link, MessageKind.CALL, H_CEDE.number, number, [0])
    return recording.close()


def test_a_file_that_still_grows_gives_each_entry_once_and_whole(tmp_path: Path) -> None:
    whole = recorded(tmp_path).read_bytes()
    path = tmp_path / "grows"
    reader = TraceReader(path)
    assert list(reader.read()) == []
    n_found = []

    for at in range(0, len(whole), 7):
        with path.open("ab") as file:
            file.write(whole[at : at + 7])
        n_found.append(len(list(reader.read())))

    assert sum(n_found) == 6
    assert reader.n_cut_bytes == 0
    assert list(reader.read()) == []


def test_another_decoder_of_messagepack_reads_a_trace_and_the_messages_in_it(tmp_path: Path) -> None:
    raw = recorded(tmp_path).read_bytes()
    entries = []
    while raw:
        (n_bytes,) = t.LENGTH.unpack_from(raw)
        entries.append(msgpack.unpackb(raw[t.LENGTH.size : t.LENGTH.size + n_bytes]))
        raw = raw[t.LENGTH.size + n_bytes :]

    frames = [msgpack.unpackb(field) for entry in entries for field in entry if isinstance(field, bytes)]

    assert entries[0][1] == t.FORMAT
    assert [frame[2] for frame in frames] == [H_CEDE.number] * 3


def test_a_file_that_was_cut_off_gives_all_before_and_says_so(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])

    events = events_of(path)

    assert [event.name for event in events] == ["began", "H_CEDE", "H_CEDE"]
    assert 0 < survey([path]).cut[path] < 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xff\xff\xff", "damaged at byte 0: an entry of 4294967295 bytes"),
        (b"\x02\x00\x00\x00\x91\x63", "damaged at byte 0: "),
        (t.encode_entry(t.Lost(0, 1, "x")), "damaged at byte 0: no trace begins here"),
        (
            t.encode_entry(t.Began("pefbox-trace", 9, 0, 0, "c", "h", "p", "r", 1, 2)),
            "'pefbox-trace' version 9; this pefbox reads pefbox-trace 1",
        ),
    ],
)
def test_what_no_process_writes_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.trace"
    path.write_bytes(content)

    with pytest.raises(UserError, match=message) as raised:
        events_of(path)

    assert str(path) in str(raised.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_ends_in_a_line_and_never_in_another_error(data: st.DataObject, tmp_path: Path) -> None:
    whole = bytearray(recorded(tmp_path).read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(whole)

    try:
        events_of(path)
    except UserError as error:
        assert str(error).startswith(str(path))
    (tmp_path / "vm1.guest.trace").unlink()


def test_a_directory_without_a_trace_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="record one with `pefbox trace record`"):
        trace_files(tmp_path)
    with pytest.raises(UserError, match="no such file or directory"):
        trace_files(tmp_path / "nowhere")


def test_events_of_several_files_come_in_order_of_time(tmp_path: Path) -> None:
    guest, kvm = Recording(tmp_path, "vm1/guest"), Recording(tmp_path, "alpha/kvm")
    ends = [(guest, guest.link()), (kvm, kvm.link(peer="vm1/guest"))]
    for number in range(4):
        recording, link = ends[number % 2]
        recording.sent(link, MessageKind.CALL, H_CEDE.number, number, [0])
    files = [guest.close(), kvm.close()]

    calls = [event for event in events_of(*files) if event.is_message]

    assert [event.correlation for event in calls] == [0, 1, 2, 3]
    assert [event.process for event in calls] == ["vm1/guest", "alpha/kvm"] * 2


def test_the_file_of_a_process_that_took_a_vm_in_is_named_by_its_place(tmp_path: Path) -> None:
    path = recorded(tmp_path).rename(tmp_path / "vm1.guest.1.trace")

    assert {event.process for event in events_of(path)} == {"vm1/guest.1"}


def test_a_tail_gives_an_event_only_when_no_earlier_one_can_come(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    tail = Tail(Trace([path]))
    (last_ns,) = {event.t_ns for event in events_of(path)[-1:]}

    assert tail.settled(last_ns) == []
    assert [event.name for event in tail.settled(last_ns + 2_000_000_000)] == ["began", *["H_CEDE"] * 3]
    assert tail.settled(last_ns + 4_000_000_000) == []


def test_a_selection_is_checked_against_what_the_trace_has(tmp_path: Path) -> None:
    recorded(tmp_path)

    assert len(list(Selection(tmp_path, Filter(vm="vm1", call="H_*")))) == 3
    assert len(list(Selection(tmp_path, Filter(since_ns=0)))) == 1
    with pytest.raises(UserError, match='--vm: no VM "vm2" in this trace; there is: vm1'):
        Selection(tmp_path, Filter(vm="vm2"))
    with pytest.raises(UserError, match='--process: no "kvm" in this trace; there is: vm1/guest'):
        Selection(tmp_path, Filter(process="kvm"))


def test_entries_without_their_link_or_vm_are_shown_as_far_as_they_are_known() -> None:
    decoder = EventDecoder()
    decoder.event(t.Began(t.FORMAT, t.VERSION, 0, 0, "c", "h", "p/kvm", "kvm", 1, 2))

    event = decoder.event(t.MessageSeen(1, 9, True, b"\x93"))
    page = decoder.event(t.PageChanged(1, 3, 4, "A", "B", "C", 0))

    assert event is not None
    assert (event.kind, event.peer) == ("malformed", None)
    assert page is not None
    assert page.vm is None


def test_every_event_can_be_written_as_json(tmp_path: Path) -> None:
    for event in events_of(recorded(tmp_path)):
        assert msgspec.json.decode(msgspec.json.encode(event), type=Event).name == event.name


def test_damage_names_the_file_and_the_byte(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    offset = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\xff" * 8)

    with pytest.raises(TraceDamaged) as raised:
        events_of(path)

    assert (raised.value.path, raised.value.offset) == (path, offset)
