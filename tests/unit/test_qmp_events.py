"""QMP events: their wire form, and the hub that brings them to sessions."""

from __future__ import annotations

import json

import pytest
import trio
import trio.testing

from services.qemu.qmp import BalloonChange, MonitorEvents, Reset, Resumed, Shutdown, ShutdownCause, Stopped
from services.qemu.qmp.events import Event, encode_event

NOW_NS = 1_700_000_000_123_456_789
TIMESTAMP = {"seconds": 1_700_000_000, "microseconds": 123_456}


@pytest.mark.parametrize(("event", "name"), [(Stopped(), "STOP"), (Resumed(), "RESUME")])
def test_an_event_without_data_has_no_data_member(event: Event, name: str) -> None:
    line = encode_event(event, NOW_NS)

    assert line.endswith(b"\r\n")
    assert json.loads(line) == {"event": name, "timestamp": TIMESTAMP}


@pytest.mark.parametrize(
    ("event", "name", "data"),
    [
        (Reset.by(ShutdownCause.HOST_RESET), "RESET", {"guest": False, "reason": "host-qmp-system-reset"}),
        (Reset.by(ShutdownCause.GUEST_RESET), "RESET", {"guest": True, "reason": "guest-reset"}),
        (Shutdown.by(ShutdownCause.HOST_QUIT), "SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}),
        (Shutdown.by(ShutdownCause.GUEST_SHUTDOWN), "SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}),
    ],
)
def test_reset_and_shutdown_say_who_did_it(event: Event, name: str, data: dict[str, object]) -> None:
    assert json.loads(encode_event(event, NOW_NS)) == {"event": name, "data": data, "timestamp": TIMESTAMP}


def test_every_subscriber_gets_the_same_line_until_it_leaves() -> None:
    hub = MonitorEvents(now_ns=lambda: NOW_NS)
    first: list[bytes] = []
    second: list[bytes] = []
    hub.subscribe(first.append)
    leave = second.append
    hub.subscribe(leave)

    hub.emit(Stopped())
    hub.unsubscribe(leave)
    hub.emit(Resumed())

    assert second == [encode_event(Stopped(), NOW_NS)]
    assert first == [encode_event(Stopped(), NOW_NS), encode_event(Resumed(), NOW_NS)]


def actuals(lines: list[bytes]) -> list[int]:
    return [json.loads(line)["data"]["actual"] for line in lines]


async def test_a_balloon_change_is_told_once_a_second_the_latest_last(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    hub, lines = MonitorEvents(), list[bytes]()
    hub.subscribe(lines.append)
    nursery.start_soon(hub.run)

    for actual in (5, 4, 3):
        hub.emit(BalloonChange(actual))
    assert actuals(lines) == [5]
    await trio.sleep(0.9)
    assert actuals(lines) == [5]
    await trio.sleep(0.2)
    assert actuals(lines) == [5, 3]

    hub.emit(BalloonChange(2))
    assert actuals(lines) == [5, 3]
    await trio.sleep(1)
    assert actuals(lines) == [5, 3, 2]
    await trio.sleep(5)
    hub.emit(BalloonChange(1))
    assert actuals(lines) == [5, 3, 2, 1]


async def test_other_events_do_not_wait_behind_one_that_is_held_back(nursery: trio.Nursery) -> None:
    hub, lines = MonitorEvents(), list[bytes]()
    hub.subscribe(lines.append)
    nursery.start_soon(hub.run)

    for event in (BalloonChange(2), BalloonChange(1), Stopped(), Stopped()):
        hub.emit(event)

    assert [json.loads(line)["event"] for line in lines] == ["BALLOON_CHANGE", "STOP", "STOP"]
