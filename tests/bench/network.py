"""What the way between two nodes costs: pods of MNCNI, against simpler ways over the same kind of WireGuard device, and against flannel.

    bare      from node to node over a WireGuard device in their own namespaces
    routed    the same device, each pod behind a veth pair
    bridged   the same device, each pod on a bridge, as with most networks
    flannel   flannel's WireGuard backend and a bridge, where `deploy/cluster/build.sh flannel` was run and the kernel has WireGuard
    ours      MNCNI
    unruled   MNCNI without any rule of nft

Each way but flannel's has one more thing than the one above it, or one less than ours. They take turns, while no agent runs.
"""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import time

from deploy import lab as labs
from tests import manifests

FLANNEL = manifests.BINARIES.parent / "flannel/flannel"
NODES = ("node1", "node2")
SPACES = ((), ("ip", "netns", "exec", "mncni-wg"))  # of nft, on a node
UNITS = ("Mbit/s", "CPU s/GB", "ms", "s to join")
STREAM = """
import socket, sys, time
server = socket.create_server(("", 5001))
print("up", flush=True)
connection, _ = server.accept()
begin, total = time.monotonic(), 0
while time.monotonic() - begin < float(sys.argv[1]):
    total += len(connection.recv(1 << 18))
print(total * 8 / 1e6 / (time.monotonic() - begin))
"""
SEND = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 5001), timeout=20)
begin = time.monotonic()
while time.monotonic() - begin < float(sys.argv[2]):
    connection.send(bytes(1 << 17))
"""
PUT = "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], sys.argv[2].encode()), timeout=5)"


def throughput(sender, receiver, address, seconds=3):
    """Mbit/s of one TCP connection."""
    with subprocess.Popen([*receiver, labs.PYTHON, "-c", STREAM, str(seconds)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "up\n"
        with subprocess.Popen([*sender, labs.PYTHON, "-c", SEND, address, str(seconds)], stderr=subprocess.DEVNULL) as client:
            measured = float(server.stdout.readline())
            client.kill()
    return measured


def latency_ms(sender, address):
    text = subprocess.run(
        [*sender, "ping", "-n", "-q", "-c", "50", "-i", "0.02", address], capture_output=True, text=True, check=True
    ).stdout
    return float(re.search(r"= [\d.]+/([\d.]+)/", text).group(1))


def busy_s():
    """Seconds for which all processors together have worked, interrupts included."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq = map(int, file.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(way, figures, who, seconds=3):
    """Adds to figures {(who, unit): [figure, ...]}."""
    sender, receiver, address = way
    before = busy_s()
    mbits = throughput(sender, receiver, address, seconds)
    row = {"Mbit/s": mbits, "CPU s/GB": (busy_s() - before) / (mbits * seconds / 8000), "ms": latency_ms(sender, address)}
    for unit, figure in row.items():
        figures.setdefault((who, unit), []).append(figure)


def possible_ways():
    """The names of the ways that can be tried on this machine."""
    probe = ["unshare", "--net", "ip", "link", "add", "probe", "type", "wireguard"]
    kernel = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    with_flannel = ("flannel",) if kernel and FLANNEL.exists() and (manifests.BINARIES / "etcd").exists() else ()
    return ("bare", "routed", "bridged", *with_flannel, "ours", "unruled")


def bench_network(rounds=3, names=("bare", "ours")):
    """{(who, unit): [figures]}. "Mbit/s" of one TCP connection; "CPU s/GB": of both nodes together; "ms" of a ping; "s to join", of flannel
    and ours: from the start of its program on a node that was booted to the first answer from a pod there."""
    lab, figures = labs.Lab(f"mncni-bench-{os.getpid()}", verbose=False), {}
    with contextlib.ExitStack() as ends:
        ends.callback(labs.down, lab)
        ends.enter_context(labs.built_or_undone(lab, 2, 1, labs.LAB_FILE.parents[1], {"families": ["ipv4"], "underlay": "ipv4"}))
        labs.boot_all(lab)
        labs.wait_first_pongs(lab, labs.plan_pairs(lab))
        make_bare(lab)
        ways = make_ways(lab, names, ends, figures)
        for node in NODES:
            labs.stop_agent(lab, node)
        rules = {(node, netns): look_rules([*labs.node_argv(lab, node), *netns]) for node in NODES for netns in SPACES}
        for _ in range(rounds):
            for who, way in ways.items():
                for (node, netns), texts in rules.items():
                    script = "".join(f"add {table}\ndelete {table}\n{text * (who != 'unruled')}" for table, text in texts.items())
                    labs.must([*labs.node_argv(lab, node), *netns, "nft", "-f", "-"], script)
                measure(way, figures, who)
    return figures


def make_ways(lab, names, ends, figures):
    """{who: (argv before the sender's commands, argv before the receiver's, the receiver's address)}."""
    pods = [labs.pod_argv(lab, node, "pod1") for node in NODES]
    ours = (*pods, labs.pod_record(lab, "node2", "pod1")["addresses"][0])
    if "flannel" in names:
        rejoin(lab, ours, figures)
    make = {
        "bare": lambda: (*(labs.node_argv(lab, node) for node in NODES), "192.168.77.2"),
        "routed": lambda: make_pods(lab, "routed", [f"10.75.{number}.1/24" for number in (1, 2)]),
        "bridged": lambda: make_pods(lab, "bridged", [f"10.76.{number}.1/24" for number in (1, 2)], "br-bare"),
        "flannel": lambda: make_flannel(lab, ends, figures),
        "ours": lambda: ours,
        "unruled": lambda: ours,
    }
    return {name: make[name]() for name in names}


def look_rules(argv):
    """{table of MNCNI: its text} of a namespace."""
    tables = [line for line in labs.must([*argv, "nft", "list", "tables"]).splitlines() if "mncni" in line]
    return {table: labs.must([*argv, "nft", "list", *table.split()]) for table in tables}


def make_bare(lab):
    """A WireGuard device bare0 in each node, peers of one another, with the pods' MTU and the routes of make_pods."""
    keys = {}
    mtu = json.loads(labs.must([*labs.pod_argv(lab, "node1", "pod1"), "ip", "-json", "link", "show", "dev", "eth0"]))[0]["mtu"]
    for number, node in enumerate(NODES, 1):
        argv = labs.node_argv(lab, node)
        kernel = labs.run([*argv, "ip", "link", "add", "bare0", "type", "wireguard"])[0] == 0
        if not kernel:
            labs.must([*argv, "wireguard-go", "bare0"])
        script = "umask 077; wg genkey >/run/bare.key; wg set bare0 private-key /run/bare.key listen-port 5555"
        script += f"; ip address add 192.168.77.{number}/24 dev bare0; ip link set bare0 mtu {mtu} up"
        script += f"; ip route add 10.75.{3 - number}.0/24 dev bare0; ip route add 10.76.{3 - number}.0/24 dev bare0"
        labs.must([*argv, "sh", "-ec", script])
        keys[node] = labs.must([*argv, "wg", "show", "bare0", "public-key"]).strip()
    for number, (node, other) in enumerate((NODES, NODES[::-1]), 1):
        allowed = f"192.168.77.{3 - number}/32,10.75.{3 - number}.0/24,10.76.{3 - number}.0/24"
        peer = [keys[other], "endpoint", f"192.0.2.{3 - number}:5555", "allowed-ips", allowed]
        labs.must([*labs.node_argv(lab, node), "wg", "set", "bare0", "peer", *peer])


def make_pods(lab, name, gateways, bridge="", mtu=1440):
    """A pod on each node, behind a gateway ADDRESS/PREFIX on a bridge or on its own veth: the way from the first to the second."""
    argvs, address = [], ""
    for node, gateway in zip(NODES, gateways):
        inside, host = [*labs.node_argv(lab, node), "ip", "netns", "exec", name], f"v-{name}"
        own, (address, prefix) = gateway.partition("/")[0], (f"{gateway.rpartition('.')[0]}.9", gateway.partition("/")[2])
        lines = [f"link add {host} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {name}"]
        if bridge:
            lines += [f"link add {bridge} mtu {mtu} type bridge", f"link set {host} master {bridge}", f"link set {bridge} up"]
        lines += [f"address add {gateway} dev {bridge or host}", f"link set {host} up"]
        labs.must([*labs.node_argv(lab, node), "ip", "netns", "add", name])
        labs.must([*labs.node_argv(lab, node), "ip", "-batch", "-"], "\n".join(lines))
        lines = [f"address add {address}/{prefix} dev eth0", "link set eth0 up", f"route add default via {own}"]
        labs.must([*inside, "ip", "-batch", "-"], "\n".join(lines))
        argvs.append(inside)
    return (*argvs, address)


# ---- flannel, with its own etcd on the first node ----


def start(ends, argv):
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ends.callback(process.wait)
    ends.callback(process.kill)
    return process


def flannel_argv(lab, node):
    words = ["-etcd-endpoints", "http://192.0.2.1:2379", "-iface", "eth0", "-ip-masq", "-subnet-file", "/run/flannel.env"]
    return [*labs.node_argv(lab, node), "/opt/mncni/flannel", *words]


def make_flannel(lab, ends, figures):
    """The way between two pods of flannel."""
    for node in NODES:
        for program in (FLANNEL, manifests.BINARIES / "etcd"):
            shutil.copy(program, lab.inside(node, "/opt/mncni") / program.name)
    urls = [word for kind in ("listen", "advertise") for word in (f"--{kind}-client-urls", "http://192.0.2.1:2379")]
    start(ends, [*labs.node_argv(lab, "node1"), "/opt/mncni/etcd", "--data-dir", "/run/etcd", *urls])
    network = json.dumps({"Network": "10.77.0.0/16", "Backend": {"Type": "wireguard"}})
    pair = {"key": "/coreos.com/network/config", "value": network}
    body = json.dumps({key: base64.b64encode(value.encode()).decode() for key, value in pair.items()})
    put = [*labs.node_argv(lab, "node1"), labs.PYTHON, "-c", PUT, "http://192.0.2.1:2379/v3/kv/put", body]
    labs.wait_until(lambda: labs.run(put)[0] == 0, 120, "etcd")
    for node in NODES:
        flanneld = start(ends, flannel_argv(lab, node))
        labs.wait_until(lab.inside(node, "/run/flannel.env").exists, 120, "flannel")
    said = [dict(line.split("=", 1) for line in lab.inside(node, "/run/flannel.env").read_text().split()) for node in NODES]
    way = make_pods(lab, "flannel", [row["FLANNEL_SUBNET"] for row in said], "cni0", said[0]["FLANNEL_MTU"])
    wait_for_answer(way, "flannel")
    flanneld.kill()
    labs.must([*labs.node_argv(lab, "node2"), "ip", "link", "delete", "flannel-wg"])
    begin = time.monotonic()
    start(ends, flannel_argv(lab, "node2"))
    wait_for_answer(way, "flannel")
    figures["flannel", "s to join"] = [time.monotonic() - begin]
    return way


def wait_for_answer(way, who):
    ping = [*way[0], "ping", "-n", "-c", "1", "-W", "1", way[2]]
    labs.wait_until(lambda: labs.run(ping)[0] == 0, 120, f"answer from a pod of {who}")


def rejoin(lab, way, figures):
    """Start the agent of the second node where there is nothing of its tunnel, as after a boot."""
    labs.stop_agent(lab, "node2")
    labs.must([*labs.node_argv(lab, "node2"), "ip", "netns", "delete", "mncni-wg"])
    begin = time.monotonic()
    labs.start_agent(lab, "node2")
    wait_for_answer(way, "ours")
    figures["ours", "s to join"] = [time.monotonic() - begin]
