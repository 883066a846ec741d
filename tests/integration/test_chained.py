"""bandwidth and quickack on a real kernel: called in a chain by a runtime, and as a list inside one process."""

import json
import subprocess

import pytest

pytestmark = pytest.mark.root

# One end sends for some seconds what it can, the other takes it in and prints how many Mbit a second arrive.
SEND = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 5001), timeout=20)
begin = time.monotonic()
while time.monotonic() - begin < float(sys.argv[2]):
    connection.send(bytes(65536))
"""
RECEIVE = """
import socket, sys, time
server = socket.create_server(("0.0.0.0", 5001))
print("up", flush=True)
connection, _ = server.accept()
begin, total = time.monotonic(), 0
while time.monotonic() - begin < float(sys.argv[1]):
    total += len(connection.recv(65536))
print(total * 8 / 1e6 / (time.monotonic() - begin))
"""


@pytest.fixture(params=["by a runtime", "as a list"])
def chain(request, host):
    """chain(plugins, **configuration): ADD them all to pod "a"; returns the conf, the result and the pod's namespace."""

    def add(plugins, container_id="c1", pod=None, ifname="eth0", **keys):
        pod = pod or host.pod("a")
        base = host.conf(**keys)
        if request.param == "as a list":
            conf = {**base, "plugin": plugins}
            return conf, host.add(conf, container_id, pod, ifname), pod
        result = None
        for plugin in plugins:
            conf = {**base, "plugin": plugin, **({"prevResult": result} if result else {})}
            result = host.add(conf, container_id, pod, ifname)
        return {**base, "plugin": plugins}, result, pod

    return add


def limits(**values):
    return {"bandwidth": values}


def speed(host, pod, direction, seconds):
    """Mbit/s that one TCP connection carries to the pod ("ingress") or from it ("egress"), measured where it arrives."""
    inside, outside = ["nsenter", f"--net={pod}"], ["nsenter", f"--net=/run/netns/{host.netns}"]
    here, there, address = (inside, outside, "10.88.0.2") if direction == "ingress" else (outside, inside, "10.88.0.1")
    argv = ["/usr/bin/python3", "-c", RECEIVE, str(seconds)]
    with subprocess.Popen([*here, *argv], stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout.readline() == "up\n"
        with subprocess.Popen([*there, "/usr/bin/python3", "-c", SEND, address, str(seconds)], stderr=subprocess.DEVNULL) as sender:
            measured = float(receiver.stdout.readline())
            sender.kill()
        return measured


@pytest.mark.parametrize("shaped, other", [("ingress", "egress"), ("egress", "ingress")])
def test_a_rate_is_kept_and_the_other_direction_is_free(host, chain, figure, shaped, other):
    conf, result, pod = chain(["naivewg", "bandwidth"], runtimeConfig=limits(**{f"{shaped}Rate": 8_000_000}))
    assert host.cni("CHECK", {**conf, "prevResult": result}, "c1", pod) == (0, None, "")
    measured = speed(host, pod, shaped, 5)
    free = speed(host, pod, other, 1)
    figure(f"bandwidth, {shaped} 8 Mbit/s: {measured:.2f} Mbit/s, the other direction {free:.0f} Mbit/s")
    assert measured == pytest.approx(8, rel=0.15)
    assert free > 80


def test_containerds_keys_and_its_missing_burst_are_understood(host, chain):
    values = {"IngressRate": 8_000_000, "IngressBurst": 2**32 - 1, "EgressRate": 0, "EgressBurst": 0}
    conf, result, _ = chain(["naivewg", "bandwidth"], runtimeConfig=limits(**values))
    (qdisc,) = [qdisc for qdisc in json.loads(host.sh("tc -json qdisc show")) if qdisc["kind"] == "tbf"]
    assert (qdisc["options"]["rate"], qdisc["options"]["burst"]) == (1_000_000, 100_000)
    assert not [link["name"] for link in result["interfaces"] if link["name"].startswith("mi")]


def test_without_limits_nothing_is_done_and_prev_result_passes(host, chain):
    _, result, _ = chain(["naivewg", "bandwidth"])
    assert [link["name"][:2] for link in result["interfaces"]] == ["mn", "mn", "et"]
    assert "tbf" not in host.sh("tc qdisc show")


def test_a_tiny_rate_lets_full_size_packets_through(host, chain):
    _, _, pod = chain(["naivewg", "bandwidth"], runtimeConfig=limits(ingressRate=64_000, egressRate=64_000))
    out = host.sh("ping -c 3 -i 0.2 -s 1400 -W 5 10.88.0.1", netns=pod, check=False)
    assert out.count("bytes from") == 3


def test_a_foreign_clsact_survives_and_serves(host, chain):
    pod = host.pod("a")
    conf = host.conf(plugin="naivewg")
    first = host.add(conf, "c1", pod)
    veth = first["interfaces"][1]["name"]
    host.sh(f"tc qdisc add dev {veth} clsact")
    limited = {**conf, "plugin": "bandwidth", "prevResult": first, "egressRate": 8_000_000}
    result = host.add(limited, "c1", pod)
    assert host.cni("CHECK", {**limited, "prevResult": result}, "c1", pod) == (0, None, "")
    assert speed(host, pod, "egress", 3) < 16
    assert host.cni("DEL", limited, "c1", pod)[0] == 0
    assert "clsact" in host.sh(f"tc qdisc show dev {veth}")


def test_two_interfaces_of_one_container_are_limited_apart_and_gc_finds_what_is_stale(host, chain):
    pod = host.pod("a")
    for ifname in ("eth0", "eth1"):
        chain(["naivewg", "bandwidth"], pod=pod, ifname=ifname, isDefaultGateway=False, runtimeConfig=limits(egressRate=8_000_000))
    ifbs = json.loads(host.ip("-json link show type ifb"))
    assert len([ifb for ifb in ifbs if ifb.get("ifname")]) == 2
    gc = {**host.conf(plugin=["naivewg", "bandwidth"]), "cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth1"}]}
    assert host.cni("GC", gc) == (0, None, "")
    assert len([ifb for ifb in json.loads(host.ip("-json link show type ifb")) if ifb.get("ifname")]) == 1


def test_check_sees_each_missing_piece_of_a_limit(host, chain):
    conf, result, pod = chain(["naivewg", "bandwidth"], runtimeConfig=limits(ingressRate=8_000_000, egressRate=4_000_000))
    veth, ifb = result["interfaces"][1]["name"], result["interfaces"][3]["name"]
    for damage in (f"qdisc delete dev {veth} root", f"qdisc delete dev {ifb} root", f"filter delete dev {veth} ingress"):
        host.sh(f"tc {damage}")
        exit_code, error, _ = host.cni("CHECK", {**conf, "prevResult": result}, "c1", pod)
        assert (exit_code, error["code"]) == (1, 100) and "limited" in error["msg"], damage
        rates = {veth: "8mbit", ifb: "4mbit"}
        device = damage.split()[3]
        if "qdisc" in damage:
            host.sh(f"tc qdisc add dev {device} root tbf rate {rates[device]} burst 100000b limit 200000b")


def test_del_needs_neither_namespace_nor_prev_result_and_leaves_nothing(host, chain):
    conf, _, _ = chain(["naivewg", "bandwidth", "quickack"], runtimeConfig=limits(ingressRate=8_000_000, egressRate=8_000_000))
    host.sh(f"ip netns delete {host.pods.pop()}", inside=False)
    for _ in range(2):
        assert host.cni("DEL", conf, "c1", "") == (0, None, "")
    assert "mi" not in host.ip("-brief link") and "mn" not in host.ip("-brief link show type veth")


def test_quickack_keeps_every_other_attribute_of_every_route(host):
    pod = host.pod("a")
    ranges = [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd00:88::/64"}]]
    first = host.add(host.conf(ipam={**host.conf()["ipam"], "ranges": ranges}), "c1", pod)
    for route in (
        "10.1.0.0/16 via 10.88.0.7 src 10.88.0.2 metric 50 mtu lock 1300 advmss 1200 dev eth0",
        "10.2.0.0/16 via 10.88.0.7 table 100 onlink proto static initcwnd 20 dev eth0",
        "10.3.0.0/16 tos 0x10 scope link dev eth0 rto_min 20ms",
        "10.4.0.0/16 via inet6 fd00:88::9 dev eth0 quickack 0",
    ):
        host.ip(f"route add {route}", netns=pod)
    host.ip("-6 route add fd00:9::/64 via fd00:88::9 metric 77 pref high mtu 1300 dev eth0", netns=pod)

    def routes():
        text = host.ip("-4 route show table all type unicast", netns=pod) + host.ip("-6 route show table all type unicast", netns=pod)
        return [" ".join(line.split()) for line in text.splitlines() if "eth0" in line]

    before = routes()
    conf = {**host.conf(plugin="quickack"), "prevResult": first}
    assert host.add(conf, "c1", pod) == first
    after = routes()
    assert all("quickack 1" in route for route in after)
    assert [route.replace(" quickack 1", "") for route in after] == [route.replace(" quickack 0", "") for route in before]
    assert host.cni("CHECK", conf, "c1", pod) == (0, None, "")
    host.add(conf, "c1", pod)
    assert routes() == after


def test_quickack_touches_only_the_routes_that_are_named(host):
    pod = host.pod("a")
    first = host.add(host.conf(), "c1", pod)
    conf = {**host.conf(plugin="quickack", routes=["0.0.0.0/0"]), "prevResult": first}
    host.add(conf, "c1", pod)
    routes = host.ip("route", netns=pod).splitlines()
    assert [("quickack" in route) for route in routes] == [True, False]
    host.ip("route replace default via 10.88.0.1", netns=pod)
    exit_code, error, _ = host.cni("CHECK", conf, "c1", pod)
    assert (exit_code, error["code"]) == (1, 100) and "default" in error["msg"]
    exit_code, error, _ = host.cni("ADD", {**conf, "routes": ["10.77.0.0/16"]}, "c1", pod)
    assert (exit_code, error["code"]) == (1, 7) and "10.77.0.0/16" in error["msg"]


@pytest.mark.parametrize(
    "keys",
    [{"ingressBurst": 8}, {"ingressRate": -1}, {"egressRate": 1.5}, {"egressRate": "8M"}, {"ingressRate": True}, {"egressRate": 2**63}],
    ids=str,
)
def test_limits_that_make_no_sense_are_error_7_and_nothing_is_left(host, keys):
    pod = host.pod("a")
    before = host.snapshot()
    exit_code, error, _ = host.cni("ADD", host.conf(plugin=["naivewg", "bandwidth"], **keys), "c1", pod)
    assert (exit_code, error["code"]) == (1, 7) and next(iter(keys)) in error["msg"]
    host.ip("link delete mncni0", check=False)
    assert [line for line in host.snapshot().splitlines() if "mn" in line] == [line for line in before.splitlines() if "mn" in line]
