"""`python -m services.template --orders-fd N ROLE...`: started by the launcher, before anything else of a cluster."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from importlib import import_module
from typing import NoReturn

from protocol.roles import Role
from services.runtime.confine import confine, die_with_parent
from shared.quick_imports import quick_imports


def main() -> NoReturn:
    """Load what the roles need, then fork processes of them."""
    parser = argparse.ArgumentParser(prog="services.template", description="A process of a pefbox cluster.")
    parser.add_argument("roles", type=Role, nargs="+", help="what will be forked")
    parser.add_argument("--orders-fd", type=int, required=True, help="inherited socket of the launcher's orders")
    arguments = parser.parse_args()
    launcher_pid = os.getppid()
    die_with_parent(launcher_pid)
    # Whoever could write to this process would write to those that come from it.
    confine(dumpable=False, landlock_dirs=None)
    # Whoever started the launcher may have had it ignored, and then no end of a process is told.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with quick_imports():
        from services.template.forking import ForkServer

        mains = [import_module(f"services.{role.value}.__main__").MAIN for role in arguments.roles]
    ForkServer(socket.socket(fileno=arguments.orders_fd), mains, launcher_pid).serve()


if __name__ == "__main__":
    main()
