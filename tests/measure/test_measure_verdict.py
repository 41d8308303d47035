import pytest

from transfuse.measure import ARRIVED, NEGATIVE, NO_EFFECT, Interval, verdict

ABOVE, ACROSS, BELOW = Interval(0.2, 0.1, 0.3), Interval(0.05, -0.1, 0.2), Interval(-0.2, -0.3, -0.1)


@pytest.mark.parametrize(("gain", "word"), [(ABOVE, ARRIVED), (ACROSS, NO_EFFECT), (BELOW, NEGATIVE)])
def test_is_decided_by_the_interval(gain, word):
    assert verdict(gain)[0] == word


@pytest.mark.parametrize(("gain", "word"), [(ABOVE, NEGATIVE), (ACROSS, NO_EFFECT), (BELOW, ARRIVED)])
def test_turns_round_when_lower_is_better(gain, word):
    assert verdict(gain, higher_is_better=False)[0] == word


@pytest.mark.parametrize("interval", [Interval(0.1, 0.0, 0.2), Interval(-0.1, -0.2, 0.0), Interval(0.0, 0.0, 0.0)])
def test_an_interval_that_touches_zero_has_no_effect(interval):
    assert verdict(interval)[0] == NO_EFFECT


@pytest.mark.parametrize("control", [ACROSS, BELOW])
def test_nothing_arrives_that_a_shuffled_teacher_gives_as_well(control):
    word, why = verdict(ABOVE, control)
    assert word == NO_EFFECT
    assert "shuffled teacher gains as much" in why
    assert str(control) in why


def test_the_control_looks_the_other_way_when_lower_is_better():
    assert verdict(BELOW, BELOW, higher_is_better=False)[0] == ARRIVED
    assert verdict(BELOW, ABOVE, higher_is_better=False)[0] == NO_EFFECT


def test_arrives_when_baseline_and_shuffled_teacher_are_both_beaten():
    assert verdict(ABOVE, ABOVE)[0] == ARRIVED


@pytest.mark.parametrize("control", [ABOVE, ACROSS, BELOW])
def test_a_control_cannot_excuse_a_loss(control):
    assert verdict(BELOW, control)[0] == NEGATIVE


@pytest.mark.parametrize("gain", [ABOVE, ACROSS, BELOW])
def test_says_why_in_one_sentence_with_the_numbers(gain):
    _, why = verdict(gain)
    assert str(gain) in why
    assert why.endswith(".")
