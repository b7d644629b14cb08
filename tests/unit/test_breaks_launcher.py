"""The launcher's side of breaks: which VMs stand still for a kept message, and when they run again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from deploy.breaks import Breaks
from deploy.child import QueryRefused
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
        self.refuses = ""
        self.obeys_set: trio.Event | None = None
        self.runs = True
        self.obeys = trio.Event()
        """An order to stop is answered from then on."""
        self.obeys.set()
        self.asked: list[str] = []
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}

    async def query(self, what: str, arguments: dict[str, Any], _seconds: float) -> Any:  # noqa: ANN401
        """As Child.query."""
        await trio.lowlevel.checkpoint()
        self.asked.append(what)
        if what == "break.set" and self.obeys_set is not None:
            await self.obeys_set.wait()
        if self.held:
            raise PeerGone(self.target, "debugged")
        if self.refuses:
            raise QueryRefused(self.refuses)
        if what in self.answers:
            return self.answers[what]
        if what == "run.stop":
            await self.obeys.wait()
            was, self.runs = self.runs, False
            return {"stopped": was}
        if what == "run.cont":
            self.runs = True
        return {"1": 2} if what == "break.counts" else {}

    def tell(self, what: str, arguments: dict[str, Any]) -> None:
        """As Child.tell."""
        self.told.append((what, arguments))


class Rig:
    """Two hosts, three VMs."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.children = {
            child.target: child
            for child in (
                *(PlayedChild(role, host) for host in ("alpha", "beta") for role in (Role.ULTRAVISOR, Role.KVM)),
                *(PlayedChild(role, host, vm) for vm, host in HOSTS.items() for role in (Role.QEMU, Role.GUEST)),
            )
        }
        run = SimpleNamespace(
            options=SimpleNamespace(debug=True),
            vms={vm: SimpleNamespace(spec=SimpleNamespace(host=host), migration=None) for vm, host in HOSTS.items()},
            incoming={},
            living=lambda: list(self.children.values()),
            is_debuggable=lambda plan: plan.role is not Role.GUEST,
            child=lambda owner, role: self.children.get(f"{owner}/{role.value}"),
            peers_of=lambda child: [],
            following_waits=True,
            log=LOG,
            report=lambda text, **facts: None,
            nursery=nursery,
        )
        self.run = run
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


async def test_s5_a_process_cannot_stop_what_it_has_nothing_to_do_with() -> None:
    async with rigged() as rig:
        await rig.breaks.add("ucall UV_PAGE_OUT", "stop", None, 0)
        await rig.breaks.add("any", "stop", None, 0)
        for process, vm, number in (
            ("vm3/qemu", "vm3", 1),  # receives no ultracall
            ("vm3/qemu", "vm1", 2),  # belongs to another VM
            ("beta/ultravisor", "vm1", 1),  # of another host
            ("vm1/guest", "vm1", 2),  # is not debuggable
        ):
            await rig.hit(process, vm, number)
            assert rig.breaks.kept == [], process
            assert rig.children[process].told.pop() == ("break.release", {"message": 1})
        assert rig.paused() == set()
        assert all(child.kept_messages == 0 for child in rig.children.values())


@pytest.mark.parametrize("answer", [None, [], 7, "stopped", {"stopped": None}, {"stopped": "no"}])
async def test_s5_a_qemu_that_answers_anything_to_the_order_to_stop_is_ordered_to_go_on(answer: object) -> None:
    async with rigged() as rig:
        rig.children["vm1/qemu"].answers["run.stop"] = answer
        await rig.breaks.add("any", "stop", None, 0)
        await rig.hit("alpha/kvm", "vm1")
        await rig.breaks.go_on(None)
        assert rig.children["vm1/qemu"].asked[-1] == "run.cont"


async def test_s5_an_answer_cannot_write_on_the_operators_terminal() -> None:
    async with rigged() as rig:
        await rig.breaks.add("any", "stop", None, 0)
        await rig.hit("alpha/kvm", "vm1")
        rig.children["alpha/kvm"].refuses = "no\x1b[2J"
        with pytest.raises(UserError) as refused:
            await rig.breaks.step(None)
        assert str(refused.value) == "message 1 does not pass: no?[2J"


async def test_of_a_break_that_could_not_be_set_everywhere_nothing_is_left() -> None:
    """Not where it was set and has been met already, nor where it stands in the queue of one that stands still."""
    async with rigged() as rig:
        beta = rig.children["beta/ultravisor"]
        beta.obeys_set = trio.Event()
        async with trio.open_nursery() as nursery:

            async def add() -> None:
                with pytest.raises(UserError, match="beta/ultravisor is debugged"):
                    await rig.breaks.add("ucall UV_PAGE_OUT", "stop", None, 0)

            nursery.start_soon(add)
            await trio.testing.wait_all_tasks_blocked()
            await rig.hit("alpha/ultravisor", "vm1")
            assert rig.paused() == {"vm1"}
            beta.held = True
            beta.obeys_set.set()
        assert rig.breaks.kept == []
        assert rig.paused() == set()
        for host in ("alpha", "beta"):
            assert rig.children[f"{host}/ultravisor"].told == [("break.delete", {"id": 1})]


async def test_a_break_is_deleted_although_a_process_that_never_had_it_is_held() -> None:
    async with rigged() as rig:
        await rig.breaks.add("ucall UV_PAGE_OUT", "stop", None, 0)
        await rig.hit("alpha/ultravisor", "vm1")
        rig.children["vm2/qemu"].held = True
        await rig.breaks.delete(1)
        assert rig.breaks.set_breaks == {}
        assert rig.paused() == set()


async def test_what_was_let_go_by_a_break_that_is_half_deleted_is_not_listed() -> None:
    async with rigged() as rig:
        await rig.breaks.add("ucall UV_PAGE_OUT", "stop", None, 0)
        await rig.hit("alpha/ultravisor", "vm1")
        await rig.hit("beta/ultravisor", "vm3")
        rig.children["beta/ultravisor"].held = True
        with pytest.raises(UserError, match="break 1 is still set: beta/ultravisor is debugged"):
            await rig.breaks.delete(1)
        assert [kept.row.process for kept in rig.breaks.kept] == ["beta/ultravisor"]
        assert rig.paused() == {"vm3"}


async def test_a_break_that_two_delete_at_once_is_gone() -> None:
    async with rigged() as rig:
        await rig.breaks.add("ucall UV_PAGE_OUT", "stop", None, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.breaks.delete, 1)
            nursery.start_soon(rig.breaks.delete, 1)
        assert rig.breaks.set_breaks == {}


async def test_a_vm_whose_keeper_died_with_the_message_runs_again() -> None:
    async with rigged() as rig:
        await rig.breaks.add("any", "stop", None, 0)
        await rig.hit("alpha/kvm", "vm1")
        rig.breaks.ended(cast(Any, rig.children["alpha/kvm"]))
        await trio.testing.wait_all_tasks_blocked()
        assert rig.paused() == set()


async def test_a_vm_that_arrives_stopped_by_a_break_goes_on_with_continue() -> None:
    async with rigged() as rig:
        await rig.breaks.add("any", "stop", None, 0)
        await rig.hit("alpha/kvm", "vm1")
        await rig.breaks.step(None)
        arriving = PlayedChild(Role.QEMU, "beta", "vm1")
        arriving.runs = False
        rig.run.incoming["vm1/qemu"] = arriving
        rig.breaks.started(cast(Any, arriving))
        rig.run.incoming.clear()
        rig.children["vm1/qemu"] = arriving
        await rig.breaks.go_on("vm1")
        assert arriving.runs


async def test_a_message_of_no_vm_passes_with_continue_of_a_vm_that_it_stops() -> None:
    async with rigged() as rig:
        await rig.breaks.add("any", "stop", None, 0)
        await rig.hit("alpha/kvm", "vm9")
        assert await rig.breaks.go_on("vm3") == 0
        assert await rig.breaks.go_on("vm2") == 1
        assert rig.paused() == set()
