"""What a machine is made of, for management: answers of the board and of its declarations, as plain values."""

from __future__ import annotations

from typing import Any

from services.qemu.board import Board
from services.qemu.device_function import DeviceFunction
from services.qemu.qmp import COMMANDS
from services.qemu.virtio_pci import VirtioPciFunction
from shared.machine_type import ARCHITECTURE, VERSIONED_MACHINE
from shared.pci import slot_and_function
from shared.virtio import DeviceStatus, feature_names


def describe_machine(board: Board) -> dict[str, Any]:
    """The machine, its monitor's commands, its devices and the windows that they translate through."""
    bridge = board.bridge
    devices = zip(board.vm.devices, board.functions, strict=True)
    return {
        "arch": f"{ARCHITECTURE}le" if board.loaded_little_endian else ARCHITECTURE,
        "machine": VERSIONED_MACHINE,
        "uuid": str(board.uuid),
        "monitor_commands": [command.name for command in COMMANDS],
        "devices": [{"kind": entry.kind, **_device(function)} for entry, function in devices],
        "dma_windows": [
            {
                "liobn": table.window.liobn,
                "base": table.window.base,
                "page_bytes": 1 << table.window.page_shift,
                "size_bytes": table.window.n_tces << table.window.page_shift,
            }
            for domain in bridge.domains
            for table in domain.windows
        ],
        "dma_page_bytes": sorted(1 << shift for shift in board.rtas_services.ddw.page_shifts) if bridge.ddw else [],
    }


def _device(function: DeviceFunction[Any]) -> dict[str, Any]:
    slot, pci_function = slot_and_function(function.devfn)
    place = {"slot": slot, "function": pci_function}
    if not isinstance(function, VirtioPciFunction):
        return {**place, "offered": [], "accepted": [], "driver_ok": False}
    device = function.device
    names = device.FEATURE_BITS
    has_agreed = device.status & DeviceStatus.FEATURES_OK
    return {
        **place,
        "offered": feature_names(device.features, names),
        "accepted": feature_names(device.state.driver_features if has_agreed else 0, names),
        "driver_ok": bool(device.status & DeviceStatus.DRIVER_OK),
    }
