"""A cluster of thousands of nodes and an agent in it, each in a process of its own, so that CPU and memory are counted apart.

    with running(directory, "serve", "5000") as server, running(directory, "follow") as agents:
        server("rekey 7"), server("beats 100") -> {};  server("traffic") -> {"requests", "writes", "sent"}
    agents("sync") -> {"peers", "cpu_s", "rss_mb"};  agents("change"), agents("beats"), agents("quiet") -> {"cpu_s", ...}
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import agent
import mncni
from tests.apiserver import ApiServer, realistic_node
from tests.unit.agent_data import FakeWireGuard, key_of, parse

ROOT = Path(__file__).resolve().parents[2]
RESULT_TIMEOUT_S = 120


def policy(user, operation, old, new):
    """The admission policies in short: the agent of node-0 changes node-0, and its record has no spaces."""
    record = new["metadata"].get("annotations", {}).get(agent.RECORD, "")
    return None if new["metadata"]["name"] == "node-0" and " " not in record else "not your node, or a wrong record"


@contextlib.contextmanager
def running(directory, *words):
    """This file as a process, ready. Yields call(line), which returns what the process answers."""
    argv = [sys.executable, "-m", "tests.integration.big_cluster", str(directory), *words]
    environ = {**os.environ, "TMPDIR": str(directory)}  # it will be killed, and clear nothing away
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environ) as process:

        def call(line):
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        try:
            json.loads(process.stdout.readline())
            yield call
        finally:
            process.kill()


def answer(acts):
    """Answer line after line: the first word names the act, the others are its arguments."""
    print("{}", flush=True)
    for line in sys.stdin:
        name, *words = line.split()
        print(json.dumps(acts[name](*words) or {}), flush=True)


def record_of(node, number):
    """A node's record; number makes its key."""
    record = {"v": 2, "podCIDRs": node["spec"]["podCIDRs"], "uid": node["metadata"]["uid"]}
    record["endpoints"] = [entry["address"] for entry in node["status"]["addresses"] if entry["type"] == "InternalIP"]
    return json.dumps({**record, "key": key_of(number), "port": 28384, "gen": 1}, separators=(",", ":"))


def serve(directory, count):
    with ApiServer() as server:
        for index in range(int(count)):
            node = realistic_node(f"node-{index}", index)
            node["metadata"]["annotations"][agent.RECORD] = record_of(node, index + 10_000)
            server.create_node(node)
        server.add_policy(policy)
        server.kubeconfig(directory / "kubeconfig", "system:serviceaccount:kube-system:mncni-agent")

        def rekey(number):
            text = record_of(server.node(f"node-{number}"), int(number) + 20_000)
            server.patch_node(f"node-{number}", {"metadata": {"annotations": {agent.RECORD: text}}})

        def beats(number):
            """Signs of life of so many kubelets."""
            for index in range(int(number)):
                conditions = server.node(f"node-{index}")["status"]["conditions"]
                now = f"2026-01-01T{index // 3600:02d}:{index // 60 % 60:02d}:{index % 60:02d}Z"
                new = [{**condition, "lastHeartbeatTime": now} for condition in conditions]
                server.patch_node(f"node-{index}", {"status": {"conditions": new}})

        def traffic(*_):
            """What has come and gone since the last call; the requests by rekey and beats are not among it, they are no requests."""
            counted = {"requests": server.count(), "writes": server.writes(), "sent": server.bytes_sent()}
            server.reset_counters()
            return counted

        answer({"rekey": rekey, "beats": beats, "traffic": traffic})


class Follower:
    """The agent of node-0, with a WireGuard device in memory and without the stages that need a kernel."""

    def __init__(self, directory):
        mncni.DEFAULT_DATA_DIR = f"{directory}/leases"  # an agent looks whether it can write there
        agent.FLOOR, agent.STAGES = (agent.ensure_endpoints,), (agent.ensure_mtu, agent.ensure_identity)
        names = ("conf-dir", "bin-dir", "state-dir", "run-dir")
        dirs = [word for name in names for word in (f"--{name}", directory / name)]
        argv = ["--node-name", "node-0", "--kubeconfig", directory / "kubeconfig", "--cluster-cidr", "10.0.0.0/8", *dirs]
        settings = parse(*argv, "--cluster-cidr", "fd00:10::/32", "--endpoint", "192.0.2.1", "--mtu", "1400")
        self.run, self.dump = FakeWireGuard(), None
        self.store = agent.make_store(settings, {}, self.command, lambda: None)
        self.store.start()
        self.skipped_s = 0
        self.agent = agent.Agent(settings, self.store, self.command, clock=lambda: time.monotonic() + self.skipped_s)

    def command(self, command):
        """The device's own work is not the agent's: what it says is made ready before the clock runs."""
        return self.dump if self.dump and "show" in command.argv else self.run(command)

    def sync(self):
        while not (self.agent.tick() and self.agent.context.peers):
            time.sleep(0.05)
        sizes = [int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return {"peers": len(self.agent.context.peers), "cpu_s": time.process_time(), "rss_mb": sizes[0] / 1024}

    def change(self):
        """The pass that brings the next change of a peer to the device; others before it are for our own record, and not counted."""
        deadline = time.monotonic() + RESULT_TIMEOUT_S
        device = agent.look_device(self.agent.context)
        self.run.writes()
        sets = []
        while not sets:
            while set(device["peers"]) != set(self.agent.context.peers) or not (self.store.news or self.agent.news):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            self.dump = self.run(agent.Command(["nsenter", "--net=/run/netns/mncni-wg", "wg", "show", "mncni-wg0", "dump"]))
            self.agent.next_pass = self.agent.clock() + RESULT_TIMEOUT_S  # no audit falls into the measurement
            self.agent.debt_s = 0  # as after a quiet time
            begin = time.process_time()
            self.agent.tick()
            self.mark = time.process_time()
            self.dump, sets = None, self.run.writes()
        return {"cpu_s": self.mark - begin, "sets": len(sets)}

    def quiet(self):
        """An hour in which nothing happens, of which the agent's clock alone takes notice."""
        self.run.writes()
        begin, commands = time.process_time(), len(self.run.log)
        for _ in range(int(3600 / agent.POLL_S)):
            self.skipped_s += agent.POLL_S
            self.agent.tick()
        return {"cpu_s": time.process_time() - begin, "commands": len(self.run.log) - commands, "sets": len(self.run.writes())}

    def beats(self):
        """What the events cost that have come since the last change."""
        quiet = 0
        while quiet < 20:
            before = time.process_time()
            time.sleep(0.05)
            quiet = quiet + 1 if time.process_time() - before < 0.001 else 0
        assert not self.store.news
        return {"cpu_s": time.process_time() - self.mark}


def follow(directory):
    agents = Follower(directory)
    answer({"sync": agents.sync, "change": agents.change, "beats": agents.beats, "quiet": agents.quiet})


if __name__ == "__main__":
    {"serve": serve, "follow": follow}[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])
