"""A double of the Kubernetes API server, as far as a node agent and a node-IPAM controller use one. Standard library and `openssl`.

    with ApiServer() as api:                              # TLS on 127.0.0.1, a free port; also host="::1", port=6443, sans=[...]
        api.create_node(realistic_node("n1", 1))          # or api.create_node("n1", pod_cidrs=["10.244.1.0/24"])
        token = api.token("system:serviceaccount:kube-system:mncni-agent", node="n1")
        api.url, api.ca_file, api.kubeconfig(path, user), api.service_account_dir(path, user, node="n1")

What it is like: kube-apiserver 1.30; tests/e2e/test_apiserver_real.py runs the same claims against one. nodes, nodes/status, events (v1
and events.k8s.io/v1), leases; GET, LIST, WATCH, POST, PUT, PATCH (merge, strategic merge, JSON), DELETE; /version, /healthz. One
resourceVersion for all; a write that changes nothing makes no new one. What it does not know it refuses: label selectors, server-side
apply, field selectors but metadata.name and metadata.namespace, deletion of collections. It never speaks protobuf or HTTP/2, and says at
once that a resourceVersion is too large, where the real one waits 3 s for it.

Objects, behind the API's back (no user, no admission; watchers see the events; each returns the object as stored):
    create_node(name or dict, pod_cidrs=(), annotations={}, addresses=()), create_nodes(count, prefix="node-"), node(name), nodes()
    patch_node(name, merge patch), delete_node(name); of any resource: get(resource, name, namespace=""), put(resource, object)
    resource_version; bump() uses up a resourceVersion without a change; changes: how many writes have changed something
Users: token(user, groups=(), node="", pod="") -> str; revoke(token); rotate_tokens(): those made so far get 401, the files that
    kubeconfig() and service_account_dir() wrote get new ones; client_certificate(user, groups) -> (certificate file, key file)
Rights: rbac = [(user or group, verb, resource[, name])], fnmatch patterns, e.g. ("*:mncni-agent", "patch", "nodes/status"). None, the
    start: everything for everybody who has authenticated. List and watch with fieldSelector metadata.name=x ask for the right on x.
Policy: add_policy(hook, name, binding, resources=("nodes", "nodes/status"), code=422), with hook(user, operation, old, new) -> None or
    why not; user = {"username", "groups", "extra": {"authentication.kubernetes.io/node-name": ["n1"]}}; operation CREATE, UPDATE,
    DELETE. In force until policies.clear().
Counters: count(verb, resource, user, user_agent, name, code, dry_run) -> requests so far (patterns; verbs get list watch create update
    patch delete; resources "nodes", "nodes/status", "leases", "events", else the path); writes(user): without dry-runs; watches(user):
    open ones; bytes_sent(user), bytes_received(user): HTTP, without TLS; log: the requests as dicts; reset_counters()
Watching: bookmark_s (60) between bookmarks, where there is news; send_bookmarks() now, news or not; compact() makes every
    resourceVersion before the present one too old; gone_as_http (False): what a watch that is too old gets: HTTP 410, or like the real
    one 200 and an ERROR event;
    close_watches(abrupt=False); send_error(code=410) into every open watch, which then ends
Server: down() refuses connections, up() is back on the same port; freeze() accepts and never answers, thaw(); rotate_certificate();
    rotate_ca(publish=True): a new CA, also in ca_file and the files made before; publish_ca()
Faults: fault(kind, times=1, verb="*", resource="*", name="*", user="*", user_agent="*", **parameters) -> Fault with .used, .cancel(),
    .wait(used=1, timeout_s=10). It hits the next `times` requests, or events of open and new watches, that match; times=None: until
    cancelled. clear_faults() cancels all.
    Of requests:  status (code=500, retry_after=None, message: 401 403 409 410 429 500 503 504)   hang (no answer until cancelled)
                  slow (delay_s=1, chunk=0, pause_s=0.05: then in pieces of chunk bytes)   reset (RST)   close (no answer)
                  truncate (Content-Length promises more)   bad_json (a complete answer, half a document)
                  empty_list   wrong_kind (kind="PodList")   strip (drop=["metadata.annotations", "status.addresses", "spec.podCIDR"])
                  error_event (code=410: a watch begins with ERROR and ends)
    Of events:    cut (half an event, then closed)   stall (nothing more, the connection stays)   duplicate   reorder (after the next)
                  swallow (a bookmark instead)   bad_event (half a document, the stream goes on)   wrong_event (kind="Pod")
                  strip_event (drop=[...])

As a process of its own, in a network namespace or not; controlled through a Unix socket, which no network namespace hides:
    python -m tests.apiserver --dir DIR [--listen [::]:6443] [--san 192.0.2.250] [--nodes 5000] [--control]
    with ApiProcess(dir, netns="name", listen="[::]:6443", sans=[...], nodes=0) as api: api.call("create_node", "n1"); api.url; api.ca_file
"""
import argparse
import atexit
import base64
import contextlib
import copy
import fnmatch
import functools
import gzip
import http.client
import itertools
import json
import os
import random
import secrets
import select
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid
from collections import Counter, deque
from pathlib import Path

from tests import apiobjects as objects
from tests.apiobjects import ApiError, compact, realistic_node
from tests.apiresources import ANONYMOUS, WRITES, Change, Request, Resources, parse_accept, parse_version, presented, selected

__all__ = ("ApiError", "ApiProcess", "ApiServer", "Fault", "realistic_node")
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
EVENT_FAULTS = ("cut", "stall", "duplicate", "reorder", "swallow", "bad_event", "wrong_event", "strip_event")
REASONS = {400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired",
           429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout"}


# ---------------------------------------------------------------------------------------------------------------------------
# Certificates
# ---------------------------------------------------------------------------------------------------------------------------
def require_openssl():
    """Skip the test, aloud, where the program is missing."""
    if not shutil.which("openssl"):
        raise unittest.SkipTest("needs openssl, which makes the API server's certificates: apt-get install openssl")


def openssl(*words):
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"openssl {words[0]}: exit status {done.returncode}\n{done.stderr}")


def make_ca(directory):
    """A new certificate authority in directory: ca.crt, ca.key."""
    directory.mkdir(parents=True, exist_ok=True)
    openssl("req", "-x509", *NEW_KEY, "-days", 30, "-subj", "/CN=kubernetes",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-keyout", directory / "ca.key", "-out", directory / "ca.crt")
    return directory


def make_certificate(ca, stem, subject, usage, names=""):
    """A certificate that the CA in directory `ca` signed: stem.crt, stem.key. names: a subjectAltName as openssl writes it."""
    key, request, extensions, certificate = (f"{stem}.{end}" for end in ("key", "csr", "ext", "crt"))
    rows = ["basicConstraints=CA:FALSE", "subjectKeyIdentifier=hash", "authorityKeyIdentifier=keyid", f"extendedKeyUsage={usage}"]
    Path(extensions).write_text("\n".join([*rows, f"subjectAltName={names}" if names else ""]))
    openssl("req", "-new", *NEW_KEY, "-subj", subject, "-keyout", key, "-out", request)
    openssl("x509", "-req", "-in", request, "-CA", ca / "ca.crt", "-CAkey", ca / "ca.key", "-set_serial", secrets.randbits(63),
            "-days", 30, "-extfile", extensions, "-out", certificate)
    return certificate, key


@functools.lru_cache(maxsize=32)
def session_certificates(sans):
    """(directory of the CA, server certificate, its key) for these names; made once per process, removed at its end."""
    directory = Path(tempfile.mkdtemp(prefix="mncni-apiserver-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return (directory, *make_server_certificate(make_ca(directory), directory / "server", sans))


def make_server_certificate(ca, stem, sans):
    names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "127.0.0.1", "::1", *sans]
    return make_certificate(ca, stem, "/CN=kube-apiserver", "serverAuth",
                            ",".join(("IP:" if is_address(name) else "DNS:") + name for name in dict.fromkeys(names)))


def is_address(text):
    return ":" in text or text.replace(".", "").isdigit()


# ---------------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------------
class Fault:
    """One scripted fault, see the top of this file."""

    def __init__(self, number, kind, times, patterns, parameters):
        self.number, self.kind, self.left, self.patterns, self.parameters = number, kind, times, patterns, parameters
        self.used, self.ended, self._used = 0, threading.Event(), threading.Condition()

    def take(self, facts):
        """Whether it hits this request or event; then it has been used once more."""
        with self._used:
            if self.ended.is_set() or self.left == 0:
                return False
            if not all(fnmatch.fnmatchcase(facts[key], pattern) for key, pattern in self.patterns.items()):
                return False
            self.left = None if self.left is None else self.left - 1
            self.used += 1
            self._used.notify_all()
            return True

    def cancel(self):
        """No further use; what hangs or stalls because of it is closed."""
        self.ended.set()

    def wait(self, used=1, timeout_s=10):
        """Wait until it has been used so often. AssertionError at the deadline."""
        with self._used:
            if not self._used.wait_for(lambda: self.used >= used, timeout_s):
                raise AssertionError(f"the fault {self.kind} was used {self.used} times within {timeout_s} s, not {used}")


class Closed(Exception):
    """This connection ends now."""


# ---------------------------------------------------------------------------------------------------------------------------
# Connections
# ---------------------------------------------------------------------------------------------------------------------------
class Connection:
    """One TCP connection: reads requests, sends answers, counts bytes. Only its own thread reads and writes."""

    def __init__(self, api, sock):
        self.api, self.user = api, ""
        self.sock = api.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        self.rfile, self.slow = None, None
        self.received = 0

    def handshake(self):
        self.sock.settimeout(60)
        self.sock.do_handshake()
        self.sock.settimeout(None)
        self.rfile = self.sock.makefile("rb")

    def read_request(self):
        """The next Request, None when the client is done."""
        line = self.rfile.readline(65537)
        if not line.strip():
            return None
        method, target, _ = line.decode("latin-1").split()
        counted = CountingReader(self.rfile)
        headers = http.client.parse_headers(counted)
        length = int(headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        self.received = len(line) + counted.count + length
        return Request(method, target, headers, body)

    def send(self, data):
        """Send all of it, in pieces where a fault says so."""
        if self.slow and self.slow["chunk"]:
            for start in range(0, len(data), self.slow["chunk"]):
                self.sock.sendall(data[start:start + self.slow["chunk"]])
                self.wait(self.slow["pause_s"])
        else:
            self.sock.sendall(data)
        self.api.count_bytes(self.user, sent=len(data))

    def wait(self, timeout_s, event=None):
        """Wait, until event is set or the server stops; Closed when it stops or the client goes away."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not (event and event.is_set()):
            left = 0.05 if deadline is None else min(0.05, deadline - time.monotonic())
            if left <= 0:
                return
            if not self.rfile:                       # before the handshake: what the client sends stays unread
                if self.has_ended():
                    raise Closed
                self.api.stopped.wait(left)
            elif self.poll(left):
                self.check_client()
            if self.api.stopped.is_set():
                raise Closed

    def poll(self, timeout_s):
        """Whether there is something to read, or to hear of the end, within this time."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def has_ended(self):
        """Whether the client has gone, seen below TLS."""
        try:
            return socket.socket.recv(self.sock, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False

    def check_client(self):
        """After something could be read: Closed unless it was only TLS talking to itself."""
        self.sock.settimeout(0)
        try:
            self.sock.recv(1)
            raise Closed                             # the end, or a request in the middle of an answer
        except (ssl.SSLWantReadError, BlockingIOError):
            pass
        finally:
            self.sock.settimeout(None)

    def answer(self, code, body, content_type="application/json", headers=(), missing=0):
        """A whole answer. missing: that many of its bytes stay unsent, and the connection is closed."""
        rows = [f"HTTP/1.1 {code} {http.client.responses.get(code, '')}", f"Audit-Id: {uuid.uuid4()}", "Cache-Control: no-cache, private",
                f"Content-Type: {content_type}", f"Date: {time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime())}",
                *(f"{name}: {value}" for name, value in dict(headers).items()), f"Content-Length: {len(body)}"]
        self.send("\r\n".join(rows).encode() + b"\r\n\r\n" + body[:len(body) - missing])
        if missing:
            raise Closed

    def start_stream(self):
        self.send(b"HTTP/1.1 200 OK\r\nCache-Control: no-cache, private\r\nContent-Type: application/json\r\n"
                  b"Transfer-Encoding: chunked\r\n\r\n")

    def chunk(self, data):
        self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def interrupt(self):
        """Called by other threads: end it without a TLS goodbye. Its own thread notices and closes the socket."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)    # not SSLSocket's, which would pull TLS from under a reader

    def reset(self):
        """Close so that the client gets a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Closed

    def close(self):
        with contextlib.suppress(OSError):
            if self.rfile:
                self.rfile.close()
            self.sock.close()


class CountingReader:
    """A file whose lines are counted."""

    def __init__(self, file):
        self.file, self.count = file, 0

    def readline(self, limit=-1):
        line = self.file.readline(limit)
        self.count += len(line)
        return line


# ---------------------------------------------------------------------------------------------------------------------------
# Watches
# ---------------------------------------------------------------------------------------------------------------------------
class Watch:
    """One open watch, run by the thread of its connection. Other threads only give it orders."""

    def __init__(self, api, connection, request, partial):
        self.api, self.connection, self.request, self.partial = api, connection, request, partial
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.reader.setblocking(False)
        self.orders = deque()                        # ("error", Status) ("close", abrupt) ("bookmark",)
        self.version, self.held = 0, None
        self.bookmarks = request.query.get("allowWatchBookmarks", "") in ("1", "true")

    def wake(self, *order):
        if order:
            self.orders.append(order)
        with contextlib.suppress(BlockingIOError, OSError):
            self.writer.send(b"x")

    def run(self):
        """Stream until the time is over, the client goes or an order ends it."""
        timeout_s = float(self.request.query.get("timeoutSeconds") or random.uniform(1800, 3600))
        end = time.monotonic() + timeout_s
        changes = self.first_changes()
        self.connection.start_stream()               # a client that has seen this misses nothing from here on
        begin, near_end, bookmark_at = self.version, end - 2, time.monotonic() + self.api.bookmark_s
        near_end = near_end if timeout_s > 2 else end + 1
        while True:
            self.api.wait_thawed(self.connection)
            if changes and self.partial == "PartialObjectMetadataList":
                break                                # an event is no list: the real one ends the stream without a word
            for change in changes:
                self.send_change(change)
            if self.obey() or time.monotonic() >= end:
                break
            if time.monotonic() >= min(bookmark_at, near_end):
                if self.version > begin:             # the client knows the version that it began with
                    self.bookmark()
                near_end = near_end if time.monotonic() < near_end else end + 1
                bookmark_at = time.monotonic() + self.api.bookmark_s
            changes = self.next_changes(min(end, bookmark_at, near_end))
        self.connection.chunk(b"")

    def first_changes(self):
        """What the watch begins with: all objects without a version or with 0, else what happened since. ApiError 410."""
        text = self.request.query.get("resourceVersion", "")
        with self.api.store.lock:
            if text in ("", "0"):
                self.version = self.api.store.version
                state = self.api.store.entries.get(self.request.resource, {})
                return [Change(self.version, "ADDED", state[key], None) for key in sorted(state) if self.wants(state[key])]
            self.version = int(text)
            if self.version < self.api.store.oldest:
                error = objects.gone(f"too old resource version: {text} ({self.api.store.oldest})")
                self.orders.append(("error", error.status))
                return []
            return self.take_changes()

    def take_changes(self):
        with self.api.store.lock:
            if self.version < self.api.store.trimmed:
                self.orders.append(("error", objects.gone(f"too old resource version: {self.version}").status))
            changes = self.api.store.since(self.version)
            self.version = max(self.version, self.api.store.version)
        return [change for change in changes if self.wants(change.entry)]

    def next_changes(self, until):
        """Wait for news until a time, or until the client goes away. Returns [] on an order or at the end."""
        poll = select.poll()
        poll.register(self.connection.sock, select.POLLIN)
        poll.register(self.reader, select.POLLIN)
        if self.connection.sock.pending():
            raise Closed
        ready = dict(poll.poll(max(0, until - time.monotonic()) * 1000))
        if self.connection.sock.fileno() in ready:
            self.connection.check_client()
        if self.reader.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self.reader.recv(65536)
        return self.take_changes()

    def wants(self, entry):
        request = self.request
        return (entry.resource == objects.stored(request.resource) and request.namespace in ("", entry.namespace)
                and selected(request.selector, entry))

    def obey(self):
        """Do what other threads asked for. Returns True when the stream is to end."""
        while self.orders:
            kind, *values = self.orders.popleft()
            if kind == "bookmark":
                self.bookmark()
            elif kind == "error":
                self.connection.chunk(compact({"type": "ERROR", "object": values[0]}) + b"\n")
                return True
            elif values[0]:                          # close, abruptly
                raise Closed
            else:
                return True
        return False

    def bookmark(self):
        if not self.bookmarks:
            return
        meta = {"resourceVersion": str(self.version), "creationTimestamp": None}
        obj = {**objects.PARTIAL_KIND, "metadata": meta}
        if not self.partial:
            resource = self.request.resource
            obj = {**objects.from_stored(resource, objects.prepared(objects.stored(resource), {})), "metadata": meta}
        self.connection.chunk(compact({"type": "BOOKMARK", "object": obj}) + b"\n")

    def send_change(self, change):
        """Send one event, or what a fault makes of it."""
        line = b'{"type":"%b","object":%b}\n' % (change.type.encode(), self.encode(change.entry))
        fault = self.api.take_fault(self.request, "event", change.entry.name)
        if fault is None:
            self.connection.chunk(line)
            held, self.held = self.held, None
            if held:
                self.connection.chunk(held)
            return
        self.send_faulty(fault, change, line)

    def encode(self, entry):
        return presented(self.request.resource, entry, bool(self.partial))

    def send_faulty(self, fault, change, line):
        kind, parameters = fault.kind, fault.parameters
        if kind == "cut":
            self.connection.send(b"%x\r\n%b" % (len(line), line[:len(line) // 2]))
            raise Closed
        if kind == "stall":
            self.connection.wait(None, fault.ended)
            raise Closed
        if kind == "duplicate":
            self.connection.chunk(line)
            self.connection.chunk(line)
        elif kind == "reorder":
            self.held = line
        elif kind == "swallow":
            self.bookmarks, before = True, self.bookmarks
            self.bookmark()
            self.bookmarks = before
        elif kind == "bad_event":
            self.connection.chunk(line[:len(line) // 2] + b"\n")
        elif kind == "wrong_event":
            wrong = {**json.loads(self.encode(change.entry)), "kind": parameters.get("kind", "Pod")}
            self.connection.chunk(compact({"type": change.type, "object": wrong}) + b"\n")
        elif kind == "strip_event":
            stripped = without(json.loads(self.encode(change.entry)), parameters.get("drop", []))
            self.connection.chunk(compact({"type": change.type, "object": stripped}) + b"\n")


def without(obj, paths):
    """The object without these fields, "spec.podCIDR" and the like; of a list, every item."""
    obj = copy.deepcopy(obj)
    for item in obj.get("items", [obj]):
        for path in paths:
            *parents, last = path.split(".")
            part = functools.reduce(lambda at, key: at.get(key, {}), parents, item)
            part.pop(last, None)
    return obj


# ---------------------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------------------
class ApiServer(Resources):
    """The double, see the top of this file."""

    def __init__(self, host="127.0.0.1", port=0, sans=(), directory=None):
        super().__init__()
        self.host, self.port = host, port
        self.store.on_change = self._wake_watches
        self.sans = tuple(dict.fromkeys([*sans, *([host] if is_address(host) and host not in ("::", "0.0.0.0") else [])]))
        self.dir = Path(directory) if directory else Path(tempfile.mkdtemp(prefix="mncni-apiserver-"))
        self.dir.mkdir(parents=True, exist_ok=True)
        self._own_dir = directory is None
        self.ca_file = str(self.dir / "ca.crt")
        self.bookmark_s, self.gone_as_http = 60, False
        self.log, self.faults = [], []
        self._sent, self._received = Counter(), Counter()
        self._users, self._published = {}, []        # token -> user; functions that write files with tokens and CA again
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()               # of everything but the store
        self._connections, self._watches = set(), set()
        self.stopped, self.thawed = threading.Event(), threading.Event()
        self.thawed.set()
        self._listener = self._guard = None

    # ---- start and stop -----------------------------------------------------------------------------------------------

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def start(self):
        require_openssl()
        ca, certificate, key = session_certificates(self.sans)
        self._use_certificates(ca, certificate, key)
        self.publish_ca()
        # Bound, but never listening: keeps the port ours while the server is down.
        self._guard = self._bind(self.port)
        self.port = self._guard.getsockname()[1]
        self.up()
        return self

    def stop(self):
        self.stopped.set()
        for fault in self.faults:
            fault.cancel()
        self.thawed.set()
        self.down()
        deadline = time.monotonic() + 10
        while self._connections and time.monotonic() < deadline:
            time.sleep(0.005)
        self._guard.close()
        if self._own_dir:
            shutil.rmtree(self.dir, ignore_errors=True)

    @property
    def url(self):
        host = {"::": "::1", "0.0.0.0": "127.0.0.1"}.get(self.host, self.host)
        return f"https://[{host}]:{self.port}" if ":" in host else f"https://{host}:{self.port}"

    def _bind(self, port):
        sock = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.host == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((self.host, port))
        return sock

    def up(self):
        """Listen on the port again."""
        self._listener = self._bind(self.port)
        self._listener.listen(256)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self):
        """Refuse connections, and end those that are open."""
        if self._listener:
            listener, self._listener = self._listener, None
            listener.shutdown(socket.SHUT_RDWR)      # wakes the thread in accept, which closes it
        for connection in self._snapshot(self._connections):
            connection.interrupt()

    def freeze(self):
        """Half-open: connections are accepted, nothing is answered or sent any more."""
        self.thawed.clear()

    def thaw(self):
        self.thawed.set()

    def wait_thawed(self, connection):
        if not self.thawed.is_set():
            connection.wait(None, self.thawed)

    def _snapshot(self, things):
        with self._lock:
            return list(things)

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = Connection(self, sock)
                with self._lock:
                    self._connections.add(connection)
                if self._listener is not listener:
                    connection.interrupt()           # accepted while the server went down
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        listener.close()

    def _serve(self, connection):
        try:
            self.wait_thawed(connection)
            connection.handshake()
            while not self.stopped.is_set():
                request = connection.read_request()
                if request is None:
                    break
                self._answer(connection, request)
        except (OSError, ValueError, Closed):        # ValueError: TLS that was shut down under the reader, or no HTTP
            pass
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    # ---- certificates, users, rights ----------------------------------------------------------------------------------

    def _use_certificates(self, ca, certificate, key):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(ca / "ca.crt")
        context.verify_mode = ssl.CERT_OPTIONAL
        context.set_alpn_protocols(["http/1.1"])
        self.ca_dir, self.tls = ca, context

    def rotate_certificate(self):
        """A new certificate of the same CA, for connections from now on."""
        self._use_certificates(self.ca_dir, *make_server_certificate(self.ca_dir, self.dir / f"server{next(self._numbers)}", self.sans))

    def rotate_ca(self, publish=True):
        """A new CA and certificate for connections from now on; publish: ca_file, kubeconfigs and service account directories follow."""
        ca = make_ca(self.dir / f"ca{next(self._numbers)}")
        self._use_certificates(ca, *make_server_certificate(ca, ca / "server", self.sans))
        if publish:
            self.publish_ca()

    def publish_ca(self):
        """Write the present CA, and tokens that are valid, into all files made before."""
        write_atomically(Path(self.ca_file), (self.ca_dir / "ca.crt").read_text())
        for publish in self._snapshot(self._published):
            publish()

    def client_certificate(self, user, groups=()):
        """(certificate file, key file) of a user, as kubelet and kubeadm have."""
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={user}"
        return make_certificate(self.ca_dir, self.dir / f"client{next(self._numbers)}", subject, "clientAuth")

    def token(self, user, groups=(), node="", pod=""):
        """A bearer token of a user. node, pod: what a service account token carries when a pod on that node mounts it."""
        made = secrets.token_urlsafe(24)
        with self._lock:
            self._users[made] = self._user(user, groups, node, pod)
        return made

    def _user(self, user, groups, node, pod):
        parts, extra = user.split(":"), {}
        if parts[:2] == ["system", "serviceaccount"] and len(parts) == 4:
            groups = [*groups, "system:serviceaccounts", f"system:serviceaccounts:{parts[2]}"]
        for kind, name in (("node", node), ("pod", pod)):
            if name:
                extra[f"authentication.kubernetes.io/{kind}-name"] = [name]
        entry = self.store.get("nodes", "", node)
        if entry:
            extra["authentication.kubernetes.io/node-uid"] = [entry.object()["metadata"]["uid"]]
        return {"username": user, "groups": [*groups, "system:authenticated"], "extra": extra}

    def revoke(self, token):
        """401 for this token from now on."""
        with self._lock:
            self._users.pop(token, None)

    def rotate_tokens(self):
        """401 for every token made so far; the files made before get new ones."""
        with self._lock:
            self._users.clear()
        self.publish_ca()

    def kubeconfig(self, path, user, groups=(), node="", certificate=False):
        """Write a kubeconfig (JSON, which is YAML too) with a token, or with a client certificate. Returns its path."""
        def publish():
            if certificate:
                names = zip(("client-certificate", "client-key"), self.client_certificate(user, groups))
                credentials = dict(names)
            else:
                credentials = {"token": self.token(user, groups, node)}
            ca = base64.b64encode((self.ca_dir / "ca.crt").read_bytes()).decode()
            config = {"apiVersion": "v1", "kind": "Config", "current-context": "double", "preferences": {},
                      "clusters": [{"name": "double", "cluster": {"server": self.url, "certificate-authority-data": ca}}],
                      "contexts": [{"name": "double", "context": {"cluster": "double", "user": "user"}}],
                      "users": [{"name": "user", "user": credentials}]}
            write_atomically(Path(path), json.dumps(config, indent=1))
        return self._publish(path, publish)

    def service_account_dir(self, path, user, groups=(), node="", pod="", namespace=""):
        """Write token, ca.crt and namespace into a directory as kubelet does: links into ..data, which is exchanged. Returns its path."""
        def publish():
            files = {"token": self.token(user, groups, node, pod), "ca.crt": (self.ca_dir / "ca.crt").read_text(),
                     "namespace": namespace or (user.split(":") + ["", "", "default"])[2] or "default"}
            write_projected(Path(path), files)
        return self._publish(path, publish)

    def _publish(self, path, publish):
        publish()
        with self._lock:
            self._published.append(publish)
        return str(path)

    def _authenticate(self, connection, request):
        """The user of a request. ApiError 401."""
        header = request.headers.get("Authorization", "")
        certificate = connection.sock.getpeercert()
        if certificate:
            subject = [pair for rdn in certificate["subject"] for pair in rdn]
            groups = [value for key, value in subject if key == "organizationName"]
            return {"username": dict(subject)["commonName"], "groups": [*groups, "system:authenticated"], "extra": {}}
        if not header:
            return ANONYMOUS
        with self._lock:
            user = self._users.get(header[7:].strip() if header[:7].lower() == "bearer " else "")
        if user is None:
            raise objects.unauthorized()
        return user

    # ---- faults and counters ------------------------------------------------------------------------------------------

    def fault(self, kind, /, times=1, verb="*", resource="*", name="*", user="*", user_agent="*", **parameters):
        """Script a fault, see the top of this file."""
        if kind not in (*EVENT_FAULTS, *REQUEST_FAULTS):
            raise ValueError(f"no fault {kind!r}; there are: {' '.join((*REQUEST_FAULTS, *EVENT_FAULTS))}")
        patterns = {"verb": verb, "resource": resource, "name": name, "user": user, "user_agent": user_agent}
        made = Fault(next(self._numbers), kind, times, patterns, parameters)
        with self._lock:
            self.faults.append(made)
        return made

    def clear_faults(self):
        for fault in self._snapshot(self.faults):
            fault.cancel()
        with self._lock:
            self.faults.clear()

    def take_fault(self, request, stage, name):
        """The fault that hits this request or event, None mostly."""
        if not self.faults:
            return None
        facts = {"verb": request.verb, "resource": request.target, "name": name, "user": request.user["username"],
                 "user_agent": request.headers.get("User-Agent", "")}
        for fault in self._snapshot(self.faults):
            if (fault.kind in EVENT_FAULTS) == (stage == "event") and fault.take(facts):
                return fault
        return None

    def count_bytes(self, user, sent=0, received=0):
        with self._lock:
            self._sent[user] += sent
            self._received[user] += received

    def count(self, verb="*", resource="*", user="*", user_agent="*", name="*", code=None, dry_run=None):
        """How many requests came that match; code: those answered with it."""
        wanted = {"verb": verb, "resource": resource, "user": user, "user_agent": user_agent, "name": name}
        return sum(all(fnmatch.fnmatchcase(row[key], pattern) for key, pattern in wanted.items())
                   and code in (None, row["code"]) and dry_run in (None, row["dry_run"]) for row in self._snapshot(self.log))

    def writes(self, user="*"):
        """How many requests to write came, without dry-runs, whatever became of them."""
        return sum(self.count(verb, user=user, dry_run=False) for verb in WRITES)

    def bytes_sent(self, user="*"):
        with self._lock:
            return sum(count for name, count in self._sent.items() if fnmatch.fnmatchcase(name, user))

    def bytes_received(self, user="*"):
        with self._lock:
            return sum(count for name, count in self._received.items() if fnmatch.fnmatchcase(name, user))

    def reset_counters(self):
        with self._lock:
            self.log.clear()
            self._sent.clear()
            self._received.clear()

    def watches(self, user="*"):
        """How many watches are open."""
        return sum(fnmatch.fnmatchcase(watch.request.user["username"], user) for watch in self._snapshot(self._watches))

    @property
    def changes(self):
        return self.store.changes

    # ---- open watches -------------------------------------------------------------------------------------------------

    def _wake_watches(self):
        for watch in self._snapshot(self._watches):
            watch.wake()

    def _order(self, *order):
        for watch in self._snapshot(self._watches):
            watch.wake(*order)

    def send_bookmarks(self):
        self._order("bookmark")

    def send_error(self, code=410):
        """An ERROR event into every open watch, which then ends."""
        self._order("error", error_of({"code": code}).status)

    def close_watches(self, abrupt=False):
        self._order("close", abrupt)

    # ---- answering ----------------------------------------------------------------------------------------------------

    def _answer(self, connection, request):
        row = {"time": time.monotonic(), "verb": request.verb, "resource": request.target, "name": request.object_name, "user": "",
               "user_agent": request.headers.get("User-Agent", ""), "query": request.query, "code": 0, "dry_run": request.dry_run}
        error = None
        try:
            request.user = self._authenticate(connection, request)
            row["user"] = connection.user = request.user["username"]
        except ApiError as refusal:
            error = refusal
        with self._lock:
            self.log.append(row)
        self.count_bytes(connection.user, received=connection.received)
        self.wait_thawed(connection)
        fault = self.take_fault(request, "request", request.object_name)
        connection.slow = None
        if fault:
            error = self._begin_fault(fault, connection) or error
        try:
            if error:
                raise error
            if request.verb == "watch":
                self._watch(connection, request, row, fault)
                return
            code, body, headers = self._handle(request)
        except ApiError as refusal:
            code, body, headers = refusal.code, compact(refusal.status), refusal.headers
        row["code"] = code
        self._send(connection, request, fault, code, body, headers)

    def _begin_fault(self, fault, connection):
        """What a fault does before the request is looked at. Returns an ApiError to answer with, or None."""
        if fault.kind == "status":
            return error_of(fault.parameters)
        if fault.kind == "hang":
            connection.wait(None, fault.ended)
            raise Closed
        if fault.kind == "slow":
            connection.wait(fault.parameters.get("delay_s", 1))
            connection.slow = {"chunk": fault.parameters.get("chunk", 0), "pause_s": fault.parameters.get("pause_s", 0.05)}
        elif fault.kind == "reset":
            connection.reset()
        elif fault.kind == "close":
            raise Closed
        return None

    def _send(self, connection, request, fault, code, body, headers):
        missing, content_type = 0, headers.pop("Content-Type", "application/json")
        if fault and code < 300:
            body = faulty_body(fault, body)
            missing = len(body) - len(body) // 2 if fault.kind == "truncate" else 0
        if code == 429:                              # the overload filter of the real one answers in plain text
            body, content_type = b"Too many requests, please try again later.", "text/plain; charset=utf-8"
        if len(body) > 128 * 1024 and "gzip" in request.headers.get("Accept-Encoding", ""):
            body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
        connection.answer(code, body, content_type, headers, missing)

    def _watch(self, connection, request, row, fault):
        self._check(request)
        partial = parse_accept(request.headers.get("Accept", ""))
        version = parse_version(request.query, "resourceVersion")
        if self.gone_as_http and version and version < self.store.oldest:
            raise objects.gone(f"too old resource version: {version} ({self.store.oldest})")
        watch = Watch(self, connection, request, partial)
        if fault and fault.kind == "error_event":
            watch.orders.append(("error", error_of({"code": 410, **fault.parameters}).status))
        row["code"] = 200
        with self._lock:
            self._watches.add(watch)
        try:
            watch.run()
        finally:
            with self._lock:
                self._watches.discard(watch)
            watch.reader.close()
            watch.writer.close()

REQUEST_FAULTS = ("status", "hang", "slow", "reset", "close", "truncate", "bad_json", "empty_list", "wrong_kind", "strip", "error_event")


def error_of(parameters):
    """The ApiError that a fault asks for: {"code", "retry_after"}."""
    code, retry_after = parameters.get("code", 500), parameters.get("retry_after")
    messages = {401: "Unauthorized", 410: "The resourceVersion for the provided watch is too old.", 500: "etcdserver: request timed out"}
    message = parameters.get("message") or messages.get(code, f"the server answers {code}, as the test asked for")
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return ApiError(code, REASONS.get(code, ""), message, headers=headers)


def faulty_body(fault, body):
    """What a fault makes of the body of a good answer."""
    if fault.kind == "bad_json":
        return body[:len(body) // 2]
    if fault.kind == "wrong_kind":
        return compact({**json.loads(body), "kind": fault.parameters.get("kind", "PodList")})
    if fault.kind == "strip":
        return compact(without(json.loads(body), fault.parameters.get("drop", [])))
    if fault.kind == "empty_list":
        return compact({**json.loads(body), "items": []})
    return body


def write_atomically(path, text):
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_projected(directory, files):
    """Files as kubelet projects them: name -> ..data/name, ..data -> a directory with all of them, exchanged in one step."""
    directory.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=time.strftime("..%Y_%m_%d_%H_%M_%S."), dir=directory))
    fresh.chmod(0o755)
    for name, text in files.items():
        (fresh / name).write_text(text)
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(f"..data/{name}")
    data = directory / "..data"
    old = data.is_symlink() and os.readlink(data)
    (directory / "..data_tmp").symlink_to(fresh.name)
    os.replace(directory / "..data_tmp", data)
    if old:
        shutil.rmtree(directory / old)


# ---------------------------------------------------------------------------------------------------------------------------
# A process of its own
# ---------------------------------------------------------------------------------------------------------------------------
# What may be called through the control socket: with JSON values, so a Fault becomes its number.
CONTROLLED = (
    "create_node", "create_nodes", "node", "nodes", "patch_node", "delete_node", "get", "put", "bump", "token", "revoke", "rotate_tokens",
    "kubeconfig", "service_account_dir", "client_certificate", "count", "writes", "watches", "bytes_sent", "bytes_received",
    "reset_counters", "send_bookmarks", "compact", "close_watches", "send_error", "down", "up", "freeze", "thaw", "rotate_certificate",
    "rotate_ca", "publish_ca", "fault", "clear_faults", "fault_used", "cancel_fault", "set", "value",
)


class Controlled(ApiServer):
    """A double that is called from another process: one line of JSON for each call, one for each answer."""

    SETTABLE = ("rbac", "bookmark_s", "gone_as_http")
    READABLE = (*SETTABLE, "resource_version", "changes", "log", "url", "ca_file")

    def set(self, name, value):
        if name not in self.SETTABLE:
            raise ValueError(f"set: no {name!r}; there are: {' '.join(self.SETTABLE)}")
        setattr(self, name, value)

    def value(self, name):
        if name not in self.READABLE:
            raise ValueError(f"value: no {name!r}; there are: {' '.join(self.READABLE)}")
        return getattr(self, name)

    def fault_used(self, number):
        return next(fault.used for fault in self.faults if fault.number == number)

    def cancel_fault(self, number):
        next(fault for fault in self.faults if fault.number == number).cancel()

    def serve_control(self):
        """Answer calls on DIR/control.sock from now on."""
        listener = socket.socket(socket.AF_UNIX)
        (self.dir / "control.sock").unlink(missing_ok=True)
        with control_path(self.dir) as path:
            listener.bind(path)
        listener.listen(16)
        threading.Thread(target=self._accept_control, args=(listener,), daemon=True).start()

    def _accept_control(self, listener):
        while True:
            caller, _ = listener.accept()
            threading.Thread(target=self._controlled, args=(caller,), daemon=True).start()

    def _controlled(self, caller):
        with caller, caller.makefile("rwb") as stream:
            for line in stream:
                stream.write(compact(self._call(json.loads(line))) + b"\n")
                stream.flush()

    def _call(self, call):
        try:
            if call["method"] not in CONTROLLED:
                raise ValueError(f"no method {call['method']!r}")
            result = getattr(self, call["method"])(*call["args"], **call["kwargs"])
        except Exception as error:                   # of any kind: the caller is to see it, not this process's stderr
            return {"error": f"{type(error).__name__}: {error}"}
        return {"result": result.number if isinstance(result, Fault) else result}


@contextlib.contextmanager
def control_path(directory):
    """The path of the control socket in a form that is always short enough for one (107 bytes)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/control.sock"
    finally:
        os.close(descriptor)


class ApiProcess:
    """A double in a process, and in a network namespace, of its own: call("create_node", "n1"), .url, .ca_file, .dir.

    netns: the namespace, by its name or by a path.
    """

    def __init__(self, directory, netns="", listen="127.0.0.1:0", sans=(), nodes=0, python=sys.executable):
        self.dir = Path(directory)
        enter = ["nsenter", f"--net={os.path.join('/run/netns', netns)}", "--"] if netns else []
        self.argv = [*enter, python, "-m", "tests.apiserver", "--dir", str(self.dir), "--listen", listen, "--nodes", str(nodes),
                     "--control"]
        for name in sans:
            self.argv += ["--san", name]
        self.process = self._socket = None

    def __enter__(self):
        require_openssl()
        self.dir.mkdir(parents=True, exist_ok=True)
        environ = {**os.environ, "TMPDIR": str(self.dir)}  # it will be killed, and clear nothing away
        self.process = subprocess.Popen(self.argv, cwd=Path(__file__).resolve().parents[1], env=environ,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            line = self.process.stdout.readline()    # it says when it serves; at its end there is nothing
            if not line:
                raise AssertionError(f"no start: {' '.join(self.argv)}")
            ready = json.loads(line)
            self.url, self.ca_file = ready["url"], ready["ca_file"]
            self._socket = socket.socket(socket.AF_UNIX)
            with control_path(self.dir) as path:
                self._socket.connect(path)
            self._stream = self._socket.makefile("rwb")
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(10)
        self.process.stdin.close()
        self.process.stdout.close()
        if self._socket:
            self._socket.close()

    def call(self, method, *args, **kwargs):
        """The result of a method of ApiServer. RuntimeError with its error."""
        self._stream.write(compact({"method": method, "args": args, "kwargs": kwargs}) + b"\n")
        self._stream.flush()
        answer = json.loads(self._stream.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]


def main(argv):
    """Serve until standard input ends, so that nothing outlives the test that started it."""
    parser = argparse.ArgumentParser(prog="python -m tests.apiserver", description="A double of the Kubernetes API server.")
    parser.add_argument("--dir", required=True, type=Path, help="for certificates, control.sock and ready.json")
    parser.add_argument("--listen", default="127.0.0.1:0", help="ADDRESS:PORT; port 0: a free one")
    parser.add_argument("--san", action="append", default=[], help="another name or address in the certificate")
    parser.add_argument("--nodes", type=int, default=0, help="so many realistic nodes to begin with")
    parser.add_argument("--control", action="store_true", help="obey calls through DIR/control.sock")
    options = parser.parse_args(argv)
    host, _, port = options.listen.rpartition(":")
    api = Controlled(host.strip("[]"), int(port), options.san, options.dir)
    api.create_nodes(options.nodes)
    with api:
        if options.control:
            api.serve_control()
        ready = {"url": api.url, "ca_file": api.ca_file, "pid": os.getpid()}
        write_atomically(options.dir / "ready.json", json.dumps(ready))
        print(json.dumps(ready), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
