"""Node records: what agent.py believes of what other nodes say about themselves. Pure: no root, no kernel, no files."""

import base64
import ipaddress
import json
import random

import pytest

import agent
import kube
from tests.unit.agent_data import V4, V6, key_of, make_settings, record, text_of

CLUSTER = make_settings().cluster_cidrs
OWN_KEY = key_of(999_999)


def judge(records, roster=None, own_endpoints=(V4, V6)):
    """(names believed, {name: reason}) of {name: text}."""
    nodes, quarantine = (roster or agent.Roster(make_settings())).judge(records, OWN_KEY, own_endpoints)
    return sorted(nodes), quarantine


# ---- one record ----


def test_a_good_record_becomes_a_node():
    node = agent.parse_record("node1", text_of(endpoints=["192.0.2.1", "2001:db8::7"]), CLUSTER)
    assert node == agent.Node(
        name="node1",
        uid="uid-1",
        created="2024-01-01T00:00:00",
        pod_cidrs=(ipaddress.ip_network("10.244.1.0/24"),),
        endpoints=(V4, ipaddress.ip_address("2001:db8::7")),
        key=key_of(1),
        port=28384,
    )


@pytest.mark.parametrize("said, taken", [(1700000000, 1700000000), (-1, -1), (None, 0), ("1", 0), (1.5, 0), (True, 0), ({}, 0), ([1], 0)])
def test_nonsense_about_its_clock_is_no_reason_not_to_believe_a_node(said, taken):
    assert agent.parse_record("node1", text_of(setBack=said), CLUSTER).set_back == taken


def test_what_format_record_writes_parse_record_reads():
    text = agent.format_record(make_settings(), "uid", (V4, V6), key_of(3), 7, "2024-01-01T00:00:00Z")
    node = agent.parse_record("self", text, CLUSTER)
    assert (node.key, node.endpoints, [str(cidr) for cidr in node.pod_cidrs]) == (
        key_of(3),
        (V4, V6),
        ["10.244.255.0/24", "fd00:244:ffff::/64"],
    )


def test_unknown_keys_and_a_missing_creation_time_are_no_fault():
    node = agent.parse_record("node1", text_of(created=..., gen=..., future={"a": []}), CLUSTER)
    assert node.created == ""


BAD_RECORDS = {
    "empty": ("", "is empty"),
    "blank": (" \n\t", "is empty"),
    "half of it": (text_of()[:100], "is no JSON"),
    "two of them": (text_of() * 2, "is no JSON"),
    "NUL before": ("\0" + text_of(), "is no JSON"),
    "NULs alone": ("\0" * 300, "is no JSON"),
    "no object": ("[]", "is no JSON object"),
    "null": ("null", "is no JSON object"),
    "a number": ("1", "is no JSON object"),
    "nested deeply": ("[" * 60_000, "is no JSON"),
    "a megabyte": (text_of(uid="u" * 1_000_000), "longer than 65536"),
    "a megabyte of nothing": (" " * 1_000_000, "longer than 65536"),
    "a key twice": (text_of()[:-1] + ',"uid":"another"}', "duplicate key"),
    "a key twice, deeper": (text_of(future={"a": 1}).replace('"a"', '"a": 2, "a"'), "duplicate key"),
    "INI injection": ("[Peer]\nPublicKey = x\nAllowedIPs = 0.0.0.0/0", "is no JSON"),
    "version 1": (text_of(v=1), "version is 1, this agent reads 2"),
    "version 3": (text_of(v=3), "version is 3"),
    "no version": (text_of(v=...), '"v" is null'),
    "true": (text_of(v=True), '"v" is true'),
    "2.0 for 2": (text_of(v=2.0), '"v" is 2.0'),
    "text for 2": (text_of(v="2"), '"v" is "2"'),
    "huge version": (text_of().replace('"v": 2', '"v": ' + "9" * 4000), "version is 999"),
    "number too long to read": (text_of().replace('"v": 2', '"v": -' + "9" * 60_000), "JSON|version is"),
    "no uid": (text_of(uid=...), '"uid" is null'),
    "empty uid": (text_of(uid=""), '"uid" is ""'),
    "uid a list": (text_of(uid=["u"]), '"uid" is .*, not a string'),
    "no key": (text_of(key=...), '"key" is null'),
    "no port": (text_of(port=...), '"port" is null'),
    "key a number": (text_of(key=1), '"key" is 1, not a string'),
    "key empty": (text_of(key=""), '"key" is ""'),
    "key of 31 bytes": (text_of(key=base64.b64encode(b"k" * 31).decode()), "31 bytes"),
    "key of 33 bytes": (text_of(key=base64.b64encode(b"k" * 33).decode()), "33 bytes"),
    "key of zeros": (text_of(key=key_of(0)), "all zero"),
    "key with a newline behind": (text_of(key=key_of(1) + "\n"), "no base64"),
    "key with a peer behind": (text_of(key=key_of(1) + "\n[Peer]\nAllowedIPs=0.0.0.0/0"), "no base64"),
    "key with NUL": (text_of(key=key_of(1)[:-1] + "\0"), "no base64"),
    "key in unicode": (text_of(key="ключ"), "no base64"),
    "key URL-safe": (text_of(key=base64.urlsafe_b64encode(b"\xff" * 32).decode()), "no base64"),
    "key with spare bits": (text_of(key="B" * 42 + "B="), "canonical"),
    "key in hex": (text_of(key="01" * 32), "48 bytes"),
    "key a lone surrogate": (text_of().replace(key_of(1), "\\ud800"), "no base64"),
    "port 0": (text_of(port=0), "port 0 "),
    "port 65536": (text_of(port=65536), "port 65536"),
    "port negative": (text_of(port=-1), "port -1"),
    "port true": (text_of(port=True), '"port" is true'),
    "port text": (text_of(port="28384"), '"port" is "28384"'),
    "port 1.5": (text_of(port=1.5), '"port" is 1.5'),
    "port NaN": (text_of().replace("28384", "NaN"), '"port" is NaN'),
    "port huge": (text_of().replace("28384", "9" * 4000), "port 999.*out of range"),
    "no pod CIDRs": (text_of(podCIDRs=[]), '"podCIDRs" is'),
    "pod CIDRs null": (text_of(podCIDRs=None), '"podCIDRs" is null'),
    "pod CIDRs a string": (text_of(podCIDRs="10.244.1.0/24"), '"podCIDRs" is'),
    "17 pod CIDRs": (text_of(podCIDRs=[f"10.244.{n}.0/24" for n in range(17)]), "17 elements"),
    "pod CIDR a number": (text_of(podCIDRs=[1]), "pod CIDR 1 is no network"),
    "pod CIDR null": (text_of(podCIDRs=[None]), "pod CIDR null is no network"),
    "pod CIDR a list": (text_of(podCIDRs=[["10.244.1.0", 24]]), "is no network"),
    "pod CIDR with host bits": (text_of(podCIDRs=["10.244.1.1/24"]), "is no network"),
    "pod CIDR with a newline": (text_of(podCIDRs=["10.244.1.0/24\n"]), "is no network"),
    "pod CIDR with a word behind": (text_of(podCIDRs=["10.244.1.0/24 0.0.0.0/0"]), "is no network"),
    "pod CIDR in other digits": (text_of(podCIDRs=["１０.244.1.0/24"]), "is no network"),
    "everything": (text_of(podCIDRs=["0.0.0.0/0"]), "no part of the cluster"),
    "everything, IPv6": (text_of(podCIDRs=["::/0"]), "no part of the cluster"),
    "the whole cluster": (text_of(podCIDRs=["10.244.0.0/16"]), "no part of the cluster"),
    "the whole cluster, IPv6": (text_of(podCIDRs=["fd00:244::/32"]), "no part of the cluster"),
    "more than the cluster": (text_of(podCIDRs=["10.240.0.0/12"]), "no part of the cluster"),
    "elsewhere": (text_of(podCIDRs=["192.168.1.0/24"]), "no part of the cluster"),
    "good and bad": (text_of(podCIDRs=["10.244.1.0/24", "0.0.0.0/0"]), "no part of the cluster"),
    "IPv4 in IPv6": (text_of(podCIDRs=["::ffff:10.244.1.0/120"]), "no part of the cluster"),
    "pod CIDR with a scope": (text_of(podCIDRs=["fd00:244:1::%x,0.0.0.0/0/64"]), "is no network"),
    "pod CIDR with a scope that is a line": (text_of(podCIDRs=["fd00:244:1::%\nroute flush/64"]), "is no network"),
    "pod CIDRs that overlap": (text_of(podCIDRs=["10.244.1.0/24", "10.244.1.64/26"]), "overlap"),
    "one pod CIDR twice": (text_of(podCIDRs=["10.244.1.0/24"] * 2), "overlap"),
    "no endpoints": (text_of(endpoints=[]), '"endpoints" is'),
    "17 endpoints": (text_of(endpoints=[f"192.0.2.{n}" for n in range(17)]), "17 elements"),
    "endpoint a name": (text_of(endpoints=["node1.example"]), "is no IP address"),
    "endpoint with a port": (text_of(endpoints=["192.0.2.1:1"]), "is no IP address"),
    "endpoint a number": (text_of(endpoints=[3221225985]), "is no IP address"),
    "endpoint true": (text_of(endpoints=[True]), "endpoint true is no IP"),
    "endpoint with a newline": (text_of(endpoints=["192.0.2.1\n"]), "is no IP address"),
    "endpoint with a scope": (text_of(endpoints=["2001:db8::1%eth0"]), "is no IP address"),
    "endpoint with an octal part": (text_of(endpoints=["192.0.2.010"]), "is no IP address"),
    "endpoint unspecified": (text_of(endpoints=["0.0.0.0"]), "cannot be"),
    "endpoint broadcast": (text_of(endpoints=["255.255.255.255"]), "cannot be"),
    "endpoint loopback": (text_of(endpoints=["127.0.0.53"]), "cannot be"),
    "endpoint multicast": (text_of(endpoints=["224.0.0.1"]), "cannot be"),
    "endpoint link-local": (text_of(endpoints=["169.254.169.254"]), "cannot be"),
    "endpoint unspecified, IPv6": (text_of(endpoints=["::"]), "cannot be"),
    "endpoint loopback, IPv6": (text_of(endpoints=["::1"]), "cannot be"),
    "endpoint multicast, IPv6": (text_of(endpoints=["ff02::1"]), "cannot be"),
    "endpoint link-local, IPv6": (text_of(endpoints=["fe80::1"]), "cannot be"),
    "endpoint IPv4 in IPv6": (text_of(endpoints=["::ffff:192.0.2.1"]), "cannot be"),
    "endpoint a pod": (text_of(endpoints=["10.244.9.9"]), "inside the cluster CIDR"),
    "endpoint a pod, IPv6": (text_of(endpoints=["fd00:244:9::9"]), "inside the cluster CIDR"),
    "endpoint good, then bad": (text_of(endpoints=["192.0.2.1", "10.244.9.9"]), "inside the cluster CIDR"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_refused_with_a_reason(case):
    text, reason = BAD_RECORDS[case]
    with pytest.raises(agent.BadRecord, match=reason) as caught:
        agent.parse_record("node1", text, CLUSTER)
    said = str(caught.value)
    assert len(said) < 200 and said.isprintable() and said.isascii(), "it goes to logs and terminals"


@pytest.mark.parametrize("name", ["", "-x", ".x", "a/b", "a b", "a\nb", "ü", "\udcff", "\x1b[2J"])
def test_a_name_that_no_node_has_is_refused(name):
    with pytest.raises(agent.BadRecord, match="name"):
        agent.parse_record(name, text_of(), CLUSTER)


@pytest.mark.parametrize("created", ["yesterday", "", None, 5, ["2024-01-01T00:00:00Z"], "2024-13-01T00:00:00Z", "0" * 1000])
def test_a_bad_creation_time_is_no_fault_but_counts_as_youngest(created):
    honest = {"b": text_of(2)}
    liar = {"a": text_of(2, created=created, endpoints=["192.0.2.66"])}
    assert judge({**honest, **liar})[0] == ["b"]


@pytest.mark.parametrize("key", ["v", "uid", "podCIDRs", "endpoints", "key", "port", "created"])
@pytest.mark.parametrize("opening, closing", ["[]", ('{"a":', "}")])
def test_no_depth_of_nesting_gets_past_the_refusal(key, opening, closing):
    """Where reading a value just succeeds, showing it in the message can be the call that goes too deep."""
    for depth in [*range(1, 40), *range(900, 1010)]:
        text = text_of(**{key: "HERE"}).replace('"HERE"', f"[{opening * depth}1{closing * depth}]")
        try:
            agent.parse_record("node1", text, CLUSTER)
        except agent.BadRecord:
            continue
        assert key == "created", "the one key whose value does not matter"


# ---- the roster: several records ----


def test_a_bad_record_quarantines_that_node_alone():
    honest = {f"honest{number}": text_of(number) for number in (1, 2, 3)}
    for case, (text, _) in BAD_RECORDS.items():
        believed, quarantine = judge({**honest, "bad": text})
        assert (believed, list(quarantine)) == (["honest1", "honest2", "honest3"], ["bad"]), case


def test_the_own_record_is_not_judged():
    assert judge({"self": "garbage", "node1": text_of(1)}) == (["node1"], {})


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"key": OWN_KEY}, "this node's key"),
        ({"podCIDRs": ["10.244.255.0/24"]}, "10.244.255.0/24 is this node's"),
        ({"podCIDRs": ["10.244.255.128/25"]}, "10.244.255.128/25 is this node's"),
        ({"podCIDRs": ["10.244.254.0/23"]}, "10.244.254.0/23 is this node's"),
        ({"podCIDRs": ["10.244.1.0/24", "fd00:244:ffff::/80"]}, "fd00:244:ffff::/80 is this node's"),
    ],
)
def test_what_is_ours_nobody_else_gets_however_old(changes, reason):
    believed, quarantine = judge({"a": text_of(1, created="1999-01-01T00:00:00Z", **changes), "b": text_of(2)})
    assert believed == ["b"] and reason in quarantine["a"]


def test_a_node_without_an_endpoint_of_our_family_is_named_unreachable():
    believed, quarantine = judge({"a": text_of(1, endpoints=["2001:db8::1"]), "b": text_of(2)}, own_endpoints=(V4,))
    assert believed == ["b"] and "2001:db8::1" in quarantine["a"]


OLD, YOUNG = "2024-01-01T00:00:00Z", "2024-01-01T00:00:01Z"


@pytest.mark.parametrize(
    "older, younger",
    [
        ({"created": OLD, "uid": "z"}, {"created": YOUNG, "uid": "a"}),
        ({"created": OLD, "uid": "a"}, {"created": OLD, "uid": "b"}),
        ({"created": OLD, "uid": "z"}, {"created": ..., "uid": "a"}),
        ({"created": "0999-01-01T00:00:00Z", "uid": "z"}, {"created": OLD, "uid": "a"}),
    ],
)
@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_of_two_with_one_key_or_overlapping_pod_cidrs_the_older_wins(names, older, younger):
    first, second = names
    same_key = {first: text_of(1, **older), second: text_of(2, **younger, key=key_of(1))}
    assert judge(same_key) == ([first], {second: f"its key is that of node {first}, which had it before or is older"})
    for theirs in ("10.244.1.0/24", "10.244.1.128/25", "10.244.0.0/23"):
        overlap = {first: text_of(1, **older), second: text_of(2, **younger, podCIDRs=["10.244.2.0/24", theirs])}
        assert judge(overlap) == ([first], {second: f"its pod CIDR is that of node {first}, which had it before or is older"})


def test_who_lost_takes_nothing_from_others():
    """c clashes with b, b with a: b is out, so c keeps what b claimed."""
    records = {
        "a": text_of(1, created="2021-01-01T00:00:00Z"),
        "b": text_of(2, created="2022-01-01T00:00:00Z", podCIDRs=["10.244.1.0/24", "10.244.3.0/24"]),
        "c": text_of(3, created="2023-01-01T00:00:00Z"),
    }
    assert judge(records)[0] == ["a", "c"]


@pytest.mark.parametrize(
    "lie, what",
    [
        ({"key": key_of(1)}, "key"),
        ({"podCIDRs": ["10.244.1.0/24"]}, "pod CIDR"),
        ({"podCIDRs": ["10.244.0.0/22"]}, "pod CIDR"),
        ({"podCIDRs": ["10.244.2.0/24", "10.244.1.128/25"]}, "pod CIDR"),
    ],
)
@pytest.mark.parametrize("was_there", [True, False], ids=["liar believed before", "liar new"])
def test_what_a_node_is_known_to_have_no_older_node_takes_from_it(lie, what, was_there):
    roster, honest = agent.Roster(make_settings()), {"young": text_of(1, created=YOUNG)}
    assert judge({**honest, **({"old": text_of(2, created=OLD)} if was_there else {})}, roster)[0] == ["old", "young"][not was_there :]
    lying = {**honest, "old": text_of(2, created=OLD, **lie)}
    for _ in range(2):
        assert judge(lying, roster) == (["young"], {"old": f"its {what} is that of node young, which had it before or is older"})
    assert judge(lying)[0] == ["old"], "of those that nobody knew, the older is believed"
    assert judge({**honest, "old": text_of(2, created=OLD)}, roster)[0] == ["old", "young"]


def test_a_node_that_changes_its_key_keeps_its_pod_cidr_and_the_new_key():
    roster = agent.Roster(make_settings())
    assert judge({"young": text_of(1, created=YOUNG), "old": text_of(2, created=OLD)}, roster)[0] == ["old", "young"]
    changed = {"young": text_of(1, created=YOUNG, key=key_of(3))}
    assert judge({**changed, "old": text_of(2, created=OLD, podCIDRs=["10.244.1.0/24"])}, roster)[0] == ["young"]
    assert judge({**changed, "old": text_of(2, created=OLD, key=key_of(3))}, roster)[0] == ["young"]
    former = {"old": text_of(2, created=OLD, key=key_of(1))}
    assert judge({**changed, **former}, roster)[0] == ["old", "young"], "nobody has the former key"


def test_the_range_of_a_node_that_is_gone_is_anothers():
    """Whether the news of the two come together, or the new owner comes first and waits."""
    for between in ([], [{"a": text_of(1), "b": text_of(2, podCIDRs=["10.244.1.0/24"])}]):
        roster = agent.Roster(make_settings())
        for records in [{"a": text_of(1)}, *between]:
            assert judge(records, roster)[0] == ["a"]
        assert judge({"b": text_of(2, podCIDRs=["10.244.1.0/24"])}, roster) == (["b"], {})


def test_two_that_swap_their_ranges_wait_for_each_other_no_longer_than_it_takes():
    roster = agent.Roster(make_settings())
    judge({"a": text_of(1), "b": text_of(2)}, roster)
    swapped = {"a": text_of(1, podCIDRs=["10.244.2.0/24"]), "b": text_of(2, podCIDRs=["10.244.1.0/24"])}
    assert judge({**swapped, "b": text_of(2)}, roster)[0] == ["b"]
    assert judge(swapped, roster)[0] == ["a", "b"]


@pytest.mark.parametrize("endpoint", ["192.0.2.55", "192.0.2.255"])
def test_a_node_is_not_at_an_address_of_this_host_nor_at_a_broadcast_address(endpoint):
    roster = agent.Roster(make_settings())
    roster.own_addresses = agent.host_addresses([{"addr_info": [{"local": "192.0.2.55", "broadcast": "192.0.2.255"}, {"local": "::1"}]}])
    believed, quarantine = judge({"a": text_of(1), "b": text_of(2, endpoints=["198.51.100.9", endpoint])}, roster)
    what = f"one of its endpoints 198.51.100.9, {endpoint} is an address of this node, or a broadcast address"
    assert (believed, quarantine) == (["a"], {"b": what})


def test_neighbouring_pod_cidrs_do_not_clash():
    records = {f"n{number}": text_of(number + 1, podCIDRs=[f"10.244.0.{number * 4}/30"]) for number in range(64)}
    assert judge(records) == (sorted(records), {})


def test_clashes_are_found_as_by_comparing_all_pairs():
    """find_clashes against the obvious quadratic way, on random networks of all sizes."""
    random_source = random.Random(20_240_601)
    for _ in range(150):
        nodes = []
        for number in range(random_source.randrange(2, 25)):
            cidrs = []
            for _ in range(random_source.randrange(1, 4)):
                length = random_source.randrange(20, 31)
                address = (10 << 24 | 244 << 16 | random_source.randrange(1 << 16)) >> (32 - length) << (32 - length)
                cidrs.append(ipaddress.ip_network((address, length)))
            if kube.overlapping_pair(cidrs) is None:
                nodes.append(agent.Node(f"n{number}", "u", str(random_source.random()), tuple(cidrs), (V4,), key_of(number + 1), 1))
        kept = []
        for node in sorted(nodes, key=agent.seniority):
            if not any(mine.overlaps(theirs) for other in kept for theirs in other.pod_cidrs for mine in node.pod_cidrs):
                kept.append(node)
        assert set(agent.find_clashes(nodes)) == {node.name for node in nodes} - {node.name for node in kept}


def test_a_repaired_record_is_believed_again():
    roster = agent.Roster(make_settings())
    assert judge({"a": "garbage"}, roster)[0] == []
    assert judge({"a": text_of(1)}, roster)[0] == ["a"]


# ---- how often, how many ----


@pytest.fixture
def validations(mocker):
    """The names that parse_record is called for, in order."""
    spy = mocker.spy(agent, "parse_record")
    return lambda: [call.args[0] for call in spy.call_args_list]


def test_a_record_is_validated_once_per_content(validations):
    roster = agent.Roster(make_settings())
    records = {"a": text_of(1), "b": "garbage"}
    for _ in range(3):
        judge(dict(records), roster)
        roster.sound(records)
    assert validations() == ["a", "b"]
    judge({**records, "b": text_of(2)}, roster)
    judge({**records, "b": text_of(2)}, roster)
    assert validations() == ["a", "b", "b"]


def test_the_reason_of_a_quarantine_is_short_whatever_the_cluster_says():
    roster = agent.Roster(make_settings())
    roster.facts = {"a": agent.Facts("uid-1", "", tuple(f"10.244.{number}.0/24" for number in range(2, 100)))}
    believed, quarantine = judge({"a": text_of(1)}, roster)
    assert not believed and quarantine["a"].startswith("its record claims the pod CIDRs 10.244.1.0/24, the cluster gave it 10.244.2.0/24, ")
    assert len(quarantine["a"]) < 200


def test_the_roster_forgets_nodes_that_left():
    roster = agent.Roster(make_settings())
    judge({"a": text_of(1), "b": text_of(2)}, roster)
    judge({"b": text_of(2)}, roster)
    assert list(roster.memory) == ["b"]


def big_cluster(size):
    """{name: text} of so many good nodes."""
    networks = ipaddress.ip_network("10.0.0.0/8").subnets(new_prefix=24)
    endpoints = ipaddress.ip_network("172.16.0.0/12").hosts()
    rows = zip(range(1, size + 1), networks, endpoints)
    return {f"n{number}": text_of(number, podCIDRs=[str(cidr)], endpoints=[str(address)]) for number, cidr, address in rows}


def test_5000_nodes_are_judged_once_and_a_change_of_one_costs_one_validation(validations):
    settings = make_settings(cluster_cidrs=(ipaddress.ip_network("10.0.0.0/8"),), pod_cidrs=(ipaddress.ip_network("10.255.255.0/24"),))
    roster, records = agent.Roster(settings), big_cluster(5000)
    assert len(judge(records, roster)[0]) == 5000
    records["n2500"] = text_of(2500, podCIDRs=["10.200.0.0/24"], endpoints=["172.31.255.1"])
    assert len(judge(records, roster)[0]) == 5000
    assert validations()[5000:] == ["n2500"]


def test_the_work_for_clashes_grows_with_the_nodes_not_with_their_pairs(mocker):
    cluster = (ipaddress.ip_network("10.0.0.0/8"),)
    nodes = [agent.parse_record(name, text, cluster) for name, text in big_cluster(5000).items()]
    lookups = mocker.spy(agent, "find_overlap")
    overlaps = mocker.spy(ipaddress.IPv4Network, "overlaps")
    assert agent.find_clashes(nodes) == {}
    assert (lookups.call_count, overlaps.call_count) == (0, 0)
    twin = agent.parse_record("twin", text_of(5001, podCIDRs=[str(nodes[7].pod_cidrs[0])], endpoints=["192.0.2.9"], created=""), cluster)
    assert list(agent.find_clashes([*nodes, twin])) == ["twin"]
    assert (lookups.call_count, overlaps.call_count) == (5001, 0)


# ---- mutants ----


def mutate(random_source, text):
    """A text somewhat like a record: bytes changed, cut, repeated, or a value replaced by another kind of thing."""
    nasty = ["\n", "\0", '"', "\\", "{", "}", "[", "]", ",", ":", "-1", "1e999", "NaN", "true", "null", "\ud800", "\u202e", "0" * 50, "%"]
    kind = random_source.randrange(5)
    place, end = sorted(random_source.randrange(len(text) + 1) for _ in range(2))
    if kind == 0:
        return text[:place] + random_source.choice(nasty) + text[place:]
    if kind == 1:
        return text[:place] + text[end:]
    if kind == 2:
        return text[:place] + text[place:end] * random_source.randrange(2, 5) + text[end:]
    if kind == 3:
        return text[:place] + chr(random_source.randrange(0x110000)) + text[place + 1 :]
    values = [None, True, 0, -1, 1 << 70, 1.5, "", "x", "0.0.0.0/0", "::", "2001:db8::%a", [], {}, [[]], [None], {"0": {}}]
    fields = record(66)
    fields[random_source.choice(list(fields))] = random_source.choice(values)
    return json.dumps(fields)


@pytest.mark.parametrize("seed", range(4))
def test_no_mutant_raises_anything_but_bad_record_or_harms_an_honest_node(seed):
    random_source = random.Random(seed)
    honest = {f"honest{number}": text_of(number) for number in (1, 2, 3)}
    roster = agent.Roster(make_settings())
    outcomes = {"believed": 0, "refused": 0}
    for _ in range(1000):
        text = text_of(66, created=YOUNG)  # younger than the honest ones, so it wins nothing from them
        for _ in range(random_source.randrange(1, 4)):
            text = mutate(random_source, text) or "x"
        nodes, quarantine = roster.judge({**honest, "mutant": text}, OWN_KEY, (V4, V6))
        assert set(nodes) >= set(honest) and set(quarantine) <= {"mutant"}, text
        outcomes["believed" if "mutant" in nodes else "refused"] += 1
        for key, peer in agent.desired_peers(nodes, (V4, V6)).items():
            words = ["peer", key, "endpoint", peer["endpoint"], "allowed-ips", ",".join(peer["allowed_ips"])]
            assert all(word.isascii() and word.isprintable() and " " not in word for word in words), text
    assert min(outcomes.values()) > 20, f"the mutants are too wild or too tame: {outcomes}"
