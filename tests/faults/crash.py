"""Ends a process by SIGKILL at any one of its steps: before each change that it makes to the world outside it.

    outcome = Child(enter, act, at=0).outcome()      # act() runs to its end in a child: {"steps": what they are, "reply": ...}
    child = Child(enter, act, at=7)                  # the same, killed before step 7; then it is the test's turn
    child.outcome()                                  # {"killed": the step's name}, when what the child had started is gone, too

A step is a change of a file (a write of one has two, half of the text apart), a lock, a command that changes something, a request to an
API. After one step is before the next, and the last is before the answer is given. A command has several: before it is started; when it
runs; and, for a batch, after each line, as if it had been killed along with its parent (what the end of a container or a service does).
All that is put in from outside, so what is killed is the program as it is.
"""

import builtins
import ctypes
import difflib
import fcntl
import http.client
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback

LOOKS = {"-json", "-j", "show", "monitor", "-IS", "/var/lib/bin/mncni"}  # in commands that change nothing; the last two try the plugin
FILES = ("rename", "replace", "unlink", "remove", "link", "symlink", "mkdir", "rmdir", "chmod", "fsync", "ftruncate", "truncate")
PATIENCE_S = 60


class Steps:
    """Counts the steps of this process; its `at`-th is its last, and goes to the pipe `writer`."""

    def __init__(self, at, writer):
        self.names, self.at, self.writer, self.lock, self.send = [], at, writer, threading.Lock(), os.write

    def say(self, what):
        self.send(self.writer, (json.dumps(what) + "\n").encode())

    def __call__(self, name):
        if self.is_last(name):
            self.die()

    def is_last(self, name):
        """Count a step. Whether the caller has to die now."""
        with self.lock:
            self.names.append(name)
            if len(self.names) == self.at:
                self.say({"killed": f"step {self.at}: {name}"})
            return len(self.names) == self.at

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(PATIENCE_S)


def hook_all(steps):
    """Have everything of this process that changes the world outside count as steps."""
    hook_files(steps)
    hook_commands(steps)
    hook_requests(steps)


def hook_files(steps):
    for name in FILES:
        setattr(os, name, stepping(steps, name, getattr(os, name)))
    fcntl.flock = stepping(steps, "flock", fcntl.flock)
    os.open = stepping(steps, "open", os.open, lambda path, flags, *_, **__: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    open_file = builtins.open

    def open_half(path, mode="r", *args, **kwargs):
        if not set(mode) & set("wax+"):
            return open_file(path, mode, *args, **kwargs)
        if isinstance(path, str):
            steps(f"open {path}")
        return HalfFile(open_file(path, mode, *args, **kwargs), steps)

    builtins.open = open_half


def hook_requests(steps):
    send, receive = http.client.HTTPConnection.request, http.client.HTTPConnection.getresponse

    def request(self, method, path, *args):
        steps(f"before {method} {path}")
        send(self, method, path, *args)
        steps(f"sent {method} {path}")

    def getresponse(self):
        response = receive(self)
        steps("answered")
        return response

    http.client.HTTPConnection.request, http.client.HTTPConnection.getresponse = request, getresponse


def stepping(steps, name, function, is_step=lambda *_, **__: True):
    def step_first(*args, **kwargs):
        if is_step(*args, **kwargs):
            steps(f"{name} {' '.join(str(arg) for arg in args)}"[:200])
        return function(*args, **kwargs)

    return step_first


class HalfFile:
    """A file that is written in two halves."""

    def __init__(self, file, steps):
        self.file, self.steps = file, steps

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, text):
        for half in (text[: len(text) // 2], text[len(text) // 2 :]):
            self.file.write(half)
            self.file.flush()
            self.steps(f"wrote {half[-40:]!r}")


def hook_commands(steps):
    """The steps of commands that change something."""
    spawn = os.posix_spawn

    def posix_spawn(program, argv, environ, file_actions, **options):
        actions = [*file_actions, (os.POSIX_SPAWN_DUP2, steps.writer, 99)]
        if LOOKS & set(argv):
            return spawn(program, argv, environ, file_actions=actions, **options)
        steps(f"before {' '.join(argv)}")
        if "-batch" in argv:
            stdin = next(fd for _, fd, place in file_actions if place == 0)
            lines = os.pread(stdin, 1 << 20, 0).splitlines(True)
            for number in range(1, len(lines)):
                if steps.is_last(f"after {lines[number - 1].decode().strip()!r}, the command killed along"):
                    os.truncate(stdin, len(b"".join(lines[:number])))
                    os.waitpid(spawn(program, argv, environ, file_actions=actions, **options), 0)
                    steps.die()
        pid = spawn(program, argv, environ, file_actions=actions, **options)
        steps(f"started {' '.join(argv)}")
        return pid

    class Popen(subprocess.Popen):
        def __init__(self, argv, **options):
            steps(f"before {' '.join(argv)}")
            super().__init__(argv, **options)
            steps(f"started {' '.join(argv)}")

    os.posix_spawn, subprocess.Popen = posix_spawn, Popen


# ---- children ----


class Child:
    """A child that does enter(), then act() with hooks, and is killed at a step, at none for at=0, or has no hooks for at=None. It has
    ended when this returns; what it had started may go on."""

    def __init__(self, enter, act, at=None, hook=hook_all):
        self.reader, writer = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self.live(enter, act, at, hook, writer)
        os.close(writer)
        self.killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    def live(self, enter, act, at, hook, writer):
        try:
            steps = Steps(at or 0, writer)
            enter()
            if at is not None:
                hook(steps)
            reply = act()
            if at is not None:
                steps("before it answers")
            steps.say({"steps": steps.names, "reply": reply})
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(0)

    def outcome(self):
        """{"killed": the step's name} or {"steps", "reply": what act returned}, when what it had started is gone, too."""
        data, deadline = b"", time.monotonic() + PATIENCE_S
        while select.select([self.reader], [], [], max(0, deadline - time.monotonic()))[0]:
            piece = os.read(self.reader, 1 << 16)
            if not piece:
                os.close(self.reader)
                assert data, "the child ended with an exception, see above"
                return json.loads(data.splitlines()[-1])
            data += piece
        raise AssertionError(f"what the child had started runs on after {PATIENCE_S} s")


def namespaces(**paths):
    """enter() for a child: join the namespaces at these paths, net=..., mnt=..., pid=..."""
    kinds = {"net": 0x40000000, "mnt": 0x00020000, "pid": 0x20000000}
    files = {kind: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for kind, path in paths.items()}
    libc = ctypes.CDLL(None, use_errno=True)

    def enter():
        for kind, fd in files.items():
            if libc.setns(fd, kinds[kind]):
                raise OSError(ctypes.get_errno(), f"setns {kind}")
        os.chdir("/")
        inner = os.fork() if "pid" in files else 0  # a PID namespace is for children only
        if inner:
            status = os.waitpid(inner, 0)[1]
            os.kill(os.getpid(), signal.SIGKILL) if os.WIFSIGNALED(status) else os._exit(0)

    return enter


def each_step(start):
    """start(1), start(2), ...: a Child each, killed at that step, up to and with the first that gets to its end."""
    for number in itertools.count(1):
        child = start(number)
        yield child
        if not child.killed:
            return


def diff(before, after):
    """The lines that have gone, and those that have come; "" if there are none."""
    return "\n".join(list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:])
