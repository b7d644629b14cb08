"""`pefbox link`: what the link between two hosts does to what crosses it."""

from __future__ import annotations

import json
from typing import Any

import click

from deploy.cli_support import cluster_option, json_option
from deploy.client import connect

_ORDER_SECONDS = 5.0


@click.command("link")
@click.argument("host")
@click.argument("other", metavar="HOST")
@click.option("--latency", metavar="MS", type=float, help="How long everything takes, one way.")
@click.option("--jitter", metavar="MS", type=float, help="Up to so much longer, at random.")
@click.option("--bandwidth", metavar="SIZE/s", help="At most so much each way, such as 8M/s; 0 is no limit.")
@click.option("--loss", metavar="FRACTION", type=float, help="So much of it is lost, from 0 to 1.")
@click.option("--down/--up", default=None, help="Cut it, or join it again.")
@cluster_option
@json_option
def link(
    host: str,
    other: str,
    latency: float | None,
    jitter: float | None,
    bandwidth: str | None,
    loss: float | None,
    down: bool | None,
    cluster: str | None,
    as_json: bool,
) -> None:
    """Show the link between two hosts, or change it while everything runs.

    It carries the networks between VMs of the two hosts, and migrations.
    """
    rate = None if bandwidth is None else _rate(bandwidth)
    wanted: dict[str, Any] = {
        "latency_ms": latency,
        "jitter_ms": jitter,
        "bandwidth_bytes_per_second": rate,
        "loss": loss,
        "down": down,
    }
    changes = {name: value for name, value in wanted.items() if value is not None}
    with connect(cluster) as client:
        row = client.call("link", {"between": [host, other], "changes": changes}, _ORDER_SECONDS)
    if as_json:
        click.echo(json.dumps(row, indent=2))
        return
    from deploy.tables import link_line

    click.echo(link_line(row))


def _rate(text: str) -> int:
    from deploy.cli_migrate import parse_bandwidth

    return parse_bandwidth(text)
