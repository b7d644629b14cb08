"""What a guest may ask of the ultravisor: ultracalls, faults, and a secure VM's hypercalls through the filter."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

from protocol.codes import HCode, UCode
from protocol.declare import Call, Caller
from protocol.errors import GuestFault, HostFault, PeerGone
from protocol.hcalls import H_RANDOM, H_RTAS, HCALLS
from protocol.messages import GUEST_CRASHED, MAP_FAULT, Access, CrashBody, MapFaultBody, Status
from protocol.refusals import Refusal
from protocol.ucalls import (
    UV_ESM,
    UV_ESMB_GET_FILE,
    UV_SHARE_PAGE,
    UV_UNSHARE_ALL_PAGES,
    UV_UNSHARE_PAGE,
)
from protocol.wire import MAX_OPEN_CALLS, Envelope
from services.runtime.link import DEFERRED, Link
from services.ultravisor import sharing
from services.ultravisor.guest_memory import GuestMemory
from services.ultravisor.hypervisor import Hypervisor
from services.ultravisor.life import SvmLife
from services.ultravisor.page_state import TRANSIENT, GfnState
from services.ultravisor.partition import Partition
from services.ultravisor.sharing import SvmBroken
from services.ultravisor.svm import Svm

RangeWork = Callable[[Partition, Svm, Hypervisor, int, int, int], Awaitable[UCode]]
"""Share or unshare: VM, its secure side, kvm, first GFN, number of pages, cause."""


class GuestCalls:
    """Handlers of one VM's link to its guest. Calls carry `[vcpu, args...]`."""

    def __init__(self, partition: Partition, hypervisor: Hypervisor, life: SvmLife) -> None:
        self._partition = partition
        self._hypervisor = hypervisor
        self._life = life
        self._link = partition.guest

    def register(self, link: Link) -> None:
        """Serve every call that the link carries upward."""
        link.on_waiting(MAP_FAULT, self.map_fault)
        link.on_waiting(GUEST_CRASHED, self.guest_crashed)
        link.on_waiting(UV_ESM, self.uv_esm)
        link.on_waiting(UV_SHARE_PAGE, self.uv_share_page)
        link.on_waiting(UV_UNSHARE_PAGE, self.uv_unshare_page)
        link.on_waiting(UV_UNSHARE_ALL_PAGES, self.uv_unshare_all_pages)
        link.on(UV_ESMB_GET_FILE, self.uv_esmb_get_file)
        for call in HCALLS:
            if Caller.SVM in call.callers and call not in (H_RANDOM, H_RTAS):
                link.on(call, self._reflector(call))
        link.on(H_RANDOM, self.h_random)
        link.on_waiting(H_RTAS, self.h_rtas)

    # -- hypercalls of a secure VM ----------------------------------------------------------------------------

    def _reflector(self, call: Call) -> Callable[[Envelope, list[int]], list[int] | None]:
        n_registers = 1 + call.n_args

        def reflect(envelope: Envelope, registers: list[int]) -> list[int] | None:
            """Pass the declared arguments on; the answer comes by UV_RETURN."""
            partition = self._partition
            if not partition.secure or len(registers) < n_registers:
                return [HCode.H_PARAMETER]
            busy = self._hypervisor.open_calls >= MAX_OPEN_CALLS
            if busy and self._hypervisor.open_of(partition.lpid) >= MAX_OPEN_CALLS:
                return [HCode.H_BUSY]

            def on_result(result: list[int]) -> None:
                self._link.reply(envelope, result)

            try:
                self._hypervisor.forward(
                    partition.lpid, registers[0], call, registers[1:n_registers], envelope.cause, on_result
                )
            except PeerGone as gone:
                return [Refusal.of_peer(gone.state).value[0]]
            return DEFERRED

        return reflect

    def h_random(self, _envelope: Envelope, _registers: list[int]) -> list[int]:
        """H_RANDOM of a secure VM: from the ultravisor, since the hypervisor's would be known to it."""
        if not self._partition.secure:
            return [HCode.H_FUNCTION]
        return [HCode.H_SUCCESS, int.from_bytes(os.urandom(8), "big")]

    async def h_rtas(self, envelope: Envelope, registers: list[int]) -> list[int]:
        """H_RTAS of a secure VM, through the bounce pages."""
        svm = self._running_svm()
        bounce = self._life.bounce.get(self._partition.lpid)
        if svm is None or bounce is None or len(registers) < 2:
            return [HCode.H_PARAMETER]
        memory = GuestMemory(self._partition, svm, self._hypervisor, envelope.cause)
        vcpu, args_gpa = registers[:2]

        async def forward(block_gpa: int) -> list[int]:
            return await self._hypervisor.forward_and_wait(
                self._partition.lpid, vcpu, H_RTAS, [block_gpa], envelope.cause
            )

        async def work() -> list[int]:
            if not await self._has_frames(svm, bounce.gfns, envelope.cause):
                return [HCode.H_BUSY]
            return await bounce.call(memory, args_gpa, forward)

        return await self._guarded(work())

    async def _has_frames(self, svm: Svm, gfns: list[int], cause: int) -> bool:
        """Whether kvm gave back what it took away of the bounce pages; raises SvmBroken."""
        gone = [gfn for gfn in gfns if svm.states[gfn] is GfnState.SHARED_IMPLICIT_INV]
        back = [await sharing.bring_back_shared(self._partition, svm, self._hypervisor, gfn, cause) for gfn in gone]
        return all(back)

    # -- ultracalls -------------------------------------------------------------------------------------------

    async def uv_esm(self, envelope: Envelope, registers: list[int]) -> list[int]:
        """UV_ESM."""
        if len(registers) < 3:
            return [UCode.U_PARAMETER]
        return await self._life.esm(self._partition, registers[1], registers[2], envelope.cause)

    async def uv_share_page(self, envelope: Envelope, registers: list[int]) -> list[int]:
        """UV_SHARE_PAGE."""
        return await self._range_call(sharing.share, "share", envelope, registers)

    async def uv_unshare_page(self, envelope: Envelope, registers: list[int]) -> list[int]:
        """UV_UNSHARE_PAGE."""
        return await self._range_call(sharing.unshare, "unshare", envelope, registers)

    async def uv_unshare_all_pages(self, envelope: Envelope, _registers: list[int]) -> list[int]:
        """UV_UNSHARE_ALL_PAGES."""
        svm = self._running_svm()
        if svm is None:
            return [UCode.U_PERMISSION]

        async def work() -> list[int]:
            return [await sharing.unshare_all(self._partition, svm, self._hypervisor, envelope.cause)]

        result = await self._guarded(work())
        self._life.write_audit(self._partition.name, "unshare-all", code=result[0])
        return result

    def uv_esmb_get_file(self, _envelope: Envelope, registers: list[int]) -> list[int]:
        """UV_ESMB_GET_FILE: `[bytes or code, data0...data7]`."""
        files = self._life.files.get(self._partition.lpid)
        if files is None or not self._partition.secure:
            return [UCode.U_PERMISSION]
        if len(registers) < 11:
            return [UCode.U_PARAMETER]
        _, pid, offset, *name = registers[:11]
        count, data = files.get(offset, name, pid)
        return [count, *data]

    async def _range_call(self, work: RangeWork, event: str, envelope: Envelope, registers: list[int]) -> list[int]:
        svm = self._running_svm()
        if svm is None:
            return [UCode.U_PERMISSION]
        if len(registers) < 3:
            return [UCode.U_PARAMETER]
        gfn, n_pages = registers[1:3]

        async def run() -> list[int]:
            return [await work(self._partition, svm, self._hypervisor, gfn, n_pages, envelope.cause)]

        result = await self._guarded(run())
        hint = sharing.small_pages_hint(svm, gfn, n_pages) if result[0] != UCode.U_SUCCESS else None
        facts = {} if hint is None else {"reason": hint}
        self._life.write_audit(self._partition.name, event, gfn=gfn, n_pages=n_pages, code=result[0], **facts)
        return result

    # -- faults -----------------------------------------------------------------------------------------------

    async def map_fault(self, envelope: Envelope, body: MapFaultBody) -> Status:
        """The guest touched a GFN that its map does not give it: bring the page, or refuse."""
        svm = self._running_svm()
        if svm is None or not svm.in_slots(body.gfn):
            return Status(HCode.H_PARAMETER)

        async def work() -> list[int]:
            return [await self._resolve_fault(svm, body, envelope.cause)]

        return Status((await self._guarded(work()))[0])

    async def _resolve_fault(self, svm: Svm, body: MapFaultBody, cause: int) -> int:
        state = svm.states[body.gfn]
        if state in TRANSIENT:
            return HCode.H_BUSY
        if state is GfnState.PAGED_OUT:
            done = await sharing.bring_in(self._partition, svm, self._hypervisor, body.gfn, cause)
            return HCode.H_SUCCESS if done else HCode.H_BUSY
        if state is GfnState.SHARED_INV:
            back = await sharing.bring_back_shared(self._partition, svm, self._hypervisor, body.gfn, cause)
            return HCode.H_SUCCESS if back else HCode.H_BUSY
        if state in (GfnState.SHARED_IMPLICIT, GfnState.SHARED_IMPLICIT_INV):
            raise SvmBroken(f"the guest touched gfn {body.gfn:#x}, a bounce page of the ultravisor")
        # The page is mapped already unless what is wanted is not permitted at all (code from a shared page).
        permitted = bool(svm.map[body.gfn]) and not (state is GfnState.SHARED and body.access is Access.EXECUTE)
        return HCode.H_SUCCESS if permitted else HCode.H_PARAMETER

    async def guest_crashed(self, _envelope: Envelope, body: CrashBody) -> None:
        """The secure guest gave up."""
        if self._partition.secure:
            await self._life.fail(self._partition, f"guest-crashed: {body.reason}")

    # -- helpers ----------------------------------------------------------------------------------------------

    def _running_svm(self) -> Svm | None:
        return self._partition.svm if self._partition.secure else None

    async def _guarded(self, work: Any) -> list[int]:  # noqa: ANN401
        """Run one call of the VM; whatever breaks the VM ends it with its reason."""
        try:
            return await self._partition.operation(work)
        except SvmBroken as broken:
            await self._life.fail(self._partition, broken.reason)
            return [UCode.U_STATE]
        except GuestFault:
            return [HCode.H_PARAMETER]
        except HostFault:
            return [HCode.H_HARDWARE]
        except PeerGone:
            raise
        except Exception as error:
            await self._life.fail_for_error(self._partition, error)
            return [UCode.U_STATE]
