"""`python -m services.kvm`: started by the launcher, once a host."""

from __future__ import annotations

from shared.quick_imports import quick_imports

with quick_imports():
    from protocol.roles import Role
    from services.kvm.service import Kvm
    from services.runtime.process import ServiceMain, run_service

MAIN = ServiceMain(Role.KVM, Kvm, lambda config: [config.run_dir])

if __name__ == "__main__":
    run_service(MAIN)
