"""A virtio device as a modern PCI function.

BAR 1 holds the MSI-X table, BAR 4 (64-bit) the common, ISR, device and notify regions, a page each, as QEMU lays
them out. Values of registers are little-endian numbers; a register answers only at its own offset and width, a 64-bit
one also in halves.

Source: VIRTIO 1.4, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from struct import Struct

import msgspec

from services.qemu.device_function import DeviceFunction
from services.qemu.msix import PBA_OFFSET, MsixState, MsixTable
from services.qemu.pci_bus import Bar, PciIdentity
from services.qemu.virtio_device import VirtioDevice, VirtioState
from services.qemu.virtqueue import Virtqueue
from shared.pci import (
    MSIX_ENABLE,
    MSIX_FUNCTION_MASK,
    Capability,
    Command,
    Config,
    Msix,
    OfSpace,
)
from shared.virtio_pci import (
    CAP_BYTES,
    COMMON_CFG_BYTES,
    IOMMU_SWITCH,
    ISR_CONFIG,
    ISR_QUEUE,
    MODERN_DEVICE_BASE,
    MODERN_REVISION,
    NO_VECTOR,
    NOTIFY_CAP_BYTES,
    PCI_CFG_CAP_BYTES,
    SUBSYSTEM_ID,
    VENDOR_ID,
    CapField,
    CfgType,
    CommonCfg,
    Register,
)

MSIX_BAR = 1
MODERN_BAR = 4
REGION_BYTES = 0x1000
MODERN_BAR_BYTES = 4 * REGION_BYTES
OFFSETS = {
    CfgType.COMMON: 0,
    CfgType.ISR: REGION_BYTES,
    CfgType.DEVICE: 2 * REGION_BYTES,
    CfgType.NOTIFY: 3 * REGION_BYTES,
}
NOTIFY_MULTIPLIER = 4

_VENDOR_CAP = Struct("<BBBBxxII")
"""A vendor capability after its id and next pointer: cap_len, cfg_type, bar, id, padding, offset, length."""


class VirtioPciState(msgspec.Struct, tag="virtio"):
    """The transport and its device between two requests."""

    config: bytes
    msix: MsixState
    isr: int
    device_feature_select: int
    driver_feature_select: int
    queue_select: int
    device: VirtioState


class VirtioPciFunction(DeviceFunction[VirtioPciState]):
    """The PCI function of `device`; it is the device's transport."""

    size_bytes = MODERN_BAR_BYTES
    state_type = VirtioPciState
    device: VirtioDevice

    def __init__(self, device: VirtioDevice, class_code: int) -> None:
        device_id = MODERN_DEVICE_BASE + device.device_id
        super().__init__(PciIdentity(VENDOR_ID, device_id, class_code, MODERN_REVISION, VENDOR_ID, SUBSYSTEM_ID))
        self.device = device
        device.transport = self
        self.messages = self.msix = MsixTable(len(device.queues) + 1, self.send_message)
        self._isr = 0
        self._device_feature_select = self._driver_feature_select = self._queue_select = 0
        self._loads = self._load_table()
        self._stores = self._store_table()
        self.add_bar(Bar(MSIX_BAR, OfSpace.MEM32, self.msix))
        self._modern_bar = Bar(MODERN_BAR, OfSpace.MEM64, self, prefetchable=True)
        self.add_bar(self._modern_bar)
        self._msix_offset = self._add_msix_capability()
        self._pci_cfg_offset = self._add_virtio_capabilities()

    # Transport of the device.

    def queue_interrupt(self, queue: Virtqueue) -> None:
        """Buffers of `queue` were used: its vector, or the shared line."""
        self._interrupt(queue.state.msix_vector, ISR_QUEUE)

    def config_interrupt(self) -> None:
        """The configuration or status changed."""
        self._interrupt(self.device.state.config_vector, ISR_CONFIG)

    def device_reset(self) -> None:
        """The device was reset: nothing is pending and the selectors are 0."""
        self._isr = 0
        self._device_feature_select = self._driver_feature_select = self._queue_select = 0
        self.set_intx(False)
        self._tell_doorbells()

    def queues_started(self) -> None:
        """The notify registers of the running queues are doorbells."""
        self._tell_doorbells()

    # The modern BAR.

    def load(self, offset: int, size_bytes: int) -> int:
        """A load from the modern BAR; 0 where there is no register of that width."""
        region, at = divmod(offset, REGION_BYTES)
        if region == 0:
            field = self._loads.get((at, size_bytes))
            return field() if field is not None else 0
        if region == 1:
            return self._take_isr() if at == 0 else 0
        if region == 2:
            return int.from_bytes(self.device.read_config(at, size_bytes), "little")
        return 0

    def store(self, offset: int, size_bytes: int, value: int) -> None:
        """A store to the modern BAR; nothing happens where there is no writable register of that width."""
        region, at = divmod(offset, REGION_BYTES)
        if region == 3:
            self.device.kick(at // NOTIFY_MULTIPLIER)
        elif region == 2:
            self.device.write_config(at, value.to_bytes(size_bytes, "little"))
        elif region == 0:
            field = self._stores.get((at, size_bytes))
            if field is not None:
                field(value)

    # Configuration space.

    def read_config(self, offset: int, size_bytes: int) -> int:
        """As every function; the data window of the pci-cfg capability reads the BAR."""
        if offset == self._pci_cfg_offset + CapField.PCI_CFG_DATA:
            window = self._pci_cfg_window()
            return 0 if window is None or window[1] != size_bytes else self.load(*window)
        return super().read_config(offset, size_bytes)

    def config_written(self, offset: int, size_bytes: int) -> None:
        """React to BARs, MSI-X control, the command register and the pci-cfg window."""
        if offset < Config.CAPABILITIES:
            self._tell_doorbells()
        if offset <= self._msix_offset + Msix.CONTROL + 1 < offset + size_bytes:
            control = super().read_config(self._msix_offset + Msix.CONTROL, 2)
            self.msix.set_control(
                enabled=bool(control & MSIX_ENABLE), function_masked=bool(control & MSIX_FUNCTION_MASK)
            )
        elif offset <= Config.COMMAND + 1 < offset + size_bytes:
            self.update_intx()
        elif offset == self._pci_cfg_offset + CapField.PCI_CFG_DATA:
            window = self._pci_cfg_window()
            if window is not None and window[1] == size_bytes:
                self.store(*window, super().read_config(offset, size_bytes))

    # Life.

    async def reset_function(self) -> None:
        """Back to power-on, the device included, once its open requests have ended."""
        await self.device.reset()
        self.device.power_on()
        self.msix.reset()
        self.reset()

    def save(self) -> VirtioPciState:
        """The state of transport and device; the device is drained."""
        return VirtioPciState(
            self.config,
            self.msix.save(),
            self._isr,
            self._device_feature_select,
            self._driver_feature_select,
            self._queue_select,
            self.device.save(),
        )

    def load_state(self, state: VirtioPciState) -> None:
        """Go on from `state`, of an equal function."""
        self.load_config(state.config)
        self.msix.load_state(state.msix)
        self._isr = state.isr
        self._device_feature_select = state.device_feature_select
        self._driver_feature_select = state.driver_feature_select
        self._queue_select = state.queue_select
        self.update_intx()
        self.device.load(state.device)
        self._tell_doorbells()

    # Inside.

    def _tell_doorbells(self) -> None:
        if self.bus is None:
            return
        running = [queue.index for queue in self.device.queues if queue.running and self.device.serving]
        offsets = frozenset(OFFSETS[CfgType.NOTIFY] + NOTIFY_MULTIPLIER * index for index in running)
        self.bus.set_doorbells(self, self._modern_bar, offsets)

    def _interrupt(self, vector: int, isr: int) -> None:
        if self.msix.enabled:
            self.msix.notify(vector)
            return
        self._isr |= isr
        self.set_intx(True)

    def _take_isr(self) -> int:
        isr, self._isr = self._isr, 0
        self.set_intx(False)
        return isr

    def _load_table(self) -> dict[tuple[int, int], Callable[[], int]]:
        device = self.device
        table: dict[Register, Callable[[], int]] = {
            CommonCfg.DEVICE_FEATURE_SELECT: lambda: self._device_feature_select,
            CommonCfg.DEVICE_FEATURE: lambda: _half(device.features, self._device_feature_select),
            CommonCfg.DRIVER_FEATURE_SELECT: lambda: self._driver_feature_select,
            CommonCfg.DRIVER_FEATURE: lambda: _half(device.state.driver_features, self._driver_feature_select),
            CommonCfg.CONFIG_MSIX_VECTOR: lambda: device.state.config_vector,
            CommonCfg.NUM_QUEUES: lambda: len(device.queues),
            CommonCfg.DEVICE_STATUS: lambda: device.status,
            CommonCfg.CONFIG_GENERATION: lambda: device.state.config_generation & 0xFF,
            CommonCfg.QUEUE_SELECT: lambda: self._queue_select,
            CommonCfg.QUEUE_SIZE: lambda: self._selected("size"),
            CommonCfg.QUEUE_MSIX_VECTOR: lambda: self._selected("msix_vector"),
            CommonCfg.QUEUE_ENABLE: lambda: self._selected("enabled"),
            CommonCfg.QUEUE_NOTIFY_OFF: lambda: self._queue_select if self._queue_select < len(device.queues) else 0,
        }
        if device.access.offer.iommu_switch:
            table[IOMMU_SWITCH] = lambda: int(device.access.state.behind_iommu)
        loads = {(register.offset, register.size_bytes): field for register, field in table.items()}
        for register, name in _ADDRESSES.items():
            loads[register.offset, 8] = partial(self._selected, name)
            loads[register.offset, 4] = partial(self._selected_half, name, 0)
            loads[register.offset + 4, 4] = partial(self._selected_half, name, 1)
        return loads

    def _store_table(self) -> dict[tuple[int, int], Callable[[int], None]]:
        table: dict[Register, Callable[[int], None]] = {
            CommonCfg.DEVICE_FEATURE_SELECT: self._select_device_features,
            CommonCfg.DRIVER_FEATURE_SELECT: self._select_driver_features,
            CommonCfg.DRIVER_FEATURE: self._store_features,
            CommonCfg.CONFIG_MSIX_VECTOR: self._store_config_vector,
            CommonCfg.DEVICE_STATUS: self.device.set_status,
            CommonCfg.QUEUE_SELECT: self._select_queue,
            CommonCfg.QUEUE_SIZE: self._store_size,
            CommonCfg.QUEUE_MSIX_VECTOR: self._store_queue_vector,
            CommonCfg.QUEUE_ENABLE: self._store_enable,
        }
        if self.device.access.offer.iommu_switch:
            table[IOMMU_SWITCH] = self._store_iommu_switch
        stores = {(register.offset, register.size_bytes): field for register, field in table.items()}
        for register, name in _ADDRESSES.items():
            stores[register.offset, 8] = partial(self._store_address, name)
            stores[register.offset, 4] = partial(self._store_half, name, 0)
            stores[register.offset + 4, 4] = partial(self._store_half, name, 1)
        return stores

    def _selected(self, field: str) -> int:
        """A field of the selected queue; 0 (size 0: no such queue) when there is none."""
        if self._queue_select >= len(self.device.queues):
            return NO_VECTOR if field == "msix_vector" else 0
        return int(getattr(self.device.queues[self._queue_select].state, field))

    def _selected_half(self, field: str, half: int) -> int:
        return _half(self._selected(field), half)

    def _select_device_features(self, value: int) -> None:
        self._device_feature_select = value

    def _select_driver_features(self, value: int) -> None:
        self._driver_feature_select = value

    def _select_queue(self, value: int) -> None:
        self._queue_select = value

    def _store_features(self, value: int) -> None:
        if self._driver_feature_select < 2:
            features = self.device.state.driver_features
            self.device.set_driver_features(_with_half(features, self._driver_feature_select, value))
        elif value:
            # Bits 64 and up are never offered, nor is bit 63: it stands for them when FEATURES_OK is refused.
            self.device.set_driver_features(self.device.state.driver_features | 1 << 63)

    def _store_config_vector(self, value: int) -> None:
        self.device.state.config_vector = self._vector(value)

    def _store_queue_vector(self, value: int) -> None:
        if self._queue_select < len(self.device.queues):
            self.device.queues[self._queue_select].state.msix_vector = self._vector(value)

    def _vector(self, value: int) -> int:
        return value if value < self.msix.n_vectors else NO_VECTOR

    def _store_iommu_switch(self, value: int) -> None:
        if value & 1 and not self.device.access.state.behind_iommu:
            self.device.put_behind_iommu("the driver put the device behind the IOMMU after it had settled its features")

    def _store_size(self, value: int) -> None:
        queue = self.device.configure_queue(self._queue_select)
        if queue is not None:
            queue.size = value

    def _store_enable(self, value: int) -> None:
        queue = self.device.configure_queue(self._queue_select)
        if queue is not None and value == 1:
            queue.enabled = True

    def _store_address(self, name: str, value: int) -> None:
        queue = self.device.configure_queue(self._queue_select)
        if queue is not None:
            setattr(queue, name, value)

    def _store_half(self, name: str, half: int, value: int) -> None:
        self._store_address(name, _with_half(self._selected(name), half, value))

    def _add_msix_capability(self) -> int:
        body = bytearray(Msix.LENGTH - 2)
        body[0:2] = (self.msix.n_vectors - 1).to_bytes(2, "little")
        body[Msix.TABLE - 2 : Msix.TABLE + 2] = MSIX_BAR.to_bytes(4, "little")
        body[Msix.PBA - 2 : Msix.PBA + 2] = (PBA_OFFSET | MSIX_BAR).to_bytes(4, "little")
        return self.add_capability(
            Capability.MSIX, bytes(body), (MSIX_ENABLE | MSIX_FUNCTION_MASK).to_bytes(2, "little")
        )

    def _add_virtio_capabilities(self) -> int:
        lengths = {
            CfgType.COMMON: COMMON_CFG_BYTES,
            CfgType.ISR: 1,
            CfgType.DEVICE: REGION_BYTES,
            CfgType.NOTIFY: NOTIFY_MULTIPLIER * len(self.device.queues),
        }
        for cfg_type, length in lengths.items():
            n_bytes, tail = CAP_BYTES, b""
            if cfg_type is CfgType.NOTIFY:
                n_bytes, tail = NOTIFY_CAP_BYTES, NOTIFY_MULTIPLIER.to_bytes(4, "little")
            body = _VENDOR_CAP.pack(n_bytes, cfg_type, MODERN_BAR, 0, OFFSETS[cfg_type], length)
            self.add_capability(Capability.VENDOR, body + tail)
        window = _VENDOR_CAP.pack(PCI_CFG_CAP_BYTES, CfgType.PCI_CFG, 0, 0, 0, 0)
        writable = _VENDOR_CAP.pack(0, 0, 0xFF, 0, 0xFFFFFFFF, 0xFFFFFFFF)
        return self.add_capability(Capability.VENDOR, window + bytes(4), writable + b"\xff" * 4)

    def _pci_cfg_window(self) -> tuple[int, int] | None:
        """Offset and length in the modern BAR that the driver chose; None when it is no valid access."""
        at = self._pci_cfg_offset
        bar = super().read_config(at + CapField.BAR, 1)
        offset = super().read_config(at + CapField.OFFSET, 4)
        length = super().read_config(at + CapField.LENGTH, 4)
        valid = length in (1, 2, 4) and offset % length == 0 and offset + length <= MODERN_BAR_BYTES
        return (offset, length) if bar == MODERN_BAR and valid and self.command(Command.MEMORY) else None


_ADDRESSES = {
    CommonCfg.QUEUE_DESC: "desc",
    CommonCfg.QUEUE_DRIVER: "driver",
    CommonCfg.QUEUE_DEVICE: "device",
}


def _half(value: int, index: int) -> int:
    return value >> 32 * index & 0xFFFFFFFF if index < 2 else 0


def _with_half(value: int, index: int, half: int) -> int:
    shift = 32 * index
    return value & ~(0xFFFFFFFF << shift) | half << shift
