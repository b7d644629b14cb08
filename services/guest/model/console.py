"""The terminal: output is buffered and written 16 bytes a hypercall, input is read until there is none.

With an interrupt in the tree the kernel reads when it comes, else it looks every POLL_NS. Source: PAPR 16.6.
"""

from __future__ import annotations

from protocol.codes import HCode
from protocol.hcalls import H_GET_TERM_CHAR, H_PUT_TERM_CHAR
from services.guest.model.cpu import Cpu, Step
from services.guest.model.state import Console as ConsoleState
from services.guest.model.state import Machine

CHARS_A_CALL = 16
CALLS_A_STEP = 16
MAX_OUT_BYTES = 16 * 1024
MAX_LINE_CHARS = 256
MAX_LINES = 16
POLL_NS = 20_000_000
HOLD_NS = 5_000_000
_BACKSPACE = "\b\x7f"


class Console:
    """Buffered terminal over `state`."""

    def __init__(self, cpu: Cpu, machine: Machine, state: ConsoleState) -> None:
        self._cpu = cpu
        self._machine = machine
        self._state = state

    def say(self, text: str) -> None:
        """Queue a line of output; what the terminal never takes is dropped from the front."""
        self._put(text + "\r\n")

    def prompt(self) -> None:
        """Show that a command may be typed."""
        self._put("> ")

    def _put(self, text: str) -> None:
        out = self._state.out + text.encode("ascii", "replace")
        self._state.dropped += max(0, len(out) - MAX_OUT_BYTES)
        self._state.out = out[-MAX_OUT_BYTES:]

    def next_line(self) -> str | None:
        """A line that was typed."""
        return self._state.lines.pop(0) if self._state.lines else None

    # -- steps --------------------------------------------------------------------------------------------------

    def work(self, now_ns: int) -> Step[None] | None:
        """What is to be done now, if anything."""
        state = self._state
        if state.out and now_ns >= state.hold_until_ns:
            return self._flush()
        if state.check or (not self._machine.console_irq and now_ns >= state.next_poll_ns):
            return self._read()
        return None

    def deadline_ns(self) -> int | None:
        """When there is work again."""
        state = self._state
        times = [state.hold_until_ns] if state.out else []
        if not self._machine.console_irq:
            times.append(state.next_poll_ns)
        return min(times, default=None)

    def _flush(self) -> Step[None]:
        state = self._state
        for _ in range(CALLS_A_STEP):
            part = state.out[:CHARS_A_CALL]
            if not part:
                return
            high, low = (int.from_bytes(half.ljust(8, b"\0"), "big") for half in (part[:8], part[8:]))
            unit = self._machine.console_unit
            code, *_ = yield from self._cpu.hcall_once(H_PUT_TERM_CHAR, unit, len(part), high, low)
            if code == HCode.H_BUSY:
                state.hold_until_ns = self._cpu.clock.now_ns() + HOLD_NS
                return
            # Any other refusal means that there is no terminal: the text is lost, the kernel goes on.
            state.out = state.out[len(part) :]

    def _read(self) -> Step[None]:
        state = self._state
        state.check = False
        for _ in range(CALLS_A_STEP):
            result = yield from self._cpu.hcall_once(H_GET_TERM_CHAR, self._machine.console_unit)
            n_bytes = min(result[1], CHARS_A_CALL) if result[0] == HCode.H_SUCCESS and len(result) == 4 else 0
            if not n_bytes:
                state.next_poll_ns = self._cpu.clock.now_ns() + POLL_NS
                return
            typed = b"".join(word.to_bytes(8, "big") for word in result[2:4])[:n_bytes]
            for char in typed.decode("ascii", "replace"):
                self._type(char)
        state.check = True

    def _type(self, char: str) -> None:
        state = self._state
        if char in "\r\n":
            self._put("\r\n")
            if state.line and len(state.lines) < MAX_LINES:
                state.lines.append(state.line)
            state.line = ""
        elif char in _BACKSPACE:
            if state.line:
                state.line = state.line[:-1]
                self._put("\b \b")
        elif char.isprintable() and len(state.line) < MAX_LINE_CHARS:
            state.line += char
            self._put(char)
