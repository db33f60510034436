"""What the templates of the cards call, beside `commands`: Markdown that no name of a stranger breaks."""

import json
import re
from collections.abc import Sequence
from urllib.parse import quote

from huggingface_hub import constants

from streamquant.convert.manifest import ManifestFile
from streamquant.publish.cards.prompts import PromptFormat
from streamquant.quant.printable import visible
from streamquant.validate.report.text import Markdown, code, markdown

HUB = constants.HUGGINGFACE_CO_URL_HOME.rstrip("/")
"""For links of a card, whatever HF_ENDPOINT says where it is made."""


def file_name(path: object) -> str:
    """The last part of a path of any system.

    >>> file_name("/home/me/calibration.txt"), file_name("C:\\\\texts\\\\a.txt")
    ('calibration.txt', 'a.txt')
    """
    return re.split(r"[/\\]", str(path).rstrip("/\\"))[-1]


def fence(text: object, language: str = "") -> Markdown:
    """Lines as a fenced block that nothing in them can close; characters that hide are shown as escapes.

    >>> fence("a", "bash"), fence("```")
    ('```bash\\na\\n```', '````\\n```\\n````')
    """
    lines = [_code_line(line) for line in str(text).split("\n")]
    longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    marks = "`" * max(3, longest + 1)
    return Markdown("\n".join([f"{marks}{language}", *lines, marks]))


def _code_line(line: str) -> str:
    return "\t".join(map(visible, line.split("\t")))


def link(text: str, target: str) -> Markdown:
    """A link to a file of the repository, whatever it is called.

    >>> link("a_b", "b c.gguf")
    '[a\\\\_b](b%20c.gguf)'
    """
    return Markdown(f"[{markdown(text)}]({quote(target, safe='/-._~')})")


def whole(text: str) -> Markdown:
    """A number for a narrow cell: its error, if it has one, in a second line, and no other break.

    >>> whole("0.1 ± 0.2"), whole("1.20 GB") == "1.20\xa0GB"
    ('0.1<br>±\xa00.2', True)
    """
    return Markdown(markdown(text).replace(" ± ", "<br>± ").replace(" ", "\xa0"))


def labels(names: Sequence[str]) -> Markdown:
    """Names as code, as a sentence lists them.

    >>> labels(["a", "b", "c"])
    '`a`, `b` and `c`'
    """
    spans = [code(name) for name in names]
    return Markdown(spans[0] if len(spans) == 1 else f"{', '.join(spans[:-1])} and {spans[-1]}")


def checksums(files: Sequence[ManifestFile]) -> Markdown:
    """For `sha256sum --check`."""
    return fence("\n".join(f"{file.sha256}  {file.path}" for file in files))


def hub_link(repo: str) -> Markdown:
    """The page of a repository, as the target of a link."""
    return Markdown(f"{HUB}/{quote(repo, safe='/-._~')}")


def python_example(name: str, prompts: PromptFormat | None) -> str:
    """transformers' way to an answer."""
    model = json.dumps(name)
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({model})",
        f'model = AutoModelForCausalLM.from_pretrained({model}, dtype="auto", device_map="auto")',
    ]
    if prompts is None or not prompts.prompts:
        lines.append('inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)')
    else:
        switch = f", {prompts.thinking}" if prompts.thinking else ""
        lines += [
            'messages = [{"role": "user", "content": "Hello!"}]',
            "inputs = tokenizer.apply_chat_template(",
            f'    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{switch}',
            ").to(model.device)",
        ]
    lines += [
        "output = model.generate(**inputs, max_new_tokens=1024)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)
