# Every package with its version, one a line. What was listed before is right as long as no database is newer: listing
# takes long under software emulation.
packages() {
    if command -v dpkg-query >/dev/null; then
        dpkg-query -W -f '${Package} ${Version} ${Architecture}\n'
    elif command -v rpm >/dev/null; then
        rpm -qa --qf '%{NAME} %{EPOCHNUM}:%{VERSION}-%{RELEASE} %{ARCH}\n' | sort
    elif command -v apk >/dev/null; then
        apk list --installed 2>/dev/null
    fi
}
list=/run/kiln/packages fresh=1
[ -f "$list" ] || fresh=0
for database in /var/lib/dpkg/status /var/lib/rpm/* /usr/lib/sysimage/rpm/* /lib/apk/db/installed /usr/lib/apk/db/installed; do
    # shellcheck disable=SC3013 # every sh has it
    if [ "$database" -nt "$list" ]; then fresh=0; fi
done
if [ "$fresh" = 0 ]; then packages >"$list"; fi
