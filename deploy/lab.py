#!/usr/bin/python3
"""The local lab: a cluster network of several nodes on one machine, without Kubernetes, containers or virtual machines.

The underlay is the network between the nodes; the pods have a network of their own, which MNCNI carries over the underlay encrypted.

              network namespace NAME-underlay (the lab never touches the machine's own network)
      +--------------------------- bridge underlay0 ---------------------------+
      |  port node1                    sniffer                    port node2   |
      +------|-----------------------------------------------------------|-----+
        eth0 192.0.2.1/24                                          eth0 192.0.2.2/24
      +--- node1 ------------------------+        +--- node2 ------------------------+
      | netns mncni-wg: mncni-wg0        |        | netns mncni-wg: mncni-wg0        |
      | mncni-host    agent.py           |        | mncni-host    agent.py           |
      | bridge mncni0 10.244.1.1/24      |        | bridge mncni0 10.244.2.1/24      |
      |   pod1 10.244.1.2  pod2 ...      |        |   pod1 10.244.2.2  pod2 ...      |
      +----------------------------------+        +----------------------------------+

A node is one "init" process with its own PID, mount, network, UTS and IPC namespaces, its own root file system (the host's /usr,
read-only; /run and /tmp, empty at each boot; /etc, /opt and /var, which survive a reboot) and its own boot ID. When the init
process ends, the kernel ends every process of the node, so neither a reboot nor `down` leaves anything behind. Each node runs the real
agent.py, which finds the other nodes in a shared directory, and the real mncni.py. A small container runtime calls mncni.py with the
configuration that the agent wrote, as containerd would.

    lab.py up          start the nodes, attach the pods          lab.py exec node1/pod1 -- ip address
    lab.py ping        every pod to every other pod, as a table  lab.py reboot node1
    lab.py status      nodes and pods, as tables                 lab.py down
    lab.py runtime add node1/web    a pod more, as kubelet has the container runtime make one; also check and del
    lab.py demo        up, ping and down; a packet capture proves that the underlay carries only WireGuard

Reading order: constants, processes, the lab's state; then what `up` builds, from the bottom to the top: underlay, nodes, agents, pods;
then ping and path, the sniffer, the container runtime (what containerd and its library libcni do on a node; it uses nothing from above
but the functions that start processes), and the command line.
"""
import argparse
import base64
import contextlib
import fcntl
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------------------------------
PYTHON = "/usr/bin/python3"     # not sys.executable: it has to exist in the nodes, which see only /usr of the host
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_NAME = os.environ.get("MNCNI_LAB") or "mncni-lab"
LAB_FILE = Path(__file__).resolve()
PARTS = ("mncni.py", "kube.py", "agent.py")          # copied to /opt/mncni of each node, beside this file
SNOOP = "cnisnoop.py"                                # as well, if --source has it: no node needs it to run
BRIDGE = "underlay0"
UNSHARE = ("unshare", "--fork", "--pid", "--mount", "--net", "--uts", "--ipc", "--propagation", "private", "--")
STORE = "/var/lib/mncni-lab/nodes"                   # where the agents publish their nodes: one directory, mounted into all nodes
AGENT_LOG, AGENT_PID = "/var/log/mncni-agent.log", "/run/mncni-agent.pid"
NODE_BOOT_ID = Path("/run/boot_id")                  # only a node has this file
PODS_DIR = "/var/lib/mncni-lab/pods"                 # the container runtime's records, a file for each pod
# Much longer than each takes: the machine may be busy, or emulated.
BOOT_TIMEOUT_S, AGENT_TIMEOUT_S, POD_TIMEOUT_S, FIRST_PONG_TIMEOUT_S = 60, 60, 60, 20
MAX_NODES, MAX_PODS = 200, 200

# The addresses, where {n} is the number of the node. Pods have addresses of one or both families, the underlay has one family.
POD_FAMILIES = {
    "ipv4": {"cluster_cidr": "10.244.0.0/16", "pod_cidr": "10.244.{n}.0/24"},
    "ipv6": {"cluster_cidr": "fd00:10:244::/48", "pod_cidr": "fd00:10:244:{n}::/64"},
}
KIND = {"families": ["ipv4"], "underlay": "ipv4"}     # the default
UNDERLAYS = {"ipv4": {"endpoint": "192.0.2.{n}", "prefix": 24}, "ipv6": {"endpoint": "2001:db8::{n}", "prefix": 64}}
TOOLS = {                                            # tool -> Debian package
    "ip": "iproute2", "tc": "iproute2", "nft": "nftables", "wg": "wireguard-tools", "nsenter": "util-linux",
    "unshare": "util-linux", "mount": "mount", "umount": "mount", "ping": "iputils-ping",
    "pivot_root": "util-linux-extra",                # older systems have it in util-linux
}
# The parts of the host's /etc that programs in a node need. They are copied, so that a node can change them.
ETC_COPIED = ("passwd", "group", "nsswitch.conf", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "iproute2", "alternatives",
              "localtime", "protocols", "services", "modprobe.d")


class LabError(Exception):
    """An error message for the user."""


class NotStarted(LabError):
    """A program that could not be started, so it has done nothing."""


# ---------------------------------------------------------------------------------------------------------------------------
# Processes and waiting
# ---------------------------------------------------------------------------------------------------------------------------
def start(argv, **popen):
    """Start a process; nothing else in this file does. Returns the Popen. NotStarted, with the package of a missing tool."""
    popen.setdefault("env", dict(os.environ, PATH=PATH, LC_ALL="C.UTF-8"))
    try:
        return subprocess.Popen(argv, text=True, errors="replace", **popen)
    except OSError as error:
        what = f"{argv[0]} cannot be started: {error.strerror}"
        if isinstance(error, FileNotFoundError):
            what = f"{argv[0]}: its interpreter is not there" if os.path.exists(argv[0]) else f"{argv[0]}: not found"
        package = f"; it is in the package {TOOLS[argv[0]]}" if argv[0] in TOOLS else ""
        raise NotStarted(what + package + f"; chmod +x {argv[0]}" * isinstance(error, PermissionError)) from None


def run(argv, stdin="", env=None, timeout_s=60):
    """Run a command to its end. Returns (exit status, stdout, stderr), whatever the exit status. LabError after timeout_s."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    child = start(argv, **pipes, **({"env": env} if env else {}))
    try:
        stdout, stderr = child.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise LabError(f"did not end within {timeout_s} s: {' '.join(argv)}") from None
    finally:
        child.kill()                                 # does nothing if it has ended
        child.wait()
    return child.returncode, stdout, stderr


def must(argv, stdin="", timeout_s=60):
    """Run a command that has to succeed. Returns its stdout. LabError with its output if it fails."""
    code, stdout, stderr = run(argv, stdin, timeout_s=timeout_s)
    if code:
        raise LabError(f"exit status {code}: {' '.join(map(str, argv))}\n{(stderr or stdout).strip()}")
    return stdout


def look(argv):
    """The JSON that a read-only command prints; [] if it prints nothing."""
    return json.loads(must(argv) or "[]")


def wait_until(probe, timeout_s, what):
    """Call probe() until it returns something true, and return that. LabError `no <what> after ...` if that takes too long."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > deadline:
            raise LabError(f"no {what} after {timeout_s} s")
        time.sleep(0.05)


def parallel(function, items, workers=8):
    """[function(item) for item in items], several at a time, in order. After an exception no more are started, and it is raised."""
    pool = ThreadPoolExecutor(workers)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def signals_ignored():
    """Ignore signals during the with block, so that nothing interrupts a clean-up. Processes started in it ignore them, too."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------------
# The lab's state: /run/NAME/lab.json and one directory per node
# ---------------------------------------------------------------------------------------------------------------------------
class Lab:
    """Names, paths and state of one lab. The state is kept in files only, so that several processes can work on one lab. lab.json:

    {"name", "families": ["ipv4"], "underlay": "ipv4", "source": path, "nodes": {"node1": {"number": 1, "pods": those of its first boot,
     "boot_id": uuid, "pid": PID of its init on the host, "start": start time of that process in clock ticks}}}. pid is 0 while the node
    is down. Which pods a node has is in the records that its container runtime keeps, see sandbox_add.
    Tests may add "kubeconfig": "path/{node}", for agents that follow an API server on the underlay instead of the directory.
    """

    home = Path("/run")

    def __init__(self, name="mncni-lab", verbose=True):
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", name):
            raise LabError(f"--name {name!r}: use 1 to 31 of a-z, 0-9 and -")
        self.name, self.verbose, self.started = name, verbose, time.monotonic()
        self.dir = self.home / name
        self.file = self.dir / "lab.json"
        self.store = self.dir / "nodes"
        self.underlay = f"{name}-underlay"
        self.children = {}                           # node -> Popen of its `unshare`, if this process started it

    def say(self, text):
        """Print a line of progress to stderr, with the time since this command began."""
        if self.verbose:
            print(f"[{time.monotonic() - self.started:5.1f}s] {text}", file=sys.stderr, flush=True)

    def state(self):
        """The content of lab.json now. LabError if the lab is not up."""
        try:
            return json.loads(self.file.read_text())
        except FileNotFoundError:
            raise LabError(f"the lab {self.name} is not up; start it with: lab.py --name {self.name} up") from None

    def nodes(self):
        """{node: its state}."""
        return self.state()["nodes"]

    def node(self, node):
        """The state of one node. LabError if there is no such node."""
        nodes = self.nodes()
        if node not in nodes:
            raise LabError(f"no node {node!r}; the nodes are: {' '.join(nodes)}")
        return nodes[node]

    @contextlib.contextmanager
    def changing(self, node):
        """The state of one node, which the with block may change; it is written at the end. Other processes wait meanwhile."""
        lock = os.open(self.dir, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = self.state()
            yield state["nodes"][node]
            write_atomically(self.file, json.dumps(state, indent=1))
        finally:
            os.close(lock)

    def inside(self, node, path):
        """The path on the host of a path in a running node, also below /proc and /run."""
        return Path(f"/proc/{self.node(node)['pid']}/root") / path.lstrip("/")

    def init_argv(self, node, boot_id):
        """The command line that starts the init process of a node, as a child of this process, in new namespaces."""
        return [*UNSHARE, PYTHON, str(LAB_FILE), "node-init", str(self.dir), node, boot_id]

    def pods(self):
        """All pods as [(node, pod)], those that `runtime add` made among them."""
        return [(node, pod) for node in self.nodes() for pod in pods_of(self, node)]


def write_atomically(path, text):
    """Write a temporary file and rename it: a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def process_start(pid):
    """Start time of a process in clock ticks since boot; None if it has ended. A PID is reused, a pair (PID, start time) is not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_running(row):
    """Whether the init process of this node is alive."""
    return bool(row["pid"]) and process_start(row["pid"]) == row["start"]


def create_lab(lab, nodes, pods, source, kind):
    """Write the first lab.json into the new state directory."""
    state = {"name": lab.name, **kind, "source": str(source.resolve()), "nodes": {}}
    for number in range(1, nodes + 1):
        state["nodes"][f"node{number}"] = {
            "number": number, "pods": [f"pod{pod}" for pod in range(1, pods + 1)], "boot_id": "", "pid": 0, "start": 0}
    write_atomically(lab.file, json.dumps(state, indent=1))
    lab.store.mkdir(mode=0o700)


def pod_cidrs(lab, node):
    """[{"cluster_cidr", "pod_cidr"}] of one node, an entry for each family."""
    number = lab.node(node)["number"]
    rows = [POD_FAMILIES[family] for family in lab.state()["families"]]
    return [{key: value.format(n=number) for key, value in row.items()} for row in rows]


def endpoints(lab, node):
    """[(address, prefix length)] of one node on the underlay, an entry for each family of the underlay."""
    rows = [UNDERLAYS[family] for family in lab.state()["underlay"].split(",")]
    return [(row["endpoint"].format(n=lab.node(node)["number"]), row["prefix"]) for row in rows]


def endpoint(lab, node):
    """The first of them."""
    return endpoints(lab, node)[0]


# ---------------------------------------------------------------------------------------------------------------------------
# The underlay
# ---------------------------------------------------------------------------------------------------------------------------
def make_underlay(lab):
    """Make the network namespace with the bridge that the nodes are connected to."""
    must(["ip", "netns", "add", lab.underlay])
    must(["ip", "-n", lab.underlay, "-batch", "-"], f"link set lo up\nlink add {BRIDGE} type bridge mcast_snooping 0\n"
                                                    f"link set {BRIDGE} up\n")


def require_wireguard(lab):
    """LabError if neither the kernel nor wireguard-go can do WireGuard. To try, add a device: that also loads the kernel module."""
    code, _, _ = run(["ip", "-n", lab.underlay, "link", "add", "probe", "type", "wireguard"])
    if code == 0:
        must(["ip", "-n", lab.underlay, "link", "del", "probe"])
    elif not shutil.which("wireguard-go", path=PATH):
        raise LabError("this kernel has no WireGuard, and wireguard-go is not installed; install the package wireguard-go")
    lab.say("WireGuard: " + ("wireguard-go, because this kernel has none" if code else "the kernel's"))


def connect_node(lab, node):
    """Give the node its eth0: a veth pair between the underlay bridge and the node."""
    run(["ip", "-n", lab.underlay, "link", "del", node])          # of an earlier boot, if the kernel has not yet removed it
    must(["ip", "-n", lab.underlay, "-batch", "-"],
         f"link add {node} type veth peer name eth0 netns {lab.node(node)['pid']}\n"
         f"link set {node} master {BRIDGE} up\n")
    addresses = "".join(f"addr add {address}/{prefix} dev eth0 nodad\n" for address, prefix in endpoints(lab, node))
    must(node_argv(lab, node) + ["ip", "-batch", "-"], f"{addresses}link set eth0 up\n")


# ---------------------------------------------------------------------------------------------------------------------------
# Nodes, seen from the host
# ---------------------------------------------------------------------------------------------------------------------------
def node_argv(lab, node):
    """The words to put before a command so that it runs in the node. LabError if the node is down."""
    row = lab.node(node)
    if not is_running(row):
        raise LabError(f"{node} is down; start it with: lab.py --name {lab.name} reboot {node}")
    return ["nsenter", "--target", str(row["pid"]), "--mount", "--uts", "--ipc", "--net", "--pid", "--"]


def pod_argv(lab, node, pod):
    """The same for a pod: it also runs in the pod's network namespace. With pod "", the node itself."""
    argv = node_argv(lab, node)
    if pod and not pod_record(lab, node, pod):
        raise LabError(f"no pod {pod!r} on {node}; the pods are: {' '.join(pods_of(lab, node))}")
    return argv + (["ip", "netns", "exec", pod] if pod else [])


def make_node_dir(lab, node):
    """Make the directories of a node that survive its reboots, and copy the programs into them."""
    top = lab.dir / node
    for name in ("root", "etc", "opt/mncni", "opt/cni/bin", "var/lib/mncni-lab/nodes", "var/log", "var/cache", "var/tmp"):
        (top / name).mkdir(parents=True)
    (top / "var/run").symlink_to("/run")
    (top / "var/lock").symlink_to("/run/lock")
    for name in ETC_COPIED:
        path = Path("/etc") / name
        if path.is_dir():
            shutil.copytree(path, top / "etc" / name, symlinks=True)
        elif path.exists():
            shutil.copy(path, top / "etc" / name)    # of a link, such as /etc/localtime, the content
    (top / "etc/hostname").write_text(f"{node}\n")
    (top / "etc/hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {node}\n")
    for path in [*(Path(lab.state()["source"]) / part for part in (*PARTS, SNOOP)), LAB_FILE]:
        if path.name != SNOOP or path.is_file():
            shutil.copy(path, top / "opt/mncni" / path.name)
    if "kubeconfig" in lab.state():
        shutil.copy(lab.state()["kubeconfig"].format(node=node), top / "opt/mncni/kubeconfig")


def start_node(lab, node):
    """Boot a node: start its init process, write its PID to lab.json, then let it go on. If an interrupt comes between, `down` still
    finds the process, or the process has not done anything."""
    boot_id = str(uuid.uuid4())
    with open(lab.dir / node / "var/log/lab-init.log", "a") as log:
        child = start(lab.init_argv(node, boot_id), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
    lab.children[node] = child
    try:
        pid = int(read_line(child, BOOT_TIMEOUT_S))
        with lab.changing(node) as row:
            row.update(pid=pid, start=process_start(pid), boot_id=boot_id)
        child.stdin.write("go\n")
        child.stdin.flush()
        if read_line(child, BOOT_TIMEOUT_S) != "ready":
            raise LabError("init ended")
    except (LabError, ValueError, OSError) as error:
        raise LabError(f"{node}: cannot boot: {error}\n{tail(lab.dir / node / 'var/log/lab-init.log')}") from None
    finally:
        child.stdin.close()
        child.stdout.close()
    connect_node(lab, node)


def read_line(child, timeout_s):
    """The next line that a child prints; "" if it has ended. LabError after timeout_s."""
    if not select.select([child.stdout], [], [], timeout_s)[0]:
        raise LabError(f"no answer after {timeout_s} s")
    return child.stdout.readline().strip()


def tail(path, lines=15):
    """The last lines of a log, indented."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or f"    ({path.name} is empty)"


def kill_node(lab, node):
    """End the init process, and with it every process of the node. Returns when all have ended. A PID that was reused is left alone."""
    row = lab.node(node)
    if is_running(row):
        with contextlib.suppress(ProcessLookupError):
            os.kill(row["pid"], signal.SIGKILL)
        wait_until(lambda: not is_running(row), 10, f"end of {node}, init {row['pid']}")
    if node in lab.children:
        lab.children.pop(node).wait(10)
    with lab.changing(node) as row:
        row.update(pid=0, start=0)


def reboot(lab, node):
    """Switch a node off without warning and boot it again. Its disk stays, /run is empty; the pods come back with new container IDs,
    as kubelet would start them."""
    kill_node(lab, node)
    lab.say(f"{node}: down")
    start_node(lab, node)
    start_agent(lab, node)
    lab.say(f"{node}: booted, boot ID {lab.node(node)['boot_id']}")
    wait_agent(lab, node)
    for pod in pods_of(lab, node):
        add_pod(lab, node, pod, pod_record(lab, node, pod).get("capabilities"))


# ---------------------------------------------------------------------------------------------------------------------------
# Nodes, seen from inside: the init process
# ---------------------------------------------------------------------------------------------------------------------------
def plan_node_root(node_dir, store, root):
    """The commands that build a node's root file system below `root`. On the host it only looks whether /bin etc. are links."""
    def mount(target, *words):
        return ["mount", *words, f"{root}{target}"]

    mkdir = "X-mount.mkdir"
    plan = [
        mount("", "-t", "tmpfs", "-o", "mode=0755", "tmpfs"),
        mount("/usr", "-o", f"rbind,ro,{mkdir}", "/usr"),
        mount("/dev", "-o", f"rbind,{mkdir}", "/dev"),
        mount("/proc", "-t", "proc", "-o", mkdir, "proc"),
        mount("/sys", "-t", "sysfs", "-o", mkdir, "sysfs"),       # shows the devices of this network namespace
        mount("/run", "-t", "tmpfs", "-o", f"mode=0755,{mkdir}", "tmpfs"),
        mount("/tmp", "-t", "tmpfs", "-o", f"mode=1777,{mkdir}", "tmpfs"),
    ]
    for name in ("etc", "opt", "var"):
        plan.append(mount(f"/{name}", "-o", f"bind,{mkdir}", f"{node_dir}/{name}"))
        plan.append(mount(f"/{name}", "-o", "remount,bind,exec,suid,dev"))   # the host's /run is often noexec
    plan.append(mount(STORE, "-o", "bind", str(store)))
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        host = Path("/") / name
        if host.is_symlink():
            plan.append(["ln", "-s", os.readlink(host), f"{root}/{name}"])
        elif host.is_dir():
            plan.append(mount(f"/{name}", "-o", f"bind,ro,{mkdir}", str(host)))
    plan.append(["mkdir", "-m", "0700", f"{root}/root", f"{root}/old"])
    return plan


def plan_node_pivot(root):
    """The commands that make `root` the root file system and unmount the old one, so that the node sees nothing else of the host."""
    boot_id = "/proc/sys/kernel/random/boot_id"
    return [
        ["pivot_root", root, f"{root}/old"],
        ["umount", "--lazy", "/old"],
        ["rmdir", "/old"],
        ["mount", "--bind", str(NODE_BOOT_ID), boot_id],
        # `ip netns add` does this at its first call, but two first calls at once would disturb each other.
        ["mkdir", "/run/netns", "/run/lock"],
        ["mount", "--bind", "/run/netns", "/run/netns"],
        ["mount", "--make-shared", "/run/netns"],
        ["ip", "link", "set", "lo", "up"],
    ]


def node_init(arguments):
    """The init process of a node: node-init LAB_DIR NODE BOOT_ID. It talks to start_node over stdin and stdout, builds the node,
    and then serves it until it is killed."""
    lab_dir, node, boot_id = arguments
    # This /proc is still the host's, so it shows our PID on the host.
    print(os.readlink("/proc/self"), flush=True)
    if sys.stdin.readline() != "go\n":
        return 1
    socket.sethostname(node)
    root = f"{lab_dir}/{node}/root"
    for argv in plan_node_root(f"{lab_dir}/{node}", f"{lab_dir}/nodes", root):
        must(argv)
    Path(f"{root}{NODE_BOOT_ID}").write_text(f"{boot_id}\n")
    os.chdir(root)
    for argv in plan_node_pivot(root):
        must(argv)
    os.chdir("/")
    serve_as_init()


def serve_as_init():
    """What an init process does once its node is built: say so to start_node, then collect the exit statuses of orphaned processes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    print("ready", flush=True)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.sigwait([signal.SIGCHLD])


# ---------------------------------------------------------------------------------------------------------------------------
# Agents
# ---------------------------------------------------------------------------------------------------------------------------
def plan_agent(lab, node):
    """The command line of the node's agent."""
    in_cluster = "kubeconfig" in lab.state()
    store = ["--kubeconfig", "/opt/mncni/kubeconfig"] if in_cluster else ["--nodes-dir", STORE]
    argv = [PYTHON, "/opt/mncni/agent.py", "run", *store, "--endpoint", endpoint(lab, node)[0]]
    for row in pod_cidrs(lab, node):
        argv += ["--cluster-cidr", row["cluster_cidr"], *([] if in_cluster else ["--pod-cidr", row["pod_cidr"]])]
    return argv


def start_agent(lab, node):
    """Start the agent, as a child of the node's init process and not of this one."""
    must(node_argv(lab, node) + [PYTHON, "/opt/mncni/lab.py", "node-agent", "start", *plan_agent(lab, node)])


def stop_agent(lab, node, timeout_s=20):
    """Send SIGTERM to the agent and wait until it has ended. LabError after timeout_s."""
    pid = agent_pid(lab.inside(node, "/"))
    if pid:
        run(node_argv(lab, node) + ["sh", "-c", f"kill {pid}"])
        wait_until(lambda: not agent_pid(lab.inside(node, "/")), timeout_s, "end of the agent")


def node_agent(arguments):
    """In the node: node-agent start ARGV... Start the agent as an init system does, without the caller's environment."""
    with open(AGENT_LOG, "a") as log:
        env = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8"}
        child = start(arguments[1:], env=env, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    write_atomically(Path(AGENT_PID), str(child.pid))
    os._exit(0)                                      # the agent stays; the node's init becomes its parent


def agent_pid(root):
    """The agent's PID in the node, 0 if it does not run. `root` is / in the node, and lab.inside(node, "/") on the host."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((root / AGENT_PID[1:]).read_text())
        command = (root / f"proc/{pid}/cmdline").read_bytes()
        state = (root / f"proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
        if b"agent.py" in command or (not command and state not in "ZX"):     # a process that just started has no command line yet
            return pid
    return 0


def wait_agent(lab, node, timeout_s=AGENT_TIMEOUT_S):
    """Wait until the agent has written its ready file (which a reboot removes) and then the conflist. LabError with the end of its log."""
    def ready():
        conf = list((lab.dir / node / "etc/cni/net.d").glob("*.conflist"))
        if not agent_pid(lab.inside(node, "/")):
            raise LabError("the agent died")
        return conf and lab.inside(node, "/run/mncni/ready").exists()

    try:
        wait_until(ready, timeout_s, "conflist and ready file of the agent")
    except LabError as error:
        raise LabError(f"{node}: {error}; the end of {AGENT_LOG}:\n{tail(lab.dir / node / AGENT_LOG[1:])}") from None
    lab.say(f"{node}: agent ready")


# ---------------------------------------------------------------------------------------------------------------------------
# Pods; up and down
# ---------------------------------------------------------------------------------------------------------------------------
def runtime(lab, node, *words):
    """Call the container runtime of the node, see command_runtime. Returns its stdout. LabError with the plugin's error."""
    try:
        return must(runtime_argv(lab, node, *words), timeout_s=POD_TIMEOUT_S + 30)
    except LabError as error:
        said = str(error).partition("\n")[2] or str(error)
        raise LabError(f"{node}/{words[1]}: {said.replace('lab.py: ', '', 1)}") from None


def runtime_argv(lab, node, *words):
    """The command line of the container runtime of a node."""
    return node_argv(lab, node) + [PYTHON, "/opt/mncni/lab.py", "runtime", *words]


def add_pod(lab, node, pod, capabilities=None):
    """Create a pod and attach it to its networks. Returns the CNI result. capabilities: what the runtime may ask of plugins for this pod,
    such as {"portMappings": [...]}; a plugin gets what its configuration declares."""
    result = json.loads(runtime(lab, node, "add", pod, json.dumps(capabilities or {})))
    lab.say(f"{node}/{pod}: {' '.join(ip['address'] for ip in result.get('ips', [])) or 'attached'}")
    return result


def del_pod(lab, node, pod):
    """Detach and remove a pod."""
    runtime(lab, node, "del", pod)


def pods_of(lab, node):
    """The names of the pods that a node has, those that `runtime add` made among them."""
    names = [path.stem for path in (lab.dir / node / PODS_DIR[1:]).glob("*.json")]
    return sorted(names, key=lambda name: (name.rstrip("0123456789"), len(name), name))     # pod2 before pod10


def pod_record(lab, node, pod):
    """The runtime's record of a pod, see sandbox_add; {} if there is no such pod."""
    path = lab.dir / node / PODS_DIR[1:] / f"{pod}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def check_host(source):
    """LabError if a tool or program that the lab runs is missing, or if a node could not have a root file system of its own."""
    missing = [f"{tool} (package {package})" for tool, package in TOOLS.items() if not shutil.which(tool, path=PATH)]
    if missing:
        raise LabError(f"not installed: {', '.join(missing)}")
    for part in PARTS:
        if not (source / part).is_file():
            raise LabError(f"no {part} in {source}; name the directory that has it with --source")
    own = roots_of(Path("/proc/self/mountinfo").read_text())
    if own != roots_of(must(["nsenter", "--mount=/proc/self/ns/mnt", "cat", "/proc/self/mountinfo"])):
        raise LabError("this is a chroot, in which the kernel lets nobody make a root file system: use a virtual machine, or a container "
                       "with all rights (docker run --privileged, systemd-nspawn --directory=DIR)")


def roots_of(mountinfo):
    """The numbers of the mounts at /. Whoever enters a mount namespace sees its root, and not that of a chroot. proc(5)"""
    return {line.split()[0] for line in mountinfo.splitlines() if line.split()[4] == "/"}


@contextlib.contextmanager
def built_or_undone(lab, nodes, pods, source, kind=KIND):
    """Make the lab's directory and its underlay, then run the with block. If that fails or is interrupted, everything is undone."""
    check_host(source)
    if not 1 <= nodes <= MAX_NODES or not 0 <= pods <= MAX_PODS:
        raise LabError(f"use --nodes 1 to {MAX_NODES} and --pods 0 to {MAX_PODS}, not {nodes} and {pods}")
    try:
        lab.dir.mkdir(mode=0o700)
    except FileExistsError:
        if lab.file.exists():
            raise LabError(f"the lab {lab.name} is up; end it with: lab.py --name {lab.name} down") from None
        raise LabError(f"{lab.dir} exists and is not a lab; use another --name") from None
    try:
        create_lab(lab, nodes, pods, source, kind)
        make_underlay(lab)
        require_wireguard(lab)
        lab.say(f"underlay: bridge {BRIDGE} in netns {lab.underlay}")
        yield
    except BaseException:
        with signals_ignored():
            down(lab)
            shutil.rmtree(lab.dir, ignore_errors=True)           # if it was interrupted before lab.json was written
        raise


def boot_all(lab):
    """Start the nodes and their agents, then attach the pods."""
    for node in lab.nodes():
        make_node_dir(lab, node)
        start_node(lab, node)
        start_agent(lab, node)
        lab.say(f"{node}: booted, agent started")
    for node in lab.nodes():
        wait_agent(lab, node)
    # Several nodes at a time, but the pods of a node in order, so that pod1 gets the first address.
    parallel(lambda node: [add_pod(lab, node, pod) for pod in lab.node(node)["pods"]], lab.nodes(), workers=4)


def down(lab):
    """End the lab and remove all of it. May be called at any time, also twice. It reports what goes wrong and goes on."""
    if not lab.file.exists():
        return                                       # what else may be in that directory is not of a lab
    lab.say("taking the lab down")
    running = [node for node, row in lab.nodes().items() if is_running(row)]
    parallel(lambda pair: reported(lab, runtime, pair[0], "del", pair[1]),
             [(node, pod) for node, pod in lab.pods() if node in running and pod_record(lab, node, pod)], workers=4)
    parallel(lambda node: reported(lab, stop_agent, node), running)
    for node in lab.nodes():
        kill_node(lab, node)
    if Path("/run/netns", lab.underlay).exists():
        must(["ip", "netns", "del", lab.underlay])
    shutil.rmtree(lab.dir)
    lab.say("down")


def reported(lab, function, *arguments):
    """A step of `down`: print an error, and go on."""
    try:
        function(lab, *arguments)
    except LabError as error:
        lab.say(f"problem: {error}")


# ---------------------------------------------------------------------------------------------------------------------------
# Ping and path
# ---------------------------------------------------------------------------------------------------------------------------
def plan_pairs(lab):
    """[{"node", "pod", "to_node", "to_pod", "address"}]: who pings whom, for each address of the target. Every pod and every node pings
    every pod; "pod" is "" if the node pings. The pods of a node that is down are pinged too, so that the loss shows."""
    targets = [(node, pod, address) for node, pod in lab.pods() for address in pod_record(lab, node, pod).get("addresses", [])]
    up = [node for node, row in lab.nodes().items() if is_running(row)]
    sources = [(node, pod) for node, pod in lab.pods() if node in up] + [(node, "") for node in up]
    return [{"node": node, "pod": pod, "to_node": to_node, "to_pod": to_pod, "address": address}
            for node, pod in sources for to_node, to_pod, address in targets if (node, pod) != (to_node, to_pod)]


def parse_ping(text):
    """{"sent", "received", "rtt_ms": average or None} from the output of iputils' ping, which has no JSON."""
    counts = re.search(r"(\d+) packets transmitted, (\d+) received", text)
    rtt = re.search(r"^rtt \S+ = [\d.]+/([\d.]+)/", text, re.MULTILINE)
    return {"sent": int(counts[1]) if counts else 0, "received": int(counts[2]) if counts else 0,
            "rtt_ms": float(rtt[1]) if rtt else None}


def ping_pair(lab, pair):
    """Ping three times. Returns the pair with the keys of parse_ping and "path" added."""
    _, stdout, _ = run(pod_argv(lab, pair["node"], pair["pod"]) + ["ping", "-n", "-c3", "-i0.2", "-W2", pair["address"]])
    return {**pair, **parse_ping(stdout), "path": look_path(lab, pair)}


def wait_first_pongs(lab, pairs):
    """Wait until each pair has got an answer, so that the pings that count meet a network that is up. Returns and prints when that
    was, in seconds after the start of this command, sorted."""
    answered = []

    def pong(pair):
        code, _, _ = run(pod_argv(lab, pair["node"], pair["pod"]) + ["ping", "-n", "-c1", "-W1", pair["address"]])
        if code == 0:
            answered.append(time.monotonic() - lab.started)
        return code == 0

    with contextlib.suppress(LabError):              # the table will show a pair that never answers
        parallel(lambda pair: wait_until(lambda: pong(pair), FIRST_PONG_TIMEOUT_S, "pong"), pairs, workers=16)
    answered.sort()
    when = f", the first after {answered[0]:.1f} s, the last after {answered[-1]:.1f} s" if answered else ""
    lab.say(f"{len(answered)} of {len(pairs)} pairs have answered{when}")
    return answered


def ping_all(lab):
    """Ping all pairs. Returns the rows of ping_pair."""
    pairs = plan_pairs(lab)
    wait_first_pongs(lab, pairs)
    return parallel(lambda pair: ping_pair(lab, pair), pairs, workers=8)


def is_lost(row):
    """Whether a row of ping_all has a lost ping, or none was sent."""
    return not row["sent"] or row["received"] < row["sent"]


def look_path(lab, pair):
    """The devices that a packet of this pair passes, as one line. It comes from the routes and links of both nodes."""
    own = [own for own in pod_record(lab, pair["node"], pair["pod"]).get("addresses", []) if (":" in own) == (":" in pair["address"])]
    try:
        first = look_hops(lab, pair["node"], own[0]) if own else []
        there = look_hops(lab, pair["node"], pair["address"])
        if pair["node"] == pair["to_node"]:
            return f"bridge {there[-1]['dev']}"
        last = look_hops(lab, pair["to_node"], pair["address"])
    except LabError as error:
        return f"no route ({str(error).splitlines()[-1]})"
    wire = "underlay (WireGuard)" if there[-1]["wireguard"] else "underlay (NOT ENCRYPTED)"
    return " > ".join([hop["dev"] for hop in first + there] + [wire] + [f"{pair['to_node']} {hop['dev']}" for hop in last])


def look_hops(lab, node, address):
    """[{"dev", "wireguard"}]: the devices on the way from the node to an address. A veth pair leads on into another named namespace."""
    hops, namespace = [], []
    while len(hops) < 5:
        ip = node_argv(lab, node) + ["ip", *namespace, "-json"]
        device = look([*ip, "route", "get", address])[0]["dev"]
        link = look([*ip, "-details", "link", "show", "dev", device])[0]
        kind = link.get("linkinfo", {}).get("info_kind")
        user_space = lab.inside(node, f"/run/wireguard/{device}.sock").exists()      # of wireguard-go; its device is a tun
        hops.append({"dev": device, "wireguard": kind == "wireguard" or user_space})
        names = {row["nsid"]: row["name"] for row in look([*ip, "netns", "list-id"]) if "name" in row}
        if kind != "veth" or link.get("link_netnsid") not in names:
            break
        namespace = ["-n", names[link["link_netnsid"]]]
    return hops


# ---------------------------------------------------------------------------------------------------------------------------
# The sniffer
# ---------------------------------------------------------------------------------------------------------------------------
IP_VERSIONS = {b"\x08\x00": 4, b"\x86\xdd": 6}      # ethertype -> version
WIREGUARD_PORT = 28384
# Type: size in bytes, of a handshake initiation, a response and a cookie. Type 4 is data: 32 bytes and a multiple of 16, because WireGuard
# pads it. It does not pad beyond the MTU, so a packet of nearly that size may have any length; IPv4's smallest MTU, 576, makes 608 bytes.
WIREGUARD_SIZES = {1: 148, 2: 92, 3: 64}
SMALLEST_FULL = 608
ND_TYPES = (*range(130, 138), 143)                   # ICMPv6: multicast listener and neighbour discovery
ICMP_ERRORS = {1: (3, 5, 11, 12), 58: (1, 2, 3, 4)}  # protocol -> types of errors, which quote the packet that caused them


def parse_ip(packet):
    """{"src", "dst", "protocol", "payload", "later"} of an IPv4 or IPv6 packet; later: it is a fragment, but not the first one.
    IndexError or ValueError if the packet is too short."""
    if packet[0] >> 4 == 4:
        return {"src": socket.inet_ntop(socket.AF_INET, packet[12:16]), "dst": socket.inet_ntop(socket.AF_INET, packet[16:20]),
                "protocol": packet[9], "payload": packet[4 * (packet[0] & 15):], "later": bool((packet[6] & 31) << 8 | packet[7])}
    protocol, offset, later = packet[6], 40, False
    while protocol in (0, 43, 44, 60):               # hop by hop, routing, fragment, destination options
        if protocol == 44:
            later = bool((packet[offset + 2] << 8 | packet[offset + 3]) >> 3)
        length = 8 if protocol == 44 else 8 * (packet[offset + 1] + 1)
        protocol, offset = packet[offset], offset + length
    return {"src": socket.inet_ntop(socket.AF_INET6, packet[8:24]), "dst": socket.inet_ntop(socket.AF_INET6, packet[24:40]),
            "protocol": protocol, "payload": packet[offset:], "later": later}


def parse_frame(frame):
    """parse_ip of the packet in an Ethernet frame. IndexError or ValueError if it is not of the IP version that the frame says."""
    if frame[14] >> 4 != IP_VERSIONS.get(frame[12:14]):
        raise ValueError
    return parse_ip(frame[14:])


def is_wireguard(udp):
    """Whether a UDP datagram looks like a WireGuard message: ports, type, zero bytes and length."""
    ports = udp[0] << 8 | udp[1], udp[2] << 8 | udp[3]
    size, kind = (udp[4] << 8 | udp[5]) - 8, int.from_bytes(udp[8:12], "little")
    plausible = size == WIREGUARD_SIZES.get(kind) or (kind == 4 and size >= 32 and (size % 16 == 0 or size >= SMALLEST_FULL))
    return len(udp) >= 12 and plausible and WIREGUARD_PORT in ports


def classify_ip(ip):
    """As classify, for the result of parse_ip."""
    protocol, payload = ip["protocol"], ip["payload"]
    if ip["later"]:
        return "fragment"                            # has no header to judge; the first fragment has one
    if protocol == 17 and is_wireguard(payload):
        return "wireguard"
    if protocol == 58 and ":" in ip["src"] and payload[0] in ND_TYPES:
        return "nd"
    # A node that is booting answers WireGuard with "port unreachable". What that error quotes is encrypted.
    if payload[0] in ICMP_ERRORS.get(protocol, ()) and classify_ip(parse_ip(payload[8:])) == "wireguard":
        return "icmp-error"
    return "clear"


def classify(frame):
    """The kind of an Ethernet frame: wireguard, arp, nd (IPv6 neighbour discovery), icmp-error (about WireGuard), fragment,
    clear (any other IP packet) or other."""
    ethertype = frame[12:14]
    if ethertype == b"\x08\x06":
        return "arp"
    if ethertype not in IP_VERSIONS:
        return "other"
    try:
        return classify_ip(parse_frame(frame))
    except (IndexError, ValueError):
        return "clear"                               # nothing proves that it is encrypted


def describe(frame):
    """A frame in a few words: `10.244.1.2 > 10.244.2.2 icmp`."""
    names = {1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
    try:
        ip = parse_frame(frame)
        return f"{ip['src']} > {ip['dst']} {names.get(ip['protocol'], ip['protocol'])}"
    except (IndexError, ValueError):
        return f"ethertype 0x{frame[12:14].hex()}, {len(frame)} bytes"


def open_sniffer():
    """A packet socket that sees each frame as it enters the network namespace, before the bridge can drop it."""
    capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))      # 3 = ETH_P_ALL, on every interface
    capture.setsockopt(263, 23, 1)                                                   # SOL_PACKET, PACKET_IGNORE_OUTGOING
    capture.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)                              # SO_RCVBUFFORCE, bytes
    capture.setblocking(False)
    return capture


def sniff(_arguments):
    """In the underlay: print `ready`, count frames until stdin ends, and print the counts as one JSON object."""
    capture, counts, samples, ended = open_sniffer(), Counter(), [], 0
    print("ready", flush=True)
    while True:
        ready = select.select([capture, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            ended = ended or time.monotonic()
            if capture not in ready or time.monotonic() > ended + 2:     # 2 s: there may always be traffic
                break                                # everything that had arrived is counted
        if capture in ready:
            frame, (interface, *_rest) = capture.recvfrom(256)
            if interface in (BRIDGE, "lo"):          # the bridge shows a frame again on its own device
                continue
            kind = classify(frame)
            counts[kind] += 1
            if kind in ("clear", "other") and describe(frame) not in samples[:9]:
                samples.append(describe(frame))
    dropped = int.from_bytes(capture.getsockopt(263, 6, 8)[4:], sys.byteorder)       # PACKET_STATISTICS: packets, drops
    print(json.dumps({**counts, "dropped": dropped, "samples": samples[:9]}), flush=True)


@contextlib.contextmanager
def sniffing(lab):
    """Capture the underlay during the with block. Yields a dict, which is filled at its end: a count for each kind of frame, "dropped"
    (frames that the sniffer was too slow for) and "samples" (descriptions of frames that should not be there)."""
    counts = {}
    child = start(["nsenter", f"--net=/run/netns/{lab.underlay}", "--", PYTHON, str(LAB_FILE), "sniff"],
                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        if read_line(child, BOOT_TIMEOUT_S) != "ready":
            raise LabError("the sniffer did not start")
        yield counts
    finally:
        stdout, _ = child.communicate(timeout=10)    # closes its stdin
    if child.returncode:
        raise LabError(f"the sniffer failed, exit status {child.returncode}")
    counts.update(dict.fromkeys(("wireguard", "arp", "nd", "icmp-error", "fragment", "clear", "other"), 0))
    counts.update(json.loads(stdout))


def judge_capture(counts, pings):
    """The reasons to doubt that the underlay carried only WireGuard; [] if that is proven. pings: rows of ping_all."""
    crossing = sum(2 * row["received"] for row in pings if row["node"] != row["to_node"])
    reasons = [f"{counts[kind]} {kind} packets, such as: {'; '.join(counts['samples'][:3])}" for kind in ("clear", "other") if counts[kind]]
    if counts["dropped"]:
        reasons.append(f"the kernel dropped {counts['dropped']} packets before they were looked at")
    if counts["wireguard"] < crossing:               # then the sniffer missed some, and proves nothing
        reasons.append(f"only {counts['wireguard']} WireGuard packets for {crossing} pings and pongs between nodes")
    return reasons


# ---------------------------------------------------------------------------------------------------------------------------
# The container runtime: what containerd and its library libcni do on a node. It runs in the node, and knows nothing of the lab.
#
# To connect a pod it makes a network namespace and then calls each plugin of the network with ADD, in order. Each plugin gets the result
# of the one before it as "prevResult". The result of the last plugin is stored ("cached"), and given to CHECK and DEL. DEL goes through
# the plugins in reverse. An attachment is one interface of one pod in one network. A capability is something that the runtime may ask for
# one pod, such as host ports; a plugin that declares it gets it as "runtimeConfig".
# ---------------------------------------------------------------------------------------------------------------------------
CNI_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
TRY_AGAIN = (11, 50, 51)                             # error codes of what may pass: "try again later", and STATUS "not ready"
DIRS = {"conf": "/etc/cni/net.d", "bin": "/opt/cni/bin", "cache": "/var/lib/cni/results", "pods": PODS_DIR, "netns": "/run/netns"}
# containerd attaches every pod to this network as well, with the interface lo.
LOOPBACK = {"name": "cni-loopback", "cniVersion": "0.3.1", "plugins": [{"type": "loopback"}]}


class CNIError(LabError):
    """An error object of a plugin: {"code", "msg", "details"}. The code is 999 if the plugin gave none."""

    def __init__(self, act, error):
        self.code = error.get("code", 999)
        super().__init__(f"{act}: code {self.code}: {error.get('msg', '')}" + (f"\n{error['details']}" if error.get("details") else ""))


def parse_network(text, file_name):
    """A configuration (.conflist or .conf) as {"name", "cniVersion": which to use, "plugins", "disableCheck", "text"}. LabError if bad."""
    try:
        conf = json.loads(text)
        plugins = conf.get("plugins", [conf])
        if not [plugin["type"] for plugin in plugins]:
            raise ValueError("it has no plugin")
        return {"name": conf["name"], "cniVersion": plan_version(conf), "plugins": plugins, "text": text,
                "disableCheck": str(conf.get("disableCheck", False)).lower() == "true"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabError(f"{file_name}: not a CNI configuration: {error!r}") from None


def plan_version(conf):
    """The highest version of cniVersion and cniVersions that this runtime supports. ValueError if there is none."""
    offered = {conf.get("cniVersion"), *conf.get("cniVersions", [])}
    spoken = [version for version in CNI_VERSIONS if version in offered]
    if not spoken:
        raise ValueError(f"no version of {sorted(map(str, offered))} is supported, only {', '.join(CNI_VERSIONS)}")
    return spoken[-1]


def at_least(network, version):
    """Whether the network uses this version of CNI or a later one."""
    return CNI_VERSIONS.index(network["cniVersion"]) >= CNI_VERSIONS.index(version)


def look_network(dirs):
    """The network of this node: as in containerd, the first configuration file in alphabetical order. LabError if there is none."""
    files = [path for path in sorted(Path(dirs["conf"]).glob("*")) if path.suffix in (".conflist", ".conf", ".json")]
    if not files:
        raise LabError(f"no network configuration in {dirs['conf']}")
    return parse_network(files[0].read_text(), files[0])


def plan_stdin(network, plugin, prev_result, capabilities):
    """The object for a plugin's stdin: its own configuration, the name and version of the list, the previous result, and those of the
    capabilities that it declares."""
    conf = {**plugin, "name": network["name"], "cniVersion": network["cniVersion"]}
    declared = {key: value for key, value in capabilities.items() if plugin.get("capabilities", {}).get(key) is True}
    if declared:
        conf["runtimeConfig"] = declared
    if prev_result is not None:
        conf["prevResult"] = prev_result
    return conf


def plan_environment(command, attachment):
    """The CNI_* variables of a call. For STATUS, which has no attachment, libcni passes empty strings."""
    args = ";".join(f"{key}={value}" for key, value in attachment.get("args", {}).items())
    return {"CNI_COMMAND": command, "CNI_CONTAINERID": attachment.get("container_id", ""), "CNI_NETNS": attachment.get("netns", ""),
            "CNI_IFNAME": attachment.get("ifname", ""), "CNI_ARGS": args}


def plan_attachment(record, ifname):
    """One attachment of a pod as {"container_id", "netns", "ifname", "args", "capabilities"}, with the args that Kubernetes gives."""
    args = {"IgnoreUnknown": "1", "K8S_POD_NAMESPACE": "default", "K8S_POD_NAME": record["pod"],
            "K8S_POD_INFRA_CONTAINER_ID": record["container_id"]}
    return {"container_id": record["container_id"], "netns": record["netns"], "ifname": ifname, "args": args,
            "capabilities": record["capabilities"] if ifname != "lo" else {}}


def parse_answer(act, code, stdout, stderr):
    """The result that a plugin printed, or None. CNIError if it failed; then stdout has an error object instead."""
    try:
        answer = json.loads(stdout) if stdout.strip() else {}
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise CNIError(act, {"msg": f"exit status {code}, and stdout is not a JSON object", "details": stdout + stderr})
    if code:
        raise CNIError(act, answer or {"msg": f"exit status {code} without an error object", "details": stderr})
    return answer or None


def plan_call(command, network, plugin, attachment, prev_result):
    """One call of one plugin as {"act": its name in errors, "type": name of the program, "env": CNI_* without CNI_PATH, "stdin"}."""
    return {"act": f"{command} of {plugin['type']} in network {network['name']}", "type": plugin["type"],
            "env": plan_environment(command, attachment),
            "stdin": json.dumps(plan_stdin(network, plugin, prev_result, attachment.get("capabilities", {})))}


def call_plugin(call, dirs, run):
    """Execute a planned call. Returns the plugin's result. NotStarted if there is no such program, CNIError if it fails."""
    binary = Path(dirs["bin"]) / call["type"]
    if not binary.is_file():
        raise NotStarted(f"{call['act']}: no {call['type']} in {dirs['bin']}")
    env = {**os.environ, "PATH": PATH, "CNI_PATH": dirs["bin"], **call["env"]}       # as libcni: CNI_* beside the runtime's own
    try:
        code, stdout, stderr = run([str(binary)], call["stdin"], env=env)
    except LabError as error:
        raise type(error)(f"{call['act']}: {error}") from None
    result = parse_answer(call["act"], code, stdout, stderr)
    sys.stderr.write(stderr)                         # after a success, too: it may be what CNI_TRACE=1 prints
    return result


def cache_path(network, attachment, dirs):
    """The file in which libcni stores the final result of an attachment."""
    return Path(dirs["cache"]) / f"{network['name']}-{attachment['container_id']}-{attachment['ifname']}"


def plan_cache(network, attachment, result):
    """The content of that file, in libcni's format cniCacheV1. The configuration is base64, as Go writes bytes."""
    return {"kind": "cniCacheV1", "containerId": attachment["container_id"],
            "config": base64.b64encode(network.get("text", json.dumps(network)).encode()).decode(),
            "ifName": attachment["ifname"], "networkName": network["name"], "netns": attachment["netns"],
            "cniArgs": [[key, value] for key, value in attachment["args"].items()],
            "capabilityArgs": attachment["capabilities"], "result": result}


def cached_result(network, attachment, dirs):
    """The final result of the ADD, for CHECK and DEL. None before version 0.4.0, and if the file is missing or unreadable."""
    try:
        result = json.loads(cache_path(network, attachment, dirs).read_text())["result"]
    except (OSError, ValueError, KeyError):
        return None
    return {**result, "cniVersion": network["cniVersion"]} if result and at_least(network, "0.4.0") else None


def cni_add(network, attachment, dirs, run):
    """Call STATUS, then ADD of each plugin, and store the final result, which is returned. If an ADD fails: DEL of the plugins that were
    started, and that ADD's error."""
    if at_least(network, "1.1.0"):
        for plugin in network["plugins"]:
            call_plugin(plan_call("STATUS", network, plugin, {}, None), dirs, run)
    result = None
    for number, plugin in enumerate(network["plugins"]):
        try:
            call = plan_call("ADD", network, plugin, attachment, result)
            result = call_plugin(call, dirs, run)
            if result is None:
                raise CNIError(call["act"], {"msg": "exit status 0 without a result", "details": "an ADD has to print one"})
        except LabError as error:
            started = network["plugins"][:number + (not isinstance(error, NotStarted))]
            undo(cni_del, {**network, "plugins": started}, attachment, dirs, run)
            raise
    path = cache_path(network, attachment, dirs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(plan_cache(network, attachment, result)))
    return result


def undo(act, *arguments):
    """A step back after an error, which is the one to report: print an error of its own, and go on."""
    try:
        act(*arguments)
    except LabError as error:
        print(f"while undoing: {error}", file=sys.stderr)


def cni_check(network, attachment, dirs, run):
    """Call CHECK of each plugin, with the final result of the ADD. Not before version 0.4.0, nor if the network disables it."""
    if at_least(network, "0.4.0") and not network.get("disableCheck"):
        prev_result = cached_result(network, attachment, dirs)
        for plugin in network["plugins"]:
            call_plugin(plan_call("CHECK", network, plugin, attachment, prev_result), dirs, run)


def cni_del(network, attachment, dirs, run):
    """Call DEL of each plugin in reverse, then remove the stored result. As libcni it stops at the first error; it can be called again."""
    prev_result = cached_result(network, attachment, dirs)
    for plugin in reversed(network["plugins"]):
        call_plugin(plan_call("DEL", network, plugin, attachment, prev_result), dirs, run)
    with contextlib.suppress(FileNotFoundError):
        cache_path(network, attachment, dirs).unlink()


def networks_of(record, dirs):
    """The networks of a pod as [(network, attachment)], in the order in which containerd sets them up."""
    return [(LOOPBACK, plan_attachment(record, "lo")), (look_network(dirs), plan_attachment(record, "eth0"))]


def sandbox_add(pod, capabilities, dirs, run):
    """Create a pod: its network namespace and all its networks. Returns the CNI result for eth0. After an error nothing remains.

    The pod's record is <pods>/POD.json: {"pod", "container_id", "netns", "capabilities", "addresses": ["10.244.1.2"]}, written before
    the first ADD. If there is already such a pod, from before a reboot, it is deleted first, as kubelet does.
    """
    path, done = Path(dirs["pods"]) / f"{pod}.json", []
    if path.exists():
        try:
            sandbox_del(pod, dirs, run)
        except LabError as error:
            raise LabError(f"there is a pod {pod} from before, which has to go first: {error}") from None
    record = {"pod": pod, "container_id": secrets.token_hex(32), "netns": f"{dirs['netns']}/{pod}",
              "capabilities": capabilities, "addresses": []}
    if Path(record["netns"]).exists():
        raise LabError(f"{record['netns']} exists, and is of no pod; use another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record))
    must(["ip", "netns", "add", pod])
    try:
        for network, attachment in networks_of(record, dirs):
            result = cni_add(network, attachment, dirs, run)
            done.append((network, attachment))
    except LabError:
        for network, attachment in reversed(done):
            undo(cni_del, network, attachment, dirs, run)
        must(["ip", "netns", "del", pod])
        path.unlink()
        raise
    record["addresses"] = [ip["address"].partition("/")[0] for ip in (result or {}).get("ips", [])]
    write_atomically(path, json.dumps(record))
    return result


def sandbox_del(pod, dirs, run):
    """Remove a pod: DEL in all networks, its namespace, its record. No error if there is no such pod. After an error the record stays."""
    path = Path(dirs["pods"]) / f"{pod}.json"
    if not path.exists():
        return
    record = json.loads(path.read_text())
    if not Path(record["netns"]).exists():
        record["netns"] = ""                         # as containerd after a reboot
    errors = []
    for network, attachment in reversed(networks_of(record, dirs)):
        try:
            cni_del(network, attachment, dirs, run)
        except LabError as error:
            errors.append(str(error))
    if record["netns"]:
        must(["ip", "netns", "del", pod])
    if errors:
        raise LabError("\n".join(errors))
    path.unlink()


def sandbox_check(pod, dirs, run):
    """Call CHECK in all networks of a pod."""
    path = Path(dirs["pods"]) / f"{pod}.json"
    if not path.exists():
        raise LabError(f"no pod {pod}")
    for network, attachment in networks_of(json.loads(path.read_text()), dirs):
        cni_check(network, attachment, dirs, run)


def add_with_patience(pod, capabilities, dirs, run, timeout_s=POD_TIMEOUT_S):
    """Call sandbox_add until it succeeds or fails with an error other than "try again later". As kubelet: each time a new container."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return sandbox_add(pod, capabilities, dirs, run)
        except CNIError as error:
            if error.code not in TRY_AGAIN or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


# ---------------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------------
def print_table(rows):
    """Print rows of cells in columns. The first row is the header."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(flush=True)


def print_pings(rows):
    table = [["FROM", "TO", "ADDRESS", "PATH", "PONGS", "AVG RTT"]]
    for row in rows:
        rtt = f"{row['rtt_ms']:.2f} ms" if row["rtt_ms"] is not None else "-"
        table.append([f"{row['node']}/{row['pod']}".rstrip("/"), f"{row['to_node']}/{row['to_pod']}", row["address"], row["path"],
                      f"{row['received']}/{row['sent']}", rtt])
    print_table(table)
    lost = sum(map(is_lost, rows))
    print(f"{len(rows)} pairs pinged, " + (f"{lost} OF THEM LOST PINGS" if lost else "none lost a ping"))


def kind_of(options):
    """As KIND, from the options of up and demo."""
    return {"families": options.families.split(","), "underlay": options.underlay}


def command_up(lab, options):
    with built_or_undone(lab, options.nodes, options.pods, options.source, kind_of(options)):
        boot_all(lab)
    lab.say(f"up; next: lab.py --name {lab.name} ping")


def command_status(lab, _options):
    print_table([["NODE", "INIT", "BOOT ID", "AGENT", "AGENT SAYS"], *(node_status(lab, node) for node in lab.nodes())])
    print_table([["POD", "ADDRESSES", "CONTAINER", "CHECK"], *parallel(lambda pair: pod_status(lab, *pair), lab.pods(), workers=4)])


def node_status(lab, node):
    """The row of a node: name, PID of init, boot ID, whether the agent runs, and the first line of its own status."""
    row = lab.node(node)
    if not is_running(row):
        return [node, "down", row["boot_id"], "-", "-"]
    _, says, _ = run(node_argv(lab, node) + [PYTHON, "/opt/mncni/agent.py", "status"])
    return [node, row["pid"], row["boot_id"], "running" if agent_pid(lab.inside(node, "/")) else "stopped", (says.splitlines() or ["-"])[0]]


def pod_status(lab, node, pod):
    """The row of a pod: name, addresses, container ID and the outcome of CHECK."""
    record, check = pod_record(lab, node, pod), "ok"
    try:
        runtime(lab, node, "check", pod)
    except LabError as error:
        check = str(error).splitlines()[0]
    return [f"{node}/{pod}", " ".join(record.get("addresses", [])) or "-", record.get("container_id", "-")[:12], check]


def command_ping(lab, _options):
    rows = ping_all(lab)
    print_pings(rows)
    return int(any(map(is_lost, rows)))


def command_exec(lab, options):
    """Replace this process with the command, which so gets the terminal and the signals, and gives the exit status."""
    node, _, pod = options.target.partition("/")
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    if not words:
        raise LabError("exec: the command is missing; for example: lab.py exec node1/pod1 -- ip address")
    argv = pod_argv(lab, node, pod) + words
    os.execvpe(argv[0], argv, dict(os.environ, PATH=PATH))


def command_reboot(lab, options):
    reboot(lab, options.node)


def command_runtime(lab, options):
    """Let the container runtime of a node add, check or delete a pod: NODE/POD, or POD if this runs in a node. `add` prints the result."""
    (node, pod), capabilities = options.pod, options.capabilities
    if node:
        argv = runtime_argv(lab, node, options.act, pod, json.dumps(capabilities))
        os.execvpe(argv[0], argv, dict(os.environ, PATH=PATH))
    if not NODE_BOOT_ID.exists():
        raise LabError(f"on which node? For example: lab.py runtime {options.act} node1/{pod}")
    if options.act == "add":
        warn_of_undeclared(capabilities)
        print(json.dumps(add_with_patience(pod, capabilities, DIRS, run)))
    else:
        {"check": sandbox_check, "del": sandbox_del}[options.act](pod, DIRS, run)


def parse_pod(text):
    """(node or "", pod) from the command line."""
    node, _, pod = text.rpartition("/")
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", pod):
        raise argparse.ArgumentTypeError(f"{pod!r} cannot name a pod: use 1 to 63 of a-z, 0-9 and - inside, as in web-0")
    return node, pod


def parse_capabilities(text):
    """A JSON object from the command line."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}; leave it out for a pod that asks for nothing") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text} is not a JSON object like {{"portMappings": [...]}}')
    return found


def warn_of_undeclared(capabilities):
    """Say which capabilities no plugin of the network declares: a runtime leaves them out without a word."""
    plugins = look_network(DIRS)["plugins"]
    declared = {key for plugin in plugins for key, value in plugin.get("capabilities", {}).items() if value is True}
    for key in sorted(set(capabilities) - declared):
        print(f"lab.py: left out, as no plugin declares this capability: {key}; declared: {', '.join(sorted(declared))}", file=sys.stderr)


def command_down(lab, _options):
    with signals_ignored():
        down(lab)


def command_demo(lab, options):
    """Bring the lab up, ping and take it down, with a sniffer that runs from before the first node boots."""
    with built_or_undone(lab, options.nodes, options.pods, options.source, kind_of(options)):
        with sniffing(lab) as counts:
            lab.say("sniffer on the underlay: it looks at every frame")
            boot_all(lab)
            rows = ping_all(lab)
        print_pings(rows)
        reasons = judge_capture(counts, rows)
        print("on the underlay: " + ", ".join(f"{value} {kind}" for kind, value in counts.items() if kind != "samples"))
        print("    (arp and nd: the nodes ask for each other's address, by IPv4 and IPv6; clear: packets that anybody could read)")
        print("NOT only WireGuard:" if reasons else "the underlay carried nothing in the clear: all pod traffic was inside WireGuard")
        print("".join(f"  {reason}\n" for reason in reasons), end="", flush=True)
    command_down(lab, options)
    print("next: `sudo make lab` leaves the nodes running, and docs/tour.md shows what to look at", flush=True)
    return int(bool(reasons) or any(map(is_lost, rows)))


COMMANDS = {                                         # name -> (function that returns an exit status or None, help text)
    "up": (command_up, "start the nodes and attach the pods"),
    "status": (command_status, "show nodes and pods"),
    "ping": (command_ping, "ping every pod from every other pod and every node; exit status 1 if a ping is lost"),
    "exec": (command_exec, "run a command in a node or a pod"),
    "reboot": (command_reboot, "switch a node off without warning, boot it and bring its pods back"),
    "runtime": (command_runtime, "let the container runtime of a node add, check or delete a pod"),
    "down": (command_down, "end the lab and remove all of it"),
    "demo": (command_demo, "up, ping, down, and proof that the underlay carries only WireGuard; exit status 1 if a part fails"),
}
INTERNAL = {"node-init": (node_init, 3), "node-agent": (node_agent, 2), "sniff": (sniff, 0)}    # name -> (function, least words)


def parse_options(argv):
    """The command line as a namespace. --name is accepted before and after the command."""
    name = argparse.ArgumentParser(add_help=False)
    text = "name of the lab, default $MNCNI_LAB or mncni-lab; several can be up at once"
    name.add_argument("--name", default=argparse.SUPPRESS, help=text)
    parser = argparse.ArgumentParser(prog="lab.py", description=__doc__, parents=[name],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, (_, text) in COMMANDS.items():
        sub = commands.add_parser(command, help=text, description=text, parents=[name])
        if command in ("up", "demo"):
            sub.add_argument("--nodes", type=int, default=2, help="number of nodes, default %(default)s")
            sub.add_argument("--pods", type=int, default=2, help="pods on each node, default %(default)s")
            sub.add_argument("--families", choices=("ipv4", "ipv6", "ipv4,ipv6"), default="ipv4", help="of the pods, default %(default)s")
            sub.add_argument("--underlay", choices=UNDERLAYS, default="ipv4", help="family of the nodes' addresses, default %(default)s")
            sub.add_argument("--source", type=Path, default=LAB_FILE.parents[1],
                             help="directory that mncni.py, kube.py and agent.py are copied from (default: the repository)")
        elif command == "exec":
            sub.add_argument("target", metavar="NODE[/POD]")
            sub.add_argument("words", metavar="-- CMD", nargs=argparse.REMAINDER)
        elif command == "reboot":
            sub.add_argument("node", metavar="NODE")
        elif command == "runtime":
            sub.add_argument("act", choices=("add", "del", "check"), help="add prints the result of the network's ADD")
            sub.add_argument("pod", type=parse_pod, metavar="NODE/POD", help="in a node, POD alone")
            sub.add_argument("capabilities", type=parse_capabilities, metavar="JSON", nargs="?", default={}, help="what the pod asks for: "
                             '{"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}, '
                             '{"io.kubernetes.cri.pod-annotations": {"lat": "50ms"}}')
    return parser.parse_args(argv)


def main(argv):
    """Returns the exit status: 0 fine, 1 failed (also: a lost ping, a packet in the clear), 2 usage, 128 + signal if interrupted."""
    try:
        if argv and argv[0] in INTERNAL:
            function, least = INTERNAL[argv[0]]
            if len(argv) <= least:
                raise LabError(f"{argv[0]} is what the lab calls itself; for the others see lab.py --help")
            return function(argv[1:]) or 0
        options = parse_options(argv)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))
        if os.geteuid():
            raise LabError("the lab makes network namespaces and needs root: run it with sudo")
        return COMMANDS[options.command][0](Lab(getattr(options, "name", DEFAULT_NAME)), options) or 0
    except LabError as error:
        print(f"lab.py: {error}" if not (argv and argv[0] in INTERNAL) else error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        print("lab.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
