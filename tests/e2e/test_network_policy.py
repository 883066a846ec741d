"""deploy/network-policy's engine on two nodes of the lab, beside MNCNI: what it lets through, on one node and across nodes, in both
families. A real API server knows the pods, as a kubelet would have told it. Every connection that a policy stops is one that works
without it: that is tested first, and when the policies have gone."""

import base64
import contextlib
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy import lab as labs
from tests import kubernetes, manifests
from tests.e2e.conftest import SERVER, lab_up, node_sh

ENGINE = manifests.BINARIES.parent / "policy/netpol"
needs = kubernetes.missing() or manifests.yaml_missing() or ("" if ENGINE.exists() else "needs the engine: make kubernetes")
pytestmark = [pytest.mark.root, pytest.mark.kernel("nft_queue", "br_netfilter"), pytest.mark.alone,
              pytest.mark.skipif(bool(needs), reason=needs or "-")]

PEER, CHECK, ON_NODE = manifests.ROOT / "tests/cluster/peer.py", manifests.DEPLOY / "network-policy/check.py", "/opt/mncni"
PORT, OTHER_PORT, HOST_PORT = 8000, 8001, 9000
TIMEOUT_S = 300  # the machine may be emulated
# Pod -> (its place in the lab, its namespace).
PODS = {"a": (("node1", "pod1"), "one"), "b": (("node1", "pod2"), "two"), "c": (("node2", "pod1"), "one"), "d": (("node2", "pod2"), "two")}
PAIRS = [(source, target) for source in PODS for target in PODS if source != target]
AS_USER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]  # the engine lets root's own packets of a node pass
AS_CONTAINER = ["setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all,+net_admin"]  # root, with the manifest's one capability
ACCOUNT, PID = "kube-network-policies", "/run/engine.pid"


class World:
    """The lab, its API server and an engine on each node."""

    def __init__(self, lab, cluster, directory):
        self.lab, self.cluster, self.dir, self.children = lab, cluster, directory, []
        cluster.kubectl("apply", "-f", "deploy/network-policy/account.yaml")
        access = {"server": cluster.url, "certificate-authority-data": base64.b64encode(Path(cluster.ca_file).read_bytes()).decode()}
        for node in lab.nodes():
            folder = lab.dir / node / ON_NODE[1:]  # a node sees nothing else of the machine but /usr
            for path in (PEER, CHECK, ENGINE):
                shutil.copy(path, folder)
            (folder / "engine.json").write_text(json.dumps({
                "apiVersion": "v1", "kind": "Config", "current-context": "x", "clusters": [{"name": "x", "cluster": access}],
                "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
                "users": [{"name": "x", "user": {"token": cluster.token(ACCOUNT, node)}}]}))

    def addresses(self, pod):
        return labs.pod_record(self.lab, *PODS[pod][0])["addresses"]

    def in_pod(self, pod):
        return labs.pod_argv(self.lab, *PODS[pod][0])

    def tell_of_pods(self):
        """The pods as objects, which run."""
        for namespace in ("one", "two"):
            self.cluster.kubectl("create", "namespace", namespace, check=False)
            self.cluster.kubectl("label", "namespace", namespace, f"in={namespace}", "--overwrite")
            self.cluster.kubectl("create", "serviceaccount", "default", "-n", namespace, check=False)
        for pod, ((node, _), namespace) in PODS.items():
            ports = [{"containerPort": PORT, "name": "web"}, {"containerPort": PORT, "name": "web-udp", "protocol": "UDP"}]
            spec = {"nodeName": node, "containers": [{"name": "x", "image": "x", "ports": ports}]}
            meta = {"name": pod, "namespace": namespace, "labels": {"pod": pod}}
            made = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}
            self.cluster.kubectl("create", "-f", "-", stdin=made, check=False)
            ips = [{"ip": address} for address in self.addresses(pod)]
            status = {"status": {"phase": "Running", "podIP": ips[0]["ip"], "podIPs": ips, "hostIP": labs.endpoint(self.lab, node)[0]}}
            self.cluster.kubectl("patch", "pod", pod, "-n", namespace, "--subresource=status", "--type=merge", "-p", json.dumps(status))

    def start_servers(self, *pods):
        for pod in pods or PODS:
            for port in (PORT, OTHER_PORT):
                argv = [*self.in_pod(pod), *AS_USER, labs.PYTHON, f"{ON_NODE}/peer.py", "serve", str(port), pod]
                with open(self.dir / f"{pod}-{port}", "w") as out:
                    self.children.append(labs.start(argv, stdout=out))
        for pod in pods or PODS:
            for port in (PORT, OTHER_PORT):
                labs.wait_until(lambda path=self.dir / f"{pod}-{port}": path.stat().st_size, TIMEOUT_S, "server in a pod")

    def start_engine(self, node):
        """As its manifest has it: with its flags, its account's token and its capability."""
        pod = manifests.load("deploy/network-policy/daemonset.yaml")[0]["spec"]["template"]["spec"]
        flags = [word.replace("$(NODE_NAME)", node) for word in pod["containers"][0]["args"][1:]]
        argv = [*AS_CONTAINER, f"{ON_NODE}/netpol", f"--kubeconfig={ON_NODE}/engine.json", *flags]
        with open(self.dir / f"engine-{node}", "a") as log:
            script = f'echo $$ >{PID}; exec "$@"'
            self.children.append(labs.start([*labs.node_argv(self.lab, node), "sh", "-c", script, "sh", *argv], stdout=log, stderr=log))
        labs.wait_until(lambda: self.has_rules(node), TIMEOUT_S, "rules of the engine")

    def has_rules(self, node):
        return labs.run([*labs.node_argv(self.lab, node), "nft", "list", "table", "inet", "kube-network-policies"])[0] == 0

    def stop_engine(self, node, sign="TERM"):
        node_sh(self.lab, node, f"kill -{sign} $(cat {PID})")
        runs = f"kill -0 $(cat {PID}) 2>/dev/null && echo runs || true"
        labs.wait_until(lambda: not node_sh(self.lab, node, runs), TIMEOUT_S, "end of the engine")

    def see_bridged(self, node, is_on=1):
        """What the agents do in a cluster, where is_on is 1; see deploy/README.md."""
        keys = [f"net.bridge.bridge-nf-call-{name}={is_on}" for name in ("iptables", "ip6tables")]
        labs.must([*labs.node_argv(self.lab, node), "sysctl", "-qw", *keys])

    def ask(self, source, questions):
        argv = [*self.in_pod(source), *AS_USER, labs.PYTHON, f"{ON_NODE}/peer.py", "ask"]
        return json.loads(labs.must(argv, json.dumps(questions), timeout_s=300))

    def reached(self, port=PORT, protocols=("tcp", "udp"), pods=PODS):
        """{(source, target)} of the pods that answer in all families and protocols; it fails where only some do."""
        def ask(source):
            rows = [(target, protocol, address) for target in pods if target != source
                    for protocol in protocols for address in self.addresses(target)]
            answers = self.ask(source, [[protocol, address, port, 0] for _, protocol, address in rows])
            return {(source, *row): "error" not in answer for row, answer in zip(rows, answers)}

        with ThreadPoolExecutor(4) as pool:
            rows = {key: value for found in pool.map(ask, pods) for key, value in found.items()}
        ends = {(source, target) for source, target, *_ in rows}
        return {pair for pair in ends if all(value for key, value in rows.items() if key[:2] == pair)}, \
            {pair for pair in ends if any(value for key, value in rows.items() if key[:2] == pair)}

    def wait_reached(self, wanted, **options):
        """Wait until just the wanted pairs reach each other, in every family and protocol."""
        seen = []

        def judge():
            seen[:] = self.reached(**options)
            return seen == [wanted, wanted]

        try:
            labs.wait_until(judge, TIMEOUT_S, "effect of a policy")
        except labs.LabError:
            raise AssertionError(f"wanted {sorted(wanted)}, all answers {sorted(seen[0])}, some {sorted(seen[1])}") from None

    @contextlib.contextmanager
    def policy(self, namespace, spec):
        """While it runs, there is a policy in a namespace."""
        meta = {"name": "policy", "namespace": namespace}
        made = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": spec}
        self.cluster.kubectl("apply", "-f", "-", stdin=made)
        try:
            yield
        finally:
            self.cluster.kubectl("delete", "networkpolicy", "policy", "-n", namespace)

    def close(self):
        for child in self.children:
            child.kill()
            child.wait(30)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory, served = tmp_path_factory.mktemp("policy"), []

    @contextlib.contextmanager
    def control(lab):
        labs.must(["ip", "-n", lab.underlay, "link", "set", "lo", "up"])
        labs.must(["ip", "-n", lab.underlay, "link", "set", labs.BRIDGE, "address", "02:00:00:00:02:50"])
        labs.must(["ip", "-n", lab.underlay, "address", "add", f"{SERVER}/24", "dev", labs.BRIDGE])
        with kubernetes.Kubernetes(directory / "api", SERVER, 6443, netns=lab.underlay) as cluster:
            served.append(cluster)
            yield

    with lab_up(f"mncni-policy-{os.getpid()}", pods=2, control=control) as lab:
        made = World(lab, served[0], directory)
        try:
            for node in lab.nodes():
                made.see_bridged(node)
            made.tell_of_pods()
            made.start_servers()
            for node in lab.nodes():
                made.start_engine(node)
            yield made
        finally:
            made.close()


EVERYTHING = set(PAIRS)
NONE_IN = {(source, target) for source, target in PAIRS if target not in ("a", "c")}
NONE_OUT = {(source, target) for source, target in PAIRS if source not in ("a", "c")}
NOT_INSIDE = EVERYTHING - {("a", "c"), ("c", "a")}
TO_A = {pair for pair in PAIRS if pair[1] == "a"}
ONLY_A = {"podSelector": {"matchLabels": {"pod": "a"}}}
IN_TWO = {"namespaceSelector": {"matchLabels": {"in": "two"}}}
WEB = [{"port": PORT, "protocol": protocol} for protocol in ("TCP", "UDP")]
NAMED = [{"port": "web", "protocol": "TCP"}, {"port": "web-udp", "protocol": "UDP"}]
# Policies in the namespace "one", of pods a and c: (spec, the pairs that reach each other at PORT, the same at OTHER_PORT).
POLICIES = {
    "default deny ingress": ({"podSelector": {}, "policyTypes": ["Ingress"]}, NONE_IN, NONE_IN),
    "default deny egress": ({"podSelector": {}, "policyTypes": ["Egress"]}, NONE_OUT, NONE_OUT),
    "both directions": ({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}, NONE_IN & NONE_OUT, NONE_IN & NONE_OUT),
    "ingress by pod": ({"podSelector": {}, "ingress": [{"from": [ONLY_A]}]}, NONE_IN | {("a", "c")}, NONE_IN | {("a", "c")}),
    "ingress by namespace": ({"podSelector": {}, "ingress": [{"from": [IN_TWO]}]}, NOT_INSIDE, NOT_INSIDE),
    "ingress by port": ({"podSelector": {}, "ingress": [{"ports": WEB}]}, EVERYTHING, NONE_IN),
    "ingress by named port": ({"podSelector": {}, "ingress": [{"ports": NAMED}]}, EVERYTHING, NONE_IN),
    "egress by namespace and port": ({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [IN_TWO], "ports": WEB}]},
                                     NOT_INSIDE, NONE_OUT),
}


def test_the_check_finds_nothing_missing_and_leaves_nothing(world):
    before = node_sh(world.lab, "node1", "nft list tables")
    argv = [*labs.node_argv(world.lab, "node1"), *AS_CONTAINER, labs.PYTHON, "-I", f"{ON_NODE}/check.py"]
    assert labs.run(argv) == (0, "", "")
    assert node_sh(world.lab, "node1", "nft list tables") == before


def test_the_engine_is_refused_nothing(world):
    """Neither by the API server nor by the kernel."""
    for node in world.lab.nodes():
        said = (world.dir / f"engine-{node}").read_text()
        assert "Policy engine is ready" in said and not re.search("forbidden|not permitted|denied", said), said


def test_without_policies_all_reach_all(world):
    world.wait_reached(EVERYTHING)
    world.wait_reached(EVERYTHING, port=OTHER_PORT)


@pytest.mark.parametrize("name", POLICIES)
def test_policy(world, name):
    spec, at_port, at_other = POLICIES[name]
    with world.policy("one", spec):
        world.wait_reached(at_port)
        if at_other != at_port:
            world.wait_reached(at_other, port=OTHER_PORT)


def test_ip_blocks_with_exceptions(world):
    """Only d, but not b, by their addresses: packets come out of the tunnel with the pod's own source."""
    blocks = []
    for b, d in zip(world.addresses("b"), world.addresses("d")):
        width = 128 if ":" in d else 32
        blocks += [{"ipBlock": {"cidr": "::/0" if ":" in d else "0.0.0.0/0", "except": [f"{b}/{width}"]}}]
    with world.policy("one", {"podSelector": {"matchLabels": {"pod": "a"}}, "ingress": [{"from": blocks}]}):
        world.wait_reached(EVERYTHING - {("b", "a")})
    world.wait_reached(EVERYTHING)


def test_a_connection_ends_when_a_policy_forbids_it(world):
    argv = [*world.in_pod("d"), *AS_USER, labs.PYTHON, f"{ON_NODE}/peer.py", "stream", "udp", world.addresses("a")[0], str(PORT)]
    child = labs.start(argv, stdin=-1, stdout=-1, stderr=-1)
    assert child.stderr.readline() == "streaming\n"
    time.sleep(2)
    with world.policy("one", POLICIES["default deny ingress"][0]):
        world.wait_reached(POLICIES["default deny ingress"][1])
        time.sleep(70)  # strict mode looks at connections each half minute, and the machine may be busy
        answer = json.loads(child.communicate(timeout=120)[0])
    said = [line for node in world.lab.nodes() for line in (world.dir / f"engine-{node}").read_text().splitlines() if "nforc" in line]
    assert answer["lost"] > 0 and answer["gap_s"] > 2, "\n".join([str(answer), *said])
    world.wait_reached(EVERYTHING)


def test_the_engine_away_lets_pass_and_holds_again_when_it_is_back(world, figure):
    spec, denied, _ = POLICIES["default deny ingress"]
    away = denied | TO_A - {("c", "a")}  # the engine of c's node judges what c sends, also by the policies of its target
    with world.policy("one", spec):
        world.wait_reached(denied)
        for sign in ("KILL", "TERM"):
            world.stop_engine("node1", sign)
            try:
                world.wait_reached(away)
            finally:
                world.start_engine("node1")
            world.wait_reached(denied)
    world.wait_reached(EVERYTHING)
    figure("network policy: engine of a node killed or stopped: new connections to its pods pass until it is back")


def test_a_queue_that_is_full_lets_pass(world, figure):
    """An engine that hangs, or is slower than a pod that begins connections: the kernel keeps 1024 packets for it at most."""
    spec, denied, _ = POLICIES["default deny ingress"]
    flood = ("import socket, sys\n"
             "with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:\n"
             "    for _ in range(1100):\n"
             "        out.sendto(b'x', (sys.argv[1], 9))")
    with world.policy("one", spec):
        world.wait_reached(denied)
        node_sh(world.lab, "node1", f"kill -STOP $(cat {PID})")
        try:
            assert "error" in world.ask("a", [["tcp", world.addresses("b")[0], PORT, 0]])[0], "what is allowed waits for the engine, too"
            labs.must([*world.in_pod("b"), *AS_USER, labs.PYTHON, "-c", flood, world.addresses("a")[0]])
            world.wait_reached(denied | TO_A - {("c", "a")})
        finally:
            node_sh(world.lab, "node1", f"kill -CONT $(cat {PID})")
        world.wait_reached(denied)
    world.wait_reached(EVERYTHING)
    figure("network policy: engine of a node hangs: new connections wait until its queue is full, then they pass")


def test_policies_between_pods_of_a_node_need_bridged_packets_in_netfilter(world):
    spec, denied, _ = POLICIES["default deny ingress"]
    with world.policy("one", spec):
        world.wait_reached(denied)
        world.see_bridged("node1", 0)
        world.wait_reached(denied | {("b", "a")})
        world.see_bridged("node1", 1)
        world.wait_reached(denied)
    world.wait_reached(EVERYTHING)


def test_a_new_pod_is_free_until_the_engine_has_heard_of_its_addresses(world, figure):
    """In both directions. A kubelet tells of them when the pod runs."""
    labs.add_pod(world.lab, "node1", "new")
    PODS["new"] = (("node1", "new"), "one")
    new = {"podSelector": {"matchLabels": {"pod": "new"}}, "policyTypes": ["Ingress", "Egress"]}
    try:
        world.start_servers("new")
        with world.policy("one", new):
            assert world.reached(pods=("new", "b"))[0] == {("new", "b"), ("b", "new")}
            world.tell_of_pods()
            begin = time.monotonic()
            world.wait_reached(set(), pods=("new", "b"))
            figure(f"network policy: holds for a new pod at most {time.monotonic() - begin:.0f} s after the API has its addresses")
        world.wait_reached({("new", "b"), ("b", "new")}, pods=("new", "b"))
    finally:
        PODS.pop("new")
        world.cluster.kubectl("delete", "pod", "new", "-n", "one", "--ignore-not-found", "--grace-period=0", "--force")
        labs.del_pod(world.lab, "node1", "new")


def test_what_a_connection_costs(world, figure):
    """Connections to a pod with a policy that lets them pass, against the same without a policy."""
    def connect_s(source, target):
        """The median of one connection."""
        script = ("import socket, statistics, sys, time\n"
                  "def connect():\n"
                  "    begin = time.perf_counter()\n"
                  "    socket.create_connection((sys.argv[1], int(sys.argv[2]))).close()\n"
                  "    return time.perf_counter() - begin\n"
                  "print(statistics.median(connect() for _ in range(200)))")
        argv = [*world.in_pod(source), *AS_USER, labs.PYTHON, "-c", script]
        return float(labs.must([*argv, world.addresses(target)[0], str(PORT)], timeout_s=300))

    ways = {"on one node": ("b", "a"), "across nodes": ("d", "a")}
    without = {name: min(connect_s(*way) for _ in range(3)) for name, way in ways.items()}
    with world.policy("one", POLICIES["ingress by namespace"][0]):
        world.wait_reached(POLICIES["ingress by namespace"][1])
        for name, way in ways.items():
            ratio = min(connect_s(*way) for _ in range(3)) / without[name]
            figure(f"network policy: a connection {name} takes {ratio:.1f} times the time without a policy")


def test_a_host_port_of_a_pod_with_policies(world):
    """portmap's rules do not depend on a label, which the verdict overwrites; nor on who is asked first."""
    node = "node1"
    asked = {"portMappings": [{"hostPort": HOST_PORT, "containerPort": PORT, "protocol": protocol} for protocol in ("tcp", "udp")]}
    labs.add_pod(world.lab, node, "ported", asked)
    PODS["e"] = ((node, "ported"), "one")

    def errors(source):
        return sum("error" in answer for answer in world.ask(source, questions))

    try:
        world.tell_of_pods()
        world.start_servers("e")
        questions = [[protocol, labs.endpoint(world.lab, node)[0], HOST_PORT, 0] for protocol in ("tcp", "udp")]
        only_e = {"podSelector": {"matchLabels": {"pod": "e"}}}
        spec = {**only_e, "ingress": [{"from": [ONLY_A, only_e]}]}
        with world.policy("one", spec):
            for source in ("a", "e"):  # from the same bridge, and from itself
                labs.wait_until(lambda source=source: errors(source) == 0, TIMEOUT_S, f"host port for {source}")
            labs.wait_until(lambda: errors("b") == 2, TIMEOUT_S, "refusal of a host port")
        labs.wait_until(lambda: errors("b") == 0, TIMEOUT_S, "host port for everybody")
    finally:
        PODS.pop("e")
        labs.del_pod(world.lab, node, "ported")


def test_after_a_reboot_policies_hold_before_a_pod_is_told_of(world):
    """The node's engine starts anew; its pods have new addresses, which the API server hears of when they run."""
    spec, denied, _ = POLICIES["default deny ingress"]
    with world.policy("one", spec):
        world.wait_reached(denied)
        world.stop_engine("node2", "KILL")
        labs.reboot(world.lab, "node2")
        labs.wait_first_pongs(world.lab, labs.plan_pairs(world.lab))
        world.see_bridged("node2")
        world.start_servers("c", "d")
        world.tell_of_pods()
        world.start_engine("node2")
        world.wait_reached(denied)
    world.wait_reached(EVERYTHING)
