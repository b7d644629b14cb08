"""Which engine the `kernel` setting of a VM means.

Every engine costs the process that imports it, and the machine engine comes from a package that an installation may
lack: an engine is imported for VMs that use it alone, before the process is confined.
"""

from __future__ import annotations

import importlib

from protocol.errors import HostFault
from protocol.startup import BENCH_KERNEL, MACHINE_KERNEL, ProcessConfig, VmEntry
from services.guest.address_space import AddressSpace
from services.guest.clock import GuestClock
from services.guest.engine import Engine
from services.runtime.log import Log

_MODEL = "services.guest.model.engine"
_MODULES = {MACHINE_KERNEL: "services.guest.machine.engine", BENCH_KERNEL: "services.guest.bench_engine"}
"""Where the engine of a kernel is; every other kernel is the model's."""
_kept: list[object] = []
"""What must live as long as the process."""


def import_engines(config: ProcessConfig) -> None:
    """Everything that the VMs of this process need, while files can still be opened; raises HostFault."""
    for kernel in {vm.guest.kernel for vm in config.vms}:
        try:
            importlib.import_module(_MODULES.get(kernel, _MODEL))
        except ImportError as error:
            if kernel != MACHINE_KERNEL:
                raise
            raise HostFault(f'kernel = "machine" needs the Python package unicorn: {error}') from None


def import_all_engines() -> None:
    """As far as this installation has what they need: for a process of which guests are forks."""
    for module in (_MODEL, *_MODULES.values()):
        try:
            importlib.import_module(module)
        except ImportError:
            # The guest whose VM asks for it says so.
            if module != _MODULES[MACHINE_KERNEL]:
                raise


def make_engine(vm: VmEntry, space: AddressSpace, clock: GuestClock, log: Log) -> Engine:
    """The engine of `vm` on its memory; raises HostFault."""
    if vm.guest.kernel == MACHINE_KERNEL:
        from services.guest.machine.engine import make_machine_engine, report_crash

        engine = make_machine_engine(space, clock, log)
        _kept.append(report_crash(engine, log))
        return engine
    if vm.guest.kernel == BENCH_KERNEL:
        from services.guest.bench_engine import BenchEngine

        return BenchEngine(space, clock)
    from services.guest.model.engine import ModelEngine

    return ModelEngine(space, clock, old_firmware=vm.guest.old_firmware)
