"""Five nodes of a cluster leave, come back, change keys and ranges at random: every WireGuard device equals a model of it."""

import json
import os
import random

import pytest

from deploy import lab as labs
from tests.e2e.conftest import RECORD, cluster_up, node_sh, wg_peers

pytestmark = pytest.mark.root

NODES, STEPS = 5, 12
SETTLE_S = 60  # far more than it takes: the machine may be busy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with cluster_up(f"mncni-model-{os.getpid()}", tmp_path_factory.mktemp("api"), nodes=NODES, pods=0, families=("ipv4",)) as made:
        yield made


def key_of(api, node):
    """The key in a node's record, "" if it has none."""
    text = api.call("node", node)["metadata"].get("annotations", {}).get(RECORD, "")
    return text and json.loads(text)["key"]


def rekey(lab, api, node):
    """As after a lost disk: a new key. Only its record is to tell the others."""
    before = key_of(api, node)
    labs.stop_agent(lab, node)
    node_sh(lab, node, "rm /var/lib/mncni/key; nsenter --net=/run/netns/mncni-wg ip link delete mncni-wg0")
    labs.start_agent(lab, node)
    labs.wait_until(lambda: key_of(api, node) not in ("", before), SETTLE_S, f"new key of {node}")


def test_after_quiescence_every_device_is_what_the_model_says(cluster, figure):
    lab, api = cluster
    chance = random.Random(1)
    model = {node: f"10.244.{number}.0/24" for number, node in enumerate(lab.nodes(), 1)}  # pod CIDRs of the nodes that are there
    ghosts = {}  # pod CIDRs of those that left, and may come back with others
    for step in range(STEPS):
        node = chance.choice(list(model))
        act = chance.choice(["rekey", "leave", "again"]) if len(model) > 2 else "rekey"
        if ghosts and chance.random() < 0.4:
            back = ghosts.popitem()[0]
            model[back] = f"10.244.{100 + step}.0/24"
            api.call("create_node", back, pod_cidrs=[model[back]], addresses=[labs.endpoint(lab, back)[0]])
        elif act == "rekey":
            rekey(lab, api, node)
        else:  # a Node deleted, and perhaps made again at once, under the same name and with another range
            api.call("delete_node", node)
            ghosts[node] = model.pop(node)
            if act == "again":
                model[node] = f"10.244.{100 + step}.0/24"
                del ghosts[node]
                api.call("create_node", node, pod_cidrs=[model[node]], addresses=[labs.endpoint(lab, node)[0]])

    def settled():
        keys = {node: key_of(api, node) for node in model}
        wanted = {keys[node]: (f"{labs.endpoint(lab, node)[0]}:28384", frozenset([cidr])) for node, cidr in model.items()}
        devices = {node: wg_peers(lab, node) for node in model}
        return all(keys.values()) and all(
            device == {key: peer for key, peer in wanted.items() if key != keys[node]} for node, device in devices.items()
        )

    labs.wait_until(settled, 60 + SETTLE_S, "mesh that equals the model")
    figure(f"agent: {len(model)} of {NODES} nodes after {STEPS} random changes: every device equals the model")
