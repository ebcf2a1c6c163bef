"""The chat page, in a real browser."""

import asyncio
import os
import shutil
import urllib.request

import pytest

from expertoken.inference.server import Settings, create_app, streaming
from expertoken.modeling.experts import Expert
from expertoken.tests.inference.conftest import composite_of, mock_expert, served

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium, or set $CHROMIUM)"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def url(base_folder, words):
    composite = composite_of(base_folder, [*words, Expert("self", "self")])
    with served(create_app(composite, Settings(name="comp", max_new_tokens=16))) as address:
        yield address


@pytest.fixture
def page(browser, url):
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    opened = context.new_page()
    opened.asked = []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("pageerror", lambda error: pytest.fail(str(error)))
    opened.goto(url)
    yield opened
    context.close()


def say(page, text):
    count = page.locator("article.assistant").count()
    page.fill("#text", text)
    page.press("#text", "Enter")
    answer = page.locator("article.assistant").nth(count)
    answer.and_(page.locator(":not(.waiting)")).wait_for()
    return answer


def ask_again(answer, name):
    answer.locator("select").select_option(name)
    answer.locator(".again button").click()


def picture(page, name):
    """Save a screenshot of the page if `$SCREENSHOTS` names a folder."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def test_a_person_types_reads_the_answer_and_who_gave_it(page):
    answer = say(page, "hello")
    assert answer.locator(".text").inner_text() == "one0 one1 one2 one3 one4"
    assert answer.locator(".who").inner_text() == "one"
    assert "one 100 %" in answer.locator(".bar").get_attribute("aria-label")
    assert "$" in page.locator("#cost").inner_text()
    answer.locator(".why summary").click()
    picture(page, "desktop")
    assert "probability" in answer.locator(".reason").inner_text()


def test_the_chat_is_there_after_a_reload_and_gone_after_a_new_one(page):
    say(page, "hello")
    page.reload()
    assert page.locator("article.assistant .text").inner_text() == "one0 one1 one2 one3 one4"
    assert page.locator("article.assistant .who").inner_text() == "one"
    page.click("#reset")
    assert page.locator("article").count() == 0
    page.reload()
    assert page.locator("article").count() == 0


def test_another_expert_can_be_asked_again(page):
    answer = say(page, "hello")
    ask_again(answer, "two")
    page.locator("article.assistant:not(.waiting) .who", has_text="two").wait_for()
    assert page.locator("article.assistant .text").inner_text() == "two0 two1 two2 two3 two4"
    assert page.locator("article").count() == 2


def test_a_key_that_is_wrong_is_told_and_the_right_one_gets_in(browser, base_folder, words):
    settings = Settings(name="comp", api_keys=("a-key-of-enough-letters",))
    with served(create_app(composite_of(base_folder, words), settings)) as address:
        opened = browser.new_page()
        opened.goto(address)
        opened.locator("#login").wait_for()
        assert opened.locator("#refused").is_hidden()
        for key in ("wrong", "a-key-of-enough-letters"):
            opened.fill("#key", key)
            opened.click("#login button")
            if key == "wrong":
                opened.locator("#refused", has_text="The server did not accept this key").wait_for()
        opened.locator("#name", has_text="comp").wait_for()
        assert opened.locator("#login").is_hidden()
        opened.close()


def test_what_keeps_the_line_open_is_no_answer(browser, base_folder, monkeypatch):
    monkeypatch.setattr(streaming, "_SILENCE", 0.2)
    with (
        mock_expert("slow", "--first", "1") as (slow, _),
        served(create_app(composite_of(base_folder, [slow]))) as address,
    ):
        opened = browser.new_page()
        opened.goto(address)
        answer = say(opened, "hello")
        assert answer.locator(".text").inner_text() == "slow0 slow1 slow2 slow3 slow4"
        assert answer.locator(".mark").is_hidden()
        opened.close()


def test_an_answer_stays_where_asking_again_gives_none(page):
    answer = say(page, "hello two do: refuse")
    ask_again(answer, "two")
    page.locator("article.assistant .mark", has_text="asking again failed: no expert could answer").wait_for()
    assert page.locator("article.assistant .text").inner_text() == "one0 one1 one2 one3 one4"
    assert page.locator("article.assistant .who").inner_text() == "one"


def test_only_the_last_answer_can_be_asked_for_again(page):
    first = say(page, "hello")
    assert first.locator(".again").is_visible()
    second = say(page, "hello there")
    assert not first.locator(".again").is_visible()
    assert second.locator(".again").is_visible()


def test_what_somebody_else_left_in_the_browser_breaks_nothing(page):
    for odd in ('{"a": 1}', "[null]", '"abc"', "[{}]", "no json"):
        page.evaluate("text => localStorage.setItem('expertoken-chat-comp', text)", odd)
        page.reload()
        assert say(page, "hello").locator(".text").inner_text() == "one0 one1 one2 one3 one4"


def test_who_types_before_the_page_has_started_is_answered_behind_the_chat_that_was_kept(page):
    say(page, "hello")
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    page.fill("#text", "hello there")
    page.press("#text", "Enter")
    page.press("#text", "Enter")
    page.wait_for_timeout(200)
    assert len(held) == 1
    held[0].continue_()
    page.locator("article.assistant:not(.waiting)").nth(1).wait_for()
    assert page.locator("article.user .text").all_inner_texts() == ["hello", "hello there"]
    page.unroute_all()
    page.reload()
    page.locator("article").nth(3).wait_for()
    assert page.locator("article").count() == 4


def test_a_page_that_was_left_before_the_answer_came_offers_to_ask_again(page):
    page.evaluate("""localStorage.setItem('expertoken-chat-comp', '[{"role": "user", "content": "hello"}]')""")
    page.reload()
    page.locator("article.assistant .again button").click()
    page.locator("article.assistant .who", has_text="one").wait_for()
    assert page.locator("article").count() == 2


def test_no_page_of_elsewhere_can_put_it_into_a_frame(page, url):
    with urllib.request.urlopen(url) as response:
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]


def test_the_machinery_can_be_hidden_and_stays_so(page):
    answer = say(page, "hello")
    page.uncheck("#machinery")
    assert not answer.locator(".why").is_visible()
    assert not page.locator("#cost").is_visible()
    assert answer.locator(".text").is_visible()
    page.reload()
    assert not page.locator("article.assistant .why").is_visible()


def test_a_failure_is_told_only_where_it_is_asked_for(page):
    answer = say(page, "hello one do: refuse")
    assert answer.locator(".text").inner_text().startswith("two0")
    assert answer.locator(".who").inner_text() == "two"
    answer.locator(".why summary").click()
    assert "one failed: the endpoint answered 500" in answer.locator(".reason").inner_text()


def test_text_is_text_and_never_markup(page):
    page.fill("#text", "<img src=x onerror=alert(1)><b>hello</b>")
    page.press("#text", "Enter")
    page.locator("article.assistant:not(.waiting)").wait_for()
    assert page.locator("article.user .text").inner_text() == "<img src=x onerror=alert(1)><b>hello</b>"
    assert page.locator("article img").count() == 0


def test_nothing_is_loaded_from_elsewhere(page, url):
    say(page, "hello")
    assert page.asked
    assert all(asked.startswith(url) for asked in page.asked)


def test_on_a_phone_everything_is_within_its_width(browser, url):
    context = browser.new_context(viewport={"width": 360, "height": 640}, device_scale_factor=2)
    page = context.new_page()
    page.goto(url)
    answer = say(page, "hello")
    answer.locator(".why summary").click()
    say(page, "hello there")
    picture(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for part in ("#text", "#send", "#machinery", "#reset"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    context.close()


def test_an_error_of_a_chat_that_is_too_long_is_seen_with_what_to_do(browser, base_folder, words):
    settings = Settings(name="comp", max_prompt_tokens=50)
    context = browser.new_context(viewport={"width": 375, "height": 700}, color_scheme="dark")
    with served(create_app(composite_of(base_folder, words), settings)) as address:
        page = context.new_page()
        page.goto(address)
        answer = say(page, "many words " * 300)
        picture(page, "too-long")
        assert "Shorten it, or start a new chat" in answer.inner_text()
        lowest = page.locator("#ask").bounding_box()["y"]
        button = answer.locator(".again button").bounding_box()
        assert button["y"] + button["height"] <= lowest
    context.close()


def test_a_server_with_keys_asks_for_one(browser, base_folder, words):
    composite = composite_of(base_folder, words)
    with served(create_app(composite, Settings(name="comp", api_keys=("a-key-of-enough-letters",)))) as address:
        page = browser.new_page()
        page.goto(address)
        for wrong in ("wrong", "with a dash \u2013 pasted"):
            page.fill("#key", wrong)
            page.press("#key", "Enter")
            page.wait_for_timeout(500)
            assert page.locator("#login").is_visible()
            assert page.locator("#key").input_value() == ""
        page.press("#key", "Escape")
        page.locator("#empty", has_text="requires an API key").wait_for()
        assert not page.locator("#login").is_visible()
        page.reload()
        page.fill("#key", "a-key-of-enough-letters")
        page.press("#key", "Enter")
        page.locator("#name", has_text="comp").wait_for()
        assert say(page, "hello").locator(".who").inner_text() == "one"
        page.close()


def test_of_two_messages_before_the_start_one_is_sent_and_the_other_is_kept(page):
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    for text in ("hello", "hello there"):
        page.fill("#text", text)
        page.press("#text", "Enter")
    page.wait_for_timeout(200)
    held[0].continue_()
    page.locator("article.assistant:not(.waiting)").wait_for()
    assert page.locator("article.user .text").all_inner_texts() == ["hello"]
    assert page.locator("#text").input_value() == "hello there"


MARKDOWN = """# Title

A **word**, `code`, [a link](https://example.org) and ![a picture](https://example.org/x.png).

| a | b |
|---|---|
| 1 | 2 |

```python
print("<b>")
```

<script>alert(1)</script>
"""


@pytest.fixture
def speaking(browser, base_folder):
    """Return a function that opens a page on a composite whose expert streams these deltas."""
    from contextlib import ExitStack

    from starlette.applications import Starlette
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    from expertoken.tests.inference.mock_expert import chunk

    with ExitStack() as stack:

        def start(*deltas, width=1000, scheme="light"):
            seen = []

            async def answer(request):
                seen.append(await request.json())

                async def parts():
                    for delta in deltas:
                        yield chunk(delta)
                        await asyncio.sleep(0.3)
                    yield chunk({}, "stop")

                return StreamingResponse(parts(), media_type="text/event-stream")

            expert = stack.enter_context(
                served(Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])]))
            )
            composite = composite_of(base_folder, [Expert("one", "openai", "m", base_url=f"{expert}/v1")])
            address = stack.enter_context(served(create_app(composite, Settings(name="comp"))))
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
            context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
            stack.callback(context.close)
            page = context.new_page()
            page.seen = seen
            page.on("pageerror", lambda error: pytest.fail(str(error)))
            page.goto(address)
            return page

        yield start


@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (1000, "dark"), (375, "light")])
def test_markdown_is_shown_and_no_markup_of_the_answer_is(speaking, width, scheme):
    page = speaking({"content": MARKDOWN[:60]}, {"content": MARKDOWN[60:]}, width=width, scheme=scheme)
    text = say(page, "hello").locator(".text")
    text.locator("pre code").wait_for()
    assert text.locator("h1").inner_text() == "Title"
    assert text.locator("td").all_inner_texts() == ["1", "2"]
    assert text.locator("a").first.get_attribute("rel") == "noopener noreferrer"
    assert text.locator("pre code").inner_text().strip() == 'print("<b>")'
    assert text.locator("script, img").count() == 0
    assert "<script>alert(1)</script>" in text.inner_text()
    text.locator(".copy").click()
    text.locator(".copy", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").strip() == 'print("<b>")'
    picture(page, f"markdown-{width}-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.reload()
    page.locator("article.assistant h1").wait_for()


def test_thought_is_folded_away_once_the_answer_comes(speaking):
    page = speaking({"reasoning_content": "let me see"}, {"reasoning_content": ", yes"}, {"content": "It is 4."})
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    page.locator(".thought[open] div", has_text="let me see").wait_for()
    answer = page.locator("article.assistant:not(.waiting)")
    answer.wait_for()
    assert not answer.locator(".thought div").is_visible()
    answer.locator(".thought summary").click()
    picture(page, "thought")
    assert answer.locator(".thought div").inner_text() == "let me see, yes"
    assert answer.locator(".text").inner_text().strip() == "It is 4."


def test_a_system_prompt_goes_along_and_stays(speaking):
    page = speaking({"content": "yes"})
    page.locator("#instructions summary").click()
    page.fill("#system", "be brief")
    say(page, "hello")
    page.reload()
    say(page, "hello there")
    assert [body["messages"][0] for body in page.seen] == [{"role": "system", "content": "be brief"}] * 2


def test_a_question_can_be_asked_otherwise(page):
    first = say(page, "hello")
    say(page, "hello there")
    page.locator("article.user .edit").first.click()
    assert page.locator("#text").input_value() == "hello"
    assert page.locator("#editing").is_visible()
    page.press("#text", "Escape")
    assert page.locator("article").count() == 4
    page.locator("article.user .edit").first.click()
    page.fill("#text", "hello two do: refuse")
    page.press("#text", "Enter")
    page.locator("article.assistant:not(.waiting)").wait_for()
    assert page.locator("article.user .text").all_inner_texts() == ["hello two do: refuse"]
    assert first.locator(".text").inner_text() == "one0 one1 one2 one3 one4"


def test_two_tabs_have_a_chat_each(page, url):
    say(page, "hello")
    other = page.context.new_page()
    other.goto(url)
    other.locator("article.assistant").wait_for()
    say(other, "hello there")
    page.reload()
    assert page.locator("article.user .text").all_inner_texts() == ["hello"]
    other.reload()
    assert other.locator("article.user .text").all_inner_texts() == ["hello", "hello there"]


def test_what_had_come_of_an_answer_is_there_after_a_reload(speaking):
    page = speaking(*({"content": f"word{number} "} for number in range(30)))
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    page.locator("article.assistant .text", has_text="word6").wait_for()
    page.reload()
    answer = page.locator("article.assistant")
    assert answer.locator(".text").inner_text().startswith("word0 word1")
    assert answer.locator(".mark").inner_text() == "interrupted"
    answer.locator(".again button").click()
    page.locator("article.assistant.waiting").wait_for()


def test_the_seam_shows_where_another_expert_went_on(speaking):
    page = speaking({"content": "Hello"})
    say(page, "hello")
    page.evaluate("""() => {
      const turn = state.turns.at(-1);
      turn.content = "First part. Second part.";
      turn.told = { ...turn.told, expert: "math", handed_over: { expert: "math", after_characters: 12,
        probabilities: { math: 0.9 } } };
      return render(document.querySelector("article.assistant"), turn);
    }""")
    text = page.locator("article.assistant .text")
    text.locator(".seam", has_text="math continues").wait_for()
    picture(page, "seam")
    assert text.locator("div").all_inner_texts() == ["First part.", "Second part."]


def test_everything_is_reached_by_keys_and_has_a_name(page):
    say(page, "hello")
    unnamed = page.evaluate("""() => [...document.querySelectorAll("button, select, textarea, input, summary")]
      .filter((one) => one.checkVisibility())
      .filter((one) => !(one.textContent.trim() || one.ariaLabel || one.labels?.length)).length""")
    assert unnamed == 0
    page.locator("article.assistant summary").last.focus()
    page.keyboard.press("Enter")
    assert page.locator("article.assistant .reason").is_visible()


SIZES = "() => [...document.querySelectorAll('#waiting img')].map((i) => [i.naturalWidth, i.naturalHeight])"


def drawn(folder, name, size, kind="PNG"):
    image = pytest.importorskip("PIL.Image")
    image.effect_noise(size, 60).convert("RGB").save(folder / name, kind)
    return folder / name


def test_pictures_are_shrunken_shown_and_sent_with_the_question(page, words, tmp_path):
    wide, small = drawn(tmp_path, "wide.png", (3000, 1500)), drawn(tmp_path, "small.webp", (40, 30), "WEBP")
    page.set_input_files("#files", [wide, small])
    page.locator("#waiting img").nth(1).wait_for()
    assert page.evaluate(SIZES) == [[1024, 512], [40, 30]]
    page.locator("#waiting button").nth(1).click()
    assert page.locator("#waiting img").count() == 1
    with page.expect_request("**/v1/chat/completions") as asked:
        answer = say(page, "what is this?")
    assert answer.locator(".who").inner_text() == "one"
    assert page.locator("article.user .pictures img").count() == 1
    picture(page, "pictures")
    assert not page.locator("#waiting img").count()
    (part, text) = asked.value.post_data_json["messages"][-1]["content"]
    assert text == {"type": "text", "text": "what is this?"}
    assert part["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    page.reload()
    assert page.locator("article.user .pictures img").count() == 1
    page.locator("article.user .edit").click()
    assert page.locator("#waiting img").count() == 1


def test_pictures_are_pasted_and_dropped_and_what_is_none_is_told(page, tmp_path):
    drop = """([selector, kind, name, type, text]) => {
      const data = new DataTransfer();
      const canvas = new OffscreenCanvas(20, 10);
      canvas.getContext("2d").fillRect(0, 0, 5, 5);
      return canvas.convertToBlob().then((blob) => {
        data.items.add(new File([text ?? blob], name, { type }));
        const given = kind === "paste" ? { clipboardData: data } : { dataTransfer: data };
        const made = kind === "paste" ? ClipboardEvent : DragEvent;
        document.querySelector(selector).dispatchEvent(new made(kind, { bubbles: true, cancelable: true, ...given }));
      });
    }"""
    page.evaluate(drop, ["#text", "paste", "a.png", "image/png", None])
    page.locator("#waiting img").nth(0).wait_for()
    page.evaluate(drop, ["main", "drop", "b.png", "image/png", None])
    page.locator("#waiting img").nth(1).wait_for()
    page.evaluate(drop, ["main", "drop", "notes.txt", "text/plain", "no picture"])
    page.locator("#unseen:has-text('notes.txt')").wait_for()
    assert page.locator("#unseen").inner_text() == "notes.txt can't be read as a picture."
    assert page.locator("#waiting img").count() == 2
