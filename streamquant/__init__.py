"""One read of a BF16 Hugging Face checkpoint, every FP8 and GGUF variant of it, and proof of what was lost.

    import streamquant

    plan = streamquant.plan("NousResearch/Hermes-4-14B", ["fp8-dynamic", "gguf:Q8_0,Q4_K_M"])
    done = streamquant.convert("NousResearch/Hermes-4-14B", ["fp8-dynamic", "gguf:Q8_0,Q4_K_M"], "variants")
    verified = streamquant.verify("variants")

What each command of the command line does is a function here, with the same name:

    formats      list the variants that can be made, and the model families that can be converted
    plan         plan a conversion: every file, byte, format and reason
    convert      convert a model: every variant from one read of the checkpoint
    inspect      read the headers of GGUF and safetensors files
    verify       read back what convert wrote, and compare it with the manifest and the model
    recipe       extract the recipe of a GGUF file of any publisher
    imatrix      compute the importance matrix of a model over texts
    calibrate    measure the inputs, keys and values of a model over texts or chats, for static scales
    validate     measure whether each variant is still the model
    chat_check   compare tokens and chat templates in the engines themselves
    card         write model cards
    push         publish variants on the Hugging Face Hub
    run          run a release file: all of it, in stages

    disk_use          what a conversion by a plan takes on the disk at most
    convert_and_push  convert, and upload each file as soon as it is finished
    read_imatrix      an importance matrix of llama-imatrix, for ConversionOptions
    read_calibration  a file of calibrate, for ConversionOptions
    read_report       the report of an earlier validation
    write_pages       the pages of a report

A model is a folder, or ORG/NAME[@REVISION] on the Hub. Options go in as one record, and results come out as records;
help(streamquant.ConversionOptions) describes the fields of one. A function prints nothing, and leaves signal
handlers, the environment and logging as they are: a Listener hears of progress, waits and notes. Every foreseeable
fault is a StreamquantError, with the exit code of the command line as its attribute `exit_code`.

`streamquant.calibrate`, `streamquant.convert` and `streamquant.validate` are functions and packages at the same time:
`import streamquant.convert.options` works as well. Only what is documented in docs/api.md is stable between versions.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import inspect as signatures
    from collections.abc import Callable

    from streamquant.api.calibration import calibrate as calibrate
    from streamquant.api.conversion import Formats as Formats
    from streamquant.api.conversion import convert as convert
    from streamquant.api.conversion import disk_use as disk_use
    from streamquant.api.conversion import formats as formats
    from streamquant.api.conversion import plan as plan
    from streamquant.api.conversion import recipe as recipe
    from streamquant.api.publication import card as card
    from streamquant.api.publication import convert_and_push as convert_and_push
    from streamquant.api.publication import push as push
    from streamquant.api.publication import run as run
    from streamquant.api.readback import inspect as inspect
    from streamquant.api.readback import verify as verify
    from streamquant.api.validation import chat_check as chat_check
    from streamquant.api.validation import imatrix as imatrix
    from streamquant.api.validation import validate as validate
    from streamquant.calibrate.calibration import CalibrationOptions as CalibrationOptions
    from streamquant.calibrate.calibration import CalibrationRun as CalibrationRun
    from streamquant.calibrate.importance import ImportanceOptions as ImportanceOptions
    from streamquant.calibrate.importance import ImportanceRun as ImportanceRun
    from streamquant.convert.conversion import Conversion as Conversion
    from streamquant.convert.options import ConversionOptions as ConversionOptions
    from streamquant.convert.options import RunOptions as RunOptions
    from streamquant.convert.plan.disk import Disk as Disk
    from streamquant.convert.plan.records import Plan as Plan
    from streamquant.convert.recipes.calibration import Calibration as Calibration
    from streamquant.convert.recipes.calibration import read_calibration as read_calibration
    from streamquant.convert.recipes.imatrix import ImportanceMatrix as ImportanceMatrix
    from streamquant.convert.recipes.imatrix import read_imatrix as read_imatrix
    from streamquant.convert.recipes.overrides import Overrides as Overrides
    from streamquant.convert.recipes.recipe_extract import ExtractedRecipe as ExtractedRecipe
    from streamquant.convert.recipes.recipe_file import RecipeFile as RecipeFile
    from streamquant.files.listener import SILENT as SILENT
    from streamquant.files.listener import Listener as Listener
    from streamquant.model.forward import Setting as Setting
    from streamquant.model.forward import default_setting as default_setting
    from streamquant.publish.cards.options import CardOptions as CardOptions
    from streamquant.publish.release.release_run import ReleaseOptions as ReleaseOptions
    from streamquant.publish.release.release_run import StageOutcome as StageOutcome
    from streamquant.publish.upload.options import EarlyPush as EarlyPush
    from streamquant.publish.upload.options import PushOptions as PushOptions
    from streamquant.publish.upload.push import Pushed as Pushed
    from streamquant.quant.errors import GateFailedError as GateFailedError
    from streamquant.quant.errors import StreamquantError as StreamquantError
    from streamquant.quant.errors import UsageError as UsageError
    from streamquant.validate.gates import Gates as Gates
    from streamquant.validate.options import ValidationOptions as ValidationOptions
    from streamquant.validate.readback.inspect import StoredFile as StoredFile
    from streamquant.validate.readback.verify import VerifiedVariant as VerifiedVariant
    from streamquant.validate.report.data import ChatCheck as ChatCheck
    from streamquant.validate.report.data import Report as Report
    from streamquant.validate.report.data import read_report as read_report
    from streamquant.validate.report.render import write_pages as write_pages

    __version__: str

_NAMES = {
    "api.calibration": ("calibrate",),
    "api.conversion": ("Formats", "convert", "disk_use", "formats", "plan", "recipe"),
    "api.publication": ("card", "convert_and_push", "push", "run"),
    "api.readback": ("inspect", "verify"),
    "api.validation": ("chat_check", "imatrix", "validate"),
    "calibrate.calibration": ("CalibrationOptions", "CalibrationRun"),
    "calibrate.importance": ("ImportanceOptions", "ImportanceRun"),
    "convert.conversion": ("Conversion",),
    "convert.options": ("ConversionOptions", "RunOptions"),
    "convert.plan.disk": ("Disk",),
    "convert.plan.records": ("Plan",),
    "convert.recipes.calibration": ("Calibration", "read_calibration"),
    "convert.recipes.imatrix": ("ImportanceMatrix", "read_imatrix"),
    "convert.recipes.overrides": ("Overrides",),
    "convert.recipes.recipe_extract": ("ExtractedRecipe",),
    "convert.recipes.recipe_file": ("RecipeFile",),
    "files.listener": ("Listener", "SILENT"),
    "model.forward": ("Setting", "default_setting"),
    "publish.cards.options": ("CardOptions",),
    "publish.release.release_run": ("StageOutcome", "ReleaseOptions"),
    "publish.upload.options": ("EarlyPush", "PushOptions"),
    "publish.upload.push": ("Pushed",),
    "quant.errors": ("GateFailedError", "StreamquantError", "UsageError"),
    "validate.gates": ("Gates",),
    "validate.options": ("ValidationOptions",),
    "validate.readback.inspect": ("StoredFile",),
    "validate.readback.verify": ("VerifiedVariant",),
    "validate.report.data": ("ChatCheck", "Report", "read_report"),
    "validate.report.render": ("write_pages",),
}
"""Module -> its names in the API. None is imported before it is used: torch alone takes seconds."""
_HOMES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOMES)


def _load(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


if not TYPE_CHECKING:  # type checkers refuse other names by the imports above
    __getattr__ = _load


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


class _Room(ModuleType):
    """A package that is a function of the API too: `streamquant.convert(...)` beside `streamquant.convert.options`.

    Python sets the attribute `convert` of this package to the package of that name as soon as anything in it is
    imported, so a function of that name would be gone.
    """

    @property
    def __wrapped__(self) -> "Callable[..., object]":
        function: Callable[..., object] = _load(self.__name__.rpartition(".")[2])
        return function

    @property
    def __signature__(self) -> "signatures.Signature":
        from inspect import signature

        return signature(self.__wrapped__)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override] # of the function, for help()
        return self.__wrapped__.__doc__

    def __call__(self, *arguments: object, **named: object) -> object:
        return self.__wrapped__(*arguments, **named)


for _room in ("calibrate", "convert", "validate"):
    import_module(f"{__name__}.{_room}").__class__ = _Room
