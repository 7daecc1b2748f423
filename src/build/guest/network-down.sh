# Puts back the resolver's file that was there before network-up.sh, unless a step made one of its own meanwhile.
saved=/etc/.kiln-resolv.conf
mine() { # whether the file names the build's name server, and nothing before it
    [ -f /etc/resolv.conf ] && [ ! -L /etc/resolv.conf ] && read -r word server </etc/resolv.conf &&
        [ "$word $server" = "nameserver $KILN_NAME_SERVER" ]
}
if { [ -e "$saved" ] || [ -L "$saved" ]; } && mine; then
    mv "$saved" /etc/resolv.conf
    # The guest's own network service, where it runs, may have asked for this address as well, and kept it.
    if mine; then rm -f /etc/resolv.conf; fi
elif [ -e "$saved.none" ] && mine; then
    rm -f /etc/resolv.conf "$saved.none"
elif [ -e "$saved" ] || [ -L "$saved" ] || [ -e "$saved.none" ]; then
    rm -f "$saved" "$saved.none"
fi
