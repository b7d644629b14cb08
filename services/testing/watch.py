"""A secure VM whose every page is accounted for, and the checks of the invariants S1, S2 and S3 on it.

S1: every private page holds bytes that exist nowhere else, so that one search of normal RAM finds a leak.
S2: the host sees in plain exactly what the guest shared, a newly shared page is zero on both sides.
S3: an altered, replayed or moved image, or one of an earlier life of the VM, is not taken back.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from enum import Enum

from protocol.codes import HCode, UCode
from protocol.geometry import PAGE_BYTES, gpa_of
from services.testing.host import PlayedVm, RealHost
from services.testing.image import FIRST_FREE_GFN, RTAS_GFN, PlayedImage
from shared.host_view import HostState
from shared.partition_map import MapKind

N_BOUNCE_PAGES = 5
_TAG_BYTES = 16
_ZERO_PAGE = bytes(PAGE_BYTES)


class InvariantBroken(AssertionError):
    """A check of S1, S2 or S3 failed; the text says which and where."""


class Page(Enum):
    """What a page is to the guest."""

    PRIVATE = "private"
    OUT = "out"
    SHARED = "shared"


class Forgery(Enum):
    """How a hostile host tampers with the image of a page."""

    ALTERED = "altered"
    REPLAYED = "replayed"
    MOVED = "moved"
    EARLIER_LIFE = "earlier life"


class WatchedVm:
    """One VM of a real host. `pages` are the GFNs that tests play with; the guest planted a secret in each."""

    def __init__(self, host: RealHost, vm: PlayedVm, image: PlayedImage, pages: Iterable[int], seed: int) -> None:
        self.host = host
        self.vm = vm
        self.image = image
        self.pages = list(pages)
        self.shared: set[int] = set()
        self.content: dict[int, bytes] = {}
        """What the guest last stored into each page that is not shared; unknown pages are missing."""
        self.forgeries_refused = 0
        self._tag = os.urandom(_TAG_BYTES)
        self._random = random.Random(seed)
        self._images: dict[int, bytes] = {}
        self._images_of_earlier_life: dict[int, bytes] = {}
        if min(self.pages) < FIRST_FREE_GFN or max(self.pages) >= vm.n_pages - N_BOUNCE_PAGES:
            raise ValueError("the image or the bounce pages lie in a page to play with")

    # -- life -------------------------------------------------------------------------------------------------

    async def boot(self) -> None:
        """Load the image and start the VM as a normal one."""
        _expect(await self.vm.qemu.power_on(self.image), HCode.H_SUCCESS, "VM_START")

    async def turn_secure(self) -> None:
        """UV_ESM of a running normal VM."""
        _expect(await self.vm.guest.esm(self.image), UCode.U_SUCCESS, "UV_ESM")
        self.began()
        await self.plant_all()

    def began(self) -> None:
        """UV_ESM succeeded: every page is private and zero."""
        self.shared.clear()
        self.content = dict.fromkeys(self.pages, _ZERO_PAGE)

    async def plant_all(self) -> None:
        """The guest plants a secret in every private page."""
        for gfn in self.pages:
            if gfn not in self.shared:
                await self.vm.guest.touch(gfn)
                self.plant(gfn)

    def ended(self) -> None:
        """The secure VM is gone; what the host kept of it is worthless now."""
        self.shared.clear()
        self.content.clear()
        self._images_of_earlier_life.update(self._images)
        self._images.clear()

    def plant(self, gfn: int) -> None:
        """The guest fills a private page that its map gives with bytes that exist nowhere else."""
        filler = self._random.randbytes(64)
        content = (self._tag + os.urandom(_TAG_BYTES) + filler) * (PAGE_BYTES // (2 * _TAG_BYTES + 64) + 1)
        self.content[gfn] = content[:PAGE_BYTES]
        self.vm.guest.store(gfn, self.content[gfn])

    async def bring_to(self, gfn: int, wanted: Page) -> None:
        """Make a page private, paged out or shared, from whatever it is, by the calls that do so."""
        guest = self.vm.guest
        if wanted is Page.SHARED:
            if gfn not in self.shared:
                _expect(await guest.share(gfn), UCode.U_SUCCESS, "UV_SHARE_PAGE")
                self.now_shared(gfn)
            return
        if gfn in self.shared:
            _expect(await guest.unshare(gfn), UCode.U_SUCCESS, "UV_UNSHARE_PAGE")
            self.now_private(gfn)
        await guest.touch(gfn)
        if gfn not in self.content:
            self.plant(gfn)
        if wanted is Page.OUT:
            await self.page_out(gfn)

    def now_shared(self, gfn: int) -> None:
        """A share of `gfn` succeeded."""
        self.shared.add(gfn)
        self.content.pop(gfn, None)

    def now_private(self, gfn: int) -> None:
        """An unshare of `gfn` succeeded."""
        self.shared.discard(gfn)
        self.content[gfn] = _ZERO_PAGE

    async def page_out(self, gfn: int) -> bytes:
        """Have kvm page a private page out; its image."""
        await self._move("page.out", gfn, HCode.H_SUCCESS)
        self._images[gfn] = self.vm.raw_page(gfn)
        return self._images[gfn]

    async def _move(self, what: str, gfn: int, wanted: HCode) -> None:
        codes = (await self.host.kvm.query(what, vm=self.vm.name, gpa=gpa_of(gfn), n=1))["codes"]
        if codes != {wanted.name: 1}:
            raise InvariantBroken(f"{what} of gfn {gfn:#x} gave {codes}, not {wanted.name}")

    # -- S1 ---------------------------------------------------------------------------------------------------

    def check_s1(self) -> bytes:
        """No byte that the guest stored privately is in normal RAM; returns that RAM."""
        raw = self.vm.raw()
        at = raw.find(self._tag)
        if at >= 0:
            raise InvariantBroken(f"S1: a private byte of the guest is in normal RAM at {at:#x}")
        return raw

    # -- S2 ---------------------------------------------------------------------------------------------------

    def check_s2(self, raw: bytes) -> None:
        """The VM is secure: the host's view, its frames and the guest's map agree on what is shared."""
        bounce = range(self.vm.n_pages - N_BOUNCE_PAGES, self.vm.n_pages)
        for gfn in range(self.vm.n_pages):
            frame = raw[gpa_of(gfn) : gpa_of(gfn + 1)]
            if gfn in bounce:
                self._check_view(gfn, HostState.SHARED, MapKind.ABSENT)
            elif gfn == RTAS_GFN:
                self._check_view(gfn, HostState.SHARED, MapKind.SECURE)
                _must(frame == _ZERO_PAGE, "S2: the host's page of the RTAS area is not zero")
            elif gfn in self.shared:
                self._check_view(gfn, HostState.SHARED, MapKind.SHARED)
            elif self.vm.qemu.view(gfn) is HostState.PRESENT:
                self._check_view(gfn, HostState.PRESENT, MapKind.ABSENT)
                self._check_image(gfn, frame)
            else:
                self._check_view(gfn, HostState.ABSENT, MapKind.SECURE)
                _must(frame == _ZERO_PAGE, f"S2: the frame of private gfn {gfn:#x} is no hole")

    def check_newly_shared(self, gfn: int) -> None:
        """A page that was just shared reads zero on both sides, and what the guest stores then the host sees."""
        guest = self.vm.guest
        _must(self.vm.raw_page(gfn) == _ZERO_PAGE, f"S2: newly shared gfn {gfn:#x} is not zero for the host")
        _must(guest.load(gfn) == _ZERO_PAGE, f"S2: newly shared gfn {gfn:#x} is not zero for the guest")
        public = self._random.randbytes(32)
        guest.store(gfn, public)
        _must(self.vm.raw_page(gfn).startswith(public), f"gfn {gfn:#x} is shared but the host does not see it")

    async def check_content(self, gfn: int) -> None:
        """A private page holds what the guest stored, wherever it was meanwhile."""
        await self.vm.guest.touch(gfn)
        _must(self.vm.guest.load(gfn) == self.content[gfn], f"gfn {gfn:#x} lost what the guest stored")

    def _check_view(self, gfn: int, view: HostState, kind: MapKind) -> None:
        found_view, found_kind = self.vm.qemu.view(gfn), self.vm.guest.kind(gfn)
        if (found_view, found_kind) != (view, kind):
            found = f"{found_view.name} to the host and {found_kind.name} to the guest"
            raise InvariantBroken(f"S2: gfn {gfn:#x} is {found}, not {view.name} and {kind.name}")

    def _check_image(self, gfn: int, frame: bytes) -> None:
        plain = self.content.get(gfn, _ZERO_PAGE)
        _must(frame not in (plain, _ZERO_PAGE), f"S2: the image of gfn {gfn:#x} is no ciphertext")

    # -- S3 ---------------------------------------------------------------------------------------------------

    async def check_s3(self, gfn: int, other: int, how: Forgery) -> None:
        """The image of private page `gfn` is refused when it was tampered with, and taken as it was made."""
        forged = await self._forge(gfn, other, how)
        good = await self.page_out(gfn)
        if how is Forgery.ALTERED:
            forged = _flipped(good, self._random.randrange(PAGE_BYTES * 8))
        self.vm.forge(gfn, forged)
        await self._move("page.in", gfn, HCode.H_PARAMETER)
        self.forgeries_refused += 1
        self.vm.forge(gfn, good)
        await self._move("page.in", gfn, HCode.H_SUCCESS)
        await self.check_content(gfn)

    def possible_forgeries(self, gfn: int) -> list[Forgery]:
        """How the image of `gfn` can be forged: every way, if the host kept one of an earlier life."""
        return [how for how in Forgery if how is not Forgery.EARLIER_LIFE or gfn in self._images_of_earlier_life]

    async def _forge(self, gfn: int, other: int, how: Forgery) -> bytes:
        await self.bring_to(gfn, Page.PRIVATE)
        if how is Forgery.REPLAYED:
            image = await self.page_out(gfn)
            await self._move("page.in", gfn, HCode.H_SUCCESS)
            return image
        if how is Forgery.MOVED:
            await self.bring_to(other, Page.PRIVATE)
            return await self.page_out(other)
        return self._images_of_earlier_life[gfn] if how is Forgery.EARLIER_LIFE else b""


def _flipped(image: bytes, bit: int) -> bytes:
    forged = bytearray(image)
    forged[bit // 8] ^= 1 << bit % 8
    return bytes(forged)


def _must(condition: bool, otherwise: str) -> None:
    if not condition:
        raise InvariantBroken(otherwise)


def _expect(code: int, wanted: int, call: str) -> None:
    if code != wanted:
        raise InvariantBroken(f"{call} returned {code}, not {wanted}")
