"""Pods and a server outside the cluster, whose packets go through the agent's masquerade: none is lost, a connection outlives segments that
conntrack calls invalid, and no packet arrives with a pod's address."""

import contextlib
import json
import os
import subprocess
import time

import pytest

from deploy import lab as labs
from tests.e2e.conftest import lab_up

pytestmark = pytest.mark.root

OUTSIDE, NODE1 = "192.0.2.200", "192.0.2.1"
PODS = ("pod1", "pod2")
COUNT = 10_000  # datagrams of each pod

SEND_MANY = """
import resource, socket, sys, time
address, tag, first, count = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3]), int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100, count + 100))
senders = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
for number, sender in enumerate(senders):
    sender.bind(("", first + number))
    sender.connect((address, 9999))
print("ready", flush=True)
begin = float(sys.stdin.readline())
for number, sender in enumerate(senders):
    while time.monotonic() < begin + number / 10_000:  # both pods send at the same moment: that is when ports collide
        pass
    sender.send(tag)
"""

COUNT_MANY = """
import json, socket, sys
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiver.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE
receiver.bind((sys.argv[1], 9999))
print("ready", flush=True)
receiver.settimeout(20)
found = set()
try:
    while len(found) < int(sys.argv[2]):
        found.add(receiver.recvfrom(64))
        receiver.settimeout(3)
except TimeoutError:
    pass
print(json.dumps([len(found), sorted({source[0] for _, source in found})]))
"""

# Serves one connection: sends stray segments between two answers. The sequence number is the kernel's own (TCP_REPAIR).
STRAY = """
import json, socket, struct, sys, time
address, own, flags, offset = sys.argv[1], *map(int, sys.argv[2:])
server = socket.create_server((address, own))
print("ready", flush=True)
server.settimeout(20)
stream, (peer, port) = server.accept()
stream.settimeout(20)
stream.sendall(stream.recv(100))
time.sleep(0.2)  # until it is acknowledged
numbers = []
stream.setsockopt(socket.IPPROTO_TCP, 19, 1)
for queue in (2, 1):  # what is sent, what is received
    stream.setsockopt(socket.IPPROTO_TCP, 20, queue)
    numbers.append(struct.unpack("I", stream.getsockopt(socket.IPPROTO_TCP, 21, 4))[0])
stream.setsockopt(socket.IPPROTO_TCP, 19, -1)
def sum_of(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
def segment(checksum):
    body = struct.pack("!HHIIBBHHH", own, port, (numbers[0] + offset) % (1 << 32), numbers[1], 80, flags, 500, checksum, 0)
    return body + b"stray!"
pseudo = socket.inet_aton(address) + socket.inet_aton(peer) + struct.pack("!BBH", 0, 6, len(segment(0)))
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
    for _ in range(3):
        raw.sendto(segment(sum_of(pseudo + segment(0))), (peer, 0))
        time.sleep(0.1)
try:
    stream.sendall(stream.recv(100))
    print("alive")
except OSError as error:
    print(error)
"""

TALK = """
import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) as stream:
    for text in (b"one", b"two"):
        stream.sendall(text)
        assert stream.recv(100) == text
        time.sleep(1.0)
print("alive")
"""

# Counts frames with a pod's address, and marked frames with any, until it is told to stop.
SNIFF = """
import json, select, socket, sys
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
print("ready", flush=True)
clear = marked = 0
while sys.stdin not in (readable := select.select([sniffer, sys.stdin], [], [])[0]):
    frame = sniffer.recv(2000)
    clear += frame[12:14] == b"\\x08\\x00" and frame[26:28] == bytes([10, 244])
    marked += b"stray!" in frame
print(json.dumps([clear, marked]))
"""

# Sends what belongs to no connection: TCP segments with some flags, an answer to no ping, and a datagram to show that packets do arrive.
SEND_INVALID = """
import socket, struct, sys
address, own = sys.argv[1:3]
def sum_of(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
    for flags in (1, 4, 17, 20, 18, 0, 63):  # FIN, RST, FIN+ACK, RST+ACK, SYN+ACK, none, all
        def segment(checksum):
            return struct.pack("!HHIIBBHHH", 5000 + flags, 7777, 1, 1, 80, flags, 500, checksum, 0) + b"stray!"
        pseudo = socket.inet_aton(own) + socket.inet_aton(address) + struct.pack("!BBH", 0, 6, len(segment(0)))
        raw.sendto(segment(sum_of(pseudo + segment(0))), (address, 0))
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
    def reply(checksum):
        return struct.pack("!BBHHH", 0, 0, checksum, 1, 1) + b"stray!"
    raw.sendto(reply(sum_of(reply(0))), (address, 0))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    sender.sendto(b"stray!", (address, 7777))
"""

@pytest.fixture(scope="module")
def lab():
    with lab_up(f"mncni-outside-{os.getpid()}", pods=2, families=("ipv4",)) as made:
        labs.must(["ip", "-n", made.underlay, "address", "add", f"{OUTSIDE}/24", "dev", labs.BRIDGE])
        labs.must(["ip", "-n", made.underlay, "link", "set", "lo", "up"])
        yield made


@contextlib.contextmanager
def program(prefix, text, *arguments):
    """A program that has said that it is ready."""
    argv = [*prefix, labs.PYTHON, "-c", text, *map(str, arguments)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def outside(lab):
    return ["ip", "netns", "exec", lab.underlay]


def pod(lab, name):
    return labs.pod_argv(lab, "node1", name)


@pytest.mark.alone  # a busy machine's sockets overflow
def test_two_pods_that_use_the_same_source_ports_lose_no_datagram(lab, figure):
    with program(outside(lab), COUNT_MANY, OUTSIDE, 2 * COUNT) as server, contextlib.ExitStack() as entered:
        senders = [entered.enter_context(program(pod(lab, name), SEND_MANY, OUTSIDE, name, 20_000, COUNT)) for name in PODS]
        begin = time.monotonic() + 0.5
        for sender in senders:
            sender.stdin.write(f"{begin}\n")
            sender.stdin.flush()
        arrived, sources = json.loads(server.stdout.readline())
    figure(f"two pods, the same source ports, one server outside: {arrived} of {2 * COUNT} datagrams arrive")
    assert (arrived, sources) == (2 * COUNT, [NODE1])


ACK, PUSH_ACK, FIN_ACK, RST_ACK = 16, 24, 17, 20
STRAYS = {
    "data beyond the window": (PUSH_ACK, 1 << 30),
    "data long before the window": (PUSH_ACK, -(1 << 30)),
    "an end beyond the window": (FIN_ACK, 1 << 30),
    "a reset beyond the window": (RST_ACK, 1 << 30),
}


@pytest.mark.parametrize("stray", STRAYS)
def test_a_connection_to_outside_outlives_a_segment_that_conntrack_calls_invalid(lab, stray):
    port = 8000 + list(STRAYS).index(stray)
    with program(outside(lab), STRAY, OUTSIDE, port, *STRAYS[stray]) as server:
        code, said, error = labs.run([*pod(lab, "pod1"), labs.PYTHON, "-c", TALK, OUTSIDE, str(port)])
        assert (code, said, server.stdout.readline()) == (0, "alive\n", "alive\n"), error


def test_no_packet_that_conntrack_calls_invalid_arrives_with_a_pods_address(lab):
    address = labs.pod_record(lab, "node1", "pod1")["addresses"][0]
    with program(outside(lab), SNIFF) as sniffer:
        labs.must([*pod(lab, "pod1"), labs.PYTHON, "-c", SEND_INVALID, OUTSIDE, address])
        time.sleep(0.5)
        sniffer.stdin.write("stop\n")
        sniffer.stdin.flush()
        clear, marked = json.loads(sniffer.stdout.readline())
    assert (clear, marked > 0) == (0, True)


REFUSED = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 7778), 5)
except ConnectionRefusedError:
    print("refused")
"""


def test_a_port_that_nobody_listens_on_still_refuses_at_once(lab):
    other = labs.pod_record(lab, "node2", "pod1")["addresses"][0]
    for prefix, address in ((outside(lab), NODE1), (pod(lab, "pod1"), OUTSIDE), (pod(lab, "pod1"), other), (pod(lab, "pod1"), NODE1)):
        assert labs.must([*prefix, labs.PYTHON, "-c", REFUSED, address]) == "refused\n"
