"""What `mncni.py explain` prints is a shell script that does what it says, in a throw-away namespace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mncni

pytestmark = pytest.mark.root
TOP = Path(mncni.__file__).parent
NEEDS = {"lat": pytest.mark.kernel("netem")}
CONFLISTS = [pytest.param(path, id=path.stem, marks=NEEDS.get(path.stem, ())) for path in sorted((TOP / "conf").glob("*.conflist"))]
# A host and a pod of its own: /run/netns is another one, too.
PLACE = "mount --make-rprivate / && mount -t tmpfs tmpfs /run && ip link set lo up"
LOOK = "ip -o link | cut -d: -f2; nft list tables; ip -n c1 -br address show dev eth0 2>/dev/null || true"


def explained(path, verb):
    argv = [sys.executable, "-IS", str(TOP / "mncni.py"), "explain", "--command", verb, str(path)]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def run_in_order(*scripts, place=PLACE):
    """What LOOK shows after each script, in one namespace."""
    script = "\n".join([place, *(f"{{ :\n{text}\n}} >/dev/null\necho ---; {LOOK}" for text in scripts)])
    argv = ["unshare", "--net", "--mount", "bash", "-e"]
    done = subprocess.run(argv, input=script, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [text.split() for text in done.stdout.split("---\n")[1:]]


@pytest.mark.parametrize("path", CONFLISTS)
def test_the_script_of_an_add_makes_the_pods_network_and_that_of_a_del_removes_it(path):
    before, after_add, after_check, after_del = run_in_order(":", *(explained(path, verb) for verb in ("ADD", "CHECK", "DEL")))
    if path.stem != "loopback":
        assert "10.88.0.2/24" in after_add and "mncni0" in after_add
    assert after_check == after_add
    assert set(after_del) - set(before) <= {"mncni0", "inet", "mncni_masq", "table"}, "the bridge and static rules stay"


@pytest.mark.skipif(not os.access("/usr/lib/cni/host-local", os.X_OK), reason="needs the package containernetworking-plugins")
def test_the_script_calls_a_delegate_as_the_plugin_does(tmp_path):
    ipam = {"type": "host-local", "dataDir": "/run/leases", "ranges": [[{"subnet": "10.77.0.0/24"}]]}
    plugins = [{"type": "mncni", "plugin": "naivewg", "ipam": ipam}, {"type": "mncni", "plugin": "quickack"}]
    conflist = tmp_path / "x.conflist"
    conflist.write_text(json.dumps({"cniVersion": "1.0.0", "name": "x", "plugins": plugins}))
    place = f"{PLACE} && mount -t tmpfs tmpfs /opt && mkdir -p /opt/cni/bin && mount --bind /usr/lib/cni /opt/cni/bin"
    after_add, after_del = run_in_order(*(explained(conflist, verb) for verb in ("ADD", "DEL")), place=place)
    assert "10.77.0.2/24" in after_add and "10.77.0.2/24" not in after_del


def test_a_plugin_that_uses_this_one_explains_itself_behind_it(tmp_path):
    plugin = tmp_path / "length"
    plugin.write_text(
        f"import sys\nsys.path.append({str(TOP)!r})\nimport mncni\n"
        "def add(request, run):\n"
        "    lines = [f'link set dev {request.ifname} txqueuelen 7']\n"
        "    mncni.apply([mncni.ip_batch(lines, request.netns, 'a short queue')], run)\n"
        "    return request.prev_result\n"
        "mncni.main({'length': {'ADD': add, 'chained': True}})\n")
    conflist = tmp_path / "own.conflist"
    conflist.write_text('{"cniVersion": "1.0.0", "name": "own", "plugins": [{"type": "mncni", "plugin": "naivewg", "ipam": {"ranges": '
                        '[[{"subnet": "10.88.0.0/24"}]]}}, {"type": "length"}]}')
    script = subprocess.run([sys.executable, "-IS", plugin, "explain", conflist], capture_output=True, text=True, check=True).stdout
    assert "# a short queue\nnsenter" in script and "another program" not in script
    run_in_order(script)
