"""The agent on a Kubernetes API server: two nodes with real WireGuard, whose only word of each other is their Node objects.

The server runs on the underlay. Whatever happens to it, a stream between pods notices nothing.
"""

import contextlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from deploy import lab as labs
from tests.e2e.conftest import RECORD, cluster_up, is_well, keys_of, node_sh, rotate, stream, things, wg_peers

pytestmark = pytest.mark.root

HOLD_S = 60  # how long an agent doubts that many nodes have vanished at once
HEAL_S = 20  # far more than it takes: the machine may be busy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A lab whose nodes are Nodes, and its API server: lab, api."""
    with cluster_up(f"mncni-kube-{os.getpid()}", tmp_path_factory.mktemp("api")) as made:
        yield made


def status(lab):
    argv = [*labs.node_argv(lab, "node1"), labs.PYTHON, "/opt/mncni/agent.py", "status", "--json"]
    return json.loads(labs.run(argv)[1])


def ghost(api, number, key="A"):
    """A Node that nobody runs, with a good record. number: 16 to 2,000."""
    record = json.loads(api.call("node", "node2")["metadata"]["annotations"][RECORD])
    record["key"] = f"{key * 2}{number:04d}" + record["key"][6:]
    cidrs = [f"10.244.{128 + number // 16}.{number % 16 * 16}/28", f"fd00:10:244:{number:x}::/64"]
    address = f"198.18.{number // 256}.{number % 256}"
    node = api.call("create_node", f"ghost{number}", pod_cidrs=cidrs, addresses=[address])
    record.update(podCIDRs=cidrs, endpoints=[address], uid=node["metadata"]["uid"])
    api.call("patch_node", f"ghost{number}", {"metadata": {"annotations": {RECORD: json.dumps(record)}}})
    return record["key"]


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
    beginning = json.dumps({"v": 2, "podCIDRs": node["spec"]["podCIDRs"], "uid": node["metadata"]["uid"]}, separators=(",", ":"))
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


def away(lab, api):
    api.call("down")
    time.sleep(1)
    api.call("up")


def frozen(lab, api):
    """Connections are accepted, and nobody answers."""
    api.call("freeze")
    time.sleep(1)
    api.call("thaw")


def slow(lab, api):
    api.call("fault", "slow", times=None, delay_s=30)
    api.call("close_watches")
    time.sleep(32)


def expired(lab, api, kind, **parameters):
    """Every watch is told to list again, and the list is wrong."""
    with requests_coming(api, 4, verb="list"):
        api.call("fault", kind, times=4, **parameters)
        api.call("compact")
        api.call("send_error", 410)


def refused(lab, api, code, times=8, **parameters):
    with requests_coming(api, 4, code=code):
        api.call("fault", "status", times=times, code=code, **parameters)
        api.call("close_watches", abrupt=True)


@contextlib.contextmanager
def requests_coming(api, count, **what):
    """So many requests of a kind have come at the end of the with block."""
    before = api.call("count", **what)
    yield
    labs.wait_until(lambda: api.call("count", **what) >= before + count, HEAL_S, f"{count} requests, {what}")


def token_rotated(lab, api):
    """As kubelet does it in a pod: a new one in the same file."""
    with requests_coming(api, 2, code=401):
        api.call("rotate_tokens")
        api.call("close_watches")
    give_tokens(lab)


def give_tokens(lab):
    """Each node gets a kubeconfig that names a token file, and in it the token that the API server believes now."""
    for node in lab.nodes():
        with open(lab.state()["kubeconfig"].format(node=node), encoding="utf-8") as file:
            config = json.load(file)
        token = config["users"][0]["user"].pop("token")
        config["users"][0]["user"]["tokenFile"] = "token"
        for name, text in (("token", token), ("kubeconfig", json.dumps(config))):
            labs.write_atomically(lab.inside(node, f"/opt/mncni/{name}"), text)


def crowd(lab, api):
    for number in range(100, 200):
        ghost(api, number, "B")
        api.call("delete_node", f"ghost{number}")


FAULTS = {
    "API server away": away,
    "API server frozen": frozen,
    "API server answers after 30 s": slow,
    "watches cut": lambda lab, api: api.call("close_watches", abrupt=True),
    "410, then an empty list": lambda lab, api: expired(lab, api, "empty_list"),
    "410, then lists without annotations": lambda lab, api: expired(lab, api, "strip", drop=["metadata.annotations"]),
    "410, then half answers": lambda lab, api: expired(lab, api, "bad_json"),
    "500 to everything": lambda lab, api: refused(lab, api, code=500),
    "429 to everything": lambda lab, api: refused(lab, api, code=429, retry_after=1, times=4),
    "403 to everything": lambda lab, api: refused(lab, api, code=403),
    "token rotated": token_rotated,
    "server's certificate renewed": lambda lab, api: (api.call("rotate_certificate"), api.call("close_watches", abrupt=True)),
    "a hundred nodes come and go": crowd,
}


def join_s(lab, api):
    """How long it takes until a new node is a peer."""
    begin, key = time.monotonic(), ghost(api, 99)
    labs.wait_until(lambda: key in wg_peers(lab, "node1"), HOLD_S + HEAL_S, "peer")
    took_s = time.monotonic() - begin
    api.call("delete_node", "ghost99")
    labs.wait_until(lambda: len(wg_peers(lab, "node1")) == 1, HOLD_S + HEAL_S, "end of the peer")
    return took_s


def row(lab, act, fault, event):
    """A row of the table: what a stream noticed while act() ran, which returns how long the agent took to be in the know again. A busy
    machine loses packets by itself; what the fault costs it costs each time."""
    before, heal_s = things(lab, "node1"), []
    for _ in range(3):
        [flow] = stream(lab, lambda: heal_s.append(act()), rate=1_000, count=2_000)
        labs.wait_until(lambda: is_well(lab), HOLD_S + HEAL_S, "agent that is well")
        if not flow.lost:
            break
    fault(event, flow.lost, flow.sent, 0, heal_s[-1], len(things(lab, "node1") - before))
    assert flow.lost == 0 and heal_s[-1] < HEAL_S


@pytest.mark.parametrize("event", FAULTS)
def test_a_fault_of_the_api_costs_a_running_pod_no_packet(cluster, event, fault):
    lab, api = cluster
    if event == "token rotated":
        give_tokens(lab)
        for node in lab.nodes():
            labs.stop_agent(lab, node)
            labs.start_agent(lab, node)

    def act():
        FAULTS[event](lab, api)
        api.call("clear_faults")
        return join_s(lab, api)

    row(lab, act, fault, event)


NEW_KEYS = {
    "new key for the node that receives": ("node2",),
    "new key for the node that sends": ("node1",),
    "new keys for both nodes at once": ("node1", "node2"),
}


def knows(lab, node, other):
    return set(wg_peers(lab, node)) == {keys_of(lab, other)[2]}


@pytest.mark.alone
@pytest.mark.parametrize("event", NEW_KEYS)
def test_a_new_key_is_hardly_noticed(cluster, event, fault):
    lab, _ = cluster

    def act():
        with ThreadPoolExecutor() as pool:
            assert [code for code, *_ in pool.map(lambda node: rotate(lab, node), NEW_KEYS[event])] == [0] * len(NEW_KEYS[event])
        time.sleep(1)  # of traffic

    for _ in range(3):  # a busy machine is silent by itself
        before = {node: keys_of(lab, node) for node in lab.nodes()}
        [flow] = stream(lab, act, rate=500, count=500)
        for node in lab.nodes():
            on_disk, in_device, public = keys_of(lab, node)
            assert on_disk == in_device and (public != before[node][2]) is (node in NEW_KEYS[event])
        assert knows(lab, "node1", "node2") and knows(lab, "node2", "node1")
        if flow.silence_s <= 0.3:
            break
    times = f"silence {1000 * flow.silence_s:.0f} ms, TCP {1000 * flow.stall_s:.0f} ms"
    fault(f"API server: {event}: {times}", flow.lost, flow.sent, 0, flow.silence_s)
    assert flow.silence_s <= 0.3


def test_a_new_key_waits_for_an_api_server_that_is_away_also_in_an_agent_that_starts(cluster, fault):
    lab, api = cluster

    def act():
        before = keys_of(lab, "node1")
        api.call("down")
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(rotate, lab, "node1")
            labs.wait_until(lambda: status(lab).get("nextKey"), HEAL_S, "new key that waits")
            restart_alone(lab)
            labs.wait_until(lambda: status(lab).get("nextKey"), HEAL_S, "new key that waits in a new agent")
            new = status(lab)["nextKey"]
            assert f"a new key waits until the node store has it: {new}" in agent_says(lab)
            assert keys_of(lab, "node1") == before and new != before[2]
            api.call("up")
            assert waiting.result()[0] == 0, waiting.result()
        assert keys_of(lab, "node1")[2] == new == status(lab)["publicKey"]
        return join_s(lab, api)

    row(lab, act, fault, "new key, API server away, agent killed")
    assert knows(lab, "node2", "node1")


def agent_says(lab):
    return labs.run([*labs.node_argv(lab, "node1"), labs.PYTHON, "/opt/mncni/agent.py", "status"])[1]


def test_an_agent_that_starts_without_the_api_keeps_the_network(cluster, fault):
    lab, api = cluster

    def act():
        api.call("down")
        restart_alone(lab)
        assert status(lab)["ok"] is False and status(lab)["reason"] == "", status(lab)
        api.call("up")
        return join_s(lab, api)

    row(lab, act, fault, "agent killed, API server away")


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


def start_s(lab):
    """From the start of the second node's agent, as after a boot, to the CNI configuration, by which the runtime knows a network."""
    labs.kill_node(lab, "node2")
    labs.start_node(lab, "node2")
    begin = time.monotonic()
    labs.start_agent(lab, "node2")
    labs.wait_agent(lab, "node2")
    took_s = time.monotonic() - begin
    labs.add_pod(lab, "node2", "pod1")
    return took_s


def test_a_node_is_ready_as_soon_among_a_thousand_others(cluster, figure):
    lab, api = cluster  # the last test: the thousand stay
    among_two = start_s(lab)
    keys = {ghost(api, number, "C") for number in range(1000, 2000)}
    labs.wait_until(lambda: keys <= set(wg_peers(lab, "node1")), 60, "1,000 peers")
    among_many = start_s(lab)
    labs.wait_until(lambda: keys <= set(wg_peers(lab, "node2")), 60, "1,000 peers of the node that was booted")
    figure(f"agent: from its start on a node just booted to the CNI configuration {among_two:.1f} s, among 1,000 nodes {among_many:.1f} s")
    assert among_many < 20
