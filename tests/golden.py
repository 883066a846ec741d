"""Golden cases: what a call of the plugin ran and answered, whole, one file per behaviour under tests/cases/.

A case is a title in comment lines and one or more steps, each made of sections:

    -- env --        CNI_* variables; those not given come from DEFAULTS; "called as NAME" names the program
    -- files --      files to make first: a path, then its lines indented by two
    -- world --      shell commands that bring the kernel into the state of this step: `host ...` or `pod ...`; used when recording
    -- stdin --      what the runtime writes
    -- replies --    what the kernel's tools answer to commands that look, or that fail
    -- commands --   what was run, in order                                                        (written by --update)
    -- answer --     exit status and stdout                                                        (written by --update)
    -- leases --     the leases that stand after the step                                          (written by --update)

    # text               why it is run
    $ ip -batch -        a command          < text       a line that it prints
    | link set ...       its stdin          ! text       a line of its stderr          = 1    its exit status

Steps share a directory, {TMP}; {BOOT_ID} is this boot's. A command that looks and has no reply fails the case, and so does a reply
that nothing asked for. Replies are recorded from a real kernel, less the keys that nobody reads; a case whose title says "made up"
has replies that were written by hand.

    python -m tests.golden [--update | --record] [case ...]
"""

import argparse
import contextlib
import difflib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import mncni

CASES = Path(__file__).parent / "cases"
SECTIONS = ("env", "files", "world", "stdin", "replies", "commands", "answer", "leases")
DEFAULTS = {
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "{TMP}/netns",
    "CNI_NETNS_OVERRIDE": "1",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "{TMP}/bin",
    "MNCNI_RUN_DIR": "{TMP}/run",
}
READ_KEYS = {
    *("ifname", "flags", "mtu", "master", "address", "ifalias", "linkinfo", "info_kind", "addr_info", "local", "prefixlen", "scope"),
    *("dst", "gateway", "dev", "protocol", "prefsrc", "metric", "metrics", "type", "table"),
    *("interface", "family", "forwarding", "ifindex", "link_index", "kind", "options"),
    *("nftables", "rule", "chain", "expr", "name", "comment", "map", "elem", "val", "concat"),
}


def parse_case(text):
    """(title lines, [{section: text}])."""
    title, steps, section = [], [], None
    for line in text.splitlines():
        header = re.fullmatch(r"-- (\w+) --", line)
        if header:
            section = header.group(1)
            if section not in SECTIONS:
                raise ValueError(f"unknown section {section!r}")
            if section == "env":
                steps.append({})
            steps[-1][section] = ""
        elif section is None:
            title.append(line)
        else:
            steps[-1][section] += line + "\n"
    return title, [{name: body.strip("\n") for name, body in step.items()} for step in steps]


def format_case(title, steps):
    parts = ["\n".join(title)]
    for step in steps:
        for name in SECTIONS:
            if step.get(name) or name in ("env", "stdin", "commands", "answer"):
                parts.append(f"-- {name} --" + ("\n" + step[name] if step.get(name) else ""))
    return "\n".join(parts) + "\n"


def command_lines(command):
    """A command as the lines of a case, without its reason."""
    shown = mncni.Command(command.argv, environ=command.environ)
    return [f"$ {shown}", *(f"| {line}" for line in command.stdin.splitlines())]


def explained_lines(command):
    """A command as the lines of a case, with its reason above it."""
    return [f"# {command.why}", *command_lines(command)]


def parse_replies(text):
    """[(command as text, Reply)] of a replies section."""
    replies = []
    for line in text.splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "$":
            replies.append({"command": [line], "<": [], "!": [], "=": "0"})
        elif mark == "|":
            replies[-1]["command"].append(line)
        elif mark in ("<", "!"):
            replies[-1][mark].append(rest)
        elif mark == "=":
            replies[-1]["="] = rest
        else:
            raise ValueError(f"not a line of a reply: {line!r}")
    return [("\n".join(reply["command"]), mncni.Reply(int(reply["="]), joined(reply["<"]), joined(reply["!"]))) for reply in replies]


def joined(lines):
    return "".join(line + "\n" for line in lines)


def format_reply(command, reply):
    lines = command_lines(command)
    lines += [f"< {line}" for line in reply.stdout.splitlines()] + [f"! {line}" for line in reply.stderr.splitlines()]
    return "\n".join(lines + ([f"= {reply.exit_code}"] if reply.exit_code else []))


def looks(command):
    """Whether a command asks for something, so that no answer would be an answer to it."""
    return bool({"-json", "-j", "show"} & set(command.argv)) or "/" in command.argv[0]


class Recorder:
    """A `run` that answers from a case's replies and remembers what it was asked."""

    def __init__(self, replies, names):
        self.replies, self.names, self.commands, self.missing = list(replies), names, [], []

    def __call__(self, command):
        text = self.names.hide("\n".join(command_lines(command)))
        self.commands.append(self.names.hide("\n".join(explained_lines(command))))
        for index, (expected, reply) in enumerate(self.replies):
            if expected == text:
                del self.replies[index]
                return mncni.Reply(reply.exit_code, self.names.show(reply.stdout), self.names.show(reply.stderr))
        if looks(command):
            self.missing.append(text)
        return mncni.Reply(0, "", "")


class RealKernel:
    """A `run` for --record: a host and a pod in throw-away namespaces; it keeps the replies of whatever looks or fails."""

    def __init__(self, names):
        self.names, self.commands, self.replies = names, [], []
        self.host = f"mncni-record-{os.getpid()}"
        self.run = mncni.make_run(dict(os.environ))

    def __enter__(self):
        self._sh(f"ip netns add {self.host} && ip netns add {self.host}-pod && touch {self.names.tmp}/netns")
        self._sh(f"mount --bind /run/netns/{self.host}-pod {self.names.tmp}/netns")
        return self

    def __exit__(self, *exc_info):
        self._sh(f"umount {self.names.tmp}/netns; ip netns del {self.host}-pod; ip netns del {self.host}")

    def world(self, text):
        for line in text.splitlines():
            where, _, command = line.partition(" ")
            self._sh(f"nsenter --net=/run/netns/{self.host}{'' if where == 'host' else '-pod'} sh -ec '{self.names.show(command)}'")

    def _sh(self, command):
        subprocess.run(["sh", "-c", command], check=True)

    def __call__(self, command):
        self.commands.append(self.names.hide("\n".join(explained_lines(command))))
        argv = [mncni.__file__ if word == "mncni.py" else word for word in command.argv]
        reply = self.run(mncni.Command(["nsenter", f"--net=/run/netns/{self.host}", *argv], command.stdin, command.why, command.environ))
        if looks(command) or reply.exit_code:
            shown = mncni.Reply(reply.exit_code, readable(reply.stdout), reply.stderr)
            self.replies.append(self.names.hide(format_reply(command, shown)))
        return reply


def readable(stdout):
    """Lines of JSON less the keys that nobody reads."""

    def keep(value):
        if isinstance(value, dict):
            return {key: item if key in ("expr", "options") else keep(item) for key, item in value.items() if key in READ_KEYS}
        return [keep(item) for item in value] if isinstance(value, list) else value

    try:
        return "".join(json.dumps(keep(json.loads(line))) + "\n" for line in stdout.splitlines() if line)
    except ValueError:
        return stdout


class Names:
    """{TMP} and {BOOT_ID} in a case stand for what they are in this run."""

    def __init__(self, tmp):
        self.tmp = str(tmp)
        self.pairs = [("{TMP}", self.tmp), ("{BOOT_ID}", mncni.boot_id())]

    def show(self, text):
        for name, value in self.pairs:
            text = text.replace(name, value)
        return text

    def hide(self, text):
        for name, value in self.pairs:
            text = text.replace(value, name)
        return re.sub(r"run-[0-9a-f-]{36}", "{RUN_ID}", text)


def run_step(step, names, run, plugins=None):
    """Run one step; returns it with commands, answer and leases as they came out."""
    environ, called_as = dict(DEFAULTS), "mncni"
    for line in step["env"].splitlines():
        if line.startswith("called as "):
            called_as = line.split(" ")[2]
        else:
            name, _, value = line.partition("=")
            environ[name] = value
    environ = {name: names.show(value) for name, value in environ.items()}
    make_files(names, step.get("files", ""))
    exit_code, stdout = mncni.answer(environ, names.show(step.get("stdin", "")), run, plugins, called_as)
    answer = f"exit {exit_code}" + (f"\n{pretty(names.hide(stdout))}" if stdout else "")
    return {**step, "commands": "\n".join(run.commands), "answer": answer, "leases": names.hide(list_leases(names.tmp))}


def pretty(stdout):
    """One line of JSON over several, so that a diff shows what changed."""
    return json.dumps(json.loads(stdout), indent=1, ensure_ascii=False)


def make_files(names, text):
    path = None
    for line in names.show(text).splitlines():
        if not line.startswith("  "):
            path = Path(names.tmp) / line
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
            path.chmod(0o755)
        else:
            path.write_text(path.read_text() + line[2:] + "\n")


def list_leases(tmp):
    """Every lease below {TMP}/data, whoever holds it."""
    paths = [path for path in sorted(Path(tmp).glob("data/*/*")) if path.is_file() and path.name[0].isalnum()]
    paths = [path for path in paths if path.name != "lock" and not path.name.startswith("last.")]
    return "\n".join(f"{path.relative_to(tmp)}: {' '.join(path.read_text(errors='replace').split())}" for path in paths)


def run_case(path, record=False):
    """(the case's text, its text as it came out, complaints). Complaints: commands without a reply, replies without a command."""
    text = path.read_text()
    title, steps = parse_case(text)
    complaints, done = [], []
    with tempfile.TemporaryDirectory(prefix="mncni-case-") as tmp:
        names = Names(tmp)
        if record:
            (Path(tmp) / "netns").touch()
            with RealKernel(names) as kernel:
                for step in steps:
                    kernel.world(step.get("world", ""))
                    kernel.commands, kernel.replies = [], []
                    done.append({**run_step(step, names, kernel), "replies": "\n".join(kernel.replies)})
        else:
            (Path(tmp) / "netns").symlink_to("/proc/self/ns/net")  # a namespace, which needs no root; see CNI_NETNS_OVERRIDE
            for step in steps:
                recorder = Recorder(parse_replies(step.get("replies", "")), names)
                done.append(run_step(step, names, recorder))
                complaints += [f"no reply to:\n{command}" for command in recorder.missing]
                complaints += [f"a reply that nothing asked for:\n{command}" for command, _ in recorder.replies]
    return text, format_case(title, done), complaints


def all_cases():
    return sorted(CASES.glob("**/*.case"))


def main():
    parser = argparse.ArgumentParser(description="run, update or record the golden cases")
    parser.add_argument("--update", action="store_true", help="write commands, answer and leases as they come out")
    parser.add_argument("--record", action="store_true", help="ask a real kernel for the replies, too (root)")
    parser.add_argument("cases", nargs="*", metavar="case", help="as in naivewg/add-twice; all if none is named")
    options = parser.parse_args()
    failed = 0
    for path in [CASES / f"{case}.case" for case in options.cases] or all_cases():
        made_up = "made up" in path.read_text().partition("\n-- ")[0]
        with contextlib.redirect_stderr(io.StringIO()):  # what the plugin tells people
            before, after, complaints = run_case(path, options.record and not made_up)
        if options.update or options.record:
            path.write_text(after)
        bad = complaints or (before != after and not options.update and not options.record)
        failed += bool(bad)
        name = str(path.relative_to(CASES))
        if complaints and not options.record:
            complaints.append(f"the tools' answers to all that runs: sudo make record CASE={name.removesuffix('.case')}")
        changed = difflib.unified_diff(before.splitlines(), after.splitlines(), name, name, lineterm="")
        print("\n".join([f"{'FAIL' if bad else 'ok'}  {name}", *complaints, *changed]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
