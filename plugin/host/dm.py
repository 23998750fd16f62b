"""Device-mapper: changed through dmsetup(8), read from sysfs, and from its control node.

A mapper's truth is what the kernel says: its name, its UUID, the devices under it (`slaves`) and on it (`holders`).
Tables go in by standard input. Units: a table counts sectors of 512 bytes, everything else here bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plugin.errors import EbiError, precondition, unavailable
from plugin.host import blockdev, dmcontrol, udev
from plugin.host.run import CommandError, at_the_end, run

SECTOR = 512
_DEV = Path("/dev/mapper")
_NUMBERS = Path("/sys/dev/block")
# Marks the devices that we make ourselves; cryptsetup's have CRYPT-…
UUID_PREFIX = "EBI-"
# How long a node may take to appear or go. udevd is asked to answer before dmsetup returns, so this is for its lapses.
_PATIENCE = 30.0


@dataclass(frozen=True)
class Mapper:
    """A device-mapper device as sysfs tells it now; `number` is MAJOR:MINOR, `slaves` and `holders` kernel names."""

    name: str
    kernel_name: str
    number: str
    uuid: str
    suspended: bool
    size: int
    slaves: frozenset[str]
    holders: frozenset[str]

    @property
    def is_ours(self) -> bool:
        """Whether it can be one of ours, by its UUID: LVM names mappers as it likes."""
        return self.uuid.startswith((UUID_PREFIX, "CRYPT-LUKS2-"))

    @property
    def path(self) -> Path:
        """Its device node."""
        return path(self.name)


def path(name: str) -> Path:
    """The device node of the mapper `name`, there or not."""
    return _DEV / name


def find(name: str) -> Mapper | None:
    """The mapper `name`; None where the kernel has none."""
    try:
        number = dmcontrol.number(name)
    except PermissionError:  # who may not ask is told by the nodes
        node = path(name)
        number = blockdev.number(node) if node.exists() else None
    found = _read(_NUMBERS / number) if number else None
    return found if found is not None and found.name == name else None


def every(prefix: str = "") -> Iterator[Mapper]:
    """All mappers whose names start with `prefix`."""
    try:
        known = dmcontrol.names()
    except PermissionError:
        known = [node.name for node in _DEV.glob(f"{prefix}*") if node.is_block_device()]
    for name in sorted(known):
        mapper = find(name) if name.startswith(prefix) else None
        if mapper is not None:
            yield mapper


def _read(directory: Path) -> Mapper | None:
    directory = directory.resolve()
    try:
        return Mapper(
            name=(directory / "dm/name").read_text().strip(),
            kernel_name=directory.name,
            number=(directory / "dev").read_text().strip(),
            uuid=(directory / "dm/uuid").read_text().strip(),
            suspended=(directory / "dm/suspended").read_text().strip() == "1",
            size=int((directory / "size").read_text()) * SECTOR,
            slaves=frozenset(entry.name for entry in (directory / "slaves").iterdir()),
            holders=frozenset(entry.name for entry in (directory / "holders").iterdir()),
        )
    except OSError:  # it went while we read, or is no dm device
        return None


def create(name: str, table: str, *, readonly: bool = False) -> Mapper:
    """Make the mapper `name` with `table` and wait for its node. Raises `CommandError`."""
    arguments = ["dmsetup", "create", name, "--uuid", UUID_PREFIX + name]
    run([*arguments, "--readonly"] if readonly else arguments, stdin=table.encode())
    return appeared(name)


def appeared(name: str) -> Mapper:
    """The mapper `name`, made just now by whomever, once its node is there. Raises UNAVAILABLE if it never comes."""
    if not udev.watch().wait_until((_DEV / name).exists, _PATIENCE):
        raise unavailable(f"the device node {_DEV / name} did not appear", "is udevd alive? see udevadm monitor")
    mapper = find(name)
    if mapper is None:
        raise unavailable(f"the device {name} vanished while it was being made", "try again")
    return mapper


def load(name: str, table: str, *, readonly: bool = False) -> None:
    """Give `name` a second table, which its next resume brings into force."""
    arguments = ["dmsetup", "load", name]
    run([*arguments, "--readonly"] if readonly else arguments, stdin=table.encode())


def clear(name: str) -> None:
    """Drop the table of `name` that was loaded and never came into force, if there is one."""
    run(["dmsetup", "clear", name])


def suspend(name: str) -> None:
    """Hold back all I/O on `name` once what runs has ended. A filesystem on it is not frozen: it only waits."""
    run(["dmsetup", "suspend", "--nolockfs", name])


def resume(name: str) -> None:
    """Let I/O on `name` go on, with the table loaded last."""
    run(["dmsetup", "resume", name])


@contextmanager
def still(name: str) -> Iterator[None]:
    """Hold back all I/O on `name` within the block, what was written before on the disk, a filesystem on it frozen.

    It goes on afterwards, also where this process is killed. Raises `CommandError` when a filesystem can't be frozen
    (somebody else has it frozen), UNAVAILABLE when another process let the I/O go on before the block had ended.
    """
    with at_the_end(["dmsetup", "resume", name]) as end:
        run(["dmsetup", "suspend", name], fds=(end,))
        yield
        mapper = find(name)
        if mapper is None or not mapper.suspended:
            raise unavailable(f"the device {name} did not stand still", "try again")


def table(name: str) -> str:
    """The table in force."""
    return run(["dmsetup", "table", name]).stdout.decode()


def status(name: str) -> str:
    """What the targets of `name` tell of themselves."""
    return run(["dmsetup", "status", name]).stdout.decode()


def remove(name: str) -> None:
    """Remove the mapper `name` if there is one. Raises PRECONDITION when something uses it."""
    mapper = find(name)
    if mapper is None:
        return
    if mapper.holders:
        raise _used(name, f"the devices {', '.join(sorted(mapper.holders))}")
    watch = udev.watch()
    watch.expect_removal(name)
    try:
        _remove(name)
    except EbiError:
        watch.expect_removal(name, -1)
        raise
    if not watch.wait_until(lambda: find(name) is None, _PATIENCE):
        raise unavailable(f"the device {name} is still there after its removal", "see dmsetup info")


def _remove(name: str) -> None:
    try:
        run(["dmsetup", "remove", name])
        return
    except CommandError as error:
        if "busy" not in error.stderr.lower():
            raise
    # Nobody maps it, so who has it open is most likely udevd, looking at what we have just written; that passes.
    try:
        run(["dmsetup", "remove", "--retry", name])
    except CommandError as error:
        if "busy" in error.stderr.lower():
            raise _used(name, "a mount or a process") from error
        raise


def _used(name: str, by: str) -> EbiError:
    return precondition(f"the device {name} is in use by {by}", "end that use first; see dmsetup ls --tree and lsof")
