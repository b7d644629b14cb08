"""A processor under a debugger: it stands still and serves everybody, steps, stops at points, and is let go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from protocol import hcalls as h
from protocol import messages as m
from protocol.codes import HCode
from services.guest.debugger import User
from services.guest.exits import Crash, Hypercall, Idle
from services.guest.run_state import Hold, Life, RunState
from services.runtime.gdb.target import Point, PointKind, Refused, StopKind
from shared.gdb_registers import MODEL, POWER
from shared.partition_map import MapKind, PartitionMap
from tests.unit.machine_rig import ENTRY
from tests.unit.owner_rig import Owner, put
from tests.unit.power_asm import addi, b, li, load64, program, std
from tests.unit.test_processor_migration import Rig, eventually, machine, model, played, rig_of

DATA = 0x20000
LOOP = (li(4, 1), addi(4, 4, 1), b(-1))
H_IPOLL = h.H_IPOLL.number
SC_1 = 0x44000022
SECONDS = 5.0


@pytest.fixture
def rig() -> Iterator[Rig]:
    with rig_of(machine, kernel="machine") as rig:
        put(rig, *LOOP)
        yield rig


# -- standing still ---------------------------------------------------------------------------------------------------


def test_an_attached_debugger_has_the_processor_stand_and_its_time_with_it(rig: Rig) -> None:
    rig.start()
    owner = Owner(rig)

    assert owner.attach().kind is StopKind.INTERRUPT
    before = owner.register("r4"), rig.clock.now_ns()

    assert rig.is_in(RunState.STOPPED)
    assert (owner.register("r4"), rig.clock.now_ns()) == before


def test_everybody_is_served_while_a_debugger_holds_the_processor(rig: Rig) -> None:
    rig.start()
    Owner(rig).attach()

    assert rig.kvm.ask(m.MAP_INVALIDATE, m.InvalidateBody([])) == m.Status()
    assert rig.kvm.ask(m.VCPU_STOP) == m.Status()
    assert rig.kvm.ask(m.VCPU_CONTINUE) == m.Status()
    assert rig.is_in(RunState.STOPPED)


def test_a_debugger_that_goes_leaves_nothing_stopped_and_no_point(rig: Rig) -> None:
    rig.start()
    owner = Owner(rig)
    owner.attach()
    owner.points(Point(PointKind.HARDWARE, ENTRY + 4, 0))

    owner.release()

    assert rig.is_in(RunState.RUNNING)
    before = owner.register("r4")
    eventually(lambda: owner.register("r4") != before)


def test_l1_points_are_set_by_nobody_but_who_debugs(rig: Rig) -> None:
    """The processor would stop there for nobody, again and again."""
    rig.start()
    owner = Owner(rig)
    owner.attach()
    owner.release()

    with pytest.raises(Refused, match="has to debug"):
        owner.points(Point(PointKind.HARDWARE, ENTRY + 4, 0))

    before = owner.register("r4")
    eventually(lambda: owner.register("r4") != before)


def test_what_kvm_has_stopped_stays_so_when_the_debugger_goes(rig: Rig) -> None:
    rig.start()
    rig.kvm.ask(m.VCPU_STOP)
    owner = Owner(rig)
    owner.attach()

    owner.release()

    assert rig.is_in(RunState.STOPPED)


def test_a_debugger_may_come_while_a_call_is_open(rig: Rig) -> None:
    put(rig, li(3, H_IPOLL), SC_1, li(5, 5), b(0))
    rig.kvm.host = lambda _number, _body: None
    rig.start()
    rig.kvm.await_call(H_IPOLL)
    owner = Owner(rig)

    owner.attach()
    assert owner.register("pc") == ENTRY + 8
    owner.go(step=True)
    rig.kvm.answer(H_IPOLL, [HCode.H_SUCCESS, 7])

    assert owner.stopped().kind is StopKind.TRAP
    assert (owner.register("pc"), owner.register("r3"), owner.register("r5")) == (ENTRY + 12, 0, 5)


def test_a_reset_starts_into_the_debugger_that_holds_the_processor(rig: Rig) -> None:
    rig.start()
    owner = Owner(rig)
    owner.attach()
    owner.step()

    rig.start()

    assert owner.stopped().kind is StopKind.INTERRUPT
    assert rig.is_in(RunState.STOPPED)
    assert owner.register("pc") == ENTRY


def test_the_owners_hold_outlives_what_the_vm_is_started_for() -> None:
    life = Life()
    life.holds = {Hold.OWNER, Hold.HYPERVISOR}

    life.become(RunState.RUNNING)

    assert life.holds == {Hold.OWNER}


# -- steps and points -------------------------------------------------------------------------------------------------


def test_steps_and_points(rig: Rig) -> None:
    rig.kvm.ask(m.VCPU_STOP)
    rig.start()
    owner = Owner(rig)
    owner.attach()
    owner.points(Point(PointKind.HARDWARE, ENTRY + 8, 0))
    owner.go()
    owner.stopped()
    first = owner.register("pc"), owner.register("r4")

    owner.go()
    owner.stopped()

    assert first[0] == ENTRY + 8
    assert (owner.register("pc"), owner.register("r4")) == (ENTRY + 8, first[1] + 1)
    owner.step()
    assert owner.register("pc") == ENTRY + 4


def test_a_step_into_a_call_shows_its_outcome(rig: Rig) -> None:
    put(rig, b(0))
    rig.start()
    owner = Owner(rig)
    owner.attach()
    put(rig, li(3, H_IPOLL), SC_1, li(5, 5), b(0))
    owner.do(lambda: owner.debugger.write(ENTRY, program(li(3, H_IPOLL), SC_1)))
    owner.do(lambda: owner.debugger.set_register(POWER.number["pc"], ENTRY))
    rig.kvm.host = lambda number, _body: [HCode.H_SUCCESS, 7] if number == H_IPOLL else [HCode.H_SUCCESS]

    owner.step()
    owner.step()

    assert (owner.register("pc"), owner.register("r3"), owner.register("r4")) == (ENTRY + 8, 0, 7)


def test_a_step_does_not_wait_where_the_guest_would() -> None:
    """PAPR lets a wait end early, and whoever steps an idle guest should not have to know of it."""
    with rig_of(machine, kernel="machine") as rig:
        put(rig, li(3, h.H_CEDE.number), SC_1, b(-2))
        rig.kvm.host = lambda _number, _body: None
        rig.start()
        rig.kvm.await_call(h.H_CEDE.number)
        owner = Owner(rig)
        owner.attach()

        places = []
        for _ in range(4):
            owner.step()
            places.append(owner.register("pc") - ENTRY)

    assert places == [0, 4, 8, 0]


def test_a_watchpoint_tells_which_access(rig: Rig) -> None:
    put(rig, *load64(5, DATA), std(4, 8, 5), b(-1))
    rig.start()
    owner = Owner(rig)
    owner.attach()
    owner.points(Point(PointKind.WRITE, DATA + 8, 8))

    owner.go()

    stop = owner.stopped()
    assert (stop.watch, stop.address) == (PointKind.WRITE, DATA + 8)
    owner.go()
    assert owner.stopped().watch is PointKind.WRITE


def test_a_step_that_was_left_for_a_run_is_not_taken_for_the_next(rig: Rig) -> None:
    put(rig, li(3, H_IPOLL), SC_1, addi(5, 5, 1), b(-1))
    rig.kvm.host = lambda _number, _body: None
    rig.kvm.ask(m.VCPU_STOP)
    rig.start()
    rig.kvm.await_call(H_IPOLL)
    owner = Owner(rig)
    owner.attach()
    owner.points(Point(PointKind.WRITE, DATA, 8))
    owner.go(step=True)
    owner.do(lambda: owner.debugger.halt(User.OWNER))
    owner.stopped()

    owner.go()
    rig.kvm.answer(H_IPOLL, [HCode.H_SUCCESS])
    owner.do(lambda: owner.debugger.halt(User.OWNER))
    owner.stopped()
    before = owner.register("pc")
    owner.step()

    assert owner.register("pc") != before


def test_a_crash_is_told_and_the_registers_stay(rig: Rig) -> None:
    rig.start()
    owner = Owner(rig)
    owner.attach()
    owner.do(lambda: owner.debugger.set_register(POWER.number["pc"], 1 << 50))

    owner.go()

    stop = owner.stopped()
    assert stop.kind is StopKind.CRASHED
    assert "no memory" in stop.text
    assert owner.register("pc") == 1 << 50
    owner.go()
    assert owner.stopped() == stop


def test_a_processor_is_saved_while_a_debugger_holds_it(rig: Rig) -> None:
    rig.start()
    Owner(rig).attach()

    assert rig.kvm.ask(m.VCPU_SAVE).code == HCode.H_SUCCESS


def test_a_processor_that_the_ultravisor_has_frozen_is_looked_at_and_not_changed(rig: Rig) -> None:
    """What is changed then would stay here, while the VM goes on elsewhere."""
    rig.start(secure=True)
    owner = Owner(rig)
    owner.attach()
    before = owner.register("r9")
    rig.save(secure=True)

    for change in (
        lambda: owner.debugger.set_register(POWER.number["r9"], before + 1),
        lambda: owner.debugger.write(DATA, b"data"),
        lambda: owner.debugger.monitor(["spr", "sprg0", "1"]),
    ):
        with pytest.raises(Refused, match="about to move"):
            owner.do(change)
    assert owner.register("r9") == before
    assert owner.do(lambda: owner.debugger.read(ENTRY, 4))

    rig.ultravisor.ask(m.SVM_THAW)
    owner.do(lambda: owner.debugger.set_register(POWER.number["r9"], before + 1))
    assert owner.register("r9") == before + 1


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_that_the_map_does_not_give_is_fetched_and_what_is_none_is_refused(rig: Rig) -> None:
    rig.start()
    owner = Owner(rig)
    owner.attach()
    entries = PartitionMap(rig.maps[MapKind.NORMAL].buffer)
    entries.clear(2)
    rig.kvm.host = lambda number, _body: give(number)

    def give(number: int) -> m.Status:
        assert number == m.MAP_FAULT.number
        entries.set(2, MapKind.NORMAL, 2)
        return m.Status()

    rig.memory.normal[DATA : DATA + 4] = b"data"
    assert owner.do(lambda: owner.debugger.read(DATA, 4)) == b"data"
    owner.do(lambda: owner.debugger.write(DATA, b"DATA"))
    assert bytes(rig.memory.normal[DATA : DATA + 4]) == b"DATA"
    assert rig.memory.dirty.buffer[2] == 1
    with pytest.raises(Refused, match="no memory"):
        owner.do(lambda: owner.debugger.read(1 << 40, 4))


def test_a_page_that_is_away_cannot_be_fetched_while_a_call_is_open(rig: Rig) -> None:
    put(rig, li(3, H_IPOLL), SC_1, b(0))
    rig.kvm.host = lambda _number, _body: None
    rig.start()
    rig.kvm.await_call(H_IPOLL)
    owner = Owner(rig)
    owner.attach()
    PartitionMap(rig.maps[MapKind.NORMAL].buffer).clear(2)

    with pytest.raises(Refused, match="in a call"):
        owner.do(lambda: owner.debugger.read(DATA, 4))


def test_changed_code_is_what_runs(rig: Rig) -> None:
    rig.start()
    owner = Owner(rig)
    owner.attach()

    owner.do(lambda: owner.debugger.write(ENTRY + 4, program(addi(4, 4, 2), b(0))))
    owner.do(lambda: owner.debugger.set_register(POWER.number["pc"], ENTRY))
    owner.step()
    owner.step()

    assert owner.register("r4") == 3


# -- the model kernel -------------------------------------------------------------------------------------------------


def test_the_model_kernel_shows_its_state_and_steps_from_safe_point_to_safe_point() -> None:
    with rig_of(model) as rig:
        rig.kvm.ask(m.VCPU_STOP)
        rig.start()
        owner = Owner(rig)
        owner.attach()
        values = owner.do(owner.debugger.values)

        assert owner.register("phase") >= 10
        assert values.values[MODEL.number["r1"]] is None
        assert rig.engine.at_safe_point or rig.kvm.open
        with pytest.raises(Refused, match="stepi"):
            owner.points(Point(PointKind.HARDWARE, 0, 0))
        with pytest.raises(Refused, match="cannot be changed"):
            owner.do(lambda: owner.debugger.set_register(0, 1))
        assert "phase" in owner.do(lambda: owner.debugger.monitor(["state"]))
        with pytest.raises(Refused, match="commands of the model"):
            owner.do(lambda: owner.debugger.monitor([]))


def test_without_a_debugger_an_engine_runs_as_ever() -> None:
    with rig_of(played(Hypercall(H_IPOLL), Idle(None), Crash("end"))) as rig:
        rig.start()

        eventually(lambda: rig.is_in(RunState.CRASHED))
