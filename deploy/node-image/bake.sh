#!/usr/bin/env bash
# Puts MNCNI into a system that is not running: a node image, mounted at ROOT. With ROOT / into the one that runs. As root.
#
#   deploy/node-image/bake.sh [--apt] ROOT CONFLIST
#
#   --apt   install the packages that ROOT lacks with its own apt-get; without it they are named, and nothing is changed
#
# Needs python3 here and there. Programs of ROOT run by chroot, so it has to be of this machine's architecture.
set -euo pipefail
export LC_ALL=C  # file names sort as they do for a runtime
mncni=$(dirname "$(realpath "$0")")/../../mncni.py name=10-mncni.conflist

die() { echo "bake: $*" >&2; exit 1; }
in_root() { chroot "$root" /usr/bin/env PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"; }
has() { in_root sh -c "command -v $1" >/dev/null; }

if [[ ${1:-} == --apt ]]; then apt=1; shift; else apt=''; fi
[[ $# == 2 ]] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=${1%/}/ conflist=$2 conf_dir=${1%/}/etc/cni/net.d bin_dir=${1%/}/opt/cni/bin
((EUID == 0)) || die "needs root"
[[ -x ${root}bin/sh ]] || die "there is no system at $root: it has no /bin/sh"

# To explain it is to check it, for each plugin of ours reads its part. What it would run says which tools it needs.
script=$(python3 -IS "$mncni" explain "$conflist") || die "$conflist does not work"
types=$(python3 -IS -c 'import json, sys; print(*(p["type"] for p in json.load(open(sys.argv[1]))["plugins"]))' "$conflist" 2>/dev/null) ||
    die "$conflist is no list of plugins"
for type in $types; do
    [[ $type =~ ^(mncni|mncni.py|loopback)$ || -x $bin_dir/$type ]] || die "$conflist wants a plugin \"$type\", which $bin_dir has not"
done

# A runtime takes the first file. Behind another one ours would have no effect, and nobody would see why.
for other in "$conf_dir"/*.{conf,conflist,json}; do
    [[ -e $other && ${other##*/} != "$name" ]] || continue
    [[ ${other##*/} > $name ]] || die "a runtime would use $other, which sorts before $name; remove it or rename it first"
    echo "bake: $name goes before $other, which a runtime then no longer uses" >&2
done

look_missing() {
    missing=()
    # To run it is to check it: a python3-minimal has not all of the standard library.
    chroot "$root" /usr/bin/python3 -IS - --version <"$mncni" >/dev/null 2>&1 || missing+=(python3)
    has ip || missing+=(iproute2)
    has nsenter || missing+=(util-linux)
    ! grep -q '^nft ' <<<"$script" || has nft || missing+=(nftables)
}
look_missing
if [[ $apt && ${missing[*]} ]]; then
    in_root sh -c 'apt-get -qq update && apt-get -qq install -y --no-install-recommends "$@"' sh "${missing[@]}" >&2 </dev/null
    look_missing
fi
((${#missing[@]} == 0)) || die "$root lacks packages, which --apt installs: ${missing[*]}"
in_root /usr/bin/python3 -IS -c 'import sys; sys.exit(sys.version_info < (3, 9))' || die "the python3 of $root is older than 3.9"

python3 -IS "$mncni" install --root "$root"
mkdir -p "$conf_dir"
# Whole or absent, and last: from now on a runtime uses it. It reads no file whose name ends in another way.
new=$(mktemp "$conf_dir/$name.XXXXXX")
install -m 644 "$conflist" "$new"
sync "$new" && mv "$new" "$conf_dir/$name"
echo "$conf_dir/$name"
