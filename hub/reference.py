"""A model of the Hub as people write it: ORG/NAME[@REVISION], an address of its pages, hf://ORG/NAME.

    parse_reference(text)   the reference; None for what is none; UsageError for an address that names no model
    hub_reference(model)    the same of what a user calls a model: a path that exists goes before the Hub
    check_name(repo)        ORG/NAME of a repository to write to, written in any of these ways

Addresses are those of the configured Hub (HF_ENDPOINT) and of the hosts that huggingface_hub takes for the Hub's.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from streamquant.quant.errors import UsageError

MAIN = "main"
_SPEC = re.compile(r"(?P<name>[\w.-]{1,96}/[\w.-]{1,96})(@(?P<revision>[^\s@]{1,200}))?", re.ASCII)
_TAGGED = re.compile(r"(?P<name>[\w.-]{1,96}/[\w.-]{1,96}):(?P<tag>[\w./-]{1,200})", re.ASCII)
_OTHER_KINDS = ("datasets", "spaces", "collections", "papers", "docs", "buckets")
_PAGES = ("tree", "blob", "resolve", "raw", "commit", "commits")
"""Pages of a repository that name a revision."""
_OF_FILES = ("blob", "resolve", "raw")
_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md")
"""Files that a link may name to mean the whole checkpoint."""
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A model repository of the Hub at a revision.

    >>> str(ModelReference("ORG/NAME")), str(ModelReference("ORG/NAME", "v1.0"))
    ('ORG/NAME', 'ORG/NAME@v1.0')
    """

    name: str
    """ORG/NAME."""
    revision: str = MAIN
    """A branch, a tag or a commit."""

    def __str__(self) -> str:
        return self.name if self.revision == MAIN else f"{self.name}@{self.revision}"


def parse_reference(text: str) -> ModelReference | None:
    """The model that a text names; None for what is no reference to the Hub.

    >>> parse_reference("NousResearch/Hermes-4-14B"), parse_reference("NousResearch/Hermes-4-14B@refs/pr/1")
    (ModelReference(name='NousResearch/Hermes-4-14B', revision='main'), \
ModelReference(name='NousResearch/Hermes-4-14B', revision='refs/pr/1'))
    >>> str(parse_reference("hf://NousResearch/Hermes-4-14B")), str(parse_reference("hf.co/NousResearch/Hermes-4-14B/"))
    ('NousResearch/Hermes-4-14B', 'NousResearch/Hermes-4-14B')
    >>> parse_reference("./Hermes-4-14B"), parse_reference("models/Hermes/4")
    (None, None)

    Raises UsageError for an address, or something much like one, that names no model.
    """
    rest = _after_hub(text)
    if rest is not None:
        return _of_page(text, rest)
    plain = text[:-1] if text.endswith("/") else text
    if (found := _plain(plain)) is not None:
        return found
    if (tagged := _TAGGED.fullmatch(plain)) is not None and _plain(tagged["name"]) is not None:
        raise _not_a_model(text, f"for a revision write {tagged['name']}@{tagged['tag']}; a type is chosen by --to")
    return None


def hub_reference(model: str) -> ModelReference | None:
    """`parse_reference` of what a user calls a model; None if there is such a path, which goes before the Hub.

    Raises UsageError.
    """
    try:
        if Path(model).exists():
            return None
    except (OSError, ValueError):  # a name that no path can have
        return None
    return parse_reference(model)


def check_name(repo: str) -> str:
    """ORG/NAME of a repository that is written to. Raises UsageError for what cannot be one."""
    found = parse_reference(repo)
    if found is None or found != ModelReference(found.name) or "@" in repo:
        raise UsageError(
            "not the name of a repository", where=_short(repo), required="ORG/NAME", hint="a branch: --revision"
        )
    return found.name


def _plain(text: str) -> ModelReference | None:
    """ORG/NAME[@REVISION]."""
    match = _SPEC.fullmatch(text)
    if match is None or any(part.strip(".") == "" for part in match["name"].split("/")):
        return None
    return ModelReference(match["name"], match["revision"] or MAIN)


def _after_hub(text: str) -> str | None:
    """What follows the Hub in an address of it, without query and fragment; None for what is no address.

    Raises UsageError for an address of another host.
    """
    from huggingface_hub import constants

    scheme, separator, rest = text.partition("://")
    if not separator:
        host, slash, path = text.partition("/")
        known = slash and path.strip("/").count("/") and host.lower().removeprefix("www.") in _hosts()
        return _without_query(path) if known else None
    if scheme.lower() == "hf":
        return _without_query(rest)
    if scheme.lower() not in ("http", "https"):
        raise _not_a_model(text, "write ORG/NAME")
    endpoint = constants.ENDPOINT.partition("://")[2]
    without_user = rest.rpartition("@")[2] if "@" in rest.partition("/")[0] else rest
    if without_user.startswith(f"{endpoint}/"):  # a mirror may lie in a folder of its host
        return _without_query(without_user.removeprefix(f"{endpoint}/"))
    host, _, path = without_user.partition("/")
    if host.partition(":")[0].lower().removeprefix("www.") not in _hosts():
        raise UsageError(
            "not an address of the Hub",
            where=_short(text),
            required=f"ORG/NAME, or an address below {_short(constants.ENDPOINT)}",
            hint="write ORG/NAME, and name another Hub by HF_ENDPOINT",
        )
    return _without_query(path)


def _hosts() -> frozenset[str]:
    """Hosts of the Hub: those of the client, in lower case; older clients have no list of them."""
    from huggingface_hub import constants

    known: frozenset[str] = getattr(constants, "HF_URL_HOSTS", frozenset({"hf.co"}))
    urls = (constants.ENDPOINT, getattr(constants, "HUGGINGFACE_CO_URL_HOME", ""))
    return known | {host for url in urls if (host := _host(url))}


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _without_query(path: str) -> str:
    return path.partition("?")[0].partition("#")[0].strip("/")


def _of_page(text: str, path: str) -> ModelReference:
    """ORG/NAME[@REVISION][/PAGE/REVISION[/FILE]], the path of an address of the Hub."""
    parts = path.split("/")
    if parts[0] in _OTHER_KINDS:
        raise _not_a_model(text, f"an address below {parts[0]}/ is none of a model; write ORG/NAME")
    if parts[0] == "models" and len(parts) > 2:
        parts = parts[1:]
    if "@" in path:
        found = _plain("/".join(unquote(part) for part in parts))
        if found is None:
            raise _not_a_model(text, "write ORG/NAME@REVISION")
        return found
    found = _plain("/".join(parts[:2]).removesuffix(".git"))
    if found is None:
        raise _not_a_model(text, "write ORG/NAME")
    return _at_page(text, found.name, parts[2:]) if len(parts) > 2 else found


def _at_page(text: str, name: str, page: list[str]) -> ModelReference:
    kind, rest = page[0], [unquote(part) for part in page[1:]]
    if kind not in _PAGES or not rest:
        raise _not_a_model(text, f"write {name}, or {name}@REVISION")
    length = 3 if rest[0] == "refs" else 1  # refs/pr/1, whose slashes are written as they are or as %2F
    revision, file = "/".join(rest[:length]), "/".join(rest[length:])
    found = _plain(f"{name}@{revision}")
    if found is None:
        raise _not_a_model(text, f"write {name}@REVISION")
    whole = not file or (kind in _OF_FILES and "/" not in file and file.endswith(_SUFFIXES))
    if not whole:
        raise _not_a_model(text, f"only a whole repository can be read; write {found}")
    return found


def _not_a_model(text: str, hint: str) -> UsageError:
    return UsageError(
        "not a model of the Hub", where=_short(text), required="ORG/NAME, or ORG/NAME@REVISION", hint=hint
    )


def _short(text: str) -> str:
    """Without what may be a password, and cut."""
    return re.sub(r"://[^/@]*@", "://***@", text)[:_SHOWN]
