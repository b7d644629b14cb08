"""Commands that save a VM into a file and let it go on out of one: snapshot, restore."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deploy.cli_support import cluster_option, json_option
from deploy.client import LauncherClient, connect
from deploy.progress import Facts, Followed, follow, is_over
from protocol.errors import UserError

_ACCEPT_SECONDS = 15.0


@click.command("snapshot")
@click.argument("vm")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE.")
@cluster_option
@json_option
def snapshot(vm: str, file: Path, force: bool, cluster: str | None, as_json: bool) -> None:
    """Save VM into FILE and switch it off: memory, processor and devices, but not its disks.

    Ctrl-C cancels it. Exit status 1 if VM was not saved; then it goes on.
    """
    order = {"vm": vm, "file": str(file.absolute()), "force": force}
    with connect(cluster) as client:
        facts = _begin(client, order)
        run_dir = client.run_dir
    _show_result(_follow(run_dir, facts, lambda: _cancel(run_dir, vm), quiet=as_json), as_json)


@click.command("restore")
@click.argument("vm")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--ignore-disks", is_flag=True, help="Also when a disk was written since. For normal VMs.")
@cluster_option
@json_option
def restore(vm: str, file: Path, ignore_disks: bool, cluster: str | None, as_json: bool) -> None:
    """Let VM, which is off, go on out of FILE. Exit status 1 if it does not; then it is off.

    A secure VM goes on out of each snapshot once, and only out of its newest, on the host where it was taken.
    """
    order = {"vm": vm, "file": str(file.absolute()), "ignore_disks": ignore_disks}
    with connect(cluster) as client:
        facts = client.call("restore", order, _ACCEPT_SECONDS)
        run_dir = client.run_dir
    _show_result(_follow(run_dir, facts, _too_late, quiet=as_json), as_json)


def _begin(client: LauncherClient, order: dict[str, Any]) -> Facts:
    try:
        facts: Facts = client.call("snapshot", order, _ACCEPT_SECONDS)
        return facts
    except KeyboardInterrupt:
        # Whether it was accepted is not known here.
        with contextlib.suppress(UserError):
            _cancel(client.run_dir, order["vm"])
        raise


def _cancel(run_dir: Path, vm: str) -> None:
    with LauncherClient(run_dir) as client:
        client.call("snapshot-cancel", {"vm": vm})


def _too_late() -> None:
    raise UserError("a restore is not cancelled; once more stops watching it")


def _follow(run_dir: Path, facts: Facts, cancel: Callable[[], None], *, quiet: bool) -> Facts:
    from deploy.snapshot_view import progress_lines

    def ask() -> Facts:
        # A connection for each: one in which Ctrl-C broke off an answer is of no use any more.
        with LauncherClient(run_dir) as client:
            now: Facts = client.call("snapshot-info", {"vm": facts["vm"]})
            return now

    followed = Followed(ask, is_over, progress_lines, cancel)
    return follow(followed, facts, quiet=quiet)


def _show_result(facts: Facts, as_json: bool) -> None:
    from deploy.snapshot_view import result_line

    done = facts["phase"] == "done"
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    elif done:
        click.echo(result_line(facts))
    if done:
        return
    if as_json:
        raise click.exceptions.Exit(1)
    raise UserError(result_line(facts))
