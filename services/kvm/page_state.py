"""KVM's own view of each guest frame (Linux `book3s_hv_uvmem.c`, "States of a GFN").

    NORMAL     an ordinary page
    SECURE     in secure memory (a device page in Linux: UVMEM); the normal frame is punched out
    PAGED_OUT  its encrypted image is in the normal frame (MEM)
    SHARED     the VM shares it: guest and host use the normal frame
    DISCARDED  of a normal VM, in its balloon: the frame is punched out, and whoever touches it next finds zeros

The ultravisor drives SECURE and SHARED by H_SVM_PAGE_IN; kvm drives PAGED_OUT by UV_PAGE_OUT; qemu has DISCARDED made
by PAGES_DISCARD.
"""

from __future__ import annotations

from enum import IntEnum

from shared.host_view import HostState


class KvmState(IntEnum):
    """State of one guest frame for KVM."""

    NORMAL = 0
    SECURE = 1
    PAGED_OUT = 2
    SHARED = 3
    DISCARDED = 4

    @property
    def host_state(self) -> HostState:
        """What the host finds in the normal frame."""
        return _HOST_STATE[self]


_HOST_STATE = (HostState.PRESENT, HostState.ABSENT, HostState.PRESENT, HostState.SHARED, HostState.ABSENT)
"""By the value of the KvmState."""
