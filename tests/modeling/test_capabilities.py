import pytest
import torch

from expertoken.modeling.backend import Generation
from expertoken.modeling.capabilities import Needs, unable, wants_tools
from expertoken.modeling.errors import ExpertokenError, PoolError
from expertoken.modeling.experts import Expert
from expertoken.modeling.policy import Chooser, Policy
from expertoken.modeling.pool import ExpertPool

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
PICTURE = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]


def remote(name, **more):
    return Expert(name, "openai", "m", base_url="http://127.0.0.1:9/v1", **more)


def needs(content="hi", tokens=0, **extra):
    return Needs.of([{"role": "user", "content": content}], Generation(extra=extra), tokens)


def test_a_request_needs_what_its_parameters_and_parts_say():
    assert needs().capabilities == set()
    assert needs(tools=[TOOL]).capabilities == {"tools"}
    assert needs(PICTURE).capabilities == {"images"}
    assert needs(response_format={"type": "json_schema", "json_schema": {}}).capabilities == {"json_schema"}
    assert needs(response_format={"type": "text"}).capabilities == set()


def test_tools_that_must_not_be_called_are_no_need():
    assert not wants_tools({"tools": [TOOL], "tool_choice": "none"})
    assert not wants_tools({"tools": []})


def test_an_endpoint_that_says_nothing_may_be_asked_for_anything():
    every = needs(PICTURE, 10**9, tools=[TOOL], response_format={"type": "json_object"})
    assert unable([remote("a")], every) == {}


def test_a_model_of_this_process_answers_in_text_unless_its_entry_says_more():
    local = [Expert("a", model="m"), Expert("b", model="m", supports=("tools",)), Expert("self", backend="self")]
    assert unable(local, needs(tools=[TOOL])) == {"a": "can't call tools", "self": "can't call tools"}
    assert set(unable(local, needs(PICTURE))) == {"a", "b", "self"}


def test_what_is_longer_than_a_context_is_not_for_it():
    experts = [remote("short", context_length=100), remote("long", context_length=1000)]
    assert list(unable(experts, needs(tokens=100))) == ["short"]
    assert unable(experts, needs(tokens=99)) == {}


def test_who_cannot_serve_a_request_is_neither_chosen_nor_asked_later():
    chooser = Chooser(ExpertPool([remote("a", supports=()), remote("b"), remote("c")]))
    logits = torch.tensor([3.0, 1.0, 2.0])
    found = chooser.choose(Policy(), logits, unable=unable(chooser.pool, needs(tools=[TOOL])))
    assert found.ranking == ("c", "b")
    assert "a can't call tools" in found.reason
    assert found.probabilities["a"] == max(found.probabilities.values())  # probabilities are reported unchanged


def test_where_nobody_can_it_is_said_who_lacks_what():
    chooser = Chooser(ExpertPool([remote("a", supports=()), remote("b", supports=())]))
    without = unable(chooser.pool, needs(PICTURE))
    with pytest.raises(ExpertokenError, match="no expert can serve this request: a can't read images; b can't"):
        chooser.candidates(Policy(), without)


def test_capabilities_survive_the_pool_file(tmp_path):
    pool = ExpertPool([remote("a", supports=("tools", "images"), context_length=8192, max_output_tokens=100)])
    pool.to_yaml(tmp_path / "pool.yaml")
    assert ExpertPool.from_yaml(tmp_path / "pool.yaml").experts == pool.experts


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"supports": ["tool"]}, r"supports: expected a list of tools, images, json_schema, got \['tool'\]"),
        ({"supports": "tools"}, "supports: expected a list"),
        ({"context_length": "8k"}, "context_length: expected a number of tokens above 0, got '8k'"),
        ({"max_output_tokens": 0}, "max_output_tokens: expected a number of tokens above 0"),
    ],
)
def test_mistakes_in_capabilities_are_named(entry, message):
    document = {"experts": [{"name": "a", "backend": "openai", "model": "m", **entry}]}
    with pytest.raises(PoolError, match=message):
        ExpertPool.parse(document)
