"""The block in one kernel, and the gradients of the training block in three.  NHWC.

Forward, ``block_kernel``: a program makes a tile of y, BLOCK pixels x BLOCK_K channels, as a matrix product whose left
side it makes itself: BLOCK_C channels at a time, the depthwise result z of its pixels, rounded to the dtype, meets a
slice of w_pw in ``tl.dot``.  Pixels are counted through the whole batch, so that small images fill tiles.  z is never
stored, and made again for each tile of K: ``configs.why_not_fused`` weighs that.  Of each tile's stored y, the mean and
the sum of squared deviations from it go to a workspace (``launch._merged``).

Backward: ``block_wgrad_kernel`` makes z again for the gradient of w_pw; ``block_dgrad_kernel`` makes dz, and of it the
gradients of x, of w_dw and of the vectors.  Both read g, the whole gradient of y, which after statistics
``through_statistics_kernel`` puts together.
"""

import triton
import triton.language as tl

from .kernels import _held, applied


@triton.jit
def _activated(v, ACTIVATION: tl.constexpr):
    """After an activation: none, "relu" or "relu6".  NaN stays NaN."""
    if ACTIVATION is not None:
        v = tl.where(v < 0, 0.0, v)
    if ACTIVATION == "relu6":
        v = tl.where(v > 6, 6.0, v)
    return v


@triton.jit
def _vectors(center, scale, shift, c, in_c, ON_LOAD: tl.constexpr):
    """Those of the function on load, of a tile's channels."""
    vectors = ()
    if ON_LOAD:
        vectors = (
            tl.load(center + c, mask=in_c, other=0.0),
            tl.load(scale + c, mask=in_c, other=0.0),
            tl.load(shift + c, mask=in_c, other=0.0),
        )
    return vectors


@triton.jit
def _met(x, m, in_m, sizes, pad_top, pad_left, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr):
    """What the first tap of pixels m of y meets: its place in x, row and column; m counts through the images from x."""
    x_n, x_h, x_w, H, W, P, Q, C = sizes
    h = tl.where(in_m, m // Q % P * STRIDE_H - pad_top, H)  # H is outside, whatever the tap
    column = m % Q * STRIDE_W - pad_left
    return x + m // Q // P * x_n + h * x_h + column * x_w, h, column


@triton.jit
def _grown(
    z,
    met,
    w_dw,
    c,
    in_c,
    vectors,
    sizes,
    dilation_h,
    dilation_w,
    R: tl.constexpr,
    S: tl.constexpr,
    ON_LOAD: tl.constexpr,
    RELU: tl.constexpr,
):
    """z plus the depthwise result of pixels, which ``_met`` places, and of channels c."""
    x_n, x_h, x_w, H, W, P, Q, C = sizes
    first, h, column = met
    for r in range(R):
        down = r * dilation_h
        for s in tl.static_range(S):
            right = s * dilation_w
            at = first[:, None] + (down * x_h + right * x_w) + c[None, :]
            row, across = h + down, column + right
            inside = ((row >= 0) & (row < H) & (across >= 0) & (across < W))[:, None] & in_c[None, :]
            u = applied(tl.load(at, mask=inside, other=0.0).to(tl.float32), inside, vectors, ON_LOAD, RELU)
            z += u * tl.load(w_dw + (r * S + s) * C + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    return z


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
    w_dw_bias,
    bias,
    residual,
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
    ACTIVATION: tl.constexpr,
    OUT_ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, k] = out(sum_c w_pw[k, c] act(w_dw_bias[c] + sum_tap u(m, tap, c) w_dw[tap, c]) + bias[k] + residual[m, k]).

    ``parts[tile, 0:3, k]`` are the mean of a tile, what was rounded off it, and m2.  Of parts, biases and residual each
    may be None.  C and the strides of x come in units of ALIGN, K in units of ALIGN_K.  WIDE: pixels need 64 bits.
    """
    C = C * ALIGN
    K = K * ALIGN_K
    sizes = (x_n.to(tl.int64) * ALIGN, x_h.to(tl.int64) * ALIGN, x_w.to(tl.int64) * ALIGN, H, W, P, Q, C)
    # Programs that share pixels are neighbours, so that the caches serve all but one.
    tile = tl.program_id(0) // k_blocks
    k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < K
    if WIDE:
        tile = tile.to(tl.int64)
    m = tile * BLOCK + tl.arange(0, BLOCK)
    in_m = m < pixels
    met = _met(x, m, in_m, sizes, pad_top, pad_left, STRIDE_H, STRIDE_W)
    filters = w_pw + k.to(tl.int64) * C
    acc = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    if bias is not None:
        acc += tl.load(bias + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
    for begin in range(0, C, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        in_c = c < C
        vectors = _vectors(center, scale, shift, c, in_c, ON_LOAD)
        # On its way while z is made.
        w = tl.load(filters[None, :] + c[:, None], mask=in_k[None, :] & in_c[:, None], other=0.0)
        z = tl.zeros((BLOCK, BLOCK_C), tl.float32)
        z = _grown(z, met, w_dw, c, in_c, vectors, sizes, dilation_h, dilation_w, R, S, ON_LOAD, RELU)
        if w_dw_bias is not None:
            z += tl.load(w_dw_bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
        acc = tl.dot(_activated(z, ACTIVATION).to(w.dtype), w, acc, input_precision="ieee")
    out = m.to(tl.int64)[:, None] * K + k[None, :]
    inside = in_m[:, None] & in_k[None, :]
    if residual is not None:
        acc += tl.load(residual + out, mask=inside, other=0.0).to(tl.float32)
    stored = _activated(acc, OUT_ACTIVATION).to(y.dtype.element_ty)
    tl.store(y + out, stored, mask=inside)
    if parts is not None:
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


@triton.jit(do_not_specialize=["pixels", "K", "k_blocks"])
def through_statistics_kernel(
    dy,
    y,
    mean,
    offset,
    slope,
    g,
    pixels,
    K,
    k_blocks,
    ALIGN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """g[m, k] = dy[m, k] + offset[k] + (y[m, k] - mean[k]) * slope[k]; dy may be None.  K in units of ALIGN_K."""
    K = K * ALIGN_K
    k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    m = (tl.program_id(0) // k_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_k = k < K
    inside = (m < pixels)[:, None] & in_k[None, :]
    at = m[:, None] * K + k[None, :]
    v = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + k, mask=in_k, other=0.0)[None, :]
    v = v * tl.load(slope + k, mask=in_k, other=0.0)[None, :] + tl.load(offset + k, mask=in_k, other=0.0)[None, :]
    if dy is not None:
        v += tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(g + at, v.to(g.dtype.element_ty), mask=inside)


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
        "c_blocks",
        "splits",
    ]
)
def block_wgrad_kernel(
    x,
    w_dw,
    g,
    partials,
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
    c_blocks,
    splits,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ON_LOAD: tl.constexpr,
    RELU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``partials[split, k, c]``, sums of g[m, k] z[m, c]: of every ``splits``-th tile of BLOCK pixels.

    g is dense; units as in ``block_kernel``.
    """
    C = C * ALIGN
    K = K * ALIGN_K
    sizes = (x_n.to(tl.int64) * ALIGN, x_h.to(tl.int64) * ALIGN, x_w.to(tl.int64) * ALIGN, H, W, P, Q, C)
    # Programs that share pixels are neighbours, so that the caches serve all but one.
    index = tl.program_id(0)
    k = index % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    index = index // k_blocks
    c = index % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    split = index // c_blocks
    in_k, in_c = k < K, c < C
    vectors = _vectors(center, scale, shift, c, in_c, ON_LOAD)
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for tile in range(split, tl.cdiv(pixels, BLOCK), splits):
        m = tile * BLOCK + tl.arange(0, BLOCK)
        if WIDE:
            m = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        in_m = m < pixels
        # On its way while z is made.
        at = m.to(tl.int64)[:, None] * K + k[None, :]
        gradient = tl.load(g + at, mask=in_m[:, None] & in_k[None, :], other=0.0)
        met = _met(x, m, in_m, sizes, pad_top, pad_left, STRIDE_H, STRIDE_W)
        z = tl.zeros((BLOCK, BLOCK_C), tl.float32)
        z = _grown(z, met, w_dw, c, in_c, vectors, sizes, dilation_h, dilation_w, R, S, ON_LOAD, RELU)
        z = _activated(z, ACTIVATION).to(gradient.dtype)
        acc = tl.dot(tl.trans(gradient), z, acc, input_precision="ieee")
    to = partials + (split.to(tl.int64) * K + k)[:, None] * C + c[None, :]
    tl.store(to, acc, mask=in_k[:, None] & in_c[None, :])


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
        "pad_top",
        "pad_left",
        "dilation_h",
        "dilation_w",
        "rows",
        "strips",
        "units",
        "c_blocks",
        "splits",
        "ring",
    ]
)
def block_dgrad_kernel(
    x,
    w_dw,
    w_pw,
    g,
    scratch,
    dx,
    partials,
    sums,
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
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    rows,
    strips,
    units,
    c_blocks,
    splits,
    ring,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ON_LOAD: tl.constexpr,
    RELU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx, and partial sums of the gradients of w_dw, ``partials[split, tap, c]``, of scale and of shift.

    A program has BLOCK_C channels, and takes every ``splits``-th unit: a strip of ``rows`` rows of an image of x.  It
    goes down a strip, BLOCK pixels at a time.  First it makes the dz that their taps meet and that it has not made yet,
    BLOCK pixels of y at a time, into a ring of ``ring`` pixels of its own in ``scratch``: for Triton cannot address
    pixels in registers or shared memory.  Then, BLOCK_X pixels at a time, each tap's dz serves both gradients, as in
    ``depthwise_backward_kernel``.  ``ring`` is a power of two; g and dx are dense.
    """
    C = C * ALIGN
    K = K * ALIGN_K
    x_n, x_h, x_w = x_n.to(tl.int64) * ALIGN, x_h.to(tl.int64) * ALIGN, x_w.to(tl.int64) * ALIGN
    sizes = (x_n, x_h, x_w, H, W, P, Q, C)
    # Programs that share pixels are neighbours, so that the caches serve all but one.
    index = tl.program_id(0)
    lane = tl.arange(0, BLOCK_C)
    c = index % c_blocks * BLOCK_C + lane
    split = index // c_blocks
    in_c = c < C
    kept = scratch + index.to(tl.int64) * ring * BLOCK_C
    vectors = _vectors(center, scale, shift, c, in_c, ON_LOAD)
    held = _held(w_dw, c, 1, C, in_c, R * S)
    dw = (tl.zeros((BLOCK_X, BLOCK_C), tl.float32),) * (R * S)
    dscale = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
    dshift = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)

    for unit in range(split, units, splits):
        first = unit % strips * rows
        last = tl.minimum(first + rows, H)
        n = (unit // strips).to(tl.int64)
        gradient = g + n * P * Q * K
        made = (tl.maximum(first + pad_top - (R - 1) * dilation_h, 0) + STRIDE_H - 1) // STRIDE_H * Q
        for begin in range(first * W, last * W, BLOCK):
            end = tl.minimum(begin + BLOCK, last * W)
            needed = tl.minimum(((end - 1) // W + pad_top) // STRIDE_H + 1, P) * Q
            tl.debug_barrier()  # of what is overwritten, all has been read
            for start in range(made, needed, BLOCK):
                m = start + tl.arange(0, BLOCK)
                in_m = m < P * Q
                dz = tl.zeros((BLOCK, BLOCK_C), tl.float32)
                for k_begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                    k = k_begin + tl.arange(0, BLOCK_K)
                    in_k = k < K
                    at = m.to(tl.int64)[:, None] * K + k[None, :]
                    dy = tl.load(gradient + at, mask=in_m[:, None] & in_k[None, :], other=0.0)
                    at = k.to(tl.int64)[:, None] * C + c[None, :]
                    w = tl.load(w_pw + at, mask=in_k[:, None] & in_c[None, :], other=0.0)
                    dz = tl.dot(dy, w, dz, input_precision="ieee")
                if ACTIVATION is not None:
                    met = _met(x + n * x_n, m, in_m, sizes, pad_top, pad_left, STRIDE_H, STRIDE_W)
                    z = tl.zeros((BLOCK, BLOCK_C), tl.float32)
                    z = _grown(z, met, w_dw, c, in_c, vectors, sizes, dilation_h, dilation_w, R, S, ON_LOAD, RELU)
                    dz = tl.where(z <= 0, 0.0, dz)
                to = (m & (ring - 1))[:, None] * BLOCK_C + lane[None, :]
                tl.store(kept + to, dz.to(g.dtype.element_ty))
            made += tl.cdiv(tl.maximum(needed - made, 0), BLOCK) * BLOCK
            tl.debug_barrier()  # what was made is there for all threads
            for start in range(begin, end, BLOCK_X):
                m = start + tl.arange(0, BLOCK_X)
                h, column = m // W, m % W
                inside = (m < end)[:, None] & in_c[None, :]
                at = n * x_n + h * x_h + column * x_w
                v = tl.load(x + at[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
                u = applied(v, inside, vectors, ON_LOAD, RELU)
                du = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
                grown = ()
                for tap in tl.static_range(R * S):
                    p = h + (pad_top - tap // S * dilation_h)
                    q = column + (pad_left - tap % S * dilation_w)
                    meets = (p >= 0) & (q >= 0) & (m < end)
                    if STRIDE_H != 1:
                        meets &= p % STRIDE_H == 0
                        p = p // STRIDE_H
                    if STRIDE_W != 1:
                        meets &= q % STRIDE_W == 0
                        q = q // STRIDE_W
                    meets &= (p < P) & (q < Q)
                    at = ((p * Q + q) & (ring - 1))[:, None] * BLOCK_C + lane[None, :]
                    dz = tl.load(kept + at, mask=meets[:, None], other=0.0).to(tl.float32)
                    grown = grown + (dw[tap] + dz * u,)
                    du += dz * held[tap].to(tl.float32)[None, :]
                dw = grown
                if ON_LOAD:
                    if RELU:
                        du = tl.where(u > 0, du, 0.0)
                    dshift += du
                    dscale += du * (v - vectors[0][None, :])
                    du = du * vectors[1][None, :]
                at = (n * H * W + m)[:, None] * C + c[None, :]
                tl.store(dx + at, du.to(dx.dtype.element_ty), mask=inside)

    to = partials + split.to(tl.int64) * (R * S) * C + c
    for tap in tl.static_range(R * S):
        tl.store(to + tap * C, tl.sum(dw[tap], axis=0), mask=in_c)
    if ON_LOAD:
        to = sums + split.to(tl.int64) * 2 * C + c
        tl.store(to, tl.sum(dscale, axis=0), mask=in_c)
        tl.store(to + C, tl.sum(dshift, axis=0), mask=in_c)
