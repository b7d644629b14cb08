"""Migrations of one machine, as those who steer it see them: the launcher, and users of the monitor.

The launcher brings the two qemus together: a control link (CURVE) and a stream socket. The source makes the key of the
bulk channel and sends it over the link; with key and socket the destination begins to listen.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import msgspec
import trio

from protocol.causes import migration_cause
from protocol.codes import HCode
from protocol.errors import PefboxError, UserError
from protocol.messages import MIGRATION_KEY, MigrationKeyBody, Status
from protocol.wire import Envelope
from services.qemu.migration.channel import KEY_BYTES, BulkChannel, End
from services.qemu.migration.destination import ArrivalStatus, DestinationMigration
from services.qemu.migration.kvm_port import KvmPort, until_answered
from services.qemu.migration.machine import MovableMachine
from services.qemu.migration.parameters import MigrationParameters
from services.qemu.migration.source import MigrationInDoubt, SourceMigration
from services.qemu.migration.status import IN_DOUBT, MigrationStatus, step
from services.qemu.shaping import Shaper
from services.runtime.cause import CAUSE
from services.runtime.link import Link
from services.runtime.log import Log
from services.runtime.tracer import UNTRACED, Tracer
from shared.link_shape import PLAIN, LinkShape
from shared.stream_buffer import StreamBuffer

CONNECT_SECONDS = 10.0
_NS_PER_MS = 1_000_000

TellStatus = Callable[[MigrationStatus], None]
WantMove = Callable[[str], Awaitable[None]]
"""Ask the launcher to bring this machine and a new one on the named host together."""


class MigrationControl:
    """`tell` is told each status, for the monitor's events; `want_move` is for a user of the monitor."""

    def __init__(
        self,
        machine: MovableMachine,
        kvm: KvmPort,
        stream: StreamBuffer,
        nursery: trio.Nursery,
        log: Log,
        tell: TellStatus,
        want_move: WantMove,
        tracer: Tracer = UNTRACED,
    ) -> None:
        self._machine, self._kvm, self._stream = machine, kvm, stream
        self._nursery, self._log, self._tell, self._want_move = nursery, log, tell, want_move
        self._tracer = tracer
        self._n_moves = 0
        self._cause = 0
        """One for all that a migration does, here and where the VM arrives: it comes with the key."""
        self._own = MigrationParameters()
        """What the monitor's user has set."""
        self._limits: dict[str, Any] = {}
        """What was given with the migration that is under way, by QEMU's names."""
        self.status = MigrationStatus.NONE
        self._asked = ""
        """The host that the monitor's user asked for last."""
        self.reason = ""
        self._in_doubt = False
        self._link: Link | None = None
        self._socket: socket.socket | None = None
        self._key: bytes | None = None
        self._shape: LinkShape | None = None
        self._channel: BulkChannel | None = None
        """The last one that there was."""
        self._source: SourceMigration | None = None
        self._scope: trio.CancelScope | None = None
        self._destination: DestinationMigration | None = None
        self._arrival: ArrivalStatus | None = None
        self._arrival_reason = ""

    # -- what the launcher brings -----------------------------------------------------------------------------

    def use_link(self, link: Link) -> None:
        """The control link to the other qemu; before it is served."""
        self._link = link
        if MIGRATION_KEY.number in link.kind.upward and self._machine.vm.incoming and self._arrival is None:
            link.on(MIGRATION_KEY, self._take_key)

    def take_socket(self, fd: int) -> None:
        """This end of the stream socket."""
        if self._socket is not None:
            self._socket.close()
        self._socket = socket.socket(fileno=fd)
        self._begin_arrival()

    def set_shape(self, shape: LinkShape | None) -> None:
        """What the link to the other host does to the channel, to the one that is open as to the next."""
        self._shape = shape
        if self._channel is not None:
            self._apply_shape(self._channel, shape or PLAIN)

    def _open_channel(self, connection: socket.socket, key: bytes, end: End) -> BulkChannel:
        channel = self._channel = BulkChannel(connection, key, end)
        if self._shape is not None:
            self._apply_shape(channel, self._shape)
        return channel

    def _apply_shape(self, channel: BulkChannel, shape: LinkShape) -> None:
        channel.set_shape(shape, Shaper(Random(self._machine.vm.name)), self._nursery)

    def _take_key(self, envelope: Envelope, body: MigrationKeyBody) -> Status:
        if self._key is not None:
            return Status(HCode.H_STATE)
        self._key, self._cause = body.key, envelope.cause
        self._begin_arrival()
        return Status(HCode.H_SUCCESS)

    # -- source -----------------------------------------------------------------------------------------------

    def start(self, parameters: dict[str, Any], asked: str | None = None) -> None:
        """Begin to move the machine, with `parameters` by QEMU's names; raises UserError.

        `asked` is the host that the monitor's user asked for, if it was him: he may have thought better of it.
        """
        if asked is not None and (self.status is not MigrationStatus.SETUP or self._asked != asked):
            raise UserError("the migration was cancelled meanwhile: try again")
        if self._source is not None and (self.status.running or self._in_doubt):
            raise UserError("There's a migration process in progress")
        if self._link is None or self._socket is None:
            raise UserError("no destination was prepared: pefbox migrate VM HOST")
        self.parameters.updated(parameters)
        self._limits = parameters
        if self.status is not MigrationStatus.SETUP:
            self._enter(MigrationStatus.SETUP)
        connection, self._socket = self._socket, None
        self._nursery.start_soon(self._move, self._link, connection)

    async def _move(self, link: Link, connection: socket.socket) -> None:
        CAUSE.set(self._cause)
        key = os.urandom(KEY_BYTES)
        channel = self._open_channel(connection, key, End.SOURCE)
        self._source = SourceMigration(self._machine, self._kvm, self._stream, channel, self.parameters, self._enter)
        with trio.CancelScope() as self._scope:
            try:
                await self._send_key(link, key)
                await self._source.run()
            except MigrationInDoubt as doubt:
                self._doubt(str(doubt))
            except PefboxError as error:
                self._fail(str(error))
            except Exception as error:
                self._log.error("migration", exc_info=error)
                self._fail(f"internal error: {error}")
            else:
                # This process is killed as soon as the launcher knows. Nothing can be cancelled any more.
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._tracer.flush)
                self._enter(MigrationStatus.COMPLETED)
            finally:
                channel.close()
        if self._scope.cancelled_caught:
            self._enter(MigrationStatus.CANCELLED)

    async def _send_key(self, link: Link, key: bytes) -> None:
        with trio.move_on_after(CONNECT_SECONDS) as scope:
            status = await link.call(MIGRATION_KEY, MigrationKeyBody(key), self._cause)
        if scope.cancelled_caught or status.code != HCode.H_SUCCESS:
            raise UserError("the destination's qemu takes no migration")

    def _fail(self, reason: str) -> None:
        self.reason = reason
        self._log.warning("migration failed", reason=reason)
        if self.status is MigrationStatus.CANCELLING:
            self._enter(MigrationStatus.CANCELLED)
        elif self.status.running:
            self._enter(MigrationStatus.FAILED)

    def _doubt(self, reason: str) -> None:
        self.reason, self._in_doubt = reason, True
        self._log.error("migration in doubt", reason=reason)
        self._note("source", IN_DOUBT)

    def _enter(self, status: MigrationStatus) -> None:
        if status is MigrationStatus.SETUP:
            self.reason, self._source = "", None
            self._n_moves += 1
            vm = self._machine.vm
            self._cause = migration_cause(vm.lpid, vm.incarnation, self._n_moves)
        self.status = step(self.status, status)
        if status.ended:
            self._limits = {}
        self._log.info("migration", status=status.value)
        self._note("source", status.value)
        self._tell(status)

    def _note(self, side: str, status: str) -> None:
        if self._tracer.on:
            self._tracer.migration_stepped(self._machine.vm.lpid, side, status, self._cause)

    def cancel(self) -> None:
        """The machine stays here, unless the right to run was given already."""
        source = self._source
        if not self.status.running or self._in_doubt or self.status is MigrationStatus.CANCELLING:
            return
        if source is not None and source.right_given:
            raise UserError("too late: the destination may run the VM already")
        self.reason = "cancelled"
        self._enter(MigrationStatus.CANCELLING)
        if self._scope is not None and source is not None:
            self._scope.cancel()
        else:
            self._enter(MigrationStatus.CANCELLED)

    @property
    def parameters(self) -> MigrationParameters:
        """What counts now."""
        return self._own.updated(self._limits)

    def set_parameters(self, changes: dict[str, Any]) -> None:
        """Other limits, also for a migration that is under way; raises UserError that names what is wrong."""
        self._own = self._own.updated(changes)
        self._limits = {name: limit for name, limit in self._limits.items() if name not in changes}
        self._use_parameters()

    def limit(self, changes: dict[str, Any]) -> None:
        """Other limits for the migration that is under way alone; raises UserError that names what is wrong."""
        self.parameters.updated(changes)
        if self.status.running:
            self._limits |= changes
            self._use_parameters()

    def _use_parameters(self) -> None:
        if self._source is not None:
            self._source.set_parameters(self.parameters)

    async def ask_move(self, host: str) -> None:
        """A user of the monitor wants the machine on `host`; raises UserError."""
        if self.status.running or self._in_doubt:
            raise UserError("There's a migration process in progress")
        self._enter(MigrationStatus.SETUP)
        self._asked = host
        await self._want_move(host)

    def refused(self, reason: str) -> None:
        """The launcher does not do what `ask_move` asked for."""
        if self.status is MigrationStatus.SETUP and self._source is None:
            self._fail(reason)

    async def resume(self) -> None:
        """An operator has found out that the VM runs here again; also when this was said before.

        Raises UserError when there was no doubt, or the ultravisor does not let it run.
        """
        source = self._source
        if source is None or not source.right_given:
            raise UserError("the migration is not in doubt")
        # It may never have given the token, and then nobody has told it that the VM stays.
        if source.secure and self._in_doubt and not await source.cancel_export():
            raise UserError("the ultravisor has not taken the VM back")
        if not self._in_doubt:
            return
        self._in_doubt = False
        self._machine.release_devices()
        self._machine.stays()
        self._enter(MigrationStatus.FAILED)
        if not source.secure and self._machine.runs_here:
            await until_answered(self._kvm.go_on)

    # -- destination ------------------------------------------------------------------------------------------

    def _begin_arrival(self) -> None:
        if not self._machine.vm.incoming or self._key is None or self._socket is None or self._arrival is not None:
            return
        self._arrival = ArrivalStatus.SETUP
        channel = self._open_channel(self._socket, self._key, End.DESTINATION)
        self._socket = None
        self._destination = DestinationMigration(self._machine, self._kvm, self._stream, channel, self._arriving)
        self._nursery.start_soon(self._arrive, self._destination)

    async def has_started(self) -> None:
        """An operator brought the VM the right to run here; raises UserError when none has arrived."""
        if self._destination is None:
            raise UserError("no machine arrives here")
        await self._destination.has_started()
        self._arrival_reason = ""

    async def _arrive(self, destination: DestinationMigration) -> None:
        CAUSE.set(self._cause)
        try:
            await destination.run()
        except PefboxError as error:
            self._log.warning("the VM does not arrive", reason=str(error))
            self._fail_arrival(str(error))
        except Exception as error:
            self._log.error("migration", exc_info=error)
            self._fail_arrival(f"internal error: {error}")

    def _fail_arrival(self, reason: str) -> None:
        self._arrival, self._arrival_reason = ArrivalStatus.FAILED, reason
        self._note("destination", ArrivalStatus.FAILED.value)

    def _arriving(self, status: ArrivalStatus) -> None:
        self._arrival = status
        self._log.info("arrival", status=status.value)
        self._note("destination", status.value)

    # -- what is told -----------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """All of it, for the launcher. Of an incoming machine that has not moved on: its arrival."""
        if self._arrival is not None and self.status is MigrationStatus.NONE:
            return {"role": "destination", "status": self._arrival.value, "reason": self._arrival_reason}
        status = IN_DOUBT if self._in_doubt else self.status.value
        return {"role": "source", "status": status, "reason": self.reason, **self.facts()}

    def facts(self) -> dict[str, Any]:
        """Of the migration that is under way or was the last: counts, and times in ms; empty before the first."""
        source = self._source
        if source is None:
            return {}
        times, now_ns = source.times, time.monotonic_ns()
        ended_ns = times.ended or now_ns
        facts: dict[str, Any] = {
            "secure": source.secure,
            "total_time_ms": (ended_ns - times.began) // _NS_PER_MS,
            "setup_time_ms": ((times.active or ended_ns) - times.began) // _NS_PER_MS,
            "downtime_ms": ((times.started or ended_ns) - times.stopped) // _NS_PER_MS if times.stopped else None,
            **msgspec.structs.asdict(source.progress()),
        }
        return facts
