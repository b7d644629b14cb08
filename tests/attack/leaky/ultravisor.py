"""An ultravisor with one part broken; the environment variable PEFBOX_LEAK says which:

- `registers`: every register of an SVM's hypercall goes on to kvm, not only the declared arguments (S4);
- `images`: pages leave for the host unencrypted (S1).

Started by the launcher in place of `services.ultravisor`: what the demo must notice.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable

from protocol.declare import Call
from protocol.wire import Envelope
from services.runtime.link import DEFERRED
from services.ultravisor.guest_calls import GuestCalls
from services.ultravisor.hypervisor import Hypervisor
from services.ultravisor.page_crypto import PageSealer

_N_CONTROL = 1


def _pass_everything(self: GuestCalls, call: Call) -> Callable[[Envelope, list[int]], list[int] | None]:
    def reflect(envelope: Envelope, registers: list[int]) -> list[int] | None:
        def on_result(result: list[int]) -> None:
            self._link.reply(envelope, result)

        args = registers[_N_CONTROL:]
        self._hypervisor.forward(self._partition.lpid, registers[0], call, args, envelope.cause, on_result)
        return DEFERRED

    return reflect


def _send_everything(
    self: Hypervisor, cookie: int, lpid: int, vcpu: int, call: Call, args: list[int], cause: int
) -> None:
    self._link.send_call(call.number, cookie, [lpid, vcpu, *args], cause)


def _plain_image(_self: PageSealer, _gfn: int, page: memoryview) -> memoryview:
    return page


def _accept_anything(_self: PageSealer, _gfn: int, image: bytearray, page: memoryview) -> bool:
    page[:] = image[: len(page)]
    return True


_LEAKS: dict[str, list[tuple[type, str, object]]] = {
    "registers": [(GuestCalls, "_reflector", _pass_everything), (Hypervisor, "_send", _send_everything)],
    "images": [(PageSealer, "seal", _plain_image), (PageSealer, "open", _accept_anything)],
}

if __name__ == "__main__":
    for owner, name, replacement in _LEAKS[os.environ["PEFBOX_LEAK"]]:
        setattr(owner, name, replacement)
    runpy.run_module("services.ultravisor", run_name="__main__")
