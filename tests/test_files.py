"""Rows from files: read as they were written, and faults named with their place."""

import codecs
import json
import re

import pytest
from datasets import Dataset

from qlora_dpo.files import load_rows
from qlora_dpo.preferences import parse_row

from tiny_chat import chat_row


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_local_files_are_read(tmp_path, suffix):
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    path = str(tmp_path / f"rows.{suffix}")
    {"jsonl": rows.to_json, "json": rows.to_json, "parquet": rows.to_parquet, "csv": rows.to_csv}[suffix](path)
    assert load_rows(path, "train[:2]").to_list() == rows.select([0, 1]).to_list()


def test_a_path_that_is_not_there_is_refused(tmp_path):
    for path in (str(tmp_path / "no.jsonl"), "./nowhere", "no.parquet"):
        with pytest.raises(FileNotFoundError, match="Check the path"):
            load_rows(path)


def test_an_unknown_file_type_is_refused(tmp_path):
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ValueError, match="Convert it"):
        load_rows(str(tmp_path / "rows.txt"))


@pytest.mark.parametrize("row", ['{"prompt":', "[1]", "}"])
@pytest.mark.parametrize("first", [True, False])
def test_a_line_that_is_no_row_is_named_with_its_file(tmp_path, row, first):
    path, good = tmp_path / "rows.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}'
    path.write_text("\n".join([row, good] if first else [good, "", good, row, good]))
    message = re.escape(f"Line {1 if first else 4} of {path} must be a JSON object, got {row.encode()!r}")
    for name in (path, tmp_path):
        with pytest.raises(ValueError, match=message):
            load_rows(str(name))


def test_a_fault_in_a_list_of_rows_is_named_with_its_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n{"prompt": "a", "chosen": "b", "rejected": "c"},\n{"prompt": "a" "chosen": "b"}]')
    with pytest.raises(ValueError, match=f"Line 3 of {re.escape(str(path))} must be JSON, got: Expecting ','"):
        load_rows(str(path))


def test_a_file_whose_rows_cannot_be_read_is_named_with_the_reason(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\na,b,c,d\n")
    with pytest.raises(
        ValueError, match=f"The data set {re.escape(str(path))} must be rows of one form, got: .* line 3"
    ):
        load_rows(str(path))


def test_a_file_has_no_configuration(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(chat_row(0)) + "\n")
    with pytest.raises(ValueError, match="must be loaded without a configuration, got 'hard'"):
        load_rows(str(path), name="hard")


@pytest.mark.parametrize("as_list", [False, True])
def test_dates_stay_text(tmp_path, as_list):
    """A reader of JSON that finds nothing but dates in a column makes times of them."""
    rows = [
        {"prompt": f"When was {i}?", "chosen": f"2024-05-{i + 1:02}", "rejected": "2024-06-01T10:00:00"}
        for i in range(6)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows)))
    assert load_rows(str(path)).to_list() == rows
    assert load_rows(str(path), "train[1:3]").to_list() == rows[1:3]


def test_dates_in_messages_stay_text(tmp_path):
    rows = [chat_row(i) | {"chosen": [{"role": "assistant", "content": f"2024-05-{i + 1:02}"}]} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [row["chosen"][0]["content"] for row in load_rows(str(path))] == ["2024-05-01", "2024-05-02", "2024-05-03"]


def csv_rows(path, rows):
    Dataset.from_list(rows).to_csv(str(path))
    return load_rows(str(path)).to_list()


def test_what_pandas_takes_for_no_value_is_text_in_a_csv_file(tmp_path):
    rows = [{"prompt": "NA", "chosen": "None", "rejected": "null"}, {"prompt": "a", "chosen": "nan", "rejected": "b"}]
    assert csv_rows(tmp_path / "rows.csv", rows) == rows


def test_an_empty_number_in_a_csv_file_is_none(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "weights": weight} for weight in (0.5, None)]
    assert [parse_row(row).pair_values for row in csv_rows(tmp_path / "rows.csv", rows)] == [{"weights": [0.5]}, {}]


def test_messages_in_a_csv_file_are_messages(tmp_path):
    rows = [{name: json.dumps(text) for name, text in chat_row(i).items()} for i in range(3)]
    assert csv_rows(tmp_path / "rows.csv", rows) == [chat_row(i) for i in range(3)]


def test_a_text_among_messages_of_a_csv_file_is_named(tmp_path):
    rows = [
        {name: json.dumps(text) for name, text in chat_row(0).items()},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    with pytest.raises(ValueError, match="`prompt` must be JSON where it is text, got 'a'"):
        csv_rows(tmp_path / "rows.csv", rows)


def test_a_date_in_one_column_leaves_the_others_as_they_are(tmp_path):
    """Also those that the first row lacks, a mark at the beginning of the file, and every row of `all`."""
    rows = [
        {"prompt": "When?", "chosen": f"2024-05-0{i + 1}", "rejected": "never", "timestamp_text": "x"} for i in range(3)
    ]
    rows[1] |= {"weights": 0.5, "subset": "dates"}
    path = tmp_path / "rows.json"
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(rows).encode())
    for split in ("train", "all"):
        found = load_rows(str(path), split)
        assert found["chosen"] == ["2024-05-01", "2024-05-02", "2024-05-03"]
        assert (found["weights"], found["subset"]) == ([None, 0.5, None], [None, "dates", None])


def test_no_number_in_a_csv_file_may_be_written_as_other_programs_do(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected,weights,offsets\na,NA,c,0.5,1\na,b,c,NA,NaN\n")
    parsed = [parse_row(row) for row in load_rows(str(path))]
    assert parsed[0].completions == ["NA", "c"]
    assert [one.pair_values for one in parsed] == [{"weights": [0.5], "offsets": [1.0]}, {}]


def test_numbers_and_truth_values_are_texts_in_a_csv_file(tmp_path):
    rows = [
        {"prompt": "1", "chosen": "007", "rejected": "True", "subset": "01"},
        {"prompt": "2", "chosen": "1.50", "rejected": "False", "subset": "02"},
    ]
    assert csv_rows(tmp_path / "rows.csv", rows) == rows


def test_messages_in_a_csv_file_are_told_by_the_first_that_is_there(tmp_path):
    rows = [{name: json.dumps(text) for name, text in chat_row(i).items()} for i in range(2)]
    found = csv_rows(tmp_path / "rows.csv", [rows[0] | {"prompt": None}, rows[1]])
    assert [row["prompt"] for row in found] == [None, chat_row(1)["prompt"]]


@pytest.mark.parametrize("cells", [("1", "0.5"), ("", "7.5")])
@pytest.mark.parametrize("column", ["weights", "subset"])
def test_a_column_of_a_csv_file_is_known_by_all_its_rows(tmp_path, column, cells):
    """Whole numbers, or nothing, in the first 10,000 decided, and the file was refused for what came later."""
    first, last = (f"a,b,c,{cell}\n" for cell in cells)
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,chosen,rejected,{column}\n" + 10_001 * first + last)
    assert [str(value) for value in load_rows(str(path))[column][-2:]] == [
        {"weights1": "1.0", "subset1": "1"}.get(column + cells[0], "None"),
        cells[1],
    ]


def test_an_empty_list_in_a_csv_file_does_not_make_messages_of_texts(tmp_path):
    rows = [{"prompt": "Nothing?", "chosen": text, "rejected": "None"} for text in ("[]", "b")]
    assert csv_rows(tmp_path / "texts.csv", rows) == rows
    messages = [{name: json.dumps(text) for name, text in chat_row(i).items()} for i in range(2)]
    found = csv_rows(tmp_path / "messages.csv", [messages[0] | {"prompt": "[]"}, messages[1]])
    assert [row["prompt"] for row in found] == [[], chat_row(1)["prompt"]]


def test_a_folder_of_csv_files_is_read_like_one(tmp_path):
    """Messages of a folder were trained on as the text of their JSON, and `None` was no text."""
    for name, rows in {
        "texts": [{"prompt": "None", "chosen": "7", "rejected": "NA"}],
        "messages": [{column: json.dumps(text) for column, text in chat_row(0).items()}],
    }.items():
        (tmp_path / name).mkdir()
        alone = csv_rows(tmp_path / name / "train.csv", rows)
        assert load_rows(str(tmp_path / name)).to_list() == alone
    assert alone == [chat_row(0)]


def test_dates_in_a_folder_are_refused_with_the_way_to_keep_them_as_text(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "When?", "chosen": "2024-05-01", "rejected": "never"}))
    with pytest.raises(
        ValueError, match=r"`chosen` must be text, got dates in the files of .* Name the file by itself"
    ):
        load_rows(str(tmp_path))


@pytest.mark.parametrize(("text", "split"), [("", "train"), ("a,b,c\n" * 3, "train[:1%]")])
def test_a_split_without_rows_is_named(tmp_path, text, split):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\n" + text)
    with pytest.raises(ValueError, match=rf"must have rows, got none in {re.escape(repr(split))} of .*rows.csv"):
        load_rows(str(path), split)


def test_a_folder_of_save_to_disk_and_a_damaged_file_are_named(tmp_path):
    Dataset.from_list([chat_row(0)]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"which `save_to_disk` wrote\. Write the rows with `to_parquet`"):
        load_rows(str(tmp_path / "saved"))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"rows.parquet must be rows of one form, got: Parquet .* Correct it"):
        load_rows(str(tmp_path / "rows.parquet"))
