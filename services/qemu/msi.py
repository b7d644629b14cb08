"""Message signalled interrupts of a function that can send one: a capability in its configuration space.

Source: PCI Local Bus 3.0, section 6.8.1.
"""

from __future__ import annotations

from services.qemu.pci_bus import PciFunction
from shared.pci import MSI_64BIT, MSI_ENABLE, Capability, MsiField

_DWORD_ALIGNED = (1 << 64) - 4


class Msi:
    """The message of `function`, all of it in configuration space, which saves and resets it."""

    capability = Capability.MSI
    n_vectors = 1

    def __init__(self, function: PciFunction) -> None:
        self._function = function
        self._at = function.add_capability(
            Capability.MSI,
            _body(MSI_64BIT, address=0, data=0),
            writable=_body(MSI_ENABLE, address=_DWORD_ALIGNED, data=0xFFFF),
        )

    @property
    def enabled(self) -> bool:
        """Whether the driver wants messages in the place of the interrupt line."""
        return bool(self._function.read_config(self._at + MsiField.CONTROL, 2) & MSI_ENABLE)

    def set_message(self, vector: int, address: int, data: int) -> None:
        """Program the message; there is none but vector 0."""
        if vector:
            return
        self._function.write_config(self._at + MsiField.ADDRESS, 4, address & 0xFFFFFFFF)
        self._function.write_config(self._at + MsiField.ADDRESS + 4, 4, address >> 32)
        self._function.write_config(self._at + MsiField.DATA, 2, data)

    def notify(self) -> None:
        """Send the message; nothing while the driver has not enabled it."""
        if not self.enabled:
            return
        low = self._function.read_config(self._at + MsiField.ADDRESS, 4)
        high = self._function.read_config(self._at + MsiField.ADDRESS + 4, 4)
        self._function.send_message(high << 32 | low, self._function.read_config(self._at + MsiField.DATA, 2))


def _body(control: int, address: int, data: int) -> bytes:
    """The capability after its id and next pointer."""
    return control.to_bytes(2, "little") + address.to_bytes(8, "little") + data.to_bytes(2, "little")
