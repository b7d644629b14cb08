"""`python -m services.guest`: started by the launcher, once a VM."""

from __future__ import annotations

from shared.quick_imports import quick_imports

with quick_imports():
    from protocol.roles import Role
    from services.guest.engines import import_engines
    from services.guest.service import Guest
    from services.runtime.process import run_service

if __name__ == "__main__":
    run_service(Role.GUEST, Guest, landlock_dirs=lambda config: None, prepare=import_engines)
