#!/usr/bin/env bash
# From texts to a small model that was trained for FP8 and answers: all steps, one script.
#
#     recipes/nano.sh [OUT] [SIZE] [--set KEY=VALUE ...]
#
# SIZE is toy (minutes on two cores, to see all steps) or gpu (half an hour of a GPU, for a model
# that writes sentences); settings go to both trainings.
#
# Texts are JSON lines of "text" in $TEXTS, by default Python's own documentation, which is enough
# to see everything run. Conversations are JSON lines of "messages" in $CHATS, by default synthetic
# ones with tools. Each step is skipped when its result is there.
set -euo pipefail
out=${1:-runs/nano} size=${2:-toy} here=$(dirname "$0")
settings=("${@:3}")
run() { echo "+ opennemo $*" >&2; "${OPENNEMO:-opennemo}" "$@"; }
case $size in toy | gpu) ;; *) echo "SIZE is $size, allowed are toy and gpu" >&2; exit 2 ;; esac
[ "$size" = toy ] && vocab=2048 n_chats=3000 || { vocab=32768; n_chats=20000; }
mkdir -p "$out"
if [ "$size" = toy ]; then
    cat >&2 <<'TEXT'
The toy takes some ten minutes on two free cores. Its 1.2 M weights learn the form of answers and of calls of
tools, and little of what words mean: expect whole words, broken sentences, and calls of invented tools.
For a model that makes sense: `make chat`, or recipes/smollm2-lora.toml, which adapts one to data of yours.
TEXT
else
    cat >&2 <<'TEXT'
This takes about half an hour of one H100, and longer on other cards. 60 M weights learn from the texts that
TEXTS names, some 0.6 billion tokens of them; from Python's own documentation alone it learns that by heart.
TEXT
fi

if [ -z "${TEXTS:-}" ]; then
    TEXTS="$out/texts.jsonl"
    [ -e "$TEXTS" ] || "${PYTHON:-python3}" - > "$TEXTS.partial" <<'PYTHON' && mv "$TEXTS.partial" "$TEXTS"
import json, pydoc_data.topics as t
for text in t.topics.values():
    print(json.dumps({"text": text, "lang": "en", "source": "Python", "licence": "PSF-2.0"}))
PYTHON
fi
# Every twentieth text is held out.
[ -e "$out/valid.jsonl" ] || awk -v out="$out" \
    'NR % 20 {print > (out "/train.jsonl"); next} {print > (out "/valid.jsonl")}' "$TEXTS"

[ -e "$out/tokenizer/tekken.json" ] ||
    run tokenizer train "$out/train.jsonl" --vocab-size $vocab -o "$out/tokenizer"
for part in train valid; do
    run tokenize "$out/$part.jsonl" --tokenizer "$out/tokenizer" --out "$out/shards/$part"
done
run train "$here/nano-$size.toml" --out "$out/base" --set "model.tokenizer=$out/tokenizer" \
    --set "data.train=[{path='$out/shards/train'}]" --set "data.valid=[{path='$out/shards/valid'}]" \
    "${settings[@]}"

if [ -z "${CHATS:-}" ]; then
    CHATS="$out/chats.jsonl"
    [ -e "$CHATS" ] ||
        PYTHONPATH="$here/.." "${PYTHON:-python3}" -m recipes.tool_data "$CHATS" --n $n_chats
fi
run train "$here/nano-$size-instruct.toml" --out "$out/instruct" \
    --set "model.path=$out/base/model" --set "data.train=[{path='$CHATS'}]" \
    "${settings[@]}"
run plot "$out/base" "$out/instruct" -o "$out/curves.png"
echo "Is it raining in Paris?" | run chat "$out/instruct/fp8-static" --max-tokens 60
echo "To talk to it: opennemo chat $out/instruct/fp8-static" >&2
