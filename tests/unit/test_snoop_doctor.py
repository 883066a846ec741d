"""cnisnoop cache and doctor: what they say about directories that the tests make."""

import json
import os
import time

import pytest

import cnisnoop

CONFLIST = {"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "main", "ipam": {"type": "ipam"}}, {"type": "chained"}]}
HEALTHY = '{"cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}'


def plugin(path, version_reply=HEALTHY, status="exit 0", mode=0o755):
    path.write_text(f"#!/bin/sh\n[ $CNI_COMMAND = VERSION ] && {{ echo '{version_reply}'; exit 0; }}\n{status}\n")
    path.chmod(mode)


@pytest.fixture
def node(tmp_path, mocker, capsys):
    """A node on which nothing is wrong, in directories: node.doctor() -> (exit status, findings, configurations)."""

    class Node:
        conf, bin, cache, data = (tmp_path / name for name in ("conf", "bin", "cache", "data"))

        def run(self, *words):
            options = ["--conf-dir", self.conf, "--bin-dir", self.bin, "--data-dir", self.data, "--cache-dir", self.cache]
            status = cnisnoop.main([*words, *map(str, options if words[0] == "doctor" else options[-2:])])
            return status, capsys.readouterr().out

        def doctor(self):
            status, text = self.run("doctor", "--json")
            told = json.loads(text)
            assert status == (1 if told["findings"] else 0)
            return told["findings"], [entry["verdict"] for entry in told["configurations"]]

    made = Node()
    for directory in (made.conf, made.bin, made.cache, made.data):
        directory.mkdir()
    (made.conf / "10-net.conflist").write_text(json.dumps(CONFLIST))
    for name in ("main", "ipam", "chained", "loopback"):
        plugin(made.bin / name)
    mocker.patch("cnisnoop.look_host", return_value=([], []))
    mocker.patch("cnisnoop.look_needs", return_value=([], []))
    return made


def only(findings):
    (finding,) = findings
    return finding["what"], finding["do"]


# ---- configurations ----


def test_a_healthy_node_has_no_findings(node):
    assert node.doctor() == ([], ['in use: network "net"'])
    status, text = node.run("doctor")
    assert status == 0 and "nothing wrong was found" in text and "main, ipam, chained" in text


def test_of_several_configurations_the_first_in_the_alphabet_is_used(node):
    (node.conf / "05-other.conf").write_text('{"cniVersion": "1.0.0", "name": "single", "type": "main"}')
    (node.conf / "00-first.conflist.disabled").write_text("x")
    (node.conf / "99-last.conflist").write_text(json.dumps(CONFLIST))
    findings, verdicts = node.doctor()
    assert not findings
    assert verdicts == [
        "ignored: its name does not end in .conflist, .conf or .json",
        'in use: network "single"',
        'ignored, because 05-other.conf comes first in the alphabet: network "net"',
    ] + ['ignored, because 05-other.conf comes first in the alphabet: network "net"']
    assert 'note: no pod gets the network "net": 05-other.conf comes before 10-net.conflist' in node.run("doctor")[1]
    (node.conf / "05-other.conf").write_text(json.dumps({"cniVersion": "1.0.0", "name": "net", "type": "main"}))
    assert "no pod gets" not in node.run("doctor")[1], "another way to the same network"


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"name": "net",\n  "plugins": [\n    {"type": "main",}\n]}', ": line 3 column 2"),  # 20 or 21, as Python's version has it
        ("", ": Expecting value: line 1 column 1 (char 0) (the file is empty)"),
        ("[]", "not a JSON object"),
        ("{}", 'has no "name"'),
        ('{"name": "x"}', 'has no "plugins"'),
        ('{"name": "x", "plugins": []}', 'has no "plugins"'),
        ('{"name": "x", "plugins": [{}]}', 'a plugin without a "type"'),
        ('{"name": 5, "plugins": [{"type": "x"}]}', 'has no "name"'),
        ('{"name": "x", "plugins": {"type": "x"}}', 'has no "plugins"'),
        ("[" * 100_000, ""),
        ("\x00\xff", ": line 1 column 1 "),
    ],
)
def test_a_broken_configuration_that_comes_first_stops_everything_and_the_place_is_named(node, text, problem):
    path = node.conf / "00-broken.conflist"
    path.write_text(text)
    findings, verdicts = node.doctor()
    what, way_out = only(findings)
    assert what.startswith(str(path)) and problem in what and "no network at all" in way_out
    assert verdicts[0] == "in use: broken" and verdicts[1].startswith("ignored")


def test_a_broken_configuration_behind_the_one_in_use_is_told_as_such(node):
    (node.conf / "20-broken.conf").write_text(json.dumps(CONFLIST))
    what, way_out = only(node.doctor()[0])
    assert "its name has to end in .conflist" in what and "10-net.conflist" in way_out


def test_no_configuration_is_a_finding(node):
    (node.conf / "10-net.conflist").unlink()
    assert "no network configuration" in only(node.doctor()[0])[0]
    node.conf.rmdir()
    assert "no network configuration" in only(node.doctor()[0])[0]


# ---- plugins ----


@pytest.mark.parametrize("name", ["main", "ipam", "chained", "loopback"])
def test_a_missing_plugin_is_a_finding(node, name):
    (node.bin / name).unlink()
    assert f'plugin "{name}" is missing' in only(node.doctor()[0])[0]


def test_a_loopback_that_does_not_support_the_version_that_containerd_uses_is_a_finding(node):
    plugin(node.bin / "loopback", '{"supportedVersions": ["1.0.0"]}')
    assert "loopback does not support version 0.3.1 of its configuration, but 1.0.0" in only(node.doctor()[0])[0]


def test_a_plugin_that_cannot_be_executed_is_a_finding(node):
    plugin(node.bin / "ipam", mode=0o644)
    assert only(node.doctor()[0]) == (f"{node.bin}/ipam is not executable", f"chmod +x {node.bin}/ipam")
    plugin(node.bin / "ipam", mode=0o755)
    (node.bin / "ipam").write_text("#!/nonexistent/python3\n")
    assert "does not answer VERSION: exit status 127, it says: No such file or directory" in only(node.doctor()[0])[0]


@pytest.mark.parametrize(
    "reply, text",
    [
        ('{"supportedVersions": ["0.1.0"]}', "does not support version 1.0.0 of its configuration, but 0.1.0"),
        ("nonsense", "does not answer VERSION"),
        ("{}", "does not answer VERSION"),
        ('{"supportedVersions": 5}', "does not answer VERSION"),
        ("", "it says: nothing"),
    ],
)
def test_a_version_that_does_not_match_is_a_finding(node, reply, text):
    plugin(node.bin / "chained", reply)
    assert text in only(node.doctor()[0])[0]


def test_what_a_plugin_answers_to_status_is_told(node):
    (node.conf / "10-net.conflist").write_text(json.dumps({**CONFLIST, "cniVersions": ["0.4.0", "1.1.0"]}))
    assert node.doctor()[0] == []
    plugin(node.bin / "main", status="""cat >"$0.stdin"; echo '{"code": 50, "msg": "the agent is not ready"}'; exit 1""")
    assert "error 50, the agent is not ready" in only(node.doctor()[0])[0]
    handed = json.loads((node.bin / "main.stdin").read_text())
    assert (handed["name"], handed["cniVersion"], handed["type"]) == ("net", "1.1.0", "main")


def test_status_is_not_asked_below_1_1_0(node):
    plugin(node.bin / "main", status="exit 1")
    assert node.doctor()[0] == []


# ---- tools, kernel, host ----


def test_a_missing_tool_or_kernel_feature_is_a_finding(mocker):
    mocker.patch("shutil.which", side_effect=lambda name: None if name in ("tc", "wireguard-go") else name)
    mocker.patch("cnisnoop.run", side_effect=lambda argv: (2, "", "Error: Unknown device type.") if "wireguard" in argv else (0, "", ""))
    mocker.patch("os.geteuid", return_value=0)
    findings, _ = cnisnoop.look_needs([("mncni", {"plugin": ["naivewg", "bandwidth", "lat"], "ready": "/run/mncni/ready"}), ("mine", {})])
    assert findings == [
        ("tc is missing", "apt-get install iproute2"),
        ("the kernel has no WireGuard: Error: Unknown device type.", "load or install its module: modprobe, linux-modules-extra"),
    ]


def test_what_only_some_pods_ask_for_is_a_note(mocker):
    mocker.patch("cnisnoop.run", side_effect=lambda argv: (2, "", "no") if "netem" in argv else (0, "", ""))
    mocker.patch("shutil.which", side_effect=lambda name: name)
    mocker.patch("os.geteuid", return_value=0)
    findings, notes = cnisnoop.look_needs([("mncni", {"plugin": ["naivewg", "lat"]})])
    assert findings == []
    assert [what for what, _ in notes] == ["the kernel has no netem, so lat fails for pods that ask for it: no"]


def test_plugins_of_others_need_none_of_the_tools(mocker):
    mocker.patch("shutil.which", return_value=None)
    mocker.patch("os.geteuid", return_value=0)
    assert cnisnoop.look_needs([(kind, {}) for kind in ("bridge", "host-local", "portmap", "bandwidth")]) == ([], [])


def test_forwarding_that_is_off_before_the_first_pod_is_a_note(mocker):
    mocker.patch("cnisnoop.run", return_value=(1, "", ""))
    mocker.patch("cnisnoop.read_text", return_value="0\n")
    findings, notes = cnisnoop.look_host(has_pods=False)
    assert findings == [] and "net.ipv4.ip_forward is 0" in notes[0][0]


def test_without_a_cache_of_results_no_lease_is_called_stale(node):
    (node.data / "net").mkdir()
    (node.data / "net" / "10.244.1.5").write_text("living\neth0")
    node.cache.rmdir()
    assert node.doctor()[0] == []
    assert "nothing says which leases are in use" in node.run("doctor")[1]


def test_a_loopback_that_the_runtime_has_itself_need_not_be_there(node, mocker):
    (node.bin / "loopback").unlink()
    read = cnisnoop.read_text
    config = "  use_internal_loopback = true\n"
    mocker.patch("cnisnoop.read_text", side_effect=lambda path: config if path == "/etc/containerd/config.toml" else read(path))
    assert node.doctor()[0] == []


def test_what_no_plugin_needs_is_not_tried(mocker):
    run = mocker.patch("cnisnoop.run")
    assert cnisnoop.look_needs([("loopback", {}), ("macvlan", {})]) == ([], [])
    run.assert_not_called()


def test_a_foreign_drop_policy_of_forward_is_a_note(mocker):
    chains = {
        "nftables": [
            {"metainfo": {}},
            {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward", "policy": "drop"}},
            {"chain": {"family": "inet", "table": "t", "name": "forward", "hook": "forward", "policy": "accept"}},
            {"chain": {"family": "inet", "table": "t", "name": "input", "hook": "input", "policy": "drop"}},
        ]
    }
    mocker.patch("cnisnoop.run", side_effect=[(0, json.dumps(chains), ""), (0, "-P FORWARD DROP\n", "")])
    mocker.patch("cnisnoop.read_text", return_value="0\n")
    findings, notes = cnisnoop.look_host(has_pods=True)
    assert [what for what, _ in findings] == ["the node does not forward: net.ipv4.ip_forward is 0"]
    assert [what.partition(",")[0] for what, _ in notes] == [
        "chain ip filter FORWARD drops forwarded packets",
        "iptables-legacy drops forwarded packets: -P FORWARD DROP",
    ]


@pytest.mark.parametrize(
    "text, directories",
    [
        ("", ("/etc/cni/net.d", ["/opt/cni/bin"], True)),
        (
            '[plugins."io.containerd.grpc.v1.cri".cni]\n  bin_dir = "/usr/lib/cni"\n  conf_dir = "/etc/mine"\n',
            ("/etc/mine", ["/usr/lib/cni"], True),
        ),
        (
            "  bin_dirs = ['/opt/cni/bin', '/usr/lib/cni']\n# conf_dir = '/not/this'\n",
            ("/etc/cni/net.d", ["/opt/cni/bin", "/usr/lib/cni"], True),
        ),
    ],
)
def test_directories_come_from_the_configuration_of_containerd(mocker, text, directories):
    mocker.patch("cnisnoop.read_text", return_value=text)
    assert cnisnoop.look_containerd() == directories


# ---- cache and leases ----


def cached(node, container_id, netns, **changes):
    value = {
        "kind": "cniCacheV1",
        "containerId": container_id,
        "ifName": "eth0",
        "networkName": "net",
        "config": "e30=",
        "result": {
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "br0"}, {"name": "eth0", "sandbox": netns}],
            "ips": [{"address": "10.244.1.5/24"}],
        },
        **changes,
    }
    path = node.cache / f"net-{container_id}-eth0"
    path.write_text(json.dumps(value))
    return path


def test_cache_is_a_table_in_which_what_is_stale_is_marked(node, tmp_path):
    cached(node, "living", "/proc/self/ns/net")
    old = cached(node, "dead", str(tmp_path / "gone"))
    os.utime(old, (time.time() - 7300,) * 2)
    (tmp_path / "unmounted").touch()
    cached(node, "unmounted", str(tmp_path / "unmounted"))
    cached(node, "unknown", "", result=None)
    (node.cache / "net-torn-eth0").write_text('{"kind": "cniCa')
    status, text = node.run("cache")
    lines = {line.split()[1]: line for line in text.splitlines()}
    assert status == 0 and "10.244.1.5/24" in lines["living"] and "in use" in lines["living"]
    assert "stale: its namespace is gone" in lines["dead"] and " 2:01:40 " in lines["dead"]
    assert "stale" in lines["unmounted"] and "not known" in lines["unknown"] and "not readable" in text
    states = {row["container_id"]: row["state"] for row in json.loads(node.run("cache", "--json")[1])}
    assert states["living"] == "in use" and len(states) == 5


def test_an_empty_cache_says_so(node):
    assert "nothing in" in node.run("cache")[1]
    node.cache.rmdir()
    assert node.run("cache")[0] == 0


def test_caches_and_leases_without_a_namespace_are_findings(node, tmp_path):
    boot_id = cnisnoop.read_text("/proc/sys/kernel/random/boot_id").strip()
    cached(node, "living", "/proc/self/ns/net")
    cached(node, "dead", str(tmp_path / "gone"))
    leases = node.data / "net"
    (leases / "attachments").mkdir(parents=True)
    for address, text in {
        "10.244.1.5": f"living\neth0\n{boot_id}\n",
        "10.244.1.6": f"dead\neth0\n{boot_id}\n",
        "10.244.1.7": "dead\r\neth0",
        "10.244.1.8": "dead\neth0\nan-earlier-boot\n",
        "fd00::9": "nobody\neth0",
        "10.244.1.10": "",
        "lock": "",
        "last_reserved_ip.0": "10.244.1.9",
    }.items():
        (leases / address).write_text(text)
    findings = [finding["what"] for finding in node.doctor()[0]]
    assert [what.split()[1].rpartition("/")[2] for what in findings if what.startswith("lease")] == [
        "10.244.1.6",
        "10.244.1.7",
        "fd00::9",
    ]
    assert [what for what in findings if what.startswith("cached")] == [
        f"cached result {node.cache}/net-dead-eth0: stale: its namespace is gone"
    ]
    for number in range(100, 200):
        (leases / f"10.244.1.{number}").write_text("gone\neth0")
    findings = [finding["what"] for finding in node.doctor()[0] if not finding["what"].startswith("cached")]
    assert len(findings) == 6 and findings[-1] == "98 more leases are stale"
