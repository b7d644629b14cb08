"""The kernel image file: what the ultravisor measures is what decides which kernel runs, and how.

| offset  | field                                                                  |
|---------|------------------------------------------------------------------------|
| 0       | magic `PEFMODEL`                                                       |
| 8       | version, header bytes (u32 each, big-endian), payload bytes (u64)      |
| 24      | SHA-512 of the model's sources (64 bytes)                              |
| 88      | length (u32) and JSON of workload and options                          |
| 65536   | payload: the sources themselves, padded to whole 64 KiB pages          |
"""

from __future__ import annotations

import functools
import hashlib
import struct
from pathlib import Path

import msgspec

from protocol.errors import ImageRefused
from protocol.geometry import PAGE_BYTES
from services.guest.model.state import Workload
from shared.dma_designs import DmaDesign

MAGIC = b"PEFMODEL"
VERSION = 1
HEADER = struct.Struct(">8sIIQ64sI")
HEADER_BYTES = PAGE_BYTES
MAX_SETTINGS_BYTES = 4096
MAX_PAYLOAD_BYTES = 16 << 20

Option = str | int | bool


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an image tells the kernel to run."""

    workload: Workload = Workload.PROMPT
    options: dict[str, Option] = {}


class ImageHeader(msgspec.Struct, frozen=True):
    """A decoded header."""

    sources_sha512: bytes
    payload_bytes: int
    settings: Settings


OPTIONS: dict[str, type] = {
    "dma": str,
    "dma_mask": int,
    "dma_offset": int,
    "poke_unchecked": bool,
    "vfio_rule": bool,
    "quiesce": bool,
    "balloon_quirk": bool,
    "swiotlb_slots": int,
    "swiotlb_areas": int,
    "page_cache": bool,
    "disk_ops": int,
    "seed": int,
}
"""The options an image may carry, and their types (docs/model-kernel.md says what they do)."""


@functools.cache
def sources() -> bytes:
    """The model's source files, each with its name, in the order of their names."""
    parts = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_bytes()
        parts.append(b"%s %d\n" % (path.name.encode(), len(text)) + text)
    return b"".join(parts)


@functools.cache
def sources_digest() -> bytes:
    """SHA-512 of `sources`."""
    return hashlib.sha512(sources()).digest()


def check_options(options: dict[str, Option]) -> None:
    """Raise ImageRefused for an option that does not exist or has a wrong type or value."""
    for name, value in options.items():
        kind = OPTIONS.get(name)
        if kind is None or type(value) is not kind:
            raise ImageRefused(f"option {name}={value!r}: allowed are {', '.join(OPTIONS)}")
    dma = options.get("dma", DmaDesign.QUIRK)
    if dma not in list(DmaDesign):
        raise ImageRefused(f"option dma={dma!r}: allowed are {', '.join(DmaDesign)}")


def build_image(workload: str, options: dict[str, Option] | None = None) -> bytes:
    """An image of this kernel that runs `workload`; whole 64 KiB pages. Raises ImageRefused for bad settings."""
    try:
        settings = Settings(workload=Workload(workload), options=dict(options or {}))
    except ValueError:
        raise ImageRefused(f"workload {workload!r}: allowed are {', '.join(Workload)}") from None
    check_options(settings.options)
    text = msgspec.json.encode(settings, order="sorted")
    if len(text) > MAX_SETTINGS_BYTES:
        raise ImageRefused("the settings of the image are too long")
    payload = sources()
    payload += bytes(-len(payload) % PAGE_BYTES)
    header = HEADER.pack(MAGIC, VERSION, HEADER_BYTES, len(sources()), sources_digest(), len(text)) + text
    return header.ljust(HEADER_BYTES, b"\0") + payload


def parse_header(data: bytes) -> ImageHeader:
    """The header at the beginning of `data`; raises ImageRefused."""
    if len(data) < HEADER.size:
        raise ImageRefused("the image is too short")
    magic, version, header_bytes, payload_bytes, digest, n_text = HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION or header_bytes != HEADER_BYTES:
        raise ImageRefused("not an image of the model kernel of this version")
    if payload_bytes > MAX_PAYLOAD_BYTES or n_text > MAX_SETTINGS_BYTES or HEADER.size + n_text > len(data):
        raise ImageRefused("the header of the image does not hold")
    try:
        settings = msgspec.json.decode(data[HEADER.size : HEADER.size + n_text], type=Settings)
    except msgspec.MsgspecError as error:
        raise ImageRefused(f"the settings of the image: {error}") from None
    check_options(settings.options)
    return ImageHeader(digest, payload_bytes, settings)
