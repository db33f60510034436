"""What lies between a tensor of a checkpoint and one of a GGUF: another order of rows and columns, other values.

A pattern names the axes of both, as einops does: `(a b)` is an axis that runs through b for every a. `{a b}` is an axis
that has a's entries and then b's; a part that the right side does not name is left out. So llama.cpp's order of q and k
is "(head half dim) c -> (head dim half) c", and the first half of a fused projection "{gate up} c -> gate c".

Where rows stay whole, encoded rows can be moved. Columns may change places, before rows are encoded. A transpose makes
columns of rows, "(head {nope v}) r -> head r nope": it is done in memory, one unit at a time, which is a head here.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.errors import StreamquantError

Rows = NDArray[np.float32]
Order = NDArray[np.int64]

_TOKEN = re.compile(r"[A-Za-z_]\w*|[(){}]")
_SHORT_RUN = 16
"""Rows. Where fewer of them keep together, those that change places among each other are moved in memory."""


@dataclass(frozen=True, slots=True)
class ValueMap:
    """What happens to every value, in float32: x + 1, -exp(x) rounded correctly, or x times a factor."""

    kind: Literal["plus_one", "minus_exp", "times"]
    factor: float = 1.0

    def apply(self, rows: Rows) -> Rows:
        """float32, any shape -> the stored values. exp overflows to infinity."""
        if self.kind == "plus_one":
            return rows + np.float32(1)
        if self.kind == "times":
            return rows * np.float32(self.factor)
        with np.errstate(over="ignore"):  # numpy's float32 exp differs in the last bit; torch's does not
            return (-np.exp(rows.astype(np.float64))).astype(np.float32)

    def undo(self, rows: Rows) -> Rows:
        """The stored values -> those of the source, up to rounding."""
        if self.kind == "plus_one":
            return rows - np.float32(1)
        if self.kind == "times":
            return rows / np.float32(self.factor)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.log(-rows.astype(np.float64)).astype(np.float32)


PLUS_ONE = ValueMap("plus_one")
MINUS_EXP = ValueMap("minus_exp")


@dataclass(frozen=True, slots=True)
class TensorView:
    """How a stored tensor is made of one of the source.

    sizes are (axis, size); of each axis of the source one may be left out. An empty pattern leaves the order as it is.
    """

    pattern: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    value: ValueMap | None = None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the stored tensor, by that of the source. Raises StreamquantError if it does not fit."""
        return resolve(self, shape).stored_shape

    def json(self) -> list[object]:
        """For fingerprints."""
        value = None if self.value is None else [self.value.kind, self.value.factor]
        return [self.pattern, [list(size) for size in self.sizes], value]


def rope_view(heads: int, dimensions: int) -> TensorView:
    """The order of llama.cpp's arch "llama" for q and k, whose tensors have so many dimensions.

    Hugging Face rotates component j of a head with j + head_dim/2, llama.cpp's arch "llama" rotates neighbours: so the
    two halves of each head are interleaved, 0, h, 1, h+1, ... with h = head_dim/2 (LlamaModel.permute in
    conversion/llama.py of llama.cpp). Bias vectors follow the same order.

    >>> resolve(rope_view(2, 1), (8,)).order().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    columns = " c" if dimensions == 2 else ""
    pattern = f"(head half dim){columns} -> (head dim half){columns}"
    return TensorView(pattern, (("head", heads), ("half", 2)))


@dataclass(frozen=True, slots=True, eq=False)
class MovedRows:
    """The rows of a block that a stored tensor takes, in its order, and where they go."""

    rows: Order | None
    """Numbers of rows of the block; None for all of them, as they stand."""
    runs: tuple[tuple[int, int], ...]
    """(first stored row, rows) of each run of rows that stand together."""


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedView:
    """A view of a source of known shape, as a map of the rows of a matrix [rows, n]."""

    rows: int
    n: int
    stored_rows: int
    stored_shape: tuple[int, ...]
    to: Order | None
    """int64[rows]: the stored row of every row of the source, -1 for one that is left out; None where all stay. Of a
    transpose, the row among all that are taken."""
    columns: Order | None
    """int64[m]: the columns of the source that are taken, in the order of the stored ones; None where all stay."""
    value: ValueMap | None
    row_step: int
    """Rows that are moved in memory: blocks of a multiple of them are closed. 1 where rows stay, or go by long runs."""
    transposed: int | None = None
    """Of a transpose, the rows of a unit that are taken: they become columns, and the columns of the source rows."""

    @property
    def stored_n(self) -> int:
        """Columns of the stored tensor."""
        if self.transposed is not None:
            return self.transposed
        return self.n if self.columns is None else len(self.columns)

    @property
    def matrices(self) -> int:
        """Matrices of the stored tensor, for each of which there is an importance of its columns."""
        return math.prod(self.stored_shape[:-2])

    def order(self) -> Order:
        """int64[stored_rows]: the row of the source of every stored row. Not of a transpose."""
        if self.to is None:
            return np.arange(self.rows)
        order = np.empty(self.stored_rows, np.int64)
        taken = np.flatnonzero(self.to >= 0)
        order[self.to[taken]] = taken
        return order

    def arrange(self, rows: Rows) -> Rows:
        """Rows of the source that are taken, float32[r, n] -> stored rows before `value`: other columns, transposed.

        Of a transpose, they are those of whole units. A view of `rows` where nothing changes.
        """
        if self.columns is not None:
            rows = rows[:, self.columns]
        if self.transposed is None:
            return rows
        units = rows.reshape(-1, self.transposed, rows.shape[1])
        return np.ascontiguousarray(units.transpose(0, 2, 1).reshape(-1, self.transposed))  # of one unit it is a view

    def put_back(self, stored: Rows, moved: MovedRows, rows: Rows) -> None:
        """Write stored rows, float32[s, stored_n], where they came from in `rows`, float32[r, n] of a block."""
        values = stored if self.value is None else self.value.undo(stored)
        taken = self.n if self.columns is None else len(self.columns)
        if self.transposed is not None:
            values = values.reshape(-1, taken, self.transposed).transpose(0, 2, 1).reshape(-1, taken)
        if self.columns is None:
            rows[slice(None) if moved.rows is None else moved.rows] = values
        elif moved.rows is None:
            rows[:, self.columns] = values
        else:
            rows[moved.rows[:, None], self.columns] = values

    def moved(self, first: int, last: int, row_step: int) -> MovedRows:
        """Where rows [first, last) go, which begin a group of `row_step` rows.

        A run ends where the next stored row is of another block, or of an earlier group: so blocks of whole groups, one
        after another, fill every run of a larger block from its front.
        """
        if self.to is None and self.transposed is None:
            return MovedRows(None, ((first, last - first),))
        if self.transposed is not None:
            return _moved_units(self, first, last)
        return _moved(self, first, last, row_step)


@lru_cache(maxsize=256)
def _moved_units(view: ResolvedView, first: int, last: int) -> MovedRows:
    """See ResolvedView.moved, for a transpose: whole units, one after another."""
    assert view.transposed is not None
    units, rest = divmod(last - first, view.row_step)
    assert rest == 0, "units are not cut"
    of_unit = view.stored_rows * view.row_step // view.rows
    rows = None
    if view.to is not None:
        inside = np.argsort(view.to[: view.row_step], kind="stable")[view.row_step - view.transposed :]
        rows = (np.arange(units)[:, None] * view.row_step + inside).reshape(-1)
    return MovedRows(rows, ((first // view.row_step * of_unit, units * of_unit),))


@lru_cache(maxsize=256)  # the same in every layer
def _moved(view: ResolvedView, first: int, last: int, row_step: int) -> MovedRows:
    """See ResolvedView.moved; rows do change places."""
    assert view.to is not None, "else all rows stay"
    to = view.to[first:last]
    rows = np.argsort(to, kind="stable")[np.count_nonzero(to < 0) :]
    if not rows.size:
        return MovedRows(rows, ())
    stored = to[rows]
    ends = np.flatnonzero((np.diff(stored) != 1) | (np.diff(rows // row_step) < 0)) + 1
    cuts = [0, *ends.tolist(), rows.size]
    runs = tuple((int(stored[a]), b - a) for a, b in itertools.pairwise(cuts))
    as_they_stand = rows.size == last - first and bool((np.diff(rows) == 1).all())
    return MovedRows(None if as_they_stand else rows, runs)


IDENTITY = TensorView()


@lru_cache(maxsize=512)
def resolve(view: TensorView, shape: tuple[int, ...]) -> ResolvedView:
    """The view of a source of this shape. Raises StreamquantError if the shape is not that of the pattern's left side.

    Raises ValueError for a pattern that cannot be: names on the right that are not on the left, columns that become
    rows in another way than by transposing one unit after another.
    """
    if not view.pattern:
        rows, n = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, math.prod(shape))
        return ResolvedView(rows, n, rows, shape, None, None, view.value, 1)
    left, right = (_parse(side) for side in view.pattern.split("->"))
    sizes = _sizes(view, left, shape)
    if new := {name for axis in right for name in axis.names()} - sizes.keys():
        raise ValueError(f"{view.pattern!r} has on its right what is not on its left: {sorted(new)}")
    stored_shape = tuple(axis.size(sizes) for axis in right)
    if len(left) == 1 and len(right) > 1 and left[0].kind == "product":
        left = left[0].parts  # a vector that becomes a matrix
    if len(left) == len(right) == 1:
        left, right = (*left, _ONE), (*right, _ONE)
    if set(left[-1].names()) != set(right[-1].names()):
        return _transpose(view, left, right, sizes)
    to, stored_rows = _moves(view, _product(left[:-1]), _product(right[:-1]), sizes)
    rows, n = len(to), right[-1].size(sizes)
    columns = _moves(view, right[-1], left[-1], sizes)[0] if left[-1] != right[-1] else np.arange(n)
    stays = stored_rows == rows and bool((np.diff(to) == 1).all())
    same = bool((np.diff(columns) == 1).all())
    for array in (to, columns):
        array.setflags(write=False)
    return ResolvedView(
        rows,
        n,
        stored_rows,
        stored_shape,
        None if stays else to,
        None if same else columns,
        view.value,
        1 if stays else _row_step(to, stored_rows),
    )


def _row_step(to: Order, stored_rows: int) -> int:
    """The least groups of rows that change places among each other, where that is what keeps runs long."""
    kept = np.count_nonzero(np.diff(to) == 1)
    if stored_rows != len(to) or (len(to) - kept) * _SHORT_RUN <= len(to):
        return 1
    closed = np.maximum.accumulate(to) == np.arange(len(to))
    divisors = (step for step in range(1, len(to) + 1) if len(to) % step == 0)
    return next(step for step in divisors if closed[step - 1 :: step].all())


@dataclass(frozen=True, slots=True)
class _Axis:
    """An expression of axes: a name, a product `(a b)`, or a concatenation `{a b}`."""

    kind: Literal["name", "product", "parts"]
    name: str = ""
    parts: "tuple[_Axis, ...]" = ()

    def names(self) -> Iterator[str]:
        if self.kind == "name":
            yield self.name
        for part in self.parts:
            yield from part.names()

    def size(self, sizes: Mapping[str, int]) -> int:
        if self.kind == "name":
            return sizes[self.name]
        found = [part.size(sizes) for part in self.parts]
        return math.prod(found) if self.kind == "product" else sum(found)

    def places(self, sizes: Mapping[str, int]) -> "list[tuple[tuple[str, ...], Order]]":
        """Names of axes -> where an entry stands by its number on each: int64[size of each name], for every part."""
        if self.kind == "name":
            return [((self.name,), np.arange(sizes[self.name]))]
        found: list[tuple[tuple[str, ...], Order]] = []
        if self.kind == "parts":
            start = 0
            for part in self.parts:
                found += [(names, start + at) for names, at in part.places(sizes)]
                start += part.size(sizes)
            return found
        found = [((), np.zeros((), np.int64))]
        for part in self.parts:
            size, inner = part.size(sizes), part.places(sizes)
            found = [(names + more, np.add.outer(at * size, to)) for names, at in found for more, to in inner]
        return found


_ONE = _Axis("product")


def _product(axes: Sequence[_Axis]) -> _Axis:
    return axes[0] if len(axes) == 1 else _Axis("product", parts=tuple(axes))


def _parse(side: str) -> tuple[_Axis, ...]:
    """The axes of one side of a pattern. Raises ValueError."""
    tokens = _TOKEN.findall(side)
    if "".join(tokens) != "".join(side.split()):
        raise ValueError(f"not a pattern of axes: {side!r}")
    stack: list[tuple[str, list[_Axis]]] = [("", [])]
    for token in tokens:
        if token in "({":
            stack.append((token, []))
        elif token in ")}":
            opened, axes = stack.pop()
            if not stack or opened + token not in ("()", "{}"):
                raise ValueError(f"not a pattern of axes: {side!r}")
            stack[-1][1].append(_Axis("product" if token == ")" else "parts", parts=tuple(axes)))
        else:
            stack[-1][1].append(_Axis("name", token))
    if len(stack) != 1 or not stack[0][1]:
        raise ValueError(f"not a pattern of axes: {side!r}")
    return tuple(stack[0][1])


def _sizes(view: TensorView, left: tuple[_Axis, ...], shape: tuple[int, ...]) -> dict[str, int]:
    """The sizes of all names. Raises StreamquantError if the source has another shape."""
    sizes = dict(view.sizes)
    fits = len(left) == len(shape)
    for axis, size in zip(left, shape, strict=False):
        unknown = list(dict.fromkeys(name for name in axis.names() if name not in sizes))
        if len(unknown) > 1:
            raise ValueError(f"of {view.pattern!r} the sizes of {unknown} are not known")
        if unknown:  # the size of an axis is linear in each of its names
            none, one = (axis.size({**sizes, unknown[0]: value}) for value in (0, 1))
            sizes[unknown[0]] = max((size - none) // max(one - none, 1), 0)
        fits = fits and axis.size(sizes) == size
    if not fits or 0 in sizes.values():
        raise StreamquantError(
            "a tensor's shape does not divide into heads and parts as its family has it",
            found=list(shape),
            required=f"{view.pattern.split('->')[0].strip()}, with {', '.join(f'{n} = {s}' for n, s in view.sizes)}",
        )
    return sizes


def _transpose(
    view: TensorView, left: tuple[_Axis, ...], right: tuple[_Axis, ...], sizes: Mapping[str, int]
) -> ResolvedView:
    """The view of a pattern that makes columns of rows: "unit rows c -> unit c rows".

    The axes before the last two of the right side number the units, which follow each other in the source; a unit may
    be cut into parts, as may the columns. Raises ValueError for any other order.
    """
    unit = _product(right[:-2])
    units, rows, n = unit.size(sizes), math.prod(axis.size(sizes) for axis in left[:-1]), left[-1].size(sizes)
    to, stored_n = _moves(view, _product(left[:-1]), _Axis("product", parts=(unit, right[-1])), sizes)
    order, kept = _moves(view, left[-1], right[-2], sizes)
    row_step, stored_n = rows // units, stored_n // units
    by_unit = to.reshape(units, row_step)
    if (np.where(by_unit < 0, -1, by_unit - np.arange(units)[:, None] * stored_n) != by_unit[0]).any():
        raise ValueError(f"{view.pattern!r} has units that do not follow each other")
    columns = np.argsort(order, kind="stable")[n - kept :]
    rows_stay = stored_n == row_step and bool((np.diff(to) == 1).all())
    same = kept == n and bool((np.diff(columns) == 1).all())
    for array in (to, columns):
        array.setflags(write=False)
    return ResolvedView(
        rows,
        n,
        units * kept,
        tuple(axis.size(sizes) for axis in right),
        None if rows_stay else to,
        None if same else columns,
        view.value,
        row_step,
        stored_n,
    )


def _moves(view: TensorView, left: _Axis, right: _Axis, sizes: Mapping[str, int]) -> tuple[Order, int]:
    """(int64[entries of left]: where each is on the right, -1 where it is left out; entries of right)."""
    one_sided = {name for name in set(left.names()) ^ set(right.names()) if sizes[name] == 1}

    def by_names(axis: _Axis) -> dict[frozenset[str], tuple[tuple[str, ...], Order]]:
        found = {}
        for names, at in axis.places(sizes):
            kept = tuple(name for name in names if name not in one_sided)
            found[frozenset(kept)] = kept, at.reshape([sizes[name] for name in kept])
        return found

    sources = by_names(left)
    to = np.full(left.size(sizes), -1, np.int64)
    for key, (names, stored) in by_names(right).items():
        if key not in sources:
            raise ValueError(f"{view.pattern!r} has on its right what is not on its left: {sorted(key)}")
        own, at = sources[key]
        to[at.transpose([own.index(name) for name in names]).reshape(-1)] = stored.reshape(-1)
    return to, right.size(sizes)
