"""A real cluster for the tests: the one that is up, or one that is made for them and removed at the end. The underlay is watched the whole
time, and a test during which a packet of pods or Services went over it in clear has failed."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy import lab as labs
from deploy.cluster import cluster as clusters
from deploy.cluster import programs
from tests.cluster import objects

PEER = Path(__file__).with_name("peer.py")
# An Ethernet frame to all with a UDP packet between addresses that are a pod's each.
FRAMES = {
    "4": "ff" * 12 + "0800" + "4500001400000000401100000af4fffe0af4fffd",  # from 10.244.255.254 to 10.244.255.253
    "6": "ff" * 12 + "86dd" + "6000000000001140" + "fd0000100244" + "00" * 9 + "01" + "fd0000100244" + "00" * 9 + "02",
}


class Driver:
    """What tests do to a cluster, and ask it."""

    def __init__(self, cluster):
        self.cluster, self.kind = cluster, cluster.state()
        self.nodes, self.families = list(cluster.nodes()), self.kind["families"]
        self.name = f"{self.kind['kubernetes']}, {self.kind['proxy']}, IPv{'+'.join(self.families)}, containerd {self.kind['containerd']}"

    def kubectl(self, *words, stdin="", timeout_s=120):
        return clusters.kubectl(self.cluster, *words, stdin=stdin, timeout_s=timeout_s)

    def get(self, *words):
        return json.loads(self.kubectl("get", "-o", "json", *words))

    def apply(self, items):
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))

    def wait_rollout(self, what, namespace=objects.NAMESPACE):
        clusters.patiently(self.cluster, "rollout", "status", "-n", namespace, what)

    def inside(self, node, *words, timeout_s=60):
        return clusters.inside(self.cluster, node, *words, timeout_s=timeout_s)

    def pods(self, selector, namespace=objects.NAMESPACE):
        """[{"name", "node", "ips"}] of pods that run and are not about to end."""
        rows = self.get("pods", "-n", namespace, "-l", selector)["items"]
        return [{"name": row["metadata"]["name"], "node": row["spec"]["nodeName"], "ips": [each["ip"] for each in row["status"]["podIPs"]]}
                for row in rows if row["status"].get("podIPs") and "deletionTimestamp" not in row["metadata"]]

    def in_pod(self, pod):
        """The words to put before a command so that it runs in a pod."""
        return [*clusters.kubectl_argv(self.cluster), "exec", "-i", "-n", objects.NAMESPACE, pod, "--"]

    def on_node(self, node):
        """The words to put before a command so that it runs on a node, where peer.py is put as well."""
        shutil.copy(PEER, self.cluster.dir / node / "conf/peer.py")
        return clusters.enter(self.cluster, node)

    def outside(self):
        return ["nsenter", f"--net=/run/netns/{self.cluster.underlay}"]

    def peer(self, where):
        """The command line of peer.py at ("pod", NAME), ("node", NAME) or ("outside", "")."""
        place, name = where
        if place == "pod":
            return [*self.in_pod(name), "python3", objects.PROGRAM]
        if place == "node":
            return [*self.on_node(name), "python3", "/k8s/conf/peer.py"]
        return [*self.outside(), labs.PYTHON, str(PEER)]

    def ask(self, where, questions):
        """The answers to questions, see peer.py."""
        return json.loads(labs.must([*self.peer(where), "ask"], json.dumps(questions), timeout_s=300))


class Sniffer:
    """tests/cluster/sniffer.py on the underlay."""

    def __init__(self, driver, path):
        self.path = path
        cidrs = [cidr for key in ("pods", "services") for cidr in programs.every(driver.kind, key)]
        argv = [*driver.outside(), labs.PYTHON, "-m", "tests.cluster.sniffer", *cidrs]
        with open(path, "w") as file:
            self.child = subprocess.Popen(argv, cwd=clusters.ROOT, stdin=subprocess.PIPE, stdout=file)
        labs.wait_until(lambda: self.lines()[:1] == ["ready"], 30, "start of the sniffer")
        for family in driver.families:               # the control: a frame made by hand, which no firewall sees
            before = len(self.lines())
            driver.inside(driver.nodes[-1], "python3", "-c", "import socket; sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); "
                          f"sock.bind(('eth0', 0)); sock.send(bytes.fromhex('{FRAMES[family]}') + bytes(26))")
            labs.wait_until(lambda before=before: len(self.lines()) > before, 30, f"sight of an IPv{family} packet in clear")
        self.seen = len(self.lines())

    def lines(self):
        return self.path.read_text().splitlines()

    def news(self):
        """The packets in clear since the last call."""
        lines = self.lines()
        before, self.seen = self.seen, len(lines)
        return lines[before:]

    def close(self):
        """What it counted."""
        self.child.stdin.close()
        self.child.wait(30)
        return json.loads(self.lines()[-1])


@pytest.fixture(scope="session")
def driver():
    cluster = clusters.Cluster()
    found = cluster.file.exists()
    if not found:
        clusters.up(cluster, clusters.wanted_kind())
    yield Driver(cluster)
    if not found:
        clusters.down(cluster)


@pytest.fixture(scope="session")
def sniffer(driver, tmp_path_factory, figure):
    made = Sniffer(driver, tmp_path_factory.mktemp("sniffer") / "clear")
    yield made
    figure(f"on the underlay ({driver.name}): {made.close()}")


@pytest.fixture(autouse=True)
def nothing_in_clear(sniffer):
    yield
    news = sniffer.news()
    assert not news, f"{len(news)} packets in clear: {news[:10]}"


@pytest.fixture(scope="session")
def everything(driver):
    """The objects of objects.everything, ready."""
    driver.apply(objects.everything(len(driver.nodes)))
    for what in ("statefulset/pods", "daemonset/hosts"):
        driver.wait_rollout(what)
    yield
    driver.kubectl("delete", "namespace", objects.NAMESPACE, "--ignore-not-found", timeout_s=300)
