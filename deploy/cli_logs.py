"""Commands on what processes write down: logs and calls."""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from deploy.calls_view import CallDecoder, RecordedFrame, RecordReader
from deploy.cli_support import cluster_option, json_option, printable, state_dir_of, state_option
from deploy.cli_vm import host_of
from deploy.client import LauncherClient, connect
from deploy.logs_view import LogReader, as_text, in_order, log_files
from deploy.run_dirs import Paths
from protocol.errors import UserError

_POLL_SECONDS = 0.1


@click.command("logs")
@click.argument("target")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on, until Ctrl-C.")
@cluster_option
@state_option
@json_option
def logs(target: str, follow: bool, cluster: str | None, state_dir: Path | None, as_json: bool) -> None:
    """Print the log of TARGET: a process (alpha/kvm), all of a host or VM (vm1), or the launcher."""
    state = state_dir_of(cluster, state_dir)
    files = log_files(state, target)
    readers = [LogReader(path) for path in files]

    def show() -> None:
        for entry in in_order(readers):
            click.echo(json.dumps(entry) if as_json else printable(as_text(entry)))

    show()
    for path in files:
        _show_stderr(path.with_suffix(".stderr"))
    if follow:
        _repeat(show)


def _show_stderr(path: Path) -> None:
    if path.is_file() and (text := path.read_text(errors="replace").strip()):
        click.echo(f"-- standard error of {path.stem.replace('.', '/')}:", err=True)
        click.echo(printable(text), err=True)


@click.command("calls")
@click.argument("vm")
@click.option("-f", "--follow", is_flag=True, help="Show calls as they happen, until Ctrl-C.")
@cluster_option
@state_option
@json_option
def calls(vm: str, follow: bool, cluster: str | None, state_dir: Path | None, as_json: bool) -> None:
    """Print the calls of VM, decoded: those recorded so far (`up --record`), or live with -f."""
    if state_dir is not None:
        raise UserError("calls needs the running cluster, to know the host of a VM; use --cluster")
    with connect(cluster) as client:
        status = client.call("status")
        host = host_of(status, vm)
        lpid = next(row["lpid"] for part in status["hosts"] for row in part["vms"] if row["name"] == vm)
        paths = Paths(client.run_dir, Path(status["state_dir"]))
        targets = [f"{host}/kvm", f"{host}/ultravisor"]
        readers = [RecordReader(paths.record_file(target)) for target in targets]
        decoder = CallDecoder(vm, lpid)
        show = _shower(readers, decoder, as_json)
        if not follow:
            if not status["recording"] and not any(paths.record_file(target).stat().st_size for target in targets):
                raise UserError("nothing was recorded: start with `up --record`, or see live calls with -f")
            show()
            return
        _follow(client, targets if not status["recording"] else [], show)


def _shower(readers: list[RecordReader], decoder: CallDecoder, as_json: bool) -> Callable[[], None]:
    def show() -> None:
        for entry in _merged(readers):
            if decoder.concerns(entry):
                row = decoder.describe(entry)
                click.echo(json.dumps(row) if as_json else printable(_line(row)))

    return show


def _merged(readers: list[RecordReader]) -> Iterator[RecordedFrame]:
    return heapq.merge(*(reader.read() for reader in readers), key=lambda entry: entry.t_ns)


def _line(row: dict[str, Any]) -> str:
    arrow = {"in": ">", "out": "<"}.get(row["direction"], "?")
    took = f"  {row['took_us']:.0f} us" if "took_us" in row else ""
    payload = f"  +{row['payload_bytes']} bytes" if "payload_bytes" in row else ""
    cause = f"  cause {row['cause']}" if row.get("cause") else ""
    return f"{row['t_ns'] / 1e9:.6f} {row['link']:<26} {arrow} {row['text']}{took}{payload}{cause}"


def _follow(client: LauncherClient, to_switch: list[str], show: Callable[[], None]) -> None:
    """Follow the records; processes that do not record are told to, and told to stop at the end."""
    for target in to_switch:
        client.query(target, "record", {"on": True})
    try:
        _repeat(show)
    finally:
        for target in to_switch:
            client.query(target, "record", {"on": False})


def _repeat(show: Callable[[], None]) -> None:
    while True:
        show()
        time.sleep(_POLL_SECONDS)
