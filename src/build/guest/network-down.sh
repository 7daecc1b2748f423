# Puts back the resolver's file that was there before network-up.sh, unless a step made one of its own meanwhile.
saved=/var/lib/kiln-resolver
if [ -d "$saved" ] && [ -f /etc/resolv.conf ] && [ ! -L /etc/resolv.conf ] && [ "$(cat /etc/resolv.conf)" = "$(cat "$saved/ours")" ]; then
    rm -f /etc/resolv.conf
    if [ -e "$saved/link" ]; then
        ln -s "$(cat "$saved/link")" /etc/resolv.conf
    elif [ -e "$saved/file" ]; then
        cp -p "$saved/file" /etc/resolv.conf
    fi
fi
rm -rf "$saved"
# The guest's own network service, where it runs, may have asked for this address as well and kept it.
if [ -f /etc/resolv.conf ] && [ ! -L /etc/resolv.conf ] && grep -q "^nameserver $KILN_NAME_SERVER" /etc/resolv.conf; then
    rm -f /etc/resolv.conf
fi
