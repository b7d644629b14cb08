"""The source's side of a migration in its qemu: what is sent when.

    setup    keys for the channel, hello, and for a secure VM the handshake of the ultravisors
    active   rounds of pages, until the rest fits into the downtime
    device   the processor stands still: the last pages, the state of everything else, then the right to run

Until the right to run is given (`_gave`) any failure leaves the VM running here; after it only the destination's word
tells. A secure VM's right is its ultravisor's start token, which passes through here; a normal VM's is a frame of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from protocol import ucalls as u
from protocol.declare import Call
from protocol.errors import PefboxError
from protocol.geometry import PAGE_BYTES
from services.qemu.migration.channel import BulkChannel
from services.qemu.migration.conversation import Conversation
from services.qemu.migration.hello import hello_of
from services.qemu.migration.kvm_port import KvmPort, StepRefused, until_answered
from services.qemu.migration.machine import MovableMachine
from services.qemu.migration.outflow import Outflow
from services.qemu.migration.pacing import NS, Pacer
from services.qemu.migration.parameters import MigrationParameters
from services.qemu.migration.places import DIRTY, RECORD
from services.qemu.migration.precopy import Next, Precopy, Progress
from services.qemu.migration.status import MigrationStatus
from services.qemu.migration.stream import FrameKind
from shared.gfn_bitmap import gfns_of
from shared.host_view import HostState
from shared.stream_buffer import StreamBuffer

READY_SECONDS = 60.0
"""For the destination to load everything; until then the VM goes on here if it does not."""
WORD_SECONDS = 20.0
"""For its word that the VM runs there; without it nobody here knows."""
_OUT_OF_TURN = frozenset({"H_STATE", "U_STATE"})
"""What kvm and ultravisor say to a step of a VM that is no more what it was when the migration began."""


class MigrationFailed(PefboxError):
    """It did not happen; the VM goes on here."""


class MigrationInDoubt(PefboxError):
    """The right to run was given, and the destination's word did not come."""


@dataclass(slots=True)
class Times:
    """Nanoseconds of the monotonic clock; 0 before it happened."""

    began: int = field(default_factory=time.monotonic_ns)
    active: int = 0
    stopped: int = 0
    started: int = 0
    """At the destination, as far as this side has heard."""
    ended: int = 0


class SourceMigration:
    """One migration; `run` once. `say` is told each new status, and is where a cancellation takes hold."""

    def __init__(
        self,
        machine: MovableMachine,
        kvm: KvmPort,
        stream: StreamBuffer,
        channel: BulkChannel,
        parameters: MigrationParameters,
        say: Callable[[MigrationStatus], None],
    ) -> None:
        self.parameters = parameters
        self.times = Times()
        self._machine, self._kvm, self._stream, self._say = machine, kvm, stream, say
        self._secure = machine.secure
        self._talk = Conversation(channel, kvm, stream, "the destination", MigrationFailed)
        self._outflow = Outflow(machine, kvm, stream, channel, self._spent, secure=self._secure)
        self._n_pages = machine.vm.memory_bytes // PAGE_BYTES
        self._precopy = Precopy(self._n_pages, PAGE_BYTES, parameters.downtime_limit, self.times.began)
        self._pacer = Pacer(parameters.max_bandwidth, self.times.began)
        self._limits_changed = trio.Event()
        self._owed: list[int] = []
        """GFNs of the host's own pages that this round sends."""
        self._shared: set[int] = set()
        """Pages of a secure VM that were shared when a round last ended."""
        self._held = False
        self._gave = False

    @property
    def secure(self) -> bool:
        """Whether it is a secure VM that moves."""
        return self._secure

    @property
    def right_given(self) -> bool:
        """Whether the destination may run the VM."""
        return self._gave

    def progress(self) -> Progress:
        """How far it is."""
        return self._precopy.progress()

    def set_parameters(self, parameters: MigrationParameters) -> None:
        """Other limits from now on."""
        self.parameters = parameters
        self._precopy.downtime_limit_ms = parameters.downtime_limit
        self._pacer.set_rate(parameters.max_bandwidth, time.monotonic_ns())
        self._limits_changed.set()
        self._limits_changed = trio.Event()

    async def run(self) -> None:
        """Move the VM; returns when it runs there.

        Raises MigrationFailed or another PefboxError when it goes on here, MigrationInDoubt. Cancelled, it goes on
        here, too, unless the right to run was given: then there is nothing to cancel.
        """
        try:
            await self._set_up()
            self.times.active = time.monotonic_ns()
            self._say(MigrationStatus.ACTIVE)
            await self._rounds()
            async with self._machine.orders():
                await self._switch_over()
        except BaseException as error:
            if self._gave:
                raise MigrationInDoubt(f"{error}") from None
            with trio.CancelScope(shield=True):
                await self._take_back(str(error))
            if isinstance(error, StepRefused) and error.code in _OUT_OF_TURN:
                raise MigrationFailed(f"the VM was reset, or turns secure, meanwhile ({error})") from None
            raise
        finally:
            self.times.ended = time.monotonic_ns()

    # -- setup ------------------------------------------------------------------------------------------------

    async def _set_up(self) -> None:
        reason = self._machine.can_move
        if reason is not None:
            raise MigrationFailed(reason)
        await self._talk.send(FrameKind.HELLO, hello_of(self._machine.vm, secure=self._secure).encode())
        await self._talk.expect(FrameKind.HELLO)
        if self._secure:
            await self._shake_hands()
        # Marks of before say nothing: everything is sent once.
        await self._kvm.written(self._n_pages)
        self._begin_round(range(self._n_pages))

    async def _shake_hands(self) -> None:
        talk = self._talk
        await talk.send(FrameKind.HANDSHAKE, await talk.fetch(u.UV_EXPORT_OFFER))
        confirm = await talk.exchange(u.UV_EXPORT_ANSWER, await talk.expect(FrameKind.HANDSHAKE))
        await talk.send(FrameKind.HANDSHAKE, confirm)

    # -- rounds -----------------------------------------------------------------------------------------------

    async def _rounds(self) -> None:
        while True:
            await self._send_round()
            n_dirty = await self._end_round(u.UV_EXPORT_ROUND if self._secure else None)
            if self._precopy.end_round(n_dirty, time.monotonic_ns()) is Next.STOP:
                return

    async def _send_round(self) -> None:
        await self._outflow.send_own_pages(self._owed)
        self._owed = []
        if self._secure:
            await self._outflow.send_secure_pages()
        await self._talk.send(FrameKind.ROUND_END, b"")

    async def _spent(self, n_bytes: int, n_zero: int, n_data: int) -> None:
        self._precopy.sent(n_bytes, zero_pages=n_zero, data_pages=n_data)
        wait_ns = self._pacer.spend(n_bytes, time.monotonic_ns())
        if wait_ns and not self._held:
            # Under another limit nothing is owed.
            with trio.move_on_after(wait_ns / NS):
                await self._limits_changed.wait()

    async def _end_round(self, step: Call | None) -> int:
        """End a round of the ultravisor's by `step`; how many pages the next one owes, of both kinds."""
        n_secure, written = 0, set(await self._kvm.written(self._n_pages))
        if step is not None:
            n_bytes, n_secure = await self._kvm.ucall(step, RECORD, DIRTY)
            await self._talk.send(FrameKind.RECORD, self._stream.read(RECORD, n_bytes))
            written.update(gfns_of(self._stream.read(DIRTY, (self._n_pages + 7) // 8)))
        self._begin_round(written)
        return n_secure + len(self._owed)

    def _begin_round(self, written: set[int] | range) -> None:
        # The last round before the switch-over leaves some of them unsent.
        owed = set(self._owed).union(written)
        if not self._secure:
            self._owed = sorted(owed)
            return
        view = bytes(self._machine.host_view)
        shared = {gfn for gfn in range(self._n_pages) if view[gfn] == HostState.SHARED}
        # A page that was shared since then was not sent, whether it was written or not.
        self._owed = sorted(shared.intersection(owed) | (shared - self._shared))
        self._shared = shared

    # -- switch-over ------------------------------------------------------------------------------------------

    async def _switch_over(self) -> None:
        self._say(MigrationStatus.DEVICE)
        self._held = True
        self._machine.switching()
        self.times.stopped = time.monotonic_ns()
        if self._secure:
            await self._end_round(u.UV_EXPORT_STOP)
        else:
            await self._kvm.freeze()
        # The answers to these say that every doorbell of before has come.
        last = set(self._owed) | set(await self._kvm.written(self._n_pages))
        await self._machine.hold_devices()
        last.update(await self._kvm.written(self._n_pages))
        self._owed = [gfn for gfn in sorted(last) if not self._secure or gfn in self._shared]
        await self._send_round()
        await self._outflow.send_state()
        await self._hand_over()

    async def _hand_over(self) -> None:
        with trio.move_on_after(READY_SECONDS) as scope:
            ready = await self._talk.expect(FrameKind.RECORD if self._secure else FrameKind.READY)
        if scope.cancelled_caught:
            raise MigrationFailed(f"the destination was not ready within {READY_SECONDS:g} s")
        await trio.lowlevel.checkpoint_if_cancelled()
        # From here on a cancellation would only make it unknown where the VM runs.
        with trio.CancelScope(shield=True):
            await self._give(ready)

    async def _give(self, ready: memoryview) -> None:
        kind, payload = FrameKind.START, b""
        if self._secure:
            kind, payload = FrameKind.STATEMENT, await self._token(ready)
        self._gave = True
        await self._talk.send(kind, payload)
        with trio.move_on_after(WORD_SECONDS) as scope:
            word = await self._talk.expect(FrameKind.STATEMENT if self._secure else FrameKind.STARTED)
            self.times.started = time.monotonic_ns()
        if scope.cancelled_caught:
            raise MigrationInDoubt(f"no word of the destination within {WORD_SECONDS:g} s")
        if self._secure and not await self._take_word(word):
            self._gave = False
            raise MigrationFailed("the destination gave the VM up")
        self._machine.left()

    async def _token(self, ready: memoryview) -> bytes:
        """The ultravisor's start token, in return for READY."""
        # Whatever becomes of the answer, it may have stored that it gave the token.
        self._gave = True
        try:
            return await self._talk.exchange(u.UV_EXPORT_READY, ready)
        except StepRefused as refused:
            if await self.cancel_export():
                self._gave = False
                raise MigrationFailed(str(refused)) from None
            raise

    async def _take_word(self, word: memoryview) -> bool:
        (moved,) = await self._talk.give(u.UV_EXPORT_STATEMENT, word)
        return bool(moved)

    async def _take_back(self, reason: str) -> None:
        """The VM goes on here: what was stopped runs again."""
        await self._talk.give_up(reason)
        if self._secure:
            await self.cancel_export()
        elif self._held and self._machine.runs_here:
            await self._go_on()
        if self._held:
            self._machine.release_devices()
            self._machine.stays()
            self._held = False

    async def cancel_export(self) -> bool:
        """Whether the ultravisor has taken the VM back by this."""
        # What is refused was not begun, or ended by its own failure: there is nothing to cancel.
        try:
            await until_answered(lambda: self._kvm.ucall(u.UV_EXPORT_CANCEL, RECORD))
        except PefboxError:
            return False
        return True

    async def _go_on(self) -> None:
        try:
            await until_answered(self._kvm.go_on)
        except PefboxError:
            # kvm is dead, or the VM is in no state to go on: its own end says why.
            return
