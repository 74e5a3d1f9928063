"""Describes a call for people: its arguments as short texts, and the author's own sentence (``describe=``).

Pages and logs show this among other things, so nothing here raises. Values of ``secret`` parameters are replaced first.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from celery_idem.core import keys
from celery_idem.core.errors import ConfigurationError
from celery_idem.integration import publishing

VALUE = 200
"""Characters of one value that are shown: enough for an id, an address or a sentence, and not for a document."""

LINE = 300
"""Characters of a description in one line: they fit beside a key on a wide screen."""

ARGUMENTS = 50
"""Arguments that are shown: more than a body has parameters, because ``**kwargs`` may contain any number."""

Describe = str | Callable[[dict[str, Any]], Any] | None


class Said(NamedTuple):
    """A call, described for people.

    Attributes:
        sentence: the text of ``describe=``; "" without it.
        intent: the fields of the intent as text.
        arguments: all arguments as text.
        labels: the call's scope, occurrence and caller's key, if it has them.
    """

    sentence: str = ""
    intent: Mapping[str, str] = {}
    arguments: Mapping[str, str] = {}
    labels: Mapping[str, str] = {}

    @property
    def line(self) -> str:
        """The description in one line."""
        fields = {**self.intent, **self.labels}
        return _short(self.sentence or ", ".join(f"{name}={text}" for name, text in fields.items()), LINE)


def said(
    declaration: keys.Declaration, describe: Describe, args: Any, kwargs: Any, headers: Mapping[str, Any]
) -> Said:
    """Return the description of a call; empty if there cannot be one."""
    try:
        hidden = publishing.without_secrets(declaration, args or (), kwargs or {})
        arguments = dict(declaration.bind(*hidden))
    except Exception:  # the call does not fit, or an argument's own code fails
        return Said()
    arguments.update((name, publishing.HIDDEN) for name in declaration.secret if name in arguments)
    texts = {str(name): _text(value) for name, value in list(arguments.items())[:ARGUMENTS]}
    labels = {name: _text(headers[header]) for name, header in keys.LABELS.items() if headers.get(header)}
    return Said(_sentence(describe, arguments), _intent(declaration, arguments, texts), texts, labels)


def _intent(
    declaration: keys.Declaration, arguments: dict[str, Any], texts: Mapping[str, str]
) -> Mapping[str, str]:
    if declaration.fields is not None:
        return {name: texts[name] for name in declaration.fields if name in texts}
    # A function of the intent would need the secret values.
    if declaration.compute is None or declaration.secret:
        return texts
    try:
        return {name: _text(value) for name, value in declaration.intent(arguments).items()}
    except Exception:  # of the author's function
        return texts


def _sentence(describe: Describe, arguments: dict[str, Any]) -> str:
    if describe is None:
        return ""
    try:
        made = describe.format(**arguments) if isinstance(describe, str) else describe(dict(arguments))
    except Exception:  # of the author's function, or of a value's own format
        return ""
    return _short(made, LINE) if isinstance(made, str) else ""


def _text(value: Any) -> str:
    from celery.utils.saferepr import saferepr  # bounded, whatever the value is

    if isinstance(value, str) and value == publishing.HIDDEN:
        return publishing.HIDDEN
    try:
        return _short(saferepr(value, maxlen=VALUE), VALUE)
    except Exception:  # the value's own code
        return f"<{type(value).__name__}>"


def _short(text: str, length: int) -> str:
    """Return a text on one line, cut to a length."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def checked(task: str, describe: Any, declaration: keys.Declaration) -> Describe:
    """Return ``describe=`` as it will be used.

    Raises:
        ConfigurationError: it is neither a format string nor a function, or it has a name that is no parameter.
    """
    if describe is None or callable(describe):
        return describe  # type: ignore[no-any-return]
    if not isinstance(describe, str):
        raise ConfigurationError(
            f"{task}: describe= must be text such as 'invoice {{invoice_id}}', or a function from the arguments to "
            "text."
        )
    parameters = declaration.signature.parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return describe
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(describe) if field is not None]
    except ValueError as error:
        raise ConfigurationError(f"{task}: describe= is no format string: {error}.") from None
    for field in fields:
        name = field.partition(".")[0].partition("[")[0]
        if name not in parameters:
            raise ConfigurationError(
                f"{task}: describe= names {name!r}, which is not a parameter. It has: "
                f"{', '.join(parameters) or 'none'}."
            )
    return describe
