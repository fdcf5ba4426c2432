"""What right answers may well use: sent into the sandbox whole, where call() runs each function."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import enum
import hashlib
import mimetypes
import os
import pathlib
import sqlite3
import sys
import tempfile
from dataclasses import dataclass

Letter = enum.IntEnum("Letter", "A B")


@dataclass
class Point:
    x: int


def call(names):
    return {name: globals()[name]() for name in names}


def coroutines():
    async def three():
        return await asyncio.to_thread(lambda: 3)

    return asyncio.run(three())


def threads():
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        return sum(pool.map(abs, range(300)))


def database():
    return sqlite3.connect(":memory:").execute("select 1").fetchall()


def digest():
    return hashlib.sha256(b"").hexdigest()[:8]


def kind_of_file():
    return mimetypes.guess_type("a.html")[0]


def environment():
    os.environ["A"] = "b"
    return os.environ["A"]


def output():
    print("x" * 1_000_000)
    return Point(1).x


def recursion():
    sys.setrecursionlimit(9999)

    def count(n):
        return n and 1 + count(n - 1)

    return count(9000)


def values():
    plain = [None, True, b"x", 10**40, 0.1, "\udc80"]
    return [*plain, collections.Counter("aab"), {2, 1}, frozenset("q"), Letter.B, {(1, 2): "é"}, ()]


def files():
    with tempfile.TemporaryDirectory() as place:
        path = pathlib.Path(place, "a", "b")
        path.parent.mkdir()
        path.touch()
        path.write_text("x")
        return path.read_text(), [each.name for each in path.parent.iterdir()]


def renaming():
    pathlib.Path("a").write_text("x")
    os.mkdir("d")
    os.rename("a", "d/b")
    return os.listdir("d")
