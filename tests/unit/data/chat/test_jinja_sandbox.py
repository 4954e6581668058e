"""Chat templates from outside: hostile ones are refused."""

from __future__ import annotations

import hashlib
import resource
import signal
import threading
import time
from contextlib import suppress

import pytest
from support.chat import refused
from transformers.utils.chat_template_utils import render_jinja_template

from llamax.data.chat import jinja_sandbox
from llamax.data.chat.templates import Template, make_sample
from llamax.runtime.errors import DataError

pytestmark = pytest.mark.timeout(300)  # a template that does not end is a failure


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ answer }}", "bad: is refused: access"),
        ("{{ answer.__init__.__globals__ }}", "bad: is refused: access"),
        ("{{ messages.append(1) }}{{ answer }}", "bad: is refused"),
        ("{{ 'a' * 10**9 }}{{ answer }}", "bad: is refused"),
        ("{{ [0] * 9999999 }}{{ answer }}", "bad: is refused: a sequence of 1"),
        ("{{ 9 ** 9 ** 9 }}{{ answer }}", "bad: is refused"),
        ("{{ 3 ** 99 }}{{ answer }}", "bad: is refused: .* too large"),
        ("{{ 9999999 * 9999999 * 9999999 }}{{ answer }}", "bad: is refused: a number is above"),
        ("{% for i in range(999999) %}{% endfor %}{{ answer }}", "Range too big|refused"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
            "{{ answer }}",
            "bad: is refused: it computed for",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
            "{% endfor %}{{ answer }}",
            "bad: is refused: it (needs too much|computed)",
        ),
        ("{{ 'a' | center(2000000000) }}{{ answer }}", "bad: is refused: it (needs|computed)"),
        ("{{ 'ab' | center(20000000) }}{{ answer }}", "bad: is refused: it (wrote|computed)"),
        ("{{ messages | tojson(indent=99) }}", "bad: is refused: tojson"),
        (
            "{% include '/etc/passwd' %}{{ answer }}",
            "bad: the template fails: TypeError: no loader",
        ),
        ("{{ raise_exception('not\nthis') }}{{ answer }}", "bad: the template says: not this"),
        ("{% if %}", r"bad: the template says \(line 1\)"),
        ("{{ answer.nothing.more }}", "bad: the template says: .*nothing"),
        ("{{ answer + 1 }}", "bad: the template fails: TypeError"),
        ("just text", "bad: uses nothing of a row"),
        ("{% if answer == '' %}{{ answer }}{% endif %}x", "bad: yields no answer|otherwise"),
        ("{% generation %}{% endgeneration %}{{ answer }}", "bad: yields no answer"),
        (
            "{% for m in messages %}{% generation %}{% if m %}{% break %}{% endif %}"
            "{% endgeneration %}{% endfor %}",
            "bad: the template says .*: a loop is left inside",
        ),
        ("{{ messages | length }}", "differently when more turns follow"),
        ("x" * 1_000_001, "has 1000001 characters"),
    ],
)
def test_bad_templates_are_one_line(
    source: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jinja_sandbox, "CPU_S", 0.2)
    refused(words, source)


def test_a_good_template_survives_the_walls() -> None:
    source = "{% for i in range(3) %}{{ i * 2 }}{% endfor %}{{ strftime_now('%Y') | length }}"
    assert (
        Template("good", source + "{{ answer }}").spans(make_sample("Q", "", "A"))[0].text == "0244"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ value | tojson }}",
        "{{ value | tojson(ensure_ascii=true) }}",
        "{{ value | tojson(indent=2, sort_keys=true) }}",
        "{{ value | tojson(separators=(',', ':')) }}",
        "{{ value | tojson(false, '\t') }}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
        "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}{{ dict(a=1) | tojson }}",
        "{{ strftime_now('%Y') }}",
        "{{ missing }}{{ missing is defined }}",
    ],
)
def test_templates_render_as_in_transformers(source: str) -> None:
    value = {"b": "Größe <&> \U0001f642 \\", "a": [1, None]}
    (expected,), _ = render_jinja_template([[]], chat_template=source, value=value)
    assert jinja_sandbox.Program(source, "here").render({"value": value}) == expected


def test_marks_pass_through_escapes_of_json() -> None:
    value = "\ufdd2 \\ufdd2 \\\ufdd0"
    program = jinja_sandbox.Program("{{ value | tojson(ensure_ascii=true) }}", "here")
    assert program.render({"value": value}) == '"\ufdd2 \\\\ufdd2 \\\\\ufdd0"'


def test_an_alarm_at_any_moment_leaves_the_limits_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    monkeypatch.setattr(jinja_sandbox, "CPU_S", 0.001)
    for turns in range(0, 60_000, 400):
        with suppress(DataError):
            jinja_sandbox.Program(f"{{% for i in range({turns}) %}}{{% endfor %}}x", "here").render(
                {}
            )
        now = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
        assert now == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


@pytest.mark.parametrize("source", ["{{ '{}'.format() }}", "{{ value | map('upper') | first.x }}"])
def test_an_error_of_any_type_is_one_line(source: str) -> None:
    with pytest.raises(DataError, match="here: the template") as caught:
        jinja_sandbox.Program(source, "here").render({"value": [1]})
    assert "\n" not in str(caught.value)


def test_the_time_of_other_threads_counts_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server computes in one thread while another one formats."""
    monkeypatch.setattr(jinja_sandbox, "CPU_S", 0.1)

    def compute() -> None:
        while time.thread_time() < 0.3:
            hashlib.sha256(bytes(2**20))

    class Meanwhile:
        def __str__(self) -> str:
            other = threading.Thread(target=compute)
            other.start()
            other.join()
            return "x"

    assert jinja_sandbox.Program("{{ value }}", "here").render({"value": Meanwhile()}) == "x"
