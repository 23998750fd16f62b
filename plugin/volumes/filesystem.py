"""The filesystem on a volume: made once, checked, mounted, grown."""

from collections.abc import Sequence
from pathlib import Path

from plugin import events
from plugin.errors import EbiError, Kind, precondition
from plugin.host import blockdev, mounts
from plugin.host.blockdev import Signature
from plugin.host.run import run

# A filesystem that is short of its device by less than this has reached it: it grows by whole groups of blocks.
_SLACK = 1 << 20
_RAW = "use it as a raw block device (volumeMode: Block, or ebi volume attach --block)"
# None discards: what is new is blank, and a discarded file has lost the blocks that were reserved for it.
_MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K"),
    "btrfs": ("mkfs.btrfs", "-q", "-f", "-K"),
}
# e2fsck(8): 1 errors corrected, 2 corrected and a reboot advised, which an unmounted filesystem does not need.
_FSCK_FINE = (0, 1, 2)


def make(device: Path, fs_type: str, options: Sequence[str]) -> None:
    """Make a filesystem on `device`, whatever is there, and have it on the disk."""
    with events.step("mkfs"):
        run([*_MKFS[fs_type], *options, str(device)])
        blockdev.flush(device)


def with_uuid(fs_type: str, uuid: str) -> list[str]:
    """The options of mkfs that give the filesystem this UUID."""
    return ["-m", f"uuid={uuid}"] if fs_type == "xfs" else ["-U", uuid]


def find(device: Path, wanted: str, owner: str) -> Signature:
    """The filesystem on `device`, of the type `wanted` ("" for any). Raises PRECONDITION for anything else."""
    found = blockdev.probe(device)
    if found is None:
        raise precondition(f"{owner} holds no filesystem", _RAW)
    if found.usage == "partitions":
        raise precondition(f"{owner} holds a partition table ({found.type}), and only one filesystem is mounted", _RAW)
    if not found.is_filesystem:
        raise precondition(f"{owner} holds no filesystem but {found.type} ({found.usage})", _RAW)
    if wanted and found.type != wanted:
        raise precondition(
            f"{owner} holds {found.type}, not {wanted}",
            f"ask for fsType {found.type}, or for none to take what is there",
        )
    return found


def check(device: Path, fs_type: str, owner: str) -> None:
    """Repair what can safely be repaired without asking. Raises PRECONDITION when a person has to look.

    XFS and btrfs recover when they are mounted.
    """
    if not fs_type.startswith("ext"):
        return
    with events.step("fsck"):
        done = run(["e2fsck", "-p", str(device)], ok=range(256))
    if done.returncode not in _FSCK_FINE:
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        raise precondition(f"the filesystem of {owner} is damaged: {said}", f"run e2fsck on {device} by hand")


def mount(device: Path, target: Path, fs_type: str, options: Sequence[str], owner: str) -> None:
    """Mount `device` at the directory `target`."""
    if fs_type == "xfs":
        # Volumes from one image carry its UUID, and XFS mounts each UUID only once.
        options = [*options, "nouuid"]
    if fs_type.startswith("ext") and blockdev.ext_panics(device):
        # Its maker would have an error take down the node. Options that were asked for can't ask for that.
        options = ["errors=remount-ro", *options]
    with events.step("mount"):
        try:
            mounts.mount(device, target, fs_type, options)
        except EbiError as error:
            raise EbiError(
                f"cannot mount {owner} at {target}: {error.message}", kind=Kind.INTERNAL, hint=error.hint
            ) from error


def is_short(device: Path) -> bool:
    """Whether the filesystem on `device`, not mounted, leaves some of it unused."""
    size = blockdev.filesystem_size(device)
    return size is not None and blockdev.size(device) - size >= _SLACK


def grow(device: Path, fs_type: str, mounted: Path) -> None:
    """Have the filesystem, mounted for writing at `mounted`, take all of its device. Nothing to do is fine."""
    if fs_type == "xfs":
        run(["xfs_growfs", "-d", str(mounted)])
    elif fs_type == "btrfs":
        run(["btrfs", "filesystem", "resize", "max", str(mounted)])
    else:
        run(["resize2fs", str(device)])
