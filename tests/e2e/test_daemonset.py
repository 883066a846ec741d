"""The DaemonSet and the Deployment as they stand, on two nodes of the lab (on node1 the agent as with the prebuilt image, its root file
system read-only): their commands, mounts, rights and settings. Against the double
of an API server that gives them the rights of the manifests and nothing more; and, where there is one, against a real API server on which
the whole kustomization was applied."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from deploy import lab as labs
from tests import containers, kubernetes, manifests
from tests.apiserver import ApiProcess
from tests.conftest import kernel_has
from tests.containers import Container
from tests.e2e.flow import Flow

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(bool(manifests.yaml_missing()), reason=manifests.yaml_missing()),
]

SERVER = "192.0.2.250"
AGENTS = "deploy/naivewg/daemonset.yaml"
NODEIPAM = "deploy/nodeipam/deployment.yaml"
UNINSTALL = "deploy/uninstall.yaml"
START_S = 120  # far more than it takes: the machine may be busy, or emulated


def pod_of(path):
    return manifests.load(path)[0]["spec"]["template"]["spec"]


class Double:
    """The double, with the few things that these tests ask of an API server."""

    def __init__(self, directory, netns):
        self.process = ApiProcess(directory, netns=netns, listen=f"{SERVER}:6443", sans=[SERVER])

    def __enter__(self):
        self.process.__enter__()
        self.call = self.process.call
        self.call("set", "rbac", manifests.rights("deploy/naivewg/account.yaml", "deploy/nodeipam/account.yaml"))
        self.call("put", "leases", manifests.find(manifests.load("deploy/nodeipam/account.yaml"), "Lease"))
        return self

    def __exit__(self, *exception):
        self.process.__exit__(*exception)

    def create_node(self, name, address):
        self.call("create_node", name, addresses=[address])

    def node(self, name):
        return self.call("node", name)

    def service_account_dir(self, path, account, node):
        self.call("service_account_dir", str(path), f"system:serviceaccount:kube-system:{account}", node=node)

    def refused(self):
        """What was refused for want of rights."""
        return [row for row in self.call("value", "log") if row["code"] == 403]


class Real:
    """The same of a real API server."""

    def __init__(self, directory, netns):
        self.cluster = kubernetes.Kubernetes(directory, SERVER, 6443, netns)

    def __enter__(self):
        self.cluster.__enter__()
        self.cluster.kubectl("apply", "-k", ".")
        return self

    def __exit__(self, *exception):
        self.cluster.__exit__(*exception)

    def create_node(self, name, address):
        self.cluster.kubectl("create", "-f", "-", stdin={"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
        status = {"status": {"addresses": [{"type": "InternalIP", "address": address}]}}
        self.cluster.kubectl("patch", "node", name, "--subresource=status", "-p", json.dumps(status))

    def node(self, name):
        return json.loads(self.cluster.kubectl("get", "node", name, "-o", "json"))

    def service_account_dir(self, path, account, node):
        path.mkdir(parents=True, exist_ok=True)
        (path / "token").write_text(self.cluster.token(account, node))
        (path / "ca.crt").write_bytes(Path(self.cluster.ca_file).read_bytes())

    def refused(self):
        return []  # a real one does not tell; what is refused here does not get done


class Cluster:
    """A lab, an API server on its underlay, and the containers that run on the nodes."""

    def __init__(self, lab, api):
        self.lab, self.api, self.containers = lab, api, []

    def start(self, node, path, name):
        pod = manifests.prebuilt_agent() if (node, path) == ("node1", AGENTS) else pod_of(path)
        directory = f"/var/lib/kubelet/{name}"
        self.api.service_account_dir(Path(f"{self.lab.dir}/{node}{directory}"), pod["serviceAccountName"], node)
        environ = {"KUBERNETES_SERVICE_HOST": SERVER, "KUBERNETES_SERVICE_PORT": "6443"}
        self.containers.append(Container(self.lab, node, pod, name, directory, environ))
        return self.containers[-1]

    def wait(self, is_so, what):
        try:
            labs.wait_until(is_so, START_S, what)
        except labs.LabError as error:
            said = "".join(f"--- {one.node} {one.log.name}\n{one.said()[-2000:]}" for one in self.containers)
            raise AssertionError(f"{error}\n{said}") from None


# Where there is no real one, tests/e2e/test_install.py says what it needs. In the virtual machine it would take minutes to start.
SERVERS = [pytest.param(Double, id="double", marks=pytest.mark.vm), *([] if kubernetes.missing() else [pytest.param(Real, id="real")])]


@pytest.fixture(scope="module", params=SERVERS)
def cluster(request, tmp_path_factory):
    """Nodes that have booted and registered, without pod CIDRs."""
    lab = labs.Lab(f"mncni-daemonset-{os.getpid()}", verbose=False)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))  # by default nothing would be cleaned up
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, before)
        stack.callback(labs.down, lab)
        kind = {"families": ["ipv4"], "underlay": "ipv4"}
        stack.enter_context(labs.built_or_undone(lab, 2, 1, labs.LAB_FILE.parents[1], kind))
        labs.must(["ip", "-n", lab.underlay, "address", "add", f"{SERVER}/24", "dev", labs.BRIDGE])
        labs.must(["ip", "-n", lab.underlay, "link", "set", "lo", "up"])
        api = stack.enter_context(request.param(tmp_path_factory.mktemp("api"), lab.underlay))
        for node in lab.nodes():
            labs.make_node_dir(lab, node)
            labs.start_node(lab, node)
            api.create_node(node, labs.endpoint(lab, node)[0])
        cluster = Cluster(lab, api)
        yield cluster
        for container in cluster.containers:
            if container.process.poll() is None:
                container.kill()


def test_the_node_is_checked_first_and_lacks_nothing(cluster):
    assert cluster.start("node1", AGENTS, "check-node").wait() == 0


def test_agents_wait_for_pod_cidrs_then_nodes_have_a_network(cluster):
    agents = [cluster.start(node, AGENTS, "agent") for node in cluster.lab.nodes()]
    cluster.wait(lambda: all("no pod CIDR yet" in one.said() for one in agents), "agents that wait")
    cluster.start("node1", NODEIPAM, "nodeipam")
    cluster.wait(lambda: all(containers.ready(cluster.lab, node) for node in cluster.lab.nodes()), "agents that are ready")
    nodes = [cluster.api.node(node) for node in cluster.lab.nodes()]
    assert sorted(node["spec"]["podCIDR"] for node in nodes) == ["10.244.0.0/24", "10.244.1.0/24"]
    up = ("False", "MncniIsUp")
    cluster.wait(
        lambda: all(containers.conditions(cluster.api.node(node)).get("NetworkUnavailable") == up for node in cluster.lab.nodes()),
        "condition of both nodes",
    )


def test_the_probe_is_answered(cluster):
    get = pod_of(AGENTS)["containers"][0]["readinessProbe"]["httpGet"]
    code = f"import urllib.request as r; print(r.urlopen('http://{get['host']}:{get['port']}{get['path']}', timeout=10).status)"
    assert labs.must([*labs.node_argv(cluster.lab, "node1"), labs.PYTHON, "-c", code]) == "200\n"


def test_agents_say_whether_policies_watch_them(cluster):
    """The double has none here."""
    argv = [labs.PYTHON, "/opt/mncni/agent.py", "status", "--json"]
    for node in cluster.lab.nodes():
        told = json.loads(labs.run([*labs.node_argv(cluster.lab, node), *argv])[1])["admission_guard"]
        assert told is isinstance(cluster.api, Real)


def test_pods_of_both_nodes_reach_each_other(cluster):
    for node in cluster.lab.nodes():
        labs.add_pod(cluster.lab, node, "pod1")
    labs.wait_first_pongs(cluster.lab, labs.plan_pairs(cluster.lab))
    assert all(row["received"] for row in labs.ping_all(cluster.lab))


def test_the_agent_tries_the_plugin_on_the_node_itself(cluster):
    """Without the dynamic linker no program of the node starts; the container has its own."""
    linker, files = cluster.lab.inside("node1", "/lib64"), cluster.lab.inside("node1", "/opt/cni/bin")
    target = os.readlink(linker)
    linker.unlink()
    (files / "touched").touch()  # so that it does not have to wait for the next trial
    try:
        cluster.wait(lambda: not containers.ready(cluster.lab, "node1"), "agent that says no")
        assert "/usr/bin/python3" in json.loads(cluster.lab.inside("node1", "/run/mncni/ready").read_text())["reason"]
    finally:
        linker.symlink_to(target)
        (files / "touched").unlink()
    cluster.wait(lambda: containers.ready(cluster.lab, "node1"), "agent that is well again")


def test_a_container_that_dies_leaves_the_network_and_the_next_one_takes_it_over(cluster, figure):
    """Running pods notice nothing where the kernel has WireGuard; a wireguard-go ends with its container."""
    lab = cluster.lab
    ends = [labs.pod_argv(lab, node, "pod1") for node in ("node1", "node2")]
    target = labs.pod_record(lab, "node2", "pod1")["addresses"][0]

    def tunnel():
        words = "stat -c %i /run/netns/mncni-wg; ip -json link show mncni-host; ip -json address show mncni0"
        return labs.must([*labs.node_argv(lab, "node1"), "sh", "-c", words])

    before = tunnel()
    agent_of_node1 = next(one for one in cluster.containers if one.node == "node1" and one.log.name == "agent.log")
    with Flow(*ends, target, count=200, rate=200) as flow:
        agent_of_node1.kill()
        assert tunnel() == before
        lab.inside("node1", "/run/mncni/status.json").unlink()
        cluster.start("node1", AGENTS, "agent")
        cluster.wait(lambda: lab.inside("node1", "/run/mncni/status.json").exists() and containers.ready(lab, "node1"), "the next agent")
    labs.wait_first_pongs(lab, labs.plan_pairs(lab))
    assert tunnel().splitlines()[0] == before.splitlines()[0]
    kind = "the kernel's WireGuard" if kernel_has("wireguard") else "wireguard-go"
    figure(f"the agent's container killed, {kind}: {flow.lost} of {flow.sent} packets between pods lost")
    assert flow.lost == 0 or not kernel_has("wireguard")


def test_uninstall_waits_for_pods_to_go_then_leaves_nothing_on_the_node(cluster):
    lab = cluster.lab
    for container in cluster.containers:
        if container.node == "node1" and container.process.poll() is None:
            container.kill()
    uninstall = cluster.start("node1", UNINSTALL, "uninstall")
    cluster.wait(lambda: "1 pods are attached" in uninstall.said(), "refusal")
    labs.del_pod(lab, "node1", "pod1")
    cluster.wait(lambda: "sysctls stay" in uninstall.said(), "end of uninstall")  # tries every 10 s
    uninstall.kill()
    look = "ip -brief link; ip route show table all; nft list ruleset; ls /run/netns"
    left = labs.must([*labs.node_argv(lab, "node1"), "sh", "-c", look])
    assert "mncni" not in left
    assert [path for path in ("etc/cni/net.d/10-mncni.conflist", "var/lib/mncni", "var/lib/cni/mncni", "opt/cni/bin/mncni")
            if (lab.dir / "node1" / path).exists()] == []
    assert not lab.inside("node1", "/run/mncni").exists()
    assert "mncni.dev/node" not in cluster.api.node("node1")["metadata"].get("annotations", {})


def test_nothing_was_refused_for_want_of_rights(cluster):
    assert cluster.api.refused() == []
