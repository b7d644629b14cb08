"""`pefbox top`."""

from __future__ import annotations

import json
import time

import click

from deploy.cli_support import NumberRange, cluster_option, json_option
from deploy.client import LauncherClient, connect
from deploy.top import Frame, Look

_SECONDS = 3.0
_FIRST_SECONDS = 0.5


@click.command("top")
@click.option("--interval", type=NumberRange(min=0.1, max=3600), default=1.0, show_default=True, help="Seconds.")
@click.option("--once", is_flag=True, help="Print one frame, with the rates of one interval, and end.")
@cluster_option
@json_option
def top(interval: float, once: bool, cluster: str | None, as_json: bool) -> None:
    """Watch a cluster: its tree with calls a second, open calls, queues, memory, pages by state, migrations.

    Ctrl-C ends it. With --json each frame is one line.
    """
    with connect(cluster) as client:
        if once or as_json:
            _print_frames(client, interval, once=once, as_json=as_json)
        else:
            _watch(client, interval)


def look_at(client: LauncherClient) -> Look:
    """One look at a cluster."""
    from deploy.process_usage import usage_of
    from deploy.tables import processes_of

    activity = client.call("activity", seconds=_SECONDS)
    return Look(activity, usage_of(row["pid"] for row in processes_of(activity["status"])))


def _print_frames(client: LauncherClient, interval: float, *, once: bool, as_json: bool) -> None:
    import msgspec

    from deploy.tables import console
    from deploy.top import make_frame, render

    before = look_at(client)
    while True:
        time.sleep(interval)
        look = look_at(client)
        frame, before = make_frame(look, before), look
        if as_json:
            click.echo(json.dumps(msgspec.to_builtins(frame)))
        else:
            output = console()
            output.print(render(frame, output.width))
        if once:
            return


def _watch(client: LauncherClient, interval: float) -> None:
    from rich.live import Live

    from deploy.tables import console
    from deploy.top import make_frame, render

    output = console()
    if not output.is_terminal:
        _print_frames(client, interval, once=False, as_json=False)
        return

    def shown(frame: Frame) -> None:
        live.update(render(frame, output.width, output.height), refresh=True)

    before = look_at(client)
    with Live(console=output, screen=True, auto_refresh=False) as live:
        shown(make_frame(before, None))
        time.sleep(min(interval, _FIRST_SECONDS))
        while True:
            look = look_at(client)
            shown(make_frame(look, before))
            before = look
            time.sleep(interval)
