# Removes what instances must not share, and what the build left. KILN_KEEP names what stays.
keeps() { case " $KILN_KEEP " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
empty() { [ ! -d "$1" ] || find "$1" -xdev -mindepth 1 -delete 2>/dev/null || true; }

if ! keeps logs; then
    empty /var/log/journal
    rm -rf /var/log/installer /var/log/cloud-init.log /var/log/cloud-init-output.log /run/log/journal
    find /var/log -xdev -type f \( -name '*.gz' -o -name '*.xz' -o -name '*.zst' -o -name '*.old' -o -name '*.[0-9]' \
        -o -name '*-[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]' \) -delete
    # Emptied rather than removed: daemons expect theirs with its owner and mode.
    find /var/log -xdev -type f -size +0 -exec sh -c 'for log; do : >"$log"; done' sh {} +
    rm -f /var/run/utmp
fi

keeps host-keys || rm -f /etc/ssh/ssh_host_*key /etc/ssh/ssh_host_*key.pub

if ! keeps shell-history; then
    # The accounts whose homes are in the image are in its own passwd; /home may have folders of none.
    { printf '%s\n' /home/* && cut -d: -f6 /etc/passwd; } | sort -u | while IFS= read -r home; do
        [ -d "$home" ] || continue
        # Of shells, Python, Node.js, and databases' clients
        rm -f "$home"/.*_history "$home"/.local/share/fish/fish_history "$home"/.local/state/*_history \
            "$home"/.histfile "$home"/.lesshst "$home"/.local/state/lesshst "$home"/.viminfo "$home"/.wget-hsts
    done
fi

if ! keeps leases; then
    for folder in /var/lib/dhcp /var/lib/dhclient /var/lib/dhcpcd /var/lib/dhcpcd5 /run/systemd/netif/leases; do empty "$folder"; done
    rm -f /var/lib/NetworkManager/*.lease /var/lib/NetworkManager/secret_key /var/lib/NetworkManager/timestamps \
        /var/lib/NetworkManager/seen-bssids /var/lib/systemd/network/*.lease /var/lib/wicked/*.xml
    rm -f /etc/udev/rules.d/70-persistent-net.rules /etc/udev/rules.d/75-persistent-net-generator.rules
fi

if ! keeps package-cache; then
    rm -f /var/cache/apt/pkgcache.bin /var/cache/apt/srcpkgcache.bin
    for folder in /var/cache/apt/archives /var/lib/apt/lists; do
        [ ! -d "$folder" ] || find "$folder" -xdev -type f -delete
    done
    for folder in /var/cache/dnf /var/cache/libdnf5 /var/cache/yum /var/cache/zypp /var/cache/PackageKit; do empty "$folder"; done
    rm -f /var/cache/debconf/*-old /var/lib/dpkg/*-old /var/cache/ldconfig/aux-cache
fi

# Always: seeds and secrets that make instances predictable, an instance's state, backups of the accounts.
rm -f /var/lib/systemd/random-seed /var/lib/random-seed /var/lib/systemd/credential.secret \
    /boot/loader/random-seed /boot/efi/loader/random-seed /efi/loader/random-seed
empty /var/lib/cloud
rm -f /etc/passwd- /etc/shadow- /etc/group- /etc/gshadow- /etc/subuid- /etc/subgid-
for folder in /var/crash /var/lib/systemd/coredump /var/spool/abrt; do empty "$folder"; done

if ! keeps tmp; then
    empty /tmp
    empty /var/tmp
fi

# Last, because earlier parts may make it anew. Empty, not missing: Debian 12 does not boot without the file.
if ! keeps machine-id; then
    : >/etc/machine-id
    if [ -f /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]; then
        ln -sf /etc/machine-id /var/lib/dbus/machine-id
    fi
fi
