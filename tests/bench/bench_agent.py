"""What an agent costs in a large cluster: itself, the API server, and its nodes. And on a node of its own, if root runs it.

    make bench-agent [ARGS="100 1000"]       default: 100 1000 5000, and as root a lab

In the large clusters the real agent and the API server double, each a process of its own; WireGuard is a device in memory, and the stages
that need a kernel are left out. Prints one table. In the lab two nodes with all of it: from the agent's start on a node that has nothing to
the ready file, and the CPU time of an agent that has nothing to do, its commands included.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from deploy import lab as labs
from tests.integration import big_cluster

HEAD = (
    *("nodes", "first sync: CPU s", "RSS MB", "requests", "MB received", "a change: CPU ms", "patch to `wg set`, ms", "KB received"),
    *("an event without news: ms", "a quiet hour: CPU s", "API writes", "`wg set`"),
)
BEATS = 1000


def measure(count):
    """A row of the table."""
    with (
        tempfile.TemporaryDirectory() as directory,
        big_cluster.running(Path(directory), "serve", str(count)) as server,
        big_cluster.running(Path(directory), "follow") as agents,
    ):
        sync = agents("sync")
        first = settled(server)
        changes, took_s = [], []
        for number in range(10, 20):
            begin = time.perf_counter()
            server(f"rekey {number}")
            changes.append(agents("change"))
            took_s.append(time.perf_counter() - begin)
        assert all(change["sets"] == 1 for change in changes), changes
        news = server("traffic")
        for _ in range(max(1, BEATS // count)):
            server(f"beats {min(count, BEATS)}")
        events = max(1, BEATS // count) * min(count, BEATS)
        beats = agents("beats")
        server("traffic")
        quiet = agents("quiet")
        writes = server("traffic")["writes"]
    figures = (sync["cpu_s"], sync["rss_mb"], first["requests"], first["sent"] / 1e6, statistics.median(c["cpu_s"] for c in changes) * 1000)
    figures += (statistics.median(took_s) * 1000, news["sent"] / len(changes) / 1000, beats["cpu_s"] / events * 1000, quiet["cpu_s"])
    return [f"{count:,}", *(f"{figure:.3g}" for figure in figures), str(writes), str(quiet["sets"])]


def settled(server):
    """The traffic of the first sync, its last writes included: until a second passes without a request."""
    total = server("traffic")
    while True:
        time.sleep(1)
        more = server("traffic")
        if not more["requests"]:
            return total
        total = {key: total[key] + more[key] for key in total}


REST_S = 20


def measure_node():
    """(seconds from the agent's start to ready, CPU seconds a second at rest), of two nodes of the lab, one after the other."""
    lab, ready, rest = labs.Lab(f"mncni-bench-{os.getpid()}", verbose=False), [], []
    try:
        with labs.built_or_undone(lab, 2, 1, labs.LAB_FILE.parents[1], {"families": ["ipv4"], "underlay": "ipv4"}):
            for node in lab.nodes():
                labs.make_node_dir(lab, node)
                labs.start_node(lab, node)
                begin = time.perf_counter()
                labs.start_agent(lab, node)
                labs.wait_agent(lab, node)
                ready.append(time.perf_counter() - begin)
            time.sleep(REST_S)  # what follows a start: links settle, the other node's record comes
            agents = [labs.agent_pid(lab.inside(node, "/")) for node in lab.nodes()]
            before = [cpu_of(lab, node) for node in lab.nodes()]
            time.sleep(REST_S)
            rest = [(cpu_of(lab, node) - cpu) / REST_S for node, cpu in zip(lab.nodes(), before)]
            assert agents == [labs.agent_pid(lab.inside(node, "/")) for node in lab.nodes()], "an agent has died"
    finally:
        labs.down(lab)
    return statistics.mean(ready), statistics.mean(rest)


def cpu_of(lab, node):
    """CPU seconds of a node's agent and of its commands that have ended."""
    stat = labs.must([*labs.node_argv(lab, node), "cat", f"/proc/{labs.agent_pid(lab.inside(node, '/'))}/stat"])
    return sum(map(int, stat.rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")


def main():
    rows = [measure(int(word)) for word in sys.argv[1:] or ("100", "1000", "5000")]
    columns = [[head, *(row[place] for row in rows)] for place, head in enumerate(HEAD)]
    width = max(map(len, HEAD))
    for head, *cells in columns:
        print(head.ljust(width), *(cell.rjust(10) for cell in cells))
    if os.geteuid() == 0:
        ready_s, rest = measure_node()
        print(f"\nin the lab: start to ready {ready_s:.2f} s, at rest {rest * 1000:.1f} ms of CPU a second")


if __name__ == "__main__":
    main()
