"""What takes long to make and is the same for all unit tests."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key


@pytest.fixture(scope="session")
def key() -> RSAPrivateKey:
    """The key of a machine."""
    return generate_private_key(65537, 2048)
