"""Where a secure VM may go, as its owner writes it into a file of its ESM blob.

The blob seals the file, so no host can read or change it; the ultravisor reads it when a migration is asked for.
"""

from __future__ import annotations

import msgspec

POLICY_FILE = "migration-policy"
"""The file of an ESM blob that holds a PolicyFile as JSON. Without it the VM goes nowhere."""


class PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """May it migrate at all; if any are named, only to hosts under these `roots` (public keys in hex) or `hosts`.

    `to_debuggable` allows a host whose ultravisor a debugger may be attached to.
    """

    may_migrate: bool = False
    roots: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    to_debuggable: bool = False
