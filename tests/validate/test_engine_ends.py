"""Every way in which an engine can end or answer nonsense is an EngineError, and in the report the variant's error."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from rich.console import Console

from streamquant.model.variants.open import open_variant
from streamquant.validate.engines import child
from streamquant.validate.engines.engine import EngineError, EngineLoadError, TemplateRequest
from streamquant.validate.engines.process import EngineProcess, TimeLimits
from streamquant.validate.gates import failed
from streamquant.validate.report.console import chat_view, report_view
from streamquant.validate.report.data import ChatCheck
from streamquant.validate.report.view import make_view
from streamquant.validate.sections import SKIPPABLE
from streamquant.validate.validation import chat_check, validate
from tests.peers import requires_llama_cpp
from tests.validate.engine_fixtures import Model, with_keys
from tests.validate.report_fixtures import small_options, write_text

WORKER = """
import json, os, signal, sys, time
way = sys.argv[1]
FACTS = {"kind": "llama.cpp", "version": "1", "model": "m", "bos": None, "eos": None}
FACTS |= {"adds_bos": False, "vocabulary": 4}
def say(text):
    os.write(1, text.encode())
def act():
    if way == "signal": os.kill(os.getpid(), signal.SIGSEGV)
    if way == "abort": os.abort()
    if way == "out of memory": os.kill(os.getpid(), signal.SIGKILL)
    if way == "exit": sys.stderr.write("Error: it is over"); sys.exit(3)
    if way == "exit 0": sys.exit(0)
    if way == "half a line": say('{"result": [[1'); sys.exit(0)
    if way == "hang": time.sleep(60)
    if way == "closed pipe": os.close(1); time.sleep(60)
    if way == "noise": say("llama_init: hello\\n")
    if way == "a number": say("3\\n")
    if way == "no result": say("{}\\n")
    if way == "deep": say("[" * 100000 + "\\n")
    if way == "endless line":
        while True: say("x" * 65536)
    if way == "fewer": say('{"result": []}\\n')
    if way == "no list": say('{"result": {}}\\n')
    if way == "other items": say('{"result": [{"ids": ["a"], "logprobs": [0]}]}\\n')
    if way == "null": say('{"result": [{"ids": [1], "logprobs": [null]}]}\\n')
    if way == "NaN": say('{"result": [{"ids": [1], "logprobs": [NaN]}]}\\n')
    if way == "nothing": say('{"result": [{"ids": [1], "logprobs": [-Infinity]}]}\\n')
    if way == "error": say('{"error": "RuntimeError: no kernel"}\\n')
    if way == "good": say('{"result": [{"ids": [1, 2], "logprobs": [-0.1, -Infinity]}]}\\n')
for line in sys.stdin:
    method = json.loads(line)["method"]
    if (method == "load") == ("load" in sys.argv[2:]): act()
    else: say(json.dumps({"result": FACTS}) + "\\n")
"""
"""Does what its first argument says, at the first request or, with a second argument, while it loads."""
WAYS = {
    "signal": "signal SIGSEGV",
    "abort": "signal SIGABRT",
    "out of memory": "without free memory",
    "exit": "exit code 3",
    "exit 0": "exit code 0",
    "half a line": "exit code 0",
    "hang": "no answer after 1 s",
    "closed pipe": "runs on",
    "noise": "llama_init: hello",
    "a number": "b'3'",
    "no result": "b'{}'",
    "deep": "[[[",
    "endless line": "more than",
    "fewer": "0 answers to 1 questions",
    "no list": "{}",
    "other items": "no token id",
    "null": "None is no log-probability",
    "NaN": "nan is no log-probability",
    "nothing": "no token has a probability",
    "error": "no kernel",
}
LOADING = ("signal", "exit", "hang", "noise", "no list", "error")
Fake = Callable[..., None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Makes every engine's process one that ends in the given way."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(child, "LONGEST_ANSWER", 1 << 20)

    def use(*arguments: str) -> None:
        monkeypatch.setattr(child, "command", lambda _kind: [sys.executable, str(script), *arguments])

    return use


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize("way", WAYS)
def test_every_end_is_an_error_of_the_model(way: str, fake: Fake, folder: Path) -> None:
    fake(way)
    with EngineProcess(folder, limits=TimeLimits(load=60, request=1 if way == "hang" else 60)) as engine:
        with pytest.raises(EngineError) as caught:
            engine.next_token_logprobs([[1]], 4)
        assert WAYS[way] in str(caught.value)
        assert caught.value.model == folder
        if engine.ended:  # it says so again, at once
            with pytest.raises(EngineError) as again:
                engine.detokenize([[1]])
            assert again.value is caught.value


@pytest.mark.parametrize("way", LOADING)
def test_an_end_while_loading(way: str, fake: Fake, folder: Path) -> None:
    fake(way, "load")
    with pytest.raises(EngineError) as caught:
        EngineProcess(folder, limits=TimeLimits(load=1 if way == "hang" else 60))
    assert caught.value.model == folder
    assert isinstance(caught.value, EngineLoadError) == (way == "error")


def test_what_is_right_is_taken(fake: Fake, folder: Path) -> None:
    fake("good")
    with EngineProcess(folder) as engine:
        (best,) = engine.next_token_logprobs([[1]], 4)
    assert (best.ids, best.logprobs) == ((1,), (-0.1,))


def test_a_process_that_does_not_read_is_given_up(fake: Fake, folder: Path) -> None:
    """A request that is larger than the pipe, to a process that hangs."""
    fake("hang")
    with EngineProcess(folder, limits=TimeLimits(request=1)) as engine:
        engine._child._process.send_signal(19)  # SIGSTOP
        with pytest.raises(EngineError, match="did not answer detokenize in time"):
            engine.detokenize([list(range(100_000))])


def test_a_template_of_another_model_is_that_model_s_fault(fake: Fake, folder: Path, tmp_path: Path) -> None:
    fake("signal")
    with EngineProcess(folder) as engine:
        with pytest.raises(EngineError) as caught:
            engine.render("x", [TemplateRequest(({"role": "user", "content": "x"},))], {}, model=tmp_path / "other")
        assert caught.value.model == tmp_path / "other"
        engine.restart()
        assert not engine.ended


@pytest.mark.parametrize(("way", "when"), [("signal", ()), ("NaN", ()), ("exit", ("load",)), ("error", ("load",))])
def test_an_engine_that_ends_fails_the_variant(
    way: str, when: tuple[str, ...], fake: Fake, tiny: Path, four_variants: list[Path], tmp_path: Path
) -> None:
    fake(way, *when)
    options = small_options(write_text(tmp_path / "text.txt"), chunks=2, skip=frozenset(SKIPPABLE) - {"engines"})
    report = validate(tiny, four_variants[:2], options)
    for variant in report.variants:
        (problem,) = variant.problems
        assert (problem.check, problem.severity) == ("engine", "error")
    assert len(failed(report.gate_results)) == 2
    assert make_view(report).verdict.status == "fail"


def test_an_engine_that_is_not_installed_is_said(
    tiny: Path, four_variants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.py"
    script.write_text('print(\'{"missing": "xllamacpp"}\', flush=True)')
    monkeypatch.setattr(child, "command", lambda _kind: [sys.executable, str(script)])
    options = small_options(write_text(tmp_path / "text.txt"), chunks=2, skip=frozenset(SKIPPABLE) - {"engines"})
    report = validate(tiny, four_variants[1:3], options)
    assert all(variant.problems == () for variant in report.variants)
    assert failed(report.gate_results) == []
    view = make_view(report)
    assert view.verdict.status == "warn"
    assert "not everything was checked" in view.verdict.headline
    assert "No engine has run BF16 and Q8_0." in view.verdict.sentences
    assert {row.status for row in view.rows} == {"warn"}
    checked = chat_check(open_variant(tiny), four_variants[1:2])
    assert checked.errors == 0
    console = Console(width=200)
    with console.capture() as shown:
        console.print(chat_view(checked))
    assert "not checked: tokens" in shown.get()
    assert "ok" not in shown.get().split()
    assert report_view(report)


RECURSIVE = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"
GROWING = "{% set x = namespace(s='a') %}{% for i in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}{{ x.s }}"


def with_template(model: Model, folder: Path, template: str) -> Path:
    keys = {"tokenizer.chat_template": GGUFValue(template, GGUFValueType.STRING)}
    return with_keys(model.gguf, folder / model.gguf.name, keys)


@requires_llama_cpp
def test_a_template_that_kills_llama_cpp_is_an_error(hermes_14b: Model, tmp_path: Path) -> None:
    """An endless recursion overflows llama.cpp's stack while it loads the file; the good file beside it is checked."""
    broken = with_template(hermes_14b, tmp_path, RECURSIVE)
    found: ChatCheck = chat_check(open_variant(hermes_14b.source), [broken])
    (variant,) = found.variants
    assert [problem.check for problem in variant.problems] == ["engine"]
    assert "SIGSEGV" in str(variant.problems[0])
    assert found.errors == 1


# In a process of its own: the peak is that of the largest child so far, and pytest's process has had other children.
WANTS_ALL_MEMORY = """
import resource, sys
from pathlib import Path
from streamquant.model.variants.open import open_variant
from streamquant.validate.engines import child
from streamquant.validate.validation import chat_check
child.TEMPLATE_MEMORY = 1 << 30
(variant,) = chat_check(open_variant(Path(sys.argv[1])), [Path(sys.argv[2])]).variants
print(*(problem.check for problem in variant.problems), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@requires_llama_cpp
@pytest.mark.long
def test_a_template_that_wants_all_memory_is_an_error(hermes_14b: Model, tmp_path: Path) -> None:
    broken = with_template(hermes_14b, tmp_path, GROWING)
    command = [sys.executable, "-c", WANTS_ALL_MEMORY, str(hermes_14b.source), str(broken)]
    check, peak = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout.split()
    assert check == "engine"
    assert int(peak) < 2 << 20  # KiB
