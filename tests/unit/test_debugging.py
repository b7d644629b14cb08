"""Debuggers: who is told to wait, the streams of a session, the launch entry, the tree of tasks."""

from __future__ import annotations

import json
import resource
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from deploy.dap_port import DapFrames, dap_frame
from deploy.launch_json import add_entry
from deploy.waiting import who_waits
from protocol import control
from protocol import debugging as said
from protocol.errors import MalformedMessage
from services.guest.clock import WallClock
from services.guest.run_state import Hold, Life, RunState
from services.runtime.debugging.debugger import Debugger
from services.runtime.debugging.sources import load_sources, short_name
from services.runtime.debugging.tasks import task_lines
from services.runtime.patience import Patience
from services.runtime.process import _ControlLoop
from services.runtime.watch import Watch
from tests.unit.link_rig import LOG

CHAIN = {
    "vm1/guest": ["alpha/ultravisor"],
    "alpha/ultravisor": ["alpha/kvm"],
    "alpha/kvm": [],
    "vm1/qemu": ["alpha/kvm"],
    "vm2/guest": ["beta/kvm"],
}


def test_who_waits_for_a_held_process_does_so_through_others() -> None:
    assert who_waits(["alpha/kvm"], CHAIN) == {
        "vm1/guest": "alpha/kvm",
        "alpha/ultravisor": "alpha/kvm",
        "vm1/qemu": "alpha/kvm",
    }
    assert who_waits(["vm1/guest"], CHAIN) == {}
    assert who_waits([], CHAIN) == {}
    assert who_waits(["a"], {"b": ["c"], "c": ["b"]}) == {}


@given(
    st.lists(st.sampled_from("abcdef"), max_size=3),
    st.dictionaries(st.sampled_from("abcdef"), st.lists(st.sampled_from("abcdef"))),
)
def test_nobody_waits_for_itself_and_each_waits_for_a_held_one(held: list[str], calls: dict[str, list[str]]) -> None:
    waits = who_waits(held, calls)

    assert not set(waits) & set(held)
    assert set(waits.values()) <= set(held)


@pytest.mark.parametrize("state", ["debugged", "waiting"])
async def test_patience_is_without_end_while_the_peer_is_held_and_whole_again_afterwards(
    state: str, autojump_clock: object
) -> None:
    patience = Patience()
    async with trio.open_nursery() as nursery:
        ended: list[float] = []

        async def wait() -> None:
            with pytest.raises(trio.TooSlowError), patience.fail_after(2):
                await trio.sleep_forever()
            ended.append(trio.current_time())

        nursery.start_soon(wait)
        await trio.sleep(1)
        patience.peer_is(state)
        await trio.sleep(100)
        assert ended == []
        patience.peer_is("running")
        since = trio.current_time()
    assert ended == [since + 2]


def test_a_debuggers_hold_outlives_what_runs_and_holds_the_time() -> None:
    life = Life()
    states = []
    for holds in ({Hold.DEBUGGER}, {Hold.DEBUGGER, Hold.HYPERVISOR}, set()):
        life.holds = set(holds)
        life.become(RunState.RUNNING)
        states.append(life.state)
    assert states == [RunState.STOPPED, RunState.STOPPED, RunState.RUNNING]

    clock = WallClock()
    clock.hold()
    assert clock.now_ns() == clock.now_ns()


@given(st.lists(st.text(max_size=20), max_size=5), st.integers(1, 7))
def test_a_stream_is_taken_apart_wherever_it_is_cut(texts: list[str], piece: int) -> None:
    messages = [said.Line(text) for text in texts]
    data = b"".join(said.frame(message) for message in messages)
    frames, found = said.Frames(), []
    for at in range(0, len(data), piece):
        found += [said.decode_to_process(body) for body in frames.feed(data[at : at + piece])]

    assert found == messages


@given(st.binary(max_size=60))
def test_s5_a_hostile_stream_is_refused_or_waits_for_more(data: bytes) -> None:
    for decode in (said.decode_to_process, said.decode_from_process):
        try:
            for body in said.Frames().feed(data):
                decode(body)
        except MalformedMessage:
            continue
    try:
        DapFrames().feed(data)
    except MalformedMessage:
        return


def test_a_frame_that_is_too_long_is_refused() -> None:
    with pytest.raises(MalformedMessage):
        said.Frames().feed(b"\xff\xff\xff\xff")
    with pytest.raises(MalformedMessage):
        DapFrames().feed(b"x" * 5000)
    with pytest.raises(MalformedMessage):
        DapFrames().feed(b"Content-Length: 99999999999\r\n\r\n")


@given(st.integers(1, 9))
def test_messages_of_an_editor_are_whole(piece: int) -> None:
    first, second = dap_frame({"command": "attach"}), dap_frame({"command": "disconnect"})
    frames, found = DapFrames(), []
    for at in range(0, len(first + second), piece):
        found += frames.feed((first + second)[at : at + piece])

    assert found == [first, second]


def test_the_launch_entry_takes_the_place_of_the_targets_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / ".vscode" / "launch.json"
    assert add_entry(path, "alpha/kvm", "127.0.0.1", 1111) is None
    assert add_entry(path, "vm1/guest", "127.0.0.1", 2222) is None
    assert add_entry(path, "alpha/kvm", "127.0.0.1", 3333) is None

    entries = json.loads(path.read_text())["configurations"]
    assert [(entry["name"], entry["connect"]["port"]) for entry in entries] == [
        ("pefbox vm1/guest", 2222),
        ("pefbox alpha/kvm", 3333),
    ]


@pytest.mark.parametrize("content", ['{"configurations": [] // mine\n}', "[]", '{"configurations": [1]}'])
def test_a_file_that_is_more_than_json_is_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "launch.json"
    path.write_text(content)

    problem = add_entry(path, "alpha/kvm", "127.0.0.1", 1111)

    assert path.read_text() == content
    assert problem is not None
    assert '"port": 1111' in problem


def test_a_file_for_which_there_is_no_room_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "launch.json"
    linked = tmp_path / "linked.json"
    linked.symlink_to(path)
    assert add_entry(path, "alpha/kvm", "127.0.0.1", 1111) is None
    path.chmod(0o640)
    before = path.read_text()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        problem = add_entry(linked, "vm1/guest", "127.0.0.1", 2222)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert path.read_text() == before
    assert problem is not None
    assert problem.startswith("not written: File too large; the entry is {")

    assert add_entry(linked, "vm1/guest", "127.0.0.1", 2222) is None
    assert '"pefbox vm1/guest"' in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o640
    assert {file.name for file in tmp_path.iterdir()} == {"launch.json", "linked.json"}


async def test_every_task_shows_where_it_stands_without_how_trio_waits() -> None:
    async def sleeps_long() -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeps_long)
        await trio.testing.wait_all_tasks_blocked()
        root = trio.lowlevel.current_root_task()
        assert root is not None
        lines = list(task_lines(root))
        nursery.cancel_scope.cancel()

    at = next(index for index, line in enumerate(lines) if "sleeps_long" in line and "task" in line)
    assert "tests/unit/test_debugging.py" in lines[at + 1]
    assert "await trio.sleep_forever()" in lines[at + 1]
    assert not any("_core/_run.py" in line and "wait_task_rescheduled" in line for line in lines)


def test_sources_are_kept_for_a_process_that_may_open_no_file() -> None:
    import linecache

    load_sources()
    linecache.checkcache()

    file = said.__file__
    assert linecache.getline(file, 1).startswith('"""What a debugger')
    assert file in linecache.cache
    assert short_name(file) == "protocol/debugging.py"
    assert short_name(trio.__file__) == "trio/__init__.py"


async def test_without_debugpy_the_refusal_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.runtime.debugging.dap.importlib.import_module", _absent)
    debugger = Debugger("alpha/kvm", Watch(list), LOG)
    ours, theirs = socket.socketpair()
    with ours:
        debugger.enter(control.DebugMode.DAP, theirs.detach())
        (body,) = said.Frames().feed(ours.recv(4096))
        assert said.decode_from_process(body) == said.Refused("debugpy is not installed: pip install 'pefbox[debug]'")
        assert ours.recv(1) == b""


def _absent(name: str) -> object:
    raise ModuleNotFoundError(name)


async def test_a_vm_that_was_removed_is_known_to_breaks_no_more() -> None:
    """So a message without lpid is the only other VM's."""
    removed: list[str] = []
    answers: list[object] = []

    async def remove_vm(name: str) -> None:
        removed.append(name)

    async def send(packet: object) -> None:
        answers.append(packet)

    names = {1: "vm1", 2: "vm2"}
    runtime = SimpleNamespace(vm_names=names, breakpoints=None)
    service = SimpleNamespace(queries=dict, remove_vm=remove_vm)
    loop = _ControlLoop(cast(Any, SimpleNamespace(send=send)), cast(Any, runtime), cast(Any, service))

    await loop._remove_vm(7, "vm1")

    assert removed == ["vm1"]
    assert answers == [control.Answer(7)]
    assert names == {2: "vm2"}


def test_control_packets_of_debuggers_cross() -> None:
    for packet in (control.Debug(control.DebugMode.PROMPT), control.HoldTime(True)):
        assert control.decode_to_process(control.encode(packet)) == packet
    hit = control.BreakHit(1, 2, None, "text")
    assert control.decode_from_process(msgspec.msgpack.encode(hit)) == hit
