"""An interrupt controller with two level and two edge sources."""

from __future__ import annotations

from services.kvm.xics import Xics

LSI, OTHER_LSI = 0x1200, 0x1201
MSI, OTHER_MSI = 0x1300, 0x1301
OPEN = 0xFF


def controller(n_servers: int = 2) -> Xics:
    """Two level and two edge sources of priority 5 at server 0; servers accept everything."""
    xics = Xics(n_servers)
    for number in (LSI, OTHER_LSI):
        xics.add_source(number, level_triggered=True)
    for number in (MSI, OTHER_MSI):
        xics.add_source(number, level_triggered=False)
    for number in (LSI, OTHER_LSI, MSI, OTHER_MSI):
        xics.configure(number, 0, 5, 5)
    for server in range(n_servers):
        xics.h_cppr(server, OPEN)
    return xics


def accept(xics: Xics, server: int = 0) -> int:
    """The source that H_XIRR takes, 0 for none."""
    return xics.h_xirr(server)[1] & 0xFFFFFF


def end(xics: Xics, number: int, cppr: int = OPEN, server: int = 0) -> None:
    """H_EOI of `number`, back to `cppr`."""
    xics.h_eoi(server, cppr << 24 | number)
