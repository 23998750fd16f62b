"""What is wrong with the devices and mounts of a node: those that nothing stands on, or that stand on nothing.

Read from sysfs, device-mapper and mountinfo. What somebody works on now, whose lock is held, is passed over; so is what
belongs to another data directory. A repair takes the volume's lock and looks again before it touches anything.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from plugin.errors import EbiError
from plugin.findings import Finding
from plugin.host import dm, loop, mounts, udev
from plugin.host.dm import Mapper
from plugin.host.lock import is_locked
from plugin.host.loop import Backing
from plugin.host.mounts import Mount
from plugin.volumes import imagemap, names, usage
from plugin.volumes.node import Node
from plugin.volumes.paths import remove_target
from plugin.volumes.stack import take_down

_FIX = "ebi doctor --fix removes it"


def examine(node: Node) -> Iterator[Finding]:
    """Everything that is wrong, lowest cost of a repair first."""
    every = {mapper.kernel_name: mapper for mapper in dm.every()}
    ours = [mapper for mapper in every.values() if mapper.name.startswith(udev.PREFIX) and mapper.is_ours]
    kept = dict(_kept(node))
    mappers = [mapper for mapper in ours if not _is_foreign(node, mapper, every, kept)]
    volumes = {volume for mapper in mappers if (volume := names.volume_of(mapper.name))}
    for volume in sorted(filter(names.is_volume_id, volumes)):
        if not is_locked(node.records.directory(volume)):
            try:
                yield from _of_volume(node, volume)
            except OSError as error:  # it shall not keep the others from being looked at
                yield Finding(
                    "unreadable", f"volume {volume}", f"it can't be looked at: {error}", "see the kernel's log"
                )
    for mapper in mappers:
        if mapper.name.startswith(names.IMAGE) and not mapper.holders and imagemap.is_idle(mapper.name):
            yield Finding(
                "image-idle", f"device {mapper.name}", "no volume stands on it", _FIX, imagemap.release_idle, safe=True
            )
    yield from _stale_mounts()
    yield from _idle_loops(node, kept)


def _of_volume(node: Node, volume: str) -> Iterator[Finding]:
    present = {name: mapper for name in names.mappers(volume) if (mapper := dm.find(name))}
    top = present.get(names.top(volume))
    suspended = [name for name, mapper in present.items() if mapper.suspended]
    if suspended:
        yield Finding(
            "suspended",
            f"volume {volume}",
            f"{', '.join(suspended)} {'is' if len(suspended) == 1 else 'are'} suspended",
            "ebi doctor --fix resumes it",
            _alone(node, volume, partial(_resume, volume)),
            safe=True,
        )
    shown = usage.filesystems(volume) + usage.devices(volume)
    if top is None and present and not shown:
        yield _removable(node, volume, "idle", f"nothing stands on {', '.join(present)}", safe=True)
    elif top is not None:
        reason, certain = _why_useless(node, volume, top)
        held = top.holders - {found.kernel_name for found in present.values()}
        if not reason:
            if not held:
                yield from _unused(node, volume)
        elif certain and not shown and not held:
            yield _removable(node, volume, "broken", reason, safe=False)
        else:
            yield Finding("broken", f"volume {volume}", reason, "unpublish and unstage it, then stage it again")
    readonly = present.get(names.readonly(volume))
    if readonly is not None and top is not None and not usage.readonly_devices(volume):
        remove = _alone(node, volume, partial(dm.remove, readonly.name))
        yield Finding("idle", f"volume {volume}", f"{readonly.name} is published nowhere", _FIX, remove, safe=True)


def _why_useless(node: Node, volume: str, top: Mapper) -> tuple[str, bool]:
    """Why the stack under `top` is of no use, "" where it is; and whether its devices hold nothing any more."""
    if not top.slaves:
        return f"{top.name} stands on nothing", True
    try:
        if node.records.find(volume) is None and not node.has_device(volume):
            return "its devices are mapped, but there is no such volume", True
        stack = node.stack(volume)
    except EbiError:
        return "", False  # the volume's own findings have it
    for layer in stack.layers:
        mapper = dm.find(layer.name)
        if mapper is None or mapper.size == 0:
            return f"{layer.name} {'has never come into force' if mapper else 'is gone'}", True
        if not layer.fits(mapper):  # over a file that was deleted, perhaps: then this is all that is left of it
            return f"{layer.name} has the wrong device under it, or none", False
    return "", False


def _unused(node: Node, volume: str) -> Iterator[Finding]:
    shown = usage.filesystems(volume)
    if len(shown) > 1 or usage.devices(volume):
        return
    text, repair = "it is mapped, and neither mounted nor published", _alone(node, volume, partial(_remove, volume))
    if shown:
        staging = shown[0].target
        if _may_be_published(node, volume, staging):
            return
        text, repair = f"it is staged at {staging} and published nowhere", lambda: node.unstage(volume, staging)
    hint = "if no workload is about to use it: ebi doctor --fix --unstage"
    yield Finding("unused", f"volume {volume}", text, hint, repair, wrong=False)


def _may_be_published(node: Node, volume: str, target: Path) -> bool:
    """Whether an inline volume is in use at `target`: its staging may be gone, with the mounts of a container."""
    try:
        record = node.records.find(volume)
    except EbiError:  # then nobody knows
        return True
    return record is not None and record.ephemeral == str(target)


def _removable(node: Node, volume: str, kind: str, reason: str, *, safe: bool) -> Finding:
    repair = _alone(node, volume, partial(_remove, volume))
    return Finding(kind, f"volume {volume}", reason, _FIX, repair, safe=safe)


def _alone(node: Node, volume: str, action: Callable[[], None]) -> Callable[[], None]:
    def repair() -> None:
        with node.operation(volume):
            action()

    return repair


def _remove(volume: str) -> None:
    if not usage.filesystems(volume) and not usage.devices(volume):
        take_down(names.mappers(volume))


def _resume(volume: str) -> None:
    """Let I/O go on, from below upwards."""
    for name in reversed(names.mappers(volume)):
        if dm.find(name):
            dm.resume(name)


def _kept(node: Node) -> Iterator[tuple[tuple[int, int], Path]]:
    """Device and inode of every file of ours that a loop may be over, and its path."""
    for path in [*(record.path for record in node.records.every()), *imagemap.known(node.images.list())]:
        with suppress(FileNotFoundError):
            found = path.stat()
            yield (found.st_dev, found.st_ino), path.resolve()


def _is_foreign(node: Node, mapper: Mapper, every: Mapping[str, Mapper], kept: Container[tuple[int, int]]) -> bool:
    """Whether `mapper` stands on files, and none of them is kept in our data directory.

    A loop that was made in another mount namespace tells its path as that saw it: the file itself decides, and the
    path only about one that is gone.
    """
    files = list(_files(mapper, every))
    roots = node.roots
    return bool(files) and not any(
        (file.device, file.inode) in kept or any(Path(file.path).is_relative_to(root) for root in roots)
        for file in files
    )


def _files(mapper: Mapper, every: Mapping[str, Mapper]) -> Iterator[Backing]:
    for slave in mapper.slaves:
        if slave in every:
            yield from _files(every[slave], every)
        elif backing := loop.backing(slave):
            yield backing


def _stale_mounts() -> Iterator[Finding]:
    for mount in mounts.table():
        if usage.is_stale_device(mount):
            yield Finding(
                "stale-mount",
                f"mount {mount.target}",
                "the device that it shows is gone",
                _FIX,
                partial(_unmount, mount),
            )


def _unmount(mount: Mount) -> None:
    if usage.is_stale_device(mount) and mounts.at(mount.target) == mount:
        mounts.unmount(mount.target)
        remove_target(mount.target)


def _idle_loops(node: Node, kept: Mapping[tuple[int, int], Path]) -> Iterator[Finding]:
    # One that udevd looks at goes when it closes it.
    udev.watch().wait_until(lambda: not list(_loops(node, kept)), 1)
    for name, backing, file in _loops(node, kept):
        text = f"no mapper stands on it; its file is {file}"
        yield Finding("loop-idle", f"loop {name}", text, _FIX, partial(_detach, name, backing, file))


def _loops(node: Node, kept: Mapping[tuple[int, int], Path]) -> Iterator[tuple[str, Backing, Path]]:
    """The idle loops over files of ours: by the file itself as in `_is_foreign`, so with its path as we see it."""
    for name in loop.every():
        if loop.holders(name) or not (backing := loop.backing(name)):
            continue
        file = kept.get((backing.device, backing.inode), Path(backing.path))
        for root in filter(file.is_relative_to, node.roots):
            directory = root / file.relative_to(root).parts[0]
            if not is_locked(directory) and not imagemap.is_locked(file):
                yield name, backing, file


def _detach(name: str, backing: Backing, file: Path) -> None:
    if loop.backing(name) == backing and not loop.holders(name) and not imagemap.is_locked(file):
        loop.detach(name)
