#!/usr/bin/env bash
# From texts to a small model that was trained for FP8 and answers: all steps, one script.
#
#     recipes/nano.sh [OUT] [SIZE] [--set KEY=VALUE ...]
#
# SIZE is toy (minutes on two cores) or gpu (half an hour of one); settings go to both trainings.
#
# Texts are JSON lines of "text" in $TEXTS, by default what Python's own documentation brings along,
# which is enough to see everything run. Conversations are JSON lines of "messages" in $CHATS, by
# default synthetic ones with tools. Each step is skipped when its result is there.
set -euo pipefail
out=${1:-runs/nano} size=${2:-toy} here=$(dirname "$0")
settings=("${@:3}")
run() { echo "+ opennemo $*" >&2; "${OPENNEMO:-opennemo}" "$@"; }
[ "$size" = toy ] && vocab=2048 n_chats=3000 || { vocab=32768; n_chats=20000; }
mkdir -p "$out"

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
