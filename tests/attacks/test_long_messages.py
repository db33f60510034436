"""A checkpoint in which thousands of tensors are wrong is told in a few lines, by every command."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from streamquant.model.problem import Problem
from streamquant.validate.report.view import few
from tests.attacks.harness import TO, run

COUNT = 5000
MOST = 4000
"""Characters of all that a command says."""
WRONG = {
    "unknown": ("BF16", 2, "model.layers.0.an_unknown_module.{}.weight"),
    "of another dtype": ("I64", 8, "model.layers.0.an_unknown_module.{}.weight"),
    "of an adapter": ("BF16", 2, "model.layers.0.self_attn.q_proj{}.lora_A.weight"),
    "scales": ("BF16", 2, "model.layers.{}.self_attn.q_proj.weight_scale"),
    "further layers": ("BF16", 2, "model.layers.9{}.self_attn.q_proj.weight"),
    "empty": ("BF16", 0, "model.layers.9{}.self_attn.q_proj.weight"),
    "left out": ("F32", 4, "model.layers.{}.self_attn.rotary_emb.inv_freq"),
}
"""What is wrong: dtype, bytes and name of each tensor."""
COMMANDS = {
    "plan": ("plan", "MODEL", *TO),
    "convert": ("convert", "MODEL", *TO, "--out", "variants"),
    "inspect": ("inspect", "MODEL"),
    "verify": ("verify", "MADE", "--source", "MODEL"),
}


@pytest.fixture(scope="module")
def made(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    run("convert", pristine, *TO, "--out", out).done()
    return out


@pytest.fixture(scope="module", params=WRONG)
def wrong(request: pytest.FixtureRequest, pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with COUNT wrong tensors."""
    dtype, size, name = WRONG[request.param]
    folder = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("wrong") / "Tiny"))
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, start = json.loads(data[8 : 8 + length]), len(data) - 8 - length
    for i in range(COUNT):
        at = start + size * i
        header[name.format(i)] = {"dtype": dtype, "shape": [min(1, size)], "data_offsets": [at, at + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + bytes(size * COUNT))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_thousands_of_wrong_tensors(
    command: str, wrong: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"MODEL": wrong, "MADE": made}
    ran = run(*(given.get(word, word) for word in COMMANDS[command]))
    assert len(ran.out) + len(ran.err) < MOST


@pytest.mark.long
def test_thousands_of_problems_of_a_variant(wrong: Path, pristine: Path) -> None:
    """Each is in report.json; what is printed has a few of them. Half a minute each, for what checks the chats."""
    ran = run("chat-check", pristine, wrong)
    assert len(ran.out) + len(ran.err) < MOST


def test_problems_of_one_kind_are_counted() -> None:
    problems = [Problem("unknown-tensor", "error", f"{i}") for i in range(COUNT)]
    other = Problem("rope", "warning", "another")
    shown = few([*problems[:3], other, *problems[3:]])
    assert [problem.what for problem in shown] == ["0", "1", "2", "another", "3", "4", "4,995 more of this kind"]
    assert few([*problems[:6], other]) == [*problems[:6], other]
