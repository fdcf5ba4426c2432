"""What LLVM made of a kernel's loops: which are in vector registers, read from the code of a fresh compilation.

Code that numba loads from its cache cannot be looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LABELS = re.compile(r'label %("[^"]+"|[-\w$.]+)')
_FUNCTION = re.compile(r'^define .*?@([-\w$.]+|"[^"]+")\(.*?\{\n(.*?)^\}', re.M | re.S)
_CALLED = re.compile(r' call .*?@([-\w$.]+|"[^"]+")\(')
_VECTOR = re.compile(r"= (?:tail call |fast |nnan )*\w+.*<\d+ x (?:float|double|i\d+)>")
_INSTRUCTION = re.compile(r"^\s+([a-z]\w*)\s*(.*)$")
_SCALAR = re.compile(r"(ss|sd)$|^v?(movd|movq|pextr|pinsr)|^vcvtt?s[sd]|^vcvtsi|^v?u?comis")
Graph = dict[str, list[str]]


@dataclass(frozen=True)
class Loop:
    """An innermost loop: whether it works on vectors, and its first lines of code."""

    packed: bool
    shown: str


def loops_of(kernel: Any, types: Any) -> list[Loop]:
    """The innermost loops of a compiled kernel, without those for what a vector loop leaves over."""
    text = kernel.inspect_llvm(types)
    return loops_in(text)


def loops_in(text: str) -> list[Loop]:
    """The same of a module in LLVM's language"""
    done = _marked_done(text)
    functions = {name.strip('"'): _blocks(body) for name, body in _FUNCTION.findall(text)}
    loops = {name: list(innermost(_graph(blocks))) for name, blocks in functions.items()}
    found = []
    for name, blocks in functions.items():
        for loop in loops[name]:
            lines = [line for block in loop for line in blocks[block]]
            packed = any(_VECTOR.search(line) for line in lines)
            marks = {mark for block in loop for mark in re.findall(r"!llvm\.loop (!\d+)", blocks[block][-1])}
            left_over = marks & done or any(".epil" in block or ".prol" in block for block in loop)
            around_others = any(loops.get(callee.strip('"')) for line in lines for callee in _CALLED.findall(line))
            if packed or not (left_over or around_others):
                found.append(Loop(packed, "\n".join(line.strip() for line in lines)))
    return found


def _graph(blocks: dict[str, list[str]]) -> Graph:
    return {name: [to.strip('"') for to in _LABELS.findall(lines[-1])] for name, lines in blocks.items()}


def _blocks(body: str) -> dict[str, list[str]]:
    """Lines of a function's blocks; a statement over several lines is one"""
    blocks: dict[str, list[str]] = {}
    lines: list[str] = blocks.setdefault("", [])
    for line in re.sub(r"\[\n(.*?)\n  \]", lambda found: found[0].replace("\n", " "), body, flags=re.S).splitlines():
        label = re.match(r'("[^"]+"|[-\w$.]+):', line)
        if label:
            lines = blocks.setdefault(label[1].strip('"'), [])
        elif line.strip():
            lines.append(line)
    return {name: lines for name, lines in blocks.items() if lines}


def _marked_done(text: str) -> set[str]:
    """Names of the loops that LLVM's vectoriser marked as finished: its own, and those for what they leave over"""
    (mark,) = re.findall(r'^(!\d+) = !\{!"llvm\.loop\.isvectorized"', text, re.M) or [None]
    lists = re.findall(r"^(!\d+) = distinct !\{(.*)\}", text, re.M)
    return {name for name, parts in lists if mark in parts.split(", ")}


def innermost(graph: Graph) -> Iterator[list[str]]:
    """The loops of a flow graph that have no loop inside, as lists of blocks"""
    for part in _strongly_connected(graph):
        inside = set(part)
        if len(part) == 1:
            if part[0] in graph[part[0]]:
                yield part
            continue
        heads = {to for block, after in graph.items() if block not in inside for to in after if to in inside}
        inner = {block: [to for to in graph[block] if to in inside and to not in heads] for block in part}
        yield from list(innermost(inner)) or [part]


def _strongly_connected(graph: Graph) -> list[list[str]]:
    """Tarjan's algorithm, without recursion"""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    held: set[str] = set()
    found = []
    for root in graph:
        if root in order:
            continue
        work = [(root, iter(graph[root]))]
        order[root] = low[root] = len(order)
        stack.append(root)
        held.add(root)
        while work:
            block, rest = work[-1]
            to = next(rest, None)
            if to is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[block])
                if low[block] == order[block]:
                    at = stack.index(block)
                    found.append(stack[at:])
                    held -= set(stack[at:])
                    del stack[at:]
            elif to not in order:
                order[to] = low[to] = len(order)
                stack.append(to)
                held.add(to)
                work.append((to, iter(graph[to])))
            elif to in held:
                low[block] = min(low[block], order[to])
    return found


def vector_share(kernel: Any, types: Any) -> float:
    """Share of vector instructions in the innermost loop of the machine code that has most of them; x86 alone."""
    best = (0, 0.0)
    for lines in _machine_loops(kernel.inspect_asm(types)):
        n_vector = sum(
            ("xmm" in rest or "ymm" in rest or "zmm" in rest) and not _SCALAR.search(name) for name, rest in lines
        )
        best = max(best, (n_vector, n_vector / len(lines)))
    return best[1]


def _machine_loops(text: str) -> Iterator[list[tuple[str, str]]]:
    """(name, operands) of the instructions between a label and the jump back to it, with no such pair inside"""
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    ended = 0
    for line in text.splitlines():
        label = re.match(r"^(\.\w+):", line)
        instruction = _INSTRUCTION.match(line.split("#")[0])
        if label:
            labels[label[1]] = len(lines)
        elif instruction and not line.lstrip().startswith("."):
            lines.append((instruction[1], instruction[2]))
            to = labels.get(instruction[2].strip()) if instruction[1].startswith("j") else None
            if to is not None and to >= ended:
                yield lines[to:]
                ended = len(lines)
