"""Every command block of the documents runs, in a copy of the project, with a lab of its own; what they print is as the documents say."""

import os
import re
import shutil
import subprocess

import pytest

import agent
import cnisnoop
import kube
import mncni
import nodeipam
from deploy import lab as labs
from tests.conftest import FEATURES, kernel_has
from tests.docs import blocks

PLACES = [*sorted(blocks.ROOT.glob("*.md")), *sorted(blocks.ROOT.glob("docs/*.md")), *sorted(blocks.ROOT.glob("deploy/**/*.md"))]
RUN = [path for path in PLACES if any(block.mark[0] != "not run" for block in blocks.parse(path.read_text()))]
MODULES = {"mncni": mncni, "agent": agent, "kube": kube, "nodeipam": nodeipam, "cnisnoop": cnisnoop, "lab": labs}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(a copy of the project, the environment): with a `sudo` that does nothing, and a lab that is gone at the end."""
    top = tmp_path_factory.mktemp("copy")
    files = ["git", "-c", "safe.directory=*", "ls-files"]  # the checkout may belong to another user
    for name in subprocess.run(files, cwd=blocks.ROOT, capture_output=True, text=True, check=True).stdout.split("\n"):
        if name and os.path.exists(blocks.ROOT / name):
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(blocks.ROOT / name, top / name)
    (top / ".bin").mkdir()
    (top / ".bin/sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (top / ".bin/sudo").chmod(0o755)
    outer = re.compile("MAKE|MFLAGS$|ARGS$")  # a make below a make would take its words, and say where it is
    environ = {name: value for name, value in os.environ.items() if not outer.match(name)}
    environ = {**environ, "PATH": f"{top}/.bin:{os.environ['PATH']}:/usr/sbin:/sbin", "MNCNI_LAB": f"mncni-docs-{os.getpid()}"}
    yield top, environ
    subprocess.run(["deploy/lab.py", "down"], cwd=top, env=environ, capture_output=True, check=False)


def lacking(text):
    """Of the features and programs that a block needs, those that are not there."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    return [word for word in words if not (kernel_has(word) if word in FEATURES else shutil.which(word) or os.path.exists(word))]


@pytest.mark.root
@pytest.mark.alone
@pytest.mark.parametrize("path", RUN, ids=lambda path: str(path.relative_to(blocks.ROOT)))
def test_the_commands_of_a_document_do_what_it_says(path, place, figure):
    top, environ = place
    subprocess.run(["deploy/lab.py", "down"], cwd=top, env=environ, capture_output=True, check=False)  # of a page that failed
    ran, left_out = 0, []
    for block in blocks.parse(path.read_text()):
        lacks = lacking(block.mark[1]) if block.mark[0] == "needs" else []
        if block.mark[0] == "not run" or lacks:
            left_out += [f"line {block.line}: {', '.join(lacks) or block.mark[1]}"]
            continue
        for command, wanted in block.steps:
            status, got = blocks.run(command, top, environ)
            shown = "\n".join([f"{path.name}, line {block.line}", f"$ {command}", *got])
            assert wanted is not None or status == 0, f"{shown}\nexit status {status}"
            assert wanted is None or blocks.matches(wanted, got), "\n".join([shown, "--- but it shows", *wanted])
            ran += 1
    figure(f"{path.relative_to(blocks.ROOT)}: {ran} commands ran; left out: {'; '.join(left_out) or 'none'}")


def test_a_wrong_output_is_found():
    assert blocks.matches(["a ... c", "...", "z"], ["a b c", "d", "e", "z"])
    assert blocks.matches(["...", "z"], ["z"])
    for wanted, got in ((["a"], ["b"]), (["a"], []), ([], ["a"]), (["a", "...", "c"], ["a", "b"]), (["a ... c"], ["a b d"])):
        assert not blocks.matches(wanted, got)


@pytest.mark.parametrize("text", ["```sh\n\n```\n", "```bahs\nls\n```\n", "```console\nfile\n```\n"])
def test_a_block_that_makes_no_sense_is_found(text):
    with pytest.raises(AssertionError):
        blocks.parse(text)


def test_every_document_can_be_read():
    assert sum(len(blocks.parse(path.read_text())) for path in PLACES) > 20


def test_the_functions_that_the_tour_names_exist():
    named = re.findall(r"`(\w+)\.(\w+)\(?\)?`", (blocks.ROOT / "docs/tour.md").read_text())
    named = [(module, name) for module, name in named if module in MODULES and name not in ("py", "conflist", "md")]
    assert len(named) > 8
    assert [f"{module}.{name}" for module, name in named if not hasattr(MODULES[module], name)] == []
