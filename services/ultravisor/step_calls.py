"""Steps that kvm asks of the ultravisor for its qemu, one after the other: how each is found, served and refused.

What is taken and given lies in the VM's stream buffer, which kvm and qemu write, too: it is copied out, then looked at.
The hypervisor learns a code; the operator the reason, from the audit log and `status`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from protocol.codes import UCode
from protocol.declare import Call
from protocol.errors import PeerError
from protocol.wire import Envelope
from services.runtime.link import Link
from services.ultravisor.life import SvmLife
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.partition import Partition
from services.ultravisor.svm_export import NotYet
from shared.stream_buffer import StreamBuffer

_STATE_REASONS = frozenset({Reason.WRONG_PHASE, Reason.TOKEN_GIVEN})
"""What a hypervisor that asks out of turn gets; it is nothing for the audit log."""


@dataclass(frozen=True, slots=True)
class StepCall:
    """One step: of which VM, its stream buffer, the arguments after the lpid."""

    partition: Partition
    stream: StreamBuffer
    args: list[int]
    cause: int

    def take(self, max_bytes: int) -> bytes:
        """What the other ultravisor said; raises MigrationRefused when it is too long, PeerError for a bad place."""
        return self.stream.read(*self._place(max_bytes))

    def borrow(self, max_bytes: int) -> memoryview:
        """As `take`, good until the next step."""
        return self.stream.borrow(*self._place(max_bytes))

    def _place(self, max_bytes: int) -> tuple[int, int]:
        offset, n_bytes = self.args[:2]
        if n_bytes > max_bytes:
            raise MigrationRefused(Reason.MALFORMED, f"{n_bytes} bytes where at most {max_bytes} are meant")
        return offset, n_bytes

    def put(self, data: bytes | memoryview) -> list[int]:
        """For the other ultravisor; returns the result that says how long it is. Raises PeerError."""
        self.stream.write(self.args[0], data)
        return [len(data)]


Step = Callable[[StepCall], Awaitable[list[int]]]
"""Returns the results."""
StepAtOnce = Callable[[StepCall], list[int]]


class StepCalls:
    """Base of whoever serves steps. `partitions` are the VMs of this host by lpid."""

    def __init__(self, partitions: dict[int, Partition], life: SvmLife) -> None:
        self.partitions, self.life = partitions, life

    def _named(self, partition: Partition, call: Call) -> str:
        """What a step belongs to, as the audit log calls it."""
        migration = partition.migration
        return "migration" if migration is None or not migration.in_progress else migration.what

    def _note(self, partition: Partition, event: str, **facts: str) -> None:
        self.life.write_audit(partition.name, event, **facts)

    def _waiting(self, link: Link, call: Call, step: Step) -> None:
        async def serve(envelope: Envelope, registers: list[int]) -> list[int]:
            at = self._find(call, registers, envelope.cause)
            if at is None:
                return [UCode.U_PARAMETER]
            try:
                return [UCode.U_SUCCESS, *await step(at)]
            except (MigrationRefused, NotYet, PeerError) as error:
                return [self._refused(at.partition, call, error)]

        link.on_waiting(call, serve)

    def _at_once(self, link: Link, call: Call, step: StepAtOnce) -> None:
        def serve(envelope: Envelope, registers: list[int]) -> list[int]:
            at = self._find(call, registers, envelope.cause)
            if at is None:
                return [UCode.U_PARAMETER]
            try:
                return [UCode.U_SUCCESS, *step(at)]
            except (MigrationRefused, NotYet, PeerError) as error:
                return [self._refused(at.partition, call, error)]

        link.on(call, serve)

    def _find(self, call: Call, registers: list[int], cause: int) -> StepCall | None:
        partition = self.partitions.get(registers[0]) if len(registers) >= call.n_args else None
        if partition is None or partition.stream is None:
            return None
        return StepCall(partition, partition.stream, registers[1:], cause)

    def _refused(self, partition: Partition, call: Call, error: MigrationRefused | NotYet | PeerError) -> UCode:
        if isinstance(error, NotYet):
            return UCode.U_RETRY
        if isinstance(error, PeerError):
            return UCode.U_PARAMETER
        if error.reason in _STATE_REASONS:
            return UCode.U_STATE
        partition.migration_refusal = str(error)
        self._note(partition, f"{self._named(partition, call)}-refused", step=call.name, reason=str(error))
        return UCode.U_PERMISSION
