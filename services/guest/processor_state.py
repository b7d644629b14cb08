"""A processor's state as it travels to another host: what a kernel can see of its processor beside guest RAM.

Not in it, since somebody says it anew where the processor arrives: the level of the interrupt line (kvm), and what
holds the processor (kvm for a VM that is paused, the ultravisor for one that is not to run yet). How an idle clock that
jumps is paced is seen by no kernel.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.decoding import DECODE_ERRORS
from protocol.messages import MAX_PROCESSOR_STATE_BYTES

VERSION = 1
_MAX_KERNEL_CHARS = 64
_MAX_NS = (1 << 63) - 1


class ProcessorState(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """`kernel` is the setting of the VM that chose the engine, `secure` MSR.S, `now_ns` guest time, `engine` what
    `Engine.save` gave at that time."""

    version: int
    kernel: Annotated[str, Meta(max_length=_MAX_KERNEL_CHARS)]
    secure: bool
    now_ns: Annotated[int, Meta(ge=0, le=_MAX_NS)]
    engine: Annotated[bytes, Meta(max_length=MAX_PROCESSOR_STATE_BYTES)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ProcessorState)


def encode_state(state: ProcessorState) -> bytes:
    """As bytes for a message; raises ValueError when they are too many for one."""
    data = _encoder.encode(state)
    if len(data) > MAX_PROCESSOR_STATE_BYTES:
        raise ValueError(f"a processor state of {len(data)} bytes is more than {MAX_PROCESSOR_STATE_BYTES}")
    return data


def decode_state(data: bytes, kernel: str, *, secure: bool) -> ProcessorState:
    """The state of a processor with the same kernel and MSR.S; raises ValueError for anything else."""
    try:
        state = _decoder.decode(data)
    except DECODE_ERRORS as error:
        raise ValueError(f"no processor state: {error}") from None
    if state.version != VERSION:
        raise ValueError(f"processor state of version {state.version}; this is {VERSION}")
    if state.kernel != kernel:
        raise ValueError(f"state of a processor with kernel {state.kernel!r}; this one has {kernel!r}")
    if state.secure is not secure:
        raise ValueError(f"state of a processor with MSR.S {state.secure}")
    return state
