"""The harness over our engine: what it measures is what it measures over Hugging Face's model."""

from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from opennemo.engine import EngineConfig
from opennemo.errors import ContextTooLong
from opennemo.evals.benchmark_data import BenchmarkData
from opennemo.evals.benchmarks import TABLE1
from opennemo.evals.harness import OpenNemoLM
from opennemo.evals.tables import run_tasks
from opennemo.llm import LLM
from opennemo.tokenizer.chat import encode_chat

HF: Any = HFLM
SMALL = [b for b in TABLE1 if b.task in
         ("hellaswag", "winogrande", "nq_open", "commonsense_qa", "openbookqa")]  # fmt: skip


def test_scores_and_answers_are_those_of_the_hf_model(folder, llm, hub):
    ours, our_items = run_tasks(OpenNemoLM(llm), SMALL, BenchmarkData(hub), 4)
    theirs, their_items = run_tasks(
        HF(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4),
        SMALL,
        BenchmarkData(hub),
        4,
    )
    assert [row.n for row in ours] == [4] * len(SMALL)
    for a, b in zip(our_items, their_items, strict=True):
        assert (a["id"], a["prompt"], a["target"]) == (b["id"], b["prompt"], b["target"])
        if isinstance(a["answers"][0], str):
            assert a["answers"] == b["answers"]
            continue
        assert [x for x, _ in a["answers"]] == pytest.approx([x for x, _ in b["answers"]], abs=1e-3)
        assert [x for _, x in a["answers"]] == [x for _, x in b["answers"]]
    for a, b in zip(ours, theirs, strict=True):
        assert (a == b and {"pmi", "acc"} <= a.also.keys()) or a.name != "OpenBookQA"


def test_a_text_as_long_as_the_context_is_scored_whole(llm):
    text = "in the winter rivers run under ice " * 60  # more than one window
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (ours,) = OpenNemoLM(llm).loglikelihood_rolling([request])
    ids, start = llm.tokenizer.encode(text), [llm.tokenizer.bos_id]
    assert len(ids) > 1.5 * llm.engine.max_context
    first = llm.score([(start, ids[: llm.engine.max_context])])[0].logprob
    assert ours < first < 0


def test_requests_longer_than_the_context_are_cut_and_counted(folder, hub):
    with LLM.load(str(folder), config=EngineConfig(max_context=64)) as short:
        lm = OpenNemoLM(short)
        rows, _ = run_tasks(lm, SMALL[:1], BenchmarkData(hub), 4)
        assert rows[0].n == 4 and rows[0].trouble == {"cut to the model's context": 4}
        with pytest.raises(ContextTooLong):
            lm.loglikelihood([Instance("loglikelihood", {}, ("a", "b" * 90), 0)])


def test_a_laid_out_conversation_becomes_the_ids_of_the_layout(llm):
    talk = [{"role": "user", "content": "A<b>"}, {"role": "assistant", "content": "c"},
            {"role": "user", "content": "in winter"}]  # fmt: skip
    lm = OpenNemoLM(llm)
    before = lm.tok_encode("<|im_end|>")
    text = lm.apply_chat_template(talk)
    assert lm.tok_encode(text) == encode_chat(llm.tokenizer, talk)
    assert len(before) == 10  # until then the name of a control token is ten bytes


def test_the_model_is_registered_for_the_harness_command_line(folder):
    from lm_eval.api.registry import get_model

    made = get_model("opennemo").create_from_arg_string(
        f"pretrained={folder},dtype=float32", {"batch_size": 8, "device": "cpu"}
    )
    assert isinstance(made, OpenNemoLM) and made.max_length == 1024
    made.llm.close()
