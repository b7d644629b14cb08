"""The honest kvm of a cluster whose other processes are not."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("services.kvm", run_name="__main__")
