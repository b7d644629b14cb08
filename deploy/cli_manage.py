"""Commands that tell management what there is: capabilities, dumpxml."""

from __future__ import annotations

import json
from typing import Any

import click

from deploy.cli_support import cluster_option, json_option, printable
from deploy.client import connect


@click.command("capabilities")
@click.argument("host")
@cluster_option
@json_option
@click.option("--xml", "as_xml", is_flag=True, help="XML with libvirt's <capabilities> and <domainCapabilities>.")
def capabilities(host: str, cluster: str | None, as_json: bool, as_xml: bool) -> None:
    """Say what HOST offers to virtual machines: secure memory, machine, devices and their features, DMA windows."""
    if as_json and as_xml:
        raise click.UsageError("--json and --xml exclude each other.")
    with connect(cluster) as client:
        answer = client.call("host", {"host": host})
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    elif as_xml:
        import msgspec

        from deploy.capabilities_xml import capabilities_xml
        from deploy.host_description import HostDescription

        click.echo(capabilities_xml(msgspec.convert(answer, HostDescription)))
    else:
        for line in _host_lines(answer):
            click.echo(printable(line))


def _host_lines(host: dict[str, Any]) -> list[str]:
    memory = host["secure_memory"]
    lines = [
        f"host {host['host']}",
        f"  secure VMs     {', '.join(host['launch_security']) or 'no: ' + host['no_launch_security']}",
    ]
    if memory is not None:
        mib = {key: value >> 20 for key, value in memory.items() if key in ("total_bytes", "free_bytes")}
        lines.append(f"  secure memory  {mib['free_bytes']} of {mib['total_bytes']} MiB free, {memory['mode']}")
    lines += [
        f"  machine        {host['machine']}, {' or '.join(host['architectures'])}, {host['cpu_model']}",
        f"  processors     {host['max_vcpus']} a VM at most",
        f"  balloon        {', '.join(host['memballoon_models'])}",
        f"  clocks         {', '.join(host['clocks'])}",
        f"  PCI nodes by   {', '.join(host['pci_nodes'])}",
        f"  migration      {'live, to ' + ', '.join(host['migration_hosts']) if host['migration_hosts'] else 'no'}",
        f"  DMA windows    {host['dma']['max_windows']}, pages of {_sizes(host['dma']['page_bytes'])}",
    ]
    return lines + _device_lines(host["devices"])


def _device_lines(devices: dict[str, Any]) -> list[str]:
    """The features of each kind, those that every virtio device may offer apart."""
    features = {kind: offer["features"] for kind, offer in devices.items()}
    virtio = [names for names in features.values() if names]
    common = set.intersection(*map(set, virtio)) if virtio else set()
    every = [name for name in virtio[0] if name in common] if virtio else []
    own = {kind: [name for name in names if name not in common] for kind, names in features.items()}
    return [f"  {kind:<15}{' '.join(names)}".rstrip() for kind, names in ({"every virtio": every} | own).items()]


def _sizes(sizes: list[int]) -> str:
    return ", ".join(f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB" for size in sizes)


@click.command("dumpxml")
@click.argument("vm")
@cluster_option
@json_option
def dumpxml(vm: str, cluster: str | None, as_json: bool) -> None:
    """Show VM as libvirt's domain XML; with --json also what can be done to it now, and what not and why."""
    with connect(cluster) as client:
        answer = client.call("vm", {"vm": vm})
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    import msgspec

    from deploy.domain_xml import domain_xml
    from deploy.vm_description import VmDescription

    click.echo(domain_xml(msgspec.convert(answer, VmDescription)))
