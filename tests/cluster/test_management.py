"""What management sees of a VM that nobody marked and that turns itself secure, and what it is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import trio

from deploy.api import RunningCluster, cluster
from deploy.xml_text import NAMESPACE
from tests.cluster.vm_files import PROMPT, console_until, make_vm_files

OUR_NAMESPACE = {"pefbox": NAMESPACE}
UNMARKED = """
make = "demo"
[hosts.alpha]
secure_memory = "128M"
[vms.vm1]
host = "alpha"
memory = "64M"
{secure}
[vms.vm1.guest]
boot = "kernel"
image = "@state/vm1.image"
initrd = "@state/vm1.initrd"
esm_blob = "@state/vm1.blob"
command_line = "svm=on"
[[vms.vm1.devices]]
kind = "virtio-rng"
"""
"""Image, blob and command line are the guest's own affair: nothing of it says that the VM is to be secure."""


def write_cluster(directory: Path, *, secure: str = "") -> Path:
    file = directory / "c.toml"
    file.write_text(UNMARKED.format(secure=secure))
    return file


async def pefbox(running: RunningCluster, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, "-m", "deploy.cli", *arguments, "--cluster", running.name]
    with trio.fail_after(20):
        return await trio.run_process(line, capture_stdout=True, capture_stderr=True, check=False)


async def output_of(running: RunningCluster, *arguments: str) -> str:
    done = await pefbox(running, *arguments)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


async def domain_of(running: RunningCluster) -> Element:
    return ElementTree.fromstring(await output_of(running, "dumpxml", "vm1"))


async def refusal_of(running: RunningCluster, *arguments: str) -> str:
    """What a command that is refused says: one line, exit status 1."""
    done = await pefbox(running, *arguments)
    assert done.returncode == 1, done.stdout.decode()
    assert done.stderr.count(b"\n") == 1
    return done.stderr.decode().strip()


def security_of(domain: Element) -> tuple[str | None, str | None]:
    """What it is now, and whether it may change."""
    element = domain.find("metadata/pefbox:vm/pefbox:security", OUR_NAMESPACE)
    assert element is not None
    return element.text, element.get("allowed")


async def test_a_vm_that_nobody_marked_turns_secure_and_management_sees_it_without_qemu(tmp_path: Path) -> None:
    async with cluster(write_cluster(tmp_path), state_dir=tmp_path / "s") as running:
        vm = running.vm("vm1")
        assert (await vm.secure()).secure
        await console_until(vm, PROMPT)

        domain = await domain_of(running)
        assert security_of(domain) == ("secure", "yes")
        assert [element.attrib for element in domain.findall("launchSecurity")] == [{"type": "pef"}]

        described = json.loads(await output_of(running, "dumpxml", "vm1", "--json"))
        assert (described["secure"], described["state"]) == (True, "running")
        assert described["secure_memory_mode"] in ("memfd", "memfd_secret")
        assert "ciphertext" in described["operations"]["page"]["note"]

        # The monitor is that of any VM: it neither knows nor has to be told.
        status = json.loads(await output_of(running, "qmp", "vm1", "query-status"))
        commands = json.loads(await output_of(running, "qmp", "vm1", "query-commands"))
        assert status == {"running": True, "status": "running"}
        assert [row["name"] for row in commands if "secure" in row["name"] or "pef" in row["name"]] == []

        offered = json.loads(await output_of(running, "capabilities", "alpha", "--json"))
        assert offered["launch_security"] == ["pef"]
        memory = offered["secure_memory"]
        assert (memory["used_bytes"], memory["free_bytes"]) == (64 << 20, 64 << 20)


async def test_after_a_reset_the_same_vm_is_a_normal_one_until_it_turns_secure_again(tmp_path: Path) -> None:
    async with cluster(write_cluster(tmp_path), state_dir=tmp_path / "s") as running:
        vm = running.vm("vm1")
        await vm.secure()
        uuid = (await vm.describe()).uuid

        await output_of(running, "qmp", "vm1", "stop")
        await output_of(running, "qmp", "vm1", "system_reset")

        await vm.secure()
        assert (await vm.describe()).uuid == uuid


async def test_a_vm_that_may_not_turn_secure_has_no_launch_security_and_its_call_is_refused(tmp_path: Path) -> None:
    async with cluster(write_cluster(tmp_path, secure="secure = false"), state_dir=tmp_path / "s") as running:
        vm = running.vm("vm1")
        row = await vm.wait(lambda row: row.last_esm is not None, "refused")

        domain = await domain_of(running)

        assert (row.secure, row.last_esm["outcome"]) == (False, "refused")
        assert row.last_esm["reason"] == "hypervisor: H_SVM_INIT_START returned H_AUTHORITY"
        assert security_of(domain) == ("normal", "no")
        assert domain.findall("launchSecurity") == []


async def test_what_cannot_be_done_is_refused_with_the_reason_before_it_is_tried(tmp_path: Path) -> None:
    async with cluster(write_cluster(tmp_path), state_dir=tmp_path / "s") as running:
        await running.vm("vm1").secure()
        operations = (await running.vm("vm1").describe()).operations
        migrate = operations["migrate"]

        refusal = await refusal_of(running, "qmp", "vm1", "migrate", "uri=tcp:nowhere")

        assert not migrate.possible
        assert refusal == f"pefbox: migrate is not possible: {migrate.reason}"
        assert await refusal_of(running, "console", "vm1", "--port", "log") == (
            "pefbox: virtio console is not possible: vm1 has no virtio-console"
        )

        await running.process("alpha/kvm").stop()
        await running.process("alpha/kvm").wait_state("stopped")
        assert await refusal_of(running, "qmp", "vm1", "stop") == (
            "pefbox: pause is not possible: alpha/kvm is stopped"
        )
        assert await refusal_of(running, "restart", "vm1") == ("pefbox: restart is not possible: alpha/kvm is stopped")
        await running.process("alpha/kvm").resume()
        await running.process("alpha/kvm").wait_state("running")
        assert await output_of(running, "qmp", "vm1", "stop") == "{}\n"


async def test_what_a_driver_accepted_is_shown_beside_what_its_device_offers(tmp_path: Path) -> None:
    files = make_vm_files(tmp_path)
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        await console_until(running.vm("vm1"), PROMPT)

        (disk,) = (await running.vm("vm1").describe()).devices

        assert disk.driver_ok
        assert disk.offered is not None
        assert disk.accepted is not None
        assert {"VERSION_1", "FLUSH"} <= set(disk.accepted) <= set(disk.offered)
        assert not disk.access_platform


async def test_a_host_whose_ultravisor_is_gone_offers_no_secure_vms(tmp_path: Path) -> None:
    async with cluster(write_cluster(tmp_path), state_dir=tmp_path / "s") as running:
        await running.vm("vm1").secure()
        await running.process("alpha/ultravisor").kill()
        await running.vm("vm1").wait_state("failed")

        described = json.loads(await output_of(running, "capabilities", "alpha", "--json"))
        root = ElementTree.fromstring(await output_of(running, "capabilities", "alpha", "--xml"))

        assert (described["launch_security"], described["secure_memory"]) == ([], None)
        assert described["no_launch_security"] == "alpha/ultravisor is failed"
        security = root.find("domainCapabilities/features/launchSecurity")
        assert security is not None
        assert security.get("supported") == "no"
        domain = await domain_of(running)
        assert security_of(domain) == ("normal", "yes")
        assert operation(domain, "reset") == ("no", "vm1/qemu is gone: pefbox restart vm1")


def operation(domain: Element, name: str) -> tuple[Any, Any]:
    """Whether it is possible, and why not."""
    element = domain.find(f"metadata/pefbox:vm/pefbox:operation[@name='{name}']", OUR_NAMESPACE)
    assert element is not None
    return element.get("possible"), element.get("reason")
