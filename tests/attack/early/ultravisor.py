"""The ultravisor of a cluster whose qemu answers early: the real one."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("services.ultravisor", run_name="__main__")
