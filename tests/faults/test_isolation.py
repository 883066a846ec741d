"""Packets that pods, and other nodes, have no right to send: they die where they come in, and for each it is shown that the same probe
with a right arrives.

A table "inet probe" counts them: when they come in, and when they are on their way to a process of the host or to another link.
"""

import contextlib
import json
import os

import pytest

from deploy import lab as labs
from tests.e2e.conftest import lab_up, node_sh, wait_well, wg_peers

pytestmark = pytest.mark.root

COUNT = 5  # packets of a probe
PORT = 9999
HTTP = 28386  # the agent's --listen
INSIDE = "nsenter --net=/run/netns/mncni-wg"
PROBE = """
table inet probe {{
  counter came {{ }}
  counter went {{ }}
  chain first {{ type filter hook prerouting priority -450; iifname "{link}" {match} counter name came; }}
  chain host {{ type filter hook input priority 10; iifname "{link}" {match} counter name went; }}
  chain onward {{ type filter hook forward priority 10; iifname "{link}" {match} counter name went; }}
}}
"""
SEND = """
import socket, sys
source, target, port, count = *sys.argv[1:3], *map(int, sys.argv[3:])
sender = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM)
sender.bind((source, 0))
for _ in range(count):
    sender.sendto(b"probe", (target, port))
"""
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1)"
HOST_PORT = {"portMappings": [{"hostPort": 18080, "containerPort": 8080, "protocol": "tcp", "hostIP": ""}]}


@pytest.fixture(scope="module")
def lab():
    """node1 has a host port, so that its bridge accepts 127.0.0.1; node2 has none."""
    with lab_up(f"mncni-isolate-{os.getpid()}") as made:
        labs.add_pod(made, "node1", "web", HOST_PORT)
        yield made


@contextlib.contextmanager
def counting(lab, node, link, match, netns=""):
    """Counts what matches and comes in by a link: {"came", "went"}, known after the with block."""
    enter = INSIDE if netns else ""
    counts = {}
    node_sh(lab, node, f"{enter} nft '{PROBE.format(link=link, match=match)}'")
    try:
        yield counts
        listed = json.loads(node_sh(lab, node, f"{enter} nft -j list counters table inet probe"))["nftables"]
        counts.update({item["counter"]["name"]: item["counter"]["packets"] for item in listed if "counter" in item})
    finally:
        node_sh(lab, node, f"{enter} nft delete table inet probe")


@contextlib.contextmanager
def agent_standing_still(lab, node):
    """It would put right what a test changes."""
    node_sh(lab, node, f"kill -STOP $(cat {labs.AGENT_PID})")
    try:
        yield
    finally:
        node_sh(lab, node, f"kill -CONT $(cat {labs.AGENT_PID})")
        wait_well(lab, node)


@contextlib.contextmanager
def without_spoof_check(lab, node):
    """As for pods of a conflist without it: then the agent's firewall is what stands in the way."""
    with agent_standing_still(lab, node):
        node_sh(lab, node, "nft delete table bridge mncni_spoof")
        yield
    labs.wait_until(lambda: "mncni_spoof" in node_sh(lab, node, "nft list tables"), 20, "rules of spoofCheck, written again by the agent")


def pod_sh(lab, pod, command, node="node1"):
    return labs.must([*labs.pod_argv(lab, node, pod), "sh", "-c", command])


def addresses(lab, node):
    """{IP version: address} of a node's pod1."""
    return {6 if ":" in address else 4: address for address in labs.pod_record(lab, node, "pod1")["addresses"]}


def version(address):
    return 6 if ":" in address else 4


def reaches(argv, address, port=HTTP):
    return labs.run([*argv, labs.PYTHON, "-c", CONNECT, address, str(port)])[0] == 0


# ---- sources ----

SOURCES = {
    "an address of another node's pods": ("10.244.2.77", "fd00:10:244:2::77"),
    "an address of no node's pods": ("10.244.77.5", "fd00:10:244:77::5"),
    "an address of the nodes' network": ("192.0.2.55", "2001:db8::55"),
    "an address of the world": ("198.51.100.1", "2001:db8:99::1"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_a_pod_sends_from_another_address_dies_at_its_veth_and_at_the_bridge(lab, source):
    """On its way to a remote pod, to the node, and to the world: spoofCheck drops it, and without that the agent's firewall does."""
    own = addresses(lab, "node1")
    targets = {4: ["10.244.2.2", "192.0.2.1", "192.0.2.2"], 6: ["fd00:10:244:2::2", "fd00:10:244:1::1"]}
    for address in SOURCES[source]:
        family = version(address)
        length = {4: 32, 6: 128}[family]
        pod_sh(lab, "pod1", f"ip address add {address}/{length} dev eth0 {'nodad' if family == 6 else ''}")
        try:
            for target in targets[family]:
                assert probe_from_pod(lab, own[family], target) == {"came": COUNT, "went": COUNT}, "from its own address it gets through"
                assert probe_from_pod(lab, address, target) == {"came": 0, "went": 0}
            with without_spoof_check(lab, "node1"):
                for target in targets[family]:
                    assert probe_from_pod(lab, address, target) == {"came": COUNT, "went": 0}
        finally:
            pod_sh(lab, "pod1", f"ip address delete {address}/{length} dev eth0")


def probe_from_pod(lab, source, target):
    with counting(lab, "node1", "mncni0", f"udp dport {PORT}") as counts:
        labs.must([*labs.pod_argv(lab, "node1", "pod1"), labs.PYTHON, "-c", SEND, source, target, str(PORT), str(COUNT)])
    return counts


# ---- targets ----

TARGETS = {
    "the node": ("192.0.2.1",),
    "another node": ("192.0.2.2",),
    "the tunnel's namespace": ("169.254.28.84",),
    "what no node has": ("10.244.77.1", "fd00:10:244:77::1"),
    "the cloud's metadata": ("169.254.169.254",),
    "the world": ("198.51.100.1", "2001:db8:99::1"),
}


@pytest.fixture(scope="module")
def hostile(lab):
    """node2 sends node1 whatever it likes: its WireGuard takes all addresses for node1's."""
    with agent_standing_still(lab, "node2"):
        [key] = wg_peers(lab, "node2")
        node_sh(lab, "node2", f"{INSIDE} wg set mncni-wg0 peer {key} allowed-ips 0.0.0.0/0,::/0")
        node_sh(lab, "node2", f"{INSIDE} ip address add 10.244.2.99/32 dev lo; {INSIDE} ip address add fd00:10:244:2::99/128 dev lo nodad")
        for target in [address for pair in TARGETS.values() for address in pair]:
            node_sh(lab, "node2", f"{INSIDE} ip address flush to {target}; {INSIDE} ip route add {target} dev mncni-wg0")
        yield
        node_sh(lab, "node2", "ip netns delete mncni-wg")  # the agent makes another


@pytest.mark.parametrize("target", TARGETS)
def test_what_comes_out_of_the_tunnel_for_anything_but_own_pods_dies(lab, hostile, target):
    own = addresses(lab, "node1")
    for address in TARGETS[target]:
        family = version(address)
        assert probe_from_tunnel(lab, own[family]) == {"came": COUNT, "went": COUNT}, "for a pod it gets through"
        assert probe_from_tunnel(lab, address) == {"came": COUNT, "went": 0}


LIES = ("10.244.1.99", "10.244.77.5", "192.0.2.55", "198.51.100.1", "fd00:10:244:1::99", "fd00:10:244:77::5", "2001:db8::55")


@pytest.mark.parametrize("source", LIES)
def test_what_a_node_sends_from_others_addresses_does_not_come_out_of_the_tunnel(lab, hostile, source):
    node_sh(lab, "node2", f"{INSIDE} ip address add {source} dev lo {'nodad' if ':' in source else ''}")
    assert probe_from_tunnel(lab, addresses(lab, "node1")[version(source)], source) == {"came": COUNT, "went": COUNT}
    node_sh(lab, "node2", f"{INSIDE} ip address flush to {source}")


def probe_from_tunnel(lab, target, *lies):
    """What comes of a probe from an address of node2's pods, after others from sources that are not."""
    with counting(lab, "node1", "mncni-wg0", f"udp dport {PORT}", netns="mncni-wg") as counts:
        for source in (*lies, {4: "10.244.2.99", 6: "fd00:10:244:2::99"}[version(target)]):
            node_sh(lab, "node2", f"{INSIDE} {labs.PYTHON} -c '{SEND}' {source} {target} {PORT} {COUNT}")
        arrived = [*labs.node_argv(lab, "node1"), *INSIDE.split(), "nft", "-j", "list", "counter", "inet", "probe", "came"]
        labs.wait_until(lambda: f'"packets": {COUNT}' in labs.run(arrived)[1], 10, f"{COUNT} probes for {target}")
    return counts


# ---- the node's own ----


def test_pods_do_not_reach_the_namespace_of_the_tunnel(lab):
    own, target = addresses(lab, "node1"), "169.254.28.84"
    with counting(lab, "node1", "mncni-ns", f"udp dport {PORT}", netns="mncni-wg") as counts:
        for address in (target, addresses(lab, "node2")[4]):
            labs.must([*labs.pod_argv(lab, "node1", "pod1"), labs.PYTHON, "-c", SEND, own[4], address, str(PORT), str(COUNT)])
    assert counts == {"came": 2 * COUNT, "went": COUNT}, "for the remote pod it goes on"
    ping = [*labs.pod_argv(lab, "node1", "pod1"), "ping", "-n", "-c1", "-W1"]
    assert labs.run([*ping, target])[0] and labs.run([*ping, "fe80::28:84%eth0"])[0]
    assert labs.run([*ping, "fe80::28:82%eth0"])[0] == 0, "the bridge, their neighbour, does answer"


def test_pods_do_not_reach_the_agents_pages(lab):
    """Through no address of their node, nor of the other."""
    wait_well(lab, "node1")
    assert reaches(labs.node_argv(lab, "node1"), "127.0.0.1")
    argv = labs.pod_argv(lab, "node1", "pod1")
    with counting(lab, "node1", "mncni0", f"tcp dport {HTTP}") as counts:
        for address in ("10.244.1.1", "192.0.2.1", "fd00:10:244:1::1", "192.0.2.2", "10.244.2.1", "169.254.28.84"):
            assert not reaches(argv, address)
    assert counts["went"] >= 6, "they get there, and nobody listens"


TRICK = """
echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet
ip route delete local 127.0.0.0/8 dev lo table local
ip route delete local 127.0.0.1 dev lo table local
ip route add 127.0.0.1 via {gateway} dev eth0
"""


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_pods_do_not_reach_127_0_0_1_of_their_node(lab, node):
    """Although they send there: the one node accepts 127.0.0.1 from its bridge, for a host port; the other does not."""
    localnet = node_sh(lab, node, "cat /proc/sys/net/ipv4/conf/mncni0/route_localnet")
    assert localnet.strip() == {"node1": "1", "node2": "0"}[node]
    labs.add_pod(lab, node, "sly")
    try:
        pod_sh(lab, "sly", TRICK.format(gateway=f"10.244.{node[-1]}.1"), node)
        argv = labs.pod_argv(lab, node, "sly")
        with counting(lab, node, "mncni0", f"ip daddr 127.0.0.1 tcp dport {HTTP}") as counts:
            assert not reaches(argv, "127.0.0.1")
        assert counts["came"] >= 1 and counts["went"] == 0
        with agent_standing_still(lab, node):  # the test of the test: without what is in its way, it would get there
            node_sh(lab, node, "nft delete table inet mncni_portmap 2>/dev/null; echo 1 >/proc/sys/net/ipv4/conf/mncni0/route_localnet")
            if node == "node1":
                assert not reaches(argv, "127.0.0.1"), "tc's filter stands when nft is flushed"
                node_sh(lab, node, "tc filter delete dev mncni0 ingress pref 127")
            with counting(lab, node, "mncni0", f"ip daddr 127.0.0.1 tcp dport {HTTP}") as counts:
                reaches(argv, "127.0.0.1")
            assert counts["went"] >= 1
            node_sh(lab, node, f"echo {localnet.strip()} >/proc/sys/net/ipv4/conf/mncni0/route_localnet")
        labs.wait_until(lambda: not reaches(argv, "127.0.0.1"), 20, "end of the way to 127.0.0.1")
    finally:
        labs.del_pod(lab, node, "sly")


ADVERTISE = """
import socket
packet = bytes([134, 0, 0, 0, 64, 0, 7, 8]) + bytes(8)  # a router, for 1800 s
packet += bytes([3, 4, 64, 0xC0]) + (3600).to_bytes(4, "big") * 2 + bytes(4) + socket.inet_pton(socket.AF_INET6, "2001:db8:bad::")
sender = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
sender.sendto(packet, ("ff02::1", 0, 0, socket.if_nametoindex("eth0")))
"""


def test_a_pod_that_calls_itself_a_router_is_not_believed(lab):
    """spoofCheck drops what it says. Without that, neither the node believes it nor pods, but one that was told to: so it was heard."""
    labs.add_pod(lab, "node1", "believer")
    try:
        pod_sh(lab, "believer", "echo 1 >/proc/sys/net/ipv6/conf/eth0/accept_ra")
        look = "ip -6 address show; ip -6 route show"
        before = pod_sh(lab, "pod1", look), node_sh(lab, "node1", look)
        advertise = [*labs.pod_argv(lab, "node1", "web"), labs.PYTHON, "-c", ADVERTISE]
        dropped = "nft list counter bridge mncni_spoof dropped | grep -o 'packets [0-9]*'"
        count = node_sh(lab, "node1", dropped)
        labs.must(advertise)
        labs.wait_until(lambda: node_sh(lab, "node1", dropped) != count, 10, "dropped advertisement")
        assert "proto ra" not in pod_sh(lab, "believer", look)
        with without_spoof_check(lab, "node1"):
            labs.must(advertise)
            labs.wait_until(lambda: "proto ra" in pod_sh(lab, "believer", look), 10, "pod that believes in the router")
            assert (pod_sh(lab, "pod1", look), node_sh(lab, "node1", look)) == before
    finally:
        labs.del_pod(lab, "node1", "believer")
