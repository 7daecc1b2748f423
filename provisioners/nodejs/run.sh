#!/bin/sh
# Node.js, npm and npm packages for everyone.
set -eu
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. ./lib.sh

version=$KILN_INPUT_VERSION
packages=$KILN_INPUT_PACKAGES

case $version in
  distro | [1-9][0-9]) ;;
  *) invalid version "\"$version\" is neither \"distro\" nor a major version such as \"22\"" ;;
esac
check_package() {
  case $1 in
    -* | *[[:space:]]*) invalid packages "\"$1\" is not the name of an npm package" ;;
  esac
}
each "$packages" check_package
npm=$KILN_INPUT_NPM
if [ -n "$packages" ]; then
  npm=true
fi

# NodeSource's keys change about once in ten years. The one for apt is here whole; the one for rpm, which is
# fetched, is known by its fingerprint.
nodesource_rpm_fingerprint=242B813831AF09562B6C46F76B88DA4E3AF28A14
nodesource_apt_key() {
  cat <<'KEY'
-----BEGIN PGP PUBLIC KEY BLOCK-----

mQENBFdDN1ABCADaNd/I3j3tn40deQNgz7hB2NvT+syXe6k4ZmdiEcOfBvFrkS8B
hNS67t93etHsxEy7E0qwsZH32bKazMqe9zDwoa3aVImryjh6SHC9lMtW27JPHFeM
Srkt9YmH1WMwWcRO6eSY9B3PpazquhnvbammLuUojXRIxkDroy6Fw4UKmUNSRr32
9Ej87jRoR1B2/57Kfp2Y4+vFGGzSvh3AFQpBHq51qsNHALU6+8PjLfIt+5TPvaWR
TB+kAZnQZkaIQM2nr1n3oj6ak2RATY/+kjLizgFWzgEfbCrbsyq68UoY5FPBnu4Z
E3iDZpaIqwKr0seUC7iA1xM5eHi5kty1oB7HABEBAAG0Ik5Tb2xpZCA8bnNvbGlk
LWdwZ0Bub2Rlc291cmNlLmNvbT6JAU4EEwEKADgCGwMCHgECF4AWIQRvcfUlKChB
7tr4UbQvWbX5mxvgtAUCaWfGnwULCQgHAgYVCgkICwIEFgIDAQAKCRAvWbX5mxvg
tL0CB/0TTur63uXTPbq+JBQET6jnEVaDrNmpHI/z2RMuj163gmy9CtCwG060c+TI
qzmzlPacbTkGc5C50teX2mhs+5JIthfhMibR6Dgy0zeSVuvt9WJ3TNWBpoW5Ezka
17SA3Xv9UEJS2eyRd7ALf7TGGAj8DG+xRABXl6bJIXh1s7Hki7kwgVrpNxm/EqyX
OrzExm0g2UjgdkbnZrnTyZMB6X8f8fZPo0QcByPvLee2DtkKeE+SZlFXyvnCzcw0
94K45vlWkEdRzmiiWAG7guzZyZYGcCO5EoJ3LUP90qhrmQUfsbtczeoEW17EW1jM
RohLo8BqVyYc1CAFlULIDNeS3aipuQENBFdDN1ABCACq02gutmss6jiD2u50vdAR
x3JOGd92trWRf7qH9/MTToslhoU/LiXhaE0x5+UkKuRbcruCtytn226brvwD0BdO
QGpY81ZAxjTFuKUpIDmrHcrI/N9XLrLKx19kWEttsIPNJOgvx8JoeReOX2hLjcbF
fmz8e6D1K7eZ+hjMfOLxD94tfhQwYtKbfwf0JwxQV5ItQRryd+X+TcA3nyvFWiJ8
Vz92Tf1iG7Z+XasaaZFf2JDuxoiZaSZY7va395ClCEMykFsRbGwgDyB6Fr+6x/UU
sYA4rYV7RumIOUdWngWyWjzVy/cKSWASW4jI5ABWs+AfeRTqmZt6+6B7oIghrB19
ABEBAAGJAR8EGAECAAkFAldDN1ACGwwACgkQL1m1+Zsb4LRPzgf9FTfPA0d2N37q
su5av3bYZJ+w6pvWF3aK2Zdy9ednhCBfPNmhvBRN6mXWixo0DuKEoQMjVpkX0hrq
B9FxEVwCPZ9K/JuJgzMROq7T+7R3rcv+TPMdwk8rjIMeRiw2hFLwbrJ0w/v7/3wT
MESv3GfXbuT0huEedK7bLfqGMgtmqMeCNkoI7Rf3GO2xArGQ6Zc2rTd4L9+D5HHS
IPEixwFZS+Debc7pg3os0bKXEsqMtitvocClOAuPnXpCy04PK450UTr6ZVdirWhJ
Oq8SrSERQwqEJ4PMHybiDKwzSr6mcBURre3G71uTAp7h/DISLTpfVMadcB6eoLWr
/4fBqejAWg==
=wh5k
-----END PGP PUBLIC KEY BLOCK-----
KEY
}

nodesource_apt() {
  pkg_install ca-certificates
  nodesource_apt_key | put_file /etc/apt/keyrings/nodesource.asc
  put_file /etc/apt/sources.list.d/nodesource.sources <<CONF
Types: deb
URIs: https://deb.nodesource.com/node_$version.x
Suites: nodistro
Components: main
Architectures: $(dpkg --print-architecture)
Signed-By: /etc/apt/keyrings/nodesource.asc
CONF
  # Whatever version the distribution offers later on, this one was asked for.
  put_file /etc/apt/preferences.d/nodesource <<'CONF'
Package: nodejs
Pin: origin deb.nodesource.com
Pin-Priority: 600
CONF
  pkg_refresh
  node_now=$(dpkg-query -W -f '${Version}' nodejs 2>/dev/null || :)
  case $node_now in
    "$version".*nodesource*) ;;
    *) pkg_transaction "install Node.js $version from NodeSource" apt_get install --no-install-recommends --allow-downgrades nodejs ;;
  esac
}

nodesource_rpm() {
  key=/etc/pki/rpm-gpg/RPM-GPG-KEY-nodesource
  if [ ! -e "$key" ]; then
    has curl || pkg_install curl
    has gpg || pkg_install gnupg2
    work=$(mktemp -d)
    retry curl -fsS -o "$work/key" https://rpm.nodesource.com/gpgkey/ns-operations-public.key ||
      pkg_unreachable "fetch NodeSource's key"
    fingerprint=$(GNUPGHOME=$work gpg --show-keys --with-colons "$work/key" | awk -F: '$1 == "fpr" { print $10; exit }')
    if [ "$fingerprint" != "$nodesource_rpm_fingerprint" ]; then
      rm -rf "$work"
      die "NodeSource's key is not the one that was expected (got ${fingerprint:-none}, expected $nodesource_rpm_fingerprint)"
    fi
    put_file "$key" <"$work/key"
    rm -rf "$work"
  fi
  # module_hotfixes: EL's modules would hide packages from elsewhere.
  put_file /etc/yum.repos.d/nodesource.repo <<CONF
[nodesource-nodejs]
name=Node.js $version from NodeSource
baseurl=https://rpm.nodesource.com/pub_$version.x/nodistro/nodejs/$(uname -m)
enabled=1
priority=9
gpgcheck=1
gpgkey=file://$key
module_hotfixes=1
CONF
  node_now=$(rpm -q --qf '%{VERSION}' nodejs 2>/dev/null || :)
  case $node_now in
    "$version".*) return ;;
  esac
  pkg_refresh again
  # A distribution's npm belongs to its own Node.js.
  if [ -n "$node_now" ]; then
    "$PKG" -y remove nodejs npm </dev/null
  fi
  pkg_install nodejs
}

npm_package() {
  if npm ls --global --depth=0 "$1" >/dev/null 2>&1 </dev/null; then
    return
  fi
  say "installing $1"
  retry npm install --global --loglevel=error "$1" </dev/null || pkg_unreachable "install the npm package $1"
}

pkg_detect
case $PKG-$version in
  apt-get-distro | dnf-distro | yum-distro)
    pkg_install nodejs
    if [ "$npm" = true ] && ! has npm; then
      pkg_install npm
    fi
    # Without it Fedora's Node.js knows only English.
    if [ "$PKG" = dnf ] && ! pkg_installed nodejs-full-i18n && pkg_available nodejs-full-i18n; then
      pkg_install nodejs-full-i18n
    fi
    ;;
  zypper-*)
    # SUSE: nodejs-default follows the distribution, nodejs22 is a major version.
    suffix=$([ "$version" = distro ] && echo -default || echo "$version")
    pkg_install "nodejs$suffix"
    if [ "$npm" = true ]; then
      pkg_install "npm$suffix"
    fi
    ;;
  apt-get-*) nodesource_apt ;;
  *) nodesource_rpm ;;
esac

has node || die "the packages are installed, but there is no \`node\` on the PATH"
say "node $(node --version)"

if [ -n "$packages" ]; then
  has npm || die "there is no \`npm\` on the PATH"
  npm_cache=$(mktemp -d)
  trap 'rm -rf "$npm_cache"' EXIT
  npm_config_cache=$npm_cache npm_config_update_notifier=false npm_config_fund=false npm_config_audit=false
  # npm's own patience lasts for minutes; `retry` has one of its own.
  npm_config_fetch_retries=1 npm_config_fetch_retry_mintimeout=1000 npm_config_fetch_retry_maxtimeout=5000
  export npm_config_cache npm_config_update_notifier npm_config_fund npm_config_audit
  export npm_config_fetch_retries npm_config_fetch_retry_mintimeout npm_config_fetch_retry_maxtimeout
  each "$packages" npm_package
fi
