"""The guest of a cluster whose qemu answers early: the real one, but it turns secure once the disk is quiet.

Without that a qemu that gets no processor ends the reads, or looks at the ring once more, only after the switch.
"""

from __future__ import annotations

import runpy
import time

from services.guest.model import boot
from services.guest.model.cpu import Step
from services.guest.model.parts import Parts
from services.guest.model.virtio_pci import Transport
from shared.virtio_blk import BlkConfig
from shared.vring import RING_IDX

LIMIT_SECONDS = 30
LOOK_SECONDS = 0.001
_call_esm = boot.call_esm


def call_esm_once_quiet(parts: Parts) -> Step[str]:
    """UV_ESM, with all reads ended that are left behind."""
    end = time.monotonic() + LIMIT_SECONDS
    while not (yield from _is_quiet(parts)):
        if time.monotonic() > end:
            raise TimeoutError("the disk did not end the reads that are left behind")
        time.sleep(LOOK_SECONDS)
    return (yield from _call_esm(parts))


def _is_quiet(parts: Parts) -> Step[bool]:
    """The disk gave back all, and says that it has no work: before the first it may not have begun."""
    used = parts.state.blk.queue.used + RING_IDX
    if parts.cpu.memory.load_u16(used) != parts.state.blk.queue.avail_idx:
        return False
    disk = Transport(parts.cpu, parts.bus, parts.state.blk.pci)
    capacity = yield from disk.device_config(BlkConfig.CAPACITY, 8)
    return capacity != 0


if __name__ == "__main__":
    vars(boot)["call_esm"] = call_esm_once_quiet
    runpy.run_module("services.guest", run_name="__main__")
