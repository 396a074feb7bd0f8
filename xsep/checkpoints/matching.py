"""A file's tensors under a model's keys, or a list of what does not fit."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from torch import Tensor

from .files import Contents
from .keras import TARGETS, VARIABLES

_SHOWN = 20  # of a list in a message
_BASE = frozenset(
    f"{target.module}.{key}"
    for target in TARGETS
    for variable, key in VARIABLES[target.kind].items()
    if target.kind != "dense" and variable != "bias"
)
_LIKE_BASE = re.compile(r"(?:conv|bn|block)\d+\.")


class Fitted(NamedTuple):
    state: dict[str, Tensor]  # every key of the model
    left_out: list[str]  # the file's own names


def plain_keys(contents: Contents) -> Contents:
    """The contents without a prefix before Xception's keys, and with ``fc`` for Cadene's ``last_linear``.

    Raises:
        ValueError: fewer than half of Xception's keys are there, or as many under one prefix as under another.
    """
    counts: Counter[str] = Counter()
    for key in contents.tensors:
        parts = key.split(".")
        # The shortest prefix: block2.rep.1.conv1.weight ends in a key of the stem.
        i = next((i for i in range(len(parts)) if ".".join(parts[i:]) in _BASE), None)
        if i is not None:
            counts["".join(f"{part}." for part in parts[:i])] += 1
    (prefix, count), *others = counts.most_common() or [("", 0)]
    if 2 * count < len(_BASE):
        keys = list(contents.tensors)
        raise ValueError(f"not the weights of an Xception, but {len(keys)} tensors: {', '.join(keys[:5])} ...")
    if others and others[0][1] == count:
        raise ValueError(f"Xception is in it more than once: under {prefix!r} and under {others[0][0]!r}")

    tensors: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for key, tensor in contents.tensors.items():
        source = contents.sources.get(key, key)
        plain = key[len(prefix) :] if key.startswith(prefix) else f"(outside {prefix}) {key}"
        if plain.startswith("last_linear."):
            plain = plain.replace("last_linear", "fc", 1)
        if plain in tensors:
            raise ValueError(f"{source} and {sources[plain]} are the same weight")
        tensors[plain], sources[plain] = tensor, source
    return contents._replace(tensors=tensors, sources=sources)


def fit(contents: Contents, model_state: dict[str, Tensor]) -> Fitted:
    """What ``model_state`` takes from contents with plain keys; into a model without classifier any head is left out.

    Raises:
        ValueError: it lists what is missing, unexpected, of another shape or no floating-point number.
    """
    headless = "fc.weight" not in model_state
    state, missing, wrong = {}, [], []
    for key, ours in model_state.items():
        found = contents.tensors.get(key)
        if found is None and key.endswith("num_batches_tracked"):
            found = ours.new_zeros(ours.shape, device="cpu")  # Keras and old torch do not count them
        if found is None:
            missing.append(key)
            continue
        state[key] = found = _with_all_dimensions(found, ours)
        name = _both_names(key, contents)
        if found.shape != ours.shape:
            wrong.append(f"{name}: {tuple(found.shape)} in the file, {tuple(ours.shape)} in the model")
        elif found.is_floating_point() != ours.is_floating_point() or found.is_complex():
            wrong.append(f"{name}: {found.dtype} in the file, {ours.dtype} in the model")
    others = [key for key in contents.tensors if key not in model_state]
    left_out = [key for key in others if headless and not _LIKE_BASE.match(key)]
    unexpected = [_both_names(key, contents) for key in others if key not in left_out]
    if missing or unexpected or wrong:
        lists = {"missing": missing, "unexpected": unexpected, "of another shape or type": wrong}
        found_wrong = "".join(_lines(*item) for item in lists.items())
        raise ValueError(f"it does not fit the model{found_wrong}{_hint(contents, model_state)}")
    return Fitted(state, [contents.sources.get(key, key) for key in left_out])


def _with_all_dimensions(found: Tensor, ours: Tensor) -> Tensor:
    """Files from before 2019 lack dimensions of 1: depthwise weights are (C, 3, 3), pointwise ones (O, C)."""
    if found.dim() == ours.dim() or ours.dim() != 4 or 1 not in ours.shape:
        return found
    without = [size for size in ours.shape if size != 1]
    return found.reshape(ours.shape) if list(found.shape) == without else found


def _both_names(key: str, contents: Contents) -> str:
    source = contents.sources.get(key, key)
    return key if source == key else f"{key} ({source})"


def _lines(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = [f"... and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return f"\n  {what}:" + "".join(f"\n    {name}" for name in [*names[:_SHOWN], *more])


def _hint(contents: Contents, model_state: dict[str, Tensor]) -> str:
    theirs, ours = contents.tensors.get("fc.weight"), model_state.get("fc.weight")
    if ours is None or (theirs is not None and theirs.shape == ours.shape):
        return ""
    return "\n  its base alone, without its head, loads into xception(num_classes=0)"
