"""Commands on what a cluster keeps in its state directory: `key` and `audit`."""

from __future__ import annotations

from pathlib import Path

import click

from deploy.audit_commands import show_audit, show_identity, show_key
from deploy.cli_support import cluster_option, json_option, state_dir_of, state_option


@click.command("key")
@click.argument("host")
@cluster_option
@state_option
@json_option
@click.option("--identity", is_flag=True, help="The key by which ultravisors know HOST, in hex, instead.")
def key(host: str, cluster: str | None, state_dir: Path | None, as_json: bool, identity: bool) -> None:
    """Print the public machine key of HOST: blobs are made for it (`pefbox esm make`)."""
    show = show_identity if identity else show_key
    show(state_dir_of(cluster, state_dir), host, as_json)


@click.command("audit")
@click.argument("vm", required=False)
@cluster_option
@state_option
@json_option
def audit(vm: str | None, cluster: str | None, state_dir: Path | None, as_json: bool) -> None:
    """Print what the ultravisors noted about VM (default: all). Exit status 1 if a log was tampered with."""
    show_audit(state_dir_of(cluster, state_dir), vm, as_json)
