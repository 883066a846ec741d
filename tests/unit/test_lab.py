"""deploy/lab.py without root: how the sniffer judges a frame, and the container runtime's half of the CNI protocol."""

import base64
import json
import random
import re
import socket
import struct

import pytest

from deploy import lab

# ---------------------------------------------------------------------------------------------------------------------------
# The sniffer
# ---------------------------------------------------------------------------------------------------------------------------
POD1, POD2 = "10.244.1.2", "10.244.2.2"
NODE1, NODE2 = "192.0.2.1", "192.0.2.2"
KINDS = {"wireguard", "arp", "nd", "icmp-error", "fragment", "clear", "other"}


def frame(ethertype, packet):
    return bytes(12) + struct.pack("!H", ethertype) + packet


def ipv4(protocol, payload, src=NODE1, dst=NODE2, options=b"", fragment=0):
    head = struct.pack("!BBHHHBBH", 0x45 + len(options) // 4, 0, 20 + len(options) + len(payload), 0, fragment, 64, protocol, 0)
    return frame(0x0800, head + socket.inet_aton(src) + socket.inet_aton(dst) + options + payload)


def ipv6(protocol, payload, src="2001:db8::1", dst="2001:db8::2"):
    head = struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64)
    return frame(0x86DD, head + socket.inet_pton(socket.AF_INET6, src) + socket.inet_pton(socket.AF_INET6, dst) + payload)


def udp(payload, source=28384, target=28384):
    return struct.pack("!HHHH", source, target, 8 + len(payload), 0) + payload


def wireguard(kind, size):
    return bytes([kind, 0, 0, 0]) + bytes(size - 4)


DATA = udp(wireguard(4, 128))
ERROR = bytes([3, 3, 0, 0, 0, 0, 0, 0])  # ICMP: port unreachable, what it is about follows
ERROR6 = bytes([1, 4, 0, 0, 0, 0, 0, 0])


def icmp6(kind):
    return bytes([kind]) + bytes(23)


@pytest.mark.parametrize("build, ip_packet", [(ipv4, "IPv4"), (ipv6, "IPv6")])
@pytest.mark.parametrize("kind, size", [(1, 148), (2, 92), (3, 64), (4, 32), (4, 48), (4, 1372), (4, 1440)])
def test_each_message_of_wireguard_is_wireguard(build, ip_packet, kind, size):
    assert lab.classify(build(17, udp(wireguard(kind, size)))) == "wireguard"
    assert lab.classify(build(17, udp(wireguard(kind, size), source=28384, target=40000))) == "wireguard"
    assert lab.classify(build(17, udp(wireguard(kind, size)))[:60]) in ("wireguard", "clear")


def hop_by_hop(protocol):
    return bytes([protocol, 0, 1, 4, 0, 0, 0, 0])


FRAMES = {
    "data in IPv4 with options": (ipv4(17, DATA, options=bytes(8)), "wireguard"),
    "data in IPv6 behind a hop-by-hop header": (ipv6(0, hop_by_hop(17) + DATA), "wireguard"),
    "data cut off by the capture": (ipv4(17, DATA)[:64], "wireguard"),
    "other port": (ipv4(17, udp(wireguard(4, 128), 51820, 51820)), "clear"),
    "handshake of a wrong length": (ipv4(17, udp(wireguard(1, 149))), "clear"),
    "data of a wrong length": (ipv4(17, udp(wireguard(4, 130))), "clear"),
    "data shorter than a keepalive": (ipv4(17, udp(wireguard(4, 16))), "clear"),
    "type 5": (ipv4(17, udp(wireguard(5, 64))), "clear"),
    "type 0": (ipv4(17, udp(wireguard(0, 64))), "clear"),
    "reserved bytes not zero": (ipv4(17, udp(b"\x04\0\0\x01" + bytes(28))), "clear"),
    "text on WireGuard's port": (ipv4(17, udp(b"GET / HTTP/1.1\r\n\r\n")), "clear"),
    "empty datagram on WireGuard's port": (ipv4(17, udp(b"")), "clear"),
    "first fragment of data": (ipv4(17, DATA, fragment=0x2000), "wireguard"),
    "first fragment of a clear datagram": (ipv4(17, udp(bytes(64), 53, 53), fragment=0x2000), "clear"),
    "later fragment": (ipv4(17, bytes(64), fragment=0x2000 | 185), "fragment"),
    "last fragment": (ipv4(17, bytes(64), fragment=185), "fragment"),
    "first fragment in IPv6": (ipv6(44, bytes([17, 0, 0, 1, 0, 0, 0, 1]) + DATA), "wireguard"),
    "later fragment in IPv6": (ipv6(44, bytes([17, 0, 0, 9, 0, 0, 0, 1]) + bytes(64)), "fragment"),
    "ping of a pod": (ipv4(1, b"\x08\0" + bytes(62), POD1, POD2), "clear"),
    "TCP of a pod": (ipv4(6, bytes(20), POD1, POD2), "clear"),
    "DNS of a pod": (ipv4(17, udp(bytes(40), 40000, 53), POD1, POD2), "clear"),
    "IP in IP": (ipv4(4, ipv4(17, DATA)[14:]), "clear"),
    "IGMP": (ipv4(2, bytes(8)), "clear"),
    "ping in IPv6": (ipv6(58, icmp6(128)), "clear"),
    "TCP in IPv6": (ipv6(6, bytes(20)), "clear"),
    "port unreachable about WireGuard": (ipv4(1, ERROR + ipv4(17, DATA)[14:]), "icmp-error"),
    "redirect of WireGuard": (ipv4(1, b"\x05\x01" + ERROR[2:] + ipv4(17, DATA)[14:]), "icmp-error"),
    "port unreachable about WireGuard in IPv6": (ipv6(58, ERROR6 + ipv6(17, DATA)[14:]), "icmp-error"),
    "port unreachable about a pod's datagram": (ipv4(1, ERROR + ipv4(17, udp(bytes(40), 1, 53), POD1, POD2)[14:]), "clear"),
    "port unreachable about nothing": (ipv4(1, ERROR), "clear"),
    "an error about an error": (ipv4(1, ERROR + ipv4(1, ERROR + ipv4(17, DATA)[14:])[14:]), "clear"),
    "neighbour solicitation": (ipv6(58, icmp6(135)), "nd"),
    "neighbour advertisement": (ipv6(58, icmp6(136)), "nd"),
    "router solicitation": (ipv6(58, icmp6(133)), "nd"),
    "multicast listener report": (ipv6(0, hop_by_hop(58) + icmp6(143)), "nd"),
    "the number of ICMPv6 in IPv4": (ipv4(58, icmp6(135)), "clear"),
    "ARP": (frame(0x0806, bytes(28)), "arp"),
    "VLAN tag": (frame(0x8100, b"\0\x01" + ipv4(1, bytes(8), POD1, POD2)[12:]), "other"),
    "VLAN tag around WireGuard": (frame(0x8100, b"\0\x01" + ipv4(17, DATA)[12:]), "other"),
    "spanning tree": (frame(38, bytes(38)), "other"),
    "IPv4 ethertype around IPv6": (frame(0x0800, ipv6(17, DATA)[14:]), "clear"),
    "IPv6 ethertype around IPv4": (frame(0x86DD, ipv4(17, DATA)[14:]), "clear"),
    "IPv4 header of length 0": (frame(0x0800, b"\x40" + ipv4(17, DATA)[15:]), "clear"),
    "IPv4 without a packet": (frame(0x0800, b""), "clear"),
    "IPv6 without a packet": (frame(0x86DD, b""), "clear"),
    "endless IPv6 options": (ipv6(0, bytes(80)), "clear"),
    "no ethertype": (bytes(13), "other"),
    "nothing": (b"", "other"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_the_kind_of_a_frame_is_right_for(name):
    packet, kind = FRAMES[name]
    assert lab.classify(packet) == kind


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_cut_short_anywhere_is_never_an_exception_nor_more_than_it_was(name):
    packet, kind = FRAMES[name]
    for length in range(len(packet)):
        assert lab.classify(packet[:length]) in (kind, "clear", "other")
        assert lab.describe(packet[:length])


def test_random_frames_are_never_an_exception_and_none_passes_for_wireguard():
    generator = random.Random(28384)
    for _ in range(4000):
        size = generator.randrange(256)
        kind = generator.choice([b"", b"\x08\x00\x45", b"\x86\xdd\x60", b"\x08\x06"])
        packet = (bytes(12) + kind + generator.getrandbits(8 * 256).to_bytes(256, "big"))[:size]
        assert lab.classify(packet) in KINDS - {"wireguard", "icmp-error"}
        assert lab.describe(packet)


@pytest.mark.parametrize(
    "name, words",
    [
        ("ping of a pod", "10.244.1.2 > 10.244.2.2 icmp"),
        ("TCP of a pod", "10.244.1.2 > 10.244.2.2 tcp"),
        ("DNS of a pod", "10.244.1.2 > 10.244.2.2 udp"),
        ("ping in IPv6", "2001:db8::1 > 2001:db8::2 icmpv6"),
        ("multicast listener report", "2001:db8::1 > 2001:db8::2 icmpv6"),
        ("IP in IP", "192.0.2.1 > 192.0.2.2 4"),
        ("VLAN tag", "ethertype 0x8100, 46 bytes"),
        ("IPv4 without a packet", "ethertype 0x0800, 14 bytes"),
        ("nothing", "ethertype 0x, 0 bytes"),
    ],
)
def test_a_description_names_the_ends_and_the_protocol(name, words):
    assert lab.describe(FRAMES[name][0]) == words


COUNTS = {**dict.fromkeys(KINDS, 0), "wireguard": 12, "arp": 2, "nd": 3, "icmp-error": 1, "dropped": 0, "samples": []}
PINGS = [
    {"node": "node1", "to_node": "node2", "received": 3},
    {"node": "node2", "to_node": "node1", "received": 3},
    {"node": "node1", "to_node": "node1", "received": 3},
]


@pytest.mark.parametrize(
    "counts, reasons",
    [
        ({}, []),
        ({"fragment": 2}, []),
        ({"clear": 2, "samples": ["a > b icmp"]}, ["2 clear packets, such as: a > b icmp"]),
        ({"other": 1, "samples": list("abcd")}, ["1 other packets, such as: a; b; c"]),
        ({"dropped": 7}, ["the kernel dropped 7 packets before they were looked at"]),
        ({"wireguard": 11}, ["only 11 WireGuard packets for 12 pings and pongs between nodes"]),
    ],
)
def test_a_capture_proves_only_what_it_can(counts, reasons):
    assert lab.judge_capture({**COUNTS, **counts}, PINGS) == reasons


def test_ping_is_read_and_what_it_does_not_say_is_a_loss():
    text = "3 packets transmitted, 2 received, 33% packet loss, time 402ms\nrtt min/avg/max/mdev = 0.1/0.25/0.4/0.1 ms\n"
    assert lab.parse_ping(text) == {"sent": 3, "received": 2, "rtt_ms": 0.25}
    errors = "2 packets transmitted, 0 received, +2 errors, 100% packet loss, time 1ms"
    assert lab.parse_ping(errors) == {"sent": 2, "received": 0, "rtt_ms": None}
    assert lab.is_lost(lab.parse_ping("ping: connect: Network is unreachable"))


# ---------------------------------------------------------------------------------------------------------------------------
# The container runtime: plans
# ---------------------------------------------------------------------------------------------------------------------------
RECORD = {"pod": "pod1", "container_id": "c" * 64, "netns": "/run/netns/pod1", "capabilities": {"mac": "02:00:00:00:00:01"}}
ATTACHMENT = {
    "container_id": "c" * 64,
    "netns": "/run/netns/pod1",
    "ifname": "eth0",
    "args": {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": "default",
        "K8S_POD_NAME": "pod1",
        "K8S_POD_INFRA_CONTAINER_ID": "c" * 64,
    },
    "capabilities": {"mac": "02:00:00:00:00:01"},
}
CNI_ARGS = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod1;K8S_POD_INFRA_CONTAINER_ID={'c' * 64}"
NETWORK = {"name": "net", "cniVersion": "1.0.0", "plugins": [{"type": "first"}]}


@pytest.mark.parametrize(
    "conf, version",
    [
        ({"cniVersion": "0.3.0"}, "0.3.0"),
        ({"cniVersion": "1.0.0", "cniVersions": ["1.0.0", "1.1.0"]}, "1.1.0"),
        ({"cniVersion": "1.1.0", "cniVersions": ["0.4.0"]}, "1.1.0"),
        ({"cniVersions": ["0.4.0", "0.3.1"]}, "0.4.0"),
        ({"cniVersion": "9.9.9", "cniVersions": ["0.4.0", "10.0.0"]}, "0.4.0"),
    ],
)
def test_the_version_spoken_is_the_highest_offered_that_is_known(conf, version):
    assert lab.plan_version(conf) == version


@pytest.mark.parametrize("conf", [{}, {"cniVersion": "2.0.0"}, {"cniVersion": "0.2.0", "cniVersions": []}])
def test_without_a_known_version_there_is_none_to_speak(conf):
    with pytest.raises(ValueError, match="no version of"):
        lab.plan_version(conf)


def test_a_conflist_and_a_single_conf_become_the_same_kind_of_network():
    text = '{"cniVersion": "0.4.0", "name": "net", "disableCheck": "TRUE", "plugins": [{"type": "a"}, {"type": "b"}]}'
    assert lab.parse_network(text, "x.conflist") == {
        "name": "net", "cniVersion": "0.4.0", "plugins": [{"type": "a"}, {"type": "b"}], "text": text, "disableCheck": True,
    }  # fmt: skip
    text = '{"cniVersion": "0.4.0", "name": "net", "type": "a"}'
    assert lab.parse_network(text, "x.conf") == {
        "name": "net", "cniVersion": "0.4.0", "plugins": [json.loads(text)], "text": text, "disableCheck": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "1", '"text"', "null", "{}",
        '{"name": "n", "type": "a"}',
        '{"cniVersion": "1.0.0", "plugins": [{"type": "a"}]}',
        '{"cniVersion": "1.0.0", "name": "n"}',
        '{"cniVersion": "1.0.0", "name": "n", "plugins": []}',
        '{"cniVersion": "1.0.0", "name": "n", "plugins": null}',
        '{"cniVersion": "1.0.0", "name": "n", "plugins": ["a"]}',
        '{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "a"}, {}]}',
        '{"cniVersion": "1.0.0", "cniVersions": 7, "name": "n", "type": "a"}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration_is_refused_by_its_name(text):
    with pytest.raises(lab.LabError, match=r"^10-x\.conflist: not a "):
        lab.parse_network(text, "10-x.conflist")


def test_a_plugin_gets_its_own_object_with_name_version_and_the_result_before_it():
    plugin = {"type": "first", "name": "other", "cniVersion": "0.3.0", "mtu": 1440}
    assert lab.plan_stdin(NETWORK, plugin, None, {}) == {"type": "first", "name": "net", "cniVersion": "1.0.0", "mtu": 1440}
    assert lab.plan_stdin(NETWORK, plugin, {"ips": []}, {})["prevResult"] == {"ips": []}


def test_a_plugin_gets_only_the_capability_arguments_it_declares():
    plugin = {"type": "first", "capabilities": {"mac": True, "ips": False, "portMappings": True}}
    given = {"mac": "02:00:00:00:00:01", "ips": ["10.0.0.1"], "bandwidth": {}}
    assert lab.plan_stdin(NETWORK, plugin, None, given)["runtimeConfig"] == {"mac": "02:00:00:00:00:01"}
    assert "runtimeConfig" not in lab.plan_stdin(NETWORK, plugin, None, {"bandwidth": {}})
    assert "runtimeConfig" not in lab.plan_stdin(NETWORK, {"type": "first"}, None, given)


def test_the_environment_has_the_variables_of_the_specification():
    assert lab.plan_environment("ADD", ATTACHMENT) == {
        "CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c" * 64, "CNI_NETNS": "/run/netns/pod1", "CNI_IFNAME": "eth0", "CNI_ARGS": CNI_ARGS,
    }  # fmt: skip
    assert lab.plan_environment("STATUS", {}) == {
        "CNI_COMMAND": "STATUS", "CNI_CONTAINERID": "", "CNI_NETNS": "", "CNI_IFNAME": "", "CNI_ARGS": "",
    }  # fmt: skip


def test_a_pod_is_attached_with_the_arguments_of_kubernetes_and_lo_without_capabilities():
    assert lab.plan_attachment(RECORD, "eth0") == ATTACHMENT
    assert lab.plan_attachment(RECORD, "lo") == {**ATTACHMENT, "ifname": "lo", "capabilities": {}}


def test_a_planned_call_is_all_that_is_needed_to_make_it():
    assert lab.plan_call("DEL", NETWORK, NETWORK["plugins"][0], ATTACHMENT, {"ips": []}) == {
        "act": "DEL of first in network net",
        "type": "first",
        "env": lab.plan_environment("DEL", ATTACHMENT),
        "stdin": '{"type": "first", "name": "net", "cniVersion": "1.0.0", "prevResult": {"ips": []}}',
    }


def test_the_cache_has_libcni_s_format():
    cached = lab.plan_cache({**NETWORK, "text": '{"a":1}'}, ATTACHMENT, {"ips": []})
    assert base64.b64decode(cached.pop("config")) == b'{"a":1}'
    assert cached == {
        "kind": "cniCacheV1", "containerId": "c" * 64, "ifName": "eth0", "networkName": "net", "netns": "/run/netns/pod1",
        "cniArgs": [list(pair) for pair in ATTACHMENT["args"].items()], "capabilityArgs": ATTACHMENT["capabilities"], "result": {"ips": []},
    }  # fmt: skip


@pytest.mark.parametrize(
    "answer, result",
    [((0, '{"ips": []}', "warning"), {"ips": []}), ((0, "", ""), None), ((0, " \n", ""), None)],
)
def test_the_answer_of_a_plugin_that_succeeds_is_its_result(answer, result):
    assert lab.parse_answer("ADD of a", *answer) == result


@pytest.mark.parametrize(
    "answer, code, text",
    [
        ((1, '{"code": 7, "msg": "bad mtu", "details": "mtu -1"}', ""), 7, "ADD of a: code 7: bad mtu\nmtu -1"),
        ((1, '{"code": 11, "msg": "later"}', "noise"), 11, "ADD of a: code 11: later"),
        ((1, '{"msg": "no code"}', ""), 999, "ADD of a: code 999: no code"),
        ((2, "", "Traceback"), 999, "ADD of a: code 999: exit status 2 without an error object\nTraceback"),
        ((1, "oops", " and more"), 999, "ADD of a: code 999: exit status 1, and stdout is not a JSON object\noops and more"),
        ((0, "oops", ""), 999, "ADD of a: code 999: exit status 0, and stdout is not a JSON object\noops"),
        ((1, '"oops"', ""), 999, 'ADD of a: code 999: exit status 1, and stdout is not a JSON object\n"oops"'),
        ((0, "[]", ""), 999, "ADD of a: code 999: exit status 0, and stdout is not a JSON object\n[]"),
    ],
)
def test_the_error_of_a_plugin_is_readable(answer, code, text):
    with pytest.raises(lab.CNIError) as raised:
        lab.parse_answer("ADD of a", *answer)
    assert (raised.value.code, str(raised.value)) == (code, text)


# ---------------------------------------------------------------------------------------------------------------------------
# The container runtime: with plugins that note down how they were called
# ---------------------------------------------------------------------------------------------------------------------------
PLUGIN = """#!/usr/bin/python3 -IS
import json, os, sys
here, name = os.path.split(os.path.abspath(__file__))
conf, command = json.load(sys.stdin), os.environ["CNI_COMMAND"]
with open(f"{here}/calls", "a") as log:
    call = {key: value for key, value in os.environ.items() if key.startswith("CNI_")}
    log.write(json.dumps([name, command, call, conf]) + "\\n")
error = f"{here}/{name}.{command}.error"
if os.path.exists(error):
    print(open(error).read())
    sys.exit(1)
if command == "ADD":
    result = conf.get("prevResult", {"cniVersion": conf["cniVersion"], "ips": []})
    print(json.dumps({**result, "ips": result["ips"] + [{"address": f"10.0.0.{len(result['ips']) + 1}/24"}]}))
"""


class Node:
    """Directories of a node, two plugins `first` and `second` in one network, and the runtime's view of them."""

    def __init__(self, tmp_path, version="1.0.0", **conf):
        self.bin = tmp_path / "bin"
        self.bin.mkdir()
        for name in ("first", "second"):
            (self.bin / name).write_text(PLUGIN)
            (self.bin / name).chmod(0o755)
        self.dirs = {"bin": str(self.bin), "cache": str(tmp_path / "cache"), "conf": str(tmp_path / "conf")}
        plugins = [{"type": "first", "capabilities": {"mac": True}}, {"type": "second"}]
        text = json.dumps({"cniVersion": version, "name": "net", "plugins": plugins, **conf})
        self.network = lab.parse_network(text, "net.conflist")
        self.cache = tmp_path / "cache" / f"net-{'c' * 64}-eth0"

    def act(self, function):
        return function(self.network, ATTACHMENT, self.dirs, lab.run)

    def fail(self, name, command, error='{"code": 11, "msg": "later"}'):
        (self.bin / f"{name}.{command}.error").write_text(error)

    def calls(self):
        """[[plugin, command, its CNI_* variables, its stdin]] since the last look."""
        log = self.bin / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("")
        return [json.loads(line) for line in lines]

    def order(self):
        return [f"{command} {name}" for name, command, _, _ in self.calls()]


def ips(count):
    return [{"address": f"10.0.0.{number}/24"} for number in range(1, count + 1)]


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


def test_add_chains_the_results_and_del_goes_back_with_the_last_one(node):
    final = {"cniVersion": "1.0.0", "ips": ips(2)}
    assert node.act(lab.cni_add) == final
    assert json.loads(node.cache.read_text())["result"] == final
    node.act(lab.cni_check)
    node.act(lab.cni_del)
    assert not node.cache.exists()

    def call(name, command, **stdin):
        env = {**lab.plan_environment(command, ATTACHMENT), "CNI_PATH": str(node.bin)}
        own = {"type": "first", "capabilities": {"mac": True}, "runtimeConfig": {"mac": "02:00:00:00:00:01"}}
        return [name, command, env, {**(own if name == "first" else {"type": "second"}), "name": "net", "cniVersion": "1.0.0", **stdin}]

    assert node.calls() == [
        call("first", "ADD"),
        call("second", "ADD", prevResult={"cniVersion": "1.0.0", "ips": ips(1)}),
        call("first", "CHECK", prevResult=final),
        call("second", "CHECK", prevResult=final),
        call("second", "DEL", prevResult=final),
        call("first", "DEL", prevResult=final),
    ]


def test_add_asks_for_the_status_first_where_the_version_has_it(tmp_path):
    node = Node(tmp_path, "1.0.0", cniVersions=["1.1.0"])
    node.act(lab.cni_add)
    calls = node.calls()
    assert [call[:2] for call in calls] == [["first", "STATUS"], ["second", "STATUS"], ["first", "ADD"], ["second", "ADD"]]
    assert {call[3]["cniVersion"] for call in calls} == {"1.1.0"}
    assert calls[0][2] == {**lab.plan_environment("STATUS", {}), "CNI_PATH": str(node.bin)}


def test_a_status_that_is_not_ready_ends_the_add_before_it_began(tmp_path):
    node = Node(tmp_path, "1.1.0")
    node.fail("second", "STATUS", '{"code": 50, "msg": "not ready"}')
    with pytest.raises(lab.CNIError, match="STATUS of second in network net: code 50: not ready"):
        node.act(lab.cni_add)
    assert node.order() == ["STATUS first", "STATUS second"]


def test_a_failed_add_is_followed_by_del_and_its_own_error_is_the_one_told(node):
    node.fail("second", "ADD")
    node.fail("first", "DEL", '{"code": 5, "msg": "another"}')
    with pytest.raises(lab.CNIError, match="^ADD of second in network net: code 11: later$") as raised:
        node.act(lab.cni_add)
    assert raised.value.code == 11
    calls = node.calls()
    assert [call[:2] for call in calls] == [["first", "ADD"], ["second", "ADD"], ["second", "DEL"], ["first", "DEL"]]
    assert all("prevResult" not in stdin for _, command, _, stdin in calls if command == "DEL")
    assert not node.cache.exists()


def test_a_del_that_fails_stops_there_and_can_be_done_again(node):
    final = node.act(lab.cni_add)
    node.calls()
    node.fail("second", "DEL")
    with pytest.raises(lab.CNIError, match="DEL of second"):
        node.act(lab.cni_del)
    assert node.order() == ["DEL second"]
    assert json.loads(node.cache.read_text())["result"] == final
    (node.bin / "second.DEL.error").unlink()
    node.act(lab.cni_del)
    node.act(lab.cni_del)
    calls = node.calls()
    assert [call[:2] for call in calls] == [["second", "DEL"], ["first", "DEL"]] * 2
    assert [stdin.get("prevResult") for *_, stdin in calls] == [final, final, None, None]


def test_before_0_4_0_there_is_no_check_and_del_gets_no_result(tmp_path):
    node = Node(tmp_path, "0.3.1")
    node.act(lab.cni_add)
    node.act(lab.cni_check)
    node.act(lab.cni_del)
    calls = node.calls()
    assert [call[:2] for call in calls] == [["first", "ADD"], ["second", "ADD"], ["second", "DEL"], ["first", "DEL"]]
    assert ["prevResult" in stdin for *_, stdin in calls] == [False, True, False, False]


def test_a_network_may_disable_check(tmp_path):
    node = Node(tmp_path, disableCheck=True)
    node.act(lab.cni_check)
    assert node.order() == []


def test_a_cache_file_that_is_broken_is_as_none(node):
    node.act(lab.cni_add)
    node.calls()
    node.cache.write_text("{")
    node.act(lab.cni_del)
    assert ["prevResult" in stdin for *_, stdin in node.calls()] == [False, False]
    assert not node.cache.exists()


def test_a_plugin_that_is_not_installed_is_named_with_the_directory(node):
    (node.bin / "second").unlink()
    with pytest.raises(lab.LabError, match=f"^ADD of second in network net: no second in {node.bin}$"):
        node.act(lab.cni_add)


def no_program(path):
    path.unlink()


def no_execute_bit(path):
    path.chmod(0o644)


def no_interpreter(path):
    path.write_text("#!/nonexistent/python3\n")


@pytest.mark.parametrize(
    "broken, said",
    [
        (no_program, "no second in "),
        (no_execute_bit, "/second cannot be started: Permission denied; chmod +x "),
        (no_interpreter, "/second: its interpreter is not there"),
    ],
)
def test_a_plugin_that_cannot_be_started_is_an_error_in_its_name_and_those_before_it_are_undone(node, broken, said):
    broken(node.bin / "second")
    with pytest.raises(lab.NotStarted, match=f"^ADD of second in network net: .*{re.escape(said)}"):
        node.act(lab.cni_add)
    assert [call[:2] for call in node.calls()] == [["first", "ADD"], ["first", "DEL"]] and not node.cache.exists()


def test_an_add_that_prints_no_result_is_an_error_and_is_undone(node):
    (node.bin / "second").write_text("#!/bin/sh\ncat >/dev/null\n")
    with pytest.raises(lab.CNIError, match="^ADD of second in network net: code 999: exit status 0 without a result"):
        node.act(lab.cni_add)
    assert [call[:2] for call in node.calls()] == [["first", "ADD"], ["first", "DEL"]] and not node.cache.exists()


def test_the_network_of_a_node_is_the_first_configuration_by_name(tmp_path):
    conf = tmp_path / "conf"
    conf.mkdir()
    dirs = {"conf": str(conf)}
    with pytest.raises(lab.LabError, match="no network configuration in"):
        lab.look_network(dirs)
    for name in ("20-b.conflist", "10-a.conf", "05-c.conflist.tmp", ".10-a.conf.tmp"):
        (conf / name).write_text(json.dumps({"cniVersion": "1.0.0", "name": name, "type": "first"}))
    assert lab.look_network(dirs)["name"] == "10-a.conf"


# ---------------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["", "UP", "a/b", "..", "a b", "-a", "a" * 32])
def test_a_name_that_is_no_name_is_refused(name):
    with pytest.raises(lab.LabError, match="--name"):
        lab.Lab(name)


@pytest.mark.parametrize("argv", [["--name", "x", "ping"], ["ping", "--name", "x"]])
def test_the_name_may_stand_before_and_after_the_command(argv):
    assert (lab.parse_options(argv).name, lab.parse_options(argv).command) == ("x", "ping")


@pytest.mark.parametrize(
    "words, said",
    [
        ((), "the following arguments are required"),
        (("add",), "the following arguments are required"),
        (("start", "node1/web"), "invalid choice: 'start'"),
        (("add", "node1/web", "{}", "more"), "unrecognized arguments: more"),
        (("add", "node1/web", "nojson"), "'nojson' is not JSON: "),
        (("add", "node1/web", "[]"), "[] is not a JSON object like "),
        (("add", "node1/a b"), "'a b' cannot name a pod: "),
        (("add", "node1/"), "'' cannot name a pod: "),
        (("add", "../.."), "'..' cannot name a pod: "),
    ],
)
@pytest.mark.parametrize("name", [(), ("--name", "nowhere")])
def test_wrong_words_to_the_runtime_are_a_usage_error(name, words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        lab.main([*name, "runtime", *words])
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [("add web", "on which node? For example: lab.py runtime add node1/web\n"),
                                         ("del web", "on which node? "), ("check node1/web", "the lab nowhere is not up; ")])
def test_the_runtime_is_one_of_a_node(words, said, mocker, capsys):
    mocker.patch("os.geteuid", return_value=0)
    mocker.patch("deploy.lab.NODE_BOOT_ID", lab.Path("/nowhere"))
    assert lab.main(["--name", "nowhere", "runtime", *words.split()]) == 1
    assert capsys.readouterr().err.startswith(f"lab.py: {said}")


@pytest.mark.parametrize("words", [("node-init",), ("node-init", "a", "b"), ("node-agent",), ("node-agent", "start")])
def test_what_the_lab_calls_itself_is_no_command_for_users(words, capsys):
    assert lab.main([*words]) == 1
    assert "is what the lab calls itself" in capsys.readouterr().err


def test_what_follows_exec_is_left_to_the_command():
    assert lab.parse_options(["exec", "node1/pod1", "--", "ip", "-4", "--name"]).words[-3:] == ["ip", "-4", "--name"]


def test_without_root_the_lab_says_what_it_needs(mocker, capsys):
    mocker.patch("os.geteuid", return_value=1000)
    mocker.patch("signal.signal")
    assert lab.main(["up"]) == 1
    assert capsys.readouterr().err == "lab.py: the lab makes network namespaces and needs root: run it with sudo\n"


def test_a_tool_that_is_missing_is_named_with_its_package():
    with pytest.raises(lab.LabError, match="^wg: not found; it is in the package wireguard-tools$"):
        lab.start(["wg"], env={"PATH": "/nowhere"})


def test_a_command_that_does_not_end_is_ended():
    with pytest.raises(lab.LabError, match=r"did not end within 0\.1 s: sleep 60"):
        lab.run(["sleep", "60"], timeout_s=0.1)


@pytest.mark.parametrize(
    "command, state, runs",
    [("python3\0agent.py\0", "S", True), ("", "R", True), ("", "Z", False), ("sleep\0", "S", False)],
    ids=["runs", "just started", "ended", "another program under its number"],
)
def test_the_agent_of_a_node_runs_from_its_very_start(tmp_path, command, state, runs):
    (tmp_path / "proc" / "7").mkdir(parents=True)
    (tmp_path / "proc" / "7" / "cmdline").write_text(command)
    (tmp_path / "proc" / "7" / "stat").write_text(f"7 (a (b) c) {state} 1 7")
    pid_file = tmp_path / lab.AGENT_PID[1:]
    pid_file.parent.mkdir(parents=True, exist_ok=True)
    pid_file.write_text("7")
    assert lab.agent_pid(tmp_path) == (7 if runs else 0)
