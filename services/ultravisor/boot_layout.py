"""Where the parts of a secure image lie in guest memory, read from the device tree that came with UV_ESM.

The tree is the hypervisor's or firmware's word, so every number is checked against the VM's memory before it is used.
Only what the ESM blob measures is trusted later. Source: open-power/ultravisor `svm/svm-esm.c`.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import ImageRefused
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, pages_spanned
from shared.fdt_reader import FdtTree

RTAS_BYTES = 20
"""Length of the RTAS entry code that is measured."""

MAX_FDT_BYTES = 1 << 20
_RMO_LIMIT_BYTES = 768 << 20


@dataclass(frozen=True, slots=True)
class Extent:
    """`n_bytes` of guest memory from `gpa`."""

    gpa: int
    n_bytes: int

    @property
    def end(self) -> int:
        """First byte behind."""
        return self.gpa + self.n_bytes

    @property
    def gfns(self) -> range:
        """The frames it touches."""
        return pages_spanned(self.gpa, self.n_bytes)

    def overlaps(self, other: Extent) -> bool:
        """Whether a byte is in both."""
        return self.gpa < other.end and other.gpa < self.end


@dataclass(frozen=True, slots=True)
class BootLayout:
    """The parts of the image; the kernel's length is known once the blob is open."""

    fdt: Extent
    rtas: Extent
    initrd: Extent
    bootargs: bytes
    rmo_bytes: int


def read_layout(tree: FdtTree, fdt: Extent, memory_bytes: int) -> BootLayout:
    """The parts that `tree` names; raises ImageRefused when one is missing or outside memory."""
    rtas_base = _number(tree, "/rtas", "linux,rtas-base")
    start = _number(tree, "/chosen", "linux,initrd-start")
    end = _number(tree, "/chosen", "linux,initrd-end")
    bootargs = tree.property("/chosen", "bootargs") or b""
    initrd = checked_extent("initrd", start, end - start, memory_bytes)
    rtas = checked_extent("rtas", rtas_base, RTAS_BYTES, memory_bytes)
    return BootLayout(fdt, rtas, initrd, bootargs.rstrip(b"\0"), _rmo_bytes(tree, memory_bytes))


def checked_extent(what: str, gpa: int, n_bytes: int, memory_bytes: int) -> Extent:
    """An extent inside memory; raises ImageRefused."""
    if n_bytes <= 0 or gpa < 0 or gpa + n_bytes > memory_bytes:
        raise ImageRefused(f"{what}: {n_bytes} bytes at {gpa:#x} are not in memory")
    return Extent(gpa, n_bytes)


def free_pages(layout: BootLayout, taken: list[Extent], reserved: list[tuple[int, int]], n_pages: int) -> list[int]:
    """`n_pages` GFNs in a row as high below the top of RMO as possible; raises ImageRefused when there are none."""
    blocked = [*taken, *(Extent(gpa, n_bytes) for gpa, n_bytes in reserved if n_bytes)]
    top = layout.rmo_bytes >> PAGE_SHIFT
    while top >= n_pages:
        candidate = Extent((top - n_pages) << PAGE_SHIFT, n_pages * PAGE_BYTES)
        hit = next((extent for extent in blocked if extent.overlaps(candidate)), None)
        if hit is None:
            return list(candidate.gfns)
        top = hit.gpa >> PAGE_SHIFT
    raise ImageRefused("no free memory for the ultravisor's bounce pages")


def _number(tree: FdtTree, path: str, name: str) -> int:
    value = tree.property(path, name)
    if value is None or len(value) not in (4, 8):
        raise ImageRefused(f"device tree: no {name} in {path}")
    return int.from_bytes(value, "big")


def _rmo_bytes(tree: FdtTree, memory_bytes: int) -> int:
    reg = tree.property("/memory@0", "reg")
    if reg is None or len(reg) < 16:
        raise ImageRefused("device tree: no /memory@0")
    return min(int.from_bytes(reg[8:16], "big"), memory_bytes, _RMO_LIMIT_BYTES)
