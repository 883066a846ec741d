"""Services in a cluster: what kube-proxy does not translate yet stays on the node, and a backend beside the pod that asks can answer."""

import contextlib
import json
import os
import subprocess

import pytest

from deploy import lab as labs
from tests.e2e.conftest import SERVER, cluster_up, is_well, node_sh, restart_agent, wait_well
from tests.e2e.test_services import CLUSTER_IP, CONNECT, SERVE

pytestmark = pytest.mark.root

SERVICE_CIDRS = ("--service-cidr", "10.96.0.0/16", "--service-cidr", "fd00:96::/112")
SEND = """
import contextlib, socket, sys
with socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM) as sender:
    for _ in range(10):
        with contextlib.suppress(PermissionError):  # the kernel tells the host's own programs of a drop
            sender.sendto(b"a question", (sys.argv[1], 53))
"""
PROBE = """
table inet probe {
  counter left { }
  chain last { type filter hook postrouting priority 300; oifname eth0 udp dport 53 counter name left; }
}
"""
BRIDGED = {"ipv4": "/proc/sys/net/bridge/bridge-nf-call-iptables", "ipv6": "/proc/sys/net/bridge/bridge-nf-call-ip6tables"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with cluster_up(f"mncni-csvc-{os.getpid()}", tmp_path_factory.mktemp("api"), nodes=1, pods=2) as (made, _):
        node_sh(made, "node1", f"ip route replace default via {SERVER}; ip -6 route replace default via fe80::250 dev eth0")
        node_sh(made, "node1", "ip neigh replace fe80::250 lladdr 02:00:00:00:02:50 dev eth0")
        argv = [*labs.pod_argv(made, "node1", "pod2"), labs.PYTHON, "-c", SERVE]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout.readline() == "up\n"
            yield made
            server.kill()


@contextlib.contextmanager
def standing_still(lab):
    """The agent does nothing meanwhile."""
    pid = node_sh(lab, "node1", f"cat {labs.AGENT_PID}").strip()
    node_sh(lab, "node1", f"kill -STOP {pid}")
    try:
        yield
    finally:
        node_sh(lab, "node1", f"kill -CONT {pid}")


def leaked(lab):
    _, text, _ = labs.run([*labs.node_argv(lab, "node1"), labs.PYTHON, "/opt/mncni/agent.py", "status", "--json"])
    return json.loads(text)["dropped"]["leaked"]


def left(lab, sender, address):
    """How many of 10 packets to an address left the node."""
    node_sh(lab, "node1", f"nft '{PROBE}'")
    try:
        labs.must([*sender, labs.PYTHON, "-c", SEND, address])
        said = json.loads(node_sh(lab, "node1", "nft -j list counter inet probe left"))
        return next(item["counter"]["packets"] for item in said["nftables"] if "counter" in item)
    finally:
        node_sh(lab, "node1", "nft delete table inet probe")


@pytest.mark.parametrize("family", CLUSTER_IP)
@pytest.mark.parametrize("who", ["pod", "node"])
def test_a_packet_for_a_service_that_nobody_translates_does_not_leave_the_node_and_is_counted(lab, who, family):
    restart_agent(lab, argv=[*labs.plan_agent(lab, "node1"), *SERVICE_CIDRS])
    wait_well(lab)
    sender = labs.pod_argv(lab, "node1", "pod1") if who == "pod" else labs.node_argv(lab, "node1")
    before = leaked(lab)
    assert left(lab, sender, CLUSTER_IP[family]) == 0 and leaked(lab) == before + 10
    with standing_still(lab):
        node_sh(lab, "node1", "nft flush chain inet mncni outbound")
        assert left(lab, sender, CLUSTER_IP[family]) == 10, "the probe sees nothing"
    wait_well(lab)


@pytest.mark.kernel("br_netfilter")
@pytest.mark.parametrize("family", CLUSTER_IP)
def test_a_service_whose_backend_is_beside_the_pod_answers_because_the_agent_lets_netfilter_see_it(lab, family):
    ip, pod2 = {"ipv4": "ip", "ipv6": "ip6"}[family], labs.pod_record(lab, "node1", "pod2")["addresses"][family == "ipv6"]
    to = f"[{pod2}]:8080" if family == "ipv6" else f"{pod2}:8080"
    rule = f"{ip} daddr {CLUSTER_IP[family]} tcp dport 80 dnat {ip} to {to}"
    node_sh(lab, "node1", f"nft 'table inet services {{ chain pre {{ type nat hook prerouting priority -100; {rule}; }}; }}'")
    ask = [*labs.pod_argv(lab, "node1", "pod1"), labs.PYTHON, "-c", CONNECT, CLUSTER_IP[family], "80"]
    try:
        with standing_still(lab):
            node_sh(lab, "node1", f"echo 0 > {BRIDGED[family]}")
            assert labs.run(ask)[0] != 0, "without netfilter the answer is not translated back"
        labs.wait_until(lambda: node_sh(lab, "node1", f"cat {BRIDGED[family]}") == "1\n", 30, "the sysctl")
        assert labs.must(ask).strip() in labs.pod_record(lab, "node1", "pod1")["addresses"]
    finally:
        node_sh(lab, "node1", "nft delete table inet services")
    labs.wait_until(lambda: is_well(lab), 20, "agent that is well")
