"""The run state of a VM, as kvm tells it and the operator sees it."""

from __future__ import annotations

from enum import Enum


class VmState(Enum):
    """What a virtual machine is doing."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    OFF = "off"
    LEFT = "left"
    """Its time on this host is over, which only its kvm says: whether it runs elsewhere is the launcher's to know."""
    FAILED = "failed"
