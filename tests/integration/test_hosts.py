"""Hosts as they are: what else is set, running or missing on a host must not break a pod's network, nor the pods' network the host."""

import json
import os
import subprocess
import time

import pytest

import mncni
from tests.integration.conftest import PLUGIN

pytestmark = pytest.mark.root

DUAL = [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd88::/64"}]]


def dual(host, **keys):
    return host.conf(ipam={"dataDir": f"{host.tmp}/data", "ranges": DUAL}, **keys)


def sysctl(host, key, netns=None):
    return host.sh(f"cat /proc/sys/net/{key}", netns=netns).strip()


@pytest.fixture
def uplink(host):
    """A router beyond the host's eth0, 192.0.2.2 and fe80::2, as the path of its namespace."""
    path = host.pod("router")
    host.ip(f"link add eth0 type veth peer name eth0 netns {path}")
    host.ip("address add 192.0.2.1/24 dev eth0")
    host.ip("address add 192.0.2.2/24 dev eth0", netns=path)
    host.ip("address add fe80::2/64 dev eth0 nodad", netns=path)
    for where in (None, path):
        host.ip("link set eth0 up", netns=where)
    host.ip("route add default via 192.0.2.2")
    return path


ADVERTISE = """
import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
prefix = bytes([3, 4, 64, 192]) + b"\\xff" * 8 + bytes(4) + socket.inet_pton(socket.AF_INET6, "2001:db8::")
s.sendto(bytes([134, 0, 0, 0, 64, 0, 7, 8]) + bytes(8) + prefix, ("ff02::1", 0, 0, socket.if_nametoindex("eth0")))
print("sent")
"""


def advertise(host, netns):
    """Send a router advertisement: a default route by the sender, and 2001:db8::/64. Whether that worked: it does not while the sender's
    link-local address is tentative."""
    return "sent" in host.sh(f"/usr/bin/python3 -c '{ADVERTISE}'", netns=netns, check=False)


def wait_until(is_so, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_the_hosts_route_by_router_advertisement_outlives_the_first_ipv6_pod(host, uplink):
    def has_route():
        advertise(host, uplink)
        return "proto ra" in host.ip("-6 route show default")

    host.sh("echo 0 >/proc/sys/net/ipv6/conf/all/forwarding; echo 1 >/proc/sys/net/ipv6/conf/eth0/accept_ra")
    wait_until(has_route)
    host.add(dual(host), "c1", host.pod("a"))
    assert sysctl(host, "ipv6/conf/all/forwarding") == "1"
    assert "proto ra" in host.ip("-6 route show default")
    host.ip("-6 route flush proto ra")
    wait_until(has_route)  # and it goes on listening


def test_where_a_program_handles_advertisements_they_stay_off_in_the_kernel(host, uplink):
    host.sh("echo 0 >/proc/sys/net/ipv6/conf/all/forwarding; echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_ra")
    host.add(dual(host), "c1", host.pod("a"))
    assert sysctl(host, "ipv6/conf/eth0/accept_ra") == "0"


def test_ipv6_ranges_on_a_host_without_ipv6_are_an_error_that_names_both(host):
    host.sh("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6")
    exit_code, error, _ = host.cni("ADD", dual(host), "c1", host.pod("a"))
    assert (exit_code, error["code"]) == (1, 7) and "fd88::/64" in error["msg"] and "disable_ipv6" in error["msg"]
    pod = host.pod("b")
    host.add(host.conf(), "c2", pod)
    assert host.pings(pod, "10.88.0.1") == 3


@pytest.mark.parametrize("closed", ["default", "eth0"])
def test_a_host_where_some_devices_do_not_forward(host, uplink, closed):
    """Docker and systemd-networkd switch ip_forward on, but devices made later do not forward."""
    host.sh(f"echo 1 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv4/conf/{closed}/forwarding")
    host.ip("route add 10.88.0.0/24 via 192.0.2.1", netns=uplink)
    pod = host.pod("a")
    result = host.add(host.conf(), "c1", pod)
    assert host.pings(pod, "192.0.2.2") == 3
    host.sh("echo 0 >/proc/sys/net/ipv4/conf/mncni0/forwarding")
    exit_code, error, _ = host.cni("CHECK", {**host.conf(), "prevResult": result}, "c1", pod)
    assert (exit_code, error["code"]) == (1, 100) and "does not forward inet on mncni0" in error["details"]
    host.add(host.conf(), "c2", host.pod("b"))  # which puts it right
    assert host.pings(pod, "192.0.2.2") == 3


@pytest.mark.parametrize("families", ["4", "46"])
def test_a_pod_takes_no_route_from_another_pods_advertisement(host, families):
    conf, one, two = dual(host) if "6" in families else host.conf(), host.pod("a"), host.pod("b")
    host.add(conf, "c1", one)
    host.add(conf, "c2", two)
    assert sysctl(host, "ipv6/conf/eth0/accept_ra", two) == "0"
    wait_until(lambda: advertise(host, one))
    time.sleep(0.2)  # it would take effect at once
    assert "proto ra" not in host.ip("-6 route", netns=two) and "2001:db8" not in host.ip("-6 address", netns=two)


def test_a_restart_with_an_empty_run_frees_the_leases_though_the_boot_id_is_the_same(host):
    """kind and k3d: the container that plays a node is restarted, its /var stays, its pods and its /run do not."""
    conf = host.conf(ipam={"dataDir": f"{host.tmp}/data", "ranges": [[{"subnet": "10.88.0.0/29"}]]})
    for number in range(5):
        host.add(conf, f"old{number}", host.pod(f"old{number}"))
    assert host.cni("ADD", conf, "one-more", host.pod("more"))[1]["code"] == 11
    for name in [name for name in host.pods if "old" in name]:
        host.ip(f"netns delete {name}", inside=False)
        host.pods.remove(name)
    host.sh(f"rm -r {host.tmp}/run")
    addresses = {host.add(conf, f"new{number}", host.pod(f"new{number}"))["ips"][0]["address"] for number in range(5)}
    assert len(addresses) == 5


def test_leases_that_an_older_version_wrote_in_this_boot_are_held(host):
    conf = host.conf(ipam={"dataDir": f"{host.tmp}/data", "ranges": [[{"subnet": "10.88.0.0/29"}]]})
    os.makedirs(f"{host.tmp}/data/net")
    with open(f"{host.tmp}/data/net/10.88.0.2", "w") as file:
        file.write(f"other\neth0\n{mncni.boot_id()}\n")
    assert host.add(conf, "c1", host.pod("a"))["ips"][0]["address"] == "10.88.0.3/29"


def test_warnings_on_stderr_change_nothing(host):
    """A preload library that complains at each start, in words that could be taken for an error."""
    os.makedirs(f"{host.tmp}/bin")
    for tool in ("ip", "tc", "nft", "nsenter", "tee"):
        path = f"{host.tmp}/bin/{tool}"
        noise = "ERROR: ld.so: object '/usr/lib/x.so' from LD_PRELOAD cannot be preloaded (cannot open shared object file): ignored."
        with open(path, "w") as file:
            file.write(f'#!/bin/sh\necho "{noise}" >&2\nexec /usr/sbin/{tool} "$@"\n' if os.path.exists(f"/usr/sbin/{tool}") else
                       f'#!/bin/sh\necho "{noise}" >&2\nexec /usr/bin/{tool} "$@"\n')
        os.chmod(path, 0o755)
    environ = {"PATH": f"{host.tmp}/bin:{os.environ['PATH']}"}
    conf = {**dual(host, ipMasq=True), "plugin": ["naivewg", "portmap", "bandwidth", "quickack"]}
    conf["runtimeConfig"] = {"portMappings": [{"hostPort": 8080, "containerPort": 80}], "bandwidth": {"egressRate": 8000000}}
    pod = host.pod("a")
    result = host.add(conf, "c1", pod, **environ)
    assert host.cni("CHECK", {**conf, "prevResult": result}, "c1", pod, **environ)[:2] == (0, None)
    assert host.cni("DEL", {**conf, "prevResult": result}, "c1", pod, **environ)[:2] == (0, None)
    assert host.cni("DEL", conf, "c1", pod, **environ)[:2] == (0, None)
    error = host.cni("ADD", {**conf, "bridge": "lo"}, "c1", pod, **environ)[1]
    assert error["code"] == 7 and "ld.so" not in error["msg"]


@pytest.mark.parametrize("tool, package", [("ip", "iproute2"), ("nft", "nftables"), ("tc", "iproute2")])
def test_a_missing_tool_is_named_with_its_package_before_anything_is_changed(host, tool, package):
    conf = {**host.conf(ipMasq=True), "plugin": ["naivewg", "portmap", "bandwidth"]}
    conf["runtimeConfig"] = {"portMappings": [{"hostPort": 8080, "containerPort": 80}], "bandwidth": {"egressRate": 8000000}}
    pod, before = host.pod("a"), host.snapshot()
    hide = f'for dir in /usr/sbin /usr/bin /sbin /bin; do [ -e $dir/{tool} ] && mount --bind /dev/null $dir/{tool}; done; exec "$@"'
    for command, code in (("STATUS", 50), ("ADD", 4)):
        environ = {**host.environ(command, "c1", pod if command == "ADD" else "", "eth0"), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        argv = ["nsenter", f"--net=/run/netns/{host.netns}", "unshare", "--mount", "sh", "-c", hide, "sh", PLUGIN]
        done = subprocess.run(argv, input=json.dumps(conf), env=environ, capture_output=True, text=True, timeout=60)
        error = json.loads(done.stdout)
        assert error["code"] == code and f'"{tool}"' in error["msg"] and package in error["msg"], error
    assert host.snapshot() == before


def test_a_file_that_is_no_namespace_is_refused_before_anything_is_changed(host):
    before = host.snapshot()
    for path in (f"{host.tmp}/file", "/proc/self/ns/mnt", "/dev/null", host.tmp):
        if path.endswith("/file"):
            open(path, "w").close()
            before = host.snapshot()
        exit_code, error, _ = host.cni("ADD", host.conf(ipMasq=True), "c1", path)
        assert (exit_code, error["code"]) == (1, 8), path
    assert host.snapshot() == before


def test_check_with_the_result_of_another_sandbox_fails(host):
    pod = host.pod("a")
    result = host.add(host.conf(), "c1", pod)
    result["interfaces"][2]["sandbox"] = "/run/netns/another"
    exit_code, error, _ = host.cni("CHECK", {**host.conf(), "prevResult": result}, "c1", pod)
    assert (exit_code, error["code"]) == (1, 100) and "/run/netns/another" in error["msg"]


def test_a_route_of_scope_link_has_no_gateway(host):
    routes = [{"dst": "198.51.100.0/24", "scope": 253}, {"dst": "203.0.113.0/24"}]
    pod = host.pod("a")
    conf = host.conf(ipam={"dataDir": f"{host.tmp}/data", "ranges": [[{"subnet": "10.88.0.0/24"}]], "routes": routes})
    result = host.add(conf, "c1", pod)
    assert "198.51.100.0/24 scope link" in host.ip("route", netns=pod).replace(" dev eth0", "")
    assert [route.get("gw") for route in result["routes"][:2]] == [None, "10.88.0.1"]
    assert host.cni("CHECK", {**conf, "prevResult": result}, "c1", pod) == (0, None, "")


def test_a_second_network_leaves_the_mtu_of_the_bridge(host):
    host.add(host.conf(mtu=1500), "c1", host.pod("a"))
    ranges = [[{"subnet": "10.88.0.0/24", "rangeStart": "10.88.0.100"}]]
    small = host.conf(name="small", mtu=1400, ipam={"dataDir": f"{host.tmp}/data", "ranges": ranges})
    host.add(small, "c2", host.pod("b"))
    assert json.loads(host.ip("-json link show mncni0"))[0]["mtu"] == 1500
