#!/usr/bin/env bash
# Prints the path of a tarball with a minimal Debian, and builds it with debootstrap if there is none. As root.
# For tests/matrix.sh, for the nodes and images of deploy/cluster, and for the tests that need a system to change.
#
#   tests/debian-root.sh [--cached | --refresh] SUITE [PACKAGE...]     SUITE: bullseye, bookworm, trixie, sid
#
#   --cached    never download: the tarball that is there, of whatever age, or exit status 1
#   --refresh   build it anew, whatever its age
#
# DEBIAN_MIRROR is where packages come from. Tarballs are kept for two weeks below ${XDG_CACHE_HOME:-$HOME/.cache}/mncni.
set -euo pipefail
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/mncni
keep_days=14
# What every node has, and what `make test` may expect; all else is for tests/setup.sh to install.
packages=(ca-certificates iproute2 make nftables python3)

say() { echo "debian-root: $*" >&2; }
die() { say "$@"; exit 1; }

# In a mount namespace of its own, on a tmpfs: whatever kills this, no half-made system and no mount stays.
build_inside() {
    local suite=$1 tarball=$2 root
    shift 2
    root=$(dirname "$tarball")/build
    mkdir -p "$root"
    mount -t tmpfs -o mode=755 tmpfs "$root"
    # Before debootstrap asks the mirror: the proxy that this machine's apt uses. `apt-config shell` prints an assignment.
    if [[ -z ${http_proxy:-} ]] && command -v apt-config >/dev/null; then
        eval "$(apt-config shell http_proxy Acquire::http::Proxy)"
        export http_proxy
    fi
    # Named, because without the file debootstrap would go on and check no signature.
    debootstrap --variant=minbase --include="$(IFS=,; echo "$*")" --keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
        "$suite" "$root" "$mirror" >"$tarball.log" 2>&1 ||
        { tail -n 20 "$tarball.log" >&2; die "debootstrap could not build $suite from $mirror"; }
    rm -rf "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    # Numbers of users only: what their names mean on this machine is not what they mean there.
    tar --directory="$root" --numeric-owner --create . | gzip -1 >"$tarball"
}

if [[ ${1:-} == --inside ]]; then build_inside "${@:2}"; exit; fi

mode=''
case ${1:-} in --cached | --refresh) mode=$1; shift ;; esac
suite=${1:-}
[[ $suite =~ ^[a-z]+$ ]] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }

packages+=("${@:2}")

# The recipe is part of the name: a tarball made by another one is not found.
recipe=$(cksum <<<"${packages[*]} $(uname -m)")
tarball=$cache/debian-$suite-${recipe%% *}.tar.gz

is_good() { [[ -e $tarball ]] && gzip --test "$tarball" 2>/dev/null; }
is_new() { [[ -n $(find "$tarball" -mtime "-$keep_days") ]]; }

if [[ $mode == --cached ]]; then
    is_good || die "there is no Debian $suite in $cache"
elif [[ $mode == --refresh ]] || ! is_good || ! is_new; then
    ((EUID == 0)) || die "needs root to build Debian $suite"
    mkdir -p "$cache"
    exec 9>"$cache/lock"
    flock 9
    if [[ $mode == --refresh ]] || ! is_good || ! is_new; then  # nobody else made it meanwhile
        say "building Debian $suite"
        fresh=$(mktemp -d "$cache/new.XXXXXX")
        trap 'rm -rf "$fresh"' EXIT
        setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child \
            "$0" --inside "$suite" "$fresh/root.tar.gz" "${packages[@]}" 9>&-
        find "$cache" -name 'debian-*.tar.gz' -mtime "+$keep_days" -delete  # of other recipes, too
        sync "$fresh/root.tar.gz"
        mv "$fresh/root.tar.gz" "$tarball"
    fi
fi
echo "$tarball"
