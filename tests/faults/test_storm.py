"""Pods come and go in storms, and the plugin is killed in the midst of them: no address twice, nothing left, and an ADD costs the same
however many pods there are.

Here the plugin is the real program, a process for each call, as a runtime starts it.
"""

import collections
import itertools
import json
import random
import statistics
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.crash import diff
from tests.integration.conftest import Host

pytestmark = pytest.mark.root

CALLS, PODS = 1_000, 110  # as many calls are in flight at a time as there are pods
PATIENCE_S = 120


class Node:
    """A host of its own with pods. conf: of the plugins that each pod gets."""

    def __init__(self, directory, pods):
        self.host = Host(directory)
        batch = "".join(f"netns add {self.host.netns}-{number}\n" for number in range(pods))
        self.host.pods += [line.split()[-1] for line in batch.splitlines()]
        self.host.sh(f"ip -batch - <<'END'\n{batch}END", inside=False)

    def conf(self, number, plugins=("naivewg", "portmap", "bandwidth"), **keys):
        """The configuration of pod `number`, which has two host ports of its own."""
        asked = {
            "portMappings": [{"hostPort": 20000 + number, "containerPort": 80, "protocol": protocol} for protocol in ("tcp", "udp")],
            "bandwidth": {"ingressRate": 8_000_000, "egressRate": 8_000_000},
        }
        ipam = {"dataDir": f"{self.host.tmp}/data", "ranges": [[{"subnet": "10.88.0.0/23"}], [{"subnet": "fd00:88::/64"}]]}
        return self.host.conf(plugin=list(plugins), ipMasq=True, ipam=ipam, runtimeConfig=asked, **keys)

    def start(self, command, number, container_id, **keys):
        return self.host.start(command, self.conf(number, **keys), container_id, self.netns(number))

    def call(self, command, number, container_id, **keys):
        """The result of a call that has to succeed."""
        process = self.start(command, number, container_id, **keys)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, f"{command} of {container_id}: {stdout}{stderr}"
        return json.loads(stdout or "{}")

    def netns(self, number):
        return f"/run/netns/{self.host.pods[number]}"

    def addresses(self, number):
        """What eth0 of a pod has, the kernel's own left out."""
        links = json.loads(self.host.ip("-json address show dev eth0", netns=self.netns(number)))
        return sorted(f"{info['local']}/{info['prefixlen']}" for info in links[0]["addr_info"] if info["scope"] == "global")


@pytest.fixture
def new_node(tmp_path):
    """new_node(pods) -> Node."""
    made = []

    def new(pods):
        made.append(Node(tmp_path / str(len(made)), pods))
        return made[-1]

    yield new
    for node in made:
        node.host.close()


def addresses_of(result):
    return sorted(ip["address"] for ip in result["ips"])


class Storm:
    """ADDs and DELs of all pods of a node at once; some are killed, a machine that is too busy may let some fail. Then the runtime does
    what runtimes do: DEL until one succeeds."""

    def __init__(self, node, seed):
        self.node, self.seed, self.lock = node, seed, threading.Lock()
        self.calls, self.live, self.took_s, self.twice = collections.Counter(), {}, [0.5], []

    def call(self, dice, command, number, container_id):
        """What an ADD or DEL answered, None if it was killed or failed."""
        begin = time.monotonic()
        process = self.node.start(command, number, container_id)
        if dice.random() < 0.25:  # at a random point of what it takes at the time
            try:
                process.wait(dice.uniform(0, 1.2) * statistics.median(self.took_s[-20:]))
            except subprocess.TimeoutExpired:
                process.kill()
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
        with self.lock:
            self.calls[{0: "answered", 1: "failed", -9: "killed"}[process.returncode]] += 1
            self.took_s += [time.monotonic() - begin] if process.returncode == 0 else []
        too_slow = "no answer within" in stdout or "another process holds" in stdout
        assert process.returncode != 1 or too_slow, f"{command} of {container_id}: {stdout}{stderr}"
        return json.loads(stdout or "{}") if process.returncode == 0 else None

    def pod(self, number):
        """One pod after the other in a namespace, until there were CALLS calls; the last stays. Returns its addresses."""
        dice = random.Random(f"{self.seed} {number}")
        for generation in itertools.count():
            container_id = f"c{number}-{generation}"
            result = self.call(dice, "ADD", number, container_id)
            addresses = addresses_of(result) if result else []
            with self.lock:
                self.twice += [address for address in addresses if address in self.live]
                self.live.update(dict.fromkeys(addresses, container_id))
                if result and self.calls.total() > CALLS - PODS:
                    return container_id, addresses
            with self.lock:
                for address in addresses:
                    self.live.pop(address, None)
            while self.call(dice, "DEL", number, container_id) is None:
                pass


def test_a_thousand_adds_and_dels_with_killed_plugins_give_no_address_twice_and_leave_nothing(new_node, figure, fault):
    node, seed = new_node(PODS), random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    for command in ("ADD", "DEL"):
        node.call(command, 0, "before")
    clean, storm, begin = node.host.snapshot(), Storm(node, seed), time.monotonic()
    with ThreadPoolExecutor(PODS) as pool:
        last = list(pool.map(storm.pod, range(PODS)))
        took_s = time.monotonic() - begin
        assert not storm.twice, f"seed {seed}"
        for number, (_, addresses) in enumerate(last):
            assert node.addresses(number) == addresses, f"seed {seed}, pod {number}"
        assert len({address for _, addresses in last for address in addresses}) == 2 * PODS, f"seed {seed}"
        assert node.host.pings(node.netns(0), last[1][1][0].partition("/")[0]) == 3
        list(pool.map(lambda number: node.call("DEL", number, last[number][0]), range(PODS)))
    node.call("GC", 0, "", **{"cni.dev/valid-attachments": []})
    assert diff(clean, node.host.snapshot()) == "", f"seed {seed}"
    calls, killed, failed = storm.calls.total() + PODS, storm.calls["killed"], storm.calls["failed"]
    fault(f"{calls:,} ADD and DEL, {PODS} at a time, {killed} of them killed", leaks=0)
    figure(f"storm of {calls:,} ADD and DEL, {PODS} at a time, {killed} killed, {failed} too slow, seed {seed}: {took_s:.0f} s")
    assert killed > 20


def test_first_ever_adds_that_race_on_a_host_without_a_bridge_are_all_right(new_node, fault):
    pods = 30
    node = new_node(pods)
    started = [node.start("ADD", number, f"c{number}") for number in range(pods)]
    answers = [process.communicate(timeout=PATIENCE_S) for process in started]
    assert [process.returncode for process in started] == [0] * pods, answers
    results = [json.loads(stdout) for stdout, _ in answers]
    gateways = node.host.ip("-brief address show dev mncni0")
    assert "10.88.0.1/23" in gateways and "fd00:88::1/64" in gateways
    assert len({result["interfaces"][0]["mac"] for result in results}) == 1
    assert len({address for result in results for address in addresses_of(result)}) == 2 * pods
    node.host.sh("grep -qx 0 /proc/sys/net/ipv6/conf/mncni0/accept_ra && ip link show dev mncni0 | grep 'alias mncni'")
    for number, result in enumerate(results):
        assert node.addresses(number) == addresses_of(result)
        node.call("CHECK", number, f"c{number}", prevResult=result)
        node.host.sh("ping -c 1 -W 5 10.88.0.1", netns=node.netns(number))
    fault(f"{pods} first ADDs race on a new host", leaks=0)


FEW, MANY, ROUNDS = 10, 200, 15


@pytest.mark.alone
def test_an_add_among_200_pods_takes_as_long_as_one_among_10(new_node, figure):
    """In turns on two hosts, so that whatever else the machine does slows both."""
    nodes = {FEW: new_node(FEW + 1), MANY: new_node(MANY + 1)}
    with ThreadPoolExecutor(4) as pool:
        for pods, node in nodes.items():
            list(pool.map(lambda number, node=node: node.call("ADD", number, f"c{number}"), range(pods)))
    took_s = {FEW: [], MANY: []}
    for _ in range(ROUNDS):
        for pods, node in nodes.items():
            begin = time.monotonic()
            node.call("ADD", pods, "more")
            took_s[pods].append(time.monotonic() - begin)
            node.call("DEL", pods, "more")
    few, many = (statistics.median(took_s[pods]) * 1000 for pods in (FEW, MANY))
    figure(f"ADD with host ports and bandwidth: {few:.0f} ms among {FEW} pods, {many:.0f} ms among {MANY}, ratio {many / few:.2f}")
    assert many / few < 2
