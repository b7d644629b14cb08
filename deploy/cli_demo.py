"""`pefbox demo`: the main job, a table of what was seen, and the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # What a command needs is imported when it runs: most need little.
    from deploy.demo_report import MigrationReport

import click

_GUESTS = ("model", "linux")


@click.command("demo")
@click.option("--guest", type=click.Choice(_GUESTS), default=_GUESTS[0], show_default=True, help="What the VMs run.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the report here, too."
)
@click.option("--state", "state_dir", type=click.Path(path_type=Path), help="Directory of disks, keys and logs.")
def demo(guest: str, json_file: Path | None, state_dir: Path | None) -> None:
    """Start two hosts whose VMs turn themselves secure and work on real disks; check every claim.

    With `--guest linux` the VMs run firmware and the kernel of `pefbox linux build`.

    The exit status is 0 only if every check held.
    """
    # Imported here: the other commands should not wait for it.
    import time

    import msgspec
    import trio

    from deploy.demo import run_demo
    from deploy.demo_linux import LinuxGuest
    from deploy.demo_model import ModelGuest
    from deploy.demo_report import DemoGuest
    from deploy.tables import console
    from protocol.errors import UserError

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json: {json_file.parent} is no directory")
    started = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"{time.monotonic() - started:6.1f} s  {text}", err=True)

    kind: DemoGuest = LinuxGuest() if guest == "linux" else ModelGuest()
    report = trio.run(run_demo, kind, state_dir, say)
    console().print(_table(report))
    for name, vm in report.vms.items():
        for problem in vm.problems:
            click.echo(f"{name}: {problem}", err=True)
    for what in report.not_searched:
        click.echo(f"not searched: {what}", err=True)
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    click.echo(f"{'every check held' if report.ok else 'NOT every check held'} ({time.monotonic() - started:.1f} s)")
    raise SystemExit(0 if report.ok else 1)


def _moved(migration: MigrationReport | None) -> str:
    if migration is None:
        return ""
    return f"{migration.source} to {migration.destination}, {migration.downtime_ms} ms still"


def _table(report: object) -> object:
    from rich.table import Table

    from deploy.demo_report import DemoReport

    assert isinstance(report, DemoReport)
    table = Table(title="pefbox demo", show_lines=False)
    table.add_column("")
    for name in report.vms:
        table.add_column(name)
    vms = list(report.vms.values())
    rows = {
        "secure after": [f"{vm.seconds_to_secure} s" for vm in vms],
        "disk read by the guest": [f"{vm.disk_bytes >> 20} MiB" for vm in vms],
        "through swiotlb": [f"{vm.bytes_through_swiotlb >> 20} MiB" for vm in vms],
        "SHA-256 of the disk, guest": [vm.disk_sha256_guest[:16] for vm in vms],
        "SHA-256 of the disk, host": [vm.disk_sha256_host[:16] for vm in vms],
        "written region in the file": ["yes" if vm.written_region_on_disk else "NO" for vm in vms],
        "host's read of a secure page": [vm.host_read_of_secure_page for vm in vms],
        "paged out at random": [f"{vm.pages_under_pressure} pages" if vm.pages_under_pressure else "" for vm in vms],
        "secrets found outside": [", ".join(vm.secrets_found) or "none" for vm in vms],
        "marker shared on purpose": ["found" if vm.shared_marker_found else "NOT found" for vm in vms],
        "moved while it ran": [_moved(vm.migration) for vm in vms],
        "hypercalls": [str(sum(vm.hypercalls.values())) for vm in vms],
        "ultracalls": [str(sum(vm.ultracalls.values())) for vm in vms],
        "searched": [f"{report.searched_bytes >> 20} MiB"] + [""] * (len(vms) - 1),
    }
    for title, values in rows.items():
        if any(values):
            table.add_row(title, *values)
    return table
