"""A real API server for tests: kube-apiserver with etcd, both of which `make kubernetes` builds. Nothing runs on it: no
kubelet, no controllers. What it stores, and whom it lets do what, is as in a cluster.

    with Kubernetes(directory) as cluster:
        cluster.api()                                              # a kube.Api of the administrator
        cluster.api("system:node:n1", ["system:nodes"], node="n1") # of somebody else: the administrator, impersonating them
        cluster.kubectl("apply", "-k", ".")
    Kubernetes(directory, "192.0.2.250", 6443, netns="name")       # elsewhere; then kubectl() reaches it, api() does not
"""
import json
import os
import socket
import subprocess
import time
from pathlib import Path

import kube
from tests import manifests

TOKEN = "the-administrator"


def missing():
    """What is needed for it and not there, "" if all is."""
    absent = [name for name in ("etcd", "kube-apiserver") if not os.access(manifests.BINARIES / name, os.X_OK)]
    if absent:
        return f"needs {' and '.join(absent)}: make kubernetes builds and fetches them"
    return manifests.kubectl_missing()


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


class Impersonator(kube.Api):
    """A client whose requests count as another user's."""

    def __init__(self, access, user, groups, node):
        super().__init__(access)
        self.said = {"Impersonate-User": user}
        if groups:
            self.said["Impersonate-Group"] = groups[0]
        if node:
            self.said["Impersonate-Extra-authentication.kubernetes.io%2Fnode-name"] = node

    def _connect(self, server):
        connection = super()._connect(server)
        plain = connection.request
        connection.request = lambda method, target, body, headers: plain(method, target, body, {**headers, **self.said})
        return connection


class Kubernetes:
    """See the top of this file."""

    def __init__(self, directory, address="127.0.0.1", port=0, netns=""):
        self.dir, self.address, self.port = Path(directory), address, port
        self.enter = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
        self.processes = []

    def __enter__(self):
        self.dir.mkdir(parents=True, exist_ok=True)
        client, peer, port = free_ports(3)
        self.url, self.ca_file = f"https://{self.address}:{self.port or port}", str(self.dir / "certs/apiserver.crt")
        named = self.address if self.enter else "192.0.2.250"  # an address of its own in the certificate; it has the loopback one anyway
        key = self.dir / "accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        (self.dir / "tokens.csv").write_text(f"{TOKEN},admin,admin,system:masters\n")
        try:
            self._start("etcd", "--data-dir", self.dir / "etcd", "--listen-client-urls", f"http://127.0.0.1:{client}",
                        "--advertise-client-urls", f"http://127.0.0.1:{client}", "--listen-peer-urls", f"http://127.0.0.1:{peer}")
            self._start("kube-apiserver", "--etcd-servers", f"http://127.0.0.1:{client}", "--bind-address", self.address,
                        "--advertise-address", named, "--secure-port", self.port or port, "--cert-dir", self.dir / "certs",
                        "--service-cluster-ip-range", "10.96.0.0/16", "--service-account-issuer", "https://kubernetes.default.svc",
                        "--service-account-key-file", key, "--service-account-signing-key-file", key, "--token-auth-file",
                        self.dir / "tokens.csv", "--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction",
                        "--allow-privileged=true", "--profiling=false")
            self._wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.kill()
            process.wait(10)

    def _start(self, name, *words):
        with open(self.dir / f"{name}.log", "w") as log:
            argv = [*self.enter, str(manifests.BINARIES / name), *map(str, words)]
            self.processes.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _wait_ready(self, timeout_s=120):
        deadline = time.monotonic() + timeout_s
        while not os.path.exists(self.ca_file) or "kube-system" not in self.kubectl("get", "namespaces", check=False):
            for name, process in zip(("etcd", "kube-apiserver"), self.processes):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"{name} does not serve\n{(self.dir / f'{name}.log').read_text()[-3000:]}")
            time.sleep(0.2)

    def token(self, account, node):
        """A token as a pod of this account on this node gets it."""
        name = f"{account}-{node}"
        spec = {"serviceAccountName": account, "nodeName": node, "containers": [{"name": "one", "image": "python:3-slim"}]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "kube-system"}, "spec": spec}
        self.kubectl("apply", "-f", "-", stdin=pod)
        words = ("--bound-object-kind", "Pod", "--bound-object-name", name)
        return self.kubectl("create", "token", account, "-n", "kube-system", *words).strip()

    def access(self, token=TOKEN):
        return {"server": self.url, "certificate-authority": self.ca_file, "token": token}

    def api(self, user="", groups=(), node=""):
        return Impersonator(self.access(), user, groups, node) if user else kube.Api(self.access())

    def kubectl(self, *words, check=True, stdin=None):
        """What kubectl says (stdout and stderr), run at the top of the repository. stdin: an object for `-f -`."""
        access = ["--server", self.url, "--certificate-authority", self.ca_file, "--token", TOKEN]
        argv = [*self.enter, manifests.kubectl(), "--kubeconfig", "/dev/null", *access, *map(str, words)]
        done = subprocess.run(argv, cwd=manifests.ROOT, input=json.dumps(stdin), capture_output=True, text=True, timeout=120, check=False)
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(map(str, words))}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr
