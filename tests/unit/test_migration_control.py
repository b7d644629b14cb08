"""Migrations of one machine as the launcher and the monitor's user steer them, against a played destination."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest
import trio

from protocol.codes import HCode
from protocol.errors import UserError
from protocol.messages import Status
from services.qemu.migration.control import MigrationControl
from services.qemu.migration.kvm_port import KvmPort
from services.qemu.migration.machine import MovableMachine
from services.qemu.migration.parameters import MigrationParameters
from services.qemu.migration.status import MigrationStatus
from services.runtime.link import Link
from services.runtime.log import Log
from shared.stream_buffer import StreamBuffer
from tests.unit.test_departure_from_qemu import PlayedKvm, PlayedMachine
from tests.unit.test_departure_from_qemu import stream as stream
from tests.unit.until import until

DEFAULT = MigrationParameters()


class PlayedLink:
    """To a destination that takes the key."""

    async def call(self, _message: object, _body: object, _cause: int) -> Status:
        """As Link."""
        return Status(HCode.H_SUCCESS)


class SilentLog:
    """A log that nobody reads."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_words, **_facts: None


class Rig:
    """The control of one machine, and the socket of the destination that it was given last."""

    def __init__(self, stream: StreamBuffer, nursery: trio.Nursery) -> None:
        self.asked: list[str] = []
        self._ends: list[socket.socket] = []

        async def want_move(host: str) -> None:
            self.asked.append(host)

        self.control = MigrationControl(
            cast(MovableMachine, PlayedMachine(secure=False)),
            cast(KvmPort, PlayedKvm()),
            stream,
            nursery,
            cast(Log, SilentLog()),
            lambda _status: None,
            want_move,
        )
        self.control._link = cast(Link, PlayedLink())

    def give_socket(self) -> None:
        """As the launcher, before it orders the start."""
        ours, theirs = socket.socketpair()
        self._ends.append(theirs)
        self.control.take_socket(os.dup(ours.fileno()))
        ours.close()

    async def fail(self) -> None:
        """The destination is gone; returns when the migration has ended."""
        self._ends.pop().close()
        await until(lambda: self.control.status.ended)

    def close(self) -> None:
        """All that is open."""
        for end in (*self._ends, self.control._socket):
            if end is not None:
                end.close()


@asynccontextmanager
async def rigged(stream: StreamBuffer) -> AsyncIterator[Rig]:
    async with trio.open_nursery() as nursery:
        rig = Rig(stream, nursery)
        yield rig
        rig.close()
        nursery.cancel_scope.cancel()


async def test_limits_given_with_a_migration_end_with_it(stream: StreamBuffer) -> None:
    async with rigged(stream) as rig:
        rig.control.set_parameters({"downtime-limit": 500})
        rig.give_socket()
        rig.control.start({"max-bandwidth": 5})
        rig.control.limit({"downtime-limit": 40})
        during = rig.control.parameters
        await rig.fail()

        assert (during.max_bandwidth, during.downtime_limit) == (5, 40)
        assert rig.control.status is MigrationStatus.FAILED
        assert rig.control.parameters == DEFAULT.updated({"downtime-limit": 500})


async def test_what_the_monitor_s_user_sets_meanwhile_counts_at_once_and_stays(stream: StreamBuffer) -> None:
    async with rigged(stream) as rig:
        rig.give_socket()
        rig.control.start({"max-bandwidth": 5, "downtime-limit": 7})
        rig.control.set_parameters({"max-bandwidth": 9})
        during = rig.control.parameters
        await rig.fail()

        assert (during.max_bandwidth, during.downtime_limit) == (9, 7)
        assert rig.control.parameters == DEFAULT.updated({"max-bandwidth": 9})


async def test_a_move_that_the_monitor_s_user_wants_no_more_does_not_begin(stream: StreamBuffer) -> None:
    async with rigged(stream) as rig:
        await rig.control.ask_move("beta")
        rig.control.cancel()
        rig.give_socket()

        with pytest.raises(UserError, match="cancelled meanwhile"):
            rig.control.start({}, asked="beta")
        assert rig.control.status is MigrationStatus.CANCELLED


async def test_a_move_begins_to_no_other_host_than_the_monitor_s_user_asked_for_last(stream: StreamBuffer) -> None:
    async with rigged(stream) as rig:
        await rig.control.ask_move("beta")
        rig.control.cancel()
        await rig.control.ask_move("gamma")
        rig.give_socket()

        with pytest.raises(UserError, match="cancelled meanwhile"):
            rig.control.start({}, asked="beta")
        rig.control.start({}, asked="gamma")
        await rig.fail()
