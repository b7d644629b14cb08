"""The ultravisor process: links, VMs, questions of the operator."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from protocol.errors import HostFault, UserError
from protocol.geometry import PAGE_SHIFT
from protocol.refusals import HELD_UP_STATES
from protocol.startup import Keys, LinkEntry, LinkKey, VmEntry
from services.runtime.link import Link
from services.runtime.page_query import gfn_asked, gfns_asked
from services.runtime.process import Query, Runtime
from services.ultravisor.audit import OPERATOR_EVENTS, AuditLog
from services.ultravisor.dirty import collect_dirty
from services.ultravisor.guest_calls import GuestCalls
from services.ultravisor.hypervisor import Hypervisor
from services.ultravisor.hypervisor_calls import HypervisorCalls
from services.ultravisor.identity import MachineIdentity
from services.ultravisor.life import SvmLife
from services.ultravisor.migration.ledger import FileLedger
from services.ultravisor.migration_calls import MigrationCalls
from services.ultravisor.migration_host import host_of
from services.ultravisor.migration_queries import MigrationQueries
from services.ultravisor.normal_ram import NormalRam
from services.ultravisor.page_state import HOST_READABLE
from services.ultravisor.partition import Partition
from services.ultravisor.secure_memory import SecureAccount, largest_secret_bytes
from services.ultravisor.snapshot_calls import SnapshotCalls
from services.ultravisor.svm_export import Export
from shared.stream_buffer import StreamBuffer


class Ultravisor:
    """One host's ultravisor."""

    def __init__(self, runtime: Runtime, keys: Keys) -> None:
        self._runtime = runtime
        self._keys = {key.link: key for key in keys.links}
        self._identity = MachineIdentity.from_pems(keys.identity)
        self._account = SecureAccount(runtime.config.secure_memory_bytes)
        self._partitions: dict[int, Partition] = {}
        self._by_name: dict[str, Partition] = {}
        self._audit = AuditLog(runtime.files["audit"], time.time)
        self._kvm: Link | None = None
        self._hypervisor: Hypervisor | None = None
        self._life: SvmLife | None = None
        self._migrations: MigrationCalls | None = None
        self._migration_host = host_of(self._identity.identity_key, keys.identity, debuggable=runtime.config.debuggable)
        self._ledger = FileLedger(runtime.files["ledger"]) if "ledger" in runtime.files else None

    async def start(self) -> None:
        """Open the link to kvm."""
        entry = next(link for link in self._runtime.config.links if link.vm is None)

        def register(link: Link) -> None:
            self._hypervisor = Hypervisor(link, self._runtime.log)
            self._life = SvmLife(
                self._runtime, self._hypervisor, self._account, self._identity.machine_key, self._audit, self._ledger
            )
            HypervisorCalls(self._partitions, self._life).register(link, self._hypervisor)
            self._migrations = MigrationCalls(
                self._partitions, self._life, self._account, self._migration_host, self._ledger
            )
            self._migrations.register(link)
            SnapshotCalls(self._migrations).register(link)

        self._kvm = await self._runtime.open_link(entry, self._keys[entry.id], register)

    async def add_vm(
        self, vm: VmEntry, links: list[LinkEntry], keys: dict[str, LinkKey], files: dict[str, int]
    ) -> None:
        """A VM begins, as a normal one."""
        assert self._hypervisor is not None
        assert self._life is not None
        if not vm.restoring:
            self._life.void_snapshots(vm.name)
        ram = NormalRam(files[f"ram:{vm.name}"], vm.memory_bytes, lambda reason: self._ram_fault(vm.name, reason))
        private = socket.socket(fileno=files[f"secure:{vm.name}"])
        entry = next(link for link in links if link.vm == vm.name)
        hypervisor, life = self._hypervisor, self._life

        def register(link: Link) -> None:
            partition = Partition(vm, ram, link, private, self._runtime.tracer)
            if f"stream:{vm.name}" in files:
                partition.stream = StreamBuffer(files[f"stream:{vm.name}"])
            self._partitions[vm.lpid] = self._by_name[vm.name] = partition
            GuestCalls(partition, hypervisor, life).register(link)

        await self._runtime.open_link(entry, keys[entry.id], register)

    def _ram_fault(self, vm: str, reason: str) -> None:
        assert self._life is not None
        self._runtime.log.error("normal memory fault", vm=vm, reason=reason)
        self._life.write_audit(vm, "normal-memory-fault", reason=reason)

    async def replace_links(self, links: list[LinkEntry], keys: dict[str, LinkKey]) -> None:
        """All links of this role end with the VM or with the process."""

    async def remove_vm(self, name: str) -> None:
        """A VM ends; the launcher has ended its guest."""
        partition = self._by_name.pop(name, None)
        if partition is None:
            return
        assert self._life is not None
        partition.removed = True
        partition.guest_is_gone()
        if self._migrations is not None:
            await self._migrations.drop(partition)
        await self._life.terminate(partition, "vm-removed")
        self._partitions.pop(partition.lpid, None)
        await self._runtime.close_link(partition.guest)
        partition.close()

    async def gift(self, tag: str, vm: str, fd: int) -> None:
        """The dirty map of a guest while it is secure."""
        partition = self._by_name.get(vm)
        if tag != "secure-dirty-map" or partition is None or not partition.take_dirty_map(fd):
            os.close(fd)
            self._runtime.log.warning("unexpected descriptor", tag=tag, vm=vm)

    def peer_state(self, peer: str, state: str) -> None:
        """kvm or a guest died, stopped, came back."""
        if self._kvm is not None and peer == self._kvm.peer:
            self._kvm_state(state)
            return
        partition = next((p for p in self._partitions.values() if p.guest.peer == peer), None)
        if partition is not None and state in ("gone", "failed"):
            partition.guest_is_gone()
            self._runtime.nursery.start_soon(self._guest_ended, partition, state)

    def _kvm_state(self, state: str) -> None:
        assert self._hypervisor is not None
        if state in ("gone", "failed"):
            self._hypervisor.kvm_is_gone()
            for partition in list(self._partitions.values()):
                self._runtime.nursery.start_soon(self._kvm_died, partition)
        elif state in HELD_UP_STATES:
            self._hypervisor.kvm_is_held_up()

    async def _kvm_died(self, partition: Partition) -> None:
        assert self._life is not None
        await self._life.fail(partition, "hypervisor-gone")

    async def _guest_ended(self, partition: Partition, state: str) -> None:
        """`gone` is an end that somebody asked for: no failure."""
        assert self._life is not None
        if state == "gone":
            await self._life.terminate(partition, "guest-ended")
        else:
            await self._life.fail(partition, "guest-gone")

    def hold_time(self, on: bool) -> None:
        """Only guests keep time."""

    async def stop(self) -> None:
        """End every secure VM."""
        for name in list(self._by_name):
            await self.remove_vm(name)

    # -- questions of the operator ----------------------------------------------------------------------------

    def queries(self) -> dict[str, Query]:
        """By name."""
        return {
            "vm.status": self._vm_status,
            "page.secure": self._page_secure,
            "page.dirty": self._page_dirty,
            "account": self._account_status,
            "audit.note": self._audit_note,
            "statistics": self._statistics,
            "capabilities": self._capabilities,
            **self._migration_queries(),
        }

    def _migration_queries(self) -> dict[str, Query]:
        assert self._life is not None
        assert self._migrations is not None
        return MigrationQueries(
            self._by_name, self._life, self._migrations, self._migration_host, self._ledger
        ).queries()

    async def _vm_status(self, arguments: dict[str, Any]) -> dict[str, Any]:
        partition = self._named(arguments)
        esm = partition.last_esm
        return {
            "secure": partition.secure,
            "since": partition.secure_since,
            "failure": partition.failure,
            "last_esm": None if esm is None else {"outcome": esm.outcome, "reason": esm.reason, "at": esm.at},
            "pages": partition.svm.page_counts() if partition.svm is not None and partition.secure else None,
            "memory_mode": partition.svm.memory.mode if partition.svm is not None else None,
        }

    async def _page_secure(self, arguments: dict[str, Any]) -> dict[str, Any]:
        partition = self._named(arguments)
        gfn = gfn_asked(arguments, partition.ram.size_bytes >> PAGE_SHIFT)
        if not partition.secure or partition.svm is None:
            return {"gfn": gfn, "state": "NORMAL", "readable_by": ["guest", "kvm", "qemu", "ultravisor"]}
        if not partition.svm.in_slots(gfn):
            raise HostFault(f"gfn {gfn:#x} is outside the memory slots")
        state = partition.svm.states[gfn]
        readers = ["guest", "kvm", "qemu", "ultravisor"] if state in HOST_READABLE else ["guest", "ultravisor"]
        return {"gfn": gfn, "state": state.name, "readable_by": readers}

    async def _page_dirty(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Which of `n` pages from `gpa` guest or ultravisor wrote since this was last asked."""
        partition = self._named(arguments)
        if isinstance(partition.migration, Export) and partition.migration.in_progress:
            raise UserError(f"{partition.name} is being moved or saved, which needs these marks")
        gfns = gfns_asked(arguments, partition.ram.size_bytes >> PAGE_SHIFT)
        return {"gfns": await collect_dirty(partition, gfns)}

    async def _account_status(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        return {"total_bytes": self._account.total_bytes, "used_bytes": self._account.used_bytes}

    async def _audit_note(self, arguments: dict[str, Any]) -> None:
        """Have the audit log say what the operator does to this process, or to a guest of the host."""
        if arguments["event"] not in OPERATOR_EVENTS:
            raise UserError(f"no event {arguments['event']!r} of the operator's is noted")
        self._audit.write(str(arguments["vm"]), arguments["event"], dict(arguments["facts"]))

    async def _statistics(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """Of each link; hypercalls on their way through kvm are open there too."""
        links: dict[str, Any] = {link.id: link.statistics() for link in self._runtime.links.values()}
        if self._kvm is not None and self._hypervisor is not None and self._kvm.id in links:
            links[self._kvm.id]["open_calls"] += self._hypervisor.open_calls
        return links

    async def _capabilities(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """What secure memory there is, and up to which size of a VM it is memfd_secret (None: any size)."""
        return {
            "total_bytes": self._account.total_bytes,
            "used_bytes": self._account.used_bytes,
            "free_bytes": self._account.free_bytes,
            "largest_secret_bytes": largest_secret_bytes(),
        }

    def _named(self, arguments: dict[str, Any]) -> Partition:
        partition = self._by_name.get(str(arguments["vm"]))
        if partition is None:
            raise UserError(f"the ultravisor knows no VM {arguments['vm']}")
        return partition
