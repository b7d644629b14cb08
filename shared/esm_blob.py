"""The ESM blob: what the owner of a secure image sends along so that an ultravisor can check it.

A device tree with root compatible "ibm,esm" and three nodes:

    /lockboxes/origin-lockbox, lockbox-1 ...   the symmetric key, wrapped for the owner and for each machine
    /digest/digests-fdt                        the sealed digests, themselves a device tree
    /file  files-fdt = a device tree           the sealed files that the secure VM may read once

Source: open-power/svm-tools `svm_tool/esm/esm.py`, `svm_tool/esm_digest/esm_digest.py`. A blob comes from whoever
runs the host: everything here refuses with ImageRefused what does not hold, and nothing it returns was
authenticated. `docs/esm.md` lists what the format leaves open.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from protocol.errors import GuestFault, ImageRefused
from shared.fdt_reader import FdtLimits, FdtNode, FdtTree, read_fdt
from shared.fdt_writer import write_fdt

COMPATIBLE = "ibm,esm"
FILES_COMPATIBLE = "ibm,esm-file"
SEAL_ALGORITHM = "AES256-GCM"
FINGERPRINT_ALGORITHM = "SHA256"
DIGEST_ALGORITHM = "SHA512"

MAX_BLOB_BYTES = 4 << 20
MAX_FILE_BYTES = 64 << 10
MAX_FILES = 48
MAX_LOCKBOXES = 64
MAX_FILE_NAME_BYTES = 64
"""UV_ESMB_GET_FILE carries a name in eight registers."""
IV_BYTES = 16
"""svm-tool's library draws 16 bytes; 12 is what other tools take."""
MAC_BYTES = 16
FINGERPRINT_BYTES = 32
DIGEST_BYTES = 64

_LIMITS = FdtLimits(total_bytes=MAX_BLOB_BYTES, nodes=512, properties=2048, depth=8, reservations=16)
_ORIGIN = "origin-lockbox"
_LOCKBOX_NAME = re.compile(r"lockbox-[1-9][0-9]{0,8}")
_FILE_NAME = re.compile(r"[\x21-\x2e\x30-\x7e]{1,64}")


@dataclass(frozen=True, slots=True)
class Sealed:
    """Something encrypted and authenticated with AES-256-GCM under the blob's key; the comment is neither."""

    iv: bytes
    mac: bytes
    ciphertext: bytes
    comment: str = ""


@dataclass(frozen=True, slots=True)
class Lockbox:
    """The blob's key for the holder of one RSA key. `fingerprint` is SHA-256 of the public key's PEM file."""

    name: str
    encrypted_symkey: bytes
    fingerprint: bytes
    comment: str = ""


@dataclass(frozen=True, slots=True)
class EsmBlob:
    """A parsed blob; `files` by name. Lockboxes: the origin first, then by number."""

    lockboxes: tuple[Lockbox, ...]
    digests: Sealed
    files: Mapping[str, Sealed]


@dataclass(frozen=True, slots=True)
class Digests:
    """SHA-512 of each part of a secure image; `kernel_size_bytes` from kernel base are measured as kernel."""

    rtas: bytes
    kernel: bytes
    kernel_size_bytes: int
    initrd: bytes
    bootargs: bytes


def parse_blob(data: bytes | bytearray | memoryview) -> EsmBlob:
    """The parts of a blob; raises ImageRefused with the reason for any other bytes."""
    root = _read_tree(data, "ESM blob", COMPATIBLE)
    _expect_only(root, {"compatible"}, {"lockboxes", "digest", "file"}, "ESM blob")
    lockboxes, digest, file = (_child(root, name) for name in ("lockboxes", "digest", "file"))
    if not lockboxes.children:
        raise ImageRefused("ESM blob has no lockbox")
    if len(lockboxes.children) > MAX_LOCKBOXES:
        raise ImageRefused(f"ESM blob has more than {MAX_LOCKBOXES} lockboxes")
    _expect_only(digest, set(), {"digests-fdt"}, "digest")
    sealed_digests = digest.children.get("digests-fdt")
    if sealed_digests is None:
        raise ImageRefused("ESM blob has no digests")
    return EsmBlob(
        lockboxes=tuple(sorted(map(_parse_lockbox, lockboxes.children.values()), key=_lockbox_number)),
        digests=_parse_sealed(sealed_digests, "digests"),
        files=_parse_files(file),
    )


def encode_blob(blob: EsmBlob) -> bytes:
    """`blob` in the layout that svm-tool writes."""
    lockboxes = FdtNode("lockboxes", children={box.name: _encode_lockbox(box) for box in blob.lockboxes})
    digest = FdtNode("digest", children={"digests-fdt": _encode_sealed("digests-fdt", blob.digests)})
    file = FdtNode("file")
    if blob.files:
        file.properties["files-fdt"] = _encode_files(blob.files)
    children = {node.name: node for node in (lockboxes, digest, file)}
    return write_fdt(FdtTree(FdtNode("", {"compatible": _text(COMPATIBLE)}, children)))


def parse_digests(plain: bytes) -> Digests:
    """The digests from their decrypted tree; raises ImageRefused."""
    node = _child(_read_tree(plain, "digests", COMPATIBLE), "digests")
    _expect_text(node, "algorithm", DIGEST_ALGORITHM, "digests")
    size = _exact(node, "kernel-size", 4, "digests")
    return Digests(
        rtas=_exact(node, "rtas", DIGEST_BYTES, "digests"),
        kernel=_exact(node, "kernel", DIGEST_BYTES, "digests"),
        kernel_size_bytes=int.from_bytes(size, "big"),
        initrd=_exact(node, "initrd", DIGEST_BYTES, "digests"),
        bootargs=_exact(node, "bootargs", DIGEST_BYTES, "digests"),
    )


def encode_digests(digests: Digests) -> bytes:
    """The tree that is sealed into a blob; raises OverflowError for a kernel of 4 GiB or more."""
    node = FdtNode(
        "digests",
        {
            "algorithm": _text(DIGEST_ALGORITHM),
            "rtas": digests.rtas,
            "kernel": digests.kernel,
            "kernel-size": digests.kernel_size_bytes.to_bytes(4, "big"),
            "initrd": digests.initrd,
            "bootargs": digests.bootargs,
        },
    )
    return write_fdt(FdtTree(FdtNode("", {"compatible": _text(COMPATIBLE)}, {"digests": node})))


# -- reading --------------------------------------------------------------------------------------------------


def _read_tree(data: bytes | bytearray | memoryview, what: str, compatible: str) -> FdtNode:
    try:
        root = read_fdt(data, _LIMITS).root
    except GuestFault as fault:
        raise ImageRefused(f"{what}: {fault}") from None
    _expect_text(root, "compatible", compatible, what)
    return root


def _parse_lockbox(node: FdtNode) -> Lockbox:
    if node.name != _ORIGIN and not _LOCKBOX_NAME.fullmatch(node.name):
        raise ImageRefused(f"lockbox name {node.name!r} is none of the format")
    _expect_only(node, {"untrusted-comment", "encrypted-symkey"}, {"pubkey-fingerprint"}, node.name)
    fingerprint = _child(node, "pubkey-fingerprint")
    _expect_text(fingerprint, "algorithm", FINGERPRINT_ALGORITHM, node.name)
    return Lockbox(
        name=node.name,
        encrypted_symkey=_present(node, "encrypted-symkey", node.name),
        fingerprint=_exact(fingerprint, "hash", FINGERPRINT_BYTES, node.name),
        comment=_comment(node),
    )


def _lockbox_number(box: Lockbox) -> int:
    return 0 if box.name == _ORIGIN else int(box.name.removeprefix("lockbox-"))


def _parse_files(file: FdtNode) -> dict[str, Sealed]:
    _expect_only(file, {"files-fdt"}, set(), "file")
    # svm-tool writes files-fdt with the first file that is attached.
    if "files-fdt" not in file.properties:
        return {}
    root = _read_tree(file.properties["files-fdt"], "files", FILES_COMPATIBLE)
    _expect_only(root, {"compatible"}, {"files"}, "files")
    files = _child(root, "files")
    if len(files.children) > MAX_FILES:
        raise ImageRefused(f"ESM blob has more than {MAX_FILES} files")
    return {name: _parse_file(node) for name, node in files.children.items()}


def _parse_file(node: FdtNode) -> Sealed:
    if not _FILE_NAME.fullmatch(node.name):
        raise ImageRefused(f"file name {node.name!r} is longer than {MAX_FILE_NAME_BYTES} bytes or not printable")
    sealed = _parse_sealed(node, f"file {node.name}")
    if len(sealed.ciphertext) > MAX_FILE_BYTES:
        raise ImageRefused(f"file {node.name} is larger than {MAX_FILE_BYTES} bytes")
    return sealed


def _parse_sealed(node: FdtNode, what: str) -> Sealed:
    _expect_only(node, {"algorithm", "untrusted-comment", "ciphertext", "iv", "mac"}, set(), what)
    _expect_text(node, "algorithm", SEAL_ALGORITHM, what)
    iv = _present(node, "iv", what)
    if len(iv) not in (12, IV_BYTES):
        raise ImageRefused(f"{what}: iv of {len(iv)} bytes; 12 or {IV_BYTES} are known")
    return Sealed(
        iv=iv,
        # A shortened tag would be easier to forge, so its length is not for the blob to choose.
        mac=_exact(node, "mac", MAC_BYTES, what),
        ciphertext=_present(node, "ciphertext", what),
        comment=_comment(node),
    )


def _expect_only(node: FdtNode, properties: set[str], children: set[str], what: str) -> None:
    # As svm-tool does. What nobody knows is refused, so that a damaged name cannot pass for an absent part.
    for name in (*(node.properties.keys() - properties), *(node.children.keys() - children)):
        raise ImageRefused(f"{what}: {name!r} is no part of the format")


def _child(node: FdtNode, name: str) -> FdtNode:
    child = node.children.get(name)
    if child is None:
        raise ImageRefused(f"{node.name or 'ESM blob'}: the node {name!r} is missing")
    return child


def _present(node: FdtNode, name: str, what: str) -> bytes:
    value = node.properties.get(name)
    if value is None:
        raise ImageRefused(f"{what}: {name} is missing")
    return value


def _exact(node: FdtNode, name: str, n_bytes: int, what: str) -> bytes:
    value = _present(node, name, what)
    if len(value) != n_bytes:
        raise ImageRefused(f"{what}: {name} of {len(value)} bytes; {n_bytes} are expected")
    return value


def _expect_text(node: FdtNode, name: str, expected: str, what: str) -> None:
    if node.text(name) != expected:
        raise ImageRefused(f"{what}: {name} is not {expected!r}")


def _comment(node: FdtNode) -> str:
    raw = node.properties.get("untrusted-comment", b"").rstrip(b"\0")
    return raw.decode("utf-8", "backslashreplace")


# -- writing --------------------------------------------------------------------------------------------------


def _encode_lockbox(box: Lockbox) -> FdtNode:
    fingerprint = FdtNode("pubkey-fingerprint", {"algorithm": _text(FINGERPRINT_ALGORITHM), "hash": box.fingerprint})
    properties = {"untrusted-comment": _text(box.comment), "encrypted-symkey": box.encrypted_symkey}
    return FdtNode(box.name, properties, {fingerprint.name: fingerprint})


def _encode_files(files: Mapping[str, Sealed]) -> bytes:
    node = FdtNode("files", children={name: _encode_sealed(name, sealed) for name, sealed in files.items()})
    return write_fdt(FdtTree(FdtNode("", {"compatible": _text(FILES_COMPATIBLE)}, {"files": node})))


def _encode_sealed(name: str, sealed: Sealed) -> FdtNode:
    properties = {
        "algorithm": _text(SEAL_ALGORITHM),
        "untrusted-comment": _text(sealed.comment),
        "ciphertext": sealed.ciphertext,
        "iv": sealed.iv,
        "mac": sealed.mac,
    }
    return FdtNode(name, properties)


def _text(value: str) -> bytes:
    return value.encode() + b"\0"
