"""The options: one flat dataclass, and what each of its fields takes."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

GROUPS = ("Method", "Data", "Model", "Training", "Trust", "Output")
OPTIMIZERS = ("sgd", "adamw")
FINETUNED = ("head", "all")
PROMPT_DEPTHS = ("shallow", "deep")
PERFEDAVG_VARIANTS = ("fo", "hf")
PROTOCOLS = ("final", "authors-code", "both")
REDUCTIONS = ("exact", "sum")
EVALUATIONS = ("auto", "shared-batches", "one-by-one")
TABLES = ("auto", "memory", "disk")
PRIVACY = ("none", "central", "local")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# A resumed run may differ in these from the run it continues: they change where and how long, not what.
RESUMABLE = (
    "rounds",
    "device",
    "data_dir",
    "cache_dir",
    "run_dir",
    "checkpoint_every",
    "tensorboard",
    "process_timeout",
    "parallel_clients",
)
# A saved configuration describes the experiment, not the folder that it was run in.
NOT_SAVED = ("run_dir", "resume")

_LIMITS = (("at_least", "of at least"), ("above", "above"), ("below", "below"), ("at_most", "at most"))
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


class ConfigError(ValueError):
    """A wrong setting; the message is one sentence that names the option and what it takes."""


# The registries are imported when they are asked for: they import this module for ConfigError.
def _aggregators() -> tuple[str, ...]:
    from fedperfix.methods.aggregators import AGGREGATORS

    return AGGREGATORS


def _attacks() -> tuple[str, ...]:
    from fedperfix.engine.attack import ATTACKS

    return ATTACKS


def _methods() -> tuple[str, ...]:
    from fedperfix.methods import METHODS

    return tuple(METHODS)


def _datasets() -> tuple[str, ...]:
    from fedperfix.data import DATASETS, SIZED_DATASETS

    return (*DATASETS, *SIZED_DATASETS)


def _partitions() -> tuple[str, ...]:
    from fedperfix.data.partition import PARTITIONS

    return PARTITIONS


def _splits() -> tuple[str, ...]:
    from fedperfix.data.partition import SPLITS

    return SPLITS


def _groups() -> tuple[str, ...]:
    from fedperfix.models.groups import GROUPS

    return GROUPS


def _kernel_choices(name: str) -> Callable[[], tuple[str, ...]]:
    def choices() -> tuple[str, ...]:
        from fedperfix_kernels import attention, nn

        return getattr(attention if name == "MODES" else nn, name)

    return choices


def _linear_choices() -> tuple[str, ...]:
    from fedperfix_kernels.linear import CHOICES

    return CHOICES


def _option(
    default: Any,
    group: str,
    text: str,
    *,
    choices: Callable[[], tuple[str, ...]] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    or_prefix: str | None = None,
) -> Any:
    """A field of `TrainConfig`: its default, its place in --help, and the values that it takes.

    A text may also begin with `or_prefix` instead of being one of `choices`.
    """
    metadata = {
        "group": group,
        "help": text,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "below": below,
        "at_most": at_most,
        "or_prefix": or_prefix,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run, as scalars; the fields' help texts say what each one means."""

    method: str = _option(
        "fedperfix", "Method", "the federated method, or FILE.py:Class for one of your own", choices=_methods
    )
    mode: str = _option(
        "gated",
        "Method",
        "how the prefix enters the attention: a gated second branch, keys beside the base keys (the paper's "
        "equations), or added to the keys (the authors' code)",
        choices=_kernel_choices("MODES"),
    )
    prefix: str = _option("adapter", "Method", "where the prefix comes from", choices=_kernel_choices("PREFIXES"))
    gate: float = _option(1.0, "Method", "the scale of the prefix (its start, when it is learned)")
    learn_gate: bool = _option(True, "Method", "learn the gate, one value per attention head")
    bottleneck: int = _option(64, "Method", "inner width of the adapter", at_least=1)
    prefix_len: int = _option(10, "Method", "number of keys, with --prefix tokens", at_least=1)
    depth: int | None = _option(
        None,
        "Method",
        "number of first blocks that get a plugin, such as a prefix (default: all)",
        at_least=1,
    )
    init: str = _option(
        "zero",
        "Method",
        "start of the prefix: zero leaves the model's output as it was",
        choices=_kernel_choices("INITS"),
    )
    prox_mu: float = _option(0.01, "Method", "fedprox: weight μ of the proximal term", at_least=0)
    scaffold_server_lr: float = _option(1.0, "Method", "scaffold: the server's step size", above=0)
    fedrep_head_epochs: int | None = _option(
        None,
        "Method",
        "fedrep: epochs of the head before those of the body (default: as long as the body's training)",
        at_least=1,
    )
    finetune: str = _option(
        "head", "Method", "fedbabu: what is fine-tuned before a test, the head or all", choices=lambda: FINETUNED
    )
    finetune_epochs: int = _option(1, "Method", "fedbabu: epochs of fine-tuning before a test", at_least=1)
    finetune_steps: int | None = _option(
        None, "Method", "fedbabu: steps of fine-tuning before a test, instead of --finetune-epochs", at_least=1
    )
    lg_shared_blocks: int = _option(
        0, "Method", "lg-fedavg: last blocks of the model that are shared, besides the head", at_least=0
    )
    apfl_alpha: float = _option(
        0.5, "Method", "apfl: part of the personal model in the mixture (its start)", at_least=0, at_most=1
    )
    apfl_adaptive: bool = _option(True, "Method", "apfl: learn the mixture, one value per client")
    apfl_alpha_lr: float | None = _option(
        None, "Method", "apfl: step size of the learned mixture (default: --lr)", above=0
    )
    perfedavg_variant: str = _option(
        "fo",
        "Method",
        "per-fedavg: fo leaves the second derivative out, hf approximates it by a difference of gradients",
        choices=lambda: PERFEDAVG_VARIANTS,
    )
    perfedavg_alpha: float = _option(
        0.01, "Method", "per-fedavg: step size of the adaptation, in training and before a test", above=0
    )
    perfedavg_delta: float = _option(
        1e-3, "Method", "per-fedavg: half the distance of hf's two gradients, times the gradient", above=0
    )
    ditto_lambda: float = _option(
        0.1, "Method", "ditto: pull λ of the personal model towards the global one", at_least=0
    )
    ditto_epochs: int | None = _option(
        None, "Method", "ditto: epochs of the personal model (default: as the global one)", at_least=1
    )
    ditto_steps: int | None = _option(
        None, "Method", "ditto: steps of the personal model, instead of --ditto-epochs", at_least=1
    )
    pfedme_lambda: float = _option(
        15.0, "Method", "pfedme: pull λ of the personal model towards the local one", above=0
    )
    pfedme_inner_steps: int = _option(
        5, "Method", "pfedme: steps K of the personal model on each batch, with --lr", at_least=1
    )
    pfedme_eta: float = _option(
        0.005,
        "Method",
        "pfedme: step size η of the local model, times λ",
        above=0,
    )
    pfedme_beta: float = _option(1.0, "Method", "pfedme: part β of the new mean in the new global model", above=0)
    fedala_blocks: int = _option(
        0,
        "Method",
        "fedala: last blocks merged by learned weights, besides the head",
        at_least=0,
    )
    fedala_sample: float = _option(
        0.8,
        "Method",
        "fedala: part of the training images that the weights are learned on",
        above=0,
        at_most=1,
    )
    fedala_lr: float = _option(1.0, "Method", "fedala: step size of the weights", above=0)
    fedala_start_passes: int = _option(
        100, "Method", "fedala: most passes when a client learns its weights for the first time", at_least=1
    )

    local: str = _option("head", "Method", "groups of parameters that stay with the client, with --method partial")
    local_modules: str | None = _option(
        None, "Method", "modules that stay with the client besides the method's own, by name; such as blocks.11"
    )
    prompt_len: int = _option(10, "Method", "prompts: number of learned tokens", at_least=1)
    prompt_depth: str = _option(
        "deep",
        "Method",
        "prompts: enter before the first block only, or new ones before every block",
        choices=lambda: PROMPT_DEPTHS,
    )
    lora_rank: int = _option(8, "Method", "lora: rank r of the updates", at_least=1)
    lora_alpha: float = _option(8.0, "Method", "lora: the updates are multiplied by this over the rank", above=0)
    lora_projections: str | None = _option(
        None, "Method", "lora: which matrices get an update, some of q, k, v, o; such as q,v (default: q,k,v)"
    )
    fedtp_embedding: int = _option(32, "Method", "fedtp: width of a client's embedding", at_least=1)
    fedtp_hidden: int = _option(
        64, "Method", "fedtp: width of the hypernetwork; each generated weight takes so many parameters", at_least=1
    )
    fedtp_lr: float = _option(0.3, "Method", "fedtp: step size of the hypernetwork and the embeddings", above=0)

    dataset: str = _option(
        "fashion-mnist",
        "Data",
        "the images or texts, or hf:NAME of the Hugging Face Hub; fashion-mnist (images) and wordnet-glosses "
        "(texts) are part of the package",
        choices=_datasets,
        or_prefix="hf:",
    )
    data_dir: str | None = _option(
        None,
        "Data",
        "folder or file of the data set; cifar10 and cifar100 are downloaded into it if it is empty or missing",
    )
    samples: int | None = _option(
        None,
        "Data",
        "use a random part of the data set, so many images, the same for every seed (default: all)",
        at_least=2,
    )
    cache_dir: str | None = _option(
        None, "Data", "folder in which decoded picture files are kept (default: ~/.cache/fedperfix)"
    )
    clients: int = _option(32, "Data", "number of clients that the images are divided among", at_least=1)
    partition: str = _option(
        "dirichlet", "Data", "how the images are divided among the clients", choices=_partitions
    )
    partition_file: str | None = _option(
        None, "Data", "the file of --partition file, as a run or python -m fedperfix.partition writes it"
    )
    alpha: float = _option(
        0.1, "Data", "concentration of the Dirichlet partitions and of quantity; small is uneven", above=0
    )
    shards_per_client: int = _option(2, "Data", "shards of each client, with --partition shards", at_least=1)
    min_client_size: int | None = _option(
        None,
        "Data",
        "fewest images that a client may have (default: 27 % of the mean, as in the paper, or what can be had)",
        at_least=2,
    )
    split: str = _option(
        "random", "Data", "how a client's test images are chosen: at random, or so in every class", choices=_splits
    )
    test_fraction: float = _option(
        0.25, "Data", "part of each client's images that is held out for its test", above=0, below=1
    )

    model: str = _option(
        "auto",
        "Model",
        "vit-mini, cnn-mini or the name of a timm model for images, text-mini for texts; auto is text-mini with "
        "--dataset wordnet-glosses, else vit-mini",
    )
    pretrained: bool = _option(False, "Model", "start from timm's pretrained weights")
    pretrained_file: str | None = _option(
        None, "Model", "start from the weights in a safetensors file (docs/models.md says which)"
    )
    image_size: int | None = _option(
        None, "Model", "side to which images are resized (default: the images' own)", at_least=1
    )

    rounds: int = _option(40, "Training", "number of federated rounds", at_least=1)
    sampled: int = _option(8, "Training", "number of clients that train in a round", at_least=1)
    local_epochs: int = _option(1, "Training", "passes of a client over its images in a round", at_least=1)
    local_steps: int | None = _option(
        None, "Training", "optimizer steps of a client in a round, instead of --local-epochs", at_least=1
    )
    batch_size: int = _option(32, "Training", "images per optimizer step", at_least=1)
    lr: float = _option(1e-3, "Training", "learning rate", above=0)
    optimizer: str = _option("adamw", "Training", "optimizer of the clients", choices=lambda: OPTIMIZERS)
    momentum: float = _option(0.0, "Training", "momentum, with --optimizer sgd", at_least=0, below=1)
    weight_decay: float = _option(0.0, "Training", "weight decay", at_least=0)
    precision: str = _option(
        "auto",
        "Training",
        "number format of forward and backward; auto chooses by the device",
        choices=lambda: PRECISIONS,
    )
    fused: bool = _option(True, "Training", "fused attention and aggregation, or the plain reference")
    linear: str = _option(
        "auto",
        "Training",
        "what multiplies float32 in linear layers on a processor: PyTorch's F.linear or its oneDNN; auto is oneDNN "
        "on AMD from Zen 5 on",
        choices=_linear_choices,
    )
    compile: bool = _option(
        False,
        "Training",
        "compile the training step with torch.compile: about a minute at the start, faster steps afterwards",
    )
    freeze_backbone: bool = _option(
        False,
        "Training",
        "train, and send, only plugins, head and what is local; all else keeps the values it starts with",
    )
    clients_per_step: str = _option(
        "auto",
        "Training",
        "how many clients train in one batch: a number, or auto: the fastest on a GPU, 1 on a processor",
    )
    parallel_clients: str = _option(
        "auto",
        "Training",
        "how many clients train at the same time on a processor, each on its part of the cores: a number, or auto: "
        "one per core where a step is too short to be divided",
    )
    device: str = _option("auto", "Training", "auto, cpu, cuda, cuda:N or mps")
    reduction: str = _option(
        "exact",
        "Training",
        "how the uploads of several processes come together: as they are, with the bits of one process, or "
        "as partial sums, for large cohorts",
        choices=lambda: REDUCTIONS,
    )
    process_timeout: float = _option(
        1800.0,
        "Training",
        "with several processes, seconds that one waits for another before it gives up",
        above=0,
        at_most=604800,
    )
    seed: int = _option(0, "Training", "seed of every random choice", at_least=0)

    max_update_ratio: float = _option(
        1000.0,
        "Trust",
        "leave out an update that is more than so many times as large as the median of its round's; one that is "
        "not finite is left out in any case",
        at_least=1,
    )
    aggregator: str = _option(
        "mean",
        "Trust",
        "how the server combines the updates: their weighted mean, or a rule that a few clients cannot move far",
        choices=_aggregators,
    )
    byzantine: int | None = _option(
        None,
        "Trust",
        "how many clients of a round may be hostile, for trimmed-mean and multi-krum (default: a fifth)",
        at_least=0,
    )
    attack: str = _option(
        "none", "Trust", "for trials: what hostile clients do to their labels or their updates", choices=_attacks
    )
    attackers: float = _option(
        0.2, "Trust", "which part of all clients is hostile, with --attack", above=0, at_most=1
    )
    attack_scale: float = _option(
        10.0, "Trust", "how far hostile updates go, in lengths of honest ones, with --attack", above=0
    )
    dp: str = _option(
        "none",
        "Trust",
        "differential privacy of a client's data: clipped updates, and noise of the server or of every client, "
        "drawn from --seed: none against those who know the seed",
        choices=lambda: PRIVACY,
    )
    dp_clip: float = _option(1.0, "Trust", "largest norm of an update, with --dp", above=0)
    dp_noise: float = _option(
        1.0, "Trust", "standard deviation of the noise in multiples of --dp-clip, with --dp", above=0
    )
    dp_delta: float = _option(1e-5, "Trust", "delta for which epsilon is reported, with --dp", above=0, below=1)

    protocol: str = _option(
        "final",
        "Output",
        "how all clients are tested: after the aggregation, as the paper says, as its authors' code does, or both",
        choices=lambda: PROTOCOLS,
    )
    evaluation: str = _option(
        "auto",
        "Output",
        "how clients are tested: many in one batch over the global model, or one by one; auto by device and model",
        choices=lambda: EVALUATIONS,
    )
    eval_every: int = _option(5, "Output", "rounds between evaluations over all clients", at_least=1)
    eval_clients: int | None = _option(
        None, "Output", "test only so many clients in an evaluation, new ones each time (default: all)", at_least=1
    )
    checkpoint_every: int = _option(5, "Output", "rounds between checkpoints", at_least=1)
    personal_table: str = _option(
        "auto",
        "Output",
        "where the clients' own states lie: in memory, or on disk in the run's folder; auto is disk if they exceed "
        "a quarter of the memory",
        choices=lambda: TABLES,
    )
    run_dir: str | None = _option(None, "Output", "folder of the run (default: a new one under runs/)")
    resume: str | None = _option(
        None, "Output", "folder of a run to continue, with the configuration that is in it"
    )
    tensorboard: bool = _option(False, "Output", "write TensorBoard files as well")

    def __post_init__(self) -> None:
        if self.model == "auto":  # so that a saved configuration names the model
            from fedperfix.data import TEXT_DATASETS

            object.__setattr__(self, "model", "text-mini" if self.dataset in TEXT_DATASETS else "vit-mini")

    def validate(self) -> TrainConfig:
        """Check every value, and those that depend on each other.

        Returns:
            The same configuration, so that the call can end an expression.

        Raises:
            ConfigError: the first wrong value.
        """
        for name, kind in KINDS.items():
            _check_field(name, kind, getattr(self, name))
        if self.sampled > self.clients:
            raise _wrong("sampled", self.sampled, f"at most --clients, which is {self.clients}")
        if self.eval_clients is not None and self.eval_clients > self.clients:
            raise _wrong("eval_clients", self.eval_clients, f"at most --clients, which is {self.clients}")
        if self.momentum and self.optimizer != "sgd":
            raise _wrong("momentum", self.momentum, f"0 with --optimizer {self.optimizer}; choose --optimizer sgd")
        if self.mode == "additive" and self.prefix == "tokens":
            takes = "'gated' or 'concat' with --prefix tokens, which has no key for each token of the image"
            raise _wrong("mode", self.mode, takes)
        if self.pretrained and self.pretrained_file is not None:
            raise ConfigError("--pretrained-file: takes the place of --pretrained; give one of the two")
        self._validate_local()
        if (self.partition == "file") != (self.partition_file is not None):
            takes = "the path of a partition file with --partition file, and only with it"
            raise _wrong("partition_file", self.partition_file, takes)
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise _wrong("device", self.device, "auto, cpu, cuda, cuda:N or mps")
        from fedperfix.methods import method_class

        method_class(self.method).validate(self)
        if self.freeze_backbone and method_class(self.method).needs_backbone:
            raise ConfigError(
                f"--freeze-backbone: takes another method than {self.method}, which trains the backbone"
            )
        for name in ("clients_per_step", "parallel_clients"):
            self._validate_number_of_clients(name)
        self._validate_aggregation()
        return self

    def _validate_number_of_clients(self, name: str) -> None:
        value = getattr(self, name)
        number = int(value) if value.isdecimal() else 0
        if value != "auto" and not 1 <= number <= self.sampled:
            raise _wrong(name, value, f"auto, or a number from 1 to --sampled, which is {self.sampled}")

    def _validate_aggregation(self) -> None:
        from fedperfix.engine import attack, privacy
        from fedperfix.methods import Method, aggregators, method_class

        mean = method_class(self.method).aggregate is Method.aggregate
        plain = {"reduction": "exact", "aggregator": "mean", "dp": "none"}
        for name, default in plain.items():
            if getattr(self, name) != default and not mean:
                takes = f"{default} with --method {self.method}, whose aggregation is more than a weighted mean"
                raise _wrong(name, getattr(self, name), takes)
        if self.reduction == "sum" and (self.aggregator != "mean" or self.dp == "central"):
            takes = "exact with --aggregator other than mean and with --dp central, which need all updates at once"
            raise _wrong("reduction", self.reduction, takes)
        aggregators.validate(self)
        privacy.validate(self)
        attack.validate(self)

    def _validate_local(self) -> None:
        groups = _groups()
        for name in words(self.local):
            if name not in groups:
                raise ConfigError(
                    f"--local: got '{name}', takes names of {', '.join(groups)}" + suggestion(name, groups)
                )


@dataclass(frozen=True)
class Kind:
    """The type of a field: one of int, float, bool, str, perhaps or None."""

    base: type
    optional: bool


def _kind(hint: Any) -> Kind:
    if isinstance(hint, types.UnionType):
        return Kind(next(a for a in typing.get_args(hint) if a is not types.NoneType), True)
    return Kind(hint, False)


FIELDS = {item.name: item for item in fields(TrainConfig)}
_HINTS = typing.get_type_hints(TrainConfig)
KINDS = {name: _kind(_HINTS[name]) for name in FIELDS}


def typed(kind: Kind, value: object, where: str) -> Any:
    """`value` if it is of the kind, a whole number as a float where a float is due."""
    if value is None and kind.optional:
        return None
    if kind.base is float and type(value) is int:
        return float(value)
    if type(value) is not kind.base:
        raise ConfigError(f"{where}: got {value!r}, takes {WORDS[kind.base]}")
    return value


def _check_field(name: str, kind: Kind, value: Any) -> None:
    typed(kind, value, option_name(name))
    if value is None:
        return
    rules = FIELDS[name].metadata
    if name == "method":
        from fedperfix.methods.custom import is_custom, load_class

        if is_custom(value):
            load_class(value)
            return
    if rules["choices"] is not None:
        choices = rules["choices"]()
        prefix = rules["or_prefix"]
        if value not in choices and not (prefix and value.startswith(prefix)):
            raise ConfigError(
                f"{option_name(name)}: got '{value}', takes one of {', '.join(choices)}"
                + (f" or {prefix}NAME" if prefix else "")
                + suggestion(value, choices)
            )
    elif kind.base is float and not math.isfinite(value):
        raise _wrong(name, value, _range_in_words("a finite number", rules))
    elif kind.base in (int, float) and not _within(value, rules):
        raise _wrong(name, value, _range_in_words(WORDS[kind.base], rules))


def _within(value: float, rules: typing.Mapping[str, Any]) -> bool:
    return (
        math.isfinite(value)
        and (rules["at_least"] is None or value >= rules["at_least"])
        and (rules["above"] is None or value > rules["above"])
        and (rules["below"] is None or value < rules["below"])
        and (rules["at_most"] is None or value <= rules["at_most"])
    )


def _range_in_words(noun: str, rules: typing.Mapping[str, Any]) -> str:
    limits = [
        f"{words} {rules[rule]}"
        for rule, words in (
            ("at_least", "of at least"),
            ("above", "above"),
            ("below", "below"),
            ("at_most", "at most"),
        )
        if rules[rule] is not None
    ]
    return f"{noun} {' and '.join(limits)}".rstrip()


def _wrong(name: str, value: object, takes: str) -> ConfigError:
    return ConfigError(f"{option_name(name)}: got {value}, takes {takes}")


def words(text: str | None) -> tuple[str, ...]:
    """The names in an option that takes several, separated by commas; None is none."""
    return tuple(word.strip() for word in text.split(",")) if text is not None else ()


def option_name(name: str) -> str:
    """The command-line option of a field: `local_epochs` is `--local-epochs`."""
    return "--" + name.replace("_", "-")


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the known one that it may have meant, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
