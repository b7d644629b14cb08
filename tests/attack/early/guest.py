"""The guest of a cluster whose qemu answers early: the real one, but it turns secure once the disk is quiet.

Without that a qemu that gets no processor ends the reads, or looks at the ring once more, only after the switch.
"""

from __future__ import annotations

from services.guest.model.cpu import Step
from services.guest.model.parts import Parts
from services.guest.model.virtio_pci import Transport
from shared.virtio_blk import BlkConfig
from shared.vring import RING_IDX
from tests.attack.held_esm import run_guest


def is_quiet(parts: Parts) -> Step[bool]:
    """The disk gave back all reads that are left behind, and then says that it has no work."""
    used = parts.state.blk.queue.used + RING_IDX
    if parts.cpu.memory.load_u16(used) != parts.state.blk.queue.avail_idx:
        # One that has not seen the kick has no work either.
        return False
    disk = Transport(parts.cpu, parts.bus, parts.state.blk.pci)
    capacity = yield from disk.device_config(BlkConfig.CAPACITY, 8)
    return capacity != 0


if __name__ == "__main__":
    run_guest(is_quiet)
