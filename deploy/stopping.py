"""Stopping a cluster: in good order while that works, by force after that, and nothing stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import time

import trio

from deploy.child import Child
from deploy.cluster_run import ClusterRun
from deploy.run_dirs import Locks, in_turn
from deploy.states import ProcessState
from protocol import control
from protocol.errors import PeerGone
from protocol.roles import Role

ORDER = ((Role.GUEST, Role.QEMU), (Role.KVM,), (Role.ULTRAVISOR,))
"""Who depends on others ends before them."""

STOP_SECONDS = 2.5
_TERMINATE_SECONDS = 0.5
_KILL_SECONDS = 5.0


async def stop_processes(run: ClusterRun) -> None:
    """End every process; returns when the kernel reported the end of each."""
    run.stopping = True
    # A start that waits for a template need not.
    run.spawner.templates.kill()
    for child in run.living():
        child.exit_expected = True
    for roles in ORDER:
        group = [child for child in run.living() if child.plan.role in roles]
        async with trio.open_nursery() as nursery:
            for child in group:
                nursery.start_soon(_stop, child)


async def _stop(child: Child) -> None:
    if child.state.answers and child.has_keys:
        try:
            child.channel.send(control.Stop())
            with trio.move_on_after(STOP_SECONDS):
                await child.exited.wait()
        except PeerGone:
            pass
    if child.is_running and child.state is not ProcessState.STOPPED:
        child.kill(signal.SIGTERM)
        with trio.move_on_after(_TERMINATE_SECONDS):
            await child.exited.wait()
    child.kill()
    await child.exited.wait()


def remove_everything(run: ClusterRun, locks: Locks) -> None:
    """Kill what still lives, unlink the segments, remove the run directory; the manifest goes last.

    Plain synchronous code: it runs on every way out of the launcher.
    """
    _kill_remaining(run.living())
    run.spawner.templates.close()
    for name in list(run.manifest.data.segments):
        run.drop_segment(name)
    last = (run.paths.manifest, run.paths.lock_file)
    for entry in sorted(run.paths.run_dir.iterdir()):
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry not in last:
            entry.unlink(missing_ok=True)
    with in_turn(run.paths.run_dir.parent):
        # Whoever waits for the end of this cluster waits for these two, and may then begin the next.
        locks.state.release()
        for entry in last:
            entry.unlink(missing_ok=True)
        run.paths.run_dir.rmdir()
    locks.run.release()


def _kill_remaining(children: list[Child]) -> None:
    for child in children:
        child.kill()
    deadline = time.monotonic() + _KILL_SECONDS
    for child in children:
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG) is not None:
                break
            time.sleep(0.005)
