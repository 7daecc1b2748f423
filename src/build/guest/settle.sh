# Ends everything that could still write: services in order, as a shutdown would, then what steps left behind.
# kiln's agent goes on, in a unit of its own.
# Only what runs: stopping what has long exited would cost time and change nothing.
units=$(systemctl list-units --plain --no-legend --full --type=service,socket,timer,path \
    --state=active,activating,reloading 2>/dev/null | while read -r unit _ _ state _; do
        case $unit:$state in
            *:exited | *:dead | kernel-command-line.service:* | kiln-agent.service:*) ;;
            *) echo "$unit" ;;
        esac
    done)
# shellcheck disable=SC2086 # unit names have no blanks
[ -z "$units" ] || timeout 90 systemctl stop $units 2>/dev/null || true

# Whatever else still runs could write as well: what steps left behind, or a DHCP client whose service has long exited.
others() { # SIGNAL: sends it to them; whether there were any
    found=1
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        case $pid in 1 | "$$" | "$PPID") continue ;; esac
        # Threads of the kernel have no command line.
        words=''
        read -r words <"$process/cmdline" || true
        if [ -n "$words" ] && kill -s "$1" "$pid"; then found=0; fi
    done 2>/dev/null
    return "$found"
}
tries=0 signal=TERM
while [ "$tries" -lt 100 ] && others "$signal"; do
    [ "$tries" -lt 50 ] || signal=KILL
    tries=$((tries + 1))
    sleep 0.1
done

# A systemd that runs on replaced libraries would keep the old ones on the disk, unnamed.
while read -r _ _ _ _ _ file; do
    case $file in
        *'(deleted)')
            systemctl daemon-reexec || true
            break
            ;;
    esac
done </proc/1/maps
