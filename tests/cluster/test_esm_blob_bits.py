"""One bit of an ESM blob is changed, from the file on the host's disk to the guest's UV_ESM.

`tests/unit/test_esm_blob.py` flips every bit of a blob; here is a sample of each part that the format authenticates,
and each part that it leaves open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.esm_blob import parse_blob
from tests.cluster.svm_rig import Rig, change_in_place, svm_rig

QUIET = "quiet-boot-of-vm1"


@dataclass(frozen=True)
class Flip:
    """One bit of the blob file: byte offset, bit, and what it belongs to."""

    what: str
    offset: int
    bit: int


def authenticated(blob: bytes) -> Iterator[Flip]:
    """First, middle and last byte of every value that decides whether the blob opens, each with another bit."""
    parsed = parse_blob(blob)
    (box,) = [box for box in parsed.lockboxes if box.name == "lockbox-1"]
    values = {"lockbox-1 key": box.encrypted_symkey}
    for name, sealed in {"digests": parsed.digests, **parsed.files}.items():
        values |= {f"{name} iv": sealed.iv, f"{name} mac": sealed.mac, f"{name} ciphertext": sealed.ciphertext}
    for number, (what, value) in enumerate(values.items()):
        start = blob.index(value)
        for at in {0, len(value) // 2, len(value) - 1}:
            yield Flip(what, start + at, (number + at) % 8)
    yield Flip("magic", 0, 0)
    yield Flip("compatible", blob.index(b"ibm,esm\0"), 0)
    yield Flip("name of the digests", blob.index(b"digests-fdt"), 1)


def open_to_anybody(blob: bytes) -> Iterator[Flip]:
    """The values that the format leaves open (docs/esm.md says why each is harmless)."""
    parsed = parse_blob(blob)
    for box in parsed.lockboxes:
        yield Flip(f"{box.name} fingerprint", blob.index(box.fingerprint), 3)
    (origin,) = [box for box in parsed.lockboxes if box.name == "origin-lockbox"]
    yield Flip("key wrapped for the owner", blob.index(origin.encrypted_symkey) + 100, 5)
    yield Flip("number of the boot processor", 28, 0)


async def boot_with(rig: Rig, flip: Flip) -> None:
    """Change the file, reset the machine, wait for the prompt; the file is as before afterwards."""

    def change(data: bytearray) -> None:
        data[flip.offset] ^= 1 << flip.bit

    change_in_place(rig.file("blob"), change)
    await rig.booted(await rig.reset())
    change_in_place(rig.file("blob"), change)


async def test_a_changed_bit_of_an_authenticated_part_is_refused(tmp_path: Path) -> None:
    async with svm_rig(tmp_path, command_line=QUIET) as rig:
        flips = list(authenticated(rig.file("blob").read_bytes()))
        assert len(flips) >= 20
        for number, flip in enumerate(flips):
            await boot_with(rig, flip)

            assert await rig.ask("esm") == "error U_PARAMETER", flip

            assert (await rig.last_esm())["outcome"] == "refused"
            refusals = rig.audit("esm-refused")
            assert len(refusals) == number + 1
            assert refusals[-1].facts["reason"]
            assert (await rig.ask("pages")).startswith("ok free=")
        assert await rig.account() == 0
        assert not rig.audit("esm")


async def test_a_changed_bit_that_the_format_leaves_open_changes_nothing(tmp_path: Path) -> None:
    async with svm_rig(tmp_path, command_line=QUIET) as rig:
        for flip in open_to_anybody(rig.file("blob").read_bytes()):
            await boot_with(rig, flip)

            since = await rig.console_end()
            await rig.vm.console_write(b"esm\r")

            assert "secure=1" in await rig.booted(since), flip
