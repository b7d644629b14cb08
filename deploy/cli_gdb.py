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
    """What is run: a program's own byte order counts, and where there is none the processor's."""
    order = ["-ex", f"set endian {facts['order']}"] if facts["order"] and not arguments else []
    return [GDB, *order, *arguments, "-ex", f"target remote {facts['host']}:{facts['port']}"]
