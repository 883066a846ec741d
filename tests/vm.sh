#!/usr/bin/env bash
# Runs tests inside a virtual machine with Debian's kernel, which has what many another kernel lacks: netem, WireGuard, br_netfilter, SCTP.
# They are the tests marked `kernel`, which are skipped where a feature is missing, and those marked `vm`, which there use the kernel's
# WireGuard instead of wireguard-go: see tests/conftest.py. A test that is skipped there has failed.
#
#   tests/vm.sh [PYTEST-ARGUMENT...]
#   tests/vm.sh --kernel               which kernel it takes
#
# virtme-ng boots the newest /boot/vmlinuz-*-amd64 on this machine's own file system, of which the virtual machine sees the files
# and changes none. The processor is emulated, always: that is slow, and it works, and is the same, on every machine. Exit status 1:
# a test failed, or the virtual machine ended before the tests did, or both took longer than LIMIT_S.
set -euo pipefail
cd "$(dirname "$0")/.."
LIMIT_S=3600

main() {
    local kernel status=0 begin=$SECONDS vm words
    ((EUID == 0)) || { echo "needs root" >&2; exit 1; }
    (($#)) || set -- tests/unit tests/integration tests/e2e tests/faults
    kernel=$(newest_kernel)
    [[ -n $kernel ]] || { echo "vm: no /boot/vmlinuz-*-amd64: apt-get install linux-image-amd64" >&2; exit 1; }
    scratch=$(mktemp -d /tmp/mncni-vm.XXXXXX)
    trap 'rm -rf "$scratch"' EXIT
    mkdir "$scratch/home" "$scratch/results"
    : >"$scratch/results/log"
    printf -v words '%q ' "$@"

    echo "vm: booting ${kernel#/boot/vmlinuz-}"
    # HOME: no settings of whoever runs this. pdeathsig and kill-child: nothing of it outlives this script.
    # Its own output is for the console alone, because virtme-ng loses parts of what it passes on. The log is a file on a shared directory.
    HOME=$scratch/home PATH=$PWD/.venv/bin:$PATH setpriv --pdeathsig KILL unshare --pid --fork --kill-child --mount-proc \
        timeout "$LIMIT_S" vng --run "$kernel" --verbose --disable-kvm --force-9p --cpus 2 --memory 2G --user root \
        --rwdir=/mnt="$scratch/results" --exec "tests/vm.sh --inside $words" </dev/null >"$scratch/console" 2>&1 &
    vm=$!
    tail --pid="$vm" --lines=+1 --follow "$scratch/results/log"
    wait "$vm" || status=$?
    verdict "$status" "${kernel#/boot/vmlinuz-}" $((SECONDS - begin))
}

# Not Debian's kernel for clouds, which lacks some of what this is about. Nothing is printed if there is none.
newest_kernel() { find /boot -name 'vmlinuz-*-amd64' ! -name '*-cloud-amd64' ! -name '*-rt-amd64' | sort --version-sort | tail -n 1; }

# The last line, and the exit status of the script. What counts is the status that the tests left; without one they did not end.
verdict() {
    local status=$1 kernel=$2 seconds=$3 tests=$scratch/results/status
    if [[ ! -e $tests ]]; then
        echo
        tail -n 40 "$scratch/console" >&2
        if ((status == 124)); then status="it was ended, for it may take $LIMIT_S s"; else status="exit status $status"; fi
        echo "vm: FAILED: Linux $kernel ended after $seconds s, before the tests did: $status; above, the end of its console" >&2
        exit 1
    fi
    echo "vm: Linux $kernel: $(counts), pytest's exit status $(<"$tests"), virtme-ng's $status, $seconds s in all"
    [[ $(<"$tests") == 0 && $status == 0 ]]
}

# pytest's last line, such as `=== 2 failed, 30 passed, 900 deselected in 12.34s ===`, without the decoration.
counts() { grep -oE '[0-9]+ [a-z]+(, [0-9]+ [a-z]+)* in [0-9.]+s' "$scratch/results/log" | tail -n 1 | grep . || echo "no tests"; }

# In the virtual machine, as its only work.
inside() {
    local status=0
    exec >>/mnt/log 2>&1
    export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root
    echo 5 >/proc/sys/kernel/printk  # what goes wrong in the kernel is on the console
    echo "vm: Linux $(uname -r) is up after $(cut -d' ' -f1 /proc/uptime) s"
    modprobe br_netfilter  # the one that nothing asks for by using it
    ip link set lo up
    export MNCNI_VM=1  # its clock is nobody else's
    .venv/bin/python -m pytest -p no:cacheprovider -m "kernel or vm" --no-skips "$@" || status=$?
    echo "$status" >/mnt/status.new
    mv /mnt/status.new /mnt/status
    exit "$status"
}

case ${1:-} in
    --inside) shift; inside "$@" ;;
    --kernel) newest_kernel ;;
    *) main "$@" ;;
esac
