"""Makers of checkpoint folders without weights: one a kind of tokenizer, small enough to be read in no time."""

import base64
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from streamquant.convert.architectures import ARCHITECTURES
from streamquant.convert.metadata import pretokenizer
from streamquant.convert.metadata.vocabulary import Vocabulary, read_vocabulary
from tests.peers import DATA

TEXT = """Once there was a fox who could count: 1 22 333 4444. "Don't," said the owl, "we'Ve ALL'd enough!"
    The fox's answer, in tabs\tand  double  spaces: naïve café, Äpfel, 東京, Москва, 🦊🦊 and 3.14159...
He'll go; she'd stay. HTTPServer parses camelCase and SNAKE_CASE, x = y[0] + {z};\r\n\r\n\n  The end, the end, the end.
"""
CONFIG = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "head_dim": 16,
}
CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "seed_oss": ("SeedOssForCausalLM", "seed_oss"),
}


class Case(NamedTuple):
    """A checkpoint folder without weights."""

    folder: pathlib.Path
    arch: str
    vocab_size: int
    pre: str | None = None

    def read(self, **options: Any) -> Vocabulary:
        rules = ARCHITECTURES[CLASSES[self.arch][0]].llama_cpp.vocabulary
        return read_vocabulary(self.folder, rules, **{"vocab_size": self.vocab_size, **options})


def write_config(folder: pathlib.Path, arch: str, vocab_size: int, **more: Any) -> None:
    name, kind = CLASSES[arch]
    config = {"architectures": [name], "model_type": kind, "vocab_size": vocab_size, **CONFIG, **more}
    (folder / "config.json").write_text(json.dumps(config))


TIKTOKEN = (
    *(b"th", b"the", b" the", b"in", b"ing", b"  ", b"    ", "\u6771".encode()[:2], "\u6771".encode(), b"is"),
    *(b"qqq", b"'s"),
)
"""Tokens of more than a byte, in the order of their ranks; merges of the others do not reach the last but one."""
KIMI_NAMES = {
    **{
        0: "[BOS]",
        1: "[EOS]",
        2: "<|im_end|>",
        3: "<|im_user|>",
        4: "<|im_assistant|>",
        9: "[EOT]",
        10: "<|im_system|>",
    },
    **{17: "<|im_middle|>", 20: "<think>"},
}
"""Special tokens, by their place behind the ranks."""
KIMI_CODE = """
class TikTokenTokenizer(PreTrainedTokenizer):
    pat_str = "|".join(
        [
            r\"\"\"[\\p{Han}]+\"\"\",
            r\"\"\"[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?\"\"\",
            r\"\"\"[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?\"\"\",
            r\"\"\"\\p{N}{1,3}\"\"\",
            r\"\"\" ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*\"\"\",
            r\"\"\"\\s*[\\r\\n]+\"\"\",
            r\"\"\"\\s+(?!\\S)\"\"\",
            r\"\"\"\\s+\"\"\",
        ]
    )

raise SystemExit("this code is not to be run")
"""
"""What is read of the code of Kimi's tokenizer."""


def write_tiktoken(folder: pathlib.Path, **more: object) -> pathlib.Path:
    """The tokenizer files of Kimi with 268 ranks; `more` are keys of tokenizer_config.json."""
    tokens = [*(bytes([byte]) for byte in range(256)), *TIKTOKEN]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    (folder / "tokenization_kimi.py").write_text(KIMI_CODE)
    named = {
        str(len(tokens) + place): {"content": text, "special": text != "<think>"} for place, text in KIMI_NAMES.items()
    }
    settings = {
        **{"added_tokens_decoder": named, "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": None},
        **{"tokenizer_class": "TikTokenTokenizer", "additional_special_tokens": ["<|im_end|>", "[EOT]"]},
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "chat_template": "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **more}))
    return folder


def byte_level(
    regex: str | None, *, ignore_merges: bool = False, special: tuple[str, ...] = (), text: str = TEXT
) -> Tokenizer:
    """A byte-level BPE tokenizer trained on a text; regex None means GPT-2's, which is built into ByteLevel."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    from tokenizers import Regex

    split = [] if regex is None else [pre_tokenizers.Split(Regex(regex), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, letters])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    backend.train_from_iterator([text], trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return backend


def lead_with(backend: Tokenizer, text: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{text} $A", pair=f"{text} $A {text} $B", special_tokens=[(text, backend.token_to_id(text))]
    )


def write_case(
    folder: pathlib.Path, backend: Tokenizer, arch: str, *, pre: str | None, spare: int = 5, **config: Any
) -> Case:
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend", **config}))
    case = Case(folder, arch, backend.get_vocab_size() + spare, pre)
    write_config(folder, arch, case.vocab_size)
    return case


def llama3_like(folder: pathlib.Path) -> Case:
    backend = byte_level(pretokenizer._LLAMA3, ignore_merges=True, special=("<|begin_of_text|>", "<|eot_id|>"))
    backend.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("▁▁tab", normalized=True)])
    backend.add_tokens([AddedToken("Ġcall", normalized=False)])
    lead_with(backend, "<|begin_of_text|>")
    return write_case(
        folder,
        backend,
        "llama",
        pre="llama-bpe",
        bos_token="<|begin_of_text|>",
        eos_token={"content": "<|eot_id|>", "__type": "AddedToken"},
        chat_template=[
            {"name": "default", "template": "{{ messages }}"},
            {"name": "tool use!", "template": "{{ tools }}"},
            {"name": "rag", "template": "{{ documents }}"},
        ],
    )


def qwen2_like(folder: pathlib.Path) -> Case:
    backend = byte_level(pretokenizer._QWEN2, special=("<|endoftext|>", "<|im_end|>"))
    backend.normalizer = normalizers.NFC()
    case = write_case(
        folder, backend, "qwen2", pre="qwen2", eos_token="<|im_end|>", add_bos_token=False, unk_token="<|new|>"
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text("{{ " + name + " }}")
    return case


def seed_like(folder: pathlib.Path) -> Case:
    backend = byte_level(pretokenizer._SEED.replace(r"\r\n", "\r\n"), special=("<seed:bos>", "<seed:eos>"))
    case = write_case(folder, backend, "seed_oss", pre="seed-coder", bos_token="<seed:bos>", eos_token="<seed:eos>")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return case


def tekken_like(folder: pathlib.Path) -> Case:
    # No bos_token in the configuration: it is known from the post_processor alone.
    backend = byte_level(pretokenizer._TEKKEN, ignore_merges=True, special=("<s>", "</s>"))
    lead_with(backend, "<s>")
    return write_case(folder, backend, "llama", pre="tekken", eos_token="</s>", add_prefix_space=False)


def gpt2_like(folder: pathlib.Path) -> Case:
    backend = byte_level(None, special=("<|endoftext|>",))
    case = write_case(folder, backend, "qwen3", pre="gpt-2", spare=0, bos_token="<|endoftext|>")
    write_config(folder, "qwen3", case.vocab_size, eos_token_id=[400, 1], pad_token_id=400)
    return case


def smaug_like(folder: pathlib.Path) -> Case:
    """Llama 3's regex without ignore_merges; the second BOS of the configuration is not the one that leads."""
    backend = byte_level(pretokenizer._LLAMA3, special=("<s>", "<t>"))
    lead_with(backend, "<t>")
    return write_case(folder, backend, "llama", pre="smaug-bpe", bos_token="<s>", add_eos_token=True)


TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|stop|>{% endfor %}"


def chat_like(folder: pathlib.Path, *, regex: str = pretokenizer._QWEN2, spare: int = 5, **config: Any) -> Case:
    """A byte-level vocabulary whose end of a turn has a name that llama.cpp does not know; EOS is named nowhere."""
    special = ("<|last|>", "<|start|>", "<|stop|>", "<|third|>", "<|fourth|>")
    backend = byte_level(regex, ignore_merges=regex == pretokenizer._LLAMA3, special=special)
    config = {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"} | config
    return write_case(folder, backend, "llama", pre=None, spare=spare, **config)


def sentencepiece_model(folder: pathlib.Path) -> Case:
    """A SentencePiece model with the vocabulary size of CodeLlama, which has ids of its own."""
    spm = pytest.importorskip("sentencepiece")
    folder.mkdir(parents=True)
    (folder / "text").write_text(TEXT)
    spm.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=350,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    added = {"400": {"content": "<|call|>"}, "401": {"content": "▁▁▁"}, "2": {"content": "</s>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True, "added_tokens_decoder": added}))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 402}))
    write_config(folder, "llama", 32016, bos_token_id=1, eos_token_id=2)
    return Case(folder, "llama", 32016)


def two_tokenizers(folder: pathlib.Path, special: tuple[str, ...] = (), **config: Any) -> Case:
    """tokenizer.model, and a tokenizer.json of the same vocabulary with further added tokens, as transformers 5 saves
    a fine-tune next to the base's tokenizer.model.
    """
    sentencepiece_model(folder)
    (folder / "added_tokens.json").unlink()
    spm = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    score = {spm.IdToPiece(number): spm.GetScore(number) for number in range(spm.vocab_size())}
    vocab = {text: number for number, text in enumerate(score)}
    pairs = [(t[:cut], t[cut:]) for t in vocab for cut in range(1, len(t)) if t[:cut] in vocab and t[cut:] in vocab]
    merges = sorted(pairs, key=lambda pair: -score["".join(pair)])
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = ("<unk>", "<s>", "</s>", *special)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    lead_with(backend, "<s>")
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "unk_token": "<unk>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = backend.get_vocab_size() + 3
    write_config(folder, "llama", rows, bos_token_id=1, eos_token_id=2)
    return Case(folder, "llama", rows)


def byte_fallback(folder: pathlib.Path, **config: Any) -> Case:
    """stories260K's vocabulary with three tokens more: special, plain, and named by the configuration alone."""
    source = json.loads((DATA / "models" / "stories260K-bf16" / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    source["added_tokens"] += [
        {"id": 512, "content": "<|end|>", "special": True, **flags},
        {"id": 513, "content": "<think>", "special": False, **flags},
        {"id": 514, "content": "<named>", "special": False, **flags},
    ]
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(source))
    named = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_special_tokens": ["<|end|>", "<named>"],
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend", **named, **config})
    )
    write_config(folder, "llama", 515, bos_token_id=1, eos_token_id=2)
    return Case(folder, "llama", 515)


def edit(path: pathlib.Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content))
