"""Learn a Tekken vocabulary from texts and see what it makes of a sentence:

python examples/tokenizer_training.py [FILES...]
"""

import sys
from pathlib import Path

from opennemo.data.vocabulary import VocabularySettings, train
from opennemo.texts import Texts
from opennemo.tokenizer import open_tokenizer

files = [Path(name) for name in sys.argv[1:]] or sorted(Path("docs").glob("*.md"))
learned = train(Texts(files), VocabularySettings(vocab_size=3000))
folder = Path("runs/example-vocabulary")
learned.save(folder)  # tekken.json, which mistral-common reads, and tokenizer.json

own, package = open_tokenizer(folder), open_tokenizer("opennemo-tekken-32k")
for sentence in ("The engine computes one flat run of tokens.", "Der Motor läuft."):
    ids = own.encode(sentence)
    assert own.decode(ids) == sentence
    pieces = [own.token_bytes(id).decode(errors="replace") for id in ids]
    print(f"{len(ids)} tokens, {len(package.encode(sentence))} of the larger vocabulary:")
    print(" | ".join(pieces))
