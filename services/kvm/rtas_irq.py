"""The RTAS services that configure interrupt sources: ibm,set-xive, ibm,get-xive, ibm,int-off, ibm,int-on.

kvm answers these itself, since the sources are its own; every other service goes to qemu. Source: PAPR 7.3.10.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.codes import HCode, RtasStatus
from protocol.rtas import GET_XIVE, INT_OFF, INT_ON, RTAS, SET_XIVE, status_word
from services.kvm.xics import LEAST_FAVORED, Xics

_OK = status_word(RtasStatus.SUCCESS)
_BAD = status_word(RtasStatus.PARAMETER_ERROR)


def ibm_set_xive(xics: Xics, args: list[int]) -> list[int]:
    """Route a source to a server with a priority; 255 masks it."""
    source, server, priority = args
    return [_status(xics.configure(source, server, priority, priority))]


def ibm_get_xive(xics: Xics, args: list[int]) -> list[int]:
    """Server and priority of a source, as they apply now (255 while it is masked)."""
    source = xics.source(args[0])
    return [_BAD] if source is None else [_OK, source.server, source.priority]


def ibm_int_off(xics: Xics, args: list[int]) -> list[int]:
    """Mask a source and remember its priority; a source that is masked already keeps what it remembers."""
    source = xics.source(args[0])
    if source is None:
        return [_BAD]
    saved = source.saved_priority if source.priority == LEAST_FAVORED else source.priority
    return [_status(xics.configure(source.number, source.server, LEAST_FAVORED, saved))]


def ibm_int_on(xics: Xics, args: list[int]) -> list[int]:
    """Give a source the priority it had before ibm,int-off."""
    source = xics.source(args[0])
    if source is None:
        return [_BAD]
    return [_status(xics.configure(source.number, source.server, source.saved_priority, source.saved_priority))]


HANDLERS: dict[int, Callable[[Xics, list[int]], list[int]]] = {
    SET_XIVE: ibm_set_xive,
    GET_XIVE: ibm_get_xive,
    INT_OFF: ibm_int_off,
    INT_ON: ibm_int_on,
}
"""By token."""


def serve(xics: Xics, token: int, args: list[int], n_rets: int) -> list[int] | None:
    """The return words of a service, the status first; None when `token` is not one of `HANDLERS`.

    A block whose counts are not the service's gets PARAMETER_ERROR; never more than `n_rets` words.
    """
    handler = HANDLERS.get(token)
    if handler is None:
        return None
    rets = handler(xics, args) if RTAS.by_number[token].fits(len(args), n_rets) else [_BAD]
    return rets[:n_rets]


def _status(code: HCode) -> int:
    return _OK if code is HCode.H_SUCCESS else _BAD
