"""The modern virtio-pci transport, driver side: finding the regions, negotiation, queues, notification.

Source: VIRTIO 1.4, sections 3.1 (initialisation) and 4.1.
"""

from __future__ import annotations

from services.guest.model.cpu import Busy, Cpu, NoDevice, Step
from services.guest.model.pci import Bus, Function
from services.guest.model.state import Queue, VirtioPci
from shared.pci import Capability
from shared.virtio import DeviceStatus
from shared.virtio_pci import (
    COMMON_CFG_BYTES,
    IOMMU_SWITCH,
    MODERN_DEVICE_BASE,
    CapField,
    CfgType,
    CommonCfg,
    Register,
)

RESET_POLLS = 4
MAX_RESET_ROUNDS = 500
"""A device may have requests to end before its reset is complete: so many times it is asked again, LATER_NS apart."""
_WORD = 0xFFFFFFFF
_STATUS_DRIVER = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER


class Transport:
    """One virtio function; its regions are kept in `state`."""

    def __init__(self, cpu: Cpu, bus: Bus, state: VirtioPci) -> None:
        self._cpu = cpu
        self._bus = bus
        self.state = state

    # -- discovery ----------------------------------------------------------------------------------------------

    def find(self, function: Function) -> Step[None]:
        """Fill `state` from the function's capabilities; raises NoDevice when it is no modern virtio device."""
        if not function.is_virtio:
            raise NoDevice(f"PCI function {function.config_addr:#x} is no modern virtio device")
        state, config_addr = self.state, function.config_addr
        state.config_addr, state.device_type = config_addr, function.device - MODERN_DEVICE_BASE
        bars = yield from self._bus.memory_bars(config_addr)
        state.common = state.notify = state.device = state.msix_cap = 0
        for kind, at in (yield from self._bus.capabilities(config_addr)):
            if kind == Capability.MSIX:
                state.msix_cap = at
            elif kind == Capability.VENDOR:
                yield from self._region(at, bars)
        if not (state.common and state.notify and state.msix_cap):
            raise NoDevice(f"PCI function {config_addr:#x} lacks a virtio region or MSI-X")
        yield from self._bus.enable(config_addr)

    def _region(self, at: int, bars: dict[int, int]) -> Step[None]:
        """Take a region from its vendor capability; the first one of each type counts."""
        state, config_addr = self.state, self.state.config_addr
        head = yield from self._bus.read(config_addr, at, 4)
        cfg_type = head >> 8 * CapField.CFG_TYPE & 0xFF
        if cfg_type not in (CfgType.COMMON, CfgType.NOTIFY, CfgType.DEVICE):
            return
        bar = bars.get((yield from self._bus.read(config_addr, at + CapField.BAR, 1)))
        offset = yield from self._bus.read(config_addr, at + CapField.OFFSET, 4)
        length = yield from self._bus.read(config_addr, at + CapField.LENGTH, 4)
        if bar is None:
            return
        if cfg_type == CfgType.COMMON and not state.common and length >= COMMON_CFG_BYTES:
            state.common = bar + offset
        elif cfg_type == CfgType.DEVICE and not state.device:
            state.device, state.device_bytes = bar + offset, length
        elif cfg_type == CfgType.NOTIFY and not state.notify:
            state.notify, state.notify_bytes = bar + offset, length
            state.notify_multiplier = yield from self._bus.read(config_addr, at + CapField.NOTIFY_MULTIPLIER, 4)

    # -- registers ----------------------------------------------------------------------------------------------

    def _read(self, register: Register) -> Step[int]:
        return (yield from self._cpu.mmio_load(self.state.common + register.offset, register.size_bytes))

    def _write(self, register: Register, value: int) -> Step[None]:
        if register.size_bytes == 8:
            at = self.state.common + register.offset
            yield from self._cpu.mmio_store(at, 4, value & _WORD)
            yield from self._cpu.mmio_store(at + 4, 4, value >> 32)
            return
        yield from self._cpu.mmio_store(self.state.common + register.offset, register.size_bytes, value)

    def device_config(self, offset: int, size: int) -> Step[int]:
        """A field of the device's own configuration; a u64 is read in two halves. Raises NoDevice."""
        if offset + size > self.state.device_bytes:
            raise NoDevice("the device configuration is too short")
        if size < 8:
            return (yield from self._cpu.mmio_load(self.state.device + offset, size))
        low = yield from self._cpu.mmio_load(self.state.device + offset, 4)
        high = yield from self._cpu.mmio_load(self.state.device + offset + 4, 4)
        return high << 32 | low

    def store_device_config(self, offset: int, size: int, value: int) -> Step[None]:
        """Write a field of it, of at most 4 bytes; raises NoDevice."""
        if offset + size > self.state.device_bytes:
            raise NoDevice("the device configuration is too short")
        yield from self._cpu.mmio_store(self.state.device + offset, size, value)

    def reset(self) -> Step[None]:
        """Reset the device; raises Busy while it has not ended its requests, NoDevice when it never does."""
        yield from self._write(CommonCfg.DEVICE_STATUS, 0)
        for _ in range(RESET_POLLS):
            if not (yield from self._read(CommonCfg.DEVICE_STATUS)):
                self.state.reset_rounds = 0
                return
        self.state.reset_rounds += 1
        if self.state.reset_rounds > MAX_RESET_ROUNDS:
            raise NoDevice("the device does not finish its reset")
        raise Busy("the reset of a virtio device")

    def put_behind_iommu(self) -> Step[bool]:
        """Have the device use bus addresses from now on; False when it has no such switch."""
        yield from self._write(IOMMU_SWITCH, 1)
        return bool((yield from self._read(IOMMU_SWITCH)))

    def read_features(self) -> Step[int]:
        """Reset, acknowledge, and read what the device offers."""
        yield from self.reset()
        yield from self._write(CommonCfg.DEVICE_STATUS, DeviceStatus.ACKNOWLEDGE)
        yield from self._write(CommonCfg.DEVICE_STATUS, _STATUS_DRIVER)
        features = 0
        for half in range(2):
            yield from self._write(CommonCfg.DEVICE_FEATURE_SELECT, half)
            features |= (yield from self._read(CommonCfg.DEVICE_FEATURE)) << 32 * half
        return features

    def accept_features(self, features: int) -> Step[None]:
        """Settle on `features`; raises NoDevice when the device refuses them."""
        for half in range(2):
            yield from self._write(CommonCfg.DRIVER_FEATURE_SELECT, half)
            yield from self._write(CommonCfg.DRIVER_FEATURE, features >> 32 * half & _WORD)
        yield from self._write(CommonCfg.DEVICE_STATUS, _STATUS_DRIVER | DeviceStatus.FEATURES_OK)
        if not (yield from self._read(CommonCfg.DEVICE_STATUS)) & DeviceStatus.FEATURES_OK:
            yield from self.fail()
            raise NoDevice("the device refuses the features (FEATURES_OK)")
        self.state.features = features

    def set_config_vector(self, vector: int) -> Step[None]:
        """Which MSI-X vector tells of a changed configuration or status; raises NoDevice."""
        yield from self._write(CommonCfg.CONFIG_MSIX_VECTOR, vector)
        if (yield from self._read(CommonCfg.CONFIG_MSIX_VECTOR)) != vector:
            raise NoDevice("the device refuses its MSI-X vector")

    def queue_size(self, index: int) -> Step[int]:
        """Select a queue and read its largest size; 0 when there is none."""
        yield from self._write(CommonCfg.QUEUE_SELECT, index)
        return (yield from self._read(CommonCfg.QUEUE_SIZE))

    def enable_queue(self, queue: Queue, vector: int) -> Step[None]:
        """Tell the device of a laid out queue (the one selected); raises NoDevice when it cannot be used."""
        yield from self._write(CommonCfg.QUEUE_SIZE, queue.size)
        yield from self._write(CommonCfg.QUEUE_MSIX_VECTOR, vector)
        if (yield from self._read(CommonCfg.QUEUE_MSIX_VECTOR)) != vector:
            raise NoDevice("the device refuses its MSI-X vector")
        yield from self._write(CommonCfg.QUEUE_DESC, queue.desc_addr)
        yield from self._write(CommonCfg.QUEUE_DRIVER, queue.avail_addr)
        yield from self._write(CommonCfg.QUEUE_DEVICE, queue.used_addr)
        offset = (yield from self._read(CommonCfg.QUEUE_NOTIFY_OFF)) * self.state.notify_multiplier
        if offset + 2 > self.state.notify_bytes:
            raise NoDevice("the notification address lies outside its region")
        queue.notify_gpa = self.state.notify + offset
        yield from self._write(CommonCfg.QUEUE_ENABLE, 1)

    def needs_reset(self) -> Step[bool]:
        """Whether the device gave up."""
        return bool((yield from self._read(CommonCfg.DEVICE_STATUS)) & DeviceStatus.NEEDS_RESET)

    def start(self) -> Step[None]:
        """DRIVER_OK."""
        status = _STATUS_DRIVER | DeviceStatus.FEATURES_OK | DeviceStatus.DRIVER_OK
        yield from self._write(CommonCfg.DEVICE_STATUS, status)

    def fail(self) -> Step[None]:
        """Tell the device that its driver gave up."""
        status = yield from self._read(CommonCfg.DEVICE_STATUS)
        yield from self._write(CommonCfg.DEVICE_STATUS, status | DeviceStatus.FAILED)

    def kick(self, queue: Queue) -> Step[None]:
        """Notify the device of new requests."""
        yield from self._cpu.mmio_store(queue.notify_gpa, 2, queue.index)
