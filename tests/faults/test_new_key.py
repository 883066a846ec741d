"""What a new key of a node costs traffic between pods: packets, silence, and nothing in clear.

Three nodes. Packets and a TCP connection go from node1's pod to the pods of node2 and node3; the connections survive, whoever changes its
key. Afterwards every node has the others' new keys, and nowhere is anything left of the old ones. tests/e2e/test_kubernetes.py has the rows
of a node store that is an API server, tests/faults/test_crash_agent.py those of an agent that is killed on the way.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from deploy import lab as labs
from tests.e2e.conftest import answers, kept_anywhere, keys_of, lab_up, node_sh, restart_agent, rotate, stream, wait_well, wg_peers

pytestmark = [pytest.mark.root, pytest.mark.alone]

# An emulated machine needs half a second to start a process, and with three agents a minute.
NODES, SILENCE_S = (2, 3) if "MNCNI_VM" in os.environ else (3, 0.3)


@pytest.fixture(scope="module")
def lab():
    with lab_up(f"mncni-new-key-{os.getpid()}", nodes=NODES) as made:
        yield made


def has_followed(lab, node):
    return set(wg_peers(lab, node)) == {keys_of(lab, other)[2] for other in lab.nodes() if other != node}


def check_keys(lab, before, changed):
    """Who has changed its key has one new one, on disk and in its device, and nothing of the old one; the others know it."""
    for node in lab.nodes():
        labs.wait_until(lambda node=node: has_followed(lab, node), 30, f"peers of {node}")
        on_disk, in_device, public = keys_of(lab, node)
        assert on_disk == in_device and (public != before[node][2]) is (node in changed)
        assert not labs.run([*labs.node_argv(lab, node), "ls", "/var/lib/mncni/key.new"])[1]
        for text in before[node][::2] if node in changed else ():
            assert all(kept_anywhere(lab, each, text) == [] for each in lab.nodes())
    assert kept_anywhere(lab, "node1", keys_of(lab, "node1")[0]) == ["/var/lib/mncni/key"]  # a blind look proves nothing


def row(lab, fault, event, act, changed):
    """A row of the table. A busy machine is silent by itself; what the event costs it costs each time."""
    flows = []
    for _ in range(3):
        before = {node: keys_of(lab, node) for node in lab.nodes()}
        flows = stream(lab, act, *sorted(lab.nodes())[1:], rate=500, count=500)
        check_keys(lab, before, changed)
        silence_s = max(flow.silence_s for flow in flows)
        if silence_s <= SILENCE_S:
            break
    lost, sent = sum(flow.lost for flow in flows), sum(flow.sent for flow in flows)
    stall_s = max(flow.stall_s for flow in flows)
    fault(f"{event}: silence {1000 * silence_s:.0f} ms, TCP {1000 * stall_s:.0f} ms", lost, sent, 0, silence_s)
    assert silence_s <= SILENCE_S


def change(lab, *nodes):
    """Give each of the nodes a new key, all at once."""
    with ThreadPoolExecutor() as pool:
        for code, said, error in pool.map(lambda node: rotate(lab, node), nodes):
            assert code == 0 and said.startswith("this node's key is "), error
    time.sleep(1)  # of traffic


ROWS = {
    "new key for the node that receives": [("node2",)],
    "new key for the node that sends": [("node1",)],
    "new key twice in a row": [("node1",), ("node1",)],
    "new keys for two nodes at once": [("node1", "node2")],
    "new keys for all nodes at once": [("node1", "node2", "node3")[:NODES]],
}


@pytest.mark.vm
@pytest.mark.parametrize("event", ROWS)
def test_a_new_key_is_hardly_noticed(lab, fault, event):
    row(lab, fault, event, lambda: [change(lab, *nodes) for nodes in ROWS[event]], {node for nodes in ROWS[event] for node in nodes})


def test_a_key_that_is_too_old_is_changed_by_itself_once(lab, fault):
    restart_agent(lab, "node2", argv=[*labs.plan_agent(lab, "node2"), "--key-max-age", "30d"])
    wait_well(lab, "node2")

    def act():
        before = keys_of(lab, "node2")
        node_sh(lab, "node2", "touch -d '-26 days' /var/lib/mncni/key")
        time.sleep(12)  # longer than an audit, which is when the agent looks
        assert keys_of(lab, "node2") == before
        node_sh(lab, "node2", "touch -d '-31 days' /var/lib/mncni/key")
        labs.wait_until(lambda: keys_of(lab, "node2") != before, 30, "new key")
        time.sleep(1)

    row(lab, fault, "key older than --key-max-age", act, {"node2"})
    key = keys_of(lab, "node2")
    time.sleep(12)
    assert keys_of(lab, "node2") == key
    restart_agent(lab, "node2")
    wait_well(lab, "node2")


def test_an_agent_that_is_killed_after_it_told_the_new_key_uses_it_when_it_starts(lab, fault):
    """The worst moment, as the other nodes follow at once. The store is a directory, so this needs an agent that stands still."""

    def act():
        node_sh(lab, "node2", f"kill -STOP $(cat {labs.AGENT_PID})")
        node_sh(lab, "node2", "umask 077; wg genkey >/var/lib/mncni/key.new")
        key, public = node_sh(lab, "node2", "cat /var/lib/mncni/key.new; wg pubkey </var/lib/mncni/key.new").split()
        record, old = lab.store / "node2.json", keys_of(lab, "node2")[2]
        labs.write_atomically(record, record.read_text().replace(old, public))
        labs.wait_until(lambda: public in wg_peers(lab, "node1"), 20, "peer that follows")
        assert not answers(lab, "node1", "node2")  # the control: it is silent while the one has followed and the other not
        node_sh(lab, "node2", f"kill -KILL $(cat {labs.AGENT_PID})")
        labs.wait_until(lambda: not labs.agent_pid(lab.inside("node2", "/")), 20, "end of the agent")
        labs.start_agent(lab, "node2")
        labs.wait_until(lambda: answers(lab, "node1", "node2"), 30, "answers")
        assert keys_of(lab, "node2") == (key, key, public)

    before = {node: keys_of(lab, node) for node in lab.nodes()}
    flows = stream(lab, act, "node2", "node3", rate=500, count=500)
    check_keys(lab, before, {"node2"})
    fault("agent killed before it used the key that it has told", flows[0].lost, flows[0].sent, 0, flows[0].silence_s)
    assert flows[0].silence_s > 2 * SILENCE_S and flows[1].silence_s <= SILENCE_S  # seen where it is, and only there


def test_a_node_that_hears_of_it_late_follows_then_and_believes_the_node_all_the_time(lab, fault):
    """Its agent stands still. What it sends to the former key still arrives, what comes back waits."""
    healed_s = []

    def act():
        node_sh(lab, "node1", f"kill -STOP $(cat {labs.AGENT_PID})")
        try:
            assert rotate(lab, "node2")[0] == 0
            assert not answers(lab, "node1", "node2")  # the control
        finally:
            node_sh(lab, "node1", f"kill -CONT $(cat {labs.AGENT_PID})")
        begin = time.monotonic()
        labs.wait_until(lambda: answers(lab, "node1", "node2"), 30, "answers")
        healed_s.append(time.monotonic() - begin)

    before = {node: keys_of(lab, node) for node in lab.nodes()}
    [flow] = stream(lab, act, rate=500, count=500)
    check_keys(lab, before, {"node2"})
    fault("new key, of which another agent hears 2 s later", flow.lost, flow.sent, 0, healed_s[0])
    assert healed_s[0] < 10
    said = lab.inside("node1", labs.AGENT_LOG).read_text() + node_sh(lab, "node1", "/opt/mncni/agent.py status || true")
    assert "quarantined" not in said
    assert "setBack" not in (lab.store / "node1.json").read_text() + (lab.store / "node2.json").read_text()


def test_a_command_without_an_agent_says_so_and_changes_nothing(lab):
    before = keys_of(lab, "node3")
    labs.stop_agent(lab, "node3")
    code, said, error = rotate(lab, "node3")
    assert (code, said) == (1, "") and "no agent runs on this node" in error
    labs.start_agent(lab, "node3")
    wait_well(lab, "node3")
    assert keys_of(lab, "node3") == before and node_sh(lab, "node3", "ls /var/lib/mncni").split() == ["key", "nodes.json"]
