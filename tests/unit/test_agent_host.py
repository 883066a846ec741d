"""What the agent makes of the host that it finds: addresses, uplinks, MTU, forwarding, other networks. Facts as `ip -json` prints them."""

import dataclasses
import ipaddress
import json

import pytest

import agent
import mncni
from tests.unit.agent_data import V4, V6, Kernel, make_settings

BOTH, ONLY4, ONLY6 = make_settings(), make_settings([4]), make_settings([6])
ROUTE_4, ROUTE_6 = "route get 192.0.2.1", "route get 2001:db8::1"


def info(text, scope="global", **flags):
    """An address of a link, as in addr_info."""
    address, _, prefixlen = text.partition("/")
    return {"family": "inet6" if ":" in text else "inet", "local": address, "prefixlen": int(prefixlen), "scope": scope, **flags}


def link(name, *infos, mtu=1500, kind=None, **more):
    flags = ["LOOPBACK", "UP"] if name == "lo" else ["BROADCAST", "UP"]
    return {
        "ifname": name,
        "flags": flags,
        "mtu": mtu,
        "addr_info": list(infos),
        **({"linkinfo": {"info_kind": kind}} if kind else {}),
        **more,
    }


def default(dev="eth0", **more):
    return {"type": "unicast", "dst": "default", "gateway": "10.0.2.2", "dev": dev, "table": "main", "protocol": "dhcp", **more}


def host_of(links, routes=(), replies=None, settings=BOTH, internal=(), endpoints=()):
    """A Context as ensure_host and adopt leave it. replies: what the kernel answers."""
    internal_ips = tuple(map(ipaddress.ip_address, internal))
    settings = dataclasses.replace(settings, endpoints=tuple(map(ipaddress.ip_address, endpoints)))
    return agent.Context(settings, Kernel(replies or {}), "boot", internal_ips=internal_ips, links=links, routes=routes)


def endpoints_of(context):
    agent.ensure_endpoints(context)
    return [str(endpoint) for endpoint in context.endpoints]


def raised(function, *arguments):
    with pytest.raises(mncni.CNIError) as caught:
        function(*arguments)
    assert caught.value.code == 7
    return caught.value.msg


LO = link("lo", info("127.0.0.1/8", "host"), info("::1/128", "host"), mtu=65536)
NAT = link("eth0", info("10.0.2.15/24", dynamic=True))
PRIVATE = link("eth1", info("192.168.56.11/24"), mtu=9000)
TO_NAT = {ROUTE_4: [{"dst": "192.0.2.1", "dev": "eth0", "prefsrc": "10.0.2.15"}]}

# ---- the node's address ----


def test_the_endpoint_is_the_nodes_internal_ip_not_the_default_routes_source():
    context = host_of([LO, NAT, PRIVATE], [default()], TO_NAT, internal=["192.168.56.11"])
    assert (endpoints_of(context), context.run.asked) == (["192.168.56.11"], [])


def test_without_a_default_route_the_internal_ip_is_enough():
    context = host_of([LO, PRIVATE], internal=["192.168.56.11"])
    assert endpoints_of(context) == ["192.168.56.11"]
    agent.ensure_mtu(context)
    assert context.mtu == 9000 - 60


@pytest.mark.parametrize("internal", [[], ["203.0.113.7"], ["2001:db8::7"]])
def test_without_an_internal_ip_of_this_host_it_is_the_default_routes_source(internal):
    assert endpoints_of(host_of([LO, NAT, PRIVATE], [default()], TO_NAT, internal=internal)) == ["10.0.2.15"]


def test_the_default_routes_of_both_families_give_an_address_each():
    links = [link("eth0", info("192.0.2.7/24"), info("2001:db8::7/64"))]
    replies = {ROUTE_4: [{"dev": "eth0", "prefsrc": "192.0.2.7"}], ROUTE_6: [{"dev": "eth0", "prefsrc": "2001:db8::7"}]}
    assert endpoints_of(host_of(links, replies=replies)) == ["192.0.2.7", "2001:db8::7"]


@pytest.mark.parametrize(
    "internal, expected",
    [
        (["192.168.57.9", "192.168.56.11", "10.0.2.15"], ["192.168.56.11", "10.0.2.15"]),  # the first is another host's
        (["2001:db8:7::11", "192.168.56.11"], ["2001:db8:7::11", "192.168.56.11"]),  # the cluster's first family comes first
    ],
)
def test_of_several_internal_ips_those_of_this_host_count_in_the_nodes_order(internal, expected):
    private = link("eth1", info("192.168.56.11/24"), info("2001:db8:7::11/64"))
    assert endpoints_of(host_of([LO, NAT, private], [default()], TO_NAT, internal=internal)) == expected


UNFIT = {
    "virtual": info("192.0.2.9/32"),
    "deprecated": info("192.0.2.9/24", deprecated=True),
    "virtual, IPv6": info("2001:db8::9/128"),
    "temporary": info("2001:db8::9/64", temporary=True, dynamic=True),
    "renumbered away": info("2001:db8::9/64", deprecated=True, dynamic=True, mngtmpaddr=True),
    "of another host too": info("2001:db8::9/64", dadfailed=True),
}


@pytest.mark.parametrize("as_internal_ip", [True, False])
@pytest.mark.parametrize("kind", UNFIT)
def test_an_address_that_goes_or_moves_is_no_endpoint(kind, as_internal_ip):
    eth0 = link("eth0", UNFIT[kind], info("192.0.2.1/24"), info("2001:db8::1/64"))
    probe, source = (ROUTE_6, "2001:db8::1") if ":" in UNFIT[kind]["local"] else (ROUTE_4, "192.0.2.1")
    replies = {probe: [{"dev": "eth0", "prefsrc": UNFIT[kind]["local"]}]}
    assert endpoints_of(host_of([LO, eth0], replies=replies, internal=[UNFIT[kind]["local"]] * as_internal_ip)) == [source]


@pytest.mark.parametrize(
    "own",
    [
        link("eth0", info("10.132.0.2/32", dynamic=True)),  # Google, Hetzner: a single address, alone
        link("eth0", info("2001:db8::9/128", dynamic=True), info("2001:db8::1/64", dynamic=True, mngtmpaddr=True)),  # DHCPv6 beside SLAAC
        link("eth0", info("2001:db8::9/128"), info("fe80::9/64", "link")),
        link("lo", info("127.0.0.1/8", "host"), info("10.99.0.1/32")),  # a host that speaks BGP
        link("dummy0", info("10.99.0.1/32"), kind="dummy"),
        link("eth0", info("2001:db8::9/64", tentative=True), info("2001:db8::1/64")),  # at boot, for a second
    ],
)
def test_an_address_of_full_length_that_is_the_hosts_own_is_an_endpoint(own):
    address = next(each["local"] for each in own["addr_info"] if each["scope"] == "global")
    assert endpoints_of(host_of([own], internal=[address])) == [address]


@pytest.mark.parametrize("internal, said", [([], "no default"), (["192.0.2.66"], "neither the Node's InternalIP (192.0.2.66) nor default")])
def test_a_node_without_any_address_says_what_was_looked_at(internal, said):
    context = host_of([LO, link("eth0")], internal=internal)
    assert endpoints_of(context) == []
    what = f"{said} route tells an address of this host for the other nodes: give it with --endpoint"
    assert raised(agent.ensure_mtu, context) == what.replace("nor default", "nor a default")


def test_a_node_whose_own_address_is_inside_the_cluster_cidr_is_refused_before_the_floor_cuts_it_off():
    links = [link("eth0", info("10.244.3.3/16"))]
    said = raised(agent.ensure_endpoints, host_of(links, replies={ROUTE_4: [{"dev": "eth0", "prefsrc": "10.244.3.3"}]}))
    assert said == "this node's address 10.244.3.3 is inside --cluster-cidr: nodes, services and pods need addresses of their own"


def test_an_internal_ip_that_changes_is_followed_without_a_change_of_the_pod_cidrs(tmp_path):
    class Cluster(agent.Store):
        def identity(self):
            return {"uid": "u", "podCIDRs": ["10.244.255.0/24"], "addresses": [self.address, "not an address"]}

    dirs = {name: str(tmp_path / name) for name in ("nodes_dir", "conf_dir", "bin_dir", "state_dir", "run_dir")}
    cluster = Cluster()
    its = agent.Agent(make_settings([4], **dirs), cluster, Kernel({}))
    found = []
    for cluster.address in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "10.244.3.3"):
        found.append((its.adopt(), list(map(str, its.context.internal_ips))))
    inside = "this node's address 10.244.3.3 is inside --cluster-cidr: nodes, services and pods need addresses of their own"
    expected = [((True, ""), "192.0.2.1"), ((False, ""), "192.0.2.1"), ((True, ""), "192.0.2.2"), ((True, inside), "10.244.3.3")]
    assert found == [(answer, [address]) for answer, address in expected]


@pytest.mark.parametrize("name", ["Node-1.Example", " node-1.example\n"])
def test_a_host_name_is_lowered_as_the_kubelet_does_and_a_name_that_is_given_is_not(mocker, name):
    """The default is computed when the module is read, so a new interpreter has to read it."""
    import importlib.util

    mocker.patch("socket.gethostname", return_value=name)
    spec = importlib.util.spec_from_file_location("agent_again", agent.__file__)
    again = importlib.util.module_from_spec(spec)
    mocker.patch.dict("sys.modules", {"agent_again": again})
    spec.loader.exec_module(again)
    assert again.build_parser({}).parse_args(["run"]).node_name == "node-1.example"
    assert again.build_parser({"MNCNI_NODE_NAME": "From-Downward-API"}).parse_args(["run"]).node_name == "From-Downward-API"


# ---- the MTU ----


@pytest.mark.parametrize(
    "endpoints, mtus, mtu",
    [((V4,), [1500], 1440), ((V6,), [1500], 1420), ((V4, V6), [1500, 1400], 1320), ((V4,), [9001], 8941)],
)
def test_the_pods_mtu_is_the_underlays_less_the_overhead(endpoints, mtus, mtu):
    links = [link(f"eth{number}", info(f"{each}/24"), mtu=mtus[number]) for number, each in enumerate(endpoints)]
    context = host_of(links, endpoints=endpoints)
    agent.ensure_endpoints(context)
    agent.ensure_mtu(context)
    assert context.mtu == mtu


@pytest.mark.parametrize("settings, mtu, least", [(BOTH, 1339, 1280), (ONLY4, 635, 576)])
def test_an_underlay_too_narrow_for_the_pods_is_refused(settings, mtu, least):
    context = host_of([link("eth0", info("192.0.2.1/24"), mtu=mtu)], settings=settings, endpoints=[V4])
    agent.ensure_endpoints(context)
    assert f"leaves {least - 1} bytes" in raised(agent.ensure_mtu, context)


def test_an_mtu_that_does_not_fit_or_that_changes_is_told_once(caplog):
    context = host_of([link("eth0", info("192.0.2.1/24"), mtu=1500)], settings=dataclasses.replace(ONLY4, mtu=1500), endpoints=[V4])
    agent.ensure_endpoints(context)
    agent.ensure_mtu(context)
    agent.ensure_mtu(context)
    assert (context.mtu, caplog.messages) == (
        1500,
        ["--mtu 1500 is more than the underlay leaves for pods, 1440: large packets will be lost between nodes"],
    )
    caplog.clear()
    context.settings = ONLY4
    agent.ensure_mtu(context)
    assert caplog.messages == ["the MTU of new pods is 1440, it was 1500; pods that run keep theirs"]


def test_an_endpoint_that_no_interface_has_is_named():
    context = host_of([LO, NAT], [default()], endpoints=[V4])
    agent.ensure_endpoints(context)
    assert raised(agent.ensure_mtu, context) == "no interface has the address --endpoint 192.0.2.1; is it up?"


WIDE = link("eth1", info("192.168.56.11/24"), mtu=9000)
OUTLETS = {  # where the endpoint's packets leave: the link that has it, else the default routes', else all
    "its own link, not the default route's": ([LO, NAT, WIDE], [default("eth0")], "192.168.56.11", 9000),
    "lo": ([link("lo", info("10.99.0.1/32"), mtu=65536), NAT, WIDE], [default("eth0")], "10.99.0.1", 1500),
    "a dummy": ([LO, link("dummy0", info("10.99.0.1/32"), kind="dummy", mtu=1280), WIDE], [default("eth1")], "10.99.0.1", 9000),
    "lo and several paths": (
        [link("lo", info("10.99.0.1/32"), mtu=65536), link("eth0", mtu=4000), link("eth1", mtu=3000), link("docker0", kind="bridge")],
        [{"dst": "default", "nexthops": [{"dev": "eth0"}, {"dev": "eth1"}]}],
        "10.99.0.1",
        3000,
    ),
    "lo and no default route": (
        [link("lo", info("10.99.0.1/32"), mtu=65536), link("eth0", mtu=4000), link("mncni0", mtu=1000), link("mncni-host", mtu=1000)],
        [],
        "10.99.0.1",
        4000,
    ),
}


@pytest.mark.parametrize("where", OUTLETS)
def test_the_mtu_is_that_of_the_link_by_which_packets_leave(where):
    links, routes, address, mtu = OUTLETS[where]
    context = host_of(links, routes, internal=[address])
    agent.ensure_endpoints(context)
    agent.ensure_mtu(context)
    assert context.mtu == mtu - 60


# ---- forwarding and router advertisements ----


def netconf(family, interface, forwarding=True, rp_filter=None):
    return {"family": family, "interface": interface, "forwarding": forwarding, **({"rp_filter": rp_filter} if rp_filter else {})}


class Forwarding:
    """run() that answers `netconf show` of the namespace and of the host, and keeps the other commands."""

    def __init__(self, inside, host):
        self.inside, self.host, self.ran = inside, host, []

    def __call__(self, command):
        if command.stdin == "netconf show\n":
            return mncni.Reply(0, json.dumps(self.inside if "nsenter" in command.argv else self.host), "")
        self.ran.append(" ".join([*command.argv, "<", command.stdin.strip()]).replace("nsenter --net=/run/netns/mncni-wg", "ns"))
        return mncni.Reply(0, "", "")


RIGHT = [netconf("inet", "all", rp_filter="off"), netconf("inet6", "all"), netconf("inet6", "lo", False)]


def forwarding_writes(inside, host, links=(), routes=(), settings=BOTH):
    run = Forwarding(inside, host)
    agent.ensure_forwarding(agent.Context(settings, run, "boot", links=list(links), routes=list(routes), endpoints=(V4,)))
    return run.ran


def test_forwarding_and_the_path_filter_of_the_namespace_are_set_where_they_are_wrong():
    new = [
        netconf("inet", "lo", rp_filter="off"),
        netconf("inet", "mncni-ns", rp_filter="strict"),
        netconf("inet", "all", False, "loose"),
        netconf("inet6", "all", False),
        netconf("inet6", "lo", False),
    ]
    assert forwarding_writes(new, RIGHT) == [
        "ns tee /proc/sys/net/ipv4/conf/all/forwarding /proc/sys/net/ipv6/conf/all/forwarding < 1",
        "ns tee /proc/sys/net/ipv4/conf/all/rp_filter /proc/sys/net/ipv4/conf/mncni-ns/rp_filter < 0",
    ]
    assert forwarding_writes(RIGHT, RIGHT) == []


@pytest.mark.parametrize("settings, families", [(ONLY4, "4"), (ONLY6, "6"), (BOTH, "46")])
def test_a_host_that_does_not_forward_does_so_for_the_families_of_its_pods(settings, families):
    host = [netconf("inet", "all", False), netconf("inet6", "all", False)]
    keys = " ".join(f"/proc/sys/net/ipv{family}/conf/all/forwarding" for family in families)
    assert forwarding_writes(RIGHT, host, settings=settings) == [f"tee {keys} < 1"]


def test_links_that_do_not_forward_on_a_host_that_does_are_set_if_they_are_the_agents_or_uplinks():
    """net.ipv4.ip_forward=1 with conf.default.forwarding=0: what was made later does not forward."""
    names = ("mncni0", "mncni-host", "eth0", "eth1", "eth2", "docker0", "lo", "default")
    host = [
        netconf("inet", "all"),
        netconf("inet6", "all"),
        *(netconf(family, name, False) for name in names for family in ("inet", "inet6")),
    ]
    links = [LO, link("eth0", info(f"{V4}/24")), *map(link, ("eth1", "eth2", "docker0", "mncni0", "mncni-host"))]
    keys = " ".join(f"/proc/sys/net/ipv4/conf/{name}/forwarding" for name in ("eth0", "eth1", "mncni-host", "mncni0"))
    assert forwarding_writes(RIGHT, host, links, [default("eth1")]) == [f"tee {keys} < 1"]
    inside = [*RIGHT, *(netconf("inet", name, False) for name in ("mncni-ns", "mncni-wg0", "lo"))]
    keys = " ".join(f"/proc/sys/net/ipv4/conf/{name}/forwarding" for name in ("mncni-ns", "mncni-wg0"))
    assert forwarding_writes(inside, RIGHT) == [f"ns tee {keys} < 1"]


SLAAC = info("2001:db8::5/64", dynamic=True, mngtmpaddr=True)


def test_advertisements_stay_accepted_where_the_kernel_reads_them_and_nowhere_else(mocker):
    """eth0: the default route. eth1: an address by advertisement. eth2: userspace reads them. eth3: 2 already. eth4: got nothing."""
    modes = {"eth0": 1, "eth1": 1, "eth2": 0, "eth3": 2, "eth4": 1}
    files = {f"/proc/sys/net/ipv6/conf/{name}/accept_ra": f"{mode}\n" for name, mode in modes.items()}
    mocker.patch.object(mncni, "read_file", files.get)
    host = [netconf("inet", "all"), netconf("inet6", "all", False)]
    links = [link("eth0"), link("eth1", SLAAC), link("eth2", SLAAC), link("eth3", SLAAC), link("eth4")]
    routes = [default("eth0", protocol="ra"), default("eth2", protocol="ra")]
    assert forwarding_writes(RIGHT, host, links, routes) == [
        "tee /proc/sys/net/ipv6/conf/eth0/accept_ra /proc/sys/net/ipv6/conf/eth1/accept_ra < 2",
        "tee /proc/sys/net/ipv6/conf/all/forwarding < 1",
    ]
    assert forwarding_writes(RIGHT, RIGHT, links, routes) == [], "a host that forwards already ignores them already"
    assert forwarding_writes(RIGHT, host, links, routes, ONLY4) == [], "no IPv6 pods, no change of IPv6"


# ---- a host without IPv6 ----

OFF = {
    "all": ({"/proc/sys/net/ipv6/conf/all/disable_ipv6": "1\n"}, "sysctl net.ipv6.conf.all.disable_ipv6 is 1"),
    "new links": ({"/proc/sys/net/ipv6/conf/default/disable_ipv6": "1\n"}, "sysctl net.ipv6.conf.default.disable_ipv6 is 1"),
    "kernel": ({}, "ipv6.disable=1 on the kernel's command line"),
}


@pytest.mark.parametrize("how", OFF)
@pytest.mark.parametrize("settings", [BOTH, ONLY6])
def test_an_ipv6_cluster_cidr_on_a_host_without_ipv6_is_refused_naming_both(mocker, how, settings):
    files, said = OFF[how]
    mocker.patch.object(mncni, "read_file", files.get)
    mocker.patch("os.path.exists", lambda path: how != "kernel")
    cidr = "fd00:244::/32"
    what = f"--cluster-cidr {cidr} needs IPv6, which is off on this host ({said}); switch it on, or leave {cidr} out"
    assert raised(agent.ensure_host, agent.Context(settings, Kernel({}), "boot")) == what
    agent.refuse_missing_ipv6(ONLY4.cluster_cidrs)


def test_without_ipv6_in_the_kernel_nothing_asks_for_it(mocker):
    mocker.patch("os.path.exists", lambda path: False)
    assert not [entry for entry in agent.ns_routes(ONLY4) if ":" in entry["dst"]]
    asked = []
    agent.look_routes(lambda command: asked.append(command.argv) or mncni.Reply(0, "[]", ""))
    assert len(asked) == 1 and "-6" not in asked[0]


# ---- other networks of the host inside the cluster CIDR ----


def inside(dst, dev="eth0", protocol="static", **more):
    return {"type": "unicast", "dst": dst, "dev": dev, "table": "main", "protocol": protocol, **more}


LOCAL = {"type": "local", "table": "local", "protocol": "kernel"}
STRANGERS = {
    "docker": (
        [link("docker0", info("10.244.7.1/24"), kind="bridge")],
        [inside("10.244.7.0/24", "docker0", "kernel"), inside("10.244.7.1", "docker0", **LOCAL)],
        "10.244.7.1/24 on docker0",
        "ip link delete docker0",
    ),
    "a second NIC": (
        [link("eth2", info("10.244.9.5/24"))],
        [inside("10.244.9.0/24", "eth2", "kernel")],
        "10.244.9.5/24 on eth2",
        "ip address delete 10.244.9.5/24 dev eth2",
    ),
    "IPv6": (
        [link("eth2", info("fd00:244:9::5/64"))],
        [inside("fd00:244:9::/64", "eth2", "kernel"), inside("fd00:244:9::5", "eth2", **LOCAL)],
        "fd00:244:9::5/64 on eth2",
        "ip address delete fd00:244:9::5/64 dev eth2",
    ),
    "an address of a wider network": ([link("eth2", info("10.244.9.5/8"))], [], "10.244.9.5/8 on eth2", "delete 10.244.9.5/8 dev eth2"),
    "a VPN's route": ([link("tun0")], [inside("10.244.64.0/18", "tun0")], "the route 10.244.64.0/18 dev tun0", "18 dev tun0"),
    "another table": ([], [inside("10.244.0.0/16", "tailscale0", "3", table="52")], "10.244.0.0/16 dev tailscale0 table 52", "table 52"),
    "a black hole": (
        [],
        [{"type": "blackhole", "dst": "10.244.1.0/26", "table": "main", "protocol": "bird"}],
        "the route blackhole 10.244.1.0/26",
        "ip route delete blackhole 10.244.1.0/26",
    ),
    "any address": (
        [],
        [inside("10.244.11.0/24", "lo", **{**LOCAL, "protocol": "boot"})],
        "local 10.244.11.0/24 dev lo table local",
        "table local",
    ),
    "flannel": (
        [link("cni0", info("10.244.1.1/24"), kind="bridge"), link("flannel.1", info("10.244.1.0/32"), kind="vxlan")],
        [inside("10.244.1.0/24", "cni0", "kernel"), inside("10.244.2.0/24", "flannel.1", "boot")],
        "10.244.1.1/24 on cni0, 10.244.1.0/32 on flannel.1, the route 10.244.2.0/24 dev flannel.1",
        "(ip link delete cni0, ip link delete flannel.1, ip route delete 10.244.2.0/24 dev flannel.1",
    ),
}
OWN = [
    link("mncni0", info("10.244.255.1/24"), info("fd00:244:ffff::1/64"), kind="bridge"),
    link("mncni-host", info("10.244.255.1/32")),
    link("eth0", info("10.0.2.15/24"), info("10.245.0.1/16")),
]
OWN_ROUTES = [
    inside("10.244.255.0/24", "mncni0", "kernel"),
    inside("10.244.255.1", "mncni0", **LOCAL),
    inside("10.244.0.0/16", "mncni-host", "201"),
    {"type": "unreachable", "dst": "10.244.0.0/16", "table": "main", "protocol": "201", "metric": 4278198272},
    {"type": "unreachable", "dst": "fd00:244::/32", "dev": "lo", "table": "main", "protocol": "201", "metric": 4278198272},
    {"type": "broadcast", "dst": "10.244.255.255", "dev": "eth9", "table": "local", "protocol": "kernel"},
    default(),
]


def test_the_agents_own_and_what_lies_outside_is_no_other_network():
    assert agent.find_clash(BOTH, OWN, OWN_ROUTES) == ""


@pytest.mark.parametrize("kind", STRANGERS)
def test_another_network_inside_the_cluster_cidr_is_named_once_with_the_way_to_remove_it(kind):
    links, routes, said, remove = STRANGERS[kind]
    clash = agent.find_clash(BOTH, OWN + links, OWN_ROUTES + routes)
    assert clash.startswith("this host has another network inside --cluster-cidr 10.244.0.0/16, fd00:244::/32: ")
    assert f"{said};" in clash and f"{remove})" in clash and "choose another --cluster-cidr" in clash, clash


def test_at_start_another_network_is_refused_before_the_floor_later_the_floor_stays(monkeypatch):
    ran = []

    def run(command):
        ran.append(str(command))
        return mncni.Reply(0, "[]" if "ip" in command.argv else "", "")

    monkeypatch.setattr(agent, "write_if_changed", lambda *arguments: True)
    context = agent.Context(BOTH, run, "boot", clash="this host has another network")
    assert raised(agent.ensure_floor, context) == "this host has another network" and ran == []
    context.loaded["host"] = [agent.host_firewall(ONLY4), None]
    assert raised(agent.ensure_floor, context) and ran == [], "one more cluster CIDR: its floor is not there yet"
    context.loaded["host"] = [agent.host_firewall(BOTH), None]
    agent.ensure_floor(context)
    assert any("route replace unreachable 10.244.0.0/16" in command for command in ran)


# ---- netfilter sees bridged packets ----


@pytest.mark.parametrize(
    "families, present, written, missing",
    [
        ([4, 6], {"iptables": "0", "ip6tables": "0"}, ["iptables", "ip6tables"], False),
        ([4, 6], {"iptables": "1", "ip6tables": "0"}, ["ip6tables"], False),
        ([6], {"iptables": "0", "ip6tables": "1"}, [], False),
        ([4, 6], {}, [], True),
    ],
)
def test_in_kubernetes_netfilter_sees_bridged_packets_or_log_and_status_say_what_to_do(
    families, present, written, missing, monkeypatch, mocker, caplog
):
    files = {f"/proc/sys/net/bridge/bridge-nf-call-{name}": f"{value}\n" for name, value in present.items()}
    monkeypatch.setattr(mncni, "read_file", files.get)
    for nodes_dir in ("", "/nodes"):
        run = mocker.Mock(return_value=mncni.Reply(0, "", ""))
        context = agent.Context(make_settings(families, nodes_dir=nodes_dir), run, "boot")
        agent.ensure_bridged(context)
        agent.ensure_bridged(context)
        paths = [f"/proc/sys/net/bridge/bridge-nf-call-{name}" for name in written]
        assert [call.args[0].argv for call in run.call_args_list] == (2 * [["tee", *paths]] if paths and not nodes_dir else [])
        assert ("modprobe br_netfilter" in context.unbridged) == (missing and not nodes_dir)
        status = {"node": "n1", "ok": True, "reason": "", "services": context.unbridged, "peers": [], "quarantine": {}}
        shown = agent.format_status(status, 0)
        assert ("modprobe br_netfilter" in shown) == (missing and not nodes_dir) and "n1: ok" in shown
    assert caplog.text.count("modprobe br_netfilter") == missing, "said once"
