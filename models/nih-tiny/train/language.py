"""The report language of nih-tiny: its sentences, a writer that composes them and a parser that reads them back.

Every sentence is one of a closed list with a fixed meaning, so a text either parses completely or is refused. Knows no
image, model or tokenizer; the wording is this project's own.

A summary reads `Findings: … Impression: …`. The findings open with the statement normal or abnormal; an abnormal
summary names every finding that is present, once in each section and in the same order, and the negatives that matter.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
ABNORMAL = "Abnormal"
UNSPECIFIC = "Unspecific"
"""Claimed by a summary that calls the radiograph abnormal and names no finding."""

# finding → words, article, and the sentence that the writer prefers where the finding is present. Those of a mass, a
# nodule and an infiltrate begin unlike each other: once begun, a sentence is to leave nothing to decide.
WORDS = {
    "Atelectasis": ("atelectasis", "", "There is atelectasis."),
    "Cardiomegaly": ("cardiomegaly", "", "The heart is enlarged."),
    "Consolidation": ("consolidation", "", "Consolidation is seen."),
    "Edema": ("pulmonary edema", "", "There is pulmonary edema."),
    "Effusion": ("pleural effusion", "a ", "There is a pleural effusion."),
    "Emphysema": ("emphysema", "", "Emphysema is present."),
    "Fibrosis": ("pulmonary fibrosis", "", "Pulmonary fibrosis is seen."),
    "Hernia": ("hiatal hernia", "a ", "A hiatal hernia is seen."),
    "Infiltration": ("lung infiltrate", "a ", "A lung infiltrate is present."),
    "Mass": ("lung mass", "a ", "There is a lung mass."),
    "Nodule": ("lung nodule", "a ", "The lungs show a nodule."),
    "Pleural_Thickening": ("pleural thickening", "", "Pleural thickening is present."),
    "Pneumonia": ("pneumonia", "", "Pneumonia is present."),
    "Pneumothorax": ("pneumothorax", "a ", "A pneumothorax is present."),
}
HEART = ("Cardiomegaly",)
PLEURA = ("Effusion", "Pleural_Thickening", "Pneumothorax")
LUNGS = tuple(f for f in FINDINGS if f not in (*HEART, *PLEURA, "Hernia"))
INFECTION = ("Consolidation", "Infiltration", "Pneumonia")
ORDER = (*HEART, *LUNGS, *PLEURA, "Hernia")
"""The order in which a summary names findings: heart, lungs, pleura, the rest."""

# The first of each list is the one that the writer prefers.
STATEMENT = {True: ("The radiograph is abnormal.",), False: ("The radiograph is normal.",)}
UNNAMED = ("No single finding stands out.",)
HEART_CLEAR = ("The heart is not enlarged.", "The heart size is normal.")
LUNGS_CLEAR = ("The lungs are clear.",)
PLEURA_CLEAR = ("There is no pleural effusion or pneumothorax.", "No pleural effusion or pneumothorax is seen.")
NORMAL_IMPRESSION = ("No acute abnormality.", "Normal chest radiograph.")
UNNAMED_IMPRESSION = ("Abnormal radiograph without a specific finding.",)
NO_KEY = ("There is no key finding.",)
DECLINED = ("This cannot be answered from the image.",)


class LanguageError(ValueError):
    """A text that is not of the report language, or contradicts itself."""


@dataclass(frozen=True)
class State:
    """What a text says of one radiograph: abnormal or not, and the findings present (none where normal)."""

    abnormal: bool
    present: frozenset[str] = frozenset()

    @property
    def listed(self) -> tuple[str, ...]:
        """The findings present, in the order of a summary."""
        return tuple(f for f in ORDER if f in self.present)


@dataclass(frozen=True)
class Reading:
    """What a text claims: finding (or `ABNORMAL`, `UNSPECIFIC`) → present."""

    claims: dict[str, bool]

    @property
    def abnormal(self) -> bool | None:
        """The text's own statement, or None where it makes none."""
        return self.claims.get(ABNORMAL)

    @property
    def present(self) -> frozenset[str]:
        """The findings that the text states as present."""
        return frozenset(f for f in FINDINGS if self.claims.get(f))


def noun(finding: str) -> str:
    """The finding as a sentence names it, with its article: "a pleural effusion"."""
    words, article, _ = WORDS[finding]
    return article + words


def present_sentences(finding: str) -> tuple[str, ...]:
    """Sentences that state a finding, the preferred one first."""
    preferred = WORDS[finding][2]
    np = noun(finding)
    capital = np[0].upper() + np[1:]
    every = [f"There is {np}.", f"{capital} is present.", f"{capital} is seen."]
    if finding in LUNGS:
        every.append(f"The lungs show {np}.")
    if finding in HEART:
        every = ["The heart is enlarged.", "There is cardiomegaly."]
    return (preferred, *(s for s in every if s != preferred))


def absent_sentences(finding: str) -> tuple[str, ...]:
    """Sentences that deny a finding, the preferred one first."""
    words = WORDS[finding][0]
    return (f"There is no {words}.", f"No {words} is seen.")


def impression_sentence(finding: str) -> str:
    """A finding in the impression: "Pleural effusion."."""
    words = WORDS[finding][0]
    return words[0].upper() + words[1:] + "."


def _answer(word: str, sentence: str) -> str:
    return f"{word}, {sentence[0].lower()}{sentence[1:]}"


@cache
def _findings_claims() -> dict[str, dict[str, bool]]:
    """Sentences that may stand in a findings section or alone → what they claim."""
    known: dict[str, dict[str, bool]] = {}
    for finding in FINDINGS:
        known |= {s: {finding: True} for s in present_sentences(finding)}
        known |= {s: {finding: False} for s in absent_sentences(finding)}
    known |= {s: {ABNORMAL: flag} for flag, sentences in STATEMENT.items() for s in sentences}
    known |= {s: {UNSPECIFIC: True} for s in UNNAMED}
    known |= {s: dict.fromkeys(HEART, False) for s in HEART_CLEAR}
    known |= {s: dict.fromkeys(LUNGS, False) for s in LUNGS_CLEAR}
    known |= {s: {"Effusion": False, "Pneumothorax": False} for s in PLEURA_CLEAR}
    return known


@cache
def _impression_claims() -> dict[str, dict[str, bool]]:
    """Sentences of an impression → what they claim."""
    known = {impression_sentence(f): {ABNORMAL: True, f: True} for f in FINDINGS}
    known |= {s: {ABNORMAL: False} for s in NORMAL_IMPRESSION}
    known |= {s: {ABNORMAL: True, UNSPECIFIC: True} for s in UNNAMED_IMPRESSION}
    return known


@cache
def _answer_claims() -> dict[str, dict[str, bool]]:
    """Sentences that open an answer → what they claim."""
    known: dict[str, dict[str, bool]] = {s: {} for s in (*NO_KEY, *DECLINED)}
    for finding in FINDINGS:
        known[_answer("Yes", present_sentences(finding)[0])] = {finding: True}
        known[_answer("No", absent_sentences(finding)[0])] = {finding: False}
    for word in ("Yes", "No"):
        for flag, sentences in STATEMENT.items():
            known |= {_answer(word, s): {ABNORMAL: flag} for s in sentences}
    known["No, there is no sign of infection."] = dict.fromkeys(INFECTION, False)
    known[_answer("No", HEART_CLEAR[0])] = dict.fromkeys(HEART, False)
    return known


def _sentences(text: str, where: str) -> list[str]:
    """Split after each full stop; what is left over is no sentence."""
    found = re.findall(r"[^.]*\.", text)
    if "".join(found).strip() != text.strip() or not found:
        raise LanguageError(f"{where} does not end in a full stop or is empty.")
    return [s.strip() for s in found]


def _merge(sentences: Iterable[str], known: dict[str, dict[str, bool]], where: str) -> dict[str, bool]:
    """The claims of all sentences; an unknown, repeated or contradicting one is an error."""
    claims: dict[str, bool] = {}
    seen: set[str] = set()
    for sentence in sentences:
        if sentence not in known:
            raise LanguageError(f"Not a sentence of {where}: {sentence!r}.")
        stated = {f for f, present in known[sentence].items() if present and f != ABNORMAL}
        if sentence in seen or stated & {f for f, present in claims.items() if present}:
            raise LanguageError(f"Stated twice in {where}: {sentence!r}.")
        seen.add(sentence)
        for finding, present in known[sentence].items():
            if claims.setdefault(finding, present) != present:
                raise LanguageError(f"{where} contradicts itself on {finding}: {sentence!r}.")
    return claims


def _consistent(claims: dict[str, bool]) -> Reading:
    """Refuse claims that cannot hold together."""
    named = [f for f in FINDINGS if claims.get(f)]
    if claims.get(ABNORMAL) is False and (named or claims.get(UNSPECIFIC)):
        raise LanguageError(f"Called normal, with {', '.join(named) or 'an unspecific abnormality'}.")
    if claims.get(UNSPECIFIC) and named:
        raise LanguageError(f"Said to be without a specific finding, with {', '.join(named)}.")
    return Reading(claims)


def parse_report(text: str) -> Reading:
    """Read a whole summary.

    Raises
    ------
    LanguageError
        An unknown sentence, a missing, empty or repeated section, a finding stated twice, findings and impression that
        differ, a missing statement normal / abnormal, or any contradiction.
    """
    match = re.fullmatch(r"Findings: (.+) Impression: (.+)", text.strip())
    if not match:
        raise LanguageError("Not of the form 'Findings: … Impression: …'.")
    findings = _merge(_sentences(match[1], "Findings"), _findings_claims(), "the findings")
    impression = _merge(_sentences(match[2], "Impression"), _impression_claims(), "the impression")
    if ABNORMAL not in findings:
        raise LanguageError("The findings do not say whether the radiograph is normal.")
    for finding in (*FINDINGS, ABNORMAL):
        if findings.get(finding, False) != impression.get(finding, False):
            raise LanguageError(f"Findings and impression differ on {finding}.")
    if findings.get(UNSPECIFIC) and not impression.get(UNSPECIFIC):
        raise LanguageError(f"Findings and impression differ on {UNSPECIFIC}.")
    reading = _consistent({**impression, **findings})
    if reading.abnormal and not reading.present and not reading.claims.get(UNSPECIFIC):
        raise LanguageError("Called abnormal, and nothing said of why.")
    return reading


def parse(text: str) -> Reading:
    """Read any answer: a summary, an impression, a yes/no answer or single sentences.

    Raises
    ------
    LanguageError
        As `parse_report`; also where the sections of a summary stand alone or out of order.
    """
    text = text.strip()
    if text.startswith("Findings:"):
        return parse_report(text)
    if text.startswith("Impression:"):
        return _consistent(_merge(_sentences(text[11:], "Impression"), _impression_claims(), "the impression"))
    sentences = _sentences(text, "The answer")
    if sentences[0] in _answer_claims():
        head = _merge(sentences[:1], _answer_claims(), "the answer")
        if sentences[1:]:
            raise LanguageError(f"Nothing may follow {sentences[0]!r}.")
        return _consistent(head)
    return _consistent(_merge(sentences, _findings_claims(), "the answer"))


# ---- writing


def _pick(rng: random.Random, choices: Sequence[str]) -> str:
    """The preferred wording in 7 of 10 texts, so that a greedy answer is stable; the others share the rest."""
    return choices[0] if len(choices) == 1 or rng.random() < 0.7 else rng.choice(choices[1:])


def _heart(state: State, rng: random.Random) -> list[str]:
    return [_pick(rng, present_sentences("Cardiomegaly") if "Cardiomegaly" in state.present else HEART_CLEAR)]


def _lungs(state: State, rng: random.Random) -> list[str]:
    listed = [f for f in state.listed if f in LUNGS]
    return [_pick(rng, present_sentences(f)) for f in listed] or [_pick(rng, LUNGS_CLEAR)]


def _pleura(state: State, rng: random.Random) -> list[str]:
    said = [_pick(rng, present_sentences(f)) for f in state.listed if f in PLEURA]
    missing = [f for f in ("Effusion", "Pneumothorax") if f not in state.present]
    if len(missing) == 2:
        return [*said, _pick(rng, PLEURA_CLEAR)]
    return [*said, *(_pick(rng, absent_sentences(f)) for f in missing)]


def write_impression(state: State, rng: random.Random) -> str:
    """The impression alone, with its heading."""
    if not state.abnormal:
        said = [_pick(rng, NORMAL_IMPRESSION)]
    else:
        said = [impression_sentence(f) for f in state.listed] or [_pick(rng, UNNAMED_IMPRESSION)]
    return "Impression: " + " ".join(said)


def write_report(state: State, rng: random.Random, *, spelled: bool = False) -> str:
    """A whole summary of `state`; `spelled` lists what is clear where nothing abnormal is named."""
    said = [_pick(rng, STATEMENT[state.abnormal])]
    if state.abnormal and not state.present and not spelled:
        said.append(_pick(rng, UNNAMED))
    else:
        said += _heart(state, rng) + _lungs(state, rng) + _pleura(state, rng)
        if "Hernia" in state.present:
            said.append(_pick(rng, present_sentences("Hernia")))
    return f"Findings: {' '.join(said)} {write_impression(state, rng)}"


def answer_finding(finding: str, present: bool) -> str:
    """The answer to a yes/no question on a finding."""
    if present:
        return _answer("Yes", present_sentences(finding)[0])
    return _answer("No", HEART_CLEAR[0] if finding in HEART else absent_sentences(finding)[0])


def answer_abnormal(abnormal: bool, asked_abnormal: bool) -> str:
    """The answer to "Is this radiograph abnormal?" or, where `asked_abnormal` is False, "… normal?"."""
    return _answer("Yes" if abnormal == asked_abnormal else "No", STATEMENT[abnormal][0])


# kind of question → wordings, the preferred one first
QUESTIONS = {
    "summary": (
        "What are the findings and the impression?",
        "Summarize this chest radiograph.",
        "Describe this chest radiograph in detail.",
        "Write the findings and the impression of this radiograph.",
        "What does this image show?",
        "Please describe the image.",
    ),
    "impression": ("What is the impression?", "Give only the impression.", "What is your conclusion?"),
    "key": ("What are the key findings?", "Are there any abnormalities or concerns?", "What stands out in this image?"),
    "heart": ("How large is the heart?", "Describe the heart size and shape.", "What about the heart?"),
    "lungs": ("How do the lungs look?", "Describe the lungs.", "What about the lungs?"),
    "pleura": ("How does the pleura look?", "Describe the pleura.", "What about the pleural space?"),
    "infection": ("Is there any sign of infection?", "Is there infection or inflammation?"),
    "which": ("Is this radiograph normal or abnormal?", "Normal or abnormal?"),
    "abnormal": ("Is this radiograph abnormal?", "Is the image abnormal?", "Is anything abnormal?"),
    "normal": ("Is this radiograph normal?", "Is the image normal?", "Does this look normal?"),
    "decline": (
        "How old is the patient?", "Is the patient male or female?", "What treatment do you suggest?",
        "Has this changed since the last image?", "Are there enlarged lymph nodes?", "Is there a fracture?",
        "Is there cancer?", "What are the complications and risks?", "Who are you?", "What is the weather today?",
    ),
}  # fmt: skip
_ASKED = ("Is there {}?", "Is there evidence of {}?", "Does this radiograph show {}?", "Do you see {}?", "Any {}?")


def finding_questions(finding: str) -> tuple[str, ...]:
    """Wordings of the yes/no question on a finding, the preferred one first."""
    asked = [template.format(noun(finding)) for template in _ASKED[:-1]]
    asked.append(_ASKED[-1].format(WORDS[finding][0]))
    if finding in HEART:
        asked.append("Is the heart enlarged?")
    return tuple(asked)


def answer(kind: str, state: State, rng: random.Random) -> str:
    """The answer about `state` to a question of `QUESTIONS`' kinds."""
    if kind == "summary":
        return write_report(state, rng)
    if kind == "impression":
        return write_impression(state, rng)
    if kind == "heart":
        return " ".join(_heart(state, rng))
    if kind == "lungs":
        return " ".join(_lungs(state, rng))
    if kind == "pleura":
        return " ".join(_pleura(state, rng))
    if kind == "key":
        listed = [_pick(rng, present_sentences(f)) for f in state.listed]
        return " ".join(listed) or (UNNAMED[0] if state.abnormal else NO_KEY[0])
    if kind == "infection":
        found = [f for f in state.listed if f in INFECTION]
        return _answer("Yes", present_sentences(found[0])[0]) if found else "No, there is no sign of infection."
    if kind == "which":
        return STATEMENT[state.abnormal][0]
    if kind in ("abnormal", "normal"):
        return answer_abnormal(state.abnormal, kind == "abnormal")
    return DECLINED[0]
