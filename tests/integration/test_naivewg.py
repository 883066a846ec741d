"""naivewg and loopback on a real kernel, called as a runtime calls them."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

import mncni

pytestmark = pytest.mark.root

CONF = Path(mncni.__file__).parent / "conf"


def address_of(result):
    return result["ips"][0]["address"].partition("/")[0]


def stages(path, host):
    """The plugins of a conflist, as a runtime hands them over: name and version of the list, state in the test's directory."""
    conflist = json.loads(path.read_text())
    for plugin in conflist["plugins"]:
        ipam = {"ipam": {**plugin["ipam"], "dataDir": f"{host.tmp}/data"}} if "ipam" in plugin else {}
        yield {**plugin, **ipam, "name": conflist["name"], "cniVersion": conflist["cniVersions"][-1]}


@pytest.mark.parametrize("path", sorted(CONF.glob("*.conflist")), ids=lambda path: path.name)
def test_every_example_adds_checks_and_deletes_twice_without_a_trace(path, host):
    pod, plugins = host.pod("a"), list(stages(path, host))
    add_all(host, plugins, "warm-up", host.pod("b"))  # what a network keeps for its next pod: bridge, static rules
    assert all(host.cni("DEL", conf, "warm-up", "")[0] == 0 for conf in reversed(plugins))
    before = host.snapshot()
    result = add_all(host, plugins, "c1", pod)
    for conf in plugins:
        assert host.cni("CHECK", {**conf, "prevResult": result}, "c1", pod) == (0, None, "")
        assert host.cni("STATUS", conf) == (0, None, "")
    for conf in [*reversed(plugins), *reversed(plugins)]:
        assert host.cni("DEL", {**conf, "prevResult": result}, "c1", pod) == (0, None, "")
    assert host.snapshot() == before


def add_all(host, plugins, container_id, pod):
    """The last result of a list of plugins, each given the one before it."""
    result = {}
    for conf in plugins:
        result = host.add({**conf, "prevResult": result} if result else conf, container_id, pod)
    return result


def test_pods_reach_each_other_their_gateway_and_themselves(host):
    one, two = host.pod("a"), host.pod("b")
    first, second = host.add(host.conf(), "c1", one), host.add(host.conf(), "c2", two)
    for netns, address in ((one, address_of(second)), (two, address_of(first)), (one, "10.88.0.1")):
        assert host.pings(netns, address) == 3
    port = json.loads(host.ip(f"-json -details link show {first['interfaces'][1]['name']}"))[0]
    assert port["linkinfo"]["info_slave_data"]["hairpin"] is True


def test_dual_stack_addresses_are_usable_when_add_returns(host):
    ranges = [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd00:88::/64"}]]
    conf = host.conf(ipam={"dataDir": f"{host.tmp}/data", "ranges": ranges})
    pod = host.pod("a")
    result = host.add(conf, "c1", pod)
    assert "tentative" not in host.ip("-6 address show scope global", netns=pod)
    assert [ip["address"] for ip in result["ips"]] == ["10.88.0.2/24", "fd00:88::2/64"]
    assert host.pings(pod, "fd00:88::1", count=1) == 1
    assert host.cni("CHECK", {**conf, "prevResult": result}, "c1", pod)[0] == 0


def test_masquerade_hides_pods_from_outside_but_not_from_cluster_cidrs(host):
    outside = host.pod("outside")
    host.ip(f"link add up0 type veth peer name eth0 netns {outside}")
    host.ip("address add 192.0.2.1/24 dev up0")
    host.ip("link set up0 up")
    host.ip("address add 192.0.2.2/24 dev eth0", netns=outside)
    host.ip("address add 198.51.100.2/24 dev eth0", netns=outside)
    host.ip("link set eth0 up", netns=outside)
    host.ip("route add 10.88.0.0/24 via 192.0.2.1", netns=outside)
    host.ip("route add 198.51.100.0/24 via 192.0.2.2")
    pod = host.pod("a")
    host.add(host.conf(ipMasq=True, clusterCIDRs=["198.51.100.0/24"]), "c1", pod)
    assert source_seen(host, pod, outside, "192.0.2.2") == "192.0.2.1"
    assert source_seen(host, pod, outside, "198.51.100.2") == "10.88.0.2"


RECEIVE = """
import socket, sys
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiver.settimeout(20)
receiver.bind((sys.argv[1], 9))
print("up", flush=True)
print(receiver.recvfrom(9)[1][0])
"""


def source_seen(host, pod, outside, address):
    """The source address that a UDP packet from the pod has when it arrives outside."""
    argv = ["nsenter", f"--net={outside}", "/usr/bin/python3", "-c", RECEIVE, address]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout.readline() == "up\n"
        send = f"import socket; socket.socket(socket.AF_INET,socket.SOCK_DGRAM).sendto(b'x',('{address}',9))"
        host.sh(f'/usr/bin/python3 -c "{send}"', netns=pod)
        return receiver.stdout.readline().strip()


def test_bridge_keeps_its_mtu_and_mac_whatever_its_ports_do(host):
    conf = host.conf(mtu=1400)
    first = host.add(conf, "c1", host.pod("a"))
    host.ip(f"link set {first['interfaces'][1]['name']} mtu 1300")
    host.ip("link add aa0 address 02:00:00:00:00:01 type veth peer name aa1")
    host.ip("link set aa0 master mncni0")
    bridge = json.loads(host.ip("-json link show mncni0"))[0]
    assert (bridge["mtu"], bridge["address"]) == (1400, "0a:58:0a:58:00:01")


def test_del_cleans_up_when_the_namespace_is_gone(host):
    pod = host.pod("a")
    host.add(host.conf(), "c1", pod)
    host.sh(f"ip netns delete {host.pods.pop()}", inside=False)
    assert host.cni("DEL", host.conf(), "c1", pod)[0] == 0
    assert host.files() == []
    assert "mn" not in host.ip("-brief link show type veth")


def test_namespace_may_be_named_by_a_process(host):
    pod = host.pod("a")
    holder = subprocess.Popen(["nsenter", f"--net={pod}", "sleep", "60"])
    try:
        path = f"/proc/{holder.pid}/ns/net"
        deadline = time.monotonic() + 10
        while os.stat(path).st_ino != os.stat(pod).st_ino:  # until nsenter has entered
            assert time.monotonic() < deadline
        result = host.add(host.conf(), "c1", path)
        assert result["interfaces"][2]["sandbox"] == path
        assert host.pings(pod, "10.88.0.1", count=1) == 1
    finally:
        holder.kill()
        holder.wait()


def test_a_file_that_is_no_namespace_is_error_8_and_leaves_nothing(host):
    pod = host.pod("a")
    host.add(host.conf(), "c0", pod)  # what every ADD makes sure of
    before = host.snapshot()
    path = Path(host.tmp) / "plain"
    path.touch()
    exit_code, error, _ = host.cni("ADD", host.conf(), "c1", str(path))
    path.unlink()
    assert (exit_code, error["code"]) == (1, 8)
    assert host.snapshot() == before


def test_two_interfaces_and_two_networks_of_one_container_are_apart(host):
    pod = host.pod("a")
    other = host.conf(name="other", bridge="mncni1", ipam={"dataDir": f"{host.tmp}/data", "ranges": [[{"subnet": "10.89.0.0/24"}]]})
    host.add(host.conf(isDefaultGateway=False), "c1", pod, "eth0")
    host.add(host.conf(isDefaultGateway=False), "c1", pod, "eth1")
    result = host.add(other, "c1", pod, "eth2")
    assert host.cni("DEL", host.conf(), "c1", pod, "eth1")[0] == 0
    links = host.ip("-brief link", netns=pod)
    assert "eth0" in links and "eth2" in links and "eth1" not in links
    assert host.cni("CHECK", {**other, "prevResult": result}, "c1", pod, "eth2")[0] == 0


def test_container_ids_of_200_characters_work(host):
    pods = [host.pod("a"), host.pod("b")]
    ids = ["c" * 199 + "1", "c" * 199 + "2"]
    for container_id, pod in zip(ids, pods):
        host.add(host.conf(name="n" * 60), container_id, pod)
    gc = {**host.conf(name="n" * 60), "cni.dev/valid-attachments": [{"containerID": ids[0], "ifname": "eth0"}]}
    assert host.cni("GC", gc)[0] == 0
    assert host.pings(pods[0], "10.88.0.1", count=1) == 1
    assert "eth0" not in host.ip("-brief link", netns=pods[1])


def test_gc_after_the_containers_died_frees_their_addresses(host):
    for number in range(3):
        host.add(host.conf(), f"c{number}", host.pod(f"p{number}"))
    host.sh(f"ip netns delete {host.pods[2]}", inside=False)
    del host.pods[2]
    gc = {**host.conf(), "cni.dev/valid-attachments": [{"containerID": "c0", "ifname": "eth0"}]}
    assert host.cni("GC", gc) == (0, None, "")
    assert [path for path in host.files() if path.startswith("data/net/10.")] == ["data/net/10.88.0.2"]


def test_exhausted_pool_is_error_11_then_50_and_heals_with_a_del(host):
    conf = host.conf(ipam={"dataDir": f"{host.tmp}/data", "ranges": [[{"subnet": "10.88.0.0/29"}]]})
    for number in range(5):
        host.add(conf, f"c{number}", host.pod(f"p{number}"))
    last = host.pod("last")
    exit_code, error, _ = host.cni("ADD", conf, "last", last)
    assert (exit_code, error["code"]) == (1, 11)
    assert host.cni("STATUS", conf)[1]["code"] == 50
    assert host.cni("DEL", conf, "c3", "")[0] == 0
    assert host.cni("STATUS", conf)[0] == 0
    assert address_of(host.add(conf, "last", last)) == "10.88.0.5"


def test_trace_goes_to_stderr_and_the_result_alone_to_stdout(host):
    exit_code, result, stderr = host.cni("ADD", host.conf(), "c1", host.pod("a"), CNI_TRACE="1")
    assert exit_code == 0 and result["ips"]
    assert "+ ip -batch - <<'E'\nlink add name mncni0" in stderr


def test_full_disk_is_error_5_naming_the_path_and_nothing_stays(host):
    data = f"{host.tmp}/data"
    os.mkdir(data)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k,nr_inodes=16", "tmpfs", data], check=True)
    try:
        pod = host.pod("a")
        assert host.cni("DEL", host.conf(), "c0", pod)[0] == 0
        with open(f"{data}/ballast", "wb") as ballast:
            with pytest.raises(OSError):
                while True:
                    os.write(ballast.fileno(), b"x" * 4096)
        before = host.snapshot()
        exit_code, error, _ = host.cni("ADD", host.conf(), "c1", pod)
        assert (exit_code, error["code"]) == (1, 5)
        assert "No space left on device" in error["msg"] and data in error["msg"]
        assert host.snapshot() == before
        os.unlink(f"{data}/ballast")
        host.add(host.conf(), "c1", pod)
    finally:
        subprocess.run(["umount", data], check=True)


def test_read_only_disk_is_error_5_and_del_of_what_never_was_still_works(host):
    data = f"{host.tmp}/data"
    os.mkdir(data)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", data], check=True)
    try:
        exit_code, error, _ = host.cni("ADD", host.conf(), "c1", host.pod("a"))
        assert (exit_code, error["code"]) == (1, 5)
        assert "Read-only file system" in error["msg"]
        assert host.cni("DEL", host.conf(), "c1", "")[0] == 0
    finally:
        subprocess.run(["umount", data], check=True)


def test_100_parallel_adds_on_a_host_without_a_bridge_all_differ_and_leave_nothing(host, figure):
    pods = [host.pod(f"p{number}") for number in range(100)]
    before = host.files()
    begin = time.monotonic()
    results = settle([host.start("ADD", host.conf(), f"c{number}", pod) for number, pod in enumerate(pods)])
    figure(f"100 ADDs at once in {time.monotonic() - begin:.1f} s")
    assert len({address_of(result) for result in results}) == 100
    assert len({result["interfaces"][1]["name"] for result in results}) == 100
    assert {result["interfaces"][0]["mac"] for result in results} == {"0a:58:0a:58:00:01"}
    assert host.pings(pods[0], address_of(results[99])) == 3
    settle([host.start("DEL", host.conf(), f"c{number}", pod) for number, pod in enumerate(pods)])
    assert host.files() == before
    assert host.ip("-brief link show type veth") == ""


def settle(processes):
    """The results of processes that all have to succeed."""
    results = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stdout + stderr
        results.append(json.loads(stdout) if stdout else None)
    return results


def test_a_pods_router_advertisement_cannot_become_the_hosts_default_route(host):
    host.add(host.conf(), "c1", host.pod("a"))
    assert host.sh("cat /proc/sys/net/ipv6/conf/mncni0/accept_ra") == "0\n"


def test_a_second_network_leaves_the_default_route_of_the_first_in_place(host):
    pod = host.pod("a")
    other = host.conf(name="other", bridge="mncni1", ipam={"dataDir": f"{host.tmp}/data", "ranges": [[{"subnet": "10.89.0.0/24"}]]})
    first = host.add(host.conf(), "c1", pod, "eth0")
    second = host.add(other, "c1", pod, "net1")
    for conf, result, ifname in ((host.conf(), first, "eth0"), (other, second, "net1")):
        assert host.cni("CHECK", {**conf, "prevResult": result}, "c1", pod, ifname) == (0, None, "")
    assert host.cni("DEL", other, "c1", pod, "net1")[0] == 0
    assert "default via 10.88.0.1 dev eth0" in host.ip("route", netns=pod)


def test_routes_to_one_place_over_two_gateways_are_all_there(host):
    routes = [{"dst": "10.9.0.0/16", "gw": f"10.88.0.{number}"} for number in (7, 8, 7)]
    conf = host.conf(ipam={**host.conf()["ipam"], "routes": routes})
    pod = host.pod("a")
    result = host.add(conf, "c1", pod)
    assert host.ip("route show 10.9.0.0/16", netns=pod).count("via") == 2
    assert host.cni("CHECK", {**conf, "prevResult": result}, "c1", pod) == (0, None, "")


def test_a_pod_whose_runtime_switched_ipv6_off_reaches_itself(host):
    pod = host.pod("a")
    host.sh("for c in all default lo; do echo 1 > /proc/sys/net/ipv6/conf/$c/disable_ipv6; done", netns=pod)
    host.ip("link set lo up", netns=pod)
    host.add(host.conf(ipam={"dataDir": f"{host.tmp}/data", "ranges": [[{"subnet": "fd00:88::/64"}]]}), "c1", pod)
    assert host.pings(pod, "fd00:88::2", count=1) == host.pings(pod, "fd00:88::1", count=1) == 1


def test_of_two_adds_of_one_attachment_at_once_one_wins_and_stays(host):
    for number in range(5):
        pod = host.pod(f"p{number}")
        processes = [host.start("ADD", host.conf(), f"c{number}", pod) for _ in range(2)]
        outputs = [process.communicate(timeout=60)[0] for process in processes]
        assert sorted(process.returncode for process in processes) == [0, 1], outputs
        assert host.pings(pod, "10.88.0.1", count=1) == 1
        assert host.files().count(f"data/net/10.88.0.{number + 2}") == 1


def test_del_waits_for_what_a_killed_add_still_has_running(host, tmp_path):
    """A runtime gives up on an ADD and kills it; the `ip` that it started goes on. DEL must not overtake that."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "ip").write_text('#!/bin/sh\ncase "$*" in "-batch -") touch "$MARK"; sleep 1;; esac\nexec /usr/sbin/ip "$@"\n')
    (slow / "ip").chmod(0o755)
    pod = host.pod("a")
    host.add(host.conf(), "c0", host.pod("b"))
    environ = {"PATH": f"{slow}:/usr/sbin:/usr/bin", "MARK": f"{tmp_path}/mark"}
    adding = host.start("ADD", host.conf(), "c1", pod, **environ)
    deadline = time.monotonic() + 20
    while not os.path.exists(environ["MARK"]):
        assert time.monotonic() < deadline
    adding.kill()
    adding.communicate()
    assert host.cni("DEL", host.conf(), "c1", pod)[0] == 0
    assert len(json.loads(host.ip("-json link show type veth"))) == 1, "c0's"
    assert not os.path.exists(f"{host.tmp}/data/net/10.88.0.3")


def test_gc_removes_what_a_killed_process_left_half_written(host):
    host.add(host.conf(), "c1", host.pod("a"))
    leftovers = [Path(f"{host.tmp}/data/net/.10.88.0.3.77"), Path(f"{host.tmp}/data/net/attachments/.0123456789abcdef.77")]
    for path in leftovers:
        path.write_text("c9\neth0\n" + mncni.boot_id())
    assert mncni.Leases(f"{host.tmp}/data", "net", f"{host.tmp}/run").attachments() == [("c1", "eth0")]
    assert host.cni("GC", {**host.conf(), "cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]})[0] == 0
    assert not any(path.exists() for path in leftovers)


def test_words_for_people_never_reach_stdout_even_if_stderr_is_closed(host):
    argv = ["nsenter", f"--net=/run/netns/{host.netns}", "sh", "-c", f'exec "{mncni.__file__}" 2>&-']
    environ = host.environ("ADD", "c1", host.pod("a"), "eth0")
    done = subprocess.run(argv, input=json.dumps(host.conf(ipam={"type": "nonesuch"})), capture_output=True, text=True, env=environ)
    assert json.loads(done.stdout)["code"] == 4
