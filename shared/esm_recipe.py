"""The YAML list that `svm-tool esm make` takes: what goes into a blob, by file names.

    - origin: {pubkey: owner.pub, seckey: owner.pem}
    - recipient: {pubkey: machine.pub}
    - digest: {args: "svm=on root=/dev/vda", initramfs: initrd.img, kernel: vmlinux}
    - file: {name: crypttab, path: secret.key}

Each item may have a `comment`. Source: open-power/svm-tools `svm_tool/esm/esm.py`, `tests/cfg_files/svm_blob.yml`.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TypeVar

import msgspec

T = TypeVar("T")


class _Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    comment: str = ""


class Origin(_Item, frozen=True):
    """The owner's key pair; the secret key proves that the owner can open the blob again."""

    pubkey: str
    seckey: str


class Recipient(_Item, frozen=True):
    """A machine that may run the image."""

    pubkey: str


class Digest(_Item, frozen=True):
    """The measured image. `kernel` is an ELF file or a flat image, `initramfs` the one behind the blob's archive."""

    args: str
    initramfs: str
    kernel: str


class File(_Item, frozen=True):
    """A file for the secure VM; its name is the path's last part when none is given."""

    path: str
    name: str = ""

    @property
    def node_name(self) -> str:
        """The name under which the secure VM asks for it."""
        return self.name or PurePath(self.path).name


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    origin: Origin | None = None
    recipient: Recipient | None = None
    digest: Digest | None = None
    file: File | None = None

    def kinds(self) -> list[str]:
        return [kind for kind in self.__struct_fields__ if getattr(self, kind) is not None]


class Recipe(msgspec.Struct, frozen=True):
    """A whole list: one origin, one digest, any number of recipients and files in their order."""

    origin: Origin
    digest: Digest
    recipients: tuple[Recipient, ...]
    files: tuple[File, ...]


def parse_recipe(text: bytes) -> Recipe:
    """The recipe; raises ValueError with one line that says what is wrong and where."""
    try:
        entries = msgspec.yaml.decode(text, type=list[_Entry])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    for number, entry in enumerate(entries, start=1):
        if len(entry.kinds()) != 1:
            raise ValueError(f"item {number}: exactly one of origin, recipient, digest, file is wanted")
    return Recipe(
        origin=_only([entry.origin for entry in entries if entry.origin is not None], "origin"),
        digest=_only([entry.digest for entry in entries if entry.digest is not None], "digest"),
        recipients=tuple(entry.recipient for entry in entries if entry.recipient is not None),
        files=tuple(entry.file for entry in entries if entry.file is not None),
    )


def _only(items: list[T], kind: str) -> T:
    if len(items) != 1:
        raise ValueError(f"{len(items)} items of kind {kind}; exactly one is wanted")
    return items[0]
