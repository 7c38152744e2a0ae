"""Partition files: what is written is read, for the same data only; and the command that writes them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedperfix.data import DATASETS, DataError, Dataset
from fedperfix.data.partition import Options, Partition, make_partition
from fedperfix.data.partition.file import describe_dataset, read_partition, write_partition
from fedperfix.data.partition.picture import class_counts, draw_partition
from fedperfix.partition import main
from fedperfix.train import main as train
from tests.fedperfix import tiny


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Dataset, Partition]:
    """A partition of 240 images over 3 clients and its file."""
    dataset = tiny.dataset()
    partition = make_partition(dataset, Options(clients=3, alpha=1.0))
    write_partition(tmp_path / "p.json", dataset, partition)
    return tmp_path / "p.json", dataset, partition


def same(first: Partition, second: Partition) -> bool:
    pairs = zip((*first.train, *first.test), (*second.train, *second.test), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_round_trip(made):
    path, dataset, partition = made
    found = read_partition(path, dataset, 3)
    assert same(found, partition)
    assert found.rule == partition.rule == "Dirichlet 1"
    assert all(part.dtype == np.int64 for part in (*found.train, *found.test))


def test_description(made):
    path, dataset, _ = made
    said = json.loads(path.read_text())["dataset"]
    assert said == describe_dataset(dataset)
    labels = hashlib.sha256(b"torch.int64 [240]" + dataset.labels.numpy().tobytes()).hexdigest()
    inputs = hashlib.sha256(b"torch.uint8 [240, 1, 8, 8]" + dataset.inputs.numpy().tobytes()).hexdigest()
    assert said == {
        "name": "tiny",
        "samples": 240,
        "classes": 4,
        "labels_sha256": labels,
        "inputs_sha256": inputs,
    }
    assert describe_dataset(replace(dataset, digest="abc"))["inputs_sha256"] == "abc"
    # More rows than are hashed at once, and rows that are not next to each other in memory.
    many = torch.arange(20_000).to(torch.uint8).view(5000, 4, 1, 1)
    spread = Dataset("many", many.transpose(1, 2), torch.arange(5000) % 2, ("a", "b"))
    plain = hashlib.sha256(b"torch.uint8 [5000, 1, 4, 1]" + many.numpy().tobytes()).hexdigest()
    assert describe_dataset(spread)["inputs_sha256"] == plain


def test_the_name_of_the_data_set_may_differ(made):
    path, dataset, partition = made
    assert same(read_partition(path, replace(dataset, name="other"), 3), partition)


def test_another_data_set_is_refused(made):
    path, dataset, _ = made
    changed = dataset.inputs.clone()
    changed[17, 0, 3, 3] ^= 1
    for other, message in (
        (
            replace(dataset, inputs=changed, name="b"),
            r"of another data set, tiny: its inputs \(SHA-256\) are .*…, those",
        ),
        (replace(dataset, labels=dataset.labels.flip(0)), r"its labels \(SHA-256\)"),
        (replace(dataset, class_names=tuple("abcde")), "its classes are 4, those of tiny are 5"),
        (tiny.dataset(200), "its samples are 240, those of tiny are 200; take that data set, or write"),
    ):
        with pytest.raises(DataError, match=message):
            read_partition(path, other, 3)


def edit(path: Path, **changes) -> None:
    """Change client 1 of a partition file, or what else `changes` names."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        (content["clients"][1] if key in ("train", "test") else content)[key] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": [240]}, r"indices from \d to 240, takes 0 to 239"),
        ({"train": [-1]}, "indices from -1 to 239, takes 0 to 239"),
        ({"train": [2**70]}, "client 1 has the index 1180591620717411303424 in 'train'; write the file again"),
        ({"train": [1.0]}, "client 1 has no list of whole numbers as 'train'"),
        ({"train": [True]}, "client 1 has no list of whole numbers as 'train'"),
        ({"test": None}, "client 1 has no list of whole numbers as 'test'"),
        ({"test": []}, "client 1 has no sample in 'test'; takes at least one"),
        ({"test": list(range(240))}, r"\d+ samples are in more than one place, the first is"),
        ({"format": "v0"}, "not a whole partition file .*'v0'"),
        ({"clients": []}, "not a whole partition file .*no clients"),
        ({"dataset": "x"}, "not a whole partition file"),
        ({"rule": 3}, "not a whole partition file"),
    ],
)
def test_wrong_files(made, changes, message):
    path, dataset, _ = made
    edit(path, **changes)
    with pytest.raises(DataError, match=f"p.json: {message}"):
        read_partition(path, dataset, 3)


def test_files_that_are_none(made, tmp_path):
    path, dataset, _ = made
    with pytest.raises(DataError, match="--clients: got 5, but the partition in .*p.json has 3; take that number"):
        read_partition(path, dataset, 5)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match="p.json: not a whole partition file .*JSON.*; write one with python -m"):
        read_partition(path, dataset, 3)
    path.write_text("[1, 2]")
    with pytest.raises(DataError, match="p.json: not a whole partition file"):
        read_partition(path, dataset, 3)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="p.json: not a whole partition file"):
        read_partition(path, dataset, 3)
    with pytest.raises(DataError, match="--partition-file: cannot read '.*none.json'"):
        read_partition(tmp_path / "none.json", dataset, 3)


def test_divided_groups_are_refused(made):
    path, dataset, partition = made
    groups = torch.arange(240)
    assert same(read_partition(path, replace(dataset, groups=groups), 3), partition)
    groups[partition.test[2][0]] = groups[partition.train[0][0]]
    with pytest.raises(DataError, match="p.json: 1 groups of tiny have samples for training and for testing"):
        read_partition(path, replace(dataset, groups=groups), 3)


def test_counts(made):
    _, dataset, partition = made
    counts = class_counts(dataset, partition.train)
    for client, part in enumerate(partition.train):
        labels = [int(dataset.labels[index]) for index in part]
        assert counts[client].tolist() == [labels.count(c) for c in range(4)]


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (64, 10), (64, 100), (7, 41)])
def test_picture(tmp_path, clients, classes):
    labels = torch.arange(64 * 100) % classes
    dataset = Dataset(
        "made-up", labels[:, None, None, None], labels, tuple(f"a long name {c}" * 3 for c in range(classes))
    )
    draw_partition(tmp_path / "p.png", dataset, make_partition(dataset, Options("iid", clients=clients)))
    with Image.open(tmp_path / "p.png") as image:
        assert min(image.size) > 250
        assert max(image.size) < 2000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(DATASETS, "cifar10", lambda data_dir: tiny.dataset())
    monkeypatch.chdir(tmp_path)


OPTIONS = ("--dataset", "cifar10", "--clients", "3", "--alpha", "1")


@pytest.mark.usefixtures("_small")
def test_command(capsys):
    assert main(["sub/p.json", *OPTIONS]) == 0
    assert "3 clients of" in capsys.readouterr().out
    assert sorted(path.name for path in Path("sub").iterdir()) == ["p.json", "p.png"]
    expected = make_partition(tiny.dataset(), Options(clients=3, alpha=1.0))
    assert same(read_partition(Path("sub/p.json"), tiny.dataset(), 3), expected)
    for argv, message in (
        (["sub/p.json", *OPTIONS], "'sub/p.json' exists; takes the name of a new file"),
        (["p.txt", *OPTIONS], "FILE.json: got 'p.txt'"),
        (["--clients", "3"], "FILE.json: got '--clients'"),
        (["q.json", *OPTIONS, "--partition", "domains"], "has no domains"),
        (["q.json", "--partition", "iidd"], "did you mean 'iid'?"),
        (["q.json", *OPTIONS, "--partition", "file"], "--partition-file: got None, takes the path of a partition"),
        (["q.json", *OPTIONS, "--partition-file", "sub/p.json"], "--partition file, and only with it"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not Path("q.json").exists()
    assert main(["--help"]) == 0
    assert "FILE.json" in capsys.readouterr().out


@pytest.mark.usefixtures("_small")
def test_a_run_writes_its_partition_and_takes_that_of_another(capsys):
    words = "--sampled 2 --model vit-mini --image-size 8 --local-steps 1 --rounds 1 --method fedavg --device cpu"
    small = (*OPTIONS, *words.split(), "--batch-size", "4", "--checkpoint-every", "1")
    assert train([*small, "--run-dir", "a", "--seed", "3"]) == 0
    found = read_partition(Path("a/partition.json"), tiny.dataset(), 3)
    assert same(found, make_partition(tiny.dataset(), Options(clients=3, alpha=1.0, seed=3)))
    shared = ("--partition", "file", "--partition-file", "a/partition.json")
    assert train([*small, "--run-dir", "b", "--seed", "4", *shared]) == 0
    output = capsys.readouterr().out
    assert "3 clients (Dirichlet 1, from a/partition.json)" in output
    assert "left out" not in output
    assert same(read_partition(Path("b/partition.json"), tiny.dataset(), 3), found)
    few = replace(found, train=tuple(part[:5] for part in found.train))
    write_partition(Path("few.json"), tiny.dataset(), few)
    assert train([*small, *shared[:-1], "few.json"]) == 0
    assert f"left out     {240 - 15 - sum(map(len, few.test))} samples that are of no" in capsys.readouterr().out
    assert main(["copy.json", *OPTIONS, *shared[:-1], "few.json"]) == 0
    assert f"left out     {240 - 15 - sum(map(len, few.test))} samples that are of no" in capsys.readouterr().out
    # A resumed run has its own partition, wherever it came from, and notices other data.
    Path("a/partition.json").unlink()
    assert train(["--resume", "b", "--rounds", "2"]) == 0
    DATASETS["cifar10"] = lambda data_dir: tiny.dataset(200)
    assert train(["--resume", "b", "--rounds", "3"]) == 2
    assert "b/partition.json: a partition of another data set" in capsys.readouterr().err
