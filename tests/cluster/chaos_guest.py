"""What a VM does while it is sent to and fro: it fills and sums pages, writes and flushes its disk, hashes all of it.

What memory and disk must hold afterwards follows from the answers on its console alone: what was answered is done.
"""

from __future__ import annotations

import hashlib
import re

import trio

from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES
from services.guest.model.region_writer import REGION_BYTES, region_pattern
from shared.typed_text import TypedText
from shared.virtio_blk import SECTOR_BYTES
from tests.cluster.moving import FILLED_GFNS, Traveller
from tests.cluster.vm_files import PROMPT, console_until

ANSWER_SECONDS = 45.0
"""More than qemu waits for the destination's word, and for whoever resolves the doubt that follows."""
_READ_SECONDS = 0.3
_TROUBLE_SECONDS = 0.02
_DEVICE_GONE = "the device is gone"


class Workload:
    """One line at a time. `text` is what this boot of the VM has printed."""

    def __init__(self, traveller: Traveller) -> None:
        self._traveller, self._vm = traveller, traveller.vm
        self.text = ""
        self._since = 0
        self._filled: dict[int, int] = {}
        """The byte that fills each page, by GFN."""
        self._n_writes = 0
        """Of this boot, as answered."""
        self._region = self._region_on_host()
        self._writing = False
        self._byte = 0
        self._enough = False

    # -- typing and reading -----------------------------------------------------------------------------------

    async def boot(self) -> None:
        """The VM has begun anew: its memory is empty, and its disk has what it had, or what was just being written."""
        self.check_region()
        await console_until(self._vm, f"{PROMPT}\r\n> ")
        self.text, self._since, self._filled, self._n_writes = "", 0, {}, 0
        self._region, self._writing = self._region_on_host(), False
        await self._read()

    async def ask(self, line: str) -> str:
        """The answer to a line; raises UserError when none comes."""
        begin = len(self.text)
        pattern = re.compile(re.escape(line) + r"\r\n((?:ok|error)[^\r\n]*)\r\n> ")
        with trio.move_on_after(ANSWER_SECONDS):
            await self._type(line)
            while (found := pattern.search(self.text, begin)) is None:
                await self._read()
            return found[1]
        raise UserError(f"vm1: no answer to {line!r} within {ANSWER_SECONDS:g} s: {self.text[begin:]!r}")

    async def _type(self, line: str) -> None:
        text = TypedText(f"{line}\r".encode())
        while True:
            try:
                await self._vm.console_write(text)
            except UserError:
                # Its kvm is stopped, or gone, and then this boot ends.
                await trio.sleep(_TROUBLE_SECONDS)
            else:
                return

    async def _read(self) -> None:
        try:
            data, self._since = await self._vm.console_read(self._since, _READ_SECONDS)
        except UserError:
            await trio.sleep(_TROUBLE_SECONDS)
            return
        self.text += data.decode(errors="replace")

    # -- work -------------------------------------------------------------------------------------------------

    async def pound(self) -> None:
        """Work until `stop`; every answer is checked."""
        self._enough = False
        while not self._enough:
            await self.generation()

    def stop(self) -> None:
        """What is being done is the last."""
        self._enough = True

    async def generation(self) -> None:
        """New content for a page and for the region of the disk."""
        self._byte = self._byte % 255 + 1
        gfn = FILLED_GFNS[self._byte % len(FILLED_GFNS)]
        assert await self.ask(f"fill {gfn} {self._byte}") == "ok"
        self._filled[gfn] = self._byte
        await self._sum(gfn)
        await self._write()
        if self._byte % 4 == 0:
            # Nothing writes meanwhile: what the guest reads is what the host has.
            assert (await self._ask_disk("hash")).split()[1] == self._traveller.hash_on_host()

    async def _ask_disk(self, line: str) -> str:
        """As `ask`. A guest whose qemu has died may say so before it is ended, too; whoever knows ends this then."""
        answer = await self.ask(line)
        if _DEVICE_GONE in answer:
            await trio.sleep(ANSWER_SECONDS)
        return answer

    async def _sum(self, gfn: int) -> None:
        expected = hashlib.sha256(bytes([self._filled[gfn]]) * PAGE_BYTES).hexdigest()
        assert await self.ask(f"sum {gfn}") == f"ok {expected}", f"gfn {gfn}"

    async def _write(self) -> None:
        self._writing = True
        answer = await self._ask_disk("write")
        pattern = region_pattern(self._n_writes + 1, REGION_BYTES)
        assert answer.endswith(hashlib.sha256(pattern).hexdigest()), answer
        self._n_writes += 1
        self._region, self._writing = pattern, False

    # -- what must be there -----------------------------------------------------------------------------------

    async def check(self) -> None:
        """Of a VM that lives: memory and disk are those of the newest generation."""
        for gfn in self._filled:
            await self._sum(gfn)
        self.check_region()
        assert (await self.ask("hash")).split()[1] == self._traveller.hash_on_host()

    def check_region(self) -> None:
        """The disk has every write that was answered; each sector of one that was not is old or new."""
        wanted = [self._region]
        if self._writing:
            wanted.append(region_pattern(self._n_writes + 1, REGION_BYTES))
        found = self._region_on_host()
        for at in range(0, REGION_BYTES, SECTOR_BYTES):
            sector = slice(at, at + SECTOR_BYTES)
            assert found[sector] in [region[sector] for region in wanted], f"a write was lost: byte {at} of the region"

    def _region_on_host(self) -> bytes:
        with self._traveller.disk.open("rb") as disk:
            disk.seek(self._traveller.layout.scratch.offset_bytes)
            return disk.read(REGION_BYTES)
