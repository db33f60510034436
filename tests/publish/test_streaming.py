"""convert --push through the command line, and what is refused before anything is read."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from streamquant.convert.conversion import disk_of
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.publish.upload import limits
from streamquant.publish.upload import push as push_module
from streamquant.publish.upload.options import ROOM, EarlyPush, PushOptions, early_push
from streamquant.quant.errors import UsageError
from tests.attacks.harness import run
from tests.conftest import TINY_PRE
from tests.hub import Hub

TO = ("--to", "fp8-dynamic", "--to", "gguf:Q8_0,Q4_0", "--pre", TINY_PRE)
REFRESH_CARD = push_module.refresh_card  # which the fixture `hub` replaces
WEIGHTS = (".gguf", ".safetensors")


def weights_of(out: Path) -> list[str]:
    return sorted(path.name for path in out.rglob("*") if path.suffix in WEIGHTS)


def test_options_without_a_push() -> None:
    nothing = PushOptions()
    assert early_push(None, nothing, delete=False) is None
    for options in (PushOptions(private=True), PushOptions(without_report=True), PushOptions(revision="v2")):
        with pytest.raises(UsageError, match="without an upload"):
            early_push(None, options, delete=False)
    with pytest.raises(UsageError, match="without an upload"):
        early_push(None, nothing, delete=True)
    with pytest.raises(UsageError, match="there is no report yet"):
        early_push("ORG/Tiny", nothing, delete=False)
    options = PushOptions(private=True, revision="v2")
    assert early_push("ORG/Tiny", options, delete=True) == EarlyPush("ORG/Tiny", options, delete=True)


def test_uploads_never_need_more_disk(tiny: Path) -> None:
    plan = make_plan(open_checkpoint(tiny), parse_variants(["gguf:Q8_0"]), ConversionOptions(pre=TINY_PRE))
    kept, gone = (disk_of(plan, RunOptions(jobs=2), room) for room in (None, ROOM))
    assert not kept.delivered
    assert gone.delivered
    assert kept.peak == plan.nbytes
    assert gone.peak <= kept.peak


def test_a_plan_says_what_the_hub_would_refuse(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("plan", tiny, "--to", "gguf:Q8_0", "--pre", TINY_PRE)
    monkeypatch.setattr(limits, "CUSTOM", 1000)
    assert "by custom" not in run(*command).done().out
    assert "by custom" in run(*command, "--delete-after-upload").done().out
    defaults = limits.check_plan.__kwdefaults__ or {}
    monkeypatch.setitem(defaults, "limit", 200_000)
    run(*command, "--delete-after-upload").refused(1, "larger than the Hub takes", "--split-max-size")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own, of httpx
def test_convert_and_push_twice(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    hub.add_repo("ORG/Tiny", tiny)
    out = tmp_path / "out"
    command = ("convert", tiny, *TO, "--out", out, "--push", "ORG/Tiny", "--private", "--delete-after-upload")
    run(*command).done()
    assert weights_of(out) == [], "deleted as they were uploaded"
    held = {name: hub.repo(f"ORG/Tiny-{name}").files("main") for name in ("GGUF", "FP8-dynamic")}
    assert {"Tiny-Q8_0.gguf", "Tiny-Q4_0.gguf", "README.md", "streamquant.json"} <= held["GGUF"].keys()
    assert {"config.json", "README.md", "tokenizer.json"} <= held["FP8-dynamic"].keys()
    sent, commits = hub.uploaded_bytes, len(list(hub.repo("ORG/Tiny-GGUF").history()))
    again = run(*command).done()
    assert "was done already" in again.out
    assert hub.uploaded_bytes == sent
    assert len(list(hub.repo("ORG/Tiny-GGUF").history())) == commits
    assert hub.leaked_tokens() == []


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_cards_know_the_original_when_the_files_are_gone(
    hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_module, "refresh_card", REFRESH_CARD)
    model, out = shutil.copytree(tiny, tmp_path / "Tiny"), tmp_path / "out"
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [de]\n---\n# Tiny\n")
    to = ("--to", "gguf:Q8_0", "--pre", TINY_PRE)
    run("convert", model, *to, "--out", out, "--push", "ORG/Tiny", "--private", "--delete-after-upload").done()
    card = ModelCard(hub.repo("ORG/Tiny-GGUF").files("main")["README.md"].decode())
    assert (card.data.get("license"), card.data.get("language")) == ("apache-2.0", ["de"])
