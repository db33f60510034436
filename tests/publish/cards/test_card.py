"""Model cards: they say what manifest and report say, in YAML that the Hub takes, whatever things are called."""

import dataclasses
import hashlib
import itertools
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub.repocard
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils._http import get_session
from typer.testing import CliRunner

from streamquant.cli import app as command_line
from streamquant.convert.conversion import convert
from streamquant.convert.manifest import MANIFEST
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.imatrix import ImatrixRecord
from streamquant.convert.recipes.overrides import Overrides
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.problem import Problem
from streamquant.publish.cards.card import write_cards
from streamquant.publish.cards.commands import made_by
from streamquant.publish.cards.options import CardOptions
from streamquant.publish.cards.origin import BASE_CARD, MARK
from streamquant.publish.cards.public_report import public_report
from streamquant.publish.results import CARD, VariantFolder, read_folder
from streamquant.quant.errors import UsageError
from streamquant.validate.report.data import Report, read_report, report_bytes, write_report
from streamquant.validate.report.view import make_view, remark
from tests.conftest import TINY_PRE, Shelf
from tests.hub import Hub
from tests.publish.cards.contents import (
    BASE,
    OPTIONS,
    PROGRAMS,
    blocks,
    edit,
    front,
    table,
    tokens,
)
from tests.validate.engine_fixtures import Model

# The metadata


def test_the_metadata_is_the_base_cards_and_ours(cards: Path) -> None:
    gguf, fp8 = front(cards / "Tiny-GGUF" / CARD), front(cards / "Tiny-FP8-dynamic" / CARD)
    shared = {
        "base_model": "NousResearch/Tiny",
        "base_model_relation": "quantized",
        "license": "llama3",
        "language": ["en", "no"],
        "pipeline_tag": "text-generation",
        "quantized_by": "ORG",
    }
    link = "https://huggingface.co/NousResearch/Tiny/blob/main/LICENSE"
    own = ["quantized", "streamquant", "conversational", "function calling", "reasoning"]
    assert gguf == shared | {"license_link": link, "library_name": "gguf", "tags": ["gguf", "llama.cpp", *own]}
    tags = ["fp8", "compressed-tensors", "vllm", *own]
    assert fp8 == shared | {"license_link": "LICENSE", "library_name": "transformers", "tags": tags}


def test_the_hubs_own_check_takes_the_cards(cards: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        """The client has the address of the real Hub in its code."""

        @staticmethod
        def post(url: str, **more: Any) -> Any:
            return get_session().post(hub.endpoint + url.removeprefix("https://huggingface.co"), **more)

    monkeypatch.setattr(huggingface_hub.repocard, "get_session", Session)
    for path in cards.glob(f"*/{CARD}"):
        ModelCard.load(path).validate()
    broken = (cards / "Tiny-GGUF" / CARD).read_text().replace("quantized\n", "made of\n", 1)
    with pytest.raises(ValueError, match="base_model_relation"):
        ModelCard(broken).validate()


def test_without_a_base_repository_there_is_none(plain: Path) -> None:
    (card,) = write_cards(plain / "Tiny-GGUF", CardOptions(prompts=False))
    assert front(card).keys() & {"base_model", "base_model_relation", "quantized_by"} == set()
    assert "its repository is not known here" in card.read_text()
    assert "huggingface.co" not in card.read_text()
    assert "license_link" not in front(card)


def test_the_manifests_repository_is_the_base(plain: Path) -> None:
    revision = "c0ffee" + "0" * 34
    edit(plain / "Tiny-GGUF" / MANIFEST, lambda r: r["source"].update(repo="NousResearch/Tiny-1B", revision=revision))
    (card,) = write_cards(plain / "Tiny-GGUF", CardOptions(prompts=False))
    assert front(card)["base_model"] == "NousResearch/Tiny-1B"
    assert f"streamquant convert NousResearch/Tiny-1B@{revision} --to" in card.read_text()


def test_what_was_said_once_is_kept(plain: Path) -> None:
    first = CardOptions("A/B", None, "Somebody Else", prompts=False)
    write_cards(plain, first)
    before = {path: front(path) for path in plain.glob(f"*/{CARD}")}
    for path in (plain / "Tiny-GGUF").glob("*.gguf"):
        path.unlink()  # as after --delete-after-upload
    write_cards(plain, CardOptions(repo="ORG/Tiny", prompts=False))
    assert {path: front(path) for path in plain.glob(f"*/{CARD}")} == before
    assert len(before) == 2


# What it says


def test_the_table_has_the_reports_numbers(cards: Path, report: Report) -> None:
    rows = {row[0].partition("<br>")[0].strip("`"): row for row in table(cards / "Tiny-GGUF" / CARD, "Mean KLD")}
    assert list(rows) == ["BF16", "Q8_0", "Q4_K_M"]
    manifest = read_folder(cards / "Tiny-GGUF")
    for row in make_view(report).rows:
        if row.name in rows:
            cells = [cell.replace("\xa0", " ").replace("<br>", " ") for cell in rows[row.name]]
            variant = next(variant for variant in manifest.variants if variant.label == row.name)
            assert f"[Tiny-{row.name}.gguf]" in cells[0].replace("\\", "")
            assert cells[2] == f"{variant.made.bits_per_weight:.2f}"
            assert cells[3] == "no"
            assert cells[4] == " ± ".join(row.kld)
            assert cells[5] == " ± ".join(row.ppl_ratio)
            assert cells[6] == f"{row.same_top[0]} ± {row.same_top[1]}%" or row.same_top[1] == ""
            assert row.result is not None
            assert remark(row.result.overall.kld.value, report) in cells[7].lower()


def test_a_gate_that_failed_is_said_first(cards: Path) -> None:
    text = (cards / "Tiny-GGUF" / CARD).read_text()
    head = text.partition("## Files")[0]
    assert "**Failed its gates:**" in head
    assert "`Q4_K_M`" in head
    assert "Measured against the original" not in head
    assert "Failed --max-mean-kld" in table(cards / "Tiny-GGUF" / CARD, "Mean KLD")[2][7]
    assert "❌" in table(cards / "Tiny-GGUF" / CARD, "Mean KLD")[2][7]
    assert re.search(r"- ❌ `Q4_K_M`: `--max-mean-kld` 0.00100, found 0\.\d+", text)


def test_what_was_not_measured_is_said_first(out: Path, report: Report) -> None:
    edit(out / "Tiny-GGUF" / MANIFEST, lambda r: r["variants"]["gguf:Q8_0"]["files"][0].update(sha256="0" * 64))
    (card,) = write_cards(out / "Tiny-GGUF", OPTIONS)
    rows = {row[0].partition("<br>")[0].strip("`"): row for row in table(card, "Mean KLD")}
    assert [cell.replace("\xa0", " ") for cell in rows["Q8_0"][4:7]] == ["not measured"] * 3
    assert rows["BF16"][4] != "not\xa0measured"
    head = card.read_text().partition("## Files")[0]
    assert "**Published without measurements:** `Q8_0`: the report is about other files of the same names" in head
    other = dataclasses.replace(report, original_files=())
    write_report(other, out / "report")
    (card,) = write_cards(out / "Tiny-GGUF", OPTIONS)
    assert "which is not the source that these files were made of" in card.read_text()


def test_variants_that_pass_say_what_they_passed(out: Path, report: Report) -> None:
    passed = tuple(dataclasses.replace(gate, passed=True) for gate in report.gate_results)
    problems = tuple(dataclasses.replace(variant, problems=()) for variant in report.variants)
    write_report(dataclasses.replace(report, gate_results=passed, variants=problems), out / "report")
    (card,) = write_cards(out / "Tiny-GGUF", OPTIONS)
    head = card.read_text().partition("## Files")[0]
    assert "all variants pass the gates (mean KLD at most 0.00100, errors at most 0)" in head
    assert "❌" not in card.read_text()
    assert "Smallest that is practically the original" in card.read_text()


def test_without_a_report_nothing_is_claimed(plain: Path) -> None:
    for card in write_cards(plain, OPTIONS):
        assert "there is no report" in card.read_text().partition("## Files")[0]
        assert all("Not measured" in row[7] for row in table(card, "Mean KLD"))
        assert "✅" not in card.read_text()
        assert "report/" not in card.read_text()


def test_an_old_report_is_not_published_with_new_files(out: Path, report: Report) -> None:
    write_cards(out / "Tiny-GGUF", OPTIONS)
    shutil.rmtree(out / "report")
    edit(
        out / "Tiny-GGUF" / MANIFEST,
        lambda r: [file.update(sha256="0" * 64) for v in r["variants"].values() for file in v["files"]],
    )
    with pytest.raises(UsageError, match="a report of other files"):
        write_cards(out / "Tiny-GGUF", OPTIONS)


def test_the_prompt_format_is_the_templates_own(cards: Path) -> None:
    for card in cards.glob(f"*/{CARD}"):
        assert blocks(card, "text")[-2:] == ["{system_prompt}</s>{prompt}</s>\n", "{prompt}</s>\n"]


def test_hermes_is_shown_with_reasoning_and_tools(hermes_14b: Model, tmp_path: Path) -> None:
    fp8 = Path(shutil.copytree(hermes_14b.fp8, tmp_path / "Hermes-FP8-dynamic"))
    gguf = Path(shutil.copytree(hermes_14b.gguf.parent, tmp_path / "Hermes-GGUF"))
    prompts = {}
    for folder in (fp8, gguf):
        (card,) = write_cards(folder, CardOptions(repo=f"ORG/{folder.name}"))
        text = card.read_text()
        prompts[folder] = [block for block in blocks(card, "text") if "<|im_start|>" in block]
        assert "Without a system prompt, thinking=True" in text
        assert "in a conversation with a system prompt it does nothing" in text
        assert "<summary>A tool, its call and its result</summary>" in text
    assert prompts[fp8] == prompts[gguf]
    plain, default, thinking, tool = prompts[fp8]
    assert plain.startswith("<|im_start|>system\n{system_prompt}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>")
    assert "You are Hermes, created by Nous Research." in default
    assert "You are a deep thinking AI" in thinking
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>' in tool
    shell = "\n".join(blocks(fp8 / CARD, "bash"))
    assert "vllm serve ORG/Hermes-FP8-dynamic --enable-auto-tool-choice --tool-call-parser hermes" in shell
    assert "--model-path ORG/Hermes-FP8-dynamic --tool-call-parser qwen25" in shell


# Commands and links


def words(card: Path) -> Iterator[list[str]]:
    for block in blocks(card, "bash"):
        for line in block.splitlines():
            yield shlex.split(line)


@pytest.mark.parametrize("repo", ["ORG/Tiny", None])
def test_every_command_parses_and_names_what_is_there(plain: Path, repo: str | None) -> None:
    for card in write_cards(plain, dataclasses.replace(OPTIONS, repo=repo)):
        programs = set()
        for command in words(card):
            programs.add(command[0])
            for word in command[1:]:
                if word.endswith(".gguf"):
                    assert (plain / word).is_file() or (card.parent / word).is_file(), word
                if "/" in word and not word.endswith(".gguf"):
                    assert repo is not None, word
        assert programs <= PROGRAMS
        assert len(programs) >= 3


def test_sampling_defaults_reach_every_engine(plain: Path) -> None:
    fp8, gguf = write_cards(plain, OPTIONS)
    assert "`temperature` 0.6, `top_k` 20, `top_p` 0.95" in fp8.read_text()
    line = next(command for command in words(gguf) if command[0] == "llama-server")
    assert line[1:] == ["-hf", "ORG/Tiny-GGUF:Q4_K_M", "--jinja", "--temp", "0.6", "--top-k", "20", "--top-p", "0.95"]
    wanted = "FROM hf.co/ORG/Tiny-GGUF:Q4_K_M\nPARAMETER temperature 0.6\nPARAMETER top_k 20\nPARAMETER top_p 0.95\n"
    assert blocks(gguf, "text")[0] == wanted


def test_titles_and_commands_are_paragraphs_of_their_own(cards: Path) -> None:
    for path in cards.glob("*/README.md"):
        lines, inside = path.read_text().splitlines(), False
        for before, line in itertools.pairwise(lines):
            opens = line.startswith("```") and not inside
            if opens or (not inside and re.fullmatch(r"\*\*[^*]+\*\*(?: \(.*\))?", line)):
                assert before == "", (path.name, before, line)
            inside ^= line.startswith("```")
        assert not inside


def test_every_link_within_the_repository_leads_somewhere(cards: Path) -> None:
    for card in cards.glob(f"*/{CARD}"):
        targets = [token.attrs.get("href") or token.attrs.get("src") for token in tokens(card)]
        found = [unquote(str(target)) for target in targets if target and "://" not in str(target)]
        assert "report/plots/size-kld.png" in found
        headings = card.read_text().lower()
        for target in found:
            assert (card.parent / target).exists() or f"## {target[1:]}" in headings, target
        assert BASE_CARD not in found, "push leaves it at home"


def test_a_split_set_is_one_row(shelf: Shelf, tiny: Path, tmp_path: Path) -> None:
    options = ConversionOptions(pre=TINY_PRE, split_max_size=300_000)
    specs = parse_variants(["gguf:Q8_0"])
    made = shelf.get(
        "publish-split", lambda out: convert(make_plan(open_checkpoint(tiny), specs, options), out, RunOptions(jobs=2))
    )
    folder = Path(shutil.copytree(made / "Tiny-GGUF", tmp_path / "Tiny-GGUF"))
    parts = len(read_folder(folder).files)
    assert parts > 1
    (card,) = write_cards(folder, dataclasses.replace(OPTIONS, repo="ORG/Tiny-GGUF"))
    ((name, _, _, split, *_),) = table(card, "Mean KLD")
    assert name == r"`Q8_0`<br>[Tiny-Q8\_0/](Tiny-Q8_0)"
    assert split == f"{parts} files"
    commands = list(words(card))
    assert ["hf", "download", "ORG/Tiny-GGUF", "--include", "Tiny-Q8_0/*", "--local-dir", "Tiny-GGUF"] in commands
    merge = next(command for command in commands if command[0] == "llama-gguf-split")
    assert (tmp_path / merge[2]).is_file()
    assert merge[3] == "Tiny-Q8_0.gguf"
    assert f"convert Tiny --to gguf:Q8_0 --split-max-size 300K --pre {TINY_PRE} --out variants" in card.read_text()


def test_the_command_of_the_card_makes_the_same_bytes(plain: Path, tiny: Path, tmp_path: Path) -> None:
    for name in ("Tiny-GGUF", "Tiny-FP8-dynamic"):
        (made,) = made_by(read_folder(plain / name))
        program, verb, model, *rest = shlex.split(made.command)
        assert (program, verb, model, rest[-1]) == ("streamquant", "convert", "Tiny", "variants")
        extra = ["--pre", TINY_PRE] if name == "Tiny-FP8-dynamic" else []
        done = CliRunner().invoke(command_line.app, [verb, str(tiny), *rest[:-1], str(tmp_path / "again"), *extra])
        assert done.exit_code == 0, done.output
        assert read_folder(tmp_path / "again" / name).files == read_folder(plain / name).files


def with_options(folder: VariantFolder, imatrix: ImatrixRecord | None = None, **options: Any) -> VariantFolder:
    variants = tuple(
        dataclasses.replace(
            v, made=dataclasses.replace(v.made, options=dataclasses.replace(v.made.options, **options), imatrix=imatrix)
        )
        for v in folder.variants
    )
    return dataclasses.replace(folder, variants=variants)


def test_the_command_names_every_option_and_no_path(plain: Path) -> None:
    folder = with_options(
        read_folder(plain / "Tiny-GGUF"),
        name="My Tiny",
        split_max_size=40_000_000_000,
        metadata={"general.author": "me"},
        imatrix=ImatrixRecord("/home/me/tiny.imatrix.gguf", "ab" * 32, (), 1, 1, ("blk",), ()),
        overrides=Overrides((("attn_v", "q8_0"), ("a b", "q4_0")), output_tensor_type="Q8_0", pure=True),
        guard_template=True,
    )
    (made,) = made_by(folder)
    assert shlex.split(made.command) == [
        *("streamquant", "convert", "Tiny", "--to", "gguf:BF16,Q8_0,Q4_K_M", "--name", "My Tiny"),
        *("--split-max-size", "40G", "--pre", TINY_PRE, "--metadata", "metadata.json"),
        *("--imatrix", "tiny.imatrix.gguf", "--include-weights", "blk"),
        *("--tensor-type", "attn_v=q8_0", "--tensor-type", "a b=q4_0", "--output-tensor-type", "Q8_0", "--pure"),
        *("--guard-template", "--out", "variants"),
    ]
    assert made.inputs == (("metadata.json", '{\n  "general.author": "me"\n}'),)


def test_variants_of_other_options_get_commands_of_their_own(plain: Path) -> None:
    def other(record: dict[str, Any]) -> None:
        record["variants"]["gguf:Q8_0"]["options"]["imatrix"] = {
            **{"file": "x.gguf", "sha256": "ab" * 32, "datasets": ["/home/me/calibration.txt"], "entries": 7},
            **{"chunks": 100, "include_weights": [], "exclude_weights": []},
        }
        entry = record["variants"].pop("gguf:Q4_K_M")
        entry["recipe"] = {"label": "UD", "base": "Q4_K_M", "tensor-type": ["attn_v=Q8_0"]}
        record["variants"]["gguf:UD"] = entry

    edit(plain / "Tiny-GGUF" / MANIFEST, other)
    (card,) = write_cards(plain / "Tiny-GGUF", dataclasses.replace(OPTIONS, repo="ORG/Tiny-GGUF"))
    text = card.read_text()
    assert "--to gguf:BF16 --recipe UD.yaml" in text
    assert "--to gguf:Q8_0 " in text
    assert yaml.safe_load(blocks(card, "yaml")[0])["tensor-type"] == ["attn_v=Q8_0"]
    assert "Importance matrix of `Q8_0`: `x.gguf`, over `calibration.txt`, 100 chunks, 7 tensors" in text
    assert "imatrix" in front(card)["tags"]
    assert "/home/me" not in text


def test_a_matrix_that_is_published_too_is_linked(plain: Path) -> None:
    (plain / "x.gguf").write_bytes(b"sums")
    record = {"file": "x.gguf", "sha256": hashlib.sha256(b"sums").hexdigest(), "datasets": [], "chunks": 100}

    def calibrated(manifest: dict[str, Any]) -> None:
        manifest["variants"]["gguf:Q8_0"]["options"]["imatrix"] = record

    edit(plain / "Tiny-GGUF" / MANIFEST, calibrated)
    (card,) = write_cards(plain / "Tiny-GGUF", OPTIONS)
    assert "Importance matrix of `Q8_0`: [x.gguf](x.gguf), 100 chunks; SHA-256" in card.read_text()


# The report beside the card


def test_nothing_published_names_a_folder_of_this_machine(cards: Path, report: Report) -> None:
    paths = [variant.path for variant in report.variants] + [report.comparison.original.model.path]
    folders = {str(Path(path).parent) for path in paths} | {str(cards), str(Path.home()), str(Path.cwd())}
    count = 0
    for path in (path for name in ("Tiny-GGUF", "Tiny-FP8-dynamic") for path in (cards / name).rglob("*")):
        if path.suffix in (".md", ".html", ".json", ".svg", ".png"):
            count += 1
            data = path.read_bytes()
            assert not [folder for folder in folders if folder.encode() in data], path
    assert count > 20


def test_the_published_report_is_the_report(cards: Path, report: Report) -> None:
    public = read_report(cards / "Tiny-GGUF" / "report")
    assert [variant.path for variant in public.variants] == [Path(variant.path).name for variant in report.variants]
    for mine, theirs in zip(report.variants, public.variants, strict=True):
        one, other = report.measured(mine), public.measured(theirs)
        assert one is not None
        assert other is not None
        assert one.overall == other.overall
    assert public.gate_results == report.gate_results
    assert report_bytes(public_report(public)) == report_bytes(public)


def test_folders_are_taken_out_of_every_text(report: Report) -> None:
    place = str(Path(report.variants[0].path).parent)
    said = f"{place}/x.gguf, tensor 'a', not {Path.home()}/y, but /elsewhere{place}/z and {place.lstrip('/')}/w"
    problem = Problem("block", "error", said, where=f"{place}/x.gguf")
    first, *others = report.variants
    changed = (dataclasses.replace(first, problems=(problem,)), *others)
    command = ("streamquant", "validate", f"{place}/x", "--out=a/b", "--text", "c/d.txt")
    public = public_report(dataclasses.replace(report, variants=changed, command=command))
    (found,) = public.variants[0].problems
    assert found.what == f"x.gguf, tensor 'a', not y, but /elsewhere{place}/z and {place.lstrip('/')}/w"
    assert found.where == "x.gguf"
    assert public.command == ("streamquant", "validate", "x", "--out=b", "--text", "d.txt")


def test_variants_of_one_name_keep_apart(report: Report) -> None:
    first, second, *_ = report.comparison.variants
    moved = [dataclasses.replace(result, model=dataclasses.replace(result.model, path=f"/{place}/M.gguf"))
             for result, place in ((first, "a"), (second, "b"))]  # fmt: skip
    variants = [dataclasses.replace(variant, path=result.model.path)
                for variant, result in zip(report.variants, moved, strict=False)]  # fmt: skip
    comparison = dataclasses.replace(report.comparison, variants=tuple(moved))
    public = public_report(dataclasses.replace(report, variants=tuple(variants), comparison=comparison))
    found = [public.measured(variant) for variant in public.variants]
    assert [result and result.overall for result in found] == [first.overall, second.overall]


# README.md that is somebody's


def test_the_copied_base_card_is_kept_and_read_again(plain: Path) -> None:
    folder = plain / "Tiny-FP8-dynamic"
    options = dataclasses.replace(OPTIONS, repo="ORG/Tiny-FP8-dynamic")
    (card,) = write_cards(folder, options)
    assert (folder / BASE_CARD).read_text() == BASE
    once = card.read_bytes()
    assert MARK in card.read_text().splitlines()
    write_cards(folder, options)
    assert card.read_bytes() == once
    assert (folder / BASE_CARD).read_text() == BASE


def test_a_readme_that_is_not_ours_is_left_alone(plain: Path) -> None:
    for name in ("Tiny-GGUF", "Tiny-FP8-dynamic"):
        mine = plain / name / CARD
        mine.write_text("# Mine\n")
        with pytest.raises(UsageError, match="not by streamquant"):
            write_cards(plain, OPTIONS)
        assert mine.read_text() == "# Mine\n"
        assert not (plain / "Tiny-FP8-dynamic" / BASE_CARD).exists()
        write_cards(plain / name, dataclasses.replace(OPTIONS, force=True, repo=None))
        assert MARK in mine.read_text()
        if name == "Tiny-GGUF":
            mine.unlink()
    assert (plain / "Tiny-FP8-dynamic" / BASE_CARD).read_text() == "# Mine\n"


def test_an_old_readme_is_a_copy_only_where_convert_copies_one(plain: Path) -> None:
    fp8, gguf = plain / "Tiny-FP8-dynamic" / CARD, plain / "Tiny-GGUF" / CARD
    shutil.copy2(fp8, gguf)  # as old as the manifest
    with pytest.raises(UsageError, match="not by streamquant"):
        write_cards(gguf.parent, dataclasses.replace(OPTIONS, repo="ORG/T"))
    shutil.copy2(fp8, fp8.with_name(BASE_CARD))
    with pytest.raises(UsageError, match="not by streamquant"):
        write_cards(fp8.parent, dataclasses.replace(OPTIONS, repo="ORG/T"))


def test_the_originals_own_text_may_be_replaced_at_any_age(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / CARD).write_text(BASE)
    card = plain / "Tiny-FP8-dynamic" / CARD
    card.write_text(BASE)  # now
    options = dataclasses.replace(OPTIONS, repo="ORG/T")
    with pytest.raises(UsageError, match="not by streamquant"):
        write_cards(card.parent, options)
    write_cards(card.parent, dataclasses.replace(options, source=source))
    assert MARK in card.read_text()


# The command line


def test_the_command_writes_the_cards(plain: Path) -> None:
    runner = CliRunner()
    arguments = ["card", str(plain), "--repo", "ORG/Tiny", "--base-model", "A/B", "--no-prompts"]
    done = runner.invoke(command_line.app, arguments)
    assert done.exit_code == 0, done.output
    assert [Path(line).name for line in done.output.split()] == [CARD, CARD]
    assert all((plain / name / CARD).is_file() for name in ("Tiny-GGUF", "Tiny-FP8-dynamic"))
