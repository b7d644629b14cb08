"""`pefbox esm make | show | verify | add`, as a person runs them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key

from deploy.esm_commands import esm
from protocol.errors import UserError
from services.ultravisor.identity import ensure_keys, public_key_of
from shared.esm_blob import encode_blob, parse_blob
from shared.esm_crypto import public_pem
from shared.newc import find_blob

ARGS = "svm=on root=/dev/vda"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def owner() -> RSAPrivateKey:
    return generate_private_key(65537, 2048)


@pytest.fixture
def work(tmp_path: Path, owner: RSAPrivateKey, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with keys, an image and a recipe, and the current one."""
    ensure_keys(tmp_path / "state", "alpha")
    (tmp_path / "machine.pub").write_bytes(public_key_of(tmp_path / "state", "alpha"))
    (tmp_path / "owner.pub").write_bytes(public_pem(owner))
    (tmp_path / "owner.pem").write_bytes(_private_pem(owner, serialization.NoEncryption()))
    (tmp_path / "kernel").write_bytes(b"PEFMODEL kernel")
    (tmp_path / "initrd").write_bytes(b"initrd bytes")
    (tmp_path / "crypttab").write_bytes(b"disk secret")
    _write_recipe(tmp_path, RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RECIPE = [
    {"origin": {"pubkey": "owner.pub", "seckey": "owner.pem"}},
    {"recipient": {"comment": "host alpha", "pubkey": "machine.pub"}},
    {"digest": {"args": ARGS, "initramfs": "initrd", "kernel": "kernel"}},
    {"file": {"path": "crypttab"}},
    {"file": {"name": "again", "path": "crypttab", "comment": "same content"}},
]


def _private_pem(key: RSAPrivateKey, protection: serialization.KeySerializationEncryption) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, protection)


def _write_recipe(directory: Path, items: object) -> None:
    (directory / "blob.yml").write_text(yaml.safe_dump(items))


def run(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(esm, list(arguments), input=text)


def make() -> None:
    assert run("make", "-b", "blob", "-y", "blob.yml").exception is None


def verify(*changes: str) -> Result:
    base = ["--key", "state/alpha/machine-key.pem", "--kernel", "kernel", "--initramfs", "initrd", "--args", ARGS]
    return run("verify", "blob", *base, *changes)


def mistake(result: Result) -> str:
    assert isinstance(result.exception, UserError), result.exception
    line = str(result.exception)
    assert "\n" not in line
    return line


def test_a_made_blob_is_shown_and_accepted(work: Path) -> None:
    make()

    shown = run("show", "blob").stdout.splitlines()
    verdict = verify()

    assert [line.split()[0] for line in shown] == ["origin", "recipient", "digests", "file", "file"]
    assert shown[1].endswith("host alpha")
    assert "crypttab, 11 bytes, sealed" in shown[3]
    assert (verdict.exit_code, verdict.stdout) == (0, "blob: accepted, opened with lockbox-1\n")


def test_json_says_the_same(work: Path) -> None:
    make()

    shown = json.loads(run("show", "blob", "--json").stdout)
    verdict = json.loads(verify("--json").stdout)

    assert [box["name"] for box in shown["lockboxes"]] == ["origin-lockbox", "lockbox-1"]
    assert [file["name"] for file in shown["files"]] == ["crypttab", "again"]
    assert verdict["accepted"] is True
    assert verdict["digests"]["kernel_size_bytes"] == len(b"PEFMODEL kernel")


def test_no_secret_is_shown(work: Path) -> None:
    make()

    for result in (run("show", "blob", "--json"), verify("--json")):
        assert "disk secret" not in result.output
        assert "PRIVATE" not in result.output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("--args", "svm=on"), "bootargs digest differs"),
        (("--kernel", "initrd"), "kernel digest differs; kernel size differs (12, not 15 bytes)"),
        (("--initramfs", "kernel"), "initrd digest differs"),
        (("--rtas", "kernel"), "rtas digest differs"),
    ],
)
def test_what_differs_is_told_and_the_exit_status_says_so(change: tuple[str, str], reason: str, work: Path) -> None:
    make()

    result = verify(*change)

    assert (result.exit_code, result.stdout) == (1, f"blob: refused: {reason}\n")


def test_a_blob_that_is_none_is_refused_by_verify_as_by_an_ultravisor(work: Path) -> None:
    (work / "blob").write_bytes(b"nothing")

    assert verify().stdout.startswith("blob: refused: ESM blob: no device tree")


def test_a_blob_is_added_in_front_of_the_initrd_and_the_sum_still_verifies(work: Path) -> None:
    make()

    added = run("add", "-i", "initrd", "-b", "blob", "-f", "whole")

    assert added.exception is None
    whole = (work / "whole").read_bytes()
    found = find_blob(whole)
    assert whole[found.blob_start : found.blob_end] == (work / "blob").read_bytes()
    assert b"opt/ibm/pef/blob" in whole[: found.blob_start]
    assert verify("--initramfs", "whole").exit_code == 0


def test_a_comment_cannot_steer_the_terminal(work: Path) -> None:
    make()
    parsed = parse_blob((work / "blob").read_bytes())
    boxes = tuple(replace(box, comment="\x1b[2J\r") for box in parsed.lockboxes)
    (work / "blob").write_bytes(encode_blob(replace(parsed, lockboxes=boxes)))

    shown = run("show", "blob").stdout

    assert all(character.isprintable() for character in shown.replace("\n", ""))


def test_an_owner_key_with_a_passphrase_is_asked_for(work: Path, owner: RSAPrivateKey) -> None:
    protected = _private_pem(owner, serialization.BestAvailableEncryption(b"open"))
    (work / "owner.pem").write_bytes(protected)

    right = run("make", "-b", "blob", "-y", "blob.yml", text="open\n")
    wrong = run("make", "-b", "blob", "-y", "blob.yml", text="shut\n")

    assert right.exception is None
    assert "passphrase is wrong" in mistake(wrong)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "0 items of kind origin"),
        ([RECIPE[0], *RECIPE], "2 items of kind origin"),
        (RECIPE[:2], "0 items of kind digest"),
        ({"origin": 1}, "Expected `array`"),
        ([{"origin": {"pubkey": "owner.pub"}}], "missing required field `seckey` - at `$[0].origin`"),
        ([*RECIPE, {"recipent": {}}], "unknown field `recipent`"),
        ([*RECIPE, {"file": {"path": "x", "mode": 1}}], "unknown field `mode`"),
        ([*RECIPE, {}], "item 6: exactly one of"),
        ([*RECIPE, {**RECIPE[3], **RECIPE[1]}], "item 6: exactly one of"),
        ([*RECIPE, {"file": {"path": "nowhere"}}], "nowhere: cannot read: No such file"),
        ([*RECIPE, {"file": {"path": "crypttab"}}], "occurs twice"),
        ([*RECIPE, {"recipient": {"pubkey": "owner.pem"}}], "owner.pem: is a private key"),
        ([*RECIPE, {"recipient": {"pubkey": "kernel"}}], "kernel: is no public key"),
        ([{"origin": {"pubkey": "machine.pub", "seckey": "owner.pem"}}, *RECIPE[2:]], "is not the secret key of"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_line(items: object, words: str, work: Path) -> None:
    _write_recipe(work, items)

    assert words in mistake(run("make", "-b", "blob", "-y", "blob.yml"))
    assert not (work / "blob").exists()


@pytest.mark.parametrize("text", [b"\xff", b"a: [", b"!!python/object:os.system x", b"[" * 2000])
def test_a_recipe_that_is_no_yaml_is_one_line(text: bytes, work: Path) -> None:
    (work / "blob.yml").write_bytes(text)

    assert mistake(run("make", "-b", "blob", "-y", "blob.yml")).startswith("blob.yml: ")


def test_files_that_cannot_be_read_or_written_are_named(work: Path) -> None:
    make()

    assert "nowhere: cannot read" in mistake(run("show", "nowhere"))
    assert "is no ESM blob" in mistake(run("show", "kernel"))
    assert "is no ESM blob" in mistake(run("add", "-i", "initrd", "-b", "kernel", "-f", "whole"))
    assert "no/where: cannot write" in mistake(run("make", "-b", "no/where", "-y", "blob.yml"))
    assert "owner.pub: is no private key" in mistake(verify("--key", "owner.pub"))


def test_a_failed_write_leaves_nothing_behind(work: Path) -> None:
    (work / "blob").mkdir()
    before = sorted(path.name for path in work.iterdir())

    assert "blob: cannot write" in mistake(run("make", "-b", "blob", "-y", "blob.yml"))
    assert sorted(path.name for path in work.iterdir()) == before


def test_a_kernel_that_cannot_be_secure_is_warned_of(work: Path) -> None:
    config = gzip.compress(b"CONFIG_PPC_SVM=y\n")
    (work / "kernel").write_bytes(b"kernel IKCFG_ST" + config + b"IKCFG_ED")

    made = run("make", "-b", "blob", "-y", "blob.yml")

    assert made.exit_code == 0
    assert "warning: kernel: no CONFIG_PPC_64K_PAGES: it counts pages of 4 KiB" in made.stderr
    assert "PPC_SVM:" not in made.stderr
