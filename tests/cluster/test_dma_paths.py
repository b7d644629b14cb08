"""The DMA paths of docs/dma.md with real processes: what the device is given, and what comes of it.

What kvm was asked to map is taken from the recorded frames, and so is what the guest had shared by then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from deploy.api import RunningCluster, cluster
from deploy.trace.reader import FrameReader
from protocol.codes import HCode, UCode
from protocol.declare import Call
from protocol.geometry import PAGE_SHIFT, gpa_of
from protocol.hcalls import H_PUT_TCE, H_PUT_TCE_INDIRECT, H_STUFF_TCE
from protocol.ucalls import UV_ESM, UV_RETURN, UV_SHARE_PAGE, UV_UNSHARE_ALL_PAGES, UV_UNSHARE_PAGE
from protocol.wire import Envelope, MessageKind, decode
from services.guest.model.virtqueue import QueueError
from shared.tce import PERMISSION_MASK, gpa_of_tce
from tests.cluster.vm_files import PROMPT, answer_of, console_until, make_vm_files

HOSTILE = "tests.attack.hostile.{role}"
NORMAL = 'command_line = "svm=off"\n'
PATHS = {
    "quirk-normal": NORMAL + 'dma = "quirk"',
    "quirk-secure": 'dma = "quirk"',
    "iommu-normal": NORMAL + 'dma = "iommu-always"',
    "iommu-secure": 'dma = "iommu-always"',
}


@dataclass
class Traffic:
    """What a record shows of one VM's DMA."""

    stored: list[tuple[int, int, bool]] = field(default_factory=list)
    """Every TCE with a permission that kvm stored: bus address, gpa of the page, whether the VM was secure."""
    private: list[tuple[int, int]] = field(default_factory=list)
    """Those of the secure VM whose page was not shared when it was stored."""


@pytest.mark.parametrize("path", PATHS)
async def test_guest_and_host_see_the_same_disk_on_every_path(tmp_path: Path, path: str) -> None:
    secure, translated = path.endswith("secure"), path.startswith("iommu")
    files = make_vm_files(tmp_path, guest=PATHS[path])
    async with cluster(files.cluster_file, state_dir=files.state_dir, record=True) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)
        assert (await vm.row()).secure is secure

        assert answer_of(await vm.console_command("hash")) == f"ok {files.sha256()} {files.layout.size_bytes}"
        assert answer_of(await vm.console_command("write")).startswith("ok ")
        assert answer_of(await vm.console_command("hash")) == f"ok {files.sha256()} {files.layout.size_bytes}"

        assert (await bounced_bytes(running) >= 2 * files.layout.size_bytes) is secure
        await stop_recording(running)
        traffic = read_traffic(running, secure=secure)
        assert bool(traffic.stored) is translated
        assert any(was_secure for _, _, was_secure in traffic.stored) is (secure and translated)
        assert traffic.private == []
        if secure:
            await check_pages_are_shared(running, traffic)


async def test_a_driver_that_maps_private_pages_is_seen_and_gets_no_answer(tmp_path: Path) -> None:
    """As Linux serves a device with a 32-bit mask: the device finds ciphertext in its ring."""
    files = make_vm_files(tmp_path, guest='dma = "ddw-identity"\noptions = { dma_mask = 32 }')
    async with cluster(files.cluster_file, state_dir=files.state_dir, record=True) as running:
        text = await console_until(running.vm("vm1"), PROMPT)

        assert f"pefbox: disk: queue 0: {QueueError.NO_ANSWER.value}" in text
        await stop_recording(running)
        assert read_traffic(running, secure=True).private


async def test_a_driver_that_knows_nothing_of_secure_vms_gets_no_answer_and_no_plain_byte_leaves(
    tmp_path: Path,
) -> None:
    files = make_vm_files(tmp_path, guest='dma = "nothing"')
    async with cluster(files.cluster_file, state_dir=files.state_dir, record=True) as running:
        vm = running.vm("vm1")

        text = await console_until(vm, PROMPT)

        assert f"pefbox: disk: queue 0: {QueueError.NO_ANSWER.value}" in text
        assert answer_of(await vm.console_command("hash")) == f"error queue 0: {QueueError.NO_ANSWER.value}"
        assert [line for line in vm.qemu.log().splitlines() if "device fault" in line]
        assert "Traceback" not in vm.qemu.log()
        assert (await vm.row()).secure


async def test_a_driver_that_drops_access_platform_is_refused_features_ok(tmp_path: Path) -> None:
    device = '\n[[vms.vm1.devices]]\nkind = "virtio-blk"\ndisk = "root"\naccess_platform = true\n'
    files = make_vm_files(tmp_path, guest='dma = "nothing"', extra=device)
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")

        text = await console_until(vm, PROMPT)

        assert "kernel prompt secure=1" in text
        assert "pefbox: disk: the device refuses the features (FEATURES_OK)" in text
        assert answer_of(await vm.console_command("hash")) == "error the device refuses the features (FEATURES_OK)"
        refusal = "the driver does not accept VIRTIO_F_ACCESS_PLATFORM"
        assert (await vm.qemu.query("vm.status"))["faults"] == {"vm1/root": refusal}


async def test_a_driver_that_needs_access_platform_goes_without_a_disk_that_does_not_offer_it(tmp_path: Path) -> None:
    device = '\n[[vms.vm1.devices]]\nkind = "virtio-blk"\ndisk = "root"\naccess_platform = false\n'
    files = make_vm_files(tmp_path, guest='dma = "iommu-always"', extra=device)
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")

        text = await console_until(vm, PROMPT)

        assert "the device does not offer ACCESS_PLATFORM, which dma=iommu-always needs" in text
        assert (await vm.row()).secure


# -- what the records say -------------------------------------------------------------------------------------------


async def stop_recording(running: RunningCluster) -> None:
    for target in ("alpha/kvm", "alpha/ultravisor"):
        await running.process(target).query("record", {"on": False})


def frames(running: RunningCluster, target: str) -> Iterator[tuple[int, str, str, Envelope, list[int]]]:
    """(time, link, direction, envelope, registers) of every hypercall and ultracall message of a process."""
    for entry in FrameReader(running.paths.trace_file(target)).read():
        envelope = decode(entry.frame)
        body = msgspec.msgpack.decode(envelope.body)
        if isinstance(body, list) and all(isinstance(word, int) for word in body):
            yield entry.t_ns, entry.link, entry.direction, envelope, body


def sharing_history(running: RunningCluster) -> list[tuple[int, int, int, bool]]:
    """(time, first gfn, pages, shared) of every change that the ultravisor granted the guest, as it granted it."""
    asked: dict[tuple[str, int], tuple[Call, int, int]] = {}
    history = []
    by_number = {call.number: call for call in (UV_SHARE_PAGE, UV_UNSHARE_PAGE)}
    for t_ns, link, direction, envelope, body in frames(running, "alpha/ultravisor"):
        assert envelope.number != UV_UNSHARE_ALL_PAGES.number, "this kernel never unshares all"
        call = by_number.get(envelope.number)
        if call is None:
            continue
        key = (link, envelope.correlation)
        if envelope.kind is MessageKind.CALL and direction == "in":
            asked[key] = (call, body[1], body[2])
        elif key in asked:
            made, gfn, n_pages = asked.pop(key)
            if body[0] == UCode.U_SUCCESS:
                history.append((t_ns, gfn, n_pages, made is UV_SHARE_PAGE))
    return history


def esm_granted_ns(running: RunningCluster) -> int:
    """When the ultravisor took UV_ESM up; the VM makes no hypercall of its own between then and its new start."""
    return min(
        t_ns for t_ns, _, _, envelope, _ in frames(running, "alpha/ultravisor") if envelope.number == UV_ESM.number
    )


def read_traffic(running: RunningCluster, *, secure: bool) -> Traffic:
    """Every TCE that kvm stored, against what was shared at that moment."""
    secure_from_ns = esm_granted_ns(running) if secure else None
    history = sharing_history(running)
    shared: set[int] = set()
    traffic = Traffic()
    asked: dict[int, tuple[int, int]] = {}
    for t_ns, link, direction, envelope, body in frames(running, "alpha/kvm"):
        assert envelope.number != H_PUT_TCE_INDIRECT.number, "this kernel does not use it"
        while history and history[0][0] <= t_ns:
            _, gfn, n_pages, now_shared = history.pop(0)
            (shared.update if now_shared else shared.difference_update)(range(gfn, gfn + n_pages))
        if envelope.number == H_PUT_TCE.number and envelope.kind is MessageKind.CALL and direction == "in":
            # A guest's link carries [vcpu, liobn, ioba, tce], the ultravisor's puts the lpid in front.
            ioba, tce = body[-2:]
            asked[envelope.correlation] = (ioba, tce)
            is_secure = secure_from_ns is not None and t_ns > secure_from_ns
            assert link.startswith("alpha:ultravisor-kvm") is is_secure
            if tce & PERMISSION_MASK:
                traffic.stored.append((ioba, gpa_of_tce(tce), is_secure))
                if is_secure and gpa_of_tce(tce) >> PAGE_SHIFT not in shared:
                    traffic.private.append((ioba, gpa_of_tce(tce)))
        elif envelope.number == H_STUFF_TCE.number and direction == "in":
            assert not body[-2] & PERMISSION_MASK
        elif envelope.number == UV_RETURN.number and direction == "out" and body[1] in asked:
            assert body[0] == HCode.H_SUCCESS, f"kvm refused the TCE {asked[body[1]]}"
    return traffic


async def check_pages_are_shared(running: RunningCluster, traffic: Traffic) -> None:
    """The pages that the device was given are shared in the ultravisor's own account, too."""
    ultravisor = running.process("alpha/ultravisor")
    for gfn in {gpa >> PAGE_SHIFT for _, gpa, was_secure in traffic.stored if was_secure}:
        assert (await ultravisor.query("page.secure", {"vm": "vm1", "gpa": gpa_of(gfn)}))["state"] == "SHARED"


async def bounced_bytes(running: RunningCluster) -> int:
    found = re.search(r"bounced_bytes=(\d+)", await running.vm("vm1").console_command("pages"))
    return int(found[1]) if found else 0
