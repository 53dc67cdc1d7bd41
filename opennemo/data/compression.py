"""How few tokens tokenizers need for any texts, by language, as a table, as numbers, as a plot.

The only measurement is how many tokens each tokenizer makes of each language; tokens per byte,
ratios and shares are arithmetic on that. The announcement of Mistral NeMo made its claims about
Tekken in these terms ("Figure 2: Tekken compression rate").

It does not know where texts come from (texts.py) or how a tokenizer works.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from opennemo.errors import InvalidRequest
from opennemo.texts import CODE, lay_out
from opennemo.tokenizer.load import open_tokenizer
from opennemo.tokenizer.tokenizer import Tokenizer

COLOURS = ("#8a94a6", "#3f7cac", "#2e8b74", "#7f6a93", "#b5525c", "#a88432")
ACCENT = "#f05a1a"


@dataclass(frozen=True)
class Comparison:
    """Tokens that tokenizers need for the same texts.

    Attributes:
        reference: name of the tokenizer that the others are compared with.
        n_tokens: name -> language -> tokens.
        n_bytes, n_chars: language -> size of its texts.
        layout: in which the texts were written.
    """

    reference: str
    n_tokens: Mapping[str, Counter[str]]
    n_bytes: Counter[str]
    n_chars: Counter[str]
    layout: str = "document"

    @property
    def languages(self) -> list[str]:
        return sorted(self.n_bytes)

    def ratio(self, name: str, language: str) -> float:
        """Tokens of a tokenizer for one of the reference: above 1, the reference is better."""
        return self.n_tokens[name][language] / max(1, self.n_tokens[self.reference][language])

    def won(self, name: str) -> int:
        """Number of languages for which the reference needs fewer tokens than this tokenizer."""
        return sum(self.ratio(name, language) > 1 for language in self.languages)

    def worst(self, name: str, n: int = 10) -> list[str]:
        """The languages in which the reference does worst against this tokenizer, worst first."""
        return sorted(self.languages, key=lambda language: self.ratio(name, language))[:n]

    def rows(self) -> list[dict[str, str | int | float]]:
        """A row for each language and tokenizer."""
        return [
            {
                "language": language,
                "layout": self.layout,
                "tokenizer": name,
                "tokens": tokens[language],
                "bytes_a_token": round(self.n_bytes[language] / max(1, tokens[language]), 4),
                "chars_a_token": round(self.n_chars[language] / max(1, tokens[language]), 4),
                "ratio": round(self.ratio(name, language), 4),
            }
            for language in self.languages
            for name, tokens in self.n_tokens.items()
        ]

    def content(self) -> dict[str, Any]:
        """The rows, and what follows from them, for JSON."""
        others = [name for name in self.n_tokens if name != self.reference]
        won = {name: {"won": self.won(name), "of": len(self.languages)} for name in others}
        worst = {name: self.worst(name) for name in others}
        return {"reference": self.reference, "won": won, "worst": worst, "rows": self.rows()}

    def table(self, languages: Sequence[str] | None = None) -> Table:
        """A row for each language: the reference's tokens and bytes a token, the others' ratios."""
        others = [name for name in self.n_tokens if name != self.reference]
        title = f"Tokens for one token of {self.reference}"
        title += f", {self.layout} by {self.layout}" if self.layout != "document" else ""
        table = Table(title=title, caption=self.summary(), caption_justify="left")
        table.add_column("language")
        for column in ("tokens", "bytes/token", "chars/token", *others):
            table.add_column(column, justify="right")
        for language in languages or self.languages:
            tokens = max(1, self.n_tokens[self.reference][language])
            cells = [language, f"{tokens:,}", f"{self.n_bytes[language] / tokens:.2f}"]
            cells.append(f"{self.n_chars[language] / tokens:.2f}")
            ratios = [self.ratio(name, language) for name in others]
            table.add_row(
                *cells, *(Text(f"{r:.2f}", style="green" if r > 1 else "red") for r in ratios)
            )
        return table

    def summary(self) -> str:
        """Against each other tokenizer: the share of languages won, and the worst ten."""
        lines = []
        for name in self.n_tokens:
            if name != self.reference:
                won, n = self.won(name), len(self.languages)
                worst = (f"{w} {self.ratio(name, w):.2f}" for w in self.worst(name))
                lines.append(
                    f"{self.reference} needs fewer tokens than {name} in {won} of {n} languages "
                    f"({won / n:.1%}); worst: {', '.join(worst)}"
                )
        return "\n".join(lines)

    def plot(
        self,
        files: Sequence[Path],
        languages: Mapping[str, str],
        claims: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Draw the ratios of some languages, a group of bars each, in any of PNG, SVG or PDF.

        languages: language -> what to call it; claims: name -> language -> ratio as announced.
        """
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        others = [name for name in self.n_tokens if name != self.reference]
        width = 0.84 / len(others)
        size, turn = (7.5, 0) if len(others) < 4 else (6, 90)  # of the numbers in the bars
        # Without the salt and the date the same numbers would not give the same file.
        with rc_context({"svg.hashsalt": "figure", "svg.fonttype": "none"}):
            figure = Figure(figsize=(10, 4.4), layout="constrained")
            axes = figure.add_subplot()
            bars, lines = [], []
            for i, (name, colour) in enumerate(zip(others, COLOURS, strict=False)):
                left = (i - len(others) / 2) * width
                places = [x + left + width / 2 for x in range(len(languages))]
                ratios = [self.ratio(name, language) for language in languages]
                bars.append(
                    axes.bar(places, ratios, width * 0.94, color=colour, label=name, zorder=2)
                )
                for x, ratio in zip(places, ratios, strict=True):
                    axes.text(
                        x,
                        0.04,
                        f"{ratio:.2f}",
                        ha="center",
                        size=size,
                        color="white",
                        rotation=turn,
                    )
                claimed = (claims or {}).get(name, {})
                marks = [
                    (p, claimed[c]) for p, c in zip(places, languages, strict=True) if c in claimed
                ]
                if marks:
                    y = [ratio for _, ratio in marks]
                    starts, ends = ([x + side * width * 0.47 for x, _ in marks] for side in (-1, 1))
                    label = f"{name}, as announced"
                    lines.append(
                        axes.hlines(y, starts, ends, ACCENT, linewidth=2.5, label=label, zorder=4)
                    )
            axes.axhline(1, color="#222222", linewidth=1, zorder=3)
            axes.text(len(languages) - 0.42, 1, f" {self.reference}", va="center")
            axes.set_title(f"Tokens for one token of {self.reference}", loc="left", pad=12)
            axes.set_xticks(range(len(languages)), list(languages.values()), size=9)
            axes.set_xlim(-0.55, len(languages) - 0.45)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0)
            axes.grid(axis="y", color="#e8e4de", zorder=0)
            axes.legend(handles=[*bars, *lines], frameon=False, loc="upper left", borderpad=0)
            for file in files:
                svg = file.suffix == ".svg"
                figure.savefig(file, dpi=120, metadata={"Date": None} if svg else None)


def as_csv(rows: Sequence[Mapping[str, str | int | float]]) -> str:
    """The rows as CSV with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def open_all(specs: Sequence[str]) -> dict[str, Tokenizer]:
    """Tokenizers from `PATH` or `NAME=PATH`; without a name they are called after the path.

    Raises:
        InvalidRequest: two have the same name. CheckpointError: a path is not a tokenizer.
    """
    tokenizers: dict[str, Tokenizer] = {}
    for spec in specs:
        name, equals, path = spec.rpartition("=")
        file = Path(path)
        if not equals:  # tekken.json or tokenizer.json says less than the folder that it is in
            name = file.parent.name if "token" in file.name or file.stem == "tekken" else file.stem
        if (name := name or path) in tokenizers:
            raise InvalidRequest(f"two tokenizers are called {name}: write NAME={path}")
        tokenizers[name] = open_tokenizer(file)
    return tokenizers


def compare(
    tokenizers: Mapping[str, Tokenizer],
    texts: Iterable[tuple[str, str]],
    reference: str,
    layout: str = "document",
) -> Comparison:
    """Count the tokens of (language, text) pairs, in one of the LAYOUTS, with every tokenizer.

    Raises:
        InvalidRequest: the reference is not among the tokenizers, or there is no text.
    """
    if reference not in tokenizers:
        raise InvalidRequest(f"{reference} is not among {', '.join(tokenizers)}")
    n_tokens = {name: Counter[str]() for name in tokenizers}
    n_bytes, n_chars = Counter[str](), Counter[str]()
    for tokenizer in tokenizers.values():
        tokenizer.expect_corpus()
    for language, whole in texts:
        parts = lay_out(whole, "document" if language.startswith(CODE) else layout)
        for name, tokenizer in tokenizers.items():
            n_tokens[name][language] += sum(map(len, map(tokenizer.encode, parts)))
        n_bytes[language] += sum(len(part.encode("utf-8", "replace")) for part in parts)
        n_chars[language] += sum(map(len, parts))
    if not n_chars.total():
        raise InvalidRequest("there is no text to compare on")
    return Comparison(reference, n_tokens, n_bytes, n_chars, layout)
