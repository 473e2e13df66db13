"""The command `cache`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from usdm_sft.cache.inventory import Level

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from usdm_sft.cache.inventory import Entry, Kept

_SHOWN = 20  # paths of entries that are named one by one
_NAMED = ("unfinished", "damaged", "other")  # levels whose entries are named one by one


def cache(
    action: Literal["list", "remove"] = "list",
    level: Level | None = None,
    corpus: str | None = None,
    unit_model: str | None = None,
    older_than: float | None = None,
    cache_dir: str | None = None,
    check: bool = False,
    dry_run: bool = False,
    yes: bool = False,
    json: bool = False,
) -> None:
    """List what the cache holds, or remove what you name from it. Nothing is ever removed by itself.

    What a running process uses is kept. What several runs use is removed only if the options name each of them. What was removed
    is made or downloaded again when a run needs it.

    Examples:
        dailytalk-usdm cache
        dailytalk-usdm cache remove --corpus DailyTalk --unit_model old_model --dry_run
        dailytalk-usdm cache remove --older_than 30 --yes
        dailytalk-usdm cache remove --level damaged

    Args:
        action: list or remove.
        level: units, tokens (work shards), builder (rows of a corpus), hub (recordings of a corpus on the Hub), split_lists, digests (of
            recordings), agreement (between precisions), executor (logs and marks of tasks), unit_models, unfinished (of killed runs),
            damaged (work shards whose digest is wrong) or other (files that are not this package's). By default, list shows
            all, and remove takes units, tokens, builder, hub, executor and unfinished.
        corpus: Folder of the corpus, its last part, or hub:USER/NAME; unknown for what an earlier version made.
        unit_model: Name or folder of the unit model, its last part, the start of its digest, or unknown.
        older_than: Only what no run has used for this number of days.
        cache_dir: The cache. By default the folder dailytalk_usdm in HF_HOME.
        check: Read every work shard, and list the damaged ones as such.
        dry_run: Show what would be removed, and remove nothing.
        yes: Remove without asking.
        json: Print one JSON object.
    """
    from usdm_sft.cache.inventory import OF_RUNS, list_cache, select
    from usdm_sft.cache.keys import cache_root

    folder = cache_root(cache_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name the cache with --cache_dir")
    entries = list_cache(folder, check=check or level == "damaged")
    entries = select(entries, level=level, corpus=corpus, unit_model=unit_model, older_than=older_than)
    if action == "list":
        _show(folder, entries, json=json)
        return
    if (level, corpus, unit_model, older_than) == (None, None, None, None):
        raise ValueError("name what to remove with --level, --corpus, --unit_model or --older_than")
    if level is None:
        entries = [entry for entry in entries if entry.level in OF_RUNS]
    _remove(folder, entries, dry_run=dry_run, yes=yes, json=json)


def _show(folder: Path, entries: Sequence[Entry], *, json: bool) -> None:
    from usdm_sft.utils.json_files import print_json

    if json:
        print_json({"cache_dir": str(folder), "bytes": _size(entries), "entries": _groups(entries)})
        return
    _print(f"{folder}: {_sum_up(entries)}")
    _print_table(entries)


def _remove(folder: Path, entries: Sequence[Entry], *, dry_run: bool, yes: bool, json: bool) -> None:
    from usdm_sft.cache.inventory import remove
    from usdm_sft.utils.json_files import print_json

    if not dry_run and not yes:
        if not entries:
            _print("nothing in the cache fits: nothing was removed")
            return
        if json or not sys.stdin.isatty():
            raise ValueError(
                f"nothing was removed ({_sum_up(entries)}): pass --yes, or --dry_run to see what it would be"
            )
        _print_table(entries)
        if not _confirm(f"remove {_sum_up(entries)} from {folder}? [y/N] "):
            _print("nothing was removed")
            return
    removed, kept = remove(folder, entries, dry_run=dry_run)
    if json:
        names = ("would_remove", "would_keep") if dry_run else ("removed", "kept")
        found = {names[0]: _groups(removed), names[1]: [[str(each.entry.path), each.reason] for each in kept]}
        print_json({"cache_dir": str(folder), "bytes": _size(removed), **found})
        return
    _print_table(removed)
    _print(f"{'would remove' if dry_run else 'removed'}: {_sum_up(removed)}")
    _print_kept(kept)


def _confirm(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _print_kept(kept: Sequence[Kept]) -> None:
    for each in kept[:_SHOWN]:
        _print(f"kept: {each.entry.path} ({each.reason})")
    if len(kept) > _SHOWN:
        _print(f"kept: {len(kept) - _SHOWN:,} more")


def _size(entries: Iterable[Entry]) -> int:
    return sum(entry.size for entry in entries)


def _sum_up(entries: Sequence[Entry]) -> str:
    from usdm_sft.doctor.findings import format_bytes
    from usdm_sft.utils.texts import count_noun

    return f"{count_noun(len(entries), 'entry').replace('entrys', 'entries')}, {format_bytes(_size(entries))}"


def _groups(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Sum up the entries of one level, corpus and unit model as JSON values."""
    from datetime import UTC, datetime

    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.level, entry.corpora, entry.unit_models), []).append(entry)
    return [
        {
            "level": level,
            "corpora": list(corpora),
            "unit_models": list(unit_models),
            "entries": len(group),
            "bytes": _size(group),
            "last_used": datetime.fromtimestamp(max(entry.used for entry in group), UTC).isoformat(timespec="seconds"),
            **({"paths": [str(entry.path) for entry in group]} if level in _NAMED else {}),
        }
        for (level, corpora, unit_models), group in groups.items()
    ]


def _print_table(entries: Sequence[Entry]) -> None:
    from datetime import UTC, datetime

    from usdm_sft.cache.inventory import UNKNOWN
    from usdm_sft.doctor.findings import format_bytes
    from usdm_sft.utils.texts import count_noun

    if not entries:
        return
    rows = [("level", "corpus", "unit model", "entries", "size", "last used")]
    for group in _groups(entries):
        days = (datetime.now(UTC) - datetime.fromisoformat(group["last_used"])).days
        of_runs = group["level"] in ("units", "tokens")
        rows.append(
            (
                group["level"],
                ", ".join(group["corpora"]) or (UNKNOWN if of_runs else ""),
                ", ".join(group["unit_models"]) or (UNKNOWN if of_runs else ""),
                f"{group['entries']:,}",
                format_bytes(group["bytes"]),
                "today" if days <= 0 else f"{count_noun(days, 'day')} ago",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if 3 <= i <= 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        _print("  ".join(cells).rstrip())
    named = [entry for entry in entries if entry.level in _NAMED]
    for entry in named[:_SHOWN]:
        _print(f"{entry.level}: {entry.path}")
    if len(named) > _SHOWN:
        _print(f"{len(named) - _SHOWN:,} more of these: --json names them all")


def _print(line: str) -> None:
    from usdm_sft.utils.texts import printable

    print(printable(line))  # the cache may hold names from untrusted files
