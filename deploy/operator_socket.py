"""The launcher's Unix socket, where the commands and the Python API reach it."""

from __future__ import annotations

import functools
import hmac
import os
import secrets
import signal
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from deploy.activity import gather_activity
from deploy.breaks import breaks_of
from deploy.can_migrate import why_not
from deploy.child import Child
from deploy.cluster_run import ClusterRun
from deploy.dap_port import open_port
from deploy.debug_session import serve_prompt
from deploy.gdb_ports import GdbPorts
from deploy.host_description import describe_host
from deploy.link_orders import link
from deploy.loopback import LOOPBACK
from deploy.migrate import cancel, job_info, migrate, set_parameters
from deploy.operator_protocol import DEBUG, LENGTH, MAX_FRAME_BYTES, Request, Response, frame
from deploy.page_view import page_view
from deploy.recorders import begin_recording, end_recording
from deploy.recovery import recover
from deploy.restart import restart
from deploy.restore import restore
from deploy.snapshot import cancel_snapshot, snapshot, snapshot_info
from deploy.status import gather_status
from deploy.supervise import look_for_changes
from deploy.vm_description import describe_vm
from protocol.decoding import DECODE_ERRORS
from protocol.errors import PefboxError, UserError
from protocol.roles import Role

MAX_QUERY_SECONDS = 60.0
_BACKLOG = 16


class OperatorSocket:
    """Serves orders of this user, and of root, on `launcher.sock`."""

    def __init__(self, run: ClusterRun) -> None:
        self._run = run
        self._gdb_ports = GdbPorts(run)
        self._token = secrets.token_hex(16)
        self._orders: dict[str, Callable[[dict[str, Any]], Awaitable[Any]]] = {
            "status": self._status,
            "activity": self._activity,
            "host": self._host,
            "vm": self._vm,
            "query": self._query,
            "page": self._page,
            "gdb": self._gdb,
            "restart": self._restart,
            "migrate": self._migrate,
            "migrate-cancel": self._migrate_cancel,
            "migrate-set": self._migrate_set,
            "can-migrate": self._can_migrate,
            "jobinfo": self._job_info,
            "recover": self._recover,
            "snapshot": self._snapshot,
            "snapshot-cancel": self._snapshot_cancel,
            "snapshot-info": self._snapshot_info,
            "restore": self._restore,
            "link": self._link,
            "debug-port": self._debug_port,
            "break": self._break,
            "break-delete": self._break_delete,
            "breaks": self._breaks,
            "step": self._step,
            "continue": self._continue,
            "signal": self._signal,
            "stop": self._stop,
        }

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and serve until cancelled."""
        self._write_token()
        listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await listening.bind(str(self._run.paths.launcher_socket))
        listening.listen(_BACKLOG)
        task_status.started()
        await trio.serve_listeners(self._serve_one, [trio.SocketListener(listening)])

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        if not self._may_ask(stream):
            await stream.aclose()
            return
        try:
            while (request := await _read_request(stream)) is not None:
                if request.what == DEBUG and self._is_from_operator(request):
                    await self._debug(request.arguments, stream)
                    return
                await stream.send_all(frame(await self._answer(request, stream)))
        except (trio.BrokenResourceError, *DECODE_ERRORS):
            # Whoever sends what is no request, which a confined process can do too, is not answered.
            pass
        finally:
            end_recording(self._run, stream)
            await stream.aclose()

    def _may_ask(self, stream: trio.SocketStream) -> bool:
        """Whether it is this user or root, and no process of the cluster: those have no orders to give."""
        credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", credentials)
        return uid in (0, os.getuid()) and pid not in {child.pid for child in self._run.living()}

    def _write_token(self) -> None:
        fd = os.open(self._run.paths.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(self._token)

    def _is_from_operator(self, request: Request) -> bool:
        return hmac.compare_digest(request.token.encode(), self._token.encode())

    async def _debug(self, arguments: dict[str, Any], stream: trio.SocketStream) -> None:
        """The connection turns into the stream of a session at the prompt (protocol.debugging)."""
        try:
            child = self._child(arguments["target"])
            await serve_prompt(self._run, child, stream, frame(Response({"target": child.target})))
        except (PefboxError, KeyError) as error:
            await stream.send_all(frame(Response(error=str(error))))

    async def _debug_port(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        child = self._child(arguments["target"])
        made = await open_port(self._run, child, int(arguments.get("port", 0)))
        return {"target": child.target, "host": LOOPBACK, "port": made.port}

    async def _answer(self, request: Request, connection: object) -> Response:
        if not self._is_from_operator(request):
            return Response(error="the token does not fit: only who can read the run directory may give orders")
        order = self._orders.get(request.what)
        if request.what == "record":
            # Until the connection ends: so a command that is killed leaves nothing recording.
            order = functools.partial(self._record, connection)
        if order is None:
            return Response(error=f"this launcher knows no order {request.what!r}")
        try:
            return Response(await order(request.arguments))
        except PefboxError as error:
            return Response(error=str(error))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            return Response(error=f"{request.what}: bad arguments: {error}")
        except Exception as error:
            self._run.log.error("an order broke", order=request.what, exc_info=error)
            return Response(error=f"{request.what}: internal error: {error}; launcher.log has more")

    async def _status(self, _arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        return await gather_status(self._run)

    async def _activity(self, _arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        return await gather_activity(self._run)

    async def _record(self, connection: object, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        process = arguments.get("process")
        return await begin_recording(self._run, connection, None if process is None else str(process))

    async def _host(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        return await describe_host(self._run, str(arguments["host"]))

    async def _vm(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        return await describe_vm(self._run, str(arguments["vm"]))

    async def _query(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        seconds = min(float(arguments.get("seconds", 0.5)), MAX_QUERY_SECONDS)
        child = self._child(arguments["target"])
        return await child.query(str(arguments["query"]), dict(arguments.get("arguments", {})), seconds)

    async def _page(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        return await page_view(self._run, str(arguments["vm"]), int(arguments["gpa"]))

    async def _gdb(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        return await self._gdb_ports.open(str(arguments["vm"]), str(arguments["view"]), int(arguments["port"]))

    async def _restart(self, arguments: dict[str, Any]) -> None:
        await restart(self._run, str(arguments["name"]))

    async def _migrate(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        parameters = dict(arguments.get("parameters", {}))
        move = await migrate(self._run, str(arguments["vm"]), str(arguments["host"]), parameters)
        return move.facts()

    async def _migrate_cancel(self, arguments: dict[str, Any]) -> None:
        await cancel(self._run, str(arguments["vm"]))

    async def _migrate_set(self, arguments: dict[str, Any]) -> None:
        await set_parameters(self._run, str(arguments["vm"]), dict(arguments["parameters"]))

    async def _can_migrate(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        return {"reasons": await why_not(self._run, str(arguments["vm"]), str(arguments["host"]))}

    async def _job_info(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        return job_info(self._run, str(arguments["vm"]))

    async def _recover(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        name = str(arguments["vm"])
        return {"vm": name, "host": await recover(self._run, self._run.vm_named(name))}

    async def _snapshot(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        path, force = Path(str(arguments["file"])), bool(arguments.get("force"))
        return (await snapshot(self._run, str(arguments["vm"]), path, force=force)).facts()

    async def _snapshot_cancel(self, arguments: dict[str, Any]) -> None:
        await cancel_snapshot(self._run, str(arguments["vm"]))

    async def _snapshot_info(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        return snapshot_info(self._run, str(arguments["vm"]))

    async def _restore(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        path, ignore_disks = Path(str(arguments["file"])), bool(arguments.get("ignore_disks"))
        return (await restore(self._run, str(arguments["vm"]), path, ignore_disks=ignore_disks)).facts()

    async def _link(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        return await link(self._run, [str(name) for name in arguments["between"]], dict(arguments["changes"]))

    async def _break(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        code, nth = arguments.get("code"), int(arguments.get("nth", 0))
        action = str(arguments.get("action", "stop"))
        row = await breaks_of(self._run).add(str(arguments["text"]), action, None if code is None else str(code), nth)
        return msgspec.to_builtins(row)

    async def _break_delete(self, arguments: dict[str, Any]) -> None:
        breaks, which = breaks_of(self._run), str(arguments["id"])
        if which != "all" and not which.isdigit():
            raise UserError(f'"{which}" is no number of a break; `pefbox break` lists them')
        for number in list(breaks.set_breaks) if which == "all" else [int(which)]:
            await breaks.delete(number)

    async def _breaks(self, _arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        return msgspec.to_builtins(await breaks_of(self._run).shown())

    async def _step(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        return msgspec.to_builtins(await breaks_of(self._run).step(self._vm_or_all(arguments)))

    async def _continue(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        return {"passed": await breaks_of(self._run).go_on(self._vm_or_all(arguments))}

    def _vm_or_all(self, arguments: dict[str, Any]) -> str | None:
        name = arguments.get("vm")
        return None if name is None else self._run.vm_named(str(name)).spec.name

    async def _signal(self, arguments: dict[str, Any]) -> None:
        child = self._child(arguments["target"])
        if not child.is_running:
            raise UserError(f"{child.target} is {child.state.value}")
        child.kill(signal.Signals(int(arguments["signal"])))
        # The next order may ask a process that goes on from here: SIGCHLD waits until that process has run.
        look_for_changes(self._run)

    async def _stop(self, _arguments: dict[str, Any]) -> None:
        self._run.stop_requested.set()

    def _child(self, target: object) -> Child:
        """`vm1/qemu@beta` is the process on that host, `vm1/kvm` the kvm of wherever the VM lives."""
        name, _, host = str(target).partition("@")
        owner, _, role = name.partition("/")
        if owner in self._run.vms and role in (Role.KVM.value, Role.ULTRAVISOR.value):
            name = f"{self._run.vms[owner].spec.host}/{role}"
        child = self._run.at(name, host) if host else self._run.children.get(name)
        if child is None:
            raise UserError(f"no process {target!r}; there are: {', '.join(self._run.children)}")
        return child


async def _read_request(stream: trio.SocketStream) -> Request | None:
    header = await _read_exactly(stream, LENGTH.size)
    if header is None:
        return None
    (n_bytes,) = LENGTH.unpack(header)
    if n_bytes > MAX_FRAME_BYTES:
        return None
    data = await _read_exactly(stream, n_bytes)
    return None if data is None else msgspec.msgpack.decode(data, type=Request)


async def _read_exactly(stream: trio.SocketStream, n_bytes: int) -> bytes | None:
    data = bytearray()
    while len(data) < n_bytes:
        piece = await stream.receive_some(n_bytes - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)
