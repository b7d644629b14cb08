"""What every virtual machine here is, whoever describes it: board, device tree, monitor, management.

Source: QEMU 7.2 `hw/ppc/spapr.c`, `hw/ppc/spapr_vio.c`.
"""

from __future__ import annotations

import uuid

ARCHITECTURE = "ppc64"
MACHINE = "pseries"
QEMU_RELEASE = (7, 2, 0)
"""The release of QEMU whose machine and monitor ours follow."""
VERSIONED_MACHINE = f"{MACHINE}-{QEMU_RELEASE[0]}.{QEMU_RELEASE[1]}"
"""As QEMU names the machine of that release."""
CPU_MODEL = "POWER9"
N_CPUS = 1

FIRST_SLOT = 1
"""Of the PCI bus, for the first device."""
N_SLOTS = 32

VTY_REG = 0x71000000
"""Unit address of the terminal on the virtual bus."""
NVRAM_REG = 0x71000001
"""Unit address of the non-volatile memory."""

REPEATABLE_START_SECONDS = 1_767_225_600
"""What the clock of a machine shows first whose runs repeat, in seconds since 1970-01-01 UTC."""


def machine_uuid(vm: str, lpid: int) -> uuid.UUID:
    """The machine's own number: the same at every start of a VM of this name and lpid."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"pefbox:{vm}:{lpid}")


def slot_of(index: int) -> int:
    """The slot of the PCI bus that the device at `index` of the VM's list is plugged into."""
    return FIRST_SLOT + index
