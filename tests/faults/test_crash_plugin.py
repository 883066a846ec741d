"""The plugin is killed at every step of every operation: what is called next, be it DEL, GC, ADD or `install`, puts everything right.

What a step is, and how a process is killed at it, is in crash.py. Right means: links, addresses, routes, rules, nft, tc, sysctls and files,
of the host and of the pods, are as a whole what they are where nothing was killed.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

import mncni
from tests.conftest import kernel_has
from tests.faults.crash import Child, diff, each_step, namespaces
from tests.integration.conftest import Host

pytestmark = pytest.mark.root

RANGES = [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd00:88::/64"}]]
ONE, TWO, THREE = (name.ljust(64, "0") for name in ("c1", "c2", "c3"))  # IDs as long as a runtime's
ASKED = {  # enough host ports for a script that goes to nft in two pieces
    "portMappings": [{"hostPort": 8080 + i, "containerPort": 80, "protocol": "udp" if i % 2 else "tcp"} for i in range(8)],
    "bandwidth": {"ingressRate": 8_000_000, "egressRate": 8_000_000},
}
LAT = {"io.kubernetes.cri.pod-annotations": {"lat": "5ms"}}
FULL = ["naivewg", "portmap", "bandwidth", "lat", "quickack"]
SYSCTLS = "grep . /proc/sys/net/ipv4/conf/*/route_localnet /proc/sys/net/ipv6/conf/mncni*/accept_*"
TOOLS = mncni.search_path({"PATH": os.environ["PATH"]})


class Node:
    """A host of its own and three pods; calls of the plugin, each in a child of this process. path: where the tools are."""

    def __init__(self, tmp):
        self.host = Host(tmp)
        self.enter = namespaces(net=f"/run/netns/{self.host.netns}")
        self.pods = {ONE: self.host.pod("a"), TWO: self.host.pod("b"), THREE: self.host.pod("c")}
        self.path = TOOLS

    def conf(self, plugin, **keys):
        ipam = {"dataDir": f"{self.host.tmp}/data", "ranges": RANGES}
        asked = {**ASKED, **(LAT if kernel_has("netem") else {})}
        return self.host.conf(**{"plugin": plugin, "ipMasq": True, "spoofCheck": True, "ipam": ipam, "runtimeConfig": asked, **keys})

    def child(self, command, conf, container_id=ONE, at=None):
        """A call that ends at a step. GC is to keep the second pod alone."""
        environ, run = self.host.environ(command, container_id, self.pods[container_id], "eth0"), mncni.make_run({"PATH": self.path})
        conf = {**conf, "cni.dev/valid-attachments": [{"containerID": TWO, "ifname": "eth0"}]} if command == "GC" else conf
        return Child(self.enter, lambda: mncni.answer(environ, json.dumps(conf), run, at_once=True), at)

    def call(self, command, conf, container_id=ONE, at=None):
        """What a call answers that has to succeed."""
        exit_code, stdout = self.child(command, conf, container_id, at).outcome()["reply"]
        assert exit_code == 0, f"{command}: {stdout}"
        return json.loads(stdout or "{}")

    def slow(self):
        """Takes away what quickack leaves: its DEL has nothing to do, as the routes go with the pod."""
        for ip in ("ip", "ip -6"):
            line = f"{ip} route | sed -n 's/ quickack 1//p' | while read -r route; do {ip} route replace $route; done"
            self.host.sh(line, netns=self.pods[ONE])

    def snapshot(self):
        """The host and the pods."""
        pods = [self.host.sh("ip -brief address; ip route; ip -6 route; tc qdisc", netns=pod) for pod in self.pods.values()]
        return "\n".join([self.host.snapshot(), self.host.sh(f"tc qdisc; {SYSCTLS}", check=False), *pods])


@pytest.fixture
def node(tmp_path):
    made = Node(tmp_path / "host")
    yield made
    made.host.close()


@pytest.fixture(scope="module")
def survived(fault, figure):
    """survived("ADD of lat", 12): count 12 steps at which a process was killed and nothing stayed."""
    counts = {}

    def survive(what, steps):
        counts[what] = steps
        fault(f"{what} killed, at {steps} steps", leaks=0)

    yield survive
    figure(f"{sum(counts.values())} steps at which the plugin was killed, nothing left behind")


def test_an_add_killed_on_a_host_without_a_bridge(node, survived):
    """DEL leaves no more than any DEL does, and the next ADD makes the bridge what it would have been."""
    conf, virgin = node.conf("naivewg"), node.snapshot()
    node.call("ADD", conf)
    node.call("DEL", conf)
    used = node.snapshot()
    known = {*used.splitlines(), *virgin.splitlines()}
    for child in each_step(lambda at: node.child("ADD", conf, at=at)):
        node.call("DEL", conf)
        killed = child.outcome()
        left = [line for line in node.snapshot().splitlines() if line not in known and "mncni0" not in line]
        node.call("ADD", conf)
        node.call("DEL", conf)
        assert diff(used, node.snapshot()) == "" and not left, killed
        node.host.sh("ip link delete mncni0; nft flush ruleset")
        shutil.rmtree(node.host.tmp)
    survived("first ADD on a host", len(killed["steps"]))


ADDS = {  # what -> the plugins called before, those that are called and killed
    "naivewg": ([], ["naivewg"]),
    "portmap": (["naivewg"], ["portmap"]),
    "bandwidth": (["naivewg"], ["bandwidth"]),
    "lat": (["naivewg"], ["lat"]),
    "quickack": (["naivewg"], ["quickack"]),
    "loopback": ([], ["loopback"]),
    "all plugins": ([], FULL),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.kernel("netem") if name == "lat" else ()) for name in ADDS])
def test_after_a_killed_add_del_leaves_nothing_and_the_next_add_works(node, name, survived):
    before, plugin = ADDS[name]
    conf = node.conf(plugin)
    if before:
        conf["prevResult"] = node.call("ADD", node.conf(before))
    node.call("ADD", conf)
    node.call("DEL", conf)
    node.slow()
    clean = node.snapshot()
    for child in each_step(lambda at: node.child("ADD", conf, at=at)):
        node.call("DEL", conf)
        node.slow()
        killed = child.outcome()
        assert diff(clean, node.snapshot()) == "", killed
        node.call("ADD", conf)
        node.call("DEL", conf)
        node.slow()
    survived(f"ADD of {name}", len(killed["steps"]))
    assert len(killed["steps"]) > 2, "it is killed while it works, not only before and after"


def test_after_a_killed_add_gc_alone_leaves_nothing(node, survived):
    """For runtimes that forget a container whose ADD they did not see end."""
    conf = node.conf(FULL)
    node.call("ADD", conf, TWO)
    node.call("ADD", conf)
    node.call("DEL", conf)
    clean = node.snapshot()
    for child in each_step(lambda at: node.child("ADD", conf, at=at)):
        killed = child.outcome()
        node.call("GC", conf)
        assert diff(clean, node.snapshot()) == "", killed
    survived("ADD of all plugins, then GC", len(killed["steps"]))


@pytest.mark.parametrize("command", ["DEL", "GC"])
def test_a_killed_del_or_gc_is_finished_by_the_next(node, command, survived):
    conf = node.conf(FULL)
    node.call("ADD", conf, TWO)
    node.call("ADD", conf)
    node.call(command, conf)
    clean = node.snapshot()
    for child in each_step(lambda at: node.child(command, conf, at=at)):
        node.call(command, conf)
        killed = child.outcome()
        assert diff(clean, node.snapshot()) == "", killed
        node.call("ADD", conf)
    survived(command, len(killed["steps"]))


def test_a_command_that_outlives_a_killed_add_undoes_no_del(node, survived, tmp_path):
    """Each tool is slow here: the plugin is killed when the tool runs and has yet to do its work."""
    conf, slow = node.conf(FULL), tmp_path / "slow"
    node.call("ADD", conf, TWO)
    node.call("ADD", conf)
    node.call("DEL", conf)
    clean, steps = node.snapshot(), node.child("ADD", conf, at=0).outcome()["steps"]
    node.call("DEL", conf)
    slow.mkdir()
    for tool in ("ip", "tc", "nft", "nsenter", "tee"):
        (slow / tool).write_text(f'#!/bin/sh\nsleep 0.1\nPATH={TOOLS} exec {tool} "$@"\n')
        (slow / tool).chmod(0o755)
    points = [number for number, name in enumerate(steps, 1) if name.startswith("started ")]
    assert len(points) > 5
    for number in points:
        node.path = f"{slow}:{TOOLS}"
        child = node.child("ADD", conf, at=number)
        node.path = TOOLS
        assert child.killed
        node.call("DEL", conf)
        killed = child.outcome()
        assert diff(clean, node.snapshot()) == "", killed
    survived("ADD of all plugins, while a slow tool is at work", len(points))


@pytest.mark.parametrize("what", ["ADD", "DEL", "ADD with other ports"])
def test_what_a_killed_change_of_host_ports_leaves_harms_no_other_pod(node, what, survived):
    """One pod has the ports already, on a bridge of its own; another comes to the killed one's bridge before that is deleted."""
    other = {"name": "other", "bridge": "other0", "ipam": {"dataDir": f"{node.host.tmp}/data", "ranges": [[{"subnet": "10.89.0.0/24"}]]}}
    ports, confs = ASKED["portMappings"][:2], {}
    for pod, keys, asked in ((ONE, {}, ports), (TWO, {}, [{**ports[0], "hostPort": 9999}]), (THREE, other, ports)):
        result = node.call("ADD", node.conf(["naivewg"], **keys), pod)
        confs[pod] = {**node.conf(["portmap"], **keys), "prevResult": result, "runtimeConfig": {"portMappings": asked}}
    fewer = {**confs[ONE], "runtimeConfig": {"portMappings": ports[:1]}}
    for pod in (THREE, TWO):
        node.call("ADD", confs[pod], pod)
    wanted = sorted(node.snapshot().splitlines())
    node.call("DEL", confs[TWO], TWO)

    def start(at):
        if what != "ADD":
            node.call("ADD", confs[ONE])
        return node.child(what[:3], fewer if "other" in what else confs[ONE], at=at)

    for child in each_step(start):
        killed = child.outcome()
        node.call("ADD", confs[TWO], TWO)
        node.call("CHECK", confs[TWO], TWO)
        node.call("DEL", confs[ONE])
        assert sorted(node.snapshot().splitlines()) == wanted, killed
        node.call("DEL", confs[TWO], TWO)
    survived(f"{what} of host ports, then another pod comes", len(killed["steps"]))


def test_a_killed_restore_of_host_ports_and_spoof_check_is_finished_by_the_next(node, survived):
    conf, run = node.conf(["naivewg", "portmap"]), mncni.make_run({"PATH": TOOLS})
    node.call("ADD", conf)
    whole, state = node.snapshot(), f"{node.host.tmp}/run"

    def restore(at=None):
        return Child(node.enter, lambda: mncni.restore_tables(state, run), at)

    for child in each_step(lambda at: restore(at)):
        restore().outcome()
        killed = child.outcome()
        assert diff(whole, node.snapshot()) == "", killed
        node.host.sh("nft delete table inet mncni_portmap; nft delete table bridge mncni_spoof; tc qdisc delete dev mncni0 ingress")
        node.host.sh("echo 0 > /proc/sys/net/ipv4/conf/mncni0/route_localnet")
    survived("restore of host ports and spoofCheck", len(killed["steps"]))


# ---- install: files alone ----


def files(directory):
    """{path: (mode, text)} of all files below a directory."""
    paths = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): (path.stat().st_mode, path.read_text()) for path in paths}


@pytest.mark.parametrize("there", ["nothing", "an older version"])
def test_a_killed_install_leaves_files_whole_and_the_next_finishes(tmp_path, there, survived):
    bin_dir, wanted_dir, names = tmp_path / "bin", tmp_path / "wanted", ["naivewg", "portmap"]
    mncni.install(str(wanted_dir), names)
    wanted = files(wanted_dir)
    old = {} if there == "nothing" else {name: (0o100755, f"{text}# older\n") for name, (_, text) in wanted.items()}

    def install(at=None):
        return Child(lambda: None, lambda: mncni.install(str(bin_dir), names), at)

    for child in each_step(install):
        killed = child.outcome()
        for name, (_, text) in files(bin_dir).items():
            assert name.startswith(".") or text in (wanted[name][1], old.get(name, (0, ""))[1]), f"{name} is torn"
        install().outcome()
        assert files(bin_dir) == wanted, killed
        shutil.rmtree(bin_dir)
        if old:
            bin_dir.mkdir()
        for name, (mode, text) in old.items():
            (bin_dir / name).write_text(text)
            (bin_dir / name).chmod(mode & 0o777)
    survived(f"install over {there}", len(killed["steps"]))


@pytest.mark.parametrize("remove", [False, True], ids=["add", "remove"])
def test_a_killed_install_chain_leaves_the_conflist_whole_and_the_next_finishes(tmp_path, remove, survived):
    conf_dir, backups = tmp_path / "net.d", tmp_path / "backup"
    plain = json.dumps({"cniVersion": "1.0.0", "name": "k8s", "plugins": [{"type": "ptp"}, {"type": "portmap"}]}, indent=2) + "\n"

    def start(text):
        for directory in (conf_dir, backups):
            shutil.rmtree(directory, ignore_errors=True)
        conf_dir.mkdir()
        (conf_dir / "10-net.conflist").write_text(text)

    def chain(at=None, remove=remove):
        return Child(lambda: None, lambda: mncni.chain("lat", str(conf_dir), str(backups), remove), at)

    start(plain)
    chain(remove=False).outcome()
    chained = files(conf_dir)["10-net.conflist"][1]
    before, after = (chained, plain) if remove else (plain, chained)
    start(before)
    for child in each_step(chain):
        killed = child.outcome()
        assert json.loads(files(conf_dir)["10-net.conflist"][1]) in map(json.loads, (before, after))
        chain().outcome()
        assert {name: text for name, (_, text) in files(tmp_path).items()} == {
            "net.d/10-net.conflist": after, "backup/10-net.conflist.1": before
        }, killed
        start(before)
    survived(f"install --chain{' --remove' if remove else ''}", len(killed["steps"]))
