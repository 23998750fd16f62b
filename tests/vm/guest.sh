#!/bin/bash
# In the virtual machine, as root: set the machine up, run SHARE/command, leave SHARE/output and SHARE/status.
set -eu
share=$1 results=$2

if [ "${3:-}" != inside ]; then
    exec >"$share/console" 2>&1
    modprobe --all overlay ext4 loop dm-mod dm-crypt dm-snapshot dm-zero xfs btrfs
    # For the tests of broken disks; not every kernel has them.
    modprobe --all --quiet dm-flakey dm-log-writes || true

    # A root of our own: the host's files through a cache, and a tmpfs for what is written over them.
    base=/run/ebi root=/run/ebi/root
    mkdir -p $base/host $base/scratch $root
    mount -t 9p -o ro,trans=virtio,version=9p2000.L,access=any,msize=524288,cache=loose ebihost $base/host
    mount -t tmpfs scratch $base/scratch
    mkdir $base/scratch/upper $base/scratch/work
    mount -t overlay -o lowerdir=$base/host,upperdir=$base/scratch/upper,workdir=$base/scratch/work root $root

    udevadm control --exit || true
    for directory in proc sys dev; do mount --rbind /$directory $root/$directory; done
    mount -t tmpfs -o mode=0755 run $root/run
    mkdir -p $root/usr/lib/modules $root/mnt/ebi
    mount --rbind /usr/lib/modules $root/usr/lib/modules
    for directory in "$share" "$results"; do mount --bind "$directory" "$root$directory"; done
    mount /dev/disk/by-id/virtio-ebi $root/mnt/ebi
    rmdir $root/mnt/ebi/lost+found

    cd $root
    exec unshare --mount --propagation private bash -euc \
        'pivot_root . . && umount --lazy . && cd / && exec "$@"' - "$(realpath "$0")" "$share" "$results" inside
fi

mountpoint --quiet /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
/usr/lib/systemd/systemd-udevd --daemon
udevadm trigger --subsystem-match=block --action=add
udevadm settle

set +e
bash "$share/command" >"$share/output" 2>&1 </dev/null
status=$?
dmesg >"$share/dmesg"
echo $status >"$share/status.partial"
mv "$share/status.partial" "$share/status"
