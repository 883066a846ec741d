"""What happens to a cluster, under streams of UDP and TCP from a pod on node1 to a pod on node2: packets lost, silence, time to heal."""

import contextlib
import json
import subprocess
import time

import pytest

from deploy import lab as labs
from deploy.cluster import cluster as clusters
from tests.cluster.objects import NAMESPACE, PORT
from tests.conftest import kernel_has

pytestmark = pytest.mark.usefixtures("everything")
CLIENT, SERVER, BYSTANDER = "node1", "node2", "node3"
AGENT = "agent.py run"
HEAL_TIMEOUT_S = 300


class Streams:
    """Three streams between the same two pods: UDP and TCP to the pod's address, UDP to the address of a Service with this pod alone."""

    def __init__(self, driver):
        pods = {row["node"]: row for row in driver.pods("app=pods")}
        client, server = pods[CLIENT], pods[SERVER]
        one = driver.get("service", "-n", NAMESPACE, f"one-{server['name'].rpartition('-')[2]}")["spec"]["clusterIP"]
        # Not by kubectl exec, which lives no longer than the API server and the kubelet.
        pid = driver.inside(CLIENT, "pgrep", "-f", f"serve {PORT} {client['name']}$").split()[0]
        enter = [*driver.on_node(CLIENT), "nsenter", "--target", pid, "--net", "python3", "/k8s/conf/peer.py", "stream"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        words = {"udp": ("udp", server["ips"][0]), "tcp": ("tcp", server["ips"][0]), "service": ("udp", one)}
        self.children = {name: labs.start([*enter, *which, str(PORT)], **pipes) for name, which in words.items()}
        for child in self.children.values():
            assert child.stderr.readline() == "streaming\n"

    def end(self):
        """{name: what peer.py says of a stream}."""
        return {name: json.loads(child.communicate(timeout=60)[0]) for name, child in self.children.items()}


def wait_healed(driver):
    """Wait until all nodes and pods are ready and each pod on the network reaches each other. Returns the seconds."""
    def healed():
        nodes = driver.get("nodes")["items"]
        ready = [any(each["type"] == "Ready" and each["status"] == "True" for each in node["status"]["conditions"]) for node in nodes]
        pods = sorted(driver.pods("app=pods"), key=lambda row: row["name"])
        if ready != [True] * len(driver.nodes) or len(pods) != len(driver.nodes):
            return False
        answers = [answer for pod in pods for answer in driver.ask(("pod", pod["name"]), [["tcp", to["ips"][0], PORT, 0] for to in pods])]
        return not any("error" in answer for answer in answers)

    def tried():
        with contextlib.suppress(labs.LabError):     # the API server, or a kubelet, is away
            return healed()

    began = time.monotonic()
    labs.wait_until(tried, HEAL_TIMEOUT_S, "healing")
    for what in ("daemonset/mncni-agent", "deployment/mncni-nodeipam", "deployment/coredns"):
        driver.wait_rollout(what, "kube-system")
    return time.monotonic() - began


# ---- events -------------------------------------------------------------------------------------------------------------------------


def agent_pid(driver):
    return driver.inside(SERVER, "pgrep", "-f", AGENT).split()[0]


def kill_agent(driver):
    pid = agent_pid(driver)
    driver.inside(SERVER, "kill", "-KILL", pid)

    def another():
        with contextlib.suppress(labs.LabError):
            return agent_pid(driver) != pid

    labs.wait_until(another, 60, "new agent")


def delete_agent(driver):
    name = next(row["name"] for row in driver.pods("app.kubernetes.io/name=mncni-agent", "kube-system") if row["node"] == SERVER)
    driver.kubectl("delete", "pod", "-n", "kube-system", name)


def roll_out(driver):
    for what in ("daemonset/mncni-agent", "deployment/mncni-nodeipam"):
        driver.kubectl("rollout", "restart", "-n", "kube-system", what)
        driver.wait_rollout(what, "kube-system")


def restart(node, program, signal="TERM", pause_s=5):
    def restarted(driver):
        clusters.stop(driver.cluster, node, program, signal)
        time.sleep(pause_s)
        clusters.start(driver.cluster, node, program)
        if program in clusters.PROBES:
            clusters.wait_started(driver.cluster, node, program)

    return restarted


def reboot(node):
    def rebooted(driver):
        clusters.off(driver.cluster, node)
        clusters.boot(driver.cluster, node)

    return rebooted


def drain(driver):
    driver.kubectl("drain", BYSTANDER, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s", timeout_s=130)
    driver.kubectl("uncordon", BYSTANDER)


def delete_and_join(driver):
    """A node is taken away for good, and another one of its name comes."""
    driver.kubectl("delete", "node", BYSTANDER)
    clusters.wipe(driver.cluster, BYSTANDER)
    clusters.boot(driver.cluster, BYSTANDER)


# wireguard-go ends with the agent's container. Its tunnel is back when the next one has started.
AWAY_S = 0 if kernel_has("wireguard") else 10
EVENTS = {                                           # what happens -> (how, seconds of silence that are allowed; None: the server ends)
    "nothing, for 10 s": (lambda driver: time.sleep(10), 0),
    "agent killed": (kill_agent, AWAY_S),
    "agent's pod deleted": (delete_agent, AWAY_S),
    "roll-out of agents and nodeipam": (roll_out, AWAY_S),
    "kubelet killed": (restart(SERVER, "kubelet", "KILL"), 0),
    "containerd killed": (restart(SERVER, "containerd", "KILL"), 0),
    "kube-proxy killed": (restart(SERVER, "kube-proxy", "KILL"), 0),
    "API server away for 20 s": (restart(clusters.CONTROL, "kube-apiserver", pause_s=20), 0),
    "another node drained": (drain, 0),
    "another node rebooted": (reboot(BYSTANDER), 0),
    "another node deleted, wiped, joined": (delete_and_join, 0),
    "the server's node rebooted": (reboot(SERVER), None),
}


@pytest.mark.parametrize("event", EVENTS)
def test_event(event, driver, fault):
    happens, silence_s = EVENTS[event]
    wait_healed(driver)
    streams = Streams(driver)
    time.sleep(1)
    began = time.monotonic()
    happens(driver)
    done_s = time.monotonic() - began
    heal_s = done_s + wait_healed(driver)
    ended = streams.end()
    for name, end in ended.items():
        if name != "tcp":
            fault(f"{event}: {name}, silence {end['gap_s']} s", lost=end["lost"], sent=end["sent"], heal_s=heal_s)
    if silence_s is None:
        return
    assert not ended["tcp"]["broken"], ended
    # Without an event as well a busy machine may be silent for a second, but it loses nothing.
    assert all(end["gap_s"] <= silence_s if silence_s else end["lost"] == 0 for end in ended.values()), ended
