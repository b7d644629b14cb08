"""The guest of a cluster whose qemu answers late: the real one, but it turns secure once the disk has begun to read.

Else a qemu that gets no processor may see the kick only after the switch, when there is nothing left to end late.
"""

from __future__ import annotations

import runpy
import time

from services.guest.model import boot
from services.guest.model.cpu import Step
from services.guest.model.parts import Parts
from tests.attack.late.begun import BEGUN, LOOK_SECONDS

LIMIT_SECONDS = 30
_call_esm = boot.call_esm


def call_esm_once_reading(parts: Parts) -> Step[str]:
    """UV_ESM, with reads that are left behind under way."""
    left = parts.state.boot
    end = time.monotonic() + LIMIT_SECONDS
    while left.n_left and parts.cpu.load(left.left_buffer, 1) != BEGUN:
        if time.monotonic() > end:
            raise TimeoutError("the disk began none of the reads that are left behind")
        time.sleep(LOOK_SECONDS)
    return (yield from _call_esm(parts))


if __name__ == "__main__":
    vars(boot)["call_esm"] = call_esm_once_reading
    runpy.run_module("services.guest", run_name="__main__")
