"""The hosts in a cluster file: `[hosts.NAME]`."""

from __future__ import annotations

import msgspec

from deploy.cluster_section import NAME, Section, did_you_mean, quoted
from protocol.geometry import PAGE_BYTES
from services.ultravisor.identity import OWNER

HOST_KEYS = ("secure_memory", "migration_root", "trusted_roots", "revoked")
MAX_SECURE_BYTES = 1 << 40


class HostSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A host instance and the secure memory that its ultravisor accounts for.

    `migration_root` signs for its identity, `trusted_roots` are those that it believes, `revoked` the hosts that it
    does not.
    """

    name: str
    secure_memory_bytes: int
    migration_root: str = OWNER
    trusted_roots: tuple[str, ...] = (OWNER,)
    revoked: tuple[str, ...] = ()


def read_hosts(sections: dict[str, Section]) -> list[HostSpec]:
    """The hosts of a file; whom one trusts are roots and hosts of the same file."""
    roots = {name: _root(section) for name, section in sections.items()}
    return [_host(name, section, roots) for name, section in sections.items()]


def _root(section: Section) -> str:
    root = section.text("migration_root", OWNER)
    if not NAME.fullmatch(root):
        section.fail(
            "migration_root",
            f'"{root}" is no name; allowed: lower-case letters, digits and -, a letter in front, up to 31',
        )
    return root


def _host(name: str, section: Section, roots: dict[str, str]) -> HostSpec:
    """`roots` has the root of every host of the file."""
    n_bytes = section.size_bytes("secure_memory", multiple_of=PAGE_BYTES, lowest=PAGE_BYTES, highest=MAX_SECURE_BYTES)
    trusted = [roots[name]]
    if "trusted_roots" in section:
        trusted = _names(section, "trusted_roots", "root", list(dict.fromkeys(roots.values())))
    others = [other for other in roots if other != name]
    return HostSpec(
        name=name,
        secure_memory_bytes=n_bytes,
        migration_root=roots[name],
        trusted_roots=tuple(trusted),
        revoked=tuple(_names(section, "revoked", "other host", others)),
    )


def _names(section: Section, key: str, what: str, allowed: list[str]) -> list[str]:
    names = section.texts(key)
    for name in names:
        if name not in allowed:
            choice = f"allowed: {quoted(allowed)}" if allowed else "there is none"
            section.fail(key, f'no {what} "{name}"{did_you_mean(name, allowed)}; {choice}')
    return list(dict.fromkeys(names))
