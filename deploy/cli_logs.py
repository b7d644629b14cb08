"""Commands on what processes write down: logs and calls."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from deploy.cli_support import cluster_option, json_option, printable, state_dir_of, state_option, tell_down
from deploy.cli_trace import tell_unreadable
from deploy.cli_vm import host_of
from deploy.client import connect
from deploy.logs_view import LogReader, as_text, in_order, log_files
from deploy.trace.events import Event
from deploy.trace.filters import Filter
from deploy.trace.merge import Tail, Trace
from deploy.trace.recording import begin, flush, paths_of
from deploy.trace.show import each_message_once
from protocol.errors import UserError
from shared.terminal_text import one_line

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
    while follow:
        time.sleep(_POLL_SECONDS)
        show()


def _show_stderr(path: Path) -> None:
    if path.is_file() and (text := path.read_text(errors="replace").strip()):
        click.echo(f"-- standard error of {path.stem.replace('.', '/')}:", err=True)
        click.echo(printable(text), err=True)


@click.command("calls")
@click.argument("vm")
@click.option("-f", "--follow", is_flag=True, help="Show calls as they happen, until Ctrl-C or the end of the cluster.")
@cluster_option
@state_option
@json_option
def calls(vm: str, follow: bool, cluster: str | None, state_dir: Path | None, as_json: bool) -> None:
    """Print the calls of VM, decoded: those recorded so far (`up --record`), or live with -f."""
    if state_dir is not None:
        raise UserError("calls needs the running cluster, to know the host of a VM; use --cluster")
    with connect(cluster) as client:
        status = client.call("status")
        targets = [f"{host_of(status, vm)}/{role}" for role in ("kvm", "ultravisor")]
        paths = paths_of(client, status)
        trace = Trace([paths.trace_file(target) for target in targets])
        if follow:
            tail = Tail(trace)
            for target in targets:
                begin(client, target)
            while not client.is_gone_within(_POLL_SECONDS):
                _show_calls(tail.settled(time.monotonic_ns()), vm, trace, as_json=as_json)
            _show_calls(tail.rest(), vm, trace, as_json=as_json)
            tell_down(client.run_dir.name)
            return
        flush(client)
        if not any(paths.trace_file(target).stat().st_size for target in targets):
            raise UserError("nothing was recorded: start with `up --record`, or see live calls with -f")
        _show_calls(trace.events(), vm, trace, as_json=as_json)


def _show_calls(events: Iterable[Event], vm: str, trace: Trace, *, as_json: bool) -> None:
    """Each message once, and the guest need not record."""
    filter_ = Filter(vm=vm)
    for event in each_message_once(iter(events), filter_):
        if event.is_message and filter_.passes(event):
            row = _row(event)
            click.echo(json.dumps(row) if as_json else one_line(_line(row)))
    tell_unreadable(trace.newly_unreadable())


def _row(event: Event) -> dict[str, Any]:
    names = ("t_ns", "link", "kind", "number", "name", "correlation", "cause", "text")
    row = {name: getattr(event, name) for name in names} | {"direction": "out" if event.outward else "in"}
    return row if event.took_ns is None else row | {"took_us": event.took_ns / 1000}


def _line(row: dict[str, Any]) -> str:
    arrow = "<" if row["direction"] == "out" else ">"
    took = f"  {row['took_us']:.0f} us" if "took_us" in row else ""
    cause = f"  cause {row['cause']:#x}" if row["cause"] else ""
    return f"{row['t_ns'] / 1e9:.6f} {row['link']:<26} {arrow} {row['text']}{took}{cause}"
