"""LUKS2 headers: made and opened by cryptsetup, on a plain file or a device, with no device-mapper.

Keys and passphrases travel by standard input and anonymous memory only. cryptsetup's own lock files are not used:
whoever calls holds the lock of the volume or image, and a process without root has no place for them.
"""

import os
from pathlib import Path

from plugin.errors import EbiError, Kind, exhausted, invalid
from plugin.host.run import CommandError, run, secret_fd
from plugin.luks.derivation import deriving, opening
from plugin.luks.metadata import Header, is_luks, read, read_fd
from plugin.luks.parameters import Pbkdf, SecretParameters

# Where the payload starts, as with cryptsetup's defaults: 16 MiB.
PAYLOAD_OFFSET = 16 << 20
# cryptsetup(8), "RETURN CODES".
_REFUSED, _WRONG_PASSPHRASE, _OUT_OF_MEMORY = 1, 2, 3
NO_QUESTIONS = ("--batch-mode", "--disable-locks")


def new_key(parameters: SecretParameters) -> bytes:
    """A fresh volume key for `parameters`."""
    return os.urandom(parameters.key_size // 8)


def create(
    path: Path,
    parameters: SecretParameters,
    volume_key: bytes,
    *,
    sector_size: int,
    owner: str,
    cost: Pbkdf | None = None,
    step: str = "",
    uuid: str = "",
) -> None:
    """Write a LUKS2 header for `volume_key` into the first 16 MiB of the file or device `path`.

    The payload behind it is not touched. `uuid` is the one it shall bear, "" for a random one. The key derivation
    costs `cost`, or what `parameters` say; no benchmark runs. `step` names its time in `plugin.events`, here and below.
    Raises INVALID when cryptsetup does not take the parameters, EXHAUSTED without memory to derive.
    """
    pbkdf = cost or parameters.pbkdf
    with deriving([pbkdf], step), secret_fd(volume_key) as fd:
        argv = ["cryptsetup", "luksFormat", *NO_QUESTIONS, "--type", "luks2", "--key-file", "-"]
        argv += ["--cipher", parameters.cipher, "--key-size", str(parameters.key_size), "--hash", parameters.hash]
        argv += [*pbkdf.arguments(), "--sector-size", str(sector_size), "--offset", str(PAYLOAD_OFFSET // 512)]
        argv += ["--volume-key-file", f"/proc/self/fd/{fd}"]
        argv += ["--uuid", uuid] if uuid else []
        try:
            run([*argv, "--", str(path)], stdin=parameters.passphrase, fds=(fd,))
        except CommandError as error:
            raise explained(error, owner, f"cannot make a LUKS2 header for {owner}") from error


def volume_key(path: Path, passphrase: bytes, owner: str) -> bytes:
    """The volume key of the LUKS2 file or device `path`; costs one key derivation.

    Raises INVALID when the passphrase does not open `owner`, EXHAUSTED without memory for the derivation.
    """
    argv = ["cryptsetup", "luksDump", *NO_QUESTIONS, "--dump-volume-key", "--key-file", "-", "--", str(path)]
    try:
        with opening(path):
            text = run(argv, stdin=passphrase).stdout.decode()
    except CommandError as error:
        raise explained(error, owner, f"cannot read the key of {owner}") from error
    _, found, digits = text.partition("MK dump:")
    key = bytes.fromhex("".join(digits.split()))
    if not found or not key:
        raise EbiError(f"cannot read the key of {owner}", hint="this cryptsetup prints volume keys in another form")
    return key


def test_passphrase(path: Path, passphrase: bytes, owner: str, *, slot: int | None = None, step: str = "") -> None:
    """Return if the passphrase opens the LUKS2 file or device `path` (by keyslot `slot`); raises as `volume_key`."""
    argv = ["cryptsetup", "open", *NO_QUESTIONS, "--type", "luks2", "--test-passphrase", "--key-file", "-"]
    argv += [] if slot is None else ["--key-slot", str(slot)]
    try:
        with opening(path, step):
            run([*argv, "--", str(path)], stdin=passphrase)
    except CommandError as error:
        raise explained(error, owner, f"cannot test the passphrase of {owner}") from error


def explained(error: CommandError, owner: str, what: str, refused: Kind = Kind.INVALID) -> EbiError:
    """What a failure of cryptsetup means for `owner`; `what` could not be done.

    `refused` is the kind of its exit status 1, which tells of the arguments, and where devices are made of the kernel.
    """
    if error.returncode == _WRONG_PASSPHRASE:
        return invalid(f"the passphrase does not open {owner}", "give the secret that it was encrypted with")
    if error.returncode == _OUT_OF_MEMORY:
        return exhausted(
            f"no memory to derive the key of {owner}", "raise the memory limit, or lower CRYPTO_PBKDF_MEMORY"
        )
    kind = refused if error.returncode == _REFUSED else Kind.INTERNAL
    return EbiError(f"{what}: {error.message}", kind=kind, hint=error.hint)


__all__ = [
    "NO_QUESTIONS",
    "PAYLOAD_OFFSET",
    "Header",
    "create",
    "explained",
    "is_luks",
    "new_key",
    "read",
    "read_fd",
    "test_passphrase",
    "volume_key",
]
