"""The command line of streamquant: parse -> call -> exit code.

0 done; 1 a fault of the input or the machine; 2 a wrong command; 3 a variant did not pass a gate; 130 interrupted (run
the same command again). What only `validate` and its kin need is imported when they run: it takes a third of a second.
"""

import gc
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from streamquant.convert.conversion import Fetching, check_disk, check_output_folder, convert, default_jobs, disk_of
from streamquant.convert.manifest import versions
from streamquant.convert.options import ConversionOptions
from streamquant.convert.plan.disk import Disk
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import Plan
from streamquant.convert.plan.view import plan_json, plan_view
from streamquant.convert.recipes.imatrix import ImportanceMatrix, read_imatrix
from streamquant.convert.recipes.overrides import Overrides, parse_rule, parse_type, read_rules
from streamquant.convert.recipes.recipe import RECIPES, Recipe, parse_variants
from streamquant.convert.recipes.recipe_extract import extract_recipe
from streamquant.convert.recipes.recipe_file import read_recipe
from streamquant.convert.run.device import choose_device, with_notes
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.convert.source.open import open_source
from streamquant.files.sizes import human_bytes, parse_size
from streamquant.files.strict_json import read_json_object
from streamquant.files.writing import explain, write_atomically
from streamquant.hub.repo import hub_spec
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.readback.inspect import inspect_path
from streamquant.validate.readback.verify import bytes_to_verify, verify
from streamquant.validate.readback.verify_report import inspect_json, inspect_view, verify_json, verify_view
from streamquant.validate.sections import ANSWER_TOKENS, SKIPPABLE

if TYPE_CHECKING:
    from streamquant.model.forward import Setting
    from streamquant.model.variants.variant import Variant
    from streamquant.publish.upload.push import Pushed
    from streamquant.publish.upload.streaming import EarlyPush

app = typer.Typer(
    name="streamquant",
    help="One read of a BF16 Hugging Face checkpoint, every FP8 and GGUF variant of it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
WIDE = 160  # columns of tables that go into a file or a pipe
out_console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
error_console = Console(stderr=True, soft_wrap=True, width=None if sys.stderr.isatty() else WIDE)

INTERRUPTED = 130
GATE_FAILED = 3
_VARIANTS = ", ".join(RECIPES)
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder of the checkpoint (config.json, safetensors in BF16, F16 or F32), or ORG/NAME[@REVISION] on the "
        "Hugging Face Hub.",
    ),
]
SpoolGib = Annotated[
    float | None,
    typer.Option(help="Shards of the Hub that lie on the disk at a time, in GiB. Default: four of the largest.", min=0),
]
To = Annotated[
    list[str] | None,
    typer.Option(
        "--to", help=f"Variant to make; repeatable, and GGUF types may be listed: gguf:Q8_0,Q4_0. One of {_VARIANTS}."
    ),
]
RecipeFiles = Annotated[
    list[Path] | None,
    typer.Option("--recipe", help="YAML file of a GGUF variant of one's own (docs/formats.md); repeatable."),
]
Imatrix = Annotated[
    Path | None, typer.Option(help="Importance matrix of llama-imatrix, GGUF or .dat, for the GGUF variants.")
]
IncludeWeights = Annotated[
    list[str] | None, typer.Option(help="Use the importance matrix for tensors with this in their names; repeatable.")
]
ExcludeWeights = Annotated[
    list[str] | None, typer.Option(help="Do not use it for tensors with this in their names; repeatable.")
]
TensorType = Annotated[
    list[str] | None,
    typer.Option(help="REGEX=TYPE: the type of GGUF tensors of such names, like attn_v=q8_0; the first match counts."),
]
TensorTypeFile = Annotated[Path | None, typer.Option(help="File of REGEX=TYPE, separated by white space.")]
OutputTensorType = Annotated[str | None, typer.Option(help="GGML type of output.weight.")]
TokenEmbeddingType = Annotated[str | None, typer.Option(help="GGML type of token_embd.weight.")]
Pure = Annotated[bool, typer.Option("--pure", help="No mix: the file type's own format for every tensor.")]
LeaveOutputTensor = Annotated[
    bool, typer.Option("--leave-output-tensor", help="output.weight stays as it is in the source.")
]
GuardTemplate = Annotated[
    bool,
    typer.Option(
        "--guard-template",
        help="Put guards into the chat template where bos_token may be undefined, or a reply may lack </think>.",
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the model in file names. Default: the name of its folder.")]
SplitMaxSize = Annotated[
    str | None, typer.Option(help="Split GGUF files at this many bytes of tensors, e.g. 40G (decimal, as llama.cpp).")
]
MaxShardSize = Annotated[
    str | None, typer.Option(help="Largest FP8 shard, e.g. 5G. Default: the shards of the source.")
]
Pre = Annotated[str | None, typer.Option(help="tokenizer.ggml.pre, where it cannot be told from tokenizer.json.")]
Metadata = Annotated[
    Path | None, typer.Option(help="JSON file of GGUF keys that override the model card (llama.cpp's --metadata).")
]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Worker threads. Default: all cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Tensors = Annotated[bool, typer.Option("--tensors", help="List every tensor.")]
Original = Annotated[
    str,
    typer.Argument(
        help="The reference: folder of the BF16 checkpoint, ORG/NAME[@REVISION] on the Hub (fetched whole into the "
        "local cache), or any variant taken as the reference."
    ),
]
Variants = Annotated[
    list[Path], typer.Argument(help="GGUF files (of a split, any file) and compressed-tensors folders, of any maker.")
]
Texts = Annotated[
    list[Path], typer.Option("--text", help="UTF-8 text to measure on; repeatable, each is a category of its own.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda. auto: cuda if there is a GPU.")]
ComputeDType = Annotated[str | None, typer.Option("--dtype", help="bf16 or f32. Default: bf16 on a GPU, f32 on a CPU.")]
Context = Annotated[int, typer.Option(min=2, help="Tokens in a chunk.")]
Chunks = Annotated[int | None, typer.Option(min=1, help="Chunks of each text. Default: all.")]
Scratch = Annotated[Path | None, typer.Option(help="Folder for hidden states that do not fit into memory.")]


@app.command("plan")
def plan_command(
    model: Model,
    to: To = None,
    out: Annotated[
        Path | None, typer.Option(help="Also check that this folder could be written and its disk is large enough.")
    ] = None,
    name: Name = None,
    split_max_size: SplitMaxSize = None,
    max_shard_size: MaxShardSize = None,
    pre: Pre = None,
    metadata: Metadata = None,
    recipe: RecipeFiles = None,
    imatrix: Imatrix = None,
    include_weights: IncludeWeights = None,
    exclude_weights: ExcludeWeights = None,
    tensor_type: TensorType = None,
    tensor_type_file: TensorTypeFile = None,
    output_tensor_type: OutputTensorType = None,
    token_embedding_type: TokenEmbeddingType = None,
    pure: Pure = False,
    leave_output_tensor: LeaveOutputTensor = False,
    guard_template: GuardTemplate = False,
    spool_gib: SpoolGib = None,
    delete_after_upload: Annotated[
        bool,
        typer.Option("--delete-after-upload", help="As of convert --push: what it needs then, and the Hub's limits."),
    ] = False,
    device: Device = "auto",
    jobs: Jobs = None,
    as_json: AsJson = False,
    tensors: Tensors = False,
) -> None:
    """Print what a conversion would write: exact bytes, formats and reasons. No weight is read.

    Of a model on the Hub a few MB are fetched: small files, and the headers of the shards.

    Examples:

    `streamquant plan Hermes-4-14B --to fp8-dynamic --to gguf:Q8_0,Q4_0`

    `streamquant plan NousResearch/Hermes-4-405B@main --to fp8-dynamic --to gguf:Q8_0,Q6_K,Q4_K_M`
    """
    recipes = _recipes(to, recipe)
    overrides = _overrides(
        tensor_type, tensor_type_file, output_tensor_type, token_embedding_type, pure, leave_output_tensor
    )
    _check_taken(overrides, recipes)
    options = replace(
        _options(name, split_max_size, max_shard_size, pre, metadata),
        imatrix=_imatrix(imatrix, include_weights, exclude_weights),
        overrides=overrides,
        guard_template=guard_template,
    )
    checkpoint = open_source(model, out=out)
    plan = with_notes(make_plan(checkpoint, recipes, options), choose_device(device))
    if delete_after_upload:
        from streamquant.publish.upload.limits import check_plan

        plan = replace(plan, notes=(*plan.notes, *check_plan(plan)))
    jobs = jobs or default_jobs()
    disk = _disk(plan, spool_gib, jobs, delete_after_upload)
    if out is not None:
        check_output_folder(checkpoint, out, [variant.folder for variant in plan.variants])
        check_disk(plan, out, disk)
    _print(plan_json(plan, jobs, disk) if as_json else plan_view(plan, jobs, disk, tensors=tensors))


@app.command("convert")
def convert_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the variants; each gets a folder of its own in it.")],
    to: To = None,
    name: Name = None,
    split_max_size: SplitMaxSize = None,
    max_shard_size: MaxShardSize = None,
    pre: Pre = None,
    metadata: Metadata = None,
    recipe: RecipeFiles = None,
    imatrix: Imatrix = None,
    include_weights: IncludeWeights = None,
    exclude_weights: ExcludeWeights = None,
    tensor_type: TensorType = None,
    tensor_type_file: TensorTypeFile = None,
    output_tensor_type: OutputTensorType = None,
    token_embedding_type: TokenEmbeddingType = None,
    pure: Pure = False,
    leave_output_tensor: LeaveOutputTensor = False,
    guard_template: GuardTemplate = False,
    spool_gib: SpoolGib = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="Upload each file as soon as it is finished, to ORG/NAME-GGUF and so on. Needs --private or "
            "--without-report: there is no report yet.",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: to private repositories.")] = False,
    without_report: Annotated[
        bool, typer.Option("--without-report", help="With --push: publish what nobody has measured; the card says so.")
    ] = False,
    push_revision: Annotated[str | None, typer.Option(help="With --push: the branch. Default: main.")] = None,
    delete_after_upload: Annotated[
        bool, typer.Option("--delete-after-upload", help="With --push: delete each file when the Hub holds it.")
    ] = False,
    device: Device = "auto",
    jobs: Jobs = None,
) -> None:
    """Make every variant from one read of the checkpoint. Stopped? The same command goes on where it was.

    Shards of a model on the Hub are fetched while others are converted, and deleted when they are done.

    Examples:

    `streamquant convert Hermes-4-14B --to fp8-dynamic --out variants`

    `streamquant convert Hermes-4-14B --to fp8-dynamic --to gguf:BF16,Q8_0,Q4_0 --split-max-size 40G --out variants`

    `streamquant convert NousResearch/Hermes-4-405B@main --to gguf:Q4_K_M --spool-gib 60 --out variants`

    `streamquant convert NousResearch/Hermes-4-405B --to fp8-dynamic --out variants --push ORG/Hermes-4-405B --private
    --delete-after-upload`
    """
    recipes = _recipes(to, recipe)
    overrides = _overrides(
        tensor_type, tensor_type_file, output_tensor_type, token_embedding_type, pure, leave_output_tensor
    )
    _check_taken(overrides, recipes)
    options = replace(
        _options(name, split_max_size, max_shard_size, pre, metadata),
        imatrix=_imatrix(imatrix, include_weights, exclude_weights),
        overrides=overrides,
        guard_template=guard_template,
    )
    where = _early_push(push, private, without_report, push_revision, delete_after_upload)
    chosen, workers = choose_device(device), jobs or default_jobs()
    checkpoint = open_source(model, out=out)
    with _progress("converting") as bar:

        def start(plan: Plan) -> None:
            bar.total(sum(m.source.stop - m.source.start for m in plan.matrices))
            if error_console.is_terminal:
                disk = _disk(plan, spool_gib, workers, delete_after_upload)
                error_console.print(plan_view(with_notes(plan, chosen), workers, disk))

        how: Any = {
            "jobs": workers,
            "device": chosen,
            "fetching": Fetching(spool_gib, bar.fetched, _say_waiting),
            "on_start": start,
            "on_progress": bar.advance,
        }
        pushed: Sequence[Pushed] = ()
        if where is None:
            done = convert(checkpoint, recipes, out, options, **how)
        else:
            from streamquant.publish.upload.streaming import convert_and_push

            done, pushed = convert_and_push(checkpoint, recipes, out, options, where, on_upload=bar.uploaded, **how)
    for variant in done.plan.variants:
        state = "was done already" if variant.recipe.spec in done.already_done else "done"
        size = human_bytes(done.plan.variant_bytes(variant))
        out_console.print(f"{variant.recipe.spec}: {state}, {size} in {out / variant.folder}", highlight=False)
    if done.resumed_chunks:
        out_console.print(f"resumed: {done.resumed_chunks} of {len(done.plan.chunks)} chunks were written before")
    _say_pushed(pushed)


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="A .gguf or .safetensors file, or a folder of them.", exists=True)],
    as_json: AsJson = False,
    tensors: Tensors = False,
) -> None:
    """Show tensors, types, bytes and metadata of any GGUF or safetensors file.

    Example: `streamquant inspect variants/Hermes-4-14B-GGUF/Hermes-4-14B-Q8_0.gguf --tensors`
    """
    files = inspect_path(path)
    _print(inspect_json(files) if as_json else inspect_view(files, tensors=tensors))


@app.command("verify")
def verify_command(
    folder: Annotated[
        Path, typer.Argument(help="A folder that convert wrote, or the --out folder that holds several.")
    ],
    source: Annotated[
        str | None,
        typer.Option(
            help="Also encode the source again and compare; prints the error (SQNR). A folder, or ORG/NAME[@REVISION]."
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="The importance matrix that the variants were made with; --source needs it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read back what was written: hashes against the manifest and, with --source, every byte against the checkpoint.

    Exit code 1 if anything differs. Example: `streamquant verify variants --source Hermes-4-14B`
    """
    checkpoint = open_checkpoint(_weights(source)) if source is not None else None
    matrix = read_imatrix(imatrix) if imatrix is not None else None
    with _progress("verifying") as bar:
        bar.total(bytes_to_verify(folder, with_source=source is not None))
        results = verify(folder, checkpoint, matrix, on_progress=bar.advance)
    _print(verify_json(results) if as_json else verify_view(results))
    if any(result.problems for result in results):
        raise typer.Exit(1)


@app.command("recipe")
def recipe_command(
    path: Annotated[
        Path, typer.Argument(metavar="FILE.gguf", help="A GGUF of any publisher; of a split set, any file.")
    ],
    out: Annotated[Path | None, typer.Option(help="File to write, in place of the screen.")] = None,
    label: Annotated[str | None, typer.Option(help="Name of the variant. Default: its file type and -like.")] = None,
) -> None:
    """Write the recipe of a GGUF: its file type and every tensor that differs, for `--recipe`. Reads the header only.

    Example: `streamquant recipe Model-UD-Q4_K_XL.gguf --label UD-like --out ud.yaml`
    """
    if out is not None and out.exists():
        raise UsageError("the output file exists already", where=str(out), hint="choose another --out")
    found = extract_recipe(path, label)
    text = found.recipe.yaml()
    for note in found.notes:
        error_console.print(f"note: {note}", markup=False, highlight=False)
    if out is None:
        sys.stdout.write(text)
    else:
        try:
            write_atomically(out, text.encode())
        except OSError as error:
            raise explain(error, out) from error


@app.command("validate")
def validate_command(
    original: Original,
    variants: Variants,
    text: Texts,
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.md, report.html and plots.")],
    device: Device = "auto",
    dtype: ComputeDType = None,
    context: Context = 512,
    chunks: Chunks = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Do not quantize activations where the runtime would.")
    ] = False,
    max_mean_kld: Annotated[float | None, typer.Option(help="Gate: mean KL divergence, nats per token.")] = None,
    max_kld_99_9: Annotated[float | None, typer.Option("--max-kld-99-9", help="Gate: its 99.9th percentile.")] = None,
    min_same_top: Annotated[float | None, typer.Option(help="Gate: share of the same top token, like 0.9.")] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(help="Gate: perplexity over the original's.")] = None,
    max_errors: Annotated[int, typer.Option(help="Gate: problems of severity error in a variant.")] = 0,
    max_token_mismatches: Annotated[int | None, typer.Option(help="Gate: texts tokenized differently.")] = None,
    max_chat_mismatches: Annotated[int | None, typer.Option(help="Gate: chats rendered differently.")] = None,
    skip: Annotated[str, typer.Option(help=f"Sections to leave out, by comma: {', '.join(SKIPPABLE)}.")] = "",
    noise: Annotated[str, typer.Option(help="Noise floors of the original, by comma: dtype, batch.")] = "batch",
    cache: Annotated[
        Path | None, typer.Option(help="Folder for the original's hidden states. Default: in the user's cache.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no hidden states.")] = False,
    scratch: Scratch = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json of the texts, where ORIGINAL has none (a GGUF).")
    ] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest greedy answer.")] = ANSWER_TOKENS,
) -> None:
    """Is each variant still the model? Perplexity, divergence, tokens, chat, engines and answers, as a report.

    Exit code 3 names every gate that failed. Stopped? The original's hidden states are kept from the first run.

    Example: `streamquant validate Hermes-4-14B Hermes-4-14B-Q4_K_M.gguf --text wiki.test.raw --out report`
    """
    from streamquant.validate.gates import Gates, failed
    from streamquant.validate.report.console import report_view
    from streamquant.validate.report.data import check_report_folder, write_report
    from streamquant.validate.report.render import write_pages
    from streamquant.validate.validation import Job, default_cache, prune_cache, validate

    gates = Gates(
        max_mean_kld, max_kld_99_9, min_same_top, max_ppl_ratio, max_errors, max_token_mismatches, max_chat_mismatches
    )
    check_report_folder(out)
    kept = None if no_cache else cache or default_cache()
    job = Job(
        texts=tuple(text),
        setting=replace(_setting(device, dtype, scratch), weights_only=weights_only),
        context=context,
        chunks=chunks,
        skip=frozenset(_names("--skip", skip, SKIPPABLE)),
        noise=_names("--noise", noise, ("dtype", "batch")),  # type: ignore[arg-type] # those are its names
        gates=gates,
        cache=kept,
        tokenizer=tokenizer,
        answer_tokens=answer_tokens,
        command=("streamquant", *sys.argv[1:]),
    )
    with _steps() as step:
        report = validate(_weights(original, step), variants, job, step)
        step("report", 0, 1)
        write_report(report, out)
        write_pages(report, out)
    if kept is not None:
        prune_cache(kept)
    _print(report_view(report))
    out_console.print(f"report: {out / 'report.html'}", markup=False, highlight=False)
    wrong = failed(report.gate_results)
    for gate in wrong:
        error_console.print(f"gate failed: {gate}", markup=False, highlight=False)
    if wrong:
        raise typer.Exit(GATE_FAILED)


@app.command("imatrix")
def imatrix_command(
    model: Annotated[
        str, typer.Argument(help="Folder of the checkpoint, ORG/NAME[@REVISION] on the Hub, or any variant of it.")
    ],
    text: Texts,
    out: Annotated[
        Path, typer.Option(help="File to write, in llama.cpp's GGUF format; one that is there is continued.")
    ],
    device: Device = "auto",
    dtype: ComputeDType = None,
    context: Context = 512,
    chunks: Chunks = None,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, help="Save after so many chunks; each time all weights are read. Default: once."),
    ] = None,
    scratch: Scratch = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json of the texts, where MODEL has none (a GGUF).")
    ] = None,
) -> None:
    """Write the importance matrix of a model over texts, for `--imatrix` and llama-quantize. Stopped? Goes on.

    Example: `streamquant imatrix Hermes-4-14B --text calibration.txt --out imatrix.gguf --save-every 50`
    """
    from streamquant.calibrate.importance import write_importance
    from streamquant.model.corpus import read_corpus
    from streamquant.model.variants.open import open_variant

    with _steps() as step:
        variant = open_variant(_weights(model, step))
        corpus = read_corpus(text, tokenizer or variant.path, context, chunks)
        done = write_importance(
            variant,
            corpus,
            out,
            _setting(device, dtype, scratch),
            round_chunks=save_every,
            on_progress=lambda at, total: step("layers", at, total),
        )
    resumed = f", {done.resumed_from} of them from before" if done.resumed_from else ""
    line = f"{done.entries} tensors over {done.chunks} chunks of {corpus.context} tokens{resumed} in {done.path}"
    out_console.print(line, markup=False, highlight=False)


@app.command("chat-check")
def chat_check_command(original: Original, variants: Variants, as_json: AsJson = False) -> None:
    """Tokens and chat templates of variants against the original's, in the engines themselves. Reads no weight.

    Exit code 3 if one differs. Example: `streamquant chat-check Hermes-4-14B variants/*-GGUF/*.gguf`
    """
    from streamquant.validate.report.console import chat_json, chat_view
    from streamquant.validate.validation import chat_check

    with _steps() as step:
        found = chat_check(_without_weights(original), variants, step)
    _print(chat_json(*found) if as_json else chat_view(*found))
    if any(variant.errors for variant in found[0]):
        raise typer.Exit(GATE_FAILED)


@app.command("report")
def report_command(
    report: Annotated[Path, typer.Argument(help="Folder of a report, or its report.json.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pages. Default: that of report.json.")] = None,
) -> None:
    """Render report.md, report.html and plots again from report.json. Example: `streamquant report report`."""
    from streamquant.validate.report.data import read_report
    from streamquant.validate.report.render import write_pages

    found = read_report(report)
    folder = out or (report if report.is_dir() else report.parent)
    for path in write_pages(found, folder):
        out_console.print(str(path), markup=False, highlight=False)


@app.command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A variant folder, or the --out folder with several.")],
    repo: Annotated[
        str, typer.Option(help="ORG/NAME; for an --out folder the stem, to which -GGUF and so on is added.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private; refuse a public one.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it is not there. Default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Into a pull request.")] = False,
    without_report: Annotated[
        bool, typer.Option("--without-report", help="Also what was not measured or failed a gate; the card says so.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Folder of the report. Default: report beside or in DIR.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go where; change nothing.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
) -> None:
    """Publish variants on the Hugging Face Hub with their cards and reports. What is there already is not sent again.

    Exit code 3 if a variant was not measured or failed a gate. Example:
    `streamquant push variants --repo ORG/Hermes-4-14B`
    """
    from streamquant.publish.upload.push import Wish, push
    from streamquant.publish.upload.push_report import push_view

    wish = Wish(private, revision, create_pr, without_report, commit_message)
    with _progress("uploading") as bar:
        pushed = push(
            folder, repo, wish, report=report, dry_run=dry_run, on_start=bar.total, on_bytes=bar.advance,
            on_wait=_say_waiting,
        )  # fmt: skip
    if dry_run:
        _print(push_view(pushed))
        return
    _say_pushed(pushed)


@app.command("card")
def card_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A variant folder, or the --out folder with several.")],
    report: Annotated[Path | None, typer.Option(help="Folder of the report. Default: report beside or in DIR.")] = None,
    repo: Annotated[
        str | None,
        typer.Option(help="ORG/NAME for the commands in the card; for an --out folder the stem, as for push"),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="ORG/NAME of the original, where it came from a local folder.")
    ] = None,
    quantized_by: Annotated[str | None, typer.Option(help="Who made the variants. Default: the ORG of --repo.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="Folder of the original, for its licence, sampling defaults and chat template.")
    ] = None,
    no_prompts: Annotated[bool, typer.Option("--no-prompts", help="Do not render the chat template.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that is somebody's own.")] = False,
) -> None:
    """Write the model card, README.md, of every variant, from its manifest and the report of exactly its files.

    Example: `streamquant card variants --report report --repo ORG/Hermes-4-14B --base-model NousResearch/Hermes-4-14B`
    """
    from streamquant.publish.cards.card import CardOptions, write_cards

    options = CardOptions(base_model, repo, quantized_by, source, not no_prompts, force)
    for path in write_cards(folder, options, report):
        out_console.print(str(path), markup=False, highlight=False)


@app.command("run")
def run_command(
    release: Annotated[
        Path, typer.Argument(metavar="RELEASE.yaml", help="The release: source, variants, texts, gates, repository.")
    ],
    first: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Run this stage and those after it, done or not."),
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run this stage alone, done or not.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages and what each would do; change nothing.")
    ] = False,
) -> None:
    """The whole road in one file: importance matrix, variants, validation, cards, push. What is done is skipped.

    Stages: plan, imatrix, convert, verify, validate, card, push. Exit code 3: a gate failed, and nothing was pushed.

    Example: `streamquant run examples/hermes-4-14b.yaml --dry-run`
    """
    from streamquant.publish.release.release import run_release
    from streamquant.publish.release.release_file import read_release, stage_name
    from streamquant.publish.release.release_run import Watch

    begin = stage_name(first, "--from") if first is not None else None
    single = stage_name(only, "--only") if only is not None else None

    def say(text: object) -> None:
        out_console.print(str(text), markup=False, highlight=False)

    with _steps() as step:
        run_release(
            read_release(release),
            first=begin,
            only=single,
            dry_run=dry_run,
            command=("streamquant", *sys.argv[1:]),
            watch=Watch(say, step, lambda text: error_console.print(f"note: {text}", markup=False, highlight=False)),
        )


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print versions and exit.")] = False) -> None:
    if version:
        _print(versions())
        raise typer.Exit


def _weights(model: str, step: Callable[[str, int, int], None] = lambda _what, _done, _total: None) -> Path:
    """A local path of a model with all its weights; one on the Hub is fetched into the cache of the Hub's client."""
    if hub_spec(model) is None:
        return Path(model)
    from streamquant.convert.source.snapshot import fetch_snapshot

    return fetch_snapshot(open_source(model), step, lambda text: error_console.print(text, markup=False))


def _without_weights(model: str) -> "Variant":
    """A model of which no weight will be read: of one on the Hub only small files and headers are fetched."""
    from streamquant.model.variants.checkpoint import CheckpointVariant
    from streamquant.model.variants.open import open_variant

    if hub_spec(model) is None:
        return open_variant(Path(model))
    return CheckpointVariant(open_source(model))


def _options(
    name: str | None, split_max_size: str | None, max_shard_size: str | None, pre: str | None, metadata: Path | None
) -> ConversionOptions:
    overrides = read_json_object(metadata) if metadata is not None else {}
    return ConversionOptions(
        name, _size("--split-max-size", split_max_size), _size("--max-shard-size", max_shard_size), pre, overrides
    )


def _recipes(to: list[str] | None, files: list[Path] | None) -> list[Recipe]:
    return parse_variants(to or [], [read_recipe(file) for file in files or []])


def _imatrix(path: Path | None, include: list[str] | None, exclude: list[str] | None) -> ImportanceMatrix | None:
    if path is not None:
        return read_imatrix(path).select(include or (), exclude or ())
    if include or exclude:
        raise UsageError(
            "--include-weights and --exclude-weights choose from an importance matrix", required="--imatrix"
        )
    return None


def _overrides(
    rules: list[str] | None,
    file: Path | None,
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    pure: bool,
    leave_output_tensor: bool,
) -> Overrides:
    """The rules of the command line, then those of the file."""
    listed = read_rules(file) if file is not None else ()
    output, embedding = (
        parse_type(name, option) if name is not None else None
        for name, option in (
            (output_tensor_type, "--output-tensor-type"),
            (token_embedding_type, "--token-embedding-type"),
        )
    )
    return Overrides((*map(parse_rule, rules or ()), *listed), output, embedding, pure, leave_output_tensor)


def _check_taken(overrides: Overrides, recipes: list[Recipe]) -> None:
    """Refuse overrides that no variant takes."""
    if overrides and not any(recipe.takes_overrides for recipe in recipes):
        raise UsageError(
            "overrides without a variant that takes them",
            found=", ".join(overrides.record()),
            required="--to with a GGUF type; recipe files have overrides of their own",
        )


def _setting(device: str, dtype: str | None, scratch: Path | None) -> "Setting":
    from streamquant.model.forward import default_setting

    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) is None:
        raise UsageError("no such device", where="--device", found=device, required="auto, cpu or cuda")
    setting = replace(default_setting(device), scratch=scratch)
    if dtype is None:
        return setting
    if dtype not in ("bf16", "f32"):
        raise UsageError("no such dtype", where="--dtype", found=dtype, required="bf16 or f32")
    return replace(setting, dtype="bf16" if dtype == "bf16" else "f32")


def _names(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in known]:
        raise UsageError("unknown name", where=option, found=", ".join(unknown), required=f"of {', '.join(known)}")
    return names


def _size(option: str, text: str | None) -> int | None:
    return None if text is None else parse_size(text, option)


def _early_push(
    repo: str | None, private: bool, without_report: bool, revision: str | None, delete: bool
) -> "EarlyPush | None":
    """What --push and its options ask for."""
    if repo is None and not (private or without_report or revision or delete):
        return None
    from streamquant.publish.upload.streaming import early_push

    return early_push(repo, private=private, without_report=without_report, revision=revision, delete=delete)


def _disk(plan: Plan, spool_gib: float | None, jobs: int, delete_after_upload: bool) -> Disk:
    if not delete_after_upload:
        return disk_of(plan, spool_gib)
    from streamquant.publish.upload.streaming import disk_with_delivery

    return disk_with_delivery(plan, spool_gib, jobs, delete=True)


def _say_pushed(pushed: "Sequence[Pushed]") -> None:
    """A line for each repository, and what there is to know."""
    for one in pushed:
        from streamquant.publish.upload.push_report import summary

        for note in one.notes:
            error_console.print(f"note: {note}", markup=False, highlight=False)
        out_console.print(summary(one), markup=False, highlight=False)


def _say_waiting(what: str, seconds: float) -> None:
    error_console.print(f"{what}; again in {seconds:.0f} s", markup=False, highlight=False)


def _print(value: Any) -> None:
    if isinstance(value, dict | list):
        sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")
    else:
        out_console.print(value)


class _Bar:
    """A progress bar, or nothing where the output is not a terminal."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=None)
        self._others: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def total(self, nbytes: int) -> None:
        self._progress.update(self._task, total=nbytes)

    def advance(self, nbytes: int) -> None:
        self._progress.advance(self._task, nbytes)

    def fetched(self, nbytes: int) -> None:
        """Bytes from the Hub: a bar of its own, as soon as there are some."""
        self._more("fetching", nbytes)

    def uploaded(self, nbytes: int) -> None:
        """Bytes to the Hub, the same."""
        self._more("uploading", nbytes)

    def _more(self, what: str, nbytes: int) -> None:
        with self._lock:
            if what not in self._others:
                self._others[what] = self._progress.add_task(what, total=None)
        self._progress.advance(self._others[what], nbytes)


@contextmanager
def _progress(what: str) -> Iterator[_Bar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(
            *columns, console=error_console, disable=not error_console.is_terminal, transient=True
        ) as progress:
            yield _Bar(progress, what)
    except KeyboardInterrupt:
        error_console.print("interrupted; the same command goes on where it stopped", markup=False)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _steps() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of a long run; its function takes the stage, steps done, and steps in all."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    try:
        with Progress(
            *columns, console=error_console, disable=not error_console.is_terminal, transient=True
        ) as progress:

            def step(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = progress.add_task(stage, total=total)
                progress.update(tasks[stage], completed=done, total=total)

            yield step
    except KeyboardInterrupt:
        error_console.print("interrupted; the same command does it again, with what is in the cache", markup=False)
        raise typer.Exit(INTERRUPTED) from None


def _terminated(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _terminated)
    gc.freeze()  # what was imported stays, and a vocabulary of 400,000 strings is no garbage either:
    gc.set_threshold(200_000, 20, 100)  # walking them again and again costs a tenth of a second
    try:
        app()
    except StreamquantError as error:
        error_console.print(f"error: {error}", markup=False, highlight=False)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)


if __name__ == "__main__":
    main()
