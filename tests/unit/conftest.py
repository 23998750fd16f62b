"""What the unit tests share. None of them needs root."""

import pytest

from plugin.luks.parameters import Pbkdf, SecretParameters

PASSPHRASE = b"correct horse battery staple\n"
# The least that cryptsetup takes: a key derivation in a few milliseconds.
CHEAP = {"CRYPTO_PBKDF": "pbkdf2", "CRYPTO_PBKDF_FORCE_ITERATIONS": "1000"}


@pytest.fixture
def parameters() -> SecretParameters:
    """Parameters with a key derivation that costs next to nothing."""
    return SecretParameters(PASSPHRASE, pbkdf=Pbkdf("pbkdf2", 1000))
