"""What the operator tests share: drawn problems, tensors with strides that are never trivial, and float64 truth."""

from __future__ import annotations

import needs
import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from xsep.shapes import Shape

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@st.composite
def cases(draw, largest=45):
    """Small problems of every kind: tails of vectors and tiles, strides, dilations, asymmetric and large padding."""
    kernel = st.sampled_from([1, 2, 3, 3, 3, 4, 5, 5, 7, 9])
    R, S = draw(kernel), draw(kernel)
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.sampled_from([1, 1, 1, 2, 3])), draw(st.sampled_from([1, 1, 1, 2, 3])))
    pad = tuple(draw(st.integers(0, 4)) for _ in range(4))
    least = [max(1, dilation[i] * (taps - 1) + 1 - pad[2 * i] - pad[2 * i + 1]) for i, taps in enumerate((R, S))]
    H, W = (draw(st.integers(extent, max(extent, largest))) for extent in least)
    return Shape(
        N=draw(st.integers(0, 3)),
        C=draw(st.sampled_from([1, 2, 3, 8, 15, 16, 17, 24, 32, 33, 64])),
        H=H,
        W=W,
        R=R,
        S=S,
        M=draw(st.sampled_from([1, 1, 1, 2, 3])),
        stride=stride,
        pad=pad,
        dilation=dilation,
    )


def sliced(sizes, dtype, memory_format, seed, mean=0.0, device="cpu"):
    """A random tensor that is a slice of a larger one: offset in every axis, with strides of its own."""
    generator = torch.Generator().manual_seed(seed)
    N, C, H, W = sizes
    larger = torch.randn((N + 1, C + 3, H + 2, W + 3), generator=generator, dtype=torch.float64) + mean
    larger = larger.to(device, dtype).contiguous(memory_format=memory_format)
    return larger[1:, 1 : C + 1, 1 : H + 1, 2 : W + 2]


def dense(sizes, dtype, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sizes, generator=generator, dtype=torch.float64).to(device, dtype)


def torch_results(case, x, w, bias, dy):
    """torch's y, dx, dw in the dtype of its inputs; where it does not convolve in that, float32's, rounded once."""
    if not needs.convolves(x.dtype, x.device.type):
        return tuple(t.to(x.dtype) for t in torch_results(case, *(t.float() for t in (x, w, bias, dy))))
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    top, bottom, left, right = case.pad
    padded = F.pad(x, (left, right, top, bottom))
    if padded.numel() == 0:  # torch's own backward rejects what its forward accepts
        y = F.conv2d(padded, w, bias, case.stride, 0, case.dilation, case.C)
        return y.detach(), torch.zeros_like(x), torch.zeros_like(w)
    y = F.conv2d(padded, w, bias, case.stride, 0, case.dilation, case.C)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    return y.detach(), dx, dw


def true_results(case, x, w, bias, dy):
    """y, dx, dw summed in long double: the truth for float64 too, of which torch's own results are no judge."""
    x, w, bias, dy = (wide(t) for t in (x, w, bias, dy))
    (_, _, P, Q), (top, bottom, left, right) = dy.shape, case.pad
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    padded = np.repeat(padded, case.M, axis=1)
    y = np.zeros_like(dy) + bias[:, None, None]
    dpadded, dw = np.zeros_like(padded), np.zeros_like(w)
    for r in range(case.R):
        for s in range(case.S):
            (sh, sw), (h, v) = case.stride, (r * case.dilation[0], s * case.dilation[1])
            tap = np.s_[:, :, h : h + (P - 1) * sh + 1 : sh, v : v + (Q - 1) * sw + 1 : sw]
            y += padded[tap] * w[:, 0, r, s, None, None]
            dpadded[tap] += dy * w[:, 0, r, s, None, None]
            dw[:, 0, r, s] = (padded[tap] * dy).sum((0, 2, 3))
    dx = dpadded[:, :, top : top + case.H, left : left + case.W]
    return y, dx.reshape(case.N, case.C, case.M, case.H, case.W).sum(2), dw


def clones(run):
    """How many dense copies torch makes of tensors while ``run()`` runs: of another layout, for instance."""
    with torch.autograd.profiler.profile() as profile:
        run()
    return sum(event.name == "aten::clone" for event in profile.function_events)


def nbytes(t):
    return t.numel() * t.element_size()


def wide(t):
    """A tensor as an array of long doubles."""
    return t if isinstance(t, np.ndarray) else t.detach().double().cpu().numpy().astype(np.longdouble)


def rounded(arrays, device="cpu"):
    """Arrays of long doubles as float64 tensors."""
    return [torch.from_numpy(np.asarray(a, dtype=np.float64)).to(device) for a in arrays]
