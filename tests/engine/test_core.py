"""However a request is run, the answer is the same.

On the decoder's path (fp32) to the last bit: rows do not touch one another, and what is read again
is read by the same steps. Where the steps differ, in fp64 within 1e-9: only the order of sums does.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from deltamoe.checkpoint import load_state, save_state
from deltamoe.engine import ContextTooLongError, EngineOptions, Request
from deltamoe.engine.core import Core
from deltamoe.errors import ConfigError, NonFiniteError
from deltamoe.inference import TextState
from deltamoe.model import KdaState
from deltamoe.testing import tiny_model
from tests.engine.harness import (
    COLD,
    MODELS,
    OPTIONS,
    TOKENIZER,
    answers,
    assert_empty,
    drain,
    everything,
    model_of,
    prompt,
    solo,
    submit,
    texts,
)

pytestmark = pytest.mark.usefixtures("unchecked")

TEXT = "The same text, however it is read."


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return model_of(kind)


@pytest.fixture
def expected(kind):
    """What every request is answered alone, with nothing kept."""
    return everything(cold(kind))


def mixed() -> list[Request]:
    """Lengths, rules and choices of every kind, over beginnings that are shared."""
    return [
        Request(prompt=prompt(TEXT), max_tokens=20),
        Request(prompt=prompt(TEXT[:20] + "!"), max_tokens=9, temperature=1.0, seed=1, n=3),
        Request(prompt=prompt("x"), max_tokens=30, temperature=0.7, top_k=9, seed=2),
        Request(prompt=prompt(TEXT + TEXT), max_tokens=5, num_logprobs=2),
        Request(prompt=prompt(""), max_tokens=12, temperature=1.3, top_p=0.8, seed=3),
        Request(prompt=prompt(TEXT[:21]), max_tokens=8, prompt_logprobs=1),
        Request(prompt=prompt(TEXT), max_tokens=0, prompt_logprobs=3),
        Request(prompt=prompt(TEXT[:9]), max_tokens=14, temperature=1.0, min_p=0.02, seed=4),
        Request(prompt=prompt(TEXT), max_tokens=16, repetition_penalty=1.3, presence_penalty=0.5),
        Request(prompt=prompt(TEXT), max_tokens=16, frequency_penalty=0.5, logit_bias={65: 4.0}),
    ]


@cache
def cold(kind, dtype=torch.float32):
    return solo(Core(model_of(kind, dtype), TOKENIZER, COLD), mixed())


def test_alone_is_together(kind, model, expected):
    core = Core(model, TOKENIZER, COLD)
    assert everything(answers(core, mixed())) == expected
    assert all(result.is_exact for result in cold(kind))
    assert_empty(core)


def test_requests_may_come_at_any_time(model, expected):
    core = Core(model, TOKENIZER, COLD)
    recorders = []
    for request in mixed():
        recorders.append(submit(core, request))
        core.step()
        core.step()
    drain(core)
    assert everything([recorder.result for recorder in recorders]) == expected


@pytest.mark.parametrize("cache_bytes", [0, 30_000, 10**6], ids=["rebuilt", "some", "put aside"])
def test_preempted_is_uninterrupted(model, expected, cache_bytes):
    core = Core(model, TOKENIZER, replace(OPTIONS, cache_bytes=cache_bytes, exact_reuse=True))
    recorders = [submit(core, request) for request in mixed()]
    for number in range(1, 10_000):
        if not core.has_work:
            break
        core.step()
        if number % 4 == 0 and number < 60:
            for at in range(0, len(core.scheduler.running), 2):
                core.preempt(core.scheduler.running[at // 2])
    assert everything([recorder.result for recorder in recorders]) == expected
    assert core.counters.num_preemptions > 5
    assert (core.counters.num_rebuilt > 0) == (cache_bytes < 10**6)
    assert_empty(core)


def test_too_few_pages_make_the_youngest_give_way():
    model = model_of("hybrid")
    size = Core(model, TOKENIZER, COLD).size
    few = 64 * size.slot_bytes + 40 * size.page_bytes
    core = Core(model, TOKENIZER, replace(COLD, state_bytes=few))
    assert everything(answers(core, mixed())) == everything(cold("hybrid"))
    assert core.counters.num_preemptions > 0
    assert_empty(core)


def test_exact_reuse_changes_no_bit(model, expected):
    core = Core(model, TOKENIZER, replace(OPTIONS, exact_reuse=True))
    for _ in range(2):
        results = answers(core, mixed())
        assert everything(results) == expected
        assert all(result.is_exact for result in results)
    assert core.counters.num_cached_tokens > 50
    assert_empty(core)


def test_reuse_changes_only_rounding(kind):
    model = model_of(kind, torch.float64)
    requests = [replace(request, num_logprobs=2) for request in mixed()[:5]]
    expected = solo(Core(model, TOKENIZER, COLD), requests)
    core = Core(model, TOKENIZER, OPTIONS)
    for _ in range(2):
        results = answers(core, requests)
        assert texts(results) == texts(expected)
        for result, cold in zip(results, expected, strict=True):
            for choice, other in zip(result.choices, cold.choices, strict=True):
                ours = torch.tensor([entry.logprob for entry in choice.logprobs])
                theirs = torch.tensor([entry.logprob for entry in other.logprobs])
                assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)  # fp64: the order of sums
    assert core.counters.num_cached_tokens > 50


@pytest.mark.parametrize("chunk", [3, 64])
def test_any_chunk_gives_the_same_answer(kind, chunk):
    model = model_of(kind, torch.float64)
    core = Core(model, TOKENIZER, replace(COLD, prefill_chunk=chunk, page_tokens=chunk))
    assert texts(answers(core, mixed()[:5])) == texts(cold(kind, torch.float64))[:5]


def test_the_answer_is_the_models():
    model = model_of("hybrid", torch.float64)
    [result] = answers(Core(model, TOKENIZER, COLD), [Request(prompt=prompt(TEXT), max_tokens=20)])
    ids = list(prompt(TEXT))
    with torch.inference_mode():
        for token_id in result.choices[0].ids:
            logits, _ = model(torch.tensor([ids]))
            assert token_id == int(logits[0, -1].argmax())
            ids.append(token_id)


def test_a_prompt_is_scored_as_the_model_scores_it():
    model = model_of("hybrid", torch.float64)
    request = Request(prompt=prompt(TEXT), max_tokens=0, prompt_logprobs=2)
    [result] = answers(Core(model, TOKENIZER, COLD), [request])
    with torch.inference_mode():
        logprobs = model(torch.tensor([request.prompt]))[0][0].log_softmax(-1)
    assert result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == len(request.prompt)
    for place, entry in enumerate(result.prompt_logprobs[1:], start=1):
        assert entry.id == request.prompt[place]
        row = logprobs[place - 1]
        assert entry.logprob == pytest.approx(float(row[entry.id]), abs=1e-9)
        assert [token_id for token_id, _ in entry.top] == row.topk(2).indices.tolist()


def test_scoring_is_not_fooled_by_what_is_kept():
    core = Core(model_of("hybrid"), TOKENIZER, OPTIONS)
    request = Request(prompt=prompt(TEXT), max_tokens=1, prompt_logprobs=0)
    first = solo(core, [replace(request, prompt_logprobs=None), request, request])
    assert first[1].num_cached_tokens == 0
    assert everything(first[1:2]) == everything(first[2:])


def test_an_embedding_is_the_last_hidden_state():
    model = model_of("hybrid", torch.float64)
    request = Request(prompt=prompt(TEXT), max_tokens=0, wants_embedding=True)
    with torch.inference_mode():
        expected = model.hidden(torch.tensor([request.prompt])).hidden[0, -1].float()
    core = Core(model, TOKENIZER, OPTIONS)
    for result in solo(core, [request, request]):
        assert torch.allclose(result.embedding, expected, atol=1e-6)  # fp32 of an fp64 vector
    assert result.num_cached_tokens == len(request.prompt) - 1
    assert_empty(core)


def test_a_state_from_a_file_goes_on(kind, tmp_path):
    model = model_of(kind, torch.float64)
    whole = Request(prompt=prompt(TEXT), max_tokens=20, temperature=1.0, seed=5)
    [expected] = answers(Core(model, TOKENIZER, COLD), [whole])
    core = Core(model, TOKENIZER, OPTIONS)
    head = Request(prompt=whole.prompt[:20], max_tokens=0, keep_state=True)
    [read] = answers(core, [head])
    text = read.choices[0].state
    assert text.unread == whole.prompt[19:20]
    save_state(tmp_path / "text", text.state, config=model.config)
    loaded = TextState(load_state(tmp_path / "text", config=model.config), text.unread)
    tail = replace(whole, prompt=whole.prompt[20:], state=loaded)
    results = solo(Core(model, TOKENIZER, OPTIONS), [tail])
    core = Core(model, TOKENIZER, OPTIONS)
    results += answers(core, [tail, tail, replace(tail, n=2)])
    for result in results:
        assert result.choices[0].ids == expected.choices[0].ids
    assert_empty(core)


def test_a_loaded_state_is_put_into_the_pool_once():
    model = model_of("hybrid")
    core = Core(model, TOKENIZER, OPTIONS)
    head = Request(prompt=prompt(TEXT), max_tokens=0, keep_state=True)
    text = solo(core, [head])[0].choices[0].state
    core.snapshots.clear()
    tail = Request(prompt=prompt("and so on")[1:], max_tokens=4, state=text)
    first = solo(core, [tail])
    held = core.pool.num_cached_pages
    results = answers(core, [tail] * 4)
    assert everything(results) == everything(first) * 4
    assert core.pool.num_cached_pages == held
    other = solo(Core(model, TOKENIZER, OPTIONS), [replace(tail, state=TextState(*text))])
    assert everything(other) == everything(first)


def test_an_answer_goes_on_from_its_state():
    model = model_of("hybrid")
    request = Request(prompt=prompt(TEXT), max_tokens=16, keep_state=True)
    core = Core(model, TOKENIZER, COLD)
    [whole] = answers(core, [request])
    [half] = answers(core, [replace(request, max_tokens=7)])
    state = half.choices[0].state
    assert state.unread == half.choices[0].ids[-1:]
    rest = Request(prompt=state.unread, state=TextState(state.state, ()), max_tokens=9)
    [result] = answers(core, [rest])
    assert half.choices[0].ids + result.choices[0].ids == whole.choices[0].ids


def test_choices_share_the_prompt():
    core = Core(model_of("hybrid"), TOKENIZER, OPTIONS)
    request = Request(prompt=prompt(TEXT), max_tokens=6, temperature=1.0, seed=7, n=4)
    [result] = answers(core, [request])
    assert core.counters.num_prompt_tokens == len(request.prompt) - 1
    assert [choice.index for choice in result.choices] == [0, 1, 2, 3]
    assert len({choice.ids for choice in result.choices}) == 4
    [first] = answers(core, [replace(request, n=1)])
    assert first.choices[0].ids == result.choices[0].ids


def test_a_second_turn_reads_only_what_is_new():
    core = Core(model_of("hybrid"), TOKENIZER, OPTIONS)
    first = Request(prompt=prompt(TEXT), max_tokens=10)
    [result] = answers(core, [first])
    second = Request(prompt=first.prompt + result.choices[0].ids + prompt("more")[1:], max_tokens=5)
    [result] = answers(core, [second])
    assert result.num_cached_tokens == len(first.prompt) + 9  # all but the last one drawn
    assert not result.is_exact


def test_where_two_texts_part_the_third_goes_on():
    core = Core(model_of("hybrid"), TOKENIZER, replace(OPTIONS, prefill_chunk=64))
    requests = [Request(prompt=prompt(TEXT + end), max_tokens=1) for end in ("aa", "bb", "cc")]
    results = solo(core, requests)
    common = len(prompt(TEXT))
    assert [result.num_cached_tokens for result in results] == [0, 0, common]
    assert [result.num_replayed_tokens for result in results] == [0, common, 0]


def test_who_waits_for_the_same_text_reads_it_once():
    core = Core(model_of("hybrid"), TOKENIZER, OPTIONS)
    request = Request(prompt=prompt(TEXT), max_tokens=3)
    results = answers(core, [request] * 8)
    assert core.counters.num_prompt_tokens == len(request.prompt) - 1
    assert everything(results) == everything(results[:1]) * 8


def test_prefixes_stay_within_their_scope():
    core = Core(model_of("hybrid"), TOKENIZER, OPTIONS)
    request = Request(prompt=prompt(TEXT), max_tokens=3, scope="one")
    cached = [
        result.num_cached_tokens
        for result in solo(
            core,
            [
                request,
                replace(request, scope="two"),
                replace(request, scope="one", reuse=False),
                request,
            ],
        )
    ]
    assert cached == [0, 0, 0, len(request.prompt) - 1]


def test_without_reuse_nothing_is_kept():
    core = Core(model_of("hybrid"), TOKENIZER, OPTIONS)
    answers(core, [Request(prompt=prompt(TEXT), max_tokens=3, reuse=False)])
    assert len(core.snapshots) == 0


def test_what_was_left_in_the_pool_is_never_read(model, expected):
    """A dead owner's NaN must not reach the next one: slots and pages are zeroed when given out."""
    core = Core(model, TOKENIZER, COLD)
    for layer in core.pool.state.layers:
        for part in layer:
            if isinstance(layer, KdaState):
                part.fill_(torch.nan)
            else:
                part[1:].fill_(torch.nan)  # page 0 is nobody's
    assert everything(answers(core, mixed())) == expected


def test_pieces_are_the_choice():
    core = Core(model_of("hybrid"), TOKENIZER, OPTIONS)
    request = Request(
        prompt=prompt(TEXT), max_tokens=9, temperature=1.0, seed=3, n=2, num_logprobs=1
    )
    recorder = submit(core, request)
    drain(core)
    for choice in recorder.result.choices:
        pieces = [piece for piece in recorder.pieces if piece.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert sum((piece.ids for piece in pieces), ()) == choice.ids
        assert sum((piece.logprobs for piece in pieces), ()) == choice.logprobs
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == choice.finish_reason == "length"
    assert len(choice.logprobs) == 9


def greedy_ids(number: int) -> tuple[int, ...]:
    core = Core(model_of("hybrid"), TOKENIZER, COLD)
    request = Request(prompt=prompt(TEXT), max_tokens=number, ignore_end=True)
    return answers(core, [request])[0].choices[0].ids


def test_a_stop_id_ends_a_choice():
    ids = greedy_ids(12)
    stop = ids[5]
    first = ids.index(stop)
    core = Core(model_of("hybrid"), TOKENIZER, COLD)
    request = Request(
        prompt=prompt(TEXT), max_tokens=12, stop_ids=(stop,), num_logprobs=1, keep_state=True
    )
    [choice] = answers(core, [request])[0].choices
    assert choice.ids == ids[:first]
    assert (choice.finish_reason, choice.matched_stop) == ("stop", stop)
    assert len(choice.logprobs) == first
    assert choice.state.unread == ()
    assert int(choice.state.state.lengths) == len(request.prompt) + first
    assert_empty(core)


def test_a_stop_string_ends_a_choice():
    text = TOKENIZER.decode(greedy_ids(30))
    stop = text[10:12]
    core = Core(model_of("hybrid"), TOKENIZER, COLD)
    [choice] = answers(core, [Request(prompt=prompt(TEXT), max_tokens=30, stop=(stop,))])[0].choices
    assert choice.text == text[: text.index(stop)]
    assert (choice.finish_reason, choice.matched_stop) == ("stop", stop)


def test_the_end_may_be_ignored():
    core = Core(model_of("hybrid"), TOKENIZER, COLD)
    bias = {TOKENIZER.end_id: 1000.0}
    request = Request(prompt=prompt(TEXT), max_tokens=5, logit_bias=bias)
    [choice] = answers(core, [request])[0].choices
    assert (choice.ids, choice.finish_reason) == ((), "end")
    [choice] = answers(core, [replace(request, ignore_end=True)])[0].choices
    assert (choice.ids, choice.finish_reason) == ((TOKENIZER.end_id,) * 5, "length")


def test_cancelling_leaves_nothing_behind(model, expected):
    for steps in (0, 1, 4, 9):
        core = Core(model, TOKENIZER, COLD)
        recorder = submit(core, mixed()[1])
        job = core.scheduler.waiting[0].job
        other = submit(core, mixed()[0])
        for _ in range(steps):
            core.step()
        core.cancel(job)
        assert recorder.is_done
        assert len(recorder.result.choices) == 3
        drain(core)
        assert everything([other.result]) == expected[:1]
        assert_empty(core)


def test_a_damaged_state_fails_its_request_alone():
    core = Core(model_of("hybrid"), TOKENIZER, OPTIONS)
    requests = mixed()[:1] * 3
    expected = everything(cold("hybrid"))[:1]
    recorders = [submit(core, replace(request, reuse=False)) for request in requests]
    while len(recorders[1].pieces) < 4:
        core.step()
    slot = core.scheduler.running[1].handle.slot
    core.pool.state.layers[0].memory[slot].fill_(torch.nan)
    drain(core)
    assert isinstance(recorders[1].error, NonFiniteError)
    assert everything([recorders[0].result]) == expected
    assert everything([recorders[2].result]) == expected
    assert core.counters.num_failed == 1
    assert_empty(core)


def test_the_state_of_another_model_is_refused():
    core = Core(model_of("hybrid"), TOKENIZER, OPTIONS)
    for kind in ("all kda", "all mla"):
        state = TextState(model_of(kind).initial_state(1), ())
        with pytest.raises(ConfigError, match="that this model has read"):
            core.prepare(Request(prompt=(1, 2), state=state))


def test_who_cannot_be_placed_fails_alone(monkeypatch):
    core = Core(model_of("hybrid"), TOKENIZER, OPTIONS)
    state = TextState(model_of("hybrid").initial_state(1), ())

    def refuse(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(core.pool, "write", refuse)
    broken = submit(core, Request(prompt=(1, 2), state=state))
    fine = submit(core, Request(prompt=(1,), max_tokens=1))
    drain(core)
    assert isinstance(broken.error, RuntimeError)
    assert fine.result is not None
    assert_empty(core)


def test_a_failing_chunk_fails_its_request_alone(monkeypatch):
    core = Core(model_of("hybrid"), TOKENIZER, COLD)
    bad, good = submit(core, mixed()[3]), submit(core, mixed()[0])
    prefill, calls = core.reader.prefill, []

    def failing(handle, ids, **how):
        calls.append(len(ids))
        if len(calls) == 2:
            raise MemoryError("no room for a chunk")
        return prefill(handle, ids, **how)

    monkeypatch.setattr(core.reader, "prefill", failing)
    drain(core)
    assert sum(recorder.error is not None for recorder in (bad, good)) == 1
    assert_empty(core)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"max_tokens": 10**6}, ContextTooLongError, "context is"),
        ({"prompt": (1, 257)}, ConfigError, "prompt: expected token ids from 0 to 256"),
        ({"stop_ids": (-1,)}, ConfigError, "stop_ids"),
        ({"logit_bias": {257: 1.0}}, ConfigError, "logit_bias"),
    ],
)
def test_what_cannot_be_answered_is_refused(change, error, words):
    core = Core(model_of("hybrid"), TOKENIZER, OPTIONS)
    with pytest.raises(error, match=words):
        core.prepare(replace(mixed()[0], **change))


def test_a_long_prompt_does_not_starve_the_writers():
    core = Core(model_of("hybrid"), TOKENIZER, COLD)
    writer = submit(core, mixed()[0])
    while not writer.pieces:
        core.step()
    submit(core, Request(prompt=prompt(TEXT * 4), max_tokens=1))
    before = len(writer.pieces)
    for _ in range(5):
        core.step()
    assert len(writer.pieces) == before + 5


@pytest.mark.parametrize("single_tokens", [5, 64])
def test_a_short_end_may_be_read_token_by_token(kind, single_tokens):
    """By other steps, so to rounding; and by these steps always the same, to the last bit."""
    options = replace(COLD, single_tokens=single_tokens)
    model = model_of(kind)
    expected = solo(Core(model, TOKENIZER, options), mixed())
    core = Core(model, TOKENIZER, options)
    assert everything(answers(core, mixed())) == everything(expected)
    assert all(result.is_exact for result in expected)
    read = sum(request.n * (len(request.prompt) - 1) for request in mixed())  # nothing is kept
    assert core.counters.num_prompt_tokens == read
    assert texts(expected) == texts(cold(kind))
    core = Core(model, TOKENIZER, replace(options, cache_bytes=10**6, exact_reuse=True))
    for _ in range(2):
        assert everything(answers(core, mixed())) == everything(expected)
    assert core.counters.num_cached_tokens > 50
    assert_empty(core)


def test_an_all_kda_conversation_needs_no_pages():
    core = Core(model_of("all kda"), TOKENIZER, EngineOptions(state_bytes=10**6, cache_bytes=0))
    assert core.size.page_bytes == 0
    assert core.size.context == 131_072


def test_bf16_is_the_same_together():
    model = tiny_model(torch.bfloat16)
    expected = everything(solo(Core(model, TOKENIZER, COLD), mixed()))
    assert everything(answers(Core(model, TOKENIZER, COLD), mixed())) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("single_tokens", [0, 8])
def test_every_token_visits_as_many_experts(dtype, single_tokens):
    model = model_of("hybrid", dtype)
    core = Core(model, TOKENIZER, replace(COLD, single_tokens=single_tokens))
    answers(core, [Request(prompt=prompt(TEXT[:at]), max_tokens=at) for at in (3, 20, 41)])
    counters = core.counters
    # the last token of an answer is drawn and not read; that of a prompt is read to draw the first
    num_read = counters.num_prompt_tokens + counters.num_generated_tokens
    per_token = model.config.moe.experts_per_token
    dense, *sparse = core.reader.expert_counts.sum(-1).tolist()
    assert dense == 0
    assert sparse == [num_read * per_token] * 3


def test_the_experts_of_decoded_tokens_are_those_the_model_chooses():
    model = model_of("hybrid")
    request = Request(prompt=prompt(TEXT), max_tokens=20, ignore_end=True)
    core = Core(model, TOKENIZER, COLD)
    [result] = answers(core, [request])
    ids = torch.tensor([[*request.prompt, *result.choices[0].ids[:-1]]])
    with torch.inference_mode():
        routings = model.hidden(ids).routings
    expected = [[0] * 5 if routing is None else routing.counts.tolist() for routing in routings]
    assert core.reader.expert_counts.tolist() == expected
