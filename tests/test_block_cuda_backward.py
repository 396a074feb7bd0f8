"""The CUDA kernels of training blocks' gradients, emulated on the host and (``-m gpu``) on a card."""

import pytest
import torch
from conv_cases import nbytes
from test_block_cuda import (
    CASES,
    DTYPES,
    EMULATED,
    assert_same_in_every_order,
    counted,
    in_torch,
    inputs,
    problem,
    square,
)

from xsep.ops.problem import output_sizes
from xsep.testing import assert_no_worse_than_torch

MMA, PLAIN = "separable_backward_nhwc_mma", "separable_backward_nhwc"
FAMILIES = [(dtype, family) for dtype in DTYPES for family in (MMA, PLAIN) if (dtype, family) != (torch.float32, MMA)]
IDS = [f"{dtype}-{family}" for dtype, family in FAMILIES]
NAMES = ("dx", "dw_dw", "dw_pw", "dscale", "dshift")
TAKEN = {
    **{name: CASES[name] for name, (case, K) in CASES.items() if case.C % 8 == K % 8 == 0 and case.R == case.S == 3},
    "bands_of_rows": (square(72, 37, 19), 40),
    "bands_of_both": (square(16, 33, 41, N=1), 24),
    "large_stride2": (square(16, 41, 39, stride=2), 24),
    "many_small_images": (square(16, 3, 5, N=37), 24),
}


def drawn(case, K, dtype, device):
    """What backward takes: dy, dmean, dm2, y and mean."""
    generator = torch.Generator().manual_seed(7)

    def draw(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    P, Q = output_sizes(case.x_sizes, case.w_sizes, *case.geometry)[2:]
    images = (torch.empty(case.N, K, P, Q, dtype=dtype, device=device) for _ in range(2))
    dy, y = (t.contiguous(memory_format=torch.channels_last).copy_(draw(*t.shape)) for t in images)
    dmean, dm2, mean = (draw(K).to(device, torch.float32) for _ in range(3))
    return dy, dmean, dm2 / 16, y, mean


def in_torchs_steps(case, dtype, given, tensors, activation, statistics, on_load):
    """The gradients by torch's own operators in a dtype."""
    dy, dmean, dm2, y, mean = (t.to(dtype if t.dim() > 1 or dtype == torch.float64 else torch.float32) for t in given)
    if statistics:
        dy = dy + dmean.view(-1, 1, 1) / (y.numel() // y.shape[1])
        dy = (dy + 2 * (y - mean.view(-1, 1, 1)) * dm2.view(-1, 1, 1)).to(dtype)
    x, vectors, w_dw, w_pw = tensors
    images = [t.detach().to(dtype).requires_grad_() for t in (x, w_dw, w_pw)]
    vectors = [v.detach().to(dtype if dtype == torch.float64 else torch.float32).requires_grad_() for v in vectors]
    if not on_load:
        none = torch.zeros_like(vectors[0])
        found = in_torch(case, images[0], none, none + 1, none, *images[1:], activation, relu=False)
        return [*torch.autograd.grad(found, images, dy), None, None]
    found = in_torch(case, images[0], *vectors, *images[1:], activation)
    return torch.autograd.grad(found, [*images, *vectors[1:]], dy)


def results(backend, b, given, x, vectors, w_dw, w_pw, statistics, on_load):
    dy, dmean, dm2, y, mean = given
    given = given if statistics else (dy, None, None, None, None)
    return backend.block_backward(b, *given, x, w_dw, w_pw, (*vectors, True) if on_load else None)


def check(backend, case, K, dtype, family, activation=None, statistics=True, on_load=True, what=""):
    x, *vectors, w_dw, w_pw = inputs(case, K, dtype, backend.device)
    b, given = problem(case, K, x, on_load, activation), drawn(case, K, dtype, backend.device)
    ours = results(backend.only(family), b, given, x, vectors, w_dw, w_pw, statistics, on_load)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    tensors = (x, vectors, w_dw, w_pw)
    theirs, truth = (
        in_torchs_steps(case, d, given, tensors, activation, statistics, on_load) for d in (dtype, torch.float64)
    )
    for name, mine, yours, exact in zip(NAMES, ours, theirs, truth):
        if mine is not None:
            assert_no_worse_than_torch(mine, yours, exact, f"{name} of {what} in {dtype}, {family}")


@pytest.mark.parametrize(("dtype", "family"), FAMILIES, ids=IDS)
@pytest.mark.parametrize("name", sorted(TAKEN))
def test_cases(name, dtype, family, cuda):
    if cuda.name == "cuda" and family == MMA and cuda.card(0).arch < 80:
        pytest.skip("the card has no tensor cores for this")
    case, K = TAKEN[name]
    # A z that is rounded across zero gives another gradient, torch's or ours: halves are for the self-test's numbers.
    check(cuda, case, K, dtype, family, "relu" if dtype == torch.float32 else None, True, True, name)
    check(cuda, case, K, dtype, family, None, False, False, name)


@pytest.mark.parametrize(("dtype", "family"), FAMILIES, ids=IDS)
@pytest.mark.parametrize("name", ["tails_of_everything", "bands_of_both", "stride2", "many_small_images"])
def test_results_do_not_depend_on_the_order_of_threads(name, dtype, family):
    case, K = TAKEN[name]
    x, *vectors, w_dw, w_pw = inputs(case, K, dtype)
    b, given = problem(case, K, x, activation="relu"), drawn(case, K, dtype, "cpu")
    assert_same_in_every_order(lambda: results(EMULATED.only(family), b, given, x, vectors, w_dw, w_pw, True, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_has_no_gradient_is_zero(dtype, cuda):
    """dy, dmean and dm2, each of which may be None."""
    case, K = square(16, 7, 9), 24
    x, *vectors, w_dw, w_pw = inputs(case, K, dtype, cuda.device)
    b, (*gradients, y, mean) = problem(case, K, x), drawn(case, K, dtype, cuda.device)
    for missing in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        without = [None if i in missing else t for i, t in enumerate(gradients)]
        zeros = [torch.zeros_like(t) if i in missing else t for i, t in enumerate(gradients)]
        ours, same = (results(cuda, b, (*g, y, mean), x, vectors, w_dw, w_pw, True, True) for g in (without, zeros))
        assert all(torch.equal(*pair) for pair in zip(ours, same)), missing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_and_an_empty_batch(dtype, cuda):
    """Aligned to vectors and not: the same numbers as of a dense input.  Of no images, zeros."""
    case, K = square(16, 7, 9), 24
    x, *vectors, w_dw, w_pw = inputs(case, K, dtype, cuda.device)
    b, given = problem(case, K, x), drawn(case, K, dtype, cuda.device)
    expected = results(cuda, b, given, x, vectors, w_dw, w_pw, True, True)
    larger = x.new_full((3, 40, 9, 12), torch.nan).contiguous(memory_format=torch.channels_last)
    for first in (8, 3):
        part = larger[1:, first : first + 16, 1:8, 2:11]
        part.copy_(x)
        for ours, same in zip(results(cuda, b, given, part, vectors, w_dw, w_pw, True, True), expected):
            assert torch.equal(ours, same)
        part.fill_(torch.nan)
    case = square(16, 7, 9, N=0)
    x, *vectors, w_dw, w_pw = inputs(case, K, dtype, cuda.device)
    dx, *others = results(
        cuda, problem(case, K, x), drawn(case, K, dtype, cuda.device), x, vectors, w_dw, w_pw, True, True
    )
    assert dx.shape == x.shape and all(not t.any() for t in others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes(dtype):
    """No byte of z or dz is stored: only dx, the whole gradient of y, and sums."""
    case, K = square(64, 32, 32, N=2), 128
    x, *vectors, w_dw, w_pw = inputs(case, K, dtype)
    b, given = problem(case, K, x), drawn(case, K, dtype, "cpu")
    with counted() as launches:
        results(EMULATED, b, given, x, vectors, w_dw, w_pw, True, True)
    gradient, main, *_ = launches
    assert gradient["loads"]["distinct_sectors"] * 32 == 2 * nbytes(given[0]) + 3 * 4 * K
    assert gradient["stores"]["bytes"] == gradient["stores"]["accesses"][16] * 16 == nbytes(given[0])
    parts, taken = main["grid"], 11
    regions = (main["stores"]["bytes"] - nbytes(x)) // 4
    # Sums of dw_pw are stored once for each region, those of dw_dw too: nothing else but dx.
    assert (main["stores"]["bytes"] - nbytes(x)) % (4 * 64 * (K + taken)) == 0
    assert regions // (64 * (K + taken)) >= parts
    touched = main["loads"]["distinct_sectors"] * 32
    needed = nbytes(x) + nbytes(given[0]) + nbytes(w_dw) + nbytes(w_pw) + 3 * 4 * 64
    assert needed <= touched <= needed + 4 * 64 * K * parts  # its own sums, read back
