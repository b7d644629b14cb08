"""A guest that turns secure only once its disk is where a test wants it; else the real one."""

from __future__ import annotations

import runpy
import time
from collections.abc import Callable

from services.guest.model import boot
from services.guest.model.cpu import Step
from services.guest.model.parts import Parts

_LIMIT_SECONDS = 30
_LOOK_SECONDS = 0.001


def run_guest(may_switch: Callable[[Parts], Step[bool]]) -> None:
    """The role's main, which calls UV_ESM as soon as `may_switch`."""
    call_esm = boot.call_esm

    def call_esm_later(parts: Parts) -> Step[str]:
        end = time.monotonic() + _LIMIT_SECONDS
        while not (yield from may_switch(parts)):
            if time.monotonic() > end:
                raise TimeoutError(f"the disk is not where the test wants it: {may_switch.__doc__}")
            time.sleep(_LOOK_SECONDS)
        return (yield from call_esm(parts))

    vars(boot)["call_esm"] = call_esm_later
    runpy.run_module("services.guest", run_name="__main__")
