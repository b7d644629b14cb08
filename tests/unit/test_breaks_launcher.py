"""The launcher's side of breaks: which VMs stand still for a kept message, and when they run again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from deploy.breaks import Breaks
from deploy.cluster_run import ClusterRun
from deploy.plan import ProcessPlan
from protocol.control import BreakHit
from protocol.errors import PeerGone, UserError
from protocol.roles import Role
from tests.unit.link_rig import LOG

HOSTS = {"vm1": "alpha", "vm2": "alpha", "vm3": "beta"}


class PlayedChild:
    """A process; a qemu is running or paused."""

    def __init__(self, role: Role, host: str, vm: str | None = None) -> None:
        self.plan = ProcessPlan(role, host, vm)
        self.target = self.plan.target
        self.kept_messages = 0
        self.detail = self.settled_detail = ""
        self.is_running = True
        self.held = False
        self.runs = True
        self.obeys = trio.Event()
        """An order to stop is answered from then on."""
        self.obeys.set()
        self.asked: list[str] = []

    async def query(self, what: str, arguments: dict[str, Any], _seconds: float) -> Any:  # noqa: ANN401
        """As Child.query."""
        await trio.lowlevel.checkpoint()
        self.asked.append(what)
        if self.held:
            raise PeerGone(self.target, "debugged")
        if what == "run.stop":
            await self.obeys.wait()
            was, self.runs = self.runs, False
            return {"stopped": was}
        if what == "run.cont":
            self.runs = True
        return {"1": 2} if what == "break.counts" else {}


class Rig:
    """Two hosts, three VMs."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.children = {
            child.target: child
            for child in (
                *(PlayedChild(role, host) for host in ("alpha", "beta") for role in (Role.ULTRAVISOR, Role.KVM)),
                *(PlayedChild(Role.QEMU, host, vm) for vm, host in HOSTS.items()),
            )
        }
        run = SimpleNamespace(
            options=SimpleNamespace(debug=True),
            vms={vm: SimpleNamespace(spec=SimpleNamespace(host=host)) for vm, host in HOSTS.items()},
            living=lambda: list(self.children.values()),
            is_debuggable=lambda plan: True,
            child=lambda owner, role: self.children.get(f"{owner}/{role.value}"),
            peers_of=lambda child: [],
            following_waits=True,
            log=LOG,
            report=lambda text, **facts: None,
            nursery=nursery,
        )
        self.breaks = Breaks(cast(ClusterRun, run))

    async def hit(self, process: str, vm: str | None, number: int = 1, message: int = 1) -> None:
        """A process keeps a message; returns when what follows from that is done."""
        self.breaks.hit(cast(Any, self.children[process]), BreakHit(number, message, vm, "text"))
        await trio.testing.wait_all_tasks_blocked()

    def paused(self) -> set[str]:
        return {vm for vm in HOSTS if not self.children[f"{vm}/qemu"].runs}


@asynccontextmanager
async def rigged() -> AsyncIterator[Rig]:
    async with trio.open_nursery() as nursery:
        yield Rig(nursery)


async def test_a_stop_is_of_the_vm_and_ends_with_continue() -> None:
    async with rigged() as rig:
        await rig.breaks.add("ucall UV_PAGE_OUT", "stop", None, 0)
        await rig.hit("alpha/ultravisor", "vm1")
        assert rig.paused() == {"vm1"}
        await rig.breaks.step(None)
        assert rig.paused() == {"vm1"}
        await rig.hit("beta/ultravisor", "vm3", message=2)
        assert rig.paused() == {"vm1", "vm3"}
        assert await rig.breaks.go_on("vm1") == 0
        assert rig.paused() == {"vm3"}
        assert await rig.breaks.go_on(None) == 1
        assert rig.paused() == set()


async def test_a_stop_of_the_cluster_holds_every_vm_until_nothing_is_kept() -> None:
    async with rigged() as rig:
        await rig.breaks.add("any", "stop-cluster", None, 0)
        await rig.hit("alpha/kvm", "vm1")
        await rig.hit("alpha/kvm", "vm2", message=2)
        assert rig.paused() == set(HOSTS)
        await rig.breaks.go_on("vm1")
        assert rig.paused() == set(HOSTS)
        await rig.breaks.delete(1)
        assert rig.paused() == set()
        assert rig.breaks.kept == []


async def test_a_message_of_no_vm_stops_those_of_its_host() -> None:
    async with rigged() as rig:
        await rig.breaks.add("any", "stop", None, 0)
        await rig.hit("alpha/kvm", "vm9")
        assert rig.paused() == {"vm1", "vm2"}


async def test_a_vm_that_its_user_has_paused_stays_so() -> None:
    async with rigged() as rig:
        rig.children["vm1/qemu"].runs = False
        await rig.breaks.add("any", "stop", None, 0)
        await rig.hit("alpha/kvm", "vm1")
        await rig.breaks.go_on(None)
        assert rig.paused() == {"vm1"}


async def test_a_vm_that_its_user_has_paused_stays_so_when_all_goes_on_before_the_stop_is_answered() -> None:
    async with rigged() as rig:
        qemu = rig.children["vm1/qemu"]
        qemu.runs, qemu.obeys = False, trio.Event()
        await rig.breaks.add("any", "stop", None, 0)
        await rig.hit("alpha/kvm", "vm1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.breaks.go_on, None)
            await trio.testing.wait_all_tasks_blocked()
            assert rig.breaks.kept == []
            qemu.obeys.set()
        assert "run.stop" in qemu.asked
        assert rig.paused() == {"vm1"}


async def test_a_vm_whose_messages_went_on_before_its_stop_is_answered_runs() -> None:
    async with rigged() as rig:
        qemu = rig.children["vm1/qemu"]
        qemu.obeys = trio.Event()
        await rig.breaks.add("any", "stop", None, 0)
        await rig.hit("alpha/kvm", "vm1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.breaks.go_on, None)
            await trio.testing.wait_all_tasks_blocked()
            qemu.obeys.set()
        assert qemu.asked[-2:] == ["run.stop", "run.cont"]
        assert rig.paused() == set()


async def test_a_held_process_keeps_its_message_and_its_break_and_says_so() -> None:
    async with rigged() as rig:
        await rig.breaks.add("ucall UV_PAGE_OUT", "stop", None, 0)
        await rig.hit("alpha/ultravisor", "vm1")
        rig.children["alpha/ultravisor"].held = True
        with pytest.raises(UserError, match="message 1 does not pass: alpha/ultravisor is debugged"):
            await rig.breaks.step("vm1")
        with pytest.raises(UserError, match="break 1 is still set: alpha/ultravisor is debugged"):
            await rig.breaks.delete(1)
        with pytest.raises(UserError, match="cannot note it"):
            await rig.breaks.add("ucall UV_PAGE_OUT", "stop", None, 0)
        assert len(rig.breaks.kept) == 1
        assert [row.counts["alpha/ultravisor"] for row in (await rig.breaks.shown()).breaks] == [None]


async def test_what_a_process_kept_is_gone_with_it() -> None:
    async with rigged() as rig:
        await rig.breaks.add("any", "stop", None, 0)
        await rig.hit("alpha/kvm", "vm1")
        rig.breaks.ended(cast(Any, rig.children["alpha/kvm"]))
        assert rig.breaks.kept == []
        assert rig.children["alpha/kvm"].kept_messages == 0


async def test_s5_a_process_cannot_make_hits_of_nothing() -> None:
    async with rigged() as rig:
        await rig.hit("alpha/kvm", "vm1", number=7)
        await rig.breaks.add("any", "count", None, 0)
        await rig.hit("alpha/kvm", "vm1")
        assert rig.breaks.kept == []
        await rig.breaks.add("any", "stop", None, 0)
        for message in range(300):
            await rig.hit("alpha/kvm", "vm1", number=2, message=message)
        assert len(rig.breaks.kept) == 256
