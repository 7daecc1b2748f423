#!/bin/sh
# kiln's guest agent. The guest's sh reads it straight from a read-only raw drive, so nothing is installed.
#
# Three virtio-serial ports: kiln.ctl carries one-line commands in and one-line answers out, kiln.in carries tar
# streams in, kiln.out carries what steps print. Every command has a nonce that only kiln and this shell know; it is
# never in a step's environment, arguments or open files, so a step can't forge an answer.
#
#   in   run NONCE BYTES sh|exec FOLDER NAME...   BYTES of tar on kiln.in, all in FOLDER; runs FOLDER/.kiln/step there. NAME
#                                     is for the console's log: a step does not see it
#        own NONCE WORDS...           runs what the drive brought before this script, in a shell that is there already
#        put NONCE BYTES USER GROUP DIR/   BYTES of tar on kiln.in, unpacked into DIR (the rest of the line)
#        freeze NONCE once|whatever   unmounts every filesystem or makes it read-only; nothing is written after the answer.
#                                     What is in use is refused as busy, or the root is frozen as it is
#        sync NONCE                   writes out what the guest holds in memory for its disk; the answer ends in WORDS
#                                     that name what it has besides its disk and would not have after a boot
#        halt NONCE                   shuts the guest down
#        wake NONCE EPOCH SEED        the guest's memory was saved and is back: sets the clock, draws new random numbers
#   out  ready VERSION UPTIME savable|unsavable   whether it can draw new random numbers after a restore
#        done NONCE STATUS FREE_KIB [WORDS]   ended; STATUS of the step, space left on /
#        fail NONCE WHY               it could not even be tried
set -u
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
umask 022
exec </dev/null >/dev/console 2>&1

cgroups=/run/kiln/cgroup
group=$cgroups/kiln.step

find_port() {
    tries=0
    while [ "$tries" -lt 600 ]; do
        for entry in /sys/class/virtio-ports/*; do
            name=
            [ ! -r "$entry/name" ] || read -r name <"$entry/name"
            if [ "$name" = "$1" ] && [ -c "/dev/${entry##*/}" ]; then
                echo "/dev/${entry##*/}"
                return 0
            fi
        done
        [ "$tries" -gt 0 ] || modprobe virtio_console
        tries=$((tries + 1))
        sleep 0.1
    done
    echo "kiln: this guest has no port $1" >&2
    return 1
}

answer() { echo "$*" >&3; }

free_kib() { df -Pk "$1" | { read -r _ && read -r _ _ _ left _ && echo "$left"; }; } # FOLDER

receive() { head -c "$1" <&5; }

refuse() { # NONCE BYTES WHY...: the stream must be read all the same, or the next one starts in its middle
    refused=$1 bytes=$2
    shift 2
    receive "$bytes" >/dev/null
    answer fail "$refused" "$@"
}

finish() { # NONCE STATUS: the mark on kiln.out says that all output before it has arrived
    printf '\000kiln-end %s\n' "$1" >&4
    # Only who fails may have failed for want of space.
    left=0
    [ "$2" = 0 ] || left=$(free_kib /)
    answer "done" "$1" "$2" "$left"
}

# Few programs are started here: each takes 40 ms under software emulation, several times what it does.
run() { # NONCE BYTES sh|exec FOLDER: all of the archive is in FOLDER
    # A small step lives in memory, so that its secrets never touch the disk; a large one would not fit.
    place=/run/kiln
    [ "$2" -le 33554432 ] || place=/var/tmp
    work=$place/$4
    if ! receive "$2" | tar -x -p -f - -C "$place"; then
        left=$(free_kib "$place")
        rm -rf "$work"
        answer fail "$1" "the step's files could not be unpacked in the guest, where $((left / 1024)) MiB were free"
        return
    fi
    wait
    nonce=$1
    if [ "$3" = sh ]; then set -- sh -eu; else set --; fi
    (
        unset nonce KILN_AGENT
        # Out of the agent's unit: if the kernel kills the step for memory, systemd must not stop the agent with it.
        echo 0 >"$group/cgroup.procs"
        echo 0 >/proc/self/oom_score_adj
        cd "$work" || exit 126
        export HOME=/root USER=root LOGNAME=root SHELL=/bin/sh LANG=C.UTF-8 TERM=dumb DEBIAN_FRONTEND=noninteractive
        # shellcheck disable=SC1091 # kiln's
        . ./.kiln/env
        exec "$@" ./.kiln/step </dev/null >&4 2>&4 3>&- 4>&- 5<&-
    ) 2>/dev/null
    status=$?
    finish "$nonce" "$status"
    # The next step's files may come meanwhile: small ones have room beside it.
    rm -rf "$work" &
    [ "$place" = /run/kiln ] || wait
}

own() { # NONCE WORDS: kiln's own work, which needs no folder and keeps out of steps' way
    nonce=$1
    (
        unset nonce
        exec </dev/null >&4 2>&4 3>&- 4>&- 5<&-
        set -eu
        eval "$2"
    )
    finish "$nonce" "$?"
}

known() { # passwd|group NAME
    case $2 in *[!0-9]*) getent "$1" "$2" >/dev/null || grep -q "^$2:" "/etc/$1" ;; esac
}

put() { # NONCE BYTES USER GROUP DIR/
    known passwd "$3" || { refuse "$1" "$2" "the guest has no user \`$3\`"; return; }
    known group "$4" || { refuse "$1" "$2" "the guest has no group \`$4\`"; return; }
    mkdir -p "$5" 2>/dev/null || { refuse "$1" "$2" "\`$5\` can't be made a folder in the guest"; return; }
    keep=
    if tar --version 2>/dev/null | grep -q GNU; then keep='--no-overwrite-dir --keep-directory-symlink'; fi
    # shellcheck disable=SC2086 # two options or none
    receive "$2" | tar -x -p --same-owner $keep -f - -C "$5" >&4 2>&4
    status=$?
    if command -v selinuxenabled >/dev/null && selinuxenabled; then restorecon -R "$5"; fi
    finish "$1" "$status"
}

# What a boot of the disk alone would change, one thing a line, details after a tab. First what it would lose: units,
# processes that steps left behind, mounts, devices, routes, a host name of its own, firewall rules, and files that a boot
# removes or makes anew, with their sizes: a reload of systemd's units writes some again. What systemd itself has in /run
# may change at any time. Then what it would bring: another kernel, units that are enabled, settings. The kernel's own
# settings are left out: reading them takes half a second under software emulation, so kiln goes by the text of the step.
newline='
'
tab=$(printf '\t')
volatile() {
    for link in /run/systemd/units/invocation:*; do echo "${link##*/invocation:}"; done
    if [ -r "$group/cgroup.procs" ]; then
        while read -r pid; do
            name=
            [ ! -r "/proc/$pid/comm" ] || read -r name <"/proc/$pid/comm"
            echo "process $name$tab$pid"
        done <"$group/cgroup.procs"
    fi
    places='/tmp /run /run/lock /dev/shm /dev/mqueue /run/systemd/system'
    IFS=$newline
    # shellcheck disable=SC2013 # lines, by IFS: read takes a system call for each byte
    for line in $(cat /proc/mounts /proc/swaps /proc/partitions /proc/net/route 2>/dev/null); do
        case $line in
            *' 0 0')
                place=${line#* } place=${place%% *}
                echo "mount $place$tab$line"
                case $line:$place in tmpfs*:/run* | tmpfs*:/dev/* | tmpfs*:/tmp | tmpfs*\\*) ;; tmpfs*) places="$places $place" ;; esac
                ;;
            *) echo "a device or route$tab$line" ;;
        esac
    done
    unset IFS
    own='' now=''
    [ ! -r /etc/hostname ] || read -r own </etc/hostname
    read -r now </proc/sys/kernel/hostname
    [ "$now" = "$own" ] || echo "host name $now"
    for module in /sys/module/nf_tables /sys/module/iptable_*; do [ ! -d "$module" ] || echo "${module##*/} rules"; done
    set --
    for place in $places; do [ ! -d "$place" ] || set -- "$@" "$place"; done
    for place in /boot /lib/modules /etc/fstab /etc/crypttab /etc/modules /etc/sysctl.conf /etc/systemd/system /etc/init.d \
        /etc/runlevels /etc/rc?.d /etc/udev/rules.d /etc/sysctl.d /etc/modules-load.d /etc/tmpfiles.d \
        /usr/lib/sysctl.d /usr/lib/modules-load.d /usr/lib/tmpfiles.d; do [ ! -e "$place" ] || set -- "$@" "$place"; done
    find "$@" -xdev '(' -path /run/kiln -o -path /run/systemd -o -path /run/udev -o -path /run/log -o -path /run/credentials \
        -o -path '/boot/*/*' -o -path '/lib/modules/*/*' ')' -prune -o -type d -printf '%p/\n' \
        -o '(' -path '/boot/*' -o -path '/etc/*' -o -path '/lib/*' -o -path '/usr/*' ')' -printf '%p, which boots use\t%s %C@\n' \
        -o -printf '%p\t%s\n' 2>/dev/null || {
        # Nothing can be said of them: no two moments are alike.
        read -r up _ </proc/uptime
        echo "files that find can't list$tab$up"
    }
}

# Called before the first thing that may change it.
booted=
remember() { [ -n "$booted" ] || booted=$(volatile); }

lines_without() { # TEXT OTHER: the first lines of TEXT that OTHER lacks
    few=0
    for line in $1; do
        case $newline$2$newline in *"$newline$line$newline"*) continue ;; esac
        echo "$line"
        few=$((few + 1))
        [ "$few" -lt 8 ] || return 0
    done
}

# What a boot of the disk would not bring back: the first few things, on one line.
left_behind() {
    now=$(volatile)
    [ "$now" != "$booted" ] || return 0
    words=
    IFS=$newline
    set -f
    # shellcheck disable=SC2046 # lines, by IFS
    set -- $(lines_without "$now" "$booted")
    # shellcheck disable=SC2046 # lines, by IFS
    [ $# -gt 0 ] || set -- $(lines_without "$booted" "$now")
    while [ $# -gt 0 ] && [ "${#words}" -lt 120 ]; do
        name=${1%%"$tab"*}
        case "; $words; " in *"; $name; "*) ;; *) words="$words${words:+; }$name" ;; esac
        shift
    done
    set +f
    unset IFS
    echo "${words:-the order of things}"
}

# Two restores of one memory must not draw the same random numbers. Newer kernels see to it (vmgenid); others are told
# by an ioctl (RNDRESEEDCRNG, linux/random.h), for which sh needs help.
reseeds_itself() { [ -d /sys/bus/acpi/drivers/vmgenid ]; }
reseed() {
    perl -e 'open(POOL, "<", "/dev/urandom") && ioctl(POOL, 0x5207, 0) || exit 1' 2>/dev/null ||
        python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom"), 0x5207)' 2>/dev/null
}

wake() { # NONCE EPOCH SEED
    # The clock is waited for before anything else is done.
    date -s "@$2" >/dev/null &
    printf '%s' "$3" >/dev/urandom
    if reseeds_itself || reseed; then
        answer "done" "$1" 0 0
    else
        answer fail "$1" "the guest can't draw new random numbers"
    fi
}

let_go() { umount "$1" || mount -o remount,ro "$1"; } # PLACE

freeze() { # NONCE once|whatever [fresh]
    # This shell may run on a libc that a step replaced. The old one's file would stay on the disk without a name, and a
    # check of the filesystem would find it.
    if [ "${3-}" != fresh ] && [ -e /run/kiln/outdated ]; then exec /bin/sh "$0" freeze "$1" "$2"; fi
    { read -r _ && read -r _; } </proc/swaps && swapoff -a
    # The firmware's own meanwhile, which nothing else needs, because each program takes a while to start.
    mount -o remount,ro / 2>/run/kiln/remount &
    root=$! places='' firmware=''
    # What was mounted last goes first.
    while read -r device place _; do
        case $device:$place in
            /dev/*:/) ;;
            /dev/*:/boot/efi | /dev/*:/efi) firmware="$place $firmware" ;;
            /dev/*) places="$place $places" ;;
        esac
    done </proc/mounts
    for place in $firmware; do let_go "$place" || { answer fail "$1" "$place stays in use"; return; }; done
    if wait "$root"; then quiet=1; else quiet=; fi
    # Whoever ends more of what runs finds the rest as it was.
    if [ -z "$quiet" ] && [ "$2" = once ]; then answer fail "$1" busy && return; fi
    for place in $places; do
        # Blanks are escaped in /proc/mounts.
        case $place in *\\*) place=$(printf '%b' "$place") ;; esac
        sync && fstrim "$place" 2>/dev/null
        let_go "$place" && continue
        if [ "$2" = once ] && mount -o remount,rw /; then answer fail "$1" busy && return; fi
        answer fail "$1" "$place stays in use" && return
    done
    # Read-only is as clean as unmounted. A freeze always works, but leaves files without a name on the disk, and on some
    # filesystems a log to replay.
    if [ -n "$quiet" ]; then
        fstrim / || echo "kiln: fstrim / failed" >&2
    else
        cat /run/kiln/remount >&2
        sync && fstrim / || echo "kiln: fstrim / failed" >&2
        fsfreeze -f / || { answer fail "$1" "the root filesystem could not be frozen"; return; }
    fi
    # Builtins only from here: anything that reads a file could wait for the frozen filesystem for ever.
    echo "done $1 0 0" >&3
    read -r _ <&3
}

# Steps get the environment that kiln gives them, and nothing of what started the agent.
if [ -z "${KILN_AGENT-}" ]; then exec env -i PATH="$PATH" KILN_AGENT=1 /bin/sh "$0" "$@"; fi
if [ "${1:-}" = freeze ]; then
    freeze "$2" "$3" fresh
    exit 0
fi
ctl=$(find_port kiln.ctl) && out=$(find_port kiln.out) && in=$(find_port kiln.in) || exit 1
exec 3<>"$ctl" 4>"$out" 5<"$in"
echo -1000 >/proc/self/oom_score_adj
mkdir -p /run/kiln
mount -t tmpfs -o mode=0755,size=50% kiln /run/kiln
# Steps have a cgroup of their own, apart from the unit of the agent. Mounted here, because the distribution
# may have only version 1 at /sys/fs/cgroup (EL 8, Amazon Linux 2); kernels without version 2 have named hierarchies.
mkdir -p "$cgroups"
if mount -t cgroup2 kiln "$cgroups" || mount -t cgroup -o none,name=kiln kiln "$cgroups"; then mkdir -p "$group"; fi
# Booted by the disk's own boot loader: the rest of the boot, cloud-init included, must be over before steps begin.
if [ -n "${1:-}" ] && command -v cloud-init >/dev/null; then
    timeout 300 cloud-init status --wait >/dev/null
fi
# Package timers would take the package manager's lock away from steps. After direct boot none runs or is even loaded, and
# a condition keeps those back that a package starts; steps may enable them as always. In /run: gone with this boot. An
# instance is looked at as it is.
timers='apt-daily.timer apt-daily-upgrade.timer dnf-makecache.timer unattended-upgrades.service'
case ${1:-} in
    firmware)
        # As norandmaps does on the command line of a direct boot.
        echo 0 >/proc/sys/kernel/randomize_va_space
        # shellcheck disable=SC2086 # names without blanks
        systemctl mask --runtime --now --quiet $timers 2>/dev/null
        ;;
    '')
        places=''
        for unit in $timers; do places="$places /run/systemd/system/$unit.d"; done
        # shellcheck disable=SC2086 # names without blanks
        mkdir -p $places
        for place in $places; do printf '[Unit]\nConditionPathExists=!/run/kiln\n' >"$place/kiln.conf"; done
        # Of no use here, and stopped at the end of each build they would take a while: they have folders in /tmp mounted.
        systemctl stop --no-block --quiet systemd-resolved.service systemd-timesyncd.service 2>/dev/null
        ;;
esac
# What runs now is the system's own, and known when the guest is settled. Booted by its own boot loader, much may be.
if [ -z "${1:-}" ] && [ -d /run/systemd/units ]; then
    units=''
    for link in /run/systemd/units/invocation:*; do units="$units ${link##*/invocation:}"; done
    echo "$units" >/run/kiln/units
fi
read -r up _ </proc/uptime
savable=unsavable
if reseeds_itself || reseed; then savable=savable; fi
answer ready 1 "$up" "$savable"
while read -r command nonce rest <&3; do
    # What goes on meanwhile: a clock is set, a step's folder removed. A step's files need not wait for that.
    [ "$command" = run ] || wait
    # shellcheck disable=SC2086 # fields are split here on purpose; none has blanks but put's and own's last
    case $command in
        run)
            remember
            # Three fields, and a name of any characters.
            bytes=${rest%% *} rest=${rest#* }
            how=${rest%% *} rest=${rest#* }
            case $rest in *' '*) echo "kiln: ${rest#* }" ;; esac
            run "$nonce" "$bytes" "$how" "${rest%% *}"
            ;;
        own) own "$nonce" "$rest" ;;
        put)
            remember
            read -r bytes user group_name place <<END
$rest
END
            put "$nonce" "$bytes" "$user" "$group_name" "$place"
            ;;
        freeze) freeze "$nonce" "$rest" ;;
        sync)
            sync &
            remember
            left=$(left_behind)
            wait
            answer "done" "$nonce" 0 0 "$left"
            ;;
        wake) wake "$nonce" $rest ;;
        halt)
            finish "$nonce" 0
            systemctl --no-block poweroff || poweroff
            ;;
        *) answer fail "$nonce" "unknown command $command" ;;
    esac
done
exit 0
