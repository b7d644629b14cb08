"""A secret is found in much memory wherever it lies and in each of its forms, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.secret_search import SecretSearch

SECRETS = {name: bytes(range(start, start + 32)) for name, start in (("page", 0x20), ("register", 0x60))}
CHUNK_BYTES = 4 << 20

Form = Callable[[bytes], bytes]
FORMS: list[Form] = [bytes, lambda word: word[::-1], lambda word: word.hex().encode()]


def plain_search(piece: bytes) -> set[str]:
    """The same, slowly."""
    words = {name: [secret[at : at + 8] for at in range(0, 32, 8)] for name, secret in SECRETS.items()}
    return {name for name, parts in words.items() if any(form(word) in piece for word in parts for form in FORMS)}


@given(st.lists(st.sampled_from([b"\0" * 3, b" ", b"!", *(s[at : at + 8] for s in SECRETS.values() for at in (0, 24)),
                                 *(form(s[8:16]) for s in SECRETS.values() for form in FORMS),
                                 SECRETS["page"][:7], b"ab" * 9])))  # fmt: skip
def test_what_is_found_is_what_a_plain_search_finds(parts: list[bytes]) -> None:
    piece = b"".join(parts)
    assert SecretSearch(SECRETS).names_in([piece]) == plain_search(piece)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", [CHUNK_BYTES - 15, CHUNK_BYTES - 8, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_a_form_that_lies_across_two_chunks_is_found(at: int, form: Form) -> None:
    piece = bytearray(CHUNK_BYTES + 64)
    data = form(SECRETS["page"][16:24])
    piece[at : at + len(data)] = data
    assert SecretSearch(SECRETS).names_in([b"", b"x", bytes(piece)]) == {"page"}


def test_a_secret_that_begins_as_empty_memory_does_is_found_in_it() -> None:
    search = SecretSearch({"low": b"\0\0\0\0\0\0\0\1"})
    assert search.names_in([bytes(1 << 20)]) == set()
    assert search.names_in([bytes(1 << 20) + b"\1"]) == {"low"}


def test_no_secrets_are_nowhere() -> None:
    assert SecretSearch({}).names_in([bytes(100)]) == set()
