"""The vocabulary of a GGUF against llama.cpp's converter (keys, types, values) and llama.cpp's tokenizer (ids)."""

import logging
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer

from examples.smollm2_tokenizer import write_smollm2_tokenizer
from streamquant.convert.metadata import pretokenizer, vocabulary
from streamquant.convert.metadata.vocabulary import DEVIATIONS, Vocabulary
from streamquant.convert.metadata.vocabulary_spm import merge_scores
from streamquant.quant.errors import StreamquantError, UsageError
from tests.peers import (
    DATA,
    KV,
    Job,
    converter_vocab_kvs,
    llama_cpp_ids,
    requires_converter,
    requires_data,
    requires_llama_cpp,
    spelled,
    vectors,
    write_tiny_gguf,
)
from tests.smollm2 import find_gguf
from tests.tokenizer_folders import (
    Case,
    byte_fallback,
    byte_level,
    edit,
    gpt2_like,
    llama3_like,
    qwen2_like,
    seed_like,
    sentencepiece_model,
    smaug_like,
    tekken_like,
    write_case,
    write_config,
)

TORTURE = [
    *("", " ", "  ", "\n", "\n\n", "\t\n ", "a", "Hello world", " Hello  world ", "don't WE'VE 'tis", "1234567 89"),
    *("naïve café Äpfel", "東京 Москва", "🦊🦙 ‍🌫️", "x=y[0];\r\n\r\n", "The end, the end...", "camelCase SNAKE"),
    pretokenizer.CHECK_TEXT,
]


def linked(folder: pathlib.Path, source: pathlib.Path, arch: str, vocab_size: int) -> Case:
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name != "config.json" and path.suffix != ".safetensors":
            (folder / path.name).symlink_to(path)
    write_config(folder, arch, vocab_size)
    return Case(folder, arch, vocab_size)


SYNTHETIC: dict[str, Callable[[pathlib.Path], Case]] = {
    "llama3": llama3_like,
    "qwen2": qwen2_like,
    "seed": seed_like,
    "tekken": tekken_like,
    "gpt2": gpt2_like,
    "smaug": smaug_like,
    "sentencepiece": sentencepiece_model,
}
REAL: dict[str, Callable[[pathlib.Path], Case]] = {
    "hermes4-14b": lambda folder: linked(folder, DATA / "tokenizers" / "hermes4-14b", "qwen3", 151936),
    "hermes4-llama": lambda folder: linked(folder, DATA / "tokenizers" / "hermes4-llama", "llama", 128256),
    "stories260K": lambda folder: linked(folder, DATA / "models" / "stories260K-bf16", "llama", 512),
    "byte-fallback": byte_fallback,
}


class Shelf:
    """All cases of this module, each made once and read once."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.cases = {name: make(root / name) for name, make in SYNTHETIC.items()}
        if DATA.is_dir():
            self.cases |= {name: make(root / name) for name, make in REAL.items()}
        gguf_path = find_gguf()
        if gguf_path is not None:
            write_smollm2_tokenizer(gguf_path, root / "smollm2")
            write_config(root / "smollm2", "llama", 49152, bos_token_id=1, eos_token_id=2, pad_token_id=2)
            self.cases["smollm2"] = Case(root / "smollm2", "llama", 49152)
        self.smollm2_gguf = gguf_path
        self._read: dict[str, Vocabulary] = {}
        self._reference: dict[str, KV] = {}

    def __getitem__(self, name: str) -> Case:
        if name not in self.cases:
            pytest.skip(f"no data for {name} (STREAMQUANT_DATA, STREAMQUANT_SMOLLM2)")
        return self.cases[name]

    def ours(self, name: str) -> Vocabulary:
        if name not in self._read:
            self._read[name] = self[name].read()
        return self._read[name]

    def reference(self, name: str) -> KV:
        """What the reference converter writes; it runs once for all cases, since starting it is what takes time."""
        assert self[name]
        if not self._reference:
            found = converter_vocab_kvs([Job(case.folder, case.pre) for case in self.cases.values()])
            self._reference = dict(zip(self.cases, found, strict=True))
        return {key: value for key, value in self._reference[name].items() if key.startswith(("tokenizer.", "error"))}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("vocabularies"))


@requires_converter
@pytest.mark.parametrize("name", [*SYNTHETIC, *REAL, "smollm2"])
def test_equals_the_reference_converter(shelf: Shelf, name: str) -> None:
    reference, ours = shelf.reference(name), spelled(shelf.ours(name).metadata)
    deviating = {
        "stories260K": {"tokenizer.ggml.scores"},
        "byte-fallback": {"tokenizer.ggml.scores"},
        "gpt2": {"tokenizer.ggml.eos_token_id"},  # a list in config.json
        "smaug": {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_eos_token"},  # named nowhere, and added
    }.get(name, set())
    added = ours.keys() - reference.keys()
    assert reference.keys() - ours.keys() == set()
    assert added <= deviating
    if "tokenizer.chat_templates" in reference:
        reference["tokenizer.chat_templates"][1].sort()
    assert {key for key in reference if reference[key] != ours[key]} == deviating - added
    assert deviating <= DEVIATIONS.keys()
    assert [kind for kind, _ in reference.values()] == [ours[key][0] for key in reference]


def test_smollm2_equals_the_published_gguf(shelf: Shelf) -> None:
    import gguf

    ours = shelf.ours("smollm2").metadata
    assert shelf.smollm2_gguf is not None
    fields = gguf.GGUFReader(shelf.smollm2_gguf).fields
    published = {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
    assert {key: value.value for key, value in ours.items()} == published


def hf_ids(case: Case, texts: list[str], *, add_special: bool = False) -> list[list[int]]:
    backend = Tokenizer.from_file(str(case.folder / "tokenizer.json"))
    return [list(backend.encode(text, add_special_tokens=add_special).ids) for text in texts]


def engine_ids(shelf: Shelf, name: str, texts: list[str], *, add_special: bool = False) -> list[list[int]]:
    model = shelf.root / f"{name}.gguf"
    if not model.exists():
        write_tiny_gguf(model, shelf.ours(name).metadata)
    return llama_cpp_ids(model, texts, add_special=add_special)


CHAT = {
    "hermes4-14b": "<|im_start|>user\nhi<|im_end|>\n<tool_call>\n{}\n</tool_call><think> </think><|endoftext|>",
    "hermes4-llama": "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><tool_call>\n{}</tool_call><think>x",
    "smollm2": "<|im_start|>user\nhi 123<|im_end|>\n<|endoftext|><repo_name>x",
    "stories260K": "<s>hi there</s>",
    "byte-fallback": "<s>hi<|end|>Once upon <think> a time",
    "llama3": "<|begin_of_text|>the end<tool_call>the end<|eot_id|>",
    "qwen2": "The end<|im_end|><|endoftext|> the",
    "seed": "<seed:bos>the end\r\n\r\n!!!\n<seed:eos>",
    "tekken": "<s>HTTPServer's</s>",
    "gpt2": "the<|endoftext|>end",
    "smaug": "<t>don't 1234 end",
}


@requires_llama_cpp
@pytest.mark.parametrize("name", CHAT)
def test_llama_cpp_gives_the_ids_of_hugging_face(shelf: Shelf, name: str) -> None:
    case, texts = shelf[name], [*TORTURE, CHAT[name]]
    if name in ("stories260K", "byte-fallback"):
        texts += (DATA / "text" / "tinystories_sample.txt").read_text(encoding="utf-8").splitlines()
    assert engine_ids(shelf, name, texts) == hf_ids(case, texts)


@requires_llama_cpp
@pytest.mark.parametrize("name", ["hermes4-14b", "hermes4-llama", "smollm2", "stories260K", "llama3", "tekken"])
def test_llama_cpp_adds_bos_where_hugging_face_does(shelf: Shelf, name: str) -> None:
    texts = ["Hello world", "a"]
    assert engine_ids(shelf, name, texts, add_special=True) == hf_ids(shelf[name], texts, add_special=True)


@requires_llama_cpp
@requires_data
@pytest.mark.parametrize(("name", "vocabulary_name"), [("hermes4-14b", "qwen2"), ("hermes4-llama", "llama-bpe")])
def test_llama_cpp_gives_the_published_vectors(shelf: Shelf, name: str, vocabulary_name: str) -> None:
    cases = vectors(vocabulary_name)
    assert len(cases) == 46
    found = engine_ids(shelf, name, [text for text, _ in cases])
    assert found == [list(ids) for _, ids in cases]


@requires_llama_cpp
@requires_data
def test_scores_of_the_reference_give_other_ids(shelf: Shelf, tmp_path: pathlib.Path) -> None:
    """The reason for the deviation: with all scores equal llama.cpp's ids are wrong. Remove it when this fails."""
    metadata = dict(shelf.ours("stories260K").metadata)
    scores = metadata["tokenizer.ggml.scores"]
    metadata["tokenizer.ggml.scores"] = vocabulary.GGUFValue([-1000.0] * 512, scores.type, scores.sub_type)
    write_tiny_gguf(tmp_path / "model.gguf", metadata)
    texts = ["Once upon a time there was a little girl"]
    assert llama_cpp_ids(tmp_path / "model.gguf", texts) != hf_ids(shelf["stories260K"], texts)


# --- decisions told to the user -------------------------------------------------------------------------------------


@requires_data
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hermes4-14b", "tokenizer.ggml.pre = 'qwen2': regex of tokenizer.json and llama.cpp's hash agree"),
        ("hermes4-14b", "267 ids have no token: [PADn], unused"),
        ("hermes4-14b", "normalizer NFC: llama.cpp does not apply it; ids differ for text that it would change"),
        ("hermes4-14b", "chat template from chat_template.jinja"),
        ("hermes4-llama", "tokenizer.ggml.pre = 'llama-bpe': regex of tokenizer.json and llama.cpp's hash agree"),
        ("stories260K", "no chat template found"),
        (
            "stories260K",
            "tokenizer.ggml.scores: from the order of 165 merge rules (the reference converter writes -1000)",
        ),
        ("smollm2", "tokenizer.ggml.pre = 'smollm': regex of tokenizer.json and llama.cpp's hash agree"),
        ("qwen2", "token '<|new|>' is only in tokenizer_config.json: id 402"),
        ("sentencepiece", "vocabulary of 350 pieces from tokenizer.model (SentencePiece)"),
        ("sentencepiece", "31663 ids have no token: [PADn], unused"),
    ],
)
def test_notes(shelf: Shelf, name: str, expected: str) -> None:
    assert expected in shelf.ours(name).notes


def test_scores_are_those_of_sentencepiece(shelf: Shelf) -> None:
    """From a SentencePiece model's own merge rules the scores of its file come out again."""
    kv = shelf.ours("sentencepiece").metadata
    tokens, scores = kv["tokenizer.ggml.tokens"].value[:350], kv["tokenizer.ggml.scores"].value[:350]
    vocab = {text: i for i, text in enumerate(tokens)}
    score = dict(zip(tokens, scores, strict=True))
    merges = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    merges.sort(key=lambda pair: -score["".join(pair)])
    found, notes = merge_scores(vocab, [list(pair) for pair in merges])
    made = {left + right for left, right in merges}
    assert len(made) > 15
    assert {text: found[text] for text in made} == {text: score[text] for text in made}
    assert len(notes) == 1


def test_scores_that_cannot_say_it_all_are_noted() -> None:
    vocab = dict.fromkeys(["a", "b", "c", "ab", "bc", "abc"], 0)
    scores, notes = merge_scores(vocab, ["a b", "b c", "ab c"])
    assert scores == {"ab": 0.0, "bc": -1.0, "abc": -2.0}
    assert "1 pairs of tokens join to a token without a merge rule, 0 rules are out of order" in notes[1]
    assert "0 pairs of tokens join" in merge_scores(vocab, ["ab c", "a b", "a bc", "b c"])[1][1]


@requires_data
def test_byte_fallback_deviations(tmp_path: pathlib.Path) -> None:
    case = byte_fallback(tmp_path / "x", extra_special_tokens=[])._replace(vocab_size=520)
    edit(case.folder / "tokenizer.json", lambda t: t["normalizer"]["normalizers"].pop(0))
    metadata = case.read().metadata
    assert metadata["tokenizer.ggml.tokens"].value[514:516] == ["<named>", "[PAD515]"]
    assert metadata["tokenizer.ggml.token_type"].value[512:516] == [3, 4, 4, 5]
    assert metadata["tokenizer.ggml.add_space_prefix"].value is False


@requires_llama_cpp
@requires_data
def test_llama_cpp_puts_no_space_before_text_where_hugging_face_does_not(tmp_path: pathlib.Path) -> None:
    case = byte_fallback(tmp_path / "x")
    edit(case.folder / "tokenizer.json", lambda t: t["normalizer"]["normalizers"].pop(0))
    write_tiny_gguf(tmp_path / "model.gguf", case.read().metadata)
    texts = ["Once upon", "x<|end|>time"]
    assert llama_cpp_ids(tmp_path / "model.gguf", texts) == hf_ids(case, texts)


@requires_data
def test_space_prefix_is_told_where_the_files_disagree(tmp_path: pathlib.Path) -> None:
    case = byte_fallback(tmp_path / "x", add_prefix_space=False)
    assert any("add_prefix_space = False in tokenizer_config.json" in note for note in case.read().notes)
    edit(
        case.folder / "tokenizer.json",
        lambda t: t.update(
            normalizer=None,
            pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        ),
    )
    assert any("only before the first text" in note for note in case.read().notes)


def test_null_template_falls_back_to_the_file(tmp_path: pathlib.Path) -> None:
    case = write_case(tmp_path / "x", byte_level(None), "qwen2", pre=None, chat_template=None)
    assert "tokenizer.chat_template" not in case.read().metadata
    (case.folder / "chat_template.jinja").write_text("{{ a }}")
    assert case.read().metadata["tokenizer.chat_template"].value == "{{ a }}"
    (case.folder / "tokenizer_config.json").write_text('{"chat_template": "{{ b }}"}')
    read = case.read()
    assert read.metadata["tokenizer.chat_template"].value == "{{ b }}"
    assert any("chat_template.jinja differs" in note for note in read.notes)
    (case.folder / "tokenizer_config.json").unlink()
    assert case.read().metadata["tokenizer.chat_template"].value == "{{ a }}"


def test_template_names_are_sorted(shelf: Shelf) -> None:
    assert shelf.ours("llama3").metadata["tokenizer.chat_templates"].value == ["rag", "tool_use_"]
    assert shelf.ours("qwen2").metadata["tokenizer.chat_templates"].value == ["rag", "tool_use"]


def test_vocabulary_of_small_granite_adds_no_bos(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    case = llama3_like(tmp_path / "x")
    assert case.read().metadata["tokenizer.ggml.add_bos_token"].value is True
    assert case._replace(vocab_size=49152).read().metadata["tokenizer.ggml.add_bos_token"].value is False
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_codellama_ids(shelf: Shelf) -> None:
    assert shelf.ours("sentencepiece").metadata["tokenizer.ggml.eot_token_id"].value == 32010


def test_tokenizer_model_that_is_not_sentencepiece_gives_way(shelf: Shelf, tmp_path: pathlib.Path) -> None:
    case = llama3_like(tmp_path / "x")
    (case.folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert case.read().metadata == shelf.ours("llama3").metadata


def test_code_of_the_checkpoint_is_not_run(tmp_path: pathlib.Path) -> None:
    case = gpt2_like(tmp_path / "x")
    edit(case.folder / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["evil.Evil", None]}))
    (case.folder / "evil.py").write_text("raise SystemExit('ran')")
    assert any("auto_map" in note for note in case.read().notes)


def test_truncation_in_the_file_changes_nothing(shelf: Shelf, tmp_path: pathlib.Path) -> None:
    case = llama3_like(tmp_path / "x")
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edit(case.folder / "tokenizer.json", lambda t: t.update(truncation=cut))
    assert case.read() == shelf.ours("llama3")


def test_reading_logs_nothing(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        shelf["smaug"].read()
        shelf["sentencepiece"].read()
    assert caplog.records == []


def test_import_is_light() -> None:
    modules = ("streamquant.convert.metadata.vocabulary", "streamquant.convert.metadata.model_metadata")
    code = f"import sys, {', '.join(modules)}; print({{'torch', 'transformers'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# --- hostile tokenizers ---------------------------------------------------------------------------------------------


Damage = Callable[[pathlib.Path], object]


def patch(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda folder: edit(folder / name, change)


def write(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str, *, instead: str | None = None) -> Damage:
    def damage(folder: pathlib.Path) -> None:
        (folder / name).unlink()
        if instead is not None:
            (folder / instead).write_bytes(b"x")

    return damage


T, C, M = "tokenizer.json", "tokenizer_config.json", "config.json"
FAULTS: dict[str, tuple[Damage, str]] = {
    "broken JSON": (write(T, "{"), "broken JSON"),
    "not UTF-8": (write(C, b'{"a": "\xff"}'), "not UTF-8"),
    "list": (write(C, "[]"), "an object at the top level"),
    "no tokenizer": (remove(T), "no tokenizer\n"),
    "slow tokenizer only": (remove(T, instead="vocab.json"), "save_pretrained"),
    "model missing": (patch(T, lambda t: t.pop("model")), r"tokenizer.json, model\n.*NoneType.*\n.*dict"),
    "Unigram": (patch(T, lambda t: t["model"].update(type="Unigram")), "unknown tokenizer model"),
    "WordPiece": (patch(T, lambda t: t["model"].update(type="WordPiece")), "unknown tokenizer model"),
    "dropout": (patch(T, lambda t: t["model"].update(dropout=0.1)), "no BPE with dropout"),
    "suffix": (patch(T, lambda t: t["model"].update(end_of_word_suffix="</w>")), "no BPE with end_of_word_suffix"),
    "vocab list": (patch(T, lambda t: t["model"].update(vocab=[])), r"model.vocab\n.*list"),
    "id text": (patch(T, lambda t: t["model"]["vocab"].update(a="1")), r"model.vocab\['a'\]\n.*str '1'\n.*int"),
    "id bool": (patch(T, lambda t: t["model"]["vocab"].update(a=True)), r"model.vocab\['a'\]\n.*bool"),
    "twice one id": (patch(T, lambda t: t["model"]["vocab"].update(a=3)), "two tokens have one id"),
    "surrogate": (patch(T, lambda t: t["model"]["vocab"].update({"\ud800": 405})), "not valid Unicode"),
    "merges of nothing": (
        patch(T, lambda t: t["model"].update(merges=[["q", "zzz"]])),
        "library tokenizers cannot load",
    ),
    "merges a number": (patch(T, lambda t: t["model"].update(merges=3)), "library tokenizers cannot load"),
    "merges missing": (patch(T, lambda t: t["model"].update(merges=[])), "no merges"),
    "unknown step": (patch(T, lambda t: t["pre_tokenizer"].update(type="Magic")), "library tokenizers cannot load"),
    "added token id": (patch(T, lambda t: t["added_tokens"][0].update(id=4000)), "does not get the id"),
    "neither kind": (patch(T, lambda t: t.update(pre_tokenizer={"type": "Whitespace"})), "neither byte-level"),
    "unknown regex": (
        patch(T, lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="a+")),
        r"unknown pre-tokenizer.*\n.*\n.*split a\+ -> bytes.*hash [0-9a-f]{64}\n.*\n.*--pre",
    ),
    "unknown normalizer": (patch(T, lambda t: t.update(normalizer={"type": "Lowercase"})), "Lowercase"),
    "normalizer a list": (patch(T, lambda t: t.update(normalizer=["x"])), "tokenizer.json, normalizer"),
    "bos a number": (patch(C, lambda c: c.update(bos_token=3)), r"tokenizer_config.json, bos_token\n.*int 3"),
    "bos without text": (patch(C, lambda c: c.update(bos_token={"x": 1})), "bos_token.content"),
    "flag a text": (patch(C, lambda c: c.update(add_bos_token="true")), r"add_bos_token\n.*str 'true'\n.*bool or null"),
    "prefix a text": (patch(C, lambda c: c.update(add_prefix_space=1)), "add_prefix_space"),
    "extra a text": (patch(C, lambda c: c.update(additional_special_tokens="x")), "additional_special_tokens"),
    "decoder a list": (patch(C, lambda c: c.update(added_tokens_decoder=[])), "added_tokens_decoder"),
    "decoder key": (
        patch(C, lambda c: c.update(added_tokens_decoder={"x": {"content": "a"}})),
        "a token id, 0 or more",
    ),
    "decoder value": (patch(C, lambda c: c.update(added_tokens_decoder={"1": "a"})), r"decoder\['1'\]\n.*str 'a'"),
    "decoder content": (patch(C, lambda c: c.update(added_tokens_decoder={"1": {}})), r"\['1'\].content"),
    "two files": (
        patch(C, lambda c: c.update(added_tokens_decoder={"7": {"content": "<|eot_id|>"}})),
        r"disagree\n.*tokenizer_config.json, '<\|eot_id\|>'\n.*id 7\n.*id 401",
    ),
    "tokens beyond": (
        patch(C, lambda c: c.update(additional_special_tokens=[f"<x{i}>" for i in range(9)])),
        r"4 token ids are not below the vocabulary size\n.*\n.*410 '<x5>'.*\n.*0 to 409",
    ),
    "surrogate in special": (patch(C, lambda c: c.update(pad_token="\udc00")), "not valid Unicode"),
    "special id too high": (patch(M, lambda m: m.update(eos_token_id=410)), r"eos_token_id\n.*410\n.*0 to 409"),
    "special id negative": (patch(M, lambda m: m.update(pad_token_id=-1)), r"out of range\n.*pad_token_id\n.*-1"),
    "special id text": (patch(M, lambda m: m.update(bos_token_id="1")), r"bos_token_id\n.*str '1'"),
    "special id in list": (patch(M, lambda m: m.update(eos_token_id=[1, None])), "eos_token_id"),
    "text_config": (patch(M, lambda m: m.update(text_config=3)), "text_config"),
    "special map": (write("special_tokens_map.json", '{"eos_token": 3}'), "special_tokens_map.json, eos_token"),
    "template a number": (patch(C, lambda c: c.update(chat_template=3)), "chat_template"),
    "template entry": (patch(C, lambda c: c.update(chat_template=["x"])), r"chat_template\[0\]"),
    "template name": (patch(C, lambda c: c.update(chat_template=[{"template": "x"}])), r"chat_template\[0\].name"),
    "template file": (write("chat_template.jinja", b"\xff"), "cannot read the chat template"),
    "surrogate in decoder": (
        patch(C, lambda c: c.update(added_tokens_decoder={"410": {"content": "\udc00"}})),
        "not valid Unicode",
    ),
    "surrogate in template": (patch(C, lambda c: c.update(chat_template="\udc00")), "not valid Unicode"),
    "template JSON": (write("chat_template.json", '{"chat_template": 3}'), "chat_template.json"),
    "class": (patch(C, lambda c: c.update(tokenizer_class="HybridDNATokenizer")), "unknown tokenizer class"),
    "duplicate text": (patch(T, lambda t: t["added_tokens"][3].update(content="[PAD406]")), "two tokens have one text"),
    "model alone": (remove(T, instead="tokenizer.model"), "no SentencePiece model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_hostile_tokenizer(tmp_path: pathlib.Path, fault: str) -> None:
    case = llama3_like(tmp_path / "x")
    damage, expected = FAULTS[fault]
    damage(case.folder)
    with pytest.raises(StreamquantError) as caught:
        case.read()
    assert re.search(expected, str(caught.value)), str(caught.value)


@requires_data
def test_hostile_byte_fallback(tmp_path: pathlib.Path) -> None:
    case = byte_fallback(tmp_path / "x")
    edit(case.folder / "tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(StreamquantError, match=r"only writes spaces as '▁'\n.*\n.*Lowercase"):
        case.read()
    assert any("nothing was checked" in note for note in case.read(pre="default").notes)
    with pytest.raises(UsageError, match="--pre is for byte-level BPE"):
        case.read(pre="qwen2")


def test_hostile_sentencepiece(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = sentencepiece_model(tmp_path / "x")
    with pytest.raises(StreamquantError, match=r"no tokenizer\.json, and tokenizer\.model is of no use"):
        case._replace(arch="seed_oss").read()
    assert any(
        "embedding ends at row 401: 402 '<extra>'" in note for note in case._replace(vocab_size=402).read().notes
    )
    (case.folder / "added_tokens.json").write_text('{"<extra>": -1}')
    with pytest.raises(StreamquantError, match=r"out of range\n.*added_tokens.json, '<extra>'\n.*-1\n.*0 or more"):
        case.read()
    with pytest.raises(StreamquantError, match=r"50 token ids are not below.*\n.*tokenizer.model\n.*350 pieces"):
        case._replace(vocab_size=300).read()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(StreamquantError, match="pip install sentencepiece"):
        case.read()


def test_unreadable_special_tokens(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    def fail(*_: object, **__: object) -> None:
        raise KeyError("special")

    monkeypatch.setattr(gguf, "SpecialVocab", fail)
    with pytest.raises(StreamquantError, match="library gguf cannot read the special tokens"):
        shelf["gpt2"].read()
