"""What a run would learn from, to be seen by eye: `python -m magnum_train.report experiment=…`.

Writes one page of HTML that needs nothing beside it, and prints the same in short. Owns the statistics of a prepared
set, the choice of conversations to show, and the page. What rows hold is not trusted: it arrives on the page as text,
and the page forbids itself every script and every request. Knows no rows and no gates, only the prepared set.
"""

import html
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import Tokenizer
from data.chatml import role_tokens, turns
from data.conversation import ROLES, TEXT
from data.documents import Documents
from data.ledger import Ledger
from data.loader import Schedule
from data.prepared import Prepared
from magnum_train import batches
from magnum_train.config import TrainConfig, verb
from magnum_train.errors import ConfigError
from magnum_train.metrics import Terminal
from magnum_train.prepare import prepare_data

_ROLES = (*ROLES, TEXT)
_STATES = 1 + len(_ROLES)
"""Where a conversation stands between two turns: 0 outside of it, else the number of the last turn's role and one."""

_CHUNK = 2**20
"""Tokens looked at together: some 100 MB a thread, and few enough documents for `_repeated`."""
_THREADS = 8
"""Most threads at it, which bounds memory."""

_GRAM = 8
"""Tokens of a sequence that counts as repeated, a power of two: longer than a header, short enough for a phrase."""

_BINS = 24
"""Most bins of one number each; a wider range has two to each doubling."""

_REASONS, _EXAMPLES, _BEGINNING = 12, 3, 300
"""Reasons of a source that are counted one by one; rejects shown of each source and gate; characters of each."""

Table = list[list[str]]
"""A head, then rows; the first cell of each is its name, the others are numbers."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """What is counted in the training documents.

    Args:
        tokens: by source, role (`ROLES`, then text) and whether they are supervised, [sources, roles, 2].
        turns: messages of each document, [documents].
        characters: mean length of a document's tokens in characters, control tokens left out, [documents].
        repeats: share of a document's sequences of `_GRAM` tokens that occur before in it, [documents].
        rarity: share of the source's documents that have this one's rarest step from role to role, [documents].
        rarest: that step, state before × `_STATES` + state after, [documents].
    """

    tokens: NDArray[np.int64]
    turns: NDArray[np.int64]
    characters: NDArray[np.float64]
    repeats: NDArray[np.float64]
    rarity: NDArray[np.float64]
    rarest: NDArray[np.int64]


def measure(prepared: Prepared) -> Corpus:
    """Count all training documents, a chunk of the memory map at a time.

    Args:
        prepared: the set.

    Returns:
        The counts; memory grows with the documents, not with their tokens.
    """
    documents, sources, count = prepared.train, len(prepared.sources), len(prepared.train)
    order = np.argsort(documents.starts, kind="stable")
    ends = np.cumsum(documents.lengths[order])
    groups = np.split(order, np.flatnonzero(np.diff((ends - 1) // _CHUNK)) + 1) if count else []
    texts = prepared.tokenizer.token_bytes()
    characters = np.array([sum(not 0x80 <= byte < 0xC0 for byte in text) for text in texts])  # UTF-8's first bytes
    characters[list(prepared.tokenizer.control_ids)] = -1
    tokens = np.zeros((sources, len(_ROLES), 2), np.int64)
    per_document = np.zeros((3, count), np.float64)
    steps = np.zeros(count, np.uint64)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda group: _look(documents, group, sources, prepared.tokenizer, characters), groups)
        for group, (counted, values, taken) in zip(groups, found, strict=True):
            tokens += counted
            per_document[:, group], steps[group] = values, taken
    rarity, rarest = _rarest(steps, documents.sources, sources)
    return Corpus(tokens, per_document[0].astype(np.int64), per_document[1], per_document[2], rarity, rarest)


def _look(
    documents: Documents, group: NDArray[np.int64], sources: int, tokenizer: Tokenizer, characters: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.uint64]]:
    """Tokens by source, role and supervision; turns, characters and repeats of each document; its steps as bits."""
    lengths = documents.lengths[group]
    starts = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(group)), lengths)
    where = np.arange(len(owner)) + (documents.starts[group] - starts)[owner]
    tokens = documents.tokens[where]
    roles = role_tokens(tokens, tokenizer).astype(np.int64)
    kinds = (documents.sources[group][owner] * len(_ROLES) + roles) * 2 + (documents.weights[where] != 0)
    counted = np.bincount(kinds, minlength=sources * len(_ROLES) * 2).reshape(sources, len(_ROLES), 2)

    sizes = characters[tokens]
    control = sizes < 0
    text_tokens = np.add.reduceat((~control).astype(np.int64), starts)
    mean_size = np.add.reduceat(np.maximum(sizes, 0), starts) / np.maximum(text_tokens, 1)

    opens = tokens == tokenizer.im_start_id
    opens[starts[~np.logical_or.reduceat(opens, starts)]] = True  # prose has no header
    at = np.flatnonzero(opens)
    first = np.diff(owner[at], prepend=-1) != 0
    last = np.diff(owner[at], append=len(group)) != 0
    after = 1 + roles[at]
    before = np.where(first, 0, np.roll(after, 1))
    one = np.uint64(1)
    step = one << (before * _STATES + after).astype(np.uint64)
    step |= np.where(last, one << (after * _STATES).astype(np.uint64), np.uint64(0))
    steps = np.bitwise_or.reduceat(step, np.flatnonzero(first))
    values = np.stack([np.bincount(owner[at]), mean_size, _repeated(tokens, control, owner, len(group))])
    return counted, values, steps


def _repeated(
    tokens: NDArray[np.int32], control: NDArray[np.bool_], owner: NDArray[np.int64], documents: int
) -> NDArray[np.float64]:
    """Share of each document's sequences of tokens, without control tokens, that occur before in it."""
    count = len(tokens) - _GRAM + 1
    if count < 1:
        return np.zeros(documents)
    digest, width = tokens.astype(np.uint64), 1
    while width < _GRAM:  # of two halves, modulo 2^64; the factors are odd and have no meaning
        digest = digest[:-width] * np.uint64(0x9E3779B97F4A7C15 + 2 * width) + digest[width:]
        width *= 2
    digest *= np.uint64(0xD6E8FEB86659FD93)
    controls = np.concatenate([[0], np.cumsum(control)])
    whole = (controls[_GRAM:] == controls[:-_GRAM]) & (owner[:count] == owner[_GRAM - 1 :])
    owner = owner[:count][whole]
    # The document in the upper 20 bits, so that one sort does for all.
    keys = np.sort((owner.astype(np.uint64) << np.uint64(44)) | (digest[whole] >> np.uint64(20)))
    again = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(44)
    seen = np.bincount(again.astype(np.int64), minlength=documents)
    share: NDArray[np.float64] = seen / np.maximum(np.bincount(owner, minlength=documents), 1)
    return share


def _rarest(
    steps: NDArray[np.uint64], source_of: NDArray[np.int64], sources: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each document the step that fewest documents of its source have, and their share."""
    rarity, rarest = np.ones(len(steps)), np.zeros(len(steps), np.int64)
    sizes = np.maximum(np.bincount(source_of, minlength=sources), 1)
    for step in range(_STATES**2):
        has = (steps >> np.uint64(step)) & np.uint64(1) != 0
        share = (np.bincount(source_of[has], minlength=sources) / sizes)[source_of]
        rarer = has & (share < rarity)
        rarity[rarer], rarest[rarer] = share[rarer], step
    return rarity, rarest


def choose(prepared: Prepared, corpus: Corpus, source: int, count: int, seed: int) -> dict[int, list[str]]:
    """Choose a source's conversations to show.

    Random ones, the longest, the shortest and the oddest. Odd is what lies farthest from the source's mean in one
    of four measures, counted in standard deviations, since these have no other common unit; each measure has its
    turn before one has a second, so that not all are odd in the same way.

    Args:
        prepared: the set.
        corpus: its counts.
        source: the source's number.
        count: conversations of each kind.
        seed: decides the random ones.

    Returns:
        Numbers of training documents, each once, with all that they are shown as.
    """
    documents = prepared.train
    members = np.flatnonzero(documents.sources == source)
    members = members[np.unique(documents.starts[members], return_index=True)[1]]  # a repeated one is there once
    chosen: dict[int, list[str]] = {}
    drawn = np.random.default_rng([seed, source]).permutation(members)[:count]
    by_length = members[np.argsort(documents.lengths[members], kind="stable")]
    kinds = {"random": drawn, "longest": by_length[::-1][:count], "shortest": by_length[:count]}
    for kind, found in kinds.items():
        for index in found.tolist():
            chosen.setdefault(index, []).append(kind)
    for index, reason in _oddest(documents, corpus, members, count):
        chosen.setdefault(index, []).append(f"oddest: {reason}")
    return chosen


def _oddest(documents: Documents, corpus: Corpus, members: NDArray[np.int64], count: int) -> Iterator[tuple[int, str]]:
    """The oddest of some documents, with the reason."""
    measures = {
        "{:.1%} of its tokens are supervised": documents.weighted_tokens[members] / documents.lengths[members],
        "{:.2f} characters a token": corpus.characters[members],
        f"{{:.1%}} of its sequences of {_GRAM} tokens repeat an earlier one": corpus.repeats[members],
        "{:.1%} of conversations have its step from STEP": corpus.rarity[members],
    }
    found: list[tuple[int, float, int, str]] = []
    for words, values in measures.items():
        if not len(values) or (spread := float(values.std())) < 1e-9:
            continue
        mean = float(values.mean())
        far = np.abs(values - mean) / spread
        for place, at in enumerate(np.argsort(-far, kind="stable")[:count].tolist()):
            index = int(members[at])
            said = words.format(values[at]).replace("STEP", _step_name(int(corpus.rarest[index])))
            usual = re.findall(r"{.*?}", words)[0].format(mean)
            found.append((place, -far[at], index, f"{said}; mean {usual}, {far[at]:.1f} standard deviations off"))
    reasons: dict[int, str] = {}
    for _, _, index, reason in sorted(found):
        reasons.setdefault(index, reason)
    yield from list(reasons.items())[:count]


def _step_name(step: int) -> str:
    before, after = divmod(step, _STATES)
    return f"{('the beginning', *_ROLES)[before]} to {('the end', *_ROLES)[after]}"


def sources_table(prepared: Prepared, corpus: Corpus) -> Table:
    """Conversations, tokens and lengths of each source and of all."""
    columns = [
        "conversations",
        "tokens",
        "supervised",
        "share",
        "median",
        "90 %",
        "longest",
        "mean turns",
        "validation",
    ]
    table = [["training", *columns]]
    train, held_out = prepared.train, prepared.validation
    for name, source in _each(prepared):
        here = slice(None) if source is None else train.sources == source
        lengths = train.lengths[here]
        total, supervised = int(lengths.sum()), int(train.weighted_tokens[here].sum())
        spread = [f"{int(np.quantile(lengths, q, method='lower')):,}" if len(lengths) else "–" for q in (0.5, 0.9, 1)]
        mean_turns = f"{corpus.turns[here].mean():.1f}" if len(lengths) else "–"
        validation = len(held_out) if source is None else int(np.count_nonzero(held_out.sources == source))
        counts = [f"{len(lengths):,}", f"{total:,}", f"{supervised:,}", _percent(supervised, total)]
        table.append([name, *counts, *spread, mean_turns, f"{validation:,}"])
    return table


def roles_table(prepared: Prepared, corpus: Corpus) -> Table:
    """Tokens of each source by role, and how many of them are supervised; roles that occur nowhere are left out."""
    both, supervised = corpus.tokens.sum(axis=2), corpus.tokens[:, :, 1]
    columns = [(name, both[:, role]) for role, name in enumerate(_ROLES) if both[:, role].any()]
    columns += [(f"{name}, supervised", supervised[:, r]) for r, name in enumerate(_ROLES) if supervised[:, r].any()]
    table = [["tokens by role", *(name for name, _ in columns)]]
    for name, source in _each(prepared):
        cells = [counts.sum() if source is None else counts[source] for _, counts in columns]
        table.append([name, *(f"{int(cell):,}" for cell in cells)])
    return table


def ledger_tables(ledger: Ledger) -> list[Table]:
    """Rows, then tokens, of each source at each gate."""
    tables, columns = [], ledger.columns()
    for unit in ("rows", "tokens"):
        counted = {name: getattr(account, unit) for name, account in ledger.accounts.items()}
        if len(counted) > 1:
            counted["all"] = {column: sum(counts[column] for counts in counted.values()) for column in columns}
        table = [[unit, *(column.replace("_", " ") for column in columns)]]
        table += [[name, *(f"{counts[column]:,}" for column in columns)] for name, counts in counted.items()]
        tables.append(table)
    return tables


def packing_facts(prepared: Prepared, schedule: Schedule) -> dict[str, str]:
    """How the first epoch's packs are filled."""
    packs, lengths = schedule.packing(0), prepared.train.lengths
    sizes = np.diff(packs.bounds)
    if not len(sizes):
        return {"packs in the first epoch": "none"}
    fills = np.add.reduceat(lengths[packs.members], packs.bounds[:-1]) / schedule.pack_tokens
    return {
        "packs in the first epoch": f"{len(sizes):,} of {schedule.pack_tokens:,} tokens",
        "filled": f"{fills.mean():.2%}, the emptiest {fills.min():.1%}",
        "conversations in a pack": f"{sizes.mean():.1f}, at most {sizes.max():,} of {schedule.pack_documents:,}",
        "packs in a step": f"{schedule.packs_per_step:,}",
        "steps in the first epoch": f"{-(-len(sizes) // schedule.packs_per_step):,}",
    }


def mix_table(prepared: Prepared, schedule: Schedule) -> Table:
    """What the first epoch takes of each source: some are seen more than once, or in part."""
    members = schedule.packing(0).members
    table = [["first epoch", "conversations", "tokens", "share", "supervised", "share"]]
    columns = (np.ones(len(prepared.train)), prepared.train.lengths, prepared.train.weighted_tokens)
    visits, tokens, supervised = (
        np.bincount(prepared.train.sources[members], c[members], len(prepared.sources)).astype(int) for c in columns
    )
    for name, source in _each(prepared):
        here = slice(None) if source is None else slice(source, source + 1)
        cells = []
        for counts in (tokens, supervised):
            part, whole = int(counts[here].sum()), int(counts.sum())
            cells += [f"{part:,}", _percent(part, whole)]
        table.append([name, f"{int(visits[here].sum()):,}", *cells])
    return table


def summary(prepared: Prepared, corpus: Corpus, schedule: Schedule) -> str:
    """The page in short, for a terminal.

    Args:
        prepared: the set.
        corpus: its counts.
        schedule: the packs of its first epoch.

    Returns:
        Lines of text without a newline at the end.
    """
    blocks = [_aligned(sources_table(prepared, corpus)), _aligned(roles_table(prepared, corpus))]
    for values, unit in ((prepared.train.lengths, "tokens"), (corpus.turns, "turns")):
        edges = _edges(values)
        table = [[f"{unit} a conversation", f"{values.min():,} to {values.max():,}"]]
        for name, source in _each(prepared):
            counts = np.histogram(values if source is None else values[prepared.train.sources == source], edges)[0]
            table.append([name, "".join(" ▁▂▃▄▅▆▇█"[-(-8 * c // max(counts.max(), 1))] for c in counts.tolist())])
        blocks.append(_aligned(table, left=2))
    blocks.append(_aligned(mix_table(prepared, schedule)))
    blocks.append("\n".join(f"{name}: {value}" for name, value in packing_facts(prepared, schedule).items()))
    return "\n\n".join([*blocks, prepared.ledger.render()])


def page(
    prepared: Prepared, corpus: Corpus, schedule: Schedule, *, samples: int = 2, tokens: int = 2000, seed: int = 1
) -> str:
    """The page.

    Args:
        prepared: the set.
        corpus: its counts.
        schedule: the packs of its first epoch.
        samples: conversations of each kind that are shown of a source.
        tokens: most tokens that are shown of one conversation.
        seed: decides which conversations and which rejects are drawn at random.

    Returns:
        A whole HTML document; the same arguments give the same one.
    """
    train, names, remarks = prepared.train, ", ".join(prepared.sources), prepared.ledger.remarks()
    title = names if len(prepared.sources) <= 6 else f"{len(prepared.sources)} sources"
    facts = {
        "conversations": f"{len(train):,}",
        "tokens": f"{int(train.lengths.sum()):,}",
        "supervised": _percent(int(train.weighted_tokens.sum()), int(train.lengths.sum())),
        "for validation": f"{len(prepared.validation):,}",
        "vocabulary": f"{prepared.tokenizer.vocab_size:,}",
        "prepared set": prepared.key,
    }
    sections = {
        "Sources": _as_html(sources_table(prepared, corpus), "Conversations that train; lengths in tokens"),
        "Lengths": _histograms(prepared, train.lengths, "tokens"),
        "Turns": _histograms(prepared, corpus.turns, "turns"),
        "Roles": _role_bars(prepared, corpus)
        + _as_html(roles_table(prepared, corpus), "Headers and closing tokens count to their message"),
        "Packs": _facts(packing_facts(prepared, schedule)) + _as_html(mix_table(prepared, schedule)),
        "Ledger": "<p>Where every row ended. The numbers to the right of <em>read</em> add up to it.</p>"
        + "".join(map(_as_html, ledger_tables(prepared.ledger)))
        + (f"<ul>{''.join(f'<li>{_shown(r)}</li>' for r in remarks)}</ul>\n" if remarks else ""),
        "Rejects": _rejects(prepared, seed),
        "Samples": _samples(prepared, corpus, samples, tokens, seed),
    }
    body = "".join(
        f'<section id="{name.lower()}"><h2>{name}</h2>{content}</section>\n' for name, content in sections.items()
    )
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections)
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Data: {html.escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>Data: {_shown(title)}</h1>{_facts(facts)}</header>
<nav aria-label="Contents">{links}</nav>
<main>
{body}</main>
</body>
</html>
"""


def _each(prepared: Prepared) -> list[tuple[str, int | None]]:
    """Names and numbers of the sources, then all of them where there are several."""
    each: list[tuple[str, int | None]] = [(name, number) for number, name in enumerate(prepared.sources)]
    return [*each, ("all", None)] if len(each) > 1 else each


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _aligned(table: Table, left: int = 1) -> str:
    """A table as text: the first columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sides = ["<"] * left + [">"] * (len(widths) - left)
    lines = [[f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)] for row in table]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _as_html(table: Table, caption: str = "") -> str:
    head, *rows = table
    body = ""
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{_shown(cell)}</td>" for cell in row[1:])
        total = ' class="total"' if row[0] == "all" and number == len(rows) - 1 > 0 else ""
        body += f'<tr{total}><th scope="row">{_shown(row[0])}</th>{cells}</tr>\n'
    names = "".join(f'<th scope="col">{_shown(name)}</th>' for name in head)
    return (
        f'<div class="wide"><table>{caption and f"<caption>{caption}</caption>"}'
        f"<thead><tr>{names}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def _facts(facts: dict[str, str]) -> str:
    pairs = "".join(f"<div><dt>{_shown(name)}</dt><dd>{_shown(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{pairs}</dl>\n'


def _edges(values: NDArray[np.int64]) -> list[int]:
    """Bounds of bins for whole numbers from 1: of width one where that is few, else two to each doubling."""
    low, high = (int(values.min()), int(values.max())) if len(values) else (1, 1)
    if high - low < _BINS:
        return list(range(low, high + 2))
    edges = sorted({round(2 ** (k / 2)) for k in range(2 * high.bit_length() + 1)})
    first = max(n for n, edge in enumerate(edges) if edge <= low)
    last = next(n for n, edge in enumerate(edges) if edge > high)
    return edges[first : last + 1]


def _histograms(prepared: Prepared, values: NDArray[np.int64], unit: str) -> str:
    """A histogram for all conversations and one for each source, over the same bins."""
    edges = _edges(values)
    charts = ""
    for name, source in sorted(_each(prepared), key=lambda pair: pair[1] is not None):  # all come first
        here = values if source is None else values[prepared.train.sources == source]
        charts += f"<figure><figcaption>{_shown(name)}</figcaption>{_histogram(here, edges, name, unit)}</figure>\n"
    scale = "two bins to each doubling" if edges[-1] - edges[0] > len(edges) - 1 else "one bin for each number"
    note = f"{unit.capitalize()} a conversation, in training; {scale}; point at a bar for its count."
    if unit == "turns":
        note += " A turn is one message, the system's too."
    return f'<p>{note}</p><div class="charts">{charts}</div>\n'


def _histogram(values: NDArray[np.int64], edges: list[int], name: str, unit: str) -> str:
    """One histogram as SVG."""
    counts = np.histogram(values, edges)[0].tolist()
    width, height, left, right, top, bottom = 480, 170, 46, 8, 8, 22
    step, room = (width - left - right) / len(counts), height - top - bottom
    most = max(*counts, 1)
    single = edges[-1] - edges[0] == len(counts)
    unit_height = 10 ** int(np.floor(np.log10(most)))
    tick = next(t for t in (unit_height * f for f in (0.2, 0.5, 1, 2, 5)) if most / t <= 4)
    tick = max(1, round(tick))
    parts = []
    for value in range(0, most + 1, tick):
        y = top + room * (1 - value / most)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width - right}"/>')
        parts.append(f'<text class="y" x="{left - 6}" y="{y + 3.5:.1f}">{value:,}</text>')
    shown_every = -(-len(counts) * 34 // (width - left - right))
    for number, count in enumerate(counts):
        x, low, high = left + number * step, edges[number], edges[number + 1] - 1
        tall = room * count / most
        what = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        if count:
            parts.append(
                f'<rect class="bar" x="{x + 0.5:.1f}" y="{top + room - tall:.1f}" width="{step - 1:.1f}" '
                f'height="{tall:.1f}"><title>{what} {unit}: {count:,}</title></rect>'
            )
        named = number % shown_every == 0 if single else low & (low - 1) == 0
        if named:
            at = x + step / 2 if single else x
            parts.append(f'<text class="x" x="{at:.1f}" y="{height - 6}">{low:,}</text>')
    if len(values):
        middle, longest = int(np.quantile(values, 0.5, method="lower")), int(values.max())
        label = f"{name}: {len(values):,} conversations, median {middle:,} {unit}, longest {longest:,}"
    else:
        label = f"{name}: no conversations"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'
        f"<p>{_shown(label.removeprefix(f'{name}: '))}</p>"
    )


def _role_bars(prepared: Prepared, corpus: Corpus) -> str:
    """For each source a bar of its tokens by role; what is not supervised is pale."""
    bars = ""
    for name, source in _each(prepared):
        counts = corpus.tokens.sum(axis=0) if source is None else corpus.tokens[source]
        total, done, parts = int(counts.sum()), 0, []
        for role, supervised in np.argwhere(counts).tolist():
            count = int(counts[role, supervised])
            said = f"{_ROLES[role]}, {'' if supervised else 'not '}supervised: {count:,} tokens, {count / total:.1%}"
            parts.append(
                f'<rect class="{_ROLES[role]}{"" if supervised else " pale"}" x="{100 * done / total:.3f}%" y="0" '
                f'width="{100 * count / total:.3f}%" height="18"><title>{said}</title></rect>'
            )
            done += count
        label = html.escape(f"{name}: tokens by role, as in the table below")
        bars += f'<div><span>{_shown(name)}</span><svg role="img" aria-label="{label}">{"".join(parts)}</svg></div>\n'
    present = [name for role, name in enumerate(_ROLES) if corpus.tokens[:, role].any()]
    key = "".join(f'<span><svg><rect class="{n}" width="12" height="12"/></svg>{n}</span>' for n in present)
    return f'<div class="bars">{bars}</div><p class="key">{key}<span>pale: not supervised</span></p>\n'


def _rejects(prepared: Prepared, seed: int) -> str:
    """Why rows were lost, with some of them; reasons that differ in numbers alone are one."""
    if not prepared.rejects.is_file():
        return f"<p>{_shown(str(prepared.rejects))} is not there.</p>"
    reasons, kept = _read_rejects(prepared.rejects, seed)
    if not reasons:
        return "<p>No row was lost or cut.</p>"
    rows = ""
    for source, own in sorted(reasons.items()):
        most = sorted(own.items(), key=lambda item: (-item[1], item[0]))
        rows += "".join(_reject_row(source, *place, count) for place, count in most[:_REASONS])
        if rest := sum(count for _, count in most[_REASONS:]):
            rows += _reject_row(source, "", "other reasons", rest)
    examples = ""
    for (source, gate), some in sorted(kept.items()):
        examples += f'<h3>{_shown(source)}: {_shown(gate.replace("_", " "))}</h3><ul class="rejects">'
        for row in sorted(some, key=lambda row: int(row["row"])):
            where, begins = f"{row['file']}, row {row['row']}", str(row.get("begins", ""))
            more = "…" if len(begins) > _BEGINNING else ""
            text = f"<p>{_shown(begins[:_BEGINNING])}{more}</p>" if begins else ""
            examples += f"<li><b>{_shown(where)}</b> {_shown(row['reason'])}{text}</li>\n"
        examples += "</ul>\n"
    return (
        f"<p>All of them: <code>{_shown(str(prepared.rejects))}</code>. # stands for any number.</p>"
        '<div class="wide"><table class="reasons"><caption>Rows that were lost or cut, by reason</caption><thead><tr>'
        '<th scope="col">source</th><th scope="col">gate</th><th scope="col">reason</th><th scope="col">rows</th>'
        f"</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n{examples}"
    )


def _read_rejects(
    file: Path, seed: int
) -> tuple[dict[str, Counter[tuple[str, str]]], dict[tuple[str, str], list[dict[str, Any]]]]:
    """By source how often each gate and reason is there, and by source and gate a few lines, each equally likely."""
    reasons: dict[str, Counter[tuple[str, str]]] = {}
    kept: dict[tuple[str, str], list[dict[str, Any]]] = {}
    lost: Counter[tuple[str, str]] = Counter()
    draw = random.Random(seed)
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            source, gate = row["source"], row["gate"]
            reason = re.sub(r"\b(?!0\b)\d+(?:[.,]\d+)*\b", "#", row["reason"])  # 0 means what it says
            reasons.setdefault(source, Counter())[gate, reason] += 1
            lost[source, gate] += 1
            some = kept.setdefault((source, gate), [])
            if len(some) < _EXAMPLES:
                some.append(row)
            elif (at := draw.randrange(lost[source, gate])) < _EXAMPLES:
                some[at] = row
    return reasons, kept


def _reject_row(source: str, gate: str, reason: str, count: int) -> str:
    cells = [_shown(gate.replace("_", " ")), _shown(reason), f"{count:,}"]
    return f'<tr><th scope="row">{_shown(source)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'


def _samples(prepared: Prepared, corpus: Corpus, count: int, limit: int, seed: int) -> str:
    """The chosen conversations of each source."""
    texts = prepared.tokenizer.token_bytes()
    out = (
        '<p>Tokens that are <span class="tokens" style="--a:.35"><i>coloured</i></span> are supervised, the stronger '
        "the larger their weight. Point at a token for its id and its weight. A "
        '<span class="tokens"><b>badge</b></span> is a control token; the same characters without one are text that '
        "somebody typed. ¶ is a line break, <u>U+200B</u> a character without a shape, <u>F0</u> a byte that belongs "
        "to no character. Tokens that make one character together are underlined with dots and shown as one.</p>"
        "<p><em>Oddest</em> is what lies farthest from its source’s mean, counted in standard deviations, in one of "
        f"four measures: the share of supervised tokens, characters a token, the share of sequences of {_GRAM} tokens "
        "that repeat an earlier one, and how common its rarest step from one role to the next is. Each measure gives "
        "one conversation before any gives a second.</p>"
        '<label><input type="checkbox" id="borders"> Show where tokens begin</label>\n'
    )
    for source, name in enumerate(prepared.sources):
        out += f"<h3>{_shown(name)}</h3>\n"
        chosen = choose(prepared, corpus, source, count, seed)
        if not chosen:
            out += "<p>No conversation to show.</p>\n"
        for index, labels in chosen.items():
            opened = " open" if "random" in labels else ""
            kinds = "".join(f"<b>{label.partition(':')[0]}</b>" for label in labels)
            why = "".join(f"<br>{_shown(label.partition(': ')[2])}" for label in labels if ":" in label)
            turns_shown = _conversation(prepared.train, index, prepared.tokenizer, texts, limit)
            out += (
                f"<details{opened}><summary><div>{_about(prepared.train, corpus, index)}{why}</div>{kinds}</summary>\n"
            )
            out += f"{turns_shown}</details>\n"
    return out


def _about(documents: Documents, corpus: Corpus, index: int) -> str:
    length, supervised = int(documents.lengths[index]), int(documents.weighted_tokens[index])
    scale = float(documents.scales[index])
    return (
        f"row {documents.rows[index]:,}: {length:,} tokens in {corpus.turns[index]:,} turns, "
        f"{_percent(supervised, length)} supervised" + (f", weight {scale:g}" if scale != 1 else "")
    )


def _conversation(documents: Documents, index: int, tokenizer: Tokenizer, texts: Sequence[bytes], limit: int) -> str:
    """One conversation turn by turn, its middle left out where it is longer than `limit` tokens."""
    example = documents.example(index)
    tokens, weights = np.asarray(example.tokens), np.asarray(example.weights)
    count, names = len(tokens), {id_: name for name, id_ in tokenizer.controls.items()}
    gap = range(limit - limit // 2, count - limit // 2) if count > limit else range(count, count)
    out = ""
    for turn in turns(tokens, tokenizer):
        shown = ""
        for stretch in (slice(turn.start, min(turn.end, gap.start)), slice(max(turn.start, gap.stop), turn.end)):
            runs = np.flatnonzero(np.diff(weights[stretch])) + 1
            for ids, run in zip(np.split(tokens[stretch], runs), np.split(weights[stretch], runs), strict=True):
                shown += _run(ids.tolist(), float(run[0]), names, texts) if len(ids) else ""
            if stretch.stop == gap.start and turn.start <= gap.start < turn.end:
                shown += f'<em class="cut">{len(gap):,} tokens are not shown</em>'
        if shown:
            out += f'<div class="turn {turn.role}"><span>{turn.role}</span>'
            out += f'<p class="tokens">{shown}</p></div>\n'
    return out


def _run(ids: Sequence[int], weight: float, names: Mapping[int, str], texts: Sequence[bytes]) -> str:
    """Tokens of one weight; those that hold parts of one character are shown as one."""
    out: list[str] = []
    group: list[int] = []
    held = b""

    def flush() -> None:
        nonlocal held
        if group:
            out.append(f"<i data-i={'+'.join(map(str, group))}>{_shown(held.decode(errors='surrogateescape'))}</i>")
        group.clear()
        held = b""

    for id_ in ids:
        if id_ in names:
            flush()
            out.append(f"<b data-i={id_}>{_shown(names[id_])}</b>")
            continue
        group.append(id_)
        held += texts[id_]
        if not _unfinished(held):
            flush()
    flush()
    # Saturates, so that every weight above 0 is seen and none is too dark to read.
    style = f" style=\"--w:'{weight:g}';--a:{0.7 * weight / (1 + weight):.2g}\"" if weight else ""
    return f"<span{style}>{''.join(out)}</span>"


def _unfinished(text: bytes) -> bool:
    """Whether the text ends inside a character."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def _shown(text: str) -> str:
    """Text as HTML in which each character is seen, and none has a power of its own."""
    if text.isprintable():
        return html.escape(text, quote=False)
    return "".join(html.escape(c, quote=False) if c.isprintable() else _sign(c) for c in text)


def _sign(character: str) -> str:
    if character == "\n":
        return "<u></u>\n"  # the style sheet puts ¶ there, so that copied text stays as it was
    if character == "\t":
        return "<u>⇥</u>\t"
    code = ord(character)
    return f"<u>{code - 0xDC00:02X}</u>" if 0xDC80 <= code <= 0xDCFF else f"<u>U+{code:04X}</u>"


def main(settings: TrainConfig) -> None:
    """Prepare the data, print the summary and write the page.

    Raises:
        ConfigError: If the page cannot be written, or the data is too large to be prepared.
    """
    if settings.data.streaming:
        remedy = "For a part of each source: data.streaming=false and data.sources.NAME.rows=10000."
        raise ConfigError("data.streaming", "true", "false, since a report counts what is prepared", remedy)
    out = Path(settings.report.out).expanduser()
    prepared = prepare_data(settings, Terminal(is_main=True))
    corpus = measure(prepared)
    plan = batches.schedule(settings, prepared)
    shown = {"samples": settings.report.samples, "tokens": settings.report.tokens, "seed": settings.seed}
    text = page(prepared, corpus, plan, **shown)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("report.out", f"{out}: {error.strerror}", "a file that can be written") from error
    print(summary(prepared, corpus, plan))
    print(f"\nthe page: {out}")


if __name__ == "__main__":
    verb(main, TrainConfig, "config")
