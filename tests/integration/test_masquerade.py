"""Masquerade where conntrack is weak: races for a port, and packets that conntrack calls invalid. The pods' network without the agent."""

import subprocess
import textwrap

import pytest

pytestmark = pytest.mark.root

SERVER, NODE = "192.0.2.2", "192.0.2.1"


@pytest.fixture
def outside(host):
    """The namespace of a server beyond the node's underlay, 192.0.2.0/24."""
    path = host.pod("outside")
    host.ip(f"link add eth0 type veth peer name eth0 netns {path}")
    for where, address in ((None, NODE), (path, SERVER)):
        host.ip(f"address add {address}/24 dev eth0", netns=where)
        host.ip("link set eth0 up", netns=where)
    return path


def start(netns, program, *arguments):
    """A Python program in a namespace, as a process whose output can be read."""
    argv = ["nsenter", f"--net={netns}", "/usr/bin/python3", "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


COUNTER = """
    import socket, sys
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE
    server.bind(("", 9000))
    print("ready", flush=True)
    seen = set()
    server.settimeout(2)
    try:
        while True:
            seen.add(server.recv(100))
    except TimeoutError:
        print(len(seen))
"""
# Sends from many ports, 500 at a time, at the moments that the clock gives: the senders race.
SENDER = """
    import socket, sys, time
    name, address, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    for first in range(20000, 20000 + count, 500):
        senders = []
        for port in range(first, first + 500):
            senders.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            senders[-1].bind(("", port))
        begin = time.time() + 0.05
        begin = begin - begin % 0.05
        while time.time() < begin:
            pass
        for port, sender in enumerate(senders, first):
            sender.sendto(f"{name} {port}".encode(), (address, 9000))
"""


def test_datagrams_of_two_pods_with_the_same_source_ports_all_arrive(host, outside):
    count, pods = 10_000, {}
    for name in ("one", "two"):
        pods[name] = host.pod(name)
        host.add(host.conf(ipMasq=True), name, pods[name])
    server = start(outside, COUNTER)
    assert server.stdout.readline() == "ready\n"
    senders = [start(netns, SENDER, name, SERVER, count) for name, netns in pods.items()]
    assert all(sender.wait(60) == 0 for sender in senders)
    assert server.communicate(timeout=60)[0] == f"{2 * count}\n"


# An echo server that, told to, sends a segment far beyond the client's window on the connection that it has.
ECHO = """
    import socket, struct, sys
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
    server = socket.create_server(("", 9001))
    print("ready", flush=True)
    connection, (address, port) = server.accept()

    def checksum(data):
        total = sum(struct.unpack(f"!{len(data) // 2}H", data))
        total = (total >> 16) + (total & 0xFFFF)
        return ~(total + (total >> 16)) & 0xFFFF

    def beyond_the_window():
        sniffer.setblocking(True)
        while True:  # the client's last segment says which sequence numbers are next
            packet = sniffer.recv(2000)
            header = (packet[0] & 15) * 4
            ports = struct.unpack_from("!HH", packet, header)
            if packet[9] == 6 and ports == (port, 9001) and packet.endswith(b"harm"):
                seq, ack = struct.unpack_from("!II", packet, header + 4)
                size = len(packet) - header - (packet[header + 12] >> 4) * 4
                break
        source, destination = socket.inet_aton(sys.argv[1]), socket.inet_aton(address)
        far = (ack + 50_000_000) % 2**32
        segment = struct.pack("!HHIIBBHHH", 9001, port, far, (seq + size) % 2**32, 5 << 4, 16 + 8, 500, 0, 0) + b"data"
        pseudo = source + destination + struct.pack("!BBH", 0, 6, len(segment))
        segment = segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        for _ in range(3):
            raw.sendto(segment, (address, 0))

    while True:
        word = connection.recv(100)
        if not word:
            break
        if word == b"harm":
            beyond_the_window()
        connection.sendall(word)
"""
CLIENT = """
    import socket, sys, time
    with socket.create_connection((sys.argv[1], 9001), timeout=5) as connection:
        for word in (b"one", b"harm", b"two", b"three"):
            time.sleep(0.3)
            connection.sendall(word)
            print(connection.recv(100).decode(), flush=True)
"""


def test_a_segment_beyond_the_window_resets_no_pods_connection(host, outside):
    """conntrack calls it invalid and does not translate it, so it is for the node, which has no such connection."""
    pod = host.pod("pod")
    host.add(host.conf(ipMasq=True), "pod", pod)
    server = start(outside, ECHO, SERVER)
    assert server.stdout.readline() == "ready\n"
    client = start(pod, CLIENT, SERVER)
    said, _ = client.communicate(timeout=60)
    server.kill()
    server.wait()
    assert said.split() == ["one", "harm", "two", "three"]


def test_no_invalid_packet_leaves_with_a_pods_address(host, outside):
    """A reset on a connection that nobody has: conntrack calls it invalid, and translates nothing."""
    pod = host.pod("pod")
    host.add(host.conf(ipMasq=True), "pod", pod)
    host.sh("nft 'add table ip probe; add chain ip probe i { type filter hook input priority 0; }'", netns=outside)
    host.sh("nft add rule ip probe i ip saddr 10.88.0.0/24 counter", netns=outside)
    host.ip(f"route add 10.88.0.0/24 via {NODE}", netns=outside)
    segment = "bytes.fromhex('c0002329' + '00' * 8 + '5004' + '00' * 6)"  # from port 49152 to 9001, RST
    send = f"import socket; s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 6); s.sendto({segment}, ('{SERVER}', 0))"
    host.sh(f'/usr/bin/python3 -c "{send}"', netns=pod)
    assert host.pings(pod, SERVER) == 3
    assert "counter packets 0 " in host.sh("nft list table ip probe", netns=outside)


def test_the_rules_say_what_the_configuration_says_also_after_it_changed(host):
    conf = host.conf(ipMasq=True, clusterCIDRs=["10.0.0.0/8"])
    host.add(conf, "one", host.pod("one"))
    assert "10.88.0.0/24" in host.sh("nft list table inet mncni_masq")
    other = {**conf["ipam"], "ranges": [[{"subnet": "10.99.0.0/24"}]]}
    host.add({**conf, "ipam": other, "forceAddress": True, "clusterCIDRs": []}, "two", host.pod("two"))
    rules = host.sh("nft list table inet mncni_masq")
    assert "10.99.0.0/24" in rules and "10.88.0.0/24" not in rules and "10.0.0.0/8" not in rules
    host.add({**conf, "ipam": other, "ipMasq": False}, "three", host.pod("three"))
    assert "masquerade" not in host.sh("nft list table inet mncni_masq")
