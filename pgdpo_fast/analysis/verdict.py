"""What the figures of a run allow one to say, as pure functions of the figures.

A mean is above or below zero when it is further from it than two standard errors over pairs, and it is unknown when
fewer than `FEWEST_PAIRS` pairs went into it: what is unknown is never counted as "not displaced".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["BADGES", "FEWEST_PAIRS", "KINDS", "Verdict", "headline", "join_words", "judge", "sign"]

FEWEST_PAIRS = 4  # of three pairs without any effect, one mean in five is further than two standard errors from zero

# kind -> (badge, tone); the tone is "good", "bad" or "neutral"
BADGES = {
    "displaced": ("displaced", "bad"),
    "improved": ("no displacement", "good"),
    "held": ("chosen reward near zero", "neutral"),
    "reversed": ("margin below zero", "bad"),
    "unlearnt": ("not learnt", "bad"),
    "unknown": ("unknown", "neutral"),
    "unmeasured": ("no rewards", "neutral"),
}
KINDS = tuple(BADGES)


@dataclass(frozen=True)
class Verdict:
    """What a run came to.

    Attributes:
        kind: "displaced": the margin is above zero, the chosen reward below. "improved": both above. "held": the
            margin above, the chosen reward not told from zero. "reversed": the margin below zero. "unlearnt": the
            margin not told from zero. "unknown": too few pairs, or a figure that is not finite. "unmeasured": trained
            without a reference, so without rewards.
        chosen: the sign of the chosen reward: "above", "below", "zero" or "unknown".
        badge: at most four words; `reason` follows them where the kind is unknown.
        tone: "good", "bad" or "neutral".
    """

    kind: str
    chosen: str
    badge: str
    tone: str
    reason: str = ""

    @classmethod
    def of(cls, kind: str, chosen: str = "unknown") -> Verdict:
        return cls(kind, chosen, *BADGES[kind])

    @classmethod
    def unknown(cls, reason: str, chosen: str = "unknown") -> Verdict:
        badge, tone = BADGES["unknown"]
        return cls("unknown", chosen, f"{badge}: {reason}", tone, reason)


def sign(value: float, error: float) -> str:
    """ "above", "below" or "zero" by two standard errors; "unknown" where either number is not finite."""
    if not (math.isfinite(value) and math.isfinite(error)):
        return "unknown"
    return "above" if value > 2 * error else "below" if value < -2 * error else "zero"


def judge(
    chosen: float,
    chosen_error: float,
    margin: float,
    margin_error: float,
    *,
    pairs: int,
    held_out: bool = True,
    measured: bool = True,
) -> Verdict:
    """The verdict on mean chosen reward and margin with their standard errors over `pairs` pairs.

    Args:
        held_out: whether the pairs were held out, for the words only.
        measured: False for a run without a reference, which has no rewards at any step.
    """
    if not measured:
        return Verdict.of("unmeasured")
    if pairs < FEWEST_PAIRS:
        return Verdict.unknown(f"too few {'held-out ' if held_out else ''}pairs")
    of_chosen, of_margin = sign(chosen, chosen_error), sign(margin, margin_error)
    if "unknown" in (of_chosen, of_margin):
        return Verdict.unknown("rewards are not finite", of_chosen)
    won = {"below": "displaced", "zero": "held", "above": "improved"}[of_chosen]
    return Verdict.of({"below": "reversed", "zero": "unlearnt", "above": won}[of_margin], of_chosen)


def headline(verdicts: Mapping[str, Verdict], *, baseline: str | None = None, identical: Sequence[str] = ()) -> str:
    """The comparison in a few sentences, one for each kind of outcome, from the verdicts by label alone.

    Args:
        baseline: label of the DPO run, if there is one.
        identical: labels of runs whose reward curves are the same numbers.
    """
    of = {kind: [label for label, verdict in verdicts.items() if verdict.kind == kind] for kind in KINDS}
    sentences = []
    if identical:
        sentences.append(f"{join_words(identical)} have identical reward curves.")
    if of["displaced"]:
        names, many = join_words(of["displaced"]), len(of["displaced"]) > 1
        if kept := [label for label in verdicts if label in of["improved"] + of["held"]]:
            sentences.append(f"{names} paid for {'their' if many else 'its'} margin with the chosen clips.")
            sentences.append(f"{join_words(kept)} did not.")
        else:
            sentences.append(f"{names} won the margin and lost the chosen clips: displacement.")
    else:
        if of["improved"]:
            names = join_words(of["improved"])
            alone = len(of["improved"]) == len(verdicts) > 1
            sentences.append(
                f"No displacement here: {names} kept the chosen reward above zero."
                if alone and baseline in of["improved"]
                else f"{names} learnt the preference without losing the chosen clips."
            )
        if of["held"]:
            sentences.append(
                f"{join_words(of['held'])} learnt the preference; the chosen reward is not to be told from zero."
            )
    if of["reversed"]:
        sentences.append(f"{join_words(of['reversed'])} learnt the opposite: the margin is below zero.")
    if of["unlearnt"]:
        sentences.append(f"{join_words(of['unlearnt'])} did not learn the preference.")
    for reason in dict.fromkeys(verdicts[label].reason for label in of["unknown"]):
        names = [label for label in of["unknown"] if verdicts[label].reason == reason]
        sentences.append(f"What {join_words(names)} came to is unknown: {reason}.")
    if of["unmeasured"]:
        sentences.append(f"{join_words(of['unmeasured'])} ran without a reference, so there are no rewards to show.")
    return " ".join(sentences)


def join_words(words: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
