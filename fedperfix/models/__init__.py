"""Models: small presets of our own for images and texts, and any timm Vision Transformer, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fedperfix.config import ConfigError, TrainConfig
from fedperfix.models.cnn import SmallCNN
from fedperfix.models.groups import GROUPS, parameter_groups
from fedperfix.models.plugins import as_option
from fedperfix.models.pretrained import hub_weights, load_weights
from fedperfix.models.text import TEXT_PRESETS
from fedperfix.randomness import torch_seed

if TYPE_CHECKING:
    from fedperfix.data import Dataset

__all__ = [
    "GROUPS",
    "PRESETS",
    "TEXT_PRESETS",
    "create_model",
    "create_text_model",
    "model_for",
    "parameter_groups",
]

# Names that are not timm's: arguments of timm's VisionTransformer, or of SmallCNN where there are none.
PRESETS: dict[str, dict[str, Any]] = {
    "vit-mini": {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3},
    "cnn-mini": {},
}


def model_for(config: TrainConfig, dataset: Dataset) -> nn.Module:
    """The model of a run for its data set, of images or texts.

    Raises:
        ConfigError: as `create_model` and `create_text_model`.
    """
    classes = len(dataset.class_names)
    if dataset.is_text:
        (length,) = input_shape(config, dataset)
        return create_text_model(config, num_tokens=dataset.num_tokens, length=length, num_classes=classes)
    channels, height, width = dataset.inputs.shape[1:]
    return create_model(config, channels=channels, num_classes=classes, image_hw=(height, width))


def input_shape(config: TrainConfig, dataset: Dataset) -> tuple[int, ...]:
    """The shape of one sample as the model sees it: [channels, size, size] of an image, [tokens] of a text.

    Raises:
        ConfigError: `--image-size` is given for texts, or not given for images that are not square.
    """
    if not dataset.is_text:
        channels, height, width = dataset.inputs.shape[1:]
        size = image_size(config, (height, width))
        return channels, size, size
    if config.image_size is not None:
        raise ConfigError(
            f"--image-size: got {config.image_size}, takes a number with images only; leave it out with the texts "
            f"of {dataset.name}"
        )
    return tuple(dataset.inputs.shape[1:])


def create_text_model(config: TrainConfig, *, num_tokens: int, length: int, num_classes: int) -> nn.Module:
    """Build the text model of a run, as `create_model` does for images.

    Args:
        config: names the model, the method and the plugin's options.
        num_tokens: how many token ids the data have.
        length: most tokens of a text.
        num_classes: of the data.

    Returns:
        The model, float32 on the CPU: token ids [B, up to length] to [B, num_classes].

    Raises:
        ConfigError: a model for images, pretrained weights, or a plugin that does not fit the model.
    """
    name = config.model
    if name not in TEXT_PRESETS:
        raise ConfigError(f"--model: got '{name}', takes {', '.join(TEXT_PRESETS)} with texts")
    if config.pretrained or config.pretrained_file:
        option = "--pretrained" if config.pretrained else "--pretrained-file"
        raise ConfigError(f"{option}: '{name}' has no pretrained weights; leave it out")
    shape = {"num_tokens": num_tokens, "length": length, "num_classes": num_classes}
    return _built(config, lambda: TEXT_PRESETS[name](**shape), torch.ones(1, length, dtype=torch.int32))


def create_model(config: TrainConfig, *, channels: int, num_classes: int, image_hw: tuple[int, int]) -> nn.Module:
    """Build the model of a run, with seeded initial weights and, where the method has prefixes, with them.

    Args:
        config: names the model, the method and the prefix's options.
        channels: of the data's images.
        num_classes: of the data.
        image_hw: the data's own height and width, used where `--image-size` is not given.

    Returns:
        The model, float32 on the CPU: [B, channels, size, size] to [B, num_classes]. Its attribute `start_weights`
        says in words what was loaded, None if nothing was.

    Raises:
        ConfigError: an unknown model, an image size that the patch does not divide, pretrained weights that cannot
            be had, a prefix that does not fit the model. The sentence names the option.
    """
    size = image_size(config, image_hw)
    shape = {"in_chans": channels, "num_classes": num_classes, "img_size": size}

    def build() -> nn.Module:
        model = _backbone(config.model, shape)
        _check_patch(model, size)
        _check_state(model, config.model)
        model.start_weights = _start(model, config)  # for the run's header
        return model

    return _built(config, build, torch.zeros(1, channels, size, size))


def _built(config: TrainConfig, build: Callable[[], nn.Module], example: torch.Tensor) -> nn.Module:
    """What `build` makes from the run's seed, with the method's plugins, tried on `example`."""
    from fedperfix.methods import method_class  # methods import this package for its parameter groups

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.seed, "model"))
        model = build()
        method_class(config.method).adapt(model, config)
        for module in model.modules():
            if hasattr(module, "fused_attn"):  # timm's switch between fused and eager attention
                module.fused_attn = config.fused
        _try(model, example, config.model)
    return model


def image_size(config: TrainConfig, image_hw: tuple[int, int]) -> int:
    """Height and width in pixels of the images that the model sees.

    Raises:
        ConfigError: the data's images are not square and `--image-size` is not given.
    """
    if config.image_size is not None:
        return config.image_size
    height, width = image_hw
    if height != width:
        raise ConfigError(
            f"--image-size: not given, and the data's images are {height}x{width}; give a number of pixels, "
            "the images are resized to a square of it"
        )
    return height


def _backbone(name: str, shape: dict[str, int]) -> nn.Module:
    if name in PRESETS:
        if not PRESETS[name]:
            return SmallCNN(shape["in_chans"], shape["num_classes"])
        return VisionTransformer(**PRESETS[name], **shape)
    if name in TEXT_PRESETS:
        raise ConfigError(f"--model: got '{name}', takes {', '.join(PRESETS)} or a timm model's name with images")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, [*PRESETS, *timm.list_models()], n=3, cutoff=0.5)
        like = f" such as {', '.join(close)}" if close else ""
        raise ConfigError(f"--model: got '{name}', takes {', '.join(PRESETS)} or a timm model's name{like}")
    return _timm_model(name, shape)


def _timm_model(name: str, shape: dict[str, Any]) -> nn.Module:
    """A model of timm's; convolutional networks take images of any size, and no `img_size`."""
    try:
        return timm.create_model(name, pretrained=False, **shape)
    except TypeError as error:
        if "img_size" not in str(error):
            raise ConfigError(f"--model: got '{name}', takes another of timm's models ({error})") from error
    shape = {key: value for key, value in shape.items() if key != "img_size"}
    return timm.create_model(name, pretrained=False, **shape)


def _start(model: nn.Module, config: TrainConfig) -> str | None:
    """Load the start weights that a new run asks for; a resumed one has its own, but for those that are frozen.

    Returns:
        What to say of them.
    """
    if config.resume is not None and not config.freeze_backbone:
        return None
    if config.pretrained_file is not None:
        return load_weights(model, config.model, Path(config.pretrained_file), "--pretrained-file")
    if config.pretrained:
        return load_weights(model, config.model, hub_weights(config.model), "--pretrained")
    return None


def _check_patch(model: nn.Module, size: int) -> None:
    patch_embed = getattr(model, "patch_embed", None)
    patch = getattr(patch_embed, "patch_size", None)
    if patch is None:
        return
    patch = max(patch) if isinstance(patch, (tuple, list)) else patch
    if size % patch:
        below, above = size // patch * patch, -(-size // patch) * patch
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"--image-size: got {size}, takes a multiple of the model's patch size {patch}; use {near}"
        )


def _check_state(model: nn.Module, name: str) -> None:
    """Refuse cumulative running statistics: they depend on a count of batches, which no client has of its own."""
    for layer, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
            raise ConfigError(
                f"--model: got '{name}', whose batch norm '{layer}' has momentum=None; takes one with a momentum "
                "such as 0.1"
            )


@torch.no_grad()
def _try(model: nn.Module, images: torch.Tensor, name: str) -> None:
    """One forward pass, so that a prefix or images that do not fit the model are found before a run begins."""
    training = model.training
    try:
        model.eval()(images)
    except ValueError as error:
        raise as_option(error) from error
    except (AssertionError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"--image-size: got {images.shape[-1]}, which '{name}' does not take ({reason}); use another size"
        ) from error
    finally:
        model.train(training)
