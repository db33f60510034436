"""YAML from a stranger: bounded in size, no repeated keys, no anchors, no tags, and an error that names the file."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from streamquant.files.reading import open_regular
from streamquant.quant.errors import UsageError

MAX_BYTES = 1024 * 1024
"""Far above any recipe or release that people write."""


def read_yaml(path: Path) -> object:
    """What a YAML file of at most MAX_BYTES holds. Raises UsageError if it cannot be read, or is not plain YAML."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UsageError("file too large", where=str(path), required=f"at most {MAX_BYTES:,} bytes")
        return yaml.load(content.decode(), _Loader)
    except OSError as error:
        raise UsageError("cannot read a file", where=str(path), found=error.strerror) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError("broken YAML", where=str(path), found=f"{error}"[:500] or "nested too deeply") from error


_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice, of which YAML would take the last, and anchors and tags: nobody needs them here.

    A date is a text, as it was written.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 # PyYAML's own, of this class
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := sorted(key for key, count in counts.items() if count > 1):
            raise yaml.YAMLError(f"key {', '.join(twice)[:100]!r} occurs twice")
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not allowed")
        if getattr(self.peek_event(), "tag", None) is not None:  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("tags (!name) are not allowed")
        return super().compose_node(parent, index)
