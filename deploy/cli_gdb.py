"""`pefbox gdb`: a port for GDB on a VM, or GDB itself on it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from typing import Any

import click

from deploy.cli_support import cluster_option, json_option
from deploy.client import connect
from protocol.errors import UserError

GDB = "gdb-multiarch"
_REMOTE_SECONDS = 30
"""GDB's own patience of 2 s is shorter than what a processor or kvm that is held up is given to answer."""
_PROGRAM_OPTIONS = frozenset({"args", "e", "exec", "s", "symbols", "se"})
_VALUE_OPTIONS = frozenset(
    {
        *("x", "command", "ex", "eval-command", "ix", "init-command", "iex", "init-eval-command"),
        *("eix", "early-init-command", "eiex", "early-init-eval-command", "c", "core", "p", "pid", "d", "directory"),
        *("cd", "D", "data-directory", "i", "interpreter", "ui", "t", "tty", "b", "baud", "l"),
    }
)
"""Options of GDB with a value, which may be the next word. Source: `gdb --help`."""


@click.command("gdb")
@click.argument("vm")
@click.argument("gdb_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- GDB_ARGUMENTS...]")
@click.option(
    "--view",
    type=click.Choice(["owner", "host"]),
    default="owner",
    show_default=True,
    help="owner: plaintext and registers, only of a debuggable VM; host: what qemu may see.",
)
@click.option("--port", type=int, default=0, help="The port; default: any that is free.")
@click.option("--run", is_flag=True, help=f"Start {GDB} on it, with GDB_ARGUMENTS (a program with symbols, say).")
@cluster_option
@json_option
def gdb(
    vm: str, gdb_arguments: tuple[str, ...], view: str, port: int, run: bool, cluster: str | None, as_json: bool
) -> None:
    """Open a port on which GDB debugs VM, and print it; with --run start GDB there.

    VM stands still while GDB is attached, and goes on when GDB leaves, however it does.
    """
    if gdb_arguments and not run:
        raise click.UsageError("arguments for GDB need --run")
    if run and as_json:
        raise click.UsageError("--json and --run exclude each other")
    program = _found_gdb() if run else GDB
    with connect(cluster) as client:
        facts = client.call("gdb", {"vm": vm, "view": view, "port": port})
    if run:
        os.execv(program, _command(facts, gdb_arguments))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    order = f", {facts['order']}-endian" if facts["order"] else ""
    click.echo(f"{vm}, the {view}'s view: port {facts['port']}{order}")
    click.echo(shlex.join(_command(facts, ())))


def _found_gdb() -> str:
    program = shutil.which(GDB)
    if program is None:
        raise UserError(f"{GDB} is not installed: apt-get install {GDB}")
    return program


def _command(facts: dict[str, Any], arguments: tuple[str, ...]) -> list[str]:
    """What is run: a program's own byte order counts, and where there is none the processor's. It is connected before
    the first command of `arguments`."""
    settings = [f"set remotetimeout {_REMOTE_SECONDS}"]
    if facts["order"] and not _has_program(arguments):
        settings.append(f"set endian {facts['order']}")
    options = [word for setting in settings for word in ("-iex", setting)]
    return [GDB, *options, "-ex", f"target remote {facts['host']}:{facts['port']}", *arguments]


def _has_program(arguments: tuple[str, ...]) -> bool:
    """Whether GDB is given a file with symbols, by its own rules: what is no option and no option's value is one."""
    words = iter(arguments)
    for word in words:
        name, is_whole, _ = word.lstrip("-").partition("=")
        if not word.startswith("-") or name in _PROGRAM_OPTIONS:
            return True
        if name in _VALUE_OPTIONS and not is_whole:
            next(words, None)
    return False
