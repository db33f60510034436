"""The command line: what it prints, as text and as JSON, and its exit codes."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, TypeAdapter

from examples.smollm2_checkpoint import FOLDER
from streamquant.cli import app as command_line
from streamquant.convert.options import ConversionOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from tests.conftest import PLAIN, TINY_PRE
from tests.gguf_peer import read_gguf
from tests.imatrix_files import TINY_COLUMNS, some_entries, write_imatrix

COMMANDS = ("formats", "plan", "convert", "inspect", "verify", "recipe")
PRE = ("--pre", TINY_PRE)


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs the command line in this process: starting another takes seconds."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["streamquant", *map(str, arguments)])
        capsys.readouterr()
        try:
            command_line.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Result(code, *capsys.readouterr())

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


# --- help and version -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert "Example" in result.out
    assert f"streamquant {command}" in result.out
    assert run(command, "-h").out == result.out


def test_help_lists_the_commands(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    assert [command for command in COMMANDS if command not in result.out] == []


def test_no_command_is_a_wrong_command(run: Run) -> None:
    result = run()
    assert result.code == 2
    assert "Usage" in result.out + result.err


def test_version(run: Run) -> None:
    result = run("--version")
    assert result.code == 0
    found = result.json
    assert found["streamquant"] == importlib.metadata.version("streamquant")
    assert {"python", "numpy", "numba", "gguf", "compressed-tensors"} <= found.keys()


def test_starts_as_a_program() -> None:
    """The installed script, from a folder with a `convert` of its own."""
    script = Path(sys.executable).with_name("streamquant")
    if not script.exists():
        pytest.skip("streamquant is not installed beside this Python")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["streamquant"]


# --- plan -----------------------------------------------------------------------------------------------------------


class Part(Strict):
    name: str
    stored_as: str
    file: str
    offset: int
    size: int


class PlannedTensor(Strict):
    source: str
    format: str
    reason: str
    parts: list[Part]


class PlannedFile(Strict):
    path: str
    size: int
    header_bytes: int


class Runtimes(Strict):
    names: list[str]
    tensor_parallel: list[int]
    refusal: str | None


class PlannedVariant(Strict):
    variant: str
    description: str
    bytes: int
    bits_per_weight: float
    runtimes: Runtimes | None = None
    """Only of variants with scales for blocks."""
    files: list[PlannedFile]
    generated: list[str]
    dropped: list[str]
    tensors: list[PlannedTensor]


class SourceFile(Strict):
    path: str
    size: int


class Source(Strict):
    files: list[SourceFile]
    parameters: int
    bytes: int


class PlanJson(Strict):
    model: str
    architecture: str
    source: Source
    disk_bytes: int
    spool_bytes: int
    memory_bytes: int
    jobs: int
    chunks: int
    fingerprint: str
    notes: list[str]
    variants: list[PlannedVariant]


def test_plan_json(run: Run, tiny: Path) -> None:
    """The schema, and that the numbers are those of the plan."""
    result = run("plan", tiny, "--to", "fp8-block", "--to", "gguf:q8_0,Q4_0", "--json", "--jobs", 3, *PRE)
    assert (result.code, result.err) == (0, "")
    found = PlanJson.model_validate(result.json)
    plan = make_plan(
        open_checkpoint(tiny), parse_variants(["fp8-block", "gguf:Q8_0,Q4_0"]), ConversionOptions(pre=TINY_PRE)
    )
    assert (found.model, found.architecture, found.jobs) == ("Tiny", "LlamaForCausalLM", 3)
    assert found.disk_bytes == plan.nbytes == sum(variant.bytes for variant in found.variants)
    assert found.fingerprint == plan.fingerprint
    assert found.source.bytes == 2 * found.source.parameters
    assert [variant.variant for variant in found.variants] == ["fp8-block", "gguf:Q8_0", "gguf:Q4_0"]
    for variant in found.variants:
        assert variant.bytes == sum(file.size for file in variant.files)
        assert {part.file for t in variant.tensors for part in t.parts} <= {file.path for file in variant.files}
    scales = [part for part in found.variants[0].tensors[2].parts if part.name.endswith("_scale")]
    assert [part.stored_as for part in scales] == ["BF16"]
    assert found.variants[1].generated == ["rope_freqs.weight"]


def test_plan_text(run: Run, tiny: Path) -> None:
    result = run("plan", tiny, "--to", "fp8-dynamic", "--to", "gguf:Q4_0", *PRE)
    assert result.code == 0
    for text in (
        "LlamaForCausalLM",
        "Tiny-GGUF/Tiny-Q4_0.gguf",
        "linear layer",
        "one-dimensional tensors are F32",
        "disk needed",
    ):
        assert text in result.out
    assert "model.layers.1.mlp.up_proj.weight" not in result.out
    assert "note: tokenizer.ggml.pre" in result.out


def test_plan_lists_tensors(run: Run, tiny: Path) -> None:
    plan = make_plan(open_checkpoint(tiny), parse_variants(["gguf:Q4_0"]), ConversionOptions(pre=TINY_PRE))
    result = run("plan", tiny, "--to", "gguf:Q4_0", "--tensors", *PRE)
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    for tensor in plan.variants[0].tensors:
        assert f"{tensor.nbytes:,}" in lines[tensor.name]
        assert f"{tensor.regions[0].offset:,}" in lines[tensor.name]
        assert tensor.format in lines[tensor.name]


def test_plan_writes_nothing(run: Run, tiny: Path, tmp_path: Path) -> None:
    assert run("plan", tiny, "--to", "gguf:Q8_0", "--out", tmp_path / "new", *PRE).code == 0
    assert list(tmp_path.iterdir()) == []


def test_plan_names_every_variant(run: Run, tiny: Path) -> None:
    result = run("plan", tiny, *(word for spec in PLAIN for word in ("--to", spec)), "--name", "Other", *PRE)
    assert result.code == 0
    labels = [recipe.label for recipe in parse_variants(PLAIN)]
    assert [label for label in labels if f"Other-{label}" not in result.out] == []


# --- convert --------------------------------------------------------------------------------------------------------


def test_convert_says_what_it_did(run: Run, tiny: Path, tmp_path: Path) -> None:
    command = ("convert", tiny, "--to", "gguf:Q8_0", "--out", tmp_path, "-j", 2, *PRE)
    first = run(*command)
    assert first.code == 0
    assert first.out.startswith("gguf:Q8_0: done, ")
    assert str(tmp_path / "Tiny-GGUF") in first.out
    assert (tmp_path / "Tiny-GGUF" / "Tiny-Q8_0.gguf").is_file()
    again = run(*command)
    assert (again.code, again.out.partition(",")[0]) == (0, "gguf:Q8_0: was done already")


def test_convert_takes_sizes_names_and_metadata(run: Run, tiny: Path, tmp_path: Path) -> None:
    metadata = tmp_path / "metadata.json"
    metadata.write_text('{"general.author": "Nobody"}')
    options = ("--name", "Small", "--split-max-size", "600K", "--metadata", metadata, *PRE)
    assert run("convert", tiny, "--to", "gguf:Q8_0", "--out", tmp_path / "out", *options).code == 0
    files = sorted(path.name for path in (tmp_path / "out").rglob("*.gguf"))
    assert len(files) > 1
    assert files[0] == f"Small-Q8_0-00001-of-{len(files):05d}.gguf"
    found = run("inspect", tmp_path / "out", "--json").json
    assert found[0]["metadata"]["general.author"] == "Nobody"
    assert [file["metadata"]["split.no"] for file in found] == list(range(len(files)))


# --- inspect --------------------------------------------------------------------------------------------------------


class StoredTensor(Strict):
    name: str
    stored_as: str
    shape: list[int]
    nbytes: int
    offset: int


class StoredFile(Strict):
    path: str
    size: int
    metadata: dict[str, Any]
    tensors: list[StoredTensor]


def test_inspect_json_of_everything(run: Run, tiny_variants: Path) -> None:
    result = run("inspect", tiny_variants, "--json")
    assert result.code == 0
    files = {Path(f.path).name: f for f in TypeAdapter(list[StoredFile]).validate_python(result.json)}
    on_disk = [p for p in tiny_variants.rglob("*") if p.suffix in (".gguf", ".safetensors")]
    gguf = [spec for spec in PLAIN if spec.startswith("gguf:")]
    checkpoints = len(PLAIN) - len(gguf)
    assert len(result.json) == len(on_disk) == len(gguf) + checkpoints * 2  # two shards of each
    assert {f.path: f.size for f in map(StoredFile.model_validate, result.json)} == {
        str(path): path.stat().st_size for path in on_disk
    }
    q4 = files["Tiny-Q4_0.gguf"]
    assert q4.metadata["general.architecture"] == "llama"
    assert q4.metadata["general.file_type"] == 2
    assert q4.metadata["tokenizer.ggml.tokens"] == f"[{q4.metadata['llama.vocab_size']} values]"
    down = next(tensor for tensor in q4.tensors if tensor.name == "blk.0.ffn_down.weight")
    assert (down.stored_as, down.shape, down.nbytes) == ("Q4_0", [256, 512], 256 * 512 // 32 * 18)
    fp8 = next(f for f in map(StoredFile.model_validate, result.json) if "FP8" in f.path)
    assert fp8.metadata["quantization_config"]["quant_method"] == "compressed-tensors"
    assert {"F8_E4M3", "BF16"} == {tensor.stored_as for tensor in fp8.tensors}


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("Tiny-GGUF/Tiny-Q5_1.gguf", ("Q5_1", "Q6_K", "general.file_type", "llama.rope.freq_base", "F32")),
        ("Tiny-FP8-dynamic", ("F8_E4M3", "BF16", "quantization_config", "model-00002-of-00002.safetensors")),
        ("Tiny-FP8-block/model-00001-of-00002.safetensors", ("F8_E4M3", "BF16")),
    ],
)
def test_inspect_text(run: Run, tiny_variants: Path, path: str, shown: tuple[str, ...]) -> None:
    result = run("inspect", tiny_variants / path)
    assert result.code == 0
    assert [text for text in shown if text not in result.out] == []
    assert "blk.0" not in result.out
    assert "model.layers.0" not in result.out


def test_inspect_lists_tensors(run: Run, tiny_variants: Path) -> None:
    result = run("inspect", tiny_variants / "Tiny-GGUF" / "Tiny-Q4_1.gguf", "--tensors")
    (line,) = [line for line in result.out.splitlines() if "blk.2.attn_k.weight" in line]
    assert "Q4_1" in line
    assert "64 x 256" in line


# --- verify ---------------------------------------------------------------------------------------------------------


class Verified(Strict):
    folder: str
    variant: str
    ok: bool
    problems: list[str]
    files: int
    tensors: int
    bytes: int
    sqnr_db: float | None
    max_error: float | None
    rms_error: float | None


def test_verify_json(run: Run, tiny: Path, tiny_variants: Path) -> None:
    schema = TypeAdapter(list[Verified])
    plain = schema.validate_python(run("verify", tiny_variants, "--json").json)
    result = run("verify", tiny_variants, "--source", tiny, "--json")
    measured = schema.validate_python(result.json)
    assert result.code == 0
    assert {found.variant for found in plain} == {found.variant for found in measured} == set(PLAIN)
    assert [found for found in (*plain, *measured) if not found.ok or found.problems] == []
    assert {found.sqnr_db for found in plain} == {None}
    lossless = {found.variant for found in measured if found.sqnr_db is None}
    assert lossless == {"gguf:F32", "gguf:BF16", "bf16"}
    assert {found.max_error for found in measured if found.variant in lossless} == {0.0}


def test_verify_text(run: Run, tiny: Path, tiny_variants: Path) -> None:
    plain = run("verify", tiny_variants / "Tiny-GGUF")
    assert plain.code == 0
    assert " dB" not in plain.out
    result = run("verify", tiny_variants / "Tiny-GGUF", "--source", tiny)
    assert result.code == 0
    lines = {spec: next(line for line in result.out.splitlines() if spec in line) for spec in ("gguf:Q8_0", "gguf:F32")}
    assert " dB" in lines["gguf:Q8_0"]
    assert "exact" in lines["gguf:F32"]
    assert all(line.rstrip().endswith("ok") for line in lines.values())


@pytest.fixture
def copy(tiny_variants: Path, tmp_path: Path) -> Path:
    """Results that a test may damage."""
    return Path(shutil.copytree(tiny_variants, tmp_path / "variants"))


def test_verify_names_the_damaged_tensor(run: Run, tiny: Path, copy: Path) -> None:
    plan = make_plan(open_checkpoint(tiny), parse_variants(["gguf:Q4_0"]), ConversionOptions(pre=TINY_PRE))
    tensor = next(t for t in plan.variants[0].tensors if t.name == "blk.1.ffn_up.weight")
    path = copy / "Tiny-GGUF" / "Tiny-Q4_0.gguf"
    content = bytearray(path.read_bytes())
    content[tensor.regions[0].offset + 5] ^= 0x10
    path.write_bytes(content)
    result = run("verify", copy)
    assert result.code == 1
    assert "tensor blk.1.ffn_up.weight is damaged" in result.out
    assert result.out.count("is damaged") == 1


@pytest.mark.parametrize("damage", ["missing", "short", "header"])
def test_verify_finds_damaged_files(run: Run, copy: Path, damage: str) -> None:
    path = copy / "Tiny-FP8-block" / "model-00002-of-00002.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(content[:-1])
    else:
        path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    result = run("verify", copy / "Tiny-FP8-block", "--json")
    assert result.code == 1
    (found,) = result.json
    assert found["ok"] is False
    assert path.name in found["problems"][0]


def test_verify_against_another_source(run: Run, tiny: Path, tiny_variants: Path, tmp_path: Path) -> None:
    """The same shapes, one other weight: every variant of a matrix differs where it was changed."""
    other = Path(shutil.copytree(tiny, tmp_path / "Tiny"))
    shard = sorted(other.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-2] ^= 0x40
    shard.write_bytes(content)
    result = run("verify", tiny_variants / "Tiny-GGUF", "--source", other)
    assert result.code == 1
    assert "not what the source gives" in result.out


# --- exit codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "MODEL", "--to", "gguf:Q9_9"], "unknown variant"),
        (["plan", "MODEL"], "no variant asked for"),
        (["plan", "nowhere", "--to", "gguf:Q8_0"], "no such model folder"),
        (["plan", "MODEL", "--to", "gguf:Q4_0", "--tensor-type", "attn_v", *PRE], "not a rule"),
        (["plan", "MODEL", "--to", "gguf:Q4_0", "--tensor-type", "(=Q8_0", *PRE], "does not compile"),
        (["plan", "MODEL", "--to", "gguf:Q4_0", "--tensor-type-file", "nowhere", *PRE], "cannot read a file"),
        (["plan", "MODEL", "--to", "gguf:Q4_0", "--output-tensor-type", "Q4_K_M", *PRE], "unknown type"),
        (["plan", "MODEL", "--to", "gguf:Q4_0", "--token-embedding-type", "iq1_s", *PRE], "cannot be made yet"),
        (["plan", "MODEL", "--to", "fp8-block", "--pure", *PRE], "overrides without a variant"),
        (["plan", "MODEL", "--to", "gguf:Q4_0", "--include-weights", "ffn", *PRE], "choose from an importance matrix"),
        (["plan", "MODEL", "--recipe", "nowhere.yaml", *PRE], "cannot read a file"),
        (["plan", "MODEL", "--to", "gguf:Q2_K_S", *PRE], "needs an importance matrix"),
        (["plan", "MODEL", "--to", "gguf:IQ2_XS", *PRE], "variant cannot be made yet"),
        (["plan", "MODEL", "--to", "gguf:19", *PRE], "variant cannot be made yet"),
        (["plan", "MODEL", "--to", "gguf:Q8_0", "--split-max-size", "1.5G", *PRE], "not a size"),
        (["plan", "MODEL", "--to", "gguf:Q8_0", "--name", "a/b", *PRE], "name not allowed"),
        (["plan", "MODEL", "--to", "gguf:Q8_0", "--pre", "no-such-pre"], "no-such-pre"),
        (["plan", "MODEL", "--to", "gguf:Q8_0", "--out", "MODEL/out", *PRE], "inside the source"),
        (["plan", "MODEL", "--to", "gguf:Q8_0", "--frobnicate"], "No such option"),
        (["convert", "MODEL", "--to", "gguf:Q8_0"], "--out"),
        (["convert", "MODEL", "--to", "gguf:Q8_0", "--out", "MODEL/config.json", *PRE], "output folder is a file"),
        (["inspect", "nowhere"], "does not exist"),
        (["inspect", "MODEL/config.json"], "unknown kind of file"),
        (["verify", "MODEL"], "nothing to verify"),
        (["frobnicate"], "No such command"),
    ],
)
def test_wrong_commands_end_with_2(run: Run, tiny: Path, arguments: list[str], message: str) -> None:
    result = run(*(word.replace("MODEL", str(tiny)) for word in arguments))
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert result.out == ""


def test_faults_end_with_1(run: Run, tiny: Path, tiny_variants: Path, tmp_path: Path) -> None:
    def fails(*arguments: object) -> str:
        result = run(*arguments)
        assert result.code == 1
        assert result.err.startswith("error: ")
        assert "Traceback" not in result.err
        return result.err

    to = ("--to", "gguf:Q8_0")
    assert "not a Hugging Face checkpoint" in fails("plan", tmp_path, *to)
    assert "unknown pre-tokenizer" in fails("plan", tiny, *to)
    assert run("plan", tiny_variants / "Tiny-FP8-dynamic", *to, *PRE).code == 0  # quantized already, and a source
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((tiny_variants / "Tiny-GGUF" / "Tiny-Q8_0.gguf").read_bytes()[:5000])
    assert "broken.gguf" in fails("inspect", broken)
    cut = Path(shutil.copytree(tiny, tmp_path / "cut"))
    shard = sorted(cut.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 1)
    assert shard.name in fails("convert", cut, *to, "--out", tmp_path / "out", *PRE)


def test_a_pipe_that_closes_is_no_crash(tiny: Path) -> None:
    """`streamquant plan ... | head -1`"""
    command = [sys.executable, "-P", "-m", "streamquant", "plan", str(tiny), "--to", "gguf:Q8_0", "--tensors", *PRE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    assert process.returncode in (0, 1)


# --- the results speak ----------------------------------------------------------------------------------------------


CHAT = """
import json, os, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = sys.argv[1], 512, 1, 0
params.use_jinja, params.warmup, params.verbosity, params.cpuparams.n_threads = True, False, -1, 2
server = xllamacpp.Server(params)
answers = []
for question in json.loads(sys.argv[2]):
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 16, "temperature": 0.0}
    answers.append(server.handle_chat_completions(body)["choices"][0]["message"]["content"])
with open(sys.argv[3], "w") as file:
    json.dump(answers, file)
os._exit(0)
"""
# A model of 135M weights in greedy decoding answers some phrasings in French and others not at all; which ones depends
# on the arithmetic of the CPU; the file itself is llama.cpp's own, byte for byte (test_gguf_parity).
QUESTIONS = ("Tell me the capital of France.", "What is the capital of France?", "Name the capital city of France.")


def test_smollm2_answers_in_llama_cpp(smollm2_variants: Path, tmp_path: Path) -> None:
    """A chat prompt through the file's own template; the engine runs in a process of its own."""
    pytest.importorskip("xllamacpp", reason="llama.cpp (package xllamacpp) is not installed")
    model = smollm2_variants / f"{FOLDER}-GGUF" / f"{FOLDER}-Q8_0.gguf"
    answers = tmp_path / "answers.json"
    command = [sys.executable, "-c", CHAT, str(model), json.dumps(QUESTIONS), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert answers.is_file(), done.stderr[-2000:]
    found = json.loads(answers.read_text())
    assert any("Paris" in answer for answer in found), found
    assert not any("<|im_" in answer for answer in found), found


# --- importance, overrides, recipes ---------------------------------------------------------------------------------


def test_importance_and_overrides_on_the_command_line(run: Run, tiny: Path, tmp_path: Path) -> None:
    """From the flags to the files, and back: verify asks for the matrix, recipe finds the overrides."""
    matrix = write_imatrix(tmp_path / "m.gguf", some_entries(TINY_COLUMNS))
    (tmp_path / "types.txt").write_text("ffn_down=Q5_K\n")
    (tmp_path / "mine.yaml").write_text("label: Mine\nbase: 2\ntensor-type: [attn_q=IQ4_NL]\n")
    flags = ("--imatrix", matrix, "--exclude-weights", "ffn_up", "--tensor-type", "attn_V=q8_0", "--tensor-type-file")
    ends = (tmp_path / "types.txt", "--output-tensor-type", "q5_1", "--token-embedding-type", "F16", *PRE)
    command = (tiny, "--to", "gguf:15", "--to", "fp8-block", "--recipe", tmp_path / "mine.yaml", *flags, *ends)
    planned = run("plan", *command)
    assert planned.code == 0
    for text in (
        "--tensor-type attn_v=Q8_0",
        "--output-tensor-type",
        "gguf:Mine",
        "encoded without: blk.0.ffn_up.weight",
    ):
        assert text in planned.out
    out = tmp_path / "out"
    assert run("convert", *command, "--out", out).code == 0

    _, tensors = read_gguf(out / "Tiny-GGUF/Tiny-Q4_K_M.gguf")
    kinds = {name: kind.name for name, (kind, _, _) in tensors.items()}
    assert [kinds[f"blk.1.{name}.weight"] for name in ("attn_v", "ffn_down", "attn_q")] == ["Q8_0", "Q5_K", "Q4_K"]
    assert (kinds["output.weight"], kinds["token_embd.weight"]) == ("Q5_1", "F16")
    _, mine = read_gguf(out / "Tiny-GGUF/Tiny-Mine.gguf")
    assert mine["blk.0.attn_q.weight"][0].name == "IQ4_NL"

    assert run("verify", out).code == 0
    assert run("verify", out, "--source", tiny, "--imatrix", matrix).code == 0
    refused = run("verify", out, "--source", tiny)
    assert refused.code == 2
    assert "--imatrix with m.gguf" in refused.err

    recipe = tmp_path / "found.yaml"
    assert run("recipe", out / "Tiny-GGUF/Tiny-Q4_K_M.gguf", "--out", recipe, "--label", "Found").code == 0
    taken = run("recipe", out / "Tiny-GGUF/Tiny-Q4_K_M.gguf", "--out", recipe)
    assert (taken.code, "exists already" in taken.err) == (2, True)
    shown = run("recipe", out / "Tiny-GGUF/Tiny-Q4_K_M.gguf", "--label", "Found")
    assert shown.out == recipe.read_text()
    assert "--imatrix is not part of a recipe" in shown.err
    again = run("plan", tiny, "--recipe", recipe, "--json", *PRE).json["variants"][0]
    assert {t["parts"][0]["name"]: t["format"] for t in again["tensors"]} == {
        name: kind for name, kind in kinds.items() if name != "rope_freqs.weight"
    }


def test_left_output_is_as_in_the_source(run: Run, tiny: Path) -> None:
    found = run("plan", tiny, "--to", "gguf:Q4_K_M,F16", "--leave-output-tensor", "--json", *PRE).json
    for variant in found["variants"]:
        formats = {t["parts"][0]["name"]: (t["format"], t["reason"]) for t in variant["tensors"]}
        assert formats["output.weight"] == ("BF16", "--leave-output-tensor: as in the source")
        assert formats["token_embd.weight"][0] in ("Q4_K", "F16")
