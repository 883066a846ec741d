"""A node after `agent.py uninstall` is what it was before the agent came; and boots, underlays and families in every combination."""

import difflib
import os

import pytest

from deploy import lab as labs
from tests.e2e.conftest import lab_up, node_sh

pytestmark = pytest.mark.root

# Not: empty directories (a runtime watches /etc/cni/net.d), and what forwarding, which stays, adds to the routes.
LOOK = r"""
ip -d -o link | sed 's/ qdisc .*//; s/@.*//; s/^[0-9]*: //'; ip -o address | sed 's/^[0-9]*: //; s/ *valid_lft.*//'
ip route show table all | grep -v anycast; ip rule; ip netns; nft list ruleset
find /etc /opt /run /var ! -type d | grep -v -e mncni-agent -e ^/opt/mncni/ -e ^/var/lib/mncni-lab | sort
ps -eo comm= | grep -v -e ps -e sed -e grep -e find -e sort -e sh | sort
"""
UNINSTALL = f"{labs.PYTHON} /opt/mncni/agent.py uninstall --nodes-dir {labs.STORE}"


@pytest.fixture(scope="module")
def node():
    """A lab with one node that has never had an agent, and what it looks like."""
    lab = labs.Lab(f"mncni-un-{os.getpid()}", verbose=False)
    with labs.built_or_undone(lab, 1, 1, labs.LAB_FILE.parents[1], {"families": ["ipv4", "ipv6"], "underlay": "ipv4"}):
        labs.make_node_dir(lab, "node1")
        labs.start_node(lab, "node1")
        labs.wait_until(lambda: "tentative" not in node_sh(lab, "node1", "ip -6 address show dev eth0"), 20, "address of eth0")
        yield lab, node_sh(lab, "node1", LOOK)
    labs.down(lab)


def changes(lab, before):
    """The lines that are new since then, and those that are gone."""
    return list(difflib.unified_diff(before.splitlines(), node_sh(lab, "node1", LOOK).splitlines(), n=0))[2:]


@pytest.mark.vm
def test_uninstall_refuses_while_an_agent_runs_or_pods_are_attached_then_leaves_the_node_as_it_was(node):
    lab, before = node
    labs.start_agent(lab, "node1")
    labs.wait_agent(lab, "node1")
    labs.add_pod(lab, "node1", "pod1")
    argv = [*labs.node_argv(lab, "node1"), "sh", "-c", UNINSTALL]
    code, _, said = labs.run(argv)
    assert code == 3 and "stop it first" in said
    labs.stop_agent(lab, "node1")
    code, _, said = labs.run(argv)
    assert code == 1 and "1 pods are attached" in said and "--force" in said
    node_sh(lab, "node1", f"ip route get {labs.pod_record(lab, 'node1', 'pod1')['addresses'][0]} | grep mncni0")
    labs.del_pod(lab, "node1", "pod1")
    code, _, said = labs.run(argv)
    assert code == 0 and "net.ipv4.ip_forward" in said
    assert "\n".join(changes(lab, before)) == ""
    assert labs.run(argv)[0] == 0, "a second time there is nothing to do"


def test_uninstall_with_force_takes_the_pods_along(node):
    lab, before = node
    labs.start_agent(lab, "node1")
    labs.wait_agent(lab, "node1")
    labs.add_pod(lab, "node1", "pod1")
    labs.stop_agent(lab, "node1")
    node_sh(lab, "node1", f"{UNINSTALL} --force")
    assert "eth0" not in labs.must([*labs.pod_argv(lab, "node1", "pod1"), "ip", "-brief", "link"])
    node_sh(lab, "node1", f"ip netns delete pod1; rm -r {labs.PODS_DIR}/* /var/lib/cni")  # what the lab's runtime keeps
    assert "\n".join(changes(lab, before)) == ""


@pytest.mark.parametrize("families, underlay", [(("ipv6",), "ipv4"), (("ipv4",), "ipv6"), (("ipv4", "ipv6"), "ipv6")], ids=str)
def test_every_family_of_pods_crosses_every_underlay_and_survives_a_reboot(families, underlay, figure):
    with lab_up(f"mncni-fam-{os.getpid()}", families=families, underlay=underlay) as lab:
        with labs.sniffing(lab) as counts:
            rows = labs.ping_all(lab)
        assert not any(map(labs.is_lost, rows)) and not labs.judge_capture(counts, rows)
        labs.reboot(lab, "node1")
        labs.wait_first_pongs(lab, labs.plan_pairs(lab))
        packets = f"{counts['wireguard']} WireGuard packets, {counts['clear']} clear"
        figure(f"pods {'+'.join(families)} over {underlay}: {len(rows)} pairs, {packets}")
