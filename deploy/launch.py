"""The launcher: from a cluster file to a running cluster and back to nothing."""

from __future__ import annotations

import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import msgspec
import trio

from deploy import preflight
from deploy.cluster_file import Cluster, check_cluster_name, read_cluster_file, resolve_state
from deploy.cluster_run import ClusterRun, LaunchOptions
from deploy.files import open_to_append, refusal, told_by_line
from deploy.health import wait_until_started
from deploy.manifest import clean_run_dir, new_manifest
from deploy.migrate import asked_by_monitor
from deploy.operator_socket import OperatorSocket
from deploy.plan import cluster_processes
from deploy.restore import close_all, load_all, open_all
from deploy.run_dirs import (
    LOCK_FILE,
    TRACE_SUFFIX,
    Lock,
    Locks,
    Paths,
    default_paths,
    in_turn,
    is_locked,
    make_private_dir,
)
from deploy.start import start_cluster
from deploy.stopping import remove_everything, stop_processes
from deploy.supervise import heartbeat, watch_signals
from deploy.template import NO_TEMPLATES, Templates
from protocol.errors import HostFault, PefboxError, UserError
from protocol.roles import Role
from services.runtime.confine import protect_memory
from services.runtime.log import Log, open_log

_ORDERS_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What `pefbox up` was asked for."""

    cluster_file: Path
    name: str | None
    state_dir: Path | None
    options: LaunchOptions
    owner_fd: int | None = None
    """A pipe that becomes readable when whoever owns the cluster is gone; None: it belongs to nobody's life."""
    restore: Mapping[str, Path] = field(default_factory=dict)
    """VMs that do not boot but go on out of a snapshot, and its file."""
    templates: Templates = NO_TEMPLATES
    """What its processes are forked from."""


@told_by_line()
def prepare(request: LaunchRequest) -> tuple[ClusterRun, Locks]:
    """Check everything, take the cluster's name and directories; nothing is started. Raises UserError."""
    cluster = read_cluster_file(request.cluster_file)
    if request.name is not None:
        cluster = msgspec.structs.replace(cluster, name=check_cluster_name(request.name))
    paths = default_paths(cluster.name, request.state_dir)
    cluster = let_debuggers_in(resolve_state(cluster, paths.state_dir), request.options.debuggable)
    make_private_dir(paths.run_dir.parent)
    _refuse_running(paths)
    _make_state_dirs(paths)
    with ExitStack() as undo:
        taken = f"{paths.state_dir} is the state directory of a cluster that runs"
        state_lock = Lock(paths.state_dir / LOCK_FILE, taken)
        undo.callback(state_lock.release)
        _make_files(cluster, paths.state_dir)
        preflight.check(cluster, paths, preflight.Machine.here())
        run_lock = _take_run_dir(paths)
        undo.callback(run_lock.release)
        undo.callback(shutil.rmtree, paths.run_dir, ignore_errors=True)
        _remove_records(paths, [process.target for process in cluster_processes(cluster)])
        manifest = new_manifest(paths.manifest, cluster.name, paths.state_dir)
        run = ClusterRun(cluster, paths, request.options, manifest, _open_log(paths))
        run.use_templates(request.templates)
        undo.pop_all()
    return run, Locks(state_lock, run_lock)


def launch(request: LaunchRequest, on_healthy: Callable[[ClusterRun], None], on_event: Callable[[str], None]) -> None:
    """Start the cluster, call `on_healthy`, serve until it is told to stop, and leave nothing behind.

    Raises UserError when it does not come up. To be called in the main thread.
    """
    run, locks = prepare(request)
    run.on_event = on_event
    # Secret keys pass through this process.
    protect_memory(dumpable=request.options.debug)
    with _orders_to_end_noted(run):
        try:
            failure = trio.run(_live, run, on_healthy, request)
        except Exception as error:
            run.log.error("the launcher broke", exc_info=error)
            failure = HostFault(f"the launcher broke: {_innermost(error)}: see {run.paths.launcher_log}")
        finally:
            remove_everything(run, locks)
    if failure is not None:
        raise failure


def _innermost(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return refusal(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


@contextmanager
def _orders_to_end_noted(run: ClusterRun) -> Iterator[None]:
    """A signal to end never breaks off what makes or removes things: the loop acts on it, as soon as it runs."""

    def note(_number: int, _frame: FrameType | None) -> None:
        run.told_early = True

    earlier = {number: signal.signal(number, note) for number in _ORDERS_TO_END}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


async def _live(
    run: ClusterRun, on_healthy: Callable[[ClusterRun], None], request: LaunchRequest
) -> PefboxError | None:
    failure: list[PefboxError] = []
    async with trio.open_nursery() as nursery:
        run.nursery = nursery
        run.on_migrate = functools.partial(asked_by_monitor, run)
        await nursery.start(watch_signals, run)
        await nursery.start(_watch_orders_to_end, run)
        if request.owner_fd is not None:
            nursery.start_soon(_end_with_owner, run, request.owner_fd)
        await nursery.start(OperatorSocket(run).serve)
        nursery.start_soon(heartbeat, run)
        nursery.start_soon(_start, run, on_healthy, request.restore, failure)
        await run.stop_requested.wait()
        run.log.info("stopping")
        await stop_processes(run)
        nursery.cancel_scope.cancel()
    return failure[0] if failure else None


async def _start(
    run: ClusterRun,
    on_healthy: Callable[[ClusterRun], None],
    restore: Mapping[str, Path],
    failure: list[PefboxError],
) -> None:
    snapshots: dict[str, int] = {}
    try:
        snapshots = open_all(run, restore)
        await start_cluster(run)
        await load_all(run, snapshots)
        await wait_until_started(run, run.vms.values())
    except PefboxError as error:
        if not run.stopping:
            run.log.error("start failed", reason=str(error))
            failure.append(error)
        run.stop_requested.set()
        return
    finally:
        close_all(snapshots)
    run.healthy = True
    run.log.info("healthy")
    on_healthy(run)


async def _watch_orders_to_end(run: ClusterRun, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(*_ORDERS_TO_END) as signals:
        task_status.started()
        if run.told_early:
            run.stop_requested.set()
        async for number in signals:
            run.log.info("told to stop", signal=signal.Signals(number).name)
            run.stop_requested.set()


async def _end_with_owner(run: ClusterRun, owner_fd: int) -> None:
    await trio.lowlevel.wait_readable(owner_fd)
    if not run.stopping:
        run.log.warning("the program that started this cluster is gone")
    run.stop_requested.set()


def let_debuggers_in(cluster: Cluster, targets: Iterable[str]) -> Cluster:
    """`cluster` with these processes debuggable: of a guest that is a setting of its VM. Raises UserError."""
    processes = {process.target: process for process in cluster_processes(cluster)}
    unknown = [target for target in targets if target not in processes]
    if unknown:
        raise UserError(f'--debuggable: no process "{unknown[0]}"; there are: {", ".join(processes)}')
    guests = {processes[target].vm for target in targets if processes[target].role is Role.GUEST}
    vms = [msgspec.structs.replace(vm, debuggable=True) if vm.name in guests else vm for vm in cluster.vms]
    return msgspec.structs.replace(cluster, vms=vms)


def _make_files(cluster: Cluster, state_dir: Path) -> None:
    if cluster.make is None:
        return
    # To read ELF and FDT files takes as long to import as all else here, and most clusters have their files.
    from deploy import makers

    makers.make(cluster, state_dir)


def _make_state_dirs(paths: Paths) -> None:
    make_private_dir(paths.state_dir)
    for directory in (paths.log_dir, paths.trace_dir):
        directory.mkdir(mode=0o700, exist_ok=True)


def _take_run_dir(paths: Paths) -> Lock:
    """The cluster's run directory, new and locked; what a killed cluster left there is removed first."""
    with in_turn(paths.run_dir.parent):
        _refuse_running(paths)
        if paths.run_dir.exists() and clean_run_dir(paths.run_dir) is None:
            raise UserError(f"{paths.run_dir}: holds no manifest that this version understands; remove it by hand")
        make_private_dir(paths.run_dir)
        return Lock(paths.lock_file, f'a cluster "{paths.run_dir.name}" starts already')


def _refuse_running(paths: Paths) -> None:
    if is_locked(paths.lock_file):
        raise UserError(f'a cluster "{paths.run_dir.name}" runs already: pefbox down, or up --name OTHER')


def _remove_records(paths: Paths, targets: list[str]) -> None:
    """Logs and traces are of one run."""
    for target in targets:
        paths.log_file(target).unlink(missing_ok=True)
    for path in paths.trace_dir.glob(f"*{TRACE_SUFFIX}"):
        path.unlink()
    paths.launcher_log.unlink(missing_ok=True)


def _open_log(paths: Paths) -> Log:
    fd = open_to_append(paths.launcher_log)
    try:
        return open_log(fd, "launcher")
    finally:
        os.close(fd)
