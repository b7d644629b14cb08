"""The host's debugger on a normal VM: kvm's orders, as KVM has ioctls for them. While S is set the processor refuses
them before they come here (`GUEST_WHILE_SECURE`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from protocol import messages as m
from protocol.codes import HCode
from services.guest.debugger import Debugger, User
from services.runtime.gdb.target import Point, PointKind, Refused, Stop, Unsupported
from shared.gdb_registers import pack

_VCPU = 0


def stop_body(stop: Stop) -> m.DebugStopBody | None:
    """What kvm is told of a stop; None of a crash, of which it hears anyway."""
    return None if stop.text else m.DebugStopBody(_VCPU, m.WatchMet(stop.watch or 0), stop.address)


def _registers(debugger: Debugger, _body: m.RunBody) -> m.DebugRegisters:
    values = debugger.values()
    data, missing = pack(debugger.description, values)
    return m.DebugRegisters(HCode.H_SUCCESS, values.little_endian, data, missing)


def _set_register(debugger: Debugger, body: m.DebugRegisterBody) -> m.Status:
    registers = debugger.description.registers
    if body.number >= len(registers) or len(body.value) != registers[body.number].n_bytes:
        return m.Status(HCode.H_PARAMETER)
    try:
        debugger.set_register(body.number, int.from_bytes(body.value, "big"))
    except Refused:
        return m.Status(HCode.H_RESOURCE)
    return m.Status()


def _translate(debugger: Debugger, body: m.DebugAddressBody) -> m.DebugAddressReply:
    try:
        return m.DebugAddressReply(HCode.H_SUCCESS, debugger.translate(body.address))
    except Refused:
        return m.DebugAddressReply(HCode.H_NOT_FOUND)


def _debug(debugger: Debugger, body: m.DebugBody) -> m.Status:
    points = frozenset(Point(PointKind(point.kind), point.address, point.n_bytes) for point in body.points)
    if not points and not body.step:
        debugger.give_up(User.HOST)
        return m.Status()
    try:
        debugger.take(User.HOST, debugger.tell_host)
    except Refused:
        return m.Status(HCode.H_BUSY)
    try:
        debugger.set_points(User.HOST, points)
    except (Refused, Unsupported) as error:
        debugger.give_up(User.HOST)
        return m.Status(HCode.H_PARAMETER if isinstance(error, Refused) else HCode.H_NOT_AVAILABLE)
    debugger.arm(step=body.step)
    return m.Status()


def _command(debugger: Debugger, body: m.DebugCommandBody) -> m.DebugCommandReply:
    try:
        code, text = HCode.H_SUCCESS, debugger.monitor(body.words)
    except Refused as refused:
        code, text = HCode.H_PARAMETER, str(refused)
    return m.DebugCommandReply(code, text[: m.MAX_DEBUG_TEXT_CHARS])


HOST_HANDLERS: dict[int, Callable[[Debugger, Any], m.Body]] = {
    m.VCPU_REGISTERS.number: _registers,
    m.VCPU_SET_REGISTER.number: _set_register,
    m.VCPU_TRANSLATE.number: _translate,
    m.VCPU_DEBUG.number: _debug,
    m.VCPU_DEBUG_COMMAND.number: _command,
}
