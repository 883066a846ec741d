#!/usr/bin/python3
"""cnisnoop: watch every CNI call on this node, and find out why a pod has no network.

CNI, the Container Network Interface: to connect a pod to the network, or to disconnect it, the container runtime (containerd, CRI-O,
podman) starts a program, the plugin. It puts the command (ADD, DEL, CHECK, GC, STATUS, VERSION) into the environment as CNI_COMMAND, with
other CNI_* variables beside it, and the configuration on standard input; the plugin prints its result to standard output, both as JSON.
A network may be a chain of plugins, called one after the other for each pod. One such start of a plugin is a call.

    sudo ./cnisnoop.py trace                 show each call: command, plugin, pod, stdin, stdout, exit code, duration
    sudo ./cnisnoop.py trace --changes       show also what each call changed on the host and in the pod
    ./cnisnoop.py view FILE                  show again what `trace --out FILE` recorded
    sudo ./cnisnoop.py cache                 list the results that the runtime has stored in /var/lib/cni/results, and mark stale ones
    sudo ./cnisnoop.py doctor                say which configuration is in use and what is wrong; exit status 1 if something is

How a call is found: a process that executes a program with CNI_COMMAND in its environment is a call. A backend, bpftrace or strace,
reports when such a process starts and ends, and what it and its children read from its standard input and write to its standard output
and error. A plugin may start another plugin, its delegate (bridge starts host-local for the addresses): a program in one of the plugin
directories that CNI_PATH lists, or in the caller's directory. Any other program that a plugin starts, such as ip, is one of its commands.

    bpftrace   version 0.17 or later; loads a small program into the kernel, which sees all processes of the machine. The program uses
               tracepoints only (places in the kernel with fixed names and arguments), no kprobes and no kernel structs, so that it runs
               on any kernel version.
    strace     where bpftrace cannot be used; attaches to the container runtimes and follows their children, and slows them down.

Both backends give the same events. An event is a tuple (kind, time in ns, process ID, ...):

    ("begin", ts, pid, owner, parent, comm)    The process wants to execute a program. owner: the nearest process above it, itself
                                               included, of which an "exec" was reported; 0 if there is none.
    ("word", ts, pid, number, text)            A string of that program: number 0 is the path, 1 to 1023 are the arguments, from ENV on
                                               come the CNI_* variables. Each has 8 numbers, because a long one comes in parts.
                                               From bpftrace, the 17th variable is "uid=N", the user who calls, and, where the kernel
                                               describes its structs (BTF), the 18th "netns=N", the number of its network namespace.
    ("exec", ts, pid, error, in, out, err)     error 0: the program runs, and its descriptors 0, 1 and 2 stand for these streams. A stream
                                               is 8 * PID of the process whose stdin, stdout or stderr it is, plus 1, 2 or 3; 4 more
                                               if that process put it there after its first program. Else error is minus the errno:
                                               the program could not be executed.
    ("data", ts, pid, stream, n, bytes)        n bytes went through a stream. Their contents, up to LIMIT in all, come with this event or
                                               in the next ones, where n is 0.
    ("exit", ts, pid, code)                    code is 256 + exit status, or the number of the signal; 0 if unknown.
    ("lost", 0, 0, n)                          The backend could not keep up and lost n events.

Reading order: the backends (program and parser), `Calls`, which makes calls of events, printing, changes, trace, cache, doctor, the
command line. The sections up to printing are pure; the tests feed them recorded output of the backends.
"""
import argparse
import base64
import contextlib
import errno
import fcntl
import json
import os
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from datetime import datetime, timedelta, timezone

ENV = 1024             # number of the first "word" of the environment
LIMIT = 65536          # bytes kept of each stream of a call
DESCRIPTORS = 13       # file descriptors followed in each process: 0 to 12. bash saves redirected ones as 10 and up
CHUNK = 160            # bytes of a string or buffer in one event: bpftrace 0.17 allows 200, but a probe has only 512 bytes of stack
STREAMS = ("stdin", "stdout", "stderr")
CANARY = "cnisnoop"    # CNI_COMMAND of the test processes that show whether the probes work
RUNTIMES = ("containerd", "crio", "podman", "conmon", "kubelet", "cri-dockerd", "dockerd", "buildkitd", "nomad", "multus-daemon")
# Programs that start another program, in their place or as a child. They are never plugins, even with CNI_COMMAND in their environment.
WRAPPERS = ("env", "nsenter", "setpriv", "unshare", "sudo", "su", "runuser", "chroot", "timeout", "nice", "ionice", "stdbuf", "strace",
            "ip", "flock", "setsid", "sh", "bash", "dash")
PACKAGES = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables", "nsenter": "util-linux"}  # tool: Debian package, if named otherwise


class SnoopError(Exception):
    """An error message for the user: what went wrong, and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# bpftrace: the program and its output
# ---------------------------------------------------------------------------------------------------------------------
# The words in capitals are replaced by values, see bpftrace_program. The maps of the program:
#   @parent[task]           its parent process
#   @in[task]               the nearest process above it, itself included, that was reported as "exec"
#   @fd[process, number]    the stream that this descriptor stands for
#   @code[process]          how it is going to end, as in "exit"
#   @sent[stream]           bytes that went through it
# All others hold a value from one probe to the next. A loop changes maps where it could change variables: the verifier, with which the
# kernel checks a program before it runs, follows every value of a variable through all rounds, and gives up if there are too many.
PROCESSES = """
tracepoint:sched:sched_process_fork {
  @parent[args->child_pid] = pid;
  if (@in[pid]) {
    @in[args->child_pid] = @in[pid]; $i = 0;
    while ($i < DESCRIPTORS) { $s = @fd[pid, $i]; if ($s) { @fd[args->child_pid, $i] = $s; } $i++; }
  }
}
tracepoint:sched:sched_process_exec /@try[args->old_pid]/ {
  delete(@try[args->old_pid]); delete(@code[pid]); $i = 0;
  while ($i < DESCRIPTORS) {
    if ($i > 2) { delete(@fd[pid, $i]); } else { if (!@fd[pid, $i]) { @fd[pid, $i] = pid * 8 + $i + 1 + (@in[pid] == pid ? 4 : 0); } }
    $i++;
  }
  @in[pid] = pid;
  printf("exec|%llu|%d|0|%d|%d|%d", nsecs, pid, @fd[pid, 0], @fd[pid, 1], @fd[pid, 2]);
}
tracepoint:signal:signal_deliver /@in[pid] && args->sa_handler == 0 && !@code[pid]/ {
  $s = args->sig;  // not the signals that by default are ignored, stop the process or continue it
  if ($s < 17 || ($s > 23 && $s < 28) || $s > 28) { @code[pid] = $s; }
}
tracepoint:syscalls:sys_enter_exit_group /@in[pid]/ { if (!@code[pid]) { @code[pid] = 256 + (args->error_code & 255); } }
tracepoint:syscalls:sys_enter_close /@in[pid]/ { delete(@fd[pid, args->fd]); }
tracepoint:sched:sched_process_exit { delete(@parent[tid]); }
tracepoint:sched:sched_process_exit /@in[tid]/ {
  $i = 0;
  if (@in[tid] == tid && pid == tid) {
    printf("exit|%llu|%d|%d", nsecs, pid, @code[pid]);
    while ($i < 8) { delete(@sent[pid * 8 + $i]); $i++; }
  }
  delete(@in[tid]); delete(@code[tid]); $i = 0;
  while ($i < DESCRIPTORS) { delete(@fd[tid, $i]); $i++; }
}"""
# The first loop looks for CNI_COMMAND and notes the address of every CNI_* variable. The last loop prints them in parts, because a string
# holds CHUNK - 1 characters. It may print parts beyond the end of a value; read_words drops these.
EXECUTE = """
tracepoint:syscalls:sys_enter_CALL {
  $p = (uint64)args->envp; $i = 0;
  while ($i < 512) {
    $v = *(uint64*)uptr($p + 8 * $i); $i++;
    if ($v == 0) { break; }
    if (*(uint32*)uptr($v) == FIRST_4) {
      if (*(uint64*)uptr($v) == FIRST_8) { @cni[tid] = 1; }
      @env[tid, @envs[tid]] = $v; @envs[tid]++;
    }
  }
  $cni = @cni[tid];
  if ($cni || @in[pid]) {
    @try[tid] = 1;
    printf("begin|%llu|%d|%d|%d|%s", nsecs, pid, @in[pid], @parent[pid], comm);
    if ($cni) { printf("word|%llu|%d|%d|uid=%d", nsecs, pid, ENV + 128, uid); NETNS }
    printf("word|%llu|%d|0|%s", nsecs, pid, str(uptr(args->filename)));
    $p = (uint64)args->argv; $i = 0;
    while ($i < 32) {
      $v = *(uint64*)uptr($p + 8 * $i); $i++;
      if ($v == 0) { break; }
      printf("word|%llu|%d|%d|%s", nsecs, pid, $i, str(uptr($v)));
    }
  }
  delete(@cni[tid]); delete(@envs[tid]); $k = 0;
  while ($k < 16) {
    $v = @env[tid, $k]; $i = 0;
    if ($v == 0) { break; }
    delete(@env[tid, $k]);
    while ($cni && $i < 5) { printf("word|%llu|%d|%d|%s", nsecs, pid, ENV + $k * 8 + $i, str(uptr($v + $i * STEP))); $i++; }
    $k++;
  }
}
tracepoint:syscalls:sys_exit_CALL /@try[tid]/ { delete(@try[tid]); printf("exec|%llu|%d|%d|0|0|0", nsecs, pid, args->ret); }"""
# The contents of a buffer are read when the call returns: only then are they there, and their length known. Whole chunks come first,
# the rest after the loop, because a length that varies within a loop is much work for the verifier.
TRANSFER = """
tracepoint:syscalls:sys_enter_CALL /@in[pid] && @fd[pid, args->fd]/ {
  @stream[tid] = @fd[pid, args->fd]; @buffer[tid] = (uint64)args->BUFFER;
}
tracepoint:syscalls:sys_exit_CALL /@stream[tid]/ {
  $s = @stream[tid]; $p = @buffer[tid]; $n = args->ret; $in = @in[pid]; $o = 0; $i = 0;
  if ($n > 0 && ($s & 3) DIRECTION) {
    printf("data|%llu|%d|%d|%d|", nsecs, $in, $s, $n);
    $room = @sent[$s] < LIMIT ? LIMIT - @sent[$s] : 0; @sent[$s] = @sent[$s] + $n; $n = $n > $room ? $room : $n;
    LATER
    while ($i < ROUNDS) {
      if ($o + CHUNK > $n) { break; }
      printf("data|%llu|%d|%d|0|%rx", nsecs, $in, $s, buf(uptr($p + $o), CHUNK));
      $o = $o + CHUNK; $i++;
    }
    if ($n > $o) { printf("data|%llu|%d|%d|0|%rx", nsecs, $in, $s, buf(uptr($p + $o), $n - $o)); }
  }
  if (!@left[tid]) { delete(@stream[tid]); delete(@buffer[tid]); }
}"""
# readv and writev have several buffers, an {address, size} each. They are read in a second probe, because the stack of one is too small:
# the first only notes how many bytes are left to read (LATER).
CONTENTS = """
tracepoint:syscalls:sys_exit_CALL /@left[tid]/ {
  $in = @in[pid]; $i = 0;
  while ($i < ROUNDS) {
    $p = @buffer[tid]; $s = *(uint64*)uptr($p + 8) - @offset[tid]; $i++;
    if ($s > @left[tid]) { $s = @left[tid]; }
    if ($s > 0) { printf("data|%llu|%d|%d|0|%rx", nsecs, $in, @stream[tid], buf(uptr(*(uint64*)uptr($p) + @offset[tid]), $s)); }
    if ($s > CHUNK) { $s = CHUNK; }
    @left[tid] = @left[tid] - $s; @offset[tid] = @offset[tid] + $s;
    if (@left[tid] == 0) { break; }
    if (@offset[tid] >= *(uint64*)uptr($p + 8)) { @buffer[tid] = $p + 16; delete(@offset[tid]); }
  }
  delete(@left[tid]); delete(@stream[tid]); delete(@buffer[tid]); delete(@offset[tid]);
}"""
# The next three: the calls that give a stream another descriptor. 0 and 1030 are F_DUPFD and F_DUPFD_CLOEXEC.
DUPLICATE = "\ntracepoint:syscalls:sys_enter_CALL /@in[pid]CONDITION/ { @copied[tid] = @fd[pid, args->FIELD] + 1; }"
OPEN = """
tracepoint:syscalls:sys_enter_CALL /@in[pid]/ {
  $f = str(args->filename, 16); $s = (uint64)0;
  if ($f == "/dev/stdin" || $f == "/dev/fd/0" || $f == "/proc/self/fd/0") { $s = @fd[pid, 0]; }
  if ($f == "/dev/stdout" || $f == "/dev/fd/1" || $f == "/proc/self/fd/1") { $s = @fd[pid, 1]; }
  if ($f == "/dev/stderr" || $f == "/dev/fd/2" || $f == "/proc/self/fd/2") { $s = @fd[pid, 2]; }
  if ($s) { @copied[tid] = $s + 1; }
}"""
COPIED = """
tracepoint:syscalls:sys_exit_CALL /@copied[tid]/ {
  $s = @copied[tid] - 1; delete(@copied[tid]);
  if (args->ret >= 0 && args->ret < DESCRIPTORS) { if ($s) { @fd[pid, args->ret] = $s; } else { delete(@fd[pid, args->ret]); } }
}"""


PROBES = {"read write": TRANSFER, "readv writev": TRANSFER + CONTENTS, "dup dup2 dup3 fcntl": DUPLICATE + COPIED,
          "open openat": OPEN + COPIED, "execve execveat": EXECUTE}


NAMESPACE = "curtask->nsproxy->net_ns->ns.inum"
NETNS = f'printf("word|%llu|%d|%d|netns=%u", nsecs, pid, ENV + 136, {NAMESPACE});'


def bpftrace_program(syscalls, has_btf=False):
    """The text of the bpftrace program. syscalls: those that this kernel has tracepoints for; some kernels lack `open` and `dup2`. has_btf:
    bpftrace knows the kernel's structs, of which nothing but the network namespace is read."""
    parts = [(PROCESSES, "")] + [(text, call) for calls, text in PROBES.items() for call in calls.split() if call in syscalls]
    program = ""
    for text, call in parts:
        values = {
            "NETNS": NETNS if has_btf else "",
            "CALL": call, "DIRECTION": "== 1" if call.startswith("read") else "> 1", "BUFFER": "vec" if call.endswith("v") else "buf",
            "LATER": "@left[tid] = $n; $n = 0;" if call.endswith("v") else "", "FIELD": {"dup": "fildes", "fcntl": "fd"}.get(call, "oldfd"),
            "CONDITION": " && (args->cmd == 0 || args->cmd == 1030)" if call == "fcntl" else "",
            "DESCRIPTORS": DESCRIPTORS, "LIMIT": LIMIT, "ROUNDS": LIMIT // CHUNK + 1, "CHUNK": CHUNK, "STEP": CHUNK - 1, "ENV": ENV,
            "FIRST_4": int.from_bytes(b"CNI_", sys.byteorder), "FIRST_8": int.from_bytes(b"CNI_COMM", sys.byteorder)}
        for word, value in values.items():
            text = text.replace(word, str(value))
        program += text
    return program


EVENT_NUMBERS = {"begin": 4, "word": 3, "data": 4, "exec": 6, "exit": 3}  # numbers in an event; in the first three a text follows


def parse_bpftrace(line):
    """The event in one line (bytes) of `bpftrace -f json`, or None. Text is a str with one character for each byte (Latin-1)."""
    # bpftrace 0.17 writes a byte above 127 as \uffffffXX, which is not JSON; later versions write the byte itself.
    message = parse_object(re.sub(r"\\uffffff([89a-f][0-9a-f])", r"\\u00\1", line.decode("latin-1")))
    if message.get("type") == "lost_events":
        return ("lost", 0, 0, message["data"]["events"])
    if message.get("type") != "printf":
        return None
    kind, rest = message["data"].split("|", 1)
    count = EVENT_NUMBERS[kind]
    fields = rest.split("|", count)
    last = [bytes.fromhex(text.replace("\\x", "")) if kind == "data" else text for text in fields[count:]]
    return (kind, *map(int, fields[:count]), *last)


def parse_object(text):
    """The JSON object in a text; {} if the text is anything else."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text, strict=False)
        return value if isinstance(value, dict) else {}
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# strace: its output
# ---------------------------------------------------------------------------------------------------------------------
# With -xx strace writes every string in hexadecimal, so that no quote or bracket in a string looks like one of strace's own.
STRACE_LINE = re.compile(r"(\d+) +(\d+)\.(\d{6}) (.*)", re.DOTALL)
STRACE_EXEC = re.compile(r'[^"]*("[^"]*"), \[(.*?)\], \[(.*?)\]', re.DOTALL)
HEX_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
OWN_STREAMS = {path: fd for fd, name in zip("012", STREAMS) for path in (f"/dev/{name}", f"/dev/fd/{fd}", f"/proc/self/fd/{fd}")}


def hex_strings(text):
    """The strings in a text that strace -xx wrote, as bytes."""
    return [bytes.fromhex(found.replace("\\x", "")) for found in HEX_STRING.findall(text)]


class Strace:
    """Makes events of lines: feed(line) returns the events that are now known.

    process_of: {thread ID: process ID} of the threads that strace attached to. A new process may appear in the output before the clone()
    that made it; its lines wait until that clone() has returned.
    """

    def __init__(self, process_of):
        self.process_of, self.parent, self.waiting, self.begun = dict(process_of), {}, {}, {}
        self.inside, self.streams = {}, {}  # as @in and @fd in the bpftrace program; descriptors are text here

    def feed(self, line):
        match = STRACE_LINE.match(line)
        if not match:
            return []
        task, ts, text = int(match[1]), int(match[2]) * 10**9 + int(match[3]) * 1000, match[4]
        if task not in self.process_of:
            self.waiting.setdefault(task, []).append(line)
            return []
        if text.endswith("<unfinished ...>"):
            self.begun[task] = text[:-len("<unfinished ...>")]
            return []
        if text.startswith("<... "):
            text = self.begun.pop(task, "") + text.partition(" resumed>")[2]
        if text.startswith(("+++ exited with ", "+++ killed by ")):
            return self.ended(ts, task, text.split()[3])
        name, _, rest = text.partition("(")
        arguments, returned, value = rest.rpartition(" = ")
        handler = self.HANDLERS.get(name)
        if not handler or not returned or (value.startswith(("-1", "?")) and handler is not Strace.execve):
            return []
        return handler(self, ts, self.process_of[task], name, arguments, value)

    def ended(self, ts, task, word):
        pid = self.process_of.pop(task)
        events = []
        if self.inside.get(pid) == pid == task:
            events.append(("exit", ts, pid, 256 + int(word) if word.isdigit() else int(getattr(signal, word, 0))))
        if pid == task:
            for known in (self.inside, self.streams, self.parent):
                known.pop(pid, None)
        return events

    def clone(self, ts, pid, name, arguments, value):
        child = int(re.search(r"(\d+)(?: in strace's PID NS.*)?$", value)[1])  # its process ID as we see it
        self.process_of[child] = pid if "CLONE_THREAD" in arguments else child
        if "CLONE_THREAD" not in arguments:
            self.parent[child] = pid
            if pid in self.inside:
                self.inside[child], self.streams[child] = self.inside[pid], dict(self.streams[pid])
        return [event for line in self.waiting.pop(child, []) for event in self.feed(line)]

    def execve(self, ts, pid, name, arguments, value):
        match = STRACE_EXEC.match(arguments)
        texts = (match[1] + match[2], match[3]) if match else ("", "")
        words, variables = ([text.decode("latin-1") for text in hex_strings(found)] for found in texts)
        variables = [text for text in variables if text.startswith("CNI_")]
        if not words or not (pid in self.inside or any(text.startswith("CNI_COMMAND=") for text in variables)):
            return []
        events = [("begin", ts, pid, self.inside.get(pid, 0), self.parent.get(pid, 0), "")]
        events += [("word", ts, pid, number, text) for number, text in enumerate(words[:ENV])]
        events += [("word", ts, pid, ENV + 8 * number, text) for number, text in enumerate(variables)]
        if value.startswith("-1"):
            return [*events, ("exec", ts, pid, -getattr(errno, value.split()[1], 0), 0, 0, 0)]
        above, again = self.streams.get(pid, {}), 4 * (self.inside.get(pid) == pid)
        self.inside[pid], self.streams[pid] = pid, {fd: above.get(fd) or pid * 8 + int(fd) + 1 + again for fd in "012"}
        return [*events, ("exec", ts, pid, 0, *self.streams[pid].values())]

    def transfer(self, ts, pid, name, arguments, value):
        stream, size = self.streams.get(pid, {}).get(arguments.partition(",")[0], 0), int(value.split()[0])
        if not stream or size <= 0 or (stream & 3 == 1) != name.startswith("read"):
            return []
        return [("data", ts, self.inside[pid], stream, size, b"".join(hex_strings(arguments)))]

    def descriptor(self, ts, pid, name, arguments, value):
        """close, dup*, fcntl, open*: note which descriptor stands for which stream."""
        streams, source, target = self.streams.get(pid, {}), arguments.partition(",")[0], value.split()[0]
        if name == "close":
            streams.pop(source, None)
        elif name != "fcntl" or ", F_DUPFD" in arguments:
            if name.startswith("open"):
                source = OWN_STREAMS.get(b"".join(hex_strings(arguments)[:1]).decode("latin-1"))
            streams[target] = streams.get(source, 0)  # 0: none of the three
        return []

    HANDLERS = {name: handler for names, handler in (
        ("clone clone3 fork vfork", clone), ("execve execveat", execve), ("read readv write writev", transfer),
        ("close dup dup2 dup3 fcntl open openat", descriptor)) for name in names.split()}


# A "?" lets strace ignore a system call that this machine does not have.
STRACE = ("-f", "-q", "-ttt", "--pidns-translation", "-v", "-xx", "-s", str(LIMIT), "-e", f"trace=?{',?'.join(Strace.HANDLERS)}")


# ---------------------------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------------------------


def take(events, before=float("inf")):
    """Remove the events before a time in ns from a list, and return them in order of time.

    bpftrace reads a batch of events of one processor, then one of the next. Only within a batch are they in order.
    """
    events.sort(key=lambda event: event[1])  # stable: events of the same time stay in order
    taken = [event for event in events if event[1] < before]
    del events[:len(taken)]
    return taken


def text_of(latin):
    """A string of an event (a character for each byte) as text; what is not UTF-8 as \\xNN."""
    return latin.encode("latin-1", "replace").decode("utf-8", "backslashreplace")


def read_words(words):
    """(path, arguments, CNI_* variables) of the "word" events {number: text} of one program."""
    arguments = [text_of(words[number]) + "..." * (len(words[number]) == CHUNK - 1) for number in sorted(words) if 0 < number < ENV]
    variables = []
    for first in range(ENV, max(words, default=0) + 1, 8):
        parts = [words.get(number, "") for number in range(first, first + 8)]
        last = next((number for number, part in enumerate(parts) if len(part) < CHUNK - 1), 8)  # only the last part is shorter
        variables.append(text_of("".join(parts[:last + 1])).partition("=")[::2])
    env = {name: value for name, value in variables if name}
    return whole_path(text_of(words.get(0, "")), arguments, env), arguments, env


def whole_path(path, arguments, env):
    """The path of a program. execveat takes a descriptor and a path relative to it, or none; that program is looked for in CNI_PATH."""
    name = os.path.basename(path or "".join(arguments[:1]))
    places = [os.path.join(part, name) for part in env.get("CNI_PATH", "").split(":") if part and name and not os.path.isabs(path)]
    return next(filter(os.path.isfile, places), path or name)


class Process:
    """A process that was reported as "exec". above: the nearest such process above it. is_call: it is a CNI call, as far as is known."""

    def __init__(self, pid, above):
        self.pid, self.above, self.is_call, self.delegates, self.commands = pid, above, False, [], []

    def begin(self, attempt, streams):
        """Note that it executes a program. What another program in the same process read before does not count."""
        self.attempt, self.start, self.path, self.env = attempt, attempt["ts"], attempt["path"], attempt["env"]
        self.streams, self.contents, self.sizes = streams, {1: bytearray(), 2: bytearray(), 3: bytearray()}, Counter()

    def caller(self):
        """The process of the CNI call that this process belongs to, or None."""
        above = self.above
        while above and not above.is_call:
            above = above.above
        return above

    def is_plugin(self):
        """Whether it is a plugin. A program outside CNI_PATH is one if it reads or writes JSON: a shell in which somebody has set
        CNI_COMMAND starts other programs, too."""
        return bool(self.delegates or self.caller() or is_in_cni_path(self.path, self.env)
                    or any(self.contents[kind].lstrip()[:1] == b"{" for kind in (1, 2)))


def is_in_cni_path(path, env):
    return os.path.dirname(path) in [os.path.normpath(part) for part in env.get("CNI_PATH", "").split(":") if part]


class Calls:
    """Makes calls of events: feed(event) returns the call that has ended with it, if it is not a delegate; else None.

    A call is a dict:
      command, plugin, path, argv, env           what was called; env holds the CNI_* variables only
      container_id, netns, ifname, network       for which container and interface, from env, and the name of its network from stdin
      pid, parent                                parent: {pid, comm, elsewhere}, see look_parent; uid, of a caller that is not root
      time, duration_ms                          time: of the begin, in seconds since 1970
      stdin, stdout, stderr                      texts; beside each NAME_size, and NAME_base64 where it is not UTF-8
      exit, signal, error                        exit: None if unknown; signal: a name, or ""; error: why it was not executed, or ""
      running, incomplete                        it has not ended; events of it may be lost
      delegates                                  a list of calls
      commands                                   a list of {time, argv, exit, signal, duration_ms, stdin, stderr}
    look_parent: a function, process ID -> what is known of this process, {} if it is gone. epoch: ns to add to the time of events.
    """

    def __init__(self, look_parent=lambda pid: {}, epoch=0):
        self.look_parent, self.epoch, self.lost = look_parent, epoch, 0
        self.attempts, self.processes = {}, {}
        self.on = {"begin": self.begin, "word": self.word, "exec": self.execute, "data": self.data, "exit": self.end, "lost": self.lose}

    def feed(self, event):
        return self.on[event[0]](*event[1:])

    def lose(self, _ts, _pid, count):
        self.lost += count

    def begin(self, ts, pid, owner, parent, comm):
        self.attempts[pid] = {"ts": ts, "words": {}, "owner": owner, "lost": self.lost, "parent": {"pid": parent, "comm": text_of(comm)}}

    def word(self, ts, pid, number, text):
        if pid in self.attempts:
            self.attempts[pid]["words"][number] = text

    def execute(self, ts, pid, error, *streams):
        attempt, process = self.attempts.pop(pid, None), self.processes.get(pid)
        if not attempt:
            return None  # its "begin" was lost
        attempt["path"], attempt["argv"], attempt["env"] = read_words(attempt["words"])
        uid = int(attempt["env"].pop("uid", 0))
        attempt["env"].pop("netns", "")
        attempt["parent"].update({"uid": uid} if uid else {})
        if error:
            return self.refuse(ts, pid, error, attempt, process)
        if not process or not attempt["owner"]:  # a known process without an owner: the number is used again, the first "exit" was lost
            process = self.processes[pid] = Process(pid, self.processes.get(attempt["owner"]))
        if process.is_call:
            return None  # the interpreter of a script executes in the same process
        process.begin(attempt, streams)
        caller, directory = process.caller(), os.path.dirname(attempt["path"])
        is_place = not caller or is_in_cni_path(attempt["path"], attempt["env"]) or directory == os.path.dirname(caller.path)
        process.is_call = is_place and bool(attempt["env"].get("CNI_COMMAND")) and os.path.basename(attempt["path"]) not in WRAPPERS
        if process.is_call and not caller:
            attempt["parent"] = {**attempt["parent"], **self.look_parent(attempt["parent"]["pid"])}
        return None

    def refuse(self, ts, pid, error, attempt, known):
        """The kernel could not execute the program. That is a call if it is in CNI_PATH; a shell that tries PATH fails often."""
        if (known and known.is_call) or not is_in_cni_path(attempt["path"], attempt["env"]):
            return None
        process = Process(pid, known.above if known else self.processes.get(attempt["owner"]))
        process.begin(attempt, ())
        return self.hand_over(process, {**self.call(process, ts, 0), "error": os.strerror(-error)})

    def data(self, ts, pid, stream, count, data):
        """Add the bytes to the process that read or wrote them, and to those above it that have the same stream, up to its owner."""
        process = self.processes.get(pid)
        while process:
            if stream in process.streams:
                content = process.contents[stream & 3]
                content += data[:LIMIT - len(content)]
                process.sizes[stream & 3] += count
            process = process.above if process.pid != stream >> 3 else None

    def end(self, ts, pid, code):
        process = self.processes.pop(pid, None)
        self.attempts.pop(pid, None)
        if process and process.is_call and process.is_plugin():
            return self.hand_over(process, self.call(process, ts, code))
        if process and process.caller():
            own_stdin = process.contents[1] if process.pid == process.streams[0] >> 3 else b""
            process.caller().commands.append({
                **self.outcome(process, ts, code), "argv": process.attempt["argv"],
                "stdin": own_stdin.decode("utf-8", "backslashreplace"), "stderr": process.contents[3].decode("utf-8", "backslashreplace")})
        return None

    def outcome(self, process, ts, code):
        """What a call and a command have in common."""
        name = signal.Signals(code).name if code in set(signal.Signals) else f"signal {code}" * (0 < code < 256)
        return {"time": (process.start + self.epoch) / 1e9, "exit": code - 256 if code >= 256 else None, "signal": name,
                "duration_ms": round((ts - process.start) / 1e6, 3)}

    def call(self, process, ts, code):
        """The call of a process that ended at a time, as the class describes it."""
        env, attempt = process.env, process.attempt
        call = {**self.outcome(process, ts, code), "command": env.get("CNI_COMMAND", ""), "plugin": os.path.basename(process.path),
                "path": process.path, "argv": attempt["argv"], "env": env, "container_id": env.get("CNI_CONTAINERID", ""),
                "netns": env.get("CNI_NETNS", ""), "ifname": env.get("CNI_IFNAME", ""), "pid": process.pid,
                "parent": attempt["parent"], "error": "", "running": False, "incomplete": self.lost > attempt["lost"]}
        for kind, name in enumerate(STREAMS, 1):
            content, size = bytes(process.contents[kind]), process.sizes[kind]
            call[name] = content.decode("utf-8", "backslashreplace" if size <= len(content) else "replace")
            call[f"{name}_size"] = size
            if size <= len(content) and call[name].encode() != content:
                call[f"{name}_base64"] = base64.b64encode(content).decode()
        call["network"] = str(parse_object(call["stdin"]).get("name", ""))
        for name in ("delegates", "commands"):
            call[name] = sorted(getattr(process, name), key=lambda entry: entry["time"])
        return call

    def hand_over(self, process, call):
        """Give a delegate to its caller, and return any other call."""
        caller = process.caller()
        if caller:
            caller.delegates.append(call)
        return None if caller else call

    def unfinished(self, ts):
        """The calls that have not ended at a time, each with what it has done so far."""
        found = []
        for process in sorted(self.processes.values(), key=lambda process: -process.start):  # delegates before their callers
            if process.is_call and process.is_plugin():
                call = self.call(process, ts, 0)
                call["running"] = not self.lost or bool(self.look_parent(process.pid))  # else its "exit" may be lost
                call["incomplete"] = call["incomplete"] or not call["running"]
                found.append(self.hand_over(process, call))
        return [call for call in found[::-1] if call]


# ---------------------------------------------------------------------------------------------------------------------
# Printing
# ---------------------------------------------------------------------------------------------------------------------
SECRET = r"passw|secret|token|credential|private.?key|preshared|psk|api.?key|access.?key|client.?key|authorization"
# All repetitions have a bound: a plugin's output may be 64 KB of anything, and the search must take no longer than reading it.
SECRET_VALUE = re.compile(rf"""((?:{SECRET})[\w.-]{{0,40}}["']?\s{{0,9}}[=:]\s{{0,9}})("(?:[^"\\]|\\.)*"?|[^\s;,"]+)""", re.IGNORECASE)
BOLD, DIM, RED, GREEN, YELLOW = 1, 2, 31, 32, 33
WIDTH = 110  # of a line of JSON, in characters


def mask(value, is_secret=False):
    """A JSON value in which secrets are ***: what stands below a key that names a secret, and what mask_text finds in a string."""
    if isinstance(value, dict):
        return {key: mask(entry, is_secret or bool(re.search(SECRET, key, re.IGNORECASE))) for key, entry in value.items()}
    if isinstance(value, list):
        return [mask(entry, is_secret) for entry in value]
    if is_secret:
        return "***" if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value
    return mask_text(value) if isinstance(value, str) else value


def mask_text(text):
    """The same for a text: JSON, or lines and words NAME=VALUE. A text without a secret is returned unchanged."""
    try:
        value = json.loads(text)
        masked = mask(value)
    except (ValueError, RecursionError):
        return SECRET_VALUE.sub(r"\g<1>***", text)
    return text if masked == value else json.dumps(masked, ensure_ascii=False)


def mask_call(call):
    """A call in which every secret is ***."""
    masked = {**mask(call), "delegates": [mask_call(entry) for entry in call["delegates"]]}
    for name in STREAMS:
        if masked[name] != call[name]:
            masked.pop(f"{name}_base64", None)
    return masked


def quote(word):
    """A word quoted for bash, and safe to show on a terminal: with control characters as $'\\x1b'."""
    if all(char.isprintable() or char in "\n\t" for char in word):
        return shlex.quote(word)
    escaped = word.encode("utf-8", "replace").decode("latin-1").encode("unicode_escape").decode()  # every byte above 127 is \xNN
    return "$'" + escaped.replace("'", "\\'") + "'"


def replay_line(call):
    """A shell line that repeats the call with the same variables, arguments and bytes. A comment says where that is not possible."""
    words = ["env", *(f"{name}={value}" for name, value in call["env"].items()), call["path"], *call["argv"][1:]]
    if call["parent"].get("elsewhere"):
        words[:0] = ["nsenter", f"--target={call['parent']['pid']}", "--mount", "--net"]
    line = " ".join(quote(word) for word in words)
    if call.get("stdin_base64"):
        line = f"echo {quote(call['stdin_base64'])} | base64 -d | {line}"
    else:
        line = f"printf %s {quote(call['stdin'])} | {line}" if call["stdin"] else f"{line} </dev/null"
    if call["stdin_size"] > LIMIT:
        line = f"# incomplete, stdin had {call['stdin_size']} bytes, only the first {LIMIT} are kept: {line}".replace("\n", "\n# ")
    return line + "  # *** is a masked secret; to see it, trace with --show-secrets" * ("***" in line)


def is_failed(call, with_delegates=True):
    return bool(call["error"] or call["signal"] or call["exit"] or with_delegates and any(map(is_failed, call["delegates"])))


def printable(text):
    """A text without control characters, which could make a terminal do anything: they are shown as \\x1b."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def pretty(value, room):
    """JSON in lines of at most `room` characters, where possible. What fits into one line stays in one line."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) <= max(room, 20) or not isinstance(value, (dict, list)):
        return line
    is_object = isinstance(value, dict)
    names = [json.dumps(key, ensure_ascii=False) + ": " for key in value] if is_object else [""] * len(value)
    entries = [name + pretty(entry, room - 2 - len(name)) for name, entry in zip(names, value.values() if is_object else value)]
    inside = ",\n".join(entries).replace("\n", "\n  ")
    return f"{line[0]}\n  {inside}\n{line[-1]}"


def content_lines(text, size, is_full, is_input=False):
    """The lines that show what went through a stream. Unless is_full, long lines and texts are shortened, and say by how much: of what a
    plugin was given, which is the same for each call of an attachment, there is a line."""
    try:
        conf = json.loads(text)
        if not is_full and isinstance(conf, dict) and isinstance(conf.get("prevResult"), dict):
            ips = [str(ip.get("address")) for ip in objects_in(conf["prevResult"].get("ips"))]
            conf = {**conf, "prevResult": f"... {', '.join(ips)}"}
        lines = [json.dumps(conf, ensure_ascii=False)] if is_input and not is_full else pretty(conf, WIDTH).split("\n")
    except (ValueError, RecursionError):
        lines = text.splitlines()
    if not is_full:
        left_out = [f"... {len(lines) - 50} more lines"] * (len(lines) > 50)
        more = ", whole with --full" if is_input else ""
        lines = [line if len(line) <= WIDTH + 40 else f"{line[:WIDTH]}... ({len(line)} characters{more})" for line in lines[:50]]
        lines += left_out
    return [printable(line) for line in lines] + [f"... {size} bytes in all, the first {LIMIT} are kept"] * (size > LIMIT)


def verdict(call):
    """How a call or command ended, in words."""
    if call.get("error"):
        return f"could not be started: {call['error']}"
    if call.get("running"):
        return "still running"
    if call["signal"]:
        return f"killed by {call['signal']}"
    if call["exit"] is None:
        return "ended, exit status unknown"
    reply = parse_object(call.get("stdout", ""))
    reason = f": error {reply['code']}, {reply.get('msg', '')}" if call["exit"] and "code" in reply else ""
    return f"exit {call['exit']}{reason}" if call["exit"] else "ok"


def pod_of(call):
    """namespace/name of the pod from CNI_ARGS, or ""."""
    args = dict(pair.split("=", 1) for pair in call["env"].get("CNI_ARGS", "").split(";") if "=" in pair)
    return f"{args.get('K8S_POD_NAMESPACE', '')}/{args['K8S_POD_NAME']}" if args.get("K8S_POD_NAME") else ""


def format_call(call, is_full=False, replay="error", is_coloured=False, caller=None):
    """The lines that show a call to people. Its delegates follow, indented."""
    def style(text, code):
        return f"\033[{code}m{text}\033[0m" if is_coloured else text

    kind = parse_object(call["stdin"]).get("plugin")
    what = f"{call['command']} {call['plugin']}" + (f" ({'+'.join(map(str, kind)) if isinstance(kind, list) else kind})" if kind else "")
    start = datetime.fromtimestamp(0, timezone.utc) + timedelta(seconds=call["time"])  # a time out of range is an OverflowError
    head = [style(start.astimezone().strftime("%H:%M:%S.%f")[:-3], DIM), style(printable(what), BOLD)]
    if not caller:
        who = " ".join(filter(None, (pod_of(call), call["container_id"][:13], call["ifname"])))
        network = f"network {call['network']}" if call["network"] else ""
        parent = f"by {call['parent']['comm'] or '?'}[{call['parent']['pid']}]"
        parent += f", uid {call['parent']['uid']}" if call["parent"].get("uid") else ""
        head += map(printable, filter(None, (who, network, parent)))
    end_colour = RED if is_failed(call, False) else YELLOW if call["running"] else GREEN
    lines = ["  ".join([*head, f"{call['duration_ms']:.1f} ms", style(printable(verdict(call)), end_colour)])]
    body = [("incomplete", ["events were lost: the backend could not keep up"])] if call["incomplete"] else []
    body += [("netns", [printable(call["netns"])])] if call["netns"] and not caller else []
    for name in STREAMS:
        same = caller and name == "stdin" and call["stdin"] == caller["stdin"] and call["stdin"]
        shown = same and not is_full and ["same as its caller's"]
        body.append((name, shown or content_lines(call[name], call[f"{name}_size"], is_full, name == "stdin")))
    for entry in call["commands"]:
        if is_full or (is_failed(call) and (entry["exit"] or entry["signal"])):
            shown = [printable(f"{shlex.join(entry['argv'])}  {entry['duration_ms']:.1f} ms  {verdict(entry)}")]
            body.append(("ran", shown + [f"  {printable(line)}" for line in (entry["stdin"] + entry["stderr"]).splitlines()]))
    body += [("changed", [printable(call["changes"])])] if call.get("changes") else []
    for name, shown in body:
        lines += [f"  {style(f'{name if number == 0 else str():<8}', DIM)} {line}" for number, line in enumerate(shown)]
    for entry in call["delegates"]:
        lines += [f"    {line}" for line in format_call(entry, is_full, replay, is_coloured, call)]
    if replay == "always" or (replay == "error" and is_failed(call, False)):
        lines.append(f"  {style('replay  ', DIM)} {replay_line(call)}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Looking at the machine
# ---------------------------------------------------------------------------------------------------------------------


def run(argv, stdin="", environ=(), timeout_s=10):
    """(exit status, stdout, stderr) of a command; 127 if there is no such command, 124 if it takes too long. Never raises."""
    environ = {**os.environ, **dict(environ)}
    try:
        done = subprocess.run(argv, input=stdin, env=environ, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return 124, "", f"it did not end within {timeout_s} s"
    except OSError as error:
        return 127, "", os.strerror(error.errno)
    return done.returncode, done.stdout, done.stderr


def start(argv, **options):
    """A process that runs beside cnisnoop; its stdout is a pipe. The kernel ends it when cnisnoop ends, however that happens. It has a
    session of its own, so that Ctrl-C does not reach it: we end it when it has reported everything."""
    argv = ["setpriv", "--pdeathsig", "INT", *argv]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True, **options)


def need_tools(what, *names):
    missing = [name for name in names if not shutil.which(name)]
    if missing:
        packages = " ".join(sorted({PACKAGES.get(name, name) for name in missing}))
        raise SnoopError(f"{what} needs {', '.join(missing)}: apt-get install {packages}")


def read_text(path):
    """The contents of a small file; "" if it cannot be read."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""


def list_dir(directory):
    """The paths of the files in a directory, in alphabetical order; [] if there is no such directory."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return [os.path.join(directory, name) for name in sorted(os.listdir(directory))]
    return []


def objects_in(value):
    """The JSON objects in a value that should be a list of them."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def look_parent(pid):
    """{comm, elsewhere} of a process, and uid if it is not root's. elsewhere: it sees other files or another network than we do. {} if the
    process is gone."""
    with contextlib.suppress(OSError):
        spaces = [os.readlink(f"/proc/{where}/ns/{kind}") for where in (pid, "self") for kind in ("mnt", "net")]
        uid = os.stat(f"/proc/{pid}").st_uid
        own = {"comm": read_text(f"/proc/{pid}/comm").strip(), "elsewhere": spaces[:2] != spaces[2:]}
        return {**own, "uid": uid} if uid else own
    return {}


def is_gone(pid):
    """Whether a process that a backend reported has ended. False in a PID namespace other than the first, whose number is in the kernel's
    include/linux/proc_ns.h: /proc there has other process IDs than bpftrace reports."""
    return os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC and not os.path.exists(f"/proc/{pid}")


# ---------------------------------------------------------------------------------------------------------------------
# Changes
# ---------------------------------------------------------------------------------------------------------------------
# `ip monitor` and the like tell what changes in a network namespace: in that of the host, and in the pod's from its first call on. nft's
# monitor says by which process, so its changes belong to the call that started that process. Of other changes monitors do not know who made
# them: they belong to the call during which they came, and where others ran in that namespace at the same time, that is said. What the
# result of an ADD is the first to name was made by that ADD, and goes with that container, however late the kernel or a monitor is.
STATE_SCRIPT = "ip -json address; ip -json route; ip -json -6 route; tc -json qdisc"
SETTINGS = {"mtu": r" mtu (\d+) ", "txqlen": r" qlen (\d+)", "mac": r" link/ether ([\da-f:]+)"}  # of a link, in a line of `ip monitor`
HOST_PORT = re.compile(r"rule .* (tcp|udp|sctp) dport (\d+) .*dnat .*to (\S+:\d+)( .*)?")
LATE_S = 0.05  # a monitor reports a little late
QUIET_S = 2  # so long after its last call a pod is watched
HOLD_S = 0.5  # so long a call waits to be judged: until then it is known whether another began right after it
MONITORS = {  # tool: its arguments, then for each kind of change the pattern of its lines
    "ip": ("-ts -d -o monitor link address route",
           ("link", r"\d+: (?P<name>[^:@\s]+).* qdisc .*"), ("address", r"\d+: \S+ +inet6? (?!fe80:|::1/)(?P<name>\S+) .*"),
           ("route", r"(?:unicast )?(?!.* table local |ff00:|fe80:)(?P<name>default|[\da-f.:]+(?:/\d+)?) (?:via|dev|nhid|proto|table) .*")),
    "tc": ("-ts monitor", ("qdisc", r"qdisc (?!noqueue)(?P<name>\w+) .* dev \S+.*")),
    "nft": ("-a monitor", ("nft", r"(?:element|rule|chain|set|map|table|counter) (?P<name>\w+ \S+)(?: .*)?")),
}


def parse_monitor(tool, line):
    """(sign, kind, name) of the object in a monitor's line: sign 1 if it was added, -1 if it was deleted. None for other lines."""
    match = re.fullmatch(r"(Deleted |deleted |delete )?(?:add )?(.*?) *", line)
    for kind, pattern in MONITORS[tool][1:]:
        found = re.fullmatch(pattern, match[2])
        if found:
            word = re.search(r"maxmtu \d+[^\\]*\\\s+(\w+)", line) if kind == "link" else None
            return -1 if match[1] else 1, word[1] if word else kind, found["name"]
    return None


def parse_state(text):
    """{(kind, name, interface)} from the output of STATE_SCRIPT, a JSON list in each line. Leaves out what every namespace has."""
    items = set()
    for line in text.splitlines():
        for row in json.loads(line):
            name = row.get("ifname") or row.get("dev", "")
            if "kind" in row:
                items.add(("qdisc", row["kind"], name))
            elif "dst" in row:
                items.add(("route", row["dst"], name))
            elif "addr_info" in row:
                addresses = [f"{entry['local']}/{entry['prefixlen']}" for entry in row["addr_info"]]
                items |= {*[("link", name, name)] * (name != "lo"), *(("address", address, name) for address in addresses)}
    return {item for item in items if item[1] != "noqueue" and not item[1].startswith(("fe80:", "ff00:"))}


def parse_settings(line):
    """{setting: value} of a link, from its line of `ip monitor`."""
    found = {name: re.search(pattern, line) for name, pattern in SETTINGS.items()}
    return {name: match[1] for name, match in found.items() if match}


def describe_changes(balance):
    """"veth mn12, 2 routes; gone: ..." from {(kind, name, ...): how often it was added, minus how often it was deleted}."""
    sides = []
    for sign in (1, -1):
        words = Counter()
        for (kind, name, *_), count in balance.items():
            word = {"address": name, "setting": name, "route": "route", "nft": f"rules in {name}"}.get(kind, f"{kind} {name}")
            words[kind == "route", word] += max(count * sign, 0)
        sides.append(", ".join(f"{count} {word}{'s' * (count > 1)}" if is_counted else word
                               for (is_counted, word), count in sorted(words.items(), key=lambda item: item[0][0]) if count))
    return "; ".join(filter(None, (sides[0], sides[1] and f"gone: {sides[1]}")))


def open_netns(path):
    """A descriptor of the network namespace at a path; None for anything else. Any user can name any path: to open a FIFO would wait, and
    to open a device may do something."""
    with contextlib.suppress(OSError, ValueError):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(place).st_mode):
                handle = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                with contextlib.suppress(OSError):
                    if fcntl.ioctl(handle, 0xB703) == 0x40000000:  # NS_GET_NSTYPE, CLONE_NEWNET: ioctl_ns(2)
                        return handle
                os.close(handle)
        finally:
            os.close(place)
    return None


def is_elsewhere(pid, number="", unless_known=False):
    """Whether a process is in another network namespace than this one: the one of that number, if the backend tells it. unless_known: the
    answer if it is gone already, or /proc does not show it: that of a PID namespace has other process IDs than bpftrace reports."""
    with contextlib.suppress(OSError, ValueError):
        return (int(number) if number else os.stat(f"/proc/{pid}/ns/net").st_ino) != os.stat("/proc/self/ns/net").st_ino
    return unless_known


class Monitor:
    """What changes in a network namespace: `lines`, of (time, process ID or 0, (sign, kind, name)). enter: words that lead into
    it; handle: a descriptor that they name, closed at the end. since: when it began; first: what was there; before: what was there when
    an earlier one of that namespace ended."""

    handle = None

    def __init__(self, enter=()):
        self.enter, self.lines, self.children, self.settings, self.rules = list(enter), deque(maxlen=100_000), [], {}, {}
        self.first, self.links, self.since, self.is_ready, self.before = set(), set(), float("inf"), threading.Event(), set()
        for tool, (arguments, *_) in MONITORS.items():
            self.children.append(start([*enter, tool, *arguments.split()], stderr=subprocess.DEVNULL, text=True, errors="replace"))
        threading.Thread(target=self.begin, daemon=True).start()  # in a thread: whoever made it has events to read

    def begin(self):
        self.settings = self.look_settings()
        # Until the monitors listen: what was there before is in the first look, what comes after is in their lines.
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline and any(read_text(f"/proc/{child.pid}/comm").strip() not in MONITORS for child in self.children):
            time.sleep(0.002)  # setpriv and nsenter still run
        time.sleep(0.02)
        self.since, self.first = time.time(), self.look()
        self.links = {"lo", *(name for kind, name, _ in self.first if kind == "link")}
        self.settings = {**self.look_settings(), **self.settings}  # what has changed since is told by check
        if not self.enter:
            self.look_rules()
        self.is_ready.set()
        for tool, child in zip(MONITORS, self.children):
            read = self.read_nft if tool == "nft" else self.read
            threading.Thread(target=read, args=(tool, child.stdout), daemon=True).start()

    def look(self):
        _, stdout, _ = run([*self.enter, "sh", "-c", STATE_SCRIPT])
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            return parse_state(stdout)
        return set()

    def look_settings(self):
        """{name of a link: its settings}."""
        lines = run([*self.enter, "ip", "-d", "-o", "link"])[1].splitlines()
        return {re.split(r"[:@ ]+", line)[1]: parse_settings(line) for line in lines}

    def check(self, when):
        """Note the settings that changed without a word from the kernel, such as the length of a queue, until a call ended."""
        self.is_ready.wait(0.2)
        for name, after in self.look_settings().items():
            self.lines.extend((when, 0, item) for item in self.changed(name, after))

    def changed(self, name, after):
        """The items of a link's settings. A monitor's line does not have all of them."""
        before = self.settings.get(name, {})
        self.settings[name] = {**before, **after}
        pairs = [(key, value, after.get(key, value)) for key, value in before.items()]
        return [(1, "setting", f"{key} of {name} {old} -> {new}") for key, old, new in pairs if old != new]

    def look_rules(self):
        table = chain = ""
        for line in run(["nft", "-a", "list", "ruleset"])[1].splitlines():
            words = line.split()
            table = " ".join(words[1:3]) if words[:1] == ["table"] else table
            chain = words[1] if words[:1] == ["chain"] else chain
            self.host_port(f"add rule {table} {chain} {line.strip()}")

    def read(self, tool, lines):
        for line in lines:
            stamp, _, rest = line.rstrip("\n").rpartition("] ") if line.startswith("[") else ("", "", line.rstrip("\n"))
            when = datetime.fromisoformat(stamp[1:]).timestamp() if stamp else time.time()
            item = parse_monitor(tool, rest)
            if item:
                self.lines.extend((when, 0, news) for news in self.news(*item, rest))

    def news(self, sign, kind, name, line):
        """The items of a monitor's line. A link is reported whenever something about it changes."""
        if kind in ("address", "route", "qdisc"):
            return [(sign, kind, name)]
        changed = self.changed(name, parse_settings(line))
        if sign < 0:
            del self.settings[name]
        if (sign > 0) == (name in self.links):
            return changed
        self.links ^= {name}
        return [(sign, kind, name)]

    def read_nft(self, tool, lines):
        """A transaction's lines, then which process it was of."""
        items = []
        for line in lines:
            found = re.match(r"# new generation \d+ by process (\d+)", line)
            if found:
                self.lines.extend((time.time(), int(found[1]), item) for item in items)
                items = []
            else:
                items += filter(None, [self.host_port(line.strip()) or parse_monitor(tool, re.sub(r" # handle \d+$", "", line.strip()))])

    def host_port(self, line):
        """(sign, kind, name) of a host port in a line about a rule, None for other rules. A deletion names the rule's handle alone."""
        words, found = line.split(), HOST_PORT.search(line)
        place = (*words[2:5], words[-1])
        if words[:1] == ["add"] and found:
            self.rules[place] = f"{found[2]}/{found[1]} -> {found[3]}"
            return 1, "host port", self.rules[place]
        return (-1, "host port", self.rules.pop(place)) if words[:1] == ["delete"] and place in self.rules else None

    def close(self):
        for child in self.children:
            child.kill()
            child.wait()
        if self.handle is not None:
            os.close(self.handle)


class Changes:
    """What calls change. early(event) has to be called with every event as soon as it arrives, of(call) HOLD_S after a call has ended.

    epoch: as in Calls.
    """

    def __init__(self, epoch):
        need_tools("--changes", "ip", "tc", "nft", "nsenter")
        self.epoch, self.host = epoch, Monitor()
        # By process ID: the words of a program that begins; the process that started it; a call, see exec. By the inode of a pod's
        # namespace: its Monitor; last, with the container ID: what was there at its end. makers: by the inode of a pod's namespace, 0 for
        # the host, and the name of a link or an address there: {container ID: process ID of the ADD whose result was the first to name it}.
        self.begun, self.above, self.spans, self.pods, self.last, self.makers = {}, {}, {}, {}, {}, {}

    def close(self):
        for monitor in [self.host, *self.pods.values()]:
            monitor.close()

    def early(self, event):
        kind, ts, pid = event[:3]
        if kind == "begin":
            self.above[pid] = event[3]  # programs that a plugin starts
            if not event[3]:
                self.begun[pid] = (event[4], {})
        elif kind == "word" and pid in self.begun:
            self.begun[pid][1][event[3]] = event[4]
        elif kind == "word" and pid in self.spans and event[4].startswith("netns="):
            self.spans[pid]["elsewhere"] = is_elsewhere(pid, number=event[4][6:])
        elif kind == "exec" and pid in self.begun:
            self.begin((ts + self.epoch) / 1e9, pid, *self.begun.pop(pid))
        elif kind == "exec" and pid in self.spans and not self.spans[pid]["number"]:  # what a wrapper, such as nsenter, has executed
            self.spans[pid]["elsewhere"] = is_elsewhere(pid, unless_known=self.spans[pid]["elsewhere"])
        elif kind == "exit" and pid in self.spans:
            span = self.spans[pid]
            span["end"] = (ts + self.epoch) / 1e9
            if span["inode"] in self.pods:
                self.pods[span["inode"]].check(span["end"])

    def begin(self, when, pid, parent, words):
        path, _, env = read_words(words)
        if env.get("CNI_COMMAND", "").startswith(CANARY):
            return
        number = env.get("netns", "")
        elsewhere = is_elsewhere(pid, number) if number or os.path.basename(path) not in WRAPPERS else False
        span = {"begin": when, "end": None, "elsewhere": elsewhere, "number": number, "inode": 0, "monitor": None,
                "container_id": env.get("CNI_CONTAINERID", ""), "what": f"{env.get('CNI_COMMAND')} {env.get('CNI_CONTAINERID', '')[:13]}"}
        self.spans[pid], netns = span, env.get("CNI_NETNS", "")
        places = [f"/proc/{parent}/root{netns}", *[netns] * (not elsewhere)]  # elsewhere the same path may be another pod's
        paths = [path for path in places if netns.startswith("/") and os.path.exists(path)]
        handle = open_netns(paths[0]) if paths else None
        if handle is not None:
            span["inode"] = os.fstat(handle).st_ino
            if span["inode"] not in self.pods:
                span["monitor"] = self.pods[span["inode"]] = Monitor(["nsenter", f"--net=/proc/{os.getpid()}/fd/{handle}"])
                span["monitor"].handle = handle
                span["monitor"].before = self.last.pop((span["inode"], env.get("CNI_CONTAINERID")), set())
            else:
                os.close(handle)

    def is_below(self, pid, other):
        """Whether a process was started by another one, or is it."""
        for _ in range(10):
            if pid == other:
                return True
            pid = self.above.get(pid, 0)
        return False

    def note(self, call):
        """Note what a result names, as soon as the call has ended: others that still run are judged by it."""
        inode = self.spans.get(call["pid"], {"inode": 0})["inode"]
        before, result = parse_object(call["stdin"]).get("prevResult"), parse_object(call["stdout"])
        names, known = ([*((inode if link.get("sandbox") else 0, str(link.get("name"))) for link in objects_in(one.get("interfaces"))),
                         *((inode, str(ip.get("address"))) for ip in objects_in(one.get("ips")))]
                        for one in (result, before if isinstance(before, dict) else {}))
        for name in set(names) - set(known) if call["command"] == "ADD" and not call["exit"] else ():
            self.makers.setdefault(name, {})[call["container_id"]] = call["pid"]
        while len(self.makers) > 10_000:
            del self.makers[next(iter(self.makers))]

    def of(self, call):
        """What a call changed, in words; "" for nothing."""
        span = self.spans.get(call["pid"])
        if not span:
            return ""
        begin, end = call["time"], call["time"] + call["duration_ms"] / 1000
        others = [other for pid, other in self.spans.items() if not self.is_below(call["pid"], pid)]  # nsenter may have started it
        near = [other for other in others if other["elsewhere"] == span["elsewhere"]]
        beside = [other["what"] for other in near if other["begin"] <= end and (other["end"] or end) >= begin]
        words = {"host": self.during(self.host, call, others, beside)}
        if span["elsewhere"]:
            words["host"] = f"unknown, its caller has another: nsenter --net=/proc/{call['parent']['pid']}/ns/net {sys.argv[0]} ..."
        monitor = self.pods.get(span["inode"])
        if monitor and monitor.is_ready.wait(2):
            own = [other for other in others if other["inode"] == span["inode"]]
            # The first plugin finds no interface. What of it was there when the pod's monitor began, it made before.
            is_first = call["command"] == "ADD" and not call["exit"] and "prevResult" not in parse_object(call["stdin"])
            found = {item[:2]: 1 for item in monitor.first if span["monitor"] and is_first and item[2] == call["ifname"]}
            found.update({item[:2]: -1 for item in monitor.before - monitor.first if span["monitor"] and call["command"] == "DEL"})
            words["pod"] = self.during(monitor, call, own, [], found)
            if not words["pod"] and begin < monitor.since and not call["exit"] and not is_first and not monitor.before:
                words["pod"] = "not seen, the call was over too soon" if end < monitor.since else ""
        return "; ".join(f"{where}: {text}" for where, text in words.items() if text)

    def during(self, monitor, call, others, beside, found=()):
        """What a monitor told of a call, in words. others: the spans of the calls that may have begun right after it; beside: the names of
        those that ran at the same time; found: what else it did, {(kind, name): 1}."""
        begin, end = call["time"], call["time"] + call["duration_ms"] / 1000
        late = min([end + LATE_S, *(other["begin"] for other in others if other["begin"] > end)])
        balance, settings, is_sure = Counter(found), {}, True
        inode = 0 if monitor is self.host else self.spans[call["pid"]]["inode"]
        for when, pid, (sign, kind, name) in list(monitor.lines):
            makers = self.makers.get((inode, name.split()[2] if kind == "setting" else name), {})
            is_made = len(makers) == 1 and kind not in ("setting", "nft", "host port") and sign > 0
            is_own = self.is_below(pid, call["pid"]) if pid else not is_made or makers.get(call["container_id"]) == call["pid"]
            is_own = is_own and (not makers or call["container_id"] in makers)
            if not is_own or not begin <= when <= (end + QUIET_S if pid or is_made else late):
                continue
            if kind == "setting":
                what, old, _, new = name.rsplit(" ", 3)
                settings[what] = (settings.get(what, (old,))[0], new)
            elif pid or balance[(kind, name)] != sign:
                balance[(kind, name)] += sign
            is_sure = is_sure and bool(pid or not beside or len(makers) == 1)
        balance.update({("setting", f"{what} {old} -> {new}"): 1 for what, (old, new) in settings.items() if old != new})
        text = describe_changes(balance)
        return text if is_sure or not text else f"{text} (at the same time as {', '.join(sorted(set(beside)))})"

    def forget(self):
        """Stop watching pods that are quiet: their namespaces last as long as somebody watches them."""
        now = time.time()
        for inode in list(self.pods):
            spans = [span for span in self.spans.values() if span["inode"] == inode]
            if all(span["end"] and span["end"] < now - QUIET_S for span in spans):
                monitor = self.pods.pop(inode)
                self.last = {**dict(list(self.last.items())[-1000:]), (inode, spans[-1]["container_id"] if spans else ""): monitor.look()}
                monitor.close()
        for pid in [pid for pid, span in self.spans.items() if span["end"] and span["end"] < now - 60]:
            del self.spans[pid]


# ---------------------------------------------------------------------------------------------------------------------
# trace
# ---------------------------------------------------------------------------------------------------------------------
CLOCKS = {"bpftrace": time.CLOCK_BOOTTIME, "strace": time.CLOCK_REALTIME}  # of the times in their events
TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


def plan_tracefs(argv):
    """The command, with a tracefs (the file system that lists the tracepoints) mounted for it alone if the machine has none mounted."""
    if any(os.path.isdir(f"{path}/events") for path in TRACEFS):
        return argv
    script = f'mount -t tracefs tracefs {TRACEFS[0]} && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *argv]


def bpftrace_backend(_options):
    """(argv, environment, parse(line) -> events) of bpftrace. SnoopError with the reason if it cannot be used here."""
    need_tools("tracing", "bpftrace")
    version = re.search(r"(\d+)\.(\d+)", run(["bpftrace", "--version"], timeout_s=60)[1])
    if not version or (int(version[1]), int(version[2])) < (0, 17):
        raise SnoopError(f"bpftrace {version[0] if version else '?'} is too old, 0.17 is needed")
    code, listed, stderr = run(plan_tracefs([shutil.which("bpftrace"), "-l", "tracepoint:syscalls:sys_enter_*"]), timeout_s=60)
    syscalls = re.findall(r"sys_enter_(\w+)", listed)
    if code or "execve" not in syscalls:
        reason = (stderr.strip().splitlines() or ["no tracepoint syscalls:sys_enter_execve"])[-1]
        raise SnoopError(f"this kernel has no tracepoints for system calls that bpftrace can use ({reason})")
    environ = {"BPFTRACE_MAP_KEYS_MAX": "65536", "BPFTRACE_MAX_MAP_KEYS": "65536", "BPFTRACE_PERF_RB_PAGES": "1024",
               "BPFTRACE_STRLEN": str(CHUNK), "BPFTRACE_MAX_STRLEN": str(CHUNK)}  # the names before 0.20, and since
    # A kernel may describe its structs to a bpftrace that was built without BTF.
    has_btf = run(plan_tracefs([shutil.which("bpftrace"), "-e", f"BEGIN {{ $probe = {NAMESPACE}; exit(); }}"]), timeout_s=60)[0] == 0
    argv = plan_tracefs([shutil.which("bpftrace"), "--no-warnings", "-f", "json", "-e", bpftrace_program(syscalls, has_btf)])
    return argv, environ, lambda line: filter(None, [parse_bpftrace(line)])


def strace_backend(options):
    """The same for strace."""
    need_tools("tracing without bpftrace", "strace")
    pids = options.pid or [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and read_text(f"/proc/{pid}/comm").strip() in RUNTIMES]
    if not pids:
        raise SnoopError(f"strace: no container runtime is running (looked for {', '.join(RUNTIMES)}); name its process with --pid PID")
    process_of = {int(os.path.basename(task)): pid for pid in pids for task in list_dir(f"/proc/{pid}/task")}
    if not set(pids) <= set(process_of):
        raise SnoopError(f"--pid: there is no such process: {', '.join(str(pid) for pid in pids if pid not in process_of)}")
    parser = Strace(process_of)
    argv = [shutil.which("strace"), *STRACE, "-o", "/proc/self/fd/1", *(word for pid in pids for word in ("-p", str(pid)))]
    return argv, {}, lambda line: parser.feed(line.decode("latin-1"))


def choose_backend(options):
    """(name, argv, environment, parse) of the backend that the user named, else of the first that can be used."""
    if os.geteuid():
        raise SnoopError(f"trace needs root: sudo {shlex.join(sys.argv)}")
    reasons = []
    for name, backend in (("bpftrace", bpftrace_backend), ("strace", strace_backend)):
        if options.backend in (None, name):
            try:
                return (name, *backend(options))
            except SnoopError as error:
                reasons.append(str(error))
    raise SnoopError("; ".join(reasons))


class Tracer:
    """A running backend. events() yields its events in order of time, and None whenever there is time for other things.

    early: a function that is called with each event as it arrives, not yet in order; or None.

    To know that the probes work, and up to which time all events have arrived, the tracer starts test processes ("canaries", see CANARY)
    and waits until the backend reports their end. They do not appear among the events.
    """

    def __init__(self, name, argv, environ, parse, early):
        self.name, self.parse, self.early = name, parse, early
        self.is_ready, self.is_asked, self.stopped_at, self.deadline = False, False, 0, time.monotonic() + 300
        # Of the test processes: {process ID: name} of those reported, the names of those not yet reported to end, the time of their start.
        self.canaries, self.awaited, self.woken_at = {}, set(), 0
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the backend
        self.process = start(argv, stderr=self.stderr, env={**os.environ, **environ})

    def now(self):
        return time.clock_gettime_ns(CLOCKS[self.name])

    def stop(self):
        """Let events() end as soon as the backend has reported what happened until now."""
        self.stopped_at = self.stopped_at or self.now()

    def ask(self):
        """Ask the backend to end. Only once: at the second signal, bpftrace throws away what it has not yet read."""
        if not self.is_asked:
            self.is_asked = True
            self.process.send_signal(signal.SIGINT)

    def close(self):
        self.ask()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        self.process.kill()  # does nothing if it has ended
        self.process.wait()

    def events(self):
        waiting, rest, data, out = [], b"", None, self.process.stdout.fileno()
        while data != b"" and not (self.stopped_at and self.now() - self.stopped_at > 15 * 10**9):
            data = os.read(out, 1 << 20) if select.select([out], [], [], 0.1)[0] else None
            *lines, rest = (rest + (data or b"")).split(b"\n")
            for line in lines:
                for event in survive(lambda line=line: list(self.parse(line))) or ():
                    survive(self.collect, event, waiting)
            settled = float("inf") if self.name == "strace" else self.settle(waiting, data is None)
            yield from take(waiting, settled)
            yield None
            if self.stopped_at and (not self.is_ready or (data is None and settled > self.stopped_at)):
                self.ask()
            elif not self.is_ready:
                self.get_ready()
        yield from take(waiting)

    def collect(self, event, waiting):
        """Append an event to those that wait, unless it is of a test process."""
        kind, _, pid = event[:3]
        if kind == "word" and event[4].startswith(f"CNI_COMMAND={CANARY}"):
            self.canaries[pid] = event[4].partition("=")[2]
        if kind == "exit" and pid in self.canaries:
            self.is_ready = True
            self.awaited.discard(self.canaries.pop(pid))
            waiting[:] = [other for other in waiting if other[2] != pid]
            return
        waiting.append(event)
        if self.early:
            self.early(event)

    def settle(self, waiting, is_idle):
        """The time in ns up to which all events have arrived; 0 if unknown. bpftrace reads the processors one after the other, and may be
        delayed. But the events of one processor come in order: when a test process on each of them is reported to have ended, all that
        happened before the start of these processes has been reported."""
        if self.awaited and self.now() - self.woken_at < 5 * 10**9:
            return 0
        settled = self.woken_at
        if self.is_ready and (waiting or self.stopped_at > settled) and (is_idle or self.now() - settled > 10**9):
            self.wake()
        return settled

    def wake(self):
        """Start a test process on each processor. This also brings reports of lost events, which the kernel sends only with the next
        event of that processor."""
        self.woken_at = self.now()
        places = {f"{CANARY}-{self.woken_at}-{processor}": processor for processor in os.sched_getaffinity(0)}
        self.awaited = set(places)
        threading.Thread(target=start_on, args=(places,), daemon=True).start()  # in a thread, because we have to go on reading

    def get_ready(self):
        """Find out whether the backend works already. The user is not told that it watches before it does."""
        if self.name == "strace":
            traced = [pid for word, pid in zip(self.process.args, self.process.args[1:]) if word == "-p"]
            self.is_ready = not any("TracerPid:\t0\n" in read_text(f"/proc/{pid}/status") for pid in traced)
        elif self.now() - self.woken_at > 10**9 // 2:
            self.wake()
        if time.monotonic() > self.deadline:
            raise SnoopError(f"{self.name} reports nothing, not even a test process: {self.said()}")

    def said(self):
        """The last lines that it wrote to stderr, without a warning that bpftrace always prints."""
        self.stderr.seek(0)
        lines = [line for line in self.stderr.read().decode(errors="replace").splitlines() if line.strip() and "RLIMIT_MEMLOCK" not in line]
        return " | ".join(lines[-4:])[-600:] or "it printed no reason"


def start_on(places):
    """Run a test process on each processor of {name: processor}. A process inherits the affinity of the thread that starts it."""
    for name, processor in places.items():
        os.sched_setaffinity(0, {processor})
        run(["true"], environ={"CNI_COMMAND": name})


def is_wanted(call, options):
    """Whether a call passes the filters. A call passes, too, if one of its delegates does."""
    conf = parse_object(call["stdin"])
    own = ((not options.plugin or options.plugin in (call["plugin"], conf.get("plugin"), conf.get("type")))
           and (not options.command or options.command.upper() == call["command"])
           and (not options.container or call["container_id"].startswith(options.container) or pod_of(call).endswith(options.container))
           and (not options.failed or is_failed(call)))
    return own or any(is_wanted(entry, options) for entry in call["delegates"])


def show(call, options, counts, file=None):
    """Print a call as the options say, and write it to a file."""
    if not is_wanted(call, options):
        return
    call = call if options.show_secrets else mask_call(call)
    counts.update(calls=1, failed=int(is_failed(call)))
    line = json.dumps(call)
    if file:
        print(line, file=file, flush=True)
    if not options.json:
        is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        line = "\n".join([*format_call(call, options.full, options.replay, is_coloured), ""])
    print(line.encode("utf-8", "replace").decode(), flush=True)


def tell(text):
    print(f"cnisnoop: {text}", file=sys.stderr, flush=True)


def survive(act, *arguments):
    """act(*arguments), or None after an error. Any user of the machine can make a call of any shape: it must not end the trace."""
    try:
        return act(*arguments)
    except BrokenPipeError:
        raise
    except Exception as error:
        tell(printable(f"left out what cannot be read: {type(error).__name__}: {error}")[:300])
        return None


def trace(options):
    """Show calls until Ctrl-C. Returns the exit status."""
    name, argv, environ, parse = choose_backend(options)
    epoch = time.time_ns() - time.clock_gettime_ns(CLOCKS[name])
    calls, counts, file = Calls(look_parent, epoch), Counter(), None
    with contextlib.ExitStack() as opened:
        if options.out:
            file = opened.enter_context(open(options.out, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)))
        changes = opened.enter_context(contextlib.closing(Changes(epoch))) if options.changes else None
        tracer = opened.enter_context(contextlib.closing(Tracer(name, argv, environ, parse, changes and changes.early)))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: tracer.stop())
        watched = watch(tracer, calls, changes.forget if changes else None)
        for call in held(watched, HOLD_S, lambda call: survive(changes.note, call)) if changes else filter(None, watched):
            survive(lambda call=call: show({**call, "changes": changes.of(call)} if changes else call, options, counts, file))
    if tracer.process.returncode and not tracer.stopped_at:
        raise SnoopError(f"{name} ended: {tracer.said()}")
    lost = f", {calls.lost} events lost" * bool(calls.lost)
    tell(f"{counts['calls']} call{'s' * (counts['calls'] != 1)}, {counts['failed']} failed{lost}")
    return 0


def held(calls, hold_s, note=lambda call: None):
    """Yield calls, each hold_s after it has come and note(call) was called; calls also yields None when time passes."""
    waiting = deque()
    for call in calls:
        if call:
            note(call)
            waiting.append((time.monotonic() + hold_s, call))
        while waiting and waiting[0][0] <= time.monotonic():
            yield waiting.popleft()[1]
    yield from (call for _, call in waiting)


def watch(tracer, calls, idle=None):
    """Yield calls until the backend ends, and None now and then, after idle(). Tells the user, once each, what to know meanwhile."""
    told = set()
    for event in tracer.events():
        call = survive(calls.feed, event) if event else None
        if event is None and idle:
            idle()
        if call or event is None:
            yield call
        if event is None and tracer.is_ready:
            lost = f"{calls.lost} events lost: {tracer.name} cannot keep up, some calls are not complete"
            for text in [f"watching with {tracer.name}; Ctrl-C ends it", *[lost] * bool(calls.lost), *slow_calls(calls, tracer.now())]:
                if text not in told:
                    told.add(text)
                    tell(text)
    yield from calls.unfinished(tracer.now())


def slow_calls(calls, now):
    """A line for each call that has run for more than five seconds. A call that hangs never ends, so nothing else would show it."""
    for pid, process in calls.processes.items():
        if process.is_call and not process.caller() and now - process.start > 5 * 10**9 and not is_gone(pid):  # gone: its "exit" was lost
            words = (process.env.get("CNI_COMMAND", ""), process.path, process.env.get("CNI_CONTAINERID", "")[:13], f"process {pid}")
            yield f"running for 5 s: {printable(' '.join(words))}"


def view(options):
    """Show a recording again."""
    with open(options.file, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                show(parse_object(line), options, Counter())
            except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
                raise SnoopError(f"{options.file}, line {number}: not a call as `trace --out` writes it: {error!r}") from error
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# cache
# ---------------------------------------------------------------------------------------------------------------------
# libcni, the library with which runtimes call plugins, stores the result of each ADD in a file, for the CHECK and DEL of that attachment.
# An attachment is one interface of one container in one network.


def look_state(netns):
    """Whether an attachment is in use, by the path of its network namespace. A namespace that was unmounted leaves an ordinary file."""
    if not netns:
        return "not known"
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL byte
        if os.stat(netns).st_dev == os.stat("/proc/self/ns/net").st_dev:
            return "in use"
    return "stale: its namespace is gone"


def look_cache(directory):
    """The rows of `cache`: [{path, network, container_id, ifname, netns, addresses, age_s, state}], one for each of libcni's files."""
    rows = []
    for path in list_dir(directory):
        value = parse_object(read_text(path))
        result = value.get("result") if isinstance(value.get("result"), dict) else {}
        sandboxes = [entry["sandbox"] for entry in objects_in(result.get("interfaces")) if entry.get("sandbox")]
        netns = str(value.get("netns") or next(iter(sandboxes), ""))
        addresses = [str(ip.get("address")) for ip in objects_in(result.get("ips"))]
        rows.append({
            "path": path, "network": str(value.get("networkName", "")), "container_id": str(value.get("containerId", "")), "netns": netns,
            "ifname": str(value.get("ifName", "")), "addresses": addresses, "age_s": int(time.time() - os.stat(path).st_mtime),
            "state": look_state(netns) if value.get("kind") == "cniCacheV1" else "not readable as a result that libcni stores"})
    return rows


def cache(options):
    """Print what libcni has stored."""
    rows = look_cache(options.cache_dir)
    if options.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(f"nothing in {options.cache_dir}: no pod is attached, or the runtime stores its results elsewhere")
    else:
        table = [("NETWORK", "CONTAINER", "INTERFACE", "ADDRESSES", "AGE", "STATE", "NAMESPACE")]
        for row in rows:
            table.append((row["network"] or os.path.basename(row["path"]), row["container_id"][:13], row["ifname"],
                          " ".join(row["addresses"]), str(timedelta(seconds=row["age_s"])), row["state"], row["netns"]))
        widths = [max(map(len, column)) for column in zip(*table)]
        for words in table:
            print(printable("  ".join(map(str.ljust, words, widths)).rstrip()))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# doctor
# ---------------------------------------------------------------------------------------------------------------------
# A finding is a pair: what is wrong, and what to do. A note is the same about what pods may do without, or what may be meant so.
DATA_DIRS = ("/var/lib/cni/mncni", "/var/lib/cni/networks")  # leases of MNCNI and of host-local, a directory for each network
LOOPBACK = ("loopback", {"cniVersion": "0.3.1"})  # the plugin that containerd calls for each pod, with a configuration of its own
NEEDS = {  # kernel feature: a command that tries it in a temporary namespace, and the plugins that need it; "ready" is MNCNI's agent
    "bridge": ("ip link add probe type bridge", {"naivewg", "bridge"}),
    "veth": ("ip link add probe type veth", {"naivewg", "bridge", "ptp"}),
    "nft": ("nft add table inet probe", {"portmap", "ready"}),
    "ifb": ("ip link add probe type ifb", {"bandwidth"}),
    "tbf": ("tc qdisc add dev lo root tbf rate 1mbit burst 10k latency 1s", {"bandwidth"}),
    "netem": ("tc qdisc add dev lo root netem delay 1ms", {"lat"}),
    "WireGuard": ("ip link add probe type wireguard", {"ready"}),
}
OPTIONAL = {"ifb", "tbf", "netem"}


def parse_network(path, text):
    """(network configuration list, problem) of a file, as libcni reads it; the list is {} if there is a problem."""
    try:
        conf = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, f"{path}: {error}" + " (the file is empty)" * (not text.strip())
    if not isinstance(conf, dict):
        return {}, f"{path}: not a JSON object"
    if not path.endswith(".conflist"):
        if "plugins" in conf:
            return {}, f'{path}: has "plugins", so its name has to end in .conflist'
        conf = {"name": conf.get("name"), "cniVersion": conf.get("cniVersion"), "plugins": [conf]}
    for key, kind in (("name", str), ("plugins", list)):
        if not isinstance(conf.get(key), kind) or not conf[key]:
            return {}, f'{path}: has no "{key}"'
    if not all(isinstance(plugin, dict) and isinstance(plugin.get("type"), str) for plugin in conf["plugins"]):
        return {}, f'{path}: has a plugin without a "type"'
    return conf, ""


def judge_networks(texts):
    """(rows, findings, notes, network) of {path: text of a file in the configuration directory}. rows: [(path, verdict)].

    containerd uses the first file in alphabetical order. If that file is broken, it uses none.
    """
    rows, findings, notes, network, first = [], [], [], None, ""
    for path in sorted(texts):
        if not path.endswith((".conflist", ".conf", ".json")):
            rows.append((path, "ignored: its name does not end in .conflist, .conf or .json"))
            continue
        conf, problem = parse_network(path, texts[path])
        if problem:
            way_out = f"fix it before it is used in place of {first}" if first else "fix it: until then containerd uses no network at all"
            findings.append((problem, way_out))
        verdict = f'network "{conf["name"]}"' if conf else "broken"
        rows.append((path, f"ignored, because {first} comes first in the alphabet: {verdict}" if first else f"in use: {verdict}"))
        if not first:
            first, network = os.path.basename(path), conf
        elif conf and network and conf["name"] != network["name"]:
            what = f'no pod gets the network "{conf["name"]}": {first} comes before {os.path.basename(path)}'
            notes.append((what, f"if it should, remove {first}, or give it a later name"))
    if not first:
        findings.append(("no network configuration: the node stays NotReady", "write a .conflist, or start what should write it"))
    return rows, findings, notes, network


def plan_plugins(network):
    """[(type, network configuration)] of the plugins of a list, and of the IPAM plugins, their delegates that give out addresses: what a
    runtime would give to each."""
    found = []
    listed = network.get("cniVersions") if isinstance(network.get("cniVersions"), list) else []
    versions = [str(version) for version in (network.get("cniVersion") or "0.1.0", *listed)]
    common = {"name": network["name"], "cniVersion": max(versions, key=lambda text: [int(part) for part in re.findall(r"\d{1,9}", text)])}
    for plugin in network["plugins"]:
        kind = plugin["ipam"].get("type") if isinstance(plugin.get("ipam"), dict) else None
        found += [(name, {**plugin, **common}) for name in (plugin["type"], str(kind or "")) if name not in ("", "mncni.py")]
    return found


def look_plugin(kind, conf, bin_dirs):
    """Findings about a plugin: whether it is there, whether it supports the version, and what it answers to STATUS, the
    question whether it can serve an ADD now."""
    if "/" in str(kind):
        return [(f'"{kind}" is not the name of a plugin', "use the name of a program in a plugin directory; runtimes refuse a path")]
    path = shutil.which(str(kind), os.F_OK, ":".join(bin_dirs))
    if not path:
        unless = ", unless containerd is configured to set up lo itself" * (kind == "loopback")
        return [(f'plugin "{kind}" is missing: not in {" ".join(bin_dirs)}', f"install it: until then no pod gets a network{unless}")]
    if not os.access(path, os.X_OK):
        return [(f"{path} is not executable", f"chmod +x {path}")]
    environ = {"CNI_PATH": ":".join(bin_dirs), "CNI_CONTAINERID": "", "CNI_NETNS": "", "CNI_IFNAME": "", "CNI_ARGS": ""}
    version = conf["cniVersion"]
    code, stdout, stderr = run([path], json.dumps({"cniVersion": version}), {**environ, "CNI_COMMAND": "VERSION"})
    supported = parse_object(stdout).get("supportedVersions")
    if code or not isinstance(supported, list):
        said = (stderr or stdout).strip().splitlines() or ["nothing"]
        return [(f"{path} does not answer VERSION: exit status {code}, it says: {said[-1]}", "run it by hand, or install it again")]
    if version not in supported:
        return [(f"{path} does not support version {version} of its configuration, but {', '.join(map(str, supported))}",
                 'change "cniVersion", or update the plugin')]
    if version == "1.1.0":  # the first version with STATUS
        code, stdout, stderr = run([path], json.dumps(conf), {**environ, "CNI_COMMAND": "STATUS"})
        said = f"{verdict({'signal': '', 'exit': code, 'stdout': stdout})} {stderr}".strip()
        return [(f"{path} answers to STATUS that it cannot serve an ADD now: {said}", "do what the answer asks for")] if code else []
    return []


def look_needs(plugins):
    """(findings, notes) about what [(type, configuration)] need: commands, and, if we are root, features of the kernel. One that only pods
    need that ask for it is a note. Other plugins than MNCNI's (own) start no tools, and their portmap may use iptables."""
    own, findings, notes = {"ready" for _, conf in plugins if conf.get("ready")}, [], []
    for names in (conf.get("plugin") for _, conf in plugins):
        own.update(map(str, names if isinstance(names, list) else [names]))
    kinds = own | {kind for kind, _ in plugins}
    for name, (command, needed_by) in NEEDS.items():
        tool = command.split()[0]
        if not (own if name == "nft" else kinds) & needed_by or (name == "WireGuard" and shutil.which("wireguard-go")):
            continue
        code, _, stderr = run(["unshare", "--net", *command.split()]) if shutil.which(tool) and not os.geteuid() else (0, "", "")
        if not shutil.which(tool) and own & needed_by:
            findings.append((f"{tool} is missing", f"apt-get install {PACKAGES.get(tool, tool)}"))
        elif code:
            without = f", so {' and '.join(sorted(kinds & needed_by))} fails for pods that ask for it" if name in OPTIONAL else ""
            what = f"the kernel has no {name}{without}: {stderr.strip()}"
            (notes if name in OPTIONAL else findings).append((what, "load or install its module: modprobe, linux-modules-extra"))
    return list(dict.fromkeys(findings)), notes


LEASES_SHOWN = 5  # stale ones, so that other findings are not lost among hundreds


def look_leases(paths, rows):
    """Findings about leases (files that an IPAM plugin keeps, one for each address in use) of an attachment that libcni does not know or
    whose namespace is gone. rows: of look_cache."""
    known = {(row["container_id"], row["ifname"]): row["state"] for row in rows}
    boot_id, findings = read_text("/proc/sys/kernel/random/boot_id").strip(), []
    for path in paths:
        words = read_text(path).split() if re.fullmatch(r"[\da-f.:]{3,}", os.path.basename(path)) else []
        if len(words) == 2 or words[2:3] == [boot_id]:  # container ID, interface, boot ID if MNCNI wrote it: one of an earlier boot is free
            state = known.get((words[0], words[1]), "stale: libcni knows no such attachment")
            if state.startswith("stale"):
                findings.append((f"lease {path} of {words[0][:13]} {words[1]} is {state}", f"if no such container runs: rm {path}"))
    more = len(findings) - LEASES_SHOWN
    if more > 1:
        findings[LEASES_SHOWN:] = [(f"{more} more leases are stale", "the runtime's GC frees them, or a reboot of the node")]
    return findings


def look_host(has_pods):
    """(findings, notes) about forwarding: whether this host passes on packets from and to pods. Plugins switch it on for the first pod."""
    findings, notes = [], []
    if read_text("/proc/sys/net/ipv4/ip_forward").strip() == "0":
        what = "the node does not forward: net.ipv4.ip_forward is 0", "sysctl -w net.ipv4.ip_forward=1"
        (findings if has_pods else notes).append(what)
    entries = objects_in(parse_object(run(["nft", "-json", "list", "chains"])[1]).get("nftables"))
    for chain in objects_in([entry.get("chain") for entry in entries]):
        if (chain.get("hook"), chain.get("policy")) == ("forward", "drop"):
            what = " ".join(str(chain.get(key)) for key in ("family", "table", "name"))
            lets = " and ".join(f"nft insert rule {what} ip {end} CLUSTER-CIDR accept" for end in ("saddr", "daddr"))
            notes.append((f"chain {what} drops forwarded packets, unless one of its rules accepts them",
                          f"if it is Docker's or a firewall's, let pods pass there: {lets} (of IPv6: ip6)"))
    if "-P FORWARD DROP" in run(["iptables-legacy", "-S", "FORWARD"])[1]:
        notes.append(("iptables-legacy drops forwarded packets: -P FORWARD DROP", "accept pods there: iptables-legacy -I FORWARD ..."))
    return findings, notes


def look_containerd():
    """(conf_dir, [bin_dir], whether it calls the plugin loopback) from containerd's configuration, else the defaults. CRI-O calls no
    loopback."""
    text = read_text("/etc/containerd/config.toml")
    conf_dir = re.search(r"""^\s*conf_dir\s*=\s*["']([^"']+)""", text, re.MULTILINE)
    bin_dirs = re.search(r"""^\s*bin_dirs?\s*=(.+)""", text, re.MULTILINE)
    is_internal = re.search(r"^\s*use_internal_loopback\s*=\s*true", text, re.MULTILINE) or (not text and os.path.isdir("/etc/crio"))
    bin_dirs = re.findall(r"/[^\"', ]+", bin_dirs[1]) if bin_dirs else ["/opt/cni/bin"]
    return conf_dir[1] if conf_dir else "/etc/cni/net.d", bin_dirs, not is_internal


def doctor(options):
    """Print which configuration is in use and what is wrong. Exit status 1 if there are findings; notes do not count."""
    conf_dir, bin_dirs, needs_loopback = look_containerd()
    conf_dir, bin_dirs = options.conf_dir or conf_dir, options.bin_dir or bin_dirs
    rows, findings, ignored, network = judge_networks({path: read_text(path) for path in list_dir(conf_dir) if os.path.isfile(path)})
    plugins = plan_plugins(network) if network else []
    for kind, conf in [*plugins, *[LOOPBACK] * needs_loopback]:
        findings += look_plugin(kind, conf, bin_dirs)
    cached = look_cache(options.cache_dir)
    (needs, notes), (host, more) = look_needs(plugins), look_host(any(row["state"] == "in use" for row in cached))
    findings, notes = findings + needs, ignored + notes + more
    findings += [(f"cached result {row['path']}: {row['state']}", f"if no such container runs: rm {row['path']}")
                 for row in cached if row["state"] not in ("in use", "not known")]
    leases = [path for data_dir in options.data_dir or DATA_DIRS for network_dir in list_dir(data_dir) for path in list_dir(network_dir)]
    if os.path.isdir(options.cache_dir):
        findings += look_leases(leases, cached)
    elif leases:
        notes.append((f"there is no {options.cache_dir}, so nothing says which leases are in use", "name the runtime's with --cache-dir"))
    findings += host
    if options.json:
        print(json.dumps({"configurations": [{"path": path, "verdict": verdict} for path, verdict in rows],
                          "plugins": [kind for kind, _ in plugins],
                          **{kind: [{"what": what, "do": way_out} for what, way_out in rows]
                             for kind, rows in (("findings", findings), ("notes", notes))}}, indent=2))
    else:
        print(f"{conf_dir}:" + " no files" * (not rows))
        for path, verdict in rows:
            print(f"  {printable(os.path.basename(path))}: {printable(verdict)}")
        print(f"plugins: {printable(', '.join(kind for kind, _ in plugins))}\n" if plugins else "")
        for kind, rows in (("FINDING", findings), ("note", notes)):
            for what, way_out in rows:
                print(f"{kind:>7}: {printable(what)}\n     do: {printable(way_out)}")
        print(f"{len(findings)} finding{'s' * (len(findings) > 1)}" if findings else "nothing wrong was found")
    if os.geteuid():
        tell("only root can look at the firewall, at kernel features and at namespaces that others made; run it with sudo to check these")
    return 1 if findings else 0


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_options(argv):
    parser = argparse.ArgumentParser(prog="cnisnoop.py", description=__doc__.partition("\n\n")[0],
                                     epilog="Exit status: 0 fine, 1 failed or findings, 2 usage.")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    shown = argparse.ArgumentParser(add_help=False)
    shown.add_argument("--json", action="store_true", help="print each call as one line of JSON")
    shown.add_argument("--full", action="store_true", help="print JSON whole, and every command that a plugin ran")
    shown.add_argument("--replay", choices=("error", "always", "never"), default="error",
                       help="when to print a shell line that repeats the call (default: after an error)")
    shown.add_argument("--show-secrets", action="store_true", help="do not mask the values of keys such as password, token, psk")
    shown.add_argument("--plugin", metavar="NAME", help="only calls of this plugin")
    shown.add_argument("--container", metavar="ID", help="only calls for this container: the beginning of its ID, or the name of the pod")
    shown.add_argument("--command", metavar="WORD", help="only calls of one command: ADD, DEL, CHECK, GC, STATUS or VERSION")
    shown.add_argument("--failed", action="store_true", help="only calls that failed")
    traced = commands.add_parser("trace", parents=[shown], help="show each CNI call as it happens (root)")
    traced.add_argument("--backend", choices=("bpftrace", "strace"), help="default: bpftrace if it can be used here, else strace")
    traced.add_argument("--pid", type=int, action="append", help="strace: follow its children (default: the container runtimes)")
    traced.add_argument("--changes", action="store_true", help="show also what each call changed on the host and in the pod")
    traced.add_argument("--out", metavar="FILE", help="also append each call to FILE, for `view`")
    viewed = commands.add_parser("view", parents=[shown], help="show a recording again")
    viewed.add_argument("file", metavar="FILE")
    kept = argparse.ArgumentParser(add_help=False)
    kept.add_argument("--json", action="store_true", help="print JSON")
    kept.add_argument("--cache-dir", metavar="DIR", default="/var/lib/cni/results", help="libcni's results (default: %(default)s)")
    commands.add_parser("cache", parents=[kept], help="list the results that libcni has stored, and mark stale ones")
    checked = commands.add_parser("doctor", parents=[kept], help="say which configuration is in use, and what is wrong")
    checked.add_argument("--conf-dir", metavar="DIR", help="default: containerd's, else /etc/cni/net.d")
    checked.add_argument("--bin-dir", metavar="DIR", action="append", help="default: containerd's, else /opt/cni/bin")
    checked.add_argument("--data-dir", metavar="DIR", action="append", help=f"where leases are; default: {' and '.join(DATA_DIRS)}")
    return parser.parse_args(argv)


def main(argv):
    # An ordinary user's PATH may lack the sbin directories.
    os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
    try:
        options = parse_options(argv)
        return {"trace": trace, "view": view, "cache": cache, "doctor": doctor}[options.name](options)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (SnoopError, OSError) as error:
        tell(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error)
        return 1
    except KeyboardInterrupt:  # before trace has anything to clean up
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
