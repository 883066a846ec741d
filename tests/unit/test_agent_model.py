"""Nodes join, leave, change keys and addresses at random: what every node's agent makes of it equals a model of ten lines.

The events go through the Kubernetes store, as a watch would bring them, and through the directory store; no server, no kernel.
"""

import json
import random

import pytest

import agent
from tests.unit.agent_data import V4, FakeWireGuard, key_of, make_settings

NODES = 50  # no more than 50 at a time, of as many names
STEPS = 200


class Model:
    """{number of a node: {"key", "endpoint", "cidr", "uid"}} of the nodes that are there."""

    def __init__(self, seed):
        self.random, self.nodes, self.version = random.Random(seed), {}, 0

    def fresh(self):
        self.version += 1
        return self.version

    def step(self):
        """One change: the number of the node, and whether it is still there."""
        number = self.random.randrange(1, NODES + 1)
        change = self.random.choice(["leave", "key", "endpoint", "again"])
        if number not in self.nodes or change == "again":
            self.nodes[number] = {"key": self.fresh(), "endpoint": self.free("endpoint"), "cidr": self.free("cidr"), "uid": self.fresh()}
        elif change == "leave":
            del self.nodes[number]
        else:
            self.nodes[number][change] = self.fresh() if change == "key" else self.free(change)
        return number, number in self.nodes

    def free(self, what):
        """A number that no other node uses, but one may have used a moment ago."""
        return self.random.choice(sorted(set(range(1, 2 * NODES)) - {node[what] for node in self.nodes.values()}))

    def record(self, number):
        node = self.nodes[number]
        return {
            "v": 2,
            "podCIDRs": [f"10.244.{node['cidr']}.0/24"],
            "uid": str(node["uid"]),
            "endpoints": [f"192.0.2.{node['endpoint']}"],
            "key": key_of(node["key"]),
            "port": 28384,
            "gen": 1,
            "created": "2024-01-01T00:00:00Z",
        }

    def peers(self, without=None):
        """What WireGuard is to have: {key: (endpoint, allowed IPs)}."""
        records = [self.record(number) for number in self.nodes if number != without]
        return {row["key"]: (f"{row['endpoints'][0]}:28384", row["podCIDRs"][0]) for row in records}


class DirectoryFeed:
    def __init__(self, path):
        self.path, self.store = path, agent.DirectoryStore(str(path))

    def tell(self, model, number, there):
        file = self.path / f"n{number}.json"
        if there:
            file.write_text(json.dumps(model.record(number)))
        else:
            file.unlink()


class WatchFeed:
    """Events as a watch brings them, some twice, some with no news."""

    def __init__(self, path):
        self.store = agent.KubernetesStore(None, "self")
        self.store.guard, self.store.nodes = True, {}
        self.store.identity = lambda: None  # the agent itself stays as the operator set it up
        self.store.publish = lambda name, text: self.event("MODIFIED", "self", "uid", text)

    def event(self, kind, name, uid, text):
        metadata = {"name": name, "uid": uid, "annotations": {agent.RECORD: text}, "creationTimestamp": "2024-01-01T00:00:00Z"}
        self.store._take_nodes(kind, [self.store._parse_node({"metadata": {**metadata, "resourceVersion": "1"}})])

    def tell(self, model, number, there):
        for _ in range(model.random.choice([1, 1, 2])):
            if there:
                self.event("MODIFIED", f"n{number}", str(model.nodes[number]["uid"]), json.dumps(model.record(number)))
            else:
                self.event("DELETED", f"n{number}", "", "")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make_feed", [DirectoryFeed, WatchFeed])
def test_the_device_of_an_agent_equals_the_model_after_every_few_changes(make_feed, seed, tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "FLOOR", (agent.ensure_endpoints,))
    monkeypatch.setattr(agent, "STAGES", (agent.ensure_mtu, agent.ensure_identity))
    dirs = {name: str(tmp_path / name) for name in ("nodes_dir", "conf_dir", "bin_dir", "state_dir", "run_dir")}
    (tmp_path / "nodes_dir").mkdir()
    now, device, model, feed = [1000.0], FakeWireGuard(), Model(seed), make_feed(tmp_path / "nodes_dir")
    agents = agent.Agent(make_settings([4], mtu=1400, **dirs), feed.store, device, clock=lambda: now[0])
    for step in range(STEPS):
        feed.tell(model, *model.step())
        if step % 3 == 0:
            assert agents.tick(), agents.reason
    now[0] += agent.HOLD_S + 1  # should so many have left at once that they were doubted
    agents.tick()
    there = {key: (peer["endpoint"], peer["allowed-ips"]) for key, peer in device.peers.items()}
    assert there == model.peers() and agents.quarantine == {} and len(there) > 10


@pytest.mark.parametrize("seed", range(3))
def test_fifty_agents_come_to_the_same_mesh(seed):
    model, nodes = Model(seed), {}
    rosters = {number: agent.Roster(make_settings([4], node_name=f"n{number}", pod_cidrs=())) for number in range(1, NODES + 1)}
    for step in range(STEPS):
        model.step()
        if step % 40 and step != STEPS - 1:
            continue
        records = {f"n{number}": json.dumps(model.record(number)) for number in model.nodes}
        for number in model.nodes:
            nodes, quarantine = rosters[number].judge(records, key_of(model.nodes[number]["key"]), (V4,))
            peers = agent.desired_peers(nodes, (V4,))
            assert {key: (peer["endpoint"], *peer["allowed_ips"]) for key, peer in peers.items()} == model.peers(without=number)
            assert quarantine == {}
    assert nodes
