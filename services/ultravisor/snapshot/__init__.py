"""A secure VM is put away on its host and goes on later: a migration whose destination is the same ultravisor.

What a migration agrees on with its peer comes from this ultravisor's own identity key here, and what its token and its
words decide, a line of the ledger does. Everything here is plain and synchronous.

    head     what names a snapshot, and its keys
    book     which snapshots may be restored
    sides    exporter and importer with these decisions in the place of the token
"""
