"""Texts in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedperfix.data import DataError, load_dataset
from fedperfix.train import main

ROWS = [
    ("the cat, at home", "b", "north", "1"),
    ('a "quoted" dog\nover two lines', "a", "south", "1"),
    ("the cat", "b", "north", "2"),
]
KEYS = ("text", "label", "domain", "group")


def table(rows: list[tuple[str, ...]], delimiter: str) -> str:
    quoted = (['"' + value.replace('"', '""') + '"' for value in row] for row in rows)
    return "\n".join([delimiter.join(KEYS), *map(delimiter.join, quoted)]) + "\n"


def write(folder: Path, suffix: str) -> Path:
    file = folder / f"mail{suffix}"
    if suffix == ".jsonl":
        text = "".join(json.dumps(dict(zip(KEYS, row, strict=True))) + "\n" for row in ROWS)
    else:
        text = table(ROWS, "\t" if suffix == ".tsv" else ",")
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_the_same_texts_in_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    dataset = load_dataset("texts", write(tmp_path, suffix))
    assert (dataset.name, dataset.class_names, dataset.domain_names) == ("mail", ("a", "b"), ("north", "south"))
    assert dataset.labels.tolist() == [1, 0, 1]
    assert dataset.domains.tolist() == [0, 1, 0]
    assert dataset.groups.tolist() == [0, 0, 1]
    # cat and the appear twice and come first, then the words that appear once, in the alphabet's order
    words = ["cat", "the", "a", "at", "dog", "home", "lines", "over", "quoted", "two"]
    ids = {word: number for number, word in enumerate(words, start=2)}
    assert dataset.inputs[0, :5].tolist() == [ids["the"], ids["cat"], ids["at"], ids["home"], 0]
    assert dataset.inputs.shape == (3, 64)


def test_labels_that_are_numbers_keep_their_order(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({"text": "word", "label": n}) + "\n" for n in (10, 9, 100)))
    dataset = load_dataset("texts", file)
    assert dataset.class_names == ("9", "10", "100")
    assert dataset.labels.tolist() == [1, 0, 2]


def test_a_text_without_words_is_left_out_and_listed(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("text,label\nyes,0\n...,1\nno,1\n")
    dataset = load_dataset("texts", file)
    assert len(dataset.labels) == 2
    assert dataset.skipped == ("line 3: no word",)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.csv", b"text,label\na\n", r"x\.csv: line 2 has 1 fields, the header has 2"),
        ("x.csv", b"text,class\na,b\n", r"x\.csv: line 1 lacks label; takes the columns text, label and perhaps"),
        ("x.csv", b"text,label,text\na,b,c\n", r"line 1 names a column twice"),
        ("x.csv", b"text,label,when\na,b,c\n", r"line 1 has unknown columns when"),
        ("x.csv", b"text,label\na,\n", r"line 2 has no label; give one or leave the line out"),
        ("x.csv", b"text,label\n", r"x\.csv: holds no texts"),
        ("x.csv", b"", r"line 1 lacks text, label"),
        ("x.csv", b"text,label\n\xff\xfe,a\n", r"x\.csv: 'utf-8' codec can't decode"),
        ("x.csv", b'text,label\n"a,b\n', r"x\.csv: unexpected end of data"),
        ("x.csv", b"text,label\n...,b\n", r"x\.csv: has no text with a word in it"),
        ("x.jsonl", b'{"text": "a", "label": 0}\n{"text": "a"\n', r"line 2 is not JSON; takes one object per line"),
        ("x.jsonl", b"[1]\n", r"line 1 is not an object"),
        ("x.jsonl", b'{"text": "a", "label": 0}\n{"text": "a"}\n', r"line 2 has the keys text, line 1 label, text"),
        ("x.jsonl", b'{"text": 3, "label": 0}\n', r"line 1: text is 3, takes a text$"),
        ("x.jsonl", b'{"text": "a", "label": true}\n', r"label is True, takes a text or a whole number"),
        ("x.txt", b"a", r"x\.txt', takes the path of a \.csv, \.tsv or \.jsonl file"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load_dataset("texts", file)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data-dir: not given, --dataset texts takes the path"):
        load_dataset("texts")
    with pytest.raises(DataError, match="which is not a file"):
        load_dataset("texts", tmp_path)


def test_training_on_a_file_of_texts(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mail.csv"
    lines = [
        f"{'sun and rain' if n % 2 else 'bread and wine'} {n},{'weather' if n % 2 else 'food'}" for n in range(40)
    ]
    file.write_text("\n".join(["text,label", *lines]) + "\n")
    options = "--dataset texts --clients 2 --sampled 1 --rounds 1 --partition iid --precision fp32 --device cpu"
    assert main([*options.split(), "--data-dir", str(file)]) == 0
    out = capsys.readouterr().out
    assert "texts/s" in out
    assert "images/s" not in out
    assert "text-mini" in out
