#!/bin/sh
# System-wide variables: /etc/environment (PAM: ssh, cron, su), /etc/profile.d (login shells), systemd (services).
# Variables that others put there stay; one that is named here is replaced.
set -eu
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. ./lib.sh

variables=$KILN_INPUT_VARIABLES
keys=' '
check() {
  key=${1%%=*}
  case $1 in
    *=*) ;;
    *) invalid variables "\"$1\" is not KEY=VALUE" ;;
  esac
  case $key in
    '' | [0-9]* | *[!A-Za-z0-9_]*) invalid variables "\"$key\" is not a variable's name (letters, digits and _)" ;;
  esac
  case $keys in
    *" $key "*) invalid variables "$key is there twice" ;;
  esac
  keys="$keys$key "
}
each "$variables" check
[ "$keys" != ' ' ] || invalid variables "there is none"

# others FILE: its lines, without those that set a variable named here.
others() {
  [ -f "$1" ] || return 0
  keys=$keys awk '
    {
      line = $0
      sub(/^[ \t]*(export[ \t]+|DefaultEnvironment=")?/, "", line)
      if (index(ENVIRON["keys"], " " substr(line, 1, index(line, "=") - 1) " ") && index(line, "=") > 1) next
      print
    }
  ' "$1"
}

# split FUNCTION KEY=VALUE: FUNCTION KEY VALUE.
split() { "$1" "${2%%=*}" "${2#*=}"; }

# pam_env takes off one pair of quotes around a value and leaves those inside alone; # ends a line even within them,
# and a line that is too long (1024 in old versions) ends the file.
pam_line() {
  case $2 in
    *'#'*)
      warn "$1 holds #, which /etc/environment cannot: login shells and services see it, \`ssh HOST COMMAND\` and cron do not"
      return
      ;;
  esac
  if [ $((${#1} + ${#2})) -gt 1000 ]; then
    warn "$1 is too long for /etc/environment: login shells and services see it, \`ssh HOST COMMAND\` and cron do not"
    return
  fi
  case $2 in
    *[!A-Za-z0-9_./:@%+,=-]*) printf '%s="%s"\n' "$1" "$2" ;;
    *) printf '%s=%s\n' "$1" "$2" ;;
  esac
}

shell_line() {
  printf "export %s='%s'\n" "$1" "$(printf '%s\n' "$2" | sed "s/'/'\\\\''/g")"
}

# $1 % or %%: which of them stands for one depends on the version of systemd.
systemd_line() {
  printf 'DefaultEnvironment="%s=%s"\n' "$1" "$(printf '%s\n' "$2" | sed -e 's/["\\]/\\&/g' -e "s/%/$percent/g")"
}

systemd_file=/etc/systemd/system.conf.d/kiln.conf
systemd_lines() {
  if [ -f "$systemd_file" ]; then
    others "$systemd_file"
  else
    printf "# written by kiln's environment provisioner\n[Manager]\n"
  fi
  each "$variables" split systemd_line
}

{ others /etc/environment && each "$variables" split pam_line; } | put_file /etc/environment
{ others /etc/profile.d/kiln.sh && each "$variables" split shell_line; } | put_file /etc/profile.d/kiln.sh
percent=%%
systemd_lines | put_file "$systemd_file"

# What a service of this very systemd gets to see is the proof. Not systemd-run: it wants a message bus.
services_see() {
  probe=kiln-environment-probe.service
  # shellcheck disable=SC2016 # the words of a unit file
  printf '[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nExecStart=/bin/sh -c "env >%s"\n' "$seen" \
    >"/run/systemd/system/$probe"
  : >"$seen"
  systemctl daemon-reload
  probed=0
  systemctl --quiet start "$probe" || probed=2
  rm -f "/run/systemd/system/$probe"
  [ "$probed" = 0 ] || return "$probed"
  unseen=
  each "$variables" look_for
  [ -z "$unseen" ]
}
look_for() {
  if ! grep -Fxq -e "$1" "$seen"; then
    unseen="$unseen ${1%%=*}"
  fi
}
if systemd_runs; then
  seen=$(mktemp)
  trap 'rm -f "$seen"' EXIT
  status=0
  services_see || status=$?
  case $status-$variables in
    1-*%*)
      percent=%
      systemd_lines | put_file "$systemd_file"
      status=0
      services_see || status=$?
      ;;
  esac
  case $status in
    0) say "a service of this guest sees:${keys% }" ;;
    1) die "services do not see as given:$unseen; something else sets it, such as /etc/locale.conf or another file in system.conf.d" ;;
    *) warn "systemd could not start a service for it: what services see was not checked" ;;
  esac
fi
