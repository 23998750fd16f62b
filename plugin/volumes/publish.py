"""A staged volume shown to a workload: its filesystem at a directory, or its raw device at a file."""

from pathlib import Path

from plugin import events
from plugin.errors import exists, precondition
from plugin.host import dm, mounts
from plugin.host.mounts import Mount
from plugin.volumes import group, layers, names, paths, usage
from plugin.volumes.capability import Capability
from plugin.volumes.node import Node


def publish(node: Node, volume: str, staging: Path, target: Path, capability: Capability, *, readonly: bool) -> None:
    """Show the staged volume at `target`: a directory, or a file for raw use; `readonly` for looking only."""
    target = paths.usable(target, "target path", node.settings)
    capability.check()
    with node.operation(volume):
        node.must_exist(volume)
        staged = None if capability.block else _staged(node, volume, staging)
        readonly = readonly or capability.reads_only or (staged is not None and "ro" in staged.options)
        source = _device(volume, readonly=readonly) if staged is None else staged.target
        found = mounts.at(target)
        if found is not None:
            _check_same(volume, found, capability, readonly=readonly)
            return
        others = usage.published(volume, staging)
        if others and capability.access.one_path:
            raise precondition(
                f"volume {volume} is published at {min(others)} already, and its access mode"
                f" {capability.access.value} allows one path",
                "unpublish it there, or use SINGLE_NODE_MULTI_WRITER",
            )
        if staged is not None and not readonly and not staged.readonly:
            group.give(source, capability.group)
        made = paths.make_target(target, block=capability.block)
        try:
            with events.step("mount"):
                mounts.bind(source, target, readonly=readonly)
        except BaseException:
            if made:
                paths.remove_target(target)
            raise


def _staged(node: Node, volume: str, staging: Path) -> Mount:
    _mapped(volume)
    staging = node.staging_path(volume, staging)
    found = mounts.at(staging)
    if found is None or not usage.is_filesystem(found, volume):
        raise precondition(f"volume {volume} is not staged at {staging}", "stage it there first")
    return found


def _device(volume: str, *, readonly: bool) -> Path:
    device = _mapped(volume)
    if usage.filesystems(volume):
        raise exists(f"volume {volume} is staged as a filesystem", "unstage it before using it raw")
    if readonly:
        layers.ensure(layers.readonly(volume))
        return dm.path(names.readonly(volume)).resolve()
    return device.path.resolve()


def _mapped(volume: str) -> dm.Mapper:
    device = dm.find(names.top(volume))
    if device is None:
        raise precondition(f"volume {volume} is not staged", "stage it first")
    return device


def _check_same(volume: str, found: Mount, capability: Capability, *, readonly: bool) -> None:
    """Raise EXISTS unless `found`, what the target shows, is what is asked for."""
    ours = usage.is_device(found, volume) if capability.block else usage.is_filesystem(found, volume)
    if not ours:
        raise exists(f"{found.target} has {found.source} mounted, not volume {volume}", "unpublish that first")
    if not capability.block and capability.fs_type not in ("", found.fs_type):
        raise exists(
            f"volume {volume} is published at {found.target} as {found.fs_type}, not {capability.fs_type}",
            f"ask for fsType {found.fs_type}, or for none to take what is there",
        )
    if readonly != usage.is_readonly(found, volume):
        raise exists(
            f"volume {volume} is published at {found.target} {'for writing' if readonly else 'read-only'}",
            "unpublish it first",
        )


def unpublish(node: Node, volume: str, target: Path) -> None:
    """Take the volume away from `target`, and `target` with it; what is not there is fine."""
    target = paths.checked(target, "target path")
    with node.operation(volume):
        found = mounts.at(target)
        if found is not None:
            ours = usage.is_filesystem(found, volume) or usage.is_device(found, volume)
            if not ours and not usage.is_stale_device(found):
                raise exists(f"{target} has {found.source} mounted, not volume {volume}", "it is left alone")
            with events.step("unmount"):
                mounts.unmount(target)
        if not usage.readonly_devices(volume):
            dm.remove(names.readonly(volume))
        paths.remove_target(target)
