"""LUKS2 devices in the kernel: opened, resized and closed.

Opened with `--disable-keyring`: the volume key is in the dm table, not in a keyring, so that a resize needs no
passphrase (and a process without the keyring can do it).
"""

from collections.abc import Sequence
from pathlib import Path

from plugin.errors import Kind
from plugin.host import dm
from plugin.host.run import CommandError, run, secret_fd
from plugin.luks.derivation import opening
from plugin.luks.header import explained

# Without cryptsetup's own lock files: who calls holds the lock of the volume or image.
_OPEN = ("cryptsetup", "open", "--type", "luks2", "--batch-mode", "--disable-locks", "--disable-keyring")


def open_with_passphrase(
    device: Path,
    name: str,
    passphrase: bytes,
    owner: str,
    *,
    readonly: bool = False,
    flags: Sequence[str] = (),
    step: str = "",
) -> None:
    """Open the LUKS2 `device` as the mapper `name`; costs one key derivation.

    `passphrase` is taken as it is, trailing newlines included. `flags` are further options of `cryptsetup open`.
    `step` names its time in `plugin.events`, without the wait for memory.
    Raises INVALID when the passphrase does not open `owner` ("backing image parrot"), EXHAUSTED when the key
    derivation found no memory.
    """
    argv = [*_OPEN, "--key-file", "-", *flags, *(["--readonly"] if readonly else [])]
    try:
        with opening(device, step):
            run([*argv, "--", str(device), name], stdin=passphrase)
    except CommandError as error:
        raise explained(error, owner, f"cannot open {owner}", Kind.INTERNAL) from error
    dm.appeared(name)


def open_with_key(device: Path, name: str, volume_key: bytes, owner: str, *, flags: Sequence[str] = ()) -> None:
    """Open the LUKS2 `device` as the mapper `name` by its volume key: no key derivation. Raises as the other does."""
    with secret_fd(volume_key) as fd:
        argv = [
            "cryptsetup",
            "open",
            "--type",
            "luks2",
            "--disable-keyring",
            "--volume-key-file",
            f"/proc/self/fd/{fd}",
        ]
        try:
            run([*argv, *flags, "--", str(device), name], fds=(fd,))
        except CommandError as error:
            raise explained(error, owner, f"cannot open {owner}", Kind.INTERNAL) from error
    dm.appeared(name)


def resize(name: str) -> None:
    """Have the open mapper `name` take all of the device under it."""
    run(["cryptsetup", "resize", "--disable-locks", "--disable-keyring", name])


def close(name: str) -> None:
    """Close the mapper `name` if it is open; the kernel wipes its key. Raises PRECONDITION when it is in use."""
    dm.remove(name)
