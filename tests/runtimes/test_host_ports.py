"""Host ports as containerd and podman ask for them: who reaches a pod by them, and that they go with it."""

import contextlib
import json
import subprocess

import pytest

from deploy import lab as labs
from tests.integration.test_portmap import CLIENT, SERVER

pytestmark = pytest.mark.root

HOST_PORT = 30080
ASKED = {  # in the words of each
    "cri": {"port_mappings": [{"protocol": kind, "host_port": HOST_PORT, "container_port": 80} for kind in ("TCP", "UDP")]},
    "podman": ["-p", f"{HOST_PORT}:80/tcp", "-p", f"{HOST_PORT}:80/udp"],
}
SENT = {  # what they make of it; containerd capitalises
    "cri": [{"HostPort": HOST_PORT, "ContainerPort": 80, "Protocol": kind, "HostIP": ""} for kind in ("tcp", "udp")],
    "podman": [{"hostPort": HOST_PORT, "containerPort": 80, "protocol": kind} for kind in ("tcp", "udp")],
}


@pytest.fixture(params=["cri", "podman"])
def asked_by(request):
    """(the runtime, its name here)."""
    return request.getfixturevalue(request.param), request.param


def start_with_ports(runtime, name):
    return runtime.start("server", **ASKED[name]) if name == "cri" else runtime.start("server", *ASKED[name])


@contextlib.contextmanager
def serving(pod):
    """Servers in a pod that say its name over TCP and UDP, on port 80."""
    argv = [*pod.node.argv(pod.netns), labs.PYTHON, "-c", SERVER]
    servers = [labs.start([*argv, protocol, pod.name], stdout=subprocess.PIPE) for protocol in ("tcp", "udp")]
    try:
        assert [server.stdout.readline() for server in servers] == ["up\n", "up\n"]
        yield
    finally:
        for server in servers:
            server.kill()
            server.wait()
            server.stdout.close()


def ask(argv, protocol, address, port=HOST_PORT):
    """What a server says: the name of its pod, and whom it saw."""
    return labs.must([*argv, labs.PYTHON, "-c", CLIENT, protocol, address, str(port), "1"]).split()


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_host_port_leads_to_the_pod_from_everywhere_and_goes_with_it(asked_by, lab, protocol):
    runtime, name = asked_by
    node, other_node = runtime.node, {"node1": "node2", "node2": "node1"}[runtime.node.name]
    address = labs.endpoint(lab, node.name)[0]
    before = node.look()
    pod, neighbour = start_with_ports(runtime, name), runtime.start("neighbour")
    assert sorted(pod.sent()["portMappings"], key=json.dumps) == sorted(SENT[name], key=json.dumps)
    with serving(pod):
        assert ask(node.argv(), protocol, address)[0] == "server"
        assert ask(node.argv(), protocol, "127.0.0.1")[0] == "server"
        assert ask(neighbour.node.argv(neighbour.netns), protocol, address)[0] == "server"
        assert ask(pod.node.argv(pod.netns), protocol, address)[0] == "server"
        assert ask(labs.node_argv(lab, other_node), protocol, address) == ["server", f"::ffff:{labs.endpoint(lab, other_node)[0]}"]
        pod.remove()
        assert ask(labs.node_argv(lab, other_node), protocol, address) == ["nothing"]
    neighbour.remove()
    # The hook of the filter against 127.0.0.1 stays with the bridge, as the bridge itself does.
    assert [change for change in node.changes_since(before) if "qdisc ingress ffff: dev mncni0" not in change] == []
