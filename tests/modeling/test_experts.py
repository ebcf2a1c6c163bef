import pytest

from expertoken.modeling.errors import PoolError
from expertoken.modeling.experts import Expert
from expertoken.modeling.pool import ExpertPool

GOOD = {"experts": [{"name": "math", "model": "m"}, {"name": "self", "backend": "self"}]}


def test_self_is_a_candidate_without_a_token():
    pool = ExpertPool.parse(GOOD)
    assert len(pool) == 1
    assert pool.names == ["math", "self"]
    with pytest.raises(PoolError, match="has no token"):
        pool.index("self")


def test_all_mistakes_of_a_pool_are_reported_together():
    document = {
        "experts": [
            {"name": "a b", "backnd": "openai", "model": "m"},
            {"name": "law", "backend": "opnai", "model": "m"},
            {"name": "x", "backend": "openai"},
            "text",
        ],
        "defaults": {},
    }
    with pytest.raises(PoolError) as error:
        ExpertPool.parse(document, "pool.yaml")
    message = str(error.value)
    assert message.startswith("pool.yaml: ")
    assert "\n" not in message
    for part in (
        "defaults: unknown key",
        "experts[0].backnd: unknown key, did you mean 'backend'?",
        "experts[0].name",
        "did you mean 'openai'?",
        "experts[2].model: needed",
        "experts[3]: expected a mapping",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"api_key": "sk-secret123"}, "a key itself is refused"),
        ({"api_key_env": "sk-secret123"}, "NAME of an environment variable"),
        ({"base_url": "https://host/v1?key=secret123"}, "without a user name, password"),
        ({"base_url": "https://user:secret123@host/v1"}, "without a user name, password"),
    ],
)
def test_a_key_is_refused_and_never_repeated(entry, message):
    with pytest.raises(PoolError, match=message) as error:
        ExpertPool.parse({"experts": [{"name": "x", "backend": "openai", "model": "m", **entry}]})
    assert "secret123" not in str(error.value)


def test_a_pool_survives_its_file_and_moves_with_its_tree(tmp_path):
    (tmp_path / "one" / "adapters" / "math").mkdir(parents=True)
    (tmp_path / "one" / "pool.yaml").write_text("experts:\n- {name: math, backend: adapter, model: adapters/math}\n")
    pool = ExpertPool.from_yaml(tmp_path / "one" / "pool.yaml")
    assert pool["math"].model == str(tmp_path / "one" / "adapters" / "math")
    pool.to_yaml(tmp_path / "one" / "copy.yaml")
    (tmp_path / "one").rename(tmp_path / "two")
    assert ExpertPool.from_yaml(tmp_path / "two" / "copy.yaml")["math"].model.startswith(str(tmp_path / "two"))


def test_a_folder_under_a_backend_that_cannot_read_it_is_refused(tmp_path):
    for folder, file in (("lora", "adapter_config.json"), ("whole", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    for backend, folder, right in (("transformers", "lora", "adapter"), ("adapter", "whole", "transformers")):
        document = {"experts": [{"name": "x", "backend": backend, "model": folder}]}
        with pytest.raises(PoolError, match=rf"experts\[0\].backend: .*expected `backend: {right}`"):
            ExpertPool.parse(document, folder=tmp_path)
        document["experts"][0]["backend"] = right
        ExpertPool.parse(document, folder=tmp_path)


def test_local_models_that_are_not_here_are_named_but_hub_ids_are_not():
    models = ("./nowhere", "/no/such/folder", "owner/name", "gpt2")
    pool = ExpertPool.parse({"experts": [{"name": f"m{i}", "model": model} for i, model in enumerate(models)]})
    assert [sentence.split(":")[0] for sentence in pool.missing()] == ["expert 'm0'", "expert 'm1'"]


def test_an_unknown_expert_names_the_nearest():
    with pytest.raises(PoolError, match="no expert 'mat' in the pool, did you mean 'math'"):
        ExpertPool.parse(GOOD)["mat"]


def test_a_missing_pool_file_is_one_clear_line(tmp_path):
    with pytest.raises(PoolError, match="No such file"):
        ExpertPool.from_yaml(tmp_path / "none.yaml")


def test_a_pool_built_in_python_is_checked_like_a_file():
    with pytest.raises(PoolError, match=r"experts\[0\].backend: unknown backend 'opnai'.*; experts\[1\].model: needed"):
        ExpertPool([Expert("a", "opnai", "m"), Expert("b")])


def test_names_appear_once_and_self_at_most_once():
    with pytest.raises(PoolError, match="'a' appears twice"):
        ExpertPool([Expert("a", model="m"), Expert("a", model="n")])
    with pytest.raises(PoolError, match="more than one"):
        ExpertPool([Expert("a", model="m"), Expert("s", backend="self"), Expert("t", backend="self")])
    with pytest.raises(PoolError, match="no expert besides self"):
        ExpertPool([Expert("self", backend="self")])
