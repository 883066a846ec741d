"""What the agent makes of a host, on a real kernel: addresses, the MTU, forwarding, router advertisements, other networks.

The host is a network namespace in which the agent's own stages run, one after the other, without the rest of a pass.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
HOST, ROUTER, TUNNEL = (f"mncni-{name}-{os.getpid()}" for name in ("host", "router", "tun"))
PATIENCE_S = 10

STAGES = """
import ipaddress, json, sys
sys.path.insert(0, sys.argv[1])
import agent, mncni
from tests.unit.agent_data import make_settings
given = json.loads(sys.argv[2])
settings = make_settings(given["families"], endpoints=(), namespace=given["namespace"], run_dir=given["run_dir"])
ran = []
do = mncni.make_run({})
def run(command):
    ran.append(" ".join(command.argv))
    return do(command)
context = agent.Context(settings, run, "boot", internal_ips=tuple(map(ipaddress.ip_address, given["internal"])))
try:
    for name in given["stages"]:
        getattr(agent, name)(context)
    error = ""
except mncni.CNIError as raised:
    error = raised.msg
print(json.dumps({"endpoints": list(map(str, context.endpoints)), "mtu": context.mtu, "error": error, "ran": ran}))
"""

# An advertisement of a router, life time 1800 s, with the prefix 2001:db8:7::/64 (RFC 4861, sections 4.2 and 4.6.2).
ADVERTISE = """
import socket, struct, ipaddress
s = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
body = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
body += struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 3600, 1800, 0) + ipaddress.ip_address("2001:db8:7::").packed
s.sendto(body, ("ff02::1", 0, 0, socket.if_nametoindex("up0")))
"""


def sh(netns, command, check=True):
    done = subprocess.run(["ip", "netns", "exec", netns, "sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
    return done.stdout


def stages(tmp_path, *names, internal=(), families=(4,)):
    """What the stages find out and run, in the host."""
    given = {"stages": names, "internal": internal, "families": families, "namespace": TUNNEL, "run_dir": str(tmp_path)}
    argv = ["ip", "netns", "exec", HOST, sys.executable, "-c", STAGES, str(ROOT), json.dumps(given)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for(netns, command, words):
    deadline = time.monotonic() + PATIENCE_S
    while words not in sh(netns, command):
        assert time.monotonic() < deadline, f"{command}: no {words!r} in {sh(netns, command)}"
        time.sleep(0.05)


@pytest.fixture
def host():
    """A host with eth0 (the NAT side, MTU 1500), eth1 (the private network, MTU 9000) and a router behind eth0."""
    try:
        for name in (HOST, ROUTER, TUNNEL):
            subprocess.run(["ip", "netns", "add", name], check=True)
            sh(name, "sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0")
        sh(
            HOST,
            f"ip link add eth0 type veth peer name up0 netns {ROUTER}; ip link add eth1 mtu 9000 type veth peer name up1 netns {ROUTER}",
        )
        sh(ROUTER, "ip link set up0 up; ip link set up1 mtu 9000 up")
        sh(HOST, "ip link set lo up; ip link set eth0 up; ip link set eth1 up")
        sh(HOST, "ip address add 10.0.2.15/24 dev eth0; ip address add 192.168.56.11/24 dev eth1; ip route add default via 10.0.2.2")
        yield HOST
    finally:
        for name in (HOST, ROUTER, TUNNEL):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


LOOK = ("ensure_host", "ensure_endpoints", "ensure_mtu")


@pytest.mark.parametrize(
    "change, internal, endpoints, mtu",
    [
        ("true", ["192.168.56.11"], ["192.168.56.11"], 8940),
        ("ip route delete default", ["192.168.56.11"], ["192.168.56.11"], 8940),
        ("ip route delete default; ip link set eth0 down", ["192.0.2.9", "192.168.56.11"], ["192.168.56.11"], 8940),
        ("true", [], ["10.0.2.15"], 1440),
        ("ip address delete 192.168.56.11/24 dev eth1", ["192.168.56.11"], ["10.0.2.15"], 1440),
        ("ip address add 192.168.56.100/32 dev eth1", ["192.168.56.100", "192.168.56.11"], ["192.168.56.11"], 8940),
        ("ip route replace default via 10.0.2.2 src 10.0.2.100", [], ["10.0.2.15"], 1440),  # keepalived's address as source
        ("ip address add 10.99.0.1/32 dev lo", ["10.99.0.1"], ["10.99.0.1"], 1440),
        ("ip address add 10.99.0.1/32 dev lo; ip route replace default via 192.168.56.1", ["10.99.0.1"], ["10.99.0.1"], 8940),
    ],
)
def test_the_endpoint_and_the_mtu_of_a_host_as_it_is(host, tmp_path, change, internal, endpoints, mtu):
    sh(host, "ip address add 10.0.2.100/32 dev eth0")
    sh(host, change)
    found = stages(tmp_path, *LOOK, internal=internal)
    assert (found["error"], found["endpoints"], found["mtu"]) == ("", endpoints, mtu)


def test_of_ipv6_addresses_the_lasting_one_is_the_endpoint(host, tmp_path):
    sh(host, "ip address flush dev eth1; ip -6 address add 2001:db8::5/64 dev eth1 nodad")
    sh(host, "ip -6 route add default via 2001:db8::1")
    sh(
        host,
        "ip -6 address add 2001:db8::6/64 dev eth1 nodad valid_lft 1000 preferred_lft 0; ip -6 address add 2001:db8::7/128 dev eth1 nodad",
    )
    for internal in (["2001:db8::6"], ["2001:db8::7"], ["2001:db8::5"], []):
        found = stages(tmp_path, *LOOK, internal=internal, families=(6,))
        assert (found["error"], found["endpoints"][-1]) == ("", "2001:db8::5"), internal


def test_forwarding_of_links_that_are_younger_than_ip_forward_is_switched_on_once(host, tmp_path):
    sh(host, "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.default.forwarding=0 net.ipv4.conf.eth0.forwarding=0")
    sh(host, f"ip link add mncni0 type bridge; ip link add mncni-host type veth peer name mncni-ns netns {TUNNEL}")
    sh(TUNNEL, "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.mncni-ns.forwarding=0 net.ipv6.conf.all.forwarding=1")
    names = ("ensure_host", "ensure_endpoints", "ensure_forwarding")
    looks = "sysctl -n " + " ".join(f"net.ipv4.conf.{name}.forwarding" for name in ("eth0", "eth1", "mncni0", "mncni-host"))
    assert sh(host, looks).split() == ["0", "1", "0", "0"]
    found = stages(tmp_path, *names)
    assert found["error"] == "" and sh(host, looks).split() == ["1", "1", "1", "1"]
    assert sh(TUNNEL, "sysctl -n net.ipv4.conf.mncni-ns.forwarding").split() == ["1"]
    assert "tee" in " ".join(found["ran"]) and "tee" not in " ".join(stages(tmp_path, *names)["ran"])


DEFAULT = "ip -6 route show default"


@pytest.mark.parametrize("agent_switches", [True, False])
def test_a_default_route_by_advertisement_survives_the_agents_forwarding_and_no_other(host, tmp_path, agent_switches):
    subprocess.run(["ip", "netns", "exec", ROUTER, sys.executable, "-c", ADVERTISE], check=True)
    wait_for(host, "ip -6 address show dev eth0", "2001:db8:7:")
    assert "proto ra" in sh(host, DEFAULT)
    if agent_switches:
        assert stages(tmp_path, "ensure_host", "ensure_endpoints", "ensure_forwarding", families=(4, 6))["error"] == ""
    else:
        sh(host, "sysctl -qw net.ipv6.conf.all.forwarding=1")
    assert sh(host, "sysctl -n net.ipv6.conf.all.forwarding net.ipv6.conf.eth0.accept_ra").split() == ["1", "2" if agent_switches else "1"]
    assert ("proto ra" in sh(host, DEFAULT)) is agent_switches


def test_where_userspace_reads_advertisements_accept_ra_stays_0(host, tmp_path):
    sh(
        host,
        "sysctl -qw net.ipv6.conf.eth0.accept_ra=0; ip -6 address add 2001:db8:7::5/64 dev eth0 valid_lft 3600 preferred_lft 1800 nodad",
    )
    sh(host, "ip -6 route add default via fe80::1 dev eth0 proto ra")
    assert stages(tmp_path, "ensure_host", "ensure_endpoints", "ensure_forwarding", families=(4, 6))["error"] == ""
    assert sh(host, "sysctl -n net.ipv6.conf.all.forwarding net.ipv6.conf.eth0.accept_ra").split() == ["1", "0"]
    assert "proto ra" in sh(host, DEFAULT)


def test_a_host_whose_ipv6_is_off_takes_an_ipv4_cluster_and_refuses_a_dual_stack_one(host, tmp_path):
    sh(host, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
    names = ("ensure_host", "ensure_endpoints", "ensure_floor", "ensure_namespace", "ensure_bridge", "ensure_forwarding")
    assert stages(tmp_path / "4", *names)["error"] == ""
    error = stages(tmp_path / "46", "ensure_host", families=(4, 6))["error"]
    assert error.startswith(
        "--cluster-cidr fd00:244::/32 needs IPv6, which is off on this host (sysctl net.ipv6.conf.all.disable_ipv6 is 1)"
    )


FLOOR = ("ensure_host", "ensure_endpoints", "ensure_floor")


@pytest.mark.parametrize(
    "change, said",
    [
        ("ip link add virbr0 type bridge; ip address add 10.244.122.1/24 dev virbr0; ip link set virbr0 up", "10.244.122.1/24 on virbr0;"),
        ("ip address add 10.244.9.5/24 dev eth1", "10.244.9.5/24 on eth1;"),
        ("ip route add 10.244.64.0/18 via 192.168.56.1", "the route 10.244.64.0/18 dev eth1;"),
        ("ip route add 10.244.0.0/16 dev eth1 table 52", "the route 10.244.0.0/16 dev eth1 table 52;"),
        ("ip route add blackhole 10.244.3.0/26 proto 80", "the route blackhole 10.244.3.0/26;"),
        ("ip -6 address add fd00:244:9::5/64 dev eth1 nodad", "fd00:244:9::5/64 on eth1;"),
        ("ip -6 route add fd00:244:9::/64 dev eth1", "the route fd00:244:9::/64 dev eth1;"),
    ],
)
def test_a_network_of_the_host_inside_the_cluster_cidr_is_refused_before_the_floor_and_left_alone(host, tmp_path, change, said):
    sh(host, change)
    before = sh(host, "ip route show table all; ip -6 route show table all; nft list ruleset")
    error = stages(tmp_path, *FLOOR, families=(4, 6))["error"]
    assert said in error and "choose another --cluster-cidr" in error
    assert sh(host, "ip route show table all; ip -6 route show table all; nft list ruleset") == before
    for command in error.partition("(")[2].rstrip(")").split(", "):
        sh(host, command)  # the way out that it names
    assert stages(tmp_path, *FLOOR, *FLOOR, families=(4, 6))["error"] == ""
    assert "unreachable 10.244.0.0/16" in sh(host, "ip route show")
