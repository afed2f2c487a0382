"""The chat: a stream that can be stopped, edited, asked for again and left in the middle.

Most tests talk with a model whose answers are written down and as slow as the test wants; one talks
with the tiny model itself.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deltamoe.errors import ConfigError
from deltamoe.explorer import read_trace
from deltamoe.explorer.app import create_app
from deltamoe.explorer.live import Live
from deltamoe.explorer.requests import ChatRequest, TraceRequest
from tests.explorer.page.conftest import Server, show, start, until

NUM_READ = 7
SLOW_S = 0.03
LONG = [f"word{i} " for i in range(400)]  # at SLOW_S for each: longer than any test waits


class Scripted(Live):
    """The tiny model's page, with answers that are written down."""

    def __init__(self, opened: Any, form: str) -> None:
        super().__init__(opened, name=f"scripted-{form}")
        self.chat_form = form
        self.asked: list[ChatRequest] = []
        self.words = ["Well", ", ", "yes", "."]
        self.pace_s = 0.0
        self.fault = ""
        self.traced: TraceRequest | None = None
        self.was_left = threading.Event()

    def chat(self, request: ChatRequest, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        self.asked.append(request)
        words = self.words
        try:
            tell({"event": "start", "num_prompt_tokens": NUM_READ, "context": self.context})
            for num, word in enumerate(words, 1):
                if self.fault and num == len(words):
                    raise ConfigError(self.fault)
                time.sleep(self.pace_s)
                tell({"event": "piece", "text": word, "num_tokens": num, "tokens_per_s": 123.456})
        except ConfigError:
            raise
        except Exception:
            self.was_left.set()
            raise
        read = {"num_tokens": len(words), "num_prompt_tokens": NUM_READ}
        return {"finish_reason": "end", "tokens_per_s": 123.456, **read}

    def trace(self, request: TraceRequest, tell: Callable[[dict[str, Any]], None]) -> Any:
        self.traced = request  # the tiny model knows no turns: another text stands for them
        return super().trace(TraceRequest(prompt="turns", max_new_tokens=0), tell)


@pytest.fixture
def talker(opened_run: Any, request: pytest.FixtureRequest) -> Iterator[Scripted]:
    made = Scripted(opened_run, getattr(request, "param", "turns"))
    yield made
    made.close()


@pytest.fixture
def address(talker: Scripted) -> Iterator[str]:
    server = Server(create_app(model=talker))
    yield server.address
    server.stop()


def open_chat(page: Any, address: str) -> None:
    start(page, address, view="chat")
    page.wait_for_selector(".panel-body[data-view=chat][data-ready]")


def say(page: Any, words: str) -> None:
    page.fill(".chat-field", words)
    page.press(".chat-field", "Enter")


def wait_idle(page: Any) -> None:
    page.wait_for_selector(".chat-stop", state="hidden")


def texts(page: Any) -> list[str]:
    found: list[str] = page.locator(".turn-text").evaluate_all(
        "all => all.map(one => one.textContent)"
    )
    return found


def meter(page: Any, name: str) -> str:
    return str(page.locator(f"[data-meter={name}]").inner_text())


def test_an_answer_streams_into_the_page(page: Any, address: str, talker: Scripted) -> None:
    open_chat(page, address)
    talker.pace_s = SLOW_S
    talker.words = LONG[:40]
    say(page, "Is it so?")
    until(page, "document.querySelector('[data-meter=phase]').textContent.startsWith('writing')")
    assert 0 < len(texts(page)[1]) < len("".join(talker.words))
    wait_idle(page)
    assert texts(page) == ["Is it so?", "".join(talker.words)]
    assert talker.asked[0].messages == (("user", "Is it so?"),)
    until(page, "document.querySelector('[data-meter=phase]').textContent === 'idle'")
    assert meter(page, "rate") == "123.5 tokens/s"
    assert meter(page, "context") == f"{NUM_READ + 40} of {talker.context:,}"
    assert "40 tokens, 123.5 tokens/s; the model ended here" in page.inner_text(".turn-fate")


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_keeps_what_came_and_frees_the_model(
    page: Any, address: str, talker: Scripted, how: str
) -> None:
    open_chat(page, address)
    talker.pace_s, talker.words = SLOW_S, LONG
    say(page, "Go on")
    until(page, "document.querySelectorAll('.turn-text')[1]?.textContent.length > 30")
    if how == "button":
        page.click(".chat-stop")
    else:
        page.press(".chat-field", "Escape")
    wait_idle(page)
    assert talker.was_left.wait(timeout=5)
    kept = texts(page)[1]
    assert kept
    assert "".join(LONG).startswith(kept)
    assert page.inner_text(".turn-fate") == "stopped"
    assert page.locator(".broken").count() == 0
    talker.pace_s, talker.words = 0.0, ["ok"]
    say(page, "And now?")
    until(page, "document.querySelectorAll('.turn-text')[3]?.textContent === 'ok'")
    assert talker.asked[-1].messages[1] == ("assistant", kept)  # type: ignore[index]


def test_editing_a_turn_drops_what_followed(page: Any, address: str, talker: Scripted) -> None:
    open_chat(page, address)
    for words in ("one", "two"):
        say(page, words)
        wait_idle(page)
    assert len(texts(page)) == 4
    page.locator(".turn").first.hover()
    page.locator(".turn").first.get_by_role("button", name="Edit").click()
    page.fill(".turn-editor textarea", "three")
    page.click(".turn-editor .primary")
    until(page, "document.querySelectorAll('.turn').length === 2")
    wait_idle(page)
    assert texts(page) == ["three", "Well, yes."]
    assert talker.asked[-1].messages == (("user", "three"),)


def test_an_edit_can_be_given_up(page: Any, address: str, talker: Scripted) -> None:
    open_chat(page, address)
    say(page, "one")
    wait_idle(page)
    page.locator(".turn").first.get_by_role("button", name="Edit").click(force=True)
    page.fill(".turn-editor textarea", "other")
    page.press(".turn-editor textarea", "Escape")
    assert texts(page) == ["one", "Well, yes."]
    assert len(talker.asked) == 1


def test_regenerate_asks_the_same_again(page: Any, address: str, talker: Scripted) -> None:
    open_chat(page, address)
    say(page, "one")
    wait_idle(page)
    talker.words = ["No", "."]
    page.click(".chat-keys >> text=Regenerate")
    until(page, "document.querySelectorAll('.turn-text')[1]?.textContent === 'No.'")
    assert texts(page) == ["one", "No."]
    assert talker.asked[0].messages == talker.asked[1].messages


def test_a_reload_in_mid_stream_keeps_what_came(page: Any, address: str, talker: Scripted) -> None:
    open_chat(page, address)
    talker.pace_s, talker.words = SLOW_S, LONG
    say(page, "Go on")
    until(page, "document.querySelectorAll('.turn-text')[1]?.textContent.length > 40")
    before = texts(page)[1]
    page.reload()
    page.wait_for_selector(".panel-body[data-view=chat][data-ready]")
    assert talker.was_left.wait(timeout=5)
    question, kept = texts(page)
    assert question == "Go on"
    assert kept.startswith(before)
    assert "".join(LONG).startswith(kept)
    assert "interrupted" in page.inner_text(".turn-fate")
    talker.pace_s, talker.words = 0.0, ["ok"]
    page.click(".chat-keys >> text=Regenerate")
    until(page, "document.querySelectorAll('.turn-text')[1]?.textContent === 'ok'")


def test_a_stream_goes_on_behind_another_view(page: Any, address: str, talker: Scripted) -> None:
    open_chat(page, address)
    talker.pace_s, talker.words = SLOW_S, LONG[:40]
    say(page, "Go on")
    until(page, "document.querySelectorAll('.turn-text')[1]?.textContent.length > 5")
    page.click(".tab[data-view=runs]")
    page.wait_for_selector(".panel-body[data-view=runs]")
    time.sleep(0.3)
    show(page, "chat")
    wait_idle(page)
    assert texts(page)[1] == "".join(LONG[:40])
    assert len(talker.asked) == 1


def test_an_error_is_said_and_can_be_tried_again(page: Any, address: str, talker: Scripted) -> None:
    open_chat(page, address)
    talker.fault, talker.words = "the context is full", ["Half", "!"]
    say(page, "one")
    wait_idle(page)
    assert "the context is full" in page.inner_text(".broken")
    assert texts(page) == ["one", "Half"]
    assert page.inner_text(".turn-fate") == "broken off"
    talker.fault = ""
    page.click(".broken button")
    until(page, "document.querySelectorAll('.turn-text')[1]?.textContent === 'Half!'")
    assert page.locator(".broken").count() == 0
    assert talker.asked[-1].messages == (("user", "one"),)


def test_sampling_is_sent_as_it_stands(page: Any, address: str, talker: Scripted) -> None:
    open_chat(page, address)
    for name, value in {
        "max_tokens": "31",
        "temperature": "0.3",
        "seed": "5",
        "top_p": "2",
    }.items():
        page.fill(f"[name=chat-{name}]", value)
        page.press(f"[name=chat-{name}]", "Tab")
    say(page, "one")
    wait_idle(page)
    assert talker.asked[0].max_tokens == 31
    assert talker.asked[0].sampling == {"temperature": 0.3, "seed": 5}  # top_p = 2 is no share
    assert "is-wrong" in page.get_attribute("[name=chat-top_p]", "class")


def test_hostile_text_stays_text(page: Any, address: str, talker: Scripted) -> None:
    open_chat(page, address)
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    talker.words = [evil[:9], evil[9:]]
    say(page, evil)
    wait_idle(page)
    assert texts(page) == [evil, evil]
    assert page.locator(".chat-log img, .chat-log script").count() == 0
    assert "owned" not in page.title()


@pytest.mark.parametrize("talker", ["text"], indirect=True)
def test_a_model_without_turns_writes_on_one_text(
    page: Any, address: str, talker: Scripted
) -> None:
    open_chat(page, address)
    talker.words = [" was", " a cat"]
    say(page, "There")
    wait_idle(page)
    say(page, " that")
    wait_idle(page)
    assert [request.text for request in talker.asked] == ["There", "There was a cat that"]
    assert page.locator(".manuscript .part").evaluate_all(
        "all => all.map(p => p.dataset.role)"
    ) == [
        *("user", "assistant"),
        *("user", "assistant"),
    ]
    page.locator(".part").nth(1).click()
    page.fill(".turn-editor textarea", " were two dogs and")
    page.press(".turn-editor textarea", "Control+Enter")
    until(page, "document.querySelectorAll('.part').length === 3")
    wait_idle(page)
    assert talker.asked[-1].text == "There were two dogs and"
    assert page.locator(".manuscript .part").all_inner_texts() == [
        "There",
        " were two dogs and",
        " was a cat",
    ]


def test_the_conversation_is_traced(page: Any, server: Server) -> None:
    open_chat(page, server.address)
    page.fill("[name=chat-max_tokens]", "12")
    page.fill("[name=chat-temperature]", "0")
    page.press("[name=chat-temperature]", "Tab")
    say(page, "Once upon")
    wait_idle(page)
    text = "".join(page.locator(".part").evaluate_all("all => all.map(one => one.textContent)"))
    assert text.startswith("Once upon")
    assert len(text) > len("Once upon")
    page.click("text=Trace this conversation")
    page.wait_for_selector(".panel-body[data-view=sparse][data-ready]")
    trace = page.evaluate("new URLSearchParams(location.hash.slice(1)).get('trace')")
    summary = page.evaluate("id => fetch(`api/trace/${id}`).then(a => a.json())", trace)
    assert summary["prompt"] == text
    assert summary["num_tokens"] == summary["num_prompt_tokens"] == 1 + len(text.encode())


def test_turns_are_traced_as_messages(page: Any, address: str, talker: Scripted) -> None:
    open_chat(page, address)
    say(page, "one")
    wait_idle(page)
    page.click("text=Trace this conversation")
    page.wait_for_selector(".panel-body[data-view=sparse][data-ready]")
    assert talker.traced is not None
    assert talker.traced.messages == (("user", "one"), ("assistant", "Well, yes."))
    assert talker.traced.max_new_tokens == 0


def test_a_trace_file_cannot_answer(page: Any, trace_file: Any) -> None:
    server = Server(create_app(first=read_trace(trace_file)))
    try:
        open_chat(page, server.address)
        assert "a file cannot answer" in page.inner_text(".panel-body .empty")
    finally:
        server.stop()
