"""Every kernel against a reference: the products by packed weights, error feedback, gram matrices, losses in blocks.

The reference of the products is in fp64, with weights that tests/references unpacks independently of the package. That
of error feedback is the package's own path in torch, on the CPU.
"""

from __future__ import annotations

import torch
from references.awq_reader import dequantize_linear
from torch import Tensor, nn

from hf_awq_offload import AwqLinear, ConfigError
from hf_awq_offload.calibration.statistics_collector import StatisticsCollector
from hf_awq_offload.formats.awq import PackedWeight
from hf_awq_offload.formats.grid import Grid
from hf_awq_offload.search.loss import row_mse
from hf_awq_offload.search.rounding import feedback_order, round_weight

from .recorder import Recorder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BACKENDS = ("triton", "tinygemm", "torch")
ROWS, FEW_ROWS = (1, 2, 5, 16, 17, 33, 64, 65, 255, 256, 300), (1, 33, 300)
"""All of them for the first shape; compiling a kernel for each of the others would take minutes."""
SHAPES = ((256, 512, 128), (264, 768, 32), (1000, 640, 64), (512, 480, 48), (8, 128, 16), (1024, 640, 640))
LARGE_SHAPES = ((4096, 4096, 128), (1024, 11008, 128))
"""Output channels, input channels, group size."""


def run(recorder: Recorder) -> None:
    torch.manual_seed(0)
    with recorder.attempt("error feedback"):
        _error_feedback(recorder)
    with recorder.attempt("gram matrices"):
        _gram(recorder)
    with recorder.attempt("losses in blocks"):
        _losses(recorder)
    products = _Products(recorder)
    shapes = SHAPES[:1] + LARGE_SHAPES + SHAPES[1:]
    for shape in (SHAPES[0], SHAPES[3]) if recorder.is_small else shapes:
        with recorder.attempt(f"products, {shape[1]} to {shape[0]} in groups of {shape[2]}"):
            recorder.require_seconds(8)
            products.of_shape(*shape, rows=ROWS if shape == SHAPES[0] and not recorder.is_small else FEW_ROWS)
    products.report()


def random_packed(out_features: int, in_features: int, group_size: int) -> PackedWeight:
    """Returns a random weight on the device; all codes and zero points occur."""
    groups = in_features // group_size

    def words(rows: int) -> Tensor:
        drawn = torch.randint(-(2**31), 2**31, (rows, out_features // 8), dtype=torch.int64)
        return drawn.to(torch.int32).to("cuda")

    scales = (torch.rand(groups, out_features) / 100 + 0.001).half().to("cuda")
    return PackedWeight(words(in_features), words(groups), scales)


def linear_of(packed: PackedWeight, group_size: int, dtype: torch.dtype, backend: str) -> AwqLinear:
    linear = AwqLinear.from_packed(packed, None, Grid(4, group_size, True), dtype)
    linear.backend = backend
    return linear


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns ‖actual - expected‖ / ‖expected‖; NaN where something is not finite."""
    return float((actual.double() - expected).norm() / expected.norm())


def bound(dtype: torch.dtype, terms: int) -> float:
    """Returns how far a right result can be off, see assert_close in tests/ops/test_behaviour.py."""
    eps = torch.finfo(dtype).eps
    return terms**0.5 * eps / 2 if dtype == torch.float32 else eps


class _Products:
    """Compares the backends, and remembers the largest error of each in each dtype."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.largest: dict[str, float] = {}
        self.cases = 0
        self.refused: set[str] = set()

    def of_shape(self, out_features: int, in_features: int, group_size: int, rows: tuple[int, ...]) -> None:
        packed = random_packed(out_features, in_features, group_size)
        weight = torch.from_numpy(dequantize_linear(*(tensor.cpu().numpy() for tensor in packed))).cuda()
        for backend in BACKENDS:
            for name, dtype in DTYPES.items():
                what = f"{backend}, {name}, {in_features} to {out_features} in groups of {group_size}"
                with self.recorder.attempt(what):
                    linear = linear_of(PackedWeight(*(tensor.clone() for tensor in packed)), group_size, dtype, backend)
                    self._of_linear(linear, weight, rows, f"{backend}_{name}", what)

    def _of_linear(self, linear: AwqLinear, weight: Tensor, rows: tuple[int, ...], key: str, what: str) -> None:
        dtype = linear.dtype
        exact = weight.double()
        try:
            linear(torch.zeros(1, linear.in_features, dtype=dtype, device="cuda"))
        except ConfigError as error:
            self.refused.add(f"{what}: {error}")
            return
        if not torch.equal(linear.weight.float(), weight.to(linear.weight.dtype).float()):
            self.recorder.failure(f"dequantizing, {what}", "it is not the reference rounded once")
        for count in rows:
            x = torch.randn(count, linear.in_features, device="cuda").to(dtype).requires_grad_()
            inputs = {"": x, " strided": x.detach().t().contiguous().t()} if count in (5, 33) else {"": x}
            for kind, given in inputs.items():
                product = linear(given)
                error = relative_error(product, given.detach().double() @ exact.t())
                self._note(key, error, bound(dtype, linear.in_features), f"{count}{kind} rows, {what}")
                if not kind and count in (1, 300):
                    upstream = torch.randn_like(product)
                    (gradient,) = torch.autograd.grad(product, given, upstream)
                    error = relative_error(gradient, upstream.double() @ exact)
                    self._note(key, error, bound(dtype, linear.out_features), f"gradient of {count} rows, {what}")

    def _note(self, key: str, error: float, most: float, what: str) -> None:
        self.cases += 1
        self.largest[key] = max(self.largest.get(key, 0.0), error)
        if not error < most:
            self.recorder.failure(what, f"relative error {error:.2e}, expected less than {most:.2e}")

    def report(self) -> None:
        for key, error in self.largest.items():
            self.recorder.figure(f"kernels.{key}_error", error)
        self.recorder.details("products", compared=self.cases, refused=sorted(self.refused))


def _correlated(channels: int, tokens: int) -> Tensor:
    """Returns inputs (tokens, channels) fp32 on the device, some channels louder than others."""
    mixed = torch.randn(channels, channels, device="cuda") * 0.3 / channels**0.5
    x = torch.randn(tokens, channels, device="cuda")
    return (x + x @ mixed) * torch.randn(channels, device="cuda").mul_(0.7).exp_()


def _error_feedback(recorder: Recorder) -> None:
    """The Triton kernel and the loop in torch round alike. A tie may fall the other way, and later codes with it."""
    alike, ratios = [], []
    for out_features, in_features, grid in (
        (150, 256, Grid(4, 128, True)),
        (72, 256, Grid(3, 64, False)),
        *(() if recorder.is_small else ((1000, 1024, Grid(4, 128, True)), (520, 1408, Grid(8, 1408, True)))),
    ):
        weight = torch.randn(out_features, in_features, device="cuda") * 0.05
        x = _correlated(in_features, 2 * in_features)
        gram = x.t() @ x / len(x)
        order = feedback_order(gram)
        ours = round_weight(weight, gram, grid, order=order)
        on_cpu = type(order)(*(part.cpu() for part in order))
        theirs = round_weight(weight.cpu(), gram.cpu(), grid, order=on_cpu)
        alike.append(float((ours.codes.cpu() == theirs.codes).float().mean()))
        ratios.append(float(ours.mse.sum()) / float(theirs.mse.sum()))
        nearest = round_weight(weight, gram, grid)
        what = f"error feedback, {in_features} to {out_features}, {grid}"
        recorder.check(what, bool((ours.mse <= nearest.mse * 1.0001).all()), "rows are worse than rounded to nearest")
        recorder.check(what, alike[-1] > 0.98, f"only {alike[-1]:.2%} of the codes are those of the CPU")
        recorder.check(what, abs(ratios[-1] - 1) < 0.01, f"its error is {ratios[-1]:.4f} of that on the CPU")
    recorder.figure("kernels.feedback_codes", min(alike))
    recorder.figure("kernels.feedback_error", max(ratios, key=lambda ratio: abs(ratio - 1)))


def _gram(recorder: Recorder) -> None:
    """What the hooks add up, in whatever precision the device's products have, is XᵀX in fp32."""
    for name, dtype in DTYPES.items():
        width, tokens = (192, 600) if recorder.is_small else (1536, 8192)
        linear = nn.Linear(width, 8, bias=False, device="cuda", dtype=dtype)
        x = _correlated(width, tokens).to(dtype)
        collector = StatisticsCollector({"linear": linear}, torch.device("cuda", 0))
        with collector.collecting(), torch.no_grad():
            for part in x.split(tokens // 3):
                linear(part[None])
        found = collector.take("linear", "layer")
        exact = x.double().t() @ x.double() / len(x)
        error = relative_error(found.gram, exact)
        # Matrix units add eight products at a time, and cut off instead of rounding: all errors have the same sign.
        eps = torch.finfo(torch.float32).eps
        most = bound(torch.float32, tokens) if dtype == torch.float32 else max(tokens / 8, tokens**0.5) * eps
        recorder.check(f"gram matrix, {name}", error < most, f"relative error {error:.2e}, expected below {most:.2e}")
        absolute = relative_error(found.mean_abs, x.double().abs().mean(0))
        recorder.check(
            f"mean magnitudes, {name}", absolute < bound(torch.float32, tokens), f"relative error {absolute:.2e}"
        )
        if name == "bf16":
            recorder.figure("kernels.gram_error", error)


def _losses(recorder: Recorder) -> None:
    """D G Dᵀ in blocks of columns; widths that fill no block, too."""
    for rows, width in ((40, 200), (64, 700)) if recorder.is_small else ((300, 4096), (4096, 1100)):
        x = _correlated(width, 2 * width)
        gram = (x.t() @ x / len(x)).double()
        gram = ((gram + gram.t()) / 2).float()
        difference = torch.randn(rows, width, device="cuda") * 0.01
        wide = difference.double()
        exact = ((wide @ gram.double()) * wide).sum(dim=1)
        error = relative_error(row_mse(difference, gram), exact)
        most = bound(torch.float32, width)
        why = f"relative error {error:.2e}, expected below {most:.2e}"
        recorder.check(f"losses, {rows} × {width}", error < most, why)
