"""Which pairs of processes are linked, who binds, and which numbers each direction carries.

A reader refuses every number that its direction does not list: that, with the socket's keys, is what keeps a role
to its own calls. Reflected hypercalls (ultravisor -> kvm) carry `[lpid, vcpu, args...]` under the number of the
hypercall and are answered by UV_RETURN and by nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol import messages as m
from protocol.declare import Caller
from protocol.hcalls import HCALLS
from protocol.roles import Role
from protocol.ucalls import UCALLS

_GUEST_HCALLS = frozenset(c.number for c in HCALLS if c.callers & {Caller.VM, Caller.SVM})
_ALL_HCALLS = frozenset(c.number for c in HCALLS)
_GUEST_UCALLS = frozenset(c.number for c in UCALLS if c.callers & {Caller.VM, Caller.SVM})
_HV_UCALLS = frozenset(c.number for c in UCALLS if Caller.HYPERVISOR in c.callers)


def _numbers(*messages: m.Message) -> frozenset[int]:  # type: ignore[type-arg]
    return frozenset(message.number for message in messages)


_DEBUG = _numbers(m.VCPU_REGISTERS, m.VCPU_SET_REGISTER, m.VCPU_TRANSLATE, m.VCPU_DEBUG, m.VCPU_DEBUG_COMMAND)
"""What a debugger of the host asks of a normal VM's processor: qemu of kvm, kvm of the guest."""


@dataclass(frozen=True, slots=True)
class LinkKind:
    """One kind of link. `upper` is the more privileged role and binds; of equals, one is told to (`LinkEntry.binds`).

    `upward` and `downward` are the numbers of calls and events that each direction carries.
    `open_numbers` says that an unknown call number is answered with the space's "no such function" code
    instead of being a breach of the protocol: a guest may try any number.
    `bundles` says that messages which leave together share a frame (protocol.wire).
    """

    upper: Role
    lower: Role
    upward: frozenset[int]
    downward: frozenset[int]
    open_numbers: bool = False
    bundles: bool = False
    purpose: str = ""
    """Tells kinds of link between the same roles apart."""

    @property
    def name(self) -> str:
        """`kvm-guest`: the more privileged role first."""
        return f"{self.upper.value}-{self.purpose or self.lower.value}"

    def inbound(self, me: Role) -> frozenset[int]:
        """The numbers that role `me` may receive on this link."""
        return self.upward if me is self.upper else self.downward


KVM_GUEST = LinkKind(
    upper=Role.KVM,
    lower=Role.GUEST,
    upward=_GUEST_HCALLS | _numbers(m.MAP_FAULT, m.GUEST_CRASHED, m.VCPU_DEBUG_STOP),
    downward=_numbers(
        m.VCPU_START, m.VCPU_STOP, m.VCPU_CONTINUE, m.VCPU_LINE, m.MAP_INVALIDATE, m.VCPU_SAVE, m.VCPU_LOAD
    )
    | _DEBUG,
    open_numbers=True,
)
ULTRAVISOR_GUEST = LinkKind(
    upper=Role.ULTRAVISOR,
    lower=Role.GUEST,
    upward=_GUEST_UCALLS | _GUEST_HCALLS | _numbers(m.MAP_FAULT, m.GUEST_CRASHED),
    downward=_numbers(m.SVM_START, m.SVM_ENDED, m.MAP_INVALIDATE, m.SVM_FREEZE, m.SVM_LOAD, m.SVM_THAW),
    open_numbers=True,
)
ULTRAVISOR_KVM = LinkKind(
    upper=Role.ULTRAVISOR,
    lower=Role.KVM,
    upward=_HV_UCALLS,
    downward=_ALL_HCALLS,
    open_numbers=True,
    bundles=True,
)
KVM_QEMU = LinkKind(
    upper=Role.KVM,
    lower=Role.QEMU,
    upward=_numbers(
        m.PAGES_WANTED,
        m.PAGES_DISCARD,
        m.IRQ_SOURCE,
        m.IRQ_SET,
        m.MEMSLOT_SET,
        m.VM_START,
        m.VM_STOP,
        m.VM_CONTINUE,
        m.VM_RESET,
        m.VM_POWEROFF,
        m.TCE_WINDOW_CREATE,
        m.TCE_WINDOW_REMOVE,
        m.TERMINAL_OUTPUT,
        m.DOORBELL_SET,
        m.VM_FREEZE,
        m.VM_SAVE,
        m.VM_LOAD,
        m.DIRTY_LOG,
        m.MIGRATION_UCALL,
    )
    | _DEBUG,
    downward=_numbers(
        m.EXIT_MMIO_LOAD,
        m.EXIT_MMIO_STORE,
        m.EXIT_RTAS,
        m.EXIT_HCALL,
        m.VM_EVENT,
        m.DOORBELL_RUNG,
        m.MAP_INVALIDATE,
        m.VCPU_DEBUG_STOP,
    ),
)

QEMU_QEMU = LinkKind(
    upper=Role.QEMU,
    lower=Role.QEMU,
    upward=_numbers(m.NET_FRAMES),
    downward=_numbers(m.NET_FRAMES),
)

QEMU_MIGRATION = LinkKind(
    upper=Role.QEMU,
    lower=Role.QEMU,
    upward=_numbers(m.MIGRATION_KEY),
    downward=frozenset(),
    purpose="migration",
)
"""From the qemu that a VM leaves to the one where it arrives, which binds; the bulk goes over a channel of its own."""

_KINDS = (KVM_GUEST, ULTRAVISOR_GUEST, ULTRAVISOR_KVM, KVM_QEMU, QEMU_QEMU, QEMU_MIGRATION)
LINK_KINDS = {kind.name: kind for kind in _KINDS}

GUEST_WHILE_SECURE = _numbers(m.VCPU_STOP, m.VCPU_CONTINUE, m.VCPU_LINE)
"""All that a guest takes from kvm while S is set; anything else is refused and audited."""


def name_of(number: int) -> str:
    """The declared name of a call or message number, or its hexadecimal form."""
    declared = HCALLS.by_number.get(number) or UCALLS.by_number.get(number) or m.MESSAGES.get(number)
    return declared.name if declared is not None else f"{number:#x}"
