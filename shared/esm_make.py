"""Makes ESM blobs: everything as bytes, no files.

Source: open-power/svm-tools `svm_tool/esm/esm.py` (create, authorize, digest, attach in one step).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shared.esm_blob import (
    MAX_BLOB_BYTES,
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_LOCKBOXES,
    Digests,
    EsmBlob,
    Lockbox,
    Sealed,
    encode_blob,
    encode_digests,
)
from shared.esm_crypto import fingerprint, load_public_key, new_symkey, seal, wrap

_NODE_NAME = re.compile(r"[A-Za-z][0-9A-Za-z,._+-]{0,30}")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who may open a blob: an RSA-2048 public key as the bytes of its PEM file."""

    public_pem: bytes
    comment: str = ""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that the secure VM may read once with UV_ESMB_GET_FILE."""

    name: str
    content: bytes
    comment: str = ""


@dataclass(frozen=True, slots=True)
class BlobContents:
    """What goes into a blob. `origin` is its owner, `recipients` are the machines that may run it."""

    origin: Holder
    recipients: Sequence[Holder]
    digests: Digests
    files: Sequence[Attachment] = ()
    digests_comment: str = ""


def make_blob(contents: BlobContents) -> bytes:
    """A blob under a fresh key; raises ValueError with the reason when something does not fit the format."""
    _check(contents)
    symkey = new_symkey()
    holders = [("origin-lockbox", contents.origin)]
    holders += [(f"lockbox-{number}", holder) for number, holder in enumerate(contents.recipients, start=1)]
    files: dict[str, Sealed] = {}
    for file in contents.files:
        files[file.name] = seal(symkey, file.content, file.comment)
    digests = seal(symkey, encode_digests(contents.digests), contents.digests_comment)
    data = encode_blob(EsmBlob(tuple(_lockbox(name, holder, symkey) for name, holder in holders), digests, files))
    if len(data) > MAX_BLOB_BYTES:
        raise ValueError(f"the blob has {len(data)} bytes; at most {MAX_BLOB_BYTES} are taken")
    return data


def _lockbox(name: str, holder: Holder, symkey: bytes) -> Lockbox:
    key = load_public_key(holder.public_pem)
    return Lockbox(name, wrap(key, symkey), fingerprint(holder.public_pem), holder.comment)


def _check(contents: BlobContents) -> None:
    if len(contents.recipients) >= MAX_LOCKBOXES:
        raise ValueError(f"{len(contents.recipients)} recipients; at most {MAX_LOCKBOXES - 1} are taken")
    prints = [fingerprint(holder.public_pem) for holder in (contents.origin, *contents.recipients)]
    if len(set(prints)) != len(prints):
        raise ValueError("a key occurs twice among origin and recipients")
    if len(contents.files) > MAX_FILES:
        raise ValueError(f"{len(contents.files)} files; at most {MAX_FILES} are taken")
    seen: set[str] = set()
    for file in contents.files:
        if not _NODE_NAME.fullmatch(file.name):
            raise ValueError(f"file name {file.name!r}: a letter, then up to 30 of letters, digits and , . _ + -")
        if file.name in seen:
            raise ValueError(f"file name {file.name!r} occurs twice")
        if len(file.content) > MAX_FILE_BYTES:
            raise ValueError(f"file {file.name!r} has {len(file.content)} bytes; at most {MAX_FILE_BYTES} are taken")
        seen.add(file.name)
    if not 0 < contents.digests.kernel_size_bytes < 1 << 32:
        raise ValueError(f"a kernel of {contents.digests.kernel_size_bytes} bytes does not fit the format")
    for comment in _comments(contents):
        if "\n" in comment or "\0" in comment:
            raise ValueError(f"comment {comment!r} has a newline or NUL")


def _comments(contents: BlobContents) -> list[str]:
    holders = [holder.comment for holder in (contents.origin, *contents.recipients)]
    return [contents.digests_comment, *holders, *(file.comment for file in contents.files)]
