"""`pefbox balloon`: how much memory a VM has, and how much it is to have."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import click

from deploy.cli_support import cluster_option, json_option, printable
from deploy.client import LauncherClient, connect
from protocol.errors import UserError

_SHOWN_STATS = ("total_memory", "free_memory", "available_memory", "disk_caches")
"""Those that are bytes; --json has all."""


@click.command("balloon")
@click.argument("vm")
@click.argument("size", required=False)
@cluster_option
@json_option
def balloon(vm: str, size: str | None, cluster: str | None, as_json: bool) -> None:
    """Show how much memory VM has (actual) and is to have (target); with SIZE, such as 128M, set the target.

    The guest's driver follows as well as it can; `discarded` is what the host has back. A secure VM is refused.
    """
    with connect(cluster) as client:
        if size is not None:
            _set_target(client, vm, size)
        with contextlib.suppress(UserError):
            # Statistics of now, where the guest tells some; without them the last ones are shown.
            client.call("query", {"target": f"{vm}/qemu", "query": "balloon.ask", "arguments": {}, "seconds": 1.0})
        facts = _balloon_of(client.call("status"), vm)
    if as_json:
        click.echo(json.dumps({"vm": vm, **facts}, indent=2))
        return
    from deploy.tables import balloon_facts, mebibytes

    click.echo(printable(f"{vm}  memory {mebibytes(facts['memory_bytes'])}  {balloon_facts(facts)}"))
    stats = [f"{name} {mebibytes(facts['stats'][name])}" for name in _SHOWN_STATS if name in facts["stats"]]
    if stats:
        click.echo(f"the guest says: {'  '.join(stats)}")


def _balloon_of(status: dict[str, Any], vm: str) -> dict[str, Any]:
    rows = {row["name"]: row for host in status["hosts"] for row in host["vms"]}
    if vm not in rows:
        raise UserError(f'no VM "{vm}"; there are: {", ".join(rows)}')
    facts: dict[str, Any] | None = rows[vm]["balloon"]
    if facts is None:
        raise UserError(
            f'{vm} has no virtio-balloon; add [[vms.{vm}.devices]] with kind = "virtio-balloon" to its file'
        )
    return facts


def _set_target(client: LauncherClient, vm: str, size: str) -> None:
    from deploy.operations import BALLOON, refuse_by
    from deploy.plan import own_monitor
    from deploy.qmp_client import execute

    described = client.call("vm", {"vm": vm})
    refuse_by(described["operations"], BALLOON)
    target_bytes = target_of(size, vm, described["memory_bytes"])
    execute(own_monitor(described["qmp"]), "balloon", {"value": target_bytes})


def target_of(size: str, vm: str, memory_bytes: int) -> int:
    """The bytes that SIZE means; raises UserError for none, and for more than `vm` has."""
    from deploy.cluster_section import size_of
    from deploy.tables import mebibytes

    n_bytes = size_of(size)
    if n_bytes is None:
        raise UserError(f'SIZE: "{size}" is no size; allowed: bytes, or a text such as 128M')
    if not 0 < n_bytes <= memory_bytes:
        raise UserError(f"SIZE: {size} is not possible; {vm} can have up to {mebibytes(memory_bytes)}")
    return n_bytes
