"""The whole road of a release in one YAML file: source, variants, importance matrix, validation, cards, push.

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

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from streamquant.convert.options import RELEASE_KEYS, ConversionOptions, read_options
from streamquant.convert.recipes.recipe import Recipe, parse_variants
from streamquant.convert.recipes.recipe_file import read_recipe
from streamquant.files.sizes import parse_size
from streamquant.files.strict_yaml import read_yaml
from streamquant.hub.repo import parse_spec
from streamquant.quant.errors import UsageError
from streamquant.validate.gates import GATES, Gates, parse_gates
from streamquant.validate.sections import ANSWER_TOKENS, SKIPPABLE

Stage = Literal["plan", "imatrix", "convert", "verify", "validate", "card", "push"]
STAGES: tuple[Stage, ...] = ("plan", "imatrix", "convert", "verify", "validate", "card", "push")
"""In their order."""
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("bf16", "f32")
NOISES = ("dtype", "batch")
KEYS = ("model", "out", "variants", *RELEASE_KEYS, "spool_gib", "jobs", "device", *STAGES[1:2], *STAGES[3:])
"""Of the file itself."""


@dataclass(frozen=True, slots=True)
class ImatrixStage:
    """An importance matrix: a file that is there, or texts to compute it over."""

    file: Path | None = None
    text: tuple[Path, ...] = ()
    context: int = 512
    chunks: int | None = None
    save_every: int | None = None
    dtype: str | None = None
    include_weights: tuple[str, ...] = ()
    exclude_weights: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VerifyStage:
    """Whether the source is encoded again and every byte compared."""

    source: bool = False


@dataclass(frozen=True, slots=True)
class ValidateStage:
    """The options of `validate`; `report` is the folder of the report."""

    report: Path
    text: tuple[Path, ...]
    gates: Gates = field(default_factory=Gates)
    context: int = 512
    chunks: int | None = None
    dtype: str | None = None
    skip: tuple[str, ...] = ()
    noise: tuple[str, ...] = ("batch",)
    weights_only: bool = False
    answer_tokens: int = ANSWER_TOKENS
    cache: bool = True


@dataclass(frozen=True, slots=True)
class CardStage:
    """The options of `card`."""

    quantized_by: str | None = None
    base_model: str | None = None


@dataclass(frozen=True, slots=True)
class PushStage:
    """The options of `push`."""

    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    without_report: bool = False


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
    imatrix: ImatrixStage | None = None
    verify: VerifyStage | None = None
    validate: ValidateStage | None = None
    card: CardStage | None = None
    push: PushStage | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that the file asks for, in their order."""
        return tuple(stage for stage in STAGES if stage in ("plan", "convert") or getattr(self, stage) is not None)


def read_release(path: Path) -> ReleaseFile:
    """Read the file of a release. Raises UsageError, which names the place, if it breaks a rule."""
    return parse_release(read_yaml(path), path.absolute())


def parse_release(record: object, path: Path) -> ReleaseFile:
    """What the YAML holds -> the release; paths in it are relative to the folder of `path`. Raises UsageError."""
    table = _Table(record, str(path), path.parent, KEYS)
    out = table.path("out") or path.parent / "variants"
    stages = {
        "imatrix": _imatrix(table.table("imatrix", _fields(ImatrixStage))),
        "verify": _verify(table.table("verify", _fields(VerifyStage))),
        "validate": _validate(table.table("validate", _fields(ValidateStage)), out),
        "card": _card(table.table("card", _fields(CardStage))),
        "push": _push(table.table("push", _fields(PushStage))),
    }
    recipes = _recipes(table)
    found = ReleaseFile(
        path=path,
        model=_model(table),
        out=out,
        recipes=recipes,
        options=read_options(table.part(RELEASE_KEYS), recipes),
        spool_gib=table.number("spool_gib"),
        device=table.choice("device", DEVICES) or "auto",
        jobs=table.count("jobs"),
        **stages,  # type: ignore[arg-type] # each is of the field's own type
    )
    if found.push is not None and not found.push.without_report and found.validate is None:
        raise UsageError(
            "a push without validation",
            where=f"{path}, push",
            required="`validate`: what was not measured is not published",
            hint="add `validate`, or set `push.without_report: true`",
        )
    return found


def stage_name(text: str, option: str) -> Stage:
    """A stage by name. Raises UsageError, which proposes the nearest."""
    if text not in STAGES:
        raise UsageError(
            "no such stage", where=option, found=text, required=", ".join(STAGES), hint=_near(text, STAGES)
        )
    return text


# The tables


def _model(table: "_Table") -> str:
    text = table.text("model")
    if text is None:
        raise UsageError("no model", where=table.at("model"), required="a folder, or ORG/NAME[@REVISION] on the Hub")
    folder = table.base / Path(text).expanduser()
    return str(folder) if folder.exists() or parse_spec(text) is None else text


def _recipes(table: "_Table") -> tuple[Recipe, ...]:
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
            path = _Table(item, where, table.base, ("recipe",)).path("recipe")
            if path is None:
                raise UsageError("no recipe", where=where, required="{recipe: FILE}")
            files.append(read_recipe(path))
    return tuple(parse_variants(specs, files))


def _imatrix(table: "_Table | None") -> ImatrixStage | None:
    if table is None:
        return None
    found = ImatrixStage(
        file=table.path("file"),
        text=table.paths("text"),
        context=table.count("context", 2) or 512,
        chunks=table.count("chunks"),
        save_every=table.count("save_every"),
        dtype=table.choice("dtype", DTYPES),
        include_weights=table.texts("include_weights"),
        exclude_weights=table.texts("exclude_weights"),
    )
    if (found.file is None) == (not found.text):
        raise UsageError(
            "no importance matrix" if found.file is None else "two importance matrices",
            where=table.where,
            required="`text`, to compute one, or `file`, to use one",
        )
    return found


def _verify(table: "_Table | None") -> VerifyStage | None:
    return VerifyStage(table.flag("source")) if table is not None else None


def _validate(table: "_Table | None", out: Path) -> ValidateStage | None:
    if table is None:
        return None
    gates = table.table("gates", tuple(GATES))
    found = ValidateStage(
        report=table.path("report") or out / "report",
        text=table.paths("text"),
        gates=parse_gates(gates.hyphenated(GATES), gates.where) if gates is not None else Gates(),
        context=table.count("context", 2) or 512,
        chunks=table.count("chunks"),
        dtype=table.choice("dtype", DTYPES),
        skip=table.choices("skip", SKIPPABLE),
        noise=("batch",) if table.take("noise") is None else table.choices("noise", NOISES),
        weights_only=table.flag("weights_only"),
        answer_tokens=table.count("answer_tokens") or ANSWER_TOKENS,
        cache=table.flag("cache", True),
    )
    if not found.text:
        raise UsageError("no text to measure on", where=table.at("text"), required="a list of UTF-8 texts")
    return found


def _card(table: "_Table | None") -> CardStage | None:
    return CardStage(table.text("quantized_by"), table.text("base_model")) if table is not None else None


def _push(table: "_Table | None") -> PushStage | None:
    if table is None:
        return None
    repo = table.text("repo")
    if repo is None or parse_spec(repo) is None or "@" in repo:
        required = "ORG/NAME: the name, or the stem that -GGUF and the like are added to"
        raise UsageError("not a repository", where=table.at("repo"), found=repr(repo), required=required)
    flags = {name: table.flag(name) for name in ("private", "create_pr", "without_report")}
    return PushStage(repo, revision=table.text("revision"), **flags)


def _fields(stage: type) -> tuple[str, ...]:
    return tuple(stage.__dataclass_fields__)  # type: ignore[attr-defined] # it is a dataclass


class _Table:
    """A table of the file: its values by key, each checked for its kind; an unknown key is refused with the nearest."""

    def __init__(self, record: object, where: str, base: Path, known: Sequence[str]) -> None:
        if not isinstance(record, Mapping):
            required = f"a table of {', '.join(known)}"
            raise UsageError("not a table", where=where, found=f"{record!r:.100}", required=required)
        self.where, self.base = where, base
        self._values: dict[str, Any] = {}
        for key, value in record.items():
            name = str(key).replace("-", "_")
            if name not in known:
                hint = _near(name, known)
                required = f"of {', '.join(known)}"
                raise UsageError("unknown key", where=where, found=f"{key!r:.100}", required=required, hint=hint)
            if name in self._values:
                raise UsageError("a key is given twice", where=where, found=f"{key!r:.100}")
            self._values[name] = value

    def at(self, key: str) -> str:
        """The place of a value, for messages."""
        return f"{self.where}, {key}"

    def take(self, key: str) -> Any:
        """The value as it stands; None if there is none."""
        return self._values.get(key)

    def part(self, keys: Collection[str]) -> "_Table":
        """A table with some of the keys alone."""
        return _Table(
            {key: value for key, value in self._values.items() if key in keys}, self.where, self.base, [*keys]
        )

    def hyphenated(self, keys: Collection[str]) -> dict[str, Any]:
        """Those of the keys that are there, spelled as the options of the command line."""
        return {key.replace("_", "-"): value for key, value in self._values.items() if key in keys}

    def table(self, key: str, known: Sequence[str]) -> "_Table | None":
        """A table within; `{}` is one, no value is none."""
        value = self.take(key)
        return None if value is None else _Table(value, self.at(key), self.base, known)

    def text(self, key: str) -> str | None:
        """A text that is not empty."""
        found: str | None = self._of(key, str, "a text", lambda value: bool(value.strip()) and value.isprintable())
        return found

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        found: bool | None = self._of(key, bool, "true or false")
        return default if found is None else found

    def count(self, key: str, least: int = 1) -> int | None:
        """A whole number."""
        found: int | None = self._of(key, int, f"a whole number, {least} or more", lambda value: value >= least)
        return found

    def number(self, key: str) -> float | None:
        """A positive number."""
        value = self.take(key)
        required = "a positive number"
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._wrong(key, value, required)
        return float(value)

    def size(self, key: str) -> int | None:
        """Bytes, as a whole number or a text like 45G."""
        value = self.take(key)
        if value is None or (type(value) is int and value > 0):
            return value
        if not isinstance(value, str):
            raise self._wrong(key, value, "a size, like 45G")
        return parse_size(value, self.at(key))

    def choice(self, key: str, known: Sequence[str]) -> str | None:
        """One of some words; of devices also one by number."""
        value = self.text(key)
        numbered = key == "device" and value is not None and re.fullmatch(r"cuda:\d+", value)
        if value is None or value in known or numbered:
            return value
        raise self._wrong(key, value, ", ".join(known), _near(value, known))

    def choices(self, key: str, known: Sequence[str]) -> tuple[str, ...]:
        """A list of some words."""
        for value in (found := self.texts(key)):
            if value not in known:
                raise self._wrong(key, value, f"of {', '.join(known)}", _near(value, known))
        return found

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, or one alone."""
        value = self.take(key)
        listed = [] if value is None else value if isinstance(value, list) else [value]
        for item in listed:
            if not isinstance(item, str) or not item.strip():
                raise self._wrong(key, item, "a list of texts")
        return tuple(listed)

    def path(self, key: str) -> Path | None:
        """A path, made absolute."""
        value = self.text(key)
        return None if value is None else self.base / Path(value).expanduser()

    def paths(self, key: str) -> tuple[Path, ...]:
        """A list of paths, or one alone, made absolute."""
        return tuple(self.base / Path(value).expanduser() for value in self.texts(key))

    def _of(self, key: str, kind: type, required: str, rule: Any = lambda _value: True) -> Any:
        value = self.take(key)
        if value is None or (type(value) is kind and rule(value)):
            return value
        raise self._wrong(key, value, required)

    def _wrong(self, key: str, value: object, required: str, hint: str | None = None) -> UsageError:
        return UsageError("wrong value", where=self.at(key), found=f"{value!r:.100}", required=required, hint=hint)


def _near(name: str, known: Collection[str]) -> str | None:
    found = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"did you mean {found[0]}?" if found else None
