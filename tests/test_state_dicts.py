"""Tensors and state dicts as they come: arrays, other dtypes and layouts, torch's modes, meta tensors, files."""

from __future__ import annotations

import contextlib
import copy
import runpy
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fused_passes import fused_passes
from torch import Tensor

import isomerge_fast as imf
import oracle
from allocation import peak_bytes
from checkpoints import load_folder, make_base, make_expert, make_family, save_folder
from isomerge_fast import functional
from isomerge_fast.checkpoint.io.reader import Reader
from isomerge_fast.execution import memory_inputs

ROOT = Path(__file__).resolve().parents[1]
CALLS: dict[str, Callable[..., Tensor]] = {"iso-c": imf.iso_c, "iso-cts": imf.iso_cts}
TASKS, SHAPE = 3, (20, 32)


def make_deltas(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(5)
    shape = (TASKS, *SHAPE)
    return list(torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype).unbind())


def expected(method: str, deltas: list[Tensor], weights: list[float] | None = None) -> np.ndarray:
    arrays = [delta.double().numpy() for delta in deltas]
    arrays = [weight * array for weight, array in zip(weights or [1.0] * len(arrays), arrays, strict=True)]
    return {"iso-c": oracle.iso_c, "iso-cts": oracle.iso_cts}[method](arrays)


# -------------------------------------------------------------------------------------------------------- numpy arrays


def unaligned(array: np.ndarray) -> np.ndarray:
    """The same numbers at steps of an odd number of bytes."""
    record = np.zeros(array.shape, dtype=[("value", array.dtype), ("byte", "u1")])
    record["value"] = array
    return record["value"]


ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as-it-is": lambda array: array,
    "read-only": lambda array: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
    "fortran-order": np.asfortranarray,
    "negative-strides": lambda array: array[::-1, ::-1].copy()[::-1, ::-1],
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "unaligned": unaligned,
}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays(kind: str, dtype: str, recwarn: pytest.WarningsRecorder) -> None:
    arrays = [delta.numpy().astype(dtype) for delta in make_deltas()]
    tensors = [torch.from_numpy(array) for array in arrays]
    given = [ARRAYS[kind](array) for array in arrays]
    before = [array.tobytes() for array in given]
    merged = imf.iso_cts(given)
    assert merged.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert torch.equal(merged, imf.iso_cts(tensors))
    assert torch.equal(imf.iso_cts(np.stack(given)), merged)
    assert [array.tobytes() for array in given] == before
    assert not recwarn.list


def test_arrays_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = functional.MemoryDeltas

    def noted(given: list[torch.Tensor], **how: Any) -> Any:
        seen.extend(tensor.data_ptr() for tensor in given)
        return real(given, **how)

    monkeypatch.setattr(functional, "MemoryDeltas", noted)
    arrays = [np.asfortranarray(delta.numpy()) for delta in make_deltas()]
    arrays[1].setflags(write=False)
    imf.iso_c(arrays)
    assert seen == [array.ctypes.data for array in arrays]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: array.astype(object), r"deltas\[1\] is a numpy array of object"),
        (lambda array: array.astype(complex), r"deltas\[1\] is a numpy array of complex128"),
        (lambda array: array.astype(np.longdouble), r"deltas\[1\] is a numpy array of float128"),
        (lambda array: np.ma.array(array), r"deltas\[1\] is a masked array"),
        (lambda array: array.tolist(), r"deltas\[1\] is a list; expected a tensor or a numpy array"),
        (lambda array: array.astype(int), r"deltas\[1\] is torch.int64"),
        (lambda array: torch.tensor(array).to_sparse(), r"deltas\[1\] is torch.sparse_coo"),
        (lambda array: torch.tensor(array).to(torch.float8_e4m3fn), r"deltas\[1\] is torch.float8_e4m3fn"),
    ],
)
def test_what_holds_no_plain_numbers_is_named(change: Callable[[Any], Any], message: str) -> None:
    arrays: list[Any] = [delta.numpy() for delta in make_deltas()]
    arrays[1] = change(arrays[1])
    with pytest.raises(ValueError, match=message):
        imf.iso_c(arrays)
    base, experts = {"w": arrays[0]}, [{"w": arrays[0]}, {"w": arrays[1]}]
    with pytest.raises(imf.InputError, match=r"experts\[1\]: tensor 'w' is"):
        imf.merge_state_dicts(base, experts)


def test_complex_tensors_are_refused() -> None:
    state = {"w": torch.ones(3, dtype=torch.complex64)}
    with pytest.raises(imf.InputError, match=r"base: tensor 'w' is torch.complex64, which is not merged"):
        imf.merge_state_dicts(state, [state])


def test_state_dicts_of_arrays() -> None:
    base, experts = make_base(), [make_expert(make_base(), seed) for seed in range(TASKS)]
    merged = imf.merge_state_dicts(base, experts)
    arrays = [{name: tensor.numpy() for name, tensor in state.items()} for state in (base, *experts)]
    for state in arrays:
        state["logit_scale"] = state["logit_scale"][()]  # a number of numpy's own
    before = copy.deepcopy(arrays)
    again = imf.merge_state_dicts(arrays[0], arrays[1:])
    assert all(torch.equal(tensor, merged[name]) and isinstance(tensor, Tensor) for name, tensor in again.items())
    for state, was in zip(arrays, before, strict=True):
        assert all(np.array_equal(array, was[name]) for name, array in state.items())
    again["position_ids"] += 1
    assert np.array_equal(arrays[0]["position_ids"], before[0]["position_ids"])  # no memory is shared


# --------------------------------------------------------------------------------------------------- dtypes and layouts


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize(
    ("dtypes", "result", "bound"),
    [
        ([torch.float32] * 3, torch.float32, 1e-5),
        ([torch.bfloat16] * 3, torch.float32, 1e-5),
        ([torch.float16, torch.bfloat16, torch.float32], torch.float32, 1e-5),
        ([torch.bfloat16, torch.float64, torch.float32], torch.float64, 1e-11),
    ],
)
def test_dtypes_of_deltas(method: str, dtypes: list[torch.dtype], result: torch.dtype, bound: float) -> None:
    deltas = [delta.to(dtype) for delta, dtype in zip(make_deltas(), dtypes, strict=True)]
    merged = CALLS[method](deltas)
    assert merged.dtype == result
    assert oracle.relative_error(merged.numpy(), expected(method, deltas)) <= bound


def test_dtypes_of_state_dicts() -> None:
    """Each tensor keeps the base's dtype, or gets the one asked for, whatever the experts' are."""
    base = {"a": torch.ones(3), "b": torch.ones(3, dtype=torch.bfloat16), "n": torch.ones(3, dtype=torch.int32)}
    # 2^-30 is lost in float32 beside 1: of bf16 and float64 the delta is computed in float64, and rounded once.
    expert = {"a": torch.full((3,), 1.5, dtype=torch.float16), "b": torch.full((3,), 1 + 2.0**-30, dtype=torch.float64)}
    merged = imf.merge_state_dicts(base, [{**expert, "n": base["n"] + 5}], scaling=2.0**23)
    assert {name: tensor.dtype for name, tensor in merged.items()} == {
        "a": torch.float32,
        "b": torch.bfloat16,
        "n": torch.int32,
    }
    assert torch.equal(merged["a"], torch.full((3,), 1 + 2.0**22))
    assert torch.equal(merged["b"], torch.full((3,), 1 + 2.0**-7, dtype=torch.bfloat16))
    assert torch.equal(merged["n"], base["n"])
    half = imf.merge_state_dicts(base, [{**expert, "n": base["n"]}], dtype=torch.float16)
    assert {tensor.dtype for tensor in half.values()} == {torch.float16, torch.int32}


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "every-second": lambda tensor: tensor.repeat_interleave(2, dim=1)[:, ::2],
    "of-a-stack": lambda tensor: torch.stack([tensor, -tensor], dim=-1)[..., 0],
    "needs-gradient": lambda tensor: tensor.clone().requires_grad_(),
    "has-a-graph": lambda tensor: tensor.clone().requires_grad_() * 1.0,
    "parameter": lambda tensor: torch.nn.Parameter(tensor.clone()),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_and_graphs(kind: str) -> None:
    deltas = make_deltas()
    given = [LAYOUTS[kind](delta) for delta in deltas]
    merged = imf.iso_cts(given)
    assert torch.equal(merged, imf.iso_cts(deltas))
    state = imf.merge_state_dicts({"w": given[0]}, [{"w": tensor} for tensor in given[1:]], "iso-c")
    plain = imf.merge_state_dicts({"w": deltas[0]}, [{"w": tensor} for tensor in deltas[1:]], "iso-c")
    assert torch.equal(state["w"], plain["w"])
    for result in (merged, state["w"]):
        assert not result.requires_grad
        assert type(result) is Tensor
        assert result.is_contiguous()
    assert all(torch.equal(tensor, delta) for tensor, delta in zip(given, deltas, strict=True))


def test_expanded() -> None:
    """All rows of one: of rank one, and of one row of memory."""
    rows = [delta[:1] for delta in make_deltas()]
    given = [row.expand(SHAPE) for row in rows]
    assert oracle.relative_error(imf.iso_c(given).numpy(), expected_of_rank_one(rows)) <= 1e-5
    assert imf.merge_state_dicts({"w": given[0]}, [{"w": given[1]}], "mean")["w"].stride() == (SHAPE[1], 1)


def expected_of_rank_one(rows: list[Tensor]) -> np.ndarray:
    """The only singular value is its own mean."""
    return torch.stack(rows).double().sum(0).expand(SHAPE).numpy()


# ------------------------------------------------------------------------------------------------------- torch's modes


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no-grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default-float64": lambda: default_dtype(torch.float64),
    "default-bfloat16": lambda: default_dtype(torch.bfloat16),
    "default-meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_change_nothing(mode: str) -> None:
    deltas, arrays = make_deltas(), [delta.numpy() for delta in make_deltas()]
    base, experts = make_base(), [make_expert(make_base(), seed) for seed in range(TASKS)]
    plain = [call(deltas) for call in CALLS.values()]
    state = imf.merge_state_dicts(base, experts, "iso-cts", weights=[1, 2, 0.5])
    with MODES[mode]():
        inside = [call(deltas) for call in CALLS.values()]
        from_arrays = [call(arrays) for call in CALLS.values()]
        merged = imf.merge_state_dicts(base, experts, "iso-cts", weights=[1, 2, 0.5])
    for results in (inside, from_arrays):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results, plain, strict=True))
    assert all(torch.equal(merged[name], tensor) for name, tensor in state.items())


def test_tensors_of_inference_mode_are_taken_outside_of_it() -> None:
    with torch.inference_mode():
        deltas = [delta.clone() for delta in make_deltas()]
    assert deltas[0].is_inference()
    assert torch.equal(imf.iso_cts(deltas), imf.iso_cts(make_deltas()))
    merged = imf.merge_state_dicts({"w": deltas[0]}, [{"w": deltas[1]}])["w"]
    merged += 1  # a plain tensor


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("value", "changes", "message"),
    [
        (3.39e38, {"dtype": torch.bfloat16}, "640 merged weights overflow bfloat16 at scaling 1"),
        (1e5, {"dtype": torch.float16}, "640 merged weights overflow float16 at scaling 1"),
        (1e3, {"scaling": 1e38}, "merged weights overflow float32 at scaling 1e\\+38"),
        (3e38, {"method": "task-arithmetic"}, r"base or experts\[0, 1, 2\] are too far apart for float32"),
        (1.0, {"scaling": 1e300}, "tensor 'w': scaling 1e\\+300 is no finite number in float32"),
        (1.0, {"scaling": float("nan")}, "scaling is nan; expected a finite number"),
        (1.0, {"weights": [1e300, 1, 1]}, "tensor 'w': weight 1e\\+300 is no finite number in float32"),
        (1e20, {"method": "iso-c", "flipped": True}, "tensor 'w': ‖Δ‖ of the tasks is 1e\\+20"),
    ],
)
def test_what_the_dtypes_cannot_hold_is_an_error(value: float, changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"method": "mean", **changes}
    experts = [delta + value for delta in make_deltas()]
    if given.pop("flipped", False):
        experts = make_deltas()
        experts[0][2, 3] = value
    base = torch.full(SHAPE, -value) if value == 3e38 else torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=message):
        imf.merge_state_dicts({"w": base}, [{"w": expert} for expert in experts], **given)


# ---------------------------------------------------------------------------------------------------------------- meta


def to_meta(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in state.items()}


@pytest.mark.parametrize("method", CALLS)
def test_meta_deltas(method: str) -> None:
    call = CALLS[method]
    merged = call([delta.to("meta", torch.bfloat16) for delta in make_deltas()], weights=[1, 2, 3])
    assert (merged.device.type, merged.dtype, merged.shape) == ("meta", torch.float32, SHAPE)
    stack = torch.empty(TASKS, 2, *SHAPE, dtype=torch.float64, device="meta")
    assert (call(stack).dtype, call(stack).shape) == (torch.float64, (2, *SHAPE))
    for bad, message in (
        ([torch.empty(3, 4, device="meta"), torch.empty(4, 3, device="meta")], r"deltas\[1\] has shape \[4, 3\]"),
        ([torch.empty(3, device="meta")], r"deltas\[0\] has shape \[3\]; expected a matrix"),
        ([torch.empty(3, 4, dtype=torch.int64, device="meta")], r"deltas\[0\] is torch.int64, which is not merged"),
        ([torch.empty(3, 4), torch.empty(3, 4, device="meta")], r"deltas\[1\] is on meta, deltas\[0\] on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            call(bad)
    with pytest.raises(imf.ConfigError, match="common_fraction 0 leaves k = -2"):
        imf.iso_cts(torch.empty(4, 6, 9, device="meta"), 0.0)


def test_meta_state_dicts() -> None:
    base, experts = make_base(), [make_expert(make_base(), seed) for seed in range(2)]
    base["tied.weight"] = base["embed_tokens.weight"]
    for expert in experts:
        expert["tied.weight"] = expert["embed_tokens.weight"]
    meta = to_meta(base)
    meta["tied.weight"] = meta["embed_tokens.weight"]
    merged = imf.merge_state_dicts(meta, [to_meta(expert) for expert in experts], dtype=torch.bfloat16)
    real = imf.merge_state_dicts(base, experts, dtype=torch.bfloat16)
    assert [(n, t.shape, t.dtype) for n, t in merged.items()] == [(n, t.shape, t.dtype) for n, t in real.items()]
    assert {tensor.device.type for tensor in merged.values()} == {"meta"}
    assert merged["tied.weight"] is merged["embed_tokens.weight"]
    assert merged["layers.0.up.weight"] is not merged["layers.1.up.weight"]  # of one shape, both at address 0
    with pytest.raises(imf.InputError, match=r"experts\[1\]: tensor 'conv.weight' is a meta tensor, in the base num"):
        imf.merge_state_dicts(base, [experts[0], {**experts[1], "conv.weight": meta["conv.weight"]}])
    with pytest.raises(imf.InputError, match=r"experts\[0\]: tensor 'conv.weight' holds numbers, in the base a meta"):
        imf.merge_state_dicts(meta, [experts[0]])
    with pytest.raises(imf.ConfigError, match=r"'embed_tokens.weight' \[48, 16\]: common_fraction 0 leaves"):
        imf.merge_state_dicts(to_meta(base), [to_meta(experts[0])] * 10, common_fraction=0.0)


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("method", CALLS)
def test_weights(method: str) -> None:
    deltas, weights = make_deltas(), [0.5, -1.0, 2.0]
    before = [delta.clone() for delta in deltas]
    merged = CALLS[method](deltas, weights=weights)
    assert oracle.relative_error(merged.numpy(), expected(method, deltas, weights)) <= 1e-5
    base = {"w": torch.zeros(SHAPE), "b": torch.zeros(3)}
    experts = [{"w": delta, "b": torch.ones(3)} for delta in deltas]
    state = imf.merge_state_dicts(base, experts, method, weights=weights, scaling=2.0)
    assert torch.allclose(state["w"], 2 * merged, rtol=1e-5, atol=1e-6)
    assert torch.allclose(state["b"], torch.full((3,), 2 * sum(weights) / TASKS))
    assert all(torch.equal(delta, was) for delta, was in zip(deltas, before, strict=True))
    assert torch.equal(CALLS[method](deltas, weights=[1, 1, 1]), CALLS[method](deltas))
    wrong: list[tuple[Any, str]] = [
        ([1.0, 2.0], r"weights is \[1.0, 2.0\]; expected 3 numbers, one a task"),
        ([1.0, 2.0, float("nan")], r"weights\[2\] is nan; expected a finite number"),
        (2.0, "weights is 2.0; expected 3 numbers, one a task"),
    ]
    for bad, message in wrong:
        with pytest.raises(imf.ConfigError, match=message):
            CALLS[method](deltas, weights=bad)
        with pytest.raises(imf.ConfigError, match=message):
            imf.merge_state_dicts(base, experts, method, weights=bad)


# ------------------------------------------------------------------------------------------------------ read when asked


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(name, tensors that are alive with it) of every read."""
    seen: list[tuple[str, int]] = []
    alive: set[int] = set()
    real = Reader.read

    def counted(self: Reader, piece: Any) -> Tensor:
        tensor = real(self, piece)
        number = len(seen)
        alive.add(number)
        weakref.finalize(tensor, alive.discard, number)
        seen.append((piece.stored.name, len(alive)))
        return tensor

    monkeypatch.setattr(Reader, "read", counted)
    return seen


@pytest.mark.parametrize("shards", [1, 3])
def test_open_state_dict(tmp_path: Path, shards: int, reads: list[tuple[str, int]]) -> None:
    state = make_base(torch.bfloat16)
    folder = save_folder(tmp_path / "a", state, shards=shards)
    with imf.open_state_dict(folder) as opened:
        assert len(opened) == len(state)
        assert set(opened) == set(state)
        assert "conv.weight" in opened
        assert "other" not in opened
        meta = opened.meta()
        assert {name: (t.shape, t.dtype) for name, t in meta.items()} == {
            n: (t.shape, t.dtype) for n, t in state.items()
        }
        assert {tensor.device.type for tensor in meta.values()} == {"meta"}
        assert str(folder) in repr(opened)
        assert reads == []
        assert all(torch.equal(tensor, state[name]) for name, tensor in opened.items())
        first = opened["conv.weight"]
        first += 1  # the caller's own
        assert torch.equal(opened["conv.weight"], state["conv.weight"])
        with pytest.raises(KeyError, match="other"):
            opened["other"]
    with pytest.raises(imf.InputError, match=r"'conv.weight' is asked for after the files were closed"):
        opened["conv.weight"]
    with pytest.raises(imf.InputError, match="no such checkpoint"):
        imf.open_state_dict(tmp_path / "none")


def test_merge_of_opened_experts(tmp_path: Path, reads: list[tuple[str, int]]) -> None:
    """Checked without reading, read tensor by tensor, the numbers of loaded ones."""
    base, folders = make_family(tmp_path)
    experts = [imf.open_state_dict(folder) for folder in folders]
    shorter = load_folder(folders[0])
    shorter["conv.weight"] = shorter["conv.weight"][1:].clone()
    del shorter["logit_scale"]
    wrong = imf.open_state_dict(save_folder(tmp_path / "wrong", shorter))
    with pytest.raises(imf.InputError) as caught:
        imf.merge_state_dicts(load_folder(base), [*experts, wrong])
    for text in ("experts[3]: tensor 'logit_scale' of the base is missing", "'conv.weight' has shape [3, 3, 3, 3]"):
        assert text in str(caught.value)
    with pytest.raises(imf.InputError, match="holds numbers, in the base a meta tensor"):
        imf.merge_state_dicts(to_meta(load_folder(base)), experts)
    planned = imf.merge_state_dicts(imf.open_state_dict(base).meta(), [expert.meta() for expert in experts])
    assert reads == []
    merged = imf.merge_state_dicts(load_folder(base), experts, scaling=0.8)
    floats = [name for name, tensor in planned.items() if tensor.is_floating_point() and tensor.numel()]
    assert sorted(name for name, _ in reads) == sorted(floats * TASKS)  # once each, and nothing else
    assert max(alive for _, alive in reads) == TASKS  # of one tensor, in place of its deltas
    expected = imf.merge_state_dicts(load_folder(base), [load_folder(folder) for folder in folders], scaling=0.8)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    reads.clear()
    from_files = imf.merge_state_dicts(imf.open_state_dict(base), experts, scaling=0.8)
    assert len(reads) == len(from_files) + TASKS * len(floats)
    assert max(alive for _, alive in reads) == 1 + TASKS  # of one tensor
    assert all(torch.equal(from_files[name], tensor) for name, tensor in expected.items())
    assert len({tensor.data_ptr() for name, tensor in from_files.items() if name in floats}) == len(floats)


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    base, folders = make_family(tmp_path)
    expert = imf.open_state_dict(folders[0])
    save_folder(folders[0], make_expert(make_base(), 77))
    with pytest.raises(imf.InputError, match="changed since"):
        imf.merge_state_dicts(load_folder(base), [expert])


# ------------------------------------------------------------------------------------------------------ the fused pass


@pytest.mark.parametrize("method", ["iso-c", "iso-cts", "mean", "task-arithmetic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_does_not_grow_with_the_experts(method: str, dtype: torch.dtype) -> None:
    """No T deltas are held: five times as many experts take less than a single delta more."""
    generator = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(384, 384, generator=generator).to(dtype)} for _ in range(11)]
    peaks = [
        peak_bytes(lambda count=count: imf.merge_state_dicts(models[0], models[1 : 1 + count], method))[0]
        for count in (2, 2, 10)  # what is loaded and made at the first call stays
    ]
    assert peaks[2] - peaks[1] < 4 * 384 * 384


@pytest.mark.parametrize("method", ["iso-c", "iso-cts", "mean", "task-arithmetic"])
@pytest.mark.parametrize("weights", [None, [0.3, 0.7, 1.1]], ids=["plain", "weighted"])
def test_every_sum_is_one_pass_over_base_and_experts(
    method: str, weights: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base()
    experts = [make_expert(base, seed) for seed in range(3)]
    seen = fused_passes(monkeypatch)
    imf.merge_state_dicts(base, experts, method, weights=weights)
    merged = {name: tensor for name, tensor in base.items() if tensor.is_floating_point() and tensor.numel()}
    assert sorted(seen) == sorted((tuple(tensor.shape) or (1,), 3) for tensor in merged.values())


@pytest.mark.parametrize("method", ["iso-c", "iso-cts", "mean", "task-arithmetic"])
@pytest.mark.parametrize("weights", [None, [0.3, 0.7, 1.1]], ids=["plain", "weighted"])
def test_memory_and_files_give_the_same_bytes(tmp_path: Path, method: str, weights: list[float] | None) -> None:
    base, experts = make_family(tmp_path)
    config = {"base": str(base), "experts": [*map(str, experts)], "method": method, "scaling": 0.7}
    imf.merge({**config, "weights": weights, "out": str(tmp_path / "out")})
    written = load_folder(tmp_path / "out")
    states = [load_folder(folder) for folder in experts]
    merged = imf.merge_state_dicts(load_folder(base), states, method, 0.7, weights=weights)
    assert merged.keys() == written.keys()
    assert [name for name in merged if not torch.equal(merged[name], written[name])] == []


# ------------------------------------------------------------------------------------------------------------- example


def test_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "pytorch" / "merge.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "arrays give the same: True" in printed
    assert "read from files: the same: True" in printed
    assert "planned without numbers: 4 tensors" in printed


def test_buffers_that_come_and_go_are_the_bases() -> None:
    weights = {"w.weight": torch.randn(4, 4)}
    base = {
        **weights,
        "rotary_emb.inv_freq": torch.rand(2),
        "attn.bias": torch.ones(1, 1, 4, 4),
        "position_ids": torch.arange(4),
    }
    expert = {
        "w.weight": weights["w.weight"] + 1.0,
        "attn.bias": torch.ones(1, 1, 8, 8),
        "position_ids": torch.arange(9),
        "attn.masked_bias": torch.tensor(-1e9),
    }
    merged = imf.merge_state_dicts(base, [expert], method="mean", dtype="bfloat16")
    assert list(merged) == list(base)
    for name in base.keys() - weights.keys():
        assert torch.equal(merged[name], base[name])
        assert merged[name].data_ptr() != base[name].data_ptr()
    with pytest.raises(imf.InputError, match=r"tensor 'attn.bias' of the base is missing"):  # 1-D ones are trained
        imf.merge_state_dicts({**weights, "attn.bias": torch.ones(4)}, [weights])


def test_states_by_name_and_quantized_tensors_are_refused() -> None:
    state = {"w": torch.ones(2, 2)}
    with pytest.raises(imf.ConfigError) as caught:
        imf.merge_state_dicts(state, {"a": state, "b": state})  # type: ignore[arg-type]
    assert str(caught.value) == "experts maps names to state dicts; expected a list of them: list(experts.values())"
    packed = {"w": torch.quantize_per_tensor(state["w"], 0.1, 0, torch.qint8)}
    with pytest.raises(imf.InputError) as refused:
        imf.merge_state_dicts(packed, [packed])
    assert str(refused.value) == "base: tensor 'w' is torch.qint8, quantized; give tensor.dequantize()"


def test_one_prefix_is_tried_on_state_dicts_of_other_names() -> None:
    """Where the base has a name of one word, and every layer of the expert ends with it."""
    base = {"bias": 0, **{f"z{number}": 0 for number in range(3_000)}}
    expert = {f"layers.{number}.bias": 0 for number in range(3_001)}
    started = time.process_time()
    assert memory_inputs._prefix_of(expert, base) == ""
    assert time.process_time() - started < 0.5
    assert memory_inputs._prefix_of([f"a.b.{name}" for name in base], base) == "a.b."
    assert memory_inputs._prefix_of(base, [f"a.b.{name}" for name in base]) == ""
    assert memory_inputs._prefix_of([f"ab{name}" for name in base], base) == ""
