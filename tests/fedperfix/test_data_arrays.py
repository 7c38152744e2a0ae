"""A user's own arrays and .npz files, in every layout, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedperfix.data import DataError, Dataset, arrays_dataset, load_dataset
from fedperfix.train import main

N, H, W = 6, 5, 7
LABELS = np.array([0, 1, 2, 0, 1, 2])


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_last_and_first_are_the_same_images(channels):
    first = pixels(N, channels, H, W)
    last = np.empty((N, H, W, channels), np.uint8)
    for c in range(channels):
        last[..., c] = first[:, c]
    for images in (first, last, torch.from_numpy(first)):
        dataset = arrays_dataset(images, LABELS)
        assert dataset.inputs.dtype == torch.uint8
        assert dataset.inputs.is_contiguous()
        assert (dataset.inputs.numpy() == first).all()


def test_grey_images_without_channels_get_one():
    images = pixels(N, H, W)
    assert (arrays_dataset(images, LABELS).inputs.numpy()[:, 0] == images).all()
    # An image 3 pixels high is no image of 3 channels: without a fourth dimension nothing is guessed.
    assert arrays_dataset(pixels(N, 3, W), LABELS).inputs.shape == (N, 1, 3, W)


def test_texts_are_tokens():
    tokens = np.arange(N * 4, dtype=np.int64).reshape(N, 4)
    dataset = arrays_dataset(tokens, LABELS)
    assert dataset.inputs.dtype == torch.int32
    assert (dataset.inputs.numpy() == tokens).all()


def test_everything_that_a_data_set_may_have():
    dataset = arrays_dataset(
        pixels(N, H, W),
        LABELS[:, None].astype(np.uint8),
        class_names=["x", "y", "z"],
        domains=[0, 0, 0, 1, 1, 1],
        domain_names=["pen", "ink"],
        groups=["u", "v", "w", "v", "u", "w"],
        name="mine",
    )
    assert (dataset.name, dataset.class_names, dataset.domain_names) == ("mine", ("x", "y", "z"), ("pen", "ink"))
    assert dataset.labels.tolist() == LABELS.tolist()
    assert dataset.labels.dtype == dataset.domains.dtype == dataset.groups.dtype == torch.int64
    assert dataset.domains.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.groups.tolist() == [0, 1, 2, 1, 0, 2]
    unnamed = arrays_dataset(pixels(N, H, W), LABELS, domains=[0, 1, 0, 1, 0, 1])
    assert (unnamed.class_names, unnamed.domain_names, unnamed.groups) == (("0", "1", "2"), ("0", "1"), None)


def test_labels_and_domains_may_be_texts():
    words = np.array(["rose", "lily", "tulip"])[LABELS]
    plain = arrays_dataset(pixels(N, H, W), words, domains=["ink", "pen", "ink", "pen", "ink", "ink"])
    assert plain.class_names == ("lily", "rose", "tulip")
    assert plain.labels.tolist() == [1, 0, 2, 1, 0, 2]
    assert (plain.domain_names, plain.domains.tolist()) == (("ink", "pen"), [0, 1, 0, 1, 0, 0])
    ordered = arrays_dataset(pixels(N, H, W), words[:, None], class_names=["tulip", "rose", "lily"])
    assert ordered.class_names == ("tulip", "rose", "lily")
    assert ordered.labels.tolist() == [1, 2, 0, 1, 2, 0]


IMAGES = pixels(N, H, W)
WRONG = {
    "float": ({"inputs": IMAGES / 255}, r"mine: images of type float64, takes uint8.*\(255 \* images\)"),
    "int": ({"inputs": IMAGES.astype(np.int32)}, "images of type int32, takes uint8"),
    "none": ({"inputs": IMAGES[:0], "labels": LABELS[:0]}, "holds no samples"),
    "flat": ({"inputs": IMAGES.reshape(N, -1)}, r"shape \[6, 35\]; takes \[n, H, W\]"),
    "many channels": ({"inputs": pixels(N, 5, H, W)}, r"\[6, 5, 5, 7\], which has its channels neither"),
    "either": ({"inputs": pixels(N, 3, H, 3)}, r"\[6, 3, 5, 3\], which could have its channels first or last"),
    "no pixels": ({"inputs": pixels(N, 3, 0, W)}, r"shape \[6, 3, 0, 7\]"),
    "few labels": ({"labels": LABELS[:5]}, r"labels of type int64 and shape \[5\] for 6 samples"),
    "one-hot": ({"labels": np.eye(3)[LABELS]}, r"labels of type float64 and shape \[6, 3\]"),
    "float labels": ({"labels": LABELS / 1.0}, "labels of type float64"),
    "negative": ({"labels": LABELS - 1}, r"labels from -1 to 1, takes from 0"),
    "from 1": ({"labels": LABELS + 1}, "labels 0 to 3, but 1 of them have no sample, the first is 0;"),
    "gap": ({"labels": [0, 1, 3, 0, 1, 3]}, "1 of them have no sample, the first is 2;"),
    "unnamed": ({"class_names": ["a", "b"]}, "labels from 0 to 2, takes 0 to 1, for which there are names"),
    "unused": ({"class_names": list("abcd")}, r"1 of them have no sample, the first is 3 \('d'\)"),
    "names only": ({"domain_names": ["a"]}, "names of domains but no domains"),
    "domains": ({"domains": [0, 0, 2, 2, 2, 2]}, "domains 0 to 2, but 1 of them have no sample"),
    "unknown text": (
        {"labels": list("abcabx"), "class_names": list("abc")},
        "labels has 'x', takes one of .* a, b, c",
    ),
    "unused text": ({"labels": list("abcabc"), "class_names": list("abcd")}, r"the first is 3 \('d'\)"),
    "groups": ({"groups": [1, 2]}, r"groups of type int64 and shape \[2\]"),
    "float groups": ({"groups": LABELS / 2}, "groups of type float64"),
    "tokens": ({"inputs": np.full((N, 2), -1)}, "tokens from -1 to -1"),
}


@pytest.mark.parametrize(("arrays", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arrays(arrays, message):
    with pytest.raises(DataError, match=message):
        arrays_dataset(**({"inputs": IMAGES, "labels": LABELS, "name": "mine"} | arrays))


def write(path: Path, **changes) -> Path:
    arrays = {"images": pixels(N, H, W, 3), "labels": LABELS} | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_npz(tmp_path):
    file = write(
        tmp_path / "flowers.npz",
        classes=np.array(["rose", "lily", "tulip"]),
        domains=LABELS % 2,
        domain_names=np.array(["a", "b"]),
        groups=np.array(list("aabbcc")),
    )
    dataset = load_dataset("npz", str(file))
    assert isinstance(dataset, Dataset)
    assert (dataset.name, dataset.class_names) == ("flowers", ("rose", "lily", "tulip"))
    assert (dataset.inputs.numpy() == pixels(N, H, W, 3).transpose(0, 3, 1, 2)).all()
    assert dataset.domains.tolist() == [0, 1, 0, 0, 1, 0]
    assert dataset.domain_names == ("a", "b")
    assert dataset.groups.tolist() == [0, 0, 1, 1, 2, 2]


def test_wrong_npz(tmp_path):
    def refused(file: Path | None, message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_dataset("npz", file)

    refused(None, "--data-dir: not given")
    refused(tmp_path, "--data-dir: got .* not a file")
    whole = write(tmp_path / "whole.npz")
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:-100])
    refused(tmp_path / "cut.npz", "cut.npz: not a whole .npz file .*; make it again")
    damaged = bytearray(whole.read_bytes())
    damaged[200] ^= 255
    (tmp_path / "damaged.npz").write_bytes(damaged)
    refused(tmp_path / "damaged.npz", "damaged.npz: not a whole .npz file")
    (tmp_path / "foreign.npz").write_text("no archive")
    refused(
        tmp_path / "foreign.npz",
        r"foreign.npz: not a whole .npz file .*\(it is no whole zip archive\)",
    )
    np.save(tmp_path / "single.npy", IMAGES)
    refused(tmp_path / "single.npy", r"single.npy: not a whole .npz file .*\(a single array\)")
    refused(write(tmp_path / "objects.npz", labels=np.array([{}, 1], object)), "it holds Python objects")
    refused(write(tmp_path / "lacks.npz", labels=None), "lacks.npz: lacks labels; takes the keys images, labels")
    refused(write(tmp_path / "more.npz", extra=LABELS), "more.npz: has unknown keys extra; takes .* groups")
    refused(write(tmp_path / "names.npz", classes=LABELS), r"names.npz: classes has type int64 and shape \(6,\)")
    refused(write(tmp_path / "gap.npz", labels=LABELS * 2), "gap.npz: labels 0 to 4, but 2 of them have no sample")


def test_a_run_says_it_in_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "gap.npz", labels=LABELS * 2)
    write(tmp_path / "few.npz")
    cases = {
        ("--data-dir", "gap.npz"): "gap.npz: labels 0 to 4, but 2 of them have no sample, the first is 1; leave",
        ("--data-dir", "none.npz"): "--data-dir: got 'none.npz', which is not a file",
        ("--data-dir", "few.npz"): "--clients: got 32, but there are 6 images for 32 clients",
        ("--data-dir", "few.npz", "--partition", "iid"): "with which 32 clients have fewer than 2 images",
        ("--data-dir", "few.npz", "--partition", "domains"): "the data set few has no domains",
    }
    for options, message in cases.items():
        assert main(["--dataset", "npz", *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not Path("runs").exists()
