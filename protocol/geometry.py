"""Sizes that everything shares: the 64 KiB page between ultravisor and KVM, the largest VM."""

from __future__ import annotations

PAGE_SHIFT = 16
PAGE_BYTES = 1 << PAGE_SHIFT
MAX_VM_BYTES = 1 << 40
"""A host real address keeps the offset in a VM's RAM in 40 bits."""

STREAM_BUFFER_BYTES = 32 << 20
"""The memory by which the ultravisor, kvm and qemu of one VM hand each other what a migration sends."""


def gfn_of(gpa: int) -> int:
    """The guest frame number of a guest physical address."""
    return gpa >> PAGE_SHIFT


def gpa_of(gfn: int) -> int:
    """The guest physical address of the first byte of a frame."""
    return gfn << PAGE_SHIFT


def pages_spanned(gpa: int, n_bytes: int) -> range:
    """The GFNs that `n_bytes` from `gpa` touch; empty for zero bytes."""
    if n_bytes <= 0:
        return range(0)
    return range(gpa >> PAGE_SHIFT, ((gpa + n_bytes - 1) >> PAGE_SHIFT) + 1)
