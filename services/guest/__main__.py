"""`python -m services.guest`: started by the launcher, once a VM."""

from __future__ import annotations

from shared.quick_imports import quick_imports

with quick_imports():
    from protocol.roles import Role
    from services.guest.engines import import_engines
    from services.guest.service import Guest
    from services.runtime.process import ServiceMain, run_service

MAIN = ServiceMain(Role.GUEST, Guest, lambda config: None, import_engines)

if __name__ == "__main__":
    run_service(MAIN)
