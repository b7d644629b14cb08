"""Which states of the migration protocol were in force at an instant: out of records and logs, after the fact.

An ultravisor's state is that after its last step, which the records of either end of its link to kvm have: of one that
was killed the other one's. qemu logs its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from deploy.api import RunningCluster
from deploy.trace.reader import FrameReader, SeenFrame
from protocol import ucalls as u
from protocol.codes import UCode
from protocol.declare import Call
from protocol.registers import to_register, to_signed
from protocol.wire import MessageKind, decode
from tests.cluster.moving import HOSTS
from tests.cluster.two_hosts import log_lines

STARTING = "launcher: starting"
OF_QEMU = ("qemu: setup", "qemu: active", "qemu: device")
OF_ULTRAVISORS = (
    *(f"source: {word}" for word in ("handshake", "copying", "stopped", "finished", "token-given", "moved")),
    *(f"destination: {word}" for word in ("receiving", "checked", "ready", "started")),
)
EVERY = (STARTING, *OF_QEMU, *OF_ULTRAVISORS)
"""All that must be struck in a full run."""
AFTER: dict[Call, tuple[str, ...]] = {
    u.UV_EXPORT_OFFER: ("source: handshake",),
    u.UV_EXPORT_ANSWER: ("source: copying",),
    u.UV_EXPORT_STOP: ("source: stopped",),
    u.UV_EXPORT_STATE: ("source: finished", "source: stopped"),
    u.UV_EXPORT_READY: ("source: token-given",),
    u.UV_EXPORT_STATEMENT: ("source: returned", "source: moved"),
    u.UV_EXPORT_CANCEL: ("source: returned",),
    u.UV_IMPORT_OFFER: ("destination: handshake",),
    u.UV_IMPORT_CONFIRM: ("destination: receiving",),
    u.UV_IMPORT_RECORD: ("destination: receiving", "destination: checked"),
    u.UV_IMPORT_READY: ("destination: ready",),
    u.UV_IMPORT_TOKEN: ("destination: started",),
    u.UV_IMPORT_ABANDON: ("destination: abandoned",),
}
"""The state after a step that succeeded; two: its last result chooses one."""
_BY_NUMBER = {call.number: states for call, states in AFTER.items()}


@dataclass(slots=True)
class Step:
    """From `t_ns` of the monotonic clock on the ultravisor of `host` was in `state`."""

    t_ns: int
    host: str
    state: str


@dataclass(slots=True)
class Strike:
    """What was done to a migration between `source` and `host`, and when; `began_ns` is when it was ordered."""

    turn: int
    what: str
    source: str
    host: str
    began_ns: int
    t_ns: int
    outcome: str = ""
    states: list[str] = field(default_factory=list)


class History:
    """Every step of both ultravisors, as far as they are recorded by now."""

    def __init__(self, running: RunningCluster, wall_offset_ns: int) -> None:
        self._running, self._wall_offset_ns = running, wall_offset_ns
        self._steps: list[Step] = []
        self._readers = [
            FrameReader(running.paths.trace_file(f"{host}/{role}")) for host in HOSTS for role in ("ultravisor", "kvm")
        ]

    def read(self) -> None:
        """Take what was recorded since the last time."""
        for reader in self._readers:
            steps = (_step_of(entry) for entry in reader.read())
            self._steps += [step for step in steps if step is not None]

    def states_at(self, strike: Strike) -> list[str]:
        """Those in force when it struck; of each party at most one."""
        qemu = self._qemu_at(strike)
        if qemu == "none":
            return [STARTING]
        found = [f"qemu: {qemu}"]
        for host, side in ((strike.source, "source"), (strike.host, "destination")):
            steps = [step for step in self._steps if step.host == host and step.state.startswith(side)]
            past = [step for step in steps if strike.began_ns <= step.t_ns <= strike.t_ns]
            found += [max(past, key=lambda step: step.t_ns).state] if past else []
        return found

    def _qemu_at(self, strike: Strike) -> str:
        """The source's word for it; "none" before the first."""
        lines = [line for line in log_lines(self._running, "vm1/qemu") if line["event"] == "migration"]
        past = [line for line in lines if strike.began_ns <= self._logged_ns(line) <= strike.t_ns]
        return str(past[-1].get("status", "none")) if past else "none"

    def _logged_ns(self, line: dict[str, Any]) -> int:
        return int(datetime.fromisoformat(line["timestamp"]).timestamp() * 1e9) - self._wall_offset_ns


def _step_of(entry: SeenFrame) -> Step | None:
    owner, _, kind = entry.link.partition(":")
    if not kind.startswith("ultravisor-kvm."):
        return None
    envelope = decode(entry.frame)
    states = _BY_NUMBER.get(envelope.number)
    if states is None or envelope.kind is not MessageKind.REPLY:
        return None
    result = msgspec.msgpack.decode(envelope.body)
    if to_signed(to_register(result[0])) != UCode.U_SUCCESS:
        return None
    return Step(entry.t_ns, owner, states[int(result[-1])] if len(states) > 1 else states[0])


def table(strikes: list[Strike], enough: int) -> str:
    """How often something struck in each state, and in how many of the protocol's it did so `enough` times."""
    counts = counted(strikes)
    lines = [f"{state:<26} {n:>4}" for state, n in counts.items()]
    n_enough = sum(counts[state] >= enough for state in EVERY)
    lines.append(f"{n_enough} of {len(EVERY)} states were struck {enough} times and more")
    outcomes: dict[str, int] = {}
    for strike in strikes:
        outcomes[strike.outcome] = outcomes.get(strike.outcome, 0) + 1
    return "\n".join([*lines, "", *(f"{outcome:<26} {n:>4}" for outcome, n in sorted(outcomes.items()))])


def counted(strikes: list[Strike]) -> dict[str, int]:
    """The same, of every state of the protocol."""
    states = [state for strike in strikes for state in strike.states]
    return {state: states.count(state) for state in (*EVERY, *sorted(set(states) - set(EVERY)))}
