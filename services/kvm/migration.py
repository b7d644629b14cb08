"""What a VM's qemu orders to move the VM to another host.

    source        DIRTY_LOG ... VM_FREEZE (a secure VM's ultravisor freezes it) VM_SAVE
    destination   VM_LOAD ... VM_CONTINUE
    both          MIGRATION_UCALL: the steps of the two ultravisors for a secure VM

A VM that is to arrive here is started by VM_LOAD and by nothing else; once it has arrived it is a VM like any other. A
secure VM that has left is off, and neither reset nor start brings it back: it runs elsewhere (S6), and only the next
incarnation, which the launcher makes, may begin here again. Its marks stay as they were, since UV_SVM_TERMINATE of what
is gone succeeds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from protocol import messages as m
from protocol.codes import HCode, UCode
from protocol.errors import HostFault, MalformedMessage, PeerError, PefboxError
from protocol.registers import to_register, to_signed
from protocol.ucalls import MIGRATION_UCALLS, UV_EXPORT_CANCEL, UV_EXPORT_STATEMENT, UV_SAVE_COMMIT
from protocol.vm_state import VmState
from protocol.wire import Envelope
from services.kvm import saved_vm
from services.kvm.saved_vm import KvmVmState
from services.kvm.ultravisor_port import UltravisorPort
from services.kvm.uvmem import Switch
from services.kvm.vcpu import RunState
from services.runtime.link import Link
from services.runtime.log import Log
from shared.stream_buffer import StreamBuffer

if TYPE_CHECKING:
    from services.kvm.vm import Vm

PROCESSOR_SECONDS = 3.0
"""To stop at a safe point, or to take a state over."""
_LOAD_RETRY_SECONDS = 0.005
_BUSY_SECONDS = 1.0
_BUSY_POLL_SECONDS = 0.002


class Migration:
    """One VM on its way here or away."""

    def __init__(self, vm: Vm, ultravisor: UltravisorPort, stream: StreamBuffer | None, log: Log) -> None:
        self._vm = vm
        self._ultravisor = ultravisor
        self._stream = stream
        self._log = log
        self._processor: bytes | None = None
        """The state of a normal VM's processor, which has stood still since."""
        self._arrived = vm.entry.starts
        self._loading = False
        self._left = False
        self._saved = False

    def register(self, link: Link) -> None:
        """Serve the VM's qemu."""
        link.on_waiting(m.VM_FREEZE, self._freeze)
        link.on_waiting(m.VM_SAVE, self._save)
        link.on_waiting(m.VM_LOAD, self._load)
        link.on_waiting(m.DIRTY_LOG, self._dirty_log)
        link.on_waiting(m.MIGRATION_UCALL, self._ucall)

    @property
    def is_here(self) -> bool:
        """Whether the VM may start on this host: it does not arrive yet, and has not left."""
        return self._arrived and not self._left

    @property
    def takes_typing(self) -> bool:
        """Whether text that is typed reaches the VM: after a save it would come neither along nor, for long, to it."""
        return self.is_here and not self._saved

    def forget_processor(self) -> None:
        """The processor may run: what was kept of it is old."""
        self._processor = None
        self.runs()

    def runs(self) -> None:
        """The VM goes on here, whatever was saved of it: it has made a call."""
        self._saved = False

    # -- source -----------------------------------------------------------------------------------------------

    async def _freeze(self, envelope: Envelope, _body: m.Empty) -> m.Status:
        if not self._may_freeze():
            return m.Status(HCode.H_STATE)
        vm, n_resets = self._vm, self._vm.n_resets
        was_held = not vm.vcpus.stop(0)
        saved = await vm.ask_guest(m.VCPU_SAVE, m.RunBody(0), envelope.cause, PROCESSOR_SECONDS)
        if vm.n_resets != n_resets:
            return m.Status(HCode.H_STATE)
        code = saved.code if self._may_freeze() else HCode.H_STATE
        if code != HCode.H_SUCCESS:
            if not was_held:
                vm.vcpus.go(0)
            return m.Status(code)
        self._processor = saved.state
        self._leave_calls()
        vm.enter(VmState.PAUSED)
        return m.Status(HCode.H_SUCCESS)

    def _may_freeze(self) -> bool:
        is_started = self._vm.state in (VmState.RUNNING, VmState.PAUSED)
        return is_started and self._vm.secure.switch is Switch.NONE

    async def _save(self, _envelope: Envelope, body: m.StreamPlaceBody) -> m.SavedVm:
        if self._stream is None:
            return m.SavedVm(HCode.H_NOT_AVAILABLE)
        with self._vm.at_work():
            if self._may_save() and not await self._pages_at_rest():
                return m.SavedVm(HCode.H_BUSY)
            if not self._may_save():
                return m.SavedVm(HCode.H_STATE)
            self._leave_calls()
            state = saved_vm.save(self._vm, self._processor or b"")
            if len(state) > body.n_bytes:
                return m.SavedVm(HCode.H_TOO_BIG)
            try:
                self._stream.write(body.offset, state)
            except PeerError as error:
                self._log.warning("state of the VM not saved", reason=str(error))
                return m.SavedVm(HCode.H_PARAMETER)
            self._saved = True
            return m.SavedVm(HCode.H_SUCCESS, len(state))

    def _may_save(self) -> bool:
        """Whether the processor stands still; of a secure VM its ultravisor knows."""
        if self._vm.secure.switch is Switch.DONE:
            return self._vm.state in (VmState.RUNNING, VmState.PAUSED)
        return self._may_freeze() and self._processor is not None

    def _leave_calls(self) -> None:
        """A processor at a safe point has left H_CEDE and its kin, and may make another call when it goes on here."""
        self._vm.vcpus.leave(0)
        self._vm.hcalls.answer_ended()

    async def _pages_at_rest(self) -> bool:
        """Whether no page is on its way, soon."""
        deadline = trio.current_time() + _BUSY_SECONDS
        while self._vm.memory.busy:
            if trio.current_time() > deadline:
                return False
            await trio.sleep(_BUSY_POLL_SECONDS)
        return True

    async def _dirty_log(self, envelope: Envelope, body: m.DirtyLogBody) -> m.DirtyLog:
        gfns = range(body.gfn, body.gfn + body.n)
        if body.gfn % 8 or gfns.stop > self._vm.memory.n_pages:
            return m.DirtyLog(HCode.H_PARAMETER)
        with self._vm.at_work():
            try:
                return m.DirtyLog(HCode.H_SUCCESS, await self._vm.dirty.collect_bitmap(gfns, envelope.cause))
            except HostFault as fault:
                self._log.warning("no dirty log", reason=str(fault))
                return m.DirtyLog(HCode.H_BUSY)

    # -- destination ------------------------------------------------------------------------------------------

    async def _load(self, envelope: Envelope, body: m.StreamPlaceBody) -> m.Status:
        if self._stream is None:
            return m.Status(HCode.H_NOT_AVAILABLE)
        if self._loading or not self._may_arrive():
            return m.Status(HCode.H_STATE)
        if self._vm.memory.busy:
            return m.Status(HCode.H_BUSY)
        try:
            state = self._checked(self._stream, body)
        except PeerError as error:
            self._log.warning("state of the VM refused", reason=str(error))
            return m.Status(HCode.H_PARAMETER)
        if state.secure and not self._vm.entry.secure_allowed:
            self._log.warning("state of the VM refused", reason="this VM may not be secure here")
            return m.Status(HCode.H_AUTHORITY)
        with self._vm.at_work():
            return m.Status(await self._take_over(state, envelope.cause))

    def _may_arrive(self) -> bool:
        is_off = self._vm.state is VmState.STARTING and self._vm.secure.switch is Switch.NONE
        return is_off and not self._arrived

    def _checked(self, stream: StreamBuffer, place: m.StreamPlaceBody) -> KvmVmState:
        if place.n_bytes > saved_vm.max_bytes(self._vm):
            raise MalformedMessage(f"{place.n_bytes} bytes are no state of this VM")
        state = saved_vm.decode(stream.read(place.offset, place.n_bytes))
        saved_vm.check(self._vm, state)
        return state

    async def _take_over(self, state: KvmVmState, cause: int) -> int:
        """All of it, or none: a VM that did not arrive is as if nothing had come."""
        self._loading = True
        try:
            code = await self._arrive(state, cause)
        finally:
            self._loading = False
        if code != HCode.H_SUCCESS:
            self._vm.to_power_on()
        return code

    async def _arrive(self, state: KvmVmState, cause: int) -> int:
        vm, n_resets = self._vm, self._vm.n_resets
        try:
            saved_vm.take_over(vm, state)
        except HostFault as fault:
            self._log.error("frames of the VM cannot be punched", reason=str(fault))
            return HCode.H_HARDWARE
        if not state.secure:
            code = await self._load_processor(state.processor, cause)
            if code != HCode.H_SUCCESS:
                return code
            if not self._may_arrive() or vm.n_resets != n_resets:
                return HCode.H_STATE
        self._arrived = True
        vm.enter(VmState.PAUSED)
        vm.tell_lines()
        if state.secure and vm.vcpus.state(0) is RunState.STOPPED:
            # Its user has paused it: it stays so when its ultravisor lets it go.
            await vm.stop_guest(cause)
        return HCode.H_SUCCESS

    async def _load_processor(self, state: bytes, cause: int) -> int:
        body = m.LoadProcessorBody(0, state)
        deadline = trio.current_time() + PROCESSOR_SECONDS
        try:
            while True:
                status = await self._vm.ask_guest(m.VCPU_LOAD, body, cause, PROCESSOR_SECONDS)
                if status.code != HCode.H_BUSY or trio.current_time() > deadline:
                    return status.code
                # kvm's map goes another way than the order, over the launcher.
                await trio.sleep(_LOAD_RETRY_SECONDS)
        except PefboxError as error:
            self._log.warning("processor not loaded", reason=str(error))
            return HCode.H_HARDWARE

    # -- secure VMs -------------------------------------------------------------------------------------------

    async def _ucall(self, envelope: Envelope, body: m.MigrationUcallBody) -> m.MigrationUcallReply:
        call = MIGRATION_UCALLS.get(body.number)
        if call is None or len(body.args) != call.n_args - 1:
            return m.MigrationUcallReply(UCode.U_PARAMETER)
        result = await self._ultravisor.ucall_lasting(call, [self._vm.entry.lpid, *body.args], envelope.cause)
        code = to_signed(to_register(result[0]))
        outputs = [*map(to_register, result[1:]), *(0 for _ in call.results)][: len(call.results)]
        if code == UCode.U_SUCCESS and (call is UV_SAVE_COMMIT or (call is UV_EXPORT_STATEMENT and outputs[0] == 1)):
            self._leave()
        elif call in (UV_EXPORT_CANCEL, UV_EXPORT_STATEMENT) and code == UCode.U_SUCCESS:
            self.runs()
        return m.MigrationUcallReply(code, outputs)

    def _leave(self) -> None:
        """The VM runs elsewhere, or is in a snapshot, and its ultravisor has let go of it here."""
        self._left = True
        self._vm.hcalls.drop_open()
        self._vm.enter(VmState.LEFT)
