"""What agent.py would do, as data: peers, routes, addresses, links, firewalls, the conflist. Pure: no root, no kernel, no files."""

import ast
import dataclasses
import ipaddress
import json
from pathlib import Path

import pytest

import agent
import mncni
from tests.unit.agent_data import V4, V6, Kernel, key_of, make_settings, parse, text_of

A, B, C, D = (key_of(number) for number in (1, 2, 3, 4))
SECRET = "SECRETsecretSECRETsecretSECRETsecretSECRET0="
BOTH, ONLY4, ONLY6 = make_settings(), make_settings([4]), make_settings([6])


def raised(function, *arguments):
    """The CNIError of a call that has to fail."""
    with pytest.raises(mncni.CNIError) as caught:
        function(*arguments)
    return caught.value


# ---- peers ----


def peer(name, endpoint, *allowed_ips, set_back=0):
    return {"name": name, "endpoint": endpoint, "allowed_ips": set(allowed_ips), "set_back": set_back}


def present(endpoint, *allowed_ips):
    return {"endpoint": endpoint, "allowed_ips": set(allowed_ips), "handshake": 0, "rx": 0, "tx": 0}


def test_nothing_to_do_is_an_empty_plan():
    desired = {A: peer("a", "192.0.2.1:1", "10.244.1.0/24")}
    assert agent.plan_peers(desired, {A: present("192.0.2.1:1", "10.244.1.0/24")}, {}) == []
    assert agent.plan_peers({}, {}, {}) == []


def test_a_new_peer_gets_all_that_it_needs():
    desired = {A: peer("a", "192.0.2.1:1", "fd00:244:1::/64", "10.244.1.0/24")}
    assert agent.plan_peers(desired, {}, {}) == [["peer", A, "endpoint", "192.0.2.1:1", "allowed-ips", "10.244.1.0/24,fd00:244:1::/64"]]


def test_only_what_changed_is_sent():
    there = {A: present("192.0.2.1:1", "10.244.1.0/24"), B: present("192.0.2.2:1", "10.244.2.0/24")}
    sent = {A: peer("a", "192.0.2.1:1", "10.244.1.0/24"), B: peer("b", "192.0.2.2:1", "10.244.2.0/24")}
    moved = {A: peer("a", "192.0.2.77:1", "10.244.1.0/24"), B: peer("b", "192.0.2.2:1", "10.244.2.0/24")}
    assert agent.plan_peers(moved, there, sent) == [["peer", A, "endpoint", "192.0.2.77:1"]]
    grown = {A: peer("a", "192.0.2.1:1", "10.244.1.0/24"), B: peer("b", "192.0.2.2:1", "10.244.2.0/24", "10.244.3.0/24")}
    assert agent.plan_peers(grown, there, sent) == [["peer", B, "allowed-ips", "10.244.2.0/24,10.244.3.0/24"]]


def test_a_peer_that_roams_is_not_fought():
    desired = {A: peer("a", "192.0.2.1:1", "10.244.1.0/24")}
    there = {A: present("198.51.100.9:4711", "10.244.1.0/24")}
    assert agent.plan_peers(desired, there, desired) == []


def test_a_roaming_peer_whose_record_changes_is_followed_there():
    desired = {A: peer("a", "192.0.2.2:1", "10.244.1.0/24")}
    there = {A: present("198.51.100.9:4711", "10.244.1.0/24")}
    sent = {A: peer("a", "192.0.2.1:1", "10.244.1.0/24")}
    assert agent.plan_peers(desired, there, sent) == [["peer", A, "endpoint", "192.0.2.2:1"]]


def test_a_peer_without_an_endpoint_gets_it_again():
    desired = {A: peer("a", "192.0.2.1:1", "10.244.1.0/24")}
    assert agent.plan_peers(desired, {A: present("", "10.244.1.0/24")}, desired) == [["peer", A, "endpoint", "192.0.2.1:1"]]


def test_a_peer_whose_clock_was_set_back_is_made_anew_and_greeted():
    sent, there = {A: peer("a", "192.0.2.1:1", "10.244.1.0/24")}, {A: present("198.51.100.9:4711", "10.244.1.0/24")}
    desired = {A: peer("a", "192.0.2.1:1", "10.244.1.0/24", set_back=1700000000)}
    assert agent.plan_peers(desired, there, sent) == [
        ["peer", A, "remove"],
        ["peer", A, "endpoint", "192.0.2.1:1", "allowed-ips", "10.244.1.0/24"],
        ["peer", A, "persistent-keepalive", "1"],
        ["peer", A, "persistent-keepalive", "0"],
    ]
    assert agent.plan_peers(desired, there, desired) == []
    assert agent.plan_peers(desired, there, {}) == [["peer", A, "endpoint", "192.0.2.1:1"]]  # not known which one it was
    assert [words[2] for words in agent.plan_peers(desired, {}, sent)] == ["endpoint"]  # there is none to forget


def greeting(key):
    return [["peer", key, "persistent-keepalive", "1"], ["peer", key, "persistent-keepalive", "0"]]


def test_a_node_that_changed_its_key_gets_a_new_peer_that_is_greeted_and_awaited():
    sent, there = {A: peer("a", "192.0.2.1:1", "10.244.1.0/24")}, {A: present("192.0.2.1:1", "10.244.1.0/24")}
    desired = {B: peer("a", "192.0.2.1:1", "10.244.1.0/24"), C: peer("c", "192.0.2.3:1", "10.244.3.0/24")}
    assert agent.changed_keys(desired, sent) == {B} and agent.changed_keys(desired, desired) == set()  # C is of another node
    anew, awaited = agent.plan_greetings({}, there, {B}, A, 5)
    assert (anew, awaited) == ({B}, {B: (5 + agent.GREET_S, agent.GREET_S)})
    plan = agent.plan_peers(desired, there, sent, anew)
    first = ["peer", B, "endpoint", "192.0.2.1:1", "allowed-ips", "10.244.1.0/24"]
    second = ["peer", C, "endpoint", "192.0.2.3:1", "allowed-ips", "10.244.3.0/24"]
    assert plan == [first, *greeting(B), second, ["peer", A, "remove"]]


def test_a_new_key_that_does_not_answer_is_made_anew_and_greeted_less_and_less_often_and_not_for_ever():
    desired, there = {B: peer("b", "192.0.2.2:1", "10.244.2.0/24")}, {B: present("192.0.2.2:1", "10.244.2.0/24")}
    _, awaited = agent.plan_greetings({}, {}, {B}, A, 0)
    times, now = [], 0
    while awaited:
        now = round(now + 0.05, 2)
        anew, awaited = agent.plan_greetings(awaited, there, set(), A, now)
        times += [now] if anew else []
        plan = agent.plan_peers(desired, there, desired, anew)
        made = ["peer", B, "endpoint", "192.0.2.2:1", "allowed-ips", "10.244.2.0/24"]
        assert plan == ([["peer", B, "remove"], made, *greeting(B)] if anew else [])
    assert times == pytest.approx([0.1, 0.3, 0.7, 1.5, 3.1, 6.3], abs=0.15)


def test_of_one_node_five_keys_a_minute_are_greeted():
    greeted, allowed = {}, []
    for now in (0, 10, 20, 30, 40, 50, 59, 61, 65, 71):
        keys, greeted = agent.limit_greetings({str(now): "a"}, greeted, now)
        allowed += keys
    assert allowed == ["0", "10", "20", "30", "40", "61", "71"]
    assert agent.limit_greetings({"other": "b"}, greeted, 72)[0] == {"other"}
    assert agent.limit_greetings({}, greeted, 200) == (set(), {})


@pytest.mark.parametrize("there", [{B: {**present("192.0.2.2:1"), "handshake": 1700000000}}, {}])
def test_a_new_key_that_has_answered_or_is_gone_is_no_longer_awaited(there):
    assert agent.plan_greetings({B: (1, 0.1)}, there, set(), A, 2) == (set(), {})


def test_of_two_that_greet_each_other_one_is_twice_as_fast():
    pauses = [agent.plan_greetings({}, {}, {theirs}, ours, 0)[1][theirs][1] for ours, theirs in ((A, B), (B, A))]
    assert pauses[1] == 2 * pauses[0]


def test_removals_come_last_and_the_order_is_by_name():
    desired = {C: peer("b", "192.0.2.3:1", "10.244.3.0/24"), A: peer("c", "192.0.2.1:1", "10.244.1.0/24")}
    plan = agent.plan_peers(desired, {B: present("192.0.2.2:1", "10.244.2.0/24"), D: present("")}, {})
    assert [words[1:3] for words in plan] == [[C, "endpoint"], [A, "endpoint"], [B, "remove"], [D, "remove"]]


def play(plan, state):
    """State after `wg set`, as the kernel does it: allowed-ips replaces, and takes a network from the peer that had it."""
    state = {key: set(cidrs) for key, cidrs in state.items()}
    for _, key, *words in plan:
        if words == ["remove"]:
            state.pop(key)
            continue
        options = dict(zip(words[::2], words[1::2]))
        if "allowed-ips" in options:
            wanted = set(options["allowed-ips"].split(","))
            state = {other: cidrs - wanted for other, cidrs in state.items()} | {key: wanted} if wanted else state
    return state


@pytest.mark.parametrize(
    "before, after",
    [
        ({A: {"x"}, B: {"y"}}, {A: {"y"}, B: {"x"}}),
        ({A: {"x", "y"}, B: {"z"}}, {A: {"x"}, B: {"y", "z"}}),
        ({A: {"x"}}, {B: {"x"}}),
        ({A: {"x"}, B: {"y"}, C: {"z"}}, {A: {"z"}, B: {"x"}, C: {"y"}}),
        ({A: {"x"}, B: {"y"}}, {B: {"x", "y"}}),
    ],
)
@pytest.mark.parametrize("names", ["ab", "ba"])
def test_pod_cidrs_that_move_between_peers_end_where_they_belong(before, after, names):
    order = {A: names[0], B: names[1], C: "c"}
    desired = {key: peer(order[key], "192.0.2.1:1", *cidrs) for key, cidrs in after.items()}
    plan = agent.plan_peers(desired, {key: present("192.0.2.1:1", *cidrs) for key, cidrs in before.items()}, {})
    assert play(plan, before) == after


def test_desired_peers_choose_the_first_endpoint_of_a_family_that_this_node_has():
    node = agent.parse_record("a", text_of(1, endpoints=["2001:db8::7", "192.0.2.7"]), BOTH.cluster_cidrs)
    assert agent.desired_peers({"a": node}, (V4,)) == {A: peer("a", "192.0.2.7:28384", "10.244.1.0/24")}
    assert agent.desired_peers({"a": node}, (V4, V6)) == {A: peer("a", "[2001:db8::7]:28384", "10.244.1.0/24")}


# ---- wg show dump ----

DUMP = f"{SECRET}\t{A}\t28384\toff\n" + "".join(
    "\t".join(words) + "\n"
    for words in (
        [B, "(none)", "192.0.2.2:28384", "10.244.2.0/24,fd00:244:2::/64", "1700000000", "12", "34", "off"],
        [C, SECRET, "(none)", "(none)", "0", "0", "0", "25"],
    )
)


def test_a_dump_is_read():
    assert agent.parse_dump(DUMP) == {
        "private_key": SECRET,
        "public_key": A,
        "port": 28384,
        "peers": {
            B: {**present("192.0.2.2:28384", "10.244.2.0/24", "fd00:244:2::/64"), "handshake": 1700000000, "rx": 12, "tx": 34},
            C: present(""),
        },
    }


def test_a_device_without_a_key_has_none():
    assert agent.parse_dump("(none)\t(none)\t0\toff\n") == {"private_key": "", "public_key": "", "port": 0, "peers": {}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        SECRET,
        f"{SECRET}\t{A}",
        f"{SECRET}\t{A}\tport\toff",
        f"x\t{A}\t{SECRET}\toff",  # fields that moved
        DUMP.replace("\t", " "),
        DUMP.replace("12\t", ""),
        DUMP.replace("12\t", f"{SECRET}\t"),
        DUMP.replace("off\n", "off\tnew\n"),
        DUMP + SECRET,
    ],
)
def test_an_unreadable_dump_is_an_error_that_keeps_the_secret(text):
    error = raised(agent.parse_dump, text)
    assert SECRET not in f"{error!r} {error.msg} {error.details}"
    assert error.__suppress_context__, "nor does a traceback show what int() was given"


# ---- routes ----

ROUTES_4 = """[{"type":"unicast","dst":"10.244.0.0/16","gateway":"169.254.28.84","dev":"mncni-host","scope":"global",
"prefsrc":"10.244.255.1","flags":["onlink"]},{"type":"unreachable","dst":"10.244.0.0/16","scope":"global","metric":4278198272,"flags":[]},{"type":"unreachable",
"dst":"10.244.255.0/24","scope":"global","metric":4278198272,"flags":[]},
{"type":"unicast","dst":"169.254.28.84","dev":"mncni-host","scope":"link","flags":[]}]"""
ROUTES_6 = """[{"type":"unreachable","dst":"default","dev":"lo","scope":"global","metric":4278198272,"flags":[],"pref":"medium"}]"""


def test_the_kernels_routes_are_read_in_the_form_of_the_wanted_ones():
    found = [agent.parse_route(entry, "-4") for entry in json.loads(ROUTES_4)]
    wanted = agent.host_routes(ONLY4)
    assert agent.missing_routes(wanted, found) == [] == agent.stale_routes(wanted, found)
    assert [agent.parse_route(entry, "-6") for entry in json.loads(ROUTES_6)] == agent.floor_routes(["::/0"])


def lines_of(routes):
    return [agent.route_line("replace", entry) for entry in routes]


def test_the_hosts_routes_of_both_families():
    assert lines_of(agent.host_routes(BOTH)) == [
        "route replace unreachable 10.244.0.0/16 metric 4278198272 proto 201",
        "route replace unreachable fd00:244::/32 metric 4278198272 proto 201",
        "route replace unreachable 10.244.255.0/24 metric 4278198272 proto 201",
        "route replace unreachable fd00:244:ffff::/64 metric 4278198272 proto 201",
        "route replace 169.254.28.84/32 dev mncni-host proto 201",
        "route replace 10.244.0.0/16 via 169.254.28.84 dev mncni-host src 10.244.255.1 onlink proto 201",
        "route replace fd00:244::/32 via fe80::28:84 dev mncni-host src fd00:244:ffff::1 onlink proto 201",
    ]


def test_the_namespaces_routes_of_both_families():
    assert lines_of(agent.ns_routes(BOTH)) == [
        "route replace unreachable 0.0.0.0/0 metric 4278198272 proto 201",
        "route replace unreachable ::/0 metric 4278198272 proto 201",
        "route replace 10.244.0.0/16 dev mncni-wg0 proto 201",
        "route replace fd00:244::/32 dev mncni-wg0 proto 201",
        "route replace 10.244.255.1/32 dev mncni-ns proto 201",
        "route replace 10.244.255.0/24 via 10.244.255.1 dev mncni-ns onlink proto 201",
        "route replace fd00:244:ffff::1/128 dev mncni-ns proto 201",
        "route replace fd00:244:ffff::/64 via fd00:244:ffff::1 dev mncni-ns onlink proto 201",
    ]


def test_a_node_of_one_family_routes_that_family_alone_but_has_a_floor_under_both():
    assert not [line for line in lines_of(agent.host_routes(ONLY4)) if "::" in line]
    assert not [line for line in lines_of(agent.host_routes(ONLY6)) if "." in line]
    for settings in (ONLY4, ONLY6):
        assert lines_of(agent.ns_routes(settings))[:2] == lines_of(agent.ns_routes(BOTH))[:2]


def test_a_route_that_differs_is_replaced_and_one_too_many_deleted():
    wanted = agent.host_routes(ONLY4)
    other = agent.route("10.244.0.0/16", via="169.254.28.84", dev="mncni-host", src="10.244.1.1")
    gone = agent.route("10.9.0.0/16", via="169.254.28.84", dev="mncni-host", src="10.244.1.1")
    floor = agent.floor_routes(["10.9.0.0/16"])[0]
    found = [other, gone, floor, *wanted[:-1]]
    assert agent.missing_routes(wanted, found) == lines_of(wanted[-1:])
    assert agent.stale_routes(wanted, found) == [
        "route delete 10.9.0.0/16 via 169.254.28.84 dev mncni-host src 10.244.1.1 onlink proto 201",
        "route delete unreachable 10.9.0.0/16 metric 4278198272 proto 201",
    ]


def test_the_floor_is_a_stage_before_anything_that_makes_a_link_or_can_lack_knowledge():
    assert (agent.ensure_host, agent.ensure_endpoints, agent.ensure_floor) == agent.FLOOR
    assert not set(agent.FLOOR) & set(agent.STAGES)


# ---- addresses, links, sysctls ----


def address(local, prefixlen, scope="global"):
    return {"local": local, "prefixlen": prefixlen, "scope": scope}


def test_addresses_that_lack_are_added_and_others_go_but_the_kernels_link_local_stays():
    link = {"addr_info": [address("10.244.1.1", 32), address("fe80::1", 64, "link"), address("fd00:244:1::1", 128)]}
    assert agent.plan_addresses("mncni-host", {"10.244.255.1/32", "fd00:244:ffff::1/128"}, link) == [
        "address delete 10.244.1.1/32 dev mncni-host",
        "address delete fd00:244:1::1/128 dev mncni-host",
        "address replace 10.244.255.1/32 dev mncni-host",
        "address replace fd00:244:ffff::1/128 dev mncni-host nodad",
    ]


def test_addresses_that_are_there_are_left_alone():
    link = {"addr_info": [address("169.254.28.84", 32), address("fe80::28:84", 64, "link"), address("fe80::859:1", 64, "link")]}
    assert agent.plan_addresses("mncni-ns", {"169.254.28.84/32", "fe80::28:84/64"}, link) == []


def veth(name, mtu=1440, flags=("UP",), alias="mncni"):
    return {"ifname": name, "mtu": mtu, "flags": list(flags), "ifalias": alias}


HOST_END, NS_END = veth("mncni-host"), veth("mncni-ns", alias=None)


def shell(plan):
    return [str(command) for command in plan]


PAIR_LINES = """link add name mncni-host mtu 1440 address 0a:59:c6:d7:9e:73 type veth peer name mncni-ns netns /run/netns/mncni-wg \
mtu 1440 address 0a:59:df:8b:80:31
link set dev mncni-host alias mncni up
E"""
NS_END_UP = "nsenter --net=/run/netns/mncni-wg ip -batch - <<'E'\nlink set dev mncni-ns up\nE"


def test_a_veth_pair_is_made_whole():
    assert shell(agent.plan_veth(BOTH, 1440, None, None)) == ["ip -batch - <<'E'\n" + PAIR_LINES, NS_END_UP]


def test_what_is_left_of_a_broken_pair_is_removed_first():
    made = [f"ip -batch - <<'E'\nlink delete dev mncni-host\n{PAIR_LINES}", NS_END_UP]
    assert shell(agent.plan_veth(BOTH, 1440, HOST_END, None)) == made
    inner = "nsenter --net=/run/netns/mncni-wg ip -batch - <<'E'\nlink delete dev mncni-ns\nE"
    assert shell(agent.plan_veth(BOTH, 1440, None, NS_END)) == [inner, f"ip -batch - <<'E'\n{PAIR_LINES}", NS_END_UP]


def test_a_pair_that_stands_is_left_alone_and_one_that_differs_is_set():
    assert agent.plan_veth(BOTH, 1440, HOST_END, NS_END) == []
    changed = agent.plan_veth(BOTH, 1400, veth("mncni-host", flags=[]), NS_END)
    assert shell(changed) == [
        "ip -batch - <<'E'\nlink set dev mncni-host mtu 1400\nlink set dev mncni-host up\nE",
        "nsenter --net=/run/netns/mncni-wg ip -batch - <<'E'\nlink set dev mncni-ns mtu 1400\nE",
    ]


@pytest.mark.parametrize("alias", [None, "", "mncni2", "office"])
def test_a_foreign_link_of_our_name_is_refused_not_taken(alias):
    error = raised(agent.plan_veth, BOTH, 1440, veth("mncni-host", alias=alias), None)
    assert (error.code, error.msg) == (7, 'link "mncni-host" is somebody else\'s: it lacks the alias "mncni"; rename or remove it')


def test_a_bridge_keeps_its_gateways_and_loses_those_of_an_earlier_pod_cidr():
    asked, ran = "address show dev mncni0", []
    addresses = [address("10.244.9.1", 24), address("fd00:244:9::1", 64), address("fd00:244:ffff::1", 64), address("fe80::1", 64, "link")]
    bridge = {**veth("mncni0"), "linkinfo": {"info_kind": "bridge"}, "addr_info": addresses}

    def run(command):
        if "-json" not in command.argv:
            ran.append(str(command))
            return mncni.Reply(0, "", "")
        return Kernel({asked: [bridge]})(command)

    agent.ensure_bridge(agent.Context(BOTH, run, "boot", mtu=1440))
    lines = ["delete 10.244.9.1/24 dev mncni0", "delete fd00:244:9::1/64 dev mncni0", "replace 10.244.255.1/24 dev mncni0"]
    lines.append("replace fe80::28:82/64 dev mncni0 nodad")
    assert ran == ["ip -batch - <<'E'\n" + "".join(f"address {line}\n" for line in lines) + "E"]


# ---- the floor's rules ----

RULES = """[{"priority":0,"src":"all","table":"local","protocol":"kernel"},
{"priority":284,"src":"all","dst":"10.244.0.0","dstlen":16,"table":"main","suppress_prefixlen":15,"protocol":"201"},
{"priority":285,"src":"all","dst":"10.244.0.0","dstlen":16,"action":"unreachable","protocol":"201"},
{"priority":285,"src":"all","dst":"10.9.9.9","action":"unreachable","protocol":"201"},
{"priority":285,"src":"all","dst":"10.8.0.0","dstlen":16,"action":"unreachable","protocol":"static"},
{"priority":32766,"src":"all","table":"main","protocol":"kernel"}]""".replace("\n", "")


def test_rules_that_stand_are_left_alone_and_others_of_the_agent_go():
    applied = []

    def run(command):
        if "-json" not in command.argv:
            applied.append(str(command))
        return mncni.Reply(0, RULES if command.argv[3:4] == ["-4"] else "[]" if "-json" in command.argv else "", "")

    agent.ensure_rules(BOTH.cluster_cidrs, run, "")
    new = "to fd00:244::/32 priority 284 lookup main suppress_prefixlength 31", "to fd00:244::/32 priority 285 unreachable"
    assert applied == [
        "ip -4 -batch - <<'E'\nrule delete to 10.9.9.9/32 priority 285 unreachable protocol 201\nE",
        "ip -6 -batch - <<'E'\n" + "".join(f"rule add {rule} protocol 201\n" for rule in new) + "E",
    ]


# ---- firewalls: the whole text ----

HOST_FIREWALL = """\
table inet mncni
delete table inet mncni
table inet mncni {
  counter leaked { packets 3 bytes 252 }
  counter refused { packets 4 bytes 336 }
  chain inbound {
    type filter hook prerouting priority raw; policy accept;
    iifname != { "mncni0", "mncni-host", "lo" } ip saddr 10.244.0.0/16 counter name refused drop
    iifname != { "mncni0", "mncni-host", "lo" } ip daddr 10.244.0.0/16 counter name refused drop
    iifname "mncni0" ip saddr != 10.244.255.0/24 drop
    iifname "mncni0" ip saddr 10.244.255.1 drop
    iifname "mncni-host" ip daddr != 10.244.255.0/24 drop
    iifname != { "mncni0", "mncni-host", "lo" } ip6 saddr fd00:244::/32 counter name refused drop
    iifname != { "mncni0", "mncni-host", "lo" } ip6 daddr fd00:244::/32 counter name refused drop
    iifname "mncni0" ip6 saddr != fd00:244:ffff::/64 ip6 saddr != fe80::/10 ip6 saddr != :: drop
    iifname "mncni0" ip6 saddr fd00:244:ffff::1 drop
    iifname "mncni-host" ip6 daddr != fd00:244:ffff::/64 ip6 daddr != fe80::/10 ip6 daddr != ff02::/16 drop
  }
  chain forward {
    type filter hook forward priority filter; policy accept;
    iifname != { "mncni0", "mncni-host", "lo" } oifname { "mncni0", "mncni-host" } ct status dnat accept
    iifname != { "mncni0", "mncni-host", "lo" } oifname { "mncni0", "mncni-host" } ct direction reply accept
    iifname != { "mncni0", "mncni-host", "lo" } oifname { "mncni0", "mncni-host" } counter name refused drop
  }
  chain nat {
    type nat hook postrouting priority srcnat - 10; policy accept;
    oifname "mncni-host" ip saddr != 10.244.255.0/24 snat ip to 10.244.255.1 fully-random
    ip saddr 10.244.255.0/24 ip daddr != 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
    oifname "mncni-host" ip6 saddr != fd00:244:ffff::/64 snat ip6 to fd00:244:ffff::1 fully-random
    ip6 saddr fd00:244:ffff::/64 ip6 daddr != fd00:244::/32 ip6 daddr != ff00::/8 masquerade fully-random
  }
  chain outbound {
    type filter hook postrouting priority srcnat + 10; policy accept;
    tcp flags & rst == rst ct state invalid drop
    oifname != { "mncni0", "mncni-host", "lo" } ip daddr 10.244.0.0/16 counter name leaked drop
    oifname != { "mncni0", "mncni-host", "lo" } ip saddr 10.244.255.0/24 ip daddr != 10.244.0.0/16 ip daddr != 224.0.0.0/4 drop
    oifname != { "mncni0", "mncni-host", "lo" } ip6 daddr fd00:244::/32 counter name leaked drop
    oifname != { "mncni0", "mncni-host", "lo" } ip6 saddr fd00:244:ffff::/64 ip6 daddr != fd00:244::/32 ip6 daddr != ff00::/8 drop
  }
}
"""
NS_FIREWALL = """\
table inet mncni
delete table inet mncni
table inet mncni {
  chain forward {
    type filter hook forward priority filter; policy drop;
    iifname "mncni-ns" oifname "mncni-wg0" accept
    iifname "mncni-wg0" oifname "mncni-ns" ip daddr 10.244.255.0/24 accept
    iifname "mncni-wg0" oifname "mncni-ns" ip6 daddr fd00:244:ffff::/64 accept
  }
  chain input {
    type filter hook input priority filter; policy drop;
    iifname "mncni-ns" icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
  }
}
"""


COUNTS = {"leaked": (3, 252), "refused": (4, 336)}


def without_family(text, version):
    """A firewall text less the rules of a family; what pods send of that family is dropped instead."""
    target = {4: "ip daddr != 10.244.255.0/24", 6: "ip6 daddr != fd00:244:ffff::/64 ip6 daddr != fe80::/10 ip6 daddr != ff02::/16"}[version]
    text = text.replace(f'iifname "mncni-host" {target} drop', f'iifname "mncni0" meta nfproto ipv{version} drop')
    return "".join(line for line in text.splitlines(True) if {4: "10.244.", 6: "fd00:244:"}[version] not in line)


def test_the_hosts_firewall_of_both_families():
    assert agent.host_firewall(BOTH, COUNTS) == HOST_FIREWALL


@pytest.mark.parametrize("settings, absent", [(ONLY4, 6), (ONLY6, 4)])
def test_a_node_of_one_family_has_that_familys_rules_and_lets_pods_send_no_other(settings, absent):
    assert agent.host_firewall(settings, COUNTS) == without_family(HOST_FIREWALL, absent)
    assert agent.ns_firewall(settings) == without_family(NS_FIREWALL, absent)


def test_the_namespaces_firewall_lets_nothing_through_but_pods_traffic():
    assert agent.ns_firewall(BOTH) == NS_FIREWALL


ANSWERS = """\
  chain answers {
    type filter hook prerouting priority mangle; policy accept;
    iifname != { "mncni0", "mncni-host", "lo" } ip daddr 10.244.0.0/16 ct direction reply accept
    iifname != { "mncni0", "mncni-host", "lo" } ip daddr 10.244.0.0/16 counter name refused drop
    iifname != { "mncni0", "mncni-host", "lo" } ip6 daddr fd00:244::/32 ct direction reply accept
    iifname != { "mncni0", "mncni-host", "lo" } ip6 daddr fd00:244::/32 counter name refused drop
  }
"""


def test_masquerade_can_be_left_to_others_then_answers_come_to_the_pods_addresses():
    text = agent.host_firewall(dataclasses.replace(BOTH, masquerade=False), COUNTS)
    left_out = ["masquerade", "224.0.0.0/4 drop", "ff00::/8 drop"]
    left_out += [f"daddr {cidr} counter name refused" for cidr in BOTH.cluster_cidrs]
    rest = "".join(line for line in HOST_FIREWALL.splitlines(True) if not any(words in line for words in left_out))
    assert text == rest.replace("  chain forward {", ANSWERS + "  chain forward {")


def test_several_networks_are_told_apart_by_rules_not_by_a_set_of_ranges():
    several = "--cluster-cidr 10.1.0.0/16 --cluster-cidr 10.0.0.0/16 --pod-cidr 10.0.1.0/24 --pod-cidr 10.1.1.0/24"
    text = agent.host_firewall(parse(*several.split()))
    pods = "ip saddr != 10.0.1.0/24 ip saddr != 10.1.1.0/24"
    assert f'iifname "mncni0" {pods} drop' in text and f'oifname "mncni-host" {pods} snat ip to 10.0.1.1 fully-random' in text
    for pod in ("10.0.1.0/24", "10.1.1.0/24"):
        assert f"ip saddr {pod} ip daddr != 10.1.0.0/16 ip daddr != 10.0.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random" in text
    assert "set " not in text


def test_services_are_neither_reached_from_the_underlay_nor_looked_for_there():
    text = agent.host_firewall(dataclasses.replace(ONLY4, service_cidrs=(ipaddress.ip_network("10.96.0.0/12"),)))
    assert 'iifname != { "mncni0", "mncni-host", "lo" } ip daddr 10.96.0.0/12 counter name refused drop' in text
    assert 'oifname != { "mncni0", "mncni-host", "lo" } ip daddr 10.96.0.0/12 counter name leaked drop' in text


LISTING = """{"nftables": [{"metainfo": {"version": "1.0.6", "release_name": "Lester Gooch #5", "json_schema_version": 1}},
{"table": {"family": "inet", "name": "mncni", "handle": 2}},
{"counter": {"family": "inet", "name": "leaked", "table": "mncni", "handle": 5, "packets": 7, "bytes": 588}},
{"rule": {"family": "inet", "table": "mncni", "chain": "forward", "handle": 4, "expr": [{"counter": {"packets": 1, "bytes": 84}},
{"accept": null}]}}]}"""


def test_a_listing_is_compared_without_what_changes_by_itself():
    objects, counts = agent.parse_nft(LISTING)
    assert counts == {"leaked": (7, 588), "refused": (0, 0)}
    assert objects == [
        {"table": {"family": "inet", "name": "mncni"}},
        {"counter": {"family": "inet", "name": "leaked", "table": "mncni"}},
        {"rule": {"family": "inet", "table": "mncni", "chain": "forward", "expr": [{"counter": {}}, {"accept": None}]}},
    ]
    later = LISTING.replace('"handle": 4', '"handle": 44').replace('"packets": 7', '"packets": 8')
    assert agent.parse_nft(later) == (objects, {"leaked": (8, 588), "refused": (0, 0)})
    assert agent.parse_nft(LISTING.replace("accept", "drop"))[0] != objects


def test_no_table_is_an_empty_listing():
    nothing = ([], {"leaked": (0, 0), "refused": (0, 0)})
    assert agent.parse_nft("") == nothing == agent.parse_nft('{"nftables": []}')


# ---- endpoints that nothing comes from ----


class Doubts:
    """Glances at one peer, whose record says 192.0.2.1:1."""

    def __init__(self):
        self.heard, self.now = {}, 0
        self.desired = agent.desired_peers({"n1": agent.parse_record("n1", text_of(1), BOTH.cluster_cidrs)}, (V4,))
        (self.key,) = self.desired
        self.right = self.desired[self.key]["endpoint"]

    def glance(self, endpoint, rx, tx, later_s=1.5):
        """Whether the endpoint is to be set back."""
        self.now += later_s
        present = {self.key: {"endpoint": endpoint, "allowed_ips": set(), "handshake": 0, "rx": rx, "tx": tx}}
        doubts, self.heard = agent.doubted(self.desired, present, self.heard, self.now)
        return doubts == [self.key]


ELSEWHERE = "192.0.2.77:9"


def test_an_endpoint_that_changes_although_nothing_came_was_set_by_somebody():
    doubts = Doubts()
    assert not doubts.glance(doubts.right, 100, 100)
    assert doubts.glance(ELSEWHERE, 100, 100)


def test_an_endpoint_that_changes_with_what_comes_is_learnt_and_stays_while_something_comes():
    doubts = Doubts()
    assert not doubts.glance(doubts.right, 100, 100)
    for number in range(1, 1000):
        assert not doubts.glance(ELSEWHERE, 100 + number, 100 + number)


def test_an_endpoint_from_which_nothing_comes_for_two_minutes_is_set_back_if_packets_wait():
    doubts = Doubts()
    assert not doubts.glance(ELSEWHERE, 100, 100)  # an agent that starts does not know how it came to be
    assert not any(doubts.glance(ELSEWHERE, 100, 100) for _ in range(1000)), "nobody wants anything from it"
    waits = [doubts.glance(ELSEWHERE, 100, 100 + number) for number in range(1, 100)]
    assert waits.index(True) * 1.5 == pytest.approx(120, abs=3)
    assert waits.count(True) == 1, "the next doubt takes as long"
    assert not any(doubts.glance(doubts.right, 100, 1000 + number) for number in range(1, 1000)), "it is the record's"


def test_one_packet_after_a_quiet_hour_has_its_two_minutes():
    doubts = Doubts()
    assert not doubts.glance(ELSEWHERE, 100, 100)
    assert not doubts.glance(ELSEWHERE, 100, 100, 3600)
    assert not doubts.glance(ELSEWHERE, 100, 248)
    assert not doubts.glance(ELSEWHERE, 192, 248)


def test_peers_that_are_not_there_yet_or_not_wanted_are_not_doubted():
    assert agent.doubted(Doubts().desired, {}, {"old": ("", 0, 0, 0)}, 5) == ([], {})
    there = {key_of(9): {"endpoint": ELSEWHERE, "rx": 0, "tx": 0}}
    assert agent.doubted(Doubts().desired, there, {}, 5) == ([], {})


# ---- what others read: record, conflist ----


def test_the_record_has_its_keys_in_the_order_that_policies_compare():
    text = agent.format_record(BOTH, "u-1", (V4, V6), A, 7, "2024-01-01T00:00:00Z")
    assert text == (
        '{"v":2,"podCIDRs":["10.244.255.0/24","fd00:244:ffff::/64"],"uid":"u-1","endpoints":["192.0.2.1","2001:db8::1"],'
        f'"key":"{A}","port":28384,"gen":7,"created":"2024-01-01T00:00:00Z"}}'
    )
    assert agent.format_record(BOTH, "u-1", (V4, V6), A, 7, None, 1700000000).endswith(',"gen":7,"setBack":1700000000}')


@pytest.mark.parametrize("settings", [BOTH, ONLY4, ONLY6])
def test_the_plugin_accepts_the_conflist(settings):
    conflist = json.loads(agent.conflist(settings, 1420))
    assert (conflist["cniVersion"], conflist["cniVersions"], conflist["name"]) == ("1.0.0", ["1.0.0", "1.1.0"], "mncni")
    (plugin,) = conflist["plugins"]
    environ = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_IFNAME": "eth0", "CNI_NETNS": "/run/netns/x"}
    request = mncni.Request(environ, {**plugin, "cniVersion": "1.0.0", "name": "mncni"})
    parsed = mncni.parse_naivewg(request)
    assert (parsed["bridge"], parsed["mtu"], parsed["ready"], parsed["ipMasq"]) == ("mncni0", 1420, "/run/mncni/ready", False)
    subnets = [ranges[0]["subnet"] for ranges in parsed["ipam"]["range_sets"]]
    assert tuple(subnets) == settings.pod_cidrs
    assert [str(ranges[0]["gateway"]) for ranges in parsed["ipam"]["range_sets"]] == [str(g) for g in settings.gateways.values()]
    stages = mncni.choose_plugins(plugin, "mncni", mncni.PLUGINS)
    assert plugin["type"] == "mncni" and plugin["plugin"][0] == "naivewg" and len(stages) == len(plugin["plugin"])


# Its place among the arguments.
WHY = {"Command": 2, "SecretInput": 2, "ip_batch": 2, "look_ip": 4, "write_sysctls": 3, "apply_lines": 2, "set_device": 2}


def test_every_command_of_the_agent_says_why():
    """`CNI_TRACE` and the debug log print it above the command."""
    calls = [node for node in ast.walk(ast.parse(Path(agent.__file__).read_text())) if isinstance(node, ast.Call)]
    found = [(getattr(call.func, "id", getattr(call.func, "attr", "")), call) for call in calls]
    found = [(name, call) for name, call in found if name in WHY]
    assert {name for name, _ in found} == set(WHY)
    for name, call in found:
        assert len(call.args) > WHY[name] or "why" in {word.arg for word in call.keywords}, ast.unparse(call)
