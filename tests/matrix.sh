#!/usr/bin/env bash
# Runs `make test` as root on each Debian that has a Python we promise: 3.9, 3.11, 3.13, 3.14, each with its own ip, nft and wg.
#
#   tests/matrix.sh [--refresh] [SUITE...] [-- PYTEST-ARGUMENT...]      default: bullseye bookworm trixie sid
#
# Each suite gets a minimal system from tests/debian-root.sh (--refresh: built anew), on a tmpfs of about 1 GB, in mount and
# PID namespaces of its own: whatever kills this, nothing stays behind. There the checkout is copied, uncommitted files too.
# The network namespace is the machine's, so that apt and pip work; tests make their own. Exit status 1: not all is well.
set -euo pipefail
cd "$(dirname "$0")/.."

SUITES=(bullseye bookworm trixie sid)
CA=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
# Of the environment, what apt and pip need to get out of here. Everything else stays out: each suite is a fresh machine.
CARRIED=(http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY
    PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST PIP_DEFAULT_TIMEOUT)

main() {
    local refresh=() suites=() status=0 suite
    while (($#)); do
        case $1 in
            --refresh) refresh=(--refresh) ;;
            --) shift; break ;;
            -*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
            *) suites+=("$1") ;;
        esac
        shift
    done
    ((${#suites[@]})) || suites=("${SUITES[@]}")
    ((EUID == 0)) || { echo "needs root" >&2; exit 1; }

    scratch=$(mktemp -d /tmp/mncni-matrix.XXXXXX)
    trap 'rm -rf --one-file-system "$scratch"' EXIT
    mkdir "$scratch/root"
    for suite in "${suites[@]}"; do
        printf '\n#### Debian %s\n' "$suite"
        run_suite "$suite" "${refresh[@]}" -- "$@" || status=1
    done
    printf '\n'
    column -t -s '|' <(echo 'suite|python|iproute2|nft|wg|passed|failed|skipped|seconds|') "$scratch/table"
    exit "$status"
}

# One suite, and its line in the table. It must not depend on `set -e`, which means nothing in a function called before `||`.
run_suite() {
    local suite=$1 begin=$SECONDS status=0 tarball verdict
    shift
    local build=()
    while [[ $1 != -- ]]; do build+=("$1"); shift; done
    : >"$scratch/versions"
    : >"$scratch/log"
    if tarball=$(tests/debian-root.sh "${build[@]}" "$suite"); then
        # </dev/null: nobody answers questions. The log is for the counts; the person sees all of it at once.
        # pdeathsig: unshare passes no signal on, but whoever kills this script means all of it.
        setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child \
            "$0" --inside "$suite" "$tarball" "$scratch" "${@:2}" </dev/null 2>&1 | tee "$scratch/log"
        status=${PIPESTATUS[0]}
    fi
    verdict=$(look_summary)
    if [[ ! $verdict ]]; then verdict='did not run' status=1; elif ((status)); then verdict=FAILED; else verdict=''; fi
    printf '%s|%s|%s|%s|%s|%s|%s\n' "$suite" "$(versions)" "$(count passed)" "$(count 'failed|errors?')" "$(count skipped)" \
        $((SECONDS - begin)) "$verdict" >>"$scratch/table"
    return "$status"
}

# pytest's last line, such as `=== 2 failed, 300 passed, 1 skipped in 12.34s ===`.
look_summary() { grep -E '(no tests ran|[0-9]+ [a-z]+) in [0-9.]+s' "$scratch/log" | tail -n 1; }

# A figure of that line; several words are summed up.
count() { look_summary | grep -oE "[0-9]+ ($1)" | awk '{ sum += $1 } END { print sum + 0 }'; }

# What `print_versions` left: four words, or dashes if it did not get that far.
versions() { if [[ -s $scratch/versions ]]; then cat "$scratch/versions"; else echo '-|-|-|-'; fi; }

# PID 1 of the new namespaces.
inside() {
    local suite=$1 tarball=$2 scratch=$3 root=$3/root name words='' status=0
    shift 3
    mount -t tmpfs -o mode=755 tmpfs "$root"
    tar --directory="$root" --extract --gunzip --file="$tarball"
    carry_configuration "$root"
    [[ $suite != bullseye ]] || lend_wireguard "$root"
    mkdir "$root/root/mncni"
    # safe.directory: the checkout may belong to the user who called sudo. A file deleted but not committed is only a warning.
    git -c safe.directory='*' ls-files -z --cached --others --exclude-standard |
        tar --null --ignore-failed-read --files-from=- --create | tar --directory="$root/root/mncni" --extract --no-same-owner

    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --bind /dev "$root/dev"
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount -t tmpfs -o mode=755 tmpfs "$root/run"
    exec 3>"$scratch/versions"
    mkdir "$root/.old"
    cd "$root"
    pivot_root . .old  # not chroot: entering another mount namespace, as the lab does, would lead out of that
    # CI: what root cannot have is an error there, not a skipped test.
    local keep=(CI=true HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
    for name in "${CARRIED[@]}"; do [[ -z ${!name:-} ]] || keep+=("$name=${!name}"); done
    if [[ -e /etc/ssl/machine.crt ]]; then
        for name in PIP_CERT SSL_CERT_FILE REQUESTS_CA_BUNDLE; do keep+=("$name=/etc/ssl/machine.crt"); done
    fi
    umount -l /.old
    rmdir /.old
    cd /root/mncni
    (($# == 0)) || words=$(printf '%q ' "$@")
    env -i "${keep[@]}" make test ARGS="$words" 3>&- || status=$?
    print_versions >&3
    exit "$status"
}

# Names, certificates, apt and pip as on this machine: it may have a proxy, a mirror, an authority of its own.
carry_configuration() {
    cp -L /etc/resolv.conf /etc/hosts "$1/etc/"
    if [[ -r $CA ]]; then cp -L "$CA" "$1/etc/ssl/machine.crt"; fi
    if [[ -r /etc/pip.conf ]]; then cp -L /etc/pip.conf "$1/etc/"; fi
    if command -v apt-config >/dev/null; then  # not its programs that find a proxy: they are not there
        apt-config dump | grep -E '^Acquire::(https?::|ftp::|Check-|Retries|ForceIPv)' | grep -v 'Auto-\?Detect' |
            sed "s#\(CAInfo\) \".*\"#\1 \"/etc/ssl/machine.crt\"#" >"$1/etc/apt/apt.conf.d/99machine" || true
    fi
}

# Debian 11 has no package of wireguard-go. The kernel is the machine's, so what stands in for a part of it may be, too.
# Programs of a newer Debian need their own C library.
lend_wireguard() {
    local program lib=$1/usr/local/lib/machine
    if unshare --net ip link add probe type wireguard 2>/dev/null || ! program=$(command -v wireguard-go); then return; fi
    mkdir "$lib"
    ldd "$program" | grep -oE '/[^ ]+' | xargs cp -L -t "$lib" "$program"
    cat >"$1/usr/local/bin/wireguard-go" <<'WRAPPER'
#!/bin/sh
lib=/usr/local/lib/machine
exec $lib/ld-* --library-path $lib $lib/wireguard-go "$@"
WRAPPER
    chmod +x "$1/usr/local/bin/wireguard-go"
}

print_versions() {
    local found
    for found in "$(python3 -V)" "$(ip -V)" "$(nft --version)" "$(wg --version)"; do
        printf '%s\n' "$found" | grep -oE '[0-9]+(\.[0-9]+)+' | head -n 1
    done | paste -s -d '|'
}

if [[ ${1:-} == --inside ]]; then shift; inside "$@"; else main "$@"; fi
