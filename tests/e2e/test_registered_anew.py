"""A Node that is deleted and registered anew, with other pod CIDRs: its running pods have no network, and it is said so."""

import json
import os

import pytest

from deploy import lab as labs
from tests.e2e.conftest import cluster_up, is_well
from tests.e2e.test_node_ports import page

pytestmark = pytest.mark.root

SOON_S = 20
NEW = ["10.244.77.0/24", "fd00:10:244:77::/64"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with cluster_up(f"mncni-anew-{os.getpid()}", tmp_path_factory.mktemp("api"), nodes=1) as made:
        yield made


def status(lab):
    argv = [*labs.node_argv(lab, "node1"), labs.PYTHON, "/opt/mncni/agent.py", "status", "--json"]
    return json.loads(labs.run(argv)[1])


def condition(api, reason):
    """The condition NetworkUnavailable of the Node, if it has this reason."""
    rows = api.call("node", "node1")["status"].get("conditions", [])
    return next((row for row in rows if row["type"] == "NetworkUnavailable" and row["reason"] == reason), None)


def test_running_pods_outside_the_new_pod_cidrs_are_named_until_they_are_gone(cluster):
    lab, api = cluster
    labs.wait_until(lambda: is_well(lab), SOON_S, "agent that is well")
    addresses = labs.pod_record(lab, "node1", "pod1")["addresses"]
    assert status(lab)["stranded"] == {}
    before = api.call("count", "create", "events")
    api.call("delete_node", "node1")
    api.call("create_node", "node1", pod_cidrs=NEW, addresses=[labs.endpoint(lab, "node1")[0]])
    labs.wait_until(lambda: status(lab)["podCIDRs"] == NEW, SOON_S, "node with its new pod CIDRs")
    said = labs.wait_until(lambda: (said := status(lab))["stranded"] and said, SOON_S, "status that names the pod")
    assert sorted(map(sorted, said["stranded"].values())) == [sorted(addresses)] and not said["ok"]
    assert addresses[0] in said["reason"] and "delete these pods" in said["reason"]
    assert json.loads(lab.inside("node1", "/run/mncni/ready").read_text())["ok"], "new pods do work"
    assert "mncni_stranded_pods 1" in page(labs.node_argv(lab, "node1"), "127.0.0.1", "/metrics")[1].splitlines()
    labs.wait_until(lambda: api.call("count", "create", "events") > before, SOON_S, "Event")
    told = labs.wait_until(lambda: condition(api, "MncniPodsWithoutNetwork"), SOON_S, "condition that names the pod")
    assert told["status"] == "False" and addresses[0] in told["message"] and "delete these pods" in told["message"]
    labs.add_pod(lab, "node1", "new")
    labs.del_pod(lab, "node1", "pod1")
    labs.wait_until(lambda: is_well(lab), SOON_S, "agent that is well again")
    labs.wait_until(lambda: condition(api, "MncniIsUp"), SOON_S, "condition that says so")
