"""Small things under the names that the documentation uses: models in folders and on a Hub, texts, releases.

The commands of a page run in a folder of their own, in this process, as they are written: `Workshop.run`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants

from streamquant.hub import errors
from streamquant.publish.cards import card, public_report
from streamquant.publish.cards.origin import Template
from streamquant.publish.cards.prompts import PromptFormat, prompt_format
from streamquant.validate.report import render
from tests.attacks.harness import Ran, run, write_model
from tests.conftest import Shelf
from tests.docs.pages import ROOT, Command
from tests.hub import WRITE_TOKEN, Hub
from tests.hub.client import client_put_back, keep_client

LOCAL = ("Hermes-4-14B", "Hermes-4-405B")
"""Models that the pages name as folders."""
HUB = ("Hermes-4-14B", "Hermes-4.3-36B", "Hermes-4-70B", "Hermes-4-405B")
"""Models of NousResearch."""
OTHER = "Other-14B-UD-Q4_K_XL.gguf"
"""A GGUF of somebody else."""
TEXTS = ("calibration.txt", "wiki.test.raw")
PROMPTS: dict[str, PromptFormat] = {}
"""By template: what was rendered before."""
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass
class Workshop:
    """A folder to run commands in, and the Hub that they see.

    whole: validations measure everything and draw their plots, as users have it; else only what no other test does.
    """

    folder: Path
    hub: Hub
    whole: bool

    def run(self, command: Command, arguments: Sequence[str]) -> Ran:
        """`streamquant` with these arguments, in this process and folder; globs are spread, variables set."""
        words = [word for argument in arguments for word in self.spread(argument)]
        with _variables(command.environment):
            return run(*words)

    def spread(self, word: str) -> list[str]:
        """The files that a word with * stands for, as a shell does it."""
        if "*" not in word or " " in word:
            return [word]
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(word)) or [word]

    def hf(self, command: Command) -> "subprocess.CompletedProcess[str]":
        """The Hub's own command line, in a process."""
        environment = os.environ | self.hub.environment(self.folder / ".home", WRITE_TOKEN) | command.environment
        program = Path(sys.executable).with_name("hf")
        return subprocess.run(
            [str(program), *command.words[1:]], env=environment, capture_output=True, text=True, check=False
        )


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Variables of the environment for one command; the client reads them when it is imported, so it is told."""
    known = {"HF_HUB_OFFLINE": ("HF_HUB_OFFLINE", True)}
    assert values.keys() <= known.keys(), f"teach stand_ins.py these variables: {values}"
    with pytest.MonkeyPatch.context() as patch:
        for name in values:
            patch.setattr(constants, *known[name])
        yield


def write_stand_in(folder: Path) -> Path:
    """A Llama of 3 layers with a tokenizer of 257 tokens and a chat template, 4 MB in two shards."""
    write_model(folder, size="small", shards=2)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


def make_models(shelf: Shelf) -> Path:
    """Folders of all models, by name."""
    return shelf.get("docs-models", lambda folder: [write_stand_in(folder / name) for name in {*LOCAL, *HUB}])


def furnish(folder: Path, models: Path) -> None:
    """Put what the pages take for granted into a folder."""
    for name in LOCAL:
        shutil.copytree(models / name, folder / name)
    for number, name in enumerate(TEXTS):
        text = (ROOT / "README.md").read_text()
        (folder / name).write_text(text[number * 2000 :][:4000])
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for example in (ROOT / "examples").glob("*.yaml"):
        shutil.copy(example, folder)  # "Copy the example of your size"
    for name in TEXTS:
        shutil.copy(folder / name, folder / "examples")
    copy_makefile(folder)
    made = run("convert", models / "Hermes-4-14B", "--to", "gguf:Q4_K_M", "--out", folder / "other", "-j", 1).done()
    assert made.out
    shutil.move(next((folder / "other").rglob("*.gguf")), folder / OTHER)
    shutil.rmtree(folder / "other")


@contextmanager
def open_workshop(folder: Path, shelf: Shelf, *, whole: bool = False) -> Iterator[Workshop]:
    """A furnished folder as the current one, and a Hub with the models, where alice may write to ORG and your-name."""
    models = make_models(shelf)
    cache = shelf.get("docs-cache", _seed_cache)
    with client_put_back(), pytest.MonkeyPatch.context() as patch, Hub() as hub:
        hub.add_token(WRITE_TOKEN, "alice", "write", ("ORG", "your-name"))
        for name in HUB:
            hub.add_repo(f"NousResearch/{name}", models / name)
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("HF_TOKEN", WRITE_TOKEN)
        patch.delenv("HF_OIDC_RESOURCE", raising=False)
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / ".home" / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / ".home" / "token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(errors, "FIRST_WAIT", 0.01)
        keep_client(patch)
        patch.setattr(card, "prompt_format", _remembered(prompt_format))
        if not whole:
            patch.setattr(render, "write_pages", lambda _report, _folder: [])
            patch.setattr(public_report, "make_plots", lambda _report, _names: ())
        furnish(folder, models)
        patch.chdir(folder)
        yield Workshop(folder, hub, whole)


def _remembered(make: Callable[[Template], PromptFormat]) -> Callable[[Template], PromptFormat]:
    """It starts a process for each template; here all are the same."""

    def remembered(template: Template) -> PromptFormat:
        if template.text not in PROMPTS:
            PROMPTS[template.text] = make(template)
        return PROMPTS[template.text]

    return remembered


def copy_makefile(folder: Path) -> None:
    """The Makefile and what its set-up depends on."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-peer.txt"):
        shutil.copy(ROOT / name, folder)


def _seed_cache(folder: Path) -> None:
    """What compressed-tensors said before need not be asked again, which takes seconds."""
    (folder / "streamquant").mkdir()
    for path in (Path.home() / ".cache" / "streamquant").glob("quantization_config-*.json"):
        shutil.copy(path, folder / "streamquant")
