"""The options that decide what a conversion writes, and how it runs; docs/adding-an-option.md says how to add one.

All that other places need of an option is here: its argument on a command line, which is its key in a release file too,
its record in a manifest with the way back, its part in the fingerprint, and the words that repeat it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from streamquant.convert.recipes.calibration import Calibration, CalibrationRecord, read_calibration
from streamquant.convert.recipes.container import GGUF, Container
from streamquant.convert.recipes.imatrix import ImatrixRecord, ImportanceMatrix, read_imatrix
from streamquant.convert.recipes.overrides import NO_OVERRIDES, Overrides, parse_overrides, read_rules
from streamquant.convert.recipes.recipe import Recipe
from streamquant.convert.recipes.targets import parse_ignore
from streamquant.files.json_record import JsonRecord
from streamquant.files.machine import usable_cores
from streamquant.files.sizes import short_size
from streamquant.files.strict_json import read_json_object
from streamquant.quant.errors import UsageError


@dataclass(frozen=True, slots=True)
class Argument:
    """A value that users give: `--split-max-size 40G`, or `split_max_size: 40G` in a release file."""

    name: str
    type: type[str] | type[bool] | type[int] | type[Path] | type[list[str]]
    """On a command line: a text, a switch, a number from 1, a path, or texts (the option is repeatable)."""
    help: str
    in_release_file: bool = True

    @property
    def flag(self) -> str:
        """As on a command line.

        >>> Argument("split_max_size", str, "").flag
        '--split-max-size'
        """
        return f"--{self.name.replace('_', '-')}"


ARGUMENTS = (
    Argument("name", str, "Name of the model in file names. Default: the name of its folder."),
    Argument(
        "split_max_size", str, "Split GGUF files at this many bytes of tensors, e.g. 40G (decimal, as llama.cpp)."
    ),
    Argument("split_max_tensors", int, "Split GGUF files after this many tensors, as llama.cpp's converter does."),
    Argument("max_shard_size", str, "Largest shard of a checkpoint, e.g. 5G. Default: the shards of the source."),
    Argument("pre", str, "tokenizer.ggml.pre, if it cannot be derived from tokenizer.json."),
    Argument("metadata", Path, "JSON file of GGUF keys that override the model card (llama.cpp's --metadata)."),
    Argument("imatrix", Path, "Importance matrix of llama-imatrix, GGUF or .dat, for the GGUF variants.", False),
    Argument(
        "include_weights",
        list[str],
        "Use the importance matrix only for tensors with this in their names; repeatable.",
        False,
    ),
    Argument(
        "exclude_weights",
        list[str],
        "Do not use the importance matrix for tensors with this in their names; repeatable.",
        False,
    ),
    Argument("calibration", Path, "File of `streamquant calibrate`, for the variants that need one."),
    Argument(
        "tensor_type",
        list[str],
        "REGEX=TYPE: the type of GGUF tensors whose names match, like attn_v=q8_0; the first match counts.",
    ),
    Argument("tensor_type_file", Path, "File of REGEX=TYPE rules, separated by white space.", False),
    Argument("output_tensor_type", str, "GGML type of output.weight."),
    Argument("token_embedding_type", str, "GGML type of token_embd.weight."),
    Argument("pure", bool, "Use the file type's own format for every tensor, without a mix."),
    Argument("leave_output_tensor", bool, "Keep output.weight as it is in the source."),
    Argument(
        "ignore",
        list[str],
        "A module that safetensors variants leave unquantized, as compressed-tensors spells it: a name, or re:REGEX; "
        "repeatable.",
    ),
    Argument(
        "guard_template",
        bool,
        "Guard the chat template where bos_token may be undefined, or a reply may lack `</think>`.",
    ),
)
"""All of them, in the order of --help. In a release file a stage of its own makes the importance matrix."""
RELEASE_KEYS = tuple(argument.name for argument in ARGUMENTS if argument.in_release_file)


class Given(Protocol):
    """What a user gave, by the names of the arguments; a value that was not given is None, off or empty.

    Every method raises UsageError, which names the place, for a value of another kind.
    """

    @property
    def where(self) -> str | None:
        """The file, if there is one."""

    def at(self, key: str) -> str:
        """The place of a value, for messages."""

    def take(self, key: str) -> Any:
        """The value as it stands."""

    def text(self, key: str) -> str | None:
        """A text."""

    def flag(self, key: str) -> bool:
        """A switch."""

    def size(self, key: str) -> int | None:
        """Bytes, of a text like 40G."""

    def count(self, key: str) -> int | None:
        """A whole number, 1 or more."""

    def path(self, key: str) -> Path | None:
        """A path."""

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """What a user can choose besides the variants."""

    name: str | None = None
    """Name of the model in file names; default: the name of the source folder."""
    split_max_size: int | None = None
    """Largest number of tensor bytes in a GGUF file; None: one file."""
    split_max_tensors: int | None = None
    """Largest number of tensors in a GGUF file; None: any."""
    max_shard_size: int | None = None
    """Largest number of tensor bytes in a shard of a checkpoint; None: the shards of the source."""
    pre: str | None = None
    """tokenizer.ggml.pre, if it cannot be derived from tokenizer.json."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """GGUF keys that override what the model card says (llama.cpp's --metadata)."""
    imatrix: ImportanceMatrix | None = None
    """Weighs the columns of every quantized GGUF variant whose formats ask for it."""
    overrides: Overrides = NO_OVERRIDES
    """Formats of single tensors, for every GGUF variant that is not from a recipe file."""
    ignore: tuple[str, ...] = ()
    """Modules that quantized safetensors leave as they are, beside those that every one does; names, or re:PATTERN."""
    guard_template: bool = False
    """Put guards against known faults into chat templates (convert/metadata/guard_template.py)."""
    calibration: Calibration | None = None
    """What static scales are made of, for the variants that have some."""

    def record(self) -> dict[str, Any]:
        """As in a manifest; `parse_options` is the inverse."""
        # options that are younger than the manifest are only written where they are given: its bytes stay the same
        return {
            "name": self.name,
            "split_max_size": self.split_max_size,
            **({"split_max_tensors": self.split_max_tensors} if self.split_max_tensors is not None else {}),
            "max_shard_size": self.max_shard_size,
            "pre": self.pre,
            "metadata": self.metadata,
            "imatrix": self.imatrix.record().json() if self.imatrix is not None else None,
            "overrides": self.overrides.record(),
            **({"ignore": [*self.ignore]} if self.ignore else {}),
            "guard_template": self.guard_template,
            **({"calibration": self.calibration.record.json()} if self.calibration is not None else {}),
        }

    def fingerprint(self) -> list[object]:
        """What changes the bytes of a variant, but neither headers nor places of tensors, which are hashed anyhow."""
        more: list[object] = []
        if self.imatrix is not None:
            more.append(self.imatrix.record().json())
        if self.ignore:  # one that names no tensor is in config.json all the same
            more.append({"ignore": [*self.ignore]})
        if self.guard_template:  # side files of FP8 checkpoints are not among the addresses
            more.append({"guard_template": True})
        return more

    def words(
        self, container: Container, imatrix: ImatrixRecord | None, calibration: CalibrationRecord | None = None
    ) -> list[str]:
        """The command line that makes a variant of this kind of container again, without its variants.

        `imatrix` and `calibration` stand for files whose values are not in a manifest; metadata is in metadata.json.
        """
        words = ["--name", self.name] if self.name else []
        if container is GGUF:
            if self.split_max_size:
                words += ["--split-max-size", short_size(self.split_max_size)]
            if self.split_max_tensors:
                words += ["--split-max-tensors", str(self.split_max_tensors)]
            if self.pre:
                words += ["--pre", self.pre]
            if self.metadata:
                words += ["--metadata", "metadata.json"]
            if imatrix is not None:
                words += imatrix.words()
            words += self.overrides.words()
        else:
            if self.max_shard_size:
                words += ["--max-shard-size", short_size(self.max_shard_size)]
            words += [word for module in self.ignore for word in ("--ignore", module)]
        if calibration is not None:
            words += calibration.words()
        return words + (["--guard-template"] if self.guard_template else [])


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a conversion runs. The bytes that it writes are the same whatever stands here."""

    jobs: int = field(default_factory=usable_cores)
    """Threads; default: one for each core that this process may use."""
    device: str = "auto"
    """Where weights are encoded, one of DEVICES (convert/run/device.py)."""
    spool_gib: float | None = None
    """The most GiB of shards of the Hub that may lie on the disk at a time; None: some shards."""


def parse_options(record: JsonRecord) -> ConversionOptions:
    """The options in a manifest, but for importance matrix and calibration, of which it has name and hash alone.

    What a manifest does not know was not chosen. Raises StreamquantError for a value of another kind.
    """
    sizes = ("split_max_size", "split_max_tensors", "max_shard_size")
    given = {key: record.count(key) for key in sizes if record.take(key) is not None}
    overrides = record.mapping("overrides")
    try:
        parsed = parse_overrides(overrides, lambda key: f"{record.where}.overrides, {key}")
    except UsageError as error:
        raise record.broken("overrides", overrides, f"{error.required}") from error
    try:
        ignore = parse_ignore(record.texts("ignore"), f"{record.where}.ignore")
    except UsageError as error:
        raise record.broken("ignore", record.take("ignore"), f"{error.required}") from error
    return ConversionOptions(
        name=record.optional_text("name"),
        split_max_size=given.get("split_max_size"),
        split_max_tensors=given.get("split_max_tensors"),
        max_shard_size=given.get("max_shard_size"),
        pre=record.optional_text("pre"),
        metadata=record.mapping("metadata"),
        overrides=parsed,
        ignore=ignore,
        guard_template=record.flag("guard_template"),
    )


def read_options(given: Given, recipes: Sequence[Recipe]) -> ConversionOptions:
    """What a user gave on a command line or in a release file -> the options for these variants.

    Raises UsageError for wrong values and overrides that no variant takes, StreamquantError for a broken file.
    """
    return ConversionOptions(
        name=given.text("name"),
        split_max_size=given.size("split_max_size"),
        split_max_tensors=given.count("split_max_tensors"),
        max_shard_size=given.size("max_shard_size"),
        pre=given.text("pre"),
        metadata=_metadata(given),
        imatrix=_imatrix(given),
        overrides=_overrides(given, recipes),
        ignore=_ignore(given, recipes),
        guard_template=given.flag("guard_template"),
        calibration=None if (path := given.path("calibration")) is None else read_calibration(path),
    )


def _metadata(given: Given) -> Mapping[str, Any]:
    """GGUF keys and their values: of a JSON file, or in a release file a table of them."""
    found = given.take("metadata")
    if found is None or isinstance(found, str | Path):
        path = given.path("metadata")
        return {} if path is None else read_json_object(path)
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        required = "a table of GGUF keys, or a JSON file"
        raise UsageError("not metadata", where=given.at("metadata"), found=f"{found!r:.200}", required=required)
    return dict(found)


def _imatrix(given: Given) -> ImportanceMatrix | None:
    path, include, exclude = given.path("imatrix"), given.texts("include_weights"), given.texts("exclude_weights")
    if path is not None:
        return read_imatrix(path).select(include, exclude)
    if include or exclude:
        raise UsageError(
            "--include-weights and --exclude-weights choose from an importance matrix", required="--imatrix"
        )
    return None


def _overrides(given: Given, recipes: Sequence[Recipe]) -> Overrides:
    """The rules that were listed, then those of the file. Raises UsageError if no variant takes them."""
    names = ("tensor_type", "output_tensor_type", "token_embedding_type", "pure", "leave_output_tensor")
    found = parse_overrides({name.replace("_", "-"): given.take(name) for name in names}, given.at)
    if (path := given.path("tensor_type_file")) is not None:
        found = replace(found, tensor_types=found.tensor_types + read_rules(path))
    check_overrides(found, recipes, given.where)
    return found


def _ignore(given: Given, recipes: Sequence[Recipe]) -> tuple[str, ...]:
    """Raises UsageError for a pattern that does not compile, and if no variant takes them."""
    return check_ignore(given.texts("ignore"), recipes, given.where, given.at("ignore"))


def check_ignore(
    ignore: Sequence[str], recipes: Sequence[Recipe], where: str | None = None, key: str = "ignore"
) -> tuple[str, ...]:
    """The modules to leave alone, each once.

    Raises UsageError, which names the place, where no variant quantizes any, and for what is no module.
    """
    if ignore and not any(recipe.takes_ignore for recipe in recipes):
        raise UsageError(
            "--ignore without a variant that takes it",
            where=where,
            found=", ".join(ignore),
            required="a quantized safetensors variant, like fp8-dynamic; --tensor-type is GGUF's",
        )
    return parse_ignore(ignore, key)


def check_overrides(overrides: Overrides, recipes: Sequence[Recipe], where: str | None = None) -> None:
    """Raise UsageError, which names the place, for overrides that no variant takes."""
    if overrides and not any(recipe.takes_overrides for recipe in recipes):
        raise UsageError(
            "overrides without a variant that takes them",
            where=where,
            found=", ".join(overrides.record()),
            required="a GGUF type among the variants; recipe files have overrides of their own",
        )
