"""IPAM's configuration: where addresses, DNS and requests come from, and which of several sources wins."""

import pytest

import mncni


def request(conf, **environ):
    conf = {"name": "net", "cniVersion": "1.1.0", "ipam": {"ranges": [[{"subnet": "10.88.0.0/24"}]]}, **conf}
    return mncni.Request({"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", **environ}, conf)


def test_resolv_conf_becomes_the_dns_of_the_result(tmp_path):
    path = tmp_path / "resolv.conf"
    lines = ["# comment", "nameserver 10.0.0.1", "nameserver fd00::1", "domain d.test", "search a.test b.test", "options ndots:5 edns0"]
    path.write_text("\n".join([*lines, "nameserver", ""]))
    ipam = mncni.parse_ipam(request({"ipam": {"ranges": [[{"subnet": "10.88.0.0/24"}]], "resolvConf": str(path)}}))
    assert ipam["dns"] == {
        "nameservers": ["10.0.0.1", "fd00::1"],
        "domain": "d.test",
        "search": ["a.test", "b.test"],
        "options": ["ndots:5", "edns0"],
    }


@pytest.mark.parametrize(
    "own, wanted",
    [({}, {"domain": "ipam"}), ({"domain": "conf"}, {"domain": "conf"}), ({"nameservers": []}, {"nameservers": []})],
)
def test_dns_of_the_configuration_wins_over_ipams_even_if_it_is_an_empty_list(own, wanted):
    made = request({"dns": own})
    result = mncni.naivewg_result(made, mncni.parse_naivewg(made), {"ips": [], "routes": [], "dns": {"domain": "ipam"}}, "", "")
    assert result["dns"] == wanted


def test_ranges_of_the_runtime_come_before_those_of_the_configuration():
    made = request({"runtimeConfig": {"IPRanges": [[{"subnet": "10.99.0.0/24"}]]}})
    assert [str(ranges[0]["subnet"]) for ranges in mncni.parse_ipam(made)["range_sets"]] == ["10.99.0.0/24", "10.88.0.0/24"]


def test_the_older_keys_make_a_range_before_the_others():
    older = {"subnet": "10.77.0.0/24", "rangeStart": "10.77.0.10", "rangeEnd": "10.77.0.20", "gateway": "10.77.0.254"}
    sets = mncni.parse_ipam(request({"ipam": {**older, "ranges": [[{"subnet": "10.88.0.0/24"}]]}}))["range_sets"]
    assert [str(mncni.ipaddress.ip_address(sets[0][0][key])) for key in ("start", "end")] == ["10.77.0.10", "10.77.0.20"]
    assert str(sets[0][0]["gateway"]) == "10.77.0.254" and len(sets) == 2


@pytest.mark.parametrize(
    "conf, environ, wanted",
    [
        ({"runtimeConfig": {"ips": ["10.88.0.5/24"]}, "args": {"cni": {"ips": ["10.88.0.6"]}}}, {"CNI_ARGS": "IP=10.0.0.7"}, ["10.88.0.5"]),
        ({"args": {"cni": {"ips": ["10.88.0.6/24"]}}}, {"CNI_ARGS": "IP=10.88.0.7"}, ["10.88.0.6"]),
        ({}, {"CNI_ARGS": "IgnoreUnknown=1;IP=10.88.0.7,fd00::7"}, ["10.88.0.7", "fd00::7"]),
    ],
)
def test_of_the_requests_for_addresses_the_runtimes_wins_then_args_then_cni_args(conf, environ, wanted):
    assert [str(ip) for ip in mncni.requested_ips(request(conf, **environ))] == wanted


def test_of_the_requests_for_a_mac_the_runtimes_wins_then_args_then_cni_args():
    conf = {"args": {"cni": {"mac": "02:00:00:00:00:02"}}}
    environ = {"CNI_ARGS": "MAC=02:00:00:00:00:03"}
    assert mncni.requested_mac(request({**conf, "runtimeConfig": {"mac": "02:00:00:00:00:01"}}, **environ)) == "02:00:00:00:00:01"
    assert mncni.requested_mac(request(conf, **environ)) == "02:00:00:00:00:02"
    assert mncni.requested_mac(request({}, **environ)) == "02:00:00:00:00:03"


def test_a_route_keeps_all_its_attributes_on_the_way_to_ip():
    route = {"dst": "10.9.0.0/16", "gw": "10.88.0.7", "mtu": 1300, "advmss": 1200, "priority": 5, "table": 100, "scope": 0}
    assert mncni.parse_route(route) == route
    line = mncni.route_line(route, "eth0")
    assert line == "route prepend 10.9.0.0/16 via 10.88.0.7 dev eth0 mtu 1300 advmss 1200 metric 5 table 100 scope 0"


@pytest.mark.parametrize("text", ["10.0.0.010", "010.0.0.1", "::ffff:10.0.0.08", "10.0.0.0%eth0", "10.0.0"])
def test_an_address_that_some_would_read_otherwise_is_none(text):
    assert not mncni.is_address(text, mncni.ipaddress.ip_address)
