# Ends everything that could still write: services in order, as a shutdown would, then what steps left behind.
# kiln's agent goes on, in a unit of its own, and so do daemons of the boot that write nothing to the disk: ending them
# takes longer than all the rest. With KILN_AGAIN they end as well, or start again: the root filesystem was busy, for
# example because a step replaced a library, whose old file stays on the disk, unnamed, while whatever runs has it.
base='' quiet='' self=''
read -r self _ </proc/self/stat
# After direct boot the journal is in memory, unless it is to stay.
case " $KILN_KEEP " in *" logs "*) journalctl --flush 2>/dev/null || true ;; esac
if [ -n "$KILN_AGAIN" ]; then
    # The agent starts again by itself.
    : >/run/kiln/outdated
elif [ -r /run/kiln/units ]; then
    read -r base </run/kiln/units
    # None that has a private /tmp: what the seal removes there would stay on the disk, unnamed, while it is mounted.
    quiet='systemd-udevd.service dbus.service'
    # A package may have started it, only to wait for the network. Stopped, it comes back by its socket.
    quiet="$quiet systemd-networkd.service systemd-networkd-wait-online.service"
    # Its files are in /run until it is told that there is a disk.
    [ -e /run/systemd/journal/flushed ] || quiet="$quiet systemd-journald.service"
fi
among() { case " $2 " in *" $1 "*) return 0 ;; *) return 1 ;; esac; } # WORD WORDS

# The processes that have to end, and the services that they belong to.
others() {
    pids='' serves=''
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        case $pid in 1 | "$$" | "$self") continue ;; esac
        # Threads of the kernel have no command line.
        words='' unit=''
        read -r words <"$process/cmdline" || true
        [ -n "$words" ] || continue
        while IFS=: read -r _ _ group; do
            # udev's are in a group below its unit's.
            case $group in
                */system.slice/*.service) unit=${group##*/} ;;
                */system.slice/*.service/*) group=${group%.service/*} unit=${group##*/}.service ;;
            esac
        done <"$process/cgroup" || true
        if [ -n "$unit" ] && among "$unit" "$quiet"; then continue; fi
        case $unit in '' | kernel-command-line.service | kiln-agent.service) ;; *) among "$unit" "$serves" || serves="$serves $unit" ;; esac
        pids="$pids $pid"
    done 2>/dev/null
}

others
# systemd is asked only if there is a service or a timer that is not of the boot: asking takes a while. Services of steps
# that have long exited are stopped as well, as a shutdown would.
units=$serves
if [ -n "$base" ]; then
    for link in /run/systemd/units/invocation:*; do
        unit=${link##*/invocation:}
        case $unit in
            *.service | *.socket | *.timer | *.path) among "$unit" "$base $quiet $units" || units="$units $unit" ;;
        esac
    done
else
    # Only what runs: stopping what has long exited would cost time and change nothing.
    units=$(systemctl list-units --plain --no-legend --full --type=service,socket,timer,path \
        --state=active,activating,reloading 2>/dev/null | while read -r unit _ _ state _; do
            case $unit:$state in
                *:exited | *:dead | kernel-command-line.service:* | kiln-agent.service:*) continue ;;
                *) echo "$unit" ;;
            esac
        done)
fi
if [ -n "$units" ]; then
    # shellcheck disable=SC2086 # unit names have no blanks
    timeout 90 systemctl stop $units 2>/dev/null || true
    others
fi

# Whatever else still runs could write as well: what steps left behind, or a DHCP client whose service has long exited.
tries=0 signal=TERM
while [ "$tries" -lt 100 ] && [ -n "$pids" ]; do
    [ "$tries" -lt 50 ] || signal=KILL
    # shellcheck disable=SC2086 # numbers
    kill -s "$signal" $pids 2>/dev/null || true
    tries=$((tries + 1))
    sleep 0.1
    others
done

if [ -n "$KILN_AGAIN" ]; then systemctl daemon-reexec || true; fi
