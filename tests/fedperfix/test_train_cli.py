"""The training command, from its options to its files."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fedperfix.config import load
from fedperfix.data import DATASETS
from fedperfix.methods import METHODS
from fedperfix.models import PRESETS
from fedperfix.run import checkpoint, metrics
from fedperfix.run.lock import locked
from fedperfix.train import main
from fedperfix_kernels import explain
from tests.fedperfix import tiny

ROOT = Path(__file__).parents[2]
FILES = {
    "accuracy.png",
    "checkpoint.safetensors",
    "clients.csv",
    "config.toml",
    "costs.json",
    "environment.json",
    "metrics.csv",
    "metrics.jsonl",
    "partition.json",
    "partition.png",
    "summary.json",
}
_OPTIONS = {
    "--dataset": "cifar10",
    "--model": "tiny",
    "--clients": "3",
    "--sampled": "2",
    "--alpha": "1",
    "--batch-size": "32",
    "--bottleneck": "4",
    "--local-steps": "2",
    "--eval-every": "2",
    "--checkpoint-every": "2",
    "--device": "cpu",
}
# What a method asks for beside its defaults.
NEEDS = {"scaffold": ("--optimizer", "sgd")}
SMALL = [word for option in _OPTIONS.items() for word in option]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs of well under a second, in an empty folder."""
    monkeypatch.setitem(DATASETS, "cifar10", lambda data_dir: tiny.dataset())
    monkeypatch.setitem(PRESETS, "tiny", {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2})
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*options: str, rounds: int = 2) -> int:
    return main([*SMALL, "--rounds", str(rounds), *options])


def curves(folder: str | Path) -> list[dict]:
    """The metrics without what a clock says."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def refused(capsys: pytest.CaptureFixture, code: int) -> str:
    """The one sentence of a refused command, after which nothing is left behind."""
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("fedperfix: error: ")
    assert captured.err.count("\n") == 1
    assert not Path("runs").exists()
    return captured.err.removeprefix("fedperfix: error: ").strip()


@pytest.mark.parametrize("method", tuple(METHODS))
def test_a_run_leaves_its_files_and_says_where(method: str, capsys: pytest.CaptureFixture) -> None:
    assert run("--method", method, "--seed", "4", *NEEDS.get(method, ())) == 0
    folder = Path("runs") / f"cifar10-{method}-seed4"
    assert set(os.listdir(folder)) == FILES
    output = capsys.readouterr().out
    assert f"run folder   {folder}" in output
    assert METHODS[method].summary in output
    kernels = explain(None, torch.device("cpu"))
    assert f"aggregation  {kernels}" in output
    ours = method in ("fedperfix", "prefix-r", "prefix-z")
    assert f"attention    {kernels if ours else 'timm'}" in output
    config = load(folder / "config.toml")
    assert (config.method, config.seed, config.local_steps, config.rounds) == (method, 4, 2, 2)
    assert [row["round"] for row in curves(folder)] == [1, 2]
    assert curves(folder)[0]["all_mean"] is None
    assert 0 <= curves(folder)[1]["all_mean"] <= 100
    assert json.loads((folder / "environment.json").read_text())[0]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.parametrize(
    ("option", "said"), [("shared-batches", "in shared batches"), ("one-by-one", "one client after the other")]
)
def test_the_header_says_how_clients_are_tested(option: str, said: str, capsys: pytest.CaptureFixture) -> None:
    assert run("--evaluation", option) == 0
    assert f"evaluation   {said}\n" in capsys.readouterr().out


def test_a_second_run_takes_the_next_free_folder() -> None:
    assert run(rounds=1) == run(rounds=1) == run(rounds=1) == 0
    names = {f"cifar10-fedperfix-seed0{suffix}" for suffix in ("", "-2", "-3")}
    assert set(os.listdir("runs")) == names
    first, second, third = (curves(Path("runs") / name) for name in sorted(names))
    assert first == second == third


def test_a_federation_learns() -> None:
    run("--run-dir", "a", "--local-steps", "10", "--lr", "0.003", rounds=6)
    last = curves("a")[-1]
    assert last["all_mean"] > 60  # four classes that differ in brightness; chance is 25
    assert last["train_loss"] < curves("a")[0]["train_loss"]


@pytest.mark.parametrize("mode", ["gated", "concat", "additive"])
def test_fused_and_plain_reference_give_the_same_curves(mode: str) -> None:
    options = ("--mode", mode, "--init", "default", "--gate", "0.7", "--eval-every", "1", "--precision", "fp32")
    assert run("--fused", "--run-dir", "fused", *options, rounds=3) == 0
    assert run("--no-fused", "--run-dir", "plain", *options, rounds=3) == 0
    for fused, plain in zip(curves("fused"), curves("plain"), strict=True):
        for key in ("train_loss", "local_loss", "all_loss", "sampled_loss"):
            assert fused[key] == pytest.approx(plain[key], rel=1e-4), key
    fused, plain = (load_file(f"{name}/checkpoint.safetensors") for name in ("fused", "plain"))
    start = max(float((fused[name] - plain[name]).abs().max()) for name in fused)
    assert 0 < start < 1e-3  # two implementations, one result


@pytest.mark.parametrize("method", ["fedperfix", "local", "fedavg"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(method: str) -> None:
    assert run("--method", method, "--run-dir", "whole", rounds=6) == 0
    assert run("--method", method, "--run-dir", "parts", rounds=2) == 0
    metrics.append(Path("parts"), metrics.read(Path("whole"))[2])  # a round after the checkpoint: cut away
    assert main(["--resume", "parts", "--rounds", "4"]) == 0
    assert main(["--resume", "parts", "--rounds", "6"]) == 0
    assert curves("parts") == curves("whole")
    csv = [
        [row.split(",")[: metrics.COLUMNS.index("images")] for row in Path(name, "metrics.csv").read_text().split()]
        for name in ("parts", "whole")
    ]
    assert csv[0] == csv[1]
    for name in ("clients.csv", "config.toml"):
        assert Path("parts", name).read_text() == Path("whole", name).read_text()
    parts, whole = (load_file(f"{name}/checkpoint.safetensors") for name in ("parts", "whole"))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert [entry["first_round"] for entry in json.loads(Path("parts/environment.json").read_text())] == [1, 3, 5]


def test_resuming_a_finished_run_shows_its_summary_again(capsys: pytest.CaptureFixture) -> None:
    run("--run-dir", "a")
    before = curves("a")
    capsys.readouterr()
    assert main(["--resume", "a"]) == 0
    assert "last 2" in capsys.readouterr().out
    assert curves("a") == before


WRONG = [
    (["--method", "fedprefix"], "--method: got 'fedprefix', takes one of fedperfix, fedavg"),
    (["--model", "vit_smal_patch16_224"], "--model: got 'vit_smal_patch16_224'"),
    (["--alpha", "0"], "--alpha: got 0"),
    (["--sampled", "9"], "--sampled: got 9, takes at most --clients"),
    (["--clients", "1000"], "--clients: got 1000"),
    (["--image-size", "9"], "--image-size: got 9, takes a multiple of the model's patch size 4"),
    (["--dataset", "cifar100", "--data-dir", "file"], "--data-dir"),
    (["--depth", "7"], "--depth: got 7"),
    (["--device", "cuda:77"], "--device: got 'cuda:77'"),
    (["--resume", "nowhere"], "--resume: got 'nowhere'"),
    (["--rounds", "x"], "--rounds: got 'x', takes a whole number"),
    (["--run-dir", "file"], "--run-dir: 'file' is a file"),
    (["--run-dir", "full"], "--run-dir: 'full' is not empty"),
    (["--run-dir", "file/below"], "cannot write or read"),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_wrong_input_is_one_sentence_and_no_run(options: list[str], sentence: str, capsys) -> None:
    Path("file").write_text("here first")
    Path("full").mkdir()
    Path("full/notes").write_text("here first")
    code = main(options) if options[0] == "--resume" else run(*options)
    assert sentence in refused(capsys, code)
    assert Path("file").read_text() == "here first"
    assert os.listdir("full") == ["notes"]


def test_a_checkpoint_that_does_not_fit_leaves_the_folder_as_it_was(capsys: pytest.CaptureFixture) -> None:
    run("--run-dir", "a")
    run("--run-dir", "b", "--method", "fedavg")
    Path("a/checkpoint.safetensors").write_bytes(Path("b/checkpoint.safetensors").read_bytes())
    before = {name: Path("a", name).read_bytes() for name in os.listdir("a")}
    capsys.readouterr()
    assert "was made with another configuration" in refused(capsys, main(["--resume", "a", "--rounds", "3"]))
    Path("a/checkpoint.safetensors").write_bytes(b"not a checkpoint")
    damaged = "--resume: 'a/checkpoint.safetensors' is damaged or no safetensors file"
    assert damaged in refused(capsys, main(["--resume", "a"]))
    Path("a/checkpoint.safetensors").write_bytes(before["checkpoint.safetensors"])
    assert {name: Path("a", name).read_bytes() for name in os.listdir("a")} == before


def test_a_resumed_run_takes_no_other_options_and_no_fewer_rounds(capsys: pytest.CaptureFixture) -> None:
    run("--run-dir", "a")
    capsys.readouterr()
    assert "--lr: got 0.1" in refused(capsys, main(["--resume", "a", "--lr", "0.1"]))
    assert "--rounds: got 1, takes at least the 2" in refused(capsys, main(["--resume", "a", "--rounds", "1"]))
    assert "--run-dir: got 'c'" in refused(capsys, main(["--resume", "a", "--run-dir", "c"]))
    Path("a/metrics.jsonl").write_text("")
    assert "has not all of the rounds 1 to 2" in refused(capsys, main(["--resume", "a", "--rounds", "3"]))


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_is_full_at_the_start_leaves_no_run(existing: bool, monkeypatch, capsys) -> None:
    monkeypatch.setattr(checkpoint, "save", no_space)
    where = Path("some/where/run")
    if existing:
        where.mkdir(parents=True)
    assert "No space left on device" in refused(capsys, run("--run-dir", str(where)))
    assert where.exists() == existing
    assert Path("some").exists() == existing
    assert not existing or not any(where.iterdir())


def test_a_disk_that_is_full_on_the_way_leaves_a_run_that_can_go_on(monkeypatch, capsys) -> None:
    assert run("--run-dir", "whole", rounds=4) == 0
    with monkeypatch.context() as patch:
        append = metrics.append
        patch.setattr(metrics, "append", lambda where, row: no_space() if row.round == 3 else append(where, row))
        capsys.readouterr()
        assert "No space left on device" in refused(capsys, run("--run-dir", "a", rounds=4))
    assert len(curves("a")) == 2
    assert main(["--resume", "a"]) == 0
    assert curves("a") == curves("whole")


def test_tensorboard_has_the_curves_or_the_way_to_get_it(monkeypatch, capsys) -> None:
    if pytest.importorskip("tensorboard", reason="an extra"):
        assert run("--tensorboard", "--run-dir", "a") == 0
        assert any(name.startswith("events") for name in os.listdir("a/tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    capsys.readouterr()
    assert "pip install tensorboard" in refused(capsys, run("--tensorboard", "--run-dir", "b"))
    assert not Path("b").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_saves_the_last_finished_round_and_says_how_to_go_on(number: signal.Signals) -> None:
    options = "--clients 4 --sampled 2 --local-steps 4 --test-fraction 0.01 --batch-size 8 --checkpoint-every 100"
    command = [sys.executable, "-m", "fedperfix.train", "--rounds", "10000", *options.split(), "--run-dir", "a"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("round     2/"):
            break
    time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert not errors
    assert "python -m fedperfix.train --resume a" in output
    rounds = len(curves("a"))
    assert rounds >= 2
    assert f"interrupted after round {rounds}" in output
    assert [row["round"] for row in curves("a")] == list(range(1, rounds + 1))
    with safe_open("a/checkpoint.safetensors", "pt") as file:
        assert file.metadata()["round"] == str(rounds)
    assert main(["--resume", "a", "--rounds", str(rounds + 1)]) == 0
    assert len(curves("a")) == rounds + 1


def test_importing_the_package_is_quick_and_spinning_threads_are_a_default_only() -> None:
    code = "import sys, os, fedperfix, fedperfix.run.threads; assert 'torch' not in sys.modules; "
    code += "print(os.environ.get('GOMP_SPINCOUNT')); print(fedperfix.PrefixAttention.__module__)"
    own = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    own["PYTHONPATH"] = str(ROOT)
    for given, expected in (({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")):
        output = subprocess.run([sys.executable, "-c", code], env=own | given, capture_output=True, text=True)
        assert output.stdout.split() == [expected, "fedperfix_kernels.nn.attention"], output.stderr


def test_one_process_at_a_time_works_in_a_folder(capsys: pytest.CaptureFixture) -> None:
    assert run("--run-dir", "a") == 0
    before = {path.name: path.read_bytes() for path in Path("a").iterdir()}
    with locked(Path("a"), "--resume"):
        assert main(["--resume", "a", "--rounds", "4"]) == 2
    assert "--resume: 'a' is in use by another process; wait for its end" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("a").iterdir()} == before
    Path("b").mkdir()
    with locked(Path("b"), "--run-dir"):
        assert run("--run-dir", "b") == 2
    assert "--run-dir: 'b' is in use by another process" in capsys.readouterr().err
    assert run("--run-dir", "b") == 0


def test_a_damaged_record_of_the_environment_stops_a_resumption(capsys: pytest.CaptureFixture) -> None:
    assert run("--run-dir", "a") == 0
    for content in (b"{", b"\xff", b"{}"):
        Path("a/environment.json").write_bytes(content)
        config = Path("a/config.toml").read_bytes()
        assert main(["--resume", "a", "--rounds", "4"]) == 2
        assert "'a/environment.json' is damaged; delete it" in capsys.readouterr().err
        assert Path("a/config.toml").read_bytes() == config
