"""The lab from outside: two nodes with the real agent and the real plugin, every frame of the underlay looked at.

The nodes are those of deploy/lab.py. One lab serves most tests, in the order of this file; each test leaves it whole.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from deploy import lab as labs
from tests.conftest import kernel_has

pytestmark = pytest.mark.root

NAME = f"mncni-e2e-{os.getpid()}"
HEAL_S = 60  # far more than it takes: the machine may be busy
# Who pings whom between the nodes: (node, pod or "" for the node itself, to node); the target is pod1 there.
CROSSINGS = (("node1", "pod1", "node2"), ("node1", "", "node2"), ("node2", "pod1", "node1"), ("node2", "", "node1"))

DELETE_TUNNEL = "ip link delete mncni-host"
DELETE_NAMESPACE = "ip netns delete mncni-wg"
DELETE_FLOOR_ROUTES = "ip route flush type unreachable"
DELETE_FLOOR_RULES = "ip rule flush proto 201"
DELETE_FLOOR_TABLE = "nft delete table inet mncni"
# What is destroyed on node1 -> the commands that do it, and the crossings that may or may not work without it.
DAMAGES = {
    "tunnel": ([DELETE_TUNNEL], ()),
    "namespace": ([DELETE_NAMESPACE], ()),
    "wireguard": (["ip -n mncni-wg link delete mncni-wg0"], ()),
    "route-into-the-tunnel": (["ip route delete 10.244.0.0/16 dev mncni-host"], ()),
    "bridge": (["ip link delete mncni0"], CROSSINGS[1:2]),
    "nft-table": ([DELETE_FLOOR_TABLE], CROSSINGS),
    "tunnel-and-floor-routes": ([DELETE_TUNNEL, DELETE_FLOOR_ROUTES], ()),
    "tunnel-and-nft-table": ([DELETE_TUNNEL, DELETE_FLOOR_TABLE], ()),
    "tunnel-and-floor-rules": ([DELETE_TUNNEL, DELETE_FLOOR_RULES], ()),
    "all-but-floor-rules": ([DELETE_TUNNEL, DELETE_FLOOR_ROUTES, DELETE_FLOOR_TABLE], ()),
}
DAMAGES_IN_VM = ("tunnel", "namespace", "wireguard")  # where the kernel's WireGuard may differ; all of them would take too long there


# Run in a node: the codes of the errors that a runtime gets there.
EARLY_CALLS = """
import sys
sys.path.insert(0, "/opt/mncni")
import lab
lab.must(["ip", "netns", "add", "early"])
network = lab.look_network(lab.DIRS)
pod = lab.plan_attachment({"pod": "early", "container_id": "early", "netns": "/run/netns/early", "capabilities": {}}, "eth0")
for command in ("STATUS", "ADD"):
    try:
        lab.call_plugin(lab.plan_call(command, network, network["plugins"][0], pod, None), lab.DIRS, lab.run)
    except lab.CNIError as error:
        print(command, error.code)
lab.must(["ip", "netns", "delete", "early"])
"""


# ---------------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def story():
    """A lab that is up, and what happened on the way: {"lab", "counts" of the sniffer, "rows" of the pings, "pongs": seconds}."""
    lab = labs.Lab(NAME, verbose=False)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))  # by default nothing would be cleaned up
    try:
        with labs.built_or_undone(lab, 2, 2, labs.LAB_FILE.parents[1]):
            with labs.sniffing(lab) as counts:
                labs.boot_all(lab)
                pongs = labs.wait_first_pongs(lab, labs.plan_pairs(lab))
                rows = labs.ping_all(lab)
            yield {"lab": lab, "counts": counts, "rows": rows, "pongs": pongs}
    finally:
        with labs.signals_ignored():
            labs.down(lab)
        signal.signal(signal.SIGTERM, before)
    wait_for_nothing_left(NAME)


@pytest.fixture
def lab(story):
    return story["lab"]


def shell(lab, node, command):
    """What a shell command prints in a node; it has to work."""
    return labs.must([*labs.node_argv(lab, node), "sh", "-c", command])


def lab_py(*words, name=NAME):
    """Run lab.py as a user does: the finished process, its output in one text."""
    argv = [labs.PYTHON, str(labs.LAB_FILE), "--name", name, *words]
    return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)


def crossings_that_answer(lab):
    """Those of CROSSINGS of which a ping is answered, of two sent at once."""

    def answers(crossing):
        node, pod, to_node = crossing
        argv = labs.pod_argv(lab, node, pod)
        address = labs.pod_record(lab, to_node, "pod1")["addresses"][0]
        return labs.run([*argv, "ping", "-n", "-c2", "-i0.2", "-W1", address])[0] == 0

    return [crossing for crossing, answered in zip(CROSSINGS, labs.parallel(answers, CROSSINGS)) if answered]


def snapshot(lab):
    """What the agent keeps on node1, as lines without what changes by itself."""
    commands = "ip -4 route; nft --stateless list table inet mncni; ip -n mncni-wg -4 route; ip netns exec mncni-wg wg show all allowed-ips"
    return sorted(line.replace(" linkdown", "") for line in shell(lab, "node1", f"set -e; {commands}").splitlines())


def snapshot_or_nothing(lab):
    with contextlib.suppress(labs.LabError):
        return snapshot(lab)


def is_whole(lab, whole):
    """Whether node1 is again as that snapshot and every crossing works."""
    return snapshot_or_nothing(lab) == whole and len(crossings_that_answer(lab)) == len(CROSSINGS)


def wait_whole(lab, whole):
    """Returns the seconds that took."""
    begin = time.monotonic()
    labs.wait_until(lambda: is_whole(lab, whole), HEAL_S, "healed node1")
    return time.monotonic() - begin


def kill_agent(lab):
    """End the agent of node1 as the kernel does when memory is short; returns when it is gone."""
    shell(lab, "node1", f"kill -KILL $(cat {labs.AGENT_PID})")
    labs.wait_until(lambda: not labs.agent_pid(lab.inside("node1", "/")), HEAL_S, "end of the agent")


def damage(lab, commands):
    """Destroy something on node1, ping between the nodes meanwhile. Returns (what the sniffer saw, crossings that answered)."""
    with labs.sniffing(lab) as counts:
        for command in commands:
            shell(lab, "node1", command)
        if DELETE_NAMESPACE in commands:  # the kernel takes it apart later, and until then it goes on working
            gone = [*labs.node_argv(lab, "node1"), "test", "!", "-e", "/sys/class/net/mncni-host"]
            labs.wait_until(lambda: labs.run(gone)[0] == 0, HEAL_S, "end of the namespace")
        answered = crossings_that_answer(lab)
    return counts, answered


@pytest.fixture
def whole(lab):
    """A snapshot of node1 with a default route over the underlay, as a real node has. Afterwards node1 is made so again."""
    shell(lab, "node1", "ip route replace default via 192.0.2.2")
    lines = snapshot(lab)
    yield lines
    if not labs.agent_pid(lab.inside("node1", "/")):
        labs.start_agent(lab, "node1")
    labs.wait_until(lambda: snapshot_or_nothing(lab) == lines, HEAL_S, "healed node1")
    if len(labs.look([*labs.node_argv(lab, "node1"), "ip", "-json", "link", "show", "master", "mncni0"])) < 2:
        for pod in lab.node("node1")["pods"]:
            labs.add_pod(lab, "node1", pod)
    wait_whole(lab, lines)


def left_of(name):
    """What is left of a lab, as words: its directory, namespaces, and the processes and mounts that name it."""
    left = [path for path in (f"/run/{name}", f"/run/netns/{name}-underlay") if os.path.lexists(path)]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked
            words = (process / "cmdline").read_bytes() + (process / "mountinfo").read_bytes()
            if f"{name}/".encode() in words or f"{name}\0".encode() in words:
                left.append(f"process {process.name}: {(process / 'cmdline').read_bytes()}")
    return left


def wait_for_nothing_left(name):
    """The kernel takes its time for the last process, not for long."""
    with contextlib.suppress(labs.LabError):
        labs.wait_until(lambda: not left_of(name), 5, "clean machine")
    assert left_of(name) == []


# ---------------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------------
@pytest.mark.vm
def test_every_pod_and_node_reaches_every_pod_and_only_wireguard_is_on_the_underlay(story, figure):
    counts, rows = story["counts"], story["rows"]
    assert len(rows) == 4 * 3 + 2 * 4
    assert [row for row in rows if labs.is_lost(row)] == []
    assert (counts["clear"], counts["other"], counts["dropped"]) == (0, 0, 0), counts["samples"]
    assert labs.judge_capture(counts, rows) == []
    figure(f"lab: first pong {story['pongs'][0]:.1f} s after the start, {len(rows)} pairs by {story['pongs'][-1]:.1f} s")
    figure(f"lab: {counts['wireguard']} WireGuard packets on the underlay, {counts['clear']} clear, {counts['dropped']} dropped")


@pytest.mark.vm
def test_between_nodes_the_path_is_the_tunnel_and_within_a_node_the_bridge(story):
    paths = {(row["node"] == row["to_node"], bool(row["pod"])): row["path"] for row in story["rows"] if row["node"] == "node1"}
    assert paths == {
        (True, True): "bridge mncni0",
        (True, False): "bridge mncni0",
        (False, True): "mncni0 > mncni-host > mncni-wg0 > underlay (WireGuard) > node2 mncni0",
        (False, False): "mncni-host > mncni-wg0 > underlay (WireGuard) > node2 mncni0",
    }


@pytest.mark.kernel("wireguard")
def test_where_the_kernel_has_wireguard_the_tunnel_is_the_kernels(lab):
    for node in lab.nodes():
        links = labs.look([*labs.node_argv(lab, node), "ip", "-n", "mncni-wg", "-json", "-details", "link", "show", "dev", "mncni-wg0"])
        assert links[0]["linkinfo"]["info_kind"] == "wireguard"
        assert shell(lab, node, "pgrep -x wireguard-go || ls -A /run/wireguard 2>/dev/null || true") == ""
        transferred = shell(lab, node, "ip netns exec mncni-wg wg show mncni-wg0 transfer").split()[1:]
        assert len(transferred) == 2 and all(int(count) > 0 for count in transferred)


@pytest.mark.vm
def test_a_remote_pod_sees_its_node_under_the_pod_gateway_address(lab):
    """Any other source address would be dropped by the peer."""
    address = labs.pod_record(lab, "node2", "pod1")["addresses"][0]
    server = "import socket; s = socket.create_server(('', 80)); print('ready', flush=True); print(s.accept()[1][0])"
    child = labs.start([*labs.pod_argv(lab, "node2", "pod1"), labs.PYTHON, "-c", server], stdout=subprocess.PIPE)
    try:
        assert labs.read_line(child, HEAL_S) == "ready"
        shell(lab, "node1", f"{labs.PYTHON} -c \"import socket; socket.create_connection(('{address}', 80), 10)\"")
        assert labs.read_line(child, HEAL_S) == "10.244.1.1"
    finally:
        child.kill()
        child.communicate()


# ---------------------------------------------------------------------------------------------------------------------------
# Fails closed
# ---------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", [pytest.param(part, marks=[pytest.mark.vm] if part in DAMAGES_IN_VM else []) for part in DAMAGES])
def test_nothing_goes_in_clear_without(part, lab, whole):
    commands, may_answer = DAMAGES[part]
    kill_agent(lab)
    counts, answered = damage(lab, commands)
    assert (counts["clear"], counts["other"], counts["dropped"]) == (0, 0, 0), counts["samples"]
    assert set(answered) <= set(may_answer)


@pytest.mark.vm
def test_without_the_floor_the_sniffer_sees_packets_in_clear(lab, whole, figure):
    """The test of the tests above: had the floor a hole, they would notice."""
    kill_agent(lab)
    counts, _ = damage(lab, [DELETE_TUNNEL, DELETE_FLOOR_ROUTES, DELETE_FLOOR_RULES, DELETE_FLOOR_TABLE])
    assert counts["clear"] > 0
    pods = [labs.pod_record(lab, node, "pod1")["addresses"][0] for node in ("node1", "node2")]
    assert f"{pods[0]} > {pods[1]} icmp" in counts["samples"]
    assert labs.judge_capture(counts, []) != []
    figure(f"lab: with the floor taken away too: {counts['clear']} clear packets seen")


@pytest.mark.vm
def test_killing_the_agent_stops_no_traffic(lab, whole):
    kill_agent(lab)
    counts, answered = damage(lab, [])
    assert answered == list(CROSSINGS) and counts["clear"] == 0


@pytest.mark.vm
def test_a_running_agent_heals_a_deleted_tunnel(lab, whole, figure):
    damage(lab, [DELETE_TUNNEL])
    figure(f"lab: tunnel deleted, healed by the running agent and every ping answered {wait_whole(lab, whole):.1f} s later")


@pytest.mark.vm
def test_a_new_agent_heals_all_that_was_destroyed_while_there_was_none(lab, whole, figure):
    kill_agent(lab)
    damage(lab, [DELETE_NAMESPACE, DELETE_FLOOR_ROUTES, DELETE_FLOOR_RULES, DELETE_FLOOR_TABLE])
    labs.start_agent(lab, "node1")
    figure(f"lab: tunnel and floor destroyed, every ping answered {wait_whole(lab, whole):.1f} s after the start of a new agent")


def test_an_agent_that_has_to_make_a_new_bridge_puts_the_pods_on_it(lab, whole):
    kill_agent(lab)
    damage(lab, ["ip link delete mncni0"])
    labs.start_agent(lab, "node1")
    labs.wait_until(lambda: is_whole(lab, whole), HEAL_S, "pods on the new bridge")


# ---------------------------------------------------------------------------------------------------------------------------
# Reboot
# ---------------------------------------------------------------------------------------------------------------------------
def test_after_a_boot_the_old_conflist_attaches_no_pod_before_the_agent_is_ready(lab):
    conflist = lab.dir / "node1/etc/cni/net.d/10-mncni.conflist"
    before = conflist.read_text()
    labs.kill_node(lab, "node1")
    labs.start_node(lab, "node1")
    assert conflist.read_text() == before
    assert labs.must([*labs.node_argv(lab, "node1"), labs.PYTHON, "-c", EARLY_CALLS]) == "STATUS 50\nADD 11\n"
    labs.start_agent(lab, "node1")
    for pod in lab.node("node1")["pods"]:
        labs.add_pod(lab, "node1", pod)  # tries again until the agent is ready, as kubelet does
    labs.wait_until(lambda: len(crossings_that_answer(lab)) == len(CROSSINGS), HEAL_S, "answer to each ping")


@pytest.mark.vm
def test_a_reboot_gives_a_new_boot_id_and_brings_the_pods_back(lab, figure):
    boot_id, container_id = lab.node("node1")["boot_id"], labs.pod_record(lab, "node1", "pod1")["container_id"]
    begin = time.monotonic()
    done = lab_py("reboot", "node1")
    assert done.returncode == 0, done.stdout
    assert lab.node("node1")["boot_id"] not in ("", boot_id)
    assert shell(lab, "node1", "cat /proc/sys/kernel/random/boot_id").strip() == lab.node("node1")["boot_id"]
    assert labs.pod_record(lab, "node1", "pod1")["container_id"] not in ("", container_id)
    labs.wait_until(lambda: len(crossings_that_answer(lab)) == len(CROSSINGS), HEAL_S, "answer to each ping")
    figure(f"lab: reboot of a node, until every ping is answered again: {time.monotonic() - begin:.1f} s")
    assert len(shell(lab, "node1", "ls /run/netns").split()) == 3  # mncni-wg and the pods: nothing of the time before


# ---------------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------------
def test_exec_passes_the_exit_status_and_the_output(lab):
    assert lab_py("exec", "node1", "--", "sh", "-c", "hostname; exit 7").returncode == 7
    done = lab_py("exec", "node2/pod1", "--", "sh", "-c", "ip -brief -4 address show eth0; exit 3")
    assert done.returncode == 3 and "10.244.2.2/24" in done.stdout


@pytest.mark.parametrize(
    "words, answer",
    [
        (("exec", "node9", "--", "true"), "lab.py: no node 'node9'; the nodes are: node1 node2\n"),
        (("exec", "node1/pod9", "--", "true"), "lab.py: no pod 'pod9' on node1; the pods are: pod1 pod2\n"),
        (("runtime", "check", "node1/pod9"), "lab.py: no pod pod9\n"),
        (("runtime", "add", "node9/web"), "lab.py: no node 'node9'; the nodes are: node1 node2\n"),
        (("runtime", "add", "node1/mncni-wg"), "lab.py: /run/netns/mncni-wg exists, and is of no pod; use another name\n"),
        (("exec", "node1"), "lab.py: exec: the command is missing; for example: lab.py exec node1/pod1 -- ip address\n"),
        (("reboot", "node9"), "lab.py: no node 'node9'; the nodes are: node1 node2\n"),
        (("up",), f"lab.py: the lab {NAME} is up; end it with: lab.py --name {NAME} down\n"),
    ],
)
def test_what_is_not_possible_is_said_in_one_line_and_changes_nothing(words, answer, lab):
    before = lab.file.read_text()
    done = lab_py(*words)
    assert (done.returncode, done.stdout) == (1, answer)
    assert lab.file.read_text() == before


def test_a_pod_of_the_runtime_command_is_one_like_the_others(lab):
    ports = {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}], "typo": 1}
    added = lab_py("runtime", "add", "node2/web", json.dumps(ports))
    try:
        assert added.returncode == 0 and "left out, as no plugin declares this capability: typo" in added.stdout
        (line,) = [line for line in lab_py("status").stdout.splitlines() if line.startswith("node2/web")]
        assert line.split()[1].startswith("10.244.2.") and line.split()[-1] == "ok"
        assert f" {line.split()[1]}/24" in lab_py("exec", "node2/web", "--", "ip", "-brief", "address").stdout
        assert {("", "web"), ("pod1", "web")} <= {(pair["pod"], pair["to_pod"]) for pair in labs.plan_pairs(lab)}
        assert "8080" in shell(lab, "node2", "nft list table inet mncni_portmap")
        inside = lab_py("exec", "node2", "--", "/opt/mncni/lab.py", "runtime", "check", "web")
        assert (inside.returncode, inside.stdout) == (0, "")
    finally:
        assert lab_py("runtime", "del", "node2/web").returncode == 0
    assert "node2/web" not in lab_py("status").stdout
    assert lab_py("runtime", "del", "node2/web").returncode == 0


def test_a_plugin_without_its_execute_bit_is_named_and_nothing_is_left_of_the_pod(lab):
    def left():
        return shell(lab, "node1", f"ls {labs.PODS_DIR} /run/netns /var/lib/cni/mncni/mncni /var/lib/cni/results; ip -o link | wc -l")

    before, bits = left(), "/opt/cni/bin/mncni"
    shell(lab, "node1", f"chmod -x {bits}")
    try:
        done = lab_py("runtime", "add", "node1/web")
    finally:
        shell(lab, "node1", f"chmod +x {bits}")
    assert (done.returncode, left()) == (1, before)
    assert done.stdout.startswith("lab.py: STATUS of mncni in network mncni: ") and done.stdout.endswith(f"chmod +x {bits}\n")


CHROOT = """
mount --make-rprivate / && mount -t tmpfs tmpfs "$0" && mkdir "$0/root" && mount --rbind / "$0/root"
exec chroot "$0/root" "$@"
"""
DIRECTORY = """
mount --make-rprivate / && mount -t tmpfs tmpfs "$0" && mkdir "$0/root" && cd "$0/root"
for path in /*; do
  if [ -L "$path" ]; then cp -P "$path" ".$path"; elif [ -d "$path" ]; then mkdir ".$path" && mount --rbind "$path" ".$path"; fi
done
exec chroot "$0/root" "$@"
"""


@pytest.mark.parametrize("how", [CHROOT, DIRECTORY], ids=["mount", "directory"])
def test_in_a_chroot_it_says_what_to_use_in_its_place(tmp_path, how):
    argv = ["unshare", "--mount", "sh", "-ec", how, str(tmp_path), labs.PYTHON, str(labs.LAB_FILE), "--name", f"{NAME}-jail", "up"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "this is a chroot" in done.stderr and "systemd-nspawn" in done.stderr
    assert left_of(f"{NAME}-jail") == []


def test_status_shows_nodes_and_pods_and_ping_answers_with_its_exit_status(lab):
    nodes, pods = lab_py("status").stdout.strip().split("\n\n")
    assert [line.split()[0::3] for line in nodes.splitlines()[1:]] == [["node1", "running", "ok"], ["node2", "running", "ok"]]
    assert [line.split()[0::3] for line in pods.splitlines()[1:]] == [[f"{node}/{pod}", "ok"] for node, pod in lab.pods()]
    ping = lab_py("ping")
    assert ping.returncode == 0 and "20 pairs pinged, none lost a ping" in ping.stdout


@pytest.mark.vm
def test_demo_shows_table_and_verdict_and_leaves_nothing(figure):
    name = f"{NAME}-demo"
    begin = time.monotonic()
    done = lab_py("demo", name=name)
    assert done.returncode == 0, done.stdout
    table = [line.split()[0:3] for line in done.stdout.splitlines() if line.startswith(("FROM", "node"))]
    assert table[0] == ["FROM", "TO", "ADDRESS"] and ["node1/pod1", "node2/pod1", "10.244.2.2"] in table and len(table) == 21
    assert "20 pairs pinged, none lost a ping" in done.stdout
    assert ("WireGuard: the kernel's" if kernel_has("wireguard") else "WireGuard: wireguard-go") in done.stdout
    assert "the underlay carried nothing in the clear: all pod traffic was inside WireGuard" in done.stdout
    figure(f"lab: demo, from start to exit: {time.monotonic() - begin:.1f} s")
    wait_for_nothing_left(name)


def test_an_agent_that_dies_at_once_is_told_with_its_last_words_and_nothing_is_left(tmp_path):
    name = f"{NAME}-dead"
    (tmp_path / "agent.py").write_text("raise SystemExit('these are my last words')\n")
    for part in ("mncni.py", "kube.py"):
        (tmp_path / part).write_text("")
    done = lab_py("up", "--source", str(tmp_path), name=name)
    assert done.returncode == 1
    assert done.stdout.endswith("the agent died; the end of /var/log/mncni-agent.log:\n    these are my last words\n")
    wait_for_nothing_left(name)


def test_up_down_and_down_again_leaves_nothing():
    name = f"{NAME}-small"
    try:
        done = lab_py("up", "--nodes", "1", "--pods", "1", name=name)
        assert done.returncode == 0, done.stdout
        assert len(left_of(name)) > 2  # the test of wait_for_nothing_left
        assert json.loads(Path(f"/run/{name}/lab.json").read_text())["nodes"]["node1"]["pods"] == ["pod1"]
    finally:
        assert lab_py("down", name=name).returncode == 0
        assert lab_py("down", name=name).returncode == 0
    wait_for_nothing_left(name)


def test_down_touches_no_directory_that_is_not_a_lab():
    name = f"{NAME}-other"
    directory = Path(f"/run/{name}")
    directory.mkdir()
    try:
        assert lab_py("down", name=name).returncode == 0
        assert directory.is_dir()
        done = lab_py("up", name=name)
        assert (done.returncode, done.stdout) == (1, f"lab.py: {directory} exists and is not a lab; use another --name\n")
    finally:
        directory.rmdir()


INTERRUPTS = {
    "Ctrl-C, the underlay just built": ("underlay: bridge", os.killpg, signal.SIGINT, 130),
    "Ctrl-C, a node just booted": ("node1: booted", os.killpg, signal.SIGINT, 130),
    "Ctrl-C, pods being attached": ("node1/pod1: ", os.killpg, signal.SIGINT, 130),
    "SIGTERM to the lab alone": ("node2: agent ready", os.kill, signal.SIGTERM, 143),
}


@pytest.mark.parametrize("interrupt", INTERRUPTS)
def test_an_interrupted_up_leaves_nothing_after(interrupt):
    moment, send, number, exit_status = INTERRUPTS[interrupt]
    name = f"{NAME}-int"
    # A session of its own: Ctrl-C of a terminal goes to a whole process group too.
    child = labs.start(
        [labs.PYTHON, str(labs.LAB_FILE), "--name", name, "up"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    text = ""
    try:
        while moment not in text:
            line = child.stdout.readline()
            assert line, text
            text += line
        send(child.pid, number)
        text += child.stdout.read()
        assert child.wait(HEAL_S) == exit_status, text
        assert text.endswith("] down\n" if number == signal.SIGTERM else "] down\nlab.py: interrupted\n")
        assert "problem" not in text
        wait_for_nothing_left(name)
    finally:
        child.kill()
        child.communicate()
        lab_py("down", name=name)
