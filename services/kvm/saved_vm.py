"""What kvm keeps of a VM, as it goes to another host: all but memory, and what belongs to qemu or the ultravisor.

It comes from a peer over the network, so everything in it is checked before anything of the VM changes. Not in it: open
hypercalls, since the processor has left them; doorbells, which the devices name again where they arrive; the images of
pages that were paged out, which the ultravisors send as secure ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import msgspec

from protocol.decoding import DECODE_ERRORS
from protocol.errors import MalformedMessage
from protocol.messages import ProcessorState
from services.kvm.hcalls import check_modes
from services.kvm.memory import MemSlot
from services.kvm.page_state import KvmState
from services.kvm.tce_tables import TceTablesState
from services.kvm.terminal import Terminal
from services.kvm.uvmem import Switch
from services.kvm.vcpu import Vcpus, VcpusState, Wait
from services.kvm.vpa import VpaState
from services.kvm.xics import Xics, XicsState
from services.runtime.text_buffers import TextState

if TYPE_CHECKING:
    from services.kvm.vm import Vm

VERSION: Final = 1
_FIXED_BYTES = 1 << 20
"""More than all parts take whose size does not depend on the VM."""
_TCE_BYTES = 14
"""The most that an entry takes: index and value."""
_MAX_TEXT_START = 1 << 62
"""No terminal printed as much; the numbers of its bytes must go on fitting into a message."""
_OF_NORMAL_VM = bytes([KvmState.NORMAL, KvmState.DISCARDED])
_OF_SECURE_VM = bytes([KvmState.SECURE, KvmState.SHARED])
_WITHOUT_IMAGES = bytes.maketrans(bytes([KvmState.PAGED_OUT]), bytes([KvmState.SECURE]))


class KvmVmState(msgspec.Struct, forbid_unknown_fields=True):
    """kvm's state of one VM. `processor` is a normal VM's; that of a secure one is the ultravisor's."""

    version: Literal[1]
    secure: bool
    page_states: bytes
    slots: list[MemSlot]
    xics: XicsState
    vcpus: VcpusState
    terminal: TextState
    tces: TceTablesState
    areas: VpaState
    modes: dict[int, int]
    processor: ProcessorState


_decoder = msgspec.msgpack.Decoder(KvmVmState)


def save(vm: Vm, processor: bytes) -> bytes:
    """The state of `vm`, whose processor stands still outside every hypercall."""
    state = KvmVmState(
        version=VERSION,
        secure=vm.secure.switch is Switch.DONE,
        page_states=vm.memory.states().translate(_WITHOUT_IMAGES),
        slots=list(vm.memory.slots.values()),
        xics=vm.xics.save(),
        vcpus=vm.vcpus.save(),
        terminal=vm.terminal.save(),
        tces=vm.tces.save(),
        areas=vm.hcalls.areas.save(),
        modes=vm.hcalls.save_modes(),
        processor=processor,
    )
    return msgspec.msgpack.encode(state)


def max_bytes(vm: Vm) -> int:
    """A longer state is none of this VM: it would only keep kvm from its other VMs while it is decoded."""
    return vm.memory.n_pages + sum(window.n_tces for window in vm.tces.windows) * _TCE_BYTES + _FIXED_BYTES


def decode(raw: bytes) -> KvmVmState:
    """Raises MalformedMessage."""
    try:
        return _decoder.decode(raw)
    except DECODE_ERRORS as error:
        raise MalformedMessage(str(error)) from None


# -- checks -----------------------------------------------------------------------------------------------------------


def check(vm: Vm, state: KvmVmState) -> None:
    """Raise MalformedMessage unless `vm` can take over all of `state`. Nothing changes."""
    _check_pages(vm, state)
    _check_vcpus(vm, state.vcpus)
    _check_xics(vm, state.xics)
    if state.terminal.start > _MAX_TEXT_START:
        raise MalformedMessage("a terminal that printed too much")
    Terminal().load(state.terminal)
    vm.tces.check(state.tces)
    vm.hcalls.areas.check(state.areas)
    check_modes(state.modes)
    if state.secure and state.processor:
        raise MalformedMessage("the processor of a secure VM is not kvm's to load")


def _check_pages(vm: Vm, state: KvmVmState) -> None:
    if sorted(state.slots, key=_slot_number) != sorted(vm.memory.slots.values(), key=_slot_number):
        raise MalformedMessage("other memory slots than those of this VM")
    if len(state.page_states) != vm.memory.n_pages:
        raise MalformedMessage(f"{len(state.page_states)} pages, this VM has {vm.memory.n_pages}")
    outside = bytearray(state.page_states)
    for slot in state.slots:
        inside = state.page_states[slot.gfns.start : slot.gfns.stop]
        if inside.translate(None, _OF_SECURE_VM if state.secure else _OF_NORMAL_VM):
            raise MalformedMessage("a page is in a state that it cannot be in")
        outside[slot.gfns.start : slot.gfns.stop] = bytes(len(inside))
    if any(outside):
        raise MalformedMessage("a page outside the memory slots has a state")


def _slot_number(slot: MemSlot) -> int:
    return slot.slot


def _check_vcpus(vm: Vm, state: VcpusState) -> None:
    # Spare parts take it over first: what they refuse has changed nothing.
    Vcpus(len(vm.vcpus)).load(state)
    if not all(vcpu.started and vcpu.wait is Wait.NONE for vcpu in state.vcpus):
        raise MalformedMessage("a processor that is off, or waits in a hypercall")


def _check_xics(vm: Vm, state: XicsState) -> None:
    Xics(len(vm.vcpus)).load(state)
    saved = {source.number: source.level_triggered for source in state.sources}
    for source in vm.xics.sources:
        if saved.get(source.number) is not source.level_triggered:
            raise MalformedMessage(f"interrupt source {source.number:#x} of this machine is missing or another one")


# -- arrival ----------------------------------------------------------------------------------------------------------


def take_over(vm: Vm, state: KvmVmState) -> None:
    """`vm` goes on from a `state` that passed `check`; nobody has told its processor yet.

    Raises HostFault when the frames cannot be punched, and nothing has changed then.
    """
    vm.memory.arrive(state.page_states)
    if state.secure:
        vm.secure.arrive()
    _load_xics(vm.xics, state.xics)
    vm.vcpus.load(state.vcpus)
    if not state.secure:
        vm.vcpus.stop(0)
    vm.terminal.load(state.terminal)
    vm.tces.fill(state.tces)
    vm.hcalls.areas.load(state.areas)
    vm.hcalls.load_modes(state.modes)


def _load_xics(xics: Xics, state: XicsState) -> None:
    """What devices have raised here already stays raised."""
    raised = [source.number for source in xics.sources if source.pending or source.asserted]
    xics.load(state)
    for number in raised:
        xics.set_irq(number, level=True)
