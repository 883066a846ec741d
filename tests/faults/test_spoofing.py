"""What a pod may send with spoofCheck: frames that speak for somebody else die at its veth, and the same frames arrive without spoofCheck.

The attacker sends raw frames by AF_PACKET sockets. Each goes to a multicast MAC of its own, by which listeners on the victim's interface
and on the bridge know it. Beside them are the pod's own frames of each kind, which must arrive with spoofCheck, too.
"""

import ipaddress
import json
import select
import subprocess
import time

import pytest

import mncni
from tests.integration.conftest import Host

pytestmark = pytest.mark.root

SEND = """
import socket, sys
sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sender.bind(("eth0", 0))
for line in sys.stdin:
    sender.send(bytes.fromhex(line))
"""
# The same, but the kernel has only the Ethernet header at hand, the rest is in pages.
SEND_PAGES = """
import mmap, socket, struct, sys
sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sender.bind(("eth0", 0))
sender.setsockopt(263, 13, struct.pack("4I", 4096, 1, 2048, 2))  # SOL_PACKET, PACKET_TX_RING: two frames in a page
ring = mmap.mmap(sender.fileno(), 4096)
for number, line in enumerate(sys.stdin):
    frame, place = bytes.fromhex(line), number % 2 * 2048
    ring[place + 32 : place + 32 + len(frame)] = frame
    ring[place : place + 16] = struct.pack("LII", 1, len(frame), len(frame))  # TP_STATUS_SEND_REQUEST
    sender.send(b"")
"""
LISTEN = r"""
import re, socket, sys
taps = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
taps.bind((sys.argv[1], 3))
print("up", flush=True)
while True:
    frame, (_, _, kind, *_) = taps.recvfrom(65536)
    if kind != socket.PACKET_OUTGOING:
        for mark in re.findall(rb"\x03MARK.", frame, re.S):
            print(mark.hex(), flush=True)
"""
ALL, LLDP, STP = "ff:ff:ff:ff:ff:ff", "01:80:c2:00:00:0e", "01:80:c2:00:00:00"
ELSE_MAC, ELSE4, ELSE6 = "0a:58:0a:58:00:63", "10.88.0.99", "fd00:88::99"


def packed(mac):
    return bytes.fromhex(mac.replace(":", ""))


def ip(address):
    return ipaddress.ip_address(address).packed


def ether(source, kind, payload, to=ALL):
    return packed(to) + packed(source) + kind.to_bytes(2, "big") + payload


def arp(source, sender_mac, sender, target, operation=2, to=ALL):
    body = bytes.fromhex("00010800 0604") + operation.to_bytes(2, "big") + packed(sender_mac) + ip(sender) + bytes(6) + ip(target)
    return ether(source, 0x0806, body, to)


def checksum(data):
    data += bytes(len(data) % 2)
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).to_bytes(2, "big")


def ipv4(source, sender, target, payload=bytes(20), protocol=17, to=ALL, fragment=0):
    head = bytes([0x45, 0]) + (20 + len(payload)).to_bytes(2, "big") + bytes(2) + fragment.to_bytes(2, "big") + bytes([64, protocol])
    head += bytes(2) + ip(sender) + ip(target)
    return ether(source, 0x0800, head[:10] + checksum(head) + head[12:] + payload, to)


def ipv6(source, sender, target, payload, protocol=58, to=ALL):
    head = bytes.fromhex("60000000") + (len(payload)).to_bytes(2, "big") + bytes([protocol, 255]) + ip(sender) + ip(target)
    return ether(source, 0x86DD, head + payload, to)


def icmpv6(kind, body, sender, target, code=0):
    message = bytes([kind, code, 0, 0]) + body
    pseudo = ip(sender) + ip(target) + len(message).to_bytes(4, "big") + bytes([0, 0, 0, 58])
    return message[:2] + checksum(pseudo + message) + message[4:]


def neighbour(kind, source, sender, address, option="", to="ff02::1"):
    """A neighbour solicitation (135) or advertisement (136) about an address; option: the MAC that it says."""
    body = (b"\xa0" if kind == 136 else b"\0") + bytes(3) + ip(address)
    body += bytes([kind - 134, 1]) + packed(option) if option else b""
    return ipv6(source, sender, to, icmpv6(kind, body, sender, to))


def message(net, kind, body, sender, to="ff02::1"):
    return ipv6(net.mac, sender, to, icmpv6(kind, body, sender, to))


def echo(source, sender, target):
    return ipv6(source, sender, target, icmpv6(128, bytes(4) + bytes(8), sender, target))


def fragments(source, sender, target, message, first):
    """A packet in two fragments, the first with `first` bytes."""
    heads = [bytes([58, 0, 0, 1]) + b"frag", bytes([58, 0]) + first.to_bytes(2, "big") + b"frag"]
    return [ipv6(source, sender, target, head + part, 44) for head, part in zip(heads, (message[:first], message[first:]))]


class Net:
    """A network of its own on a host: an attacker and a victim, and listeners."""

    def __init__(self, host, name, check):
        self.host, self.name, self.bridge = host, name, f"{name}0"
        ranges = [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd00:88::/64"}]]
        keys = {"name": name, "bridge": self.bridge, "spoofCheck": check, "ipam": {"dataDir": f"{host.tmp}/data", "ranges": ranges}}
        self.conf, self.pods, self.results, self.listeners, self.sent = host.conf(**keys), {}, {}, [], [0]
        for pod in ("attacker", "victim"):
            self.add(pod)
        self.mac, self.ip4, self.ip6 = self.own("attacker")
        self.victim_mac, self.victim4, self.victim6 = self.own("victim")
        self.link_local = str(mncni.link_local(self.mac))
        self.gateway_mac = json.loads(host.ip(f"-json link show dev {self.bridge}"))[0]["address"]
        self.listen(self.pods["victim"], "eth0")
        self.listen(f"/run/netns/{host.netns}", self.bridge)

    def add(self, pod, **keys):
        self.pods[pod] = self.host.pod(f"{self.name}-{pod}")
        self.results[pod] = self.host.add({**self.conf, **keys}, pod, self.pods[pod])
        return self.results[pod]

    def own(self, pod):
        result = self.results[pod]
        return result["interfaces"][2]["mac"], *(each["address"].partition("/")[0] for each in result["ips"])

    def listen(self, netns, device):
        argv = ["nsenter", f"--net={netns}", "/usr/bin/python3", "-c", LISTEN, device]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, bufsize=0)
        assert process.stdout.readline() == b"up\n"
        self.listeners.append(process)

    def send(self, frames, pod="attacker", program=SEND):
        argv = ["nsenter", f"--net={self.pods[pod]}", "/usr/bin/python3", "-c", program]
        subprocess.run(argv, input="\n".join(frame.hex() for frame in frames), text=True, check=True, timeout=60)

    def arrives(self, frames, program=SEND):
        """Whether all frames, sent by the attacker, get to the victim or the bridge. After them goes one that does."""
        frames = [*frames, echo(self.mac, self.ip6, "ff02::1")]
        self.sent = [(self.sent[-1] + 1 + number) % 256 for number in range(len(frames))]
        marks = [b"\3MARK%c" % number for number in self.sent]
        self.send([mark + frame[6:] if frame[:6] != packed(STP) else frame + mark for frame, mark in zip(frames, marks)], program=program)
        marks = [mark.hex().encode() for mark in marks]
        heard = set()
        for listener in self.listeners:
            own, deadline = set(), time.monotonic() + 10
            while marks[-1] not in own:
                assert select.select([listener.stdout], [], [], max(0, deadline - time.monotonic()))[0], "the last frame arrives"
                own.add(listener.stdout.readline().strip())
            heard |= own
        return set(marks) <= heard

    def learnt(self, mac):
        """The port behind which the bridge sees a MAC, "" if it knows none."""
        rows = json.loads(self.host.sh(f"bridge -json fdb show br {self.bridge}"))
        return next((row["ifname"] for row in rows if row["mac"] == mac and row.get("master") == self.bridge), "")

    def close(self):
        for listener in self.listeners:
            listener.kill()
            listener.wait()
            listener.stdout.close()


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    host = Host(tmp_path_factory.mktemp("host"))
    checked, free = Net(host, "checked", True), Net(host, "free", False)
    yield checked, free
    checked.close()
    free.close()
    host.close()


ATTACKS = {
    # in ARP
    "ARP: the gateway's address is at my MAC": lambda n: [arp(n.mac, n.mac, "10.88.0.1", n.victim4)],
    "ARP: the victim's address is at my MAC, to the gateway": lambda n: [arp(n.mac, n.mac, n.victim4, "10.88.0.1", 1, n.gateway_mac)],
    "ARP: the victim's address, gratuitous": lambda n: [arp(n.mac, n.mac, n.victim4, n.victim4, 1)],
    "ARP: my address is at the victim's MAC": lambda n: [arp(n.mac, n.victim_mac, n.ip4, "10.88.0.1")],
    "ARP: a probe for the victim's address": lambda n: [arp(n.mac, n.mac, "0.0.0.0", n.victim4, 1)],
    "ARP: an answer from nobody": lambda n: [arp(n.mac, n.mac, "0.0.0.0", n.ip4, 2)],
    # in neighbour discovery
    "NDP: the gateway's address is at my MAC": lambda n: [neighbour(136, n.mac, n.ip6, "fd00:88::1", n.mac)],
    "NDP: the same, from the gateway's address": lambda n: [neighbour(136, n.mac, "fd00:88::1", "fd00:88::1", n.mac)],
    "NDP: the gateway's link-local address": lambda n: [neighbour(136, n.mac, n.link_local, "fe80::1", n.mac)],
    "NDP: the victim's address is at my MAC": lambda n: [neighbour(136, n.mac, n.ip6, n.victim6, n.mac)],
    "NDP: who has it? says the victim at my MAC": lambda n: [neighbour(135, n.mac, n.victim6, "fd00:88::1", n.mac)],
    "NDP: my address is at the victim's MAC": lambda n: [neighbour(136, n.mac, n.ip6, n.ip6, n.victim_mac)],
    "NDP: who has it? says my address at the victim's MAC": lambda n: [neighbour(135, n.mac, n.ip6, "fd00:88::1", n.victim_mac)],
    "NDP: is the victim's address in use?": lambda n: [neighbour(135, n.mac, "::", n.victim6)],
    "NDP: in two fragments": lambda n: fragments(
        n.mac, n.ip6, "ff02::1", icmpv6(136, b"\xa0" + bytes(3) + ip("fd00:88::1") + b"\2\1" + packed(n.mac), n.ip6, "ff02::1"), 8)[:1],
    "NDP: behind an extension header": lambda n: [ipv6(n.mac, n.ip6, "ff02::1", bytes([58, 0, 1, 4, 0, 0, 0, 0]) + icmpv6(
        136, b"\xa0" + bytes(3) + ip("fd00:88::1") + b"\2\1" + packed(n.mac), n.ip6, "ff02::1"), 60)],
    "NDP: with a second option": lambda n: [ipv6(n.mac, n.ip6, "ff02::1", icmpv6(
        136, b"\xa0" + bytes(3) + ip(n.ip6) + bytes([14, 1]) + bytes(6) + b"\2\1" + packed(n.victim_mac), n.ip6, "ff02::1"))],
    "a router advertisement": lambda n: [message(n, 134, bytes.fromhex("40000708") + bytes(8), n.link_local)],
    "a redirect": lambda n: [message(n, 137, bytes(4) + ip("fd00:88::1") + ip(ELSE6), n.link_local, n.victim6)],
    # sources
    **{f"IPv4 from {what}": lambda n, address=address: [ipv4(n.mac, address, n.victim4, to=n.victim_mac)] for what, address in {
        "the gateway": "10.88.0.1", "a neighbour": ELSE4, "a remote pod": "10.244.9.9", "a node": "192.0.2.55", "a Service": "10.96.0.1",
        "the world": "198.51.100.1", "127.0.0.1": "127.0.0.1", "nobody": "0.0.0.0"}.items()},
    **{f"IPv6 from {what}": lambda n, address=address: [echo(n.mac, address, n.victim6)] for what, address in {
        "the gateway": "fd00:88::1", "a neighbour": ELSE6, "a remote pod": "fd00:99::9", "the world": "2001:db8::1", "::1": "::1",
        "another link-local address": "fe80::99", "nobody": "::"}.items()},
    "an IPv4 fragment from a neighbour": lambda n: [ipv4(n.mac, ELSE4, n.victim4, fragment=1)],
    "a DHCP server's answer": lambda n: [ipv4(n.mac, "10.88.0.1", "255.255.255.255", bytes.fromhex("00430044") + bytes(20))],
    # frames
    "a neighbour's MAC": lambda n: [ipv4(n.victim_mac, n.ip4, "10.88.0.1")],
    "a MAC of nobody": lambda n: [ipv4(ELSE_MAC, n.ip4, "10.88.0.1")],
    "a BPDU": lambda n: [packed(STP) + packed(n.mac) + (38).to_bytes(2, "big") + bytes.fromhex("424203 0000000000") + bytes(34)],
    "LLDP to all": lambda n: [ether(n.mac, 0x88CC, bytes(46))],
    "an unknown protocol": lambda n: [ether(n.mac, 0x1234, bytes(46))],
    "a VLAN tag": lambda n: [ether(n.mac, 0x8100, b"\0\5\x08\0" + ipv4(n.mac, n.ip4, n.victim4)[14:])],
    "a VLAN tag of VLAN 0": lambda n: [ether(n.mac, 0x8100, b"\0\0\x08\0" + ipv4(n.mac, n.ip4, n.victim4)[14:])],
    "a VLAN tag before ARP": lambda n: [ether(n.mac, 0x8100, b"\0\0\x08\6" + arp(n.mac, n.mac, "10.88.0.1", n.victim4)[14:])],
    "two VLAN tags": lambda n: [ether(n.mac, 0x88A8, b"\0\0\x81\0\0\0\x08\0" + ipv4(n.mac, n.ip4, n.victim4)[14:])],
    # who leads the multicast
    "an IGMP query": lambda n: [ipv4(n.mac, n.ip4, "224.0.0.1", b"\x11\x64\xee\x9b" + bytes(4), 2, "01:00:5e:00:00:01")],
    "an IGMP query that says it is a fragment": lambda n: [
        ipv4(n.mac, n.ip4, "224.0.0.1", b"\x11\x64\xee\x9b" + bytes(4), 2, "01:00:5e:00:00:01", fragment=1)],
    "an MLD query": lambda n: [message(n, 130, bytes(20), n.link_local)],
    "a PIM hello": lambda n: [ipv4(n.mac, n.ip4, "224.0.0.13", b"\x20\0\0\0" + bytes(8), 103)],
}
OWN = {
    "ARP question and answer": lambda n: [arp(n.mac, n.mac, n.ip4, n.victim4, operation) for operation in (1, 2)],
    "ARP: is my address in use?": lambda n: [arp(n.mac, n.mac, "0.0.0.0", n.ip4, 1)],
    "ARP, gratuitous": lambda n: [arp(n.mac, n.mac, n.ip4, n.ip4, 1)],
    "NDP questions": lambda n: [neighbour(135, n.mac, own, n.victim6, n.mac) for own in (n.ip6, n.link_local)],
    "NDP answers": lambda n: [neighbour(136, n.mac, n.ip6, own, n.mac) for own in (n.ip6, n.link_local)],
    "NDP without an option": lambda n: [neighbour(kind, n.mac, n.ip6, n.ip6) for kind in (135, 136)],
    "NDP: is my address in use?": lambda n: [neighbour(135, n.mac, "::", own) for own in (n.ip6, n.link_local)],
    "NDP: the same with a nonce": lambda n: [message(n, 135, bytes(4) + ip(n.ip6) + b"\x0e\1nonces", "::")],
    "MLD reports": lambda n: [
        ipv6(n.mac, own, "ff02::16", b"\x3a\0\5\2\0\0\1\0" + icmpv6(143, bytes(24), own, "ff02::16"), 0) for own in ("::", n.link_local)],
    "IPv4": lambda n: [ipv4(n.mac, n.ip4, n.victim4, to=n.victim_mac)],
    "IPv4 fragments": lambda n: [ipv4(n.mac, n.ip4, n.victim4, fragment=place) for place in (0x2000, 3)],
    "IPv6": lambda n: [echo(n.mac, own, n.victim6) for own in (n.ip6, n.link_local)],
    "IPv6 fragments": lambda n: fragments(n.mac, n.ip6, n.victim6, icmpv6(128, bytes(44), n.ip6, n.victim6), 16),
    "multicast": lambda n: [ipv4(n.mac, n.ip4, "224.0.0.251", to="01:00:5e:00:00:fb"), ipv6(n.mac, n.ip6, "ff02::fb", bytes(16), 17)],
    "IGMP reports": lambda n: [ipv4(n.mac, n.ip4, "224.0.0.22", b"\x22\0\xdd\xff" + bytes(4), 2)],
}


PROGRAMS = pytest.mark.parametrize("program", [SEND, SEND_PAGES], ids=["whole", "in pages"])


@PROGRAMS
@pytest.mark.parametrize("name", ATTACKS)
def test_a_frame_that_speaks_for_another_dies_at_the_veth(nets, name, program):
    checked, free = nets
    assert free.arrives(ATTACKS[name](free), program), "without spoofCheck it arrives"
    before = dropped(checked.host)
    assert not checked.arrives(ATTACKS[name](checked), program)
    assert dropped(checked.host) > before


@PROGRAMS
@pytest.mark.parametrize("name", OWN)
def test_what_a_pod_says_for_itself_arrives(nets, name, program):
    checked, _ = nets
    before = dropped(checked.host)
    assert checked.arrives(OWN[name](checked), program)
    assert dropped(checked.host) == before


def dropped(host):
    [counter] = [item["counter"] for item in json.loads(host.sh("nft -j list counters"))["nftables"] if "counter" in item]
    return counter["packets"]


@pytest.mark.parametrize("to", [ALL, LLDP, STP, "01:80:c2:00:00:02"])
def test_the_bridge_learns_no_mac_from_a_pod_but_its_own(nets, to):
    """Neither one of nobody, of which a pod could send a million, nor the victim's, whose packets it would get. The frames to LLDP's
    address and its like pass by the firewall."""
    checked, free = nets
    free.host.ip(f"link set dev {free.bridge} type bridge no_linklocal_learn 0")
    nobody = f"0a:58:00:00:00:{to[-2:]}"
    for net in nets:
        net.send([ipv4(net.victim_mac, net.victim4, "10.88.0.1")], "victim")
        net.send([ipv4(source, net.ip4, ELSE4, to=to) for source in (nobody, net.victim_mac)])
    assert free.learnt(nobody) == free.results["attacker"]["interfaces"][1]["name"]
    assert not checked.learnt(nobody)
    assert checked.learnt(checked.victim_mac) == checked.results["victim"]["interfaces"][1]["name"]


COUNT_INPUT = "table inet probe {{ chain input {{ type filter hook input priority 10; iifname {} meta l4proto {{ 17, 58 }} counter; }}; }}"
ADVERTISEMENT = bytes.fromhex("40000708") + bytes(8)


@pytest.mark.parametrize("to", [LLDP, "01:80:c2:00:00:02", "01:80:c2:00:00:03"])
def test_the_host_hears_no_lie_that_is_addressed_to_the_bridges_own_neighbours(nets, to):
    """The bridge hands frames to LLDP's address and its like to the host, which takes them as come in by the pod's veth: packets from other
    pods, nodes and the world, and router advertisements."""
    heard = {}
    for net in nets:
        veth, lies = net.results["attacker"]["interfaces"][1]["name"], (ELSE4, "192.0.2.55", "198.51.100.1")
        advertisement = icmpv6(134, ADVERTISEMENT, net.link_local, "ff02::1")
        frames = [ipv4(net.mac, source, "10.88.0.1", to=to) for source in lies]
        net.host.sh(f"nft '{COUNT_INPUT.format(veth)}'")
        net.send([*frames, ipv6(net.mac, net.link_local, "ff02::1", advertisement, to=to)])
        assert net.arrives([]), "what was sent before has been looked at"
        listed = json.loads(net.host.sh("nft -j list chain inet probe input; nft delete table inet probe"))["nftables"]
        words = [word for item in listed for word in item.get("rule", {}).get("expr", [])]
        heard[net.name] = next(word["counter"]["packets"] for word in words if "counter" in word)
    assert heard == {"checked": 0, "free": 4}


@pytest.mark.parametrize("to", ["33:33:00:00:00:01", LLDP])
def test_a_host_that_does_not_forward_ipv6_believes_no_pod_that_calls_itself_a_router(tmp_path, to):
    """Nor does it get a default route that leads to the pod."""
    host = Host(tmp_path)
    try:
        host.sh("for name in all default; do echo 0 >/proc/sys/net/ipv6/conf/$name/forwarding; done")
        for check in (True, False):
            pod = host.pod(f"pod{check}")
            links = host.add(host.conf(spoofCheck=check), f"c{check}", pod)["interfaces"]
            own = str(mncni.link_local(links[2]["mac"]))
            frame = ipv6(links[2]["mac"], own, "ff02::1", icmpv6(134, ADVERTISEMENT, own, "ff02::1"), to=to)
            argv = ["nsenter", f"--net={pod}", "/usr/bin/python3", "-c", SEND]
            subprocess.run(argv, input=frame.hex(), text=True, check=True, timeout=60)
            believed = [route["dev"] for route in json.loads(host.ip("-6 -json route show default") or "[]")]
            assert believed == ([links[1]["name"]] if not check and to == LLDP else []), "a veth without spoofCheck believes"
    finally:
        host.close()
