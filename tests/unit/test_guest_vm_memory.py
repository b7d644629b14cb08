"""Which maps a guest process holds: kvm's while the VM is a normal one, the ultravisor's while it is secure."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import structlog

from protocol.geometry import PAGE_BYTES
from services.guest.address_space import AddressSpace
from services.guest.vm_memory import GuestVmMemory
from shared.memfd import SealedMemory
from shared.partition_map import ENTRY_BYTES

N_PAGES = 4
SIZE_BYTES = N_PAGES * PAGE_BYTES
LOG = structlog.wrap_logger(structlog.ReturnLogger())


class Rig:
    """The memory of one guest, with the files that kvm and ultravisor made for it."""

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ram = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(ram, SIZE_BYTES)
        self.secure = os.memfd_create("pefbox-secure-vm1", os.MFD_CLOEXEC)
        os.ftruncate(self.secure, SIZE_BYTES)
        self.of_kvm = SealedMemory("pefbox-map-of-kvm", N_PAGES * ENTRY_BYTES)
        self.of_ultravisor = SealedMemory("pefbox-map-of-ultravisor", N_PAGES * ENTRY_BYTES)
        self.memory = GuestVmMemory(5, ram, SIZE_BYTES, self._theirs, LOG)
        os.close(ram)
        self.memory.space = AddressSpace(self.memory.normal, self.memory.dirty.buffer, lambda _gfn, _access: None)
        self.memory.take_normal_map(os.dup(self.of_kvm.fd))

    def turn_secure(self) -> bool:
        """The ultravisor sends memory and map, and the guest is started with S set."""
        announcement = msgspec.msgpack.encode((SIZE_BYTES, N_PAGES))
        socket.send_fds(self.ours, [announcement], [self.secure, self.of_ultravisor.fd])
        return self.memory.use_secure()

    def close(self) -> None:
        """Release what the rig opened."""
        self.memory.drop_secure()
        for end in (self.ours, self._theirs):
            end.close()
        os.close(self.secure)
        self.of_kvm.close()
        self.of_ultravisor.close()

    def give_map(self, fd: int) -> None:
        """kvm gives a map again."""
        self.memory.take_normal_map_again(fd)


@pytest.fixture
def rig() -> Iterator[Rig]:
    it = Rig()
    yield it
    it.close()


def maps_held() -> list[str]:
    """Mappings of either map in this process beside those of their owners (which write)."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    return [line[5].split("-of-")[1].split()[0] for line in lines if "pefbox-map-of-" in line[-1] and line[1] == "r--s"]


def test_a_guest_that_turns_secure_drops_kvms_map(rig: Rig) -> None:
    assert rig.memory.use_normal()
    assert maps_held() == ["kvm"]

    assert rig.turn_secure()

    assert maps_held() == ["ultravisor"]


def test_without_kvms_map_there_is_no_start_as_a_normal_vm(rig: Rig) -> None:
    rig.turn_secure()
    rig.memory.drop_secure()
    assert maps_held() == []
    assert not rig.memory.use_normal()

    rig.give_map(os.dup(rig.of_kvm.fd))

    assert rig.memory.use_normal()
    assert maps_held() == ["kvm"]


def test_a_map_that_comes_while_the_vm_is_secure_is_not_taken(rig: Rig) -> None:
    rig.turn_secure()

    rig.give_map(os.dup(rig.of_kvm.fd))

    assert maps_held() == ["ultravisor"]


def test_a_second_map_of_a_normal_vm_is_not_taken(rig: Rig) -> None:
    rig.memory.use_normal()

    rig.give_map(os.dup(rig.of_kvm.fd))

    assert maps_held() == ["kvm"]


@pytest.mark.parametrize("hostile", ["unsealed", "too small"])
def test_a_map_that_could_be_cut_is_refused_and_a_good_one_taken_after_it(rig: Rig, hostile: str) -> None:
    """S5."""
    rig.turn_secure()
    rig.memory.drop_secure()
    if hostile == "unsealed":
        fd = os.memfd_create("map", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, N_PAGES * ENTRY_BYTES)
    else:
        small = SealedMemory("map", ENTRY_BYTES)
        fd = os.dup(small.fd)
        small.close()

    rig.give_map(fd)

    assert not rig.memory.use_normal()
    rig.give_map(os.dup(rig.of_kvm.fd))
    assert rig.memory.use_normal()


def test_secure_memory_that_is_bad_leaves_the_normal_map(rig: Rig) -> None:
    rig.memory.use_normal()

    assert not rig.memory.use_secure()

    assert maps_held() == ["kvm"]
    assert rig.memory.use_normal()
