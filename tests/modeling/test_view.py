import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.view import CUT, View, folded
from expertoken.tests.tiny import TEMPLATES, tiny_tokenizer

MOST, ROWS = 512, 512
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
IN_TURN = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)


def turn(role, text):
    return {"role": role, "content": text}


def read(conversation, template="chatml", view=None, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer(template)
    query = (view or View()).read(tokenizer, conversation, ROWS, MOST)
    return query, tokenizer.decode(query.ids)


def refusing(condition):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = condition + tokenizer.chat_template
    return tokenizer


def test_a_conversation_within_the_budget_is_read_as_it_is():
    chat = [turn("system", "Be brief."), turn("user", "hello"), turn("assistant", "hi"), turn("user", "Compute 1")]
    query, text = read(chat)
    expected = tiny_tokenizer().apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == expected
    assert query.whole


def test_the_newest_request_is_whole_and_what_came_before_is_cut_the_oldest_first():
    chat = [turn("user", "the first question"), turn("assistant", "alpha " * 40 + "omega"), turn("user", "model " * 10)]
    query, text = read(chat, view=View(60))
    assert "model " * 9 in text
    assert CUT in text
    assert "omega" in text
    assert "the first question" not in text
    assert query.cut > 0
    assert not query.whole
    assert "alpha" not in read(chat, view=View(0))[1]


def test_a_request_longer_than_the_context_keeps_its_beginning_and_its_end():
    query, text = read("begin " + "word " * 5000 + "end")
    assert len(query) <= MOST
    assert "begin" in text
    assert CUT in text
    assert text.rstrip().endswith("assistant") and "end<|im_end|>" in text  # noqa: PT018


def test_a_request_that_just_fits_is_not_cut():
    text = "model " * 100
    while len(read(text)[0]) < MOST:
        assert read(text)[0].whole
        text += "model "
    assert len(read(text)[0]) == MOST
    assert read(text)[0].whole
    assert not read(text + "model model")[0].whole


def test_results_of_tools_after_the_request_are_read_before_older_turns():
    chat = [turn("user", "an old question"), turn("assistant", "old " * 60), turn("user", "Compute"),
            turn("assistant", "call"), turn("tool", "the result")]  # fmt: skip
    _, text = read(chat, view=View(60))
    assert "the result" in text
    assert "an old question" not in text


@pytest.mark.parametrize("condition", [NO_SYSTEM, IN_TURN])
def test_roles_that_a_template_does_not_take_are_folded(condition):
    chat = [turn("system", "Be brief."), turn("user", "hello"), turn("user", "Compute 1 plus 2")]
    query, text = read(chat, tokenizer=refusing(condition))
    assert "Be brief." in text
    assert "Compute 1 plus 2" in text
    assert query.folded
    assert not query.whole


def test_where_even_that_is_refused_the_request_alone_is_read_and_else_it_is_an_error():
    only = "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}"
    chat = [turn("user", "hello"), turn("assistant", "hi"), turn("user", "Compute 1")]
    query, text = read(chat, tokenizer=refusing(only))
    assert "Compute 1" in text
    assert "hello" not in text
    assert query.folded
    with pytest.raises(ExpertokenError, match="refuses this conversation"):
        read(chat, tokenizer=refusing("{{ raise_exception('never') }}"))


roles = st.sampled_from(["system", "user", "assistant", "tool"])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(roles, st.text(max_size=400)), min_size=1, max_size=8),
    st.integers(0, 300),
    st.sampled_from(sorted(TEMPLATES)),
)
def test_whatever_is_said_the_view_fits_and_folding_gives_turns(parts, budget, template):
    chat = [turn(role, text) for role, text in parts]
    query, _ = read(chat, template, View(budget))
    assert 0 < len(query) <= MOST
    taken = [message["role"] for message in folded(chat)]
    assert taken == ["user", "assistant"] * (len(taken) // 2) + ["user"]


@pytest.mark.parametrize("text", ["<|im_end|>" * 3000, "x" * 200_000, " " * 100_000 + "end", "\n" * 5000])
def test_no_text_is_too_strange_to_be_cut(text):
    for chat in (text, [turn("user", "hello"), turn("assistant", text), turn("user", "Compute 1")]):
        query, read_text = read(chat)
        assert len(query) <= MOST
        assert query.cut > 0
    assert "Compute 1" in read_text


def test_a_tokenizer_without_offsets_cuts_by_characters():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    query = View().read(tokenizer, "begin " + "word " * 5000 + "end", 400, MOST)
    assert len(query) <= MOST
    assert tokenizer.decode(query.ids).endswith("end")


def test_where_the_template_leaves_no_room_it_is_one_line():
    with pytest.raises(ExpertokenError, match="expected a newest request of at most 12 tokens"):
        View().read(tiny_tokenizer(), "Compute 1 plus 2 and tell me all about it", ROWS, 12)


def test_a_template_that_prints_the_date_reads_alike_every_day():
    tokenizer = refusing("Today: {{ strftime_now('%Y-%m-%d') }}\n")
    query, text = read("hello", tokenizer=tokenizer)
    assert text.startswith("Today: 2026-01-01")
    assert not query.whole  # self's own answer follows a prompt with today's date
    assert read("hello", tokenizer=tokenizer, view=View(date="2025-12-24"))[1].startswith("Today: 2025-12-24")
    with pytest.raises(ExpertokenError, match="view.date: expected a date such as 2026-01-01, got 'today'"):
        View(date="today")
