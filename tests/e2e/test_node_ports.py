"""What a node of the agent's answers to: host ports, through the conflist that it wrote and back again after damage, and its own pages."""

import os
import subprocess

import pytest

from deploy import lab as labs
from tests.e2e.conftest import lab_up, node_sh
from tests.e2e.test_services import CONNECT, SERVE

pytestmark = pytest.mark.root

PORTS = {"portMappings": [{"hostPort": 18080, "containerPort": 8080, "protocol": "tcp", "hostIP": ""}]}
NODE1 = "192.0.2.1"


@pytest.fixture(scope="module")
def lab():
    with lab_up(f"mncni-ports-{os.getpid()}") as made:
        labs.add_pod(made, "node1", "web", PORTS)
        argv = [*labs.pod_argv(made, "node1", "web"), labs.PYTHON, "-c", SERVE]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout.readline() == "up\n"
            yield made
            server.kill()


def ask(argv, address):
    """The address that the pod's server sees, "" if it does not answer."""
    code, stdout, _ = labs.run([*argv, labs.PYTHON, "-c", CONNECT, address, "18080"])
    return stdout.strip() if code == 0 else ""


def test_a_host_port_is_reached_from_the_cluster_and_from_the_node(lab):
    assert ask(labs.node_argv(lab, "node2"), NODE1) == "192.0.2.2"
    assert ask(labs.pod_argv(lab, "node2", "pod1"), NODE1) == "192.0.2.2"  # pods leave the cluster with their node's address
    assert ask(labs.pod_argv(lab, "node1", "pod1"), NODE1)
    assert ask(labs.pod_argv(lab, "node1", "web"), NODE1)
    assert ask(labs.node_argv(lab, "node1"), NODE1)
    assert ask(labs.node_argv(lab, "node1"), "127.0.0.1")


@pytest.mark.parametrize("damage", ["nft flush ruleset", "ip link delete mncni0", "nft delete table inet mncni_portmap"])
def test_a_host_port_comes_back(lab, damage):
    node_sh(lab, "node1", damage)
    labs.wait_until(lambda: ask(labs.node_argv(lab, "node2"), NODE1) == "192.0.2.2", 10, "host port from another node")
    labs.wait_until(lambda: ask(labs.node_argv(lab, "node1"), "127.0.0.1"), 10, "host port on 127.0.0.1")


def test_an_agent_that_starts_anew_leaves_host_ports_alone(lab):
    before = node_sh(lab, "node1", "nft -a list table inet mncni_portmap")
    labs.stop_agent(lab, "node1")
    labs.start_agent(lab, "node1")
    labs.wait_agent(lab, "node1")
    assert node_sh(lab, "node1", "nft -a list table inet mncni_portmap") == before


def test_nothing_is_left_when_the_pod_is_gone(lab):
    labs.add_pod(lab, "node2", "web", PORTS)
    assert "18080" in node_sh(lab, "node2", "nft list ruleset")
    labs.del_pod(lab, "node2", "web")
    assert "portmap" not in node_sh(lab, "node2", "nft list ruleset; ls /run/mncni/portmap | grep -v lock || true")


def page(argv, address, path):
    """(HTTP status, text) of the agent's page; (0, "") if nobody answers."""
    code, stdout, _ = labs.run([*argv, labs.PYTHON, "-c", GET, address, path])
    status, _, text = stdout.partition(" ") if code == 0 else ("0", "", "")
    return int(status), text


GET = """
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1], 28386, timeout=5)
connection.request("GET", sys.argv[2])
response = connection.getresponse()
print(response.status, response.read().decode())
"""


def test_the_agent_serves_health_and_figures_to_its_node_and_nothing_to_pods(lab):
    node, pod = labs.node_argv(lab, "node1"), labs.pod_argv(lab, "node1", "pod1")
    labs.wait_until(lambda: page(node, "127.0.0.1", "/readyz")[0] == 200, 20, "agent that is ready")
    assert page(node, "127.0.0.1", "/healthz")[0] == 200
    status, text = page(node, "127.0.0.1", "/metrics")
    assert status == 200
    for line in ("mncni_network_up 1", "mncni_peers 1", "mncni_leases 2"):
        assert line in text.splitlines()
    assert 'mncni_peer_receive_bytes_total{node="node2"}' in text
    for address in (NODE1, "10.244.1.1"):
        assert page(pod, address, "/metrics") == (0, "")
