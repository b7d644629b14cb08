"""The frames of a machine, taken, checked and loaded: from another host or out of a snapshot."""

from __future__ import annotations

from protocol import ucalls as u
from protocol.declare import Call
from protocol.errors import MalformedMessage
from protocol.geometry import PAGE_BYTES
from services.qemu.migration.kvm_port import KvmPort
from services.qemu.migration.machine import MovableMachine
from services.qemu.migration.places import KVM_STATE, KVM_STATE_ROOM_BYTES, RECORD
from services.qemu.migration.stream import MAX_STATE_BYTES, Frame, FrameKind, StatePart
from shared.page_batch import decode_pages
from shared.stream_buffer import StreamBuffer

_STATES = frozenset({"devices", "kvm"})
_ZEROS = bytes(PAGE_BYTES)


class Inflow:
    """Of one machine, which does not run."""

    def __init__(self, machine: MovableMachine, kvm: KvmPort, stream: StreamBuffer) -> None:
        self._machine, self._kvm, self._stream = machine, kvm, stream
        self._n_pages = machine.vm.memory_bytes // PAGE_BYTES
        self._states: dict[str, bytearray] = {}
        self._whole: set[str] = set()
        self._checked = False
        self._written: set[int] = set()
        """GFNs that something came for: only those can hold another content than zeros."""

    def is_whole(self, *, secure: bool) -> bool:
        """Whether all is here, of a `secure` VM also for its ultravisor."""
        return self._whole >= _STATES and (self._checked or not secure)

    async def take(self, frame: Frame, *, secure: bool) -> None:
        """The next frame; raises PefboxError."""
        if frame.kind is FrameKind.RECORD and secure:
            (checked,) = await self.give(u.UV_IMPORT_RECORD, frame.payload)
            self._checked = bool(checked)
        elif frame.kind is FrameKind.PAGES:
            self._take_pages(frame.payload)
        elif frame.kind is FrameKind.STATE:
            self._take_part(StatePart.decode(frame.payload))
        elif frame.kind is not FrameKind.ROUND_END:
            raise MalformedMessage(f"{frame.kind.name} came among the pages")

    async def load(self) -> None:
        """Have kvm and the devices go on from their states, once all is here. Raises PefboxError."""
        devices, kvm = bytes(self._states.pop("devices")), bytes(self._states.pop("kvm"))
        if len(kvm) > KVM_STATE_ROOM_BYTES:
            raise MalformedMessage(f"{len(kvm)} bytes of kvm's state")
        await self._machine.make_windows(devices)
        self._stream.write(KVM_STATE, kvm)
        await self._kvm.load(KVM_STATE, len(kvm))
        await self._machine.load_devices(devices)

    async def load_secure(self) -> bytes:
        """Have the ultravisor put its part together, behind `load`; the record READY."""
        (n_bytes,) = await self._kvm.ucall(u.UV_IMPORT_READY, RECORD)
        ready = self._stream.read(RECORD, n_bytes)
        if not self._machine.is_running:
            # kvm holds the processor, too, so that it stands still when the ultravisor lets it go.
            await self._kvm.go_on()
            await self._kvm.stop()
        return ready

    async def give(self, step: Call, message: memoryview) -> list[int]:
        """Give the ultravisor a message that came; the results of the step."""
        self._stream.write(RECORD, message)
        return await self._kvm.ucall(step, RECORD, len(message))

    def _take_pages(self, payload: memoryview) -> None:
        for page in decode_pages(payload, PAGE_BYTES):
            if page.gfn >= self._n_pages:
                raise MalformedMessage(f"gfn {page.gfn:#x} is outside the VM")
            if page.content:
                self._machine.write_page(page.gfn, page.content)
                self._written.add(page.gfn)
            elif page.gfn in self._written:
                self._machine.write_page(page.gfn, _ZEROS)

    def _take_part(self, part: StatePart) -> None:
        if part.name not in _STATES or part.name in self._whole:
            raise MalformedMessage(f"a part of the state {part.name!r}, which has none")
        data = self._states.setdefault(part.name, bytearray())
        if len(data) + len(part.data) > MAX_STATE_BYTES:
            raise MalformedMessage(f"more than {MAX_STATE_BYTES} bytes of the state {part.name!r}")
        data += part.data
        if part.last:
            self._whole.add(part.name)
