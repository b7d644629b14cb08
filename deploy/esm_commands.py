"""`pefbox esm`: make, show, verify and add ESM blobs, compatible with the public `svm-tool`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from deploy.files import beside
from deploy.linux.config import findings_for_secure
from protocol.errors import ImageRefused, UserError
from services.ultravisor.measure import check_image, open_blob
from shared.esm_blob import MAX_BLOB_BYTES, EsmBlob, Lockbox, parse_blob
from shared.esm_crypto import PassphraseNeeded, load_private_key, load_public_key, public_pem
from shared.esm_digest import RTAS_TEXT, SecureImage, digests_of
from shared.esm_kernel import kernel_image
from shared.esm_make import Attachment, BlobContents, Holder, make_blob
from shared.esm_recipe import Digest, Origin, Recipe, parse_recipe
from shared.newc import find_blob, prepend_blob
from shared.terminal_text import one_line

_FILE = click.Path(path_type=Path)


@click.group("esm")
def esm() -> None:
    """Make and inspect ESM blobs."""


@esm.command("make")
@click.option("-b", "--blob", "blob_path", required=True, type=_FILE, help="The blob to write.")
@click.option("-y", "--config", "recipe_path", required=True, type=_FILE, help="YAML list of svm-tool's items.")
def make_command(blob_path: Path, recipe_path: Path) -> None:
    """Make a blob from a YAML list of origin, recipient, digest and file items.

    Paths in the list are relative to the current directory, as svm-tool takes them.
    """
    try:
        recipe = parse_recipe(_read(recipe_path))
    except ValueError as error:
        raise UserError(f"{recipe_path}: {error}") from None
    contents = _collect(recipe)
    try:
        data = make_blob(contents)
    except ValueError as error:
        raise UserError(f"{recipe_path}: {error}") from None
    _write(blob_path, data)


@esm.command("show")
@click.argument("blob_path", metavar="BLOB", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def show_command(blob_path: Path, as_json: bool) -> None:
    """Show what a blob says of itself. Nothing shown is authenticated: `verify` needs a key."""
    blob = _parse(blob_path)
    if as_json:
        click.echo(json.dumps(describe_blob(blob), indent=2))
        return
    for box in blob.lockboxes:
        kind = "origin" if box.name == "origin-lockbox" else "recipient"
        click.echo(f"{kind:<10}{box.fingerprint.hex()}  {one_line(box.comment)}")
    click.echo(f"{'digests':<10}{len(blob.digests.ciphertext)} bytes, sealed  {one_line(blob.digests.comment)}")
    for name, sealed in blob.files.items():
        click.echo(f"{'file':<10}{name}, {len(sealed.ciphertext)} bytes, sealed  {one_line(sealed.comment)}")


@esm.command("verify")
@click.argument("blob_path", metavar="BLOB", type=_FILE)
@click.option("--key", "key_path", required=True, type=_FILE, help="Private key of the machine.")
@click.option("--kernel", "kernel_path", required=True, type=_FILE, help="Kernel: ELF or flat.")
@click.option("--initramfs", "initrd_path", required=True, type=_FILE, help="Initial RAM disk, with or without a blob.")
@click.option("--rtas", "rtas_path", type=_FILE, help="RTAS code; SLOF's 20 bytes when not given.")
@click.option("--args", "args", required=True, help="Kernel command line, exactly as measured.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def verify_command(
    blob_path: Path,
    key_path: Path,
    kernel_path: Path,
    initrd_path: Path,
    rtas_path: Path | None,
    args: str,
    as_json: bool,
) -> None:
    """Check a blob against an image as the ultravisor of the machine with this key would. Exit status 1 if refused."""
    key = _private_key(key_path)
    image = SecureImage(
        rtas=RTAS_TEXT if rtas_path is None else _read(rtas_path),
        kernel=_kernel(kernel_path),
        initrd=_without_blob(_read(initrd_path)),
        bootargs=args.encode(),
    )
    result = verify_blob(_read(blob_path), key, image)
    click.echo(json.dumps(result, indent=2) if as_json else _verdict(blob_path, result))
    if not result["accepted"]:
        raise click.exceptions.Exit(1)


@esm.command("add")
@click.option("-i", "--initramfs", "initrd_path", required=True, type=_FILE, help="Initial RAM disk that was measured.")
@click.option("-b", "--blob", "blob_path", required=True, type=_FILE, help="The blob.")
@click.option("-f", "--file", "out_path", required=True, type=_FILE, help="The initial RAM disk to write.")
def add_command(initrd_path: Path, blob_path: Path, out_path: Path) -> None:
    """Put a blob in front of an initial RAM disk, where the ultravisor looks for it."""
    blob = _read(blob_path)
    _parse(blob_path)
    try:
        data = prepend_blob(_read(initrd_path), blob, blob_path.name)
    except ValueError as error:
        raise UserError(f"{blob_path}: {error}") from None
    _write(out_path, data)


def describe_blob(blob: EsmBlob) -> dict[str, object]:
    """The readable parts of a blob, for JSON."""
    return {
        "lockboxes": [_describe_lockbox(box) for box in blob.lockboxes],
        "digests": {"sealed_bytes": len(blob.digests.ciphertext), "comment": blob.digests.comment},
        "files": [
            {"name": name, "sealed_bytes": len(sealed.ciphertext), "comment": sealed.comment}
            for name, sealed in blob.files.items()
        ],
    }


def verify_blob(blob: bytes, key: RSAPrivateKey, image: SecureImage) -> dict[str, object]:
    """The verdict of the machine with `key` on blob and image, for JSON."""
    result: dict[str, object] = {"accepted": False, "reason": None, "lockbox": None, "digests": None, "files": []}
    try:
        opened = open_blob(blob, key)
        result |= {"lockbox": opened.lockbox, "files": list(opened.file_names)}
        result["digests"] = {
            "rtas": opened.digests.rtas.hex(),
            "kernel": opened.digests.kernel.hex(),
            "kernel_size_bytes": opened.digests.kernel_size_bytes,
            "initrd": opened.digests.initrd.hex(),
            "bootargs": opened.digests.bootargs.hex(),
        }
        check_image(opened.digests, image)
    except ImageRefused as refused:
        return result | {"reason": refused.reason}
    return result | {"accepted": True}


# -- details --------------------------------------------------------------------------------------------------


def _collect(recipe: Recipe) -> BlobContents:
    _check_owner(recipe.origin)
    return BlobContents(
        origin=_holder(recipe.origin.pubkey, recipe.origin.comment),
        recipients=[_holder(recipient.pubkey, recipient.comment) for recipient in recipe.recipients],
        digests=digests_of(_image(recipe.digest)),
        digests_comment=recipe.digest.comment,
        files=[Attachment(file.node_name, _read(Path(file.path)), file.comment) for file in recipe.files],
    )


def _image(digest: Digest) -> SecureImage:
    for finding in findings_for_secure(_read(Path(digest.kernel))):
        click.echo(f"warning: {digest.kernel}: {finding}", err=True)
    return SecureImage(
        rtas=RTAS_TEXT,
        kernel=_kernel(Path(digest.kernel)),
        initrd=_read(Path(digest.initramfs)),
        bootargs=digest.args.encode(),
    )


def _holder(path: str, comment: str) -> Holder:
    pem = _read(Path(path))
    try:
        load_public_key(pem)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return Holder(pem, comment)


def _check_owner(origin: Origin) -> None:
    key = _private_key(Path(origin.seckey))
    public = load_public_key(_holder(origin.pubkey, "").public_pem)
    if public_pem(key) != public_pem(public):
        raise UserError(f"{origin.seckey}: is not the secret key of {origin.pubkey}; the owner could not open the blob")


def _private_key(path: Path) -> RSAPrivateKey:
    pem = _read(path)
    try:
        try:
            return load_private_key(pem)
        except PassphraseNeeded:
            passphrase = click.prompt(f"Passphrase for {path}", hide_input=True, err=True)
            return load_private_key(pem, str(passphrase).encode())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _kernel(path: Path) -> bytes:
    try:
        return kernel_image(_read(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _without_blob(initrd: bytes) -> bytes:
    try:
        return initrd[find_blob(initrd).initrd_start :]
    except ImageRefused:
        return initrd


def _parse(path: Path) -> EsmBlob:
    data = _read(path)
    if len(data) > MAX_BLOB_BYTES:
        raise UserError(f"{path}: has {len(data)} bytes; a blob has at most {MAX_BLOB_BYTES}")
    try:
        return parse_blob(data)
    except ImageRefused as refused:
        raise UserError(f"{path}: is no ESM blob: {refused.reason}") from None


def _describe_lockbox(box: Lockbox) -> dict[str, object]:
    return {"name": box.name, "fingerprint_sha256": box.fingerprint.hex(), "comment": box.comment}


def _verdict(path: Path, result: dict[str, object]) -> str:
    if result["accepted"]:
        return f"{path}: accepted, opened with {result['lockbox']}"
    return f"{path}: refused: {result['reason']}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


def _write(path: Path, data: bytes) -> None:
    try:
        with beside(path) as temporary:
            temporary.write_bytes(data)
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}") from None
