"""The report language: what the writer writes the parser reads back; what is wrong or contradictory is refused."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SOURCE = Path(__file__).resolve().parents[2] / "models" / "nih-tiny" / "train" / "language.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nih_tiny_language", SOURCE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


language = _load()
PRESENT = st.frozensets(st.sampled_from(language.FINDINGS))
STATES = st.one_of(st.just(language.State(False)), st.builds(lambda present: language.State(True, present), PRESENT))
NORMAL = (
    "Findings: The radiograph is normal. The heart is not enlarged. The lungs are clear. "
    "There is no pleural effusion or pneumothorax. Impression: No acute abnormality."
)
ABNORMAL = (
    "Findings: The radiograph is abnormal. The heart is enlarged. There is atelectasis. There is a pleural effusion. "
    "There is no pneumothorax. Impression: Cardiomegaly. Atelectasis. Pleural effusion."
)
UNNAMED = (
    "Findings: The radiograph is abnormal. No single finding stands out. "
    "Impression: Abnormal radiograph without a specific finding."
)
SPELLED = (
    "Findings: The radiograph is abnormal. The heart is not enlarged. The lungs are clear. "
    "There is no pleural effusion or pneumothorax. Impression: Abnormal radiograph without a specific finding."
)
BAD = {
    "empty": "",
    "white space": "   ",
    "one word": "Normal",
    "no full stop": "The radiograph is normal",
    "unknown sentence": "The patient is well.",
    "misspelt finding": "There is a plural effusion.",
    "lower case": "there is a pleural effusion.",
    "article missing": "There is pleural effusion.",
    "a side that no label supports": "There is a left pleural effusion.",
    "a severity that no label supports": "There is a large pleural effusion.",
    "repeated word": "There is is atelectasis.",
    "two full stops": "There is atelectasis..",
    "comma splice": "There is atelectasis, there is a pleural effusion.",
    "present and absent": "There is a pleural effusion. There is no pleural effusion.",
    "present and absent in one list": "A pneumothorax is present. No pleural effusion or pneumothorax is seen.",
    "clear lungs with a nodule": "The lungs are clear. A lung nodule is seen.",
    "enlarged and not": "The heart is enlarged. The heart size is normal.",
    "normal and abnormal": "The radiograph is normal. The radiograph is abnormal.",
    "normal with a finding": "The radiograph is normal. There is a lung mass.",
    "sentence twice": "The lungs are clear. The lungs are clear.",
    "finding twice in other words": "There is a lung mass. A lung mass is seen.",
    "unspecific with a finding": "No single finding stands out. There is a lung mass.",
    "yes with a denial": "Yes, there is no pleural effusion.",
    "no with a finding": "No, there is a pleural effusion.",
    "bare yes": "Yes.",
    "answer and more": "Yes, there is atelectasis. There is a pleural effusion.",
    "turn marker": NORMAL + " ###Doctor:",
    "text before": "Well. " + NORMAL,
    "text after": NORMAL + " Thank you.",
    "no impression": NORMAL.split(" Impression:")[0],
    "no findings": "Impression: " + NORMAL + " Impression: No acute abnormality.",
    "empty findings": "Findings: Impression: No acute abnormality.",
    "empty impression": NORMAL.split("No acute")[0],
    "sections swapped": "Impression: No acute abnormality. Findings: The radiograph is normal.",
    "two impressions": NORMAL + " Impression: No acute abnormality.",
    "no statement": NORMAL.replace("The radiograph is normal. ", ""),
    "normal, abnormal impression": NORMAL.replace("No acute abnormality.", "Pneumonia."),
    "abnormal, normal impression": ABNORMAL.split("Cardiomegaly.")[0] + "No acute abnormality.",
    "normal and named impression": NORMAL + " Pneumonia.",
    "finding missing in impression": ABNORMAL.replace(" Atelectasis.", ""),
    "finding only in impression": ABNORMAL + " Pneumonia.",
    "denied, then in impression": ABNORMAL + " Pneumothorax.",
    "impression names it twice": ABNORMAL + " Atelectasis.",
    "abnormal without a reason": NORMAL.replace("is normal", "is abnormal"),
    "unspecific, named impression": UNNAMED.replace("Abnormal radiograph without a specific finding.", "Lung mass."),
    "unspecific only in findings": UNNAMED.replace(
        "Abnormal radiograph without a specific finding.", "No acute abnormality."
    ),
    "nothing named, named impression": SPELLED.replace("Abnormal radiograph without a specific finding.", "Emphysema."),
    "named, unspecific impression": ABNORMAL.split("Cardiomegaly.")[0]
    + "Abnormal radiograph without a specific finding.",
    "findings sentence in impression": NORMAL.replace("No acute abnormality.", "The lungs are clear."),
    "impression sentence in findings": NORMAL.replace("The lungs are clear.", "Normal chest radiograph."),
    "cut off": ABNORMAL[:-9],
}


@settings(deadline=None)
@given(STATES, st.integers())
def test_a_report_is_read_back_as_it_was_meant(state: object, seed: int) -> None:
    text = language.write_report(state, random.Random(seed))
    reading = language.parse_report(text)
    assert (reading.abnormal, reading.present) == (state.abnormal, state.present)  # type: ignore[attr-defined]
    assert language.parse(text) == reading
    spelled = language.parse_report(language.write_report(state, random.Random(seed), spelled=True))
    assert (spelled.abnormal, spelled.present) == (reading.abnormal, reading.present)


@settings(deadline=None)
@given(STATES, st.integers(), st.sampled_from(sorted(language.QUESTIONS)))
def test_every_answer_parses_and_claims_nothing_else(state: object, seed: int, kind: str) -> None:
    reading = language.parse(language.answer(kind, state, random.Random(seed)))
    assert reading.present <= state.present  # type: ignore[attr-defined]
    assert reading.abnormal in (None, state.abnormal)  # type: ignore[attr-defined]
    if kind == "impression":
        assert reading.present == state.present  # type: ignore[attr-defined]


@pytest.mark.parametrize("finding", language.FINDINGS)
@pytest.mark.parametrize("present", [True, False])
def test_yes_and_no_claim_their_finding(finding: str, present: bool) -> None:
    text = language.answer_finding(finding, present)
    assert text.startswith("Yes, " if present else "No, ")
    assert language.parse(text).claims == {finding: present}


@pytest.mark.parametrize("abnormal", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_normal_and_abnormal_are_asked_either_way(abnormal: bool, asked: bool) -> None:
    text = language.answer_abnormal(abnormal, asked)
    assert text.startswith("Yes" if abnormal == asked else "No")
    assert language.parse(text).abnormal is abnormal


@pytest.mark.parametrize("text", [NORMAL, ABNORMAL, UNNAMED, SPELLED])
def test_the_examples_that_the_bad_texts_are_made_from_are_good(text: str) -> None:
    language.parse_report(text)


@pytest.mark.parametrize("name", BAD)
def test_bad_and_contradictory_texts_are_refused(name: str) -> None:
    with pytest.raises(language.LanguageError):
        language.parse(BAD[name])


def test_the_message_names_the_finding_and_the_sentence() -> None:
    with pytest.raises(language.LanguageError, match=r"itself on Effusion: 'There is no pleural effusion\.'"):
        language.parse(BAD["present and absent"])
    with pytest.raises(language.LanguageError, match=r"differ on Pneumonia"):
        language.parse(BAD["finding only in impression"])


def test_a_lone_answer_is_no_report() -> None:
    with pytest.raises(language.LanguageError, match="Findings: … Impression: …"):
        language.parse_report("Yes, there is atelectasis.")
