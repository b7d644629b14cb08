"""The kvm process: links, VMs, hypercalls that the ultravisor passes on, questions of the operator."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from protocol.codes import HCode
from protocol.declare import Call
from protocol.errors import PeerGone, UserError
from protocol.geometry import gpa_of
from protocol.hcalls import HCALLS
from protocol.links import KVM_GUEST, KVM_QEMU
from protocol.refusals import Refusal
from protocol.startup import Keys, LinkEntry, LinkKey, VmEntry
from protocol.vm_state import VmState
from protocol.wire import Envelope
from services.kvm.memory import VmMemory
from services.kvm.ultravisor_port import UltravisorPort
from services.kvm.uvmem import IN_PART_PAGES, OUT_PART_PAGES
from services.kvm.vm import Vm
from services.runtime.link import DEFERRED, Link
from services.runtime.page_query import gfn_asked, gfns_asked
from services.runtime.process import Query, Runtime
from shared.host_view import HostState
from shared.stream_buffer import StreamBuffer
from shared.typed_text import Offer


class Kvm:
    """One host's KVM."""

    def __init__(self, runtime: Runtime, keys: Keys) -> None:
        self._runtime = runtime
        self._keys = {key.link: key for key in keys.links}
        self._vms: dict[int, Vm] = {}
        self._by_name: dict[str, Vm] = {}
        self._links: dict[str, list[Link]] = {}
        self._port: UltravisorPort | None = None

    async def start(self) -> None:
        """Open the link to the ultravisor."""
        entry = next(link for link in self._runtime.config.links if link.vm is None)

        def register(link: Link) -> None:
            self._port = UltravisorPort(link)
            for call in HCALLS:
                link.on(call, self._reflected(call))

        await self._runtime.open_link(entry, self._keys[entry.id], register)

    # -- hypercalls through the ultravisor --------------------------------------------------------------------

    def _reflected(self, call: Call) -> Callable[[Envelope, list[int]], None]:
        n_registers = 2 + call.n_args

        def serve(envelope: Envelope, registers: list[int]) -> None:
            assert self._port is not None
            answer = self._port.take(envelope)
            if answer is None:
                return DEFERRED
            vm = self._vms.get(registers[0]) if registers else None
            if vm is None or len(registers) < n_registers:
                answer([HCode.H_PARAMETER])
                return DEFERRED
            vcpu, args = registers[1], registers[2:n_registers]
            if call.number in vm.hcalls.at_once:
                vm.reflected_at_once(call, vcpu, args, envelope.cause, answer)
            elif call.number in vm.hcalls.waiting:
                self._runtime.nursery.start_soon(self._serve_waiting, vm, call, vcpu, args, envelope.cause, answer)
            else:
                answer([HCode.H_FUNCTION])
            return DEFERRED

        return serve

    async def _serve_waiting(
        self, vm: Vm, call: Call, vcpu: int, args: list[int], cause: int, answer: Callable[[list[int]], None]
    ) -> None:
        try:
            with vm.at_work():
                result = await vm.reflected_waiting(call, vcpu, args, cause)
        except PeerGone as gone:
            result = [Refusal.of_peer(gone.state).value[0]]
        except Exception as error:
            self._runtime.log.error("internal error", call=call.name, exc_info=error)
            result = [HCode.H_HARDWARE]
        answer(result)

    # -- VMs --------------------------------------------------------------------------------------------------

    async def add_vm(
        self, vm: VmEntry, links: list[LinkEntry], keys: dict[str, LinkKey], files: dict[str, int]
    ) -> None:
        """A VM begins: its memory, its links to guest and qemu."""
        assert self._port is not None
        ram_fd = files[f"ram:{vm.name}"]
        memory = VmMemory(vm.name, ram_fd, vm.memory_bytes)
        os.close(ram_fd)
        stream_fd = files.get(f"stream:{vm.name}")
        stream = None if stream_fd is None else StreamBuffer(stream_fd)
        ends: dict[str, Link] = {}
        by_kind = {link.kind: link for link in links if link.vm == vm.name}
        for kind in (KVM_GUEST.name, KVM_QEMU.name):
            ends[kind] = self._runtime.make_link(by_kind[kind], keys[by_kind[kind].id])

        def table_made(liobn: int, fd: int) -> None:
            # A copy: qemu may have the table removed before the descriptor is on its way.
            self._runtime.nursery.start_soon(self._give_away, f"tce-table:{liobn:x}", vm.name, os.dup(fd))

        def map_needed() -> None:
            self._runtime.nursery.start_soon(self._give_away, "normal-map", vm.name, os.dup(memory.map_fd))

        guest, qemu = ends[KVM_GUEST.name], ends[KVM_QEMU.name]
        new = Vm(
            vm, memory, guest, qemu, self._port, table_made, map_needed, self._runtime.log, stream, self._runtime.tracer
        )
        new.register_guest(ends[KVM_GUEST.name])
        new.register_qemu(ends[KVM_QEMU.name])
        self._vms[vm.lpid] = self._by_name[vm.name] = new
        self._links[vm.name] = list(ends.values())
        for link in ends.values():
            await self._runtime.serve_link(link)
        await self._runtime.give("host-view", vm.name, memory.view_fd)
        await self._runtime.give("normal-map", vm.name, memory.map_fd)

    async def _give_away(self, tag: str, vm: str, fd: int) -> None:
        try:
            await self._runtime.give(tag, vm, fd)
        finally:
            os.close(fd)

    async def replace_links(self, links: list[LinkEntry], keys: dict[str, LinkKey]) -> None:
        """All links of this role end with the VM or with the process."""

    async def remove_vm(self, name: str) -> None:
        """A VM ends, and with it its secure side in the ultravisor."""
        vm = self._by_name.pop(name, None)
        if vm is None:
            return
        # The ultravisor hears of it from the launcher, too.
        await vm.secure.off(0, patience_s=0)
        self._vms.pop(vm.entry.lpid, None)
        for link in self._links.pop(name):
            await self._runtime.close_link(link)
        await vm.at_rest()
        vm.close()

    async def gift(self, tag: str, vm: str, fd: int) -> None:
        """Dirty maps of guest and qemu."""
        owner = self._by_name.get(vm)
        if owner is None or not owner.dirty.take_map(tag, fd):
            os.close(fd)
            self._runtime.log.warning("unexpected descriptor", tag=tag, vm=vm)

    def peer_state(self, peer: str, state: str) -> None:
        """What became of an ultravisor, guest or qemu."""
        for vm in self._by_name.values():
            if peer == f"{vm.entry.name}/qemu":
                vm.user_space.qemu_is(state)
        for vm in self._by_name.values():
            if peer not in (f"{vm.entry.name}/guest", f"{vm.entry.name}/qemu"):
                continue
            if state == "failed":
                vm.fail(f"{peer} is {state}")
            elif state == "gone" and vm.failure is None:
                # An end that somebody asked for: the VM has left, or is being removed.
                vm.enter(VmState.OFF)

    def hold_time(self, on: bool) -> None:
        """Only guests keep time."""

    async def stop(self) -> None:
        """End every VM."""
        for name in list(self._by_name):
            await self.remove_vm(name)

    # -- questions of the operator ----------------------------------------------------------------------------

    def queries(self) -> dict[str, Query]:
        """By name."""
        return {
            "vm.status": self._vm_status,
            "console.read": self._console_read,
            "console.write": self._console_write,
            "page.host": self._page_host,
            "page.out": self._page_out,
            "page.in": self._page_in,
            "page.reclaim": self._page_reclaim,
            "page.dirty": self._page_dirty,
        }

    async def _vm_status(self, arguments: dict[str, Any]) -> dict[str, Any]:
        vm = self._named(arguments)
        return {
            "state": vm.state.value,
            "since": vm.since,
            "secure": vm.secure.switch.value == "done",
            "failure": vm.failure,
            "pages": vm.memory.page_counts(),
        }

    async def _console_read(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Printed text; waits for some."""
        return await self._named(arguments).terminal.answer_read(arguments)

    async def _console_write(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"taken": self._named(arguments).type_in(Offer.of(arguments))}

    async def _page_host(self, arguments: dict[str, Any]) -> dict[str, Any]:
        vm = self._named(arguments)
        gfn = gfn_asked(arguments, vm.memory.n_pages)
        state = vm.memory.state(gfn)
        view = HostState(vm.memory.host_view[gfn])
        return {"gfn": gfn, "gpa": gpa_of(gfn), "state": state.name, "host_view": view.name}

    async def _page_out(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Page out `n` pages from `gpa` (memory pressure of the host)."""
        return await self._move_pages(arguments, lambda vm, gfns: vm.secure.page_out_all(gfns, 0), OUT_PART_PAGES)

    async def _page_in(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Offer the images of `n` pages from `gpa` back."""
        return await self._move_pages(arguments, lambda vm, gfns: vm.secure.page_back_in_all(gfns, 0), IN_PART_PAGES)

    async def _page_reclaim(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Take the normal frames of `n` pages from `gpa` away, where they are shared; their content is lost."""
        return await self._move_pages(arguments, lambda vm, gfns: vm.secure.reclaim_all(gfns, 0), OUT_PART_PAGES)

    async def _move_pages(
        self, arguments: dict[str, Any], move: Callable[[Vm, list[int]], Any], part_pages: int
    ) -> dict[str, Any]:
        vm = self._named(arguments)
        gfns = gfns_asked(arguments, vm.memory.n_pages)
        with vm.at_work():
            codes = await vm.secure.move_many(gfns, lambda part: move(vm, part), part_pages)
        return {"codes": {HCode(code).name: count for code, count in codes.items()}}

    async def _page_dirty(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Which of `n` pages from `gpa` were written since this was last asked; of a secure VM, by its host."""
        vm = self._named(arguments)
        gfns = gfns_asked(arguments, vm.memory.n_pages)
        with vm.at_work():
            return {"gfns": await vm.dirty.collect(gfns)}

    def _named(self, arguments: dict[str, Any]) -> Vm:
        vm = self._by_name.get(str(arguments["vm"]))
        if vm is None:
            raise UserError(f"kvm knows no VM {arguments['vm']}")
        return vm
