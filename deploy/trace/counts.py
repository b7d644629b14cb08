"""How often a guest made each call."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from deploy.trace.reader import FrameReader
from protocol.hcalls import HCALLS
from protocol.ucalls import UCALLS
from protocol.wire import MessageKind, decode


def count_calls(trace_file: Path) -> tuple[dict[str, int], dict[str, int]]:
    """How often a guest issued each hypercall and each ultracall, by name, from the trace of its process."""
    hypercalls: Counter[str] = Counter()
    ultracalls: Counter[str] = Counter()
    for seen in FrameReader(trace_file).read():
        if seen.direction != "out" or not seen.frame:
            continue
        envelope = decode(seen.frame)
        if envelope.kind is not MessageKind.CALL:
            continue
        if (call := HCALLS.by_number.get(envelope.number)) is not None:
            hypercalls[call.name] += 1
        elif (call := UCALLS.by_number.get(envelope.number)) is not None:
            ultracalls[call.name] += 1
    return dict(sorted(hypercalls.items())), dict(sorted(ultracalls.items()))
