"""The tuner: what it keeps, what it refuses, and that it does not touch the package's table by itself."""

from __future__ import annotations

import json

import pytest
import torch

from fedperfix_kernels import tune
from fedperfix_kernels.attention import configs
from fedperfix_kernels.attention.configs import BACKWARD_WHOLE, FORWARD, HALF, LaunchConfig
from fedperfix_kernels.backends import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
SIZE = tune.Size(batch=1, heads=1, tokens=20, head_dim=16)


def tuner(monkeypatch, device, seconds, options: dict[str, list[LaunchConfig]]) -> tune.Tuner:
    """A tuner whose clock says what `seconds` says of the configuration in force, and few candidates."""
    monkeypatch.setattr(tune, "candidates", lambda kernel, _: iter(options.get(kernel, [])))

    def timer(call) -> float:
        call()
        found = {k: configs.launch_config(k, HALF, 16, 20, "test") for k in configs.KERNELS[:4]}
        return seconds(found)

    return tune.Tuner(configs.table(), "test", device, torch.float16, timer, report=lambda _: None)


def test_the_fastest_right_candidate_is_kept(monkeypatch, device) -> None:
    options = {FORWARD: [LaunchConfig(16, 16, 4, 1), LaunchConfig(32, 16, 4, 1), LaunchConfig(16, 32, 4, 1)]}
    times = {(16, 16): 3.0, (32, 16): 1.0, (16, 32): 2.0}

    def seconds(found) -> float:
        forward = found[FORWARD]
        return times.get((forward.block_m, forward.block_n), 5.0)

    found = tuner(monkeypatch, device, seconds, options)
    found.tune(SIZE)
    assert found.content["test"][HALF][FORWARD]["16"] == {"64": [32, 16, 4, 1, 0]}
    assert "test" not in configs.table()


def test_a_gain_within_the_noise_changes_nothing(monkeypatch, device) -> None:
    options = {FORWARD: [LaunchConfig(16, 16, 4, 1)]}
    found = tuner(monkeypatch, device, lambda f: 0.99 if f[FORWARD].block_m == 16 else 1.0, options)
    found.tune(SIZE)
    assert tune._pruned(found.content)["test"][HALF].get(FORWARD) is None


@pytest.mark.parametrize(("whole", "kept"), [(0.5, [16, 0, 4, 1, 0]), (2.0, [])])
def test_one_kernel_or_several_is_decided_by_the_clock(whole: float, kept: list[int], monkeypatch, device) -> None:
    options = {BACKWARD_WHOLE: [LaunchConfig(16, 0, 4, 1)]}
    found = tuner(monkeypatch, device, lambda f: whole if f[BACKWARD_WHOLE] else 1.0, options)
    found.tune(SIZE)
    assert found.content["test"][HALF][BACKWARD_WHOLE]["16"]["64"] == kept


def test_a_form_that_faults_is_not_tried(monkeypatch, device) -> None:
    options = {BACKWARD_WHOLE: [LaunchConfig(16, 0, 4, 1)]}
    found = tuner(monkeypatch, device, lambda f: 1.0, options)
    found.section = "sm_90"
    found.tune(tune.Size(batch=1, heads=1, tokens=20, head_dim=64))
    assert found.content["sm_90"][HALF][BACKWARD_WHOLE]["64"]["64"] == []


def test_a_candidate_that_computes_something_else_is_refused(monkeypatch, device) -> None:
    options = {FORWARD: [LaunchConfig(16, 16, 4, 1)]}
    found = tuner(monkeypatch, device, lambda f: 0.1 if f[FORWARD].block_m == 16 else 1.0, options)
    monkeypatch.setattr(tune, "_right", lambda *_: False)
    found.tune(SIZE)
    assert tune._pruned(found.content)["test"][HALF].get(FORWARD) is None


def test_the_table_is_written_as_it_is_read(tmp_path) -> None:
    content = configs.table() | {"sm_1": {HALF: {FORWARD: {"64": {}}}}}
    tune.write(content, tmp_path / "configs.json")
    assert json.loads((tmp_path / "configs.json").read_text()) == configs.table()
    assert (tmp_path / "configs.json").read_text() == configs.TABLE.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["configs.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys) -> None:
    assert tune.main([]) == 2
    assert "device: got none, takes a GPU" in capsys.readouterr().err
