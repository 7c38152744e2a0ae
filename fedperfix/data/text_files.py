"""Texts in one file, a table or JSON Lines, as a data set."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import numpy as np

from fedperfix.data.dataset import DataError, Dataset
from fedperfix.data.texts import split_words, text_dataset

REQUIRED = ("text", "label")
OPTIONAL = ("domain", "group")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}

# A record and where it is in the file.
Record = tuple[int, dict[str, str]]


def load_texts(data_dir: Path | None) -> Dataset:
    """The data set in one file of texts: .csv or .tsv with a header, or .jsonl with one object per line.

    Its columns are `text` and `label`, perhaps `domain` and `group`. Labels and domains are names; classes are in
    the alphabet's order, or in that of their numbers if all names are numbers. Texts without a word are left out
    and listed.

    Args:
        data_dir: the file, in UTF-8; its name without the ending is the data set's.

    Raises:
        DataError: no such file, another kind of file, a damaged one, or a column that is missing or unknown.
    """
    takes = "takes the path of a .csv, .tsv or .jsonl file"
    if data_dir is None:
        raise DataError(f"--data-dir: not given, --dataset texts {takes}")
    if not data_dir.is_file():
        raise DataError(f"--data-dir: got '{data_dir}', which is not a file; {takes}")
    suffix = data_dir.suffix.lower()
    if suffix not in (*_DELIMITERS, ".jsonl"):
        raise DataError(f"--data-dir: got '{data_dir}', {takes}")
    records = _read(data_dir, _json_lines if suffix == ".jsonl" else _table(_DELIMITERS[suffix]))
    kept = [record for record in records if split_words(record[1]["text"])]
    if not kept:
        raise DataError(f"{data_dir}: has no text with a word in it")
    left_out = tuple(f"line {line}: no word" for line, record in records if not split_words(record["text"]))
    return replace(_dataset(data_dir, [record for _, record in kept]), skipped=left_out)


def _dataset(file: Path, records: list[dict[str, str]]) -> Dataset:
    classes, labels = _numbered([record["label"] for record in records])
    dataset = text_dataset(
        [record["text"] for record in records],
        labels,
        class_names=classes,
        groups=np.array([record["group"] for record in records]) if "group" in records[0] else None,
        name=file.stem,
    )
    if "domain" not in records[0]:
        return dataset
    names, domains = _numbered([record["domain"] for record in records])
    return replace(dataset, domains=dataset.labels.new_tensor(domains), domain_names=tuple(names))


def _numbered(names: list[str]) -> tuple[list[str], np.ndarray]:
    """The different names in order, and each one's place among them: int64 [n]."""
    digits = all(name.isdecimal() for name in names)
    ordered = sorted(set(names), key=(lambda name: (int(name), name)) if digits else None)
    place = {name: number for number, name in enumerate(ordered)}
    return ordered, np.array([place[name] for name in names], np.int64)


def _read(file: Path, parse: Callable[[TextIO], Iterator[Record]]) -> list[Record]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            records = list(parse(stream))
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DataError(f"{file}: {error}") from error
    except OSError as error:
        raise DataError(f"--data-dir: cannot read '{file}' ({error.strerror})") from error
    if not records:
        raise DataError(f"{file}: holds no texts")
    return records


def _table(delimiter: str) -> Callable[[TextIO], Iterator[Record]]:
    def parse(stream: TextIO) -> Iterator[Record]:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        columns = next(reader, [])
        _check_columns(columns, "line 1")
        for row in reader:
            if len(row) != len(columns):
                raise ValueError(f"line {reader.line_num} has {len(row)} fields, the header has {len(columns)}")
            yield reader.line_num, _checked(dict(zip(columns, row, strict=True)), reader.line_num)

    return parse


def _json_lines(stream: TextIO) -> Iterator[Record]:
    columns: list[str] | None = None
    for number, line in enumerate(stream, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON; takes one object per line") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is not an object; takes one per line")
        if columns is None:
            columns = sorted(record)
            _check_columns(columns, f"line {number}")
        if sorted(record) != columns:
            raise ValueError(f"line {number} has the keys {', '.join(sorted(record))}, line 1 {', '.join(columns)}")
        for key, value in record.items():
            if type(value) is not str and (key == "text" or type(value) is not int):
                also = "" if key == "text" else " or a whole number"
                raise ValueError(f"line {number}: {key} is {value!r}, takes a text{also}")
        yield number, _checked({key: str(value) for key, value in record.items()}, number)


def _check_columns(columns: list[str], where: str) -> None:
    missing = [name for name in REQUIRED if name not in columns]
    unknown = [name for name in columns if name not in (*REQUIRED, *OPTIONAL)]
    takes = f"takes the columns {', '.join(REQUIRED)} and perhaps {', '.join(OPTIONAL)}"
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; {takes}")
    if unknown:
        raise ValueError(f"{where} has unknown columns {', '.join(unknown)}; {takes}")
    if len(set(columns)) < len(columns):
        raise ValueError(f"{where} names a column twice; {takes}")


def _checked(record: dict[str, str], line: int) -> dict[str, str]:
    empty = [name for name, value in record.items() if name != "text" and not value.strip()]
    if empty:
        raise ValueError(f"line {line} has no {empty[0]}; give one or leave the line out")
    return record
