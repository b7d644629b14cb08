"""`python -m deploy.launch_server_main --orders-fd N`: started by deploy.launch_server."""

from __future__ import annotations

import argparse
import signal
import socket
from importlib import import_module
from typing import NoReturn

from protocol.template import FAMILIES
from services.runtime.confine import protect_memory
from shared.quick_imports import quick_imports


def main() -> NoReturn:
    """Load what clusters need, then fork launchers."""
    parser = argparse.ArgumentParser(prog="deploy.launch_server_main", description="Has launchers start warm.")
    parser.add_argument("--orders-fd", type=int, required=True, help="inherited socket of the orders")
    arguments = parser.parse_args()
    # Whoever could write to this process would write to those that come from it.
    protect_memory(dumpable=False)
    # Whoever started it may have had it ignored, and then no end of a process is told.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with quick_imports():
        from deploy.launch_forks import LaunchForks
        from services.guest.engines import import_all_engines

        mains = [import_module(f"services.{role.value}.__main__").MAIN for family in FAMILIES for role in family]
        import_all_engines()
    LaunchForks(socket.socket(fileno=arguments.orders_fd), mains).serve()


if __name__ == "__main__":
    main()
