"""The detached launcher: `python -m deploy.launcher_main`, started by `pefbox up --detach` and the Python API.

It says on a pipe whether the cluster came up, then serves until it is told to stop.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from deploy.launch_outcome import Outcome
from deploy.template import NO_TEMPLATES, Templates, load_templates
from shared.process_end import leave
from shared.quick_imports import quick_imports


def main() -> NoReturn:
    """Be the launcher of a cluster whose processes are forks of templates that load now."""
    arguments = parse(sys.argv[1:])
    leave(run(arguments, load_templates() if arguments.service_module is None else NO_TEMPLATES))


def run(arguments: argparse.Namespace, templates: Templates) -> int:
    """Launch; the exit status is 1 when the cluster did not come up, 0 when it did and was stopped in good order."""
    with templates:
        return _launch(arguments, templates)


def _launch(arguments: argparse.Namespace, templates: Templates) -> int:
    with quick_imports():
        from deploy.cluster_run import ClusterRun, LaunchOptions
        from deploy.launch import LaunchRequest, launch
        from deploy.spawn import SERVICE_MODULE
        from protocol.errors import PefboxError

    options = LaunchOptions(
        record=arguments.record,
        debug=arguments.debug,
        debuggable=frozenset(arguments.debuggable),
        service_module=arguments.service_module or SERVICE_MODULE,
    )
    restore = {vm: Path(file) for vm, file in arguments.restore}
    request = LaunchRequest(
        arguments.cluster_file, arguments.name, arguments.state, options, arguments.owner_fd, restore, templates
    )

    ready = os.fdopen(arguments.ready_fd, "wb", buffering=0)

    def say(outcome: Outcome) -> bool:
        """Whether somebody hears it."""
        with ready:
            try:
                ready.write(msgspec.msgpack.encode(outcome))
            except BrokenPipeError:
                return False
        return True

    def healthy(run: ClusterRun) -> None:
        # The snapshot of a secure VM is spent when it goes on: that VM is not to end with whoever asked for it.
        if not say(Outcome(cluster=run.cluster.name)) and not restore:
            run.log.warning("whoever asked for this cluster is gone")
            run.stop_requested.set()

    try:
        launch(request, healthy, lambda text: None)
    except PefboxError as error:
        if not ready.closed:
            say(Outcome(error=str(error)))
        return 1
    if not ready.closed:
        say(Outcome(error="the cluster was told to stop before it was up"))
        return 1
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line of a launcher."""
    parser = argparse.ArgumentParser(prog="deploy.launcher_main", description="The launcher of a pefbox cluster.")
    parser.add_argument("cluster_file", type=Path)
    parser.add_argument("--ready-fd", type=int, required=True, help="inherited pipe for the outcome of the start")
    parser.add_argument("--owner-fd", type=int, help="inherited pipe; the cluster stops when its other end is closed")
    parser.add_argument("--name", help="name of the cluster; default: as in the file")
    parser.add_argument("--state", type=Path, help="state directory")
    parser.add_argument("--restore", nargs=2, metavar=("VM", "FILE"), action="append", default=[])
    parser.add_argument("--record", action="store_true", help="record every frame of every link")
    parser.add_argument("--debug", action="store_true", help="let debuggers into the host processes")
    parser.add_argument("--debuggable", action="append", default=[], metavar="TARGET", help="let debuggers into it")
    parser.add_argument("--service-module", help="module to run for a role, in the place of services.{role}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
