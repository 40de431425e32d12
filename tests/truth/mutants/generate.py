"""Mutants of the Triton kernels, made from the syntax tree of their source: each has one mistake at one place.

A mutant is the text of the file with one expression or statement replaced, so that lines keep their numbers.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

Node = ast.expr | ast.stmt  # what has a place in the file
NARROW = {"float32": "float16", "int64": "int32", "int32": "int16"}


@dataclass(frozen=True)
class Mutant:
    file: str  # the name of the kernels' file
    function: str
    line: int
    mistake: str  # the kind of mistake
    before: str
    after: str
    source: str  # the text of the file with the mistake
    number: int = 1  # among equal mistakes of a function

    @property
    def name(self) -> str:
        again = f" ({self.number})" if self.number > 1 else ""
        return f"{self.function}: {self.mistake}: {self.before} → {self.after}{again}"


def mutants_of(path: Path) -> list[Mutant]:
    """Return the mutants of all kernels of a file."""
    source = path.read_text(encoding="utf-8")
    found, count = [], Counter()
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list):
            for mistake, node, after in _mistakes(function):
                mutant = _mutant(path.name, function, source, mistake, node, after)
                count[mutant.name] += 1
                found.append(replace(mutant, number=count[mutant.name]))
    return found


def _mutant(file: str, function: ast.FunctionDef, source: str, mistake: str, node: Node, after: str) -> Mutant:
    lines = source.encode().splitlines(keepends=True)  # the tree counts columns in bytes
    begin = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: (node.end_lineno or 1) - 1])) + (node.end_col_offset or 0)
    text = b"".join(lines)
    before = text[begin:end].decode()
    kept = after + "\n" * (before.count("\n") - after.count("\n"))
    inside = f"({kept})" if isinstance(node, ast.expr) and not isinstance(node, ast.Call | ast.Name) else kept
    changed = text[:begin].decode() + inside + text[end:].decode()
    if isinstance(node, ast.Name | ast.Attribute | ast.Constant | ast.UnaryOp) or _text(node).startswith("float("):
        around = min(
            (s for s in _below(function) if node in ast.walk(s) and _has_place(s)), key=lambda s: len(_text(s))
        )
        before = f"{before} in {_text(around)}"
    return Mutant(file, function.name, node.lineno, mistake, " ".join(before.split()), " ".join(after.split()), changed)


def _has_place(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign | ast.AugAssign | ast.Expr) or _is_access(node)


def _mistakes(function: ast.FunctionDef) -> Iterator[tuple[str, Node, str]]:
    """Yield for each mistake its kind, the node that it replaces, and the text in its place."""
    pointers = [a.arg for a in function.args.args if a.arg.startswith("p_")]
    addresses = _address_nodes(function)
    for node in _below(function):
        match node:
            case ast.Call() if _is_access(node):
                yield from _mistakes_of_access(node, pointers)
            case ast.Call(func=ast.Attribute(attr="cdiv"), args=[a, b]):
                yield "rounded down", node, f"(({_text(a)}) // ({_text(b)}))"
            case ast.Call(func=ast.Attribute(attr="minimum" | "maximum" as name), args=[a, b]):
                yield f"{name} dropped", node, f"({_text(a)})"
                yield f"{name} dropped", node, f"({_text(b)})"
            case ast.Call(func=ast.Attribute(attr="where"), args=[condition, a, b]):
                yield "sides exchanged", node, f"tl.where({_text(condition)}, {_text(b)}, {_text(a)})"
            case ast.Call(func=ast.Name(id="range"), args=bounds):
                yield from _mistakes_of_loop(node, bounds)
            case ast.BinOp(op=ast.BitAnd(), left=a, right=b):
                yield "part of a mask dropped", node, _text(a)
                yield "part of a mask dropped", node, _text(b)
            case ast.BinOp(op=ast.Add(), left=a, right=b) if node in addresses:
                yield "term of an address dropped", node, _text(a)
                if not _is_pointer(a):
                    yield "term of an address dropped", node, _text(b)
            case ast.BinOp(op=ast.Mult(), left=a, right=b) if node in addresses:
                yield "factor of an address dropped", node, _text(a)
                yield "factor of an address dropped", node, _text(b)
            case ast.BinOp(op=ast.Add(), left=a, right=b):
                yield "sign changed", node, f"{_text(a)} - ({_text(b)})"
            case ast.BinOp(op=ast.Sub(), left=a, right=b):
                yield "sign changed", node, f"{_text(a)} + {_text(b)}"
            case ast.Compare(ops=[ast.Lt()], left=a, comparators=[b]):
                yield "bound off by one", node, f"{_text(a)} <= {_text(b)}"
                yield "bound off by one", node, f"{_text(a)} < {_text(b)} - 1"
            case ast.Compare(ops=[ast.Eq() | ast.Gt() as op], left=a, comparators=[b]):
                yield "comparison changed", node, f"{_text(a)} {'>' if isinstance(op, ast.Eq) else '<'} {_text(b)}"
            case ast.Name(id=name, ctx=ast.Load()) if name.startswith("stride"):
                yield "stride off by one", node, f"({name} + 1)"
            case ast.Attribute(value=ast.Name(id="tl"), attr=kind) if kind in NARROW:
                yield "type narrowed", node, f"tl.{NARROW[kind]}"
            case ast.AugAssign():
                yield "update dropped", node, "pass"
            case ast.Expr(value=ast.Call() as call) if _is_access(call):
                yield "store dropped", node, "pass"


def _mistakes_of_access(call: ast.Call, pointers: list[str]) -> Iterator[tuple[str, Node, str]]:
    options = {option.arg: option.value for option in call.keywords}
    if "mask" in options:
        kept = ", ".join(_text(argument) for argument in call.args)
        yield "mask dropped", call, f"{_text(call.func)}({kept})"
    if "other" in options:
        whole = isinstance(ast.literal_eval(_number(options["other"])), int)
        yield "other changed", options["other"], "12345" if whole else 'float("nan")'
    for node in ast.walk(call.args[0]):
        if isinstance(node, ast.Name) and node.id in pointers:
            other = pointers[(pointers.index(node.id) + 1) % len(pointers)]
            if other != node.id:
                yield "pointers exchanged", node, other


def _mistakes_of_loop(call: ast.Call, bounds: list[ast.expr]) -> Iterator[tuple[str, Node, str]]:
    begin, end, step = map(_text, [ast.Constant(0), *bounds, ast.Constant(1)][len(bounds) > 1 :][:3])
    yield "loop ends early", call, f"range({begin}, {end} - {step}, {step})"
    yield "loop begins late", call, f"range({begin} + {step}, {end}, {step})"


def _is_access(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and _text(node.func) in ("tl.load", "tl.store")


def _is_pointer(node: ast.AST) -> bool:
    """Return whether a sum begins with a pointer, without which it is no address."""
    while isinstance(node, ast.BinOp):
        node = node.left
    return isinstance(node, ast.Name) and node.id.startswith("p_")


def _number(node: ast.expr) -> str:
    text = _text(node)
    return "0.0" if text.startswith("float(") else text


def _address_nodes(function: ast.FunctionDef) -> set[ast.AST]:
    """Return the nodes that an address is computed with: below a load's or store's first argument, or below the value
    of a variable that one is computed with."""
    roots = [call.args[0] for call in _below(function) if _is_access(call)]
    nodes, names = set(), set()
    while roots:
        below = [node for root in roots for node in ast.walk(root)]
        nodes |= set(below)
        names |= {node.id for node in below if isinstance(node, ast.Name)}
        roots = [
            statement.value
            for statement in _below(function)
            if isinstance(statement, ast.Assign | ast.AugAssign) and statement.value not in nodes
            for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
            if {node.id for node in ast.walk(target) if isinstance(node, ast.Name)} & names
        ]
    return nodes


def _below(function: ast.FunctionDef) -> Iterator[ast.AST]:
    for statement in function.body:
        yield from ast.walk(statement)


def _text(node: ast.AST) -> str:
    return ast.unparse(node)
