#!/usr/bin/python3 -I
"""The MNCNI agent: one per node, it connects the node's pods with those of every other node, through WireGuard, and never in clear.

What it owns, and nothing else: the network namespace mncni-wg with the WireGuard device in it, the veth pair mncni-host / mncni-ns,
the bridge mncni0, routes of protocol 201, the nft table "inet mncni" (one in the host, one in the namespace), its files below
/run/mncni and /var/lib/mncni, 10-mncni.conflist. An object of these names that is not ours is refused, not taken.

    host                                                        namespace mncni-wg
    pods -- mncni0 -- routes -- mncni-host ------------------ mncni-ns -- routes -- mncni-wg0
            10.244.1.1/24       10.244.1.1/32                 169.254.28.84         the WireGuard device, whose UDP socket
    10.244.0.0/16 via 169.254.28.84                                                 stays in the host: that is where it was made
    10.244.0.0/16 unreachable, the floor: when all else is gone

It needs root (CAP_NET_ADMIN in both namespaces, CAP_SYS_ADMIN to make one), python3, iproute2, nftables, wireguard-tools, and WireGuard in
the kernel or as wireguard-go.

Reading order: settings, node stores (a directory, or Kubernetes with a client of its API), records (what others say about themselves,
trusted in nothing), then the stages. Every pass looks at the kernel stage by stage, compares with what should be (pure), and applies the
difference. Where nothing differs, nothing is written. Node IPAM, behind the agent, is a program of its own: one per cluster, not per node.
"""

import argparse
import base64
import bisect
import collections
import contextlib
import functools
import gc
import glob
import ipaddress
import itertools
import json
import logging
import os
import queue
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone

if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.realpath(__file__)))  # -I leaves it out; mncni.py ships beside this file

import mncni
from mncni import CNIError, Command, addresses_of, apply, ask, config_error, in_netns, ip_batch, look_ip, look_link, write_file

log = logging.getLogger("mncni-agent")

NETWORK = "mncni"  # the name of the network in the CNI configuration
CONFLIST = "10-mncni.conflist"
OK, FAILED, USAGE, RUNNING_ALREADY = 0, 1, 2, 3
ROUTE_PROTOCOL = 201  # how routes of ours are told from others
FLOOR_METRIC = 4278198272  # behind every other route there is
DEVICE, HOST_VETH, NS_VETH = "mncni-wg0", "mncni-host", "mncni-ns"
WIREGUARD_GO_SOCKET = f"/var/run/wireguard/{DEVICE}.sock"
# Link-local addresses of our own: neighbour discovery needs one on each link, and the kernel makes its own only when a link comes up.
HOST_LINK_LOCAL, BRIDGE_LINK_LOCAL = "fe80::28:83/64", "fe80::28:82/64"
NEXT_HOPS = {4: "169.254.28.84", 6: "fe80::28:84"}  # of NS_VETH, for the host's route into the tunnel
POLL_S = 0.5  # how often the directory store is looked at
EVENT_S = 0.25  # the least time between passes that events ask for: a pass notices its own changes, and pods come in storms
GLANCE_S = 1.5  # how often the tunnel's peers and firewall are looked at: no monitor tells of them
AUDIT_S = 10  # a full look at the kernel, whether or not anything seems to have happened
STUCK_S = 120  # a loop that has not come round for so long hangs: commands have 30 s each
HOLD_S = 60  # how long a mass disappearance of nodes is doubted
SET_BACK_S = 120  # a clock set back by less never matters: nodes that talk shake hands so seldom (WireGuard, section 6.1)
UNDERLAY_OVERHEAD = {4: 60, 6: 80}  # IP header, UDP header, WireGuard's 32 bytes


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the operator decided. CIDRs and endpoints are ipaddress objects; ports are (slot 0, slot 1)."""

    node_name: str
    nodes_dir: str
    kubeconfig: str
    cluster_cidrs: tuple
    pod_cidrs: tuple
    endpoints: tuple
    ports: tuple
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
    def gateways(self):
        """{pod CIDR: the pods' gateway, its first address}."""
        return {cidr: cidr.network_address + 1 for cidr in self.pod_cidrs}

    @property
    def families(self):
        return sorted({cidr.version for cidr in self.pod_cidrs})


def network(text):
    """For argparse, like those below: what is wrong with the text of a flag, in words."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:  # "10.244.0.5/16 has host bits set"
        raise argparse.ArgumentTypeError(f"{error}; for several networks give the flag several times") from None


def address(text):
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no IP address; for several give the flag several times") from None


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: true or false")
    return text.lower() == "true"


def port_pair(text):
    """Two different UDP ports: slot 0's, and slot 1's, which key rotation will use."""
    ports = tuple(int(part) for part in text.split(",") if part.isascii() and part.isdigit() and len(part) < 6)
    if len(set(ports)) != 2 or not all(0 < port < 65536 for port in ports):
        raise argparse.ArgumentTypeError(f"{text!r}: give two different UDP ports, like 28384,28385")
    return ports


def listen_address(text):
    """(host, port) of ADDRESS:PORT."""
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    if not mncni.is_address(host, ipaddress.ip_address) or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: give an address and a port, like 127.0.0.1:28386 or [::]:28386")
    return host, int(port)


def link_name(text):
    if not mncni.is_ifname(text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot name a network link")
    return text


FLAGS = (
    # flag, type, default, repeatable, help
    ("--node-name", str, socket.gethostname(), False, "this node's name"),
    ("--nodes-dir", str, "", False, "directory of node records, <node>.json each: the node store that needs no cluster"),
    ("--kubeconfig", str, "", False, "the Kubernetes cluster that is the node store; in a pod: its own, without this flag"),
    ("--cluster-cidr", network, None, True, "addresses of all pods; repeatable"),
    ("--pod-cidr", network, None, True, "addresses of this node's pods, inside --cluster-cidr; repeatable"),
    ("--endpoint", address, None, True, "address at which other nodes reach this one; repeatable (default: the default route's source)"),
    ("--port", port_pair, "28384,28385", False, "UDP ports of the two key slots"),
    ("--bridge", link_name, "mncni0", False, "the pods' bridge"),
    ("--namespace", link_name, "mncni-wg", False, "the namespace of the tunnel"),
    ("--mtu", int, "0", False, "MTU of the pods; 0: the underlay's less WireGuard's overhead"),
    ("--masquerade", boolean, "true", False, "give traffic from pods to outside the cluster the node's address"),
    ("--conf-dir", str, "/etc/cni/net.d", False, "where the CNI configuration goes"),
    ("--bin-dir", str, mncni.DEFAULT_BIN_DIR, False, "where the CNI plugin goes"),
    ("--state-dir", str, "/var/lib/mncni", False, "state that outlives a boot: the key, the last good list of nodes"),
    ("--run-dir", str, mncni.DEFAULT_RUN_DIR, False, "state that does not"),
    ("--listen", listen_address, "127.0.0.1:28386", False, "where /healthz, /readyz, /metrics are; other hosts get metrics only"),
)

NODEIPAM_FLAGS = (
    ("--kubeconfig", str, "", False, "the cluster; without it, the pod's own"),
    ("--cluster-cidr", network, None, True, "addresses of all pods, cut into ranges for nodes; repeatable: for both families, for more"),
    ("--node-mask-v4", int, "24", False, "prefix length of a node's IPv4 range"),
    ("--node-mask-v6", int, "64", False, "prefix length of a node's IPv6 range"),
    ("--lease", str, "kube-system/mncni-nodeipam", False, "namespace/name of the Lease by which one of several replicas leads"),
    ("--listen-nodeipam", listen_address, "127.0.0.1:28387", False, "where /healthz, /readyz, /metrics are; other hosts get metrics only"),
)

VERBS = (
    ("run", "build the node's network and keep it", FLAGS),
    ("status", "what is up, and why not", FLAGS),
    ("nodeipam", "give nodes their pod CIDRs, where the cluster's control plane gives none", NODEIPAM_FLAGS),
    ("uninstall", "remove all of it from this node", FLAGS),
)


def build_parser(environ):
    """The command line. Every flag of `run` has its MNCNI_* variable; a repeatable one takes a comma-separated list there."""
    parser = argparse.ArgumentParser(prog="agent.py", description="MNCNI's node agent: an encrypted pod network between nodes.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about, flags in VERBS:
        command = commands.add_parser(name, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for flag, kind, default, repeatable, text in flags:
            if repeatable:  # argparse would add to a default what the command line says: parse_settings looks at the variable
                command.add_argument(flag, type=kind, action="append", help=text)
            else:
                given = environ.get("MNCNI_" + flag[2:].upper().replace("-", "_"))
                command.add_argument(flag, type=kind, default=given or default, help=text)
    commands.choices["status"].add_argument("--json", action="store_true", help="for programs")
    commands.choices["uninstall"].add_argument("--force", action="store_true", help="although pods are attached: they lose their network")
    return parser


def parse_list(parser, options, environ, key, kind):
    """The values of a repeatable flag, or else of its variable. Exit status 2 for a wrong one."""
    given = environ.get(f"MNCNI_{key.upper()}")
    try:
        return tuple(getattr(options, key) or (map(kind, given.split(",")) if given else ()))
    except argparse.ArgumentTypeError as error:
        return parser.error(f"MNCNI_{key.upper()}: {error}")


def parse_settings(parser, options, environ):
    """Settings from parsed options. Leaves with exit status 2 and a message that names the flag."""
    given = {**vars(options), "ports": options.port}
    for key, kind in (("cluster_cidr", network), ("pod_cidr", network), ("endpoint", address)):
        given[f"{key}s"] = parse_list(parser, options, environ, key, kind)
    settings = Settings(**{each.name: given[each.name] for each in fields(Settings)})
    service, least = environ.get("KUBERNETES_SERVICE_HOST", "").split(","), smallest_mtu(settings.pod_cidrs)
    troubles = [
        pod_cidr_trouble("--pod-cidr", settings.pod_cidrs, settings.cluster_cidrs),
        address_trouble("--endpoint", settings.endpoints, settings.cluster_cidrs),
        address_trouble("the cluster's service KUBERNETES_SERVICE_HOST", addresses_in(service), settings.cluster_cidrs),
    ]
    if settings.mtu and not least <= settings.mtu <= 65000:
        troubles.append(f"--mtu {settings.mtu} is out of range: {least} to 65000, or 0")
    if not mncni.is_identifier(settings.node_name):
        troubles.append(f"--node-name {settings.node_name!r} must be letters, digits, '_', '.', '-'")
    for trouble in filter(None, troubles):
        parser.error(trouble)
    return settings


def address_trouble(what, addresses, cluster_cidrs):
    """What is wrong with addresses that are not pods', "" if nothing is."""
    inside = [each for each in addresses if is_in(each, cluster_cidrs)]
    return f"{what} {inside[0]} is inside --cluster-cidr: nodes, services and pods need addresses of their own" if inside else ""


def addresses_in(texts):
    return [ipaddress.ip_address(text) for text in texts if mncni.is_address(text, ipaddress.ip_address)]


def pod_cidr_trouble(what, pod_cidrs, cluster_cidrs):
    """What is wrong with a node's pod CIDRs, "" if nothing is."""
    for cidr in pod_cidrs:
        if not is_part(cidr, cluster_cidrs):
            return f"{what} {cidr} is no part of --cluster-cidr {', '.join(map(str, cluster_cidrs)) or '(none given)'}"
        if cidr.num_addresses < 4:
            return f"{what} {cidr} is too small: it needs room for a gateway and a pod"
    twins = find_twins(pod_cidrs)
    return f"{what} {twins[0]} overlaps {what} {twins[1]}" if twins else ""


def is_part(cidr, cidrs):
    """Whether a network is part of one of the others, but not all of it."""
    return any(cidr.version == outer.version and cidr != outer and cidr.subnet_of(outer) for outer in cidrs)


def is_in(address, cidrs):
    return any(address in cidr for cidr in cidrs)


def find_twins(cidrs):
    """Two of the networks that overlap, None if no two do."""
    return next((pair for pair in itertools.combinations(cidrs, 2) if pair[0].overlaps(pair[1])), None)


def smallest_mtu(pod_cidrs):
    return 1280 if any(cidr.version == 6 for cidr in pod_cidrs) else 576  # RFC 8200, section 5; RFC 791


# ---------------------------------------------------------------------------------------------------------------------
# Node store: a directory
# ---------------------------------------------------------------------------------------------------------------------


class StoreError(Exception):
    """The store cannot be read or written: what it would say is unknown, so nothing follows from it."""


class Store:
    """What the agent asks of a node store: records(), publish(name, text), withdraw(name), changed() -> whether records() is worth
    reading again; and what only a cluster can answer, or wants to be told."""

    RECORD_LIMIT = 65536  # bytes; a record has some 300
    trouble = ""  # why what records() says may be old
    guard = None  # whether the cluster refuses that one node writes another's record; None: unknown

    def start(self):
        """Begin to follow what others write, where that takes more than looking."""

    def identity(self):
        """{"uid", "podCIDRs", "addresses"} that the cluster gave this node, {} if none yet; None where the operator decides."""

    def facts(self):
        """{node name: Facts}: what a node cannot forge."""
        return {}

    def look_again(self):
        """Read everything anew, if records() does not; whether that has been done since it was asked for."""
        return True

    def say(self, reason):
        """Tell the cluster whether the node's network stands ("") or why not."""

    def note(self, name, reason):
        """Tell the cluster that a node's record is not believed, or ("") that it is again."""


class DirectoryStore(Store):
    """Node records as files, <node>.json each; dot-files are somebody's unfinished writing. The store for a cluster without an API."""

    def __init__(self, path):
        self.path = path
        self.seen = None
        self.files = {}  # {file name: (what stat said when it was read, text)}

    def changed(self):
        """Whether records() says something else than at the last call. It costs a stat a file."""
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

    def withdraw(self, name):
        """Remove this node's record; none there is fine. StoreError."""
        try:
            mncni.remove_file(os.path.join(self.path, f"{name}.json"))
        except OSError as error:
            raise StoreError(f"cannot write to --nodes-dir {self.path}: {error.strerror}") from None

    def _read(self, name):
        """(what stat says, text) of a file: what we have if it was not written since, or cannot be read; no text if we have none."""
        path, known = os.path.join(self.path, name), self.files.get(name, (None, ""))
        try:
            status = os.stat(path)
            signature = (status.st_ino, status.st_mtime_ns, status.st_size)
            if signature == known[0]:
                return known
            with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:  # a FIFO must not stop us
                return signature, (file.read(self.RECORD_LIMIT + 1) or b"").decode("utf-8", "replace")
        except OSError:
            return known


# ---------------------------------------------------------------------------------------------------------------------
# Kubernetes API: a client
# ---------------------------------------------------------------------------------------------------------------------

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
JSON, MERGE_PATCH, STRATEGIC_PATCH = "application/json", "application/merge-patch+json", "application/strategic-merge-patch+json"
METADATA_LIST, METADATA = (f"{JSON};as=PartialObjectMetadata{kind};g=meta.k8s.io;v=v1" for kind in ("List", ""))


LONGEST_WISH_S = 300  # that a server is granted: one that errs must not silence a node for good


class ApiError(Exception):
    """What the API server said instead of doing it. status: HTTP's, 0 where there was no answer. retry_after_s: its wish, or None."""

    def __init__(self, status, reason, message, retry_after_s=None):
        super().__init__(f"{status} {reason}: {message}" if status else message)
        self.status, self.reason, self.message, self.retry_after_s = status, reason, message, retry_after_s


def in_cluster(environ, directory=SERVICE_ACCOUNT):
    """What Api needs, from what Kubernetes gives every pod. The host may be a comma-separated list. CNIError 7 outside a cluster."""
    hosts, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not hosts:
        raise config_error("KUBERNETES_SERVICE_HOST is not set, so this is no pod of a cluster: give --kubeconfig")
    servers = [f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}" for host in hosts.split(",")]
    files = {"certificate-authority": "ca.crt", "tokenFile": "token"}
    return {"server": ",".join(servers), **{key: os.path.join(directory, name) for key, name in files.items()}}


def read_kubeconfig(path, run):
    """What Api needs, of the current context, under a kubeconfig's own keys: {"server", "token", ...}. CNIError 7."""
    text, command = mncni.read_file(path), Command(["kubectl", "config", "view", "--raw", "--minify", "-o", "json", "--kubeconfig", path])
    if text is None:
        raise config_error(f"there is no kubeconfig {path}")
    try:
        if not text.lstrip().startswith("{"):
            if shutil.which("kubectl", path=mncni.search_path(os.environ)) is None:
                what = f"kubeconfig {path} is no JSON, and there is no kubectl to read YAML"
                raise config_error(f"{what}; where there is one, do: {' '.join(command.argv)} > FILE, and give that file")
            text = ask(command, run, may_be_gone=False).stdout
        config = json.loads(text)
        parts = {kind: {entry["name"]: entry[kind] for entry in config.get(f"{kind}s") or []} for kind in ("context", "cluster", "user")}
        context = parts["context"][config["current-context"]]
        access = {**parts["cluster"][context["cluster"]], **parts["user"].get(context.get("user"), {})}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise config_error(f"kubeconfig {path} has no usable current context: {type(error).__name__} {error}") from None
    for key in ("exec", "auth-provider"):
        if access.get(key):
            raise config_error(f'kubeconfig {path}: "{key}" is not supported: give a user with a token or a certificate')
    if not all(server.startswith(("https://", "http://")) for server in str(access.get("server")).split(",")):
        raise config_error(f"kubeconfig {path}: the server {access.get('server')!r} is no http(s):// address")
    for key in ("certificate-authority", "client-certificate", "client-key", "tokenFile"):
        if access.get(key):
            access[key] = os.path.join(os.path.dirname(os.path.abspath(path)), access[key])
    return access


class Counts:
    """Figures for /metrics: {(name, ((label, value), ...)): figure}. For any number of threads."""

    def __init__(self):
        self.lock, self.figures = threading.Lock(), collections.Counter()

    def add(self, name, amount=1, **labels):
        with self.lock:
            self.figures[name, tuple(sorted(labels.items()))] += amount

    def set(self, name, figure, **labels):
        self.figures[name, tuple(sorted(labels.items()))] = figure


class Api:
    """A client of one API server, which may have several addresses. For any number of threads.

    access: see read_kubeconfig. Files that it names are read each time: kubelet renews tokens and certificates.
    http.client and ssl are imported by its first request (+40 ms): the directory store does without.
    """

    CONNECT_S, READ_S = 5, 30  # how long a connection, an answer to a request may take
    SILENCE_S = 90  # a watch that says nothing for so long is dead: the server has a bookmark to tell each minute
    WATCH_S = 300  # when the server is to end a watch; up to twice that, lest all nodes come again at once
    IDLE_S = 15  # how long a connection is kept for the next request; the server keeps it longer

    def __init__(self, access):
        self.counts = Counts()
        self.access = access
        self.servers = access["server"].split(",")
        self.idle = []  # [(when it was used, connection)]

    def request(self, method, path, body=None, params=None, content_type=JSON, accept=JSON):
        """The object in the answer, {} for none. ApiError. body: an object. params: {name: value} for the query."""
        connection, response = self._exchange(method, path, body, params, content_type, accept, self.READ_S)
        with told(method, path):
            data = response.read()
            self.counts.add("mncni_api_received_bytes_total", len(data))
            if response.will_close:
                connection.close()
            else:
                self.idle.append((time.monotonic(), connection))
            answer = json.loads(data) if data else {}
            if not isinstance(answer, dict):
                raise ValueError("no object")
            return answer

    def list(self, path, params=None, accept=JSON, take=lambda item: item):
        """(items, resourceVersion), fetched in pages, so that a server and we can bear it. ApiError: 410 when the list expires while it
        is read. take: what to keep of an item; all of a large cluster is too much."""
        items, query = [], {**(params or {}), "limit": 500}
        while True:
            page = self.request("GET", path, params=query, accept=accept)
            with told("GET", path):
                refuse_kind(path, page["kind"], "List")
                items += [take(item) for item in page["items"] or ()]
                version, query["continue"] = text_in(page["metadata"], "resourceVersion"), page["metadata"].get("continue")
            if not query["continue"]:
                return items, version

    def watch(self, path, resource_version, params=None, accept=JSON):
        """An iterator over (type, object) of every change since resource_version, BOOKMARK among the types, until the server ends it.
        ApiError, now or later: 410 when the version has expired, 0 when the stream is cut or silent."""
        options = {"watch": 1, "allowWatchBookmarks": "true", "timeoutSeconds": int(self.WATCH_S * (1 + jitter()))}
        query = {**(params or {}), "resourceVersion": resource_version, **options}
        return self._events(path, *self._exchange("GET", path, None, query, JSON, accept, self.SILENCE_S))

    def _events(self, path, connection, response):
        rest = b""
        with contextlib.closing(connection), told("watch", path):
            for data in iter(functools.partial(response.read1, 1 << 16), b""):
                self.counts.add("mncni_api_received_bytes_total", len(data))
                *lines, rest = (rest + data).split(b"\n")
                for event in map(json.loads, filter(bytes.strip, lines)):
                    kind, item = event["type"], event["object"]
                    if kind == "ERROR":
                        raise ApiError(int(item.get("code") or 500), str(item.get("reason")), str(item.get("message"))[:1000])
                    refuse_kind(path, item["kind"])
                    text_in(item["metadata"], "resourceVersion")  # the least that it has to say
                    yield kind, item
            if rest:
                raise ValueError("cut")

    def _exchange(self, method, path, body, params, content_type, accept, timeout_s):
        """(connection, response) of a request that succeeded. What failed because the server had closed a kept connection, or
        because the token was just renewed, is said once more."""
        from urllib.parse import urlencode

        while True:
            token = self._token()
            kept, connection = self._connection()
            target = connection.prefix + path + (f"?{urlencode(params, errors='replace')}" if params else "")
            headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": f"mncni-agent/{mncni.PROGRAM_VERSION}"}
            headers.update({"Authorization": f"Bearer {token}"} if token else {})
            try:
                with told(method, path):
                    connection.sock.settimeout(timeout_s)
                    connection.request(method, target, None if body is None else json.dumps(body), headers)
                    response = connection.getresponse()
                    data = response.read() if response.status >= 300 else b""
                self.counts.add("mncni_api_requests_total", verb=method, code=response.status)
                if response.status < 300:
                    return connection, response
                error = refusal(method, path, response, data)
            except ApiError as failure:
                self.counts.add("mncni_api_requests_total", verb=method, code="none")
                error = failure
            connection.close()
            renewed = error.status == 401 and self._token() != token
            if not renewed and not (kept and error.status == 0 and method == "GET"):
                raise error

    def _connection(self):
        """(whether it was used before, an open connection)."""
        with contextlib.suppress(IndexError):  # no more of them; other threads take from here, too
            while True:
                used, connection = self.idle.pop()
                if time.monotonic() - used < self.IDLE_S:
                    return True, connection
                connection.close()
        for server in list(self.servers):
            try:
                with told("connect to", server):
                    return False, self._connect(server)
            except ApiError as failure:
                error = failure
                self.servers = [*self.servers[1:], self.servers[0]]  # the next request begins with one that may be better
        raise error

    def _connect(self, server):
        import http.client
        from urllib.parse import urlsplit

        url = urlsplit(server)
        if url.scheme == "https":
            connection = http.client.HTTPSConnection(url.hostname, url.port or 443, timeout=self.CONNECT_S, context=self._context())
        else:
            connection = http.client.HTTPConnection(url.hostname, url.port or 80, timeout=self.CONNECT_S)
        connection.connect()
        connection.prefix = url.path.rstrip("/")
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            connection.sock.setsockopt(socket.IPPROTO_TCP, option, value)
        return connection

    def _context(self):
        """The TLS context for a connection, of the certificates as they are now."""
        import ssl

        context = ssl.create_default_context(cadata=self._part("certificate-authority").decode() or None)
        context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)  # Python 3.13 sets it; many clusters' certificates fail it
        if self.access.get("insecure-skip-tls-verify"):
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        certificate, key = self._part("client-certificate"), self._part("client-key")
        if certificate:
            with open(os.memfd_create("client"), "wb") as file:  # ssl reads it from a file alone; this one is on no disk
                file.write(certificate + b"\n" + key)
                file.flush()
                context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context

    def _part(self, key):
        """The bytes of a part of the access, which stands there in base64 or in a file; b"" if it has none."""
        if self.access.get(f"{key}-data"):
            return base64.b64decode(self.access[f"{key}-data"])
        return read_bytes(self.access[key]) if self.access.get(key) else b""

    def _token(self):
        with told("read the token", ""):
            return read_bytes(self.access["tokenFile"]).decode().strip() if self.access.get("tokenFile") else self.access.get("token", "")


@contextlib.contextmanager
def told(method, path):
    """Whatever goes wrong on the way or in what was said, as an ApiError."""
    import http.client

    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise ApiError(0, "Unreachable", f"{method} {path}: {str(error) or type(error).__name__}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ApiError(0, "Garbled", f"{method} {path}: cannot understand the answer: {type(error).__name__} {error}"[:300]) from None


def open_api(kubeconfig, environ, run):
    """The client of the cluster that a kubeconfig tells, or of the one whose pod this is. CNIError 7."""
    return Api(read_kubeconfig(kubeconfig, run) if kubeconfig else in_cluster(environ))


def refuse_kind(path, kind, suffix=""):
    """ValueError unless what came from a path is of the kind that the path names in the plural, or the metadata of it."""
    if kind.lower() not in (path.rpartition("/")[2].rstrip("s") + suffix.lower(), f"PartialObjectMetadata{suffix}".lower()):
        raise ValueError(f"it is a {kind}")


def text_in(mapping, key, needed=True):
    """mapping[key], a str; None where it is absent and not needed. TypeError, KeyError: see told()."""
    value = mapping[key] if needed else mapping.get(key)
    if not isinstance(value, str) and (needed or value is not None):
        raise TypeError(f'"{key}" is no text')
    return value


def cidrs_in(texts):
    """Networks from texts, whatever their host bits. ValueError."""
    if not all(mncni.is_address(text, functools.partial(ipaddress.ip_network, strict=False)) for text in texts):
        raise ValueError(f"{shown(texts)} are no networks")
    return tuple(ipaddress.ip_network(text, strict=False) for text in texts)


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def jitter():
    """A number from 0 to 1, another each time; `random` would be another import."""
    return os.urandom(1)[0] / 255


def refusal(method, path, response, data):
    """The ApiError in an answer of the API server."""
    try:
        said = json.loads(data)
        reason, message = str(said.get("reason") or response.reason), str(said.get("message"))
    except (ValueError, AttributeError, RecursionError):
        reason, message = response.reason, data[:200].decode("utf-8", "replace")
    message = f"{method} {path}: {' '.join(message.split())[:1000]}"
    after = response.headers.get("Retry-After") or ""
    return ApiError(response.status, reason, message, min(float(after), LONGEST_WISH_S) if after.isascii() and after.isdigit() else None)


# ---------------------------------------------------------------------------------------------------------------------
# Node store: Kubernetes
# ---------------------------------------------------------------------------------------------------------------------

RECORD, NODES = "mncni.dev/node", "/api/v1/nodes"
Facts = collections.namedtuple("Facts", "uid created pod_cidrs")  # texts of a Node; pod_cidrs: None where only metadata was read
Seen = collections.namedtuple("Seen", "text facts")  # text: the record, None for none


def follow_nodes(api, parse, take, tell, stopping, params=None, is_whole=lambda: True):
    """Thread: list the Nodes, then watch them, until the event `stopping` is set: take("LIST", objects), then take(type, [object]) for
    each change, of each object what parse() makes of it. is_whole() -> whether that takes whole Nodes or metadata alone. Whatever goes
    wrong costs a pause, and what was seen last stays: tell(what) if it lasts, tell("") when it is over."""
    version, listed, failures = None, None, 0
    while not stopping.is_set():
        wish, opened = 0, False
        try:
            whole = is_whole()
            if version is None or whole != listed:
                objects, version = api.list(NODES, params, JSON if whole else METADATA_LIST, parse)
                take("LIST", objects)
                listed = whole
            events = api.watch(NODES, version, params, JSON if whole else METADATA)
            opened = True
            tell("")
            for kind, item in events:
                if stopping.is_set():
                    return
                if is_older(item["metadata"]["resourceVersion"], version):
                    raise ApiError(410, "Disorder", "the API server told of changes in the wrong order")
                version, failures = item["metadata"]["resourceVersion"], 0
                if kind != "BOOKMARK":
                    take(kind, [parse(item)])
        except Exception as error:
            status, wish = getattr(error, "status", 410), wish_s(error)
            if status in (400, 410) or (status and failures > 5):  # a list shows how things stand
                version = None
            if failures >= (4 if opened else 1):  # the first is everyday: servers restart
                tell(f"the API server: {error}")
        failures += 1
        stopping.wait(pause_s(failures, wish))


def wish_s(error):
    """How long the API server wishes us to wait after an error. What neither it nor the store has to say is a defect, and logged."""
    if not isinstance(error, (ApiError, StoreError)):
        log.exception("a defect of the agent, please report it")
    return getattr(error, "retry_after_s", None) or 0


def start_thread(act, *arguments, **options):
    threading.Thread(target=act, args=arguments, kwargs=options, daemon=True).start()


class KubernetesStore(Store):
    """Node records as annotations of Node objects. Two threads follow the API server, one writes: a pass never waits for it.

    Of other nodes it reads metadata alone, a third of the whole; unless nothing keeps a node from writing another's record: then whole
    Nodes, for their spec.podCIDRs. It writes what has changed, and nothing just because time has passed. wake: called when there is news.
    """

    EVENT_PAUSE_S = 5  # between two Kubernetes Events, of which at most 20 wait

    def __init__(self, api, node_name, wake=lambda: None):
        self.api, self.node_name, self.wake = api, node_name, wake
        self.lock = threading.Lock()
        self.nodes = None  # {name: Seen}, None before the first list
        self.own = None  # our Node: "uid", "podCIDRs", "addresses", "record", "condition", "version"; {} where the cluster has none
        self.troubles = {}  # {what: why it fails}
        self.news = True
        self.work = threading.Event()  # there may be something to write
        self.record, self.condition = None, None  # what our Node is to say
        self.notes = collections.deque(maxlen=20)
        self.looking = None  # whether a second look is asked for (True) or done (False)

    def start(self):
        gc.set_threshold(100_000)  # cycles are few here, and to look for them among 5,000 nodes takes longer than a pass
        only_own, never = {"fieldSelector": f"metadata.name={self.node_name}"}, threading.Event()
        tell_nodes, tell_own = (functools.partial(self._tell, what) for what in ("nodes", "own"))
        start_thread(follow_nodes, self.api, self._parse_node, self._take_nodes, tell_nodes, never, is_whole=self._is_whole)
        start_thread(follow_nodes, self.api, self._parse_own, self._take_own, tell_own, never, only_own)
        start_thread(self._write)

    @property
    def trouble(self):
        return "; ".join(sorted(set(filter(None, self.troubles.values()))))

    def changed(self):
        changed, self.news = self.news, False
        return changed

    def records(self):
        """{node name: text}. StoreError before the first answer."""
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
        for failures in (1, 2, 3):  # it is now or never
            try:
                self.api.request("PATCH", f"{NODES}/{name}", {"metadata": {"annotations": {RECORD: None}}}, content_type=MERGE_PATCH)
                return
            except ApiError as error:
                trouble = error
                time.sleep(pause_s(failures, error.retry_after_s or 0))
        raise StoreError(str(trouble))

    def say(self, reason):
        up = ("False", "MncniIsUp", "MNCNI connects this node's pods with those of other nodes")
        self.condition = ("True", "MncniIsDown", reason[:1000]) if reason else up
        self.work.set()

    def note(self, name, reason):
        self.notes.append((name, reason))
        self.work.set()

    def _tell(self, what, trouble):
        changed, self.troubles[what] = self.troubles.get(what, "") != trouble, trouble
        self._announce(changed)

    def _announce(self, changed):
        if changed:
            self.news = True
            self.wake()

    def _parse_node(self, item):
        """(name, Seen) of a Node or of its metadata. Whatever may be absent in a Node may be null, too. ApiError."""
        with told("read", NODES):
            metadata, cidrs = item["metadata"], cidrs_in((item.get("spec") or {}).get("podCIDRs") or ())
            facts = [text_in(metadata, key, False) for key in ("uid", "creationTimestamp")]
            record = text_in(metadata.get("annotations") or {}, RECORD, False)
            return text_in(metadata, "name"), Seen(record, Facts(*facts, None if self.guard else tuple(map(str, cidrs))))

    def _parse_own(self, item):
        """The same of our own Node: (name, see self.own)."""
        name, (text, facts) = self._parse_node(item)
        with told("read", NODES):
            cidrs, status = (item.get("spec") or {}).get("podCIDRs") or [], item.get("status") or {}
            found = [entry for entry in status.get("conditions") or () if entry.get("type") == "NetworkUnavailable"]
            own = {"uid": facts.uid, "podCIDRs": cidrs, "record": text, "version": text_in(item["metadata"], "resourceVersion")}
            own["condition"] = {key: found[0].get(key) for key in ("status", "reason", "lastTransitionTime")} if found else {}
            own["addresses"] = [entry.get("address") for entry in status.get("addresses") or ()]
            return name, own

    def _take_nodes(self, kind, items):
        """Take over one node, or (LIST) all. One that says nothing new to us, like a kubelet's sign of life, is no news."""
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
        """The same of our own Node. StoreError if the cluster has none."""
        own = {} if kind == "DELETED" else dict(items).get(self.node_name, {})
        with self.lock:
            if own and self.own and is_older(own["version"], self.own["version"]):
                return  # it was sent before what we wrote was there
            changed = self.own is None or {**own, "version": ""} != {**self.own, "version": ""}
            self.own = own
        self._announce(changed)
        self.work.set()
        if not own:
            raise StoreError(f"the cluster has no node {self.node_name}: is --node-name right?")

    def _is_whole(self):
        """Whether metadata is not enough of other nodes: so it is unless something keeps one from writing another's record."""
        if self.guard is None:
            self.guard = self._test_guard()
        return not self.guard

    def _test_guard(self):
        """Whether an admission policy bites: a change of another node's record, tried without effect (dryRun), is to be refused. None if
        that cannot be tried. Were it done all the same, that record would have a space more."""
        try:
            items = self.api.request("GET", NODES, params={"limit": 2}, accept=METADATA_LIST)
            with told("read", NODES):
                nodes = dict(map(self._parse_node, items["items"]))
            others = [name for name in nodes if name != self.node_name]
            if not others:
                return None
            body = {"metadata": {"annotations": {RECORD: (nodes[others[0]].text or "") + " "}}}
            self.api.request("PATCH", f"{NODES}/{others[0]}", body, {"dryRun": "All"}, MERGE_PATCH)
            return False
        except ApiError as error:
            return True if error.status in (403, 422) else None

    def _write(self):
        """Thread: have our Node say what it should, whenever one of the two changes; then the second look, and Events."""
        failures, next_note = 0, 0
        while True:
            self.work.wait(1 if self.notes else None)
            self.work.clear()
            try:
                if self.looking:
                    accept = METADATA_LIST if self.guard else JSON
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
                missing = min(failures, 60) if getattr(error, "status", 0) == 403 else 0  # a right is given by a person, some time
                self._tell("write", f"the API server: {error}")
                time.sleep(pause_s(failures, max(missing, wish_s(error))))
                self.work.set()

    def _write_own(self):
        """Write the record and the condition NetworkUnavailable where our Node says something else. The uid in it keeps it from a Node
        of the same name that was made meanwhile."""
        own, record, condition = self.own, self.record, self.condition
        if not own:
            return
        path, metadata = f"{NODES}/{self.node_name}", {"uid": own["uid"]}
        if record and record != own["record"] and json.loads(record)["uid"] == own["uid"]:
            body = {"metadata": {**metadata, "annotations": {RECORD: record}}}
            self._take_own("MODIFIED", [self._parse_own(self.api.request("PATCH", path, body, None, MERGE_PATCH))])
        there = own["condition"]
        if condition and condition[:2] != (there.get("status"), there.get("reason")):
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            since = there["lastTransitionTime"] if condition[0] == there.get("status") and there["lastTransitionTime"] else now
            words = dict(zip(("status", "reason", "message"), condition))
            entry = {"type": "NetworkUnavailable", **words, "lastTransitionTime": since, "lastHeartbeatTime": now}
            body = {"metadata": metadata, "status": {"conditions": [entry]}}
            self._take_own("MODIFIED", [self._parse_own(self.api.request("PATCH", f"{path}/status", body, None, STRATEGIC_PATCH))])

    def _send_event(self, name, reason):
        what, kind = ("RecordRefused", "Warning") if reason else ("RecordAccepted", "Normal")
        message = f"MNCNI does not connect this node: {reason}" if reason else "MNCNI connects this node again"
        source = {"component": "mncni-agent", "host": self.node_name}
        send_event(self.api, name, name, message, reason=what, type=kind, source=source)


def send_event(api, name, uid, message, **words):
    """A Kubernetes Event about a node, best effort. All who say it give it one name: the cluster keeps one per ten minutes."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    body = {
        "metadata": {"name": f"{name}.{mncni.short_hash(message, str(now // 600))}", "namespace": "default"},
        "involvedObject": {"apiVersion": "v1", "kind": "Node", "name": name, "uid": uid},
        **{"message": message, "firstTimestamp": stamp, "lastTimestamp": stamp, "count": 1, **words},
    }
    try:
        api.request("POST", "/api/v1/namespaces/default/events", body)
    except ApiError as error:
        log.log(logging.DEBUG if error.status == 409 else logging.INFO, "no Event about node %s: %s", name, error)


def is_older(version, than):
    """Whether a resourceVersion came before another; unknown counts as no."""
    known = all(text.isascii() and text.isdigit() and len(text) < 30 for text in (version, than))
    return known and int(version) < int(than)


def pause_s(failures, wish):
    """How long to wait before the next try: longer each time, up to 4 s, and as long as the server wishes; never all at once."""
    return max(min(4, 0.25 * 2 ** min(failures, 4)), wish) * (0.75 + jitter() / 2) + (jitter() if wish else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Records: what a node says about itself                                                     pure; trusted in nothing
# ---------------------------------------------------------------------------------------------------------------------


class BadRecord(Exception):
    """Why a record is not believed, in words for the operator."""


@dataclass(frozen=True)
class Node:
    """A record that passed every check. key: base64. created: text that sorts by time ("" if unknown, which counts as youngest).
    set_back: a number that changes when the node's clock was set back."""

    name: str
    uid: str
    created: str
    pod_cidrs: tuple
    endpoints: tuple
    key: str
    port: int
    set_back: int = 0

    # What every pass asks of every node is worked out once per record.

    @functools.cached_property
    def allowed_ips(self):
        return {str(cidr) for cidr in self.pod_cidrs}

    @functools.cached_property
    def spans(self):
        return [span_of(cidr) for cidr in self.pod_cidrs]

    @functools.cached_property
    def targets(self):
        """{IP version: "address:port"} of the first endpoint of each family, in the record's order."""
        first = {endpoint.version: endpoint for endpoint in reversed(self.endpoints)}
        return {version: endpoint_text(first[version], self.port) for version in dict.fromkeys(each.version for each in self.endpoints)}


def span_of(cidr):
    """(IP version, first address, last address) as numbers: they sort, and compare in no time."""
    return cidr.version, int(cidr.network_address), int(cidr.broadcast_address)


def format_record(settings, uid, endpoints, key, generation, created, set_back=0):
    """This node's record as text: compact JSON. The order of its keys is part of the format: policies compare its beginning."""
    record = {
        "v": 1,
        "podCIDRs": [str(cidr) for cidr in settings.pod_cidrs],
        "uid": uid,
        "endpoints": [str(endpoint) for endpoint in endpoints],
        "slots": {"0": {"key": key, "port": settings.ports[0]}},
        "gen": generation,
        **({"created": created} if created else {}),
        **({"setBack": set_back} if set_back else {}),
    }
    return json.dumps(record, separators=(",", ":"))


def parse_record(name, text, cluster_cidrs):
    """A Node from the text of a record. BadRecord says what is wrong. It costs no more than the text is long."""
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
    if checked(record, "v", int) != 1:
        raise BadRecord(f"the record's version is {shown(record['v'])}, this agent reads 1")
    slot = checked(checked(record, "slots", dict), "0", dict)
    pod_cidrs = tuple(parse_pod_cidr(cidr, cluster_cidrs) for cidr in checked(record, "podCIDRs", list))
    twins = find_twins(pod_cidrs)
    if twins:
        raise BadRecord(f"its pod CIDRs {twins[0]} and {twins[1]} overlap")
    uid, created = checked(record, "uid", str)[:64], parse_time(record.get("created", ""))
    endpoints = tuple(parse_endpoint(endpoint, cluster_cidrs) for endpoint in checked(record, "endpoints", list))
    key, port = parse_key(checked(slot, "key", str)), parse_port(checked(slot, "port", int))
    set_back = record.get("setBack", 0)
    return Node(name, uid, created, pod_cidrs, endpoints, key, port, set_back if type(set_back) is int else 0)


def unique_keys(pairs):
    """json.loads hook: a key given twice means one thing to us and another to the next reader."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def checked(mapping, key, kind):
    """mapping[key], of the given type and, if a list, of 1 to 16 elements. BadRecord."""
    value = mapping.get(key)
    if type(value) is not kind or (kind in (list, str) and not value):
        raise BadRecord(f'"{key}" is {shown(value)}, not {mncni.kind_of(kind())} with content')
    if kind is list and len(value) > 16:
        raise BadRecord(f'"{key}" has {len(value)} elements')
    return value


def shown(value):
    """A stranger's value, fit for a log line: JSON, short."""
    try:
        text = json.dumps(value)
    except RecursionError:  # json.loads can get one level further than json.dumps
        text = "(nested too deep)"
    return text if len(text) <= 60 else text[:57] + "..."


def listed(values):
    """Several values, fit for a log line."""
    text = ", ".join(map(str, values))
    return text if len(text) <= 120 else text[:117] + "..."


def parse_time(text):
    """RFC 3339 text in a form that sorts, "" if it is none. It only breaks ties, so a bad one is not worth a quarantine."""
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
    if mapped or address.is_unspecified or address.is_loopback or address.is_multicast or address.is_link_local:
        raise BadRecord(f"endpoint {address} cannot be another node's address")
    if is_in(address, cluster_cidrs):
        raise BadRecord(f"endpoint {address} is inside the cluster CIDR: it would be reached through itself")
    return address


def parse_key(text):
    """A WireGuard public key, base64 in its one canonical form. BadRecord."""
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


def agreed(node, facts):
    """A node with what the cluster says about it, which is not its to forge. BadRecord where its record says otherwise."""
    if node.uid != facts.uid:
        raise BadRecord("the record is of an earlier node of this name")
    if facts.pod_cidrs is not None and {str(cidr) for cidr in node.pod_cidrs} != set(facts.pod_cidrs):
        claimed, given = listed(node.pod_cidrs), listed(facts.pod_cidrs) or "none"
        raise BadRecord(f"its record claims the pod CIDRs {claimed}, the cluster gave it {given}")
    return replace(node, created=parse_time(facts.created))


class Roster:
    """Which records are believed. judge() is pure but for a memory: a record is validated once per content.

    facts: {name: Facts} of the nodes of which a cluster tells more than their records.
    """

    def __init__(self, settings):
        self.settings = settings
        self.memory = {}
        self.facts = {}

    def judge(self, records, own_key, own_endpoints):
        """({name: Node}, {name: reason}) of the other nodes' records. Of two that claim one key or one address, the older is believed."""
        usable, quarantine, families = {}, {}, {endpoint.version for endpoint in own_endpoints}
        own_spans = sorted((*span_of(cidr), "") for cidr in self.settings.pod_cidrs)
        self.memory = {name: known for name, known in self.memory.items() if name in records}
        for name, text in sorted(records.items()):
            if name == self.settings.node_name:
                continue
            verdict = self.verdict(name, text)
            reason = verdict if isinstance(verdict, str) else clash_with_self(verdict, own_key, own_spans, families)
            if reason:
                quarantine[name] = reason
            else:
                usable[name] = verdict
        quarantine.update(find_clashes(usable.values()))
        return {name: node for name, node in usable.items() if name not in quarantine}, quarantine

    def verdict(self, name, text):
        """A Node, or the reason why a record is not believed whatever the others say."""
        known, content = self.memory.get(name), (text, self.facts.get(name))
        if known is None or known[0] != content:
            try:
                node = parse_record(name, text, self.settings.cluster_cidrs)
                known = (content, agreed(node, content[1]) if content[1] else node)
            except BadRecord as error:
                known = (content, str(error))
            self.memory[name] = known
        return known[1]

    def sound(self, records):
        """The names of the records that are believed, unless others clash with them."""
        return {name for name, text in records.items() if isinstance(self.verdict(name, text), Node)}


def clash_with_self(node, own_key, own_spans, own_families):
    """Why a node cannot be a peer of this one, None if it can."""
    if node.key == own_key:
        return "it has this node's key"
    for cidr, span in zip(node.pod_cidrs, node.spans):
        if find_overlap(own_spans, span) is not None:
            return f"its pod CIDR {cidr} is this node's"
    if own_families.isdisjoint(node.targets):
        return f"it has no endpoint of a family that this node has: {', '.join(map(str, node.endpoints))}"
    return None


def find_clashes(nodes):
    """{name: reason} of the nodes that lose to an older one: same key, or pod CIDRs that overlap."""
    spans = sorted(span for node in nodes for span in node.spans)
    apart = all(one[0] != two[0] or one[2] < two[1] for one, two in zip(spans, spans[1:]))
    if apart and len({node.key for node in nodes}) == len(nodes):
        return {}  # as good as always
    lost, keys, held = {}, {}, []  # held: (*span, name) of the CIDRs believed so far, in order and disjoint
    for node in sorted(nodes, key=seniority):
        owner = keys.get(node.key) or next(filter(None, (find_overlap(held, span) for span in node.spans)), None)
        if owner:
            what = "key" if node.key in keys else "pod CIDR"
            lost[node.name] = f"its {what} is that of the older node {owner}"
            continue
        keys[node.key] = node.name
        for span in node.spans:
            bisect.insort(held, (*span, node.name))
    return lost


def find_overlap(held, span):
    """The name that holds part of a span, None if nobody does. held: (*span, name), sorted and disjoint."""
    version, first, last = span
    place = bisect.bisect_right(held, (version, last, 1 << 129))  # everything from here on begins behind it
    return held[place - 1][3] if place and held[place - 1][0] == version and held[place - 1][2] >= first else None


def seniority(node):
    return (node.created or "9999", node.uid, node.name)


def endpoint_text(address, port):
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def lost_too_many(lost, known):
    """Whether so many of the known nodes are lost at once that the store is the likelier cause: more than three and more than a fifth."""
    return len(lost) > max(3, len(known) // 5)


# ---------------------------------------------------------------------------------------------------------------------
# State on disk: the key, the last good list of nodes
# ---------------------------------------------------------------------------------------------------------------------


def make_key():
    """A WireGuard private key, base64: 32 random bytes, clamped (RFC 7748, section 5)."""
    key = bytearray(os.urandom(32))
    key[0] &= 248
    key[31] = (key[31] & 127) | 64
    return base64.b64encode(key).decode()


def ensure_key(path, device_key):
    """The private key in the file at path; made first if there is none, taken from a running device if that has one. CNIError 5
    for a damaged file: a new key would be a new identity, so that is the operator's decision."""
    directory = os.path.dirname(path)
    mncni.own_directory(directory, 0o700)
    ensure_mode(directory, 0o700)
    text = mncni.read_file(path) if is_own_file(path) else None
    if text is None:  # half a key must not survive a power failure either, hence each step is on the disk before the next
        text = device_key or make_key()
        write_if_changed(f"{path}.new", text + "\n", mode=0o600)
        sync(f"{path}.new")
        os.rename(f"{path}.new", path)
        sync(directory)
        return text
    ensure_mode(path, 0o600)
    try:
        return parse_key(text.strip())
    except BadRecord as error:
        what = f"the key file {path} is damaged: {error}"
        raise CNIError(mncni.IO_FAILURE, f"{what}; put the key back, or remove the file and restart to get a new one") from None


def is_own_file(path):
    """Whether there is a file. CNIError 5 for a link, or what is linked from elsewhere, or another user's: we made no such thing."""
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
    """Have a file, or the names in a directory, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = path  # fsync(2) knows no name
        raise
    finally:
        os.close(descriptor)


def load_json(path, check=dict):
    """The object in a file of ours; {} if there is none, or it is unreadable: it is a help, no truth. check(object) fails for one that
    is not what we write."""
    try:
        value = mncni.parse_json_object(mncni.read_state(path) or "{}", path)
        check(value)
        return value
    except (OSError, CNIError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        log.warning("%s is unreadable (%s %s); going on without", path, type(error).__name__, error)
        return {}


def check_loaded(tables):
    """ValueError, TypeError unless this is what Context.loaded may be."""
    for text, _ in tables.values():
        text.splitlines()


def load_state(path):
    """{"own": our record's fields, "records": {name: text}}, the last good list."""
    state = load_json(path)
    own, records = (state.get(key) if isinstance(state.get(key), dict) else {} for key in ("own", "records"))
    kinds = {"uid": str, "created": str, "text": str, "gen": int, "set_back": int, "seen": bool, "podCIDRs": list, "addresses": list}
    own = {key: value for key, value in own.items() if type(value) is kinds.get(key)}
    with contextlib.suppress(ValueError, KeyError):
        own["podCIDRs"] = [str(cidr) for cidr in cidrs_in(own.pop("podCIDRs"))]
    return {"own": own, "records": {name: text for name, text in records.items() if isinstance(text, str)}}


def write_if_changed(path, text, mode=0o644):
    """Write a file unless it says so already. Returns whether it was written. CNIError 5 naming the file."""
    try:
        if mncni.read_state(path) == text:
            return False
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        write_file(path, text, mode)
    except OSError as error:  # a full disk does not say which file was written
        raise CNIError(mncni.IO_FAILURE, f"cannot write {path}: {error.strerror}") from None
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Routes and firewall: pure
# ---------------------------------------------------------------------------------------------------------------------


def route(dst, **fields):
    """A route in the form that is compared: dst, kind ("unicast", "unreachable"), and via, dev, src, metric where they matter."""
    return {"dst": str(dst), "kind": fields.pop("kind", "unicast"), **{key: str(value) for key, value in fields.items()}}


def floor_routes(cidrs):
    return [route(cidr, kind="unreachable", metric=FLOOR_METRIC) for cidr in cidrs]


def host_routes(settings):
    """The host's routes: the cluster into the tunnel, with the pods' gateway as source, and the floor below that."""
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
    """What the namespace has to route: own pods to the host, the rest of the cluster into the device, anything else nowhere."""
    routes = [route(default, kind="unreachable", metric=FLOOR_METRIC) for default in ("0.0.0.0/0", "::/0")]
    routes += [route(cidr, dev=DEVICE) for cidr in settings.cluster_cidrs if cidr.version in settings.families]
    for cidr, gateway in settings.gateways.items():  # the gateway is inside the cluster: IPv6 would look for it behind DEVICE, and refuse
        routes += [route(f"{gateway}/{gateway.max_prefixlen}", dev=NS_VETH), route(cidr, via=gateway, dev=NS_VETH)]
    return routes


def parse_route(entry, family):
    """A route of `ip -json` in the form of route()."""
    dst = {"4": "0.0.0.0/0", "6": "::/0"}[family[1]] if entry["dst"] == "default" else str(ipaddress.ip_network(entry["dst"], strict=False))
    if entry.get("type", "unicast") != "unicast":
        return route(dst, kind=entry["type"], metric=entry.get("metric", 0))
    fields = {"via": entry.get("gateway"), "dev": entry.get("dev"), "src": entry.get("prefsrc")}
    return route(dst, **{key: value for key, value in fields.items() if value})


def missing_routes(wanted, present):
    """Lines for `ip -batch` that set what is not there or is there otherwise."""
    return [route_line("replace", entry) for entry in wanted if entry not in present]


def stale_routes(wanted, present):
    """Lines that delete what is ours and no longer wanted."""
    keys = {(entry["dst"], entry.get("metric")) for entry in wanted}
    return [route_line("delete", entry) for entry in present if (entry["dst"], entry.get("metric")) not in keys]


def route_line(verb, entry):
    """onlink: the next hop is on this link because we put it there, not because an address says so."""
    words = ["route", verb, *([entry["kind"]] if entry["kind"] != "unicast" else []), entry["dst"]]
    for key in ("via", "dev", "src", "metric"):
        words += [key, entry[key]] if key in entry else []
    return " ".join([*words, *(["onlink"] if "via" in entry else []), "proto", str(ROUTE_PROTOCOL)])


def nft_set(name, version, cidrs):
    """A named set of networks as nft text, "" for no networks of that family: then no rule names it either."""
    own = list(ipaddress.collapse_addresses(cidr for cidr in cidrs if cidr.version == version))
    kind = {4: "ipv4_addr", 6: "ipv6_addr"}[version]
    return f"  set {name}{version} {{ type {kind}; flags interval; elements = {{ {', '.join(map(str, own))} }}; }}\n" if own else ""


def host_firewall(settings, leaked=(0, 0)):
    """The table "inet mncni" of the host as nft text. leaked: (packets, bytes) that the leak counter goes on from.

    What comes in is judged before connection tracking: behind it, an answer to what the host translated carries other addresses. What
    goes out is judged last of all: before, a connection of the host's own that was translated still has the interface it began with.
    """
    sets, inbound, leaks, nat = "", [], [], []
    for version, ip in ((4, "ip"), (6, "ip6")):
        cluster = nft_set("cluster", version, settings.cluster_cidrs)
        pods = nft_set("pods", version, settings.pod_cidrs)
        sets += cluster + pods
        if cluster:
            ways = f'{{ "{settings.bridge}", "{HOST_VETH}", "lo" }}'
            leaks.append(f"{ip} daddr @cluster{version} oifname != {ways} counter name leaked drop")
        inbound += inbound_rules(settings.bridge, version, ip) if pods else [f'iifname "{settings.bridge}" meta nfproto ipv{version} drop']
        nat += nat_rules(settings, version, ip) if pods else []
    counter = f"  counter leaked {{ packets {leaked[0]} bytes {leaked[1]} }}\n"
    chains = nft_chain("inbound", "filter", "prerouting", "raw", inbound)
    chains += nft_chain("outbound", "filter", "postrouting", "mangle", leaks) + nft_chain("nat", "nat", "postrouting", "srcnat - 10", nat)
    return nft_table(counter + sets + chains)


def inbound_rules(bridge, version, ip):
    """From the bridge only what own pods may send, from the tunnel only what is for them; and neighbour discovery."""
    sources = {4: "", 6: "ip6 saddr != fe80::/10 ip6 saddr != :: "}[version]
    targets = {4: "", 6: "ip6 daddr != fe80::/10 ip6 daddr != ff02::/16 "}[version]
    return [
        f'iifname "{bridge}" {ip} saddr != @pods{version} {sources}drop',
        f'iifname "{HOST_VETH}" {ip} daddr != @pods{version} {targets}drop',
    ]


def nat_rules(settings, version, ip):
    """Into the tunnel only pods' addresses and the gateway's, for peers drop all others; to the world, if so decided, the node's."""
    gateway = next(gateway for cidr, gateway in settings.gateways.items() if cidr.version == version)
    rules = [f'oifname "{HOST_VETH}" {ip} saddr != @pods{version} snat {ip} to {gateway}']
    multicast = {4: "224.0.0.0/4", 6: "ff00::/8"}[version]
    out = f"{ip} saddr @pods{version} {ip} daddr != @cluster{version} {ip} daddr != {multicast} masquerade"
    return rules + ([out] if settings.masquerade else [])


def ns_firewall(settings):
    """The table "inet mncni" of the namespace: from the host into the device, from the device to own pods, nothing else, and nothing
    for the namespace itself but neighbour discovery."""
    rules = [f'iifname "{NS_VETH}" oifname "{DEVICE}" accept']
    sets = "".join(nft_set("pods", version, settings.pod_cidrs) for version in (4, 6))
    for version in settings.families:
        ip = {4: "ip", 6: "ip6"}[version]
        rules.append(f'iifname "{DEVICE}" oifname "{NS_VETH}" {ip} daddr @pods{version} accept')
    forward = nft_chain("forward", "filter", "forward", "filter", rules, "drop")
    neighbours = ["icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"]
    return nft_table(sets + forward + nft_chain("input", "filter", "input", "filter", neighbours, "drop"))


def nft_chain(name, kind, hook, priority, rules, policy="accept"):
    body = "".join(f"    {rule}\n" for rule in rules)
    return f"  chain {name} {{\n    type {kind} hook {hook} priority {priority}; policy {policy};\n{body}  }}\n"


def nft_table(body):
    """One transaction that puts a table in the place of the one there may be: no packet sees the gap."""
    return f"table inet mncni\ndelete table inet mncni\ntable inet mncni {{\n{body}}}\n"


def parse_nft(text):
    """(what `nft -j list table` says less handles and counts, (packets, bytes) of the leak counter)."""
    items = [item for item in json.loads(text or "{}").get("nftables", []) if "metainfo" not in item]
    counters = [item["counter"] for item in items if item.get("counter", {}).get("name") == "leaked"]
    return without_volatile(items), tuple(max(0, int(counters[0][key])) for key in ("packets", "bytes")) if counters else (0, 0)


def without_volatile(value):
    """A JSON value less what changes by itself: handles, packet and byte counts."""
    if isinstance(value, dict):
        return {key: without_volatile(item) for key, item in value.items() if key not in ("handle", "packets", "bytes")}
    return [without_volatile(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------------------------
# Peers: pure
# ---------------------------------------------------------------------------------------------------------------------


def desired_peers(nodes, own_endpoints):
    """{key: {"name", "endpoint", "allowed_ips", "set_back"}} from {name: Node}."""
    peers, families = {}, {endpoint.version for endpoint in own_endpoints}
    for name, node in nodes.items():
        endpoint = next(text for version, text in node.targets.items() if version in families)
        peers[node.key] = {"name": name, "endpoint": endpoint, "allowed_ips": node.allowed_ips, "set_back": node.set_back}
    return peers


def parse_dump(text):
    """{"private_key", "public_key", "port", "peers": {key: {"endpoint", "allowed_ips", "handshake", "rx", "tx"}}} of `wg show dump`.

    Never to be logged: its first line holds the private key. CNIError 100 without a word of it if it reads otherwise. wg(8), show."""
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


def plan_peers(desired, present, sent):
    """Arguments for `wg set <device>`, a list per peer: what differs and nothing else, new and changed peers before removals.

    sent: the peers that we set last. An endpoint is sent again only when a record changed it: WireGuard itself follows a peer
    that moves, and every repetition would fight it. A peer whose clock was set back is made anew: WireGuard takes its handshakes for
    replays until the clock is where it was, or until it has forgotten the peer (WireGuard, section 5.1).
    """
    changes = []
    for key, peer in sorted(desired.items(), key=lambda item: item[1]["name"]):
        there, former, words = present.get(key), sent.get(key, {}), []
        remade = there is not None and former.get("set_back", peer["set_back"]) != peer["set_back"]
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
        changes += greetings([key]) if remade else []
    return changes + [["peer", key, "remove"] for key in sorted(set(present) - set(desired))]


def greetings(keys):
    """Arguments for `wg set` that make this node known to peers at once, by a keepalive: one that still has a session with a device
    before this one would not notice for 15 s."""
    return [["peer", key, "persistent-keepalive", seconds] for seconds in ("1", "0") for key in sorted(keys)]


# ---------------------------------------------------------------------------------------------------------------------
# The stages of a pass: each looks, compares, applies the difference. Their order is the safety: the floor comes first.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Context:
    """What a pass works with, and what passes remember from one another.

    loaded: {"host" or "ns": [table text, what the kernel listed right after it was loaded]}, also in a file, so that the next agent
    need not load it again. peers: see desired_peers. sent: those that we set last; None before the first pass.
    """

    settings: Settings
    run: object
    boot_id: str
    endpoints: tuple = ()
    mtu: int = 0
    public_key: str = ""
    nodes: dict = field(default_factory=dict)
    loaded: dict = field(default_factory=dict)
    peers: dict = field(default_factory=dict)
    sent: dict = None
    daemons: list = field(default_factory=list)


def look_routes(run, netns=""):
    """Our routes, both families, in the form of route()."""
    command = f"route show table main proto {ROUTE_PROTOCOL}"
    return [parse_route(entry, family) for family in ("-4", "-6") for entry in look_ip([command], run, netns, family) if "dst" in entry]


def ensure_endpoints(context):
    """Find out the node's addresses, where the operator did not say. CNIError 7 for one that the floor would cut off."""
    context.endpoints = context.settings.endpoints or look_endpoints(context.run)
    trouble = address_trouble("this node's address", context.endpoints, context.settings.cluster_cidrs)
    if trouble:
        raise config_error(trouble)


def ensure_mtu(context):
    """Find out the pods' MTU, where the operator did not say. CNIError 7 if it cannot be known."""
    settings, context.mtu = context.settings, context.settings.mtu
    if not context.endpoints:
        raise config_error("no default route tells this node's address: give it with --endpoint")
    if context.mtu:
        return
    commands = [f"address show to {address}" for address in context.endpoints]
    links = [link for link in look_ip(commands, context.run) if link.get("addr_info")]
    if not links:
        raise config_error(f"no interface has the address --endpoint {', '.join(map(str, context.endpoints))}; is it up?")
    overhead = max(UNDERLAY_OVERHEAD[endpoint.version] for endpoint in context.endpoints)
    context.mtu = min(link["mtu"] for link in links) - overhead
    if context.mtu < smallest_mtu(settings.pod_cidrs):
        raise config_error(f"the underlay's MTU leaves {context.mtu} bytes for pods, too little; set --mtu, or raise the underlay's")


def look_endpoints(run):
    """The source addresses of the default routes, IPv4 first; none where there is none, or not yet."""
    probes = {"-4": "route get 192.0.2.1", "-6": "route get 2001:db8::1"}  # documentation addresses: only a default route leads there
    found = []
    for family, probe in probes.items():
        with contextlib.suppress(CNIError):
            found += [ipaddress.ip_address(entry["prefsrc"]) for entry in look_ip([probe], run, "", family) if entry.get("prefsrc")]
    return tuple(found)


def ensure_floor(context):
    """Before anything else is built: what is for the cluster and cannot go through the tunnel goes nowhere."""
    settings, run = context.settings, context.run
    lines = missing_routes(floor_routes([*settings.cluster_cidrs, *settings.pod_cidrs]), look_routes(run))
    apply([ip_batch(lines)] if lines else [], run)
    ensure_firewall(context, "host", lambda leaked: host_firewall(settings, leaked))


def ensure_firewall(context, where, text_of):
    """Load the table "inet mncni" of the host or the namespace unless it stands as we loaded it."""
    netns = context.settings.netns if where == "ns" else ""
    listing, leaked = look_firewall(context.run, netns)
    text, expected = context.loaded.get(where, ["", None])
    if listing == expected and text == text_of((0, 0)):
        return
    if leaked[0]:
        log.warning("%d packets for the cluster were on their way out in clear and were dropped", leaked[0])
    apply([Command(in_netns(netns, ["nft", "-f", "-"]), text_of(leaked))], context.run)
    context.loaded[where] = [text_of((0, 0)), look_firewall(context.run, netns)[0]]
    write_if_changed(os.path.join(context.settings.run_dir, "firewall.json"), json.dumps(context.loaded) + "\n")


def look_firewall(run, netns):
    return mncni.understood("nft", parse_nft, ask(Command(in_netns(netns, ["nft", "-j", "list", "table", "inet", "mncni"])), run).stdout)


def ensure_namespace(context):
    """The namespace, forwarding and filtering in it, and its floor: no way out for what has no route."""
    settings, run = context.settings, context.run
    facts = look_namespace(context)
    if facts is None:
        apply([Command(["ip", "netns", "add", settings.namespace])], run)
        facts = look_namespace(context)
    refuse_foreign_namespace(settings, facts)
    apply(plan_ns_sysctls(facts, settings.netns), run)
    lines = [f"link set dev {link['ifname']} up" for link in facts if link.get("ifname") == "lo" and "UP" not in link["flags"]]
    lines += missing_routes([entry for entry in ns_routes(settings) if entry["kind"] == "unreachable"], look_routes(run, settings.netns))
    apply([ip_batch(lines, settings.netns)] if lines else [], run)
    ensure_firewall(context, "ns", lambda leaked: ns_firewall(settings))


def refuse_foreign_namespace(settings, facts):
    """CNIError 7 if the namespace has links that are not ours."""
    foreign = sorted(link["ifname"] for link in facts if "ifname" in link and link["ifname"] not in ("lo", DEVICE, NS_VETH))
    if foreign:
        raise config_error(f'namespace "{settings.namespace}" is somebody else\'s: it has {", ".join(foreign)}; set --namespace')


def look_namespace(context):
    """Links, addresses and sysctls in the namespace, None if there is none. A name without a namespace behind it is removed."""
    settings = context.settings
    try:
        return look_ip(["address show", "netconf show"], context.run, settings.netns)
    except CNIError as error:
        if error.code != mncni.BAD_NETNS:
            raise
        if os.path.lexists(settings.netns):
            apply([Command(["ip", "netns", "delete", settings.namespace])], context.run)
        return None


def plan_ns_sysctls(facts, netns):
    """Forward both families (a new namespace does not forward IPv6), and no reverse path filter: routes are few and strict already."""
    entries = [entry for entry in facts if "interface" in entry]
    keys = {"inet": "net/ipv4/ip_forward", "inet6": "net/ipv6/conf/all/forwarding"}
    every = [entry for entry in entries if entry["interface"] == "all" and entry.get("family") in keys]
    off = [keys[entry["family"]] for entry in every if not entry.get("forwarding")]
    filtered = [f"net/ipv4/conf/{entry['interface']}/rp_filter" for entry in entries if entry.get("rp_filter", "off") != "off"]
    return [mncni.write_sysctls(sorted(keys), value, netns) for keys, value in ((off, 1), (filtered, 0)) if keys]


def ensure_links(context):
    """The veth pair and the WireGuard device, each with its MTU, up, and where it belongs."""
    settings, run = context.settings, context.run
    host = look_ip([f"address show dev {HOST_VETH}", f"address show dev {DEVICE}"], run)
    inside = look_ip(["address show"], run, settings.netns)
    apply(plan_veth(settings, context.mtu, look_link(HOST_VETH, host), look_link(NS_VETH, inside)), run)
    device = look_link(DEVICE, inside)
    if device is None:
        device = move_device(context, look_link(DEVICE, host))
    apply(plan_link(DEVICE, device, context.mtu, settings.netns), run)


def plan_link(name, link, mtu, netns=""):
    """Commands that give a link this MTU and bring it up, where it is otherwise."""
    lines = [f"link set dev {name} mtu {mtu}"] if link.get("mtu") != mtu else []
    lines += [] if "UP" in link.get("flags", []) else [f"link set dev {name} up"]
    return [ip_batch(lines, netns)] if lines else []


def refuse_foreign(link, way_out="rename or remove it"):
    """CNIError 7 unless a link is absent or ours."""
    if link is not None and not mncni.is_own(link):
        raise config_error(f'link "{link["ifname"]}" is somebody else\'s: it lacks the alias "{mncni.OWNER_ALIAS}"; {way_out}')


def plan_veth(settings, mtu, host, inside):
    """Commands for the veth pair. Half a pair is no pair: what is left of it is removed first. CNIError 7 if it is not ours."""
    refuse_foreign(host)
    if host and inside and "ifalias" in host:
        return plan_link(HOST_VETH, host, mtu) + plan_link(NS_VETH, inside, mtu, settings.netns)
    inner_first = [ip_batch([f"link delete dev {NS_VETH}"], settings.netns)] if inside else []
    lines = [f"link delete dev {HOST_VETH}"] if host and not inside else []
    host_mac, ns_mac = mncni.mac_of(HOST_VETH, "0a:59"), mncni.mac_of(NS_VETH, "0a:59")
    peer = f"peer name {NS_VETH} netns {settings.netns} mtu {mtu} address {ns_mac}"
    lines.append(f"link add name {HOST_VETH} mtu {mtu} address {host_mac} type veth {peer}")
    lines.append(f"link set dev {HOST_VETH} alias {mncni.OWNER_ALIAS} up")
    return [*inner_first, ip_batch(lines), ip_batch([f"link set dev {NS_VETH} up"], settings.netns)]


def move_device(context, device):
    """Make the device in the host, where its UDP socket stays, and move it into the namespace under the same name. What a crash left
    in the host is moved on. Returns {}: nothing of it is set yet."""
    if device is None:
        create_device(context)
    elif not is_wireguard(device):
        raise config_error(f'link "{DEVICE}" is somebody else\'s: it is no WireGuard device; rename or remove it')
    lines = [f"link set dev {DEVICE} alias {mncni.OWNER_ALIAS}", f"link set dev {DEVICE} netns {context.settings.netns}"]
    apply([ip_batch(lines)], context.run)
    return {}


def is_wireguard(link):
    """Whether a link may be a device of ours that has no alias yet: wireguard-go's are tun."""
    return link["ifname"] == DEVICE and link.get("linkinfo", {}).get("info_kind") in ("wireguard", "tun")


def create_device(context):
    """A WireGuard device in the host: the kernel's, else wireguard-go's. CNIError 4 if there is neither."""
    command = ip_batch([f"link add name {DEVICE} type wireguard"])
    reply = context.run(command)
    if reply.exit_code == 0:
        return
    if not any(words in reply.stderr for words in ("not supported", "Unknown device type")):
        raise mncni.command_failed(command, reply)
    with contextlib.suppress(CNIError):  # the one before takes its socket along when it ends, even if that is ours by then
        wait_until(lambda: not os.path.exists(WIREGUARD_GO_SOCKET), 1, "")
    try:
        with open(os.path.join(context.settings.run_dir, "wireguard-go.log"), "a", encoding="utf-8") as output:
            # In a session of its own: it carries the node's traffic and outlives the agent.
            context.daemons.append(start_process(["wireguard-go", "-f", DEVICE], output, output, start_new_session=True))
    except FileNotFoundError:
        what = "this kernel has no WireGuard (module wireguard) and there is no program wireguard-go"
        raise CNIError(mncni.BAD_ENVIRONMENT, f"{what}: load the one, or install the other (package wireguard-go)") from None
    silent, dump = "no answer from wireguard-go, whose log is in --run-dir", Command(["wg", "show", DEVICE, "dump"])
    wait_until(lambda: context.run(dump).exit_code == 0, 10, silent)
    # It hears of its MTU in the host alone; with another it pads packets that are full until they have to be fragmented. It takes up
    # one thing after the other, and its port last.
    apply([ip_batch([f"link set dev {DEVICE} mtu {context.mtu}", f"link set dev {DEVICE} up"])], context.run)
    wait_until(lambda: parse_dump(context.run(dump).stdout)["port"], 10, silent)


def start_process(argv, stdout, stderr, **options):
    """A process that goes on beside us; the runner is for those that end."""
    environ = {**os.environ, "LOG_LEVEL": "error", "PATH": mncni.search_path(os.environ)}
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environ, **options)


def wait_until(is_so, timeout_s, what):
    """Wait for a state. CNIError 100 after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise CNIError(mncni.COMMAND_FAILED, f"{what} (waited {timeout_s} s)")
        time.sleep(0.05)


def look_device(context):
    """parse_dump of our device."""
    command = Command(in_netns(context.settings.netns, ["wg", "show", DEVICE, "dump"]))
    return parse_dump(ask(command, context.run, may_be_gone=False).stdout)


def wg_set(context, words):
    return Command(in_netns(context.settings.netns, ["wg", "set", DEVICE, *words]))


def ensure_identity(context):
    """The device's key and port. Each is written only if it differs: wireguard-go drops packets at every repetition."""
    settings, device = context.settings, look_device(context)
    key_path = os.path.join(settings.state_dir, "key0")
    words = ["listen-port", str(settings.ports[0])] if device["port"] != settings.ports[0] else []
    if ensure_key(key_path, device["private_key"]) != device["private_key"]:
        words += ["private-key", key_path]
    if words:
        apply([wg_set(context, words)], context.run)
        device = look_device(context)
    context.public_key = device["public_key"]


def ensure_bridge(context):
    """The pods' bridge with their gateway addresses, and no others: those of an earlier pod CIDR go."""
    settings = context.settings
    conf = {"bridge": settings.bridge, "mtu": context.mtu, "forceAddress": True, "adoptBridge": False}
    bridge = look_link(settings.bridge, look_ip([f"address show dev {settings.bridge}"], context.run))
    refuse_foreign(bridge, "give --bridge another name")
    mncni.refuse_foreign_bridge(conf, bridge)
    gateways = [f"{gateway}/{cidr.prefixlen}" for cidr, gateway in settings.gateways.items()]
    lines = mncni.plan_bridge(conf, bridge, [] if bridge else gateways)
    wanted = {*gateways, BRIDGE_LINK_LOCAL} if 6 in settings.families else set(gateways)
    lines += plan_addresses(settings.bridge, wanted, bridge) if bridge else []
    apply(([ip_batch(lines)] if lines else []) + mncni.plan_no_advertisements(settings.bridge, bridge), context.run)


def ensure_addresses(context):
    """Addresses of the veth pair, then every route, in the host and in the namespace; then what is ours and stale goes."""
    settings, run = context.settings, context.run
    gateways = {f"{gateway}/{gateway.max_prefixlen}" for gateway in settings.gateways.values()}
    gateways |= {HOST_LINK_LOCAL} if 6 in settings.families else set()
    next_hops = {f"{NEXT_HOPS[version]}/{ {4: 32, 6: 64}[version] }" for version in settings.families}
    for name, wanted, routes, netns in (
        (HOST_VETH, gateways, host_routes(settings), ""),
        (NS_VETH, next_hops, ns_routes(settings), settings.netns),
    ):
        link = look_link(name, look_ip([f"address show dev {name}"], run, netns)) or {}  # just gone: ip will say so
        present = look_routes(run, netns)
        lines = plan_addresses(name, wanted, link) + missing_routes(routes, present) + stale_routes(routes, present)
        apply([ip_batch(lines, netns)] if lines else [], run)


def plan_addresses(name, wanted, link):
    """Lines that give a link the wanted addresses and take away others; link-local ones that the kernel made stay."""
    stale, missing = addresses_of(link, "global") - wanted, wanted - addresses_of(link)
    lines = [f"address delete {address} dev {name}" for address in sorted(stale)]
    return lines + [f"address replace {address} dev {name}{' nodad' if ':' in address else ''}" for address in sorted(missing)]


def ensure_ports(context):
    """Pods that are attached are ports of the bridge, also of one that was deleted and made again: its MAC is the same, so their
    neighbour caches are right."""
    lines = plan_ports(context.settings.bridge, look_ip(["link show type veth"], context.run))
    apply([ip_batch(lines)] if lines else [], context.run)


def plan_ports(bridge, links):
    lines = []
    for link in links:
        if link.get("ifalias", "").startswith(f"{mncni.OWNER_ALIAS}:{NETWORK}:") and link.get("master") != bridge:
            lines.append(f"link set dev {link['ifname']} master {bridge} up")
            lines.append(f"link set dev {link['ifname']} type bridge_slave hairpin on")
    return lines


def ensure_host_ports(context):
    """The plugin's host ports: its table may have gone with all of nft, or the bridge may have been made anew."""
    for problem in mncni.restore_portmap(mncni.DEFAULT_RUN_DIR, context.run):
        log.warning("put right: %s", problem)


def ensure_forwarding(context):
    """The host routes for its pods."""
    gateways = [str(gateway) for gateway in context.settings.gateways.values()]
    plan = mncni.plan_forwarding(gateways, mncni.look_forwarding(context.run))
    if any("ipv6" in " ".join(command.argv) for command in plan):  # a router heeds no other router's advertisements, unless told to
        defaults = [entry for entry in look_ip(["route show default"], context.run, "", "-6") if "dev" in entry]
        uplinks = {entry["dev"] for entry in defaults if entry.get("protocol") == "ra"}
        plan = [mncni.write_sysctls([f"net/ipv6/conf/{uplink}/accept_ra"], 2) for uplink in sorted(uplinks)] + plan
    apply(plan, context.run)


def ensure_peers(context, greet=False):
    """WireGuard's peers are the believed nodes. greet: they know this node's key, so a new device makes itself known to them."""
    present = look_device(context)["peers"]
    changes = plan_peers(context.peers, present, context.sent)
    if greet and not present:
        changes += greetings(context.peers)
    for start in range(0, len(changes), 100):
        apply([wg_set(context, [word for change in changes[start : start + 100] for word in change])], context.run)
    context.sent = context.peers


FLOOR = (ensure_endpoints, ensure_floor)
STAGES = (
    ensure_mtu,
    ensure_namespace,
    ensure_links,
    ensure_identity,
    ensure_bridge,
    ensure_ports,
    ensure_addresses,
    ensure_forwarding,
    ensure_host_ports,
)


def conflist(settings, mtu):
    """The CNI configuration of this node, as text. The chained plugins cost nothing to pods that do not ask for them."""
    plugin = {
        "type": "mncni",
        "plugin": ["naivewg", "portmap", "bandwidth", "lat"],
        "capabilities": dict.fromkeys(("ips", "mac", "portMappings", "bandwidth", "io.kubernetes.cri.pod-annotations"), True),
        "bridge": settings.bridge,
        "mtu": mtu,
        "ready": os.path.join(settings.run_dir, "ready"),
        "ipam": {"ranges": [[{"subnet": str(cidr)}] for cidr in settings.pod_cidrs]},
    }
    return json.dumps({"cniVersion": "1.0.0", "cniVersions": ["1.0.0", "1.1.0"], "name": NETWORK, "plugins": [plugin]}, indent=2) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The agent: events only say that it is time for a pass; a pass starts from the present state
# ---------------------------------------------------------------------------------------------------------------------


class Monitors:
    """`ip monitor` and `nft monitor`. What they say only means that it is time to look.

    Both run in the host: a process in the namespace would keep it alive when somebody deletes it. `all-nsid` has the namespace's links
    and routes told as well; its nft is glanced at. They end with the agent, however that ends.
    """

    COMMANDS = (["ip", "monitor", "all-nsid", "link", "address", "route", "netconf"], ["nft", "monitor"])
    WORDS = (b"mn", b"proto 201", b" all ", b" inet")  # our links and table, our routes, sysctls of all links, addresses

    def __init__(self, netns):
        self.netns = netns
        self.inode = None
        self.running = {}  # {"ip" or "nft": process}

    def tend(self):
        """Start what is not running. Returns whether the namespace is another one than last time, or gone."""
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
        """Wait for an event of ours, a byte from the pipe `wakeup`, or the end of the time. Returns whether there was an event."""
        outputs = [process.stdout for process in self.running.values()]
        ready, _, _ = select.select([wakeup, *outputs], [], [], timeout_s)
        if wakeup in ready:
            os.read(wakeup, 4096)
        said = [output.read(1 << 20) or b"" for output in outputs if output in ready]
        if b"" in said:  # one has ended, or cannot start: tend() starts it again, but not at once
            select.select([wakeup], [], [], POLL_S)
        return any(word in text for text in said for word in self.WORDS)

    def stop(self):
        for process in self.running.values():
            process.kill()
            process.wait()


def uptime():
    """Seconds since the kernel started, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Agent:
    """The node's agent. clock: seconds that only go forward. store: see DirectoryStore."""

    def __init__(self, settings, store, run, clock=time.monotonic):
        self.store, self.clock = store, clock
        loaded = load_json(os.path.join(settings.run_dir, "firewall.json"), check_loaded)
        self.context = Context(settings, run, mncni.boot_id(), loaded=loaded)
        self.roster = Roster(settings)
        self.state_path = os.path.join(settings.state_dir, "nodes.json")
        self.state = load_state(self.state_path)
        self.records = dict(self.state["records"])
        self.quarantine = {}
        self.stored = None  # our record as the store has it
        self.doubt_until = None  # on self.clock; while it is set, nodes that vanish are kept
        self.store_trouble = ""
        self.reason = "starting"
        self.counts, self.beat = Counts(), clock()  # beat: when the loop last came round
        self.next_pass = self.next_glance = 0
        self.wall_offset = os.path.getmtime(self.state_path) - uptime() if os.path.exists(self.state_path) else 0

    def tick(self, event=False):
        """One look at the store and, if something happened or an audit is due, one pass. Returns whether the node's network stands."""
        begin = self.beat = self.clock()
        news = self.is_set_back() or self.store.changed()
        look = event or bool(self.reason) or self.clock() >= self.next_pass or (not news and self.is_tunnel_changed())
        if not (news or look or (self.doubt_until is not None and self.clock() >= self.doubt_until)):
            return not self.reason
        try:
            self.reconcile(look)
            self.next_pass = self.clock() + AUDIT_S if look else self.next_pass
            self.say("")
        except Exception as error:  # whatever it is, the next pass starts from the present state, and the network stays
            self.next_pass = self.clock() + 1
            details = getattr(error, "details", "").splitlines()
            reason = (str(error) or type(error).__name__) + (f" ({details[0]})" if details else "")
            if not isinstance(error, (CNIError, OSError)) and reason != self.reason:
                log.exception("a defect of the agent, please report it")
            self.say(reason)
        self.write_status()
        for name, amount in (("passes", 1), ("seconds", self.clock() - begin), ("errors", bool(self.reason))):
            self.counts.add(f"mncni_reconcile_{name}_total", amount)
        return not self.reason

    def is_set_back(self):
        """Whether the wall clock was set back since the last look, or while there was no agent: our record says so, for WireGuard."""
        offset = time.time() - uptime()
        set_back_s, self.wall_offset = self.wall_offset - offset, offset
        if set_back_s < SET_BACK_S:
            return False
        log.warning("the clock was set back by %.0f s: the other nodes have to forget when our last handshake was", set_back_s)
        self.state["own"]["set_back"] = int(time.time())
        return True

    def is_tunnel_changed(self):
        """Whether WireGuard or the namespace's firewall are otherwise than we left them: no monitor says so. Asked every GLANCE_S."""
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
        allowed = {key: peer["allowed_ips"] for key, peer in device["peers"].items()}
        wanted = {key: peer["allowed_ips"] for key, peer in context.peers.items()}
        return allowed != wanted or device["port"] != self.settings.ports[0] or firewall != loaded

    def reconcile(self, look=True):
        """One pass: all stages, what the store says, our record, then the files that let pods in. look: False for a pass that only the
        store has asked for: nothing in the kernel has changed but what follows from that."""
        context = self.context
        mncni.own_directory(self.settings.run_dir)
        adopted, trouble = self.adopt()
        for stage in FLOOR if look or adopted or trouble else ():
            stage(context)
        if trouble:
            raise config_error(trouble)
        for stage in STAGES if look or adopted else ():
            stage(context)
        if context.sent is None:  # after a restart: what the agent before us sent
            self.judge()
            context.sent = context.peers
        troubles = [self.read_store(), self.store.trouble]
        self.judge()
        ensure_peers(context, greet=context.public_key in self.state["own"].get("text", ""))
        for act in (self.publish, self.save_state):
            try:
                act()
            except (StoreError, CNIError) as error:
                troubles.append(str(error))
        self.note(troubles)
        if look or adopted:
            mncni.install(self.settings.bin_dir)
        write_if_changed(os.path.join(self.settings.run_dir, "ready"), self.ready_text(""))
        path = os.path.join(self.settings.conf_dir, CONFLIST)
        if write_if_changed(path, conflist(self.settings, context.mtu)):
            log.info("wrote %s: pods can come", path)

    @property
    def settings(self):
        return self.context.settings

    def adopt(self):
        """Take over the pod CIDRs that the cluster gave this node, the last ones while it says nothing. Returns (whether they are others
        than before, why there is no going on without them or "")."""
        given, own = self.store.identity(), self.state["own"]
        if given is None:
            return False, ""
        own.update(given)
        if not own.get("podCIDRs"):
            waiting = "this node has no pod CIDR yet (spec.podCIDRs), which the controller manager or `agent.py nodeipam` gives"
            return False, self.store.trouble or waiting
        cluster_cidrs, cidrs = self.settings.cluster_cidrs, tuple(ipaddress.ip_network(text, strict=False) for text in own["podCIDRs"])
        trouble = address_trouble("this node's address", addresses_in(own["addresses"]), cluster_cidrs)
        trouble = trouble or pod_cidr_trouble("spec.podCIDRs", cidrs, cluster_cidrs)
        if trouble or cidrs == self.settings.pod_cidrs:
            return False, trouble
        self.context.settings = self.roster.settings = replace(self.settings, pod_cidrs=cidrs)
        return True, ""

    def read_store(self):
        """Take over the store's records; returns why not, or "". What it has lost is not believed at once: the last good records stay."""
        hold = self.clock() + HOLD_S
        try:
            records = self.store.records()
        except StoreError as error:
            self.stored, self.doubt_until = None, hold
            return f"{error}; going on with the last good list of nodes"
        self.stored, self.roster.facts = records.get(self.settings.node_name), self.store.facts()
        if self.stored:
            self.state["own"]["seen"] = True
        if self.stored is None and "seen" in self.state["own"]:
            self.doubt_until = hold
            self.store.look_again()  # a list may have been read at a bad moment, and nothing would correct it
            return "the node store has lost this node's record; going on with the last good list of nodes"
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

    def note(self, troubles):
        """Tell log and status what is wrong with the store; "" among the troubles is none."""
        trouble = "; ".join(filter(None, dict.fromkeys(troubles)))
        if trouble and trouble != self.store_trouble:
            log.warning("%s", trouble)
        self.store_trouble = trouble

    def judge(self):
        """Decide which records are believed; say what changed."""
        context = self.context
        nodes, quarantine = self.roster.judge(self.records, context.public_key, context.endpoints)
        for name in sorted(set(quarantine) | set(self.quarantine)):
            if quarantine.get(name) != self.quarantine.get(name):
                word = "believed again" if name in nodes else "gone"
                log.warning("node %s: %s", name, f"quarantined: {quarantine[name]}" if name in quarantine else word)
                self.store.note(name, quarantine.get(name, ""))
        for name in sorted(set(nodes) ^ set(context.nodes)):
            log.info("node %s %s", name, "joined" if name in nodes else "left")
        self.quarantine, context.nodes = quarantine, nodes
        context.peers = desired_peers(nodes, context.endpoints)

    def publish(self):
        """Have our record in the store as it should be. StoreError. Its generation grows with every change."""
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
        if rival:  # two that write in turn would never end
            raise StoreError(f"another node has written the record of {name}: give each node its own --node-name, or remove the record")
        own["text"] = text
        if self.stored != text:
            self.store.publish(name, text)

    def own_record(self):
        own, context = self.state["own"], self.context
        names = (own.get(key) for key in ("gen", "created", "set_back"))
        return format_record(self.settings, own["uid"], context.endpoints, context.public_key, *names)

    def save_state(self):
        """Keep the last good list of nodes for the next start. CNIError. It is a help: the network stands without."""
        believed = {name: self.records[name] for name in self.context.nodes}
        state = {"own": self.state["own"], "records": believed}
        write_if_changed(self.state_path, json.dumps(state, sort_keys=True) + "\n", mode=0o600)

    def say(self, reason):
        """Tell plugin, log and status whether the network stands ("") or why not."""
        if reason != self.reason:
            log.log(logging.ERROR if reason else logging.INFO, "%s", f"the network is not up: {reason}" if reason else "the network is up")
        self.reason = reason
        self.store.say(reason)
        path = os.path.join(self.settings.run_dir, "ready")
        if reason and os.path.exists(path):  # before the first success there is none, and there is to be none
            with contextlib.suppress(CNIError):
                write_if_changed(path, self.ready_text(reason))

    def ready_text(self, reason):
        return json.dumps({"bootID": self.context.boot_id, "device": HOST_VETH, "ok": not reason, "reason": reason}) + "\n"

    def write_status(self):
        """What `agent.py status` reads; no secrets, no figures that change by themselves."""
        context, settings = self.context, self.settings
        status = {
            "node": settings.node_name,
            "ok": not self.reason,
            "reason": self.reason,
            "store": self.store_trouble,
            **({} if self.store.identity() is None else {"admission_guard": self.store.guard}),
            "pid": os.getpid(),
            "publicKey": context.public_key,
            "podCIDRs": [str(cidr) for cidr in settings.pod_cidrs],
            "endpoints": [str(endpoint) for endpoint in context.endpoints],
            "mtu": context.mtu,
            "peers": [
                {"name": peer["name"], "key": key, "endpoint": peer["endpoint"], "podCIDRs": sorted(peer["allowed_ips"])}
                for key, peer in context.peers.items()
            ],
            "quarantine": self.quarantine,
        }
        with contextlib.suppress(CNIError):
            write_if_changed(os.path.join(settings.run_dir, "status.json"), json.dumps(status) + "\n")


def run_agent(settings, environ):
    """`agent.py run`: it returns when it is told to stop, and leaves everything standing. CNIError if it cannot begin."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    stopping = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.append(number))
    run = mncni.make_run(environ, trace=lambda command: log.debug("+ %s", command))
    if shutil.which("setpriv", path=mncni.search_path(os.environ)) is None:
        raise mncni.missing_tool("setpriv")
    store = make_store(settings, environ, run, lambda: wake(writer))
    store.start()
    agent, monitors, event = Agent(settings, store, run), Monitors(settings.netns), False
    start_thread(serve_http, settings.listen, pages(agent, agent_figures))
    while not stopping:
        agent.tick(event)
        for daemon in agent.context.daemons:
            daemon.poll()  # reaps it, should it have ended
        changed = monitors.tend()
        event = monitors.wait(reader, 0 if changed else POLL_S) or changed
        if event and not stopping:
            select.select([reader], [], [], EVENT_S)
    monitors.stop()
    log.info("stopping; the network stays as it is")


def make_store(settings, environ, run, wake):
    """The node store that the operator chose. CNIError 7."""
    if settings.nodes_dir:
        return DirectoryStore(settings.nodes_dir)
    return KubernetesStore(open_api(settings.kubeconfig, environ, run), settings.node_name, wake)


def wake(writer):
    with contextlib.suppress(BlockingIOError):  # then there is something in the pipe already
        os.write(writer, b"!")


def agent_lock(settings, timeout_s=0):
    """`with agent_lock(settings):` no other agent of this node. CNIError 11. The kernel drops it with the process, however it ends."""
    return mncni.Locked(os.path.join(settings.run_dir, "agent.lock"), timeout_s)


# ---------------------------------------------------------------------------------------------------------------------
# Node IPAM: pod CIDRs for the nodes of a cluster whose control plane gives none
# ---------------------------------------------------------------------------------------------------------------------
#
# One of several replicas leads, by a Lease. It follows all nodes and gives each without pod CIDRs the lowest free range of every family,
# in one write. A node keeps what it has for its life: the API lets no pod CIDR be changed.
# No two nodes may ever get one range, whoever is paused or cut off at what moment:
# - Each write names the resourceVersion of the node that the plan was made from, and the clock is read right before it.
# - A request may still be on its way when its sender has been replaced. So before a range is given, the Lease says how far up ranges may
#   be in use (USED); a new leader gives nothing at or below that for REUSE_S. By then the late write has lost its resourceVersion.
# - That also covers what a new leader cannot know: the ranges that were given back shortly before, for which packets may be on their way.

MANAGER = "mncni-nodeipam"  # in managedFields and Events
USED = "mncni.dev/used"  # annotation of the Lease: for each cluster CIDR the highest address that may be in use
REUSE_S = 600  # how long a range that was given back rests
EVENTS = 20  # Kubernetes Events in a pass
FOREIGN = "no node gets a pod CIDR until the other allocator is stopped and this Node deleted; its kubelet registers it anew at its start"
LEASE_S, RENEW_S, RETRY_S = 15, 10, 2  # how long others wait for a leader; how long it writes after a renewal; time between tries

# A Node, for the allocator; sorts by age. version: resourceVersion, "" once it has CIDRs. cidrs: networks. fault: who else set them, or "".
Claim = collections.namedtuple("Claim", "created name uid version cidrs fault")


def parse_claim(item):
    """The Claim of a Node object. ApiError."""
    with told("read", NODES):
        meta, spec = item["metadata"], item.get("spec") or {}
        texts = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
        entries = [(entry.get("manager"), (entry.get("fieldsV1") or {}).get("f:spec") or {}) for entry in meta.get("managedFields") or []]
        others = [manager for manager, fields in entries if manager != MANAGER and {"f:podCIDR", "f:podCIDRs"} & set(fields)]
        fault = f"its pod CIDR was set by {shown(others[0])}, not by {MANAGER}" if texts and others else ""
        try:
            cidrs = cidrs_in(texts)
        except ValueError as error:
            cidrs, fault = (), f"its pod CIDR is no network: {error}"
        if not mncni.is_identifier(meta["name"]):
            raise ValueError(f"a node named {shown(meta['name'])}")
        created, uid, version = text_in(meta, "creationTimestamp", False), text_in(meta, "uid"), text_in(meta, "resourceVersion")
        return Claim(created or "", meta["name"], uid, "" if texts else version, cidrs, fault)


def plan_allocations(claims, pools, given, freed, now):
    """What to give to whom: ({claim: CIDRs}, {claim: why not}, [span in use then]). Pure.

    pools: {family: (prefix length, cluster CIDRs)}. given: {uid: CIDRs} that nodes have, or were to get by a write of unknown outcome.
    freed: {span: when it may be used again}. If any node's CIDR is not of our making, nobody gets anything.
    """
    refused, held = find_foreign(claims, pools)
    taken = [span_of(cidr) for cidrs in given.values() for cidr in cidrs] + [span for span, until in freed.items() if until > now]
    sources = [free_ranges(cidrs, mask, sorted(taken)) for mask, cidrs in pools.values()]
    writes, waiting = {}, [] if refused else sorted(claim for claim in claims if not claim.cidrs)
    for claim in waiting:
        cidrs = given.get(claim.uid, ())
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


def find_foreign(claims, pools):
    """({claim: reason} of the nodes whose CIDRs another allocator must have set, [(*span, name)] of the others)."""
    foreign, held = {}, []
    for claim in sorted(claims):
        fault = claim.fault
        for cidr in claim.cidrs:
            owner = find_overlap(held, span_of(cidr))
            if not any(cidr.subnet_of(outer) for outer in pools.get(cidr.version, (0, ()))[1]):
                fault = f"its pod CIDR {cidr} is outside --cluster-cidr"
            elif owner:
                fault = f"its pod CIDR {cidr} overlaps that of node {owner}"
            else:
                bisect.insort(held, (*span_of(cidr), claim.name))
        if fault:
            foreign[claim] = fault
    return foreign, held


def free_ranges(cidrs, mask, taken):
    """The networks of a prefix length in cidrs that overlap nothing in taken, which is sorted: in the order of cidrs, then lowest first."""
    for cidr in cidrs:
        size, (version, first, end) = 1 << (cidr.max_prefixlen - mask), span_of(cidr)
        for _, low, high in [*(span for span in taken if span[0] == version), (version, end + 1, end + 1)]:
            while first + size <= min(low, end + 1):
                yield type(cidr)((first, mask))
                first += size
            first = max(first, -(-(high + 1) // size) * size)


def format_used(pools, taken):
    """Text for USED: the highest address in use of each cluster CIDR that has one, comma-separated."""
    highest = []
    for cidr in (cidr for _, cidrs in pools.values() for cidr in cidrs):
        version, first, end = span_of(cidr)
        lasts = [min(last, end) for family, low, last in taken if family == version and low <= end and last >= first]
        highest += [str(cidr[max(lasts) - first])] if lasts else []
    return ",".join(highest)


def parse_used(text, pools, until):
    """{span: until} from format_used's text: what may be in use, as far as anybody but the last leader can know."""
    cidrs = [cidr for _, cidrs in pools.values() for cidr in cidrs]
    return {(cidr.version, int(cidr[0]), int(last)): until for last in addresses_in(text.split(",")) for cidr in cidrs if last in cidr}


class Election:
    """Who leads, by a Lease: the one that renews it; another takes it when nobody has for LEASE_S, on the clock of the one who waits.

    clock: seconds that only go forward. note: the text of USED, published with each renewal. term: changes when another leads, or has led.
    """

    def __init__(self, api, lease, identity, clock):
        namespace, self.name = lease.split("/")
        self.path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self.api, self.identity, self.clock = api, identity, clock
        self.lease, self.known = {}, False  # the Lease as last seen, {} if there is none; whether a write may build on that
        self.ours = False  # whether this term is ours: nobody else has led since we did
        self.seen = self.renewed = float("-inf")  # when we saw the Lease change; when our last renewal was sent
        self.next_try, self.term, self.note, self.trouble = 0, 0, "", ""

    def leads(self, term):
        """Whether we may write now, with what we know since that term began. It ends well before another may take over."""
        return self.term == term and self.clock() < self.renewed + RENEW_S

    def tick(self):
        """Renew or try to take the Lease, when it is time for it."""
        if self.clock() < self.next_try:
            return
        self.next_try, trouble = self.clock() + RETRY_S, ""
        try:
            if not (self.known and self.leads(self.term)):
                self.look()
            spec = self.lease.get("spec") or {}
            vacant = self.lease and spec.get("holderIdentity") in (None, "", self.identity)
            if vacant or self.leads(self.term) or self.clock() >= self.seen + (spec.get("leaseDurationSeconds") or LEASE_S):
                self.write(self.identity, LEASE_S)
        except ApiError as error:
            self.known = False
            if error.status != 409:  # another was faster
                trouble = f"cannot get or keep the lease {self.name}, without which nothing is written: {error}"
        if trouble and trouble != self.trouble:
            log.warning("%s", trouble)
        self.trouble = trouble

    def ask(self, *arguments):
        """The Lease in the answer to a request. ApiError, also for what is none."""
        lease = self.api.request(*arguments)
        with told("read", self.path):
            meta, spec = lease["metadata"], lease.get("spec") or {}
            text_in(meta, "resourceVersion"), text_in(meta.get("annotations") or {}, USED, False), text_in(spec, "holderIdentity", False)
            numbers = [spec.get(key) or 0 for key in ("leaseDurationSeconds", "leaseTransitions")]
            if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
                raise ValueError(f"{shown(numbers)} are no numbers of a Lease")
        return lease

    def look(self):
        """Read the Lease. ApiError."""
        before = self.lease
        try:
            self.lease = self.ask("GET", f"{self.path}/{self.name}")
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
        """Take, renew or (holder "") give back the Lease. ApiError."""
        meta, old = {"name": self.name, **self.lease.get("metadata", {})}, self.lease.get("spec") or {}
        notes, now = meta.get("annotations") or {}, datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {**old, "holderIdentity": holder, "leaseDurationSeconds": duration_s, "renewTime": now}
        if not self.ours:
            self.note = notes.get(USED) or ""
            spec.update(acquireTime=now, leaseTransitions=(old.get("leaseTransitions") or 0) + 1)
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "spec": spec}
        lease["metadata"] = {**meta, "annotations": {**notes, USED: self.note}}
        method, path = ("PUT", f"{self.path}/{self.name}") if self.lease else ("POST", self.path)
        sent, self.known = self.clock(), False
        self.lease = self.ask(method, path, lease)
        self.known, self.renewed = True, sent if holder else float("-inf")
        if not self.ours:
            self.ours, self.term = True, self.term + 1
            log.info("leading, by the lease %s", self.name)

    def publish(self, note):
        """Renew the Lease now, with this note. Returns whether that was done, unless another leads."""
        self.note, self.next_try = note, 0
        self.tick()
        return self.known

    def release(self):
        """Let another take over at once."""
        try:
            if self.leads(self.term):
                self.write("", 1)
        except ApiError as error:
            log.warning("the lease %s runs out by itself: %s", self.name, error)


class NodeIpam:
    """The allocator. follow(put, stopping): has put(kind, [Claim]) called, first with kind LIST, until the event `stopping` is set."""

    def __init__(self, api, pools, election, clock, follow):
        self.api, self.pools, self.election, self.clock, self.follow = api, pools, election, clock, follow
        self.trouble = ""  # why we do not hear of nodes
        self.reason = ""  # why we are not ready: a replica that waits for its turn is ready, too
        self.counts = Counts()
        self.stopping = threading.Event()
        self.begin()

    def begin(self):
        """Forget everything: another leads, or has led. As leader, read all nodes anew."""
        self.stopping.set()
        self.events, self.stopping, self.term = queue.SimpleQueue(), threading.Event(), self.election.term
        self.claims, self.given, self.freed, self.told = None, {}, {}, {}  # {uid: Claim}; see plan_allocations; {uid: why it was refused}
        self.next_pass = self.not_before = 0
        if self.election.ours:
            self.counts.add("mncni_nodeipam_terms_total")
            events = self.events
            self.follow(lambda *event: events.put(event), self.stopping)

    def tick(self, timeout_s):
        """Renew the Lease, wait for news, and as leader give out what is to be given."""
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
        """What keeps us from hearing of nodes, "" for nothing."""
        if trouble not in ("", self.trouble):
            log.warning("cannot follow the nodes: %s", trouble)
        self.trouble = trouble

    def observe(self, kind, claims):
        """Take in what the API said of one node, or (LIST) of all."""
        if self.claims is None:
            self.claims, self.freed = {}, parse_used(self.election.note, self.pools, self.clock() + REUSE_S)
        there = {} if kind == "DELETED" else {claim.uid: claim for claim in claims}
        for uid in set(self.claims) | set(self.given) if kind == "LIST" else {claim.uid for claim in claims}:
            if uid not in there:
                self.claims.pop(uid, None)
                self.release(uid)
                self.next_pass = 0
        for uid, claim in there.items():
            known = self.claims.get(uid)
            if claim == known or (known and known.cidrs and not claim.cidrs):  # the latter is old: the API lets no CIDR be taken away
                continue
            self.claims[uid], self.next_pass = claim, 0
            if claim.cidrs and claim.cidrs != self.given.get(uid):
                self.release(uid)
                self.given[uid] = claim.cidrs

    def release(self, uid):
        self.freed.update({span_of(cidr): self.clock() + REUSE_S for cidr in self.given.pop(uid, ())})

    def allocate(self):
        """One pass: plan from all nodes, say in the Lease how far up it goes, write."""
        now = self.clock()
        self.freed = {span: until for span, until in self.freed.items() if until > now}
        writes, refused, taken = plan_allocations(self.claims.values(), self.pools, self.given, self.freed, now)
        foreign = sum(bool(claim.cidrs or claim.fault) for claim in refused)
        for state, nodes in (("all", len(self.claims)), ("foreign", foreign), ("waiting", len(refused) - foreign)):
            self.counts.set("mncni_nodeipam_nodes", nodes, state=state)
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
        """Give a node its CIDRs, unless it has changed since. They stay reserved for it whatever the answer: a failed write may be done."""
        texts, self.given[claim.uid] = [str(cidr) for cidr in cidrs], cidrs
        body = {"metadata": {"resourceVersion": claim.version}, "spec": {"podCIDR": texts[0], "podCIDRs": texts}}
        try:
            node = parse_claim(self.api.request("PATCH", f"{NODES}/{claim.name}", body, {"fieldManager": MANAGER}, MERGE_PATCH))
        except ApiError as error:
            changed = error.status in (404, 409)  # the watch will tell
            self.counts.add("mncni_nodeipam_write_failures_total", cause="conflict" if changed else "other")
            log.log(logging.INFO if changed else logging.WARNING, "node %s has no pod CIDR yet: %s", claim.name, error)
            if error.status in (0, 401, 403, 429) or error.status >= 500:  # not this node's fault: the others wait, too
                self.not_before = self.clock() + max(RETRY_S, error.retry_after_s or 0)
            return
        self.counts.add("mncni_nodeipam_ranges_given_total")
        self.observe("MODIFIED", [node])  # as it was stored: the next pass compares it with all others
        log.info("node %s has pod CIDRs %s", claim.name, ", ".join(texts))

    def say(self, refused):
        """Tell log and Events of each node that gets nothing, or should not have what it has: once per reason, some nodes at a time."""
        self.told = {claim.uid: reason for claim, reason in refused.items() if self.told.get(claim.uid) == reason}
        for claim in [claim for claim in refused if claim.uid not in self.told][:EVENTS]:
            foreign = claim.cidrs or claim.fault
            self.told[claim.uid] = refused[claim]
            message = refused[claim] + (f"; {FOREIGN}" if foreign else "")
            log.error("node %s: %s", claim.name, message)
            self.election.tick()
            if self.election.leads(self.term):
                words = {"reason": "ForeignPodCIDR" if foreign else "CIDRNotAvailable", "type": "Warning", "source": {"component": MANAGER}}
                send_event(self.api, claim.name, claim.uid, message, **words)


def parse_pools(parser, options, environ):
    """{family: (prefix length of a node's range, cluster CIDRs)}; the first CIDR's family comes first. Exit status 2 if they cannot be."""
    cidrs, pools = parse_list(parser, options, environ, "cluster_cidr", network), {}
    if not cidrs:
        parser.error("--cluster-cidr is needed: see agent.py nodeipam --help")
    twins = find_twins(cidrs)
    if twins:
        parser.error(f"--cluster-cidr {twins[0]} overlaps --cluster-cidr {twins[1]}")
    for cidr in cidrs:
        flag, mask = f"--node-mask-v{cidr.version}", getattr(options, f"node_mask_v{cidr.version}")
        if not 1 <= mask <= cidr.max_prefixlen - 2:
            parser.error(f"{flag} {mask} is out of range: 1 to {cidr.max_prefixlen - 2}")
        if cidr.prefixlen > mask:
            parser.error(f"--cluster-cidr {cidr} is smaller than one node's range: {flag} is {mask}")
        pools[cidr.version] = (mask, (*pools.get(cidr.version, (mask, ()))[1], cidr))
    if options.lease.count("/") != 1 or not all(map(mncni.is_identifier, options.lease.split("/"))):
        parser.error(f"--lease {options.lease!r} must be namespace/name")
    return pools


def run_nodeipam(options, pools, environ):
    """`agent.py nodeipam`: it returns when it is told to stop. CNIError 7 without a cluster."""
    patient = open_api(options.kubeconfig, environ, mncni.make_run(environ))
    quick, stopping = Api(patient.access), []
    quick.READ_S = RENEW_S / 2  # a request that takes longer must not cost us the Lease
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.append(number))

    def follow(put, stopping):
        start_thread(follow_nodes, patient, parse_claim, put, ipam.tell, stopping)

    election = Election(quick, options.lease, f"{socket.gethostname()}_{uuid.uuid4()}", uptime)
    ipam = NodeIpam(quick, pools, election, uptime, follow)
    ipam.beat = uptime()
    start_thread(serve_http, options.listen_nodeipam, pages(ipam, nodeipam_figures))
    while not stopping:
        ipam.beat = uptime()
        ipam.tick(POLL_S)
    election.release()
    log.info("stopping; nodes keep the pod CIDRs that they have")


# ---------------------------------------------------------------------------------------------------------------------
# Status
# ---------------------------------------------------------------------------------------------------------------------


def look_status(settings, run):
    """The agent's own word, with WireGuard's figures per peer: {"node", "ok", "reason", "running", "peers": [...], "quarantine", ...}.

    Of a peer, present: WireGuard has it; handshake: when last, in Unix time, 0 for never."""
    status = load_json(os.path.join(settings.run_dir, "status.json"), check_status)
    if not status:
        nothing = {"ok": False, "running": False, "peers": [], "quarantine": {}}
        return {**nothing, "node": settings.node_name, "reason": "no agent has run here since the boot"}
    try:
        with agent_lock(settings):
            status["running"] = False
    except CNIError:
        status["running"] = True
    reasons, present = [status["reason"]], {}
    try:
        present = look_device(Context(settings, run, ""))["peers"]
    except CNIError as error:
        reasons.append(f"the WireGuard device is not there: {error}")
    with_figures(status, present)
    if not status["running"]:
        reasons.append("no agent is running; the network stands as the last one left it")
    if status["quarantine"]:
        reasons.append(f"records of {len(status['quarantine'])} nodes are quarantined, see below")
    status["reason"] = next(filter(None, reasons), "")
    status["ok"] = not status["reason"] and not status["store"] and all(peer["present"] for peer in status["peers"])
    return status


def check_status(status):
    """Fails for what cannot be shown, see load_json; nothing at all can."""
    if status:
        whole = {**with_figures(status, {}), "ok": False, "up": False, "leases": 0}
        texts = [status["reason"], status["store"], *status["quarantine"], *status["quarantine"].values()]
        "".join([*texts, format_status(whole, 0), format_metrics(plan_metrics(whole))]).encode()


def with_figures(status, present):
    """The status with WireGuard's figures of each peer, where it is present."""
    for peer in status["peers"]:
        there = present.get(peer["key"], {})
        figures = {key: there.get(key, 0) for key in ("handshake", "rx", "tx")}
        peer.update(figures, present=bool(there), endpoint=there.get("endpoint") or peer["endpoint"])
    return status


def format_status(status, now):
    """The status for people."""
    word = "ok" if status["ok"] else "not ok"
    lines = [f"node {status['node']}: {word}" + (f": {status['reason']}" if status["reason"] else "")]
    if status.get("store"):
        lines.append(f"node store: {status['store']}")
    if "admission_guard" in status:
        words = {True: "refuses that one node writes another's record", False: "MISSING: any node can write another's record"}
        lines.append(f"admission policy: {words.get(status['admission_guard'], 'unknown')}")
    if status.get("podCIDRs"):
        endpoints = ", ".join(status["endpoints"])
        lines.append(f"pods {', '.join(status['podCIDRs'])}, MTU {status['mtu']}, endpoint {endpoints}, key {status['publicKey']}")
    rows = [("PEER", "ENDPOINT", "PODS", "HANDSHAKE", "RECEIVED", "SENT")] if status["peers"] else []
    for peer in status["peers"]:
        since = f"{max(0, int(now - peer['handshake']))} s ago" if peer["handshake"] else "never"
        handshake = since if peer["present"] else "not a peer yet"
        rows.append((peer["name"], peer["endpoint"], ", ".join(peer["podCIDRs"]), handshake, f"{peer['rx']} B", f"{peer['tx']} B"))
    widths = [max(len(row[column]) for row in rows) for column in range(6)] if rows else []
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += [f"{name}: quarantined: {reason}" for name, reason in sorted(status["quarantine"].items())]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# HTTP: health, and metrics                            https://prometheus.io/docs/instrumenting/exposition_formats/, 0.0.4
# ---------------------------------------------------------------------------------------------------------------------

METRICS = {  # name: (type, help)
    "mncni_build_info": ("gauge", "The version of the agent, as a label."),
    "mncni_network_up": ("gauge", "Whether this node's pod network stands."),
    "mncni_admission_guard": ("gauge", "Whether the cluster refuses that one node writes another's record."),
    "mncni_store_trouble": ("gauge", "Whether something is wrong with the node store; the last good list of nodes is in use then."),
    "mncni_peers": ("gauge", "Other nodes whose record is believed."),
    "mncni_quarantined_nodes": ("gauge", "Nodes whose record is not believed."),
    "mncni_node_quarantined": ("gauge", "1 for each node whose record is not believed, with the reason."),
    "mncni_peer_last_handshake_seconds": ("gauge", "When the last handshake was, in Unix time; 0: never. An idle peer has an old one."),
    "mncni_peer_receive_bytes_total": ("counter", "Bytes received from a node."),
    "mncni_peer_transmit_bytes_total": ("counter", "Bytes sent to a node."),
    "mncni_leaked_packets_total": ("counter", "Packets for the cluster that were on their way out in clear, and were dropped."),
    "mncni_leases": ("gauge", "Pods attached to the network."),
    "mncni_reconcile_seconds_total": ("counter", "How long passes took, all together."),
    "mncni_reconcile_passes_total": ("counter", "Passes."),
    "mncni_reconcile_errors_total": ("counter", "Passes that could not make the network stand."),
    "mncni_api_requests_total": ("counter", "Requests to the API server, by verb and HTTP status; none: no answer."),
    "mncni_nodeipam_leader": ("gauge", "Whether this replica leads."),
    "mncni_nodeipam_nodes": ("gauge", "Nodes by state: all, waiting for a range, foreign: with one from elsewhere."),
    "mncni_nodeipam_ranges_given_total": ("counter", "Nodes that were given their ranges."),
    "mncni_nodeipam_write_failures_total": ("counter", "Writes that failed, by cause: conflict or other."),
    "mncni_nodeipam_terms_total": ("counter", "How often this replica began to lead."),
    "mncni_api_received_bytes_total": ("counter", "Bytes of answers from the API server."),
}


def pages(loop, look_figures):
    """{path: function that returns (HTTP status, text)} of a running Agent or NodeIpam. look_figures(loop): see plan_metrics."""

    def healthz():
        silent_s = loop.clock() - loop.beat
        return (200, "ok\n") if silent_s < STUCK_S else (503, f"the loop has not come round for {silent_s:.0f} s\n")

    def readyz():
        return (503, loop.reason + "\n") if loop.reason else (200, "ok\n")

    return {"/healthz": healthz, "/readyz": readyz, "/metrics": lambda: (200, format_metrics(look_figures(loop)))}


def agent_figures(agent):
    status = look_status(agent.settings, agent.context.run)
    with contextlib.suppress(CNIError):
        status["leaked"] = look_firewall(agent.context.run, "")[1][0]
    status["up"] = not agent.reason
    status["leases"] = len(mncni.Leases(mncni.DEFAULT_DATA_DIR, NETWORK).attachments())
    requests = {} if agent.settings.nodes_dir else agent.store.api.counts.figures
    return {**plan_metrics(status), **agent.counts.figures, **requests}


def nodeipam_figures(ipam):
    return {("mncni_nodeipam_leader", ()): ipam.election.ours, **ipam.counts.figures, **ipam.api.counts.figures}


def plan_metrics(status):
    """{(name, ((label, value), ...)): figure} of what look_status says."""
    plain = {
        "mncni_network_up": status["up"],
        "mncni_store_trouble": bool(status.get("store")),
        "mncni_peers": len(status["peers"]),
        "mncni_quarantined_nodes": len(status["quarantine"]),
        "mncni_leases": status["leases"],
        "mncni_leaked_packets_total": status.get("leaked"),
        "mncni_admission_guard": status.get("admission_guard"),
    }
    figures = {(name, ()): figure for name, figure in plain.items() if figure is not None}
    for name, reason in status["quarantine"].items():
        figures["mncni_node_quarantined", (("node", name), ("reason", reason))] = 1
    for peer in status["peers"]:
        for name, key in (("last_handshake_seconds", "handshake"), ("receive_bytes_total", "rx"), ("transmit_bytes_total", "tx")):
            figures[f"mncni_peer_{name}", (("node", peer["name"]),)] = peer[key]
    return figures


def format_metrics(figures):
    """The figures as Prometheus reads them, those of one name together; and the version of this program."""
    figures = {("mncni_build_info", (("version", mncni.PROGRAM_VERSION),)): 1, **figures}
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    lines = []
    for family, (kind, text) in METRICS.items():
        own = [(labels, figure) for (name, labels), figure in figures.items() if name == family]
        lines += [f"# HELP {family} {text}", f"# TYPE {family} {kind}"] if own else []
        for labels, figure in own:
            words = ",".join(f'{label}="{str(value).translate(escapes)}"' for label, value in labels)
            lines.append(f"{family}{{{words}}} {float(figure):.15g}" if words else f"{family} {float(figure):.15g}")
    return "\n".join(lines) + "\n"


def http_page(pages, target, client):
    """(HTTP status, text) for a request target from an address. Others than this host get figures alone."""
    path, address = target.partition("?")[0], ipaddress.ip_address(client.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if path in pages and (address.is_loopback or path == "/metrics"):
        return pages[path]()
    return 404, f"there are: {', '.join(pages)}\n"


def serve_http(listen, pages):
    """Serve GET of the pages until the process ends. A port that is taken is tried again: the network is more than its figures."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer  # +30 ms, and only now

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # for a client that says nothing

        def do_GET(self):
            try:
                code, text = http_page(pages, self.path, self.client_address[0])
            except Exception as error:
                log.exception("a defect of the agent, please report it")
                code, text = 500, f"{type(error).__name__}: {error}\n"
            with contextlib.suppress(OSError):  # whoever asked is gone
                self.send_response(code)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *words):
            """Nothing: a probe every few seconds is no news."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in listen[0] else socket.AF_INET

    for failures in itertools.count():
        try:
            return Server(listen, Handler).serve_forever()
        except OSError as error:
            if failures == 0:
                log.error("cannot serve --listen %s port %d: %s; trying on", *listen, error.strerror)
            time.sleep(5)


# ---------------------------------------------------------------------------------------------------------------------
# Uninstall
# ---------------------------------------------------------------------------------------------------------------------

SYSCTLS_STAY = (
    "sysctls stay as they are: net.ipv4.ip_forward, net.ipv6.conf.all.forwarding, and net.ipv6.conf.<link>.accept_ra"
    " of links whose IPv6 default route came by router advertisement"
)


def uninstall(settings, run, force):
    """Remove all that the agent and the plugin made on this node, the floor last. CNIError 7 while pods are attached, unless force takes
    their network away."""
    leases = mncni.Leases(mncni.DEFAULT_DATA_DIR, NETWORK)
    attached = leases.attachments()
    if attached and not force:
        raise config_error(f"{len(attached)} pods are attached, {attached[0][0]} for one; drain the node, or give --force")
    for path in (os.path.join(settings.conf_dir, CONFLIST), os.path.join(settings.run_dir, "ready")):
        mncni.remove_file(path)
    links = look_ip(["link show"], run)
    veths = [link["ifname"] for link in links if link.get("ifalias", "").startswith(f"{mncni.OWNER_ALIAS}:{NETWORK}:")]
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
    for table in ("mncni_portmap", "mncni"):
        run(Command(["nft", "delete", "table", "inet", table]))
    lines = stale_routes([], look_routes(run))
    apply([ip_batch(lines)] if lines else [], run)
    log.info("uninstalled; looked in --conf-dir %s, --bin-dir %s", settings.conf_dir, settings.bin_dir)
    log.info(SYSCTLS_STAY)


def remove_namespace(settings, run):
    """Delete the namespace if it is ours; the device goes with it, and wireguard-go with the device."""
    facts = look_namespace(Context(settings, run, ""))
    if facts is None:
        return
    refuse_foreign_namespace(settings, facts)
    if look_link(DEVICE, facts):
        apply([ip_batch([f"link delete dev {DEVICE}"], settings.netns)], run)
    apply([Command(["ip", "netns", "delete", settings.namespace])], run)
    with contextlib.suppress(CNIError):
        wait_until(lambda: not os.path.exists(WIREGUARD_GO_SOCKET), 2, "")


def withdraw_record(settings, run):
    """Take our record out of the node store, if that can be reached."""
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
    os.umask(os.umask(0o077) | 0o022)  # whatever we make, nobody else is to change it
    parser = build_parser(environ)
    options = parser.parse_args(arguments)
    level = logging.DEBUG if environ.get("MNCNI_DEBUG") == "1" else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        return run_command(parser, options, environ)
    except (CNIError, OSError) as error:
        locked = getattr(error, "code", 0) == mncni.TRY_AGAIN
        log.error("%s", f"another agent runs here: stop it first ({error})" if locked else error)
        return RUNNING_ALREADY if locked else FAILED


def run_command(parser, options, environ):
    """The exit code. CNIError: 11 while another agent runs here."""
    if options.command == "nodeipam":  # it touches no node, so it needs no root
        run_nodeipam(options, parse_pools(parser, options, environ), environ)
        return OK
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
    if os.geteuid() != 0:
        log.error("agent.py %s needs root: run it with sudo", options.command)
        return FAILED
    run = mncni.make_run(environ)
    if options.command == "status":
        status = look_status(settings, run)
        sys.stdout.write(json.dumps(status, indent=2) + "\n" if options.json else format_status(status, time.time()))
        return OK if status["ok"] else FAILED
    with agent_lock(settings, timeout_s=1):  # `status` holds it for a moment
        if options.command == "uninstall":
            uninstall(settings, run, options.force)
        else:
            run_agent(settings, environ)
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
