"""The registers of a processor as a debugger sees them, each declared once: GDB's target description, the packets that
carry values, and the messages by which qemu reads the registers of a normal VM follow from here.

Source: GDB manual, appendix G.5.9 (PowerPC features) and G.2 (format of a target description).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Order = Literal["little", "big"]


@dataclass(frozen=True, slots=True)
class Register:
    """`kind` is a type of GDB's; `group` decides which `info registers` show it."""

    name: str
    bits: int = 64
    kind: str = "int"
    group: str = ""

    @property
    def n_bytes(self) -> int:
        """As a value travels."""
        return self.bits // 8


@dataclass(frozen=True, slots=True)
class Feature:
    """Registers that GDB knows, or takes as they come, under one name. `types` are the XML of types of their own."""

    name: str
    registers: tuple[Register, ...]
    types: str = ""


_CORE = Feature(
    "org.gnu.gdb.power.core",
    (
        *(Register(f"r{n}") for n in range(32)),
        Register("pc", kind="code_ptr"),
        Register("msr"),
        Register("cr", 32),
        Register("lr", kind="code_ptr"),
        Register("ctr"),
        Register("xer", 32),
    ),
)
_FPU = Feature(
    "org.gnu.gdb.power.fpu",
    (
        *(Register(f"f{n}", kind="ieee_double", group="float") for n in range(32)),
        Register("fpscr", 32, group="float"),
    ),
)
_VECTOR_TYPES = """<vector id="v4f" type="ieee_single" count="4"/>
<vector id="v4i32" type="int32" count="4"/>
<vector id="v8i16" type="int16" count="8"/>
<vector id="v16i8" type="int8" count="16"/>
<union id="vec128">
<field name="uint128" type="uint128"/>
<field name="v4_float" type="v4f"/>
<field name="v4_int32" type="v4i32"/>
<field name="v8_int16" type="v8i16"/>
<field name="v16_int8" type="v16i8"/>
</union>"""
_VMX = Feature(
    "org.gnu.gdb.power.altivec",
    (
        *(Register(f"vr{n}", 128, "vec128", "vector") for n in range(32)),
        Register("vscr", 32, group="vector"),
        Register("vrsave", 32, group="vector"),
    ),
    _VECTOR_TYPES,
)
_VSX = Feature("org.gnu.gdb.power.vsx", tuple(Register(f"vs{n}h", kind="uint64", group="vector") for n in range(32)))
"""The low doublewords of VSR 0 to 31; the high ones are the floating-point registers, VSR 32 to 63 are VMX's."""


class Description:
    """A processor's registers, numbered as its features name them."""

    def __init__(self, *features: Feature) -> None:
        self.features = features
        self.registers = tuple(register for feature in features for register in feature.registers)
        self.number = {register.name: number for number, register in enumerate(self.registers)}

    @cached_property
    def n_bytes(self) -> int:
        """Of all values."""
        return sum(register.n_bytes for register in self.registers)


POWER = Description(_CORE, _FPU, _VMX, _VSX)
"""A processor that runs real POWER code."""


_MODEL_WORDS = ("phase", "secure", "interrupts_on", "line", "up")
_MODEL_ADDRESSES = ("kbase", "fdt", "initrd", "page_table")
_MODEL_COUNTS = ("free_pages", "pidr", "wake_ns", "calls", "busy_rounds", "now_ns")
MODEL = Description(
    _CORE,
    Feature(
        "org.pefbox.model",
        (
            *(Register(name, 32) for name in _MODEL_WORDS),
            *(Register(name, kind="data_ptr") for name in _MODEL_ADDRESSES),
            *(Register(name) for name in _MODEL_COUNTS),
        ),
    ),
)
"""The model kernel: its state by name. GDB accepts no processor without POWER's own registers, most of which it has
not."""


@dataclass(frozen=True, slots=True)
class Values:
    """What the registers of a description hold, by number; None for what is not to be had."""

    little_endian: bool
    values: tuple[int | None, ...]

    @property
    def order(self) -> Order:
        """The byte order in which they travel, which is the processor's own at the time."""
        return "little" if self.little_endian else "big"


def pack(description: Description, values: Values) -> tuple[bytes, list[int]]:
    """Big-endian values in a row, and the numbers of those that are not to be had (and are zero in the row)."""
    missing = [number for number, value in enumerate(values.values) if value is None]
    pairs = zip(description.registers, values.values, strict=True)
    return b"".join((value or 0).to_bytes(register.n_bytes, "big") for register, value in pairs), missing


def unpack(description: Description, little_endian: bool, data: bytes, missing: list[int]) -> Values:
    """The inverse of `pack`; raises ValueError for a row of another length."""
    if len(data) != description.n_bytes:
        raise ValueError(f"{len(data)} bytes of registers; the description has {description.n_bytes}")
    lacking = frozenset(missing)
    values: list[int | None] = []
    at = 0
    for number, register in enumerate(description.registers):
        value = int.from_bytes(data[at : at + register.n_bytes], "big")
        values.append(None if number in lacking else value)
        at += register.n_bytes
    return Values(little_endian, tuple(values))
