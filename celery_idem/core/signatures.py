"""Reads the parameters that the callers of a function give.

``inspect.signature`` follows ``__wrapped__``: for a decorated function it returns the parameters of the wrapped
function. If the decorator injects a session, every position is then off by one. This module reads the function that is
really called. If it passes ``*args`` or ``**kwargs`` on, its source has to show how; otherwise it is ``Opaque``.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from inspect import Parameter
from types import FunctionType, MethodType
from typing import Any, NamedTuple

POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)

_HARMLESS = frozenset({"__name__", "__qualname__", "__module__", "__doc__"})
"""Attributes of the wrapped function that a decorator may read without calling it."""

_CHANGING = frozenset({"pop", "popitem", "clear", "update", "setdefault", "__setitem__", "__delitem__"})
"""Methods that change ``**kwargs``."""


class Opaque(Exception):
    """The parameters cannot be determined. The text says why."""


class Called(NamedTuple):
    """The parameters that callers give.

    Attributes:
        signature: the parameters.
        owners: the function that declares each parameter; its annotations are evaluated there.
        renamed: the callers' names of parameters by the wrapped function's names.
    """

    signature: inspect.Signature
    owners: Mapping[str, Any]
    renamed: Mapping[str, str]

    def without_first(self) -> Called:
        """Return it without the first parameter: the task itself, or a method's object.

        Raises:
            Opaque: there is no such parameter.
        """
        parameters = list(self.signature.parameters.values())
        if parameters and parameters[0].kind in POSITIONAL:
            del parameters[0]
        elif not parameters or parameters[0].kind is not Parameter.VAR_POSITIONAL:
            raise Opaque("it has no parameter for the task itself")
        return self._replace(signature=self.signature.replace(parameters=parameters))


def called(fun: Any) -> Called:
    """Return the parameters that callers of ``fun`` give. Raises ``Opaque``: they cannot be determined."""
    if isinstance(fun, functools.partial):
        return _partial(fun)
    real = type(fun)  # a proxy (wrapt, mock) pretends to have the class of its target
    if issubclass(real, MethodType):
        return called(fun.__func__).without_first()
    if issubclass(real, FunctionType):
        return _function(fun)
    call = inspect.getattr_static(type(fun), "__call__", None)
    if hasattr(fun, "__wrapped__"):
        own = _function(call).without_first() if isinstance(call, FunctionType) else None
        if own is None or _open(own.signature):
            raise Opaque(f"a {type(fun).__name__} stands in front of it")
        return own
    if isinstance(call, FunctionType):
        return _function(call).without_first()
    try:
        own_signature = inspect.signature(fun, follow_wrapped=False)
    except (TypeError, ValueError):
        raise Opaque(f"a {type(fun).__name__} does not say what it takes") from None
    return Called(own_signature, dict.fromkeys(own_signature.parameters, fun), {})


def _partial(fun: functools.partial[Any]) -> Called:
    inner = called(fun.func)

    def stub() -> None: ...

    stub.__signature__ = inner.signature  # type: ignore[attr-defined]
    try:
        signature = inspect.signature(
            functools.partial(stub, *fun.args, **fun.keywords), follow_wrapped=False
        )
    except (TypeError, ValueError) as error:
        raise Opaque(f"a functools.partial does not fit its function ({error})") from None
    return inner._replace(signature=signature)


def _function(fun: FunctionType) -> Called:
    own = _own(fun)
    wrapped = getattr(fun, "__wrapped__", None)
    if wrapped is None:
        if _open(own) and hasattr(fun, "__signature__"):
            raise Opaque(
                f"{_name(fun)} takes *args or **kwargs, and only its __signature__ says what they are"
            )
        return Called(own, dict.fromkeys(own.parameters, fun), {})
    if not _open(own):
        return Called(own, dict.fromkeys(own.parameters, fun), _renamed(fun, own, wrapped))
    return _composed(fun, own, wrapped)


def _own(fun: FunctionType) -> inspect.Signature:
    """Return the signature of the code alone: ``functools.wraps`` copies a ``__signature__``."""
    bare = FunctionType(fun.__code__, fun.__globals__, fun.__name__, fun.__defaults__, fun.__closure__)
    bare.__kwdefaults__ = fun.__kwdefaults__
    bare.__annotations__ = fun.__annotations__
    return inspect.signature(bare)


def _open(signature: inspect.Signature) -> bool:
    return any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values())


def _name(fun: FunctionType) -> str:
    return str(fun.__code__.co_name)  # functools.wraps sets __name__ to that of the wrapped function


# --- what a decorator passes on ----------------------------------------------------------


class _Source:
    """The source of a decorator's wrapper, and its calls of the wrapped function."""

    def __init__(self, node: ast.FunctionDef | ast.AsyncFunctionDef, calls: list[ast.Call]) -> None:
        self.node = node
        self.calls = calls


def _source(fun: FunctionType, wrapped: Any) -> _Source:
    """Parse the wrapper; ``Opaque`` if a relevant name is used in an unknown way."""
    names = set()
    for name, cell in zip(fun.__code__.co_freevars, fun.__closure__ or (), strict=True):
        try:
            if cell.cell_contents is wrapped:
                names.add(name)
        except ValueError:  # an empty cell
            continue
    if not names:
        raise Opaque(f"{_name(fun)} does not call the function that it wraps by a name of its decorator")
    node = _parsed(fun)
    every = node.args
    watched = names | {each.arg for each in (every.vararg, every.kwarg) if each is not None}
    calls: list[ast.Call] = []
    harmless: set[int] = {id(each) for each in (every.vararg, every.kwarg)}
    for each in ast.walk(node):
        if isinstance(each, ast.Call) and isinstance(each.func, ast.Name) and each.func.id in names:
            calls.append(each)
            harmless.add(id(each.func))
        elif isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name):
            if each.value.id in names and each.attr in _HARMLESS:
                harmless.add(id(each.value))
            elif every.kwarg is not None and each.value.id == every.kwarg.arg and each.attr in _CHANGING:
                raise Opaque(f"{_name(fun)} changes **{each.value.id}")
    for each in ast.walk(node):
        if id(each) not in harmless and any(name in watched for name in _bound_or_used(each, names)):
            raise Opaque(
                f"{_name(fun)} does more with the function that it wraps, or its arguments, than call it"
            )
    if not calls:
        raise Opaque(f"{_name(fun)} does not call the function that it wraps")
    return _Source(node, calls)


def parsed(text: str) -> ast.Module:
    """Return the syntax tree of a text.

    Before Python 3.11.8, threads that parse at the same time may get a ``SystemError``
    (https://github.com/python/cpython/issues/106905). Then it is tried again.
    """
    for _ in range(9):  # each is rare by itself
        with contextlib.suppress(SystemError):
            return ast.parse(text)
    return ast.parse(text)


def _parsed(fun: FunctionType) -> ast.FunctionDef | ast.AsyncFunctionDef:
    import textwrap  # only a decorator needs it

    try:
        # of the code, because for a function it follows __wrapped__
        lines, _ = inspect.getsourcelines(fun.__code__)
        node = parsed(textwrap.dedent("".join(lines))).body[0]
    except (OSError, SyntaxError, ValueError, IndexError, TypeError):
        raise Opaque(f"the source of {_name(fun)} is not at hand") from None
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name != fun.__code__.co_name:
        raise Opaque(f"the source of {_name(fun)} is not at hand")
    written = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    code = fun.__code__
    if written != list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]):
        raise Opaque(f"the source of {_name(fun)} has changed")
    node.decorator_list = []  # they ran already
    return node


def _bound_or_used(node: ast.AST, wrapped: set[str]) -> Iterator[str]:
    """Return names that a node binds, by any syntax, and uses of the wrapped function."""
    if isinstance(node, (ast.Attribute, ast.keyword, ast.Constant)):
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in wrapped:
        return
    for _, value in ast.iter_fields(node):
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, str))


def _shape(fun: FunctionType, source: _Source) -> tuple[int, frozenset[str]]:
    """How many positional arguments come before ``*args``, and which keywords beside ``**kwargs``."""
    every = source.node.args
    injected: set[str] = set()
    for each in ast.walk(source.node):
        targets = each.targets if isinstance(each, (ast.Assign, ast.Delete)) else ()
        targets = [each.target] if isinstance(each, (ast.AugAssign, ast.AnnAssign)) else targets
        for target in targets:  # kwargs["session"] = …
            if every.kwarg is None or not isinstance(target, ast.Subscript):
                continue
            if isinstance(target.value, ast.Name) and target.value.id == every.kwarg.arg:
                if not isinstance(target.slice, ast.Constant) or not isinstance(each, ast.Assign):
                    raise Opaque(f"{_name(fun)} changes **{every.kwarg.arg}")
                injected.add(str(target.slice.value))
    shapes = set()
    for call in source.calls:
        stars = [n for n, each in enumerate(call.args) if isinstance(each, ast.Starred)]
        passed = [ast.unparse(each) for each in call.args if isinstance(each, ast.Starred)]
        passed += [f"**{ast.unparse(each.value)}" for each in call.keywords if each.arg is None]
        whole = [f"*{every.vararg.arg}"] if every.vararg is not None else []
        whole += [f"**{every.kwarg.arg}"] if every.kwarg is not None else []
        if passed != whole or (stars and stars != [len(call.args) - 1]):
            raise Opaque(f"{_name(fun)} does not hand on exactly {' and '.join(whole)}")
        given = frozenset(each.arg for each in call.keywords if each.arg is not None)
        shapes.add((len(call.args) - len(stars), given | injected))
    if len(shapes) != 1:
        raise Opaque(f"{_name(fun)} calls the function that it wraps in several ways")
    return shapes.pop()


def _composed(fun: FunctionType, own: inspect.Signature, wrapped: Any) -> Called:
    """Return a wrapper's own parameters, then those of the wrapped function that its call leaves to the caller."""
    inner = called(wrapped)
    first, injected = _shape(fun, _source(fun, wrapped))
    mine = [p for p in own.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    theirs = inner.signature.parameters
    kinds = {p.kind for p in own.parameters.values()}
    rest: list[Parameter] = []
    seen = 0
    by_position = Parameter.VAR_POSITIONAL in kinds
    by_name = Parameter.VAR_KEYWORD in kinds
    for name, parameter in theirs.items():
        kind = parameter.kind
        if kind in POSITIONAL:
            seen += 1
            if seen <= first:
                if name in injected:
                    raise Opaque(f"{_name(fun)} gives {name} twice")
                continue
            if name in injected:  # the following ones can be given by name only
                by_position = False
                continue
            if kind is Parameter.POSITIONAL_ONLY:
                reachable = by_position
            else:
                reachable = by_position or by_name
                kind = Parameter.KEYWORD_ONLY if not by_position else kind
                kind = Parameter.POSITIONAL_ONLY if not by_name else kind
        elif kind is Parameter.VAR_POSITIONAL:
            reachable = by_position
        else:
            reachable = by_name and name not in injected
            if name in injected:
                continue
        if (
            kind is Parameter.KEYWORD_ONLY
            and name in own.parameters
            and parameter.default is not parameter.empty
        ):
            continue  # the wrapper's parameter of that name hides it
        if reachable:
            rest.append(parameter.replace(kind=kind))
        elif parameter.default is Parameter.empty and kind in (*POSITIONAL, Parameter.KEYWORD_ONLY):
            raise Opaque(f"{_name(fun)} leaves no way to give {name} of the function that it wraps")
    clash = {p.name for p in mine} & {p.name for p in rest}
    if clash:
        raise Opaque(f"{_name(fun)} and the function that it wraps both take {min(clash)}")
    if any(p.kind is Parameter.POSITIONAL_ONLY for p in rest):  # no parameter before one can be given by name
        only = Parameter.POSITIONAL_ONLY
        mine = [p.replace(kind=only) if p.kind in POSITIONAL else p for p in mine]
    try:
        signature = inspect.Signature(sorted([*mine, *rest], key=lambda p: p.kind))
    except ValueError as error:
        raise Opaque(
            f"the parameters of {_name(fun)} and of the function that it wraps do not fit: {error}"
        ) from None
    owners = {**inner.owners, **dict.fromkeys((p.name for p in mine), fun)}
    kept = {old: new for old, new in inner.renamed.items() if new in signature.parameters}
    return Called(signature, owners, {**kept, **_renamed(fun, signature, wrapped)})


# --- one parameter by another name ---------------------------------------------------------


def _renamed(fun: FunctionType, signature: inspect.Signature, wrapped: Any) -> dict[str, str]:
    """Return the one parameter that it takes instead of another: ``load(order_id, dry)`` around ``ship(order, dry)``.

    Only if all others are the same, the position is the same, and the source shows that one is made from the other.
    """
    try:
        inner = called(wrapped).signature.parameters
        source = _source(fun, wrapped)
    except Opaque:
        return {}
    mine = signature.parameters
    new, old = [n for n in mine if n not in inner], [n for n in inner if n not in mine]
    if len(new) != 1 or len(old) != 1:
        return {}
    place = list(inner).index(old[0])
    if list(mine).index(new[0]) != place or mine[new[0]].kind not in POSITIONAL:
        return {}
    known = _made_of(source.node, new[0])
    for call in source.calls:
        by_name = {each.arg: each.value for each in call.keywords}
        given = by_name.get(old[0]) or (call.args[place] if place < len(call.args) else None)
        if given is None or known.isdisjoint(_names(given)):
            return {}
    return {old[0]: new[0]}


def _made_of(node: ast.AST, name: str) -> set[str]:
    """Return the local variables that are assigned from expressions with ``name``."""
    known, size = {name}, 0
    while len(known) > size:
        size = len(known)
        for each in ast.walk(node):
            if isinstance(each, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and each.value is not None:
                targets = each.targets if isinstance(each, ast.Assign) else [each.target]
                if not known.isdisjoint(_names(each.value)):
                    known.update(n for target in targets for n in _names(target))
            elif isinstance(each, ast.withitem) and not known.isdisjoint(_names(each.context_expr)):
                known.update(_names(each.optional_vars) if each.optional_vars is not None else ())
    return known


def _names(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
