"""Whole GGUF files against convert_hf_to_gguf.py followed by llama-quantize: tensors, types, bytes, keys.

The default suite compares with goldens that they made of small checkpoints (tests/goldens); the long tests build
llama-quantize (tests/llama_cpp.py), run both programs on larger ones, and check that the goldens are theirs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from streamquant.cli import app as command_line
from streamquant.convert.recipes.container import GGUF
from streamquant.convert.recipes.recipe import LARGE_ENDS, RECIPES
from tests import gguf_peer, llama_cpp, synthetic
from tests.conftest import Shelf, write_small_tokenizer
from tests.gguf_peer import KeyValue, read_gguf
from tests.goldens import make, models
from tests.goldens.models import ALL, MODELS, NEED_IMATRIX, RUNS, Run
from tests.synthetic import ARCHITECTURES, MIXTURES

pytestmark = pytest.mark.xdist_group("llama-quantize")

CONVERTERS_OWN = ("F32", "F16", "BF16", "Q8_0")
DEVIATIONS = {
    "quantize.imatrix.file": "the path as llama-quantize was given it; here the name of the file, wherever it lies",
    **dict.fromkeys(
        ("quantize.imatrix.dataset", "quantize.imatrix.entries_count", "quantize.imatrix.chunks_count"),
        "llama-quantize adds them to F32, F16, BF16 and Q8_0 too, which no importance matrix changes; here these files "
        "are the converter's, with it or without it",
    ),
}
"""Keys that may differ from llama-quantize's, and why."""
IMATRIX_KEYS = tuple(DEVIATIONS)

LARGE = {base: name for name, base in LARGE_ENDS.items()}


def convert(source: Path, run: Run, out: Path, *, pre: str | None, imatrix: Path | None = None) -> None:
    """`streamquant convert` to all file types of a run that we make, with llama-quantize's own flags."""
    flags = [*run.flags]
    names = [name for name in run.file_types if f"gguf:{name}" in RECIPES]
    if run.flags == models.LARGE_ENDS:
        names, flags = [LARGE[name] for name in names], []
    flags += ["--imatrix", str(imatrix)] if imatrix is not None else []
    flags += ["--pre", pre] if pre is not None else []
    arguments = ["convert", str(source), "--to", f"gguf:{','.join(names)}", "--out", str(out), "--jobs", "2", *flags]
    done = CliRunner().invoke(command_line.app, arguments)
    assert done.exit_code == 0, (done.output, done.exception)


def output(out: Path, source: Path, run: Run, file_type: str) -> Path:
    label = LARGE[file_type] if run.flags == models.LARGE_ENDS else file_type
    return out / f"{source.name}-GGUF" / f"{source.name}-{label}.gguf"


# --- goldens --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def goldens() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(make.PATH.read_text())
    return content


@pytest.fixture(scope="session")
def golden_sources(shelf: Shelf, goldens: dict[str, Any]) -> Path:
    def write(folder: Path) -> None:
        for name in MODELS:
            source = models.write_model(name, folder)
            assert models.fingerprint(source) == goldens["sources"][name], "these are not the weights of the goldens"

    return shelf.get("golden-sources", write)


@dataclass(frozen=True, slots=True)
class Goldens:
    """The conversions of the golden checkpoints, made when asked for."""

    content: dict[str, Any]
    sources: Path
    shelf: Shelf

    def ours(self, name: str, file_type: str) -> Path:
        run = RUNS[name]
        source = self.sources / run.model
        out = self.shelf.get(f"golden-{name}", lambda folder: self.convert(run, source, folder))
        return output(out / "out", source, run, file_type)

    def convert(self, run: Run, source: Path, folder: Path) -> None:
        pre = MODELS[run.model].pre
        imatrix = None
        if run.imatrix is not None:
            unquantized = folder / "unquantized"
            convert(source, Run(run.model, (MODELS[run.model].dtype,)), unquantized, pre=pre)
            imatrix = models.write_imatrix(
                folder / f"imatrix.{run.imatrix}",
                list(models.imatrix_entries(shapes(next(unquantized.rglob("*.gguf"))))),
            )
        convert(source, run, folder / "out", pre=pre, imatrix=imatrix)


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape, _) in read_gguf(path)[1].items()}


@pytest.fixture(scope="session")
def made(goldens: dict[str, Any], golden_sources: Path, shelf: Shelf) -> Goldens:
    return Goldens(goldens, golden_sources, shelf)


@pytest.mark.parametrize(
    ("name", "file_type"), [(name, file_type) for name, run in RUNS.items() for file_type in run.file_types]
)
def test_equals_the_golden(made: Goldens, name: str, file_type: str) -> None:
    if f"gguf:{file_type}" not in RECIPES:
        pytest.skip(f"gguf:{file_type} is not made yet")
    golden, content = made.content["runs"][name][file_type], made.content["contents"][make.content_of(RUNS[name])]
    keys, tensors = read_gguf(made.ours(name, file_type))
    found = make.describe_tensors(tensors)
    assert {tensor: kind for tensor, (kind, _) in found.items()} == make.unpack_types(golden["types"], content["bytes"])
    different = [tensor for tensor, (kind, hashed) in found.items() if hashed != content["bytes"][tensor][kind]]
    assert different == []
    described = make.describe_keys(keys)
    assert described.pop(make.FILE_TYPE) == golden[make.FILE_TYPE]
    missing = IMATRIX_KEYS if file_type in CONVERTERS_OWN else ()
    expected = {key: value for key, value in content["keys"].items() if key not in missing}
    # The small tokenizer adds no BOS, and llama.cpp does for this name: the converter leaves the key out (DEVIATIONS).
    added = {ADD_BOS: ["BOOL", False]} if expected["tokenizer.ggml.pre"][1] == "llama-bpe" else {}
    assert described == expected | added


def test_every_file_type_has_a_golden() -> None:
    covered = {f"gguf:{name}" for name in (*ALL, *NEED_IMATRIX, *LARGE_ENDS)}
    assert {spec for spec, recipe in RECIPES.items() if recipe.container is GGUF} <= covered


def test_goldens_tell_types_and_bytes_apart(goldens: dict[str, Any]) -> None:
    """No type of a tensor has the bytes of another, and all rules of a mix that count layers are at work."""
    content = goldens["contents"]["llama"]["bytes"]
    for name, hashes in content.items():
        assert len(set(hashes.values())) == len(hashes), name
    for file_type in ("Q4_K_M", "Q3_K_M", "Q4_K_S"):
        types = make.unpack_types(goldens["runs"]["llama"][file_type]["types"], content)
        assert len({types[f"blk.{layer}.ffn_down.weight"] for layer in range(16)}) == 2, file_type


# --- the programs themselves ----------------------------------------------------------------------------------------

LLAMA, _, _, QWEN3, _ = ARCHITECTURES
QWEN3_MOE, MIXTRAL = MIXTURES[:2]
_NAMES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)


def sizes(*values: int) -> dict[str, int]:
    return dict(zip(_NAMES, values, strict=True))


CASES: Mapping[str, Mapping[str, Any] | None] = {
    "smollm2": None,
    "llama": {"architecture": LLAMA, "size": sizes(2048, 256, 16, 4, 1, 64), "rope": "llama3", "shards": 3},
    "llama-tied": {"architecture": LLAMA, "size": sizes(2048, 256, 8, 4, 4, 64), "tied": True},
    "qwen3": {"architecture": QWEN3, "size": sizes(512, 768, 9, 4, 2, 128), "shards": 2},
    "qwen3-tied": {"architecture": QWEN3, "size": sizes(512, 1056, 8, 4, 2, 128), "tied": True},
    # Seven experts, of which some rules count nothing; 288 columns of ffn_down fall back.
    "qwen3-moe": {
        **{"architecture": QWEN3_MOE, "size": sizes(256, 512, 4, 4, 2, 64), "shards": 2, "num_experts": 7},
        **{"num_experts_per_tok": 3, "moe_intermediate_size": 288},
    },
    # Eight experts have rules of their own.
    "mixtral": {
        **{"architecture": MIXTRAL, "size": sizes(256, 256, 4, 4, 2, 64), "num_local_experts": 8},
        "num_experts_per_tok": 2,
    },
}
MIXED = ("qwen3-moe", "mixtral")
MIXED_TYPES = ("Q8_0", "Q4_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "Q2_K_S", "IQ4_XS", "MXFP4_MOE")
"""One of each kind of mix: experts differ from dense models in the mixes alone."""
"""Arguments of tests.synthetic.write_checkpoint; a small tokenizer, as llama-quantize takes seconds for 10M weights."""
PRE = {LLAMA: "llama-bpe", QWEN3: "qwen2", QWEN3_MOE: "qwen2", MIXTRAL: "llama-bpe"}
ADD_BOS = "tokenizer.ggml.add_bos_token"
FLAGS: Mapping[str, Run] = {
    "": Run("", ALL),
    "imatrix": Run("", (*ALL[3:], *NEED_IMATRIX), imatrix="gguf"),
    "imatrix dat": Run("", ("Q4_K_M", "IQ4_XS", "Q4_0"), imatrix="dat"),
    **{
        name.removeprefix("llama "): replace(run, model="")
        for name, run in RUNS.items()
        if name.startswith("llama ") and "imatrix" not in name
    },
}
"""Ways to call llama-quantize: by name, without the model."""
CALLS = [
    *(("smollm2", "", file_type) for file_type in ALL),
    *(("smollm2", "imatrix", file_type) for file_type in ("Q4_K_M", "Q2_K_S", "Q5_0")),
    *(
        (case, name, file_type)
        for case, settings in CASES.items()
        for name, run in FLAGS.items()
        for file_type in run.file_types
        if settings is not None and case not in MIXED
    ),
    *(
        (case, name, file_type)
        for case in MIXED
        for name in ("", "imatrix")
        for file_type in FLAGS[name].file_types
        if file_type in MIXED_TYPES
    ),
]


@dataclass(frozen=True, slots=True)
class Cases:
    """Checkpoints, and what both sides make of them; made when asked for, once a run."""

    request: pytest.FixtureRequest
    shelf: Shelf

    def pre(self, case: str) -> str | None:
        settings = CASES[case]
        return None if settings is None else PRE[settings["architecture"]]

    def source(self, case: str) -> Path:
        settings = CASES[case]
        if settings is None:
            source: Path = self.request.getfixturevalue("smollm2")
            return source

        def write(folder: Path) -> None:
            tokenizer = write_small_tokenizer(folder / "tokenizer")
            synthetic.write_checkpoint(folder / case, tokenizer=tokenizer, **settings)

        return self.shelf.get(f"quantize-source-{case}", write) / case

    def unquantized(self, case: str) -> Path:
        def write(folder: Path) -> None:
            job = gguf_peer.Job(str(self.source(case)), "bf16", str(folder / "bf16.gguf"), pre=self.pre(case))
            gguf_peer.convert_many([job])

        return self.shelf.get(f"quantize-bf16-{case}", write) / "bf16.gguf"

    def imatrix(self, case: str, kind: str) -> Path:
        def write(folder: Path) -> None:
            models.write_imatrix(folder / f"i.{kind}", list(models.imatrix_entries(shapes(self.unquantized(case)))))

        return self.shelf.get(f"quantize-imatrix-{case}-{kind}", write) / f"i.{kind}"

    def ours(self, case: str, name: str, file_type: str) -> Path:
        run, source = FLAGS[name], self.source(case)
        imatrix = self.imatrix(case, run.imatrix) if run.imatrix is not None else None
        wanted = replace(run, file_types=tuple(call[2] for call in CALLS if call[:2] == (case, name)))
        out = self.shelf.get(
            f"quantize-ours-{case}-{name}",
            lambda folder: convert(source, wanted, folder, pre=self.pre(case), imatrix=imatrix),
        )
        return output(out, source, run, file_type)

    def theirs(self, case: str, name: str, file_type: str, out: Path) -> Path:
        run = FLAGS[name]
        flags = [*run.flags, *(["--imatrix", str(self.imatrix(case, run.imatrix))] if run.imatrix else [])]
        return llama_cpp.quantize(self.unquantized(case), out, file_type, flags)


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest, shelf: Shelf, llama_quantize: None, peers: Path) -> Cases:
    return Cases(request, shelf)


def without(keys: Mapping[str, KeyValue], deviating: Sequence[str]) -> dict[str, KeyValue]:
    return {key: value for key, value in keys.items() if key not in deviating}


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("case", "name", "file_type"), CALLS)
def test_equals_llama_quantize(cases: Cases, tmp_path: Path, case: str, name: str, file_type: str) -> None:
    """Every tensor, type and byte, and every key; the order of both is free."""
    if f"gguf:{file_type}" not in RECIPES:
        pytest.skip(f"gguf:{file_type} is not made yet")
    ours, theirs = cases.ours(case, name, file_type), cases.theirs(case, name, file_type, tmp_path / "theirs.gguf")
    (keys, tensors), (their_keys, their_tensors) = read_gguf(ours), read_gguf(theirs)
    assert {n: (kind.name, shape) for n, (kind, shape, _) in tensors.items()} == {
        n: (kind.name, shape) for n, (kind, shape, _) in their_tensors.items()
    }
    assert [n for n, (_, _, content) in tensors.items() if content != their_tensors[n][2]] == []
    deviating = IMATRIX_KEYS if file_type in CONVERTERS_OWN else IMATRIX_KEYS[:1]
    if their_keys["tokenizer.ggml.pre"][1] == "llama-bpe":  # a small tokenizer, as above
        assert keys.pop(ADD_BOS)[1] is False
        assert ADD_BOS not in their_keys
    assert without(keys, deviating) == without(their_keys, deviating)
    for path in (ours, theirs):  # no other test asks for them, and together they take many GB
        path.unlink()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_goldens_are_what_llama_quantize_writes(
    llama_quantize: None, peers: Path, tmp_path: Path, goldens: dict[str, Any]
) -> None:
    assert json.loads(make.dumps(make.make(tmp_path))) == goldens
