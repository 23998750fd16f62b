"""Options of mkfs as a StorageClass or a pod may give them. It runs as root: nothing may name a file or another device.

Not by a path alone: `mkfs.ext4 -d .` copies the directory that the server runs in, `-z x` writes a file there, and
`-J device=LABEL=x` takes any disk of the node for its journal. So only options that are known to be harmless pass.
Sources: mke2fs(8), mkfs.xfs(8), mkfs.btrfs(8).
"""

import re
import shlex
from collections.abc import Iterator

# Options of one letter that take a value, in one of the three programs at least, and those that take none.
_VALUED = "bCdeEgGiIJlLmnNOsTU"
_PLAIN = tuple("DfFjKMq")
_LONG_NAMES = """
    --csum --checksum --data --features --label --metadata --mixed --nodesize --runtime-features --sectorsize --uuid
"""
_LONG = frozenset(_LONG_NAMES.split())
# What a value may be where another program takes a file or device for it: numbers by name, or a profile of btrfs.
_SETTINGS = re.compile(r"[a-z][a-z_-]*(=[0-9.]+[a-z]?)?(,[a-z][a-z_-]*(=[0-9.]+[a-z]?)?)*")
_PROFILES = re.compile(r"single|dup|raid[0-9]+(c[34])?")
_NAMING = ("name", "file", "logdev", "rtdev", "device", "options", "rootdir")


def options(text: str) -> tuple[str, ...]:
    """The options in `text`, split as a shell would. Raises ValueError saying which is not to be had, and why."""
    try:
        tokens = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"it can't be split: {error}") from None
    for option, value in _pairs(tokens):
        _check(option, value)
    return tuple(tokens)


def _pairs(tokens: list[str]) -> Iterator[tuple[str, str]]:
    """Each option with its value, "" for none."""
    rest = iter(tokens)
    for token in rest:
        name, equals, value = token.partition("=") if token.startswith("--") else (token, "", "")
        if not name.startswith("-"):
            raise ValueError(f"{token!r} is no option")
        if not name.startswith("--") and len(name) > 2:  # several in one, or a value in the same word
            raise ValueError(f"{token!r} is to be written as words of their own")
        if equals or name == "--mixed" or name[1:] in _PLAIN:
            yield name, value
        else:
            try:
                yield name, next(rest)
            except StopIteration:
                raise ValueError(f"{name} has no value") from None


def _check(option: str, value: str) -> None:
    known = option in _LONG or (len(option) == 2 and (option[1] in _VALUED or option[1] in _PLAIN))
    if not known:
        raise ValueError(f"{option} is not allowed")
    if "/" in value or value.startswith("-"):
        raise ValueError(f"the value of {option} is not allowed")
    if option in ("-d", "-l", "-J", "--data") and not _is_harmless(value):
        raise ValueError(f"the value of {option} is not allowed")
    if any(part.partition("=")[0].strip() in _NAMING for part in value.split(",")):
        raise ValueError(f"the value of {option} is not allowed")


def _is_harmless(value: str) -> bool:
    return bool(_PROFILES.fullmatch(value) or ("=" in value and _SETTINGS.fullmatch(value)))
