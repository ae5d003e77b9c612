"""Encoder and language model take turns, the encoder first."""

from __future__ import annotations

import threading
import time

from xraygpt_lite.turns import Turns

_WAIT = 10


def test_the_encoder_comes_before_the_next_call_that_waits() -> None:
    turns, order, inside = Turns(), list[str](), threading.Event()
    go_on = threading.Event()

    def language_model() -> None:
        for number in range(2):
            with turns:
                order.append(f"call {number}")
                inside.set()
                go_on.wait(_WAIT)

    def encoder() -> None:
        with turns.first():
            order.append("image")

    calls = threading.Thread(target=language_model)
    calls.start()
    assert inside.wait(_WAIT)
    images = threading.Thread(target=encoder)
    images.start()
    while turns._gate.acquire(blocking=False):  # until the encoder waits for the call to end
        turns._gate.release()
        time.sleep(0.001)
    go_on.set()
    for thread in (images, calls):
        thread.join(_WAIT)
    assert order == ["call 0", "image", "call 1"]


def test_several_images_are_one_turn() -> None:
    turns, order = Turns(), list[str]()

    def language_model() -> None:
        with turns:
            order.append("call")

    with turns.first():
        call = threading.Thread(target=language_model)
        call.start()
        for _ in range(3):
            with turns.first():
                time.sleep(0.01)
                order.append("image")
    call.join(_WAIT)
    assert order == ["image"] * 3 + ["call"]


def test_an_error_ends_the_turn() -> None:
    turns = Turns()
    for turn in (turns, turns.first()):
        try:
            with turn:
                raise ValueError
        except ValueError:
            pass
    done = threading.Event()

    def other() -> None:
        with turns, turns.first():
            done.set()

    threading.Thread(target=other).start()
    assert done.wait(_WAIT)
