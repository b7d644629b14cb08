"""VMs and hosts as libvirt's XML: every device there and back, against libvirt's own schemas where they are."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.capabilities_xml import capabilities_xml
from deploy.cli_manage import _device_lines
from deploy.cluster_devices import KEYS_OF
from deploy.cluster_file import parse_cluster
from deploy.cluster_run import ClusterRun, LaunchOptions
from deploy.domain_xml import DESCRIBED_KINDS, disk_name, domain_xml
from deploy.host_description import describe_host
from deploy.manifest import Manifest
from deploy.run_dirs import Paths
from deploy.vm_description import VmDescription, describe_vm
from deploy.xml_text import NAMESPACE, child, own, to_text
from protocol.errors import UserError
from protocol.startup import AccessPlatform, DeviceEntry, DiskEntry, DmaOffer
from services.qemu.board import Board
from services.qemu.description import describe_machine
from services.qemu.device_tree import BootFacts
from services.qemu.devices import DEVICE_KINDS
from services.qemu.network import Switch
from services.qemu.testing import TestPort, TestRam, board_entry
from services.runtime.log import Log
from shared.fdt_reader import read_fdt
from tests.needs import LIBVIRT_SCHEMAS, need_libvirt_schemas

OUR_NAMESPACE = {"pefbox": NAMESPACE}
EVERY_KIND = """
[hosts.alpha]
secure_memory = "128M"
[networks.lan]
mtu = 9000
[vms.vm1]
host = "alpha"
memory = "64M"
[vms.vm1.guest]
kernel = "machine"
boot = "kernel"
image = "/k & <k>"
initrd = "/i"
firmware = "/f.bin"
command_line = 'svm=on a="<&>"'
[vms.vm1.disks.root]
path = "/r"
[vms.vm1.disks.data]
path = "/dev/null/d"
readonly = true
[[vms.vm1.devices]]
kind = "virtio-net"
network = "lan"
mac = "52:54:00:12:34:56"
access_platform = true
[[vms.vm1.devices]]
kind = "virtio-rng"
[[vms.vm1.devices]]
kind = "virtio-blk"
disk = "data"
access_platform = true
[[vms.vm1.devices]]
kind = "virtio-console"
name = "first"
access_platform = true
[[vms.vm1.devices]]
kind = "virtio-console"
name = "second"
"""
MINIMAL = """
[hosts.alpha]
secure_memory = "128M"
[vms.vm1]
host = "alpha"
memory = "64M"
secure = {secure}
[vms.vm1.guest]
boot = "{boot}"
{more}
"""


def run_of(text: str) -> ClusterRun:
    """A cluster none of whose processes was started."""
    cluster = parse_cluster(text, "c.toml", Path("/"), "c")
    nowhere = Path("/nowhere")
    return ClusterRun(cluster, Paths(nowhere, nowhere), LaunchOptions(), cast(Manifest, None), cast(Log, None))


async def described(text: str = EVERY_KIND) -> VmDescription:
    return await describe_vm(run_of(text), "vm1")


async def xml_of(text: str = EVERY_KIND) -> Element:
    return ElementTree.fromstring(domain_xml(await described(text)))


def text_of(element: Element, path: str) -> str:
    found = element.find(path, OUR_NAMESPACE)
    assert found is not None, path
    return found.text or ""


def attributes_of(element: Element, path: str) -> dict[str, str]:
    found = element.find(path)
    assert found is not None, path
    return found.attrib


def pci_device(element: Element) -> tuple[int, bool] | None:
    """Slot, and whether the device offers ACCESS_PLATFORM; None for what is not on the bus."""
    address = element.find("address[@type='pci']")
    driver = element.find("driver")
    if address is None:
        return None
    return int(address.attrib["slot"], 16), driver is not None and driver.get("iommu") == "on"


def read_device(element: Element, consoles: dict[str, str]) -> dict[str, Any]:
    """The keys of a cluster file that the element was made from. `consoles` are names by controller."""
    match element.tag:
        case "disk":
            source = next(iter(attributes_of(element, "source").values()))
            readonly = element.find("readonly") is not None
            return {"kind": "virtio-blk", "disk": text_of(element, "serial"), "path": source, "readonly": readonly}
        case "interface":
            return {
                "kind": "virtio-net",
                "network": attributes_of(element, "source")["network"],
                "mac": attributes_of(element, "mac")["address"],
                "mtu": int(attributes_of(element, "mtu")["size"]),
            }
        case "rng":
            return {"kind": "virtio-rng"}
        case "controller":
            return {"kind": "virtio-console", "name": consoles[element.attrib["index"]]}
        case _:
            raise AssertionError(element.tag)


async def test_every_device_comes_back_out_of_its_element() -> None:
    devices = (await xml_of()).find("devices")
    assert devices is not None
    consoles = {
        attributes_of(console, "address")["controller"]: attributes_of(console, "alias")["name"].removeprefix("ua-")
        for console in devices.findall("console")
        if console.find("address") is not None
    }

    found = {place: read_device(element, consoles) for element in devices if (place := pci_device(element)) is not None}

    assert found == {
        (1, False): {"kind": "virtio-blk", "disk": "root", "path": "/r", "readonly": False},
        (2, True): {"kind": "virtio-net", "network": "lan", "mac": "52:54:00:12:34:56", "mtu": 9000},
        (3, False): {"kind": "virtio-rng"},
        (4, True): {"kind": "virtio-blk", "disk": "data", "path": "/dev/null/d", "readonly": True},
        (5, True): {"kind": "virtio-console", "name": "first"},
        (6, False): {"kind": "virtio-console", "name": "second"},
    }
    targets = [attributes_of(disk, "target")["dev"] for disk in devices.findall("disk")]
    assert targets == ["vda", "vdb"]
    assert attributes_of(devices, "memballoon") == {"model": "none"}


async def test_what_the_machine_is_stands_where_libvirt_looks_for_it() -> None:
    root = await xml_of()

    assert text_of(root, "memory") == "65536"
    assert text_of(root, "vcpu") == "1"
    assert attributes_of(root, "os/type") == {"arch": "ppc64", "machine": "pseries-7.2"}
    assert text_of(root, "os/kernel") == "/k & <k>"
    assert text_of(root, "os/loader") == "/f.bin"
    assert text_of(root, "os/cmdline") == 'svm=on a="<&>"'
    assert attributes_of(root, "clock") == {"offset": "utc"}
    assert text_of(root, "metadata/pefbox:vm/pefbox:security") == "normal"
    operation = "metadata/pefbox:vm/pefbox:operation[@name='pause']"
    assert root.find(operation, OUR_NAMESPACE) is not None


@pytest.mark.parametrize(("secure", "elements"), [("true", 1), ("false", 0)])
async def test_launch_security_stands_for_what_the_vm_may_do(secure: str, elements: int) -> None:
    root = await xml_of(MINIMAL.format(secure=secure, boot="kernel", more=""))

    assert [element.get("type") for element in root.findall("launchSecurity")] == ["pef"] * elements
    allowed = root.find("metadata/pefbox:vm/pefbox:security", OUR_NAMESPACE)
    assert allowed is not None
    assert allowed.get("allowed") == ("yes" if elements else "no")


async def test_a_clock_that_repeats_begins_at_a_fixed_moment() -> None:
    root = await xml_of(MINIMAL.format(secure="true", boot="kernel", more=""))

    assert attributes_of(root, "clock") == {"offset": "absolute", "start": "1767225600"}


async def test_a_balloon_stands_where_libvirt_looks_for_it() -> None:
    more = '[[vms.vm1.devices]]\nkind = "virtio-rng"\n[[vms.vm1.devices]]\nkind = "virtio-balloon"\n'
    devices = (await xml_of(MINIMAL.format(secure="true", boot="kernel", more=more))).find("devices")

    assert devices is not None
    (balloon,) = devices.findall("memballoon")
    assert balloon.attrib == {"model": "virtio-non-transitional"}
    assert pci_device(balloon) == (2, False)


async def test_uuid_and_slots_are_those_of_the_board() -> None:
    devices = [DeviceEntry(kind="virtio-rng"), DeviceEntry(kind="virtio-console", name="log")]
    entry = board_entry([], devices, memory_bytes=64 << 20)
    board = Board(entry, TestRam(entry.memory_bytes).accessor, {}, TestPort())
    tree = read_fdt(board.device_tree(BootFacts()))
    text = MINIMAL.format(
        secure="true",
        boot="kernel",
        more='[[vms.vm1.devices]]\nkind = "virtio-rng"\n[[vms.vm1.devices]]\nkind = "virtio-console"\nname = "log"',
    )

    vm = await described(text)
    machine = describe_machine(board)

    assert tree.root.text("vm,uuid") == vm.uuid
    assert [(row.kind, row.slot, row.function) for row in vm.devices] == [
        (device["kind"], device["slot"], device["function"]) for device in machine["devices"]
    ]


def test_every_kind_of_device_that_a_cluster_file_knows_is_made_and_described() -> None:
    assert set(KEYS_OF) == set(DEVICE_KINDS)
    assert set(KEYS_OF) <= DESCRIBED_KINDS


def test_disks_are_named_as_linux_names_them() -> None:
    assert [disk_name(index) for index in (0, 25, 26, 27, 701, 702)] == ["vda", "vdz", "vdaa", "vdab", "vdzz", "vdaaa"]


@given(st.text(), st.text())
def test_any_text_comes_back_out_of_xml(text: str, value: str) -> None:
    root = Element("r")
    child(root, own("x"), f"|{text}|", a=value)

    back = ElementTree.fromstring(to_text(root))[0]

    assert back.text == f"|{legal(text)}|"
    assert back.attrib == {"a": legal(value)}


def legal(text: str) -> str:
    """`text` with what XML cannot hold replaced."""

    def holds(char: str) -> bool:
        code = ord(char)
        return char in "\t\n\r" or 0x20 <= code < 0xD800 or 0xE000 <= code < 0xFFFE or code >= 0x10000

    return "".join(char if holds(char) else "\ufffd" for char in text)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "no",
        {},
        {"arch": "x86_64", "monitor_commands": [], "devices": [], "dma_windows": [], "dma_page_bytes": []},
        {"arch": "ppc64", "monitor_commands": [], "devices": [], "dma_windows": [], "dma_page_bytes": []},
        {"arch": "ppc64", "monitor_commands": 3, "devices": [], "dma_windows": [], "dma_page_bytes": []},
    ],
)
async def test_a_qemu_that_says_nonsense_is_as_one_that_says_nothing(
    answer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(*_: object) -> object:
        return answer

    monkeypatch.setattr("deploy.vm_description.ask", ask)
    vm = await described()

    assert vm.dma_windows is None
    assert [device.offered for device in vm.devices] == [None] * 6


async def test_a_vm_or_host_that_does_not_exist_is_one_line_with_those_that_do() -> None:
    with pytest.raises(UserError, match=r'^no VM "vm9"; there are: vm1$'):
        await describe_vm(run_of(EVERY_KIND), "vm9")
    with pytest.raises(UserError, match=r'^no host "beta"; there are: alpha$'):
        await describe_host(run_of(EVERY_KIND), "beta")


async def test_a_host_without_an_ultravisor_offers_no_launch_security() -> None:
    host = await describe_host(run_of(EVERY_KIND), "alpha")
    root = ElementTree.fromstring(capabilities_xml(host))

    assert (host.launch_security, host.no_launch_security) == ([], "alpha/ultravisor is missing")
    security = root.find("domainCapabilities/features/launchSecurity")
    assert security is not None
    assert security.attrib == {"supported": "no"}
    assert list(security) == []


@pytest.mark.parametrize("readonly", [False, True])
async def test_capabilities_name_the_features_that_devices_really_offer(readonly: bool, tmp_path: Path) -> None:
    offers = (await describe_host(run_of(EVERY_KIND), "alpha")).devices
    every_way = DmaOffer(access_platform=AccessPlatform.OPTIONAL, no_translation=True, identity_address=True)
    devices = [
        DeviceEntry(kind="virtio-blk", disk="root", offer=every_way),
        DeviceEntry(kind="virtio-rng", offer=every_way),
        DeviceEntry(kind="virtio-console", name="log", offer=every_way),
        DeviceEntry(kind="virtio-net", network="lan", mac="52:54:00:12:34:56", offer=every_way),
    ]
    entry = board_entry([DiskEntry(name="root", path="", readonly=readonly)], devices, memory_bytes=64 << 20)
    with (tmp_path / "disk").open("w+b") as disk:
        disk.truncate(1 << 20)
        ram = TestRam(entry.memory_bytes).accessor
        board = Board(entry, ram, {"root": disk.fileno()}, TestPort(), networks={"lan": Switch(1500)})

    for device in describe_machine(board)["devices"]:
        only_otherwise = {"DISCARD", "WRITE_ZEROES"} if readonly else {"RO"}
        optional = only_otherwise if device["kind"] == "virtio-blk" else set()
        assert set(offers[device["kind"]].features) - set(device["offered"]) == optional
        assert set(device["offered"]) <= set(offers[device["kind"]].features)


# -- against libvirt's own schemas ----------------------------------------------------------------------------

NEWER_THAN_SCHEMAS = ("devices/interface", "devices/console", "devices/memballoon", "features/launchSecurity")
"""Of <domainCapabilities>: later releases of libvirt have launchSecurity; memballoon and the others are ours."""


def check(root: Element, schema: str) -> None:
    """Fails with the validator's words."""
    document = ElementTree.tostring(root)
    command = ["xmllint", "--noout", "--relaxng", str(LIBVIRT_SCHEMAS / schema), "-"]
    done = subprocess.run(command, input=document, capture_output=True, check=False)
    assert done.returncode == 0, f"{done.stderr.decode()}\n{document.decode()}"


@pytest.mark.parametrize(
    "text",
    [
        EVERY_KIND,
        MINIMAL.format(secure="false", boot="kernel", more=""),
        MINIMAL.format(secure="true", boot="program", more='image = "/p"\nesm_blob = "/b"'),
        MINIMAL.format(secure="true", boot="disk", more='command_line = "x"\n[vms.vm1.disks.a]\npath = "/a"'),
    ],
)
async def test_domain_is_valid_but_for_our_type_of_launch_security(text: str) -> None:
    need_libvirt_schemas()
    root = await xml_of(text)
    for element in root.findall("launchSecurity"):
        assert element.attrib == {"type": "pef"}
        element.set("type", "s390-pv")

    check(root, "domain.rng")


async def test_capabilities_are_valid_but_for_what_the_schemas_do_not_know() -> None:
    need_libvirt_schemas()
    root = ElementTree.fromstring(capabilities_xml(await describe_host(run_of(EVERY_KIND), "alpha")))
    capabilities, domain = root.find("capabilities"), root.find("domainCapabilities")
    assert capabilities is not None
    assert domain is not None
    for path in NEWER_THAN_SCHEMAS:
        parent = domain.find(path.partition("/")[0])
        element = domain.find(path)
        assert parent is not None
        assert element is not None
        parent.remove(element)

    check(capabilities, "capability.rng")
    check(domain, "domaincaps.rng")


@pytest.mark.parametrize(
    ("path", "attribute"),
    [
        ("devices/disk/target", "bus"),
        ("devices/interface/mac", "address"),
        ("devices/rng/address", "slot"),
        ("devices/controller/address", "type"),
        ("devices/serial/target", "type"),
        ("devices/memballoon", "model"),
        ("os/type", "arch"),
        ("clock", "offset"),
        ("cpu", "match"),
    ],
)
async def test_the_schema_notices_a_wrong_value(path: str, attribute: str) -> None:
    need_libvirt_schemas()
    root = await xml_of()
    for element in root.findall("launchSecurity"):
        root.remove(element)
    check(root, "domain.rng")
    attributes_of(root, path)[attribute] = "?"

    with pytest.raises(AssertionError, match="fails to validate"):
        check(root, "domain.rng")


def test_features_that_every_virtio_device_may_offer_are_told_once() -> None:
    lines = _device_lines({kind: {"features": declared.may_offer()} for kind, declared in DEVICE_KINDS.items()})
    assert lines[0].split()[:2] == ["every", "virtio"]
    assert "ACCESS_PLATFORM" in lines[0].split()
    assert not [line for line in lines[1:] if "VERSION_1" in line]
    assert "  edu" in lines
