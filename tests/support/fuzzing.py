"""Changed copies of files for every parser: bytes flipped, cut and repeated, values replaced.

A changed file is what accidents and malice leave: nothing in it is made to crash other software.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from llamax.runtime.text import UNSAFE

ODD_BYTES = (
    *(b"\0", b"\xff", b"\x1b[2J", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r"),
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"null", b"true", b"\xed\xa0\x80", b"\\ud800"),
    *(b"[" * 20_000, b'{"a":' * 20_000, b"{{", b"{%", b"%}", b"}}", b"..", b"/", b"-1", b"=", b"$"),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**30, 1.5, -0.0, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "\0", "\x1b[31m", "../x", "/etc"),
    *("x" * 5000, "1", "-1", "nan", "a\nb", "$x_y$", "_", "{{ x }}", "\ud800", [], {}, [[]], [{}]),
    *([None], {"": None}, {"a": {"b": []}}, ["\u202e"], list(range(100)), "None", "0", 2**53 + 1),
)  # fmt: skip


ODD_TOML = (
    *("0", "-1", "1", "1.5", "inf", "-inf", "nan", "1e300", "9223372036854775807", "true", "[]"),
    *('""', '"\\u001b[2J"', '"a\\nb"', '"../x"', '"/"', '"$(x)"', "[[]]", "[1, [2]]", "{}"),
    *("1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", '"' + "x" * 3000 + '"', "[" * 20_000),
    *('["a", 1]', "{a = {b = {c = 1}}}", "0xff", "1_000", '"\u202e"', "[" * 200 + "]" * 200),
)  # fmt: skip


def nested(depth: int) -> Any:
    """Lists and objects inside each other."""
    value: Any = None
    for level in range(depth):
        value = {"a": value} if level % 2 else [value]
    return value


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """A copy of ``data`` with one to four changes."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(changed))
        to = min(at + chance.choice((1, 2, 8, 100, 10_000)), len(changed))
        match chance.randrange(7):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << chance.randrange(8)
            case 1 if changed:
                changed[at % len(changed)] = chance.randrange(256)
            case 2:
                changed[at:at] = chance.choice(ODD_BYTES)
            case 3:
                del changed[at:to]
            case 4:
                changed[at:at] = changed[at:to]
            case 5:
                changed[at:to] = chance.choice(ODD_BYTES)
            case _:
                del changed[at:]
    return bytes(changed)


def change_value(value: Any, chance: random.Random) -> Any:
    """A copy of a JSON value with one to three of its parts replaced, removed, added or moved."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(value))
        odd = copy.deepcopy(chance.choice((*ODD_VALUES, nested(chance.choice((20, 100))))))
        if not places or chance.random() < 0.03:
            value = odd
            continue
        container, key = chance.choice(places)
        match chance.randrange(5):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[chance.choice(("", "\x1b", "a" * 300, "../x", str(key) + "_"))] = odd
            case 2:
                container[key] = copy.deepcopy(_at(*chance.choice(places)))
            case _:
                container[key] = odd
    return value


def change_json(data: bytes, chance: random.Random) -> bytes:
    """A JSON text (or one per line) with changed values, or with changed bytes."""
    if chance.random() < 0.25:
        return change_bytes(data, chance)
    try:
        value = json.loads(data)
    except ValueError:
        lines = data.splitlines()
        at = chance.randrange(len(lines))
        lines[at] = change_json(lines[at], chance) if b"{" in lines[at] else b"{"
        return b"\n".join([*lines, b""])
    return json.dumps(change_value(value, chance), ensure_ascii=chance.random() < 0.5).encode(
        errors="surrogatepass"
    )


def _places(value: Any) -> Any:
    stack = [value]
    while stack:
        container = stack.pop()
        if not isinstance(container, dict | list):
            continue
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            yield container, key
            if isinstance(container[key], dict | list):
                stack.append(container[key])


def _at(container: Any, key: Any) -> Any:
    return container[key]


def change_toml(data: bytes, chance: random.Random) -> bytes:
    """A TOML file with values replaced, lines removed or moved, or with changed bytes."""
    if chance.random() < 0.2:
        return change_bytes(data, chance)
    lines = data.decode().split("\n")
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(lines))
        name, equals, _ = lines[at].partition(" = ")
        match chance.randrange(6):
            case 0:
                lines.insert(chance.randrange(len(lines)), lines.pop(at))
            case 1:
                lines[at] = chance.choice(
                    ("[a]", "[[run]]", "[run]", "[model.x]", "x.y.z = 1", "=")
                )
            case _ if equals:
                lines[at] = f"{name} = {chance.choice(ODD_TOML)}"
    return "\n".join(lines).encode()


def shown(text: str) -> None:
    """Assert that a text for a terminal has no character that a terminal obeys."""
    assert not UNSAFE.search(text.replace("\n", "")), f"{text!r:.300}"
