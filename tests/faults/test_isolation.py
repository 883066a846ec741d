"""Packets that pods, and other nodes, have no right to send: they die where they come in, and for each it is shown that the same probe
with a right arrives.

A table "inet probe" counts them: when they come in, and when they are on their way to a process of the host or to another link.
"""

import contextlib
import json
import os
import subprocess

import pytest

from deploy import lab as labs
from tests.e2e.conftest import OUTSIDE_IP, lab_up, node_sh, outsider, restart_agent, wait_well, wg_peers
from tests.e2e.test_services import CONNECT as FETCH
from tests.e2e.test_services import SERVE

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
    "the gateway's address": ("10.244.1.1", "fd00:10:244:1::1"),
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
    mac = node_sh(lab, "node1", "cat /sys/class/net/mncni0/address").strip()
    for gateway in SOURCES["the gateway's address"]:  # a pod that has its address cannot ask for it
        pod_sh(lab, "pod1", f"ip neighbour replace {gateway} lladdr {mac} dev eth0")
    for address in SOURCES[source]:
        family = version(address)
        length = {4: 32, 6: 128}[family]
        pod_sh(lab, "pod1", f"ip address add {address}/{length} dev eth0 {'nodad' if family == 6 else ''}")
        try:
            for target in set(targets[family]) - {address}:
                assert probe_from_pod(lab, own[family], target) == {"came": COUNT, "went": COUNT}, "from its own address it gets through"
                assert probe_from_pod(lab, address, target) == {"came": 0, "went": 0}
            with without_spoof_check(lab, "node1"):
                for target in set(targets[family]) - {address}:
                    assert probe_from_pod(lab, address, target) == {"came": COUNT, "went": 0}
        finally:
            pod_sh(lab, "pod1", f"ip address delete {address}/{length} dev eth0")
    pod_sh(lab, "pod1", "ip neighbour flush dev eth0 nud permanent")


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


LIES = ("10.244.1.99", "10.244.1.1", "fd00:10:244:1::1", "169.254.28.84", "10.244.77.5", "192.0.2.55",
        "198.51.100.1", "fd00:10:244:1::99", "fd00:10:244:77::5", "2001:db8::55")


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
        labs.wait_until(lambda: "tentative" not in node_sh(lab, "node1", look), 20, "addresses of the new veth, looked at for duplicates")
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


def test_what_pods_address_to_the_bridges_neighbours_is_checked_after_somebody_deleted_the_bridge(lab):
    """The new bridge's ports are as the plugin made them: else such frames would reach the node unchecked."""

    def ports():
        look = ["ip", "-json", "-details", "link", "show", "master", "mncni0"]
        links = json.loads(labs.run([*labs.node_argv(lab, "node1"), *look])[1] or "[]")
        keys = ("hairpin", "guard", "group_fwd_mask")
        return {link["ifname"]: [link["linkinfo"]["info_slave_data"].get(key) for key in keys] for link in links}

    before = ports()
    assert before and all(port[:2] == [True, True] for port in before.values())
    node_sh(lab, "node1", "ip link delete mncni0")
    labs.wait_until(lambda: ports().keys() == before.keys(), 20, "all pods at a new bridge")
    labs.wait_until(lambda: ports() == before, 20, "ports that are as the plugin made them")


# ---- the underlay ----

NODE1 = {4: "192.0.2.1", 6: "2001:db8::1"}
SERVICE = {4: "10.96.0.10", 6: "fd00:96::10"}
SERVICE_CIDRS = ("--service-cidr", "10.96.0.0/16", "--service-cidr", "fd00:96::/112")


@pytest.fixture(scope="module")
def outside(lab):
    """A machine on the underlay that sends what is for the cluster to node1. No reverse path filter helps node1."""
    with outsider(lab) as argv:
        node_sh(lab, "node1", "for key in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$key; done")
        for version, networks in {4: ("10.244.0.0/16", "10.96.0.0/16"), 6: ("fd00:10:244::/48", "fd00:96::/112")}.items():
            for network in networks:
                labs.must([*argv, "ip", f"-{version}", "route", "add", network, "via", NODE1[version]])
        yield argv


@contextlib.contextmanager
def unguarded(lab, node="node1"):
    """The test of the test: the node without the agent's firewall."""
    with agent_standing_still(lab, node):
        node_sh(lab, node, "nft delete table inet mncni")
        yield
    listed = [*labs.node_argv(lab, node), "nft", "list", "table", "inet", "mncni"]
    labs.wait_until(lambda: labs.run(listed)[0] == 0, 20, "the agent's firewall")


@contextlib.contextmanager
def claiming(argv, address):
    """The outsider has the address, too."""
    length = {4: 32, 6: 128}[version(address)]
    labs.must([*argv, "ip", "address", "add", f"{address}/{length}", "dev", "eth0", *(["nodad"] if ":" in address else [])])
    try:
        yield
    finally:
        labs.must([*argv, "ip", "address", "delete", f"{address}/{length}", "dev", "eth0"])


def probe_from_outside(lab, argv, source, target):
    labs.must([*argv, "ping", "-n", "-c1", "-w5", NODE1[version(target)]])  # neighbours know each other
    with counting(lab, "node1", "eth0", f"udp dport {PORT}") as counts:
        labs.must([*argv, labs.PYTHON, "-c", SEND, source, target, str(PORT), str(COUNT)])
        arrived = [*labs.node_argv(lab, "node1"), "nft", "-j", "list", "counter", "inet", "probe", "came"]
        labs.wait_until(lambda: f'"packets": {COUNT}' in labs.run(arrived)[1], 10, f"{COUNT} probes for {target}")
    return counts


def refused(lab, node="node1"):
    """Packets that the agent of a node has counted as refused, as `status` says."""
    _, text, _ = labs.run([*labs.node_argv(lab, node), labs.PYTHON, "/opt/mncni/agent.py", "status", "--json"])
    return json.loads(text)["dropped"]["refused"]


OUTSIDERS_CLAIM = {
    "a pod of another node": ("10.244.2.2", "fd00:10:244:2::2"),
    "an address of no node's pods": ("10.244.77.5", "fd00:10:244:77::5"),
    "a pod of that node": ("10.244.1.77", "fd00:10:244:1::77"),
    "the gateway of another node": ("10.244.2.1", "fd00:10:244:2::1"),
    "nobody but itself": tuple(OUTSIDE_IP.values()),
}


@pytest.mark.parametrize("claim", OUTSIDERS_CLAIM)
def test_nobody_on_the_underlay_speaks_as_a_pod_nor_to_one(lab, outside, claim):
    """Neither to a pod, nor to a pod of another node, nor to the gateway or the node."""
    own = addresses(lab, "node1")
    for source in OUTSIDERS_CLAIM[claim]:
        family = version(source)
        itself = source in OUTSIDE_IP.values()
        targets = [own[family], {4: "10.244.2.3", 6: "fd00:10:244:2::3"}[family], {4: "10.244.1.1", 6: "fd00:10:244:1::1"}[family]]
        with contextlib.nullcontext() if itself else claiming(outside, source):
            before = refused(lab)
            for target in targets:
                assert probe_from_outside(lab, outside, source, target) == {"came": COUNT, "went": 0}
            answer = probe_from_outside(lab, outside, source, NODE1[family])
            assert answer == {"came": COUNT, "went": COUNT if itself else 0}
            assert refused(lab) == before + COUNT * (len(targets) + (not itself))
            with unguarded(lab):
                for target in targets:
                    assert probe_from_outside(lab, outside, source, target) == {"came": COUNT, "went": COUNT}


@pytest.fixture(scope="module")
def server(lab):
    """pod1 of node2 tells whoever connects to port 8080 his address."""
    argv = [*labs.pod_argv(lab, "node2", "pod1"), labs.PYTHON, "-c", SERVE]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        yield addresses(lab, "node2")
        process.kill()


def fetch(argv, address, port=8080):
    """What the server says, "" if it cannot be reached."""
    return labs.run([*argv, labs.PYTHON, "-c", FETCH, address, str(port)])[1].strip()


@pytest.mark.parametrize("family", SERVICE)
def test_no_node_relays_a_connection_from_the_underlay_into_the_mesh(lab, outside, server, family):
    """Neither to a pod, nor to a Service, which the node translates; but to a port of its own that leads there."""
    restart_agent(lab, argv=[*labs.plan_agent(lab, "node1"), *SERVICE_CIDRS])
    wait_well(lab, "node1")
    ip, gateway = {4: "ip", 6: "ip6"}[family], {4: "10.244.1.1", 6: "fd00:10:244:1::1"}[family]
    to = {4: f"{server[4]}:8080", 6: f"[{server[6]}]:8080"}[family]
    rules = f"{ip} daddr {SERVICE[family]} tcp dport 80 dnat {ip} to {to}; {ip} daddr {NODE1[family]} tcp dport 30080 dnat {ip} to {to};"
    node_sh(lab, "node1", f"nft 'table inet services {{ chain pre {{ type nat hook prerouting priority -100; {rules} }}; }}'")
    try:
        assert fetch(outside, NODE1[family], 30080) == gateway
        assert fetch(labs.pod_argv(lab, "node1", "pod1"), SERVICE[family], 80) == addresses(lab, "node1")[family]
        assert fetch(outside, server[family]) == "" == fetch(outside, SERVICE[family], 80)
        with unguarded(lab):
            # Without the agent's firewall, nothing gives what enters the tunnel the gateway's address, and the peer drops it.
            snat = f'oifname "mncni-host" meta nfproto {"ipv" + str(family)} snat {ip} to {gateway}'
            node_sh(lab, "node1", f"nft 'table inet probe2 {{ chain post {{ type nat hook postrouting priority 90; {snat}; }}; }}'")
            assert fetch(outside, server[family]) == gateway == fetch(outside, SERVICE[family], 80)
            node_sh(lab, "node1", "nft delete table inet probe2")
    finally:
        node_sh(lab, "node1", "nft delete table inet services")
        restart_agent(lab)
        wait_well(lab, "node1")


SOURCE_ROUTE = """
import socket, sys
way, target, port, count = *sys.argv[1:3], *map(int, sys.argv[3:])
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes([131, 7, 4]) + socket.inet_aton(way) + bytes(1))
for _ in range(count):
    sender.sendto(b"probe", (target, port))
"""


def test_a_source_route_through_the_node_leads_to_no_pod(lab, outside):
    """The packet is addressed to the node, which is to send it on to a pod. Most hosts ignore that, this one does not."""
    node_sh(lab, "node1", "for name in all eth0; do echo 1 >/proc/sys/net/ipv4/conf/$name/accept_source_route; done")
    try:
        for target in (addresses(lab, "node1")[4], addresses(lab, "node2")[4]):
            for guard, went in ((contextlib.nullcontext(), 0), (unguarded(lab), COUNT)):
                with guard, counting(lab, "node1", "eth0", f"udp dport {PORT}") as counts:
                    labs.must([*outside, labs.PYTHON, "-c", SOURCE_ROUTE, NODE1[4], target, str(PORT), str(COUNT)])
                assert counts == {"came": COUNT, "went": went}
    finally:
        node_sh(lab, "node1", "echo 0 >/proc/sys/net/ipv4/conf/all/accept_source_route")


SMALL = "(socket.IPPROTO_IPV6, 24, 1280) if sender.family == socket.AF_INET6 else (socket.IPPROTO_IP, 10, 0)"  # IPV6_MTU; no discovery
FRAGMENTS = SEND.replace('b"probe"', "bytes(4000)").replace("for _", f"sender.setsockopt(*({SMALL}))\nfor _")


def test_fragments_from_the_underlay_get_no_further(lab, outside):
    """Later fragments have no ports: all packets from the address are counted."""
    for source in ("10.244.2.2", "fd00:10:244:2::2"):
        family = version(source)
        with claiming(outside, source):
            for guard, gets_in in ((contextlib.nullcontext(), False), (unguarded(lab), True)):
                with guard, counting(lab, "node1", "eth0", f"{'ip6' if family == 6 else 'ip'} saddr {source}") as counts:
                    own = addresses(lab, "node1")[family]
                    labs.must([*outside, "ping", "-n", "-c1", "-w5", NODE1[family]])  # neighbours know each other
                    labs.must([*outside, labs.PYTHON, "-c", FRAGMENTS, source, own, str(PORT), str(COUNT)])
                assert counts["came"] >= COUNT and bool(counts["went"]) == gets_in, (source, counts)


def test_another_network_of_the_host_is_no_way_to_pods_either(lab):
    """A bridge of Docker's, or a second network of mncni, whose addresses are in no cluster CIDR. To the world it leads as before."""
    setup = """
        ip netns add guest; ip link add docker0 type bridge; ip address add 172.17.0.1/16 dev docker0; ip link set docker0 up
        ip link add guest type veth peer name eth0 netns guest; ip link set guest master docker0 up
        ip -n guest address add 172.17.0.2/16 dev eth0; ip -n guest link set eth0 up; ip -n guest route add default via 172.17.0.1
        for key in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$key; done
    """
    node_sh(lab, "node1", setup)
    send = f"ip netns exec guest {labs.PYTHON} -c '{SEND}' 172.17.0.2"
    try:
        pods = addresses(lab, "node1")[4], addresses(lab, "node2")[4]
        with counting(lab, "node1", "docker0", f"udp dport {PORT}") as counts:
            node_sh(lab, "node1", f"{send} 192.0.2.2 {PORT} {COUNT}")
        assert counts == {"came": COUNT, "went": COUNT}
        for guard, went in ((contextlib.nullcontext(), 0), (unguarded(lab), COUNT)):
            for pod in pods:
                with guard, counting(lab, "node1", "docker0", f"udp dport {PORT}") as counts:
                    node_sh(lab, "node1", f"{send} {pod} {PORT} {COUNT}")
                assert counts == {"came": COUNT, "went": went}
                guard = unguarded(lab) if went else contextlib.nullcontext()
    finally:
        node_sh(lab, "node1", "ip netns delete guest; ip link delete docker0")


ECHO = """
import socket, sys
server = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
server.bind((sys.argv[1], 7000))
print("up", flush=True)
while True:
    text, peer = server.recvfrom(99)
    server.sendto(peer[0].encode(), peer)
"""
ASK = """
import socket, sys
own, port, target = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with socket.socket(socket.AF_INET6 if ":" in own else socket.AF_INET, socket.SOCK_DGRAM) as asker:
    asker.bind((own, port))
    asker.settimeout(2)
    asker.sendto(b"?", (target, 7000))
    print(asker.recv(99).decode())
"""


@pytest.mark.parametrize("family", SERVICE)
def test_without_masquerade_answers_reach_pods_and_nothing_else_does(lab, outside, family):
    """A spoofed answer of a remote pod, to a question that was asked, is no answer."""
    restart_agent(lab, argv=[*labs.plan_agent(lab, "node1"), "--masquerade", "false"])
    wait_well(lab, "node1")
    own, remote = addresses(lab, "node1")[family], addresses(lab, "node2")[family]
    pod, away = labs.pod_argv(lab, "node1", "pod1"), list(OUTSIDE_IP.values())[family == 6]
    try:
        with subprocess.Popen([*outside, labs.PYTHON, "-c", ECHO, away], stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout.readline() == "up\n"
            assert labs.must([*pod, labs.PYTHON, "-c", ASK, own, str(PORT), away]) == f"{own}\n", "the answer came to the pod's address"
            server.kill()
        before = refused(lab)
        assert probe_from_outside(lab, outside, away, own) == {"came": COUNT, "went": 0}
        labs.run([*pod, labs.PYTHON, "-c", ASK, own, "7001", remote])  # nobody answers, but the connection is known
        flow = f"udp sport 7000 udp dport 7001 {'ip6' if family == 6 else 'ip'} saddr {remote}"
        for guard, went, more in ((contextlib.nullcontext(), 0, 2 * COUNT), (unguarded(lab), COUNT, 0)):
            with claiming(outside, remote), guard, counting(lab, "node1", "eth0", flow) as counts:
                for _ in range(COUNT):
                    labs.must([*outside, labs.PYTHON, "-c", ANSWER, remote, own])
                assert not more or refused(lab) == before + more
            assert counts == {"came": COUNT, "went": went}
    finally:
        restart_agent(lab)
        wait_well(lab, "node1")


ANSWER = """
import socket, sys
with socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM) as sender:
    sender.bind((sys.argv[1], 7000))
    sender.sendto(b"!", (sys.argv[2], 7001))
"""


REWRITE = """
nft --stateless list table inet mncni >/run/table.listed
{ echo "table inet mncni"; echo "delete table inet mncni"; cat /run/table.listed; } >/run/table.nft
while nft -f /run/table.nft; do echo; done
"""


def test_no_packet_gets_in_or_out_while_the_firewall_is_replaced(lab, outside, figure):
    """Neither from the underlay to a pod, nor from a pod into the underlay, where a route leads."""
    own, many = addresses(lab, "node1")[4], str(8_000)
    pod = [*labs.pod_argv(lab, "node1", "pod1"), labs.PYTHON, "-c", SEND, own, "10.244.77.5", str(PORT), many]
    argv = [*outside, labs.PYTHON, "-c", SEND, "10.244.2.2", own, str(PORT), many]
    with agent_standing_still(lab, "node1"), claiming(outside, "10.244.2.2"):
        node_sh(lab, "node1", "ip route replace 10.244.77.0/24 via 192.0.2.200 dev eth0; ping -n -c1 -w5 192.0.2.200")
        with subprocess.Popen([*labs.node_argv(lab, "node1"), "sh", "-c", REWRITE], stdout=subprocess.PIPE, text=True) as writer:
            with counting(lab, "node1", "eth0", f"udp dport {PORT}") as counts, labs.sniffing(lab) as seen:
                with subprocess.Popen(pod) as sender:
                    labs.must(argv)
                assert sender.returncode == 0
            node_sh(lab, "node1", "rm /run/table.nft; ip route delete 10.244.77.0/24")  # the one ends the loop; the agent refuses the other
            times = writer.stdout.read().count("\n")
    got_out = seen["clear"] - int(many)
    figure(f"firewall: of {many} packets each way {counts['went']} got in, {got_out} out; it was replaced {times} times meanwhile")
    assert counts["came"] > 4_000 and counts["went"] == 0 and times > 3
    assert seen["samples"] == [f"10.244.2.2 > {own} udp"], "what the outsider sent, and nothing else"


# ---- the floor ----

FLUSH = "nft flush ruleset; ip route flush proto 201; ip -6 route flush proto 201"
NO_RULES = "ip rule flush; ip -6 rule flush; ip rule add lookup main; ip -6 rule add lookup main"


@pytest.mark.parametrize("more, is_clear", [("", False), (NO_RULES, True)], ids=["rules", "no rules"])
def test_nothing_goes_in_clear_when_nft_and_all_routes_are_flushed_at_once(lab, outside, more, is_clear):
    """Nor along a route of the host to a larger network. Without the rules too, it does go."""
    targets = addresses(lab, "node2")
    broad = "ip route add 10.0.0.0/8 via 192.0.2.200; ip -6 route add default via 2001:db8::200"
    node_sh(lab, "node1", f"{broad}; ping -n -c1 -w5 192.0.2.200; ping -n -c1 -w5 2001:db8::200")
    try:
        with agent_standing_still(lab, "node1"), labs.sniffing(lab) as counts:
            node_sh(lab, "node1", f"{FLUSH}; {more}")
            for family, own in addresses(lab, "node1").items():
                argv = [*labs.pod_argv(lab, "node1", "pod1"), labs.PYTHON, "-c", SEND, own, targets[family], str(PORT), str(COUNT)]
                labs.run(argv)
                labs.run([*labs.node_argv(lab, "node1"), labs.PYTHON, "-c", SEND, NODE1[family], targets[family], str(PORT), str(COUNT)])
            labs.must([*labs.node_argv(lab, "node1"), "ping", "-n", "-c1", "-w5", "192.0.2.2"])
        sent = [sample for sample in counts["samples"] if str(PORT) in sample or "10.244." in sample or "fd00:" in sample]
        assert bool(sent) == is_clear, counts
        assert counts["dropped"] == 0
    finally:
        node_sh(lab, "node1", "ip route delete 10.0.0.0/8; ip -6 route delete default")
    for family in (4, 6):
        labs.wait_until(lambda family=family: "proto 201" in node_sh(lab, "node1", f"ip -{family} rule"), 20, "rules")
    labs.wait_until(lambda: reaches_pod(lab), 20, "way to the remote pod")


def reaches_pod(lab):
    ping = [*labs.pod_argv(lab, "node1", "pod1"), "ping", "-n", "-c1", "-W1"]
    return all(labs.run([*ping, address])[0] == 0 for address in addresses(lab, "node2").values())
