"""`python -m services.template ROLE...`: started by the launcher, before anything else of a cluster."""

from __future__ import annotations

import argparse
import os
import socket
from importlib import import_module
from typing import NoReturn

from protocol.roles import Role
from services.runtime.confine import die_with_parent
from shared.quick_imports import quick_imports


def main() -> NoReturn:
    """Load what the roles need, then fork processes of them."""
    parser = argparse.ArgumentParser(prog="services.template", description="A process of a pefbox cluster.")
    parser.add_argument("roles", type=Role, nargs="+", help="what will be forked")
    parser.add_argument("--orders-fd", type=int, required=True, help="inherited socket of the launcher's orders")
    arguments = parser.parse_args()
    launcher_pid = os.getppid()
    die_with_parent(launcher_pid)
    with quick_imports():
        from services.template.forking import Template

        mains = [import_module(f"services.{role.value}.__main__").MAIN for role in arguments.roles]
    Template(socket.socket(fileno=arguments.orders_fd), mains, launcher_pid).serve()


if __name__ == "__main__":
    main()
