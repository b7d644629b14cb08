"""UV_ESM: a normal VM turns itself into a secure one.

    1 H_SVM_INIT_START        kvm registers the memory slots (UV_REGISTER_MEM_SLOT)
    2 page in                 device tree, RTAS, initrd with the ESM blob, kernel (H_SVM_PAGE_IN, UV_PAGE_IN)
    3 measure                 open the blob with the machine key, compare every digest
    4 bounce pages            declared in the tree's memory reservations, shared with the hypervisor
    5 H_SVM_INIT_DONE         kvm drops every other page; what was not measured starts as zeros
    6 commit                  map and secure memory go to the guest, which starts at kbase with S set

Until step 6 the content that the host gave is kept as it came. A refusal anywhere before it is undone: kvm gets its
pages back, the VM goes on as a normal one, and UV_ESM returns U_PARAMETER. The reason goes to the operator only.
Source: open-power/ultravisor `svm/svm-esm.c`; Linux `Documentation/powerpc/ultravisor.rst`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import trio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from protocol.codes import HCode
from protocol.declare import Call
from protocol.errors import CallTimeout, HostFault, ImageRefused, PefboxError
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gfn_of, gpa_of
from protocol.hcalls import H_PAGE_IN_NONSHARED, H_PAGE_IN_SHARED, H_SVM_INIT_DONE, H_SVM_INIT_START
from protocol.messages import SVM_START, StartBody
from services.ultravisor.boot_layout import (
    MAX_FDT_BYTES,
    BootLayout,
    Extent,
    checked_extent,
    free_pages,
    read_layout,
)
from services.ultravisor.esm_files import EsmFiles
from services.ultravisor.hypervisor import Hypervisor
from services.ultravisor.measure import OpenedBlob, check_image, open_blob
from services.ultravisor.page_requests import ask_page_in, for_each_page
from services.ultravisor.page_state import PageEvent
from services.ultravisor.partition import Partition
from services.ultravisor.sharing import SvmBroken
from services.ultravisor.svm import Svm, SvmPhase
from shared.esm_digest import SecureImage
from shared.fdt_reader import FdtTree, fdt_total_bytes, read_fdt
from shared.fdt_writer import write_fdt
from shared.newc import find_blob

BOUNCE_PAGES = 5
"""One page for RTAS argument blocks and four for buffers."""

_FDT_HEADER_BYTES = 40
_START_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class SecureBoot:
    """What a committed switch leaves for run time."""

    bounce_gfns: list[int]
    files: EsmFiles
    lockbox: str
    initrd_bytes: int
    kernel_bytes: int


class EsmSwitch:
    """One UV_ESM under way: `run` makes the VM a secure one, `start_guest` has it begin."""

    def __init__(self, partition: Partition, svm: Svm, hypervisor: Hypervisor, key: RSAPrivateKey, cause: int) -> None:
        self._partition = partition
        self._svm = svm
        self._hypervisor = hypervisor
        self._key = key
        self._cause = cause

    async def run(self, kbase: int, fdt_gpa: int) -> SecureBoot:
        """All up to the guest's start. Raises ImageRefused with the true reason, and the caller aborts."""
        await self._init_start()
        fdt = await self._take_fdt(fdt_gpa)
        tree = await _in_thread(self._parse_tree, fdt)
        layout = read_layout(tree, fdt, self._svm.ram.size_bytes)
        await self._take(layout.rtas)
        await self._take(layout.initrd)
        opened = await self._open_blob(layout.initrd)
        kernel = checked_extent("kernel", kbase, opened.digests.kernel_size_bytes, self._svm.ram.size_bytes)
        await self._take(kernel)
        parts = [layout.fdt, layout.rtas, layout.initrd, kernel]
        await _in_thread(check_image, opened.digests, self._image(layout, kernel))
        bounce = await self._make_bounce_pages(layout, parts, tree)
        await self._make_pseudo_shared(layout.rtas)
        new_tree = await _in_thread(self._edit_tree, tree, layout, parts, bounce)
        await self._init_done()
        # The end of the VM, too, wakes whoever waits for kvm.
        await trio.lowlevel.checkpoint_if_cancelled()
        self._commit(parts, layout.fdt, new_tree)
        return SecureBoot(bounce, opened.files(), opened.lockbox, layout.initrd.n_bytes, kernel.n_bytes)

    # -- 1 and 5: the hypervisor's consent --------------------------------------------------------------------

    async def _init_start(self) -> None:
        code = (await self._ask(H_SVM_INIT_START, []))[0]
        if code == HCode.H_PARAMETER:
            raise ImageRefused("hypervisor: memory slots not registered; is secure memory exhausted?")
        self._expect(code, "H_SVM_INIT_START")
        if not self._svm.slots:
            raise ImageRefused("hypervisor: registered no memory slot")

    async def _init_done(self) -> None:
        self._expect((await self._ask(H_SVM_INIT_DONE, []))[0], "H_SVM_INIT_DONE")

    # -- 2: page in -------------------------------------------------------------------------------------------

    async def _take_fdt(self, gpa: int) -> Extent:
        header = checked_extent("device tree", gpa, _FDT_HEADER_BYTES, self._svm.ram.size_bytes)
        await self._take(header)
        try:
            total = fdt_total_bytes(self._bytes(header))
        except PefboxError as error:
            raise ImageRefused(f"device tree: {error}") from None
        if total > MAX_FDT_BYTES:
            raise ImageRefused(f"device tree: {total} bytes are more than {MAX_FDT_BYTES}")
        fdt = checked_extent("device tree", gpa, total, self._svm.ram.size_bytes)
        await self._take(fdt)
        return fdt

    async def _take(self, extent: Extent) -> None:
        gfns = [gfn for gfn in extent.gfns if gfn not in self._svm.taken_in]
        if not self._svm.in_slots(extent.gfns.start, len(extent.gfns)):
            raise ImageRefused(f"{extent.n_bytes} bytes at {extent.gpa:#x} lie outside the memory slots")

        refused: list[int] = []

        async def take_page(gfn: int) -> None:
            if refused:
                return
            code = await self._ask_page_in(gfn, H_PAGE_IN_NONSHARED)
            if code != HCode.H_SUCCESS or gfn not in self._svm.taken_in:
                refused.append(gfn)

        await for_each_page(gfns, take_page)
        if refused:
            raise ImageRefused(f"hypervisor: did not give the page of gfn {refused[0]:#x}")

    # -- 3: measure -------------------------------------------------------------------------------------------

    def _parse_tree(self, fdt: Extent) -> FdtTree:
        try:
            return read_fdt(self._bytes(fdt))
        except PefboxError as error:
            raise ImageRefused(f"device tree: {error}") from None

    async def _open_blob(self, initrd: Extent) -> OpenedBlob:
        archive = self._bytes(initrd)
        found = find_blob(archive)
        blob = archive[found.blob_start : found.blob_end]
        return await _in_thread(open_blob, blob, self._key)

    def _image(self, layout: BootLayout, kernel: Extent) -> SecureImage:
        archive = self._bytes(layout.initrd)
        return SecureImage(
            rtas=self._bytes(layout.rtas),
            kernel=self._bytes(kernel),
            initrd=archive[find_blob(archive).initrd_start :],
            bootargs=layout.bootargs,
        )

    # -- 4: bounce pages --------------------------------------------------------------------------------------

    async def _make_bounce_pages(self, layout: BootLayout, parts: list[Extent], tree: FdtTree) -> list[int]:
        gfns = free_pages(layout, parts, tree.reservations, BOUNCE_PAGES)
        for gfn in gfns:
            self._svm.apply(gfn, PageEvent.MAKE_IMPLICIT, self._cause)
            await self._ask_shared(gfn, "a bounce page")
            try:
                # What the host had there is kept, for a refusal further on gives it back.
                self._svm.take_in(gfn)
                self._svm.zero_shared(gfn)
            except HostFault as fault:
                raise ImageRefused(f"bounce page: {fault}") from None
        return gfns

    async def _make_pseudo_shared(self, rtas: Extent) -> None:
        """Of the RTAS area guest and hypervisor each have a page of their own: the measured one, and zeros."""
        for gfn in rtas.gfns:
            self._svm.apply(gfn, PageEvent.MAKE_PSEUDO, self._cause)
            await self._ask_shared(gfn, "the RTAS area")
            try:
                self._svm.zero_shared(gfn)
            except HostFault as fault:
                raise ImageRefused(f"RTAS area: {fault}") from None

    async def _ask_shared(self, gfn: int, what: str) -> None:
        self._expect(await self._ask_page_in(gfn, H_PAGE_IN_SHARED), f"H_SVM_PAGE_IN of {what}")

    def _edit_tree(self, tree: FdtTree, layout: BootLayout, parts: list[Extent], bounce: list[int]) -> bytes:
        tree.reservations.append((gpa_of(bounce[0]), len(bounce) * PAGE_BYTES))
        data = write_fdt(tree)
        room = Extent(layout.fdt.gpa, len(data))
        others = [part for part in parts if part is not layout.fdt]
        if room.gfns.stop > layout.fdt.gfns.stop or any(room.overlaps(other) for other in others):
            raise ImageRefused("device tree: no room for the memory reservations")
        return data

    # -- 6: commit --------------------------------------------------------------------------------------------

    def _commit(self, parts: list[Extent], fdt: Extent, tree: bytes) -> None:
        kept = [*(part for part in parts if part is not fdt), Extent(fdt.gpa, len(tree))]
        self._svm.memory.buffer[fdt.gpa : fdt.gpa + len(tree)] = tree
        for gfn in sorted(self._svm.taken_in):
            self._zero_unmeasured(gfn, kept)
        self._svm.taken_in.clear()
        self._svm.phase = SvmPhase.SECURE
        self._svm.map_all()

    def _zero_unmeasured(self, gfn: int, kept: list[Extent]) -> None:
        """Whatever the host had beside a measured part in the same page is not taken over."""
        page = self._svm.secure_page(gfn)
        start = gpa_of(gfn)
        at = 0
        for extent in sorted(kept, key=lambda extent: extent.gpa):
            first, last = extent.gpa - start, extent.end - start
            if last <= at or first >= PAGE_BYTES:
                continue
            if first > at:
                page[at:first] = bytes(first - at)
            at = min(last, PAGE_BYTES)
        page[at:] = bytes(PAGE_BYTES - at)

    async def start_guest(self, kbase: int, fdt_gpa: int) -> None:
        """Memory, map and start go to the guest; raises SvmBroken when it does not start."""
        body = StartBody(0, kbase, {3: fdt_gpa, 4: kbase, 5: 0})
        try:
            self._partition.hand_over_memory(self._svm)
            with self._partition.guest.patience.fail_after(_START_SECONDS):
                reply = await self._partition.guest.call(SVM_START, body, self._cause)
        except (OSError, PefboxError, trio.TooSlowError) as error:
            raise SvmBroken(f"guest-did-not-start: {error}") from None
        if reply.code != HCode.H_SUCCESS:
            raise SvmBroken(f"guest-did-not-start: code {reply.code}")

    # -- helpers ----------------------------------------------------------------------------------------------

    def _bytes(self, extent: Extent) -> memoryview:
        return self._svm.memory.buffer[extent.gpa : extent.end]

    async def _ask_page_in(self, gfn: int, flags: int) -> int:
        with _no_answer_refuses():
            return await ask_page_in(self._hypervisor, self._partition.lpid, gfn, flags, self._cause)

    async def _ask(self, call: Call, args: list[int]) -> list[int]:
        with _no_answer_refuses():
            return await self._hypervisor.ask(self._partition.lpid, call, args, self._cause)

    def _expect(self, code: int, what: str) -> None:
        if code != HCode.H_SUCCESS:
            names = {int(known): known.name for known in HCode}
            raise ImageRefused(f"hypervisor: {what} returned {names.get(code, code)}")


@contextmanager
def _no_answer_refuses() -> Iterator[None]:
    """A hypervisor that does not answer gets no secure VM."""
    try:
        yield
    except CallTimeout as timeout:
        raise ImageRefused(f"hypervisor: {timeout}") from None


_P = ParamSpec("_P")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _Refused:
    reason: str


async def _in_thread(check: Callable[_P, _Result], *args: _P.args, **kwargs: _P.kwargs) -> _Result:
    """What `check` returns; raises ImageRefused as it does. For what takes long: hashes, RSA, a tree of 1 MiB.

    An exception that leaves a thread keeps its frames, and with them views of secure memory, until the garbage
    collector comes by; the memory of a refused VM could not be given back before. So the reason comes as a value.
    """

    def verdict() -> _Result | _Refused:
        try:
            return check(*args, **kwargs)
        except ImageRefused as refused:
            return _Refused(refused.reason)

    found = await trio.to_thread.run_sync(verdict)
    if isinstance(found, _Refused):
        raise ImageRefused(found.reason)
    return found


def first_refusal(partition: Partition, kbase: int, fdt_gpa: int) -> str | None:
    """Which argument of UV_ESM is bad (`kbase` or `fdt`), or None."""
    for name, gpa in (("kbase", kbase), ("fdt", fdt_gpa)):
        if gpa == 0 or gfn_of(gpa) >= partition.ram.size_bytes >> PAGE_SHIFT:
            return name
    return None
