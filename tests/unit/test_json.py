"""JSON is read and written as the json module does it, with the module's own half in C or without."""

import json
import os
import subprocess
import sys

import pytest

import mncni

VALUES = [
    {}, [], "", 0, -1, 2**80, 1.5, -0.0, 1e300, True, False, None, [[]], {"": {}}, [1, [2, {"a": [None, True, {"b": "c"}]}], ""],
    {"k": "\u00e9\u20ac\U0001f600\ud800\"\\/\b\f\n\r\t\x00\x7f", "\u00e9": 1},
]
TEXTS = [
    *map(json.dumps, VALUES), " {} ", "\r\n\t[1 , 2]\n", '{"a": 1, "a": 2}', "1E2", "-0", '"\\u00e9\\ud83d\\ude00"',
    # and what is no JSON
    "", " ", "{", "}", "[1", "[1,]", '{"a"}', '{"a":}', "{'a': 1}", "{} {}", "{}x", "01", "1.", ".5", "+1", "- 1", "0x1", "tru", "nul",
    '"', '"\\"', '"\\x"', '"\\u12"', '"a\nb"', "\ufeff{}", "\x0b{}", "\u00a0{}", "// no", "NaN", "-Infinity", "1e400", "[" * 100_000,
]
# Reads a list of texts; prints what each is: the value, written again, or the name and the words of the error. The first argument is a
# module that is not to be had.
PROGRAM = """
import sys
sys.modules[sys.argv[1]] = None
import mncni
def said(text):
    try:
        return ["value", mncni.to_json(mncni.parse_json(text))]
    except (ValueError, RecursionError) as error:
        return ["error", str(error)]
print(mncni.to_json([said(text) for text in mncni.parse_json(sys.stdin.read())]))
"""


def expected(text):
    """The same of the json module, with the numbers refused that it takes although they are none."""
    try:
        return ["value", json.dumps(json.loads(text, parse_constant=mncni.refuse_constant, parse_float=mncni.finite))]
    except ValueError as error:
        return ["error", str(error)]
    except RecursionError:
        return ["error", None]


@pytest.mark.parametrize("missing", ["nothing", "_json"])
def test_a_program_reads_and_writes_json_as_the_json_module_does(missing):
    """In a process of its own: what else has been imported matters."""
    argv = [sys.executable, "-c", PROGRAM, missing]
    environ = {**os.environ, "PYTHONPATH": os.path.dirname(mncni.__file__)}
    done = subprocess.run(argv, input=json.dumps(TEXTS), capture_output=True, text=True, env=environ, timeout=60, check=True)
    for text, said in zip(TEXTS, json.loads(done.stdout)):
        wanted = expected(text)
        assert said[0] == wanted[0], text[:80]
        if wanted[0] == "value" or (wanted[1] and missing == "nothing"):  # the half in Python has words of its own
            assert said[1] == wanted[1], text[:80]


def test_an_answer_takes_no_import_of_json():
    """It costs 6 ms a call."""
    program = "import sys, mncni; print(mncni.answer({'CNI_COMMAND': 'VERSION'}, '{}', None)); print('json' in sys.modules)"
    environ = {**os.environ, "PYTHONPATH": os.path.dirname(mncni.__file__)}
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, env=environ, check=True)
    assert done.stdout.endswith("False\n"), done.stdout
