#!/usr/bin/python3 -IS
"""MNCNI: a CNI plugin in one file, for people who run it and for people who read it.

What CNI is. A container runtime (containerd, CRI-O, podman) has made a network namespace and wants it connected. It starts a
plugin, an ordinary program, in the host's namespace: the command and the attachment in environment variables, the network
configuration as JSON on standard input. The plugin changes the kernel and answers with JSON on standard output. Nothing stays
running. An attachment is (network name, container ID, interface name); whatever a plugin leaves on the host has to be found
again from these three alone.

    CNI_COMMAND   what it asks for                                       what it answers
    ADD           connect CNI_IFNAME in CNI_NETNS                        a result: interfaces, addresses, routes, DNS
    DEL           take that back, as often as asked, whatever is gone    nothing
    CHECK         is everything that ADD made still there?               nothing, or an error that names what is not
    GC            remove every attachment that is not in this list       nothing
    STATUS        could ADD work now?                                    nothing, or error 50 or 51
    VERSION       which versions of the protocol do you speak?           the list

By hand, as root (it makes the bridge mncni0 and switches IP forwarding on):

    ip netns add pod
    export CNI_CONTAINERID=c1 CNI_NETNS=/run/netns/pod CNI_IFNAME=eth0 CNI_TRACE=1
    conf='{"cniVersion": "1.1.0", "name": "net", "plugin": "naivewg", "ipam": {"ranges": [[{"subnet": "10.88.0.0/24"}]]}}'
    CNI_COMMAND=ADD ./mncni.py <<<"$conf"
    CNI_COMMAND=DEL ./mncni.py <<<"$conf"
    ip netns delete pod; ip link delete mncni0

Reading order: whoever wants the protocol reads to the end of "Dispatch"; whoever wants to write a plugin reads "Commands", then
copies the section "loopback". Every verb looks (`look_*`, read-only commands), plans (`plan_*`, pure), applies, replies. `run` is
always a parameter: tests pass a recorder.

Specification: https://www.cni.dev/docs/spec/ ("SPEC" below), version 1.1.0. The error codes 8 and 999 come from libcni, not from it.
"""

import fcntl
import ipaddress
import os
import select
import struct
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
BACKUP_DIR = "/var/lib/mncni/backup"
DOOMED = 0x6D6E  # the group (ip-link(8)) of links that are about to be deleted; nothing stays in it
OWNER_ALIAS = "mncni"  # `ip link` shows it on every link that is ours; a link without it is somebody else's

INCOMPATIBLE_VERSION, UNSUPPORTED_FIELD, BAD_ENVIRONMENT, IO_FAILURE, DECODE_FAILURE, BAD_CONFIG = 1, 2, 4, 5, 6, 7
BAD_NETNS, TRY_AGAIN, NOT_AVAILABLE, LIMITED_CONNECTIVITY, COMMAND_FAILED, INTERNAL = 8, 11, 50, 51, 100, 999

PACKAGES = {
    "ip": "iproute2", "tc": "iproute2", "nft": "nftables", "wg": "wireguard-tools",
    "nsenter": "util-linux", "setpriv": "util-linux", "tee": "coreutils",
}


class CNIError(Exception):
    """What a plugin reports: code (SPEC section 5), msg (one line: the act, the value, the way out), details (may be long)."""

    def __init__(self, code, msg, details=""):
        super().__init__(msg)
        self.code, self.msg, self.details = code, msg, details


def config_error(msg, details=""):
    """Code 7, which is what nearly every refusal of a configuration is."""
    return CNIError(BAD_CONFIG, msg, details)


# ---------------------------------------------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------------------------------------------


def refuse_constant(word):
    raise ValueError(f"{word} is not JSON")


def finite(word):
    """A number with a point or an exponent. 1e400 is infinite to Python, which would write Infinity."""
    return float(word) if abs(float(word)) < float("inf") else refuse_constant(word)


class JsonRules:
    """What the scanner asks for, by the names that json.JSONDecoder has for it."""

    strict, object_hook, object_pairs_hook, memo = True, None, None, {}
    parse_float, parse_int, parse_constant = finite, int, refuse_constant


try:  # The half of json that is written in C. The other imports re: +6 ms, a quarter of what a STATUS takes.
    import _json

    scan_json = _json.make_scanner(JsonRules)
    encode_json = _json.make_encoder(None, None, _json.encode_basestring_ascii, None, ": ", ", ", False, False, True)
except (ImportError, AttributeError, TypeError):  # it is CPython's own business, and may change
    import json

    scan_json = json.JSONDecoder(parse_float=finite, parse_constant=refuse_constant).scan_once
    encode_json = json.JSONEncoder().iterencode


def parse_json(text):
    """The value of a JSON text, as json.loads has it. ValueError; RecursionError if it is nested too deep."""
    try:
        value, end = scan_json(text, len(text) - len(text.lstrip(" \t\r\n")))
        if not text[end:].strip(" \t\r\n"):
            return value
    except (StopIteration, SystemError):  # what the scanner does where json has not been imported, instead of raising JSONDecodeError
        pass
    import json  # +6 ms, to say what is wrong

    return json.loads(text)


def to_json(value):
    """A value as JSON text, as json.dumps has it."""
    return "".join(encode_json(value, 0))


def indented(value):
    """The same for people to read."""
    import json  # the command line only

    return json.dumps(value, indent=2)


# ---------------------------------------------------------------------------------------------------------------------
# Request                                                                  SPEC section 2, Parameters; section 3, stdin
# ---------------------------------------------------------------------------------------------------------------------


class Request:
    """One call, validated as far as the protocol goes.

    command, container_id, netns, ifname: the CNI_* variables ("" when absent). args: CNI_ARGS as a dict. path: directories of
    CNI_PATH. conf: the network configuration (dict). network: its name. version: its cniVersion. prev_result: a 1.1.0 result,
    or None. run_dir: where state that dies with the boot lives. at_once: commands that do not depend on one another may run at the
    same time. links: the host's links that the plugins of this call make for the attachment. new_peer: the host's end of the pod's
    interface, as look_peer has it, if an earlier stage of this very call made it.
    """

    def __init__(self, environ, conf):
        self.command = environ["CNI_COMMAND"]
        self.container_id = environ.get("CNI_CONTAINERID", "")
        self.netns = environ.get("CNI_NETNS", "")
        self.ifname = environ.get("CNI_IFNAME", "")
        self.args = parse_args(environ.get("CNI_ARGS", ""))
        self.path = [part for part in environ.get("CNI_PATH", "").split(":") if part]
        self.run_dir = environ.get("MNCNI_RUN_DIR") or DEFAULT_RUN_DIR
        self.conf = conf
        self.network = conf["name"]
        self.version = conf["cniVersion"]
        self.prev_result = None
        self.at_once = False
        self.links, self.new_peer = [], None


HEX = frozenset("0123456789abcdef")
SPECIAL = frozenset("\"'\\#")  # what `ip -batch` gives a meaning to, besides white space
ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def is_identifier(text):
    """Whether text may be a container ID or a network name: a letter or digit, then letters, digits, '_', '.', '-'."""
    return isinstance(text, str) and bool(text) and text[0] not in "_.-" and ID_CHARACTERS.issuperset(text)


def is_ifname(text):
    """Whether text may name an interface: the kernel's rule (dev_valid_name), less what `ip -batch` or nft gives a meaning to."""
    if not isinstance(text, str) or text in ("", ".", "..") or len(text.encode("utf-8", "replace")) > 15:
        return False
    return is_word(text) and frozenset("/:*").isdisjoint(text)


def is_word(text):
    """Whether `ip -batch` reads text as one word that means itself."""
    return SPECIAL.isdisjoint(text) and text.isprintable() and " " not in text  # the one space that is printable


def is_netns(text):
    """Whether text may be the path of a network namespace: absolute, for nobody knows from where, and one word of a batch."""
    return text.startswith("/") and is_word(text)


ATTACHMENT = {"CNI_CONTAINERID": is_identifier, "CNI_NETNS": is_netns, "CNI_IFNAME": is_ifname}
NO_NETNS = {"CNI_CONTAINERID": is_identifier, "CNI_IFNAME": is_ifname}
REQUIRED = {"ADD": ATTACHMENT, "CHECK": ATTACHMENT, "DEL": NO_NETNS, "GC": {}, "STATUS": {}, "VERSION": {}}


def check_environment(environ):
    """Refuse missing or malformed CNI_* variables with code 4, the missing ones together. SPEC section 2, Parameters."""
    required = REQUIRED.get(environ.get("CNI_COMMAND", ""), {})
    for name, is_valid in required.items():
        value = environ.get(name, "")
        if value and not is_valid(value):
            raise CNIError(BAD_ENVIRONMENT, f"{name} is malformed: {value!r}", value)
    missing = [name for name in ("CNI_COMMAND", *required) if not environ.get(name)]
    if missing:
        raise CNIError(BAD_ENVIRONMENT, f"required environment variables missing: [{','.join(missing)}]")


def parse_args(text):
    """CNI_ARGS ("K=V;K2=V2") as a dict. What is not a pair is left out: no command, DEL least of all, fails on its account."""
    return dict(pair.split("=", 1) for pair in text.split(";") if "=" in pair)


def parse_json_object(text, what="the network configuration on stdin"):
    """The dict that text holds; `what` it is, for messages. CNIError 6 for anything else: no UTF-8, no JSON, no object, nested too deep."""
    if not text.strip():
        raise CNIError(DECODE_FAILURE, f"cannot decode {what}: it is empty")
    try:
        text.encode("utf-8")
        value = parse_json(text)
    except (ValueError, RecursionError) as error:  # UnicodeError and JSONDecodeError are ValueErrors
        raise CNIError(DECODE_FAILURE, f"cannot decode {what}: {str(error) or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise CNIError(DECODE_FAILURE, f"{what} is not a JSON object but {kind_of(value)}")
    return value


def parse_conf(text):
    """The network configuration, its "name" and "cniVersion" checked for form. CNIError 6 or 7. SPEC section 1."""
    conf = parse_json_object(text)
    for key in ("name", "cniVersion"):
        if not isinstance(conf.get(key, ""), str):
            raise CNIError(DECODE_FAILURE, f'"{key}" must be a string, not {kind_of(conf[key])}')
    if not conf.get("name"):
        raise config_error('the network configuration has no "name"')
    if not is_identifier(conf["name"]) or len(conf["name"]) > 200:  # it names a directory and stands in a link's alias
        raise config_error(f'"name" must be letters, digits, "_", ".", "-", 200 at most, not {conf["name"]!r}')
    conf["cniVersion"] = conf.get("cniVersion") or "0.1.0"  # what its absence means, SPEC section 1
    return conf


def kind_of(value):
    """What JSON calls the type of value, for messages."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def number(mapping, key, default, lowest, highest):
    """mapping[key], an integer, or default where it is absent or null. CNIError 7 if it is none, or either is out of bounds."""
    value = typed(mapping, key, int, default)
    if value is not None and not lowest <= value <= highest:
        raise config_error(f'"{key}" must be {lowest} to {highest}, not {value}')
    return value


def typed(mapping, key, kind, default):
    """mapping[key], or default where it is absent or null. CNIError 7 if it is not of the given JSON type (dict, list, str, bool, int)."""
    value = mapping.get(key)
    if value is None:
        return default
    if type(value) is not kind:  # not isinstance: True is an int to Python, but no number to JSON
        raise config_error(f'"{key}" must be {kind_of(kind())}, not {kind_of(value)} ({to_json(value)[:80]})')
    return value


def any_case(mapping, key):
    """mapping[key] whatever the case of its letters, or None. containerd sends the keys below runtimeConfig capitalised."""
    if not isinstance(mapping, dict):
        return None
    lowered = {name.lower(): value for name, value in mapping.items()}
    return mapping.get(key, lowered.get(key.lower()))


def runtime_config(request, key, kind, default):
    """What the runtime supplies for a declared capability, as `typed` has it. CONVENTIONS, dynamic plugin specific fields."""
    return typed({key: any_case(any_case(request.conf, "runtimeConfig"), key)}, key, kind, default)


def requested(request, key, name):
    """What is asked for, in the order of the conventions: runtimeConfig's key, else that of args.cni, else CNI_ARGS' name, else None."""
    args = any_case(any_case(request.conf, "args"), "cni")
    return any_case(any_case(request.conf, "runtimeConfig"), key) or any_case(args, key) or request.args.get(name)


def valid_attachments(request):
    """What GC has to keep, as a set of (container ID, interface). None: the runtime sent no list, so there is nothing to remove.
    null or [] mean that nothing is valid. CNIError 7 for anything else. SPEC section 2, GC."""
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
# Inside, a result is always a 1.1.0 dict. Keys that we do not know pass through untouched.


def to_newest(result):
    """A result of any version as a 1.1.0 result: below 1.0.0 an address carries its family too, which goes."""
    ips = [{key: value for key, value in ip.items() if key != "version"} for ip in result.get("ips") or []]
    return {**result, "cniVersion": NEWEST, "ips": ips}


def result_to_version(result, version):
    """A 1.1.0 result as version writes it: 1.1.0's own keys go below 1.1.0, the family of an address comes below 1.0.0."""
    result = {**result, "cniVersion": version}
    if version != "1.1.0":
        result["interfaces"] = [without(link, "mtu", "socketPath", "pciID") for link in result.get("interfaces") or []]
        result["routes"] = [without(route, *ROUTE_WORDS) for route in result.get("routes") or []]
    if version.startswith("0."):
        result["ips"] = [{"version": "6" if ":" in ip["address"] else "4", **ip} for ip in result.get("ips") or []]
    return {key: value for key, value in result.items() if value or key == "cniVersion"}


def without(mapping, *keys):
    return {key: value for key, value in mapping.items() if key not in keys}


def parse_prev_result(conf):
    """conf's prevResult as a 1.1.0 result, None where there is none. CNIError 7 if it is no result. SPEC section 3."""
    result = typed(conf, "prevResult", dict, {})
    for key in ("interfaces", "ips", "routes"):
        if not all(isinstance(item, dict) for item in typed(result, key, list, [])):
            raise config_error(f'"prevResult" is no result: "{key}" must be an array of objects')
    for ip in result.get("ips") or []:
        index = ip.get("interface")
        if not is_address(ip.get("address"), ipaddress.ip_interface) or "/" not in ip["address"]:
            raise config_error(f'"prevResult" is no result: {ip.get("address")!r} is not an address with its prefix length')
        if index is not None and (type(index) is not int or not 0 <= index < len(result.get("interfaces") or [])):
            raise config_error(f'"prevResult" is no result: "interface" {index!r} is not an index into its interfaces')
    return to_newest(result) if result else None


def merge_results(prev_result, own):
    """prev_result with our interfaces, addresses and routes after its own: a plugin adds to what it was given. SPEC section 2, ADD."""
    if prev_result is None:
        return own
    offset = len(prev_result.get("interfaces") or [])
    ips = [{**ip, "interface": ip["interface"] + offset} for ip in own["ips"]]
    merged = {**prev_result, "dns": own["dns"] or prev_result.get("dns")}
    for key, items in (("interfaces", own["interfaces"]), ("ips", ips), ("routes", own["routes"])):
        merged[key] = (prev_result.get(key) or []) + items
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch: the whole protocol on one page                                              SPEC section 2, Execution Protocol
# ---------------------------------------------------------------------------------------------------------------------


def answer(environ, stdin_text, run, plugins=None, called_as="mncni", at_once=False):
    """(exit code, what goes to stdout) for one call. Never raises. `plugins` is a table like PLUGINS, `run` what starts commands;
    at_once: it may be called from several threads."""
    version = NEWEST  # what an error speaks as long as nobody has named a version we know
    try:
        check_environment(environ)
        if environ["CNI_COMMAND"] == "VERSION":
            return 0, to_json(version_reply(stdin_text)) + "\n"
        conf = parse_conf(stdin_text)
        if environ["CNI_COMMAND"] not in VERBS:
            raise CNIError(BAD_ENVIRONMENT, f"CNI_COMMAND {environ['CNI_COMMAND']!r} is unknown; there are: {', '.join(VERBS)}, VERSION")
        check_version(environ["CNI_COMMAND"], conf["cniVersion"])
        version = conf["cniVersion"]
        stages = choose_plugins(conf, called_as, plugins or PLUGINS)
        request = Request(environ, conf)
        request.at_once = at_once
        attachment = (request.network, request.container_id, request.ifname)
        request.links = [host_ifname(stage["link"], *attachment) for stage in stages if "link" in stage]
        check_netns(request, environ)
        run = logged(run, request)
        result = VERBS[request.command](request, stages, run)
        return 0, to_json(result_to_version(result, version)) + "\n" if result is not None else ""
    except CNIError as error:
        return 1, error_reply(error, version)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return 1, error_reply(CNIError(IO_FAILURE, f"input/output failure: {error.strerror or error}{where}"), version)
    except Exception as error:
        if isinstance(error, (UnicodeEncodeError, RecursionError)) or "embedded null" in str(error):
            what = "a character that no name can have" if isinstance(error, ValueError) else "a path or value that is nested too deep"
            return 1, error_reply(config_error(f"a string of the configuration holds {what}: {error}"), version)
        import traceback  # only when it is too late to be fast

        traceback.print_exc()
        return 1, error_reply(CNIError(INTERNAL, f"internal error, please report: {type(error).__name__}: {error}"), version)


def call_add(request, stages, run):
    """Run each stage on the result of the one before it. When one fails, those before it are undone, last first."""
    request.prev_result = parse_prev_result(request.conf)
    for position, stage in enumerate(stages):
        try:
            if stage.get("chained") and request.prev_result is None:
                raise config_error("a chained plugin works on the result of one before it: put it behind one that makes the interface")
            request.prev_result = stage["ADD"](request, run)
        except Exception:
            for earlier in reversed(stages[:position]):
                best_effort(earlier["DEL"], request, run)
            raise
    return request.prev_result


def call_del(request, stages, run):
    """Undo every stage, last first. No prevResult, or one that is no result, is what a crash leaves: go on without."""
    try:
        request.prev_result = parse_prev_result(request.conf)
    except CNIError as error:
        tell(f"DEL goes on without prevResult: {error.msg}")
    return call_all(request, list(reversed(stages)), run)


def call_check(request, stages, run):
    request.prev_result = parse_prev_result(request.conf)
    if request.prev_result is None:
        raise config_error('CHECK needs "prevResult", the result of the ADD that it checks')
    return call_all(request, stages, run)


def report(request, problems):
    """CNIError 100 if CHECK found any; problems is a list of messages, all of which go into the details."""
    if problems:
        what = f"CHECK of {request.ifname} of container {request.container_id} failed: {problems[0]}"
        raise CNIError(COMMAND_FAILED, what, "\n".join(problems))


def call_all(request, stages, run):
    """Run every stage, whatever happens to those before it; then report the first error. Those of a DEL do not depend on one another."""
    all_of([(stage[request.command], (request, run)) for stage in stages], request.at_once and request.command == "DEL")


def all_of(acts, at_once=False):
    """Do every act, (function, arguments), whatever becomes of the others; then raise the first error, or return what they returned."""
    results, errors = [None] * len(acts), {}

    def do(index):
        act, arguments = acts[index]
        try:
            results[index] = act(*arguments)
        except Exception as error:
            errors[index] = error

    if at_once and len(acts) > 1:
        import threading  # +0.5 ms

        threads = [threading.Thread(target=do, args=(index,)) for index in range(len(acts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        for index in range(len(acts)):
            do(index)
    for _, error in sorted(errors.items()):
        raise error
    return results


VERBS = {"ADD": call_add, "DEL": call_del, "CHECK": call_check, "GC": call_all, "STATUS": call_all}


def best_effort(act, *arguments):
    """Call act and only report if it fails: for undoing, where the first error is the one to tell."""
    try:
        act(*arguments)
    except Exception as error:
        tell(f"while undoing: {error}")


def tell(text):
    """A word on stderr for people. That nobody can read it must not stop a DEL."""
    try:
        print(f"mncni: {text}", file=sys.stderr)
    except OSError:
        return


def choose_plugins(conf, called_as, plugins):
    """The verb tables of the stages to run: those that conf's "plugin" names, else the one that the program was called as. CNIError 7."""
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
    return [plugins[name] for name in names]


def check_version(command, version):
    """Refuse a version that we do not speak, or one that has no such command: code 1; an unreadable one: 6 or 1, as in libcni's skel."""
    since = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}.get(command)
    if since and not (all(part.isdigit() for part in version.split(".")) and version.count(".") <= 2):
        raise CNIError(DECODE_FAILURE, f'cannot read "cniVersion" {version!r}')
    if version not in CNI_VERSIONS:
        what = '"cniVersion" is missing, or 0.1.0, which' if version == "0.1.0" else f'"cniVersion" {version!r}'
        raise CNIError(INCOMPATIBLE_VERSION, f"{what} is not supported", f"supported: {', '.join(CNI_VERSIONS)}")
    if since and CNI_VERSIONS.index(version) < CNI_VERSIONS.index(since):
        raise CNIError(INCOMPATIBLE_VERSION, f"{command} needs cniVersion {since} or newer, the configuration says {version}")


def version_reply(stdin_text):
    """SPEC section 2, VERSION. It must answer whatever stands on stdin: older runtimes send nothing."""
    try:
        version = parse_json_object(stdin_text).get("cniVersion")
    except CNIError:
        version = None
    return {"cniVersion": version if isinstance(version, str) and version else NEWEST, "supportedVersions": list(CNI_VERSIONS)}


def check_netns(request, environ):
    """Refuse a namespace that is not there, or that is the host's own: code 8, before anything is changed. DEL cleans up without one:
    it may be gone, or /proc/PID may be another process by now."""
    if not request.netns or request.command in ("GC", "STATUS"):
        return
    problem = "" if is_netns(request.netns) else "it is no path of one"
    try:
        override = environ.get("CNI_NETNS_OVERRIDE", "").lower() in ("1", "true")
        if os.path.samefile(request.netns, "/proc/self/ns/net") and not override:
            problem = "the plugin itself runs in it"
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        problem = getattr(error, "strerror", None) or error
    if problem and request.command != "DEL":
        raise CNIError(BAD_NETNS, f"cannot use the network namespace {request.netns!r}: {problem}")
    if problem:
        request.netns = ""


def error_reply(error, version):
    """The JSON object that an error is on stdout. SPEC section 5, Error."""
    reply = {"cniVersion": version, "code": error.code, "msg": error.msg, "details": error.details}
    return to_json({key: value for key, value in reply.items() if value != ""}) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Commands: the only place that starts a process
# ---------------------------------------------------------------------------------------------------------------------

Reply = namedtuple("Reply", "exit_code stdout stderr")


class Command:
    """A process to start: argv (list of str), stdin (text), environ (variables to set on top of ours), fds (of files to leave open)."""

    def __init__(self, argv, stdin="", environ=None):
        self.argv, self.stdin, self.environ, self.fds = argv, stdin, environ or {}, ()

    def __str__(self):
        """The command as a person would paste it into a shell."""
        import shlex  # +0.4 ms, tracing and errors only

        text = " ".join([*(f"{name}={shlex.quote(value)}" for name, value in self.environ.items()), shlex.join(self.argv)])
        return f"{text} <<'E'\n{self.stdin.rstrip()}\nE" if self.stdin else text


def search_path(environ):
    """PATH and the directories where the tools are. An empty part of it would mean the current directory."""
    return ":".join([part for part in environ.get("PATH", "").split(":") if part] + ["/usr/sbin", "/usr/bin", "/sbin", "/bin"])


def make_run(environ, trace=None, timeout_s=30):
    """The runner: run(command) -> Reply. It never raises on an exit code. CNIError 4 where the tool is missing, 100 when it hangs.

    trace: a function that gets each command before it runs, or None.
    """
    child_environ = {**environ, "LC_ALL": "C", "PATH": search_path(environ)}

    def run(command):
        if trace:
            trace(command)
        if command.argv[0] == "mncni.py":  # ourselves
            forget_flows(set(command.argv[2:]))
            return Reply(0, "", "")
        try:
            reply = run_process(command, {**child_environ, **command.environ}, timeout_s)
        except FileNotFoundError:
            raise missing_tool(command.argv[0]) from None
        except TimeoutError:
            raise CNIError(COMMAND_FAILED, f"no answer within {timeout_s} s from {command.argv[0]}", str(command)) from None
        if reply.exit_code == 127 and command.argv[0] == "nsenter":
            raise missing_tool(command.argv[2])
        return reply

    return run


def find_program(name, path):
    """The path of a program. FileNotFoundError."""
    if "/" in name:
        return name
    for directory in path.split(":"):
        if os.access(os.path.join(directory, name), os.X_OK):
            return os.path.join(directory, name)
    raise FileNotFoundError(name)


def run_process(command, environ, timeout_s):
    """Run a program to its end. FileNotFoundError, TimeoutError. subprocess.run does the same, but its import takes 3 ms, and then each
    process 1 ms more.
    """
    argv, program = command.argv, find_program(command.argv[0], environ["PATH"])
    (its_in, our_in), (our_out, its_out), (our_err, its_err) = os.pipe(), os.pipe(), os.pipe()
    ends, pid = {our_in, our_out, our_err}, 0
    try:
        try:
            free = max(its_in, its_out, its_err, *command.fds) + 1
            places = [*((fd, free + number) for number, fd in enumerate(command.fds)), (its_in, 0), (its_out, 1), (its_err, 2)]
            actions = [(os.POSIX_SPAWN_DUP2, fd, place) for fd, place in places]
            pid = os.posix_spawn(program, argv, environ, file_actions=actions, setsigdef=[13, 25])  # SIGPIPE, SIGXFSZ: Python ignores them
        finally:
            for end in (its_in, its_out, its_err):
                os.close(end)
        said = talk(ends, our_in, command.stdin.encode(), time.monotonic() + timeout_s)
        status, pid = os.waitpid(pid, 0)[1], 0
        return Reply(os.waitstatus_to_exitcode(status), *(said[end].decode("utf-8", "replace") for end in (our_out, our_err)))
    finally:
        if pid:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        for end in ends:
            os.close(end)


def talk(ends, our_in, data, deadline):
    """Write data to the pipe our_in, read all others of ends until they close: {end: bytes}. Closes what has ended, and takes it out of
    the set. TimeoutError."""
    poll, said = select.poll(), dict.fromkeys(ends, b"")
    for end in ends:
        poll.register(end, select.POLLOUT if end == our_in else select.POLLIN)
    while ends:
        events = poll.poll(max(0, deadline - time.monotonic()) * 1000)
        if not events:
            raise TimeoutError
        for end, event in events:
            if end == our_in and data and not event & select.POLLERR:
                try:
                    data = data[os.write(end, data[:4096]) :]  # PIPE_BUF: so much never blocks
                except BrokenPipeError:
                    data = b""
                continue
            chunk = b"" if end == our_in else os.read(end, 1 << 16)
            said[end] += chunk
            if not chunk:
                poll.unregister(end)
                ends.remove(end)
                os.close(end)
    return said


LOG_LIMIT = 10 * 1024 * 1024  # bytes; then the file is put aside, in the place of the one put aside before


def logged(run, request):
    """run, which also appends each command, its time and how it ended to the file that "logFile" names. CNIError 7 for a bad name."""
    path = typed(request.conf, "logFile", str, "")
    if not path:
        return run
    if not os.path.isabs(path):
        raise config_error(f'"logFile" must be an absolute path, not {path!r}')

    def log_and_run(command):
        begin = time.monotonic()
        reply = run(command)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        who = f"{request.command} {request.network} {request.container_id} {request.ifname}"
        took = f"{(time.monotonic() - begin) * 1000:.1f} ms, exit {reply.exit_code}"
        best_effort(append_log, path, f"{now} {who}: {took}: {command}\n{reply.stderr if reply.exit_code else ''}")
        return reply

    return log_and_run


def append_log(path, text):
    """Append to a log that only root reads: configurations may hold secrets."""
    if os.path.exists(path) and os.path.getsize(path) > LOG_LIMIT:
        os.rename(path, f"{path}.1")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def missing_tool(name):
    package = PACKAGES.get(name)
    return CNIError(BAD_ENVIRONMENT, f'cannot find the program "{name}"' + (f": install the package {package}" if package else ""))


def in_netns(netns, argv):
    """argv, to be run in the network namespace at a path ("" = ours). Not `ip -n`: that takes only names below /run/netns."""
    return ["nsenter", f"--net={netns}", *argv] if netns else argv


def guarded(lines):
    """The text of a batch. Every value in it was validated before; this is the one place that makes sure."""
    for line in lines:
        if not (SPECIAL.isdisjoint(line) and line.isprintable()):
            raise CNIError(BAD_ENVIRONMENT, f"refused to pass a value with a special character on to ip: {line!r}")
    return "".join(line + "\n" for line in lines)


def ip_batch(lines, netns=""):
    """One `ip` for several changes. It is no transaction: it stops at the first line that fails."""
    return Command(in_netns(netns, ["ip", "-batch", "-"]), guarded(lines))


def tc_batch(lines):
    """The same for `tc`."""
    return Command(["tc", "-batch", "-"], guarded(lines))


def write_sysctls(keys, value, netns=""):
    """Write one value to several sysctls ("net/ipv4/ip_forward"). With tee, so that it is a command like any other: traced,
    recorded, and run in another namespace like the others."""
    return Command(in_netns(netns, ["tee", *(f"/proc/sys/{key}" for key in keys)]), f"{value}\n")


def apply(plan, run):
    """Run each command of the plan. CNIError 100 at the first that fails."""
    for command in plan:
        reply = run(command)
        if reply.exit_code != 0 and not is_read_only(command, reply):
            raise command_failed(command, reply)


def is_read_only(command, reply):
    """Whether only a read-only /proc/sys kept a sysctl from being written: it may be right as it is, and if not, the next command fails."""
    lines = reply.stderr.splitlines()
    return "tee" in command.argv and bool(lines) and all(line.endswith("Read-only file system") for line in lines)


def command_failed(command, reply):
    """CNIError 100 whose details are the failing line and what the program said."""
    said, line = reply.stderr.strip(), ""
    for text in said.splitlines():
        number = text.partition("Command failed -:")[2]
        if number.isdigit() and int(number) <= len(command.stdin.splitlines()):
            line = command.stdin.splitlines()[int(number) - 1]
    what = f"{' '.join(command.argv)}: {line}" if line else str(command)
    first = said.splitlines()[0] if said else f"exit {reply.exit_code}"
    return CNIError(COMMAND_FAILED, f"{command.argv[0]} failed: {first}", f"{what}\n{said}")


# Words of ip and tc that say: what was asked for is not there. nft says so in one line of several.
GONE = ("does not exist", "Cannot find device", "No such device", "No such file or directory", "No such process", "Command failed -:")
GONE_NFT = "Error: No such file or directory"


def is_gone(reply):
    """Whether a command failed for no other reason than that its object is not there."""
    lines = reply.stderr.splitlines()
    gone = bool(lines) and all(any(words in line for words in GONE) for line in lines)
    return reply.exit_code != 0 and (gone or GONE_NFT in reply.stderr)


def ask(command, run, may_be_gone=True):
    """The reply to a command whose object may be gone. CNIError 100 if it fails for another reason, 8 if there is no such namespace."""
    for _ in range(5):
        reply = run(command)
        if "Dump was interrupted" not in reply.stderr:  # ip says so when links come and go while it lists them
            break
    if reply.stderr.startswith("nsenter:"):
        raise CNIError(BAD_NETNS, "cannot enter the network namespace", reply.stderr.strip())
    if reply.exit_code != 0 and not (may_be_gone and is_gone(reply)):
        raise command_failed(command, reply)
    return reply


def understood(program, parse, text):
    """parse(text), of what a program said. CNIError 100 where that is nothing that parse reads."""
    try:
        return parse(text)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        what = f"cannot understand what {program} says: {type(error).__name__} {error}"[:300]
        raise CNIError(COMMAND_FAILED, what, text[:1000]) from None


def look_ip(arguments, run, netns="", family=""):
    """What `ip -json` prints for the given command lines, as one list of objects. What is not there is left out."""
    argv = ["ip", "-json", "-details", *([family] if family else []), "-force", "-batch", "-"]
    return understood("ip", parse_ip, ask(Command(in_netns(netns, argv), guarded(arguments)), run).stdout)


IP_KEYS = {  # what we read of `ip -json`, and what it has to be, for some of it becomes part of commands
    **dict.fromkeys(("ifalias", "master", "address", "family"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("mtu", "ifindex", "prefixlen", "metric"), lambda value: type(value) is int and 0 <= value < 2**32),
    **dict.fromkeys(("local", "gateway", "prefsrc"), lambda value: is_address(value, ipaddress.ip_address)),
    **dict.fromkeys(("addr_info", "nexthops"), lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value)),
    "dst": lambda value: value == "default" or is_address(value, ipaddress.ip_network),
    "type": lambda value: isinstance(value, str) and value.isascii() and value.isalpha(),
    "table": lambda value: isinstance(value, (str, int)),
    "flags": lambda value: isinstance(value, list),
    "linkinfo": lambda value: isinstance(value, dict),
}


def parse_ip(text):
    """The objects in lines of JSON, less those of links that nobody can name in a command. ValueError, TypeError, ... for other texts."""
    items = [item for line in text.splitlines() if line for item in parse_json(line)]
    for part in [*items, *(info for item in items for info in item.get("addr_info", ()))]:
        wrong = [key for key, fits in IP_KEYS.items() if key in part and not fits(part[key])]
        whole = f"{part.get('local', '::')}/{part.get('prefixlen', 0)}"
        wrong += [] if is_address(whole, ipaddress.ip_interface) else [whole]
        wrong += ["flags"] if "ifname" in part and "flags" not in part else []
        wrong += ["ifalias"] if "ifalias" in part and "ifname" not in part else []
        wrong += ["mtu"] if {"ifname", "addr_info"} & part.keys() and "mtu" not in part else []
        if wrong:
            raise ValueError(wrong[0])
    return [item for item in items if all(is_ifname(item[key]) for key in ("ifname", "dev", "interface") if key in item)]


def look_nft(what, parse, run):
    """parse(objects) of a table or chain of nft, see nft(8), JSON: look_nft(["table", "inet", "t"], parse, run); of [] if it is gone."""
    text = ask(Command(["nft", "-j", "list", *what]), run).stdout or "{}"
    return understood("nft", lambda text: parse(parse_json(text).get("nftables", [])), text)


def look_qdiscs(device, run, netns=""):
    """[(kind, rate in byte/s, 0 for none)] of the queueing disciplines of a device, [] if it or its namespace is gone."""
    reply = run(Command(in_netns(netns, ["tc", "-json", "qdisc", "show", "dev", device])))
    rows = parse_json if reply.exit_code == 0 else lambda text: []
    return understood("tc", lambda text: [(row["kind"], row.get("options", {}).get("rate", 0)) for row in rows(text)], reply.stdout or "[]")


def look_link(name, links):
    """The link of that name in what look_ip returned, or None."""
    return next((link for link in links if link.get("ifname") == name), None)


def addresses_of(link, scope=""):
    """The addresses of a link in what `ip address` returned, like "10.244.1.1/24"; of a scope, or all."""
    infos = [info for info in link.get("addr_info", []) if {"local", "prefixlen"} <= info.keys()]
    return {f"{info['local']}/{info['prefixlen']}" for info in infos if scope in ("", info.get("scope"))}


# ---------------------------------------------------------------------------------------------------------------------
# State: leases and files                                                                             whole or absent
# ---------------------------------------------------------------------------------------------------------------------
# <dataDir>/<network>/10.244.1.5       a lease: container ID, interface, boot ID, a line each
# <dataDir>/<network>/attachments/KEY  its index: the same three lines, then the addresses
# <dataDir>/<network>/last.0           where the search goes on in range set 0
#
# A lease of an earlier boot counts as free: no container outlives its kernel. That is also why nothing here is fsynced: what a
# power failure can tear is void after it. The index is written before the leases and removed after them, so that every lease
# can be found from its attachment, wherever a crash falls.


class Locked:
    """`with Locked(path):` one process at a time. CNIError 11 after timeout_s."""

    def __init__(self, path, timeout_s=60):
        self.path, self.timeout_s = path, timeout_s

    def __enter__(self):
        own_directory(os.path.dirname(self.path))
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if not takes_lock(self.fd):
            import threading  # +0.5 ms

            # flock has no deadline of its own; to poll costs time, or, with a hundred that wait, the processor.
            waiting = threading.Thread(target=wait_for_lock, args=(os.dup(self.fd),), daemon=True)
            waiting.start()
            waiting.join(self.timeout_s)
            if not takes_lock(self.fd):
                os.close(self.fd)
                raise CNIError(TRY_AGAIN, f"another process holds {self.path} for more than {self.timeout_s} s")
        return self

    def __exit__(self, *exc_info):
        os.close(self.fd)

    def held(self, run):
        """run, whose commands hold the lock until they end, even if we are killed before."""

        def run_holding(command):
            command.fds += (self.fd,)
            return run(command)

        return run_holding


def takes_lock(fd):
    """Whether an open file has the lock now: it is free, or a copy of the descriptor has it. flock(2)."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def wait_for_lock(fd):
    """Have the lock for all copies of a descriptor, of which this one ends: if it comes when the others have gone, it goes with it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


def own_directory(path, mode=0o755):
    """Make a directory for state. CNIError 5 for one that others can change, or that a link of theirs leads to: so is all that is in it."""
    os.makedirs(path, mode=mode, exist_ok=True)
    for status in (os.lstat(path), os.stat(path)):
        is_link = status.st_mode & 0o170000 == 0o120000
        if status.st_uid not in (0, os.geteuid()) or (status.st_mode & 0o022 and not is_link):
            what = f"others than root can change {path}, owner {status.st_uid}, mode {status.st_mode & 0o7777:o}"
            raise CNIError(IO_FAILURE, f"{what}: look what is in it, then chown root and chmod go-w, or remove it")


def read_file(path):
    """The text of a small file, None if there is none. What is not UTF-8 is replaced, so that it can be judged."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        error.filename = path  # read(2) knows no name
        raise


def read_state(path):
    """The same of a file of ours; "" for a link, which we never make, and for what is no file."""
    return "" if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)) else read_file(path)


def write_file(path, text, mode=0o644):
    """Write a file whole or not at all: a reader sees the old one or the new one. What a killed writer left, the next one overwrites."""
    temporary = unfinished(path)
    try:
        with open(lock_file(temporary, mode), "w", encoding="utf-8") as file:
            file.truncate()
            file.write(text)
            file.flush()
            os.rename(temporary, path)  # before the lock goes
    except BaseException as error:
        remove_file(temporary)
        if isinstance(error, OSError):
            error.filename = path  # a full disk is noticed by write(2), which knows no name
        raise


def unfinished(path):
    """Where a file is while it is being written. What reads directories passes over names with a dot."""
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
        os.close(fd)  # whoever had the lock has renamed the file, or removed it


def remove_file(path):
    """Remove a file and what a killed writer left of it. Nothing there is fine."""
    for each in (unfinished(path), path):
        try:
            os.unlink(each)
        except (FileNotFoundError, NotADirectoryError):
            continue


def boot_id():
    """A name for the time since the kernel started. Documentation/admin-guide/sysctl/kernel.rst, random."""
    return (read_file("/proc/sys/kernel/random/boot_id") or "").strip()


def short_hash(*parts):
    """16 hex digits for a tuple of names: 64-bit FNV-1a. hashlib costs 2.7 ms to import; nobody gains by forging a collision here."""
    value = 0xCBF29CE484222325
    for byte in "/".join(parts).encode():  # "/" stands in none of the names
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


class Leases:
    """The leases of one network. Every change is made by whoever holds `with leases.lock:`."""

    def __init__(self, data_dir, network):
        self.dir = os.path.join(data_dir, network)
        self.index_dir = os.path.join(self.dir, "attachments")
        self.network = network
        self.lock = Locked(os.path.join(self.dir, "lock"))
        self.boot_id = boot_id()

    def index_path(self, container_id, ifname):
        return os.path.join(self.index_dir, short_hash(self.network, container_id, ifname))

    def holder(self, address):
        """(container ID, interface) that holds an address, None if it is free: no lease, an unreadable one, or one of an earlier boot."""
        owner, _ = self._parse(read_state(os.path.join(self.dir, str(address))))
        return owner

    def addresses(self, container_id, ifname):
        """The addresses (list of str) that the index names for an attachment and whose leases are still its own."""
        attachment = (container_id, ifname)
        owner, addresses = self._parse(read_state(self.index_path(container_id, ifname)))
        return [address for address in addresses if self.holder(address) == attachment] if owner == attachment else []

    def take(self, addresses, container_id, ifname):
        """Write the index, then the leases."""
        own_directory(self.index_dir)
        lines = [container_id, ifname, self.boot_id]
        write_file(self.index_path(container_id, ifname), "\n".join([*lines, *map(str, addresses)]) + "\n")
        for address in addresses:
            write_file(os.path.join(self.dir, str(address)), "\n".join(lines) + "\n")

    def release(self, container_id, ifname):
        """Remove the leases of an attachment, then its index. Nothing there is fine."""
        attachment, index_path = (container_id, ifname), self.index_path(container_id, ifname)
        owner, addresses = self._parse(read_file(index_path))
        for address in addresses if owner == attachment else ():
            path = os.path.join(self.dir, address)
            remove_file(path if self.holder(address) == attachment else unfinished(path))
        remove_file(index_path)

    def release_all_but(self, keep):
        """Release every attachment that is not in keep, a set of (container ID, interface)."""
        for path, owner in self._index():
            if owner is None:
                remove_file(path)  # torn, or of an earlier boot: the leases it may name count as free
            elif owner not in keep:
                self.release(*owner)
        for name in os.listdir(self.dir):
            if name.startswith("."):
                remove_file(os.path.join(self.dir, name))  # half written by a process that was killed: only who holds the lock writes

    def attachments(self):
        """[(container ID, interface)] of all attachments of this boot that hold leases."""
        return [owner for _, owner in self._index() if owner]

    def _index(self):
        """(path, owner) of every entry of the index; None for an owner that counts as none."""
        for key in sorted(os.listdir(self.index_dir)) if os.path.isdir(self.index_dir) else []:
            path = os.path.join(self.index_dir, key)
            yield path, None if key.startswith(".") else self._parse(read_state(path))[0]

    def last(self, set_index):
        """The address (int) that a range set gave out last, 0 if none."""
        text = (read_state(os.path.join(self.dir, f"last.{set_index}")) or "").strip()
        return int(ipaddress.ip_address(text)) if is_address(text, ipaddress.ip_address) else 0

    def set_last(self, set_index, address):
        with open(os.path.join(self.dir, f"last.{set_index}"), "w") as file:  # a mark: a torn one costs nothing
            file.write(f"{address}\n")

    def _parse(self, text):
        """((container ID, interface), addresses) of a lease or an index entry of this boot, (None, []) of any other text."""
        lines = (text or "").splitlines()
        if len(lines) < 3 or lines[2] != self.boot_id or not is_identifier(lines[0]) or not is_ifname(lines[1]):
            return None, []
        return (lines[0], lines[1]), [line for line in lines[3:] if is_address(line, ipaddress.ip_address)]


# ---------------------------------------------------------------------------------------------------------------------
# Addresses: parsing and validating                                                                              pure
# ---------------------------------------------------------------------------------------------------------------------


def is_address(text, kind):
    """Whether text is a str that the given constructor of the ipaddress module takes, and nobody takes for another address."""
    try:
        return isinstance(text, str) and "%" not in text and not has_octal(text) and bool(kind(text))
    except ValueError:
        return False


def has_octal(text):
    """Whether a number of an IPv4 address begins with 0, as in 10.0.0.010: ten to older Pythons, eight to C, refused since 3.9.5."""
    octets = text.partition("/")[0].rpartition(":")[2].split(".")
    return len(octets) > 1 and any(len(octet) > 1 and octet[0] == "0" for octet in octets)


def parse_address(text, kind, what):
    """kind(text): ipaddress.ip_address, ip_interface or ip_network. CNIError 7 naming `what` and the text."""
    if not is_address(text, kind):
        form = "a network like 10.0.0.0/24, no host bits set" if kind is ipaddress.ip_network else "an IP address"
        raise config_error(f"{what} must be {form}, not {to_json(text)}")
    return kind(text)


def family_of(address):
    """ "-4" or "-6", the option of `ip`, for an address or network in text."""
    return "-6" if ":" in address else "-4"


def default_route(address):
    """The destination "everything" of an address's family."""
    return "::/0" if ":" in address else "0.0.0.0/0"


def parse_mac(text, what):
    """A MAC address in lower case. CNIError 7 unless it is six bytes, unicast and not zero."""
    parts = text.lower().split(":") if isinstance(text, str) else []
    is_mac = len(parts) == 6 and all(len(part) == 2 and HEX.issuperset(part) for part in parts)
    if not is_mac or int(parts[0], 16) & 1 or set(parts) == {"00"}:
        raise config_error(f"{what} must be a unicast MAC address like 0a:58:0a:f4:01:05, not {to_json(text)}")
    return ":".join(parts)


def mac_of(text, prefix="0a:58"):
    """A locally administered MAC for an address: the prefix and its IPv4 bytes; of anything else, IPv6 above all, four bytes of a hash.

    A MAC that follows from the address keeps neighbours' caches right when the address goes to the next pod.
    """
    tail = ipaddress.IPv4Address(text).packed.hex() if is_address(text, ipaddress.IPv4Address) else short_hash(text)[:8]
    return ":".join([prefix, *(tail[i : i + 2] for i in range(0, 8, 2))])


def host_ifname(prefix, *attachment):
    """The name of a link on the host: two letters and 11 hex digits of (network, container ID, interface)."""
    return prefix + short_hash(*attachment)[-11:]


# ---------------------------------------------------------------------------------------------------------------------
# IPAM: built in, in host-local's schema, or delegated                             SPEC section 4, Plugin Delegation
# ---------------------------------------------------------------------------------------------------------------------
# An IPAM result is {"ips": [{"address": "10.0.0.5/24", "gateway": "10.0.0.1"}], "routes": [...], "dns": {...}}.


def parse_ipam(request):
    """{"type", "range_sets", "routes", "dns"} of the configuration's "ipam", and with ranges "leases"; all empty where there is none.
    type: the plugin that it delegates to. CNIError 7, or 5 for a resolvConf that cannot be read."""
    ipam = typed(request.conf, "ipam", dict, {})
    if not ipam or typed(ipam, "type", str, "") not in ("", "mncni", "mncni.py"):
        return {"type": delegate_type(request.conf), "range_sets": [], "routes": [], "dns": {}}
    sets = [parse_range_set(ranges) for ranges in range_sets_of(request, ipam)]
    by_runtime = request.command == "STATUS" and any_case(request.conf.get("capabilities"), "ipRanges") is True
    if not sets and not by_runtime:  # STATUS gets no runtimeConfig
        raise config_error('"ipam" has no "ranges"', 'for example "ranges": [[{"subnet": "10.88.0.0/24"}]]')
    refuse_overlaps([entry for ranges in sets for entry in ranges])
    return {
        "type": "",
        "range_sets": sets,
        "routes": [parse_route(route) for route in typed(ipam, "routes", list, [])],
        "dns": parse_resolv_conf(typed(ipam, "resolvConf", str, "")),
        "leases": ipam_leases(request),
    }


def ipam_leases(request):
    """The lease store. It depends on "dataDir" and the network's name alone, so that DEL finds it under a broken configuration too."""
    ipam = request.conf.get("ipam")
    data_dir = ipam.get("dataDir") if isinstance(ipam, dict) else None
    if data_dir is not None and (not isinstance(data_dir, str) or not os.path.isabs(data_dir) or "\0" in data_dir):
        raise config_error(f'"dataDir" must be an absolute path, not {to_json(data_dir)}')
    return Leases(data_dir or DEFAULT_DATA_DIR, request.network)


def range_sets_of(request, ipam):
    """The range sets as written: the runtime's, the single one of the older keys "subnet", "rangeStart", ..., then "ranges"."""
    older = {key: ipam[key] for key in ("subnet", "rangeStart", "rangeEnd", "gateway") if key in ipam}
    return runtime_config(request, "ipRanges", list, []) + ([[older]] if "subnet" in older else []) + typed(ipam, "ranges", list, [])


def parse_range_set(ranges):
    """One range set, one address of which an attachment gets: [{"subnet", "start", "end", "gateway"}], all of one family. CNIError 7."""
    if not isinstance(ranges, list) or not ranges or not all(isinstance(entry, dict) for entry in ranges):
        raise config_error('"ranges" must be an array of arrays of objects, as in [[{"subnet": "10.88.0.0/24"}]]')
    parsed = [parse_range(entry) for entry in ranges]
    if len({entry["subnet"].version for entry in parsed}) > 1:
        raise config_error('one set of "ranges" mixes IPv4 and IPv6; give each family a set of its own')
    return parsed


def parse_range(entry):
    """One range. start and end (int) default to all of the subnet but its first and last address, gateway to its first."""
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


ROUTE_WORDS = {"mtu": "mtu", "advmss": "advmss", "priority": "metric", "table": "table", "scope": "scope"}  # key of a result -> of `ip`


def parse_route(route):
    """A route of "ipam.routes" as a result has it: dst, and gw, mtu, advmss, priority, table, scope where given. CNIError 7."""
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
    """The "dns" object that a resolv.conf amounts to. CNIError 7 where the file is missing."""
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
    """The addresses asked for: an array, or from CNI_ARGS a list with commas. CNIError 7."""
    asked = requested(request, "ips", "IP") or []
    if isinstance(asked, str):
        asked = [ip for ip in asked.split(",") if ip]
    asked = typed({"ips": asked}, "ips", list, [])
    return [parse_address(ip, ipaddress.ip_interface, "a requested address").ip for ip in asked]


def ipam_add(request, ipam, run):
    """An IPAM result for this attachment, {} of no IPAM. CNIError 11 when every address is taken."""
    if ipam["type"]:
        return delegate_add(request, ipam["type"], run)
    if not ipam["range_sets"]:
        return {"ips": [], "routes": [], "dns": {}}
    leases, asked = ipam["leases"], requested_ips(request)
    with leases.lock:
        leases.release(request.container_id, request.ifname)  # of an ADD that died; a live attachment was refused before
        chosen = choose_addresses(leases, ipam["range_sets"], asked)
        leases.take([address for address, _ in chosen], request.container_id, request.ifname)
        for index, (address, _) in enumerate(chosen):
            leases.set_last(index, address)
    ips = [{"address": f"{address}/{entry['subnet'].prefixlen}", "gateway": str(entry["gateway"])} for address, entry in chosen]
    return {"ips": ips, "routes": ipam["routes"], "dns": ipam["dns"]}


def choose_addresses(leases, range_sets, asked):
    """[(address, its range)], one for each set: the requested address that lies in it, else the next free one. CNIError 7 or 11."""
    chosen, left = [], list(asked)
    for index, ranges in enumerate(range_sets):
        wanted = next((address for address in left if range_of(ranges, address)), None)
        if wanted is None:
            chosen.append(next_free(leases, ranges, index))
            continue
        left.remove(wanted)
        entry = range_of(ranges, wanted)
        if wanted == entry["gateway"]:
            raise config_error(f"the requested address {wanted} is the gateway of {entry['subnet']}")
        if leases.holder(wanted):
            raise CNIError(TRY_AGAIN, f"the requested address {wanted} is in use by container {leases.holder(wanted)[0]}")
        chosen.append((wanted, entry))
    if left:
        raise config_error(f"no range holds the requested address {left[0]}")
    return chosen


def range_of(ranges, address):
    """The range that an address lies in, or None."""
    same_family = [entry for entry in ranges if entry["subnet"].version == address.version]
    return next((entry for entry in same_family if entry["start"] <= int(address) <= entry["end"]), None)


def next_free(leases, ranges, set_index):
    """(address, its range): the first free address after the one given out last, round-robin. CNIError 11 when there is none.

    An address is looked at once a round, however many are taken: the cost of a lease does not grow with their number.
    """
    last = leases.last(set_index)
    begin = next((i for i, entry in enumerate(ranges) if entry["start"] <= last <= entry["end"]), None)
    if begin is None:
        begin, last = 0, ranges[0]["start"] - 1
    spans = [(ranges[begin], last + 1, ranges[begin]["end"])]
    spans += [(entry, entry["start"], entry["end"]) for entry in ranges[begin + 1 :] + ranges[:begin]]
    spans += [(ranges[begin], ranges[begin]["start"], last)]
    for entry, start, end in spans:
        for value in range(start, end + 1):
            address = entry["subnet"][value - int(entry["subnet"].network_address)]
            if address != entry["gateway"] and not leases.holder(address):
                return address, entry
    subnets = ", ".join(str(entry["subnet"]) for entry in ranges)
    raise CNIError(TRY_AGAIN, f'no address of network "{leases.network}" is free in {subnets}', f"the leases are files in {leases.dir}")


def ipam_del(request, run):
    """Give back the addresses. What the configuration says now may not be what it said at ADD: our own store is looked at in any case."""
    leases = ipam_leases(request)
    index_path = leases.index_path(request.container_id, request.ifname)
    if os.path.exists(index_path):
        with leases.lock:
            leases.release(request.container_id, request.ifname)
    else:
        remove_file(index_path)
    delegate_call(request, run, "DEL")


def ipam_check(request, ipam, run):
    """What is wrong with the leases, as a list of messages. A delegate's CHECK is passed on."""
    if not ipam["range_sets"]:
        delegate_call(request, run, "CHECK")
        return []
    held = ipam["leases"].addresses(request.container_id, request.ifname)
    own = [str(ipaddress.ip_interface(ip["address"]).ip) for ip in own_ips(request)]
    return [f"no lease of {address} in {ipam['leases'].dir}" for address in own if address not in held]


def ipam_gc(request, run):
    """Release what is held by none of the attachments that GC has to keep."""
    keep, leases = valid_attachments(request), ipam_leases(request)
    if keep is not None and os.path.isdir(leases.index_dir):
        with leases.lock:
            leases.release_all_but(keep)
    delegate_call(request, run, "GC")


def ipam_status(request, ipam, run):
    """CNIError 50 when no address is left."""
    delegate_call(request, run, "STATUS")
    try:
        for index, ranges in enumerate(ipam["range_sets"]):
            next_free(ipam["leases"], ranges, index)
    except CNIError as error:
        raise CNIError(NOT_AVAILABLE, error.msg, error.details) from None


def delegate_type(conf):
    """The plugin that "ipam" delegates to, "" where it is our own or there is none."""
    ipam = conf.get("ipam")
    kind = ipam.get("type") if isinstance(ipam, dict) else None
    return kind if isinstance(kind, str) and kind not in ("mncni", "mncni.py") else ""


def delegate_call(request, run, verb):
    """Call the IPAM plugin of the configuration, if it names one, with our own environment and configuration. Its stdout.

    Its error is our error: CNIError with its code. CNIError 4 if it is nowhere on CNI_PATH. SPEC section 4. The verb is not always
    the request's own: a failed ADD ends with a DEL.
    """
    kind = delegate_type(request.conf)
    if not kind:
        return ""
    if "/" in kind:
        raise config_error(f'"type" of "ipam" must be the name of a program, not {kind!r}')
    found = [os.path.join(part, kind) for part in request.path if os.path.isfile(os.path.join(part, kind))]
    if not found:
        raise CNIError(BAD_ENVIRONMENT, f'cannot find the IPAM plugin "{kind}" in CNI_PATH {":".join(request.path)!r}')
    reply = run(Command([found[0]], to_json({**request.conf, "cniVersion": request.version}), {"CNI_COMMAND": verb}))
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
    """The delegate's ADD as an IPAM result. When it fails, whoever called undoes it with a DEL, as SPEC section 4 asks."""
    result = parse_json_object(delegate_call(request, run, "ADD"), f"the result of the IPAM plugin {kind}")
    result = parse_prev_result({"prevResult": {"ips": [], **result}})
    if not result["ips"]:
        raise CNIError(COMMAND_FAILED, f"the IPAM plugin {kind} returned no address")
    routes = [parse_route(route) for route in result.get("routes") or []]
    ips = [{key: ip[key] for key in ("address", "gateway") if ip.get(key)} for ip in result["ips"]]
    return {"ips": ips, "routes": routes, "dns": result.get("dns") or {}}


def own_links(request):
    """{index in prevResult's interfaces: CNI_IFNAME in the container}."""
    links = enumerate(request.prev_result.get("interfaces") or [])
    return {index: link for index, link in links if link.get("name") == request.ifname and link.get("sandbox")}


def own_ips(request):
    """The addresses that prevResult gives to CNI_IFNAME in the container."""
    return [ip for ip in request.prev_result["ips"] if ip.get("interface") in own_links(request)]


def host_links(request):
    """The names of prevResult's interfaces on the host, in its order."""
    links = request.prev_result.get("interfaces") or []
    return [link["name"] for link in links if not link.get("sandbox") and is_ifname(link.get("name"))]


# ---------------------------------------------------------------------------------------------------------------------
# naivewg: a bridge, a veth pair, addresses, routes
# ---------------------------------------------------------------------------------------------------------------------
#
#     pod                       host
#     eth0 10.244.1.5/24 ------ mn0123456789a ---- mncni0 10.244.1.1/24 ---- what the host routes
#     default via 10.244.1.1        hairpin          the pods' gateway


def parse_naivewg(request):
    """The configuration of naivewg, every key of the README's table validated. CNIError 7."""
    conf = request.conf
    parsed = {
        "bridge": typed(conf, "bridge", str, "mncni0"),
        "cluster_cidrs": [parse_address(cidr, ipaddress.ip_network, '"clusterCIDRs"') for cidr in typed(conf, "clusterCIDRs", list, [])],
        "ready": typed(conf, "ready", str, ""),
        "dns": typed(conf, "dns", dict, {}),
        "mac": requested_mac(request),
        "ipam": parse_ipam(request),
    }
    switches = {"hairpinMode": True, "isDefaultGateway": True, "forceAddress": False, "adoptBridge": False, "ipMasq": False}
    parsed.update({key: typed(conf, key, bool, default) for key, default in switches.items()})
    if not is_ifname(parsed["bridge"]):
        raise config_error(f'"bridge" {parsed["bridge"]!r} cannot name an interface')
    parsed["ranges"] = [entry for ranges in parsed["ipam"]["range_sets"] for entry in ranges]
    smallest = 1280 if any(entry["subnet"].version == 6 for entry in parsed["ranges"]) else 68
    parsed["mtu"] = number(conf, "mtu", 0, smallest, 65534) if conf.get("mtu") else 0  # plan_bridge needs room for one more
    requested_ips(request)  # judged before anything is changed
    return parsed


def requested_mac(request):
    """The MAC asked for, "" if none. CNIError 7."""
    mac = requested(request, "mac", "MAC")
    return parse_mac(mac, 'the requested "mac"') if mac else ""


def require_ready(conf, absent, broken):
    """The agent's word that the node's network stands. CNIError `absent` if this boot has none yet, `broken` if it stood and fell.

    It starts no process: a runtime asks every few seconds.
    """
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


def own_veth(request):
    return host_ifname("mn", request.network, request.container_id, request.ifname)


def link_alias(request):
    """What `ip link` shows on the links of an attachment: whose they are. GC tells by it what is of its network. 255 bytes at most."""
    rest = 255 - len(f"{OWNER_ALIAS}:{request.network}::{request.ifname}".encode())
    return f"{OWNER_ALIAS}:{request.network}:{request.container_id[:rest]}:{request.ifname}"


def look_host(request, bridge, run):
    """(the bridge with its addresses, our veth), None for what is not there."""
    links = look_ip([f"address show dev {bridge}", f"address show dev {own_veth(request)}"], run)
    return look_link(bridge, links), look_link(own_veth(request), links)


def is_own(link):
    """Whether a link is ours, by its alias."""
    return link.get("ifalias") == OWNER_ALIAS or is_half_made(link)


def is_half_made(link):
    """Whether a link is ours, but who made it was killed before it had its alias: it is down, and has a MAC as mac_of makes them."""
    return "ifalias" not in link and "UP" not in link["flags"] and link.get("address", "")[:6] in ("0a:58:", "0a:59:")


def refuse_foreign_bridge(conf, bridge):
    """CNIError 7 unless the bridge is absent, ours, or to be adopted."""
    if bridge is None:
        return
    name = conf["bridge"]
    if bridge.get("linkinfo", {}).get("info_kind") != "bridge":
        raise config_error(f'cannot use bridge "{name}": it is not a bridge; set "bridge" to another name')
    if not is_own(bridge) and not conf["adoptBridge"]:
        raise config_error(f'cannot use bridge "{name}": MNCNI did not make it; set "adoptBridge": true, or "bridge" to another name')


def look_pod(request, run):
    """CNI_IFNAME in the pod, None if there is none."""
    return look_link(request.ifname, look_ip([f"link show dev {request.ifname}"], run, request.netns))


def plan_gateways(conf, ips):
    """The addresses that the bridge has to carry, like "10.244.1.1/24"; none if it is not the pods' gateway."""
    if not conf["isDefaultGateway"]:
        return []
    return sorted({f"{ip['gateway']}/{ip['address'].partition('/')[2]}" for ip in ips if ip.get("gateway")})


def plan_bridge(conf, bridge, gateways):
    """Lines for `ip -batch` that make the bridge what it has to be, none if it is. CNIError 7 if it has another gateway address.

    The MAC is set when the bridge is made. A bridge takes the smallest MTU of its ports until somebody changes its MTU, and setting
    the value that it has is no change: so it is made with mtu + 1, then set to mtu (net/bridge/br_device.c, br_change_mtu).
    """
    name, mtu, lines, own = conf["bridge"], conf["mtu"], [], bridge is None or is_own(bridge)
    if bridge is None:
        mac = mac_of(gateways[0].partition("/")[0] if gateways else name)
        lines.append(f"link add name {name} {f'mtu {mtu + 1} ' if mtu else ''}address {mac} type bridge")
        bridge = {}
    if own and "ifalias" not in bridge:
        lines.append(f"link set dev {name} alias {OWNER_ALIAS}")
    if own and mtu and bridge.get("mtu") != mtu:
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
    """Whether a bridge with one address cannot have the other. IPv6 links have several by nature: only one that overlaps is in the way."""
    other, gateway = ipaddress.ip_interface(other), ipaddress.ip_interface(gateway)
    return other.version == gateway.version and (other.version == 4 or other.network.overlaps(gateway.network))


def ensure_bridge(request, conf, bridge, gateways, run):
    """Make the bridge what it has to be. Returns its MAC. Looks again under a lock when there is something to do: ADDs run side by side."""
    if not plan_bridge(conf, bridge, gateways) and not plan_no_advertisements(conf["bridge"], bridge):
        return bridge.get("address", "")
    with bridge_lock(request) as lock:
        bridge, _ = look_host(request, conf["bridge"], run)
        refuse_foreign_bridge(conf, bridge)
        lines = plan_bridge(conf, bridge, gateways)
        plan = plan_forwarding(gateways, look_forwarding(run)) + ([ip_batch(lines)] if lines else [])
        apply(plan + plan_no_advertisements(conf["bridge"], bridge), lock.held(run))
        bridge, _ = look_host(request, conf["bridge"], run)
        return (bridge or {}).get("address", "")


def bridge_lock(request):
    return Locked(os.path.join(request.run_dir, "bridge.lock"))


def families_of(addresses):
    """The families of addresses in text as `ip netconf` calls them."""
    return {"inet6" if ":" in address else "inet" for address in addresses}


def plan_no_advertisements(name, bridge):
    """Commands for a bridge, None for one that is yet to be made: a pod that sends a router advertisement must not become the host's
    default route (CVE-2020-10749), and its link-local address, from which older kernels look for pods, is of use at once."""
    keys = [f"net/ipv6/conf/{name}/{key}" for key in ("accept_ra", "accept_dad")]
    keys = keys if bridge is None else [key for key in keys if read_file(f"/proc/sys/{key}") not in ("0\n", None)]
    return [write_sysctls(keys, 0)] if keys and os.path.exists("/proc/sys/net/ipv6") else []


def look_forwarding(run):
    """The families ("inet", "inet6") that the host forwards."""
    entries = [entry for entry in look_ip(["netconf show"], run) if entry.get("interface") == "all"]
    return {entry["family"] for entry in entries if entry.get("forwarding") and "family" in entry}


def plan_forwarding(gateways, forwarded):
    """Commands that let the host route for the pods. Only what is off is written: /proc/sys may be read-only and right."""
    keys = {"inet": "net/ipv4/ip_forward", "inet6": "net/ipv6/conf/all/forwarding"}
    return [write_sysctls([keys[family]], 1) for family in sorted(families_of(gateways) - forwarded)]


def plan_routes(conf, ipam):
    """The pod's routes as a result lists them: IPAM's own, those without a gateway through ours, then a default route per family."""
    gateways = {family_of(ip["address"]): ip["gateway"] for ip in reversed(ipam["ips"]) if ip.get("gateway")}
    routes = []
    for route in ipam["routes"]:
        gateway = route.get("gw") or gateways.get(family_of(route["dst"]))
        routes.append({**route, "gw": gateway} if gateway else route)
    if conf["isDefaultGateway"]:
        for _, gateway in sorted(gateways.items()):
            if not any(route["dst"] == default_route(gateway) and "table" not in route for route in routes):
                routes.append({"dst": default_route(gateway), "gw": gateway})
    return [route for index, route in enumerate(routes) if route not in routes[:index]]


def plan_attach(request, conf, ipam, mac):
    """Commands that make the veth pair, the pod's end straight in the pod, and give the pod its addresses and routes.

    Both ends are made with their MACs: set later, they race with udev's MACAddressPolicy.
    """
    veth, ifname, mtu = own_veth(request), request.ifname, f"mtu {conf['mtu']} " if conf["mtu"] else ""
    host = [
        f"link add name {veth} {mtu}address {mac_of(veth, '0a:59')} type veth peer name {ifname} netns {request.netns} {mtu}address {mac}",
        f"link set dev {veth} alias {link_alias(request)} master {conf['bridge']} up",
    ]
    if conf["hairpinMode"]:
        host.append(f"link set dev {veth} type bridge_slave hairpin on")
    pod = [f"address add {ip['address']} dev {ifname} {'nodad' if ':' in ip['address'] else 'brd +'}" for ip in ipam["ips"]]
    pod.append(f"link set dev {ifname} up")
    pod += [route_line(route, ifname) for route in plan_routes(conf, ipam)]
    plan = [ip_batch(host)]
    if any(":" in ip["address"] for ip in ipam["ips"]):  # runtimes may have IPv6 off; no router but ours, no wait for DAD
        keys = [f"net/ipv6/conf/{ifname}/{key}" for key in ("disable_ipv6", "accept_ra", "accept_dad")]
        keys.append("net/ipv6/conf/lo/disable_ipv6")  # what a pod sends to its own address comes in through lo
        plan.append(write_sysctls(keys, 0, request.netns))
    return [*plan, ip_batch(pod, request.netns)]


def route_line(route, ifname):
    """A route of a result as a line for `ip -batch`. prepend: another attachment's route to the same place stays behind it."""
    words = ["route", "prepend", route["dst"]] + (["via", route["gw"]] if "gw" in route else []) + ["dev", ifname]
    for key, word in ROUTE_WORDS.items():
        words += [word, str(route[key])] if key in route else []
    return " ".join(words)


def look_masq(request, conf, run):
    """The stamp of the masquerade rules as they stand, "" if they are not whole. To look is cheaper than a transaction."""

    def parse(items):
        return [item["rule"].get("comment", "").rpartition(" ")[2] for item in items if "rule" in item]

    stamps = look_nft(["chain", "inet", "mncni_masq", f"net_{short_hash(request.network)}"], parse, run) if conf["ipMasq"] else []
    return stamps[0] if len(stamps) == 2 and stamps[0] == stamps[1] else ""


def plan_masq(network, conf, ips, present=""):
    """Commands, none if the rules with the stamp `present` are these: one nft transaction by which traffic from the network's subnets
    to anything but them, the clusterCIDRs and multicast leaves with the host's address. One static rule a family, whatever the pods:
    nothing to take back per pod, so nothing to leak."""
    key = short_hash(network)
    chain = f"net_{key}"
    subnets = [entry["subnet"] for entry in conf["ranges"]]
    subnets += [ipaddress.ip_interface(ip["address"]).network for ip in ips]
    lines = [
        "add table inet mncni_masq",
        f"add chain inet mncni_masq {chain} {{ type nat hook postrouting priority srcnat; policy accept; }}",
        f"flush chain inet mncni_masq {chain}",
    ]
    for version, protocol, kind, multicast in ((4, "ip", "ipv4_addr", "224.0.0.0/4"), (6, "ip6", "ipv6_addr", "ff00::/8")):
        name = f"pods{version}_{key}"
        own = ipaddress.collapse_addresses(subnet for subnet in subnets if subnet.version == version)
        cluster = [cidr for cidr in conf["cluster_cidrs"] if cidr.version == version]
        spared = ipaddress.collapse_addresses([*cluster, ipaddress.ip_network(multicast)])
        lines.append(f"add set inet mncni_masq {name} {{ type {kind}; flags interval; auto-merge; }}")
        lines += [f"add element inet mncni_masq {name} {{ {subnet} }}" for subnet in own]
        match = f"{protocol} saddr @{name} {protocol} daddr != @{name} {protocol} daddr != {{ {', '.join(map(str, spared))} }}"
        lines.append(f'add rule inet mncni_masq {chain} {match} masquerade comment "{network[:80]} STAMP"')
    stamp = short_hash(*lines)
    return [] if stamp == present else [Command(["nft", "-f", "-"], "\n".join(lines).replace("STAMP", stamp) + "\n")]


def naivewg_result(request, conf, ipam, bridge_mac, mac):
    """The attachment as a 1.1.0 result: bridge, host's end, pod's end, in that order, as the reference bridge plugin has it."""
    veth, mtu = own_veth(request), {"mtu": conf["mtu"]} if conf["mtu"] else {}
    return {
        "cniVersion": NEWEST,
        "interfaces": [
            {"name": conf["bridge"], "mac": bridge_mac, **mtu},
            {"name": veth, "mac": mac_of(veth, "0a:59"), **mtu},
            {"name": request.ifname, "mac": mac, **mtu, "sandbox": request.netns},
        ],
        "ips": [{**ip, "interface": 2} for ip in ipam["ips"]],
        "routes": plan_routes(conf, ipam),
        "dns": conf["dns"] or ipam["dns"],
    }


def attachment_lock(request):
    """One ADD or DEL of an attachment at a time: a runtime that gave up on one starts the next while a command of the first still runs."""
    bucket = short_hash(request.network, request.container_id, request.ifname)[-3:]
    return Locked(os.path.join(request.run_dir, "attachments", bucket))


def naivewg_add(request, run):
    """ADD: join the pod to the bridge. Returns a 1.1.0 result. Its undo is detach."""
    conf = parse_naivewg(request)
    require_ready(conf, TRY_AGAIN, TRY_AGAIN)
    with attachment_lock(request) as lock:
        return attach(request, conf, lock.held(run))


def attach(request, conf, run):
    """naivewg_add under the attachment's lock."""
    looks = [(look_host, (request, conf["bridge"], run)), (look_masq, (request, conf, run))]
    (bridge, veth), masq_stamp = all_of(looks, request.at_once)
    if bridge and "ifalias" not in bridge:  # another ADD may be making it: the kernel takes the alias only after the link
        with bridge_lock(request):
            bridge, veth = look_host(request, conf["bridge"], run)
    refuse_foreign_bridge(conf, bridge)
    if veth is not None:
        raise CNIError(BAD_ENVIRONMENT, f"{request.ifname} of container {request.container_id} is attached already: {veth['ifname']}")
    try:
        ipam = with_gateways(conf, ipam_add(request, conf["ipam"], run))
        first = ipam["ips"][0]["address"].partition("/")[0] if ipam["ips"] else link_alias(request)
        mac = conf["mac"] or mac_of(first)
        bridge_mac = ensure_bridge(request, conf, bridge, plan_gateways(conf, ipam["ips"]), run)
        masq = plan_masq(request.network, conf, ipam["ips"], masq_stamp) if conf["ipMasq"] and ipam["ips"] else []
        apply(masq + plan_attach(request, conf, ipam, mac), run)
        request.new_peer = {"ifname": own_veth(request), "mtu": conf["mtu"] or 1500}
        return merge_results(request.prev_result, naivewg_result(request, conf, ipam, bridge_mac, mac))
    except Exception as error:
        best_effort(detach, request, run)
        # Not looked at before: the kernel refuses a name that is taken, and each look is two programs more per pod.
        if getattr(error, "code", 0) == COMMAND_FAILED and look_pod(request, run) is not None:
            raise CNIError(BAD_ENVIRONMENT, f'CNI_IFNAME "{request.ifname}" exists already in {request.netns}') from None
        raise


def with_gateways(conf, ipam):
    """An IPAM result in which each address has a gateway, if the bridge is to be one: where IPAM names none, the first of its subnet."""
    if not conf["isDefaultGateway"]:
        return ipam
    ips = [(ip, ipaddress.ip_interface(ip["address"]).network) for ip in ipam["ips"]]
    return {**ipam, "ips": [ip if ip.get("gateway") or net.num_addresses < 3 else {**ip, "gateway": str(net[1])} for ip, net in ips]}


def naivewg_del(request, run):
    """DEL: the link goes before the lease, so that no address is given out again while it is still in use. Needs neither the
    namespace nor prevResult: both ends of a veth go together."""
    with attachment_lock(request) as lock:
        detach(request, lock.held(run))


def detach(request, run):
    """naivewg_del under the attachment's lock."""
    delete_links(request.links, run)
    ipam_del(request, run)


def delete_links(names, run):
    """Delete links of the host. Gone already is fine. Several go as a group: for each deletion the kernel waits 10 to 30 ms."""
    lines = [*(f"link set dev {name} group {DOOMED}" for name in names), f"link delete group {DOOMED}"]
    one = Command(["ip", "link", "delete", "dev", *names])
    ask(one if len(names) == 1 else Command(["ip", "-force", "-batch", "-"], guarded(lines)), run)


def naivewg_check(request, run):
    """CHECK: everything that ADD made is as prevResult has it. CNIError 100 whose details list all that is not."""
    conf, ips = parse_naivewg(request), own_ips(request)
    bridge, veth = look_host(request, conf["bridge"], run)
    gateways = plan_gateways(conf, with_gateways(conf, {"ips": ips})["ips"])
    problems = diff_link(f"bridge {conf['bridge']}", bridge, gateways)
    if gateways:
        problems += [f"the host does not forward {family}" for family in sorted(families_of(gateways) - look_forwarding(run))]
    problems += diff_link(f"link {own_veth(request)} on the host", veth)
    if veth and veth.get("master") != conf["bridge"]:
        problems.append(f"link {own_veth(request)} is no port of bridge {conf['bridge']}")
    problems += check_pod(request, ips, run)
    problems += ipam_check(request, conf["ipam"], run)
    if conf["ipMasq"] and ips and not look_masq(request, conf, run):
        problems.append("the masquerade rules in nft table inet mncni_masq are not whole")
    report(request, problems)


def diff_link(what, link, addresses=()):
    """What is wrong with a link that has to be up and to have these addresses, as a list of messages."""
    if link is None:
        return [f"{what} is gone"]
    problems = [] if "UP" in link["flags"] else [f"{what} is down"]
    return problems + [f"{what} lacks the address {address}" for address in addresses if address not in addresses_of(link)]


def check_pod(request, ips, run):
    """What is wrong in the pod, as a list of messages. prevResult is the measure: a later plugin may have changed the MAC."""
    what, links = f"{request.ifname} in the pod", look_ip([f"address show dev {request.ifname}"], run, request.netns)
    pod = look_link(request.ifname, links)
    problems = diff_link(what, pod, [str(ipaddress.ip_interface(ip["address"])) for ip in ips])
    macs = [str(link["mac"]).lower() for link in own_links(request).values() if link.get("mac")]
    if pod and macs and pod.get("address") not in macs:
        problems.append(f"{what} has the MAC {pod.get('address')}, not {macs[0]}")
    routes = [route for route in request.prev_result.get("routes") or [] if is_address(route.get("dst"), ipaddress.ip_network)]
    families = sorted({family_of(route["dst"]) for route in routes})
    present = [route for family in families for route in look_ip(["route show table all"], run, request.netns, family)]
    return problems + [f"no route to {route['dst']} in the pod" for route in routes if not any(is_route(route, other) for other in present)]


def is_route(route, present):
    """Whether a route of `ip -json` is the given one of a result. Only what the result names is compared."""
    dst = default_route(route["dst"]) if present.get("dst", "default") == "default" else present["dst"]
    same = ipaddress.ip_network(dst, strict=False) == ipaddress.ip_network(route["dst"], strict=False)
    gateways = [hop.get("gateway") for hop in present.get("nexthops") or [present]]
    same = same and (not route.get("gw") or str(parse_address(route["gw"], ipaddress.ip_address, '"gw" of a route')) in gateways)
    same = same and (not route.get("priority") or present.get("metric", 0) == route["priority"])
    table = {"main": 254, "default": 253, "local": 255}.get(present.get("table", "main"), present.get("table"))
    return same and ("table" not in route or str(table) == str(route["table"] or 254))


def naivewg_gc(request, run):
    """GC: remove the veths and leases of this network that are not in the runtime's list."""
    all_of([(delete_stale_links, (request, "veth", "mn", run)), (ipam_gc, (request, run))])


def delete_stale_links(request, kind, prefix, run):
    """Delete the links of a kind that are of this network, by their alias, and belong to no attachment that GC has to keep; and those
    of which nothing will ever tell whose they are."""
    keep, own = valid_attachments(request), [OWNER_ALIAS, request.network]
    if keep is None:
        return
    valid, stale = {host_ifname(prefix, request.network, *pair) for pair in keep}, []
    for link in [link for link in look_ip([f"link show type {kind}"], run) if "ifname" in link]:
        name = link["ifname"]
        lost = is_half_made(link) and name[:2] == prefix and HEX.issuperset(name[2:])
        if name not in valid and (lost or link.get("ifalias", "").split(":")[:2] == own):
            stale.append(name)
    if stale:
        delete_links(stale, run)


def naivewg_status(request, run):
    """STATUS: 50 if an ADD would fail, 51 if the pods that there are suffer too. Starts no process."""
    conf = parse_naivewg(request)
    require_ready(conf, NOT_AVAILABLE, LIMITED_CONNECTIVITY)
    ipam_status(request, conf["ipam"], run)


# ---------------------------------------------------------------------------------------------------------------------
# portmap: host ports                                                             nft(8); CONVENTIONS, portMappings
# ---------------------------------------------------------------------------------------------------------------------
#
# <run_dir>/portmap/KEY is what an attachment asked for, and the nft table is what follows from these files: a newer pod takes a port
# over, and an older one that still runs gets it back. <run_dir>/portmap/claims/CLAIM/KEY is empty, and leads to those that claim the
# port, device or subnet. So an ADD or DEL looks only at those it shares something with, and changes only that in the table. The
# table and all claims are written whole, as the files say, where nft refuses, because somebody flushed it, and after a change that did not
# come to its end: it leaves the file "changing". An attachment's file is there before all that follows from it, and goes last.
#
# Only what is for an address of the host is translated; the connection is labelled then (109, one bit of 128). Two kinds get an
# address of the host's as well, or their answers would bypass it: from the pod's own subnet, the pod itself included, and from
# 127.0.0.1. For the latter the pods' device has to accept 127.0.0.1 (route_localnet), and the guard drops what pods send from or to it.

PORTMAP_TABLE = """\
table inet mncni_portmap {
  map given4 { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }
  map any4 { type inet_proto . inet_service : ipv4_addr . inet_service; }
  map given6 { type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service; }
  map any6 { type inet_proto . inet_service : ipv6_addr . inet_service; }
  set podlinks { type ifname; }
  chain ports {
    dnat ip to ip daddr . meta l4proto . th dport map @given4
    dnat ip to meta l4proto . th dport map @any4
    dnat ip6 to ip6 daddr . meta l4proto . th dport map @given6
    dnat ip6 to meta l4proto . th dport map @any6
  }
  chain prerouting { type nat hook prerouting priority -100; fib daddr type local ct label set 109 jump ports; }
  chain output { type nat hook output priority -100; fib daddr type local ct label set 109 jump ports; }
  chain postrouting { type nat hook postrouting priority 100; ct status dnat ip saddr 127.0.0.0/8 oifname @podlinks masquerade; }
  chain guard {
    type filter hook prerouting priority -300;
    iifname @podlinks ip saddr 127.0.0.0/8 drop
    iifname @podlinks ip daddr 127.0.0.0/8 drop
  }
}
"""
PORTMAP_RULES = 9  # of the table above; one for each subnet comes on top
PROTOCOLS = {"6": "tcp", "17": "udp", "132": "sctp"}  # nft shows the number where there is no /etc/protocols


def parse_mapping(mapping):
    """One of "portMappings" as (protocol, host address or None, host port, container port). CNIError 7."""
    if not isinstance(mapping, dict):
        raise config_error('"portMappings" must hold objects like {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}')
    mapping = {key: any_case(mapping, key) for key in ("protocol", "hostIP", "hostPort", "containerPort")}
    ports = [number(mapping, key, 0, 1, 65535) for key in ("hostPort", "containerPort")]
    protocol = (typed(mapping, "protocol", str, "") or "tcp").lower()
    if protocol not in PROTOCOLS.values():
        raise config_error(f'"protocol" of host port {ports[0]} must be one of {", ".join(PROTOCOLS.values())}, not {protocol!r}')
    host_ip = typed(mapping, "hostIP", str, "")
    if not host_ip:
        return protocol, None, *ports
    address = parse_address(host_ip, ipaddress.ip_address, f'"hostIP" of host port {ports[0]}')
    address = getattr(address, "ipv4_mapped", None) or address  # ::ffff:192.0.2.1 is IPv4 in packets
    if str(address) == "::1":
        raise config_error(f'"hostIP" of host port {ports[0]} cannot be ::1: the kernel routes nothing from there; 127.0.0.1 works')
    return protocol, address, *ports


def plan_claims(mappings, ips, device):
    """What an attachment claims: {"MAP KEY": VALUE} in nft's words, each mapping leading to the pod's first address of each family it is
    for; {"subnet 10.88.0.0/24": ""} of these; {"podlinks mncni0": ""}. {} without mappings. CNIError 7.

    Two maps a family, for a given host address and for any: one map of intervals cannot hold both.
    """
    if mappings and not ips:
        raise config_error("portmap: the pod has no address for a host port to lead to")
    addresses, claims = [parse_address(ip["address"], ipaddress.ip_interface, "the pod's address") for ip in ips], {}
    parsed = [parse_mapping(mapping) for mapping in mappings]
    for own in {address.version: address for address in reversed(addresses)}.values():
        for protocol, host_ip, host_port, container_port in parsed:
            if host_ip and host_ip.version != own.version:
                continue
            key = f"given{own.version} {host_ip} . " if host_ip and not host_ip.is_unspecified else f"any{own.version} "
            key, value = f"{key}{protocol} . {host_port}", f"{own.ip} . {container_port}"
            if claims.setdefault(key, value) != value:
                raise config_error(f'"portMappings" leads host port {host_port}/{protocol} to two container ports')
            claims[f"subnet {own.network}"] = ""
    return {**claims, f"podlinks {device}": ""} if claims and device else claims


def parse_state(text):
    """A state with its "claims", see look_ports. CNIError, ValueError, TypeError, LookupError for other texts: what it says goes to nft."""
    state = parse_json_object(text)
    network, container_id, ifname = typed(state, "owner", list, [])
    well_formed = is_identifier(network) and is_identifier(container_id) and is_ifname(ifname)
    device = typed(state, "device", str, "")
    if not well_formed or not is_ifname(device or "none") or type(state["since"]) is not int:
        raise ValueError
    return {**state, "claims": plan_claims(state["mappings"], state["ips"], device)}


def read_ports(path):
    """The state in a file, None if there is none."""
    text = read_state(path)
    try:
        return None if text is None else parse_state(text)
    except (CNIError, ValueError, TypeError, LookupError):
        tell(f"{path} is none of portmap's states: left out")
        return None


def look_ports(run_dir):
    """What attachments asked for: {path: {"owner": [network, container ID, ifname], "since": nanoseconds, "device", "mappings" and
    "ips" as the runtime gave them, "claims": what plan_claims makes of them}}. Files that are no states are left out."""
    directory = os.path.join(run_dir, "portmap")
    names = os.listdir(directory) if os.path.isdir(directory) else []
    states = {path: read_ports(path) for path in [os.path.join(directory, name) for name in sorted(names) if len(name) == 16]}
    return {path: state for path, state in states.items() if state}


def look_claimants(run_dir, claims, path):
    """Of the states in other files than path, as look_ports has them, those that matter to the claims: of a port all that claim it,
    of a device or subnet one."""
    found = {}
    for claim in claims:
        try:
            entries = os.scandir(claim_dir(run_dir, claim))
        except OSError:
            continue
        with entries:
            for other in (os.path.join(run_dir, "portmap", entry.name) for entry in entries):
                state = found.get(other) or (read_ports(other) if other != path else None)
                if state and claim in state["claims"]:
                    found[other] = state
                    if not is_port(claim):
                        break
    return found


def claims_dir(run_dir):
    return os.path.join(run_dir, "portmap", "claims")


def claim_dir(run_dir, claim):
    return os.path.join(claims_dir(run_dir), claim.replace(" . ", ",").replace(" ", ",").replace("/", "_"))


def note_claims(run_dir, path, claims):
    """Have whoever claims the same find the state at path."""
    for directory in [claim_dir(run_dir, claim) for claim in claims]:
        os.makedirs(directory, exist_ok=True)
        touch(os.path.join(directory, os.path.basename(path)))


def drop_claims(run_dir, path, claims):
    """Take that back. A directory goes with its last file."""
    for directory in [claim_dir(run_dir, claim) for claim in claims]:
        remove_file(os.path.join(directory, os.path.basename(path)))
        remove_empty(directory)
    remove_empty(claims_dir(run_dir))


def write_claims(run_dir, states):
    """Make the claims those of the states, and no others."""
    top = claims_dir(run_dir)
    if os.path.islink(top) or not os.path.isdir(top):
        remove_file(top)
    for directory, _, names in os.walk(top, topdown=False):
        for name in names:
            os.unlink(os.path.join(directory, name))
        remove_empty(directory)
    for path, state in states.items():
        note_claims(run_dir, path, state["claims"])


def touch(path):
    """Make an empty file, if it is not there."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644))


def remove_empty(directory):
    try:
        os.rmdir(directory)
    except OSError:
        return  # there are others in it, or it is gone


def ports_lock(run_dir):
    return Locked(os.path.join(run_dir, "portmap", "lock"))


def is_port(claim):
    """Whether a claim is one of a host port, of which one has it. Devices and subnets are shared."""
    return claim.startswith(("any", "given"))


def winners(states):
    """{claim: the state that has it}: of two that claim one port the newer."""
    found = {}
    for state in sorted(states.values(), key=lambda state: state["since"]):
        found.update(dict.fromkeys(state["claims"], state))
    return found


def plan_claim(claim, state):
    """The line for nft that a claim of a state stands for."""
    kind, _, value = claim.partition(" ")
    if kind == "subnet":
        ip = "ip6" if ":" in value else "ip"
        return f"add rule inet mncni_portmap postrouting ct status dnat ct label 109 {ip} saddr {value} {ip} daddr {value} masquerade"
    if kind == "podlinks":
        return f'add element inet mncni_portmap podlinks {{ "{value}" }}'
    network, container_id, ifname = state["owner"]
    owner = f"{network[:30]}:{container_id[:64]}:{ifname}"  # a comment has 128 bytes
    return f'add element inet mncni_portmap {kind} {{ {value} comment "{owner}" : {state["claims"][claim]} }}'


def plan_portmap(claims, head="table inet mncni_portmap\ndelete table inet mncni_portmap"):
    """A command that makes the table what {claim: state} says, in one transaction; there is none without them."""
    lines = [plan_claim(claim, state) for claim, state in sorted(claims.items(), key=lambda item: (is_port(item[0]), item[0]))]
    return Command(["nft", "-f", "-"], "\n".join([head, *([PORTMAP_TABLE.rstrip()] if claims else []), *lines]) + "\n")


def plan_port_change(before, after):
    """A command that changes the table from one {claim: state} to another, None where a rule has to go: it has no name to delete it by.
    It fails if an element is not as it was."""
    lines = []
    for claim in sorted({**before, **after}):
        kind, _, key = claim.partition(" ")
        if kind == "subnet" and claim not in after:
            return None
        if claim in before and (is_port(claim) or claim not in after):
            key = key if is_port(claim) else f'"{key}"'
            lines.append(f"delete element inet mncni_portmap {kind} {{ {key} }}")
        if claim in after and (kind != "subnet" or claim not in before):
            lines.append(plan_claim(claim, after[claim]))
    return Command(["nft", "-f", "-"], "\n".join(lines) + "\n")


def change_ports(run_dir, path, state, run):
    """Take up the state that an attachment keeps at path, None to drop it, and make the table what follows."""
    with ports_lock(run_dir) as lock:
        run, mark, mine = lock.held(run), mark_of_change(run_dir), read_ports(path)
        wanted = state["claims"] if state else {}
        claims = {**(mine["claims"] if mine else {}), **wanted}  # none: our own file is torn
        is_known = bool(claims) and not (mine and state) and os.path.isdir(claims_dir(run_dir)) and not os.path.exists(mark)
        others = look_claimants(run_dir, claims, path) if is_known else without(look_ports(run_dir), path)
        had, has = ({**others, path: one} if one else others for one in (mine, state))
        before, after = ({claim: one for claim, one in winners(states).items() if claim in claims or not is_known} for states in (had, has))
        switch_localnet(devices_of(before) - devices_of(after), 0, run)  # before the guard goes
        if mine:
            touch(mark)
        if state:
            write_file(path, to_json(without(state, "claims")))  # a new one before the mark: by it DEL knows that there is something to do
        touch(mark)
        note_claims(run_dir, path, wanted)
        command = plan_port_change(before, after) if is_known else None
        if state and not before and not is_known:  # the first: there is nothing to delete, which would take 10 to 15 ms
            command = plan_portmap(after, "create table inet mncni_portmap")
        changed = [claim for claim in {**before, **after} if not is_known or leads_to(claim, before) != leads_to(claim, after)]
        apply_ports(run_dir, after, changed, run, command, [] if state else [path])
        drop_claims(run_dir, path, [claim for claim in claims if claim not in wanted])
        remove_file(mark)
        if state is None:
            remove_file(path)


def mark_of_change(run_dir):
    return os.path.join(run_dir, "portmap", "changing")


def apply_ports(run_dir, after, changed, run, command=None, gone=()):
    """Make the table what `after`, {claim: state}, says: by a command, or where that is none or fails, whole, of all states but those
    gone, and the claims with it. changed: the claims that lead elsewhere now: UDP flows have to find their new way, for conntrack
    remembers the old one."""
    if command is None or run(command).exit_code:
        states = without(look_ports(run_dir), *gone)
        after = winners(states)
        write_claims(run_dir, states)
        apply([plan_portmap(after)], run)
    switch_localnet(devices_of(after), 1, run)
    udp = [claim.partition(" ")[2] for claim in changed if is_port(claim) and "udp . " in claim]
    if udp:
        flows = sorted({key.replace("udp . ", "").replace(" . ", "/") for key in udp})
        best_effort(run, Command(["mncni.py", "forget-flows", *flows]))


def leads_to(claim, claims):
    """Where a host port leads, None for nowhere."""
    return claims[claim]["claims"][claim] if claim in claims else None


def devices_of(claims):
    """The set of devices that claims name."""
    return {claim.partition(" ")[2] for claim in claims if claim.startswith("podlinks ")}


def switch_localnet(devices, value, run):
    """Have devices accept 127.0.0.1, or not. That one is gone is no error: a state may outlive it."""
    keys = [f"net/ipv4/conf/{device}/route_localnet" for device in sorted(devices)]
    keys = [key for key in keys if read_file(f"/proc/sys/{key}") != f"{value}\n"]
    if keys:
        run(write_sysctls(keys, value))


def forget_flows(keys):
    """Delete conntrack's UDP entries towards the host's own addresses and the ports "53" or "192.0.2.1/53", as `conntrack -D` would.

    include/uapi/linux/netfilter/nfnetlink_conntrack.h: dump all (IPCTNL_MSG_CT_GET), delete each by its original direction and zone.
    """
    import socket  # +2 ms, UDP host ports only

    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as sock:  # NETLINK_NETFILTER
        sock.settimeout(10)
        for family, destination in ((socket.AF_INET, 2), (socket.AF_INET6, 4)):
            header, stale = bytes([family, 0, 0, 0]), []
            for payload in ask_conntrack(sock, 1, 0x301, header):  # NLM_F_REQUEST | NLM_F_DUMP
                flow = parse_attributes(payload[4:])
                addresses, protocol = (parse_attributes(parse_attributes(flow[1])[key]) for key in (1, 2))
                address, port = socket.inet_ntop(family, addresses[destination]), int.from_bytes(protocol.get(3, b""), "big")
                wanted = protocol[1] == b"\x11" and (f"{port}" in keys or f"{address}/{port}" in keys)
                if wanted and is_own_address(address):
                    stale.append(pack_attribute(0x8001, flow[1]) + (pack_attribute(18, flow[18]) if 18 in flow else b""))
            for which in stale:
                list(ask_conntrack(sock, 2, 0x5, header + which))  # IPCTNL_MSG_CT_DELETE, NLM_F_REQUEST | NLM_F_ACK


def ask_conntrack(sock, kind, flags, payload):
    """Send one request, yield the payloads of the answer. An error, such as for an entry that is gone by now, ends it like any end."""
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
    """{type: value} of netlink attributes, the flag bits of the type masked out."""
    found, place = {}, 0
    while place < len(data):
        size, kind = struct.unpack_from("=HH", data, place)
        found[kind & 0x3FFF] = data[place + 4 : place + size]
        place += size + 3 & ~3
    return found


def pack_attribute(kind, value):
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def is_own_address(address):
    """Whether an address is the host's: only then a socket can be bound to it."""
    import socket

    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def port_device(request):
    """What pods' packets come in through: of prevResult's interfaces on the host the first, by convention."""
    return (host_links(request) or [""])[0]


def ports_path(request):
    return os.path.join(request.run_dir, "portmap", short_hash(request.network, request.container_id, request.ifname))


def portmap_add(request, run):
    """ADD: lead host ports to the pod. Returns what it was given. Its undo is portmap_del."""
    mappings, ips, device = runtime_config(request, "portMappings", list, []), own_ips(request), port_device(request)
    state = {
        "owner": [request.network, request.container_id, request.ifname],
        "since": time.monotonic_ns(),
        "device": device,
        "mappings": mappings,
        "ips": ips,
        "claims": plan_claims(mappings, ips, device),
    }
    if not state["claims"]:
        return request.prev_result
    try:
        change_ports(request.run_dir, ports_path(request), state, run)
    except Exception:
        best_effort(portmap_del, request, run)
        raise
    return request.prev_result


def portmap_del(request, run):
    """DEL: give the ports back. It needs neither prevResult nor namespace, and starts no command for a pod without host ports."""
    if os.path.exists(ports_path(request)):
        change_ports(request.run_dir, ports_path(request), None, run)
    else:
        remove_file(ports_path(request))


def portmap_check(request, run):
    """CHECK: the host ports lead to the pod. CNIError 100 whose details list those that do not."""
    wanted = plan_claims(runtime_config(request, "portMappings", list, []), own_ips(request), port_device(request))
    report(request, check_ports(winners(look_ports(request.run_dir)), wanted, look_portmap(run)) if wanted else [])


def look_portmap(run):
    """({"MAP KEY" or "SET KEY": VALUE}, number of rules) of the table."""
    return look_nft(["table", "inet", "mncni_portmap"], parse_portmap, run)


def parse_portmap(items):
    """The same of nft's objects."""
    elements = {}
    for kind, item in [(kind, item[kind]) for item in items for kind in ("map", "set") if kind in item]:
        for element in item.get("elem", []):
            key, value = element if kind == "map" else (element, "")
            elements[f"{item['name']} {element_text(key)}"] = element_text(value)
    return elements, sum("rule" in item for item in items)


def element_text(side):
    """A key or value of an nft element, in nft's words; somebody else's may lack a comment, or be no concatenation."""
    if isinstance(side, dict) and "elem" in side:
        side = side["elem"]["val"]
    parts = side["concat"] if isinstance(side, dict) and "concat" in side else [side]
    return " . ".join(PROTOCOLS.get(str(part), str(part)) for part in parts)


def check_ports(claims, wanted, found):
    """What is wrong with the table, a list of messages. claims: all, as winners has them; wanted: {claim: VALUE}, those that have to be
    in it; found: what look_portmap returned."""
    (elements, rules), problems = found, []
    for claim, value in wanted.items():
        if is_port(claim) and elements.get(claim) != value:
            problems.append(f"host port {claim} leads to {elements.get(claim, 'nothing')}, not to {value}")
        elif claim.startswith("podlinks ") and claim not in elements:
            problems.append(f"nft set {claim.replace(' ', ' lacks ')}")
    expected = PORTMAP_RULES + sum(claim.startswith("subnet ") for claim in claims)
    return problems + ([f"nft table inet mncni_portmap has {rules} rules, not {expected}"] if rules != expected else [])


def portmap_gc(request, run):
    """GC: drop what this network's attachments asked for that are not in the runtime's list, and what crashes left."""
    keep, run_dir = valid_attachments(request), request.run_dir
    if keep is None or not os.path.isdir(os.path.join(run_dir, "portmap")):
        return
    with ports_lock(run_dir) as lock:
        states, left = look_ports(run_dir), half_written_ports(run_dir)
        owners = {path: (state["owner"][0], tuple(state["owner"][1:])) for path, state in states.items()}
        stale = [path for path, (network, attachment) in owners.items() if network == request.network and attachment not in keep]
        if stale or left or os.path.exists(mark_of_change(run_dir)):
            rewrite_ports(run_dir, states, stale, lock.held(run))
            for path in left:
                remove_file(path)


def half_written_ports(run_dir):
    """Paths of what killed processes left. Whoever holds the lock is the only one that writes."""
    paths = [os.path.join(run_dir, "portmap", name) for name in os.listdir(os.path.join(run_dir, "portmap")) if name[0] == "."]
    return [path for path in paths if not os.path.isdir(path)]


def rewrite_ports(run_dir, states, stale, run):
    """Make table and claims what the states say, all that there are, less those at the paths in stale, which go."""
    before, after = winners(states), winners(without(states, *stale))
    switch_localnet(devices_of(before) - devices_of(after), 0, run)
    touch(mark_of_change(run_dir))
    changed = [claim for claim in before if not stale or leads_to(claim, before) != leads_to(claim, after)]
    apply_ports(run_dir, after, changed, run, gone=stale)
    for path in [*stale, mark_of_change(run_dir)]:
        remove_file(path)


def restore_portmap(run_dir, run):
    """Put the table right, if anything is wrong with it: somebody flushed nft, or the pods' device was made anew. Returns what was
    wrong, a list of messages; without host ports it starts no command."""
    if not look_ports(run_dir):
        return []
    with ports_lock(run_dir) as lock:
        states, found = look_ports(run_dir), look_portmap(run)
        claims = winners(states)
        problems = check_ports(claims, {claim: state["claims"][claim] for claim, state in claims.items()}, found)
        problems += [f"nft has {key}, which no pod asked for" for key in sorted(found[0].keys() - claims.keys())]
        for device in sorted(devices_of(claims)):
            if read_file(f"/proc/sys/net/ipv4/conf/{device}/route_localnet") == "0\n":
                problems.append(f"{device} does not accept 127.0.0.1 (route_localnet)")
        if os.path.exists(mark_of_change(run_dir)):
            problems.append("a change of host ports did not come to its end")
        if problems:
            rewrite_ports(run_dir, states, [], lock.held(run))
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# bandwidth: limits to and from the pod                                                                tc-tbf(8), ifb
# ---------------------------------------------------------------------------------------------------------------------
#
#     to the pod: a token bucket on the host's end of the veth pair. From the pod: what arrives there is redirected through an ifb,
#     a device that does nothing but queue, with a token bucket of its own; a queue works only on what leaves a device.

NO_BURST = 2**32 - 1  # what containerd sends when the annotation names a rate alone


def parse_bandwidth(request):
    """{"ingress": (rate, burst), "egress": ...}, those that are asked for: rate in bit/s, burst in bits, None for one that is not given.
    Ingress is towards the pod. Keys of the configuration win over the runtime's, as a whole. CNIError 7."""
    keys = ("ingressRate", "ingressBurst", "egressRate", "egressBurst")
    source = request.conf if any(key in request.conf for key in keys) else runtime_config(request, "bandwidth", dict, {})
    values = {key: number({key: any_case(source, key)}, key, 0, 0, 2**63 - 1) for key in keys}
    limits = {}
    for direction in ("ingress", "egress"):
        rate, burst = values[f"{direction}Rate"], values[f"{direction}Burst"]
        if burst and not rate:
            raise config_error(f'"{direction}Burst" without "{direction}Rate" limits nothing')
        if rate:
            limits[direction] = (rate, burst if burst not in (0, NO_BURST) else None)
    return limits


def tbf(rate, burst, mtu):
    """The words of a token bucket for `tc`. Without a burst: what the rate lets through in 100 ms. Never less than ten packets: a
    packet that exceeds the burst would never be sent. The queue holds 25 ms more."""
    burst_bytes = max(rate // 80 if burst is None else burst // 8, 10 * mtu)
    queue_bytes = min(rate // 320, 2**31)
    burst_bytes = min(burst_bytes, 2**32 - 1 - queue_bytes)
    return f"tbf rate {rate}bit burst {burst_bytes}b limit {burst_bytes + queue_bytes}b"


def own_ifb(request):
    return host_ifname("mi", request.network, request.container_id, request.ifname)


def look_peer(request, run):
    """The host's end of CNI_IFNAME among the interfaces of prevResult. CNIError 7 if none is."""
    names = host_links(request)
    pod = look_pod(request, run)
    for host in look_ip([f"link show dev {name}" for name in names], run) if names else []:
        if pod and "ifname" in host and host.get("ifindex") == pod.get("link_index"):
            return host
    raise config_error(f"none of the interfaces {', '.join(names) or '(none)'} of prevResult is the host's end of {request.ifname}")


def plan_bandwidth(request, limits, peer, qdiscs):
    """Commands that set the limits on the host's end `peer`, which has these queueing disciplines."""
    name, mtu, ifb = peer["ifname"], peer["mtu"], own_ifb(request)
    plan, lines = [], []
    if "ingress" in limits:
        lines.append(f"qdisc replace dev {name} root {tbf(*limits['ingress'], mtu)}")
    if "egress" in limits:
        made = f"link add name {ifb} mtu {mtu} address {mac_of(ifb, '0a:59')} type ifb"
        plan.append(ip_batch([made, f"link set dev {ifb} alias {link_alias(request)} up"]))
        if not any(kind in ("ingress", "clsact") for kind, _ in qdiscs):  # one of somebody else's serves as well
            lines.append(f"qdisc add dev {name} ingress")
        lines.append(f"filter add dev {name} ingress protocol all u32 match u32 0 0 action mirred egress redirect dev {ifb}")
        lines.append(f"qdisc replace dev {ifb} root {tbf(*limits['egress'], mtu)}")
    return [*plan, tc_batch(lines)]


def bandwidth_add(request, run):
    """ADD: limit the pod's traffic. Returns prevResult with the ifb, if there is one. Its undo is bandwidth_del."""
    limits = parse_bandwidth(request)
    if not limits:
        return request.prev_result
    peer = request.new_peer or look_peer(request, run)
    with attachment_lock(request) as lock:
        try:
            qdiscs = [] if request.new_peer else look_qdiscs(peer["ifname"], run)
            apply(plan_bandwidth(request, limits, peer, qdiscs), lock.held(run))
        except Exception:
            best_effort(delete_links, [own_ifb(request)], run)
            raise
    ifb = [{"name": own_ifb(request)}] if "egress" in limits else []
    return {**request.prev_result, "interfaces": [*request.prev_result["interfaces"], *ifb]}


def bandwidth_del(request, run):
    """DEL: the ifb goes, together with the veth pair if naivewg is in this call; everything else goes with that."""
    if own_veth(request) not in request.links:
        with attachment_lock(request) as lock:
            delete_links([own_ifb(request)], lock.held(run))


def bandwidth_check(request, run):
    """CHECK: the limits stand as they were asked for. CNIError 100 naming what does not."""
    limits = parse_bandwidth(request)
    if not limits:
        return
    peer, ifb, problems = look_peer(request, run)["ifname"], own_ifb(request), []
    for direction, (rate, _) in limits.items():
        device = peer if direction == "ingress" else ifb
        if rate // 8 not in [limit for kind, limit in look_qdiscs(device, run) if kind == "tbf"]:
            problems.append(f"{direction} is not limited to {rate} bit/s: {device} has no such token bucket")
    if "egress" in limits and ifb not in run(Command(["tc", "-json", "filter", "show", "dev", peer, "ingress"])).stdout:
        problems.append(f"egress is not limited: what {peer} receives is not redirected to {ifb}")
    report(request, problems)


def bandwidth_gc(request, run):
    delete_stale_links(request, "ifb", "mi", run)


def bandwidth_status(request, run):
    parse_bandwidth(request)


# ---------------------------------------------------------------------------------------------------------------------
# lat: a bad network for a pod, from its annotation                                                          tc-netem(8)
# ---------------------------------------------------------------------------------------------------------------------

# Each word of a netem expression, and the kinds of its values; all but the first may be left out.
NETEM = {
    "delay": ("time", "time", "percent"),
    **dict.fromkeys(("loss", "duplicate", "corrupt", "reorder"), ("percent", "percent")),
    **{"rate": ("rate",), "limit": ("number",), "distribution": ("table",)},
    "slot": ("time", "time"),
}
# Kind of value -> what it is called, the lowest, the highest, and its units, as multiples of the one that these are in. Beyond the bounds
# tc says nothing, and sets a short time, or no rate. Jitter is uniform without a table.
NETEM_KINDS = {
    "time": ("a time up to 274s", 0, 274e6, dict(us=1, usec=1, usecs=1, ms=1e3, msec=1e3, msecs=1e3, s=1e6, sec=1e6, secs=1e6)),
    "percent": ("a percentage up to 100%", 0, 100, {"%": 1}),
    "rate": ("a rate from 8bit", 8, 1e19, dict(bit=1, kbit=1e3, mbit=1e6, gbit=1e9, bps=8, kbps=8e3, mbps=8e6, gbps=8e9)),
    "number": ("a number", 0, 1e9, {"": 1}),
    "table": ("one of normal, pareto, paretonormal", 0, 0, ("normal", "pareto", "paretonormal")),
}


def parse_lat(request):
    """The words of a netem expression for this pod, from its annotation "lat"; [] if it has none. CNIError 7 naming the bad word."""
    words = typed(runtime_config(request, "io.kubernetes.cri.pod-annotations", dict, {}), "lat", str, "").split()
    return parse_netem(["delay", *words] if words and words[0][0] in ".0123456789" else words)


def parse_netem(words):
    """The words, if they are a netem expression. CNIError 7."""
    texts, word = {}, ""  # the texts behind each word so far, and the word that is open
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
    """A value of a word, in the unit of its kind's bounds, 0 for a table. CNIError 7."""
    what, lowest, highest, units = NETEM_KINDS[kind]
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz%")
    if kind == "table" and text in units:
        return 0
    if text.isascii() and number.replace(".", "", 1).isdigit() and len(number) < 10 and text[len(number) :] in units and kind != "table":
        value = float(number) * units[text[len(number) :]]
        if lowest <= value <= highest:
            return value
    raise config_error(f'annotation "lat": "{word}" needs {what}, not "{text[:40]}"')


def lat_add(request, run):
    """ADD: netem on the pod's interface, so for what the pod sends. Returns what it was given. CNIError 4 where the kernel has none."""
    words = parse_lat(request)
    if words:
        command = Command(in_netns(request.netns, ["tc", "qdisc", "replace", "dev", request.ifname, "root", "netem", *words]))
        reply = run(command)
        if "qdisc kind is unknown" in reply.stderr:
            what = "this kernel has no netem: load the module sch_netem (package linux-modules-extra-* on Ubuntu)"
            raise CNIError(BAD_ENVIRONMENT, what, reply.stderr.strip())
        if reply.exit_code != 0:
            raise command_failed(command, reply)
    return request.prev_result


def look_netem(request, run):
    """Whether the pod's interface has netem. False where there is no interface or no namespace any more."""
    return any(kind == "netem" for kind, _ in look_qdiscs(request.ifname, run, request.netns))


def lat_del(request, run):
    """DEL: take netem off, should the namespace outlive the attachment. Whatever is gone is fine."""
    if request.netns and look_netem(request, run):
        run(Command(in_netns(request.netns, ["tc", "qdisc", "delete", "dev", request.ifname, "root"])))


def lat_check(request, run):
    """CHECK: netem is there if the annotation asks for it. CNIError 100."""
    if parse_lat(request) and not look_netem(request, run):
        report(request, [f'{request.ifname} in the pod has no netem, which the annotation "lat" asks for'])


# ---------------------------------------------------------------------------------------------------------------------
# quickack: no delayed ACKs on the pod's routes                                                  ip-route(8), quickack
# ---------------------------------------------------------------------------------------------------------------------


def parse_quickack(request):
    """The destinations named by "routes", as networks; None for all routes of the interface. CNIError 7."""
    routes = typed(request.conf, "routes", list, None)
    return None if routes is None else [parse_address(dst, ipaddress.ip_network, '"routes" of quickack') for dst in routes]


def look_routes(request, run):
    """The unicast routes of CNI_IFNAME, in words as `ip route` reads them, both families.

    Not from -json, which leaves out that a metric is locked, and how some are written: every attribute has to survive.
    """
    routes = []
    for family in ("-4", "-6"):
        argv = ["ip", family, "-oneline", "route", "show", "table", "all", "type", "unicast", "dev", request.ifname]
        reply = ask(Command(in_netns(request.netns, argv)), run, may_be_gone=False)
        routes += [[*parse_route_words(line), "dev", request.ifname] for line in reply.stdout.splitlines() if line.strip()]
    return routes


def parse_route_words(line):
    """The words of a route less the states that `ip` shows but does not read; a rto_min is always locked, and shown so, but not read so."""
    states = ("linkdown", "dead", "offload", "trap", "offload_failed", "pervasive", "notify", "rt_offload", "rt_trap")
    line = line.replace("\\", " ").replace("rto_min lock", "rto_min")
    return [word for word in line.split() if word not in states]


def chosen_routes(conf, routes):
    """Those of the routes that the configuration means. A destination that no route has: CNIError 7."""
    if conf is None:
        return routes
    own = [ipaddress.ip_network({"default": default_route(" ".join(words))}.get(words[0], words[0])) for words in routes]
    for wanted in conf:
        if wanted not in own:
            raise config_error(f"quickack: the pod has no route to {wanted} on this interface")
    return [words for words, network in zip(routes, own) if network in conf]


def is_quick(words):
    return "quickack" in words and words[words.index("quickack") + 1] == "1"


def plan_quickack(routes):
    """Lines for `ip -batch` that set quickack on the routes that lack it."""
    lines = []
    for words in [words for words in routes if not is_quick(words)]:
        place = words.index("quickack") if "quickack" in words else len(words)
        lines.append(" ".join(["route", "replace", *words[:place], *words[place + 2 :], "quickack", "1"]))
    return lines


def quickack_add(request, run):
    """ADD: set quickack on the pod's routes. Returns what it was given. Undoing is nothing: the routes go with the interface."""
    conf = parse_quickack(request)
    lines = plan_quickack(chosen_routes(conf, look_routes(request, run)))
    apply([ip_batch(lines, request.netns)] if lines else [], run)
    return request.prev_result


def quickack_check(request, run):
    """CHECK: the routes that ADD chose still have it. CNIError 100 naming the one that has not."""
    routes = chosen_routes(parse_quickack(request), look_routes(request, run))
    report(request, [f"the route to {words[0]} in the pod has no quickack" for words in routes if not is_quick(words)])


def quickack_status(request, run):
    parse_quickack(request)


# ---------------------------------------------------------------------------------------------------------------------
# loopback: a plugin as small as they come; a pod's own "lo"
# ---------------------------------------------------------------------------------------------------------------------


def loopback_add(request, run):
    """ADD: bring lo up. Returns what it was given, or a result that lists lo."""
    apply([ip_batch(["link set dev lo up"], request.netns)], run)
    if request.prev_result:
        return request.prev_result
    lo = look_lo(request, run) or {}
    ips = [{"address": address, "interface": 0} for address in sorted(addresses_of(lo))]
    return {"cniVersion": NEWEST, "interfaces": [{"name": "lo", "mac": lo.get("address", ""), "sandbox": request.netns}], "ips": ips}


def loopback_del(request, run):
    """DEL: nothing. The namespace goes, and lo with it; were it to stay, its owner would want its lo."""


def loopback_check(request, run):
    report(request, diff_link(f"lo in {request.netns}", look_lo(request, run)))


def look_lo(request, run):
    return look_link("lo", look_ip(["address show dev lo"], run, request.netns))


def nothing_to_do(request, run):
    """GC and STATUS of a plugin that keeps no state and can always serve."""


# ---------------------------------------------------------------------------------------------------------------------
# The plugin table
# ---------------------------------------------------------------------------------------------------------------------
# A column a verb, in the order of VERBS: ADD, DEL, CHECK, GC, STATUS. first: it may only stand first in a list. chained: it needs the
# result of a plugin before it. link: it makes a link on the host whose name begins so.

PLUGINS = {
    "naivewg": dict(zip(VERBS, (naivewg_add, naivewg_del, naivewg_check, naivewg_gc, naivewg_status)), first=True, link="mn"),
    "portmap": dict(zip(VERBS, (portmap_add, portmap_del, portmap_check, portmap_gc, nothing_to_do)), chained=True),
    "bandwidth": dict(zip(VERBS, (bandwidth_add, bandwidth_del, bandwidth_check, bandwidth_gc, bandwidth_status)), chained=True, link="mi"),
    "lat": dict(zip(VERBS, (lat_add, lat_del, lat_check, nothing_to_do, nothing_to_do)), chained=True),
    "quickack": dict(zip(VERBS, (quickack_add, nothing_to_do, quickack_check, nothing_to_do, quickack_status)), chained=True),
    "loopback": dict(zip(VERBS, (loopback_add, loopback_del, loopback_check, nothing_to_do, nothing_to_do)), first=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# install: put the plugin where a runtime looks for it
# ---------------------------------------------------------------------------------------------------------------------

LAUNCHER_MARK = "# A launcher written by `mncni.py install`"
LAUNCHER = f"""#!/usr/bin/python3 -IS
{LAUNCHER_MARK}: a script is compiled at every start, the module that it imports only once.
import gc, os, sys
gc.disable()  # a call is over before there is much to collect
sys.path.append(os.path.dirname(os.path.realpath(__file__)))
import mncni
mncni.main()
"""


def is_ours(path):
    """Whether a file in a plugin directory is absent or was written by `install`: a launcher, or mncni.py itself."""
    text = read_file(path)
    return text is None or LAUNCHER_MARK in text[:200] or '"""MNCNI' in text[:200]


def install(bin_dir=DEFAULT_BIN_DIR, names=(), force=False):
    """Write mncni.py and its launchers into bin_dir; returns their paths. CNIError 7 at a foreign file without force.

    Whole files by rename: a runtime may be starting the old one at this moment (ETXTBSY, half a script).
    """
    unknown = [name for name in names if name not in PLUGINS]
    if unknown:
        raise config_error(f'there is no plugin "{unknown[0]}" to install a launcher for; there are: {", ".join(PLUGINS)}')
    with open(os.path.realpath(__file__), encoding="utf-8") as file:
        texts = {"mncni.py": file.read(), "mncni": LAUNCHER, **dict.fromkeys(names, LAUNCHER)}
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
            os.chmod(path, 0o755)  # whatever the umask says: the runtime may not be root
    return list(paths)


def precompile(root, bin_dir, run):
    """Compile the installed mncni.py with the python3 of the system below root: an image may be read-only when it runs.

    Checked by content, not by time: images have times of their own. CNIError 4 if that system has no python3.
    """
    if not os.path.exists(os.path.join(root, "usr/bin/python3")):
        raise CNIError(BAD_ENVIRONMENT, f"there is no /usr/bin/python3 in {root}, which mncni.py runs under: install its package python3")
    compile_it = ["-m", "compileall", "-q", "--invalidation-mode", "checked-hash", os.path.join(bin_dir, "mncni.py")]
    apply([Command(["chroot", root, "/usr/bin/python3", "-IS", *compile_it])], run)


CHAINED = {
    "lat": {"type": "mncni", "plugin": "lat", "capabilities": {"io.kubernetes.cri.pod-annotations": True}},
    "bandwidth": {"type": "mncni", "plugin": "bandwidth", "capabilities": {"bandwidth": True}},
    "quickack": {"type": "mncni", "plugin": "quickack"},
}


def chain(name, conf_dir, backup_dir, remove=False):
    """Put our chained plugin at the end of the active conflist of conf_dir, or take it out. Returns the file's path if it changed, else
    "". The rest of the file stays as it is, byte by byte; a copy of it goes to backup_dir first. CNIError 7 where that cannot be."""
    names = sorted(os.listdir(conf_dir)) if os.path.isdir(conf_dir) else []
    active = next((entry for entry in names if entry.endswith((".conflist", ".conf", ".json")) and entry[0] != "."), None)
    if active is None:
        raise config_error(f"there is no network in {conf_dir} yet: a chained plugin needs one before it")
    path = os.path.realpath(os.path.join(conf_dir, active))
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        text = file.read()
    conf = parse_json_object(text, path)  # which refuses what is no UTF-8: it would not stay as it is
    plugins = typed(conf, "plugins", list, [])
    if not plugins:
        listed = [without(conf, "name", "cniVersion"), CHAINED[name]]
        conflist = indented({"cniVersion": conf.get("cniVersion"), "name": conf.get("name"), "plugins": listed})
        raise config_error(f"{path} is no list of plugins; put in its place a file {os.path.splitext(path)[0]}.conflist", conflist)
    present = any(name in plugin_names(plugin) for plugin in plugins)
    ours = [plugin for plugin in plugins[1:] if plugin_names(plugin) == [name] and plugin.get("type") in ("mncni", "mncni.py")]
    if (remove and not present) or (ours and not remove):
        return ""
    if not ours and present:
        raise config_error(f"{path} has a plugin {name} already, which is none that `install --chain` put there")
    check_version("ADD", str(conf.get("cniVersion")))
    wanted = [plugin for plugin in plugins if plugin is not ours[0]] if remove else [*plugins, CHAINED[name]]
    added = "" if remove else ",\n    " + to_json(CHAINED[name])
    keep_backup(path, text, backup_dir)
    write_file(path, edited(text, {**conf, "plugins": wanted}, ours[0] if remove else plugins[-1], added), os.stat(path).st_mode & 0o777)
    return path


def plugin_names(plugin):
    """The plugins that an entry of a conflist runs."""
    names = plugin.get("plugin", plugin.get("type")) if isinstance(plugin, dict) else None
    return names if isinstance(names, list) else [names]


def edited(text, wanted, anchor, added):
    """The JSON text, changed in one place so that it says `wanted`: `added` comes behind the object `anchor`, or, added being "", that
    object goes with the comma before it. All the rest stays, however it is written."""
    import json  # the command line only

    decode = json.JSONDecoder().raw_decode
    for start in (place for place, char in enumerate(text) if char == "{"):
        before = start - 1
        while before >= 0 and text[before].isspace():
            before -= 1
        if text[before] not in "[,":  # no element of a list
            continue
        try:
            found, end = decode(text, start)
            changed = text[: end if added else text.rindex(",", 0, start)] + added + text[end:] if found == anchor else "{}"
            if parse_json(changed) == wanted:
                return changed
        except ValueError:
            continue
    return indented(wanted) + "\n"


def keep_backup(path, text, backup_dir):
    """Keep a text as backup_dir/NAME.1, .2, ..., unless the last of them is the same: another network may write its file often."""
    own_directory(backup_dir, 0o700)
    backup, number = os.path.join(backup_dir, os.path.basename(path)), 1
    while os.path.exists(f"{backup}.{number}"):
        number += 1
    if read_file(f"{backup}.{number - 1}") != text:
        write_file(f"{backup}.{number}", text, 0o600)


def install_command(options, run):
    """`mncni.py install`: prints what it wrote."""
    paths = (options.bin_dir, options.conf_dir, BACKUP_DIR)
    bin_dir, conf_dir, backup_dir = (os.path.join(options.root, path.lstrip("/")) if options.root else path for path in paths)
    if options.remove and not options.chain:
        raise config_error("--remove takes a plugin out of a conflist: say which with --chain")
    if not options.remove:  # what is taken out of the list stays in place, for the pods that have it
        print("\n".join(install(bin_dir, [name for name in options.names.split(",") if name], options.force)))
        if options.root:
            precompile(options.root, options.bin_dir, run)
    if options.chain:
        changed = chain(options.chain, conf_dir, backup_dir, options.remove)
        print(f"{changed}: {options.chain} {'taken out' if options.remove else 'added'}" if changed else f"{conf_dir} is as it should be")


# ---------------------------------------------------------------------------------------------------------------------
# explain: what a call would run
# ---------------------------------------------------------------------------------------------------------------------


EXPLAINED = {  # what the runtime asks for, where the conflist declares that it may
    "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
    "bandwidth": {"ingressRate": 8000000, "egressRate": 8000000},
    "io.kubernetes.cri.pod-annotations": {"lat": "50ms"},
}


FOREIGN_RESULT = {  # what another plugin may have made, on the host and in the pod
    "interfaces": [{"name": "veth0"}, {"name": "eth0", "sandbox": "/run/netns/c1"}],
    "ips": [{"address": "192.0.2.2/24", "gateway": "192.0.2.1", "interface": 1}],
}


class Explainer:
    """A `run` that runs nothing: it notes each command in `script`, and answers as a host would that has nothing yet but the interfaces
    of a result (or None), and a default route in every namespace."""

    def __init__(self, result):
        self.script, self.heading = [], ""
        self.links = ["lo", *(link["name"] for link in (result or {}).get("interfaces", []))]

    def __call__(self, command):
        heading = "\n# It looks:" if {"-json", "-j", "show"} & set(command.argv) else "\n# It changes:"
        self.script += [str(command)] if heading == self.heading else [heading, str(command)]
        self.heading = heading
        if "CNI_COMMAND" in command.environ:
            self.script.append("# ... another plugin; the address below stands for the one that it gives.")
            return Reply(0, to_json({"ips": [without(FOREIGN_RESULT["ips"][0], "interface")]}), "")
        if "route" in command.argv:
            return Reply(0, "default via 192.0.2.1\n" if "-4" in command.argv else "", "")
        lines = [line.split() for line in command.stdin.splitlines()]
        found = [(words[3], self.links.index(words[3])) for words in lines if words[1:3] == ["show", "dev"] and words[3] in self.links]
        other = {"mtu": 1500, "address": "00:00:00:00:00:00", "flags": ["UP"]}  # of a veth pair a result names the host's end first
        links = [{"ifname": name, "ifindex": index, "link_index": index - 1, **other} for name, index in found]
        return Reply(0, to_json(links) if links else "", "")


def explain_command(options, run):
    """`mncni.py explain`: a call of each plugin of a conflist as a shell script. It needs no root and changes nothing."""
    import tempfile  # +20 ms, explain only

    text = read_file(options.conflist)
    if text is None:
        raise config_error(f"there is no file {options.conflist}")
    conflist = parse_json_object(text, options.conflist)
    plugins = typed(conflist, "plugins", list, [conflist])
    if not plugins or not all(isinstance(conf, dict) for conf in plugins):
        raise config_error(f'"plugins" of {options.conflist} is empty, or holds what is no plugin')
    versions = [conflist.get("cniVersion") or "0.1.0", *typed(conflist, "cniVersions", list, [])]
    shared = {"name": conflist.get("name"), "cniVersion": max((one for one in versions if one in CNI_VERSIONS), default=versions[0])}
    print(f"# What CNI_COMMAND={options.command} runs for {options.conflist}: container c1, namespace /run/netns/c1, interface eth0,")
    print("# on a host that has nothing of it yet, or only what an ADD made. Leases are files, not commands, so they do not show.")
    result = None
    for conf in plugins:
        print("\n# ---- type {}, plugin {} ----".format(*(to_json(conf.get(key, conf.get("type"))) for key in ("type", "plugin"))))
        if "plugin" not in conf and conf.get("type") not in (*PLUGINS, "mncni", "mncni.py"):
            print("# Not a plugin of MNCNI's. The interface and the address below stand for its own.")
            result = result or FOREIGN_RESULT
            continue
        with tempfile.TemporaryDirectory() as root:
            result = explain_plugin({**conf, **shared}, result, options.command, root)


def explain_plugin(conf, prev_result, command, root):
    """Print what one plugin of a list runs after others gave prev_result (or None). root: an empty directory for the host's files.
    Returns the result of its ADD."""
    conf.update({"ready": "", "logFile": "", "cni.dev/valid-attachments": []})
    conf["runtimeConfig"] = {name: value for name, value in EXPLAINED.items() if any_case(conf.get("capabilities"), name)}
    if conf["runtimeConfig"]:
        print(f"# The runtime asks for {to_json(conf['runtimeConfig'])}.")
    delegate = delegate_type(conf)
    if typed(conf, "ipam", dict, {}) and not delegate:
        conf["ipam"] = {**conf["ipam"], "dataDir": root}
    for path in ("/run/netns/c1", *([f"{DEFAULT_BIN_DIR}/{delegate}"] if delegate else [])):
        os.makedirs(os.path.dirname(root + path))
        write_file(root + path, "")
    script, result = explain_call("ADD", {**conf, "prevResult": prev_result}, root)
    if command != "ADD":
        script, _ = explain_call(command, {**conf, "prevResult": result}, root)
    print("\n".join(script).replace(root, "") or "# It starts no command.")
    return result


def explain_call(command, conf, root):
    """(the commands of one call, its result or {}). CHECK is bound to find everything missing: that is no error here."""
    run, names = Explainer(conf["prevResult"]), {"CNI_CONTAINERID": "c1", "CNI_NETNS": f"{root}/run/netns/c1", "CNI_IFNAME": "eth0"}
    environ = {**names, "CNI_COMMAND": command, "CNI_PATH": root + DEFAULT_BIN_DIR, "MNCNI_RUN_DIR": root + DEFAULT_RUN_DIR}
    exit_code, stdout = answer(environ, to_json(conf), run, called_as=conf.get("type"))
    reply = parse_json(stdout or "{}")
    if exit_code and (command, reply["code"]) != ("CHECK", COMMAND_FAILED):
        raise CNIError(reply["code"], reply["msg"], reply.get("details", ""))
    return run.script, reply


# ---------------------------------------------------------------------------------------------------------------------
# Command line and main
# ---------------------------------------------------------------------------------------------------------------------


def portmap_restore_command(options, run):
    """`mncni.py portmap-restore`: prints what was wrong."""
    for problem in restore_portmap(os.environ.get("MNCNI_RUN_DIR") or DEFAULT_RUN_DIR, run):
        print(f"restored: {problem}")


def build_parser():
    import argparse  # +2 ms, the command line only

    parser = argparse.ArgumentParser(prog="mncni.py", description="MNCNI: CNI plugins for Linux in one file. A container runtime calls it.")
    parser.add_argument("--version", action="version", version=f"mncni {PROGRAM_VERSION}, CNI {', '.join(CNI_VERSIONS)}")
    commands = parser.add_subparsers(dest="action", required=True)
    command = commands.add_parser("install", help="write mncni.py and its launchers into a plugin directory")
    command.add_argument("--root", default="", metavar="DIR", help="into the system below DIR, an image, whose python3 compiles mncni.py")
    command.add_argument("--bin-dir", default=DEFAULT_BIN_DIR, metavar="DIR", help=f"the plugin directory (default {DEFAULT_BIN_DIR})")
    command.add_argument("--names", default="", metavar="A,B", help=f"also launchers with these names: {', '.join(PLUGINS)}")
    command.add_argument("--force", action="store_true", help="replace files that are not MNCNI's own")
    command.add_argument("--chain", choices=CHAINED, help="add this plugin to the active conflist, on top of another network")
    command.add_argument("--conf-dir", default=DEFAULT_CONF_DIR, metavar="DIR", help=f"where that conflist is (default {DEFAULT_CONF_DIR})")
    command.add_argument("--remove", action="store_true", help="take the --chain plugin out again")
    command.set_defaults(act=install_command)
    command = commands.add_parser("explain", help="print what a call would run, as a shell script; changes nothing")
    command.add_argument("conflist", metavar="CONFLIST", help="a CNI configuration, as in /etc/cni/net.d")
    command.add_argument("--command", default="ADD", choices=VERBS, help="(default ADD)")
    command.set_defaults(act=explain_command)
    command = commands.add_parser("portmap-restore", help="put the nft table of the host ports right, after somebody flushed nft")
    command.set_defaults(act=portmap_restore_command)
    command = commands.add_parser("forget-flows", help="have UDP flows to host ports find their way anew; portmap does it by itself")
    command.add_argument("ports", metavar="[ADDRESS/]PORT", nargs="+", help="as in 53 or 192.0.2.1/53")
    command.set_defaults(act=lambda options, run: forget_flows(options.ports))
    return parser


def command_line(arguments):
    """The exit code of `mncni.py install | explain | --help | --version`."""
    options = build_parser().parse_args(arguments)
    try:
        options.act(options, make_run(dict(os.environ)))
    except (CNIError, OSError) as error:
        hint = ": run it with sudo" if isinstance(error, PermissionError) else ""
        details = f"\n{error.details}" if getattr(error, "details", "") else ""
        print(f"mncni.py {options.action}: {error}{hint}{details}", file=sys.stderr)
        return 1
    return 0


ABOUT = f"""MNCNI {PROGRAM_VERSION}: the CNI plugins {", ".join(PLUGINS)}
CNI protocol versions supported: {", ".join(CNI_VERSIONS)}
A container runtime calls this program with CNI_COMMAND set and a network configuration on stdin. How to try it by hand stands at the
top of this file; mncni.py --help lists what else it does.
"""


def main(plugins=None):
    """The program. A plugin of somebody else's imports this module and calls it with a verb table of its own: see the README."""
    environ = dict(os.environ)
    os.umask(os.umask(0o077) | 0o022)  # whatever we make, nobody else is to change it
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (closed: print would go to stdout, which is the protocol's)
    if not environ.get("CNI_COMMAND"):
        if len(sys.argv) > 1:
            sys.exit(command_line(sys.argv[1:]))
        sys.stderr.write(ABOUT)
        sys.exit(0)

    run = make_run(environ, print_trace if environ.get("CNI_TRACE") == "1" else None)
    exit_code, text = answer(environ, read_stdin(), run, plugins, os.path.basename(sys.argv[0]), at_once=True)
    sys.stdout.write(text)
    sys.stdout.flush()
    os._exit(exit_code)  # without the interpreter's tidying up, which takes 2 ms


def print_trace(command):
    print(f"+ {command}\n", end="", file=sys.stderr, flush=True)  # in one go: commands may run side by side


def read_stdin():
    """stdin as text; bytes that are no UTF-8 survive as surrogates, which parse_json_object refuses. "" from a terminal, from none at all,
    and where it cannot be read: VERSION answers all the same."""
    try:
        return "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    except OSError as error:
        tell(f"cannot read stdin: {error.strerror}")
        return ""


if __name__ == "__main__":
    main()
