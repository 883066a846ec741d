"""A long run at a high pace: pods with host ports come and go, nodes appear and vanish, agents restart, and nothing may grow.

A lab of two nodes. Each round adds and deletes pods, changes the records of nodes that are not there, and now and then ends an agent,
which starts anew. Samples are taken between rounds, when nothing but the standing pods is left: memory and descriptors of agent and
wireguard-go, nft rules and elements, links, files, leases, peers, zombies. At the end a table: begin (after the warm-up), middle, end.
Exit status 1 if one grew by more than it may.

    make soak                      an hour
    make soak ARGS="--minutes 3"
"""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from statistics import median

from deploy import lab as labs
from tests.conftest import format_table
from tests.e2e.conftest import lab_up, node_sh
from tests.unit.agent_data import text_of

WARM_UP = 0.15  # part of the rounds; caches and heaps fill up in the meantime
RESTART_ROUNDS = 10  # after so many rounds one agent restarts
# What is sampled -> how much its end may be above its begin: a part of it, and a number. The heap of an allocator breathes; locks of
# attachments are files of 4,096 names that stay.
LIMITS = {
    "agent RSS, KB": (0.05, 1500),
    "agent descriptors": (0, 1),
    "agent threads": (0, 1),
    "wireguard-go RSS, KB": (0.10, 4000),
    "wireguard-go descriptors": (0, 1),
    "nft rules": (0, 0),
    "nft elements": (0, 0),
    "links, host": (0, 0),
    "links, namespace": (0, 0),
    "files in /run/mncni": (0, 0),
    "locks": (0, 4096),
    "files in /var/lib": (0, 0),
    "leases": (0, 0),
    "peers": (0, 0),
    "processes": (0, 0),
    "zombies": (0, 0),
}


def processes(root):
    """{pid: name} of the processes that see a root directory as theirs."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.path.samefile(f"/proc/{pid}/root", root):
                found[int(pid)] = Path("/proc", pid, "comm").read_text().strip()
    return found


def status_of(pid, key):
    """A number of /proc/PID/status."""
    return int(re.search(rf"^{key}:\s+(\d+)", Path("/proc", str(pid), "status").read_text(), re.MULTILINE)[1])


def command_of(pid):
    """The command line of a process, b"" of one that is gone by now."""
    with contextlib.suppress(OSError):
        return Path("/proc", str(pid), "cmdline").read_bytes()
    return b""


def sample(lab, node):
    """{what is sampled: how much} of a node at rest."""
    root = lab.inside(node, "/")
    running = processes(root)
    agent = next(pid for pid in running if b"agent.py" in command_of(pid))
    figures = {
        "agent RSS, KB": status_of(agent, "VmRSS"),
        "agent descriptors": len(os.listdir(f"/proc/{agent}/fd")),
        "agent threads": status_of(agent, "Threads"),
    }
    for pid in [pid for pid, name in running.items() if name == "wireguard-go"]:
        figures.update({"wireguard-go RSS, KB": status_of(pid, "VmRSS"), "wireguard-go descriptors": len(os.listdir(f"/proc/{pid}/fd"))})
    objects = json.loads(node_sh(lab, node, "nft -j list ruleset"))["nftables"]
    elements = [entry for item in objects for kind in ("set", "map") for entry in item.get(kind, {}).get("elem", [])]
    namespace = "nsenter --net=/run/netns/mncni-wg"
    figures.update(
        {
            "nft rules": sum("rule" in item for item in objects),
            "nft elements": len(elements),
            "links, host": len(json.loads(node_sh(lab, node, "ip -json link"))),
            "links, namespace": len(json.loads(node_sh(lab, node, f"{namespace} ip -json link"))),
            "peers": len(node_sh(lab, node, f"{namespace} wg show mncni-wg0 peers").split()),
        }
    )
    below = {name: [path for path in (root / name).rglob("*") if path.is_file()] for name in ("run/mncni", "var/lib/mncni", "var/lib/cni")}
    locks = [path for path in below["run/mncni"] if path.parent.name == "attachments"]
    figures.update(
        {
            "files in /run/mncni": len(below["run/mncni"]) - len(locks),
            "locks": len(locks),
            "files in /var/lib": len(below["var/lib/mncni"]) + len(below["var/lib/cni"]),
            "leases": sum(path.name[0].isdigit() for path in below["var/lib/cni"]),
            "processes": len(running),
            "zombies": sum(status_is_zombie(pid) for pid in running),
        }
    )
    return figures


def status_is_zombie(pid):
    with contextlib.suppress(OSError):
        return "State:\tZ" in Path("/proc", str(pid), "status").read_text()
    return False


def churn(lab, number):
    """One round: pods with host ports on both nodes at once, other nodes' records, and sometimes an agent's end."""

    def pods(node):
        for count in range(3):
            name = f"churn{count}"
            port = {"hostPort": 8000 + count, "containerPort": 80, "protocol": "udp" if count else "tcp"}
            labs.add_pod(lab, node, name, {"portMappings": [port], "bandwidth": {"ingressRate": 8_000_000, "egressRate": 8_000_000}})
        for count in range(3):
            labs.del_pod(lab, node, f"churn{count}")

    for other in range(3):
        stranger = 100 + (number * 3 + other) % 100
        path = lab.store / f"other{other}.json"
        labs.write_atomically(path, text_of(stranger) if (number + other) % 4 else "{")
    labs.parallel(pods, lab.nodes(), workers=2)
    if number % RESTART_ROUNDS == RESTART_ROUNDS - 1:
        node = sorted(lab.nodes())[number // RESTART_ROUNDS % 2]
        labs.run(
            [
                *labs.node_argv(lab, node),
                "sh",
                "-c",
                f"kill -{'KILL' if number % 20 > 10 else 'TERM'} {labs.agent_pid(lab.inside(node, '/'))}",
            ]
        )
        labs.wait_until(lambda: not labs.agent_pid(lab.inside(node, "/")), 20, "end of the agent")
        labs.start_agent(lab, node)
        labs.wait_agent(lab, node)


def settled(lab):
    """Samples of all nodes, the greater figure of each, once two in a row have the same number of peers, links and rules; others' records
    are gone."""
    for other in range(3):
        (lab.store / f"other{other}.json").unlink(missing_ok=True)

    def at_rest():
        rows = [sample(lab, node) for node in lab.nodes()]
        return rows if all(row["peers"] == len(rows) - 1 and not row["zombies"] for row in rows) else None

    rows = labs.wait_until(at_rest, 90, "rest")
    return {name: max(row.get(name, 0) for row in rows) for name in LIMITS}


def judge(samples):
    """[(what, begin, middle, end, verdict)] and whether all is flat. Of each phase the median of its samples."""
    rest = samples[int(len(samples) * WARM_UP) :] or samples
    third = max(1, len(rest) // 3)
    middle = max(0, (len(rest) - third) // 2)
    phases = (rest[:third], rest[middle : middle + third], rest[-third:])
    rows, flat = [], True
    for name, (part, number) in LIMITS.items():
        begin, between, end = (round(median(row[name] for row in phase)) for phase in phases)
        grew = end > begin * (1 + part) + number
        flat = flat and not grew
        rows.append((name, str(begin), str(between), str(end), "GREW" if grew else "flat"))
    return rows, flat


def main(arguments):
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="(default 60)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the lab goes
    samples, rounds = [], 0
    with lab_up(f"mncni-soak-{os.getpid()}", families=("ipv4",)) as lab:
        end = time.monotonic() + options.minutes * 60
        while time.monotonic() < end or len(samples) < 6:
            churn(lab, rounds)
            rounds += 1
            if rounds % 2 == 0:
                samples.append(settled(lab))
                print(f"round {rounds}: " + ", ".join(f"{name} {samples[-1][name]}" for name in ("agent RSS, KB", "nft rules")), flush=True)
    rows, flat = judge(samples)
    print("\n".join(format_table([("what", "begin", "middle", "end", "verdict"), *rows])))
    print(
        f"{rounds} rounds, {rounds * 6} pods, {rounds // RESTART_ROUNDS} restarts of an agent, {len(samples)} samples, the first "
        f"{WARM_UP:.0%} of which are warm-up: {'all is flat' if flat else 'something grew'}"
    )
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
