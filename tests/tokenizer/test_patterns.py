"""The split patterns are those that tokenizers were made with."""

import json
from pathlib import Path

import mistral_common

from opennemo.tokenizer.patterns import PATTERNS


def test_the_tekken_pattern_is_the_official_one():
    file = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
    with file.open(encoding="utf-8") as lines:
        assert PATTERNS["tekken"] == json.loads(lines.read())["config"]["pattern"]
