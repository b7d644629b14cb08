"""Where a processor sleeps: no message and no post is slept over, whichever call consumed the socket's edge."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from protocol import messages as m
from protocol.hcalls import H_IPOLL
from protocol.links import KVM_GUEST, ULTRAVISOR_GUEST
from protocol.wire import MessageKind, encode
from services.guest.inbox import Inbox
from services.guest.link_end import LinkEnd

LONG_MS = 5_000
SEED = 20


class Peer:
    """The other end of a link: sends replies and bursts."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.bind(endpoint)

    def send(self, correlation: int) -> None:
        self.socket.send(encode(MessageKind.REPLY, H_IPOLL.number, correlation, 0, [0]))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[tuple[Inbox, list[LinkEnd], list[Peer]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ends, peers = [], []
    for kind in (KVM_GUEST, ULTRAVISOR_GUEST):
        endpoint = f"ipc://{tmp_path}/{kind.name}"
        peers.append(Peer(context, endpoint))
        socket = context.socket(zmq.DEALER)
        socket.connect(endpoint)
        ends.append(LinkEnd(socket, kind, kind.name, "peer"))
    yield Inbox(ends), ends, peers
    context.destroy(linger=0)


def receive_all(inbox: Inbox, ends: list[LinkEnd], n_messages: int) -> list[tuple[str, int]]:
    """Messages as a processor takes them: one of each ready end, then sleep again; fails when it sleeps too long."""
    got: list[tuple[str, int]] = []
    while len(got) < n_messages:
        ready = inbox.wait(LONG_MS)
        assert ready, f"slept over a message; {len(got)} of {n_messages} came"
        for end in ready:
            envelope = end.receive()
            if envelope is not None:
                got.append((end.id, envelope.correlation))
    return got


def test_messages_of_both_links_come_however_calls_and_bursts_fall(
    rig: tuple[Inbox, list[LinkEnd], list[Peer]],
) -> None:
    inbox, ends, peers = rig
    chance = random.Random(SEED)
    for round_ in range(300):
        sizes = [chance.randrange(4), chance.randrange(4)]
        early = chance.random() < 0.5
        if early:
            ends[chance.randrange(2)].send_call(H_IPOLL.number, [0, 0], 0)
        for peer, n in zip(peers, sizes, strict=True):
            for number in range(n):
                peer.send(round_ * 8 + number)
        if not early:
            ends[chance.randrange(2)].send_call(H_IPOLL.number, [0, 0], 0)
        assert len(receive_all(inbox, ends, sum(sizes))) == sum(sizes)


def test_a_call_that_eats_the_edge_does_not_hide_the_message(rig: tuple[Inbox, list[LinkEnd], list[Peer]]) -> None:
    inbox, ends, peers = rig
    for number in range(100):
        peers[0].send(number)
        while not ends[0].may_have_message():
            ends[0].send_event(m.GUEST_CRASHED.number, m.CrashBody(0, ""), 0)
        assert receive_all(inbox, ends, 1) == [(ends[0].id, number)]
        assert ends[0].receive() is None


def test_a_post_of_another_thread_ends_the_sleep(rig: tuple[Inbox, list[LinkEnd], list[Peer]]) -> None:
    inbox, _ends, _peers = rig
    done: list[int] = []
    for number in range(100):
        poster = threading.Thread(target=inbox.post, args=(lambda number=number: done.append(number),))
        poster.start()
        while len(done) <= number:
            inbox.wait(LONG_MS)
            inbox.run_posted()
        poster.join()
    assert done == list(range(100))


def test_nothing_comes_and_the_sleep_ends_by_itself(rig: tuple[Inbox, list[LinkEnd], list[Peer]]) -> None:
    inbox, ends, _peers = rig
    assert inbox.wait(1) == [] or all(end.receive() is None for end in ends)
