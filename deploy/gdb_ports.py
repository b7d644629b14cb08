"""Ports on which GDB finds a VM: the launcher listens, and hands each connection to the process that serves it.

So a port outlives restarts and migrations of its VM, no confined process needs the network, and a connection of another
user of the machine goes nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import trio

from deploy.child import Child, QueryRefused
from deploy.cluster_run import ClusterRun, VmRecord
from deploy.loopback import LOOPBACK, is_own, listen
from protocol import control
from protocol.errors import PeerGone, UserError
from protocol.roles import Role

_BACKLOG = 4
_ORDER_SECONDS = 1.0


class View(StrEnum):
    """Whose eyes GDB has: what qemu may see of the VM, or all that its processor does."""

    HOST = "host"
    OWNER = "owner"

    @property
    def role(self) -> Role:
        """The process that serves it."""
        return Role.QEMU if self is View.HOST else Role.GUEST


@dataclass(frozen=True, slots=True)
class _Place:
    vm: str
    view: View


class GdbPorts:
    """Of one cluster."""

    def __init__(self, run: ClusterRun) -> None:
        self._run = run
        self._ports: dict[_Place, int] = {}

    async def open(self, vm_name: str, view_name: str, port: int) -> dict[str, Any]:
        """A port for GDB, `port` 0 for any: its number, and the processor's byte order where that is known.

        A view that has a port already keeps it. Raises UserError.
        """
        vm = self._run.vm_named(vm_name)
        view = _view_of(view_name)
        _refuse_undebuggable(vm, view)
        order = await self._order(self._server(vm_name, view))
        place = _Place(vm_name, view)
        opened = self._ports.get(place) or self._listen(place, port)
        if port in (0, opened):
            return {"vm": vm_name, "view": view.value, "host": LOOPBACK, "port": opened, "order": order}
        raise UserError(f"the {view}'s view of {vm_name} has port {opened} already")

    def _server(self, vm: str, view: View) -> Child:
        child = self._run.child(vm, view.role)
        if child is None or not child.state.answers:
            state = "missing" if child is None else child.state.value
            raise UserError(f"{vm}/{view.role.value} is {state}: the {view}'s view of {vm} comes from it")
        return child

    async def _order(self, server: Child) -> str | None:
        try:
            answer = await server.query("gdb.order", {}, _ORDER_SECONDS)
        except PeerGone:
            # Slow, or on its way out: GDB will see.
            return None
        except QueryRefused as refused:
            raise UserError(str(refused)) from None
        order = answer.get("order")
        return order if order in ("big", "little") else None

    def _listen(self, place: _Place, port: int) -> int:
        listening = listen(port, _BACKLOG)
        opened = self._ports[place] = int(listening.getsockname()[1])
        self._run.nursery.start_soon(self._serve, place, trio.SocketListener(trio.socket.from_stdlib_socket(listening)))
        return opened

    async def _serve(self, place: _Place, listener: trio.SocketListener) -> None:
        async def take(stream: trio.SocketStream) -> None:
            try:
                self._hand_over(place, stream)
            finally:
                await trio.aclose_forcefully(stream)

        try:
            await trio.serve_listeners(take, [listener])
        finally:
            self._ports.pop(place, None)

    def _hand_over(self, place: _Place, stream: trio.SocketStream) -> None:
        """Give the connection to whoever serves the VM now; one that nobody takes is closed."""
        try:
            if not is_own(stream.socket.getsockname(), stream.socket.getpeername()):
                self._run.log.warning("debugger refused: another user's", vm=place.vm, view=place.view.value)
                return
            server = self._server(place.vm, place.view)
            server.channel.send(control.Gift(control.GDB_TAG, place.vm, Role.LAUNCHER.value), [stream.socket.fileno()])
        except (PeerGone, UserError, OSError) as error:
            self._run.log.warning("debugger refused", vm=place.vm, view=place.view.value, reason=str(error))


def _view_of(name: str) -> View:
    try:
        return View(name)
    except ValueError:
        raise UserError(f'no view "{name}"; there are: {", ".join(View)}') from None


def _refuse_undebuggable(vm: VmRecord, view: View) -> None:
    if view is View.OWNER and not vm.spec.debuggable:
        raise UserError(
            f"{vm.spec.name} is not debuggable, so that nobody reads its memory and registers: set `debuggable = true` "
            "at the VM in the cluster file and start it anew, or look with the host's eyes: --view host"
        )
