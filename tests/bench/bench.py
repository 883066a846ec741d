"""What a pod costs: MNCNI against the reference plugins, and against the floor, in one run, as ratios.

    sudo make bench [ARGS="--rounds 20 --only calls,bursts,leases,pods,network"]

A pod here has masquerade, a host port and bandwidth limits both ways ("full"), or the masquerade alone ("alone"). Compared are

    ours        the launcher that `mncni.py install` writes, "plugin": ["naivewg", "portmap", "bandwidth"]
    unchecked   the same without "spoofCheck"
    plain file  the same with mncni.py itself, which is compiled at each start
    reference   Debian's containernetworking-plugins, chained as a runtime does: bridge with host-local, portmap, bandwidth
    floor       the commands that change the kernel for ours, in a shell script: no Python, no look, no lease, one after another
    before      with `--before FILE` another mncni.py: what a change is worth, in one run

in rounds that take turns, so that a busy machine is busy for all of them. Figures are medians. Prints tables, writes them and SVG
charts to build/bench, and exits with 1 if a ratio is above its budget in budgets.json by more than 15 %. `--record` writes the ratios of
the parts that ran as budgets. The program runs in a network namespace of its own, which goes with it.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mncni
from tests.bench import network

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "build" / "bench"
REFERENCE = next((path for path in ("/usr/lib/cni", "/opt/cni/bin") if os.path.exists(f"{path}/bridge")), "")
TOLERANCE = 1.15
ASKED = {
    "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
    "bandwidth": {"ingressRate": 8000000, "ingressBurst": 800000, "egressRate": 8000000, "egressBurst": 800000},
}


class World:
    """Pods' namespaces and a directory; gone at the end. The host's namespace is the one that the program runs in."""

    def __init__(self, tmp):
        self.tmp, self.name, self.pods, self.wrapper = tmp, f"mncni-bench-{os.getpid()}", [], []
        sh("ip link set lo up")

    def close(self):
        for name in self.pods:
            subprocess.run(["ip", "netns", "delete", name], check=False)

    def pod(self, number):
        """The path of the number-th pod's namespace, made when it is asked for first."""
        name = f"{self.name}-{number}"
        if name not in self.pods:
            sh(f"ip netns add {name}")
            self.pods.append(name)
        return f"/run/netns/{name}"

    def call(self, command, program, conf, container_id, netns, **environ):
        """(stdout, stderr) of one call of a plugin; it has to succeed."""
        own = {"CNI_COMMAND": command, "CNI_CONTAINERID": container_id, "CNI_NETNS": netns, "CNI_IFNAME": "eth0", "CNI_PATH": REFERENCE}
        environ = {**os.environ, **own, "MNCNI_RUN_DIR": f"{self.tmp}/run", **environ}
        done = subprocess.run([*self.wrapper, program], input=json.dumps(conf), capture_output=True, text=True, env=environ)
        if done.returncode:
            raise SystemExit(f"bench: {command} by {program} failed: {done.stdout}{done.stderr}")
        return done.stdout, done.stderr

    def processes(self, act, *arguments):
        """(how many programs act's calls started, the plugins themselves included; what it returned)."""
        path = Path(self.tmp, "strace")
        self.wrapper = ["strace", "-f", "-qq", "-A", "-e", "trace=execve", "-e", "signal=none", "-o", str(path)]
        path.write_text("")
        try:
            value = act(*arguments)
        finally:
            self.wrapper = []
        return len(re.findall(r"execve.* = 0$", path.read_text(), re.M)), value


def sh(command):
    subprocess.run(command, shell=True, check=True)


class Chain:
    """Plugins that a runtime calls one after another: [(program, configuration)]."""

    def __init__(self, world, plugins):
        self.world, self.plugins = world, plugins

    def add(self, number, **environ):
        """The result of the last, and all that was said on stderr."""
        result, said = None, ""
        for program, conf in self.plugins:
            conf = with_port({**conf, "prevResult": result} if result else conf, number)
            stdout, stderr = self.world.call("ADD", program, conf, f"c{number}", self.world.pod(number), **environ)
            result, said = json.loads(stdout), said + stderr
        return result, said

    def check(self, number, result):
        for program, conf in self.plugins:
            if program.endswith("/portmap"):
                continue  # the reference's CHECK fails for a pod without IPv6
            self.world.call("CHECK", program, with_port({**conf, "prevResult": result}, number), f"c{number}", self.world.pod(number))

    def delete(self, number, result, **environ):
        said = ""
        for program, conf in reversed(self.plugins):
            conf = with_port({**conf, "prevResult": result}, number)
            said += self.world.call("DEL", program, conf, f"c{number}", self.world.pod(number), **environ)[1]
        return said

    def ask(self, command):
        """STATUS or VERSION of the first plugin."""
        program, conf = self.plugins[0]
        self.world.call(command, program, {**conf, "cniVersion": "1.1.0"} if command == "STATUS" else conf, "c", "")


def with_port(conf, number):
    """conf with a host port of the pod's own."""
    if "portMappings" not in conf.get("runtimeConfig", {}):
        return conf
    ports = [{**conf["runtimeConfig"]["portMappings"][0], "hostPort": 10000 + number}]
    return {**conf, "runtimeConfig": {**conf["runtimeConfig"], "portMappings": ports}}


def make_chains(world, kind, before):
    """{who: Chain} for a kind of pod, "alone" or "full"."""
    mncni.install(f"{world.tmp}/bin")
    ours = our_conf(world, kind) if kind == "full" else our_conf(world, kind, plugin="naivewg", runtimeConfig={})
    chains = {"ours": Chain(world, [(f"{world.tmp}/bin/mncni", ours)])}
    if kind == "full":
        chains["unchecked"] = Chain(world, [(f"{world.tmp}/bin/mncni", {**ours, "spoofCheck": False})])
        chains["plain file"] = Chain(world, [(f"{world.tmp}/bin/mncni.py", ours)])
    if before:
        subprocess.run([sys.executable, before, "install", "--bin-dir", f"{world.tmp}/before"], check=True, stdout=subprocess.DEVNULL)
        chains["before"] = Chain(world, [(f"{world.tmp}/before/mncni", ours)])
    plugins = reference_plugins(world)
    return {**chains, "reference": Chain(world, plugins if kind == "full" else plugins[:1])}


def our_conf(world, name="ours", **keys):
    conf = {"cniVersion": "1.0.0", "name": name, "plugin": ["naivewg", "portmap", "bandwidth"], "bridge": f"{name}0"}
    conf.update(ipMasq=True, spoofCheck=True)
    conf["ipam"] = {"dataDir": f"{world.tmp}/leases", "ranges": [[{"subnet": "10.88.0.0/16"}]]}
    return {**conf, "runtimeConfig": ASKED, **keys}


def reference_plugins(world):
    ipam = {"type": "host-local", "dataDir": f"{world.tmp}/host-local", "ranges": [[{"subnet": "10.89.0.0/16"}]]}
    bridge = {
        "type": "bridge",
        "bridge": "ref0",
        "isGateway": True,
        "isDefaultGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "ipam": ipam,
    }
    confs = [bridge, {"type": "portmap", "runtimeConfig": ASKED}, {"type": "bandwidth", "runtimeConfig": ASKED}]
    return [(f"{REFERENCE}/{conf['type']}", {"cniVersion": "0.4.0", "name": "ref", **conf}) for conf in confs]


class Floor:
    """The kernel changes of one ADD and DEL of ours, as its own trace shows them, as a shell script of nothing but their commands."""

    def __init__(self, ours):
        ours.delete(0, ours.add(0)[0])  # the bridge and the masquerade stay, and are no part of the floor
        result, added = ours.add(0, CNI_TRACE="1")
        removed = ours.delete(0, result, CNI_TRACE="1")
        self.scripts = {"ADD": script_of(added), "DEL": script_of(removed)}

    def run(self, command):
        done = subprocess.run(["sh", "-e"], input=self.scripts[command], text=True, capture_output=True)
        if done.returncode:
            raise SystemExit(f"bench: the floor's {command} failed: {done.stderr}\n{self.scripts[command]}")


def script_of(trace):
    """The commands of a trace that change something, as a shell script."""
    return "".join(f"{mncni.Command(*command)}\n" for command in commands_that_change(trace))


def commands_of(trace):
    """[(argv, stdin)] of what CNI_TRACE=1 printed."""
    import shlex

    commands, lines = [], iter(trace.splitlines())
    for line in lines:
        if not line.startswith("+ "):
            continue
        words, stdin = line[2:], ""
        if words.endswith("<<'E'"):
            words = words[: -len("<<'E'")]
            for inner in lines:
                if inner == "E":
                    break
                stdin += inner + "\n"
        commands.append((shlex.split(words), stdin))
    return commands


def commands_that_change(trace):
    found = [(words, stdin) for words, stdin in commands_of(trace) if not {"-json", "-j", "show", "list"} & set(words)]
    return [(words, stdin) for words, stdin in found if words[0] != "mncni.py"]


# ---- measuring ----


def timed(act, *arguments):
    """(seconds, what act returned)."""
    begin = time.perf_counter()
    value = act(*arguments)
    return time.perf_counter() - begin, value


def cpu(act, *arguments):
    """(CPU seconds of the processes that act started and waited for, what it returned)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    value = act(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, value


def median_ms(times):
    return statistics.median(times) * 1000


def bench_calls(chains, rounds):
    """{(who, command): [seconds]} of rounds in turns; the first two warm up. CPU seconds under (who, "ADD CPU"), (who, "DEL CPU")."""
    times, floor = {}, Floor(chains["ours"])
    for number in range(rounds + 2):
        for who, chain in list(chains.items())[:: 1 if number % 2 else -1]:
            cpu_add, (add_s, (result, _)) = cpu(timed, chain.add, 1)
            check_s, _ = timed(chain.check, 1, result)
            cpu_del, (del_s, _) = cpu(timed, chain.delete, 1, result)
            measured = {"ADD": add_s, "CHECK": check_s, "DEL": del_s, "ADD CPU": cpu_add, "DEL CPU": cpu_del}
            measured["VERSION"] = timed(chain.ask, "VERSION")[0]
            if who != "reference":  # which knows no STATUS
                measured["STATUS"] = timed(chain.ask, "STATUS")[0]
            for command, seconds in measured.items():
                times.setdefault((who, command), []).append(seconds)
        for command in ("ADD", "DEL"):
            cpu_s, (seconds, _) = cpu(timed, floor.run, command)
            times.setdefault(("floor", command), []).append(seconds)
            times.setdefault(("floor", f"{command} CPU"), []).append(cpu_s)
    return {key: values[2:] for key, values in times.items()}


def bench_bursts(chains, sizes, rounds=3):
    """{(who, size): (seconds until the last of size pods is up, until the last is gone, CPU seconds until up)}, medians."""
    times = {}
    for size in sizes:
        for _ in range(rounds):
            for who, chain in chains.items():
                [chain.world.pod(number) for number in range(size)]
                with ThreadPoolExecutor(size) as pool:
                    up_cpu, (up_s, results) = cpu(timed, lambda chain=chain, pool=pool, size=size: list(pool.map(chain.add, range(size))))
                    work = [(number, result) for number, (result, _) in enumerate(results)]
                    down_s, _ = timed(lambda chain=chain, pool=pool, work=work: list(pool.map(lambda one: chain.delete(*one), work)))
                times.setdefault((who, size), []).append((up_s, down_s, up_cpu))
    return {key: tuple(statistics.median(column) for column in zip(*values)) for key, values in times.items()}


def bench_leases(world, counts, rounds):
    """{count of leases held by others: [seconds of an ADD]}, in turns. The pool is a /16 of which that many are taken."""
    confs = {}
    for count in counts:
        conf = our_conf(world, f"leases{count}", bridge="leases0", plugin="naivewg", ipMasq=False)
        leases = mncni.Leases(f"{world.tmp}/leases", f"leases{count}", f"{world.tmp}/run")
        subnet = mncni.ipaddress.ip_network("10.88.0.0/16")
        os.makedirs(leases.index_dir)
        for number in range(count):
            leases.take([subnet[number + 2]], f"other{number}", "eth0")
        if count:
            leases.set_last(0, subnet[count + 1])
        confs[count] = conf
    os.sync()  # or the first rounds wait for the disk
    times = {count: [] for count in counts}
    program = f"{world.tmp}/bin/mncni"
    for _ in range(rounds + 2):
        for count, conf in confs.items():
            seconds, _ = timed(world.call, "ADD", program, conf, "c1", world.pod(1))
            world.call("DEL", program, conf, "c1", world.pod(1))
            times[count].append(seconds)
    return {count: values[2:] for count, values in times.items()}


def bench_pods(chains, counts, rounds):
    """{(who, count of other pods that live): [(seconds, CPU seconds) of an ADD and a DEL]}; the others are ours."""
    times, ours, living = {}, chains["ours"], []
    for count in sorted(counts):
        while len(living) < count:
            living.append((1000 + len(living), ours.add(1000 + len(living))[0]))
        for _ in range(rounds):
            for who in {"ours", "before"} & set(chains):
                add_cpu, (add_s, (result, _)) = cpu(timed, chains[who].add, 1)
                del_cpu, (del_s, _) = cpu(timed, chains[who].delete, 1, result)
                times.setdefault((who, count), []).append((add_s + del_s, add_cpu + del_cpu))
    for number, result in living:
        ours.delete(number, result)
    return times


# ---- what comes of it ----


def print_table(title, head, rows, out):
    widths = [max(len(str(row[column])) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
    text = f"\n{title}\n\n" + "\n".join(lines) + "\n"
    print(text, flush=True)
    out.append(text)


def write_chart(name, title, bars):
    """An SVG with a bar for each (label, value)."""
    top, row, left, width = 40, 26, 260, 420
    highest = max(value for _, value in bars)
    size = f'width="{left + width + 90}" height="{top + row * len(bars) + 10}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">']
    parts.append(f'<text x="10" y="22" font-size="15" font-weight="bold">{title}</text>')
    for number, (label, value) in enumerate(bars):
        y, length = top + row * number, max(1, width * value / highest)
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{label}</text>')
        parts.append(
            f'<rect x="{left}" y="{y + 3}" width="{length:.0f}" height="{row - 8}" fill="{"#2f6f9f" if "ours" in label else "#b0b7bd"}"/>'
        )
        parts.append(f'<text x="{left + length + 6:.0f}" y="{y + 15}">{value:.3g}</text>')
    (OUT / f"{name}.svg").write_text("\n".join([*parts, "</svg>"]) + "\n")


WHAT = {
    "alone": "A pod with masquerade: naivewg alone, against bridge and host-local",
    "full": "A pod with masquerade, a host port and bandwidth limits: naivewg, portmap, bandwidth",
}
COMMANDS = ("ADD", "DEL", "CHECK", "STATUS", "VERSION", "ADD CPU", "DEL CPU")


def report_calls(world, kind, chains, rounds, ratios, out):
    times, rows = bench_calls(chains, rounds), []
    middle = {key: median_ms(values) for key, values in times.items()}
    for who in [*chains, "floor"]:
        counts = count_processes(world, chains[who]) if who in chains else ("-", "-")
        rows.append([who, *(f"{middle[who, command]:.1f}" if (who, command) in middle else "-" for command in COMMANDS), *counts])
    head = ["", *COMMANDS, "programs of an ADD", "of a DEL"]
    print_table(f"{WHAT[kind]}; ms (medians of {rounds} rounds in turns)", head, rows, out)
    compared = {"ADD + DEL": ("ADD", "DEL"), "CPU of ADD + DEL": ("ADD CPU", "DEL CPU"), **{name: (name,) for name in COMMANDS[:5]}}
    for against in [name for name in ("reference", "floor", "before") if (name, "ADD") in middle]:
        for name, commands in compared.items():
            if all((against, command) in middle for command in commands):
                figures = [sum(middle[who, command] for command in commands) for who in ("ours", against)]
                ratios[f"{kind}: {name}, ours / {against}"] = figures[0] / figures[1]
    bars = [(f"{who} {verb}", middle[who, verb]) for verb in ("ADD", "DEL") for who in [*chains, "floor"]]
    write_chart(f"calls-{kind}", f"ADD and DEL of a pod, {kind}, ms", bars)


def count_processes(world, chain):
    """How many programs an ADD and a DEL start."""
    added, (result, _) = world.processes(chain.add, 1)
    return added, world.processes(chain.delete, 1, result)[0]


def report_bursts(chains, ratios, out):
    sizes = (1, 10, 50, 110)
    chains = {who: chain for who, chain in chains.items() if who not in ("plain file", "unchecked")}
    times, names = bench_bursts(chains, sizes), list(chains)
    ways = ("up", "gone", "up, CPU")
    rows = [[size, *(f"{times[who, size][way]:.2f}" for way in range(3) for who in names)] for size in sizes]
    head = ["pods at once", *(f"{way}: {who}" for way in ways for who in names)]
    print_table("Seconds until the last pod is up, until the last is gone (medians of 3)", head, rows, out)
    for size in sizes:
        for against in names[1:]:
            for way, what in enumerate(ways):
                ratios[f"{size} pods at once {what}, ours / {against}"] = times["ours", size][way] / times[against, size][way]
    bars = [(f"{size} pods, {who}", times[who, size][0]) for size in sizes for who in names]
    write_chart("bursts", "Until the last pod is up, s", bars)


def report_leases(world, rounds, ratios, out):
    counts = (0, 1000, 60000)
    times = bench_leases(world, counts, rounds)
    rows = [[count, f"{median_ms(values):.1f}"] for count, values in times.items()]
    print_table("ADD of naivewg with so many leases held, ms", ["leases", "ADD"], rows, out)
    for count in counts[1:]:
        ratios[f"ADD with {count:,} leases / with none"] = median_ms(times[count]) / median_ms(times[0])
    write_chart("leases", "ADD with so many leases held, ms", [(f"{count:,} leases, ours", median_ms(times[count])) for count in counts])


def report_pods(chains, rounds, ratios, out):
    times = {key: list(map(median_ms, zip(*values))) for key, values in bench_pods(chains, (10, 200), rounds).items()}
    rows = [[who, count, *(f"{figure:.1f}" for figure in figures)] for (who, count), figures in sorted(times.items())]
    print_table("ADD + DEL while so many such pods live, ms", ["", "pods", "ADD + DEL", "CPU"], rows, out)
    # Of CPU time: the two cannot take turns, and so a busy machine is not busy for both.
    ratios["CPU of ADD + DEL with 200 pods / with 10"] = times["ours", 200][1] / times["ours", 10][1]
    bars = [(f"{count} pods, {who}", cpu_ms) for (who, count), (_, cpu_ms) in times.items()]
    write_chart("pods", "CPU of ADD + DEL while so many pods live, ms", bars)


def report_network(ratios, out):
    names = network.possible_ways()
    figures = {key: statistics.median(values) for key, values in network.bench_network(names=names).items()}
    rows = [[who, *(f"{figures[who, unit]:.2f}" if (who, unit) in figures else "-" for unit in network.UNITS)] for who in names]
    print_table("Between two nodes", ["", *network.UNITS], rows, out)
    ratios["throughput, bare WireGuard / pods"] = figures["bare", "Mbit/s"] / figures["ours", "Mbit/s"]
    ratios["latency, pods / bare WireGuard"] = figures["ours", "ms"] / figures["bare", "ms"]
    write_chart("network", "Between two nodes, Mbit/s", [(who, figures[who, "Mbit/s"]) for who in names])


def judge(ratios, out):
    """1 if a ratio is above its budget by more than the tolerance."""
    budgets = json.loads((HERE / "budgets.json").read_text())
    status, rows = 0, []
    for name, ratio in ratios.items():
        budget = budgets["ratios"].get(name)
        above = budget is not None and ratio > budget * TOLERANCE
        status |= above
        rows.append([name, f"{ratio:.2f}", "-" if budget is None else f"{budget:.2f}", "ABOVE" if above else ""])
    print_table(f"Ratios, and budgets of {budgets['date']} ({budgets['machine']})", ["", "now", "budget", ""], rows, out)
    return int(status)


def record_budgets(ratios):
    """Take over the ratios of this run; those of parts that did not run stay."""
    path = HERE / "budgets.json"
    kept = json.loads(path.read_text())["ratios"] if path.exists() else {}
    kept.update({name: round(ratio, 2) for name, ratio in ratios.items() if "before" not in name})
    machine = f"{os.cpu_count()} cores, Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
    path.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": machine, "ratios": kept}, indent=2) + "\n")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="calls,bursts,leases,pods,network", help="comma-separated parts")
    parser.add_argument("--before", default="", metavar="FILE", help="another mncni.py to compare with, in the same rounds")
    parser.add_argument("--record", action="store_true", help="write the ratios of this run as budgets")
    return parser.parse_args()


def run_parts(options, ratios, out):
    parts = options.only.split(",")
    with contextlib.ExitStack() as stack:
        tmp = tempfile.mkdtemp(prefix="mncni-bench-")
        stack.callback(shutil.rmtree, tmp)
        world = World(tmp)
        stack.callback(world.close)
        chains = {kind: make_chains(world, kind, options.before) for kind in WHAT}
        if "calls" in parts:
            for kind in WHAT:
                report_calls(world, kind, chains[kind], options.rounds, ratios, out)
        if "bursts" in parts:
            report_bursts(chains["full"], ratios, out)
        if "leases" in parts:
            report_leases(world, options.rounds, ratios, out)
        if "pods" in parts:
            report_pods(chains["full"], options.rounds, ratios, out)
        if "network" in parts:
            report_network(ratios, out)


def main():
    options = parse_options()
    if not REFERENCE:
        raise SystemExit("bench: needs the reference plugins: apt-get install containernetworking-plugins")
    if "MNCNI_BENCH" not in os.environ:  # a network namespace of its own, or each call would need one more program to enter one
        os.environ["MNCNI_BENCH"] = "inside"
        os.execvp("unshare", ["unshare", "--net", sys.executable, "-m", "tests.bench.bench", *sys.argv[1:]])
    OUT.mkdir(parents=True, exist_ok=True)
    ratios, out = {}, []
    run_parts(options, ratios, out)
    if options.record:
        record_budgets(ratios)
    status = judge(ratios, out)
    (OUT / "report.txt").write_text("".join(out))
    print(f"\nThe tables and charts are in {OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT}.")
    sys.exit(status)


if __name__ == "__main__":
    main()
