"""Options of an endpoint in a pool entry (headers, weights, several addresses), tested with real servers."""

from collections import Counter

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from expertoken.inference.backends.addresses import Addresses
from expertoken.inference.backends.endpoint import EndpointBackend
from expertoken.inference.loop import BackgroundLoop
from expertoken.modeling.backend import Generation, Timeouts
from expertoken.modeling.consent import sendings
from expertoken.modeling.errors import ExpertFailedError, PoolError
from expertoken.modeling.experts import Expert
from expertoken.modeling.pool import ExpertPool
from expertoken.tests.inference.conftest import composite_of, mock_expert, served
from expertoken.tests.inference.mock_expert import chunk

HELLO = [{"role": "user", "content": "hello"}]


def entry(**more):
    return {"name": "one", "backend": "openai", "model": "m", **more}


def expert(**more):
    return ExpertPool.parse({"experts": [entry(**more)]}).experts[0]


def asked(backend, **options):
    async def text():
        return "".join([piece.text async for piece in backend.stream(HELLO, Generation(**options))])

    return BackgroundLoop.call(text())


@pytest.fixture
def recorded():
    """Run a server that records the headers and bodies of its requests. Yield its address and the record."""
    seen = []

    async def answer(request):
        seen.append((dict(request.headers), await request.json()))
        return StreamingResponse(iter([chunk({"content": "yes"}), chunk({}, "stop")]), media_type="text/event-stream")

    with served(Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])) as url:
        yield f"{url}/v1", seen


def test_headers_of_an_entry_reach_its_server(recorded):
    url, seen = recorded
    assert asked(EndpointBackend(expert(base_url=url, headers={"X-Title": "ours"}))) == "yes"
    assert seen[0][0]["x-title"] == "ours"


def test_requests_are_spread_over_the_addresses_by_weight():
    given = expert(addresses=[{"base_url": "http://a/v1", "weight": 3}, {"base_url": "http://b/v1"}])
    addresses = Addresses(given, "")
    counts = Counter(addresses.pick().url for _ in range(4000))
    assert counts["http://a/v1"] / 4000 == pytest.approx(0.75, abs=0.04)


def test_an_address_that_is_down_is_passed_over_for_another(recorded):
    url, seen = recorded
    down = "http://127.0.0.1:9/v1"
    backend = EndpointBackend(
        expert(addresses=[{"base_url": down, "weight": 1000}, {"base_url": url}]), Timeouts(retries=0)
    )
    for _ in range(5):
        assert asked(backend) == "yes"
    assert len(seen) == 5
    assert next(address for address in backend.addresses.all if address.url == down).breaker.is_open


def test_an_address_that_refuses_the_request_is_well():
    async def refuse(_):
        return JSONResponse({"error": {"message": "no"}}, 400)

    with served(Starlette(routes=[Route("/v1/chat/completions", refuse, methods=["POST"])])) as url:
        backend = EndpointBackend(expert(addresses=[{"base_url": f"{url}/v1"}, {"base_url": f"{url}/v1/"}]))
        for _ in range(5):
            with pytest.raises(ExpertFailedError, match="400"):
                asked(backend)
    assert not any(address.breaker.is_open for address in backend.addresses.all)


def test_timeouts_of_an_entry_take_the_place_of_the_servers():
    with mock_expert("one", "--first", "30") as (given, _):
        backend = EndpointBackend(expert(base_url=given.base_url, timeouts={"first": 0.3}), Timeouts(retries=0))
        with pytest.raises(ExpertFailedError, match=r"sent nothing within 0\.3 s"):
            asked(backend)


def test_no_key_of_openai_goes_to_addresses_elsewhere():
    assert expert(addresses=[{"base_url": "http://a/v1"}]).key_variable is None


def test_consent_names_all_addresses_that_a_key_goes_to():
    given = expert(api_key_env="A_KEY", addresses=[{"base_url": "http://a/v1"}, {"base_url": "http://b/v1"}])
    assert sendings([given]) == [("A_KEY", "http://a/v1, http://b/v1")]


def test_an_answer_is_no_longer_than_its_expert_can_give(recorded, base_folder):
    url, seen = recorded
    able = Expert("one", "openai", "m", base_url=url, max_output_tokens=7)
    composite = composite_of(base_folder, [able, Expert("two", "openai", "m", base_url=url)])
    composite.chat("hello", max_new_tokens=100)
    composite.chat("hello", max_new_tokens=3)
    assert [body["max_tokens"] for _, body in seen] == [7, 3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"addresses": []}, "addresses: expected a list"),
        ({"addresses": [{"base_url": "ftp://a"}]}, "addresses: expected a list"),
        ({"addresses": [{"base_url": "http://a", "weight": 0}]}, "addresses: expected a list"),
        (
            {"addresses": [{"base_url": "http://a"}], "base_url": "http://b"},
            "expected one of `addresses` and `base_url`",
        ),
        ({"timeouts": {"first": -1}}, "timeouts: expected seconds above 0 for connect, first, idle"),
        ({"timeouts": {"last": 1}}, "timeouts: expected seconds above 0"),
        ({"headers": {"Authorization": "Bearer 123"}}, r"headers\.Authorization: expected no key in the pool"),
        ({"headers": {"x": "a\r\nb: c"}}, "headers: expected values of printable ASCII"),
        ({"headers": {"x y": "a"}}, "expected names of letters, digits and `-`"),
    ],
)
def test_mistakes_are_named_without_what_may_be_secret(more, message):
    with pytest.raises(PoolError, match=message) as found:
        expert(**more)
    assert "123" not in str(found.value)


def test_an_address_that_hangs_is_passed_over_in_its_share_of_the_time_and_left_alone(recorded):
    url, seen = recorded
    with mock_expert("hung", "--fault", "hang") as (hung, _):
        entries = [{"base_url": hung.base_url, "weight": 1000}, {"base_url": url}]
        backend = EndpointBackend(expert(addresses=entries), Timeouts(first=4, retries=0))
        for _ in range(4):
            assert asked(backend) == "yes"
        assert len(seen) == 4
        assert backend.addresses.all[0].breaker.is_open


def test_an_address_that_is_down_gets_no_request_once_it_was_asked_and_gets_them_again_when_it_is_back(
    recorded, caplog
):
    url, seen = recorded
    state = {"status": 503}

    async def models(_):
        return JSONResponse({"object": "list", "data": []}, state["status"])

    with served(Starlette(routes=[Route("/v1/models", models)])) as other:
        entries = [{"base_url": f"{other}/v1", "weight": 1000}, {"base_url": url}]
        backend = EndpointBackend(expert(addresses=entries), Timeouts(retries=0))
        BackgroundLoop.call(backend.check_addresses())
        assert backend.addresses_up == {
            f"{other}/v1": False,
            url: True,
        }  # the second one has no list of models, but it answers
        assert [asked(backend) for _ in range(5)] == ["yes"] * 5
        assert len(seen) == 5
        assert backend.addresses.all[0].breaker.admits()  # no request had to fail first
        state["status"] = 200
        BackgroundLoop.call(backend.check_addresses())
        assert backend.addresses_up[f"{other}/v1"]
        assert "down" in caplog.text
        assert "up again" in caplog.text


def test_a_single_address_is_not_asked_whether_it_is_up(recorded):
    backend = EndpointBackend(expert(base_url=recorded[0]))
    BackgroundLoop.call(backend.check_addresses())
    assert backend.addresses_up == {}
