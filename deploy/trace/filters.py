"""Which events are meant: filters that are declared once, for the command line and for programs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

import msgspec

from deploy.cluster_section import did_you_mean
from deploy.targets import is_of
from deploy.trace.events import Event, EventKind
from protocol.codes import HCode, RtasStatus, UCode
from protocol.errors import UserError
from protocol.hcalls import HCALLS
from protocol.messages import MESSAGES
from protocol.ucalls import UCALLS

CALL_NAMES = sorted(
    {*HCALLS.by_name, *UCALLS.by_name, *(message.name for message in MESSAGES.values()), "undeclared", "malformed"}
)
OTHER_KINDS = (EventKind.PAGE, EventKind.INTERRUPT, EventKind.REQUEST, EventKind.MIGRATION)
RESULT_NAMES = sorted({code.name for codes in (HCode, UCode, RtasStatus) for code in codes} | {"answered", "withheld"})
_SINCE = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_NS = {"ms": 1_000_000, "s": 1_000_000_000, "m": 60_000_000_000, "h": 3_600_000_000_000, None: 1_000_000_000}


class Filter(msgspec.Struct, frozen=True):
    """What an event has to be; a field that is None asks nothing.

    `call` is a name with `*` and `?` of a call or message, or one of `OTHER_KINDS`; `result` is a code, `process` a
    process or all of a host or VM; `since_ns` counts back from the last event.
    """

    vm: str | None = None
    call: str | None = None
    process: str | None = None
    cause: int | None = None
    result: str | None = None
    since_ns: int | None = None

    def passes(self, event: Event) -> bool:
        """Whether `event` is meant, its time apart."""
        return (
            (self.vm is None or event.vm == self.vm)
            and (self.cause is None or event.cause == self.cause)
            and (self.result is None or event.result == self.result)
            and (self.process is None or is_of(event.process, self.process))
            and (self.call is None or _is_called(event, self.call))
        )


def _is_called(event: Event, pattern: str) -> bool:
    name = event.name if event.is_message else event.kind.value
    return fnmatchcase(name, pattern) or (event.ends is not None and fnmatchcase(event.ends, pattern))


def make_filter(
    *,
    vm: str | None = None,
    call: str | None = None,
    process: str | None = None,
    cause: str | None = None,
    result: str | None = None,
    since: str | None = None,
) -> Filter:
    """From texts as they are typed; raises UserError that names what is wrong and what is possible."""
    return Filter(
        vm=vm,
        call=None if call is None else _call_pattern(call),
        process=process,
        cause=None if cause is None else _cause(cause),
        result=None if result is None else _result(result),
        since_ns=None if since is None else _since(since),
    )


def check_names(filter_: Filter, vms: Iterable[str], processes: Iterable[str]) -> None:
    """Whether the trace has what is asked for; raises UserError: an empty answer would look like silence."""
    vms, processes = sorted(set(vms)), sorted(set(processes))
    if filter_.vm is not None and filter_.vm not in vms:
        raise UserError(f'--vm: no VM "{filter_.vm}" in this trace; there is: {", ".join(vms) or "none"}')
    if filter_.process is not None and not any(is_of(process, filter_.process) for process in processes):
        raise UserError(f'--process: no "{filter_.process}" in this trace; there is: {", ".join(processes) or "none"}')


def _call_pattern(text: str) -> str:
    names = [*CALL_NAMES, *OTHER_KINDS]
    if not any(fnmatchcase(name, text) for name in names):
        raise UserError(
            f'--call: no call or message is named "{text}"{did_you_mean(text, names)}; '
            f"allowed: a name, * and ? in it, or {', '.join(OTHER_KINDS)}"
        )
    return text


def _cause(text: str) -> int:
    try:
        cause = int(text, 0)
    except ValueError:
        cause = -1
    if not 0 <= cause < 1 << 64:
        raise UserError(f'--cause: "{text}" is no cause id: a number as `trace show` prints it, decimal or 0x...')
    return cause


def _result(text: str) -> str:
    if text not in RESULT_NAMES and not text.lstrip("-").isdecimal():
        raise UserError(
            f'--result: "{text}" is no result code{did_you_mean(text, RESULT_NAMES)}; '
            "allowed: a code such as H_SUCCESS or U_RETRY, or a number that has no name"
        )
    return text


def _since(text: str) -> int:
    match = _SINCE.fullmatch(text)
    if match is None:
        raise UserError(f'--since: "{text}" is no time before the end: a number with ms, s, m or h, such as 10s')
    return int(float(match[1]) * _NS[match[2]])
