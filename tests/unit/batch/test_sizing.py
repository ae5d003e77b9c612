"""How long sequences must be, and how many are worth having."""

from __future__ import annotations

from pathlib import Path

import pytest

from xraygpt_lite import device
from xraygpt_lite import model as models
from xraygpt_lite.batch import sizing
from xraygpt_lite.bundle import gguf_header, store
from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import ContextError
from xraygpt_lite.llm import rates
from xraygpt_lite.prompt import Asked
from xraygpt_lite.values import Bundle, GenerationOptions

EXAMPLE = Path(__file__).parents[3] / "examples" / "synthetic-normal.png"
GB = 10**9


@pytest.fixture(scope="module")
def bundle(made_bundle: Path) -> Bundle:
    return store.load(made_bundle, Cache(None))


@pytest.mark.parametrize(
    "question", ["Short?", "What is to be seen in the lungs, the pleura, and about the heart?" * 3]
)
def test_rows_are_what_a_first_turn_takes(bundle: Bundle, question: str) -> None:
    asked = [Asked("Is it?"), Asked(question)]
    rows = sizing.rows(bundle, asked, None, 9, findings=False)
    with models.open_bundle(bundle, threads=1, context=rows) as model:
        exact = model.summarize(EXAMPLE, question, GenerationOptions(max_tokens=9))
    assert exact.prompt_tokens + exact.image_tokens + 9 == rows


def test_what_can_never_fit_is_told_before_the_run(bundle: Bundle) -> None:
    longest = gguf_header.read(bundle.llm).context_length
    with pytest.raises(ContextError, match=f"do not fit the model's context of {longest}"):
        sizing.rows(bundle, [Asked("?")], None, longest, findings=False)


def test_findings_need_room_too(bundle: Bundle) -> None:
    longest = max(len(one.question) for one in bundle.manifest.prompt.findings)
    short = [Asked("?")]
    assert longest > 1
    assert sizing.rows(bundle, short, None, 1, findings=True) > sizing.rows(bundle, short, None, 1, findings=False)


def test_steps_are_measured(bundle: Bundle) -> None:
    seconds = rates.step_seconds(bundle.llm, models.plan(bundle, threads=1), (1, 4))
    assert set(seconds) == {1, 4}
    assert min(seconds.values()) > 0


def test_it_is_measured_once(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XRAYGPT_LITE_CACHE", str(tmp_path))
    monkeypatch.setattr(sizing.Others, "in_the_way", lambda _, __: False)  # this machine may be busy
    plan = models.plan(bundle, threads=1)
    told: list[str] = []
    first = sizing.sequences(bundle, plan, doing=told.append)
    assert f"{first[0]} sequences: measured here" in first[2][0]
    assert [what.split()[0] for what in told] == ["measuring"]
    monkeypatch.setattr(rates, "step_seconds", None)  # would fail if it were called
    assert sizing.sequences(bundle, plan, doing=told.append)[0] == first[0]
    assert len(told) == 1


def test_what_was_measured_beside_others_is_not_remembered(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XRAYGPT_LITE_CACHE", str(tmp_path))
    plan = models.plan(bundle, threads=1)
    told: list[str] = []
    for crowded in (True, False, False):
        monkeypatch.setattr(sizing.Others, "in_the_way", lambda _, __, crowded=crowded: crowded)
        sizing.sequences(bundle, plan, doing=told.append)
    assert [what.split()[0] for what in told] == ["measuring", "other", "measuring"]


def test_the_fewest_of_the_fastest_are_chosen() -> None:
    assert device.parallel({2: {1: 1.0, 2: 1.9, 4: 2.0, 8: 2.0, 16: 3.95}}, 0, 0, GB)[0] == 8  # 16 would be 1 % faster
    assert device.parallel({2: {1: 1.0, 2: 2.5, 4: 5.0}}, 0, 0, GB)[0] == 1


def test_more_threads_that_were_held_up_say_nothing() -> None:
    alone = {1: 1.0, 4: 1.5, 8: 4.0}
    held_up = {1: 9.0, 4: 9.9, 8: 10.0}  # 8 at once would be the best of these
    assert device.parallel({2: held_up, 1: alone}, 9.0, 0, GB)[:2] == (4, 1)


def test_memory_bounds_the_number_and_the_reason_says_so() -> None:
    seconds = {1: {1: 1.0, 2: 1.1, 4: 1.2}}
    chosen, _, (reason,) = device.parallel(seconds, 0, GB, 4 * GB + 1)
    assert chosen == 2
    assert "4 would not fit 4.0 GB" in reason
    assert device.parallel(seconds, 0, GB, 0)[0] == 1


def test_threads_that_add_little_are_the_encoder_s() -> None:
    chosen, threads, reasons = device.parallel({4: {1: 1.0, 8: 2.0}, 2: {1: 1.0, 8: 3.0}}, 6.0, 0, GB)
    assert (chosen, threads) == (8, 2)
    assert "all 4 would make a step 1.5 times as fast" in reasons[1]
    assert device.parallel({4: {1: 1.0, 8: 2.0}, 2: {1: 1.0, 8: 3.6}}, 6.0, 0, GB)[1] == 4


def test_an_encoder_with_little_to_do_gets_none() -> None:
    assert device.parallel({4: {1: 1.0, 8: 2.0}, 2: {1: 1.0, 8: 3.0}}, 4.0, 0, GB)[1] == 4  # an answer takes 25 s


def test_a_number_that_was_asked_for_is_taken() -> None:
    chosen, threads, (reason,) = device.parallel({4: {1: 1.0, 8: 2.0}, 2: {1: 1.9, 8: 2.1}}, 9.0, GB, GB, wanted=5)
    assert (chosen, threads, reason) == (5, 4, "5 sequences: asked for")


def test_the_plan_shares_the_threads_out(bundle: Bundle) -> None:
    plan = models.plan(bundle, threads=3, llm_threads=1, because=("why",))
    assert (plan.threads, plan.encoder_threads, plan.reasons[-1]) == (1, 2, "why")
    assert models.plan(bundle, threads=3).encoder_threads == 0


def test_a_small_model_with_one_thread_has_copies(bundle: Bundle) -> None:
    plan = models.plan(bundle, threads=3, llm_threads=1, sequences=16)
    assert (plan.engines, plan.sequences) == (3, 16)
    assert "3 copies of the language model, with a thread and 6 sequences each" in plan.reasons
    assert models.plan(bundle, threads=3, llm_threads=1, sequences=2).engines == 2
    assert models.plan(bundle, threads=4, llm_threads=2, sequences=16).engines == 1
    assert device.copies(4, 1, device.STEP_BYTES) == device.copies(4, 1, None) == device.copies(4, None, 1) == 1


def test_a_row_of_the_cache_is_known_from_the_file(bundle: Bundle) -> None:
    assert gguf_header.read(bundle.llm).cache_row == 4 * 2 * 32
    assert device.free_memory() > 0
