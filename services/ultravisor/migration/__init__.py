"""A secure VM leaves its host and goes on at another: what the two ultravisors say to each other.

PEF has no migration; this protocol is pefbox's own. Its messages travel as opaque bytes through both qemus, which may
drop, repeat, reorder, alter or swap them. Everything here is plain and synchronous: it holds no socket and starts no
task, so a test can try every order of events.

    certificates   who a host is, and who says so
    policy         where a secure VM may go
    handshake      three messages: keys for this one migration, each side sure of the other
    records        what is sealed under these keys, in one order
    payloads       what the records hold
    side           what both sides have
    exporter       the source's side: pages, state, the token
    importer       the destination's side
    ledger         the decisions that outlive a crash
    statements     these decisions signed, for the other side
    recovery       what an ultravisor says of a migration that was cut
    svm_parts      a secure VM taken apart for the exporter, and put together of what the importer got
"""
