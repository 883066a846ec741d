"""IPAM by other plugins: the reference host-local and static as Debian ships them, and one of the test's own that notes its calls."""

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

DIRECTORIES = ("/usr/lib/cni", "/opt/cni/bin")
REFERENCE = next((path for path in DIRECTORIES if os.access(f"{path}/host-local", os.X_OK)), "")
needs_reference = pytest.mark.skipif(not REFERENCE, reason="needs the reference plugins: apt-get install containernetworking-plugins")


def host_local(host):
    return {
        "type": "host-local",
        "dataDir": f"{host.tmp}/host-local",
        "ranges": [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd00:88::/64"}]],
        "routes": [{"dst": "10.9.0.0/16"}, {"dst": "0.0.0.0/0"}],
    }


@needs_reference
def test_host_local_serves_add_check_and_del(host):
    conf = host.conf(cniVersion="0.4.0", ipMasq=True, ipam=host_local(host))
    pod, other = host.pod("a"), host.pod("b")
    result = host.add(conf, "c1", pod, CNI_PATH=REFERENCE)
    second = host.add(conf, "c2", other, CNI_PATH=REFERENCE)
    assert [ip["gateway"] for ip in result["ips"]] == ["10.88.0.1", "fd00:88::1"]
    assert [route["dst"] for route in result["routes"]] == ["10.9.0.0/16", "0.0.0.0/0", "::/0"]
    for ip in second["ips"]:
        assert host.pings(pod, ip["address"].partition("/")[0], count=1) == 1
    check = {**conf, "prevResult": result}
    assert host.cni("CHECK", check, "c1", pod, CNI_PATH=REFERENCE) == (0, None, "")
    leases = [path for path in Path(host.tmp).glob("host-local/net/*2") if path.is_file()]
    assert len(leases) == 2
    texts = {lease: lease.read_bytes() for lease in leases}
    for lease in leases:  # as long as one is left, host-local is content
        lease.unlink()
    exit_code, error, _ = host.cni("CHECK", check, "c1", pod, CNI_PATH=REFERENCE)
    assert exit_code == 1 and "host-local" in error["msg"]
    for lease, text in texts.items():
        lease.write_bytes(text)
    for _ in range(2):
        assert host.cni("DEL", check, "c1", pod, CNI_PATH=REFERENCE) == (0, None, "")
    assert not any(lease.exists() for lease in leases)


@needs_reference
def test_static_addresses_and_their_routes_arrive_in_the_pod(host):
    ipam = {
        "type": "static",
        "addresses": [{"address": "10.88.0.9/24", "gateway": "10.88.0.1"}],
        "routes": [{"dst": "10.9.0.0/16", "gw": "10.88.0.254"}],
        "dns": {"nameservers": ["10.88.0.53"]},
    }
    pod = host.pod("a")
    result = host.add(host.conf(cniVersion="0.4.0", ipam=ipam), "c1", pod, CNI_PATH=REFERENCE)
    assert result["dns"] == {"nameservers": ["10.88.0.53"]}
    assert "10.9.0.0/16 via 10.88.0.254" in host.ip("route", netns=pod)
    assert "default via 10.88.0.1" in host.ip("route", netns=pod)


@needs_reference
def test_a_delegate_that_cannot_serve_fails_the_add_and_leaves_nothing(host):
    ipam = {**host_local(host), "ranges": [[{"subnet": "10.88.0.0/30"}]], "routes": []}
    conf = host.conf(cniVersion="0.4.0", ipam=ipam)
    host.add(conf, "c1", host.pod("a"), CNI_PATH=REFERENCE)
    pod = host.pod("b")
    before = host.snapshot()
    exit_code, error, _ = host.cni("ADD", conf, "c2", pod, CNI_PATH=REFERENCE)
    assert exit_code == 1 and error["msg"].startswith("host-local: ") and "no IP addresses available" in error["msg"]
    assert host.snapshot() == before


@needs_reference
def test_addresses_go_back_to_the_delegate_when_the_link_cannot_be_made(host):
    conf = host.conf(cniVersion="0.4.0", ipam=host_local(host), bridge="lo0")
    host.ip("link add lo0 type veth peer name lo1")
    conf["adoptBridge"] = True
    pod = host.pod("a")
    exit_code, error, _ = host.cni("ADD", conf, "c1", pod, CNI_PATH=REFERENCE)
    assert (exit_code, error["code"]) == (1, 7)
    conf["bridge"] = "mncni0"
    host.ip("route add blackhole 10.88.0.254/32", netns=pod)
    conf["ipam"]["routes"] = [{"dst": "10.9.0.0/16", "gw": "10.99.0.1"}]  # no way to that gateway: the last command fails
    exit_code, error, _ = host.cni("ADD", conf, "c1", pod, CNI_PATH=REFERENCE)
    assert (exit_code, error["code"]) == (1, 100) and "10.99.0.1" in error["details"]
    assert not [path for path in host.files() if "10.88" in path]


NOTING = """#!/bin/sh
cat > "$0.$CNI_COMMAND"
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME" >> "$0.calls"
echo "a word from the delegate" >&2
[ -e "$0.fail" ] && { cat "$0.fail"; exit 1; }
[ "$CNI_COMMAND" = ADD ] && cat "$0.result"
exit 0
"""


@pytest.fixture
def delegate(tmp_path):
    """A delegate that notes its calls: delegate.calls(), and answers what result and fail say."""

    class Delegate:
        path = tmp_path / "bin" / "noting"

        def file(self, suffix):
            return Path(f"{self.path}.{suffix}")

        def calls(self):
            return [line.split()[0] for line in self.file("calls").read_text().splitlines()]

    made = Delegate()
    made.path.parent.mkdir()
    made.path.write_text(NOTING)
    made.path.chmod(0o755)
    made.file("result").write_text(json.dumps({"cniVersion": "1.1.0", "ips": [{"address": "10.88.0.5/24"}]}))
    return made


def test_every_verb_is_passed_on_with_the_whole_configuration(host, delegate):
    conf = host.conf(ipam={"type": "noting", "secret": "kept"})
    path = {"CNI_PATH": f"/nowhere:{delegate.path.parent}"}
    pod = host.pod("a")
    result = host.add(conf, "c1", pod, **path)
    assert result["ips"][0] == {"address": "10.88.0.5/24", "gateway": "10.88.0.1", "interface": 2}
    host.cni("CHECK", {**conf, "prevResult": result}, "c1", pod, **path)
    exit_code, _, stderr = host.cni("STATUS", conf, **path)
    assert exit_code == 0 and "a word from the delegate" in stderr
    host.cni("GC", {**conf, "cni.dev/valid-attachments": []}, **path)
    host.cni("DEL", conf, "c1", pod, **path)
    assert delegate.calls() == ["ADD", "CHECK", "STATUS", "GC", "DEL"]
    passed = json.loads(delegate.file("GC").read_text())
    assert passed["cni.dev/valid-attachments"] == [] and passed["ipam"]["secret"] == "kept" and passed["name"] == "net"


def test_a_failed_delegate_gets_a_del_and_its_error_is_ours(host, delegate):
    delegate.file("fail").write_text(json.dumps({"cniVersion": "1.1.0", "code": 11, "msg": "come back", "details": "later"}))
    path = {"CNI_PATH": str(delegate.path.parent)}
    conf = host.conf(ipam={"type": "noting"})
    exit_code, error, _ = host.cni("ADD", conf, "c1", host.pod("a"), **path)
    assert (exit_code, error["code"], error["msg"], error["details"]) == (1, 11, "noting: come back", "later")
    assert delegate.calls() == ["ADD", "DEL"]
    assert host.cni("STATUS", conf, **path)[1]["code"] == 11
    assert host.cni("DEL", conf, "c1", "", **path)[1]["code"] == 11


@pytest.mark.parametrize("answer", ["", "nonsense", "[]", "{}", '{"ips": []}', '{"ips": [{"address": "10.88.0.5"}]}', '{"ips": "x"}'])
def test_a_delegate_that_answers_nonsense_fails_the_add_cleanly(host, delegate, answer):
    delegate.file("result").write_text(answer)
    before = [path for path in host.files() if not path.startswith("bin")]
    exit_code, error, _ = host.cni("ADD", host.conf(ipam={"type": "noting"}), "c1", host.pod("a"), CNI_PATH=str(delegate.path.parent))
    assert exit_code == 1 and error["code"] in (6, 7, 100), error
    assert delegate.calls() == ["ADD", "DEL"]
    assert [path for path in host.files() if not path.startswith("bin")] == before
    assert "mn" not in host.ip("-brief link")


def test_del_after_the_configuration_went_from_built_in_to_a_delegate_frees_both(host, delegate):
    path = {"CNI_PATH": str(delegate.path.parent)}
    host.add(host.conf(), "c1", host.pod("a"))
    conf = host.conf(ipam={"type": "noting", "dataDir": f"{host.tmp}/data"})
    assert host.cni("DEL", conf, "c1", "", **path)[0] == 0
    assert not [path for path in host.files() if "10.88" in path]
    assert delegate.calls() == ["DEL"]


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "nowhere-to-be-found"])
def test_a_delegate_that_cannot_be_found_is_named(host, name):
    exit_code, error, _ = host.cni("ADD", host.conf(ipam={"type": name}), "c1", host.pod("a"), CNI_PATH="/usr/lib/cni")
    assert exit_code == 1 and error["code"] in (4, 7) and name in error["msg"]
