"""A VM's switch: what is learnt, where frames go, what is dropped and counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import MAX_NET_FRAMES
from services.qemu.network import (
    AGEING_SECONDS,
    MAX_ADDRESSES,
    MAX_BATCH_BYTES,
    Drop,
    FairQueue,
    MacTable,
    PeerPort,
    Port,
    Switch,
)

BROADCAST = b"\xff" * 6
MTU = 1500


def mac(number: int) -> bytes:
    return b"\x02" + number.to_bytes(5, "big")


def frame(destination: bytes, source: bytes, n_bytes: int = 60) -> bytes:
    return (destination + source + b"\x08\x00").ljust(n_bytes, b"x")


@dataclass(eq=False)
class Card:
    """A device that keeps what it is given."""

    frames: list[bytes] = field(default_factory=list)

    def put(self, frame: bytes, origin: Port) -> None:
        self.frames.append(frame)

    def flush(self) -> None:
        pass


@dataclass
class Peer:
    """The other end of a link; `drop` makes it lose everything."""

    batches: list[list[bytes]] = field(default_factory=list)
    drop: Drop | None = None

    def offer(self, frames: list[bytes]) -> Drop | None:
        if self.drop is None:
            self.batches.append(frames)
        return self.drop

    @property
    def frames(self) -> list[bytes]:
        return [frame for batch in self.batches for frame in batch]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Rig:
    """A switch with two cards and two peers."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.switch = Switch(MTU, self.clock)
        self.cards = [Card(), Card()]
        for card in self.cards:
            self.switch.plug(card)
        self.peers = [Peer(), Peer()]
        self.ports = [self.switch.connect(f"vm{n}/qemu", peer.offer) for n, peer in enumerate(self.peers)]

    def send(self, destination: bytes, source: bytes, card: int = 0) -> bytes:
        sent = frame(destination, source)
        self.switch.from_device(sent, self.cards[card])
        self.switch.flush()
        return sent

    def arrive(self, destination: bytes, source: bytes, peer: int = 0) -> bytes:
        sent = frame(destination, source)
        self.switch.from_peer([sent], self.ports[peer])
        return sent

    @property
    def taken(self) -> list[int]:
        """How many frames each card and each peer got."""
        return [len(card.frames) for card in self.cards] + [len(peer.frames) for peer in self.peers]


def test_a_broadcast_reaches_every_port_but_its_own() -> None:
    rig = Rig()

    rig.send(BROADCAST, mac(1))

    assert rig.taken == [0, 1, 1, 1]


def test_an_unknown_destination_is_flooded_and_a_learnt_one_is_not() -> None:
    rig = Rig()

    rig.send(mac(9), mac(1))
    assert rig.taken == [0, 1, 1, 1]
    rig.arrive(mac(1), mac(9), peer=1)
    assert rig.taken == [1, 1, 1, 1]
    rig.send(mac(9), mac(1))
    assert rig.taken == [1, 1, 1, 2]


def test_a_frame_of_a_peer_never_goes_to_another_peer() -> None:
    rig = Rig()
    rig.arrive(BROADCAST, mac(8), peer=0)
    rig.arrive(mac(7), mac(9), peer=1)
    rig.arrive(mac(8), mac(9), peer=1)

    assert rig.taken == [2, 2, 0, 0]


def test_a_frame_to_where_it_came_from_goes_nowhere() -> None:
    rig = Rig()
    rig.send(BROADCAST, mac(2))

    rig.send(mac(2), mac(1))

    assert rig.taken == [0, 1, 1, 1]


def test_an_address_is_forgotten_with_age_and_with_its_port() -> None:
    rig = Rig()
    rig.arrive(BROADCAST, mac(9), peer=1)
    rig.clock.now_s = AGEING_SECONDS + 1
    assert rig.switch.table.find(mac(9)) is None
    rig.arrive(BROADCAST, mac(9), peer=1)
    assert rig.switch.table.find(mac(9)) is rig.ports[1]

    again = rig.switch.connect("vm1/qemu", Peer().offer)

    assert again is rig.ports[1]
    assert rig.switch.table.find(mac(9)) is None


def test_malformed_frames_of_a_peer_are_dropped_and_counted() -> None:
    rig = Rig()
    good = frame(BROADCAST, mac(9))
    from_a_group = frame(mac(1), BROADCAST)

    rig.switch.from_peer([b"", good[:13], good.ljust(MTU + 15), from_a_group, good, good.ljust(MTU + 14)], rig.ports[0])

    assert rig.ports[0].traffic.dropped == {Drop.MALFORMED: 4}
    assert rig.taken == [2, 2, 0, 0]
    assert len(rig.switch.table) == 1


def test_frames_for_a_lost_peer_are_counted_and_the_others_get_theirs() -> None:
    rig = Rig()
    rig.peers[0].drop = Drop.PEER_LOST

    rig.send(BROADCAST, mac(1))

    assert rig.taken == [0, 1, 0, 1]
    assert rig.ports[0].traffic.dropped == {Drop.PEER_LOST: 1}
    assert (rig.ports[0].traffic.sent_frames, rig.ports[1].traffic.sent_frames) == (0, 1)


@given(st.lists(st.integers(14, 9014), max_size=200))
def test_a_peer_gets_all_frames_in_order_in_bounded_batches(sizes: list[int]) -> None:
    peer = Peer()
    port = PeerPort(peer.offer)
    frames = [frame(mac(n), mac(1), n_bytes) for n, n_bytes in enumerate(sizes)]

    for sent in frames:
        port.put(sent, Card())
    port.flush()

    assert peer.frames == frames
    assert all(0 < len(batch) <= MAX_NET_FRAMES for batch in peer.batches)
    assert all(sum(map(len, batch)) <= MAX_BATCH_BYTES for batch in peer.batches)


@given(st.lists(st.tuples(st.integers(0, 2 * MAX_ADDRESSES), st.integers(0, 2), st.integers(0, 100)), max_size=80))
def test_the_table_is_bounded_and_finds_the_last_port_within_the_age(seen: list[tuple[int, int, int]]) -> None:
    clock, ports = Clock(), [Card(), Card(), Card()]
    table = MacTable(clock)
    last: dict[int, tuple[int, float]] = {}
    for address, port, seconds in seen:
        clock.now_s += seconds
        table.learn(mac(address), ports[port])
        last[address] = (port, clock.now_s)
        assert len(table) <= MAX_ADDRESSES
    for address, (port, at_s) in last.items():
        fresh = clock.now_s - at_s <= AGEING_SECONDS
        assert table.find(mac(address)) is (ports[port] if fresh else None)


def test_a_flood_of_addresses_drives_out_the_oldest_only() -> None:
    table, card = MacTable(Clock()), Card()
    for number in range(MAX_ADDRESSES):
        table.learn(mac(number), card)
    table.learn(mac(0), card)

    table.learn(mac(MAX_ADDRESSES), card)

    assert len(table) == MAX_ADDRESSES
    assert table.find(mac(1)) is None
    assert table.find(mac(0)) is card


def test_l1_a_sender_without_end_takes_no_place_of_another() -> None:
    queue, loud, quiet = FairQueue(8), Card(), Card()
    for number in range(100):
        queue.put(b"loud %d" % number, loud)

    assert not queue.put(b"quiet 0", quiet)
    assert not queue.put(b"quiet 1", quiet)
    assert not queue.put(b"loud 100", loud)

    taken = [queue.take() for _ in range(len(queue))]
    assert taken[:4] == [b"loud 0", b"quiet 0", b"loud 1", b"quiet 1"]
    assert taken[4:] == [b"loud 2", b"loud 3", b"loud 4", b"loud 5"]
    assert len(queue) == 0


@given(st.lists(st.one_of(st.integers(0, 3), st.none()), max_size=200))
def test_a_fair_queue_is_bounded_keeps_the_order_of_each_and_tells_what_it_drops(steps: list[int | None]) -> None:
    """A number is a frame of that origin, None takes one."""
    queue, origins = FairQueue(8), [Card() for _ in range(4)]
    taken: list[list[int]] = [[] for _ in origins]
    n_put = n_dropped = 0
    for step in steps:
        if step is not None:
            n_put += 1
            n_dropped += not queue.put(bytes([step, n_put]), origins[step])
        elif queue:
            origin, number = queue.take()
            taken[origin].append(number)
        assert len(queue) <= 8
    while queue:
        origin, number = queue.take()
        taken[origin].append(number)

    assert all(numbers == sorted(numbers) for numbers in taken)
    assert sum(map(len, taken)) + n_dropped == n_put
