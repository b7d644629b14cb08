"""Where this machine keeps the firmware of a pseries machine."""

from __future__ import annotations

from pathlib import Path

PLACES = ("/usr/share/qemu/slof.bin", "/usr/share/slof/slof.bin", "/usr/share/qemu-slof/slof.bin")
PACKAGE = "qemu-system-data"


def find_firmware() -> str | None:
    """SLOF as Debian installs it; None when it is not there."""
    return next((place for place in PLACES if Path(place).is_file()), None)
