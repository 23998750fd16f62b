"""The sector size of a payload: 4096 bytes, except where the content is laid out in smaller blocks.

dm-crypt hands its sector size up as the logical block size of the device, and a filesystem or partition table made
for smaller blocks can't be used on larger ones.
"""

HEAD = 64 << 10  # how much of the content's start `sector_size` wants to see
_LARGE, _SMALL = 4096, 512


def sector_size(head: bytes, size: int) -> int:
    """512 or 4096 for a content of `size` bytes that starts with `head`.

    Offsets: UEFI (GPT, MBR), XFS's xfs_dsb, ext4's "Super Block", ECMA-119, lvm2's label header.
    """
    small = (
        size % _LARGE != 0
        or head[510:512] == b"\x55\xaa"  # MBR, FAT, NTFS
        or head[512:520] in (b"EFI PART", b"LABELONE")
        or (head[:4] == b"XFSB" and int.from_bytes(head[102:104], "big") < _LARGE)
        or (head[1080:1082] == b"\x53\xef" and 1024 << int.from_bytes(head[1048:1052], "little") % 32 < _LARGE)
        or head[32769:32774] == b"CD001"  # an ISO 9660 block has 2048 bytes
    )
    return _SMALL if small else _LARGE
