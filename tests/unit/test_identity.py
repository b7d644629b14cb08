"""The machine keys of a host's ultravisor."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from protocol.errors import HostFault, UserError
from services.ultravisor.identity import MachineIdentity, ensure_keys, public_key_of, read_machine_key
from shared.esm_crypto import fingerprint, load_public_key


def test_the_first_start_makes_keys_that_only_their_owner_may_read(tmp_path: Path) -> None:
    ensure_keys(tmp_path / "state", "alpha")

    for name in ("machine-key.pem", "identity-key.pem"):
        assert stat.S_IMODE((tmp_path / "state/alpha" / name).stat().st_mode) == 0o600
    assert sorted(path.name for path in (tmp_path / "state/alpha").iterdir()) == ["identity-key.pem", "machine-key.pem"]


def test_later_starts_find_the_same_keys_and_another_host_has_others(tmp_path: Path) -> None:
    first = ensure_keys(tmp_path, "alpha")

    assert ensure_keys(tmp_path, "alpha") == first
    assert ensure_keys(tmp_path, "beta") != first


def test_launchers_that_start_at_once_agree(tmp_path: Path) -> None:
    results: list[dict[str, str]] = []
    starts = [threading.Thread(target=lambda: results.append(ensure_keys(tmp_path, "alpha"))) for _ in range(4)]

    for start in starts:
        start.start()
    for start in starts:
        start.join()

    assert len(results) == 4
    assert all(result == results[0] for result in results)
    assert not list(tmp_path.glob("alpha/.*"))


def test_keys_are_loaded_from_their_text(tmp_path: Path) -> None:
    identity = MachineIdentity.from_pems(ensure_keys(tmp_path, "alpha"))

    assert identity.public_pem == public_key_of(tmp_path, "alpha")
    assert identity.fingerprint == fingerprint(identity.public_pem).hex()
    assert len(identity.identity_public) == 32
    assert "Key object" not in repr(identity)


def test_the_public_key_is_what_svm_tool_takes(tmp_path: Path) -> None:
    ensure_keys(tmp_path, "alpha")

    pem = public_key_of(tmp_path, "alpha")

    assert pem.startswith(b"-----BEGIN PUBLIC KEY-----\n")
    assert pem.endswith(b"-----END PUBLIC KEY-----\n")
    assert load_public_key(pem).key_size == 2048


@pytest.mark.parametrize("missing", ["machine-key", "identity-key"])
def test_a_missing_or_damaged_key_is_a_fault_of_the_host(missing: str, tmp_path: Path) -> None:
    pems = ensure_keys(tmp_path, "alpha")

    for damaged in ({k: v for k, v in pems.items() if k != missing}, pems | {missing: "no key"}):
        with pytest.raises(HostFault):
            MachineIdentity.from_pems(damaged)


def test_a_machine_key_in_the_place_of_the_identity_key_is_a_fault(tmp_path: Path) -> None:
    pems = ensure_keys(tmp_path, "alpha")

    with pytest.raises(HostFault, match="Ed25519"):
        MachineIdentity.from_pems(pems | {"identity-key": pems["machine-key"]})


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    ensure_keys(tmp_path, "alpha")
    (tmp_path / "alpha/machine-key.pem").chmod(0o640)

    with pytest.raises(UserError, match="others may read this key"):
        ensure_keys(tmp_path, "alpha")


def test_a_file_that_is_no_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.touch(0o600)

    with pytest.raises(UserError, match=r"key\.pem: is no private key"):
        read_machine_key(path)


def test_a_host_without_keys_is_told_which_hosts_have_some(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="when a cluster first starts"):
        public_key_of(tmp_path, "alpha")

    ensure_keys(tmp_path, "alpha")

    with pytest.raises(UserError, match="hosts with one: alpha"):
        public_key_of(tmp_path, "gamma")


@pytest.mark.parametrize("host", ["", "..", ".hidden", "a/b", "a\0b"])
def test_a_name_that_is_no_host_reaches_no_file(host: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no name of a host"):
        ensure_keys(tmp_path, host)


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UserError, match="cannot make the directory"):
        ensure_keys(tmp_path / "file", "alpha")
