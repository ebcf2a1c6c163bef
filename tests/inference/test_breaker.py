import pytest

from expertoken.inference.breaker import Breaker
from expertoken.modeling.stops import StopTexts


def test_after_some_failures_in_a_row_one_request_per_pause_may_try_and_pauses_grow():
    now = 0.0
    breaker = Breaker(failures=2, pause=10, longest=25, clock=lambda: now)
    breaker.failed()
    assert breaker.admits()
    breaker.succeeded()
    breaker.failed()
    assert breaker.admits()
    breaker.failed()
    assert not breaker.admits()
    asked = []
    for now in range(1, 100):
        if breaker.admits():
            asked.append(now)
            assert not breaker.admits()
            breaker.failed()
    assert asked == [10, 30, 55, 80]
    now = 200.0
    assert breaker.admits()
    breaker.succeeded()
    assert breaker.admits()
    assert breaker.admits()


def test_many_failures_at_the_same_time_are_one_pause():
    now = 0.0
    breaker = Breaker(failures=3, pause=10, clock=lambda: now)
    for _ in range(20):
        breaker.failed()
    now = 10.0
    assert breaker.admits()


def test_who_tried_and_went_away_leaves_the_try_to_the_next_one():
    now = 0.0
    breaker = Breaker(failures=1, pause=10, clock=lambda: now)
    breaker.failed()
    now = 10.0
    assert breaker.admits()
    assert not breaker.admits()
    breaker.left()
    assert breaker.admits()
    breaker.failed()
    now = 29.0
    assert not breaker.admits()
    now = 30.0
    assert breaker.admits()


@pytest.mark.parametrize("stops", [["abc", "b"], ["ab", "b"], ["b", "abcd", "cd"], ["abcx", "bc", "c"]])
def test_stop_texts_that_overlap_cut_at_the_same_place_however_pieces_fall(stops):
    text = "xabcdabcdx"
    found = set()
    for size in range(1, len(text)):
        cut, told = StopTexts(stops), ""
        for start in range(0, len(text), size):
            told += cut.feed(text[start : start + size])
            if cut.reached:
                break
        found.add((told, cut.found))
    assert len(found) == 1


def test_a_stop_text_is_found_wherever_pieces_fall_and_nothing_else_is_lost():
    text = "abcSTOabSTOPxyz"
    for size in range(1, len(text)):
        stops = StopTexts(["STOP", "zzz"])
        told = ""
        for start in range(0, len(text), size):
            told += stops.feed(text[start : start + size])
            if stops.reached:
                break
        assert (told, stops.reached) == ("abcSTOab", True)
        plain = StopTexts(["zzz"])
        fed = "".join(plain.feed(text[start : start + size]) for start in range(0, len(text), size))
        assert fed + plain.rest() == text
