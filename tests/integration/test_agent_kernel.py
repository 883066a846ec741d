"""The agent against a real kernel: three nodes of the lab (deploy/lab.py), each with the real agent and one pod.

node1 and node2 are never to lose a packet between them; node3 is the one that things are done to. Each test leaves all three whole.
"""

import contextlib
import json
import os
import re
import signal
import stat
import tempfile
import time
from pathlib import Path

import pytest

from deploy import lab as labs
from tests.unit.agent_data import text_of
from tests.unit.test_agent_records import BAD_RECORDS

pytestmark = pytest.mark.root

PATIENCE_S = 30  # far more than anything takes: the machine may be busy
AGENT = "/opt/mncni/agent.py"
POD = {node: f"10.244.{number}.2" for number, node in enumerate(("node1", "node2", "node3"), 1)}
READS = re.compile(r"\+ (nsenter --net=\S+ )?(ip -json |wg show |nft -j list |/usr/bin/python3 -IS -c |CNI_COMMAND=STATUS )")


class Node:
    """A node of the lab and its agent."""

    def __init__(self, lab, name):
        self.lab, self.name = lab, name

    def run(self, *argv, stdin=""):
        """(exit status, stdout, stderr) of a command in the node."""
        return labs.run([*labs.node_argv(self.lab, self.name), *argv], stdin)

    def sh(self, command, check=True):
        """What a shell command in the node prints."""
        code, stdout, stderr = self.run("sh", "-c", command)
        assert code == 0 or not check, f"{self.name}: {command}: exit {code}\n{stderr}"
        return stdout

    def path(self, path):
        return self.lab.inside(self.name, path)

    def log(self):
        return self.path(labs.AGENT_LOG).read_text()

    def start(self, *flags, argv=None):
        """Start the agent; it logs each command. argv: its command line. Returns what it has logged since, as a function."""
        before = len(self.log())
        argv = ["/usr/bin/env", "MNCNI_DEBUG=1", *(argv or labs.plan_agent(self.lab, self.name)), *flags]
        labs.must([*labs.node_argv(self.lab, self.name), labs.PYTHON, "/opt/mncni/lab.py", "node-agent", "start", *argv])
        return lambda: self.log()[before:]

    def end(self, number=signal.SIGTERM):
        """Send the agent a signal and wait for its end."""
        pid = labs.agent_pid(self.path("/"))
        assert pid, f"no agent runs on {self.name}"
        self.sh(f"kill -{int(number)} {pid}")
        labs.wait_until(lambda: not labs.agent_pid(self.path("/")), PATIENCE_S, f"end of the agent of {self.name}")

    def restart(self, *flags):
        """A new agent that has done its first pass. Returns what it has logged, as a function."""
        self.end()
        logged = self.start(*flags)
        self.wait_log(logged, "the network is up")
        return logged

    def wait_log(self, logged, words):
        try:
            labs.wait_until(lambda: words in logged(), PATIENCE_S, f'"{words}"')
        except labs.LabError as error:
            raise AssertionError(f"{self.name}: {error}:\n{logged()[-2000:]}") from None

    def status(self):
        """(exit status, what `agent.py status --json` says)."""
        code, stdout, _ = self.run(labs.PYTHON, AGENT, "status", "--json")
        return code, json.loads(stdout)

    def wait_status(self, what, is_so):
        """The status as soon as it is as wanted."""
        return labs.wait_until(lambda: (lambda status: status if is_so(status) else None)(self.status()[1]), PATIENCE_S, what)

    def wait_up(self):
        return self.wait_status(f"{self.name} is up", lambda status: status["ok"])

    def peers(self):
        return {peer["name"] for peer in self.status()[1]["peers"] if peer["present"]}

    def wait_peers(self, *names):
        labs.wait_until(lambda: self.peers() == set(names), PATIENCE_S, f"peers {names} of {self.name}")

    def record(self):
        return self.lab.store / f"{self.name}.json"


def built(lab):
    """The lab, for the time of the with block and, if the block ends well, beyond it."""
    return labs.built_or_undone(lab, 3, 1, labs.LAB_FILE.parents[1])


@pytest.fixture(scope="module")
def nodes():
    """[node1, node2, node3], up, their agents logging every command."""
    lab = labs.Lab(f"mncni-agent-{os.getpid()}", verbose=False)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))  # by default nothing would be cleaned up
    try:
        with built(lab):
            labs.boot_all(lab)
            labs.wait_first_pongs(lab, labs.plan_pairs(lab))
        found = [Node(lab, name) for name in POD]
        for node in found:
            node.restart()
        yield found
    finally:
        with labs.signals_ignored():
            labs.down(lab)
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def whole(nodes):
    """Each test leaves all agents up and all nodes connected; after one that failed the agents are helped up for the next."""
    yield
    for node in nodes:
        if not labs.agent_pid(node.path("/")):
            node.start()
        node.wait_up()
        node.wait_peers(*(other.name for other in nodes if other is not node))


@contextlib.contextmanager
def pinging(node, address, interval_s="0.01", pod="pod1"):
    """A ping from a pod, or from the node for pod "", during the with block. Yields a function: what it has printed so far."""
    prefix = labs.pod_argv(node.lab, node.name, pod) if pod else labs.node_argv(node.lab, node.name)
    with tempfile.TemporaryFile("w+") as output:
        argv = [*prefix, "ping", "-n", "-i", interval_s, address]
        flow = labs.start(argv, stdout=output, stderr=output, start_new_session=True)
        try:
            yield lambda: os.pread(output.fileno(), 1 << 26, 0).decode()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(flow.pid, signal.SIGINT)  # as Ctrl-C: it prints how many it sent
            flow.wait(PATIENCE_S)


@contextlib.contextmanager
def no_ping_lost(node, address, pod="pod1"):
    """Ping every 10 ms during the with block; from the first answer on none may be missing, nor be long overdue at the end."""
    answers = re.compile(r"icmp_seq=(\d+) ttl")
    with pinging(node, address, pod=pod) as output:
        labs.wait_until(lambda: answers.search(output()), PATIENCE_S, f"pong from {address}")
        yield
        after = len(output())
        labs.wait_until(lambda: len(answers.findall(output()[after:])) > 20, PATIENCE_S, f"pongs from {address} after all that")
        text = output()
    answered = [int(number) for number in answers.findall(text)]
    missing = set(range(answered[0], answered[-1])) - set(answered)
    assert not missing, f"{len(missing)} of {len(answered)} pings lost: {sorted(missing)[:20]}"


def writes(log):
    """The commands of a log that may change the kernel. One that says why is on the line below the reason."""
    return [line for line in re.findall(r"^(?:.* DEBUG )?(\+ .*)", log, re.M) if not READS.match(line)]


def test_what_counts_as_a_write_is_known():
    log = "x DEBUG # a look\n+ ip -json -details -batch - <<'E'\nx DEBUG # why\n+ nft -f - <<'E'\n"
    log += "x DEBUG + nsenter --net=/run/netns/a wg set x\n"
    assert writes(log) == ["+ nft -f - <<'E'", "+ nsenter --net=/run/netns/a wg set x"]


# ---- one agent, restarts, idle passes ----


def test_a_second_agent_for_the_node_exits_3(nodes):
    node = nodes[0]
    code, _, stderr = node.run(*labs.plan_agent(node.lab, node.name))
    assert code == 3 and "another agent runs here" in stderr and "/run/mncni/agent.lock" in stderr


def kernel_facts(node):
    """What a rewrite would change: indexes of links, handles of nft tables and rules, keys, peers' endpoints."""
    inside = "nsenter --net=/run/netns/mncni-wg"
    commands = ["nft -a list ruleset", f"{inside} nft -a list ruleset", "ip -o link", f"{inside} ip -o link", "ip route", "ip -6 route"]
    commands += [f"{inside} ip route", f"{inside} wg show mncni-wg0 public-key"]
    commands += [f"{inside} wg show mncni-wg0 {what} | sort" for what in ("endpoints", "allowed-ips")]
    return node.sh(" && ".join(commands))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_of_the_agent_loses_no_ping_and_writes_nothing(nodes, number):
    node = nodes[0]
    before = kernel_facts(node)
    with no_ping_lost(node, POD["node2"]), no_ping_lost(nodes[1], POD["node1"]):
        node.end(number)
        logged = node.start()
        node.wait_log(logged, "the network is up")
    assert writes(logged()) == [] and "\n+ ip -json" in logged()
    assert "DEBUG + " not in logged(), "a command without a reason above it"
    assert kernel_facts(node) == before


def test_a_pass_with_nothing_to_do_runs_no_writing_command(nodes):
    """A record that nobody believes starts a pass and changes nothing."""
    node, path = nodes[0], nodes[0].lab.store / "stranger.json"
    before = len(node.log())
    path.write_text("{}")
    try:
        labs.wait_until(lambda: "node stranger: quarantined" in node.log()[before:], PATIENCE_S, "quarantine")
    finally:
        path.unlink()
    labs.wait_until(lambda: "node stranger: gone" in node.log()[before:], PATIENCE_S, "end of the quarantine")
    assert writes(node.log()[before:]) == []


# ---- nodes that come, hostile records, a store that fails ----


def test_a_new_record_leads_to_a_first_pong_within_seconds(nodes, figure):
    first, _, third = nodes
    third.end()  # else it would put its record back
    text = third.record().read_text()
    try:
        third.record().unlink()
        first.wait_peers("node2")
        with pinging(first, POD["node3"], "0.05") as output:
            labs.write_atomically(third.record(), text)
            start = time.monotonic()
            labs.wait_until(lambda: "bytes from" in output(), PATIENCE_S, "first pong")
            took_s = time.monotonic() - start
    finally:
        third.record().write_text(text)
        third.start()
    figure(f"new node, record to first pong: {took_s:.2f} s")
    assert took_s < 10


def test_hostile_records_leave_honest_peers_up_are_shown_and_believed_again_when_repaired(nodes):
    node = nodes[0]
    hostile = {f"hostile{number}": text for number, (text, _) in enumerate(BAD_RECORDS.values())}
    good_key = json.loads(nodes[1].record().read_text())["key"]
    hostile["copier"] = text_of(66, key=good_key, created="2099-01-01T00:00:00Z")
    hostile["squatter"] = text_of(66, podCIDRs=["10.244.2.0/25"], created="2099-01-01T00:00:00Z")
    hostile["a\nb\x1b[2J"] = text_of(66)
    files = {node.lab.store / f"{name}.json": text for name, text in hostile.items()}
    try:
        with no_ping_lost(node, POD["node2"]), no_ping_lost(node, POD["node3"], pod=""):
            for path, text in files.items():
                path.write_text(text, "utf-8", "surrogatepass")
            os.mkfifo(node.lab.store / "fifo.json")
            names = {*hostile, "fifo"} - {"a\nb\x1b[2J"} | {'"a\\nb\\u001b[2J"'}
            node.wait_status("all quarantined", lambda status: set(status["quarantine"]) == names)
            code, stdout, stderr = node.run(labs.PYTHON, AGENT, "status")
            assert (code, stderr, node.peers()) == (1, "", {"node2", "node3"})
            assert all(f"\n{name}: quarantined: " in stdout for name in names), stdout
            repaired = node.lab.store / "hostile0.json"
            labs.write_atomically(repaired, text_of(66, port=1))
            node.wait_peers("node2", "node3", "hostile0")
            assert "hostile0" not in node.status()[1]["quarantine"]
    finally:
        for path in [*files, node.lab.store / "fifo.json"]:
            path.unlink(missing_ok=True)
    node.wait_peers("node2", "node3")


HIDE = "mount -t tmpfs hidden /var/lib/mncni-lab"
STORES = {
    "missing": ("true", "No such file or directory"),
    "empty": ("mkdir nodes", "lost this node's record|have vanished"),
    "a file": ("touch nodes", "Not a directory"),
    "unreadable": ("ln -s nodes nodes", "Too many levels"),
}


@pytest.mark.parametrize("kind", STORES)
def test_a_store_that_fails_keeps_the_peers(nodes, kind):
    node = nodes[0]
    make, said = STORES[kind]
    with no_ping_lost(node, POD["node2"]):
        node.sh(f"{HIDE} && cd /var/lib/mncni-lab && {make}")
        try:
            node.wait_status(said, lambda status: re.search(said, status["store"]))
            assert node.peers() == {"node2", "node3"}
        finally:
            node.sh("umount /var/lib/mncni-lab")
        node.wait_status("the store is believed again", lambda status: status["store"] == "")


# ---- the node's address ----


def test_an_address_that_changes_is_followed_and_one_that_moves_in_and_out_is_no_news(nodes):
    """No --endpoint: the default route's source. As after a DHCP lease has brought another address; then keepalived comes and goes."""
    node, argv = nodes[2], labs.plan_agent(nodes[2].lab, "node3")
    place, old = argv.index("--endpoint"), argv[argv.index("--endpoint") + 1]
    node.end()
    node.sh(f"ip route add default via {old[:-1]}254")
    try:
        node.start(argv=argv[:place] + argv[place + 2 :])
        node.wait_up()
        assert node.status()[1]["endpoints"] == [old]
        link = json.loads(node.sh("ip -json route get 192.0.2.254"))[0]["dev"]
        node.sh(f"ip address delete {old}/24 dev {link}; ip address add {old}3/24 dev {link}; ip route add default via {old[:-1]}254")
        node.wait_status("the new address", lambda status: status["endpoints"] == [f"{old}3"])
        peer = nodes[0].wait_status(
            "the peer's new endpoint", lambda status: any(f"{old}3:" in each["endpoint"] for each in status["peers"])
        )
        assert peer["ok"]
        record = node.record().read_text()
        with no_ping_lost(node, POD["node1"]), no_ping_lost(nodes[0], POD["node3"]):
            for verb in ("add", "delete"):
                before = len(node.log())
                node.sh(f"ip address {verb} {old}4/32 dev {link}")
                labs.wait_until(lambda before=before: "ip -json" in node.log()[before:], PATIENCE_S, "a pass")
        assert node.record().read_text() == record
    finally:
        node.end()
        node.sh(f"ip address flush scope global dev {link}; ip address add {old}/24 dev {link}", check=False)
        node.start()


# ---- what is not ours, what cannot be kept ----

# What stands in the agent's way -> commands that put it there, what the agent says, how the object must still look, how it goes away.
FOREIGN = {
    "bridge": (
        "ip link delete mncni0; ip link add mncni0 type bridge",
        'link "mncni0" is somebody else\'s',
        "ip -json -details address show dev mncni0",
        "ip link delete mncni0",
    ),
    "veth": (
        "ip link delete mncni-host; ip link add mncni-host type bridge",
        'link "mncni-host" is somebody else\'s',
        "ip -json -details address show dev mncni-host",
        "ip link delete mncni-host",
    ),
    "device": (
        "ip -n mncni-wg link delete mncni-wg0; ip link add mncni-wg0 type bridge",
        'link "mncni-wg0" is somebody else\'s',
        "ip -json -details address show dev mncni-wg0",
        "ip link delete mncni-wg0",
    ),
    "namespace": (
        "ip netns delete mncni-wg; ip netns add mncni-wg; ip -n mncni-wg link add theirs type bridge",
        'namespace "mncni-wg" is somebody else\'s: it has theirs',
        "ip -n mncni-wg -json -details address show",
        "ip netns delete mncni-wg",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_object_is_refused_with_a_clear_message_and_left_as_it_is(nodes, kind):
    node = nodes[2]
    make, said, look, remove = FOREIGN[kind]
    node.end()
    try:
        node.sh(make)
        before = node.sh(look)
        node.start()
        status = node.wait_status("the refusal", lambda status: said in status["reason"])
        assert not status["ok"] and json.loads(node.path("/run/mncni/ready").read_text())["ok"] is False
        assert node.sh(look) == before
    finally:
        node.sh(remove)
    node.wait_up()
    if kind == "bridge":  # pods of a bridge that was deleted are not the agent's yet
        labs.del_pod(node.lab, "node3", "pod1")
        POD["node3"] = labs.add_pod(node.lab, "node3", "pod1")["ips"][0]["address"].partition("/")[0]
    with no_ping_lost(node, POD["node1"]):
        pass


def test_another_network_that_appears_inside_the_cluster_cidr_is_reported_and_costs_no_ping(nodes):
    node, said = nodes[2], "10.244.77.1/24 on virbr0"
    with no_ping_lost(node, POD["node1"]):
        node.sh("ip link add virbr0 type bridge; ip address add 10.244.77.1/24 dev virbr0; ip link set virbr0 up")
        try:
            node.wait_status("the report", lambda status: said in status["reason"] and "ip link delete virbr0" in status["reason"])
            assert json.loads(node.path("/run/mncni/ready").read_text())["ok"] is False
            node.end()
            logged = node.start()  # it finds the floor there, and keeps it
            node.wait_log(logged, said)
        finally:
            node.sh("ip link delete virbr0")
        node.wait_up()


def test_at_start_another_network_inside_the_cluster_cidr_is_not_cut_off(nodes):
    node = nodes[2]
    node.end()
    node.sh("nft delete table inet mncni; rm /run/mncni/firewall.json; ip route flush proto 201")  # as after a boot
    node.sh("ip link add virbr0 type bridge; ip address add 10.244.77.1/24 dev virbr0; ip link set virbr0 up")
    try:
        node.wait_log(node.start(), "10.244.77.1/24 on virbr0")
        assert "unreachable" not in node.sh("ip route") and node.run("nft", "list", "table", "inet", "mncni")[0] == 1
    finally:
        node.sh("ip link delete virbr0")
    node.wait_up()
    assert "unreachable 10.244.0.0/16" in node.sh("ip route")


@pytest.mark.parametrize(
    "inside, name", [("", "mncni0"), ("", "mncni-host"), ("", "eth0"), ("nsenter --net=/run/netns/mncni-wg ", "mncni-ns")]
)
def test_forwarding_of_one_link_that_is_switched_off_is_switched_on_again(nodes, inside, name):
    key = f"net.ipv4.conf.{name}.forwarding"
    nodes[2].sh(f"{inside}sysctl -qw {key}=0")
    labs.wait_until(lambda: nodes[2].sh(f"{inside}sysctl -n {key}") == "1\n", 5, "forwarding again")


def test_a_full_state_directory_is_named_and_the_key_in_use_stays(nodes):
    node = nodes[2]
    key = node.status()[1]["publicKey"]
    node.end()
    node.sh("mount -t tmpfs -o size=4k,mode=700 full /var/lib/mncni; head -c 4096 /dev/zero > /var/lib/mncni/filler")
    try:
        logged = node.start()
        node.wait_log(logged, "cannot write /var/lib/mncni/key.new: No space left on device")
        assert node.sh("nsenter --net=/run/netns/mncni-wg wg show mncni-wg0 public-key").strip() == key
        assert "No space left" in node.run(labs.PYTHON, AGENT, "status")[1]
    finally:
        node.sh("umount /var/lib/mncni")
    assert node.wait_up()["publicKey"] == key


def test_a_read_only_state_directory_is_named_and_the_network_stays(nodes):
    node, path = nodes[2], nodes[0].lab.store / "stranger.json"
    node.sh("mount --bind /var/lib/mncni /var/lib/mncni && mount -o remount,bind,ro /var/lib/mncni")
    try:
        with no_ping_lost(node, POD["node1"]):
            path.write_text(text_of(66))
            said = "cannot write /var/lib/mncni/nodes.json: Read-only file system"
            status = node.wait_status(said, lambda status: said in status["store"])
            assert status["reason"] == "" and json.loads(node.path("/run/mncni/ready").read_text())["ok"] is True
    finally:
        path.unlink()
        node.sh("umount /var/lib/mncni")


# ---- files, secrets, traffic of the node itself, both families ----


def test_files_have_the_modes_that_they_need(nodes):
    expected = {"/run/mncni/agent.lock": 0o600, "/run/mncni/ready": 0o644, "/run/mncni/status.json": 0o644}
    expected |= {"/var/lib/mncni": 0o700, "/var/lib/mncni/key": 0o600, "/var/lib/mncni/nodes.json": 0o600}
    expected |= {"/etc/cni/net.d/10-mncni.conflist": 0o644, "/opt/cni/bin/mncni.py": 0o755, "/opt/cni/bin/mncni": 0o755}
    for path, mode in expected.items():
        status = nodes[0].path(path).stat()
        assert (oct(stat.S_IMODE(status.st_mode)), status.st_uid) == (oct(mode), 0), path


def test_the_private_key_is_in_no_log_command_line_file_or_status(nodes):
    """Also not while it is set: a new device gets it here."""
    node = nodes[2]
    node.end()
    node.sh("ip netns delete mncni-wg")
    key = node.path("/var/lib/mncni/key").read_text().strip()
    logged = node.start()
    node.wait_log(logged, "the network is up")
    assert "private-key /var/lib/mncni/key" in logged(), "it was set under our eyes"
    said = node.log() + node.run(labs.PYTHON, AGENT, "status")[1] + node.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '", check=False)
    said += node.sh("nft list ruleset; ip -details link", check=False)
    for top in ("/run/mncni", "/var/lib/mncni-lab", "/etc/cni", "/opt/cni", "/var/log", "/tmp"):
        said += "".join(path.read_text(errors="replace") for path in Path(node.path(top)).rglob("*") if path.is_file())
    assert len(key) == 44 and key not in said


def test_the_node_itself_reaches_a_remote_pod(nodes):
    """Its packets need a source that the peer accepts: the pods' gateway."""
    with no_ping_lost(nodes[0], POD["node2"], pod=""), no_ping_lost(nodes[1], POD["node1"], pod=""):
        pass


def test_both_families_work_and_a_second_pass_over_them_writes_nothing(nodes):
    first, second, _ = nodes

    def flags(number):
        return ["--cluster-cidr", "fd00:244::/32", "--pod-cidr", f"fd00:244:{number}::/64"]

    try:
        for number, node in ((1, first), (2, second)):
            node.restart(*flags(number))
        first.wait_peers("node2", "node3")
        second.wait_peers("node1", "node3")
        with no_ping_lost(first, "fd00:244:2::1", pod=""), no_ping_lost(first, POD["node2"]):
            logged = first.restart(*flags(1))
        assert writes(logged()) == []
    finally:
        for node in (first, second):
            node.restart()
    left = first.sh("ip -6 address; ip -6 route; nft list ruleset; nsenter --net=/run/netns/mncni-wg ip -6 route")
    assert "fd00:244" not in left
    first.wait_peers("node2", "node3")
    assert writes(first.restart()()) == []
