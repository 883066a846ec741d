"""Living in a Kubernetes cluster: what agent.py and nodeipam.py share. A module, not a program.

It owns the command line (each flag can also be set by an environment variable), a client of the Kubernetes API, the view of all Nodes,
Events, and the HTTP server for health checks and metrics. It knows nothing of tunnels, and it changes nothing on the host.

The API server is an HTTP server that keeps objects (Nodes, Leases, Events) as JSON. Four of its habits shape this file:
- Every object and every list has a resourceVersion, a number that grows with each change.
- A client that follows objects first lists them, then watches: one long HTTP answer with a line of JSON per change since that version.
- A version that is too old to continue from is answered with 410 Gone; the client then lists again.
- A server under load answers 429 or 503 with a Retry-After header.

Reading order: command line, networks as numbers, access (kubeconfig or service account), the API client, following the Nodes, Events,
health and metrics. Functions start no thread unless their docstring says so.
"""

import argparse
import base64
import bisect
import collections
import contextlib
import faulthandler
import functools
import ipaddress
import itertools
import json
import logging
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from urllib.parse import urlencode, urlsplit

import mncni
from mncni import Command, ask, config_error

log = logging.getLogger("mncni-kube")

DEFECT = "this is a defect of MNCNI, please report it"
NODES = "/api/v1/nodes"
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"  # where Kubernetes puts a pod's credentials
JSON, MERGE_PATCH, STRATEGIC_PATCH = "application/json", "application/merge-patch+json", "application/strategic-merge-patch+json"
METADATA_LIST, METADATA = (f"{JSON};as=PartialObjectMetadata{kind};g=meta.k8s.io;v=v1" for kind in ("List", ""))
LONGEST_WISH_S = 300  # upper bound for Retry-After: a server that errs must not silence a node for good
STUCK_S = 120  # a program whose loop has not come round for this long hangs: each command it runs has 30 s
CLIENTS, PATIENCE_S, LONGEST_REQUEST = 64, 10, 8192  # of serve_http: connections at a time, time for each, bytes of a request


# ---------------------------------------------------------------------------------------------------------------------
# Command line: every flag has an environment variable                          --node-name is MNCNI_NODE_NAME, and so on
# ---------------------------------------------------------------------------------------------------------------------


def network(text):
    """An ip_network. Like the other types of flags, it raises ArgumentTypeError with a message for the user."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:  # "10.244.0.5/16 has host bits set"
        raise argparse.ArgumentTypeError(f"{error}; for several networks give the flag several times") from None


def listen_address(text):
    """(host, port) of ADDRESS:PORT."""
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    if not mncni.is_address(host, ipaddress.ip_address) or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: give an address and a port, like 127.0.0.1:28386 or [::]:28386")
    return host, int(port)


def add_flags(parser, flags, environ):
    """Add flags to an argparse parser. flags: rows of (flag, type, default, repeatable, help).

    The environment variable of a flag replaces its default. A repeatable flag has no default here, because argparse would append to
    it; parse_list reads its variable.
    """
    for flag, kind, default, repeatable, text in flags:
        if repeatable:
            parser.add_argument(flag, type=kind, action="append", help=text)
        else:
            given = environ.get("MNCNI_" + flag[2:].upper().replace("-", "_"))
            parser.add_argument(flag, type=kind, default=given or default, help=text)


def parse_list(parser, options, environ, key, kind):
    """The values of a repeatable flag, or else of its variable, which is comma-separated. Exits with status 2 for a bad value."""
    given = environ.get(f"MNCNI_{key.upper()}")
    try:
        return tuple(getattr(options, key) or (map(kind, given.split(",")) if given else ()))
    except argparse.ArgumentTypeError as error:
        return parser.error(f"MNCNI_{key.upper()}: {error}")


def start_log(environ):
    """Log to stderr. MNCNI_DEBUG=1 adds debug messages."""
    level = logging.DEBUG if environ.get("MNCNI_DEBUG") == "1" else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Addresses and networks: pure
# ---------------------------------------------------------------------------------------------------------------------


def parse_addresses(texts):
    """The IP addresses among some texts; the other texts are left out."""
    return [ipaddress.ip_address(text) for text in texts if mncni.is_address(text, ipaddress.ip_address)]


def parse_cidrs(texts):
    """A tuple of networks; host bits are cleared. ValueError."""
    if not all(mncni.is_address(text, functools.partial(ipaddress.ip_network, strict=False)) for text in texts):
        raise ValueError(f"{shown(texts)} are no networks")
    return tuple(ipaddress.ip_network(text, strict=False) for text in texts)


def is_in(address, cidrs):
    return any(address in cidr for cidr in cidrs)


def address_trouble(what, addresses, cluster_cidrs):
    """Why addresses of a node or a service cannot be used, "" if they can."""
    inside = [each for each in addresses if is_in(each, cluster_cidrs)]
    return f"{what} {inside[0]} is inside --cluster-cidr: nodes, services and pods need addresses of their own" if inside else ""


def service_trouble(environ, cluster_cidrs):
    """The same about the address of the API server's service, which a pod has in its environment."""
    service = parse_addresses(environ.get("KUBERNETES_SERVICE_HOST", "").split(","))
    return address_trouble("the cluster's service KUBERNETES_SERVICE_HOST", service, cluster_cidrs)


def internal_ips(node):
    """The InternalIPs of a Node object, as text."""
    return [entry.get("address") for entry in (node.get("status") or {}).get("addresses") or () if entry.get("type") == "InternalIP"]


def overlapping_pair(cidrs):
    """Two of the networks that overlap, or None."""
    return next((pair for pair in itertools.combinations(cidrs, 2) if pair[0].overlaps(pair[1])), None)


def span_of(cidr):
    """(IP version, first address, last address) of a network, as numbers. They sort and compare much faster than networks."""
    return cidr.version, int(cidr.network_address), int(cidr.broadcast_address)


def find_overlap(held, span):
    """The name of the holder of any part of a span, or None. held: sorted list of (*span, name) that do not overlap."""
    version, first, last = span
    place = bisect.bisect_right(held, (version, last, 1 << 129))  # every entry from here on begins behind the span
    return held[place - 1][3] if place and held[place - 1][0] == version and held[place - 1][2] >= first else None


def shown(value):
    """An untrusted value as short JSON, fit for a log line."""
    try:
        text = json.dumps(value)
    except RecursionError:  # json.loads accepts one level more than json.dumps
        text = "(nested too deep)"
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Access: which API server, and who we are
# ---------------------------------------------------------------------------------------------------------------------


def in_cluster(environ, directory=SERVICE_ACCOUNT):
    """The access (see read_kubeconfig) that Kubernetes gives each pod. KUBERNETES_SERVICE_HOST may name several hosts, comma-separated.
    CNIError 7 outside a cluster."""
    hosts, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not hosts:
        raise config_error("KUBERNETES_SERVICE_HOST is not set, so this is no pod of a cluster: give --kubeconfig")
    servers = [f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}" for host in hosts.split(",")]
    files = {"certificate-authority": "ca.crt", "tokenFile": "token"}
    return {"server": ",".join(servers), **{key: os.path.join(directory, name) for key, name in files.items()}}


FILES = ("certificate-authority", "client-certificate", "client-key")  # keys of a kubeconfig; KEY-data has the content itself
USED = ("server", "tls-server-name", "insecure-skip-tls-verify", "token", "tokenFile", *FILES, *(f"{key}-data" for key in FILES))


def read_kubeconfig(path, run):
    """The access to the cluster of a kubeconfig's current context: a dict of the kubeconfig's own keys, {"server", "token", ...}.
    CNIError 7. JSON is read here; YAML is converted by kubectl."""
    argv = ["kubectl", "config", "view", "--raw", "--minify", "-o", "json", "--kubeconfig", path]
    text, command = mncni.read_file(path), Command(argv, "", "convert the kubeconfig to JSON")
    if text is None:
        raise config_error(f"there is no kubeconfig {path}")
    try:
        if not text.lstrip().startswith("{"):
            if shutil.which("kubectl", path=mncni.search_path(os.environ)) is None:
                what = f"kubeconfig {path} is no JSON, and there is no kubectl to read YAML"
                raise config_error(f"{what}; where there is one, do: {' '.join(command.argv)} > FILE, and give that file")
            text = ask(command, run, may_be_gone=False).stdout
        access = parse_kubeconfig(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise config_error(f"kubeconfig {path}: {error if type(error) is ValueError else f'{type(error).__name__} {error}'}") from None
    for key in (*FILES, "tokenFile"):
        if key in access:
            access[key] = os.path.join(os.path.dirname(os.path.abspath(path)), access[key])
    return access


def parse_kubeconfig(config):
    """The access of the current context, see read_kubeconfig. ValueError says what is wrong. A key that is not used is refused, because it
    may say where or how to connect."""
    context = find_named(config, "context", config.get("current-context"))
    user = find_named(config, "user", context["user"]) if context.get("user") else {}
    access = {**find_named(config, "cluster", context.get("cluster")), **user}
    access = {key: value for key, value in access.items() if value and key not in ("extensions", "disable-compression")}
    for key, value in access.items():
        if key not in USED or not isinstance(value, bool if key == "insecure-skip-tls-verify" else str):
            raise ValueError(f'"{key}" is not supported ({mncni.kind_of(value)}): give a direct server, and a token or a certificate')
        if key.endswith("-data") and base64.b64encode(base64.b64decode(value + "==")).decode() != "".join(value.split()):
            raise ValueError(f'"{key}" is no base64')
    if len({"client-certificate", "client-key"} & {key.removesuffix("-data") for key in access}) == 1:
        raise ValueError("a client certificate and its key go together: one of them is missing")
    for server in access.get("server", "").split(","):
        refuse_server(server)
    return access


def find_named(config, kind, name):
    """The context, cluster or user of a kubeconfig that has this name. ValueError unless there is exactly one."""
    found = [entry[kind] or {} for entry in config.get(f"{kind}s") or () if entry["name"] == name]
    if len(found) != 1:
        raise ValueError(f"it has {len(found)} {kind}s with the name {shown(name)}; set current-context to one that is whole")
    return found[0]


def refuse_server(server):
    """ValueError if this is no address of an API server. A user in it is not shown, as it may come with a password."""
    url = urlsplit(server)
    odd = "@" in url.netloc or url.query or url.fragment or [server] != server.split() or url.port == 0
    if odd or url.scheme not in ("https", "http") or not url.hostname:
        raise ValueError(f"the server {shown(server.rpartition('@')[2])} is no http(s):// address, or has more than host, port and path")


def open_api(kubeconfig, environ, run, program="mncni", cluster_cidrs=()):
    """An Api for the cluster of a kubeconfig, or with "" for the cluster that this pod runs in. CNIError 7, also for a server that is given
    by an address inside the cluster CIDR."""
    access = read_kubeconfig(kubeconfig, run) if kubeconfig else in_cluster(environ)
    try:
        hosts = [urlsplit(server).hostname for server in access["server"].split(",")]
    except ValueError as error:
        raise config_error(f"the API server {access['server']} is no address: {error}") from None
    trouble = address_trouble("the API server", parse_addresses(hosts), cluster_cidrs)
    if trouble:
        raise config_error(trouble)
    return Api(access, program)


# ---------------------------------------------------------------------------------------------------------------------
# The API client
# ---------------------------------------------------------------------------------------------------------------------


class ApiError(Exception):
    """A request that failed. status: of HTTP, 0 if there was no usable answer. retry_after_s: what the server asks for, or None."""

    def __init__(self, status, reason, message, retry_after_s=None):
        super().__init__(f"{status} {reason}: {message}" if status else message)
        self.status, self.reason, self.message, self.retry_after_s = status, reason, message, retry_after_s


class Counts:
    """Figures for /metrics: {(name, ((label, value), ...)): figure}. Safe for threads."""

    def __init__(self):
        self.lock, self.figures = threading.Lock(), collections.Counter()

    def add(self, name, amount=1, **labels):
        with self.lock:
            self.figures[name, tuple(sorted(labels.items()))] += amount

    def set(self, name, figure, **labels):
        self.figures[name, tuple(sorted(labels.items()))] = figure


class Api:
    """A client of one API server, which may have several addresses. Safe for threads.

    access: see read_kubeconfig. The files that it names are read for each request, because kubelet renews tokens and certificates.
    program: the name that the API server logs. http.client and ssl are imported by the first request (+40 ms).
    """

    CONNECT_S, READ_S = 5, 30  # time limits of a connection, and of an answer
    SILENCE_S = 90  # a watch that is silent for this long is dead: the server sends a bookmark each minute
    WATCH_S = 300  # when the server is to end a watch; a random part is added, so that not all nodes come back at once
    IDLE_S = 15  # how long a connection is kept for the next request; the server keeps it longer

    def __init__(self, access, program="mncni"):
        self.counts = Counts()
        self.access, self.program = access, program
        self.servers = access["server"].split(",")
        self.idle = []  # [(when it was last used, connection)]

    def request(self, method, path, body=None, params=None, content_type=JSON, accept=JSON):
        """The object in the answer, {} for an empty one. ApiError. body: an object. params: {name: value} of the query."""
        connection, response = self._exchange(method, path, body, params, content_type, accept, self.READ_S)
        with api_errors(method, path):
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
        """(items, resourceVersion), read in pages of 500. ApiError; 410 if the list expires between two pages.
        take(item): what to keep of an item, because all of a large cluster is too much."""
        items, query = [], {**(params or {}), "limit": 500}
        while True:
            page = self.request("GET", path, params=query, accept=accept)
            with api_errors("GET", path):
                refuse_kind(path, page["kind"], "List")
                items += [take(item) for item in page["items"] or ()]
                version, query["continue"] = text_in(page["metadata"], "resourceVersion"), page["metadata"].get("continue")
            if not query["continue"]:
                return items, version

    def watch(self, path, resource_version, params=None, accept=JSON):
        """An iterator over (type, object) of each change since resource_version, until the server ends it. A type is ADDED, MODIFIED,
        DELETED, or BOOKMARK, which tells a new resourceVersion alone. ApiError, now or while iterating: 410 if the version has
        expired, 0 if the stream is cut or silent."""
        options = {"watch": 1, "allowWatchBookmarks": "true", "timeoutSeconds": int(self.WATCH_S * (1 + jitter()))}
        query = {**(params or {}), "resourceVersion": resource_version, **options}
        return self._events(path, *self._exchange("GET", path, None, query, JSON, accept, self.SILENCE_S))

    def _events(self, path, connection, response):
        """The lines of a watch, one (type, object) each."""
        rest = b""
        with contextlib.closing(connection), api_errors("watch", path):
            for data in iter(functools.partial(response.read1, 1 << 16), b""):
                self.counts.add("mncni_api_received_bytes_total", len(data))
                *lines, rest = (rest + data).split(b"\n")
                for event in map(json.loads, filter(bytes.strip, lines)):
                    kind, item = event["type"], event["object"]
                    if kind == "ERROR":
                        raise ApiError(int(item.get("code") or 500), str(item.get("reason")), str(item.get("message"))[:1000])
                    refuse_kind(path, item["kind"])
                    text_in(item["metadata"], "resourceVersion")  # every event has one
                    yield kind, item
            if rest:
                raise ValueError("cut")

    def _exchange(self, method, path, body, params, content_type, accept, timeout_s):
        """(connection, response) of a request that succeeded. ApiError.

        A request is repeated in two cases: the server had closed a kept connection (GET only: a write may have been done), or it
        refused a token that has been renewed meanwhile."""
        while True:
            token = self._token()
            kept, connection = self._connection()
            target = connection.prefix + path + (f"?{urlencode(params, errors='replace')}" if params else "")
            headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": f"{self.program}/{mncni.PROGRAM_VERSION}"}
            headers.update({"Authorization": f"Bearer {token}"} if token else {})
            try:
                with api_errors(method, path):
                    connection.sock.settimeout(timeout_s)
                    connection.request(method, target, None if body is None else json.dumps(body), headers)
                    response = connection.getresponse()
                    data = response.read() if response.status >= 300 else b""
                self.counts.add("mncni_api_requests_total", verb=method, code=response.status)
                if response.status < 300:
                    return connection, response
                error = parse_refusal(method, path, response, data)
            except ApiError as failure:
                self.counts.add("mncni_api_requests_total", verb=method, code="none")
                error = failure
            connection.close()
            renewed = error.status == 401 and self._token() != token
            if not renewed and not (kept and error.status == 0 and method == "GET"):
                raise error

    def _connection(self):
        """(whether it was used before, an open connection)."""
        with contextlib.suppress(IndexError):  # none is left; other threads take from the list, too
            while True:
                used, connection = self.idle.pop()
                if time.monotonic() - used < self.IDLE_S:
                    return True, connection
                connection.close()
        for server in list(self.servers):
            try:
                with api_errors("connect to", server):
                    return False, self._connect(server)
            except ApiError as failure:
                error = failure
                self.servers = [*self.servers[1:], self.servers[0]]  # the next request begins with another address
        raise error

    def _connect(self, server):
        import http.client

        url = urlsplit(server)
        connection = http.client.HTTPConnection(url.hostname, url.port or (443 if url.scheme == "https" else 80), timeout=self.CONNECT_S)
        connection.connect()
        if url.scheme == "https":
            name = self.access.get("tls-server-name") or url.hostname
            connection.sock = self._context().wrap_socket(connection.sock, server_hostname=name)
        connection.prefix = url.path.rstrip("/")
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            connection.sock.setsockopt(socket.IPPROTO_TCP, option, value)
        return connection

    def _context(self):
        """The TLS context of a new connection, with the certificates as they are now."""
        import ssl

        context = ssl.create_default_context(cadata=self._part("certificate-authority").decode() or None)
        context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)  # Python 3.13 sets it; many clusters' certificates fail it
        if self.access.get("insecure-skip-tls-verify"):
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        certificate, key = self._part("client-certificate"), self._part("client-key")
        if certificate:
            with open(os.memfd_create("client"), "wb") as file:  # ssl reads only files; this one is in memory
                file.write(certificate + b"\n" + key)
                file.flush()
                context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context

    def _part(self, key):
        """The bytes of a part of the access, which is given in base64 or as the path of a file; b"" if it is not given."""
        if self.access.get(f"{key}-data"):
            return base64.b64decode(self.access[f"{key}-data"])
        return read_bytes(self.access[key]) if self.access.get(key) else b""

    def _token(self):
        with api_errors("read the token", ""):
            text = read_bytes(self.access["tokenFile"]).decode() if self.access.get("tokenFile") else self.access.get("token", "")
            if not (text.strip().isascii() and text.strip().isprintable()):
                raise ValueError("it has characters that no token has")  # http.client's own error would quote it
            return text.strip()


@contextlib.contextmanager
def api_errors(method, path):
    """Turns every error inside the block into an ApiError: a failed connection, and an answer that does not have the expected form."""
    import http.client

    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise ApiError(0, "Unreachable", f"{method} {path}: {str(error) or type(error).__name__}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ApiError(0, "Garbled", f"{method} {path}: cannot understand the answer: {type(error).__name__} {error}"[:300]) from None


def parse_refusal(method, path, response, data):
    """The ApiError of an answer with a status of 300 or more."""
    try:
        said = json.loads(data)
        reason, message = str(said.get("reason") or response.reason), str(said.get("message"))
    except (ValueError, AttributeError, RecursionError):
        reason, message = response.reason, data[:200].decode("utf-8", "replace")
    message = f"{method} {path}: {' '.join(message.split())[:1000]}"
    after = response.headers.get("Retry-After") or ""
    return ApiError(response.status, reason, message, min(float(after), LONGEST_WISH_S) if after.isascii() and after.isdigit() else None)


def refuse_kind(path, kind, suffix=""):
    """ValueError unless an object is of the kind that its path names ("nodes": Node), or PartialObjectMetadata. suffix: "List"."""
    if kind.lower() not in (path.rpartition("/")[2].rstrip("s") + suffix.lower(), f"PartialObjectMetadata{suffix}".lower()):
        raise ValueError(f"it is a {kind}")


def text_in(mapping, key, needed=True):
    """mapping[key], which is a str; None if it is absent and not needed. KeyError, TypeError."""
    value = mapping[key] if needed else mapping.get(key)
    if not isinstance(value, str) and (needed or value is not None):
        raise TypeError(f'"{key}" is no text')
    return value


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


# ---------------------------------------------------------------------------------------------------------------------
# Following the Nodes: list, then watch
# ---------------------------------------------------------------------------------------------------------------------


def follow_nodes(api, parse, take, tell, stopping, params=None, is_whole=lambda: True):
    """Follow all Nodes until the event `stopping` is set. Run it as a thread of its own, see start_thread.

    It calls take("LIST", objects) once and after every new list, then take(type, [object]) for each change; an object is what parse()
    returns for a Node. After an error it waits and goes on, and what was taken before stays valid. tell(message) is called when errors
    last, tell("") when they are over. is_whole() says whether to read whole Nodes or their metadata alone.
    """
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
            status, wish = getattr(error, "status", 410), retry_after_s(error)
            if status in (400, 404, 410) or (status and failures > 5):  # list again
                version = None
            if failures >= (4 if opened else 1):  # one failure is normal: servers restart
                tell(f"the API server: {error}")
        failures += 1
        stopping.wait(pause_s(failures, wish))


def retry_after_s(error):
    """How long the API server asks us to wait after an error. An error that is no ApiError is a defect and is logged."""
    if not isinstance(error, ApiError):
        log.exception(DEFECT)
    return getattr(error, "retry_after_s", None) or 0


def pause_s(failures, wish):
    """The pause before the next try: about 0.5 to 4 s, longer with each failure, at least as long as the server wishes, with jitter."""
    return max(min(4, 0.25 * 2 ** min(failures, 4)), wish) * (0.75 + jitter() / 2) + (jitter() if wish else 0)


def jitter():
    """A random number from 0 to 1. The module `random` would be one more import."""
    return os.urandom(1)[0] / 255


def is_older(version, than):
    """Whether a resourceVersion is older than another; False if one of them is no number."""
    known = all(text.isascii() and text.isdigit() and len(text) < 30 for text in (version, than))
    return known and int(version) < int(than)


def start_thread(act, *arguments, **options):
    """Call act(...) in a thread that ends with the process."""
    threading.Thread(target=act, args=arguments, kwargs=options, daemon=True).start()


def run_loop(loop, turn, listen, look_figures, metrics):
    """Call turn() until SIGTERM or SIGINT, and serve the pages of the loop in a thread meanwhile, see pages().

    If turn() hangs, the process ends and logs where each thread was. A liveness probe would do that, too, but whoever keeps the HTTP
    server busy could then have kubelet kill a program that is well.
    """
    stopping = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.append(number))
    start_thread(serve_http, listen, pages(loop, look_figures, metrics))
    while not stopping:
        loop.beat = loop.clock()
        faulthandler.dump_traceback_later(2 * STUCK_S, exit=True)
        turn()
    faulthandler.cancel_dump_traceback_later()


def uptime():
    """Seconds since the kernel started, including sleep. Unlike the time of day, nobody sets it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# ---------------------------------------------------------------------------------------------------------------------
# Events: short messages about an object, which `kubectl describe` shows
# ---------------------------------------------------------------------------------------------------------------------


def send_event(api, name, uid, message, **words):
    """Send an Event about a node, best effort. Its name depends on the message and the time, so that the cluster keeps one Event in
    ten minutes, however many programs send it. A node's name may be as long as an Event's, which is why it is cut. words: further keys."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    body = {
        "metadata": {"name": f"{name[:200].rstrip('.-')}.{mncni.short_hash(name, message, str(now // 600))}", "namespace": "default"},
        "involvedObject": {"apiVersion": "v1", "kind": "Node", "name": name, "uid": uid},
        **{"message": message, "firstTimestamp": stamp, "lastTimestamp": stamp, "count": 1, **words},
    }
    try:
        api.request("POST", "/api/v1/namespaces/default/events", body)
    except ApiError as error:
        log.log(logging.DEBUG if error.status == 409 else logging.INFO, "no Event about node %s: %s", name, error)


# ---------------------------------------------------------------------------------------------------------------------
# Health and metrics over HTTP                         https://prometheus.io/docs/instrumenting/exposition_formats/, 0.0.4
# ---------------------------------------------------------------------------------------------------------------------

METRICS = {  # name: (type, help); each program adds its own
    "mncni_build_info": ("gauge", "The version of the program, as a label."),
    "mncni_api_requests_total": ("counter", "Requests to the API server, by verb and HTTP status; none: no answer."),
    "mncni_api_received_bytes_total": ("counter", "Bytes of answers from the API server."),
}


def pages(loop, look_figures, metrics):
    """{path: function that returns (HTTP status, text)} of a program.

    loop: has clock(), beat (when the loop last came round) and reason (why the program is not ready, or ""). look_figures(loop),
    metrics: see format_metrics. Figures are looked up at most once a second, because that may start processes.
    """
    looked = [float("-inf"), ""]

    def healthz():
        silent_s = loop.clock() - loop.beat
        return (200, "ok\n") if silent_s < STUCK_S else (503, f"the loop has not come round for {silent_s:.0f} s\n")

    def readyz():
        return (503, loop.reason + "\n") if loop.reason else (200, "ok\n")

    def figures():
        if uptime() >= looked[0] + 1:
            looked[:] = uptime(), format_metrics(look_figures(loop), metrics)
        return 200, looked[1]

    return {"/healthz": healthz, "/readyz": readyz, "/metrics": figures}


def look_health(listen):
    """Why a program that runs does not answer at its own (host, port), "" if it does, or if nothing listens there."""
    import http.client

    connection = http.client.HTTPConnection(*listen, timeout=2)
    try:
        connection.request("GET", "/healthz")
        reply = connection.getresponse()
        return reply.read(200).decode("utf-8", "replace").strip() if reply.status == 503 else ""
    except TimeoutError:
        return "it does not answer within 2 s: it hangs, or somebody keeps its HTTP server busy"
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


def format_metrics(figures, metrics):
    """Figures in the text format of Prometheus, grouped by name, with the version of this program.

    figures: {(name, ((label, value), ...)): figure}. metrics: {name: (type, help)}, added to METRICS.
    """
    figures = {("mncni_build_info", (("version", mncni.PROGRAM_VERSION),)): 1, **figures}
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    lines = []
    for family, (kind, text) in {**METRICS, **metrics}.items():
        own = [(labels, figure) for (name, labels), figure in figures.items() if name == family]
        lines += [f"# HELP {family} {text}", f"# TYPE {family} {kind}"] if own else []
        for labels, figure in own:
            words = ",".join(f'{label}="{str(value).translate(escapes)}"' for label, value in labels)
            lines.append(f"{family}{{{words}}} {float(figure):.15g}" if words else f"{family} {float(figure):.15g}")
    return "\n".join(lines) + "\n"


def http_page(pages, target, client):
    """(HTTP status, text) for a request target and the client's address. Other hosts get /metrics only."""
    path, address = target.partition("?")[0], ipaddress.ip_address(client.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if path in pages and (address.is_loopback or path == "/metrics"):
        return pages[path]()
    return 404, f"there are: {', '.join(pages)}\n"


def serve_http(listen, pages):
    """Serve GET of the pages until the process ends, see start_thread. A port that is in use is tried again: the network matters more than
    its figures.

    One thread serves all clients and waits for none of them. A client, whatever it does, costs a descriptor and some KB of memory, until
    PATIENCE_S are over or CLIENTS newer ones have come. What a new client has already sent is read before that can happen.
    """
    listener, poll, clients = open_listener(listen), select.epoll(), {}  # clients: {descriptor: (socket, until when, talk())}, oldest first
    poll.register(listener, select.EPOLLIN)

    def drop(descriptor):
        client, _, _ = clients.pop(descriptor)
        poll.unregister(client)  # not left to close(): a process that is being started may hold a copy of the descriptor
        client.close()

    while True:
        for descriptor, _ in poll.poll(1):
            try:
                if descriptor == listener.fileno():
                    client, address = listener.accept()
                    descriptor, exchange = client.fileno(), talk(client, address[0], pages)
                    event = next(exchange)
                    poll.register(client, event)
                    clients[descriptor] = (client, time.monotonic() + PATIENCE_S, exchange)
                else:
                    poll.modify(descriptor, next(clients[descriptor][2]))
            except (OSError, StopIteration):  # the client is gone, or has its answer
                if descriptor in clients:
                    drop(descriptor)
        while clients and (len(clients) > CLIENTS or next(iter(clients.values()))[1] < time.monotonic()):
            drop(next(iter(clients)))


def open_listener(listen):
    for failures in itertools.count():
        try:
            family, both = (socket.AF_INET6, socket.has_dualstack_ipv6()) if ":" in listen[0] else (socket.AF_INET, False)
            return socket.create_server(listen, family=family, backlog=128, dualstack_ipv6=both)
        except OSError as error:
            if failures == 0:
                log.error("cannot serve --listen: %s; trying again every 5 s", error.strerror)
            time.sleep(5)


def talk(client, address, pages):
    """A coroutine that answers one request. It ends when the connection can be closed, and yields the event (see epoll) that it waits for.
    OSError."""
    client.setblocking(False)
    heard = b""
    while b"\r\n\r\n" not in heard and len(heard) < LONGEST_REQUEST:
        yield select.EPOLLIN
        data = client.recv(LONGEST_REQUEST)
        if not data:
            return
        heard += data
    unsent = answer_request(heard, address, pages)
    while unsent:
        yield select.EPOLLOUT
        unsent = unsent[client.send(unsent) :]
    client.shutdown(socket.SHUT_WR)
    while data:  # closing at once, with something unread, could take the answer away from the client
        yield select.EPOLLIN
        data = client.recv(LONGEST_REQUEST)


def answer_request(request, address, pages):
    """The bytes of the answer to an HTTP request."""
    method, target, *_ = [*request.partition(b"\r\n")[0].decode("latin-1").split(), "", ""]
    try:
        code, text = http_page(pages, target, address) if method == "GET" else (501, "there is only GET\n")
    except Exception as error:
        log.exception(DEFECT)
        code, text = 500, f"{type(error).__name__}: {error}\n"
    head, body = f"HTTP/1.1 {code} \r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n", text.encode()
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
