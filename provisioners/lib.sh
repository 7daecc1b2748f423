# shellcheck shell=sh
# What kiln's provisioners share. kiln puts this file beside run.sh, which begins with `. ./lib.sh`.
# Everything here can be called again without changing anything a second time.

PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
LC_ALL=C
export LC_ALL
umask 022

# ---- messages ----------------------------------------------------------------------------------

say() { printf '%s\n' "$*"; }

warn() { printf 'warning: %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# invalid INPUT MESSAGE: an input that kiln's own types could not refuse.
invalid() {
  printf "error: input \`%s\`: %s\\n" "$1" "$2" >&2
  exit 2
}

# each LIST FUNCTION [ARGUMENT…]: FUNCTION [ARGUMENT…] ENTRY for every entry of a list input.
each() {
  each_list=$1
  shift
  while IFS= read -r each_entry <&3; do
    [ -z "$each_entry" ] || "$@" "$each_entry"
  done 3<<LIST
$each_list
LIST
}

has() { command -v "$1" >/dev/null 2>&1; }

# ---- the system --------------------------------------------------------------------------------

# The distribution and what it descends from, as words with a space on both sides: " ubuntu debian ".
os_family() {
  for os_file in /etc/os-release /usr/lib/os-release; do
    [ -r "$os_file" ] || continue
    # shellcheck source=/dev/null # the guest's own file
    (. "$os_file" && printf ' %s %s ' "${ID:-}" "${ID_LIKE:-}")
    return
  done
  printf ' '
}

os_is() {
  case $(os_family) in *" $1 "*) return 0 ;; esac
  return 1
}

systemd_runs() { [ -d /run/systemd/system ]; }

# Whether the image boots with SELinux, which need not be on in the build guest.
selinux_used() { grep -Eqs '^SELINUX=(enforcing|permissive)' /etc/selinux/config; }

relabel() {
  if has restorecon; then
    restorecon -RF "$@" || warn "restorecon could not label $*"
  fi
}

# same_text FILE FILE: not by cmp, which small images lack. The dots keep line ends that $( ) would take away.
same_text() { [ "$(cat "$1" && echo .)" = "$(cat "$2" && echo .)" ]; }

# put_file PATH [MODE]: standard input becomes PATH, whole or not at all; an equal file is left alone, and so is its
# folder, where a file that came and went would show.
put_file() {
  put_new=$(mktemp)
  cat >"$put_new"
  if [ -f "$1" ] && [ ! -L "$1" ] && same_text "$put_new" "$1"; then
    rm -f "$put_new"
    chmod "${2:-0644}" "$1"
    return
  fi
  mkdir -p "${1%/*}"
  put_tmp=$(mktemp "${1%/*}/.kiln.XXXXXX")
  cat "$put_new" >"$put_tmp"
  rm -f "$put_new"
  chmod "${2:-0644}" "$put_tmp"
  mv -f "$put_tmp" "$1"
  relabel "$1"
  say "wrote $1"
}

# service_enable UNIT…: start at the next boot, not now. kiln masks some timers for the time of the build, and what is
# masked cannot be enabled.
service_enable() {
  for service in "$@"; do
    service_was=$(systemctl is-enabled "$service" 2>/dev/null || :)
    case $service_was in
      enabled) continue ;;
      masked-runtime) systemctl --quiet --runtime unmask "$service" ;;
    esac
    systemctl --quiet enable "$service" || die "systemctl could not enable $service"
    [ "$service_was" != masked-runtime ] || systemctl --quiet --runtime mask "$service"
  done
}

# ---- packages ----------------------------------------------------------------------------------

# Sets PKG to the system's own package manager; others may be installed beside it.
pkg_detect() {
  [ -z "${PKG:-}" ] || return 0
  case $(os_family) in
    *" debian "* | *" ubuntu "*) pkg_order='apt-get' ;;
    *suse*) pkg_order='zypper' ;;
    *" fedora "* | *" rhel "* | *" centos "* | *" amzn "*) pkg_order='dnf yum' ;;
    *) pkg_order= ;;
  esac
  for pkg_tool in $pkg_order apt-get dnf yum zypper; do
    if has "$pkg_tool"; then
      PKG=$pkg_tool
      return
    fi
  done
  die "no package manager found (looked for apt-get, dnf, yum and zypper)"
}

# A default route, or a proxy that stands in for one.
network_up() {
  [ -z "${http_proxy:-}${https_proxy:-}${HTTP_PROXY:-}${HTTPS_PROXY:-}" ] || return 0
  awk '$2 == "00000000" { found = 1 } END { exit !found }' /proc/net/route 2>/dev/null && return
  awk '$1 ~ /^0+$/ && $2 == "00" && $NF != "lo" { found = 1 } END { exit !found }' /proc/net/ipv6_route 2>/dev/null
}

pkg_unreachable() {
  if network_up; then
    die "could not $1; the package manager's own words are above"
  fi
  die "could not $1: this guest has no network; set network = \"open\" under [machine], or use a base image that has what is needed"
}

# retry COMMAND…: three times, for what a bad moment of the network can spoil; once where there is no network.
retry() {
  for retry_pause in 5 15 ''; do
    "$@" && return 0
    [ -n "$retry_pause" ] && network_up || return 1
    say "that failed; trying again in $retry_pause s"
    sleep "$retry_pause"
  done
}

# Debian starts a service as soon as it is installed. In a build that is work for nothing and leaves traces,
# so starting is forbidden while apt-get runs; enabling is not.
apt_get() (
  apt_policy=/usr/sbin/policy-rc.d
  if [ ! -e "$apt_policy" ] || grep -q '^# kiln' "$apt_policy"; then
    trap 'rm -f "$apt_policy"' EXIT
    trap 'exit 143' HUP INT TERM
    printf '#!/bin/sh\n# kiln: nothing is started during a build\nexit 101\n' >"$apt_policy"
    chmod 0755 "$apt_policy"
  fi
  export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 UCF_FORCE_CONFFOLD=1 APT_LISTCHANGES_FRONTEND=none
  apt-get -q -y -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
    -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold "$@" </dev/null
)

# zypper says 100 to 103 for "done, and by the way"; 103 is "the package manager itself was updated, run me again".
zypper_run() {
  export ZYPP_LOCK_TIMEOUT=300
  for zypper_try in 1 2; do
    zypper_status=0
    zypper --non-interactive "$@" </dev/null || zypper_status=$?
    case $zypper_status in
      0 | 100 | 101 | 102) return 0 ;;
      103) [ "$zypper_try" = 1 ] || return 0 ;;
      *) return "$zypper_status" ;;
    esac
  done
}

pkg_stamp=/run/kiln/packages-refreshed

# Fresh: refreshed since the guest was booted, and no source was added or changed since.
pkg_fresh() {
  [ -e "$pkg_stamp" ] || return 1
  [ "$PKG" != apt-get ] || ls /var/lib/apt/lists/*_Packages* >/dev/null 2>&1 || return 1
  pkg_newer=$(find /etc/apt/sources.list /etc/apt/sources.list.d /etc/yum.repos.d /etc/zypp/repos.d \
    -newer "$pkg_stamp" 2>/dev/null | head -n 1)
  [ -z "$pkg_newer" ]
}

pkg_makecache() {
  case $PKG in
    apt-get) apt_get -o APT::Update::Error-Mode=any update ;;
    dnf) dnf -y --refresh makecache </dev/null ;;
    yum) yum -y makecache </dev/null ;;
    zypper) zypper_run refresh ;;
  esac
}

# pkg_refresh [again]: package lists, once per boot of the guest.
pkg_refresh() {
  pkg_detect
  if [ "${1:-}" != again ] && pkg_fresh; then
    return 0
  fi
  say "refreshing the package lists ($PKG)"
  retry pkg_makecache || pkg_unreachable "refresh the package lists${pkg_goal:+ to $pkg_goal}"
  mkdir -p "${pkg_stamp%/*}"
  : >"$pkg_stamp"
  pkg_refreshed_here=1
}

# pkg_transaction WHAT COMMAND…: lists that this run did not fetch may be as old as a saved guest,
# so a failure is tried again with new ones.
pkg_transaction() {
  pkg_what=$1
  shift
  "$@" && return 0
  if [ -z "${pkg_refreshed_here:-}" ] && network_up; then
    pkg_refresh again
    "$@" && return 0
  fi
  pkg_unreachable "$pkg_what"
}

pkg_installed() {
  pkg_detect
  case $PKG in
    apt-get) [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ] ;;
    *) rpm -q --whatprovides "$1" >/dev/null 2>&1 ;;
  esac
}

# pkg_available NAME: can be installed from the configured sources.
pkg_available() {
  pkg_refresh
  case $PKG in
    apt-get) apt-cache policy "$1" 2>/dev/null | grep -q 'Candidate: [^(]' ;;
    dnf | yum) "$PKG" -q list --available "$1" >/dev/null 2>&1 </dev/null || pkg_installed "$1" ;;
    zypper) zypper -q -n search --match-exact "$1" >/dev/null 2>&1 </dev/null ;;
  esac
}

# Without what is merely recommended: an image should hold what was asked for.
pkg_put() {
  case $PKG in
    apt-get) apt_get install --no-install-recommends "$@" ;;
    dnf) dnf -y --setopt=install_weak_deps=False install "$@" </dev/null ;;
    yum) yum -y install "$@" </dev/null ;;
    zypper) zypper_run install --no-recommends "$@" ;;
  esac
}

# pkg_install NAME…: what is already there needs no network.
pkg_install() {
  pkg_detect
  pkg_missing=
  for pkg_name in "$@"; do
    pkg_installed "$pkg_name" || pkg_missing="$pkg_missing $pkg_name"
  done
  [ -n "$pkg_missing" ] || return 0
  pkg_goal="install$pkg_missing"
  pkg_refresh
  say "installing$pkg_missing"
  # shellcheck disable=SC2086 # a list of package names
  pkg_transaction "$pkg_goal" pkg_put $pkg_missing
}

[ "$(id -u)" = 0 ] || die "a provisioner has to run as root"
