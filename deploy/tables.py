"""Tables and lines for people. Colour goes away with NO_COLOR or when the output is no terminal (rich does both)."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

STATE_STYLES = {
    "running": "green",
    "starting": "cyan",
    "paused": "yellow",
    "stopped": "yellow",
    "debugged": "magenta",
    "waiting": "magenta",
    "unresponsive": "bold red",
    "failed": "bold red",
    "gone": "dim",
    "off": "dim",
}
"""Of a word that stands there, too."""


def console(*, stderr: bool = False) -> Console:
    """Where tables go; wide enough not to cut lines when the output is no terminal."""
    output = Console(stderr=stderr, highlight=False)
    return output if output.is_terminal else Console(stderr=stderr, highlight=False, width=160)


def status_tree(status: dict[str, Any]) -> Tree:
    """Hosts, their processes and VMs."""
    tree = Tree(Text(f"cluster {status['cluster']}", style="bold"))
    for host in status["hosts"]:
        branch = tree.add(Text.assemble("host ", (host["name"], "bold"), f"  {_facts(host['account'])}"))
        for process in host["processes"]:
            branch.add(_process_line(process))
        for vm in host["vms"]:
            _add_vm(branch, vm)
    for link in status["links"]:
        tree.add(Text(link_line(link), style="red" if link["down"] else ""))
    return tree


def link_line(link: dict[str, Any]) -> str:
    """A link between two hosts and what it does to what crosses it."""
    one, other = link["between"]
    parts = [f"link {one} - {other}", "down" if link["down"] else "up"]
    parts += [f"{name} {link[f'{name}_ms']:g} ms" for name in ("latency", "jitter") if link[f"{name}_ms"]]
    if link["bandwidth_bytes_per_second"]:
        parts.append(f"bandwidth {mebibytes(link['bandwidth_bytes_per_second'])}/s")
    if link["loss"]:
        parts.append(f"loss {link['loss']:g}")
    return "  ".join(parts)


def _add_vm(branch: Tree, vm: dict[str, Any]) -> None:
    kind = "secure" if vm["secure"] else "normal"
    pages = " ".join(f"{name}={_count(count)}" for name, count in vm["pages"].items())
    line = Text.assemble(
        "vm ", (vm["name"], "bold"), f"  lpid {vm['lpid']}  ", _state(vm["state"]), f" {ago(vm['since'])}  {kind}"
    )
    if vm["reason"]:
        line.append(f"  {vm['reason']}", style="red" if vm["state"] == "failed" else "")
    node = branch.add(line)
    node.add(Text(f"pages {pages}"))
    if vm["last_esm"] is not None:
        node.add(Text(f"last esm {_facts(vm['last_esm'])}"))
    if vm["balloon"] is not None:
        node.add(Text(f"balloon {balloon_facts(vm['balloon'])}"))
    for card in vm["network"]["devices"]:
        node.add(Text(f"network {card['network']}  mac {card['mac']}  {_traffic(card)}"))
    for end in vm["network"]["networks"]:
        for peer in end["peers"]:
            state = _state("running" if peer["state"] == "up" else peer["state"])
            node.add(Text.assemble(f"network {end['network']}  to {peer['vm']} ", state, f"  {_traffic(peer)}"))
    if vm["migration"] is not None:
        node.add(Text(migration_facts(vm["migration"]), style="cyan"))
    for process in (*vm["processes"], *vm["arriving"]):
        node.add(_process_line(process))


def balloon_facts(balloon: dict[str, Any]) -> str:
    """How much memory a VM has, is to have, and its host has back; why its balloon does nothing."""
    names = ("actual", "target", "discarded")
    facts = "  ".join(f"{name} {mebibytes(balloon[f'{name}_bytes'])}" for name in names)
    return f"{facts}  {balloon['reason']}" if balloon["reason"] else facts


def migration_facts(facts: dict[str, Any]) -> str:
    """Where a VM is going, and how far it is."""
    from deploy.migration_view import headline, progress_lines

    return "  ".join(["migration", headline(facts).partition("  ")[2], *map(str.strip, progress_lines(facts)[:1])])


def mebibytes(n_bytes: int) -> str:
    """In MiB, with a fraction only where there is one."""
    return f"{n_bytes / (1 << 20):.10g} MiB"


def _traffic(counts: dict[str, Any]) -> str:
    dropped = "".join(f"  dropped {reason}={n}" for reason, n in counts["dropped"].items())
    return f"received {counts['received_frames']}  sent {counts['sent_frames']}{dropped}"


def _process_line(process: dict[str, Any]) -> Text:
    line = Text.assemble(f"{process['target']:<18} ", _state(process["state"]))
    line.append(f" {ago(process['since'])}  pid {process['pid']}")
    if process["detail"]:
        line.append(f"  {process['detail']}")
    missing = [name for name, value in process["protections"].items() if value.startswith("missing")]
    if missing:
        line.append(f"  without {', '.join(missing)}", style="yellow")
    return line


def process_table(clusters: list[dict[str, Any]]) -> Table:
    """Every process of the given clusters."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("CLUSTER", "PROCESS", "PID", "STATE", "SINCE", "DETAIL"):
        table.add_column(name)
    for status in clusters:
        for process in processes_of(status):
            since = ago(process["since"])
            row = (process["target"], str(process["pid"]), _state(process["state"]), since, process["detail"])
            table.add_row(status["cluster"], *row)
    return table


def processes_of(status: dict[str, Any]) -> list[dict[str, Any]]:
    """The process rows of a status, hosts first."""
    rows: list[dict[str, Any]] = []
    for host in status["hosts"]:
        rows += host["processes"]
        for vm in host["vms"]:
            rows += vm["processes"] + vm["arriving"]
    return rows


def ago(since_s: float) -> str:
    """How long ago, in the largest fitting unit."""
    seconds = max(0.0, time.time() - since_s)
    for limit, divisor, unit in ((100, 1, "s"), (6000, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def _state(state: str) -> Text:
    return Text(state, style=STATE_STYLES.get(state, ""))


def _count(count: int | None) -> str:
    return "?" if count is None else str(count)


def _facts(value: object) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {part}" for name, part in value.items())
    return str(value)
