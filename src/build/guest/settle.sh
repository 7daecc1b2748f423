# Ends everything that could still write: services in order, as a shutdown would, then what steps left behind.
# kiln's agent goes on, in a unit of its own.
# Only what runs: stopping what has long exited would cost time and change nothing.
list() { systemctl list-units --plain --no-legend --full "$@" 2>/dev/null; }
units=$({ list --type=service --state=running,activating,reloading; list --type=socket,timer,path --state=active; } |
    while read -r unit _; do
        case $unit in
            kernel-command-line.service | kiln-agent.service | init.scope) ;;
            *) echo "$unit" ;;
        esac
    done)
# shellcheck disable=SC2086 # unit names have no blanks
[ -z "$units" ] || timeout 90 systemctl stop $units 2>/dev/null || true

# This script runs where steps do: out of there, so that who is left there was left behind.
steps=/run/kiln/cgroup/kiln.step own=/run/kiln/cgroup/kiln.own
if [ -e "$steps/cgroup.procs" ] && mkdir -p "$own" && echo $$ >"$own/cgroup.procs"; then
    signal=TERM
    tries=0
    while left=$(cat "$steps/cgroup.procs") && [ -n "$left" ] && [ "$tries" -lt 100 ]; do
        [ "$tries" -lt 50 ] || signal=KILL
        for pid in $left; do kill -s "$signal" "$pid" 2>/dev/null || true; done
        tries=$((tries + 1))
        sleep 0.1
    done
else
    echo "kiln: this guest's kernel has no cgroups: what steps left behind can't be told from the rest, and goes on" >&2
fi

# A systemd that runs on replaced libraries would keep the old ones on the disk, unnamed.
if grep -q '(deleted)' /proc/1/maps 2>/dev/null; then systemctl daemon-reexec || true; fi
