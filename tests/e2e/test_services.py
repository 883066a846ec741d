"""Remote pods through addresses that are translated on the way, as kube-proxy does it: a ClusterIP from a pod and from the node, a
NodePort from outside. Both families, with bridged packets passing the host's netfilter and without.

Replies have to come back through the host that translated, or the connection never opens: that is why the tunnel's veth is routed, no
port of the pods' bridge, and why what enters the tunnel has a pod's or the gateway's address.
"""

import os
import subprocess

import pytest

from deploy import lab as labs
from tests.e2e.conftest import lab_up, node_sh, outsider

pytestmark = pytest.mark.root

CLUSTER_IP = {"ipv4": "10.96.0.10", "ipv6": "fd00:96::10"}
NODE_IP = {"ipv4": "192.0.2.1", "ipv6": "2001:db8::1"}
GATEWAY = {"ipv4": "10.244.1.1", "ipv6": "fd00:10:244:1::1"}

SERVE = """
import socket, sys
server = socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True)
print("up", flush=True)
while True:
    connection, peer = server.accept()
    connection.sendall(peer[0].replace("::ffff:", "").encode())
    connection.close()
"""
CONNECT = "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5).recv(99).decode())"


@pytest.fixture(scope="module")
def lab():
    with lab_up(f"mncni-svc-{os.getpid()}") as made:
        argv = [*labs.pod_argv(made, "node2", "pod1"), labs.PYTHON, "-c", SERVE]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout.readline() == "up\n"
            yield made
            server.kill()


@pytest.fixture(scope="module", autouse=True)
def outside(lab):
    with outsider(lab) as argv:
        yield argv


@pytest.fixture(params=["bridge-nf 0", "bridge-nf 1"])
def bridge_nf(request, lab):
    """Bridged packets pass netfilter, as Kubernetes asks for, or they do not."""
    value = request.param[-1]
    for key in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables"):
        node_sh(lab, "node1", f"echo {value} > /proc/sys/net/bridge/{key}")


@pytest.fixture
def translated(lab):
    """Node1 translates the cluster IPs, port 80, and its own addresses, port 30080, to node2's pod."""
    pods = labs.pod_record(lab, "node2", "pod1")["addresses"]
    rules = []
    for ip, family, pod in (("ip", "ipv4", pods[0]), ("ip6", "ipv6", f"[{pods[1]}]")):
        rules.append(f"{ip} daddr {CLUSTER_IP[family]} tcp dport 80 dnat {ip} to {pod}:8080")
        rules.append(f"{ip} daddr {NODE_IP[family]} tcp dport 30080 dnat {ip} to {pod}:8080")
    body = "\n".join(rules)
    chains = [f"chain {hook} {{\ntype nat hook {hook} priority -100;\n{body}\n}}\n" for hook in ("prerouting", "output")]
    labs.must([*labs.node_argv(lab, "node1"), "nft", "-f", "-"], f"table inet services {{\n{''.join(chains)}}}\n")
    for address in CLUSTER_IP.values():  # a node has a default route, which the host's own connections need to begin with
        node_sh(lab, "node1", f"ip route add {address} dev eth0 2>/dev/null || ip -6 route add {address} dev eth0")
    yield
    node_sh(lab, "node1", "nft delete table inet services")
    for address in CLUSTER_IP.values():
        node_sh(lab, "node1", f"ip route delete {address} dev eth0 2>/dev/null || ip -6 route delete {address} dev eth0")


def connect(argv, address, port):
    """The source address that the server saw. LabError if the connection did not open."""
    return labs.must([*argv, labs.PYTHON, "-c", CONNECT, address, str(port)]).strip()


@pytest.mark.kernel("br_netfilter")
@pytest.mark.parametrize("family", CLUSTER_IP)
def test_a_cluster_ip_leads_a_pod_to_a_remote_pod(lab, bridge_nf, translated, family):
    source = connect(labs.pod_argv(lab, "node1", "pod1"), CLUSTER_IP[family], 80)
    assert source in labs.pod_record(lab, "node1", "pod1")["addresses"]


@pytest.mark.parametrize("family", CLUSTER_IP)
def test_a_cluster_ip_leads_the_node_to_a_remote_pod(lab, translated, family):
    assert connect(labs.node_argv(lab, "node1"), CLUSTER_IP[family], 80) == GATEWAY[family]


@pytest.mark.kernel("br_netfilter")
@pytest.mark.parametrize("family", CLUSTER_IP)
def test_a_node_port_leads_from_outside_to_a_remote_pod(lab, outside, bridge_nf, translated, family):
    assert connect(outside, NODE_IP[family], 30080) == GATEWAY[family]


@pytest.mark.parametrize("family", CLUSTER_IP)
def test_the_node_reaches_a_remote_pod_with_the_gateway_as_its_source(lab, family):
    address = labs.pod_record(lab, "node2", "pod1")["addresses"][list(CLUSTER_IP).index(family)]
    assert connect(labs.node_argv(lab, "node1"), address, 8080) == GATEWAY[family]
