"""What /api/validate-yaml finds wrong with the front matter of a README.md.

The real Hub's list of checks is longer and not public; these are the ones that its error messages are known for.
"""

import re
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n?---\s*(?:\n|\Z)", re.DOTALL)
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LICENSE_NAMES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 afl-3.0 bsd "
    "bsd-2-clause bsd-3-clause bsl-1.0 cc cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 "
    "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-4.0 cc-by-nc-sa-4.0 cdla-permissive-2.0 "
    "ecl-2.0 epl-1.0 epl-2.0 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 agpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 llama2 "
    "llama3 llama3.1 llama3.2 llama3.3 llama4 ms-pl mpl-2.0 odc-by odbl osl-3.0 postgresql unlicense zlib wtfpl "
    "other unknown"
)
LICENSES = frozenset(LICENSE_NAMES.split(" "))
RELATIONS = frozenset({"adapter", "merge", "quantized", "finetune"})
LISTS_OF_TEXT = ("tags", "language", "base_model", "datasets")


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the text of a README.md."""
    match = FRONT_MATTER.match(content)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML metadata is not valid: {' '.join(str(error).split())}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["YAML metadata must be an object"], []
    return [*_check_lists(data), *_check_choices(data)], []


def _check_lists(data: dict[Any, Any]) -> list[str]:
    errors = [f'"{key}" is not allowed' for key in data if not isinstance(key, str)]
    for key in LISTS_OF_TEXT:
        values = data.get(key, [])
        values = values if isinstance(values, list) else [values]
        errors += [f'"{key}" must be a string or a list of strings' for value in values if not isinstance(value, str)]
    models = data.get("base_model", [])
    for model in models if isinstance(models, list) else [models]:
        if isinstance(model, str) and not REPO_ID.fullmatch(model):
            errors.append('"base_model" with value "' + model + '" is not valid. Use a model id from the Hub.')
    return errors


def _check_choices(data: dict[Any, Any]) -> list[str]:
    licenses = data.get("license", [])
    licenses = licenses if isinstance(licenses, list) else [licenses]
    errors = []
    if any(name not in LICENSES for name in licenses):
        errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    if data.get("base_model_relation", "quantized") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(sorted(RELATIONS))}]')
    texts = ("library_name", "pipeline_tag", "quantized_by", "license_name", "license_link")
    return errors + [f'"{key}" must be a string' for key in texts if not isinstance(data.get(key, ""), str)]
