"""Models of many clients from an exported folder: their answers, and files and requests that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedperfix.config import ConfigError, parse_args
from fedperfix.run import checkpoint
from fedperfix.run.tensors import read_tensors, write_tensors
from fedperfix.serve import CLIENTS, FORMAT, MODEL, ServingError, load, main
from fedperfix.train import build
from tests.fedperfix.test_train_cli import (
    _small,  # noqa: F401  (a fixture)
    run,
)


def trained(*options: str) -> None:
    assert run("--run-dir", "run", "--precision", "fp32", *options) == 0


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("fedperfix: error: ").strip()


def own_outputs(client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A client's test images, and what its own model says, of the run's checkpoint."""
    config = parse_args(["--resume", "run"])
    federation = build(config, torch.device("cpu"))
    worker, state = federation.worker, federation.state
    checkpoint.load(Path("run") / checkpoint.CHECKPOINT, state, worker.arena, config)
    return worker.data.inputs[worker.data.test[client]], worker.load(client, state, 1).test()


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "fedperfix"),
        ("--method", "fedperfix", "--personal-table", "disk"),
        ("--method", "fedper", "--image-size", "12"),
        ("--method", "fedavg", "--freeze-backbone"),
        ("--method", "fedbn", "--model", "cnn-mini"),
        ("--dataset", "wordnet-glosses", "--model", "text-mini", "--samples", "300"),
    ],
    ids=" ".join,
)
def test_a_batch_of_many_clients_gets_each_clients_answer(options: tuple[str, ...]) -> None:
    trained(*options)
    assert main(["run", "out"]) == 0
    model = load("out", device="cpu", precision="fp32", cached=2)
    assert model.clients == (0, 1, 2)
    assert model.round == 2
    inputs, expected, owners = [], [], []
    for client in range(3):
        images, outputs = own_outputs(client)
        inputs.append(images)
        expected.append(outputs)
        owners += [client] * len(images)
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(0))
    found = model(torch.cat(inputs)[order], torch.tensor(owners)[order])
    torch.testing.assert_close(found, torch.cat(expected)[order], rtol=1e-4, atol=1e-5)
    assert found.shape[1] == len(model.classes)
    one = model(inputs[1][:1], [1])
    torch.testing.assert_close(one, expected[1][:1], rtol=1e-4, atol=1e-5)
    assert model(inputs[0][:0], []).shape == (0, len(model.classes))


def test_some_clients_can_be_exported_without_the_data_of_others() -> None:
    trained()
    assert main(["run", "out/new", "--clients", "2", "0"]) == 0
    assert load("out/new").clients == (0, 2)
    assert {path.name for path in Path("out/new").iterdir()} == {MODEL, CLIENTS}
    whole = load_file(Path("out/new") / MODEL)
    assert not any("prefix" in name or "head" in name for name in whole)
    text = (Path("out/new") / MODEL).read_bytes()
    assert b"out/new" not in text
    assert str(Path.cwd()).encode() not in text
    images, _ = own_outputs(1)
    with pytest.raises(ServingError, match="clients: got 1, which has no file in 'out/new/clients'"):
        load("out/new")(images, [1] * len(images))


def test_a_run_that_cannot_be_served_is_refused(capsys: pytest.CaptureFixture) -> None:
    trained("--method", "ditto")
    assert "as --method ditto makes each client's model in a way of its own" in refused(capsys, "run", "out")
    assert refused(capsys, "nowhere", "out").startswith("RUN: got 'nowhere', takes the folder of a run")
    assert "--clients: got 3, takes numbers from 0 to 2" in refused(capsys, "run", "out", "--clients", "3")
    Path("there").mkdir()
    assert refused(capsys, "run", "there") == "DIR: 'there' exists; takes the name of a new folder"
    assert not list(Path().glob("*out*"))
    assert "unrecognized arguments: --all" in refused(capsys, "run", "out", "--all")


@pytest.fixture
def exported() -> Path:
    trained()
    assert main(["run", "out"]) == 0
    return Path("out")


def rewritten(path: Path, *, keep: bool = True, **changes: str) -> None:
    """The same tensors with other metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, (metadata if keep else {}) | changes)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda path: path.unlink(), "there is no 'out/model.safetensors'"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged or no safetensors file"),
        (lambda path: path.write_text("hello"), "is damaged or no safetensors file"),
        (lambda path: rewritten(path, keep=False), "is no file of the kind fedperfix-serving"),
        (lambda path: rewritten(path, version="2"), "has version 2, this program reads 1; export it again"),
        (lambda path: rewritten(path, about="{}"), "is damaged: its content does not match its checksum"),
        (flipped, "is damaged: its content does not match its checksum"),
    ],
)
def test_files_that_are_not_what_was_exported(spoil, match: str, exported: Path) -> None:
    spoil(exported / MODEL)
    with pytest.raises(ServingError, match=match) as caught:
        load(exported)
    assert "\n" not in str(caught.value)


def test_clients_files_that_do_not_belong(exported: Path) -> None:
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    first, second = (exported / CLIENTS / f"{index}.safetensors" for index in (0, 1))
    model = load(exported)
    answers = model(images, [0, 0])
    shutil.copy(second, first)
    assert torch.equal(model(images, [0, 0]), answers)  # it is in memory
    with pytest.raises(ServingError, match="'out/clients/0.safetensors' is of another client or model"):
        load(exported)(images, [1, 0])
    flipped(second)
    with pytest.raises(ServingError, match="'out/clients/1.safetensors' is damaged"):
        load(exported)(images, [1, 1])
    assert run("--run-dir", "other", "--precision", "fp32", "--seed", "5") == 0
    assert main(["other", "newer"]) == 0
    shutil.copy(Path("newer") / CLIENTS / "2.safetensors", exported / CLIENTS / "2.safetensors")
    with pytest.raises(ServingError, match="'out/clients/2.safetensors' is of another client or model"):
        load(exported)(images, [2, 2])


@pytest.mark.parametrize(
    ("inputs", "clients", "match"),
    [
        (torch.zeros(2, 1, 8, 8), [0, 1], "inputs: got torch.float32, takes a tensor of uint8 pixels"),
        (torch.full((1, 1, 8, 8), 300), [0], "inputs: got torch.int64, takes a tensor of uint8 pixels"),
        ([[0]], [0], "inputs: got list, takes a tensor"),
        (torch.zeros(1, 1, 0, 8, dtype=torch.uint8), [0], r"inputs: got shape \[1, 1, 0, 8\]"),
        (
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            [0, 1],
            r"inputs: got shape \[2, 3, 8, 8\], takes \[B, 1, height",
        ),
        (torch.zeros(8, 8, dtype=torch.uint8), [0], r"inputs: got shape \[8, 8\]"),
        (
            torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
            [0],
            "clients: got 1 of them for 2 inputs",
        ),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), ["a"], r"clients: got \['a'\], takes a whole number for each"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.tensor([0.5]), "clients: got tensor.* takes a whole"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), [77], "clients: got 77, which has no file"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), [-1], "clients: got -1, which has no file"),
    ],
)
def test_requests_that_cannot_be_answered(inputs, clients, match: str, exported: Path) -> None:
    with pytest.raises(ServingError, match=match) as caught:
        load(exported)(inputs, clients)
    assert "\n" not in str(caught.value)


def test_texts_that_cannot_be_answered() -> None:
    trained("--dataset", "wordnet-glosses", "--model", "text-mini", "--samples", "300")
    assert main(["run", "out"]) == 0
    model = load("out", device="cpu", precision="fp32")
    length, most = model._shape["length"], model._shape["num_tokens"] - 1
    for inputs, match in (
        (torch.zeros(1, 4), "inputs: got torch.float32, takes a tensor of token ids"),
        (torch.zeros(1, length + 1, dtype=torch.int64), rf"takes \[B, 1 to {length} tokens\]"),
        (torch.tensor([[1, most + 1]]), f"inputs: got token ids from 1 to {most + 1}, takes 0 to {most}"),
        (torch.tensor([[-1, 1]]), "inputs: got token ids from -1 to 1"),
    ):
        with pytest.raises(ServingError, match=match):
            model(inputs, [0])
    expected = model(torch.tensor([[1, 2, 3]]), [0])
    torch.testing.assert_close(model(torch.tensor([[1, 2, 3]], dtype=torch.uint8), [0]), expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"device": "tpu"}, "--device: got tpu, takes auto, cpu, cuda, cuda:N or mps"),
        ({"precision": "fp8"}, "--precision: got 'fp8', takes one of"),
        ({"cached": -1}, "cached: got -1, takes 0 or more"),
    ],
)
def test_options_of_loading(options: dict, match: str, exported: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        load(exported, **options)


def reexported(path: Path, **changes: object) -> None:
    """The model's file as another program would write it: other words, and a checksum that fits."""
    tensors, metadata = read_tensors(FORMAT, path)
    about = json.loads(metadata["about"])
    about |= {name: value for name, value in changes.items() if name != "config"}
    about["config"] |= changes.get("config", {})
    write_tensors(FORMAT, path, tensors, {"about": json.dumps(about)})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"round": "x"}, "'out/model.safetensors' does not say what model it is; export it again"),
        ({"classes": None}, "does not say what model it is"),
        ({"own": [1]}, "does not say what model it is"),
        ({"config": {"method": "evil.py:Method"}}, "names a method that is not of this package"),
        ({"config": {"method": None}}, "names a method that is not of this package"),
        ({"config": {"gaet": 1.0}}, r"cannot build it \(gaet: is no option of this version\)"),
        ({"config": {"bottleneck": "x"}}, r"cannot build it \(bottleneck: got 'x', takes a whole number\)"),
        ({"config": {"model": "vit-none"}}, r"cannot build it \(--model: got 'vit-none'"),
        ({"config": {"model": "vit-mini"}}, "its tensors do not fit what this version of fedperfix builds"),
        ({"shape": {}}, r"cannot build it \('image_size'\)"),
        ({"shape": {"image_size": 8, "channels": "x"}}, "cannot build it"),
    ],
)
def test_a_model_that_cannot_be_built(changes: dict, match: str, exported: Path) -> None:
    reexported(exported / MODEL, **changes)
    with pytest.raises(ServingError, match=match) as caught:
        load(exported)
    assert "\n" not in str(caught.value)


def test_words_that_are_no_json_and_files_of_others(exported: Path) -> None:
    tensors, _ = read_tensors(FORMAT, exported / MODEL)
    (exported / CLIENTS / "notes.safetensors").write_text("hello")
    (exported / CLIENTS / "-1.safetensors").write_text("hello")
    assert load(exported).clients == (0, 1, 2)
    for words in ({}, {"about": "{"}, {"about": "[]"}):
        write_tensors(FORMAT, exported / MODEL, tensors, words)
        with pytest.raises(ServingError, match="does not say what model it is"):
            load(exported)


def test_start_weights_and_files_in_a_model_are_not_read(exported: Path) -> None:
    first = load(exported)
    reexported(exported / MODEL, config={"pretrained_file": "/nowhere", "partition": "file", "method": "fedperfix"})
    assert load(exported)._model.state_dict().keys() == first._model.state_dict().keys()


def test_the_seed_of_a_run_is_not_in_its_export() -> None:
    trained("--seed", "9137", "--optimizer", "sgd")
    assert main(["run", "out"]) == 0
    with safe_open(Path("out") / MODEL, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["config"].keys() <= {"method", "model", "bottleneck"}
    assert "9137" not in json.dumps(about["config"])


def test_no_more_clients_than_asked_for_stay_in_memory(exported: Path) -> None:
    model = load(exported, cached=2)
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    together = model(images, [0, 1, 2])
    assert list(model._kept) == [1, 2]
    model(images[:2], [1, 0])
    assert list(model._kept) == [1, 0]
    assert torch.allclose(model(images, [0, 1, 2]), together)


def test_an_export_says_what_it_is(exported: Path) -> None:
    with safe_open(exported / MODEL, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["classes"] == ["a", "b", "c", "d"]
    assert about["shape"] == {"channels": 1, "image_size": 8}
    assert not {"run_dir", "resume", "data_dir"} & about["config"].keys()
