"""What every runtime asks of a network: addresses, pods that reach each other, and nothing left of them."""

import pytest

from tests.runtimes.runtimes import HELLO

pytestmark = pytest.mark.root


def test_pods_get_an_address_of_each_family_and_reach_each_other(runtime):
    one, other = runtime.start("one"), runtime.start("other")
    assert [len(pod.addresses()) for pod in (one, other)] == [2, 2]
    assert not set(one.addresses()) & set(other.addresses())
    for address in other.addresses():
        assert one.get(address) == HELLO
    for address in one.addresses():
        assert other.get(address) == HELLO


def test_a_removed_pod_leaves_nothing(runtime):
    before = runtime.node.look()
    pods = [runtime.start("one"), runtime.start("other")]
    assert runtime.node.look().count('"ifalias":"mncni:') == before.count('"ifalias":"mncni:') + 2
    for pod in pods:
        pod.remove()
    assert runtime.node.changes_since(before) == []


def test_pods_of_different_runtimes_on_different_nodes_reach_each_other(cri, podman):
    one, other = cri.start("one"), podman.start("other")
    for address in other.addresses():
        assert one.get(address) == HELLO
    for address in one.addresses():
        assert other.get(address) == HELLO
