#!/usr/bin/env python3
"""Can this node enforce network policies? Exit status 0, or 1 and what is missing on stderr: the engine would run and judge nothing.

It asks the kernel for what the engine will ask for, which also loads modules, and changes nothing. Needs CAP_NET_ADMIN.
"""
import errno
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
    """A setting of a queue that there is not, which nobody can change then (ENODEV): to keep a verdict's label with its connection."""
    return message(QUEUES << 8 | 2, ANY, attribute(5, struct.pack("!I", 2)) + attribute(4, struct.pack("!I", 2)), ACK, resource=65535)


def ask(request):
    """0, or the number of the first error that the kernel answers."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETFILTER) as kernel:
        kernel.settimeout(60)  # for modules to load
        kernel.send(request)
        return -struct.unpack_from("=i", kernel.recv(65536), 16)[0]


def look_missing():
    """What this node lacks, and the way out, as lines."""
    missing = [] if os.path.exists(BRIDGED) else [
        "br_netfilter, without which packets between its pods pass unjudged: modprobe br_netfilter, also at boot (/etc/modules-load.d)"]
    rule, queue = ask(plan_rule()), ask(plan_queue())
    if rule:
        missing.append(f"nft_queue ({os.strerror(rule)}): {FIND.format('NFT_QUEUE')}")
    if queue == errno.EOPNOTSUPP:
        missing.append(f"the labels of nfnetlink_queue, without which answers are dropped: {FIND.format('NETFILTER_NETLINK_GLUE_CT')}")
    elif queue != errno.ENODEV:
        missing.append(f"nfnetlink_queue ({os.strerror(queue)}): {FIND.format('NETFILTER_NETLINK_QUEUE')}")
    return missing


if __name__ == "__main__":
    lines = look_missing()
    for line in lines:
        print(f"no network policy holds on this node, and the network goes on without: its kernel lacks {line}", file=sys.stderr)
    sys.exit(bool(lines))
