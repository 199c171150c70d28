"""Every accepted row form, and a clear error for every other."""

from datetime import date
from decimal import Decimal

import pytest

from qlora_dpo.preferences import PAIR_STRATEGIES, pairs_from_scores, parse_row

USER = {"role": "user", "content": "hi"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
SYSTEM, CALL = {"role": "system", "content": "be brief"}, {"role": "assistant", "content": "look(it)"}


def test_prompt_chosen_rejected_is_one_pair():
    found = parse_row({"prompt": "a", "chosen": " b", "rejected": " c"})
    assert (found.prompt, found.completions, found.pairs) == ("a", [" b", " c"], [(0, 1)])
    assert not found.conversational


def test_implied_prompt_of_messages_is_their_common_prefix_in_whole_messages():
    found = parse_row({"chosen": [USER, YES], "rejected": [USER, NO]})
    assert (found.prompt, found.completions) == ([USER], [[YES], [NO]])


@pytest.mark.parametrize("prompt", [[USER], [SYSTEM, USER]], ids=["all of it", "its last turn"])
def test_what_the_sides_repeat_of_the_prompt_is_there_once(prompt):
    found = parse_row({"prompt": prompt, "chosen": [USER, YES], "rejected": [USER, NO]})
    assert (found.prompt, found.completions) == (prompt, [[YES], [NO]])


@pytest.mark.parametrize("prompt", ["hi", " hi\n", "h", "Human: hi\n\nAssistant:", ""])
def test_a_prompt_of_text_is_what_the_messages_say(prompt):
    found = parse_row({"prompt": prompt, "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]})
    assert (found.prompt, found.completions) == ([SYSTEM, USER], [[YES], [NO]])


@pytest.mark.parametrize("text", ["What is it?\nSay.", 'It\'s "x"', "a\tb", "a\r\nb"])
def test_parts_and_white_space_say_a_prompt_of_text_too(text):
    user = {"role": "user", "content": [{"type": "text", "text": text.replace("\r", "")}]}
    for prompt in (text, f"<|user|>{text}<|assistant|>"):
        found = parse_row({"prompt": prompt, "chosen": [user, YES], "rejected": [user, NO]})
        assert (found.prompt, found.completions) == ([user], [[YES], [NO]])
    silent = {"role": "user", "content": None, "tool_calls": []}
    assert parse_row({"prompt": text, "chosen": [silent, YES], "rejected": [silent, NO]}).prompt == [silent]


def test_a_prompt_of_text_that_no_message_says_is_not_passed_over():
    with pytest.raises(ValueError, match="`prompt` must be in the messages that both sides begin with, got 'never'"):
        parse_row({"prompt": "never", "chosen": [USER, YES], "rejected": [USER, NO]})


def test_a_first_turn_that_both_sides_write_is_theirs():
    found = parse_row({"prompt": [USER], "chosen": [CALL, YES], "rejected": [CALL, NO]})
    assert (found.prompt, found.completions) == ([USER], [[CALL, YES], [CALL, NO]])


def test_implied_prompt_of_text_is_left_to_the_tokens():
    found = parse_row({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert found.prompt is None
    assert found.completions == ["The sky is blue.", "The sky is black."]


def test_sharegpt_rows_are_recognised():
    row = {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    }
    found = parse_row(row)
    assert (found.prompt, found.completions) == ([USER], [[YES], [NO]])


def test_ranks_are_best_at_one_and_scores_best_at_most():
    completions = ["a", "b", "c"]
    by_rank = parse_row({"prompt": "p", "completions": completions, "ranks": [2, 1, 3]})
    by_score = parse_row({"prompt": "p", "completions": completions, "scores": [0.5, 0.9, 0.1]})
    assert by_rank.pairs == by_score.pairs == [(1, 0), (1, 2), (0, 2)]


@pytest.mark.parametrize(
    ("strategy", "pairs"),
    [
        ("all", [(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)]),
        ("best_vs_rest", [(1, 0), (1, 2), (1, 3)]),
        ("best_vs_worst", [(1, 3)]),
        ("adjacent", [(1, 0), (1, 2), (0, 3), (2, 3)]),
    ],
)
def test_equal_scores_make_no_pair(strategy, pairs):
    """Scores 5, 9, 5, 1: one best, two equal, one worst."""
    assert sorted(pairs_from_scores([5, 9, 5, 1], strategy)) == sorted(pairs)


@pytest.mark.parametrize("strategy", sorted(PAIR_STRATEGIES))
def test_all_equal_scores_make_no_pair_at_all(strategy):
    assert pairs_from_scores([1.0, 1.0, 1.0], strategy) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, "must have the columns"),
        ({"prompt": "p", "completions": ["a", "b"]}, "must have the columns"),
        ({"prompt": "p", "completions": ["a", "b"], "pairs": [[0, 2]]}, "below 2"),
        ({"prompt": "p", "completions": ["a", "b"], "pairs": [[-1, 0]]}, "below 2"),
        (
            {"prompt": "p", "completions": ["a", "b"], "pairs": [[1, 1]]},
            r"two different completions, got \[1, 1\]. Remove",
        ),
        ({"prompt": "p", "completions": ["a", "b"], "pairs": [[0]]}, "must hold"),
        ({"prompt": "p", "completions": ["a", "b"], "pairs": [[0, 1]], "scores": [0, 1]}, "must have one of"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [0, 1], "ranks": [1, 2]}, "must have one of"),
        ({"prompt": "p", "completions": ["a"], "pairs": []}, "two or more"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1.0]}, "one number per completion"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1.0, float("nan")]}, "must be numbers"),
        ({"prompt": "p", "chosen": [YES], "rejected": [NO]}, "all be text or all be messages"),
        ({"prompt": "p", "completions": ["a", "b"], "pairs": [0, 1]}, "below 2, the number of completions, got 0"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "text or a list of messages"),
        ({"prompt": "p", "completions": "a", "ranks": [1, 2]}, "`completions` must be a list, got str. Convert"),
        (
            {"prompt": "p", "chosen": [YES | {"content": date(2024, 5, 1)}], "rejected": [NO]},
            "must be text or parts, got date",
        ),
    ],
)
def test_bad_rows_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        parse_row(row)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": None, "completions": None}, "rejected"),
        ({"prompt": None, "completions": ["a", "b"], "scores": [1, 2]}, "prompt"),
        ({"prompt": "a", "completions": ["a", "b"], "scores": None}, "scores"),
    ],
)
def test_a_null_is_named(row, name):
    with pytest.raises(ValueError, match=f"`{name}` must be text or a list, got null. Fill it in, or remove the row"):
        parse_row(row)


def test_a_column_that_only_lists_of_completions_use_does_not_stop_a_pair():
    assert parse_row({"prompt": "a", "chosen": "b", "rejected": "c", "scores": 0.9, "pairs": "x"}).pairs == [(0, 1)]


def test_decimals_are_numbers():
    row = {"prompt": "a", "completions": ["b", "c"], "scores": [Decimal("1.5"), Decimal("2.5")]}
    assert parse_row(row).pairs == [(1, 0)]


@pytest.mark.parametrize("message", [{"role": "assistant", "content": None}, {"from": "gpt", "value": None}])
def test_a_message_of_nothing_is_refused(message):
    """A template writes "None", which was trained on."""
    with pytest.raises(ValueError, match=r"must be text or parts where it calls no tool, got null of 'assistant'\."):
        parse_row({"prompt": [USER], "chosen": [YES], "rejected": [message]})


def test_a_message_of_nobody_is_refused():
    with pytest.raises(ValueError, match=r"A message must have a `role` and a `content`, got \['content'\]"):
        parse_row({"prompt": [{"content": "Hello"}], "chosen": [YES], "rejected": [NO]})
