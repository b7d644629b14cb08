"""A PCI function with a device behind it, whatever the device: what the board does with each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

import msgspec

from services.qemu.pci_bus import PciFunction
from services.runtime.tracer import Tracer

StateT = TypeVar("StateT", bound=msgspec.Struct)


class Device(Protocol):
    """What lives behind a function."""

    @property
    def name(self) -> str:
        """For the operator: `vm1/root`."""

    @property
    def fault(self) -> str | None:
        """What its driver did wrong last, None since a reset."""

    async def run(self) -> None:
        """Serve until cancelled."""

    async def drained(self) -> None:
        """Return when there is nothing left to do."""

    def trace_to(self, tracer: Tracer, lpid: int) -> None:
        """Note requests as those of VM `lpid`."""


class DeviceFunction(PciFunction, ABC, Generic[StateT]):
    """The function of `device`. `StateT` is what the guest can see of both, between two requests."""

    device: Device
    state_type: type[StateT]

    @abstractmethod
    async def reset_function(self) -> None:
        """Back to power-on, the device included, once its open requests have ended."""

    @abstractmethod
    def save(self) -> StateT:
        """A copy of the state; the device is drained."""

    @abstractmethod
    def load_state(self, state: StateT) -> None:
        """Go on from `state`, of an equal function; raises ValueError for one that cannot be its."""
