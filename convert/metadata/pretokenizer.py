"""The name in `tokenizer.ggml.pre`: which of llama.cpp's built-in pre-tokenizers splits text as tokenizer.json does.

llama.cpp does not read a tokenizer's regex from the file; it has a fixed list of named pre-tokenizers
(src/llama-vocab.cpp, llm_tokenizer_bpe and llama_vocab::impl::load). A wrong name is not noticed by anything: the model
answers, but on other token ids than it was trained with. llama.cpp's converter finds the name by a hash over the ids of
one fixed text, which changes with every added token that occurs in it, with BOS and with the version of transformers.
Here the name is read from the definition of the tokenizer itself, and the hash is the cross-check.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from streamquant.quant.errors import StreamquantError, UsageError

Definition = tuple[str, ...]

BYTES = "bytes"  # the last step of every byte-level tokenizer: each byte becomes one printable character


@dataclass(frozen=True)
class Group:
    """The names under which llama.cpp splits text by the same rules.

    canonical      the name that is written when only the definition is known
    names          all names that llama.cpp gives these rules
    definitions    the steps of tokenizer.json (see definition_of) that llama.cpp's rules were made from
    ignore_merges  whether a piece that is a token as a whole is taken without merging (BPE option `ignore_merges`)
    adds_bos       whether llama.cpp adds BOS when the file has no tokenizer.ggml.add_bos_token
    merges_either  whether tokenizers of the family have the option `ignore_merges` either way: their vocabularies are
                   ranks of tiktoken, whose tokens the merges reach (TikTokenConverter of transformers sets it)
    """

    canonical: str
    names: tuple[str, ...]
    definitions: tuple[Definition, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    merges_either: bool = False

    def takes(self, definition: Definition, *, ignore_merges: bool) -> bool:
        """Whether a tokenizer.json of these steps is one of the group."""
        return definition in self.definitions and (self.merges_either or self.ignore_merges == ignore_merges)


def _split(regex: str) -> Definition:
    return (f"split {regex}", BYTES)


# The regexes as the tokenizer.json of each family spells them; llama-vocab.cpp quotes most as "original regex".
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # built into ByteLevel
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"split \p{N}{1,3}",
    "split [\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""split [!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    BYTES,
)
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-"
    "\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-"
    "\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
    "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-"
    "\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
    "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-"
    "\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-"
    "\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"split [\r\n]",
    rf"split \s?[{_CASED_LETTERS}]+",
    "split \\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"split \s+$",
    "split [\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"split \p{N}",
    BYTES,
)
_UPPER_NO_HAN, _LOWER_NO_HAN = (letters.removesuffix("]") + r"&&[^\p{Han}]]" for letters in (_UPPER, _LOWER))
KIMI = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER_NO_HAN}*{_LOWER_NO_HAN}+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER_NO_HAN}+{_LOWER_NO_HAN}*{_CONTRACTIONS}?",
        *(r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    )
)
"""The regex of Kimi K2, in the code of its tokenizer (tokenization_kimi.py)."""
_DIGIT_THEN_GPT2 = (r"split \p{N}", f"split {_GPT2}", BYTES)

# Source: ggml-org/llama.cpp src/llama-vocab.cpp at commit 00ad355e, the regex_exprs of each pre type (the first switch)
# and the names that select it (load). Groups that no supported model family uses are left out.
GROUPS = (
    Group(
        "llama-bpe",
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        (_split(_LLAMA3),),
        ignore_merges=True,
        adds_bos=True,
    ),
    Group("smaug-bpe", ("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), (_split(_LLAMA3),)),
    Group(
        "qwen2",
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2"),
        (_split(_QWEN2),),
    ),
    Group("qwen35", ("qwen35",), (_split(_QWEN35),)),
    Group("seed-coder", ("seed-coder",), (_split(_SEED),)),
    Group("tekken", ("tekken",), (_split(_TEKKEN),), ignore_merges=True, adds_bos=True),
    Group("gpt-4o", ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), (_split(_GPT4O),), merges_either=True),
    Group("deepseek-llm", ("deepseek-llm",), (_DEEPSEEK_LLM,)),
    Group("kimi-k2", ("kimi-k2",), (_split(KIMI),), merges_either=True),
    Group("deepseek-v3", ("deepseek-v3", "joyai-llm"), (_DEEPSEEK3,)),
    Group(
        "smollm",
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (_DIGIT_THEN_GPT2,),
    ),
    Group(
        "gpt-2",
        (
            *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0", "mellum"),
            *("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code", "roberta-bpe"),
            *("modern-bert", "exaone4"),
        ),
        (_split(_GPT2),),
    ),
)

# The names that llama.cpp accepts and that are in no group above (same source, function load).
OTHER_NAMES = frozenset(
    "afmoe bailingmoe bailingmoe2 bloom chameleon cohere2moe deepseek-coder default "  # noqa: SIM905
    "exaone-moe falcon gemma4 gpt3-finnish granite-embed-multi-311m granite-embed-multi-97m hunyuan-dense hy_v4 jais-2 "
    "laguna llada-moe minicpm5 poro-chat sarvam-moe spark2_5 superbpe tiny_aya ufakzeka viking "
    "whitespace youtu".split()
)
KNOWN_NAMES = OTHER_NAMES.union(*(group.names for group in GROUPS))

# sha256 of str(ids of CHECK_TEXT) -> name. Source: llama.cpp conversion/base.py, get_vocab_base_pre (generated by its
# convert_hf_to_gguf_update.py from the published tokenizers). Only names whose tokenizer.json is known to belong to the
# group, so that a difference between hash and definition is always worth stopping for.
HASHES = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "32d85c31273f8019248f2559fed492d929ea28b17e51d81d3bb36fff23ca72b3": "stablelm2",
    "1444df51289cfa8063b96f0e62b1125440111bc79a52003ea14b6eac7016fd5f": "qwen35",
    "d30d75d9059f1aa2c19359de71047b3ae408c70875e8a3ccf8c5fba56c9d8af4": "qwen35",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "d353350c764d8c3b39c763113960e4fb4919bea5fbf208a0e3b22e8469dc7406": "llama4",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "81212dc7cdb7e0c1074ca62c5aeab0d43c9f52b8a737be7b12a777c953027890": "kimi-k2",
    # With and without BOS, by the version of transformers; llama.cpp calls the other one joyai-llm.
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
    "b4b8ca1f9769494fbd956ebc4c249de6131fb277a4a3345a7a92c7dd7a55808d": "deepseek-v3",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
    "9c2227e4dd922002fb81bde4fc02b0483ca4f12911410dee2255e4987644e3f8": "command-r",
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085": "phi-2",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",
}

# The text that llama.cpp hashes; every character counts.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)

_ESCAPES = str.maketrans({"\r": r"\r", "\n": r"\n", "\t": r"\t"})
_HINT = "pass the right name with --pre (after comparing token ids), or report the tokenizer"


def group_of(name: str) -> Group | None:
    """Return the group that a name of llama.cpp belongs to, or None if it is in no known group."""
    return next((group for group in GROUPS if name in group.names), None)


def definition_of(tokenizer: Mapping[str, Any]) -> Definition:
    """Return the steps by which a tokenizer.json splits text, in one spelling.

    Steps are 'split REGEX' and 'bytes'; what is neither is spelled as its JSON, so that it equals no known definition.
    Equal behaviour gets an equal spelling: Digits(individual) is a split by `\\p{N}`, ByteLevel with `use_regex` (the
    default) holds GPT-2's regex, and line breaks in a regex are written as escapes.
    """
    step = tokenizer.get("pre_tokenizer")
    steps = step.get("pretokenizers", []) if step and step.get("type") == "Sequence" else [step] if step else []
    normalizer = _unknown_normalizers(tokenizer.get("normalizer"))
    return (*normalizer, *(spelled for part in steps for spelled in _spell(part)))


def _unknown_normalizers(normalizer: Mapping[str, Any] | None) -> Definition:
    # NFC changes no text that is composed already, which nearly all is; every other normalizer changes plain text.
    if normalizer is None or normalizer.get("type") == "NFC":
        return ()
    if normalizer.get("type") == "Sequence":
        return tuple(found for part in normalizer.get("normalizers", []) for found in _unknown_normalizers(part))
    return (f"normalizer {json.dumps(normalizer, ensure_ascii=False)}",)


def _spell(step: Mapping[str, Any]) -> Definition:
    match step:
        # For a regex that matches every character it is the same to isolate the matches or to remove what is between.
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return (f"split {regex.translate(_ESCAPES)}",)
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}:
            return (f"split {regex.translate(_ESCAPES)}",)
        case {"type": "Digits", "individual_digits": True}:
            return (r"split \p{N}",)
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return (f"split {_GPT2}", BYTES) if step.get("use_regex", True) else (BYTES,)
    return (json.dumps(step, ensure_ascii=False, sort_keys=True),)


def check_hashes(tokenizer: Tokenizer, bos_id: int | None) -> tuple[str, ...]:
    """Return the hashes that llama.cpp's converter may see for this tokenizer, the likeliest first.

    Sources differ in whether BOS is added (post_processor, add_bos_token, class), so each case is hashed.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bare = tokenizer.encode(CHECK_TEXT, add_special_tokens=False).ids
    full = tokenizer.encode(CHECK_TEXT).ids
    cases = [full, bare] if bos_id is None else [full, bare, [bos_id, *bare]]
    return tuple(dict.fromkeys(hashlib.sha256(str(ids).encode()).hexdigest() for ids in cases))


def choose_pre(
    tokenizer_json: Mapping[str, Any], tokenizer: Tokenizer, *, bos_id: int | None, pre: str | None, where: str
) -> tuple[str, tuple[str, ...]]:
    """Return the value of `tokenizer.ggml.pre` and the notes on how it was found.

    tokenizer_json  the parsed tokenizer.json of a byte-level BPE tokenizer
    tokenizer       the same, loaded; its truncation and padding are switched off
    pre             the user's choice (--pre), which wins
    where           the file, for messages

    Raises StreamquantError if neither definition nor hash is known or if they contradict each other, UsageError if
    `pre` is no name of llama.cpp.
    """
    definition = definition_of(tokenizer_json)
    ignore_merges = bool(tokenizer_json["model"].get("ignore_merges"))
    group = next((g for g in GROUPS if g.takes(definition, ignore_merges=ignore_merges)), None)
    hashes = check_hashes(tokenizer, bos_id)
    hashed = next((HASHES[digest] for digest in hashes if digest in HASHES), None)
    told = f"{' -> '.join(definition) or 'no pre_tokenizer'}, ignore_merges={str(ignore_merges).lower()}"
    if pre is not None:
        check_name(pre)
        return pre, (*_notes_on_choice(pre, group), *_notes_on_normalizer(tokenizer_json))
    if hashed is None and group is None:
        raise StreamquantError(
            "unknown pre-tokenizer: llama.cpp has no rules known to split text like this tokenizer",
            where=f"{where}, pre_tokenizer",
            found=f"{told}; hash {hashes[0]}",
            required="one of " + ", ".join(g.canonical for g in GROUPS),
            hint=_HINT,
        )
    if hashed is None:
        assert group is not None
        note = (
            f"tokenizer.ggml.pre = {group.canonical!r}: from the regex of tokenizer.json; hash {hashes[0][:12]} is new"
        )
        return group.canonical, (note, *_notes_on_normalizer(tokenizer_json))
    if group is None and ignore_merges == getattr(group_of(hashed), "ignore_merges", ignore_merges):
        note = f"tokenizer.ggml.pre = {hashed!r}: from llama.cpp's hash alone; the definition is new: {told}"
        return hashed, (note, *_notes_on_normalizer(tokenizer_json))
    if group is None or hashed not in group.names:
        raise StreamquantError(
            "the definition of the tokenizer and llama.cpp's hash of its ids tell different pre-tokenizers",
            where=f"{where}, pre_tokenizer",
            found=f"definition {group.canonical if group else 'unknown'!r} ({told}), hash {hashed!r}",
            required="both in one group",
            hint=_HINT,
        )
    note = f"tokenizer.ggml.pre = {hashed!r}: regex of tokenizer.json and llama.cpp's hash agree"
    return hashed, (note, *_notes_on_normalizer(tokenizer_json))


def check_name(pre: str) -> None:
    """Raise UsageError unless `pre` is a name that llama.cpp loads."""
    if pre not in KNOWN_NAMES:
        raise UsageError(
            "unknown pre-tokenizer name",
            where="--pre",
            found=repr(pre),
            required="a name of llama.cpp: " + ", ".join(sorted(KNOWN_NAMES)),
        )


def _notes_on_choice(pre: str, group: Group | None) -> tuple[str, ...]:
    if group is None:
        return (
            f"tokenizer.ggml.pre = {pre!r}: by --pre; tokenizer.json's own definition is unknown, nothing was checked",
        )
    agrees = "agrees with" if pre in group.names else f"DISAGREES with {group.canonical!r} of"
    return (f"tokenizer.ggml.pre = {pre!r}: by --pre; it {agrees} the regex of tokenizer.json",)


def _notes_on_normalizer(tokenizer_json: Mapping[str, Any]) -> tuple[str, ...]:
    if not tokenizer_json.get("normalizer"):
        return ()
    kind = tokenizer_json["normalizer"].get("type")
    return (f"normalizer {kind}: llama.cpp does not apply it; ids differ for text that it would change",)
