#!/usr/bin/python3
"""cnisnoop: see every CNI call on this node as it happens, and what else tells why a pod has no network.

    sudo ./cnisnoop.py trace                 each call: command, plugin, container, stdin, stdout, exit code, duration, delegates
    sudo ./cnisnoop.py trace --changes       the same, and what each call changed on the host and in the pod
    ./cnisnoop.py view FILE                  a recording (trace --out FILE) again
    sudo ./cnisnoop.py cache                 the results that libcni keeps in /var/lib/cni/results, stale ones marked
    sudo ./cnisnoop.py doctor                which conflist is in use, and what is wrong: exit status 0 nothing, 1 findings

How a call is found: a CNI call is a program that is started with CNI_COMMAND in its environment. The backend, bpftrace or strace,
reports each such start, what the process and its children read from its standard input and write to its standard output and error,
and its end. A program that a plugin starts from a directory of CNI_PATH, or from its own, is a delegate, nested below its caller;
any other is a command that the plugin ran.

    bpftrace   >= 0.17, tracepoints alone: no kprobes and no kernel structs, so that no kernel version matters. Sees the whole machine.
    strace     where there is no bpftrace: attaches to the container runtimes and follows what they start, which slows them down.

Both give the same small events, which are tuples (kind, time in ns, pid, ...):

    ("begin", ts, pid, owner, parent, comm)    the process wants to execute; owner: nearest process above it that was reported, or 0
    ("word", ts, pid, number, text)            what: 0 the path, 1 to 1023 the arguments, from ENV on CNI_* variables, in parts: + 8 each
    ("exec", ts, pid, error, in, out, err)     error 0: it did; streams behind its descriptors 0, 1, 2: 8 * owning pid + 1, 2 or 3, + 4
                                               for what was put there after the owner's first program. Else it could not
    ("data", ts, pid, stream, n, bytes)        n bytes went through a stream; or 0, and the contents of those before, up to LIMIT
    ("exit", ts, pid, code)                    256 + exit status, or the signal; 0: not known
    ("lost", 0, 0, n)                            the backend could not keep up

Reading order: the backends' program and parsers; `Calls`, which makes calls of events; how they are printed; changes; cache; doctor;
the command line. All but the last four sections is pure: tests feed recorded output of the backends.
"""
import argparse
import base64
import contextlib
import errno
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from datetime import datetime

ENV = 1024             # number of the first word of the environment
LIMIT = 65536          # bytes kept of each stream of a call
DESCRIPTORS = 13       # followed per process: 0 to 12; bash puts saved ones from 10 on
CHUNK = 160            # bytes of a string or buffer in one event: bpftrace 0.17 takes up to 200, but a probe has 512 bytes of stack
CANARY = "cnisnoop"    # CNI_COMMAND of a process of our own, which shows that the probes are there
RUNTIMES = ("containerd", "crio", "podman", "conmon", "kubelet", "cri-dockerd", "dockerd", "buildkitd", "nomad", "multus-daemon")
# Programs that start another one in their place or below them: never a plugin themselves.
WRAPPERS = ("env", "nsenter", "setpriv", "unshare", "sudo", "su", "runuser", "chroot", "timeout", "nice", "ionice", "stdbuf", "strace",
            "ip", "flock", "setsid", "sh", "bash", "dash")
PACKAGES = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables", "nsenter": "util-linux"}  # others are called as their program


class SnoopError(Exception):
    """What went wrong, in words for the user, with the way out."""


# ---------------------------------------------------------------------------------------------------------------------
# bpftrace: the program and its output
# ---------------------------------------------------------------------------------------------------------------------
# Maps: @parent[task] its parent; @in[task] nearest process that was reported, itself included; @fd[process, descriptor] stream;
# @code[process] how it is going to end; @sent[stream] bytes; the others last from one probe to the next. Loop counters are the only
# variables that the kernel's verifier has to follow: whatever else a loop changes is in a map, else it runs out of patience.

PROCESSES = """
tracepoint:sched:sched_process_fork {
  @parent[args->child_pid] = pid;
  if (@in[pid]) {
    @in[args->child_pid] = @in[pid]; $i = 0;
    while ($i < %(descriptors)d) { $s = @fd[pid, $i]; if ($s) { @fd[args->child_pid, $i] = $s; } $i++; }
  }
}
tracepoint:sched:sched_process_exec /@try[args->old_pid]/ {
  delete(@try[args->old_pid]); delete(@code[pid]); $i = 0;
  while ($i < %(descriptors)d) {
    if ($i > 2) { delete(@fd[pid, $i]); }
    else { if (!@fd[pid, $i]) { @fd[pid, $i] = pid * 8 + $i + 1 + (@in[pid] == pid ? 4 : 0); } }
    $i++;
  }
  @in[pid] = pid;
  printf("exec|%%llu|%%d|0|%%d|%%d|%%d", nsecs, pid, @fd[pid, 0], @fd[pid, 1], @fd[pid, 2]);
}
tracepoint:signal:signal_deliver /@in[pid] && args->sa_handler == 0 && !@code[pid]/ {
  $s = args->sig;  // not those that by default do nothing, stop or continue
  if ($s < 17 || ($s > 23 && $s < 28) || $s > 28) { @code[pid] = $s; }
}
tracepoint:syscalls:sys_enter_exit_group /@in[pid]/ { if (!@code[pid]) { @code[pid] = 256 + (args->error_code & 255); } }
tracepoint:syscalls:sys_enter_close /@in[pid]/ { delete(@fd[pid, args->fd]); }
"""
# The first loop looks for CNI_COMMAND and notes every CNI_* variable. They come in parts, for a string holds CHUNK - 1 characters; what
# a part shows behind the end of the value is thrown away by the reader.
EXECUTE = """
tracepoint:syscalls:sys_enter_%(call)s {
  $p = (uint64)args->envp; $i = 0;
  while ($i < 512) {
    $v = *(uint64*)uptr($p + 8 * $i); $i++;
    if ($v == 0) { break; }
    if (*(uint32*)uptr($v) == %(CNI_)d) {
      if (*(uint64*)uptr($v) == %(CNI_COMM)d) { @cni[tid] = 1; }
      @env[tid, @envs[tid]] = $v; @envs[tid]++;
    }
  }
  $cni = @cni[tid];
  if ($cni || @in[pid]) {
    @try[tid] = 1;
    printf("begin|%%llu|%%d|%%d|%%d|%%s", nsecs, pid, @in[pid], @parent[pid], comm);
    printf("word|%%llu|%%d|0|%%s", nsecs, pid, str(uptr(args->filename)));
    $p = (uint64)args->argv; $i = 0;
    while ($i < 32) {
      $v = *(uint64*)uptr($p + 8 * $i); $i++;
      if ($v == 0) { break; }
      printf("word|%%llu|%%d|%%d|%%s", nsecs, pid, $i, str(uptr($v)));
    }
  }
  delete(@cni[tid]); delete(@envs[tid]); $k = 0;
  while ($k < 16) {
    $v = @env[tid, $k]; $i = 0;
    if ($v == 0) { break; }
    delete(@env[tid, $k]);
    while ($cni && $i < 5) {
      printf("word|%%llu|%%d|%%d|%%s", nsecs, pid, %(env)d + $k * 8 + $i, str(uptr($v + $i * %(step)d))); $i++;
    }
    $k++;
  }
}
tracepoint:syscalls:sys_exit_%(call)s /@try[tid]/ { delete(@try[tid]); printf("exec|%%llu|%%d|%%d|0|0|0", nsecs, pid, args->ret); }
"""
# Contents are read when the call returns: then they are there, and their length is known. Whole chunks first, for a loop whose
# length varies is much work for the verifier.
TRANSFER = """
tracepoint:syscalls:sys_enter_%(call)s /@in[pid] && @fd[pid, args->fd]/ {
  @stream[tid] = @fd[pid, args->fd]; @buffer[tid] = (uint64)args->%(buffer)s;
}
tracepoint:syscalls:sys_exit_%(call)s /@stream[tid]/ {
  $s = @stream[tid]; $p = @buffer[tid]; $n = args->ret; $in = @in[pid]; $o = 0; $i = 0;
  if ($n > 0 && ($s & 3) %(direction)s) {
    printf("data|%%llu|%%d|%%d|%%d|", nsecs, $in, $s, $n);
    $room = @sent[$s] < %(limit)d ? %(limit)d - @sent[$s] : 0; @sent[$s] = @sent[$s] + $n; $n = $n > $room ? $room : $n;
    %(piece)s
  }
  if (!@left[tid]) { delete(@stream[tid]); delete(@buffer[tid]); }
}
"""
PIECE = """while ($i < %(chunks)d) {
      if ($o + %(chunk)d > $n) { break; }
      printf("data|%%llu|%%d|%%d|0|%%rx", nsecs, $in, $s, buf(uptr($p + $o), %(chunk)d));
      $o = $o + %(chunk)d; $i++;
    }
    if ($n > $o) { printf("data|%%llu|%%d|%%d|0|%%rx", nsecs, $in, $s, buf(uptr($p + $o), $n - $o)); }"""
# readv and writev: the same over several buffers, {address, size} each, in a probe of its own, for the stack of one is too small.
PIECES = """
tracepoint:syscalls:sys_exit_%(call)s /@left[tid]/ {
  $in = @in[pid]; $i = 0;
  while ($i < %(chunks)d) {
    $p = @buffer[tid]; $s = *(uint64*)uptr($p + 8) - @offset[tid]; $i++;
    if ($s > @left[tid]) { $s = @left[tid]; }
    if ($s > 0) { printf("data|%%llu|%%d|%%d|0|%%rx", nsecs, $in, @stream[tid], buf(uptr(*(uint64*)uptr($p) + @offset[tid]), $s)); }
    if ($s > %(chunk)d) { $s = %(chunk)d; }
    @left[tid] = @left[tid] - $s; @offset[tid] = @offset[tid] + $s;
    if (@left[tid] == 0) { break; }
    if (@offset[tid] >= *(uint64*)uptr($p + 8)) { @buffer[tid] = $p + 16; delete(@offset[tid]); }
  }
  delete(@left[tid]); delete(@stream[tid]); delete(@buffer[tid]); delete(@offset[tid]);
}
"""
DUPLICATE_TO = """
tracepoint:syscalls:sys_enter_%(call)s /@in[pid]/ {
  $s = @fd[pid, args->oldfd];
  if ($s) { @fd[pid, args->newfd] = $s; } else { delete(@fd[pid, args->newfd]); }
}
"""
DUPLICATE = """
tracepoint:syscalls:sys_enter_%(call)s /@in[pid]%(condition)s/ { $s = @fd[pid, args->%(field)s]; if ($s) { @copied[tid] = $s; } }
"""
OPEN = """
tracepoint:syscalls:sys_enter_%(call)s /@in[pid]/ {
  $f = str(args->filename, 16); $s = (uint64)0;
  if ($f == "/dev/stdin" || $f == "/dev/fd/0" || $f == "/proc/self/fd/0") { $s = @fd[pid, 0]; }
  if ($f == "/dev/stdout" || $f == "/dev/fd/1" || $f == "/proc/self/fd/1") { $s = @fd[pid, 1]; }
  if ($f == "/dev/stderr" || $f == "/dev/fd/2" || $f == "/proc/self/fd/2") { $s = @fd[pid, 2]; }
  if ($s) { @copied[tid] = $s; }
}
"""
COPIED = """
tracepoint:syscalls:sys_exit_%(call)s /@copied[tid]/ {
  if (args->ret >= 0 && args->ret < %(descriptors)d) { @fd[pid, args->ret] = @copied[tid]; }
  delete(@copied[tid]);
}
"""
END_OF_PROCESS = """
tracepoint:sched:sched_process_exit {
  delete(@parent[tid]);
  if (@in[tid]) {
    $i = 0;
    if (@in[tid] == tid && pid == tid) {
      printf("exit|%%llu|%%d|%%d", nsecs, pid, @code[pid]);
      while ($i < 8) { delete(@sent[pid * 8 + $i]); $i++; }
    }
    delete(@in[tid]); delete(@code[tid]); $i = 0;
    while ($i < %(descriptors)d) { delete(@fd[tid, $i]); $i++; }
  }
}
END {  // else it prints them all
  clear(@parent); clear(@in); clear(@fd); clear(@code); clear(@sent); clear(@try); clear(@stream); clear(@left); clear(@offset);
  clear(@buffer); clear(@copied); clear(@env); clear(@envs); clear(@cni);
}
"""


def bpftrace_program(syscalls):
    """The text of the bpftrace program. syscalls: names that this kernel has tracepoints for; `open` and `dup2` are not everywhere."""
    values = {"descriptors": DESCRIPTORS, "env": ENV, "step": CHUNK - 1, "chunk": CHUNK, "limit": LIMIT, "chunks": LIMIT // CHUNK + 1}
    for name in ("CNI_", "CNI_COMM"):
        values[name] = int.from_bytes(name.encode(), sys.byteorder)
    parts = []
    for call, direction in (("read", "== 1"), ("write", "> 1")):
        parts += [(TRANSFER, {"call": call, "direction": direction, "buffer": "buf", "piece": PIECE % values}),
                  (TRANSFER + PIECES, {"call": f"{call}v", "direction": direction, "buffer": "vec", "piece": "@left[tid] = $n;"})]
    parts += [(DUPLICATE_TO, {"call": call}) for call in ("dup2", "dup3")]
    parts += [(DUPLICATE + COPIED, {"call": "dup", "field": "fildes", "condition": ""}),
              (DUPLICATE + COPIED, {"call": "fcntl", "field": "fd", "condition": " && (args->cmd == 0 || args->cmd == 1030)"})]
    parts += [(OPEN + COPIED, {"call": call}) for call in ("openat", "open")]
    parts += [(EXECUTE, {"call": call}) for call in ("execveat", "execve")]
    texts = [text % {**values, **more} for text, more in parts if more["call"] in syscalls]
    return "".join([PROCESSES % values, *texts, END_OF_PROCESS % values])


EVENT_NUMBERS = {"begin": 4, "word": 3, "data": 4, "exec": 6, "exit": 3}  # how many an event has; the first three end with text


def parse_bpftrace(line):
    """An event of one line (bytes) of `bpftrace -f json`, or None. Text is str with one character for each byte (Latin-1)."""
    # bpftrace 0.17 writes a byte above 127 as \uffffffXX, which is no JSON; newer ones write it as it is.
    message = parse_object(re.sub(r"\\uffffff([89a-f][0-9a-f])", r"\\u00\1", line.decode("latin-1")))
    if message.get("type") == "lost_events":
        return ("lost", 0, 0, message["data"]["events"])
    kind, _, rest = str(message.get("data")).partition("|")
    count = EVENT_NUMBERS.get(kind, 0)
    fields = rest.split("|", count)
    if not count or message.get("type") != "printf" or len(fields) != count + (kind in ("begin", "word", "data")):
        return None
    try:
        numbers = tuple(map(int, fields[:count]))
        last = [bytes.fromhex(text.replace("\\x", "")) if kind == "data" else text for text in fields[count:]]
    except ValueError:
        return None
    return (kind, *numbers, *last)


def parse_object(text):
    """The JSON object that text is, else {}."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# strace: its output
# ---------------------------------------------------------------------------------------------------------------------
# Exit codes come without a system call. -xx writes every string in hexadecimal, so no quote or bracket in it can be taken for one of
# strace's own.
STRACE_LINE = re.compile(r"(\d+) +(\d+)\.(\d{6}) (.*)", re.DOTALL)
STRACE_EXEC = re.compile(r'[^"]*("[^"]*"), \[(.*?)\], \[(.*?)\]', re.DOTALL)
HEX_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
OWN_STREAMS = {f"{path}{number}": fd for fd, name in enumerate(("stdin", "stdout", "stderr"))
               for path, number in (("/dev/", name), ("/dev/fd/", fd), ("/proc/self/fd/", fd))}


def hex_strings(text):
    """The strings in what strace -xx writes, as bytes."""
    return [bytes.fromhex(found.replace("\\x", "")) for found in HEX_STRING.findall(text)]


class Strace:
    """Makes events of lines. feed(line) -> events; a process's lines wait until its parent's clone() has returned.

    process_of: {thread ID: process ID} of what strace attached to.
    """

    def __init__(self, process_of):
        self.process_of, self.parent, self.waiting, self.begun = dict(process_of), {}, {}, {}
        self.inside, self.streams, self.sent = {}, {}, Counter()  # as @in, @fd and @sent in the bpftrace program

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
        child = int(re.search(r"(\d+)(?: in strace's PID NS.*)?$", value)[1])  # its number in our namespace of process IDs
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
        self.inside[pid], self.streams[pid] = pid, {fd: above.get(fd, pid * 8 + fd + 1 + again) for fd in range(3)}
        return [*events, ("exec", ts, pid, 0, *self.streams[pid].values())]

    def transfer(self, ts, pid, name, arguments, value):
        stream, size = self.streams.get(pid, {}).get(descriptor_number(arguments), 0), int(value.split()[0])
        if not stream or size <= 0 or (stream & 3 == 1) != name.startswith("read"):
            return []
        data = b"".join(hex_strings(arguments))[:max(0, LIMIT - self.sent[stream])]
        self.sent[stream] += size
        return [("data", ts, self.inside[pid], stream, size, data)]

    def descriptor(self, ts, pid, name, arguments, value):
        """close, dup*, fcntl, open*: which descriptor stands for which stream."""
        streams, source = self.streams.get(pid, {}), descriptor_number(arguments)
        if name.startswith("open"):
            source = OWN_STREAMS.get(b"".join(hex_strings(arguments)[:1]).decode("latin-1"), -1)
        if name == "close":
            streams.pop(source, None)
        elif name != "fcntl" or ", F_DUPFD" in arguments:
            stream, target = streams.get(source), int(value.split()[0])
            streams.pop(target, None)
            if stream:
                streams[target] = stream
        return []

    HANDLERS = {**dict.fromkeys(("clone", "clone3", "fork", "vfork"), clone), **dict.fromkeys(("execve", "execveat"), execve),
                **dict.fromkeys(("read", "readv", "write", "writev"), transfer),
                **dict.fromkeys(("close", "dup", "dup2", "dup3", "fcntl", "open", "openat"), descriptor)}


# "?": not every machine has it.
STRACE = ("-f", "-q", "-ttt", "--pidns-translation", "-v", "-xx", "-s", str(LIMIT), "-e", f"trace=?{',?'.join(Strace.HANDLERS)}")


def descriptor_number(arguments):
    """The first argument of a system call if it is a descriptor, else -1."""
    number = arguments.partition(",")[0]
    return int(number) if number.isdigit() else -1


# ---------------------------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------------------------


def take(events, before=float("inf")):
    """Take those older than a time in ns out of a list, in the order of time: each processor's come in order, but those of several one
    batch after another."""
    events.sort(key=lambda event: event[1])  # stable: what has the same time stays in order
    count = sum(event[1] < before for event in events)
    taken = events[:count]
    del events[:count]
    return taken


def text_of(latin):
    """A string of events (a character per byte) as text; what is not UTF-8 as \\xNN."""
    return latin.encode("latin-1", "replace").decode("utf-8", "backslashreplace")


def read_words(words):
    """(path, arguments, environment) of {number: text} of "word" events. A part that does not fill its event is a variable's last."""
    arguments = [text_of(words[number]) + "..." * (len(words[number]) == CHUNK - 1) for number in sorted(words) if 0 < number < ENV]
    variables = []
    for first in range(ENV, max(words, default=0) + 1, 8):
        parts = [words.get(number, "") for number in range(first, first + 8)]
        last = next((number for number, part in enumerate(parts) if len(part) < CHUNK - 1), 8)
        variables.append(text_of("".join(parts[:last + 1])).partition("=")[::2])
    return text_of(words.get(0, "")), arguments, {name: value for name, value in variables if name}


class Process:
    """One that was reported. above: the nearest reported one above it. is_call: it is a CNI call, as far as is known."""

    def __init__(self, pid, attempt, above, streams):
        self.pid, self.above, self.is_call, self.delegates, self.commands = pid, above, False, [], []
        self.begin(attempt, streams)

    def begin(self, attempt, streams):
        """It executes this: what another program in the same process read is not this one's."""
        self.attempt, self.start, self.path, self.env = attempt, attempt["ts"], attempt["path"], attempt["env"]
        self.streams, self.contents, self.sizes = streams, {1: bytearray(), 2: bytearray(), 3: bytearray()}, Counter()

    def caller(self):
        """The process of the CNI call that this one belongs to, or None."""
        above = self.above
        while above and not above.is_call:
            above = above.above
        return above

    def speaks(self):
        """Whether it is a plugin: one outside CNI_PATH speaks JSON. A shell that has CNI_COMMAND starts other things, too."""
        return bool(self.delegates or self.caller() or is_in_cni_path(self.path, self.env)
                    or any(self.contents[kind].lstrip()[:1] == b"{" for kind in (1, 2)))


def is_in_cni_path(path, env):
    return os.path.dirname(path) in [os.path.normpath(part) for part in env.get("CNI_PATH", "").split(":") if part]


class Calls:
    """Makes calls of events. feed(event) -> a call that has ended and that no other contains, or None.

    A call is a dict: time (seconds since 1970), command, plugin, path, argv, env (CNI_*), container_id, netns, ifname, network, pid,
    parent {pid, comm, ...}, stdin, stdout, stderr (text; `NAME_base64` where it is no UTF-8) and stdin_size ..., exit (None: not known),
    signal (a name, or ""), error (why it could not be executed, or ""), duration_ms, chain (its place in the runtime's chain of
    plugins, from 1), incomplete (events were lost), running, delegates (calls), commands ([{argv, exit, signal, duration_ms, stdin,
    stderr}]). look_parent: process ID -> {comm, ...} of a process, {} if it is gone. epoch: ns to add to times.
    """

    def __init__(self, look_parent=lambda pid: {}, epoch=0):
        self.look_parent, self.epoch, self.lost = look_parent, epoch, 0
        self.attempts, self.processes, self.chains = {}, {}, {}
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
            return None  # its beginning was lost
        attempt["path"], attempt["argv"], attempt["env"] = read_words(attempt["words"])
        if error:
            return self.refuse(ts, pid, error, attempt, process)
        if not process or not attempt["owner"]:  # a known process without an owner: another one's number, whose end was lost
            process = self.processes[pid] = Process(pid, attempt, self.processes.get(attempt["owner"]), streams)
        if process.is_call:
            return None  # an interpreter in the plugin's place
        process.begin(attempt, streams)
        caller, directory = process.caller(), os.path.dirname(attempt["path"])
        is_place = not caller or is_in_cni_path(attempt["path"], attempt["env"]) or directory == os.path.dirname(caller.path)
        process.is_call = is_place and bool(attempt["env"].get("CNI_COMMAND")) and os.path.basename(attempt["path"]) not in WRAPPERS
        if process.is_call and not caller:
            attempt["parent"].update(self.look_parent(attempt["parent"]["pid"]))
        return None

    def refuse(self, ts, pid, error, attempt, known):
        if (known and known.is_call) or not is_in_cni_path(attempt["path"], attempt["env"]):
            return None  # a shell that looks for a command along PATH fails often
        process = Process(pid, attempt, known.above if known else self.processes.get(attempt["owner"]), ())
        return self.hand_over(process, {**self.call(process, ts, 0), "error": os.strerror(-error)})

    def data(self, ts, pid, stream, count, data):
        """To the process that read or wrote, and to those above it up to the one whose stream it is, as far as it is theirs."""
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
        if process and process.is_call and process.speaks():
            return self.hand_over(process, self.call(process, ts, code))
        if process and process.caller():
            own_stdin = process.contents[1] if process.pid == process.streams[0] >> 3 else b""
            process.caller().commands.append({
                "time": self.wall(process.start), "argv": process.attempt["argv"], **self.outcome(process, ts, code),
                "stdin": own_stdin.decode("utf-8", "backslashreplace"), "stderr": process.contents[3].decode("utf-8", "backslashreplace")})
        return None

    def wall(self, ts):
        return (ts + self.epoch) / 1e9

    def outcome(self, process, ts, code):
        name = signal.Signals(code).name if code in set(signal.Signals) else f"signal {code}" * (0 < code < 256)
        return {"exit": code - 256 if code >= 256 else None, "signal": name, "duration_ms": round((ts - process.start) / 1e6, 3)}

    def call(self, process, ts, code):
        """What is known of a call, as the class describes it."""
        env, attempt = process.env, process.attempt
        call = {"time": self.wall(process.start), "command": env.get("CNI_COMMAND", ""), "plugin": os.path.basename(process.path),
                "path": process.path, "argv": attempt["argv"], "env": env, "container_id": env.get("CNI_CONTAINERID", ""),
                "netns": env.get("CNI_NETNS", ""), "ifname": env.get("CNI_IFNAME", ""), "pid": process.pid,
                "parent": attempt["parent"], **self.outcome(process, ts, code), "error": "", "running": False,
                "incomplete": self.lost > attempt["lost"]}
        for kind, name in enumerate(("stdin", "stdout", "stderr"), 1):
            content, size = bytes(process.contents[kind]), process.sizes[kind]
            call[name] = content.decode("utf-8", "backslashreplace" if size <= len(content) else "replace")
            call[f"{name}_size"] = size
            if size <= len(content) and call[name].encode() != content:
                call[f"{name}_base64"] = base64.b64encode(content).decode()
        conf = parse_object(call["stdin"])
        call["network"] = str(conf.get("name", ""))
        call["chain"] = 0 if process.caller() else self.place(call, conf)
        for name in ("delegates", "commands"):
            call[name] = sorted(getattr(process, name), key=lambda entry: entry["time"])
        return call

    def place(self, call, conf):
        """Which plugin of the runtime's chain this is: an ADD without prevResult, or a plugin for the second time, begins a new one."""
        key = (call["parent"]["pid"], call["command"], call["network"], call["container_id"], call["ifname"])
        chain = self.chains.setdefault(key, [])
        if (call["command"] == "ADD" and "prevResult" not in conf) or call["path"] in chain:
            chain.clear()
        chain.append(call["path"])
        while len(self.chains) > 1000:
            del self.chains[next(iter(self.chains))]
        return len(chain)

    def hand_over(self, process, call):
        caller = process.caller()
        if not caller:
            return call
        caller.delegates.append(call)
        return None

    def unfinished(self, ts):
        """Calls that have not ended at a time, each with what it has done so far."""
        found = []
        for process in sorted(self.processes.values(), key=lambda process: -process.start):  # delegates before their callers
            if process.is_call and process.speaks():
                call = self.call(process, ts, 0)  # where events were lost, its end may be one of them
                call["running"] = not self.lost or bool(self.look_parent(process.pid))
                call["incomplete"] = call["incomplete"] or not call["running"]
                found.append(self.hand_over(process, call))
        return [call for call in found[::-1] if call]


# ---------------------------------------------------------------------------------------------------------------------
# Printing
# ---------------------------------------------------------------------------------------------------------------------
SECRET = r"passw|secret|token|credential|private.?key|preshared|psk|api.?key|access.?key|client.?key|authorization"
SECRET_NAME = re.compile(SECRET, re.IGNORECASE)
# Bounded: a plugin's output may be 64 KB of anything, and no pattern may take longer than reading it.
SECRET_VALUE = re.compile(rf"""((?:{SECRET})[\w.-]{{0,40}}["']?\s{{0,9}}[=:]\s{{0,9}})("(?:[^"\\]|\\.)*"?|[^\s;,"]+)""", re.IGNORECASE)
HIDDEN = "***"
PLAIN, COLOURED = "{text}", "\033[{code}m{text}\033[0m"
BOLD, DIM, RED, GREEN, YELLOW = 1, 2, 31, 32, 33
WIDTH = 110  # of a line of JSON


def mask(value, is_secret=False):
    """A JSON value without what secrets' names stand for."""
    if isinstance(value, dict):
        return {key: mask(entry, is_secret or bool(SECRET_NAME.search(key))) for key, entry in value.items()}
    if isinstance(value, list):
        return [mask(entry, is_secret) for entry in value]
    return HIDDEN if is_secret and isinstance(value, (str, int, float)) and not isinstance(value, bool) else value


def mask_text(text):
    """The same for text that may be JSON, or lines and words NAME=VALUE. What holds no secret stays as it is, to the byte."""
    try:
        value = json.loads(text)
        masked = mask(value)
    except (ValueError, RecursionError):
        return SECRET_VALUE.sub(rf"\g<1>{HIDDEN}", text)
    return text if masked == value else json.dumps(masked, ensure_ascii=False)


def mask_call(call):
    """A call without secrets. `masked` says whether there were any."""
    masked = {**call, "env": {name: mask_text(value) if name == "CNI_ARGS" else value for name, value in call["env"].items()},
              "delegates": [mask_call(entry) for entry in call["delegates"]],
              "argv": [mask_text(word) for word in call["argv"]],
              "commands": [{**entry, "argv": [mask_text(word) for word in entry["argv"]], "stdin": mask_text(entry["stdin"]),
                            "stderr": mask_text(entry["stderr"])} for entry in call["commands"]]}
    for name in ("stdin", "stdout", "stderr"):
        masked[name] = mask_text(call[name])
        if masked[name] != call[name]:
            masked.pop(f"{name}_base64", None)
    masked["masked"] = call.get("masked", False) or masked != call
    return masked


def quote(word):
    """A word for a shell that a terminal can be shown, too: control characters as $'\\033'."""
    if all(char.isprintable() or char in "\n\t" for char in word):
        return shlex.quote(word)
    plain = word.replace("\\", "\\\\").replace("'", "\\'")
    octal = (char if char.isprintable() else "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "replace")) for char in plain)
    return f"$'{''.join(octal)}'"


def replay_line(call):
    """A shell line that repeats the call: the same variables, arguments and bytes; behind # what is in the way of that."""
    words = ["env", *(f"{name}={value}" for name, value in call["env"].items()), call["path"], *call["argv"][1:]]
    if call["parent"].get("elsewhere"):
        words[:0] = ["nsenter", f"--target={call['parent']['pid']}", "--mount", "--net"]
    line = " ".join(quote(word) for word in words)
    if call.get("stdin_base64"):
        line = f"echo {quote(call['stdin_base64'])} | base64 -d | {line}"
    else:
        line = f"printf %s {quote(call['stdin'])} | {line}" if call["stdin"] else f"{line} </dev/null"
    if call["stdin_size"] > LIMIT:
        line = f"# not whole, {call['stdin_size']} bytes of stdin, of which {LIMIT} are known: {line}".replace("\n", "\n# ")
    return line + "  # secrets are hidden: trace --show-secrets" * bool(call.get("masked"))


def is_failed(call, with_delegates=True):
    return bool(call["error"] or call["signal"] or call["exit"] or with_delegates and any(map(is_failed, call["delegates"])))


def printable(text):
    """Text that a terminal can be given: a plugin's output may hold anything."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def pretty(value, room):
    """Lines of JSON: what fits stays on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) <= room or not isinstance(value, (dict, list)):
        return [line]
    is_object = isinstance(value, dict)
    lines = []
    for key, entry in value.items() if is_object else enumerate(value):
        key = json.dumps(key, ensure_ascii=False) + ": " if is_object else ""
        first, *more = pretty(entry, max(room - 2 - len(key), 20))
        lines += [f"  {key}{first}", *(f"  {line}" for line in more)]
        lines[-1] += ","
    lines[-1] = lines[-1][:-1]
    return ["{" if is_object else "[", *lines, "}" if is_object else "]"]


def content_lines(text, size, is_full):
    """Lines that show what went through a stream; unless is_full, long lines and texts are cut, and it is said how much is left out."""
    try:
        conf = json.loads(text)
        if not is_full and isinstance(conf, dict) and isinstance(conf.get("prevResult"), dict):
            ips = [str(ip.get("address")) for ip in conf["prevResult"].get("ips") or [] if isinstance(ip, dict)]
            conf = {**conf, "prevResult": f"... {', '.join(ips)}"}
        lines = pretty(conf, WIDTH)
    except (ValueError, RecursionError):
        lines = text.splitlines()
    if not is_full:
        left_out = [f"... {len(lines) - 50} more lines"] * (len(lines) > 50)
        lines = [line if len(line) <= WIDTH + 40 else f"{line[:WIDTH]}... ({len(line)} characters)" for line in lines[:50]] + left_out
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
        return "ended, exit status not known"
    reply = parse_object(call.get("stdout", ""))
    reason = f": error {reply['code']}, {reply.get('msg', '')}" if call["exit"] and "code" in reply else ""
    return f"exit {call['exit']}{reason}" if call["exit"] else "ok"


def pod_of(call):
    """namespace/name of the pod from CNI_ARGS, or ""."""
    args = dict(pair.split("=", 1) for pair in call["env"].get("CNI_ARGS", "").split(";") if "=" in pair)
    return f"{args.get('K8S_POD_NAMESPACE', '')}/{args['K8S_POD_NAME']}" if args.get("K8S_POD_NAME") else ""


def format_call(call, is_full=False, replay="error", colour=PLAIN, caller=None):
    """The lines of a call for people, those of its delegates indented below it. colour: PLAIN or COLOURED."""
    def style(text, code):
        return colour.format(code=code, text=text)

    kind = parse_object(call["stdin"]).get("plugin")
    what = f"{call['command']} {call['plugin']}" + (f" ({'+'.join(kind) if isinstance(kind, list) else kind})" if kind else "")
    who = " ".join(filter(None, (pod_of(call), call["container_id"][:13], call["ifname"]))) if not caller else ""
    chain = f"network {call['network']}" + f", plugin {call['chain']}" * (call["chain"] > 1) if call["network"] and not caller else ""
    parent = f"by {call['parent']['comm'] or '?'}[{call['parent']['pid']}]" if not caller else ""
    times = datetime.fromtimestamp(call["time"]).strftime("%H:%M:%S.%f")[:-3]
    end_colour = RED if is_failed(call, False) else YELLOW if call["running"] else GREEN
    head = [style(times, DIM), style(printable(what), BOLD), *map(printable, filter(None, (who, chain, parent)))]
    duration = f"{call['duration_ms']:.0f} ms" if call["duration_ms"] >= 10 else f"{call['duration_ms']:.1f} ms"
    lines = ["  ".join([*head, duration, style(printable(verdict(call)), end_colour)])]
    body = [("incomplete", ["events were lost: the backend could not keep up"])] * call["incomplete"]
    body += [("netns", [printable(call["netns"])])] if call["netns"] and not caller else []
    for name in ("stdin", "stdout", "stderr"):
        same = caller and name == "stdin" and call["stdin"] == caller["stdin"] and call["stdin"]
        body.append((name, ["as its caller's"] if same and not is_full else content_lines(call[name], call[f"{name}_size"], is_full)))
    for entry in call["commands"]:
        if is_full or (is_failed(call) and (entry["exit"] or entry["signal"])):
            shown = [printable(f"{shlex.join(entry['argv'])}  {entry['duration_ms']:.1f} ms  {verdict(entry)}")]
            body.append(("ran", shown + [f"  {printable(line)}" for line in (entry["stdin"] + entry["stderr"]).splitlines()]))
    body += [("changed", [printable(call["changes"])])] if call.get("changes") else []
    for name, shown in body:
        lines += [f"  {style(f'{name if number == 0 else str():<8}', DIM)} {line}" for number, line in enumerate(shown)]
    for entry in call["delegates"]:
        lines += [f"    {line}" for line in format_call(entry, is_full, replay, colour, call)]
    if replay == "always" or (replay == "error" and is_failed(call, False)):
        lines.append(f"  {style('replay  ', DIM)} {replay_line(call)}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Looking at the machine
# ---------------------------------------------------------------------------------------------------------------------


def run(argv, stdin="", environ=None, timeout_s=10):
    """(exit status, stdout, stderr) of a command; 127 if there is no such command, 124 if it takes too long. Never raises."""
    environ = {**os.environ, "PATH": search_path(), **(environ or {})}
    try:
        done = subprocess.run(argv, input=stdin, env=environ, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return 124, "", f"no end after {timeout_s} s"
    except OSError as error:
        return 127, "", os.strerror(error.errno)
    return done.returncode, done.stdout, done.stderr


def search_path():
    """PATH, and sbin, which is not on everybody's."""
    return os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"


def find_tool(name):
    return shutil.which(name, path=search_path())


def need_tools(what, *names):
    missing = [name for name in names if not find_tool(name)]
    if missing:
        packages = " ".join(sorted({PACKAGES.get(name, name) for name in missing}))
        raise SnoopError(f"{what} needs {', '.join(missing)}: apt-get install {packages}")


def need_root(what):
    if os.geteuid():
        raise SnoopError(f"{what} needs root: sudo {shlex.join(sys.argv)}")


def read_text(path):
    """The contents of a small file, "" if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def list_dir(directory):
    """Paths of what is in a directory, in alphabetic order; none if there is no such directory."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return [os.path.join(directory, name) for name in sorted(os.listdir(directory))]
    return []


def look_parent(pid):
    """{comm, elsewhere} of a process: elsewhere if it sees other files or another network than we do. {} when it is gone."""
    try:
        spaces = [os.readlink(f"/proc/{where}/ns/{kind}") for where in (pid, "self") for kind in ("mnt", "net")]
    except OSError:
        return {}
    return {"comm": read_text(f"/proc/{pid}/comm").strip(), "elsewhere": spaces[:2] != spaces[2:]}


def is_gone(pid):
    """Whether a process that a backend tells of has ended. In a PID namespace (include/linux/proc_ns.h has the first one's number) nobody
    can tell: /proc has other numbers than bpftrace."""
    return os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC and not os.path.exists(f"/proc/{pid}")


# ---------------------------------------------------------------------------------------------------------------------
# Changes
# ---------------------------------------------------------------------------------------------------------------------
# Of the host the monitors tell. They know no process, and none tells of other namespaces without mixing up names, so what a call did
# is what came while it ran; of the pod's namespace what is there before and after is compared.
POD_SCRIPT = "ip -json address; ip -json route; ip -json -6 route; tc -json qdisc"
MONITORS = {  # tool: its arguments, and what lines of interest look like
    "ip": ("-ts -d -o monitor link address route",
           ("link", r"\d+: (?P<name>[^:@\s]+).* qdisc .*"), ("address", r"\d+: \S+ +inet6? (?!fe80:|::1/)(?P<name>\S+) .*"),
           ("route", r"(?:unicast )?(?!.* table local |ff00:|fe80:)(?P<name>default|[\da-f.:]+(?:/\d+)?) (?:via|dev|nhid|proto|table) .*")),
    "tc": ("-ts monitor", ("qdisc", r"qdisc (?!noqueue)(?P<name>\w+) .* dev \S+.*")),
    "nft": ("monitor", ("nft", r"(?P<name>element|rule|chain|set|map|table) .*")),
}


def parse_monitor(tool, line):
    """(sign, kind, name) of what a monitor says has come (1) or gone (-1), None of anything else."""
    match = re.fullmatch(r"(Deleted |deleted |delete )?(?:add )?(.*?) *", line)
    for kind, pattern in MONITORS[tool][1:]:
        found = re.fullmatch(pattern, match[2])
        if found:
            word = re.search(r"maxmtu \d+[^\\]*\\\s+(\w+)", line) if kind == "link" else None
            return -1 if match[1] else 1, word[1] if word else kind, found["name"]
    return None


def parse_pod(text):
    """{(kind, name, interface)} of what POD_SCRIPT prints: JSON documents one after another. Without what every namespace has."""
    items, decoder, text = set(), json.JSONDecoder(), text.strip()
    while text:
        rows, end = decoder.raw_decode(text)
        text = text[end:].lstrip()
        for row in rows:
            name = row.get("ifname") or row.get("dev", "")
            if "kind" in row:
                items.add(("qdisc", row["kind"], name))
            elif "dst" in row:
                items.add(("route", f"{row['dst']} {row.get('gateway', '')}", name))
            elif "addr_info" in row:
                addresses = [f"{entry['local']}/{entry['prefixlen']}" for entry in row["addr_info"]]
                items |= {("link", name, name), *(("address", address, name) for address in addresses)}
    return {item for item in items if item[1] != "noqueue" and not item[1].startswith(("fe80:", "ff00:"))}


def describe_changes(balance):
    """"veth mn12, 2 routes; gone: ..." of {(kind, name, ...): how often it came, less how often it went}."""
    sides = []
    for sign in (1, -1):
        words = Counter()
        for (kind, name, *_), count in balance.items():
            word = {"address": name, "route": "route", "nft": f"nft {name}"}.get(kind, f"{kind} {name}")
            words[kind in ("route", "nft"), word] += max(count * sign, 0)
        sides.append(", ".join(f"{count} {word}{'s' * (count > 1)}" if is_counted else word
                               for (is_counted, word), count in sorted(words.items(), key=lambda item: item[0][0]) if count))
    return "; ".join(filter(None, (sides[0], sides[1] and f"gone: {sides[1]}")))


class Changes:
    """What calls change. early(event) is told of every event at once, of(call) is asked when a call has ended. epoch: as in Calls."""

    def __init__(self, epoch):
        need_tools("--changes", "ip", "tc", "nft", "nsenter")
        self.epoch, self.links, self.begun, self.pods, self.last = epoch, set(os.listdir("/sys/class/net")), {}, {}, {}
        self.lines, self.starts, self.monitors = deque(maxlen=100_000), deque(maxlen=1000), []
        for tool, (arguments, *_) in MONITORS.items():
            self.monitors.append(subprocess.Popen(
                [*WITH_PARENT, tool, *arguments.split()], start_new_session=True, env={**os.environ, "PATH": search_path()}, text=True,
                errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
            threading.Thread(target=self.read, args=(tool, self.monitors[-1].stdout), daemon=True).start()

    def read(self, tool, lines):
        for line in lines:
            stamp, _, rest = line.rstrip("\n").rpartition("] ") if line.startswith("[") else ("", "", line.rstrip("\n"))
            item = parse_monitor(tool, rest)
            if not item:
                continue
            sign, kind, name = item
            if kind not in ("address", "route", "qdisc", "nft"):
                if (sign > 0) == (name in self.links):
                    continue  # a link is told of whenever something about it changes
                (self.links.add if sign > 0 else self.links.discard)(name)
            self.lines.append((datetime.fromisoformat(stamp[1:]).timestamp() if stamp else time.time(), item))

    def close(self):
        for monitor in self.monitors:
            monitor.kill()
            monitor.wait()

    def early(self, event):
        kind, ts, pid = event[:3]
        if kind == "begin" and not event[3] and pid not in self.pods:  # what a plugin starts is not looked at
            self.begun[pid] = (event[4], {})
        elif kind == "word" and pid in self.begun:
            self.begun[pid][1][event[3]] = event[4]
        elif kind == "exec" and pid in self.begun:
            parent, words = self.begun.pop(pid)
            self.starts.append((ts + self.epoch) / 1e9)
            netns = read_words(words)[2].get("CNI_NETNS", "")
            paths = [path for path in (f"/proc/{parent}/root{netns}", netns) if netns.startswith("/") and os.path.exists(path)]
            with contextlib.suppress(OSError, IndexError):
                handle = os.open(paths[0], os.O_RDONLY)  # keeps the namespace until the call has ended, also if it is deleted
                self.pods[pid] = [handle, self.look_pod(handle)]
        elif kind == "exit" and len(self.pods.get(pid, ())) == 2:
            handle = self.pods[pid][0]
            self.pods[pid] += [self.look_pod(handle), os.fstat(handle).st_ino]
            os.close(handle)

    def look_pod(self, handle):
        _, stdout, _ = run(["nsenter", f"--net=/proc/{os.getpid()}/fd/{handle}", "sh", "-c", POD_SCRIPT])
        try:
            return parse_pod(stdout)
        except (ValueError, KeyError):
            return set()

    def of(self, call):
        """What a call changed, in words; "" for nothing."""
        end = call["time"] + call["duration_ms"] / 1000
        # What a monitor tells of comes a little late; what comes after another call's begin is that one's.
        end = min([end + 0.05, *(start for start in self.starts if start > end)])
        host = Counter()
        for when, (sign, kind, name) in list(self.lines):
            if call["time"] <= when <= end and (kind == "nft" or host[(kind, name)] != sign):
                host[(kind, name)] += sign
        words = {"host": describe_changes(host), "pod": ""}
        if call["parent"].get("elsewhere") and not words["host"]:
            words["host"] = f"not watched, for its caller has another: nsenter --net=/proc/{call['parent']['pid']}/ns/net {sys.argv[0]} ..."
        _, before, after, number = [*self.pods.pop(call["pid"], ()), None, None, None, None][:4]
        if after is not None:
            before = self.last.get(number, before)
            if call["command"] == "ADD" and "prevResult" not in parse_object(call["stdin"]):
                before = {item for item in before if item[2] != call["ifname"]}  # we may have looked late; an ADD finds nothing there
            self.last[number] = after
            words["pod"] = describe_changes({**dict.fromkeys(sorted(after - before), 1), **dict.fromkeys(sorted(before - after), -1)})
        return "; ".join(f"{where}: {text}" for where, text in words.items() if text)


# ---------------------------------------------------------------------------------------------------------------------
# trace
# ---------------------------------------------------------------------------------------------------------------------
WITH_PARENT = ("setpriv", "--pdeathsig", "INT")  # a backend ends with us, whatever ends us
CLOCKS = {"bpftrace": time.CLOCK_BOOTTIME, "strace": time.CLOCK_REALTIME}  # of the times in their events
TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


def plan_tracefs(argv):
    """The command with a tracefs of its own, where the machine has none mounted."""
    if any(os.path.isdir(f"{path}/events") for path in TRACEFS):
        return argv
    script = f'mount -t tracefs tracefs {TRACEFS[0]} && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *argv]


def bpftrace_backend(_options):
    """(argv, environment, parse(line) -> events) of bpftrace. SnoopError if it cannot be used here, with the reason."""
    need_tools("tracing", "bpftrace")
    version = re.search(r"(\d+)\.(\d+)", run(["bpftrace", "--version"], timeout_s=60)[1])
    if not version or (int(version[1]), int(version[2])) < (0, 17):
        raise SnoopError(f"bpftrace {version[0] if version else '?'} is too old, 0.17 is needed")
    code, listed, stderr = run(plan_tracefs([find_tool("bpftrace"), "-l", "tracepoint:syscalls:sys_enter_*"]), timeout_s=60)
    syscalls = re.findall(r"sys_enter_(\w+)", listed)
    if code or "execve" not in syscalls:
        reason = (stderr.strip().splitlines() or ["no tracepoint syscalls:sys_enter_execve"])[-1]
        raise SnoopError(f"this kernel has no tracepoints for system calls that bpftrace could use ({reason})")
    environ = {"BPFTRACE_MAP_KEYS_MAX": "65536", "BPFTRACE_MAX_MAP_KEYS": "65536", "BPFTRACE_PERF_RB_PAGES": "1024",
               "BPFTRACE_STRLEN": str(CHUNK), "BPFTRACE_MAX_STRLEN": str(CHUNK)}  # names before and since 0.20
    argv = plan_tracefs([find_tool("bpftrace"), "--no-warnings", "-f", "json", "-e", bpftrace_program(syscalls)])
    return argv, environ, lambda line: filter(None, [parse_bpftrace(line)])


def strace_backend(options):
    """The same of strace."""
    need_tools("tracing without bpftrace", "strace")
    pids = options.pid or [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and read_text(f"/proc/{pid}/comm").strip() in RUNTIMES]
    if not pids:
        raise SnoopError(f"strace: no container runtime runs here (looked for {', '.join(RUNTIMES)}); name its process: --pid PID")
    process_of = {int(os.path.basename(task)): pid for pid in pids for task in list_dir(f"/proc/{pid}/task")}
    for pid in pids:
        if pid not in process_of:
            raise SnoopError(f"--pid {pid}: there is no such process")
    parser = Strace(process_of)
    argv = [find_tool("strace"), *STRACE, "-o", "/proc/self/fd/1", *(word for pid in pids for word in ("-p", str(pid)))]
    return argv, {}, lambda line: parser.feed(line.decode("latin-1"))


def choose_backend(options):
    """(name, argv, environment, parse) of the backend: the one asked for, else the first that can be used."""
    need_root("trace")
    reasons = []
    for name, backend in (("bpftrace", bpftrace_backend), ("strace", strace_backend)):
        if options.backend in (None, name):
            try:
                return (name, *backend(options))
            except SnoopError as error:
                reasons.append(str(error))
    raise SnoopError("; ".join(reasons))


class Tracer:
    """A running backend. events() yields each event in order of time, and None whenever there is time to look at other things.

    early: is told of every event when it comes, not yet in order.
    """

    def __init__(self, name, argv, environ, parse, early):
        self.name, self.parse, self.early = name, parse, early
        self.is_ready, self.is_asked, self.stopped_at, self.deadline = False, False, 0, time.monotonic() + 300
        self.canaries, self.awaited, self.woken_at, self.count = {}, set(), 0, 0  # {process ID: name}; names; time in ns; started so far
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the backend
        # In a session of its own: Ctrl-C is for us, and we end it.
        self.process = subprocess.Popen([*WITH_PARENT, *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.stderr,
                                        start_new_session=True, env={**os.environ, **environ})

    def now(self):
        return time.clock_gettime_ns(CLOCKS[self.name])

    def stop(self):
        """It ends when it has told what it knows."""
        self.stopped_at = self.stopped_at or self.now()

    def ask(self):
        """Ask it to end, once: bpftrace throws away what it has not yet read."""
        if not self.is_asked:
            self.is_asked = True
            self.process.send_signal(signal.SIGINT)

    def close(self):
        self.ask()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def events(self):
        waiting, rest, data, out = [], b"", None, self.process.stdout.fileno()
        while data != b"" and not (self.stopped_at and self.now() - self.stopped_at > 15 * 10**9):
            data = os.read(out, 1 << 20) if select.select([out], [], [], 0.1)[0] else None
            *lines, rest = (rest + (data or b"")).split(b"\n")
            for event in (event for line in lines for event in self.parse(line)):
                self.collect(event, waiting)
            settled = float("inf") if self.name == "strace" else self.settle(waiting, data is None)
            yield from take(waiting, settled)
            yield None
            if self.stopped_at and (not self.is_ready or (data is None and settled > self.stopped_at)):
                self.ask()
            elif not self.is_ready:
                self.get_ready()
        yield from take(waiting)

    def collect(self, event, waiting):
        """Put an event to those that wait, but for those of our own processes."""
        kind, _, pid = event[:3]
        if kind == "word" and event[4].startswith(f"CNI_COMMAND={CANARY}"):
            self.canaries[pid] = event[4].partition("=")[2]
        if kind == "exit" and pid in self.canaries:
            self.is_ready = True
            self.awaited.discard(self.canaries.pop(pid))
            waiting[:] = [other for other in waiting if other[2] != pid]
            return
        waiting.append(event)
        if kind not in ("lost", "data"):
            self.early(event)

    def settle(self, waiting, is_idle):
        """The time in ns up to which every processor's events are here: when the last processes of our own were started and have been
        seen to end, one on each processor. 0: not known. bpftrace reads one processor after the other, and may be kept from it."""
        if self.awaited and self.now() - self.woken_at < 5 * 10**9:
            return 0
        settled = self.woken_at
        if self.is_ready and (waiting or self.stopped_at > settled) and (is_idle or self.now() - settled > 10**9):
            self.wake()
        return settled

    def wake(self):
        """A process of our own on every processor. Besides: the kernel tells of events that it lost only with the next one there."""
        self.woken_at, places = self.now(), {}
        for processor in os.sched_getaffinity(0):
            self.count += 1
            places[f"{CANARY}{self.count}"] = processor
        self.awaited = set(places)
        threading.Thread(target=start_on, args=(places,), daemon=True).start()  # meanwhile the backend must find a reader

    def get_ready(self):
        """Show that the backend works, before anybody waits for calls."""
        if self.name == "strace":
            traced = [pid for word, pid in zip(self.process.args, self.process.args[1:]) if word == "-p"]
            self.is_ready = not any("TracerPid:\t0\n" in read_text(f"/proc/{pid}/status") for pid in traced)
        elif self.now() - self.woken_at > 10**9 // 2:
            self.wake()
        if time.monotonic() > self.deadline:
            raise SnoopError(f"{self.name} shows nothing, not even a process of our own: {self.said() or 'and does not say why'}")

    def said(self):
        """The last lines of what it wrote to stderr, without what is of no interest."""
        self.stderr.seek(0)
        lines = [line for line in self.stderr.read().decode(errors="replace").splitlines() if line.strip() and "RLIMIT_MEMLOCK" not in line]
        return " | ".join(lines[-4:])[-600:]


def start_on(places):
    """Run a process on each processor of {name: processor}: it has the affinity of the thread that starts it."""
    for name, processor in places.items():
        os.sched_setaffinity(0, {processor})
        run(["true"], environ={"CNI_COMMAND": name})


def is_wanted(call, options):
    """Whether a call passes the filters; one that a wanted delegate belongs to does, too."""
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
    counts.update(calls=1, failed=is_failed(call))
    line = json.dumps(call)
    if file:
        print(line, file=file, flush=True)
    if not options.json:
        colour = COLOURED if sys.stdout.isatty() and "NO_COLOR" not in os.environ else PLAIN
        line = "\n".join([*format_call(call, options.full, options.replay, colour), ""])
    print(line.encode("utf-8", "replace").decode(), flush=True)


def tell(text):
    print(f"cnisnoop: {text}", file=sys.stderr, flush=True)


def trace(options):
    """Show calls until Ctrl-C. Returns the exit status."""
    name, argv, environ, parse = choose_backend(options)
    epoch = time.time_ns() - time.clock_gettime_ns(CLOCKS[name])
    calls, counts, file = Calls(look_parent, epoch), Counter(), None
    with contextlib.ExitStack() as opened:
        if options.out:
            file = opened.enter_context(open(options.out, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)))
        changes = opened.enter_context(contextlib.closing(Changes(epoch))) if options.changes else None
        early = changes.early if changes else lambda event: None
        tracer = opened.enter_context(contextlib.closing(Tracer(name, argv, environ, parse, early)))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: tracer.stop())
        for call in watch(tracer, calls):
            show({**call, "changes": changes.of(call)} if changes else call, options, counts, file)
    if not tracer.is_ready and tracer.process.returncode:
        raise SnoopError(f"{name} ended: {tracer.said() or 'and does not say why'}")
    tell(f"{counts['calls']} calls, {counts['failed']} failed" + f", {calls.lost} events lost" * bool(calls.lost))
    return 0


def watch(tracer, calls):
    """Yields calls until the backend ends, and says on the way what is not as it should be."""
    told, lost = set(), 0
    for event in tracer.events():
        call = calls.feed(event) if event else None
        if call:
            yield call
        if calls.lost > lost:
            lost = calls.lost
            tell(f"{lost} events lost: {tracer.name} cannot keep up, some calls are not complete")
        if event is None and tracer.is_ready:
            for text in [f"watching with {tracer.name}; Ctrl-C ends it", *slow_calls(calls, tracer.now())]:
                if text not in told:
                    told.add(text)
                    tell(text)
    yield from calls.unfinished(tracer.now())


def slow_calls(calls, now):
    """A line for each call that runs for more than five seconds: one that hangs never ends, and so is never shown."""
    for pid, process in calls.processes.items():
        if process.is_call and not process.caller() and now - process.start > 5 * 10**9 and not is_gone(pid):  # else its end was lost
            words = (process.env.get("CNI_COMMAND", ""), process.path, process.env.get("CNI_CONTAINERID", "")[:13], f"process {pid}")
            yield f"running for 5 s: {printable(' '.join(words))}"


# What a recording has to hold, see Calls; a list or object of one form: [form], {str: form}.
COMMAND_FORM = {"argv": [str], "exit": (int, type(None)), "signal": str, "duration_ms": (int, float), "stdin": str, "stderr": str}
CALL_TEXTS = ("command", "plugin", "path", "container_id", "netns", "ifname", "network", "error", "stdout")
CALL_FORM = {**COMMAND_FORM, **dict.fromkeys(CALL_TEXTS, str),
             **dict.fromkeys(("stdin_size", "stdout_size", "stderr_size", "chain"), int), "time": (int, float), "env": {str: str},
             "parent": {"pid": int, "comm": str}, "incomplete": bool, "running": bool, "commands": [COMMAND_FORM]}
CALL_FORM["delegates"] = [CALL_FORM]
OPTIONAL = {"stdin_base64": "", "changes": "", "masked": False}


def has_form(value, form):
    """Whether a JSON value is of a form: a type, types, a list of one form, or an object of these keys at least."""
    if isinstance(form, list):
        return isinstance(value, list) and all(has_form(entry, form[0]) for entry in value)
    if isinstance(form, dict) and str in form:
        return isinstance(value, dict) and has_form([*value.values()], [form[str]])
    if isinstance(form, dict):
        optional = {key: type(OPTIONAL[key]) for key in OPTIONAL if key in value} if isinstance(value, dict) else {}
        return isinstance(value, dict) and all(key in value and has_form(value[key], kind) for key, kind in {**form, **optional}.items())
    bounded = not isinstance(value, (int, float)) or abs(value) < 1e11
    return isinstance(value, form) and isinstance(value, bool) == (form is bool) and bounded


def view(options):
    """Show a recording."""
    with open(options.file, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            call = parse_object(line)
            if not has_form(call, CALL_FORM):
                raise SnoopError(f"{options.file}, line {number}: no call as `trace --out` writes it")
            show(call, options, Counter())
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# cache
# ---------------------------------------------------------------------------------------------------------------------
STATES = {True: "in use", False: "stale: its namespace is gone", None: "not known"}


def look_netns(path):
    """Whether there is a network namespace at path, None without one. A file that is left where it was mounted is no namespace."""
    try:
        return os.stat(path).st_dev == os.stat("/proc/self/ns/net").st_dev if path else None
    except (OSError, ValueError):  # ValueError: a NUL byte
        return False


def objects_in(value):
    """The objects in what should be a list of such."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def parse_cached(text):
    """{network, container_id, ifname, netns, addresses, problem} of one of libcni's files."""
    value = parse_object(text)
    result = value.get("result") if isinstance(value.get("result"), dict) else {}
    interfaces, ips = (objects_in(result.get(key)) for key in ("interfaces", "ips"))
    sandbox = next((entry["sandbox"] for entry in interfaces if entry.get("sandbox")), "")
    return {"network": str(value.get("networkName", "")), "container_id": str(value.get("containerId", "")),
            "ifname": str(value.get("ifName", "")), "netns": str(value.get("netns") or sandbox),
            "addresses": [str(ip.get("address")) for ip in ips],
            "problem": "" if value.get("kind") == "cniCacheV1" else "not readable as a result that libcni keeps"}


def look_cache(directory):
    """The rows of `cache`: what parse_cached returns, with path, age_s and state."""
    rows = []
    for path in list_dir(directory):
        row = {"path": path, **parse_cached(read_text(path)), "age_s": int(time.time() - os.stat(path).st_mtime)}
        rows.append({**row, "state": row["problem"] or STATES[look_netns(row["netns"])]})
    return rows


def cache(options):
    """Print what libcni keeps."""
    rows = look_cache(options.cache_dir)
    if options.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(f"nothing in {options.cache_dir}: no attachment, or a runtime that keeps its results elsewhere")
    else:
        table = [("NETWORK", "CONTAINER", "INTERFACE", "ADDRESSES", "AGE", "STATE", "NAMESPACE")]
        for row in rows:
            hours, minutes, seconds = row["age_s"] // 3600, row["age_s"] // 60, row["age_s"] % 60
            words = (row["network"] or os.path.basename(row["path"]), row["container_id"][:13], row["ifname"], " ".join(row["addresses"]),
                     f"{hours}h" if hours else f"{minutes}m{seconds}s", row["state"], row["netns"])
            table.append(tuple(map(printable, words)))
        widths = [max(map(len, column)) for column in zip(*table)]
        for words in table:
            print("  ".join(map(str.ljust, words, widths)).rstrip())
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# doctor
# ---------------------------------------------------------------------------------------------------------------------
# A finding is (what is wrong, what to do).

NEEDS = {  # of the kernel: what to try in a namespace that is gone afterwards, and the plugins that need it; "ready": of MNCNI's agent
    "bridge": ("ip link add probe type bridge", {"naivewg", "bridge"}),
    "veth": ("ip link add probe type veth", {"naivewg", "bridge", "ptp"}),
    "nft": ("nft add table inet probe", {"portmap", "ready"}),
    "ifb": ("ip link add probe type ifb", {"bandwidth"}),
    "tbf": ("tc qdisc add dev lo root tbf rate 1mbit burst 10k latency 1s", {"bandwidth"}),
    "netem": ("tc qdisc add dev lo root netem delay 1ms", {"lat"}),
    "WireGuard": ("ip link add probe type wireguard", {"ready"}),
}


def parse_network(path, text):
    """(network configuration list, problem) of a file as libcni reads it; {} if there is a problem."""
    try:
        conf = json.loads(text)
    except json.JSONDecodeError as error:
        return {}, f"{path}:{error.lineno}:{error.colno}: {error.msg}" + " (the file is empty)" * (not text.strip())
    except (ValueError, RecursionError) as error:
        return {}, f"{path}: {error}"
    if isinstance(conf, dict) and not path.endswith(".conflist"):
        if "plugins" in conf:
            return {}, f'{path}: has "plugins", so its name has to end in .conflist'
        conf = {"name": conf.get("name"), "cniVersion": conf.get("cniVersion"), "plugins": [conf]}
    problem = ""
    if not isinstance(conf, dict):
        problem = "not a JSON object"
    elif not isinstance(conf.get("name"), str) or not conf["name"]:
        problem = 'has no "name"'
    elif not isinstance(conf.get("plugins"), list) or not conf["plugins"]:
        problem = 'has no "plugins"'
    elif not all(isinstance(plugin, dict) and isinstance(plugin.get("type"), str) for plugin in conf["plugins"]):
        problem = 'a plugin without a "type"'
    return ({}, f"{path}: {problem}") if problem else (conf, "")


def judge_networks(texts):
    """(rows, findings, network) of {path: text of a file in the configuration directory}, as containerd reads them.

    rows: [(path, verdict)]. It takes the first file in alphabetic order, and if that one is broken none at all.
    """
    rows, findings, network, first = [], [], None, ""
    for path in sorted(texts):
        if not path.endswith((".conflist", ".conf", ".json")):
            rows.append((path, "ignored: its name ends in neither .conflist nor .conf nor .json"))
            continue
        conf, problem = parse_network(path, texts[path])
        if problem:
            way_out = f"mend it before it is used in place of {first}" if first else "containerd uses no network at all until it is mended"
            findings.append((problem, way_out))
        verdict = f'network "{conf["name"]}"' if conf else "broken"
        rows.append((path, f"ignored, for {first} comes first in the alphabet: {verdict}" if first else f"in use: {verdict}"))
        if not first:
            first, network = os.path.basename(path), conf
    if not first:
        findings.append(("no network configuration: the node stays NotReady", "write a .conflist, or start what should write it"))
    return rows, findings, network


def plan_plugins(network):
    """[(type, network configuration)] of the plugins of a list and of their IPAM plugins, as a runtime hands them out."""
    found = []
    listed = network.get("cniVersions") if isinstance(network.get("cniVersions"), list) else []
    versions = [str(version) for version in (network.get("cniVersion") or "0.1.0", *listed)]
    common = {"name": network["name"], "cniVersion": max(versions, key=lambda text: [int(part) for part in re.findall(r"\d{1,9}", text)])}
    for plugin in network["plugins"]:
        kind = plugin["ipam"].get("type") if isinstance(plugin.get("ipam"), dict) else None
        found += [(name, {**plugin, **common}) for name in (plugin["type"], str(kind or "")) if name not in ("", "mncni.py")]
    return found


def look_plugin(kind, conf, bin_dirs):
    """Findings about one plugin: is it there, does it speak the version, what does it say to STATUS."""
    if "/" in str(kind):
        return [(f'"{kind}" is no name of a plugin', "give the name of a program in a plugin directory, no path: runtimes refuse it")]
    path = next((path for path in (os.path.join(directory, str(kind)) for directory in bin_dirs) if os.path.isfile(path)), None)
    if not path:
        return [(f'plugin "{kind}" is missing: not in {" ".join(bin_dirs)}', "every pod fails until it is installed")]
    if not os.access(path, os.X_OK):
        return [(f"{path} is not executable", f"chmod +x {path}")]
    environ = dict.fromkeys(("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"), "")
    environ.update(CNI_COMMAND="VERSION", CNI_PATH=":".join(bin_dirs))
    version = conf["cniVersion"]
    code, stdout, stderr = run([path], json.dumps({"cniVersion": version}), environ)
    supported = parse_object(stdout).get("supportedVersions")
    if code or not isinstance(supported, list):
        said = (stderr or stdout).strip().splitlines() or ["nothing"]
        return [(f"{path} does not answer VERSION: exit status {code}, it says: {said[-1]}", "try it by hand, or replace it")]
    if version not in supported:
        return [(f"{path} does not speak version {version} of its configuration, but {', '.join(map(str, supported))}",
                 'change "cniVersion", or update the plugin')]
    if version == "1.1.0":  # STATUS came with it
        code, stdout, stderr = run([path], json.dumps(conf), {**environ, "CNI_COMMAND": "STATUS"})
        error = parse_object(stdout)
        said = f"error {error['code']}, {error.get('msg', '')}" if "code" in error else (stderr or stdout).strip() or f"exit status {code}"
        return [(f"{path} says that it cannot serve an ADD now: {said}", "see to what it waits for")] if code else []
    return []


def look_needs(plugins):
    """Findings about what [(type, configuration)] need: commands, and as root what the kernel has to have."""
    kinds = {kind for kind, _ in plugins} | {"ready" for _, conf in plugins if conf.get("ready")}
    for own in (conf.get("plugin") for _, conf in plugins):
        kinds.update(map(str, own if isinstance(own, list) else [own]))
    findings = []
    for name, (command, needed_by) in NEEDS.items():
        tool, wireguard_go = command.split()[0], name == "WireGuard" and find_tool("wireguard-go")
        if not kinds & needed_by or wireguard_go:
            continue
        code, _, stderr = run(["unshare", "--net", *command.split()]) if find_tool(tool) and not os.geteuid() else (0, "", "")
        if not find_tool(tool):
            findings.append((f"{tool} is missing", f"apt-get install {PACKAGES.get(tool, tool)}"))
        elif code:
            findings.append((f"the kernel has no {name}: {stderr.strip()}", "load or install its module: modprobe, linux-modules-extra"))
    return list(dict.fromkeys(findings))


def look_leases(directories, rows):
    """Findings about leases whose attachment libcni does not know, or whose namespace is gone. directories: one per network."""
    known = {(row["container_id"], row["ifname"]): row["state"] for row in rows}
    boot_id, findings = read_text("/proc/sys/kernel/random/boot_id").strip(), []
    for path in (path for directory in directories for path in list_dir(directory)):
        words = read_text(path).split() if re.fullmatch(r"[\da-f.:]{3,}", os.path.basename(path)) else []
        if len(words) == 2 or words[2:3] == [boot_id]:  # container ID, interface; a lease of an earlier boot counts as free
            state = known.get((words[0], words[1]), "stale: libcni knows no such attachment")
            if state.startswith("stale"):
                findings.append((f"lease {path} of {words[0][:13]} {words[1]} is {state}", f"if no such container runs: rm {path}"))
    return findings


def look_host():
    """Findings about forwarding."""
    findings = []
    if read_text("/proc/sys/net/ipv4/ip_forward").strip() == "0":
        findings.append(("the node does not forward: net.ipv4.ip_forward is 0", "sysctl -w net.ipv4.ip_forward=1"))
    entries = objects_in(parse_object(run(["nft", "-json", "list", "chains"])[1]).get("nftables"))
    for chain in objects_in([entry.get("chain") for entry in entries]):
        if (chain.get("hook"), chain.get("policy")) == ("forward", "drop"):
            what = " ".join(str(chain.get(key)) for key in ("family", "table", "name"))
            findings.append((f"chain {what} drops what is forwarded, unless one of its rules accepts it",
                             f"is it Docker's or a firewall's? Accept pods there: nft insert rule {what} ip saddr POD-CIDR accept"))
    if "-P FORWARD DROP" in run(["iptables-legacy", "-S", "FORWARD"])[1]:
        findings.append(("iptables-legacy drops what is forwarded: -P FORWARD DROP", "accept pods there: iptables-legacy -I FORWARD ..."))
    return findings


def look_containerd():
    """(conf_dir, [bin_dir]) that containerd's configuration names, else the defaults."""
    text = read_text("/etc/containerd/config.toml")
    conf_dir = re.search(r"""^\s*conf_dir\s*=\s*["']([^"']+)""", text, re.MULTILINE)
    bin_dirs = re.search(r"""^\s*bin_dirs?\s*=(.+)""", text, re.MULTILINE)
    return conf_dir[1] if conf_dir else "/etc/cni/net.d", re.findall(r"/[^\"', ]+", bin_dirs[1]) if bin_dirs else ["/opt/cni/bin"]


def doctor(options):
    """Print what is in use and what is wrong. Exit status 1 if there are findings."""
    conf_dir, bin_dirs = look_containerd()
    conf_dir, bin_dirs = options.conf_dir or conf_dir, options.bin_dir or bin_dirs
    rows, findings, network = judge_networks({path: read_text(path) for path in list_dir(conf_dir) if os.path.isfile(path)})
    plugins = plan_plugins(network) if network else []
    for kind, conf in plugins:
        findings += look_plugin(kind, conf, bin_dirs)
    findings += look_needs(plugins)
    if not any(os.path.isfile(os.path.join(directory, "loopback")) for directory in bin_dirs):
        findings.append((f'plugin "loopback" is missing: not in {" ".join(bin_dirs)}',
                         "containerd starts no pod without it, unless told to use its own"))
    cached = look_cache(options.cache_dir)
    findings += [(f"cached result {row['path']}: {row['state']}", f"if no such container runs: rm {row['path']}")
                 for row in cached if row["state"] not in (STATES[True], STATES[None])]
    leases = [path for data_dir in options.data_dir or DATA_DIRS for path in list_dir(data_dir) if os.path.isdir(path)]
    findings += look_leases(leases, cached)
    findings += look_host()
    if options.json:
        print(json.dumps({"configurations": [{"path": path, "verdict": verdict} for path, verdict in rows],
                          "plugins": [kind for kind, _ in plugins],
                          "findings": [{"what": what, "do": way_out} for what, way_out in findings]}, indent=2))
        return 1 if findings else 0
    print(f"{conf_dir}:" + " no files" * (not rows))
    for path, verdict in rows:
        print(f"  {printable(os.path.basename(path))}: {printable(verdict)}")
    print(f"plugins: {printable(', '.join(kind for kind, _ in plugins))}\n" if plugins else "")
    for what, way_out in findings:
        print(f"FINDING: {printable(what)}\n     do: {printable(way_out)}")
    print(f"{len(findings)} findings" if findings else "nothing wrong was found")
    if os.geteuid():
        tell("without root the firewall, the kernel's features and namespaces that others made are not looked at")
    return 1 if findings else 0


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------
DATA_DIRS = ("/var/lib/cni/mncni", "/var/lib/cni/networks")  # leases, of MNCNI and of host-local: a directory per network


def parse_options(argv):
    parser = argparse.ArgumentParser(prog="cnisnoop.py", description=__doc__.partition("\n\n")[0],
                                     epilog="Exit status: 0 fine, 1 failed or findings, 2 usage.")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    shown = argparse.ArgumentParser(add_help=False)
    shown.add_argument("--json", action="store_true", help="one JSON object per call and line")
    shown.add_argument("--full", action="store_true", help="whole JSON, every command that a plugin ran")
    shown.add_argument("--replay", choices=("error", "always", "never"), default="error", help="a shell line that repeats the call (error)")
    shown.add_argument("--show-secrets", action="store_true", help="do not hide the values of keys such as password, token, psk")
    shown.add_argument("--plugin", metavar="NAME", help="only calls of this plugin")
    shown.add_argument("--container", metavar="ID", help="only calls for this container ID, or its beginning, or pod name")
    shown.add_argument("--command", metavar="WORD", help="only ADD, DEL, CHECK, GC, STATUS or VERSION")
    shown.add_argument("--failed", action="store_true", help="only calls that failed")
    traced = commands.add_parser("trace", parents=[shown], help="show each CNI call as it happens (root)")
    traced.add_argument("--backend", choices=("bpftrace", "strace"), help="default: bpftrace if it can be used, else strace")
    traced.add_argument("--pid", type=int, action="append", help="strace: a process whose children are followed (the container runtimes)")
    traced.add_argument("--changes", action="store_true", help="also what each call changed on the host and in the pod")
    traced.add_argument("--out", metavar="FILE", help="also append each call to FILE, for `view`")
    viewed = commands.add_parser("view", parents=[shown], help="show a recording again")
    viewed.add_argument("file", metavar="FILE")
    kept = argparse.ArgumentParser(add_help=False)
    kept.add_argument("--json", action="store_true")
    kept.add_argument("--cache-dir", metavar="DIR", default="/var/lib/cni/results", help="libcni's results (/var/lib/cni/results)")
    commands.add_parser("cache", parents=[kept], help="what libcni keeps of each attachment, stale ones marked")
    checked = commands.add_parser("doctor", parents=[kept], help="which configuration is in use, and what is wrong")
    checked.add_argument("--conf-dir", metavar="DIR", help="containerd's, else /etc/cni/net.d")
    checked.add_argument("--bin-dir", metavar="DIR", action="append", help="containerd's, else /opt/cni/bin")
    checked.add_argument("--data-dir", metavar="DIR", action="append", help=f"leases ({' and '.join(DATA_DIRS)})")
    return parser.parse_args(argv)


def main(argv):
    options = parse_options(argv)
    try:
        return {"trace": trace, "view": view, "cache": cache, "doctor": doctor}[options.name](options)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (SnoopError, OSError) as error:
        tell(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error)
        return 1
    except KeyboardInterrupt:  # before there is anything to end
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
