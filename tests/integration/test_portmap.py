"""portmap on a real kernel: from the world, from the host, from pods, with all that may be in the way."""

import json
import os
import re
import shutil
import subprocess

import pytest

import mncni

NFT_VERSION = (
    re.search(r"v(\d+)", subprocess.run(["nft", "--version"], capture_output=True, text=True).stdout) if shutil.which("nft") else None
)
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not NFT_VERSION or int(NFT_VERSION.group(1)) < 1, reason="portmap needs nft >= 1.0: older ones know no such maps"),
]

# Says its name to whoever connects or sends a word, on port 80. Arguments: protocol, name.
SERVER = """
import socket, sys
protocol, name = sys.argv[1], sys.argv[2].encode()
if protocol == "udp":
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.bind(("::", 80))
else:
    server = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 132 if protocol == "sctp" else 0)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("::", 80))
    server.listen(200)
print("up", flush=True)
while True:
    if protocol == "udp":
        word, sender = server.recvfrom(100)
        server.sendto(name + b" " + sender[0].encode(), sender)
    else:
        connection, sender = server.accept()
        connection.sendall(name + b" " + sender[0].encode())
        connection.close()
"""
# Prints what a server says, "nothing" if there is none. Arguments: protocol, address, port, count.
CLIENT = """
import socket, sys, time
protocol, address, port, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
for _ in range(count):
    said = b""
    for attempt in range(3 if protocol == "udp" else 1):
        try:
            with socket.socket(family, kind, 132 if protocol == "sctp" else 0) as client:
                client.settimeout(1 if protocol == "udp" else 5)
                client.connect((address, port))
                if protocol == "udp":
                    client.send(b"word")
                said = client.recv(100)
        except OSError:
            continue
        if said:
            break
    print(said.decode() or "nothing", flush=True)
    time.sleep(0.01 if count > 1 else 0)
"""
# Prints how many of many UDP flows got no answer. Arguments: address, count.
FAST_CLIENT = """
import socket, sys
missed = 0
for _ in range(int(sys.argv[2])):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.connect((sys.argv[1], 8080))
        client.send(b"word")
        try:
            client.recv(100)
        except OSError:
            missed += 1
print(missed)
"""
HOST = {4: "192.0.2.1", 6: "2001:db8::1"}
WORLD = {4: "192.0.2.9", 6: "2001:db8::9"}


class Cluster:
    """A host with an address towards the world, and pods with servers."""

    def __init__(self, host):
        self.host, self.servers = host, []
        # Linux 6.1 asks for a neighbour on behalf of others from a link-local address alone: the bridge needs one, and at once.
        host.sh("echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad")
        self.world = host.pod("world")
        host.ip(f"link add to-world type veth peer name eth0 netns {self.world}")
        for netns, link, addresses in (("", "to-world", HOST), (self.world, "eth0", WORLD)):
            host.ip(f"address add {addresses[4]}/24 dev {link}", netns=netns)
            host.ip(f"address add {addresses[6]}/64 dev {link} nodad", netns=netns)
            host.ip(f"link set {link} up", netns=netns)
        for family in HOST:
            host.ip(f"-{family} route add default via {HOST[family]}", netns=self.world)
        ranges = [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd88::/64"}]]
        self.conf = host.conf(plugin=["naivewg", "portmap"], ipam={"dataDir": f"{host.tmp}/data", "ranges": ranges})

    def add(self, container_id, *mappings, serve="tcp", **keys):
        """(configuration, result, namespace) of a new pod with host ports; it serves on port 80."""
        pod = self.host.pod(container_id)
        conf = {**self.conf, "runtimeConfig": {"portMappings": list(mappings)}, **keys}
        result = self.host.add(conf, container_id, pod)
        self.host.ip("link set lo up", netns=pod)
        if serve:
            self.serve(pod, serve, container_id)
        return conf, result, pod

    def serve(self, netns, protocol, name):
        argv = ["nsenter", f"--net={netns or self.netns}", "/usr/bin/python3", "-c", SERVER, protocol, name]
        server = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        self.servers.append(server)
        assert server.stdout.readline() == "up\n"

    @property
    def netns(self):
        return f"/run/netns/{self.host.netns}"

    def ask(self, netns, address, port=8080, protocol="tcp"):
        """What the server behind an address says: its name and the client's address as it sees it; "nothing" if nobody answers."""
        argv = ["nsenter", f"--net={netns or self.netns}", "/usr/bin/python3", "-c", CLIENT, protocol, address, str(port), "1"]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout.strip().replace("::ffff:", "")

    def who(self, *arguments, **options):
        return self.ask(*arguments, **options).split()[0]

    def delete(self, container_id, conf=None, netns=""):
        assert self.host.cni("DEL", conf or self.conf, container_id, netns) == (0, None, "")


@pytest.fixture
def cluster(host):
    made = Cluster(host)
    yield made
    for server in made.servers:
        server.kill()
        server.wait()
        server.stdout.close()


def mapping(port=8080, protocol="tcp", **keys):
    return {"hostPort": port, "containerPort": 80, "protocol": protocol, **keys}


def table(host):
    return host.sh("nft list table inet mncni_portmap", check=False)


def filter_bridged_traffic(host, is_on):
    """bridge-nf-call-iptables and -ip6tables, where the kernel has them."""
    for family in ("", "6"):
        path = f"/proc/sys/net/bridge/bridge-nf-call-ip{family}tables"
        host.sh(f"if [ -e {path} ]; then echo {is_on} >{path}; fi")


SCTP = pytest.param("sctp", marks=pytest.mark.kernel("sctp"))


@pytest.mark.parametrize("bridged_traffic_is_filtered", [0, 1])
@pytest.mark.parametrize("protocol", ["tcp", "udp", SCTP])
def test_a_host_port_is_reached_from_everywhere(host, cluster, protocol, bridged_traffic_is_filtered):
    filter_bridged_traffic(host, bridged_traffic_is_filtered)
    _, _, pod = cluster.add("server", mapping(protocol=protocol), serve=protocol)
    _, _, other = cluster.add("other", serve=None)
    pods = {4: ("10.88.0.2", "10.88.0.3"), 6: ("fd88::2", "fd88::3")}
    for family, address in HOST.items():
        assert cluster.ask(cluster.world, address, protocol=protocol) == f"server {WORLD[family]}"
        assert cluster.who("", address, protocol=protocol) == "server"
        assert cluster.who(other, address, protocol=protocol) == "server"
        assert cluster.who(pod, address, protocol=protocol) == "server"
        assert cluster.who(cluster.world, address, port=8081, protocol=protocol) == "nothing"
        assert cluster.ask(other, pods[family][0], port=80, protocol=protocol) == f"server {pods[family][1]}"  # straight, as ever
    assert cluster.who("", "127.0.0.1", protocol=protocol) == "server"


@pytest.mark.parametrize("bridged_traffic_is_filtered", [0, 1])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_no_host_port_depends_on_marks_and_labels_that_others_write(host, cluster, protocol, bridged_traffic_is_filtered):
    """An engine for network policies writes a connection's whole label with its verdict, and other programs the connection's mark. nft
    itself can only add bits to a label, so the text of the table must show that no rule looks at one."""
    filter_bridged_traffic(host, bridged_traffic_is_filtered)
    hooks = ("prerouting -110", "prerouting -90", "input 0", "output -90", "output 0", "forward 0", "postrouting 95", "postrouting 110")
    host.sh("nft add table inet engine")
    for number, hook in enumerate(hooks):
        host.sh(f"nft 'add chain inet engine c{number} {{ type filter hook {hook.replace(' ', ' priority ')}; }}'")
        host.sh(f"nft add rule inet engine c{number} ct label set 1 ct mark set 1 counter")
    host.ip("address add 192.0.2.2/24 dev to-world")
    _, _, pod = cluster.add("server", mapping(protocol=protocol), serve=protocol)
    cluster.add("given", mapping(protocol=protocol, hostIP="192.0.2.2"), serve=protocol)
    _, _, other = cluster.add("other", serve=None)
    for address in HOST.values():
        who = [cluster.who(netns, address, protocol=protocol) for netns in (cluster.world, "", other, pod)]
        assert who == ["server"] * 4, address
    who = [cluster.who(netns, "192.0.2.2", protocol=protocol) for netns in (cluster.world, "", other, pod)]
    assert who == ["given"] * 4
    assert cluster.who("", "127.0.0.1", protocol=protocol) == "server"
    counted = host.sh("nft list table inet engine")
    assert counted.count("packets 0 ") == 0, counted
    assert "label" not in table(host) and "ct mark" not in table(host)


@pytest.mark.kernel("br_netfilter")
@pytest.mark.parametrize("bridged_traffic_is_filtered", [0, 1])
def test_a_service_that_others_translate_keeps_the_clients_address(host, cluster, bridged_traffic_is_filtered):
    """kube-proxy's business is not ours, although the pod has a host port of the same number. What the pod sees tells; where netfilter
    does not see bridged packets, the reply takes another way and the client cannot know it."""
    cluster.add("server", mapping(port=80, protocol="udp"), serve="udp")
    _, _, other = cluster.add("other", serve=None)
    filter_bridged_traffic(host, bridged_traffic_is_filtered)
    host.sh("nft 'add table inet kube; add chain inet kube p { type nat hook prerouting priority -100; }'")
    host.sh("nft 'add chain inet kube seen { type filter hook postrouting priority 300; }'")
    for ip, service, client, server in (("ip", "10.96.0.1", "10.88.0.3", "10.88.0.2"), ("ip6", "fd96::1", "fd88::3", "fd88::2")):
        target = server if ip == "ip" else f"[{server}]"
        host.sh(f"nft add rule inet kube p {ip} daddr {service} udp dport 80 dnat {ip} to {target}:80")
        host.sh(f"nft add rule inet kube seen {ip} daddr {server} udp dport 80 {ip} saddr {client} counter comment {ip}-kept")
        host.sh(f"nft add rule inet kube seen {ip} daddr {server} udp dport 80 {ip} saddr != {client} counter comment {ip}-changed")
        said = cluster.ask(other, service, port=80, protocol="udp")
        assert said == (f"server {client}" if bridged_traffic_is_filtered else "nothing")
        counted = host.sh("nft list chain inet kube seen")
        assert re.search(f'packets [1-9].*"{ip}-kept"', counted) and re.search(f'packets 0 .*"{ip}-changed"', counted), counted


def test_traffic_in_transit_to_the_same_port_is_left_alone(host, cluster):
    cluster.add("server", mapping(port=80))
    cluster.serve(cluster.world, "tcp", "world")
    _, _, pod = cluster.add("client", serve=None)
    for address in WORLD.values():
        assert cluster.ask(pod, address, port=80) in ("world 10.88.0.3", "world fd88::3")


def test_a_given_host_address_wins_over_any(host, cluster):
    host.ip("address add 192.0.2.2/24 dev to-world")
    cluster.add("any", mapping())
    cluster.add("given", mapping(hostIP="192.0.2.2"))
    assert cluster.who(cluster.world, "192.0.2.1") == "any"
    assert cluster.who(cluster.world, "192.0.2.2") == "given"
    assert cluster.who(cluster.world, HOST[6]) == "any"


def test_a_host_address_of_one_family_leaves_the_other_alone(host, cluster):
    cluster.add("four", mapping(hostIP="0.0.0.0"))
    cluster.add("six", mapping(hostIP=HOST[6]))
    assert cluster.who(cluster.world, HOST[4]) == "four"
    assert cluster.who(cluster.world, HOST[6]) == "six"


def test_the_newest_pod_has_the_port_and_an_old_ones_del_takes_nothing_from_it(host, cluster):
    cluster.add("old", mapping())
    cluster.add("new", mapping())
    assert cluster.who(cluster.world, HOST[4]) == "new"
    cluster.delete("old")
    assert cluster.who(cluster.world, HOST[4]) == "new"


def test_an_old_pod_that_still_runs_gets_its_port_back(host, cluster):
    conf, result, pod = cluster.add("old", mapping())
    cluster.add("new", mapping())
    exit_code, error, _ = host.cni("CHECK", {**conf, "prevResult": result}, "old", pod)
    assert (exit_code, error["code"]) == (1, 100)
    assert "lacks the rule ports: meta nfproto ipv4 tcp dport 8080 dnat ip to 10.88.0.2:80" in error["details"]
    cluster.delete("new")
    assert cluster.who(cluster.world, HOST[4]) == "old"
    assert host.cni("CHECK", {**conf, "prevResult": result}, "old", pod) == (0, None, "")


def test_addresses_of_services_that_kube_proxy_keeps_are_not_the_nodes_own(host, cluster):
    """In its IPVS mode they are on kube-ipvs0, a dummy device, so they are local. A Service's port is no host port."""
    host.ip("link add kube-ipvs0 type bridge")  # some kernels have no dummy
    host.ip("address add 10.96.0.1/32 dev kube-ipvs0")
    cluster.add("server", mapping())
    _, _, pod = cluster.add("client", serve=None)
    assert cluster.who(pod, "10.88.0.1") == "server"
    assert cluster.who(pod, "10.96.0.1") != "server" and cluster.who("", "10.96.0.1") != "server"


def test_a_host_address_that_another_pod_names_changes_no_check(host, cluster):
    """Nobody has that address at the moment, as with a virtual address that is on another node."""
    cluster.add("other", {**mapping(port=9000), "hostIP": "203.0.113.9"}, {**mapping(port=9001), "hostIP": "127.0.0.1"})
    conf, result, pod = cluster.add("server", mapping())
    assert host.cni("CHECK", {**conf, "prevResult": result}, "server", pod) == (0, None, "")
    assert restore(host) == ""


def test_a_stream_of_udp_follows_the_port_to_the_next_pod(host, cluster):
    """Without our help conntrack would send it to the old pod, or to the host, for as long as it flows."""
    with subprocess.Popen(
        ["nsenter", f"--net={cluster.world}", "/usr/bin/python3", "-c", STREAM, HOST[4], HOST[6]], stdout=subprocess.PIPE, text=True
    ) as stream:
        try:
            wait_for(stream, {"4 nothing", "6 nothing"})
            cluster.add("one", mapping(protocol="udp"), serve="udp")
            wait_for(stream, {"4 one", "6 one"})
            cluster.add("two", mapping(protocol="udp"), serve="udp")
            wait_for(stream, {"4 two", "6 two"})
            cluster.delete("two")
            wait_for(stream, {"4 one", "6 one"})
            cluster.delete("one")
            wait_for(stream, {"4 nothing", "6 nothing"})
        finally:
            stream.kill()


# One socket a family, always from the same port, ten words a second; prints each change of who answers.
STREAM = """
import select, socket, sys, time
clients = {}
for family, address in (("4", sys.argv[1]), ("6", sys.argv[2])):
    client = socket.socket(socket.AF_INET6 if family == "6" else socket.AF_INET, socket.SOCK_DGRAM)
    if family == "6":
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    client.bind(("", 5353))
    clients[family] = (client, (address, 8080))
last, heard = {}, {family: time.monotonic() for family in clients}
while True:
    for family, (client, to) in clients.items():
        client.sendto(b"word", to)
        while select.select([client], [], [], 0.05)[0]:
            said = client.recv(100).decode().split()[0]
            heard[family] = time.monotonic()
            if last.get(family) != said:
                last[family] = said
                print(family, said, flush=True)
        if time.monotonic() - heard[family] > 1 and last.get(family) != "nothing":
            last[family] = "nothing"
            print(family, "nothing", flush=True)
"""


def wait_for(stream, words):
    """Read lines of the stream until all of the words came; no answer at all for 30 s is a failure."""
    missing = set(words)
    while missing:
        line = stream.stdout.readline().strip()
        assert line, f"the stream ended without {missing}"
        missing.discard(line)


def test_connections_are_not_lost_while_others_host_ports_come_and_go(host, cluster, figure):
    cluster.add("server", mapping())
    pods = [(f"p{number}", host.pod(f"p{number}")) for number in range(5)]
    argv = ["nsenter", f"--net={cluster.world}", "/usr/bin/python3", "-c", CLIENT, "tcp", HOST[4], "8080", "500"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as client:
        came_and_went = 0
        while client.poll() is None and came_and_went < 400:
            container_id, pod = pods[came_and_went % 5]
            if came_and_went >= 5:
                cluster.delete(container_id, netns=pod)
            conf = {**cluster.conf, "runtimeConfig": {"portMappings": [mapping(port=9000 + came_and_went % 5)]}}
            host.add(conf, container_id, pod)
            came_and_went += 1
        answers = client.communicate(timeout=120)[0].replace("::ffff:", "").split("\n")
    figure(
        f"portmap: 500 connections, {answers.count('server 192.0.2.9')} answered, while host ports of 5 pods changed {came_and_went} times"
    )
    assert answers.count("server 192.0.2.9") == 500
    assert came_and_went > 5


@pytest.mark.parametrize("client", ["host of the world", "pod of the node"])
def test_no_packet_misses_the_rules_while_they_are_replaced(host, cluster, figure, tmp_path, client):
    """The table is written anew without a pause. The first packet of a connection must meet the old rules or the new ones. A pod of the
    node also needs the masquerade."""
    filter_bridged_traffic(host, 0)
    cluster.add("server", mapping(protocol="udp"), serve="udp")
    netns = cluster.world if client == "host of the world" else cluster.add("client", serve=None)[2]
    states = list(mncni.look_ports(f"{host.tmp}/run").values())
    command = mncni.plan_portmap(states, list(HOST.values()), after=f"flush {mncni.PORTMAP}\n")
    (tmp_path / "table.nft").write_text(command.stdin)
    rewrite = f"while nft -f {tmp_path}/table.nft; do echo; done"
    argv = ["nsenter", f"--net={netns}", "/usr/bin/python3", "-c", FAST_CLIENT, HOST[4], "30000"]
    with subprocess.Popen(["nsenter", f"--net={cluster.netns}", "sh", "-c", rewrite], stdout=subprocess.PIPE, text=True) as writer:
        try:
                missed = int(subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout)
        finally:
            writer.terminate()
        times = writer.stdout.read().count("\n")
    figure(f"portmap: of 30000 UDP flows from a {client} {missed} missed the rules, which were replaced {times} times meanwhile")
    assert missed == 0
    assert times > 5


def test_nothing_is_left_and_foreign_tables_are_as_they_were(host, cluster):
    host.sh("nft 'add table ip theirs; add map ip theirs m { type inet_service : ipv4_addr; elements = { 80 : 10.0.0.1 }; }'")
    host.sh(
        "nft 'add chain ip theirs c { type nat hook prerouting priority -100; }; add rule ip theirs c counter dnat to tcp dport map @m'"
    )
    before = host.sh("nft --stateless list ruleset")
    confs = {
        f"c{number}": cluster.add(f"c{number}", mapping(port=8000 + number), mapping(port=53, protocol="udp"), serve=None)
        for number in range(3)
    }
    assert table(host)
    for container_id, (conf, _, _) in confs.items():
        cluster.delete(container_id, conf)
        cluster.delete(container_id, conf)
    assert host.sh("nft --stateless list ruleset") == before
    assert host.files() == []


def test_gc_gives_back_the_ports_of_pods_that_are_no_more(host, cluster):
    cluster.add("gone", mapping(port=1))
    cluster.add("kept", mapping(port=2))
    cluster.add(
        "elsewhere",
        mapping(port=3),
        name="other",
        bridge="other0",
        ipam={"dataDir": f"{host.tmp}/data", "ranges": [[{"subnet": "10.89.0.0/24"}]]},
    )
    keep = {"cni.dev/valid-attachments": [{"containerID": "kept", "ifname": "eth0"}]}
    assert host.cni("GC", {**cluster.conf, **keep}) == (0, None, "")
    text = table(host)
    assert "tcp dport 2 " in text and "tcp dport 3 " in text and "tcp dport 1 " not in text


def test_check_names_what_is_missing_and_restore_puts_it_right(host, cluster):
    conf, result, pod = cluster.add("server", mapping(), mapping(port=53, protocol="udp"))
    checked = {**conf, "prevResult": result}
    whole = table(host)
    for harm in (
        "nft flush ruleset",
        "nft flush chain inet mncni_portmap postrouting",
        "nft flush chain inet mncni_portmap guard",
        "nft -a list table inet mncni_portmap | sed -n 's/.*udp dport 53.*handle/delete rule inet mncni_portmap ports handle/p' | nft -f -",
    ):
        host.sh(harm)
        exit_code, error, _ = host.cni("CHECK", checked, "server", pod)
        assert (exit_code, error["code"]) == (1, 100), harm
        restored = restore(host)
        assert "restored: " in restored, harm
        assert table(host) == whole
        assert host.cni("CHECK", checked, "server", pod) == (0, None, "")
    assert cluster.who(cluster.world, HOST[4]) == "server"
    assert restore(host) == ""
    host.sh("nft add rule inet mncni_portmap ports tcp dport 99 dnat ip to 10.88.0.2:80")
    assert restore(host) == "restored: nft table inet mncni_portmap has a rule that no pod asked for: a rule without a comment\n"
    assert table(host) == whole
    host.sh("echo 0 >/proc/sys/net/ipv4/conf/mncni0/route_localnet")
    assert "restored: mncni0 does not accept 127.0.0.1" in restore(host)
    assert cluster.who("", "127.0.0.1") == "server"


def restore(host):
    argv = ["nsenter", f"--net=/run/netns/{host.netns}", mncni.__file__, "portmap-restore"]
    environ = {**os.environ, "MNCNI_RUN_DIR": f"{host.tmp}/run"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pods_do_not_reach_the_hosts_loopback(host, cluster):
    """route_localnet opens that way, the guard closes it: CVE-2020-8558."""
    _, _, pod = cluster.add("server", mapping(), serve=None)
    host.sh("nft 'add table ip probe; add chain ip probe i { type filter hook input priority 0; }'")
    host.sh("nft add rule ip probe i iifname mncni0 ip daddr 127.0.0.1 counter")
    host.sh("echo 1 >/proc/sys/net/ipv4/conf/eth0/route_localnet", netns=pod)
    host.ip("-4 route flush table local", netns=pod)
    host.ip("route add local 10.88.0.2 dev eth0 table local", netns=pod)
    host.ip("route add 127.0.0.1 via 10.88.0.1", netns=pod)
    ask = ("127.0.0.1", 80, "udp")
    assert cluster.who(pod, *ask) == "nothing"
    assert "packets 0 " in host.sh("nft list chain ip probe i")
    host.sh("nft flush chain inet mncni_portmap guard")
    assert cluster.who(pod, *ask) == "nothing"
    assert "packets 0 " in host.sh("nft list chain ip probe i"), "tc's filter stands, too"
    host.sh("tc filter delete dev mncni0 ingress pref 127")
    assert cluster.who(pod, *ask) == "nothing"
    assert "packets 3 " in host.sh("nft list chain ip probe i"), "without both it would get there"
    assert restore(host).count("restored: ") == 3
    host.sh("nft delete table inet mncni_portmap")
    host.sh("nft flush chain ip probe i; nft add rule ip probe i iifname mncni0 ip daddr 127.0.0.1 counter")
    assert cluster.who(pod, *ask) == "nothing"
    assert "packets 0 " in host.sh("nft list chain ip probe i")


def test_the_way_to_the_hosts_loopback_closes_with_the_last_host_port(host, cluster):
    """Without host ports there is no guard, and pods are not to reach 127.0.0.1 for that."""
    path = "/proc/sys/net/ipv4/conf/mncni0/route_localnet"
    cluster.add("one", mapping(port=1), serve=None)
    cluster.add("two", mapping(port=2), serve=None)
    cluster.delete("one")
    assert host.sh(f"cat {path}") == "1\n"
    cluster.delete("two")
    assert host.sh(f"cat {path}") == "0\n"
    assert table(host) == ""


def test_torn_states_and_states_of_devices_that_are_gone_stop_nobody(host, cluster):
    gone = {"owner": ["net", "gone", "eth0"], "since": 1, "device": "gone0", "ips": [{"address": "10.88.0.9/24"}]}
    states = os.path.join(host.tmp, "run", "portmap")
    os.makedirs(states)
    for name, text in (("0" * 16, json.dumps({**gone, "mappings": [mapping(port=1)]})), ("1" * 16, '{"owner": ["net"')):
        mncni.write_file(os.path.join(states, name), text)
    cluster.add("server", mapping())
    assert cluster.who(cluster.world, HOST[4]) == "server" and cluster.who("", "127.0.0.1") == "server"
    host.sh("nft flush ruleset")
    assert "restored: " in restore(host)
    assert cluster.who(cluster.world, HOST[4]) == "server"
    assert restore(host) == ""
    cluster.host.cni("DEL", cluster.conf, "server")
    assert "tcp dport 1 " in table(host) and "8080" not in table(host)


def test_a_failed_add_gives_the_port_back(host, cluster):
    conf = {
        **cluster.conf,
        "plugin": ["naivewg", "portmap", "bandwidth"],
        "runtimeConfig": {"portMappings": [mapping()], "bandwidth": {"ingressRate": -1}},
    }
    assert host.cni("ADD", conf, "c1", host.pod("c1"))[0] == 1
    assert table(host) == ""
    assert host.files() == []


def test_behind_the_reference_bridge_it_works_as_well(host, cluster):
    if not os.path.exists("/usr/lib/cni/bridge"):
        pytest.skip("needs the reference plugins: apt-get install containernetworking-plugins")
    pod = host.pod("c1")
    ipam = {"type": "host-local", "dataDir": f"{host.tmp}/data", "subnet": "10.90.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}
    conf = {"cniVersion": "0.4.0", "name": "net", "type": "bridge", "bridge": "cni0", "isGateway": True, "hairpinMode": True, "ipam": ipam}
    result = host.add(conf, "c1", pod, program="/usr/lib/cni/bridge")
    chained = {
        "cniVersion": "0.4.0",
        "name": "net",
        "plugin": "portmap",
        "prevResult": result,
        "runtimeConfig": {"portMappings": [mapping()]},
    }
    host.add(chained, "c1", pod)
    host.ip("link set lo up", netns=pod)
    cluster.serve(pod, "tcp", "server")
    assert cluster.who(cluster.world, HOST[4]) == "server"
    assert cluster.who("", "127.0.0.1") == "server"
    assert cluster.who(pod, HOST[4]) == "server"
    assert host.cni("DEL", json.loads(json.dumps(chained)), "c1", pod) == (0, None, "")
    assert table(host) == ""
