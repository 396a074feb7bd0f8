"""The training block in one kernel: function on load, depthwise and pointwise convolution, statistics of y.  NHWC.

A program makes a tile of y, BLOCK pixels x BLOCK_K channels, as a matrix product whose left side it makes itself:
BLOCK_C channels at a time, the depthwise result of its pixels, rounded to the dtype, meets a slice of w_pw in
``tl.dot``.  Pixels are counted through the whole batch, so that small images fill tiles.  z is never stored, and made
again for each tile of K: ``configs.why_not_fused`` weighs that.

Of each tile's stored y, the mean and the sum of squared deviations from it go to a workspace (``launch._merged``).
"""

import triton
import triton.language as tl

from .kernels import applied


# What the compiler has to know of strides, ALIGN says.
@triton.jit(
    do_not_specialize=[
        "x_n",
        "x_h",
        "x_w",
        "H",
        "W",
        "P",
        "Q",
        "C",
        "K",
        "pixels",
        "pad_top",
        "pad_left",
        "dilation_h",
        "dilation_w",
        "k_blocks",
    ]
)
def block_kernel(
    x,
    w_dw,
    w_pw,
    y,
    parts,
    center,
    scale,
    shift,
    x_n,
    x_h,
    x_w,
    H,
    W,
    P,
    Q,
    C,
    K,
    pixels,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    k_blocks,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ON_LOAD: tl.constexpr,
    RELU: tl.constexpr,
    ACTIVATE: tl.constexpr,
    STATISTICS: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, k] = sum_c w_pw[k, c] act(sum_tap u(m, tap, c) w_dw[tap, c]).

    ``parts[tile, 0:3, k]`` are the mean of a tile, what was rounded off it, and m2.  C and
    the strides of x come in units of ALIGN, K in units of ALIGN_K.  WIDE: pixels need 64 bits.
    """
    C = C * ALIGN
    K = K * ALIGN_K
    x_n = x_n.to(tl.int64) * ALIGN
    x_h = x_h.to(tl.int64) * ALIGN
    x_w = x_w.to(tl.int64) * ALIGN
    # Programs that share pixels are neighbours, so that the caches serve all but one.
    tile = tl.program_id(0) // k_blocks
    k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    if WIDE:
        tile = tile.to(tl.int64)
    m = tile * BLOCK + tl.arange(0, BLOCK)
    in_m = m < pixels
    h = tl.where(in_m, m // Q % P * STRIDE_H - pad_top, H)  # H is outside, whatever the tap
    column = m % Q * STRIDE_W - pad_left
    first = x + m // Q // P * x_n + h * x_h + column * x_w
    filters = w_pw + k.to(tl.int64) * C
    acc = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for begin in range(0, C, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        in_c = c < C
        vectors = ()
        if ON_LOAD:
            vectors = (
                tl.load(center + c, mask=in_c, other=0.0),
                tl.load(scale + c, mask=in_c, other=0.0),
                tl.load(shift + c, mask=in_c, other=0.0),
            )
        # On its way while z is made.
        w = tl.load(filters[None, :] + c[:, None], mask=in_k[None, :] & in_c[:, None], other=0.0)
        z = tl.zeros((BLOCK, BLOCK_C), tl.float32)
        for r in range(R):
            down = r * dilation_h
            for s in tl.static_range(S):
                right = s * dilation_w
                at = first[:, None] + (down * x_h + right * x_w) + c[None, :]
                row, across = h + down, column + right
                inside = ((row >= 0) & (row < H) & (across >= 0) & (across < W))[:, None] & in_c[None, :]
                u = applied(tl.load(at, mask=inside, other=0.0).to(tl.float32), inside, vectors, ON_LOAD, RELU)
                z += u * tl.load(w_dw + (r * S + s) * C + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
        if ACTIVATE:
            z = tl.where(z < 0, 0.0, z)  # NaN stays NaN
        acc = tl.dot(z.to(w.dtype), w, acc, input_precision="ieee")
    stored = acc.to(y.dtype.element_ty)
    out = m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(y + out, stored, mask=in_m[:, None] & in_k[None, :])
    if STATISTICS:
        values = stored.to(tl.float32)
        count = tl.minimum(pixels - tile * BLOCK, BLOCK).to(tl.float32)
        mean = tl.sum(values, axis=0) / count  # pixels beyond the last are zero
        deviations = tl.where(in_m[:, None], values - mean[None, :], 0.0)
        # What the deviations sum to is the rounding of the mean: stored too, since means are subtracted again.
        total = tl.sum(deviations, axis=0)
        to = parts + tile.to(tl.int64) * 3 * K + k
        tl.store(to, mean, mask=in_k)
        tl.store(to + K, total / count, mask=in_k)
        tl.store(to + 2 * K, tl.sum(deviations * deviations, axis=0) - total * total / count, mask=in_k)
