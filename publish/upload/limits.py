"""What the Hub takes: sizes of files, numbers of files. Checked before anything is sent, and at planning.

Figures of the Hub's own documentation (huggingface/hub-docs, repositories-recommendations, August 2026): 500 GB a file
at most and less than 200 GB recommended, 10,000 files in a folder, 100 files in a commit. Publishers of GGUF files
split at 50 GB by custom.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from streamquant.convert.plan.records import Plan, VariantPlan
from streamquant.files.sizes import human_bytes
from streamquant.quant.errors import StreamquantError

GB = 10**9
HARD_LIMIT = 500 * GB
"""Bytes of a file that the Hub does not take more of."""
RECOMMENDED = 200 * GB
"""Bytes of a file that the Hub recommends to stay below."""
CUSTOM = 50 * GB
"""Bytes of a file that publishers split at."""
SPLIT = 45
"""GB that are proposed as the size of a part: with its header and its last tensor it stays below CUSTOM."""
FILES_IN_FOLDER = 10_000
FILES_IN_COMMIT = 100


@dataclass(frozen=True, slots=True)
class SizedFile:
    """A file to publish: the path in the repository, bytes, and the option that would split it."""

    path: str
    size: int
    option: str
    """--split-max-size or --max-shard-size."""


def check_limits(files: Sequence[SizedFile], where: str, *, limit: int = HARD_LIMIT) -> tuple[str, ...]:
    """Raise StreamquantError for what the Hub would refuse; return notes on what it recommends otherwise."""
    too_large = [file for file in files if file.size > limit]
    if too_large:
        largest = max(too_large, key=lambda file: file.size)
        others = f" and {len(too_large) - 1} more files" if len(too_large) > 1 else ""
        raise StreamquantError(
            "a file is larger than the Hub takes",
            where=f"{where}: {largest.path}{others}",
            found=f"{largest.size:,} bytes",
            required=f"at most {limit:,} bytes",
            hint=f"convert again with {_proposal(too_large)}",
        )
    check_number((file.path for file in files), where)
    return tuple(_notes(files))


def check_number(paths: Iterable[str], where: str) -> None:
    """Raise StreamquantError for a folder with more files than the Hub takes."""
    folders = Counter(str(PurePosixPath(path).parent) for path in paths)
    for folder, count in folders.items():
        if count >= FILES_IN_FOLDER:
            raise StreamquantError(
                "a folder holds more files than the Hub takes",
                where=f"{where}: {folder}",
                found=f"{count:,} files",
                required=f"fewer than {FILES_IN_FOLDER:,}",
                hint="convert again with larger parts",
            )


def _proposal(files: Iterable[SizedFile]) -> str:
    return " and ".join(f"{option} {SPLIT}G" for option in sorted({file.option for file in files}))


def _notes(files: Sequence[SizedFile]) -> Iterable[str]:
    above = [file for file in files if file.size > RECOMMENDED]
    if above:
        yield (
            f"{_names(above)}: more than {human_bytes(RECOMMENDED)}, which the Hub advises against; "
            f"{_proposal(above)} would split it"
        )
    custom = [file for file in files if CUSTOM < file.size <= RECOMMENDED]
    if custom:
        yield f"{_names(custom)}: more than 50 GB; publishers split such files by custom: {_proposal(custom)}"


def _names(files: Sequence[SizedFile]) -> str:
    return files[0].path if len(files) == 1 else f"{files[0].path} and {len(files) - 1} more"


def check_plan(plan: Plan, *, limit: int = HARD_LIMIT) -> tuple[str, ...]:
    """`check_limits` for what a conversion would write. Raises StreamquantError."""
    files = [
        SizedFile(plan.files[index].path, plan.files[index].size, variant.recipe.container.split_option)
        for variant in plan.variants
        for index in variant.files
    ]
    _check_splits(plan, limit)
    return check_limits(files, plan.name, limit=limit)


def _check_splits(plan: Plan, limit: int) -> None:
    """Raise StreamquantError for a tensor that no split makes small enough."""
    for variant in plan.variants:
        largest = max((tensor.nbytes for tensor in variant.tensors), default=0)
        if largest > limit:
            raise StreamquantError(
                "a tensor is larger than the Hub takes", where=_where(variant), found=f"{largest:,} bytes"
            )


def _where(variant: VariantPlan) -> str:
    return f"variant {variant.recipe.spec}"
