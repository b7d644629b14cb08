"""What the host may find in each frame of a VM's normal RAM: one byte a GFN, written by kvm alone.

An ABSENT frame holds nothing: its content lives in secure memory (or nowhere), and whoever wants it asks kvm, which
asks the ultravisor for the encrypted image. Nobody touches an absent frame, since the touch would fill it with zeros.
"""

from __future__ import annotations

from enum import IntEnum


class HostState(IntEnum):
    """The byte of one GFN."""

    ABSENT = 0
    PRESENT = 1
    SHARED = 2
