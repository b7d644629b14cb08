"""Who may talk to whom, about which secure VM, and that both sides end with the same keys."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from services.ultravisor.migration.certificates import HostCertificate, Trust
from services.ultravisor.migration.handshake import (
    VERSION,
    Answer,
    DestinationHandshake,
    Host,
    Offer,
    SourceHandshake,
    Subject,
)
from services.ultravisor.migration.policy import MigrationPolicy
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from tests.unit.migration_pair import MEASUREMENT, NOW, ROOT, SUBJECT, debuggable, make_host, shake_hands

OTHER_ROOT = Ed25519PrivateKey.generate()
BOTH_ROOTS = frozenset(root.public_key().public_bytes_raw() for root in (ROOT, OTHER_ROOT))
ALPHA, BETA = make_host("alpha"), make_host("beta")


def refusal(act: Callable[[], object]) -> Reason:
    with pytest.raises(MigrationRefused) as caught:
        act()
    assert str(caught.value).startswith(caught.value.reason.value)
    return caught.value.reason


def with_policy(policy: MigrationPolicy) -> Subject:
    return msgspec.structs.replace(SUBJECT, policy=policy)


def test_both_sides_end_with_the_same_keys_crosswise() -> None:
    source, destination = shake_hands(ALPHA, BETA)

    assert source.session_id == destination.session_id
    assert source.send_key == destination.receive_key != source.receive_key == destination.send_key
    assert (source.peer.host, destination.peer.host) == ("beta", "alpha")
    assert destination.subject == SUBJECT
    assert source.send_key.hex() not in repr(source)


def test_no_two_migrations_have_a_key_or_a_name_in_common() -> None:
    seen: set[bytes] = set()
    for _ in range(5):
        session, _ = shake_hands(ALPHA, BETA)
        seen |= {session.session_id, session.send_key, session.receive_key}

    assert len(seen) == 15


@pytest.mark.parametrize(
    ("peer", "trust", "reason"),
    [
        (make_host("x", OTHER_ROOT), None, Reason.UNTRUSTED_ROOT),
        (make_host("x", expires=int(NOW)), None, Reason.EXPIRED),
        (make_host("x"), Trust(BOTH_ROOTS, measurements=frozenset({bytes(32)})), Reason.UNKNOWN_MEASUREMENT),
    ],
)
def test_a_peer_that_is_not_trusted_is_refused_by_either_side(peer: Host, trust: Trust | None, reason: Reason) -> None:
    here = make_host("here", trust=trust)
    believing = make_host("there", trust=Trust(BOTH_ROOTS))
    peer = Host(peer.identity, peer.certificate, peer.measurement, believing.trust, peer.now)

    assert refusal(lambda: shake_hands(peer, here)) is reason
    assert refusal(lambda: shake_hands(here, peer)) is reason


def test_a_revoked_identity_is_refused() -> None:
    roots = frozenset({ROOT.public_key().public_bytes_raw()})
    here = make_host("here", trust=Trust(roots, revoked=frozenset({BETA.certificate.identity})))

    assert refusal(lambda: shake_hands(here, BETA)) is Reason.REVOKED
    assert refusal(lambda: shake_hands(BETA, here)) is Reason.REVOKED


def test_a_certificate_that_its_root_did_not_sign_is_refused() -> None:
    forged = msgspec.structs.replace(BETA.certificate, host="alpha")
    peer = Host(BETA.identity, forged, MEASUREMENT, BETA.trust, BETA.now)

    assert refusal(lambda: shake_hands(ALPHA, peer)) is Reason.BAD_CERTIFICATE


def test_a_certificate_without_its_key_is_of_no_use() -> None:
    """Somebody in the middle shows the certificate of beta and does not hold its key."""
    thief = Host(Ed25519PrivateKey.generate(), BETA.certificate, MEASUREMENT, BETA.trust, BETA.now)

    assert refusal(lambda: shake_hands(ALPHA, thief)) is Reason.BAD_SIGNATURE
    assert refusal(lambda: shake_hands(thief, ALPHA)) is Reason.BAD_SIGNATURE


def test_the_policy_of_the_vm_decides_where_it_goes() -> None:
    foreign = frozenset({OTHER_ROOT.public_key().public_bytes_raw()})
    allowed = MigrationPolicy(True, tuple(BOTH_ROOTS - foreign), ("beta", "gamma"))

    shake_hands(ALPHA, BETA, with_policy(allowed))
    for policy in (
        MigrationPolicy(),
        MigrationPolicy(may_migrate=True, hosts=("gamma",)),
        MigrationPolicy(may_migrate=True, roots=tuple(foreign)),
    ):
        assert refusal(lambda policy=policy: shake_hands(ALPHA, BETA, with_policy(policy))) is Reason.POLICY  # type: ignore[misc]


def test_a_debuggable_destination_needs_leave_by_the_policy() -> None:
    beta = debuggable(BETA)

    assert refusal(lambda: shake_hands(ALPHA, beta)) is Reason.DEBUGGABLE
    shake_hands(ALPHA, beta, with_policy(MigrationPolicy(may_migrate=True, to_debuggable=True)))


def test_a_destination_cannot_hide_that_it_is_debuggable() -> None:
    first = SourceHandshake(ALPHA, with_policy(MigrationPolicy(may_migrate=True)))
    # An honest destination refuses by itself; this one does not, and its answer is changed on the way.
    leave = SourceHandshake(ALPHA, with_policy(MigrationPolicy(may_migrate=True, to_debuggable=True)))
    answer = msgspec.msgpack.decode(DestinationHandshake(debuggable(BETA), leave.offer).answer, type=Answer)
    hidden = msgspec.msgpack.encode(msgspec.structs.replace(answer, debuggable=False))

    assert refusal(lambda: leave.take_answer(hidden)) is Reason.BAD_SIGNATURE
    assert refusal(lambda: first.take_answer(hidden)) is Reason.BAD_SIGNATURE


def test_an_answer_or_a_confirmation_is_taken_once() -> None:
    """The same keys twice would be the same nonces twice."""
    first = SourceHandshake(ALPHA, SUBJECT)
    second = DestinationHandshake(BETA, first.offer)
    _, confirm = first.take_answer(second.answer)
    second.take_confirm(confirm)

    assert refusal(lambda: first.take_answer(second.answer)) is Reason.WRONG_PHASE
    assert refusal(lambda: second.take_confirm(confirm)) is Reason.WRONG_PHASE


def test_another_version_is_refused_before_anything_is_believed() -> None:
    offer = msgspec.msgpack.decode(SourceHandshake(ALPHA, SUBJECT).offer, type=Offer)
    newer = msgspec.msgpack.encode(msgspec.structs.replace(offer, version=VERSION + 1))

    assert refusal(lambda: DestinationHandshake(BETA, newer)) is Reason.OTHER_VERSION


def test_an_offer_that_was_changed_on_the_way_is_found_out() -> None:
    first = SourceHandshake(ALPHA, SUBJECT)
    offer = msgspec.msgpack.decode(first.offer, type=Offer)
    changed = msgspec.structs.replace(offer, subject=msgspec.structs.replace(offer.subject, vm="vm2"))
    second = DestinationHandshake(BETA, msgspec.msgpack.encode(changed))

    assert refusal(lambda: first.take_answer(second.answer)) is Reason.BAD_SIGNATURE


def test_a_confirmation_of_another_migration_is_refused() -> None:
    first, other = SourceHandshake(ALPHA, SUBJECT), SourceHandshake(ALPHA, SUBJECT)
    second = DestinationHandshake(BETA, first.offer)
    _, confirm = other.take_answer(DestinationHandshake(BETA, other.offer).answer)

    assert refusal(lambda: second.take_confirm(confirm)) is Reason.BAD_SIGNATURE


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    first = SourceHandshake(ALPHA, SUBJECT)

    assert refusal(lambda: DestinationHandshake(BETA, noise)) is Reason.MALFORMED
    assert refusal(lambda: first.take_answer(noise)) is Reason.MALFORMED


def test_an_ephemeral_key_that_leads_nowhere_is_refused() -> None:
    offer = msgspec.msgpack.decode(SourceHandshake(ALPHA, SUBJECT).offer, type=Offer)
    empty = msgspec.msgpack.encode(msgspec.structs.replace(offer, ephemeral=bytes(32)))

    assert refusal(lambda: DestinationHandshake(BETA, empty)) is Reason.MALFORMED


def test_what_a_root_signs_names_everything_in_the_certificate() -> None:
    certificate = ALPHA.certificate
    changes: list[dict[str, object]] = [{"host": "b"}, {"identity": bytes(32)}, {"root": bytes(32)}, {"expires": 1}]
    changed: list[HostCertificate] = [msgspec.structs.replace(certificate, **change) for change in changes]

    assert len({certificate.signed(), *(one.signed() for one in changed)}) == 5
