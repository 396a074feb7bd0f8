"""Large outputs come from recycled memory, and are tensors like any other."""

import copy
import io
import pickle
import threading

import pytest
import torch
from conv_cases import nbytes

import xsep
from xsep.ops import cpu

pytestmark = pytest.mark.skipif(
    not cpu._C.recycles(), reason="this system has no MADV_FREE: torch allocates everything"
)


@pytest.fixture(autouse=True)
def no_filling(nan_filled_memory):
    """Memory that torch is told to fill is torch's."""
    torch.use_deterministic_algorithms(False)
    xsep.empty_cache()
    yield
    xsep.empty_cache()


def large(channels_last=False):
    x = torch.randn(2, 32, 100, 100)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("channels_last", [False, True])
def test_freed_outputs_are_used_again(channels_last):
    x, w = large(channels_last), torch.randn(32, 1, 3, 3)
    y = xsep.depthwise_conv2d(x, w, padding=1)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w, padding=1, groups=32))
    address, view = y.data_ptr(), y[1:]
    del y
    assert cpu._C.waiting_bytes() == 0  # the view still needs it
    other = xsep.depthwise_conv2d(x, w, padding=1)
    assert other.data_ptr() != address
    del view
    assert cpu._C.waiting_bytes() >= nbytes(x)
    again = xsep.depthwise_conv2d(x, w, padding=1)
    assert again.data_ptr() == address and cpu._C.waiting_bytes() == 0
    del again, other
    xsep.empty_cache()
    assert cpu._C.waiting_bytes() == 0


def test_the_limit_holds():
    x, w = large(), torch.randn(32, 1, 3, 3)
    cpu._C.set_limit(3 * nbytes(x))
    try:
        outputs = [xsep.depthwise_conv2d(x, w, padding=1) for _ in range(6)]
        del outputs
        assert 0 < cpu._C.waiting_bytes() <= 3 * nbytes(x)
    finally:
        cpu._C.set_limit(4 << 30)


def test_what_waits_makes_room_for_other_sizes():
    """A larger output is cut from what smaller ones left."""
    x, w = large(), torch.randn(32, 1, 3, 3)
    outputs = [xsep.depthwise_conv2d(x, w, padding=1) for _ in range(6)]
    del outputs
    before = cpu._C.waiting_bytes()
    assert before >= 6 * nbytes(x)
    larger = xsep.depthwise_conv2d(torch.cat((x, x)), w, padding=1)
    assert 0 < cpu._C.waiting_bytes() <= before - nbytes(larger)


def test_outputs_are_ordinary_tensors():
    x, w = large(), torch.randn(32, 1, 3, 3)
    y = xsep.depthwise_conv2d(x, w, padding=1)
    expected = y.clone()
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), torch.load(buffer), torch.from_numpy(y.numpy())):
        assert torch.equal(other, expected)
    assert torch.equal(y.share_memory_(), expected)
    assert torch.equal(y.add_(1), expected + 1)


def test_gradients_through_recycled_memory():
    x, w = large().requires_grad_(), torch.randn(32, 1, 3, 3, requires_grad=True)
    for _ in range(3):
        ours = torch.autograd.grad(xsep.depthwise_conv2d(x, w, padding=1).square().sum(), (x, w))
        theirs = torch.autograd.grad(torch.nn.functional.conv2d(x, w, padding=1, groups=32).square().sum(), (x, w))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)


def test_several_threads():
    x, w = large(), torch.randn(32, 1, 3, 3)
    expected, failures = xsep.depthwise_conv2d(x, w, padding=1), []

    def work():
        for _ in range(20):
            if not torch.equal(xsep.depthwise_conv2d(x, w, padding=1), expected):
                failures.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_bad_sizes():
    with pytest.raises(ValueError, match="at least 1; got 0"):
        cpu._C.recycled(0, (1, 0, 1, 1), True)
    with pytest.raises(MemoryError):
        cpu._C.recycled(0, (1 << 29, 1 << 29, 1, 1), True)
