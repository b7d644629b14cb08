"""The prompt's commands for the network card: what it has done, and echo requests to another kernel."""

from __future__ import annotations

from services.guest.model.arguments import Refused, numbers, station_of
from services.guest.model.cpu import Step
from services.guest.model.net_run import MAX_DEPTH
from services.guest.model.parts import Parts
from services.guest.model.run_tally import MAX_REQUESTS
from services.guest.model.virtio_net import format_mac

HELP = (
    "net                      the network card: address, MTU, link, frames and bytes each way, drops",
    "ping MAC [N] [BYTES]     N (3) echo requests of BYTES (56) to another kernel, one at a time: replies, times",
    "blast MAC N BYTES [D]    N echo requests of BYTES, D (8) at a time, timed as io",
)
PING_COUNT, PING_BYTES, BLAST_DEPTH = 3, 56, 8
MAX_PINGS = 1000


class NetCommands:
    """Commands by name, and the answer of a run when it is over."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.by_name = {"net": self._net, "ping": self._ping, "blast": self._blast}

    def answer(self) -> str:
        """The answer of the run, which is over."""
        run, state = self._parts.net_run, self._parts.state.net_run
        lost = run.describe_lost()
        if lost:
            self._parts.console.say(lost)
        answer = f"error {state.error}" if state.error else f"ok {run.describe()}"
        state.count = 0
        return answer

    def _net(self, words: list[str]) -> Step[str]:
        numbers(words, 0)
        state = self._parts.state.net
        self._check_ready()
        link = "up" if (yield from self._parts.net.link_up()) else "down"
        dropped = ",".join(f"{reason}={n}" for reason, n in sorted(state.dropped.items())) or "none"
        traffic = f"in {state.frames_in} {state.bytes_in} out {state.frames_out} {state.bytes_out}"
        return f"{format_mac(state.mac)} mtu {state.mtu} link {link} {traffic} dropped {dropped}"

    def _ping(self, words: list[str]) -> Step[str]:
        peer = station_of(words)
        count, n_bytes = numbers(words[1:], 0, (PING_COUNT, PING_BYTES))
        if not 1 <= count <= MAX_PINGS:
            raise Refused(f"1 to {MAX_PINGS} requests")
        self._start(peer, count, n_bytes, 1, ping=True)
        return ""
        yield

    def _blast(self, words: list[str]) -> Step[str]:
        peer = station_of(words)
        count, n_bytes, depth = numbers(words[1:], 2, (BLAST_DEPTH,))
        if not 1 <= count <= MAX_REQUESTS or not 1 <= depth <= MAX_DEPTH:
            raise Refused(f"up to {MAX_REQUESTS} requests, {MAX_DEPTH} at a time")
        self._start(peer, count, n_bytes, depth, ping=False)
        return ""
        yield

    def _start(self, peer: bytes, count: int, n_bytes: int, depth: int, *, ping: bool) -> None:
        self._check_ready()
        if peer == self._parts.state.net.mac:
            raise Refused("that is this machine")
        if n_bytes > self._parts.net_run.max_payload_bytes:
            raise Refused(f"up to {self._parts.net_run.max_payload_bytes} bytes, by the MTU")
        self._parts.net_run.start(peer, count, n_bytes, depth, ping=ping)

    def _check_ready(self) -> None:
        state = self._parts.state.net
        if not state.ready:
            raise Refused(state.error or "no virtio-net")
