"""The depthwise kernels in Triton: fprop, the gradients, and the sum of their partial results.

One source for both layouts: tensors come with their strides, one of which is 1.  A tile is pixels x channels, the
pixels BLOCK_P rows of BLOCK_Q columns; Triton's coalescing lays its threads along whichever of columns and channels is
contiguous.  A program slides its tile down a strip of rows, so that most of the rows that an output needs are in the
first-level cache already: x comes from beyond it (strip + R - 1) / strip * (BLOCK_Q + S - 1) / BLOCK_Q times, and every
output is written once.

Of integers, the compiler learns whether 16 divides them; to know of 8 (728 channels are no multiple of 16) it is given
the quotient: C and the strides of n, h and w come in units of ``ALIGN``, so that channels are read in whole vectors.

Offsets within an image are 32 bits wide unless ``WIDE``; images are told apart in 64.  Sums are float32, float64 for
float64.  ``center``, ``scale`` and ``shift`` are the function on load, u = relu(scale * (x - center) + shift).
"""

import triton
import triton.language as tl

from . import configs

HELD = tl.constexpr(configs.HELD)


@triton.jit
def applied(v, inside, vectors, ON_LOAD: tl.constexpr, RELU: tl.constexpr):
    """u, zero outside of the image: padding is of the result.  ``vectors`` are center, scale and shift, of ON_LOAD."""
    if ON_LOAD:
        v = vectors[1][None, :] * (v - vectors[0][None, :]) + vectors[2][None, :]
    if RELU:
        v = tl.where(v < 0, 0.0, v)  # NaN stays NaN
    if ON_LOAD:
        v = tl.where(inside, v, 0.0)
    return v


@triton.jit
def _u(
    x, h, column, c_offset, in_c, x_h, x_w, H, W, vectors, ON_LOAD: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr
):
    """A tile of x after the function on load."""
    inside = ((h >= 0) & (h < H) & (column >= 0) & (column < W))[:, None] & in_c[None, :]
    v = tl.load(x + (h * x_h + column * x_w)[:, None] + c_offset[None, :], mask=inside, other=0.0).to(ACC)
    return applied(v, inside, vectors, ON_LOAD, RELU)


@triton.jit
def _held(w, k, w_k, w_tap, inside, COUNT: tl.constexpr):
    """The filters of a tile where registers have room for them; as they are stored, two halves in one."""
    taps = ()
    if COUNT <= HELD:
        for tap in tl.static_range(COUNT):
            taps = taps + (tl.load(w + k * w_k + tap * w_tap, mask=inside, other=0.0),)
    return taps


# Extents change from call to call and decide nothing that the compiler does.
@triton.jit(
    do_not_specialize=["H", "W", "P", "Q", "C", "pad_top", "pad_left", "rows", "strips", "q_blocks", "k_blocks"]
)
def depthwise_fprop_kernel(
    x,
    w,
    bias,
    y,
    center,
    scale,
    shift,
    x_n,
    x_c,
    x_h,
    x_w,
    y_n,
    y_c,
    y_h,
    y_w,
    w_k,
    w_tap,
    H,
    W,
    P,
    Q,
    C,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    rows,
    strips,
    q_blocks,
    k_blocks,
    R: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ON_LOAD: tl.constexpr,
    RELU: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y[n,k,p,q] = bias[k] + sum_rs u[n, k // M, p*STRIDE_H - pad_top + r*dilation_h, ...] * w[k,r,s].

    A program: a strip of ``rows`` rows of BLOCK_Q columns of BLOCK_C filters of one image.
    """
    x_n, x_h, x_w = x_n * ALIGN, x_h * ALIGN, x_w * ALIGN
    y_n, y_h, y_w = y_n * ALIGN, y_h * ALIGN, y_w * ALIGN
    C = C * ALIGN
    index = tl.program_id(0)
    k = index % k_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    index = index // k_blocks
    pixel = tl.arange(0, BLOCK_P * BLOCK_Q)
    q = index % q_blocks * BLOCK_Q + pixel % BLOCK_Q
    index = index // q_blocks
    first = index % strips * rows
    last = tl.minimum(first + rows, P)
    n = (index // strips).to(tl.int64)
    if WIDE:
        k, q, pixel = k.to(tl.int64), q.to(tl.int64), pixel.to(tl.int64)
    in_k = k < C * M
    c = k // M
    x += n * x_n
    y += n * y_n
    vectors = ()
    if ON_LOAD:
        vectors = (
            tl.load(center + c, mask=in_k, other=0.0),
            tl.load(scale + c, mask=in_k, other=0.0),
            tl.load(shift + c, mask=in_k, other=0.0),
        )
    begin = tl.zeros((BLOCK_P * BLOCK_Q, BLOCK_C), ACC)
    if HAS_BIAS:
        begin += tl.load(bias + k, mask=in_k, other=0.0).to(ACC)[None, :]
    held = _held(w, k, w_k, w_tap, in_k, R * S)
    for row in range(first, last, BLOCK_P):
        p = row + pixel // BLOCK_Q
        acc = begin
        if R * S <= HELD:
            for r in tl.static_range(R):
                h = p * STRIDE_H - pad_top + r * dilation_h
                for s in tl.static_range(S):
                    column = q * STRIDE_W - pad_left + s * dilation_w
                    u = _u(x, h, column, c * x_c, in_k, x_h, x_w, H, W, vectors, ON_LOAD, RELU, ACC)
                    acc += u * held[r * S + s].to(ACC)[None, :]
        else:
            for r in range(R):
                h = p * STRIDE_H - pad_top + r * dilation_h
                for s in tl.static_range(S):
                    column = q * STRIDE_W - pad_left + s * dilation_w
                    u = _u(x, h, column, c * x_c, in_k, x_h, x_w, H, W, vectors, ON_LOAD, RELU, ACC)
                    acc += u * tl.load(w + k * w_k + (r * S + s) * w_tap, mask=in_k, other=0.0).to(ACC)[None, :]
        out = (p * y_h + q * y_w)[:, None] + (k * y_c)[None, :]
        tl.store(y + out, acc.to(y.dtype.element_ty), mask=((p < last) & (q < Q))[:, None] & in_k[None, :])


@triton.jit
def _over_pixels(t, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr):
    return tl.sum(tl.sum(tl.reshape(t, (BLOCK_P, BLOCK_Q, BLOCK_C)), axis=1), axis=0)


@triton.jit
def _dy(
    dy,
    h,
    column,
    k_offset,
    in_k,
    y_h,
    y_w,
    P,
    Q,
    top,
    left,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ACC: tl.constexpr,
):
    """dy where a tap takes x's (h, column) to, zero where that is no output; top and left are pad - tap * dilation."""
    p, q = h + top, column + left
    is_output = (p >= 0) & (q >= 0)
    if STRIDE_H != 1:
        is_output &= p % STRIDE_H == 0
        p = p // STRIDE_H
    if STRIDE_W != 1:
        is_output &= q % STRIDE_W == 0
        q = q // STRIDE_W
    inside = (is_output & (p < P) & (q < Q))[:, None] & in_k[None, :]
    return tl.load(dy + (p * y_h + q * y_w)[:, None] + k_offset[None, :], mask=inside, other=0.0).to(ACC)


@triton.jit(
    do_not_specialize=[
        "H",
        "W",
        "P",
        "Q",
        "C",
        "pad_top",
        "pad_left",
        "rows",
        "strips",
        "q_blocks",
        "c_blocks",
        "units",
        "splits",
    ]
)
def depthwise_backward_kernel(
    x,
    dy,
    w,
    dx,
    partials,
    sums,
    center,
    scale,
    shift,
    x_n,
    x_c,
    x_h,
    x_w,
    y_n,
    y_c,
    y_h,
    y_w,
    dx_n,
    dx_c,
    dx_h,
    dx_w,
    w_k,
    w_tap,
    H,
    W,
    P,
    Q,
    C,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    rows,
    strips,
    q_blocks,
    c_blocks,
    units,
    splits,
    R: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DGRAD: tl.constexpr,
    WGRAD: tl.constexpr,
    ON_LOAD: tl.constexpr,
    RELU: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    TAPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of the pixels of x, each of which meets every tap's dy: with it dx grows by w, and dw by u.

    DGRAD writes dx; on load also partial sums of the gradients of scale and shift.  WGRAD writes partial sums of TAPS
    taps, ``partials[split, tap, k]``.  With both, which takes filters of up to 9 taps and a multiplier of 1, dy is read
    once.  A tile is of x's channels; of dy's for WGRAD alone.
    A program takes every ``splits``-th unit: a strip of ``rows`` rows of BLOCK_Q columns of an image.
    """
    x_n, x_h, x_w = x_n * ALIGN, x_h * ALIGN, x_w * ALIGN
    y_n, y_h, y_w = y_n * ALIGN, y_h * ALIGN, y_w * ALIGN
    dx_n, dx_h, dx_w = dx_n * ALIGN, dx_h * ALIGN, dx_w * ALIGN
    C = C * ALIGN
    # The programs that share tensors and differ in their taps are neighbours, so that the caches serve all but one.
    chunks = (R * S + TAPS - 1) // TAPS
    index = tl.program_id(0)
    first_tap = index % chunks * TAPS
    index = index // chunks
    channel = index % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    split = index // c_blocks
    if WIDE:
        channel = channel.to(tl.int64)
    if DGRAD:
        c = channel
        k = channel * M
        in_c = c < C
    else:
        k = channel
        c = channel // M
        in_c = k < C * M
    vectors = ()
    if ON_LOAD:
        vectors = (
            tl.load(center + c, mask=in_c, other=0.0),
            tl.load(scale + c, mask=in_c, other=0.0),
            tl.load(shift + c, mask=in_c, other=0.0),
        )
    held = ()
    if DGRAD and M == 1:
        held = _held(w, k, w_k, w_tap, in_c, R * S)
    if WGRAD:
        dw = (tl.zeros((BLOCK_P * BLOCK_Q, BLOCK_C), ACC),) * TAPS
    if DGRAD and ON_LOAD:
        dscale = tl.zeros((BLOCK_P * BLOCK_Q, BLOCK_C), ACC)
        dshift = tl.zeros((BLOCK_P * BLOCK_Q, BLOCK_C), ACC)

    for unit in range(split, units, splits):
        pixel = tl.arange(0, BLOCK_P * BLOCK_Q)
        column = unit % q_blocks * BLOCK_Q + pixel % BLOCK_Q
        first = unit // q_blocks % strips * rows
        last = tl.minimum(first + rows, H)
        n = (unit // q_blocks // strips).to(tl.int64)
        if WIDE:
            column, pixel = column.to(tl.int64), pixel.to(tl.int64)
        for row in range(first, last, BLOCK_P):
            h = row + pixel // BLOCK_Q
            inside = ((h < last) & (column < W))[:, None] & in_c[None, :]
            if WGRAD or ON_LOAD:
                offset = (h * x_h + column * x_w)[:, None] + (c * x_c)[None, :]
                v = tl.load(x + n * x_n + offset, mask=inside, other=0.0).to(ACC)
                u = applied(v, inside, vectors, ON_LOAD, RELU)
            if DGRAD:
                du = tl.zeros((BLOCK_P * BLOCK_Q, BLOCK_C), ACC)
            image = dy + n * y_n
            if WGRAD:
                grown = ()
                for tap in tl.static_range(TAPS):
                    top = pad_top - (first_tap + tap) // S * dilation_h
                    left = pad_left - (first_tap + tap) % S * dilation_w
                    g = _dy(image, h, column, k * y_c, in_c, y_h, y_w, P, Q, top, left, STRIDE_H, STRIDE_W, ACC)
                    grown = grown + (dw[tap] + g * u,)
                    if DGRAD:
                        du += g * held[tap].to(ACC)[None, :]
                dw = grown
            elif R * S <= HELD:
                # A loop that stays one: written out, the taps of several filters do not fit in registers.
                for m in range(M):
                    for tap in tl.static_range(R * S):
                        top, left = pad_top - tap // S * dilation_h, pad_left - tap % S * dilation_w
                        at = (k + m) * y_c
                        g = _dy(image, h, column, at, in_c, y_h, y_w, P, Q, top, left, STRIDE_H, STRIDE_W, ACC)
                        if M == 1:
                            du += g * held[tap].to(ACC)[None, :]
                        else:
                            du += g * tl.load(w + (k + m) * w_k + tap * w_tap, mask=in_c, other=0.0).to(ACC)[None, :]
            else:
                for r in range(R):
                    top = pad_top - r * dilation_h
                    for s in tl.static_range(S):
                        left = pad_left - s * dilation_w
                        for m in tl.static_range(M):
                            at, tap = (k + m) * y_c, (k + m) * w_k + (r * S + s) * w_tap
                            g = _dy(image, h, column, at, in_c, y_h, y_w, P, Q, top, left, STRIDE_H, STRIDE_W, ACC)
                            du += g * tl.load(w + tap, mask=in_c, other=0.0).to(ACC)[None, :]
            if DGRAD:
                if ON_LOAD:
                    if RELU:
                        du = tl.where(u > 0, du, 0.0)
                    dshift += tl.where(inside, du, 0.0)
                    dscale += tl.where(inside, du * (v - vectors[0][None, :]), 0.0)
                    du = du * vectors[1][None, :]
                out = (h * dx_h + column * dx_w)[:, None] + (c * dx_c)[None, :]
                tl.store(dx + n * dx_n + out, du.to(dx.dtype.element_ty), mask=inside)

    if WGRAD:
        to = partials + split.to(tl.int64) * (R * S) * (C * M)
        for tap in tl.static_range(TAPS):
            # The last program's taps may be fewer than TAPS.
            mask = in_c & (first_tap + tap < R * S)
            tl.store(to + (first_tap + tap) * (C * M) + k, _over_pixels(dw[tap], BLOCK_P, BLOCK_Q, BLOCK_C), mask=mask)
    if DGRAD and ON_LOAD:
        to = sums + split.to(tl.int64) * 2 * C
        tl.store(to + c, _over_pixels(dscale, BLOCK_P, BLOCK_Q, BLOCK_C), mask=in_c)
        tl.store(to + C + c, _over_pixels(dshift, BLOCK_P, BLOCK_Q, BLOCK_C), mask=in_c)


@triton.jit(do_not_specialize=["count"])
def reduce_partials_kernel(
    partials, out, count, columns, taps, out_k, out_tap, BLOCK: tl.constexpr, BLOCK_SPLITS: tl.constexpr
):
    """out[k, tap] = the sum of partials[:, tap, k], in an order that is always the same.

    ``columns`` are the channels; a program sums BLOCK of the taps * columns numbers.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.cast(columns, tl.int64) * taps  # of one channel the compiler makes a number that has no .to
    acc = tl.zeros((BLOCK_SPLITS, BLOCK), partials.dtype.element_ty)
    for begin in range(0, count, BLOCK_SPLITS):
        split = begin + tl.arange(0, BLOCK_SPLITS).to(tl.int64)
        mask = (split < count)[:, None] & (at < total)[None, :]
        acc += tl.load(partials + split[:, None] * total + at[None, :], mask=mask, other=0.0)
    tap, k = at // columns, at % columns
    tl.store(out + k * out_k + tap * out_tap, tl.sum(acc, axis=0).to(out.dtype.element_ty), mask=at < total)
