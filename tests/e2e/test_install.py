"""The manifests on a real API server, see tests/kubernetes.py: it takes them all, and the policies' expressions do what they should."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

import agent
import kube
from tests import kubernetes, manifests, policies

pytestmark = pytest.mark.skipif(bool(kubernetes.missing()), reason=kubernetes.missing())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster with the whole kustomization, in which the accounts may do everything that only policies can forbid."""
    with kubernetes.Kubernetes(tmp_path_factory.mktemp("kubernetes")) as cluster:
        cluster.kubectl("apply", "-k", ".")
        yield cluster


@pytest.fixture(scope="module")
def open_cluster(cluster):
    for account in ("mncni-agent", "mncni-nodeipam"):
        words = ("--clusterrole=cluster-admin", f"--serviceaccount=kube-system:{account}")
        cluster.kubectl("create", "clusterrolebinding", account + "-all", *words)
    case = next(case for case in policies.CASES if case.claim == "adds a label")

    def holds():  # on nodes made anew: a label that was added before the policies held is no change when it is added again
        reset_nodes(cluster.api())
        try:
            return policies.refusal(case, look_nodes(cluster.api()), client(cluster, case)) == "mncni-agent"
        except kube.ApiError:
            return False

    wait_until(holds)  # it takes a moment until policies and rights hold
    yield cluster
    for account in ("mncni-agent", "mncni-nodeipam"):
        cluster.kubectl("delete", "clusterrolebinding", account + "-all")


def wait_until(is_so, timeout_s=180):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def look_nodes(api):
    return {node["metadata"]["name"]: node for node in api.list(kube.NODES)[0]}


def reset_nodes(api):
    """The nodes of tests/policies.py, made anew; their uids are the server's, so the records are written again."""
    for name in look_nodes(api):
        api.request("DELETE", f"{kube.NODES}/{name}")
    for node in policies.nodes():
        node["metadata"] = {key: value for key, value in node["metadata"].items() if key in ("name", "labels", "annotations")}
        record = node["metadata"]["annotations"].pop(agent.RECORD, "")
        made = api.request("POST", kube.NODES, node)
        api.request("PATCH", f"{kube.NODES}/{node['metadata']['name']}/status", {"status": node["status"]}, None, kube.MERGE_PATCH)
        if record:
            api.request("PATCH", f"{kube.NODES}/{node['metadata']['name']}", policies.says(policies.record(made)), None, kube.MERGE_PATCH)


def client(cluster, case):
    groups = ["system:nodes"] if case.user.startswith("system:node:") else ["system:masters"] if case.user == policies.ADMIN else ()
    return cluster.api(case.user, groups, case.token)


# ---- what is applied ------------------------------------------------------------------------------------------------------


def test_everything_is_accepted_and_applied_again_it_changes_nothing(cluster):
    said = cluster.kubectl("apply", "-k", ".").splitlines()
    assert len(said) > 20
    assert [line for line in said if not line.endswith("unchanged")] == []


@pytest.mark.parametrize("path", sorted(path.name for path in manifests.DEPLOY.glob("*.yaml")))
def test_manifests_that_stand_alone_are_accepted(cluster, path):
    assert "(server dry run)" in cluster.kubectl("apply", "--dry-run=server", "-f", f"deploy/{path}")


def test_flannel_gets_the_network_that_nodeipam_gives_from(cluster, tmp_path):
    """flannel's own manifest, which is on the network, has a stand-in with the ConfigMap that is patched."""
    stand_in = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-flannel-cfg", "namespace": "kube-flannel"}}
    (tmp_path / "flannel.yaml").write_text(json.dumps({**stand_in, "data": {"cni-conf.json": "{}", "net-conf.json": "{}"}}))
    text = (manifests.DEPLOY / "flannel/kustomization.yaml").read_text()
    shutil.copytree(manifests.DEPLOY / "nodeipam", tmp_path / "nodeipam")
    (tmp_path / "flannel").mkdir()
    shutil.copy(manifests.DEPLOY / "flannel/network.yaml", tmp_path / "flannel")
    shutil.move(tmp_path / "flannel.yaml", tmp_path / "flannel")
    (tmp_path / "flannel/kustomization.yaml").write_text(re.sub(r"https://\S+", "flannel.yaml", text))
    objects = manifests.render(str(tmp_path / "flannel"))
    data = manifests.find(objects, "ConfigMap", "kube-flannel-cfg")["data"]
    assert json.loads(data["net-conf.json"])["Network"] == manifests.settings()["MNCNI_CLUSTER_CIDR"].split(",")[0]
    assert data["cni-conf.json"] == "{}"
    assert manifests.find(objects, "Deployment", "mncni-nodeipam")


# ---- the programs, with the rights that they get --------------------------------------------------------------------------


def test_an_agent_does_its_work_with_the_token_of_its_pod_and_cannot_touch_another_node(cluster):
    """On a node that later tests do not have: the store's threads go on as long as this process."""
    reset_nodes(cluster.api())
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a1"}, **policies.given("10.8.0.0/24")}
    cluster.api().request("POST", kube.NODES, node)
    api = kube.Api(cluster.access(cluster.token("mncni-agent", "a1")))
    store = agent.KubernetesStore(api, "a1")
    store.start()
    wait_until(lambda: store.identity() and store.guard is not None)
    assert store.guard is True
    text = policies.record(look_nodes(cluster.api())["a1"], gen=4)
    store.publish("a1", text)
    store.say("the cable is out")
    store.note("n2", "RecordRefused", "its record is a lie")
    wait_until(lambda: look_nodes(cluster.api())["a1"]["metadata"].get("annotations", {}).get(agent.RECORD) == text)
    wait_until(lambda: ("True", "MncniIsDown") in [(row["status"], row["reason"]) for row in conditions(cluster, "a1")])
    wait_until(lambda: cluster.api().list("/api/v1/namespaces/default/events")[0])
    assert store.trouble == ""
    with pytest.raises(kube.ApiError, match="may not change another Node"):
        api.request("PATCH", f"{kube.NODES}/n2", policies.says(None), None, kube.MERGE_PATCH)
    store.publish("a1", None)  # or it would put the record back
    store.condition = None
    store.withdraw("a1")
    assert "NetworkUnavailable" not in [row["type"] for row in conditions(cluster, "a1")]
    assert agent.RECORD not in look_nodes(cluster.api())["a1"]["metadata"].get("annotations", {})


def conditions(cluster, node):
    return look_nodes(cluster.api())[node]["status"].get("conditions", [])


def test_nodeipam_does_its_work_with_the_token_of_its_pod(cluster, tmp_path):
    for name in look_nodes(cluster.api()):
        cluster.api().request("DELETE", f"{kube.NODES}/{name}")
    for name in ("m1", "m2", "m3"):
        cluster.api().request("POST", kube.NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    access = cluster.access(cluster.token("mncni-nodeipam", "m1"))
    user = {"name": "u", "user": {"token": access.pop("token")}}
    config = {"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]}
    config.update(users=[user], clusters=[{"name": "c", "cluster": access}])
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    argv = [sys.executable, str(manifests.ROOT / "nodeipam.py"), "--kubeconfig", str(tmp_path / "kubeconfig")]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*argv, "--cluster-cidr", "10.244.0.0/23"], stderr=log)
        try:
            wait_until(lambda: sum(bool(node["spec"].get("podCIDRs")) for node in look_nodes(cluster.api()).values()) == 2)
            wait_until(lambda: "10.244.0.0/23" in str(cluster.api().list("/api/v1/namespaces/default/events")[0]))
        finally:
            process.terminate()
            process.wait(20)
    given = sorted(node["spec"].get("podCIDR", "none") for node in look_nodes(cluster.api()).values())
    assert given == ["10.244.0.0/24", "10.244.1.0/24", "none"]
    assert "forbidden" not in (tmp_path / "log").read_text()


def test_a_lease_that_was_deleted_is_applied_again_and_one_in_use_stays_as_it_is(cluster):
    lease = ("get", "lease", "mncni-nodeipam", "-n", "kube-system", "-o", "jsonpath={.spec.leaseTransitions}")
    before = cluster.kubectl(*lease)
    assert int(before) > 0
    cluster.kubectl("apply", "-k", ".")
    assert cluster.kubectl(*lease) == before
    cluster.kubectl("delete", "lease", "mncni-nodeipam", "-n", "kube-system")
    assert "lease.coordination.k8s.io/mncni-nodeipam created" in cluster.kubectl("apply", "-k", ".")


def test_the_guide_to_removal_works_without_an_error_and_leaves_nothing(cluster):
    """The kubectl commands at the top of deploy/uninstall.yaml, but those that need pods."""
    text = (manifests.DEPLOY / "uninstall.yaml").read_text()
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^#   kubectl (.*)$", text, re.MULTILINE)]
    assert [words[0] for words in commands].count("delete") == 4
    kinds = "configmap,daemonset,deployment,lease,serviceaccount,role,rolebinding"
    look = ("get", kinds, "-n", "kube-system", "-o", "name", "--ignore-not-found")
    policies_of = ("get", "validatingadmissionpolicy,validatingadmissionpolicybinding,clusterrole,clusterrolebinding", "-o", "name")
    assert "lease.coordination.k8s.io/mncni-nodeipam" in cluster.kubectl(*look).split()
    try:
        for words in commands:
            if words[0] not in ("rollout", "logs"):
                cluster.kubectl(*words)
        assert [name for name in (cluster.kubectl(*look) + cluster.kubectl(*policies_of)).split() if "mncni" in name] == []
    finally:
        cluster.kubectl("apply", "-k", ".")


def test_nodeipams_token_makes_no_lease(cluster):
    api = kube.Api(cluster.access(cluster.token("mncni-nodeipam", "m1")))
    leases = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"
    body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "kube-scheduler"}}
    with pytest.raises(kube.ApiError, match='cannot create resource "leases"'):
        api.request("POST", leases, body)
    assert api.request("GET", f"{leases}/mncni-nodeipam")["metadata"]["name"] == "mncni-nodeipam", "the token is good"


# ---- the policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", policies.CASES, ids=lambda case: f"{case.user.rpartition(':')[2]} {case.claim}".replace(" ", "-"))
def test_the_policies_allow_and_refuse(open_cluster, case):
    reset_nodes(open_cluster.api())
    nodes = look_nodes(open_cluster.api())
    assert policies.refusal(case, nodes, client(open_cluster, case)) == case.refused
    assert look_nodes(open_cluster.api()) == nodes or not case.refused


def test_an_agent_cannot_bloat_its_node_by_managers_of_fields(open_cluster):
    """Each server-side apply in another name adds an entry, which all agents would read with the metadata."""
    reset_nodes(open_cluster.api())
    api = open_cluster.api(policies.AGENT, (), "n1")
    text = look_nodes(open_cluster.api())["n1"]["metadata"]["annotations"][agent.RECORD]
    body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "annotations": {agent.RECORD: text}}}
    with pytest.raises(kube.ApiError, match="may add no managers of fields"):
        for number in range(100):
            api.request("PATCH", f"{kube.NODES}/n1", body, {"fieldManager": f"manager-{number}"}, "application/apply-patch+yaml")
    assert 10 < number < 40
    assert len(look_nodes(open_cluster.api())["n1"]["metadata"]["managedFields"]) == 32
    api.request("PATCH", f"{kube.NODES}/n1", policies.own(gen=8)(look_nodes(open_cluster.api())), None, kube.MERGE_PATCH)


def test_an_agent_cannot_bloat_its_node_by_conditions(open_cluster):
    """Thousands of the one condition that is its own, by a patch that replaces the list."""
    reset_nodes(open_cluster.api())
    api = open_cluster.api(policies.AGENT, (), "n1")
    there = look_nodes(open_cluster.api())["n1"]["status"]["conditions"]
    others = [row for row in there if row["type"] != "NetworkUnavailable"]
    rows = policies.condition()["status"]["conditions"]
    path = f"{kube.NODES}/n1/status"
    api.request("PATCH", path, {"status": {"conditions": others + rows}}, None, kube.MERGE_PATCH)
    with pytest.raises(kube.ApiError, match="is there once"):
        api.request("PATCH", path, {"status": {"conditions": others + rows * 3000}}, None, kube.MERGE_PATCH)
