"""A statically linked ELF program for a 64-bit POWER processor, as it lies in guest memory.

Bare-metal programs and Linux's vmlinux are both such files. The processor starts them in real mode, so what counts is
the load address of a segment (`p_paddr`), not where the program believes itself to be.
"""

from __future__ import annotations

import importlib
import io
from dataclasses import dataclass, replace
from typing import Any

MAX_PROGRAM_BYTES = 1 << 30

ELF_MAGIC = b"\x7fELF"
_INSTRUCTION_BYTES = 4
_MACHINE = "EM_PPC64"


def import_reader() -> None:
    """What `read_program` imports, for a process that may soon open no file: it is more than most programs need."""
    importlib.import_module("elftools.elf.elffile")


@dataclass(frozen=True, slots=True)
class Program:
    """`image` lies at `base`; up to `end` follow zeros. `entry` is where it starts, all guest physical addresses."""

    base: int
    image: bytes
    end: int
    entry: int
    little_endian: bool

    @property
    def content(self) -> bytes:
        """All that lies from `base` to `end`."""
        return self.image.ljust(self.end - self.base, b"\0")

    def moved_to(self, base: int) -> Program:
        """The same program somewhere else: right for one that finds out where it lies, as a relocatable kernel does."""
        by = base - self.base
        return replace(self, base=base, end=self.end + by, entry=self.entry + by)


def read_program(data: bytes) -> Program:
    """The program in an ELF file; raises ValueError with the reason in a few words."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    if not data.startswith(ELF_MAGIC):
        raise ValueError("is no ELF file")
    try:
        return _read(ELFFile(io.BytesIO(data)))
    except (ELFError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"is a broken ELF file: {error}") from None


def _read(elf: Any) -> Program:  # noqa: ANN401  (pyelftools has no types)
    machine = elf.header["e_machine"]
    if machine != _MACHINE:
        raise ValueError(f"is a program for {machine}, not for a 64-bit POWER processor ({_MACHINE})")
    if elf.header["e_type"] != "ET_EXEC":
        raise ValueError(f"is {elf.header['e_type']}, not a linked program at fixed addresses (ET_EXEC)")
    segments = [segment for segment in elf.iter_segments("PT_LOAD") if segment["p_memsz"]]
    if not segments:
        raise ValueError("has no segment to load")
    if any(segment["p_filesz"] > segment["p_memsz"] for segment in segments):
        raise ValueError("is a broken ELF file: a segment is longer in the file than in memory")
    base = min(segment["p_paddr"] for segment in segments)
    end = max(segment["p_paddr"] + segment["p_memsz"] for segment in segments)
    if end - base > MAX_PROGRAM_BYTES:
        raise ValueError(f"spans {end - base} bytes; at most {MAX_PROGRAM_BYTES} are taken")
    return Program(base, _flatten(segments, base), end, _entry(elf, segments), elf.little_endian)


def _flatten(segments: list[Any], base: int) -> bytes:
    image = bytearray(max(segment["p_paddr"] + segment["p_filesz"] for segment in segments) - base)
    for segment in segments:
        content = segment.data()
        if len(content) != segment["p_filesz"]:
            raise ValueError("is a broken ELF file: a segment is cut off")
        at = segment["p_paddr"] - base
        image[at : at + len(content)] = content
    return bytes(image)


def _entry(elf: Any, segments: list[Any]) -> int:  # noqa: ANN401
    entry = int(elf.header["e_entry"])
    if entry % _INSTRUCTION_BYTES:
        raise ValueError(f"starts at {entry:#x}, where no instruction can be")
    for segment in segments:
        offset = entry - segment["p_vaddr"]
        if 0 <= offset < segment["p_filesz"]:
            return int(segment["p_paddr"] + offset)
    raise ValueError(f"starts at {entry:#x}, where nothing is loaded")
