"""Cluster files: what is read, and what a mistake says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.cluster_file import Cluster, parse_cluster, read_cluster_file, resolve_state
from deploy.toml_lines import LineIndex
from protocol.errors import ClusterFileError, UserError
from protocol.startup import AccessPlatform, IommuDomain
from services.guest.model.image import build_image
from shared.link_shape import LinkShape

CLUSTERS = Path(__file__).parents[2] / "deploy" / "clusters"

GOOD = """\
[hosts.alpha]
secure_memory = "512M"

[vms.vm1]
host = "alpha"
memory = "64M"

[vms.vm1.guest]
boot = "disk"

[vms.vm1.disks.root]
path = "root.img"
"""


def parse(text: str) -> Cluster:
    return parse_cluster(text, "c.toml", Path("/base"), "c")


def test_file_with_defaults_gives_every_field() -> None:
    cluster = parse(GOOD)

    (vm,) = cluster.vms
    assert (cluster.name, cluster.hosts[0].secure_memory_bytes) == ("c", 512 << 20)
    assert (vm.lpid, vm.memory_bytes, vm.time, vm.secure_allowed, vm.debuggable) == (
        1, 64 << 20, "instructions", True, False,
    )  # fmt: skip
    assert vm.disks[0].path == "/base/root.img"
    assert [(device.kind, device.disk) for device in vm.devices] == [("virtio-blk", "root")]


@pytest.mark.parametrize("setting", ["", 'dma = "quirk"'])
def test_an_image_can_be_built_for_the_dma_design_of_a_file_whether_it_is_given_or_not(setting: str) -> None:
    (vm,) = parse(GOOD.replace("[vms.vm1.guest]", f"[vms.vm1.guest]\n{setting}")).vms

    assert type(vm.guest.dma) is str
    assert build_image("prompt", {"dma": vm.guest.dma})


@pytest.mark.parametrize("name", ["minimal", "two-hosts"])
def test_shipped_cluster_files_are_read(name: str) -> None:
    assert read_cluster_file(CLUSTERS / f"{name}.toml").vms


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "problem"),
    [
        ('memory = "64M"', 'memroy = "64M"', 6, "vms.vm1.memroy", 'did you mean "memory"?'),
        ('memory = "64M"', "", 4, "vms.vm1.memory", "is missing"),
        ('memory = "64M"', 'memory = "64 miles"', 6, "vms.vm1.memory", 'a string such as "512M"'),
        ('memory = "64M"', 'memory = "1M"', 6, "vms.vm1.memory", "allowed: 16777216 to"),
        ('memory = "64M"', "memory = 67108865", 6, "vms.vm1.memory", "no multiple of 65536"),
        ('host = "alpha"', 'host = "alpa"', 5, "vms.vm1.host", 'did you mean "alpha"?; allowed: "alpha"'),
        ('boot = "disk"', 'boot = "floppy"', 9, "vms.vm1.guest.boot", 'allowed: "disk", "kernel"'),
        ('path = "root.img"', "path = 7", 12, "vms.vm1.disks.root.path", "must be a string, not an integer"),
        ("[vms.vm1.disks.root]", "[vms.vm1.disks.Root]", 11, "vms.vm1.disks.Root", "lower-case letters"),
        ('secure_memory = "512M"', "", 1, "hosts.alpha.secure_memory", "is missing"),
        ("[vms.vm1.guest]", "[vms.vm1.gast]", 8, "vms.vm1.gast", 'did you mean "guest"?'),
        ('host = "alpha"', 'host = "alpha"\nlpid = 0', 6, "vms.vm1.lpid", "allowed: 1 to 255"),
        ('host = "alpha"', 'host = "alpha"\nsecure = "yes"', 6, "vms.vm1.secure", "must be true or false"),
        ('boot = "disk"', f'command_line = "{"x" * 2049}"', 9, "vms.vm1.guest.command_line", "allowed: up to 2048"),
        ('boot = "disk"', 'command_line = "é"', 9, "vms.vm1.guest.command_line", "printable ASCII"),
        ('boot = "disk"', 'command_line = "a\\nb"', 9, "vms.vm1.guest.command_line", "printable ASCII"),
        ('boot = "disk"', 'image = "~nobody-here/x"', 9, "vms.vm1.guest.image", "home directory of a user"),
        ('boot = "disk"', 'boot = "\\u001b[31m"', 9, "vms.vm1.guest.boot", '"?[31m" is not possible'),
        ('boot = "disk"', '"a\\nb" = 1', 8, "vms.vm1.guest.a?b", "unknown key"),
    ],
)
def test_mistake_names_file_line_key_and_what_is_allowed(old: str, new: str, line: int, key: str, problem: str) -> None:
    with pytest.raises(ClusterFileError) as caught:
        parse(GOOD.replace(old, new))

    assert (caught.value.path, caught.value.line, caught.value.key) == ("c.toml", line, key)
    assert problem in caught.value.problem
    assert str(caught.value).startswith(f"c.toml:{line}: {key}: ")


def test_broken_toml_names_the_line() -> None:
    with pytest.raises(ClusterFileError) as caught:
        parse(GOOD + "x = \n")

    assert caught.value.line == 13


def test_missing_file_is_one_line() -> None:
    with pytest.raises(UserError, match=r"/nowhere.toml: No such file or directory"):
        read_cluster_file(Path("/nowhere.toml"))


def test_lpids_are_unique_and_the_lowest_free_ones() -> None:
    more = '[vms.vm2]\nhost = "alpha"\nmemory = "16M"\nlpid = 1\nguest.boot = "kernel"\n'

    assert [(vm.name, vm.lpid) for vm in parse(GOOD + more).vms] == [("vm1", 2), ("vm2", 1)]
    with pytest.raises(ClusterFileError, match="1 is taken by vm2"):
        parse(GOOD + more + more.replace("vm2", "vm3"))


def test_boot_from_disk_without_a_disk_is_refused() -> None:
    with pytest.raises(ClusterFileError, match="boots from disk but has none"):
        parse(GOOD[: GOOD.index("[vms.vm1.disks")])


def test_vm_named_like_a_host_is_refused() -> None:
    with pytest.raises(ClusterFileError, match='"alpha" is a host already'):
        parse(GOOD.replace("vm1", "alpha"))


def test_a_design_is_what_an_image_takes_also_when_the_file_names_none() -> None:
    for text in (GOOD, GOOD.replace('boot = "disk"', 'boot = "disk"\ndma = "ddw-identity"')):
        build_image("prompt", {"dma": parse(text).vms[0].guest.dma})


def test_device_may_not_share_its_disk() -> None:
    device = '[[vms.vm1.devices]]\nkind = "virtio-blk"\ndisk = "root"\n'

    with pytest.raises(ClusterFileError) as caught:
        parse(GOOD + device + device)

    assert (caught.value.line, caught.value.key) == (18, "vms.vm1.devices[1].disk")


def test_a_vm_has_one_balloon_at_most() -> None:
    balloon = '[[vms.vm1.devices]]\nkind = "virtio-balloon"\n'

    assert [device.kind for device in parse(GOOD + balloon).vms[0].devices] == ["virtio-blk", "virtio-balloon"]
    with pytest.raises(ClusterFileError, match="a VM has one virtio-balloon at most") as caught:
        parse(GOOD + balloon + balloon)

    assert (caught.value.line, caught.value.key) == (16, "vms.vm1.devices[1].kind")


def test_iommu_design_offers_the_platform_feature_by_default() -> None:
    (vm,) = parse(GOOD.replace('boot = "disk"', 'boot = "disk"\ndma = "iommu-always"')).vms

    assert vm.devices[0].offer.access_platform is AccessPlatform.REQUIRED


def test_link_names_two_hosts_that_exist() -> None:
    with pytest.raises(ClusterFileError, match='no host "beta"'):
        parse(GOOD + '[[links]]\nbetween = ["alpha", "beta"]\n')


TWO_HOSTS = GOOD + '[hosts.beta]\nsecure_memory = "64M"\n[[links]]\nbetween = ["alpha", "beta"]\n'


def test_a_link_has_a_shape_and_none_unless_it_says_so() -> None:
    (plain,) = parse(TWO_HOSTS).links
    (link,) = parse(TWO_HOSTS + 'latency = 50\njitter = 2.5\nbandwidth = "100M/s"\nloss = 0.01\ndown = true\n').links

    assert plain.shape.is_plain
    assert link.shape == LinkShape(
        latency_ms=50, jitter_ms=2.5, bandwidth_bytes_per_second=100 << 20, loss=0.01, down=True
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("latency = -1", "-1 is out of range; allowed: 0 to 10000 milliseconds"),
        (f"latency = {'9' * 400}", "is too large"),
        ("latency = nan", "nan is out of range; allowed: 0 to 10000 milliseconds"),
        ('latency = "50ms"', "must be a number, not a string"),
        ("jitter = true", "must be a number, not a boolean"),
        ("bandwidth = 100", "100 is out of range; allowed: 0 for no limit, or 1024 to 1099511627776 bytes a second"),
        ('bandwidth = "fast"', "'fast' is no rate; allowed: bytes a second, or a string such as \"100M\"; 0: no limit"),
        ("loss = 2", "2 is out of range; allowed: 0 to 1"),
        ("down = 1", "must be true or false, not an integer"),
    ],
)
def test_a_shape_that_is_not_possible_is_refused_with_its_line(line: str, problem: str) -> None:
    with pytest.raises(ClusterFileError, match=re.escape(problem)) as caught:
        parse(TWO_HOSTS + line + "\n")

    assert caught.value.key == f"links[0].{line.split()[0]}"
    assert caught.value.line == len(TWO_HOSTS.splitlines()) + 1


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000 + "]" * 5000], ids=["digits", "lists"])
def test_what_the_reader_of_toml_gives_up_on_is_a_mistake_in_the_file(value: str) -> None:
    with pytest.raises(ClusterFileError):
        parse(f"seed = {value}\n{GOOD}")


def test_two_hosts_have_one_link() -> None:
    with pytest.raises(ClusterFileError, match="beta and alpha are linked already"):
        parse(TWO_HOSTS + '[[links]]\nbetween = ["beta", "alpha"]\n')


def test_state_prefix_means_the_state_directory() -> None:
    cluster = parse(GOOD.replace("root.img", "@state/root.img"))

    assert resolve_state(cluster, Path("/s")).vms[0].disks[0].path == "/s/root.img"


def test_lines_after_values_of_several_lines_are_right() -> None:
    text = 'a = [\n  1, # ]\n  2,\n]\nb = """\n[x]\nc = 1\n"""\n[t]\nd.e = "=]"\n[[u.v]]\nf = 1\n[[u.v]]\nf = 2\n'

    index = LineIndex(text)

    assert [index.line_of(path) for path in (("a",), ("b",), ("t",), ("t", "d", "e"))] == [1, 5, 9, 10]
    assert index.line_of(("u", "v", 1, "f")) == 14
    assert index.line_of(("x",)) is None


@given(st.text(alphabet="ab.=[]{}\"'#\n\\ 1", max_size=60))
def test_line_index_never_fails_and_never_leaves_the_text(text: str) -> None:
    line = LineIndex(text).line_of(("a",))

    assert line is None or 1 <= line <= len(text.splitlines())


@given(st.text(max_size=200))
def test_any_text_is_a_cluster_or_a_named_mistake(text: str) -> None:
    try:
        parse(text)
    except ClusterFileError as error:
        assert str(error).startswith("c.toml")


LAN = """
[networks.lan]
mtu = 9000

[[vms.vm1.devices]]
kind = "virtio-net"
network = "lan"

[[vms.vm1.devices]]
kind = "virtio-console"
"""


EDU = """
[[vms.vm1.devices]]
kind = "edu"

[[vms.vm1.devices]]
kind = "edu"
name = "own"
iommu_domain = "own"
dma_bits = 64
"""


def test_an_edu_translates_as_the_bus_does_unless_it_has_a_domain_of_its_own() -> None:
    _, shared, own = parse(GOOD + EDU).vms[0].devices

    assert (shared.kind, shared.name, shared.iommu_domain, shared.dma_bits) == ("edu", "edu", IommuDomain.BUS, 28)
    assert (own.kind, own.name, own.iommu_domain, own.dma_bits) == ("edu", "own", IommuDomain.OWN, 64)


@pytest.mark.parametrize(
    ("old", "new", "key", "problem"),
    [
        ('iommu_domain = "own"', 'iommu_domain = "owm"', "iommu_domain", 'did you mean "own"?; allowed: "bus", "own"'),
        ("dma_bits = 64", "dma_bits = 65", "dma_bits", "allowed: 12 to 64"),
        ("dma_bits = 64", "access_platform = true", "access_platform", "is no key of an edu; allowed: kind, name"),
        ('name = "own"', 'name = "edu"', "name", '"edu" is another device already'),
        ('name = "own"', 'name = "Own"', "name", "lower-case letters"),
        ('kind = "edu"\nname', 'kind = "virtio-rng"\nname', "name", "is no key of a virtio-rng"),
    ],
)
def test_a_mistake_in_an_edu_names_its_key(old: str, new: str, key: str, problem: str) -> None:
    with pytest.raises(ClusterFileError, match=re.escape(problem)) as caught:
        parse(GOOD + EDU.replace(old, new))

    assert caught.value.key == f"vms.vm1.devices[1].{key}"


def test_a_domain_of_its_own_needs_nodes_that_qemu_makes() -> None:
    firmware = GOOD.replace('boot = "disk"', 'boot = "disk"\npci_nodes = "firmware"')

    with pytest.raises(ClusterFileError, match=re.escape('set pci_nodes = "qemu"')):
        parse(firmware + EDU)


def test_a_network_card_has_an_address_of_its_own_and_wall_time() -> None:
    first, again = (parse(GOOD + LAN).vms[0] for _ in range(2))
    other = parse(GOOD.replace("vm1", "vm2") + LAN.replace("vm1", "vm2")).vms[0]

    disk, card, console = first.devices
    assert [device.kind for device in first.devices] == ["virtio-blk", "virtio-net", "virtio-console"]
    assert (disk.disk, card.network, card.mtu, console.name) == ("root", "lan", 9000, "console")
    assert first.devices == again.devices and first.time == "wall"
    assert card.mac is not None and int(card.mac[:2], 16) & 3 == 2
    assert other.devices[1].mac != card.mac


@pytest.mark.parametrize(
    ("old", "new", "key", "problem"),
    [
        ('network = "lan"', 'network = "lna"', "vms.vm1.devices[0].network", 'did you mean "lan"?'),
        ('network = "lan"', "", "vms.vm1.devices[0].network", "is missing"),
        ("mtu = 9000", "mtu = 9001", "networks.lan.mtu", "allowed: 68 to 9000"),
        ('network = "lan"', 'network = "lan"\nmac = "02:00"', "vms.vm1.devices[0].mac", "is no address"),
        ('network = "lan"', 'network = "lan"\nmac = "03:00:00:00:00:01"', "vms.vm1.devices[0].mac", "group address"),
        (
            'network = "lan"',
            'disk = "root"',
            "vms.vm1.devices[0].disk",
            "is no key of a virtio-net; allowed: kind, netw",
        ),
        ('kind = "virtio-console"', 'kind = "virtio-gpu"', "vms.vm1.devices[1].kind", '"virtio-net", "virtio-rng"'),
    ],
)
def test_a_mistake_in_a_network_names_its_key(old: str, new: str, key: str, problem: str) -> None:
    with pytest.raises(ClusterFileError, match=re.escape(problem)) as caught:
        parse(GOOD + LAN.replace(old, new))

    assert caught.value.key == key


def test_a_card_needs_a_declared_network_and_wall_time() -> None:
    with pytest.raises(ClusterFileError, match=re.escape("add [networks.NAME]")):
        parse(GOOD + LAN.replace("[networks.lan]\nmtu = 9000\n", ""))
    with pytest.raises(ClusterFileError, match='"instructions" is not possible with a virtio-net'):
        parse(GOOD.replace('memory = "64M"', 'memory = "64M"\ntime = "instructions"') + LAN)


def test_two_cards_of_a_network_may_not_have_one_address() -> None:
    card = '[[vms.vm1.devices]]\nkind = "virtio-net"\nnetwork = "lan"\nmac = "02:00:00:00:00:01"\n'

    with pytest.raises(ClusterFileError, match="2 cards have the address 02:00:00:00:00:01"):
        parse(GOOD + "[networks.lan]\n" + 2 * card)


def test_a_network_has_a_limit_of_vms() -> None:
    vm = '[vms.{0}]\nhost = "alpha"\nmemory = "64M"\nguest.boot = "kernel"\n'
    card = '[[vms.{0}.devices]]\nkind = "virtio-net"\nnetwork = "lan"\n'
    text = "[networks.lan]\n" + "".join((vm + card).format(f"v{n}") for n in range(17))

    with pytest.raises(ClusterFileError, match="has 17 VMs; allowed: up to 16"):
        parse(GOOD + text)


def test_a_vm_has_a_limit_of_links_to_others() -> None:
    """One start message carries them all, and each costs its process open files."""
    names = [f"net{n}" for n in range(9)]
    vm = '[vms.{0}]\nhost = "alpha"\nmemory = "64M"\nguest.boot = "kernel"\n'
    cards = "".join(f'[[vms.{{0}}.devices]]\nkind = "virtio-net"\nnetwork = "{name}"\n' for name in names)
    text = "".join(f"[networks.{name}]\n" for name in names) + "".join((vm + cards).format(f"v{n}") for n in range(16))

    with pytest.raises(ClusterFileError, match=r"v0: has 135 links to other VMs of its networks; allowed: up to 128"):
        parse(GOOD + text)
