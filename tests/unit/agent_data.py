"""Settings and node records for the tests of agent.py."""

import base64
import dataclasses
import ipaddress
import json

import agent

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


def key_of(number):
    """A well-formed WireGuard key, another for each number."""
    return base64.b64encode(number.to_bytes(32, "big")).decode()


def record(number=1, **changes):
    """A good record of node <number> as a dict, less its keys that are changed to `...`."""
    fields = {
        "v": 1,
        "podCIDRs": [f"10.244.{number}.0/24"],
        "uid": f"uid-{number}",
        "endpoints": [f"192.0.2.{number}"],
        "slots": {"0": {"key": key_of(number), "port": 28384}},
        "gen": 1,
        "created": "2024-01-01T00:00:00Z",
    }
    return {key: value for key, value in {**fields, **changes}.items() if value is not ...}


def text_of(number=1, **changes):
    return json.dumps(record(number, **changes))
