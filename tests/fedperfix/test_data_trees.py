"""Trees of picture files: what is read, decoded once, resized, left out and refused."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedperfix.data import DataError, Dataset, load_dataset, pictures
from fedperfix.data.partition import Options, make_partition
from fedperfix.data.partition.file import read_partition, write_partition
from fedperfix.partition import main as partition
from fedperfix.train import main

SIDE = 16


def picture(seed: int, size: tuple[int, int] = (SIDE, SIDE), mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (*size, 3)).astype(np.uint8)).convert(mode)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """class/image: two classes with three and two pictures."""
    root = tmp_path / "animals"
    for number, name in enumerate(("cat/b.png", "cat/a.png", "cat/deep/c.bmp", "dog/a.png", "dog/b.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(root / name)
    return root


@pytest.fixture
def office(tmp_path: Path) -> Path:
    """domain/class/image: two domains, two classes with three pictures each, in JPEG."""
    root = tmp_path / "OfficeHome"
    for d, domain in enumerate(("Art", "Real World")):
        for c, name in enumerate(("Bed", "Alarm_Clock")):
            (root / domain / name).mkdir(parents=True)
            for number in range(3):
                picture(100 * d + 10 * c + number).save(root / domain / name / f"{number:05}.jpg")
    return root


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that are decoded, as it happens."""
    names: list[str] = []
    decode_row = pictures._decode_row

    def recorded(item: pictures.Picture, *arguments) -> bytes | str:
        names.append(item.name)
        return decode_row(item, *arguments)

    monkeypatch.setattr(pictures, "_decode_row", recorded)
    return names


def load(root: Path, name: str = "image-folder", side: int | None = SIDE) -> Dataset:
    return load_dataset(name, root, image_size=side, cache_dir=root.parent / "cache")


def test_classes_in_the_order_of_their_names(root):
    dataset = load(root)
    assert (dataset.name, dataset.class_names, dataset.domains) == ("animals", ("cat", "dog"), None)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1]
    assert dataset.inputs.dtype == torch.uint8
    for row, seed in enumerate((1, 0, 2, 3, 4)):  # cat/a, cat/b, cat/deep/c, dog/a, dog/b
        assert (dataset.inputs[row].permute(1, 2, 0).numpy() == np.asarray(picture(seed))).all()
    assert dataset.skipped == ()


def test_domains(office):
    dataset = load(office, "domain-folder")
    assert dataset.class_names == ("Alarm_Clock", "Bed")
    assert dataset.domain_names == ("Art", "Real World")
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert dataset.domains.tolist() == [0] * 6 + [1] * 6
    partition = make_partition(dataset, Options("domains", clients=2, split="stratified", test_fraction=0.34))
    assert [sorted(dataset.labels[part].tolist()) for part in partition.test] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("side", [8, 16, 40])
def test_resize_is_torchvisions(tmp_path, side):
    from torchvision.transforms import Resize

    sizes = [(20, 30), (16, 16), (9, 50), (64, 5)]
    for number, size in enumerate(sizes):
        folder = tmp_path / "tree" / f"c{number}"
        folder.mkdir(parents=True)
        picture(number, size).save(folder / "x.png")
    images = load(tmp_path / "tree", side=side).inputs
    for number, size in enumerate(sizes):
        expected = np.asarray(Resize((side, side))(picture(number, size)))  # as the paper's code does
        assert (images[number].permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_colour(tmp_path, mode):
    for name in "ab":
        (tmp_path / "tree" / name).mkdir(parents=True)
        picture(3, mode=mode if mode != "LA" else "L").convert(mode).save(
            tmp_path / "tree" / name / ("x.tif" if mode == "CMYK" else "x.png")
        )
    image = load(tmp_path / "tree").inputs[0].permute(1, 2, 0).numpy()
    expected = picture(3, mode=mode if mode != "LA" else "L").convert(mode).convert("RGB")
    assert (image == np.asarray(expected)).all()


def test_the_second_load_decodes_nothing(root, decoded):
    first = load(root)
    assert len(decoded) == 5
    second = load(root)
    assert len(decoded) == 5
    assert torch.equal(first.inputs, second.inputs)
    assert (first.labels.tolist(), first.digest, first.skipped) == (
        second.labels.tolist(), second.digest, second.skipped
    )  # fmt: skip
    assert second.inputs.is_contiguous()
    load(root, side=8)
    assert len(decoded) == 10
    suffixes = sorted(path.suffix for path in (root.parent / "cache").iterdir())
    assert suffixes == [".json", ".json", ".pixels", ".pixels"]


def test_pixels_are_stored_as_single_bytes_and_shared(root):
    images = load(root, side=7).inputs
    [file] = (root.parent / "cache").glob("*.pixels")
    assert file.stat().st_size == 5 * 3 * 7 * 7
    before = file.read_bytes()
    images[:] = 0
    assert file.read_bytes() == before
    assert load(root, side=7).inputs.sum() > 0


@pytest.mark.parametrize("change", ["touch", "content", "new", "gone", "renamed"])
def test_a_changed_tree_is_decoded_again(root, decoded, change):
    before = load(root)
    file = root / "cat" / "a.png"
    if change == "touch":
        os.utime(file, ns=(1, 1))
    elif change == "content":
        picture(77).save(file)
    elif change == "new":
        picture(77).save(root / "dog" / "c.png")
    elif change == "gone":
        file.unlink()
    else:
        file.rename(root / "cat" / "z.png")
    after = load(root)
    assert len(decoded) > 5
    assert (after.digest == before.digest) == (change == "touch")


def test_a_damaged_cache_is_made_again(root, decoded):
    before = load(root)
    expected = before.inputs.clone()
    [pixels] = (root.parent / "cache").glob("*.pixels")
    [index] = (root.parent / "cache").glob("*.json")
    for damage in (
        lambda: pixels.write_bytes(pixels.read_bytes()[:-1]),
        lambda: index.write_text('{"kept": [0, 1'),
        lambda: index.write_text("{}"),
        pixels.unlink,
        index.unlink,
    ):
        decoded.clear()
        damage()
        assert torch.equal(load(root).inputs, expected)
        assert len(decoded) == 5


def test_a_cache_that_cannot_be_written(root):
    (root.parent / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"--cache-dir: cannot write 5 pictures of 16x16 pixels to '.*cache'"):
        load(root)


def test_a_full_disk_leaves_nothing(root, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"'.*cache' \(No space left on device\); make room there or take another"):
        load(root)
    assert not list((root.parent / "cache").iterdir())
    monkeypatch.delattr(os, "posix_fallocate")  # a system that has no such call
    assert len(load(root).inputs) == 5


def messy(root: Path) -> list[str]:
    """Put into the tree what does not belong there, and say what of it should be listed."""
    whole = io.BytesIO()
    picture(5, (64, 64)).save(whole, "JPEG")
    (root / "readme.txt").write_text("hello")
    (root / ".git").mkdir()
    (root / "bird").mkdir()
    (root / "cat" / ".DS_Store").write_bytes(b"x")
    (root / "cat" / "notes.txt").write_text("not a picture")
    (root / "cat" / "cut.jpg").write_bytes(whole.getvalue()[:900])
    (root / "cat" / "empty.png").touch()
    (root / "cat" / "deep" / ".thumbs").mkdir()
    (root / "dog" / "away.png").symlink_to(root / "nowhere.png")
    Image.fromarray(np.full((4, 4), 60_000, np.uint16)).save(root / "dog" / "deep.png")
    (root / "fish").mkdir()
    (root / "fish" / "text.png").write_text("not a picture")
    return [
        ".git: hidden",
        "readme.txt: not in a class's folder",
        "bird: an empty class folder",
        "cat/.DS_Store: hidden",
        "cat/deep/.thumbs: hidden",
        "dog/away.png: not a file",
        "cat/cut.jpg: a damaged picture",
        "cat/empty.png: not a picture",
        "cat/notes.txt: not a picture",
        "dog/deep.png: has I;16 pixels, takes 8 bits per channel",
        "fish/text.png: not a picture",
        "class fish: no picture is left",
    ]


def test_what_is_left_out_is_listed(root, decoded):
    clean = load(root)
    expected = messy(root)
    for _ in range(2):  # decoded, and from the cache
        dataset = load(root)
        assert len(dataset.skipped) == len(expected)
        for start in expected:
            assert any(line.startswith(start) for line in dataset.skipped), start
        assert dataset.class_names == ("cat", "dog")
        assert dataset.labels.tolist() == clean.labels.tolist()
        assert torch.equal(dataset.inputs, clean.inputs)
        assert dataset.digest == clean.digest


def test_so_does_the_command_that_only_divides(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    expected = messy(root)
    words = "split.json --dataset image-folder --data-dir animals --cache-dir cache --image-size 16 --clients 1"
    assert partition(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    first = lines.index(f"skipped      {len(expected)}:") + 1
    shown = [line.strip() for line in lines[first : first + len(expected)]]
    assert all(any(line.startswith(start) for line in shown) for start in expected)


def test_a_run_says_what_is_left_out(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    expected = messy(root)
    words = "--dataset image-folder --data-dir animals --cache-dir cache --image-size 16 --clients 1 --sampled 1"
    words += " --rounds 1 --local-steps 1 --batch-size 2 --device cpu --method fedavg --run-dir r"
    assert main(words.split()) == 0
    output = capsys.readouterr().out
    assert f"skipped      {len(expected)}, all of them in skipped.txt: .git: hidden; " in output
    assert len(Path("r/skipped.txt").read_text().splitlines()) == len(expected)
    assert "animals (image-folder), 4 training and 1 test images of 16x16, 2 classes" in output


def test_a_partition_does_not_depend_on_the_size_of_the_pictures(root, tmp_path):
    partition = make_partition(load(root), Options("iid", clients=2))
    write_partition(tmp_path / "p.json", load(root), partition)
    assert read_partition(tmp_path / "p.json", load(root, side=8), 2).rule == "IID"
    picture(77).save(root / "cat" / "a.png")
    with pytest.raises(DataError, match=r"p.json: a partition of another data set, animals: its inputs"):
        read_partition(tmp_path / "p.json", load(root), 2)


def test_a_domain_without_pictures_is_listed(office):
    for file in (office / "Art").rglob("*.jpg"):
        file.write_text("nothing")
    dataset = load(office, "domain-folder")
    assert dataset.domain_names == ("Real World",)
    assert dataset.domains.tolist() == [0] * 6
    assert len(dataset.skipped) == 7
    assert dataset.skipped[-1] == "domain Art: no picture is left"


def test_refused_trees(root, office, tmp_path):
    def refused(where: Path | None, message: str, name: str = "image-folder", side: int | None = SIDE) -> None:
        with pytest.raises(DataError, match=message):
            load_dataset(name, where, image_size=side, cache_dir=tmp_path / "cache")

    for name in ("image-folder", "domain-folder"):
        refused(None, f"--data-dir: not given; --dataset {name} takes the folder", name)
        refused(tmp_path / "none", "--data-dir: got '.*none', which is not a folder", name)
        refused(root, f"--image-size: not given, and the pictures of {name} may be of any size", name, side=None)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "--data-dir: no picture in the folders of '.*empty'")
    refused(tmp_path / "empty", "--data-dir: no picture in the folders of '.*empty'", "domain-folder")
    refused(office / "Art" / "Bed", "--data-dir: no picture in the folders of")
    (tmp_path / "one" / "cat").mkdir(parents=True)
    picture(0).save(tmp_path / "one" / "cat" / "a.png")
    refused(tmp_path / "one", "pictures of one class only, 'cat'; takes a folder for each of at least 2")
    for name in ("cat", "dog"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "a.txt").write_text("x")
    refused(tmp_path / "texts", "texts: none of 2 files is a whole picture, the first: cat/a.txt: not a picture")
    assert not list((tmp_path / "cache").glob("*"))
    picture(0).save(tmp_path / "texts" / "cat" / "b.png")
    refused(tmp_path / "texts", "pictures of one class only, 'cat'")
    refused(root, "animals.dog: lacks 1 of the 1 classes, the first is 'deep'", "domain-folder")
    (office / "Art" / "Chair").mkdir()
    refused(office, "Real World: lacks 1 of the 3 classes, the first is 'Chair'; takes the same", "domain-folder")
    (office / "Real World" / "Chair").mkdir()
    assert len(load(office, "domain-folder").skipped) == 2
    for name in ("train", "Test"):
        (tmp_path / "splits" / name / "cat").mkdir(parents=True)
    refused(tmp_path / "splits", r"holds splits \(Test, train\), not classes")
