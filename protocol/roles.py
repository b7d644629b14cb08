"""The four kinds of process of a host instance, and the launcher that starts them."""

from __future__ import annotations

from enum import Enum


class Role(Enum):
    """Which part of the machine a process plays. The value is its name everywhere a person sees it."""

    ULTRAVISOR = "ultravisor"
    KVM = "kvm"
    QEMU = "qemu"
    GUEST = "guest"
    LAUNCHER = "launcher"

    @property
    def privilege(self) -> int:
        """Higher is more privileged; of two link ends the more privileged one binds."""
        return _PRIVILEGE[self]


_PRIVILEGE = {Role.LAUNCHER: 4, Role.ULTRAVISOR: 3, Role.KVM: 2, Role.QEMU: 1, Role.GUEST: 0}
