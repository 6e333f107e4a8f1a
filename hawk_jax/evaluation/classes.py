"""Scores that only the synthetic world allows: what a generated description says, against what the renderer knows.

A description names a class if it holds that class's phrase and no other's (data.synthetic.class_named).  Everything is a share 0..1
together with the number of clips behind it.
"""
import re
from collections import Counter
from collections.abc import Sequence

from data.synthetic import APPEARANCE_PAIRS, CLASSES, MOTION_PAIRS, class_named
from data.world_text import COLOURS, PLACES

NONE = "none"           # column of texts that name no class or several
PAIRS = [(pair, "motion") for pair in MOTION_PAIRS] + [(pair, "appearance") for pair in APPEARANCE_PAIRS]


def colours_named(text: str) -> list[str]:
    """Colour words of the world's actors, in order of appearance."""
    return re.findall(rf"\b({'|'.join(COLOURS)})\b", text.lower())


def places_named(text: str) -> set[str]:
    """Places of which the text holds a phrase."""
    return {place for place, phrases in PLACES.items() if any(p in text.lower() for p in phrases)}


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _pair(first: str, second: str, kind: str, true: list[str], named: list[str]) -> dict:
    """Clips of two classes: named right, and taken for the other one of the pair."""
    inside = [(t, n) for t, n in zip(true, named) if t in (first, second)]
    other = {first: second, second: first}
    return {"pair": [first, second], "only": kind, "clips": len(inside), "right": _share([t == n for t, n in inside]),
            "swapped": _share([n == other[t] for t, n in inside])}


def class_scores(texts: Sequence[str], labels: Sequence[dict], references: Sequence[str]) -> dict:
    """texts: one generated description per clip; labels: rows of labels.jsonl; references: the clips' own descriptions.

    right: share of clips whose class is named; macro_recall: mean over classes of that share; per_class; pairs: the same over the clips
    of two classes that only motion or only appearance tells apart; confusion: counts, rows true, columns named, last column none or
    several; colour: share with exactly the reference's colour words in its order, over clips whose reference has some; place: share
    that names the right place and no other.
    """
    true, named = [row["class"] for row in labels], [class_named(text) or NONE for text in texts]
    classes = [name for name in CLASSES if name in set(true)]
    columns = [*classes, *sorted(set(named) - set(classes) - {NONE}), NONE]
    counts = Counter(zip(true, named))
    per_class = {name: {"recall": counts[name, name] / true.count(name), "clips": true.count(name)} for name in classes}
    coloured = [(colours_named(text), wanted) for text, reference in zip(texts, references) if (wanted := colours_named(reference))]
    return {
        "clips": len(true), "chance": 1 / len(classes),
        "right": _share([t == n for t, n in zip(true, named)]),
        "macro_recall": sum(c["recall"] for c in per_class.values()) / len(classes),
        "unnamed": named.count(NONE) / len(named),
        "colour": _share([said == wanted for said, wanted in coloured]), "coloured_clips": len(coloured),
        "place": _share([places_named(text) == {row["place"]} for text, row in zip(texts, labels)]),
        "per_class": per_class,
        "pairs": [_pair(*pair, kind, true, named) for pair, kind in PAIRS if set(pair) <= set(classes)],
        "confusion": {"classes": classes, "columns": columns, "counts": [[counts[c, n] for n in columns] for c in classes]},
    }
