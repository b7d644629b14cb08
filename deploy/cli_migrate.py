"""Commands that move a VM between hosts: migrate, can-migrate, jobinfo, recover."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import click

from deploy.cli_support import cluster_option, json_option, printable
from deploy.client import LauncherClient, connect
from deploy.progress import Facts, Followed, follow, is_over
from protocol.errors import UserError
from services.qemu.migration.parameters import MAX_BANDWIDTH, MAX_DOWNTIME_MS

_ACCEPT_SECONDS = 45.0
_RECOVER_SECONDS = 90.0
_MAX_SHOWN_CHARS = 80


@click.command("migrate")
@click.argument("vm")
@click.argument("host", required=False)
@click.option("--bandwidth", metavar="SIZE/s", help="At most so much, such as 64M/s; 0 is no limit.")
@click.option(
    "--downtime-limit", metavar="MS", type=click.IntRange(0, MAX_DOWNTIME_MS), help="How long the VM may stand still."
)
@click.option("--cancel", is_flag=True, help="Let a VM that is on its way stay where it is.")
@click.option("--detach", is_flag=True, help="Return when it is under way (see `jobinfo`).")
@cluster_option
@json_option
def migrate(
    vm: str,
    host: str | None,
    bandwidth: str | None,
    downtime_limit: int | None,
    cancel: bool,
    detach: bool,
    cluster: str | None,
    as_json: bool,
) -> None:
    """Move VM to HOST while it runs. Without HOST the limits of a migration that is under way are changed.

    Ctrl-C cancels it. Exit status 1 if the VM did not move.
    """
    parameters = _parameters(bandwidth, downtime_limit)
    _check_usage(host, parameters, cancel=cancel, detach=detach)
    with connect(cluster) as client:
        if cancel:
            client.call("migrate-cancel", {"vm": vm})
            return
        if host is None:
            client.call("migrate-set", {"vm": vm, "parameters": parameters})
            return
        facts = _begin(client, vm, host, parameters)
        run_dir = client.run_dir
    _show_result(_follow(run_dir, facts, _is_under_way if detach else is_over, quiet=as_json), as_json)


def _is_under_way(facts: Facts) -> bool:
    return bool(facts["phase"] != "starting")


def _check_usage(host: str | None, parameters: dict[str, int], *, cancel: bool, detach: bool) -> None:
    if cancel and (host is not None or parameters or detach):
        raise click.UsageError("--cancel goes with nothing else.")
    if host is None and not cancel and not parameters:
        raise click.UsageError("Missing argument 'HOST'; or give --cancel, --bandwidth or --downtime-limit.")
    if host is None and detach:
        raise click.UsageError("--detach needs HOST.")


def _parameters(bandwidth: str | None, downtime_limit: int | None) -> dict[str, int]:
    """By QEMU's names."""
    parameters = {}
    if bandwidth is not None:
        parameters["max-bandwidth"] = parse_bandwidth(bandwidth)
    if downtime_limit is not None:
        parameters["downtime-limit"] = downtime_limit
    return parameters


def parse_bandwidth(text: str) -> int:
    """Bytes a second; raises UserError."""
    from deploy.cluster_section import size_of

    n_bytes = size_of(text.removesuffix("/s"))
    if n_bytes is None or n_bytes > MAX_BANDWIDTH:
        allowed = "bytes a second, or a text such as 64M/s; 0: no limit"
        raise UserError(f'--bandwidth: "{text[:_MAX_SHOWN_CHARS]}" is none; allowed: {allowed}')
    return n_bytes


def _begin(client: LauncherClient, vm: str, host: str, parameters: dict[str, int]) -> Facts:
    try:
        facts: Facts = client.call("migrate", {"vm": vm, "host": host, "parameters": parameters}, _ACCEPT_SECONDS)
        return facts
    except KeyboardInterrupt:
        # Whether it was accepted is not known here.
        with contextlib.suppress(UserError):
            _cancel(client.run_dir, vm)
        raise


def _cancel(run_dir: Path, vm: str) -> None:
    with LauncherClient(run_dir) as client:
        client.call("migrate-cancel", {"vm": vm})


def _follow(run_dir: Path, facts: Facts, over: Callable[[Facts], bool], *, quiet: bool) -> Facts:
    from deploy.migration_view import headline, progress_lines

    vm = facts["vm"]
    followed = Followed(
        ask=lambda: _job_info(run_dir, vm),
        over=over,
        lines=lambda facts: [headline(facts), *progress_lines(facts)],
        cancel=lambda: _cancel(run_dir, vm),
    )
    return follow(followed, facts, quiet=quiet)


def _job_info(run_dir: Path, vm: str) -> Facts:
    # A connection for each: one in which Ctrl-C broke off an answer is of no use any more.
    with LauncherClient(run_dir) as client:
        facts: Facts = client.call("jobinfo", {"vm": vm})
        return facts


def _show_result(facts: Facts, as_json: bool) -> None:
    from deploy.migration_view import headline, result_line

    if as_json:
        click.echo(json.dumps(facts, indent=2))
    if not is_over(facts):
        if not as_json:
            click.echo(headline(facts))
        return
    if facts["phase"] == "done":
        if not as_json:
            click.echo(result_line(facts))
        return
    if as_json:
        raise click.exceptions.Exit(1)
    raise UserError(result_line(facts))


@click.command("can-migrate")
@click.argument("vm")
@click.argument("host")
@cluster_option
@json_option
def can_migrate(vm: str, host: str, cluster: str | None, as_json: bool) -> None:
    """Say whether VM could move to HOST now, or every reason why not. Nothing is started. Exit status 1 if not."""
    with connect(cluster) as client:
        reasons: list[str] = client.call("can-migrate", {"vm": vm, "host": host})["reasons"]
    if as_json:
        click.echo(json.dumps({"vm": vm, "host": host, "possible": not reasons, "reasons": reasons}, indent=2))
    elif reasons:
        click.echo(f"no: {vm} cannot move to {host}")
        for reason in reasons:
            click.echo(printable(f"  {reason}"))
    else:
        click.echo(f"yes: {vm} can move to {host}")
    if reasons:
        raise click.exceptions.Exit(1)


@click.command("jobinfo")
@click.argument("vm")
@cluster_option
@json_option
def jobinfo(vm: str, cluster: str | None, as_json: bool) -> None:
    """Show how far the migration of VM is, or how its last one ended."""
    with connect(cluster) as client:
        facts = client.call("jobinfo", {"vm": vm})
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    from deploy.migration_view import headline, progress_lines

    for line in [headline(facts), *progress_lines(facts)]:
        click.echo(line)


@click.command("recover")
@click.argument("vm")
@cluster_option
@json_option
def recover(vm: str, cluster: str | None, as_json: bool) -> None:
    """Find out where VM runs when its migration was cut at the last step, and leave it there alone."""
    with connect(cluster) as client:
        answer = client.call("recover", {"vm": vm}, _RECOVER_SECONDS)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(f"{answer['vm']} is on {answer['host']}")
