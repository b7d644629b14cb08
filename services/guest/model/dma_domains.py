"""How a device that always translates reaches memory: the bus's domain, or one that the device has of its own.

Such a device is served by the DMA API whatever the virtio drivers of this kernel do: mapped through the window of its
domain, and bounced in a secure VM.
"""

from __future__ import annotations

from services.guest.model.cpu import Cpu, NoDevice, Step
from services.guest.model.dma import Dma
from services.guest.model.iommu import IoWindow
from services.guest.model.pages import PageAllocator
from services.guest.model.state import Address, Bounce, DmaPath, KernelState, Window
from services.guest.model.wide_window import WideWindows

OWN_HINT = 1 << 13
"""IO page where the windows that devices have of their own are begun: an address that is given to a device of another
domain is most likely nobody's there."""


class Domain:
    """The domain of one device: `own` is its window where it has one, else unused; `bus` is what all others share."""

    def __init__(self, cpu: Cpu, state: KernelState, wide: WideWindows, bus: Dma, own: Window) -> None:
        self._state = state
        self._wide = wide
        self._bus = bus
        self._own = own
        self._window = IoWindow(cpu, own)
        self._own_dma = bus.through(self._window)

    def open(self, pages: PageAllocator, config_addr: int) -> Step[None]:
        """Take the function's own window, where it has one, with nothing mapped; raises NoDevice without any."""
        where = self._state.machine.own_windows.get(config_addr)
        if where is not None:
            if not self._own.n_io_pages:
                self._window.set_up(pages, where, hint=OWN_HINT)
            yield from self._window.clear_all()
        if not self.dma.liobn:
            raise NoDevice("the bus has no DMA window")

    @property
    def dma(self) -> Dma:
        """Mappings of the device."""
        return self._own_dma if self._own.n_io_pages else self._bus

    @property
    def path(self) -> DmaPath:
        """As the DMA API does it; RAM that the bus's window maps to itself needs no other mapping."""
        mapped = not self._own.n_io_pages and self._wide.leads_to_itself
        secure = self._state.secure
        return DmaPath(
            address=Address.PHYSICAL if mapped else Address.WINDOW,
            bounce=Bounce.ALWAYS if secure else Bounce.NEVER,
            shares=secure,
        )
