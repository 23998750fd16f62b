"""What the driver needs of a node: programs, and the kernel's device-mapper targets."""

import shutil

from plugin.errors import EbiError
from plugin.host.run import environment, run

_PROGRAMS = ("cryptsetup", "dmsetup", "blkid", "mount", "mkfs.ext4")
_TARGETS = ("crypt", "snapshot", "zero", "linear")


def missing() -> list[str]:
    """The names of programs and kernel parts that are not there; modules that can be loaded are."""
    path = environment()["PATH"]
    absent = [f"the program {name}" for name in _PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return absent
    lacking = _lacking()
    for target in lacking:
        _load(f"dm-{target}")
    return [f"the device-mapper target {target}" for target in (_lacking() if lacking else [])]


def _lacking() -> list[str]:
    try:
        listed = run(["dmsetup", "targets"]).stdout.decode()
    except EbiError:  # no device-mapper at all, or not for us
        return list(_TARGETS)
    present = {line.split()[0] for line in listed.splitlines() if line}
    return [target for target in _TARGETS if target not in present]


def _load(module: str) -> None:
    # In a container without modprobe the host loads them; then this fails, and the list says what is lacking.
    if shutil.which("modprobe", path=environment()["PATH"]):
        run(["modprobe", "--quiet", module], ok=range(256))
