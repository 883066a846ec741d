#!/usr/bin/env bash
# Builds the programs of a Kubernetes cluster from their sources on the Go module proxy. What is there already stays.
#
#   deploy/cluster/build.sh apiserver    kube-apiserver, etcd, kubectl, and the engine of deploy/network-policy: what tests on a real API
#                                        server need
#   deploy/cluster/build.sh cluster      the same, and all other programs that `make cluster` runs
#   deploy/cluster/build.sh e2e          the same, and Kubernetes' own tests with the programs that they run in pods
#   deploy/cluster/build.sh flannel      flannel alone, with which the bench of networks compares
#
# KUBERNETES_VERSION: such as 1.34.4, or 1.34 for its last one. CONTAINERD_VERSION, COREDNS_VERSION: as their releases are called.
# The programs are in bin/ of ${XDG_CACHE_HOME:-$HOME/.cache}/mncni-cluster, where bin/kubernetes leads to the version that was asked for last,
# and bin/apiserver to that of `apiserver`; bin/policy leads to the engine, bin/flannel to flannel.
set -euo pipefail
cd "$(dirname "$0")"
CONTAINERD_VERSION=${CONTAINERD_VERSION:-2.1.4}
COREDNS_VERSION=${COREDNS_VERSION:-1.12.1}
FLANNEL_VERSION=${FLANNEL_VERSION:-0.28.0}
POLICY_VERSION=$(sed -n 's/.*kube-network-policies:v//p' ../network-policy/daemonset.yaml)
CACHE=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/mncni-cluster
NEEDED_GB=12  # of disk, for sources and compiled parts
export GOFLAGS="-mod=mod -buildvcs=false"

K8S=k8s.io/kubernetes
APISERVER=("$K8S"/cmd/{kube-apiserver,kubectl} go.etcd.io/etcd/server/v3)
CLUSTER=("${APISERVER[@]}" "$K8S"/cmd/{kube-controller-manager,kube-scheduler,kubelet,kube-proxy})
E2E=("${CLUSTER[@]}" "$K8S"/test/{images/agnhost,images/regression-issue-74839,e2e} github.com/onsi/ginkgo/v2/ginkgo)
CONTAINERD=github.com/containerd/containerd/v2
COREDNS=github.com/coredns/coredns
POLICY=sigs.k8s.io/kube-network-policies
FLANNEL=github.com/flannel-io/flannel

main() {
    local packages link=kubernetes default=1.34.4  # the newest Kubernetes that takes cgroup v1 for granted
    case ${1:-} in
        apiserver) packages=("${APISERVER[@]}") link=apiserver default=1.30.14 ;;  # the oldest with what deploy/naivewg/policy.yaml needs
        cluster) packages=("${CLUSTER[@]}") ;;
        e2e) packages=("${E2E[@]}") ;;
        flannel) packages=() ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    mkdir -p "$CACHE/bin"
    exec 9>"$CACHE/lock"
    flock --nonblock 9 || { say "waiting for another build"; flock 9; }
    if [[ $1 == flannel ]]; then
        build flannel "$FLANNEL" "$FLANNEL_VERSION" "$FLANNEL"
        ln -sfn "$(basename "$BIN")" "$CACHE/bin/flannel"
        return
    fi
    build kubernetes "$K8S" "${KUBERNETES_VERSION:-$default}" "${packages[@]}"
    ln -sfn "$(basename "$BIN")" "$CACHE/bin/$link"
    build kube-network-policies "$POLICY" "$POLICY_VERSION" "$POLICY"/cmd/kube-network-policies/standard
    ln -sfn "$(basename "$BIN")" "$CACHE/bin/policy"
    [[ $1 != apiserver ]] || return 0
    build containerd "$CONTAINERD" "$CONTAINERD_VERSION" "$CONTAINERD"/cmd/{containerd,containerd-shim-runc-v2,ctr}
    ln -sfn "$(basename "$BIN")" "$CACHE/bin/containerd"
    build coredns "$COREDNS" "$COREDNS_VERSION" "$COREDNS"
    ln -sfn "$(basename "$BIN")" "$CACHE/bin/coredns"
}

say() { printf 'build: [%4d s] %s\n' "$SECONDS" "$*" >&2; }
die() { echo "build: $*" >&2; exit 1; }

# build NAME MODULE VERSION PACKAGE...: the programs that are missing in $BIN, which is this version's directory.
build() {
    local name=$1 module=$2 version=$3 package program missing=()
    shift 3
    [[ $version =~ ^[0-9]+\.[0-9]+(\.[0-9]+)?$ ]] || die "$name: $version is no version; such as 1.34 or 1.34.4"
    [[ $version == *.*.* ]] || version=$(newest "$name" "$module" "$version")
    BIN=$CACHE/bin/$name-$version
    for package in "$@"; do
        if [[ ! -x $BIN/$(program_of "$package") ]]; then missing+=("$package"); fi
    done
    ((${#missing[@]})) || return 0
    check_machine
    [[ -s $CACHE/build/$name-$version/go.mod ]] || describe "$name" "$module" "$version"
    mkdir -p "$BIN"
    for package in "${missing[@]}"; do
        program=$(program_of "$package")
        say "$name $version: $program"
        compile "$name" "$version" "$package" "$BIN/.$program.new" || die "$program $version does not build"
        mv "$BIN/.$program.new" "$BIN/$program"
    done
}

# The name of the program that a package makes.
program_of() { case $1 in */etcd/server/v3) echo etcd ;; */test/e2e) echo e2e.test ;; "$POLICY"/*) echo netpol ;; *) echo "${1##*/}" ;; esac; }

compile() {  # NAME VERSION PACKAGE FILE
    local stamp=k8s.io/component-base/version flags='-s -w'
    case $1 in
        kubernetes) flags+=" -X $stamp.gitVersion=v$2 -X $stamp.gitMajor=${2%%.*} -X $stamp.gitMinor=$(cut -d. -f2 <<<"$2")"
                    flags+=" -X $stamp.gitTreeState=clean -X $stamp.buildDate=2026-01-01T00:00:00Z" ;;
        containerd) flags+=" -X $CONTAINERD/version.Version=v$2" ;;
    esac
    local build=(build) cgo=0
    [[ $1 != flannel ]] || cgo=1  # one of its backends is in C: needs gcc
    [[ $3 != */test/e2e ]] || build=(test -c)
    (cd "$CACHE/build/$1-$2" && CGO_ENABLED=$cgo nice go "${build[@]}" -ldflags "$flags" -o "$4" "$3")
}

check_machine() {
    command -v go >/dev/null || die "needs go >= 1.21: https://go.dev/dl, or the package golang-go of Debian 13 or Ubuntu 24.04"
    [[ $(go env GOTOOLCHAIN) ]] || die "needs go >= 1.21, this is $(go version): https://go.dev/dl"
    local free
    free=$(df --output=avail -BG "$CACHE" | tail -n 1 | tr -dc 0-9)
    ((free >= NEEDED_GB)) || die "needs $NEEDED_GB GB of disk for $CACHE and Go's own caches, and there are $free"
}

# The last version of a minor one, on the proxy or, without a network, in the cache.
newest() {  # NAME MODULE MINOR
    check_machine
    local found
    if found=$(cd /tmp && go list -m -f '{{.Version}}' "$2@v$3" 2>/dev/null); then echo "${found#v}"; return; fi
    found=$(cd "$CACHE/bin" && printf '%s\n' "$1-$3".* | sort -V | tail -n 1)
    [[ -d $CACHE/bin/$found ]] || die "$1: the Go module proxy has no version $3, or is out of reach"
    echo "${found#"$1"-}"
}

# Write the go.mod of a module that requires the one to build, in the version, with the checksums that the module has for what it requires.
describe() {  # NAME MODULE VERSION
    local found mod
    found=$(go mod download -json "$2@v$3" 2>/dev/null) || true
    mod=$(sed -n 's/.*"GoMod": "\(.*\)".*/\1/p' <<<"$found")
    [[ $mod ]] || die "$1: the Go module proxy has no version $3, or is out of reach"
    mkdir -p "$CACHE/build/$1-$3"
    cat "$(sed -n 's/.*"Dir": "\(.*\)".*/\1/p' <<<"$found")/go.sum" >"$CACHE/build/$1-$3/go.sum"
    {
        printf 'module cluster\nrequire %s v%s\n' "$2" "$3"
        sed -n '/^go /p; /^godebug [a-z]/p; /^godebug (/,/^)/p' "$mod"
        # Kubernetes names its own parts by paths in its repository; on the proxy they are modules of version 0.x.
        sed -n "s#^\t\(k8s.io/[a-z-]*\) => ./staging.*#replace \1 => \1 v0.${3#*.}#p" "$mod" | sort -u
    } >"$CACHE/build/$1-$3/go.mod"
}

main "$@"
