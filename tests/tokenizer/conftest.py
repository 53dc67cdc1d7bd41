"""Texts that tell tokenizers apart: scripts, code, blanks, look-alikes, and random Unicode."""

import gzip
import json
import random
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from opennemo.tokenizer import Tokenizer

HELDOUT = Path(__file__).parents[2].parent / "shared/data/tokenizer-heldout/news.jsonl.gz"

SENTENCES = [
    "The quick brown fox doesn't jump over 12,345 lazy dogs; it's 3.14% too tired (again)!",
    "Où êtes-vous né ? L'été 1998, à Besançon : « c'était l'œuvre » d'un maître.",
    "Größere Straßen führen zum Süßwarenladen, sagte Jürgen am 3. Mai.",
    "El niño pidió ¡22 piñatas! ¿Cuándo llegarán?",
    "Съешь же ещё этих мягких французских булок, да выпей чаю в 7 часов.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία το 1821.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق، عام ١٩٤٨.",
    "כל בני אדם נולדו בני חורין, 5 ילדים.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतंत्रता है। १२३",
    "মানুষ স্বাধীনভাবে জন্মগ্রহণ করে ৪৫।",
    "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระ ๙๙ บาท",
    "人人生而自由,在尊严和权利上一律平等。2024年7月18日",
    "すべての人間は、生まれながらにして自由であり、カタカナとABC。",
    "모든 인간은 태어날 때부터 자유로우며 존엄하다. 123개",
    "Բոլոր մարդիկ ծնվում են ազատ: ყველა ადამიანი იბადება თავისუფალი.",
    "👨‍👩‍👧‍👦 🦙🏽 🇫🇷 ☺️ e\u0301 ﬁ ǅ ʰ ª Ⅷ ½ \u200b\u200d\ufeff x\u00a0y\u3000z\u2028w",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # 0x1F\n\n\n\tif a != b: pass\r\n\r\n",
    "https://example.org/a/b?c=d&e=%20#f user@host C:\\dir\\file.txt //// ##### ---- __init__",
    "HTTPServer camelCase XMLHttpRequest snake_case ALLCAPS iPhone15 MacBook's I'LL don'T",
]
LOOK_ALIKES = [
    *("<s>", "</s>", "[INST]", "[/INST]", "<unk>", "<pad>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
    *("<SPECIAL_20>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<0x0A>", "▁", "[IMG]"),
]
BLANKS = [
    " ",
    "  ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\v",
    "\f",
    "\x1c",
    "\x85",
    "\u00a0",
    "\u2003",
]


def documents() -> Iterator[str]:
    """Whole texts: code and prose of the standard library, news in 75 languages where it lies."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse", "decimal", "_pydecimal", "this", "html/entities", "encodings/koi8_r"):
        yield library.joinpath(f"{name}.py").read_text("utf-8")
    yield "\n".join(SENTENCES)
    if HELDOUT.exists():
        with gzip.open(HELDOUT, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["text"][:4000] for line in lines)


def random_texts(n: int, seed: int) -> Iterator[str]:
    """`n` short texts of several kinds, always the same for the same seed; no lone surrogates."""
    rng = random.Random(seed)
    kinds: list[Callable[[], str]] = [
        lambda: chr(rng.randrange(0x80)),
        lambda: chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))),
        lambda: chr(rng.randrange(0x300, 0x370)),
        lambda: chr(rng.randrange(0x4E00, 0xA000)),
        lambda: chr(rng.randrange(0x1F300, 0x1FAFF)),
        lambda: rng.choice(BLANKS) * rng.choice((1, 1, 2, 3, 9)),
        lambda: rng.choice(LOOK_ALIKES),
        lambda: str(rng.randrange(10**9)),
        lambda: rng.choice(SENTENCES)[slice(*sorted(rng.choices(range(60), k=2)))],
        lambda: unicodedata.normalize("NFD", rng.choice(SENTENCES))[: rng.randrange(20)],
        lambda: "".join(rng.choices("aAzZǅé'", k=rng.randrange(12))),
    ]
    for _ in range(n):
        favourites = rng.choices(kinds, k=3)
        yield "".join(rng.choice(favourites)() for _ in range(rng.randrange(1, 16)))


def samples() -> list[str]:
    """Texts of every kind, a few thousand."""
    long = [text[:1500] for text in documents()]
    blanks = [f"x{blank * n}{y}" for blank in BLANKS for n in (1, 2, 3, 9) for y in "y5!"]
    return [*long, *SENTENCES, *blanks, *random_texts(500, seed=4), *LOOK_ALIKES]


def hold_for(tokenizer: Tokenizer) -> None:
    """What every tokenizer promises."""
    for text in [*SENTENCES, *LOOK_ALIKES, "".join(tokenizer.control), "\ud800 x"]:
        ids = tokenizer.encode(text)
        assert not {*ids} & {*tokenizer.control.values()}
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert tokenizer.decode(ids) == joined.removeprefix(" " * tokenizer.dummy_prefix)
        if "▁" not in text:
            assert tokenizer.decode(ids) == text.replace("\ud800", "\ufffd")
        assert tokenizer.encode_batch([text, ""])[0].tolist() == ids
    for name, id in tokenizer.control.items():
        assert tokenizer.token_bytes(id) == b""
        assert tokenizer.decode([id], show_control=True) == name
    assert tokenizer.token_bytes(tokenizer.vocab_size - 1) is not None
    with pytest.raises(IndexError):
        tokenizer.token_bytes(tokenizer.vocab_size)
    with pytest.raises(IndexError):
        tokenizer.token_bytes(-1)


@pytest.fixture(scope="session")
def texts() -> SimpleNamespace:
    return SimpleNamespace(
        sentences=SENTENCES,
        look_alikes=LOOK_ALIKES,
        blanks=BLANKS,
        documents=documents,
        random=random_texts,
        samples=samples,
        hold_for=hold_for,
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests leave the user's cache alone, and share one of their own."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
