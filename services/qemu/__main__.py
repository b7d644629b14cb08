"""`python -m services.qemu`: started by the launcher, once a VM."""

from __future__ import annotations

from shared.quick_imports import quick_imports

with quick_imports():
    from protocol.roles import Role
    from services.qemu.loader import import_loaders
    from services.qemu.service import Qemu
    from services.runtime.process import ServiceMain, run_service

MAIN = ServiceMain(Role.QEMU, Qemu, lambda config: [config.run_dir], import_loaders)

if __name__ == "__main__":
    run_service(MAIN)
