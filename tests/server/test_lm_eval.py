"""``lm_eval`` over HTTP gives the scores it gives in the process."""

import json
from typing import Any

import pytest

from deltamoe.engine import Engine, EngineOptions
from deltamoe.engine import Request as EngineRequest
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer
from tests.server.serving import MODEL, running

# not ours: what lm_eval and what it loads warn of
pytestmark = pytest.mark.filterwarnings("ignore")

MIB = 1 << 20
STOP = "e"


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    pytest.importorskip("lm_eval")
    import lm_eval.models.openai_completions
    import lm_eval.tasks

    return lm_eval


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, lm_eval: Any) -> Any:
    """A task of likelihoods and one of writing, from local files."""
    folder = tmp_path_factory.mktemp("lm_eval")
    documents = [
        {
            "question": f"{a} plus {b} is",
            "answers": [f" {a + b}", f" {a - b}", " none é"],
            "right": 0,
        }
        for a in range(2, 6)
        for b in range(1, 3)
    ]
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder / "cache"),
        },
        "description": "Small sums, one after the other, with their answers.\n\n",
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    choice = common | {
        "task": "sums_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    written = common | {
        "task": "sums_written",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answers[0]}}",
        "generation_kwargs": {"until": [STOP, "\n\n"], "max_gen_toks": 24, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    }
    return [choice, written]


def engine_with(cache_bytes: int) -> Engine:
    options = EngineOptions(
        max_sequences=8,
        context=512,
        state_bytes=16 * MIB,
        cache_bytes=cache_bytes,
        prefill_chunk=16,  # so that beginnings as short as these are cut, and can be shared
    )
    return Engine(tiny_model(), ByteTokenizer(), options)


@pytest.fixture(scope="module")
def expected(lm_eval: Any, tasks: Any) -> Any:
    """The scores in the process."""
    return lm_eval.simple_evaluate(
        model=_in_process(), tasks=tasks, log_samples=True, bootstrap_iters=0
    )


@pytest.mark.parametrize(
    ("cache_bytes", "batch_size", "num_concurrent"),
    [(0, 4, 1), (8 * MIB, 1, 4)],
    ids=["no reuse, batches", "reuse, at once"],
)
def test_scores_are_those_of_the_process(
    lm_eval: Any,
    tasks: Any,
    expected: Any,
    cache_bytes: int,
    batch_size: int,
    num_concurrent: int,
) -> None:
    with engine_with(cache_bytes) as engine, running(engine) as server:
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": MODEL,
                "base_url": f"{server.url}/v1/completions",
                "num_concurrent": num_concurrent,
                "max_retries": 1,
                "max_length": 256,
            },
            batch_size=batch_size,
            tasks=tasks,
            log_samples=True,
            bootstrap_iters=0,
        )
        _compare(found, expected)
        num_cached = engine.stats().counters.num_cached_tokens
        assert (num_cached > 0) == (cache_bytes > 0)


def _compare(found: Any, expected: Any) -> None:
    for task in ("sums_choice", "sums_written"):
        ours = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        theirs = sorted(expected["samples"][task], key=lambda sample: sample["doc_id"])
        assert len(ours) == len(theirs) == 8
        for one, other in zip(ours, theirs, strict=True):
            for mine, its in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                if task == "sums_written":
                    assert mine == its
                else:
                    assert float(mine[0]) == pytest.approx(float(its[0]), abs=1e-4)
                    assert mine[1] == its[1]
        for name, value in expected["results"][task].items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, abs=1e-4)


def _in_process() -> Any:
    """The same model without an engine: one forward pass a document."""
    import torch
    from lm_eval.api.model import LM

    model, tokenizer = tiny_model(), ByteTokenizer()

    class InProcess(LM):
        def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            found = []
            for context, continuation in (request.args for request in requests):
                before, behind = tokenizer.encode(context), tokenizer.encode(continuation)
                with torch.inference_mode():
                    logits, _ = model(torch.tensor([before + behind]))
                logprobs = logits[0, len(before) - 1 : -1].log_softmax(-1)
                target = torch.tensor(behind)
                picked = logprobs.gather(1, target[:, None]).sum()
                found.append((float(picked), bool((logprobs.argmax(1) == target).all())))
            return found

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
            raise NotImplementedError

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            return [self._written(context) for context, _ in (r.args for r in requests)]

        def _written(self, context: str) -> str:
            with Engine(model, tokenizer, EngineOptions(max_sequences=1, cache_bytes=0)) as engine:
                request = EngineRequest(
                    prompt=tuple(tokenizer.encode(context)), max_tokens=24, stop=(STOP, "\n\n")
                )
                return engine.generate([request])[0].choices[0].text

    return InProcess()
