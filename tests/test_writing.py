"""files/writing.py is the one place that writes: a write elsewhere could go through a link into somebody's file."""

import ast
from collections.abc import Iterator

import pytest

from tests.test_rooms import sources

HOME = "files/writing.py"
FUNCTIONS = frozenset({
    "os.open", "os.truncate", "os.replace", "os.rename", "os.link", "os.symlink", "os.mkfifo", "os.mknod",
    "os.makedirs", "os.mkdir", "os.chmod", "shutil.copy", "shutil.copy2", "shutil.copyfile",
    "shutil.copytree", "shutil.move", "shutil.rmtree", "tempfile.mkstemp", "tempfile.mkdtemp",
    "tempfile.TemporaryDirectory", "tempfile.NamedTemporaryFile", "tempfile.TemporaryFile", "numpy.save",
    "np.save", "np.savez", "np.memmap", "torch.save",
})  # fmt: skip
METHODS = frozenset({
    "write_text", "write_bytes", "rename", "symlink_to", "hardlink_to", "touch", "mkdir", "chmod", "tofile", "savefig"
})  # fmt: skip
ELSEWHERE = {
    "calibrate/importance.py .mkdir": "the folder of --out, which is the user's own path",
    "calibrate/calibration.py .mkdir": "the folder of --out, which the user names",
    "convert/conversion.py .mkdir": "--out itself, which was checked",
    "convert/conversion.py shutil.rmtree": "the spool; rmtree follows no link, those above were checked",
    "convert/metadata/model_metadata.py .symlink_to": "makes a link in a new folder; writes through none",
    "convert/metadata/model_metadata.py tempfile.TemporaryDirectory": "a new folder of a random name",
    "convert/recipes/quantization_config.py .mkdir": "the user's cache",
    "convert/run/journal.py open r+b": "the descriptor of open_own",
    "convert/source/hub_checkpoint.py .mkdir": "the user's cache",
    "convert/source/shards.py os.open": "reads",
    "convert/source/side_files.py os.open": "reads",
    "convert/source/snapshot.py .symlink_to": "makes a link; writes through none",
    "convert/source/spool.py os.open": "reads",
    "convert/source/spool.py shutil.rmtree": "the spool; rmtree follows no link",
    "model/forward.py .mkdir": "--scratch, which is the user's own path",
    "model/forward.py os.truncate": "by descriptor",
    "model/forward.py tempfile.mkstemp": "a new file of a random name",
    "publish/cards/card.py .replace": "a card that was there gets another name; renaming follows no link",
    "publish/release/release_state.py .mkdir": "--out of the release, which is the user's own path",
    "publish/release/release_state.py os.open": "reads; for a lock",
    "publish/release/stages/convert.py shutil.rmtree": "a report that is made again; rmtree follows no link",
    "publish/release/stages/imatrix.py .replace": "a matrix that was there gets another name; renaming follows no link",
    "validate/engines/child.py tempfile.TemporaryFile": "a file without a name",
    "streamquant/cli/console.py .open w": "/dev/null",
    "streamquant/cli/console.py os.open": "/dev/null",
    "validate/engines/process.py tempfile.TemporaryDirectory": "a new folder of a random name",
    "validate/logits/hidden_states.py .mkdir": "the user's cache, or --cache",
    "validate/report/data.py .mkdir": "--out, which is the user's own path",
    "validate/report/plots.py .savefig": "into memory",
}
"""What is done elsewhere, and why it goes through no link."""


def writes(tree: ast.Module) -> Iterator[str]:
    """The calls that write, or may."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        method = f".{node.func.attr}" if isinstance(node.func, ast.Attribute) else ""
        if name in FUNCTIONS:
            yield name
        elif method[1:] in METHODS or (method == ".replace" and len(node.args) == 1 and not node.keywords):
            yield method
        elif name == "open" or method == ".open":
            modes = [*node.args[1 if name == "open" else 0 :], *(k.value for k in node.keywords if k.arg == "mode")]
            mode = next((m.value for m in modes if isinstance(m, ast.Constant) and isinstance(m.value, str)), "r")
            if set(mode) & set("wax+"):
                yield f"{name if name == 'open' else method} {mode}"


def found() -> set[str]:
    return {f"{source.path} {call}" for source in sources() if source.path != HOME for call in writes(source.tree)}


def test_writes_are_in_one_place() -> None:
    assert found() - ELSEWHERE.keys() == set()


def test_no_exception_is_left_over() -> None:
    assert ELSEWHERE.keys() - found() == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path.open('wb')", ".open wb"),
        ("open(path, mode='a')", "open a"),
        ("Path(x).write_text('')", ".write_text"),
        ("path.replace(other)", ".replace"),
        ("shutil.copyfile(a, b)", "shutil.copyfile"),
        ("os.open(a, os.O_WRONLY)", "os.open"),
        ("text.replace('a', 'b')", None),
        ("path.open('rb')", None),
        ("path.open()", None),
        ("open(path)", None),
    ],
)
def test_what_counts_as_a_write(text: str, expected: str | None) -> None:
    assert next(writes(ast.parse(text)), None) == expected


def test_no_path_is_resolved_by_pathlib() -> None:
    """Path.resolve raises RuntimeError at a loop of links (Python 3.11, pathlib.py); `real_path` does not."""
    calls = (node for source in sources() for node in ast.walk(source.tree) if isinstance(node, ast.Call))
    assert [ast.unparse(call) for call in calls if ast.unparse(call.func).endswith(".resolve")] == []
