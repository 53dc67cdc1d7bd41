"""Make synthetic conversations with tools, in which every call was made and answered.

    python -m recipes.tool_data OUT [--n 1000] [--seed 0] [--split train] [--prompts]

Run it in the checkout, with the packages of `pip install -e '.[train]'`. The same seed makes the
same file. In the split `test` domains, functions and arguments are others than in `train`. There,
and with `--prompts`, each line ends with the message that a model's answer is compared with.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from recipes.tool_data.conversations import conversations


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.tool_data")
    parser.add_argument("output", type=Path, help="the file of JSON lines to write")
    parser.add_argument("--n", type=int, default=1000, help="conversations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--prompts", action="store_true", help="end with what is compared")
    args = parser.parse_args()
    if find_spec("jsonschema") is None:
        sys.exit("jsonschema is missing: calls are checked with it; pip install -e '.[train]'")
    try:
        with args.output.open("x", encoding="utf-8") as file:
            for row in conversations(args.split, args.n, args.seed, prompts=args.prompts):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        sys.exit(f"{args.output}: {error.strerror}")
    print(f"Wrote {args.output}: {args.n:,} conversations")


if __name__ == "__main__":
    main()
