"""Command line, files and defaults: who wins, what is refused, and with which words."""

from __future__ import annotations

import dataclasses
import os

import pytest

from fedperfix import config as configuration
from fedperfix.config import ConfigError, TrainConfig, from_toml, given, load, options, parse_args, presets, to_toml


def test_defaults():
    config = parse_args([])
    assert config == TrainConfig()
    assert (config.method, config.dataset, config.clients, config.sampled) == ("fedperfix", "fashion-mnist", 32, 8)
    assert (config.lr, config.fused, config.min_client_size) == (1e-3, True, None)


def test_values_are_scalars():
    for item in dataclasses.fields(TrainConfig):
        assert item.default is None or type(item.default) in (bool, int, float, str)


def test_command_line():
    line = "--method fedavg --alpha 5e-1 --no-fused --learn-gate --depth 3 --local-steps=7 --gate -1.5"
    config = parse_args([*line.split(), "--device", "cuda:1", "--data-dir", "data", "--tensorboard"])
    expected = TrainConfig(
        method="fedavg",
        alpha=0.5,
        fused=False,
        depth=3,
        local_steps=7,
        gate=-1.5,
        device="cuda:1",
        data_dir="data",
        tensorboard=True,
    )
    assert config == expected


def test_command_line_over_file_over_default(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('alpha = 1\nclients = 10\nfused = false\nmethod = "local"\n')
    config = parse_args(["--clients", "20", "--config", str(path), "--fused"])
    assert config == TrainConfig(alpha=1.0, clients=20, fused=True, method="local")
    assert type(config.alpha) is float


def test_given_names_what_the_command_line_sets():
    assert given(["--config", "paper", "--lr", "0.1", "--no-fused"]) == {"lr", "fused"}
    assert given([]) == frozenset()


def test_epochs_of_the_command_line_replace_steps_of_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("local_steps = 5\n")
    assert parse_args(["--config", str(path)]).local_steps == 5
    assert parse_args(["--config", str(path), "--local-epochs", "2"]).local_steps is None
    with pytest.raises(ConfigError, match=r"--local-steps: .*one of the two"):
        parse_args(["--local-epochs", "2", "--local-steps", "3"])


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(alpha=1e-5, depth=2, fused=False, seed=2**62, min_client_size=7, local_steps=3),
        TrainConfig(model='a "quoted"\\name\n\té\x7f', lr=1e22, weight_decay=1e-300),
    ],
)
def test_toml_round_trip(config):
    assert from_toml(to_toml(config)) == config


def test_saved_configuration_does_not_hold_the_folder():
    text = to_toml(TrainConfig(run_dir="runs/1", resume="runs/0"))
    assert from_toml(text) == TrainConfig()


def test_presets():
    assert {"paper", "authors-code", "quick"} <= set(presets())
    paper = load("paper")
    assert (paper.mode, paper.alpha, paper.gate, paper.learn_gate) == ("concat", 0.1, 1.5, False)
    assert (paper.clients, paper.sampled, paper.min_client_size, paper.image_size) == (64, 8, None, 224)
    assert (paper.rounds, paper.local_epochs, paper.batch_size) == (50, 10, 64)
    assert (paper.optimizer, paper.lr, paper.precision) == ("sgd", 0.01, "fp32")
    assert (paper.model, paper.dataset, paper.bottleneck, paper.init) == (
        "vit_small_patch16_224",
        "cifar100",
        256,
        "default",
    )
    assert load("authors-code") == dataclasses.replace(
        paper, mode="additive", alpha=0.5, local_modules="blocks.11", protocol="both"
    )
    assert parse_args(["--config", "paper", "--rounds", "2"]) == dataclasses.replace(paper, rounds=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alhpa = 1.0", r"run\.toml: unknown key 'alhpa'; did you mean 'alpha'\?"),
        ("[data]\nalpha = 1.0", r"run\.toml: unknown key 'data'"),
        ('resume = "x"', r"run\.toml: unknown key 'resume'"),
        ('alpha = "x"', r"run\.toml: alpha: got 'x', takes a number"),
        ("clients = 1.5", r"run\.toml: clients: got 1\.5, takes a whole number"),
        ("clients = true", r"run\.toml: clients: got True, takes a whole number"),
        ("fused = 1", r"run\.toml: fused: got 1, takes true or false"),
        ("data_dir = 3", r"run\.toml: data_dir: got 3, takes a text"),
        ("alpha = ", r"run\.toml: not a TOML file"),
        ("alpha = -1", r"--alpha: got -1\.0, takes a number above 0"),
    ],
)
def test_wrong_file(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_args(["--config", str(path)])


def test_missing_or_unreadable_file(tmp_path):
    with pytest.raises(ConfigError, match=r"--config: cannot read 'papr'.*presets authors-code, paper"):
        parse_args(["--config", "papr"])
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"--config: cannot read .*not UTF-8"):
        parse_args(["--config", str(tmp_path / "binary.toml")])
    with pytest.raises(ConfigError, match=r"--config: cannot read"):
        parse_args(["--config", str(tmp_path)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--alpha -1", r"^--alpha: got -1\.0, takes a number above 0$"),
        ("--alpha 0", r"^--alpha: got 0\.0, takes a number above 0$"),
        ("--alpha nan", r"^--alpha: got nan, takes a finite number above 0$"),
        ("--lr inf", r"^--lr: got inf, takes a finite number above 0$"),
        ("--lr 0", r"^--lr: got 0\.0, takes a number above 0$"),
        ("--gate nan", r"^--gate: got nan, takes a finite number$"),
        ("--sampled 33", r"^--sampled: got 33, takes at most --clients, which is 32$"),
        ("--clients 0", r"^--clients: got 0, takes a whole number of at least 1$"),
        ("--rounds -4", r"^--rounds: got -4, takes a whole number of at least 1$"),
        ("--local-steps 0", r"^--local-steps: got 0, takes a whole number of at least 1$"),
        ("--min-client-size 1", r"^--min-client-size: got 1, takes a whole number of at least 2$"),
        ("--seed -1", r"^--seed: got -1, takes a whole number of at least 0$"),
        ("--test-fraction 1", r"^--test-fraction: got 1\.0, takes a number above 0 and below 1$"),
        ("--momentum 1", r"^--momentum: got 1\.0, takes a number of at least 0 and below 1$"),
        ("--momentum 0.9", r"^--momentum: got 0\.9, takes 0 with --optimizer adamw; choose --optimizer sgd$"),
        ("--clients x", r"^--clients: got 'x', takes a whole number$"),
        ("--clients 1.5", r"^--clients: got '1\.5', takes a whole number$"),
        ("--lr fast", r"^--lr: got 'fast', takes a number$"),
        ("--lr", r"^--lr: expected one argument$"),
        ("--precision fp8", r"^--precision: got 'fp8', takes one of auto, fp32, bf16, fp16"),
        ("--optimizer adam", r"^--optimizer: got 'adam', takes one of sgd, adamw; did you mean 'adamw'\?$"),
        ("--method fedprefix", r"^--method: got 'fedprefix', takes one of .*did you mean 'fedperfix'\?$"),
        ("--dataset mnist", r"^--dataset: got 'mnist', takes one of fashion-mnist, cifar10, cifar100"),
        ("--mode gate", r"^--mode: got 'gate', takes one of gated, concat, additive; did you mean 'gated'\?$"),
        ("--prefix token", r"^--prefix: got 'token', takes one of adapter, tokens, linear-zero, linear-random"),
        ("--init ones", r"^--init: got 'ones', takes one of zero, default"),
        (
            "--mode additive --prefix tokens",
            r"^--mode: got additive, takes 'gated' or 'concat' with --prefix tokens",
        ),
        ("--device cuda:x", r"^--device: got cuda:x, takes auto, cpu, cuda, cuda:N or mps$"),
        ("--client 3", r"^--client: unknown option; did you mean '--clients'\?$"),
        ("--no-fuse", r"^--no-fuse: unknown option; did you mean '--no-fused'\?$"),
        ("here", r"^here: unknown option$"),
    ],
)
def test_wrong_command_line(argv, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse_args(argv.split())
    assert "\n" not in str(error.value)


def test_a_file_may_have_what_another_option_turns_off(tmp_path):
    file = tmp_path / "private.toml"
    file.write_text("dp_noise = 4.0\nattack_scale = 2.0\n")
    assert parse_args(["--config", str(file)]).dp_noise == 4.0  # as every saved configuration has it


def test_wrong_types_in_python():
    with pytest.raises(ConfigError, match=r"--clients: got '8', takes a whole number"):
        TrainConfig(clients="8").validate()
    with pytest.raises(ConfigError, match=r"--clients: got None, takes a whole number"):
        TrainConfig(clients=None).validate()


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:12"])
def test_devices(device):
    assert parse_args(["--device", device]).device == device


class TestResume:
    """A resumed run takes its configuration from its folder."""

    @pytest.fixture
    def folder(self, tmp_path) -> str:
        saved = TrainConfig(alpha=0.7, rounds=3, clients=12, run_dir=str(tmp_path))
        (tmp_path / "config.toml").write_text(to_toml(saved))
        return str(tmp_path)

    def test_configuration_of_the_folder(self, folder):
        config = parse_args(["--resume", folder])
        assert config == TrainConfig(alpha=0.7, rounds=3, clients=12, run_dir=folder, resume=folder)

    def test_changes_that_are_allowed(self, folder):
        config = parse_args(["--resume", folder, "--rounds", "9", "--device", "cpu", "--run-dir", "x"])
        assert (config.rounds, config.device, config.run_dir, config.resume) == (9, "cpu", "x", folder)

    def test_contradiction(self, folder):
        with pytest.raises(
            ConfigError, match=r"--alpha: got 0\.5, but the run in .* has 0\.7; .*--rounds, --device"
        ):
            parse_args(["--resume", folder, "--alpha", "0.5"])
        assert parse_args(["--resume", folder, "--alpha", "0.7"]).alpha == 0.7

    def test_config_beside_it(self, folder):
        with pytest.raises(ConfigError, match=r"--config: .*leave --config out"):
            parse_args(["--resume", folder, "--config", "paper"])

    def test_not_a_run_folder(self, folder, tmp_path):
        with pytest.raises(ConfigError, match=r"--resume: got 'nowhere', takes the folder of a run"):
            parse_args(["--resume", "nowhere"])
        (tmp_path / "config.toml").write_text("alpha = 'x'")
        with pytest.raises(ConfigError, match=r"config\.toml: alpha: got 'x'"):
            parse_args(["--resume", folder])


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for item in dataclasses.fields(TrainConfig):
        assert configuration.option_name(item.name) in text
        assert item.metadata["help"] in text
        assert item.metadata["group"] in options.GROUPS
    for title in options.GROUPS:
        assert f"\n{title}:\n" in text
    assert "(default: 0.001)" in text
    assert "authors-code, paper, quick" in text
