"""What a Secret's CRYPTO_* keys mean, and which of them are refused."""

import pytest

from plugin.errors import EbiError, Kind
from plugin.luks.parameters import Pbkdf, SecretParameters

OWNER = "encrypted volume pvc-1"


def parse(**data: str | bytes) -> SecretParameters:
    return SecretParameters.from_data({f"CRYPTO_{key}": value for key, value in data.items()}, OWNER)


def test_defaults_are_longhorns() -> None:
    found = parse(KEY_VALUE="secret")
    assert (found.cipher, found.hash, found.key_size, found.pbkdf.type) == ("aes-xts-plain64", "sha256", 256, "argon2i")


def test_the_seeds_secret_is_taken() -> None:
    found = parse(
        KEY_VALUE="Your encryption passphrase", KEY_PROVIDER="secret", KEY_CIPHER="aes-xts-plain64",
        KEY_HASH="sha256", KEY_SIZE="256", PBKDF="argon2i",
    )  # fmt: skip
    assert found == parse(KEY_VALUE="Your encryption passphrase")


def test_the_passphrase_is_the_secrets_bytes_as_they_are() -> None:
    assert parse(KEY_VALUE=b" \xff trailing newline\n").passphrase == b" \xff trailing newline\n"


def test_repr_hides_the_passphrase() -> None:
    assert "hidden" not in repr(parse(KEY_VALUE="hidden"))


def test_the_cost_can_be_set() -> None:
    found = parse(KEY_VALUE="x", PBKDF="argon2id", PBKDF_FORCE_ITERATIONS="5", PBKDF_MEMORY="65536")
    assert (found.pbkdf.type, found.pbkdf.iterations, found.pbkdf.memory_kib) == ("argon2id", 5, 65536)
    assert parse(KEY_VALUE="x", PBKDF="pbkdf2", PBKDF_FORCE_ITERATIONS="1000").pbkdf == Pbkdf("pbkdf2", 1000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, f"missing passphrase for {OWNER}"),
        ({"KEY_VALUE": b""}, f"missing passphrase for {OWNER}"),
        ({"KEY_VALUE": "s3cret", "KEY_PROVIDER": "vault"}, f"unsupported key provider vault for {OWNER}"),
        ({"KEY_VALUE": "s3cret", "KEY_SIZE": "many"}, f"CRYPTO_KEY_SIZE is not understood for {OWNER}"),
        ({"KEY_VALUE": "s3cret", "KEY_SIZE": "128"}, "CRYPTO_KEY_SIZE 128 does not fit aes-xts-plain64"),
        ({"KEY_VALUE": "s3cret", "PBKDF": "scrypt"}, "unsupported CRYPTO_PBKDF scrypt"),
        ({"KEY_VALUE": "s3cret", "PBKDF_FORCE_ITERATIONS": "3"}, "CRYPTO_PBKDF_FORCE_ITERATIONS 3 is out of range"),
        ({"KEY_VALUE": "s3cret", "PBKDF_MEMORY": "8"}, "CRYPTO_PBKDF_MEMORY 8 is out of range"),
        ({"KEY_VALUE": "s3cret", "KEY_HASH": "nonsense"}, f"unsupported CRYPTO_KEY_HASH nonsense for {OWNER}"),
        ({"KEY_VALUE": "s3cret", "KEY_HASH": "md5"}, "unsupported CRYPTO_KEY_HASH md5"),
        (
            {"KEY_VALUE": "s3cret", "KEY_CIPHER": "aes-cbc-essiv:sha256", "KEY_SIZE": "512"},
            "CRYPTO_KEY_SIZE 512 does not fit aes-cbc-essiv:sha256",
        ),
        ({"KEY_VALUE": "s3cret", "KEY_HASH": b"\xff"}, "CRYPTO_KEY_HASH is not understood"),
    ],
)
def test_what_is_refused_and_how(data: dict[str, str | bytes], message: str) -> None:
    with pytest.raises(EbiError) as caught:
        parse(**data)
    assert caught.value.kind is Kind.INVALID
    assert caught.value.message.startswith(message)
    assert "s3cret" not in str(caught.value)
