#!/usr/bin/env bash
# Builds a real kube-apiserver, its etcd and kubectl into .kubernetes, for the tests that install MNCNI on it. Their sources come from the
# Go module proxy. Needs go >= 1.22, some 3 GB of disk, and 5 to 20 minutes; what is there already stays.
set -euo pipefail
cd "$(dirname "$0")/.."
VERSION=${KUBERNETES_VERSION:-1.30.14}  # the oldest that has what deploy/naivewg/policy.yaml needs
export GOFLAGS=-mod=mod CGO_ENABLED=0

command -v go >/dev/null || { echo "needs go >= 1.22: https://go.dev/dl, or Debian 13's golang-go" >&2; exit 1; }
if [[ -x .kubernetes/kubectl && $(cat .kubernetes/version 2>/dev/null) == "$VERSION" ]]; then exit; fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p .kubernetes
target=$PWD/.kubernetes
cd "$scratch"
printf 'module kubernetes\ngo 1.22.0\nrequire k8s.io/kubernetes v%s\n' "$VERSION" >go.mod
# Kubernetes names its own parts by paths in its repository; on the proxy they are modules of version 0.x.
mod=$(go mod download -json "k8s.io/kubernetes@v$VERSION" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
sed -n "s#^\t\(k8s.io/[a-z-]*\) => ./staging.*#replace \1 => \1 v0.${VERSION#*.}#p" "$mod" | sort -u >>go.mod
stamp=k8s.io/component-base/version
flags="-s -w -X $stamp.gitVersion=v$VERSION -X $stamp.gitMajor=1 -X $stamp.gitMinor=$(cut -d. -f2 <<<"$VERSION")"
for program in kube-apiserver kubectl; do
    echo "building $program $VERSION"
    nice go build -ldflags "$flags" -o "$target/$program" "k8s.io/kubernetes/cmd/$program"
done
echo "building etcd"
nice go build -ldflags "-s -w" -o "$target/etcd" go.etcd.io/etcd/server/v3
echo "$VERSION" >"$target/version"
