"""H_RTAS: read the argument block, have the service answered here or by qemu, write the return words."""

from __future__ import annotations

import struct

from protocol.codes import HCode
from protocol.errors import GuestFault
from protocol.messages import RtasBody
from protocol.rtas import MAX_WORDS
from services.kvm import rtas_irq
from services.kvm.guest_call import GuestCall, Result
from services.kvm.user_space import UserSpace
from services.kvm.xics import Xics
from shared.guest_ram import GuestRam

_HEADER = struct.Struct(">III")
_WORD_BYTES = 4


class RtasCalls:
    """RTAS of one VM."""

    def __init__(self, ram: GuestRam, xics: Xics, user_space: UserSpace) -> None:
        self._ram = ram
        self._xics = xics
        self._user_space = user_space

    async def h_rtas(self, call: GuestCall) -> Result:
        """H_RTAS(args): H_PARAMETER when the block is outside memory or malformed."""
        (block,) = call.args
        try:
            token, n_args, n_rets = _HEADER.unpack(await self._ram.read(block, _HEADER.size))
            if n_args + n_rets > MAX_WORDS:
                return [HCode.H_PARAMETER]
            data = await self._ram.read(block + _HEADER.size, n_args * _WORD_BYTES)
            args = list(struct.unpack(f">{n_args}I", data))
            rets = rtas_irq.serve(self._xics, token, args, n_rets)
            if rets is None:
                rets = await self._user_space.rtas(RtasBody(call.vcpu, token, args, n_rets), call.cause)
            rets = rets[:n_rets]
            await self._ram.write(block + _HEADER.size + len(data), struct.pack(f">{len(rets)}I", *rets))
        except GuestFault:
            return [HCode.H_PARAMETER]
        return [HCode.H_SUCCESS]
