"""A kernel with its initial RAM disk and command line, and the ESM blob by which they turn secure on a host of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from deploy.cluster_file import VmSpec
from deploy.linux.config import findings_for_secure
from protocol.errors import UserError
from services.ultravisor.identity import ensure_keys, public_key_of
from shared.elf_program import Program, read_program
from shared.esm_crypto import WRAPPING_KEY_BITS
from shared.esm_digest import RTAS_TEXT, SecureImage, digests_of
from shared.esm_make import Attachment, BlobContents, Holder, make_blob
from shared.migration_policy import POLICY_FILE

_OWNER_FILE = "blob-owner.pub"


class BootParts(msgspec.Struct, frozen=True, kw_only=True):
    """What an ESM blob measures of a VM beside RTAS. `program` is an ELF file: Linux's vmlinux or a program."""

    program: Path
    initrd: Path | None = None
    command_line: str = ""


def read_file(path: Path) -> bytes:
    """A user's file; raises UserError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def read_program_file(path: Path) -> Program:
    """The program in the file; raises UserError with the one line that says what is wrong with it."""
    try:
        return read_program(read_file(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def parts_blob(
    parts: BootParts, program: Program, state_dir: Path, hosts: Sequence[str], files: Sequence[Attachment] = ()
) -> bytes:
    """The ESM blob for `parts`, whose `program` was read before, on `hosts` of the cluster with that state directory.

    Raises UserError for a program that cannot be a secure VM's.
    """
    if program.entry != program.base:
        raise UserError(f"{parts.program}: a secure program starts at its first byte; its entry is elsewhere")
    for finding in findings_for_secure(read_file(parts.program)):
        raise UserError(f"{parts.program}: {finding}")
    initrd = b"" if parts.initrd is None else read_file(parts.initrd)
    image = SecureImage(RTAS_TEXT, program.image, initrd, parts.command_line.encode())
    return hosts_blob(image, state_dir, hosts, files)


def policy_file(vm: VmSpec) -> Attachment:
    """What the blob of `vm` says about where it may go (docs/migration.md)."""
    return Attachment(POLICY_FILE, msgspec.json.encode(vm.migration))


def hosts_blob(image: SecureImage, state_dir: Path, hosts: Sequence[str], files: Sequence[Attachment] = ()) -> bytes:
    """The ESM blob for an image, for the machine keys of `hosts`, owned by nobody who could open it."""
    for host in hosts:
        ensure_keys(state_dir, host)
    contents = BlobContents(
        origin=Holder(_owner_key(state_dir)),
        recipients=[Holder(public_key_of(state_dir, host)) for host in hosts],
        digests=digests_of(image),
        files=files,
    )
    return make_blob(contents)


def _owner_key(state_dir: Path) -> bytes:
    """The public key of the blobs' owner, made at the first use; its private half is kept nowhere."""
    path = state_dir / _OWNER_FILE
    if path.is_file():
        return path.read_bytes()
    key = generate_private_key(public_exponent=65537, key_size=WRAPPING_KEY_BITS).public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.write_bytes(pem)
    return pem
