"""The mappings of a guest process: the RAM segment, and the secure memory that only it and the ultravisor have."""

from __future__ import annotations

import mmap
import os
import socket

import msgspec

from protocol.errors import HostFault
from protocol.geometry import PAGE_SHIFT
from services.guest.address_space import AddressSpace
from services.runtime.log import Log
from shared.memfd import SealedMemory, map_sealed, unmap
from shared.partition_map import ENTRY_BYTES, PartitionMap

_N_DESCRIPTORS = 2
_MAX_ANNOUNCEMENT_BYTES = 64
_announcement = msgspec.msgpack.Decoder(tuple[int, int])


class GuestVmMemory:
    """Which map and memory the address space uses now; `private` is the socketpair that the ultravisor shares."""

    def __init__(self, lpid: int, ram_fd: int, size_bytes: int, private: socket.socket, log: Log) -> None:
        self.lpid = lpid
        self.size_bytes = size_bytes
        self._log = log
        # Python's recv_fds drops its flags: a start without descriptors must not hold up the processor.
        private.setblocking(False)
        self._private = private
        self._n_pages = size_bytes >> PAGE_SHIFT
        try:
            self._ram = mmap.mmap(ram_fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            raise HostFault(f"cannot map the RAM segment: {error}") from None
        self.normal = memoryview(self._ram)
        self.dirty = SealedMemory("pefbox-dirty-guest", self._n_pages, others_write=True)
        self.secure_dirty = SealedMemory("pefbox-dirty-secure", self._n_pages, others_write=True)
        """As `dirty`, while S is set: kvm, which reads and clears the other, must not reach this one."""
        self._normal_map: mmap.mmap | None = None
        self._secure: mmap.mmap | None = None
        self._secure_map: mmap.mmap | None = None
        self.space: AddressSpace | None = None

    def take_normal_map(self, fd: int) -> None:
        """The map that kvm made for the VM while it is a normal one; raises HostFault."""
        self._normal_map = map_sealed(fd, self._n_pages * ENTRY_BYTES)

    def take_normal_map_again(self, fd: int) -> None:
        """kvm's map once more, after the secure VM has ended. One that is of no use is refused: kvm may err or lie."""
        if self._normal_map is not None or self._secure is not None:
            # A reset before the secure VM ran: the map of before was never dropped.
            os.close(fd)
            return
        try:
            self.take_normal_map(fd)
        except HostFault as fault:
            self._log.error("kvm's map refused", reason=str(fault))

    def use_normal(self) -> bool:
        """Translate through kvm's map; False while it has not come."""
        assert self.space is not None
        if self._normal_map is None:
            return False
        self.space.use_map(PartitionMap(memoryview(self._normal_map)), None)
        return True

    def use_secure(self) -> bool:
        """Take secure memory and map that the ultravisor sent, and translate through them; False when they are bad.

        kvm's map is dropped then.
        """
        try:
            data, descriptors = self._receive_secure()
            if len(descriptors) != _N_DESCRIPTORS:
                raise HostFault("secure memory came without its descriptors")
            size_bytes, n_pages = _announcement.decode(data)
            self._secure = mmap.mmap(descriptors[0], size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            os.close(descriptors[0])
            self._secure_map = map_sealed(descriptors[1], n_pages * ENTRY_BYTES)
        except (OSError, HostFault, msgspec.MsgspecError) as error:
            self._log.error("no secure memory", reason=str(error))
            return False
        assert self.space is not None
        entries = PartitionMap(memoryview(self._secure_map))
        self.space.use_map(entries, memoryview(self._secure), self.secure_dirty.buffer)
        normal_map, self._normal_map = self._normal_map, None
        if normal_map is not None:
            unmap(normal_map)
        return True

    def refuse_secure(self) -> None:
        """Drop what the ultravisor sent with an order that is refused: the next order must not find it."""
        try:
            _, descriptors = self._receive_secure()
        except OSError:
            return
        for descriptor in descriptors:
            os.close(descriptor)

    def _receive_secure(self) -> tuple[bytes, list[int]]:
        data, descriptors, _, _ = socket.recv_fds(self._private, _MAX_ANNOUNCEMENT_BYTES, _N_DESCRIPTORS)
        return data, descriptors

    def drop_secure(self) -> None:
        """Unmap secure memory and map. The caller promises that nothing uses them."""
        assert self.space is not None
        self.space.use_map(None, None)
        secure, self._secure = self._secure, None
        secure_map, self._secure_map = self._secure_map, None
        for mapping in (secure, secure_map):
            if mapping is not None:
                unmap(mapping)
