"""mncni.py as a module: whatever is wrong with a plugin that uses it, the runtime gets an error that names the plugin, and the line."""

import json
import os
import subprocess
import sys

import pytest

import mncni

PREV_RESULT = {"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "/proc/self/ns/net"}], "ips": []}
HEAD = f"#!{sys.executable} -S\nimport os, sys\nsys.path.append({os.path.dirname(mncni.__file__)!r})\nimport mncni\n"


def call(tmp_path, source, verb="ADD", called_as="mine", **keys):
    """(exit status, stdout as an object, stderr) of a plugin that a program of this source brings."""
    program = tmp_path / called_as
    program.write_text(HEAD + source)
    program.chmod(0o755)
    conf = {"cniVersion": "1.0.0", "name": "net", "type": "mine", "prevResult": PREV_RESULT, **keys}
    conf = {key: value for key, value in conf.items() if value is not None}
    names = {"CNI_COMMAND": verb, "CNI_CONTAINERID": "c1", "CNI_NETNS": "/proc/self/ns/net", "CNI_IFNAME": "eth0"}
    names.update({"CNI_NETNS_OVERRIDE": "1", "MNCNI_RUN_DIR": f"{tmp_path}/run"})
    done = subprocess.run([program], input=json.dumps(conf), env={**os.environ, **names}, capture_output=True, text=True, timeout=60)
    return done.returncode, json.loads(done.stdout or "null"), done.stderr


def add(body):
    return f"def add(request, run):\n    {body}\nmncni.main({{'mine': {{'ADD': add, 'chained': True}}}})\n"


def test_a_plugin_of_two_lines_speaks_the_whole_protocol(tmp_path):
    source = add("return request.prev_result")
    exit_code, result, stderr = call(tmp_path, source)
    assert (exit_code, result["interfaces"], stderr) == (0, PREV_RESULT["interfaces"], "")
    for verb in ("DEL", "CHECK", "GC", "STATUS"):
        assert call(tmp_path, source, verb, cniVersion="1.1.0") == (0, None, "")
    assert call(tmp_path, source, "VERSION")[1]["supportedVersions"] == list(mncni.CNI_VERSIONS)


LINE = "ADD failed: line 6 of mine, in add: "
NOT_JSON = "is no JSON but a Python"


@pytest.mark.parametrize(
    "body, said",
    [
        ("pass", "ADD returned None, which is no result; a chained plugin is marked \"chained\" and returns request.prev_result"),
        ("return {}", "ADD returned {}, which is no result"),
        ("return [request.prev_result]", "ADD returned [{"),
        ("return 'ok'", "ADD returned 'ok', which is no result"),
        ("return True", "ADD returned True"),
        ("return request.prev_result, 1", "ADD returned ({"),
        ("return {'ips': [{'gateway': '10.0.0.1'}]}", "None is not an address with its prefix length"),
        ("return {'ips': ['10.0.0.5/24']}", '"ips" must be an array of objects'),
        ("return {'ips': [{'address': '10.0.0.5/24', 'interface': 7}]}", "7 is not an index into its interfaces"),
        ("return {'interfaces': {'name': 'x'}}", '"interfaces" must be an array'),
        ("return {'interfaces': [{'mac': 'x'}]}", 'of "interfaces", {"mac": "x"} has no "name"'),
        ("return {**request.prev_result, 'routes': [{'gw': '10.0.0.1'}]}", 'of "routes", {"gw": "10.0.0.1"} has no "dst"'),
        ("return {'dns': {1, 2}}", f"{{1, 2}} {NOT_JSON} set"),
        ("return {'dns': float('nan')}", "NaN"),
        ("import ipaddress; return {'ips': [{'address': ipaddress.ip_interface('10.0.0.5/24')}]}", f"{NOT_JSON} IPv4Interface"),
        ("request.prev_result['me'] = request.prev_result; return request.prev_result", "what ADD returned makes no sense"),
        ("yield request.prev_result", "ADD did not run: with its yield"),
        ("return request.conf['length']", f"{LINE}KeyError: 'length'"),
        ("return request.prev_result['ips'][0]", f"{LINE}IndexError: list index out of range"),
        ("raise BaseException('x')", f"{LINE}BaseException: x"),
        ("raise KeyboardInterrupt", f"{LINE}KeyboardInterrupt"),
        ("sys.exit(0)", f"{LINE}SystemExit: 0"),
        ("open('/nowhere/x')", f"{LINE}FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/x'"),
        ("open('a\\0b')", f"{LINE}ValueError: embedded null byte"),
        ("return add(request, run)", "RecursionError"),
        ("run('ip link')", f"{LINE}AttributeError: 'str' object has no attribute 'argv'"),
        ("mncni.apply([['ip', 'link']], run)", f"{LINE}AttributeError: 'list' object has no attribute 'argv'"),
        ("run(mncni.Command(['ip', 5]))", LINE),
        ("run(mncni.Command('ip link'))", f'{LINE}TypeError: a command is a list of words, as in ["ip", "link"], not \'ip link\''),
        ("mncni.ip_batch('link set lo up')", f'{LINE}TypeError: a batch is a list of lines, as in ["link set dev lo up"], not '),
        ("raise mncni.CNIError('x', 'y')", f"{LINE}TypeError: the code of a CNIError is a number from 1, not 'x'"),
        ("raise mncni.CNIError(0, 'y')", f"{LINE}TypeError: the code of a CNIError is a number from 1, not 0"),
    ],
)
def test_a_defect_of_an_add_is_an_error_in_the_plugins_name(tmp_path, body, said):
    exit_code, error, stderr = call(tmp_path, add(body))
    assert (exit_code, error["code"]) == (1, 5 if "/nowhere" in body else 999)
    assert error["msg"].startswith("plugin mine: ") and said in error["msg"]
    assert "details" not in error and ("Traceback" in stderr) == (LINE in error["msg"])


@pytest.mark.parametrize("verb", ["DEL", "CHECK", "GC", "STATUS"])
@pytest.mark.parametrize(
    "body, said",
    [("return 1 / 0", "{verb} failed: line 6 of mine, in act: ZeroDivisionError: division by zero"), ("yield", "{verb} did not run")],
)
def test_a_defect_of_another_verb_is_told_the_same_way(tmp_path, verb, body, said):
    source = f"def act(request, run):\n    {body}\nmncni.main({{'mine': {{'ADD': act, {verb!r}: act}}}})\n"
    exit_code, error, _ = call(tmp_path, source, verb, cniVersion="1.1.0")
    assert (exit_code, error["code"]) == (1, 999) and f"plugin mine: {said.format(verb=verb)}" in error["msg"]


ADD = "def add(request, run):\n    return request.prev_result\n"


@pytest.mark.parametrize(
    "table, said",
    [
        ("{'mine': {'ADD': add, 'CHEK': add}}", "plugin mine: its row of the table has 'CHEK'"),
        ("{'mine': {'DEL': add}}", "plugin mine: its row of the table needs a function as ADD"),
        ("{'mine': {'ADD': None}}", "has 'ADD': None"),
        ("{'mine': {'ADD': {}}}", "has 'ADD': {}"),
        ("{'mine': {'ADD': add, 'chain': True}}", "has 'chain': True; functions may be ADD, DEL, CHECK, GC, STATUS, leave_nft, tools"),
        ("{'mine': {'ADD': add, 'link': True}}", "has 'link': True; functions"),
        ("{'mine': {'ADD': add, 'chained': 'yes'}}", "has 'chained': 'yes'"),
        ("{'mine': {'ADD': add, 'tools': ['ip']}}", "has 'tools': ['ip']"),
        ("{'mine': add}", "main needs a table of plugins like"),
        ("{5: {'ADD': add}}", "main needs a table of plugins like"),
        ("{}", "main needs a table of plugins like"),
        ("['mine']", "main needs a table of plugins like"),
        ("add", "main needs a table of plugins like"),
    ],
)
def test_a_defect_of_the_table_is_told_at_every_call(tmp_path, table, said):
    for verb in ("ADD", "DEL", "VERSION"):
        exit_code, error, _ = call(tmp_path, f"{ADD}mncni.main({table})\n", verb)
        assert (exit_code, error["code"]) == (1, 999) and said in error["msg"]


def test_a_chained_plugin_without_a_result_before_it_is_refused_by_name(tmp_path):
    exit_code, error, _ = call(tmp_path, add("return request.prev_result"), prevResult=None)
    assert (exit_code, error["code"]) == (1, 7) and "the chained plugin mine works on the result of one before it" in error["msg"]
    exit_code, error, _ = call(tmp_path, f"{ADD}mncni.main({{'mine': {{'ADD': add}}}})\n", prevResult=None)
    assert (exit_code, error["code"]) == (1, 999) and 'marked "chained"' in error["msg"]


def test_a_del_without_a_result_finds_no_links_and_no_addresses(tmp_path):
    body = "print(mncni.own_links(request), mncni.own_ips(request), mncni.host_links(request))"
    source = f"{ADD}def delete(request, run):\n    {body}\nmncni.main({{'mine': {{'ADD': add, 'DEL': delete, 'chained': True}}}})\n"
    assert call(tmp_path, source, "DEL", prevResult=None) == (0, None, "{} [] []\n")


def test_the_command_line_has_the_plugins_name(tmp_path):
    assert call(tmp_path, add("return request.prev_result"))[0] == 0
    environ = {key: value for key, value in os.environ.items() if not key.startswith("CNI_")}
    helped = subprocess.run([tmp_path / "mine", "--help"], env=environ, capture_output=True, text=True, timeout=60).stdout
    about = subprocess.run([tmp_path / "mine"], env=environ, capture_output=True, text=True, timeout=60).stderr
    assert helped.startswith("usage: mine ") and "CNI plugins mine\n" in about


def test_a_function_with_too_few_parameters_and_tools_that_fail_name_the_plugin(tmp_path):
    source = "def add(request):\n    pass\nmncni.main({'mine': {'ADD': add}})\n"
    assert "plugin mine: ADD failed: TypeError: add() takes 1 positional argument" in call(tmp_path, source)[1]["msg"]
    source = f"{ADD}mncni.main({{'mine': {{'ADD': add, 'tools': lambda request: request.conf['tool']}}}})\n"
    assert "plugin mine: tools failed: line 7 of mine, in <lambda>: KeyError: 'tool'" in call(tmp_path, source)[1]["msg"]


def test_what_a_plugin_prints_and_what_the_programs_print_that_it_starts_is_not_in_its_answer(tmp_path):
    exit_code, result, stderr = call(tmp_path, add("print('one'); os.system('echo two'); return request.prev_result"))
    assert exit_code == 0 and result["interfaces"] and sorted(stderr.split()) == ["one", "two"]


@pytest.mark.parametrize("body", ["raise ValueError", "pass"])
def test_a_failed_add_ends_with_the_plugins_own_del(tmp_path, body):
    source = f"def add(request, run):\n    {body}\ndef delete(request, run):\n    print('undone')\n"
    assert "undone" in call(tmp_path, f"{source}mncni.main({{'mine': {{'ADD': add, 'DEL': delete, 'chained': True}}}})\n")[2]
    undone = "undone" in call(tmp_path, f"{source}mncni.main({{'mine': {{'ADD': add, 'DEL': delete}}}})\n")[2]
    assert undone == (body == "pass")  # one that is not chained undoes its own failures


def test_an_error_of_the_plugins_own_is_its_own(tmp_path):
    exit_code, error, _ = call(tmp_path, add("raise mncni.CNIError(142, 'no luck', ['why'])"))
    assert exit_code == 1 and error == {"cniVersion": "1.0.0", "code": 142, "msg": "no luck", "details": "['why']"}
