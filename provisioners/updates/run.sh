#!/bin/sh
# Updates now, and if asked for automatic security updates later.
set -eu
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. ./lib.sh

automatic=$KILN_INPUT_AUTOMATIC
reboot=$KILN_INPUT_AUTOMATIC_REBOOT
if [ "$reboot" = true ] && [ "$automatic" = false ]; then
  invalid automatic_reboot "needs automatic = true"
fi

# Rolling releases of SUSE have no patches: the distribution itself moves.
rolling() { os_is opensuse-tumbleweed || os_is opensuse-slowroll || os_is opensuse-microos; }
amazon_2023() { os_is amzn && [ "$PKG" = dnf ]; }

pkg_upgrade() {
  case $PKG in
    apt-get) apt_get dist-upgrade ;;
    dnf)
      # Amazon Linux 2023 stays at the release it was made from unless told otherwise.
      if amazon_2023; then
        dnf -y --releasever=latest upgrade </dev/null
      else
        dnf -y upgrade </dev/null
      fi
      ;;
    yum) yum -y update </dev/null ;;
    zypper)
      if rolling; then
        zypper_run dist-upgrade --no-recommends --auto-agree-with-licenses
      else
        zypper_run update --no-recommends --auto-agree-with-licenses
      fi
      ;;
  esac
}

# set_key FILE SECTION KEY VALUE: in an ini file, which is made if it is missing.
set_key() {
  { [ ! -f "$1" ] || cat "$1"; } | section=$2 key=$3 value=$4 awk '
    function put() { if (!done) print ENVIRON["key"] " = " ENVIRON["value"]; done = 1 }
    /^[ \t]*\[/ {
      if (inside) put()
      inside = ($0 ~ "^[ \t]*\\[" ENVIRON["section"] "\\]")
      seen = seen || inside
    }
    inside && $0 ~ "^[ \t]*" ENVIRON["key"] "[ \t]*=" { put(); next }
    { print }
    END { if (!seen) print "[" ENVIRON["section"] "]"; put() }
  ' | put_file "$1"
}

automatic_apt() {
  pkg_install unattended-upgrades
  # After 20auto-upgrades and 50unattended-upgrades, which may say otherwise.
  put_file /etc/apt/apt.conf.d/90kiln-automatic <<CONF
// written by kiln's updates provisioner
APT::Periodic::Enable "1";
APT::Periodic::Update-Package-Lists "1";
APT::Periodic::Unattended-Upgrade "1";
Unattended-Upgrade::Automatic-Reboot "$reboot";
CONF
  service_enable apt-daily.timer apt-daily-upgrade.timer unattended-upgrades.service
}

automatic_dnf() {
  if dnf --version 2>/dev/null </dev/null | grep -q '^dnf5'; then
    pkg_install dnf5-plugin-automatic
  else
    pkg_install dnf-automatic
  fi
  conf=/etc/dnf/automatic.conf
  set_key "$conf" commands upgrade_type security
  set_key "$conf" commands download_updates yes
  set_key "$conf" commands apply_updates yes
  set_key "$conf" commands reboot "$([ "$reboot" = true ] && echo when-needed || echo never)"
  if amazon_2023; then
    echo latest | put_file /etc/dnf/vars/releasever
  fi
  # dnf5 has renamed the timer.
  for timer in dnf5-automatic.timer dnf-automatic.timer; do
    if [ -f "/usr/lib/systemd/system/$timer" ]; then
      service_enable "$timer"
      return
    fi
  done
  die "dnf's automatic updates are installed, but their timer is not"
}

automatic_yum() {
  [ "$reboot" = false ] || invalid automatic_reboot "yum-cron cannot restart the machine"
  pkg_install yum-cron
  set_key /etc/yum/yum-cron.conf commands update_cmd security
  set_key /etc/yum/yum-cron.conf commands download_updates yes
  set_key /etc/yum/yum-cron.conf commands apply_updates yes
  service_enable yum-cron.service
}

# SUSE has no such service for every edition, so a timer starts zypper.
automatic_zypper() {
  if rolling; then
    update='dist-upgrade --no-recommends'
  else
    update='patch --category security'
  fi
  # 102 is "a restart is needed"; systemd takes $$ for $.
  restart=
  if [ "$reboot" = true ]; then
    restart='ExecStopPost=/bin/sh -c "zypper needs-rebooting >/dev/null; [ $$? != 102 ] || systemctl reboot"'
  fi
  put_file /etc/systemd/system/kiln-updates.service <<UNIT
[Unit]
Description=Security updates
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
Environment=ZYPP_LOCK_TIMEOUT=600
ExecStartPre=/usr/bin/zypper --non-interactive refresh
ExecStart=/usr/bin/zypper --non-interactive $update --auto-agree-with-licenses
SuccessExitStatus=100 101 102 103
$restart
UNIT
  put_file /etc/systemd/system/kiln-updates.timer <<'UNIT'
[Unit]
Description=Security updates every day

[Timer]
OnCalendar=daily
RandomizedDelaySec=6h
Persistent=true

[Install]
WantedBy=timers.target
UNIT
  service_enable kiln-updates.timer
}

pkg_detect
if [ "$KILN_INPUT_UPGRADE" = true ]; then
  pkg_refresh
  say "upgrading all packages ($PKG)"
  pkg_transaction "upgrade all packages" pkg_upgrade
fi

if [ "$automatic" = true ]; then
  case $PKG in
    apt-get) automatic_apt ;;
    dnf) automatic_dnf ;;
    yum) automatic_yum ;;
    zypper) automatic_zypper ;;
  esac
  say "instances will install security updates by themselves"
fi

newest=$(find /lib/modules -mindepth 1 -maxdepth 1 -printf '%f\n' 2>/dev/null | sort -V | tail -n 1)
if [ -n "$newest" ] && [ "$newest" != "$(uname -r)" ]; then
  say "kernel $newest is installed, $(uname -r) is running: reboot = true on this step lets the next ones run on it"
fi
