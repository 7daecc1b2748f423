#!/bin/sh
# Owners and modes, rule by rule. A rule is read from its end, so that PATH may hold spaces.
set -eu
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. ./lib.sh

wrong() { invalid rules "\"$rule\": $1"; }

# known passwd|group NAME: in the database, or a number.
known() {
  case $2 in
    *[!0-9]*) getent "$1" "$2" >/dev/null || wrong "there is no $([ "$1" = group ] && echo group || echo account) \"$2\"" ;;
  esac
}

# parse RULE: sets rule, path, owner, group, mode and recursive, or ends the script.
parse() {
  rule=$1
  rest=$rule
  recursive=
  case $rest in
    *' recursive')
      recursive=yes
      rest=${rest%' recursive'}
      ;;
  esac
  case $rest in
    /*' '*' '*) ;;
    *) wrong "not PATH OWNER:GROUP MODE [recursive], with an absolute PATH" ;;
  esac
  mode=${rest##* }
  rest=${rest% *}
  owner=${rest##* }
  path=${rest% *}

  printf '%s\n' "$mode" | grep -Eq '^(-|[0-7]{3,4}|[ugoa]*[-+=][rwxXstugo]*(,[ugoa]*[-+=][rwxXstugo]*)*)$' ||
    wrong "\"$mode\" is not a mode such as 0640 or u=rwX,g=rX,o="
  case $owner in
    -) owner='' group='' ;;
    *:*)
      group=${owner#*:}
      owner=${owner%%:*}
      ;;
    *) wrong "\"$owner\" is not OWNER:GROUP, OWNER:, :GROUP or -" ;;
  esac
  known passwd "$owner"
  known group "$group"

  while [ "$path" != / ] && [ "${path%/}" != "$path" ]; do
    path=${path%/}
  done
  case $path/ in
    */../* | */./*) wrong "PATH holds . or .." ;;
    /dev/* | /proc/* | /run/* | /sys/* | /tmp/*) wrong "nothing in there outlives a reboot" ;;
  esac
  if [ -L "$path" ]; then
    wrong "$path is a symbolic link; name what it points to: $(readlink -f "$path" || :)"
  fi
  [ -e "$path" ] || wrong "there is no $path at this step"
  if [ -n "$recursive" ]; then
    case $path in
      / | /bin | /boot | /etc | /lib | /lib32 | /lib64 | /sbin | /usr | /usr/bin | /usr/lib | /usr/lib64 | /usr/sbin | /var | /var/lib)
        wrong "changing all of $path would break the system"
        ;;
    esac
  fi
}

# Only what differs is changed: chown takes away setuid bits and file capabilities. Links are left alone, and so are
# other file systems.
apply() {
  parse "$1"
  set -- "$path" -xdev
  if [ -z "$recursive" ]; then
    set -- "$@" -maxdepth 0
  fi
  if [ -n "$owner" ]; then
    find "$@" ! -user "$owner" -exec chown -h "$owner" {} +
  fi
  if [ -n "$group" ]; then
    find "$@" ! -group "$group" -exec chgrp -h "$group" {} +
  fi
  case $mode in
    -) ;;
    [0-7]*)
      if [ -n "$recursive" ]; then
        find "$@" ! -type d ! -type l -exec chmod "$mode" {} +
        # In each of the last three digits, r (4) brings x (1).
        folders=$(printf '%s' "$mode" | sed -e 's/4\(..\)$/5\1/; s/6\(..\)$/7\1/; s/4\(.\)$/5\1/; s/6\(.\)$/7\1/; s/4$/5/; s/6$/7/')
        find "$@" -type d -exec chmod "$folders" {} +
      else
        chmod "$mode" "$path"
      fi
      ;;
    *) find "$@" ! -type l -exec chmod -- "$mode" {} + ;;
  esac
  say "$path: $(stat -c '%U:%G %a' "$path")${recursive:+, and all below}"
}

[ -n "$KILN_INPUT_RULES" ] || invalid rules "there is none"
# All are checked before the first is applied.
each "$KILN_INPUT_RULES" parse
each "$KILN_INPUT_RULES" apply
