# Grows the root filesystem to its partition, which kiln grew before the guest started.
need() { command -v "$1" >/dev/null || { echo "kiln: the guest has no \`$1\`, which grows its $kind" >&2; exit 1; }; }
while read -r device place kind _; do
    [ "$place" = / ] || continue
    root=$device root_kind=$kind
done </proc/mounts
kind=$root_kind
if [ "$root" = /dev/root ] || [ ! -b "$root" ]; then root=$(findmnt -n -o SOURCE /); fi
case $root in
    /dev/mapper/* | /dev/dm-*) echo "kiln: the root is on $root: kiln doesn't grow logical volumes" >&2; exit 1 ;;
esac
case $kind in
    ext2 | ext3 | ext4) need resize2fs; resize2fs "$root" ;;
    xfs) need xfs_growfs; xfs_growfs / ;;
    btrfs) need btrfs; btrfs filesystem resize max / ;;
    *) echo "kiln: doesn't know how to grow $kind" >&2; exit 1 ;;
esac
