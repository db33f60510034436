"""What llama.cpp takes for its special tokens, and the keys without which it would take the wrong ones.

Source: src/llama-vocab.cpp, llama_vocab::impl::load. Where a file has no key, an id holds that belongs to the kind of
vocabulary: BOS and EOS of a byte-level one are id 11, the "," of GPT-2's, Llama 3's and Qwen's vocabulary. llama.cpp's
converter knows EOS only as one number, or by a name that tokenizer.json lists among its added tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import Keys, TokenType

from streamquant.convert.metadata.pretokenizer import group_of
from streamquant.convert.metadata.vocabulary_files import TokenizerFiles, checked_ids

# Tokens at which llama.cpp stops by their text, whatever the file's keys say.
STOP_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    )
)
_STOP_KEYS = (Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
_NO_BOS = frozenset({"glm4", "chatglm-bpe"})
# Classes of transformers 4 that add BOS themselves, whatever the post_processor of tokenizer.json says.
_ADD_BOS_THEMSELVES = ("Llama", "CodeLlama", "Gemma")
# Types whose tokens plain text never becomes.
_SPECIAL_TYPES = frozenset({int(TokenType.CONTROL), int(TokenType.USER_DEFINED), int(TokenType.UNKNOWN)})


@dataclass(frozen=True, slots=True)
class EngineTokens:
    """The special tokens that llama.cpp works with; ids, None where it has none.

    adds_bos, adds_eos  it puts BOS before a text, EOS behind it
    stops               ids at which an answer ends: EOS, EOT, EOM, and the tokens of STOP_TEXTS
    """

    bos: int | None
    eos: int | None
    unknown: int | None
    adds_bos: bool
    adds_eos: bool
    stops: frozenset[int]


def engine_tokens(metadata: Mapping[str, Any]) -> EngineTokens:
    """Return what llama.cpp reads out of the tokenizer.* keys (key -> plain value) of a GGUF file."""
    keys = Keys.Tokenizer
    texts = _list(metadata, keys.LIST)
    pre = found if isinstance(found := metadata.get(keys.PRE), str) else None
    spm = metadata.get(keys.MODEL) == "llama"
    group = group_of(pre) if pre is not None else None
    bos: int | None = 1 if spm else None if pre in _NO_BOS else 11

    def token(key: str, default: int | None) -> int | None:
        number = metadata.get(key)
        number = number if type(number) is int and 0 <= number < len(texts) else default
        return None if number is None or number >= len(texts) else number

    adds = metadata.get(keys.ADD_BOS)
    eos = token(keys.EOS_ID, 2 if spm else 11)
    stops = {number for number, text in enumerate(texts) if text in STOP_TEXTS}
    stops |= {number for number in (eos, *(token(key, None) for key in _STOP_KEYS)) if number is not None}
    return EngineTokens(
        bos=token(keys.BOS_ID, bos),
        eos=eos,
        unknown=token(keys.UNK_ID, 0 if spm else None),
        adds_bos=adds if isinstance(adds, bool) else spm or (group is not None and group.adds_bos),
        adds_eos=metadata.get(keys.ADD_EOS) is True,
        stops=frozenset(stops),
    )


def _list(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = metadata.get(key)
    return value if isinstance(value, list) else []


def stop_ids(model: Mapping[str, Any], generation: Mapping[str, Any], folder: Path) -> list[int]:
    """Return the ids at which transformers' generate() ends an answer: eos_token_id of generation_config.json, else of
    config.json (`generation` and `model`). Raises StreamquantError, which names the file in `folder`, if they are none.
    """
    source, name = (generation, "generation_config.json") if "eos_token_id" in generation else (model, "config.json")
    return checked_ids(source.get("eos_token_id"), f"{folder / name}, eos_token_id")


def write_missing(writer: Any, files: TokenizerFiles, own: Mapping[str, int]) -> Iterator[str]:
    """Write the keys without which llama.cpp would have other special tokens than the checkpoint; yield notes.

    writer  a GGUFWriter with all other tokenizer keys
    own     ids (by kind: bos, eos, unk) that tokenizer.model itself names; of a tokenizer.json none
    """
    missing = _Missing(writer, files, own)
    yield from missing.eos()
    yield from missing.bos()
    yield from missing.unknown()
    yield from missing.adds_bos()
    yield from missing.stops()


class _Missing:
    """The keys of one vocabulary; each method completes one of them."""

    def __init__(self, writer: Any, files: TokenizerFiles, own: Mapping[str, int]) -> None:
        self.writer, self.files, self.own = writer, files, own
        self.texts: list[str] = writer.kv_data[0][Keys.Tokenizer.LIST].value
        self.types: list[int] = writer.kv_data[0][Keys.Tokenizer.TOKEN_TYPE].value
        self.numbers = {text: number for number, text in enumerate(self.texts)}

    def has(self, key: str) -> bool:
        return key in self.writer.kv_data[0]

    def engine(self) -> EngineTokens:
        return engine_tokens({key: value.value for key, value in self.writer.kv_data[0].items()})

    def named(self, kind: str) -> int | None:
        """The id of the token that the tokenizer's files name."""
        text = self.files.special.get(kind)
        if text is None:
            return None
        found = self.files.backend.token_to_id(text) if self.files.backend is not None else None
        return self.numbers.get(text) if found is None else found

    def write_id(self, key: str, number: int) -> None:
        self.writer.kv_data[0].pop(key, None)
        self.writer.add_uint32(key, number)

    def write_flag(self, key: str, value: bool) -> None:
        self.writer.kv_data[0].pop(key, None)
        self.writer.add_bool(key, value)

    def is_special(self, number: int) -> bool:
        return self.types[number] in _SPECIAL_TYPES

    def unused(self) -> int | None:
        """An id without a token: llama.cpp's text of it is empty, and no text becomes it."""
        kind = int(TokenType.UNUSED)
        return self.types.index(kind) if kind in self.types else None

    def told(self, number: int) -> str:
        return f"{number} {self.texts[number]!r}"

    def told_default(self, number: int | None) -> str:
        return "none" if number is None else self.told(number)

    def template(self) -> str:
        """All chat templates, one after the other."""
        found = (value.value for key, value in self.writer.kv_data[0].items() if "chat_template" in key)
        return "\n".join(text for text in found if isinstance(text, str))

    def ends(self) -> list[int]:
        """The ids of the vocabulary at which generate() ends an answer."""
        found = stop_ids(self.files.model, self.files.generation, self.files.folder)
        found = found or stop_ids(self.files.model, {}, self.files.folder)
        return [number for number in found if 0 <= number < len(self.texts)]

    def eos(self) -> Iterator[str]:
        key, named, ends, default = Keys.Tokenizer.EOS_ID, self.named("eos"), self.ends(), self.engine().eos
        if self.has(key) and default in (named, *ends):
            return
        found = self.turn_end(ends) if named is None else named
        found = self.own.get("eos") if found is None else found
        if found is not None and found != default:
            self.write_id(key, found)
            yield f"{key} = {self.told(found)}: llama.cpp would take {self.told_default(default)}"
        elif found is None and default is not None and not self.is_special(default):
            yield from self.no_eos(default)

    def no_eos(self, default: int) -> Iterator[str]:
        """The model has no EOS, and llama.cpp would take a word for it."""
        unused = self.unused()
        if unused is not None:
            self.write_id(Keys.Tokenizer.EOS_ID, unused)
        if self.engine().adds_eos:
            self.write_flag(Keys.Tokenizer.ADD_EOS, False)
        yield (
            "WARNING: no file of the checkpoint names an EOS; llama.cpp "
            + ("takes" if unused is None else "would take")
            + f" {self.told(default)} and end every answer there"
            + ("" if unused is None else f": {Keys.Tokenizer.EOS_ID} = {self.told(unused)}, an id without a text")
        )

    def turn_end(self, numbers: Sequence[int]) -> int | None:
        """The one that the chat template writes most often, else the first special one, else the first."""
        special = [number for number in numbers if self.is_special(number)] or numbers
        template = self.template()
        return max(special, key=lambda number: template.count(self.texts[number]), default=None)

    def bos(self) -> Iterator[str]:
        key, named, believed = Keys.Tokenizer.BOS_ID, self.named("bos"), self.engine()
        if named is None and self.has(key):
            return
        found = self.own.get("bos") if named is None else named
        if found is not None and found != believed.bos:
            self.write_id(key, found)
            yield f"{key} = {self.told(found)}: llama.cpp would take {self.told_default(believed.bos)}"
        elif found is None and believed.bos is not None and not self.is_special(believed.bos):
            yield from self.no_bos(believed, believed.bos)

    def no_bos(self, believed: EngineTokens, default: int) -> Iterator[str]:
        """The model has no BOS, and llama.cpp would take a word for it."""
        word, unused = self.told(default), self.unused()
        if believed.adds_bos:
            self.write_flag(Keys.Tokenizer.ADD_BOS, False)
            yield f"{Keys.Tokenizer.ADD_BOS} = false: there is no BOS, and llama.cpp would add {word}"
        if "bos_token" in self.template() and unused is not None:
            self.write_id(Keys.Tokenizer.BOS_ID, unused)
            yield (
                f"{Keys.Tokenizer.BOS_ID} = {self.told(unused)}, an id without a text: there is no BOS, and llama.cpp"
                f" would write {word} where the chat template has bos_token"
            )
        elif "bos_token" in self.template():
            yield f"WARNING: the chat template has bos_token, and there is none: llama.cpp writes {word}"

    def unknown(self) -> Iterator[str]:
        key, named, default = Keys.Tokenizer.UNK_ID, self.named("unk"), self.engine().unknown
        found = self.own.get("unk") if named is None else named
        if not self.has(key) and default is not None and found is not None and found != default:
            self.write_id(key, found)
            yield f"{key} = {self.told(found)}: llama.cpp would take {self.told(default)}"

    def adds_bos(self) -> Iterator[str]:
        """Where llama.cpp adds BOS of itself and tokenizer.json does not."""
        believed, backend = self.engine(), self.files.backend
        if self.has(Keys.Tokenizer.ADD_BOS) or not believed.adds_bos or backend is None or believed.bos is None:
            return
        if str(self.files.config.get("tokenizer_class", "Llama")).startswith(_ADD_BOS_THEMSELVES):
            return
        if backend.encode("a").ids[:1] != [believed.bos]:
            self.write_flag(Keys.Tokenizer.ADD_BOS, False)
            yield (
                f"{Keys.Tokenizer.ADD_BOS} = false: tokenizer.json puts no BOS before a text, and llama.cpp would add"
                f" {self.told(believed.bos)}"
            )

    def stops(self) -> Iterator[str]:
        """Ids at which generate() ends an answer and llama.cpp would not; words are left out (Llama's default of 2)."""
        own = self.named("eos")
        ends = dict.fromkeys([*self.ends(), *([] if own is None else [own])])
        missed = [number for number in ends if number not in self.engine().stops and self.is_special(number)]
        free = [key for key in _STOP_KEYS if not self.has(key)]
        for key, number in zip(free, missed, strict=False):
            self.write_id(key, number)
            yield f"{key} = {self.told(number)}: an answer ends there too, and llama.cpp would go on"
        for number in missed[len(free) :]:
            yield f"WARNING: an answer ends at {self.told(number)} too, and GGUF has no key left for it"
