#!/bin/sh
# One nftables table that drops what comes in unasked. It is loaded at the next boot: the build guest keeps its network.
set -eu
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. ./lib.sh

is_port() {
  case $1 in
    '' | 0* | *[!0-9]* | ??????*) return 1 ;;
  esac
  [ "$1" -ge 1 ] && [ "$1" -le 65535 ]
}

# rule tcp|udp ENTRY: one rule of nftables; a wrong entry ends the script.
rule() {
  ports=${2%%/*}
  first=${ports%%-*}
  last=${ports#*-}
  if ! is_port "$first" || ! is_port "$last" || [ "$first" -gt "$last" ]; then
    invalid "$1" "\"$2\": \"$ports\" is neither a port (1 to 65535) nor a range such as 8000-8010"
  fi
  # nftables knows no range of one port.
  [ "$first" != "$last" ] || ports=$first
  case $2 in
    */*) source=${2#*/} ;;
    *)
      printf '    %s dport %s accept\n' "$1" "$ports"
      return
      ;;
  esac
  octet='(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])'
  case $source in
    *:*) family=ip6 shape='^[0-9a-fA-F:.]+(/([0-9]|[1-9][0-9]|1[01][0-9]|12[0-8]))?$' ;;
    *) family=ip shape="^$octet(\.$octet){3}(/([0-9]|[12][0-9]|3[0-2]))?\$" ;;
  esac
  printf '%s\n' "$source" | grep -Eq "$shape" ||
    invalid "$1" "\"$2\": \"$source\" is not an IP address or network such as 10.0.0.0/8"
  printf '    %s saddr %s %s dport %s accept\n' "$family" "$source" "$1" "$ports"
}

asked=$(each "$KILN_INPUT_TCP" rule tcp && each "$KILN_INPUT_UDP" rule udp)
echo=
if [ "$KILN_INPUT_PING" = true ]; then
  echo=', echo-request'
fi

pkg_install nftables

# The distribution's nftables.service names the file that it loads; where there is no service, one is made.
# nftables.conf stays the last word then: no other unit can flush what was loaded here.
unit=
for directory in /usr/lib/systemd/system /lib/systemd/system; do
  if [ -f "$directory/nftables.service" ]; then
    unit=$directory/nftables.service
  fi
done
conf=/etc/nftables.conf
if [ -n "$unit" ]; then
  conf=$(sed -n 's/^ExecStart=.*[ "]\(\/etc\/[^ ";'"'"']*\).*/\1/p' "$unit" | head -n 1)
  [ -n "$conf" ] || die "cannot tell which file $unit loads"
else
  nft=$(command -v nft)
  put_file /etc/systemd/system/nftables.service <<UNIT
[Unit]
Description=nftables
Documentation=man:nft(8)
Wants=network-pre.target
Before=network-pre.target shutdown.target
Conflicts=shutdown.target
DefaultDependencies=no

[Service]
Type=oneshot
RemainAfterExit=yes
StandardInput=null
ProtectSystem=full
ProtectHome=true
ExecStart=$nft -f $conf
ExecReload=$nft -f $conf
ExecStop=$nft flush ruleset

[Install]
WantedBy=sysinit.target
UNIT
fi

# Replaces its own table only, so that containers, fail2ban and others keep theirs.
ruleset=$(mktemp)
trap 'rm -f "$ruleset"' EXIT
cat >"$ruleset" <<CONF
#!/usr/sbin/nft -f
# written by kiln's firewall provisioner

table inet kiln
delete table inet kiln

table inet kiln {
  chain input {
    type filter hook input priority 0; policy drop;

    iif "lo" accept
    ct state established,related accept

    # What IPv4 and IPv6 cannot work without: errors, neighbours, routers, multicast membership.
    icmp type { destination-unreachable, time-exceeded, parameter-problem$echo } accept
    icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem$echo } accept
    icmpv6 type { nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } ip6 hoplimit 255 accept
    icmpv6 type { mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report } accept
    ct state invalid drop

    # Answers to this machine's own DHCP clients, which may come from a server that was not asked by name.
    udp sport 67 udp dport 68 accept
    ip6 saddr fe80::/10 udp dport 546 accept

$asked
  }
}
CONF

# Checked by the kernel where the kernel can: nothing is loaded.
probe=$(mktemp)
trap 'rm -f "$ruleset" "$probe"' EXIT
echo 'table inet kiln_probe { chain c { type filter hook input priority 0; ct state established accept; }; }' >"$probe"
if nft -c -f "$probe" 2>/dev/null; then
  nft -c -f "$ruleset" || die "nft refuses the ruleset; its own words are above"
else
  warn "this kernel cannot check an nftables ruleset; it is installed unchecked"
fi
# The file was the distribution's, or somebody's: it is not lost.
if [ -s "$conf" ] && ! grep -q "^# written by kiln's firewall provisioner" "$conf"; then
  cp -p "$conf" "$conf.before-kiln"
  say "kept the $conf that was there as $conf.before-kiln; nothing loads it"
fi
put_file "$conf" 0755 <"$ruleset"

# Two filters would both have to agree; these would start beside nftables.
for other in firewalld ufw iptables ip6tables; do
  if systemctl --quiet is-enabled "$other.service" 2>/dev/null; then
    systemctl --quiet disable "$other.service"
    say "disabled $other: nftables takes its place"
  fi
done
service_enable nftables.service

ssh=closed
look_for_ssh() {
  ports=${1%%/*}
  if [ "${ports%%-*}" -le 22 ] && [ "${ports#*-}" -ge 22 ]; then ssh=open; fi
}
each "$KILN_INPUT_TCP" look_for_ssh
if { has sshd || [ -x /usr/sbin/sshd ]; } && [ "$ssh" = closed ]; then
  warn "sshd is installed but port 22 is not in \`tcp\`: no ssh into this image"
fi
say "the filter in $conf will be active from the next boot on"
