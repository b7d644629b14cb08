"""A qemu whose disk tells when it is quiet: its capacity reads as 0 as long as it has work.

Started by the launcher in place of `services.qemu`; all else is as in the real one.
"""

from __future__ import annotations

import runpy

from services.qemu import devices
from services.qemu.virtio_blk import VirtioBlk


class EarlyBlk(VirtioBlk):
    """A disk that does not say how large it is while it serves a queue."""

    def read_config(self, offset: int, n_bytes: int) -> bytes:
        """All zeroes as long as there is work."""
        return bytes(n_bytes) if self.busy else super().read_config(offset, n_bytes)


if __name__ == "__main__":
    vars(devices)["VirtioBlk"] = EarlyBlk
    runpy.run_module("services.qemu", run_name="__main__")
