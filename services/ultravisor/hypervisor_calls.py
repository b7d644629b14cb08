"""What kvm may ask of the ultravisor. Every handler is a leaf: it calls nobody who could be waiting for it."""

from __future__ import annotations

from protocol.codes import UCode
from protocol.ucalls import (
    UV_PAGE_IN,
    UV_PAGE_INVAL,
    UV_PAGE_OUT,
    UV_REGISTER_MEM_SLOT,
    UV_RESTRICTED_SPR_READ,
    UV_RESTRICTED_SPR_WRITE,
    UV_RETURN,
    UV_SVM_TERMINATE,
    UV_UNREGISTER_MEM_SLOT,
    UV_WRITE_PATE,
)
from protocol.wire import Envelope
from services.runtime.link import Batch, Link
from services.ultravisor import page_calls
from services.ultravisor.hypervisor import Hypervisor
from services.ultravisor.life import SvmLife
from services.ultravisor.partition import Partition
from services.ultravisor.svm import Svm, SvmPhase

_DAWR, _DAWRX, _CIABR, _LDBAR, _IMC = 0xB4, 0xBC, 0xBB, 0x352, 0x31F
_WRITABLE_SPRS = frozenset({_DAWR, _DAWRX, _CIABR, _LDBAR, _IMC})
_READABLE_SPRS = frozenset({_DAWR, _DAWRX, _CIABR})


class HypervisorCalls:
    """Handlers of the link to kvm. `partitions` are the VMs of this host by lpid."""

    def __init__(self, partitions: dict[int, Partition], life: SvmLife) -> None:
        self._partitions = partitions
        self._life = life
        self._sprs: dict[int, int] = {}

    def register(self, link: Link, hypervisor: Hypervisor) -> None:
        """Serve every ultracall of the hypervisor."""
        link.on(UV_RETURN, hypervisor.take_return)
        link.on(UV_WRITE_PATE, self.uv_write_pate)
        link.on(UV_RESTRICTED_SPR_WRITE, self.uv_restricted_spr_write)
        link.on(UV_RESTRICTED_SPR_READ, self.uv_restricted_spr_read)
        link.on(UV_REGISTER_MEM_SLOT, self.uv_register_mem_slot)
        link.on(UV_UNREGISTER_MEM_SLOT, self.uv_unregister_mem_slot)
        link.on(UV_PAGE_IN, self.uv_page_in)
        link.on_together(UV_PAGE_OUT, self.uv_page_out)
        link.on_waiting(UV_PAGE_INVAL, self.uv_page_inval)
        link.on_waiting(UV_SVM_TERMINATE, self.uv_svm_terminate)

    def uv_write_pate(self, _envelope: Envelope, registers: list[int]) -> list[int]:
        """UV_WRITE_PATE: of a secure VM only the process table may change."""
        if len(registers) < 3 or registers[0] not in self._partitions:
            return [UCode.U_PARAMETER]
        partition = self._partitions[registers[0]]
        if partition.svm is not None and registers[1] != partition.pate[0]:
            return [UCode.U_PERMISSION]
        partition.pate = (registers[1], registers[2])
        return [UCode.U_SUCCESS]

    def uv_restricted_spr_write(self, _envelope: Envelope, registers: list[int]) -> list[int]:
        """UV_RESTRICTED_SPR_WRITE."""
        if len(registers) < 2 or registers[0] not in _WRITABLE_SPRS:
            return [UCode.U_PARAMETER]
        self._sprs[registers[0]] = registers[1]
        return [UCode.U_SUCCESS]

    def uv_restricted_spr_read(self, _envelope: Envelope, registers: list[int]) -> list[int]:
        """UV_RESTRICTED_SPR_READ."""
        if not registers or registers[0] not in _READABLE_SPRS:
            return [UCode.U_PARAMETER]
        return [UCode.U_SUCCESS, 0, self._sprs.get(registers[0], 0)]

    def uv_register_mem_slot(self, _envelope: Envelope, registers: list[int]) -> list[int]:
        """UV_REGISTER_MEM_SLOT."""
        svm = self._svm(registers, 5)
        if svm is None or svm.phase is not SvmPhase.STARTING:
            return [UCode.U_PARAMETER]
        return [page_calls.register_slot(svm, *registers[1:5])]

    def uv_unregister_mem_slot(self, _envelope: Envelope, registers: list[int]) -> list[int]:
        """UV_UNREGISTER_MEM_SLOT."""
        svm = self._svm(registers, 2)
        if svm is None:
            return [UCode.U_PARAMETER]
        if svm.phase is not SvmPhase.STARTING or svm.taken_in:
            # The VM holds, or is to run on, the slot's pages; one that ends gives them back as a whole.
            return [UCode.U_STATE]
        return [page_calls.unregister_slot(svm, registers[1])]

    def uv_page_in(self, envelope: Envelope, registers: list[int]) -> list[int]:
        """UV_PAGE_IN."""
        svm = self._svm(registers, 5)
        if svm is None:
            return [UCode.U_PARAMETER]
        if self._holds_pages(svm):
            return [UCode.U_RETRY]
        _, src_ra, gpa, flags, order = registers[:5]
        code = page_calls.page_in(svm, src_ra, gpa, flags, order, envelope.cause)
        if code is UCode.U_P3:
            self._life.write_audit(svm.name, "page-refused", gpa=registers[2])
        return [code]

    async def uv_page_out(self, calls: Batch) -> list[list[int]]:
        """UV_PAGE_OUT; all `calls` name the same VM."""
        svm = self._svm(calls[0][1], 1)
        if svm is None:
            return [[UCode.U_PARAMETER]] * len(calls)
        if self._holds_pages(svm):
            return [[UCode.U_RETRY]] * len(calls)
        partition = self._partitions[svm.lpid]
        whole = [i for i, (_, registers) in enumerate(calls) if len(registers) >= 5]
        requests = [page_calls.PageRequest.of(calls[i][1], calls[i][0].cause) for i in whole]
        codes: list[int] = [UCode.U_STATE] * len(whole)

        async def work() -> list[int]:
            codes[:] = await page_calls.page_out(partition, svm, requests)
            return codes

        # The pages that an abort gives back belong to no operation of the VM that could be ended.
        await (work() if svm.phase is SvmPhase.ABORTING else partition.operation(work()))
        results: list[list[int]] = [[UCode.U_PARAMETER]] * len(calls)
        for i, code in zip(whole, codes, strict=True):
            results[i] = [code]
        return results

    async def uv_page_inval(self, envelope: Envelope, registers: list[int]) -> list[int]:
        """UV_PAGE_INVAL."""
        svm = self._svm(registers, 3)
        if svm is None:
            return [UCode.U_PARAMETER]
        if self._holds_pages(svm):
            return [UCode.U_RETRY]
        partition = self._partitions[registers[0]]

        async def work() -> list[int]:
            return [await page_calls.page_inval(partition, svm, registers[1], registers[2], envelope.cause)]

        return await partition.operation(work())

    async def uv_svm_terminate(self, _envelope: Envelope, registers: list[int]) -> list[int]:
        """UV_SVM_TERMINATE: wins over every open call of the VM."""
        if not registers or registers[0] not in self._partitions:
            return [UCode.U_PARAMETER]
        await self._life.terminate(self._partitions[registers[0]], "hypervisor-asked")
        return [UCode.U_SUCCESS]

    def _holds_pages(self, svm: Svm) -> bool:
        migration = self._partitions[svm.lpid].migration
        return migration is not None and migration.holds_pages

    def _svm(self, registers: list[int], n_needed: int) -> Svm | None:
        """The secure VM that the first register names, or None: also when registers are missing."""
        if len(registers) < n_needed:
            return None
        partition = self._partitions.get(registers[0])
        return None if partition is None else partition.svm
