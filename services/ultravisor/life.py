"""How secure VMs of a host begin and end: ESM with its abort, termination, failure."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable

import trio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from protocol.codes import HCode, UCode
from protocol.errors import CallTimeout, HostFault, ImageRefused
from protocol.hcalls import H_SVM_INIT_ABORT
from services.runtime.confine import landlock_abi
from services.runtime.line_limit import LineLimit
from services.runtime.process import Runtime
from services.ultravisor.audit import AuditLog
from services.ultravisor.esm import EsmSwitch, SecureBoot, first_refusal
from services.ultravisor.esm_files import EsmFiles
from services.ultravisor.hypervisor import Hypervisor
from services.ultravisor.migration.ledger import FileLedger
from services.ultravisor.partition import Partition
from services.ultravisor.rtas_bounce import RtasBounce
from services.ultravisor.secure_memory import SecureAccount
from services.ultravisor.sharing import SvmBroken
from services.ultravisor.snapshot.book import vm_begins
from services.ultravisor.svm import Svm, SvmPhase

_GUEST_KILL_SECONDS = 3.0


class SvmLife:
    """Begins and ends the secure VMs of one host."""

    def __init__(
        self,
        runtime: Runtime,
        hypervisor: Hypervisor,
        account: SecureAccount,
        key: RSAPrivateKey,
        audit: AuditLog,
        ledger: FileLedger | None = None,
    ) -> None:
        self._runtime = runtime
        self._hypervisor = hypervisor
        self._account = account
        self._key = key
        self._audit = audit
        self._ledger = ledger
        self._limit = LineLimit(time.monotonic)
        self.files: dict[int, EsmFiles] = {}
        self.bounce: dict[int, RtasBounce] = {}

    def in_background(self, work: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Have `work` done in a task that lives as long as the process."""
        self._runtime.nursery.start_soon(work, *arguments)

    def write_audit(self, vm: str, event: str, **facts: str | int | bool) -> None:
        """One line, unless the VM has caused too many of its kind.

        A machine that cannot store it is reported and the service goes on.
        """
        left_out = self._limit.admit(vm, event)
        if left_out is None:
            return
        try:
            self._audit.write(vm, event, {**facts, "left_out_before": left_out} if left_out else facts)
        except HostFault as fault:
            self._runtime.log.error("audit", reason=str(fault))

    def void_snapshots(self, vm: str) -> None:
        """The VM begins in another way than out of a snapshot. Raises HostFault, and it must not begin then."""
        n_void = 0 if self._ledger is None else vm_begins(self._ledger, vm)
        if n_void:
            self.write_audit(vm, "snapshot-void", snapshots=n_void, reason="the VM is started again")

    async def esm(self, partition: Partition, kbase: int, fdt_gpa: int, cause: int) -> list[int]:
        """UV_ESM; the reply matters only when it failed, since a VM that is secure goes on at kbase."""
        bad = first_refusal(partition, kbase, fdt_gpa)
        if bad is not None:
            return [UCode.U_P2 if bad == "kbase" else UCode.U_P3]
        if partition.removed:
            return [UCode.U_PERMISSION]
        if partition.svm is not None or not partition.ended.is_set():
            return [UCode.U_RETRY]
        try:
            self.void_snapshots(partition.name)
            svm = partition.make_svm(self._account)
        except HostFault as fault:
            self._note_refusal(partition, str(fault))
            return [UCode.U_PARAMETER]
        partition.svm = svm
        reasons: list[str] = []
        try:
            result = await partition.operation(self._switch(partition, svm, kbase, fdt_gpa, cause, reasons))
        except SvmBroken as broken:
            await self.fail(partition, broken.reason)
            return [UCode.U_STATE]
        except Exception as error:
            await self.fail_for_error(partition, error)
            return [UCode.U_STATE]
        if partition.svm is not svm:
            # Its end answered what was open, so a reason found meanwhile says nothing.
            self._note_refusal(partition, "the VM was ended before the switch was complete")
            return [UCode.U_STATE]
        if reasons:
            return await self._abort(partition, svm, reasons[0], cause)
        return result

    async def _switch(
        self, partition: Partition, svm: Svm, kbase: int, fdt_gpa: int, cause: int, reasons: list[str]
    ) -> list[int]:
        started = time.monotonic()
        switch = EsmSwitch(partition, svm, self._hypervisor, self._key, cause)
        try:
            boot = await switch.run(kbase, fdt_gpa)
        except ImageRefused as refused:
            reasons.append(refused.reason)
            return [UCode.U_PARAMETER]
        # Before the start: the guest's first instruction may ask for them.
        self.files[partition.lpid] = boot.files
        self.bounce[partition.lpid] = RtasBounce(boot.bounce_gfns, partition.ram)
        await switch.start_guest(kbase, fdt_gpa)
        self._note_success(partition, svm, boot, time.monotonic() - started)
        return [UCode.U_SUCCESS]

    def _note_success(self, partition: Partition, svm: Svm, boot: SecureBoot, seconds: float) -> None:
        partition.secure_since = time.time()
        partition.note_esm("secure", "")
        self.write_audit(
            partition.name,
            "esm",
            lockbox=boot.lockbox,
            kernel_bytes=boot.kernel_bytes,
            initrd_bytes=boot.initrd_bytes,
            secure_memory=svm.memory.mode,
            milliseconds=round(seconds * 1000),
            missing_protections=", ".join(self.missing_protections()) or "none",
        )

    def missing_protections(self) -> list[str]:
        """Protections of this process and of the host's roles that the machine lacks or the start left out."""
        missing = [f"{name} {state}" for name, state in self._runtime.protections.items() if not _covered(name, state)]
        if not landlock_abi():
            missing.append("landlock of kvm and qemu missing: they can read the keys of this user")
        return missing

    async def _abort(self, partition: Partition, svm: Svm, reason: str, cause: int) -> list[int]:
        """The VM goes on as a normal one: kvm gets the pages back as the host had given them."""
        svm.phase = SvmPhase.ABORTING
        self._note_refusal(partition, reason)
        try:
            result = await self._hypervisor.ask(partition.lpid, H_SVM_INIT_ABORT, [], cause)
        except CallTimeout as timeout:
            await self.fail(partition, f"hypervisor-silent: {timeout}")
            return [UCode.U_PARAMETER]
        if result[0] == HCode.H_STATE and partition.svm is svm:
            # For kvm the switch is complete, and every page that was not taken in is dropped.
            await self.fail(partition, "hypervisor-refused-abort")
        elif partition.svm is svm:
            await self.terminate(partition, "esm-aborted")
        return [UCode.U_PARAMETER]

    def _note_refusal(self, partition: Partition, reason: str) -> None:
        partition.note_esm("refused", reason)
        self._runtime.log.warning("ESM refused", vm=partition.name, reason=reason)
        self.write_audit(partition.name, "esm-refused", reason=reason)

    async def fail(self, partition: Partition, reason: str) -> None:
        """The secure VM cannot go on: it ends here, now, with this reason."""
        if partition.svm is None:
            return
        partition.failure = reason
        self._runtime.log.error("secure VM failed", vm=partition.name, reason=reason)
        self.write_audit(partition.name, "svm-failed", reason=reason)
        await self.terminate(partition, reason)
        await self._runtime.notice("vm-failed", partition.name, reason)

    async def fail_for_error(self, partition: Partition, error: Exception) -> None:
        """A mistake of the ultravisor's own while it worked for the VM: what the pages are is not known any more."""
        self._runtime.log.error("internal error", vm=partition.name, exc_info=error)
        await self.fail(partition, f"internal-error: {type(error).__name__}")

    async def terminate(self, partition: Partition, reason: str) -> None:
        """End the secure side of a VM; wins over every open call of it, and returns when it has ended.

        The account is credited only when the guest has let go of its memory, or is dead.
        """
        svm, partition.svm = partition.svm, None
        if svm is None:
            # Somebody else may be ending it right now: whoever asks must not go on before the guest has let go.
            await partition.ended.wait()
            return
        partition.ended = trio.Event()
        try:
            await self._end(partition, svm, reason)
        finally:
            partition.ended.set()

    async def _end(self, partition: Partition, svm: Svm, reason: str) -> None:
        aborted = svm.phase is SvmPhase.ABORTING
        svm.phase = SvmPhase.ENDED
        if partition.migration is not None:
            partition.migration.svm_ends()
        partition.secure_since = None
        self.files.pop(partition.lpid, None)
        self.bounce.pop(partition.lpid, None)
        if not aborted:
            self._hypervisor.end_partition(partition.lpid)
            await partition.end_operations()
        if aborted or await self._reclaim(partition):
            svm.release()
        else:
            self._runtime.nursery.start_soon(_release_at_death, partition, svm)
        for event, lines in self._limit.take_left_out(partition.name).items():
            self.write_audit(partition.name, "audit-lines-left-out", of=event, lines=lines)
        self.write_audit(partition.name, "svm-terminated", reason=reason)

    async def _reclaim(self, partition: Partition) -> bool:
        """Whether the guest has let go of secure memory, or is dead."""
        if await partition.guest_lets_go():
            return True
        self._runtime.log.warning("guest does not let go of secure memory", vm=partition.name)
        await self._runtime.notice("guest-must-die", partition.name, "did not let go of secure memory")
        if await partition.guest_death(_GUEST_KILL_SECONDS):
            return True
        self._runtime.log.error("guest holds secure memory", vm=partition.name)
        return False


async def _release_at_death(partition: Partition, svm: Svm) -> None:
    await partition.guest_death(math.inf)
    svm.release()


def _covered(name: str, state: str) -> bool:
    # The ultravisor reads no file of the host's after its start; Landlock is for the untrusted roles.
    return state == "on" or name == "landlock"
