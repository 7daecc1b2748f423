# Gives the build guest the network, whatever the distribution uses for it. What is written to the disk for that is
# the resolver's file alone, and network-down.sh puts the old one back.
card=
for entry in /sys/class/net/*; do
    address=
    [ ! -r "$entry/address" ] || read -r address <"$entry/address" || true
    if [ "$address" = "$KILN_MAC" ]; then card=${entry##*/}; fi
done
[ -n "$card" ] || { echo "kiln: the guest's kernel has no driver for virtio-net" >&2; exit 1; }
command -v ip >/dev/null || { echo "kiln: the guest has no \`ip\` (iproute2)" >&2; exit 1; }
ip -batch - <<END
link set $card up
address replace $KILN_ADDRESS dev $card
route replace default via $KILN_GATEWAY dev $card
END

# On the disk, because a build may go on from the disk alone after this boot. What was there is renamed, and once it has
# been, the file is left alone: after a boot it is kiln's still, or a step has made one of its own.
saved=/etc/.kiln-resolv.conf
if [ ! -e "$saved" ] && [ ! -L "$saved" ] && [ ! -e "$saved.none" ]; then
    if [ -e /etc/resolv.conf ] || [ -L /etc/resolv.conf ]; then
        mv /etc/resolv.conf "$saved"
    else
        : >"$saved.none"
    fi
    # shellcheck disable=SC2153
    echo "nameserver $KILN_NAME_SERVER" >/etc/resolv.conf
fi
