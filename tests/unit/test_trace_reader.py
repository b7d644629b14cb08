"""Trace files as they grow, are cut off, or were written by somebody else."""

from __future__ import annotations

import os
from pathlib import Path

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy import cli_trace as commands
from deploy.trace.appending import open_appending
from deploy.trace.events import Event, EventDecoder
from deploy.trace.filters import Filter
from deploy.trace.merge import Selection, Survey, Tail, Trace
from deploy.trace.reader import TraceDamaged, TraceReader, trace_files
from protocol import trace as t
from protocol.errors import UserError
from protocol.hcalls import H_CEDE
from protocol.wire import MessageKind
from tests.unit.trace_rig import Recording, events_of


def recorded(directory: Path, n_calls: int = 3) -> Path:
    directory.mkdir(exist_ok=True)
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
    assert 0 < Survey([path]).cut[path] < 40


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
        Survey([path])

    assert str(path) in str(raised.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_ends_in_a_line_and_never_in_another_error(data: st.DataObject, tmp_path: Path) -> None:
    whole = bytearray(recorded(tmp_path).read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(whole)

    trace = Trace([path])
    list(trace.events())
    assert all(str(error).startswith(str(path)) for error in trace.newly_unreadable())
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


def test_damage_names_the_file_and_the_byte_and_all_before_it_is_there(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    offset = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\xff" * 8)
    trace = Trace([path])

    assert len(list(trace.events())) == 4
    (damage,) = trace.newly_unreadable()
    assert isinstance(damage, TraceDamaged)
    assert (damage.path, damage.offset) == (path, offset)
    with path.open("ab") as file:
        file.write(recorded(tmp_path / "more").read_bytes())
    assert not list(trace.added())
    assert not trace.newly_unreadable()


def test_a_bad_file_does_not_hide_the_others_of_its_trace(tmp_path: Path) -> None:
    recorded(tmp_path)
    bad, unlike = tmp_path / "alpha.kvm.trace", tmp_path / "vm1.qemu.trace"
    bad.write_bytes(t.encode_entry(t.Lost(0, 1, "x")))
    unlike.write_bytes(t.encode_entry(t.Began(t.FORMAT, 9, 0, 0, "c", "h", "p", "r", 1, 2)))

    selection = Selection(tmp_path, Filter())

    assert len(list(selection)) == 4
    assert {path: str(error) for path, error in selection.survey.unreadable.items()} == {
        bad: f"{bad}: damaged at byte 0: no trace begins here",
        unlike: f"{unlike}: 'pefbox-trace' version 9; this pefbox reads pefbox-trace 1",
    }


def test_commands_show_what_stands_before_damage_and_say_where_it_is(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    offset = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\xff" * 8)
    told = f"pefbox: {path}: damaged at byte {offset}: an entry of 4294967295 bytes; all before it is shown\n"

    for command in (["show"], ["stats"], ["export"]):
        done = CliRunner().invoke(commands.trace, [*command, str(tmp_path)])
        assert (done.exit_code, done.stderr) == (0, told)
        assert "H_CEDE" in done.stdout
    compared = CliRunner().invoke(commands.trace, ["diff", str(tmp_path), str(tmp_path)])
    assert f"note: A goes as far as it can be read: {path}: damaged at byte {offset}" in compared.stdout


def test_a_tail_goes_on_when_half_an_entry_was_cut_off_for_the_next_process(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    reader = TraceReader(path)
    assert (len(list(reader.read())), reader.n_cut_bytes) == (6, 30)

    os.close(open_appending(path))
    with path.open("ab") as file:
        file.write(whole)

    assert (len(list(reader.read())), reader.n_cut_bytes) == (6, 0)


@pytest.mark.parametrize("n_left", [0, 1, 5, 4000])
def test_half_an_entry_is_cut_off_before_the_next_process_appends(tmp_path: Path, n_left: int) -> None:
    path = tmp_path / "x.trace"
    entries = (
        recorded(tmp_path).read_bytes() + t.encode_entry(t.MessageSeen(1, 0, True, bytes(t.MAX_ENTRY_BYTES - 100))) * 20
    )
    path.write_bytes(entries + t.encode_entry(t.MessageSeen(1, 0, True, bytes(5000)))[:n_left])

    fd = open_appending(path)
    os.write(fd, b"next")
    os.close(fd)

    assert path.read_bytes() == entries + b"next"


def test_what_no_process_writes_is_cut_off_too_and_a_new_file_is_made(tmp_path: Path) -> None:
    path = tmp_path / "x.trace"
    os.close(open_appending(path))
    entries = recorded(tmp_path).read_bytes()
    path.write_bytes(entries + b"\xff" * 100)
    os.close(open_appending(path))

    assert path.read_bytes() == entries
    with pytest.raises(UserError, match="Is a directory"):
        open_appending(tmp_path)
