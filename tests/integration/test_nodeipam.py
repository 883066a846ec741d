"""nodeipam.py as it runs in a cluster: a process of its own, or several, against an API server with faults."""

import ipaddress
import re
import signal
import subprocess
import sys
import time

import pytest

import kube
import nodeipam
from tests.apiserver import ApiServer

USER = "system:serviceaccount:kube-system:mncni-nodeipam"
RIGHTS = [  # all that it needs; docs/agent.md says the same
    *((USER, verb, "nodes") for verb in ("list", "watch", "patch")),
    (USER, "create", "events"),
    *((USER, verb, "leases") for verb in ("get", "update")),
]
LEASE = ("leases", "mncni-nodeipam", "kube-system")
CIDR = "10.244.0.0/16"


@pytest.fixture
def server():
    with ApiServer() as server:
        server.rbac = RIGHTS
        server.put("leases", {"metadata": {"name": LEASE[1], "namespace": LEASE[2]}})
        yield server


class Allocator:
    """A running nodeipam.py. text(): what it has logged so far."""

    def __init__(self, directory, number, server, *flags):
        config = server.kubeconfig(directory / f"kubeconfig{number}", USER)
        self.log = directory / f"log{number}"
        argv = [sys.executable, "-I", nodeipam.__file__, "--kubeconfig", str(config), *flags]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(argv, stderr=log, env={"PATH": "/usr/bin:/bin"})

    def text(self):
        return self.log.read_text()

    def leads(self):
        return re.findall("leading, by the lease|leads", self.text())[-1:] == ["leading, by the lease"]

    def stop(self):
        """The exit code after SIGTERM."""
        self.process.terminate()
        return self.process.wait(10)


@pytest.fixture
def start(server, tmp_path):
    """start(*flags) -> Allocator; flags replace the cluster CIDR."""
    started = []

    def start(*flags):
        started.append(Allocator(tmp_path, len(started), server, *(flags or ("--cluster-cidr", CIDR))))
        return started[-1]

    yield start
    for each in started:
        each.process.send_signal(signal.SIGCONT)
        each.process.kill()
        each.process.wait()
        assert "Traceback" not in each.text(), each.text()


def wait(condition, timeout_s=20):
    """Wait until condition() is true; its value."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)
    return condition()


def ranges(server):
    """{node: its pod CIDRs} of the nodes that have some. AssertionError if any two overlap."""
    found = {node["metadata"]["name"]: node["spec"].get("podCIDRs", []) for node in server.nodes()}
    found = {name: cidrs for name, cidrs in sorted(found.items()) if cidrs}
    spans = sorted(kube.span_of(ipaddress.ip_network(cidr)) for cidrs in found.values() for cidr in cidrs)
    assert all(one[0] != two[0] or one[2] < two[1] for one, two in zip(spans, spans[1:])), f"two nodes share a range: {found}"
    return found


def all_have(server, count):
    return lambda: len(ranges(server)) == count == len(server.nodes())


def messages(server):
    return {(event["involvedObject"]["name"], event["reason"]): event["message"] for event in objects(server, "events")}


def objects(server, resource):
    with server.store.lock:
        return [entry.object() for entry in server.store.entries.get(resource, {}).values()]


def test_nodes_get_the_lowest_ranges_of_both_families_with_no_more_rights_than_documented(server, start):
    server.create_node("n1")
    server.create_node("n2")
    allocator = start("--cluster-cidr", CIDR, "--cluster-cidr", "fd00:10::/48", "--node-mask-v4", "25")
    wait(all_have(server, 2))
    server.create_node("n3")
    wait(all_have(server, 3))
    assert ranges(server) == {
        "n1": ["10.244.0.0/25", "fd00:10::/64"],
        "n2": ["10.244.0.128/25", "fd00:10:0:1::/64"],
        "n3": ["10.244.1.0/25", "fd00:10:0:2::/64"],
    }
    assert server.node("n1")["spec"]["podCIDR"] == "10.244.0.0/25"
    assert allocator.stop() == 0
    lease = server.get(*LEASE)
    assert lease["spec"]["holderIdentity"] == ""
    assert lease["metadata"]["annotations"]["mncni.dev/used"].startswith("10.244.1.127,fd00:10:0:2:")
    assert server.count(code=403) == 0 and server.count("patch", "nodes") == 3


def test_a_write_that_comes_after_another_change_of_its_object_is_refused_and_made_anew(server, start):
    allocator = start()
    wait(lambda: server.watches(USER))
    slow = server.fault("slow", verb="patch", resource="nodes", delay_s=1)
    server.create_node("n1")
    slow.wait()
    server.patch_node("n1", {"metadata": {"labels": {"x": "y"}}})
    wait(all_have(server, 1))
    assert server.count("patch", "nodes", code=409) == 1
    slow = server.fault("slow", verb="update", resource="leases", delay_s=1)
    slow.wait()
    lease = server.get(*LEASE)
    server.put("leases", {**lease, "metadata": {**lease["metadata"], "labels": {"x": "y"}}})
    wait(lambda: server.count("update", "leases", code=409) == 1)
    server.create_node("n2")
    wait(all_have(server, 2))
    assert allocator.leads() and server.get(*LEASE)["metadata"]["labels"] == {"x": "y"}


def test_200_nodes_at_once_get_ranges_of_their_own(server, start, figure):
    start()
    wait(lambda: server.watches(USER))
    before = time.monotonic()
    for number in range(200):
        server.create_node(f"n{number}")
    wait(all_have(server, 200))
    figure(f"nodeipam: 200 new nodes had their pod CIDRs after {time.monotonic() - before:.1f} s")
    assert {cidr for cidrs in ranges(server).values() for cidr in cidrs} == {f"10.244.{number}.0/24" for number in range(200)}
    assert server.count("update", "leases") < 30


def test_nodes_that_change_all_the_time_get_theirs_all_the_same(server, start):
    start()
    wait(lambda: server.watches(USER))
    for number in range(10):
        server.create_node(f"n{number}")
    deadline = time.monotonic() + 20
    while len(ranges(server)) < 10:
        assert time.monotonic() < deadline
        for number in range(10):
            server.patch_node(f"n{number}", {"metadata": {"labels": {"beat": str(time.monotonic())}}})
        time.sleep(0.02)


FAULTS = (
    *(("status", {"code": code}) for code in (401, 403, 500, 503)),
    ("status", {"code": 429, "retry_after": 1}),
    *((kind, {}) for kind in ("reset", "close", "truncate", "bad_json", "hang")),
)


def test_faults_of_writes_cost_time_and_never_a_range(server, start):
    """Each write to a Node or the Lease, one after another, meets another fault; some of them have been done all the same."""
    start()
    wait(lambda: server.watches(USER))
    faults = [server.fault(kind, verb="patch", resource="nodes", **parameters) for kind, parameters in FAULTS]
    faults += [server.fault(kind, verb="update", resource="leases", **parameters) for kind, parameters in FAULTS[3:]]
    for number in range(6):
        server.create_node(f"n{number}")
    wait(lambda: all(fault.used for fault in faults) and all_have(server, 6)(), 120)
    server.create_node("n6")
    wait(all_have(server, 7))
    assert len({cidr for cidrs in ranges(server).values() for cidr in cidrs}) == 7


@pytest.mark.parametrize("kind", ["cut", "bad_event", "wrong_event", "error_event", "duplicate", "reorder", "stall", "compacted", "closed"])
def test_a_watch_that_breaks_is_taken_up_again(server, start, kind):
    start()
    wait(lambda: server.watches(USER))
    if kind == "compacted":
        server.bump()
        server.compact()
        server.close_watches(abrupt=True)
    elif kind == "closed":
        server.close_watches()
    elif kind == "error_event":
        server.send_error(410)
    else:
        fault = server.fault(kind, verb="watch", resource="nodes")
    for number in range(3):
        server.create_node(f"n{number}")
        time.sleep(0.1)
    if kind == "stall":  # seen as dead after a silence of 90 s; here the stream ends before that
        fault.wait(1)
        fault.cancel()
    wait(all_have(server, 3))


def test_a_list_that_fails_is_tried_again(server, start):
    server.create_node("n1")
    for kind, parameters in (("status", {"code": 500}), ("truncate", {}), ("bad_json", {}), ("wrong_kind", {"kind": "PodList"})):
        server.fault(kind, verb="list", resource="nodes", **parameters)
    start()
    wait(all_have(server, 1))


@pytest.mark.parametrize("verb, resource", [("list", "nodes"), ("patch", "nodes"), ("get", "leases"), ("update", "leases")])
def test_a_missing_right_is_named(server, start, verb, resource):
    server.rbac = [right for right in RIGHTS if right[1:] != (verb, resource)]
    server.create_node("n1")
    allocator = start()
    wait(lambda: f'cannot {verb} resource "{resource}"' in allocator.text())
    server.rbac = RIGHTS
    wait(all_have(server, 1))


def test_without_the_right_to_events_all_else_works_and_the_log_says_so(server, start):
    server.rbac = [right for right in RIGHTS if right[2] != "events"]
    for name in ("n1", "n2"):
        server.create_node(name)
    allocator = start("--cluster-cidr", "10.244.0.0/24")
    wait(lambda: 'cannot create resource "events"' in allocator.text())
    wait(lambda: ranges(server) == {"n1": ["10.244.0.0/24"]})


def test_a_server_that_was_away_is_served_within_five_seconds_of_its_return(server, start, figure):
    start()
    wait(lambda: server.watches(USER))
    server.down()
    time.sleep(nodeipam.RENEW_S + 1)  # long enough to lose the right to write
    server.create_node("n1")
    server.up()
    before = time.monotonic()
    wait(all_have(server, 1))
    figure(f"nodeipam: an API server back after {nodeipam.RENEW_S + 1} s was served after {time.monotonic() - before:.1f} s")
    assert time.monotonic() - before < 10


def test_a_full_range_is_told_on_the_node_and_a_second_cluster_cidr_heals_it(server, start):
    for number in range(3):
        server.create_node(f"n{number}")
    allocator = start("--cluster-cidr", "10.244.0.0/23")
    wait(lambda: messages(server) and list(ranges(server)) == ["n0", "n1"])  # the message comes first, then the ranges one by one
    assert messages(server).keys() == {("n2", "CIDRNotAvailable")}
    assert "no range /24 is free in --cluster-cidr 10.244.0.0/23" in messages(server)["n2", "CIDRNotAvailable"]
    assert allocator.process.poll() is None and allocator.stop() == 0
    start("--cluster-cidr", "10.244.0.0/23", "--cluster-cidr", "10.250.0.0/24")
    wait(all_have(server, 3))
    assert ranges(server)["n2"] == ["10.250.0.0/24"]


def test_what_another_hand_sets_is_taken_and_what_collides_is_told_at_its_node_alone(server, start, tmp_path):
    allocator = start()
    wait(lambda: server.watches(USER))
    server.create_node("n1")
    wait(all_have(server, 1))
    server.rbac = None
    rival = kube.open_api(server.kubeconfig(tmp_path / "rival", "system:serviceaccount:kube-system:node-controller"), {}, None)
    for name, cidr in (("n2", "10.244.1.0/24"), ("n3", "10.244.0.0/24")):
        node = {"metadata": {"name": name}, "spec": {"podCIDR": cidr, "podCIDRs": [cidr]}}
        rival.request("POST", "/api/v1/nodes", node, {"fieldManager": "kube-controller-manager"})
    wait(lambda: ("n3", "ForeignPodCIDR") in messages(server))
    server.create_node("n4")
    wait(lambda: server.node("n4")["spec"].get("podCIDRs"))
    assert "overlaps that of node n1" in messages(server)["n3", "ForeignPodCIDR"] and len(messages(server)) == 1
    server.delete_node("n3")
    assert ranges(server) == {"n1": ["10.244.0.0/24"], "n2": ["10.244.1.0/24"], "n4": ["10.244.2.0/24"]}
    assert allocator.process.poll() is None


def test_a_standby_takes_over_from_a_leader_that_stops_and_from_one_that_is_killed(server, start, figure):
    first = start()
    wait(first.leads)
    second, third = start(), start()
    server.create_node("n1")
    wait(all_have(server, 1))
    assert first.stop() == 0
    before = time.monotonic()
    leader = wait(lambda: next((each for each in (second, third) if each.leads()), None))
    figure(f"nodeipam: a standby led {time.monotonic() - before:.1f} s after the leader was told to stop")
    leader.process.kill()
    before = time.monotonic()
    other = third if leader is second else second
    wait(other.leads, 30)
    figure(f"nodeipam: a standby led {time.monotonic() - before:.1f} s after the leader was killed")
    server.create_node("n2")
    wait(all_have(server, 2))
    assert ranges(server) == {"n1": ["10.244.0.0/24"], "n2": ["10.244.1.0/24"]}


def test_a_leader_stopped_in_the_middle_of_its_writes_writes_nothing_when_it_wakes_up(server, start):
    first = start()
    wait(first.leads)
    second = start()
    wait(lambda: "leads" in second.text())
    wait(lambda: server.watches(USER))
    slow = server.fault("slow", times=None, verb="patch", resource="nodes", delay_s=0.2)
    for number in range(30):
        server.create_node(f"n{number}")
    slow.wait(5)
    first.process.send_signal(signal.SIGSTOP)
    slow.cancel()
    wait(second.leads, 30)
    wait(all_have(server, 30))
    for number in range(30, 40):
        server.create_node(f"n{number}")
    server.delete_node("n3")
    wait(all_have(server, 39))
    before = server.count("patch", "nodes")
    first.process.send_signal(signal.SIGCONT)
    wait(lambda: "leads" in first.text().splitlines()[-1] and not first.leads())
    server.create_node("n40")
    wait(all_have(server, 40))
    assert server.count("patch", "nodes") <= before + 2  # n40's, and one that the first had already sent
    assert len({cidr for cidrs in ranges(server).values() for cidr in cidrs}) == 40


def test_it_starts_without_a_server_and_stops_when_told(server, start):
    server.down()
    server.create_node("n1")
    allocator = start()
    wait(lambda: "cannot get or keep the lease" in allocator.text())
    assert "written again" not in allocator.text()
    server.up()
    wait(all_have(server, 1))
    wait(lambda: "can be read and written again" in allocator.text())
    server.down()
    assert allocator.stop() == 0
