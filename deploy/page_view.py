"""`pefbox page VM GPA`: what each part of the machine knows of one page, and its bytes where it may be read."""

from __future__ import annotations

from typing import Any

import trio

from deploy.child import QueryRefused
from deploy.cluster_run import ClusterRun
from protocol.errors import PeerGone, UserError
from protocol.geometry import gfn_of
from protocol.roles import Role

_QUESTIONS = (
    ("host", Role.KVM, "page.host"),
    ("secure", Role.ULTRAVISOR, "page.secure"),
    ("host_bytes", Role.QEMU, "page.bytes"),
    ("guest", Role.GUEST, "page.guest"),
)


async def page_view(run: ClusterRun, vm_name: str, gpa: int) -> dict[str, Any]:
    """Ask kvm, ultravisor, qemu and, when the VM is debuggable, the guest; a part that cannot say says why."""
    vm = run.vm_named(vm_name)
    if not 0 <= gpa < vm.spec.memory_bytes:
        raise UserError(f"gpa {gpa:#x} is outside the {vm.spec.memory_bytes:#x} bytes of {vm_name}")
    view: dict[str, Any] = {"vm": vm_name, "gpa": gpa, "gfn": gfn_of(gpa)}

    async def ask(key: str, role: Role, what: str) -> None:
        owner = vm_name if role in (Role.QEMU, Role.GUEST) else vm.spec.host
        child = run.child(owner, role)
        try:
            if child is None:
                raise PeerGone(f"{owner}/{role.value}", "missing")
            view[key] = await child.query(what, {"vm": vm_name, "gpa": gpa})
        except (PeerGone, QueryRefused) as error:
            view[key] = {"error": str(error)}

    async with trio.open_nursery() as nursery:
        for question in _QUESTIONS:
            if question[1] is Role.GUEST and not vm.spec.debuggable:
                view["guest"] = {"error": "the VM is not debuggable: set `debuggable = true` in the cluster file"}
                continue
            nursery.start_soon(ask, *question)
    return view
