"""Implicit rewards of completions: against the naive truth, and files that go on after a kill."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_merge import moved

from qlora_dpo import QLoRADPOConfig, QLoRADPOTrainer, load_policy, score
from qlora_dpo.__main__ import main
from qlora_dpo.errors import OutOfMemoryError
from qlora_dpo.files import load_rows
from qlora_dpo.score import load_scorer, row_errors, score_completions, score_file

from reference_impl import completion_logps
from test_cli import train_words
from tiny_chat import CHAT_ROWS, build_tiny_llama, ranked_row

RANKED = [
    {k: v for k, v in ranked_row(seed, count).items() if k != "scores"} for seed, count in enumerate([3, 5, 1, 4])
]


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHAT_ROWS))
    return str(path)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base_folder, rows_path):
    """An adapter of two steps on a 4-bit base, computed in fp32."""
    folder = tmp_path_factory.mktemp("adapter")
    words = train_words(base_folder, rows_path, folder)
    assert main([*words, "--dtype", "float32", "--bf16", "false", "--learning_rate", "1e-2", "--beta", "0.5"]) == 0
    return str(folder)


@pytest.fixture(scope="module")
def scorer(adapter):
    return load_scorer(adapter)


def scored(scorer, rows, **options):
    return list(score_completions(scorer, rows, **options))


def test_memory_that_runs_out_names_the_batch_size(scorer, monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("qlora_dpo.forward._score_part", full)
    with pytest.raises(OutOfMemoryError, match=r"while rows were scored, got: CUDA out of.*smaller `batch_size`"):
        scored(scorer, RANKED)


def naive_logps(policy, tokenizer, prompt, completion):
    """Policy and base log-probability of one completion, from its own forward."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        whole = tokenizer(f"{prompt}{completion}{tokenizer.eos_token}")["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*prompt, *completion], return_dict=False)
    assert whole[: len(ids)] == ids
    with torch.no_grad():
        pi = completion_logps(policy, ids, [whole[len(ids) :]]).item()
        with policy.disable_adapter():
            return pi, completion_logps(policy, ids, [whole[len(ids) :]]).item(), len(whole) - len(ids)


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_rewards_are_those_of_one_sequence_at_a_time(scorer, tokenizer, kind):
    sides = [row | {"completions": [row["rejected"], row["chosen"]]} for row in CHAT_ROWS[:4]]
    rows = RANKED if kind == "text" else sides
    found = scored(scorer, rows)
    assert scorer.layout == "tree"
    for row, line in zip(rows, found, strict=True):
        for i, completion in enumerate(row["completions"]):
            pi, ref, tokens = naive_logps(scorer.policy, tokenizer, row["prompt"], completion)
            assert line["logps"][i] == pytest.approx(pi, rel=1e-5)
            assert line["reference_logps"][i] == pytest.approx(ref, rel=1e-5)
            assert line["rewards"][i] == pytest.approx(0.5 * (pi - ref), abs=1e-4)
            assert line["tokens"][i] == tokens
        assert {name: line[name] for name in row} == row
        assert "margin" not in line
    assert max(abs(reward) for line in found for reward in line["rewards"]) > 0.01


def test_margins_are_those_of_evaluate(scorer, adapter, rows_path, tmp_path):
    words = ["evaluate", "--adapter", adapter, "--dataset_name", rows_path, "--output_dir", str(tmp_path)]
    assert main([*words, "--report_to", "none", "--disable_tqdm", "true"]) == 0
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    expected = {pair["row"]: pair["margin"] for pair in pairs}
    found = scored(scorer, load_rows(rows_path))
    assert [line["margin"] for line in found] == pytest.approx([expected[i] for i in range(12)], abs=1e-4)
    assert all(line["margin"] == line["rewards"][0] - line["rewards"][1] for line in found)


def test_trained_biases_are_scored_as_evaluate_scores_them(tokenizer, chat_rows, tmp_path):
    """In fp32 over 4-bit layers in bf16, which round a bias to it, in place, if they are let."""
    build_tiny_llama(tokenizer, attention_bias=True, mlp_bias=True).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules="all-linear", bias="all", task_type="CAUSAL_LM")
    policy = moved(load_policy(str(tmp_path / "base"), peft_config=config))
    args = QLoRADPOConfig(output_dir=str(tmp_path / "out"), report_to=[], reference="none", loss_type="simpo", beta=1.0)
    trainer = QLoRADPOTrainer(policy, args=args, eval_dataset=chat_rows, processing_class=tokenizer)
    trainer.evaluate()
    trainer.save_model()
    found = [row["logps"] for row in scored(load_scorer(args.output_dir), chat_rows)]
    for side, place in (("chosen", 0), ("rejected", 1)):
        assert [logps[place] for logps in found] == pytest.approx(trainer.last_pairs.column(f"logps_{side}"), abs=1e-3)


def test_the_mixed_precision_of_training_is_used(base_folder, rows_path, tmp_path):
    """With bf16 autocast the trained margins come out again: as computed in training, not in another arithmetic."""
    assert main([*train_words(base_folder, rows_path, tmp_path), "--dtype", "bfloat16", "--bf16", "true"]) == 0
    pairs = [json.loads(line) for line in (tmp_path / "evaluation/after/pairs.jsonl").read_text().splitlines()]
    found = scored(load_scorer(str(tmp_path)), CHAT_ROWS[8:])
    for pair in pairs:
        line = found[pair["row"]]
        assert line["logps"] == pytest.approx([pair["logps_chosen"], pair["logps_rejected"]], abs=1e-3)


def test_rewards_do_not_depend_on_the_batch_size(scorer):
    rows = [*RANKED, *CHAT_ROWS]
    alone, threes, eights = (scored(scorer, rows, batch_size=size) for size in (1, 3, 8))
    for one, three, eight in zip(alone, threes, eights, strict=True):
        assert one["rewards"] == pytest.approx(three["rewards"], abs=1e-4)
        assert one["rewards"] == pytest.approx(eight["rewards"], abs=1e-4)
        assert one.keys() == three.keys() == eight.keys()


def test_the_ranking_is_best_first_and_ties_in_input_order(scorer):
    texts = RANKED[1]["completions"][:3]
    row = RANKED[1] | {"completions": [texts[0], texts[1], texts[0], texts[2], texts[1]]}
    (line,) = scored(scorer, [row])
    rewards, ranking = line["rewards"], line["ranking"]
    assert rewards[0] == rewards[2]
    assert rewards[1] == rewards[4]
    assert [rewards[i] for i in ranking] == sorted(rewards, reverse=True)
    assert ranking.index(0) + 1 == ranking.index(2)
    assert ranking.index(1) + 1 == ranking.index(4)


def test_equal_completions_are_scored_once(scorer, monkeypatch):
    seen = []
    monkeypatch.setattr(
        score, "score_batch", lambda m, b, real=score.score_batch: seen.append(b["lengths"]) or real(m, b)
    )
    (line,) = scored(scorer, [{"prompt": "the cat", "completions": [" sees"] * 3}])
    assert len(seen[-1]) == 1
    assert len(set(line["rewards"])) == 1
    assert line["ranking"] == [0, 1, 2]
    (pair,) = scored(scorer, [{"prompt": "the cat", "chosen": " sees", "rejected": " sees"}])
    assert pair["margin"] == 0


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        (RANKED[1], {"max_length": 6}, "must have at most 6 tokens together, got"),
        ({"prompt": "the " * 600, "completions": [" cat"]}, {}, "must have at most 512 tokens together, got 60"),
        ({"prompt": "the", "completions": []}, {}, r"list of one or more, got \[\]"),
        ({"prompt": "the"}, {}, "must have the columns"),
        ({"chosen": "the cat", "rejected": "a dog"}, {}, "do not begin with the same"),
        ({"prompt": "the", "completions": [[{"role": "assistant", "content": "cat"}]]}, {}, "text or all be messages"),
    ],
)
def test_a_row_that_cannot_be_scored_says_why_and_the_others_are_scored(scorer, row, options, reason):
    short = {"prompt": "the", "completions": [" cat"]}
    first, line, last = scored(scorer, [short, row, short | {"error": "of an earlier time"}], **options)
    assert line.keys() == {*row, "error"}
    assert re.search(reason, line["error"])
    assert first["rewards"] == last["rewards"]
    assert "error" not in last


def test_a_batch_without_a_row_that_can_be_scored_is_no_forward(scorer):
    lines = scored(scorer, [{"prompt": "the"}] * 3, batch_size=2)
    assert all("error" in line for line in lines)


def test_rows_are_taken_as_they_are_needed(scorer):
    taken = []
    rows = (taken.append(i) or RANKED[0] for i in range(100))
    next(score_completions(scorer, rows, batch_size=2))
    assert len(taken) == 2


# ---- references ------------------------------------------------------------------------------------------------------


def test_a_continued_adapter_is_scored_against_its_start(adapter, base_folder, rows_path, tmp_path):
    words = train_words(base_folder, rows_path, tmp_path / "again")
    words[words.index(base_folder)] = adapter
    assert main([*words, "--dtype", "float32", "--bf16", "false"]) == 0
    scorer = load_scorer(str(tmp_path / "again"))
    assert (scorer.reference.kind, scorer.reference.source) == ("adapter", adapter)
    start = scored(load_scorer(adapter), CHAT_ROWS)
    found = scored(scorer, CHAT_ROWS)
    for line, expected in zip(found, start, strict=True):
        assert line["reference_logps"] == pytest.approx(expected["logps"], rel=1e-5)
        assert line["logps"] != pytest.approx(expected["logps"], rel=1e-5)
    other = scored(load_scorer(str(tmp_path / "again"), "base"), CHAT_ROWS[:1])
    assert other[0]["reference_logps"] == pytest.approx(start[0]["reference_logps"], rel=1e-5)


def test_without_a_reference_the_reward_is_beta_log_pi(adapter):
    (line,) = scored(load_scorer(adapter, "none"), RANKED[:1])
    assert line["rewards"] == pytest.approx([0.5 * value for value in line["logps"]])


def test_a_model_of_its_own_may_be_the_reference(adapter, base_folder, scorer):
    (line,) = scored(load_scorer(adapter, base_folder, dtype=torch.float32), RANKED[:1])
    (expected,) = scored(scorer, RANKED[:1])
    assert line["reference_logps"] == pytest.approx(expected["reference_logps"], rel=2e-2)  # 4-bit compute is its own


def test_an_unknown_reference_is_refused(adapter, tmp_path):
    record = json.loads(Path(adapter, "qlora_dpo.json").read_text()) | {"reference": "initial"}
    (tmp_path / "qlora_dpo.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"in memory only\. Name it, or another, with --reference"):
        load_scorer(str(tmp_path))


@pytest.mark.parametrize("asked", ["auto", "initial", "adapter"])
def test_the_trained_policy_is_never_its_own_reference(adapter, asked):
    with pytest.raises(ValueError, match=f"`reference` must be 'base', 'none' or a path or id, got '{asked}'"):
        load_scorer(adapter, asked)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch, scorer):
    """Rows that were scored, by call, and after how many calls to be killed."""
    state = {"sizes": [], "calls": None}
    real = score._scored

    def scored_or_killed(scorer, rows, max_length):
        if state["calls"] is not None and len(state["sizes"]) == state["calls"]:
            raise KeyboardInterrupt
        state["sizes"].append(len(rows))
        return real(scorer, rows, max_length)

    monkeypatch.setattr(score, "_scored", scored_or_killed)
    monkeypatch.setattr(score, "load_scorer", lambda adapter, reference: scorer)
    return state


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def expected_lines(scorer):
    return [{"row": i} | line for i, line in enumerate(score_completions(scorer, CHAT_ROWS, batch_size=5))]


def same(found, expected):
    assert [line["row"] for line in found] == [line["row"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one["rewards"] == pytest.approx(other["rewards"], abs=1e-4)


def test_a_file_is_scored_line_by_line(adapter, scorer, rows_path, tmp_path):
    target = str(tmp_path / "scored.jsonl")
    assert score_file(adapter, rows_path, target, batch_size=5) == 12
    same(lines_of(target), expected_lines(scorer))
    assert score_file(adapter, rows_path, target) == 0


@pytest.mark.parametrize("cut", [0, 30, "all"], ids=["between batches", "in a line", "behind a lost file"])
@pytest.mark.parametrize("progress", [True, False])
def test_a_killed_run_goes_on_without_scoring_twice(counted, scorer, rows_path, tmp_path, cut, progress):
    target = tmp_path / "scored.jsonl"
    expected = expected_lines(scorer)
    counted["sizes"].clear()
    counted["calls"] = 2
    with pytest.raises(KeyboardInterrupt):
        score_file("a", rows_path, str(target), batch_size=4)
    counted["calls"] = None
    data = target.read_bytes()
    target.write_bytes(b"" if cut == "all" else data[: len(data) - cut])
    lost = {0: 0, 30: 1, "all": 8}[cut]
    if not progress:
        Path(f"{target}.progress").unlink()
    assert score_file("a", rows_path, str(target), batch_size=3) == 4 + lost
    assert sum(counted["sizes"]) == 12 + lost
    same(lines_of(target), expected)


def test_rows_below_the_margin_are_left_out_and_not_scored_again(counted, scorer, rows_path, tmp_path):
    target = tmp_path / "kept.jsonl"
    expected = expected_lines(scorer)
    floor = sorted(line["margin"] for line in expected)[6] - 1e-3
    counted["sizes"].clear()
    for calls in (1, 2, None):
        counted["calls"] = calls
        try:
            score_file("a", rows_path, str(target), batch_size=4, min_margin=floor)
        except KeyboardInterrupt:
            assert calls is not None
    assert counted["sizes"] == [4, 4, 4]
    same(lines_of(target), [line for line in expected if line["margin"] >= floor])
    assert 6 <= len(lines_of(target)) < 12
    assert score_file("a", rows_path, str(target), min_margin=floor) == 0


def test_rows_without_a_margin_are_never_left_out(counted, tmp_path):
    source, target = tmp_path / "rows.jsonl", tmp_path / "kept.jsonl"
    source.write_text("\n".join(["", json.dumps(RANKED[0]), "", json.dumps({"prompt": "the"}), "", ""]))
    assert score_file("a", str(source), str(target), min_margin=1e9) == 1
    first, second = lines_of(target)
    assert (first["row"], second["row"]) == (1, 3)
    assert row_errors(str(target)) == [f"row 3: {second['error']}"]
    assert score_file("a", str(source), str(target), min_margin=1e9) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "nowhere.jsonl"}, "`source` must be a .jsonl file, got nowhere.jsonl"),
        ({"batch_size": 0}, "`batch_size` must be 1 or more, got 0"),
        ({"min_margin": 0.5}, "`min_margin` must be that of the first time"),
        ({"reference": "none"}, "`reference` must be that of the first time"),
        ({"adapter": "b"}, "`adapter` must be that of the first time"),
    ],
)
def test_other_work_on_the_same_target_is_refused(counted, rows_path, tmp_path, options, message):
    asked = {"adapter": "a", "source": rows_path, "target": str(tmp_path / "scored.jsonl")}
    score_file(**asked)
    before = Path(asked["target"]).read_bytes()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        score_file(**(asked | options))
    assert Path(asked["target"]).read_bytes() == before


@pytest.mark.parametrize("text", ["notes", "notes\n", '{"prompt": "a"}\n', "3\nhalf"])
def test_a_file_that_was_not_written_here_is_left_alone(counted, rows_path, tmp_path, text):
    target = tmp_path / "notes.txt"
    target.write_text(text)
    with pytest.raises(ValueError, match="`target` must be new or written by `score_file`"):
        score_file("a", rows_path, str(target))
    assert target.read_text() == text


def test_a_mistake_before_the_first_row_does_not_bind_the_target(adapter, rows_path, tmp_path):
    target = str(tmp_path / "scored.jsonl")
    with pytest.raises(FileNotFoundError, match="must be a folder or a Hub id"):
        score_file(f"{adapter}-typo", rows_path, target)
    assert score_file(adapter, rows_path, target) == 12


def test_a_file_is_never_scored_into_itself(counted, rows_path):
    before = Path(rows_path).read_bytes()
    with pytest.raises(ValueError, match="`target` must be another file than `source`"):
        score_file("a", rows_path, rows_path)
    assert Path(rows_path).read_bytes() == before


def test_a_line_that_is_no_row_is_named(counted, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(RANKED[0]) + '\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"Line 2 of .* must be a JSON object, got .* Correct it"):
        score_file("a", str(source), str(tmp_path / "scored.jsonl"))


def test_rewards_of_an_adapter_that_was_trained_again_are_not_gone_on_with(base_folder, rows_file, tmp_path):
    run, target = tmp_path / "run", tmp_path / "out.jsonl"
    assert main(train_words(base_folder, rows_file, run)) == 0
    assert score_file(str(run), rows_file, str(target)) == 12
    weights = run / "adapter_model.safetensors"
    save_file({name: 50 * tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="`weights` must be that of the first time"):
        score_file(str(run), rows_file, str(target))


def test_half_an_emoji_is_the_error_of_its_row_alone(adapter, tmp_path):
    row = {"prompt": "the cat", "chosen": " sees", "rejected": " finds"}
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in (row, row | {"chosen": " \ud83d"}, row)))
    assert score_file(adapter, str(source), str(target), batch_size=1) == 2
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert ["error" in line for line in lines] == [False, True, False]
    assert lines[1]["chosen"] == " \ud83d"


def test_a_source_that_was_changed_is_not_gone_on_with_and_one_that_grew_is(counted, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps(row | {"id": i}) + "\n" for i, row in enumerate(RANKED)]
    source.write_text("".join(lines[:2]))
    assert score_file("a", str(source), str(target)) == 2
    source.write_text("".join(lines))
    score_file("a", str(source), str(target))
    assert len(target.read_text().splitlines()) == len(RANKED)
    source.write_text("".join(reversed(lines)))
    with pytest.raises(ValueError, match="`source` must begin with the 4 lines that "):
        score_file("a", str(source), str(target))
