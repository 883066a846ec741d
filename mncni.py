#!/usr/bin/python3 -IS
"""MNCNI: a CNI plugin in one file, for people who run it and for people who read it.

CNI, the Container Network Interface, is how a container runtime (containerd, CRI-O, podman) asks for a network. The runtime has made a
network namespace for a pod (Kubernetes' word for containers that share one) and wants it connected. It starts a plugin, an ordinary
program, in the host's namespace. The command and the attachment are environment variables; the network configuration is JSON on standard
input. The plugin changes the kernel, prints JSON on standard output, and ends: nothing stays running. An attachment is one interface of
one container in one network. The plugin keeps no handle on it: it must find everything again from the network's name, the container ID
and the interface's name.

A file in /etc/cni/net.d, a conflist, names the plugins of a network (conf/ has examples). The runtime calls them one after the other, and
each gets the result of the one before as "prevResult". The first makes the interface. The others are chained plugins: they change it, or
add to it.

    CNI_COMMAND   what the runtime wants                                 what the plugin prints
    ADD           connect CNI_IFNAME in CNI_NETNS                        a result: interfaces, addresses, routes, DNS
    DEL           remove the attachment, as often as asked               nothing
    CHECK         is everything that ADD made still there?               nothing, or an error that names what is missing
    GC            remove every attachment that is not in this list       nothing
    STATUS        could ADD work now?                                    nothing, or error 50 or 51
    VERSION       which versions of the protocol do you speak?           the list

By hand, as root (this makes the bridge mncni0 and switches IP forwarding on). CNI_TRACE=1 prints each command that the plugin runs,
and why:

    ip netns add pod
    export CNI_CONTAINERID=c1 CNI_NETNS=/run/netns/pod CNI_IFNAME=eth0 CNI_TRACE=1
    conf='{"cniVersion": "1.1.0", "name": "net", "plugin": "naivewg", "ipam": {"ranges": [[{"subnet": "10.88.0.0/24"}]]}}'
    CNI_COMMAND=ADD ./mncni.py <<<"$conf"
    CNI_COMMAND=DEL ./mncni.py <<<"$conf"
    ip netns delete pod; ip link delete mncni0

Reading order: top to bottom. For the protocol alone, stop after "Dispatch". To write a plugin, read "Commands" and copy loopback or
quickack. Every plugin has the same parts. `parse_*` functions check the configuration, `look_*` run commands that only read, `plan_*` are
pure and return the commands to run, `apply` runs them. `run`, which starts a process, is always a parameter: tests pass a recorder.
The plumbing is at the end, and the rest can be understood without it.

Specification: https://www.cni.dev/docs/spec/ (SPEC below), version 1.1.0. CONVENTIONS is its companion on capabilities and CNI_ARGS.
"""

import fcntl
import ipaddress
import os
import select
import sys
import time
from collections import namedtuple

# ---------------------------------------------------------------------------------------------------------------------
# Constants and errors                                                                              SPEC section 5, Error
# ---------------------------------------------------------------------------------------------------------------------

PROGRAM_VERSION = "0.1.0"
CNI_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST = CNI_VERSIONS[-1]
DEFAULT_DATA_DIR = "/var/lib/cni/mncni"
DEFAULT_RUN_DIR = "/run/mncni"
DEFAULT_BIN_DIR = "/opt/cni/bin"
DEFAULT_CONF_DIR = "/etc/cni/net.d"
OWNER_ALIAS = "mncni"  # the alias (ip-link(8)) of every link that MNCNI made; a link without it belongs to somebody else

# 8 and 999 come from libcni, the Go library that runtimes call plugins with; the others from the specification.
INCOMPATIBLE_VERSION, UNSUPPORTED_FIELD, BAD_ENVIRONMENT, IO_FAILURE, DECODE_FAILURE, BAD_CONFIG = 1, 2, 4, 5, 6, 7
BAD_NETNS, TRY_AGAIN, NOT_AVAILABLE, LIMITED_CONNECTIVITY, COMMAND_FAILED, INTERNAL = 8, 11, 50, 51, 100, 999


class CNIError(Exception):
    """An error as the runtime gets it: code, msg (one line: the act, the value, the way out), details (may be long)."""

    def __init__(self, code, msg, details=""):
        super().__init__(msg)
        if type(code) is not int or code < 1:
            raise TypeError(f"the code of a CNIError is a number from 1, not {code!r}")
        self.code, self.msg, self.details = code, str(msg), str(details)


def config_error(msg, details=""):
    """CNIError 7: the configuration is wrong."""
    return CNIError(BAD_CONFIG, msg, details)


# ---------------------------------------------------------------------------------------------------------------------
# Request                                                                  SPEC section 2, Parameters; section 3, stdin
# ---------------------------------------------------------------------------------------------------------------------


class Request:
    """One call of the runtime, checked as far as the protocol goes.

    command, container_id, netns, ifname: the CNI_* variables ("" when absent); netns is the path of the pod's network namespace.
    args: CNI_ARGS ("K=V;K2=V2") as a dict; a part that is no pair is ignored, it must not make a DEL fail. path: the directories of
    CNI_PATH, where plugins are. run_dir: the directory for state that a reboot ends. data_dir: the default directory for leases. conf: the
    network configuration (dict). network: its name. attachment: (network, container ID, interface). prev_result: the result of the plugin
    before this one, as a 1.1.0 dict, or None. at_once: independent commands may run at the same time. links: the names of the links on the
    host that the plugins of this call make. leave_nft: the function of that name of one of them, see Dispatch. new_peer: {"ifname", "mtu"}
    of the host's end of the pod's interface, if a plugin of this call has just made it.
    """

    def __init__(self, environ, conf, at_once=False):
        self.command = environ["CNI_COMMAND"]
        self.container_id = environ.get("CNI_CONTAINERID", "")
        self.netns = environ.get("CNI_NETNS", "")
        self.ifname = environ.get("CNI_IFNAME", "")
        self.args = dict(pair.split("=", 1) for pair in environ.get("CNI_ARGS", "").split(";") if "=" in pair)
        self.path = [part for part in environ.get("CNI_PATH", "").split(":") if part]
        self.run_dir = environ.get("MNCNI_RUN_DIR") or DEFAULT_RUN_DIR
        self.data_dir = environ.get("MNCNI_DATA_DIR") or DEFAULT_DATA_DIR
        self.conf, self.network = conf, conf["name"]
        self.attachment = (self.network, self.container_id, self.ifname)
        self.prev_result, self.at_once = None, at_once
        self.links, self.leave_nft, self.new_peer = [], leave_nft, None


HEX = frozenset("0123456789abcdef")
SPECIAL = frozenset("\"'\\#")  # characters, besides white space, that mean something to `ip -batch`, which reads a command a line
ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def is_identifier(text):
    """Whether text can be a container ID or a network name: a letter or digit, then letters, digits, "_", ".", "-"."""
    return isinstance(text, str) and bool(text) and text[0] not in "_.-" and ID_CHARACTERS.issuperset(text)


def is_ifname(text):
    """Whether text can name an interface: the kernel's rule (dev_valid_name), without the characters that `ip -batch` or nft interpret."""
    fits = isinstance(text, str) and text not in ("", ".", "..") and len(text.encode("utf-8", "replace")) <= 15
    return fits and is_word(text) and frozenset("/:*").isdisjoint(text)


def is_word(text):
    """Whether `ip -batch` reads text as one literal word."""
    return SPECIAL.isdisjoint(text) and text.isprintable() and " " not in text  # of white space only " " is printable


def is_netns(text):
    """Whether text can be the path of a network namespace: absolute, and one word of a batch."""
    return text.startswith("/") and is_word(text)


# The variables that a command needs, besides CNI_COMMAND. GC, STATUS and VERSION are about no attachment.
ATTACHMENT = {"CNI_CONTAINERID": is_identifier, "CNI_NETNS": is_netns, "CNI_IFNAME": is_ifname}
REQUIRED = {"ADD": ATTACHMENT, "CHECK": ATTACHMENT, "DEL": {"CNI_CONTAINERID": is_identifier, "CNI_IFNAME": is_ifname}}


def check_environment(environ):
    """CNIError 4 for malformed CNI_* variables, or for missing ones, all at once. SPEC section 2, Parameters."""
    required = REQUIRED.get(environ.get("CNI_COMMAND", ""), {})
    for name, is_valid in required.items():
        value = environ.get(name, "")
        if value and not is_valid(value):
            raise CNIError(BAD_ENVIRONMENT, f"{name} is malformed: {value!r}", value)
    missing = [name for name in ("CNI_COMMAND", *required) if not environ.get(name)]
    if missing:
        raise CNIError(BAD_ENVIRONMENT, f"required environment variables missing: [{','.join(missing)}]")


def parse_json_object(text, what="the network configuration on stdin"):
    """The dict in a JSON text. CNIError 6, naming `what`, for anything else: no UTF-8, no JSON, no object, nested too deep."""
    if not text.strip():
        raise CNIError(DECODE_FAILURE, f"cannot decode {what}: it is empty")
    try:
        text.encode("utf-8")
        value = parse_json(text)
    except (ValueError, RecursionError) as error:  # UnicodeError and JSONDecodeError are ValueErrors
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error) or type(error).__name__
        raise CNIError(DECODE_FAILURE, f"cannot decode {what}: {why}") from None
    if not isinstance(value, dict):
        raise CNIError(DECODE_FAILURE, f"{what} is not a JSON object but {kind_of(value)}")
    return value


def parse_conf(text):
    """The network configuration, with its "name" and "cniVersion" checked for form. CNIError 6 or 7. SPEC section 1."""
    conf = parse_json_object(text)
    for key in ("name", "cniVersion"):
        if not isinstance(conf.get(key, ""), str):
            raise CNIError(DECODE_FAILURE, f'"{key}" must be a string, not {kind_of(conf[key])}')
    if not conf.get("name"):
        raise config_error('the network configuration has no "name"')
    if not is_identifier(conf["name"]) or len(conf["name"]) > 200:  # it becomes a directory's name and part of a link's alias
        raise config_error(f'"name" must be letters, digits, "_", ".", "-", 200 at most, not {conf["name"]!r}')
    conf["cniVersion"] = conf.get("cniVersion") or "0.1.0"  # the version that its absence means, SPEC section 1
    return conf


def kind_of(value):
    """The JSON type of a value, for messages."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def typed(mapping, key, kind, default):
    """mapping[key], or default where it is absent or null. CNIError 7 if its type is not `kind`: dict, list, str, bool or int."""
    value = mapping.get(key)
    if value is None:
        return default
    if type(value) is not kind:  # not isinstance: in Python True is an int
        raise config_error(f'"{key}" must be {kind_of(kind())}, not {kind_of(value)} ({to_json(value)[:80]})')
    return value


def number(mapping, key, default, lowest, highest):
    """mapping[key], an integer, or default where it is absent or null. CNIError 7 if it is no integer or out of bounds."""
    value = typed(mapping, key, int, default)
    if value is not None and not lowest <= value <= highest:
        raise config_error(f'"{key}" must be {lowest} to {highest}, not {value}')
    return value


def any_case(mapping, key):
    """mapping[key], ignoring the case of keys, or None. containerd capitalises the keys below runtimeConfig."""
    if not isinstance(mapping, dict):
        return None
    lowered = {name.lower(): value for name, value in mapping.items()}
    return mapping.get(key, lowered.get(key.lower()))


def runtime_config(request, key, kind, default):
    """runtimeConfig[key], checked as in `typed`: what the runtime supplies because the conflist declares the capability `key`, for example
    host ports for "portMappings". CONVENTIONS."""
    return typed({key: any_case(any_case(request.conf, "runtimeConfig"), key)}, key, kind, default)


def requested(request, key, name):
    """What the caller asks for, or None: the first there is of runtimeConfig[key], args.cni[key], name in CNI_ARGS. CONVENTIONS."""
    args = any_case(any_case(request.conf, "args"), "cni")
    return any_case(any_case(request.conf, "runtimeConfig"), key) or any_case(args, key) or request.args.get(name)


def valid_attachments(request):
    """The attachments that GC must keep, as a set of (container ID, interface). CNIError 7 if the list is malformed. SPEC section 2, GC.

    None means that the runtime sent no list, so nothing may be removed. A list of null or [] means that nothing is valid.
    """
    key = next((key for key in ("cni.dev/valid-attachments", "cni.dev/attachments") if key in request.conf), None)
    if key is None:
        return None
    pairs = [(any_case(entry, "containerID"), any_case(entry, "ifname")) for entry in typed(request.conf, key, list, [])]
    if not all(isinstance(item, str) and item for pair in pairs for item in pair):
        raise config_error(f'"{key}" must list objects with "containerID" and "ifname"', to_json(request.conf[key]))
    return set(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Results and their versions                                                                      SPEC section 5, Success
# ---------------------------------------------------------------------------------------------------------------------
# What an ADD returns, for example:
#
#     {"cniVersion": "1.1.0",
#      "interfaces": [{"name": "mncni0", "mac": "0a:58:0a:58:00:01"}, {"name": "eth0", "mac": "...", "sandbox": "/run/netns/pod"}],
#      "ips": [{"address": "10.88.0.2/24", "gateway": "10.88.0.1", "interface": 1}], "routes": [{"dst": "0.0.0.0/0", "gw": "10.88.0.1"}]}
#
# An interface with a "sandbox" is in the pod, one without it is on the host. "interface" is an index into "interfaces". In this program a
# result is always a 1.1.0 dict with the specification's keys. Unknown keys pass through untouched.

ROUTE_WORDS = {"mtu": "mtu", "advmss": "advmss", "priority": "metric", "table": "table", "scope": "scope"}  # key of a route -> of `ip`


def to_newest(result):
    """A result of any version as a 1.1.0 result: without the address family ("version") that each address had before 1.0.0."""
    return {**result, "cniVersion": NEWEST, "ips": [without(ip, "version") for ip in result.get("ips") or []]}


def result_to_version(result, version):
    """A 1.1.0 result in an older version: without the keys that are new in 1.1.0; before 1.0.0, with each address's family."""
    result = {**result, "cniVersion": version}
    if version != "1.1.0":
        result["interfaces"] = [without(link, "mtu", "socketPath", "pciID") for link in result.get("interfaces") or []]
        result["routes"] = [without(route, *ROUTE_WORDS) for route in result.get("routes") or []]
    if version.startswith("0."):
        result["ips"] = [{"version": "6" if ":" in ip["address"] else "4", **ip} for ip in result.get("ips") or []]
    return {key: value for key, value in result.items() if value or key == "cniVersion"}


def without(mapping, *keys):
    """A copy of a dict without some keys."""
    return {key: value for key, value in mapping.items() if key not in keys}


def parse_prev_result(conf):
    """The configuration's prevResult as a 1.1.0 result, None where there is none. CNIError 7 if it is malformed. SPEC section 3."""
    return parse_result(typed(conf, "prevResult", dict, {}), '"prevResult"')


def parse_result(result, what):
    """A result of any version as a 1.1.0 result, None if it is empty. CNIError 7 if it is malformed."""
    for key in ("interfaces", "ips", "routes"):
        if not all(isinstance(item, dict) for item in typed(result, key, list, [])):
            raise config_error(f'{what} is no result: "{key}" must be an array of objects')
    for ip in result.get("ips") or []:
        index = ip.get("interface")
        if not is_address(ip.get("address"), ipaddress.ip_interface) or "/" not in ip["address"]:
            raise config_error(f"{what} is no result: {ip.get('address')!r} is not an address with its prefix length")
        if index is not None and (type(index) is not int or not 0 <= index < len(result.get("interfaces") or [])):
            raise config_error(f'{what} is no result: "interface" {index!r} is not an index into its interfaces')
    return to_newest(result) if result else None


def merge_results(prev_result, own):
    """prev_result with this plugin's interfaces, addresses and routes appended. SPEC section 2, ADD."""
    if prev_result is None:
        return own
    offset = len(prev_result.get("interfaces") or [])
    own = {**own, "ips": [{**ip, "interface": ip["interface"] + offset} for ip in own["ips"]]}
    lists = {key: (prev_result.get(key) or []) + own[key] for key in ("interfaces", "ips", "routes")}
    return {**prev_result, **lists, "dns": own["dns"] or prev_result.get("dns")}


def own_links(request):
    """CNI_IFNAME in the container as prevResult lists it: {index in its interfaces: interface}. Without prevResult there is none."""
    links = enumerate((request.prev_result or {}).get("interfaces") or [])
    return {index: link for index, link in links if link.get("name") == request.ifname and link.get("sandbox")}


def own_ips(request):
    """The addresses of CNI_IFNAME in prevResult."""
    return [ip for ip in (request.prev_result or {"ips": []})["ips"] if ip.get("interface") in own_links(request)]


def host_links(request):
    """The names of prevResult's interfaces on the host, in its order."""
    links = (request.prev_result or {}).get("interfaces") or []
    return [link["name"] for link in links if not link.get("sandbox") and is_ifname(link.get("name"))]


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch                                                                              SPEC section 2, Execution Protocol
# ---------------------------------------------------------------------------------------------------------------------
# The key "plugin" of the configuration names one plugin of this file, or a list of them: then this program calls them one after the other,
# as a runtime would. A stage is one plugin of that list, an entry of the plugin table: {"ADD": function(request, run), "DEL": ..., and so
# on}; ADD has to be there, for other verbs there may be nothing to do. It has up to five marks. "first": it can only be the first of a
# list. "chained": it works on the result of a plugin before it. "link": it makes a link on the host for each attachment, whose name begins
# with these letters. "leave_nft": a function (request, run, script) that takes the attachment out of a table of nft, in one transaction
# with a script. "tools": a function of the request that lists the programs which the call runs; for STATUS, those of any call.


def answer(environ, stdin_text, run, plugins=None, called_as="mncni", at_once=False):
    """(exit code, text for stdout) of one call. Never raises.

    run: starts a command, see make_run. plugins: a table like PLUGINS, the default. called_as: the program's name. at_once: whether
    run may be called from several threads.
    """
    version = NEWEST  # for errors before the configuration has named a known version
    try:
        plugins = PLUGINS if plugins is None else parse_table(plugins)
        check_environment(environ)
        command = environ["CNI_COMMAND"]
        if command == "VERSION":
            return 0, to_json(version_reply(stdin_text)) + "\n"
        conf = parse_conf(stdin_text)
        if command not in VERBS:
            raise CNIError(BAD_ENVIRONMENT, f"CNI_COMMAND {command!r} is unknown; there are: {', '.join(VERBS)}, VERSION")
        check_version(command, conf["cniVersion"])
        version = conf["cniVersion"]
        stages = choose_plugins(conf, called_as, plugins)
        request = Request(environ, conf, at_once)
        request.links = [host_ifname(stage["link"], *request.attachment) for stage in stages if "link" in stage]
        request.leave_nft = next((stage["leave_nft"] for stage in stages if "leave_nft" in stage), leave_nft)
        check_netns(request, environ)
        require_tools(request, stages, search_path(environ))
        run = logged(run, request)
        if command in ("ADD", "DEL") and request.links:
            # One at a time for each attachment: a runtime that gave up on an ADD may send the DEL while the ADD still runs.
            with Locked(os.path.join(request.run_dir, "attachments", short_hash(*request.attachment)[-3:])) as lock:
                result = VERBS[command](request, stages, lock.held(run))
        else:
            result = VERBS[command](request, stages, run)
        return 0, to_json(result_to_version(result, version)) + "\n" if result is not None else ""
    except Exception as error:
        return 1, error_reply(to_cni_error(error), version)


def call_add(request, stages, run):
    """ADD: run each stage on the result of the stage before it. If one fails, call DEL of the stages before it, the last first. The failed
    stage gets a DEL, too, if it is chained, unless it refused its configuration. A stage that is not chained undoes its own failures:
    only it knows whether the attachment was there before, and must stay."""
    request.prev_result = parse_prev_result(request.conf)
    for position, stage in enumerate(stages):
        undone_by_del = stage.get("chained", False)
        try:
            if undone_by_del and request.prev_result is None:
                what = f"the chained plugin {stage['name']} works on the result of one before it, and got none"
                raise config_error(f"{what}: put it behind one that makes the interface")
            result = call_stage(stage, "ADD", request, run)
            undone_by_del = True  # it has done its work, whatever it returned
            request.prev_result = result if is_built_in(stage["ADD"]) else parse_own_result(stage["name"], result, request.prev_result)
        except Exception as error:
            count = position + 1 if undone_by_del and getattr(error, "code", 0) != BAD_CONFIG else position
            for done in reversed(stages[:count]):
                best_effort(call_stage, done, "DEL", request, run)
            raise
    return request.prev_result


def call_del(request, stages, run):
    """DEL: undo every stage, the last first. A missing or malformed prevResult is no error: a crash may have left it so."""
    try:
        request.prev_result = parse_prev_result(request.conf)
    except CNIError as error:
        tell(f"DEL goes on without prevResult: {error.msg}")
    call_all(request, list(reversed(stages)), run)


def call_check(request, stages, run):
    """CHECK: run every stage against prevResult."""
    request.prev_result = parse_prev_result(request.conf)
    if request.prev_result is None:
        raise config_error('CHECK needs "prevResult", the result of the ADD that it checks')
    others = [link["sandbox"] for link in own_links(request).values() if not is_same_path(link["sandbox"], request.netns)]
    report(request, [f"prevResult is of the sandbox {other}, not of CNI_NETNS {request.netns}" for other in others])
    call_all(request, stages, run)


def call_all(request, stages, run):
    """Run every stage, also after one failed, then raise the first error. The stages of a DEL may run at the same time."""
    all_of([(call_stage, (stage, request.command, request, run)) for stage in stages], request.at_once and request.command == "DEL")


def is_built_in(act):
    """Whether a function is of this file, and not of another program that gave main a table."""
    return getattr(act, "__module__", "") == __name__


def call_stage(stage, part, *arguments):
    """What a plugin's function returns. Any exception of another program's plugin but a CNIError becomes one that names the plugin."""
    act, name = stage.get(part, nothing_to_do), stage["name"]
    try:
        result = act(*arguments)
    except CNIError:
        raise
    except BaseException as error:  # also sys.exit and an interrupt: what ADD has begun is to be undone
        if is_built_in(act):
            raise
        place = describe_defect(error, getattr(getattr(act, "__code__", None), "co_filename", ""))
        raise CNIError(IO_FAILURE if isinstance(error, OSError) else INTERNAL, f"plugin {name}: {part} failed: {place}") from None
    if type(result).__name__ in ("generator", "coroutine", "async_generator"):
        raise CNIError(INTERNAL, f"plugin {name}: {part} did not run: with its yield or await it only makes a {type(result).__name__}")
    return result


def parse_own_result(name, result, prev_result):
    """What the ADD of a plugin returned, as the next one will read it. CNIError 999 if it is no result."""
    if not isinstance(result, dict) or not result:
        what = f"plugin {name}: ADD returned {result!r:.80}, which is no result"
        raise CNIError(INTERNAL, f"{what}; a chained plugin is marked \"chained\" and returns request.prev_result, with what it adds")
    try:
        parsed = parse_result(parse_json(to_json(result)), "it")
        for key, needed in (("interfaces", "name"), ("routes", "dst")):
            for item in parsed.get(key) or []:
                if not isinstance(item.get(needed), str) and item not in ((prev_result or {}).get(key) or []):
                    raise ValueError(f'of "{key}", {to_json(item)} has no "{needed}"')
        return parsed
    except (CNIError, TypeError, ValueError, RecursionError) as error:
        raise CNIError(INTERNAL, f"plugin {name}: what ADD returned makes no sense: {error}") from None


VERBS = {"ADD": call_add, "DEL": call_del, "CHECK": call_check, "GC": call_all, "STATUS": call_all}


def choose_plugins(conf, called_as, plugins):
    """The stages to run: the plugins that the configuration's "plugin" names, else the one of the program's name. CNIError 7."""
    names = conf.get("plugin", called_as)
    names = names if isinstance(names, list) else [names]
    known = ", ".join(plugins)
    if not names:
        raise config_error(f'"plugin" is an empty list; the plugins are: {known}')
    for position, name in enumerate(names):
        if not isinstance(name, str) or name not in plugins:
            what = f'called as "{name}" without a "plugin" key' if "plugin" not in conf else f'"plugin" {to_json(name)} is unknown'
            raise config_error(f"{what}; the plugins are: {known}", 'set "plugin" to one of them, or to a list of them')
        if name in names[:position]:
            raise config_error(f'"plugin" lists "{name}" twice')
        if position and plugins[name].get("first"):
            raise config_error(f'"plugin" lists "{name}" at place {position + 1}: it can only be the first, it adds to no result before it')
    return [{**plugins[name], "name": name} for name in names]


def parse_table(plugins):
    """The plugin table that another program gives to main. CNIError 999 if it makes no sense."""
    functions, marks = (*VERBS, "leave_nft", "tools"), {"first": bool, "chained": bool, "link": str}
    rows = list(plugins.items()) if isinstance(plugins, dict) else []
    if not rows or not all(isinstance(name, str) and isinstance(row, dict) for name, row in rows):
        raise CNIError(INTERNAL, f'main needs a table of plugins like {{"txqueue": {{"ADD": add, "chained": True}}}}, not {plugins!r:.80}')
    for name, row in rows:
        for key, value in {"ADD": None, **row}.items():
            if not (callable(value) if key in functions else type(value) is marks.get(key)):
                what = f"has {key!r}: {value!r:.80}" if key in row else "needs a function as ADD"
                known = f"functions may be {', '.join(functions)}; marks {', '.join(marks)}"
                raise CNIError(INTERNAL, f"plugin {name}: its row of the table {what}; {known}")
    return plugins


def check_version(command, version):
    """CNIError 1 for a version that this program does not speak, or that has no such command; 6 if it is no version at all, which the
    reference plugins refuse only for commands that not every version has."""
    since = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}.get(command)
    if since and not (all(part.isdigit() for part in version.split(".")) and version.count(".") <= 2):
        raise CNIError(DECODE_FAILURE, f'cannot read "cniVersion" {version!r}')
    if version not in CNI_VERSIONS:
        what = '"cniVersion" is missing, or 0.1.0, which' if version == "0.1.0" else f'"cniVersion" {version!r}'
        raise CNIError(INCOMPATIBLE_VERSION, f"{what} is not supported", f"supported: {', '.join(CNI_VERSIONS)}")
    if since and CNI_VERSIONS.index(version) < CNI_VERSIONS.index(since):
        raise CNIError(INCOMPATIBLE_VERSION, f"{command} needs cniVersion {since} or newer, the configuration says {version}")


def version_reply(stdin_text):
    """The answer to VERSION. Bad stdin is no error: older runtimes send nothing. SPEC section 2, VERSION."""
    try:
        version = parse_json_object(stdin_text).get("cniVersion")
    except CNIError:
        version = None
    return {"cniVersion": version if isinstance(version, str) and version else NEWEST, "supportedVersions": list(CNI_VERSIONS)}


def check_netns(request, environ):
    """CNIError 8 if CNI_NETNS is no network namespace, or the host's own, before anything is changed. DEL goes on without it: the
    namespace may be gone, and /proc/PID may be another process by now."""
    if not request.netns or request.command in ("GC", "STATUS"):
        return
    problem = "" if is_netns(request.netns) else "it is no path of one"
    try:
        fd = os.open(request.netns, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if fcntl.ioctl(fd, 0xB703) != 0x40000000:  # NS_GET_NSTYPE, CLONE_NEWNET: ioctl_ns(2)
                problem = "it is a namespace of another kind"
            override = environ.get("CNI_NETNS_OVERRIDE", "").lower() in ("1", "true")  # as in libcni's skel
            if os.path.samestat(os.fstat(fd), os.stat("/proc/self/ns/net")) and not override:
                problem = "the plugin itself runs in it"
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:  # ENOTTY: no namespace; ValueError: a NUL byte
        problem = "it is no namespace" if getattr(error, "errno", 0) == 25 else getattr(error, "strerror", None) or error
    if problem and request.command != "DEL":
        raise CNIError(BAD_NETNS, f"cannot use the network namespace {request.netns!r}: {problem}")
    request.netns = "" if problem else request.netns


def require_tools(request, stages, path):
    """CNIError 4, before anything is changed, if a program is missing that an ADD or CHECK needs; for STATUS 50, if any call needs it."""
    if request.command in ("ADD", "CHECK", "STATUS"):
        for tool in [tool for stage in stages if "tools" in stage for tool in call_stage(stage, "tools", request)]:
            try:
                find_program(tool, path)
            except CNIError as error:
                raise CNIError(NOT_AVAILABLE if request.command == "STATUS" else error.code, error.msg) from None


def is_same_path(one, other):
    """Whether two paths are the same; /var/run is a link to /run."""
    return isinstance(one, str) and "\0" not in one and os.path.realpath(one) == os.path.realpath(other)


def to_cni_error(error):
    """Any exception as a CNIError: 5 for the operating system's, 7 for a string that no name can be, 999 for a defect of this program."""
    if isinstance(error, CNIError):
        return error
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return CNIError(IO_FAILURE, f"input/output failure: {error.strerror or error}{where}")
    if isinstance(error, (UnicodeEncodeError, RecursionError)) or "embedded null" in str(error):
        what = "a character that no name can have" if isinstance(error, ValueError) else "a path or value that is nested too deep"
        return config_error(f"a string of the configuration holds {what}: {error}")
    return CNIError(INTERNAL, f"a defect of the program: {describe_defect(error, __file__)}")


def describe_defect(error, file):
    """The last line of a file that an exception passed, and the exception. The traceback goes to stderr."""
    import traceback  # slow, and only for defects

    traceback.print_exception(type(error), error, error.__traceback__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file][-1:]
    places = [f"line {frame.lineno} of {os.path.basename(frame.filename)}, in {frame.name}: " for frame in frames]
    return "".join([*places, traceback.format_exception_only(type(error), error)[-1].strip()])


def error_reply(error, version):
    """The JSON text of an error. SPEC section 5, Error."""
    reply = {"cniVersion": version, "code": error.code, "msg": error.msg, "details": error.details}
    return to_json({key: value for key, value in reply.items() if value != ""}) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------
# A plan is a list of Commands. It changes nothing until `apply` runs it, and printed it can be pasted into a shell. How a command is
# started, and how the answers of the tools are read, is plumbing.

Reply = namedtuple("Reply", "exit_code stdout stderr")


class Command:
    """A process to start: argv (list of str), stdin (text), why (some words for the reader of a trace: what the command is for),
    environ (variables to set), fds (descriptors that the process inherits)."""

    def __init__(self, argv, stdin="", why="", environ=None):
        if isinstance(argv, str):
            raise TypeError(f'a command is a list of words, as in ["ip", "link"], not {argv!r}')
        self.argv, self.stdin, self.why, self.environ, self.fds = argv, stdin, why, environ or {}, ()

    def __str__(self):
        """The command as a person would paste it into a shell."""
        import shlex  # +0.4 ms, tracing and errors only

        text = " ".join([*(f"{name}={shlex.quote(value)}" for name, value in self.environ.items()), shlex.join(self.argv)])
        return f"{text} <<'E'\n{self.stdin.rstrip()}\nE" if self.stdin else text

    def explained(self, prompt=""):
        """The same, with the reason as a comment above it."""
        return f"# {self.why}\n{prompt}{self}" if self.why else f"{prompt}{self}"


def apply(plan, run):
    """Run the commands of a plan. CNIError 100 at the first that fails."""
    for command in plan:
        reply = run(command)
        if reply.exit_code != 0 and not is_read_only(command, reply):
            raise command_failed(command, reply)


def in_netns(netns, argv):
    """argv for the network namespace at a path; "" is the plugin's own. Not `ip -n`, which takes only names below /run/netns."""
    return ["nsenter", f"--net={netns}", *argv] if netns else argv


def guarded(lines):
    """Batch lines as text. This is the one guard against injection: every value in a line has come through a validator before."""
    if isinstance(lines, str):
        raise TypeError(f'a batch is a list of lines, as in ["link set dev lo up"], not {lines!r}')
    for line in lines:
        if not (SPECIAL.isdisjoint(line) and line.isprintable()):
            raise CNIError(BAD_ENVIRONMENT, f"refused to pass a value with a special character on to ip: {line!r}")
    return "".join(line + "\n" for line in lines)


def ip_batch(lines, netns="", why=""):
    """One `ip` for several changes, a line each. A batch is no transaction: it stops at the first line that fails."""
    return Command(in_netns(netns, ["ip", "-batch", "-"]), guarded(lines), why)


def write_sysctls(keys, value, netns="", why=""):
    """Write one value to several sysctls, named like "net/ipv4/ip_forward". With tee, so that this is a command like the others: it is
    traced, recorded, and can run in another namespace."""
    return Command(in_netns(netns, ["tee", *(f"/proc/sys/{key}" for key in keys)]), f"{value}\n", why)


def ask(command, run, may_be_gone=True):
    """The reply to a command whose object may not exist. CNIError 8 if the namespace does not exist, 100 if the command fails otherwise."""
    for _ in range(5):
        reply = run(command)
        if "Dump was interrupted" not in reply.stderr:  # ip prints it when links come and go during a list
            break
    if any(line.startswith("nsenter:") for line in reply.stderr.splitlines()):
        raise CNIError(BAD_NETNS, "cannot enter the network namespace", reply.stderr.strip())
    if reply.exit_code != 0 and not (may_be_gone and is_gone(reply)):
        raise command_failed(command, reply)
    return reply


def look_ip(arguments, run, netns="", family="", why=""):
    """The objects that `ip -json` prints for several command lines, as one list. Objects that do not exist are left out."""
    argv = ["ip", "-json", "-details", *([family] if family else []), "-force", "-batch", "-"]
    return understood("ip", parse_ip, ask(Command(in_netns(netns, argv), guarded(arguments), why), run).stdout)


def look_nft(what, run, why=""):
    """The objects in an nft table or chain, for example of ["table", "inet", "t"], like {"rule": {...}}; [] if it does not exist. nft(8),
    JSON."""
    text = ask(Command(["nft", "-j", "list", *what], "", why), run).stdout or "{}"
    return understood("nft", lambda text: [dict(item) for item in parse_json(text).get("nftables", [])], text)


def comments_of(items):
    """The comments of the rules among objects that look_nft returned."""
    rules = [item["rule"] for item in items if isinstance(item.get("rule"), dict)]
    return [str(rule.get("comment", "a rule without a comment")) for rule in rules]


def look_rules(what, run, why=""):
    """The comments of the rules in an nft table or chain, see look_nft."""
    return comments_of(look_nft(what, run, why))


def look_qdiscs(device, run, netns="", why=""):
    """The queueing disciplines of a device: [(kind, rate in byte/s, 0 for none)]. [] if the device or the namespace is gone. A queueing
    discipline, qdisc in tc(8), is the queue that a device sends from."""
    reply = run(Command(in_netns(netns, ["tc", "-json", "qdisc", "show", "dev", device]), "", why))
    text = reply.stdout if reply.exit_code == 0 and reply.stdout else "[]"
    return understood("tc", lambda text: [(row["kind"], row.get("options", {}).get("rate", 0)) for row in parse_json(text)], text)


def find_link(name, links):
    """The link of a name among those that look_ip returned, or None."""
    return next((link for link in links if link.get("ifname") == name), None)


def addresses_of(link, scope=""):
    """The addresses of a link that look_ip returned, like "10.244.1.1/24"; of one scope, or all."""
    infos = [info for info in link.get("addr_info", []) if {"local", "prefixlen"} <= info.keys()]
    return {f"{info['local']}/{info['prefixlen']}" for info in infos if scope in ("", info.get("scope"))}


def diff_link(what, link, addresses=()):
    """What is wrong with a link that must be up and have these addresses, as a list of messages for `report`."""
    if link is None:
        return [f"{what} is gone"]
    problems = [] if "UP" in link["flags"] else [f"{what} is down"]
    return problems + [f"{what} lacks the address {address}" for address in addresses if address not in addresses_of(link)]


def report(request, problems):
    """End a CHECK: CNIError 100 if problems, a list of messages, is not empty. All of them are in its details."""
    if problems:
        what = f"CHECK of {request.ifname} of container {request.container_id} failed: {problems[0]}"
        raise CNIError(COMMAND_FAILED, what, "\n".join(problems))


def nothing_to_do(request, run):
    """A verb for which a plugin has nothing to do, such as loopback's DEL: lo goes with its namespace, or its owner needs it."""


# ---------------------------------------------------------------------------------------------------------------------
# loopback: the pod's own "lo"                                                          the smallest plugin: one to copy
# ---------------------------------------------------------------------------------------------------------------------


def look_lo(request, run):
    """lo in the pod, with its addresses."""
    return find_link("lo", look_ip(["address show dev lo"], run, request.netns, why="the state and addresses of lo in the pod"))


def loopback_add(request, run):
    """ADD: bring lo up. Returns prevResult, or without one a result that lists lo."""
    apply([ip_batch(["link set dev lo up"], request.netns, "a new namespace has lo, but down")], run)
    if request.prev_result:
        return request.prev_result
    lo = look_lo(request, run) or {}
    ips = [{"address": address, "interface": 0} for address in sorted(addresses_of(lo))]
    return {"cniVersion": NEWEST, "interfaces": [{"name": "lo", "mac": lo.get("address", ""), "sandbox": request.netns}], "ips": ips}


def loopback_check(request, run):
    """CHECK: lo is up."""
    report(request, diff_link(f"lo in {request.netns}", look_lo(request, run)))


# ---------------------------------------------------------------------------------------------------------------------
# quickack: no delayed ACKs on the pod's routes                                                  ip-route(8), quickack
# ---------------------------------------------------------------------------------------------------------------------
# TCP delays its acknowledgements (ACKs), to send fewer of them. On a route with "quickack 1" it sends each at once.


def parse_quickack(request, run=None):
    """The destinations in "routes", as networks; None for all routes of the interface. CNIError 7."""
    routes = typed(request.conf, "routes", list, None)
    return None if routes is None else [parse_address(dst, ipaddress.ip_network, '"routes" of quickack') for dst in routes]


def look_routes(request, run):
    """The unicast routes of CNI_IFNAME, both families, each as a list of words that `ip route` reads.

    Not from -json, which does not say that a metric is locked: every attribute must survive the change.
    """
    routes = []
    for family in ("-4", "-6"):
        argv = ["ip", family, "-oneline", "route", "show", "table", "all", "type", "unicast", "dev", request.ifname]
        reply = ask(Command(in_netns(request.netns, argv), "", f"the pod's IPv{family[1]} routes"), run, may_be_gone=False)
        routes += [[*parse_route_words(line), "dev", request.ifname] for line in reply.stdout.splitlines() if line.strip()]
    return routes


def parse_route_words(line):
    """The words of a route without the states that `ip` prints but does not read. It prints rto_min as locked, and does not read that."""
    states = ("linkdown", "dead", "offload", "trap", "offload_failed", "pervasive", "notify", "rt_offload", "rt_trap")
    line = line.replace("\\", " ").replace("rto_min lock", "rto_min")
    return [word for word in line.split() if word not in states]


def chosen_routes(conf, routes):
    """The routes that the configuration names. CNIError 7 if it names a destination without a route."""
    if conf is None:
        return routes
    texts = [words[0].replace("default", default_route(" ".join(words))) for words in routes]  # the family shows in the other words
    own = [ipaddress.ip_network(text) for text in texts]
    for wanted in conf:
        if wanted not in own:
            raise config_error(f"quickack: the pod has no route to {wanted} on this interface")
    return [words for words, network in zip(routes, own) if network in conf]


def is_quick(words):
    """Whether a route has quickack switched on."""
    return "quickack" in words and words[words.index("quickack") + 1] == "1"


def plan_quickack(routes):
    """Lines for `ip -batch` that set quickack on the routes that lack it."""
    lines = []
    for words in [words for words in routes if not is_quick(words)]:
        place = words.index("quickack") if "quickack" in words else len(words)
        lines.append(" ".join(["route", "replace", *words[:place], *words[place + 2 :], "quickack", "1"]))
    return lines


def quickack_add(request, run):
    """ADD: set quickack on the pod's routes. Returns prevResult. There is nothing to undo: the routes go with the interface."""
    conf = parse_quickack(request)
    lines = plan_quickack(chosen_routes(conf, look_routes(request, run)))
    apply([ip_batch(lines, request.netns, "quickack: the pod acknowledges each TCP segment at once")] if lines else [], run)
    return request.prev_result


def quickack_check(request, run):
    """CHECK: the routes that ADD chose have quickack."""
    routes = chosen_routes(parse_quickack(request), look_routes(request, run))
    report(request, [f"the route to {words[0]} in the pod has no quickack" for words in routes if not is_quick(words)])


# ---------------------------------------------------------------------------------------------------------------------
# lat: a bad network for a pod, from its annotation                                                          tc-netem(8)
# ---------------------------------------------------------------------------------------------------------------------
# An annotation is a text that a pod's owner gives it. The runtime passes annotations to plugins with the capability
# "io.kubernetes.cri.pod-annotations". netem is a qdisc that delays, loses, duplicates or reorders what a device sends. A netem expression
# is a list of netem's words with their values, for example "delay 100ms 10ms loss 1%".

# The words, each with the kinds of its values. All values but the first are optional.
NETEM = {
    "delay": ("time", "time", "percent"),
    **dict.fromkeys(("loss", "duplicate", "corrupt", "reorder"), ("percent", "percent")),
    **{"rate": ("rate",), "limit": ("packets",), "distribution": ("table",)},
    "slot": ("time", "time"),
}
# Kind of value -> its name in messages, its lowest and highest value, and its units as multiples of the first. Beyond these bounds tc
# reports no error and sets a short time or no rate. Without a table, jitter is uniform.
NETEM_KINDS = {
    "time": ("a time up to 274s", 0, 274e6, dict(us=1, usec=1, usecs=1, ms=1e3, msec=1e3, msecs=1e3, s=1e6, sec=1e6, secs=1e6)),
    "percent": ("a percentage up to 100%", 0, 100, {"%": 1}),
    "rate": ("a rate from 8bit", 8, 1e19, dict(bit=1, kbit=1e3, mbit=1e6, gbit=1e9, bps=8, kbps=8e3, mbps=8e6, gbps=8e9)),
    "packets": ("a number up to 1024: a packet may have 64 KB, and a pod may keep the kernel waiting with 64 MB", 0, 1024, {"": 1}),
    "table": ("one of normal, pareto, paretonormal", 0, 0, ("normal", "pareto", "paretonormal")),
}


def parse_lat(request):
    """The words of the netem expression in the pod's annotation "lat"; [] without one. CNIError 7 naming the bad word."""
    words = typed(runtime_config(request, "io.kubernetes.cri.pod-annotations", dict, {}), "lat", str, "").split()
    return parse_netem(["delay", *words] if words and words[0][0] in ".0123456789" else words)


def parse_netem(words):
    """The words, if they are a valid netem expression. CNIError 7."""
    texts, word = {}, ""  # the values of each word so far, and the word that takes the next value
    for text in words:
        if text in NETEM and text not in texts:
            texts[text], word = [], text
        elif text in texts or not word or len(texts[word]) == len(NETEM[word]):
            what = "stands twice" if text in texts else f"is none of: {', '.join(NETEM)}; nor a time like 50ms"
            raise config_error(f'annotation "lat": "{text[:40]}" {what}')
        else:
            texts[word].append(text)
    values = {word: [netem_value(word, *pair) for pair in zip(NETEM[word], texts[word] or [""])] for word in texts}
    delay, jitter = (values.get("delay", []) + [0, 0])[:2]
    if "reorder" in values and not delay:
        raise config_error('annotation "lat": "reorder" needs a "delay"')
    if "distribution" in values and not (delay and jitter):
        raise config_error('annotation "lat": "distribution" needs a "delay" with a jitter, as in: delay 100ms 10ms distribution normal')
    if values.get("slot", []) != sorted(values.get("slot", [])):
        raise config_error('annotation "lat": "slot" needs its shorter time first')
    return words


def netem_value(word, kind, text):
    """One value of a word, in its kind's first unit; 0 for a table. CNIError 7."""
    what, lowest, highest, units = NETEM_KINDS[kind]
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz%")
    unit = text[len(digits) :]
    if kind == "table" and text in units:
        return 0
    if kind != "table" and text.isascii() and digits.replace(".", "", 1).isdigit() and len(digits) < 10 and unit in units:
        value = float(digits) * units[unit]
        if lowest <= value <= highest:
            return value
    raise config_error(f'annotation "lat": "{word}" needs {what}, not "{text[:40]}"')


def lat_add(request, run):
    """ADD: netem on the pod's interface, for the packets that the pod sends. Returns prevResult. CNIError 4 if the kernel has no netem."""
    words = parse_lat(request)
    if words:
        argv = in_netns(request.netns, ["tc", "qdisc", "replace", "dev", request.ifname, "root", "netem", *words])
        try:
            apply([Command(argv, "", "netem delays or loses the packets that the pod sends, as its annotation asks")], run)
        except CNIError as error:
            if "qdisc kind is unknown" not in error.details:
                raise
            what = "this kernel has no netem: load the module sch_netem (package linux-modules-extra-* on Ubuntu)"
            raise CNIError(BAD_ENVIRONMENT, what, error.details) from None
    return request.prev_result


def look_netem(request, run):
    """Whether the pod's interface has netem. False if the interface or the namespace is gone."""
    return any(kind == "netem" for kind, _ in look_qdiscs(request.ifname, run, request.netns, "is the qdisc netem on the pod's interface?"))


def lat_del(request, run):
    """DEL: remove netem, in case the namespace outlives the attachment. Whatever is gone is fine."""
    if request.netns and look_netem(request, run):
        run(Command(in_netns(request.netns, ["tc", "qdisc", "delete", "dev", request.ifname, "root"]), "", "remove the delay and loss"))


def lat_check(request, run):
    """CHECK: netem is there if the annotation asks for it."""
    if parse_lat(request) and not look_netem(request, run):
        report(request, [f'{request.ifname} in the pod has no netem, which the annotation "lat" asks for'])


# ---------------------------------------------------------------------------------------------------------------------
# Links on the host                                                     names, owners, deleting: for bandwidth and naivewg
# ---------------------------------------------------------------------------------------------------------------------
# A link's name follows from the attachment, so DEL finds it without any state. Its alias, a text that the kernel keeps with it, says whose
# it is.

DOOMED = 0x6D6E  # the group (ip-link(8)) of links that are about to be deleted; nothing stays in it


def host_ifname(prefix, *attachment):
    """The name of an attachment's link on the host: two letters and 11 hex digits of (network, container ID, interface)."""
    return prefix + short_hash(*attachment)[-11:]


def own_veth(request):
    """The name of the host's end of the pod's veth pair. A veth pair is a cable between two namespaces."""
    return host_ifname("mn", *request.attachment)


def own_ifb(request):
    """The name of the device through which bandwidth leads what the pod sends."""
    return host_ifname("mi", *request.attachment)


def link_alias(request):
    """The alias of an attachment's links. `ip link` shows it, and GC finds the network's links by it. 255 bytes at most."""
    rest = 255 - len(f"{OWNER_ALIAS}:{request.network}::{request.ifname}".encode())
    return f"{OWNER_ALIAS}:{request.network}:{request.container_id[:rest]}:{request.ifname}"


def is_half_made(link):
    """Whether a killed ADD made this link and did not come to set its alias: it is down, and has a MAC as mac_of makes them."""
    return "ifalias" not in link and "UP" not in link["flags"] and link.get("address", "")[:6] in ("0a:58:", "0a:59:")


def look_pod(request, run):
    """CNI_IFNAME in the pod with its addresses, None if there is none."""
    why = "the pod's interface: its state, its addresses, the index of its other end"
    return find_link(request.ifname, look_ip([f"address show dev {request.ifname}"], run, request.netns, why=why))


def delete_links(names, run):
    """Delete links of the host. Links that are gone are fine. Several are deleted as a group: the kernel waits 10 to 30 ms per deletion."""
    if len(names) == 1:
        command = Command(["ip", "link", "delete", "dev", *names], "", "a link of the pod; of a veth pair the kernel deletes both ends")
    else:
        lines = [*(f"link set dev {name} group {DOOMED}" for name in names), f"link delete group {DOOMED}"]
        command = Command(["ip", "-force", "-batch", "-"], guarded(lines), "links of pods, put into a group that goes in one step")
    ask(command, run)


def delete_stale_links(request, kind, prefix, run):
    """GC: delete the links of a kind whose alias names this network and that belong to none of the attachments to keep. Half-made links
    go, too: nothing says whose they are."""
    keep, own = valid_attachments(request), [OWNER_ALIAS, request.network]
    if keep is None:
        return
    valid, stale = {host_ifname(prefix, request.network, *pair) for pair in keep}, []
    for link in look_ip([f"link show type {kind}"], run, why="which links of pods are there? their aliases say whose they are"):
        name = link.get("ifname", "")
        lost = name[:2] == prefix and HEX.issuperset(name[2:]) and is_half_made(link)
        if name and name not in valid and (lost or link.get("ifalias", "").split(":")[:2] == own):
            stale.append(name)
    if stale:
        delete_links(stale, run)


# ---------------------------------------------------------------------------------------------------------------------
# States: what an attachment has in a table of nft                                                for spoofCheck and portmap
# ---------------------------------------------------------------------------------------------------------------------
# nft knows no attachments. A file <run_dir>/KIND/KEY says what an attachment has in the table of that kind. It is written before the table
# is changed and removed after it, so what a crash leaves is found by the next DEL or GC; and after `nft flush ruleset` the table is
# written again from the files.


def state_path(request, kind):
    """The file with this attachment's state."""
    return os.path.join(request.run_dir, kind, short_hash(*request.attachment))


def states_lock(run_dir, kind):
    """Held by whoever changes the states and the table."""
    return Locked(os.path.join(run_dir, kind, "lock"))


def look_states(run_dir, kind, parse):
    """All states of a kind: {path of its file: state}. A state is {"owner": [network, container ID, interface], ...}; parse checks the
    rest, for what it holds goes to nft. Files that are no states are left out."""
    directory, states = os.path.join(run_dir, kind), {}
    names = os.listdir(directory) if os.path.isdir(directory) else []
    for path in [os.path.join(directory, name) for name in sorted(names) if len(name) == 16]:
        try:
            state = parse_json_object(read_state(path))
            network, container_id, ifname = typed(state, "owner", list, [])
            if not (is_identifier(network) and is_identifier(container_id) and is_ifname(ifname)):
                raise ValueError
            states[path] = parse(state)
        except (CNIError, ValueError, TypeError, LookupError):
            tell(f"{path} is no state of {kind}: left out")
    return states


def leave_nft(request, run, script=""):
    """Run a script that takes attachments out of tables. For each transaction that deletes, the kernel waits 10 to 20 ms."""
    apply([Command(["nft", "-f", "-"], script, "the veth is gone, and with it what it may send")] if script else [], run)


def gc_states(request, kind, parse, drop, run):
    """GC: drop(all states, paths of the stale, run) for the states of this network that belong to none of the attachments to keep."""
    keep, directory = valid_attachments(request), os.path.join(request.run_dir, kind)
    if keep is None or not os.path.isdir(directory):
        return
    with states_lock(request.run_dir, kind) as lock:
        states = look_states(request.run_dir, kind, parse)
        own = [path for path, state in states.items() if state["owner"][0] == request.network]
        stale = [path for path in own if tuple(states[path]["owner"][1:]) not in keep]
        if stale:
            drop(states, stale, lock.held(run))
        remove_unfinished(directory)


# ---------------------------------------------------------------------------------------------------------------------
# bandwidth: limits to and from the pod                                                                tc-tbf(8), ifb
# ---------------------------------------------------------------------------------------------------------------------
#
# A token bucket (tbf) is a qdisc that sends at a rate, and after a pause a burst at once. A qdisc works on packets that leave a device.
# To the pod: a token bucket on the host's end of the veth pair. From the pod: packets that arrive there are redirected through an ifb, a
# device that only queues, which has a token bucket of its own.


def parse_bandwidth(request, run=None):
    """The limits asked for: {"ingress": (rate, burst), "egress": ...}, rate in bit/s, burst in bits or None. Ingress is towards the pod.
    Static keys of the configuration replace all of the runtime's. CNIError 7."""
    keys = ("ingressRate", "ingressBurst", "egressRate", "egressBurst")
    source = request.conf if any(key in request.conf for key in keys) else runtime_config(request, "bandwidth", dict, {})
    values = {key: number({key: any_case(source, key)}, key, 0, 0, 2**63 - 1) for key in keys}
    limits = {}
    for direction in ("ingress", "egress"):
        rate, burst = values[f"{direction}Rate"], values[f"{direction}Burst"]
        if burst and not rate:
            raise config_error(f'"{direction}Burst" without "{direction}Rate" limits nothing')
        if rate:
            limits[direction] = (rate, burst if burst not in (0, 2**32 - 1) else None)  # containerd's word for no burst given
    return limits


def tbf(rate, burst, mtu):
    """The words of a token bucket for `tc`. The default burst is what the rate lets through in 100 ms, and at least ten packets: a packet
    larger than the burst would never be sent. The queue holds another 25 ms."""
    burst_bytes = max(rate // 80 if burst is None else burst // 8, 10 * mtu)
    queue_bytes = min(rate // 320, 2**31)
    burst_bytes = min(burst_bytes, 2**32 - 1 - queue_bytes)
    return f"tbf rate {rate}bit burst {burst_bytes}b limit {burst_bytes + queue_bytes}b"


def look_peer(request, run):
    """The host's end of CNI_IFNAME, among the interfaces of prevResult. CNIError 7 if none is."""
    names, pod = host_links(request), look_pod(request, run)
    links = look_ip([f"link show dev {name}" for name in names], run, why="which link of the host has that index?") if names else []
    for host in links:
        if pod and "ifname" in host and host.get("ifindex") == pod.get("link_index"):
            return host
    raise config_error(f"none of the interfaces {', '.join(names) or '(none)'} of prevResult is the host's end of {request.ifname}")


def plan_bandwidth(request, limits, peer, qdiscs):
    """Commands that set the limits on the host's end `peer`, which has these qdiscs."""
    name, mtu, ifb = peer["ifname"], peer["mtu"], own_ifb(request)
    plan, lines = [], []
    if "ingress" in limits:
        lines.append(f"qdisc replace dev {name} root {tbf(*limits['ingress'], mtu)}")
    if "egress" in limits:
        made = f"link add name {ifb} mtu {mtu} address {mac_of(ifb, '0a:59')} type ifb"
        why = "an ifb, a device that only queues: what the pod sends arrives at the host, and tc limits only what leaves a device"
        plan.append(ip_batch([made, f"link set dev {ifb} alias {link_alias(request)} up"], why=why))
        if not any(kind in ("ingress", "clsact") for kind, _ in qdiscs):  # a hook for filters; another program's serves as well
            lines.append(f"qdisc add dev {name} ingress")
        lines.append(f"filter add dev {name} ingress protocol all u32 match u32 0 0 action mirred egress redirect dev {ifb}")
        lines.append(f"qdisc replace dev {ifb} root {tbf(*limits['egress'], mtu)}")
    return [*plan, Command(["tc", "-batch", "-"], guarded(lines), "token buckets (tbf) limit; what the pod sends goes through the ifb")]


def bandwidth_add(request, run):
    """ADD: limit the pod's traffic. Returns prevResult, with the ifb if there is one."""
    limits = parse_bandwidth(request)
    if not limits:
        return request.prev_result
    peer = request.new_peer or look_peer(request, run)
    qdiscs = [] if request.new_peer else look_qdiscs(peer["ifname"], run, why="has that link a hook for arriving packets already?")
    apply(plan_bandwidth(request, limits, peer, qdiscs), run)
    ifb = [{"name": own_ifb(request)}] if "egress" in limits else []
    return {**request.prev_result, "interfaces": [*request.prev_result["interfaces"], *ifb]}


def bandwidth_del(request, run):
    """DEL: delete the ifb. If naivewg is in this call, its DEL deletes it together with the veth pair. The rest goes with the veth."""
    if own_veth(request) not in request.links:
        delete_links([own_ifb(request)], run)


def bandwidth_check(request, run):
    """CHECK: the limits are as asked for."""
    limits = parse_bandwidth(request)
    if not limits:
        return
    peer, ifb, problems = look_peer(request, run)["ifname"], own_ifb(request), []
    for direction, (rate, _) in limits.items():
        device = peer if direction == "ingress" else ifb
        if ("tbf", rate // 8) not in look_qdiscs(device, run, why=f"the token bucket (tbf) for {direction}"):
            problems.append(f"{direction} is not limited to {rate} bit/s: {device} has no such token bucket")
    filters = Command(["tc", "-json", "filter", "show", "dev", peer, "ingress"], "", "is what the pod sends redirected to the ifb?")
    if "egress" in limits and ifb not in run(filters).stdout:
        problems.append(f"egress is not limited: what {peer} receives is not redirected to {ifb}")
    report(request, problems)


def bandwidth_gc(request, run):
    """GC: delete the ifbs of attachments that are not in the runtime's list."""
    delete_stale_links(request, "ifb", "mi", run)


# ---------------------------------------------------------------------------------------------------------------------
# naivewg: addresses                                                                  the plugin that makes the pod's interface
# ---------------------------------------------------------------------------------------------------------------------
#
#     pod                       host
#     eth0 10.244.1.5/24 ------ mn0123456789a ---- mncni0 10.244.1.1/24 ---- what the host routes
#     default via 10.244.1.1    a port of the bridge: the pods' gateway
#
# naivewg is the network of one node. The agent (agent.py), a program that runs on every node, connects the nodes through WireGuard.
# What follows: checking addresses; leases, which say who has which address; IPAM, which chooses addresses; then the plugin itself.


def is_address(text, kind):
    """Whether `kind`, a constructor of the ipaddress module, takes text, and no other program reads it as another address."""
    try:
        return isinstance(text, str) and "%" not in text and not has_octal(text) and bool(kind(text))
    except ValueError:
        return False


def has_octal(text):
    """Whether a number of an IPv4 address begins with 0, as in 10.0.0.010: 10 for Python before 3.9.5, 8 for C."""
    octets = text.partition("/")[0].rpartition(":")[2].split(".")
    return len(octets) > 1 and any(len(octet) > 1 and octet[0] == "0" for octet in octets)


def parse_address(text, kind, what):
    """kind(text), for ipaddress.ip_address, ip_interface or ip_network. CNIError 7 naming `what` and the text."""
    if not is_address(text, kind):
        form = "a network like 10.0.0.0/24, no host bits set" if kind is ipaddress.ip_network else "an IP address"
        raise config_error(f"{what} must be {form}, not {to_json(text)}")
    return kind(text)


def family_of(address):
    """ "-4" or "-6", the option of `ip`, for an address or network in text."""
    return "-6" if ":" in address else "-4"


def default_route(address):
    """The destination of the default route of an address's family."""
    return "::/0" if ":" in address else "0.0.0.0/0"


def parse_mac(text, what):
    """A MAC address in lower case. CNIError 7 unless it is six bytes, unicast and not zero."""
    parts = text.lower().split(":") if isinstance(text, str) else []
    is_mac = len(parts) == 6 and all(len(part) == 2 and HEX.issuperset(part) for part in parts)
    if not is_mac or int(parts[0], 16) & 1 or set(parts) == {"00"}:
        raise config_error(f"{what} must be a unicast MAC address like 0a:58:0a:f4:01:05, not {to_json(text)}")
    return ":".join(parts)


def mac_of(text, prefix="0a:58"):
    """A locally administered MAC for an IPv4 address: the prefix and its four bytes; for any other text, four bytes of a hash.

    If the MAC follows from the address, neighbours' caches stay right when the address goes to another pod.
    """
    tail = ipaddress.IPv4Address(text).packed.hex() if is_address(text, ipaddress.IPv4Address) else short_hash(text)[:8]
    return ":".join([prefix, *(tail[i : i + 2] for i in range(0, 8, 2))])


def short_hash(*parts):
    """16 hex digits for a tuple of names: 64-bit FNV-1a. hashlib costs 2.7 ms to import; a forged collision gains nobody anything here."""
    value = 0xCBF29CE484222325
    for byte in "/".join(parts).encode():  # no name contains "/"
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


# ---------------------------------------------------------------------------------------------------------------------
# naivewg: leases                                                                                        whole or absent
# ---------------------------------------------------------------------------------------------------------------------
# A lease is an address that an attachment holds. It comes from a range set: ranges of addresses in the configuration, from which each
# attachment gets one. A network usually has a range set for IPv4, one for IPv6, or both. Leases are files:
#
# <dataDir>/<network>/10.244.1.5       a lease: container ID, interface, boot ID, run ID, one a line
# <dataDir>/<network>/attachments/KEY  the index by attachment: the same lines, then the addresses
# <dataDir>/<network>/last.0           the address that range set 0 gave out last
#
# A lease of an earlier boot counts as free, because no container outlives its kernel. So no fsync is needed: a power failure ends the
# boot, too. A container that plays a node (kind, k3d) restarts under the same kernel, but with an empty /run. The run ID is kept there,
# and a lease with another one is of an earlier boot, too; a lease without one was written by an older version. The index is written before
# the leases and removed after them, so a crash leaves no lease that its attachment cannot find.


class Leases:
    """The leases of one network. Whoever changes something holds `with leases.lock:`."""

    def __init__(self, data_dir, network, run_dir):
        self.dir = os.path.join(data_dir, network)
        self.index_dir = os.path.join(self.dir, "attachments")
        self.network = network
        self.lock = Locked(os.path.join(self.dir, "lock"))
        self.boot_id, self.run_id = boot_id(), run_id(run_dir)

    def index_path(self, container_id, ifname):
        """The file that lists an attachment's leases."""
        return os.path.join(self.index_dir, short_hash(self.network, container_id, ifname))

    def holder(self, address):
        """(container ID, interface) that holds an address. None if it is free: no lease, an unreadable one, or one of an earlier boot."""
        return self._parse(read_state(os.path.join(self.dir, str(address))))[0]

    def take(self, addresses, container_id, ifname):
        """Lease addresses to an attachment."""
        own_directory(self.index_dir)
        lines = [container_id, ifname, self.boot_id, self.run_id]
        write_file(self.index_path(container_id, ifname), "\n".join([*lines, *map(str, addresses)]) + "\n")
        for address in addresses:
            write_file(os.path.join(self.dir, str(address)), "\n".join(lines) + "\n")

    def release(self, container_id, ifname):
        """Remove an attachment's leases, also those of an earlier boot, then its index. Nothing there is fine."""
        attachment, index_path = (container_id, ifname), self.index_path(container_id, ifname)
        owner, addresses = self._parse(read_file(index_path), any_boot=True)
        for address in addresses if owner == attachment else ():
            path = os.path.join(self.dir, address)
            holder, _ = self._parse(read_state(path), any_boot=True)
            remove_file(path if holder == attachment else unfinished(path))
        remove_file(index_path)

    def release_all_but(self, keep):
        """Release every attachment that is not in keep, a set of (container ID, interface), and remove what crashes left."""
        for path, owner in self._index():
            if owner is None:
                remove_file(path)  # torn, or of an earlier boot: its leases count as free
            elif owner not in keep:
                self.release(*owner)
        remove_unfinished(self.dir)

    def attachments(self):
        """[(container ID, interface)] of all attachments of this boot that hold leases."""
        return [owner for _, owner in self._index() if owner]

    def _index(self):
        """(path, owner) of every entry of the index; owner None where it is not valid."""
        for key in sorted(os.listdir(self.index_dir)) if os.path.isdir(self.index_dir) else []:
            path = os.path.join(self.index_dir, key)
            yield path, None if key.startswith(".") else self._parse(read_state(path))[0]

    def last(self, set_index):
        """The address (int) that a range set gave out last, 0 if none."""
        text = (read_state(os.path.join(self.dir, f"last.{set_index}")) or "").strip()
        return int(ipaddress.ip_address(text)) if is_address(text, ipaddress.ip_address) else 0

    def set_last(self, set_index, address):
        with open(os.path.join(self.dir, f"last.{set_index}"), "w") as file:  # only a hint: a torn one costs nothing
            file.write(f"{address}\n")

    def _parse(self, text, any_boot=False):
        """((container ID, interface), addresses) of a lease or index entry of this boot, or any_boot; (None, []) for any other text."""
        lines = (text or "").splitlines()
        if len(lines) < 3 or not is_identifier(lines[0]) or not is_ifname(lines[1]):
            return None, []
        earlier = lines[2] != self.boot_id or (lines[3:] and lines[3].startswith("run-") and lines[3] != self.run_id)
        if earlier and not any_boot:
            return None, []
        return (lines[0], lines[1]), [line for line in lines[3:] if is_address(line, ipaddress.ip_address)]


# ---------------------------------------------------------------------------------------------------------------------
# naivewg: IPAM, IP address management                                             SPEC section 4, Plugin Delegation
# ---------------------------------------------------------------------------------------------------------------------
# Built in, with the configuration of host-local, the IPAM plugin of the CNI project, or delegated: done by another plugin, the delegate,
# which this program calls as a runtime would.
# An IPAM result is {"ips": [{"address": "10.0.0.5/24", "gateway": "10.0.0.1"}], "routes": [...], "dns": {...}}.


def parse_ipam(request):
    """The configuration's "ipam": {"type": the delegate or "", "range_sets", "asked": the addresses that the caller asks for, "leases",
    "routes", "dns"}, no "asked" and "leases" without ranges. CNIError 7, or 5 for a resolvConf that cannot be read."""
    ipam = typed(request.conf, "ipam", dict, {})
    if not ipam or typed(ipam, "type", str, "") not in ("", "mncni", "mncni.py"):
        return {"type": delegate_type(request.conf), "range_sets": [], "routes": [], "dns": {}}
    older = {key: ipam[key] for key in ("subnet", "rangeStart", "rangeEnd", "gateway") if key in ipam}  # as before there were "ranges"
    asked = runtime_config(request, "ipRanges", list, [])
    sets = [parse_range_set(ranges) for ranges in asked + ([[older]] if "subnet" in older else []) + typed(ipam, "ranges", list, [])]
    by_runtime = request.command == "STATUS" and any_case(request.conf.get("capabilities"), "ipRanges") is True
    if not sets and not by_runtime:  # STATUS gets no runtimeConfig
        raise config_error('"ipam" has no "ranges"', 'for example "ranges": [[{"subnet": "10.88.0.0/24"}]]')
    refuse_overlaps([entry for ranges in sets for entry in ranges])
    parsed = {"type": "", "range_sets": sets, "asked": requested_ips(request), "leases": ipam_leases(request)}
    routes = [parse_route(route) for route in typed(ipam, "routes", list, [])]
    return {**parsed, "routes": routes, "dns": parse_resolv_conf(typed(ipam, "resolvConf", str, ""))}


def ipam_leases(request):
    """The network's leases. They depend only on "dataDir" and "name", so that DEL finds them even if the rest of the configuration is
    broken."""
    data_dir = any_case(request.conf.get("ipam"), "dataDir")
    if data_dir is not None and (not isinstance(data_dir, str) or not os.path.isabs(data_dir) or "\0" in data_dir):
        raise config_error(f'"dataDir" must be an absolute path, not {to_json(data_dir)}')
    return Leases(data_dir or request.data_dir, request.network, request.run_dir)


def parse_range_set(ranges):
    """A range set, from which an attachment gets one address: [{"subnet", "start", "end", "gateway"}], all of one family. CNIError 7."""
    if not isinstance(ranges, list) or not ranges or not all(isinstance(entry, dict) for entry in ranges):
        raise config_error('"ranges" must be an array of arrays of objects, as in [[{"subnet": "10.88.0.0/24"}]]')
    parsed = [parse_range(entry) for entry in ranges]
    if len({entry["subnet"].version for entry in parsed}) > 1:
        raise config_error('one set of "ranges" mixes IPv4 and IPv6; give each family a set of its own')
    return parsed


def parse_range(entry):
    """One range. start and end (int) default to the subnet's addresses without the first and the last, gateway to the first."""
    subnet = parse_address(entry.get("subnet"), ipaddress.ip_network, '"subnet"')
    if subnet.num_addresses < 4:
        raise config_error(f'"subnet" {subnet} is too small: it needs room for a gateway and a pod')
    first, last = subnet[1], subnet[-2 if subnet.version == 4 else -1]
    bounds = {"rangeStart": first, "rangeEnd": last, "gateway": first}
    for key in [key for key in bounds if entry.get(key) is not None]:
        bounds[key] = parse_address(entry[key], ipaddress.ip_address, f'"{key}"')
        if bounds[key].version != subnet.version or not first <= bounds[key] <= last:
            raise config_error(f'"{key}" {bounds[key]} is no host address of "subnet" {subnet}')
    if bounds["rangeStart"] > bounds["rangeEnd"]:
        raise config_error(f'"rangeStart" {bounds["rangeStart"]} is after "rangeEnd" {bounds["rangeEnd"]}')
    return {"subnet": subnet, "start": int(bounds["rangeStart"]), "end": int(bounds["rangeEnd"]), "gateway": bounds["gateway"]}


def refuse_overlaps(ranges):
    """CNIError 7 if two ranges share an address."""
    ordered = sorted(ranges, key=lambda entry: (entry["subnet"].version, entry["start"]))
    for one, other in zip(ordered, ordered[1:]):
        if one["subnet"].version == other["subnet"].version and one["end"] >= other["start"]:
            raise config_error(f'two "ranges" overlap: {one["subnet"]} and {other["subnet"]}')


def parse_route(route):
    """A route of "ipam.routes" as in a result: dst, and gw, mtu, advmss, priority, table, scope where given. CNIError 7."""
    if not isinstance(route, dict):
        raise config_error(f'"routes" must hold objects like {{"dst": "0.0.0.0/0"}}, not {kind_of(route)}')
    parsed = {"dst": str(parse_address(route.get("dst"), ipaddress.ip_network, '"dst" of a route'))}
    if route.get("gw") is not None:
        parsed["gw"] = str(parse_address(route["gw"], ipaddress.ip_address, '"gw" of a route'))
        if family_of(parsed["gw"]) != family_of(parsed["dst"]):
            raise config_error(f"the route to {parsed['dst']} has a gateway of the other family: {parsed['gw']}")
    attributes = {key: number(route, key, None, 0, 2 ** (8 if key == "scope" else 32) - 1) for key in ROUTE_WORDS}
    return {**parsed, **{key: value for key, value in attributes.items() if value is not None}}


def parse_resolv_conf(path):
    """A resolv.conf as a "dns" object. CNIError 7 if there is no such file."""
    text = read_file(path) if path else ""
    if text is None:
        raise config_error(f'"resolvConf" {path} does not exist')
    dns = {}
    for key, *values in (line.split() for line in text.splitlines() if len(line.split()) > 1):
        if key == "nameserver":
            dns.setdefault("nameservers", []).append(values[0])
        elif key in ("search", "options", "domain"):
            dns[key] = values[0] if key == "domain" else values
    return dns


def requested_ips(request):
    """The addresses that the caller asks for: an array, or in CNI_ARGS a list with commas. CNIError 7."""
    asked = requested(request, "ips", "IP") or []
    listed = [ip for ip in asked.split(",") if ip] if isinstance(asked, str) else typed({"ips": asked}, "ips", list, [])
    return [parse_address(ip, ipaddress.ip_interface, "a requested address").ip for ip in listed]


def ipam_add(request, ipam, run):
    """The IPAM result for this attachment. CNIError 11 when every address is taken."""
    if ipam["type"]:
        return delegate_add(request, ipam["type"], run)
    if not ipam["range_sets"]:
        return {"ips": [], "routes": [], "dns": {}}
    leases = ipam["leases"]
    with leases.lock:
        leases.run_id = run_id(request.run_dir, make=True)
        leases.release(request.container_id, request.ifname)  # of an ADD that was killed; a live attachment was refused before
        chosen = choose_addresses(leases, ipam["range_sets"], ipam["asked"])
        leases.take([address for address, _ in chosen], request.container_id, request.ifname)
        for index, (address, _) in enumerate(chosen):
            leases.set_last(index, address)
    ips = [{"address": f"{address}/{entry['subnet'].prefixlen}", "gateway": str(entry["gateway"])} for address, entry in chosen]
    return {"ips": ips, "routes": ipam["routes"], "dns": ipam["dns"]}


def choose_addresses(leases, range_sets, asked):
    """[(address, its range)], one for each set: the requested address that lies in it, else the next free one. CNIError 7 or 11."""
    chosen = {}
    for index, ranges in enumerate(range_sets):
        wanted = [(address, entry) for address in asked for entry in ranges if is_in_range(address, entry)]
        address, entry = wanted[0] if wanted else next_free(leases, ranges, index)
        if wanted and address == entry["gateway"]:
            raise config_error(f"the requested address {address} is the gateway of {entry['subnet']}")
        if wanted and leases.holder(address):
            raise CNIError(TRY_AGAIN, f"the requested address {address} is in use by container {leases.holder(address)[0]}")
        chosen[address] = entry
    for address in asked:
        if address not in chosen:
            raise config_error(f"no range holds the requested address {address}")
    return list(chosen.items())


def is_in_range(address, entry):
    """Whether an address lies in a range."""
    return address.version == entry["subnet"].version and entry["start"] <= int(address) <= entry["end"]


def next_free(leases, ranges, set_index, code=TRY_AGAIN):
    """(address, its range): the first free address after the one given out last. CNIError `code` when there is none.

    The search goes round all ranges once, so its cost does not depend on how many addresses are taken.
    """
    last = leases.last(set_index)
    begin = next((index for index, entry in enumerate(ranges) if entry["start"] <= last <= entry["end"]), 0)
    for index, entry in enumerate([*ranges[begin:], *ranges[: begin + 1]]):
        start = max(entry["start"], last + 1) if index == 0 else entry["start"]
        for value in range(start, entry["end"] + 1):
            address = entry["subnet"][value - int(entry["subnet"].network_address)]
            if address != entry["gateway"] and not leases.holder(address):
                return address, entry
    subnets = ", ".join(str(entry["subnet"]) for entry in ranges)
    raise CNIError(code, f'no address of network "{leases.network}" is free in {subnets}', f"the leases are files in {leases.dir}")


def ipam_del(request, run):
    """Release the addresses. Leases are released whatever "ipam" says: the configuration may have changed since ADD."""
    leases = ipam_leases(request)
    if os.path.isdir(leases.index_dir):
        with leases.lock:
            leases.release(request.container_id, request.ifname)
    delegate_call(request, run, "DEL")


def ipam_check(request, ipam, run):
    """What is wrong with the leases, as a list of messages for `report`. A delegate checks its own."""
    delegate_call(request, run, "CHECK")
    own = [str(ipaddress.ip_interface(ip["address"]).ip) for ip in own_ips(request) if ipam["range_sets"]]
    lost = [address for address in own if ipam["leases"].holder(address) != request.attachment[1:]]
    return [f"no lease of {address} in {ipam['leases'].dir}" for address in lost]


def ipam_gc(request, run):
    """Release the leases that belong to none of the attachments to keep."""
    keep, leases = valid_attachments(request), ipam_leases(request)
    if keep is not None and os.path.isdir(leases.index_dir):
        with leases.lock:
            leases.release_all_but(keep)
    delegate_call(request, run, "GC")


def ipam_status(request, ipam, run):
    """CNIError 50 when no address is free."""
    delegate_call(request, run, "STATUS")
    for index, ranges in enumerate(ipam["range_sets"]):
        next_free(ipam["leases"], ranges, index, NOT_AVAILABLE)


def delegate_type(conf):
    """The plugin that "ipam" delegates to; "" if IPAM is built in, or there is none. CNIError 7 for what is no name of a program."""
    kind = any_case(conf.get("ipam"), "type")
    if not isinstance(kind, str) or kind in ("", "mncni", "mncni.py"):
        return ""
    if "/" in kind or kind in (".", ".."):
        raise config_error(f'"type" of "ipam" must be the name of a program, not {kind!r}')
    return kind


def delegate_call(request, run, verb):
    """Call the delegate, if there is one, with this call's environment and configuration. Returns its stdout. SPEC section 4.

    If it fails, its error is raised, with its code. CNIError 4 if it is not in CNI_PATH. `verb` may differ from the request's: a failed
    ADD ends with a DEL.
    """
    kind = delegate_type(request.conf)
    if not kind:
        return ""
    found = [os.path.join(part, kind) for part in request.path if os.path.isfile(os.path.join(part, kind))]
    if not found:
        raise CNIError(BAD_ENVIRONMENT, f'cannot find the IPAM plugin "{kind}" in CNI_PATH {":".join(request.path)!r}')
    why = "another plugin manages the addresses of this network"
    reply = run(Command([found[0]], to_json(request.conf), why, {"CNI_COMMAND": verb}))
    if reply.stderr:
        tell(f"{kind}: {reply.stderr.strip()}")
    if reply.exit_code == 0:
        return reply.stdout
    try:
        error = parse_json(reply.stdout)
        raise CNIError(int(error["code"]), f"{kind}: {error.get('msg', '')}", str(error.get("details", "")))
    except (ValueError, TypeError, KeyError):
        said = (reply.stdout + reply.stderr).strip()
        raise CNIError(COMMAND_FAILED, f"the IPAM plugin {kind} failed with exit {reply.exit_code} and no error object", said) from None


def delegate_add(request, kind, run):
    """The IPAM result of the delegate's ADD. If it fails, the caller's undo calls the delegate's DEL, as SPEC section 4 asks."""
    result = parse_json_object(delegate_call(request, run, "ADD"), f"the result of the IPAM plugin {kind}")
    result = parse_prev_result({"prevResult": {"ips": [], **result}})
    if not result["ips"]:
        raise CNIError(COMMAND_FAILED, f"the IPAM plugin {kind} returned no address")
    routes = [parse_route(route) for route in result.get("routes") or []]
    ips = [{key: ip[key] for key in ("address", "gateway") if ip.get(key)} for ip in result["ips"]]
    return {"ips": ips, "routes": routes, "dns": result.get("dns") or {}}


# ---------------------------------------------------------------------------------------------------------------------
# naivewg: spoofCheck                                                          a pod speaks for itself alone, nft(8), family bridge
# ---------------------------------------------------------------------------------------------------------------------
#
# Pods on a bridge are neighbours: each could answer for the others' addresses, or for the gateway's, and read what is meant for them. So
# what comes in from a pod's veth must carry the pod's MAC and one of its addresses; also where it says whose address is at which MAC, in
# ARP and in its IPv6 counterpart, neighbour discovery. The rules act before the bridge learns from a frame. Every packet costs one lookup
# of its device in the map `pods`, which leads to a chain of that pod's own.

SPOOF = "bridge mncni_spoof"
SPOOF_CHAINS = f"""\
table {SPOOF} {{
  counter dropped {{ }}
  map pods {{ type ifname : verdict; }}
  chain refused {{ }}
  chain ipv4_of_pod {{ }}
  chain ipv6_of_pod {{ }}
  chain prerouting {{ type filter hook prerouting priority -300; }}
}}"""
# What is the same for all pods. Not from a pod: multicast routers (PIM, IGMP and MLD queries), IPv6 routers and redirects, and extension
# headers, except of fragments and of MLD reports. ipv6_of_pod returns what is about neighbours, which stands alone in its packet and has
# one option at most. The rules count from the IPv6 header (@nh) and ask for no "meta l4proto", "icmpv6" or "frag": for a frame that a pod
# made of pages (PACKET_TX_RING) the kernel takes the next header from memory that is not the packet's.
EXTENSIONS = "{ 0, 43, 44, 51, 58, 60, 103 }"  # and ICMPv6, PIM
NO_NEIGHBOURS = "{ 1, 2, 3, 4, 128, 129 }"  # ICMPv6: errors and echo
SPOOF_RULES = (
    ("refused", "counter name dropped drop"),
    ("ipv4_of_pod", "ip protocol != { 2, 103 } accept"),
    ("ipv4_of_pod", "ip protocol 2 ip frag-off & 0x3fff == 0 igmp type { 0x12, 0x16, 0x17, 0x22 } accept"),
    ("ipv4_of_pod", "goto refused"),
    ("ipv6_of_pod", f"ip6 saddr != :: ip6 nexthdr != {EXTENSIONS} accept"),
    ("ipv6_of_pod", "ip6 saddr != :: ip6 nexthdr 44 @nh,336,13 != 0 accept"),  # a later fragment
    ("ipv6_of_pod", f"ip6 saddr != :: ip6 nexthdr 44 @nh,320,8 != {EXTENSIONS} accept"),  # a first one
    ("ipv6_of_pod", f"ip6 saddr != :: ip6 nexthdr 44 @nh,320,8 58 @nh,384,8 {NO_NEIGHBOURS} accept"),
    ("ipv6_of_pod", f"ip6 saddr != :: ip6 nexthdr 58 @nh,320,8 {NO_NEIGHBOURS} accept"),
    ("ipv6_of_pod", "ip6 nexthdr 0 @nh,320,16 0x3a00 @nh,384,8 { 131, 132, 143 } accept"),  # MLD reports, behind one option
    ("ipv6_of_pod", "ip6 nexthdr 58 ip6 length <= 32 @nh,320,8 { 135, 136 } return"),
    ("ipv6_of_pod", "goto refused"),
    ("prerouting", "iifname vmap @pods"),
)
# The words for a pod's port of the bridge. guard: against BPDUs. The mask: what is addressed to the bridge's own neighbours (LLDP, LACP and
# the like), and may be any packet, the bridge else hands to the host as come in by the veth, without asking the firewall.
SPOOF_PORT = "guard on group_fwd_mask 0xfffd"


def link_local(mac):
    """The IPv6 address that an interface gives itself by its MAC (EUI-64). RFC 4291, appendix A."""
    octets = [int(part, 16) for part in mac.split(":")]
    tail = bytes([octets[0] ^ 2, *octets[1:3], 0xFF, 0xFE, *octets[3:]])
    return ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + tail)


def parse_spoof(state):
    """A state: {"owner", "mac", "addresses"}, the addresses parsed. CNIError, TypeError or LookupError if it is none."""
    addresses = [parse_address(text, ipaddress.ip_address, "an address") for text in state["addresses"]]
    return {"owner": state["owner"], "mac": parse_mac(state["mac"], "the MAC"), "addresses": addresses}


def look_spoofs(run_dir):
    """What all pods may send, as look_states returns it."""
    return look_states(run_dir, "spoof", parse_spoof)


def own_spoof(request, mac, ips):
    """The state of this attachment."""
    return parse_spoof({"owner": request.attachment, "mac": mac, "addresses": [ip["address"].partition("/")[0] for ip in ips]})


def plan_pod_rules(state):
    """[(chain, rule)] of one pod: its chain has the name of its veth. A pod without addresses has its link-local one. "ether type" is not
    superfluous: it keeps out what has a VLAN tag before it."""
    chain, mac = host_ifname("mn", *state["owner"]), state["mac"]
    ipv4 = ", ".join(str(address) for address in state["addresses"] if address.version == 4)
    ipv6 = [link_local(mac), *(address for address in state["addresses"] if address.version == 6)]
    targets = ", ".join(f"0x{int(address):032x}" for address in ipv6)
    of_ipv4 = [
        f"ether type ip ip saddr {{ {ipv4} }} goto ipv4_of_pod",
        f"ether type arp arp saddr ether {mac} arp saddr ip {{ {ipv4} }} accept",
        # "Is my address in use?"
        f"ether type arp arp operation request arp saddr ether {mac} arp saddr ip 0.0.0.0 arp daddr ip {{ {ipv4} }} accept",
    ]
    rules = [
        f"ether saddr != {mac} goto refused",
        *(of_ipv4 if ipv4 else []),
        f"ip6 saddr != {{ ::, {', '.join(map(str, ipv6))} }} goto refused",
        "ether type ip6 jump ipv6_of_pod",
        f"ether type ip6 @nh,512,8 {{ 1, 2 }} @nh,528,48 != 0x{mac.replace(':', '')} goto refused",  # the MAC in the option
        f"ether type ip6 @nh,384,128 {{ {targets} }} accept",  # the address in question: "mine is", or "is mine in use?"
        "ip6 saddr != :: @nh,320,8 135 accept",  # who has that address?
        "goto refused",
    ]
    return [(chain, rule) for rule in rules]


REPLACE = [f"table {SPOOF}", f"delete table {SPOOF}"]


def plan_spoof(states, first=()):
    """The command that lets pods send what their states say, in one transaction. first: lines that say what becomes of a table that is
    there; then it makes the table, and there is nothing but these states. Without them it fails if there is no table."""
    lines = [*first, SPOOF_CHAINS] if first else []
    rules = list(SPOOF_RULES) if first else []
    for state in states:
        pod = plan_pod_rules(state)
        lines += [f"add chain {SPOOF} {pod[0][0]}", f"flush chain {SPOOF} {pod[0][0]}"]
        rules += pod
    lines += [f'add rule {SPOOF} {chain} {rule} comment "{short_hash(chain, rule)}"' for chain, rule in rules]
    lines += [f'add element {SPOOF} pods {{ "{name}" : jump {name} }}' for name in spoof_devices(states)]
    return Command(["nft", "-f", "-"], "\n".join(lines) + "\n", "spoofCheck: a pod sends from its own MAC and addresses alone")


def spoof_devices(states):
    """The veths of a list of states."""
    return [host_ifname("mn", *state["owner"]) for state in states]


def plan_unspoof(devices, is_last):
    """A script that takes devices out of the table, whether they are in it or not. is_last: the whole table goes."""
    lines = [f"table {SPOOF} {{ map pods {{ type ifname : verdict; }}; }}"]
    for name in devices:
        element = f'element {SPOOF} pods {{ "{name}"'
        lines += [f"add chain {SPOOF} {name}", f"add {element} : jump {name} }}", f"delete {element} }}"]
        lines += [f"flush chain {SPOOF} {name}", f"delete chain {SPOOF} {name}"]
    return "\n".join(REPLACE if is_last else lines) + "\n"


def spoof_add(request, mac, ips, run):
    """Let the pod send from its MAC and addresses, and from no others."""
    state, path = own_spoof(request, mac, ips), state_path(request, "spoof")
    with states_lock(request.run_dir, "spoof") as lock:
        create = [] if has_others(path) else [f"create table {SPOOF}"]  # without a deletion, for which the kernel waits 15 ms
        write_file(path, to_json({**state, "addresses": [str(address) for address in state["addresses"]]}))
        run = lock.held(run)
        if run(plan_spoof([state], create)).exit_code != 0:  # somebody flushed the table, or one is left
            apply([plan_spoof(look_spoofs(request.run_dir).values(), REPLACE)], run)


def has_others(*paths):
    """Whether there are states beside those at some paths, which are of one kind."""
    directory = os.path.dirname(paths[0])
    return any(len(name) == 16 and os.path.join(directory, name) not in paths for name in os.listdir(directory))


def spoof_del(request, run):
    """Take the pod out of the table, and its host ports if portmap is in this call. A pod that has neither costs no command."""
    path = state_path(request, "spoof")
    if not os.path.lexists(path):
        remove_file(path)  # what an ADD left that was killed while it wrote
        return request.leave_nft(request, run)
    with states_lock(request.run_dir, "spoof") as lock:
        request.leave_nft(request, lock.held(run), plan_unspoof([own_veth(request)], not has_others(path)))
        remove_file(path)


def drop_spoofs_of(states, stale, run):
    """Take the states at some paths out of the table, then remove them."""
    leave_nft(None, run, plan_unspoof(spoof_devices(states[path] for path in stale), not has_others(*stale)))
    for path in stale:
        remove_file(path)


def spoof_check(request, ips, run):
    """What is wrong with the pod's rules, as a list of messages."""
    [mac] = [link["mac"] for link in own_links(request).values() if link.get("mac")][:1] or [""]
    wanted = own_spoof(request, mac, ips)
    state = look_spoofs(request.run_dir).get(state_path(request, "spoof"), wanted)
    allowed, given = (" ".join([one["mac"], *sorted(map(str, one["addresses"]))]) for one in (state, wanted))
    if allowed != given:
        what = f"spoofCheck lets {request.ifname} send from {allowed} alone, and a later plugin gave it {given}"
        return [f'{what}: "spoofCheck": false in a conflist of your own lets it']
    return diff_spoof([wanted], run)[0]


def diff_spoof(states, run):
    """(what the table lacks, what it has too much), as two lists of messages."""
    items = look_nft(["table", *SPOOF.split()], run, "do the rules of spoofCheck stand?")
    found = {("rule", comment) for comment in comments_of(items)}
    found |= {("device", element[0]) for item in items for element in item.get("map", {}).get("elem", [])}
    rules = [*SPOOF_RULES, *(rule for state in states for rule in plan_pod_rules(state))]
    wanted = {("rule", short_hash(*rule)): f"the rule {rule[0]}: {rule[1]}" for rule in rules}
    wanted.update({("device", name): f"the pod behind {name}" for name in spoof_devices(states)})
    missing = [f"nft table {SPOOF} lacks {what}" for key, what in wanted.items() if key not in found]
    return missing, [f"nft table {SPOOF} has a {kind} of no pod: {name}" for kind, name in sorted(found - wanted.keys())]


def restore_spoof(run_dir, run):
    """Write the table again if anything is wrong with it, for example after `nft flush ruleset`. Returns what was wrong, a list of
    messages. Without states it starts no command."""
    if not look_spoofs(run_dir):
        return []
    with states_lock(run_dir, "spoof") as lock:
        states = look_spoofs(run_dir).values()
        missing, extra = diff_spoof(states, run) if states else ([], [])  # the last pod may just have gone
        if missing + extra:
            apply([plan_spoof(states, REPLACE)], lock.held(run))
    return missing + extra


# ---------------------------------------------------------------------------------------------------------------------
# naivewg: a bridge, a veth pair, addresses, routes
# ---------------------------------------------------------------------------------------------------------------------


def parse_naivewg(request):
    """naivewg's configuration, every key checked; docs/plugin.md says what each means. CNIError 7."""
    conf = request.conf
    defaults = {"bridge": "mncni0", "ready": "", "dns": {}, "hairpinMode": True, "isDefaultGateway": True}
    defaults.update({"forceAddress": False, "adoptBridge": False, "ipMasq": False, "spoofCheck": False})
    parsed = {key: typed(conf, key, type(default), default) for key, default in defaults.items()}
    if not is_ifname(parsed["bridge"]):
        raise config_error(f'"bridge" {parsed["bridge"]!r} cannot name an interface')
    cidrs = typed(conf, "clusterCIDRs", list, [])
    parsed["cluster_cidrs"] = [parse_address(cidr, ipaddress.ip_network, '"clusterCIDRs"') for cidr in cidrs]
    parsed["mac"], parsed["ipam"] = requested_mac(request), parse_ipam(request)
    parsed["ranges"] = [entry for ranges in parsed["ipam"]["range_sets"] for entry in ranges]
    smallest = 1280 if any(entry["subnet"].version == 6 for entry in parsed["ranges"]) else 68
    parsed["mtu"] = number(conf, "mtu", 0, smallest, 65534) if conf.get("mtu") else 0  # plan_bridge needs room for one more
    return parsed


def requested_mac(request):
    """The MAC that the caller asks for, "" if none. CNIError 7."""
    mac = requested(request, "mac", "MAC")
    return parse_mac(mac, 'the requested "mac"') if mac else ""


def require_ready(conf, absent, broken):
    """The agent writes a file, the configuration's "ready", that says whether the node's network works. CNIError `absent` if there is none
    of this boot, `broken` if it says no. This starts no process: a runtime asks every few seconds."""
    path = conf["ready"]
    if not path:
        return
    try:
        ready = parse_json_object(read_file(path) or "{}", f"the agent's ready file {path}")
    except CNIError as error:
        raise CNIError(absent, error.msg) from None
    if ready.get("bootID") != boot_id():
        what = "is of an earlier boot" if ready else "is not there"
        raise CNIError(absent, f"the node's network is not up yet: the agent's ready file {path} {what}")
    if ready.get("ok") is not True:
        raise CNIError(broken, f"the node's network is down: {ready.get('reason') or 'the agent gives no reason'}")
    if not is_ifname(ready.get("device")) or not os.path.exists(f"/sys/class/net/{ready['device']}"):
        raise CNIError(broken, f"the node's network is down: its device {ready.get('device')!r} is gone")


def look_host(request, bridge, run, why="is there a bridge, and a link of this pod?"):
    """(the bridge, the attachment's veth) with their addresses; None for what is not there."""
    links = look_ip([f"address show dev {bridge}", f"address show dev {own_veth(request)}"], run, why=why)
    return find_link(bridge, links), find_link(own_veth(request), links)


def is_own(link):
    """Whether MNCNI made a link."""
    return link.get("ifalias") == OWNER_ALIAS or is_half_made(link)


def refuse_foreign_bridge(conf, bridge):
    """CNIError 7 unless the bridge is absent, made by MNCNI, or to be adopted."""
    if bridge is None:
        return
    name = conf["bridge"]
    if bridge.get("linkinfo", {}).get("info_kind") != "bridge":
        raise config_error(f'cannot use bridge "{name}": it is not a bridge; set "bridge" to another name')
    if not is_own(bridge) and not conf["adoptBridge"]:
        raise config_error(f'cannot use bridge "{name}": MNCNI did not make it; set "adoptBridge": true, or "bridge" to another name')


def plan_gateways(conf, ips):
    """The addresses that the bridge must have, like "10.244.1.1/24"; none if it is not the pods' gateway."""
    if not conf["isDefaultGateway"]:
        return []
    return sorted({f"{ip['gateway']}/{ip['address'].partition('/')[2]}" for ip in ips if ip.get("gateway")})


def plan_bridge(conf, bridge, gateways, keeps_mtu=False):
    """Lines for `ip -batch` that bring the bridge into its state; none if it is. CNIError 7 if it has another gateway address. `nodad`: an
    IPv6 address can be used at once, without duplicate address detection (DAD), a wait of a second to see whether somebody else has it.

    The MTU is set when the bridge is made: another network may use it, too. keeps_mtu: and whenever it is another. A bridge takes the
    smallest MTU of its ports until somebody changes its own, and setting it to the present value is no change. So it is made with mtu + 1
    and then set to mtu (net/bridge/br_device.c, br_change_mtu).
    """
    name, mtu, lines, own = conf["bridge"], conf["mtu"], [], bridge is None or is_own(bridge)
    if bridge is None:
        mac = mac_of(gateways[0].partition("/")[0] if gateways else name)
        lines.append(f"link add name {name} {f'mtu {mtu + 1} ' if mtu else ''}address {mac} type bridge no_linklocal_learn 1")
        bridge = {}
    # The bridge would learn the source of such frames (LLDP, LACP) without asking the firewall, so a pod could fill its table by them.
    if (own or conf.get("spoofCheck")) and bridge.get("linkinfo", {}).get("info_data", {}).get("no_linklocal_learn") == 0:
        lines.append(f"link set dev {name} type bridge no_linklocal_learn 1")
    if own and "ifalias" not in bridge:
        lines.append(f"link set dev {name} alias {OWNER_ALIAS}")
    if own and mtu and bridge.get("mtu") != mtu and (keeps_mtu or "ifalias" not in bridge):
        lines.append(f"link set dev {name} mtu {mtu}")
    if "UP" not in bridge.get("flags", []):
        lines.append(f"link set dev {name} up")
    present = addresses_of(bridge, "global")
    configured = {f"{entry['gateway']}/{entry['subnet'].prefixlen}" for entry in conf.get("ranges", [])}  # a set may have several
    for other in sorted(present - set(gateways) - configured):
        blocked = [gateway for gateway in gateways if is_in_the_way(other, gateway)]
        if blocked and not conf["forceAddress"]:
            what = f'bridge "{name}" has the address {other}, this network\'s gateway is {blocked[0]}'
            raise config_error(f'{what}; set "forceAddress": true to replace it, or "bridge" to another name')
        lines += [f"address delete {other} dev {name}"] if blocked else []
    return lines + [f"address replace {one} dev {name}{' nodad' if ':' in one else ''}" for one in gateways if one not in present]


def is_in_the_way(other, gateway):
    """Whether a bridge cannot have both addresses: two of IPv4, or two of IPv6 whose subnets overlap."""
    other, gateway = ipaddress.ip_interface(other), ipaddress.ip_interface(gateway)
    return other.version == gateway.version and (other.version == 4 or other.network.overlaps(gateway.network))


def ensure_bridge(request, conf, bridge, gateways, run):
    """Bring the bridge into its state, and return it. ADDs run side by side: before it changes anything, it looks again under a lock."""
    if not plan_bridge(conf, bridge, gateways) and not look_bridge_sysctls(conf["bridge"], bridge, gateways):
        return bridge
    with Locked(os.path.join(request.run_dir, "bridge.lock")) as lock:
        bridge, _ = look_host(request, conf["bridge"], run, "the same, once more: now a lock keeps other ADDs from changing the bridge")
        refuse_foreign_bridge(conf, bridge)
        lines = plan_bridge(conf, bridge, gateways)
        wrong = look_bridge_sysctls(conf["bridge"], bridge, gateways)
        plan = plan_forwarding(gateways, look_forwarding(run))
        plan += [ip_batch(lines, why="the bridge: every pod's link is a port of it, and its address is the pods' gateway")] if lines else []
        apply(plan + plan_bridge_sysctls(wrong), lock.held(run))
        return look_host(request, conf["bridge"], run, "the bridge's MAC, for the result")[0] or {}


def families_of(addresses):
    """The families of addresses in text as `ip netconf` calls them."""
    return {"inet6" if ":" in address else "inet" for address in addresses}


def look_wrong(keys, value):
    """Those of some sysctls, like "net/ipv4/ip_forward", that are there and have another value."""
    return [key for key in keys if read_file(f"/proc/sys/{key}") not in (f"{value}\n", None)]


def look_bridge_sysctls(name, bridge, gateways=()):
    """{value: [sysctl]} that a bridge, None for one yet to be made, lacks: it must forward, also where new devices do not, and
    ignore router advertisements: a pod that sends one must not become the host's default route (CVE-2020-10749). Without DAD its
    link-local address, which older kernels need for neighbours, works at once."""
    quiet = [f"net/ipv6/conf/{name}/{key}" for key in ("accept_ra", "accept_dad")] if os.path.exists("/proc/sys/net/ipv6") else []
    forwarding = [f"net/{family}/conf/{name}/forwarding" for family in sorted({"ipv6" if ":" in one else "ipv4" for one in gateways})]
    wrong = {value: keys if bridge is None else look_wrong(keys, value) for value, keys in ((0, quiet), (1, forwarding))}
    return {value: keys for value, keys in wrong.items() if keys}


def plan_bridge_sysctls(wrong):
    """The commands for what look_bridge_sysctls returned."""
    whys = {
        0: "no router advertisement from a pod may change the host's routes; no duplicate address detection, a wait of a second",
        1: "the bridge forwards, whatever the host's default for new devices is",
    }
    return [write_sysctls(keys, value, why=whys[value]) for value, keys in wrong.items()]


def look_forwarding(run):
    """{"off": {(family, interface)} that do not forward, where "all" is the host's switch; "uplinks": the devices of IPv4 default routes;
    "advertised": [accept_ra sysctl] that are 1, of interfaces that do not forward IPv6}."""
    facts = look_ip(["netconf show", "route show default"], run, why="does the host forward packets?")
    entries = [entry for entry in facts if {"interface", "family"} <= entry.keys()]
    off = {(entry["family"], entry["interface"]) for entry in entries if not entry.get("forwarding")}
    keys = [f"net/ipv6/conf/{name}/accept_ra" for family, name in sorted(off) if family == "inet6" and name not in ("all", "default", "lo")]
    advertised = [key for key in keys if read_file(f"/proc/sys/{key}") == "1\n"]
    return {"off": off, "uplinks": sorted({entry["dev"] for entry in facts if "dev" in entry}), "advertised": advertised}


def plan_forwarding(gateways, facts):
    """Commands that let the host route for the pods. facts: what look_forwarding returned. Only what is off is written: /proc/sys may be
    read-only and right.

    A host that forwards IPv6 drops its routes from router advertisements where accept_ra is 1, and keeps them where it is 2. 0 stays: there
    a program, such as systemd-networkd, handles advertisements.
    """
    off, keys = facts["off"], {"inet": "net/ipv4/ip_forward", "inet6": "net/ipv6/conf/all/forwarding"}
    closed = [keys[family] for family in sorted(families_of(gateways)) if (family, "all") in off]
    closed += [f"net/ipv4/conf/{name}/forwarding" for name in facts["uplinks"] if ("inet", name) in off and keys["inet"] not in closed]
    advertised = facts["advertised"] if keys["inet6"] in closed else []
    plan = [write_sysctls(advertised, 2, why="keep the routes that routers advertise to this host")] if advertised else []
    return plan + ([write_sysctls(closed, 1, why="IP forwarding: the host routes for the pods")] if closed else [])


def plan_routes(conf, ipam):
    """The pod's routes as in a result: IPAM's, with the pod's gateway where they name none, then a default route for each family."""
    gateways = {family_of(ip["address"]): ip["gateway"] for ip in reversed(ipam["ips"]) if ip.get("gateway")}
    routes = []
    for route in ipam["routes"]:
        is_local = route.get("scope", 0) >= 253  # link or host: reached without a gateway
        gateway = route.get("gw") or ("" if is_local else gateways.get(family_of(route["dst"])))
        routes.append({**route, "gw": gateway} if gateway else route)
    if conf["isDefaultGateway"]:
        for _, gateway in sorted(gateways.items()):
            if not any(route["dst"] == default_route(gateway) and "table" not in route for route in routes):
                routes.append({"dst": default_route(gateway), "gw": gateway})
    return [route for index, route in enumerate(routes) if route not in routes[:index]]


def plan_attach(request, conf, ipam, mac):
    """Commands that make the veth pair, with the pod's end directly in the pod, and give the pod its addresses and routes.

    Hairpin lets a packet leave the bridge by the port it came in by: a pod reaches itself through a Service or a host port. Both ends get
    their MACs when they are made: to set them later would race with udev's MACAddressPolicy.
    """
    veth, ifname, mtu = own_veth(request), request.ifname, f"mtu {conf['mtu']} " if conf["mtu"] else ""
    host = [
        f"link add name {veth} {mtu}address {mac_of(veth, '0a:59')} type veth peer name {ifname} netns {request.netns} {mtu}address {mac}",
        f"link set dev {veth} alias {link_alias(request)} master {conf['bridge']} up",
    ]
    slave = [*(["hairpin on"] if conf["hairpinMode"] else []), *([SPOOF_PORT] if conf["spoofCheck"] else [])]
    if slave:
        host.append(f"link set dev {veth} type bridge_slave {' '.join(slave)}")
    pod = [f"address add {ip['address']} dev {ifname} {'nodad' if ':' in ip['address'] else 'brd +'}" for ip in ipam["ips"]]
    pod.append(f"link set dev {ifname} up")
    pod += [route_line(route, ifname) for route in plan_routes(conf, ipam)]
    plan = [ip_batch(host, why="a veth pair is a cable: one end in the pod, the other a port of the bridge; hairpin: a pod reaches itself")]
    keys, why = [f"net/ipv6/conf/{ifname}/accept_ra"], "no router but the gateway: another pod may send router advertisements"
    if conf["spoofCheck"]:
        keys.append(f"net/ipv6/conf/{ifname}/addr_gen_mode")
        why += "; the link-local address that its MAC gives, see spoofCheck"
    if any(":" in ip["address"] for ip in ipam["ips"]):
        keys += [f"net/ipv6/conf/{ifname}/disable_ipv6", f"net/ipv6/conf/{ifname}/accept_dad"]
        keys.append("net/ipv6/conf/lo/disable_ipv6")  # packets to the pod's own address come in through lo
        why += "; IPv6 on, as runtimes may switch it off; no duplicate address detection, a wait of a second"
    plan += [write_sysctls(keys, 0, request.netns, why)] if os.path.exists("/proc/sys/net/ipv6") else []
    return [*plan, ip_batch(pod, request.netns, "in the pod: its addresses, and all that is not local goes to the gateway")]


def route_line(route, ifname):
    """A route of a result as a line for `ip -batch`. "prepend" keeps another attachment's route to the same destination behind it."""
    words = ["route", "prepend", route["dst"]] + (["via", route["gw"]] if "gw" in route else []) + ["dev", ifname]
    for key, word in ROUTE_WORDS.items():
        words += [word, str(route[key])] if key in route else []
    return " ".join(words)


def look_masq(request, conf, run):
    """The stamp of the network's masquerade rules, "" if they are not complete: a hash in their comments, because nft prints a rule in
    other words than it was given. A look costs less than writing them."""
    if not conf["ipMasq"]:
        return ""
    comments = look_rules(["table", "inet", "mncni_masq"], run, "do packets to the outside get the host's address?")
    stamps = [comment.rpartition(" ")[2] for comment in comments if comment.rpartition(" ")[0] == request.network[:80]]
    return stamps[0] if len(stamps) == MASQ_RULES and len(set(stamps)) == 1 else ""


MASQ_RULES = 5  # of a network: two for each family, and one about resets


def masq_mark(request):
    """The file that says that the network has, or had, masquerade rules."""
    return os.path.join(request.run_dir, f"masq-{short_hash(request.network)}")


def plan_masq(request, conf, ips, present=""):
    """The command that writes the network's masquerade rules, in a list; [] if the rules with the stamp `present` are the same. If they
    are, but its subnets are not in the configuration, a command that adds these.

    Masquerade replaces the source address by the host's. It is for packets from the network's subnets to anything but them, the
    clusterCIDRs and multicast. There is one rule for each family and none for a pod, so a pod leaves nothing behind. fully-random: two
    pods that use one source port at the same moment would get one port of the host, and one packet would be lost.

    Connection tracking translates no packet that it calls invalid, such as a TCP segment beyond the window. A pod's is dropped instead of
    leaving with the pod's address. One for a pod reaches the host, which knows no such connection and would reset it: a reset that
    belongs to no connection is dropped.
    """
    key, network = short_hash(request.network), request.network
    nat, last, elements = f"net_{key}", f"last_{key}", []
    # Only a delegate or the runtime knows the subnets of pods that are not in the configuration: these are collected, and no rule is
    # replaced for them: while a rule is replaced together with its set of ranges, a packet may miss both.
    is_static = conf["ranges"] and not runtime_config(request, "ipRanges", list, [])
    subnets = [entry["subnet"] for entry in conf["ranges"]] + [ipaddress.ip_interface(ip["address"]).network for ip in ips]
    lines = [
        "add table inet mncni_masq",
        f"add chain inet mncni_masq {nat} {{ type nat hook postrouting priority srcnat; policy accept; }}",
        f"add chain inet mncni_masq {last} {{ type filter hook postrouting priority srcnat + 10; policy accept; }}",
        f"flush chain inet mncni_masq {nat}",
        f"flush chain inet mncni_masq {last}",
        f'add rule inet mncni_masq {last} tcp flags & rst == rst ct state invalid drop comment "{network[:80]} STAMP"',
    ]
    for version, protocol, kind, multicast in ((4, "ip", "ipv4_addr", "224.0.0.0/4"), (6, "ip6", "ipv6_addr", "ff00::/8")):
        name = f"pods{version}_{key}"
        own = ipaddress.collapse_addresses(subnet for subnet in subnets if subnet.version == version)
        cluster = [cidr for cidr in conf["cluster_cidrs"] if cidr.version == version]
        spared = ipaddress.collapse_addresses([*cluster, ipaddress.ip_network(multicast)])
        lines.append(f"add set inet mncni_masq {name} {{ type {kind}; flags interval; auto-merge; }}")
        lines += [f"flush set inet mncni_masq {name}"] if is_static else []
        elements += [f"add element inet mncni_masq {name} {{ {subnet} }}" for subnet in own]
        match = f"{protocol} saddr @{name} {protocol} daddr != @{name} {protocol} daddr != {{ {', '.join(map(str, spared))} }}"
        lines.append(f'add rule inet mncni_masq {nat} {match} masquerade fully-random comment "{network[:80]} STAMP"')
        lines.append(f'add rule inet mncni_masq {last} {match} drop comment "{network[:80]} STAMP"')
    stamp = short_hash(*lines, *(elements if is_static else []))
    if stamp == present:
        lines = []
    script = "\n".join([*lines, *elements]).replace("STAMP", stamp) + "\n"
    why = "masquerade: packets from pods to the outside leave with the host's address; one rule for the network, none for a pod"
    return [] if stamp == present and is_static else [Command(["nft", "-f", "-"], script, why)]


def ensure_masq(request, conf, ips, present, run):
    """Write the network's masquerade rules if they are not as the configuration says; remove them if it says no masquerade any more."""
    mark = masq_mark(request)
    if conf["ipMasq"] and ips:
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644))
        apply(plan_masq(request, conf, ips, present), run)
    elif not conf["ipMasq"] and os.path.exists(mark):
        key, kinds = short_hash(request.network), (("chain", "net_"), ("chain", "last_"), ("set", "pods4_"), ("set", "pods6_"))
        lines = [f"delete {kind} inet mncni_masq {name}{key}" for kind, name in kinds]
        ask(Command(["nft", "-f", "-"], "\n".join(lines) + "\n", "the configuration says no masquerade any more"), run)
        remove_file(mark)


def naivewg_result(request, conf, ipam, bridge_mac, mac):
    """The attachment as a 1.1.0 result: bridge, host's end, pod's end, in the order of the reference bridge plugin."""
    veth, mtu = own_veth(request), {"mtu": conf["mtu"]} if conf["mtu"] else {}
    interfaces = [
        {"name": conf["bridge"], "mac": bridge_mac, **mtu},
        {"name": veth, "mac": mac_of(veth, "0a:59"), **mtu},
        {"name": request.ifname, "mac": mac, **mtu, "sandbox": request.netns},
    ]
    ips, dns = [{**ip, "interface": 2} for ip in ipam["ips"]], conf["dns"] or ipam["dns"]
    return {"cniVersion": NEWEST, "interfaces": interfaces, "ips": ips, "routes": plan_routes(conf, ipam), "dns": dns}


def naivewg_add(request, run):
    """ADD: join the pod to the bridge. Returns a 1.1.0 result. If it fails, naivewg_del undoes it, except where it refused to begin."""
    conf = parse_naivewg(request)
    require_ready(conf, TRY_AGAIN, TRY_AGAIN)
    looks = [(look_host, (request, conf["bridge"], run)), (look_masq, (request, conf, run))]
    (bridge, veth), masq_stamp = all_of(looks, request.at_once)
    refuse_foreign_bridge(conf, bridge)
    if veth is not None:
        raise CNIError(BAD_ENVIRONMENT, f"{request.ifname} of container {request.container_id} is attached already: {veth['ifname']}")
    try:
        ipam = with_gateways(conf, ipam_add(request, conf["ipam"], run))
        first = ipam["ips"][0]["address"].partition("/")[0] if ipam["ips"] else link_alias(request)
        mac = conf["mac"] or mac_of(first)
        bridge = ensure_bridge(request, conf, bridge, plan_gateways(conf, ipam["ips"]), run)
        ensure_masq(request, conf, ipam["ips"], masq_stamp, run)
        *cable, addresses = plan_attach(request, conf, ipam, mac)
        rules = [(spoof_add, (request, mac, ipam["ips"], run))] if conf["spoofCheck"] else []
        all_of([*rules, (apply, (cable, run))], request.at_once)
        apply([addresses], run)  # the pod's interface is up when its rules stand
        request.new_peer = {"ifname": own_veth(request), "mtu": conf["mtu"] or 1500}
        return merge_results(request.prev_result, naivewg_result(request, conf, ipam, bridge.get("address", ""), mac))
    except Exception as error:
        best_effort(naivewg_del, request, run)
        # Not looked at before: the kernel refuses what cannot be, and a look would cost two processes for each pod.
        if getattr(error, "code", 0) == COMMAND_FAILED:
            refuse_ipv6_where_it_is_off(conf)
            if look_pod(request, run) is not None:
                raise CNIError(BAD_ENVIRONMENT, f'CNI_IFNAME "{request.ifname}" exists already in {request.netns}') from None
        raise


def refuse_ipv6_where_it_is_off(conf):
    """CNIError 7, as the reason of an ADD that failed, if the configuration has IPv6 ranges and the host has IPv6 switched off."""
    subnets = [str(entry["subnet"]) for entry in conf["ranges"] if entry["subnet"].version == 6]
    by_sysctl = read_file("/proc/sys/net/ipv6/conf/all/disable_ipv6") == "1\n" and "net.ipv6.conf.all.disable_ipv6=1"
    off = by_sysctl if os.path.exists("/proc/sys/net/ipv6") else "ipv6.disable=1 on the kernel's command line"
    if subnets and off:
        raise config_error(f'"ranges" has {subnets[0]}, but this host has IPv6 off: {off}; switch it on, or leave IPv6 out') from None


def with_gateways(conf, ipam):
    """The IPAM result with a gateway for each address, if the bridge is to be one: by default the first address of the subnet."""
    if not conf["isDefaultGateway"]:
        return ipam
    ips = [(ip, ipaddress.ip_interface(ip["address"]).network) for ip in ipam["ips"]]
    return {**ipam, "ips": [ip if ip.get("gateway") or net.num_addresses < 3 else {**ip, "gateway": str(net[1])} for ip, net in ips]}


def naivewg_del(request, run):
    """DEL: delete the veth pair and its rules, then release the addresses: none may be given out again while it is in use. It needs neither
    the namespace nor prevResult."""
    # At the same time, because for both the kernel waits 10 to 20 ms. Nothing sends by now: runtimes end the pod's programs before DEL.
    all_of([(delete_links, (request.links, run)), (spoof_del, (request, run))], request.at_once)
    ipam_del(request, run)


def naivewg_check(request, run):
    """CHECK: everything that ADD made is as prevResult says."""
    conf, ips = parse_naivewg(request), own_ips(request)
    bridge, veth = look_host(request, conf["bridge"], run, "are the bridge and the pod's link as ADD made them?")
    gateways = plan_gateways(conf, with_gateways(conf, {"ips": ips})["ips"])
    problems = diff_link(f"bridge {conf['bridge']}", bridge, gateways)
    if gateways:
        off = look_forwarding(run)["off"] & {(family, name) for family in families_of(gateways) for name in ("all", conf["bridge"])}
        problems += [f"the host does not forward {family} on {name}" for family, name in sorted(off)]
    problems += diff_link(f"link {own_veth(request)} on the host", veth)
    if veth and veth.get("master") != conf["bridge"]:
        problems.append(f"link {own_veth(request)} is no port of bridge {conf['bridge']}")
    problems += check_pod(request, ips, run)
    problems += ipam_check(request, conf["ipam"], run)
    if conf["ipMasq"] and ips and not look_masq(request, conf, run):
        problems.append("the masquerade rules in nft table inet mncni_masq are not whole")
    problems += spoof_check(request, ips, run) if conf["spoofCheck"] else []
    report(request, problems)


def check_pod(request, ips, run):
    """What is wrong in the pod, as a list of messages. It compares with prevResult: a later plugin may have changed the MAC."""
    what, pod = f"{request.ifname} in the pod", look_pod(request, run)
    problems = diff_link(what, pod, [str(ipaddress.ip_interface(ip["address"])) for ip in ips])
    macs = [str(link["mac"]).lower() for link in own_links(request).values() if link.get("mac")]
    if pod and macs and pod.get("address") not in macs:
        problems.append(f"{what} has the MAC {pod.get('address')}, not {macs[0]}")
    routes = [route for route in request.prev_result.get("routes") or [] if is_address(route.get("dst"), ipaddress.ip_network)]
    present = []
    for family in sorted({family_of(route["dst"]) for route in routes}):
        present += look_ip(["route show table all"], run, request.netns, family, f"the pod's IPv{family[1]} routes")
    return problems + [f"no route to {route['dst']} in the pod" for route in routes if not any(is_route(route, other) for other in present)]


def is_route(route, present):
    """Whether a route of `ip -json` is this route of a result. It compares only what the result names."""
    dst = default_route(route["dst"]) if present.get("dst", "default") == "default" else present["dst"]
    table = {"main": "254", "default": "253", "local": "255"}.get(str(present.get("table", "main")), str(present.get("table")))
    gateways = [hop.get("gateway") for hop in present.get("nexthops") or [present]]
    return (
        ipaddress.ip_network(dst, strict=False) == ipaddress.ip_network(route["dst"], strict=False)
        and (not route.get("gw") or str(parse_address(route["gw"], ipaddress.ip_address, '"gw" of a route')) in gateways)
        and (not route.get("priority") or present.get("metric", 0) == route["priority"])
        and ("table" not in route or table == str(route["table"] or 254))
    )


def naivewg_gc(request, run):
    """GC: delete the network's veths and leases that belong to none of the attachments to keep."""
    drop_spoofs = (gc_states, (request, "spoof", parse_spoof, drop_spoofs_of, run))
    all_of([(delete_stale_links, (request, "veth", "mn", run)), drop_spoofs, (ipam_gc, (request, run))])


def naivewg_status(request, run):
    """STATUS: 50 if an ADD would fail, 51 if the present pods have no network either. Starts no process, except for a delegate."""
    conf = parse_naivewg(request)
    require_ready(conf, NOT_AVAILABLE, LIMITED_CONNECTIVITY)
    ipam_status(request, conf["ipam"], run)


# ---------------------------------------------------------------------------------------------------------------------
# portmap: host ports                                                             nft(8); CONVENTIONS, portMappings
# ---------------------------------------------------------------------------------------------------------------------
#
# A host port is a port of the node whose connections go to a pod. A file <run_dir>/portmap/KEY says what an attachment asks for. ADD,
# DEL and GC change these files and then write the whole nft table from all of them, in one transaction, under one lock. So a crash at
# any moment needs no repair: the next call writes the right table. If two pods ask for the same host port, the newer one gets it. When
# it goes, the port returns to the older one.
#
# The rules change the destination of a connection's first packet (dnat). conntrack, the kernel's table of connections (ct), remembers it
# and changes all others, and the replies back. Only connections to an address of the host are changed. Two kinds also need an address of
# the host as their source (masquerade), or the replies would not come back through the host: from the pod's own subnet, the pod itself
# included, and from 127.0.0.1. What a connection was addressed to (ct original) tells host ports from the Services that kube-proxy
# translates; a mark or a label on the connection would not do, as other programs write these, too. For 127.0.0.1 the pods' device must
# accept such packets (route_localnet), so the chain `guard` drops those of pods.

PORTMAP = "table inet mncni_portmap"
LOCALNET = "127.0.0.0/8"
PORTMAP_CHAINS = f"""\
{PORTMAP} {{
  chain ports {{ }}
  chain prerouting {{ type nat hook prerouting priority -100; }}
  chain output {{ type nat hook output priority -100; }}
  chain postrouting {{ type nat hook postrouting priority 100; }}
  chain guard {{ type filter hook prerouting priority -300; }}
  chain replies {{ type filter hook prerouting priority -150; }}
}}
"""


def parse_mapping(mapping):
    """One of "portMappings" as (protocol, host address or None, host port, container port). CNIError 7."""
    if not isinstance(mapping, dict):
        raise config_error('"portMappings" must hold objects like {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}')
    mapping = {key: any_case(mapping, key) for key in ("protocol", "hostIP", "hostPort", "containerPort")}
    ports = [number(mapping, key, 0, 1, 65535) for key in ("hostPort", "containerPort")]
    protocol = (typed(mapping, "protocol", str, "") or "tcp").lower()
    if protocol not in ("tcp", "udp", "sctp"):
        raise config_error(f'"protocol" of host port {ports[0]} must be one of tcp, udp, sctp, not {protocol!r}')
    host_ip = typed(mapping, "hostIP", str, "")
    if not host_ip:
        return protocol, None, *ports
    address = parse_address(host_ip, ipaddress.ip_address, f'"hostIP" of host port {ports[0]}')
    address = getattr(address, "ipv4_mapped", None) or address  # ::ffff:192.0.2.1 is IPv4 in packets
    if str(address) == "::1":
        raise config_error(f'"hostIP" of host port {ports[0]} cannot be ::1: the kernel routes nothing from there; 127.0.0.1 works')
    return protocol, address, *ports


def parse_ports(mappings, ips):
    """Which host ports lead where: {(4 or 6, host address or "", protocol, host port): (the pod's ip_interface, container port)}.
    A mapping leads to the pod's first address of each family. CNIError 7."""
    if mappings and not ips:
        raise config_error("portmap: the pod has no address for a host port to lead to")
    addresses, ports = [parse_address(ip["address"], ipaddress.ip_interface, "the pod's address") for ip in ips], {}
    parsed = [parse_mapping(mapping) for mapping in mappings]
    for own in {address.version: address for address in reversed(addresses)}.values():
        for protocol, host_ip, host_port, container_port in parsed:
            if host_ip and host_ip.version != own.version:
                continue
            key = (own.version, str(host_ip) if host_ip and not host_ip.is_unspecified else "", protocol, host_port)
            if ports.setdefault(key, (own, container_port)) != (own, container_port):
                raise config_error(f'"portMappings" leads host port {host_port}/{protocol} to two container ports')
    return ports


def parse_asked(state):
    """The rest of a state of portmap, see look_ports. CNIError, ValueError, TypeError or LookupError if it is none."""
    device = typed(state, "device", str, "")
    if not is_ifname(device or "none") or type(state["since"]) is not int:
        raise ValueError
    return {**state, "device": device, "ports": parse_ports(state["mappings"], state["ips"])}


def look_ports(run_dir):
    """What all attachments ask for, as look_states returns it. A state is {"owner", "since": nanoseconds, "device": the one that the pods'
    packets come in by, by convention the first of prevResult's interfaces on the host, "mappings" and "ips" as the runtime gave them,
    "ports": as parse_ports returns them}."""
    return look_states(run_dir, "portmap", parse_asked)


def devices_of(states):
    """The devices behind which the pods of a list of states are."""
    return {state["device"] for state in states if state["device"]}


def look_node_addresses(run):
    """The addresses whose ports are host ports, besides LOCALNET. Not those on dummy devices, where kube-proxy keeps the addresses of
    Services in its IPVS mode, and load balancers keep theirs; except one that the node itself sends from, as where a routing daemon
    announces the node."""
    facts = look_ip(["address show scope global", "route show default"], run, why="the node's own addresses: only on these are host ports")
    kept = [link for link in facts if link.get("ifname") == "kube-ipvs0" or link.get("linkinfo", {}).get("info_kind") in ("dummy", "ifb")]
    if any(":" in address for link in kept for address in addresses_of(link)):
        facts += look_ip(["route show default"], run, "", "-6", "does the node send from an address on a dummy device?")
    sources, found = {route["prefsrc"] for route in facts if "prefsrc" in route}, set()
    for link in [link for link in facts if "addr_info" in link]:
        addresses = {address.partition("/")[0] for address in addresses_of(link)}
        found |= addresses & sources if link in kept else addresses
    return sorted(found)


def plan_rules(states, node_addresses):
    """The rules of the table for a list of states: [(chain, rule, whose it is)]. The newest state that asks for a port has it.
    node_addresses: see look_node_addresses."""
    ports = {}
    for state in sorted(states, key=lambda state: state["since"]):
        network, container_id, ifname = state["owner"]
        owner = f"{network[:30]}:{container_id[:60]}:{ifname}"  # a comment has at most 128 bytes
        ports.update({key: (*target, owner) for key, target in state["ports"].items()})
    rules = []
    for (version, host_ip, protocol, port), (pod, container_port, owner) in sorted(ports.items(), key=lambda item: (not item[0][1], item)):
        ip, target = ("ip", pod.ip) if version == 4 else ("ip6", f"[{pod.ip}]")
        match = f"{ip} daddr {host_ip}" if host_ip else f"meta nfproto ipv{version}"  # those for a given address come first
        rules.append(("ports", f"{match} {protocol} dport {port} dnat {ip} to {target}:{container_port}", owner))
    given = {host_ip for _, host_ip, _, _ in ports if host_ip and not host_ip.startswith("127.")}  # LOCALNET is there as a whole
    addresses = sorted({*node_addresses, *given}) if ports else []
    own = {"ip": [address for address in addresses if ":" not in address], "ip6": [address for address in addresses if ":" in address]}
    own = {ip: f"daddr {{ {', '.join(addresses)} }}" for ip, addresses in own.items() if addresses}
    # 127.0.0.0/8 has a rule of its own: a lookup in a set with ranges may miss while a transaction replaces it.
    for to_host in [*([f"ip daddr {LOCALNET}"] if ports else []), *(" ".join(item) for item in own.items())]:
        rules += [(chain, f"fib daddr type local {to_host} jump ports", "all") for chain in ("prerouting", "output")]
    for ip, subnet in sorted({("ip" if pod.version == 4 else "ip6", str(pod.network)) for pod, _, _ in ports.values()}):
        if ip in own:
            inside = f"ct status dnat {ip} saddr {subnet} {ip} daddr {subnet}"
            rules.append(("postrouting", f"{inside} ct original {ip} {own[ip]} masquerade fully-random", "all"))
    for device in sorted(devices_of(states)):
        rules.append(("postrouting", f'ct status dnat ip saddr {LOCALNET} oifname "{device}" masquerade fully-random', "all"))
        for end in ("saddr", "daddr"):
            rules.append(("guard", f'iifname "{device}" ip {end} {LOCALNET} drop', "all"))
            replies = f'iifname "{device}" ct status dnat ct direction reply ct original ip {end} {LOCALNET}'
            rules.append(("replies", f"{replies} meta mark set meta mark | {LOCALNET_MARK:#x}", "all"))
    return rules


def stamp_of(chain, rule, owner):
    """The comment of a rule, by which it is found again: nft prints a rule in other words than it was given."""
    return f"{short_hash(chain, rule)} {owner}"


def plan_portmap(states, node_addresses, before="", after=""):
    """The command that writes the table as a list of states says, in one transaction. Without states there is no table.

    before, after: lines before and after the chains are declared, which say what becomes of a table that is there, and of other tables.
    """
    rules = [f'add rule inet mncni_portmap {rule[0]} {rule[1]} comment "{stamp_of(*rule)}"' for rule in plan_rules(states, node_addresses)]
    script = before + PORTMAP_CHAINS + after + "".join(f"{rule}\n" for rule in rules)
    why = "all host ports, as one table: which port of the host leads to which pod"
    return Command(["nft", "-f", "-"], script if states else f"{before}{PORTMAP}\ndelete {PORTMAP}\n", why)


def write_ports(states, changed, run, is_first=False, script=""):
    """Make the table what a list of states says. changed: the states that came or went. is_first: there were none before. script: what
    else is in the transaction."""
    switch_localnet(devices_of(changed) - devices_of(states), False, run)  # before the guard goes
    node_addresses = look_node_addresses(run) if states else []
    # The chains stay, only their rules are replaced: packets meet the old rules or the new ones. New chains beside old ones would let one
    # through now and then. To flush takes the kernel 10 ms; before the first host port there is nothing to flush.
    around = (f"create {PORTMAP}\n", "") if is_first else (script, f"flush {PORTMAP}\n")
    if run(plan_portmap(states, node_addresses, *around)).exit_code != 0:  # somebody else's table, or an older version's
        apply([plan_portmap(states, node_addresses, f"{script}{PORTMAP}\ndelete {PORTMAP}\n")], run)
    switch_localnet(devices_of(states), True, run)
    keys = [key for state in changed for key in state["ports"]]
    udp = sorted({f"{host_ip}/{port}" if host_ip else str(port) for _, host_ip, protocol, port in keys if protocol == "udp"})
    if udp:
        why = "conntrack remembers where a UDP flow goes: forget it, so that the flow follows the new rules"
        best_effort(run, Command(["mncni.py", "forget-flows", *udp], "", why))


LOCALNET_PREF = 127  # the preference of tc's filter that keeps pods away from 127.0.0.1
LOCALNET_MARK = 0x1270000  # the bits of the mark by which nft lets replies pass it
LOCALNET_FILTER = (  # for `tc ... bpf bytecode`, see tc-bpf(8): code, steps if true, steps if false, value
    (0x20, 0, 0, 0xFFF0000C),  # the source address
    (0x54, 0, 0, 0xFF000000),  # its first byte
    (0x15, 6, 0, 0x7F000000),  # 127: match
    (0x20, 0, 0, 0xFFF00010),  # the destination
    (0x54, 0, 0, 0xFF000000),
    (0x15, 0, 2, 0x7F000000),  # not 127: no match
    (0x20, 0, 0, 0xFFFFF014),  # the mark
    (0x45, 0, 1, LOCALNET_MARK),  # has one of these bits: no match
    (0x06, 0, 0, 0),
    (0x06, 0, 0, 0xFFFFFFFF),
)


def switch_localnet(devices, is_open, run):
    """Let devices accept packets to and from 127.0.0.1, or not. Returns the devices that were switched; those that are gone are no error.

    A filter of tc keeps out what pods send there. It is made before the switch is on and stays with the device, so `nft flush ruleset`
    opens no way; and after `tc filter delete` there is the chain `guard`. Where tc cannot do that, 127.0.0.1 of the host has no host ports.
    Replies carry 127.0.0.1 already where br_netfilter translates them on the bridge, so nft marks them; a pod's packets have no mark.
    """
    keys = {device: f"net/ipv4/conf/{device}/route_localnet" for device in sorted(devices)}
    keys = {device: key for device, key in keys.items() if read_file(f"/proc/sys/{key}") != f"{int(is_open)}\n"}
    if is_open:
        keys = {device: key for device, key in keys.items() if close_localnet(device, run)}
    why = "let 127.0.0.1 of the host reach host ports, too" if is_open else "no host port needs 127.0.0.1 on this device any more"
    if keys:
        run(write_sysctls(keys.values(), int(is_open), why=why))
    return list(keys)


def close_localnet(device, run):
    """Drop what comes in by a device to or from 127.0.0.1; whether that worked. Such packets are sent back out of the device, where a
    bridge drops what is addressed to itself. tc's own word for it, drop, needs a module more than bandwidth does."""
    bytecode = ",".join([str(len(LOCALNET_FILTER)), *(" ".join(map(str, step)) for step in LOCALNET_FILTER)])
    argv = ["tc", "filter", "replace", "dev", device, "ingress", "pref", f"{LOCALNET_PREF}", "handle", "1", "protocol", "ip"]
    argv += ["bpf", "bytecode", bytecode, "action", "mirred", "egress", "redirect", "dev", device]
    guard = Command(argv, "", "no pod is to reach 127.0.0.1 of the host, whatever becomes of nft's rules")
    if run(guard).exit_code == 0:
        return True
    run(Command(["tc", "qdisc", "add", "dev", device, "ingress"], "", "filters need a hook for arriving packets"))
    reply = run(guard)
    if reply.exit_code:
        what = command_failed(guard, reply)
        tell(f"host ports do not work on 127.0.0.1 of the host: nothing would keep the pods behind {device} from it: {what}")
    return reply.exit_code == 0


def is_localnet_closed(device, run):
    """Whether the filter of close_localnet is there."""
    argv = ["tc", "-json", "filter", "show", "dev", device, "ingress", "pref", f"{LOCALNET_PREF}"]
    return "mirred" in run(Command(argv, "", "are pods kept away from 127.0.0.1 of the host?")).stdout


def own_asked(request):
    """The state of this attachment, see look_ports. CNIError 7."""
    mappings, ips, device = runtime_config(request, "portMappings", list, []), own_ips(request), (host_links(request) or [""])[0]
    state = {"owner": list(request.attachment), "since": time.monotonic_ns(), "device": device, "mappings": mappings, "ips": ips}
    return {**state, "ports": parse_ports(mappings, ips)}


def refuse_tunnel_port(request, ports):
    """CNIError 7 for a host port that would take the packets of the tunnel between the nodes: the agent's ready file names its UDP port."""
    path = typed(request.conf, "ready", str, "")
    udp = [(host_ip, port) for _, host_ip, protocol, port in ports if protocol == "udp" and not host_ip.startswith("127.")]
    if udp and path:
        tunnel = parse_json_object(read_file(path) or "{}", f"the agent's ready file {path}").get("port")
        if tunnel in [port for _, port in udp]:
            what = f"host port {tunnel}/udp is the port of the tunnel between the nodes"
            raise config_error(f"{what}: give the pod another, or the agents another --port")


def portmap_add(request, run):
    """ADD: lead host ports to the pod. Returns prevResult."""
    state = own_asked(request)
    if not state["ports"]:
        return request.prev_result
    refuse_tunnel_port(request, state["ports"])
    path = state_path(request, "portmap")
    with states_lock(request.run_dir, "portmap") as lock:
        others = look_ports(request.run_dir)
        changed = [state, *([others.pop(path)] if path in others else [])]  # the second: of an ADD that was killed
        write_file(path, to_json(without(state, "ports")))
        write_ports([*others.values(), state], changed, lock.held(run), is_first=not others)
    return request.prev_result


def portmap_del(request, run):
    """DEL: give the host ports back. If naivewg is in this call, its DEL does it together with its own rules."""
    if own_veth(request) not in request.links:
        leave_portmap(request, run)


def leave_portmap(request, run, script=""):
    """Take the pod's host ports out of the table, and run a script about others. A pod without host ports waits for no lock."""
    path = state_path(request, "portmap")
    if not os.path.lexists(path):
        remove_file(path)  # what an ADD left that was killed while it wrote
        return leave_nft(request, run, script)
    with states_lock(request.run_dir, "portmap") as lock:
        drop_ports(look_ports(request.run_dir), [path], lock.held(run), script)


def drop_ports(states, stale, run, script=""):
    """Write the table without the states at some paths, then remove these: after a crash between the two the next DEL finds the files."""
    gone = [states[path] for path in stale if path in states]
    write_ports(list(without(states, *stale).values()), gone, run, script=script)
    for path in stale:
        remove_file(path)


def portmap_gc(request, run):
    """GC: drop the host ports of this network that belong to none of the attachments to keep, and remove what crashes left."""
    gc_states(request, "portmap", parse_asked, drop_ports, run)


def portmap_check(request, run):
    """CHECK: the host ports lead to the pod."""
    state = own_asked(request)
    if state["ports"]:
        others = without(look_ports(request.run_dir), state_path(request, "portmap"))
        report(request, diff_portmap([*others.values(), state], run)[0])


def diff_portmap(states, run):
    """(rules that the table lacks, rules that it has too many), as two lists of messages."""
    found = look_rules(["table", "inet", "mncni_portmap"], run, "are the rules of the host ports there?")
    wanted = {stamp_of(*rule): rule for rule in plan_rules(states, look_node_addresses(run))}
    what = "nft table inet mncni_portmap"
    missing = [f"{what} lacks the rule {chain}: {rule}" for stamp, (chain, rule, _) in wanted.items() if stamp not in found]
    return missing, [f"{what} has a rule that no pod asked for: {stamp}" for stamp in found if stamp not in wanted]


def restore_portmap(run_dir, run):
    """Write the table again if anything is wrong with it, for example after `nft flush ruleset`, or because the pods' device is a new one.
    Returns what was wrong, a list of messages. Without host ports it starts no command."""
    if not look_ports(run_dir):
        return []
    with states_lock(run_dir, "portmap") as lock:
        states = list(look_ports(run_dir).values())
        missing, extra = diff_portmap(states, run)
        run, devices = lock.held(run), sorted(devices_of(states))
        opened = [device for device in devices if read_file(f"/proc/sys/net/ipv4/conf/{device}/route_localnet") == "1\n"]
        lost = [device for device in opened if not is_localnet_closed(device, run)]
        lost = [device for device in lost if close_localnet(device, run)]
        switched = switch_localnet(devices, True, run)
        if missing + extra:
            write_ports(states, states, run)
    problems = missing + extra + [f"nothing but nft kept pods behind {device} from 127.0.0.1" for device in lost]
    return problems + [f"{device} does not accept 127.0.0.1 (route_localnet)" for device in switched]


def restore_tables(run_dir, run):
    """Write the tables of host ports and of spoofCheck again if anything is wrong with them. Returns what was wrong."""
    return [problem for problems in all_of([(restore_spoof, (run_dir, run)), (restore_portmap, (run_dir, run))]) for problem in problems]


# ---------------------------------------------------------------------------------------------------------------------
# The plugin table
# ---------------------------------------------------------------------------------------------------------------------
# A function for each verb, in the order of VERBS: ADD, DEL, CHECK, GC, STATUS. The marks are explained under "Dispatch". A parse function
# as STATUS: the plugin can work if its configuration is valid.


def naivewg_tools(request):
    return ["ip", "nsenter", "tee", *(["nft"] if request.conf.get("ipMasq") or request.conf.get("spoofCheck") else [])]


def portmap_tools(request):
    return ["ip", "nft", "tc", "tee"] if request.command == "STATUS" or runtime_config(request, "portMappings", list, []) else []


def bandwidth_tools(request):
    return ["ip", "tc"] if request.command == "STATUS" or parse_bandwidth(request) else []


def lat_tools(request):
    return ["nsenter", "tc"] if request.command == "STATUS" or parse_lat(request) else []


def pod_tools(request):
    return ["ip", "nsenter"]


PLUGINS = {
    "naivewg": dict(zip(VERBS, (naivewg_add, naivewg_del, naivewg_check, naivewg_gc, naivewg_status)),
                first=True, link="mn", tools=naivewg_tools),
    "portmap": dict(zip(VERBS, (portmap_add, portmap_del, portmap_check, portmap_gc, nothing_to_do)),
                chained=True, leave_nft=leave_portmap, tools=portmap_tools),
    "bandwidth": dict(zip(VERBS, (bandwidth_add, bandwidth_del, bandwidth_check, bandwidth_gc, parse_bandwidth)),
                chained=True, link="mi", tools=bandwidth_tools),
    "lat": dict(zip(VERBS, (lat_add, lat_del, lat_check, nothing_to_do, nothing_to_do)),
                chained=True, tools=lat_tools),
    "quickack": dict(zip(VERBS, (quickack_add, nothing_to_do, quickack_check, nothing_to_do, parse_quickack)),
                chained=True, tools=pod_tools),
    "loopback": dict(zip(VERBS, (loopback_add, nothing_to_do, loopback_check, nothing_to_do, nothing_to_do)),
                first=True, tools=pod_tools),
}


# =====================================================================================================================
# You may stop reading here. What follows is plumbing: processes and their answers, JSON, files and locks, the log; then the command line.
# =====================================================================================================================

# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: starting processes
# ---------------------------------------------------------------------------------------------------------------------

PACKAGES = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables", "nsenter": "util-linux", "setpriv": "util-linux", "tee": "coreutils"}
PACKAGES["wg"] = "wireguard-tools"


def make_run(environ, trace=None, timeout_s=30):
    """The runner: run(command) -> Reply. It never raises on an exit code. CNIError 4 if the tool is missing, 100 if it does not end.

    trace: a function that gets each command before it runs, or None.
    """
    child_environ = {**environ, "LC_ALL": "C", "PATH": search_path(environ)}

    def run(command):
        if trace:
            trace(command)
        if command.argv[0] == "mncni.py":  # the one command that is part of this program
            forget_flows(set(command.argv[2:]))
            return Reply(0, "", "")
        reply = run_process(command, {**child_environ, **command.environ}, timeout_s)
        if reply.exit_code == 127 and command.argv[0] == "nsenter":
            raise missing_tool(command.argv[2])
        return reply

    return run


def search_path(environ):
    """PATH, and the directories where the tools are. An empty part is left out: it would mean the current directory."""
    return ":".join([part for part in environ.get("PATH", "").split(":") if part] + ["/usr/sbin", "/usr/bin", "/sbin", "/bin"])


def missing_tool(name):
    """CNIError 4 naming a program and its package."""
    package = PACKAGES.get(name)
    return CNIError(BAD_ENVIRONMENT, f'cannot find the program "{name}"' + (f": install the package {package}" if package else ""))


def find_program(name, path):
    """The path of a program. CNIError 4 if there is none."""
    for directory in path.split(":"):
        if os.access(os.path.join(directory, name), os.X_OK):
            return os.path.join(directory, name)  # the name itself if it is an absolute path
    raise missing_tool(name)


def run_process(command, environ, timeout_s):
    """Run a program to its end: a Reply. CNIError 4 if it is missing, 100 if it does not end. subprocess.run does the same, but its import
    takes 3 ms, and then each process 1 ms more. stdin, stdout and stderr are files in memory, so no pipe can fill up."""
    program = find_program(command.argv[0], environ["PATH"])
    files, pid, poll = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")], 0, select.poll()
    try:
        os.write(files[0], command.stdin.encode())
        os.lseek(files[0], 0, os.SEEK_SET)
        places = [*((fd, fd) for fd in command.fds), *zip(files, range(3))]  # a descriptor put in its own place is inherited
        actions = [(os.POSIX_SPAWN_DUP2, fd, place) for fd, place in places]
        # setsigdef: SIGPIPE and SIGXFSZ, which Python ignores, and which a program expects to end it
        pid = os.posix_spawn(program, command.argv, environ, file_actions=actions, setsigdef=[13, 25])
        files.append(os.pidfd_open(pid))
        poll.register(files[3], select.POLLIN)  # the process has ended
        if not poll.poll(timeout_s * 1000):
            raise CNIError(COMMAND_FAILED, f"no answer within {timeout_s} s from {command.argv[0]}", str(command))
        status, pid = os.waitpid(pid, 0)[1], 0
        stdout, stderr = (os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "replace") for fd in files[1:3])
        return Reply(os.waitstatus_to_exitcode(status), stdout, stderr)
    finally:
        if pid:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        for fd in files:
            os.close(fd)


def all_of(acts, at_once=False):
    """Call every act, (function, arguments), also after one failed; at_once: at the same time. Then raise the first error, or return the
    results."""
    results, errors, threads = {}, {}, []

    def do(index, act, arguments):
        try:
            results[index] = act(*arguments)
        except Exception as error:
            errors[index] = error

    for index, (act, arguments) in enumerate(acts):
        if at_once and len(acts) > 1:
            import threading  # +0.5 ms

            threads.append(threading.Thread(target=do, args=(index, act, arguments)))
            threads[-1].start()
        else:
            do(index, act, arguments)
    for thread in threads:
        thread.join()
    for index in sorted(errors):
        raise errors[index]
    return [results[index] for index in range(len(acts))]


def best_effort(act, *arguments):
    """Call act; print its error instead of raising it. For undoing, where the first error is the one to report."""
    try:
        act(*arguments)
    except Exception as error:
        tell(f"while undoing: {error}")


def tell(text):
    """Print a message to stderr. A closed stderr must not stop a DEL."""
    try:
        print(f"mncni: {text}", file=sys.stderr)
    except OSError:
        return


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: what the tools answer
# ---------------------------------------------------------------------------------------------------------------------


ERRORS = ("Device ", "Cannot ", "RTNETLINK answers:", "nsenter:", "tee:")  # how ip, tc, nsenter and tee begin a line about an error
# What ip, tc and nft print when an object does not exist.
GONE = ("does not exist", "Cannot find device", "No such device", "No such file or directory", "No such process")


def errors_of(reply):
    """The lines on stderr that are the tool's own errors. Other lines, such as a preloaded library's warnings, decide nothing."""
    return [line for line in reply.stderr.splitlines() if line.startswith(ERRORS) or "Error: " in line]


def is_gone(reply):
    """Whether a command failed only because its object does not exist."""
    errors = errors_of(reply)
    return reply.exit_code != 0 and bool(errors) and all(any(words in line for words in GONE) for line in errors)


def is_read_only(command, reply):
    """Whether `tee` failed only because /proc/sys is read-only. Then the values may be right; if not, the next command fails."""
    errors = errors_of(reply)
    return "tee" in command.argv and bool(errors) and all(line.endswith("Read-only file system") for line in errors)


def command_failed(command, reply):
    """CNIError 100 whose details are the line that failed and what the program printed."""
    said, line = reply.stderr.strip(), ""
    for text in said.splitlines():
        position = text.partition("Command failed -:")[2]
        if position.isdigit() and int(position) <= len(command.stdin.splitlines()):
            line = command.stdin.splitlines()[int(position) - 1]
    what = f"{' '.join(command.argv)}: {line}" if line else str(command)
    first = [*errors_of(reply), *said.splitlines(), f"exit {reply.exit_code}"][0]
    return CNIError(COMMAND_FAILED, f"{command.argv[0]} failed: {first}", f"{what}\n{said}")


def understood(program, parse, text):
    """parse(text) of a program's output. CNIError 100 if parse cannot read it."""
    try:
        return parse(text)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        what = f"cannot understand what {program} says: {type(error).__name__} {error}"[:300]
        raise CNIError(COMMAND_FAILED, what, text[:1000]) from None


IP_KEYS = {  # the keys of `ip -json` that we read, and the types of their values: some become parts of commands
    **dict.fromkeys(("ifname", "ifalias", "master", "address", "family", "type", "dev", "interface"), str),
    **dict.fromkeys(("mtu", "ifindex", "prefixlen", "metric"), int),
    **{"addr_info": list, "nexthops": list, "flags": list, "linkinfo": dict},
    **{"local": ipaddress.ip_address, "gateway": ipaddress.ip_address, "prefsrc": ipaddress.ip_address, "dst": ipaddress.ip_network},
}


def parse_ip(text):
    """The objects in lines of JSON, without links whose name no command can hold. ValueError, TypeError and the like for other texts."""
    items = [item for line in text.splitlines() if line for item in parse_json(line)]
    for part in [*items, *(info for item in items for info in (*item.get("addr_info", ()), *item.get("nexthops", ())))]:
        for key, kind in [(key, kind) for key, kind in IP_KEYS.items() if key in part and (key, part[key]) != ("dst", "default")]:
            if not (type(part[key]) is kind or is_address(part[key], kind)) or (kind is int and not 0 <= part[key] < 2**32):
                raise ValueError(f"{key} {part[key]!r}")
        is_whole = {"ifname", "flags", "mtu"} <= part.keys() or not {"ifname", "ifalias", "addr_info"} & part.keys()
        if not is_whole:
            raise ValueError(f"no ifname, flags or mtu in {part}")
        if part.get("prefixlen", 0) > 128 or not part.get("type", "unicast").isalpha():
            raise ValueError(part)
    return [item for item in items if all(is_ifname(item[key]) for key in ("ifname", "dev", "interface") if key in item)]


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: JSON
# ---------------------------------------------------------------------------------------------------------------------


def refuse_constant(word):
    raise ValueError(f"{word} is not JSON")


def refuse_value(value):
    raise TypeError(f"{value!r} is no JSON but a Python {type(value).__name__}")


def finite(word):
    """A number with a point or an exponent. ValueError for 1e400: Python reads it as infinite and would write Infinity."""
    return float(word) if abs(float(word)) < float("inf") else refuse_constant(word)


class JsonRules:
    """The scanner's settings, under the names that json.JSONDecoder has for them."""

    strict, object_hook, object_pairs_hook, memo = True, None, None, {}
    parse_float, parse_int, parse_constant = finite, int, refuse_constant


try:  # the half of the json module that is written in C. The other half imports re: +6 ms, a quarter of a STATUS
    import _json

    scan_json = _json.make_scanner(JsonRules)
    encode_json = _json.make_encoder(None, refuse_value, _json.encode_basestring_ascii, None, ": ", ", ", False, False, True)
except (ImportError, AttributeError, TypeError):  # _json is private to CPython and may change
    import json

    scan_json = json.JSONDecoder(parse_float=finite, parse_constant=refuse_constant).scan_once
    encode_json = json.JSONEncoder(default=refuse_value).iterencode


def parse_json(text):
    """The value of a JSON text, as json.loads returns it. ValueError; RecursionError if it is nested too deep."""
    try:
        value, end = scan_json(text, len(text) - len(text.lstrip(" \t\r\n")))
        if not text[end:].strip(" \t\r\n"):
            return value
    except (StopIteration, SystemError):  # what the scanner raises instead of JSONDecodeError where json is not imported
        pass
    import json  # +6 ms, to say what is wrong

    return json.loads(text)


def to_json(value):
    """A value as JSON text, as json.dumps returns it."""
    return "".join(encode_json(value, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: files and locks
# ---------------------------------------------------------------------------------------------------------------------


class Locked:
    """`with Locked(path):` lets in one process at a time. CNIError 11 after timeout_s. flock(2)."""

    def __init__(self, path, timeout_s=60):
        self.path, self.timeout_s = path, timeout_s

    def __enter__(self):
        own_directory(os.path.dirname(self.path))
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        taken = takes_lock(self.fd)
        if self.timeout_s and not taken:
            import threading  # +0.5 ms

            # flock has no deadline. A thread waits in it instead of polling, which with a hundred waiters would take the processor.
            waiting = threading.Thread(target=fcntl.flock, args=(self.fd, fcntl.LOCK_EX), daemon=True)
            waiting.start()
            waiting.join(self.timeout_s)
            taken = takes_lock(self.fd)
        if not taken:
            os.close(self.fd)
            raise CNIError(TRY_AGAIN, f"another process holds {self.path} for more than {self.timeout_s} s")
        return self

    def __exit__(self, *exc_info):
        os.close(self.fd)

    def held(self, run):
        """run, with commands that hold the lock until they end, even if this process is killed before."""

        def run_holding(command):
            command.fds += (self.fd,)
            return run(command)

        return run_holding


def takes_lock(fd):
    """Whether an open file takes the lock now, or has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def own_directory(path, mode=0o755):
    """Make a directory for state. CNIError 5 if others than root can change it, or the link that leads to it."""
    os.makedirs(path, mode=mode, exist_ok=True)
    for status in (os.lstat(path), os.stat(path)):
        is_link = status.st_mode & 0o170000 == 0o120000
        if status.st_uid not in (0, os.geteuid()) or (status.st_mode & 0o022 and not is_link):
            what = f"others than root can change {path}, owner {status.st_uid}, mode {status.st_mode & 0o7777:o}"
            raise CNIError(IO_FAILURE, f"{what}: look what is in it, then chown root and chmod go-w, or remove it")


def read_file(path):
    """The text of a small file, None if there is none. Bytes that are no UTF-8 are replaced."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        error.filename = path  # an error of read(2) has no name
        raise


def read_state(path):
    """The text of a state file. "" for a link or anything else that is no file: we make none."""
    return "" if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)) else read_file(path)


def write_file(path, text, mode=0o644):
    """Write a file whole or not at all: a reader sees the old one or the new one. The next call overwrites what a killed one left."""
    temporary = unfinished(path)
    try:
        with open(lock_file(temporary, mode), "w", encoding="utf-8") as file:
            file.truncate()
            file.write(text)
            file.flush()
            os.rename(temporary, path)  # while the lock is held
    except BaseException as error:
        remove_file(temporary)
        if isinstance(error, OSError):
            error.filename = path  # an error of write(2), like a full disk, has no name
        raise


def unfinished(path):
    """The name of a file while it is being written. Whoever lists directories ignores names with a dot."""
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.new")


def lock_file(path, mode):
    """A descriptor of the file at a path, made if absent, that no other process has locked."""
    while True:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # the process that had the lock has renamed the file, or removed it


def remove_unfinished(directory):
    """Remove the files of a directory that killed processes were writing. The caller has its lock: only who has it writes."""
    for name in os.listdir(directory):
        if name.startswith("."):
            remove_file(os.path.join(directory, name))


def remove_file(path):
    """Remove a file, and what a killed writer left of it. Nothing there is fine."""
    for each in (unfinished(path), path):
        try:
            os.unlink(each)
        except (FileNotFoundError, NotADirectoryError):
            continue


def boot_id():
    """The kernel's name for this boot. Documentation/admin-guide/sysctl/kernel.rst, random."""
    return (read_file("/proc/sys/kernel/random/boot_id") or "").strip()


def run_id(run_dir, make=False):
    """The name, "run-" and a UUID, of the time since /run was empty, "" if there is none. make: make one. It is in the bridge's lock."""
    path = os.path.join(run_dir, "bridge.lock")
    if make and not read_state(path):
        with Locked(path) as lock:
            if not read_state(path):
                os.write(lock.fd, b"run-" + (read_file("/proc/sys/kernel/random/uuid") or "").encode())
    return (read_state(path) or "").strip()


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: forgetting UDP flows, for portmap
# ---------------------------------------------------------------------------------------------------------------------
# conntrack is the kernel's table of flows. What is in it goes where its first packet went, whatever the rules say by now. The tool for it,
# conntrack(8), is not on every host, so this speaks to the kernel itself.


def forget_flows(keys):
    """Delete conntrack's UDP entries to the host's own addresses and a set of ports like "53" or "192.0.2.1/53", as `conntrack -D` would.

    nf_conntrack's netlink interface, include/uapi/linux/netfilter/nfnetlink_conntrack.h: list all entries (IPCTNL_MSG_CT_GET), delete
    as it was listed (IPCTNL_MSG_CT_DELETE).
    """
    import socket  # +2 ms, UDP host ports only

    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as sock:  # NETLINK_NETFILTER
        sock.settimeout(10)
        for family, destination in ((socket.AF_INET, 2), (socket.AF_INET6, 4)):
            stale = []
            for payload in ask_conntrack(sock, 1, 0x301, bytes([family, 0, 0, 0])):  # NLM_F_REQUEST | NLM_F_DUMP
                flow = parse_attributes(payload[4:])
                addresses, protocol = (parse_attributes(parse_attributes(flow[1])[key]) for key in (1, 2))
                address, port = socket.inet_ntop(family, addresses[destination]), int.from_bytes(protocol.get(3, b""), "big")
                if protocol[1] == b"\x11" and keys & {f"{port}", f"{address}/{port}"} and is_own_address(address):
                    stale.append(payload)
            for payload in stale:
                list(ask_conntrack(sock, 2, 0x5, payload))  # NLM_F_REQUEST | NLM_F_ACK


def ask_conntrack(sock, kind, flags, payload):
    """Send one request, yield the payloads of the answer. An error, for example about an entry that is gone by now, ends it, too."""
    import struct

    sock.send(struct.pack("=IHHII", 16 + len(payload), 1 << 8 | kind, flags, 1, 0) + payload)
    while True:
        data, place = sock.recv(1 << 17), 0
        while place < len(data):
            size, kind = struct.unpack_from("=IH", data, place)
            if kind in (2, 3):  # NLMSG_ERROR, which an acknowledgement is as well; NLMSG_DONE
                return
            yield data[place + 16 : place + size]
            place += size + 3 & ~3


def parse_attributes(data):
    """{type: value} of netlink attributes, without the flag bits of the type."""
    found, place = {}, 0
    while place < len(data):
        size, kind = (int.from_bytes(data[place + start : place + start + 2], sys.byteorder) for start in (0, 2))
        found[kind & 0x3FFF] = data[place + 4 : place + size]
        place += size + 3 & ~3
    return found


def is_own_address(address):
    """Whether an address is the host's: only then a socket can be bound to it."""
    import socket

    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: trace and log
# ---------------------------------------------------------------------------------------------------------------------

LOG_LIMIT = 10 * 1024 * 1024  # bytes; then the log becomes PATH.1


def print_trace(command):
    """Print a command before it runs, for CNI_TRACE=1."""
    print(command.explained("+ ") + "\n", end="", file=sys.stderr, flush=True)  # one write: commands may run at the same time


def logged(run, request):
    """run, which also appends each command, its time and its end to the file "logFile". CNIError 7 for a relative path."""
    path = typed(request.conf, "logFile", str, "")
    if not path:
        return run
    if not os.path.isabs(path):
        raise config_error(f'"logFile" must be an absolute path, not {path!r}')

    def log_and_run(command):
        begin = time.monotonic()
        reply = run(command)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        who = " ".join((request.command, *request.attachment))
        took = f"{(time.monotonic() - begin) * 1000:.1f} ms, exit {reply.exit_code}"
        said = reply.stderr if reply.exit_code else ""
        best_effort(append_log, path, f"# {now} {who}: {took}\n{command.explained()}\n{said}")
        return reply

    return log_and_run


def append_log(path, text):
    """Append to a log that only root can read: configurations may hold secrets."""
    if os.path.exists(path) and os.path.getsize(path) > LOG_LIMIT:
        os.rename(path, f"{path}.1")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


# ---------------------------------------------------------------------------------------------------------------------
# install: put the plugin where a runtime looks for it
# ---------------------------------------------------------------------------------------------------------------------

LAUNCHER_MARK = "# A launcher written by `mncni.py install`"
LAUNCHER = f"""#!/usr/bin/python3 -IS
{LAUNCHER_MARK}. Python compiles a script at every start, an imported module only once.
import gc, os, sys
gc.disable()  # a call ends before there is much to collect
os.umask(os.umask(0o077) | 0o022)  # before the import, which writes what it has compiled: nobody else may change that
sys.path.append(os.path.dirname(os.path.realpath(__file__)))
import mncni
mncni.main()
"""


def is_ours(path):
    """Whether a file in a plugin directory is absent or written by `install`: a launcher, or mncni.py itself."""
    text = read_file(path)
    return text is None or LAUNCHER_MARK in text[:200] or '"""MNCNI' in text[:200]


def install(bin_dir=DEFAULT_BIN_DIR, names=(), force=False):
    """Write mncni.py and its launchers into bin_dir; returns their paths. CNIError 7 at a foreign file, without force.

    Each file is replaced by a rename: a runtime may be starting the old one at this moment.
    """
    unknown = [name for name in names if name not in PLUGINS]
    if unknown:
        raise config_error(f'there is no plugin "{unknown[0]}" to install a launcher for; there are: {", ".join(PLUGINS)}')
    texts = {"mncni.py": read_file(os.path.realpath(__file__)), "mncni": LAUNCHER, **dict.fromkeys(names, LAUNCHER)}
    if is_ours(os.path.join(bin_dir, "loopback")):  # the reference plugin's is as good
        texts["loopback"] = LAUNCHER
    paths = {os.path.join(bin_dir, name): text for name, text in texts.items()}
    for path in paths:
        if not is_ours(path) and not force:
            what = f"{path} is not MNCNI's own: move it away"
            raise config_error(f"{what}, or replace it for all who use it: mncni.py install --bin-dir {bin_dir} --force")
    os.makedirs(bin_dir, exist_ok=True)
    for path, text in paths.items():
        if read_file(path) != text or not os.access(path, os.X_OK):
            write_file(path, text, mode=0o755)
            os.chmod(path, 0o755)  # whatever the umask: the runtime may not be root
    return list(paths)


def precompile(root, bin_dir, run):
    """Compile the installed mncni.py with the python3 of the system below root: an image may be read-only when it runs. CNIError 4 if
    that system has no python3. Python checks the result by content, because images have times of their own."""
    if not os.path.exists(os.path.join(root, "usr/bin/python3")):
        raise CNIError(BAD_ENVIRONMENT, f"there is no /usr/bin/python3 in {root}, which mncni.py runs under: install its package python3")
    compile_it = ["-m", "compileall", "-q", "--invalidation-mode", "checked-hash", os.path.join(bin_dir, "mncni.py")]
    apply([Command(["chroot", root, "/usr/bin/python3", "-IS", *compile_it], "", "compile it now, while the image can be written")], run)


CHAINED = {
    "lat": {"type": "mncni", "plugin": "lat", "capabilities": {"io.kubernetes.cri.pod-annotations": True}},
    "bandwidth": {"type": "mncni", "plugin": "bandwidth", "capabilities": {"bandwidth": True}},
    "quickack": {"type": "mncni", "plugin": "quickack"},
}


def chain(name, conf_dir, backup_dir, remove=False):
    """Add our chained plugin to the end of the active conflist of conf_dir, or remove it. Returns the file's path, "" if nothing changed.
    A copy of the original goes to backup_dir. CNIError 7 if there is no conflist, or it has such a plugin of somebody else's."""
    import json  # +6 ms, the command line only

    names = sorted(os.listdir(conf_dir)) if os.path.isdir(conf_dir) else []
    active = next((entry for entry in names if entry.endswith((".conflist", ".conf", ".json")) and entry[0] != "."), None)
    if active is None:
        raise config_error(f"there is no network in {conf_dir} yet: a chained plugin needs one before it")
    path = os.path.realpath(os.path.join(conf_dir, active))
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        text = file.read()
    conf = parse_json_object(text, path)
    plugins = typed(conf, "plugins", list, [])
    if not plugins:
        listed = [without(conf, "name", "cniVersion"), CHAINED[name]]
        conflist = json.dumps({"cniVersion": conf.get("cniVersion"), "name": conf.get("name"), "plugins": listed}, indent=2)
        raise config_error(f"{path} is no list of plugins; put in its place a file {os.path.splitext(path)[0]}.conflist", conflist)
    ours = [plugin for plugin in plugins[1:] if plugin_names(plugin) == [name] and plugin.get("type") in ("mncni", "mncni.py")]
    present = any(name in plugin_names(plugin) for plugin in plugins)
    if (remove and not present) or (ours and not remove):
        return ""
    if not ours and present:
        raise config_error(f"{path} has a plugin {name} already, which is none that `install --chain` put there")
    check_version("ADD", str(conf.get("cniVersion")))
    conf["plugins"] = [plugin for plugin in plugins if plugin is not ours[0]] if remove else [*plugins, CHAINED[name]]
    keep_backup(path, text, backup_dir)
    write_file(path, json.dumps(conf, indent=2) + "\n", os.stat(path).st_mode & 0o777)
    return path


def plugin_names(plugin):
    """The plugins that an entry of a conflist runs."""
    names = plugin.get("plugin", plugin.get("type")) if isinstance(plugin, dict) else None
    return names if isinstance(names, list) else [names]


def keep_backup(path, text, backup_dir):
    """Keep a text as backup_dir/NAME.1, .2, ..., unless the last of them is the same: another network may write its file often."""
    own_directory(backup_dir, 0o700)
    backup, last = os.path.join(backup_dir, os.path.basename(path)), 0
    while os.path.exists(f"{backup}.{last + 1}"):
        last += 1
    if read_file(f"{backup}.{last}") != text:
        write_file(f"{backup}.{last + 1}", text, 0o600)


def install_command(options, run):
    """`mncni.py install`: prints what it wrote."""
    paths = (options.bin_dir, options.conf_dir, "/var/lib/mncni/backup")
    bin_dir, conf_dir, backup_dir = (os.path.join(options.root, path.lstrip("/")) if options.root else path for path in paths)
    if options.remove and not options.chain:
        raise config_error("--remove takes a plugin out of a conflist: say which with --chain")
    if not options.remove:  # the programs stay, for the pods that have the plugin
        print("\n".join(install(bin_dir, [name for name in options.names.split(",") if name], options.force)))
        if options.root:
            precompile(options.root, options.bin_dir, run)
    if options.chain:
        changed = chain(options.chain, conf_dir, backup_dir, options.remove)
        print(f"{changed}: {options.chain} {'taken out' if options.remove else 'added'}" if changed else f"{conf_dir} is as it should be")


# ---------------------------------------------------------------------------------------------------------------------
# explain: what a call would run
# ---------------------------------------------------------------------------------------------------------------------


EXPLAINED = {  # what the runtime supplies for the capabilities that a conflist declares
    "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
    "bandwidth": {"ingressRate": 8000000, "egressRate": 8000000},
    "io.kubernetes.cri.pod-annotations": {"lat": "50ms"},
}


def foreign_result(conf, netns=""):
    """What another program's plugin may make, on the host and in the pod: the addresses are the first of each range, as of host-local."""
    ipam = typed(conf, "ipam", dict, {})
    sets = typed(ipam, "ranges", list, []) or [[ipam if "subnet" in ipam else {"subnet": "192.0.2.0/24"}]]
    ips = []
    for entry in [parse_range_set(ranges)[0] for ranges in sets]:
        first = type(entry["gateway"])(entry["start"] + (entry["start"] == int(entry["gateway"])))
        ips.append({"address": f"{first}/{entry['subnet'].prefixlen}", "gateway": str(entry["gateway"]), "interface": 1})
    return {"interfaces": [{"name": "veth0"}, {"name": "eth0", "sandbox": netns}], "ips": ips}


class Explainer:
    """A `run` that runs nothing and keeps each command in `script`. It answers as a host that has only the interfaces of a result (or
    None), and in every namespace a default route to the result's gateways. ipam: what a delegate gets, directories and all."""

    def __init__(self, result, ipam):
        self.ipam, self.script, result = ipam, [], result or {}
        self.links = ["lo", *(link["name"] for link in result.get("interfaces", []))]
        self.gateways = {6 if ":" in ip["gateway"] else 4: ip["gateway"] for ip in result.get("ips", []) if ip.get("gateway")}

    def __call__(self, command):
        reply = self.reply(command)
        if "CNI_COMMAND" in command.environ:
            command = Command(command.argv, to_json({**parse_json(command.stdin), "ipam": self.ipam}), command.why, command.environ)
        text = command.explained()
        if reply.exit_code or (not reply.stdout and {"-json", "-j"} & set(command.argv)):  # the script goes on where nothing is there
            text = text.replace("<<'E'\n", "<<'E' || true\n", 1) if command.stdin else f"{text} || true"
        self.script.append(text)
        return reply

    def reply(self, command):
        if "CNI_COMMAND" in command.environ:  # a delegate
            return Reply(0, to_json({"ips": [without(ip, "interface") for ip in foreign_result(parse_json(command.stdin))["ips"]]}), "")
        if "address show scope global" in command.stdin:
            address = {"local": "192.0.2.10", "prefixlen": 24}
            return Reply(0, to_json([{"ifname": "eth9", "mtu": 1500, "flags": ["UP"], "addr_info": [address]}]), "")
        if "route" in command.argv:
            gateway = self.gateways.get(4 if "-4" in command.argv else 6)
            return Reply(0, f"default via {gateway}\n" if gateway else "", "")
        if command.argv[:2] == ["tc", "filter"] and not any("tc qdisc add" in text for text in self.script):
            return Reply(1, "", "")  # a new device has no hook for filters
        lines = [line.split() for line in command.stdin.splitlines()]
        found = [(words[3], self.links.index(words[3])) for words in lines if words[1:3] == ["show", "dev"] and words[3] in self.links]
        other = {"mtu": 1500, "address": "00:00:00:00:00:00", "flags": ["UP"]}  # of a veth pair a result names the host's end first
        links = [{"ifname": name, "ifindex": index, "link_index": index - 1, **other} for name, index in found]
        return Reply(0, to_json(links) if links else "", "")


def explain_command(options, run):
    """`mncni.py explain`: prints a call of each plugin of a conflist as a shell script. It needs no root and changes nothing."""
    import tempfile  # +20 ms, explain only

    with open(options.conflist, encoding="utf-8", errors="surrogateescape") as file:
        conflist = parse_json_object(file.read(), options.conflist)
    plugins = typed(conflist, "plugins", list, [conflist])
    if not plugins or not all(isinstance(conf, dict) for conf in plugins):
        raise config_error(f'"plugins" of {options.conflist} is empty, or holds what is no plugin')
    versions = [conflist.get("cniVersion") or "0.1.0", *typed(conflist, "cniVersions", list, [])]
    shared = {"name": conflist.get("name"), "cniVersion": max((one for one in versions if one in CNI_VERSIONS), default=versions[0])}
    print(f"# The commands of CNI_COMMAND={options.command} for {options.conflist}: container c1, namespace /run/netns/c1, interface eth0,")
    print("# on a host that has nothing of it yet, or only what an ADD made. Leases are files, not commands, so they do not show.")
    print("# The runtime makes the namespace:\n[ -e /run/netns/c1 ] || ip netns add c1")
    print(f"export CNI_CONTAINERID=c1 CNI_NETNS=/run/netns/c1 CNI_IFNAME=eth0 CNI_PATH={DEFAULT_BIN_DIR}  # for other plugins")
    for conf in plugins:
        if "plugin" not in conf and not is_identifier(conf.get("type")):
            hint = "" if "plugins" in conflist else ': there is no list of plugins, "plugins"'
            raise config_error(f'"type" {to_json(conf.get("type"))} is no name of a plugin{hint}')
    with tempfile.TemporaryDirectory() as root:
        os.makedirs(f"{root}/run/netns")
        os.symlink("/proc/self/ns/net", f"{root}/run/netns/c1")
        scripts = explain_plugins([{**conf, **shared} for conf in plugins], options, root)
    print("\n".join(reversed(scripts) if options.command == "DEL" else scripts))  # a runtime calls DEL in reverse


def explain_plugins(confs, options, root):
    """What each plugin of a list runs. root: a directory for the host's files, with the pod's namespace."""
    result, scripts = None, []
    for conf in confs:
        kind, command = conf.get("type"), options.command
        if "plugin" not in conf and kind not in (*options.plugins, "mncni", "mncni.py"):
            why = f"another program's plugin; if it uses mncni.py, `{kind} explain` shows its commands, too"
            stdin = to_json({**conf, **({"prevResult": result} if result else {})}).replace(root, "")
            script = Command([f"{DEFAULT_BIN_DIR}/{kind}"], stdin, why, {"CNI_COMMAND": command}).explained()
            if result is None:
                result = foreign_result(conf, f"{root}/run/netns/c1")
                script += f"\n# What follows takes it that the pod has {result['ips'][0]['address']}, behind the link veth0 of the host."
        else:
            script, result = explain_plugin(conf, result, options, root)
        scripts.append(f"\n# ---- type {to_json(kind)}, plugin {to_json(conf.get('plugin', kind))} ----\n{script}")
    return scripts


def explain_plugin(conf, prev_result, options, root):
    """(what one plugin of a list runs after others returned prev_result or None, the result of its ADD)."""
    asked = {name: value for name, value in EXPLAINED.items() if any_case(conf.get("capabilities"), name)}
    conf = {**without(conf, "ready", "logFile"), **({"runtimeConfig": asked} if asked else {})}
    conf.update({"cni.dev/valid-attachments": []} if options.command == "GC" else {})
    delegate, ipam = delegate_type(conf), typed(conf, "ipam", dict, {})
    conf["ipam"] = {key: value for key, value in ipam.items() if key.lower() != "datadir"}  # it names a directory of this host
    if delegate:
        os.makedirs(root + DEFAULT_BIN_DIR, exist_ok=True)
        write_file(f"{root}{DEFAULT_BIN_DIR}/{delegate}", "")
    names = {"CNI_CONTAINERID": "c1", "CNI_NETNS": f"{root}/run/netns/c1", "CNI_NETNS_OVERRIDE": "1", "CNI_IFNAME": "eth0"}
    environ, result = {**names, "CNI_PATH": root + DEFAULT_BIN_DIR, "MNCNI_RUN_DIR": root + DEFAULT_RUN_DIR}, prev_result
    environ["MNCNI_DATA_DIR"] = root + DEFAULT_DATA_DIR
    for verb in dict.fromkeys(("ADD", options.command)):  # the other commands need the result of an ADD
        run, asked_for = Explainer(result, ipam), {**conf, "prevResult": result}
        stdin = to_json({key: value for key, value in asked_for.items() if value is not None})
        exit_code, stdout = answer({**environ, "CNI_COMMAND": verb}, stdin, run, options.plugins, conf.get("type"))
        reply = parse_json(stdout or "{}")
        if exit_code and (verb, reply["code"]) != ("CHECK", COMMAND_FAILED):  # a CHECK finds everything missing here
            raise CNIError(reply["code"], reply["msg"], reply.get("details", ""))
        result = reply if verb == "ADD" else result
    script = "\n\n".join(run.script).replace(root, "") or "# It starts no command."
    return (f"# The runtime asks for {to_json(asked)}.\n" if asked else "") + script, result


# ---------------------------------------------------------------------------------------------------------------------
# Command line and main
# ---------------------------------------------------------------------------------------------------------------------


def portmap_restore_command(options, run):
    """`mncni.py portmap-restore`: prints what was wrong."""
    for problem in restore_tables(os.environ.get("MNCNI_RUN_DIR") or DEFAULT_RUN_DIR, run):
        print(f"restored: {problem}")


def command_line(program, arguments, plugins):
    """The exit code of `mncni.py install | explain | portmap-restore | --help | --version`, or of another program with these plugins."""
    import argparse  # +2 ms, the command line only

    parser = argparse.ArgumentParser(prog=program, description="MNCNI: CNI plugins for Linux in one file. A container runtime calls it.")
    parser.add_argument("--version", action="version", version=f"mncni {PROGRAM_VERSION}, CNI {', '.join(CNI_VERSIONS)}")
    commands = parser.add_subparsers(dest="action", required=True)
    command = commands.add_parser("install", help="write mncni.py and its launchers into a plugin directory")
    command.add_argument("--root", default="", metavar="DIR", help="the system below DIR, an image, whose python3 compiles mncni.py")
    command.add_argument("--bin-dir", default=DEFAULT_BIN_DIR, metavar="DIR", help=f"the plugin directory (default {DEFAULT_BIN_DIR})")
    command.add_argument("--names", default="", metavar="A,B", help=f"also launchers with these names: {', '.join(PLUGINS)}")
    command.add_argument("--force", action="store_true", help="replace files that are not MNCNI's own")
    command.add_argument("--chain", choices=CHAINED, help="add this plugin to the active conflist of another network")
    command.add_argument("--conf-dir", default=DEFAULT_CONF_DIR, metavar="DIR", help=f"where that conflist is (default {DEFAULT_CONF_DIR})")
    command.add_argument("--remove", action="store_true", help="remove the --chain plugin again")
    command.set_defaults(act=install_command)
    command = commands.add_parser("explain", help="print what a call would run, as a shell script; changes nothing")
    command.add_argument("conflist", metavar="CONFLIST", help="a CNI configuration, as in /etc/cni/net.d")
    command.add_argument("--command", default="ADD", choices=VERBS, help="(default ADD)")
    command.set_defaults(act=explain_command, plugins={**PLUGINS, **plugins})
    command = commands.add_parser("portmap-restore", help="write the tables of host ports and spoofCheck again, after nft flush ruleset")
    command.set_defaults(act=portmap_restore_command)
    command = commands.add_parser("forget-flows", help="delete conntrack's UDP entries to host ports; portmap does it by itself")
    command.add_argument("ports", metavar="[ADDRESS/]PORT", nargs="+", help="as in 53 or 192.0.2.1/53")
    command.set_defaults(act=lambda options, run: forget_flows(set(options.ports)))
    options = parser.parse_args(arguments)
    try:
        options.act(options, make_run(dict(os.environ)))
    except (CNIError, OSError) as error:
        hint = ": run it with sudo" if isinstance(error, PermissionError) else ""
        details = f"\n{error.details}" if getattr(error, "details", "") else ""
        print(f"{program} {options.action}: {error}{hint}{details}", file=sys.stderr)
        return 1
    return 0


ABOUT = f"""MNCNI {PROGRAM_VERSION}: CNI plugins {{}}
CNI protocol versions supported: {", ".join(CNI_VERSIONS)}
A container runtime calls this program with CNI_COMMAND set and a network configuration on stdin. The top of this file shows how to try
it by hand; mncni.py --help lists what else it does.
"""


def main(plugins=None):
    """The program. Another plugin may import this module and call main with a table like PLUGINS: see docs/plugin.md."""
    environ, program = dict(os.environ), os.path.basename(sys.argv[0])
    os.umask(os.umask(0o077) | 0o022)  # nobody else may change what we make
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (closed: print would write to stdout, which is the protocol's)
    if not environ.get("CNI_COMMAND"):
        if len(sys.argv) > 1:
            sys.exit(command_line(program, sys.argv[1:], plugins or {}))
        sys.stderr.write(ABOUT.format(", ".join(plugins or PLUGINS)))
        sys.exit(0)

    run = make_run(environ, print_trace if environ.get("CNI_TRACE") == "1" else None)
    stdout, sys.stdout = sys.stdout, sys.stderr  # stdout is the protocol's: what a plugin prints is for people
    if plugins is not None and stdout:
        stdout = open(os.dup(1), "w")  # noqa: SIM115
        os.dup2(sys.stderr.fileno(), 1)  # also what programs print that the plugin starts without run
    exit_code, text = answer(environ, read_stdin(), run, plugins, program, at_once=True)
    print(text, end="", file=stdout, flush=True)
    os._exit(exit_code)  # skips the interpreter's clean-up, which takes 2 ms


def read_stdin():
    """stdin as text; bytes that are no UTF-8 become surrogates, which parse_json_object refuses. "" from a terminal, a closed stdin, and
    one that cannot be read: VERSION must still answer."""
    try:
        return "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    except OSError as error:
        tell(f"cannot read stdin: {error.strerror}")
        return ""


if __name__ == "__main__":
    main()
