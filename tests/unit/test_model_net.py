"""The model kernel's network driver and its echo workload, against a card and a network in this process."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codes import HCode, UCode
from protocol.geometry import PAGE_BYTES
from protocol.hcalls import H_PUT_TCE
from services.guest.exits import Exit, Idle, Pause
from services.guest.model.cpu import IMMEDIATE_TRIES, LATER_NS, Cpu
from services.guest.model.echo import ECHO_HEADER_BYTES, Echo, EchoKind, parse_echo, payload_of
from services.guest.model.engine import ModelEngine
from services.guest.model.state import MAX_STATE_BYTES, Calls, Machine
from services.guest.model.swiotlb import SLOT_BYTES, Direction, Swiotlb
from services.guest.model.virtio_net import N_BUFFERS, N_SLOTS, NetDrop
from services.guest.model.virtqueue import QueueError
from tests.unit.model_net import NET_SOURCE, OWN, PEER, PEER_TEXT, FakeNet, NetWorld, echo_peer, nobody
from tests.unit.test_model_kernel import SLICE_NS, decoded_at_safe_point, make_disk

BROADCAST = b"\xff" * 6
PATHS = [(False, False), (False, True), (True, False), (True, True)]
PATH_IDS = ["normal", "normal-iommu", "secure", "secure-iommu"]
RUN = re.compile(r"ok requests (\d+) bytes (\d+) ns (\d+) p50_ns (\d+) p99_ns (\d+) bounced (\d+) calls( \S+=\d+)*$")
"""As the answer of `io`, which tools read."""


def boot(net: FakeNet, *, secure: bool = True, access_platform: bool = False) -> NetWorld:
    """A kernel at its prompt."""
    command_line = "svm=on" if secure else "quiet"
    world = NetWorld(make_disk("prompt", command_line=command_line, access_platform=access_platform), net)
    world.wait_for("ready\r\n> ")
    assert world.secure is secure
    return world


def request(sequence: int, payload: bytes = b"payload", *, destination: bytes = OWN, source: bytes = PEER) -> bytes:
    return Echo(destination, source, EchoKind.REQUEST, sequence, payload).pack()


# -- frames -----------------------------------------------------------------------------------------------------------

MACS = st.binary(min_size=6, max_size=6).map(lambda mac: bytes([mac[0] & 0xFE]) + mac[1:])


@given(
    MACS, MACS, st.sampled_from(EchoKind), st.integers(0, (1 << 64) - 1), st.binary(max_size=600), st.binary(max_size=9)
)
def test_what_is_packed_is_parsed_and_padding_is_passed_over(
    destination: bytes, source: bytes, kind: EchoKind, sequence: int, payload: bytes, padding: bytes
) -> None:
    echo = Echo(destination, source, kind, sequence, payload)
    expected = echo if destination != source else None
    assert parse_echo(echo.pack() + padding) == expected
    assert len(echo.reply().pack()) == len(echo.pack()) == ECHO_HEADER_BYTES + len(payload)


@given(st.binary(max_size=80))
def test_any_bytes_are_parsed_or_refused_and_never_more_than_came(frame: bytes) -> None:
    for data in (frame, request(1)[:14] + frame, request(1)[:16] + frame):
        echo = parse_echo(data)
        assert echo is None or (data.startswith(echo.pack()) and len(echo.payload) <= len(data) - ECHO_HEADER_BYTES)


@given(st.integers(0, ECHO_HEADER_BYTES + 7))
def test_a_frame_that_was_cut_is_none(n_bytes: int) -> None:
    frame = request(7, b"12345678")
    assert parse_echo(frame[:n_bytes]) is None


# -- echo requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("secure", "access_platform"), PATHS, ids=PATH_IDS)
def test_ping_is_answered_and_the_card_touches_only_what_is_shared(secure: bool, access_platform: bool) -> None:
    world = boot(FakeNet(access_platform=access_platform), secure=secure, access_platform=access_platform)

    answer = world.ask(f"ping {PEER_TEXT} 5 1000")

    assert re.fullmatch(r"ok replies 5 of 5 p50_ns \d+ p99_ns \d+", answer)
    assert [len(frame) for frame in world.net.sent] == [ECHO_HEADER_BYTES + 1000] * 5
    assert world.ask("net") == f"ok {OWN.hex(':')} mtu 1500 link up in 5 5130 out 5 5130 dropped none"
    assert not world.private_touches
    assert not world.crash


@pytest.mark.parametrize(("secure", "access_platform"), PATHS, ids=PATH_IDS)
def test_blast_answers_in_the_form_of_a_run_of_disk_requests(secure: bool, access_platform: bool) -> None:
    world = boot(FakeNet(access_platform=access_platform), secure=secure, access_platform=access_platform)

    found = RUN.fullmatch(world.ask(f"blast {PEER_TEXT} 500 1400 32"))

    assert found
    n_done, n_bytes, _, p50_ns, p99_ns, bounced = map(int, found.groups()[:6])
    assert (n_done, n_bytes) == (500, 500 * 1400)
    assert 0 < p50_ns <= p99_ns
    assert bounced == (500 * 2 * (12 + ECHO_HEADER_BYTES + 1400) if secure else 0)
    state = decoded_at_safe_point(world)
    assert len(state.net.receiving) == N_BUFFERS
    assert len(state.net.free_slots) + len(state.net.sending) == N_SLOTS


def test_a_frame_of_several_buffers_is_put_together_and_without_them_the_mtu_is_that_of_one() -> None:
    jumbo = boot(FakeNet(mtu=9000))
    assert jumbo.ask(f"blast {PEER_TEXT} 40 8988 4").startswith("ok requests 40 bytes 359520 ")
    assert jumbo.ask(f"ping {PEER_TEXT} 1 8989") == "error up to 8988 bytes, by the MTU"
    single = boot(FakeNet(mtu=9000, mergeable=False))
    assert " mtu 2022 " in single.ask("net")
    assert single.ask(f"ping {PEER_TEXT} 3 2010").startswith("ok replies 3 of 3 ")
    assert not single.net.mergeable


def test_a_kernel_answers_requests_to_itself_and_nothing_else() -> None:
    world = boot(FakeNet(nobody))
    good = request(7, b"x" * 900)
    foreign = [
        b"\0" * 14,
        random.Random(1).randbytes(1000),
        request(1, destination=BROADCAST),
        request(1, destination=b"\x52\x54\0\0\0\x77"),
        request(1, source=b"\x53\x54\0\0\0\2"),
        request(1, source=OWN),
        request(1)[:-1],
        good[:12] + b"\x08\x00" + good[14:],
        good[:14] + b"\2" + good[15:],
        good[:15] + b"\3" + good[16:],
    ]
    strays = [Echo(OWN, PEER, EchoKind.REPLY, sequence, b"").pack() for sequence in (0, 1, 1 << 63)]

    world.deliver(*foreign, *strays, b"short", request(2, b"y" * 1489), good)

    world.run(lambda: bool(world.net.sent))
    assert world.net.sent == [Echo(PEER, OWN, EchoKind.REPLY, 7, b"x" * 900).pack()]
    wanted = {
        NetDrop.FOREIGN: len(foreign), NetDrop.STRAY: len(strays), NetDrop.MALFORMED: 1, NetDrop.OVERSIZED: 1,
    }  # fmt: skip
    assert {reason: world.dropped(reason) for reason in NetDrop} == {NetDrop.NO_SLOT: 0, **wanted}


def test_a_frame_longer_than_all_memory_for_one_is_only_counted() -> None:
    world = boot(FakeNet(nobody))
    world.deliver(request(3, b"z" * 60_000), request(4))
    world.run(lambda: bool(world.net.sent))
    assert world.net.sent == [Echo(PEER, OWN, EchoKind.REPLY, 4, b"payload").pack()]
    assert world.dropped(NetDrop.OVERSIZED) == 1


def test_a_reply_with_another_payload_or_from_somebody_else_is_none() -> None:
    def liar(frame: bytes) -> list[bytes]:
        echo = parse_echo(frame)
        assert echo
        other = Echo(OWN, b"\x52\x54\0\0\0\x09", EchoKind.REPLY, echo.sequence, echo.payload)
        return [Echo(OWN, PEER, EchoKind.REPLY, echo.sequence, echo.payload + b"!").pack(), other.pack()]

    world = boot(FakeNet(liar))
    assert world.ask(f"ping {PEER_TEXT} 2").startswith("ok replies 0 of 2 ")
    assert world.dropped(NetDrop.STRAY) == 4


def test_lost_requests_are_counted_and_a_run_without_any_reply_ends() -> None:
    world = boot(FakeNet(nobody))
    began_ns = world.clock.now
    assert world.ask(f"ping {PEER_TEXT}") == "ok replies 0 of 3 p50_ns 0 p99_ns 0"
    assert f"pefbox: net: 3 of 3 requests to {PEER_TEXT} lost" in world.console
    assert world.ask(f"blast {PEER_TEXT} 10000 64 32") == "error no reply for 5 s"
    assert world.clock.now - began_ns < 9_000_000_000
    answered = iter(range(1000))
    world.net.network = lambda frame: echo_peer(frame) if next(answered) % 4 else []
    assert world.ask(f"blast {PEER_TEXT} 40 64 4").startswith("ok requests 30 bytes 1920 ")
    assert f"pefbox: net: 10 of 40 requests to {PEER_TEXT} lost" in world.console


def test_a_card_that_takes_no_frame_costs_its_slots_and_works_again_when_it_does() -> None:
    world = boot(FakeNet())
    assert world.ask(f"ping {PEER_TEXT}").startswith("ok replies 3 of 3 ")
    world.net.stuck = True
    assert world.ask(f"blast {PEER_TEXT} 100 64 32") == "error no reply for 5 s"
    world.deliver(*(request(n) for n in range(5)))
    world.run(lambda: not world.pending)
    assert world.dropped(NetDrop.NO_SLOT) == 5
    world.net.stuck, world.net.network = False, nobody
    world._notify(world.net)
    assert NET_SOURCE in world.pending, "with no slot free the driver asks to be told"
    world.net.network = echo_peer
    assert world.ask(f"ping {PEER_TEXT}").startswith("ok replies 3 of 3 ")


def test_a_flood_holds_up_neither_the_prompt_nor_the_disk() -> None:
    """Every frame that is taken brings another, so that there is never none."""
    world = boot(FakeNet(nobody))
    world.net.network = lambda frame: [request(1)] * 2
    world.deliver(*[request(1)] * 100)
    assert world.ask("hash").startswith("ok ")
    assert world.ask("net").startswith("ok ")
    assert len(world.net.sent) > 100


@pytest.mark.parametrize(
    ("lie", "error"),
    [
        ("bad id", QueueError.BAD_ID),
        ("not a head", QueueError.NOT_A_HEAD),
        ("length", QueueError.USED_LENGTH),
        ("jump", QueueError.INDEX_JUMP),
        ("no parts", QueueError.PACKET_PARTS),
        ("many parts", QueueError.PACKET_PARTS),
    ],
)
def test_a_hostile_card_is_given_up_by_name_and_the_kernel_goes_on(lie: str, error: QueueError) -> None:
    world = boot(FakeNet(nobody))
    world.net.lie = lie
    world.deliver(request(1))
    world.run(lambda: not world.pending)
    assert world.ask("net") == f"error {error.value}"
    assert world.ask(f"ping {PEER_TEXT}") == f"error {error.value}"
    assert world.ask("hash").startswith("ok ")


def test_a_card_that_lies_in_a_run_ends_it() -> None:
    world = boot(FakeNet())
    world.typed += f"blast {PEER_TEXT} 1000 64\r".encode()
    world.run(lambda: len(world.net.sent) > 50)
    world.net.lie = "bad id"
    world.run(lambda: "error" in world.console and world.console.endswith("> "))
    assert f"error {QueueError.BAD_ID.value}\r\n" in world.console


def test_a_packet_shorter_than_its_header_is_dropped() -> None:
    world = boot(FakeNet(nobody))
    world.net.lie = "runt"
    world.deliver(request(1))
    world.run(lambda: not world.pending)
    world.net.lie = ""
    assert world.dropped(NetDrop.MALFORMED) == 1
    world.deliver(request(2))
    world.run(lambda: bool(world.net.sent))


@pytest.mark.parametrize("wrong", ["mac", "mtu", "no mac"])
def test_a_card_without_a_usable_address_or_mtu_is_left_alone(wrong: str) -> None:
    net = FakeNet()
    if wrong == "mac":
        net.mac = BROADCAST
    elif wrong == "mtu":
        net.mtu = 20
    else:
        net.offered &= ~(1 << 5)
    world = boot(net)
    reason = {"mac": "ff:ff:ff:ff:ff:ff is no address of a station", "mtu": "an MTU of 20 bytes"}.get(wrong)
    assert world.ask("net") == f"error {reason or 'the device has no address'}"
    assert f"pefbox: net: {reason or 'the device has no address'}" in world.console


def test_commands_that_cannot_be_obeyed_are_refused() -> None:
    world = boot(FakeNet())
    for wrong in (
        "net 1", "ping", "ping 52:54", "ping 52:54:00:00:00:zz", "ping 53:54:00:00:00:01", f"ping {OWN.hex(':')}",
        f"ping {PEER_TEXT} 0", f"ping {PEER_TEXT} 1001", f"ping {PEER_TEXT} 1 1489", f"blast {PEER_TEXT}",
        f"blast {PEER_TEXT} 1 64 33", f"blast {PEER_TEXT} 65537 64", f"blast {PEER_TEXT} 1 64 0",
    ):  # fmt: skip
        assert world.ask(wrong).startswith("error "), wrong
    assert not world.net.sent


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access_platform", [False, True], ids=["quirk", "iommu"])
def test_of_a_secure_vms_pages_the_card_sees_the_frames_and_nothing_beside_them(access_platform: bool) -> None:
    """All around its frames lies a secret: in the slots' pages and the buffers' pages, before and behind each frame."""
    world = boot(FakeNet(access_platform=access_platform), access_platform=access_platform)
    state = decoded_at_safe_point(world)
    secret = b"SECRET!" * 4
    last_slot = state.net.slots + (N_SLOTS - 1) * state.net.slot_bytes
    regions = [(state.net.slots, N_SLOTS * state.net.slot_bytes), (state.net.buffers, N_BUFFERS * SLOT_BYTES)]
    for gpa, n_bytes in (*regions, (state.net.assembly, PAGE_BYTES)):
        world.memory.store(gpa, (secret * (n_bytes // len(secret) + 1))[:n_bytes])

    world.deliver(request(1, b"from outside" * 10))
    assert world.ask(f"ping {PEER_TEXT} 3 100").startswith("ok replies 3 of 3 ")
    assert world.ask(f"blast {PEER_TEXT} 100 700").startswith("ok requests 100 ")

    assert secret in world.memory.load(last_slot + 1000, 1000), "behind the frame, in the slot that was used"
    assert not world.private_touches
    assert secret[:7] not in bytes(world.ram)
    assert not [packet for packet in world.net.packets if secret[:7] in packet]
    own = {payload_of(n, 700) for n in range(1, 200)}
    assert {parse_echo(frame).payload for frame in world.net.sent[-100:]} <= own  # type: ignore[union-attr]


def test_a_full_pool_delays_frames_and_loses_none() -> None:
    world = boot(FakeNet())
    state = decoded_at_safe_point(world)
    pool = Swiotlb(Cpu(world.memory, world.clock, Machine(), Calls()), state.pool)
    taken = list(iter(lambda: pool.map(state.net.assembly, SLOT_BYTES, Direction.FROM_DEVICE), None))
    world.typed += f"ping {PEER_TEXT} 1\r".encode()
    world.run(lambda: bool(decoded_at_safe_point(world).net.retry_ns))
    assert taken and not world.net.sent

    for slot in taken:
        pool.unmap(slot, SLOT_BYTES, Direction.FROM_DEVICE, 0)

    world.wait_for("ok replies 1 of 1 ")
    assert "lost" not in world.console


@pytest.mark.parametrize("access_platform", [False, True], ids=["quirk", "iommu"])
def test_no_step_of_the_driver_makes_more_than_85_exits(access_platform: bool) -> None:
    net = FakeNet(access_platform=access_platform, mtu=9000)
    world = NetWorld(make_disk("prompt", access_platform=access_platform), net)
    n_exits = longest = 0
    while "ok requests" not in world.console:
        exit_ = world.engine.run(SLICE_NS)
        n_exits = 0 if world.engine.at_safe_point else n_exits + (not isinstance(exit_, Pause))
        longest = max(longest, n_exits)
        world.serve(exit_)
        if world.console.endswith("ready\r\n> "):
            world.typed = world.typed or f"blast {PEER_TEXT} 60 8988 32\r".encode()
        if "blast" in world.console and len(net.sent) < 30:
            world.deliver(request(1, b"r" * 8900))
    assert 20 < longest <= 85


def test_a_card_that_is_started_again_keeps_none_of_its_former_mappings() -> None:
    net = FakeNet(access_platform=True)
    world = NetWorld(make_disk("prompt", command_line="quiet", access_platform=True), net, esm=UCode.U_PARAMETER)
    world.wait_for("ready\r\n> ")
    assert world.ask(f"blast {PEER_TEXT} 100 64 32").startswith("ok requests 100 ")
    mapped = len(world.tces)
    for _ in range(3):
        assert world.ask("esm") == "error U_PARAMETER"
        assert world.ask(f"blast {PEER_TEXT} 100 64 32").startswith("ok requests 100 ")
    assert len(world.tces) <= mapped + N_SLOTS


class BusyWorld(NetWorld):
    """kvm finds H_PUT_TCE busy now and then, for longer than a step waits."""

    busy_left = 0

    def serve(self, exit_: Exit) -> None:
        # After a busy call the kernel waits, and takes no interrupt meanwhile.
        if isinstance(exit_, Idle) and exit_.until_ns is not None and exit_.until_ns <= self.clock.now + LATER_NS:
            self.clock.now = max(self.clock.now, exit_.until_ns)
        super().serve(exit_)

    def _hcall(self, number: int, args: tuple[int, ...]) -> list[int]:
        if number == H_PUT_TCE.number and "blast" in self.console:
            if not self.busy_left and self.random.random() < 0.1:
                self.busy_left = 2 * IMMEDIATE_TRIES + 1
            if self.busy_left:
                self.busy_left -= 1
                return [HCode.H_BUSY]
        return super()._hcall(number, args)


@pytest.mark.parametrize("secure", [False, True], ids=["normal", "secure"])
def test_a_busy_call_in_the_middle_of_a_step_loses_no_frame_and_no_mapping(secure: bool) -> None:
    command_line = "svm=on" if secure else "quiet"
    disk = make_disk("prompt", command_line=command_line, access_platform=True)
    world = BusyWorld(disk, FakeNet(access_platform=True, mtu=9000))
    world.wait_for("ready\r\n> ")
    assert world.ask(f"blast {PEER_TEXT} 200 5000 6").startswith("ok requests 200 ")
    state = decoded_at_safe_point(world)
    assert state.calls.counts["H_PUT_TCE"] > 1.5 * (200 * 2 + 200 * 3)
    assert len(world.tces) <= N_BUFFERS + 3 * len(state.net.sending) + 2 * 16 + 1
    assert world.ask("net").endswith("dropped none")


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("secure", "access_platform"), PATHS, ids=PATH_IDS)
def test_a_run_saved_and_loaded_at_random_safe_points_loses_nothing(secure: bool, access_platform: bool) -> None:
    world = boot(FakeNet(access_platform=access_platform, mtu=9000), secure=secure, access_platform=access_platform)
    chance, n_loads, n_asked = random.Random(4), 0, 0
    world.typed += f"blast {PEER_TEXT} 300 5000 6\r".encode()
    world.run(lambda: "blast" in world.console)
    while not world.console.endswith("\n> "):
        world.serve(world.engine.run(0))
        assert not world.crash, world.crash
        if not world.engine.at_safe_point or chance.random() < 0.5:
            continue
        state = world.engine.save()
        assert len(state) <= MAX_STATE_BYTES
        world.engine = ModelEngine(world.memory, world.clock)
        world.engine.load(state)
        n_loads += 1
        if n_asked < 20 and n_loads % 7 == 0:
            n_asked += 1
            world.deliver(request(n_asked))
    assert "ok requests 300 bytes 1500000 " in world.console
    assert n_loads > 100
    replies = [echo for echo in map(parse_echo, world.net.sent) if echo and echo.kind is EchoKind.REPLY]
    assert [echo.sequence for echo in replies] == list(range(1, n_asked + 1)) and n_asked == 20
    assert world.ask("net").endswith("dropped none")
