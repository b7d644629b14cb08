"""Sharing and unsharing: all or nothing, zeroed before it is seen, and only what the guest asked for (S2, S3)."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol.codes import HCode, UCode
from protocol.declare import Call
from protocol.errors import CallTimeout
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gfn_of, gpa_of
from protocol.hcalls import H_PAGE_IN_NONSHARED, H_PAGE_IN_SHARED, H_SVM_PAGE_IN
from services.ultravisor import page_calls, sharing
from services.ultravisor.hypervisor import Hypervisor
from services.ultravisor.normal_ram import NormalRam
from services.ultravisor.page_calls import PageRequest
from services.ultravisor.page_state import TRANSIENT, GfnState, PageEvent
from services.ultravisor.partition import Partition
from services.ultravisor.secure_memory import SecureAccount
from services.ultravisor.sharing import MAX_REFUSALS, SvmBroken
from services.ultravisor.svm import Svm, SvmPhase
from shared.partition_map import RW, MapKind, entry, kind_of
from shared.real_address import real_address
from tests.unit.page_ways import way_to

LPID = 5
N_PAGES = 8
SIZE_BYTES = N_PAGES * PAGE_BYTES
ZEROS = bytes(PAGE_BYTES)
Ask = Callable[[int, int], Awaitable[int]]
"""What kvm does with H_SVM_PAGE_IN of a frame with these flags."""


class PlayedKvm:
    """Answers H_SVM_PAGE_IN by offering the frame, unless a test plays it otherwise; `asked` are frames and flags."""

    def __init__(self, svm: Svm) -> None:
        self.svm = svm
        self.asked: list[tuple[int, int]] = []
        self.does: Ask = self.obey

    async def ask(self, _lpid: int, call: Call, args: list[int], _cause: int) -> list[int]:
        assert call is H_SVM_PAGE_IN
        assert args[2] == PAGE_SHIFT
        gfn = gfn_of(args[0])
        self.asked.append((gfn, args[1]))
        await trio.lowlevel.checkpoint()
        return [await self.does(gfn, args[1])]

    async def obey(self, gfn: int, _flags: int) -> int:
        code = page_calls.page_in(self.svm, real_address(LPID, gpa_of(gfn)), gpa_of(gfn), 0, PAGE_SHIFT)
        return HCode.H_SUCCESS if code is UCode.U_SUCCESS else HCode.H_PARAMETER


class Rig:
    """A secure VM of 8 pages whose guest and kvm are played."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, SIZE_BYTES)
        self.svm = Svm("vm1", LPID, 1, NormalRam(os.dup(self.fd), SIZE_BYTES), SecureAccount(SIZE_BYTES))
        page_calls.register_slot(self.svm, 0, SIZE_BYTES, 0, 0)
        self.svm.phase = SvmPhase.SECURE
        self.svm.map_all()
        self.acknowledges = True
        self.kvm = PlayedKvm(self.svm)
        self.partition = cast(Partition, SimpleNamespace(invalidator=self, lpid=LPID, mark_dirty=lambda _gfn: None))
        self.hypervisor = cast(Hypervisor, self.kvm)

    async def invalidate(self, _gfns: list[int], _cause: int = 0) -> bool:
        await trio.lowlevel.checkpoint()
        return self.acknowledges

    async def share(self, gfn: int, n_pages: int = 1) -> UCode:
        return await sharing.share(self.partition, self.svm, self.hypervisor, gfn, n_pages, 0)

    async def unshare(self, gfn: int, n_pages: int = 1) -> UCode:
        return await sharing.unshare(self.partition, self.svm, self.hypervisor, gfn, n_pages, 0)

    async def unshare_all(self) -> UCode:
        return await sharing.unshare_all(self.partition, self.svm, self.hypervisor, 0)

    async def bring_in(self, gfn: int) -> bool:
        return await sharing.bring_in(self.partition, self.svm, self.hypervisor, gfn, 0)

    async def page_out(self, gfn: int) -> UCode:
        request = PageRequest(real_address(LPID, gpa_of(gfn)), gpa_of(gfn), 0, PAGE_SHIFT, 0)
        return (await page_calls.page_out(self.partition, self.svm, [request]))[0]

    def store(self, gfn: int, content: bytes) -> None:
        if self.svm.states[gfn] is GfnState.SHARED:
            os.pwrite(self.fd, content, gpa_of(gfn))
        else:
            self.svm.secure_page(gfn)[:] = content

    def frame(self, gfn: int) -> bytes:
        return os.pread(self.fd, PAGE_BYTES, gpa_of(gfn))

    def states(self, *gfns: int) -> list[str]:
        return [self.svm.states[gfn].name for gfn in gfns]

    def close(self) -> None:
        self.svm.release()
        self.svm.ram.close()
        os.close(self.fd)


@pytest.fixture
def rig() -> Iterator[Rig]:
    it = Rig()
    for gfn in range(N_PAGES):
        it.store(gfn, bytes([gfn + 1]) * PAGE_BYTES)
    yield it
    it.close()


# -- share ------------------------------------------------------------------------------------------------------------


async def test_a_shared_page_is_zero_and_mapped_without_execution(rig: Rig) -> None:
    os.pwrite(rig.fd, b"left by the host", gpa_of(2))

    assert await rig.share(2) is UCode.U_SUCCESS

    assert rig.states(2) == ["SHARED"]
    assert rig.svm.map[2] == entry(MapKind.SHARED, 2, RW)
    assert rig.frame(2) == ZEROS


async def test_a_page_that_is_shared_already_keeps_its_content(rig: Rig) -> None:
    await rig.share(2)
    rig.store(2, b"x" * PAGE_BYTES)

    assert await rig.share(1, 3) is UCode.U_SUCCESS

    assert rig.frame(2) == b"x" * PAGE_BYTES
    assert rig.states(1, 2, 3) == ["SHARED"] * 3


@pytest.mark.parametrize(
    ("gfn", "n_pages", "code"),
    [
        (0, 0, UCode.U_P3),
        (0, N_PAGES + 1, UCode.U_P3),
        (N_PAGES - 1, 2, UCode.U_P2),
        (N_PAGES, 1, UCode.U_P2),
        ((1 << 64) - 1, 2, UCode.U_P2),
    ],
)
async def test_a_range_outside_the_slots_is_refused(rig: Rig, gfn: int, n_pages: int, code: UCode) -> None:
    assert await rig.share(gfn, n_pages) is code
    assert await rig.unshare(gfn, n_pages) is code
    assert not rig.kvm.asked


@pytest.mark.parametrize(("gfn", "n_pages"), [(0x78, 1), (0x40, 64), (16, 1), (8, 8)])
def test_a_range_counted_in_pages_of_4_kib_is_recognised(rig: Rig, gfn: int, n_pages: int) -> None:
    hint = sharing.small_pages_hint(rig.svm, gfn, n_pages)

    assert hint is not None
    assert "CONFIG_PPC_64K_PAGES" in hint


@pytest.mark.parametrize(
    ("gfn", "n_pages"), [(0, 8), (3, 1), (N_PAGES * 16, 1), (0, N_PAGES * 16 + 1), (5, 0), (1 << 63, 1 << 63)]
)
def test_other_ranges_are_not_blamed_on_the_page_size(rig: Rig, gfn: int, n_pages: int) -> None:
    assert sharing.small_pages_hint(rig.svm, gfn, n_pages) is None


async def test_a_refusal_of_one_page_reverts_the_whole_range_with_its_content(rig: Rig) -> None:
    async def refuse_one(gfn: int, flags: int) -> int:
        return HCode.H_PARAMETER if (gfn, flags) == (3, H_PAGE_IN_SHARED) else await rig.kvm.obey(gfn, flags)

    rig.kvm.does = refuse_one

    assert await rig.share(1, 4) is UCode.U_PARAMETER

    assert rig.states(1, 2, 3, 4) == ["SECURE"] * 4
    for gfn in range(1, 5):
        assert kind_of(rig.svm.map[gfn]) is MapKind.SECURE
        assert bytes(rig.svm.secure_page(gfn)) == bytes([gfn + 1]) * PAGE_BYTES
        assert rig.frame(gfn) == ZEROS


async def test_a_guest_that_does_not_acknowledge_keeps_its_pages(rig: Rig) -> None:
    rig.acknowledges = False

    assert await rig.share(1, 2) is UCode.U_RETRY

    assert rig.states(1, 2) == ["SECURE", "SECURE"]
    assert not rig.kvm.asked


async def test_a_page_in_transition_is_told_to_retry_and_left_alone(rig: Rig) -> None:
    rig.svm.apply(2, PageEvent.OUT_BEGIN)

    assert await rig.share(1, 3) is UCode.U_RETRY
    assert await rig.unshare(1, 3) is UCode.U_RETRY
    assert await rig.unshare_all() is UCode.U_RETRY

    assert rig.states(1, 2, 3) == ["SECURE", "PAGING_OUT", "SECURE"]


async def test_a_paged_out_page_comes_in_before_it_is_shared(rig: Rig) -> None:
    await rig.page_out(2)

    assert await rig.share(2) is UCode.U_SUCCESS

    assert rig.kvm.asked == [(2, H_PAGE_IN_NONSHARED), (2, H_PAGE_IN_SHARED)]
    assert rig.frame(2) == ZEROS


async def test_a_frame_that_cannot_be_zeroed_is_never_mapped(rig: Rig) -> None:
    async def truncate(gfn: int, flags: int) -> int:
        os.ftruncate(rig.fd, 0)
        return await rig.kvm.obey(gfn, flags)

    rig.kvm.does = truncate

    assert await rig.share(2) is UCode.U_PARAMETER

    assert rig.states(2) == ["SECURE"]
    assert kind_of(rig.svm.map[2]) is MapKind.SECURE


# -- unshare ----------------------------------------------------------------------------------------------------------


async def test_an_unshared_page_is_zero_and_secure(rig: Rig) -> None:
    await rig.share(2)
    rig.store(2, b"public" * 9000)

    assert await rig.unshare(1, 3) is UCode.U_SUCCESS

    assert rig.states(1, 2, 3) == ["SECURE"] * 3
    assert bytes(rig.svm.secure_page(2)) == ZEROS
    assert bytes(rig.svm.secure_page(1)) == b"\2" * PAGE_BYTES


async def test_the_ultravisors_own_pages_are_not_the_guests_to_unshare(rig: Rig) -> None:
    rig.svm.apply(2, PageEvent.MAKE_IMPLICIT)
    await rig.share(3)

    assert await rig.unshare(2, 2) is UCode.U_P2
    assert await rig.unshare_all() is UCode.U_SUCCESS

    assert rig.states(2, 3) == ["SHARED_IMPLICIT", "SECURE"]


async def test_a_hypervisor_that_keeps_a_shared_frame_ends_the_vm(rig: Rig) -> None:
    await rig.share(2)

    async def refuse(_gfn: int, _flags: int) -> int:
        return HCode.H_PARAMETER

    rig.kvm.does = refuse

    with pytest.raises(SvmBroken, match="hypervisor-refused-unshare"):
        await rig.unshare(2)


async def test_a_hypervisor_that_only_says_that_it_dropped_the_frame_ends_the_vm(rig: Rig) -> None:
    await rig.share(2)

    async def lie(_gfn: int, _flags: int) -> int:
        return HCode.H_SUCCESS

    rig.kvm.does = lie

    with pytest.raises(SvmBroken, match="hypervisor-kept-shared-page"):
        await rig.unshare(2)


# -- bring in ---------------------------------------------------------------------------------------------------------


async def test_three_refused_images_of_a_page_end_the_vm(rig: Rig) -> None:
    await rig.page_out(2)
    os.pwrite(rig.fd, b"forged", gpa_of(2))

    for _ in range(MAX_REFUSALS - 1):
        assert not await rig.bring_in(2)
    with pytest.raises(SvmBroken, match="page-integrity"):
        await rig.bring_in(2)


async def test_a_page_that_is_withheld_three_times_ends_the_vm(rig: Rig) -> None:
    await rig.page_out(2)

    async def withhold(_gfn: int, _flags: int) -> int:
        return HCode.H_PARAMETER

    rig.kvm.does = withhold

    for _ in range(MAX_REFUSALS - 1):
        assert not await rig.bring_in(2)
    with pytest.raises(SvmBroken, match="page-withheld"):
        await rig.bring_in(2)


async def test_a_busy_hypervisor_is_asked_again_for_a_while_and_blamed_for_nothing(
    rig: Rig, autojump_clock: object
) -> None:
    await rig.page_out(2)

    async def busy(_gfn: int, _flags: int) -> int:
        return HCode.H_BUSY

    rig.kvm.does = busy

    assert not await rig.bring_in(2)

    assert len(rig.kvm.asked) > 1
    assert not rig.svm.withheld


async def test_a_page_that_was_shared_while_kvm_was_busy_is_not_asked_for_as_a_secure_one(
    rig: Rig, autojump_clock: object
) -> None:
    """Asked so, kvm would drop the frame that guest and host share by then."""
    await rig.page_out(2)

    async def busy_until_it_is_shared(gfn: int, _flags: int) -> int:
        rig.kvm.does = rig.kvm.obey
        assert await rig.kvm.obey(gfn, H_PAGE_IN_NONSHARED) == HCode.H_SUCCESS
        assert await rig.share(gfn) is UCode.U_SUCCESS
        return HCode.H_BUSY

    rig.kvm.does = busy_until_it_is_shared

    assert not await rig.bring_in(2)

    assert rig.kvm.asked == [(2, H_PAGE_IN_NONSHARED), (2, H_PAGE_IN_SHARED)]
    assert rig.states(2) == ["SHARED"]


async def test_a_silent_hypervisor_ends_the_vm(rig: Rig) -> None:
    async def silent(_gfn: int, _flags: int) -> int:
        raise CallTimeout("alpha/kvm", "H_SVM_PAGE_IN", 15)

    rig.kvm.does = silent

    with pytest.raises(SvmBroken, match="hypervisor-silent: alpha/kvm"):
        await rig.share(1, 4)


# -- any order --------------------------------------------------------------------------------------------------------

GFNS = st.integers(0, N_PAGES - 1)


class PageLife(RuleBasedStateMachine):
    """S2 and S3 under any order of calls of the guest and of a host that forges images and refuses pages."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        self.shared: set[int] = set()
        self.private = dict.fromkeys(range(N_PAGES), ZEROS)
        self.seen: dict[int, list[bytes]] = {gfn: [] for gfn in range(N_PAGES)}
        self.refusing: set[int] = set()
        self.rig.kvm.does = self.serve

    async def serve(self, gfn: int, flags: int) -> int:
        refused = gfn in self.refusing and flags == H_PAGE_IN_SHARED
        return HCode.H_PARAMETER if refused else await self.rig.kvm.obey(gfn, flags)

    @rule(gfn=GFNS, n_pages=st.integers(1, 3), refused=st.sets(GFNS, max_size=1))
    def share(self, gfn: int, n_pages: int, refused: set[int]) -> None:
        pages = set(range(gfn, min(gfn + n_pages, N_PAGES)))
        self.refusing = refused
        code = trio.run(self.rig.share, gfn, len(pages))
        assert code is (UCode.U_PARAMETER if refused & (pages - self.shared) else UCode.U_SUCCESS)
        if code is not UCode.U_SUCCESS:
            return
        for page in pages - self.shared:
            assert self.rig.frame(page) == ZEROS
        self.shared |= pages

    @rule(gfn=GFNS, n_pages=st.integers(1, 3))
    def unshare(self, gfn: int, n_pages: int) -> None:
        pages = range(gfn, min(gfn + n_pages, N_PAGES))
        assert trio.run(self.rig.unshare, gfn, len(pages)) is UCode.U_SUCCESS
        for page in self.shared & set(pages):
            self.private[page] = ZEROS
            assert bytes(self.rig.svm.secure_page(page)) == ZEROS
        self.shared -= set(pages)

    @rule()
    def unshare_all(self) -> None:
        assert trio.run(self.rig.unshare_all) is UCode.U_SUCCESS
        self.private.update(dict.fromkeys(self.shared, ZEROS))
        self.shared.clear()

    @rule(gfn=GFNS)
    def store(self, gfn: int) -> None:
        if self.rig.svm.states[gfn] is GfnState.PAGED_OUT:
            return
        content = os.urandom(64) * (PAGE_BYTES // 64)
        self.rig.store(gfn, content)
        if gfn not in self.shared:
            self.private[gfn] = content

    @rule(gfn=GFNS)
    def page_out(self, gfn: int) -> None:
        code = trio.run(self.rig.page_out, gfn)
        out = self.rig.svm.states[gfn] is GfnState.PAGED_OUT
        assert code in ((UCode.U_SUCCESS, UCode.U_PARAMETER) if out else (UCode.U_SUCCESS,))
        if out and code is UCode.U_SUCCESS:
            self.seen[gfn].append(self.rig.frame(gfn))

    @rule(gfn=GFNS, other=GFNS, data=st.data())
    def offer(self, gfn: int, other: int, data: st.DataObject) -> None:
        """The host puts any image it has ever seen into a frame and offers that."""
        if self.rig.svm.states[gfn] is not GfnState.PAGED_OUT:
            return
        good = self.rig.frame(gfn)
        image = data.draw(st.sampled_from([good, *self.seen[other]]))
        os.pwrite(self.rig.fd, image, gpa_of(gfn))
        code = trio.run(self.rig.kvm.obey, gfn, H_PAGE_IN_NONSHARED)
        assert (code == HCode.H_SUCCESS) is (image == good)
        if image != good:
            os.pwrite(self.rig.fd, good, gpa_of(gfn))

    @invariant()
    def the_host_sees_only_what_was_shared(self) -> None:
        for gfn in range(N_PAGES):
            state = self.rig.svm.states[gfn]
            assert state not in TRANSIENT
            assert (state is GfnState.SHARED) is (gfn in self.shared)
            if gfn not in self.shared and self.private[gfn] != ZEROS:
                assert self.private[gfn][:64] not in self.rig.frame(gfn)

    @invariant()
    def private_pages_keep_their_content(self) -> None:
        for gfn in set(range(N_PAGES)) - self.shared:
            if self.rig.svm.states[gfn] is GfnState.SECURE:
                assert bytes(self.rig.svm.secure_page(gfn)) == self.private[gfn]
                assert kind_of(self.rig.svm.map[gfn]) is MapKind.SECURE

    def teardown(self) -> None:
        self.rig.close()


TestPageLife = PageLife.TestCase
TestPageLife.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


# -- every state ------------------------------------------------------------------------------------------------------

S = GfnState
_OURS = {S.SHARED_IMPLICIT, S.SHARED_IMPLICIT_INV, S.PSEUDO_SHARED, S.PSEUDO_SHARED_INV}


def expected_answers(state: GfnState) -> list[tuple[UCode, GfnState]]:
    """What UV_SHARE_PAGE, UV_UNSHARE_PAGE, UV_UNSHARE_ALL_PAGES answer in a state, and what the page is then."""
    if state in TRANSIENT:
        return [(UCode.U_RETRY, state)] * 3
    if state in _OURS:
        # Shared already, in whatever way; and not the guest's to take back.
        return [(UCode.U_SUCCESS, state), (UCode.U_P2, state), (UCode.U_SUCCESS, state)]
    shared = state if state is S.SHARED_INV else S.SHARED
    private = state if state is S.PAGED_OUT else S.SECURE
    return [(UCode.U_SUCCESS, shared), (UCode.U_SUCCESS, private), (UCode.U_SUCCESS, private)]


@pytest.mark.parametrize("state", GfnState, ids=lambda state: state.name)
async def test_each_call_of_the_guest_in_each_state(state: GfnState) -> None:
    for call, expected in enumerate(expected_answers(state)):
        rig = Rig()
        if state is S.PAGED_OUT:
            await rig.page_out(2)
        else:
            for event in way_to(state):
                rig.svm.apply(2, event)
        if call == 0:
            answer = await rig.share(2)
        elif call == 1:
            answer = await rig.unshare(2)
        else:
            answer = await rig.unshare_all()
        assert (answer, rig.svm.states[2]) == expected, ("share", "unshare", "unshare all")[call]
        rig.close()
