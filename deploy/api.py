"""The public Python API: a cluster as an async context manager.

    async with cluster("two-hosts.toml") as c:
        vm = c.vm("vm1")
        await vm.secure()
        print(await vm.console_command("pages"))
        await c.process("alpha/kvm").kill()

The launcher runs in a process of its own, as with `pefbox up --detach`, so that nothing of the caller's program can
hold up its heartbeat. It ends with the program, however that ends; of a program that is killed a state directory that
was made for it stays. Everything here runs under trio.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from deploy.client import DetachedStart, read_token, start_detached
from deploy.host_description import HostDescription
from deploy.host_links import LinkRow
from deploy.launch_server import LaunchServer
from deploy.launcher_process import LauncherProcess
from deploy.migration_record import Phase
from deploy.operator_protocol import LENGTH, Request, Response, frame
from deploy.progress import is_over
from deploy.run_dirs import LAUNCHER_SOCKET, Paths, runtime_root
from deploy.snapshot_job import SnapshotPhase
from deploy.status import ClusterStatus, ProcessRow, VmRow
from deploy.vm_description import VmDescription
from protocol.errors import UserError
from shared.typed_text import TypedText

_POLL_SECONDS = 0.02
_MIGRATION_POLL_SECONDS = 0.1
"""Each look costs the processes that move a VM some milliseconds."""
_DOWN_SECONDS = 20.0
_KILL_SECONDS = 2.0
_PROMPT_QUIET_SECONDS = 0.2


class Process:
    """One process of the cluster, by its target."""

    def __init__(self, cluster: RunningCluster, target: str) -> None:
        self._cluster, self.target = cluster, target

    async def row(self) -> ProcessRow:
        """Its row of `status`; raises UserError for an unknown target."""
        for row in processes_of(await self._cluster.status()):
            if row.target == self.target:
                return row
        raise UserError(f'no process "{self.target}"')

    async def query(self, what: str, arguments: dict[str, Any] | None = None, seconds: float = 0.5) -> Any:  # noqa: ANN401
        """Ask it something; raises UserError with its refusal, or when it does not answer in `seconds`."""
        order = {"target": self.target, "query": what, "arguments": arguments or {}, "seconds": seconds}
        return await self._cluster.order("query", order)

    async def send_signal(self, number: signal.Signals) -> None:
        """Send a signal through the launcher, which knows whether the pid is still the process."""
        await self._cluster.order("signal", {"target": self.target, "signal": int(number)})

    async def kill(self) -> None:
        """SIGKILL."""
        await self.send_signal(signal.SIGKILL)

    async def stop(self) -> None:
        """SIGSTOP."""
        await self.send_signal(signal.SIGSTOP)

    async def resume(self) -> None:
        """SIGCONT."""
        await self.send_signal(signal.SIGCONT)

    async def wait_state(self, *states: str, seconds: float = 5.0) -> ProcessRow:
        """Its row, as soon as it is in one of `states`; raises UserError after `seconds`."""
        return await _until(self.row, lambda row: row.state in states, f"{self.target} is not {states}", seconds)

    def log(self) -> str:
        """What it logged so far: JSON lines."""
        return self._cluster.paths.log_file(self.target).read_text()


class Vm:
    """One virtual machine, by its name."""

    def __init__(self, cluster: RunningCluster, name: str) -> None:
        self._cluster, self.name = cluster, name

    @property
    def guest(self) -> Process:
        """Its guest process."""
        return self._cluster.process(f"{self.name}/guest")

    @property
    def qemu(self) -> Process:
        """Its qemu process."""
        return self._cluster.process(f"{self.name}/qemu")

    @property
    def kvm(self) -> Process:
        """The kvm of the host that it is on, whichever that is when it is asked."""
        return self._cluster.process(f"{self.name}/kvm")

    async def host(self) -> str:
        """The host that it is on now; raises UserError for an unknown name."""
        for host in (await self._cluster.status()).hosts:
            if any(row.name == self.name for row in host.vms):
                return host.name
        raise UserError(f'no VM "{self.name}"')

    async def row(self) -> VmRow:
        """Its row of `status`; raises UserError for an unknown name."""
        for host in (await self._cluster.status()).hosts:
            for row in host.vms:
                if row.name == self.name:
                    return row
        raise UserError(f'no VM "{self.name}"')

    async def secure(self, seconds: float = 30.0) -> VmRow:
        """Its row, as soon as it is secure; raises UserError after `seconds` or when it fails."""
        return await self.wait(lambda row: row.secure, "secure", seconds)

    async def wait_state(self, *states: str, seconds: float = 30.0) -> VmRow:
        """Its row, as soon as it is in one of `states`; raises UserError after `seconds` or when it fails."""
        return await self.wait(lambda row: row.state in states, f"in {states}", seconds)

    async def wait(self, holds: Callable[[VmRow], bool], what: str, seconds: float = 30.0) -> VmRow:
        """Its row, as soon as `holds`; raises UserError, which names `what`, after `seconds` or when it fails."""

        def reached(row: VmRow) -> bool:
            if row.state == "failed" and not holds(row):
                raise UserError(f"{self.name} failed before it was {what}: {row.reason}")
            return holds(row)

        return await _until(self.row, reached, f"{self.name} is not {what}", seconds)

    async def describe(self) -> VmDescription:
        """What `pefbox dumpxml --json` shows, as Structs."""
        return msgspec.convert(await self._cluster.order("vm", {"vm": self.name}), VmDescription)

    async def restart(self) -> None:
        """Start its next incarnation."""
        await self._cluster.restart(self.name)

    async def migrate(
        self, host: str, *, bandwidth: int | None = None, downtime_limit: int | None = None, seconds: float = 120.0
    ) -> dict[str, Any]:
        """Move it to `host` while it runs, with at most `bandwidth` bytes a second and `downtime_limit` milliseconds
        of standing still; returns how that went, as `pefbox jobinfo --json` shows it.

        Raises UserError when it does not move, or is not there after `seconds`: then it is still on its way.
        """
        await self.begin_migration(host, bandwidth=bandwidth, downtime_limit=downtime_limit)
        problem = f"{self.name} is not on {host}"
        facts = await _until(self.job_info, is_over, problem, seconds, _MIGRATION_POLL_SECONDS)
        if facts["phase"] != Phase.DONE:
            raise UserError(f"{self.name} does not run on {host}: {facts['reason'] or facts['phase']}")
        return facts

    async def begin_migration(
        self, host: str, *, bandwidth: int | None = None, downtime_limit: int | None = None
    ) -> None:
        """As `migrate`, and returns as soon as that is accepted."""
        order = {"vm": self.name, "host": host, "parameters": _limits(bandwidth, downtime_limit)}
        await self._cluster.order("migrate", order)

    async def can_migrate(self, host: str) -> list[str]:
        """Every reason why it cannot move to `host` now; none when it can."""
        answer = await self._cluster.order("can-migrate", {"vm": self.name, "host": host})
        return list(answer["reasons"])

    async def job_info(self) -> dict[str, Any]:
        """How far its migration is, or how the last one ended; raises UserError when there was none."""
        facts: dict[str, Any] = await self._cluster.order("jobinfo", {"vm": self.name})
        return facts

    async def cancel_migration(self) -> None:
        """Let it stay where it is; raises UserError when it does not move, or too late."""
        await self._cluster.order("migrate-cancel", {"vm": self.name})

    async def set_migration(self, *, bandwidth: int | None = None, downtime_limit: int | None = None) -> None:
        """Change the limits of a migration that is under way; raises UserError."""
        order = {"vm": self.name, "parameters": _limits(bandwidth, downtime_limit)}
        await self._cluster.order("migrate-set", order)

    async def recover(self) -> str:
        """Find out where it runs after a migration that was cut; returns its host. Raises UserError."""
        return str((await self._cluster.order("recover", {"vm": self.name}))["host"])

    async def snapshot(self, file: str | Path, *, force: bool = False, seconds: float = 120.0) -> dict[str, Any]:
        """Save it into `file`, which `force` replaces, and switch it off; how that went, as `pefbox snapshot --json`.

        Raises UserError when it was not saved, or when that is open after `seconds`.
        """
        await self._cluster.order("snapshot", {"vm": self.name, "file": _absolute(file), "force": force})
        return await self._snapshot_end(f"{self.name} is not saved in {file}", seconds)

    async def restore(self, file: str | Path, *, ignore_disks: bool = False, seconds: float = 120.0) -> dict[str, Any]:
        """Let it go on out of `file`, also where a disk was written since if `ignore_disks`; how that went.

        Raises UserError when it does not go on, or when that is open after `seconds`.
        """
        order = {"vm": self.name, "file": _absolute(file), "ignore_disks": ignore_disks}
        await self._cluster.order("restore", order)
        return await self._snapshot_end(f"{self.name} does not go on out of {file}", seconds)

    async def _snapshot_end(self, problem: str, seconds: float) -> dict[str, Any]:
        facts = await _until(self.snapshot_info, is_over, problem, seconds)
        if facts["phase"] != SnapshotPhase.DONE:
            raise UserError(f"{problem}: {facts['reason'] or facts['phase']}")
        return facts

    async def snapshot_info(self) -> dict[str, Any]:
        """How far its snapshot or restore is, or how the last one ended; raises UserError when there was none."""
        facts: dict[str, Any] = await self._cluster.order("snapshot-info", {"vm": self.name})
        return facts

    async def cancel_snapshot(self) -> None:
        """Let it go on; raises UserError when it is not being saved, or too late."""
        await self._cluster.order("snapshot-cancel", {"vm": self.name})

    async def page(self, gpa: int) -> dict[str, Any]:
        """What each part of the machine knows of a page (`pefbox page`)."""
        view: dict[str, Any] = await self._cluster.order("page", {"vm": self.name, "gpa": gpa})
        return view

    async def gdb_port(self, view: str = "owner", port: int = 0) -> int:
        """A port on which GDB finds it (`pefbox gdb`); `view` is "owner" or "host". Raises UserError."""
        facts = await self._cluster.order("gdb", {"vm": self.name, "view": view, "port": port})
        return int(facts["port"])

    async def console_read(self, since: int = 0, wait_seconds: float = 0.0) -> tuple[bytes, int]:
        """Terminal output from character `since` on, and where it ends; waits at most `wait_seconds` for some."""
        arguments = {"vm": self.name, "since": since, "wait_s": wait_seconds}
        answer = await self._of_its_kvm("console.read", arguments, wait_seconds + 1.0)
        return answer["data"], answer["next"]

    async def console_write(self, text: bytes | TypedText) -> None:
        """Type on its terminal; waits while the input buffer is full.

        Raises UserError when no answer comes. Then nobody knows how much was typed; to call again with the same
        TypedText types the rest.
        """
        typed = TypedText(text) if isinstance(text, bytes) else text
        while not typed.is_taken:
            answer = await self._of_its_kvm("console.write", {"vm": self.name, **typed.offer().arguments()})
            typed.took(int(answer["taken"]))
            if not typed.is_taken:
                await trio.sleep(_POLL_SECONDS)

    async def _of_its_kvm(self, what: str, arguments: dict[str, Any], seconds: float = 0.5) -> Any:  # noqa: ANN401
        try:
            return await self.kvm.query(what, arguments, seconds)
        except UserError:
            # It may just have moved; then its new host knows.
            return await self.kvm.query(what, arguments, seconds)

    async def console_command(self, line: str, prompt: str = "> ", seconds: float = 30.0) -> str:
        """Type a line; returns what the VM wrote until its `prompt` came again, the echo of the line removed.

        Raises UserError when the prompt does not come in `seconds`.
        """
        _, since = await self.console_read()
        await self.console_write(line.encode() + b"\r")
        output = b""
        with trio.move_on_after(seconds):
            while True:
                data, since = await self.console_read(since, _PROMPT_QUIET_SECONDS)
                output += data
                text = output.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
                if not data and text.endswith(prompt):
                    return text.removeprefix(line).removeprefix("\n").removesuffix(prompt)
        raise UserError(f"{self.name}: no prompt within {seconds:g} s after {line!r}: {output[-200:]!r}")


class RunningCluster:
    """A cluster that is up."""

    def __init__(self, name: str, paths: Paths, launcher: LauncherProcess) -> None:
        self.name, self.paths = name, paths
        self.launcher_pid = launcher.pid
        self._launcher = launcher

    async def order(self, what: str, arguments: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        """One order to the launcher; raises UserError with its refusal, or when it is gone."""
        try:
            token = read_token(self.paths.run_dir)
            stream = await trio.open_unix_socket(str(self.paths.run_dir / LAUNCHER_SOCKET))
        except OSError as error:
            raise UserError(f'cluster "{self.name}": its launcher cannot be reached: {error.strerror}') from None
        async with stream:
            try:
                await stream.send_all(frame(Request(token, what, arguments or {})))
                (n_bytes,) = LENGTH.unpack(await self._read(stream, LENGTH.size))
                response = msgspec.msgpack.decode(await self._read(stream, n_bytes), type=Response)
            except trio.BrokenResourceError as error:
                raise UserError(f'cluster "{self.name}": its launcher is gone ({error.__cause__ or error})') from None
        if response.error is not None:
            raise UserError(response.error)
        return response.result

    async def status(self) -> ClusterStatus:
        """What `pefbox status --json` shows, as Structs."""
        return msgspec.convert(await self.order("status"), ClusterStatus)

    async def capabilities(self, host: str) -> HostDescription:
        """What `pefbox capabilities --json` shows, as Structs."""
        return msgspec.convert(await self.order("host", {"host": host}), HostDescription)

    def vm(self, name: str) -> Vm:
        """A VM by name."""
        return Vm(self, name)

    def process(self, target: str) -> Process:
        """A process by target: `alpha/kvm`, `vm1/guest`."""
        return Process(self, target)

    async def restart(self, name: str) -> None:
        """Restart a VM, or a host whose kvm or ultravisor is gone."""
        await self.order("restart", {"name": name})

    async def link(self, one: str, other: str, **changes: float | bool) -> LinkRow:
        """The link between two hosts, with these fields of LinkShape changed first: `down=True`, `latency_ms=50`.

        Returns when every qemu that answers has taken the change; raises UserError for one that is not possible.
        """
        order = {"between": [one, other], "changes": changes}
        return msgspec.convert(await self.order("link", order), LinkRow)

    async def down(self) -> int:
        """Stop the cluster; returns the launcher's exit status. Twice is no error. Raises UserError when it hangs."""
        if self._launcher.poll() is None:
            try:
                with trio.move_on_after(_DOWN_SECONDS):
                    await self.order("stop")
            except UserError:
                self._launcher.terminate()
        status = await self.wait_launcher(_DOWN_SECONDS)
        if status is None:
            self._launcher.kill()
            await self.wait_launcher(_KILL_SECONDS)
            raise UserError(
                f'cluster "{self.name}" was not down after {_DOWN_SECONDS:g} s; its launcher was killed: pefbox clean'
            )
        return status

    async def wait_launcher(self, seconds: float = _DOWN_SECONDS) -> int | None:
        """The launcher's exit status, as soon as it ends; None after `seconds`."""
        if self._launcher.poll() is None:
            with self._launcher.end_fd() as fd, trio.move_on_after(seconds):
                await trio.lowlevel.wait_readable(fd)
        return self._launcher.poll()

    def kill_launcher(self) -> None:
        """SIGKILL to the launcher: everything ends, and `pefbox clean` has work."""
        self._launcher.kill()

    async def _read(self, stream: trio.SocketStream, n_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < n_bytes:
            piece = await stream.receive_some(n_bytes - len(data))
            if not piece:
                raise UserError(f'cluster "{self.name}": its launcher closed the connection')
            data += piece
        return bytes(data)


@asynccontextmanager
async def cluster(
    cluster_file: str | Path,
    *,
    name: str | None = None,
    state_dir: Path | None = None,
    record: bool = False,
    debug: bool = False,
    debuggable: tuple[str, ...] = (),
    service_module: str | None = None,
    restore: Mapping[str, str | Path] | None = None,
    server: LaunchServer | None = None,
) -> AsyncIterator[RunningCluster]:
    """Start a cluster, yield it healthy, stop it at the end.

    Without `name` it gets a new one, without `state_dir` one that is removed at the end. The VMs of `restore` go on
    out of these files; one that does not is off, as `Vm.snapshot_info` says. With `server` it starts warm
    (deploy.launch_server). Raises UserError when it does not come up.
    """
    own_state = Path(tempfile.mkdtemp(prefix="pefbox-state-")) if state_dir is None else None
    owner_fd, held_fd = os.pipe()
    start = DetachedStart(
        cluster_file=Path(cluster_file),
        name=name or f"api-{secrets.token_hex(3)}",
        state_dir=own_state or state_dir,
        record=record,
        debug=debug,
        debuggable=debuggable,
        service_module=service_module,
        owner_fd=owner_fd,
        restore={vm: Path(file) for vm, file in (restore or {}).items()},
    )
    try:
        started, launcher = await trio.to_thread.run_sync(functools.partial(start_detached, start, server))
        assert start.state_dir is not None
        running = RunningCluster(started, Paths(runtime_root() / started, start.state_dir), launcher)
        try:
            yield running
        finally:
            with trio.CancelScope(shield=True):
                await running.down()
    finally:
        os.close(owner_fd)
        os.close(held_fd)
        if own_state is not None:
            shutil.rmtree(own_state, ignore_errors=True)


def processes_of(status: ClusterStatus) -> list[ProcessRow]:
    """All process rows."""
    rows = [row for host in status.hosts for row in host.processes]
    return rows + [row for host in status.hosts for vm in host.vms for row in (*vm.processes, *vm.arriving)]


def _absolute(file: str | Path) -> str:
    """As the launcher needs it, which has another working directory."""
    return str(Path(file).absolute())


def _limits(bandwidth: int | None, downtime_limit: int | None) -> dict[str, int]:
    """Those that are given, by QEMU's names."""
    limits = {"max-bandwidth": bandwidth, "downtime-limit": downtime_limit}
    return {name: value for name, value in limits.items() if value is not None}


Value = TypeVar("Value")


async def _until(
    ask: Callable[[], Awaitable[Value]],
    holds: Callable[[Value], bool],
    problem: str,
    seconds: float,
    poll_seconds: float = _POLL_SECONDS,
) -> Value:
    with trio.move_on_after(seconds):
        while True:
            value = await ask()
            if holds(value):
                return value
            await trio.sleep(poll_seconds)
    raise UserError(f"{problem} after {seconds:g} s")
