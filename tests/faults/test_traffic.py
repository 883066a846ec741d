"""What pods' traffic goes through when something happens to a node, its disk, its clock, its neighbours or the wire between them.

Three nodes. Packets and a TCP connection go from node1's pod to node2's, and to node3's where node3 is the one that suffers; whatever
happens, nothing goes in clear, and the connection survives. tests/e2e/test_healing.py and tests/e2e/test_kubernetes.py have the rows of
what somebody deletes, and of the API server. Some faults are shorter here than they may be: each says so, and why that shows it.
"""

import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import agent
from deploy import lab as labs
from tests.e2e.conftest import answers, is_well, lab_up, node_sh, restart_agent, stream, things, wait_well, wg_peers
from tests.e2e.test_services import CONNECT, SERVE

pytestmark = [pytest.mark.root, pytest.mark.alone]

HEAL_S = 10  # far more than it takes: the machine may be busy, or emulated


@pytest.fixture(scope="module")
def lab():
    with lab_up(f"mncni-traffic-{os.getpid()}", nodes=3) as made:
        yield made


def quiet(lab, fault, event, act, rate=500):
    """A row of what may cost no packet. act() may return the seconds until all was as before. A busy machine loses packets by itself;
    what the fault costs it costs each time."""
    before, heal_s = things(lab, "node1"), []
    for _ in range(3):
        [flow] = stream(lab, lambda: heal_s.append(act()), count=rate, rate=rate)
        if not flow.lost:
            break
    fault(event, flow.lost, flow.sent, 0, heal_s[-1], len(things(lab, "node1") - before))
    assert flow.lost == 0
    assert (heal_s[-1] or 0) < HEAL_S


def seconds_until(is_so, what, timeout_s=60):
    begin = time.monotonic()
    labs.wait_until(is_so, timeout_s, what)
    return time.monotonic() - begin


def ghost(lab, name="ghost"):
    """A node of a record alone joins and leaves; returns how many seconds it took until node1 had it as a peer."""
    text = ghost_record(lab, name, 99, "A")
    key = json.loads(text)["key"]
    labs.write_atomically(lab.store / f"{name}.json", text)
    took_s = seconds_until(lambda: key in wg_peers(lab, "node1"), "peer")
    (lab.store / f"{name}.json").unlink()
    labs.wait_until(lambda: key not in wg_peers(lab, "node1"), 60, "end of the peer")
    return took_s


def ghost_record(lab, name, number, letter):
    record = json.loads((lab.store / "node2.json").read_text())
    record["key"] = letter * 6 + record["key"][6:]
    record.update(podCIDRs=[f"10.244.{number}.0/24"], endpoints=[f"192.0.2.{number}"], uid=name, created="2999-01-01T00:00:00Z")
    return json.dumps(record)


def has_table(lab, node="node1"):
    return labs.run([*labs.node_argv(lab, node), "nft", "list", "chain", "inet", "mncni", "outbound"])[0] == 0


# ---- the agent ----


def test_an_agent_that_stands_still_is_no_loss_and_goes_on_where_it_was(lab, fault):
    """For a minute, far longer than it takes from one full look at the kernel to the next; nobody else counts the time."""

    def act():
        node_sh(lab, "node1", f"kill -STOP $(cat {labs.AGENT_PID}); nft flush ruleset")
        time.sleep(60)
        labs.add_pod(lab, "node1", "late")
        labs.del_pod(lab, "node1", "late")
        node_sh(lab, "node1", f"kill -CONT $(cat {labs.AGENT_PID})")
        return seconds_until(lambda: has_table(lab), "firewall")

    quiet(lab, fault, "agent stopped for 60 s (SIGSTOP), nft flushed", act)


def test_all_agents_killed_at_once_are_no_loss(lab, fault):
    def act():
        for node in lab.nodes():
            node_sh(lab, node, f"kill -KILL $(cat {labs.AGENT_PID})")
        ghost_gets_nowhere = set(wg_peers(lab, "node1"))
        for node in lab.nodes():
            labs.start_agent(lab, node)
        assert set(wg_peers(lab, "node1")) == ghost_gets_nowhere
        return seconds_until(lambda: all(is_well(lab, node) for node in lab.nodes()), "agents that are well")

    quiet(lab, fault, "agents of all nodes killed, new ones", act)


# What another version of the two files has otherwise: its number, a firewall rule, the pods' plugins.
OTHER_VERSION = {
    "mncni.py": ('PROGRAM_VERSION = "', 'PROGRAM_VERSION = "0.0.'),
    "agent.py": ('"srcnat - 10"', '"srcnat - 11"'),
    "agent.py ": ('["naivewg", "portmap", "bandwidth", "lat"]', '["naivewg", "portmap", "bandwidth"]'),
}


def give_version(lab, node, other):
    """Put the files of this version, or of the other, on a node, and start an agent from them, as a roll-out does."""
    for name, words in OTHER_VERSION.items():
        path = lab.inside(node, f"/opt/mncni/{name.strip()}")
        text = path.read_text()
        old, new = words if other else reversed(words)
        assert text.count(old) == 1, name
        labs.write_atomically(path, text.replace(old, new))
        path.chmod(0o755)
    restart_agent(lab, node)
    chain = [*labs.node_argv(lab, node), "nft", "-j", "list", "chain", "inet", "mncni", "nat"]
    labs.wait_until(lambda: f'"prio": {89 if other else 90},' in labs.run(chain)[1], 60, "firewall of the new version")
    plugins = lab.inside(node, "/etc/cni/net.d/10-mncni.conflist")
    labs.wait_until(lambda: ('"lat"' in plugins.read_text()) is not other and is_well(lab, node), 60, "conflist of the new version")


def pod_comes_and_goes(lab, node):
    labs.add_pod(lab, node, "late")
    labs.del_pod(lab, node, "late")


def test_a_downgrade_two_versions_and_the_upgrade_are_no_loss(lab, fault):
    """The other version is this one with another firewall, other plugins and another number."""
    quiet(lab, fault, "downgrade to another version", lambda: give_version(lab, "node1", True) if not_other(lab) else None)
    quiet(lab, fault, "two versions: pods and nodes come and go", lambda: (pod_comes_and_goes(lab, "node1"), ghost(lab))[1])
    quiet(lab, fault, "upgrade from another version", lambda: None if not_other(lab) else give_version(lab, "node1", False))


def not_other(lab):
    return '"srcnat - 10"' in lab.inside("node1", "/opt/mncni/agent.py").read_text()


# ---- the node ----


def test_a_node_that_reboots_has_its_pods_back_soon(lab, fault):
    """kubelet starts pods at once, before there is an agent: the plugin tells it to try again, and nothing leaves them in clear."""
    pods, heal_s, before = ["pod1", "pod2", "pod3"], [], things(lab, "node3")

    def act():
        labs.kill_node(lab, "node3")
        labs.start_node(lab, "node3")
        with ThreadPoolExecutor() as pool:
            adding = [pool.submit(labs.add_pod, lab, "node3", pod) for pod in pods]
            labs.wait_until(lambda: not all(labs.pod_record(lab, "node3", pod).get("addresses") for pod in pods), 60, "pods that wait")
            labs.start_agent(lab, "node3")
            heal_s.append(seconds_until(lambda: answers(lab, "node1", "node3") and answers(lab, "node3", "node1"), "answers"))
            for pod in adding:
                pod.result()
        for pod in pods[1:]:
            labs.del_pod(lab, "node3", pod)

    [flow] = stream(lab, act, rate=200, count=200)
    leaks = things(lab, "node3") - before
    fault("another node reboots, pods scheduled at once", flow.lost, flow.sent, 0, heal_s[0], len(leaks))
    assert flow.lost == 0 and not leaks
    assert heal_s[0] < 4 * HEAL_S


def test_a_node_that_is_made_anew_with_other_addresses_and_key_is_followed(lab, fault):
    heal_s = []

    def act():
        labs.kill_node(lab, "node3")
        shutil.rmtree(lab.dir / "node3")
        (lab.store / "node3.json").unlink()  # as somebody deletes the Node
        with lab.changing("node3") as row:
            row["number"] = {3: 7, 7: 3}[row["number"]]  # its address, its pod CIDRs
        labs.make_node_dir(lab, "node3")
        labs.start_node(lab, "node3")
        labs.start_agent(lab, "node3")
        labs.wait_agent(lab, "node3")
        labs.add_pod(lab, "node3", "pod1")
        heal_s.append(seconds_until(lambda: answers(lab, "node1", "node3") and answers(lab, "node3", "node1"), "answers"))

    [flow] = stream(lab, act, rate=200, count=200)
    fault("another node made anew: other addresses, key", flow.lost, flow.sent, 0, heal_s[0])
    assert flow.lost == 0
    assert len(wg_peers(lab, "node1")) == 2
    assert heal_s[0] < HEAL_S


def look_for_addresses(lab, node):
    """Restart a node's agent so that it finds its endpoint itself, as in a cluster."""
    argv = labs.plan_agent(lab, node)
    at = argv.index("--endpoint")
    restart_agent(lab, node, argv=[*argv[:at], *argv[at + 2 :]])
    wait_well(lab, node)


def change_address(lab, node, address):
    node_sh(lab, node, f"ip address flush dev eth0; ip address add {address}/24 dev eth0")


def test_nodes_whose_addresses_change_are_followed(lab, fault):
    """First one gets another address, then two exchange theirs."""
    for node in ("node2", "node3"):
        look_for_addresses(lab, node)
    number = lab.node("node3")["number"]
    changes = {
        "another node's address changed": {"node3": "192.0.2.33"},
        "two other nodes exchange addresses": {"node2": "192.0.2.33", "node3": "192.0.2.2"},
        "and back": {"node2": "192.0.2.2", "node3": f"192.0.2.{number}"},
    }
    for event, addresses in changes.items():

        def act(addresses=addresses):
            for node in addresses:
                node_sh(lab, node, "ip address flush dev eth0")
            for node, address in addresses.items():
                node_sh(lab, node, f"ip address add {address}/24 dev eth0")
            for node in lab.nodes():  # as the new owner of an address announces itself
                node_sh(lab, node, "ip neighbour flush dev eth0")
            for node in addresses:
                labs.wait_until(lambda node=node: answers(lab, "node1", node) and answers(lab, node, "node1"), 60, f"answer of {node}")
            labs.wait_until(lambda: follows(lab, addresses), 60, "endpoints as they are")

        flows = stream(lab, act, *addresses, rate=200, count=200)
        fault(event, sum(flow.lost for flow in flows), sum(flow.sent for flow in flows), 0, max(flow.silence_s for flow in flows))
        assert max(flow.silence_s for flow in flows) < 2 * HEAL_S
    for node in ("node2", "node3"):
        restart_agent(lab, node)
        wait_well(lab, node)


def follows(lab, addresses):
    endpoints = {endpoint for endpoint, _ in wg_peers(lab, "node1").values()}
    return {f"{address}:28384" for address in addresses.values()} <= endpoints


# ---- the wire ----


def test_tcp_survives_an_underlay_that_carries_less(lab, fault):
    """What is too large goes in fragments until the agent looks, and from then on fits (but for wireguard-go, see `create_device`)."""
    conflist = lab.inside("node1", "/etc/cni/net.d/10-mncni.conflist")

    def act():
        for node in ("node1", "node2"):
            node_sh(lab, node, "ip link set eth0 mtu 1400")
        labs.wait_until(lambda: json.loads(conflist.read_text())["plugins"][0]["mtu"] == 1340, 60, "smaller MTU for pods")
        time.sleep(1)  # of traffic

    try:
        [flow] = stream(lab, act, fragments=True, rate=500, count=500)
        fault("underlay's MTU 1500, then 1400", flow.lost, flow.sent, 0, flow.silence_s)
        assert flow.lost <= 2 and flow.stall_s < HEAL_S
    finally:
        for node in ("node1", "node2"):
            node_sh(lab, node, "ip link set eth0 mtu 1500")
        labs.wait_until(lambda: json.loads(conflist.read_text())["plugins"][0]["mtu"] == 1440, 60, "MTU for pods as before")


def drop_on_the_wire(lab, what):
    """nft rules in the nodes themselves, on what arrives from the underlay, in both directions."""
    for node in ("node1", "node2"):
        rule = f"add rule inet wire arriving iifname eth0 udp dport 28384 {what} drop"
        chain = "add chain inet wire arriving { type filter hook prerouting priority -400; }"
        node_sh(lab, node, f"printf '%s\\n' 'add table inet wire' '{chain}' '{rule}' | nft -f -")


def heal_the_wire(lab):
    for node in ("node1", "node2"):
        node_sh(lab, node, "nft delete table inet wire")


def test_tcp_survives_loss(lab, fault):
    def act():
        drop_on_the_wire(lab, "numgen random mod 100 < 5")
        time.sleep(5)
        heal_the_wire(lab)

    [flow] = stream(lab, act, rate=500, count=500)
    fault("underlay loses 5 %", flow.lost, flow.sent, 0)
    assert 0.01 < flow.lost / flow.sent < 0.1
    assert flow.stall_s < HEAL_S


@pytest.mark.kernel("netem")
def test_tcp_survives_loss_and_disorder(lab, fault):
    def act():
        node_sh(lab, "node1", "tc qdisc add dev eth0 root netem delay 5ms 3ms reorder 25% loss 5%")
        time.sleep(10)
        node_sh(lab, "node1", "tc qdisc delete dev eth0 root")

    [flow] = stream(lab, act, rate=200, count=200)
    fault("underlay loses 5 %, reorders 25 %", flow.lost, flow.sent, 0)
    assert flow.lost / flow.sent < 0.15
    assert flow.stall_s < 2 * HEAL_S


@pytest.mark.vm
def test_tcp_survives_a_partition(lab, fault):
    """Of 30 s: after 15 s without an answer WireGuard begins anew. TCP tries again 25 s and 51 s after the last answer."""

    def act():
        drop_on_the_wire(lab, "")
        time.sleep(30)
        heal_the_wire(lab)
        labs.wait_until(lambda: answers(lab, "node1", "node2"), 60, "answer")

    [flow] = stream(lab, act, rate=200, count=200)
    heal_s = flow.silence_s - 30
    fault(f"underlay cut for 30 s (TCP silent for {flow.stall_s:.0f} s)", flow.lost, flow.sent, 0, heal_s)
    assert 0 <= heal_s < 2 * HEAL_S
    assert flow.stall_s < 80


# ---- clock and disk ----


# Runs the agent with another wall clock than the kernel's, by as many seconds as /run/clock says; what goes on steadily is as it was.
OTHER_CLOCK = """
import runpy, sys, time
real, broken_down = time.time, time.gmtime
time.time = lambda: real() + float(open("/run/clock").read())
time.gmtime = lambda seconds=None: broken_down(time.time() if seconds is None else seconds)
sys.argv = sys.argv[1:]
runpy.run_path("/opt/mncni/agent.py", run_name="__main__")
"""


def test_an_agents_clock_that_jumps_costs_hardly_a_packet(lab, fault):
    """The agent's alone, not WireGuard's. Set back, it has the others begin anew with this node, at the price of a round trip."""
    clock = lab.inside("node1", "/run/clock")
    clock.write_text("0")
    restart_agent(lab, argv=[labs.PYTHON, "-c", OTHER_CLOCK, *labs.plan_agent(lab, "node1")[1:]])
    wait_well(lab)

    def act(name, offset_s):
        clock.write_text(str(offset_s))
        took_s = ghost(lab, name)
        said = [line for line in lab.inside("node1", labs.AGENT_LOG).read_text().splitlines() if f"{name} joined" in line][-1]
        ahead_s = time.mktime(time.strptime(said[:19], "%Y-%m-%d %H:%M:%S")) - time.time()
        assert abs(ahead_s - offset_s) < 300, said  # the agent's clock did jump
        assert is_well(lab)
        return took_s

    quiet(lab, fault, "agent's clock 1 h ahead", lambda: act("early", 3600))
    handshakes = f"ip netns exec mncni-wg wg show {agent.DEVICE} latest-handshakes"
    before = node_sh(lab, "node2", handshakes)
    [flow] = stream(lab, lambda: act("late", -3600), count=500, rate=500)
    fault("agent's clock set back by 2 h", flow.lost, flow.sent, 0, flow.silence_s)
    assert "setBack" in (lab.store / "node1.json").read_text()
    labs.wait_until(lambda: node_sh(lab, "node2", handshakes) != before, 60, "new handshake")
    assert flow.lost < 100
    restart_agent(lab)
    wait_well(lab)


@pytest.mark.kernel("clock")
def test_nodes_whose_clocks_are_set_back_reach_each_other_after_new_handshakes(lab, fault):
    """All of them at once, as there is one clock. To WireGuard a handshake of before the last one is a replay: for an hour, were it not
    for the agents. A new device is what asks for a handshake at once."""

    def act():
        subprocess.run(["date", "-s", "-1 hour"], check=True, stdout=subprocess.DEVNULL)
        told = [lab.store / f"{node}.json" for node in lab.nodes()]
        labs.wait_until(lambda: all("setBack" in path.read_text() for path in told), 60, "word of the clock in all records")
        node_sh(lab, "node1", f"ip netns exec mncni-wg ip link delete {agent.DEVICE}")
        labs.wait_until(lambda: answers(lab, "node1", "node2") and answers(lab, "node2", "node1"), 60, "answers")

    try:
        [flow] = stream(lab, act, rate=200, count=200)
    finally:
        subprocess.run(["date", "-s", "+1 hour"], check=True, stdout=subprocess.DEVNULL)
    fault("clocks of all nodes set back by 1 h, a device deleted", flow.lost, flow.sent, 0, flow.silence_s)
    assert flow.silence_s < 2 * HEAL_S and flow.stall_s < 60


DISKS = {"full": ("dd if=/dev/zero of={0}/fill bs=4k 2>/dev/null || true", "rm {0}/fill"),
         "read-only": ("mount -o remount,ro {0}", "mount -o remount,rw {0}")}
STATE, LEASES = "/var/lib/mncni", "/var/lib/cni/mncni"
STATE_FILES = f"ls -A {STATE} {LEASES}/mncni | grep -v fill"


@pytest.fixture
def disks(lab):
    """node1's key and last good nodes, and the leases of its pods, on small disks of their own. disks(command) runs one on both."""
    for path in (STATE, LEASES):
        mount = f"mount -t tmpfs -o size=64k,mode=0700 disk {path}"
        node_sh(lab, "node1", f"cp -a {path} /tmp/kept && {mount} && cp -a /tmp/kept/. {path}/ && rm -r /tmp/kept")
    yield lambda command: [node_sh(lab, "node1", command.format(path)) for path in (STATE, LEASES)]
    for path in (STATE, LEASES):
        node_sh(lab, "node1", f"cp -a {path} /tmp/kept; umount {path}; cp -a /tmp/kept/. {path}/; rm -rf /tmp/kept {path}/fill")


def status(lab):
    argv = [*labs.node_argv(lab, "node1"), labs.PYTHON, "/opt/mncni/agent.py", "status", "--json"]
    return json.loads(labs.run(argv)[1])


@pytest.mark.parametrize("kind", DISKS)
def test_a_disk_that_takes_nothing_is_no_loss(lab, disks, kind, fault):
    """A new agent begins there, nodes come and go; no pod comes, and what tries leaves nothing."""
    breaks, heals = DISKS[kind]

    def act():
        disks(breaks)
        before = node_sh(lab, "node1", STATE_FILES)
        restart_agent(lab, sign="KILL")
        ghost(lab)
        labs.write_atomically(lab.store / "new.json", ghost_record(lab, "new", 98, "B"))
        labs.wait_until(lambda: f"cannot write {STATE}/nodes.json" in status(lab)["store"], 60, "word of the disk")
        with pytest.raises(labs.LabError, match=f"code 5: .*{LEASES}"):
            labs.add_pod(lab, "node1", "late")
        assert node_sh(lab, "node1", STATE_FILES) == before
        disks(heals)
        pod_comes_and_goes(lab, "node1")
        took_s = seconds_until(lambda: not status(lab)["store"], "agent that can write")
        (lab.store / "new.json").unlink()
        wait_well(lab)
        return took_s

    quiet(lab, fault, f"disk {kind}: nodes, leases", act)


@pytest.mark.parametrize("kind", DISKS)
def test_a_key_that_cannot_be_kept_is_no_loss(lab, disks, kind, fault):
    """There is none half written, and when there is space, it is that of the device."""
    breaks, heals = DISKS[kind]

    def act():
        key = node_sh(lab, "node1", f"cat {STATE}/key; rm {STATE}/key")
        disks(breaks)
        restart_agent(lab)
        labs.wait_until(lambda: f"cannot write {STATE}/key" in status(lab)["reason"], 60, "word of the disk")
        assert "key" not in node_sh(lab, "node1", STATE_FILES)
        disks(heals)
        took_s = seconds_until(lambda: is_well(lab), "agent that is well")
        assert node_sh(lab, "node1", f"cat {STATE}/key") == key
        return took_s

    quiet(lab, fault, f"disk {kind}: key", act)


# ---- neighbours on the node ----

# As firewalld does it, with the pods' links in a trusted zone.
FOREIGN = """
table inet other
delete table inet other
table inet other {
  chain forward {
    type filter hook forward priority filter + 10; policy drop;
    ct state { established, related } accept
    iifname "mncni0" accept
    oifname "mncni0" accept
  }
  chain postrouting { type nat hook postrouting priority srcnat + 10; oifname { "eth0", "mncni-host" } masquerade; }
}
"""


def test_a_firewall_beside_ours_is_no_loss(lab, fault):
    """It is loaded, loaded again, and goes; and masquerades even what goes into the tunnel."""

    def act():
        for _ in range(3):
            node_sh(lab, "node1", f"printf '%s' '{FOREIGN}' | nft -f -")
            labs.wait_until(lambda: answers(lab, "node1", "node2") and answers(lab, "node2", "node1"), 30, "answers")
        node_sh(lab, "node1", "nft delete table inet other")

    quiet(lab, fault, "another firewall loaded, loaded again, gone", act)


def test_a_firewall_that_forwards_nothing_stops_pods_and_nothing_goes_in_clear(lab, fault):
    """Nobody can accept what another drops. It heals when that one is gone."""

    def act():
        node_sh(lab, "node1", "nft 'table inet other { chain forward { type filter hook forward priority filter; policy drop; }; }'")
        time.sleep(1)
        node_sh(lab, "node1", "nft delete table inet other")

    [flow] = stream(lab, act, rate=500, count=1_000)
    fault("a firewall drops all forwarding for 1 s", flow.lost, flow.sent, 0, max(0, flow.silence_s - 1))
    assert flow.lost > 200 and flow.silence_s - 1 < HEAL_S


def test_the_configuration_of_another_network_is_no_loss_and_stays(lab, fault):
    other, own = (f"/etc/cni/net.d/{name}.conflist" for name in ("00-other", "10-mncni"))
    text = '{"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "loopback"}]}'

    def act():
        node_sh(lab, "node1", f"echo '{text}' > {other}; rm {own}")
        restart_agent(lab)
        took_s = seconds_until(lambda: lab.inside("node1", own).exists(), "own configuration")
        assert node_sh(lab, "node1", f"cat {other}; rm {other}") == f"{text}\n"
        wait_well(lab)
        return took_s

    quiet(lab, fault, "another network's configuration appears", act)


def test_a_host_port_is_back_soon_after_all_of_nft_was_flushed(lab, fault):
    labs.add_pod(lab, "node1", "web", {"portMappings": [{"hostPort": 18080, "containerPort": 8080, "protocol": "tcp", "hostIP": ""}]})
    ask = [*labs.node_argv(lab, "node2"), labs.PYTHON, "-c", CONNECT.replace("timeout=5", "timeout=0.2"), "192.0.2.1", "18080"]
    argv = [*labs.pod_argv(lab, "node1", "web"), labs.PYTHON, "-c", SERVE]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout.readline() == "up\n"
            labs.wait_until(lambda: labs.run(ask)[0] == 0, 20, "host port")
            assert "mncni" not in node_sh(lab, "node1", "nft flush ruleset; nft list tables")
            heal_s = seconds_until(lambda: labs.run(ask)[0] == 0, "host port")
        finally:
            node_sh(lab, "node1", "ip netns pids web | xargs -r kill")
    labs.del_pod(lab, "node1", "web")
    fault("host port: nft flushed", heal_s=heal_s)
    assert heal_s < HEAL_S
