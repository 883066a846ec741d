"""Real container runtimes on nodes of the lab, used the way their own users do.

A node has a root file system, namespaces and a cgroup of its own, so a runtime in it finds its configuration, sockets and state at
the usual paths, and the machine's own stay untouched. Whatever a runtime starts dies with the node's init.

    Ctr     containerd by `ctr run --cni`, the runtime's own tool
    Cri     containerd by CRI, as kubelet calls it
    Podman  podman with its CNI backend

All three have start(name, ...) -> Pod, run(pod, words) in its container, remove(pod). Containers are made of busybox; no registry.
"""

import base64
import contextlib
import difflib
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

from deploy import lab as labs

HERE = Path(__file__).parent
POD_IMAGE, PAUSE_IMAGE = "localhost/mncni-pod:1", "localhost/mncni-pause:1"
PORT = 8080  # where the pods serve HTTP
HELLO = "hello\n"
NETWORK = "mncni"  # the name that the agent gives it
IMAGES = "/var/lib/mncni-images.tar"
ENVIRON = {"PATH": labs.PATH, "HOME": "/root", "LC_ALL": "C.UTF-8"}

# Runtimes make cgroups. They get one of the machine's to do so in, as the root of a cgroup namespace: kept in /run/cgroup.ns, because
# no process may stay in that root. Version 2 alone, which can be mounted everywhere, also beside version 1.
MAKE_CGROUP = """
mkdir /run/cgroup
mount -t cgroup2 cgroup2 /run/cgroup
mkdir -p "/run/cgroup/$0"
echo 0 >"/run/cgroup/$0/cgroup.procs"
touch /run/cgroup.ns
unshare --cgroup=/run/cgroup.ns sh -ec '
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mkdir -p /sys/fs/cgroup/init
    echo 0 >/sys/fs/cgroup/init/cgroup.procs'
"""
REMOVE_CGROUP = """
mount -t cgroup2 cgroup2 "$0"
if test -e "$0/$1"; then find "$0/$1" -depth -type d -exec rmdir {} +; fi
"""

# Everything of a node that pods change. Not what is volatile: carriers, what the kernel does for IPv6 on any link. Not what stays by
# design: locks, round-robin marks.
LOOK = r"""
ip -json -details link | tr '{' '\n' | grep -o -e '"ifname":"[^"]*"' -e '"info_kind":"[^"]*"' -e '"ifalias":"[^"]*"' -e '"master":"[^"]*"'
{ ip route show table all; ip -6 route show table all; } | sed 's/ linkdown//' | grep -v -e fe80:: -e ff00:: -e '^anycast'
ip rule; ip netns; tc qdisc show; nft --stateless list ruleset
find /var/lib/cni /run/mncni /run/netns -type f | grep -v -e '/last\.[0-9]*$' -e '/lock$' -e /bridge.lock -e /run/mncni/attachments/ | sort
"""

# The native snapshotter and no cgroup per container: what works on any file system, and where this machine delegates no controller.
# bin_dir is containerd's own default, which Debian's package changes to /usr/lib/cni.
CONTAINERD = f"""
version = 2
disabled_plugins = ["io.containerd.internal.v1.opt"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  disable_cgroup = true
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
"""
PODMAN = {
    "containers.conf": f"""
[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin"]
network_config_dir = "/etc/cni/net.d"
default_network = "{NETWORK}"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[containers]
pids_limit = 0
apparmor_profile = "unconfined"
""",
    "storage.conf": '[storage]\ndriver = "vfs"\ngraphroot = "/var/lib/containers/storage"\nrunroot = "/run/containers/storage"\n',
    "policy.json": '{"default": [{"type": "insecureAcceptAnything"}]}',
}


# ---------------------------------------------------------------------------------------------------------------------
# Nodes and pods
# ---------------------------------------------------------------------------------------------------------------------


class Node:
    """A node of the lab that is ready for a runtime. LabError if it cannot have a cgroup."""

    def __init__(self, lab, name):
        self.lab, self.name, self.cgroup = lab, name, f"{lab.name}-{name}"
        self.make_cgroup()

    def make_cgroup(self):
        labs.must([*labs.node_argv(self.lab, self.name), "sh", "-ec", MAKE_CGROUP, self.cgroup])

    def reboot(self):
        """Pull the plug and boot again. Whatever ran is gone, the disk stays."""
        labs.reboot(self.lab, self.name)
        self.make_cgroup()

    def path(self, path):
        """A path of the node as this process reaches it."""
        return self.lab.inside(self.name, path)

    def argv(self, netns=""):
        """The beginning of a command line that runs the rest of it in the node, in its cgroup, and in a network namespace of it."""
        enter = [*labs.node_argv(self.lab, self.name)[:-1], f"--cgroup={self.path('/run/cgroup.ns')}", "--"]
        join = self.path(f"/run/cgroup/{self.cgroup}/init/cgroup.procs")
        return ["sh", "-c", 'echo 0 >"$0" && exec "$@"', str(join), *enter, *(["nsenter", f"--net={netns}"] if netns else [])]

    def start(self, argv, log):
        """A process that goes on, its output in a log, out of reach of the terminal's Ctrl-C. Its Popen."""
        with open(self.path(log), "w") as file:
            output = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            return labs.start([*self.argv(), *argv], env=ENVIRON, start_new_session=True, **output)

    def run(self, argv, netns=""):
        """What a command prints; it has to succeed."""
        exit_code, stdout, stderr = labs.run([*self.argv(netns), *argv], env=ENVIRON)
        if exit_code:
            raise labs.LabError(f"{self.name}: exit status {exit_code}: {' '.join(argv)}\n{stdout}{stderr}")
        return stdout

    def look(self):
        """The node as text, to be compared with itself."""
        return self.run(["sh", "-c", LOOK])

    def changes_since(self, before, leaving_out="\0", timeout_s=10):
        """The lines of look() that have come ("+") and gone ("-"); waits for them to be none: a carrier goes a little after its link."""

        def changes():
            lines = difflib.ndiff(before.splitlines(), self.look().splitlines())
            return [line for line in lines if line[0] in "+-" and leaving_out not in line]

        with contextlib.suppress(labs.LabError):
            labs.wait_until(lambda: not changes(), timeout_s, "return to what was before")
        return changes()

    def attachments(self):
        """What the runtimes on this node keep of their ADDs for eth0: [{"containerId", "networkName", "capabilityArgs", "result"}]."""
        return [json.loads(path.read_text()) for path in self.path("/var/lib/cni/results").glob("*-eth0")]


def remove_cgroups(lab_name, mount_point):
    """Remove what MAKE_CGROUP made, when the nodes are down."""
    for node in ("node1", "node2"):
        labs.must(["unshare", "--mount", "sh", "-ec", REMOVE_CGROUP, str(mount_point), f"{lab_name}-{node}"])


class Pod:
    """A pod that runs. netns: the path of its network namespace in its node."""

    def __init__(self, runtime, name, container_id, netns):
        self.runtime, self.node, self.name, self.container_id, self.netns = runtime, runtime.node, name, container_id, netns

    def run(self, *words):
        """What a command prints in the pod's container; it has to succeed."""
        return self.runtime.run(self, words)

    def links(self):
        """{name: link with its addresses}, as the kernel has them in the pod."""
        return {link["ifname"]: link for link in json.loads(self.node.run(["ip", "-json", "address"], self.netns))}

    def addresses(self):
        """Those of eth0 that others reach, IPv4 first."""
        return sorted((info["local"] for info in self.links()["eth0"]["addr_info"] if info["scope"] == "global"), key=lambda ip: ":" in ip)

    def sent(self):
        """What the runtime had to send for capabilities, from which each plugin gets what it declares as runtimeConfig."""
        (attachment,) = [each for each in self.node.attachments() if each["containerId"] == self.container_id]
        return attachment["capabilityArgs"]

    def get(self, address, port=PORT):
        """What an HTTP server at an address says to this pod's container. By nc: wget of Debian's busybox-static crashes."""
        # nc may end before a busy server has answered, because there is no more to send: then once more, with stdin open for a while.
        asks = [f"(printf 'GET / HTTP/1.0\\r\\n\\r\\n'; {wait}) | nc -w 10 {address} {port}" for wait in ("true", "sleep 3")]
        reply = self.run("sh", "-c", asks[0]) or self.run("sh", "-c", asks[1])
        return reply.replace("\r\n", "\n").partition("\n\n")[2]

    def remove(self):
        self.runtime.remove(self)
        self.runtime.pods.remove(self)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def make_images(path):
    """An archive as `docker save` writes it, with two images of busybox: POD_IMAGE serves HTTP, PAUSE_IMAGE sleeps."""
    busybox = shutil.which("busybox", path=labs.PATH)
    layer = tar_of({"www/index.html": HELLO.encode()}, [busybox, *libraries(busybox)], busybox)
    commands = {POD_IMAGE: ["/bin/httpd", "-f", "-p", str(PORT), "-h", "/www"], PAUSE_IMAGE: ["/bin/sleep", "infinity"]}
    files, manifest = {"layer.tar": layer}, []
    for number, (image, command) in enumerate(commands.items()):
        config = {"architecture": architecture(), "os": "linux", "config": {"Cmd": command, "Env": ["PATH=/bin"]}}
        config["rootfs"] = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]}
        files[f"{number}.json"] = json.dumps(config).encode()
        manifest.append({"Config": f"{number}.json", "RepoTags": [image], "Layers": ["layer.tar"]})
    path.write_bytes(tar_of({**files, "manifest.json": json.dumps(manifest).encode()}))


def tar_of(texts, host_files=(), busybox=""):
    """A tar archive (bytes) of {name: bytes}, of files of this machine at their own places, and of busybox with a link for each applet."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, text in texts.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
        for path in host_files:
            tar.add(Path(path).resolve(), "bin/busybox" if path == busybox else path.lstrip("/"))
        for applet in labs.must([busybox, "--list"]).split() if busybox else ():
            info = tarfile.TarInfo(f"bin/{applet}")
            info.type, info.linkname = tarfile.SYMTYPE, "busybox"
            if applet != "busybox":
                tar.addfile(info)
    return archive.getvalue()


def libraries(program):
    """The shared libraries that a program needs; none if it is static."""
    return re.findall(r"(/\S+) \(0x", labs.run(["ldd", program])[1])


def architecture():
    """This machine as images name it."""
    machine = labs.must(["uname", "-m"]).strip()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


# ---------------------------------------------------------------------------------------------------------------------
# The runtimes
# ---------------------------------------------------------------------------------------------------------------------


class Containerd:
    """The daemon on a node, and our images in it: for Ctr and Cri. LabError if it does not come up, or cannot run a container."""

    LOG, SOCKET = "/var/log/containerd.log", "/run/containerd/containerd.sock"

    def __init__(self, node, images):
        self.node = node
        self.configure()
        self.start()
        shutil.copy(images, node.path(IMAGES))
        for namespace in ("default", "k8s.io"):
            node.run(["ctr", "--namespace", namespace, "images", "import", "--snapshotter", "native", IMAGES])
        node.run(["ctr", "run", *Ctr.OPTIONS, POD_IMAGE, "probe", "/bin/true"])

    def configure(self):
        directory = self.node.path("/etc/containerd")
        directory.mkdir(exist_ok=True)
        (directory / "config.toml").write_text(CONTAINERD)

    def start(self):
        self.process = self.node.start(["containerd"], self.LOG)
        try:
            labs.wait_until(self.is_up, 30, "answer of containerd")
        except labs.LabError as error:
            raise labs.LabError(f"{error}\n{labs.tail(self.node.path(self.LOG))}") from None

    def is_up(self):
        if self.process.poll() is not None:
            raise labs.LabError(f"containerd ended with {self.process.returncode}")
        return labs.run([*self.node.argv(), "ctr", "version"], env=ENVIRON)[0] == 0

    def restart(self):
        """End the daemon and start it again. Its pods go on."""
        pid = self.node.run(["pidof", "containerd"]).strip()
        self.node.run(["sh", "-c", f"kill {pid}"])
        self.process.wait(30)
        self.start()


class Ctr:
    """containerd by `ctr run --cni`. It runs in the foreground until its container ends, then it calls DEL."""

    OPTIONS = ("--rm", "--cpu-shares", "0", "--snapshotter", "native")

    def __init__(self, node):
        self.node, self.pods, self.running = node, [], {}

    def start(self, name):
        log = f"/var/log/ctr-{name}.log"
        self.running[name] = self.node.start(["ctr", "run", "--cni", *self.OPTIONS, POD_IMAGE, name], log)
        try:
            pid = labs.wait_until(lambda: self.look_pid(name), 30, f"task {name}")
        except labs.LabError as error:
            raise labs.LabError(f"{error}\n{labs.tail(self.node.path(log))}") from None
        self.pods.append(Pod(self, name, f"default-{name}", f"/proc/{pid}/ns/net"))
        return self.pods[-1]

    def look_pid(self, name):
        """The process of a task that has started, which it does after ADD. "" if it has not."""
        if self.running[name].poll() is not None:
            raise labs.LabError(f"ctr run {name} ended with {self.running[name].returncode}")
        rows = [line.split() for line in self.node.run(["ctr", "task", "list"]).splitlines()]
        return "".join(row[1] for row in rows if row[0] == name and row[2] == "RUNNING")

    def run(self, pod, words):
        return self.node.run(["ctr", "task", "exec", "--exec-id", "test", pod.name, *words])

    def remove(self, pod):
        self.node.run(["ctr", "task", "kill", "--signal", "KILL", pod.name])
        self.running.pop(pod.name).wait(30)
        said = self.node.path(f"/var/log/ctr-{pod.name}.log").read_text()
        if "error" in said:
            raise labs.LabError(f"ctr: {said}")


class Cri:
    """containerd by CRI. A pod is a sandbox with one container."""

    def __init__(self, node, directory):
        labs.must(["protoc", f"--proto_path={HERE}", f"--python_out={directory}", "cri.proto"])
        self.node, self.pods, self.directory, self.containers, self.configs = node, [], directory, {}, {}
        self.connect()

    def connect(self):
        argv = [labs.PYTHON, str(HERE / "cri.py"), str(self.directory), str(self.node.path(Containerd.SOCKET))]
        self.client = labs.start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def reconnect(self):
        self.close()
        self.connect()

    def close(self):
        self.client.stdin.close()
        self.client.wait(30)
        self.client.stdout.close()

    def calls(self, calls):
        """The replies of calls made side by side, [(method, request)], {"error": text} for one that fails."""
        print(json.dumps(calls), file=self.client.stdin, flush=True)
        return json.loads(self.client.stdout.readline())

    def call(self, method, **request):
        """The reply of one call. LabError if it fails."""
        (reply,) = self.calls([(method, request)])
        if "error" in reply:
            raise labs.LabError(f"{method}: {reply['error']}")
        return reply

    def start(self, name, **config):
        """A pod; config: the keys "annotations" and "port_mappings" of PodSandboxConfig."""
        return self.start_all([name], **config)[0]

    def start_all(self, names, **config):
        """Pods that come side by side. LabError with the first error; those that came stay until clean-up."""
        configs = [self.config(name, **config) for name in names]
        replies = self.calls([("RunPodSandbox", {"config": config}) for config in configs])
        pods = []
        for name, config, reply in zip(names, configs, replies):
            if "error" not in reply:
                self.configs[name] = config
                info = json.loads(self.status(reply["pod_sandbox_id"])["info"]["info"])
                (netns,) = [each["path"] for each in info["runtimeSpec"]["linux"]["namespaces"] if each["type"] == "network"]
                pods.append(Pod(self, name, reply["pod_sandbox_id"], netns))
        self.pods += pods
        for reply in replies:
            if "error" in reply:
                raise labs.LabError(f"RunPodSandbox: {reply['error']}")
        for pod in pods:
            self.start_container(pod)
        return pods

    def config(self, name, **more):
        """A PodSandboxConfig as kubelet fills it in."""
        metadata = {"name": name, "uid": f"uid-of-{name}", "namespace": "default"}
        dns = {"servers": ["10.96.0.10"], "searches": ["default.svc.cluster.local", "svc.cluster.local"]}
        return {"metadata": metadata, "hostname": name, "log_directory": f"/var/log/pods/{name}", "dns_config": dns, **more}

    def start_container(self, pod):
        container = {"metadata": {"name": "server"}, "image": {"image": POD_IMAGE}}
        created = self.call(
            "CreateContainer", pod_sandbox_id=pod.container_id, config=container, sandbox_config=self.configs[pod.name]
        )
        self.containers[pod.name] = created["container_id"]
        self.call("StartContainer", container_id=created["container_id"])

    def wait_for_network(self, name, *plugins):
        """Wait until the active network is the one of that name, and has these plugins of ours: containerd reads them anew by itself."""

        def is_active():
            network = json.loads(self.call("Status", verbose=True)["info"]["cniconfig"])["Networks"][-1]["Config"]
            entries = [json.loads(plugin["Source"]).get("plugin") for plugin in network["Plugins"]]
            return network["Name"] == name and set(plugins) <= {entry for entry in entries if isinstance(entry, str)}

        labs.wait_until(is_active, 20, f"network {name} in containerd")

    def status(self, sandbox_id):
        return self.call("PodSandboxStatus", pod_sandbox_id=sandbox_id, verbose=True)

    def run(self, pod, words):
        reply = self.call("ExecSync", container_id=self.containers[pod.name], cmd=list(words), timeout=30)
        said = {key: base64.b64decode(reply.get(key, "")).decode() for key in ("stdout", "stderr")}
        if reply.get("exit_code"):
            raise labs.LabError(f"{pod.name}: exit status {reply['exit_code']}: {' '.join(words)}\n{said['stdout']}{said['stderr']}")
        return said["stdout"]

    def remove(self, pod):
        """As kubelet removes a pod: stop it, and stop it again, then remove it."""
        for method in ("StopPodSandbox", "StopPodSandbox", "RemovePodSandbox"):
            self.call(method, pod_sandbox_id=pod.container_id)


class Podman:
    """podman with its CNI backend."""

    def __init__(self, node, images):
        self.node, self.pods = node, []
        directory = node.path("/etc/containers")
        directory.mkdir()
        for name, text in PODMAN.items():
            (directory / name).write_text(text)
        shutil.copy(images, node.path(IMAGES))
        node.run(["podman", "load", "--quiet", "--input", IMAGES])
        node.run(["podman", "run", "--rm", "--network", "none", POD_IMAGE, "/bin/true"])

    def start(self, name, *options):
        try:
            self.node.run(["podman", "run", "--detach", "--stop-timeout", "0", "--name", name, *options, POD_IMAGE])
        except labs.LabError:
            self.node.run(["podman", "rm", "--force", "--ignore", name])  # a container whose ADD failed stays
            raise
        self.pods.append(Pod(self, name, self.inspect(name)["Id"], ""))
        self.refresh(self.pods[-1])
        return self.pods[-1]

    def refresh(self, pod):
        """Take note of the namespace: a container that starts again has a new one."""
        pod.netns = self.inspect(pod.name)["NetworkSettings"]["SandboxKey"]

    def inspect(self, name):
        return json.loads(self.node.run(["podman", "inspect", "--type", "container", name]))[0]

    def run(self, pod, words):
        return self.node.run(["podman", "exec", pod.name, *words])

    def remove(self, pod):
        self.node.run(["podman", "rm", "--force", pod.name])
