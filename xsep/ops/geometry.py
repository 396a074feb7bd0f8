"""The arguments of ``nn.Conv2d`` turned into the form the operators take: two strides, four paddings, two dilations.

``pad`` is ``(top, bottom, left, right)``, so TensorFlow's asymmetric SAME needs no padded copy of the input.
"""

from __future__ import annotations

from typing import Sequence, Union

Size2 = Union[int, Sequence[int]]
Padding = Union[int, str, Sequence[int]]


def pair(value: Size2, name: str, minimum: int) -> tuple[int, int]:
    """``value`` as (vertical, horizontal).  Raises ``ValueError`` naming the argument."""
    items = (value, value) if isinstance(value, int) else tuple(value)
    if len(items) == 2 and type(items[0]) is type(items[1]) is int and items[0] >= minimum <= items[1]:
        return items  # what most calls have
    if len(items) == 1:
        items = (items[0], items[0])
    if len(items) != 2 or not _at_least(minimum, items):
        raise ValueError(f"{name} must be an int or a pair of ints, each at least {minimum}; got {value!r}")
    return items[0], items[1]


def resolve_padding(
    padding: Padding, extent: Sequence[int], kernel: Sequence[int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """``padding`` as (top, bottom, left, right).

    An int, a pair (vertical, horizontal), four ints (top, bottom, left, right), or one of

    - ``'valid'``: none;
    - ``'same'``: torch's meaning, output extent = input extent, stride 1 only, an odd total puts the extra at the end;
    - ``'tf_same'``: TensorFlow's and Keras's SAME, output extent = ceil(input / stride) for any stride.

    ``extent`` is the input's (H, W), used by ``'tf_same'`` only; ``kernel`` the filter's (R, S).
    """
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding == "same":
            if stride != (1, 1):
                raise ValueError(f"padding='same' needs stride 1, got stride={stride}; 'tf_same' pads for any stride")
            total = [d * (k - 1) for k, d in zip(kernel, dilation)]
        elif padding == "tf_same":
            total = [_tf_total(e, k, s, d) for e, k, s, d in zip(extent, kernel, stride, dilation)]
        else:
            raise ValueError(f"padding must be ints, 'valid', 'same' or 'tf_same'; got {padding!r}")
        return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
    if not isinstance(padding, int) and len(padding) == 4:
        top, bottom, left, right = padding
        if not _at_least(0, padding):
            raise ValueError(f"padding must not be negative; got {tuple(padding)}")
        return top, bottom, left, right
    vertical, horizontal = pair(padding, "padding", 0)
    return vertical, vertical, horizontal, horizontal


def _tf_total(extent, kernel, stride, dilation):
    # A comparison of symbolic extents would guard torch.export to one shape; max() on SymInts would too.
    total = (-(-extent // stride) - 1) * stride + (kernel - 1) * dilation + 1 - extent
    if isinstance(total, int):
        return max(total, 0)
    import torch

    return torch.sym_max(total, 0)


def output_extent(extent, kernel, stride, before, after, dilation):
    """Number of output positions along one axis (``nn.Conv2d``'s formula)."""
    return (extent + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _at_least(minimum: int, items: Sequence) -> bool:
    # bool is an int, but stride=True is a mistake; a SymInt is not an int, and its sign is not ours to guard on.
    for item in items:
        if item < minimum if type(item) is int else type(item).__name__ != "SymInt":
            return False
    return True
