"""The command blocks of the documents, and running them.

A block fenced as ```console has lines `$ command` (`> ` goes on with the line above), each followed by what a reader sees. `...` stands for
any text in a line, and on a line of its own for any lines. A block fenced as ```sh has commands alone, which have to succeed. Directly
above a block may stand

    <!-- not run: reason -->        it cannot run here
    <!-- needs: netem, strace -->   features of the kernel (tests/conftest.py) or programs; without one it is left out, aloud
"""
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"(?:^<!-- (?P<word>not run|needs): (?P<text>[^\n]*) -->\n)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$",
                   re.DOTALL | re.MULTILINE)
KINDS = {"sh", "console", "python", "json", "text", "ini", "yaml"}
TIMEOUT_S = 120


class Block(NamedTuple):
    """line: of its fence; steps: [(command, the lines that it prints, or None for any)]; mark: ("not run" or "needs", text) or ("", "")."""

    line: int
    steps: list
    mark: tuple


def parse_steps(kind, body):
    if kind == "sh":
        return [(body, None)]
    steps = []
    for line in body.splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], []))
        elif line.startswith("> ") and steps and not steps[-1][1]:
            steps[-1] = (f"{steps[-1][0]}\n{line[2:]}", [])
        else:
            assert steps, f"output before the first command: {line!r}"
            steps[-1][1].append(line)
    return steps


def parse(text):
    """The Blocks of a document that hold commands. AssertionError for a block that holds nothing, or whose kind nobody knows."""
    blocks = []
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("kind")) + 1
        assert found["kind"] in KINDS, f"line {line}: a block of the kind {found['kind']!r}; there are {sorted(KINDS)}"
        if found["kind"] in ("sh", "console"):
            steps = parse_steps(found["kind"], found["body"])
            assert any(command.strip() for command, _ in steps), f"line {line}: no command"
            blocks.append(Block(line, steps, (found["word"] or "", found["text"] or "")))
    return blocks


def matches(wanted, got):
    """Whether lines are as a document shows them."""
    if not wanted:
        return not got
    if wanted[0].strip() == "...":
        return any(matches(wanted[1:], got[start:]) for start in range(len(got) + 1))
    pattern = ".*".join(map(re.escape, wanted[0].rstrip().split("...")))
    return bool(got) and re.fullmatch(pattern, got[0].rstrip()) is not None and matches(wanted[1:], got[1:])


def run(command, cwd, environ):
    """(exit status, the lines that it printed). Its output is a file: what it leaves in the background does not hold anybody up."""
    with open(cwd / ".output", "w+") as out:
        argv = ["bash", "-c", command]
        done = subprocess.run(argv, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=TIMEOUT_S, check=False)
        out.seek(0)
        return done.returncode, out.read().splitlines()
