"""What is made of events: lines, filters, statistics, sequence diagrams, Perfetto's format, differences."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from deploy.cli_logs import _row
from deploy.cli_trace import trace as trace_command
from deploy.trace import diff, pairing, show
from deploy.trace.diff import compare
from deploy.trace.events import Event, EventKind
from deploy.trace.filters import CALL_NAMES, Filter, make_filter
from deploy.trace.link_ends import LinkEnds
from deploy.trace.merge import Selection, Tail, Trace
from deploy.trace.mermaid import MAX_LINES, sequence_diagram
from deploy.trace.pairing import WINDOW_NS, paired
from deploy.trace.perfetto import document, trace_rows
from deploy.trace.show import each_message_once, line
from deploy.trace.stats import percentile, statistics
from deploy.trace.tables import diff_lines
from protocol import messages as m
from protocol import trace as t
from protocol.errors import UserError
from protocol.hcalls import H_CEDE, H_PUT_TCE, H_RANDOM, HCALLS
from protocol.links import KVM_GUEST, KVM_QEMU, QEMU_MIGRATION, ULTRAVISOR_KVM
from protocol.trace import InterruptStep, RequestMoved, RequestStep
from protocol.ucalls import UCALLS, UV_RETURN
from protocol.wire import MessageKind, encode
from tests.unit.trace_rig import LPID, Recording, events_of

CALL, REPLY, EVENT = MessageKind.CALL, MessageKind.REPLY, MessageKind.EVENT
COOKIE = 77


def a_call_and_its_reply(directory: Path) -> list[Event]:
    recording = Recording(directory, "alpha/kvm")
    link = recording.link(peer="vm1/guest")
    recording.came(link, CALL, H_PUT_TCE.number, 9, [0, 0x80000000, 0x1000, 0x2003])
    recording.sent(link, REPLY, H_PUT_TCE.number, 9, [0])
    return [event for event in events_of(recording.close()) if event.is_message]


def test_a_call_of_a_guest_is_shown_with_names_and_how_long_it_took(tmp_path: Path) -> None:
    call, reply = a_call_and_its_reply(tmp_path)

    assert call.text == f"{H_PUT_TCE.describe([0x80000000, 0x1000, 0x2003])} of vcpu 0"
    assert (reply.text, reply.result, reply.ends) == ("H_PUT_TCE -> H_SUCCESS", "H_SUCCESS", "H_PUT_TCE")
    assert reply.took_ns == reply.t_ns - call.t_ns
    assert line(call).split()[1:4] == ["vm1/guest", ">", "alpha/kvm"]
    assert line(reply).split()[1:4] == ["vm1/guest", "<", "alpha/kvm"]
    assert line(reply).endswith("cause 0x5")


def test_calls_keep_the_rows_that_programs_know(tmp_path: Path) -> None:
    call, reply = a_call_and_its_reply(tmp_path)

    assert _row(call).keys() == {
        "t_ns", "link", "direction", "kind", "number", "name", "correlation", "cause", "text",
    }  # fmt: skip
    assert (_row(call)["direction"], _row(call)["kind"], _row(reply)["kind"]) == ("in", "call", "reply")
    assert _row(reply)["took_us"] > 0


def reflected(directory: Path) -> list[Event]:
    """Two VMs' hypercalls on the link between ultravisor and kvm; one is answered."""
    recording = Recording(directory, "alpha/ultravisor")
    link = recording.link(ULTRAVISOR_KVM, vm=None)
    recording.sent(link, CALL, H_PUT_TCE.number, COOKIE, [LPID, 0, 1, 2, 3])
    recording.sent(link, CALL, H_PUT_TCE.number, COOKIE + 1, [LPID + 1, 0, 1, 2, 3])
    recording.came(link, CALL, UV_RETURN.number, 0, [0, COOKIE, 0])
    return [event for event in events_of(recording.close()) if event.is_message]


def test_a_host_link_s_messages_belong_to_the_vm_they_name_and_uv_return_ends_them(tmp_path: Path) -> None:
    mine, other, back = reflected(tmp_path)

    assert (mine.vm, other.vm, back.vm) == ("vm1", None, "vm1")
    assert mine.text.endswith(f" of lpid {LPID} vcpu 0")
    assert (back.name, back.ends, back.result) == ("UV_RETURN", "H_PUT_TCE", "H_SUCCESS")
    assert back.text == "UV_RETURN of H_PUT_TCE -> H_SUCCESS"
    assert back.took_ns


def test_a_message_is_shown_with_the_fields_of_its_declaration(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "alpha/kvm")
    link = recording.link(KVM_QEMU, peer="vm1/qemu")
    recording.sent(link, CALL, m.EXIT_MMIO_LOAD.number, 1, m.MmioLoadBody(0x100, 4))
    recording.came(link, REPLY, m.EXIT_MMIO_LOAD.number, 1, m.MmioLoadReply(0, 0x2A))
    recording.came(link, CALL, m.PAGES_WANTED.number, 2, m.PagesBody(list(range(20))))
    recording.came(link, CALL, m.PAGES_WANTED.number, 3, {"no": "such"})

    texts = [event.text for event in events_of(recording.close()) if event.is_message]

    assert texts == [
        "EXIT_MMIO_LOAD(gpa=0x100, size=4)",
        "EXIT_MMIO_LOAD -> H_SUCCESS value=0x2a",
        "PAGES_WANTED(gfns=[0, 1, 2, 3, 4, 5, 6, 7, and 12 more])",
        "PAGES_WANTED({no: such})",
    ]


# -- filters -----------------------------------------------------------------------------------------------


def test_a_filter_asks_for_what_it_names(tmp_path: Path) -> None:
    events = reflected(tmp_path)

    def n_passing(**wanted: Any) -> int:  # noqa: ANN401
        return sum(make_filter(**wanted).passes(event) for event in events)

    assert n_passing() == 3
    assert n_passing(vm="vm1") == 2
    assert n_passing(call="H_PUT_TCE") == 3
    assert n_passing(call="UV_*") == 1
    assert n_passing(call="page") == 0
    assert n_passing(cause="0x5") == n_passing(cause="5") == 3
    assert n_passing(result="H_SUCCESS") == 1
    assert n_passing(process="alpha") == n_passing(process="alpha/ultravisor") == 3
    assert n_passing(process="alpha/kvm") == 0


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"call": "H_CEDEE"}, '--call: no call or message is named "H_CEDEE", did you mean "H_CEDE"'),
        ({"call": "["}, "--call: no call or message"),
        ({"result": "H_BUZY"}, '--result: "H_BUZY" is no result code, did you mean "H_BUSY"'),
        ({"cause": "-1"}, '--cause: "-1" is no cause id'),
        ({"cause": "0x10000000000000000"}, "is no cause id"),
        ({"since": "-3s"}, '--since: "-3s" is no time before the end'),
        ({"since": "1.5.2s"}, "is no time before the end"),
    ],
)
def test_a_bad_filter_is_one_line_that_names_it(wanted: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        make_filter(**wanted)

    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "ns"), [("500ms", 5e8), ("1.5s", 1.5e9), ("2m", 1.2e11), ("1h", 3.6e12), ("3", 3e9)])
def test_since_is_a_time_before_the_end(text: str, ns: float) -> None:
    assert make_filter(since=text).since_ns == ns


def test_every_declared_call_and_message_can_be_asked_for() -> None:
    for name in CALL_NAMES:
        assert make_filter(call=name).call == name


def test_a_message_shows_once_unless_a_process_is_asked_for(tmp_path: Path) -> None:
    files = [part.close() for part in two_ends(tmp_path)]
    events = events_of(*files)

    once = list(each_message_once(iter(events), Filter()))
    alone = list(each_message_once(iter(events_of(files[1])), Filter()))
    of_one = list(each_message_once(iter(events), Filter(process="vm1")))

    assert [event.kind for event in once if event.is_message] == [EventKind.CALL, EventKind.REPLY]
    assert [event.kind for event in alone if event.is_message] == [EventKind.CALL, EventKind.REPLY]
    assert sum(event.is_message for event in of_one) == 4


def two_ends(
    directory: Path, *, tce: int = 3, vm_ns: int = 10, time: str = "wall", move: int = 0
) -> tuple[Recording, Recording]:
    """A guest and its kvm: one call with its reply, and what kvm did for it."""
    directory.mkdir(exist_ok=True)
    guest, kvm = Recording(directory, "vm1/guest", move=move, time=time), Recording(directory, "alpha/kvm", time=time)
    lower, upper = guest.link(clock=lambda: vm_ns), kvm.link(peer="vm1/guest")
    guest.sent(lower, CALL, H_PUT_TCE.number, 1, [0, 1, 2, tce])
    kvm.came(upper, CALL, H_PUT_TCE.number, 1, [0, 1, 2, tce])
    kvm.tracer.interrupt_moved(LPID, 0x1000, InterruptStep.RAISED, 5)
    kvm.sent(upper, REPLY, H_PUT_TCE.number, 1, [0])
    guest.came(lower, REPLY, H_PUT_TCE.number, 1, [0])
    return guest, kvm


# -- processes that moved -------------------------------------------------------------------------------------


def moved(directory: Path, *, with_first_home: bool) -> Path:
    """A trace of a guest after its move, and of where it was before if that recorded, too."""
    directory.mkdir()
    if with_first_home:
        before = Recording(directory, "vm1/guest")
        before.sent(before.link(KVM_QEMU, peer="vm1/qemu"), CALL, H_CEDE.number, 1, [0])
        before.close()
    for part in two_ends(directory, move=2):
        part.close()
    return directory


@pytest.mark.parametrize("with_first_home", [False, True])
def test_the_ends_of_a_process_that_moved_find_each_other(tmp_path: Path, with_first_home: bool) -> None:
    trace = moved(tmp_path / "trace", with_first_home=with_first_home)
    selection = Selection(trace, Filter(call="H_PUT_TCE"))

    shown = [line(event) for event in each_message_once(iter(selection), Filter())]
    diagram = sequence_diagram(Selection(trace, Filter(call="H_PUT_TCE")), 5).splitlines()
    arrows = [row for row in list(trace_rows(selection)) if row["ph"] == "s"]
    (call,) = statistics(selection).calls
    pairs = compare(trace, trace, Filter(call="H_PUT_TCE"), to_the_end=True).pairs

    assert [" ".join(text.split()[1:4]) for text in shown] == ["vm1/guest.2 > alpha/kvm", "vm1/guest.2 < alpha/kvm"]
    assert [text.split()[-1] for text in diagram if "participant" in text] == ["vm1/guest.2", "alpha/kvm"]
    assert len([text for text in diagram if ">>" in text]) == 2
    assert len(arrows) == 2
    assert (call.caller, call.callee, call.count) == ("vm1/guest.2", "alpha/kvm", 1)
    assert [(pair.sender, pair.receiver, pair.n_a) for pair in pairs] == [("vm1/guest.2", "alpha/kvm", 1)]


def test_a_live_tail_calls_a_process_that_moved_as_its_file_does(tmp_path: Path) -> None:
    trace = Trace(sorted(moved(tmp_path / "trace", with_first_home=True).iterdir()))

    events = Tail(trace).settled(time.monotonic_ns() + 1_000_000_000)

    assert {event.peer for event in events if event.process == "alpha/kvm" and event.is_message} == {"vm1/guest.2"}


def test_the_two_qemus_of_a_migration_are_told_apart(tmp_path: Path) -> None:
    left, arrived = Recording(tmp_path, "vm1/qemu"), Recording(tmp_path, "vm1/qemu", move=1)
    ends = [recording.link(QEMU_MIGRATION, peer="vm1/qemu") for recording in (left, arrived)]
    left.sent(ends[0], CALL, m.MIGRATION_KEY.number, 1, [])
    arrived.came(ends[1], CALL, m.MIGRATION_KEY.number, 1, [])

    sent, came = (event for event in events_of(left.close(), arrived.close()) if event.is_message)

    assert (sent.process, sent.peer) == ("vm1/qemu", "vm1/qemu.1")
    assert (came.process, came.peer) == ("vm1/qemu.1", "vm1/qemu")


# -- messages of which only one end has a copy -------------------------------------------------------------------


def only_come(directory: Path) -> Path:
    """A guest makes three calls, of which its file has the second only: it began late, and was killed."""
    directory.mkdir()
    guest, kvm = Recording(directory, "vm1/guest"), Recording(directory, "alpha/kvm")
    lower, upper = guest.link(), kvm.link(peer="vm1/guest")
    for number in range(3):
        if number == 1:
            guest.sent(lower, CALL, H_CEDE.number, number, [0])
        kvm.came(upper, CALL, H_CEDE.number, number, [0])
        kvm.sent(upper, REPLY, H_CEDE.number, number, [0])
        if number == 1:
            guest.came(lower, REPLY, H_CEDE.number, number, [0])
    kvm.came(upper, EVENT, m.GUEST_CRASHED.number, 0, m.CrashBody(0, "why"))
    for part in (guest, kvm):
        part.close()
    return directory


def test_what_only_its_receiver_recorded_is_shown(tmp_path: Path) -> None:
    trace = only_come(tmp_path / "trace")

    shown = list(each_message_once(iter(Selection(trace, Filter())), Filter()))
    tailed = Tail(Trace(sorted(trace.iterdir()))).settled(time.monotonic_ns() + 2_000_000_000)
    diagram = sequence_diagram(Selection(trace, Filter()), 5)
    counted = statistics(Selection(trace, Filter()))
    (calls, replies) = [[event for event in shown if event.kind is kind] for kind in (EventKind.CALL, EventKind.REPLY)]

    assert [(event.process, event.correlation) for event in calls] == [
        ("alpha/kvm", 0),
        ("vm1/guest", 1),
        ("alpha/kvm", 2),
    ]
    assert [event.correlation for event in replies] == [0, 1, 2]
    assert list(each_message_once(iter(tailed), Filter())) == shown
    assert (diagram.count("->>"), diagram.count("-->>"), diagram.count("-)")) == (6, 3, 1)
    assert [(call.name, call.caller, call.count, call.results) for call in counted.calls] == [
        ("H_CEDE", "vm1/guest", 3, {"H_SUCCESS": 3})
    ]
    assert counted.others == {"event GUEST_CRASHED": 1}


def test_a_run_whose_end_only_the_receiver_recorded_is_compared_to_its_end(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    guest = Recording(whole, "vm1/guest", time="instructions")
    link = guest.link(clock=lambda: 99)
    for number in range(3):
        guest.sent(link, CALL, H_CEDE.number, number, [0])
    guest.close()

    found = compare(whole, only_come(tmp_path / "killed"), Filter(call="H_CEDE"), to_the_end=True)

    assert found.same
    assert [(pair.sender, pair.n_same, pair.n_a, pair.n_b) for pair in found.pairs] == [("vm1/guest", 3, 3, 3)]


def test_an_answer_is_counted_once_though_its_caller_recorded_no_call(tmp_path: Path) -> None:
    guest, kvm = Recording(tmp_path, "vm1/guest"), Recording(tmp_path, "alpha/kvm")
    lower, upper = guest.link(), kvm.link(peer="vm1/guest")
    kvm.came(upper, CALL, H_CEDE.number, 1, [0])
    kvm.sent(upper, REPLY, H_CEDE.number, 1, [0])
    guest.came(lower, REPLY, H_CEDE.number, 1, [0])

    (call,) = statistics(events_of(guest.close(), kvm.close())).calls

    assert (call.count, call.results) == (1, {"H_SUCCESS": 1})


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=30))
def test_whatever_copies_are_missing_each_message_shows_once(messages: list[tuple[bool, bool, bool]]) -> None:
    """Of each message: whether its sender's file has it, its receiver's, and whether it came before it was noted."""
    with tempfile.TemporaryDirectory() as directory:
        guest, kvm = (Recording(Path(directory), target) for target in ("vm1/guest", "alpha/kvm"))
        lower, upper = guest.link(), kvm.link(peer="vm1/guest")
        for number, (is_sent, is_come, is_noted_late) in enumerate(messages):
            if is_come and is_noted_late:
                kvm.came(upper, CALL, H_CEDE.number, number, [0])
            if is_sent:
                guest.sent(lower, CALL, H_CEDE.number, number, [0])
            if is_come and not is_noted_late:
                kvm.came(upper, CALL, H_CEDE.number, number, [0])
        events = events_of(guest.close(), kvm.close())
        shown = [event for event in each_message_once(iter(events), Filter()) if event.is_message]

    assert sorted(event.correlation for event in shown if event.correlation is not None) == [
        number for number, (is_sent, is_come, _) in enumerate(messages) if is_sent or is_come
    ]


def timed(t_ns: int, process: str, correlation: int = 0, number: int = 1) -> Event:
    """An event of a link between two processes, the first of which sends."""
    ends = {"vm1/guest": "alpha/kvm", "alpha/kvm": "vm1/guest"}
    return Event(
        t_ns=t_ns, kind=EventKind.EVENT, process=process, peer=ends[process], outward=process == "vm1/guest",
        link="x", name="x", text="x", number=number, correlation=correlation,
    )  # fmt: skip


def ends_of_x() -> LinkEnds:
    ends = LinkEnds()
    for process in ("vm1/guest", "alpha/kvm"):
        ends.add("x", process)
    return ends


def test_a_message_that_never_came_is_not_taken_for_a_later_one_that_looks_the_same() -> None:
    later = 2 * WINDOW_NS
    lost, other = timed(0, "vm1/guest"), (timed(later, "vm1/guest", 2), timed(later + 1, "alpha/kvm", 2))
    again = (timed(later + 2, "vm1/guest"), timed(later + 3, "alpha/kvm"))

    assert [event.message for event in paired([lost, *other, *again], ends_of_x())] == [1, 2, 2, 3, 3]


def test_messages_that_never_come_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "MAX_ON_THE_WAY", 3)
    sent = [timed(number, "vm1/guest", number) for number in range(5)]
    came = [timed(10 + number, "alpha/kvm", number) for number in range(5)]

    assert [event.message for event in paired([*sent, *came], ends_of_x())][5:] == [None, None, 3, 4, 5]


# -- statistics -----------------------------------------------------------------------------------------------


def test_statistics_count_each_call_once_by_its_caller(tmp_path: Path) -> None:
    counted = statistics(events_of(*(part.close() for part in two_ends(tmp_path))))

    (call,) = counted.calls
    assert (call.name, call.caller, call.callee, call.count) == ("H_PUT_TCE", "vm1/guest", "alpha/kvm", 1)
    assert call.results == {"H_SUCCESS": 1}
    assert call.p50_us == call.p99_us
    assert counted.others == {"interrupt raised": 1}


def test_a_call_without_an_answer_counts_and_has_no_time(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "vm1/guest")
    recording.sent(recording.link(), CALL, H_CEDE.number, 1, [0])

    (call,) = statistics(events_of(recording.close())).calls

    assert (call.count, call.p50_us, call.results) == (1, None, {})


def test_percentiles_are_times_that_were_measured() -> None:
    times = [1000 * n for n in range(1, 101)]

    assert (percentile(times, 50), percentile(times, 99), percentile(times[:1], 99)) == (50.0, 99.0, 1.0)
    assert percentile([], 50) is None


# -- exports -----------------------------------------------------------------------------------------------


def test_a_cause_is_drawn_from_the_call_to_its_end(tmp_path: Path) -> None:
    diagram = sequence_diagram(events_of(*(part.close() for part in two_ends(tmp_path))), 5).splitlines()

    assert diagram[:3] == [
        "sequenceDiagram",
        "    participant vm1_guest as vm1/guest",
        "    participant alpha_kvm as alpha/kvm",
    ]
    arrows = [text.strip().partition(":")[0] for text in diagram[3:]]
    assert arrows == ["vm1_guest->>alpha_kvm", "Note over alpha_kvm", "alpha_kvm-->>vm1_guest"]


def test_a_cause_that_is_not_there_or_too_long_is_refused(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "vm1/guest")
    link = recording.link()
    for number in range(MAX_LINES + 1):
        recording.sent(link, CALL, H_CEDE.number, number, [0])
    events = events_of(recording.close())

    with pytest.raises(UserError, match="this trace has no cause 0x6"):
        sequence_diagram(events, 6)
    with pytest.raises(UserError, match="has 201 messages, a diagram at most 200"):
        sequence_diagram(events, 5)


def test_perfetto_gets_nesting_slices_and_arrows_whose_ends_exist(tmp_path: Path) -> None:
    guest, kvm = two_ends(tmp_path)
    rows = list(trace_rows(events_of(guest.close(), kvm.close())))
    slices = [row for row in rows if row["ph"] == "X"]
    arrows: dict[int, dict[str, Any]] = defaultdict(dict)
    for row in rows:
        if row["ph"] in "sf":
            arrows[row["id"]][row["ph"]] = row

    assert [row["args"]["name"] for row in rows if row["name"] == "process_name"] == ["vm1/guest", "alpha/kvm"]
    lanes = {(row["pid"], row["tid"]) for row in rows if row["name"] == "thread_name"}
    assert lanes == {(row["pid"], row["tid"]) for row in slices}
    assert len({tid for _, tid in lanes}) == len(lanes)
    assert [row["name"] for row in slices] == ["H_PUT_TCE", "H_PUT_TCE"]
    assert slices[0]["args"]["result"] == "H_PUT_TCE -> H_SUCCESS"
    assert len(arrows) == 2
    for arrow in arrows.values():
        assert arrow["s"]["pid"] != arrow["f"]["pid"]
        assert arrow["s"]["ts"] <= arrow["f"]["ts"]
        for end in arrow.values():
            assert any(
                part["pid"] == end["pid"] and part["ts"] <= end["ts"] <= part["ts"] + part["dur"] + 1e-3
                for part in slices
            )
    assert [row["name"] for row in rows if row["ph"] == "i" and row["cat"] == "interrupt"] == [
        "interrupt 0x1000 raised"
    ]


def test_calls_that_overlap_have_lanes_of_their_own(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "alpha/kvm")
    link = recording.link(peer="vm1/guest")
    for number in (1, 2, 3):
        recording.came(link, CALL, H_CEDE.number, number, [0])
    for number in (1, 2):
        recording.sent(link, REPLY, H_CEDE.number, number, [0])
    recording.came(link, CALL, H_CEDE.number, 4, [0])

    rows = list(trace_rows(events_of(recording.close())))

    lanes = {row["tid"]: row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    assert [lanes[row["tid"]] for row in rows if row["ph"] == "X"] == ["lane 1", "lane 2", "lane 3", "lane 1"]


def test_an_export_for_perfetto_is_written_as_its_events_are_read(tmp_path: Path) -> None:
    """A trace may be larger than the memory."""
    recording = Recording(tmp_path, "alpha/kvm")
    link = recording.link(peer="vm1/guest")
    for number in range(1000):
        recording.came(link, CALL, H_CEDE.number, number, [0])
        recording.sent(link, REPLY, H_CEDE.number, number, [0])
        recording.sent(link, EVENT, m.VCPU_LINE.number, 0, m.LineBody(0, True))
    n_read = 0

    def events() -> Iterator[Event]:
        nonlocal n_read
        for event in events_of(recording.close()):
            n_read += 1
            yield event

    for n_rows, _ in enumerate(trace_rows(events()), 1):
        assert n_read <= 2 * n_rows + 3

    assert n_read == 3001


def test_a_call_whose_ids_are_used_again_ends_there(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "alpha/kvm")
    link = recording.link(peer="vm1/guest")
    for _ in range(2):
        recording.came(link, CALL, H_CEDE.number, 1, [0])
    recording.sent(link, REPLY, H_CEDE.number, 1, [0])

    first, second = (row for row in trace_rows(events_of(recording.close())) if row["ph"] == "X")

    assert ("result" in first["args"], "result" in second["args"]) == (False, True)
    assert first["tid"] == second["tid"]
    assert first["ts"] + first["dur"] <= second["ts"] + 1e-3


def test_a_device_request_is_a_slice_from_its_begin_to_its_end(tmp_path: Path) -> None:
    recording = Recording(tmp_path, "vm1/qemu")
    for t_ns, step, head in ((1000, RequestStep.BEGUN, 5), (2000, RequestStep.BEGUN, 6), (3000, RequestStep.ENDED, 5)):
        recording.tracer.request_moved(RequestMoved(t_ns, LPID, "vm1/root", 0, head, step, 512, 7))
    recording.tracer.request_moved(RequestMoved(4000, LPID, "vm1/root", 0, 9, RequestStep.ENDED, 1, 7))

    rows = list(trace_rows(events_of(recording.close())))

    slices = [(row["name"], row["ts"]) for row in rows if row["ph"] == "X"]
    assert slices == [("vm1/root queue 0 request 5", 1.0), ("vm1/root queue 0 request 6", 2.0)]
    assert next(row["dur"] for row in rows if row["ph"] == "X") == 2.0
    moments = [row["name"] for row in rows if row["ph"] == "i" and row["cat"] == "request"]
    assert moments == ["vm1/root queue 0 request 9 ends, 1 bytes written"]


# -- differences -----------------------------------------------------------------------------------------------


def closed(directory: Path, **how: Any) -> Path:  # noqa: ANN401
    for part in two_ends(directory, **how):
        part.close()
    return directory


def test_two_runs_that_did_the_same_are_alike_whenever_they_were(tmp_path: Path) -> None:
    found = compare(closed(tmp_path / "a"), closed(tmp_path / "b", vm_ns=99), Filter(), to_the_end=True)

    assert found.same
    assert [(pair.sender, pair.receiver, pair.n_same) for pair in found.pairs] == [("vm1/guest", "alpha/kvm", 1)]
    assert found.notes == []


def test_the_first_message_that_differs_is_named(tmp_path: Path) -> None:
    found = compare(closed(tmp_path / "a"), closed(tmp_path / "b", tce=4), Filter(), to_the_end=False)

    assert not found.same
    lines = list(diff_lines(found))
    assert lines[0] == "the first difference: vm1/guest to alpha/kvm, after 0 messages alike"
    assert lines[1].startswith("  A: H_PUT_TCE(") and lines[1].endswith("tce=0x3) of vcpu 0 -> H_SUCCESS")
    assert "tce=0x4" in lines[2]


def test_the_vm_s_time_is_compared_where_it_counts_instructions(tmp_path: Path) -> None:
    one = closed(tmp_path / "a", time="instructions")
    other = closed(tmp_path / "b", time="instructions", vm_ns=11)

    found = compare(one, other, Filter(), to_the_end=False)

    assert found.first is not None
    assert found.first.a is not None
    assert found.first.a.endswith("at 10 ns of the VM's time")


def test_ids_cookies_and_what_a_private_call_gives_are_not_compared(tmp_path: Path) -> None:
    places = []
    for number in (1, 2):
        directory = tmp_path / str(number)
        directory.mkdir()
        recording = Recording(directory, "alpha/kvm")
        link = recording.link(KVM_GUEST, peer="vm1/guest")
        recording.came(link, CALL, H_RANDOM.number, number, [0], cause=number)
        recording.sent(link, REPLY, H_RANDOM.number, number, [0, number], cause=number)
        places.append(recording.close().parent)
        ultravisor = Recording(directory, "alpha/ultravisor")
        host = ultravisor.link(ULTRAVISOR_KVM, vm=None)
        ultravisor.sent(host, CALL, H_PUT_TCE.number, number, [LPID, 0, 1, 2, 3])
        ultravisor.came(host, CALL, UV_RETURN.number, 0, [0, number, 0])
        ultravisor.close()

    assert compare(places[0], places[1], Filter(), to_the_end=True).same


def test_more_messages_than_fit_into_memory_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = only_come(tmp_path / "trace")
    monkeypatch.setattr(diff, "MAX_MESSAGES", 3)

    assert compare(trace, trace, Filter(call="H_CEDE"), to_the_end=True).same
    with pytest.raises(UserError, match="more than 3 messages to compare; narrow them by --vm, --process"):
        compare(trace, trace, Filter(), to_the_end=True)


def test_a_run_that_goes_on_differs_only_to_the_end_and_seeds_are_noted(tmp_path: Path) -> None:
    longer, shorter = tmp_path / "a", tmp_path / "b"
    for directory, n_calls, seed in ((longer, 3, 1), (shorter, 2, 2)):
        directory.mkdir()
        recording = Recording(directory, "vm1/guest", seed=seed)
        link = recording.link()
        for number in range(n_calls):
            recording.sent(link, CALL, H_CEDE.number, number, [0])
        recording.close()

    found = compare(longer, shorter, Filter(), to_the_end=False)
    strict = compare(shorter, longer, Filter(), to_the_end=True)

    assert found.same
    assert found.notes == ["vm1/guest ran with seed 1 in A and 2 in B"]
    assert strict.first is not None
    assert (strict.first.a, strict.first.b, strict.first.n_same) == (None, "H_CEDE() of vcpu 0", 2)


# -- what hostile peers sent ----------------------------------------------------------------------------------


WEIRD = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 9) | st.binary(), inner),
    max_leaves=10,
)
NUMBERS = st.sampled_from([*HCALLS.by_number, *UCALLS.by_number, *m.MESSAGES]) | st.integers(0, (1 << 63) - 1)
DEEP = b"\x91" * 5000 + b"\xc0"


def every_view(frames: list[bytes]) -> None:
    """Make all that is made of a trace; whatever came over a link, it must not raise."""
    with tempfile.TemporaryDirectory() as directory:
        recording = Recording(Path(directory), "alpha/kvm")
        ends = ((KVM_GUEST, "vm1", "vm1/guest"), (ULTRAVISOR_KVM, None, "alpha/ultravisor"))
        links = [recording.link(kind, vm=vm, peer=peer) for kind, vm, peer in ends]
        for number, frame in enumerate(frames):
            recording.saw(links[number % 2], frame, outward=bool(number & 2))
        path = recording.close()
        events = events_of(path)
        for event in events:
            assert line(event).isprintable()
            json.dumps(show.row(event))
        statistics(events)
        json.loads("".join(document(events)))
        sequence_diagram(events, events[-1].cause)
        compare(path, path, Filter(), to_the_end=True)


@given(st.lists(st.tuples(st.sampled_from(MessageKind), NUMBERS, WEIRD), min_size=1, max_size=6))
@example([(MessageKind.CALL, m.EXIT_RTAS.number, [None, []])])
def test_s5_no_view_of_a_trace_breaks_over_what_a_peer_sent(messages: list[tuple[MessageKind, int, Any]]) -> None:
    every_view([encode(kind, number, number & 3, 5, body) for kind, number, body in messages])


HOSTILE = "[/x]\x1b[2J\n9.9 alpha/kvm > vm1/guest forged;#<\u202e"


def hostile_trace(directory: Path) -> Path:
    """A file that somebody altered: every text in it is meant for a terminal."""
    entries: list[t.AnyEntry] = [
        t.Began(t.FORMAT, t.VERSION, 1, 1, HOSTILE, HOSTILE, HOSTILE, HOSTILE, 1, 1),
        t.VmKnown(LPID, HOSTILE, 1, HOSTILE),
        t.LinkOpened(0, HOSTILE, KVM_GUEST.name, HOSTILE, HOSTILE + "peer"),
        t.MessageSeen(2, 0, False, encode(EVENT, m.GUEST_CRASHED.number, 0, 5, m.CrashBody(0, HOSTILE))),
        t.MessageSeen(2, 0, True, encode(CALL, H_CEDE.number, 1, 5, [0])),
        t.MessageSeen(2, 0, False, encode(REPLY, H_CEDE.number, 1, 5, [HOSTILE])),
        t.PageChanged(3, LPID, 1, HOSTILE, HOSTILE, HOSTILE, 5),
        RequestMoved(4, LPID, HOSTILE, 0, 0, RequestStep.BEGUN, 1, 5),
        t.MigrationStepped(5, LPID, HOSTILE, HOSTILE, 5),
        t.Lost(6, 1, HOSTILE),
    ]
    path = directory / "x.trace"
    path.write_bytes(b"".join(map(t.encode_entry, entries)))
    return path


@pytest.mark.parametrize("command", [["show"], ["stats"], ["export", "--format", "mermaid", "--cause", "5"], ["diff"]])
def test_texts_of_a_trace_file_do_not_steer_the_terminal_or_forge_lines(command: list[str], tmp_path: Path) -> None:
    path = str(hostile_trace(tmp_path))
    shown = CliRunner().invoke(trace_command, [*command, path, *([path] if command == ["diff"] else [])])

    assert shown.exit_code == 0, shown.output
    assert all(text.isprintable() for text in shown.output.split("\n"))
    assert "forged" in shown.output
    assert not [text for text in shown.output.splitlines() if text.startswith("9.9")]


def test_names_of_a_trace_in_a_refusal_do_not_steer_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        Selection(hostile_trace(tmp_path), Filter(vm="vm1"))

    assert "forged" in str(raised.value)
    assert str(raised.value).isprintable()


def test_a_name_in_a_diagram_does_not_end_its_line(tmp_path: Path) -> None:
    diagram = sequence_diagram(Selection(hostile_trace(tmp_path), Filter()), 5)

    (participant, _) = [text for text in diagram.splitlines() if "participant" in text]
    assert participant.endswith("forged#59;#35;#lt;?")


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=6))
def test_s5_nor_over_what_is_no_message(frames: list[bytes]) -> None:
    every_view([frame or b"x" for frame in frames])


@pytest.mark.parametrize(
    "body",
    [DEEP, b"\x81\x90\xc0", b"\x81\xc0\xc0", b"\xd6\xff\x00\x00\x00\x00", b"\xd4\x05\x00", b"\xca\x7f\xc0\x00\x00"],
    ids=["deep", "list as key", "nil as key", "timestamp", "extension", "nan"],
)
def test_s5_nor_over_bodies_that_no_encoder_makes(body: bytes) -> None:
    for kind in MessageKind:
        every_view([encode(kind, H_CEDE.number, 1, 5, msgspec.Raw(body))])
