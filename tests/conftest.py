"""For every test: a Ctrl-C that commands hear, keys that were made before, and what a test wants shown at the end,
whichever worker it ran in."""

from __future__ import annotations

import functools
import itertools
import signal
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key

from shared.esm_crypto import WRAPPING_KEY_BITS

SHOWN = "shown"
"""The name of a property, recorded by `record_property`, whose value is such a text."""


_N_KEYS = 8
_MAKERS_OF_KEYS = ("services.ultravisor.identity", "services.testing.image", "deploy.boot_parts")


@pytest.fixture(scope="session", autouse=True)
def few_rsa_keys() -> Iterator[None]:
    """To make an RSA key takes up to a tenth of a second, and most tests want some: they take turns with a few."""
    kept = functools.cache(lambda _number: generate_private_key(65537, WRAPPING_KEY_BITS))
    numbers = itertools.count()

    def next_key(**_: int) -> RSAPrivateKey:
        key: RSAPrivateKey = kept(next(numbers) % _N_KEYS)
        return key

    with pytest.MonkeyPatch.context() as patch:
        for place in _MAKERS_OF_KEYS:
            patch.setattr(f"{place}.generate_private_key", next_key)
        yield


def pytest_configure() -> None:
    """Commands that tests start are told to end by SIGINT, which a shell has its jobs in the background ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the texts."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, text in report.user_properties:
                if name == SHOWN:
                    terminalreporter.section(report.nodeid)
                    terminalreporter.write_line(str(text))
