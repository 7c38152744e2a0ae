"""Named groups of parameters, told apart by the modules that hold them.

A method says which groups stay with the client. Every parameter is in exactly one group; where modules are nested
the first group of `GROUPS` that claims a parameter has it: the norm of q and k belongs to the attention layer, the
bias of the classifier to the head. Running statistics (batch norm's) are in the group of their module, like its
parameters.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fedperfix.config import ConfigError, suggestion
from fedperfix.models.plugins.adapters import Adapter
from fedperfix.models.plugins.lora import LowRank
from fedperfix.models.plugins.prompts import Prompts
from fedperfix_kernels import PrefixAttention
from fedperfix_kernels.arena import running_statistics, state_names
from fedperfix_kernels.nn import Prefix

# What a method adds to a model; first, because it lies inside the layers that it changes.
PLUGINS: dict[str, type[nn.Module]] = {"prefix": Prefix, "prompt": Prompts, "adapter": Adapter, "lora": LowRank}
GROUPS = (*PLUGINS, "head", "attention", "mlp", "patch_embed", "norm", "conv", "position", "other")

# timm has many attention, MLP and norm classes; their class names end in what they are.
_CLASS_SUFFIXES = {
    "attention": ("Attention", "AttentionPoolLatent"),
    "mlp": ("Mlp", "SwiGLU"),
    "patch_embed": ("PatchEmbed", "HybridEmbed", "TokenEmbed"),
    "norm": ("LayerNorm", "RmsNorm", "RMSNorm", "GroupNorm", "BatchNorm", "InstanceNorm"),
    "conv": ("_ConvNd",),
}
# What a VisionTransformer holds directly, beside its modules.
_POSITION_PARAMETERS = ("pos_embed", "cls_token", "reg_token", "dist_token")


def parameter_groups(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Sort a model's parameters into the named groups.

    Args:
        model: a timm VisionTransformer, or any module; `get_classifier()`, if it has one, names the head.

    Returns:
        For each of `GROUPS` the names of its parameters and running statistics (as in `state_names`, in that
        order), together all of them, each once. A group that the model does not have is empty.
    """
    owners = {group: _identities(modules) for group, modules in _modules(model).items()}
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    tensors = {**dict(model.named_parameters()), **running_statistics(model)}
    for name in state_names(model):
        owner = next((group for group in GROUPS if id(tensors[name]) in owners.get(group, ())), None)
        if owner is None:
            owner = "position" if name in _POSITION_PARAMETERS else "other"
        groups[owner].append(name)
    return {group: tuple(names) for group, names in groups.items()}


def upper_parameters(model: nn.Module, blocks: int, option: str) -> tuple[str, ...]:
    """Names of a model's upper parameters: its head and, if asked for, its last blocks and all that follows them.

    Args:
        model: any module; one with a sequence `blocks` (timm's ViTs) or `layers` (Swin's stages) for `blocks` > 0.
        blocks: how many of the last blocks.
        option: what to call `blocks` in an error.

    Raises:
        ConfigError: the model has no sequence of so many blocks, or no head.
    """
    if blocks == 0:
        head = parameter_groups(model)["head"]
        if not head:
            raise ConfigError(f"{option}: got 0, takes at least 1 with a model that has no head of its own")
        return head
    found = next((name for name in ("blocks", "layers") if hasattr(model, name)), None)
    total = len(getattr(model, found)) if found else 0
    if blocks > total:
        raise ConfigError(f"{option}: got {blocks}, takes at most {total}, the number of the model's blocks")
    names = state_names(model)
    first = next(i for i, name in enumerate(names) if name.startswith(f"{found}.{total - blocks}."))
    return tuple(names[first:])


def module_parameters(model: nn.Module, modules: Iterable[str]) -> tuple[str, ...]:
    """Names of the parameters in some of a model's modules.

    Args:
        model: any.
        modules: qualified names, as in `model.named_modules()`.

    Returns:
        The names, each once, in the order of `parameter_groups`.

    Raises:
        ConfigError: the model has no such module, or it holds no parameters.
    """
    known = [name for name, _ in model.named_modules() if name]
    names = [name for group in parameter_groups(model).values() for name in group]
    kept: dict[str, None] = {}
    for module in modules:
        inside = [name for name in names if name.startswith(f"{module}.")]
        if module not in known:
            raise ConfigError(
                f"--local-modules: the model has no module '{module}', takes names such as {known[0]}, {known[-1]}"
                + suggestion(module, known)
            )
        if not inside:
            raise ConfigError(f"--local-modules: '{module}' holds no parameters; leave it out")
        kept |= dict.fromkeys(inside)
    return tuple(kept)


def _modules(model: nn.Module) -> dict[str, list[nn.Module]]:
    modules: dict[str, list[nn.Module]] = {group: [] for group in (*PLUGINS, "head", *_CLASS_SUFFIXES)}
    modules["head"] = _classifiers(model)
    for module in model.modules():
        plugin = next((group for group, kind in PLUGINS.items() if isinstance(module, kind)), None)
        if plugin is not None:
            modules[plugin].append(module)
        elif isinstance(module, PrefixAttention):
            modules["attention"].append(module)
        else:
            names = tuple(cls.__name__ for cls in type(module).__mro__)
            for group, suffixes in _CLASS_SUFFIXES.items():
                if any(name.endswith(suffixes) for name in names):
                    modules[group].append(module)
                    break
    return modules


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """The classifier's modules; distilled models have two."""
    if not hasattr(model, "get_classifier"):
        return []
    classifier = model.get_classifier()
    return list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]


def _identities(modules: Iterable[nn.Module]) -> set[int]:
    return {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
