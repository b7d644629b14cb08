"""Commands on one VM: page, console, qmp."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from deploy.cli_support import cluster_option, json_option, parse_number, printable
from deploy.client import LauncherClient, connect
from protocol.errors import UserError


@click.command("page")
@click.argument("vm")
@click.argument("gpa")
@cluster_option
@json_option
def page(vm: str, gpa: str, cluster: str | None, as_json: bool) -> None:
    """Show one page of VM: its state, who may read it, its bytes as the host and, if debuggable, the guest see them."""
    address = parse_number(gpa)
    with connect(cluster) as client:
        view = client.call("page", {"vm": vm, "gpa": address})
    if as_json:
        click.echo(json.dumps(view, indent=2, default=_hex))
        return
    click.echo(f"{vm} gpa {view['gpa']:#x} gfn {view['gfn']:#x}")
    for key in ("host", "secure", "host_bytes", "guest"):
        click.echo(f"{key}:")
        for line in _lines(view.get(key)):
            click.echo(f"  {printable(line)}")


def _hex(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _lines(value: object) -> list[str]:
    if isinstance(value, bytes):
        return hex_lines(value)
    if not isinstance(value, dict):
        return [str(value)]
    lines = []
    for name, part in value.items():
        lines += [f"{name}:", *(f"  {line}" for line in hex_lines(part))] if isinstance(part, bytes) else []
        lines += [] if isinstance(part, bytes) else [f"{name} {part}"]
    return lines


def hex_lines(data: bytes, shown_bytes: int = 256) -> list[str]:
    """The first bytes in hexadecimal and ASCII, 16 a line."""
    lines = []
    for offset in range(0, min(len(data), shown_bytes), 16):
        row = data[offset : offset + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{offset:04x}  {row.hex(' '):<47}  {text}")
    if len(data) > shown_bytes:
        lines.append(f"... {len(data)} bytes")
    return lines


@click.command("console")
@click.argument("vm")
@click.option("--port", help="Name of a virtio-console of VM, instead of its terminal.")
@cluster_option
def console(vm: str, port: str | None, cluster: str | None) -> None:
    """Talk to the terminal of VM; Ctrl-] leaves. When standard input is no terminal, its lines are sent one by one."""
    from deploy.console import line_console, port_of, raw_console, terminal_of
    from deploy.operations import CONSOLE, VIRTIO_CONSOLE, refuse_by

    with connect(cluster) as reading, LauncherClient(reading.run_dir) as writing:
        described = reading.call("vm", {"vm": vm})
        refuse_by(described["operations"], CONSOLE if port is None else VIRTIO_CONSOLE)
        place = terminal_of(vm) if port is None else port_of(vm, port)
        talk = raw_console if sys.stdin.isatty() else line_console
        talk(reading, writing, place)


@click.command("qmp")
@click.argument("vm")
@click.argument("command")
@click.argument("arguments", nargs=-1)
@cluster_option
def qmp(vm: str, command: str, arguments: tuple[str, ...], cluster: str | None) -> None:
    """Run a QMP command on the monitor of VM: `pefbox qmp vm1 query-status`.

    ARGUMENTS are words key=value, or one JSON object.
    """
    from deploy.operations import operation_of, refuse_by
    from deploy.plan import own_monitor
    from deploy.qmp_client import arguments_from_words, execute, result_text

    with connect(cluster) as client:
        described = client.call("vm", {"vm": vm})
    operation = operation_of(command)
    if operation is not None:
        refuse_by(described["operations"], operation.name)
    click.echo(result_text(execute(own_monitor(described["qmp"]), command, arguments_from_words(arguments))))


def host_of(status: dict[str, Any], vm: str) -> str:
    """The host of a VM; raises UserError for an unknown one."""
    names = []
    for host in status["hosts"]:
        for row in host["vms"]:
            names.append(row["name"])
            if row["name"] == vm:
                return str(host["name"])
    raise UserError(f'no VM "{vm}"; there are: {", ".join(names)}')
