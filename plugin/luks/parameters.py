"""What a Secret says about encryption: its CRYPTO_* keys, with Longhorn's names and defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from plugin.errors import EbiError, invalid

PREFIX = "CRYPTO_"
# cryptsetup-luksFormat(8): what it takes for the cost of a key derivation.
_MEMORY_KIB = (32, 4 << 20)
_PARALLEL = 4
_LEAST_ITERATIONS = {"argon2i": 4, "argon2id": 4, "pbkdf2": 1000}
# Fixed, and never benchmarked: see docs/decisions/001.
_ITERATIONS = {"argon2i": 4, "argon2id": 4, "pbkdf2": 2_000_000}
_MEMORY = 256 << 10
_KEY_SIZES = {"xts": (256, 512), "cbc": (128, 192, 256)}
# What cryptsetup's OpenSSL knows under these names and LUKS2 takes; the last two need its legacy provider.
_HASH_NAMES = """
    sha1 sha224 sha256 sha384 sha512 sha3-224 sha3-256 sha3-384 sha3-512 blake2b-512 blake2s-256 ripemd160 whirlpool
"""
_HASHES = frozenset(_HASH_NAMES.split())


@dataclass(frozen=True)
class Pbkdf:
    """A key derivation and its cost; `memory_kib` and `parallel` are 0 for pbkdf2, which knows neither."""

    type: str
    iterations: int
    memory_kib: int = 0
    parallel: int = 0

    def arguments(self) -> list[str]:
        """The options of cryptsetup that ask for exactly this cost, with no benchmark run."""
        options = ["--pbkdf", self.type, "--pbkdf-force-iterations", str(self.iterations)]
        if self.type != "pbkdf2":
            options += ["--pbkdf-memory", str(self.memory_kib), "--pbkdf-parallel", str(self.parallel)]
        return options


@dataclass(frozen=True)
class SecretParameters:
    """How to encrypt; `passphrase` is the secret's bytes as they are, `key_size` counts bits."""

    passphrase: bytes = field(repr=False)
    cipher: str = "aes-xts-plain64"
    key_size: int = 256
    hash: str = "sha256"
    pbkdf: Pbkdf = Pbkdf("argon2i", _ITERATIONS["argon2i"], _MEMORY, _PARALLEL)

    @classmethod
    def from_data(cls, data: Mapping[str, str | bytes], owner: str) -> "SecretParameters":
        """The parameters in a Secret's `data`, for `owner` ("encrypted volume pvc-1", "backing image parrot").

        Absent and empty keys take Longhorn's defaults. Raises INVALID naming the key and the owner, never a value
        that could be the passphrase.
        """
        passphrase = _bytes(data.get(f"{PREFIX}KEY_VALUE", b""))
        if not passphrase:
            raise invalid(f"missing passphrase for {owner}", f"put it into the Secret as {PREFIX}KEY_VALUE")
        texts = {key: _text(key, value, owner) for key, value in data.items() if key in _KNOWN}
        provider = texts.get(f"{PREFIX}KEY_PROVIDER", "")
        if provider not in ("", "secret"):
            raise invalid(f"unsupported key provider {provider} for {owner}", "the only provider is 'secret'")
        cipher = texts.get(f"{PREFIX}KEY_CIPHER") or cls.cipher
        key_size = _number(texts, f"{PREFIX}KEY_SIZE", owner) or cls.key_size
        _check_key_size(cipher, key_size, owner)
        return cls(passphrase, cipher, key_size, _hash(texts, owner), _pbkdf(texts, owner))


_KNOWN = frozenset(
    PREFIX + name
    for name in (
        "KEY_PROVIDER",
        "KEY_CIPHER",
        "KEY_HASH",
        "KEY_SIZE",
        "PBKDF",
        "PBKDF_FORCE_ITERATIONS",
        "PBKDF_MEMORY",
    )
)


def _hash(texts: Mapping[str, str], owner: str) -> str:
    found = texts.get(f"{PREFIX}KEY_HASH") or SecretParameters.hash
    if found not in _HASHES:
        raise invalid(f"unsupported {PREFIX}KEY_HASH {found} for {owner}", f"known are {', '.join(sorted(_HASHES))}")
    return found


def _pbkdf(texts: Mapping[str, str], owner: str) -> Pbkdf:
    kind = texts.get(f"{PREFIX}PBKDF") or "argon2i"
    if kind not in _ITERATIONS:
        raise invalid(f"unsupported {PREFIX}PBKDF {kind} for {owner}", f"known are {', '.join(sorted(_ITERATIONS))}")
    iterations = _number(texts, f"{PREFIX}PBKDF_FORCE_ITERATIONS", owner) or _ITERATIONS[kind]
    if not _LEAST_ITERATIONS[kind] <= iterations < 1 << 32:
        raise invalid(
            f"{PREFIX}PBKDF_FORCE_ITERATIONS {iterations} is out of range for {owner}",
            f"{kind} takes {_LEAST_ITERATIONS[kind]} or more",
        )
    memory = _number(texts, f"{PREFIX}PBKDF_MEMORY", owner) or _MEMORY
    if kind == "pbkdf2":
        return Pbkdf(kind, iterations)
    if not _MEMORY_KIB[0] <= memory <= _MEMORY_KIB[1]:
        raise invalid(
            f"{PREFIX}PBKDF_MEMORY {memory} is out of range for {owner}",
            f"it counts KiB, from {_MEMORY_KIB[0]} to {_MEMORY_KIB[1]}",
        )
    return Pbkdf(kind, iterations, memory, _PARALLEL)


def _check_key_size(cipher: str, key_size: int, owner: str) -> None:
    mode = cipher.split("-")[1] if cipher.count("-") >= 1 else ""
    sizes = _KEY_SIZES.get(mode) if cipher.startswith("aes-") else None
    if sizes and key_size not in sizes:
        raise invalid(
            f"{PREFIX}KEY_SIZE {key_size} does not fit {cipher} for {owner}",
            f"it counts bits: {' or '.join(str(size) for size in sizes)}",
        )
    if key_size % 8 or not 0 < key_size <= 4096:
        raise invalid(f"{PREFIX}KEY_SIZE {key_size} is no key size for {owner}", "it counts bits")


def _number(texts: Mapping[str, str], key: str, owner: str) -> int:
    text = texts.get(key, "")
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise _not_understood(key, owner, "it is a whole number")
    return int(text)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _text(key: str, value: str | bytes, owner: str) -> str:
    try:
        return _bytes(value).decode("ascii").strip()
    except UnicodeDecodeError:
        raise _not_understood(key, owner, "it is plain ASCII text") from None


def _not_understood(key: str, owner: str, hint: str) -> EbiError:
    return invalid(f"{key} is not understood for {owner}", hint)
