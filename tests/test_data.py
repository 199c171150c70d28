"""Token ids, boundaries, truncation, what is dropped, and the report that says so."""

import re
import warnings

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from tokenizers import processors
from torch.utils.data import DataLoader

from qlora_dpo.data import LONG_PROMPT, NO_PAIRS, TokenLimits, prepare_dataset, tokenize_row, value_columns
from qlora_dpo.data_report import show
from qlora_dpo.files import load_rows
from qlora_dpo.layouts import group_of

from tiny_chat import build_chat_tokenizer, chat_row, ranked_row

NO_LIMITS = TokenLimits()


def ids_of(tokenizer, text):
    return tokenizer.convert_tokens_to_ids(text.split())


def tokenized(tokenizer, row, limits=NO_LIMITS, **options):
    return tokenize_row(row, 0, tokenizer, limits, **options)


def test_text_gets_one_bos_and_one_eos(tokenizer):
    row = tokenized(tokenizer, {"prompt": "the cat", "chosen": " sees", "rejected": " finds the dog"})
    assert row["prompt_ids"] == ids_of(tokenizer, "<s> the cat")
    assert row["completion_ids"] == [ids_of(tokenizer, "sees </s>"), ids_of(tokenizer, "finds the dog </s>")]


def test_special_tokens_are_never_doubled():
    """A tokenizer that adds BOS and EOS to every text, and texts that hold them already."""
    both = build_chat_tokenizer()
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    expected = [ids_of(both, "sees </s>"), ids_of(both, "finds </s>")]
    for prompt, end in (("the cat", ""), ("<s> the cat", " </s>")):
        row = tokenized(both, {"prompt": prompt, "chosen": f" sees{end}", "rejected": f" finds{end}"})
        assert row["prompt_ids"] == ids_of(both, "<s> the cat")
        assert row["completion_ids"] == expected


@pytest.mark.parametrize(("single", "text"), [("</s> $A", "</s> the cat"), ("$A </s>", "the cat")], ids=["bos", "eos"])
def test_one_token_for_bos_and_eos_is_known_by_its_place(single, text):
    """As OPT has it in front, and others behind: to mistake them would cut off the last word of every text."""
    one = build_chat_tokenizer()
    one.bos_token = one.eos_token
    one.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("</s>", 2)])
    row = tokenized(one, {"prompt": "the cat", "chosen": " sees", "rejected": " finds"})
    assert row["prompt_ids"] == ids_of(one, text)
    assert row["completion_ids"] == [ids_of(one, "sees </s>"), ids_of(one, "finds </s>")]


def test_a_tokenizer_without_bos_adds_none():
    plain = build_chat_tokenizer(add_bos=False)
    row = tokenized(plain, {"prompt": "the cat", "chosen": " sees", "rejected": " finds"})
    assert row["prompt_ids"] == ids_of(plain, "the cat")


def test_messages_get_the_tokens_the_template_renders(tokenizer):
    found = tokenized(tokenizer, chat_row(0))
    row = chat_row(0)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=True, return_dict=True)["input_ids"]
    assert found["prompt_ids"] + found["completion_ids"][0] == whole


def test_a_template_that_renders_the_lone_prompt_differently_moves_the_boundary(tokenizer):
    thinking = build_chat_tokenizer()
    thinking.chat_template = tokenizer.chat_template.replace("<assistant>{% endif %}", "<assistant> ok{% endif %}")
    row = tokenized(thinking, chat_row(1))
    assert row["boundary_moved"]
    assert thinking.decode(row["prompt_ids"]).endswith("<assistant>")
    assert not tokenized(tokenizer, chat_row(1))["boundary_moved"]


def test_template_keywords_and_tools_reach_the_template():
    telling = build_chat_tokenizer()
    telling.chat_template = "{{ '<s> red' if red }} {{ tools[0]['name'] if tools }} " + telling.chat_template[3:]
    row = chat_row(1) | {"chat_template_kwargs": {"red": True}, "tools": '[{"name": "river"}]'}
    assert tokenized(telling, row)["prompt_ids"][:3] == ids_of(telling, "<s> red river")


def test_implied_text_prompt_ends_in_tokens(tokenizer):
    row = tokenized(tokenizer, {"chosen": "the cat sees", "rejected": "the cat sees the dog"})
    assert row["prompt_ids"] == ids_of(tokenizer, "<s> the cat sees")
    assert row["completion_ids"] == [ids_of(tokenizer, "</s>"), ids_of(tokenizer, "the dog </s>")]


def test_equal_completions_of_a_group_are_one(tokenizer):
    row = {"prompt": "the", "completions": [" cat", " dog", " cat", " bird"], "pairs": [[0, 1], [2, 1], [3, 2], [0, 2]]}
    found = tokenized(tokenizer, row)
    assert len(found["completion_ids"]) == 3
    assert found["pairs"] == [[0, 1], [0, 1], [2, 0]]


def test_completions_in_no_pair_are_not_computed(tokenizer):
    row = {"prompt": "the", "completions": [" cat", " dog", " bird"], "pairs": [[2, 0]]}
    found = tokenized(tokenizer, row)
    assert found["completion_ids"] == [ids_of(tokenizer, "bird </s>"), ids_of(tokenizer, "cat </s>")]
    assert found["pairs"] == [[0, 1]]


def test_completions_are_cut_at_their_end_and_long_prompts_dropped(tokenizer):
    row = {"prompt": "the cat sees", "chosen": " the red dog", "rejected": " a blue bird"}
    assert tokenized(tokenizer, row, TokenLimits(6))["completion_ids"][0] == ids_of(tokenizer, "the red")
    assert tokenized(tokenizer, row, TokenLimits(6))["truncated"]
    assert tokenized(tokenizer, row, TokenLimits(4))["dropped"] == LONG_PROMPT
    kept = tokenized(tokenizer, row, TokenLimits(4, max_prompt_length=2))
    assert kept["prompt_ids"] == ids_of(tokenizer, "cat sees")
    assert not kept["dropped"]


def test_pairs_that_truncation_makes_equal_are_dropped(tokenizer):
    row = {"prompt": "the", "chosen": " cat sees", "rejected": " cat finds"}
    assert tokenized(tokenizer, row, TokenLimits(3))["dropped"] == NO_PAIRS
    assert not tokenized(tokenizer, row, TokenLimits(4))["dropped"]


def test_a_prompt_without_tokens_is_dropped():
    plain = build_chat_tokenizer(add_bos=False)
    assert "nothing predicts" in tokenized(plain, {"prompt": "", "chosen": "cat", "rejected": "dog"})["dropped"]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "the cat", "chosen": "sees", "rejected": "finds"},
        {"question": "the cat", "chosen": chat_row(1)["chosen"], "rejected": chat_row(1)["rejected"]},
    ],
    ids=["text", "messages"],
)
def test_rows_without_any_prompt_are_dropped(tokenizer, row):
    """A misspelt `prompt` column must not train on completions alone."""
    with pytest.raises(ValueError, match="no prompt is given"):
        prepare_dataset(Dataset.from_list([row]), tokenizer, NO_LIMITS)


def test_report_counts_what_happened(tokenizer):
    rows = [ranked_row(seed) for seed in range(5)]
    rows.append({"prompt": "cat", "completions": [" dog", " dog"], "scores": [1.0, 2.0]})
    rows.append({"prompt": "cat " * 30, "completions": [" dog", " bird"], "scores": [1.0, 2.0]})
    dataset = Dataset.from_list([row | {"source": "x"} for row in rows])
    kept, report = prepare_dataset(dataset, tokenizer, TokenLimits(20), batch_size=2)
    assert (report.rows, report.groups) == (7, 5)
    assert report.pairs == sum(len(row["pairs"]) for row in kept)
    assert report.dropped == {NO_PAIRS: 1, LONG_PROMPT: 1}
    assert report.unused_columns == ["source"]
    assert report.whole_max == len(ids_of(tokenizer, f"<s> {'cat ' * 30}dog </s>"))
    assert f"before they were cut: p95 {report.whole_p95}, max {report.whole_max} tokens" in str(report)
    lengths = [len(row["prompt_ids"]) + len(ids) for row in kept for ids in row["completion_ids"]]
    assert report.length_max == max(lengths)
    assert report.length_p95 == int(np.percentile(lengths, 95)) > report.length_median == int(np.median(lengths))
    unique = sum(len(row["prompt_ids"]) + sum(len(ids) - 1 for ids in row["completion_ids"]) for row in kept)
    assert report.tokens == unique
    widths = [
        [len(r["prompt_ids"]) + len(ids) for r in kept.select(at) for ids in r["completion_ids"]]
        for at in ([0, 1], [2, 3], [4])
    ]
    assert report.tokens_padded == sum(len(w) * max(w) for w in widths)
    for shown in ("7 rows -> 5 groups", "dropped 1", "columns not used: source", "chosen", "rejected", "<s>"):
        assert shown in str(report)


def test_tokenising_again_comes_from_the_cache(tokenizer, tmp_path):
    dataset = Dataset.from_list([chat_row(seed) for seed in range(4)])
    dataset.to_parquet(tmp_path / "rows.parquet")
    fingerprints = {
        prepare_dataset(load_rows(str(tmp_path / "rows.parquet")), tokenizer, limits)[0]._fingerprint
        for limits in (NO_LIMITS, NO_LIMITS)
    }
    assert len(fingerprints) == 1


def test_two_processes_tokenise_as_one_does(tokenizer, chat_rows):
    one, _ = prepare_dataset(chat_rows, tokenizer, NO_LIMITS)
    two, _ = prepare_dataset(chat_rows, tokenizer, NO_LIMITS, num_proc=2)
    assert one.to_list() == two.to_list()


def test_tokenised_rows_pass_through(tokenizer, chat_rows):
    kept, _ = prepare_dataset(chat_rows, tokenizer, NO_LIMITS)
    again, report = prepare_dataset(kept, tokenizer, NO_LIMITS)
    assert again is kept
    assert report is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "text": "t"}], "must have the columns"),
        ([{"prompt": "the", "chosen": " cat", "rejected": " cat"}], "all 1 were dropped"),
        ([{"prompt": "the", "completions": [" a", " b"], "pairs": [[0, 5]]}], "Row 0 .* below 2"),
        ([{"prompt": "the", "completions": [" a", " b"], "pairs": [[1, 1]]}], "Row 0 .* two different"),
    ],
)
def test_bad_data_is_refused_before_training(tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        prepare_dataset(Dataset.from_list(rows), tokenizer, NO_LIMITS)


def test_an_empty_data_set_is_refused(tokenizer, chat_rows):
    with pytest.raises(ValueError, match="must have rows"):
        prepare_dataset(chat_rows.select([]), tokenizer, NO_LIMITS)


def test_messages_without_a_chat_template_are_refused(chat_rows):
    bare = build_chat_tokenizer()
    bare.chat_template = None
    with pytest.raises(
        ValueError, match=r"must have a chat template to render messages, got none. Set `tokenizer.chat_template`"
    ):
        prepare_dataset(chat_rows, bare, NO_LIMITS)


def test_a_max_length_that_drops_all_is_told_what_the_rows_need(tokenizer):
    rows = [{"prompt": "the cat " * n, "chosen": " sees", "rejected": " finds"} for n in (2, 3, 9)]
    needed = "Raise `max_length`, now 5: whole, half of the rows have at most 9 tokens, and the longest 21."
    with pytest.raises(ValueError, match=re.escape(needed)):
        prepare_dataset(Dataset.from_list(rows), tokenizer, TokenLimits(5))


@pytest.mark.parametrize(("dropped", "warned"), [(1, False), (2, True)])
def test_a_run_warns_if_more_than_a_tenth_of_its_rows_is_dropped(tokenizer, dropped, warned):
    rows = [{"prompt": "the cat", "chosen": " sees", "rejected": " finds"}] * (10 - dropped)
    equal = {"prompt": "the cat", "chosen": " sees", "rejected": " sees"}
    _, report = prepare_dataset(Dataset.from_list(rows + [equal] * dropped), tokenizer, NO_LIMITS)
    with warnings.catch_warnings(record=True) as found:
        show(report)
    said = (
        f"Of the 10 rows of the train data 2 are dropped, most because: {NO_PAIRS}. Correct them, or raise `max_length`"
    )
    assert [str(one.message).startswith(said) for one in found] == [True] * warned


def test_log_probabilities_of_one_side_are_refused():
    with pytest.raises(ValueError, match=r"must be given both or neither, got ref_chosen_logps alone. Add the other"):
        value_columns(["prompt", "ref_chosen_logps"])


# ---- numbers for pairs and completions -------------------------------------------------------------------------------


def grouped(tokenizer, rows, **options):
    kept, _ = prepare_dataset(Dataset.from_list(rows), tokenizer, TokenLimits(None), **options)
    return [group_of(row) for row in kept]


def test_numbers_for_pairs_follow_their_pairs():
    """Pairs of equal completions are dropped, and their numbers with them; a row's one number goes to all its pairs."""
    tokenizer = build_chat_tokenizer()
    completions = [" sees the dog", " finds a tree", " sees the dog", " likes red"]
    row = {"prompt": "the cat", "completions": completions, "pairs": [[0, 2], [0, 1], [3, 2]], "weights": [1, 2, 3]}
    one = {"prompt": "the dog", "completions": completions[1:], "pairs": [[0, 1], [1, 2]], "weights": [5, 5]}
    first, second = grouped(tokenizer, [row, one])
    assert (first.pairs, list(first.weights)) == ([(0, 1), (2, 0)], [2, 3])
    assert list(second.weights) == [5, 5]
    (ranked,) = grouped(tokenizer, [{"prompt": "a", "completions": completions[:2], "ranks": [2, 1], "weights": 0.5}])
    assert (ranked.pairs, list(ranked.weights)) == ([(0, 1)], [0.5])


def test_given_log_probs_follow_their_completions():
    row = {
        "prompt": "the cat",
        "completions": [" unused tree", " sees", " sees", " likes red"],
        "pairs": [[3, 1]],
        "ref_logps": [-1.0, -2.0, -3.0, -4.0],
    }
    (group,) = grouped(build_chat_tokenizer(), [row])
    assert list(group.ref_logps) == [-4.0, -2.0]


def test_a_row_without_a_number_has_the_neutral_one():
    rows = [chat_row(1) | {"weights": 2.0, "label_probs": 0.8, "offsets": 0.3}, chat_row(2)]
    first, second = grouped(build_chat_tokenizer(), rows)
    assert (first.weights, first.label_probs, first.offsets) == ([2.0], [0.8], [0.3])
    assert (second.weights, second.label_probs, second.offsets) == ([1.0], [1.0], [0.0])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("weights", -1.0, "`weights` must be finite and 0 or more, got -1.0"),
        ("weights", "heavy", "`weights` must"),
        ("weights", [1.0, 2.0], "must be one number, or one for each of the 1 pairs, got 2 numbers"),
        ("label_probs", 1.5, r"`label_probs` must be in \[0, 1\], got 1.5"),
        ("offsets", float("inf"), "`offsets` must be finite"),
        ("ref_logps", [-1.0], r"`ref_logps` must be one finite number per completion \(2\)"),
        ("ref_logps", [-1.0, float("nan")], "`ref_logps` must be one finite number"),
    ],
)
def test_numbers_that_cannot_be_right_are_refused_with_their_row(column, value, message):
    with pytest.raises(ValueError, match=message) as error:
        grouped(build_chat_tokenizer(), [chat_row(0) | {column: value}])
    assert "Row 0 of the data set" in str(error.value)


@pytest.mark.parametrize("found", [{"scores": [3, 1, 2]}, {"pairs": [[0, 1]]}])
def test_given_log_probs_stand_where_nothing_that_is_used_was_cut(tokenizer, found):
    row = {
        "prompt": "the cat",
        "completions": [" sees", " finds", " the" * 30],
        "ref_logps": [-1.0, -2.0, -30.0],
        **found,
    }
    kept = tokenized(tokenizer, row, TokenLimits(10), pair_strategy="best_vs_worst", values=["ref_logps"])
    assert (kept["dropped"], kept["truncated"], kept["ref_logps"]) == ("", False, [-1.0, -2.0])


def test_a_column_that_a_stream_has_from_a_later_row_on_is_refused(tokenizer):
    """Its columns are those of its first row: what comes later would be passed over."""

    def rows():
        yield chat_row(0)
        yield chat_row(1) | {"weights": 0.5}

    groups, _ = prepare_dataset(IterableDataset.from_generator(rows), tokenizer, NO_LIMITS)
    with pytest.raises(ValueError, match="Row 1 of the data set: `weights` must be in the first row of a stream"):
        list(groups)


def test_rows_of_a_stream_have_numbers_of_their_own_in_several_workers(tokenizer, chat_rows):
    groups, _ = prepare_dataset(chat_rows.to_iterable_dataset(num_shards=4), tokenizer, NO_LIMITS)
    found = [row["row"] for row in DataLoader(groups, batch_size=None, num_workers=2)]
    assert len(found) == len(set(found)) == len(chat_rows)


def test_columns_that_are_not_read_are_named(tokenizer):
    text, sides = {"prompt": "the cat"}, {"chosen": " sees", "rejected": " finds"}
    cases = [
        (text | sides | {"scores": 0.9, "ranks": "first"}, ["ranks", "scores"]),
        (text | sides | {"tools": "[]", "chat_template_kwargs": "{}"}, ["chat_template_kwargs", "tools"]),
        (text | sides | {"completions": [" a", " b"], "scores": [1, 2]}, ["chosen", "rejected"]),
        (chat_row(0) | {"conversations": [{"from": "human", "value": "x"}]}, ["conversations"]),
    ]
    for row, unused in cases:
        assert prepare_dataset(Dataset.from_list([row]), tokenizer, NO_LIMITS)[1].unused_columns == unused


def test_a_transform_is_refused_as_it_would_not_be_applied(tokenizer, chat_rows):
    with pytest.raises(
        ValueError, match=r"must have no transform, got one, which makes rows as they are read. Use `map`"
    ):
        prepare_dataset(chat_rows.with_transform(lambda rows: rows), tokenizer, NO_LIMITS)


def test_a_row_without_a_subset_has_none(tokenizer):
    rows = [chat_row(i) | {"subset": subset} for i, subset in enumerate(("code", None))]
    assert prepare_dataset(Dataset.from_list(rows), tokenizer, NO_LIMITS)[0]["subset"] == ["code", None]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("tools", "search", "`tools` must be JSON where it is text, got 'search'"),
        ("chat_template_kwargs", "a=1", "`chat_template_kwargs` must be JSON where it is text, got 'a=1'"),
        ("chat_template_kwargs", "[1]", r"`chat_template_kwargs` must be a dict, got \[1\]"),
    ],
)
def test_what_a_template_is_given_is_checked_by_name(tokenizer, column, value, said):
    with pytest.raises(ValueError, match=f"Row 0 of the data set: {said}"):
        tokenized(tokenizer, chat_row(0) | {column: value})


def test_a_list_where_pairs_are_derived_is_refused():
    row = {"prompt": "a", "completions": [" b", " c", " d"], "ranks": [1, 2, 3], "weights": [1.0, 2.0, 3.0]}
    with pytest.raises(ValueError, match="one number where pairs are derived"):
        grouped(build_chat_tokenizer(), [row])


def test_a_tokenised_set_keeps_its_numbers():
    tokenizer = build_chat_tokenizer()
    kept, _ = prepare_dataset(Dataset.from_list([chat_row(0) | {"weights": 2.0}]), tokenizer, TokenLimits(None))
    again, report = prepare_dataset(kept, tokenizer, TokenLimits(None))
    assert report is None
    assert group_of(again[0]).weights == [2.0]


def test_report_counts_pairs_of_equal_sides(tokenizer):
    texts = [" sees", " finds", " likes", " finds"]
    rows = Dataset.from_list([{"prompt": "the cat", "completions": texts, "ranks": [1, 2, 3, 4]}])
    kept, report = prepare_dataset(rows, tokenizer, NO_LIMITS)
    assert kept[0]["pairs"] == [[0, 1], [0, 2], [0, 1], [1, 2], [2, 1]]  # each that was given counts
    assert (report.pairs, report.lost_pairs) == (5, 1)
    assert "left out 1 pairs whose sides are the same" in str(report)


def test_an_answer_of_a_tool_may_be_what_the_template_takes():
    """Some templates write a mapping as JSON: what it holds is theirs."""
    tokenizer = build_chat_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] | string }} {% endfor %}"
    row = {"prompt": [{"role": "tool", "content": {"cat": 3}}], "chosen": [{"role": "assistant", "content": "ok"}]}
    assert tokenized(tokenizer, row | {"rejected": [{"role": "assistant", "content": "no"}]})["dropped"] == ""
