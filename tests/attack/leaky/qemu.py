"""The qemu of a cluster whose ultravisor leaks: the real one."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("services.qemu", run_name="__main__")
