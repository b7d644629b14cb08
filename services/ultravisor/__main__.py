"""`python -m services.ultravisor`: started by the launcher, once a host."""

from __future__ import annotations

from shared.quick_imports import quick_imports

with quick_imports():
    from protocol.roles import Role
    from services.runtime.process import run_service
    from services.ultravisor.service import Ultravisor

if __name__ == "__main__":
    run_service(Role.ULTRAVISOR, Ultravisor, landlock_dirs=lambda config: None)
