"""Operators on the simulated GPU: the CPU's results, CUDA's rules about devices, and what is counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulated_gpu import observed
from simulated_gpu.int4_stand_ins import _multiply, _pack


def test_it_is_cuda():
    tensor = torch.ones(2, device="cuda")
    assert torch.cuda.is_available()
    assert tensor.is_cuda
    assert tensor.device == torch.device("cuda", 0)
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert torch.cuda.get_device_capability() >= (8, 0)
    assert torch.cuda.is_bf16_supported()


SQUARE = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
RESULTS = {
    "product": lambda x: x @ x,
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.t() + torch.eye(6, dtype=x.dtype, device=x.device)),
    "sorted": lambda x: x.sort(dim=1, descending=True).values,
    "masked": lambda x: x[x > 0],
    "gathered": lambda x: x[torch.tensor([3, 1]), :][:, [0, 2]],
    "written": lambda x: x.clone().index_put_((torch.tensor([0]),), torch.tensor(2.0, dtype=x.dtype)),
    "transposed": lambda x: x.t()[1:, ::2].contiguous(),
    "cast": lambda x: x.half().float().int(),
    "softmax": lambda x: x.softmax(-1).cumsum(0),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    "grouped": lambda x: torch.cat(x.split(4)).view(3, 2, 6).amax(dim=(0, 2)),
    "floor": lambda x: (x * 10) // torch.tensor(3.0, dtype=x.dtype),
    "in place": lambda x: x.clone().addmm_(x, x, beta=0.5).mul_(2).clamp_(-1, 1),
    "conjugated": lambda x: torch.complex(x, x).conj().resolve_conj().real.clone(),
}


@pytest.mark.parametrize("what", RESULTS)
def test_results_are_the_cpus(what):
    result = RESULTS[what](SQUARE.to("cuda"))
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), RESULTS[what](SQUARE), rtol=0, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_copies_keep_values_in_any_order_and_dtype(transposed, dtype):
    source = SQUARE.t() if transposed else SQUARE
    there = source.to("cuda", dtype)
    into = torch.empty(6, 6).t()
    assert torch.equal(there.cpu(), source.to(dtype))
    assert torch.equal(into.copy_(there), source.to(dtype).float())
    rows = torch.zeros(6, 12, device="cuda")
    rows[:, ::2] = source
    assert torch.equal(rows[:, ::2].cpu(), source.float())


def test_a_gradient_flows():
    weight = torch.ones(3, 3, device="cuda", requires_grad=True)
    (torch.arange(9.0, device="cuda").view(3, 3) @ weight).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.is_cuda
    own = torch.ones(3, 3, requires_grad=True)
    (torch.arange(9.0).view(3, 3) @ own).square().sum().backward()
    assert torch.equal(weight.grad.cpu(), own.grad)


CPU = torch.ones(4, 4)
MIXED = {
    "sum": lambda here: here + CPU,
    "product": lambda here: here @ CPU,
    "the other way round": lambda here: CPU @ here,
    "concatenation": lambda here: torch.cat([here, CPU]),
    "in place": lambda here: here.clone().add_(CPU),
    "out": lambda here: torch.mul(here, here, out=torch.empty(4, 4)),
    "index_select": lambda here: here.index_select(0, torch.tensor([0])),
    "index_copy": lambda here: here.clone().index_copy_(0, torch.tensor([0]), here[:1]),
    "gather": lambda here: here.gather(0, torch.zeros(1, 4, dtype=torch.int64)),
    "linear": lambda here: torch.nn.functional.linear(here, CPU),
    "attention": lambda here: torch.nn.functional.scaled_dot_product_attention(here[None], CPU[None], here[None]),
    "index on the device, tensor on the CPU": lambda _: CPU[torch.zeros(2, dtype=torch.int64, device="cuda")],
}


@pytest.mark.parametrize("what", MIXED)
def test_mixing_devices_is_an_error(what):
    with pytest.raises(
        (RuntimeError, ValueError), match=r"same device|device type|indices should be either on|devices"
    ):
        MIXED[what](torch.ones(4, 4, device="cuda"))


def test_a_number_of_the_cpu_is_taken():
    here, two = torch.ones(4, 4, device="cuda"), torch.tensor(2.0)
    assert (here * two).sum().item() == 32
    assert torch.where(here > 0, two, here).sum().item() == 32
    assert here.clone().masked_fill_(here > 0, two).sum().item() == 32
    assert here.clone().fill_(two).sum().item() == 32


def counted(use) -> dict[str, int]:
    torch.cuda.synchronize()
    observed.reset_counters()
    use()
    return observed.counters()


def test_kernels_waits_and_copies_are_counted():
    x = torch.ones(8, 8, device="cuda")
    assert counted(lambda: x.t()[2:].unsqueeze(0).expand(3, -1, -1)[0, 1])["launches"] == 0, "views launch nothing"
    assert counted(lambda: x.add_(1))["launches"] == 1
    assert counted(lambda: x @ x)["flops"] == 2 * 8**3
    assert counted(lambda: x @ x)["synchronizations"] == 0
    for wait in (
        lambda: x[0, 0].item(),
        lambda: bool(x[0, 0]),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        torch.cuda.synchronize,
    ):
        assert counted(wait)["synchronizations"] >= 1
    down = counted(x.cpu)
    assert (down["device_to_host_copies"], down["device_to_host_bytes"], down["synchronizations"]) == (1, 256, 1)
    up = counted(lambda: torch.ones(8, 8).to("cuda"))
    assert (up["host_to_device_copies"], up["pageable_host_to_device_bytes"], up["synchronizations"]) == (1, 256, 1)
    pinned = torch.ones(8, 8).pin_memory()
    up = counted(lambda: pinned.to("cuda", non_blocking=True))
    assert (up["host_to_device_bytes"], up["pageable_host_to_device_copies"], up["synchronizations"]) == (256, 0, 0)


@given(st.integers(1, 3), st.integers(1, 2), st.sampled_from([32, 64, 128]))
def test_the_int4_product_multiplies_by_the_codes(rows, eights, group_size):
    in_features, out_features = 256, 8 * eights
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (out_features, in_features), generator=generator, dtype=torch.uint8)
    scale = torch.rand(in_features // group_size, out_features, generator=generator).to(torch.bfloat16)
    zero = torch.rand(in_features // group_size, out_features, generator=generator).to(torch.bfloat16)
    x = torch.randn(rows, in_features, generator=generator).to(torch.bfloat16)
    words = _pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    weight = torch.zeros(in_features, out_features)
    for k in range(in_features):
        weight[k] = (codes[:, k].float() - 8) * scale[k // group_size].float() + zero[k // group_size].float()
    product = _multiply(x, words, group_size, torch.stack([scale, zero], dim=-1))
    torch.testing.assert_close(product, x @ weight.to(torch.bfloat16))
