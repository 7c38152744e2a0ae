"""Data sets of the package `datasets`, saved on disk, and what can be wrong with them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from fedperfix.config import ConfigError, parse_args
from fedperfix.data import DataError, load_dataset

SIDE = 8


def picture(seed: int, side: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """The package, without a network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return datasets


def save(hub, where, labels, *, split: str | None = None, column: str = "label", names=("cat", "dog"), **more):
    label = hub.ClassLabel(names=list(names)) if names else hub.Value("int64")
    rows = {"img": [picture(i) for i in range(len(labels))], column: labels} | more
    features = {"img": hub.Image(), column: label} | {key: hub.ClassLabel(names=["x", "y"]) for key in more}
    made = hub.Dataset.from_dict(rows, features=hub.Features(features))
    if split is None:
        made.save_to_disk(str(where))
    return made


def load(where, tmp_path, column: str = "", side: int | None = SIDE):
    suffix = f":{column}" if column else ""
    return load_dataset(f"hf:{where}{suffix}", image_size=side, cache_dir=tmp_path / "cache")


def test_one_split(hub, tmp_path):
    save(hub, tmp_path / "pets", [0, 1, 1, 0])
    dataset = load(tmp_path / "pets", tmp_path)
    assert (dataset.labels.tolist(), dataset.class_names) == ([0, 1, 1, 0], ("cat", "dog"))
    for row in range(4):
        assert (dataset.inputs[row].permute(1, 2, 0).numpy() == np.asarray(picture(row))).all()
    assert load(tmp_path / "pets", tmp_path).digest == dataset.digest != ""
    assert len(list((tmp_path / "cache").glob("*.pixels"))) == 1
    assert load(tmp_path / "pets", tmp_path, side=4).inputs.shape == (4, 3, 4, 4)


def test_all_splits_in_one_pool_without_the_unlabelled(hub, tmp_path):
    splits = {
        "train": save(hub, None, [0, 1, 1], split="train"),
        "test": save(hub, None, [-1, 0], split="test"),
    }
    hub.DatasetDict(splits).save_to_disk(str(tmp_path / "pets"))
    dataset = load(tmp_path / "pets", tmp_path)
    assert dataset.labels.tolist() == [0, 1, 1, 0]
    assert (dataset.inputs[3].permute(1, 2, 0).numpy() == np.asarray(picture(1))).all()
    assert dataset.skipped == ("split test: 1 pictures without a label in 'label'",)


def test_columns(hub, tmp_path):
    save(hub, tmp_path / "pets", [0, 1], column="fine", coarse=[1, 0])
    with pytest.raises(DataError, match="2 columns are a column of labels; takes hf:NAME:COLUMN with one of fine"):
        load(tmp_path / "pets", tmp_path)
    with pytest.raises(DataError, match="'img' is not a column of labels; takes hf:NAME:COLUMN"):
        load(tmp_path / "pets", tmp_path, "img")
    dataset = load(tmp_path / "pets", tmp_path, "coarse")
    assert (dataset.labels.tolist(), dataset.class_names) == ([1, 0], ("x", "y"))
    save(hub, tmp_path / "numbers", [2, 0, 1], names=None)
    assert load(tmp_path / "numbers", tmp_path).class_names == ("0", "1", "2")
    hub.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "texts"))
    with pytest.raises(DataError, match="has as columns of pictures none of text, label; takes a data set"):
        load(tmp_path / "texts", tmp_path)
    save(hub, tmp_path / "blank", [-1, -1])
    with pytest.raises(DataError, match="has no labelled pictures"):
        load(tmp_path / "blank", tmp_path)


def test_no_size_no_network_and_no_package(hub, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="--image-size: not given, and the pictures of hf:x may be of any size"):
        load_dataset("hf:x")
    with pytest.raises(DataError, match="--dataset: hf:nobody/nothing cannot be loaded .*; takes the id of"):
        load("nobody/nothing", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="--dataset: hf:.*empty cannot be loaded"):
        load(tmp_path / "empty", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"the package datasets is not installed; pip install datasets"):
        load("x", tmp_path)


def test_the_option_takes_any_name():
    assert parse_args(["--dataset", "hf:uoft-cs/cifar100:fine_label"]).dataset == "hf:uoft-cs/cifar100:fine_label"
    with pytest.raises(ConfigError, match="--dataset: got 'hf', takes one of .* or hf:NAME"):
        parse_args(["--dataset", "hf"])
