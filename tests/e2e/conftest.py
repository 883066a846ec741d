"""Labs for end-to-end tests: up before the first test of a module, gone without a trace after the last."""

import contextlib
import signal

import pytest

from deploy import lab as labs
from tests.apiserver import ApiProcess
from tests.e2e.flow import Flow

SERVER = "192.0.2.250"  # where cluster_up has its API server
RECORD = "mncni.dev/node"  # the annotation
OUTSIDE_IP = {"ipv4": "192.0.2.200", "ipv6": "2001:db8::200"}


@contextlib.contextmanager
def lab_up(name, nodes=2, pods=1, families=("ipv4", "ipv6"), underlay="ipv4", control=contextlib.nullcontext, kubeconfig=""):
    """A lab in which every pod has been reached. control(lab): what has to be there before the nodes boot, for the time of the lab;
    kubeconfig: a path with {node} in it, of an API server that agents are to follow."""
    lab = labs.Lab(name, verbose=False)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))  # by default nothing would be cleaned up
    try:
        kind = {"families": list(families), "underlay": underlay, **({"kubeconfig": kubeconfig} if kubeconfig else {})}
        with labs.built_or_undone(lab, nodes, pods, labs.LAB_FILE.parents[1], kind), control(lab):
            labs.boot_all(lab)
            labs.wait_first_pongs(lab, labs.plan_pairs(lab))
            yield lab
    finally:
        with labs.signals_ignored():
            labs.down(lab)
        signal.signal(signal.SIGTERM, before)


def node_sh(lab, node, command):
    """What a shell command prints in a node; it has to work."""
    return labs.must([*labs.node_argv(lab, node), "sh", "-c", command])


def is_well(lab, node="node1"):
    """Whether the agent of a node says so."""
    return labs.run([*labs.node_argv(lab, node), labs.PYTHON, "/opt/mncni/agent.py", "status"])[0] == 0


def restart_agent(lab, node="node1", sign="TERM", argv=None):
    """A new agent in the place of the one there is, which ends by the signal. argv: its command line, if another than the lab's."""
    node_sh(lab, node, f"kill -{sign} $(cat {labs.AGENT_PID})")
    labs.wait_until(lambda: not labs.agent_pid(lab.inside(node, "/")), 20, "end of the agent")
    start = [labs.PYTHON, "/opt/mncni/lab.py", "node-agent", "start"]
    labs.must([*labs.node_argv(lab, node), *start, *(argv or labs.plan_agent(lab, node))])


def wait_well(lab, node="node1"):
    labs.wait_until(lambda: is_well(lab, node), 60, f"agent of {node} that is well")


def answers(lab, source, target):
    """Whether pod1 of one node gets an answer from all addresses of another's."""
    addresses = labs.pod_record(lab, target, "pod1").get("addresses")
    ping = [*labs.pod_argv(lab, source, "pod1"), "ping", "-n", "-c1", "-W1"]
    return bool(addresses) and all(labs.run([*ping, address])[0] == 0 for address in addresses)


def stream(lab, act, *targets, fragments=False, **options):
    """The Flows from node1's pod1 to that of each of the target nodes (node2) while act() ran, as a list. Nothing but WireGuard, and what
    the agents have to say to an API server, may cross the underlay meanwhile. fragments: whether it may in parts; options: see Flow."""
    with labs.sniffing(lab) as counts, contextlib.ExitStack() as entered:
        flows = []
        for node in targets or ("node2",):
            ends = labs.pod_argv(lab, "node1", "pod1"), labs.pod_argv(lab, node, "pod1")
            flows.append(entered.enter_context(Flow(*ends, labs.pod_record(lab, node, "pod1")["addresses"][0], **options)))
        act()
    assert fragments or counts["fragment"] == 0, "packets of the pods' MTU do not fit into the underlay's"
    strange = [sample for sample in counts["samples"] if f"{SERVER} " not in f"{sample} "]
    assert (counts["other"], counts["dropped"], strange) == (0, 0, [])
    assert counts["wireguard"] > sum(flow.sent - flow.lost for flow in flows)  # a deaf sniffer proves nothing
    return flows


LOOK = r"""
for ns in /proc/self/ns/net /run/netns/mncni-wg; do
    nsenter --net=$ns ip -brief address | sed 's/@[^ ]*//; s/^mn[0-9a-f]\{11\} /a pod /'
    nsenter --net=$ns ip route show proto 201
    nsenter --net=$ns ip -6 route show proto 201
    nsenter --net=$ns ip rule | grep 'proto 201'
    nsenter --net=$ns ip -6 rule | grep 'proto 201'
    nsenter --net=$ns nft list tables
done
ls -d /run/netns/* /run/mncni/* /run/wireguard/* /var/lib/mncni/* /etc/cni/net.d/* /opt/cni/bin/* 2>/dev/null
pgrep wireguard-go | wc -l
"""


def things(lab, node):
    """What there is on a node that the agent makes: links, addresses, routes, tables, namespaces, files, processes; a line each."""
    lines = [line.split() for line in node_sh(lab, node, LOOK).splitlines()]  # less link-local addresses that the kernel made
    return {" ".join(word for word in words if not word.startswith("fe80::") or word.startswith("fe80::28:")) for words in lines}


INSIDE = "nsenter --net=/run/netns/mncni-wg"


def wg_peers(lab, node):
    """{key: (endpoint, allowed IPs)} of a node's device."""
    lines = node_sh(lab, node, f"{INSIDE} wg show mncni-wg0 dump").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return {row[0]: (row[2], frozenset(row[3].split(","))) for row in rows}


def rotate(lab, node):
    """(exit code, stdout, stderr) of `agent.py rotate` on a node."""
    return labs.run([*labs.node_argv(lab, node), labs.PYTHON, "/opt/mncni/agent.py", "rotate"])


def keys_of(lab, node):
    """(the private key on a node's disk, the one of its device, its public key)."""
    shown = f"cat /var/lib/mncni/key; {INSIDE} wg show mncni-wg0 private-key; {INSIDE} wg show mncni-wg0 public-key"
    return tuple(node_sh(lab, node, shown).split())


def kept_anywhere(lab, node, text):
    """The files in which a node still has a text, less those of the lab."""
    return labs.run([*labs.node_argv(lab, node), "grep", "-rlF", text, "/var/lib/mncni", "/run/mncni", "/etc/cni", "/tmp"])[1].split()


@contextlib.contextmanager
def outsider(lab):
    """A machine on the underlay that is no node, with the addresses OUTSIDE_IP: its argv prefix. The nodes have addresses of both families
    there: node 1 also has 2001:db8::1, and so on."""
    name = f"{lab.name}-outside"
    for node in lab.nodes():
        node_sh(lab, node, f"ip address replace 2001:db8::{lab.node(node)['number']}/64 dev eth0 nodad")
    labs.must(["ip", "netns", "add", name])
    try:
        lines = [f"link add outside type veth peer name eth0 netns {name}", f"link set outside master {labs.BRIDGE} up"]
        labs.must(["ip", "-n", lab.underlay, "-batch", "-"], "\n".join(lines) + "\n")
        own = [f"address add {OUTSIDE_IP['ipv4']}/24 dev eth0", f"address add {OUTSIDE_IP['ipv6']}/64 dev eth0 nodad"]
        labs.must(["ip", "-n", name, "-batch", "-"], "\n".join([*own, "link set eth0 up", "link set lo up"]) + "\n")
        yield ["ip", "netns", "exec", name]
    finally:
        labs.must(["ip", "netns", "delete", name])


@contextlib.contextmanager
def cluster_up(name, directory, **options):
    """A lab whose nodes follow an API server at SERVER on the underlay, and that server: (lab, api). options: see lab_up."""
    served = []

    @contextlib.contextmanager
    def control(lab):
        # A MAC of its own: else the bridge takes another with each port, and nodes look for the server at the old one for a while.
        labs.must(["ip", "-n", lab.underlay, "link", "set", labs.BRIDGE, "address", "02:00:00:00:02:50"])
        labs.must(["ip", "-n", lab.underlay, "address", "add", f"{SERVER}/24", "dev", labs.BRIDGE])
        with ApiProcess(directory, netns=lab.underlay, listen=f"{SERVER}:6443", sans=[SERVER]) as api:
            for node in lab.nodes():
                cidrs = [row["pod_cidr"] for row in labs.pod_cidrs(lab, node)]
                api.call("create_node", node, pod_cidrs=cidrs, addresses=[labs.endpoint(lab, node)[0]])
                api.call("kubeconfig", str(directory / node), "system:serviceaccount:kube-system:mncni-agent", node=node)
            served.append(api)
            yield

    with lab_up(name, control=control, kubeconfig=str(directory / "{node}"), **options) as lab:
        yield lab, served[0]
