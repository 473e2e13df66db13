"""The parts of a dataset card that are the publisher's own: `prepare` and `push` keep them, and no digest covers them.

    ---
    license: cc-by-4.0                         the YAML, except `DERIVED`
    ---
    # Calls of the help desk                   the heading
    <!-- publisher: text -->                   what stands between two such marks
    Ask help@example.org for the recordings.
    <!-- end -->

`plain_card` puts the defaults in their place and takes the marks and the name of the repository away. counts.json has the digest of the plain card.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from usdm_sft.corpus.dailytalk import DAILYTALK
from usdm_sft.utils.files import replace_text, sha256_file
from usdm_sft.utils.texts import CONTROL, quote

logger = logging.getLogger(__name__)

CARD = "README.md"
# The texts come from DailyDialog, whose licence is more restrictive than DailyTalk's own.
DAILYTALK_METADATA = {
    "language": "en",
    "license": "other",
    "pretty_name": "DailyTalk for USDM",
    "license_name": "cc-by-sa-4.0-with-texts-from-cc-by-nc-sa-4.0",
    "license_link": "https://github.com/keonlee9420/DailyTalk",
}
OTHER_METADATA = {"license": "unknown", "pretty_name": "Spoken dialogs for USDM"}

OWN_PARTS = "text of your own goes between the marks <!-- publisher: text --> and <!-- end -->; licence, language, title and heading are free"
FILL_IN = "to be filled in by the publisher"
WRITE_HERE = "\n<!-- what you write between these two marks is kept -->\n"
BLOCKS = ("text", "citation")  # parts on lines of their own, which a plain card does not have
_ORDER = ("language", "license", "size_categories", "task_categories", "pretty_name", "license_name", "license_link")
DERIVED = ("size_categories", "task_categories", "tags", "configs", "dataset_info")  # what the folder itself decides

_YAML = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_ENTRY = re.compile(r"^([^\s#-][^:\n]*):.*\n(?:(?![^\s#-]).*\n)*", re.MULTILINE)  # a key with all lines of its value
_HEADING = re.compile(r"^# .*$", re.MULTILINE)
_PART = re.compile(r"(<!-- publisher: ([a-z ]+) -->)(.*?)(<!-- end -->)", re.DOTALL)
_TOKENIZER = 'folder = "path/to/this/folder"  # or snapshot_download("USER/NAME", '
_PUSHED_TOKENIZER = re.compile(r'^folder = snapshot_download\("([^"\n]+)", ', re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """What the publisher says about a dataset in its card. It is not part of the dataset's digests, and can be given again.

    Args:
        title: The heading of the card, and the name that the Hub shows.
        license: The licence of the dataset, as the Hub calls it, such as cc-by-4.0, or other.
        language: The language of the dialogs, such as en; several with commas between them.
        source: Where the corpus comes from, as one line of Markdown, such as [Calls](https://example.org).
        citation: How to cite the corpus, in BibTeX.

    Raises:
        ValueError: A value cannot stand in a card.
    """

    title: str | None = None
    license: str | None = None
    language: str | None = None
    source: str | None = None
    citation: str | None = None

    def __post_init__(self) -> None:
        for name in self.given:
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip() or "<!--" in value or "-->" in value:
                raise ValueError(f"card.{name} is {value!r}: give a text without marks of comments (<!-- -->)")
            if name != "citation" and CONTROL.search(value):
                raise ValueError(f"card.{name} is {quote(value)}: give one line")
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise ValueError(
                f"card.license is {self.license!r}: give the Hub's name of it, such as cc-by-4.0, or other"
            )
        if self.language is not None and not re.fullmatch(r"[a-z]{2,3}(-\w+)*(, ?[a-z]{2,3}(-\w+)*)*", self.language):
            raise ValueError(f"card.language is {self.language!r}: give codes of ISO 639, such as en or en,de")

    @property
    def given(self) -> list[str]:
        """The names of the fields that are given."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]


EMPTY_CARD = Card()


def plain_card(text: str, corpus: str) -> str:
    """Return a card without the publisher's own parts, as earlier versions of this package wrote it.

    Args:
        text: The card.
        corpus: The corpus that counts.json names.
    """
    metadata = DAILYTALK_METADATA if corpus == DAILYTALK else OTHER_METADATA
    text = _replace(text, {"metadata": _dump(metadata), "heading": f"# {metadata['pretty_name']}"})
    for name in BLOCKS:
        text = re.sub(rf"<!-- publisher: {name} -->.*?<!-- end -->\n\n", "", text, flags=re.DOTALL)
    return _take_name_away(_PART.sub(FILL_IN, text))


def plain_digest(text: str, corpus: str) -> str:
    """Return the sha256 of the plain card, in hex. Same arguments as `plain_card`."""
    return hashlib.sha256(plain_card(text, corpus).encode()).hexdigest()


def has_digest(path: Path, digest: str, corpus: str) -> bool:
    """Return True if a file of a dataset folder has a digest; the card, without the publisher's own parts."""
    return sha256_file(path) == digest or (path.name == CARD and plain_digest(read_card(path), corpus) == digest)


def read_card(path: Path) -> str:
    """Read a card that may be untrusted."""
    return path.read_bytes().decode("utf-8", errors="replace")


def name_repository(text: str, repo_id: str) -> str:
    """Write the name of the repository into the code that loads the dataset."""
    own, text = _read_own(text), _take_name_away(text)
    for local, named in _name_places(repo_id):
        text = text.replace(local, named)
    return _replace(text, own)


def _take_name_away(text: str) -> str:
    if (pushed := _PUSHED_TOKENIZER.search(text)) is not None:
        for local, named in _name_places(pushed[1]):
            text = text.replace(named, local)
    return text


def _name_places(repo_id: str) -> list[tuple[str, str]]:
    return [
        (_TOKENIZER, f'folder = snapshot_download("{repo_id}", '),
        ('load_dataset("path/to/this/folder"', f'load_dataset("{repo_id}"'),
        ("--data_dir hub:USER/NAME", f"--data_dir hub:{repo_id}"),
    ]


def fill_in(text: str, options: Card, *earlier: str) -> str:
    """Fill the publisher's own parts of a card in.

    Args:
        text: The card.
        options: Values that take the place of the parts that the card has.
        earlier: Cards whose parts are kept where the card does not have them. The first one wins.

    Raises:
        ValueError: The card has no place for an option.
    """
    for card in earlier:
        text = _replace(text, _read_own(card) | _read_own(text))
    parts = _read_parts(text)
    places = {"source": "corpus", "citation": "citation"}
    if missing := [name for name, part in places.items() if getattr(options, name) is not None and part not in parts]:
        raise ValueError(
            f"the card has no place for card.{missing[0]}, because it names its corpus itself or is of an earlier version: leave it out, "
            "or prepare a new folder (units and ids are in the cache)"
        )
    if {"title", "license", "language"}.intersection(options.given):
        metadata = yaml.safe_load(parts["metadata"]) or {}
        if options.title is not None:
            metadata["pretty_name"], parts["heading"] = options.title, f"# {options.title}"
        if options.license is not None:
            metadata = {key: value for key, value in metadata.items() if not key.startswith("license")}
            metadata["license"] = parts["corpus licence"] = options.license
        if options.language is not None:
            codes = re.split(", ?", options.language)
            metadata["language"] = codes if len(codes) > 1 else codes[0]
        parts["metadata"] = _dump(metadata)
    if options.source is not None:
        parts["corpus"] = options.source.replace("|", "\\|")
    if options.citation is not None:
        parts["citation"] = f"\n```bibtex\n{options.citation.strip()}\n```\n"
    return _replace(text, parts)


def check_options(options: Card, corpus: str) -> None:
    """Check before any work is done that the card of a corpus has a place for each option.

    Raises:
        ValueError: The card names the source of the corpus itself.
    """
    if corpus == DAILYTALK and options.source is not None:
        raise ValueError(
            f"card.source is {quote(options.source)}, but the card names DailyTalk as the source: leave it out"
        )


def update_card(folder: Path, options: Card) -> None:
    """Fill the options into the card of a finished folder, which stays finished."""
    text = read_card(folder / CARD)
    if options.given and (filled := fill_in(text, options)) != text:
        replace_text(folder / CARD, filled)
        logger.info("%s has the new %s", folder / CARD, ", ".join(f"card.{name}" for name in options.given))


def _dump(metadata: Mapping[str, object]) -> str:
    return str(yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=1 << 20))


def _split_yaml(text: str) -> dict[str, str]:
    """Return the text of each entry of the YAML."""
    found = _YAML.match(text)
    return {entry[1]: entry[0] for entry in _ENTRY.finditer(found[1])} if found else {}


def _read_parts(text: str) -> dict[str, str]:
    """Return the publisher's own parts of a card, by name."""
    own = "".join(entry for key, entry in _split_yaml(text).items() if key not in DERIVED)
    heading = _HEADING.search(text, text.find("\n---\n"))
    return {"metadata": own, "heading": heading[0] if heading else ""} | {
        part[2]: part[3] for part in _PART.finditer(text)
    }


def _read_own(text: str) -> dict[str, str]:
    """Return the parts that a publisher has changed; none of a text that is not a card of this package."""
    defaults = {"", FILL_IN, WRITE_HERE}
    for metadata in (DAILYTALK_METADATA, OTHER_METADATA):
        defaults |= {_dump(metadata), f"# {metadata['pretty_name']}"}
    is_own = _PART.search(text) or "made with `dailytalk-usdm`" in text
    parts = _read_parts(text) if is_own else {}
    return {name: part for name, part in parts.items() if part not in defaults}


def _replace(text: str, parts: Mapping[str, str]) -> str:
    """Replace parts of a card; other parts stay, and parts for which the card has no place are left out."""
    if (found := _YAML.match(text)) is None:
        return text
    body = text[found.end() :]
    if "metadata" in parts:
        entries = {key: entry for key, entry in _split_yaml(text).items() if key in DERIVED}
        entries |= _split_yaml(f"---\n{parts['metadata']}---\n")
        keys = [*(key for key in _ORDER if key in entries), *(key for key in entries if key not in (*_ORDER, *DERIVED))]
        keys += [key for key in DERIVED if key in entries and key not in _ORDER]
        text = f"---\n{''.join(entries[key] for key in keys)}---\n"
    else:
        text = found[0]
    if "heading" in parts:
        body = _HEADING.sub(lambda _: parts["heading"], body, count=1)
    return text + _PART.sub(lambda part: f"{part[1]}{parts.get(part[2], part[3])}{part[4]}", body)
