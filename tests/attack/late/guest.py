"""The guest of a cluster whose qemu answers late: the real one, but it turns secure once the disk has begun to read.

Else a qemu that gets no processor may see the kick only after the switch, when there is nothing left to end late.
"""

from __future__ import annotations

from services.guest.model.cpu import Step
from services.guest.model.parts import Parts
from tests.attack.held_esm import run_guest
from tests.attack.late.begun import BEGUN


def has_begun(parts: Parts) -> Step[bool]:
    """The disk has begun one of the reads that are left behind, if any are."""
    left = parts.state.boot
    return not left.n_left or parts.cpu.load(left.left_buffer, 1) == BEGUN
    yield


if __name__ == "__main__":
    run_guest(has_begun)
