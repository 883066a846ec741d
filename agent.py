#!/usr/bin/python3 -I
"""The MNCNI agent: one per node. It connects the pods of this node with the pods of all other nodes, through WireGuard.

Terms. The underlay is the network that the nodes themselves are on. A pod CIDR is the range of addresses for the pods of one node, a part
of the cluster CIDR. A record is a small JSON text in which a node tells the others its pod CIDRs, its endpoints (addresses on the
underlay) and its public key. The node store keeps the records of all nodes: annotations of the Node objects of a Kubernetes cluster, or
files in a directory. A node whose record is believed becomes a peer of the WireGuard device; a node whose record is not is quarantined.
The floor is what stays in place when all else fails: routes and firewall rules that drop traffic for the cluster rather than let it leave
the node in clear.

    host                                                        namespace mncni-wg
    pods -- mncni0 -- routes -- mncni-host ------------------ mncni-ns -- routes -- mncni-wg0
            10.244.1.1/24       10.244.1.1/32                 169.254.28.84         the WireGuard device; its UDP socket stays in the
    10.244.0.0/16 via 169.254.28.84                                                 host, where the device was created
    10.244.0.0/16 unreachable (the floor)
    rules: to 10.244.0.0/16 only routes of the main table that are no broader, else unreachable (the floor)

What it owns: the network namespace mncni-wg with the WireGuard device, the veth pair mncni-host / mncni-ns, the bridge mncni0, the routes
and routing rules of protocol 201, the nft table "inet mncni" (one in the host, one in the namespace), files below /run/mncni and
/var/lib/mncni, and 10-mncni.conflist. It changes nothing else, but switches IP forwarding on, and in Kubernetes netfilter for bridged
packets, and refuses objects of these names that others have made.

What it needs: root (CAP_NET_ADMIN in both namespaces, CAP_SYS_ADMIN to create one), python3, iproute2, nftables, wireguard-tools, and
WireGuard in the kernel or as the program wireguard-go.

How it works: the agent makes one pass after another. A pass looks at the kernel stage by stage, compares it with what should be (pure
functions), and applies the difference. It keeps no other picture of the kernel, so whatever somebody changed, the next pass puts it
right; if nothing differs, nothing is written. Events only say that it is time for a pass.

Reading order: settings, node stores, records, state on disk, routes and firewall, peers, the stages of a pass, the agent, status, metrics,
rotate, uninstall, main. The API client is in kube.py, which also has the flags and the HTTP server.
"""

import argparse
import base64
import bisect
import collections
import contextlib
import fcntl
import functools
import gc
import glob
import ipaddress
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone

if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.realpath(__file__)))  # -I leaves it out; kube.py and mncni.py are beside this file

import kube
import mncni
from kube import NODES, ApiError, api_errors, find_overlap, is_in, overlapping_pair, shown, span_of, start_thread, text_in, uptime
from mncni import CNIError, Command, addresses_of, apply, ask, config_error, find_link, in_netns, ip_batch, look_ip, write_file

log = logging.getLogger("mncni-agent")

NETWORK = "mncni"  # the name of the network in the CNI configuration
CONFLIST = "10-mncni.conflist"
OK, FAILED, USAGE, RUNNING_ALREADY = 0, 1, 2, 3  # exit codes
ROUTE_PROTOCOL = 201  # marks the agent's routes, see ip-route(8)
FLOOR_METRIC = 4278198272  # worse than that of any other route
RULE_PRIORITY = 284  # of the floor's rules: after the table "local" (0), before what others add
DEVICE, HOST_VETH, NS_VETH = "mncni-wg0", "mncni-host", "mncni-ns"
WIREGUARD_GO_SOCKET = f"/var/run/wireguard/{DEVICE}.sock"
# IPv6 neighbour discovery needs a link-local address on each link; the kernel makes one only when a link comes up.
HOST_LINK_LOCAL, BRIDGE_LINK_LOCAL = "fe80::28:83/64", "fe80::28:82/64"
NEXT_HOPS = {4: "169.254.28.84", 6: "fe80::28:84"}  # addresses of NS_VETH, the next hop of the host's routes into the tunnel
POLL_S = 0.5  # how often the agent looks at the node store
EVENT_S = 0.25  # the shortest time between two passes for events: a pass causes events itself, and pods come in bursts
GLANCE_S = 1.5  # how often the agent looks at peers and at the namespace's firewall, of which no monitor tells
AUDIT_S = 10  # how often it makes a full pass, whether or not there was an event
HOLD_S = 60  # how long nodes that vanish in great number are kept
COUNTERS = {  # of the host's firewall: {name: what it counts}
    "leaked": "Packets for pods or Services of the cluster that were about to leave in clear, and were dropped.",
    "refused": "Packets from or to the cluster that came in by neither the bridge nor the tunnel, and were dropped.",
}
DROPS = {**COUNTERS, "spoofed": "Packets of pods with another MAC or address than the pod's own, which spoofCheck dropped."}
EVERYWHERE = tuple(map(ipaddress.ip_network, ("0.0.0.0/0", "::/0")))
LINES_SHOWN = 16  # of the table of peers that `status` prints
DOUBT_S = 120  # how long packets wait for a peer before its endpoint is doubted
SET_BACK_S = 120  # a clock set back by less does no harm: peers that talk shake hands every two minutes (WireGuard, section 6.1)
REMAKE_S = 60  # the shortest time between two that a peer is made anew in, see plan_peers
NEWS_S, NEWS_SHARE = 0.5, 0.1  # news of the store gets so many seconds of passes at once, and this share of the time in the long run
TRY_S, RETRY_S = 60, 5  # how often the agent tries the installed plugin, and how often while it does not work
# A node that changes its key uses the new one a little before the others follow. Until they do, it still hears what they send to the
# former key, and WireGuard keeps what it has to send. The other way round, what it sends would be lost.
LEAD_S = 0.05
GREET_S = 0.1  # how long a peer with a new key has to answer, before it is greeted again
CALM_S = 10  # how long the node store has to be well before a new key is told
ROTATE_S = 60  # how long `agent.py rotate` waits for the new key
UNBRIDGED = (
    "a pod cannot use a Service whose backend is on the same node, unless nothing here translates Services: the kernel module br_netfilter"
    " is missing; load it (modprobe br_netfilter), and at each boot (a file in /etc/modules-load.d)"
)
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
KEY = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")  # 32 bytes in canonical base64
BROADCAST = ipaddress.ip_address("255.255.255.255")
UNDERLAY_OVERHEAD = {4: 60, 6: 80}  # bytes of the IP header, the UDP header and WireGuard (32)


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The flags. CIDRs and endpoints are ipaddress objects, key_max_age is in seconds."""

    node_name: str
    nodes_dir: str
    kubeconfig: str
    cluster_cidrs: tuple
    pod_cidrs: tuple
    service_cidrs: tuple
    endpoints: tuple
    port: int
    key_max_age: int
    bridge: str
    namespace: str
    mtu: int
    masquerade: bool
    conf_dir: str
    bin_dir: str
    state_dir: str
    run_dir: str
    listen: tuple

    @property
    def netns(self):
        return f"/run/netns/{self.namespace}"

    @property
    def key_path(self):
        return os.path.join(self.state_dir, "key")

    @property
    def gateways(self):
        """{pod CIDR: the pods' gateway, which is its first address}."""
        return {cidr: cidr.network_address + 1 for cidr in self.pod_cidrs}

    @property
    def families(self):
        return sorted({cidr.version for cidr in self.pod_cidrs})


def address(text):
    """For argparse, like the functions below: the value of a flag, or a message for the user."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no IP address; for several give the flag several times") from None


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: true or false")
    return text.lower() == "true"


def port_number(text):
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no UDP port: 1 to 65535")
    return int(text)


def duration(text):
    """Seconds."""
    number, unit = (text[:-1], text[-1:]) if text != "0" else ("0", "s")
    if not (number.isascii() and number.isdigit() and len(number) < 10 and unit in UNITS):
        raise argparse.ArgumentTypeError(f"{text!r}: give a time like 30d, 12h, 90m or 3600s, or 0")
    return int(number) * UNITS[unit]


def link_name(text):
    if not mncni.is_ifname(text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot name a network link")
    return text


FLAGS = (
    # flag, type, default, repeatable, help
    ("--node-name", str, socket.gethostname().strip().lower(), False, "this node's name, as the cluster has it"),
    ("--nodes-dir", str, "", False, "directory of node records, <node>.json each: the node store that needs no cluster"),
    ("--kubeconfig", str, "", False, "the Kubernetes cluster that is the node store; in a pod, leave it out to use the pod's own"),
    ("--cluster-cidr", kube.network, None, True, "addresses of all pods; repeatable"),
    ("--pod-cidr", kube.network, None, True, "addresses of this node's pods, inside --cluster-cidr; repeatable"),
    ("--service-cidr", kube.network, None, True, "addresses of Services; repeatable (default: those of the cluster's ServiceCIDR objects)"),
    ("--endpoint", address, None, True, "where other nodes reach this one; repeatable (default: InternalIPs, else the route's source)"),
    ("--port", port_number, "28384", False, "UDP port of the tunnel"),
    ("--key-max-age", duration, "0", False, "make a new key when this one is so old, for example 30d; 0: never"),
    ("--bridge", link_name, "mncni0", False, "the pods' bridge"),
    ("--namespace", link_name, "mncni-wg", False, "the namespace of the tunnel"),
    ("--mtu", int, "0", False, "MTU of the pods; 0: that of the underlay, less WireGuard's overhead"),
    ("--masquerade", boolean, "true", False, "give traffic from pods to outside the cluster the node's address"),
    ("--conf-dir", str, "/etc/cni/net.d", False, "directory for the CNI configuration"),
    ("--bin-dir", str, mncni.DEFAULT_BIN_DIR, False, "directory for the CNI plugin"),
    ("--state-dir", str, "/var/lib/mncni", False, "state that outlives a boot: the key, the last good list of nodes"),
    ("--run-dir", str, mncni.DEFAULT_RUN_DIR, False, "state that does not outlive a boot"),
    ("--listen", kube.listen_address, "127.0.0.1:28386", False, "address of /healthz, /readyz, /metrics; other hosts get metrics only"),
)

VERBS = (
    ("run", "build the node's network and keep it right"),
    ("status", "show what is up and, if something is not, why"),
    ("rotate", "have the running agent change this node's key, and wait until it is done"),
    ("uninstall", "remove the network from this node"),
)


def build_parser(environ):
    """The command line. Each flag is also an MNCNI_* variable; a repeatable flag takes a comma-separated list there."""
    about = "MNCNI's node agent: an encrypted pod network between nodes. Each flag is also an MNCNI_* variable."
    parser = argparse.ArgumentParser(prog="agent.py", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in VERBS:
        kube.add_flags(commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter), FLAGS, environ)
    commands.choices["status"].add_argument("--json", action="store_true", help="print JSON")
    words = "what the API server knows of every Node; needs no root, but --kubeconfig, and --cluster-cidr to judge all of a record"
    commands.choices["status"].add_argument("--all-nodes", action="store_true", help=words)
    commands.choices["uninstall"].add_argument("--force", action="store_true", help="even if pods are attached: they lose their network")
    return parser


def parse_settings(parser, options, environ):
    """Settings from parsed options. Exits with USAGE and a message that names the flag."""
    given = dict(vars(options))
    networks = dict.fromkeys(("cluster_cidr", "pod_cidr", "service_cidr"), kube.network)
    for key, kind in {**networks, "endpoint": address}.items():
        given[f"{key}s"] = kube.parse_list(parser, options, environ, key, kind)
    settings = Settings(**{each.name: given[each.name] for each in fields(Settings)})
    least = smallest_mtu(settings.pod_cidrs)
    troubles = [
        pod_cidr_trouble("--pod-cidr", settings.pod_cidrs, settings.cluster_cidrs),
        kube.address_trouble("--endpoint", settings.endpoints, settings.cluster_cidrs),
        kube.service_trouble(environ, settings.cluster_cidrs),
    ]
    if settings.mtu and not least <= settings.mtu <= 65000:
        troubles.append(f"--mtu {settings.mtu} is out of range: {least} to 65000, or 0")
    if not mncni.is_identifier(settings.node_name):
        troubles.append(f"--node-name {settings.node_name!r} must be letters, digits, '_', '.', '-'")
    if settings.nodes_dir and len(settings.node_name) > 245:  # a file's name has up to 255 bytes: .NAME.json.new
        troubles.append(f"--node-name {settings.node_name!r} has more than 245 characters, too long for a file of --nodes-dir")
    for trouble in filter(None, troubles):
        parser.error(trouble)
    return settings


def pod_cidr_trouble(what, pod_cidrs, cluster_cidrs):
    """Why the pod CIDRs of a node cannot be used, "" if they can."""
    for cidr in pod_cidrs:
        if not is_part(cidr, cluster_cidrs):
            return f"{what} {cidr} is no part of --cluster-cidr {', '.join(map(str, cluster_cidrs)) or '(none given)'}"
        if cidr.num_addresses < 4:
            return f"{what} {cidr} is too small: it needs room for a gateway and a pod"
    pair = overlapping_pair(pod_cidrs)
    return f"{what} {pair[0]} overlaps {what} {pair[1]}" if pair else ""


def is_part(cidr, cidrs):
    """Whether a network is a part, but not the whole, of one of the others."""
    return any(cidr.version == outer.version and cidr != outer and cidr.subnet_of(outer) for outer in cidrs)


def smallest_mtu(pod_cidrs):
    return 1280 if any(cidr.version == 6 for cidr in pod_cidrs) else 576  # RFC 8200, section 5; RFC 791


# ---------------------------------------------------------------------------------------------------------------------
# Node stores: where nodes find each other's records. First the directory.
# ---------------------------------------------------------------------------------------------------------------------


class StoreError(Exception):
    """The store cannot be read or written. Nothing follows from that about any node."""


class Store:
    """The interface of a node store.

    Each store has records() -> {node name: text}, publish(name, text) and withdraw(name) for this node's own record, and changed() ->
    whether records() may differ from the last time. The methods below are what only a cluster can do; these are their defaults.
    """

    trouble = ""  # why records() may be out of date
    taken = None  # this node's record as the store took it last
    service_cidrs = None  # networks of Services as the cluster has them, as text; None: unknown
    guard = None  # whether the cluster refuses wrong records, and another node's; None: unknown
    unguarded = ()  # what it does not refuse, as texts
    RECORD_LIMIT = 65536  # bytes; a record has some 300

    def start(self):
        """Start the threads that follow the store."""

    def identity(self):
        """{"uid", "podCIDRs", "addresses"} that the cluster gave this node, {} if none yet. None: the flags say it."""

    def facts(self):
        """{node name: Facts}: what the cluster says about nodes. A node cannot forge it."""
        return {}


    def look_again(self):
        """Ask for a new list of all nodes. Returns whether one has been read since it was asked for."""
        return True

    def say(self, reason, stranded=""):
        """Tell the cluster that the node's network is up ("") or why not. stranded: see stranded_text."""

    def note(self, name, what, message):
        """Tell the cluster something about a node. what: one word for it, in CamelCase."""


class DirectoryStore(Store):
    """Records as files, <node>.json each, in a directory that all nodes share. A dot-file is a file that is still being written."""

    def __init__(self, path):
        self.path = path
        self.seen = None
        self.files = {}  # {file name: (signature, see _read; text)}

    def start(self):
        """Have the kernel send SIGIO, which wakes the loop, when a file comes into the directory. It does not see what others do on a
        network file system; a look every POLL_S finds that."""
        with contextlib.suppress(OSError):
            self.directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            signal.signal(signal.SIGIO, lambda *_: None)
            fcntl.fcntl(self.directory, fcntl.F_NOTIFY, fcntl.DN_RENAME | fcntl.DN_MULTISHOT)

    def changed(self):
        """Whether records() differs from the last call. Costs one stat per file."""
        try:
            seen = self.records()
        except StoreError as error:
            seen = str(error)
        changed, self.seen = seen != self.seen, seen
        return changed

    def records(self):
        """{node name: text} of all records. StoreError."""
        try:
            names = [name for name in os.listdir(self.path) if name.endswith(".json") and not name.startswith(".")]
        except OSError as error:
            raise StoreError(f"cannot read --nodes-dir {self.path}: {error.strerror}") from None
        self.files = {name: self._read(name) for name in names}
        stems = ((name[: -len(".json")], text) for name, (_, text) in self.files.items())
        return {stem if mncni.is_identifier(stem) else shown(stem): text for stem, text in stems}

    def publish(self, name, text):
        """Write this node's record. StoreError."""
        try:
            write_file(os.path.join(self.path, f"{name}.json"), text)
        except OSError as error:
            raise StoreError(f"cannot write to --nodes-dir {self.path}: {error.strerror}") from None
        self.taken = text

    def withdraw(self, name):
        """Remove this node's record, if there is one. StoreError."""
        try:
            mncni.remove_file(os.path.join(self.path, f"{name}.json"))
        except OSError as error:
            raise StoreError(f"cannot write to --nodes-dir {self.path}: {error.strerror}") from None

    def _read(self, name):
        """(signature, text) of a file. The signature is what stat says. A file with the signature that we know, or that cannot be read,
        is as we know it."""
        path, known = os.path.join(self.path, name), self.files.get(name, (None, ""))
        try:
            status = os.stat(path)
            signature = (status.st_ino, status.st_mtime_ns, status.st_size)
            if signature == known[0]:
                return known
            with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:  # a FIFO must not block us
                return signature, (file.read(self.RECORD_LIMIT + 1) or b"").decode("utf-8", "replace")
        except OSError:
            return known


# ---------------------------------------------------------------------------------------------------------------------
# Node store: Kubernetes
# ---------------------------------------------------------------------------------------------------------------------

SERVICE_CIDRS = "/apis/networking.k8s.io/v1/servicecidrs"  # there are some since Kubernetes 1.33
RECORD = "mncni.dev/node"  # the annotation of a Node that holds its record
Facts = collections.namedtuple("Facts", "uid created pod_cidrs")  # what a Node says, as text; pod_cidrs: None if only its metadata was read
Seen = collections.namedtuple("Seen", "text facts")  # what we know of a Node; text: its record, or None


class KubernetesStore(Store):
    """Records as annotations of Node objects. Two threads follow the API server and one writes, so a pass never waits for it.

    Of other nodes it reads the metadata, a third of the whole. Without an admission policy that protects the records (see guard) it reads
    whole Nodes, to compare records with spec.podCIDRs. It writes only when something has changed, never on a timer.
    wake: a function that is called when there is news.
    """

    EVENT_PAUSE_S = 5  # between two Kubernetes Events; at most 20 wait
    GUARD_S, SERVICES_S = 3600, 600  # how often the admission policies are tested, and the networks of Services read
    POLICY_LIMIT = 4096  # characters of a record, in deploy/naivewg/policy.yaml

    def __init__(self, api, node_name, wake=lambda: None):
        self.api, self.node_name, self.wake = api, node_name, wake
        self.lock = threading.Lock()
        self.nodes = None  # {name: Seen}, None before the first list
        self.own = None  # of this Node: "uid", "podCIDRs", "addresses", "record", "condition", "version"; {} if the cluster has none
        self.troubles = {}  # {"nodes", "own", "write": why that fails}
        self.news = True
        self.work = threading.Event()  # set when there may be something to write
        self.record, self.condition = None, None  # what this Node is to say; condition: (status, reason, message)
        self.notes = collections.deque(maxlen=20)  # (node name, reason, message) of Events to send
        self.said = ""  # why the network is not up, as the last Event said it
        self.test_at = 0  # when to test the admission policies again
        self.looking = None  # of look_again: True: asked for, False: done

    def start(self):
        gc.set_threshold(100_000)  # there are few cycles here, and a search among 5,000 nodes takes longer than a pass
        only_own, never = {"fieldSelector": f"metadata.name={self.node_name}"}, threading.Event()
        tell_nodes, tell_own = (functools.partial(self._tell, what) for what in ("nodes", "own"))
        start_thread(kube.follow_nodes, self.api, self._parse_node, self._take_nodes, tell_nodes, never, is_whole=self._is_whole)
        start_thread(kube.follow_nodes, self.api, self._parse_own, self._take_own, tell_own, never, only_own)
        start_thread(self._write)
        start_thread(self._follow_services)

    @property
    def trouble(self):
        return "; ".join(sorted(set(filter(None, self.troubles.values()))))

    @property
    def taken(self):
        return (self.own or {}).get("record")

    def changed(self):
        changed, self.news = self.news, False
        return changed

    def records(self):
        """{node name: text}. StoreError before the first list."""
        if self.nodes is None:
            raise StoreError(self.trouble or "the API server has not answered yet")
        return {name: seen.text for name, seen in self.nodes.copy().items() if seen.text is not None}

    def facts(self):
        return {name: seen.facts for name, seen in self.nodes.copy().items()}

    def identity(self):
        own = self.own or {}
        return {key: own[key] for key in ("uid", "podCIDRs", "addresses")} if own.get("podCIDRs") else {}

    def look_again(self):
        asked, self.looking = self.looking, None if self.looking is False else True
        self.work.set()
        return asked is False

    def publish(self, name, text):
        self.record = text
        self.work.set()

    def withdraw(self, name):
        """Also removes the condition NetworkUnavailable, if it is MNCNI's: without MNCNI it would say what nobody knows."""
        path, gone = f"{NODES}/{name}", {"metadata": {"annotations": {RECORD: None}}}
        no_condition = {"status": {"conditions": [{"type": "NetworkUnavailable", "$patch": "delete"}]}}
        for failures in (1, 2, 3):
            try:
                _, own = self._parse_own(self.api.request("PATCH", path, gone, content_type=kube.MERGE_PATCH))
                if (own["condition"].get("reason") or "").startswith("Mncni"):
                    self.api.request("PATCH", f"{path}/status", no_condition, content_type=kube.STRATEGIC_PATCH)
                return
            except ApiError as error:
                trouble = error
                time.sleep(kube.pause_s(failures, error.retry_after_s or 0))
        raise StoreError(str(trouble))

    def say(self, reason, stranded=""):
        if self.own and reason != self.said:  # before the first answer of the API server, all that is wrong may be its absence
            self.said = reason
            down = ("NetworkDown", f"MNCNI's network is not up: {reason}")
            self.note(self.node_name, *(down if reason else ("NetworkUp", "MNCNI's network is up again")))
        up = ("False", "MncniIsUp", "MNCNI connects this node's pods with those of other nodes")
        up = ("False", "MncniPodsWithoutNetwork", stranded[:1000]) if stranded else up  # not True: new pods have network
        self.condition = ("True", "MncniIsDown", reason[:1000]) if reason else up
        self.work.set()

    def note(self, name, what, message):
        self.notes.append((name, what, message))
        self.work.set()

    def look_all(self):
        """{name: (see self.own, Seen)} of all Nodes, read once. ApiError."""
        items = self.api.list(NODES)[0]
        return {name: (own, self._parse_node(item)[1]) for item in items for name, own in [self._parse_own(item)]}

    def _tell(self, what, trouble):
        """Remember why something fails, "" if it does not."""
        changed, self.troubles[what] = self.troubles.get(what, "") != trouble, trouble
        self._announce(changed)

    def _announce(self, changed):
        if changed:
            self.news = True
            self.wake()

    def _parse_node(self, item):
        """(name, Seen) of a Node or its metadata. ApiError. Keys that may be absent in a Node may also be null."""
        with api_errors("read", NODES):
            metadata, cidrs = item["metadata"], kube.parse_cidrs((item.get("spec") or {}).get("podCIDRs") or ())
            facts = [text_in(metadata, key, False) for key in ("uid", "creationTimestamp")]
            record = text_in(metadata.get("annotations") or {}, RECORD, False)
            return text_in(metadata, "name"), Seen(record, Facts(*facts, None if self.guard else tuple(map(str, cidrs))))

    def _parse_own(self, item):
        """(name, see self.own) of this Node. ApiError."""
        name, (text, facts) = self._parse_node(item)
        with api_errors("read", NODES):
            cidrs, status = (item.get("spec") or {}).get("podCIDRs") or [], item.get("status") or {}
            found = [entry for entry in status.get("conditions") or () if entry.get("type") == "NetworkUnavailable"]
            own = {"uid": facts.uid, "podCIDRs": cidrs, "record": text, "version": text_in(item["metadata"], "resourceVersion")}
            own["condition"] = {key: found[0].get(key) for key in ("status", "reason", "message", "lastTransitionTime")} if found else {}
            own["addresses"] = kube.internal_ips(item)
            return name, own

    def _take_nodes(self, kind, items):
        """Take over a change of one Node, or (LIST) all Nodes. A change of what we do not read, such as a heartbeat, is no news."""
        with self.lock:
            if kind == "LIST":
                changed, self.nodes = dict(items) != self.nodes, dict(items)
            elif kind == "DELETED":
                changed = self.nodes.pop(items[0][0], None) is not None
            else:
                name, seen = items[0]
                changed, self.nodes[name] = self.nodes.get(name) != seen, seen
        self._announce(changed)

    def _take_own(self, kind, items):
        """Take over a change of this Node. ApiError 404 if the cluster does not have it."""
        own = {} if kind == "DELETED" else dict(items).get(self.node_name, {})
        with self.lock:
            if own and self.own and kube.is_older(own["version"], self.own["version"]):
                return  # it was sent before our own last write
            changed = self.own is None or {**own, "version": ""} != {**self.own, "version": ""}
            self.own = own
        self._announce(changed)
        self.work.set()
        if not own:
            raise ApiError(404, "NotFound", f"the cluster has no node {self.node_name}: is --node-name right?")

    def _is_whole(self):
        """Whether to read whole Nodes, see the class."""
        if self.guard is None or time.monotonic() >= self.test_at:
            self._test_guard()
        return not self.guard

    def _follow_services(self):
        """Thread: read the networks of Services every SERVICES_S, and soon again if the API server does not answer."""
        while True:
            time.sleep(self._look_services())

    def _look_services(self):
        """Read the networks of Services; what was known stays if they cannot be read. Returns how many seconds that is good for."""
        try:
            items = self.api.request("GET", SERVICE_CIDRS)
            with api_errors("read", SERVICE_CIDRS):
                found = sorted({str(cidr) for item in items["items"] for cidr in kube.parse_cidrs(item["spec"]["cidrs"])})
        except ApiError as error:
            return self.SERVICES_S if error.status in (403, 404) else 10  # a cluster may have none, or not tell
        changed, self.service_cidrs = found != self.service_cidrs, found
        self._announce(changed)
        return self.SERVICES_S

    def _test_guard(self):
        """Try, by dry runs, what the admission policies must refuse: a change of another node's record, a wrong record of our own, and a
        long one. Sets guard (whether all are refused; as it was if that cannot be told) and unguarded (what is not)."""
        own = (self.own or {}).get("record") or ""
        try:
            items = self.api.request("GET", NODES, params={"limit": 2}, accept=kube.METADATA_LIST)
            with api_errors("read", NODES):
                nodes = dict(map(self._parse_node, items["items"]))
            other = next(name for name in nodes if name != self.node_name)
            tries = {
                "any node can write another's record": (other, (nodes[other].text or "") + " "),
                "a node's record can claim the pods of others": (self.node_name, " "),
                "a node's record can have any length": (self.node_name, own + " " * self.POLICY_LIMIT),
            }
            unguarded = [what for what, attempt in tries.items() if not self._is_refused(*attempt)]
        except (StopIteration, ApiError):  # there is no other node, or no answer
            return
        for what in set(unguarded) - set(self.unguarded):
            log.error("an admission policy or its binding is missing, see deploy/naivewg/policy.yaml: %s", what)
        self.guard, self.unguarded, self.test_at = not unguarded, unguarded, time.monotonic() + self.GUARD_S

    def _is_refused(self, name, text):
        """Whether a dry run of writing a node's record is refused. ApiError if there is no answer to that."""
        try:
            self.api.request("PATCH", f"{NODES}/{name}", {"metadata": {"annotations": {RECORD: text}}}, {"dryRun": "All"}, kube.MERGE_PATCH)
        except ApiError as error:
            if error.status not in (403, 422):
                raise
            return True
        return False

    def _write(self):
        """Thread: write this Node when what it is to say differs from what it says, read the list that look_again asks for, send Events."""
        failures, next_note = 0, 0
        while True:
            self.work.wait(1 if self.notes else None)
            self.work.clear()
            try:
                if self.looking:
                    accept = kube.METADATA_LIST if self.guard else kube.JSON
                    self._take_nodes("LIST", self.api.list(NODES, None, accept, self._parse_node)[0])
                    self.looking = False
                self._write_own()
                if self.notes and time.monotonic() >= next_note:
                    next_note = time.monotonic() + self.EVENT_PAUSE_S
                    self._send_event(*self.notes.popleft())
                failures = 0
                self._tell("write", "")
            except Exception as error:
                failures += 1
                missing = min(failures, 60) if getattr(error, "status", 0) == 403 else 0  # somebody has to give us the right first
                self._tell("write", f"the API server: {error}")
                time.sleep(kube.pause_s(failures, max(missing, kube.retry_after_s(error))))
                self.work.set()

    def _write_own(self):
        """Write the record and the condition NetworkUnavailable, if this Node says something else. ApiError. The uid in the body makes
        the API server refuse the write if the Node was deleted and made again meanwhile."""
        own, record, condition = self.own, self.record, self.condition
        if not own:
            return
        path, metadata = f"{NODES}/{self.node_name}", {"uid": own["uid"]}
        if record and record != own["record"] and json.loads(record)["uid"] == own["uid"]:
            self._patch(path, {"metadata": {**metadata, "annotations": {RECORD: record}}}, kube.MERGE_PATCH)
        there = own["condition"]
        if condition and condition[:2] != (there.get("status"), there.get("reason")):
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            since = there["lastTransitionTime"] if condition[0] == there.get("status") and there["lastTransitionTime"] else now
            words = dict(zip(("status", "reason", "message"), condition))
            entry = {"type": "NetworkUnavailable", **words, "lastTransitionTime": since, "lastHeartbeatTime": now}
            self._patch(f"{path}/status", {"metadata": metadata, "status": {"conditions": [entry]}}, kube.STRATEGIC_PATCH)

    def _patch(self, path, body, content_type):
        self._take_own("MODIFIED", [self._parse_own(self.api.request("PATCH", path, body, None, content_type))])

    def _send_event(self, name, what, message):
        source = {"component": "mncni-agent", "host": self.node_name}
        kind = "Normal" if what in ("RecordAccepted", "NetworkUp") else "Warning"
        kube.send_event(self.api, name, name, message[:1000], reason=what, type=kind, source=source)


# ---------------------------------------------------------------------------------------------------------------------
# Records: what a node says about itself. Pure. Nothing in a record is trusted.
# ---------------------------------------------------------------------------------------------------------------------


class BadRecord(Exception):
    """Why a record is not believed, as a message for the operator."""


@dataclass(frozen=True)
class Node:
    """A record that passed every check. key: base64. created: text that sorts by time, "" if unknown. set_back: a number that changes
    whenever the node's clock was set back."""

    name: str
    uid: str
    created: str
    pod_cidrs: tuple
    endpoints: tuple
    key: str
    port: int
    set_back: int = 0

    # Every pass needs these of every node, so they are computed once per record.

    @functools.cached_property
    def allowed_ips(self):
        return {str(cidr) for cidr in self.pod_cidrs}

    @functools.cached_property
    def endpoint_texts(self):
        return frozenset(map(str, self.endpoints))

    @functools.cached_property
    def spans(self):
        return [span_of(cidr) for cidr in self.pod_cidrs]

    @functools.cached_property
    def targets(self):
        """{IP version: "address:port"} of the first endpoint of each family, in the order of the record."""
        first = {endpoint.version: endpoint for endpoint in reversed(self.endpoints)}
        return {version: endpoint_text(first[version], self.port) for version in dict.fromkeys(each.version for each in self.endpoints)}


def format_record(settings, uid, endpoints, key, generation, created, set_back=0):
    """This node's record as compact JSON. The order of the keys is part of the format: admission policies compare how a record begins."""
    record = {
        "v": 2,
        "podCIDRs": [str(cidr) for cidr in settings.pod_cidrs],
        "uid": uid,
        "endpoints": [str(endpoint) for endpoint in endpoints],
        "key": key,
        "port": settings.port,
        "gen": generation,
        **({"created": created} if created else {}),
        **({"setBack": set_back} if set_back else {}),
    }
    return json.dumps(record, separators=(",", ":"))


def parse_record(name, text, cluster_cidrs):
    """The Node of a record. BadRecord says what is wrong. Takes time in proportion to the length of the text."""
    if not mncni.is_identifier(name):
        raise BadRecord("the node's name has characters that no node has")
    if len(text) > Store.RECORD_LIMIT:
        raise BadRecord(f"the record is longer than {Store.RECORD_LIMIT} bytes")
    try:
        record = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"the record is no JSON: {error}" if text.strip() else "the record is empty") from None
    if not isinstance(record, dict):
        raise BadRecord("the record is no JSON object")
    if checked(record, "v", int) != 2:
        raise BadRecord(f"the record's version is {shown(record['v'])}, this agent reads 2")
    pod_cidrs = tuple(parse_pod_cidr(cidr, cluster_cidrs) for cidr in checked(record, "podCIDRs", list))
    pair = overlapping_pair(pod_cidrs)
    if pair:
        raise BadRecord(f"its pod CIDRs {pair[0]} and {pair[1]} overlap")
    uid, created = checked(record, "uid", str)[:64], parse_time(record.get("created", ""))
    endpoints = tuple(parse_endpoint(endpoint, cluster_cidrs) for endpoint in checked(record, "endpoints", list))
    key, port = parse_key(checked(record, "key", str)), parse_port(checked(record, "port", int))
    set_back = record.get("setBack", 0)
    return Node(name, uid, created, pod_cidrs, endpoints, key, port, set_back if type(set_back) is int else 0)


def unique_keys(pairs):
    """A hook for json.loads that refuses duplicate keys, which different readers understand differently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a duplicate key")
    return found


def checked(mapping, key, kind):
    """mapping[key] if it has the given type. A list has 1 to 16 elements, a text is not empty. BadRecord."""
    value = mapping.get(key)
    if type(value) is not kind or (kind in (list, str) and not value):
        raise BadRecord(f'"{key}" is {shown(value)}, not {mncni.kind_of(kind())} with content')
    if kind is list and len(value) > 16:
        raise BadRecord(f'"{key}" has {len(value)} elements')
    return value


def listed(values):
    """Several values as short text, fit for a log line."""
    text = ", ".join(map(str, values))
    return text if len(text) <= 120 else text[:117] + "..."


def parse_time(text):
    """A time of RFC 3339 as text that sorts, "" for anything else. The time only breaks ties, so a bad one is no reason to quarantine."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").isoformat()
    except (ValueError, TypeError):
        return ""


def parse_pod_cidr(text, cluster_cidrs):
    if not mncni.is_address(text, ipaddress.ip_network):
        raise BadRecord(f"pod CIDR {shown(text)} is no network")
    cidr = ipaddress.ip_network(text)
    if not is_part(cidr, cluster_cidrs):
        raise BadRecord(f"pod CIDR {cidr} is no part of the cluster CIDR")
    return cidr


def parse_endpoint(text, cluster_cidrs):
    if not mncni.is_address(text, ipaddress.ip_address):
        raise BadRecord(f"endpoint {shown(text)} is no IP address")
    address = ipaddress.ip_address(text)
    mapped = address.version == 6 and address.ipv4_mapped
    nobody = address.is_unspecified or address.is_loopback or address.is_multicast or address == BROADCAST
    if mapped or nobody or address.is_link_local:
        raise BadRecord(f"endpoint {address} cannot be another node's address")
    if is_in(address, cluster_cidrs):
        raise BadRecord(f"endpoint {address} is inside the cluster CIDR: it would be reached through itself")
    return address


def parse_key(text):
    """A WireGuard key, base64 in the one form that encodes it again. BadRecord."""
    if KEY.fullmatch(text) and text.strip("A="):  # thousands are read in each pass
        return text
    try:
        key = base64.b64decode(text, validate=True)
    except ValueError:
        raise BadRecord("the key is no base64") from None
    if len(key) != 32:
        raise BadRecord(f"the key has {len(key)} bytes, not 32")
    if not any(key):
        raise BadRecord("the key is all zero")
    if base64.b64encode(key).decode() != text:
        raise BadRecord("the key is not in canonical base64")
    return text


def parse_port(port):
    if not 0 < port < 65536:
        raise BadRecord(f"port {shown(port)} is out of range")
    return port


def compare_with_facts(node, facts):
    """The node, with the creation time that the cluster knows. BadRecord if its record contradicts the cluster."""
    if node.uid != facts.uid:
        raise BadRecord("the record is of an earlier node of this name")
    if facts.pod_cidrs is not None and {str(cidr) for cidr in node.pod_cidrs} != set(facts.pod_cidrs):
        claimed, given = listed(node.pod_cidrs), listed(facts.pod_cidrs) or "none"
        raise BadRecord(f"its record claims the pod CIDRs {claimed}, the cluster gave it {given}")
    return replace(node, created=parse_time(facts.created))


class Roster:
    """Decides which records are believed. It remembers its verdicts, so a record is validated once per content.

    facts: {name: Facts} of the nodes that a cluster knows. held: {name: Node} of those believed so far. own_addresses: see
    host_addresses.
    """

    def __init__(self, settings):
        self.settings = settings
        self.memory = {}  # {name: ((record, Facts), verdict)}
        self.facts, self.held, self.own_addresses = {}, {}, frozenset()
        self.own = None  # what judge() compared the held nodes with

    def judge(self, records, own_key, own_endpoints):
        """({name: Node}, {name: reason}) of the other nodes' records."""
        usable, quarantine, families = {}, {}, {endpoint.version for endpoint in own_endpoints}
        former, self.own = self.own, (own_key, families, self.settings.pod_cidrs, self.own_addresses)
        own_spans = sorted((*span_of(cidr), "") for cidr in self.settings.pod_cidrs)
        self.memory = {name: known for name, known in self.memory.items() if name in records}
        for name, text in sorted(records.items()):
            if name == self.settings.node_name:
                continue
            verdict = self.verdict(name, text)
            reason = verdict if isinstance(verdict, str) else ""
            if not reason and not (self.own == former and self.held.get(name) is verdict):
                reason = clash_with_self(verdict, own_key, own_spans, families, self.own_addresses)
            if reason:
                quarantine[name] = reason
            else:
                usable[name] = verdict
        quarantine.update(find_clashes(usable.values(), self.held))
        self.held = {name: node for name, node in usable.items() if name not in quarantine}
        return self.held, quarantine

    def verdict(self, name, text):
        """The Node of a record, or the reason (text) why it is not believed. Other records play no part."""
        known, content = self.memory.get(name), (text, self.facts.get(name))
        if known is None or known[0] != content:
            try:
                node = parse_record(name, text, self.settings.cluster_cidrs)
                known = (content, compare_with_facts(node, content[1]) if content[1] else node)
            except BadRecord as error:
                known = (content, str(error))
            self.memory[name] = known
        return known[1]

    def sound(self, records):
        """The names of the records that are believed, if no others clash with them."""
        return {name for name, text in records.items() if isinstance(self.verdict(name, text), Node)}


def clash_with_self(node, own_key, own_spans, own_families, own_addresses):
    """Why a node cannot be a peer of this node, None if it can."""
    if node.key == own_key:
        return "it has this node's key"
    if not own_addresses.isdisjoint(node.endpoint_texts):
        return f"one of its endpoints {listed(node.endpoints)} is an address of this node, or a broadcast address"
    for cidr, span in zip(node.pod_cidrs, node.spans):
        if find_overlap(own_spans, span) is not None:
            return f"its pod CIDR {cidr} is this node's"
    if own_families.isdisjoint(node.targets):
        return f"it has no endpoint of a family that this node has: {', '.join(map(str, node.endpoints))}"
    return None


def find_clashes(nodes, held=None):
    """{name: reason} of the nodes that claim what is another's. held: {name: Node} of those believed so far. A key or a pod CIDR that a
    node has held and still claims stays its own, whatever others claim; of those that are new, the oldest node's claim counts."""
    spans = sorted(span for node in nodes for span in node.spans)
    apart = all(one[0] != two[0] or one[2] < two[1] for one, two in zip(spans, spans[1:]))
    if apart and len({node.key for node in nodes}) == len(nodes):
        return {}  # the common case
    lost, keys, taken = {}, {}, []  # taken: sorted (*span, name)
    for node in nodes:
        former = (held or {}).get(node.name)
        if former:
            keys.update({node.key: node.name} if node.key == former.key else {})
            taken += [(*span, node.name) for span in node.spans if span in former.spans]
    taken.sort()
    for node in sorted(nodes, key=seniority):
        owners = [("key", keys.get(node.key)), *(("pod CIDR", find_overlap(taken, span)) for span in node.spans)]
        rivals = [(what, owner) for what, owner in owners if owner not in (None, node.name)]
        if rivals:
            lost[node.name] = "its {} is that of node {}, which had it before or is older".format(*rivals[0])
            continue
        keys[node.key] = node.name
        for span, (_, owner) in zip(node.spans, owners[1:]):
            if owner is None:
                bisect.insort(taken, (*span, node.name))
    return lost


def seniority(node):
    """Sorts nodes by age, oldest first. A node of unknown age counts as the youngest."""
    return (node.created or "9999", node.uid, node.name)


def endpoint_text(address, port):
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def lost_too_many(lost, known):
    """Whether more than three and more than a fifth of the known nodes are lost at once. Then the store is the likelier cause."""
    return len(lost) > max(3, len(known) // 5)


# ---------------------------------------------------------------------------------------------------------------------
# State on disk: the key, the last good list of nodes
# ---------------------------------------------------------------------------------------------------------------------


def make_key():
    """A WireGuard private key in base64: 32 random bytes, clamped (RFC 7748, section 5)."""
    key = bytearray(os.urandom(32))
    key[0] &= 248
    key[31] = (key[31] & 127) | 64
    return base64.b64encode(key).decode()


def ensure_key(path, device_key):
    """The private key in a file. If there is no file, it is written: with the key of the running device, or with a new one.
    CNIError 5 for a damaged file, because a new key is a new identity and so the operator's decision."""
    directory = os.path.dirname(path)
    mncni.own_directory(directory, 0o700)
    ensure_mode(directory, 0o700)
    text = look_secret(path)
    if text is None:
        text = device_key or make_key()
        write_next_key(path, text)
        take_next_key(path)
        return text
    ensure_mode(path, 0o600)
    try:
        return parse_key(text)
    except BadRecord as error:
        what = f"the key file {path} is damaged: {error}"
        raise CNIError(mncni.IO_FAILURE, f"{what}; put the key back, or remove the file and restart to get a new one") from None


def write_next_key(path, text):
    """Write the key that is to follow the one at a path. Each step is on disk before the next, so a power failure leaves no half key."""
    write_if_changed(f"{path}.new", text + "\n", mode=0o600)
    sync(f"{path}.new")
    sync(os.path.dirname(path))


def take_next_key(path):
    """Put the next key in the place of the one at a path, of which nothing is left."""
    os.rename(f"{path}.new", path)
    sync(os.path.dirname(path))


def key_time(settings):
    """When the key was made, in Unix time: the time of its file, which a backup keeps. 0 if there is none."""
    return int(os.path.getmtime(settings.key_path)) if os.path.exists(settings.key_path) else 0


def look_next_key(path, run):
    """The public key of the next key, "" if there is none that can be read. CNIError."""
    with contextlib.suppress(BadRecord):
        return public_key(parse_key(look_secret(f"{path}.new") or ""), run)
    return ""


def public_key(key, run):
    """The public key of a private one."""
    return ask(SecretInput(["wg", "pubkey"], key, "the public key of the next key"), run, may_be_gone=False).stdout.strip()


class SecretInput(Command):
    """A command whose input is secret: a trace or an error shows it without."""

    def __str__(self):
        return " ".join(self.argv)


def look_secret(path):
    """The text in a file, None if there is none. CNIError 5, see is_own_file."""
    return (mncni.read_file(path) or "").strip() if is_own_file(path) else None


def is_own_file(path):
    """Whether there is a file. CNIError 5 if it is a link, has a second name, or is another user's: the agent makes no such file."""
    if not os.path.lexists(path):
        return False
    status = os.lstat(path)
    if status.st_mode & 0o170000 != 0o100000 or status.st_nlink > 1 or status.st_uid != os.geteuid():
        what = f"{path} is a link, or has a second name, or is another user's: it is not used, and what it leads to stays as it is"
        raise CNIError(mncni.IO_FAILURE, f"{what}; put the file itself there, or remove it")
    return True


def ensure_mode(path, mode):
    if os.stat(path).st_mode & 0o7777 != mode:
        os.chmod(path, mode)


def sync(path):
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = path  # fsync(2) knows no name
        raise
    finally:
        os.close(descriptor)


def load_json(path, check=dict):
    """The object in a state file; {} if there is no file or it cannot be read, because the agent can do without. check(object) raises
    an error for an object that the agent would not write."""
    try:
        value = mncni.parse_json_object(mncni.read_state(path) or "{}", path)
        check(value)
        return value
    except (OSError, CNIError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        log.warning("%s is unreadable (%s %s); the agent goes on without it", path, type(error).__name__, error)
        return {}


def check_loaded(tables):
    """Raise an error unless this can be Context.loaded."""
    for text, _ in tables.values():
        text.splitlines()


def load_state(path):
    """{"own": fields of this node's record, "records": {name: text} of the last good list}."""
    state = load_json(path)
    own, records = (state.get(key) if isinstance(state.get(key), dict) else {} for key in ("own", "records"))
    kinds = {"uid": str, "created": str, "text": str, "gen": int, "set_back": int, "seen": bool}
    kinds.update(dict.fromkeys(("podCIDRs", "serviceCIDRs", "addresses"), list))
    own = {key: value for key, value in own.items() if type(value) is kinds.get(key)}
    for key in ("podCIDRs", "serviceCIDRs"):
        with contextlib.suppress(ValueError, KeyError):
            own[key] = [str(cidr) for cidr in kube.parse_cidrs(own.pop(key))]
    return {"own": own, "records": {name: text for name, text in records.items() if isinstance(text, str)}}


def write_if_changed(path, text, mode=0o644):
    """Write a file, if its content differs. Returns whether it was written. CNIError 5 names the file."""
    try:
        if mncni.read_state(path) == text:
            return False
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        write_file(path, text, mode)
    except OSError as error:  # the error of a full disk names no file
        raise CNIError(mncni.IO_FAILURE, f"cannot write {path}: {error.strerror}") from None
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Routes and firewall: pure
# ---------------------------------------------------------------------------------------------------------------------


def route(dst, **fields):
    """A route as a dict of texts that can be compared: dst, kind ("unicast", "unreachable"); via, dev, src, metric where they matter."""
    return {"dst": str(dst), "kind": fields.pop("kind", "unicast"), **{key: str(value) for key, value in fields.items()}}


def floor_routes(cidrs):
    return [route(cidr, kind="unreachable", metric=FLOOR_METRIC) for cidr in cidrs]


def floor_rules(cidrs):
    """The routing rules of the floor, {IP version: [words for ip-rule(8)]}. `ip route flush` and `nft flush ruleset` leave rules alone.

    For the cluster there are only routes of the main table that are not broader than its CIDR: neither the default route nor a route of
    the host to a larger network leads there. The floor's routes serve while somebody has removed the rules, as systemd-networkd does.
    """
    rules = {4: [], 6: []}
    for cidr in cidrs:
        narrow = f"lookup main suppress_prefixlength {cidr.prefixlen - 1}"
        rules[cidr.version] += [f"to {cidr} priority {RULE_PRIORITY} {narrow}", f"to {cidr} priority {RULE_PRIORITY + 1} unreachable"]
    return rules


def parse_rules(entries):
    """The agent's rules among those of `ip -json`, in the form of floor_rules()."""
    rules = []
    for entry in entries:
        if entry.get("protocol") == str(ROUTE_PROTOCOL) and entry.get("priority") in (RULE_PRIORITY, RULE_PRIORITY + 1):
            dst = ipaddress.ip_network("/".join(str(entry[key]) for key in ("dst", "dstlen") if key in entry))
            is_end = entry.get("action") == "unreachable"
            act = "unreachable" if is_end else f"lookup main suppress_prefixlength {int(entry.get('suppress_prefixlen', 0))}"
            rules.append(f"to {dst} priority {entry['priority']} {act}")
    return rules


def host_routes(settings):
    """The routes of the host: the floor, and the cluster through the tunnel, with the pods' gateway as source address."""
    routes = floor_routes([*settings.cluster_cidrs, *settings.pod_cidrs])
    if 4 in settings.families:
        routes.append(route(f"{NEXT_HOPS[4]}/32", dev=HOST_VETH))
    for version in settings.families:
        source = next(gateway for cidr, gateway in settings.gateways.items() if cidr.version == version)
        for cidr in settings.cluster_cidrs:
            if cidr.version == version:
                routes.append(route(cidr, via=NEXT_HOPS[version], dev=HOST_VETH, src=source))
    return routes


def ns_routes(settings):
    """The routes of the namespace: this node's pods to the host, the rest of the cluster into the device, nothing else."""
    defaults = {4: "0.0.0.0/0", 6: "::/0"}
    routes = [route(defaults[version], kind="unreachable", metric=FLOOR_METRIC) for version in kernel_families()]
    routes += [route(cidr, dev=DEVICE) for cidr in settings.cluster_cidrs if cidr.version in settings.families]
    for cidr, gateway in settings.gateways.items():  # the gateway has a route of its own: it is in the cluster CIDR, hence behind DEVICE
        routes += [route(f"{gateway}/{gateway.max_prefixlen}", dev=NS_VETH), route(cidr, via=gateway, dev=NS_VETH)]
    return routes


def parse_route(entry, family):
    """A route of `ip -json` in the form of route(). family: "-4" or "-6"."""
    dst = {"4": "0.0.0.0/0", "6": "::/0"}[family[1]] if entry["dst"] == "default" else str(ipaddress.ip_network(entry["dst"], strict=False))
    if entry.get("type") in ("unreachable", "blackhole", "prohibit", "throw"):
        return route(dst, kind=entry["type"], metric=entry.get("metric", 0))
    fields = {"via": entry.get("gateway"), "dev": entry.get("dev"), "src": entry.get("prefsrc")}
    return route(dst, **{key: value for key, value in fields.items() if value})


def missing_routes(wanted, present):
    """Lines for `ip -batch` that set the routes which are absent or different."""
    return [route_line("replace", entry) for entry in wanted if entry not in present]


def stale_routes(wanted, present):
    """Lines for `ip -batch` that delete the agent's routes which are no longer wanted."""
    keys = {(entry["dst"], entry.get("metric")) for entry in wanted}
    return [route_line("delete", entry) for entry in present if (entry["dst"], entry.get("metric")) not in keys]


def route_line(verb, entry):
    words = ["route", verb, *([entry["kind"]] if entry["kind"] != "unicast" else []), entry["dst"]]
    for key in ("via", "dev", "src", "metric"):
        words += [key, entry[key]] if key in entry else []
    onlink = ["onlink"] if "via" in entry else []  # the next hop is on this link, though no address of the link says so
    return " ".join([*words, *onlink, "proto", str(ROUTE_PROTOCOL)])


def outside_of(field, cidrs):
    """Matches packets of which an address is in none of the networks. Rules name networks one by one: while a table with a set of ranges
    is replaced, the kernel does not find what is in the set."""
    return " ".join(f"{field} != {cidr}" for cidr in cidrs)


def host_firewall(settings, counts=None):
    """The table "inet mncni" of the host as nft text. counts: {name: (packets, bytes)} that its COUNTERS start from.

    The chain `inbound` runs before connection tracking: it sees the addresses that a packet came with, before a host port, a Service or
    the masquerade changes them. The chain `answers` runs after connection tracking and before any translation. The chain `forward` sees
    what a packet is routed by. The chain `outbound` runs last, when interface and addresses are final.

    WireGuard authenticates what comes through the tunnel; nothing authenticates what comes by another interface. So that has neither an
    address of the cluster nor, before the node has translated it, one of a pod or a Service as its target. Without --masquerade, answers
    to pods do come like that. `forward` lets through what the node itself has translated, and answers: no packet gets to a pod by another
    way, such as a source route.

    A packet for a Service that `outbound` sees has not been translated, because kube-proxy does not know the Service yet. A routing rule,
    as of the floor, cannot drop it: the node routes its own packets before kube-proxy translates them.

    Connection tracking translates no packet that it calls invalid, such as a TCP segment beyond the window. One from outside then reaches
    the host instead of the pod, and the host, which knows no such connection, would reset it. A reset that belongs to no connection is
    therefore dropped. The sysctl nf_conntrack_tcp_be_liberal would do as well, but it weakens the host's own firewall.
    """
    own, refuse = f'{{ "{settings.bridge}", "{HOST_VETH}", "lo" }}', "counter name refused drop"
    inbound, answers, leaks, nat = [], [], ["tcp flags & rst == rst ct state invalid drop"], []
    for version, ip in ((4, "ip"), (6, "ip6")):
        lists = (settings.cluster_cidrs, settings.pod_cidrs, settings.service_cidrs)
        cluster, pods, services = ([cidr for cidr in cidrs if cidr.version == version] for cidrs in lists)
        targets = [f"iifname != {own} {ip} daddr {cidr}" for cidr in cluster]
        inbound += [f"iifname != {own} {ip} saddr {cidr} {refuse}" for cidr in cluster]
        inbound += [f"iifname != {own} {ip} daddr {cidr} {refuse}" for cidr in services]
        if settings.masquerade:
            inbound += [f"{target} {refuse}" for target in targets]
        else:
            answers += [f"{target} {verdict}" for target in targets for verdict in ("ct direction reply accept", refuse)]
        inbound += inbound_rules(settings, version, pods) if pods else [f'iifname "{settings.bridge}" meta nfproto ipv{version} drop']
        leaks += [f"oifname != {own} {ip} daddr {cidr} counter name leaked drop" for cidr in (*cluster, *services)]
        # With --masquerade, what still has a pod's address here was not translated: it is invalid, or nobody tracks it.
        leaks += [f"oifname != {own} {rule} drop" for rule in to_outside(version, pods, cluster) if settings.masquerade]
        nat += nat_rules(settings, version, pods, cluster) if pods else []
    inward = f'iifname != {own} oifname {{ "{settings.bridge}", "{HOST_VETH}" }}'
    chains = nft_chain("inbound", "filter", "prerouting", "raw", inbound)
    chains += nft_chain("answers", "filter", "prerouting", "mangle", answers) if answers else ""
    forward = [f"{inward} {verdict}" for verdict in ("ct status dnat accept", "ct direction reply accept", refuse)]
    chains += nft_chain("forward", "filter", "forward", "filter", forward)
    chains += nft_chain("nat", "nat", "postrouting", "srcnat - 10", nat)
    chains += nft_chain("outbound", "filter", "postrouting", "srcnat + 10", leaks)
    counts = {**dict.fromkeys(COUNTERS, (0, 0)), **(counts or {})}
    return nft_table("".join(f"  counter {name} {{ packets {count[0]} bytes {count[1]} }}\n" for name, count in counts.items()) + chains)


def inbound_rules(settings, version, pods):
    """From the bridge comes only what has the address of a pod of this node, which the gateway is not; from the tunnel only what is for
    such a pod. IPv6 neighbour discovery is let through."""
    ip = {4: "ip", 6: "ip6"}[version]
    sources = {4: "", 6: "ip6 saddr != fe80::/10 ip6 saddr != :: "}[version]
    targets = {4: "", 6: "ip6 daddr != fe80::/10 ip6 daddr != ff02::/16 "}[version]
    return [
        f'iifname "{settings.bridge}" {outside_of(f"{ip} saddr", pods)} {sources}drop',
        *(f'iifname "{settings.bridge}" {ip} saddr {settings.gateways[cidr]} drop' for cidr in pods),
        f'iifname "{HOST_VETH}" {outside_of(f"{ip} daddr", pods)} {targets}drop',
    ]


def nat_rules(settings, version, pods, cluster):
    """Into the tunnel, a source address that is not a pod's becomes the gateway's, because peers drop any other. Out of the cluster, the
    address of a pod becomes the node's, if --masquerade says so. fully-random: two pods that use one source port at the same moment would
    get the same port of the node, and one packet would be lost."""
    ip, gateway = {4: "ip", 6: "ip6"}[version], settings.gateways[pods[0]]
    rules = [f'oifname "{HOST_VETH}" {outside_of(f"{ip} saddr", pods)} snat {ip} to {gateway} fully-random']
    return rules + [f"{rule} masquerade fully-random" for rule in to_outside(version, pods, cluster) if settings.masquerade]


def to_outside(version, pods, cluster):
    """Matches packets from pods of this node to outside the cluster, a text for each of the pod CIDRs."""
    ip, multicast = {4: ("ip", "224.0.0.0/4"), 6: ("ip6", "ff00::/8")}[version]
    return [f"{ip} saddr {cidr} {outside_of(f'{ip} daddr', [*cluster, multicast])}" for cidr in pods]


def ns_firewall(settings):
    """The table "inet mncni" of the namespace. It forwards from the host into the device, and from the device to pods of this node. The
    namespace itself accepts only neighbour discovery, from the host."""
    rules = [f'iifname "{NS_VETH}" oifname "{DEVICE}" accept']
    for cidr in settings.pod_cidrs:
        ip = {4: "ip", 6: "ip6"}[cidr.version]
        rules.append(f'iifname "{DEVICE}" oifname "{NS_VETH}" {ip} daddr {cidr} accept')
    neighbours = [f'iifname "{NS_VETH}" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept']
    chains = nft_chain("forward", "filter", "forward", "filter", rules, "drop")
    return nft_table(chains + nft_chain("input", "filter", "input", "filter", neighbours, "drop"))


def nft_chain(name, kind, hook, priority, rules, policy="accept"):
    body = "".join(f"    {rule}\n" for rule in rules)
    return f"  chain {name} {{\n    type {kind} hook {hook} priority {priority}; policy {policy};\n{body}  }}\n"


def nft_table(body):
    """A script that replaces the table "inet mncni", or creates it, in one transaction: at no moment is there none."""
    return f"table inet mncni\ndelete table inet mncni\ntable inet mncni {{\n{body}}}\n"


def parse_nft(text):
    """(the output of `nft -j list table` without handles and counts, {name: (packets, bytes)} of its COUNTERS)."""
    items = [item for item in json.loads(text or "{}").get("nftables", []) if "metainfo" not in item]
    counters = [item["counter"] for item in items if item.get("counter", {}).get("name") in COUNTERS]
    counts = {counter["name"]: tuple(max(0, int(counter[key])) for key in ("packets", "bytes")) for counter in counters}
    return without_volatile(items), {**dict.fromkeys(COUNTERS, (0, 0)), **counts}


def without_volatile(value):
    """A JSON value without what changes by itself: handles, packet counts, byte counts."""
    if isinstance(value, dict):
        return {key: without_volatile(item) for key, item in value.items() if key not in ("handle", "packets", "bytes")}
    return [without_volatile(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------------------------
# Peers: pure
# ---------------------------------------------------------------------------------------------------------------------


def desired_peers(nodes, own_endpoints):
    """{key: {"name", "endpoint", "allowed_ips", "set_back"}} of {name: Node}."""
    peers, families = {}, {endpoint.version for endpoint in own_endpoints}
    for name, node in nodes.items():
        endpoints = [text for version, text in node.targets.items() if version in families]
        peers[node.key] = {"name": name, "endpoint": endpoints[0], "allowed_ips": node.allowed_ips, "set_back": node.set_back}
    return peers


def parse_dump(text):
    """The output of `wg show dump`, see wg(8): {"private_key", "public_key", "port", "peers": {key: {"endpoint", "allowed_ips",
    "handshake", "rx", "tx"}}}. CNIError 100 if it has another form; the error quotes nothing, because the first line holds the private
    key. The result must not be logged either."""
    try:
        lines = [["" if word in ("(none)", "off") else word for word in line.split("\t")] for line in text.splitlines()]
        peers = {}
        for key, _, endpoint, allowed_ips, handshake, rx, tx, _ in lines[1:]:
            figures = dict(zip(("handshake", "rx", "tx"), map(int, (handshake, rx, tx))))
            peers[parse_key(key)] = {"endpoint": endpoint, "allowed_ips": set(filter(None, allowed_ips.split(","))), **figures}
        private, public, port = lines[0][:3]
        private, public = (key and parse_key(key) for key in (private, public))
        return {"private_key": private, "public_key": public, "port": int(port), "peers": peers}
    except (ValueError, IndexError, BadRecord):
        raise CNIError(mncni.COMMAND_FAILED, "cannot understand what `wg show dump` says; is this wireguard-tools too new?") from None


def plan_peers(desired, present, sent, anew=()):
    """The differences as arguments for `wg set <device>`, one list per peer: new and changed peers first, then removals.

    sent: the desired peers of the last time. An endpoint is set again only when the record has changed it: WireGuard itself follows a
    peer that moves, and would be set back each time. A peer whose clock was set back is removed and added: WireGuard takes its
    handshakes for replays until the clock is where it was, or until it has forgotten the peer (WireGuard, section 5.1).
    anew: the keys of peers that are made anew for another reason, see plan_greetings.
    """
    changes = []
    for key, peer in sorted(desired.items(), key=lambda item: item[1]["name"]):
        there, former, words = present.get(key), sent.get(key, {}), []
        remade = there is not None and (key in anew or former.get("set_back", peer["set_back"]) != peer["set_back"])
        if remade:
            changes.append(["peer", key, "remove"])
            there = None
        moved = former.get("endpoint") != peer["endpoint"]
        if there is None or not there["endpoint"] or (moved and peer["endpoint"] != there["endpoint"]):
            words += ["endpoint", peer["endpoint"]]
        if there is None or there["allowed_ips"] != peer["allowed_ips"]:
            words += ["allowed-ips", ",".join(sorted(peer["allowed_ips"]))]
        if words:
            changes.append(["peer", key, *words])
        changes += greetings([key]) if remade or key in anew else []
    return changes + [["peer", key, "remove"] for key in sorted(set(present) - set(desired))]


def doubted(desired, present, heard, now):
    """(the keys of peers whose endpoint is to be set back to the record's, heard for the next call).

    WireGuard takes over the endpoint that a peer's packets come from. So one that changed although nothing came was set by somebody. And
    one from which nothing has come for DOUBT_S, while packets for it went out, is where the peer was once.
    heard: {key: (endpoint, bytes received, bytes sent, time)} as of when something came last, or nothing was waiting.
    """
    doubts, known = [], {}
    for key in present.keys() & desired.keys():
        there = present[key]
        endpoint, rx, tx, since = heard.get(key, ("", -1, 0, now))
        is_quiet = there["rx"] == rx
        is_waiting = is_quiet and there["tx"] != tx
        known[key] = heard[key] if is_waiting else (there["endpoint"], there["rx"], there["tx"], now)
        is_doubtful = (is_quiet and there["endpoint"] != endpoint) or (is_waiting and now - since >= DOUBT_S)
        if is_doubtful and there["endpoint"] != desired[key]["endpoint"]:
            doubts.append(key)
            del known[key]
    return doubts, known


def changed_keys(desired, sent):
    """The keys in desired of the nodes that have another one in sent."""
    former = {peer["name"] for key, peer in sent.items() if key not in desired}
    return {key for key, peer in desired.items() if key not in sent and peer["name"] in former} if former else set()


def limit_greetings(names, greeted, now):
    """(the keys that may be greeted, greeted for the next call): of a node five keys a minute, whatever its records say. Else a node could
    have all others send as much as it likes to an address of its choice.
    names: {key: node name}. greeted: {node name: [times]}.
    """
    allowed, recent = set(), {name: [time for time in times if now - time < 60] for name, times in greeted.items()}
    for key, name in names.items():
        if len(recent.setdefault(name, [])) < 5:
            recent[name].append(now)
            allowed.add(key)
    return allowed, {name: times for name, times in recent.items() if times}


def plan_greetings(awaited, present, fresh, own_key, now):
    """(the keys of peers that are to be made anew and greeted, awaited for the next call).

    A node that changes its key, and this node, which follows, do so at about the same moment. The handshake that the later one begins
    succeeds, unless a packet is lost, or both have begun one at once; then WireGuard waits for 5 s. A peer that is made anew waits for
    nothing. The pauses grow, and of two nodes that greet each other one is faster, so that they do not go on at the same moment.
    awaited: {key: (time, pause in seconds)} of the peers that have not answered. fresh: keys that other keys have made way for.
    """
    rest = {key: row for key, row in awaited.items() if not present.get(key, {"handshake": 1})["handshake"]}
    pauses = {key: 2 * pause for key, (due, pause) in rest.items() if now >= due}
    pauses.update({key: GREET_S if own_key < key else 2 * GREET_S for key in fresh})
    rest.update({key: (now + pause, pause) for key, pause in pauses.items()})
    return set(pauses), {key: row for key, row in rest.items() if row[1] < 5}


def greetings(keys):
    """Arguments for `wg set` that send a keepalive to peers, which begins a handshake. A peer that still has a session with this node's
    former device or key would notice the new one only after 15 s."""
    return [["peer", key, "persistent-keepalive", seconds] for seconds in ("1", "0") for key in sorted(keys)]


# ---------------------------------------------------------------------------------------------------------------------
# The stages of a pass: each looks, compares, applies the difference. The floor comes first, so that nothing leaves in clear.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Context:
    """What the stages work with, and what one pass remembers for the next.

    loaded: {"host" or "ns": [text of the nft table, what the kernel lists after it was loaded]}; it is also in a file, so that the next
    agent need not load the tables again. peers: see desired_peers. sent: the peers that were set last, None before the first pass.
    internal_ips: those of this Node, in its order. links, routes: see ensure_host. clash: why the host and the cluster CIDR do not go
    together, or "".
    """

    settings: Settings
    run: object
    boot_id: str
    internal_ips: tuple = ()
    links: tuple = ()
    routes: tuple = ()
    clash: str = ""
    endpoints: tuple = ()
    mtu: int = 0
    public_key: str = ""
    next_key: str = ""  # public, too; see Agent.use_next_key
    nodes: dict = field(default_factory=dict)
    loaded: dict = field(default_factory=dict)
    peers: dict = field(default_factory=dict)
    sent: dict = None
    daemons: list = field(default_factory=list)
    heard: dict = field(default_factory=dict)  # see doubted
    awaited: dict = field(default_factory=dict)  # see plan_greetings
    greeted: dict = field(default_factory=dict)  # see limit_greetings
    unbridged: str = ""  # see ensure_bridged


def apply_lines(lines, run, why, netns=""):
    """Apply lines of `ip -batch`, if there are any."""
    if lines:
        apply([ip_batch(lines, netns, why)], run)


def look_routes(run, netns=""):
    """The agent's routes of both families, in the form of route()."""
    line, why, families = f"route show table main proto {ROUTE_PROTOCOL}", "the agent's routes", [f"-{each}" for each in kernel_families()]
    return [parse_route(entry, family) for family in families for entry in look_ip([line], run, netns, family, why) if "dst" in entry]


def ensure_host(context):
    """Look at the host: its links with their addresses, its default routes, and what it has inside the cluster CIDR. CNIError 7 for IPv6
    in the cluster CIDR that the host has switched off."""
    settings = context.settings
    refuse_missing_ipv6(settings.cluster_cidrs)
    lines = ["address show", "route show table all default", *(f"route show table all root {cidr}" for cidr in settings.cluster_cidrs)]
    facts = look_ip(lines, context.run, why="the host's addresses, its default routes, and its routes inside the cluster CIDR")
    context.links, context.routes = ([entry for entry in facts if key in entry] for key in ("ifname", "dst"))
    context.clash = find_clash(settings, context.links, context.routes)


def kernel_families():
    return (4, 6) if os.path.exists("/proc/sys/net/ipv6") else (4,)


def refuse_missing_ipv6(cidrs):
    """CNIError 7 if a network is IPv6, and the kernel has none, or has it switched off for all links or for new ones."""
    off = [] if 6 in kernel_families() else ["ipv6.disable=1 on the kernel's command line"]
    for key in ("net/ipv6/conf/all/disable_ipv6", "net/ipv6/conf/default/disable_ipv6"):
        off += [f"sysctl {key.replace('/', '.')} is 1"] if mncni.read_file(f"/proc/sys/{key}") == "1\n" else []
    for cidr in cidrs:
        if off and cidr.version == 6:
            raise config_error(f"--cluster-cidr {cidr} needs IPv6, which is off on this host ({off[0]}); switch it on, or leave {cidr} out")


def find_clash(settings, links, routes):
    """Why the cluster CIDR is not the agent's to take: the addresses and routes of others inside it; "" if there are none. routes: those
    inside it, and defaults. An address and the kernel's route for it count as one."""
    own, cidrs, found = (settings.bridge, HOST_VETH), settings.cluster_cidrs, {}  # found: {(link name, network): (what, how to remove it)}
    for link in links:
        name, kind = link["ifname"], link.get("linkinfo", {}).get("info_kind")
        for address, _ in interfaces_of(link) if name not in own else ():
            if is_in(address.ip, cidrs):
                remove = f"ip link delete {name}" if kind in ("bridge", "vxlan") else f"ip address delete {address} dev {name}"
                found[name, address.network] = (f"{address} on {name}", remove)
    for entry in routes:
        kind, protocol = entry.get("type", "unicast"), entry.get("protocol")
        implied = protocol == str(ROUTE_PROTOCOL) or (protocol == "kernel" and kind != "unicast") or entry.get("dev") in own
        if entry["dst"] != "default" and not implied:
            words = [entry["dst"]] if kind == "unicast" else [kind, entry["dst"]]
            for key in ("dev", "table"):
                words += [key, str(entry[key])] if entry.get(key, "main") != "main" else []
            what = (f"the route {' '.join(words)}", f"ip route delete {' '.join(words)}")
            found.setdefault((entry.get("dev"), ipaddress.ip_network(entry["dst"])), what)
    if not found:
        return ""
    said, removals = (", ".join(list(dict.fromkeys(each))[:4]) for each in zip(*found.values()))
    what = f"this host has another network inside --cluster-cidr {', '.join(map(str, cidrs))}: {said}"
    return f"{what}; one would cut off the other: choose another --cluster-cidr, or remove what a former CNI plugin left ({removals})"


def interfaces_of(link):
    """[(an address of a link with its prefix length, its entry in `ip address`)]."""
    infos = [(f"{info.get('local')}/{info.get('prefixlen')}", info) for info in link.get("addr_info", ())]
    return [(ipaddress.ip_interface(text), info) for text, info in infos if mncni.is_address(text, ipaddress.ip_interface)]


def host_addresses(links):
    """All addresses of the host's links, and broadcast addresses of their networks, as text."""
    infos = [info for link in links for info in link.get("addr_info", ())]
    return frozenset(str(info.get(key)) for info in infos for key in ("local", "broadcast"))


def ensure_endpoints(context):
    """Find this node's endpoints, unless --endpoint gives them. CNIError 7 for one inside the cluster CIDR: the floor would cut it off."""
    usable = usable_addresses(context.links)
    endpoints = context.settings.endpoints or tuple(each for each in context.internal_ips if each in usable)[:16]
    context.endpoints = endpoints or look_sources(context.run, usable)
    trouble = kube.address_trouble("this node's address", context.endpoints, context.settings.cluster_cidrs)
    if trouble:
        raise config_error(trouble)


def usable_addresses(links):
    """{address: link name} of the addresses that other nodes may be told. Not those that go soon (temporary, deprecated), nor virtual ones,
    which a load balancer such as keepalived moves between nodes: of full prefix length, beside a shorter one on the link. DHCPv6 gives
    such addresses too, but for a time ("dynamic")."""
    usable = {}
    for link in links:
        interfaces = [(each, info) for each, info in interfaces_of(link) if info.get("scope") == "global"]
        wide = {each.version for each, _ in interfaces if each.network.prefixlen < each.max_prefixlen}
        for each, info in interfaces:
            virtual = each.network.prefixlen == each.max_prefixlen and each.version in wide and not info.get("dynamic")
            passing = any(info.get(flag) for flag in ("temporary", "deprecated", "dadfailed"))
            if not (virtual or passing or each.is_link_local):
                usable[each.ip] = link["ifname"]
    return usable


def look_sources(run, usable):
    """The source addresses of the default routes, IPv4 first; () if there is no default route. For a source that is not usable, the
    first address of its link that is."""
    probes = {4: "route get 192.0.2.1", 6: "route get 2001:db8::1"}  # documentation addresses: only a default route leads there
    found, why = [], "this node's address on the underlay: the source of the default route"
    for version, probe in probes.items():
        with contextlib.suppress(CNIError):
            for entry in look_ip([probe], run, "", f"-{version}", why):
                source = [each for each in usable if str(each) == entry.get("prefsrc")]
                found += source or [each for each, name in usable.items() if name == entry.get("dev") and each.version == version][:1]
    return tuple(found)


def find_uplinks(context):
    """(the links by which packets between nodes leave, the same with those of all default routes). The links of the endpoints; but if an
    endpoint is on lo or a dummy, as on hosts that speak BGP, those of the default routes, and without one, all links."""
    own = (context.settings.bridge, HOST_VETH)
    real = [link for link in context.links if "LOOPBACK" not in link["flags"] and link["ifname"] not in own and not is_pod_link(link)]
    real = [link for link in real if link.get("linkinfo", {}).get("info_kind") not in ("dummy", "vrf")]
    hops = [hop for entry in context.routes if entry["dst"] == "default" for hop in (entry, *entry.get("nexthops", ()))]
    ways = [link for link in real if link["ifname"] in {hop.get("dev") for hop in hops}]
    having = [link for link in context.links if any(each.ip in context.endpoints for each, _ in interfaces_of(link))]
    underlay = [link for link in having if link in real]
    if len(underlay) < len(having):
        underlay += ways or [link for link in real if "UP" in link["flags"]]
    return underlay, underlay + ways


def ensure_mtu(context):
    """Find the pods' MTU, unless --mtu gives it. CNIError 7 if it cannot be known."""
    settings, before = context.settings, context.mtu
    if not context.endpoints:
        here = f"neither the Node's InternalIP ({listed(context.internal_ips)}) nor a" if context.internal_ips else "no"
        raise config_error(f"{here} default route tells an address of this host for the other nodes: give it with --endpoint")
    links = find_uplinks(context)[0]
    if not links and not settings.mtu:
        raise config_error(f"no interface has the address --endpoint {', '.join(map(str, context.endpoints))}; is it up?")
    overhead = max(UNDERLAY_OVERHEAD[endpoint.version] for endpoint in context.endpoints)
    left = min((link["mtu"] for link in links), default=65535) - overhead
    context.mtu = settings.mtu or left
    if context.mtu < smallest_mtu(settings.pod_cidrs):
        raise config_error(f"the underlay's MTU leaves {context.mtu} bytes for pods, too little; set --mtu, or raise the underlay's")
    if before not in (0, context.mtu):
        log.warning("the MTU of new pods is %d, it was %d; pods that run keep theirs", context.mtu, before)
    if context.mtu > left and before != context.mtu:
        log.warning("--mtu %d is more than the underlay leaves for pods, %d: large packets will be lost between nodes", context.mtu, left)


def ensure_floor(context):
    """The floor of the host. It comes before everything else: what cannot go through the tunnel goes nowhere. CNIError 7 if that would
    cut off another network of the host; one that appears when there is a floor is reported at the end of the pass."""
    settings, run = context.settings, context.run
    loaded = context.loaded.get("host", [""])[0]
    if context.clash and not all(str(cidr) in loaded for cidr in settings.cluster_cidrs):
        raise config_error(context.clash)
    lines = missing_routes(floor_routes([*settings.cluster_cidrs, *settings.pod_cidrs]), look_routes(run))
    apply_lines(lines, run, "the floor: without the tunnel, traffic for the cluster goes nowhere")
    ensure_rules(settings.cluster_cidrs, run, "the floor, for when all routes are gone")
    ensure_firewall(context, "host", lambda counts: host_firewall(settings, counts))


def ensure_rules(cidrs, run, why):
    """The agent's routing rules are those of the floor for these networks. Rules of others stay, whatever their priority."""
    rules = floor_rules(cidrs)
    for version in kernel_families():
        wanted = rules[version]
        found = look_ip(["rule show"], run, "", f"-{version}", "the agent's routing rules")
        present = mncni.understood("ip", parse_rules, found)
        lines = [f"rule add {rule} protocol {ROUTE_PROTOCOL}" for rule in wanted if rule not in present]
        lines += [f"rule delete {rule} protocol {ROUTE_PROTOCOL}" for rule in present if rule not in wanted]
        if lines:
            apply([Command(["ip", f"-{version}", "-batch", "-"], mncni.guarded(lines), why)], run)


def ensure_firewall(context, where, text_of):
    """Load the table "inet mncni" of the host or the namespace ("ns"), unless it is as it was loaded. text_of(counts): its text."""
    netns = context.settings.netns if where == "ns" else ""
    listing, counts = look_firewall(context.run, netns)
    text, expected = context.loaded.get(where, ["", None])
    if listing == expected and text == text_of({}):
        return
    if counts["leaked"][0]:
        log.warning("%d packets for pods or Services were about to leave in clear and were dropped", counts["leaked"][0])
    why = f"replace the firewall of the {'namespace' if netns else 'host'}, in one transaction"
    apply([Command(in_netns(netns, ["nft", "-f", "-"]), text_of(counts), why)], context.run)
    context.loaded[where] = [text_of({}), look_firewall(context.run, netns)[0]]
    write_if_changed(os.path.join(context.settings.run_dir, "firewall.json"), json.dumps(context.loaded) + "\n")


def look_firewall(run, netns):
    """parse_nft of the table "inet mncni"."""
    command = Command(in_netns(netns, ["nft", "-j", "list", "table", "inet", "mncni"]), "", "is the firewall as it was loaded?")
    return mncni.understood("nft", parse_nft, ask(command, run).stdout)


def ensure_namespace(context):
    """The namespace with its floor and its firewall."""
    settings, run = context.settings, context.run
    facts = look_namespace(context)
    if facts is None:
        apply([Command(["ip", "netns", "add", settings.namespace], "", "the namespace of the tunnel")], run)
        tell_repair(context, f"the namespace {settings.namespace} was gone, and with it the tunnel")
        facts = look_namespace(context)
    refuse_foreign_namespace(settings, facts)
    lines = [f"link set dev {link['ifname']} up" for link in facts if link.get("ifname") == "lo" and "UP" not in link["flags"]]
    lines += missing_routes([entry for entry in ns_routes(settings) if entry["kind"] == "unreachable"], look_routes(run, settings.netns))
    apply_lines(lines, run, "the floor of the namespace: what has no route goes nowhere", settings.netns)
    ensure_firewall(context, "ns", lambda counts: ns_firewall(settings))


def tell_repair(context, what):
    """Log what a network lacked that was up before in this boot."""
    if os.path.exists(os.path.join(context.settings.run_dir, "ready")):
        log.warning("repaired: %s", what)


def refuse_foreign_namespace(settings, facts):
    """CNIError 7 if the namespace has links that the agent did not make."""
    foreign = sorted(link["ifname"] for link in facts if "ifname" in link and link["ifname"] not in ("lo", DEVICE, NS_VETH))
    if foreign:
        raise config_error(f'namespace "{settings.namespace}" is somebody else\'s: it has {", ".join(foreign)}; set --namespace')


def look_namespace(context):
    """Links and addresses in the namespace, None if there is none. A name that is left of a deleted namespace is removed."""
    settings = context.settings
    try:
        return look_ip(["address show"], context.run, settings.netns, why="links of the tunnel's namespace")
    except CNIError as error:
        if error.code != mncni.BAD_NETNS:
            raise
        if os.path.lexists(settings.netns):
            apply([Command(["ip", "netns", "delete", settings.namespace], "", "a name without a namespace")], context.run)
        return None


def ensure_links(context):
    """The veth pair and the WireGuard device: where they belong, up, with the right MTU."""
    settings, run = context.settings, context.run
    host = look_ip([f"address show dev {HOST_VETH}", f"address show dev {DEVICE}"], run, why="the agent's links in the host")
    inside = look_ip(["address show"], run, settings.netns, why="the agent's links in the namespace")
    apply(plan_veth(settings, context.mtu, find_link(HOST_VETH, host), find_link(NS_VETH, inside)), run)
    device = find_link(DEVICE, inside)
    if device is None:
        device = move_device(context, find_link(DEVICE, host))
        tell_repair(context, f"the WireGuard device {DEVICE} was gone")
    apply(plan_link(DEVICE, device, context.mtu, settings.netns), run)


def plan_link(name, link, mtu, netns=""):
    """Commands that give a link this MTU and bring it up, if it is not so."""
    lines = [f"link set dev {name} mtu {mtu}"] if link.get("mtu") != mtu else []
    lines += [] if "UP" in link.get("flags", []) else [f"link set dev {name} up"]
    return [ip_batch(lines, netns, f"{name} is up, with the pods' MTU")] if lines else []


def refuse_foreign(link, way_out="rename or remove it"):
    """CNIError 7 for a link (or None) that the agent did not make."""
    if link is not None and not mncni.is_own(link):
        raise config_error(f'link "{link["ifname"]}" is somebody else\'s: it lacks the alias "{mncni.OWNER_ALIAS}"; {way_out}')


def plan_veth(settings, mtu, host, inside):
    """Commands for the veth pair. host, inside: its two ends as find_link finds them. If one end is missing or not set up, what is left
    is deleted and the pair is made anew. CNIError 7 if the host's end is somebody else's."""
    refuse_foreign(host)
    if host and inside and "ifalias" in host:
        return plan_link(HOST_VETH, host, mtu) + plan_link(NS_VETH, inside, mtu, settings.netns)
    inner_first = [ip_batch([f"link delete dev {NS_VETH}"], settings.netns, "remove half a veth pair")] if inside else []
    lines = [f"link delete dev {HOST_VETH}"] if host and not inside else []
    host_mac, ns_mac = mncni.mac_of(HOST_VETH, "0a:59"), mncni.mac_of(NS_VETH, "0a:59")
    peer = f"peer name {NS_VETH} netns {settings.netns} mtu {mtu} address {ns_mac}"
    lines.append(f"link add name {HOST_VETH} mtu {mtu} address {host_mac} type veth {peer}")
    lines.append(f"link set dev {HOST_VETH} alias {mncni.OWNER_ALIAS} up")
    pair = ip_batch(lines, "", "the veth pair between the host and the tunnel's namespace")
    return [*inner_first, pair, ip_batch([f"link set dev {NS_VETH} up"], settings.netns, "its end in the namespace")]


def move_device(context, device):
    """Create the WireGuard device in the host, so that its UDP socket stays there, and move it into the namespace. device: one that an
    agent left in the host when it was killed, or None. Returns {}, the device as a link of which nothing is known."""
    if device is None:
        create_device(context)
    elif not is_wireguard(device):
        raise config_error(f'link "{DEVICE}" is somebody else\'s: it is no WireGuard device; rename or remove it')
    lines = [f"link set dev {DEVICE} alias {mncni.OWNER_ALIAS}", f"link set dev {DEVICE} netns {context.settings.netns}"]
    apply([ip_batch(lines, "", "move the device; its UDP socket stays in the host, where it was created")], context.run)
    return {}


def is_wireguard(link):
    """Whether a link may be the agent's device, even before it has its alias. Devices of wireguard-go are of kind tun."""
    return link["ifname"] == DEVICE and link.get("linkinfo", {}).get("info_kind") in ("wireguard", "tun")


def create_device(context):
    """Create a WireGuard device in the host: the kernel's, or else wireguard-go's. CNIError 4 if there is neither."""
    command = ip_batch([f"link add name {DEVICE} type wireguard"], "", "the WireGuard device")
    reply = context.run(command)
    if reply.exit_code == 0:
        return
    if not any(words in reply.stderr for words in ("not supported", "Unknown device type")):
        raise mncni.command_failed(command, reply)
    with contextlib.suppress(CNIError):  # a wireguard-go that is ending deletes the socket of this name, even a new one
        wait_until(lambda: not os.path.exists(WIREGUARD_GO_SOCKET), 1, "")
    try:
        with open(os.path.join(context.settings.run_dir, "wireguard-go.log"), "a", encoding="utf-8") as output:
            # It carries the node's traffic and outlives the agent, so it gets a session of its own.
            context.daemons.append(start_process(["wireguard-go", "-f", DEVICE], output, output, start_new_session=True))
    except FileNotFoundError:
        what = "this kernel has no WireGuard (module wireguard) and there is no program wireguard-go"
        raise CNIError(mncni.BAD_ENVIRONMENT, f"{what}: load the one, or install the other (package wireguard-go)") from None
    silent = "no answer from wireguard-go, whose log is in --run-dir"
    dump = Command(["wg", "show", DEVICE, "dump"], "", "does wireguard-go answer?")
    wait_until(lambda: context.run(dump).exit_code == 0, 10, silent)
    # wireguard-go notices changes of its MTU only while the device is in the host; with a wrong MTU it pads full packets, which are then
    # fragmented. It handles one event after another and opens its port last, so the port says that the MTU is known.
    lines, why = [f"link set dev {DEVICE} mtu {context.mtu}", f"link set dev {DEVICE} up"], "wireguard-go learns its MTU in the host only"
    apply([ip_batch(lines, "", why)], context.run)
    wait_until(lambda: parse_dump(context.run(dump).stdout)["port"], 10, silent)


def start_process(argv, stdout, stderr, **options):
    """Start a process that keeps running; context.run is for commands that end."""
    environ = {**os.environ, "LOG_LEVEL": "error", "PATH": mncni.search_path(os.environ)}
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environ, **options)


def wait_until(is_so, timeout_s, what):
    """Wait until is_so() is true. CNIError 100 with the text `what` after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise CNIError(mncni.COMMAND_FAILED, f"{what} (waited {timeout_s} s)")
        time.sleep(0.05)


def look_device(context):
    """parse_dump of the WireGuard device."""
    command = Command(in_netns(context.settings.netns, ["wg", "show", DEVICE, "dump"]), "", "the device's key, port and peers")
    return parse_dump(ask(command, context.run, may_be_gone=False).stdout)


def set_device(context, changes, why):
    """Change the device. changes: lists of words for `wg set`; so many of them go together as fit on a command line."""
    for start in range(0, len(changes), 100):
        words = [word for change in changes[start : start + 100] for word in change]
        apply([Command(in_netns(context.settings.netns, ["wg", "set", DEVICE, *words]), "", why)], context.run)


def ensure_identity(context):
    """The device's key and port. Each is set only if it differs, because wireguard-go drops packets each time."""
    settings, device = context.settings, look_device(context)
    changes = [["listen-port", str(settings.port)]] if device["port"] != settings.port else []
    if device["private_key"] and look_secret(f"{settings.key_path}.new") == device["private_key"]:
        take_next_key(settings.key_path)  # an agent was killed before it could, see Agent.use_next_key
    if ensure_key(settings.key_path, device["private_key"]) != device["private_key"]:
        changes.append(["private-key", settings.key_path])
    if changes:
        set_device(context, changes, "this node's key and port")
        device = look_device(context)
    context.public_key = device["public_key"]


def ensure_bridge(context):
    """The pods' bridge with exactly the gateway addresses: those of a former pod CIDR are removed."""
    settings = context.settings
    conf = {"bridge": settings.bridge, "mtu": context.mtu, "forceAddress": True, "adoptBridge": False}
    bridge = find_link(settings.bridge, look_ip([f"address show dev {settings.bridge}"], context.run, why="the pods' bridge"))
    refuse_foreign(bridge, "give --bridge another name")
    mncni.refuse_foreign_bridge(conf, bridge)
    gateways = [f"{gateway}/{cidr.prefixlen}" for cidr, gateway in settings.gateways.items()]
    lines = mncni.plan_bridge(conf, bridge, [] if bridge else gateways, keeps_mtu=True)
    wanted = {*gateways, BRIDGE_LINK_LOCAL} if 6 in settings.families else set(gateways)
    lines += plan_addresses(settings.bridge, wanted, bridge) if bridge else []
    apply_lines(lines, context.run, "the bridge: every pod's veth is a port of it, its addresses are the pods' gateways")
    if bridge is None:
        tell_repair(context, f"the bridge {settings.bridge} was gone")
    apply(mncni.plan_bridge_sysctls(mncni.look_bridge_sysctls(settings.bridge, bridge)), context.run)


def ensure_addresses(context):
    """The addresses of the veth pair and the routes, in the host and in the namespace. Routes that are no longer wanted go last."""
    settings, run = context.settings, context.run
    gateways = {f"{gateway}/{gateway.max_prefixlen}" for gateway in settings.gateways.values()}
    gateways |= {HOST_LINK_LOCAL} if 6 in settings.families else set()
    next_hops = {f"{NEXT_HOPS[version]}/{ {4: 32, 6: 64}[version] }" for version in settings.families}
    for name, wanted, routes, netns in (
        (HOST_VETH, gateways, host_routes(settings), ""),
        (NS_VETH, next_hops, ns_routes(settings), settings.netns),
    ):
        links = look_ip([f"address show dev {name}"], run, netns, why=f"the addresses of {name}")
        present = look_routes(run, netns)
        lines = plan_addresses(name, wanted, find_link(name, links) or {})  # if the link has just gone, ip will say so
        lines += missing_routes(routes, present) + stale_routes(routes, present)
        apply_lines(lines, run, "addresses of the veth pair; routes: pods of other nodes through the tunnel", netns)


def plan_addresses(name, wanted, link):
    """Lines that give a link the wanted addresses and remove others. Link-local addresses that the kernel made stay."""
    stale, missing = addresses_of(link, "global") - wanted, wanted - addresses_of(link)
    lines = [f"address delete {address} dev {name}" for address in sorted(stale)]
    return lines + [f"address replace {address} dev {name}{' nodad' if ':' in address else ''}" for address in sorted(missing)]


def ensure_ports(context):
    """The veths of all pods are ports of the bridge. If somebody deleted the bridge, the new one has the same MAC, so what the pods know
    of their gateway stays right."""
    links = look_ip(["link show type veth"], context.run, why="are the pods' veths ports of the bridge?")
    apply_lines(plan_ports(context.settings.bridge, links), context.run, "pods' veths are ports of the bridge")


def plan_ports(bridge, links):
    lines = []
    for link in links:
        if is_pod_link(link) and link.get("master") != bridge:
            lines.append(f"link set dev {link['ifname']} master {bridge} up")
            lines.append(f"link set dev {link['ifname']} type bridge_slave hairpin on {mncni.SPOOF_PORT}")
    return lines


def is_pod_link(link):
    """Whether a link is the host's end of a pod's veth: the plugin gave it an alias that begins like this."""
    return "ifname" in link and link.get("ifalias", "").startswith(f"{mncni.OWNER_ALIAS}:{NETWORK}:")


def ensure_host_ports(context):
    """The plugin's host ports, and what pods may send. Somebody may have flushed nft, or the bridge may be new."""
    for problem in mncni.restore_tables(mncni.DEFAULT_RUN_DIR, context.run):
        log.warning("repaired: %s", problem)


def ensure_forwarding(context):
    """The namespace and the host forward packets for the pods, in the host between the bridge, the veth pair and the uplinks. The namespace
    has no reverse path filter: its routes are few and strict already."""
    settings, run, uplinks = context.settings, context.run, find_uplinks(context)[1]
    looked = (look_ip(["netconf show"], run, netns, why="which links forward packets?") for netns in (settings.netns, ""))
    inside, host = ([entry for entry in entries if "interface" in entry] for entries in looked)
    filtered = [f"net/ipv4/conf/{entry['interface']}/rp_filter" for entry in inside if entry.get("rp_filter", "off") != "off"]
    off = stopped_forwarding(inside, (4, 6), (NS_VETH, DEVICE))
    stopped = stopped_forwarding(host, settings.families, (settings.bridge, HOST_VETH, *(link["ifname"] for link in uplinks)))
    accepting = look_advertised(context.links, uplinks) if "net/ipv6/conf/all/forwarding" in stopped else []
    rows = (
        (off, 1, settings.netns, "the namespace routes between the host and the tunnel"),
        (sorted(filtered), 0, settings.netns, "no reverse path filter in the namespace"),
        (accepting, 2, "", "accept router advertisements although the host forwards"),
        (stopped, 1, "", "the host routes between the bridge, the tunnel and its uplinks"),
    )
    apply([mncni.write_sysctls(keys, value, netns, why) for keys, value, netns, why in rows if keys], run)


def ensure_bridged(context):
    """Packets between two pods of this node pass the host's netfilter, where kube-proxy (or a network policy) may be. Otherwise a pod that
    asks a Service gets the answer of a backend beside it untranslated, and drops it. Each network namespace has sysctls of its own."""
    keys = [f"net/bridge/bridge-nf-call-{ {4: 'iptables', 6: 'ip6tables'}[version] }" for version in context.settings.families]
    values = {} if context.settings.nodes_dir else {key: mncni.read_file(f"/proc/sys/{key}") for key in keys}
    off = [key for key, value in values.items() if value == "0\n"]
    if off:
        apply([mncni.write_sysctls(off, 1, "", "Services whose backend is beside the pod: netfilter sees bridged packets")], context.run)
    trouble = UNBRIDGED if None in values.values() else ""
    if trouble != context.unbridged:
        log.warning("%s", trouble or "bridged packets pass netfilter")
    context.unbridged = trouble


def stopped_forwarding(entries, families, names):
    """The sysctls that are to be switched on, from `ip netconf`. "all" sets all links, but only at its change: a link that is younger has
    the default, which may be off (Docker, systemd-networkd). IPv6 forwards by "all" alone."""
    off, keys = {(entry.get("family"), entry["interface"]) for entry in entries if not entry.get("forwarding")}, []
    for version, family in ((4, "inet"), (6, "inet6")):
        links = ["all"] if version == 6 or (family, "all") in off else sorted(set(names))
        keys += [f"net/ipv{version}/conf/{link}/forwarding" for link in links if version in families and (family, link) in off]
    return keys


def look_advertised(links, uplinks):
    """The sysctls that keep the host's routes and addresses by router advertisement, which a host that forwards IPv6 ignores unless
    accept_ra is 2. A link with 0 is left alone: its advertisements are read by systemd-networkd or NetworkManager, or by nobody."""
    learnt = [link for link in links if any(info.get("dynamic") and info.get("family") == "inet6" for info in link.get("addr_info", ()))]
    keys = {f"net/ipv6/conf/{link['ifname']}/accept_ra" for link in (*uplinks, *learnt)}
    return sorted(key for key in keys if mncni.read_file(f"/proc/sys/{key}") == "1\n")


def ensure_peers(context, now, greet=False):
    """The believed nodes are the device's peers. greet: the peers know this node's key from a former device, so a new device sends them
    a keepalive."""
    present, fresh = look_device(context)["peers"], changed_keys(context.peers, context.sent)
    greetable, context.greeted = limit_greetings({key: context.peers[key]["name"] for key in fresh}, context.greeted, now)
    anew, context.awaited = plan_greetings(context.awaited, present, greetable, context.public_key, now)
    changes = plan_peers(context.peers, present, context.sent, anew)
    if greet and not present:
        changes += greetings(context.peers)
    if greetable:
        time.sleep(LEAD_S)
    set_device(context, changes, "peers: the nodes whose record is believed")
    context.sent = context.peers


FLOOR = (ensure_host, ensure_endpoints, ensure_floor)
STAGES = (
    ensure_mtu,
    ensure_namespace,
    ensure_links,
    ensure_identity,
    ensure_bridge,
    ensure_ports,
    ensure_addresses,
    ensure_forwarding,
    ensure_bridged,
    ensure_host_ports,
)


def conflist(settings, mtu):
    """The text of the CNI configuration of this node. The chained plugins (portmap, bandwidth, lat) cost a pod that does not use them
    nothing."""
    plugin = {
        "type": "mncni",
        "plugin": ["naivewg", "portmap", "bandwidth", "lat"],
        "capabilities": dict.fromkeys(("ips", "mac", "portMappings", "bandwidth", "io.kubernetes.cri.pod-annotations"), True),
        "bridge": settings.bridge,
        "mtu": mtu,
        "ready": os.path.join(settings.run_dir, "ready"),
        "spoofCheck": True,
        "ipam": {"ranges": [[{"subnet": str(cidr)}] for cidr in settings.pod_cidrs]},
    }
    return json.dumps({"cniVersion": "1.0.0", "cniVersions": ["1.0.0", "1.1.0"], "name": NETWORK, "plugins": [plugin]}, indent=2) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Can pods start? The runtime starts the plugin on the node itself, which may lack what the agent's container has.
# ---------------------------------------------------------------------------------------------------------------------

HOST_ROOT = "/host"  # where the agent's container has the file system of the node, see deploy/naivewg/daemonset.yaml
PYTHON = "/usr/bin/python3"
OLD_PYTHON = f"import sys; sys.version_info < (3, 9) and sys.exit('{PYTHON} is Python %s, older than 3.9' % sys.version.split()[0])"


def host_root(settings):
    """The directory that is the node's "/", for the agent: "" if it runs on the node itself. None in a container without one."""
    program = os.path.join(settings.bin_dir, "mncni.py")
    with contextlib.suppress(OSError):
        if os.path.samefile(HOST_ROOT + program, program):
            return HOST_ROOT
    return None if "KUBERNETES_SERVICE_HOST" in os.environ else ""


def look_files(settings):
    """What stat(2) says of the files that a runtime needs: it changes when somebody changes them."""
    names, found = [os.path.join(settings.bin_dir, name) for name in ("", "mncni", "mncni.py")], []
    for path in (settings.conf_dir, *names, (host_root(settings) or "") + PYTHON):
        with contextlib.suppress(OSError):
            found.append((path, os.stat(path).st_ino, os.stat(path).st_ctime_ns))
    return found


def try_plugin(settings, mtu, run):
    """Why a pod would not start, "" if it would. This starts the installed plugin as a runtime does, with STATUS. Two keys are left out:
    "ready", because the answer would be what the agent itself has said before, and "ipam", because a full pool is no fault."""
    conf = json.loads(conflist(settings, mtu))
    plugin = {**mncni.without(conf["plugins"][0], "ready", "ipam"), "cniVersion": conf["cniVersions"][-1], "name": NETWORK}
    program, root = os.path.join(settings.bin_dir, "mncni"), host_root(settings)
    prefix, environ = ["chroot", root] if root else [], {"CNI_COMMAND": "STATUS", "CNI_PATH": settings.bin_dir}
    commands = [
        Command([*prefix, PYTHON, "-IS", "-c", OLD_PYTHON], "", "is there a python3 for the plugin?"),
        Command([*prefix, program], json.dumps(plugin), "does the plugin start, as a runtime starts it?", environ),
    ]
    for command in commands if root is not None else ():
        trouble = look_trouble(command, run)
        if trouble:
            return f"the runtime cannot start {program} on this node, which needs {PYTHON}, iproute2 and util-linux: {trouble}"
    return look_rival(settings.conf_dir) or look_disk(mncni.DEFAULT_DATA_DIR)


def look_trouble(command, run):
    """Why a command fails, "" if it does not."""
    try:
        reply = run(command)
    except (CNIError, OSError) as error:
        return str(error)
    said = (reply.stderr.strip() or f"exit status {reply.exit_code}").splitlines()[-1]
    with contextlib.suppress(CNIError):
        said = mncni.parse_json_object(reply.stdout).get("msg", said)
    return said if reply.exit_code else ""


def look_rival(conf_dir):
    """Whether a runtime takes another CNI configuration than the agent's, as text, "" if not: it takes the first by name. One that names
    this network, like Multus's, leads to it."""
    for name in sorted(os.listdir(conf_dir)) if os.path.isdir(conf_dir) else ():
        path = os.path.join(conf_dir, name)
        text = "".join((mncni.read_file(path) or "").split()) if name < CONFLIST and name.endswith((".conflist", ".conf", ".json")) else ""
        if text and not any(words in text for words in (CONFLIST, f'"name":"{NETWORK}"', f'"clusterNetwork":"{NETWORK}"')):
            return f"pods get the network of {path}, which comes before {CONFLIST}: remove it, or give it a later name"
    return ""


def look_disk(directory):
    """Why no lease can be written below a directory, which may not be there yet; "" if one can."""
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        return f"the plugin cannot write leases below {mncni.DEFAULT_DATA_DIR}: {error.strerror}"
    return ""


def look_stranded(settings):
    """{container ID: [address]} of running pods whose addresses are in none of this node's pod CIDRs, as after the node got others."""
    leases, stranded = mncni.Leases(mncni.DEFAULT_DATA_DIR, NETWORK, settings.run_dir), {}
    for address in kube.parse_addresses(sorted(os.listdir(leases.dir)) if os.path.isdir(leases.dir) else ()):
        holder = None if is_in(address, settings.pod_cidrs) else leases.holder(address)
        if holder and os.path.exists(f"/sys/class/net/{mncni.host_ifname('mn', NETWORK, *holder)}"):
            stranded.setdefault(holder[0], []).append(str(address))
    return stranded


def stranded_text(stranded):
    """What to do about the pods of look_stranded, "" if there are none."""
    pods = listed(f"{', '.join(addresses)} (container {container[:13]})" for container, addresses in stranded.items())
    what = f"{len(stranded)} running pods have no network, because their addresses are in no pod CIDR of this node any more"
    return f"{what}: {pods}; delete these pods, so that they start anew" if stranded else ""


# ---------------------------------------------------------------------------------------------------------------------
# The agent: the loop. An event only says that it is time for a pass; each pass starts from the present state of the kernel.
# ---------------------------------------------------------------------------------------------------------------------


class Monitors:
    """The processes `ip monitor` and `nft monitor`, which print changes of the kernel. Their output only says that it is time to look.

    Both run in the host, because a process in the namespace would keep the namespace alive when somebody deletes it. `all-nsid` prints
    the links and routes of the namespace as well; of its nft nothing is printed, see Agent.is_tunnel_changed. They end with the agent.
    """

    COMMANDS = (["ip", "monitor", "all-nsid", "link", "address", "route", "rule", "netconf"], ["nft", "monitor"])
    # In lines about: our links and table, our routes and rules, sysctls of all links, addresses, a link that stops forwarding.
    WORDS = (b"mn", b"proto 201", b" all ", b" inet", b" forwarding off")

    def __init__(self, netns):
        self.netns = netns
        self.inode = None
        self.running = {}  # {"ip" or "nft": process}

    def tend(self):
        """Start what is not running. Returns whether the namespace is a different one, or gone."""
        for command in self.COMMANDS:
            process = self.running.get(command[0])
            if process is None or process.poll() is not None:
                process = start_process(["setpriv", "--pdeathsig", "KILL", *command], subprocess.PIPE, subprocess.DEVNULL)
                os.set_blocking(process.stdout.fileno(), False)
                self.running[command[0]] = process
        inode = os.stat(self.netns).st_ino if os.path.exists(self.netns) else None
        changed, self.inode = inode != self.inode, inode
        return changed

    def wait(self, wakeup, timeout_s):
        """Wait for an event, a byte from the pipe `wakeup`, or the end of the time. Returns whether there was an event that concerns us."""
        outputs = [process.stdout for process in self.running.values()]
        ready, _, _ = select.select([wakeup, *outputs], [], [], timeout_s)
        if wakeup in ready:
            os.read(wakeup, 4096)
        said = [output.read(1 << 20) or b"" for output in outputs if output in ready]
        if b"" in said:  # a monitor has ended or cannot start; tend() starts it again, but not at once
            select.select([wakeup], [], [], POLL_S)
        return any(word in text for text in said for word in self.WORDS)

    def stop(self):
        for process in self.running.values():
            process.kill()
            process.wait()


class Agent:
    """The agent of a node. store: a Store. clock: seconds that only go forward. For kube.pages it has clock, beat and reason."""

    def __init__(self, settings, store, run, clock=time.monotonic):
        self.store, self.clock = store, clock
        loaded = load_json(os.path.join(settings.run_dir, "firewall.json"), check_loaded)
        self.context = Context(settings, run, mncni.boot_id(), loaded=loaded)
        self.roster, self.flagged_services = Roster(settings), settings.service_cidrs
        self.state_path = os.path.join(settings.state_dir, "nodes.json")
        self.state = load_state(self.state_path)
        self.records = dict(self.state["records"])  # {name: text}, the records in use
        self.quarantine = {}  # {name: reason}
        self.stored = None  # this node's record as the store has it
        self.doubt_until = None  # a time of clock; until then, nodes that have vanished are kept
        self.store_trouble = ""
        self.reason = "starting"  # why the network is not up, "" if it is
        self.stranded = {}  # see look_stranded
        self.tried, self.next_try, self.plugin_trouble = None, 0, ""  # see check_plugin
        self.counts, self.beat = kube.Counts(), clock()  # beat: when the loop last came round
        self.next_pass = self.next_glance = 0
        self.news, self.debt_s, self.ticked = False, 0.0, clock()  # debt_s: what news have cost, less what time has paid off, see NEWS_S
        self.remade = {}  # {node name: a time of clock, when its peer was made anew}
        self.key_left = None  # whether there was a next key in the last pass
        self.calm = 0  # a time of clock; from then on, a new key may be told
        self.wall_offset = os.path.getmtime(self.state_path) - uptime() if os.path.exists(self.state_path) else 0

    def tick(self, event=False):
        """One turn of the loop: look at the store, and make a pass if something has happened or it is time. Returns whether the network
        is up."""
        begin = self.clock()
        self.debt_s, self.ticked = max(0, self.debt_s - NEWS_SHARE * (begin - self.ticked)), begin
        self.news = self.is_set_back() or self.store.changed() or self.is_key_left() or self.news
        look = event or bool(self.reason) or begin >= self.next_pass or (not self.news and self.is_tunnel_changed())
        due = (self.news and self.debt_s < NEWS_S) or (self.doubt_until is not None and begin >= self.doubt_until) or self.wait_s() == 0
        if not (due or look):
            return not self.reason
        self.news = False
        try:
            self.reconcile(look)
            self.next_pass = self.clock() + AUDIT_S if look else self.next_pass
            self.say("")
        except Exception as error:  # whatever it is: the network stays, and the next pass starts from the present state
            self.next_pass = self.clock() + 1
            details = getattr(error, "details", "").splitlines()
            reason = (str(error) or type(error).__name__) + (f" ({details[0]})" if details else "")
            if not isinstance(error, (CNIError, OSError)) and reason != self.reason:
                log.exception(kube.DEFECT)
            self.say(reason)
        self.write_status()
        self.debt_s = min(self.debt_s + (0 if look else self.clock() - begin), NEWS_S + NEWS_SHARE)  # paid off in a second
        for name, amount in (("passes", 1), ("seconds", self.clock() - begin), ("errors", bool(self.reason))):
            self.counts.add(f"mncni_reconcile_{name}_total", amount)
        return not self.reason

    def is_set_back(self):
        """Whether the time of day was set back since the last call, or since the last agent. If so, the record says it: the other nodes
        have to make this node's peer anew, see plan_peers."""
        offset = time.time() - uptime()
        set_back_s, self.wall_offset = self.wall_offset - offset, offset
        if set_back_s < SET_BACK_S:
            return False
        log.warning("the clock was set back by %.0f s: the record asks the other nodes to add this node's peer anew", set_back_s)
        self.state["own"]["set_back"] = int(time.time())
        return True

    def is_key_left(self):
        """Whether a next key was left beside the key since the last pass, see rotate."""
        return self.key_left != os.path.lexists(f"{self.settings.key_path}.new")

    def wait_s(self):
        """How long the agent has nothing to do, if there are no events."""
        times = [] if self.reason else [due for due, _ in self.context.awaited.values()]
        return max(0, min([POLL_S, *(due - self.clock() for due in times)]))

    def is_tunnel_changed(self):
        """Whether the peers, the namespace's firewall or the plugin's files differ from what the agent set. No monitor tells of them, so
        this looks, at most every GLANCE_S."""
        context = self.context
        if self.clock() < self.next_glance or self.reason:
            return False
        self.next_glance = self.clock() + GLANCE_S
        try:
            device = look_device(context)
            loaded = context.loaded.get("ns", [])[1:]
            firewall = [look_firewall(context.run, self.settings.netns)[0]] if loaded else []
        except CNIError:
            return True
        doubts, context.heard = doubted(context.peers, device["peers"], context.heard, self.clock())
        for key in doubts:
            name, endpoint = context.peers[key]["name"], device["peers"][key]["endpoint"]
            log.warning("node %s: its endpoint %s, from which nothing comes, is set back to the record's", name, endpoint)
        context.sent = {key: peer for key, peer in context.sent.items() if key not in doubts}  # ensure_peers sets these anew
        if doubts or look_files(self.settings) != self.tried:
            return True
        allowed = {key: peer["allowed_ips"] for key, peer in device["peers"].items()}
        wanted = {key: peer["allowed_ips"] for key, peer in context.peers.items()}
        return allowed != wanted or device["port"] != self.settings.port or firewall != loaded

    def reconcile(self, look=True):
        """One pass: the stages, the store, this node's record, then the files that let pods in. look False: only the store has news, so
        the stages are left out."""
        context = self.context
        mncni.own_directory(self.settings.run_dir)
        adopted, trouble = self.adopt()
        for stage in FLOOR if look or adopted or trouble else ():
            stage(context)
        if trouble:
            raise config_error(trouble)
        for stage in STAGES if look or adopted else ():
            stage(context)
        if context.sent is None:  # the first pass: what the agent before this one has set
            self.judge()
            context.sent = context.peers
        troubles = [self.read_store(), self.store.trouble, *self.attempt(self.use_next_key)]
        self.judge()
        ensure_peers(context, self.clock(), greet=context.public_key in self.state["own"].get("text", ""))
        troubles += self.attempt(self.look_for_next_key, self.publish, self.use_next_key, self.save_state)
        self.note(troubles)
        if context.clash:
            raise config_error(context.clash)
        if look or adopted:
            mncni.install(self.settings.bin_dir)
            self.check_stranded()
            self.check_plugin()
        write_if_changed(os.path.join(self.settings.run_dir, "ready"), self.ready_text(""))
        path = os.path.join(self.settings.conf_dir, CONFLIST)
        if write_if_changed(path, conflist(self.settings, context.mtu)):
            log.info("wrote %s: pods can start", path)

    def check_plugin(self):
        """CNIError 4 if pods cannot start, see try_plugin. It is tried at the start, when files have changed, and every TRY_S."""
        files = look_files(self.settings)
        if files != self.tried or self.clock() >= self.next_try:
            self.plugin_trouble = try_plugin(self.settings, self.context.mtu, self.context.run)
            self.tried, self.next_try = files, self.clock() + (RETRY_S if self.plugin_trouble else TRY_S)
        if self.plugin_trouble:
            raise CNIError(mncni.BAD_ENVIRONMENT, self.plugin_trouble)

    def check_stranded(self):
        """Tell of running pods whose addresses are no longer this node's. The network itself is up: new pods work."""
        before, self.stranded = self.stranded, look_stranded(self.settings)
        if self.stranded != before:
            log.warning("%s", stranded_text(self.stranded) or "no running pod has an address outside this node's pod CIDRs any more")
        if set(self.stranded) - set(before):
            self.store.note(self.settings.node_name, "PodsWithoutNetwork", stranded_text(self.stranded))

    @property
    def settings(self):
        return self.context.settings

    def adopt(self):
        """Take over the pod CIDRs and InternalIPs that the cluster gave this node, or the last known ones. Returns (whether they have
        changed, why the pass cannot go on or "")."""
        given, own = self.store.identity(), self.state["own"]
        if given is None:
            return False, ""
        own.update(given)
        former, self.context.internal_ips = self.context.internal_ips, tuple(kube.parse_addresses(own.get("addresses", ())))
        moved = self.adopt_services() or former != self.context.internal_ips
        if not own.get("podCIDRs"):
            waiting = "this node has no pod CIDR yet (spec.podCIDRs), which the controller manager or `nodeipam.py` gives"
            return moved, self.store.trouble or waiting
        cluster_cidrs, cidrs = self.settings.cluster_cidrs, tuple(ipaddress.ip_network(text, strict=False) for text in own["podCIDRs"])
        trouble = kube.address_trouble("this node's address", self.context.internal_ips, cluster_cidrs)
        trouble = trouble or pod_cidr_trouble("spec.podCIDRs", cidrs, cluster_cidrs)
        if trouble or cidrs == self.settings.pod_cidrs:
            return moved, trouble
        self.context.settings = self.roster.settings = replace(self.settings, pod_cidrs=cidrs)
        return True, ""

    def adopt_services(self):
        """Take over the networks of Services that --service-cidr names, or else the cluster, or the last known ones. Returns whether they
        have changed. One that contains an address of this node is ignored: the node would be cut off."""
        own = self.state["own"]
        own.update({} if self.store.service_cidrs is None else {"serviceCIDRs": self.store.service_cidrs})
        context = self.context
        named = self.flagged_services or tuple(map(ipaddress.ip_network, own.get("serviceCIDRs", ())))
        mine = (*self.settings.endpoints, *context.internal_ips, *context.endpoints)
        cidrs = tuple(cidr for cidr in named if not any(each in cidr for each in mine))
        changed = cidrs != self.settings.service_cidrs
        if changed and cidrs != named:
            ignored = ", ".join(str(cidr) for cidr in named if cidr not in cidrs)
            log.warning("an address of this node is among those of Services, %s: what is for these may leave in clear", ignored)
        self.context.settings = self.roster.settings = replace(self.settings, service_cidrs=cidrs)
        return changed

    def read_store(self):
        """Take over the records of the store. Returns why not, or "". The last good records stay while the store cannot be read, while it
        lacks this node's own record, and for HOLD_S when many nodes have vanished at once."""
        hold = self.clock() + HOLD_S
        try:
            records = self.store.records()
        except StoreError as error:
            self.stored, self.doubt_until = None, hold
            return f"{error}; the last good list of nodes stays in use"
        self.stored, self.roster.facts = records.get(self.settings.node_name), self.store.facts()
        if self.stored:
            self.state["own"]["seen"] = True
        if self.stored is None and "seen" in self.state["own"]:
            self.doubt_until = hold
            self.store.look_again()  # the list may have been read at a bad moment, and no change would correct it
            return "the node store has lost this node's record; the last good list of nodes stays in use"
        lost = set(self.context.nodes) - self.roster.sound(records)
        if lost_too_many(lost, self.context.nodes) and self.doubt_until is None:
            self.doubt_until = hold
        if lost and self.doubt_until is not None and self.clock() >= self.doubt_until and not self.store.look_again():
            self.doubt_until = self.clock() + POLL_S
        if lost and self.doubt_until is not None and self.clock() < self.doubt_until:
            self.records = {**records, **{name: self.records[name] for name in lost}}
            return f"good records of {len(lost)} nodes have vanished; keeping these nodes for up to {HOLD_S} s"
        self.doubt_until, self.records = None, records
        return ""

    def look_for_next_key(self):
        """A next key lies beside the key when `agent.py rotate` has left it, or when the key was too old. Then our record tells it, but not
        before the store is well again for CALM_S: the other nodes may need some seconds until they reach it, too."""
        context, path = self.context, self.settings.key_path
        self.key_left = os.path.lexists(f"{path}.new")
        self.calm = self.clock() + CALM_S if self.store.trouble else self.calm
        context.next_key = look_next_key(path, context.run)
        if not context.next_key and (self.key_left or self.is_key_too_old()):
            write_next_key(path, make_key())
            context.next_key = look_next_key(path, context.run)

    def use_next_key(self):
        """The next key takes the place of the key when the store has taken the record that tells it. So the key on disk is always the one
        that the store is known to have told, also for an agent that starts while the store is away."""
        context, path = self.context, self.settings.key_path
        told = f'"key":"{context.next_key}"'
        if context.next_key and any(told in (text or "") for text in (self.stored, self.store.taken)):
            set_device(context, [["private-key", f"{path}.new"]], "this node's new key")  # first, see LEAD_S
            context.public_key, context.next_key = context.next_key, ""
            log.info("this node's key is a new one: %s", context.public_key)
            take_next_key(path)

    def is_key_too_old(self):
        """Whether the key is older than --key-max-age, or than nine tenths of it and more: how much more depends on the key, so that nodes
        of one age do not all change at once."""
        limit_s, share = self.settings.key_max_age, base64.b64decode(self.context.public_key)[0] / 2560
        return limit_s > 0 and time.time() - key_time(self.settings) > limit_s * (1 - share)

    def attempt(self, *acts):
        """Do what the network can do without. Returns why it failed, as a list."""
        troubles = []
        for act in acts:
            try:
                act()
            except (StoreError, CNIError, OSError) as error:
                troubles.append(str(error))
        return troubles

    def note(self, troubles):
        """Log what is wrong with the store, and keep it for the status. Empty texts among the troubles are ignored."""
        trouble = "; ".join(filter(None, dict.fromkeys(troubles)))
        if trouble != self.store_trouble:
            log.log(logging.WARNING if trouble else logging.INFO, "%s", trouble or "the node store is well again")
        self.store_trouble = trouble

    def judge(self):
        """Decide which records are believed, and log what has changed."""
        context = self.context
        self.roster.own_addresses = host_addresses(context.links)
        nodes, quarantine = self.roster.judge(self.records, context.public_key, context.endpoints)
        for name in sorted(set(quarantine) | set(self.quarantine)):
            if quarantine.get(name) != self.quarantine.get(name):
                word = "believed again" if name in nodes else "gone"
                log.warning("node %s: %s", name, f"quarantined: {quarantine[name]}" if name in quarantine else word)
                refusal = ("RecordRefused", f"MNCNI does not connect this node: {quarantine.get(name)}")
                self.store.note(name, *(refusal if name in quarantine else ("RecordAccepted", "MNCNI connects this node again")))
        for name in sorted(set(nodes) ^ set(context.nodes)):
            log.info("node %s %s", name, "joined" if name in nodes else "left")
        self.quarantine, context.nodes = quarantine, nodes
        context.peers = desired_peers(nodes, context.endpoints)
        self.hold_back(context.peers, context.sent or {})

    def hold_back(self, peers, sent):
        """A peer that was made anew for a clock that was set back is left alone for REMAKE_S, whatever its record says: it is greeted each
        time, at any address that the record names."""
        now = self.clock()
        self.remade = {name: at for name, at in self.remade.items() if now < at + REMAKE_S}
        for key, peer in peers.items():
            former = sent.get(key, peer)["set_back"]
            if peer["set_back"] != former and peer["name"] in self.remade:
                peer["set_back"] = former
            elif peer["set_back"] != former:
                self.remade[peer["name"]] = now

    def publish(self):
        """Put this node's record into the store, if it is not there as it should be. StoreError. "gen" grows with each change."""
        own, name, given = self.state["own"], self.settings.node_name, self.store.identity()
        if given is None:
            own.setdefault("uid", str(uuid.uuid4()))
            own.setdefault("created", datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
        own["gen"] = own.get("gen", 1)
        text = self.own_record()
        if own.get("text") not in (None, text):
            own["gen"] += 1
            text = self.own_record()
        stored = self.roster.verdict(name, self.stored or "")
        rival = given is None and "text" in own and isinstance(stored, Node) and stored.uid != own["uid"]
        if rival:  # two agents that overwrite each other would never end
            raise StoreError(f"another node has written the record of {name}: give each node its own --node-name, or remove the record")
        own["text"] = text
        if self.stored != text:
            self.store.publish(name, text)

    def own_record(self):
        own, context = self.state["own"], self.context
        names = (own.get(key) for key in ("gen", "created", "set_back"))
        key = context.next_key if context.next_key and self.clock() >= self.calm else context.public_key
        return format_record(self.settings, own["uid"], context.endpoints, key, *names)

    def save_state(self):
        """Keep the last good list of nodes for the next agent. CNIError, which costs nothing else: the network stands without."""
        believed = {name: self.records[name] for name in self.context.nodes}
        state = {"own": dict(sorted(self.state["own"].items())), "records": believed}
        write_if_changed(self.state_path, json.dumps(state) + "\n", mode=0o600)

    def say(self, reason):
        """Tell the log, the cluster and the plugin that the network is up ("") or why not."""
        if reason != self.reason:
            log.log(logging.ERROR if reason else logging.INFO, "%s", f"the network is not up: {reason}" if reason else "the network is up")
        self.reason = reason
        self.store.say(reason, stranded_text(self.stranded))
        path = os.path.join(self.settings.run_dir, "ready")
        if reason and os.path.exists(path):  # without the file the plugin refuses pods anyway
            with contextlib.suppress(CNIError):
                write_if_changed(path, self.ready_text(reason))

    def ready_text(self, reason):
        ready = {"bootID": self.context.boot_id, "device": HOST_VETH, "port": self.settings.port, "ok": not reason, "reason": reason}
        return json.dumps(ready) + "\n"

    def write_status(self):
        """Write the file that `agent.py status` reads. It has no secrets, and no figures that change by themselves."""
        context, settings = self.context, self.settings
        status = {
            "node": settings.node_name,
            "ok": not self.reason,
            "reason": self.reason,
            "store": self.store_trouble,
            **({} if self.store.identity() is None else {"admission_guard": self.store.guard, "unguarded": list(self.store.unguarded)}),
            "pid": os.getpid(),
            "publicKey": context.public_key,
            "keyTime": key_time(settings),
            "nextKey": context.next_key,
            "podCIDRs": [str(cidr) for cidr in settings.pod_cidrs],
            "endpoints": [str(endpoint) for endpoint in context.endpoints],
            "mtu": context.mtu,
            "peers": [
                {"name": peer["name"], "key": key, "endpoint": peer["endpoint"], "podCIDRs": sorted(peer["allowed_ips"])}
                for key, peer in context.peers.items()
            ],
            "quarantine": self.quarantine,
            "stranded": self.stranded,
            "services": context.unbridged,
        }
        with contextlib.suppress(CNIError):
            write_if_changed(os.path.join(settings.run_dir, "status.json"), json.dumps(status) + "\n")


def run_agent(settings, environ):
    """`agent.py run`: loop until SIGTERM or SIGINT, then leave the network as it is. CNIError if it cannot begin."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    run = mncni.make_run(environ, trace=lambda command: log.debug("%s", command.explained("+ ")))
    if shutil.which("setpriv", path=mncni.search_path(os.environ)) is None:
        raise mncni.missing_tool("setpriv")
    store = make_store(settings, environ, run, lambda: wake(writer))
    store.start()
    agent, monitors, event = Agent(settings, store, run), Monitors(settings.netns), False

    def turn():
        nonlocal event
        agent.tick(event)
        for daemon in agent.context.daemons:
            daemon.poll()  # reaps a wireguard-go that has ended
        changed = monitors.tend()
        event = monitors.wait(reader, 0 if changed else agent.wait_s()) or changed
        if event:
            select.select([reader], [], [], EVENT_S)

    kube.run_loop(agent, turn, settings.listen, look_figures, METRICS)
    monitors.stop()
    log.info("stopping; the network stays as it is")


def make_store(settings, environ, run, wake):
    """The node store that the flags name. CNIError 7."""
    if settings.nodes_dir:
        return DirectoryStore(settings.nodes_dir)
    api = kube.open_api(settings.kubeconfig, environ, run, "mncni-agent", settings.cluster_cidrs)
    return KubernetesStore(api, settings.node_name, wake)


def wake(writer):
    """Wake the loop through the pipe that it waits for."""
    with contextlib.suppress(BlockingIOError):  # a full pipe wakes it as well
        os.write(writer, b"!")


def agent_lock(settings, timeout_s=0):
    """A context manager that keeps other agents off this node. CNIError 11. The kernel releases the lock when the process ends."""
    return mncni.Locked(os.path.join(settings.run_dir, "agent.lock"), timeout_s)


# ---------------------------------------------------------------------------------------------------------------------
# Status
# ---------------------------------------------------------------------------------------------------------------------


def look_status(settings, run):
    """What the agent wrote last, with WireGuard's figures of each peer: {"node", "ok", "reason", "running", "peers": [...],
    "quarantine", ...}. Of a peer, "present": WireGuard has it; "handshake": the last one, in Unix time, 0 for never."""
    status, leases = look_written(settings), len(mncni.Leases(mncni.DEFAULT_DATA_DIR, NETWORK, settings.run_dir).attachments())
    if not status:
        nothing = {"ok": False, "running": False, "peers": [], "quarantine": {}, "leases": leases}
        return {**nothing, "node": settings.node_name, "reason": "no agent has run here since the boot"}
    status.update(running=is_running(settings), leases=leases)
    reasons, present = [status["reason"]], {}
    try:
        present = look_device(Context(settings, run, ""))["peers"]
    except CNIError as error:
        reasons.append(f"the WireGuard device is not there: {error}")
    with_figures(status, present)
    with contextlib.suppress(CNIError):
        status["dropped"] = {name: packets for name, (packets, _) in look_firewall(run, "")[1].items()}
        items = mncni.look_nft(["counter", *mncni.SPOOF.split(), "dropped"], run, "what has spoofCheck dropped?")
        counters = [item["counter"] for item in items if "counter" in item]
        status["dropped"]["spoofed"] = sum(counter["packets"] for counter in counters if counter["name"] == "dropped")
    if not status["running"]:
        reasons.append("no agent is running; the network is as the last one left it")
    reasons.append(stranded_text(status.get("stranded", {})))
    if status["quarantine"]:
        reasons.append(f"records of {len(status['quarantine'])} nodes are quarantined, see below")
    full = [cidr for cidr in status.get("podCIDRs", ()) if leases >= pool_size(cidr)]
    if full:
        reasons.append(f"no address of {full[0]} is free for another pod")
    status["reason"] = next(filter(None, reasons), "")
    status["ok"] = not status["reason"] and not status["store"] and all(peer["present"] for peer in status["peers"])
    return status


def pool_size(cidr):
    """How many addresses of a pod CIDR pods can have: all but the network's, the gateway's and IPv4's broadcast address."""
    cidr = ipaddress.ip_network(str(cidr))  # the text of a file may be hostile: a number would be an address, too
    return max(0, cidr.num_addresses - (3 if cidr.version == 4 else 2))


def look_written(settings):
    """The status as the agent wrote it last, see Agent.write_status; {} if there is none."""
    return load_json(os.path.join(settings.run_dir, "status.json"), check_status)


def is_running(settings):
    """Whether an agent runs here."""
    try:
        with agent_lock(settings):
            return False
    except CNIError:
        return True


def check_status(status):
    """Raise an error for a status that cannot be shown, see load_json. {} can."""
    if status:
        whole = {**with_figures(status, {}), "ok": False, "up": False, "leases": 0}
        texts = [status["reason"], status["store"], status.get("services", ""), stranded_text(status.get("stranded", {}))]
        texts += [*status["quarantine"], *status["quarantine"].values()]
        "".join([*texts, format_status(whole, 0), kube.format_metrics(plan_metrics(whole), METRICS)]).encode()


def with_figures(status, present):
    """The status, with WireGuard's figures added to each peer. present: the peers of parse_dump."""
    for peer in status["peers"]:
        there = present.get(peer["key"], {})
        figures = {key: there.get(key, 0) for key in ("handshake", "rx", "tx")}
        peer.update(figures, present=bool(there), endpoint=there.get("endpoint") or peer["endpoint"])
    return status


def format_status(status, now):
    """The status as text for people, on one screen: what is there, what is wrong, then the peers, those with trouble first. now: Unix
    time."""
    below = "the node store is in trouble" if status.get("store") else "not every node is a peer yet"
    if not status["ok"]:
        word = f"not ok: {status['reason'] or f'{below}, see below'}"
    else:
        word = "ok, but admission policies are missing, see below" if status.get("admission_guard") is False else "ok"
    lines = [f"node {status['node']}: {word}"]
    if status.get("podCIDRs"):
        endpoints = ", ".join(status["endpoints"])
        least = min(map(pool_size, status["podCIDRs"]))
        lines.append(f"pods {', '.join(status['podCIDRs'])}, MTU {status['mtu']}, endpoint {endpoints}")
        lines.append(f"{status['leases']} of {least} addresses for pods are in use")
        lines.append(f"key {status['publicKey']}, {age_text(now - status['keyTime'])} old")
        lines += [f"a new key waits until the node store has it: {status['nextKey']}"] if status["nextKey"] else []
    if "admission_guard" in status:
        missing = f"MISSING: {'; '.join(status.get('unguarded') or ['any node can write any record'])}"
        words = {True: "refuses wrong records, and those of other nodes", False: missing}
        lines.append(f"admission policies: {words.get(status['admission_guard'], 'unknown')}")
    if status.get("store"):
        lines.append(f"node store: {status['store']}")
    lines += [f"Services: {status['services']}"] if status.get("services") else []
    lines += {stranded_text(status.get("stranded", {}))} - {"", status["reason"]}
    lines += [f"{packets} x {DROPS[name].lower()}" for name, packets in status.get("dropped", {}).items() if packets]
    lines += [f"{name}: quarantined: {reason}" for name, reason in sorted(status["quarantine"].items())]
    return "\n".join([*lines, *format_peers(status["peers"], now)]) + "\n"


def look_all_nodes(settings, store):
    """What the API server knows of all Nodes: [{"node", "podCIDRs", "condition", "record", "trouble"}]. The records are judged as a node
    would that is none of these. ApiError."""
    found, none = store.look_all(), {"node_name": "", "pod_cidrs": (), "cluster_cidrs": settings.cluster_cidrs or EVERYWHERE}
    roster = Roster(replace(settings, **none))
    roster.facts = {name: seen.facts for name, (_, seen) in found.items()}
    records = {name: seen.text for name, (_, seen) in found.items() if seen.text is not None}
    believed, quarantine = roster.judge(records, "", [network.network_address for network in EVERYWHERE])
    rows = []
    for name, (own, _) in found.items():
        condition = own["condition"]
        up = {"False": "up", "True": f"down ({condition.get('reason')})"}.get(condition.get("status"), "unknown")
        record = "good" if name in believed else "refused" if name in quarantine else "none"
        trouble = quarantine.get(name, "")
        trouble = trouble or ("" if own["podCIDRs"] else "no pod CIDR: see nodeipam, or the control plane's node IPAM")
        trouble = trouble or ("" if name in records else "no record: no agent has run there, or it cannot write")
        is_well = up == "up" and condition.get("reason") != "MncniPodsWithoutNetwork"
        trouble = trouble or ("" if is_well else condition.get("message") or "`agent.py status` on that node says why")
        rows.append({"node": name, "podCIDRs": own["podCIDRs"], "condition": up, "record": record, "trouble": trouble})
    return sorted(rows, key=lambda row: (not row["trouble"], row["node"]))


def show_all_nodes(settings, store, as_json):
    """Print what the API server knows of all Nodes. Returns the exit code. ApiError."""
    rows = look_all_nodes(settings, store)
    sys.stdout.write(json.dumps(rows, indent=2) + "\n" if as_json else format_all_nodes(rows))
    return FAILED if any(row["trouble"] for row in rows) else OK


def format_all_nodes(rows):
    """Rows of look_all_nodes as text for people: one line for each Node, those with trouble first."""
    cells = [(row["node"], row["condition"], row["record"], ", ".join(row["podCIDRs"]) or "-", row["trouble"]) for row in rows]
    lines = [f"{sum(not row['trouble'] for row in rows)} of {len(rows)} nodes are well"]
    return "\n".join(lines + table_lines([("NODE", "NETWORK", "RECORD", "PODS", "TROUBLE"), *cells])) + "\n"


def format_peers(peers, now):
    """The lines of the table of peers. First those that WireGuard has not, then those that have not answered what was sent, then those
    that were never spoken to, then the others by their last handshake."""

    def trouble(peer):
        return peer["present"], peer["handshake"] > 0, peer["tx"] == 0, peer["handshake"]

    if not peers:
        return []
    rows = [("PEER", "ENDPOINT", "PODS", "HANDSHAKE", "RECEIVED", "SENT")]
    for peer in sorted(peers, key=trouble):
        since = f"{age_text(now - peer['handshake'])} ago" if peer["handshake"] else "never"
        handshake = since if peer["present"] else "not a peer yet"
        rows.append((peer["name"], peer["endpoint"], ", ".join(peer["podCIDRs"]), handshake, size_text(peer["rx"]), size_text(peer["tx"])))
    met = sum(peer["handshake"] > 0 for peer in peers)
    return [f"{met} of {len(peers)} peers have shaken hands", *shortened(table_lines(rows))]


def table_lines(rows):
    """Rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def shortened(lines):
    """The first lines of a long list, and how many more there are."""
    more = len(lines) - LINES_SHOWN
    return [*lines[:LINES_SHOWN], f"... and {more} more: --json shows them"] if more > 1 else lines


def size_text(number):
    """A number of bytes with at most four digits, such as "12.34 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.4g} {unit}"
        number /= 1000
    return f"{number:.4g} TB"


def age_text(seconds):
    """A time in its largest unit of UNITS, such as "3 d"."""
    unit = next((unit for unit, size in UNITS.items() if seconds >= size), "s")
    return f"{max(0, int(seconds / UNITS[unit]))} {unit}"


# ---------------------------------------------------------------------------------------------------------------------
# Metrics, see kube.py
# ---------------------------------------------------------------------------------------------------------------------

METRICS = {  # name: (type, help)
    "mncni_network_up": ("gauge", "Whether this node's pod network is up."),
    "mncni_admission_guard": ("gauge", "Whether the cluster refuses wrong records, and that one node writes another's."),
    "mncni_store_trouble": ("gauge", "Whether something is wrong with the node store; the last good list of nodes is in use then."),
    "mncni_key_time_seconds": ("gauge", "Unix time at which this node's key was made."),
    "mncni_peers": ("gauge", "Other nodes whose record is believed."),
    "mncni_quarantined_nodes": ("gauge", "Nodes whose record is not believed."),
    "mncni_node_quarantined": ("gauge", "1 for each node whose record is not believed, with the reason."),
    "mncni_peer_last_handshake_seconds": ("gauge", "Unix time of the last handshake, 0 for never. That of an idle peer is long ago."),
    "mncni_peer_receive_bytes_total": ("counter", "Bytes received from a node."),
    "mncni_peer_transmit_bytes_total": ("counter", "Bytes sent to a node."),
    **{f"mncni_{name}_packets_total": ("counter", text) for name, text in DROPS.items()},
    "mncni_leases": ("gauge", "Pods attached to the network."),
    "mncni_pool_addresses": ("gauge", "Addresses for pods in each pod CIDR of this node. A pod takes one of each."),
    "mncni_stranded_pods": ("gauge", "Running pods without network: their addresses are in no pod CIDR of this node."),
    "mncni_reconcile_seconds_total": ("counter", "Time spent in passes."),
    "mncni_reconcile_passes_total": ("counter", "Passes."),
    "mncni_reconcile_errors_total": ("counter", "Passes after which the network was not up."),
}


def look_figures(agent):
    """The figures for /metrics, see kube.format_metrics."""
    status = look_status(agent.settings, agent.context.run)
    status["up"] = not agent.reason
    requests = {} if agent.settings.nodes_dir else agent.store.api.counts.figures
    return {**plan_metrics(status), **agent.counts.figures, **requests}


def plan_metrics(status):
    """{(name, ((label, value), ...)): figure} of a status."""
    plain = {
        "mncni_network_up": status["up"],
        "mncni_store_trouble": bool(status.get("store")),
        "mncni_peers": len(status["peers"]),
        "mncni_quarantined_nodes": len(status["quarantine"]),
        "mncni_key_time_seconds": status.get("keyTime"),
        "mncni_leases": status["leases"],
        "mncni_stranded_pods": len(status.get("stranded", {})),
        **{f"mncni_{name}_packets_total": packets for name, packets in status.get("dropped", {}).items()},
        "mncni_admission_guard": status.get("admission_guard"),
    }
    figures = {(name, ()): figure for name, figure in plain.items() if figure is not None}
    for cidr in status.get("podCIDRs", []):
        figures["mncni_pool_addresses", (("pod_cidr", cidr),)] = pool_size(cidr)
    for name, reason in status["quarantine"].items():
        figures["mncni_node_quarantined", (("node", name), ("reason", reason))] = 1
    for peer in status["peers"]:
        for name, key in (("last_handshake_seconds", "handshake"), ("receive_bytes_total", "rx"), ("transmit_bytes_total", "tx")):
            figures[f"mncni_peer_{name}", (("node", peer["name"]),)] = peer[key]
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# Rotate
# ---------------------------------------------------------------------------------------------------------------------


def rotate(settings, run):
    """Leave a next key beside the key, unless one waits there already, and wait until the running agent uses it, see Agent.use_next_key.
    Returns what has happened as text. CNIError 7 without an agent, 100 if the agent could not do it yet."""
    path = settings.key_path
    if not is_running(settings):
        raise config_error("no agent runs on this node, and only a running one can change the key: start it, then give this command again")
    before, new = look_written(settings).get("publicKey"), look_next_key(path, run)
    if not new:
        key = make_key()
        new = public_key(key, run)
        write_next_key(path, key)
    try:
        wait_until(lambda: look_written(settings).get("publicKey") == new, ROTATE_S, "")
    except CNIError:
        status = look_written(settings)
        why = status.get("reason") or status.get("store") or "see its log"
        what = f"the new key {new} is not in use after {ROTATE_S} s ({why})"
        raise CNIError(mncni.COMMAND_FAILED, f"{what}; it stays beside the key, and the agent uses it as soon as it can") from None
    return f"this node's key is {new}; nothing is left of {before}"


# ---------------------------------------------------------------------------------------------------------------------
# Uninstall
# ---------------------------------------------------------------------------------------------------------------------

SYSCTLS_STAY = (
    "sysctls stay as they are: net.ipv4.ip_forward, net.ipv4.conf.<link>.forwarding of uplinks, net.ipv6.conf.all.forwarding,"
    " net.ipv6.conf.<link>.accept_ra of links that have addresses or routes by router advertisement, and in Kubernetes"
    " net.bridge.bridge-nf-call-iptables and -ip6tables"
)


def uninstall(settings, run, force):
    """Remove everything that the agent and the plugin made on this node, the floor last. CNIError 7 if pods are attached, unless forced:
    then they lose their network."""
    leases = mncni.Leases(mncni.DEFAULT_DATA_DIR, NETWORK, settings.run_dir)
    attached = leases.attachments()
    if attached and not force:
        raise config_error(f"{len(attached)} pods are attached, for example {attached[0][0]}; drain the node, or give --force")
    for path in (os.path.join(settings.conf_dir, CONFLIST), os.path.join(settings.run_dir, "ready")):
        mncni.remove_file(path)
    links = look_ip(["link show"], run, why="the links of MNCNI")
    veths = [link["ifname"] for link in links if is_pod_link(link)]
    own = [link["ifname"] for link in links if mncni.is_own(link) and link["ifname"] in (settings.bridge, HOST_VETH) or is_wireguard(link)]
    for name in [*veths, *own]:
        mncni.delete_links([name], run)
    remove_namespace(settings, run)
    withdraw_record(settings, run)
    remove_plugins(settings)
    for directory in (leases.dir, settings.run_dir, settings.state_dir):
        shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rmdir(mncni.DEFAULT_DATA_DIR)
    for table in (mncni.PORTMAP, f"table {mncni.SPOOF}", "table inet mncni"):
        run(Command(["nft", "delete", *table.split()], "", "host ports, spoofCheck, the firewall"))
    apply_lines(stale_routes([], look_routes(run)), run, "the floor goes last")
    ensure_rules([], run, "the floor goes last")
    log.info("uninstalled; looked in --conf-dir %s, --bin-dir %s", settings.conf_dir, settings.bin_dir)
    log.info(SYSCTLS_STAY)


def remove_namespace(settings, run):
    """Delete the namespace if it is the agent's. The device goes with it, and wireguard-go ends with the device."""
    facts = look_namespace(Context(settings, run, ""))
    if facts is None:
        return
    refuse_foreign_namespace(settings, facts)
    if find_link(DEVICE, facts):
        apply_lines([f"link delete dev {DEVICE}"], run, "the WireGuard device", settings.netns)
    apply([Command(["ip", "netns", "delete", settings.namespace], "", "the namespace of the tunnel")], run)
    with contextlib.suppress(CNIError):
        wait_until(lambda: not os.path.exists(WIREGUARD_GO_SOCKET), 2, "")


def withdraw_record(settings, run):
    """Take this node's record out of the node store, if the store can be reached."""
    try:
        make_store(settings, os.environ, run, None).withdraw(settings.node_name)
    except (CNIError, StoreError) as error:
        log.warning("the record of %s stays in the node store: %s", settings.node_name, error)


def remove_plugins(settings):
    """Remove what mncni.install wrote, unless another CNI configuration uses it."""
    for name in sorted(os.listdir(settings.conf_dir)) if os.path.isdir(settings.conf_dir) else []:
        if '"mncni' in (mncni.read_file(os.path.join(settings.conf_dir, name)) or ""):
            log.warning("the plugins in %s stay: %s uses them", settings.bin_dir, name)
            return
    for name in ("mncni", "mncni.py", *mncni.PLUGINS):
        path = os.path.join(settings.bin_dir, name)
        if mncni.is_ours(path):
            mncni.remove_file(path)
    for path in glob.glob(os.path.join(settings.bin_dir, "__pycache__", "mncni.*")):
        mncni.remove_file(path)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.join(settings.bin_dir, "__pycache__"))


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments, environ):
    """The exit code."""
    os.umask(os.umask(0o077) | 0o022)  # nobody else may change what the agent makes
    parser = build_parser(environ)
    options = parser.parse_args(arguments)
    kube.start_log(environ)
    try:
        return run_command(parser, options, environ)
    except (CNIError, ApiError, OSError) as error:
        locked = getattr(error, "code", 0) == mncni.TRY_AGAIN
        log.error("%s", f"another agent runs here: stop it first ({error})" if locked else error)
        return RUNNING_ALREADY if locked else FAILED


def run_command(parser, options, environ):
    """The exit code. CNIError: 11 if another agent runs here."""
    settings = parse_settings(parser, options, environ)
    cluster = settings.kubeconfig or environ.get("KUBERNETES_SERVICE_HOST")
    needed = {"--kubeconfig or --nodes-dir": settings.nodes_dir or cluster, "--cluster-cidr": settings.cluster_cidrs}
    needed.update({"--pod-cidr": settings.pod_cidrs} if settings.nodes_dir else {})
    for flag, value in needed.items():
        if options.command == "run" and not value:
            parser.error(f"{flag} is needed: see agent.py run --help")
    if settings.nodes_dir and settings.kubeconfig:
        parser.error("--nodes-dir and --kubeconfig are two node stores: give one")
    if settings.pod_cidrs and not settings.nodes_dir:
        parser.error("--pod-cidr is for --nodes-dir: a cluster tells its nodes their pod CIDRs (spec.podCIDRs)")
    run = mncni.make_run(environ)
    if options.command == "status" and options.all_nodes:
        if settings.nodes_dir or not cluster:
            parser.error("--all-nodes asks an API server: give --kubeconfig")
        return show_all_nodes(settings, make_store(settings, environ, run, None), options.json)
    if os.geteuid() != 0:
        log.error("agent.py %s needs root: run it with sudo", options.command)
        return FAILED
    if options.command == "status":
        status = look_status(settings, run)
        hangs = kube.look_health(settings.listen) if status["running"] else ""
        status.update({"ok": False, "reason": f"the agent: {hangs}"} if hangs else {})
        sys.stdout.write(json.dumps(status, indent=2) + "\n" if options.json else format_status(status, time.time()))
        return OK if status["ok"] else FAILED
    if options.command == "rotate":
        sys.stdout.write(rotate(settings, run) + "\n")
        return OK
    with agent_lock(settings, timeout_s=1):  # `agent.py status` holds it for a moment
        if options.command == "uninstall":
            uninstall(settings, run, options.force)
        else:
            mncni.run_id(settings.run_dir, make=True)  # before the first pod, which then leaves nothing that was not there
            run_agent(settings, environ)
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
