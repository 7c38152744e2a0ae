"""A user's own arrays: from Python through `arrays_dataset`, from the command line through one .npz file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fedperfix.data.dataset import DataError, Dataset

MAX_CHANNELS = 4  # grey, grey and alpha, colour, colour and alpha; with more, no shape would tell NHWC from NCHW


def arrays_dataset(
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    class_names: Sequence[str] | None = None,
    domains: ArrayLike | None = None,
    domain_names: Sequence[str] = (),
    groups: ArrayLike | None = None,
    name: str = "arrays",
    source: str | None = None,
    num_tokens: int | None = None,
) -> Dataset:
    """Check arrays and make a data set of them.

    Args:
        inputs: NumPy arrays or tensors: images, uint8 [n, H, W], [n, H, W, C] or [n, C, H, W] with C of 1 to 4, or
            texts, token ids [n, tokens], integers of at least 32 bits; 0 pads the shorter texts at their ends.
        labels: integers [n] or [n, 1], from 0, or texts, the classes' names; every class has a sample.
        class_names: one per class; None takes the texts of `labels` in alphabetical order, or the numbers.
        domains: integers [n], from 0, or texts: the domain of each sample.
        domain_names: one per domain; empty takes the texts of `domains` in alphabetical order, or the numbers.
        groups: integers or texts [n]: samples of one group are never divided between training and testing.
        name: of the data set.
        source: what to call the arrays in an error, such as their file; by default `name`.
        num_tokens: how many token ids there are; None is up to the largest in `inputs`.

    Raises:
        DataError: a wrong type, shape or range.
    """
    source = source or name
    values = _inputs(np.asarray(inputs), source)
    classes, names = _codes(labels, "labels", len(values), class_names, source)
    if domains is None:
        if len(domain_names):
            raise DataError(f"{source}: has names of domains but no domains; give `domains` too, or neither")
        of_domain, domain_names = None, ()
    else:
        of_domain, domain_names = _codes(domains, "domains", len(values), domain_names or None, source)
    return Dataset(
        name,
        values,
        classes,
        names,
        of_domain,
        domain_names,
        _groups(groups, len(values), source),
        num_tokens=_num_tokens(values, num_tokens, source),
    )


def load_npz(data_dir: Path | None) -> Dataset:
    """The data set in one .npz file with the keys `images` and `labels`, perhaps `domains`, `groups`, and the names
    `classes` and `domain_names`; their shapes and types are those of `arrays_dataset`.

    Args:
        data_dir: the file; its name without .npz is the data set's.

    Raises:
        DataError: no such file, not an .npz file, truncated, a key that is missing or unknown, or wrong arrays.
    """
    if data_dir is None:
        raise DataError("--data-dir: not given, --dataset npz takes the path of an .npz file")
    arrays = read_npz(data_dir, ("images", "labels"), ("domains", "groups", "classes", "domain_names"))
    return arrays_dataset(
        arrays["images"],
        arrays["labels"],
        class_names=_names(arrays, "classes", data_dir),
        domains=arrays.get("domains"),
        domain_names=_names(arrays, "domain_names", data_dir) or (),
        groups=arrays.get("groups"),
        name=data_dir.stem,
        source=str(data_dir),
    )


def read_npz(file: Path, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, without unpickling anything.

    Raises:
        DataError: the file cannot be read, lacks a required key or has one that is neither.
    """
    if not file.is_file():
        raise DataError(f"--data-dir: got '{file}', which is not a file; takes the path of an .npz file")
    try:
        if not zipfile.is_zipfile(file) and not file.read_bytes()[:6] == np.lib.format.MAGIC_PREFIX:
            raise ValueError("it is no whole zip archive")
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = "it holds Python objects" if "allow_pickle" in str(error) else str(error)
        raise DataError(
            f"{file}: not a whole .npz file of plain arrays ({reason}); "
            "make it again with numpy.savez_compressed, or fetch it again"
        ) from error
    missing = [key for key in required if key not in arrays]
    unknown = [key for key in arrays if key not in (*required, *optional)]
    if missing or unknown:
        also = f" and perhaps {', '.join(optional)}" if optional else ""
        fault = f"lacks {', '.join(missing)}" if missing else f"has unknown keys {', '.join(unknown)}"
        raise DataError(f"{file}: {fault}; takes the keys {', '.join(required)}{also}")
    return arrays


def _names(arrays: dict[str, np.ndarray], key: str, file: Path) -> list[str] | None:
    if key not in arrays:
        return None
    if arrays[key].ndim != 1 or arrays[key].dtype.kind != "U":
        raise DataError(
            f"{file}: {key} has type {arrays[key].dtype} and shape {arrays[key].shape}, takes texts [n]"
        )
    return arrays[key].tolist()


def _inputs(values: np.ndarray, source: str) -> Tensor:
    if values.shape[:1] == (0,) or values.ndim == 0:
        raise DataError(f"{source}: holds no samples; give at least one")
    if values.ndim == 2 and values.dtype in (np.int32, np.int64, np.uint32):
        if values.min() < 0 or values.max() >= 2**31:
            raise DataError(f"{source}: tokens from {values.min()} to {values.max()}, takes 0 to {2**31 - 1}")
        return torch.from_numpy(np.ascontiguousarray(values, np.int32))
    if values.dtype != np.uint8:
        remedy = "convert them with (255 * images).round().astype('uint8') if they are from 0 to 1"
        raise DataError(
            f"{source}: images of type {values.dtype}, takes uint8 from 0 to 255; "
            + (remedy if values.dtype.kind == "f" else "convert them")
        )
    return torch.from_numpy(np.ascontiguousarray(_channels_first(values, source)))


def _num_tokens(values: Tensor, given: int | None, source: str) -> int:
    """How many token ids texts have, 0 for images."""
    if values.dim() != 2:
        return 0
    if (values == 0).all(1).any():
        raise DataError(f"{source}: has texts of nothing but padding, token 0; leave them out")
    used = int(values.max()) + 1
    if given is not None and given < used:
        raise DataError(f"{source}: tokens up to {used - 1}, takes up to {given - 1}, as `num_tokens` says")
    return used if given is None else given


def _channels_first(images: np.ndarray, source: str) -> np.ndarray:
    """[n, C, H, W] from images in any of the three layouts."""
    takes = f"takes [n, H, W], [n, H, W, C] or [n, C, H, W] with C of 1 to {MAX_CHANNELS}"
    if images.ndim == 3:
        return images[:, None]
    if images.ndim != 4 or 0 in images.shape:
        raise DataError(f"{source}: images of shape {list(images.shape)}; {takes}")
    first, last = images.shape[1] <= MAX_CHANNELS, images.shape[3] <= MAX_CHANNELS
    if first == last:
        fault = "could have its channels first or last" if first else "has its channels neither first nor last"
        raise DataError(f"{source}: images of shape {list(images.shape)}, which {fault}; {takes}, larger H and W")
    return images if first else images.transpose(0, 3, 1, 2)


def _codes(
    values: ArrayLike, what: str, samples: int, names: Sequence[str] | None, source: str
) -> tuple[Tensor, tuple[str, ...]]:
    """int64 [n] of classes or domains, from 0 and each of them used, and their names."""
    codes = np.asarray(values)
    codes = codes[:, 0] if codes.ndim == 2 and codes.shape[1] == 1 else codes
    if codes.shape != (samples,) or codes.dtype.kind not in "iuU":
        raise DataError(
            f"{source}: {what} of type {codes.dtype} and shape {list(codes.shape)} for {samples} samples; "
            f"takes whole numbers or texts [{samples}]"
        )
    if codes.dtype.kind == "U":
        codes, names = _numbered(codes, what, names, source)
    largest = int(codes.max()) if names is None else len(names) - 1
    if codes.min() < 0 or codes.max() > largest:
        known = "from 0" if names is None else f"0 to {largest}, for which there are names"
        raise DataError(f"{source}: {what} from {codes.min()} to {codes.max()}, takes {known}; number them from 0")
    unused = np.flatnonzero(np.bincount(codes.astype(np.int64), minlength=largest + 1) == 0)
    if len(unused):
        first = f"{unused[0]}" if names is None else f"{unused[0]} ('{names[unused[0]]}')"
        raise DataError(
            f"{source}: {what} 0 to {largest}, but {len(unused)} of them have no sample, the first is {first}; "
            "leave them out and number the others from 0"
        )
    return torch.from_numpy(codes.astype(np.int64)), tuple(map(str, range(largest + 1) if names is None else names))


def _numbered(
    texts: np.ndarray, what: str, names: Sequence[str] | None, source: str
) -> tuple[np.ndarray, Sequence[str]]:
    """The place of each text among the names, int64 [n], and the names; by default the texts in their order."""
    found, codes = np.unique(texts, return_inverse=True)
    names = found.tolist() if names is None else list(map(str, names))
    unknown = [text for text in found.tolist() if text not in names]
    if unknown:
        raise DataError(f"{source}: {what} has '{unknown[0]}', takes one of the names given, {', '.join(names)}")
    return np.array([names.index(text) for text in found.tolist()])[codes], names


def _groups(groups: ArrayLike | None, samples: int, source: str) -> Tensor | None:
    if groups is None:
        return None
    values = np.asarray(groups)
    if values.shape != (samples,) or values.dtype.kind not in "iuU":
        raise DataError(
            f"{source}: groups of type {values.dtype} and shape {list(values.shape)}; "
            f"takes whole numbers or texts [{samples}], one per sample"
        )
    return torch.from_numpy(np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64))
