#!/usr/bin/env python3
"""Starts the agent in its container: sees that the tools are there, then agent.py becomes this process.

    start.py check       the node, below /host: is there what the CNI plugin needs, which runs on the node itself?
    start.py run         the container: fetch the tools that are missing, then `agent.py run`
    start.py uninstall   the same, then `agent.py uninstall`, again until it has worked; see deploy/uninstall.yaml

What is wrong is also written where `kubectl describe node` shows it: the condition NetworkUnavailable, and an Event.
"""
import os
import shutil
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.realpath(__file__))
AGENT_DIR = os.environ.get("MNCNI_PROGRAMS", "/mncni")
HOST = os.environ.get("MNCNI_HOST", "/host")
NODE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

AGENT_TOOLS = {"ip": "iproute2", "nft": "nftables", "wg": "wireguard-tools", "nsenter": "util-linux", "setpriv": "util-linux"}
NODE_TOOLS = {"ip": "iproute2", "nsenter": "util-linux"}  # the plugin needs them for every pod
NODE_EXTRAS = {"nft": ("nftables", "host ports"), "tc": ("iproute2", "bandwidth and lat")}
OLD_PYTHON = "import sys; sys.exit(sys.version_info < (3, 9))"
TRIES, TIMEOUT_S = 3, 300


def say(text):
    print(f"start.py: {text}", file=sys.stderr, flush=True)


def run(argv, timeout_s=30):
    """(exit status, output) of a command; 127 when there is no such program, 124 when it takes too long."""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s)
    except OSError as error:
        return 127, str(error)
    except subprocess.TimeoutExpired:
        return 124, f"no end after {timeout_s} s"
    return done.returncode, done.stdout.decode(errors="replace")


# ---- the node -------------------------------------------------------------------------------------------------------------


def look_node(root, run):
    """(what the plugin cannot do without, what some pods will miss): lines that name the package, none where all is well."""
    needs, misses = [], []
    if run(["chroot", root, "/usr/bin/python3", "-IS", "-c", "pass"])[0]:
        needs.append("/usr/bin/python3 (package python3)")
    elif run(["chroot", root, "/usr/bin/python3", "-IS", "-c", OLD_PYTHON])[0]:
        needs.append("a newer /usr/bin/python3 (at least 3.9)")
    needs += [f"{tool} (package {package})" for tool, package in NODE_TOOLS.items() if not on_node(root, tool)]
    for tool, (package, use) in NODE_EXTRAS.items():
        if not on_node(root, tool):
            misses.append(f"without {tool} (package {package}) pods that ask for {use} do not start")
    return needs, misses


def on_node(root, tool):
    """Whether a program is in one of the places where the plugin looks. A link may point into the node's own root."""
    return any(os.path.lexists(os.path.join(root, part.lstrip("/"), tool)) for part in NODE_PATH.split(":"))


def check():
    """The exit code of `start.py check`."""
    needs, misses = look_node(HOST, run)
    for line in misses:
        say(f"this node: {line}")
    if not needs:
        return 0
    message = f"this node lacks {', '.join(needs)}: the CNI plugin runs on the node itself and cannot do without"
    say(message)
    report("MncniNodeLacksTools", message)
    return 1


# ---- the container --------------------------------------------------------------------------------------------------------


def look_missing(which=shutil.which, has_wireguard=None):
    """The packages that this container lacks."""
    packages = {package for tool, package in AGENT_TOOLS.items() if not which(tool, path=NODE_PATH)}
    if "iproute2" not in packages and not which("wireguard-go", path=NODE_PATH) and not (has_wireguard or kernel_has_wireguard)():
        packages.add("wireguard-go")
    return sorted(packages)


def kernel_has_wireguard():
    """Tries it for real, which also loads the module. The namespace is gone with the process."""
    return run(["unshare", "--net", "ip", "link", "add", "probe", "type", "wireguard"])[0] == 0


def provide():
    """Install what is missing; returns why that failed, or "". Twice, because whether wireguard-go is needed only `ip` can tell."""
    for _ in range(2):
        packages = look_missing()
        if not packages:
            return ""
        say(f"missing here: {', '.join(packages)}; installing with apt-get (the image of deploy/image has them)")
        output = install(packages)
        if output:
            say(output)
            return f"cannot install {', '.join(packages)} in the agent's container: {output.splitlines()[0]}; see deploy/image"
    return f"{', '.join(packages)} still missing after their installation" if (packages := look_missing()) else ""


def install(packages):
    """"" or what apt-get said. It ends: kubelet tries again later, less and less often."""
    if not shutil.which("apt-get"):
        return "this image has no apt-get"
    options = ("Acquire::Retries=2", "Acquire::http::Timeout=20", "Acquire::https::Timeout=20", "APT::Update::Error-Mode=any")
    apt = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    for attempt in range(TRIES):
        status, output = run([*apt, "update"], TIMEOUT_S)
        if status == 0:
            status, output = run([*apt, "install", "-y", "--no-install-recommends", *packages], TIMEOUT_S)
        if status == 0:
            return ""
        time.sleep(2 * attempt)
    return "\n".join(output.strip().splitlines()[:10]) or f"apt-get: exit status {status}"


# ---- telling the cluster --------------------------------------------------------------------------------------------------


def report(reason, message):
    """Condition and Event of this Node, best effort: the log says the same. The agent sets the condition right when it is up."""
    sys.path.insert(0, AGENT_DIR)
    import kube
    import mncni

    name, stamp = os.environ.get("MNCNI_NODE_NAME", ""), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    condition = {"type": "NetworkUnavailable", "status": "True", "reason": reason, "message": message[:1000]}
    condition.update(lastTransitionTime=stamp, lastHeartbeatTime=stamp)
    try:
        api = kube.open_api("", dict(os.environ), None, "mncni-agent")
        body = {"status": {"conditions": [condition]}}
        api.request("PATCH", f"{kube.NODES}/{name}/status", body, content_type=kube.STRATEGIC_PATCH)
        source = {"component": "mncni-agent", "host": name}
        kube.send_event(api, name, name, message[:1000], reason=reason, type="Warning", source=source)
    except (kube.ApiError, mncni.CNIError) as error:
        say(f"cannot tell the cluster: {error}")


# ---- main -----------------------------------------------------------------------------------------------------------------


def uninstall(words):
    """Uninstall, again until that has worked (pods may be attached), then wait to be stopped: /tmp/done says so to the probe."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    before = None
    while True:
        status, output = run([sys.executable, "-I", f"{AGENT_DIR}/agent.py", "uninstall", *words], TIMEOUT_S)
        if output != before:
            print(output, end="", file=sys.stderr, flush=True)
        if status == 0:
            break
        before = output
        time.sleep(10)
    open("/tmp/done", "w").close()
    while True:
        signal.pause()


def main(arguments):
    """The exit code, unless this process becomes the agent."""
    if arguments == ["check"]:
        return check()
    if arguments[:1] not in (["run"], ["uninstall"]):
        print(__doc__, file=sys.stderr)
        return 2
    trouble = provide()
    if trouble:
        say(trouble)
        report("MncniCannotStart", trouble)
        return 1
    if arguments[0] == "uninstall":
        return uninstall([word for word in arguments[1:] if word])  # a variable of the manifest may be empty
    return os.execv(sys.executable, [sys.executable, "-I", f"{AGENT_DIR}/agent.py", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
