"""Changes sound input a little: JSON values node by node, texts and files byte by byte. A seed makes all choices."""

from __future__ import annotations

import copy
from random import Random
from typing import Any


def nested(depth: int) -> list[Any]:
    """Returns lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 4, 8, 32, 64, 255, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30, -(10**18)),
    *(0.0, 0.5, -1.5, 1e308, float("nan"), float("inf"), "", " ", "a", "0", "-1", "4", "1e999", "nan", "none", "auto"),
    *("\0", "\ud800", "\x1b[2J", "²", "٣", "🜁", ".", "..", "../../etc/passwd", "/etc/passwd", "~/x", "a/b", "a\\b"),
    *("x" * 300, "9" * 5000, "re:(", "re:(a+)+$", "re:((a|aa)+)+!", "(((", "[", "a{99999999999999999999}", "\\", "*"),
    *("float16", "torch.float32", "load", "F32", "I64", "U8", "BOOL", "cuda:0", "cuda:-1", "cpu", "meta", "8GiB"),
    *([], {}, [[]], [None], [0], [1, 2], ["a"], {"a": 1}, {"": None}, {"quant_method": "awq"}, nested(40), nested(70)),
]
"""Values that some reader does not expect."""

PIECES = [
    *(b"\0", b"\xff", b"\xff\xfe", b"{", b"}", b"[", b"]", b"[" * 2000, b'{"a":' * 500, b"null", b"NaN", b"1e999"),
    *(b'"', b"\\", b"\\ud800", b"&a [*a]", b"*a", b"&x", b"!!python/object:os.system", b"!!int ''", b"2001-99-99"),
    *(
        b"9" * 5000,
        b"\r",
        b"\n",
        b"\t",
        b":",
        b"- ",
        b",",
        b"<<: ",
        b"? ",
        b"%",
        b"# ",
        b"\xe2\x80\xa8",
        b"\xef\xbb\xbf",
    ),
]
"""Bytes that some parser does not expect."""


def changed_value(value: Any, random: Random, most: int = 4) -> Any:
    """Returns a copy of a JSON value with one to `most` changes."""
    root = [copy.deepcopy(value)]
    for _ in range(random.randint(1, most)):
        _change(root, random)
    return root[0]


def _change(root: list[Any], random: Random) -> None:
    holder, key = random.choice(list(_places(root)))
    value = holder[key]
    kind = random.randrange(8)
    if kind <= 2:
        holder[key] = copy.deepcopy(random.choice(HOSTILE))
    elif kind == 3 and holder is not root:
        del holder[key]
    elif kind == 4 and isinstance(value, int) and not isinstance(value, bool):
        holder[key] = value + random.choice([-1, 1, 7, -value, 2**31])
    elif kind == 5:
        other, there = random.choice(list(_places(root)))
        if other is not holder and other[there] is not holder:
            holder[key] = copy.deepcopy(other[there])
    elif isinstance(value, dict):
        added = random.choice([*value, *(entry for entry in HOSTILE if isinstance(entry, str))])
        value[added] = copy.deepcopy(random.choice(HOSTILE))
    elif isinstance(value, list):
        value.insert(random.randint(0, len(value)), copy.deepcopy(random.choice([*HOSTILE, *value])))
    elif isinstance(value, str):
        at = random.randint(0, len(value))
        holder[key] = (
            value[:at] + random.choice(["", ".", "..", "/", "0", "x", "\0", "é"]) + value[at + random.randint(0, 2) :]
        )


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Returns every place in nested dicts and lists, as holder and key; not those deep down."""
    found: list[tuple[Any, Any]] = []
    level: list[Any] = [root]
    for _ in range(12):
        inner: list[Any] = []
        for holder in level:
            keys = list(holder) if isinstance(holder, dict) else range(min(len(holder), 50))
            found += [(holder, key) for key in keys]
            inner += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
        level = inner
    return found


def changed_bytes(content: bytes, random: Random, most: int = 6) -> bytes:
    """Returns a copy of some bytes with one to `most` changes."""
    changed = bytearray(content)
    for _ in range(random.randint(1, most)):
        at, kind = random.randint(0, len(changed)), random.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            changed[at : at + random.randint(1, 8)] = b""
        elif kind == 2:
            changed[at:at] = random.choice(PIECES)
        elif kind == 3 and at < len(changed):
            changed[at] = random.randrange(256)
        elif kind == 4:
            begin = random.randint(0, len(changed))
            changed[at:at] = changed[begin : begin + random.randint(1, 40)]
        elif kind == 5:
            del changed[at:]
    return bytes(changed)
