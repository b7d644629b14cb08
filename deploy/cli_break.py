"""`pefbox break`, `step`, `continue`: breaks on messages."""

from __future__ import annotations

import json
from typing import Any

import click

from deploy.cli_support import cluster_option, json_option, printable
from deploy.client import connect
from protocol.break_expression import MAX_NTH
from protocol.errors import UserError

_SECONDS = 30.0


@click.command("break")
@click.argument("condition", required=False)
@click.option(
    "--do",
    "action",
    type=click.Choice(["stop", "stop-cluster", "log", "count", "drop"]),
    help="What happens to each such message; default: stop, it and its VM.",
)
@click.option("--fail", "code", metavar="CODE", help="Answer each such call with CODE (U_RETRY), and do not serve it.")
@click.option("--nth", type=click.IntRange(1, MAX_NTH), help="Only the Nth one in a process; the others are counted.")
@click.option("--delete", metavar="ID|all", help="Remove a break, or all; what it has stopped goes on.")
@cluster_option
@json_option
def break_(
    condition: str | None,
    action: str | None,
    code: str | None,
    nth: int | None,
    delete: str | None,
    cluster: str | None,
    as_json: bool,
) -> None:
    """Break on messages that fit CONDITION: 'ucall UV_PAGE_OUT if gpa == 0x1230000'.

    CONDITION begins with hcall, ucall or message and a name, or with any. Without it the breaks are listed.
    """
    if condition is not None and delete is not None:
        raise UserError("--delete takes no CONDITION")
    if condition is None and (action or code or nth):
        raise UserError("--do, --fail and --nth need a CONDITION")
    if action is not None and code is not None:
        raise UserError("--do and --fail exclude each other")
    with connect(cluster) as client:
        if condition is not None:
            order = {"text": condition, "action": "fail" if code else action or "stop", "code": code, "nth": nth or 0}
            made = client.call("break", order, _SECONDS)
            click.echo(json.dumps(made) if as_json else _break_line(made))
            return
        if delete is not None:
            client.call("break-delete", {"id": delete}, _SECONDS)
        listed = client.call("breaks", seconds=_SECONDS)
    if as_json:
        click.echo(json.dumps(listed, indent=2))
        return
    for row in listed["breaks"]:
        click.echo(_break_line(row))
    for row in listed["kept"]:
        click.echo(_kept_line(row))
    if not listed["breaks"]:
        click.echo("no breaks")


@click.command("step")
@click.argument("vm", required=False)
@cluster_option
@json_option
def step(vm: str | None, cluster: str | None, as_json: bool) -> None:
    """Let the oldest message pass that a break has stopped, of VM or of all, and show it. The VM stays stopped."""
    with connect(cluster) as client:
        row = client.call("step", {"vm": vm}, _SECONDS)
    click.echo(json.dumps(row) if as_json else _kept_line(row))


@click.command("continue")
@click.argument("vm", required=False)
@cluster_option
@json_option
def continue_(vm: str | None, cluster: str | None, as_json: bool) -> None:
    """Let every message pass that breaks have stopped, of VM or of all, and run the VMs again. Breaks stay set."""
    with connect(cluster) as client:
        answer = client.call("continue", {"vm": vm}, _SECONDS)
    n = answer["passed"]
    click.echo(json.dumps(answer) if as_json else f"{n} message{'' if n == 1 else 's'} passed")


def _break_line(row: dict[str, Any]) -> str:
    action = f"fail {row['code']}" if row["code"] else row["action"]
    nth = f" the {row['nth']}." if row["nth"] else ""
    counts = "  ".join(f"{process} {'?' if count is None else count}" for process, count in row["counts"].items())
    return printable(f"break {row['id']}  {row['text']}  {action}{nth}  {counts}")


def _kept_line(row: dict[str, Any]) -> str:
    return printable(f"message {row['number']}  break {row['id']}  {row['process']}  {row['text']}")
