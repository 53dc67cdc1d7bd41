"""llama.cpp as a peer: reads a case a line from stdin, answers with its seconds on stdout.

It runs in a process, and if needed in an environment, of its own, so that its threads and ours do
not mix; it needs `llama-cpp-python` and nothing of this project.

    python llama_cpp_worker.py model.gguf
    {"start": 2}                            load on two threads and compute a token: {"seconds"}
    {"threads": 2, "sequences": 8, "context": 128, "tokens": 1, "repeats": 5}
    {"score": [1, 2, 3], "file": "x.npy"}   logits (tokens, vocabulary) into a file
    {"peak": true}                          most bytes this process ever had in memory
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import llama_cpp  # pyright: ignore[reportMissingImports]


def make_context(threads: int, sequences: int, context: int):
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = sequences * (context + 8)
    params.n_batch, params.n_ubatch = max(512, context), 512  # llama.cpp's own default
    params.n_seq_max = sequences
    params.n_threads = params.n_threads_batch = threads
    return llama_cpp.llama_init_from_model(model, params)


def feed(ctx, batch, sequences: int, start: int, tokens: int) -> None:
    """Append `tokens` to each of the sequences, in one call, with logits of each one's last."""
    batch.n_tokens = sequences * tokens
    for s in range(sequences):
        for i in range(tokens):
            j = s * tokens + i
            batch.token[j] = (31 * (start + i) + 7 * s) % 40_000 + 100
            batch.pos[j], batch.n_seq_id[j], batch.seq_id[j][0] = start + i, 1, s
            batch.logits[j] = i == tokens - 1
    if llama_cpp.llama_decode(ctx, batch):
        raise SystemExit("llama_decode failed")
    llama_cpp.llama_synchronize(ctx)


quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
llama_cpp.llama_backend_init()


def start(threads: int) -> float:
    """Load the model and compute one token -> seconds."""
    global model
    begin = time.perf_counter()
    model = llama_cpp.llama_model_load_from_file(
        sys.argv[1].encode(), llama_cpp.llama_model_default_params()
    )
    ctx, batch = make_context(threads, 1, 8), llama_cpp.llama_batch_init(8, 0, 1)
    feed(ctx, batch, 1, 0, 1)
    seconds = time.perf_counter() - begin
    llama_cpp.llama_free(ctx)
    return seconds


def score(tokens: list[int], file: str) -> None:
    import numpy as np

    n = len(tokens)
    ctx, batch = make_context(2, 1, n), llama_cpp.llama_batch_init(n, 0, 1)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
        batch.logits[i] = True
    batch.n_tokens = n
    if llama_cpp.llama_decode(ctx, batch):
        raise SystemExit("llama_decode failed")
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(ctx), (n, width))
    np.save(file, logits)
    llama_cpp.llama_free(ctx)


contexts: dict[tuple, tuple] = {}
for line in sys.stdin:
    case = json.loads(line)
    if "start" in case:
        print(json.dumps({"seconds": start(case["start"])}), flush=True)
        continue
    if "score" in case:
        score(case["score"], case["file"])
        print("{}", flush=True)
        continue
    if "peak" in case:
        peak = Path("/proc/self/status").read_text("utf-8").split("VmHWM:")[1].split()[0]
        print(json.dumps({"peak": 1024 * int(peak)}), flush=True)
        continue
    key = case["threads"], case["sequences"], case["context"], case["tokens"]
    threads, sequences, past, tokens = key
    is_new = key not in contexts
    if is_new:
        ctx = make_context(threads, sequences, past + tokens)
        batch = llama_cpp.llama_batch_init(max(512, sequences, tokens), 0, 1)
        contexts[key] = ctx, batch, llama_cpp.llama_get_memory(ctx)
        for s in range(sequences):  # one after the other: a prompt fits a batch, all need not
            if past:
                for i in range(past):
                    batch.token[i] = (31 * i + 7 * s) % 40_000 + 100
                    batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = i, 1, s
                    batch.logits[i] = False
                batch.n_tokens = past
                llama_cpp.llama_decode(ctx, batch)
    ctx, batch, memory = contexts[key]
    seconds, cpu_seconds = [], []
    for _ in range(case["repeats"] + is_new):  # the first one warms up
        wall, cpu = time.perf_counter(), time.process_time()
        feed(ctx, batch, sequences, past, tokens)
        seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
        for s in range(sequences):
            llama_cpp.llama_memory_seq_rm(memory, s, past, -1)
    print(
        json.dumps({"seconds": seconds[is_new:], "cpu_seconds": cpu_seconds[is_new:]}), flush=True
    )
