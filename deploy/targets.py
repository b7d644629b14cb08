"""Names of processes: `alpha/kvm`, `vm1/qemu`, and `vm1/qemu.2` for one where a VM arrived."""

from __future__ import annotations


def is_of(process: str, name: str) -> bool:
    """Whether `name` means a process: itself, as it is called wherever it is, or its host or VM."""
    owner, _, role = process.partition("/")
    return name in (process, f"{owner}/{role.partition('.')[0]}", owner)
