#!/usr/bin/env bash
# Prints cloud-init user data that does on a node's first boot what bake.sh does to its image.
#
#   deploy/node-image/cloud-init.sh CONFLIST >user-data
set -euo pipefail
here=$(dirname "$(realpath "$0")")
setup=/run/mncni-setup  # gone with the next boot
limit=65535             # bytes: custom data on Azure. EC2 takes only 16 KB, there an image has to be baked

die() { echo "cloud-init: $*" >&2; exit 1; }

# One entry of write_files, compressed. -n: the same input, the same document.
write_file() {  # name, source
    printf '  - path: %s/%s\n    encoding: gz+b64\n    content: %s\n' "$setup" "$1" "$(gzip -9 -n -c "$2" | base64 -w 0)"
}

# The same for a file that would be too large: by bzip2 and base 85, which cloud-init does not unpack, so runcmd does.
write_large_file() {  # name, source
    printf '  - path: %s/%s.bz2.b85\n    content: |\n      %s\n' "$setup" "$1" "$(python3 -IS -c "$pack" "$2")"
}
pack='import base64, bz2, sys; print(base64.b85encode(bz2.compress(open(sys.argv[1], "rb").read())).decode())'
unpack="import base64, bz2; open('$setup/mncni.py', 'wb').write(bz2.decompress(base64.b85decode(open('$setup/mncni.py.bz2.b85').read().strip())))"

[[ $# == 1 ]] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
python3 -IS "$here/../../mncni.py" explain "$1" >/dev/null || die "$1 does not work"

document=$(
    cat <<END
#cloud-config
# MNCNI on the first boot of a node, as printed by deploy/node-image/cloud-init.sh. The packages are Debian's and Ubuntu's.
package_update: true
packages: [python3, iproute2, util-linux, nftables]
write_files:
$(write_large_file mncni.py "$here/../../mncni.py")
$(write_file deploy/node-image/bake.sh "$here/bake.sh")
$(write_file node.conflist "$1")
# It refuses what would not work, see /var/log/cloud-init-output.log. /run may be noexec.
runcmd:
  - [/usr/bin/python3, -IS, -c, "$unpack"]
  - [bash, $setup/deploy/node-image/bake.sh, /, $setup/node.conflist]
END
)
size=$(printf '%s\n' "$document" | wc -c)
((size <= limit)) || die "the document has $size bytes, and Azure takes $limit: bake an image, see bake.sh"
printf '%s\n' "$document"
