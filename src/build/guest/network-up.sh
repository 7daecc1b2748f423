# Gives the build guest the network, whatever the distribution uses for it. What is written to the disk for that is
# the resolver's file alone, and network-down.sh puts the old one back.
card=
for entry in /sys/class/net/*; do
    if [ "$(cat "$entry/address" 2>/dev/null)" = "$KILN_MAC" ]; then card=${entry##*/}; fi
done
[ -n "$card" ] || { echo "kiln: the guest's kernel has no driver for virtio-net" >&2; exit 1; }
command -v ip >/dev/null || { echo "kiln: the guest has no \`ip\` (iproute2)" >&2; exit 1; }
ip link set "$card" up
ip address replace "$KILN_ADDRESS" dev "$card"
ip route replace default via "$KILN_GATEWAY" dev "$card"

# On the disk, because a build may go on from the disk alone after this boot.
saved=/var/lib/kiln-resolver
if [ ! -d "$saved" ]; then
    mkdir -p "$saved"
    if [ -L /etc/resolv.conf ]; then
        readlink /etc/resolv.conf >"$saved/link"
    elif [ -e /etc/resolv.conf ]; then
        cp -p /etc/resolv.conf "$saved/file"
    fi
fi
rm -f /etc/resolv.conf
# shellcheck disable=SC2153
echo "nameserver $KILN_NAME_SERVER" >/etc/resolv.conf
