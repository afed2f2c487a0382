"""The smaller endpoints: embeddings, kept states, the tokenizer, models, health, metrics."""

import base64
import struct

import pytest
import torch

from deltamoe.engine import Engine
from deltamoe.errors import ConfigError
from deltamoe.inference import TextState
from deltamoe.model import KdaState, ModelState
from deltamoe.server import Settings
from deltamoe.server.errors import ApiError
from deltamoe.server.service import TokenNames
from deltamoe.server.shelf import StateShelf
from deltamoe.tokenizer import ByteTokenizer
from tests.server.serving import MODEL, Running


def test_an_embedding_is_the_last_hidden_state(server: Running, engine: Engine) -> None:
    answer = server.post("/v1/embeddings", {"input": ["hello", "world"]}).json
    with torch.inference_mode():
        hidden = engine.model.hidden(torch.tensor([[256, *b"world"]])).hidden[0, -1]
    expected = (hidden / hidden.norm()).tolist()
    # fp32, read in chunks here and in one pass there
    assert answer["data"][1]["embedding"] == pytest.approx(expected, abs=1e-5)
    assert answer["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    packed = server.post("/v1/embeddings", {"input": "world", "encoding_format": "base64"}).json
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert struct.unpack(f"<{len(expected)}f", raw) == pytest.approx(expected, abs=1e-5)


def test_embeddings_of_chosen_length_are_refused(server: Running) -> None:
    assert server.post("/v1/embeddings", {"input": "a", "dimensions": 4}).status == 400


def test_a_kept_state_is_gone_on_from(server: Running) -> None:
    document, question = "In the beginning was the word. ", "And then"
    kept = server.post("/v1/states", {"prompt": document, "name": "john"}).json
    assert kept["num_tokens"] == len(document) + 1
    assert kept["bytes"] > 0
    asked = {"max_tokens": 16, "temperature": 0}
    behind = server.post("/v1/completions", {"prompt": question, "state": kept["id"]} | asked)
    whole = server.post("/v1/completions", {"prompt": document + question} | asked)
    assert behind.json["choices"] == whole.json["choices"]
    assert behind.json["usage"]["prompt_tokens"] == len(question)
    listed = server.get("/v1/states").json["data"]
    assert kept in listed
    assert server.get(f"/v1/states/{kept['id']}").json == kept
    assert server.ask("DELETE", f"/v1/states/{kept['id']}").json["deleted"] is True
    gone = server.post("/v1/completions", {"prompt": question, "state": kept["id"]} | asked)
    assert gone.status == 404
    assert gone.json["error"]["code"] == "state_not_found"


def test_a_kept_conversation_is_gone_on_from(chat_server: Running) -> None:
    first = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    then = {"role": "user", "content": "and?"}
    asked = {"max_tokens": 8, "temperature": 0}
    kept = chat_server.post("/v1/states", {"messages": first}).json["id"]
    kept_path = "/v1/chat/completions"
    behind = chat_server.post(kept_path, {"messages": [then], "state": kept} | asked).json
    whole = chat_server.post(kept_path, {"messages": [*first, then]} | asked).json
    assert behind["choices"] == whole["choices"]


def text_of(num_bytes: int) -> TextState:
    memory = torch.zeros(num_bytes // 4)
    state = ModelState((KdaState(conv=torch.zeros(0), memory=memory),), torch.tensor([3]))
    assert state.nbytes == num_bytes + state.lengths.nbytes
    return TextState(state, ())


def test_the_shelf_drops_the_longest_unused() -> None:
    shelf = StateShelf(max_states=3, max_bytes=1000, offered={})
    one, two = shelf.keep("me", text_of(400), "one"), shelf.keep("me", text_of(400), "two")
    shelf.find("me", one.id)
    three = shelf.keep("you", text_of(400), "three")
    assert [kept.id for kept in shelf.of("me")] == [one.id]
    assert shelf.of("you") == [three]
    for scope, state_id in (("me", two.id), ("me", three.id), ("you", one.id)):
        with pytest.raises(ApiError) as refused:
            shelf.find(scope, state_id)
        assert refused.value.status == 404
    with pytest.raises(ApiError):
        shelf.keep("me", text_of(1000), "four")


def test_what_the_shelf_offers_everybody_stays() -> None:
    shelf = StateShelf(max_states=1, max_bytes=1000, offered={"law": text_of(4000)})
    kept = [shelf.keep("me", text_of(400), str(number)) for number in range(3)]
    assert [state.id for state in shelf.of("me")] == ["law", kept[-1].id]
    assert [state.id for state in shelf.of("you")] == ["law"]
    assert shelf.find("you", "law").state.nbytes > 4000
    assert shelf.nbytes == kept[-1].state.nbytes
    with pytest.raises(ApiError) as refused:
        shelf.drop("me", "law")
    assert refused.value.status == 403
    with pytest.raises(ConfigError, match="name"):
        StateShelf(max_states=1, max_bytes=1000, offered={"": text_of(400)})


def test_the_tokenizer_at_a_distance(server: Running) -> None:
    info = server.get("/tokenizer_info").json
    assert info["eos_token"] == info["bos_token"] == "<|end|>"
    assert info["vocab_size"] == 257
    ids = server.post("/tokenize", {"prompt": "é", "add_special_tokens": False}).json
    assert ids == {"tokens": [195, 169], "count": 2, "max_model_len": 512}
    assert server.post("/tokenize", {"prompt": "é"}).json["tokens"] == [256, 195, 169]
    assert server.post("/tokenize", {"prompt": "<|end|>"}).json["tokens"] == [256]
    within = {"prompt": "a<|end|>", "add_special_tokens": False}
    assert 256 not in server.post("/tokenize", within).json["tokens"]
    assert server.post("/detokenize", {"tokens": [256, 195, 169]}).json == {"prompt": "é"}
    assert server.post("/detokenize", {"tokens": [257]}).status == 400


def test_token_names_differ() -> None:
    names = TokenNames(ByteTokenizer())
    assert len({names.name(token_id) for token_id in range(257)}) == 257
    assert names.name(195) == "bytes:\\xc3"
    assert names.offsets([97, 195, 169, 98]) == [0, 1, 1, 2]


def test_models(server: Running) -> None:
    [card] = server.get("/v1/models").json["data"]
    assert card["id"] == MODEL
    assert server.get(f"/v1/models/{MODEL}").json == card
    other = server.get("/v1/models/gpt-9")
    assert other.status == 404
    assert other.json["error"]["code"] == "model_not_found"


def test_health_and_paths_that_are_not_there(server: Running) -> None:
    health = server.get("/health")
    assert health.status == 200
    assert health.json["status"] == "ok"
    assert server.get("/docs").json["error"]["message"] == "Not Found"
    assert server.get("/v1/completions").status == 405


def test_metrics_count(server: Running) -> None:
    def number(name: str) -> float:
        for line in server.get("/metrics").body.decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        raise AssertionError(f"no metric {name}")

    before = number("deltamoe_generated_tokens_total")
    finished = number("deltamoe_first_token_seconds_count")
    server.post("/v1/completions", {"prompt": "abc" * 20, "max_tokens": 7, "ignore_eos": True})
    assert number("deltamoe_generated_tokens_total") == before + 7
    assert number("deltamoe_first_token_seconds_count") == finished + 1
    assert number("deltamoe_sequences_running") == 0
    assert number('deltamoe_memory_bytes{kind="running"}') == 0
    assert number('deltamoe_expert_tokens_total{expert="0",layer="1"}') >= 0


def test_settings_that_are_refused() -> None:
    from deltamoe.errors import ConfigError

    for wrong in (
        {"host": "0.0.0.0"},
        {"host": "example.org"},
        {"port": 70_000},
        {"api_keys": ("short",)},
        {"allowed_origins": ("*",)},
    ):
        with pytest.raises(ConfigError):
            Settings(model_id="m", **wrong)
    Settings(model_id="m", host="0.0.0.0", api_keys=("long-enough",))
    Settings(model_id="m", host="::1")
