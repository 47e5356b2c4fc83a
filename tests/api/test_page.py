"""The chat page at /, in a real browser: what is asked, what is kept of a failure, keys, settings, Markdown."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.api_server import ApiServer
from tests.api.browser import Browser, Page, running_browser
from tests.api.byte_model import TURN, ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput, Submission

LAST = "document.querySelector('#conversation').lastElementChild"


class Chat:
    """The page, and the engine behind it, which answers when a test says so."""

    def __init__(self, page: Page, api: ApiServer, model: ByteModel):
        self.page, self.api, self.model = page, api, model

    def ask(self, text: str) -> Submission:
        """Asks as a user does; returns what arrives at the engine."""
        self.page.type(text)
        self.page.press_enter()
        return self.api.engine.next_submission()

    def say(self, submission: Submission, text: str, finish: str | None = None) -> None:
        """Sends the next piece of an answer and waits until it is shown."""
        end = [self.model.end] if finish == "stop" else []
        self.api.engine.send_outputs(submission, ScriptedOutput(self.model.tokens(text) + end, finish=finish))
        if finish:
            self.wait_until_idle()
        else:
            self.page.wait_for(f"{LAST}.innerText.includes({json.dumps(text)})")

    def answer(self, question: str, text: str, finish: str = "stop") -> Submission:
        """Asks, and answers at once."""
        submission = self.ask(question)
        self.say(submission, text, finish)
        return submission

    def prompt(self, submission: Submission) -> list[str]:
        """Returns the turns of a prompt, without the one that the model shall write."""
        text = self.model.tokenizer.decode(submission.prompt, skip_special_tokens=False)
        return text.split(TURN)[1:-1]

    def wait_until_idle(self) -> None:
        self.page.wait_for("document.querySelector('#stop').hidden")

    def html(self) -> str:
        """Returns the markup of the last answer."""
        markup: str = self.page.evaluate(f"{LAST}.querySelector('.content').innerHTML")
        return markup


@pytest.fixture(scope="module")
def api(byte_model: ByteModel) -> Iterator[ApiServer]:
    with ApiServer(byte_model) as api:
        yield api


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def chat(browser: Browser, api: ApiServer, byte_model: ByteModel) -> Iterator[Chat]:
    api.write_gang_status()
    page = browser.open(api.url)
    page.wait_for("document.querySelector('#model').textContent")
    yield Chat(page, api, byte_model)
    page.close()
    assert not page.errors
    assert all(url.startswith((api.url, "data:")) for url in page.requested), page.requested
    assert api.engine.num_pending_submissions == 0


# What is asked


def test_a_conversation_is_sent_whole(chat: Chat) -> None:
    chat.answer("one", "first")
    second = chat.answer("two", "second")
    assert chat.prompt(second) == ["user:one", "assistant:first", "user:two"]
    assert chat.page.text(".message") == ["one", "first", "two", "second"]


def test_a_refused_question_is_not_kept(chat: Chat) -> None:
    """An over-long message is refused with the conversation it belongs to, so it must not become part of it."""
    chat.answer("one", "first")
    chat.page.type("long " * 1000)
    chat.page.press_enter()
    chat.page.wait_for("!!document.querySelector('.failed')")
    assert "2048" in chat.page.text(".assistant.failed")[0]
    assert chat.page.evaluate("document.querySelector('#text').value.length") == 4999  # to be made shorter
    assert chat.prompt(chat.answer("two", "second")) == ["user:one", "assistant:first", "user:two"]


def test_a_new_chat_forgets_the_old_one(chat: Chat) -> None:
    chat.answer("one", "first")
    chat.page.click("#new")
    assert chat.page.text(".message") == []
    assert chat.prompt(chat.answer("two", "second")) == ["user:two"]


def test_a_new_chat_stops_the_answer(chat: Chat) -> None:
    submission = chat.ask("one")
    chat.say(submission, "fir")
    chat.page.click("#new")
    assert chat.api.engine.next_abort() == submission.id
    assert chat.prompt(chat.answer("two", "second")) == ["user:two"]
    assert chat.page.text(".message") == ["two", "second"]


def test_a_key_is_asked_for(browser: Browser, start_api: StartApi, byte_model: ByteModel) -> None:
    api = start_api(api_key="secret")
    api.write_gang_status()
    page = browser.open(api.url)
    page.type("one")
    page.press_enter()
    page.wait_for("!document.querySelector('#login').hidden && !!document.querySelector('.failed')")
    page.type("secret", "#key")
    page.press_enter()
    page.wait_for("document.querySelector('#login').hidden")
    page.evaluate("document.querySelector('#text').focus()")
    page.press_enter()  # the question is still there
    chat = Chat(page, api, byte_model)
    submission = api.engine.next_submission()
    chat.say(submission, "first", "stop")
    assert chat.prompt(submission) == ["user:one"]
    page.close()


# Enter


def test_enter_during_an_answer_sends_the_question_after_it(chat: Chat) -> None:
    submission = chat.ask("one")
    chat.say(submission, "fir")
    chat.page.type("two")
    chat.page.press_enter()
    chat.page.wait_for("document.querySelector('#notice').textContent.includes('after this answer')")
    assert chat.page.evaluate("document.querySelector('#text').value") == "two"
    chat.api.engine.send_outputs(submission, ScriptedOutput([*chat.model.tokens("st"), chat.model.end], finish="stop"))
    second = chat.api.engine.next_submission()
    assert chat.prompt(second) == ["user:one", "assistant:first", "user:two"]
    assert chat.api.engine.num_pending_aborts == 0
    chat.say(second, "second", "stop")
    assert not chat.page.text("#notice")[0]


def test_stop_keeps_what_was_said(chat: Chat) -> None:
    submission = chat.ask("one")
    chat.say(submission, "fir")
    chat.page.click("#stop")
    assert chat.api.engine.next_abort() == submission.id
    chat.wait_until_idle()
    assert "stopped" in chat.page.text(".note")[-1]
    assert chat.prompt(chat.answer("two", "second")) == ["user:one", "assistant:fir", "user:two"]


def test_enter_of_an_input_method_does_not_send(chat: Chat) -> None:
    """Enter and the space bar choose a candidate while Chinese, Japanese or Korean text is composed."""
    chat.page.evaluate("document.querySelector('#text').focus()")
    chat.page.call("Input.imeSetComposition", text="nihao", selectionStart=5, selectionEnd=5)
    chat.page.press_enter(composing=True)
    chat.page.evaluate(
        "document.querySelector('#text').dispatchEvent("
        "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, cancelable: true, bubbles: true }))"
    )
    assert chat.page.text(".message") == []
    chat.page.call("Input.insertText", text="你好")
    chat.page.press_enter()
    submission = chat.api.engine.next_submission()
    assert chat.prompt(submission) == ["user:你好"]
    chat.say(submission, "好", "stop")


def test_shift_and_enter_make_a_line(chat: Chat) -> None:
    chat.page.type("one")
    key: dict[str, Any] = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 8}
    chat.page.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
    chat.page.call("Input.insertText", text="two")
    chat.page.press_enter()
    submission = chat.api.engine.next_submission()
    assert chat.prompt(submission) == ["user:one\ntwo"]
    chat.say(submission, "both", "stop")


# Settings, and how an answer ended


def test_temperature_and_max_tokens_are_sent(chat: Chat) -> None:
    params = chat.answer("one", "first").params
    assert params["temperature"] != 0.25
    assert params["max_tokens"] > 1000
    chat.page.type("0.25", "#temperature")
    chat.page.type("7", "#max_tokens")
    params = chat.answer("two", "second").params
    assert (params["temperature"], params["max_tokens"]) == (0.25, 7)


def test_an_answer_that_was_cut_is_marked(chat: Chat) -> None:
    chat.answer("one", "first", "stop")
    assert chat.page.text(".note") == []
    chat.answer("two", "seco", "length")
    assert "max_tokens" in chat.page.text(".note")[-1]


def test_a_lost_engine_is_shown_with_what_was_said(chat: Chat) -> None:
    submission = chat.ask("one")
    chat.say(submission, "fir")
    failed = ScriptedOutput([], finish="error", error="the model failed")
    chat.api.engine.send_outputs(submission, failed)
    chat.wait_until_idle()
    assert "fir" in chat.page.text(".failed")[-1]
    assert "the model failed" in chat.page.text(".note")[-1]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_folded(chat: Chat, name: str) -> None:
    fake_stream(chat.page, {name: "First, "}, {name: "think."}, {"content": "An answer."})
    chat.page.type("one")
    chat.page.press_enter()
    chat.page.wait_for(f"{LAST}.innerText.includes('An answer.')")
    chat.wait_until_idle()
    assert "think" not in chat.page.text(".assistant")[-1]
    chat.page.click("summary")
    assert "First, think." in chat.page.text("details")[-1]


def test_tool_calls_are_shown(chat: Chat) -> None:
    first = {"index": 0, "id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": '}}
    other = {"index": 1, "id": "b", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    rest = {"index": 0, "function": {"arguments": '"Ulm"}'}}
    fake_stream(chat.page, {"content": "I look."}, *({"tool_calls": [call]} for call in (first, other, rest)))
    chat.page.type("one")
    chat.page.press_enter()
    chat.page.wait_for(f"{LAST}.innerText.includes('Ulm')")
    chat.wait_until_idle()
    assert chat.page.text(".call") == ['weather({"city": "Ulm"})', "time({})"]


def fake_stream(page: Page, *deltas: dict[str, Any]) -> None:
    """Replaces the answers of the API by a stream of these deltas."""
    pairs: list[tuple[dict[str, Any], str | None]] = [*((delta, None) for delta in deltas), ({}, "stop")]
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} for delta, finish in pairs]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.evaluate(f"window.fetch = async () => new Response({json.dumps(body)})")


# Markdown

MARKDOWN = {
    "plain": ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    "heading": ("## A *b*\ntext", "<h2>A <em>b</em></h2><p>text</p>"),
    "no heading": ("#hashtag", "<p>#hashtag</p>"),
    "emphasis": ("a **b *c* d** e", "<p>a <strong>b <em>c</em> d</strong> e</p>"),
    "unclosed": ("a **b `c", "<p>a **b `c</p>"),
    "products": ("2 * 3 * 4, snake_case_name", "<p>2 * 3 * 4, snake_case_name</p>"),
    "Chinese": ("这是**“重点”**。", "<p>这是<strong>“重点”</strong>。</p>"),
    "escaped": (r"\*a\* \(x\)", r"<p>*a* \(x\)</p>"),
    "inline code": ("`a**b**` ``c`d``", "<p><code>a**b**</code> <code>c`d</code></p>"),
    "fence": ("```py\na = '<b>'\n\n# x\n```\nb", "<pre><code>a = '&lt;b&gt;'\n\n# x</code></pre><p>b</p>"),
    "fence of a fence": ("````\n```\nx\n```\n````", "<pre><code>```\nx\n```</code></pre>"),
    "open fence": ("~~~\n```\nx", "<pre><code>```\nx</code></pre>"),
    "list": ("a\n- b\n- c\n  d\n\ne", "<p>a</p><ul><li><p>b</p></li><li><p>c\nd</p></li></ul><p>e</p>"),
    "numbers": (
        "3. a\n   - b\n\n   ```\n   c\n   ```\n4. d",
        '<ol start="3"><li><p>a</p><ul><li><p>b</p></li></ul><pre><code>c</code></pre></li><li><p>d</p></li></ol>',
    ),
    "quote": ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li><p>b</p></li></ul></blockquote><p>c</p>"),
    "rule": ("a\n\n---\nb", "<p>a</p><hr><p>b</p>"),
    "link": (
        "[a **b**](https://c.example/d?e=1) https://f.example/.",
        '<p><a href="https://c.example/d?e=1" target="_blank" rel="noopener noreferrer">a <strong>b</strong></a> '
        '<a href="https://f.example/" target="_blank" rel="noopener noreferrer">https://f.example/</a>.</p>',
    ),
    "link of another scheme": (
        "[a](javascript:alert(1)) [b](data:text/html,c)",
        "<p>[a](javascript:alert(1)) [b](data:text/html,c)</p>",
    ),
    "HTML": ('<img src=x onerror="x">', '<p>&lt;img src=x onerror="x"&gt;</p>'),
}


@pytest.mark.parametrize("name", MARKDOWN)
def test_markdown(chat: Chat, name: str) -> None:
    """The same elements whether the answer arrives at once or character by character."""
    text, html = MARKDOWN[name]
    chat.answer("at once", text)
    assert chat.html() == html
    submission = chat.ask("streamed")
    chat.api.engine.send_outputs(submission, *(ScriptedOutput([token]) for token in chat.model.tokens(text)))
    chat.say(submission, "", "stop")
    assert chat.html() == html


HOSTILE = ("`" * 4, "**a", "[", "[a](https://", "> ", "- ", "  - a\n", "_a_*", "# ", "```\n", "\\", "<b", "1. ")


@pytest.mark.parametrize("unit", HOSTILE)
def test_a_model_that_repeats_itself_does_not_freeze_the_page(chat: Chat, unit: str) -> None:
    """100,000 characters: neither a deep recursion nor time that grows with the square of their number."""
    fake_stream(chat.page, {"content": unit * (100_000 // len(unit))})
    chat.page.type("one")
    chat.page.press_enter()
    chat.page.wait_for(f"{LAST}.querySelector('.content').hasChildNodes()")
    chat.wait_until_idle()


def test_markup_of_a_model_runs_nothing(chat: Chat) -> None:
    """Even if it became elements: the policy lets only the page's own script run."""
    image = "<img src=data:, onerror='window.hacked = true'>"
    chat.answer("one", image)
    assert image in chat.page.text(".content")[-1]
    chat.page.evaluate(f'document.body.insertAdjacentHTML("beforeend", "{image}")')
    chat.page.wait_for("[...document.images].every(image => image.complete)")
    assert chat.page.evaluate("window.hacked") is None
    assert ["script" in error for error in chat.page.errors] == [True]
    chat.page.errors.clear()
