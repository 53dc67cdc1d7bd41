"""OpenVINO GenAI as a peer, as llama_cpp_worker.py: a case a line on stdin, its seconds on stdout.

It needs `openvino-genai` and nothing of this project, and reads the same Q8_0 file as llama.cpp.

    python openvino_worker.py model.gguf
    {"threads": 2, "sequences": 1, "context": 0, "tokens": 512, "repeats": 1}
"""

import itertools
import json
import sys
import time

import numpy as np
import openvino  # pyright: ignore[reportMissingImports]
import openvino_genai as genai  # pyright: ignore[reportMissingImports]

pipelines: dict[int, genai.LLMPipeline] = {}
numbers = itertools.count()  # other ids each time, since prompts are cached


def generate(threads: int, n_prompt: int, n_new: int) -> tuple[float, float]:
    """Seconds of clock and processor time for a prompt and this many tokens after it."""
    if threads not in pipelines:
        pipelines.clear()
        pipelines[threads] = genai.LLMPipeline(
            sys.argv[1], "CPU", INFERENCE_NUM_THREADS=threads, ATTENTION_BACKEND="SDPA"
        )
        generate(threads, 64, 2)
    ids = ((np.arange(n_prompt) * 31 + next(numbers) * 101) % 40_000 + 100)[None].astype(np.int64)
    inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    settings = genai.GenerationConfig()
    settings.max_new_tokens, settings.ignore_eos, settings.do_sample = n_new, True, False
    wall, cpu = time.perf_counter(), time.process_time()
    pipelines[threads].generate(inputs, settings)
    return time.perf_counter() - wall, time.process_time() - cpu


for line in sys.stdin:
    case = json.loads(line)
    threads, steps = case["threads"], case["repeats"]
    if case["context"]:  # a step of decoding is what each of several more tokens takes
        short = generate(threads, case["context"], 1)
        long = generate(threads, case["context"], 1 + steps)
        once = [(b - a) / steps for a, b in zip(short, long, strict=True)]
        times = [[seconds] for seconds in once]
    else:
        times = list(
            zip(*(generate(threads, case["tokens"], 1) for _ in range(steps)), strict=True)
        )
    print(json.dumps({"seconds": list(times[0]), "cpu_seconds": list(times[1])}), flush=True)
