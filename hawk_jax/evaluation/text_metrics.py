"""Scores of texts against references, and the two controls that every table shows beside them.

BLEU is sacrebleu's corpus BLEU: its `13a` tokeniser (punctuation split off, case kept), exponential smoothing of orders without a
match (`exp`), brevity penalty against the closest reference length.  Figures are 0..100.
"""
import random
from collections import defaultdict
from collections.abc import Sequence

import sacrebleu
from sacrebleu.metrics import BLEU

BLEU_RECIPE = f"sacrebleu {sacrebleu.__version__}, corpus BLEU, tokeniser 13a, case kept, smoothing exp, scale 0..100"
ORDERS = (1, 2, 3, 4)


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Per clip any number of references -> sacrebleu's streams: one list per reference number, None where a clip has fewer."""
    most = max(map(len, references))
    return [[r[n] if n < len(r) else None for r in references] for n in range(most)]


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-1..4 of one text per clip against that clip's references (at least one each); keys `bleu_1` ... `bleu_4`."""
    if len(texts) != len(references) or not texts or not all(references):
        raise ValueError(f"bleu: {len(texts)} texts, {len(references)} reference lists; every text needs at least one reference")
    streams = _streams(references)
    return {f"bleu_{n}": BLEU(max_ngram_order=n, force=True).corpus_score(list(texts), streams).score for n in ORDERS}


def exact(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of texts that equal one of their references, white space and case apart."""
    def plain(text: str) -> str:
        return " ".join(text.lower().split())
    return sum(plain(t) in set(map(plain, r)) for t, r in zip(texts, references, strict=True)) / len(texts)


def derangement(groups: Sequence, seed: int = 0) -> list[int]:
    """A fixed permutation that moves every item, inside its group where the group has two or more; the others among themselves.

    Outputs paired with the references at `permutation[i]` are what generating from another sample's clip would score, as long as
    both samples have the same prompt: hence the groups (the question).  A lone item takes any other one's place.
    """
    members, order = defaultdict(list), list(range(len(groups)))
    for i, group in enumerate(groups):
        members[group].append(i)
    lone = [i for g in members.values() if len(g) == 1 for i in g]
    draw = random.Random(seed)
    for group in [g for g in members.values() if len(g) > 1] + [lone]:
        cycle = draw.sample(group, len(group))        # one cycle through the group: nobody keeps their place
        for here, there in zip(cycle, cycle[1:] + cycle[:1]):
            order[here] = there
    if len(lone) == 1 and len(groups) > 1:            # it alone would stay: swap it with a neighbour
        i, other = lone[0], (lone[0] + 1) % len(groups)
        order[i], order[other] = order[other], i
    return order


def best_constant(candidates: Sequence[str], references: Sequence[Sequence[str]], most: int = 400, seed: int = 0) -> str:
    """The one candidate that scores the highest BLEU-4 when given for every clip.

    `candidates` are training texts and `references` those of the validation split: the test split is never looked at.  More than
    `most` different candidates or reference lists are sampled, since every pair is scored.
    """
    draw = random.Random(seed)
    pool, lists = sorted({c for c in candidates if c.strip()}), [r for r in references if r]
    pool = draw.sample(pool, most) if len(pool) > most else pool
    lists = draw.sample(lists, most) if len(lists) > most else lists
    if not pool or not lists:
        raise ValueError("best_constant: no candidate text or no reference")
    metric = BLEU(references=_streams(lists), force=True)   # reference n-grams are counted once
    return max(pool, key=lambda text: metric.corpus_score([text] * len(lists), None).score)
