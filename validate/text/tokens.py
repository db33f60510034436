"""Tokens: a variant's tokenizer against the original's, id by id, in the engines that people run.

transformers tokenizes the original; llama.cpp the GGUF, or transformers the FP8 folder. Texts are those given, the
torture strings below, and every special token alone and in context.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType
from tokenizers import Tokenizer

from streamquant.convert.metadata.vocabulary_spm import added_type
from streamquant.files.gguf_file import read_keys
from streamquant.validate.engines.engine import Engine

FIRST = 5
"""Differences that are kept of each group."""
WINDOW = 8
"""Ids that are shown on either side of the first that differs."""

TORTURE: Mapping[str, tuple[str, ...]] = {
    "empty and short": ("", " ", "a", "\n", "\t", ".", "é", "字"),
    "whitespace": (
        "  ",
        "   a",
        "a   ",
        "a  b",
        " \n",
        "\n\n\n",
        "\r\n\r\n",
        "\t\t\tx",
        " \t \n \r\n a",
        "a\u00a0b\u2003c\u3000d",
        "x" + " " * 100 + "y",
        "\n" * 40,
        "a\u200bb\u200cc\u200dd\ufeffe",
        "line\u2028separator\u2029s",
        "\x0b\x0c\x85",
    ),
    "digits": (
        "0",
        "12",
        "123",
        "1234",
        "12345678901234567890",
        "3.14159",
        "1,000,000.00",
        "1e-10",
        "0x1F",
        "2026-11-22T18:05",
        "١٢٣",
        "१२३",
        "①②③",
        "½¼",
        "²³",
        "Ⅷ",
        "٠١٢٣٤٥٦٧٨٩",
        "IPv4 192.168.0.1",
    ),
    "words": (
        "Hello World",
        "don't I'll we've it's you're I'm he'd",
        "DON'T I'LL WE'VE",
        "CamelCaseWords snake_case_words",
        "ﬁ ligature",
        "naïve café",
        "e\u0301 decomposed",
        "Straße STRASSE",
        "İstanbul ı",
        "ſ long s",
        "…—–‘’“”",
        "O’Neill’s",
    ),
    "code": (
        "def f(x):\n    return x**2  # comment\n",
        "for (int i=0;i<n;++i) { a[i] += b->c; }",
        '<div class="x">&amp;</div>',
        "SELECT * FROM t WHERE a='b';",
        '\\n \\t \\\\ "quoted"',
        '{"a": [1, 2, {"b": null}]}',
        "#!/bin/sh\nset -eu\n",
        "====----____~~~~",
        "!@#$%^&*()_+-=[]{}|;':\",./<>?",
        "a/b\\c",
        "https://example.org/?q=1&r=2#x",
    ),
    "scripts": (
        "你好，世界！",
        "今日はいい天気ですね。",
        "안녕하세요 세계",
        "Привет, мир",
        "Γειά σου Κόσμε",
        "नमस्ते दुनिया",
        "สวัสดีชาวโลก",
        "ភាសាខ្មែរ",
        "አማርኛ",
        "မြန်မာ",
        "ქართული",
        "Tiếng Việt",
        "𠀋𡈽𤭢 rare",
        "ｆｕｌｌｗｉｄｔｈ",
        "ｶﾀｶﾅ",
    ),
    "right to left": (
        "שלום עולם",
        "مرحبا بالعالم",
        "abc \u202eדוגמה\u202c def",
        "עִבְרִית with נִקּוּד",
        "لا إله",
        "\u200f\u200e",
    ),
    "emoji": (
        "😀",
        "👨‍👩‍👧‍👦",
        "👩🏽‍🚀",
        "🏳️‍🌈",
        "🇩🇪🇫🇷",
        "❤️ ❤",
        "1️⃣",
        "🤷🏿‍♀️ ok",
        "😀😃😄😁",
        "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "☺︎ ☺️",
    ),
    "combining": ("Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘", "a\u0308 ä", "\u1100\u1161\u11a8 각", "\u0e33\u0e4d", "क्षि"),
    "control characters": (
        "\x01\x02\x03",
        "a\x07b",
        "\x1b[31mred\x1b[0m",
        "\x7f",
        "\u0080\u009f",
        "\ufffd",
        "\ufffe\uffff",
        "\U0010ffff",
        "\ue000",
    ),
    "almost special": (
        "<|im_start|",
        "<|im_end|> ",
        "< |eot_id|>",
        "<|",
        "|>",
        "<think",
        "</think >",
        "<tool_call >",
        "<s>",
        "</s>",
        "[INST]",
        "<0x0A>",
        "<|im_start|>user\nhi<|im_end|>\n",
        "<|begin_of_text|><|begin_of_text|>",
        "<think>a</think>b",
        "▁▁a",
        "Ġa Ċ",
    ),
    "long": (
        "a" * 3000,
        "ab " * 2000,
        "字" * 1500,
        "😀" * 700,
        "0123456789" * 300,
        "x\n" * 1500,
        " " * 3000,
        "-" * 2500,
        "The quick brown fox jumps over the lazy dog. " * 250,
    ),
}
"""Strings on which tokenizers differ, by kind. No NUL: llama.cpp's texts end there."""


@dataclass(frozen=True, slots=True)
class TokenDifference:
    """A text that the two tokenize differently.

    text             its beginning
    at               index of the first id that differs
    expected, found  ids around it: of the original, of the variant
    expected_text, found_text  what these ids stand for
    cause            what is known of it, or None
    """

    text: str
    at: int
    expected: tuple[int, ...]
    found: tuple[int, ...]
    expected_text: str
    found_text: str
    cause: str | None = None


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """A kind of texts, tokenized in one way.

    name, add_special, parse_special  the kind, and the two switches of Engine.tokenize
    texts, tokens     how many were compared; tokens are the original's
    different         texts whose ids differ
    known             those of them whose cause is a known limit of the engine, not a fault of the file
    first             the first FIRST of those that are not known, then of those that are
    """

    name: str
    add_special: bool
    parse_special: bool
    texts: int
    tokens: int
    different: int
    known: int
    first: tuple[TokenDifference, ...]


@dataclass(frozen=True, slots=True)
class TokenReport:
    """A variant's tokenizer against the original's. `problems`: a line for each group with unexplained differences."""

    original: str
    variant: str
    groups: tuple[TokenGroup, ...]
    problems: tuple[str, ...]

    @property
    def texts(self) -> int:
        """Comparisons made."""
        return sum(group.texts for group in self.groups)

    @property
    def different(self) -> int:
        """Comparisons that differ without a known cause."""
        return sum(group.different - group.known for group in self.groups)

    @property
    def agrees(self) -> bool:
        """Whether every difference has a known cause."""
        return not self.problems


def compare_tokens(
    original: Engine,
    variant: Engine,
    special: Sequence[tuple[int, str, bool]],
    texts: Mapping[str, Sequence[str]] | None = None,
) -> TokenReport:
    """Tokenize everything in both engines and compare.

    special  (id, text, flagged special) of the added tokens: EngineProcess.special_tokens of the original
    texts    by name, such as the file they are from; compared as they are, with and without special parsing

    Raises StreamquantError if an engine fails.
    """
    groups = []
    for name, strings, add_special, parse_special in _jobs(special, texts or {}):
        groups.append(_compare_group(original, variant, name, strings, add_special, parse_special))
    problems = [_problem(group) for group in groups if group.different > group.known]
    return TokenReport(original.facts.model, variant.facts.model, tuple(groups), tuple(problems))


def check_token_types(path: Path, special: Iterable[tuple[int, str, bool]]) -> tuple[str, ...]:
    """What a GGUF file says of the original's added tokens: a line for each that has another text or type.

    special  (id, text, flagged special): EngineProcess.special_tokens of the original. A special token is CONTROL, any
             other USER_DEFINED, but for those that look special (convert_hf_to_gguf.py, conversion/base.py)

    llama.cpp mends some types when it loads a file, so that they show nowhere else. Raises StreamquantError if
    the file is broken.
    """
    keys = read_keys(path)
    tokens, types = keys.texts("tokenizer.ggml.tokens"), keys.wholes("tokenizer.ggml.token_type")
    problems = []
    for number, text, flag in special:
        if number >= min(len(tokens), len(types)):
            problems.append(f"{text!r} ({number}): the file has only {min(len(tokens), len(types))} tokens")
            continue
        wanted = {added_type(text, flag)} | ({int(TokenType.UNKNOWN)} if flag else set())
        if types[number] not in wanted:
            names = TokenType(added_type(text, flag)).name, _type_name(types[number])
            problems.append(f"{text!r} ({number}): type {names[0]} expected, {names[1]} found")
        if tokens[number].replace("▁", " ") != text.replace("▁", " "):
            problems.append(f"{text!r} ({number}): the file has {tokens[number]!r} in its place")
    return tuple(problems)


def _type_name(kind: int) -> str:
    return TokenType(kind).name if kind in list(TokenType) else str(kind)


def special_texts(special: Iterable[tuple[int, str, bool]]) -> dict[str, list[str]]:
    """Every added token alone and in context.

    >>> special_texts([(7, "<x>", True)])
    {'special tokens alone': ['<x>'], 'special tokens in context': ['a<x>b', ' <x> <x><x>\\n', '<x']}
    """
    found = [text for _, text, _ in special]
    context = [form for text in found for form in (f"a{text}b", f" {text} {text}{text}\n", text[:-1])]
    return {"special tokens alone": found, "special tokens in context": context}


def _jobs(
    special: Sequence[tuple[int, str, bool]], texts: Mapping[str, Sequence[str]]
) -> Iterable[tuple[str, Sequence[str], bool, bool]]:
    for name, strings in {**TORTURE, **texts}.items():
        yield name, strings, False, True
        yield name, strings, True, False
    for name, strings in special_texts(special).items():
        for add_special, parse_special in ((False, True), (False, False), (True, True)):
            yield name, strings, add_special, parse_special


def _compare_group(
    original: Engine, variant: Engine, name: str, texts: Sequence[str], add_special: bool, parse_special: bool
) -> TokenGroup:
    ways = {"add_special": add_special, "parse_special": parse_special}
    expected, found = original.tokenize(texts, **ways), variant.tokenize(texts, **ways)
    pairs = list(zip(texts, expected, found, strict=True))
    wrong = [(text, want, got) for text, want, got in pairs if want != got]
    causes = _known_causes(original, variant, wrong, add_special, parse_special)
    ordered = sorted(wrong, key=lambda item: causes[item[0]] is not None)
    return TokenGroup(
        name=name,
        texts=len(texts),
        tokens=sum(map(len, expected)),
        different=len(wrong),
        known=sum(causes[text] is not None for text, _, _ in wrong),
        first=tuple(_difference(original, *item, causes[item[0]]) for item in ordered[:FIRST]),
        **ways,
    )


_NOT_NORMALIZED = "not in Unicode's form NFC: the original's tokenizer normalizes it, llama.cpp does not"
_CONTROL_BY_TEXT = "llama.cpp takes a token of this text for a control token, whatever type the file gives it"
_OTHER_CLASS = (
    "transformers' class for this tokenizer does not follow the original's tokenizer.json here; llama.cpp's ids are"
    " those of tokenizer.json"
)
_CONTROL_TEXTS = re.compile(
    r"</s>|<\|?(fim|code|repo|file)[_-]\w+\|?>|<(PRE|SUF|MID|PAD|REPO|reponame|EOT|end_of_turn|end_of_utterance)>"
    r"|<\|(endoftext|end_of_text|end|im_end|eot_id|eom_id|return|call|flush)\|>|<｜(fim▁\w+|end▁of▁sentence)｜>"
)
"""Ends of generation and fill-in-the-middle tokens, which llama.cpp knows by text (src/llama-vocab.cpp, load)."""


def _known_causes(
    original: Engine,
    variant: Engine,
    wrong: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]],
    add_special: bool,
    parse_special: bool,
) -> dict[str, str | None]:
    """By text: the engine's limit that explains why its ids are not those of the original, or None.

    `wrong` are (text, ids of the original, ids of the variant). A cause counts only if it explains all of it: without
    it the ids are the same.
    """
    if variant.facts.kind != "llama.cpp" or not wrong:
        return {text: None for text, _, _ in wrong}
    texts = [text for text, _, _ in wrong]
    forms = [unicodedata.normalize("NFC", text) for text in texts]
    normal = variant.tokenize(forms, add_special=add_special, parse_special=parse_special)
    other = variant.tokenize(texts, add_special=add_special, parse_special=not parse_special)
    of_file = _of_tokenizer_json(original, texts, add_special=add_special, parse_special=parse_special)
    causes: dict[str, str | None] = {}
    for (text, want, got), form, normalized, reparsed in zip(wrong, forms, normal, other, strict=True):
        causes[text] = _OTHER_CLASS if of_file.get(text) == got else None
        if form != text and normalized == want:
            causes[text] = _NOT_NORMALIZED
        elif reparsed == want and _CONTROL_TEXTS.search(text):
            causes[text] = _CONTROL_BY_TEXT
    return causes


def _of_tokenizer_json(
    original: Engine, texts: Sequence[str], *, add_special: bool, parse_special: bool
) -> dict[str, tuple[int, ...]]:
    """The ids that the original's tokenizer.json gives by itself, without a class of transformers around it."""
    path = Path(original.facts.model) / "tokenizer.json"
    if original.facts.kind != "transformers" or not path.is_file():
        return {}
    backend = Tokenizer.from_file(str(path))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not parse_special
    return {text: tuple(backend.encode(text, add_special_tokens=add_special).ids) for text in texts}


def _difference(
    original: Engine, text: str, expected: tuple[int, ...], found: tuple[int, ...], cause: str | None
) -> TokenDifference:
    at = first_difference(expected, found)
    around = slice(max(0, at - WINDOW), at + WINDOW)
    known = max(original.facts.vocabulary, 1)
    readable = [[number for number in ids[around] if number < known] for ids in (expected, found)]
    expected_text, found_text = original.detokenize(readable)
    return TokenDifference(text[:200], at, expected[around], found[around], expected_text, found_text, cause)


def first_difference(expected: Sequence[object], found: Sequence[object]) -> int:
    """Index of the first item in which the two differ; the shorter one's length if it is the other's beginning.

    >>> first_difference("same", "sand"), first_difference((1,), (1, 2))
    (2, 1)
    """
    pairs = zip(expected, found)  # noqa: B905 - lengths may differ
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(expected), len(found)))


def _problem(group: TokenGroup) -> str:
    first = group.first[0]
    at = min(first.at, WINDOW)  # where the difference is among the ids that are kept
    ways = f"BOS and EOS {'added' if group.add_special else 'not added'}"
    ways += f", special tokens {'parsed' if group.parse_special else 'as text'}"
    return (
        f"{group.name} ({ways}): {group.different - group.known} of {group.texts} texts differ;"
        f" first {first.text[:60]!r}, id {first.at}:"
        f" {first.expected[at : at + 4]} expected, {first.found[at : at + 4]} found"
    )
