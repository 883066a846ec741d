"""What commands may look like, whatever the input was: every word that comes from outside has the shape of what it stands for.

inspect(command) raises AssertionError for a command that is none of these, has a line or statement too many, or a word of another shape.
"""

import re

import agent
import mncni

WORDS = {
    "NAME": r"""(?!\.{1,2}(?![^\s/:"'\\#*]))[^\s/:"'\\#*\x00-\x1f\x7f-\xa0]{1,15}""",
    "MAC": r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}",
    "PREFIX": r"[0-9a-f.:]{2,43}/\d{1,3}",
    "ADDRESS": r"[0-9a-f.:]{2,43}",
    "ENDS": r"[0-9a-f.:]{2,43}(?:/\d{1,3})?",
    "NUMBER": r"\d{1,10}",
    "NETNS": r"/[^\s\"'\\#]*",
    "ID": r"[A-Za-z0-9][A-Za-z0-9_.-]*",
    "KEY": r"[A-Za-z0-9+/]{43}=",
    "HASH": r"[0-9a-f]{16}",
    "ENDPOINT": r"(?:\d{1,3}(?:\.\d{1,3}){3}|\[[0-9a-f:]{2,39}\]):\d{1,5}",
    "FAMILY": r"(?:ip|ip6)",
    "PROTOCOL": r"(?:tcp|udp|sctp)",
    "SYSCTL": r"/proc/sys/net/(?:ipv4/ip_forward|ipv[46]/conf/(?!\.{1,2}/)[^\s/:\"'\\#*]{1,15}/[a-z0-9_]+)",
}
ALIAS = "mncni(?::<ID>:<ID>:<NAME>)?"
METRICS = "(?: (?:mtu|advmss|metric|table|scope) <NUMBER>)*"
IP_LINES = (
    "route show default",
    *("(?:address|link) show(?: dev <NAME>| scope global)?", "link show type (?:veth|ifb)", "netconf show"),
    *("route show table (?:all(?: default| root <PREFIX>)?|main proto 201)", "route get <ADDRESS>"),
    "link add name <NAME> (?:mtu <NUMBER> )?address <MAC> type bridge(?: no_linklocal_learn 1)?",
    "link add name mncni-wg0 type wireguard",
    "link add name <NAME> (?:mtu <NUMBER> )?address <MAC> type veth peer name <NAME> netns <NETNS> (?:mtu <NUMBER> )?address <MAC>",
    *("link (?:set dev <NAME>|delete) group <NUMBER>",
    "link add name <NAME> mtu <NUMBER> (?:address <MAC> )?type ifb", "link set dev <NAME>(?: mtu <NUMBER>)?(?: up)?",
        "link delete dev <NAME>"),
    *(f"link set dev <NAME> alias {ALIAS}(?: master <NAME>)?(?: up)?", "link set dev <NAME> master <NAME> up"),
    *("link set dev <NAME> type bridge no_linklocal_learn 1",
    "link set dev <NAME> type bridge_slave(?: hairpin on)?(?: guard on group_fwd_mask 0xfffd)?", "link set dev mncni-wg0 netns <NETNS>"),
    *("address (?:delete|replace) <PREFIX> dev <NAME>(?: nodad)?", r"address add <PREFIX> dev <NAME> (?:nodad|brd \+)"),
    f"route prepend <PREFIX>(?: via <ADDRESS>)? dev <NAME>{METRICS}",
    "route (?:replace|delete) (?:[A-Za-z]+ )?<PREFIX>(?: via <ADDRESS>)?(?: dev <NAME>)?(?: src "
    "<ADDRESS>)?(?: metric <NUMBER>)?"
    "(?: onlink)? proto 201",
    "rule show",
    "rule (?:add|delete) to <PREFIX> priority 28[45] (?:unreachable|lookup main suppress_prefixlength <NUMBER>) protocol 201",
    r"route replace [^\s-][^\n]* dev <NAME> quickack 1",  # in ip's own words
)
TC_LINES = (
    "qdisc replace dev <NAME> root tbf rate \\d{1,19}bit burst \\d{1,20}b limit \\d{1,20}b",
    *(
        "qdisc add dev <NAME> ingress",
        "filter add dev <NAME> ingress protocol all u32 match u32 0 0 action mirred egress redirect dev <NAME>",
    ),
)
OWN = '\\{ "<NAME>", "mncni-host", "lo" \\}'  # the interfaces of the cluster's packets
NFT_LINES = (
    *(
        "table inet mncni_portmap(?: \\{)?",
        "delete table inet mncni_portmap",
        "\\}",
        "  \\}",
    ),
    "  chain [a-z]+ \\{(?:(?: type (?:nat|filter) hook [a-z]+ priority -?\\d+;)? \\})?",
    *(
        f'add rule inet mncni_portmap {rule} comment "<HASH> {owner}"'
        for rule, owner in (
            (
                "ports (?:<FAMILY> daddr <ADDRESS>|meta nfproto ipv[46]) <PROTOCOL> dport <NUMBER> "
                "dnat <FAMILY> to (?:<ADDRESS>|\\[<ADDRESS>\\]):<NUMBER>",
                "<ID>:<ID>:<NAME>",
            ),
            (
                "(?:prerouting|output) fib daddr type local <FAMILY> daddr (?:127.0.0.0/8|\\{ <ADDRESS>(?:, <ADDRESS>)* \\}) jump ports",
                "all",
            ),
            (
                "postrouting ct status dnat <FAMILY> saddr <PREFIX> <FAMILY> daddr <PREFIX> "
                "ct original <FAMILY> daddr \\{ <ADDRESS>(?:, <ADDRESS>)* \\} masquerade fully-random",
                "all",
            ),
            ('postrouting ct status dnat ip saddr 127.0.0.0/8 oifname "<NAME>" masquerade fully-random', "all"),
            (
                'replies iifname "<NAME>" ct status dnat ct direction reply ct original ip [sd]addr 127.0.0.0/8 '
                "meta mark set meta mark \\| 0x1270000",
                "all",
            ),
            ('guard iifname "<NAME>" ip [sd]addr 127.0.0.0/8 drop', "all"),
        )
    ),
    *map(re.escape, mncni.SPOOF_CHAINS.split("\n")),
    *(re.escape(f"add rule {mncni.SPOOF} {chain} {rule} comment ") + '"<HASH>"' for chain, rule in mncni.SPOOF_RULES),
    'add rule bridge mncni_spoof <NAME> [a-z0-9:.,{}@!=_ ]+ comment "<HASH>"',  # of one pod
    "(?:add|flush|delete) chain bridge mncni_spoof <NAME>",
    '(?:add|delete) element bridge mncni_spoof pods \\{ "<NAME>"(?: : jump <NAME>)? \\}',
    "table bridge mncni_spoof \\{ map pods \\{ type ifname : verdict; \\}; \\}",
    "(?:create |delete )?table bridge mncni_spoof",
    "flush table inet mncni_portmap",
    "create table inet mncni_portmap",
    "add table inet mncni_masq",
    "(?:add|flush) chain inet mncni_masq (?:net|last)_<HASH>"
    "(?: \\{ type (?:nat|filter) hook postrouting priority srcnat(?: \\+ 10)?; policy accept; \\})?",
    'add rule inet mncni_masq last_<HASH> tcp flags & rst == rst ct state invalid drop comment "<ID> <HASH>"',
    "add set inet mncni_masq pods[46]_<HASH> \\{ type ipv[46]_addr; flags interval; auto-merge; \\}",
    "flush set inet mncni_masq pods[46]_<HASH>",
    "delete (?:chain|set) inet mncni_masq (?:net|last|pods4|pods6)_<HASH>",
    "add element inet mncni_masq pods[46]_<HASH> \\{ <PREFIX> \\}",
    "add rule inet mncni_masq (?:net|last)_<HASH> <FAMILY> saddr @pods[46]_<HASH> <FAMILY> daddr != @pods[46]_<HASH> <FAMILY> daddr != "
    '\\{ <PREFIX>(?:, <PREFIX>)* \\} (?:masquerade fully-random|drop) comment "<ID> <HASH>"',
    # the agent's
    *("(?:delete )?table inet mncni(?: \\{)?", "  counter (?:leaked|refused) \\{ packets \\d+ bytes \\d+ \\}"),
    "    type (?:nat|filter) hook [a-z]+ priority [a-z]+(?: [-+] 10)?; policy (?:accept|drop);",
    f"    [io]ifname != {OWN} <FAMILY> [sd]addr <PREFIX>(?: counter name (?:leaked|refused))? drop",
    f"    iifname != {OWN} <FAMILY> daddr <PREFIX> ct direction reply accept",
    f'    iifname != {OWN} oifname \\{{ "<NAME>", "mncni-host" \\}} (?:ct [a-z]+ (?:dnat|reply) accept|counter name refused drop)',
    '    iifname "<NAME>" (?:meta nfproto ipv[46]|<FAMILY> saddr <ADDRESS>|<FAMILY> [sd]addr(?: != <PREFIX>(?: ip6 [sd]addr)?)+'
    "(?: ip6 [sd]addr != [a-z0-9:/]+)*) drop",
    '    oifname "mncni-host"(?: <FAMILY> saddr != <PREFIX>)+ snat <FAMILY> to <ADDRESS> fully-random',
    f"    (?:oifname != {OWN} )?<FAMILY> saddr <PREFIX>(?: <FAMILY> daddr != <PREFIX>)+ (?:masquerade fully-random|drop)",
    "    tcp flags & rst == rst ct state invalid drop",
    '    iifname "mncni-(?:ns|wg0)" oifname "mncni-(?:wg0|ns)"(?: <FAMILY> daddr <PREFIX>)? accept',
    '    iifname "mncni-ns" icmpv6 type \\{ nd-neighbor-solicit, nd-neighbor-advert \\} accept',
)
COMMANDS = (  # the whole argv, its words joined by NUL
    "ip(?: -force| -[46])? -batch -",
    "ip -json -details(?: -[46])? -force -batch -",
    "tc -batch -",
    "nft -f -",
    "ip link delete dev <NAME>",
    "nft -j list counter bridge mncni_spoof dropped",
    "nft -j list table (?:inet mncni(?:_portmap|_masq)?|bridge mncni_spoof)",
    "tc -json (?:qdisc|filter) show dev <NAME>(?: ingress)?(?: pref 127)?",
    "tc qdisc add dev <NAME> ingress",
    "tc filter replace dev <NAME> ingress pref 127 handle 1 protocol ip bpf bytecode [0-9,\\s]+ action mirred egress redirect dev <NAME>",
    "ip -[46] -oneline route show table all type unicast dev <NAME>",
    "tc qdisc replace dev <NAME> root netem(?: [a-z0-9.%]+)+",
    "tc qdisc delete dev <NAME> root",
    "tc qdisc add dev <NAME> ingress",
    "tc filter replace dev <NAME> ingress pref 127 handle 1 protocol ip bpf bytecode [0-9,\\x20]+ action mirred egress redirect dev <NAME>",
    "tc -json filter show dev <NAME> ingress pref 127",
    "tc filter delete dev <NAME> ingress pref 127",
    "tee(?: <SYSCTL>)+",
    "mncni.py forget-flows(?: (?:<ADDRESS>/)?<NUMBER>)+",
    "ip netns (?:add|delete) <NAME>",
    "wg show mncni-wg0 dump",
    "nft delete table inet mncni(?:_portmap)?",
    "wg set mncni-wg0(?: listen-port <NUMBER>)?(?: private-key /[^ ]+)?"
    "(?: peer <KEY>(?: remove)?(?: endpoint <ENDPOINT>)?(?: allowed-ips <PREFIX>(?:,<PREFIX>)*)?(?: persistent-keepalive [01])?)*",
)


def compiled(*patterns):
    text = "|".join(f"(?:{pattern})" for pattern in patterns)
    for word, pattern in WORDS.items():
        text = text.replace(f"<{word}>", f"(?:{pattern})")
    return re.compile(text)


BATCHES = {"ip": compiled(*IP_LINES), "tc": compiled(*TC_LINES), "nft": compiled(*NFT_LINES), "tee": re.compile("[012]")}
ARGV = compiled(*(pattern.replace(" ", "\0").replace("[^\0]", "[^\0 ]") for pattern in COMMANDS))


def inspect(command):
    argv = command.argv
    assert argv and all(isinstance(word, str) and word and "\0" not in word for word in argv), f"no argv: {argv!r}"
    if argv[0] == "nsenter":
        assert re.fullmatch(r"--net=/[^\0]*", argv[1]), f"another namespace: {argv!r}"
        argv = argv[2:]
    if argv == ["/usr/bin/python3", "-IS", "-c", agent.OLD_PYTHON]:
        return
    if argv[0].startswith("/"):  # a delegate, or the installed plugin when the agent tries it
        is_known = set(command.environ) in ({"CNI_COMMAND"}, {"CNI_COMMAND", "CNI_PATH"})
        assert len(argv) == 1 and is_known, f"no delegate's call: {argv!r}"
        assert command.stdin.count("\n") == 0
        return
    assert ARGV.fullmatch("\0".join(argv)), f"no command of ours: {argv!r}"[:2000]
    assert not command.environ
    is_batch = argv[0] in BATCHES and (argv[0] == "tee" or argv[-2:] in (["-batch", "-"], ["-f", "-"]))
    assert is_batch or not command.stdin, f"{argv} gets {command.stdin!r}"
    for line in command.stdin.split("\n")[:-1] if is_batch else ():
        assert BATCHES[argv[0]].fullmatch(line), f"{argv[0]} would get a line of no shape of tests/faults/shapes.py: {line!r}"[:2000]
    assert not is_batch or command.stdin.endswith("\n"), f"{argv} gets a line without an end"
