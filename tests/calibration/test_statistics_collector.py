"""Tests statistics collected by hooks against sums computed directly from the inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_awq_offload.calibration.statistics_collector import StatisticsCollector
from hf_awq_offload.errors import NumericalError
from hf_awq_offload.precision import exact_on_matrix_units
from hf_awq_offload.search.statistics import InputStatistics

IN = 6


class Layer(nn.Module):
    """Two linears whose inputs differ in width, as in a decoder layer."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(IN, 10, dtype=dtype)
        self.down = nn.Linear(10, IN, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def batch(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def collect(
    layer: Layer, batches: list[Tensor], counted: list[Tensor | None] | None = None
) -> dict[str, InputStatistics]:
    collector = StatisticsCollector({"up": layer.up, "down": layer.down}, torch.device("cpu"))
    with collector.collecting(), torch.no_grad():
        for index, x in enumerate(batches):
            collector.set_counted_tokens(None if counted is None else counted[index])
            layer(x)
    return {name: collector.take(name, "layers.0") for name in ("up", "down")}


def assert_statistics_of(statistics: InputStatistics, rows: Tensor) -> None:
    """Asserts that the statistics are those of all inputs, `rows` (tokens, in), summed one by one in fp64."""
    gram, mean_abs = torch.zeros(rows.shape[1], rows.shape[1]).double(), torch.zeros(rows.shape[1]).double()
    for row in rows.double():
        gram += torch.outer(row, row)
        mean_abs += row.abs()
    assert statistics.tokens == rows.shape[0]
    assert statistics.gram.dtype == statistics.mean_abs.dtype == torch.float32
    torch.testing.assert_close(statistics.gram.double(), gram / rows.shape[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.mean_abs.double(), mean_abs / rows.shape[0], rtol=1e-5, atol=1e-6)


def test_sums_over_batches_of_different_shapes_are_those_of_all_their_tokens():
    layer = Layer()
    batches = [batch(2, 5, IN), batch(1, 7, IN, seed=1), batch(3, 1, IN, seed=2)]
    statistics = collect(layer, batches)
    rows = torch.cat([x.reshape(-1, IN) for x in batches])
    assert_statistics_of(statistics["up"], rows)
    assert_statistics_of(statistics["down"], torch.relu(layer.up(rows)).detach())


@given(
    seed=st.integers(0, 2**32 - 1),
    cut=st.integers(1, 11),
    magnitude=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_how_tokens_are_cut_into_batches_does_not_matter(seed, cut, magnitude):
    layer = Layer()
    rows = batch(12, IN, seed=seed) * magnitude
    whole = collect(layer, [rows])
    parts = collect(layer, [rows[:cut], rows[cut:]])
    for name in ("up", "down"):
        assert whole[name].tokens == parts[name].tokens == 12
        scale = float(whole[name].gram.abs().max())
        torch.testing.assert_close(whole[name].gram, parts[name].gram, rtol=1e-5, atol=1e-6 * scale)
        torch.testing.assert_close(whole[name].mean_abs, parts[name].mean_abs, rtol=1e-5, atol=1e-6 * scale**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_summed_in_fp32(dtype):
    """The sum of 4096 squares of 8 is 2¹⁸, beyond the range of fp16; in bf16 the sum would stop growing."""
    layer = Layer(dtype)
    statistics = collect(layer, [torch.full((1, 4096, IN), 8.0, dtype=dtype)])["up"]
    assert torch.equal(statistics.gram, torch.full((IN, IN), 64.0))
    assert torch.equal(statistics.mean_abs, torch.full((IN,), 8.0))


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        (torch.bfloat16, "cpu", ("bf16", "none")),
        (torch.float16, "cpu", ("none", "none")),
        (torch.float32, "cpu", ("none", "none")),
        (torch.bfloat16, "cuda", ("none", "tf32")),
        (torch.float16, "cuda", ("none", "tf32")),
        (torch.float32, "cuda", ("none", "none")),
    ],
)
def test_products_are_left_to_matrix_units_only_where_these_lose_nothing(monkeypatch, dtype, device, expected):
    backends = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with exact_on_matrix_units(dtype, torch.device(device)):
        inside = tuple(backend.fp32_precision for backend in backends)
    assert inside == expected
    assert [backend.fp32_precision for backend in backends] == before


def test_only_counted_tokens_enter():
    layer = Layer()
    batches = [batch(2, 5, IN), batch(2, 4, IN, seed=1), batch(1, 3, IN, seed=2)]
    counted = [torch.rand(2, 5, generator=torch.Generator().manual_seed(0)) < 0.5, None, torch.zeros(1, 3).bool()]
    statistics = collect(layer, batches, counted)
    rows = torch.cat([batches[0][counted[0]], batches[1].reshape(-1, IN)])
    assert_statistics_of(statistics["up"], rows)
    assert_statistics_of(statistics["down"], torch.relu(layer.up(rows)).detach())


def test_inputs_that_a_layer_flattens_are_counted_by_the_same_mask():
    layer = Layer()
    x = batch(2, 5, IN)
    counted = torch.arange(10).reshape(2, 5) % 3 == 0
    assert_statistics_of(collect(layer, [x.reshape(10, IN)], [counted])["up"], x[counted])


def test_inputs_that_are_not_one_row_per_token_are_taken_whole():
    layer = Layer()
    x = batch(4, IN)
    assert_statistics_of(collect(layer, [x], [torch.zeros(2, 5).bool()])["up"], x)


def test_values_of_uncounted_tokens_do_not_matter_even_if_they_are_not_finite():
    x = batch(1, 5, IN)
    x[0, 2] = float("nan")
    counted = torch.tensor([[True, True, False, True, True]])
    assert_statistics_of(collect(Layer(), [x], [counted])["up"], x[counted])


def test_statistics_of_a_divided_input_are_those_of_the_input_divided():
    layer = Layer()
    x = batch(3, 5, IN)
    scale = torch.exp(batch(IN, seed=3))
    divided = collect(layer, [x])["up"].divided(scale)
    assert_statistics_of(divided, (x / scale).reshape(-1, IN))


@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 40), out=st.integers(1, 9))
def test_the_gram_matrix_tells_the_output_error_of_any_replacement_weight(seed, tokens, out):
    """‖X (Ŵ - W)ᵀ‖² / tokens = tr(D G Dᵀ), the identity that everything rests on."""
    x = batch(1, tokens, IN, seed=seed)
    gram = collect(Layer(), [x])["up"].gram.double()
    difference = batch(out, IN, seed=seed + 1).double()
    explicit = (x[0].double() @ difference.t()).square().sum() / tokens
    # Only G is computed in fp32. An entry is a sum of `tokens` products, then divided: its error is at most tokens + 1
    # roundings, each of half an ulp, of the sum of magnitudes (Higham, Accuracy and Stability, section 3.1). The terms
    # of tr(D G Dᵀ) may cancel, their errors do not: the bound is on magnitudes, not on the result.
    magnitudes = x[0].double().abs() @ difference.abs().t()
    roundings = (tokens + 1) * torch.finfo(torch.float32).eps / 2
    bound = roundings / (1 - roundings) * float(magnitudes.square().sum()) / tokens
    assert abs(float((difference @ gram @ difference.t()).trace() - explicit)) <= bound


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_reported_with_the_name_of_the_layer(value):
    x = batch(1, 5, IN)
    x[0, 3, 1] = value
    with pytest.raises(NumericalError, match=r"The input of layers\.0\.up holds NaN or infinite values.*bfloat16"):
        collect(Layer(), [batch(1, 5, IN), x])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20])
def test_the_sequence_with_the_bad_value_is_named(value):
    """1e20 is finite, its square is not. The mask leaves out the token before it, so rows are not tokens."""
    layer, x = Layer(), batch(3, 5, IN)
    x[2, 3, 1] = value
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[2, 2] = counted[0, 0] = False
    for mask in (None, counted):
        collector = StatisticsCollector({"up": layer.up}, torch.device("cpu"))
        with collector.collecting(), torch.no_grad():
            for index in (0, 1, 2):
                collector.set_counted_tokens(mask, [4 + 3 * index, 5 + 3 * index, 6 + 3 * index])
                layer(batch(3, 5, IN) if index == 0 else x)
        with pytest.raises(NumericalError, match=r"layers\.0\.up .* first on calibration sequence 9 \(counted from 0"):
            collector.take("up", "layers.0")


def test_all_sequences_of_a_batch_are_named_where_rows_are_not_tokens():
    """As an expert's, which the router has sent a few of them."""
    collector = StatisticsCollector({"up": nn.Linear(IN, 3)}, torch.device("cpu"))
    with collector.collecting():
        collector.set_counted_tokens(None, [7, 8])
        collector.inputs["up"](torch.full((3, IN), torch.inf))
    with pytest.raises(NumericalError, match=r"one of the calibration sequences 7, 8 \(counted from 0"):
        collector.take("up", "layers.0")


def test_an_input_that_no_token_reached_is_reported_with_its_name():
    collector = StatisticsCollector({"up": nn.Linear(IN, 3)}, torch.device("cpu"))
    with pytest.raises(NumericalError, match=r"No calibration token reached layers\.7\.up; give more"):
        collector.take("up", "layers.7")


def hooks_of(layer: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in layer.modules())


def test_nothing_stays_hooked_and_nothing_is_collected_afterwards():
    layer = Layer()
    collector = StatisticsCollector({"up": layer.up}, torch.device("cpu"))
    with collector.collecting():
        layer(batch(1, 5, IN))
        assert hooks_of(layer) == 1
    assert hooks_of(layer) == 0
    layer(batch(1, 5, IN))
    assert collector.tokens["up"] == 5


def test_nothing_stays_hooked_when_the_layer_fails():
    layer = Layer()
    collector = StatisticsCollector({"up": layer.up, "down": layer.down}, torch.device("cpu"))
    with pytest.raises(RuntimeError), collector.collecting():
        layer(batch(1, 5, IN + 1))
    assert hooks_of(layer) == 0


def test_collecting_changes_neither_the_output_nor_what_needs_a_gradient():
    layer = Layer()
    x = batch(1, 5, IN).requires_grad_()
    expected = layer(x)
    collector = StatisticsCollector({"up": layer.up}, torch.device("cpu"))
    with collector.collecting():
        output = layer(x)
    assert torch.equal(output, expected)
    assert not any(tensor.requires_grad for tensor in collector.sums["up"])
