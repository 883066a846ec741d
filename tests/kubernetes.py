"""A real API server for tests: kube-apiserver with etcd, both of which `make kubernetes` puts into .kubernetes. Nothing runs on it: no
kubelet, no controllers. What it stores, and whom it lets do what, is as in a cluster.

    with Kubernetes(directory) as cluster:
        cluster.api()                                              # an agent.Api of the administrator
        cluster.api("system:node:n1", ["system:nodes"], node="n1") # of somebody else: the administrator, impersonating them
        cluster.kubectl("apply", "-k", ".")
"""
import os
import socket
import subprocess
import time
from pathlib import Path

import agent
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


class Impersonator(agent.Api):
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

    def __init__(self, directory):
        self.dir = Path(directory)
        self.processes = []

    def __enter__(self):
        self.dir.mkdir(parents=True, exist_ok=True)
        client, peer, port = free_ports(3)
        self.url, self.ca_file = f"https://127.0.0.1:{port}", str(self.dir / "certs/apiserver.crt")
        key = self.dir / "accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        (self.dir / "tokens.csv").write_text(f"{TOKEN},admin,admin,system:masters\n")
        try:
            self._start("etcd", "--data-dir", self.dir / "etcd", "--listen-client-urls", f"http://127.0.0.1:{client}",
                        "--advertise-client-urls", f"http://127.0.0.1:{client}", "--listen-peer-urls", f"http://127.0.0.1:{peer}")
            self._start("kube-apiserver", "--etcd-servers", f"http://127.0.0.1:{client}", "--bind-address", "127.0.0.1",
                        "--advertise-address", "192.0.2.250", "--secure-port", port, "--cert-dir", self.dir / "certs",
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
            argv = [manifests.BINARIES / name, *map(str, words)]
            self.processes.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _wait_ready(self, timeout_s=120):
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.api().request("GET", "/api/v1/namespaces/kube-system")
                return
            except (agent.ApiError, agent.CNIError) as error:
                for process in self.processes:
                    if process.poll() is not None or time.monotonic() > deadline:
                        name = Path(process.args[0]).name
                        raise AssertionError(f"{name}: {error}\n{(self.dir / f'{name}.log').read_text()[-3000:]}") from None
            time.sleep(0.2)

    def access(self, token=TOKEN):
        return {"server": self.url, "certificate-authority": self.ca_file, "token": token}

    def api(self, user="", groups=(), node=""):
        return Impersonator(self.access(), user, groups, node) if user else agent.Api(self.access())

    def kubectl(self, *words, check=True):
        """What kubectl says (stdout and stderr), run at the top of the repository."""
        argv = [manifests.kubectl(), "--kubeconfig", "/dev/null", "--server", self.url, "--certificate-authority", self.ca_file, "--token", TOKEN]
        done = subprocess.run([*argv, *map(str, words)], cwd=manifests.ROOT, capture_output=True, text=True, timeout=120)
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(map(str, words))}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr
