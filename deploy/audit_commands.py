"""`pefbox key HOST` and `pefbox audit VM`: what a cluster's state directory says about its ultravisors."""

from __future__ import annotations

import json
from pathlib import Path

import click
import msgspec

from protocol.errors import UserError
from services.ultravisor.audit import AUDIT_FILE, AuditHead, AuditLine, audit_path, read_lines, verify
from services.ultravisor.identity import identity_public_of, public_key_of
from shared.esm_crypto import fingerprint
from shared.terminal_text import one_line


def show_key(state_dir: Path, host: str, as_json: bool = False) -> None:
    """Print the public machine key of a host, as a recipient for `esm make`; raises UserError."""
    pem = public_key_of(state_dir, host)
    if as_json:
        click.echo(json.dumps({"host": host, "pem": pem.decode(), "fingerprint_sha256": fingerprint(pem).hex()}))
    else:
        click.echo(pem.decode(), nl=False)


def show_identity(state_dir: Path, host: str, as_json: bool = False) -> None:
    """Print the public identity key of a host in hex; raises UserError."""
    public = identity_public_of(state_dir, host).hex()
    click.echo(json.dumps({"host": host, "identity": public}) if as_json else public)


def show_audit(state_dir: Path, vm: str | None, as_json: bool = False) -> None:
    """Print the audit lines of a VM (None: all) on every host, oldest first, after checking each host's chain.

    A broken chain is told by name of file and line, and the lines are shown all the same; the exit status is then 1.
    Raises UserError when there is no log at all.
    """
    hosts = sorted(path.parent.name for path in state_dir.glob(f"*/{AUDIT_FILE}"))
    if not hosts:
        raise UserError(f"{state_dir}: no audit log; logs are made when a cluster first starts")
    found: list[tuple[str, AuditLine]] = []
    broken = False
    for host in hosts:
        problem = check_audit(state_dir, host)
        if problem is not None:
            broken = True
            click.echo(problem, err=True)
        found += [(host, line) for line in _lines(audit_path(state_dir, host))]
    named = {line.vm for _, line in found if line.vm}
    found = [(host, line) for host, line in found if vm is None or line.vm == vm]
    if not found and vm is not None:
        known = ", ".join(one_line(name) for name in sorted(named))
        click.echo(f"nothing was noted about {vm}; the logs are about {known or 'no VM yet'}", err=True)
    for host, line in sorted(found, key=lambda pair: (pair[1].time, pair[0], pair[1].sequence)):
        click.echo(_as_json(host, line) if as_json else _as_text(host, line))
    if broken:
        raise click.exceptions.Exit(1)


def check_audit(state_dir: Path, host: str, newest: AuditHead | None = None) -> str | None:
    """One line about the first broken place in a host's audit log, or None; raises UserError when it is unreadable.

    `newest` is what a running ultravisor says of its newest line.
    """
    path = audit_path(state_dir, host)
    try:
        with path.open("rb") as log:
            report = verify(log, newest)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    return None if report.broken_line is None else f"{path}: line {report.broken_line} {report.reason}"


_STATE = click.option(
    "--state", "state_dir", required=True, type=click.Path(path_type=Path), help="State directory of the cluster."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="JSON, one object a line.")


@click.command("key")
@click.argument("host")
@_STATE
@_JSON
def key(host: str, state_dir: Path, as_json: bool) -> None:
    """Print the public machine key of HOST."""
    show_key(state_dir, host, as_json)


@click.command("audit")
@click.argument("vm", required=False)
@_STATE
@_JSON
def audit(vm: str | None, state_dir: Path, as_json: bool) -> None:
    """Print what the ultravisors noted about VM (all VMs when not given). Exit status 1 if a log was tampered with."""
    show_audit(state_dir, vm, as_json)


def _lines(path: Path) -> list[AuditLine]:
    try:
        with path.open("rb") as log:
            return list(read_lines(log))
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


def _as_json(host: str, line: AuditLine) -> str:
    return msgspec.json.encode({"host": host, **msgspec.structs.asdict(line)}).decode()


def _as_text(host: str, line: AuditLine) -> str:
    facts = " ".join(f"{name}={json.dumps(value)}" for name, value in line.facts.items())
    text = f"{line.time}  {host}  {line.vm or '-':<12} {line.event:<24} {facts}".rstrip()
    # A log that someone changed may hold anything, so it does not reach the terminal as it is.
    return one_line(text)
