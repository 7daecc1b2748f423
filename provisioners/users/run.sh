#!/bin/sh
# Accounts. What is not named here is never changed or removed; passwords of the accounts named here are locked.
set -eu
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. ./lib.sh

is_name() {
  case $1 in
    '' | [!a-z_]* | *[!a-z0-9_.-]* | ?????????????????????????????????*) return 1 ;;
  esac
}

is_id() {
  case $1 in
    '' | *[!0-9]* | ???????????*) return 1 ;;
  esac
}

group_exists() { getent group "$1" >/dev/null; }
user_exists() { getent passwd "$1" >/dev/null; }

# field DATABASE NAME NUMBER
field() { getent "$1" "$2" | cut -d: -f"$3"; }

need_group() {
  group_exists "$2" && return
  for admins in sudo wheel; do
    if [ "$2" != "$admins" ] && group_exists "$admins"; then
      case $2 in
        sudo | wheel) invalid "$1" "there is no group \"$2\" here; this system's administrators are \"$admins\"" ;;
      esac
    fi
  done
  invalid "$1" "there is no group \"$2\"; list it in \`groups\` to have it made"
}

# options INPUT ENTRY ALLOWED: sets name, and opt_KEY for every :KEY=VALUE of ENTRY; :KEY alone is "yes".
options() {
  opt_groups='' opt_shell='' opt_home='' opt_uid='' opt_gid='' opt_group='' opt_comment='' opt_system=''
  name=${2%%:*}
  is_name "$name" || invalid "$1" "\"$2\": \"$name\" is not a name (small letters, digits, _ . -, at most 32)"
  rest=${2#"$name"}
  while [ -n "$rest" ]; do
    rest=${rest#:}
    option=${rest%%:*}
    rest=${rest#"$option"}
    option_key=${option%%=*}
    case $option in
      *=*) option_value=${option#*=} ;;
      *) option_value= ;;
    esac
    case " $3 " in
      *" $option_key "*) ;;
      *) invalid "$1" "\"$2\": \"$option\" is not an option (there are: $3)" ;;
    esac
    case $option in
      system) opt_system=yes ;;
      groups=?*) opt_groups=$option_value ;;
      shell=/?*) opt_shell=$option_value ;;
      home=/?*) opt_home=$option_value ;;
      uid=?* | gid=?*)
        is_id "$option_value" || invalid "$1" "\"$2\": \"$option_value\" is not a number"
        case $option_key in
          uid) opt_uid=$option_value ;;
          gid) opt_gid=$option_value ;;
        esac
        ;;
      group=?*) opt_group=$option_value ;;
      comment=*) opt_comment=$option_value ;;
      *) invalid "$1" "\"$2\": \"$option\" is not complete, or needs an absolute path" ;;
    esac
  done
}

make_group() {
  options groups "$1" "gid system"
  if group_exists "$name"; then
    now=$(field group "$name" 3)
    [ -z "$opt_gid" ] || [ "$now" = "$opt_gid" ] ||
      invalid groups "\"$1\": the group exists already, with gid $now"
    return
  fi
  groupadd ${opt_system:+--system} ${opt_gid:+--gid "$opt_gid"} "$name"
  say "made group $name"
}

make_user() {
  options users "$1" "groups shell home uid group comment system"
  case $opt_shell in
    '') ;;
    *) [ -x "$opt_shell" ] || invalid users "\"$1\": there is no shell $opt_shell here" ;;
  esac
  [ -z "$opt_group" ] || need_group users "$opt_group"
  for group in $(printf '%s' "$opt_groups" | tr , ' '); do
    need_group users "$group"
  done
  if user_exists "$name"; then
    for check in "uid 3 $opt_uid" "home 6 $opt_home"; do
      wanted=${check#* * }
      now=$(field passwd "$name" "$(printf '%s' "$check" | cut -d' ' -f2)")
      [ -z "$wanted" ] || [ "$now" = "$wanted" ] ||
        invalid users "\"$1\": the account exists already, with ${check%% *} $now"
    done
    if [ -n "$opt_shell" ] && [ "$(field passwd "$name" 7)" != "$opt_shell" ]; then
      usermod --shell "$opt_shell" "$name"
    fi
    if [ -n "$opt_comment" ] && [ "$(field passwd "$name" 5)" != "$opt_comment" ]; then
      usermod --comment "$opt_comment" "$name"
    fi
    if [ -n "$opt_group" ] && [ "$(id -gn "$name")" != "$opt_group" ]; then
      usermod --gid "$opt_group" "$name"
    fi
  else
    if [ -z "$opt_shell" ]; then
      opt_shell=/bin/sh
      if [ -n "$opt_system" ]; then
        opt_shell=$(command -v nologin || echo /bin/false)
      elif [ -x /bin/bash ]; then
        opt_shell=/bin/bash
      fi
    fi
    # A group of one's own, unless one is named or one with this name is there.
    if [ -z "$opt_group" ] && group_exists "$name"; then
      opt_group=$name
    fi
    if [ -n "$opt_group" ]; then
      set -- --gid "$opt_group"
    else
      set -- --user-group
    fi
    if [ -n "$opt_system" ]; then
      set -- "$@" --system --no-create-home
    else
      set -- "$@" --create-home
    fi
    useradd "$@" --shell "$opt_shell" --comment "$opt_comment" \
      ${opt_uid:+--uid "$opt_uid"} ${opt_home:+--home-dir "$opt_home"} "$name"
    say "made account $name"
  fi
  for group in $(printf '%s' "$opt_groups" | tr , ' '); do
    case " $(id -Gn "$name") " in
      *" $group "*) ;;
      *)
        usermod --append --groups "$group" "$name"
        say "added $name to $group"
        ;;
    esac
  done
  case $(field shadow "$name" 2) in
    '!'* | '*'*) ;;
    *)
      usermod --lock "$name"
      say "locked the password of $name"
      ;;
  esac
}

# One line of authorized_keys, checked by OpenSSH itself where it is installed.
is_key() {
  if has ssh-keygen; then
    printf '%s\n' "$1" | ssh-keygen -l -f /dev/stdin >/dev/null 2>&1
  else
    printf '%s\n' "$1" | grep -Eq '(^| )(ssh-|ecdsa-|sk-)[a-z0-9@.-]+ AAAA[A-Za-z0-9+/=]+( |$)'
  fi
}

add_key() {
  name=${1%% *}
  key=${1#"$name"}
  key=$(printf '%s' "$key" | sed 's/^[ \t]*//')
  is_name "$name" || invalid authorized_keys "\"$1\" does not begin with an account's name"
  is_key "$key" || invalid authorized_keys "\"$1\": what follows the name is not a public ssh key"
  user_exists "$name" || invalid authorized_keys "there is no account \"$name\""
  home=$(field passwd "$name" 6)
  owner=$(field passwd "$name" 3):$(field passwd "$name" 4)
  [ -d "$home" ] || die "$name has no home folder ($home), so there is no place for its ssh key"
  file=$home/.ssh/authorized_keys
  if [ -L "$home/.ssh" ] || [ -L "$file" ]; then
    die "$file or its folder is a symbolic link; not following it"
  fi
  mkdir -p "$home/.ssh"
  [ -e "$file" ] || : >"$file"
  if ! grep -Fxq -e "$key" "$file"; then
    # A last line without its end would swallow the key.
    if [ -s "$file" ] && [ -n "$(tail -c 1 "$file")" ]; then
      echo >>"$file"
    fi
    printf '%s\n' "$key" >>"$file"
    say "added an ssh key of $name"
  fi
  chmod 0700 "$home/.ssh"
  chmod 0600 "$file"
  chown "$owner" "$home/.ssh" "$file"
  relabel "$home/.ssh"
}

# sudo's own rule of names: a file with a dot in its name is not read.
sudo_file() { printf '/etc/sudoers.d/kiln-%s' "$(printf '%s' "$1" | sed -e 's/^%/group-/' -e 's/\./=/g')"; }

sudo_line() {
  who=${1%% *}
  what=${1#"$who"}
  what=${what# }
  tag=
  case $what in
    NOPASSWD | NOPASSWD\ *)
      tag='NOPASSWD: '
      what=${what#NOPASSWD}
      what=${what# }
      ;;
  esac
  case $what in
    '' | /*) ;;
    *) invalid sudo "\"$1\": \"$what\" is neither NOPASSWD nor a command with its absolute path" ;;
  esac
  printf '%s ALL=(ALL:ALL) %s%s\n' "$who" "$tag" "${what:-ALL}"
}

allow_sudo() {
  who=${1%% *}
  case $who in
    %*)
      is_name "${who#%}" || invalid sudo "\"$1\" does not begin with a name or %GROUP"
      group_exists "${who#%}" || invalid sudo "there is no group \"${who#%}\""
      ;;
    *)
      is_name "$who" || invalid sudo "\"$1\" does not begin with a name or %GROUP"
      user_exists "$who" || invalid sudo "there is no account \"$who\""
      ;;
  esac
  # All of NAME's entries make NAME's file.
  candidate=$(mktemp)
  each "$KILN_INPUT_SUDO" sudo_line_of "$who" >"$candidate"
  visudo -c -q -f "$candidate" || {
    rm -f "$candidate"
    invalid sudo "\"$1\": visudo refuses it"
  }
  put_file "$(sudo_file "$who")" 0440 <"$candidate"
  rm -f "$candidate"
  case $who in
    %*) ;;
    *)
      case $(cat "$(sudo_file "$who")") in
        *NOPASSWD*) ;;
        *) warn "sudo will ask $who for a password, and $who's is locked unless something sets one; NOPASSWD is the other way" ;;
      esac
      ;;
  esac
}

sudo_line_of() {
  if [ "${2%% *}" = "$1" ]; then
    sudo_line "$2"
  fi
}

[ -n "$KILN_INPUT_GROUPS$KILN_INPUT_USERS$KILN_INPUT_AUTHORIZED_KEYS$KILN_INPUT_SUDO" ] ||
  invalid users "nothing is asked for: give groups, users, authorized_keys or sudo"

each "$KILN_INPUT_GROUPS" make_group
each "$KILN_INPUT_USERS" make_user
each "$KILN_INPUT_AUTHORIZED_KEYS" add_key
if [ -n "$KILN_INPUT_SUDO" ]; then
  pkg_install sudo
  each "$KILN_INPUT_SUDO" allow_sudo
  visudo -c -q || die "visudo finds an error in the sudoers files; its own words are above"
fi
