"""The CUDA kernels, emulated on the host and (``-m gpu``) on a card, beyond what they share with the other backends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conv_cases import DTYPES, LAYOUTS, dense, nbytes, rounded, torch_results, true_results
from gradients import assert_all_no_worse_than_torch, results
from torch.nn import functional as F

import xsep
from xsep import selftest
from xsep.ops.backends import BACKENDS
from xsep.ops.compiled import PASSES
from xsep.ops.cuda import CudaBackend
from xsep.ops.problem import Problem
from xsep.shapes import NAMED, Shape
from xsep.testing import assert_no_worse_than_torch

ops = torch.ops.xsep
EMULATED = BACKENDS["cuda-emulated"]


def square(C, H, W, kernel, stride=1, dilation=1, N=2):
    pad = dilation * (kernel // 2)
    return Shape(N, C, H, W, kernel, kernel, 1, (stride, stride), (pad,) * 4, (dilation, dilation))


# What the specialised kernels are for: their channels fill vectors, and there are more of them than a block takes.
SPECIALISED = {
    **{f"{k}x{k}_stride{s}": square(72, 13, 14, k, s) for k in (3, 5, 7) for s in (1, 2)},
    **{f"{k}x{k}_wide": square(8, 4, 75, k, N=1) for k in (3, 5, 7)},
    **{f"{k}x{k}_tall": square(8, 70, 5, k, N=1) for k in (3, 5, 7)},
    **{f"{k}x{k}_small": square(40, 7, 7, k, N=3) for k in (3, 5, 7)},
    **{f"{k}x{k}_dilated": square(16, 15, 14, k, dilation=2, N=1) for k in (3, 5, 7)},
    **{f"{k}x{k}_stride2_wide": square(8, 9, 75, k, 2, N=1) for k in (3, 5, 7)},
    "tf_same_stride2": Shape(1, 24, 12, 14, 3, 3, stride=(2, 2), pad=(0, 1, 0, 1)),
    "valid": Shape(1, 24, 9, 10, 5, 5),
    "pad_beyond_kernel": Shape(1, 16, 4, 4, 3, 3, pad=(4, 5, 6, 3)),
    "one_column": Shape(3, 32, 5, 1, 3, 3, pad=(1, 1, 1, 1)),
}


def tensors(case, dtype, layout, device):
    """Dense ones, which vectors can read."""
    p = Problem("cpu", dtype, False, case.x_sizes, case.w_sizes, *case.geometry)
    x, dy = (dense(sizes, dtype, i, device).contiguous(memory_format=layout) for i, sizes in enumerate((p.x, p.y)))
    return x, dense(p.w, dtype, 2, device), dense(p.w[:1], dtype, 3, device), dy


def problem(case, x, nhwc):
    return Problem(x.device.type, x.dtype, nhwc, case.x_sizes, case.w_sizes, *case.geometry, x.get_device())


def all_maps(backend, p, x, w, bias, dy):
    return [
        backend.fprop(p, x, w, bias),
        backend.dgrad(p, dy, w),
        backend.wgrad(p, dy, x),
        *backend.dgrad_wgrad(p, dy, x, w),
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(SPECIALISED))
def test_specialised_kernels(name, dtype, layout, cuda):
    case = SPECIALISED[name]
    x, w, bias, dy = tensors(case, dtype, layout, cuda.device)
    p = problem(case, x, layout == torch.channels_last)
    ran = [cuda.kernel(p, pass_) for pass_ in range(4)]
    assert all(family.endswith("nhwc" if p.nhwc else "nchw") for family in ran), ran
    truth = rounded(true_results(case, x, w, bias, dy), cuda.device)
    theirs = torch_results(case, x, w, bias, dy)
    for i, what, ours in zip((0, 1, 2, 1, 2), (*PASSES, "dgrad_wgrad dw"), all_maps(cuda, p, x, w, bias, dy)):
        assert_no_worse_than_torch(ours, theirs[i], truth[i], f"{what} of {name} in {dtype}, {layout}")


TMA = "depthwise_fprop_nhwc_tma"


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float64], ids=str)
@pytest.mark.parametrize("name", [*sorted(SPECIALISED), "1x1_image", "several_chunks_and_tiles"])
def test_bulk_copies(name, dtype, cuda):
    others = {"1x1_image": square(16, 1, 1, 3), "several_chunks_and_tiles": square(200, 6, 70, 3, N=2)}
    case = {**SPECIALISED, **others}[name]
    x, w, bias, dy = tensors(case, dtype, torch.channels_last, cuda.device)
    p, family = problem(case, x, True), cuda.only(TMA)
    if cuda.name == "cuda" and cuda.card(0).arch < 90:
        pytest.skip("the card has no bulk copies")
    if case.dilation != (1, 1):
        with pytest.raises(ValueError, match="the dilation is not 1"):
            family.kernel(p)
        return
    if name == "1x1_image":  # contiguous() leaves it with other strides
        x, dy = (torch.empty_like(t, memory_format=torch.channels_last).copy_(t) for t in (x, dy))
    truth = rounded(true_results(case, x, w, bias, dy), cuda.device)
    theirs = torch_results(case, x, w, bias, dy)
    assert_no_worse_than_torch(family.fprop(p, x, w, bias), theirs[0], truth[0], f"fprop of {name} in {dtype}")
    if case.stride == (1, 1):
        assert_no_worse_than_torch(family.dgrad(p, dy, w), theirs[1], truth[1], f"dgrad of {name} in {dtype}")
    else:
        with pytest.raises(ValueError, match="not fprop, nor dgrad with stride 1"):
            family.dgrad(p, dy, w)


def test_bulk_copies_take_slices_that_are_aligned(cuda):
    if cuda.name == "cuda" and cuda.card(0).arch < 90:
        pytest.skip("the card has no bulk copies")
    case = square(16, 9, 10, 3)
    x, w, bias, _ = tensors(case, torch.float16, torch.channels_last, cuda.device)
    p, family = problem(case, x, True), cuda.only(TMA)
    expected = family.fprop(p, x, w, bias)
    larger = x.new_full((2, 32, 11, 13), torch.nan).contiguous(memory_format=torch.channels_last)
    for first in (8, 4):
        inside = larger[:, first : first + 16, 1:10, 2:12]
        inside.copy_(x)
        if first == 8:
            assert torch.equal(family.fprop(p, inside, w, bias), expected)
        else:
            with pytest.raises(ValueError, match="not aligned to 16 bytes"):
                family.fprop(p, inside, w, bias)
    with pytest.raises(ValueError, match="do not nest"):
        family.fprop(p, x[:1].expand(2, -1, -1, -1), w, bias)
    with pytest.raises(ValueError, match="do not nest"):
        turned = x.new_zeros(2, 16, 10, 9).contiguous(memory_format=torch.channels_last).transpose(2, 3)
        family.fprop(p, turned, w, bias)
    one = problem(case._replace(N=1), x, True)
    assert torch.equal(family.fprop(one, x[1][None], w, bias), expected[1:])  # the batch has the stride of a pixel
    relu = torch.zeros(16, device=cuda.device), *[torch.ones(16, device=cuda.device)] * 2, True
    with pytest.raises(ValueError, match="no function on load"):
        family.fprop(p, x, w, bias, relu)


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float64], ids=str)
@pytest.mark.parametrize(("C", "kernel"), [(4, 3), (2, 5), (4, 5), (2, 7), (4, 7)])
def test_bulk_copies_of_a_few_channels(C, kernel, dtype, cuda):
    """A pixel of a slice may have less than the 16 bytes that a box has at least."""
    if cuda.name == "cuda" and cuda.card(0).arch < 90:
        pytest.skip("the card has no bulk copies")
    case = square(C, 9, 10, kernel)
    x, w, bias, dy = tensors(case, dtype, torch.channels_last, cuda.device)
    larger = x.new_full((2, 16, 9, 10), torch.nan).contiguous(memory_format=torch.channels_last)
    inside = larger[:, :C].copy_(x)
    truth = rounded(true_results(case, x, w, bias, dy), cuda.device)
    ours = cuda.only(TMA).fprop(problem(case, x, True), inside, w, bias)
    assert_no_worse_than_torch(ours, torch_results(case, x, w, bias, dy)[0], truth[0], f"{C} channels of {dtype}")


def test_bulk_copies_are_off_until_the_selftest_has_passed(no_verdicts, emulator):
    case = square(16, 9, 10, 3)
    p = problem(case, tensors(case, torch.float32, torch.channels_last, "cpu")[0], True)
    assert EMULATED.families_off_at_first(torch.float32) == [TMA]
    assert EMULATED.why_not_families(p, 0)[TMA] == "is switched off" and EMULATED.kernel(p) == "depthwise_fprop_nhwc"
    try:
        selftest.record(EMULATED, torch.float32, 0, [])
        selftest.ensure(EMULATED, torch.float32, 0)
        assert EMULATED.kernel(p) == TMA
    finally:
        EMULATED.set_enabled(torch.float32, TMA, False)


def test_bulk_copies_stay_off_where_they_failed_on_another_card(no_verdicts, monkeypatch, emulator):
    """A family is on or off for all cards of a process."""
    verdicts = {0: [TMA], 1: []}
    monkeypatch.setattr(selftest, "_read", lambda backend, dtype, card: verdicts[card])
    monkeypatch.setattr(EMULATED, "card", lambda index: emulator.cuda_cards()[0])
    with pytest.warns(UserWarning, match=f"switches {TMA} off"):
        selftest.ensure(EMULATED, torch.float32, 0)
    selftest.ensure(EMULATED, torch.float32, 1)
    case = square(16, 9, 10, 3)
    p = problem(case, tensors(case, torch.float32, torch.channels_last, "cpu")[0], True)
    try:
        assert EMULATED.kernel(p) == "depthwise_fprop_nhwc"
    finally:
        EMULATED.set_enabled(torch.float32, TMA, False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_slices_that_begin_anywhere(offset, layout, cuda):
    """Whether vectors may be used is asked of the pointers and strides of every call."""
    case = square(16, 9, 10, 3)
    x, w, bias, dy = tensors(case, torch.float16, layout, cuda.device)
    expected = all_maps(cuda, problem(case, x, layout == torch.channels_last), x, w, bias, dy)

    def moved(t):
        larger = t.new_zeros(t.shape[0], t.shape[1] + 2 * offset, *t.shape[2:]).contiguous(memory_format=layout)
        larger[:, offset : offset + t.shape[1]] = t
        return larger[:, offset : offset + t.shape[1]]

    x, dy = moved(x), moved(dy)
    for mine, theirs in zip(all_maps(cuda, problem(case, x, layout == torch.channels_last), x, w, bias, dy), expected):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)


def test_a_small_model(cuda):
    torch.manual_seed(0)
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=10).eval().to(cuda.device)
    ours = xsep.convert(timm.create_model("mobilenetv3_small_050", num_classes=10), report=None).eval().to(cuda.device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, device=cuda.device).contiguous(memory_format=torch.channels_last)
    truth = timm.create_model("mobilenetv3_small_050", num_classes=10).eval().double().to(cuda.device)
    truth.load_state_dict(theirs.state_dict())
    (y, *grads), (torch_y, *torch_grads), (true_y, *true_grads) = (
        results(ours, x),
        results(theirs, x),
        results(truth, x.double()),
    )
    assert_no_worse_than_torch(y, torch_y, true_y, "output")
    assert_all_no_worse_than_torch(grads, torch_grads, true_grads, "gradients")


def test_explain_names_the_kernel(cuda):
    x, w = torch.randn(1, 16, 8, 8, device=cuda.device), torch.randn(16, 1, 3, 3, device=cuda.device)
    assert f"{cuda.name:14s} runs (forced): depthwise_fprop_nchw" in xsep.explain(x, w, padding=1)
    x = x.contiguous(memory_format=torch.channels_last)
    assert "runs (forced): depthwise_fprop_nhwc" in xsep.explain(x, w, padding=1)
    assert "runs (forced): depthwise_generic" in xsep.explain(x, w, stride=3)


def test_a_named_family_runs_or_says_why_not(cuda):
    case = square(16, 9, 10, 3)
    x, w, bias, dy = tensors(case, torch.float32, torch.channels_last, cuda.device)
    p = problem(case, x, True)
    expected = all_maps(cuda, p, x, w, bias, dy)
    for mine, theirs in zip(all_maps(cuda.only("depthwise_generic"), p, x, w, bias, dy), expected):
        torch.testing.assert_close(mine, theirs)
    with pytest.raises(ValueError, match="depthwise_fprop_nchw does not take fprop, float32 NHWC, x 2x16x9x10, w"):
        cuda.only("depthwise_fprop_nchw").fprop(p, x, w, None)
    with pytest.raises(ValueError, match="no kernel family 'fast'"):
        cuda.only("fast").fprop(p, x, w, None)
    reasons, chosen = cuda.why_not_families(p, 0), cuda.kernel(p)
    assert chosen in (TMA, "depthwise_fprop_nhwc")
    assert reasons[chosen] == "" and reasons["depthwise_generic"] == f"comes after {chosen}"


def test_a_family_is_switched_off(cuda):
    case = square(16, 9, 10, 3)
    x, w, _, _ = tensors(case, torch.float32, torch.channels_last, cuda.device)
    p = problem(case, x, True)
    chosen = cuda.kernel(p)
    enabled = [name for name, why in cuda.why_not_families(p, 0).items() if why != "is switched off"]
    try:
        for family in {"depthwise_fprop_nhwc", chosen}:
            cuda.set_enabled(torch.float32, family, False)
        assert cuda.kernel(p) == "depthwise_generic"
        assert cuda.why_not_families(p, 0)["depthwise_fprop_nhwc"] == "is switched off"
        ops.fprop(x, w, None, *case.geometry)
        cuda.set_enabled(torch.float32, "depthwise_generic", False)
        with pytest.raises(RuntimeError, match="is forced but cannot run.*fprop.*depthwise_generic is switched off"):
            ops.fprop(x, w, None, *case.geometry)
        assert cuda.kernel(p._replace(dtype=torch.float16)).startswith("depthwise_fprop_nhwc")  # of this dtype alone
    finally:
        for family in enabled:
            cuda.set_enabled(torch.float32, family, True)
    with pytest.raises(ValueError, match="no kernel family 'fast'"):
        cuda.set_enabled(torch.float32, "fast", False)
    assert cuda.kernel(p) == chosen


@pytest.fixture
def emulator():
    if EMULATED.why_absent() is not None:
        pytest.skip("install with XSEP_EMULATE_CUDA=1 in the environment")
    yield EMULATED.module
    EMULATED.module.set_order("ascending")


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ["3x3_stride1", "5x5_stride2", "7x7_small", "multiplier", "13x13"])
def test_any_order_of_threads_gives_the_same_bits(name, layout, emulator):
    case = {**NAMED, **SPECIALISED}[name]
    x, w, bias, dy = tensors(case, torch.float32, layout, "cpu")
    p = problem(case, x, layout == torch.channels_last)
    expected = all_maps(EMULATED, p, x, w, bias, dy)
    for order in ("descending", "7"):
        emulator.set_order(order)
        assert all(torch.equal(*pair) for pair in zip(all_maps(EMULATED, p, x, w, bias, dy), expected)), order


def test_the_emulator_counts(emulator):
    case = square(64, 9, 10, 3, N=1)
    x, w, _, _ = tensors(case, torch.float32, torch.channels_last, "cpu")
    emulator.start_counting()
    y = EMULATED.fprop(problem(case, x, True), x, w, None)
    (launch,) = emulator.stop_counting()
    assert "depthwise_fprop_nhwc_kernel" in launch["kernel"]
    assert launch["stores"]["bytes"] == nbytes(y) and launch["stores"]["accesses"][16] == nbytes(y) // 16
    assert launch["stores"]["distinct_sectors"] == nbytes(y) // 32
    assert launch["loads"]["distinct_sectors"] * 32 >= nbytes(x)
    assert launch["grid"] >= 1 and launch["block"] % 32 == 0


@pytest.mark.parametrize(
    ("layout", "N", "bound"), [(torch.contiguous_format, 1, 1.05), (torch.channels_last, 16, 1.35)]
)
@pytest.mark.parametrize("pass_", ["fprop", "wgrad", "dgrad_wgrad"])
def test_each_byte_is_read_about_once(pass_, layout, N, bound, emulator):
    """Sectors asked of L2 over those that have to be read; 128 KB of L1 and 4 blocks on each of 132 multiprocessors.

    In NHWC, where halos come through the caches, strips are long enough for the bound from some images on; one image
    of this size is cut into short ones, to fill the card.
    """
    case = square(728, 19, 19, 3, N=N)
    x, w, _, dy = tensors(case, torch.float32, layout, "cpu")
    x, dy = (t.contiguous(memory_format=layout) for t in (x, dy))
    p = problem(case, x, layout == torch.channels_last)
    emulator.start_counting(128 << 10, 132, 4)
    if pass_ == "fprop":
        EMULATED.fprop(p, x, w, None)
    elif pass_ == "wgrad":
        EMULATED.wgrad(p, dy, x)
    else:
        EMULATED.dgrad_wgrad(p, dy, x, w)
    main, *_ = emulator.stop_counting()
    assert main["load_sectors_after_cache"] <= bound * main["loads"]["distinct_sectors"]
    in_vectors = 8 * main["loads"]["accesses"][8] + 16 * main["loads"]["accesses"][16]
    assert in_vectors >= 0.95 * nbytes(x) * (1 if pass_ == "fprop" else 2)


@pytest.fixture
def no_verdicts(tmp_path, monkeypatch):
    """A cache directory of its own, and a process that knows nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selftest, "_ensured", {})
    return tmp_path / "xsep" / "selftest.json"


def test_selftest_passes(cuda, no_verdicts, capsys):
    assert selftest.main(["--backend", cuda.name]) == 0
    lines = [line.replace(" (", "(").split() for line in capsys.readouterr().out.splitlines()]
    families = [line for line in lines if len(line) > 2 and line[0] != "testing"]
    cells = {tuple(line[:2]): line[2:6] for line in families if line[1].startswith("depthwise_")}
    assert len(cells) == 3 * 6 + 1 and all("-" not in row for (_, name), row in cells.items() if "generic" in name)
    for name, column in (("separable_fprop_", 6), ("separable_backward_", 7), ("separable_fprop_", 8)):
        blocks = [line[column] for line in families if line[1].startswith(name)]
        assert len(blocks) == 1 + 2 * 2 and "-" not in blocks
    assert "-" not in [row[0] for (_, name), row in cells.items() if "fprop" in name]
    assert "-" not in [cell for (_, name), row in cells.items() if "backward" in name for cell in row[-2:]]


def test_a_failed_selftest_switches_off_and_is_remembered(no_verdicts, monkeypatch, emulator):
    outputs, family, dtype = selftest._outputs, "depthwise_fprop_nhwc", torch.float16

    def spoiled(backend, name, case):
        found = outputs(backend, name, case)
        return tuple(t + 1 for t in found) if (backend.family, name) == (family, "fprop") else found

    monkeypatch.setattr(selftest, "_outputs", spoiled)
    # Dilated, so that bulk copies, which pass, do not take it.
    p = Problem("cpu", dtype, True, (1, 16, 8, 8), (16, 1, 3, 3), (1, 1), (2, 2, 2, 2), (2, 2))
    assert EMULATED.kernel(p) == family
    try:
        assert not selftest.is_known(EMULATED, dtype, 0)
        with pytest.warns(UserWarning, match="switches depthwise_fprop_nhwc off for torch.float16.*report"):
            selftest.ensure(EMULATED, dtype, 0)
        assert EMULATED.kernel(p) == "depthwise_generic"
        assert list(json.loads(no_verdicts.read_text()).values()) == [{"torch.float16": [family]}]
        selftest.ensure(EMULATED, dtype, 0)  # says nothing twice
        EMULATED.set_enabled(dtype, family, True)

        # Another process reads the verdict; another driver asks for a new one.
        monkeypatch.setattr(selftest, "_ensured", {})
        monkeypatch.setattr(selftest, "check", None)
        assert selftest.is_known(EMULATED, dtype, 0)
        with pytest.warns(UserWarning, match="switches depthwise_fprop_nhwc off"):
            selftest.ensure(EMULATED, dtype, 0)
        assert EMULATED.kernel(p) == "depthwise_generic"
        monkeypatch.setattr(selftest, "_ensured", {})
        monkeypatch.setattr(selftest, "_driver", lambda backend: "another")
        assert not selftest.is_known(EMULATED, dtype, 0)
        monkeypatch.setenv("XSEP_SKIP_SELFTEST", "1")
        selftest.ensure(EMULATED, dtype, 0)
    finally:
        EMULATED.set_enabled(dtype, family, True)
        EMULATED.set_enabled(dtype, TMA, False)


def test_a_kernel_that_takes_the_device_with_it(no_verdicts, monkeypatch, emulator, capsys):
    """It is named, and what comes after it is not said to have failed."""
    family = "depthwise_fprop_nchw"
    monkeypatch.setattr(selftest, "SHAPES", {"3x3": selftest.SHAPES["3x3_stride1"]})

    def raises(*_):
        raise RuntimeError("an illegal memory access was encountered")

    def crashing(backend, name, case, outputs=selftest._outputs):
        if backend.family == family:
            monkeypatch.setattr(selftest, "_synchronize", raises)
            raises()
        return outputs(backend, name, case)

    monkeypatch.setattr(selftest, "_outputs", crashing)
    command = ["--backend", "cuda-emulated", "--dtypes", "float32"]
    assert selftest.main(command) == 3 and not no_verdicts.exists()
    out = capsys.readouterr().out
    assert f"LOST {family}, torch.float32: 3x3 NCHW: an illegal memory access" in out and "FAILED" not in out
    assert (
        "any more: depthwise_backward_nchw, depthwise_generic, separable_fprop_nhwc, separable_backward_nhwc\n" in out
        and f"'--without {family}'" in out
    )


@pytest.mark.parametrize("kept", [True, False])
def test_a_kernel_that_ends_its_process(kept, no_verdicts, monkeypatch, emulator):
    """Other processes test the rest, and this one learns of all."""
    run, commands = subprocess.run, []
    planted = f"""
import os, sys
sys.path.insert(0, {str(Path(selftest.__file__).parents[1])!r})
from xsep import selftest
selftest.SHAPES = {{"3x3": selftest.SHAPES["3x3_stride1"]}}
outputs, ends = selftest._outputs, ("depthwise_fprop_nhwc", "depthwise_generic")
selftest._outputs = lambda backend, *case: os.abort() if backend.family in ends else outputs(backend, *case)
"""

    def process(command, **options):
        commands.append(command[9:])
        return run([*command[:2], planted + command[2], *command[3:]], **options)

    if not kept:
        no_verdicts.mkdir(parents=True)
    monkeypatch.setattr(selftest.subprocess, "run", process)
    failed = ["depthwise_fprop_nhwc", "depthwise_generic"]
    assert selftest._in_child(EMULATED, torch.float32, 0) == failed
    assert commands == [[], ["--without", failed[0]], ["--without", *failed]]
    assert selftest._read(EMULATED, torch.float32, 0) == (failed if kept else None)


def test_a_process_that_cannot_be(no_verdicts, monkeypatch, emulator):
    monkeypatch.setattr(selftest.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9, stdout=""))
    assert selftest._in_child(EMULATED, torch.float16, 0) is None
    monkeypatch.setattr(selftest.sys, "executable", None)
    assert selftest._in_child(EMULATED, torch.float16, 0) is None


def test_selftest_in_a_process_of_its_own(no_verdicts, emulator):
    assert selftest._in_child(EMULATED, torch.float64, 0) == []
    assert list(json.loads(no_verdicts.read_text()).values()) == [{"torch.float64": []}]


def test_selftest_prints_what_failed(no_verdicts, monkeypatch, emulator, capsys):
    truth = selftest._truth
    monkeypatch.setattr(selftest, "_truth", lambda *a: {k: [(v + 1, s) for v, s in o] for k, o in truth(*a).items()})
    assert selftest.main(["--backend", "cuda-emulated", "--dtypes", "float64"]) == 1
    out = capsys.readouterr().out
    assert "FAILED depthwise_generic, torch.float64, fprop: 3x3_stride1 NCHW: " in out and "instead of" in out


def test_selftest_sees_what_is_not_written(monkeypatch, emulator):
    torch.use_deterministic_algorithms(False)  # it is the self-test that fills memory
    monkeypatch.setattr(CudaBackend, "_run", lambda *arguments: None)
    for result in selftest.check(EMULATED, torch.float64):
        assert "nan instead of" in result.failure, result


def test_a_verdict_that_cannot_be_read_or_kept(no_verdicts, emulator):
    no_verdicts.parent.mkdir()
    for text in ("", "[]", '{"a": 1}'):
        no_verdicts.write_text(text)
        assert selftest._read(EMULATED, torch.float64, 0) is None
    no_verdicts.unlink()
    no_verdicts.mkdir()  # nothing can be put in its place
    assert selftest.record(EMULATED, torch.float64, 0, []) == []


def test_selftest_says_what_is_missing(tmp_path):
    if BACKENDS["cuda"].why_absent() is None:
        pytest.skip("this installation has CUDA kernels")
    command = [sys.executable, "-m", "xsep.selftest", "--backend", "cuda"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ})
    assert run.returncode == 2 and "no CUDA kernels" in run.stderr


@pytest.fixture
def card():
    """The cuda backend, chosen by the tensors' device; tests with it run on a card only."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device that torch can use")
    if BACKENDS["cuda"].why_absent() is not None:
        pytest.skip(BACKENDS["cuda"].why_absent())
    torch.use_deterministic_algorithms(False)  # filling memory would put kernels of torch's between ours
    return BACKENDS["cuda"]


@pytest.mark.gpu
def test_cuda_tensors_take_the_cuda_backend(card):
    x, w = torch.randn(1, 16, 8, 8, device="cuda"), torch.randn(16, 1, 3, 3, device="cuda")
    assert "cuda           runs: depthwise_fprop_nchw" in xsep.explain(x, w)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(dtype, layout, card):
    for case in (square(728, 19, 19, 3, N=8), square(96, 56, 56, 7, N=8), square(144, 56, 56, 5, 2, N=8)):
        x, w, bias, dy = tensors(case, dtype, layout, "cuda")
        p = problem(case, x, layout == torch.channels_last)
        first = all_maps(card, p, x, w, bias, dy)
        for _ in range(20):
            assert all(torch.equal(*pair) for pair in zip(all_maps(card, p, x, w, bias, dy), first))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_cuda_graphs(layout, card):
    case = square(64, 30, 30, 3)
    x, w, bias, dy = tensors(case, torch.float16, layout, "cuda")
    p = problem(case, x, layout == torch.channels_last)
    ops.fprop(x, w, bias, *case.geometry)  # the self-test comes before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [ops.fprop(x, w, bias, *case.geometry), *ops.dgrad_wgrad(dy, x, w, *case.geometry)]
    for seed in (5, 6):
        x.copy_(dense(x.shape, x.dtype, seed, "cuda"))
        graph.replay()
        expected = [card.fprop(p, x, w, bias), *card.dgrad_wgrad(p, dy, x, w)]
        assert all(torch.equal(*pair) for pair in zip(captured, expected))


@pytest.mark.gpu
def test_no_test_runs_while_a_graph_is_captured(card, no_verdicts):
    x, w = torch.randn(1, 8, 9, 9, device="cuda"), torch.randn(8, 1, 3, 3, device="cuda")
    card.choice_changes()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.fprop(x, w, None, (1, 1), (1, 1, 1, 1), (1, 1))
    assert not selftest.is_known(card, torch.float32, 0)
    for _ in range(2):  # the first call finds that a choice was made untested, the next one tests
        ops.fprop(x, w, None, (1, 1), (1, 1, 1, 1), (1, 1))
    assert selftest.is_known(card, torch.float32, 0)


@pytest.mark.gpu
def test_streams(card):
    case = square(256, 56, 56, 3, N=4)
    x, w, bias, dy = tensors(case, torch.float32, torch.channels_last, "cuda")
    p = problem(case, x, True)
    expected = all_maps(card, p, x, w, bias, dy)
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(4)], []
    for stream in streams * 5:
        with torch.cuda.stream(stream):
            found.append(all_maps(card, p, x, w, bias, dy))
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for mine in found for pair in zip(mine, expected))


@pytest.mark.gpu
def test_other_devices(card):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    x, w = torch.randn(1, 16, 8, 8, device="cuda:1"), torch.randn(16, 1, 3, 3, device="cuda:1")
    torch.testing.assert_close(xsep.depthwise_conv2d(x, w), F.conv2d(x, w, groups=16))
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
def test_more_than_2_to_the_31_elements(layout, card):
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip(f"needs 20 GB of free memory, there are {torch.cuda.mem_get_info()[0] / 1e9:.1f}")
    N, C, extent = 9, 64, 1950  # the last image begins beyond 2^31 - 1 elements
    x = (
        torch.randn(1, C, extent, extent, device="cuda")
        .bfloat16()
        .expand(N, -1, -1, -1)
        .contiguous(memory_format=layout)
    )
    w = torch.randn(C, 1, 3, 3, device="cuda").bfloat16()
    y = xsep.depthwise_conv2d(x, w, padding=1)
    assert y.numel() > 2**31 and all(torch.equal(y[0], y[n]) for n in range(1, N))
    torch.testing.assert_close(y[-1:], F.conv2d(x[-1:], w, padding=1, groups=C), rtol=2e-2, atol=2e-2)
    dx, dw = ops.dgrad_wgrad(y, x, w, (1, 1), (1, 1, 1, 1), (1, 1))
    assert all(torch.equal(dx[0], dx[n]) for n in range(1, N))
    one = ops.wgrad(y[:1], x[:1], w.shape, (1, 1), (1, 1, 1, 1), (1, 1))
    torch.testing.assert_close(dw.float(), N * one.float(), rtol=2e-2, atol=1)
