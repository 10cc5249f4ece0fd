"""Guesses at what a text says next, by what it said before."""

import random

import pytest

from onecard.model.drafts import Drafter, cut_to_common


def told(ids: list[int]) -> Drafter:
    drafter = Drafter(ids[:1])
    for new_id in ids[1:]:
        drafter.append(new_id)
    return drafter


@pytest.mark.parametrize("make", [Drafter, told], ids=["at once", "one by one"])
def test_what_followed_the_same_tokens_last_is_guessed(make: type[Drafter]) -> None:
    assert make([1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8, 9, 1, 2, 3]).draft(2) == [7, 8]


def test_what_repeats_itself_is_guessed_beyond_its_end() -> None:
    assert Drafter([5, 5, 5, 5]).draft(2) == [5, 5]
    assert Drafter([1, 2, 1, 2, 1]).draft(3) == [2, 1, 2]


def test_nothing_is_guessed_without_a_repetition_or_a_place() -> None:
    assert Drafter([]).draft(9) == Drafter([4]).draft(9) == Drafter([1, 2, 3, 4, 5]).draft(9) == []
    assert Drafter([1, 2, 9, 1, 2]).draft(9) == []
    assert Drafter([5, 5, 5, 5]).draft(0) == []


def test_drafts_are_cut_to_what_two_of_three_texts_reach() -> None:
    assert cut_to_common([[1, 2, 3]]) == [[1, 2, 3]]
    assert cut_to_common([[1, 2, 3], []]) == [[], []]
    assert cut_to_common([[1, 2, 3], [4, 5], [6]]) == [[1, 2], [4, 5], [6]]
    assert cut_to_common([[1, 2, 3], [4, 5], [], []]) == [[]] * 4


def test_a_text_that_is_guessed_wrong_is_left_alone_until_guesses_are_right_again() -> None:
    drafter, lengths = Drafter([1, 2, 3, 0]), list[int]()
    for other in range(10, 16):
        for new_id in (1, 2, 3):
            drafter.append(new_id)
        lengths.append(len(drafter.draft(9)))
        drafter.append(other)
    assert lengths == [3, 2, 1, 0, 0, 0]
    for _ in range(6):
        drafter.append(7)
        lengths.append(len(drafter.draft(9)))
    assert lengths[6:] == [0, 0, 0, 0, 1, 2]


def test_a_guess_is_always_a_continuation_that_stood_before() -> None:
    draws = random.Random(3)
    for _ in range(200):
        ids = [draws.randrange(3) for _ in range(draws.randrange(1, 30))]
        draft = told(ids).draft(3)
        text = ids + draft
        assert all(text[end - 3 : end + 1] in windows(text[:end]) for end in range(len(ids), len(text)))


def windows(ids: list[int]) -> list[list[int]]:
    return [ids[first : first + 4] for first in range(len(ids) - 3)]
