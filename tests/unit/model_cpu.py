"""A processor of the model kernel over plain memory that is all mapped; its time does not pass."""

from __future__ import annotations

from protocol.errors import GuestFault
from protocol.geometry import PAGE_SHIFT
from protocol.messages import Access
from services.guest.address_space import AddressSpace
from services.guest.model.cpu import Cpu
from services.guest.model.state import Calls, Machine
from shared.partition_map import ENTRY_BYTES, MapKind, PartitionMap

RAM_BYTES = 8 << 20


class StillClock:
    """Time that does not pass."""

    def now_ns(self) -> int:
        return 0

    def charge(self, cost: int) -> None:
        pass


def make_cpu() -> Cpu:
    """A processor with RAM_BYTES of memory."""
    return cpu_over(bytearray(RAM_BYTES))


def cpu_over(ram: bytearray) -> Cpu:
    """A processor with `ram`, whole pages, which a device may share."""
    n_pages = len(ram) >> PAGE_SHIFT
    entries = PartitionMap(memoryview(bytearray(n_pages * ENTRY_BYTES)))
    for gfn in range(n_pages):
        entries.set(gfn, MapKind.NORMAL, gfn)

    def fault(gfn: int, access: Access) -> None:
        raise GuestFault(f"{gfn:#x} {access}")

    memory = AddressSpace(memoryview(ram), memoryview(bytearray(n_pages)), fault)
    memory.use_map(entries, None)
    return Cpu(memory, StillClock(), Machine(), Calls())
