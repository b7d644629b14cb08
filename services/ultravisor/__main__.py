"""`python -m services.ultravisor`: started by the launcher, once a host."""

from __future__ import annotations

from shared.quick_imports import quick_imports

with quick_imports():
    from protocol.roles import Role
    from services.runtime.process import ServiceMain, run_service
    from services.ultravisor.migration_host import measurement
    from services.ultravisor.service import Ultravisor

# Of the sources as they are loaded now: a fork may start when they have changed.
measurement()

MAIN = ServiceMain(Role.ULTRAVISOR, Ultravisor, lambda config: None)

if __name__ == "__main__":
    run_service(MAIN)
