"""Overrides of single tensors: llama-quantize's spellings, its order, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamquant.convert.recipes.mix import Choice, MixModel, MixTensor, choose_mix
from streamquant.convert.recipes.overrides import (
    NO_OVERRIDES,
    Overrides,
    parse_overrides,
    parse_rule,
    parse_type,
    read_rules,
)
from streamquant.quant.errors import UsageError

MODEL = MixModel("llama", 16, 8, 2)


def tensors(*, tied: bool = False, columns: int = 256) -> list[MixTensor]:
    ends = ["token_embd.weight"] if tied else ["token_embd.weight", "output.weight"]
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    return [MixTensor(name, (512, columns)) for name in ends] + [
        MixTensor(f"blk.{i}.{name}.weight", (512, columns)) for i in range(16) for name in names
    ]


def types(file_type: str, overrides: Overrides, *, tied: bool = False, columns: int = 256) -> dict[str, str]:
    chosen = choose_mix(file_type, tensors(tied=tied, columns=columns), MODEL, overrides=overrides)
    return {name: choice.format for name, choice in chosen.items()}


def rules(*texts: str) -> Overrides:
    return Overrides(tuple(parse_rule(text) for text in texts))


# --- order ----------------------------------------------------------------------------------------------------------


def test_first_match_wins() -> None:
    found = types("Q4_K_M", rules(r"blk\.(0|1)\.ffn_up=q8_0", "ffn_up=Q6_K", "ffn=Q5_K"))
    assert [found[f"blk.{i}.ffn_up.weight"] for i in (0, 1, 2, 15)] == ["Q8_0", "Q8_0", "Q6_K", "Q6_K"]
    assert found["blk.3.ffn_down.weight"] == "Q5_K"


def test_patterns_are_searched_anywhere_in_the_name() -> None:
    found = types("Q4_K_M", rules("v=Q8_0"))
    assert found["blk.7.attn_v.weight"] == "Q8_0"
    assert found["blk.7.attn_q.weight"] == "Q4_K"
    assert types("Q4_K_M", rules("^v=Q8_0")) == types("Q4_K_M", NO_OVERRIDES)
    assert types("Q4_K_M", rules("TOKEN_EMBD=F16"))["token_embd.weight"] == "F16", "patterns are lower-cased"


def test_overridden_tensors_are_not_counted() -> None:
    """Layers 0 and 1 are the first eighth: with those overridden, the mix counts layers 2 and 3 as the first."""
    plain, found = types("Q4_K_M", NO_OVERRIDES), types("Q4_K_M", rules(r"blk\.[01]\.attn_v=Q8_0"))

    def six_bit(chosen: dict[str, str], name: str) -> list[int]:
        return [i for i in range(16) if chosen[f"blk.{i}.{name}.weight"] == "Q6_K"]

    assert six_bit(plain, "attn_v") == [0, 1, 4, 7, 10, 13, 14, 15]
    assert six_bit(found, "attn_v") == [2, 3, 6, 9, 12, 15]
    assert six_bit(found, "ffn_down") == six_bit(plain, "ffn_down")


def test_explicit_ends_stand_above_rules() -> None:
    overrides = Overrides((("output", "Q5_K"), ("token", "Q5_K")), "Q6_K", "Q8_0")
    found = types("Q4_K_M", overrides)
    assert (found["output.weight"], found["token_embd.weight"]) == ("Q6_K", "Q8_0")
    assert types("Q4_K_M", Overrides((("output\\.w", "Q5_K"),)))["output.weight"] == "Q5_K"


def test_tied_embeddings_take_the_output_type() -> None:
    assert types("Q4_K_M", Overrides(output_tensor_type="Q8_0"), tied=True)["token_embd.weight"] == "Q8_0"
    assert types("Q4_K_M", Overrides(output_tensor_type="Q8_0"))["token_embd.weight"] == "Q4_K"
    both = Overrides(output_tensor_type="Q8_0", token_embedding_type="Q5_K")
    assert types("Q4_K_M", both, tied=True)["token_embd.weight"] == "Q5_K"


def test_pure_is_one_format_everywhere() -> None:
    assert set(types("Q4_K_M", Overrides(pure=True)).values()) == {"Q4_K"}
    assert set(types("Q4_K_M", Overrides(pure=True), tied=True).values()) == {"Q4_K"}
    some = types("Q4_K_M", Overrides((("attn_v", "Q8_0"),), pure=True))
    assert set(some.values()) == {"Q4_K", "Q8_0"}


def test_shapes_fall_back_after_overrides() -> None:
    found = types("Q4_K_M", Overrides((("attn_v", "Q6_K"),), "Q6_K", pure=True), columns=288)
    assert found["blk.0.attn_v.weight"] == "Q8_0"
    assert found["blk.0.attn_q.weight"] == "Q5_0"
    assert found["output.weight"] == "Q8_0", "where llama-quantize would give up"


def test_left_output_is_not_chosen() -> None:
    found = types("Q4_K_M", Overrides(leave_output_tensor=True))
    assert "output.weight" not in found
    assert found["token_embd.weight"] == "Q4_K", "the model still is untied"


def test_unquantized_file_types_take_explicit_ends_alone() -> None:
    found = types("BF16", Overrides((("attn", "Q8_0"),), "Q6_K", None, pure=True))
    assert found.pop("output.weight") == "Q6_K"
    assert set(found.values()) == {"BF16"}


def test_exact_names_stand_above_everything() -> None:
    overrides = Overrides(
        (("attn_v", "Q8_0"),), "Q8_0", tensors={"blk.0.attn_v.weight": "F16", "output.weight": "Q4_0"}
    )
    found = types("Q4_K_M", overrides)
    assert (found["blk.0.attn_v.weight"], found["blk.1.attn_v.weight"]) == ("F16", "Q8_0")
    assert found["output.weight"] == "Q4_0"
    assert types("BF16", overrides)["blk.0.attn_v.weight"] == "F16"


def test_reasons_name_the_option() -> None:
    chosen = choose_mix("Q4_K_M", tensors(), MODEL, overrides=Overrides((("attn_v", "Q8_0"),), "Q6_K", "Q5_K"))
    assert chosen["blk.0.attn_v.weight"] == Choice("Q8_0", "--tensor-type attn_v=Q8_0")
    assert chosen["output.weight"] == Choice("Q6_K", "--output-tensor-type", by_option_of_ends=True)
    assert chosen["token_embd.weight"] == Choice("Q5_K", "--token-embedding-type", by_option_of_ends=True)


# --- parsing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "attn_v", "=Q8_0", "attn_v=", "attn_v=Q9_9", "attn_v=Q8_K", "attn_v=IQ3_S", "a=I32"]
)
def test_rules_that_are_none(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rule(text)
    assert "--tensor-type" in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "attn_(v",
        "[a",
        "*a",
        "a{2,1}",
        "(?i)a",
        "(?P<x>a)",
        "(?<=a)b",
        "(?#x)a",
        "a++",
        r"a\Z",
        "[[:alpha:]]",
        "x" * 2000,
    ],
)
def test_patterns_that_do_not_compile(pattern: str) -> None:
    with pytest.raises(UsageError, match="does not compile"):
        parse_rule(f"{pattern}=Q8_0")


@pytest.mark.parametrize("pattern", [r"blk\.(1[0-5]|[2-9])\.ffn", "(?:a|b)+", "a(?!b)", r"^\w+\d$", "[^.]*?x"])
def test_patterns_of_both_languages_are_taken(pattern: str) -> None:
    assert parse_rule(f"{pattern}=q4_0") == (pattern, "Q4_0")


def test_types_that_cannot_be_made_are_told_apart() -> None:
    with pytest.raises(UsageError, match="type cannot be made yet"):
        parse_type("iq3_s", "here")
    with pytest.raises(UsageError, match="unknown type"):
        parse_type("Q4_K_M", "here")
    with pytest.raises(UsageError, match="unknown type"):
        parse_type("FP8_BLOCK_BF16", "here")
    with pytest.raises(UsageError, match="unknown type"):
        parse_type(4, "here")


def test_rules_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "types.txt"
    path.write_text("attn_v=q8_0\n  blk\\.0\\.=F16\tffn=Q4_0\n\n")
    assert read_rules(path) == (("attn_v", "Q8_0"), ("blk\\.0\\.", "F16"), ("ffn", "Q4_0"))
    path.write_text("attn_v q8_0")
    with pytest.raises(UsageError, match="not a rule") as caught:
        read_rules(path)
    assert str(path) in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not a text file"):
        read_rules(path)
    with pytest.raises(UsageError, match="cannot read a file"):
        read_rules(tmp_path / "missing")
    path.write_bytes(b"a" * (2 << 20))
    with pytest.raises(UsageError, match="file too large"):
        read_rules(path)


TYPES = st.sampled_from(["Q8_0", "Q4_K", "F16", "IQ4_XS"])


@given(
    st.builds(
        Overrides,
        st.lists(st.tuples(st.sampled_from(["attn_v", r"blk\.[0-3]\.", "x|y"]), TYPES), max_size=3).map(tuple),
        st.none() | TYPES,
        st.none() | TYPES,
        st.booleans(),
        st.booleans(),
        st.dictionaries(st.sampled_from(["output.weight", "a"]), TYPES),
    )
)
def test_record_and_parse_are_inverse(overrides: Overrides) -> None:
    assert parse_overrides(overrides.record(), str) == overrides
    assert bool(overrides) == bool(overrides.record())


def test_what_matches_nothing_is_named() -> None:
    overrides = Overrides((("attn_v", "Q8_0"), ("attn_kv_b", "Q8_0")), tensors={"a.weight": "F16", "b.weight": "F16"})
    assert overrides.unmatched(["b.weight", "blk.0.attn_v.weight"]) == ["attn_kv_b", "a.weight"]
