"""A host of one's own: network namespaces with the process ID in their names, gone after the test."""

import itertools
import json
import os
import subprocess

import pytest

import mncni
from tests.golden import Names

PLUGIN = os.path.realpath(mncni.__file__)
NUMBERS = itertools.count(1)


class Host:
    """A host namespace, pods, and directories; cni() calls the real plugin as a runtime would."""

    def __init__(self, tmp):
        self.tmp = str(tmp)
        self.names = Names(tmp)
        self.netns = f"mncni-{os.getpid()}-{next(NUMBERS)}"
        self.pods = []
        self.sh(f"ip netns add {self.netns}", inside=False)
        self.ip("link set lo up")

    def close(self):
        for name in [*self.pods, self.netns]:
            subprocess.run(["ip", "netns", "delete", name], check=False)

    def pod(self, name):
        """The path of a new pod's namespace."""
        full = f"{self.netns}-{name}"
        self.sh(f"ip netns add {full}", inside=False)
        self.pods.append(full)
        return f"/run/netns/{full}"

    def drop(self, path):
        """Delete a pod's namespace."""
        name = os.path.basename(path)
        self.pods.remove(name)
        self.sh(f"ip netns delete {name}", inside=False)

    def sh(self, command, inside=True, check=True, netns=None):
        """What a shell command prints, in the host's namespace or in the one at netns."""
        path = netns or f"/run/netns/{self.netns}"
        argv = [*(["nsenter", f"--net={path}"] if inside else []), "sh", "-c", command]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def ip(self, arguments, **options):
        return self.sh(f"ip {arguments}", **options)

    def pings(self, netns, address, count=3):
        """How many of count pings are answered."""
        out = self.sh(f"ping -c {count} -i 0.1 -W 2 {address}", netns=netns, check=False)
        return sum("bytes from" in line for line in out.splitlines())

    def conf(self, **keys):
        """A configuration of naivewg; None takes a key out."""
        conf = {
            "cniVersion": "1.1.0",
            "name": "net",
            "plugin": "naivewg",
            "ipam": {"dataDir": f"{self.tmp}/data", "ranges": [[{"subnet": "10.88.0.0/24"}]]},
        }
        return {key: value for key, value in {**conf, **keys}.items() if value is not None}

    def environ(self, command, container_id, netns, ifname):
        names = {"CNI_COMMAND": command, "CNI_CONTAINERID": container_id, "CNI_NETNS": netns, "CNI_IFNAME": ifname}
        return {**os.environ, **names, "CNI_PATH": "/opt/cni/bin:/usr/lib/cni", "MNCNI_RUN_DIR": f"{self.tmp}/run"}

    def start(self, command, conf, container_id="c1", netns="", ifname="eth0", program=PLUGIN, **environ):
        """The plugin as a running process (Popen) that has got its configuration."""
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.netns}", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environ(command, container_id, netns, ifname), **environ},
        )
        process.stdin.write(json.dumps(conf))
        process.stdin.close()
        process.stdin = None
        return process

    def cni(self, *arguments, **options):
        """(exit status, stdout as an object or None, stderr) of one call."""
        process = self.start(*arguments, **options)
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, json.loads(stdout) if stdout else None, stderr

    def add(self, conf, container_id="c1", netns="", ifname="eth0", **options):
        """The result of an ADD that has to work."""
        exit_code, result, stderr = self.cni("ADD", conf, container_id, netns, ifname, **options)
        assert exit_code == 0, (result, stderr)
        return result

    def snapshot(self):
        """Everything of the host that an attachment may change, as text; but not what the kernel's own fe80:: addresses bring, which come
        and go in their own time."""
        commands = ("ip -json link", "ip -json address", "ip -json route show table all", "ip -6 -json route show table all", "ip rule")
        volatile = ("ifindex", "stats64", "valid_life_time", "flags", "operstate", "promiscuity", "link_index")
        texts = []
        for command in commands:
            text = self.sh(command)
            if "json" in command:
                rows = [{key: value for key, value in row.items() if key not in volatile} for row in json.loads(text or "[]")]
                rows = [row for row in rows if not str(row.get("dst", "")).startswith(("fe80:", "ff00:"))]
                for row in rows:
                    row["addr_info"] = [info for info in row.get("addr_info", []) if not info.get("local", "").startswith("fe80:")]
                text = "\n".join(sorted(json.dumps(row, sort_keys=True) for row in rows))
            texts.append(text)
        return "\n".join([*texts, self.sh("nft list ruleset"), *self.files()])

    def files(self):
        """Paths of leases and temporary files; the lock and the round-robin marks stay by design."""
        found = []
        for directory, _, names in os.walk(self.tmp):
            if "run/attachments" in directory:
                continue  # locks
            lasting = [name for name in names if name in ("lock", "bridge.lock") or name.startswith(("last.", "masq-"))]
            found += [os.path.relpath(os.path.join(directory, name), self.tmp) for name in names if name not in lasting]
        return sorted(found)


@pytest.fixture
def host(tmp_path):
    made = Host(tmp_path)
    yield made
    made.close()
