"""Which tensor gets which format in a variant, and why.

The rules for GGUF are llama.cpp's: those of convert_hf_to_gguf.py (conversion/base.py, ModelBase.prepare_tensors) for
F32, F16, BF16 and Q8_0, those of llama-quantize (mix.py) for the rest. The rule for compressed-tensors is
llm-compressor's for `targets=["Linear"]`, by the role of the tensor in the architecture and not by its name.
"""

import enum
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import gguf
from gguf.constants import LlamaFileType

from streamquant.convert.architectures import ModelDescription, TensorKind, TensorRule
from streamquant.convert.recipes.container import GGUF, SAFETENSORS, Container
from streamquant.convert.recipes.mix import (
    DEFAULTS,
    NEEDS_IMPORTANCE,
    UNQUANTIZED,
    Choice,
    MixModel,
    MixTensor,
    choose_mix,
)
from streamquant.convert.recipes.overrides import NO_OVERRIDES, Overrides
from streamquant.convert.recipes.recipe_file import RecipeFile
from streamquant.convert.recipes.targets import Targets
from streamquant.convert.source.tensor import SourceTensor
from streamquant.quant import fp8, integers, microscaling, nvfp4
from streamquant.quant.errors import UsageError
from streamquant.quant.format import Format
from streamquant.quant.formats import copy_of


@dataclass(frozen=True, slots=True)
class ChoiceOptions:
    """What the choice of formats depends on beside the recipe."""

    imatrix: bool = False
    """Whether there is an importance matrix: some rules depend on it."""
    overrides: Overrides = NO_OVERRIDES
    ignore: tuple[str, ...] = ()
    """Modules that stay as they are, in compressed-tensors' spelling."""


class StaticInputs(enum.Enum):
    """Scales of inputs that are known before a model runs."""

    FP8 = "input_scale"
    """A factor for the whole input."""
    NVFP4 = "input_global_scale"
    """A divisor for the scales of its groups, which are found at run time."""


GGUF_RUNTIMES = ("llama.cpp", "LM Studio", "Ollama")
CHECKPOINT_RUNTIMES = ("vLLM", "SGLang", "transformers")
MX_RUNTIMES = ("vLLM", "transformers")

Tensors = Sequence[tuple[SourceTensor, TensorRule]]
MXFP4 = "MXFP4"
Choose = Callable[[Tensors, ModelDescription, ChoiceOptions], dict[str, Choice]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One variant: how it is called on the command line and in file names, and how it chooses."""

    spec: str
    """As on the command line: "fp8-dynamic", "gguf:Q8_0"."""
    container: Container
    label: str
    """As in names of files and folders: "Q8_0", "FP8-dynamic"."""
    description: str
    """What it is, with its size, as in manifests and on cards."""
    choose: Choose
    """All tensors of the model with their rules, and options -> the choice for each stored tensor, by its name in the
    container: experts that GGUF stacks have one, a tensor that GGUF cuts has several."""
    scheme: str | None = None
    """The preset of compressed-tensors, for safetensors that are quantized; "-g32" behind it for groups of 32."""
    base: str | None = None
    """llama-quantize's file type, for GGUF: "Q4_K_M" of "gguf:Q4_K_L"."""
    file: RecipeFile | None = None
    """Where the variant comes from a recipe file; it takes no other overrides."""
    about: str = ""
    """The description without the size."""
    runtimes: tuple[str, ...] = GGUF_RUNTIMES
    """The programs that run its files."""
    remark: str = ""
    """What the table of a card says of it, without a claim of quality."""
    details: str = ""
    """How it is quantized, in the sentences of a card, for safetensors."""
    weights: str = ""
    """What its weights are called, for safetensors: "FP8", "INT4"."""
    hardware: str = ""
    """The GPUs that it needs, in a sentence of a card."""
    static_inputs: StaticInputs | None = None
    """The scales of inputs that are stored beside each linear layer."""
    static_cache: bool = False
    """Whether scales of an FP8 key-value cache are stored."""

    @property
    def needs_importance(self) -> bool:
        """Whether it is only made with an importance matrix (but where no row fits its format)."""
        return self.base in NEEDS_IMPORTANCE

    @property
    def needs_calibration(self) -> bool:
        """Whether it is only made with a file of `streamquant calibrate`."""
        return self.static_inputs is not None or self.static_cache

    @property
    def takes_overrides(self) -> bool:
        """Whether the command line's overrides apply to it; a recipe file has its own."""
        return self.container.takes_overrides and self.file is None

    @property
    def takes_ignore(self) -> bool:
        """Whether modules can be left as they are (--ignore)."""
        return self.scheme is not None

    @property
    def file_type(self) -> int | None:
        """general.file_type, for GGUF."""
        return None if self.base is None else int(_file_type(self.base))

    def file_type_of(self, formats: Collection[str]) -> int | None:
        """general.file_type of a file with tensors of these formats: the converter calls one that keeps the MXFP4 of
        its source MXFP4_MOE (ModelBase.prepare_metadata of conversion/base.py)."""
        keeps_mxfp4 = self.base in UNQUANTIZED and MXFP4 in formats
        return int(_file_type("MXFP4_MOE")) if keeps_mxfp4 else self.file_type


def _gguf_fixed(tensor: SourceTensor, rule: TensorRule) -> Choice | None:
    """The tensors that every GGUF stores as F32; the rule is that of the stored one."""
    if len(tensor.shape) <= 1:
        return Choice("F32", "one-dimensional tensors are F32")
    if rule.gguf_name.endswith("_norm.weight"):
        return Choice("F32", "norms are F32")
    if rule.kind is TensorKind.ROUTER:
        return Choice("F32", "routers are F32")
    if rule.kind is TensorKind.CONVOLUTION:
        return Choice("F32", "convolutions are F32")
    if not rule.gguf_name.endswith(".weight"):
        return Choice("F32", "only weights are quantized")
    return None


def _gguf_choice(file_type: str, own: Overrides, reason_of_ends: str | None = None) -> Choose:
    """The rule of llama-quantize for a file type, which for F32, F16, BF16 and Q8_0 is the converter's too."""

    def choose(tensors: Tensors, model: ModelDescription, options: ChoiceOptions) -> dict[str, Choice]:
        overrides = _joined(own, options.overrides)
        pairs = [(tensor, stored) for tensor, rule in tensors if model.is_in_gguf(rule) for stored in rule.stored]
        stored = {rule.gguf_name: rule.gguf_shape for _, rule in pairs}
        every = [MixTensor(name, shape) for name, shape in stored.items()]
        mixed = choose_mix(file_type, every, _mix_model(model), imatrix=options.imatrix, overrides=overrides)
        choices = {}
        for tensor, rule in pairs:
            choice = _gguf_fixed(tensor, rule) or mixed.get(rule.gguf_name)
            if choice is not None and _stays_mxfp4(tensor, file_type, choice):
                choice = Choice(MXFP4, "the codes and scales of the source")
            if choice is None:
                choice = Choice(copy_of(tensor.dtype).name, "--leave-output-tensor: as in the source")
            elif reason_of_ends is not None and choice.by_option_of_ends and choice.format == own.output_tensor_type:
                choice = replace(choice, reason=reason_of_ends)
            choices[rule.gguf_name] = choice
        return choices

    return choose


def _stays_mxfp4(tensor: SourceTensor, file_type: str, choice: Choice) -> bool:
    """Whether a tensor of a source in MXFP4 is taken over: where the converter does it, and where it would be MXFP4.

    The converter never decodes them (GptOssModel.generate_extra_tensors); llama-quantize does,
    for other file types than its own MXFP4_MOE. What was chosen by a name or pattern counts before.
    """
    is_converters = file_type in (*UNQUANTIZED, "Q8_0") and choice == Choice(file_type, "the file's type")
    return tensor.format.encoded_as == MXFP4 and (is_converters or choice.format == MXFP4)


def _joined(own: Overrides, given: Overrides) -> Overrides:
    """A variant's own overrides, with those of the command line before them."""
    if not own:
        return given
    return replace(
        given,
        output_tensor_type=given.output_tensor_type or own.output_tensor_type,
        token_embedding_type=given.token_embedding_type or own.token_embedding_type,
        tensor_types=given.tensor_types + own.tensor_types,
        pure=given.pure or own.pure,
        leave_output_tensor=given.leave_output_tensor or own.leave_output_tensor,
        tensors=own.tensors,
    )


def _of_first_layer(model: ModelDescription, key: str) -> int:
    """A count, of which a GGUF may have one for each layer: llama-quantize looks at the first."""
    name = f"{model.gguf_arch}.{key}"
    of_layers = model.added_metadata.get(name)
    if of_layers is not None and isinstance(of_layers.value, list):
        return int(of_layers.value[0])
    return int(model.metadata[name].value)


def _mix_model(model: ModelDescription) -> MixModel:
    heads = {key: _of_first_layer(model, f"attention.{key}") for key in ("head_count", "head_count_kv")}
    experts = model.metadata.get(gguf.Keys.LLM.EXPERT_COUNT.format(arch=model.gguf_arch))
    expert_count = int(experts.value) if experts is not None else 0
    return MixModel(model.gguf_arch, model.block_count, heads["head_count"], heads["head_count_kv"], expert_count)


def _linear_layers(spec: str, formats: Mapping[str, Format]) -> Choose:
    """Linear layers to a format, by the dtype of the source; everything else as it is in the source."""

    def choose(tensors: Tensors, model: ModelDescription, options: ChoiceOptions) -> dict[str, Choice]:
        mtp, ignored = model.family.mtp, Targets(options.ignore, "--ignore")
        choices, unfit = {}, []
        for tensor, rule in tensors:
            is_linear = rule.kind.is_linear and not (rule.is_mtp and mtp is not None and mtp.is_plain)
            if is_linear and ignored.first(tensor.module, rule.kind) is not None:
                choices[tensor.name] = Choice(copy_of(tensor.dtype).name, f"--ignore: {_kept(tensor)}")
            elif is_linear:
                choices[tensor.name] = _linear_choice(tensor, formats)
                if not formats[tensor.dtype].fits(tensor.row_length):
                    unfit.append(tensor)
            else:
                choices[tensor.name] = Choice(copy_of(tensor.dtype).name, f"{rule.kind.value}: {_kept(tensor)}")
        if unfit:
            raise _no_groups(spec, formats[unfit[0].dtype], unfit)
        return choices

    return choose


def _no_groups(spec: str, format_: Format, unfit: Sequence[SourceTensor]) -> UsageError:
    """The error for rows that the groups of a format do not fill; one for all of them."""
    lengths = ", ".join(str(length) for length in sorted({tensor.row_length for tensor in unfit}))
    return UsageError(
        f"{spec} has groups that the rows of this model do not fill",
        where=f"{unfit[0].name!r} and {len(unfit) - 1} more" if len(unfit) > 1 else repr(unfit[0].name),
        found=f"rows of {lengths} weights",
        required=f"a multiple of {format_.weights_per_block}: compressed-tensors and vLLM refuse others",
        hint="choose a variant with smaller groups (w4a16-g32, mxfp4), or a scale for each row (w8a8, fp8-dynamic)",
    )


def _linear_choice(tensor: SourceTensor, formats: Mapping[str, Format]) -> Choice:
    """The format of a linear layer; a source that has it in the same form loses nothing."""
    own = tensor.format.encoded_as
    if tensor.codes is not None and own is not None and own in {format_.name for format_ in formats.values()}:
        return Choice(own, "linear layer: the codes and scales of the source")
    return Choice(formats[tensor.dtype].name, "linear layer")


def _bf16_choice(tensors: Tensors, _model: ModelDescription, _options: ChoiceOptions) -> dict[str, Choice]:
    """What transformers' save_pretrained writes of a model loaded in BF16; of a model in BF16 all tensors as they are,
    those included that it keeps in F32."""
    weights: Counter[str] = Counter()
    for tensor, _ in tensors:
        weights[tensor.dtype] += tensor.count
    is_bf16 = weights.most_common(1)[0][0] == "BF16"
    return {
        tensor.name: Choice(copy_of(tensor.dtype).name, _kept(tensor))
        if is_bf16 or tensor.dtype == "BF16"
        else Choice("BF16", f"rounded from {tensor.dtype}")
        for tensor, _ in tensors
    }


def _kept(tensor: SourceTensor) -> str:
    """How a tensor that is not quantized comes into a checkpoint."""
    return f"{tensor.dtype}, of the codes of the source" if tensor.format.is_coded else "kept as in the source"


def _file_type(base: str) -> LlamaFileType:
    return LlamaFileType[f"MOSTLY_{base}" if base != "F32" else "ALL_F32"]


def _gguf(name: str, about: str, bits: str = "", runtimes: tuple[str, ...] = GGUF_RUNTIMES, remark: str = "") -> Recipe:
    """A file type of llama-quantize; `bits` per weight as its users know them."""
    description = f"{bits} bits, {about}" if bits else about
    choose = _gguf_choice(name, NO_OVERRIDES)
    return Recipe(f"{GGUF.prefix}{name}", GGUF, name, description, choose, None, name, None, about, runtimes, remark)


def _large_ends(name: str, base: str) -> Recipe:
    """The community's form of a file type, with larger embeddings and output."""
    ends = Overrides(output_tensor_type="Q8_0", token_embedding_type="Q8_0")
    remark = "embeddings and output at Q8_0"
    about, choose = f"{base} with {remark}", _gguf_choice(base, ends, remark)
    return Recipe(f"{GGUF.prefix}{name}", GGUF, name, about, choose, base=base, about=about, remark=remark)


def recipe_of(file: RecipeFile) -> Recipe:
    """The variant that a recipe file describes.

    Raises UsageError if its base is no file type, or its label that of another variant.
    """
    base, label = GGUF.label(_gguf_name(GGUF.name, file.base)), file.label
    if f"{GGUF.prefix}{base}" not in RECIPES or base in LARGE_ENDS:
        known = [recipe.label for recipe in RECIPES.values() if recipe.base == recipe.label]
        raise UsageError(
            "unknown base", where=f"recipe {label!r}", found=file.base, required=f"a file type: {', '.join(known)}"
        )
    taken = {*NOT_YET, *ALIASES, *(recipe.label.upper() for recipe in RECIPES.values())}
    if label.upper() in taken:
        raise UsageError(
            "label of another variant", where=f"recipe {label!r}", found=label, hint="choose another label"
        )
    if base in UNQUANTIZED and (file.overrides.tensor_types or file.overrides.pure):
        raise UsageError(
            "no overrides by pattern here",
            where=f"recipe {label!r}",
            found=f"base {base}",
            required="a quantized file type: llama-quantize leaves the others alone",
            hint="name the tensors one by one below `tensors`",
        )
    description = file.note or f"{base} with overrides"
    choose = _gguf_choice(base, file.overrides)
    return Recipe(f"{GGUF.prefix}{label}", GGUF, label, description, choose, base=base, file=file)


CALIBRATED_REST = "Embeddings, norms and the output layer stay as in the original."
PLAIN_REST = "Embeddings, norms and the output layer stay as in the original. No calibration data was needed."


def _compressed(name: str, formats: Mapping[str, Format], scheme: str, about: str, details: str) -> Recipe:
    """A preset of compressed-tensors, in FP8."""
    return Recipe(
        name,
        SAFETENSORS,
        SAFETENSORS.label(name),
        about,
        _linear_layers(name, formats),
        scheme=scheme,
        about=about,
        runtimes=CHECKPOINT_RUNTIMES,
        details=f"{details} {PLAIN_REST}",
        weights="FP8",
        hardware="FP8 arithmetic needs a GPU that has it (NVIDIA: Ada, Hopper or later).",
    )


def _integers(name: str, formats: Mapping[str, Format], scheme: str, about: str, bits: int = 4) -> Recipe:
    """A preset with integers as weights alone."""
    group = next(iter(formats.values())).weights_per_block
    zero_point = " and a zero point" if "ASYM" in scheme else ""
    details = (
        f"Weights of linear layers are INT{bits} with one scale{zero_point} for each group of {group} columns of a "
        f"row; activations are not quantized. {PLAIN_REST}"
    )
    recipe = _compressed(name, formats, scheme, about, "")
    hardware = "NVIDIA GPUs from Turing on run it, with Marlin kernels; so do AMD's, and CPUs."
    return replace(recipe, details=details, weights=f"INT{bits}", hardware=hardware)


def _mx(name: str, formats: Mapping[str, Format], bits: int) -> Recipe:
    """A preset of the OCP microscaling formats; its name tells whether activations are quantized too."""
    element = "E2M1" if bits == 4 else "E4M3"
    run_time = "are not quantized" if name.endswith("a16") else "are quantized likewise at run time"
    about = f"{element}, a power of two as scale per 32 weights; activations {run_time.removeprefix('are ')}"
    details = (
        f"Weights of linear layers are MXFP{bits} (OCP microscaling): {element} with a power of two as scale for each "
        f"32 columns of a row; activations {run_time}. {PLAIN_REST}"
    )
    hardware = (
        f"NVIDIA GPUs from Blackwell on and AMD's from MI350 on compute in MXFP{bits}; "
        "older ones widen the weights as they go, where the runtime has a kernel for it."
    )
    recipe = _compressed(name, formats, name.upper(), about, "")
    return replace(recipe, details=details, weights=f"MXFP{bits}", hardware=hardware, runtimes=MX_RUNTIMES)


def _nvfp4(name: str) -> Recipe:
    """A preset of NVIDIA's FP4."""
    details = (
        "Weights of linear layers are NVFP4: E2M1 with an FP8 scale for each 16 columns of a row, and a scale for all "
        f"that runtimes merge into one matrix; activations are not quantized. {PLAIN_REST}"
    )
    hardware = (
        "NVIDIA GPUs from Turing on run it, with Marlin kernels that widen the weights as they go; Blackwell has FP4 "
        "arithmetic, which needs FP4 activations too."
    )
    about = "E2M1, an FP8 scale per 16 weights and one per matrix; activations not quantized"
    recipe = _compressed(name, nvfp4.BY_DTYPE, name.upper(), about, "")
    return replace(recipe, details=details, weights="NVFP4", hardware=hardware, runtimes=MX_RUNTIMES)


def _calibrated(recipe: Recipe, spec: str, details: str, about: str, inputs: StaticInputs | None) -> Recipe:
    """What llm-compressor's oneshot makes with a preset that it calibrates."""
    return replace(
        recipe,
        spec=spec,
        label=SAFETENSORS.label(spec),
        description=about,
        about=about,
        details=f"{details} {CALIBRATED_REST}",
        static_inputs=inputs,
    )


KV = "+kv"
"""Behind a variant: with scales of an FP8 key-value cache."""


def _with_cache(recipe: Recipe) -> Recipe:
    """A variant with scales of an FP8 key-value cache too."""
    about = f"{recipe.about}; scales of an FP8 key-value cache"
    details = f"{recipe.details} A key-value cache in FP8 has one scale each for the keys and values of a layer."
    made = _calibrated(recipe, f"{recipe.spec}{KV}", "", about, recipe.static_inputs)
    return replace(made, details=details, scheme=f"{recipe.scheme}{KV}", static_cache=True)


_FP8_STATIC = _calibrated(
    _compressed("fp8-static", fp8.TENSOR, "FP8", "", ""),
    "fp8-static",
    "Weights of linear layers are FP8 E4M3 with one scale for each matrix; activations are quantized to FP8 with a "
    "scale for each layer that was measured on text.",
    "E4M3, a scale per matrix; activations with a measured scale per layer",
    StaticInputs.FP8,
)
_FP8_CHANNEL = replace(
    _compressed(
        "fp8-dynamic",
        fp8.CALIBRATED_CHANNEL,
        "FP8_DYNAMIC",
        "E4M3, a scale per output channel; activations per token",
        "",
    ),
    details="Weights of linear layers are FP8 E4M3 with one scale for each output channel; activations are quantized "
    f"to FP8 at run time, with one scale for each token. {CALIBRATED_REST}",
)
_NVFP4 = replace(
    _calibrated(
        _nvfp4("nvfp4"),
        "nvfp4",
        "Weights of linear layers are NVFP4: E2M1 with an FP8 scale for each 16 columns of a row, and a scale for all "
        "that runtimes merge into one matrix; activations are quantized likewise at run time, with a scale for each "
        "layer that was measured on text.",
        "E2M1, an FP8 scale per 16 weights and one per matrix; activations likewise, with a measured scale per layer",
        StaticInputs.NVFP4,
    ),
    hardware="NVIDIA GPUs from Blackwell on compute in NVFP4; older ones, from Turing on, widen weights as they go.",
)


ALIASES = {
    **{"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"},
    **{str(int(_file_type(name))): name for name in DEFAULTS},
}
"""llama-quantize's other names, and its numbers."""

RECIPES: dict[str, Recipe] = {
    recipe.spec: recipe
    for recipe in (
        _compressed(
            "fp8-dynamic",
            fp8.CHANNEL,
            "FP8_DYNAMIC",
            "E4M3, a scale per output channel; activations per token",
            "Weights of linear layers are FP8 E4M3 with one scale for each output channel; activations are quantized "
            "to FP8 at run time, with one scale for each token.",
        ),
        _compressed(
            "fp8-block",
            fp8.BLOCK,
            "FP8_BLOCK",
            "E4M3, a scale per 128x128 block; activations per group of 128",
            "Weights of linear layers are FP8 E4M3 with one scale for each block of 128 x 128; activations are "
            "quantized to FP8 at run time, in groups of 128.",
        ),
        _FP8_STATIC,
        _with_cache(_FP8_CHANNEL),
        _with_cache(_FP8_STATIC),
        replace(
            _compressed(
                "w8a8",
                integers.INT8_CHANNEL,
                "W8A8",
                "INT8, a scale per output channel; activations INT8 per token",
                "Weights of linear layers are INT8 with one scale for each output channel; activations are quantized "
                "to INT8 at run time, with one scale for each token.",
            ),
            weights="INT8",
            hardware="NVIDIA GPUs from Turing on compute in INT8; so do AMD's, and CPUs.",
        ),
        _integers("w8a16", integers.INT8, "W8A16", "INT8, a scale per 128 weights", 8),
        _integers("w4a16", integers.INT4[128], "W4A16", "INT4, a scale per 128 weights"),
        _integers(
            "w4a16-asym", integers.INT4_ZERO_POINT[128], "W4A16_ASYM", "INT4, a scale and a zero point per 128 weights"
        ),
        _integers("w4a16-g32", integers.INT4[32], "W4A16-g32", "INT4, a scale per 32 weights"),
        _integers(
            "w4a16-asym-g32",
            integers.INT4_ZERO_POINT[32],
            "W4A16_ASYM-g32",
            "INT4, a scale and a zero point per 32 weights",
        ),
        _mx("mxfp8", microscaling.FP8, 8),
        _mx("mxfp8a16", microscaling.FP8, 8),
        _mx("mxfp4", microscaling.FP4, 4),
        _mx("mxfp4a16", microscaling.FP4, 4),
        _nvfp4("nvfp4a16"),
        _NVFP4,
        _with_cache(_NVFP4),
        Recipe(
            "bf16",
            SAFETENSORS,
            SAFETENSORS.label("bf16"),
            "plain bfloat16, of a quantized source",
            _bf16_choice,
            about="plain bfloat16, of a quantized source",
            runtimes=CHECKPOINT_RUNTIMES,
            details="Weights are plain BF16, without a quantization.",
            weights="BF16",
        ),
        _gguf("F32", "32-bit float", remark="not quantized"),
        _gguf("F16", "16-bit float", remark="not quantized"),
        _gguf("BF16", "bfloat16, lossless from BF16", remark="not quantized"),
        _gguf("Q8_0", "practically lossless", "8.5"),
        _large_ends("Q6_K_L", "Q6_K"),
        _gguf("Q6_K", "very high quality", "6.6"),
        _large_ends("Q5_K_L", "Q5_K_M"),
        _gguf("Q5_K_M", "high quality", "5.7"),
        _gguf("Q5_K_S", "high quality", "5.5"),
        _large_ends("Q4_K_L", "Q4_K_M"),
        _gguf("Q4_K_M", "good quality, what most people run", "4.8"),
        _gguf("Q4_K_S", "slightly lower quality", "4.6"),
        _gguf("IQ4_NL", "non-linear, fast on CPUs", "4.5", remark="non-linear 4 bits"),
        _gguf("IQ4_XS", "non-linear, smaller than Q4_K_S at about its quality", "4.3", remark="non-linear 4 bits"),
        _large_ends("Q3_K_XL", "Q3_K_L"),
        _gguf("Q3_K_L", "lower quality", "4.3"),
        _gguf("Q3_K_M", "low quality", "3.9"),
        _gguf("Q3_K_S", "low quality", "3.5"),
        _gguf("Q2_K", "very low quality", "3.0"),
        _gguf("Q2_K_S", "very low quality; needs an importance matrix", "2.8"),
        _gguf("Q5_1", "legacy", "6.0", remark="legacy type"),
        _gguf("Q5_0", "legacy", "5.5", remark="legacy type"),
        _gguf("Q4_1", "legacy", "5.0", remark="legacy type"),
        _gguf("Q4_0", "legacy, fast on CPUs", "4.5", remark="legacy type"),
        _gguf("MXFP4_MOE", "experts at MXFP4, the rest at Q8_0", runtimes=("llama.cpp",), remark="experts at MXFP4"),
        _gguf("TQ2_0", "for ternary models", "2.1", ("llama.cpp",), remark="for ternary models"),
        _gguf("TQ1_0", "for ternary models", "1.7", ("llama.cpp",), remark="for ternary models"),
    )
}
"""Every variant that can be asked for, by its spelling on the command line."""

LARGE_ENDS = {recipe.label: recipe.base for recipe in RECIPES.values() if recipe.base not in (None, recipe.label)}
"""The community's names for a file type with larger ends -> the file type."""

NOT_YET = {
    name: f"of {DEFAULTS[name]}, which is not among the formats yet"
    for name in DEFAULTS
    if GGUF.prefix + name not in RECIPES
}
"""File types of llama.cpp that cannot be made yet, and what they are."""


def parse_variants(specs: Sequence[str], files: Sequence[RecipeFile] = ()) -> list[Recipe]:
    """["fp8-dynamic", "gguf:Q8_0,Q4_K_M"] and recipe files -> recipes, in order, without repetitions.

    llama-quantize's numbers of file types are taken too. Raises UsageError for a variant that does not exist or cannot
    be made yet, and for two recipe files of one label.

    >>> [recipe.spec for recipe in parse_variants(["gguf:q8_0,Q4_K,18", "fp8-block"])]
    ['gguf:Q8_0', 'gguf:Q4_K_M', 'gguf:Q6_K', 'fp8-block']
    """
    recipes: dict[str, Recipe] = {}
    for spec in specs:
        family, colon, types = spec.strip().partition(":")
        family = family.lower()
        names = [_gguf_name(family, name) for name in types.split(",")] if colon else [family]
        for name in names:
            if name not in RECIPES:
                raise UsageError("unknown variant", found=name, required=", ".join(RECIPES))
            recipes[name] = RECIPES[name]
    for file in files:
        recipe = recipe_of(file)
        if recipe.spec in recipes:
            raise UsageError("two recipes of one label", found=file.label, hint="choose another label for one of them")
        recipes[recipe.spec] = recipe
    if not recipes:
        raise UsageError("no variant asked for", required=f"--recipe, or --to with one of {', '.join(RECIPES)}")
    return list(recipes.values())


def _gguf_name(family: str, name: str) -> str:
    name = name.strip().upper()
    name = ALIASES.get(name, name)
    if name in NOT_YET:
        raise UsageError(
            "variant cannot be made yet",
            found=f"{family}:{name}, {NOT_YET[name]}",
            required=", ".join(RECIPES),
        )
    return f"{family}:{name}"
