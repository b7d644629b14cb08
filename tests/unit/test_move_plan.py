"""A VM on its way, as the launcher plans it: two processes of one name, told apart by their hosts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy import plan
from deploy.child import Child
from deploy.cluster_file import Cluster, parse_cluster
from deploy.cluster_run import ClusterRun, LaunchOptions, VmRecord
from deploy.gifts import receivers
from deploy.manifest import Manifest
from deploy.migration_record import MAX_FACTS, Migration, Phase, cleaned
from deploy.plan import ConfigFrame, End, KeyRing, ProcessPlan
from deploy.run_dirs import Paths
from deploy.sides import Side, side_of, vm_hosts
from deploy.start import entry_of, is_incoming
from protocol import control
from protocol.roles import Role
from protocol.vm_state import VmState
from services.runtime.log import Log

PATHS = Paths(Path("/run/user/1000/pefbox/c"), Path("/home/u/.local/state/pefbox/c"))
TEXT = """
[networks.lan]
[hosts.alpha]
secure_memory = "64M"
[hosts.beta]
secure_memory = "64M"
[vms.vm1]
host = "alpha"
memory = "64M"
guest.boot = "kernel"
[[vms.vm1.devices]]
kind = "virtio-net"
network = "lan"
[vms.vm2]
host = "beta"
memory = "64M"
guest.boot = "kernel"
[[vms.vm2.devices]]
kind = "virtio-net"
network = "lan"
"""
HERE = ProcessPlan(Role.QEMU, "alpha", "vm1")
THERE = ProcessPlan(Role.QEMU, "beta", "vm1", move=2)


def make_cluster() -> Cluster:
    return parse_cluster(TEXT, "c.toml", Path("/base"), "c")


def make_run() -> ClusterRun:
    return ClusterRun(make_cluster(), PATHS, LaunchOptions(), cast(Manifest, None), cast(Log, None))


def moving(run: ClusterRun, phase: Phase = Phase.MOVING) -> VmRecord:
    """vm1 in its first incarnation, on its way from alpha to beta."""
    vm = run.vms["vm1"]
    vm.begin("first-segment")
    vm.migration = Migration("vm1", "alpha", "beta", vm.next_incarnation(), secure=False, phase=phase)
    vm.migration.segment = "second-segment"
    return vm


class FakeChild:
    """As much of a Child as is asked for who it is."""

    def __init__(self, process: ProcessPlan) -> None:
        self.plan, self.target, self.is_running, self.peers = process, process.target, True, set[str]()


def child(process: ProcessPlan) -> Child:
    return cast(Child, FakeChild(process))


def started(run: ClusterRun) -> dict[str, Child]:
    """Every process, and those of vm1 on beta as incoming ones, by `target@host`."""
    processes = plan.cluster_processes(run.cluster)
    run.children = {process.target: child(process) for process in processes}
    arriving = [ProcessPlan(role, "beta", "vm1", 2) for role in (Role.QEMU, Role.GUEST)]
    run.incoming = {process.target: child(process) for process in arriving}
    every = (*run.children.values(), *run.incoming.values())
    return {f"{it.target}@{it.plan.host}": it for it in every}


def test_the_ends_of_the_link_between_two_qemus_of_one_name_have_keys_of_their_own() -> None:
    links = [*plan.vm_links(PATHS, "beta", "vm1", 2), plan.migration_link(PATHS, "alpha", THERE)]
    pairs = {(link.id, end): (f"pub {link.id} {end.value}", f"sec {end.value}") for link in links for end in End}
    ring = KeyRing(links, pairs)

    (source,) = ring.entries(HERE)
    destination = next(entry for entry in ring.entries(THERE) if entry.id == source.id)

    assert (source.id, source.kind) == ("vm1:qemu-migration.2", "qemu-migration")
    assert (source.peer, source.vm, source.binds) == ("vm1/qemu", "vm1", False)
    assert (destination.peer, destination.vm, destination.binds) == ("vm1/qemu", "vm1", True)
    assert source.endpoint == destination.endpoint
    assert source.endpoint.startswith(f"ipc://{PATHS.process_dir(THERE.place)}/")
    assert source.peer_public_key == ring_public(ring, THERE, source.id) == f"pub {source.id} upper"
    assert destination.peer_public_key == ring_public(ring, HERE, source.id) == f"pub {source.id} lower"
    assert [key.link for key in ring.keys(HERE).links] == [source.id]
    assert {key.link for key in ring.keys(THERE).links} == {source.id, "vm1:kvm-qemu.2"}


def ring_public(ring: KeyRing, process: ProcessPlan, link: str) -> str:
    return next(key.public_key for key in ring.keys(process).links if key.link == link)


def test_a_process_that_arrives_has_its_name_and_its_logs_and_no_directory_in_common_with_the_other() -> None:
    assert HERE.target == THERE.target == HERE.place == "vm1/qemu"
    assert PATHS.process_dir(THERE.place).name == "vm1.qemu.2"
    assert set(plan.monitor_sockets(PATHS, HERE)).isdisjoint(plan.monitor_sockets(PATHS, THERE))
    user, own = plan.monitor_sockets(PATHS, THERE)
    assert user is not None
    assert plan.own_monitor(user) == own


def test_a_process_that_arrives_is_told_of_the_vm_though_the_cluster_says_that_it_is_elsewhere() -> None:
    run = make_run()
    moving(run)
    frame = ConfigFrame(run.cluster, PATHS, False, False)

    entry = entry_of(run, "vm1", "beta")
    config = plan.process_config(frame, THERE, [entry], [])

    assert [vm.name for vm in plan.vms_known_to(THERE, run.cluster)] == ["vm1"]
    assert (entry.incarnation, entry.ram_segment, entry.incoming) == (2, "second-segment", True)
    assert (config.host, config.target, config.run_dir) == ("beta", "vm1/qemu", str(PATHS.process_dir("vm1/qemu.2")))
    assert config.descriptors == plan.descriptors(HERE, run.cluster)
    assert config.log_file == str(PATHS.log_file("vm1/qemu"))
    here = entry_of(run, "vm1", "alpha")
    assert (here.incarnation, here.ram_segment, here.incoming) == (1, "first-segment", False)
    assert (is_incoming(run, THERE), is_incoming(run, HERE)) == (True, False)


def test_a_gift_stays_on_the_giver_s_host() -> None:
    vm = moving(make_run())

    for host in ("alpha", "beta"):
        packet = control.Give("host-view", "vm1")
        assert receivers(ProcessPlan(Role.KVM, host), packet, vm_hosts(vm)) == ["vm1/qemu"]
        guest = ProcessPlan(Role.GUEST, host, "vm1")
        assert receivers(guest, control.Give("guest-dirty-map", "vm1"), vm_hosts(vm)) == [f"{host}/kvm"]


OPEN = (Phase.STARTING, Phase.MOVING, Phase.IN_DOUBT)


@pytest.mark.parametrize("phase", [*OPEN, Phase.UNDOING])
def test_each_side_speaks_for_itself_until_the_move_is_over(phase: Phase) -> None:
    run = make_run()
    vm, children = moving(run, phase), started(run)

    for target in ("vm1/qemu@alpha", "vm1/guest@alpha", "alpha/kvm@alpha", "alpha/ultravisor@alpha"):
        assert side_of(run, vm, children[target]) is Side.HOME
    for target in ("vm1/qemu@beta", "vm1/guest@beta", "beta/kvm@beta", "beta/ultravisor@beta"):
        assert side_of(run, vm, children[target]) is (Side.ARRIVAL if phase in OPEN else Side.OVER)
    assert side_of(run, vm, children["vm2/qemu@beta"]) is None
    assert side_of(run, run.vms["vm2"], children["alpha/kvm@alpha"]) is None


def test_when_it_has_settled_its_first_home_has_nothing_more_to_say() -> None:
    run = make_run()
    vm, children = moving(run, Phase.COMMITTING), started(run)
    assert vm.migration is not None

    earlier = run.settle(vm, vm.migration)

    assert earlier == run.dead == [children["vm1/guest@alpha"], children["vm1/qemu@alpha"]]
    assert run.incoming == {}
    assert (vm.spec.host, vm.incarnation, vm.move, vm.segment) == ("beta", 2, 2, "second-segment")
    assert [spec.name for spec in run.cluster.vms_of("beta")] == ["vm1", "vm2"]
    assert run.frame.cluster is run.cluster
    for target in ("vm1/qemu@alpha", "alpha/kvm@alpha"):
        assert side_of(run, vm, children[target]) is Side.OVER
    for target in ("vm1/qemu@beta", "beta/ultravisor@beta"):
        assert side_of(run, vm, children[target]) is Side.HOME
    vm.migration = None
    assert side_of(run, vm, children["alpha/kvm@alpha"]) is None


def test_news_of_a_process_go_to_the_peers_of_its_own_side() -> None:
    run = make_run()
    moving(run)
    children = started(run)
    children["vm1/qemu@alpha"].peers = {"alpha/kvm", "vm2/qemu", "vm1/qemu"}
    children["vm1/qemu@beta"].peers = {"beta/kvm", "vm1/qemu"}
    children["beta/kvm@beta"].peers = {"vm1/qemu", "vm2/qemu", "beta/ultravisor"}
    children["vm2/qemu@beta"].peers = {"beta/kvm", "vm1/qemu"}

    def told(of: str) -> set[str]:
        return {f"{peer.target}@{peer.plan.host}" for peer in run.peers_of(children[of])}

    assert told("vm1/qemu@alpha") == {"alpha/kvm@alpha", "vm2/qemu@beta", "vm1/qemu@beta"}
    assert told("vm1/qemu@beta") == {"beta/kvm@beta", "vm1/qemu@alpha"}
    assert told("beta/kvm@beta") == {"vm1/qemu@beta", "vm2/qemu@beta", "beta/ultravisor@beta"}
    # A network's link is with the VM where it lives.
    assert told("vm2/qemu@beta") == {"beta/kvm@beta", "vm1/qemu@alpha"}


def test_links_of_a_network_lead_to_where_its_vms_have_moved() -> None:
    cluster = make_cluster()

    (link,) = plan.network_links(PATHS, cluster, {"vm1": 3, "vm2": 1}, {"vm1": 3})

    assert link.directory == PATHS.process_dir("vm1/qemu.3") / "n0.2.3.1"
    assert link.hosts == ("alpha", "beta")


def test_an_incarnation_that_came_to_nothing_is_not_given_out_again() -> None:
    vm = moving(make_run())
    vm.migration = None

    vm.begin("third-segment")

    assert vm.incarnation == 3


def test_the_state_of_a_vm_in_doubt_is_not_what_one_side_says() -> None:
    vm = moving(make_run(), Phase.IN_DOUBT)

    assert not vm.change(VmState.RUNNING)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=5), json_like, max_size=80))
def test_what_a_qemu_says_of_a_migration_is_kept_only_as_far_as_everybody_can_read_it(answer: dict[str, Any]) -> None:
    move = Migration("vm1", "alpha", "beta", 2, secure=False)
    move.note(answer)

    facts = move.facts()

    assert msgspec.json.decode(msgspec.json.encode(facts), type=type(facts)) == facts
    assert len(facts.progress) <= MAX_FACTS
    assert facts.status.isprintable()
    assert facts.reason.isprintable()


def test_tables_of_facts_are_kept_one_deep() -> None:
    assert cleaned({"ram": {"normal": 3, "more": {"no": 1}}, "list": [1], "bad": math.nan}) == {"ram": {"normal": 3}}
