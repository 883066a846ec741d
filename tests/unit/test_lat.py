"""The grammar of the annotation "lat": what is a netem expression, and which word is to blame if it is none."""

import random

import pytest

import mncni

GOOD = [
    "delay 50ms",
    "delay 100ms 10ms",
    "delay 100ms 10ms 25%",
    "delay 1.5s 0.5s distribution pareto",
    "distribution paretonormal delay 100ms 10ms",
    "delay 274s",
    "rate 8bit",
    "loss 0% duplicate 100%",
    "loss 0.3% 25%",
    "corrupt 0.1% rate 1mbit limit 100",
    "delay 10ms reorder 25% 50%",
    "reorder 25% delay 10ms",
    "slot 800us 1ms",
    "slot 1000us 1ms",
    "slot 20ms loss 1%",
]
BAD = {
    "50": '"delay" needs a time up to 274s, not "50"',
    "4295s": '"delay" needs a time up to 274s, not "4295s"',
    "jitter 5ms": '"jitter" is none of',
    "delay": '"delay" needs a time',
    "delay fast": 'needs a time up to 274s, not "fast"',
    "delay 10": 'needs a time up to 274s, not "10"',
    "delay -5ms": 'needs a time up to 274s, not "-5ms"',
    "delay 1e3ms": 'needs a time up to 274s, not "1e3ms"',
    "delay 1.2.3s": 'needs a time up to 274s, not "1.2.3s"',
    "delay 275s": 'needs a time up to 274s, not "275s"',
    "delay 274001ms": 'needs a time up to 274s, not "274001ms"',
    "delay ٥ms": "needs a time",
    "delay 10ms 5ms 10% 3": "is none of",
    "delay 10ms 5%": '"delay" needs a time up to 274s, not "5%"',
    "delay 10ms delay 20ms": '"delay" stands twice',
    "loss 101%": 'needs a percentage up to 100%, not "101%"',
    "loss 5": 'needs a percentage up to 100%, not "5"',
    "loss": "needs a percentage",
    "rate 5": 'needs a rate from 8bit, not "5"',
    "rate 7bit": 'needs a rate from 8bit, not "7bit"',
    "rate 0mbit": 'needs a rate from 8bit, not "0mbit"',
    "limit 5ms": "needs a number",
    "limit 9999999999": "needs a number",
    "delay 1ms 1ms distribution uniform": 'needs one of normal, pareto, paretonormal, not "uniform"',
    "distribution": "needs one of normal",
    "reorder 5%": '"reorder" needs a "delay"',
    "reorder 5% delay 0ms": '"reorder" needs a "delay"',
    "distribution normal": '"distribution" needs a "delay" with a jitter',
    "delay 1s distribution normal": '"distribution" needs a "delay" with a jitter',
    "delay 0s 1s distribution normal": '"distribution" needs a "delay" with a jitter',
    "slot 2ms 1999us": '"slot" needs its shorter time first',
    "delay 1ms; reboot": 'needs a time up to 274s, not "1ms;"',
    "delay 1ms root": 'needs a time up to 274s, not "root"',
    "DELAY 1ms": "is none of",
    "delay " + "9" * 500 + "ms": "needs a time",
}


def parse(value):
    annotations = {} if value is None else {"lat": value}
    conf = {"name": "n", "cniVersion": "1.1.0", "runtimeConfig": {"io.kubernetes.cri.pod-annotations": annotations}}
    return mncni.parse_lat(mncni.Request({"CNI_COMMAND": "ADD"}, conf))


@pytest.mark.parametrize("text", GOOD)
def test_an_expression_is_passed_on_word_for_word(text):
    assert parse(f"  {text}\n") == text.split()


@pytest.mark.parametrize("text", ["50ms", "2s", ".5s", "100us", "50ms 10ms", "50ms loss 1%"])
def test_a_bare_time_is_a_delay(text):
    assert parse(text) == ["delay", *text.split()]


@pytest.mark.parametrize("value", [None, "", " \t "])
def test_no_annotation_means_nothing_to_do(value):
    assert parse(value) == []


@pytest.mark.parametrize("text, said", BAD.items(), ids=lambda text: text[:30])
def test_the_bad_word_is_named(text, said):
    with pytest.raises(mncni.CNIError) as raised:
        parse(text)
    assert raised.value.code == 7 and said in raised.value.msg and len(raised.value.msg) < 300


@pytest.mark.parametrize("value", [5, True, ["50ms"], {"a": 1}])
def test_an_annotation_that_is_no_string_is_refused(value):
    with pytest.raises(mncni.CNIError) as raised:
        parse(value)
    assert raised.value.code == 7


def is_value(kind, text):
    try:
        return mncni.netem_value("", kind, text) is not None
    except mncni.CNIError:
        return False


def test_whatever_is_accepted_holds_only_known_words_and_harmless_values():
    words = [*mncni.NETEM, "50ms", "1%", "25%", "1mbit", "100", "normal", "root", ";", "$(x)", "-1ms", "ms", "%", "dev", "1ms\n", "é"]
    chance, accepted = random.Random(7), 0
    for _ in range(20_000):
        text = " ".join(chance.choices(words, k=chance.randint(1, 6)))
        try:
            result = parse(text)
        except mncni.CNIError as error:
            assert error.code == 7
            continue
        accepted += 1
        for word in result:
            assert word in mncni.NETEM or any(is_value(kind, word) for kind in mncni.NETEM_KINDS), text
    assert accepted > 100
