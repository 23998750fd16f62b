"""What the driver needs of a node: tools, kernel modules, and the permission to use what they offer."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from plugin.errors import EbiError
from plugin.findings import Finding
from plugin.host.run import OPTIONAL, environment, run

_TOOLS = ("cryptsetup", "dmsetup", "blkid", "mount", "mkfs.ext4", "e2fsck", "resize2fs")
_TARGETS = ("crypt", "snapshot", "zero", "linear")
# The device node, and the module that makes it.
_NODES = {Path("/dev/mapper/control"): "dm-mod", Path("/dev/loop-control"): "loop"}


def missing() -> list[str]:
    """The tools, modules and permissions that are not there, each with its kind; modules that can be loaded are."""
    absent = [f"the tool {name}" for name in _absent(_TOOLS)]
    unusable = [found for node, module in _NODES.items() if (found := _unusable(node, module))]
    if absent or unusable:
        return [*absent, *unusable]
    lacking = _lacking()
    for target in lacking:
        _load(f"dm-{target}")
    return [f"the module dm-{target}" for target in (_lacking() if lacking else [])]


def examine() -> Iterator[Finding]:
    """The tools that are not there and that only some filesystems need: a node is ready without them."""
    for name in _absent(OPTIONAL):
        hint = f"install the package that holds it (Debian: {OPTIONAL[name]}) if a volume is to have that filesystem"
        yield Finding("tool-missing", f"tool {name}", "it is not installed", hint, wrong=False)


def _absent(names: Iterable[str]) -> list[str]:
    path = environment()["PATH"]
    return [name for name in names if shutil.which(name, path=path) is None]


def _unusable(node: Path, module: str) -> str:
    if not node.exists():
        _load(module)
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:  # also what a container's device cgroup says
        return f"the permission to open {node}"
    except OSError:
        return f"the module {module} ({node})"
    return ""


def _lacking() -> list[str]:
    try:
        listed = run(["dmsetup", "targets"]).stdout.decode()
    except EbiError:
        return list(_TARGETS)
    present = {line.split()[0] for line in listed.splitlines() if line}
    return [target for target in _TARGETS if target not in present]


def _load(module: str) -> None:
    # In a container without modprobe the host loads them; then this fails, and the list says what is lacking.
    if shutil.which("modprobe", path=environment()["PATH"]):
        run(["modprobe", "--quiet", module], ok=range(256))
