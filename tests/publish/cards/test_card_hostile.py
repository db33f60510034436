"""Cards of strangers' names, texts, base cards and templates: they come out as text, or are refused."""

import dataclasses
import html.parser
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import markdown_it
import pytest

import streamquant
from streamquant.convert.manifest import MANIFEST
from streamquant.publish.cards import prompts
from streamquant.publish.cards.base_card import BaseCard, read_base_card
from streamquant.publish.cards.card import write_cards
from streamquant.publish.cards.origin import Template
from streamquant.publish.cards.prompts import prompt_format
from streamquant.publish.results import CARD
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.engines.process import TimeLimits
from streamquant.validate.report.data import Report, write_report
from tests.publish.cards.contents import (
    HOSTILE,
    OPTIONS,
    PROGRAMS,
    blocks,
    edit,
    front,
    tokens,
)

# Hostile input


def write_base(folder: Path, front_matter: str) -> Path:
    path = folder / "base.md"
    path.write_text(f"---\n{front_matter}\n---\n# x\n")
    return path


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("license: mit", BaseCard(license=("mit",))),
        ("license:\tapache-2.0\ntags:\n\t- x", BaseCard(license=("apache-2.0",), tags=("x",))),  # as gguf-py reads it
        ("license: [mit, apache-2.0]", BaseCard(license=("mit", "apache-2.0"))),
        ("language: no", BaseCard(language=("no",))),
        ("language: [no, en, 'x y', '<b>']", BaseCard(language=("no", "en"))),
        ('license: "mit\\n---\\nevil: 1"', BaseCard()),
        ("license: |\n  mit\n  ---\n  evil: 1", BaseCard()),
        ("license: '<script>'", BaseCard()),
        ("license: {a: b}", BaseCard()),
        ("license_name: a|b", BaseCard()),
        ("license_link: javascript:alert(1)", BaseCard()),
        ("license_link: ../../etc/passwd", BaseCard()),
        ("license_link: a/../../etc/passwd", BaseCard()),
        ("license_link: https://example.org/a", BaseCard(license_link="https://example.org/a")),
        ("license_link: https://example.org/<b>", BaseCard()),
        ("tags: [a, a, b c, 'd\u202e', '![x](//e)', {e: f}, 3]", BaseCard(tags=("a", "b c", "3"))),
        (f"tags: [{'x' * 200}]", BaseCard()),
        (f"tags: [{', '.join(f't{n}' for n in range(500))}]", BaseCard(tags=tuple(f"t{n}" for n in range(64)))),
        ("", BaseCard()),
        ("# nothing", BaseCard()),
    ],
)
def test_only_values_of_their_shape_come_out_of_a_base_card(text: str, card: BaseCard, tmp_path: Path) -> None:
    assert read_base_card(write_base(tmp_path, text)) == card


@pytest.mark.parametrize(
    "text",
    [
        'license: !!python/object/apply:os.system ["touch /tmp/x"]',
        "license: !!str mit",
        "a: &a [x]\nlicense: *a",
        "a: &a [x]",
        "license: [",
        "- a\n- b",
        "just text",
        "a: " + "[" * 5000,
        "license: mit\n\tb: c",
        "a: \x00",
    ],
)
def test_tricks_of_yaml_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(StreamquantError, match="broken model card") as caught:
        read_base_card(write_base(tmp_path, text))
    assert "base.md" in str(caught.value)


@pytest.mark.parametrize("text", ["title: My model: the best", "a: &a [x]", "- a\n- b"])
def test_a_plan_says_that_the_card_will_be_refused(text: str, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / tiny.name))
    (folder / "README.md").write_text(f"---\n{text}\n---\n")
    warned = [note for note in streamquant.plan(folder, to=["fp8-dynamic"]).notes if "README.md" in note]
    assert len(warned) == 1
    assert warned[0].startswith("WARNING: README.md: broken model card (")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert not [note for note in streamquant.plan(folder, to=["fp8-dynamic"]).notes if "README.md" in note]


def test_front_matter_without_an_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.md"
    path.write_text("---\n" + "a: b\n" * 100_000 + "---\n")
    with pytest.raises(StreamquantError, match="broken model card"):
        read_base_card(path)
    path.write_text("# no front matter\n---\na: b\n---\n")
    assert read_base_card(path) == BaseCard()
    path.write_bytes(b"---\r\nlicense: mit\r\n---\r\n\xff")
    assert read_base_card(path).license == ("mit",)


class Page(html.parser.HTMLParser):
    """Tags of a page, and where its links go."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.cells: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag == "tr":
            self.cells.append(0)
        if tag in ("td", "th"):
            self.cells[-1] += 1


def test_names_and_texts_of_strangers_come_out_as_text(out: Path, report: Report) -> None:
    def hostile(record: dict[str, Any]) -> None:
        record["model"] = record["source"]["name"] = record["source"]["architecture"] = HOSTILE
        entry = record["variants"]["gguf:Q8_0"]
        entry["description"] = HOSTILE
        entry["recipe"] = {"label": "UD", "base": "Q4_K_M", "note": HOSTILE, "tensors": {HOSTILE: "Q8_0"}}
        entry["versions"] = {HOSTILE: HOSTILE}
        entry["options"] |= {"name": HOSTILE, "pre": HOSTILE, "metadata": {HOSTILE: HOSTILE}}
        entry["options"]["overrides"] = {"tensor-type": [f"{re.escape(HOSTILE)}=Q8_0"]}
        entry["options"]["imatrix"] = {"file": HOSTILE, "sha256": HOSTILE, "datasets": [HOSTILE], "chunks": 3}
        entry["tensors"][0]["format"] = HOSTILE
        record["variants"][f"gguf:{HOSTILE}"] = record["variants"].pop("gguf:Q8_0")

    edit(out / "Tiny-GGUF" / MANIFEST, hostile)
    comparison = dataclasses.replace(report.comparison, files=tuple(
        dataclasses.replace(file, path=Path(HOSTILE)) for file in report.comparison.files
    ))  # fmt: skip
    write_report(dataclasses.replace(report, comparison=comparison, command=(HOSTILE,)), out / "report")
    options = dataclasses.replace(OPTIONS, repo=None, quantized_by="<b>: |`x` # y", base_model=None)
    (card,) = write_cards(out / "Tiny-GGUF", options)
    assert front(card)["quantized_by"] == "<b>: |`x` # y"
    text = card.read_text()
    assert not {letter for letter in text if letter in "\u202e\x1b"}
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    page = Page(markdown_it.MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(body))
    assert page.tags <= {
        *("h1", "h2", "p", "a", "ul", "li", "strong", "em", "code", "pre", "blockquote", "br", "img", "details"),
        *("summary", "table", "thead", "tbody", "tr", "th", "td"),
    }
    allowed = re.compile(r"#measurements|report/[\w./-]+|Tiny-[\w.-]+\.gguf")
    assert [link for link in page.links if not allowed.fullmatch(link)] == []
    assert set(page.cells) == {8, 7, 2}
    assert all(shlex.split(block)[0] in PROGRAMS for block in blocks(card, "bash"))


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["variants"].update({f"gguf:{HOSTILE}": record["variants"].pop("gguf:Q4_K_M")}),
        lambda record: record["variants"]["gguf:Q8_0"].update(recipe={"label": HOSTILE, "base": "Q4_K_M"}),
        lambda record: record["variants"]["gguf:Q8_0"].update(recipe={"label": "x", "note": HOSTILE}),
        lambda record: record["variants"]["gguf:Q8_0"]["options"].update(overrides={"tensor-type": [HOSTILE]}),
        lambda record: record["variants"]["gguf:Q8_0"]["options"].update(
            imatrix={"file": "x", "sha256": "x", "chunks": HOSTILE}
        ),
    ],
)
def test_what_cannot_have_made_a_variant_is_refused(plain: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(plain / "Tiny-GGUF" / MANIFEST, change)
    with pytest.raises(StreamquantError, match="broken manifest") as caught:
        write_cards(plain / "Tiny-GGUF", OPTIONS)
    assert not {letter for letter in str(caught.value) if letter in "\u202e\x1b"}


@pytest.mark.parametrize("option", ["base_model", "repo"])
@pytest.mark.parametrize("name", ["x", "a/b/c", "../b", "a/b\nc", "a/<b>", "a/" + "b" * 100, "-a/b", "a/b--c"])
def test_names_of_repositories_are_checked(plain: Path, option: str, name: str) -> None:
    settings: dict[str, Any] = {option: name}
    with pytest.raises(UsageError):
        write_cards(plain / "Tiny-GGUF", dataclasses.replace(OPTIONS, **settings))
    assert not (plain / "Tiny-GGUF" / CARD).exists()


def test_a_makers_name_is_a_line(plain: Path) -> None:
    for name in ("", " ", "a\nb", "a\u202eb", "x" * 101):
        with pytest.raises(UsageError, match="not a name"):
            write_cards(plain, dataclasses.replace(OPTIONS, quantized_by=name))


# Templates


def render(text: str, path: Path) -> prompts.PromptFormat:
    return prompt_format(Template(path, text, {"bos_token": "<s>"}))


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ bos_token.__init__.__globals__ }}"
    found = render(escape, tmp_path)
    assert found.prompts == ()
    assert len(found.faults) == 2
    assert all("SecurityError" in fault or "unsafe" in fault for fault in found.faults)
    assert found.thinking is None


def test_a_template_that_does_not_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "LIMITS", TimeLimits(request=2.0))
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(StreamquantError, match="the chat template cannot be shown") as caught:
        render(endless, tmp_path)
    assert "--no-prompts" in str(caught.value)


def test_what_a_template_writes_stays_in_its_block(plain: Path, tmp_path: Path) -> None:
    text = "````\n</details><script>x</script>\n~~~\n\u202e\x1b|{{ messages[-1]['content'] }}"
    folder = plain / "Tiny-FP8-dynamic"
    edit(folder / "tokenizer_config.json", lambda r: r.update(chat_template=text))
    (card,) = write_cards(folder, dataclasses.replace(OPTIONS, repo="ORG/T", prompts=True))
    assert "\u202e" not in card.read_text()
    blocks_of_text = blocks(card, "text")
    assert blocks_of_text[0] == "````\n</details><script>x</script>\n~~~\n\\u202e\\x1b|{prompt}\n"
    assert "script" not in "".join(token.content for token in tokens(card) if token.type == "html_block")


def test_long_and_broken_renderings_are_told(tmp_path: Path) -> None:
    long = "{% if messages | length > 1 %}{{ raise_exception('no system | role') }}{% endif %}{{ 'x' * 30000 }}"
    found = render(long, tmp_path)
    assert found.prompts == ()
    assert any("no system | role" in fault for fault in found.faults)
    assert any("too long to show" in fault for fault in found.faults)
