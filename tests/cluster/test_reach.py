"""Everything reaches everything: pods, nodes and what is outside; addresses of pods, Services of all kinds, host ports, names."""

import contextlib
import json
import subprocess

import pytest

from deploy import lab as labs
from deploy.cluster import programs
from tests.cluster.objects import HOST_NETWORK_PORT, HOST_PORT, LOCAL_NODE_PORT, NAMESPACE, NODE_PORT, PORT

pytestmark = pytest.mark.usefixtures("everything")
PROTOCOLS = ("tcp", "udp")


def of_family(addresses, family):
    """The one of these addresses that is of the family, "4" or "6"."""
    return next(address for address in addresses if (":" in address) == (family == "6"))


class World:
    """Who and what there is, for one family."""

    def __init__(self, driver, family):
        self.driver, self.family = driver, family
        rows = sorted(driver.pods("app=pods"), key=lambda row: row["name"])
        self.pods = {row["name"]: of_family(row["ips"], family) for row in rows}
        self.node_of = {row["name"]: row["node"] for row in rows}
        self.pod_on = {row["node"]: row["name"] for row in rows}
        self.hosts = {row["name"]: row["node"] for row in driver.pods("app=hosts")}
        self.nodes = {node: of_family(driver.cluster.addresses(node), family) for node in driver.nodes}
        self.services = {row["metadata"]["name"]: of_family(row["spec"]["clusterIPs"], family)
                         for row in driver.get("services", "-n", NAMESPACE)["items"] if row["spec"]["clusterIP"] != "None"}
        self.outside = programs.FAMILIES[family]["gateway"].partition("/")[0]

    def clients(self):
        """[(where, its node)] of all that is in the cluster: a pod and a hostNetwork pod on each node, and each node itself."""
        in_pods = [(("pod", pod), node) for pod, node in {**self.node_of, **self.hosts}.items()]
        return in_pods + [(("node", node), node) for node in self.nodes]

    def check(self, where, rows):
        """Ask, and compare. rows: [(protocol, address, port, bytes, the name that has to answer, or "", the source it has to see, or "")].
        Returns (the number of questions, what was wrong)."""
        answers = self.driver.ask(where, [row[:4] for row in rows])
        wrong = []
        for row, answer in zip(rows, answers):
            _, _, _, _, name, source = row
            if "error" in answer or (name and answer["name"] != name) or (source and answer["peer"] != source):
                wrong.append(f"{' '.join(where)} {row}: {answer}")
        return len(rows), wrong


@pytest.fixture(params=["4", "6"])
def world(request, driver):
    if request.param not in driver.families:
        pytest.skip(f"the cluster has no IPv{request.param}: FAMILIES=46")
    return World(driver, request.param)


@pytest.fixture
def judge(request, driver, figure):
    """judge([(count, wrong), ...]): all must be right; how many there were is a figure."""
    def judged(results):
        wrong = [each for _, some in results for each in some]
        count = sum(number for number, _ in results)
        figure(f"{request.node.name} ({driver.name}): {count - len(wrong)} of {count}")
        assert not wrong, "\n".join([f"{len(wrong)} of {count}:", *wrong[:20]])

    return judged


def both(address, port, name="", source="", size=0):
    return [(protocol, address, port, size, name, source) for protocol in PROTOCOLS]


def test_addresses_of_pods_and_nodes(world, judge):
    """Pods see each other's own addresses, also with packets of full size."""
    results = []
    for where, _ in world.clients():
        own = world.pods.get(where[1], "")
        rows = [row for pod, address in world.pods.items() for row in both(address, PORT, pod, own)]
        rows += [row for node, address in world.nodes.items() for row in both(address, HOST_NETWORK_PORT, node)]
        if own:
            rows += [("udp", address, PORT, "mtu", pod, own) for pod, address in world.pods.items()]
            rows += [("tcp", address, PORT, 200_000, pod, own) for pod, address in world.pods.items()]
        results.append(world.check(where, rows))
    judge(results)


def test_cluster_addresses_of_services(world, judge):
    """One pod behind a Service: the asker itself, one on its node, one on another node. And several."""
    results = []
    for where, _ in world.clients():
        rows = []
        for number, pod in enumerate(world.pods):
            seen = world.pods[where[1]] if where[1] in world.pods and where[1] != pod else ""
            rows += both(world.services[f"one-{number}"], PORT, pod, seen)
        rows += both(world.services["all"], PORT) + both(world.services["hosts"], HOST_NETWORK_PORT)
        results.append(world.check(where, rows))
    judge(results)


def test_node_ports(world, judge):
    """On every node's address; with the policy Local a node answers by its own pod."""
    results = []
    for where, _ in [*world.clients(), (("outside", ""), "")]:
        source = world.outside if where[0] == "outside" else ""
        rows = []
        for node, address in world.nodes.items():
            rows += both(address, NODE_PORT)
            rows += both(address, LOCAL_NODE_PORT, world.pod_on[node] if source else "", source)
        results.append(world.check(where, rows))
    judge(results)


def test_host_ports(world, judge):
    """On every node's address, and for the node itself on the loopback one. From outside the pod sees who asks."""
    results = []
    for where, node in [*world.clients(), (("outside", ""), "")]:
        source = world.outside if where[0] == "outside" else ""
        rows = [row for other, address in world.nodes.items() for row in both(address, HOST_PORT, world.pod_on[other], source)]
        if where[0] == "node" and world.family == "4":
            rows += both("127.0.0.1", HOST_PORT, world.pod_on[node])
        results.append(world.check(where, rows))
    judge(results)


def test_names(world, judge):
    """Names of Services, of a headless one's pods and of the API server, in pods of both kinds."""
    results = []
    for where, _ in world.clients():
        if where[0] != "pod":
            continue
        rows = [row for number, pod in enumerate(world.pods) for row in both(f"one-{number}.{NAMESPACE}.svc.cluster.local", PORT, pod)]
        rows += [row for pod in world.pods for row in both(f"{pod}.headless.{NAMESPACE}.svc.cluster.local", PORT, pod)]
        rows += [*both("one-0", PORT, "pods-0"), ("connect", "kubernetes.default", 443, 0, "", "")]
        results.append(world.check(where, rows))
    judge(results)


def test_outside_sees_the_node(world, judge):
    """What pods send out of the cluster has their node's address."""
    server = labs.start([*world.driver.peer(("outside", "")), "serve", "7000", "outside"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        labs.read_line(server, 30)
        judge([world.check(where, both(world.outside, 7000, "outside", world.nodes[node])) for where, node in world.clients()])
    finally:
        server.kill()
        server.wait(10)


def test_api_server_and_kubelet_reach_pods(driver, judge):
    """Through the API server: a pod's and a Service's HTTP, logs, port-forward (exec is what all tests ask by)."""
    wrong, base, pods = [], f"/api/v1/namespaces/{NAMESPACE}", sorted(row["name"] for row in driver.pods("app=pods"))
    for number, pod in enumerate(pods):
        for path in (f"{base}/pods/{pod}:{PORT}/proxy/", f"{base}/services/one-{number}:{PORT}/proxy/"):
            answer = json.loads(driver.kubectl("get", "--raw", path))
            wrong += [f"{path}: {answer}"] if answer["name"] != pod else []
        wrong += [f"logs of {pod}"] if f"{pod} serves {PORT}" not in driver.kubectl("logs", "-n", NAMESPACE, pod) else []
        with forwarded(driver, pod, 7100 + number) as port:
            answer = driver.ask(("outside", ""), [["tcp", "127.0.0.1", port, 0]])[0]
            wrong += [f"port-forward to {pod}: {answer}"] if answer.get("name") != pod else []
    judge([(4 * len(pods), wrong)])


@contextlib.contextmanager
def forwarded(driver, pod, port):
    argv = [*driver.in_pod(pod)]
    argv = argv[:argv.index("exec")] + ["port-forward", "-n", NAMESPACE, pod, f"{port}:{PORT}"]
    child = labs.start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        assert "Forwarding" in labs.read_line(child, 30)
        yield port
    finally:
        child.kill()
        child.wait(10)
