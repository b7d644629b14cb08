"""The ESM blob: what it says, what of it is authenticated, what a hostile one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.errors import ImageRefused
from services.ultravisor.esm_files import EsmFiles, pack_name
from services.ultravisor.measure import OpenedBlob, check_image, measure, open_blob
from shared.esm_blob import (
    MAX_LOCKBOXES,
    EsmBlob,
    Lockbox,
    encode_blob,
    encode_digests,
    parse_blob,
    parse_digests,
)
from shared.esm_crypto import new_symkey, public_pem, seal, wrap
from shared.esm_digest import RTAS_TEXT, SecureImage, digests_of
from shared.esm_make import Attachment, BlobContents, Holder, make_blob

IMAGE = SecureImage(rtas=RTAS_TEXT, kernel=b"kernel" * 1000, initrd=b"initrd" * 50, bootargs=b"svm=on root=/dev/vda")
FILES = {"crypttab": b"disk key " * 20, "empty": b"", "motd": b"hello"}

NOT_AUTHENTICATED = {
    "bytes that nobody reads (padding, the number of the boot processor)",
    "lockbox comment",
    "lockbox fingerprint",
    "lockbox number",
    "key wrapped for someone else",
    "digests comment",
    "file comment",
    "file name",
}
"""What the format leaves open; docs/esm.md explains each."""


@pytest.fixture(scope="module")
def machine() -> RSAPrivateKey:
    return generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def owner() -> RSAPrivateKey:
    return generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def blob(machine: RSAPrivateKey, owner: RSAPrivateKey) -> bytes:
    other = generate_private_key(65537, 2048)
    return make_blob(
        BlobContents(
            origin=Holder(public_pem(owner), "the owner"),
            recipients=[Holder(public_pem(other), "another machine"), Holder(public_pem(machine), "this machine")],
            digests=digests_of(IMAGE),
            digests_comment="first release",
            files=[Attachment(name, content, f"about {name}") for name, content in FILES.items()],
        )
    )


def contents_of(files: EsmFiles) -> dict[str, bytes]:
    """Every file of a secure VM, read as it reads them."""
    return {name: _read_all(files, name) for name in files.names}


def _read_all(files: EsmFiles, name: str) -> bytes:
    content = b""
    while True:
        count, words = files.get(len(content), pack_name(name), pid=1)
        assert count >= 0
        if count == 0:
            return content
        content += b"".join(word.to_bytes(8, "big") for word in words)[:count]


def refusal(blob: bytes, key: RSAPrivateKey) -> str:
    with pytest.raises(ImageRefused) as caught:
        open_blob(blob, key)
    return caught.value.reason


def test_a_blob_opens_with_the_key_of_a_recipient_whatever_its_number(blob: bytes, machine: RSAPrivateKey) -> None:
    opened = measure(blob, machine, IMAGE)

    assert opened.lockbox == "lockbox-2"
    assert opened.digests == digests_of(IMAGE)
    assert contents_of(opened.files()) == FILES


def test_a_blob_opens_with_the_key_of_its_owner(blob: bytes, owner: RSAPrivateKey) -> None:
    assert open_blob(blob, owner).lockbox == "origin-lockbox"


def test_a_blob_for_other_machines_is_refused(blob: bytes) -> None:
    assert refusal(blob, generate_private_key(65537, 2048)) == "no lockbox for this machine"


def test_the_key_of_a_blob_is_in_no_text_of_it(blob: bytes, machine: RSAPrivateKey) -> None:
    opened = open_blob(blob, machine)

    assert "symkey" not in repr(opened)
    assert "b'" not in repr(opened.files().save())


def test_parsing_what_was_encoded_gives_it_back(blob: bytes) -> None:
    parsed = parse_blob(blob)

    assert parse_blob(encode_blob(parsed)) == parsed
    assert [box.name for box in parsed.lockboxes] == ["origin-lockbox", "lockbox-1", "lockbox-2"]
    assert [box.comment for box in parsed.lockboxes] == ["the owner", "another machine", "this machine"]
    assert parsed.digests.comment == "first release"


def test_digests_survive_their_tree() -> None:
    digests = digests_of(IMAGE)

    assert parse_digests(encode_digests(digests)) == digests


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (replace(IMAGE, rtas=b"\0" * 20), "rtas digest differs"),
        (replace(IMAGE, kernel=b"Kernel" * 1000), "kernel digest differs"),
        (replace(IMAGE, initrd=b""), "initrd digest differs"),
        (replace(IMAGE, bootargs=b"svm=on root=/dev/vdb"), "bootargs digest differs"),
        (replace(IMAGE, bootargs=b"svm=on root=/dev/vda "), "bootargs digest differs"),
        (replace(IMAGE, rtas=b"", initrd=b""), "rtas digest differs; initrd digest differs"),
    ],
)
def test_a_part_that_differs_is_named(changed: SecureImage, reason: str) -> None:
    with pytest.raises(ImageRefused) as caught:
        check_image(digests_of(IMAGE), changed)
    assert caught.value.reason == reason


def test_a_kernel_of_another_size_is_named() -> None:
    with pytest.raises(ImageRefused, match=r"kernel digest differs; kernel size differs \(3, not 6000 bytes\)"):
        check_image(digests_of(IMAGE), replace(IMAGE, kernel=b"abc"))


def test_an_image_may_come_in_pages_and_with_the_terminator_of_its_arguments() -> None:
    kernel = bytes(IMAGE.kernel)  # type: ignore[arg-type]
    pages = [memoryview(kernel)[start : start + 512] for start in range(0, len(kernel), 512)]

    check_image(digests_of(IMAGE), replace(IMAGE, kernel=pages, bootargs=IMAGE.bootargs + b"\0"))


# -- every byte -----------------------------------------------------------------------------------------------


def authenticated_fields(parsed: EsmBlob, lockbox: str) -> dict[str, bytes]:
    """Each field that the format authenticates for the machine whose lockbox is named."""
    fields = {"wrapped key": next(box.encrypted_symkey for box in parsed.lockboxes if box.name == lockbox)}
    for name, sealed in [("digests", parsed.digests), *parsed.files.items()]:
        fields |= {f"{name} iv": sealed.iv, f"{name} mac": sealed.mac, f"{name} ciphertext": sealed.ciphertext}
    return {name: value for name, value in fields.items() if value}


def difference(before: EsmBlob, after: EsmBlob) -> str:
    """Which open field of the blob two parses differ in."""
    if before == after:
        return "bytes that nobody reads (padding, the number of the boot processor)"
    if after.files.keys() != before.files.keys():
        return "file name"
    if {box.name for box in after.lockboxes} != {box.name for box in before.lockboxes}:
        return "lockbox number"
    if before.digests != after.digests:
        assert replace(before.digests, comment="") == replace(after.digests, comment="")
        return "digests comment"
    if before.files != after.files:
        assert all(replace(before.files[n], comment="") == replace(after.files[n], comment="") for n in before.files)
        return "file comment"
    was, now = next(pair for pair in zip(before.lockboxes, after.lockboxes, strict=True) if pair[0] != pair[1])
    if was.comment != now.comment:
        return "lockbox comment"
    return "lockbox fingerprint" if was.fingerprint != now.fingerprint else "key wrapped for someone else"


def _opened_or_none(blob: bytes, key: RSAPrivateKey) -> OpenedBlob | None:
    try:
        return open_blob(blob, key)
    except ImageRefused:
        return None


def test_one_bit_changed_in_any_byte_is_refused_or_changes_nothing_that_counts(
    blob: bytes, machine: RSAPrivateKey
) -> None:
    parsed, opened = parse_blob(blob), open_blob(blob, machine)
    guarded = set()
    for value in authenticated_fields(parsed, opened.lockbox).values():
        assert blob.count(value) == 1
        guarded |= set(range(blob.index(value), blob.index(value) + len(value)))
    open_fields = set()

    for position in range(len(blob)):
        changed = bytearray(blob)
        changed[position] ^= 1 << (position % 8)
        result = _opened_or_none(bytes(changed), machine)
        if result is None:
            continue
        assert position not in guarded
        assert result.digests == opened.digests
        assert sorted(contents_of(result.files()).values()) == sorted(FILES.values())
        open_fields.add(difference(parsed, parse_blob(bytes(changed))))

    assert open_fields == NOT_AUTHENTICATED


def test_every_single_bit_of_key_iv_and_mac_counts(blob: bytes, machine: RSAPrivateKey) -> None:
    parsed = parse_blob(blob)
    fields = authenticated_fields(parsed, "lockbox-2")

    for name in ("wrapped key", "digests iv", "digests mac", "crypttab iv", "crypttab mac"):
        start = blob.index(fields[name])
        for bit in range(8 * len(fields[name])):
            changed = bytearray(blob)
            changed[start + bit // 8] ^= 1 << (bit % 8)
            assert _opened_or_none(bytes(changed), machine) is None, (name, bit)


# -- hostile blobs --------------------------------------------------------------------------------------------


def test_a_lockbox_that_the_host_added_cannot_shadow_the_right_one(blob: bytes, machine: RSAPrivateKey) -> None:
    parsed = parse_blob(blob)
    mine = next(box for box in parsed.lockboxes if box.name == "lockbox-2")
    forged = Lockbox("lockbox-1", wrap(machine.public_key(), new_symkey()), mine.fingerprint)
    shadowed = encode_blob(replace(parsed, lockboxes=(forged, mine)))

    assert open_blob(shadowed, machine).lockbox == "lockbox-2"


def test_digests_sealed_by_the_host_under_its_own_key_do_not_open_with_the_owners_files(
    blob: bytes, machine: RSAPrivateKey
) -> None:
    parsed = parse_blob(blob)
    own_key = new_symkey()
    box = Lockbox("lockbox-1", wrap(machine.public_key(), own_key), bytes(32))
    digests = seal(own_key, encode_digests(digests_of(replace(IMAGE, kernel=b"evil"))))
    forged = encode_blob(EsmBlob((*parsed.lockboxes[2:], box), digests, parsed.files))

    assert refusal(forged, machine).startswith("file ")


def test_a_file_in_the_place_of_the_digests_is_refused(blob: bytes, machine: RSAPrivateKey) -> None:
    parsed = parse_blob(blob)

    assert "digests" in refusal(encode_blob(replace(parsed, digests=parsed.files["motd"])), machine)


def test_authentic_digests_that_do_not_hold_are_refused(machine: RSAPrivateKey) -> None:
    symkey = new_symkey()
    box = Lockbox("lockbox-1", wrap(machine.public_key(), symkey), bytes(32))
    nothing = digests_of(replace(IMAGE, kernel=b""))

    for plain, words in [
        (b"", "no device tree"),
        (encode_digests(nothing), "kernel-size is 0"),
        (encode_digests(replace(nothing, rtas=b"x")), "rtas of 1 bytes"),
    ]:
        assert words in refusal(encode_blob(EsmBlob((box,), seal(symkey, plain), {})), machine)


def test_structures_out_of_bounds_are_refused_with_the_reason(blob: bytes, machine: RSAPrivateKey) -> None:
    parsed = parse_blob(blob)
    box = parsed.lockboxes[0]
    sealed = parsed.digests
    many = tuple(replace(box, name=f"lockbox-{n + 1}") for n in range(MAX_LOCKBOXES + 1))

    for changed, words in [
        (replace(parsed, lockboxes=()), "no lockbox"),
        (replace(parsed, lockboxes=many), "more than 64 lockboxes"),
        (replace(parsed, lockboxes=(replace(box, name="lockbox-x"),)), "none of the format"),
        (replace(parsed, lockboxes=(replace(box, fingerprint=b""),)), "hash of 0 bytes"),
        (replace(parsed, digests=replace(sealed, mac=sealed.mac[:8])), "mac of 8 bytes"),
        (replace(parsed, digests=replace(sealed, iv=b"")), "iv of 0 bytes"),
        (replace(parsed, files={"big": seal(new_symkey(), bytes(70_000))}), "larger than 65536"),
        (replace(parsed, files={f"f{n}": sealed for n in range(49)}), "more than 48 files"),
        (replace(parsed, files={"n" * 65: sealed}), "longer than 64 bytes"),
    ]:
        assert words in refusal(encode_blob(changed), machine)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes, machine: RSAPrivateKey) -> None:
    refusal(data, machine)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6))
def test_a_damaged_blob_is_opened_or_refused_and_its_digests_stay_true(
    edits: list[tuple[int, bytes]], blob: bytes, machine: RSAPrivateKey
) -> None:
    damaged = bytearray(blob)
    for position, patch in edits:
        start = position % len(blob)
        damaged[start : start + len(patch)] = patch

    opened = _opened_or_none(bytes(damaged), machine)

    assert opened is None or opened.digests == digests_of(IMAGE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": [Attachment("no/slash", b"")]}, "file name"),
        ({"files": [Attachment("twice", b""), Attachment("twice", b"")]}, "occurs twice"),
        ({"files": [Attachment("big", bytes(65_537))]}, "at most 65536"),
        ({"files": [Attachment(f"f{n}", b"") for n in range(49)]}, "at most 48"),
        ({"digests": digests_of(replace(IMAGE, kernel=b""))}, "kernel of 0 bytes"),
        ({"digests_comment": "two\nlines"}, "newline"),
        ({"origin": Holder(b"no key")}, "no public key"),
    ],
)
def test_what_does_not_fit_the_format_is_not_made(change: dict[str, object], words: str, owner: RSAPrivateKey) -> None:
    contents = BlobContents(Holder(public_pem(owner)), [], digests_of(IMAGE))

    with pytest.raises(ValueError, match=words):
        make_blob(replace(contents, **change))  # type: ignore[arg-type]


def test_a_key_that_occurs_twice_is_not_made(owner: RSAPrivateKey) -> None:
    with pytest.raises(ValueError, match="twice"):
        make_blob(BlobContents(Holder(public_pem(owner)), [Holder(public_pem(owner))], digests_of(IMAGE)))


def test_the_document_lists_all_that_is_not_authenticated() -> None:
    text = (Path(__file__).parents[2] / "docs/esm.md").read_text()
    section = text.partition("## What the format leaves open")[2].partition("\n## ")[0]

    assert {name for name in NOT_AUTHENTICATED if name not in section} == set()
