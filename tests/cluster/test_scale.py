"""Ninety pods come and go, and nothing of them stays."""

import time

from deploy import lab as labs
from tests.cluster import objects

COUNT = 90
# What a pod has on its node, besides its containers: devices, namespaces, leases, host ports, what libcni keeps.
LOOK = """cd /sys/class/net && ls -d mn* mi* 2>/dev/null
find /run/netns /run/mncni/portmap /var/lib/cni -mindepth 1 ! -type d ! -name '*lock*' ! -name 'last*' 2>/dev/null; true"""


def things(driver):
    """{(node, what)} of all that pods have on their nodes."""
    return {(node, line) for node in driver.nodes for line in driver.inside(node, "sh", "-c", LOOK).split()}


def seconds_until(probe, what, timeout_s=600):
    began = time.monotonic()
    labs.wait_until(probe, timeout_s, what)
    return time.monotonic() - began


def test_ninety_pods(driver, everything, figure):
    pod = objects.template("many", [{"name": "one", "image": "python:3-slim", "command": ["sleep", "infinity"]}])
    driver.apply([objects.workload("Deployment", "many", pod, replicas=0)])
    driver.wait_rollout("deployment/many")
    before = things(driver)
    scale = ("scale", "-n", objects.NAMESPACE, "deployment/many")

    def status():
        return driver.get("deployment/many", "-n", objects.NAMESPACE)["status"]

    driver.kubectl(*scale, f"--replicas={COUNT}")
    up_s = seconds_until(lambda: status().get("readyReplicas") == COUNT, f"{COUNT} ready pods")
    assert len(things(driver) - before) >= COUNT, "the look at the nodes sees nothing of the pods"
    driver.kubectl(*scale, "--replicas=0")
    down_s = seconds_until(lambda: not driver.get("pods", "-n", objects.NAMESPACE, "-l", "app=many")["items"], "end of all pods")
    # kubelet says that a pod is gone when its containers are; its sandbox goes a moment later.
    gone_s = seconds_until(lambda: things(driver) <= before, "end of all that pods had on their nodes", 120)
    figure(f"{COUNT} pods ({driver.name}): ready after {up_s:.1f} s; gone after {down_s:.1f} s, and all that they had {gone_s:.1f} s later")
