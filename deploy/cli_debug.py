"""`pefbox debug`: a debugger in one process, at a prompt or from an editor."""

from __future__ import annotations

import json
from pathlib import Path

import click

from deploy.cli_support import cluster_option, json_option
from deploy.client import connect
from protocol.errors import UserError

_PORT_SECONDS = 15.0


@click.command("debug")
@click.argument("target")
@click.option("--dap", is_flag=True, help="Let editors in: print host:port of debugpy, write a launch entry, return.")
@click.option("--port", type=click.IntRange(1, 65535), help="With --dap: this port; default: a free one.")
@click.option(
    "--launch-json",
    type=click.Path(path_type=Path),
    default=Path(".vscode/launch.json"),
    show_default=True,
    help="With --dap: the file of VS Code that gets the entry.",
)
@cluster_option
@json_option
def debug(target: str, dap: bool, port: int | None, launch_json: Path, cluster: str | None, as_json: bool) -> None:
    """Attach a debugger to the process TARGET (alpha/kvm, vm1/guest) while all others live on.

    Without --dap a prompt of Python's pdb opens; `help pefbox` there says what it has beside that. Ctrl-C holds a
    process that runs, Ctrl-D leaves it. When standard input is no terminal, its lines are the commands.
    """
    if dap:
        _let_editors_in(target, port, launch_json, cluster, as_json)
        return
    if port is not None or as_json:
        raise UserError("--port and --json are for --dap")
    from deploy.debug_prompt import attach

    with connect(cluster) as client:
        attach(client, target)


def _let_editors_in(target: str, port: int | None, launch_json: Path, cluster: str | None, as_json: bool) -> None:
    from deploy.launch_json import add_entry

    with connect(cluster) as client:
        place = client.call("debug-port", {"target": target, "port": port or 0}, _PORT_SECONDS)
    problem = add_entry(launch_json, place["target"], place["host"], place["port"])
    if as_json:
        click.echo(json.dumps(place))
    else:
        click.echo(f"{place['host']}:{place['port']}")
    if problem is not None:
        click.echo(f"pefbox: {launch_json}: {problem}", err=True)
