"""Interrupt source numbers of the machine, as QEMU's pseries numbers them."""

from __future__ import annotations

EPOW_SOURCE = 0x1000
HOTPLUG_SOURCE = 0x1001
VIO_SOURCE_BASE = 0x1100
PCI_LSI_BASE = 0x1200
MSI_BASE = 0x1300
SOURCES_END = 0x2000
"""Interrupt sources from here up do not exist."""

VTY_SOURCE = VIO_SOURCE_BASE
"""The virtual terminal; an edge."""
NVRAM_SOURCE = VIO_SOURCE_BASE + 1
"""Non-volatile memory, which never interrupts."""
