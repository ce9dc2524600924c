"""Tool calls as Python: ``name(key="value")``, alone, in a list, or one per line."""

from __future__ import annotations

import ast

from ollama_forge.serving.text.tools.base import Call


def python_calls(code: str) -> tuple[Call, ...]:
    """The calls in code that consists only of calls with literal keyword arguments; empty for any other code.

    Some models write ``print(…)`` around a call or ``.call`` after a name; both are ignored.
    """
    try:
        body = ast.parse(code.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    calls: list[Call] = []
    for statement in body:
        if not isinstance(statement, ast.Expr):
            return ()
        value = statement.value
        for node in value.elts if isinstance(value, ast.List | ast.Tuple) else [value]:
            call = _call(node)
            if call is None:
                return ()
            calls.append(call)
    return tuple(calls)


def _call(node: ast.expr) -> Call | None:
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name) and node.func.id == "print" and len(node.args) == 1:
        return _call(node.args[0])
    name = ast.unparse(node.func).removesuffix(".call")
    try:
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    if node.args or len(arguments) != len(node.keywords):
        return None
    return Call(name, arguments)
