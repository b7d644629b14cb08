"""A VM's end of one network: a switch with the VM's own devices and the qemu of every other VM of the network on it.

All VMs of a network are linked in pairs. So a frame that came from a peer goes to the VM's own devices and never to
another peer, and no loop is possible. Addresses are learnt from the frames that come; an unknown or group destination
is flooded. Nothing here waits: a port that takes no frame drops it and counts it.

Source: IEEE 802.1D, clause 7 (learning, ageing, flooding).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from protocol.ethernet import HEADER_BYTES, MAC_BYTES, MULTICAST
from protocol.messages import MAX_NET_FRAMES

MAX_ADDRESSES = 1024
"""Addresses that a switch remembers; the one that was silent longest makes room."""
AGEING_SECONDS = 300.0
MAX_BATCH_BYTES = 32 * 1024
"""Frames to a peer that leave together, unless one alone is larger."""


class Drop(Enum):
    """Why a frame was dropped; the value is what `status` shows."""

    MALFORMED = "malformed"
    """Shorter than a header, longer than the MTU allows, or from a group address."""
    OFFLOAD = "offload"
    """The driver asks for an offload that it was not offered."""
    NO_BUFFER = "no-buffer"
    """The driver gives too few buffers, or the device is not running."""
    PEER_LOST = "peer-lost"
    """The other VM's qemu is gone, stopped or does not answer."""
    PEER_FULL = "peer-full"
    """The link to it takes no more frames now."""
    LINK = "link"
    """Lost on a link between two hosts that has a shape: by its loss, its queue, or since it is cut."""


class Traffic:
    """Counts of one port since the process began. Received is what came to the VM, sent what went from it."""

    def __init__(self) -> None:
        self.received_frames = 0
        self.received_bytes = 0
        self.sent_frames = 0
        self.sent_bytes = 0
        self.dropped: Counter[Drop] = Counter()

    def received(self, frame: bytes) -> None:
        """A frame came to the VM."""
        self.received_frames += 1
        self.received_bytes += len(frame)

    def sent(self, frame: bytes) -> None:
        """A frame went from the VM."""
        self.sent_frames += 1
        self.sent_bytes += len(frame)

    def as_dict(self) -> dict[str, object]:
        """For the operator."""
        return {
            "received_frames": self.received_frames,
            "received_bytes": self.received_bytes,
            "sent_frames": self.sent_frames,
            "sent_bytes": self.sent_bytes,
            "dropped": {drop.value: n for drop, n in self.dropped.items()},
        }


Offer = Callable[[list[bytes]], Drop | None]
"""Send frames over a link now; why they were dropped, or None when they went out."""


class Port(Protocol):
    """Where a switch sends frames."""

    def put(self, frame: bytes, origin: Port) -> None:
        """Take `frame`, which came in at `origin`, or drop and count it; never waits."""

    def flush(self) -> None:
        """What was put so far goes out now."""


class Delay(Protocol):
    """A link between two hosts that has a shape."""

    def send(self, frames: list[bytes], port: PeerPort) -> None:
        """Have `port` deliver `frames` when they arrive, or drop and count them."""


class FairQueue:
    """At most `max_frames` frames that wait, taken from their origins in turn.

    So a VM that sends without end takes its share of what the receiver can, and no other's.
    """

    def __init__(self, max_frames: int) -> None:
        self._max_frames = max_frames
        self._waiting: dict[Port, deque[bytes]] = {}
        """Of every origin that has some; the first one's turn is next."""
        self._n_frames = 0

    def __len__(self) -> int:
        return self._n_frames

    def put(self, frame: bytes, origin: Port) -> bool:
        """Keep `frame`; False when a frame was dropped for it or it was itself: the last of whoever has most."""
        frames = self._waiting.get(origin, ())
        is_full = self._n_frames >= self._max_frames
        if is_full:
            longest = max(self._waiting.values(), key=len)
            if len(frames) >= len(longest):
                return False
            longest.pop()
            self._n_frames -= 1
        self._waiting.setdefault(origin, deque()).append(frame)
        self._n_frames += 1
        return not is_full

    def take(self) -> bytes:
        """The next frame; there is one."""
        origin = next(iter(self._waiting))
        frames = self._waiting.pop(origin)
        frame = frames.popleft()
        self._n_frames -= 1
        if frames:
            self._waiting[origin] = frames
        return frame


class MacTable:
    """Behind which port an address was last seen. `now` gives monotonic seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._seen: dict[bytes, tuple[Port, float]] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def learn(self, mac: bytes, port: Port) -> None:
        """`mac` sent a frame in at `port`."""
        # Taken out first, so that the order of the table is that of the last frames.
        self._seen.pop(mac, None)
        if len(self._seen) >= MAX_ADDRESSES:
            del self._seen[next(iter(self._seen))]
        self._seen[mac] = (port, self._now())

    def find(self, mac: bytes) -> Port | None:
        """The port of `mac`; None when it was not seen for AGEING_SECONDS."""
        entry = self._seen.get(mac)
        if entry is None:
            return None
        port, seen_s = entry
        if self._now() - seen_s > AGEING_SECONDS:
            del self._seen[mac]
            return None
        return port

    def forget(self, port: Port) -> None:
        """Nobody is known behind `port` any more."""
        self._seen = {mac: entry for mac, entry in self._seen.items() if entry[0] is not port}


class Switch:
    """The switch of one VM on one network. Frames are checked where they come in, at either kind of port."""

    def __init__(self, mtu: int, now: Callable[[], float] = time.monotonic) -> None:
        self.mtu = mtu
        self.table = MacTable(now)
        self.own: list[Port] = []
        self.peers: dict[str, PeerPort] = {}

    def plug(self, port: Port) -> None:
        """A device of this VM."""
        self.own.append(port)

    def connect(self, peer: str, offer: Offer) -> PeerPort:
        """The qemu of another VM, in its first or a further incarnation; its counts go on."""
        port = self.peers.get(peer)
        if port is None:
            port = self.peers[peer] = PeerPort(offer)
        else:
            self.table.forget(port)
            port.offer = offer
        return port

    @property
    def max_frame_bytes(self) -> int:
        """The longest frame of this network."""
        return HEADER_BYTES + self.mtu

    def well_formed(self, frame: bytes) -> bool:
        """Whether the frame may travel on this network."""
        return HEADER_BYTES <= len(frame) <= self.max_frame_bytes and not frame[MAC_BYTES] & MULTICAST

    def from_device(self, frame: bytes, port: Port) -> None:
        """A well-formed frame of one of the VM's own devices; it goes out with the next `flush`."""
        self.table.learn(frame[MAC_BYTES : 2 * MAC_BYTES], port)
        known = self._port_of(frame)
        if known is not None:
            if known is not port:
                known.put(frame, port)
            return
        for other in (*self.own, *self.peers.values()):
            if other is not port:
                other.put(frame, port)

    def from_peer(self, frames: list[bytes], port: PeerPort) -> None:
        """Frames that came over a link."""
        for frame in frames:
            if not self.well_formed(frame):
                port.traffic.dropped[Drop.MALFORMED] += 1
                continue
            port.traffic.received(frame)
            self.table.learn(frame[MAC_BYTES : 2 * MAC_BYTES], port)
            known = self._port_of(frame)
            for own in self.own:
                if known is None or known is own:
                    own.put(frame, port)

    def flush(self) -> None:
        """All that was put goes out."""
        for port in self.peers.values():
            port.flush()

    def _port_of(self, frame: bytes) -> Port | None:
        return None if frame[0] & MULTICAST else self.table.find(frame[:MAC_BYTES])


class PeerPort:
    """The qemu of another VM. Frames are gathered until `flush`, as one message costs more than many frames in it."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.delay: Delay | None = None
        """Between: what the link to the peer's host does, if that ever was something."""
        self.traffic = Traffic()
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0

    def put(self, frame: bytes, _origin: Port) -> None:
        """Gather `frame`; a full batch goes out."""
        if len(self._gathered) == MAX_NET_FRAMES or self._gathered_bytes + len(frame) > MAX_BATCH_BYTES:
            self.flush()
        self._gathered.append(frame)
        self._gathered_bytes += len(frame)

    def flush(self) -> None:
        """Send what is gathered, or drop it."""
        if not self._gathered:
            return
        frames, self._gathered, self._gathered_bytes = self._gathered, [], 0
        if self.delay is None:
            self.deliver(frames)
        else:
            self.delay.send(frames, self)

    def deliver(self, frames: list[bytes]) -> None:
        """Send frames to the peer now, or drop and count them."""
        drop = self.offer(frames)
        if drop is not None:
            self.traffic.dropped[drop] += len(frames)
            return
        for frame in frames:
            self.traffic.sent(frame)
