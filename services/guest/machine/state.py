"""The machine engine's whole state apart from guest RAM, as it is saved and loaded."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.decoding import DECODE_ERRORS
from services.guest.machine.trail import DIGEST_BYTES

N_GPRS = 32
N_SPRS = 1024
VSR_BYTES = 16
VSRS_BYTES = 64 * VSR_BYTES
VERSION = 2
MAX_STATE_BYTES = 64 << 10

U64 = Annotated[int, Meta(ge=0)]


class RegisterState(msgspec.Struct, forbid_unknown_fields=True):
    """What a program sees in registers. `sprs` holds those that are not zero, by number."""

    pc: U64
    msr: U64
    lr: U64
    ctr: U64
    cr: U64
    xer: U64
    fpscr: U64
    gprs: Annotated[list[U64], Meta(min_length=N_GPRS, max_length=N_GPRS)]
    sprs: dict[Annotated[int, Meta(ge=0, lt=N_SPRS)], U64]
    vsrs: Annotated[bytes, Meta(min_length=VSRS_BYTES, max_length=VSRS_BYTES)]


class TableState(msgspec.Struct, forbid_unknown_fields=True):
    """The registered process table."""

    gpa: U64
    size_bytes: U64


class TrailState(msgspec.Struct, forbid_unknown_fields=True):
    """What the processor has done since its start, where somebody counts."""

    n_instructions: U64
    n_exits: U64
    digest: Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class MachineState(msgspec.Struct, forbid_unknown_fields=True):
    """One processor. `ticks` is the time base of the moment, `deadline` that at which the decrementer passes zero."""

    version: int
    secure: bool
    line: bool
    ail: Annotated[int, Meta(ge=0, le=3)]
    little_endian_interrupts: bool
    table: TableState | None
    ticks: int
    deadline: int
    trail: TrailState | None
    registers: RegisterState


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(MachineState)


def encode_state(state: MachineState) -> bytes:
    """As bytes for a migration stream."""
    return _encoder.encode(state)


def decode_state(data: bytes) -> MachineState:
    """Raises ValueError when the state is of another version or does not decode."""
    if len(data) > MAX_STATE_BYTES:
        raise ValueError(f"a machine state of {len(data)} bytes is more than {MAX_STATE_BYTES}")
    try:
        state = _decoder.decode(data)
    except DECODE_ERRORS as error:
        raise ValueError(f"no machine state: {error}") from None
    if state.version != VERSION:
        raise ValueError(f"machine state of version {state.version}; this is {VERSION}")
    return state
