# Puts back the resolver's file that was there before network-up.sh, with what steps have added below the build's name
# server. A file that a step has made itself stays as it is.
saved=/etc/.kiln-resolv.conf
first='' more=''
if [ -f /etc/resolv.conf ] && [ ! -L /etc/resolv.conf ]; then
    { read -r first && read -r more; } </etc/resolv.conf || true
fi
if [ "$first" != "nameserver $KILN_NAME_SERVER" ]; then
    # Most often there is nothing to remove, and starting a program takes longer than to look.
    for file in "$saved" "$saved.none"; do
        if [ -e "$file" ] || [ -L "$file" ]; then rm -f "$file"; fi
    done
elif [ -e "$saved" ] || [ -L "$saved" ] || [ -e "$saved.none" ]; then
    added=
    [ -z "$more" ] || added=$(sed 1d /etc/resolv.conf)
    if [ -e "$saved.none" ]; then rm -f /etc/resolv.conf "$saved.none"; else mv "$saved" /etc/resolv.conf; fi
    # The guest's own network service, where it runs, may have asked for this address as well, and kept it.
    if [ -f /etc/resolv.conf ] && [ ! -L /etc/resolv.conf ] && read -r first </etc/resolv.conf &&
        [ "$first" = "nameserver $KILN_NAME_SERVER" ]; then rm -f /etc/resolv.conf; fi
    # Not through a link, which leads to a service's file in /run.
    if [ -n "$added" ] && [ ! -L /etc/resolv.conf ]; then echo "$added" >>/etc/resolv.conf; fi
fi
