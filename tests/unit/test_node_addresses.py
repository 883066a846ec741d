"""Which addresses of a host are the node's own, so that their ports are host ports: portmap's look_node_addresses."""

import json

import mncni

OWN = [{"local": "192.0.2.10", "prefixlen": 24}, {"local": "2001:db8::10", "prefixlen": 64}]
ETH0 = {"ifname": "eth0", "flags": ["UP"], "mtu": 1500, "addr_info": OWN}


def addresses(*facts, routes_v6=()):
    def run(command):
        return mncni.Reply(0, json.dumps(list(routes_v6 if "-6" in command.argv else facts)) + "\n", "")

    return set(mncni.look_node_addresses(run))


def dummy(name, *addrs):
    info = [{"local": address, "prefixlen": 128 if ":" in address else 32} for address in addrs]
    return {"ifname": name, "flags": ["NOARP"], "mtu": 1500, "linkinfo": {"info_kind": "dummy"}, "addr_info": info}


def test_addresses_of_services_that_kube_proxy_keeps_are_not():
    assert addresses(ETH0, dummy("kube-ipvs0", "10.96.0.1", "10.96.0.10")) == {"192.0.2.10", "2001:db8::10"}
    assert addresses(ETH0, {**dummy("kube-ipvs0", "10.96.0.1"), "linkinfo": {}}) == {"192.0.2.10", "2001:db8::10"}


def test_addresses_that_a_load_balancer_or_a_dns_cache_keeps_on_a_dummy_are_not():
    dns = dummy("nodelocaldns", "169.254.20.10", "fd00::a")
    assert addresses(ETH0, dummy("lb0", "198.51.100.1"), dns) == {"192.0.2.10", "2001:db8::10"}


def test_the_address_that_the_node_sends_from_is_wherever_it_is():
    """A routing daemon announces the node's address, which is on a dummy device; IPv4, and IPv6."""
    default = {"dst": "default", "gateway": "fe80::1", "dev": "eth1", "prefsrc": "198.51.100.7"}
    assert addresses(dummy("lo0", "198.51.100.7", "203.0.113.1"), default) == {"198.51.100.7"}
    six = {"dst": "default", "gateway": "fe80::1", "dev": "eth1", "prefsrc": "2001:db8::7"}
    assert addresses(dummy("lo0", "2001:db8::7", "2001:db8::8"), routes_v6=[six]) == {"2001:db8::7"}


def test_virtual_addresses_on_the_nodes_own_links_are():
    vip = {"ifname": "eth0", "flags": ["UP"], "mtu": 1500, "addr_info": [*ETH0["addr_info"], {"local": "192.0.2.99", "prefixlen": 32}]}
    assert "192.0.2.99" in addresses(vip)
