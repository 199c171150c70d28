"""The page of a run: what it shows, that it is sound HTML, and what it says of a run folder with parts missing."""

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from qlora_dpo.charts import Line, draws_words, histogram, line_chart
from qlora_dpo.measures import Pairs
from qlora_dpo.preference_report import preference_report
from qlora_dpo.record import weights_hash
from qlora_dpo.report import write_pictures, write_report

EVIL = 'x</details></div><script>alert("1")</script>&amp;\x00\ud800'
VOID = {"meta", "br"}


@pytest.fixture(autouse=True)
def _a_font(monkeypatch):
    """Reports are of runs, not of the fonts of the machine."""
    monkeypatch.setattr("qlora_dpo.report.draws_words", lambda: True)


def history(steps=5):
    lines = []
    for step in range(steps):
        shared = {"rewards/accuracies": 0.5 + step / 20, "rewards/margins": step / 4}
        for side, sign in (("chosen", 1), ("rejected", -1)):
            shared |= {f"rewards/{side}": sign * step / 8, f"logps/{side}": -30.0 + sign * step}
        lines.append({"step": step, "loss": 0.69 - step / 20} | shared)
        evaluated = {"loss": 0.68, "kl/chosen": step / 100, "kl/rejected": step / 90} | shared
        lines.append({"step": step} | {f"eval_{key}": value for key, value in evaluated.items()})
    return [*lines, {"step": steps, "train_loss": 0.5, "train_runtime": 12.5}]


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def save_evaluation(folder, scale):
    rewards = scale * np.random.default_rng(0).normal(0.5, 1.0, 60)
    tokens = np.arange(60) % 7 + 3
    pairs = Pairs(
        row=np.arange(60),
        reward_chosen=rewards,
        reward_rejected=-rewards,
        logps_chosen=rewards - 20,
        logps_rejected=-rewards - 21,
        tokens_chosen=tokens,
        tokens_rejected=tokens[::-1],
        beta=0.1,
        subset=["chat <b>&", "code"] * 30,
        turns=[1, 1, 3] * 20,
    )
    save(folder / "report.json", preference_report(pairs, "held-out").to_dict())
    lines = []
    for row, reward in enumerate(rewards.tolist()):
        line = {"row": row, "pair": 0, "subset": "code", "margin": 2 * reward, "reward_chosen": reward}
        line |= {"reward_rejected": -reward, "tokens_chosen": 5, "tokens_rejected": 6, "prompt": f"prompt {row}"}
        lines.append(json.dumps(line | {"chosen": EVIL, "rejected": "long " * 200 + EVIL}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines) + '{"cut off')


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    save(folder / "trainer_state.json", {"log_history": history(), "global_step": 5, "epoch": 1.0})
    save(folder / "metrics.json", {"train": {"train_runtime": 12.5}})
    quantization = {"bnb_4bit_quant_type": "nf4"}
    record = {
        "base": "some/base",
        "quantization": quantization,
        "reference": "base",
        "loss": {"loss_type": ["sigmoid"]},
    }
    save(folder / "qlora_dpo.json", record | {"beta": 0.1, "max_length": 512})
    save(folder / "adapter_config.json", {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]})
    (folder / "adapter_model.safetensors").write_bytes(b"0" * 1234)
    save_evaluation(folder / "evaluation" / "before", 0.0)
    save_evaluation(folder / "evaluation" / "after", 1.0)
    return folder


class Balance(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.words, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def page_of(run):
    """The page, after all that holds for every page: balanced tags, XML charts, no script, nothing from a network."""
    page = (run / "report.html").read_text(encoding="utf-8") if write_report(str(run)) else ""
    found = Balance()
    found.feed(page)
    found.close()
    assert found.open == []
    assert "script" not in found.seen
    assert "http:" not in page
    assert "https:" not in page
    assert not {name for name, _ in found.attributes} & {"src", "href", "onload", "onclick"}
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        numbers = [value for node in ElementTree.fromstring(svg).iter() for value in node.attrib.values()]
        assert not any(re.search(r"\b(nan|inf)\b", value) for value in numbers)
    return page


def chart(page, title):
    """The figure under a heading, up to its end."""
    return re.search(rf"<figure><h3>{re.escape(title)}</h3>.*?</figure>", page, re.DOTALL)[0]


def test_a_whole_run_has_every_section(run):
    page = page_of(run)
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Result",
        "Curves",
        "Margins and calibration",
        "Accuracy by part, with 95 % intervals",
        "Pairs",
        "What was trained",
    ]
    assert re.findall("<figure><h3>(.*?)</h3>", page) == [
        "Loss",
        "Accuracy",
        "Margin",
        "Rewards",
        "Log-probabilities, nats",
        "KL from the reference, nats per token",
        "Margins",
        "Reliability",
        "Length",
        "Subset",
        "Turns",
    ]


def test_the_headline_is_the_reports_numbers(run):
    page = page_of(run)
    after = json.loads((run / "evaluation" / "after" / "report.json").read_text())
    accuracy = after["accuracy"]
    assert f"0.500 → {accuracy['value']:.3f}" in page
    assert f"after [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" in page
    assert f"0.000 → {after['margin']['mean']:.3f}" in page
    assert f"→ {after['calibration']['ece']:.3f}" in page


def test_a_chart_holds_training_and_evaluation(run):
    assert re.findall("</svg>([^<]*)</li>", chart(page_of(run), "Rewards")) == [
        "training chosen",
        "evaluation chosen",
        "training rejected",
        "evaluation rejected",
    ]


def test_evaluation_sets_are_told_apart_and_the_auxiliary_loss_is_none(run):
    lines = [{"step": 1, "eval_aux_loss": 1.0}]
    lines += [{"step": 1, f"eval_{name}_loss": 0.5, f"eval_{name}_rewards/accuracies": 0.5} for name in ("a", "b_c")]
    save(run / "trainer_state.json", {"log_history": lines})
    assert re.findall("</svg>([^<]*)</li>", chart(page_of(run), "Loss")) == ["evaluation a", "evaluation b_c"]


def test_equal_margins_are_a_line_and_others_shares_that_sum_to_one(run):
    page = page_of(run)
    figure = chart(page, "Margins")
    assert "before: all 60 at 0" in figure
    assert "after, 60 pairs" in figure
    svg = ElementTree.fromstring(re.search("<svg.*?</svg>", figure, re.DOTALL)[0])
    heights = [float(box.attrib["height"]) for box in svg.iter("rect")]
    pairs = [json.loads(line) for line in (run / "evaluation/after/pairs.jsonl").read_text().splitlines()[:-1]]
    span = 1.1 * (max(p["margin"] for p in pairs) - min(p["margin"] for p in pairs))
    width = min(w for w in (0.1, 0.2, 0.5, 1.0) if w >= span / 24)  # 1, 2 or 5 times a power of ten
    counts = np.unique([math.floor(p["margin"] / width) for p in pairs], return_counts=True)[1]
    np.testing.assert_allclose(np.array(heights) / sum(heights), counts / 60, atol=2e-3)


def test_the_most_wrong_and_most_right_pairs_are_shown_in_order(run):
    lines = (run / "evaluation/after/pairs.jsonl").read_text().splitlines()[:-1]
    margins = sorted(json.loads(line)["margin"] for line in lines)
    shown = re.findall(r"<b>margin (.*?)</b>", page_of(run))
    assert shown == [f"{margin:.3f}" for margin in margins[:5] + margins[:-6:-1]]


def test_text_is_escaped_and_long_text_folded(run):
    page = page_of(run)
    assert "<script" not in page
    assert "x&lt;/details&gt;&lt;/div&gt;&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;amp;\ufffd\ufffd" in page
    assert page.count("<details>") == 10  # the rejected completion of each pair
    assert "chat &lt;b&gt;&amp;: " in page


def test_what_was_trained_is_told(run):
    page = page_of(run)
    for text in ("some/base", "bnb_4bit_quant_type: nf4", "loss_type: sigmoid", "512", "q_proj", "1,234 bytes"):
        assert text in page
    assert "12.5 s" in page
    assert re.search(r"torch: \d+\.\d+", page)


def test_speed_and_memory_are_those_of_the_last_log_lines(run):
    state = json.loads((run / "trainer_state.json").read_text())
    assert "speed and memory" not in page_of(run)
    numbers = {"pairs_per_second": 2.5, "tokens_per_second": 1234.5, "peak_memory_gib": 3.25}
    state["log_history"] += [{"step": 99, "pairs_per_second": 1.0}, {"step": 100, **numbers}, {"step": 101}]
    save(run / "trainer_state.json", state)
    assert "2.5 pairs a second, 1.23e+03 unique tokens a second, 3.25 GiB at most" in page_of(run)


def test_the_last_answers_stand_side_by_side(run):
    answers = {"policy": {"greedy": "new <b>", "sampled": "new 2"}, "reference": {"greedy": "old", "sampled": "old 2"}}
    lines = [{"step": 1, "prompt": "early"}, {"step": 2, "prompt": "why?", **answers}, {"step": 2, "prompt": "how?"}]
    (run / "generations.jsonl").write_text("\n".join(map(json.dumps, lines)))
    section = page_of(run).split("<h2>Answers</h2>")[1].split("</section>")[0]
    assert "early" not in section
    assert section.count("<p>step 2</p>") == 2
    order = ["why?", "policy, greedy", "new &lt;b&gt;", "reference, greedy", "old", "policy, sampled", "new 2", "old 2"]
    places = [section.index(text) for text in order]
    assert places == sorted(places)


def test_special_tokens_are_muted_where_the_tokenizer_says_which_they_are(run):
    added = [{"content": "<|end|>", "special": True}, {"content": "<b>", "special": False}]
    line = {"step": 1, "prompt": "<|user|>why?<|end|>", "policy": {"greedy": "<b>so</b><|end|><|end|>" + "x" * 400}}
    save(run / "generations.jsonl", line)
    assert "&lt;|user|&gt;why?&lt;|end|&gt;</span>" in page_of(run)  # nothing is known of any token
    save(run / "tokenizer.json", {"added_tokens": added})
    page = page_of(run)
    assert "<span>&lt;|user|&gt;why?<i>&lt;|end|&gt;</i></span>" in page
    assert page.count("&lt;b&gt;so&lt;/b&gt;<i>&lt;|end|&gt;</i><i>&lt;|end|&gt;</i>xxx") == 2  # folded and whole


@pytest.mark.parametrize("high", [0.062, 0.5, 123.0, 1.2e-7, 34567.0])
def test_no_number_sticks_out_of_a_chart_at_the_right(high):
    """The last tick may lie at the very end of the axis; a digit is up to 6.6 units wide."""
    for values in ([-high / 3, 0.0, high], [0.0, high]):
        svg = ElementTree.fromstring(f"<svg>{histogram({'after': values}).drawing}</svg>")
        ticks = [node for node in svg.iter("text") if node.attrib["text-anchor"] == "middle"]
        assert len(ticks) > 1
        assert all(float(node.attrib["x"]) + 3.3 * len(node.text) <= 360 for node in ticks)


def test_no_rule_runs_through_the_name_of_a_part(run):
    for title in ("Length", "Subset", "Turns"):
        svg = ElementTree.fromstring(re.search("<svg.*?</svg>", chart(page_of(run), title), re.DOTALL)[0])
        names = [float(node.attrib["y"]) for node in svg.iter("text") if "text-anchor" not in node.attrib]
        rules = [node.attrib["d"] for node in svg.iter("path") if node.attrib.get("class") in ("zero", "rule")]
        spans = [(float(a), float(b)) for path in rules for a, b in re.findall(r"M\S+ (\S+?)V([^M]+)", path)]
        assert len(spans) == 3 * len(names) > 0
        assert not [(y, span) for y in names for span in spans if span[0] < y + 3 and span[1] > y - 9]


def test_each_chart_is_a_picture_too(run):
    page = page_of(run)
    pictures = {path.name: path.read_bytes() for path in (run / "charts").iterdir()}
    assert len(pictures) == page.count("<figure>") == 11
    for picture in pictures.values():
        assert picture.startswith(b"\x89PNG")
        assert int.from_bytes(picture[16:20], "big") == 3 * 360


def test_without_the_library_for_pictures_the_page_says_how_to_get_them(run, monkeypatch):
    monkeypatch.setattr("qlora_dpo.report.find_spec", lambda name: None)
    assert "pip install &#x27;qlora-dpo[report]&#x27;" in page_of(run)
    assert not (run / "charts").exists()


def test_a_state_alone_makes_a_page_that_says_what_is_missing(tmp_path):
    save(tmp_path / "trainer_state.json", {"log_history": history()})
    page = page_of(tmp_path)
    assert "No evaluation of this adapter was saved" in page
    for name in ("metrics.json", "qlora_dpo.json", "evaluation/after/report.json", "evaluation/before/pairs.jsonl"):
        assert f"{name} is missing." in page


def test_metrics_stand_in_for_missing_reports(tmp_path):
    save(tmp_path / "trainer_state.json", {"log_history": []})
    save(tmp_path / "metrics.json", {"after": {"eval_rewards/accuracies": 0.625, "eval_rewards/margins": 1.5}})
    page = page_of(tmp_path)
    assert "? → 0.625" in page
    assert "? → 1.500" in page


def test_what_is_of_another_adapter_is_left_out(run):
    """A run that was trained anew in its folder, by a script that evaluates nothing."""
    save(run / "metrics.json", {"after": {"eval_rewards/accuracies": 0.9}, "adapter_sha256": weights_hash(str(run))})
    assert "Accuracy by part" in page_of(run)
    (run / "adapter_model.safetensors").write_bytes(b"1" * 1234)
    page = page_of(run)
    assert "No evaluation of this adapter was saved" in page
    assert "metrics.json and evaluation/ are of another run, whose adapter was written over." in page
    assert not re.search("Accuracy by part|Most wrong|0.900", page)


@pytest.mark.parametrize("of_these", [True, False])
def test_a_later_evaluation_of_the_adapter_is_the_one_after_training(run, of_these):
    shutil.rmtree(run / "evaluation")
    save_evaluation(run / "evaluations" / "other", 1.0)
    weights = weights_hash(str(run)) if of_these else "0"
    save(run / "evaluations" / "other" / "metrics.json", {"adapter_sha256": weights})
    page = page_of(run)
    assert ("after: held-out" in page) == ("Most right, after training" in page) == of_these


def test_what_a_training_recorded_stands_in_for_reports(run):
    shutil.rmtree(run / "evaluation")
    accuracy = {"value": 0.75, "low": 0.5, "high": 0.9, "count": 12, "method": "wilson"}
    record = json.loads((run / "qlora_dpo.json").read_text())
    evaluation = {"accuracy": accuracy, "margin": 0.25, "pairs": 12}
    save(run / "qlora_dpo.json", record | {"evaluations": {"eval_chats": evaluation}})
    page = page_of(run)
    assert "eval_chats: accuracy 0.750 [0.50, 0.90], margin 0.250, 12 pairs" in page
    assert "`qlora-dpo evaluate --adapter` on this folder adds calibration" in page


@pytest.mark.parametrize("text", ["{", "[1]", '{"name": 1}'])
def test_broken_parts_are_named_and_left_out(run, text):
    for name in ("metrics.json", "evaluation/after/report.json"):
        (run / name).write_text(text)
    page = page_of(run)
    assert "evaluation/after/report.json is no report of this version." in page
    assert ("metrics.json is not a JSON object." in page) == (text != '{"name": 1}')


def test_values_that_are_not_finite_break_a_curve_and_are_counted(run):
    values = [1.0, math.nan, 3.0, 4.0, math.inf, None]
    save(run / "trainer_state.json", {"log_history": [{"step": i, "loss": v} for i, v in enumerate(values)]})
    figure = chart(page_of(run), "Loss")
    assert "3 values not finite" in figure
    curve = max(re.findall(r'd="([^"]*)"', figure), key=lambda path: path.count(" "))
    assert re.sub("[^ML]", "", curve) == "MML"
    assert figure.count("<circle") == 1  # the first value has no neighbour


@pytest.mark.parametrize("value", [0.0, 0.7, -1e9, 1e-12, math.nan])
def test_a_curve_of_one_point_is_drawn(run, value):
    save(run / "trainer_state.json", {"log_history": [{"step": 1, "loss": value}]})
    assert chart(page_of(run), "Loss").count("<circle") == math.isfinite(value)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`run_dir` must be a folder, got .*none\. Pass the `output_dir`"):
        write_report(str(tmp_path / "none"))


def test_a_folder_without_a_state_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"must hold trainer_state\.json, got .* without it\. Name the `output_dir`"
    ):
        write_report(str(tmp_path))


@pytest.mark.parametrize(("text", "got"), [("{", "no JSON object"), ("{}", "NoneType as `log_history`")])
def test_a_state_without_a_history_is_refused(tmp_path, text, got):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match=f"`run_dir` must hold .*, got {got}. Name the"):
        write_report(str(tmp_path))


def test_what_was_trained_leaves_out_what_only_serves_a_resume(run):
    record = json.loads((run / "qlora_dpo.json").read_text())
    record |= {"run": {"groups_per_step": 8}, "evaluations": {"eval": {"ties": 0.25}}, "bco_delta": 0.0, "licence": {}}
    save(run / "qlora_dpo.json", record | {"base_revision": None, "quantization": {"skip": None, "kind": "nf4"}})
    paths = [f"model.layers.{layer}.mlp.{name}" for layer in range(3) for name in ("up_proj", "down_proj")]
    save(run / "adapter_config.json", {"r": 16, "lora_alpha": 32, "target_modules": paths})
    page = page_of(run)
    facts = page[page.index("What was trained") :]
    for absent in ("groups_per_step", "evaluations", "bco delta", "licence", "base revision", "skip", "layers.0"):
        assert absent not in facts, absent
    assert "target_modules: down_proj, up_proj<br>" in facts
    assert "kind: nf4" in facts


def test_the_words_of_a_picture_are_drawn():
    """A family that the renderer does not know is no text at all, and no error."""
    pytest.importorskip("resvg_py")
    if not draws_words():
        pytest.skip("no font is installed")
    chart = line_chart("Loss", [Line("train", [(1, 2.0), (2, 1.0)], 0, 0)])
    without_numbers = re.sub(r"<text.*?</text>", "", chart.drawing)
    for less in (replace(chart, title=""), replace(chart, drawing=without_numbers)):
        assert less.png() != chart.png()


def test_pictures_without_words_are_said(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    monkeypatch.setattr("qlora_dpo.report.draws_words", lambda: False)
    (note,) = write_pictures(tmp_path / "charts", [line_chart("Loss", [Line("train", [(1, 2.0)], 0, 0)])])
    assert "install a font" in note
    assert (tmp_path / "charts" / "loss.png").is_file()
