#!/usr/bin/python3 -I
"""MNCNI's node IPAM: gives each node of a cluster its pod CIDRs, where the control plane gives none. One per cluster.

A pod CIDR is the range of addresses for the pods of one node (Node.spec.podCIDRs), a part of the cluster CIDR. Each node gets the lowest
free range of every address family, in one write, and keeps it for its life: the API allows no change of it.

Several replicas may run. One of them is the leader, by a Lease: an object with a holder and a time, which the holder renews. Another
replica takes the Lease when it has not been renewed for LEASE_S. Only the leader follows the Nodes and writes.

No two nodes may get the same range, even if a replica is paused or cut off at the worst moment. Three rules see to that:
- A write names the resourceVersion of the Node that the plan was made from, so it fails if the Node has changed since. The leader looks
  at the clock right before each write.
- A write of an earlier leader may still be on its way. So before it gives out ranges, the leader notes in the Lease the highest address
  that may be in use (annotation USED). A new leader gives nothing at or below it for REUSE_S.
- A freed range is not reused for REUSE_S, because packets to its old node may be on their way. The note in the Lease covers the ranges
  that were freed under the previous leader, too. A Node of the same name gets it back at once: it is the same machine, registered anew,
  and the pods that run there keep their addresses. Only the leader that saw the Node go knows its range.

Pod CIDRs that somebody else set are judged by their value. Inside the pools and without overlap they are taken as if nodeipam had given
them. All others are the trouble of that Node alone, which an Event names.

Reading order: settings, claims and allocation (pure), the Lease, the allocator, main.
"""

import argparse
import bisect
import collections
import contextlib
import logging
import os
import queue
import socket
import sys
import threading
import uuid
from datetime import datetime, timezone

if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.realpath(__file__)))  # -I leaves it out; kube.py and mncni.py are beside this file

import kube
import mncni
from kube import NODES, ApiError, api_errors, find_overlap, listen_address, network, parse_addresses, shown, span_of, text_in

log = logging.getLogger("mncni-nodeipam")

OK, FAILED, USAGE = 0, 1, 2
MANAGER = "mncni-nodeipam"  # our name in Events and in Nodes' managedFields
USED = "mncni.dev/used"  # annotation of the Lease: the highest address that may be in use, of each cluster CIDR
REUSE_S = 600  # how long a freed range is not reused
LEASE_S, RENEW_S, RETRY_S = 15, 10, 2  # others wait this long for a leader; it writes this long after a renewal; pause between tries
LONGEST_LEASE_S = 60  # what a Lease may say: a holder that is gone must not keep the others waiting
POLL_S = 0.5  # how long the loop waits for news
EVENTS = 20  # the most Kubernetes Events in one pass
ADDRESSES = 4  # how many of a Node's addresses count: a kubelet may write any number into its Node
WAY_OUT = "delete this Node, its kubelet registers it anew at its start; stop any other allocator of pod CIDRs before"


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

FLAGS = (
    # flag, type, default, repeatable, help
    ("--kubeconfig", str, "", False, "the cluster; without it, the pod's own"),
    ("--cluster-cidr", network, None, True, "addresses of all pods; repeat it for a second family, or for more room"),
    ("--node-mask-v4", int, "24", False, "prefix length of a node's IPv4 range"),
    ("--node-mask-v6", int, "64", False, "prefix length of a node's IPv6 range"),
    ("--lease", str, "kube-system/mncni-nodeipam", False, "namespace/name of the Lease that the leader of several replicas holds"),
    ("--listen-nodeipam", listen_address, "127.0.0.1:28387", False, "address of /healthz, /readyz, /metrics; other hosts get metrics only"),
)


def build_parser(environ):
    about = "Gives each node of a cluster its pod CIDRs, where the control plane gives none. Each flag is also an MNCNI_* variable."
    parser = argparse.ArgumentParser(prog="nodeipam.py", description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    kube.add_flags(parser, FLAGS, environ)
    return parser


def parse_pools(parser, options, environ):
    """{family: (prefix length of a node's range, cluster CIDRs)}; the family of the first CIDR comes first. Exits with USAGE."""
    cidrs, pools = kube.parse_list(parser, options, environ, "cluster_cidr", network), {}
    if not cidrs:
        parser.error("--cluster-cidr is needed: see nodeipam.py --help")
    pair = kube.overlapping_pair(cidrs)
    if pair:
        parser.error(f"--cluster-cidr {pair[0]} overlaps --cluster-cidr {pair[1]}")
    trouble = kube.service_trouble(environ, cidrs)
    if trouble:
        parser.error(trouble)
    for cidr in cidrs:
        flag, mask = f"--node-mask-v{cidr.version}", getattr(options, f"node_mask_v{cidr.version}")
        if not cidr.prefixlen <= mask <= cidr.max_prefixlen - 2:
            parser.error(f"{flag} {mask} is out of range for --cluster-cidr {cidr}: {cidr.prefixlen} to {cidr.max_prefixlen - 2}")
        pools[cidr.version] = (mask, (*pools.get(cidr.version, (mask, ()))[1], cidr))
    if options.lease.count("/") != 1 or not all(map(mncni.is_identifier, options.lease.split("/"))):
        parser.error(f"--lease {options.lease!r} must be namespace/name")
    return pools


def cidrs_of(pools):
    return [cidr for _, cidrs in pools.values() for cidr in cidrs]


# ---------------------------------------------------------------------------------------------------------------------
# Claims and allocation: pure
# ---------------------------------------------------------------------------------------------------------------------

# What the allocator knows of a Node. Claims sort by age, oldest first. version: the resourceVersion, "" once the Node has pod CIDRs.
# cidrs: networks. fault: why its pod CIDRs are of no use, or "". addresses: its own, on the underlay.
Claim = collections.namedtuple("Claim", "created name uid version cidrs fault addresses", defaults=[()])


def parse_claim(item):
    """The Claim of a Node object. ApiError."""
    with api_errors("read", NODES):
        meta, spec = item["metadata"], item.get("spec") or {}
        texts = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
        cidrs, fault = (), ""
        try:
            cidrs = kube.parse_cidrs(texts[:3])
            if len({cidr.version for cidr in cidrs}) < len(cidrs):
                raise ValueError("more than one of a family")
        except ValueError as error:
            cidrs, fault = (), f"its pod CIDRs are of no use: {error}"
        if not mncni.is_identifier(meta["name"]):
            raise ValueError(f"a node named {shown(meta['name'])}")
        created, uid, version = text_in(meta, "creationTimestamp", False), text_in(meta, "uid"), text_in(meta, "resourceVersion")
        addresses = tuple(parse_addresses(kube.internal_ips(item)[:ADDRESSES]))
        return Claim(created or "", meta["name"], uid, "" if texts else version, cidrs, fault, addresses)


def plan_allocations(claims, pools, given, freed, now):
    """({claim: CIDRs to give}, {claim: why it gets none, or what is wrong with those it has}, [span in use after that]).

    pools: {family: (prefix length, cluster CIDRs)}. given: {uid: CIDRs} that nodes have, get back, or were sent by a write of unknown
    outcome, in the order in which they became known. freed: {span: when it may be reused}.
    """
    refused, held = find_foreign(claims, pools, given)
    foreign, writes, cluster = {claim.uid for claim in refused}, {}, cidrs_of(pools)
    # Of a node in trouble, what is larger than a node's share is not kept for it, so that it cannot lock the others out.
    spans = [(uid, cidr.prefixlen, span_of(cidr)) for uid, cidrs in given.items() for cidr in cidrs]
    taken = [span for uid, length, span in spans if uid not in foreign or length >= pools.get(span[0], (0,))[0]]
    taken += [span for span, until in freed.items() if until > now]
    addresses = [(each.version, int(each), int(each)) for claim in claims for each in claim.addresses]
    sources = [free_ranges(cidrs, mask, sorted(taken + addresses)) for mask, cidrs in pools.values()]
    for claim in sorted(claim for claim in claims if not claim.cidrs and claim not in refused):
        cidrs, inside = given.get(claim.uid, ()), kube.address_trouble("its address", claim.addresses, cluster)
        if inside:
            refused[claim] = inside
            continue
        if not cidrs or any(find_overlap(held, span_of(cidr)) for cidr in cidrs):
            cidrs = tuple(next(source, None) for source in sources)
        if None in cidrs:
            mask, outer = list(pools.values())[cidrs.index(None)]
            what = f"no range /{mask} is free in --cluster-cidr {', '.join(map(str, outer))}"
            refused[claim] = f"{what}; one that a node gives back is free after {REUSE_S // 60} minutes; for more, add a --cluster-cidr"
            continue
        writes[claim] = cidrs
        taken += map(span_of, cidrs)
    return writes, refused, taken


def find_foreign(claims, pools, given):
    """({claim: what is wrong with its CIDRs}, sorted [(*span, name)] of all other CIDRs). Of two nodes whose CIDRs overlap, the one that
    became known first keeps them, and the older one if both are new; given: see plan_allocations."""
    foreign, held, places = {}, [], {uid: place for place, uid in enumerate(given)}
    for claim in sorted(claims, key=lambda claim: (places.get(claim.uid, len(places)), claim)):
        fault = claim.fault
        for cidr in claim.cidrs:
            owner = find_overlap(held, span_of(cidr))
            if not any(cidr.subnet_of(outer) for outer in pools.get(cidr.version, (0, ()))[1]):
                fault = f"its pod CIDR {cidr} is outside --cluster-cidr"
            elif owner:
                fault = f"its pod CIDR {cidr} overlaps that of node {owner}"
        if fault:
            foreign[claim] = fault
        else:
            for cidr in claim.cidrs:
                bisect.insort(held, (*span_of(cidr), claim.name))
    return foreign, held


def free_ranges(cidrs, mask, taken):
    """Yield the networks of a prefix length inside cidrs that overlap no span of taken, a sorted list. Lowest first."""
    for cidr in cidrs:
        size, (version, first, end) = 1 << (cidr.max_prefixlen - mask), span_of(cidr)
        for _, low, high in [*(span for span in taken if span[0] == version), (version, end + 1, end + 1)]:
            while first + size <= min(low, end + 1):
                yield type(cidr)((first, mask))
                first += size
            first = max(first, -(-(high + 1) // size) * size)  # the next multiple of size behind the span


def format_used(pools, taken):
    """The text of USED: the highest address in use of each cluster CIDR that has one, comma-separated."""
    highest = []
    for cidr in cidrs_of(pools):
        version, first, end = span_of(cidr)
        lasts = [min(last, end) for family, low, last in taken if family == version and low <= end and last >= first]
        highest += [str(cidr[max(lasts) - first])] if lasts else []
    return ",".join(highest)


def parse_used(text, pools, until):
    """{span: until} of the addresses that may be in use, from the text of USED."""
    cidrs = cidrs_of(pools)
    return {(cidr.version, int(cidr[0]), int(last)): until for last in parse_addresses(text.split(",")) for cidr in cidrs if last in cidr}


# ---------------------------------------------------------------------------------------------------------------------
# The Lease: which replica leads
# ---------------------------------------------------------------------------------------------------------------------


class Election:
    """This replica's view of the Lease. The time since the last renewal is measured on our own clock, never read from the Lease.

    clock: seconds that only go forward. note: the text of USED, written with each renewal. term: a number that grows whenever another
    replica leads or has led since we did; what was learned in an earlier term is void.
    """

    def __init__(self, api, lease, identity, clock):
        namespace, self.name = lease.split("/")
        self.path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self.api, self.identity, self.clock = api, identity, clock
        self.lease, self.known = {}, False  # the Lease as last read, {} if there is none; whether we know that it is still so
        self.ours = False  # whether we lead this term
        self.seen = self.renewed = float("-inf")  # when we saw the Lease change; when we sent our last renewal
        self.next_try, self.term, self.note, self.trouble = 0, 0, "", ""

    def leads(self, term):
        """Whether we may write now, with what we learned in that term. This ends LEASE_S - RENEW_S before another replica takes over."""
        return self.term == term and self.clock() < self.renewed + RENEW_S

    def tick(self):
        """Renew the Lease or try to take it, if it is time to."""
        if self.clock() < self.next_try:
            return
        self.next_try, trouble = self.clock() + RETRY_S, ""
        try:
            if not (self.known and self.leads(self.term)):
                self.look()
            spec = self.lease.get("spec") or {}
            vacant = self.lease and spec.get("holderIdentity") in (None, "", self.identity)
            lasts_s = min(spec.get("leaseDurationSeconds") or LEASE_S, LONGEST_LEASE_S)
            if vacant or self.leads(self.term) or self.clock() >= self.seen + lasts_s:
                self.write(self.identity, LEASE_S)
        except ApiError as error:
            self.known = False
            if error.status != 409:  # 409: another replica was faster
                missing = "; if it is not there, apply deploy/nodeipam/account.yaml again" if error.status == 403 else ""
                trouble = f"cannot get or keep the lease {self.name}, without which nothing is written: {error}{missing}"
        if trouble != self.trouble:
            log.log(logging.WARNING if trouble else logging.INFO, "%s", trouble or f"the lease {self.name} can be read and written again")
        self.trouble = trouble

    def request(self, *arguments):
        """The Lease in the answer to a request. ApiError, also for an answer that is no Lease."""
        lease = self.api.request(*arguments)
        with api_errors("read", self.path):
            meta, spec = lease["metadata"], lease.get("spec") or {}
            text_in(meta, "resourceVersion"), text_in(meta.get("annotations") or {}, USED, False), text_in(spec, "holderIdentity", False)
            numbers = [spec.get(key) or 0 for key in ("leaseDurationSeconds", "leaseTransitions")]
            if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
                raise ValueError(f"{shown(numbers)} are no numbers of a Lease")
        return lease

    def look(self):
        """Read the Lease. ApiError. If another replica holds it, our term is over."""
        before = self.lease
        try:
            self.lease = self.request("GET", f"{self.path}/{self.name}")
        except ApiError as error:
            if error.status != 404:
                raise
            self.lease = {}
        self.known = True
        version, former = (lease.get("metadata", {}).get("resourceVersion") for lease in (self.lease, before))
        self.seen = self.seen if version == former else self.clock()
        holder, former = ((lease.get("spec") or {}).get("holderIdentity") for lease in (self.lease, before))
        if self.lease and holder != self.identity:
            if self.ours or holder != former:
                log.info("%s leads", shown(holder) if holder else "nobody")
            self.term += self.ours
            self.ours, self.renewed = False, float("-inf")

    def write(self, holder, duration_s):
        """Take, renew or (holder "") give up the Lease. ApiError."""
        meta, old = {"name": self.name, **self.lease.get("metadata", {})}, self.lease.get("spec") or {}
        notes, now = meta.get("annotations") or {}, datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {**old, "holderIdentity": holder, "leaseDurationSeconds": duration_s, "renewTime": now}
        if not self.ours:
            self.note = notes.get(USED) or self.note  # a Lease that was deleted and applied again has none
            spec.update(acquireTime=now, leaseTransitions=min((old.get("leaseTransitions") or 0) + 1, 2**31 - 1))
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "spec": spec}
        lease["metadata"] = {**meta, "annotations": {**notes, USED: self.note}}
        method, path = ("PUT", f"{self.path}/{self.name}") if self.lease else ("POST", self.path)
        sent, self.known = self.clock(), False
        self.lease = self.request(method, path, lease)
        self.known, self.renewed = True, sent if holder else float("-inf")
        if not self.ours:
            self.ours, self.term = True, self.term + 1
            log.info("leading, by the lease %s", self.name)

    def publish(self, note):
        """Renew the Lease now, with this note. Returns whether that succeeded."""
        self.note, self.next_try = note, 0
        self.tick()
        return self.known

    def release(self):
        """Give up the Lease, so that another replica leads at once."""
        try:
            if self.leads(self.term):
                self.write("", 1)
        except ApiError as error:
            log.warning("the lease %s runs out by itself: %s", self.name, error)


# ---------------------------------------------------------------------------------------------------------------------
# The allocator
# ---------------------------------------------------------------------------------------------------------------------

METRICS = {  # name: (type, help)
    "mncni_nodeipam_leader": ("gauge", "Whether this replica leads."),
    "mncni_nodeipam_nodes": ("gauge", "Nodes by state: all; waiting for a range; foreign: with one outside the pools or of another node."),
    "mncni_nodeipam_ranges_given_total": ("counter", "Nodes that were given their ranges."),
    "mncni_nodeipam_write_failures_total": ("counter", "Writes that failed, by cause: conflict or other."),
    "mncni_nodeipam_terms_total": ("counter", "How often this replica began to lead."),
}


class NodeIpam:
    """The loop of a replica. follow(put, stopping) starts a thread that calls put(type, [Claim]), first with type LIST, until the event
    `stopping` is set; see kube.follow_nodes."""

    def __init__(self, api, pools, election, clock, follow):
        self.api, self.pools, self.election, self.clock, self.follow = api, pools, election, clock, follow
        self.trouble = ""  # why we cannot follow the Nodes
        self.counts, self.reason, self.beat = kube.Counts(), "", clock()  # see kube.pages; a replica that waits for its turn is ready
        self.stopping = threading.Event()
        self.begin()

    def begin(self):
        """Forget everything, because a new term has begun. As leader, read all Nodes anew."""
        self.stopping.set()
        self.events, self.stopping, self.term = queue.SimpleQueue(), threading.Event(), self.election.term
        # claims: {uid: Claim}, None before the first list. given, freed: see plan_allocations. former: {name: CIDRs} of Nodes that have
        # gone. told: {uid: the reason that was sent}.
        self.claims, self.given, self.freed, self.former, self.told = None, {}, {}, {}, {}
        self.next_pass = self.not_before = 0
        if self.election.ours:
            self.counts.add("mncni_nodeipam_terms_total")
            events = self.events
            self.follow(lambda *event: events.put(event), self.stopping)

    def tick(self, timeout_s):
        """Renew the Lease, wait for news, and as leader give out ranges."""
        self.election.tick()
        if self.election.term != self.term:
            self.begin()
        with contextlib.suppress(queue.Empty):
            self.observe(*self.events.get(timeout=timeout_s))
            while True:
                self.observe(*self.events.get_nowait())
        if self.claims is not None and self.clock() >= max(self.next_pass, self.not_before) and self.election.leads(self.term):
            self.allocate()

    def tell(self, trouble):
        """Log why the Nodes cannot be followed; "" if they can."""
        if trouble != self.trouble:
            said = f"cannot follow the nodes: {trouble}" if trouble else "following the nodes again"
            log.log(logging.WARNING if trouble else logging.INFO, "%s", said)
        self.trouble = trouble

    def observe(self, kind, claims):
        """Take in a change of one Node, or (LIST) all Nodes."""
        if self.claims is None:
            self.claims, self.freed = {}, parse_used(self.election.note, self.pools, self.clock() + REUSE_S)
        there = {} if kind == "DELETED" else {claim.uid: claim for claim in sorted(claims)}
        for uid in set(self.claims) | set(self.given) if kind == "LIST" else {claim.uid for claim in claims}:
            if uid not in there:
                gone = self.claims.pop(uid, None)
                self.former.update({gone.name: self.given[uid]} if gone and uid in self.given else {})
                self.release(uid)
                self.next_pass = 0
        for uid, claim in there.items():
            known = self.claims.get(uid)
            if claim == known or (known and known.cidrs and not claim.cidrs):  # the latter is old: the API lets no CIDR be taken away
                continue
            self.claims[uid], self.next_pass = claim, 0
            if not known and not claim.cidrs:
                self.give_back(claim)
            if claim.cidrs and claim.cidrs != self.given.get(uid):
                self.release(uid)
                self.given[uid] = claim.cidrs

    def release(self, uid):
        """Free the ranges of a node, to be reused after REUSE_S."""
        self.freed.update({span_of(cidr): self.clock() + REUSE_S for cidr in self.given.pop(uid, ())})

    def give_back(self, claim):
        """Reserve, for a Node that is registered anew, the ranges that its name had: if they still rest, nobody else has a part of them,
        and they are such as would be given."""
        cidrs, used = self.former.pop(claim.name, ()), [each for others in self.given.values() for each in others]
        sizes = [(family, mask) for family, (mask, _) in self.pools.items()]
        rest = all(self.freed.get(span_of(cidr), 0) > self.clock() and not any(map(cidr.overlaps, used)) for cidr in cidrs)
        inside = all(any(cidr.subnet_of(outer) for outer in self.pools.get(cidr.version, (0, ()))[1]) for cidr in cidrs)
        if rest and inside and [(cidr.version, cidr.prefixlen) for cidr in cidrs] == sizes:
            self.given[claim.uid] = cidrs

    def allocate(self):
        """One pass: plan from all Nodes, note in the Lease what will be in use, write."""
        now = self.clock()
        self.freed = {span: until for span, until in self.freed.items() if until > now}
        self.former = {name: cidrs for name, cidrs in self.former.items() if all(span_of(cidr) in self.freed for cidr in cidrs)}
        writes, refused, taken = plan_allocations(self.claims.values(), self.pools, self.given, self.freed, now)
        foreign = sum(bool(claim.cidrs or claim.fault) for claim in refused)
        for state, nodes in (("all", len(self.claims)), ("foreign", foreign), ("waiting", len(refused) - foreign)):
            self.counts.set("mncni_nodeipam_nodes", nodes, state=state)
        self.given.update({claim.uid: self.given.pop(claim.uid) for claim in refused if claim.uid in self.given})  # to the end, see there
        self.next_pass = now + RETRY_S if writes or refused else float("inf")
        self.say(refused)
        self.election.note = format_used(self.pools, taken)
        if writes and not self.election.publish(self.election.note):
            return
        for claim, cidrs in writes.items():
            self.election.tick()
            if self.clock() < self.not_before or not self.election.leads(self.term):
                return
            self.write(claim, cidrs)

    def write(self, claim, cidrs):
        """Give a node its CIDRs, unless it has changed since the plan. They stay reserved for it in any case: a write that failed for us
        may have been done."""
        texts, self.given[claim.uid] = [str(cidr) for cidr in cidrs], cidrs
        body = {"metadata": {"resourceVersion": claim.version}, "spec": {"podCIDR": texts[0], "podCIDRs": texts}}
        try:
            node = parse_claim(self.api.request("PATCH", f"{NODES}/{claim.name}", body, {"fieldManager": MANAGER}, kube.MERGE_PATCH))
        except ApiError as error:
            changed = error.status in (404, 409)  # the watch brings the change
            self.counts.add("mncni_nodeipam_write_failures_total", cause="conflict" if changed else "other")
            log.log(logging.INFO if changed else logging.WARNING, "node %s has no pod CIDR yet: %s", claim.name, error)
            if error.status in (0, 401, 403, 429) or error.status >= 500:  # not a trouble of this node alone, so all nodes wait
                self.not_before = self.clock() + max(RETRY_S, error.retry_after_s or 0)
            return
        self.counts.add("mncni_nodeipam_ranges_given_total")
        self.observe("MODIFIED", [node])  # as the API server stored it: the next pass compares it with all others
        log.info("node %s has pod CIDRs %s", claim.name, ", ".join(texts))

    def say(self, refused):
        """Log, and send as Events, why nodes get no range or have a foreign one: each reason once, at most EVENTS in one pass."""
        self.told = {claim.uid: reason for claim, reason in refused.items() if self.told.get(claim.uid) == reason}
        for claim in [claim for claim in refused if claim.uid not in self.told][:EVENTS]:
            what, more = ("ForeignPodCIDR", f"; {WAY_OUT}") if claim.cidrs or claim.fault else ("CIDRNotAvailable", "")
            self.told[claim.uid], message = refused[claim], refused[claim] + more
            log.error("node %s: %s", claim.name, message)
            self.election.tick()
            if self.election.leads(self.term):
                kube.send_event(self.api, claim.name, claim.uid, message, reason=what, type="Warning", source={"component": MANAGER})


def look_figures(ipam):
    """The figures for /metrics, see kube.format_metrics."""
    return {("mncni_nodeipam_leader", ()): ipam.election.ours, **ipam.counts.figures, **ipam.api.counts.figures}


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def run_nodeipam(options, pools, environ):
    """Give out ranges until SIGTERM or SIGINT. CNIError 7 without a cluster."""
    patient = kube.open_api(options.kubeconfig, environ, mncni.make_run(environ), MANAGER, cidrs_of(pools))
    quick = kube.Api(patient.access, MANAGER)
    quick.READ_S = RENEW_S / 2  # a request that takes longer must not cost us the Lease

    def follow(put, stopping):
        kube.start_thread(kube.follow_nodes, patient, parse_claim, put, ipam.tell, stopping)

    election = Election(quick, options.lease, f"{socket.gethostname()}_{uuid.uuid4()}", kube.uptime)
    ipam = NodeIpam(quick, pools, election, kube.uptime, follow)
    kube.run_loop(ipam, lambda: ipam.tick(POLL_S), options.listen_nodeipam, look_figures, METRICS)
    election.release()
    log.info("stopping; nodes keep the pod CIDRs that they have")


def main(arguments, environ):
    """The exit code. argparse exits with USAGE for a wrong flag."""
    parser = build_parser(environ)
    options = parser.parse_args(arguments)
    kube.start_log(environ)
    try:
        run_nodeipam(options, parse_pools(parser, options, environ), environ)
        return OK
    except (mncni.CNIError, OSError) as error:
        log.error("%s", error)
        return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
