"""Counts of a corpus: how many texts were read, changed, left out and kept, and why.

Everything is a count under a section, a name and a language, and counts of parts add up to counts
of the whole in any order.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

COUNTS = ("documents", "text_bytes", "tokens")
ORIGINS = ("languages", "sources", "licences")
SHOWN = 12  # languages, sources and licences in a terminal; the file has all


class Tally:
    """Counts of documents, bytes of text, and tokens where there are any.

    Sections are read, unreadable (lines), changed (by stage), dropped (by reason), and of what is
    kept languages, sources and licences.
    """

    def __init__(self, rows: Iterable[tuple[str, str, str, int, int, int]] = ()) -> None:
        self._counts: dict[tuple[str, str, str], list[int]] = {}
        for row in rows:
            self.count(*row)

    def count(
        self,
        section: str,
        name: str,
        language: str,
        documents: int = 1,
        text_bytes: int = 0,
        tokens: int = 0,
    ) -> None:
        """Add to the counts of a name in a section."""
        counts = self._counts.setdefault((section, name, language), [0, 0, 0])
        for i, n in enumerate((documents, text_bytes, tokens)):
            counts[i] += n

    def rows(self) -> list[Any]:
        """All counts, as JSON can hold them; `Tally(rows)` has the same."""
        return [[*key, *counts] for key, counts in self._counts.items()]

    def content(self) -> dict[str, Any]:
        """All counts, in an order that does not depend on how they were added; see docs/data.md."""
        sections: dict[str, dict[str, Any]] = {name: {} for name in ("read", "changed", "dropped")}
        sections |= {name: {} for name in ORIGINS}
        n_unreadable = 0
        for (section, name, language), counts in sorted(self._counts.items()):
            if section == "unreadable":
                n_unreadable += counts[0]
                continue
            row = sections[section].setdefault(name, dict.fromkeys(COUNTS, 0) | {"languages": {}})
            for what, n in zip(COUNTS, counts, strict=True):
                row[what] += n
            row["languages"][language] = counts[0]
        for section, rows in sections.items():
            for row in rows.values():
                del row["languages" if section in ORIGINS else "tokens"]
        kept = {what: sum(row[what] for row in sections["languages"].values()) for what in COUNTS}
        read = sections.pop("read").get("", dict.fromkeys(COUNTS[:2], 0))
        return {"read": read | {"unreadable_lines": n_unreadable}, "kept": kept, **sections}


def table(content: Mapping[str, Any]) -> Group:
    """A report for a terminal: what happened, and what is kept."""
    happened = Table("", "documents", "MB", "most of them in", box=None, header_style="bold")
    names = {"read": content["read"]}
    names |= {f"changed by {name}": row for name, row in content["changed"].items()}
    names |= {f"left out: {name}": row for name, row in content["dropped"].items()}
    for name, row in (names | {"kept": content["kept"]}).items():
        most = sorted(row.get("languages", {}).items(), key=lambda pair: -pair[1])[:4]
        shown = ", ".join(f"{language} {n:,}" for language, n in most)
        happened.add_row(name, f"{row['documents']:,}", f"{row['text_bytes'] / 1e6:,.1f}", shown)
    tables = [happened]
    for section in ORIGINS:
        rows = sorted(content[section].items(), key=lambda pair: -pair[1]["text_bytes"])
        rest = Table(section, "documents", "MB", "tokens", "bytes/token", box=None)
        for name, row in rows[:SHOWN]:
            counts = (
                f"{row['documents']:,}",
                f"{row['text_bytes'] / 1e6:,.1f}",
                f"{row['tokens']:,}",
            )
            rest.add_row(name, *counts, f"{row['text_bytes'] / row['tokens']:.2f}")
        if more := rows[SHOWN:]:
            rest.add_row(f"{len(more)} more", f"{sum(row['documents'] for _, row in more):,}")
        if rows:
            tables += [Table(box=None), rest]
    for each in tables:
        for column in each.columns[1:]:
            column.justify = "left" if column.header == "most of them in" else "right"
    return Group(*tables)
