"""The agent on a Kubernetes API server: two nodes with real WireGuard, whose only word of each other is their Node objects.

The server runs on the underlay. Whatever happens to it, a stream between pods notices nothing.
"""

import json
import os
import time

import pytest

from deploy import lab as labs
from tests.e2e.conftest import RECORD, SERVER, cluster_up, node_sh, wg_peers
from tests.e2e.flow import Flow

pytestmark = pytest.mark.root

HOLD_S = 60  # how long an agent doubts that many nodes have vanished at once
HEAL_S = 20  # far more than it takes: the machine may be busy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A lab whose nodes are Nodes, and its API server: lab, api."""
    with cluster_up(f"mncni-kube-{os.getpid()}", tmp_path_factory.mktemp("api")) as made:
        yield made


def is_well(lab):
    return labs.run([*labs.node_argv(lab, "node1"), labs.PYTHON, "/opt/mncni/agent.py", "status"])[0] == 0


def status(lab):
    argv = [*labs.node_argv(lab, "node1"), labs.PYTHON, "/opt/mncni/agent.py", "status", "--json"]
    return json.loads(labs.run(argv)[1])


def ghost(api, number, key="A"):
    """A Node that nobody runs, with a good record."""
    record = json.loads(api.call("node", "node2")["metadata"]["annotations"][RECORD])
    record["slots"]["0"]["key"] = f"{key * 3}{number:03d}" + record["slots"]["0"]["key"][6:]
    cidrs = [f"10.244.{number}.0/24", f"fd00:10:244:{number:x}::/64"]
    node = api.call("create_node", f"ghost{number}", pod_cidrs=cidrs, addresses=[f"192.0.2.{number}"])
    record.update(podCIDRs=cidrs, endpoints=[f"192.0.2.{number}"], uid=node["metadata"]["uid"])
    api.call("patch_node", f"ghost{number}", {"metadata": {"annotations": {RECORD: json.dumps(record)}}})
    return record["slots"]["0"]["key"]


def test_pods_reach_each_other_in_both_families_and_status_is_well(cluster):
    lab, _ = cluster
    assert all(row["received"] for row in labs.ping_all(lab))
    labs.wait_until(lambda: is_well(lab), HEAL_S, "agent that is well")


def test_nodes_have_records_and_a_network_says_the_cluster(cluster):
    lab, api = cluster

    def available():
        conditions = [api.call("node", node)["status"].get("conditions", []) for node in lab.nodes()]
        found = [entry for rows in conditions for entry in rows if entry["type"] == "NetworkUnavailable"]
        return [(entry["status"], entry["reason"]) for entry in found] == [("False", "MncniIsUp")] * 2

    labs.wait_until(available, HEAL_S, "condition of both nodes")
    node = api.call("node", "node1")
    beginning = json.dumps({"v": 1, "podCIDRs": node["spec"]["podCIDRs"], "uid": node["metadata"]["uid"]}, separators=(",", ":"))
    assert node["metadata"]["annotations"][RECORD].startswith(beginning[:-1])


def test_a_node_joins_in_less_than_a_second_from_its_record(cluster, figure):
    lab, api = cluster
    took = []
    for number in range(100, 103):
        begin = time.monotonic()
        key = ghost(api, number)
        labs.wait_until(lambda: key in wg_peers(lab, "node1"), HEAL_S, "peer")  # noqa: B023
        took.append(time.monotonic() - begin)
    for number in range(100, 103):
        api.call("delete_node", f"ghost{number}")
    labs.wait_until(lambda: len(wg_peers(lab, "node1")) == 1, HEAL_S, "peers that are gone")
    figure(f"agent: from a record in the API server to a WireGuard peer {min(took):.2f} to {max(took):.2f} s (limit 1)")
    assert min(took) < 1


FAULTS = {
    "API server away": lambda api: (api.call("down"), time.sleep(1), api.call("up")),
    "API server frozen": lambda api: (api.call("freeze"), time.sleep(1), api.call("thaw")),
    "watches cut": lambda api: api.call("close_watches", abrupt=True),
    "410, then an empty list": lambda api: (api.call("fault", "empty_list", times=4), api.call("compact"), api.call("send_error", 410)),
    "410, then lists without annotations": lambda api: (
        api.call("fault", "strip", times=4, drop=["metadata.annotations"]),
        api.call("compact"),
        api.call("send_error", 410),
    ),
    "500 to everything": lambda api: (api.call("fault", "status", times=8, code=500), api.call("close_watches", abrupt=True)),
    "429 to everything": lambda api: (api.call("fault", "status", times=4, code=429, retry_after=1), api.call("close_watches")),
    "403 to everything": lambda api: (api.call("fault", "status", times=8, code=403), api.call("close_watches")),
    "half answers": lambda api: (api.call("fault", "bad_json", times=4), api.call("send_error", 410)),
    "a hundred nodes come and go": lambda api: [
        (ghost(api, number, "B"), api.call("delete_node", f"ghost{number}")) for number in range(100, 200)
    ],
}


def lost_during(lab, act):
    """How many of 10,000 packets between two pods were lost. Nothing but WireGuard and the API crosses the underlay meanwhile."""
    target = labs.pod_record(lab, "node2", "pod1")["addresses"][0]
    with labs.sniffing(lab) as counts:
        with Flow(labs.pod_argv(lab, "node1", "pod1"), labs.pod_argv(lab, "node2", "pod1"), target) as flow:
            act()
    assert counts["other"] == counts["dropped"] == 0 and all(f"{SERVER} " in f"{sample} " for sample in counts["samples"]), counts
    return flow.lost


@pytest.mark.parametrize("event", FAULTS)
def test_a_fault_of_the_api_costs_a_running_pod_no_packet(cluster, event, figure):
    lab, api = cluster
    for _ in range(3):  # a busy machine loses packets by itself; what the fault costs it costs each time
        lost = lost_during(lab, lambda: FAULTS[event](api))
        api.call("clear_faults")
        labs.wait_until(lambda: is_well(lab), HOLD_S + HEAL_S, "agent that is well")
        if not lost:
            break
    figure(f"{event:36} {lost:5} of 10000 lost")
    assert lost == 0


def test_an_agent_that_starts_without_the_api_keeps_the_network(cluster):
    lab, api = cluster
    for _ in range(3):
        api.call("down")
        lost = lost_during(lab, lambda: restart_alone(lab))
        assert status(lab)["ok"] is False and status(lab)["reason"] == "", status(lab)
        api.call("up")
        labs.wait_until(lambda: is_well(lab), HEAL_S, "agent that is well")
        if not lost:
            break
    assert lost == 0


def restart_alone(lab):
    node_sh(lab, "node1", f"kill -KILL $(cat {labs.AGENT_PID})")
    labs.wait_until(lambda: not labs.agent_pid(lab.inside("node1", "/")), 10, "end of the agent")
    labs.start_agent(lab, "node1")
    labs.wait_until(lambda: "API server" in status(lab).get("store", ""), HEAL_S, "word of the missing API server")


def test_a_node_that_boots_without_the_api_gets_its_pods_back(cluster):
    lab, api = cluster
    api.call("down")
    labs.reboot(lab, "node1")
    labs.wait_first_pongs(lab, labs.plan_pairs(lab))
    api.call("up")
    labs.wait_until(lambda: is_well(lab), HEAL_S, "agent that is well")


def test_a_quiet_agent_writes_nothing(cluster):
    lab, api = cluster
    labs.wait_until(lambda: is_well(lab), HEAL_S, "agent that is well")
    api.call("reset_counters")
    time.sleep(12)  # longer than an audit, which is what could write
    assert api.call("writes") == 0


def test_uninstall_takes_the_record_out_of_the_cluster(cluster):
    lab, api = cluster
    node_sh(lab, "node2", f"kill $(cat {labs.AGENT_PID})")
    labs.wait_until(lambda: not labs.agent_pid(lab.inside("node2", "/")), 10, "end of the agent")
    options = "--force --kubeconfig /opt/mncni/kubeconfig --cluster-cidr 10.244.0.0/16"
    said = node_sh(lab, "node2", f"/opt/mncni/agent.py uninstall {options} 2>&1")
    assert "record stays" not in said, said
    assert RECORD not in api.call("node", "node2")["metadata"].get("annotations", {})
    labs.wait_until(lambda: not wg_peers(lab, "node1"), HEAL_S, "end of the peer")
