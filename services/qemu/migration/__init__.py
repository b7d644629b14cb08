"""Live migration as qemu does it: what is sent when, and how far it is. Plain objects, without sockets and tasks.

    status       how far a migration is, and what may follow
    parameters   what an operator sets
    precopy      rounds: when to go on, when to stop the guest, what to tell of it
    pacing       how fast bytes may leave
    stream       frames on the wire between two qemus

What a secure VM adds goes through as opaque frames: the two ultravisors have their own protocol (docs/migration.md).
"""
