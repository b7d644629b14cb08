"""The XICS interrupt controller of one VM: sources (ICS) and a presentation controller per server (ICP).

A source wants to be presented while it is an edge not yet accepted (MSI), or a level that is asserted and not in
service (LSI). Its server presents the most favored (numerically lowest) priority that beats CPPR:

    waiting --offer--> presented (in XISR) --H_XIRR--> accepted --H_EOI--> idle, or waiting again (level still up)
       ^                   |
       +----reject---------+   a more favored interrupt arrives, or H_CPPR lowers the bound under it

What is not presented waits at its source; it is offered again when the server's CPPR rises, when its source is
changed or when a level's EOI comes. Between calls this holds: every waiting source is masked, or not favored enough
for its server's CPPR, or its server presents one at least as favored. The inter-processor interrupt (XISR 2) is a
level: it waits while MFRR beats CPPR.

An edge that comes while the same source is presented but not yet accepted merges into it; one that comes after the
acceptance is presented again. A masked source keeps its edge. These are the semantics of PAPR 14.5.4.6 and QEMU
`hw/intc/xics.c`; where QEMU loses an edge that is rejected while masked, or forgets the saved priority at a second
ibm,int-off, this keeps it.
"""

from __future__ import annotations

import msgspec

from protocol.codes import HCode
from protocol.errors import MalformedMessage

IPI_SOURCE = 2
FIRST_SOURCE = 16
MAX_SOURCE = (1 << 24) - 1
MAX_SOURCES = 4096
LEAST_FAVORED = 0xFF
"""Priority of a masked source, and MFRR when no inter-processor interrupt is asked for."""
_XISR_MASK = 0x00FFFFFF
_CPPR_SHIFT = 24

_SUCCESS: list[int] = [HCode.H_SUCCESS]
_PARAMETER: list[int] = [HCode.H_PARAMETER]


class InterruptSource(msgspec.Struct):
    """One source. `saved_priority` is what ibm,int-on restores."""

    number: int
    level_triggered: bool
    server: int = 0
    priority: int = LEAST_FAVORED
    saved_priority: int = LEAST_FAVORED
    asserted: bool = False
    """Level of the line (LSI)."""
    pending: bool = False
    """An edge that no processor accepted yet (MSI)."""
    in_service: bool = False
    """Accepted and not ended (LSI)."""
    presented: bool = False
    """Stands in the XISR of a server."""

    @property
    def waits(self) -> bool:
        """Whether it wants to be presented and is not."""
        if self.presented:
            return False
        return self.asserted and not self.in_service if self.level_triggered else self.pending


class Presentation(msgspec.Struct):
    """The presentation controller of one server. `pending_priority` is the priority of what stands in `xisr`."""

    cppr: int = 0
    xisr: int = 0
    pending_priority: int = LEAST_FAVORED
    mfrr: int = LEAST_FAVORED

    @property
    def xirr(self) -> int:
        """CPPR and XISR in one word."""
        return self.cppr << _CPPR_SHIFT | self.xisr

    def accepts(self, priority: int) -> bool:
        """Whether an interrupt of `priority` would be presented now."""
        return priority < self.cppr and (not self.xisr or priority < self.pending_priority)


class XicsState(msgspec.Struct):
    """Everything that survives a save. Servers are numbered from 0."""

    servers: list[Presentation]
    sources: list[InterruptSource]


class Xics:
    """Sources and servers of one VM; servers are vcpu numbers 0 to `n_servers - 1`.

    Hypercalls return `[code, outputs...]`, not to be changed by the caller. After any call `take_line_changes` says
    whose external interrupt line changed.
    """

    def __init__(self, n_servers: int = 1) -> None:
        self._servers = [Presentation() for _ in range(n_servers)]
        self._sources: dict[int, InterruptSource] = {}
        self._waiting: set[int] = set()
        self._told = [False] * n_servers
        self._touched: set[int] = set()

    # -- the line to the processor ------------------------------------------------------------------------------

    def line(self, server: int) -> bool:
        """Level of the external interrupt line; high while an interrupt is presented and not accepted."""
        return self._servers[server].xisr != 0

    def take_line_changes(self) -> list[tuple[int, bool]]:
        """`(server, level)` of each line whose level differs from what this method said last."""
        if not self._touched:
            return []
        changes = []
        for server in sorted(self._touched):
            level = self.line(server)
            if level != self._told[server]:
                self._told[server] = level
                changes.append((server, level))
        self._touched.clear()
        return changes

    # -- sources ------------------------------------------------------------------------------------------------

    def add_source(self, number: int, level_triggered: bool) -> HCode:
        """Declare a source, masked.

        Again with the same trigger is no change. H_PARAMETER: no source number. H_RESOURCE: too many sources.
        H_IN_USE: the trigger of a source with an interrupt under way cannot change.
        """
        if not FIRST_SOURCE <= number <= MAX_SOURCE:
            return HCode.H_PARAMETER
        known = self._sources.get(number)
        if known is None:
            if len(self._sources) >= MAX_SOURCES:
                return HCode.H_RESOURCE
        elif known.level_triggered == level_triggered:
            return HCode.H_SUCCESS
        elif known.waits or known.presented or known.in_service:
            return HCode.H_IN_USE
        self._sources[number] = InterruptSource(number, level_triggered)
        return HCode.H_SUCCESS

    def source(self, number: int) -> InterruptSource | None:
        """The source of that number, to read."""
        return self._sources.get(number)

    @property
    def sources(self) -> list[InterruptSource]:
        """Every source, to read."""
        return list(self._sources.values())

    def has_server(self, server: int) -> bool:
        """Whether a presentation controller has that number."""
        return 0 <= server < len(self._servers)

    def set_irq(self, number: int, level: bool) -> HCode:
        """The line of a level source changed; or an edge of an edge source, when `level` is true."""
        source = self._sources.get(number)
        if source is None:
            return HCode.H_PARAMETER
        if source.level_triggered:
            source.asserted = level
        elif level:
            # Merges with an edge that waits or is presented: whoever accepts that one handles both.
            source.pending = True
        self._offer(source)
        return HCode.H_SUCCESS

    def configure(self, number: int, server: int, priority: int, saved_priority: int) -> HCode:
        """Set where a source goes; what waits is offered at once, what is presented stays where it is."""
        source = self._sources.get(number)
        in_range = 0 <= priority <= LEAST_FAVORED and 0 <= saved_priority <= LEAST_FAVORED
        if source is None or not self.has_server(server) or not in_range:
            return HCode.H_PARAMETER
        source.server, source.priority, source.saved_priority = server, priority, saved_priority
        self._offer(source)
        return HCode.H_SUCCESS

    # -- hypercalls ---------------------------------------------------------------------------------------------

    def h_xirr(self, server: int) -> list[int]:
        """Accept: `[H_SUCCESS, xirr]`; CPPR takes the priority of what was accepted. XISR 0 says nothing waits."""
        if not self.has_server(server):
            return _PARAMETER
        icp = self._servers[server]
        xirr = icp.xirr
        if not icp.xisr:
            return [HCode.H_SUCCESS, xirr]
        source = self._sources.get(icp.xisr)
        if source is not None:
            source.presented = False
            source.pending = False
            source.in_service = source.level_triggered
        icp.cppr = icp.pending_priority
        self._withdraw(server)
        return [HCode.H_SUCCESS, xirr]

    def h_xirr_x(self, server: int, timebase: int) -> list[int]:
        """As H_XIRR with the time of acceptance: `[H_SUCCESS, xirr, timebase]`."""
        result = self.h_xirr(server)
        return result if result[0] else [*result, timebase]

    def h_eoi(self, server: int, xirr: int) -> list[int]:
        """End of interrupt: the low 24 bits name the source, bits 24-31 are the CPPR to go back to."""
        if not self.has_server(server):
            return _PARAMETER
        source = self._sources.get(xirr & _XISR_MASK)
        if source is not None and source.in_service:
            source.in_service = False
            self._offer(source)
        return self.h_cppr(server, xirr >> _CPPR_SHIFT)

    def h_cppr(self, server: int, cppr: int) -> list[int]:
        """Set the priority that an interrupt must beat; only the low 8 bits count."""
        if not self.has_server(server):
            return _PARAMETER
        icp = self._servers[server]
        icp.cppr = cppr & 0xFF
        if icp.xisr and icp.pending_priority >= icp.cppr:
            rejected = self._reject(server)
            if rejected is not None:
                self._offer(rejected)
        self._present_next(server)
        return _SUCCESS

    def h_ipi(self, server: int, mfrr: int) -> list[int]:
        """Ask for an inter-processor interrupt of priority `mfrr` (low 8 bits); 255 asks for none."""
        if not self.has_server(server):
            return _PARAMETER
        self._servers[server].mfrr = mfrr & 0xFF
        self._offer_ipi(server)
        return _SUCCESS

    def h_ipoll(self, server: int) -> list[int]:
        """Look without accepting: `[H_SUCCESS, xirr, mfrr]`."""
        if not self.has_server(server):
            return _PARAMETER
        icp = self._servers[server]
        return [HCode.H_SUCCESS, icp.xirr, icp.mfrr]

    # -- life ---------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Machine reset: servers accept nothing, sources are masked and forget edges; levels are the devices'."""
        for server in range(len(self._servers)):
            self._servers[server] = Presentation()
            self._touched.add(server)
        self._waiting.clear()
        for number, old in self._sources.items():
            self._sources[number] = InterruptSource(number, old.level_triggered, asserted=old.asserted)

    def save(self) -> XicsState:
        """A copy of the whole state."""
        return msgspec.msgpack.decode(
            msgspec.msgpack.encode(XicsState(self._servers, list(self._sources.values()))), type=XicsState
        )

    def load(self, state: XicsState) -> None:
        """Take over `state`, saved with as many servers; raises MalformedMessage when it does not hold together.

        Every line is then reported once by `take_line_changes` where it is high.
        """
        _check(state, len(self._servers))
        copy = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=XicsState)
        self._servers = copy.servers
        self._sources = {source.number: source for source in copy.sources}
        self._waiting = set()
        self._touched = set(range(len(self._servers)))
        for source in copy.sources:
            self._offer(source)
        for server in range(len(self._servers)):
            self._present_next(server)

    # -- presentation -------------------------------------------------------------------------------------------

    def _offer(self, source: InterruptSource) -> None:
        """Present a source if it waits and its server takes it, else keep it among the waiting."""
        if not source.waits or source.priority == LEAST_FAVORED:
            self._waiting.discard(source.number)
            return
        self._waiting.add(source.number)
        if self._servers[source.server].accepts(source.priority):
            self._present(source.server, source.number, source.priority)

    def _offer_ipi(self, server: int) -> None:
        icp = self._servers[server]
        if icp.accepts(icp.mfrr):
            self._present(server, IPI_SOURCE, icp.mfrr)

    def _present(self, server: int, number: int, priority: int) -> None:
        """Put an interrupt in XISR; what stood there is offered again where and as it is configured by now.

        Ends because each turn puts something more favored in some server's XISR.
        """
        while True:
            rejected = self._reject(server)
            icp = self._servers[server]
            icp.xisr, icp.pending_priority = number, priority
            source = self._sources.get(number)
            if source is not None:
                source.presented = True
                self._waiting.discard(number)
            if rejected is None or rejected.number not in self._waiting:
                return
            server, number, priority = rejected.server, rejected.number, rejected.priority
            if not self._servers[server].accepts(priority):
                return

    def _reject(self, server: int) -> InterruptSource | None:
        """Empty XISR and send what stood in it back to wait at its source, which is returned."""
        source = self._sources.get(self._servers[server].xisr)
        self._withdraw(server)
        if source is not None:
            source.presented = False
            if source.waits and source.priority != LEAST_FAVORED:
                self._waiting.add(source.number)
        return source

    def _withdraw(self, server: int) -> None:
        icp = self._servers[server]
        icp.xisr, icp.pending_priority = 0, LEAST_FAVORED
        self._touched.add(server)

    def _present_next(self, server: int) -> None:
        """Offer everything that waits for `server`, most favored first."""
        icp = self._servers[server]
        self._offer_ipi(server)
        mine = [source for number in self._waiting if (source := self._sources[number]).server == server]
        if mine:
            best = min(mine, key=lambda source: (source.priority, source.number))
            if icp.accepts(best.priority):
                self._present(server, best.number, best.priority)


def _check(state: XicsState, n_servers: int) -> None:
    """Raise MalformedMessage unless fields are in range and XISRs and sources agree."""
    numbers = {source.number for source in state.sources}
    if len(state.servers) != n_servers or len(numbers) != len(state.sources) or len(numbers) > MAX_SOURCES:
        raise MalformedMessage("an interrupt controller of another shape")
    for source in state.sources:
        priorities_hold = 0 <= source.priority <= LEAST_FAVORED and 0 <= source.saved_priority <= LEAST_FAVORED
        if not FIRST_SOURCE <= source.number <= MAX_SOURCE or not 0 <= source.server < n_servers or not priorities_hold:
            raise MalformedMessage(f"interrupt source {source.number:#x} is out of range")
    for icp in state.servers:
        if not all(0 <= value <= 0xFF for value in (icp.cppr, icp.pending_priority, icp.mfrr)):
            raise MalformedMessage("a priority is out of range")
    standing = [icp.xisr for icp in state.servers if icp.xisr not in (0, IPI_SOURCE)]
    presented = sorted(source.number for source in state.sources if source.presented)
    if sorted(standing) != presented:
        raise MalformedMessage("what the servers present is not what the sources say")
