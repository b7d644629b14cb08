"""A UV_ESM that is refused: the VM goes on as a normal one, and only the operator learns why."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa

from protocol.geometry import PAGE_BYTES
from shared.esm_crypto import public_pem
from shared.esm_digest import RTAS_TEXT, SecureImage, digests_of
from shared.esm_make import BlobContents, Holder, make_blob
from tests.cluster.svm_rig import Rig, change_in_place, changed_pages, page_digests, svm_rig

QUIET = "quiet-boot-of-vm1"
"""A command line without `svm=on`: the VM stays at its prompt until it is told to turn secure."""
KERNEL_BASE = 16 << 20
HEADER_PADDING = 60_000
"""An offset in the image's header page that only the digest covers."""


async def expect_refusal(rig: Rig, reason: str) -> None:
    """`esm` at the prompt fails, nothing of the VM's memory has changed, the VM answers, the operator has `reason`."""
    marked = await rig.free_gfn()
    assert await rig.ask(f"fill {marked} 0x5a") == "ok"
    marked_sum = await rig.ask(f"sum {marked}")
    ram = rig.ram()
    before, since = page_digests(ram), await rig.console_end()

    answer = await rig.ask("esm")

    assert answer == "error U_PARAMETER"
    assert changed_pages(before, page_digests(ram)) == set()
    assert await rig.ask(f"sum {marked}") == marked_sum
    assert (await rig.ask("pages")).startswith("ok free=")
    assert await rig.page_state(KERNEL_BASE // PAGE_BYTES) == ("NORMAL", "NORMAL")
    row = await rig.vm.row()
    assert (row.state, row.secure, row.pages["normal"]) == ("running", False, 1024)
    outcome = await rig.last_esm()
    assert outcome["outcome"] == "refused"
    assert re.search(reason, outcome["reason"])
    assert rig.audit("esm-refused")[-1].facts["reason"] == outcome["reason"]
    assert not re.search(reason, await rig.printed(since))
    assert await rig.account() == 0


def flip(at: Callable[[bytes], int]) -> Callable[[Rig], None]:
    """Change one bit of guest RAM, at the offset that `at` finds."""

    def change(rig: Rig) -> None:
        ram = rig.ram()
        ram[at(ram[:])] ^= 1

    return change


def in_the_kernel(_ram: bytes) -> int:
    return KERNEL_BASE + HEADER_PADDING


def in_the_rtas_code(ram: bytes) -> int:
    return ram.index(RTAS_TEXT) + 7


def change_the_initramfs(rig: Rig) -> None:
    ram, content = rig.ram(), rig.file("initrd").read_bytes()
    at = ram.find(content[:64])
    assert at >= 0
    ram[at + len(content) - 1] ^= 0x80


def change_the_command_line(rig: Rig) -> None:
    ram = rig.ram()
    at = ram.find(QUIET.encode() + b"\0")
    assert at >= 0
    while at >= 0:
        ram[at] = ord("Q")
        at = ram.find(QUIET.encode() + b"\0", at)


def spoil_the_device_trees(rig: Rig) -> None:
    ram = rig.ram()
    for at in range(0, len(ram), PAGE_BYTES):
        if ram[at : at + 4] == b"\xd0\x0d\xfe\xed":
            ram[at + 8 : at + 12] = b"\xff\xff\xff\xf0"


def remove_the_blob(rig: Rig) -> None:
    ram = rig.ram()
    at = ram.find(b"opt/ibm/pef/")
    assert at >= 0
    ram[at : at + 3] = b"tmp"


TAMPERED: dict[str, tuple[Callable[[Rig], None], str]] = {
    "kernel": (flip(in_the_kernel), "^kernel digest differs$"),
    "initramfs": (change_the_initramfs, "^initrd digest differs$"),
    "RTAS code": (flip(in_the_rtas_code), "^rtas digest differs$"),
    "command line": (change_the_command_line, "^bootargs digest differs$"),
    "device tree": (spoil_the_device_trees, "^device tree: "),
    "no blob": (remove_the_blob, "blob"),
}


async def test_each_part_that_was_changed_is_refused_and_the_vm_goes_on(tmp_path: Path) -> None:
    async with svm_rig(tmp_path, command_line=QUIET) as rig:
        for tamper, reason in TAMPERED.values():
            tamper(rig)
            await expect_refusal(rig, reason)
            await rig.booted(await rig.reset())


async def test_a_refused_vm_turns_secure_once_the_fault_is_repaired(tmp_path: Path) -> None:
    async with svm_rig(tmp_path, command_line=QUIET) as rig:
        flip(in_the_kernel)(rig)
        await expect_refusal(rig, "^kernel digest differs$")
        flip(in_the_kernel)(rig)

        since = await rig.console_end()
        await rig.vm.console_write(b"esm\r")
        text = await rig.booted(since)

        assert "secure=1" in text
        assert (await rig.last_esm())["outcome"] == "secure"


async def test_a_blob_for_another_machine_is_refused(tmp_path: Path) -> None:
    async with svm_rig(tmp_path, command_line=QUIET) as rig:
        image, initrd = rig.file("image").read_bytes(), rig.file("initrd").read_bytes()
        owner, stranger = (Holder(public_pem(rsa.generate_private_key(65537, 2048))) for _ in range(2))
        digests = digests_of(SecureImage(RTAS_TEXT, image, initrd, QUIET.encode()))
        blob = make_blob(BlobContents(origin=owner, recipients=[stranger], digests=digests))
        change_in_place(rig.file("blob"), lambda data: data.__setitem__(slice(None), blob))
        await rig.booted(await rig.reset())

        await expect_refusal(rig, "^no lockbox for this machine$")


async def test_a_vm_that_does_not_fit_into_secure_memory_stays_normal(tmp_path: Path) -> None:
    async with svm_rig(tmp_path, command_line=QUIET, secure_memory="32M") as rig:
        await expect_refusal(rig, "secure memory")


async def test_a_vm_that_may_not_turn_secure_stays_normal(tmp_path: Path) -> None:
    async with svm_rig(tmp_path, command_line=QUIET, secure=False) as rig:
        await expect_refusal(rig, "H_SVM_INIT_START returned H_AUTHORITY")


async def test_the_boot_stage_goes_on_as_a_normal_vm_when_it_is_refused(tmp_path: Path) -> None:
    async with svm_rig(tmp_path) as rig:
        assert (await rig.vm.row()).secure
        change_in_place(rig.file("image"), lambda data: data.__setitem__(HEADER_PADDING, 1))

        text = await rig.booted(await rig.reset())

        assert "pefbox: UV_ESM failed: U_PARAMETER; going on as a normal VM" in text
        assert "pefbox: kernel prompt secure=0" in text
        assert not (await rig.vm.row()).secure
        assert (await rig.last_esm())["reason"] == "kernel digest differs"
        assert await rig.account() == 0


async def test_a_second_esm_of_a_secure_vm_is_answered_with_retry_and_changes_nothing(tmp_path: Path) -> None:
    async with svm_rig(tmp_path) as rig:
        used, esm_lines = await rig.account(), len(rig.audit("esm"))

        assert await rig.ask("esm") == "error U_RETRY"

        assert (await rig.vm.row()).secure
        assert await rig.account() == used
        assert len(rig.audit("esm")) == esm_lines
        assert (await rig.ask("pages")).startswith("ok free=")
