"""The products whose weights are on their way early, against the reference; on a GPU only, Gluon has no interpreter."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs a GPU with compute capability 9.0", allow_module_level=True)

from fastqwen.kernels.triton.streamed import StreamTiling, streamed_linear
from fastqwen.kernels.triton.workspace import Workspace

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[found.dtype], error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tiling", [StreamTiling(64, 1, 3), StreamTiling(128, 3, 4), StreamTiling(64, 4, 8)])
@pytest.mark.parametrize("rows", [2, 7, 16, 33, 64])
@pytest.mark.parametrize(("n", "k"), [(64, 512), (448, 1024), (1024, 768)])
def test_products(dtype: torch.dtype, tiling: StreamTiling, rows: int, n: int, k: int):
    space = Workspace(DEVICE)
    x, weight = random(rows, k, dtype=dtype), (random(2 * n, k) * k**-0.5).to(dtype)
    bias, residual = random(2 * n, dtype=dtype), random(rows, n, dtype=dtype)
    wide = x.double() @ weight.double().t() + bias.double()
    for _ in range(2):  # the second time with the counters that the first one left
        plain = streamed_linear(x, weight[:n].contiguous(), space, bias=bias[:n].contiguous(), tiling=tiling)
        close(plain, wide[:, :n])
        gated = streamed_linear(x, weight, space, bias=bias, gated=True, tiling=tiling)
        close(gated, torch.nn.functional.silu(wide[:, :n]) * wide[:, n:])
        total = residual.clone()
        streamed_linear(x, weight[:n].contiguous(), space, add_to=total, tiling=tiling)
        close(total, residual.double() + x.double() @ weight[:n].double().t())
    assert not space.counter.any()


def test_a_row_that_is_not_finite_stays_alone():
    space = Workspace(DEVICE)
    x, weight = random(9, 512, dtype=torch.bfloat16), random(128, 512, dtype=torch.bfloat16)
    expected = streamed_linear(x, weight, space)
    x[4] = float("nan")
    found = streamed_linear(x, weight, space)
    keep = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(found[keep], expected[keep])


def test_a_chain_sees_what_each_kernel_left():
    """Each kernel begins before the one in front has ended, in a graph as in a step."""
    space = Workspace(DEVICE)
    weights = [(random(512, 512) * 512**-0.5).to(torch.bfloat16) for _ in range(12)]
    first = random(8, 512, dtype=torch.bfloat16)

    def chain() -> torch.Tensor:
        x = first
        for weight in weights:
            x = streamed_linear(x, weight, space, tiling=StreamTiling(128, 2, 3))
        return x

    expected = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(50):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
    reference = first.double()
    for weight in weights:
        reference = reference @ weight.double().t()
    assert (found.double() - reference).norm() / reference.norm() < 0.05
