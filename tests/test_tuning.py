"""Choice by timing: by a clock that says what the test wants on the emulated kernels, by a true one on a GPU."""

import json

import pytest
import torch
import torch.nn.functional as F

import xsep
from xsep.ops import aten, backends, tuning
from xsep.ops.backends import BACKENDS
from xsep.ops.problem import Problem

EMULATED = BACKENDS["cuda-emulated"]
FAMILIES = ["depthwise_fprop_nhwc", "depthwise_generic"]


def problem(N=2, C=16, dtype=torch.float32):
    return Problem("cpu", dtype, True, (N, C, 9, 10), (C, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1))


def tensors(p):
    x, dy = (torch.randn(p.x).to(p.dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    return x, torch.randn(p.w).to(p.dtype), dy


def emulated_candidates(p, pass_):
    return {**EMULATED.candidates(p, pass_), "aten": aten}


class Clock:
    """Runs every call once, and says that the i-th took ``times[i]``."""

    def __init__(self, *times):
        self.times, self.seen = times, 0

    def __call__(self, calls):
        for call in calls:
            call()
        self.seen += 1
        return list(self.times[: len(calls)])


@pytest.fixture
def timed(monkeypatch):
    """Makes a ``TimedBackend`` over the emulated kernels and torch's, with a clock, and counts what runs afterwards."""
    if EMULATED.why_absent() is not None:
        pytest.skip("install with XSEP_EMULATE_CUDA=1 in the environment")

    def make(*times, candidates=emulated_candidates):
        return tuning.TimedBackend(candidates, lambda p: EMULATED, Clock(*times))

    return make


@pytest.mark.parametrize(("times", "fastest"), [((1, 2, 3), 0), ((2, 1, 3), 1), ((3, 2, 1), 2)])
def test_the_fastest_runs(times, fastest, timed):
    p, backend = problem(), timed(*times)
    x, w, _ = tensors(p)
    y = backend.fprop(p, x, w, None)
    assert backend.measured(p, 0) == dict(zip([*FAMILIES, "aten"], times))
    expected = [*emulated_candidates(p, 0).values()][fastest].fprop(p, x, w, None)
    assert torch.equal(y, expected) and y.stride() == expected.stride()


def test_every_pass_of_every_problem_is_timed_once(timed):
    p, backend = problem(), timed(3, 2, 1)
    for count, p in ((4, problem()), (4, problem()), (8, problem(N=3)), (12, problem(dtype=torch.bfloat16))):
        x, w, dy = tensors(p)
        found = [backend.fprop(p, x, w, None), backend.dgrad(p, dy, w), backend.wgrad(p, dy, x)]
        found += backend.dgrad_wgrad(p, dy, x, w)
        expected = [aten.fprop(p, x, w, None), aten.dgrad(p, dy, w), aten.wgrad(p, dy, x)]
        expected += aten.dgrad_wgrad(p, dy, x, w)
        assert all(torch.equal(*pair) for pair in zip(found, expected))
        assert backend._clock.seen == count
    assert list(backend.explain(problem()))[0] == (
        "    fprop: aten 1.0000 ms, depthwise_generic 2.0000 ms, depthwise_fprop_nhwc 3.0000 ms"
    )


def test_nothing_is_timed_while_a_graph_is_captured(timed, monkeypatch):
    p, backend = problem(), timed(3, 2, 1)
    x, w, _ = tensors(p)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_capturing", lambda: True)
        assert torch.equal(backend.fprop(p, x, w, None), EMULATED.fprop(p, x, w, None))
    assert backend._clock.seen == 0 and not backend.measured(p, 0)
    backend.fprop(p, x, w, None)
    assert backend._clock.seen == 1
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    assert torch.equal(backend.fprop(p, x, w, None), aten.fprop(p, x, w, None))  # what was timed before is known


def test_a_file_keeps_the_choices(timed, tmp_path):
    p, path, first = problem(), tmp_path / "new" / "choices.json", timed(3, 2, 1)
    x, w, _ = tensors(p)
    first.fprop(p, x, w, None)
    first.save(path)
    second = timed(1, 2, 3)
    second.load(path)
    assert torch.equal(second.fprop(p, x, w, None), aten.fprop(p, x, w, None))
    assert second._clock.seen == 0 and second.times == first.times
    second.dgrad(p, *tensors(p)[:2])
    assert second._clock.seen == 1


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"format": "else"}',
        '{"format": "xsep choices"}',
        '{"format": "xsep choices", "milliseconds": {"cpu": {"fprop": {}}}}',
        '{"format": "xsep choices", "milliseconds": {"cpu": {"fprop": {"aten": "fast"}}}}',
        '{"format": "xsep choices", "milliseconds": {"cpu": {"fprop": {"aten": NaN}}}}',
    ],
)
def test_other_files_are_refused(text, timed, tmp_path):
    path, backend = tmp_path / "choices.json", timed(1, 2, 3)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"choices\.json is not a file of choices"):
        backend.load(path)
    assert backend.times == {}
    with pytest.raises(FileNotFoundError):
        backend.load(tmp_path / "absent")


def test_choices_of_other_versions_are_left_aside(timed, tmp_path):
    path, backend = tmp_path / "choices.json", timed(3, 2, 1)
    backend.fprop(problem(), *tensors(problem())[:2], None)
    backend.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch": "1.0"}))
    other = timed(1, 2, 3)
    with pytest.warns(UserWarning, match="left aside: measured with.*'torch': '1.0'"):
        other.load(path)
    assert other.times == {}


def test_what_cannot_run_is_no_candidate(timed):
    def candidates(p, pass_):
        class Broken:
            def fprop(self, *_):
                raise RuntimeError("no memory for it")

        return {"broken": Broken(), **(emulated_candidates(p, pass_) if p.dtype == torch.float32 else {})}

    backend = timed(1, 2, 3, candidates=candidates)
    p = problem()
    backend.fprop(p, *tensors(p)[:2], None)
    assert list(backend.measured(p, 0)) == [*FAMILIES, "aten"]
    with pytest.raises(RuntimeError, match="no memory for it"):
        backend.fprop(problem(dtype=torch.float16), *tensors(problem(dtype=torch.float16))[:2], None)


def test_a_single_candidate_needs_no_timing(timed):
    backend = timed(1, candidates=lambda p, pass_: {"aten": aten})
    p = problem()
    x, w, _ = tensors(p)
    assert torch.equal(backend.fprop(p, x, w, None), aten.fprop(p, x, w, None))
    assert backend._clock.seen == 0 and backend.times == {}


def test_addresses_that_the_chosen_family_does_not_take(timed):
    p, backend = problem(dtype=torch.float16), timed(1, 2, 3)
    x, w, _ = tensors(p)
    backend.fprop(p, x, w, None)
    larger = torch.zeros(2, 18, 9, 10, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    larger[:, 1:17] = x
    y = backend.fprop(p, larger[:, 1:17], w, None)
    assert torch.equal(y, EMULATED.only("depthwise_generic").fprop(p, x, w, None))


def test_a_family_that_is_switched_off_is_no_candidate(timed):
    p, backend = problem(), timed(1, 2, 3)
    x, w, _ = tensors(p)
    backend.fprop(p, x, w, None)
    try:
        EMULATED.set_enabled(p.dtype, FAMILIES[0], False)
        backend.forget_chosen()
        assert torch.equal(backend.fprop(p, x, w, None), EMULATED.only(FAMILIES[1]).fprop(p, x, w, None))
        assert backend._clock.seen == 1
    finally:
        EMULATED.set_enabled(p.dtype, FAMILIES[0], True)


def test_when_timing_is_wanted(monkeypatch):
    on_cpu, on_gpu = problem(), problem()._replace(device="cuda", device_index=0)
    torch.use_deterministic_algorithms(False)
    assert not tuning.wanted(on_gpu)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert tuning.wanted(on_gpu) and not tuning.wanted(on_cpu)
    torch.use_deterministic_algorithms(True)
    assert not tuning.wanted(on_gpu)
    monkeypatch.setattr(tuning, "wanted", lambda p: True)
    assert backends.choose(on_cpu) is backends.TIMED
    assert "torch.backends.cudnn.benchmark is set" in backends.explain_problem(on_cpu)
    with xsep.backend("aten"):
        assert backends.choose(on_cpu) is aten


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device that torch can use")
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    x = torch.randn(2, 32, 20, 20, device="cuda").contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(32, 1, 3, 3, device="cuda", requires_grad=True)
    y = xsep.depthwise_conv2d(x, w, padding=1)
    y.sum().backward()
    torch.testing.assert_close(y, F.conv2d(x, w, padding=1, groups=32))
    said = xsep.explain(x, w, padding=1)
    assert "fprop: " in said and "dgrad_wgrad: " in said and "aten" in said.rsplit("fprop: ", 1)[1]
    xsep.save_choices(tmp_path / "choices.json")
    xsep.load_choices(tmp_path / "choices.json")
    unseen = torch.randn(3, 32, 20, 20, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        xsep.depthwise_conv2d(unseen, w.detach(), padding=1)
    assert "3x32x20x20" not in str(backends.TIMED.times)
