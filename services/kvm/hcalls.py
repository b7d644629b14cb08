"""Every hypercall that kvm answers, by number: the one table that both ways into kvm use.

A handler is a method named after its call. It gets exactly the declared arguments and returns `[code, outputs...]`, or
None when it stays open (H_CEDE and its kin) and is answered later.
"""

from __future__ import annotations

import os
import time

from protocol import hcalls as h
from protocol.codes import HCode
from protocol.errors import GuestFault, MalformedMessage
from protocol.hcall_values import (
    MAX_PROC_TABLE_SIZE,
    PROC_TABLE_ALIGN_MASK,
    PROC_TABLE_FLAGS,
    PROC_TABLE_HASH,
    PROC_TABLE_MODIFY,
    PROC_TABLE_RADIX,
    PROC_TABLE_REGISTER,
    SetModeResource,
)
from services.kvm.guest_call import AtOnce, GuestCall, Result, Waiting
from services.kvm.interrupt_trace import InterruptTrace
from services.kvm.rtas import RtasCalls
from services.kvm.tce_tables import TceTables
from services.kvm.terminal import Terminal
from services.kvm.ultravisor_port import Answer
from services.kvm.user_space import UserSpace
from services.kvm.uvmem import SecurePages
from services.kvm.vcpu import Vcpus
from services.kvm.vpa import VirtualProcessorAreas
from services.kvm.xics import Xics
from shared.guest_ram import GuestRam

_SUCCESS: Result = [HCode.H_SUCCESS]
_TCE_BYTES = 8


def _timebase() -> int:
    """The time base of a POWER9: 512 MHz."""
    return time.monotonic_ns() * 512 // 1000


CPU_CHARACTER = 0
CPU_BEHAVIOUR = 1 << 63 | 1 << 56 | 1 << 55
"""Favour security; no cache flush at entry or at user accesses: an emulated processor does not speculate."""

_MODES: dict[int, tuple[int, ...]] = {
    SetModeResource.ADDRESS_TRANSLATION_MODE: (0, 3),
    SetModeResource.LITTLE_ENDIAN: (0, 1),
}
"""What the processor can do: interrupts in real mode or at 0xC000_0000_0000_4000, in either byte order."""
_DEBUG_RESOURCES = (SetModeResource.CIABR, SetModeResource.DAWR)
SYS_RESET_ALL = (1 << 64) - 1
SYS_RESET_ALL_OTHERS = (1 << 64) - 2


def check_modes(modes: dict[int, int]) -> None:
    """Raise MalformedMessage unless H_SET_MODE could have set `modes`."""
    for resource, mflags in modes.items():
        if mflags not in _MODES.get(resource, ()):
            raise MalformedMessage(f"mode {mflags:#x} of resource {resource}")


class Hcalls:
    """Handlers of one VM. `at_once` and `waiting` are the tables by call number."""

    def __init__(
        self,
        ram: GuestRam,
        xics: Xics,
        tces: TceTables,
        terminal: Terminal,
        vcpus: Vcpus,
        user_space: UserSpace,
        secure: SecurePages,
        interrupts: InterruptTrace,
    ) -> None:
        self._ram = ram
        self._xics = xics
        self._tces = tces
        self._terminal = terminal
        self._vcpus = vcpus
        self._secure = secure
        self._interrupts = interrupts
        self._user_space = user_space
        self._open: dict[int, Answer] = {}
        self._modes: dict[int, int] = {}
        self.areas = VirtualProcessorAreas(ram, len(vcpus))
        rtas = RtasCalls(ram, xics, user_space)
        self.at_once: dict[int, AtOnce] = {
            h.H_GET_TCE.number: lambda call: self._tces.h_get_tce(*call.args),
            h.H_PUT_TCE.number: lambda call: self._tces.h_put_tce(*call.args),
            h.H_STUFF_TCE.number: lambda call: self._tces.h_stuff_tce(*call.args),
            h.H_GET_TERM_CHAR.number: lambda call: self._terminal.h_get_term_char(*call.args),
            h.H_PUT_TERM_CHAR.number: lambda call: self._terminal.h_put_term_char(*call.args),
            h.H_EOI.number: lambda call: self._xics.h_eoi(call.vcpu, *call.args),
            h.H_CPPR.number: lambda call: self._xics.h_cppr(call.vcpu, *call.args),
            h.H_IPI.number: lambda call: self._xics.h_ipi(*call.args),
            h.H_IPOLL.number: lambda call: self._xics.h_ipoll(*call.args),
            h.H_XIRR.number: lambda call: self._accepted(self._xics.h_xirr(call.vcpu)),
            h.H_XIRR_X.number: lambda call: self._accepted(self._xics.h_xirr_x(call.vcpu, _timebase())),
            h.H_CEDE.number: self.h_cede,
            h.H_CONFER.number: self.h_confer,
            h.H_PROD.number: self.h_prod,
            h.H_JOIN.number: self.h_join,
            h.H_RANDOM.number: self.h_random,
            h.H_SET_MODE.number: self.h_set_mode,
            h.H_REGISTER_PROC_TBL.number: self.h_register_proc_tbl,
            h.H_GET_CPU_CHARACTERISTICS.number: lambda _call: [HCode.H_SUCCESS, CPU_CHARACTER, CPU_BEHAVIOUR],
            h.H_SIGNAL_SYS_RESET.number: self.h_signal_sys_reset,
            h.H_SVM_INIT_DONE.number: self.h_svm_init_done,
        }
        self.waiting: dict[int, Waiting] = {
            h.H_PUT_TCE_INDIRECT.number: self.h_put_tce_indirect,
            h.H_LOGICAL_CI_LOAD.number: user_space.h_logical_ci_load,
            h.H_LOGICAL_CI_STORE.number: user_space.h_logical_ci_store,
            h.H_RTAS.number: rtas.h_rtas,
            h.H_REGISTER_VPA.number: self.areas.h_register_vpa,
            h.H_LOGICAL_MEMOP.number: user_space.answers(h.H_LOGICAL_MEMOP),
            h.H_CAS.number: user_space.answers(h.H_CAS),
            h.H_UPDATE_DT.number: user_space.answers(h.H_UPDATE_DT),
            h.H_SET_DMA_BYPASS.number: user_space.answers(h.H_SET_DMA_BYPASS),
            h.H_SVM_PAGE_IN.number: self.h_svm_page_in,
            h.H_SVM_PAGE_OUT.number: self.h_svm_page_out,
            h.H_SVM_INIT_START.number: self.h_svm_init_start,
            h.H_SVM_INIT_ABORT.number: self.h_svm_init_abort,
        }

    def _accepted(self, result: Result) -> Result:
        self._interrupts.accepted(result)
        return result

    # -- virtual processor ------------------------------------------------------------------------------------

    def h_cede(self, call: GuestCall) -> Result | None:
        """H_CEDE."""
        self._leave_wait(call.vcpu)
        return self._keep_open(call, self._vcpus.h_cede(call.vcpu))

    def h_confer(self, call: GuestCall) -> Result | None:
        """H_CONFER."""
        self._leave_wait(call.vcpu)
        target, dispatch = call.args
        return self._keep_open(call, self._vcpus.h_confer(call.vcpu, target, dispatch))

    def h_prod(self, call: GuestCall) -> Result:
        """H_PROD."""
        # Of the caller itself it must count for the next wait, not for a cede that is over.
        self._leave_wait(call.vcpu)
        return [self._vcpus.h_prod(*call.args)]

    def h_join(self, call: GuestCall) -> Result | None:
        """H_JOIN."""
        self._leave_wait(call.vcpu)
        return self._keep_open(call, self._vcpus.h_join(call.vcpu))

    def _leave_wait(self, vcpu: int) -> None:
        """A processor that calls again has left its last wait: by its decrementer, or to be saved for a migration."""
        if vcpu < len(self._vcpus):
            self._vcpus.left(vcpu)
            self.answer_ended()

    def answer_ended(self) -> None:
        """Answer every open call that ended since the last time."""
        for vcpu in self._vcpus.take_ended():
            answer = self._open.pop(vcpu, None)
            if answer is not None:
                answer(_SUCCESS)

    def drop_open(self) -> None:
        """Open calls are not answered any more: the machine is reset, or has left."""
        self._open.clear()

    def _keep_open(self, call: GuestCall, code: HCode | None) -> Result | None:
        if code is not None:
            return [code]
        self._open[call.vcpu] = call.answer
        return None

    # -- others -----------------------------------------------------------------------------------------------

    def save_modes(self) -> dict[int, int]:
        """What H_SET_MODE has set, by resource."""
        return dict(self._modes)

    def load_modes(self, modes: dict[int, int]) -> None:
        """Take over what `check_modes` let pass."""
        self._modes = dict(modes)

    def h_random(self, _call: GuestCall) -> Result:
        """H_RANDOM of a normal VM; a secure VM's is answered by the ultravisor."""
        return [HCode.H_SUCCESS, int.from_bytes(os.urandom(8), "big")]

    def h_set_mode(self, call: GuestCall) -> Result:
        """H_SET_MODE: interrupt endianness and address translation mode; debug registers are not offered."""
        mflags, resource, value1, value2 = call.args
        if resource not in _MODES:
            return [HCode.H_UNSUPPORTED if resource in _DEBUG_RESOURCES else HCode.H_P2]
        if value1:
            return [HCode.H_P3]
        if value2:
            return [HCode.H_P4]
        if mflags not in _MODES[resource]:
            return [HCode.H_UNSUPPORTED]
        self._modes[resource] = mflags
        return _SUCCESS

    def h_signal_sys_reset(self, call: GuestCall) -> Result:
        """H_SIGNAL_SYS_RESET: kvm checks it, the processor that called takes the interrupt; a VM has no others."""
        (target,) = call.args
        known = target in (SYS_RESET_ALL, SYS_RESET_ALL_OTHERS, call.vcpu)
        return _SUCCESS if known else [HCode.H_PARAMETER]

    def h_register_proc_tbl(self, call: GuestCall) -> Result:
        """H_REGISTER_PROC_TBL: kvm checks it, the processor keeps it, since only that one walks the guest's trees."""
        flags, table, page_size, table_size = call.args
        if not flags & PROC_TABLE_MODIFY or not flags & PROC_TABLE_REGISTER:
            return [HCode.H_PARAMETER] if flags & ~PROC_TABLE_FLAGS else _SUCCESS
        if flags & ~PROC_TABLE_FLAGS or not flags & PROC_TABLE_RADIX or flags & PROC_TABLE_HASH:
            return [HCode.H_PARAMETER]
        if table & PROC_TABLE_ALIGN_MASK:
            return [HCode.H_P2]
        if page_size:
            return [HCode.H_P3]
        return _SUCCESS if table_size <= MAX_PROC_TABLE_SIZE else [HCode.H_P4]

    async def h_put_tce_indirect(self, call: GuestCall) -> Result:
        """H_PUT_TCE_INDIRECT: the list page is read as the host sees it, so a private one holds ciphertext."""
        liobn, ioba, list_gpa, n_tces = call.args
        code = self._tces.may_put_indirect(liobn, ioba, list_gpa, n_tces)
        if code is not HCode.H_SUCCESS:
            return [code]
        try:
            tces = await self._ram.read(list_gpa, n_tces * _TCE_BYTES)
        except GuestFault:
            return [HCode.H_PARAMETER]
        return self._tces.h_put_tce_indirect(liobn, ioba, list_gpa, n_tces, tces)

    # -- secure VM support ------------------------------------------------------------------------------------

    def h_svm_init_done(self, _call: GuestCall) -> Result:
        """H_SVM_INIT_DONE."""
        code = self._secure.init_done()
        if code is HCode.H_SUCCESS:
            self._user_space.turned_secure()
        return [code]

    async def h_svm_page_in(self, call: GuestCall) -> Result:
        """H_SVM_PAGE_IN."""
        gpa, flags, shift = call.args
        return [await self._secure.page_in(gpa, flags, shift, call.cause)]

    async def h_svm_page_out(self, call: GuestCall) -> Result:
        """H_SVM_PAGE_OUT."""
        gpa, flags, shift = call.args
        return [await self._secure.page_out_asked(gpa, flags, shift, call.cause)]

    async def h_svm_init_start(self, call: GuestCall) -> Result:
        """H_SVM_INIT_START."""
        return [await self._secure.init_start(call.cause)]

    async def h_svm_init_abort(self, call: GuestCall) -> Result:
        """H_SVM_INIT_ABORT."""
        return [await self._secure.init_abort(call.cause)]
