# Sourced by quickstart and test: finds out what is missing, says so, asks, installs.
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
    want mke2fs e2fsprogs
    want sgdisk gdisk
    want mkfs.vfat dosfstools
    want mcopy mtools
    want newuidmap uidmap
}
want_build_tools() {
    want cc gcc
    want make make
    want cmake cmake # aws-lc, the TLS library's cryptography
    want curl curl
}
want_aws_tools() {
    want python3 python3
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
}

# The oldest Rust that Cargo.toml takes.
rust_wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
rust_is_new_enough() {
    command -v cargo >/dev/null || return 1
    found=$(rustc --version 2>/dev/null | cut -d' ' -f2)
    [ "$(printf '%s\n%s\n' "$rust_wanted" "${found%%-*}" | sort -V | head -n 1)" = "$rust_wanted" ]
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

# install_missing YES: what `want` found, and Rust. Asks first unless YES is 1.
install_missing() {
    rust=0
    # shellcheck disable=SC1091
    [ ! -r "$HOME/.cargo/env" ] || . "$HOME/.cargo/env"
    rust_is_new_enough || rust=1
    [ -n "$missing" ] || [ "$rust" -eq 1 ] || return 0
    [ -z "$missing" ] || say "missing packages:$missing"
    [ "$rust" -eq 0 ] || say "missing: Rust $rust_wanted or newer (by rustup, for this user)"
    if [ -n "$missing" ] && ! command -v apt-get >/dev/null; then
        fail 4 "this is not a Debian or Ubuntu machine" "install with its own package manager:$missing"
    fi
    if [ "$1" -ne 1 ]; then
        [ -t 0 ] || fail 4 "nobody can be asked whether to install them" "run it with --yes"
        printf 'install them now? [y/N] ' >&2
        read -r reply
        case $reply in [yY]*) ;; *) fail 4 "nothing was installed" ;; esac
    fi
    if [ -n "$missing" ]; then
        as_root=''
        if [ "$(id -u)" -ne 0 ]; then
            as_root=sudo
            command -v sudo >/dev/null || fail 4 "installing takes root, and there is no sudo" "as root: apt-get install$missing"
        fi
        quietly $as_root apt-get update -qq
        install_packages
        # apt makes room for a package by removing others: where QEMU's tools came from another source than its
        # emulator now does, they are gone, and have to come from there as well.
        missing=''
        for pair in $wanted; do want "${pair%%=*}" "${pair#*=}"; done
        if [ -n "$missing" ]; then
            say "replaced by apt's own version:$missing"
            install_packages
        fi
    fi
    if [ "$rust" -eq 1 ]; then
        command -v rustup >/dev/null || curl --proto '=https' --tlsv1.2 -fsS https://sh.rustup.rs | sh -s -- -y --profile minimal >&2
        # shellcheck disable=SC1091
        [ ! -r "$HOME/.cargo/env" ] || . "$HOME/.cargo/env"
        rust_is_new_enough || rustup toolchain install stable --profile minimal >&2
    fi
}
