"""Whom the hosts of a cluster believe: roots in the cluster file, keys in the state directory, certificates."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner

from deploy.cli_state import key
from deploy.cluster_file import Cluster, parse_cluster
from deploy.identity_files import identity_of, open_ledger
from protocol.errors import ClusterFileError, UserError
from services.ultravisor.identity import (
    CERTIFICATE,
    IDENTITY_KEY,
    MACHINE_KEY,
    REVOKED,
    ROOTS,
    MachineIdentity,
    ensure_root,
    identity_public_of,
    root_path,
)
from services.ultravisor.migration.certificates import HostCertificate, Trust
from services.ultravisor.migration.ledger import FileLedger
from services.ultravisor.migration.refusals import MigrationRefused
from services.ultravisor.migration_host import host_of

FILE = """\
[hosts.alpha]
secure_memory = "64M"
[hosts.beta]
secure_memory = "64M"
[hosts.gamma]
secure_memory = "64M"
migration_root = "lab"
"""


def parse(text: str) -> Cluster:
    return parse_cluster(text, "c.toml", Path("/base"), "c")


def known(identity: dict[str, str]) -> tuple[HostCertificate, Trust]:
    """As the ultravisor reads it."""
    certificate = msgspec.msgpack.decode(bytes.fromhex(identity[CERTIFICATE]), type=HostCertificate)
    keys = [frozenset(bytes.fromhex(part) for part in identity[name].split(",") if part) for name in (ROOTS, REVOKED)]
    return certificate, Trust(*keys)


def test_hosts_of_one_root_believe_each_other_and_no_host_of_another(tmp_path: Path) -> None:
    cluster = parse(FILE)
    hosts = {name: known(identity_of(cluster, tmp_path, name)) for name in ("alpha", "beta", "gamma")}

    def believes(host: str, other: str) -> bool:
        try:
            hosts[host][1].check(hosts[other][0], b"", 0)
        except MigrationRefused:
            return False
        return True

    assert {(a, b) for a in hosts for b in hosts if believes(a, b)} == {
        ("alpha", "alpha"), ("alpha", "beta"), ("beta", "alpha"), ("beta", "beta"), ("gamma", "gamma"),
    }  # fmt: skip


def test_an_ultravisor_finds_itself_in_what_it_is_given(tmp_path: Path) -> None:
    identity = identity_of(parse(FILE), tmp_path, "alpha")

    host = host_of(MachineIdentity.from_pems(identity).identity_key, identity, debuggable=False)

    assert host is not None
    assert (host.certificate, host.trust) == known(identity)


def test_trusted_roots_and_revoked_hosts_are_those_of_the_file(tmp_path: Path) -> None:
    text = FILE + 'trusted_roots = ["owner", "lab"]\nrevoked = ["beta"]\n'
    cluster = parse(text)
    trust = known(identity_of(cluster, tmp_path, "gamma"))[1]
    alpha, beta = (known(identity_of(cluster, tmp_path, name))[0] for name in ("alpha", "beta"))

    trust.check(alpha, b"", 0)
    with pytest.raises(MigrationRefused, match="beta"):
        trust.check(beta, b"", 0)
    assert identity_public_of(tmp_path, "beta") in trust.revoked


def test_a_certificate_is_for_the_host_s_own_key_and_roots_stay_where_they_are(tmp_path: Path) -> None:
    identity = identity_of(parse(FILE), tmp_path, "alpha")
    certificate, _ = known(identity)

    assert set(identity) == {MACHINE_KEY, IDENTITY_KEY, CERTIFICATE, ROOTS, REVOKED}
    assert certificate.host == "alpha"
    assert certificate.identity == MachineIdentity.from_pems(identity).identity_public
    assert certificate.root == ensure_root(tmp_path, "owner").public_key().public_bytes_raw()
    root = (tmp_path / "migration-root.pem").read_text()
    assert stat.S_IMODE((tmp_path / "migration-root.pem").stat().st_mode) == 0o600
    assert root not in identity.values()
    assert identity_of(parse(FILE), tmp_path, "alpha")[ROOTS] == identity[ROOTS]
    assert root_path(tmp_path, "lab").name == "migration-root-lab.pem"


@pytest.mark.parametrize("name", ["", "a/b", "a\0"])
def test_a_name_that_is_no_root_reaches_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no name of a root"):
        ensure_root(tmp_path, name)


def test_a_root_that_is_another_kind_of_key_is_named(tmp_path: Path) -> None:
    path = root_path(tmp_path, "owner")
    path.write_text("no key")
    path.chmod(0o600)

    with pytest.raises(UserError, match=r"migration-root\.pem: is no private key"):
        ensure_root(tmp_path, "owner")


def test_the_ledger_is_one_that_the_ultravisor_can_go_on_with(tmp_path: Path) -> None:
    path = tmp_path / "alpha" / "migrations.jsonl"
    fd = open_ledger(path)
    try:
        assert FileLedger(fd).open_entries() == []
    finally:
        os.close(fd)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("line", "name", "problem"),
    [
        ('migration_root = "Lab"', "migration_root", '"Lab" is no name; allowed: lower-case letters'),
        ("migration_root = 7", "migration_root", "must be a string, not an integer"),
        ('trusted_roots = ["onwer"]', "trusted_roots", 'no root "onwer", did you mean "owner"?; allowed: "owner"'),
        ('trusted_roots = "owner"', "trusted_roots", "must be a list, not a string"),
        ('revoked = ["beta"]', "revoked", 'no other host "beta"; allowed: "alpha"'),
        ('revoked = ["gamma"]', "revoked", 'no other host "gamma"'),
        ('migrationroot = "x"', "migrationroot", 'did you mean "migration_root"?'),
    ],
)
def test_a_mistake_names_file_line_key_and_what_is_allowed(line: str, name: str, problem: str) -> None:
    text = FILE.split("[hosts.gamma]")[0] + line + "\n"
    with pytest.raises(ClusterFileError) as caught:
        parse(text)

    assert (caught.value.line, caught.value.key) == (5, f"hosts.beta.{name}")
    assert problem in str(caught.value)


def test_links_say_between_which_hosts_vms_move_and_a_file_without_any_allows_all() -> None:
    assert parse(FILE).may_move("alpha", "gamma")
    linked = parse(FILE + '[[links]]\nbetween = ["alpha", "beta"]\n')
    assert linked.may_move("beta", "alpha")
    assert not linked.may_move("alpha", "gamma")


def test_the_identity_of_a_host_is_printed(tmp_path: Path) -> None:
    identity_of(parse(FILE), tmp_path, "alpha")
    command: click.Command = key

    done = CliRunner().invoke(command, ["alpha", "--state", str(tmp_path), "--identity"])

    assert done.output == f"{identity_public_of(tmp_path, 'alpha').hex()}\n"
