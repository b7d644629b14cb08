"""The kernel as it lies in memory: what `objcopy -O binary -S vmlinux` writes and the kernel digest covers."""

from __future__ import annotations

import io
import zlib
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile

MAX_KERNEL_BYTES = 1 << 30

_ELF_MAGIC = b"\x7fELF"


def kernel_image(data: bytes) -> bytes:
    """The flat image of an ELF file; anything else is taken to be flat already.

    Loaded sections lie at their load addresses relative to the lowest, gaps are zero, sections without content
    (.bss) are left out. Raises ValueError with the reason.
    """
    if not data.startswith(_ELF_MAGIC):
        return data
    try:
        return _flatten(ELFFile(io.BytesIO(data)))
    except (ELFError, ValueError, LookupError, TypeError, AttributeError, OverflowError, zlib.error) as error:
        raise ValueError(f"the ELF file does not hold: {error}") from None


def _flatten(elf: Any) -> bytes:  # noqa: ANN401  (pyelftools has no types)
    loads = [segment.header for segment in elf.iter_segments("PT_LOAD")]
    relocated = any(segment["p_paddr"] for segment in elf.iter_segments()) or len(loads) <= 1
    parts: list[tuple[int, bytes]] = []
    for section in elf.iter_sections():
        if not section["sh_flags"] & SH_FLAGS.SHF_ALLOC or section["sh_type"] == "SHT_NOBITS" or not section["sh_size"]:
            continue
        address = _load_address(section, loads) if relocated else section["sh_addr"]
        parts.append((address, section.data()))
    if not parts:
        raise ValueError("it has no loaded section")
    return _lay_out(parts)


def _load_address(section: Any, loads: list[Any]) -> int:  # noqa: ANN401
    offset, n_bytes = section["sh_offset"], section["sh_size"]
    for load in loads:
        if load["p_offset"] <= offset and offset + n_bytes <= load["p_offset"] + load["p_filesz"]:
            return int(load["p_paddr"] + offset - load["p_offset"])
    return int(section["sh_addr"])


def _lay_out(parts: list[tuple[int, bytes]]) -> bytes:
    lowest = min(address for address, _ in parts)
    n_bytes = max(address + len(content) for address, content in parts) - lowest
    if n_bytes > MAX_KERNEL_BYTES:
        raise ValueError(f"its sections span {n_bytes} bytes; at most {MAX_KERNEL_BYTES} are taken")
    image = bytearray(n_bytes)
    for address, content in parts:
        image[address - lowest : address - lowest + len(content)] = content
    return bytes(image)
