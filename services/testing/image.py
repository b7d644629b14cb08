"""A small secure image with its place in memory: RTAS, kernel, initial RAM disk with ESM blob, device tree."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from protocol.geometry import PAGE_BYTES, gpa_of
from shared.esm_crypto import WRAPPING_KEY_BITS, load_machine_key, public_pem
from shared.esm_digest import RTAS_TEXT, SecureImage, digests_of
from shared.esm_make import Attachment, BlobContents, Holder, make_blob
from shared.fdt_reader import FdtNode, FdtTree
from shared.fdt_writer import write_fdt
from shared.newc import prepend_blob

RTAS_GFN, KERNEL_GFN, INITRD_GFN, FDT_GFN = 1, 2, 6, 9
FIRST_FREE_GFN = 10
"""From here on no part of the image lies."""

_BOOTARGS = b"svm=on"


@dataclass(frozen=True, slots=True)
class PlayedImage:
    """Content by guest physical address; UV_ESM is called with `kbase` and `fdt_gpa`."""

    parts: dict[int, bytes]
    kernel: bytes
    kbase: int = gpa_of(KERNEL_GFN)
    fdt_gpa: int = gpa_of(FDT_GFN)

    @property
    def gfns(self) -> range:
        """The frames in which parts of the image lie, and the few between them."""
        return range(RTAS_GFN, FIRST_FREE_GFN)

    def with_byte_changed(self, gpa: int) -> PlayedImage:
        """The same image with one bit of the part at `gpa` flipped, which its blob does not allow."""
        part = bytearray(self.parts[gpa])
        part[len(part) // 2] ^= 1
        return replace(self, parts={**self.parts, gpa: bytes(part)})


def make_image(machine_key_pem: str, kernel: bytes, memory_bytes: int, files: dict[str, bytes]) -> PlayedImage:
    """An image for the machine with this key and a VM of this size; `files` are what UV_ESMB_GET_FILE hands out."""
    if len(kernel) > (INITRD_GFN - KERNEL_GFN) * PAGE_BYTES:
        raise ValueError(f"a kernel of {len(kernel)} bytes has no room in front of the initrd")
    initrd = b"initial RAM disk of a test".ljust(512, b".")
    archive = prepend_blob(initrd, _blob(machine_key_pem, SecureImage(RTAS_TEXT, kernel, initrd, _BOOTARGS), files))
    start = gpa_of(INITRD_GFN)
    parts = {
        gpa_of(RTAS_GFN): RTAS_TEXT,
        gpa_of(KERNEL_GFN): kernel,
        start: archive,
        gpa_of(FDT_GFN): _tree(start, start + len(archive), memory_bytes),
    }
    return PlayedImage(parts, kernel)


def _blob(machine_key_pem: str, image: SecureImage, files: dict[str, bytes]) -> bytes:
    owner = Holder(public_pem(generate_private_key(public_exponent=65537, key_size=WRAPPING_KEY_BITS)))
    machine = Holder(public_pem(load_machine_key(machine_key_pem.encode())))
    attached = [Attachment(name, content) for name, content in files.items()]
    return make_blob(BlobContents(owner, [machine], digests_of(image), attached))


def _tree(initrd_start: int, initrd_end: int, memory_bytes: int) -> bytes:
    chosen = {
        "bootargs": _BOOTARGS + b"\0",
        "linux,initrd-start": initrd_start.to_bytes(8, "big"),
        "linux,initrd-end": initrd_end.to_bytes(8, "big"),
    }
    children = [
        FdtNode("memory@0", {"reg": (0).to_bytes(8, "big") + memory_bytes.to_bytes(8, "big")}),
        FdtNode("rtas", {"linux,rtas-base": gpa_of(RTAS_GFN).to_bytes(4, "big")}),
        FdtNode("chosen", chosen),
    ]
    return write_fdt(FdtTree(FdtNode("", {}, {child.name: child for child in children})))
