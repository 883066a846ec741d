"""Endpoints of peers that are not those of the records: what WireGuard learnt stays while it works; what somebody set does not."""

import os
import time

import pytest

from deploy import lab as labs
from tests.e2e.conftest import answers, lab_up, node_sh, wg_peers

pytestmark = pytest.mark.root

HEAL_S = 5  # more than twice the promise: the machine may be busy
INSIDE = "nsenter --net=/run/netns/mncni-wg"
ADDRESS = {"node1": "192.0.2.1", "node2": "192.0.2.2"}
NAT = """
table ip nat_of_the_test {
  chain out { type filter hook postrouting priority 300; udp sport 28384 udp sport set 40000; }
  chain in { type filter hook prerouting priority -310; udp dport 40000 udp dport set 28384; }
}
"""


@pytest.fixture(scope="module")
def lab():
    with lab_up(f"mncni-ends-{os.getpid()}", families=("ipv4",)) as made:
        yield made


def endpoint(lab, node):
    """The endpoint of a node's only peer."""
    [(found, _)] = wg_peers(lab, node).values()
    return found


def set_endpoint(lab, node, text):
    node_sh(lab, node, f"{INSIDE} wg set mncni-wg0 peer $({INSIDE} wg show mncni-wg0 peers) endpoint {text}")


def wait_for(is_so, what):
    begin = time.monotonic()
    labs.wait_until(is_so, 20, what)
    return time.monotonic() - begin


def test_wrong_endpoints_on_both_sides_that_somebody_set_are_put_right_within_seconds(lab, fault):
    time.sleep(4)  # a glance at how it was
    for node, other in (("node1", "node2"), ("node2", "node1")):
        set_endpoint(lab, node, f"{ADDRESS[other]}:9")
    heal_s = wait_for(lambda: answers(lab, "node1", "node2"), "answer")
    fault("wrong endpoints on both sides", heal_s=heal_s)
    assert heal_s < HEAL_S
    assert (endpoint(lab, "node1"), endpoint(lab, "node2")) == ("192.0.2.2:28384", "192.0.2.1:28384")


def test_an_endpoint_that_was_learnt_and_works_stays(lab):
    """node2 gets a NAT: its packets come from another port. With the NAT gone, its own port is learnt again."""
    node_sh(lab, "node2", f"echo '{NAT}' | nft -f -")
    labs.wait_until(lambda: answers(lab, "node2", "node1") and endpoint(lab, "node1") == "192.0.2.2:40000", 60, "another port")
    for _ in range(8):
        assert answers(lab, "node1", "node2") and endpoint(lab, "node1") == "192.0.2.2:40000"
        time.sleep(1)
    node_sh(lab, "node2", "nft delete table ip nat_of_the_test")
