"""Methods and solvers against the oracle, on tensors alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import isomerge_fast as imf
import oracle
from isomerge_fast.errors import ConfigError, InputError
from isomerge_fast.linalg.svd import FullSvd
from isomerge_fast.linalg.thin import flagged_qr, thin_qrs
from isomerge_fast.methods import METHODS, MemoryDeltas, TensorSpec, as_deltas, make_method
from isomerge_fast.methods.iso_cts import split_rank
from isomerge_kernels import devices
from isomerge_kernels.devices import DeviceTraits
from pretend_gpu import H100, pretend_gpu

# Errors promised for full-rank fp32 input; measured at most 4e-7 and 3e-13 on these cases.
DEFAULT_BOUND, REFERENCE_BOUND = 1e-5, 1e-9

SHAPES = {
    "square": (96, 96),
    "wide": (64, 160),
    "tall": (160, 64),
    "odd-wide": (63, 500),
    "odd-tall": (500, 63),
    "very-wide": (24, 2100),
    "very-tall": (2100, 24),
    "few-directions": (20, 30),
}


def make_deltas(rows: int, columns: int, tasks: int, *, seed: int = 0, common: float = 2.0) -> list[torch.Tensor]:
    """Full-rank deltas with a strong shared low-rank part, as fine-tuning gives."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, min(rows, columns) // 8)
    shared = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return [0.01 * (torch.randn(rows, columns, generator=generator) + common * shared) for _ in range(tasks)]


def numpy(deltas: list[torch.Tensor]) -> list[np.ndarray]:
    return [delta.double().numpy() for delta in deltas]


@pytest.mark.parametrize("precision", ["default", "reference"])
@pytest.mark.parametrize("tasks", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
def test_equals_oracle(method: str, shape: tuple[int, int], tasks: int, precision: str) -> None:
    deltas = make_deltas(*shape, tasks)
    function = {"iso-c": imf.iso_c, "iso-cts": imf.iso_cts}[method]
    expected = {"iso-c": oracle.iso_c, "iso-cts": oracle.iso_cts}[method](numpy(deltas))
    value = function(deltas, precision=precision)
    assert value.dtype == torch.float32
    assert value.shape == shape
    assert oracle.relative_error(value.numpy(), expected) <= DEFAULT_BOUND
    if precision == "reference":
        value, _ = make_method(method, {"precision": precision}).merge(as_deltas(deltas))
        assert oracle.relative_error(value.numpy(), expected) <= REFERENCE_BOUND


@pytest.mark.parametrize("seed", range(5))
def test_square_768_equals_oracle(seed: int) -> None:
    """The size and conditioning of a real attention projection: κ(S) here is 1e4 to 1e5."""
    deltas = make_deltas(768, 768, 4, seed=seed)
    assert oracle.relative_error(imf.iso_cts(deltas).numpy(), oracle.iso_cts(numpy(deltas))) <= DEFAULT_BOUND
    assert oracle.relative_error(imf.iso_c(deltas).numpy(), oracle.iso_c(numpy(deltas))) <= DEFAULT_BOUND


@pytest.mark.parametrize("seed", [6, 34, 44, 90])
def test_nearly_singular_task_bases_equal_oracle(seed: int) -> None:
    """The worst of 100 draws of pure noise: [V_1 … V_T, V_k] has singular values down to 2e-5."""
    random = np.random.default_rng(seed)
    base = random.standard_normal((96, 96)).astype(np.float32) * 0.15
    experts = [(base + 0.03 * random.standard_normal((96, 96))).astype(np.float32) for _ in range(4)]
    deltas = [torch.from_numpy(expert - base) for expert in experts]
    assert oracle.relative_error(imf.iso_cts(deltas).numpy(), oracle.iso_cts(numpy(deltas))) <= 1e-6


@pytest.mark.parametrize("common_fraction", [0.0, 0.2, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64)], ids=["square", "wide", "tall"])
def test_common_fraction_equals_oracle(shape: tuple[int, int], common_fraction: float) -> None:
    deltas = make_deltas(*shape, 4)
    value = imf.iso_cts(deltas, common_fraction)
    assert oracle.relative_error(value.numpy(), oracle.iso_cts(numpy(deltas), common_fraction)) <= DEFAULT_BOUND


@pytest.mark.parametrize(
    ("min_dim", "tasks", "fraction", "expected"),
    [
        (768, 8, 0.8, (616, 19)),
        (768, 20, 0.8, (608, 8)),
        (10, 4, 0.8, (10, 0)),
        (5, 2, 0.8, (5, 0)),
        (15, 2, 0.8, (11, 2)),
    ],
)
def test_split_rank_rounds_as_published(min_dim: int, tasks: int, fraction: float, expected: tuple[int, int]) -> None:
    assert split_rank(min_dim, tasks, fraction) == expected == oracle.split_rank(min_dim, tasks, fraction)


def test_negative_k_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"k = -8 common directions of 512 with 20 tasks"):
        split_rank(512, 20, 0.0)
    with pytest.raises(ConfigError, match="larger common_fraction"):
        imf.iso_cts(make_deltas(6, 9, 4), 0.0)


def test_too_few_directions_is_iso_c() -> None:
    deltas = make_deltas(20, 30, 20)
    assert split_rank(20, 20, 0.8) == (20, 0)
    assert torch.equal(imf.iso_cts(deltas), imf.iso_c(deltas))


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1)], ids=str)
def test_single_direction(shape: tuple[int, int]) -> None:
    deltas = make_deltas(*shape, 3)
    total = np.sum(numpy(deltas), axis=0)
    for function in (imf.iso_c, imf.iso_cts):
        assert oracle.relative_error(function(deltas).numpy(), total) <= DEFAULT_BOUND


def test_single_task_keeps_the_subspaces() -> None:
    """T = 1: every direction of the one delta is kept, so Iso-CTS is Iso-C."""
    deltas = make_deltas(64, 96, 1)
    assert oracle.relative_error(imf.iso_cts(deltas).numpy(), imf.iso_c(deltas).double().numpy()) <= DEFAULT_BOUND


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)], ids=["wide", "tall"])
@pytest.mark.parametrize("function", [imf.iso_c, imf.iso_cts], ids=["iso-c", "iso-cts"])
class TestDegenerate:
    """Where the published formula is not a function: finite, in range, deterministic."""

    def test_zero_sum(self, function, shape: tuple[int, int]) -> None:
        assert not function(torch.zeros(3, *shape)).any()
        delta = make_deltas(*shape, 1)[0]
        assert not function([delta, -delta]).any()

    def test_one_zero_delta(self, function, shape: tuple[int, int]) -> None:
        deltas = make_deltas(*shape, 3)
        value = function([*deltas, torch.zeros(shape)])
        assert torch.isfinite(value).all()
        assert value.norm() > 0
        if function is imf.iso_c:  # a zero adds nothing to the sum
            assert oracle.relative_error(value.numpy(), oracle.iso_c(numpy(deltas))) <= DEFAULT_BOUND
        assert torch.equal(value, function([*deltas, torch.zeros(shape)]))

    def test_low_rank_stays_in_range(self, function, shape: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        deltas = [
            torch.randn(shape[0], 4, generator=generator) @ torch.randn(4, shape[1], generator=generator)
            for _ in range(3)
        ]
        value = function(deltas).double().numpy()
        assert oracle.relative_error(value, oracle.iso_c(numpy(deltas), rank_tolerance=1e-5)) <= DEFAULT_BOUND
        sigma = np.linalg.svd(value, compute_uv=False)
        assert (sigma > 1e-5 * sigma[0]).sum() == 12
        assert sigma[:12] == pytest.approx(sigma[0], rel=1e-5)

    def test_min_dim_policy_divides_by_min_dim(self, function, shape: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        delta = torch.randn(shape[0], 4, generator=generator) @ torch.randn(4, shape[1], generator=generator)
        in_range, by_min_dim = function([delta]), function([delta], rank_policy="min-dim")
        assert oracle.relative_error(by_min_dim.numpy() * 64 / 4, in_range.double().numpy()) <= DEFAULT_BOUND

    def test_equal_deltas(self, function, shape: tuple[int, int]) -> None:
        delta = make_deltas(*shape, 1)[0]
        value = function([delta, delta.clone(), delta.clone()])
        assert torch.isfinite(value).all()
        singular = torch.linalg.svdvals(value.double())
        kept = singular > 1e-4 * singular[0]
        assert singular[kept] == pytest.approx(singular[0].item(), rel=1e-4)

    def test_not_finite_is_refused(self, function, shape: tuple[int, int]) -> None:
        deltas = make_deltas(*shape, 3)
        deltas[1][2, 3] = float("nan")
        with pytest.raises(ValueError, match=r"deltas\[1\] holds NaN or Inf"):
            function(deltas)


@pytest.mark.parametrize("function", [imf.iso_c, imf.iso_cts], ids=["iso-c", "iso-cts"])
class TestSizes:
    """What the arithmetic can hold is merged as if it were of size 1; all else is refused, with the sizes."""

    @pytest.mark.parametrize("scale", [2.0**-100, 2.0**-66, 2.0**66, 2.0**100, 2.0**118])
    def test_scale_changes_nothing_else(self, function, scale: float) -> None:
        deltas = make_deltas(48, 80, 3)
        value = function([delta * scale for delta in deltas])
        expected = {imf.iso_c: oracle.iso_c, imf.iso_cts: oracle.iso_cts}[function](numpy(deltas))
        assert oracle.relative_error(value.double().numpy() / scale, expected) <= DEFAULT_BOUND

    @pytest.mark.parametrize(
        ("value", "dtype", "message"),
        [
            (1.3e37, torch.float32, r"‖Δ‖ of the tasks is .*, 1.3e\+37, .*: the small ones are lost"),
            (1.3e37, torch.bfloat16, "the small ones are lost in what float32 rounds of the largest"),
            (1e10, torch.float32, "the small ones are lost in what float32 rounds of the largest"),
            (1e300, torch.float64, "‖Δ‖ of the tasks is .*inf.*: more than float64 holds the squares of"),
            (1e20, torch.float64, "the small ones are lost in what float64 rounds of the largest"),
        ],
    )
    def test_one_huge_entry(self, function, value: float, dtype: torch.dtype, message: str) -> None:
        deltas = [1e-3 * delta.to(dtype) for delta in make_deltas(48, 80, 3)]
        deltas[1][5, 7] = value
        with pytest.raises(ValueError, match=message):
            function(deltas)

    def test_what_is_small_and_no_damage_is_merged(self, function) -> None:
        """A tensor that one task left nearly as it was is an ordinary one."""
        deltas = make_deltas(48, 80, 3)
        tiny = torch.zeros(48, 80)
        tiny[3, 4] = 1e-20
        value = function([*deltas, tiny])
        if function is imf.iso_c:
            assert oracle.relative_error(value.numpy(), oracle.iso_c(numpy(deltas))) <= DEFAULT_BOUND

    @pytest.mark.parametrize("scale", [1e-200, 1e151])
    def test_out_of_range(self, function, scale: float) -> None:
        deltas = [scale * delta.double() for delta in make_deltas(48, 80, 3)]
        with pytest.raises(ValueError, match="out of the range of float64 arithmetic"):
            function(deltas)
        with pytest.raises(ValueError, match="out of the range of float32 arithmetic"):
            function([1.5e38 * delta / delta.norm() for delta in make_deltas(48, 80, 3)])

    def test_weights_are_numbers_of_the_dtype(self, function) -> None:
        with pytest.raises(imf.ConfigError, match=r"weight 1e\+300 is no finite number in float32"):
            function(make_deltas(4, 8, 2), weights=[1e300, 1.0])


def test_nothing_kept_of_a_delta_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a solver answers: rank 0 of the only delta that is not zero is an error."""
    real = FullSvd.polar
    monkeypatch.setattr(FullSvd, "polar", lambda self, x, tolerance, dtype: real(self, x * 0.0, dtype=dtype))
    method, delta = make_method("iso-c", {"precision": "reference"}), make_deltas(8, 12, 1)[0]
    with pytest.raises(ValueError, match="no direction of it is told from rounding"):
        method.merge(as_deltas([delta, torch.zeros(8, 12)]))
    assert not method.merge(as_deltas([delta, -delta]))[0].any()


@pytest.mark.parametrize("function", [imf.iso_c, imf.iso_cts], ids=["iso-c", "iso-cts"])
@pytest.mark.parametrize("shape", [(48, 80), (80, 48)], ids=["wide", "tall"])
def test_batch_equals_its_members(function, shape: tuple[int, int]) -> None:
    """[T, B, M, N]; one member is of low rank, so the batch mixes ranks."""
    members = [make_deltas(*shape, 4, seed=seed) for seed in range(2)]
    members.append([0.1 * delta[:, :3] @ delta[:3, :] for delta in make_deltas(*shape, 4, seed=2)])
    batched = torch.stack([torch.stack(member) for member in members], dim=1)
    value = function(batched)
    assert value.shape == (3, *shape)
    for index, member in enumerate(members):
        assert oracle.relative_error(value[index].numpy(), function(member).double().numpy()) <= DEFAULT_BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [imf.iso_c, imf.iso_cts], ids=["iso-c", "iso-cts"])
def test_half_precision_is_computed_in_single(function, dtype: torch.dtype) -> None:
    deltas = [delta.to(dtype) for delta in make_deltas(64, 96, 4)]
    expected = {imf.iso_c: oracle.iso_c, imf.iso_cts: oracle.iso_cts}[function](numpy(deltas))
    value = function(deltas)
    assert value.dtype == torch.float32
    assert oracle.relative_error(value.numpy(), expected) <= DEFAULT_BOUND


@pytest.mark.parametrize("function", [imf.iso_c, imf.iso_cts], ids=["iso-c", "iso-cts"])
def test_double_precision_stays_double(function) -> None:
    deltas = [delta.double() for delta in make_deltas(64, 96, 4)]
    value = function(deltas)
    assert value.dtype == torch.float64
    expected = {imf.iso_c: oracle.iso_c, imf.iso_cts: oracle.iso_cts}[function](numpy(deltas))
    assert oracle.relative_error(value.numpy(), expected) <= 1e-11


def test_inputs_are_not_modified_and_may_be_strided() -> None:
    stack = torch.stack(make_deltas(96, 64, 3)).mT
    before = stack.clone()
    for function in (imf.iso_c, imf.iso_cts):
        value = function(stack)
        assert torch.equal(stack, before)
        assert torch.equal(value, function(list(before)))


def test_linear_methods() -> None:
    deltas = make_deltas(8, 9, 3)
    total = np.sum(numpy(deltas), axis=0)
    value, stats = make_method("task-arithmetic").merge(as_deltas(deltas))
    assert oracle.relative_error(value.numpy(), total) <= 1e-6
    assert stats.to_dict()["delta_norms"] == pytest.approx([np.linalg.norm(delta) for delta in numpy(deltas)])
    value, _ = make_method("mean").merge(as_deltas(deltas))
    assert oracle.relative_error(value.numpy(), total / 3) <= 1e-6


def test_evidence() -> None:
    """σ̄, rank, k, s and the gap are those of the full SVD."""
    deltas = make_deltas(64, 96, 4)
    _, stats = make_method("iso-cts").merge(as_deltas(deltas))
    sigma = np.linalg.svd(np.sum(numpy(deltas), axis=0), compute_uv=False)
    k, s = oracle.split_rank(64, 4, 0.8)
    evidence = stats.to_dict()
    assert (evidence["k"], evidence["s"], evidence["rank"]) == (k, s, 64)
    assert evidence["gap"] == pytest.approx((sigma[k - 1] - sigma[k]) / sigma[k - 1], rel=1e-4)
    assert evidence["orthogonality"] < 1e-6
    _, stats = make_method("iso-c").merge(as_deltas(deltas))
    assert stats.to_dict()["sigma_mean"] == pytest.approx(sigma.mean(), rel=1e-6)


def with_condition(x: torch.Tensor, condition: float) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    scales = torch.logspace(0, -np.log10(min(condition, 1e300)), min(x.shape[-2:]), dtype=torch.float64)
    return u @ (scales[:, None] * vh)


@pytest.mark.parametrize("condition", [1e0, 1e3, 1e5, 1e7, 3e7, 1e8, 1e9, 1e14, float("inf")])
@pytest.mark.parametrize("shape", [(200, 30), (30, 30), (10, 30), (2, 80, 12)], ids=str)
def test_thin_qr(shape: tuple[int, ...], condition: float) -> None:
    """Orthonormal and exact at every condition number, by whichever of its two ways; deficient input too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = with_condition(x, condition)
    q, r = thin_qrs(x)[0]
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    assert torch.linalg.matrix_norm(q.mT @ q - eye).max() <= 1e-13 * q.shape[-1]
    assert torch.linalg.matrix_norm(q @ r - x).max() <= 1e-14 * np.sqrt(x.numel()) * torch.linalg.matrix_norm(x).max()


@pytest.mark.parametrize("traits", [devices.CPU, H100], ids=["cpu", "h100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("condition", [1e0, 1e3, 1e7, 1e9, 1e11])
def test_flagged_qr(
    condition: float, dtype: torch.dtype, traits: DeviceTraits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orthonormal and exact to the rounding of its dtype, beside members that are zero and not finite."""
    monkeypatch.setitem(devices.KNOWN, torch.device("cpu"), traits)
    generator = torch.Generator().manual_seed(0)
    x = with_condition(torch.randn(4, 200, 30, generator=generator, dtype=torch.float64), condition).to(dtype)
    x[1] = 0.0
    if traits.is_gpu:
        monkeypatch.delattr(torch.linalg, "qr")  # Householder's is for the CPU
        x[2, 5, 5] = torch.inf
    q, r, missed = flagged_qr(x)
    assert missed.tolist() == [False, False, traits.is_gpu, False]
    assert q.dtype == r.dtype == dtype
    eye, eps = torch.eye(30, dtype=dtype), torch.finfo(dtype).eps
    assert torch.linalg.matrix_norm(q.mT @ q - eye).max() <= 30 * eps  # of what is missed too, which is finite
    there = [0, 1, 3]
    allowed = 30 * eps * torch.linalg.matrix_norm(x[there])
    assert (torch.linalg.matrix_norm(q[there] @ r[there] - x[there]) <= allowed).all()


def test_flagged_qr_says_what_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices.KNOWN, torch.device("cpu"), H100)
    x = torch.ones(2, 50, 6, dtype=torch.float64)
    x[0] = torch.eye(50, 6)
    q, r, missed = flagged_qr(x)
    assert missed.tolist() == [False, True]
    assert torch.equal(q[1], torch.eye(50, 6, dtype=torch.float64))
    assert r.isfinite().all()


def test_thin_qr_reads_once() -> None:
    with pretend_gpu() as gpu:
        x = gpu.upload(torch.randn(200, 30, dtype=torch.float64))
        gpu.reset()
        thin_qrs(x)
        assert gpu.read_count == 1


def test_several_thin_qrs_read_once_too() -> None:
    """One of which Cholesky cannot factor, one that is wide."""
    generator = torch.Generator().manual_seed(0)
    well, wide = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((200, 30), (5, 30)))
    ill = well[:, :10] @ torch.ones(10, 30, dtype=torch.float64)
    with pretend_gpu() as gpu:
        there = [gpu.upload(x) for x in (well, wide, ill)]
        gpu.reset()
        found = thin_qrs(*there)
        assert gpu.read_count == 1
        for x, (q, r) in zip(there, found, strict=True):
            torch.testing.assert_close(q @ r, x, rtol=0, atol=1e-10)
            unit = torch.eye(q.shape[-1], dtype=torch.float64, device=q.device)
            torch.testing.assert_close(q.mT @ q, unit, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "bad", [[], [torch.zeros(2, 3), torch.zeros(3, 2)], [torch.zeros(2, 3, dtype=torch.int64)], [torch.zeros(4)]]
)
def test_bad_deltas_are_refused(bad: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="deltas"):
        imf.iso_c(bad)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("iso-d", {}, "did you mean 'iso-c'"),
        ("iso-cts", {"common_fractoin": 0.8}, "did you mean 'common_fraction'"),
        ("iso-cts", {"common_fraction": 1.5}, "between 0 and 1"),
        ("iso-cts", {"common_fraction": "most"}, "is 'most'; expected a number"),
        ("iso-c", {"rank_policy": "rang"}, "did you mean 'range'"),
        ("mean", {"common_fraction": 0.8}, "it has none"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(name, options)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision"):
        imf.iso_c(make_deltas(4, 5, 2), precision="fastest")


@pytest.mark.parametrize("name", METHODS)
def test_methods_declare_themselves(name: str) -> None:
    method = make_method(name)
    spec = TensorSpec("w", (64, 96), torch.float32)
    assert method.accepts(spec)
    assert method.workspace_bytes(spec, 4, torch.device("cpu")) >= spec.bytes
    assert method.flops(spec, 4) > 0
    assert method.citation.startswith("arXiv ")


BACKENDS: Any = torch.backends  # whose types do not tell of the settings below


def precision_settings() -> tuple[str, ...]:
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = "differs from the new settings"
    new = (BACKENDS, BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul)
    return (old, *(setting.fp32_precision for setting in new))


@pytest.mark.parametrize("setting", ["default", "old-high", "old-medium", "new-cuda", "new-general"])
@pytest.mark.parametrize("name", ["iso-c", "iso-cts"])
def test_the_callers_precision_settings_change_nothing_and_stay(
    name: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = as_deltas(make_deltas(96, 160, 3))
    method: Any = METHODS[name]
    expected, _ = method().merge(deltas)
    inside, attempt = [], method.attempt

    def watched(self, *arguments):
        # Reading it is what a cuBLAS product does first; it raises where old and new settings disagree.
        inside.append((BACKENDS.cuda.matmul.allow_tf32, *precision_settings()[2:]))
        return attempt(self, *arguments)

    monkeypatch.setattr(method, "attempt", watched)
    try:
        if setting.startswith("old"):
            torch.set_float32_matmul_precision(setting.removeprefix("old-"))
        elif setting == "new-cuda":
            BACKENDS.cuda.matmul.fp32_precision = "tf32"
        elif setting == "new-general":
            BACKENDS.fp32_precision = "tf32"
        before = precision_settings()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value, stats = method().merge(deltas)
        assert precision_settings() == before
    finally:
        BACKENDS.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        BACKENDS.cuda.matmul.fp32_precision = BACKENDS.mkldnn.matmul.fp32_precision = "none"
    assert inside
    assert all(not tf32 and {*new} <= {"none", "ieee"} for tf32, *new in inside)
    assert value.dtype == expected.dtype
    assert torch.equal(value, expected)
    assert not stats.missed()


@pytest.mark.parametrize("kind", ["full", "low-rank", "zero"])
@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64), (2, 64, 160), (600, 300)], ids=str)
def test_every_tensor_is_made_on_the_device_of_the_deltas(shape: tuple[int, ...], kind: str) -> None:
    """What forgets to name its device lands on the default one, here a device without data: as on a GPU, it fails."""
    generator = torch.Generator().manual_seed(0)
    if kind == "full":
        deltas = [torch.randn(shape, generator=generator) for _ in range(3)]
    elif kind == "low-rank":
        left = [torch.randn(*shape[:-1], 4, generator=generator) for _ in range(3)]
        deltas = [u @ torch.randn(*shape[:-2], 4, shape[-1], generator=generator) for u in left]
    else:
        deltas = [torch.zeros(shape) for _ in range(3)]
    with torch.device("meta"):
        for name in METHODS:
            for precision in ("fast", "default", "reference") if name.startswith("iso") else (None,):
                method = make_method(name, {} if precision is None else {"precision": precision})
                value, stats = method.merge(as_deltas(deltas))
                assert value.device.type == "cpu"
                stats.to_dict()


@pytest.mark.parametrize(
    ("given", "how", "message"),
    [
        ([], {}, "deltas is empty"),
        ([torch.ones(())] * 2, {}, "deltas are single numbers"),
        ([torch.ones(2, 3), torch.ones(2, 4)], {}, r"deltas\[1\] has shape \[2, 4\], deltas\[0\] has \[2, 3\]"),
        (
            [torch.ones(2, 3)],
            {"base": torch.ones(1, 3)},
            r"the base is \[1, 3\] on cpu, deltas\[0\] is \[2, 3\] on cpu",
        ),
        ([torch.ones(2, 3)] * 2, {"weights": [1.0]}, "1 weights for 2 deltas"),
        ([torch.ones(2, 3, dtype=torch.int32)], {}, r"deltas\[0\] is torch.int32"),
    ],
)
def test_a_source_is_of_tensors_that_fit_each_other(
    given: list[torch.Tensor], how: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        MemoryDeltas(given, **how)


@pytest.mark.parametrize("block_rows", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("weights", [None, [0.3, -1.7]])
def test_a_source_gives_the_same_whatever_its_blocks(block_rows: int | None, weights: list[float] | None) -> None:
    base, *experts = [torch.randn(13, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    source = MemoryDeltas(experts, base, weights=weights, block_rows=block_rows)
    source.wants_largest = True
    deltas = [(w * (e - base)) for w, e in zip(weights or [1.0, 1.0], experts, strict=True)]
    found = source.sum(torch.float64)
    torch.testing.assert_close(found.total, sum(delta.double() for delta in deltas))
    squares = torch.stack([delta.double().square().sum() for delta in deltas])
    torch.testing.assert_close(found.squares, squares, rtol=1e-6, atol=0)  # made in float32
    assert found.largest is not None
    torch.testing.assert_close(found.largest, torch.stack([delta.abs().max().double() for delta in deltas]))
    assert all(torch.equal(source.delta(task), delta) for task, delta in enumerate(deltas))
    empty = MemoryDeltas([torch.ones(0, 5)], block_rows=block_rows).sum(torch.float64)
    assert (tuple(empty.total.shape), empty.squares.tolist()) == ((0, 5), [0.0])


def test_a_batch_of_nothing() -> None:
    for merge in (imf.iso_c, imf.iso_cts):
        assert merge([torch.ones(0, 50, 30)] * 2).shape == (0, 50, 30)
