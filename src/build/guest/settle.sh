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

# This script runs where steps do: out of there, so that who is left there was left behind.
steps=/run/kiln/cgroup/kiln.step own=/run/kiln/cgroup/kiln.own
left_behind() { # the first of them
    read -r pid <"$steps/cgroup.procs"
}
if [ -e "$own/cgroup.procs" ] && echo $$ >"$own/cgroup.procs"; then
    signal=TERM
    tries=0
    while left_behind && [ "$tries" -lt 100 ]; do
        [ "$tries" -lt 50 ] || signal=KILL
        while read -r pid; do kill -s "$signal" "$pid" 2>/dev/null || true; done <"$steps/cgroup.procs"
        tries=$((tries + 1))
        sleep 0.1
    done
else
    echo "kiln: this guest's kernel has no cgroups: what steps left behind can't be told from the rest, and goes on" >&2
fi

# A systemd that runs on replaced libraries would keep the old ones on the disk, unnamed.
while read -r _ _ _ _ _ file; do
    case $file in
        *'(deleted)')
            systemctl daemon-reexec || true
            break
            ;;
    esac
done </proc/1/maps
