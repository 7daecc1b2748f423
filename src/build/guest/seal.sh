# Removes what instances must not share, and what the build left. KILN_KEEP names what stays. What goes is gathered first
# and removed by few programs: under software emulation starting one costs more than what it does.
keeps() { case " $KILN_KEEP " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
folders='' # emptied
files=''   # removed; patterns are expanded at the end

# Logs are emptied rather than removed: daemons expect theirs with its owner and mode.
empty_logs() { # FOLDER
    for log in "$1"/* "$1"/.[!.]*; do
        if [ -L "$log" ]; then continue; fi
        case $log in
            *.gz | *.xz | *.zst | *.old | *.[0-9] | *-[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9])
                if [ -f "$log" ]; then rm -f "$log"; fi
                ;;
        esac
        if [ -d "$log" ]; then empty_logs "$log"; elif [ -f "$log" ] && [ -s "$log" ]; then : >"$log"; fi
    done
}
if ! keeps logs; then
    folders="$folders /var/log/journal /run/log/journal /var/log/installer"
    files="$files /var/log/cloud-init.log /var/log/cloud-init-output.log /var/run/utmp"
    empty_logs /var/log
fi
if ! keeps leases; then
    folders="$folders /var/lib/dhcp /var/lib/dhclient /var/lib/dhcpcd /var/lib/dhcpcd5 /run/systemd/netif/leases"
    files="$files /var/lib/NetworkManager/*.lease /var/lib/NetworkManager/secret_key /var/lib/NetworkManager/timestamps
        /var/lib/NetworkManager/seen-bssids /var/lib/systemd/network/*.lease /var/lib/wicked/*.xml
        /etc/udev/rules.d/70-persistent-net.rules /etc/udev/rules.d/75-persistent-net-generator.rules"
fi
if ! keeps package-cache; then
    folders="$folders /var/cache/dnf /var/cache/libdnf5 /var/cache/yum /var/cache/zypp /var/cache/PackageKit"
    files="$files /var/cache/apt/pkgcache.bin /var/cache/apt/srcpkgcache.bin /var/cache/debconf/*-old /var/lib/dpkg/*-old
        /var/cache/ldconfig/aux-cache /var/cache/apt/archives/*.deb /var/cache/apt/archives/lock /var/cache/apt/archives/partial/*
        /var/lib/apt/lists/*_* /var/lib/apt/lists/lock /var/lib/apt/lists/partial/*"
fi
if ! keeps tmp; then folders="$folders /tmp /var/tmp"; fi
keeps host-keys || files="$files /etc/ssh/ssh_host_*key /etc/ssh/ssh_host_*key.pub"
# Always: seeds and secrets that make instances predictable, an instance's state, backups of the accounts.
folders="$folders /var/lib/cloud /var/crash /var/lib/systemd/coredump /var/spool/abrt"
files="$files /var/lib/systemd/random-seed /var/lib/random-seed /var/lib/systemd/credential.secret
    /boot/loader/random-seed /boot/efi/loader/random-seed /efi/loader/random-seed
    /etc/passwd- /etc/shadow- /etc/group- /etc/gshadow- /etc/subuid- /etc/subgid-"

set --
for folder in $folders; do
    for entry in "$folder"/* "$folder"/.[!.]* "$folder"/..?*; do
        if [ -e "$entry" ] || [ -L "$entry" ]; then
            set -- "$@" "$folder"
            break
        fi
    done
done
# Both at once: the guest has more than one processor, and starting a program takes longer than what it does. Without any
# folder, find would begin here.
{ [ $# -eq 0 ] || find "$@" -xdev -mindepth 1 -delete 2>/dev/null; } &
# shellcheck disable=SC2086 # patterns
rm -rf $files
wait

if ! keeps shell-history; then
    # The accounts whose homes are in the image are in its own passwd; /home may have folders of none.
    gone() { # HOME: the histories of shells, Python, Node.js, and databases' clients
        for file in "$1"/.*_history "$1"/.local/share/fish/fish_history "$1"/.local/state/*_history "$1"/.histfile \
            "$1"/.lesshst "$1"/.local/state/lesshst "$1"/.viminfo "$1"/.wget-hsts; do
            if [ -f "$file" ]; then rm -f "$file"; fi
        done
    }
    for home in /home/*; do gone "$home"; done
    while IFS=: read -r _ _ _ _ _ home _; do
        # Large folders that are nobody's home take a while to look through.
        case $home in /bin | /sbin | /usr/bin | /usr/sbin | /dev | /proc | /run/*) ;; *) gone "$home" ;; esac
    done </etc/passwd
fi

# Last, because earlier parts may make it anew. Empty, not missing: Debian 12 does not boot without the file.
if ! keeps machine-id; then
    : >/etc/machine-id
    if [ -f /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]; then
        ln -sf /etc/machine-id /var/lib/dbus/machine-id
    fi
fi
