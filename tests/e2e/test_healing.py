"""What a steady stream between pods of two nodes notices: of damage, that heals; of the agent's own comings and goings, nothing.

Each row of the printed table is one event under a stream of packets and a TCP connection, with every frame of the underlay looked at.
"""

import json
import os

import pytest

from deploy import lab as labs
from tests.e2e.conftest import answers, lab_up, node_sh, restart_agent, stream, things, wait_well

pytestmark = pytest.mark.root

HEAL_S = 4.0  # twice the promise: the machine may be busy
INSIDE = "nsenter --net=/run/netns/mncni-wg"
VETHS = "$(ip -o link show type veth | sed -n 's/.*: \\(mn[0-9a-f]*\\)@.*/\\1/p')"
DAMAGES = {
    "veth pair deleted": "ip link delete mncni-host",
    "bridge deleted": "ip link delete mncni0",
    "bridge down": "ip link set mncni0 down",
    "namespace deleted": "ip netns delete mncni-wg",
    "device deleted": f"{INSIDE} ip link delete mncni-wg0",
    "device down": f"{INSIDE} ip link set mncni-wg0 down",
    "device's process killed": "pkill -KILL -x wireguard-go",  # of this node alone: it has PIDs of its own
    "device's port changed": f"{INSIDE} wg set mncni-wg0 listen-port 12345",
    "peer removed": f"{INSIDE} wg set mncni-wg0 peer $({INSIDE} wg show mncni-wg0 peers) remove",
    "host's routes flushed": "ip route flush proto 201; ip -6 route flush proto 201",
    "floor's rules flushed": "ip rule flush proto 201; ip -6 rule flush proto 201",
    "tunnel's routes flushed": f"{INSIDE} ip route flush table main; {INSIDE} ip -6 route flush proto 201",
    "tunnel's addresses flushed": f"{INSIDE} ip address flush dev mncni-ns",
    "gateway addresses flushed": "ip address flush dev mncni0; ip address flush dev mncni-host",
    "host's nft flushed": "nft flush ruleset",
    "tunnel's nft flushed": f"{INSIDE} nft flush ruleset",
    "host forwards no more": "echo 0 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv6/conf/all/forwarding",
    "tunnel forwards no more": f"{INSIDE} sh -c 'echo 0 > /proc/sys/net/ipv4/ip_forward'",
    "pods taken off the bridge": f"for veth in {VETHS}; do ip link set $veth nomaster; done",
}


@pytest.fixture(scope="module")
def lab():
    with lab_up(f"mncni-heal-{os.getpid()}") as made:
        yield made


@pytest.mark.parametrize("event", DAMAGES)
def test_damage_heals_within_seconds_and_nothing_goes_in_clear(lab, event, fault):
    before = things(lab, "node1")

    def act():
        node_sh(lab, "node1", DAMAGES[event])
        labs.wait_until(lambda: before <= things(lab, "node1"), 20, "node that has again what it had")
        labs.wait_until(lambda: answers(lab, "node1", "node2"), 20, "answer over both families")

    for _ in range(3):  # a busy machine is slow by itself; what the event costs it costs each time
        [flow] = stream(lab, act, count=2_000)
        if flow.silence_s < HEAL_S:
            break
    fault(event, flow.lost, flow.sent, 0, flow.silence_s, len(things(lab, "node1") - before))
    assert flow.silence_s < HEAL_S, "it took too long, or never healed"
    said = {"bridge deleted": "repaired: the bridge mncni0 was gone", "namespace deleted": "repaired: the namespace mncni-wg was gone"}
    assert said.get(event, "") in agent_log(lab)


def restart(lab, sign):
    restart_agent(lab, sign=sign)
    wait_well(lab)


def upgrade(lab):
    """Other files under the same names, then a new agent, as a DaemonSet's roll-out does."""
    node_sh(lab, "node1", "for f in agent mncni; do sed -i '$a# another version' /opt/mncni/$f.py; done")
    restart(lab, "TERM")
    installed = lab.inside("node1", "/opt/cni/bin/mncni.py")
    labs.wait_until(lambda: installed.read_text().endswith("# another version\n"), 20, "new plugin")


def lose_store(lab):
    """Every record gone at once, then back."""
    kept = {path: path.read_text() for path in lab.store.glob("*.json")}
    for path in kept:
        path.unlink()
    labs.wait_until(lambda: "lost this node's record" in agent_log(lab), 10, "doubt about the store")
    for path, text in kept.items():
        path.write_text(text)
    wait_well(lab)


def agent_log(lab):
    return lab.inside("node1", labs.AGENT_LOG).read_text()


def ghost(lab, number, key, cidrs=None):
    """The text of a record that looks like node2's: a younger node with endpoint 192.0.2.<number>, its own key, and the pod CIDRs of
    <number> if no others are given."""
    record = json.loads((lab.store / "node2.json").read_text())
    record["key"] = key * 4 + record["key"][4:]
    record["podCIDRs"] = cidrs or [f"10.244.{number}.0/24", f"fd00:10:244:{number}::/64"]
    return json.dumps({**record, "endpoints": [f"192.0.2.{number}"], "uid": f"ghost-{key}", "created": "2999-01-01T00:00:00Z"})


def write_record(lab, name, text):
    """As an agent does it: whole, by rename."""
    path = lab.store / f".{name}"
    path.write_text(text)
    path.rename(lab.store / f"{name}.json")


def strangers(lab):
    """A node that joins and leaves, and records that nobody should believe."""
    honest = ghost(lab, 9, "A")
    lies = {"thief": ghost(lab, 8, "B", ["10.244.2.0/24"]), "greedy": ghost(lab, 7, "C", ["0.0.0.0/0"]), "half": honest[:40], "empty": ""}
    for name, text in {"n9": honest, **lies, "huge": "x" * 1_000_000, "lines": honest.replace("ghost", "\n[Peer]\n")}.items():
        write_record(lab, name, text)
    labs.wait_until(lambda: "node n9 joined" in agent_log(lab) and "node thief: quarantined" in agent_log(lab), 10, "verdict on new nodes")
    for name in ("n9", *lies, "huge", "lines"):
        (lab.store / f"{name}.json").unlink()
    labs.wait_until(lambda: "node n9 left" in agent_log(lab), 10, "end of the new node")


QUIET = {
    "agent stopped by SIGTERM, new agent": lambda lab: restart(lab, "TERM"),
    "agent killed, new agent": lambda lab: restart(lab, "KILL"),
    "agent upgraded": upgrade,
    "node store lost and found": lose_store,
    "nodes joining, leaving, lying": strangers,
}


@pytest.mark.parametrize("event", QUIET)
def test_the_agents_own_comings_and_goings_lose_no_packet(lab, event, fault):
    daemon, before = node_sh(lab, "node1", "pgrep -x wireguard-go || true"), things(lab, "node1")
    for _ in range(3):  # a busy machine loses packets by itself; what the event costs it costs each time
        [flow] = stream(lab, lambda: QUIET[event](lab), rate=1_000, count=1_000)
        if not flow.lost:
            break
    fault(event, flow.lost, flow.sent, 0, leaks=len(things(lab, "node1") - before))
    assert flow.lost == 0
    assert node_sh(lab, "node1", "pgrep -x wireguard-go || true") == daemon, "the one that ran is to be adopted"


@pytest.mark.vm
def test_a_node_that_comes_back_with_another_key_is_followed(lab):
    def key():
        return (lab.store / "node2.json").read_text().partition('"key":"')[2][:44]

    before = key()
    labs.stop_agent(lab, "node2")
    node_sh(lab, "node2", f"rm /var/lib/mncni/key; {INSIDE} ip link delete mncni-wg0")
    labs.start_agent(lab, "node2")
    labs.wait_until(lambda: key() != before, 20, "new key in the record")
    for node in ("node1", "node2"):
        argv = [*labs.pod_argv(lab, node, "pod1"), "ping", "-n", "-c1", "-W1"]
        other = labs.pod_record(lab, {"node1": "node2", "node2": "node1"}[node], "pod1")["addresses"][0]
        labs.wait_until(lambda argv=argv, other=other: labs.run([*argv, other])[0] == 0, 20, f"ping from {node}")
    assert before not in node_sh(lab, "node1", f"{INSIDE} wg show mncni-wg0 peers")


@pytest.mark.vm
def test_nodes_that_exchange_addresses_and_ranges_are_followed(lab):
    """Two nodes of records alone: node1's WireGuard has to end up with what they say, whoever had it before."""

    def peers():
        lines = node_sh(lab, "node1", f"{INSIDE} wg show mncni-wg0 dump").splitlines()[1:]
        return {line.split("\t")[0][:4]: tuple(line.split("\t")[2:4]) for line in lines}

    def follows(numbers):
        cidrs = {number: f"10.244.{number}.0/24,fd00:10:244:{number}::/64" for number in numbers.values()}
        wanted = {key * 4: (f"192.0.2.{number}:28384", cidrs[number]) for key, number in numbers.items()}
        return wanted.items() <= peers().items()

    for numbers in ({"A": 8, "B": 9}, {"A": 9, "B": 8}):
        for key, number in numbers.items():
            write_record(lab, f"ghost{key}", ghost(lab, number, key))
        labs.wait_until(lambda numbers=numbers: follows(numbers), 20, "peers as the records say")
    for key in "AB":
        (lab.store / f"ghost{key}.json").unlink()
    labs.wait_until(lambda: not {"AAAA", "BBBB"} & set(peers()), 20, "end of the peers")
