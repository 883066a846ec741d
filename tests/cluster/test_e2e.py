"""Kubernetes' own tests of networks, by its own e2e.test, group by group. Their log is kept where the summary says."""

import contextlib
import json
import os
import re
import shutil
import signal

import pytest

from deploy import lab as labs
from deploy.cluster import cluster as clusters
from deploy.cluster import images

# Group -> (what the names of its tests match, what they must not).
NEVER = r"\[Disruptive\]|\[Feature:|\[Serial\]|\[Flaky\]|\[Slow\]"
GROUPS = {
    "conformance": (r"\[sig-network\].*\[Conformance\]", r"\[Disruptive\]"),
    "granular": (r"Granular Checks: (Pods|Services)", r"\[Disruptive\]|\[Feature:SCTP|\[Serial\]|SCTP"),
    "host-ports": (r"\[sig-network\] HostPort|should preserve source pod IP|hostPort", rf"{NEVER}|\[Conformance\]"),
    "services": (r"\[sig-network\] (Services|EndpointSlice|Proxy|Connectivity Pod Lifecycle|Conntrack|KubeProxy|NoSNAT|Networking)",
                 rf"{NEVER}|\[Conformance\]|Granular|load balancer|LoadBalancer|Internet|SSH|GCE|SCTP"),
    "dns": (r"\[sig-network\] DNS", rf"{NEVER}|\[Conformance\]|Internet|external"),
    "network-policy": (r"\[Feature:NetworkPolicy\]", r"\[Feature:SCTPConnectivity\]"),
    "dual-stack": (r"\[Feature:IPv6DualStack\]", r"\[Disruptive\]|Alpha|LoadBalancer|load balancer|SCTP"),
}
# The end of a test's name -> why it fails with MNCNI; docs/faults.md says so, too.
EXPLAINED = {
    "correctly when ExternalTrafficPolicy changes":
        "it connects from a node to that node's own NodePort, whose pod is on another node, and wants the node's address as the source;"
        " what a node sends through the tunnel comes from its pod gateway's address, the one by which the other side knows the sender",
}
PROCESSES, LIMIT_S = 4, 3600


@pytest.fixture(scope="session")
def ready(driver):
    """The images of the tests are on all nodes."""
    version = driver.kind["kubernetes"]
    if not (clusters.CACHE / "bin" / version / "e2e.test").exists():
        pytest.fail(f"there is no e2e.test of {version}: make test-cluster KUBERNETES_VERSION={version.partition('-')[2]}")
    archive = images.make_e2e_images(clusters.CACHE, version)
    labs.parallel(lambda node: clusters.import_images(driver.cluster, node, archive), driver.nodes)


@pytest.fixture(scope="session")
def policy_engine(driver):
    """deploy/network-policy is installed, as its README says."""
    archive, folder = images.make_policy_image(clusters.CACHE), str(clusters.ROOT / "deploy/network-policy")
    labs.parallel(lambda node: clusters.import_images(driver.cluster, node, archive), driver.nodes)
    driver.kubectl("apply", "-k", folder)
    driver.wait_rollout("daemonset/kube-network-policies", "kube-system")
    yield
    driver.kubectl("delete", "-k", folder, "--ignore-not-found", timeout_s=300)
    for node in driver.nodes:
        driver.inside(node, "nft", "delete table inet kube-network-policies")


def ginkgo_argv(driver, group, directory):
    focus, skip = GROUPS[group]
    programs = clusters.CACHE / "bin" / driver.kind["kubernetes"]
    return [
        *driver.outside(), str(programs / "ginkgo"), f"--procs={PROCESSES}", f"--timeout={LIMIT_S}s", "--no-color", "--silence-skips",
        "--json-report=report.json", f"--output-dir={directory}", f"--focus={focus}", f"--skip={skip}", str(programs / "e2e.test"), "--",
        f"--kubeconfig={driver.cluster.kubeconfig}", "--provider=skeleton", "--node-os-distro=debian", "--disable-log-dump",
        f"--report-dir={directory}", "--e2e-verify-service-account=false",
    ]


def summary(report):
    """({state: count}, the names of those that failed) of a report of ginkgo."""
    states, failed = {}, []
    for suite in json.loads(report.read_text()):
        for spec in suite["SpecReports"] or []:
            state = spec["State"]
            if spec["LeafNodeType"] == "It" and state != "skipped" and state != "pending":
                states[state] = states.get(state, 0) + 1
                if state != "passed":
                    failed.append(" ".join([*spec["ContainerHierarchyTexts"], spec["LeafNodeText"]]))
    return states, failed


NEEDS = {"network-policy": pytest.mark.kernel("nft_queue")}


@pytest.mark.parametrize("group", [pytest.param(group, marks=NEEDS.get(group, ())) for group in GROUPS])
def test_e2e(group, driver, ready, figure, request):
    if group == "network-policy":
        request.getfixturevalue("policy_engine")
    if group == "dual-stack" and len(driver.families) == 1:
        pytest.skip("the cluster has one family: FAMILIES=46")
    top = clusters.CACHE / "e2e" / group
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir(parents=True)
    log = top / "log"
    with open(log, "w") as out:
        child = labs.start(ginkgo_argv(driver, group, top), stdout=out, stderr=out, cwd=top, start_new_session=True)
        try:
            child.wait(LIMIT_S + 60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    states, failed = summary(top / "report.json")
    seconds = re.findall(r"^Ran .* in ([0-9.]+) seconds", log.read_text(), re.MULTILINE)
    figure(f"e2e {group} ({driver.name}): {states} in {seconds[-1:]} s, log {log}")
    explained = [name for name in failed if name.endswith(tuple(EXPLAINED))]
    assert states.get("passed") and failed == explained, "\n".join([f"log: {log}", *failed])
