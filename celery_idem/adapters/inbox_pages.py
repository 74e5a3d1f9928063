"""What the inbox shows, as HTML. Everything that comes from a record or a person is escaped here."""

from __future__ import annotations

from html import escape
from typing import NamedTuple
from urllib.parse import quote

from celery_idem.adapters.inbox_overview import HOURS, Overview
from celery_idem.core.model import NO_OWNER
from celery_idem.engine.entries import Entry
from celery_idem.operate.operators import DOUBTFUL, Operator, duration, iso

SHOWN = 4000
"""Characters of a result that are shown: a screen or two."""


def frame(title: str, body: str, base: str, user: str = "", csrf: str = "") -> str:
    """A whole page."""
    out = ""
    if user:
        leave = (
            f'<form method="post" action="{escape(base)}/sign-out">'
            f'<input type="hidden" name="csrf" value="{escape(csrf)}">'
            '<button class="quiet">Sign out</button></form>'
            if csrf
            else ""
        )
        out = f'<div class="who"><span>{escape(user)}</span>{leave}</div>'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · intents</title>
<link rel="stylesheet" href="{escape(base)}/inbox.css">
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header><a class="home" href="{escape(base)}/">Intents</a>{out}</header>
<main id="main">
{body}
</main>
</body>
</html>
"""


def problem(text: str) -> str:
    """Something went wrong, or is not here."""
    return f'<p class="problem" role="alert">{escape(text)}</p>'


def sign_in(csrf: str, wrong: str, base: str) -> str:
    return f"""<h1>Sign in</h1>
{problem(wrong) if wrong else ""}
<form method="post" action="{escape(base)}/sign-in" class="card">
<input type="hidden" name="csrf" value="{escape(csrf)}">
<label for="name">Your name <small>kept with every decision you make</small></label>
<input id="name" name="name" autocomplete="username" required autofocus>
<label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required>
<button>Sign in</button>
</form>"""


# --- the overview ----------------------------------------------------------------------


def overview(seen: Overview, settled: str, base: str) -> str:
    done = f'<p class="done" role="status">{escape(settled)}</p>' if settled else ""
    verb = "intent waits" if seen.waiting == 1 else "intents wait"
    count = f"{seen.waiting} {verb}" if seen.whole else f"At least {seen.waiting} {verb}"
    return f"""<h1>{count} for somebody</h1>
{done}
<form class="find" action="{escape(base)}/intent"><label for="key">Key, or its beginning</label>
<input id="key" name="key" required><button class="quiet">Show</button></form>
{_reading(seen, base)}
{_doubtful(seen, base)}
<h2>By task and state</h2>
{_tallies(seen)}
<h2>Last 24 hours, by last change</h2>
{_chart(seen)}"""


def _reading(seen: Overview, base: str) -> str:
    """What the figures below are of. A link, and not a page that reloads itself under somebody who types."""
    again = f'<a href="{escape(base)}/">Look again</a>'
    if not seen.whole:
        text = f"Still reading: this is what {seen.records:,} records say, and there are more. {again}."
    elif not seen.read_at:
        text = "There are no intents."
    else:
        text = f"Read at {iso(seen.read_at)}."
        if seen.newer is not None:
            text += (
                f" It is being read again, {seen.newer:,} of about {seen.records:,} records so far. {again}."
            )
    return f'<p class="note">{text}</p>'


def _doubtful(seen: Overview, base: str) -> str:
    if not seen.doubtful:
        return f'<p class="fine">Nothing is in doubt{"" if seen.whole else " so far"}.</p>'
    rows = "".join(
        f'<li><a href="{escape(base)}/intent?key={quote(entry.key)}"><span class="key">{escape(entry.key)}</span>'
        f'<span class="state {escape(entry.state)}">{_state(entry.state)}</span>'
        f'<span class="age">for {duration(entry.age)}</span>'
        f'<span class="why">{escape(entry.record.reason)}</span></a></li>'
        for entry in seen.doubtful
    )
    more = seen.waiting - len(seen.doubtful)
    rest = f'<p class="note">and {more} younger ones.</p>' if more > 0 else ""
    return f'<ol class="doubtful">{rows}</ol>{rest}'


def _tallies(seen: Overview) -> str:
    if not seen.tallies:
        return '<p class="note">No records.</p>'
    rows = "".join(
        f'<tr><th scope="row">{escape(task)}</th><td><span class="state {escape(state)}">{_state(state)}</span></td>'
        f'<td class="number">{tally.intents}</td><td class="number">{duration(tally.oldest)}</td></tr>'
        for (task, state), tally in sorted(seen.tallies.items())
    )
    return (
        '<table><thead><tr><th scope="col">Task</th><th scope="col">State</th><th scope="col" class="number">Intents'
        f'</th><th scope="col" class="number">Oldest</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def _chart(seen: Overview) -> str:
    """Stacked bars; the numbers are in their titles and, for who cannot see them, in the table above."""
    most = max((sum(hour.values()) for hour in seen.hours), default=0) or 1
    bars = []
    for n, hour in enumerate(seen.hours):
        bottom = 100.0
        for state, number in sorted(hour.items()):
            height = 96.0 * number / most
            bottom -= height
            ago = HOURS - 1 - n
            bars.append(
                f'<rect class="{escape(state)}" x="{n * 10 + 1}" y="{bottom:.2f}" width="8" height="{height:.2f}">'
                f"<title>{number} {_state(state)}, {ago} to {ago + 1} hours ago</title></rect>"
            )
    return (
        f'<svg class="chart" viewBox="0 0 {HOURS * 10} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="Intents by hour of their last change">{"".join(bars)}</svg>'
        '<p class="axis"><span>a day ago</span><span>now</span></p>'
    )


# --- one intent ------------------------------------------------------------------------


def intent(operator: Operator, entry: Entry, csrf: str, wrong: str, typed: dict[str, str], base: str) -> str:
    form = operator.describe(entry)
    facts = "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(str(value))}</dd>"
        for label, value in (
            ("Task", entry.task),
            ("Why", form["reason"]),
            ("Task id", form["task_id"]),
            ("Attempts", form["attempts"]),
            ("Crashes", form["crashes"] or ""),
            ("Fence", form["fence"]),
            ("Steps done", ", ".join(form["steps"])),
            ("Steps that were open", ", ".join(form["open_steps"])),
            ("Lease left", f"{form['lease_left']} s" if form["lease_left"] else ""),
        )
        if value != ""
    )
    result = form["result"]
    shown = "" if result is None else f"<h2>Result</h2><pre>{escape(result[:SHOWN])}</pre>"
    decide = _decide(entry, csrf, typed, base) if entry.state in DOUBTFUL else _settled_note(entry)
    return f"""<h1 class="key">{escape(entry.key)}</h1>
<p><span class="state {escape(entry.state)}">{_state(entry.state)}</span> for {duration(entry.age)}</p>
{problem(wrong) if wrong else ""}
<dl>{facts}</dl>
{shown}
{decide}
<h2>What happened</h2>
<ol class="timeline">{"".join(_moment(moment) for moment in timeline(entry))}</ol>"""


class Moment(NamedTuple):
    """One line of an intent's timeline; ``at`` in seconds since the epoch, 0 where nobody noted it."""

    at: float
    who: str
    what: str
    more: str


def timeline(entry: Entry) -> list[Moment]:
    """What is known of an intent, in order. A record that was never contested says little: when it
    was claimed, and when it got where it is."""
    record = entry.record
    moments = [Moment(note.at / 1e6, note.by, note.what, note.evidence) for note in record.notes]
    # A fence is the store's time of the claim that it was made for.
    moments.append(Moment(record.fence / 1e6, _owner(record.owner), "claimed", f"attempt {record.attempts}"))
    moments += [Moment(0.0, "", "step done", step.name) for step in record.steps]
    for name in record.open_steps:
        moments.append(Moment(0.0, "", "step begun, never ended", name))
    moments.append(Moment(entry.changed_at, "", _state(entry.state), record.reason))
    known = sorted((m for m in moments if m.at), key=lambda m: m.at)
    undated = [m for m in moments if not m.at]
    return [*known[:-1], *undated, *known[-1:]]


def _owner(owner: bytes) -> str:
    return "" if owner == NO_OWNER else owner.hex()


def _moment(moment: Moment) -> str:
    when = f"<time>{iso(moment.at)}</time>" if moment.at else "<time></time>"
    who = f' <span class="by">{escape(moment.who)}</span>' if moment.who else ""
    more = f' <span class="more">{escape(moment.more)}</span>' if moment.more else ""
    return f"<li>{when}<span>{escape(moment.what)}{who}{more}</span></li>"


def _decide(entry: Entry, csrf: str, typed: dict[str, str], base: str) -> str:
    evidence = escape(typed.get("evidence", ""))
    hidden = (
        f'<input type="hidden" name="csrf" value="{escape(csrf)}">'
        f'<input type="hidden" name="key" value="{escape(entry.key)}">'
        f'<input type="hidden" name="fence" value="{escape(typed.get("fence", str(entry.record.fence)))}">'
    )
    return f"""<h2>What did you find out?</h2>
<p>Nobody here knows whether it took effect. Look at the destination first. A decision cannot be taken back.</p>
<div class="decide">
<form method="post" action="{escape(base)}/resolve" class="card">{hidden}
<h3>It happened</h3>
<p>Every caller gets this result, and it will not run again.</p>
<label for="result">Result <small>JSON, such as "inv_7" or null</small></label>
<textarea id="result" name="result" rows="3" spellcheck="false">{escape(typed.get("result", "null"))}</textarea>
<label for="evidence-yes">Evidence <small>what you saw, and where</small></label>
<input id="evidence-yes" name="evidence" required value="{evidence}">
<button name="decision" value="happened" class="yes">It happened</button>
</form>
<form method="post" action="{escape(base)}/resolve" class="card">{hidden}
<h3>It did not happen</h3>
<p>The next delivery <strong>runs it</strong>. If it did happen after all, that is a second time.</p>
<label for="evidence-no">Evidence <small>what you looked at, and that no request is under way</small></label>
<input id="evidence-no" name="evidence" required value="{evidence}">
<button name="decision" value="not_happened" class="no">It did not happen</button>
</form>
</div>"""


def _settled_note(entry: Entry) -> str:
    if entry.record.outcome is not None:
        return '<p class="note">Its outcome is known and replayed to every caller.</p>'
    if entry.state == "released":
        return '<p class="note">Nothing happened. The next delivery runs it.</p>'
    return (
        '<p class="note">Somebody works on it, or it waits for its own retry. There is nothing to decide.</p>'
    )


def _state(state: str) -> str:
    return state.replace("_", " ")
