"""One QMP session without a socket: negotiation, commands, refusals, ids."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import structlog
import trio
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import PeerGone
from services.qemu.qmp import COMMANDS, Command, CommandFailed, CommandTable, Monitored, MonitorEvents, RunState
from services.qemu.qmp.commands import Context
from services.qemu.qmp.dialogue import Dialogue
from services.qemu.qmp.framing import Malformed
from services.qemu.qmp.schema import ErrorClass, Schema

JsonObject = dict[str, Any]

ARGUMENTS: dict[str, JsonObject] = {"balloon": {"value": 1 << 20}}
"""Of the commands that want some."""


class Machine:
    """A machine that is only its run state, with a record of what it was asked."""

    def __init__(self, state: RunState = RunState.RUNNING) -> None:
        self.state = state
        self.asked: list[str] = []
        self.failure: Exception | None = None

    async def stop(self) -> None:
        self._ask("stop")
        self.state = RunState.PAUSED

    async def cont(self) -> None:
        self._ask("cont")
        self.state = RunState.RUNNING

    async def reset(self) -> None:
        self._ask("reset")

    async def quit(self) -> None:
        self._ask("quit")

    async def status(self) -> RunState:
        return self.state

    async def balloon(self) -> int:
        self._ask("query-balloon")
        return 64 << 20

    async def set_balloon(self, target_bytes: int) -> None:
        self._ask(f"balloon {target_bytes}")

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.failure is not None:
            raise self.failure


def monitored(machine: Machine) -> Monitored:
    return Monitored("vm1", machine, MonitorEvents(), structlog.wrap_logger(structlog.ReturnLogger()))


def new_dialogue(machine: Machine, commands: CommandTable = COMMANDS) -> Dialogue:
    return Dialogue(monitored(machine), commands)


async def say(dialogue: Dialogue, request: object) -> JsonObject:
    line = await dialogue.answer(json.dumps(request).encode())
    assert line.endswith(b"\r\n")
    assert line.count(b"\n") == 1
    answer: JsonObject = json.loads(line)
    return answer


async def settled(machine: Machine, commands: CommandTable = COMMANDS) -> Dialogue:
    dialogue = new_dialogue(machine, commands)
    assert await say(dialogue, {"execute": "qmp_capabilities"}) == {"return": {}}
    return dialogue


def test_the_greeting_names_the_version_and_offers_no_capability() -> None:
    greeting = json.loads(new_dialogue(Machine()).greeting())

    assert greeting == {
        "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "pefbox"}, "capabilities": []}
    }


async def test_before_negotiation_every_other_command_is_not_found() -> None:
    machine = Machine()
    dialogue = new_dialogue(machine)

    for name in ("stop", "query-status", "no-such"):
        answer = await say(dialogue, {"execute": name})
        assert answer["error"]["class"] == "CommandNotFound"

    assert machine.asked == []
    assert not dialogue.negotiated


@pytest.mark.parametrize("wanted", [["oob"], ["x"], ["oob", "oob"]])
async def test_a_capability_that_was_not_offered_is_refused_and_negotiation_stays_open(wanted: list[str]) -> None:
    dialogue = new_dialogue(Machine())

    refusal = await say(dialogue, {"execute": "qmp_capabilities", "arguments": {"enable": wanted}})
    assert refusal["error"]["class"] == "GenericError"
    assert not dialogue.negotiated

    assert await say(dialogue, {"execute": "qmp_capabilities", "arguments": {"enable": []}}) == {"return": {}}
    assert dialogue.negotiated


async def test_a_second_negotiation_is_refused() -> None:
    dialogue = await settled(Machine())

    answer = await say(dialogue, {"execute": "qmp_capabilities"})

    assert answer["error"]["class"] == "CommandNotFound"


async def test_query_commands_lists_exactly_the_declared_commands() -> None:
    answer = await say(await settled(Machine()), {"execute": "query-commands"})

    names = [row["name"] for row in answer["return"]]
    assert names == [command.name for command in COMMANDS]
    assert {"query-status", "query-version", "stop", "cont", "system_reset", "quit", "qmp_capabilities"} <= set(names)


async def test_every_declared_command_returns_what_it_declares() -> None:
    for command in COMMANDS:
        dialogue = new_dialogue(Machine()) if command.name == "qmp_capabilities" else await settled(Machine())
        answer = await say(dialogue, {"execute": command.name, "arguments": ARGUMENTS.get(command.name, {})})
        msgspec.convert(answer["return"], command.result)


@pytest.mark.parametrize("state", list(RunState))
async def test_query_status_shows_the_run_state(state: RunState) -> None:
    answer = await say(await settled(Machine(state)), {"execute": "query-status"})

    assert answer["return"] == {"running": state is RunState.RUNNING, "status": state.value}


async def test_commands_reach_the_machine() -> None:
    machine = Machine()
    dialogue = await settled(machine)

    for name in ("stop", "cont", "system_reset", "quit"):
        assert await say(dialogue, {"execute": name}) == {"return": {}}

    assert machine.asked == ["stop", "cont", "reset", "quit"]


async def test_the_balloon_is_set_and_shown_in_bytes() -> None:
    machine = Machine()
    dialogue = await settled(machine)

    assert await say(dialogue, {"execute": "balloon", "arguments": {"value": 1 << 20}}) == {"return": {}}
    assert await say(dialogue, {"execute": "query-balloon"}) == {"return": {"actual": 64 << 20}}

    assert machine.asked == ["balloon 1048576", "query-balloon"]


@pytest.mark.parametrize("value", [0, -1, -(1 << 63)])
async def test_a_balloon_of_no_size_is_refused_as_qemu_does(value: int) -> None:
    machine = Machine()

    answer = await say(await settled(machine), {"execute": "balloon", "arguments": {"value": value}})

    assert answer["error"] == {"class": "GenericError", "desc": "Parameter 'target' expects a size"}
    assert machine.asked == []


@pytest.mark.parametrize("arguments", [{}, {"value": "1M"}, {"value": True}, {"value": 1.5}, {"target": 1}])
async def test_a_balloon_with_wrong_arguments_is_refused(arguments: JsonObject) -> None:
    machine = Machine()

    answer = await say(await settled(machine), {"execute": "balloon", "arguments": arguments})

    assert answer["error"]["class"] == "GenericError"
    assert machine.asked == []


@pytest.mark.parametrize("state", [RunState.SHUTDOWN, RunState.GUEST_PANICKED, RunState.INTERNAL_ERROR])
async def test_cont_is_refused_where_only_a_reset_helps(state: RunState) -> None:
    machine = Machine(state)

    answer = await say(await settled(machine), {"execute": "cont"})

    assert answer["error"]["class"] == "GenericError"
    assert state.value in answer["error"]["desc"]
    assert machine.asked == []


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (
            CommandFailed("no such disk", ErrorClass.DEVICE_NOT_FOUND),
            {"class": "DeviceNotFound", "desc": "no such disk"},
        ),
        (PeerGone("alpha/kvm", "gone"), {"class": "GenericError", "desc": "alpha/kvm is gone"}),
    ],
)
async def test_a_failure_of_the_machine_is_the_answer(failure: Exception, expected: JsonObject) -> None:
    machine = Machine()
    machine.failure = failure

    answer = await say(await settled(machine), {"execute": "stop", "id": 1})

    assert answer == {"error": expected, "id": 1}


async def test_a_defect_in_a_handler_is_an_error_without_its_details_and_the_session_goes_on() -> None:
    machine = Machine()
    machine.failure = ZeroDivisionError("internal-detail")
    dialogue = await settled(machine)

    answer = await say(dialogue, {"execute": "stop"})

    assert answer["error"]["class"] == "GenericError"
    assert "internal-detail" not in answer["error"]["desc"]
    assert "return" in await say(dialogue, {"execute": "query-status"})


@pytest.mark.parametrize(
    ("request_object", "expected_class"),
    [
        ({"execute": "no-such"}, "CommandNotFound"),
        ({"execute": "stop", "arguments": {"force": True}}, "GenericError"),
        ({"execute": "stop", "arguments": []}, "GenericError"),
        ({"execute": "stop", "arguments": None}, "GenericError"),
        ({"execute": "stop", "extra": 1}, "GenericError"),
        ({"exec-oob": "stop"}, "GenericError"),
        ({"execute": 5}, "GenericError"),
        ({"execute": ["stop"]}, "GenericError"),
        ({"arguments": {}}, "GenericError"),
        ({}, "GenericError"),
    ],
)
async def test_a_bad_request_is_refused_with_its_id_and_does_nothing(
    request_object: JsonObject, expected_class: str
) -> None:
    machine = Machine()

    answer = await say(await settled(machine), {**request_object, "id": "mine"})

    assert answer["error"]["class"] == expected_class
    assert answer["id"] == "mine"
    assert machine.asked == []


@pytest.mark.parametrize(
    "message",
    [b"{execute}", b'{"a":1,}', b"[]", b'{"a": 1]', b'{"a": "\xc3"}', b'{"a": NaN}', b'{"a": "\\ud800"}', *Malformed],
)
async def test_input_that_is_no_object_is_answered_without_id(message: bytes | Malformed) -> None:
    dialogue = await settled(Machine())

    answer = json.loads(await dialogue.answer(message))

    assert answer.keys() == {"error"}
    assert answer["error"]["class"] == "GenericError"
    assert dialogue.statistics.refused == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_any_json_value_as_id_comes_back_equal(request_id: object) -> None:
    async def ask() -> JsonObject:
        return await say(await settled(Machine()), {"execute": "query-status", "id": request_id})

    answer = trio.run(ask)

    assert answer["id"] == request_id
    assert type(answer["id"]) is type(request_id)


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_get_exactly_one_answer_line(message: bytes) -> None:
    async def ask() -> bytes:
        return await new_dialogue(Machine()).answer(message)

    line = trio.run(ask)

    assert line.count(b"\n") == 1
    assert "error" in json.loads(line)


class ResizeArguments(Schema, frozen=True, rename="kebab"):
    """Arguments of a command that a later part could declare."""

    node_name: str
    size_bytes: int


async def resize(_context: Context, arguments: ResizeArguments) -> dict[str, int]:
    return {arguments.node_name: arguments.size_bytes}


EXTENDED = COMMANDS.extended(Command("resize", ResizeArguments, dict[str, int], resize))


async def test_a_declared_command_is_decoded_listed_and_run() -> None:
    dialogue = await settled(Machine(), EXTENDED)

    listed = await say(dialogue, {"execute": "query-commands"})
    answer = await say(dialogue, {"execute": "resize", "arguments": {"node-name": "d0", "size-bytes": 4}})

    assert {"name": "resize"} in listed["return"]
    assert answer == {"return": {"d0": 4}}


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"node-name": "d0"}, "size-bytes"),
        ({"node-name": 1, "size-bytes": 4}, "node-name"),
        ({"node-name": "d0", "size-bytes": "4"}, "size-bytes"),
        ({"node-name": "d0", "size-bytes": 4, "other": 1}, "other"),
    ],
)
async def test_wrong_arguments_are_refused_by_name(arguments: JsonObject, culprit: str) -> None:
    answer = await say(await settled(Machine(), EXTENDED), {"execute": "resize", "arguments": arguments})

    assert answer["error"]["class"] == "GenericError"
    assert culprit in answer["error"]["desc"]


def test_a_command_declared_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="twice"):
        EXTENDED.extended(Command("resize", ResizeArguments, dict[str, int], resize))
