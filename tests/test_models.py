"""Checkpoints of transformers models: merged from disk, loaded with ``from_pretrained``, compared with float64."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

import isomerge_fast as imf
import oracle
from small_models import (
    BERT,
    CASES,
    CLIP,
    DELTA_BOUND,
    LLAMA_BF16,
    LLAMA_FP32,
    MAKERS,
    METHODS,
    SCALINGS,
    SPECTRAL,
    Case,
    Saved,
    assert_weights_equal_oracle,
    digests,
    distance,
    each_case_and_method,
    float64,
    judge,
    load,
    make_saved,
    outputs,
    rounded_once,
    tensors,
    tolerance,
    transformers,
    with_weights,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Saved]:
    """Each case's checkpoints, made once and never written to again."""
    return cache(lambda case: make_saved(case, tmp_path_factory.mktemp(str(case))))


@pytest.fixture(scope="module")
def merged(saved: Callable[[Case], Saved], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case, str], Path]:
    """Each case merged by each method at its scaling, made once."""

    def make(case: Case, method: str) -> Path:
        out = tmp_path_factory.mktemp(f"{case}-{method}") / "out"
        imf.merge(saved(case).config(out, method))
        return out

    return cache(make)


@pytest.fixture(scope="module")
def judged(saved: Callable[[Case], Saved]) -> Callable[[Case, str], dict[str, np.ndarray]]:
    """Each case's merged weights by the oracle, in float64."""
    return cache(lambda case, method: judge(saved(case), method, SCALINGS[method]))


# -------------------------------------------------------------------------------------------- every model, every method


@each_case_and_method
def test_loads_with_nothing_missing(merged: Callable[[Case, str], Path], case: Case, method: str) -> None:
    model, info = load(case, merged(case, method))
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert {parameter.dtype for parameter in model.parameters()} == {case.dtype}
    if case.family == "llama-tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight


@each_case_and_method
def test_weights_equal_oracle(
    saved: Callable[[Case], Saved],
    merged: Callable[[Case, str], Path],
    judged: Callable[[Case, str], dict[str, np.ndarray]],
    case: Case,
    method: str,
) -> None:
    stored = tensors(merged(case, method))
    assert {tensor.dtype for tensor in stored.values()} == {case.dtype}  # from_pretrained would cast others unseen
    assert_weights_equal_oracle(stored, saved(case), judged(case, method), method, SCALINGS[method])


@each_case_and_method
def test_outputs_equal_oracle(
    saved: Callable[[Case], Saved],
    merged: Callable[[Case, str], Path],
    judged: Callable[[Case, str], dict[str, np.ndarray]],
    case: Case,
    method: str,
) -> None:
    """The tolerance is what the model itself makes of the error that its weights may have.

    Narrow dtypes: of rounding the oracle's weights once to the dtype. float32: of ``tolerance`` added to each of them,
    or taken from it, at random.
    """
    expected = judged(case, method)
    exact = {name: torch.from_numpy(value) for name, value in expected.items()}
    rounded = {name: rounded_once(value, case.dtype) for name, value in expected.items()}
    neighbours = rounded
    if case.dtype == torch.float32:
        base, experts = tensors(saved(case).base), [tensors(path) for path in saved(case).experts]
        random = np.random.default_rng(3)
        neighbours = {}
        for name, value in expected.items():
            start, ends = float64(base[name]), [float64(expert[name]) for expert in experts]
            limit = tolerance(name, start, ends, value, method, SCALINGS[method])
            neighbours[name] = torch.from_numpy(np.asarray(value + limit * random.choice([-1.0, 1.0], value.shape)))
    reference = outputs(case.family, with_weights(case, exact))
    allowed = distance(outputs(case.family, with_weights(case, neighbours)), reference)
    model, _ = load(case, merged(case, method))
    value = outputs(case.family, model)
    assert torch.isfinite(value).all()
    assert distance(value, outputs(case.family, with_weights(case, rounded))) <= allowed
    # That this can tell: the base's outputs are far off (measured: 34 times and more).
    assert distance(outputs(case.family, load(case, saved(case).base)[0]), reference) > 10 * allowed


@each_case_and_method
def test_laid_out_like_base(
    saved: Callable[[Case], Saved], merged: Callable[[Case, str], Path], case: Case, method: str
) -> None:
    base, out = saved(case).base, merged(case, method)
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert names == sorted(path.name for path in base.glob("*.safetensors"))
    assert (len(names) > 2) == case.sharded
    for name in names:
        with safe_open(out / name, "pt") as ours, safe_open(base / name, "pt") as theirs:
            assert list(ours.keys()) == list(theirs.keys())
            assert ours.metadata() == {"format": "pt"}
    index = "model.safetensors.index.json"
    assert (out / index).is_file() == case.sharded
    if case.sharded:
        ours, theirs = json.loads((out / index).read_text()), json.loads((base / index).read_text())
        assert ours["weight_map"] == theirs["weight_map"]
        assert ours["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(out).values())
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    if case.family == "llama-tied":
        assert "lm_head.weight" not in tensors(out)


# ------------------------------------------------------------------------------------------- inputs as people have them


def test_hub_cache_layout(saved: Callable[[Case], Saved], merged: Callable[[Case, str], Path], tmp_path: Path) -> None:
    """snapshots/<revision>/ holds links into blobs/, whose names are hashes; the output holds files."""
    checkpoints = saved(LLAMA_BF16)
    snapshots = []
    for source in (checkpoints.base, *checkpoints.experts):
        root = tmp_path / f"models--someone--{source.name}"
        snapshot = root / "snapshots" / hashlib.sha1(source.name.encode()).hexdigest()
        (root / "blobs").mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for file in source.iterdir():
            blob = hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, root / "blobs" / blob)
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob))
        snapshots.append(snapshot)
    linked = Saved(LLAMA_BF16, snapshots[0], tuple(snapshots[1:]))
    out = tmp_path / "out"
    imf.merge(linked.config(out))
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert digests(out) == digests(merged(LLAMA_BF16, "iso-cts"))
    assert (out / "generation_config.json").read_bytes() == (checkpoints.base / "generation_config.json").read_bytes()
    _, info = load(LLAMA_BF16, out)
    assert not info["missing_keys"]


@pytest.mark.parametrize("method", METHODS)
def test_integer_buffers_come_from_base(
    saved: Callable[[Case], Saved],
    judged: Callable[[Case, str], dict[str, np.ndarray]],
    tmp_path: Path,
    method: str,
) -> None:
    """Older BERTs carry position_ids in their files. transformers writes them no more, so they are put in by hand."""
    name = "bert.embeddings.position_ids"
    folders = []
    for index, source in enumerate((saved(BERT).base, *saved(BERT).experts)):
        folder = tmp_path / source.name
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
        buffers = {name: torch.arange(40)[None] + index, "bert.embeddings.seen": torch.arange(40) % 2 == index % 2}
        save_file({**tensors(source), **buffers}, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    checkpoints = Saved(BERT, folders[0], tuple(folders[1:]))
    imf.merge(checkpoints.config(tmp_path / "out", method))
    stored = tensors(tmp_path / "out")
    assert torch.equal(stored[name], torch.arange(40)[None])
    assert stored[name].dtype == torch.int64
    assert stored["bert.embeddings.seen"].dtype == torch.bool
    assert_weights_equal_oracle(stored, checkpoints, judged(BERT, method), method, SCALINGS[method])
    _, ours = load(BERT, tmp_path / "out")
    _, theirs = load(BERT, checkpoints.base)
    assert ours == theirs
    assert not ours["missing_keys"]


@pytest.mark.parametrize("method", METHODS)
def test_mixed_float_dtypes_are_kept(saved: Callable[[Case], Saved], tmp_path: Path, method: str) -> None:
    """A bf16 model with float32 norms, as mixed-precision training saves it."""
    folders = []
    for source in (saved(LLAMA_BF16).base, *saved(LLAMA_BF16).experts):
        folder = tmp_path / source.name
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
        kept = {name: value.float() if "norm" in name else value for name, value in tensors(source).items()}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    checkpoints = Saved(LLAMA_BF16, folders[0], tuple(folders[1:]))
    imf.merge(checkpoints.config(tmp_path / "out", method))
    stored = tensors(tmp_path / "out")
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    assert_weights_equal_oracle(
        stored, checkpoints, judge(checkpoints, method, SCALINGS[method]), method, SCALINGS[method]
    )


def test_bare_files(saved: Callable[[Case], Saved], merged: Callable[[Case, str], Path], tmp_path: Path) -> None:
    """Single files of any name, and no folder: the same merged tensors, in model.safetensors."""
    checkpoints = saved(LLAMA_FP32)
    files = []
    for source in (checkpoints.base, *checkpoints.experts):
        files.append(tmp_path / f"{source.name}.safetensors")
        save_file(tensors(source), files[-1], {"format": "pt"})
    out = tmp_path / "out"
    imf.merge(Saved(LLAMA_FP32, files[0], tuple(files[1:])).config(out))
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    expected = tensors(merged(LLAMA_FP32, "iso-cts"))
    stored = tensors(out)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)


# -------------------------------------------------------------------------------------------------- the output's folder


@pytest.mark.parametrize("method", ["iso-cts", "mean"])
@pytest.mark.parametrize("case", [LLAMA_FP32, CLIP], ids=str)
def test_bfloat16_from_float32(
    saved: Callable[[Case], Saved],
    judged: Callable[[Case, str], dict[str, np.ndarray]],
    tmp_path: Path,
    case: Case,
    method: str,
) -> None:
    checkpoints = saved(case)
    imf.merge(checkpoints.config(tmp_path / "out", method, dtype="bfloat16"))
    stored = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert_weights_equal_oracle(stored, checkpoints, judged(case, method), method, SCALINGS[method])
    config, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", checkpoints.base))
    assert before["dtype"] == "float32"
    assert config == {**before, "dtype": "bfloat16"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    model, info = load(case, tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert not info["missing_keys"]


def test_float32_from_bfloat16(
    saved: Callable[[Case], Saved], judged: Callable[[Case, str], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """Wider than the base; and config.json states it by the key that it has, here older libraries' torch_dtype."""
    base = tmp_path / "base"
    shutil.copytree(saved(LLAMA_BF16).base, base)
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))
    checkpoints = Saved(LLAMA_BF16, base, saved(LLAMA_BF16).experts)
    imf.merge(checkpoints.config(tmp_path / "out", dtype="float32"))
    stored = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert_weights_equal_oracle(stored, checkpoints, judged(LLAMA_BF16, "iso-cts"), "iso-cts", SCALINGS["iso-cts"])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, "torch_dtype": "float32"}
    assert load(LLAMA_BF16, tmp_path / "out")[0].dtype == torch.float32


COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "modeling_custom.py",
    "configuration_custom.py",
    "evaluation/results.py",
    "LICENSE",
)
LEFT_BEHIND = (
    "optimizer.pt",
    "scheduler.pt",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "training_args.bin",
    "trainer_state.json",
    "rng_state.pth",
    "flax_model.msgpack",
    ".gitattributes",
    ".git/config",
    ".git/hooks.py",
    "runs/events.out.tfevents.1",
    "checkpoint-10/config.json",
    "checkpoint-10/model.safetensors",
)
WRITTEN = ("config.json", "README.md", "manifest.json", "report.json")


def fill(folder: Path, names: Iterable[str], text: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}: {name}\n")


def test_small_files_are_copied_and_nothing_else(saved: Callable[[Case], Saved], tmp_path: Path) -> None:
    base, expert = tmp_path / "base", tmp_path / "expert"
    shutil.copytree(saved(LLAMA_FP32).base, base)
    shutil.copytree(saved(LLAMA_FP32).experts[0], expert)
    fill(base, (*COPIED, *LEFT_BEHIND), "of the base")
    fill(base, ["README.md"], "card of the base")
    fill(expert, (*COPIED, *LEFT_BEHIND, "README.md", "only_in_expert.py"), "of the expert")
    imf.merge({"base": base, "experts": [expert], "method": "mean", "out": tmp_path / "out"})
    out = tmp_path / "out"
    weights = {path.name for path in base.glob("model*.safetensors*")}
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == weights | {*COPIED, *WRITTEN}
    for name in COPIED:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert "card of the base" not in (out / "README.md").read_text()


def test_tokenizer_and_generation_work_from_output(saved: Callable[[Case], Saved], tmp_path: Path) -> None:
    """What a user does with a chat model: template, tokens, generate; all from the merged folder."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", "user", "assistant", "hello", "there"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"
    base = tmp_path / "base"
    shutil.copytree(saved(LLAMA_BF16).base, base)
    tokenizer.save_pretrained(base)
    transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None).save_pretrained(base)
    imf.merge(Saved(LLAMA_BF16, base, saved(LLAMA_BF16).experts).config(tmp_path / "out"))

    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "hello there"}]
    ids = loaded.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    assert ids.tolist() == [[words[word] for word in ["user", "hello", "there", "assistant"]]]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(ids).shape == (1, 4 + 3)


def test_model_card_says_how_it_was_made(saved: Callable[[Case], Saved], tmp_path: Path) -> None:
    checkpoints = saved(LLAMA_FP32)
    more = {
        "options": {"common_fraction": 0.7},
        "exclude": ["*embed_tokens*"],
        "overrides": [{"match": "*lm_head*", "method": "task-arithmetic"}],
        "dtype": "bfloat16",
    }
    imf.merge(checkpoints.config(tmp_path / "out", **more))
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (checkpoints.base, *checkpoints.experts, "iso-cts", "2502.04959", "0.7", imf.__version__):
        assert str(text) in card
    hub = pytest.importorskip("huggingface_hub")
    assert hub.ModelCard(card).data.to_dict() == {"library_name": "transformers", "tags": ["merge", "isomerge-fast"]}

    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["options"] == more["options"]
    imf.merge({**recipe, "out": tmp_path / "again"})
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_several_scalings_of_one_merge(
    saved: Callable[[Case], Saved], merged: Callable[[Case, str], Path], tmp_path: Path
) -> None:
    """Each is a checkpoint that loads; the one at a scaling is what a merge at that scaling alone gives."""
    alone = SCALINGS["iso-c"]
    imf.merge(saved(LLAMA_BF16).config(tmp_path / "out", "iso-c", scaling=[0.5, alone]))
    assert digests(tmp_path / "out" / f"scaling-{alone:g}") == digests(merged(LLAMA_BF16, "iso-c"))
    half = tmp_path / "out" / "scaling-0.5"
    expected = judge(saved(LLAMA_BF16), "iso-c", 0.5)
    assert_weights_equal_oracle(tensors(half), saved(LLAMA_BF16), expected, "iso-c", 0.5)
    assert not load(LLAMA_BF16, half)[1]["missing_keys"]


# ------------------------------------------------------------------------------------------- which tensors go which way


def changed_names(left: Path, right: Path) -> set[str]:
    ours, theirs = tensors(left), tensors(right)
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


def test_exclude_averages(saved: Callable[[Case], Saved], merged: Callable[[Case, str], Path], tmp_path: Path) -> None:
    """Excluded matrices are what the mean gives at the same scaling; no other byte changes."""
    out, scaling = tmp_path / "out", SCALINGS["iso-cts"]
    imf.merge(saved(LLAMA_FP32).config(out, exclude=["*lm_head*", "*.layers.1.mlp.*"]))
    names = {"lm_head.weight", *(f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))}
    assert changed_names(out, merged(LLAMA_FP32, "iso-cts")) == names
    mean = judge(saved(LLAMA_FP32), "mean", scaling)
    assert_some_equal_oracle(out, saved(LLAMA_FP32), {name: mean[name] for name in names}, "mean", scaling)


def assert_some_equal_oracle(
    out: Path, checkpoints: Saved, expected: dict[str, np.ndarray], method: str, scaling: float
) -> None:
    """As ``assert_weights_equal_oracle``, for the tensors of ``expected`` and no others."""
    stored = tensors(checkpoints.base) | {name: tensors(out)[name] for name in expected}
    assert_weights_equal_oracle(stored, checkpoints, expected, method, scaling)


def test_overrides_first_match_wins(
    saved: Callable[[Case], Saved], merged: Callable[[Case, str], Path], tmp_path: Path
) -> None:
    """Another method, or the same with other options; a pattern further down, or in ``exclude``, no longer counts."""
    out, scaling, checkpoints = tmp_path / "out", SCALINGS["iso-cts"], saved(LLAMA_FP32)
    overrides = [
        {"match": "*lm_head*", "method": "mean"},
        {"match": "*.layers.0.mlp.*", "method": "iso-cts", "options": {"common_fraction": 0.5}},
        {"match": "*.layers.0.*_proj*", "method": "iso-c"},
        {"match": "*norm*", "method": "task-arithmetic"},
        {"match": "*lm_head*", "method": "task-arithmetic"},
    ]
    imf.merge(checkpoints.config(out, overrides=overrides, exclude=["*lm_head*", "*.layers.0.mlp.*"]))
    names = set(tensors(out))
    mlp = {name for name in names if ".layers.0.mlp." in name}
    attention = {name for name in names if ".layers.0.self_attn." in name}
    norms = {name for name in names if "norm" in name}
    assert changed_names(out, merged(LLAMA_FP32, "iso-cts")) == {"lm_head.weight"} | mlp | attention | norms
    for method, chosen, options in (
        ("mean", {"lm_head.weight"}, {}),
        ("iso-cts", mlp, {"common_fraction": 0.5}),
        ("iso-c", attention, {}),
        ("task-arithmetic", norms, {}),
    ):
        expected = judge(checkpoints, method, scaling, **options)
        part = {name: expected[name] for name in chosen}
        assert_some_equal_oracle(out, checkpoints, part, method, scaling)


def test_override_of_text_projection_flattens_it(
    saved: Callable[[Case], Saved], merged: Callable[[Case, str], Path], tmp_path: Path
) -> None:
    """``*text_projection*`` is averaged as published, unless an override says otherwise; one that takes matrices only
    averages a bias."""
    out, name, scaling = tmp_path / "out", "text_projection.weight", SCALINGS["iso-c"]
    overrides = [{"match": "*text_projection*", "method": "iso-c"}, {"match": "*bias*", "method": "iso-c"}]
    imf.merge(saved(CLIP).config(out, "iso-c", overrides=overrides))
    assert changed_names(out, merged(CLIP, "iso-c")) == {name}
    base, experts = tensors(saved(CLIP).base)[name], [tensors(path)[name] for path in saved(CLIP).experts]
    merged_delta = oracle.iso_c([float64(expert) - float64(base) for expert in experts])
    value = float64(tensors(out)[name]) - float64(base)
    assert oracle.relative_error(value, scaling * merged_delta) <= DELTA_BOUND


# ----------------------------------------------------------------------------------------------------- models in memory


def live(case: Case, folders: Iterable[Path]) -> Iterator[dict[str, torch.Tensor]]:
    for folder in folders:
        yield load(case, folder)[0].state_dict()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CLIP, BERT], ids=str)
def test_state_dicts_of_live_models(
    saved: Callable[[Case], Saved],
    merged: Callable[[Case, str], Path],
    judged: Callable[[Case, str], dict[str, np.ndarray]],
    case: Case,
    method: str,
) -> None:
    """As the merge of the files; weights that share memory share it in the result; inputs stay as they were."""
    base, *experts = live(case, (saved(case).base, *saved(case).experts))
    copies = [{name: value.clone() for name, value in state.items()} for state in (base, *experts)]
    result = imf.merge_state_dicts(base, experts, method, SCALINGS[method])

    assert list(result) == list(base)
    from_files = tensors(merged(case, method))
    for name, value in from_files.items():
        assert result[name].dtype == value.dtype
        if method not in SPECTRAL:
            assert torch.equal(result[name], value), name
    stored = {name: result[name] for name in from_files}
    assert_weights_equal_oracle(stored, saved(case), judged(case, method), method, SCALINGS[method])

    for name in base:
        for other in base:
            shared = base[name].data_ptr() == base[other].data_ptr()
            assert (result[name].data_ptr() == result[other].data_ptr()) == shared, (name, other)
    if case.family in ("llama-tied", "bert"):
        assert len({value.data_ptr() for value in result.values()}) < len(result)
    assert not {value.data_ptr() for value in result.values()} & {value.data_ptr() for value in base.values()}
    for before, after in zip(copies, (base, *experts), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    MAKERS[case.family]().to(case.dtype).load_state_dict(result, strict=True)


def test_state_dicts_exclude_and_dtype(saved: Callable[[Case], Saved]) -> None:
    base, *experts = live(LLAMA_FP32, (saved(LLAMA_FP32).base, *saved(LLAMA_FP32).experts))
    result = imf.merge_state_dicts(base, experts, "iso-c", 0.7, exclude=["*lm_head*"], dtype=torch.bfloat16)
    assert {value.dtype for value in result.values()} == {torch.bfloat16}
    mean, spectral = (judge(saved(LLAMA_FP32), method, 0.7) for method in ("mean", "iso-c"))
    excluded = {"lm_head.weight": mean["lm_head.weight"]}
    del spectral["lm_head.weight"]
    for expected, method in ((excluded, "mean"), (spectral, "iso-c")):
        part = tensors(saved(LLAMA_FP32).base) | {name: result[name] for name in expected}
        assert_weights_equal_oracle(part, saved(LLAMA_FP32), expected, method, 0.7)
