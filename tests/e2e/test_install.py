"""The manifests on a real API server, see tests/kubernetes.py: everything is accepted, and the policies' expressions do what they should."""

import time

import pytest

import agent
from tests import kubernetes, policies

pytestmark = pytest.mark.skipif(bool(kubernetes.missing()), reason=f"needs {kubernetes.missing()}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster with the whole kustomization, in which the accounts may do everything that only policies can forbid."""
    with kubernetes.Kubernetes(tmp_path_factory.mktemp("kubernetes")) as cluster:
        cluster.kubectl("apply", "-k", ".")
        yield cluster


@pytest.fixture(scope="module")
def open_cluster(cluster):
    for account in ("mncni-agent", "mncni-nodeipam"):
        cluster.kubectl("create", "clusterrolebinding", account + "-all", "--clusterrole=cluster-admin", f"--serviceaccount=kube-system:{account}")
    reset_nodes(cluster.api())
    case = policies.CASES[0]
    wait_until(lambda: policies.refusal(case._replace(node="n2"), look_nodes(cluster.api()), client(cluster, case)) == "mncni-agent")
    yield cluster
    for account in ("mncni-agent", "mncni-nodeipam"):
        cluster.kubectl("delete", "clusterrolebinding", account + "-all")


def wait_until(is_so, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def look_nodes(api):
    return {node["metadata"]["name"]: node for node in api.list(agent.NODES)[0]}


def reset_nodes(api):
    """The nodes of tests/policies.py, made anew; their uids are the server's, so the records are written again."""
    for name in look_nodes(api):
        api.request("DELETE", f"{agent.NODES}/{name}")
    for node in policies.nodes():
        node["metadata"] = {key: value for key, value in node["metadata"].items() if key in ("name", "labels", "annotations")}
        record = node["metadata"]["annotations"].pop(agent.RECORD, "")
        made = api.request("POST", agent.NODES, node)
        api.request("PATCH", f"{agent.NODES}/{node['metadata']['name']}/status", {"status": node["status"]}, None, agent.MERGE_PATCH)
        if record:
            api.request("PATCH", f"{agent.NODES}/{node['metadata']['name']}", policies.says(policies.record(made)), None, agent.MERGE_PATCH)


def client(cluster, case):
    groups = {policies.KUBELET: ["system:nodes"], policies.ADMIN: ["system:masters"]}
    return cluster.api(case.user, groups.get(case.user, ()), case.token)


@pytest.mark.parametrize("case", policies.CASES, ids=lambda case: f"{case.user.rpartition(':')[2]} {case.claim}".replace(" ", "-"))
def test_the_policies_allow_and_refuse(open_cluster, case):
    reset_nodes(open_cluster.api())
    nodes = look_nodes(open_cluster.api())
    assert policies.refusal(case, nodes, client(open_cluster, case)) == case.refused
    assert look_nodes(open_cluster.api()) == nodes or not case.refused
