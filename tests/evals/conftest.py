"""A tiny random model over bytes, as a folder, and a few questions laid out like the hub."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from opennemo.engine import EngineConfig
from opennemo.evals.rows import ResultRow
from opennemo.llm import LLM

SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the evaluation data are not in {SHARED}"
)
MARKED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_folder(path: Path, **changes: Any) -> Path:
    """A model in Hugging Face's layout, so that other implementations read it, too."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*MARKED, *alphabet, "ĠA", "in", "er"])}
    merges = [("Ġ", "A"), ("i", "n"), ("e", "r")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in MARKED])
    shape: dict[str, Any] = {
        "vocab_size": len(vocabulary), "hidden_size": 48, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "initializer_range": 0.2, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape | changes)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=MARKED[1], eos_token=MARKED[2], pad_token=MARKED[2],
        chat_template=CHAT,
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def llm(folder: Path) -> Iterator[LLM]:
    # Exact, as what it is compared with is.
    with LLM.load(str(folder), config=EngineConfig(kv_format="fp32")) as llm:
        yield llm


def row(values: list[float], **fields) -> ResultRow:
    return ResultRow(**{"name": "X", "items": {str(i): v for i, v in enumerate(values)}} | fields)


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def add_to_hub(root: Path, name: str, kind: str, lines: list[dict], *splits: str) -> None:
    """A configuration of a data set, the same lines in each split."""
    for split in splits:
        write_lines(root / name / kind / f"{split}.jsonl", lines)
    files = "".join(f"  - split: {s}\n    path: {kind}/{s}.jsonl\n" for s in splits)
    card = root / name / "README.md"
    text = card.read_text("utf-8").removesuffix("---\n") if card.exists() else "---\nconfigs:\n"
    card.write_text(f"{text}- config_name: {kind}\n  data_files:\n{files}---\n", "utf-8")


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Iterator[Path]:
    """Questions of our own in the shapes of the data sets that the harness asks for."""
    config = pytest.importorskip("datasets", reason="the extra `eval` is not installed").config
    root, cache = tmp_path_factory.mktemp("data") / "hub", config.HF_DATASETS_CACHE
    config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")

    add = partial(add_to_hub, root)
    places = ["a river", "the old bridge", "a quiet harbour", "some market stalls", "one tall tree"]
    add("Rowan/hellaswag", "default", [
        {"ind": i, "activity_label": "Walking", "ctx_a": f"A person walks towards {place}.",
         "ctx_b": "they", "ctx": "", "endings": [f"{verb} at {place}." for verb in
         ("look", "stop and wave", "sit down", "shout")], "label": str(i % 4)}
        for i, place in enumerate(places)
    ], "train", "validation")  # fmt: skip
    add("allenai/winogrande", "winogrande_xl", [
        {"sentence": f"The cup did not fit into {place} because _ was too big.",
         "option1": "the cup", "option2": place, "answer": "1"} for place in places
    ], "train", "validation")  # fmt: skip
    add("google-research-datasets/nq_open", "nq_open", [
        {"question": f"what stands near {place}", "answer": [place]} for place in places * 2
    ], "train", "validation")  # fmt: skip
    add("tau/commonsense_qa", "default", [
        {"id": str(i), "question": f"Where is {place}?", "question_concept": "place",
         "choices": {"label": list("ABCDE"), "text": places}, "answerKey": "ABCDE"[i]}
        for i, place in enumerate(places)
    ], "train", "validation")  # fmt: skip
    add("allenai/openbookqa", "main", [
        {"id": str(i), "question_stem": f"One sees {place} when",
         "choices": {"label": list("ABCD"), "text": ["it rains", "one looks", "asleep", "never"]},
         "answerKey": "B"} for i, place in enumerate(places)
    ], "train", "validation", "test")  # fmt: skip
    yield root
    config.HF_DATASETS_CACHE = cache


Answer = Callable[[dict], "str | int | dict"]  # a text, a status of HTTP, or fields of a message


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[dict]]]:
    """A server of chat completions that answers by `answer`; its address, and the bodies it got."""
    bodies: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "judge"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            bodies.append(body)
            said = answer(body)
            if isinstance(said, int):
                self._send(said, {"error": "as asked"})
                return
            fields = said if isinstance(said, dict) else {"content": said}
            self._send(200, {"choices": [{"message": {"role": "assistant", **fields}}]})

        def _send(self, status: int, value: dict) -> None:
            data = json.dumps(value).encode()
            try:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client had no patience
                pass

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", bodies
    finally:
        server.shutdown()
        server.server_close()
