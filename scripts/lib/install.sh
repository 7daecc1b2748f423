# Sourced by quickstart, test and .ci/run, in the clone's folder: finds out what is missing, says so, asks, installs.
# shellcheck shell=sh

say() { printf '%s\n' "$*" >&2; }
fail() { # STATUS MESSAGE [HELP]
    printf 'error: %s\n' "$2" >&2
    [ -z "${3-}" ] || printf 'help: %s\n' "$3" >&2
    exit "$1"
}

# An ordinary user's PATH has no mke2fs.
PATH=$PATH:/usr/sbin:/sbin

wanted='' missing=''
# want TEST PACKAGE: a Debian package that is missing if the test (a command's name, or a path) is.
want() {
    wanted="$wanted $1=$2"
    case $1 in
        /*) [ -e "$1" ] && return 0 ;;
        *) command -v "$1" >/dev/null && return 0 ;;
    esac
    case " $missing " in *" $2 "*) ;; *) missing="$missing $2" ;; esac
}

want_guest_tools() {
    want qemu-system-x86_64 qemu-system-x86
    want qemu-img qemu-utils
    want /usr/share/OVMF/OVMF_CODE_4M.fd ovmf
}
want_base_tools() {
    want mmdebstrap mmdebstrap
    want /usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring # Ubuntu has Debian's keys only on request
    want mke2fs e2fsprogs
    want sgdisk gdisk
    want mkfs.vfat dosfstools
    want mcopy mtools
    want newuidmap uidmap
}
want_build_tools() {
    want cc gcc
    want /usr/include/stdlib.h libc6-dev # gcc only recommends it, and nothing links without it
    want curl curl
    want /etc/ssl/certs/ca-certificates.crt ca-certificates
}
want_aws_tools() {
    want python3 python3
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
}
want_test_tools() {
    want_guest_tools
    want_base_tools
    want_build_tools
    want_aws_tools
    want sfdisk fdisk # the tests' own bases have partition tables of every kind
    want git git
    want ssh openssh-client # into a booted disk
}
rust_parts=''
want_lints() {
    want shellcheck shellcheck
    rust_parts='rustfmt clippy'
}

# The oldest Rust that Cargo.toml takes.
rust_wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
use_rustup() {
    # shellcheck disable=SC1091 # rustup's own
    [ ! -r "${CARGO_HOME:-$HOME/.cargo}/env" ] || . "${CARGO_HOME:-$HOME/.cargo}/env"
}
rust_is_new_enough() {
    command -v cargo >/dev/null || return 1
    found=$(rustc --version 2>/dev/null | cut -d' ' -f2)
    [ "$(printf '%s\n%s\n' "$rust_wanted" "${found%%-*}" | sort -V | head -n 1)" = "$rust_wanted" ]
}
# A user whose default is an older Rust keeps that default: these scripts use the stable one beside it. It is only named
# if it is there, because rustup may install what is named, and nobody was asked yet.
rust_is_here() {
    use_rustup
    rust_is_new_enough && return
    rustup toolchain list 2>/dev/null | grep -q '^stable' || return 1
    export RUSTUP_TOOLCHAIN=stable
    rust_is_new_enough
}
install_rust() {
    if ! command -v rustup >/dev/null; then
        installer=$(mktemp)
        curl --proto '=https' --tlsv1.2 -fsS -o "$installer" https://sh.rustup.rs ||
            fail 4 "rustup could not be fetched" "install Rust $rust_wanted or newer in another way: https://rustup.rs"
        sh "$installer" -y --profile minimal >&2 || fail 4 "rustup could not be installed"
        rm -f "$installer"
    fi
    rust_is_here || rustup toolchain install stable --profile minimal --no-self-update >&2 ||
        fail 4 "rustup could not install stable Rust"
    rust_is_here || fail 4 "rustup's stable Rust is older than $rust_wanted" "see \`rustup show\` for what is in its way"
}
missing_rust_parts() {
    for part in $rust_parts; do
        case $part in
            rustfmt) cargo fmt --version ;;
            *) cargo "$part" --version ;;
        esac >/dev/null 2>&1 || printf ' %s' "$part"
    done
}
install_rust_parts() {
    parts=$(missing_rust_parts)
    [ -n "$parts" ] || return 0
    command -v rustup >/dev/null || fail 4 "this Rust lacks$parts" "install them from where it came"
    # shellcheck disable=SC2086 # names
    rustup component add $parts >&2 || fail 4 "rustup could not install$parts"
}

# What apt and dpkg say matters only if they fail.
quietly() {
    log=$(mktemp)
    "$@" >"$log" 2>&1 || {
        cat "$log" >&2
        rm -f "$log"
        fail 4 "\`$*\` failed"
    }
    rm -f "$log"
}
install_packages() {
    # shellcheck disable=SC2086 # package names
    quietly $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
}

become_root() {
    as_root=''
    [ "$(id -u)" -ne 0 ] || return 0
    command -v sudo >/dev/null || fail 4 "installing takes root, and there is no sudo" "as root: apt-get install$missing"
    as_root=sudo
}

# install_missing YES: what `want` found, and Rust. Asks first unless YES is 1.
install_missing() {
    rust=0
    rust_is_here || rust=1
    if [ -n "$missing" ] || [ "$rust" -eq 1 ]; then
        [ -z "$missing" ] || say "missing packages:$missing"
        [ "$rust" -eq 0 ] || say "missing: Rust $rust_wanted or newer (by rustup, for this user)"
        if [ -n "$missing" ] && ! command -v apt-get >/dev/null; then
            fail 4 "this is not a Debian or Ubuntu machine" "install with its own package manager:$missing"
        fi
        agreed "$1"
    fi
    if [ -n "$missing" ]; then
        become_root
        quietly $as_root apt-get update -qq
        install_packages
        # apt makes room for a package by removing others: where QEMU's tools came from another source than its
        # emulator now does, they are gone, and have to come from there as well.
        hash -r # the shell remembers where it found them
        missing=''
        for pair in $wanted; do want "${pair%%=*}" "${pair#*=}"; done
        if [ -n "$missing" ]; then
            say "replaced by apt's own version:$missing"
            install_packages
        fi
    fi
    [ "$rust" -eq 0 ] || install_rust
    install_rust_parts
}
agreed() { # YES
    [ "$1" -ne 1 ] || return 0
    [ -t 0 ] || fail 4 "nobody can be asked whether to install them" "run it with --yes"
    printf 'install them now? [y/N] ' >&2
    read -r reply
    case $reply in [yY]*) ;; *) fail 4 "nothing was installed" ;; esac
}
