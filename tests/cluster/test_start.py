"""How long a pod takes from its creation to its first packet to a pod of another node, and back, against the reference plugins on the same
nodes: their bridge, with routes between the nodes and nothing encrypted."""

import contextlib
import json
import os
import shutil
import statistics
import time

import pytest

from deploy import lab as labs
from tests.cluster import objects

COUNT = 100
PLUGINS = "/usr/lib/cni"  # of Debian's package containernetworking-plugins
USED = ("bridge", "host-local", "portmap", "bandwidth")
CONFLIST = "/etc/cni/net.d/00-reference.conflist"


def conflist(subnet):
    """As MNCNI's does, it offers host ports and limits."""
    ipam = {"type": "host-local", "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "/run/reference"}
    bridge = {"type": "bridge", "bridge": "reference0", "isGateway": True, "ipMasq": False, "ipam": ipam}
    chained = [{"type": name, "capabilities": {key: True}} for name, key in (("portmap", "portMappings"), ("bandwidth", "bandwidth"))]
    return {"cniVersion": "1.0.0", "name": "reference", "plugins": [bridge, *chained]}


@contextlib.contextmanager
def reference(driver):
    """While it runs, new pods get the reference plugins."""
    subnets = {node: f"10.245.{number}.0/24" for number, node in enumerate(driver.nodes)}
    try:
        for node in driver.nodes:
            conf = driver.cluster.dir / node / "conf"
            for name in USED:
                shutil.copy(f"{PLUGINS}/{name}", conf)
            (conf / "reference").write_text(json.dumps(conflist(subnets[node])))
            # The tables of the reference bridge are dropped when a default policy of the host says so; here none does.
            routes = [f"ip route add {subnets[other]} via {driver.cluster.addresses(other)[0]}" for other in driver.nodes if other != node]
            move = [f"cp {' '.join(f'/k8s/conf/{name}' for name in USED)} /opt/cni/bin", f"cp /k8s/conf/reference {CONFLIST}"]
            driver.inside(node, "sh", "-ec", "; ".join([*routes, *move]))
        time.sleep(3)                                # containerd looks at the directory when it hears that it changed; nothing says when
        yield
    finally:
        for node in driver.nodes:
            script = [f"rm -f {CONFLIST}", f"cd /opt/cni/bin && rm -f {' '.join(USED)}"]
            script += [f"ip route del {subnets[other]}" for other in driver.nodes if other != node]
            driver.inside(node, "sh", "-c", "; ".join([*script, "ip link delete reference0; true"]))
        time.sleep(3)


def pod(name, node, command):
    return objects.item("Pod", name, spec={
        "nodeName": node, "restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
        "volumes": [{"name": "peer", "configMap": {"name": "peer"}}],
        "containers": [{"name": "one", "image": "python:3-slim", "command": ["python3", objects.PROGRAM, *command],
                        "volumeMounts": [{"name": "peer", "mountPath": "/peer"}]}]})


def wait_pod(driver, name, phase):
    def look():
        found = driver.get("pod", name, "-n", objects.NAMESPACE)["status"]
        return found if found.get("phase") == phase and found.get("podIP") else None

    return labs.wait_until(look, 120, f"{phase} of pod {name}")


def starts(driver, network):
    """The seconds that COUNT pods took, one after another, from before they were asked for."""
    driver.apply([pod(f"server-{network}", driver.nodes[1], ["serve", str(objects.PORT), "server"])])
    server, seconds = wait_pod(driver, f"server-{network}", "Running")["podIP"], []
    for number in range(COUNT):
        name, began = f"start-{network}-{number}", time.time()
        driver.apply([pod(name, driver.nodes[0], ["hello", server, str(objects.PORT)])])
        wait_pod(driver, name, "Succeeded")
        seconds.append(float(driver.kubectl("logs", "-n", objects.NAMESPACE, name)) - began)
        driver.kubectl("delete", "pod", "-n", objects.NAMESPACE, name, "--wait=false")
    return seconds


def test_from_creation_to_the_first_packet(driver, everything, figure):
    if not os.path.exists(f"{PLUGINS}/bridge"):
        pytest.skip("needs the reference plugins: apt-get install containernetworking-plugins")
    if "4" not in driver.families:
        pytest.skip("the reference network of this test has IPv4 alone")
    seconds = {"MNCNI": starts(driver, "mncni")}
    with reference(driver):
        seconds["reference"] = starts(driver, "reference")
    rows = {name: (statistics.median(each), statistics.quantiles(each, n=100)[98]) for name, each in seconds.items()}
    for name, (half, most) in rows.items():
        figure(f"from a pod's creation to an answer from another node ({driver.name}), {name}: p50 {half:.2f} s, p99 {most:.2f} s")
    # A pod's start is the kubelet's and the runtime's; the network is a small part of it.
    assert rows["MNCNI"][0] < 1.5 * rows["reference"][0]
