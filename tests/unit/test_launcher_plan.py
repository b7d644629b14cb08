"""Plan of a cluster: processes, links, keys and descriptors; preflight findings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from deploy import plan, preflight
from deploy.cluster_file import Cluster, parse_cluster
from deploy.gifts import receivers
from deploy.plan import ConfigFrame, End, KeyRing, ProcessPlan
from deploy.preflight import Machine
from deploy.run_dirs import Paths
from protocol import control
from protocol.errors import UnexpectedMessage, UserError
from protocol.links import LINK_KINDS, QEMU_QEMU
from protocol.roles import Role

PATHS = Paths(Path("/run/user/1000/pefbox/c"), Path("/home/u/.local/state/pefbox/c"))
ROOMY = Machine(shm_free_bytes=1 << 40, memory_available_bytes=1 << 40, open_files_limit=1 << 20)


def make_cluster(n_hosts: int, n_vms: int, disk: str = "/dev/null", n_on_lan: int = 0) -> Cluster:
    """`n_on_lan` is how many of the VMs, the first ones, share a network."""
    text = "[networks.lan]\n"
    text += "".join(f'[hosts.h{i}]\nsecure_memory = "64M"\n' for i in range(n_hosts))
    for i in range(n_vms):
        text += f'[vms.v{i}]\nhost = "h{i % n_hosts}"\nmemory = "64M"\n[vms.v{i}.disks.root]\npath = "{disk}"\n'
        if i < n_on_lan:
            text += f'[[vms.v{i}.devices]]\nkind = "virtio-net"\nnetwork = "lan"\n'
    return parse_cluster(text, "c.toml", Path("/base"), "c")


clusters = st.builds(make_cluster, st.integers(1, 4), st.integers(0, 8), n_on_lan=st.integers(0, 5))


@given(clusters)
def test_every_pair_that_the_protocol_links_has_exactly_one_link(cluster: Cluster) -> None:
    links = plan.cluster_links(cluster, PATHS)
    targets = {process.target for process in plan.cluster_processes(cluster)}

    assert len({link.id for link in links}) == len({link.endpoint for link in links}) == len(links)
    n_on_lan = len(cluster.vms_on("lan"))
    assert len(links) == len(cluster.hosts) + 3 * len(cluster.vms) + math.comb(n_on_lan, 2)
    assert {link.upper for link in links} | {link.lower for link in links} <= targets
    for link in links:
        assert link.upper.endswith(f"/{link.kind.upper.value}")
        assert link.lower.endswith(f"/{link.kind.lower.value}")
        assert link.directory.is_relative_to(PATHS.process_dir(link.upper))


@given(clusters)
def test_keys_of_the_two_ends_match_and_no_secret_is_in_a_configuration(cluster: Cluster) -> None:
    links = plan.cluster_links(cluster, PATHS)
    pairs = {(link.id, end): (f"pub {link.id} {end}", f"sec {link.id} {end}") for link in links for end in End}
    by_id = {link.id: link for link in links}
    ring = KeyRing(links, pairs)

    for process in plan.cluster_processes(cluster):
        entries = ring.entries(process)
        keys = {key.link: key for key in ring.keys(process).links}
        config = plan.process_config(ConfigFrame(cluster, PATHS, False, False), process, [], entries)
        assert set(keys) == {entry.id for entry in entries}
        assert b"sec " not in control.encode(control.Start(config))
        for entry in entries:
            end = by_id[entry.id].end_of(process)
            assert end is not None
            assert by_id[entry.id].target_of(end.other) == entry.peer
            assert entry.peer_public_key == pairs[entry.id, end.other][0]
            assert keys[entry.id].secret_key == pairs[entry.id, end][1]
            assert LINK_KINDS[entry.kind].name == entry.kind
            assert entry.binds == entry.endpoint.startswith(f"ipc://{PATHS.process_dir(process.target)}/")
            assert (entry.network is not None) == (entry.kind == QEMU_QEMU.name)
            assert entry.network is None or entry.vm == process.vm


def test_only_ultravisor_and_guest_hold_the_private_socketpair_and_only_qemu_the_disks() -> None:
    cluster = make_cluster(1, 1)

    names = {process.role: plan.descriptors(process, cluster) for process in plan.cluster_processes(cluster)}

    assert names == {
        Role.ULTRAVISOR: ["log", "trace", "audit", "ledger", "ram:v0", "stream:v0", "secure:v0"],
        Role.KVM: ["log", "trace", "ram:v0", "stream:v0"],
        Role.QEMU: ["log", "trace", "ram:v0", "stream:v0", "disk:root"],
        Role.GUEST: ["log", "trace", "ram:v0", "secure:v0"],
    }


def test_next_incarnation_shares_no_name_and_no_path_with_the_last() -> None:
    first, second = (plan.vm_links(PATHS, "h0", "v0", incarnation) for incarnation in (1, 2))

    assert {link.id for link in first}.isdisjoint(link.id for link in second)
    assert {link.endpoint for link in first}.isdisjoint(link.endpoint for link in second)


def test_debugger_enters_a_guest_only_where_its_vm_says_so() -> None:
    cluster = make_cluster(1, 1)
    guest, kvm = ProcessPlan(Role.GUEST, "h0", "v0"), ProcessPlan(Role.KVM, "h0")

    closed, opened = ConfigFrame(cluster, PATHS, False, False), ConfigFrame(cluster, PATHS, False, True)
    named = ConfigFrame(cluster, PATHS, False, False, frozenset({kvm.target}))
    assert not plan.is_debuggable(guest, opened)
    assert plan.is_debuggable(kvm, opened)
    assert not plan.is_debuggable(kvm, closed)
    assert plan.is_debuggable(kvm, named)


def test_descriptor_goes_only_where_the_protocol_says() -> None:
    kvm, guest = ProcessPlan(Role.KVM, "h0"), ProcessPlan(Role.GUEST, "h0", "v0")
    qemu = ProcessPlan(Role.QEMU, "h0", "v0")

    assert receivers(kvm, control.Give("host-view", "v0"), ["h0"]) == ["v0/qemu"]
    assert receivers(kvm, control.Give("tce-table:0x80000000", "v0"), ["h0"]) == ["v0/qemu"]
    assert receivers(guest, control.Give("guest-dirty-map", "v0"), ["h0"]) == ["h0/kvm"]
    assert receivers(qemu, control.Give("device-writes", "v0"), ["h0"]) == ["v0/guest"]
    refused = [
        (guest, "host-view", "v0", ["h0"]),
        (kvm, "secure-memory", "v0", ["h0"]),
        (kvm, "host-view", "v1", ["h1"]),
        (kvm, "host-view", "v9", []),
        (guest, "guest-dirty-map", "v1", ["h0"]),
    ]
    for giver, tag, vm, hosts in refused:
        with pytest.raises(UnexpectedMessage):
            receivers(giver, control.Give(tag, vm), hosts)


def test_cluster_that_fits_has_no_findings() -> None:
    preflight.check(make_cluster(2, 0), PATHS, ROOMY)


def test_all_findings_come_at_once() -> None:
    cluster = make_cluster(1, 2, disk="/nowhere.img")
    poor = Machine(shm_free_bytes=100 << 20, memory_available_bytes=100 << 20, open_files_limit=32)

    with pytest.raises(UserError) as caught:
        preflight.check(cluster, PATHS, poor)

    text = str(caught.value)
    assert "the VMs have 128 MiB of RAM but /dev/shm has 100 MiB free" in text
    assert "100 MiB is available" in text
    assert "the limit is 32" in text
    assert "vms.v0.disks.root.path: /nowhere.img: No such file or directory" in text
    assert all(line.startswith("c.toml: ") for line in text.splitlines())


def test_long_socket_path_is_found_before_anything_is_bound() -> None:
    paths = replace(PATHS, run_dir=Path("/x" * 50))

    (finding,) = preflight.path_findings(make_cluster(1, 1), paths)

    assert "bytes too long" in finding
    assert preflight.path_findings(make_cluster(1, 1), PATHS) == []


def test_writable_disk_of_two_vms_is_refused(tmp_path: Path) -> None:
    disk = tmp_path / "root.img"
    disk.touch()

    (finding,) = preflight.file_findings(make_cluster(1, 2, disk=str(disk)))

    assert finding == f"vms.v1.disks.root.path: {disk} is the writable disk vms.v0.disks.root.path already"


def test_host_with_more_vms_than_one_start_message_can_carry_is_refused() -> None:
    findings = preflight.descriptor_findings(make_cluster(1, 40), ROOMY)

    assert findings == ["h0/ultravisor would need 124 descriptors of at most 96: too many VMs on the host"]


def test_real_code_without_the_package_that_runs_it_is_refused_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = make_cluster(1, 1)
    vms = [structs.replace(vm, guest=structs.replace(vm.guest, kernel="machine")) for vm in cluster.vms]
    cluster = structs.replace(cluster, vms=vms)
    assert preflight.engine_findings(cluster) == []

    monkeypatch.setattr(preflight, "ENGINE_PACKAGE", "no_such_package")

    (finding,) = preflight.engine_findings(cluster)
    assert finding == (
        "vms.v0.guest.kernel: \"machine\" needs the Python package no_such_package: pip install 'pefbox[machine]'"
    )


def test_a_vm_of_the_next_incarnation_is_linked_anew_with_those_that_go_on() -> None:
    cluster = make_cluster(2, 4, n_on_lan=3)

    links = plan.network_links(PATHS, cluster, {"v0": 1, "v2": 4})

    (link,) = links
    assert (link.upper, link.lower, link.network) == ("v0/qemu", "v2/qemu", "lan")
    assert link.id == "network.lan:v0+v2.1.4"
    assert (link.vm_of("v0/qemu"), link.vm_of("v2/qemu")) == ("v0", "v2")
