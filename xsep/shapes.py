"""Problems that tests and benchmarks share: named by what they try, and the depthwise layers of four networks."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A depthwise convolution: x (N, C, H, W), w (C*M, 1, R, S); pad is (top, bottom, left, right)."""

    N: int
    C: int
    H: int
    W: int
    R: int
    S: int
    M: int = 1
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def geometry(self):
        """The last three arguments of every operator."""
        return self.stride, self.pad, self.dilation

    @property
    def x_sizes(self) -> tuple[int, ...]:
        return self.N, self.C, self.H, self.W

    @property
    def w_sizes(self) -> tuple[int, ...]:
        return self.C * self.M, 1, self.R, self.S


def _square(N: int, C: int, extent: int, kernel: int, stride: int = 1) -> Shape:
    """Padded by half the filter, as the networks below are."""
    return Shape(N, C, extent, extent, kernel, kernel, 1, (stride, stride), (kernel // 2,) * 4)


# Tiles are at most 40 columns wide in NHWC, 24 KB large, and 16 or 32 channels deep.
NAMED: dict[str, Shape] = {
    "c_lt_tile": Shape(2, 5, 9, 11, 3, 3, pad=(1, 1, 1, 1)),
    "c_not_multiple_of_tile": Shape(1, 37, 8, 9, 3, 3, pad=(1, 1, 1, 1)),
    "c_many_tiles": Shape(1, 300, 5, 6, 3, 3, pad=(1, 1, 1, 1)),
    "c_eq_1": Shape(2, 1, 17, 18, 3, 3, pad=(1, 1, 1, 1)),
    "q_gt_tile": Shape(1, 32, 5, 95, 3, 3, pad=(1, 1, 1, 1)),
    "p_gt_tile": Shape(1, 16, 150, 9, 3, 3, pad=(1, 1, 1, 1)),
    "plane_gt_tile": Shape(1, 3, 90, 110, 5, 5, pad=(2, 2, 2, 2)),
    "valid_5x5": Shape(2, 17, 12, 13, 5, 5),
    "7x7": Shape(1, 32, 14, 14, 7, 7, pad=(3, 3, 3, 3)),
    "7x7_on_7x7": Shape(2, 48, 7, 7, 7, 7, pad=(3, 3, 3, 3)),
    "13x13": Shape(1, 16, 20, 20, 13, 13, pad=(6, 6, 6, 6)),
    "1x7": Shape(1, 16, 4, 40, 1, 7, pad=(0, 0, 3, 3)),
    "9x1": Shape(1, 16, 40, 4, 9, 1, pad=(4, 4, 0, 0)),
    "1x1": Shape(1, 24, 6, 5, 1, 1),
    "4x2": Shape(1, 16, 9, 9, 4, 2, pad=(1, 2, 0, 1)),
    "stride2_even_tf_same": Shape(1, 32, 12, 14, 3, 3, stride=(2, 2), pad=(0, 1, 0, 1)),
    "stride2_odd": Shape(1, 34, 13, 15, 3, 3, stride=(2, 2), pad=(1, 1, 1, 1)),
    "stride2_5x5": Shape(2, 18, 13, 16, 5, 5, stride=(2, 2), pad=(2, 2, 2, 2)),
    "stride2_7x7": Shape(1, 16, 20, 70, 7, 7, stride=(2, 2), pad=(3, 3, 3, 3)),
    "stride3": Shape(1, 4, 17, 19, 3, 3, stride=(3, 3), pad=(1, 1, 1, 1)),
    "stride_gt_kernel": Shape(1, 16, 11, 11, 2, 2, stride=(3, 4)),
    "mixed_strides": Shape(2, 16, 11, 23, 3, 5, stride=(1, 2), pad=(1, 0, 3, 2)),
    "dilated": Shape(1, 20, 15, 14, 3, 3, pad=(2, 2, 2, 2), dilation=(2, 2)),
    "dilated_stride2": Shape(1, 16, 15, 17, 3, 3, stride=(2, 2), pad=(2, 2, 3, 3), dilation=(2, 3)),
    "multiplier": Shape(2, 9, 8, 9, 3, 3, 3, pad=(1, 1, 1, 1)),
    "multiplier_stride2": Shape(1, 16, 9, 8, 3, 3, 2, stride=(2, 2), pad=(1, 1, 0, 1)),
    "pad_ge_kernel": Shape(1, 5, 4, 4, 3, 3, pad=(4, 5, 6, 3)),
    "1x1_image": Shape(3, 16, 1, 1, 3, 3, pad=(1, 1, 1, 1)),
    "1x1_image_nhwc_tail": Shape(1, 19, 1, 1, 3, 3, pad=(1, 1, 1, 1)),
    "batch_0": Shape(0, 16, 5, 5, 3, 3, pad=(1, 1, 1, 1)),
}

# Network -> its different depthwise layers, each with the number of times it occurs; batch 1.
NETWORKS: dict[str, dict[Shape, int]] = {
    "xception": {  # at 299 x 299
        _square(1, 64, 147, 3): 1,
        _square(1, 128, 147, 3): 1,
        _square(1, 128, 74, 3): 1,
        _square(1, 256, 74, 3): 1,
        _square(1, 256, 37, 3): 1,
        _square(1, 728, 37, 3): 1,
        _square(1, 728, 19, 3): 26,
        _square(1, 1024, 10, 3): 1,
        _square(1, 1536, 10, 3): 1,
    },
    "mobilenet_v2": {  # at 224 x 224
        _square(1, 32, 112, 3): 1,
        _square(1, 96, 112, 3, 2): 1,
        _square(1, 144, 56, 3): 1,
        _square(1, 144, 56, 3, 2): 1,
        _square(1, 192, 28, 3): 2,
        _square(1, 192, 28, 3, 2): 1,
        _square(1, 384, 14, 3): 4,
        _square(1, 576, 14, 3): 2,
        _square(1, 576, 14, 3, 2): 1,
        _square(1, 960, 7, 3): 3,
    },
    "convnext_tiny": {  # at 224 x 224
        _square(1, 96, 56, 7): 3,
        _square(1, 192, 28, 7): 3,
        _square(1, 384, 14, 7): 9,
        _square(1, 768, 7, 7): 3,
    },
    "efficientnet_b0": {  # at 224 x 224
        _square(1, 32, 112, 3): 1,
        _square(1, 96, 112, 3, 2): 1,
        _square(1, 144, 56, 3): 1,
        _square(1, 144, 56, 5, 2): 1,
        _square(1, 240, 28, 5): 1,
        _square(1, 240, 28, 3, 2): 1,
        _square(1, 480, 14, 3): 2,
        _square(1, 480, 14, 5): 1,
        _square(1, 672, 14, 5): 2,
        _square(1, 672, 14, 5, 2): 1,
        _square(1, 1152, 7, 5): 3,
        _square(1, 1152, 7, 3): 1,
    },
}
