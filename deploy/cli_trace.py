"""`pefbox trace`: record, show, count, export and compare what the processes of a cluster did."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from deploy.cli_support import NumberRange, cluster_option, json_option, state_dir_of, state_option, tell_down
from deploy.client import LauncherClient, connect
from deploy.run_dirs import Paths, choose_cluster, runtime_root
from deploy.trace.filters import Filter, check_names, make_filter
from protocol.errors import UserError
from shared.terminal_text import one_line

if TYPE_CHECKING:
    from deploy.trace.events import Event
    from deploy.trace.merge import Selection, Survey
    from deploy.trace.reader import TraceUnreadable

POLL_SECONDS = 0.1
_LONGEST_SECONDS = 1_000_000.0
"""Of one wait on a socket, which takes not much more."""
_trace_argument = click.argument("trace", required=False, type=click.Path(path_type=Path))
Command = TypeVar("Command", bound=Callable[..., Any])


def _filter_options(command: Command) -> Command:
    """The declared filters (deploy.trace.filters)."""
    options = (
        click.option("--vm", metavar="VM", help="Only what concerns this VM."),
        click.option(
            "--call", metavar="NAME", help="Only this call or message; or page, interrupt, request, migration."
        ),
        click.option(
            "--process", metavar="NAME", help="Only what this process sent and got, or those of a host or VM."
        ),
        click.option("--cause", metavar="ID", help="Only what one call of a guest caused."),
        click.option("--result", metavar="CODE", help="Only answers with this result, such as H_BUSY."),
        click.option("--since", metavar="TIME", help="Only the last of it: 500ms, 10s, 2m before the end."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group("trace")
def trace() -> None:
    """Record what the processes of a cluster do, and look at it: every call, page transition, interrupt, device request
    and migration step, with one cause id from a guest's call to the device and back.

    TRACE is a directory of trace files or one of them; by default it is what the running cluster has recorded.
    """


@trace.command("record")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--seconds",
    type=NumberRange(min=0.0, max=_LONGEST_SECONDS),
    help="Record for so long; default: until Ctrl-C, or until the cluster is down.",
)
@click.option("--process", metavar="NAME", help="Only this process, or those of a host or VM.")
@cluster_option
def record(directory: Path, seconds: float | None, process: str | None, cluster: str | None) -> None:
    """Record the running cluster from now on into DIRECTORY, which is new or empty.

    Processes that record already (`up --record`) are copied from their beginning, and go on recording.
    """
    from deploy.trace.recording import Window, begin, files_of, flush, make_new_dir, paths_of

    with connect(cluster) as client:
        trace_dir = paths_of(client, client.call("status")).trace_dir
        make_new_dir(directory)
        window = Window(files_of(trace_dir))
        begun = begin(client, process)
        window.take_whole([*begun["before"], *begun["silent"]])
        _tell_silent(begun["silent"])
        how_long = "Ctrl-C ends it" if seconds is None else f"{seconds:g} s"
        if _goes_on(client, seconds, f"recording {len(begun['targets'])} processes: {how_long}"):
            flush(client)
        else:
            tell_down(client.run_dir.name)
        copies = window.copy_to(directory, files_of(trace_dir, process))
    n_bytes = sum(copy.stat().st_size for copy in copies)
    click.echo(f"{directory}: {n_bytes} bytes of {len(copies)} processes")


def _tell_silent(targets: list[str]) -> None:
    for target in targets:
        click.echo(f"pefbox: {target} does not answer: it records when it does", err=True)


def _goes_on(client: LauncherClient, seconds: float | None, line: str) -> bool:
    """Whether the cluster still runs at the end of `seconds`, or at Ctrl-C, which may come as soon as `line` is shown:
    then the recording is kept, too."""
    try:
        click.echo(line, err=True)
        return not client.is_gone_within(seconds)
    except KeyboardInterrupt:
        return True


@trace.command("show")
@_trace_argument
@click.option(
    "-f", "--follow", is_flag=True, help="Go on with what happens from now on, until Ctrl-C or the end of the cluster."
)
@_filter_options
@cluster_option
@state_option
@json_option
def show(
    trace: Path | None, follow: bool, cluster: str | None, state_dir: Path | None, as_json: bool, **wanted: str | None
) -> None:
    """Print events with decoded arguments and results, in order of time, each message once.

    With -f processes that do not record do so until the end.
    """
    from deploy.trace.merge import Selection
    from deploy.trace.show import each_message_once

    filter_ = make_filter(**wanted)
    if follow:
        if trace is not None or state_dir is not None:
            raise UserError("-f follows a running cluster: leave out TRACE and --state, use --cluster")
        _follow(cluster, filter_, as_json=as_json)
        return
    selection = Selection(_place(trace, cluster, state_dir), filter_)
    for event in each_message_once(iter(selection), filter_):
        _print(event, as_json=as_json)
    _tell_unread(selection.survey, trace)


def _follow(cluster: str | None, filter_: Filter, *, as_json: bool) -> None:
    from deploy.trace.merge import Tail, Trace
    from deploy.trace.recording import begin, files_of, paths_of
    from deploy.trace.show import each_message_once

    if filter_.since_ns is not None:
        raise UserError("--since asks for what was; -f shows what comes")
    with connect(cluster) as client:
        status = client.call("status")
        check_names(filter_, (row["name"] for host in status["hosts"] for row in host["vms"]), _targets(status))
        trace_dir = paths_of(client, status).trace_dir
        trace = Trace(files_of(trace_dir, filter_.process))
        for _ in trace.added():
            """What is there already is not what comes."""
        tail = Tail(trace)
        begun = begin(client, filter_.process)
        _tell_silent(begun["silent"])

        def print_all(events: list[Event]) -> None:
            for event in each_message_once(iter(events), filter_):
                if filter_.passes(event):
                    _print(event, as_json=as_json)
            sys.stdout.flush()
            tell_unreadable(trace.newly_unreadable())

        while not client.is_gone_within(POLL_SECONDS):
            trace.add(files_of(trace_dir, filter_.process))
            print_all(tail.settled(time.monotonic_ns()))
        print_all(tail.rest())
        tell_down(client.run_dir.name)


def _targets(status: dict[str, Any]) -> list[str]:
    from deploy.tables import processes_of

    return [row["target"] for row in processes_of(status)]


def _print(event: Event, *, as_json: bool) -> None:
    from deploy.trace.show import line, row

    click.echo(json.dumps(row(event)) if as_json else one_line(line(event)))


@trace.command("stats")
@_trace_argument
@_filter_options
@cluster_option
@state_option
@json_option
def stats(trace: Path | None, cluster: str | None, state_dir: Path | None, as_json: bool, **wanted: str | None) -> None:
    """Count: for each call how often, the time it took (p50, p99), with what results."""
    import msgspec

    from deploy.trace.merge import Selection
    from deploy.trace.stats import statistics

    filter_ = make_filter(**wanted)
    selection = Selection(_place(trace, cluster, state_dir), filter_)
    counted = statistics(selection)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(counted), indent=2))
    else:
        from deploy.tables import console
        from deploy.trace.tables import stats_tables

        for table in stats_tables(counted):
            console().print(table)
    _tell_unread(selection.survey, trace)


@trace.command("export")
@_trace_argument
@click.option("--format", "kind", type=click.Choice(["perfetto", "mermaid"]), default="perfetto", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write there; default: standard output.")
@_filter_options
@cluster_option
@state_option
def export(
    trace: Path | None,
    kind: str,
    output: Path | None,
    cluster: str | None,
    state_dir: Path | None,
    **wanted: str | None,
) -> None:
    """Write a trace for ui.perfetto.dev, or one cause of it (--cause) as a Mermaid sequence diagram."""
    from deploy.trace.merge import Selection

    filter_ = make_filter(**wanted)
    if kind == "mermaid" and filter_.cause is None:
        raise UserError("a sequence diagram is of one cause: --cause ID; `pefbox trace show` prints the ids")
    selection = Selection(_place(trace, cluster, state_dir), filter_)
    pieces = _as_perfetto(selection) if kind == "perfetto" else [_as_mermaid(selection, filter_)]
    if output is None:
        sys.stdout.writelines(pieces)
    else:
        _write(output, pieces)
    _tell_unread(selection.survey, trace)


def _as_perfetto(selection: Selection) -> Iterable[str]:
    """Piece by piece: a trace may be larger than the memory."""
    from deploy.trace.perfetto import document

    return document(selection)


def _as_mermaid(selection: Selection, filter_: Filter) -> str:
    from deploy.trace.mermaid import sequence_diagram

    assert filter_.cause is not None
    return sequence_diagram(selection, filter_.cause)


def _write(path: Path, pieces: Iterable[str]) -> None:
    try:
        with path.open("w") as file:
            file.writelines(pieces)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


@trace.command("diff")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--to-the-end", is_flag=True, help="A trace that goes on after the other has ended differs, too.")
@_filter_options
@json_option
def diff(a: Path, b: Path, to_the_end: bool, as_json: bool, **wanted: str | None) -> None:
    """Compare two runs and name the first message that differs. Exit status 1 when one does.

    Compared is what each process sent each other, in its order: calls with arguments and results, events, and the VM's
    own time where it counts instructions. The host's time, ids and cookies are not.
    """
    import msgspec

    from deploy.trace.diff import compare
    from deploy.trace.tables import diff_lines

    found = compare(a, b, make_filter(**wanted), to_the_end=to_the_end)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        for line in diff_lines(found):
            click.echo(one_line(line))
    if not found.same:
        raise click.exceptions.Exit(1)


def _place(trace: Path | None, cluster: str | None, state_dir: Path | None) -> Path:
    """The trace that a command means; that of a running cluster is flushed first."""
    if trace is not None:
        if cluster is not None or state_dir is not None:
            raise UserError("TRACE is a trace already: leave out --cluster and --state")
        return trace
    if state_dir is None and _runs(cluster):
        from deploy.trace.recording import flush

        with connect(cluster) as client:
            flush(client)
    return Paths(runtime_root(), state_dir_of(cluster, state_dir)).trace_dir


def _runs(cluster: str | None) -> bool:
    try:
        choose_cluster(cluster)
    except UserError:
        return False
    return True


def _tell_unread(survey: Survey, trace: Path | None) -> None:
    """Of files that are not shown to their end."""
    tell_unreadable(survey.unreadable.values())
    if trace is None:
        # What a running process is writing is not cut.
        return
    for path, n_bytes in survey.cut.items():
        click.echo(
            f"pefbox: {path}: cut off inside an entry, of which {n_bytes} bytes are there; all before it is shown",
            err=True,
        )


def tell_unreadable(errors: Iterable[TraceUnreadable]) -> None:
    """A line for each damaged file."""
    for error in errors:
        click.echo(f"pefbox: {one_line(str(error))}; all before it is shown", err=True)
