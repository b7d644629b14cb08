"""Commands for a cluster as a whole: up, ps, status, restart, down, doctor, clean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.cli_support import cluster_option, json_option, printable
from deploy.client import DetachedStart, LauncherClient, connect, start_detached, wait_until_down
from deploy.run_dirs import in_turn, killed_note, left_over_clusters, run_dirs, running_clusters, runtime_root
from protocol.errors import UserError
from protocol.vm_state import VmState

if TYPE_CHECKING:
    from deploy.template import Templates

BUILTIN = Path(__file__).parent / "clusters"
_STATUS_SECONDS = 0.9
_RESTART_SECONDS = 45.0


@click.command("up")
@click.argument("cluster_file", type=click.Path(path_type=Path), default=BUILTIN / "two-hosts.toml")
@click.option("--name", help="Name of the cluster; default: as in the file.")
@click.option("--detach", is_flag=True, help="Return when the cluster is healthy; it goes on until `pefbox down`.")
@click.option("--record", is_flag=True, help="Record every frame of every link (see `calls`).")
@click.option("--debug", is_flag=True, help="Let debuggers into the host processes. Secrets are then not protected.")
@click.option("--debuggable", multiple=True, metavar="TARGET", help="Let debuggers into this process only; repeatable.")
@click.option("--state", "state_dir", type=click.Path(path_type=Path), help="Directory of keys, audit log and logs.")
@click.option(
    "--restore", metavar="VM=FILE", multiple=True, help="Let VM go on out of a snapshot in the place of booting."
)
def up(
    cluster_file: Path,
    name: str | None,
    detach: bool,
    record: bool,
    debug: bool,
    debuggable: tuple[str, ...],
    state_dir: Path | None,
    restore: tuple[str, ...],
) -> None:
    """Start the cluster that CLUSTER_FILE describes and wait until it is healthy.

    Without --detach the command stays, and stops everything on Ctrl-C.
    """
    start = DetachedStart(cluster_file, name, state_dir, record, debug, debuggable, restore=_restores(restore))
    if not detach:
        _up_in_foreground(start)
        return
    started, _ = start_detached(start)
    with connect(started) as client:
        answer = client.call("status")
    _print_status(answer)
    refuse_unrestored(answer, start.restore)


def _restores(words: tuple[str, ...]) -> dict[str, Path]:
    """Files by VM."""
    files = {}
    for word in words:
        vm, equals, file = word.partition("=")
        if not (vm and equals and file):
            raise click.UsageError(f"--restore: {word!r} is none; it is VM=FILE.")
        files[vm] = Path(file)
    return files


def refuse_unrestored(answer: dict[str, Any], restore: Mapping[str, Path]) -> None:
    """Raise UserError for a VM that did not go on; the cluster is up."""
    for host in answer["hosts"]:
        for row in host["vms"]:
            if row["name"] in restore and row["state"] == VmState.OFF.value:
                raise UserError(printable(f"{row['name']} is off: {row['reason']}"))


def _up_in_foreground(start: DetachedStart) -> None:
    # The launcher's libraries take a while to import; the other commands need none of them.
    from deploy.template import load_templates

    with load_templates() as templates:
        _launch_here(start, templates)


def _launch_here(start: DetachedStart, templates: Templates) -> None:
    import msgspec

    from deploy.cluster_run import ClusterRun, LaunchOptions
    from deploy.launch import LaunchRequest, launch
    from deploy.status import status_now

    def healthy(run: ClusterRun) -> None:
        # A cluster does not end because nobody reads what is said of it; rich would end the process for that.
        with suppress(OSError, SystemExit):
            _print_status(msgspec.to_builtins(status_now(run)))
        say("Ctrl-C stops the cluster.")

    def say(text: str) -> None:
        with suppress(OSError):
            click.echo(text, err=True)

    options = LaunchOptions(record=start.record, debug=start.debug, debuggable=frozenset(start.debuggable))
    files = {vm: file.absolute() for vm, file in start.restore.items()}
    request = LaunchRequest(
        start.cluster_file, start.name, start.state_dir, options, restore=files, templates=templates
    )
    launch(request, healthy, say)


@click.command("ps")
@cluster_option
@json_option
def ps(cluster: str | None, as_json: bool) -> None:
    """List the processes of all running clusters, or of one; killed ones that left something are named."""
    names = [cluster] if cluster is not None else running_clusters()
    clusters, problems = [], []
    for name in names:
        try:
            with connect(name) as client:
                clusters.append(client.call("status", seconds=_STATUS_SECONDS))
        except UserError as error:
            problems.append(str(error))
    if clusters or not problems:
        _print_processes(clusters, as_json=as_json)
    for left in left_over_clusters() if cluster is None else []:
        click.echo(f'cluster "{left}" was killed and left things behind: pefbox clean', err=True)
    if problems:
        # Told last: one that does not answer hides no other.
        raise UserError("\n".join(problems))


def _print_processes(clusters: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        from deploy.tables import processes_of

        rows = [{"cluster": status["cluster"], **row} for status in clusters for row in processes_of(status)]
        click.echo(json.dumps(rows, indent=2))
        return
    from deploy.tables import console, process_table

    console().print(process_table(clusters))


@click.command("status")
@cluster_option
@json_option
def status(cluster: str | None, as_json: bool) -> None:
    """Show hosts, VMs and processes of a cluster."""
    with connect(cluster) as client:
        answer = client.call("status", seconds=_STATUS_SECONDS)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        _print_status(answer)


def _print_status(answer: dict[str, Any]) -> None:
    from deploy.tables import console, status_tree

    console().print(status_tree(answer))


@click.command("restart")
@click.argument("name", metavar="VM|HOST")
@cluster_option
def restart(name: str, cluster: str | None) -> None:
    """Start the next incarnation of a VM, or of a HOST whose kvm or ultravisor is gone."""
    with connect(cluster) as client:
        client.call("restart", {"name": name}, _RESTART_SECONDS)
        _print_status(client.call("status"))


@click.command("down")
@cluster_option
def down(cluster: str | None) -> None:
    """Stop a cluster and remove all it made on this machine but its state directory. Nothing running is no error."""
    if cluster is None and not running_clusters():
        click.echo(f"no cluster runs{killed_note()}")
        return
    if cluster is not None and cluster not in running_clusters():
        click.echo(f'cluster "{cluster}" does not run{killed_note()}')
        return
    with connect(cluster) as client:
        _order_stop(client)
    wait_until_down(client.run_dir)
    click.echo(f'cluster "{client.run_dir.name}" is down')


def _order_stop(client: LauncherClient) -> None:
    client.call("stop")


@click.command("doctor")
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine offers and lacks, and what each absence costs. Exit status 1 if something needed lacks."""
    from deploy.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([finding.as_json() for finding in findings], indent=2))
    else:
        from deploy.doctor import findings_table
        from deploy.tables import console

        console().print(findings_table(findings))
    if any(finding.required and not finding.ok for finding in findings):
        raise click.exceptions.Exit(1)


@click.command("clean")
@cluster_option
def clean(cluster: str | None) -> None:
    """Remove what killed clusters left behind: exactly what their manifests name."""
    from deploy.manifest import clean_run_dir

    running = running_clusters()
    for run_dir in run_dirs(runtime_root()):
        if run_dir.name in running or cluster not in (None, run_dir.name):
            continue
        with in_turn(run_dir.parent):
            removed = clean_run_dir(run_dir)
        if removed is None:
            click.echo(f"{run_dir}: left alone, it holds no manifest that this version understands", err=True)
            continue
        for what in removed:
            click.echo(f"{run_dir.name}: removed {what}")
