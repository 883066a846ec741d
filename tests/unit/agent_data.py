"""Settings, node records and a WireGuard device in memory, for the tests of agent.py."""

import base64
import dataclasses
import hashlib
import ipaddress
import json

import agent
import mncni

V4, V6 = ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("2001:db8::1")


def parse(*argv, environ=None):
    """Settings of `agent.py run` with these arguments."""
    parser = agent.build_parser(environ or {})
    return agent.parse_settings(parser, parser.parse_args(["run", *map(str, argv)]), environ or {})


def make_settings(families=(4, 6), **changes):
    """Settings of the node "self", which has the last /24 or /64 of the cluster CIDR."""
    argv = ["--node-name", "self", "--nodes-dir", "/nodes", "--endpoint", V4]
    cidrs = {4: ("10.244.0.0/16", "10.244.255.0/24"), 6: ("fd00:244::/32", "fd00:244:ffff::/64")}
    for version in families:
        argv += ["--cluster-cidr", cidrs[version][0], "--pod-cidr", cidrs[version][1]]
    return dataclasses.replace(parse(*argv), **changes)


class Kernel:
    """run() that answers look_ip by its lines: {line: what ip prints in JSON}; a line that is not there fails."""

    def __init__(self, replies):
        self.replies, self.asked = replies, []

    def __call__(self, command):
        lines = command.stdin.splitlines()
        self.asked += lines
        known = [self.replies[line] for line in lines if line in self.replies]
        failed = "" if len(known) == len(lines) else "RTNETLINK answers: Network is unreachable\nCommand failed -:1\n"
        return mncni.Reply(1 if failed else 0, "".join(json.dumps(reply) + "\n" for reply in known), failed)


def key_of(number):
    """A well-formed WireGuard key, another for each number."""
    return base64.b64encode(number.to_bytes(32, "big")).decode()


def public_of(private):
    """The public key of a private one, for FakeWireGuard: another for each."""
    return base64.b64encode(hashlib.sha256(private.encode()).digest()).decode()


def record(number=1, **changes):
    """A good record of node <number> as a dict, less its keys that are changed to `...`."""
    fields = {
        "v": 2,
        "podCIDRs": [f"10.244.{number}.0/24"],
        "uid": f"uid-{number}",
        "endpoints": [f"192.0.2.{number}"],
        "key": key_of(number),
        "port": 28384,
        "gen": 1,
        "created": "2024-01-01T00:00:00Z",
    }
    return {key: value for key, value in {**fields, **changes}.items() if value is not ...}


def text_of(number=1, **changes):
    return json.dumps(record(number, **changes))


FIREWALL = json.dumps({"nftables": [{"counter": {"name": "refused", "packets": 4, "bytes": 336}}]})


class FakeWireGuard:
    """run() that plays `wg` on a device in memory, beside a FIREWALL. log: every command, as its trace would show it."""

    def __init__(self):
        self.private, self.port, self.peers, self.log, self.broken = "", 0, {}, [], None

    def __call__(self, command):
        if agent.PYTHON in command.argv or command.environ.get("CNI_COMMAND") == "STATUS":
            return mncni.Reply(0, "", "")  # the plugin, which works
        if command.argv[:3] == ["nft", "-j", "list"]:
            return mncni.Reply(0, FIREWALL, "")
        self.log.append(str(command))
        if command.argv == ["wg", "pubkey"]:
            return mncni.Reply(0, public_of(command.stdin) + "\n", "")
        assert command.argv[:2] == ["nsenter", "--net=/run/netns/mncni-wg"] and command.argv[2] == "wg", command
        verb, _, *words = command.argv[3:]
        if self.broken is not None:
            return mncni.Reply(*self.broken)
        return mncni.Reply(0, self.dump() if verb == "show" else self.set(words), "")

    def public(self):
        return public_of(self.private) if self.private else "(none)"

    def dump(self):
        lines = [[self.private or "(none)", self.public(), str(self.port), "off"]]
        for key, fields in self.peers.items():
            lines.append([key, "(none)", fields["endpoint"], fields["allowed-ips"], fields["handshake"], "0", "0", "off"])
        return "".join("\t".join(words) + "\n" for words in lines)

    def set(self, words):
        peer = None
        while words:
            name = words.pop(0)
            if name == "listen-port":
                self.port = int(words.pop(0))
            elif name == "private-key":
                self.private = mncni.read_file(words.pop(0)).strip()
            elif name == "peer":
                peer = words.pop(0)
                self.peers.setdefault(peer, {"endpoint": "(none)", "allowed-ips": "(none)", "handshake": "0"})
            elif name == "remove":
                del self.peers[peer]
            else:
                self.peers[peer][name] = words.pop(0)
        return ""

    def writes(self):
        """The commands so far that change the device; forgets them."""
        found = [line.partition(" wg ")[2] for line in self.log if " wg set " in line]
        self.log.clear()
        return found

    def names(self):
        """The numbers of the peers, see key_of."""
        return sorted(int.from_bytes(base64.b64decode(key), "big") for key in self.peers)
