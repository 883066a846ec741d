"""nodeipam.py: its plans, its election, and what several allocators make of a cluster that creates and deletes nodes.

The API server here is one in memory, on the test's clock; requests through HTTP are in tests/integration/test_nodeipam.py.
"""

import ipaddress
import json
import logging
import random
import re
import subprocess

import pytest

import kube
import nodeipam
from kube import ApiError
from nodeipam import RENEW_S, RETRY_S, REUSE_S, Claim, Election, NodeIpam

V4, V6 = ipaddress.ip_network("10.244.0.0/16"), ipaddress.ip_network("fd00:10::/48")
POOLS, DUAL = {4: (24, (V4,))}, {4: (24, (V4,)), 6: (64, (V6,))}
SMALL = {4: (26, (ipaddress.ip_network("10.244.0.0/24"),))}  # four ranges


def nets(*texts):
    return tuple(map(ipaddress.ip_network, texts))


def claim(name, *cidrs, fault="", addresses=()):
    addresses = tuple(map(ipaddress.ip_address, addresses))
    return Claim(f"2026-01-01T00:00:{name[1:]:0>2}Z", name, f"uid-{name}", "" if cidrs else "7", nets(*cidrs), fault, addresses)


def plan(claims, pools=POOLS, given=None, freed=None, now=0):
    """({name: ["10.244.0.0/24"]}, {name: reason})."""
    if given is None:
        given = {each.uid: each.cidrs for each in claims if each.cidrs}
    writes, refused, _ = nodeipam.plan_allocations(claims, pools, given, freed or {}, now)
    return {each.name: list(map(str, cidrs)) for each, cidrs in writes.items()}, {each.name: why for each, why in refused.items()}


# ---- flags ----


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "--cluster-cidr is needed"),
        (["--cluster-cidr", "10.244.0.1/16"], "10.244.0.1/16 has host bits set"),
        (["--cluster-cidr", "pods"], "'pods' does not appear to be"),
        (["--cluster-cidr", "10.244.0.0/25"], "--node-mask-v4 24 is out of range for --cluster-cidr 10.244.0.0/25: 25 to 30"),
        (["--cluster-cidr", "fd00::/65"], "--node-mask-v6 64 is out of range for --cluster-cidr fd00::/65: 65 to 126"),
        (["--cluster-cidr", "10.0.0.0/8", "--cluster-cidr", "10.1.0.0/16"], "10.0.0.0/8 overlaps --cluster-cidr 10.1.0.0/16"),
        (["--cluster-cidr", "10.0.0.0/8", "--node-mask-v4", "31"], "--node-mask-v4 31 is out of range for .* 8 to 30"),
        (["--cluster-cidr", "10.0.0.0/8", "--node-mask-v4", "0"], "--node-mask-v4 0 is out of range"),
        (["--cluster-cidr", "fd00::/48", "--node-mask-v6", "127"], "--node-mask-v6 127 is out of range for .* 48 to 126"),
        (["--cluster-cidr", "10.0.0.0/8", "--node-mask-v4", "wide"], "--node-mask-v4.*'wide'"),
        (["--cluster-cidr", "10.0.0.0/8", "--lease", "ipam"], "--lease 'ipam' must be namespace/name"),
        (["--cluster-cidr", "10.0.0.0/8", "--lease", "a/b/c"], "--lease 'a/b/c' must be"),
        (["--cluster-cidr", "10.0.0.0/8", "--pod-cidr", "10.0.0.0/24"], "--pod-cidr"),
    ],
)
def test_a_wrong_flag_exits_2_naming_flag_and_value(argv, said, capsys):
    with pytest.raises(SystemExit) as left:
        nodeipam.main(argv, {})
    assert left.value.code == nodeipam.USAGE
    assert re.search(said, capsys.readouterr().err)


def test_it_is_a_program_of_its_own_whose_help_names_every_flag():
    done = subprocess.run([nodeipam.__file__, "--help"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert (done.returncode, done.stderr) == (0, "")
    assert all(row[0] in done.stdout for row in nodeipam.FLAGS)


def test_flags_may_come_by_environment_and_the_first_cidr_says_which_family_comes_first():
    environ = {"MNCNI_CLUSTER_CIDR": "fd00::/48,10.0.0.0/8", "MNCNI_NODE_MASK_V4": "22", "MNCNI_LEASE": "a/b"}
    parser = nodeipam.build_parser(environ)
    options = parser.parse_args([])
    pools = nodeipam.parse_pools(parser, options, environ)
    assert list(pools.items()) == [(6, (64, nets("fd00::/48"))), (4, (22, nets("10.0.0.0/8")))]
    assert options.lease == "a/b"


def test_without_a_cluster_it_fails_and_says_what_to_give(caplog):
    assert nodeipam.main(["--cluster-cidr", "10.0.0.0/8"], {}) == nodeipam.FAILED
    assert "give --kubeconfig" in caplog.text


@pytest.mark.parametrize("host, inside", [("10.96.0.1", "10.96.0.1"), ("192.0.2.1,fd00:96::1", "fd00:96::1")])
def test_pools_with_the_clusters_service_are_refused_at_start(host, inside, capsys):
    with pytest.raises(SystemExit) as left:
        nodeipam.main(["--cluster-cidr", "10.0.0.0/8", "--cluster-cidr", "fd00::/16"], {"KUBERNETES_SERVICE_HOST": host})
    assert left.value.code == nodeipam.USAGE
    assert f"KUBERNETES_SERVICE_HOST {inside} is inside --cluster-cidr: nodes, services and pods need" in capsys.readouterr().err


@pytest.mark.parametrize("server, inside", [("https://10.1.2.3:6443", "10.1.2.3"), ("https://192.0.2.1,https://[fd00::9]:6443", "fd00::9")])
def test_pools_with_the_api_server_are_refused_at_start(server, inside, tmp_path, caplog):
    context = {"contexts": [{"name": "c", "context": {"cluster": "c"}}], "clusters": [{"name": "c", "cluster": {"server": server}}]}
    (tmp_path / "config").write_text(json.dumps({"current-context": "c", **context}))
    argv = ["--cluster-cidr", "10.0.0.0/8", "--cluster-cidr", "fd00::/16", "--kubeconfig", str(tmp_path / "config")]
    assert nodeipam.main(argv, {}) == nodeipam.FAILED
    assert f"the API server {inside} is inside --cluster-cidr" in caplog.text


# ---- plans ----


INSIDE = [("10.244.1.9", "10.244.2.0/24", "fd00:10:0:1::/64"), ("fd00:10:0:1::7", "10.244.1.0/24", "fd00:10:0:2::/64")]


@pytest.mark.parametrize("address, range4, range6", INSIDE)
def test_a_node_whose_address_is_inside_the_pools_gets_no_range_and_nobody_else_the_one_around_it(address, range4, range6):
    """Its agent would refuse such a cluster CIDR, and a range given is given for the life of a node."""
    inside, outside = claim("n2", addresses=["192.0.2.1", address]), claim("n3", addresses=["192.0.2.2"])
    claims = [claim("n1", "10.244.0.0/24", "fd00:10::/64"), inside, outside]
    said = f"its address {address} is inside --cluster-cidr: nodes, services and pods need addresses of their own"
    assert plan(claims, DUAL) == ({"n3": [range4, range6]}, {"n2": said})
    assert plan([claim("n1", addresses=["192.0.2.1"])], DUAL)[1] == {}


def test_the_lowest_free_range_goes_to_the_oldest_node():
    claims = [claim("n9"), claim("n1", "10.244.1.0/24"), claim("n5"), claim("n2")]
    assert plan(claims) == ({"n2": ["10.244.0.0/24"], "n5": ["10.244.2.0/24"], "n9": ["10.244.3.0/24"]}, {})


def test_a_node_gets_a_range_of_each_family_and_one_that_has_ranges_is_left_alone():
    claims = [claim("n1"), claim("n2", "10.244.0.0/24")]
    assert plan(claims, DUAL) == ({"n1": ["10.244.1.0/24", "fd00:10::/64"]}, {})
    assert plan([claim("n1")], {6: DUAL[6], 4: DUAL[4]})[0] == {"n1": ["fd00:10::/64", "10.244.0.0/24"]}


def test_ranges_of_another_size_are_gone_round():
    claims = [claim("n1", "10.244.0.128/25"), claim("n2", "10.244.2.0/23"), claim("n3"), claim("n4"), claim("n5", "10.244.5.4/30")]
    assert plan(claims)[0] == {"n3": ["10.244.1.0/24"], "n4": ["10.244.4.0/24"]}


def test_a_node_with_half_of_a_huge_family_costs_no_time():
    pools = {6: (64, nets("fd00::/16"))}
    assert plan([claim("n1", "fd00::/17"), claim("n2")], pools)[0] == {"n2": ["fd00:8000::/64"]}


def test_a_range_given_back_rests_and_is_free_after_that():
    freed = {kube.span_of(*nets("10.244.0.0/24")): 600}
    assert plan([claim("n1")], freed=freed, now=599)[0] == {"n1": ["10.244.1.0/24"]}
    assert plan([claim("n1")], freed=freed, now=600)[0] == {"n1": ["10.244.0.0/24"]}


def test_a_full_range_leaves_the_youngest_waiting_and_says_what_helps():
    claims = [claim(f"n{number}") for number in range(6)]
    writes, refused = plan(claims, SMALL)
    assert writes == {f"n{number}": [f"10.244.0.{64 * number}/26"] for number in range(4)}
    assert sorted(refused) == ["n4", "n5"]
    assert refused["n5"].startswith("no range /26 is free in --cluster-cidr 10.244.0.0/24; ") and "add a --cluster-cidr" in refused["n5"]


def test_a_second_cluster_cidr_is_used_when_the_first_is_full():
    grown = {4: (26, (*SMALL[4][1], *nets("10.9.0.0/25")))}
    writes, refused = plan([claim(f"n{number}") for number in range(7)], grown)
    assert (writes["n3"], writes["n4"], writes["n5"]) == (["10.244.0.192/26"], ["10.9.0.0/26"], ["10.9.0.64/26"])
    assert list(refused) == ["n6"]


def test_where_one_family_is_full_a_node_gets_none_at_all():
    claims = [claim(f"n{number}") for number in range(5)]
    writes, refused = plan(claims, {**SMALL, 6: DUAL[6]})
    assert len(writes) == 4 and "/26" in refused["n4"]


@pytest.mark.parametrize(
    "foreign, said",
    [
        (claim("n1", "10.245.0.0/24"), "its pod CIDR 10.245.0.0/24 is outside --cluster-cidr"),
        (claim("n1", "fd00:10::/64"), "its pod CIDR fd00:10::/64 is outside --cluster-cidr"),
        (claim("n1", "10.0.0.0/8"), "its pod CIDR 10.0.0.0/8 is outside"),
        (claim("n1", fault="its pod CIDRs are of no use: x"), "its pod CIDRs are of no use"),
        (claim("n8", "10.244.0.0/24"), "its pod CIDR 10.244.0.0/24 overlaps that of node n0"),
        (claim("n8", "10.244.0.0/23"), "its pod CIDR 10.244.0.0/23 overlaps that of node n0"),
        (claim("n8", "10.244.0.0/16"), "its pod CIDR 10.244.0.0/16 overlaps that of node n0"),
        (claim("n8", "10.244.0.0/24", "10.245.0.0/24"), "its pod CIDR 10.245.0.0/24 is outside"),
    ],
)
def test_a_range_outside_the_pools_or_of_another_node_is_the_trouble_of_its_node_alone(foreign, said):
    foreign = foreign._replace(version="")
    writes, refused = plan([claim("n0", "10.244.0.0/24"), foreign, claim("n3"), claim("n4")])
    assert writes == {"n3": ["10.244.1.0/24"], "n4": ["10.244.2.0/24"]}
    assert list(refused) == [foreign.name] and refused[foreign.name].startswith(said)


def test_a_range_that_overlaps_another_nodes_in_part_is_given_to_nobody():
    small = {4: (24, (ipaddress.ip_network("10.244.0.0/22"),))}
    claims = [claim("n0", "10.244.0.0/25"), claim("n1", "10.244.0.0/24"), claim("n2"), claim("n3")]
    writes, refused = plan(claims, small)
    assert writes == {"n2": ["10.244.1.0/24"], "n3": ["10.244.2.0/24"]} and list(refused) == ["n1"]


@pytest.mark.parametrize("known_first", ["n1", "n2"])
def test_of_two_nodes_with_one_range_the_one_that_was_known_first_keeps_it(known_first):
    claims = [claim("n1", "10.244.0.0/24"), claim("n2", "10.244.0.0/24"), claim("n3")]
    given = dict(sorted({each.uid: each.cidrs for each in claims[:2]}.items(), reverse=known_first == "n2"))
    writes, refused = plan(claims, given=given)
    loser = {"n1": "n2", "n2": "n1"}[known_first]
    assert refused == {loser: f"its pod CIDR 10.244.0.0/24 overlaps that of node {known_first}"} and list(writes) == ["n3"]
    assert list(plan(claims, given={})[1]) == ["n2"], "of two that nobody knew, the older"


def test_ranges_of_one_family_alone_and_in_any_order_are_taken():
    claims = [claim("n1", "fd00:10::/64", "10.244.0.0/24"), claim("n2", "10.244.1.0/24"), claim("n3", "fd00:10:0:1::/64"), claim("n4")]
    assert plan(claims, DUAL) == ({"n4": ["10.244.2.0/24", "fd00:10:0:2::/64"]}, {})


def test_a_write_of_unknown_outcome_keeps_its_range_for_its_node():
    given = {"uid-n5": nets("10.244.0.0/24")}
    assert plan([claim("n1"), claim("n5")], given=given)[0] == {"n1": ["10.244.1.0/24"], "n5": ["10.244.0.0/24"]}


def test_a_reserved_range_that_another_node_has_is_given_up():
    given = {"uid-n5": nets("10.244.0.0/24"), "uid-n1": nets("10.244.0.0/24")}
    assert plan([claim("n1", "10.244.0.0/24"), claim("n5")], given=given)[0] == {"n5": ["10.244.1.0/24"]}


def test_what_may_be_in_use_survives_as_text():
    grown = {4: (26, (*SMALL[4][1], *nets("10.9.0.0/24", "10.8.0.0/24"))), 6: DUAL[6]}
    claims = [claim("n1", "10.244.0.64/26", "fd00:10:0:5::/64"), claim("n2", "10.9.0.0/26"), claim("n3")]
    _, _, taken = nodeipam.plan_allocations(claims, grown, {each.uid: each.cidrs for each in claims}, {}, 0)
    text = nodeipam.format_used(grown, taken)
    assert text == "10.244.0.127,10.9.0.63,fd00:10:0:5:ffff:ffff:ffff:ffff"
    freed = nodeipam.parse_used(text + ",192.0.2.1,rubbish,", grown, 600)
    assert set(freed.values()) == {600} and len(freed) == 3
    writes, _, _ = nodeipam.plan_allocations([claim("n9")], grown, {}, freed, 0)
    assert list(map(str, *writes.values())) == ["10.244.0.128/26", "fd00:10:0:6::/64"]


def node_object(name="n1", uid="u1", version="7", cidrs=()):
    meta = {"name": name, "uid": uid, "resourceVersion": version, "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"metadata": meta, "spec": {"podCIDR": cidrs[0], "podCIDRs": list(cidrs)} if cidrs else {}}


def test_a_claim_has_the_nodes_internal_ips():
    rows = [
        {"type": kind, "address": address} for kind, address in (("Hostname", "n1"), ("InternalIP", "192.0.2.1"), ("InternalIP", "fd00::1"))
    ]
    rows.append({"type": "ExternalIP", "address": "10.244.0.1"})
    assert list(map(str, nodeipam.parse_claim({**node_object(), "status": {"addresses": rows}}).addresses)) == ["192.0.2.1", "fd00::1"]


def test_a_claim_judges_ranges_by_their_value_and_not_by_who_set_them():
    assert nodeipam.parse_claim(node_object()) == Claim("2026-01-01T00:00:00Z", "n1", "u1", "7", (), "")
    node = node_object(cidrs=["10.244.0.0/24"])
    node["metadata"]["managedFields"] = [{"manager": "x", "fieldsV1": {"f:spec": {"f:podCIDR": {}, "f:podCIDRs": {".": {}}}}}]
    assert nodeipam.parse_claim(node) == Claim("2026-01-01T00:00:00Z", "n1", "u1", "", nets("10.244.0.0/24"), "")
    assert nodeipam.parse_claim({**node_object(), "spec": {"podCIDR": "10.244.0.0/24"}}).cidrs == nets("10.244.0.0/24")


MANY = [f"10.244.{number}.0/24" for number in range(256)]


@pytest.mark.parametrize("cidrs", [["10.244.0.0/99"], ["x"] * 5000, MANY[:2], MANY])
def test_ranges_that_no_api_server_takes_are_of_no_use(cidrs):
    odd = nodeipam.parse_claim(node_object("n9", "u9", cidrs=cidrs))
    assert odd.fault.startswith("its pod CIDRs are of no use: ") and (odd.cidrs, odd.version) == ((), "")
    assert plan([odd, claim("n1")]) == ({"n1": ["10.244.0.0/24"]}, {"n9": odd.fault})


def test_a_heartbeat_of_a_node_that_has_its_ranges_is_no_news():
    first, second = (nodeipam.parse_claim(node_object(version=version, cidrs=["10.244.0.0/24"])) for version in ("7", "8"))
    assert first == second


# ---- a world in memory ----


class World:
    """An API server with Nodes, one Lease and Events, on a clock that the test turns. Each write must carry a precondition."""

    def __init__(self, pools=POOLS):
        self.pools, self.now, self.version, self.created = pools, 1000.0, 0, 0
        self.nodes, self.lease, self.events, self.writes, self.requests = {}, None, [], [], []
        self.gone = []  # [(when, network, name)] of deleted nodes
        self.in_trouble = {"foreign"}  # nodes with ranges that nobody can have given
        self.watchers = []
        self.before = self.after = lambda method, path: None  # may raise an ApiError, or let time pass

    def clock(self):
        return self.now

    def start(self, name, **how):
        """A NodeIpam named like that; `how` may replace its api and clock."""
        api, clock = how.get("api", self), how.get("clock", self.clock)
        election = Election(api, "kube-system/mncni-nodeipam", name, clock)
        return NodeIpam(api, how.get("pools", self.pools), election, clock, self.follow)

    def follow(self, put, stopping):
        put("LIST", [nodeipam.parse_claim(node) for node in self.nodes.values()])
        self.watchers = [*[each for each in self.watchers if not each[1].is_set()], (put, stopping)]

    def tell(self, kind, node):
        for put, _ in self.watchers:
            put(kind, [nodeipam.parse_claim(node)])

    def stamp(self):
        self.version += 1
        return str(self.version)

    def create(self, name, cidrs=()):
        self.created += 1
        node = node_object(name, f"uid-{self.created}", self.stamp(), cidrs)
        node["metadata"]["creationTimestamp"] = f"{self.created:09}"
        self.nodes[name] = node
        self.tell("ADDED", node)

    def delete(self, name):
        node = self.nodes.pop(name)
        self.gone += [(self.now, network, name) for network in nets(*node["spec"].get("podCIDRs", ()))]
        self.tell("DELETED", node)

    def touch(self, name):
        self.nodes[name] = json.loads(json.dumps(self.nodes[name]))
        self.nodes[name]["metadata"]["resourceVersion"] = self.stamp()
        self.tell("MODIFIED", self.nodes[name])

    def cidrs(self):
        return {name: node["spec"]["podCIDRs"] for name, node in sorted(self.nodes.items()) if node["spec"]}

    def run(self, seconds, *allocators, step=0.5):
        for _ in range(int(seconds / step)):
            for each in allocators:
                each.tick(0)
            self.now += step

    def request(self, method, path, body=None, params=None, content_type=None, accept=None):
        self.requests.append((method, path))
        self.before(method, path)
        answer = self.answer(method, path, json.loads(json.dumps(body)), params)
        self.after(method, path)
        return answer

    def answer(self, method, path, body, params):
        if path.endswith("/events"):
            assert body["metadata"]["namespace"] == "default" and body["involvedObject"]["kind"] == "Node"
            self.events.append((body["involvedObject"]["name"], body["reason"], body["message"]))
            return body
        if "/leases" in path:
            return self.answer_lease(method, path, body)
        assert (method, params) == ("PATCH", {"fieldManager": "mncni-nodeipam"})
        return self.answer_patch(path.rpartition("/")[2], body)

    def answer_lease(self, method, path, body):
        if method == "GET" and self.lease is None:
            raise ApiError(404, "NotFound", "no lease")
        if method == "POST" and self.lease is not None:
            raise ApiError(409, "AlreadyExists", "it is there")
        if method == "PUT":
            assert body["metadata"]["resourceVersion"], "without a precondition"
            if self.lease is None or body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
                raise ApiError(409, "Conflict", "the lease has changed")
        if method != "GET":
            self.lease = body
            self.lease["metadata"]["resourceVersion"] = self.stamp()
        return json.loads(json.dumps(self.lease))

    def answer_patch(self, name, body):
        """Checks what must hold of every write, whoever sends it and however late."""
        node = self.nodes.get(name)
        if node is None:
            raise ApiError(404, "NotFound", f"no node {name}")
        assert set(body) == {"metadata", "spec"} and set(body["metadata"]) == {"resourceVersion"}, "without a precondition"
        assert body["spec"]["podCIDR"] == body["spec"]["podCIDRs"][0]
        if body["metadata"]["resourceVersion"] != node["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", "the node has changed")
        assert not node["spec"].get("podCIDRs"), "a node's ranges cannot be changed"
        for network in nets(*body["spec"]["podCIDRs"]):
            for other, texts in self.cidrs().items():
                overlaps = any(network.overlaps(each) for each in nets(*texts))
                assert not overlaps or other in self.in_trouble, f"{name} gets {network} of {other}"
            resting = [(when, last) for when, each, last in self.gone if each.overlaps(network) and self.now - when < REUSE_S]
            assert not resting or resting[-1][1] == name, f"{network} is given again after {self.now - resting[-1][0]} s"
        node = json.loads(json.dumps(node))
        node["spec"] = body["spec"]
        node["metadata"]["resourceVersion"] = self.stamp()
        self.nodes[name] = node
        self.writes.append((name, body["spec"]["podCIDRs"]))
        self.tell("MODIFIED", node)
        return node


@pytest.fixture
def world():
    return World()


def counted(ipam, name, **labels):
    """A figure of /metrics."""
    return ipam.counts.figures[f"mncni_nodeipam_{name}", tuple(labels.items())]


def leading(world, name="a", **how):
    ipam = world.start(name, **how)
    world.run(2, ipam)
    assert ipam.election.leads(ipam.term)
    return ipam


def test_new_nodes_get_the_lowest_free_ranges_in_one_write_each(world):
    ipam = leading(world)
    for number in range(3):
        world.create(f"n{number}")
    ipam.tick(0)
    assert world.cidrs() == {f"n{number}": [f"10.244.{number}.0/24"] for number in range(3)}
    assert counted(ipam, "ranges_given_total") == len(world.writes) == 3


def test_200_nodes_at_once_get_200_ranges_and_one_lease_write_covers_them(world):
    ipam = leading(world)
    for number in range(200):
        world.create(f"n{number}")
    before = sum(path.endswith("mncni-nodeipam") and method == "PUT" for method, path in world.requests)
    ipam.tick(0)
    after = sum(path.endswith("mncni-nodeipam") and method == "PUT" for method, path in world.requests)
    assert sorted(texts[0] for texts in world.cidrs().values()) == sorted(f"10.244.{number}.0/24" for number in range(200))
    assert after - before <= 2


def test_a_quiet_cluster_sees_no_writes_but_renewals(world):
    ipam = leading(world)
    world.create("n1")
    world.run(5, ipam)
    del world.requests[:]
    for _ in range(60):
        world.touch("n1")
        world.run(60, ipam, step=2)
    assert {(method, path.rpartition("/")[2]) for method, path in world.requests} == {("PUT", "mncni-nodeipam")}


def anew(world, ipam, name, away_s=0):
    """The ranges of a Node that is deleted and, after a while, registered again."""
    world.delete(name)
    world.run(away_s, ipam)
    world.create(name)
    world.run(1, ipam)
    return world.cidrs()[name]


@pytest.mark.parametrize("pools", [POOLS, DUAL], ids=["ipv4", "dual"])
def test_a_node_registered_anew_gets_its_ranges_back_while_they_rest_and_another_node_does_not(pools):
    world = World(pools)
    ipam = leading(world)
    for name in ("n1", "n2"):
        world.create(name)
        world.run(1, ipam)
    before = world.cidrs()
    for away_s in (0, 60, REUSE_S - 10):
        assert anew(world, ipam, "n1", away_s) == before["n1"]
    world.delete("n1")
    world.create("n3")
    world.run(1, ipam)
    assert world.cidrs()["n3"][0] == "10.244.2.0/24" and anew(world, ipam, "n2") == before["n2"]


def test_after_its_rest_a_range_goes_to_whoever_comes_first(world):
    ipam = leading(world)
    world.create("n1")
    world.run(1, ipam)
    world.delete("n1")
    world.run(REUSE_S + 1, ipam)
    world.create("n2")
    world.run(1, ipam)
    world.create("n1")
    world.run(1, ipam)
    assert world.cidrs() == {"n1": ["10.244.1.0/24"], "n2": ["10.244.0.0/24"]}


@pytest.mark.parametrize("mine", ["10.244.0.0/24", "10.244.0.128/25", "10.244.0.0/23"])
def test_a_node_registered_anew_does_not_get_a_range_of_which_another_has_a_part_meanwhile(world, mine):
    ipam = leading(world)
    world.create("n1")
    world.run(1, ipam)
    world.delete("n1")
    world.create("n2", [mine])  # by somebody else
    world.create("n1")
    world.run(1, ipam)
    assert not any(each.overlaps(nets(mine)[0]) for each in nets(*world.cidrs()["n1"]))
    world.delete("n2"), world.delete("n1")
    world.create("n2"), world.create("n1")  # both names had a part of it
    world.run(1, ipam)
    assert not nets(*world.cidrs()["n1"])[0].overlaps(nets(*world.cidrs()["n2"])[0])


@pytest.mark.parametrize("odd", ["10.244.9.0/25", "10.9.0.0/24", "fd00:10::/64"])
def test_a_node_registered_anew_does_not_get_back_what_nodeipam_would_not_give(world, odd):
    ipam = leading(world)
    world.in_trouble |= {"n1"}
    world.create("n1", [odd])
    world.run(1, ipam)
    assert anew(world, ipam, "n1") == ["10.244.0.0/24"]


def test_a_full_range_is_an_event_and_a_count_and_heals_when_a_range_has_rested(caplog):
    world = World(SMALL)
    ipam = leading(world)
    for number in range(5):
        world.create(f"n{number}")
    world.run(60, ipam)
    assert [(name, reason) for name, reason, _ in world.events] == [("n4", "CIDRNotAvailable")]
    assert "no range /26 is free" in world.events[0][2] and counted(ipam, "nodes", state="waiting") == 1
    world.delete("n2")
    world.run(REUSE_S - 10, ipam)
    assert "n4" not in world.cidrs()
    world.run(20, ipam)
    assert world.cidrs()["n4"] == ["10.244.0.128/26"] and counted(ipam, "nodes", state="waiting") == 0
    assert len(world.events) == 1 and sum("no range" in each.message for each in caplog.records) == 1


def test_events_of_many_waiting_nodes_come_a_few_at_a_time():
    world = World(SMALL)
    ipam = leading(world)
    for number in range(104):
        world.create(f"n{number}")
    ipam.tick(0)
    assert len(world.events) == nodeipam.EVENTS
    world.run(60, ipam)
    assert len({name for name, _, _ in world.events}) == len(world.events) == 100


@pytest.mark.parametrize("cidr, said", [("10.99.0.0/24", "outside --cluster-cidr"), ("10.244.0.0/24", "overlaps that of node n1")])
def test_a_node_in_trouble_is_told_once_and_the_others_get_theirs(world, caplog, cidr, said):
    ipam = leading(world)
    world.create("n1")
    world.run(1, ipam)
    world.create("foreign", [cidr])
    world.create("n2")
    world.run(30, ipam)
    assert world.cidrs()["n2"] == ["10.244.1.0/24"] and counted(ipam, "nodes", state="foreign") == 1
    ((name, reason, message),) = world.events
    assert (name, reason) == ("foreign", "ForeignPodCIDR") and said in message and "delete this Node" in message
    assert sum(said in each.message for each in caplog.records if each.levelno == logging.ERROR) == 1
    world.delete("foreign")
    world.run(3, ipam)
    assert counted(ipam, "nodes", state="foreign") == 0


def test_the_incumbent_keeps_its_range_over_an_older_node_and_over_one_that_was_in_trouble_before(world):
    ipam = leading(world)
    world.in_trouble = {"old"}
    world.create("old", ["10.99.0.0/24"])
    world.create("n1")
    world.run(2, ipam)
    world.nodes["old"]["spec"] = node_object(cidrs=["10.244.0.0/23"])["spec"]  # what the API admits to nobody
    world.touch("old")
    world.create("n2")
    world.run(2, ipam)
    assert world.cidrs()["n2"] == ["10.244.1.0/24"], "the rest of what is larger than a share is not kept for a node in trouble"
    world.delete("n1")
    world.run(2, ipam)
    assert {(name, message.split(";")[0]) for name, _, message in world.events} == {
        ("old", "its pod CIDR 10.99.0.0/24 is outside --cluster-cidr"),
        ("old", "its pod CIDR 10.244.0.0/23 overlaps that of node n1"),
        ("old", "its pod CIDR 10.244.0.0/23 overlaps that of node n2"),
    }


def test_another_allocator_beside_us_is_not_fought(world):
    """kube-controller-manager with --allocate-node-cidrs: both give, each keeps off what the other has given, nothing is given twice."""
    ipam = leading(world)
    for number in range(40):
        given = {text for texts in world.cidrs().values() for text in texts}
        free = next(text for text in (f"10.244.{place}.0/24" for place in range(256)) if text not in given)
        world.create(f"n{number}", [free] if number % 2 else ())
        world.run(1, ipam)
    assert len(world.cidrs()) == 40 and world.events == []
    patches = sum(method == "PATCH" for method, _ in world.requests)
    assert patches == 20, "each write of ours is one that a node needed"


def test_a_node_that_is_made_anew_again_and_again_takes_the_ranges_of_no_other(world):
    ipam = leading(world)
    world.create("n1")
    world.run(1, ipam)
    for _ in range(100):
        world.create("churn")
        world.run(1, ipam)
        world.delete("churn")
    world.create("n2")
    world.run(1, ipam)
    assert world.cidrs() == {"n1": ["10.244.0.0/24"], "n2": ["10.244.2.0/24"]} and len(ipam.freed) == len(ipam.former) == 1
    world.run(REUSE_S, ipam)
    world.create("n3")
    world.run(1, ipam)
    assert world.cidrs()["n3"] == ["10.244.1.0/24"] and len(ipam.freed) == 0


def test_a_lease_that_was_applied_again_without_its_note_does_not_make_its_leader_forget(world):
    ipam = leading(world)
    world.create("n1")
    world.run(1, ipam)
    world.delete("n1")
    world.run(1, ipam)
    world.lease = {"metadata": {"name": "mncni-nodeipam", "resourceVersion": world.stamp()}}
    world.run(nodeipam.LEASE_S, ipam)
    assert ipam.election.leads(ipam.term)
    world.create("n2")
    world.run(1, ipam)
    assert world.cidrs() == {"n2": ["10.244.1.0/24"]}


def test_a_lease_that_is_gone_and_must_not_be_made_names_the_way_out(world, caplog):
    ipam = leading(world)

    def forbidden(method, path):
        if method == "POST" and path.endswith("/leases"):
            raise ApiError(403, "Forbidden", 'cannot create resource "leases"')

    world.lease, world.before = None, forbidden
    world.run(RENEW_S + 5, ipam)
    assert not ipam.election.leads(ipam.term)
    assert 'cannot create resource "leases"; if it is not there, apply deploy/nodeipam/account.yaml again' in caplog.text


def test_a_conflict_is_tried_again_with_what_the_node_has_become(world):
    ipam = leading(world)

    def conflict_once(method, path):
        if method == "PATCH":
            world.before = lambda method, path: None
            world.touch("n1")

    world.before = conflict_once
    world.create("n1")
    world.run(1, ipam)
    assert world.cidrs() == {"n1": ["10.244.0.0/24"]} and counted(ipam, "write_failures_total", cause="conflict") == 1


def test_a_node_that_another_hand_gives_a_range_in_the_same_moment_keeps_that_and_ours_rests(world):
    ipam = leading(world)

    def another_hand(method, path):
        if method == "PATCH":
            world.before = lambda method, path: None
            world.nodes["n1"]["spec"] = {"podCIDR": "10.244.7.0/24", "podCIDRs": ["10.244.7.0/24"]}
            world.touch("n1")

    world.before = another_hand
    world.create("n1")
    world.run(5, ipam)
    world.create("n2")
    world.run(1, ipam)
    assert world.cidrs() == {"n1": ["10.244.7.0/24"], "n2": ["10.244.1.0/24"]}


@pytest.mark.parametrize("status", [0, 429, 500, 403, 422])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_write_whose_outcome_is_unknown_gives_the_range_to_no_other_node(world, when, status):
    """The answer to n1's write is an error: whether it was done or not, n2 gets another range."""
    ipam = leading(world)

    def lose(method, path):
        if method == "PATCH":
            world.before = world.after = lambda method, path: None
            raise ApiError(status, "Fault", "lost", 5 if status == 429 else None)

    setattr(world, when, lose)
    world.create("n1")
    ipam.tick(0)
    world.create("n2")
    world.run(10, ipam)
    assert world.cidrs() == {"n1": ["10.244.0.0/24"], "n2": ["10.244.1.0/24"]}


def test_a_node_that_is_gone_before_the_first_pass_leaves_a_range_that_rests(world):
    """The list of a new leader still has it, its deletion comes right behind."""
    world.create("n1", ["10.244.0.0/24"])
    ipam = world.start("a")
    ipam.election.tick()
    ipam.begin()
    world.delete("n1")
    world.create("n2")
    world.run(1, ipam)
    assert world.cidrs() == {"n2": ["10.244.1.0/24"]}


def test_retry_after_is_heeded(world):
    ipam = leading(world)

    def busy(method, path):
        if method == "PATCH":
            raise ApiError(429, "TooManyRequests", "busy", 30)

    world.create("n1")
    world.create("n2")
    world.before = busy
    world.run(29, ipam)
    assert sum(method == "PATCH" for method, _ in world.requests) == 1
    assert ipam.election.leads(ipam.term)
    world.before = lambda method, path: None
    world.run(5, ipam)
    assert len(world.cidrs()) == 2


def test_an_old_update_that_arrives_after_the_write_takes_nothing_back(world):
    ipam = leading(world)
    world.create("n1")
    old = json.loads(json.dumps(world.nodes["n1"]))
    world.run(1, ipam)
    world.tell("MODIFIED", old)
    world.run(5, ipam)
    assert counted(ipam, "write_failures_total", cause="conflict") == 0 and len(world.writes) == 1


# ---- who leads ----


def test_of_two_one_leads_and_the_other_takes_over_at_once_when_it_stops(world):
    first, second = leading(world, "a"), world.start("b")
    world.run(60, first, second)
    assert first.election.leads(first.term) and not second.election.leads(second.term)
    first.election.release()
    assert world.lease["spec"]["holderIdentity"] == ""
    world.run(RETRY_S + 1, second)
    assert second.election.leads(second.term) and world.lease["spec"]["leaseTransitions"] == 2
    assert world.lease["spec"]["holderIdentity"] == "b"


def test_a_killed_leader_is_followed_after_the_lease_has_run_out_on_the_others_clock(world):
    first, second = leading(world, "a"), world.start("b")
    world.run(3, second)
    world.run(nodeipam.LEASE_S - 4, second)
    assert not second.election.leads(second.term)
    world.run(5, second)
    assert second.election.leads(second.term)
    del first


def test_a_leader_that_cannot_renew_stops_writing_before_another_may_begin(world, caplog):
    ipam = leading(world)

    def no_lease(method, path):
        if "/leases" in path:
            raise ApiError(0, "Unreachable", "no route to the API")

    world.before = no_lease
    world.run(RENEW_S + 1, ipam)
    world.create("n1")
    world.run(30, ipam)
    assert world.writes == [] and not ipam.election.leads(ipam.term)
    assert "without which nothing is written: no route to the API" in caplog.text
    world.before = lambda method, path: None
    world.run(5, ipam)
    assert world.cidrs() == {"n1": ["10.244.0.0/24"]} and counted(ipam, "terms_total") == 1  # nobody else has led: it goes on as it was


def test_a_leader_whose_lease_was_deleted_makes_it_anew_and_forgets_nothing(world):
    ipam = leading(world)
    world.create("n1")
    world.run(1, ipam)
    world.delete("n1")
    world.run(1, ipam)
    world.lease = None
    world.run(6, ipam)
    assert ipam.election.leads(ipam.term) and world.lease["metadata"]["annotations"][nodeipam.USED] == "10.244.0.255"
    world.create("n2")
    world.run(1, ipam)
    assert world.cidrs() == {"n2": ["10.244.1.0/24"]}


def test_a_standby_that_saw_the_lease_vanish_waits_for_the_leader_to_notice(world):
    first, second = leading(world, "a"), world.start("b")
    world.run(3, first, second)
    world.lease = None
    world.run(nodeipam.LEASE_S - 1, second)
    assert world.lease is None
    world.run(RETRY_S + 2, second)
    assert second.election.leads(second.term) and not first.election.leads(first.term)


def test_who_wrote_the_lease_and_is_gone_keeps_nobody_from_leading(world):
    """Somebody with nodeipam's token, who is then shut out: a holder for 68 years, and a count that the API server lets nobody raise."""
    spec = {"holderIdentity": "x", "leaseDurationSeconds": 2**31 - 1, "leaseTransitions": 2**31 - 1}
    world.lease = {"metadata": {"name": "mncni-nodeipam", "resourceVersion": world.stamp()}, "spec": spec}
    ipam = world.start("a")
    world.run(nodeipam.LONGEST_LEASE_S - 1, ipam)
    assert not ipam.election.leads(ipam.term), "it was kept"
    world.run(RETRY_S + 2, ipam)
    assert ipam.election.leads(ipam.term)
    assert (world.lease["spec"]["leaseTransitions"], world.lease["spec"]["leaseDurationSeconds"]) == (2**31 - 1, nodeipam.LEASE_S)


def test_a_renewal_counts_from_when_it_was_sent(world):
    ipam = leading(world)

    def slow(method, path):
        if method == "PUT":
            world.now += RENEW_S - 1

    world.after = slow
    world.run(RETRY_S, ipam)
    world.after = lambda method, path: None
    assert ipam.election.leads(ipam.term)
    world.now += 1
    assert not ipam.election.leads(ipam.term)


def test_other_annotations_and_labels_of_the_lease_stay(world):
    ipam = leading(world)
    world.lease["metadata"]["labels"] = {"x": "y"}
    world.lease["metadata"]["annotations"]["theirs"] = "1"
    world.lease["metadata"]["resourceVersion"] = world.stamp()
    world.run(20, ipam)
    assert ipam.election.leads(ipam.term) and counted(ipam, "terms_total") == 1
    assert world.lease["metadata"]["labels"] == {"x": "y"} and world.lease["metadata"]["annotations"]["theirs"] == "1"


def test_a_new_leader_gives_no_range_that_may_just_have_been_given_back(world):
    first = leading(world, "a")
    for number in range(4):
        world.create(f"n{number}")
    world.run(1, first)
    world.delete("n1")  # nobody leads when this happens
    second = world.start("b")
    world.run(30, second)
    world.create("n4")
    world.run(1, second)
    assert world.cidrs()["n4"] == ["10.244.4.0/24"]
    world.run(REUSE_S, second)
    world.create("n5")
    world.run(1, second)
    assert world.cidrs()["n5"] == ["10.244.1.0/24"]


def test_even_the_highest_range_is_remembered_over_a_change_of_leaders(world):
    first = leading(world, "a")
    world.create("n0")
    world.run(1, first)
    world.delete("n0")
    second = world.start("b")
    world.run(30, second)
    world.create("n1")
    world.run(1, second)
    assert world.cidrs() == {"n1": ["10.244.1.0/24"]}


def test_a_range_that_was_added_is_used_at_once_by_the_new_leader():
    world = World(SMALL)
    first = leading(world, "a")
    for number in range(5):
        world.create(f"n{number}")
    world.run(5, first)
    first.election.release()
    second = world.start("b", pools={4: (26, (*nets("10.9.0.0/24"), *SMALL[4][1]))})
    world.run(5, second)
    assert world.cidrs()["n4"] == ["10.9.0.0/26"]


def test_a_leader_paused_between_its_look_at_the_clock_and_its_write_hands_out_no_range_twice(world):
    """The longest pause there is: the request is made, the process stops, another leads for minutes, then the request goes out."""
    first, second = leading(world, "a"), world.start("b")
    world.run(2, second)

    def pause(method, path):
        if method == "PATCH":
            world.before = lambda method, path: None
            world.now += 30
            for watcher in list(world.watchers):  # n1 is slow to be seen by the new leader: the old write is still good
                world.watchers.remove(watcher)
            node = world.nodes.pop("n1")
            world.run(2 * nodeipam.LEASE_S, second)
            assert second.election.leads(second.term)
            world.create("n2")
            world.run(60, second)
            assert world.cidrs() == {"n2": ["10.244.1.0/24"]}
            world.nodes["n1"] = node

    world.create("n1")
    world.before = pause
    first.tick(0)
    assert world.cidrs() == {"n1": ["10.244.0.0/24"], "n2": ["10.244.1.0/24"]}


def test_a_leader_that_wakes_up_after_another_took_the_lease_writes_nothing(world):
    first, second = leading(world, "a"), world.start("b")
    for number in range(3):
        world.create(f"n{number}")
    world.run(2, second)

    def sleep_after_first_write(method, path):
        if method == "PATCH":
            world.after = lambda method, path: None
            world.now += 60
            world.run(30, second)

    world.after = sleep_after_first_write
    first.tick(0)
    count = len(world.writes)
    patches = [path for method, path in world.requests if method == "PATCH"]
    assert count == len(patches) == 3 and second.election.leads(second.term)  # one by the first, two by the second, none after that
    world.run(30, first, second)
    assert len(world.writes) == 3 and not first.election.leads(first.term)


def test_a_leader_that_sleeps_while_another_leads_and_leads_again_writes_nothing_of_its_old_plan(world):
    first = leading(world, "a")
    for number in range(3):
        world.create(f"n{number}")

    def another_term(method, path):
        if method == "PATCH":
            world.after = lambda method, path: None
            second = world.start("b", pools={4: (24, nets("10.244.128.0/17"))})
            world.run(30, second)
            second.election.release()
            del world.requests[:]

    world.after = another_term
    first.tick(0)
    assert first.election.leads(first.election.term) and "PATCH" not in [method for method, _ in world.requests]


# ---- hours of it ----


class Chaos:
    """Random nodes, allocators that are paused, killed and started, requests that fail, get lost or arrive late.
    World checks each write."""

    def __init__(self, seed, pools):
        self.random, self.world = random.Random(seed), World(pools)
        self.allocators, self.started, self.depth = [], 0, 0
        self.current = None  # the allocator whose request is on its way
        self.world.before, self.world.after = self.before, self.after
        self.faults = True
        self.start()

    def start(self):
        self.started += 1
        world, backlog = self.world, []
        ipam = world.start(f"allocator-{self.started}")
        follow = ipam.follow

        def late(put, stopping):
            """What the watch says comes in order, but only when deliver() lets it through."""
            backlog.clear()
            follow(lambda *event: backlog.append((put, event)), stopping)

        ipam.follow, ipam.backlog = late, backlog
        self.allocators.append(ipam)

    def deliver(self, ipam):
        for put, event in ipam.backlog:
            put(*event)
        ipam.backlog.clear()

    def before(self, method, path):
        if not self.faults or self.random.random() > 0.15:
            return
        kind = self.random.choice(["late", "late", "unreachable", "busy", "error"])
        if kind == "late" and self.depth == 0:  # the world goes on while this request is on its way
            self.depth += 1
            for _ in range(self.random.randrange(1, 40)):
                self.step()
            self.depth -= 1
        elif kind != "late":
            raise ApiError({"unreachable": 0, "busy": 429, "error": 500}[kind], kind, kind, 3 if kind == "busy" else None)

    def after(self, method, path):
        if self.faults and self.random.random() < 0.05:
            raise ApiError(0, "Unreachable", "the answer is lost")

    def step(self):
        choice, world = self.random.random(), self.world
        ready = [each for each in self.allocators if each is not self.current]
        if choice < 0.08:
            world.create(f"n{world.created}")
        elif choice < 0.15 and world.nodes:
            world.delete(self.random.choice(sorted(world.nodes)))
        elif choice < 0.20 and world.nodes:
            world.touch(self.random.choice(sorted(world.nodes)))
        elif choice < 0.22 and len(self.allocators) < 4:
            self.start()
        elif choice < 0.235 and len(ready) > 1:
            killed = self.random.choice(ready)
            self.allocators.remove(killed)
            if self.random.random() < 0.5:
                killed.election.release()
        elif choice < 0.25:
            world.now += self.random.choice([20, 60, 120])
        elif choice < 0.6:
            world.now += self.random.random() * 4
        elif ready:
            outer, self.current = self.current, self.random.choice(ready)
            if self.random.random() < 0.8:
                self.deliver(self.current)
            self.current.tick(0)
            self.current = outer


MEDIUM = {4: (29, nets("10.244.0.0/23"))}


@pytest.mark.parametrize("pools", [MEDIUM, SMALL, DUAL], ids=["64 ranges", "4 ranges", "dual stack"])
@pytest.mark.parametrize("seed", range(6))
def test_over_hours_of_chaos_no_range_is_given_twice_nor_too_soon_and_all_nodes_get_theirs_afterwards(seed, pools):
    chaos = Chaos(seed, pools)
    world = chaos.world
    for _ in range(4000):
        chaos.step()
    assert world.now > 3600 and len(world.writes) > (0 if pools is SMALL else 20)  # with each new leader what is free rests anew
    chaos.faults = False
    for name in sorted(world.nodes)[4:]:
        world.delete(name)
    chaos.allocators = chaos.allocators[:2] or [world.start("last")]
    for _ in range(800):
        for each in chaos.allocators:
            chaos.deliver(each)
            each.tick(0)
        world.now += 1
    assert set(world.cidrs()) == set(world.nodes)
    assert sum(each.election.leads(each.term) for each in chaos.allocators) == 1


@pytest.mark.parametrize("seed", range(5))
def test_an_undisturbed_leader_always_gives_the_lowest_range_that_has_rested(seed):
    rng, pools = random.Random(seed), {4: (29, (ipaddress.ip_network("10.244.0.0/24"),))}
    world = World(pools)
    ipam = leading(world)
    ranges = list(map(str, pools[4][1][0].subnets(new_prefix=29)))
    for number in range(600):
        if rng.random() < 0.6 or not world.nodes:
            world.create(f"n{number}")
            in_use = {str(each) for when, each, _ in world.gone if world.now - when < REUSE_S}
            in_use |= {texts[0] for texts in world.cidrs().values()}
            free = [each for each in ranges if each not in in_use]
            ipam.tick(0)
            assert world.cidrs().get(f"n{number}") == ([free[0]] if free else None)
            if not free:
                world.delete(f"n{number}")
        else:
            world.delete(rng.choice(sorted(world.nodes)))
        world.run(rng.randrange(0, 120), ipam, step=1)


# ---- figures ----


class FakeIpam:
    def __init__(self):
        self.now, self.beat, self.reason = 1000.0, 1000.0, ""
        self.api = self.election = self
        self.counts, self.ours = kube.Counts(), True
        self.counts.set("mncni_nodeipam_nodes", 2, state="waiting")
        self.counts.add("mncni_nodeipam_ranges_given_total", 5)

    def clock(self):
        return self.now


def test_nodeipam_tells_who_leads_and_who_waits():
    fake = FakeIpam()
    pages = kube.pages(fake, nodeipam.look_figures, nodeipam.METRICS)
    code, text = pages["/metrics"]()
    assert code == 200
    for line in ("mncni_nodeipam_leader 1", 'mncni_nodeipam_nodes{state="waiting"} 2', "mncni_nodeipam_ranges_given_total 5"):
        assert line in text.splitlines()
    assert pages["/healthz"]()[0] == 200
    fake.now += kube.STUCK_S
    assert pages["/healthz"]()[0] == 503
