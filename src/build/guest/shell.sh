# A shell for a person on the serial console, which becomes its controlling terminal. Until it runs, only what goes
# wrong is printed.
tty=/dev/ttyS0
command -v setsid >/dev/null || {
    echo "kiln: the guest has no setsid (util-linux)"
    exit 127
}
# Nobody else writes on the console meanwhile: the kernel, systemd, and the login, which there is where the disk's own
# boot loader has started it.
echo 1 >/proc/sys/kernel/printk
if [ -d /run/systemd/system ]; then
    kill -55 1 # SIGRTMIN+21: see systemd(1)
    read -r line </proc/cmdline
    case $line in
        *systemd.run=*) ;;
        *) systemctl stop serial-getty@ttyS0.service 2>/dev/null || true ;;
    esac
fi
stty sane iutf8 rows "$KILN_ROWS" cols "$KILN_COLUMNS" <$tty
unset KILN_ROWS KILN_COLUMNS line
SHELL=/bin/sh
[ ! -x /bin/bash ] || SHELL=/bin/bash
export SHELL
cd /root || exit
unset OLDPWD
status=0
setsid -c "$SHELL" -i <>$tty >&0 2>&1 || status=$?
# Waits until the console has shown everything.
stty sane <$tty || true
exit $status
