#!/usr/bin/env python3
"""Can this node enforce network policies? Exit status 0, or 1 and what is missing on stderr: the engine would run and judge nothing.

It asks the kernel for what the engine will ask for, which also loads modules, and changes nothing. Needs CAP_NET_ADMIN.
"""
import os
import socket
import struct
import sys

BRIDGED = "/proc/sys/net/bridge/bridge-nf-call-iptables"
FIND = "install the kernel's full set of modules (Ubuntu: linux-modules-extra), or a kernel with CONFIG_{0}"
NETFILTER, REQUEST, ACK, CREATE = 12, 1, 4, 0x400  # linux/netlink.h
NFTABLES, QUEUES = 10, 3  # subsystems, linux/netfilter/nfnetlink.h
NESTED, INET, ANY = 0x8000, 1, 0


def attribute(kind, value):
    """A netlink attribute, padded to 4 bytes."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind, family, body=b"", flags=0, resource=0):
    """A message of nfnetlink."""
    return struct.pack("=IHHIIBBH", 20 + len(body), kind, REQUEST | flags, 1, 0, family, 0, socket.htons(resource)) + body


TO_QUEUE = (b"queue\0", attribute(1, struct.pack("!H", 100)))  # the kind of a rule, and its own attributes


def plan_rule(kind=TO_QUEUE):
    """A table with a chain and a rule that queues. The batch has no end, so the kernel judges it and forgets it, as for `nft --check`."""
    table, chain = attribute(1, b"probe\0"), attribute(2, b"one\0")
    expression = attribute(1, kind[0]) + attribute(2 | NESTED, kind[1])
    rule = table + chain + attribute(4 | NESTED, attribute(1 | NESTED, expression))
    return b"".join((
        message(16, ANY, resource=NFTABLES),
        message(NFTABLES << 8, INET, table, CREATE),
        message(NFTABLES << 8 | 3, INET, table + attribute(3, b"one\0"), CREATE),
        message(NFTABLES << 8 | 6, INET, rule, CREATE | ACK),
    ))


def plan_queue():
    """A command to the queues that does nothing, since Linux 3.8: PF_BIND."""
    return message(QUEUES << 8 | 2, ANY, attribute(1, struct.pack("!BBH", 3, 0, socket.AF_INET)), ACK)


def ask(request):
    """0, or the number of the first error that the kernel answers."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETFILTER) as kernel:
        kernel.settimeout(60)  # for modules to load
        kernel.send(request)
        return -struct.unpack_from("=i", kernel.recv(65536), 16)[0]


def look_missing():
    """What this node lacks, as lines."""
    missing = [] if os.path.exists(BRIDGED) else [
        "br_netfilter: packets between its pods would pass unjudged; load it (modprobe br_netfilter), also at boot (/etc/modules-load.d)"]
    for module, option, request in (("nft_queue", "NFT_QUEUE", plan_rule()), ("nfnetlink_queue", "NETFILTER_NETLINK_QUEUE", plan_queue())):
        error = ask(request)
        if error:
            missing.append(f"{module} ({os.strerror(error)}): {FIND.format(option)}")
    return missing


if __name__ == "__main__":
    lines = look_missing()
    for line in lines:
        print(f"no network policy holds on this node, and the network goes on without: no kernel module {line}", file=sys.stderr)
    sys.exit(bool(lines))
