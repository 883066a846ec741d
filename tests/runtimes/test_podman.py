"""podman with its CNI backend: it keeps a container's ID when it starts again, and asks for addresses."""

import pytest

from deploy import lab as labs
from tests.runtimes.runtimes import HELLO

pytestmark = pytest.mark.root


def test_a_container_that_restarts_under_its_id_is_attached_anew_and_leaves_nothing(podman):
    before = podman.node.look()
    pod, other = podman.start("one"), podman.start("other")
    old = pod.addresses()
    podman.node.run(["podman", "restart", "--time", "0", "one"])
    podman.refresh(pod)
    assert pod.container_id == podman.inspect("one")["Id"]
    assert len(pod.addresses()) == 2 and not set(old) & set(pod.addresses())
    assert other.get(pod.addresses()[0]) == HELLO
    pod.remove()
    other.remove()
    assert podman.node.changes_since(before) == []


def test_a_requested_address_and_mac_are_given_and_a_taken_address_is_refused(podman):
    before = podman.node.look()
    pod = podman.start("one", "--ip", "10.244.2.77", "--mac-address", "0a:58:0a:f4:02:4d")
    assert pod.links()["eth0"]["address"] == "0a:58:0a:f4:02:4d"
    assert pod.addresses()[0] == "10.244.2.77"
    with pytest.raises(labs.LabError, match=r"10\.244\.2\.77"):
        podman.start("other", "--ip", "10.244.2.77")
    pod.remove()
    assert podman.node.changes_since(before) == []


def test_a_reload_of_the_network_gives_a_running_container_the_same_addresses_and_host_ports_again(podman):
    """podman then calls DEL and ADD for the same namespace, and asks for the addresses and the MAC that were."""
    before = podman.node.look()
    pod, other = podman.start("one", "-p", "30080:8080"), podman.start("other")
    old = pod.links()["eth0"]
    podman.node.run(["nft", "delete", "table", "inet", "mncni_portmap"])
    podman.node.run(["podman", "network", "reload", "one"])
    new = pod.links()["eth0"]
    assert new["ifindex"] != old["ifindex"] and new["address"] == old["address"]
    assert {info["local"] for info in new["addr_info"]} == {info["local"] for info in old["addr_info"]}
    assert other.get(pod.addresses()[0]) == HELLO
    assert other.get("192.0.2.2", 30080) == HELLO
    pod.remove()
    other.remove()
    assert podman.node.changes_since(before) == []
