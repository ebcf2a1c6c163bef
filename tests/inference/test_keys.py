import stat

import httpx
import openai
import pytest
from typer.testing import CliRunner

from expertoken.cli.app import app as command
from expertoken.inference.server import Settings, create_app
from expertoken.inference.server.keys import KeyRing, add_key, hashed, read_keys, remove_key
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.tests.inference.conftest import composite_of, served

HELLO = [{"role": "user", "content": "hello"}]


def test_a_key_file_holds_hashes_that_its_owner_alone_can_read(tmp_path):
    file = tmp_path / "keys.yaml"
    key = add_key(file, "team", ["one"])
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    ring = KeyRing(read_keys(file))
    assert (ring.find(key).name, ring.find(key).experts) == ("team", ("one",))
    assert ring.find(key + "x") is None
    remove_key(file, "team")
    assert read_keys(file) == []


def test_keys_are_made_listed_and_removed_on_the_command_line(tmp_path):
    file, run = str(tmp_path / "keys.yaml"), CliRunner()
    made = run.invoke(command, ["keys", "add", file, "team", "--expert", "one"])
    key = made.stdout.strip()
    told = run.invoke(command, ["keys", "list", file]).stdout
    assert "team" in told
    assert key not in told
    assert hashed(key)[:8] in told
    assert run.invoke(command, ["keys", "remove", file, "team"]).exit_code == 0
    assert "team" not in run.invoke(command, ["keys", "list", file]).stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: [{name: a, sha256: my-secret-key}]", r"keys\[0\]\.sha256: expected 64 hexadecimal digits"),
        ("keys: [{name: a, key: my-secret-key}]", r"keys\[0\]: expected `name`, `sha256` and optionally `experts`"),
        ("keys: [{name: 'a b', sha256: " + "0" * 64 + "}]", r"keys\[0\]\.name: expected letters"),
        ("keys: [{name: a, sha256: '" + "0" * 64 + "', experts: one}]", r"experts: expected a list of names"),
        ("my-secret-key", "expected a mapping with a list `keys:`"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_mistake_in_a_key_file_is_named_and_no_value_is_quoted(tmp_path, text, message):
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(ExpertokenError, match=message) as error:
        read_keys(tmp_path / "keys.yaml")
    assert "my-secret-key" not in str(error.value)


def test_a_name_has_one_key(tmp_path):
    add_key(tmp_path / "keys.yaml", "team")
    with pytest.raises(ExpertokenError, match="'team' already has a key"):
        add_key(tmp_path / "keys.yaml", "team")
    with pytest.raises(ExpertokenError, match="no key has the name 'other'"):
        remove_key(tmp_path / "keys.yaml", "other")


@pytest.fixture
def serving(tmp_path, base_folder, words):
    """Yield a server's address, a key for all models, a key for `two` only, the service, and the key file."""
    file = tmp_path / "keys.yaml"
    keys = [add_key(file, "everyone"), add_key(file, "few", ["two"])]
    composite = composite_of(base_folder, [*words, Expert("self", "self")])
    app = create_app(composite, Settings(name="comp", key_file=file))
    with served(app) as address:
        yield address, *keys, app.state.service, file


def client(address, key):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def ask(address, key, model="comp", **extra):
    return client(address, key).chat.completions.create(model=model, messages=HELLO, extra_body={"expertoken": extra})


def test_a_key_may_use_what_its_entry_names(serving):
    address, everyone, few, *_ = serving
    assert ask(address, everyone).choices[0].message.content.startswith("one")
    assert ask(address, few).choices[0].message.content.startswith("two")
    assert [model.id for model in client(address, few).models.list()] == ["comp", "comp/two"]
    with pytest.raises(openai.NotFoundError):
        ask(address, few, "comp/one")
    with pytest.raises(openai.AuthenticationError):
        ask(address, "et-unknown")


def test_no_request_can_widen_what_its_key_may_use(serving):
    address, _, few, *_ = serving
    for policy in ({"allow": ["one"]}, {"deny": ["two"]}):
        with pytest.raises(openai.BadRequestError, match="allow and deny exclude all candidates"):
            ask(address, few, policy=policy)
    assert ask(address, few, policy={"allow": ["one", "two"]}).choices[0].message.content.startswith("two")
    assert ask(address, few, policy={"allow": None, "deny": []}).choices[0].message.content.startswith("two")


def test_usage_is_counted_by_key(serving):
    address, everyone, few, *_ = serving
    for key in (everyone, few, few):
        ask(address, key)
    metrics = httpx.get(f"{address}/metrics", headers={"authorization": f"Bearer {everyone}"}).text
    assert 'expertoken_client_requests_total{client="few"} 2.0' in metrics
    assert 'expertoken_client_tokens_total{client="few",kind="read"} 14.0' in metrics
    assert 'expertoken_client_cost_usd_total{client="everyone"} 1.7e-05' in metrics


def test_keys_that_are_read_again_hold_at_once(serving):
    import asyncio

    address, everyone, few, service, file = serving
    remove_key(file, "few")
    added = add_key(file, "new")
    assert ask(address, few)
    assert asyncio.run(service.reload()) is False  # this composite has no folder, so the reload changes nothing
    service.composite.reloaded = lambda: service.composite
    assert asyncio.run(service.reload()) is True
    with pytest.raises(openai.AuthenticationError):
        ask(address, few)
    assert ask(address, added)
    file.write_text("keys: nonsense")
    assert asyncio.run(service.reload()) is False
    assert ask(address, everyone)


def test_without_its_last_key_a_server_is_closed_and_not_open(serving):
    import asyncio

    address, everyone, _, service, file = serving
    service.composite.reloaded = lambda: service.composite
    for name in ("everyone", "few"):
        remove_key(file, name)
    assert asyncio.run(service.reload()) is True
    assert httpx.get(f"{address}/v1/models").status_code == 401
    with pytest.raises(openai.AuthenticationError):
        ask(address, everyone)


def test_a_key_for_some_learns_nothing_of_the_others(serving):
    address, _, few, *_ = serving
    headers = {"authorization": f"Bearer {few}"}
    told = httpx.post(f"{address}/v1/route", json={"model": "comp", "messages": HELLO}, headers=headers).json()
    assert list(told["probabilities"]) == list(told["costs"]) == ["two"]
    assert httpx.get(f"{address}/metrics", headers=headers).status_code == 403
    [shown] = ask(address, few, show=True).model_extra["expertoken"]
    assert list(shown["probabilities"]) == ["two"]


@pytest.mark.parametrize(
    "text", ["keys: [{name: a, sha256: 2001-99-99}]", "keys: " + "[" * 3000, "keys: !!int x", "keys: !!timestamp x"]
)
def test_a_key_file_of_any_form_is_one_clear_error(tmp_path, text):
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(ExpertokenError):
        read_keys(tmp_path / "keys.yaml")


def test_a_key_for_nobody_does_not_start(tmp_path, base_folder, words):
    add_key(tmp_path / "keys.yaml", "few", ["gone"])
    with pytest.raises(ExpertokenError, match="the key of 'few': policy.allow: no candidate 'gone'"):
        create_app(composite_of(base_folder, words), Settings(key_file=tmp_path / "keys.yaml"))
