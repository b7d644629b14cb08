"""A virtio-rng lent to a process of the guest, whose driver gives it the address of a kernel page: who stops that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.api import Vm, cluster
from tests.cluster.vm_files import PROMPT, VmFiles, answer_of, console_until, make_vm_files

N_BYTES = 4096
ALL_OF_MEMORY = "reaches all of memory"
REFUSED, INTACT, OVERWRITTEN = "refused", "intact", "overwritten"
NORMAL = 'command_line = "svm=off"\n'


@dataclass(frozen=True)
class Offer:
    """What the device offers, what becomes of it with the kernel's rule and without, what the process takes then."""

    name: str
    lines: str
    ruled: str
    unruled: str
    taken: str
    reason: str = ""


OFFERS = [
    Offer("nothing", "", REFUSED, OVERWRITTEN, "no bit", "the device does not offer ACCESS_PLATFORM"),
    Offer("no-translation", "no_translation = true", REFUSED, OVERWRITTEN, "no bit", "does not offer ACCESS_PLATFORM"),
    Offer("demanded", "access_platform = true", INTACT, INTACT, "ACCESS_PLATFORM"),
    Offer(
        "optional", 'access_platform = "optional"', REFUSED, OVERWRITTEN, "no bit", "serves a driver that takes no bit"
    ),
    Offer(
        "demanded-or-untranslated",
        "access_platform = true\nno_translation = true",
        REFUSED,
        OVERWRITTEN,
        "NO_TRANSLATION",
        "serves a driver that takes NO_TRANSLATION",
    ),
]


def make_files(directory: Path, lines: str, *, rule: bool, guest: str = NORMAL) -> VmFiles:
    device = f'\n[[vms.vm1.devices]]\nkind = "virtio-rng"\n{lines}\n'
    options = "" if rule else "options = { vfio_rule = false }\n"
    return make_vm_files(directory, guest=guest + options, extra=device)


async def ask(vm: Vm, line: str) -> str:
    return answer_of(await vm.console_command(line))


def check_outcome(answer: str, offer: Offer, outcome: str) -> None:
    if outcome == REFUSED:
        assert answer.startswith("ok refused: ")
        assert offer.reason in answer
        return
    assert answer.endswith(f"; the process took {offer.taken}")
    if outcome == INTACT:
        assert answer.startswith("ok own buffer filled, canary intact; ")
        return
    found = re.match(r"ok own buffer filled, canary overwritten (\d+) bytes, (a5){8} is ([0-9a-f]{16});", answer)
    assert found, answer
    # A random byte may be what the canary has.
    assert N_BYTES - 100 < int(found[1]) <= N_BYTES
    assert found[3] != "a5" * 8


@pytest.mark.parametrize("rule", [True, False], ids=["rule", "no-rule"])
@pytest.mark.parametrize("offer", OFFERS, ids=[offer.name for offer in OFFERS])
async def test_what_a_driver_of_a_process_does_to_a_page_that_was_never_mapped(
    tmp_path: Path, offer: Offer, rule: bool
) -> None:
    files = make_files(tmp_path, offer.lines, rule=rule)
    outcome = offer.ruled if rule else offer.unruled
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)

        # Twice: the kernel's driver has the device in between, and leaves nothing mapped.
        for _ in range(2):
            check_outcome(await ask(vm, "vfio"), offer, outcome)
            assert (await ask(vm, "rng 4096")).startswith("ok 4096 ")
        assert await ask(vm, "hash") == f"ok {files.sha256()} {files.layout.size_bytes}"

        faults = [line for line in vm.qemu.log().splitlines() if "device fault" in line and "may not write" in line]
        assert len(faults) == (2 if outcome == INTACT else 0)
        assert "Traceback" not in vm.qemu.log()


async def test_a_device_is_not_lent_while_the_kernel_maps_buffers_of_another_beside_it(tmp_path: Path) -> None:
    """What the kernel maps for its disk is in the process's reach: they share a table."""
    files = make_files(tmp_path, "", rule=True, guest=NORMAL + 'dma = "iommu-always"\n')
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)

        assert await ask(vm, "vfio") == "ok refused: the disk of the kernel uses the same DMA window"


@pytest.mark.parametrize("design", ["ddw-identity", "identity-address"])
async def test_a_device_is_not_lent_whose_window_has_all_of_memory(tmp_path: Path, design: str) -> None:
    files = make_files(tmp_path, "", rule=True, guest=NORMAL + f'dma = "{design}"\n')
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)

        assert await ask(vm, "vfio") == "ok refused: all of memory is mapped in the DMA window"
        assert (await ask(vm, "rng 4096")).startswith("ok 4096 ")


@pytest.mark.parametrize("design", ["ddw-identity", "identity-address"])
async def test_a_window_that_has_all_of_memory_protects_none_of_it(tmp_path: Path, design: str) -> None:
    files = make_files(tmp_path, "", rule=False, guest=NORMAL + f'dma = "{design}"\n')
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)

        check_outcome(await ask(vm, "vfio"), OFFERS[2], OVERWRITTEN)


@pytest.mark.parametrize("lines", ["", "access_platform = true"], ids=["untranslated", "translated"])
async def test_in_a_secure_vm_nothing_is_lent_to_a_process(tmp_path: Path, lines: str) -> None:
    files = make_files(tmp_path, lines, rule=True, guest="")
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)

        answer = await ask(vm, "vfio")

        assert answer.startswith("ok refused: the pages of a process are private in a secure VM")
        assert (await ask(vm, "rng 4096")).startswith("ok 4096 ")
        assert await ask(vm, "hash") == f"ok {files.sha256()} {files.layout.size_bytes}"
        assert (await vm.row()).secure


@pytest.mark.parametrize("lines", ["", "access_platform = true"], ids=["untranslated", "translated"])
async def test_without_the_rule_a_process_ends_its_secure_vm(tmp_path: Path, lines: str) -> None:
    """The device writes a flag of the ring over the image of a private page, which then fails its check."""
    files = make_files(tmp_path, lines, rule=False, guest="")
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)

        await vm.console_write(b"vfio\r")

        row = await vm.wait(lambda row: row.state == "failed", "failed")
        assert "page-integrity" in row.reason
        assert "Traceback" not in vm.qemu.log()
