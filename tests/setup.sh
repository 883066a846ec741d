#!/usr/bin/env bash
# Set-up for the Makefile: checks what a target needs and, as root with apt-get, installs what is missing.
#
#   tests/setup.sh demo      system tools of the demo and the lab
#   tests/setup.sh test      the same, the reference CNI plugins to compare with, PyYAML, bpftrace, strace, pgrep, and .venv with pytest
#   tests/setup.sh runtimes  the same, containerd, podman, and what tests need to drive them
#   tests/setup.sh lint      shellcheck, and .venv with ruff
#   tests/setup.sh venv      .venv alone
#   tests/setup.sh matrix    debootstrap and what else tests/matrix.sh needs
#   tests/setup.sh vm        an emulator, Debian's kernel and what else tests/vm.sh needs, and .venv with virtme-ng, too
#   tests/setup.sh cluster   what deploy/cluster needs, but for Go, of which distributions have old versions, and .venv
#   tests/setup.sh ci        all of it, and make
#
# When all is there it prints nothing and takes milliseconds, so every target can call it every time.
# Without root it prints the command to run instead; then `demo`, `matrix`, `vm` and `cluster` stop, the others go on with what can run.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin  # Debian keeps ip, tc and nft there, which are not on an ordinary user's PATH
PYTHON=${PYTHON:-/usr/bin/python3}

missing_tools=()
missing_packages=()

main() {
    case ${1:-} in
        demo) need_lab_tools; provide || exit 1
              need_wireguard; provide || exit 1 ;;
        test) need_lab_tools; need openssl openssl; need pgrep procps; need_reference_plugins; need_tracers; need_yaml; need_venv_module; provide || go_on
              need_wireguard; provide || go_on
              make_venv ;;
        runtimes) need_lab_tools; need_reference_plugins; need_runtimes; need_venv_module; provide || go_on
              need_wireguard; provide || go_on
              make_venv ;;
        lint) need shellcheck shellcheck; need_venv_module; provide || go_on
              make_venv ;;
        venv) need_venv_module; provide || go_on
              make_venv ;;
        matrix) need_matrix_tools; provide || exit 1
              need_wireguard; provide || exit 1 ;;
        vm)   need_lab_tools; need pgrep procps; need_tracers; need_vm_tools; need_venv_module; provide || exit 1
              make_venv
              add_virtme ;;
        cluster) need_lab_tools; need openssl openssl; need_matrix_tools; need_venv_module; provide || exit 1
              make_venv ;;
        ci)   need make make; need shellcheck shellcheck; need_matrix_tools; need_runtimes
              main test ;;
        *)    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
}

say() { echo "set-up: $*" >&2; }
die() { say "$@"; exit 1; }
is_root() { ((EUID == 0)); }
has() { command -v "$1" >/dev/null; }

# ---- what is needed: each need_* notes what is missing, and its Debian and Ubuntu package ----

note_missing() { missing_tools+=("$1"); missing_packages+=("$2"); }
need() { has "$1" || note_missing "$1" "$2"; }

need_lab_tools() {
    need "$PYTHON" python3
    need ip iproute2
    need tc iproute2
    need nsenter util-linux
    need unshare util-linux
    need mount mount
    need pivot_root util-linux-extra  # older systems have it in util-linux
    need nft nftables
    need wg wireguard-tools
    need ping iputils-ping
}

need_reference_plugins() {
    [[ -x /opt/cni/bin/host-local || -x /usr/lib/cni/host-local ]] || note_missing "reference CNI plugins" containernetworking-plugins
    # Reads the agent's metrics as Prometheus does. Of the distribution's python3, like PyYAML below.
    /usr/bin/python3 -c 'import prometheus_client' 2>/dev/null || note_missing "a parser of metrics" python3-prometheus-client
}

# What cnisnoop.py traces with. Only root can.
need_tracers() {
    if ! is_root; then return; fi
    need bpftrace bpftrace
    need strace strace
}

# Where podman has its CNI backend: before 5. The last two are for a CRI client.
need_runtimes() {
    need containerd containerd
    need runc runc
    need podman podman
    need busybox busybox-static
    need protoc protobuf-compiler
    /usr/bin/python3 -c 'import google.protobuf, grpc' 2>/dev/null || note_missing "gRPC for Python" python3-grpcio
    /usr/bin/python3 -c 'import google.protobuf' 2>/dev/null || note_missing "protobuf for Python" python3-protobuf
}

need_matrix_tools() {
    need debootstrap debootstrap
    [[ -e /usr/share/keyrings/debian-archive-keyring.gpg ]] || note_missing "Debian's archive keys" debian-archive-keyring
    need git git
    need unshare util-linux
    need mount mount
    need_yaml
}

# To read manifests and what deploy/node-image/cloud-init.sh prints. Of the distribution's python3, whatever PYTHON is: no package from PyPI.
need_yaml() { /usr/bin/python3 -c 'import yaml' 2>/dev/null || note_missing "PyYAML" python3-yaml; }

need_vm_tools() {
    [[ $(uname -m) == x86_64 ]] || die "the virtual machine is for x86_64, this is $(uname -m)"
    need qemu-system-x86_64 qemu-system-x86
    need modprobe kmod
    need udevadm udev
    need file file  # virtme-ng asks it for the kernel's version
    # One that needs no library: it is all that there is in the first seconds.
    if ! has busybox || ldd "$(command -v busybox)" 2>/dev/null | grep -q '=>'; then note_missing "a static busybox" busybox-static; fi
    # On Ubuntu there is no such package, so no such lane.
    [[ -n $(tests/vm.sh --kernel) ]] || note_missing "Debian's kernel" linux-image-amd64
}

# WireGuard is in nearly every kernel; wireguard-go is for the others.
# An ordinary user is not bothered with it: they can make no device of either kind.
need_wireguard() {
    if ! is_root || ! has ip || has wireguard-go || kernel_has_wireguard; then return; fi
    note_missing "WireGuard in the kernel or wireguard-go" wireguard-go
}

# Tries it for real, which also loads the module. The namespace is gone with the process, whatever happens.
kernel_has_wireguard() { unshare --net ip link add probe type wireguard 2>/dev/null; }

# Debian's python3 has `venv` but not `ensurepip`, without which there is no pip in the environment.
need_venv_module() { venv_is_current || has_venv_module || note_missing "Python's ensurepip" python3-venv; }
has_venv_module() { "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; }

# ---- system packages ----

# Installs what was noted, if it can; 1 = something is still missing, and a line said so.
provide() {
    ((${#missing_tools[@]})) || return 0
    local what packages
    what=$(printf '%s, ' "${missing_tools[@]}")
    mapfile -t packages < <(printf '%s\n' "${missing_packages[@]}" | sort -u)
    missing_tools=() missing_packages=()
    if is_root && has apt-get; then
        say "missing: ${what%, }; installing with apt-get: ${packages[*]}"
        apt_install "${packages[@]}"
        return
    fi
    say "missing: ${what%, }"
    if has apt-get; then
        say "to install, as root:  apt-get update && apt-get install --no-install-recommends ${packages[*]}"
    else
        say "no apt-get here; what they are called in Debian: ${packages[*]}"
    fi
    return 1
}

apt_install() {
    local apt=(apt-get -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300) output attempt
    export DEBIAN_FRONTEND=noninteractive
    forbid_services
    for attempt in 1 2 3; do
        # The lists of a fresh machine are absent or old; where they are good, an update would take longest.
        ((attempt == 1)) || output=$("${apt[@]}" update 2>&1 </dev/null) || continue
        output=$("${apt[@]}" install -y --no-install-recommends "$@" 2>&1 </dev/null) && { allow_services; return; }
    done
    allow_services
    printf '%s\n' "$output" | tail -n 20 >&2
    say "apt-get could not install: $*"
    return 1
}

# What is installed for tests starts no service, neither now nor at the next boot: containerd and podman bring some.
forbid_services() {
    units=$(list_enabled_units)
    if [[ ! -e /usr/sbin/policy-rc.d ]]; then  # invoke-rc.d(8) and deb-systemd-invoke ask it
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
    fi
}
allow_services() {
    comm -13 <(echo "$units") <(list_enabled_units) | xargs --no-run-if-empty rm --
    if [[ $(trap -p EXIT) ]]; then rm -f /usr/sbin/policy-rc.d; trap - EXIT; fi
}
list_enabled_units() { find /etc/systemd/system -type l -path '*.wants/*' 2>/dev/null | sort; }

# In CI nobody reads why tests were left out, so there root must have everything.
go_on() {
    if is_root && [[ ${CI:-} == true ]]; then die "CI=true: not going on without it"; fi
    venv_is_current || has_venv_module || die "cannot go on: .venv needs the package python3-venv"
    say "going on with what can run"
}

# ---- the virtual environment ----

# It belongs to one interpreter and one list of requirements. Contents are compared, because git sets no useful times.
venv_stamp() { readlink -f "$(command -v "$PYTHON")"; cat tests/requirements.txt; }
venv_is_current() { [[ -x .venv/bin/python && -r .venv/stamp && $(<.venv/stamp) == "$(venv_stamp)" ]]; }

make_venv() {
    venv_is_current && return
    has "$PYTHON" || die "there is no $PYTHON; to use another Python >= 3.9:  make PYTHON=/path/to/python3 ..."
    has_venv_module || die "cannot make .venv: $PYTHON has no ensurepip (Debian's python3: package python3-venv)"
    if [[ -e .venv && ! -w .venv ]]; then
        die "cannot renew .venv: it belongs to $(stat -c %U .venv), not to you; remove it as root:  rm -rf $PWD/.venv"
    elif [[ ! -w . ]]; then
        die "cannot make .venv: $PWD belongs to $(stat -c %U .), not to you; use a clone of your own"
    fi
    exec 9<tests/requirements.txt
    flock 9  # two runs of make in one checkout
    venv_is_current && return
    say "making .venv with $PYTHON: pytest, pytest-mock, ruff from PyPI"
    "$PYTHON" -m venv --clear .venv || die "cannot make .venv with $PYTHON"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --requirement tests/requirements.txt ||
        die "pip could not install tests/requirements.txt from PyPI"
    venv_stamp >.venv/stamp
    # After `sudo make test` the environment belongs to whoever owns the checkout. -h: not the interpreter it links to.
    if is_root && [[ ! -O . ]]; then chown -R -h --reference=. .venv; fi
}

# What it was made from is kept beside it, so it is gone when the environment is made anew.
add_virtme() {
    if cmp -s tests/requirements-vm.txt .venv/requirements-vm.txt; then return; fi
    say "adding to .venv: virtme-ng from PyPI"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --requirement tests/requirements-vm.txt ||
        die "pip could not install tests/requirements-vm.txt from PyPI"
    cp tests/requirements-vm.txt .venv/
    if is_root && [[ ! -O . ]]; then chown -R -h --reference=. .venv; fi
}

main "$@"
