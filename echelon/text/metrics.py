"""How good replies and choices of strategies are beside those of a person: numbers between words, and between labels.

Everything is a fraction, not a percentage. Knows no model and no file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from echelon.errors import need

LIBRARIES = ("sacrebleu", "rouge_score.rouge_scorer")
"""What `text_scores` needs: the extra `text`."""

ROUNDS = 20
"""Of `preferences`: as many as in the paper that the measure is from."""


@dataclass(frozen=True, slots=True)
class StrategyScores:
    """How well strategies were chosen, beside those a person chose."""

    accuracy: float
    macro_f1: float
    """F1 of each strategy that occurs, on either side, averaged: rare ones count as much as frequent ones."""
    bias: float
    """How far apart the `preferences` are: 0 without any, at most √(K − 1). Less is better."""
    confusion: list[list[int]]
    """Row: what a person chose; column: what was chosen here."""
    preference: list[float]


def strategy_scores(chosen: Sequence[int], wanted: Sequence[int], *, strategies: int) -> StrategyScores:
    """Scores of choices among K strategies. At least one choice."""
    assert wanted, "nothing was chosen"
    table = confusion(chosen, wanted, strategies=strategies)
    right = sum(table[place][place] for place in range(strategies))
    preference = preferences(table)
    return StrategyScores(
        accuracy=right / len(wanted),
        macro_f1=macro_f1(table),
        bias=math.sqrt(sum((p - 1) ** 2 for p in preference) / strategies),  # their mean is 1
        confusion=table,
        preference=preference,
    )


def confusion(chosen: Sequence[int], wanted: Sequence[int], *, strategies: int) -> list[list[int]]:
    """How often strategy j was chosen where i was wanted: row i, column j."""
    table = [[0] * strategies for _ in range(strategies)]
    for here, there in zip(chosen, wanted, strict=True):
        table[there][here] += 1
    return table


def macro_f1(table: Sequence[Sequence[int]]) -> float:
    """The mean F1 of the strategies that were wanted or chosen at all, from a table of confusion."""
    found = []
    for place, row in enumerate(table):
        both = sum(row) + sum(other[place] for other in table)
        if both:
            found.append(2 * row[place] / both)
    return sum(found) / len(found)


def preferences(table: Sequence[Sequence[int]]) -> list[float]:
    """How much each strategy is preferred, whatever is wanted: 1 each without a preference; they sum to K.

    A strategy wins against another where it is chosen in its place. What that says of their strengths is the model of
    Bradley and Terry, p_i / (p_i + p_j), solved by Newman's iteration as in Kang et al. (ACL 2024, arXiv 2402.13211).
    Strategies that win and never lose share everything, which is the limit of the iteration; one that is never mistaken
    for another, nor another for it, has no say in it.
    """
    count = len(table)
    strength = [1.0] * count
    for _ in range(ROUNDS):
        for i in range(count):
            won = lost = 0.0
            for j in range(count):
                both = strength[i] + strength[j]
                if i != j and both > 0 and not math.isinf(both):
                    won += table[j][i] * strength[j] / both
                    lost += table[i][j] / both
            if won or lost:
                strength[i] = won / lost if lost else math.inf
        scale = _geometric_mean(strength)
        strength = [one / scale for one in strength]
    endless = sum(map(math.isinf, strength))
    if endless:
        return [count / endless if math.isinf(one) else 0.0 for one in strength]
    return [count * one / sum(strength) for one in strength]


def _geometric_mean(values: Sequence[float]) -> float:
    logs = [math.log(one) for one in values if one > 0 and not math.isinf(one)]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def bleu_2(replies: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a whole corpus with words and pairs of words, one reference each, without smoothing (sacrebleu, 13a)."""
    corpus = need("sacrebleu", "text").BLEU(max_ngram_order=2, smooth_method="none")
    return float(corpus.corpus_score(list(replies), [list(references)]).score) / 100


def rouge_l(replies: Sequence[str], references: Sequence[str]) -> float:
    """The mean over replies of the F1 of the longest common subsequence of words (rouge-score, no stemming)."""
    scorer = need("rouge_score.rouge_scorer", "text").RougeScorer(["rougeL"])
    pairs = zip(replies, references, strict=True)
    found = [float(scorer.score(wanted, said)["rougeL"].fmeasure) for said, wanted in pairs]
    return sum(found) / len(found)


def distinct_2(replies: Sequence[str]) -> float:
    """Different pairs of neighbouring words over all such pairs of all replies (Li et al. 2016); 0 without any pair.

    Words are runs of letters, digits and apostrophes in lower case; marks are words of their own.
    """
    pairs: list[tuple[str, str]] = []
    for reply in replies:
        words = re.findall(r"[\w']+|[^\w\s]", reply.lower())
        pairs += pairwise(words)
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def text_scores(replies: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU-2, ROUGE-L and Distinct-2 of replies beside those a person gave, by the names they are logged under.

    Raises MissingExtra, with the line that installs them, where a library is missing.
    """
    assert replies, "nothing was said"
    return {
        "text/bleu2": bleu_2(replies, references),
        "text/rouge_l": rouge_l(replies, references),
        "text/distinct2": distinct_2(replies),
    }
