"""A whole release in one YAML file: source, variants, importance matrix, validation, cards, push.

model: NousResearch/Hermes-4-14B@main     # a folder, or ORG/NAME[@REVISION] on the Hub
out: variants                             # paths are relative to the folder of this file
variants: [fp8-dynamic, "gguf:Q8_0,Q4_K_M", {recipe: my.yaml}]
split_max_size: 45G                       # optional, as all that follows: the options of `convert`
imatrix: {text: [calibration.txt], chunks: 100}        # or {file: some.imatrix.gguf}
verify: {source: false}                   # read back what was written; with source every byte
validate: {text: [wiki.test.raw], chunks: 20, gates: {max_mean_kld: 0.1}}
card: {quantized_by: me}
push: {repo: me/Hermes-4-14B, private: true}

Keys are the options of the commands without their hyphens in front; `max_mean_kld` and `max-mean-kld` are the same.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from streamquant.convert.options import RELEASE_KEYS, ConversionOptions, RunOptions, read_options
from streamquant.convert.recipes.recipe import Recipe, parse_variants
from streamquant.convert.recipes.recipe_file import read_recipe
from streamquant.files.machine import usable_cores
from streamquant.files.strict_yaml import read_yaml
from streamquant.hub.reference import ModelReference, parse_reference
from streamquant.publish.cards.options import CardOptions
from streamquant.publish.release.table import Table, key, keys_of, nearest, one_of, some_of
from streamquant.publish.upload.options import PushOptions
from streamquant.quant.errors import UsageError
from streamquant.validate.gates import GATES, Gates, parse_gates
from streamquant.validate.sections import ANSWER_TOKENS, FOLDER_ENGINES, SKIPPABLE

StageName = Literal["plan", "imatrix", "convert", "verify", "validate", "card", "push"]
STAGES: tuple[StageName, ...] = ("plan", "imatrix", "convert", "verify", "validate", "card", "push")
"""In their order."""
DTYPES = ("bf16", "f32")
NOISES = ("dtype", "batch")
KEYS = (
    *("model", "out", "variants", *RELEASE_KEYS, "spool_gib", "jobs", "device"),
    *("imatrix", "verify", "validate", "card", "push"),
)
"""Of the file itself."""


def _gates(table: Table, name: str) -> Gates | None:
    gates = table.within(name, tuple(GATES))
    return None if gates is None else parse_gates(gates.hyphenated(GATES), gates.where)


@dataclass(frozen=True, slots=True)
class ReleaseImatrix:
    """An importance matrix: a file that is there, or texts to compute it over."""

    file: Path | None = key(Table.path)
    text: tuple[Path, ...] = key(Table.paths, ())
    context: int = key(partial(Table.count, least=2), 512)
    chunks: int | None = key(Table.count)
    save_every: int | None = key(Table.count)
    parse_special: bool = key(Table.flag, False)
    dtype: str | None = key(one_of(DTYPES))
    include_weights: tuple[str, ...] = key(Table.texts, ())
    exclude_weights: tuple[str, ...] = key(Table.texts, ())


@dataclass(frozen=True, slots=True)
class ReleaseVerify:
    """How variants are verified."""

    source: bool = key(Table.flag, False)
    """Encode the source again, and compare every byte."""


@dataclass(frozen=True, slots=True)
class ReleaseValidate:
    """The options of `validate`."""

    report: Path
    """The folder of the report."""
    text: tuple[Path, ...] = key(Table.paths, ())
    gates: Gates = key(_gates, Gates())
    context: int = key(partial(Table.count, least=2), 512)
    chunks: int | None = key(Table.count)
    dtype: str | None = key(one_of(DTYPES))
    skip: tuple[str, ...] = key(some_of(SKIPPABLE), ())
    noise: tuple[str, ...] = key(some_of(NOISES), ("batch",))
    weights_only: bool = key(Table.flag, False)
    answer_tokens: int = key(Table.count, ANSWER_TOKENS)
    engine: str | None = key(one_of(FOLDER_ENGINES))
    cache: bool = key(Table.switch, True)


@dataclass(frozen=True, slots=True)
class ReleasePush:
    """Where variants are published, and how."""

    repo: str
    """ORG/NAME: the name, or the stem that -GGUF and the like are added to."""
    options: PushOptions


PUSH = ("repo", "private", "revision", "create_pr", "without_report")
CARD = ("quantized_by", "base_model")
STAGE_KEYS: Mapping[str, tuple[str, ...]] = {
    "imatrix": keys_of(ReleaseImatrix),
    "verify": keys_of(ReleaseVerify),
    "validate": ("report", *keys_of(ReleaseValidate)),
    "card": CARD,
    "push": PUSH,
}
"""Stage -> the keys of its table."""


@dataclass(frozen=True, slots=True)
class ReleaseFile:
    """What the file says, with absolute paths."""

    path: Path
    model: str
    """A folder, or ORG/NAME[@REVISION]."""
    out: Path
    recipes: tuple[Recipe, ...]
    options: ConversionOptions = field(default_factory=ConversionOptions)
    """But for the importance matrix, which may have to be made first."""
    spool_gib: float | None = None
    device: str = "auto"
    jobs: int | None = None
    imatrix: ReleaseImatrix | None = None
    verify: ReleaseVerify | None = None
    validate: ReleaseValidate | None = None
    card: CardOptions | None = None
    push: ReleasePush | None = None

    @property
    def stages(self) -> tuple[StageName, ...]:
        """The stages that the file asks for, in their order."""
        return tuple(stage for stage in STAGES if stage in ("plan", "convert") or getattr(self, stage) is not None)

    @property
    def run_options(self) -> RunOptions:
        """How its conversion runs."""
        return RunOptions(self.jobs or usable_cores(), self.device, self.spool_gib)


def read_release(path: Path) -> ReleaseFile:
    """Read the file of a release. Raises UsageError, which names the place, if it breaks a rule."""
    return parse_release(read_yaml(path), path.absolute())


def parse_release(record: object, path: Path) -> ReleaseFile:
    """What the YAML holds -> the release; paths in it are relative to the folder of `path`. Raises UsageError."""
    table = Table(record, str(path), path.parent, KEYS)
    out = table.path("out") or path.parent / "variants"
    recipes = _recipes(table)
    verify = table.within("verify", STAGE_KEYS["verify"])
    found = ReleaseFile(
        path=path,
        model=_model(table),
        out=out,
        recipes=recipes,
        options=read_options(table.part(RELEASE_KEYS), recipes),
        spool_gib=table.number("spool_gib"),
        device=_device(table) or "auto",
        jobs=table.count("jobs"),
        imatrix=_imatrix(table.within("imatrix", STAGE_KEYS["imatrix"])),
        verify=None if verify is None else verify.record(ReleaseVerify),
        validate=_validate(table.within("validate", STAGE_KEYS["validate"]), out),
        card=_card(table.within("card", STAGE_KEYS["card"])),
        push=_push(table.within("push", STAGE_KEYS["push"])),
    )
    if found.push is not None and not found.push.options.without_report and found.validate is None:
        raise UsageError(
            "a push without validation",
            where=f"{path}, push",
            required="`validate`: what was not measured is not published",
            hint="add `validate`, or set `push.without_report: true`",
        )
    return found


def stage_name(text: str, option: str) -> StageName:
    """A stage by name. Raises UsageError, which proposes the nearest."""
    if text not in STAGES:
        raise UsageError(
            "no such stage", where=option, found=text, required=", ".join(STAGES), hint=nearest(text, STAGES)
        )
    return text


# The parts


def _model(table: Table) -> str:
    text = table.text("model")
    if text is None:
        raise UsageError("no model", where=table.at("model"), required="a folder, or ORG/NAME[@REVISION] on the Hub")
    folder = table.base / Path(text).expanduser()
    return str(folder) if folder.exists() or parse_reference(text) is None else text


def _recipes(table: Table) -> tuple[Recipe, ...]:
    """`variants`: names as after --to, and tables {recipe: FILE}."""
    listed = table.take("variants")
    if not isinstance(listed, list) or not listed:
        where, required = table.at("variants"), "a list of variants: fp8-dynamic, gguf:Q8_0, {recipe: FILE} ..."
        raise UsageError("no variants", where=where, found=f"{listed!r:.200}", required=required)
    specs, files = [], []
    for number, item in enumerate(listed, 1):
        where = f"{table.at('variants')}, entry {number}"
        if isinstance(item, str):
            specs.append(item)
        else:
            path = Table(item, where, table.base, ("recipe",)).path("recipe")
            if path is None:
                raise UsageError("no recipe", where=where, required="{recipe: FILE}")
            files.append(read_recipe(path))
    return tuple(parse_variants(specs, files))


def _device(table: Table) -> str | None:
    """auto, cpu or cuda, which may have a number."""
    text = table.text("device")
    if text is None or re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        return text
    raise table.wrong("device", text, "auto, cpu, cuda", nearest(text, ("auto", "cpu", "cuda")))


def _imatrix(table: Table | None) -> ReleaseImatrix | None:
    if table is None:
        return None
    found = table.record(ReleaseImatrix)
    if (found.file is None) == (not found.text):
        raise UsageError(
            "no importance matrix" if found.file is None else "two importance matrices",
            where=table.where,
            required="`text`, to compute one, or `file`, to use one",
        )
    return found


def _validate(table: Table | None, out: Path) -> ReleaseValidate | None:
    if table is None:
        return None
    found = table.record(ReleaseValidate, report=table.path("report") or out / "report")
    if not found.text:
        raise UsageError("no text to measure on", where=table.at("text"), required="a list of UTF-8 texts")
    return found


def _card(table: Table | None) -> CardOptions | None:
    if table is None:
        return None
    return CardOptions(quantized_by=table.text("quantized_by"), base_model=table.text("base_model"))


def _push(table: Table | None) -> ReleasePush | None:
    if table is None:
        return None
    repo = table.text("repo")
    if repo is None or parse_reference(repo) != ModelReference(repo):
        required = "ORG/NAME: the name, or the stem that -GGUF and the like are added to"
        raise UsageError("not a repository", where=table.at("repo"), found=repr(repo), required=required)
    options = PushOptions(
        private=table.flag("private"),
        revision=table.text("revision"),
        create_pr=table.flag("create_pr"),
        without_report=table.flag("without_report"),
    )
    return ReleasePush(repo, options)
