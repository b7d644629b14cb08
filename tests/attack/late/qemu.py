"""A qemu whose disk is slow at the worst time: large reads end once the VM has turned secure, and not before.

Started by the launcher in place of `services.qemu`; all else is as in the real one.
"""

from __future__ import annotations

import runpy

import trio

from services.qemu import devices
from services.qemu.segments import total_bytes, views_now
from services.qemu.virtio_blk import VirtioBlk, _Request
from tests.attack.late.begun import BEGUN, LOOK_SECONDS

LARGE_BYTES = 1 << 20
"""What the boot stage of the model leaves behind; nothing else here reads so much at once."""


class LateBlk(VirtioBlk):
    """Serves a large read when the frames of its buffer are gone."""

    def _read_now(self, request: _Request) -> bool:
        return total_bytes(request.data_in) != LARGE_BYTES and super()._read_now(request)

    async def _read(self, request: _Request) -> None:
        if total_bytes(request.data_in) == LARGE_BYTES:
            await request.dma.write(request.data_in[0][0], BEGUN)
            await _until_gone(request)
        await super()._read(request)


async def _until_gone(request: _Request) -> None:
    """A frame goes without a word to anybody, so there is no event to wait for."""
    while views_now(request.dma, request.data_in, writing=True):  # noqa: ASYNC110
        await trio.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    vars(devices)["VirtioBlk"] = LateBlk
    runpy.run_module("services.qemu", run_name="__main__")
