"""The agent and the pod CIDR allocator are killed at every step: a new start makes of what is left what an undisturbed one would have.

What a step is, and how a process is killed at it, is in crash.py. At no step is there a way out for the cluster's packets but the tunnel.
"""

import functools
import ipaddress
import itertools
import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

import agent
import kube
import mncni
import nodeipam
from tests.apiserver import ApiProcess
from tests.faults.crash import Child, diff, each_step, hook_requests, namespaces
from tests.unit.agent_data import key_of, parse, text_of

pytestmark = pytest.mark.root

SETUP = """set -e
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
mkdir -p /run/netns /run/lock /var/lib/nodes
mount --bind /run/netns /run/netns
mount --make-shared /run/netns
ip -batch - <<'END'
link set lo up
link add eth0 address 02:00:00:00:02:01 type veth peer name wire address 02:00:00:00:02:02
link set wire up
address add 192.0.2.1/24 dev eth0
address add 2001:db8::1/64 dev eth0 nodad
link set eth0 up
route add default via 192.0.2.254
route add default via 2001:db8::fe
END
until ip -6 route show table local | grep -q 2001:db8::1; do sleep 0.01; done
echo ready
exec sleep 1000
"""
LOOK = """
ip -oneline link; ip -oneline address; ip route show table all; ip -6 route show table all; ip rule; nft list ruleset
grep . /proc/sys/net/ipv4/conf/*/route_localnet /proc/sys/net/ipv6/conf/mncni*/accept_*
"""
LOOK_INSIDE = f"nsenter --net=/run/netns/mncni-wg sh -c '{LOOK}; wg show mncni-wg0 dump | cut -f 1-5'"
TIDY = (  # what differs between two that are the same: state that comes and goes by itself, counters, random and consecutive numbers
    (r".*(fe80:(?!:28:)|ff00::|anycast).*", ""),
    (r"^\d+: |@\w+| (state|link-netns|link-netnsid|mode|group|qlen|valid_lft|preferred_lft) \S+", ""),
    (r" linkdown|NO-CARRIER,|,LOWER_UP|,M-DOWN", ""),
    (rf"(?!{key_of(2)})[\w+/]{{43}}=", "KEY"),
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID"),
    (r"\d{4}-\d\d-\d\dT[\d:]+Z", "TIME"),
    (r'"pid": \d+', "PID"),
    (r'"keyTime": \d+', "TIME"),
)
WAYS_OUT = "; ".join(f"ip -oneline route get {address} 2>&1" for address in ("10.244.9.9", "fd00:244:9::9"))
POD_CIDRS = ["10.244.1.0/24", "fd00:244:1::/64"]
IN_CLUSTER = ["--node-name", "node1", "--conf-dir", "/var/lib/net.d", "--bin-dir", "/var/lib/bin"]
IN_CLUSTER += ["--cluster-cidr", "10.244.0.0/16", "--cluster-cidr", "fd00:244::/32"]
FLAGS = [*IN_CLUSTER, "--nodes-dir", "/var/lib/nodes", "--pod-cidr", POD_CIDRS[0], "--pod-cidr", POD_CIDRS[1]]
TOOLS = mncni.search_path({"PATH": os.environ["PATH"]})
PATIENCE_S = 20
PEER = {"podCIDRs": ["10.244.2.0/24", "fd00:244:2::/64"]}


class Node:
    """A machine of its own: network, mounts, processes. It has a default route, by which packets would leave in clear."""

    def __init__(self):
        kinds = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        self.holder = subprocess.Popen(["unshare", *kinds, "sh", "-c", SETUP], stdout=subprocess.PIPE, text=True)
        assert self.holder.stdout.readline() == "ready\n"
        self.pid = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()[0]
        self.enter = namespaces(**{kind: f"/proc/{self.pid}/ns/{kind}" for kind in ("net", "pid", "mnt")})
        self.root = Path(f"/proc/{self.pid}/root")
        self.record(2).write_text(text_of(2, **PEER))

    def close(self):
        self.holder.kill()  # and all that runs in it
        self.holder.wait()
        self.holder.stdout.close()

    def sh(self, command, check=True):
        done = subprocess.run(["nsenter", "-t", self.pid, "-n", "-m", "sh", "-c", command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def record(self, number):
        return self.root / f"var/lib/nodes/node{number}.json"

    def start(self, at=None):
        """A Child: the agent comes up and does one pass more, or is killed on the way."""
        return Child(self.enter, run_agent, at)

    def uninstall(self):
        assert Child(self.enter, run_uninstall).outcome()["reply"] == agent.OK

    def look(self):
        """The machine as text, for comparison."""
        text = self.sh(f"{LOOK}; {LOOK_INSIDE}", check=False)
        for path in sorted(path for top in ("run", "var/lib") for path in (self.root / top).rglob("*[!g]") if path.is_file()):
            status = path.stat()
            text += f"{path.relative_to(self.root)} {status.st_mode:o} {status.st_size if path.suffix == '.py' else ''}\n"
            text += "" if path.suffix in (".log", ".py", ".pyc") else path.read_text()
        for pattern, new in TIDY:
            text = re.sub(pattern, new, text, flags=re.MULTILINE)
        return "\n".join(line for line in text.splitlines() if line.strip())

    def check_ways_out(self, when):
        """The cluster's packets leave through the tunnel or not at all, unless the agent has made nothing yet that packets come from."""
        made = self.sh("ip -brief link; ls /run/netns /run/mncni /var/lib/net.d 2>/dev/null", check=False)
        if re.search(r"mncni0|mncni-|ready|conflist", made):
            assert "dev eth0" not in self.sh(WAYS_OUT, check=False), when


def run_agent():
    """Until the network stands, and one pass more."""
    settings, run = parse(*FLAGS), mncni.make_run({"PATH": TOOLS})
    with agent.agent_lock(settings, 1):
        made, deadline = agent.Agent(settings, agent.make_store(settings, {}, run, None), run), time.monotonic() + PATIENCE_S
        while not made.tick(event=True):
            assert time.monotonic() < deadline, made.reason
            time.sleep(0.02)
        assert made.tick(event=True), made.reason
        return made.store_trouble


def run_uninstall():
    return agent.main(["uninstall", *FLAGS], {"PATH": TOOLS})


@pytest.fixture
def new_node():
    """new_node() -> Node; the one before it is gone."""
    nodes = []

    def new():
        while nodes:
            nodes.pop().close()
        nodes.append(Node())
        return nodes[-1]

    yield new
    while nodes:
        nodes.pop().close()


@pytest.fixture(scope="module")
def survived(fault, figure):
    """survived("ADD of lat", 12): count 12 steps at which a process was killed and nothing stayed."""
    counts = {}

    def survive(what, steps):
        counts[what] = steps
        fault(f"{what} killed, at {steps} steps", leaks=0, clear=0)

    yield survive
    figure(f"{sum(counts.values())} steps at which the agent was killed, nothing left behind")


def test_a_killed_first_start_is_finished_by_the_next(new_node, survived):
    node, seen = new_node(), None
    assert node.start().outcome()["reply"] == ""
    wanted = node.look()

    def start(number):
        nonlocal node
        node = new_node()
        return node.start(number)

    for child in each_step(start):
        killed = child.outcome()
        node.check_ways_out(killed)
        now = node.look()
        if now == seen:  # the step before changed nothing
            continue
        seen = now
        node.start().outcome()
        assert diff(wanted, node.look()) == "", killed
    survived("first start of the agent", len(killed["steps"]))


def test_uninstall_leaves_nothing_of_a_killed_first_start(new_node, survived):
    node = new_node()
    node.start().outcome()
    node.uninstall()
    clean = node.look()
    for child in each_step(node.start):
        killed = child.outcome()
        if "started wireguard-go" in killed.get("killed", ""):
            node.sh("until ip link show dev mncni-wg0; do sleep 0.01; done")
        node.uninstall()
        assert diff(clean, node.look()) == "", killed
    survived("first start of the agent, then uninstall", len(killed["steps"]))


def test_a_killed_uninstall_is_finished_by_the_next(new_node, survived):
    node = new_node()
    clean = node.look()
    node.start().outcome()
    for child in each_step(lambda at: Child(node.enter, run_uninstall, at)):
        killed = child.outcome()
        node.check_ways_out(killed)
        node.uninstall()
        assert diff(clean, node.look()) == "", killed
        node.start().outcome()
    survived("uninstall", len(killed["steps"]))


PEERS = {  # what becomes of node2's record -> what it says before, and after; None: no record
    "comes": (None, {}),
    "has another key and address": ({}, {"key": key_of(3), "port": 28385, "endpoints": ["192.0.2.3"], "gen": 2}),
    "goes": ({}, None),
}


@pytest.mark.parametrize("change", PEERS)
def test_a_killed_change_of_a_peer_is_finished_by_the_next_start(new_node, change, survived):
    node, (before, after) = new_node(), PEERS[change]

    def put(record):
        node.record(2).unlink(missing_ok=True)
        if record is not None:
            node.record(2).write_text(text_of(2, **{**PEER, **record}))

    put(after)
    node.start().outcome()
    wanted = node.look()
    for number in itertools.count(1):
        put(before)
        node.start().outcome()
        put(after)
        child = node.start(number)
        killed = child.outcome()
        node.check_ways_out(killed)
        node.start().outcome()
        assert diff(wanted, node.look()) == "", killed
        if not child.killed:
            break
    survived(f"agent, while a peer {change},", len(killed["steps"]))


KEYS = "cd /var/lib/mncni; wg pubkey <key; nsenter --net=/run/netns/mncni-wg wg show mncni-wg0 public-key; test ! -e key.new"


def told_key(node):
    return json.loads(node.record(1).read_text())["key"]


def test_a_killed_change_of_the_key_is_finished_by_the_next_start_and_leaves_one_whole_key(new_node, survived):
    node = new_node()
    node.start().outcome()
    for child in each_step(lambda at: (leave_next_key(node), node.start(at))[1]):
        killed = child.outcome()
        node.check_ways_out(killed)
        whole = node.sh("cd /var/lib/mncni; wg pubkey <key; test ! -e key.new || wg pubkey <key.new").split()
        assert told_key(node) in whole, killed  # nobody knows a key that is nowhere
        node.start().outcome()
        assert node.sh(KEYS).split() == [told_key(node)] * 2 == [whole[-1]] * 2, killed
    survived("agent, while it changes its key,", len(killed["steps"]))


def leave_next_key(node):
    """As `agent.py rotate` does it."""
    before = node.sh("wg pubkey </var/lib/mncni/key")
    node.sh("umask 077; wg genkey >/var/lib/mncni/key.new")
    assert before != node.sh("wg pubkey </var/lib/mncni/key.new")


def test_a_next_key_whose_writing_was_killed_is_whole_or_absent(new_node, survived):
    node = new_node()
    node.start().outcome()
    for child in each_step(lambda at: Child(node.enter, lambda: agent.write_next_key("/var/lib/mncni/key", agent.make_key()), at)):
        killed = child.outcome()
        assert node.sh("cd /var/lib/mncni; test ! -e key.new || wg pubkey <key.new").strip() != told_key(node), killed
        node.sh("rm -f /var/lib/mncni/key.new")
    survived("writing of a next key", len(killed["steps"]))


# ---- requests to an API server: of the agent, and of the allocator ----


def run_agent_in_a_cluster(kubeconfig):
    """Until the cluster says that the node's network stands."""
    settings, run = parse(*IN_CLUSTER, "--kubeconfig", kubeconfig), mncni.make_run({"PATH": TOOLS})
    os.makedirs(settings.run_dir, exist_ok=True)
    store = agent.make_store(settings, {}, run, lambda: None)
    store.start()
    made, deadline = agent.Agent(settings, store, run), time.monotonic() + PATIENCE_S
    while not (made.tick() and store.own["record"] == made.own_record() and store.own["condition"].get("status") == "False"):
        assert time.monotonic() < deadline, f"{made.reason} {store.trouble} {store.own}"
        time.sleep(0.02)


def test_an_agent_killed_at_any_request_to_the_cluster_is_as_good_as_new_at_the_next_start(new_node, tmp_path, survived):
    node, kubeconfig = new_node(), str(tmp_path / "kubeconfig")
    with ApiProcess(tmp_path / "api", netns=f"/proc/{node.pid}/ns/net") as api:
        api.call("kubeconfig", kubeconfig, "system:serviceaccount:kube-system:mncni-agent")
        api.call("create_node", "node2", pod_cidrs=PEER["podCIDRs"])
        for number in itertools.count(1):
            uid = api.call("create_node", "node1", pod_cidrs=POD_CIDRS, addresses=["192.0.2.1"])["metadata"]["uid"]
            child = Child(node.enter, lambda: run_agent_in_a_cluster(kubeconfig), number, hook_requests)
            killed = child.outcome()
            Child(node.enter, lambda: run_agent_in_a_cluster(kubeconfig)).outcome()
            made = api.call("node", "node1")
            record = json.loads(made["metadata"]["annotations"]["mncni.dev/node"])
            assert (record["uid"], record["podCIDRs"]) == (uid, POD_CIDRS), killed
            assert [row["reason"] for row in made["status"]["conditions"] if row["type"] == "NetworkUnavailable"] == ["MncniIsUp"], killed
            api.call("delete_node", "node1")
            (node.root / "var/lib/mncni/nodes.json").unlink()
            if not child.killed:
                break
    survived("agent in a cluster, at its requests,", len(killed["steps"]))


SPEED = 30  # how much faster than time an allocator's clock runs: another waits 15 s for the Lease of one that was killed
CIDRS = [ipaddress.ip_network(text) for text in ("10.0.0.0/12", "fd00:10::/40")]
POOLS = {4: (24, (CIDRS[0],)), 6: (64, (CIDRS[1],))}


def allocate(kubeconfig, lease, count):
    """Until count nodes have pod CIDRs."""

    def clock():
        return time.monotonic() * SPEED

    def follow(put, stopping):
        kube.start_thread(kube.follow_nodes, api, nodeipam.parse_claim, put, ipam.tell, stopping)

    api, deadline = kube.open_api(kubeconfig, {}, None), time.monotonic() + PATIENCE_S
    election = nodeipam.Election(kube.Api(api.access), lease, str(os.getpid()), clock)
    ipam = nodeipam.NodeIpam(election.api, POOLS, election, clock, follow)
    while sum(bool(claim.cidrs) for claim in (ipam.claims or {}).values()) < count:
        assert time.monotonic() < deadline, ipam.counters
        ipam.tick(0.01)
    election.release()


def test_an_allocator_killed_at_any_request_gives_no_range_twice_and_the_next_goes_on(tmp_path, survived):
    kubeconfig, names = str(tmp_path / "kubeconfig"), ["n1", "n2", "n3"]
    with ApiProcess(tmp_path / "api") as api:
        api.call("kubeconfig", kubeconfig, "system:serviceaccount:kube-system:mncni-nodeipam")
        for number in itertools.count(1):
            for name in names:
                api.call("create_node", name)
            act = functools.partial(allocate, kubeconfig, f"kube-system/lease{number}", len(names))
            child = Child(lambda: None, act, number, hook_requests)
            killed = child.outcome()
            given = {name: api.call("node", name)["spec"].get("podCIDRs") for name in names}
            Child(lambda: None, act).outcome()
            ranges = {name: api.call("node", name)["spec"]["podCIDRs"] for name in names}
            assert all(ranges[name] == cidrs for name, cidrs in given.items() if cidrs), killed
            assert len({cidr for cidrs in ranges.values() for cidr in cidrs}) == 2 * len(names), killed
            for name in names:
                api.call("delete_node", name)
            if not child.killed:
                break
    survived("allocator", len(killed["steps"]))
