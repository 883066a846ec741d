"""What somebody who writes a plugin with mncni.main may do wrong. Each is a clear error in that plugin's name; stdout has nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mncni

PREV = {"cniVersion": "1.1.0", "interfaces": [{"name": "eth0", "sandbox": "/proc/self/ns/net"}],
        "ips": [{"address": "10.0.0.5/24", "interface": 0}]}
HEAD = f"import sys\nsys.path.append({str(Path(mncni.__file__).parent)!r})\nimport mncni\n"


def call(tmp_path, source, table, command="ADD", **conf):
    """(exit code, stdout as JSON or text, stderr) of a plugin whose source follows HEAD, from line 4 on."""
    program = tmp_path / "mine"
    program.write_text(f"{HEAD}{source}\nmncni.main({table})\n")
    environ = {**os.environ, "CNI_COMMAND": command, "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_NETNS": "/proc/self/ns/net",
               "CNI_NETNS_OVERRIDE": "1", "MNCNI_RUN_DIR": str(tmp_path / "run")}
    stdin = json.dumps({"cniVersion": "1.1.0", "name": "net", "type": "mine", "prevResult": PREV, **conf})
    done = subprocess.run([sys.executable, "-IS", program], input=stdin, env=environ, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else "", done.stderr


ADD = "{'mine': {'ADD': add, 'chained': True}}"


def add_that(body):
    return f"def add(request, run):\n    {body}"


@pytest.mark.parametrize("body, said", [
    ("pass", "ADD returned None"),
    ("return 'fine'", "ADD returned 'fine'"),
    ("return {}", "ADD returned {}"),
    ("return [request.prev_result]", "ADD returned [{"),
    ("return {**request.prev_result, 'ips': [{'address': '10.0.0.5'}]}", "'10.0.0.5' is not an address with its prefix length"),
    ("return {**request.prev_result, 'ips': {}}", '"ips"'),
    ("return request.conf['lenght']", "line 5 of mine, in add: KeyError: 'lenght'"),
    ("mncni.apply(['ip link'], run)", "line 5 of mine, in add: "),
    ("sys.exit(3)", "ADD called exit(3)"),
    ("raise SystemExit", "ADD called exit(None)"),
    ("raise AssertionError", "line 5 of mine, in add: AssertionError"),
    ("yield request.prev_result", "ADD returned <generator"),
])
def test_a_defect_names_the_plugin_and_the_place(tmp_path, body, said):
    exit_code, reply, _ = call(tmp_path, add_that(body), ADD)
    assert (exit_code, reply["code"]) == (1, 999)
    assert "plugin mine" in reply["msg"] and said in reply["msg"], reply["msg"]


def test_an_error_of_the_plugins_own_is_its_own(tmp_path):
    exit_code, reply, _ = call(tmp_path, add_that("raise mncni.CNIError(142, 'no luck')"), ADD)
    assert (exit_code, reply["code"], reply["msg"]) == (1, 142, "no luck")


def test_what_a_plugin_prints_goes_to_stderr(tmp_path):
    exit_code, reply, stderr = call(tmp_path, add_that("print('hello'); return request.prev_result"), ADD)
    assert (exit_code, reply, stderr) == (0, PREV, "hello\n")


def test_a_chained_plugin_without_prev_result_says_so(tmp_path):
    exit_code, reply, _ = call(tmp_path, add_that("return request.prev_result"), ADD, prevResult=None)
    assert (exit_code, reply["code"]) == (1, 7) and "result of one before it" in reply["msg"]


@pytest.mark.parametrize("command", ["DEL", "CHECK", "GC", "STATUS"])
def test_a_verb_that_is_not_in_the_table_has_nothing_to_do(tmp_path, command):
    assert call(tmp_path, add_that("return request.prev_result"), ADD, command) == (0, "", "")


@pytest.mark.parametrize("table, said", [
    ("{'mine': {'CHECK': add}}", "needs a function as ADD"),
    ("{'mine': {'ADD': 5}}", "needs a function as ADD"),
    ("{'mine': {'ADD': add, 'DELETE': add}}", 'has ["DELETE"]'),
    ("{'mine': {'ADD': add, 'DEL': None}}", "functions as the other verbs"),
    ("{'mine': add}", "is no dict"),
])
def test_a_table_that_makes_no_sense_is_named(tmp_path, table, said):
    exit_code, reply, _ = call(tmp_path, add_that("return request.prev_result"), table)
    assert (exit_code, reply["code"]) == (1, 999) and "plugin mine" in reply["msg"] and said in reply["msg"]
