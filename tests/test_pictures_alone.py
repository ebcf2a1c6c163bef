"""The example of decisions from pictures alone, on the real SmolLM2."""

import asyncio
import base64

import pytest

pytest.importorskip("PIL")
pytest.importorskip("sklearn")

from transformers import TrainingArguments

from expertoken.data_prep.images import with_pictures
from expertoken.data_prep.reading import read_results
from expertoken.data_prep.supervision import build_supervision
from expertoken.evaluation.evaluate import evaluate
from expertoken.examples.pictures.draw import KINDS, QUESTION, draw_pictures
from expertoken.examples.pictures.make_model import make_model
from expertoken.inference.composite_model import CompositeModel
from expertoken.modeling.pool import ExpertPool
from expertoken.train.arguments import ExpertokenArguments
from expertoken.train.run import train

pytestmark = pytest.mark.slow


def test_a_composite_decides_by_pictures_what_no_router_of_texts_can(tmp_path, checked_at_once):
    from expertoken.examples import pictures

    pool = ExpertPool.from_yaml(next(iter(pictures.__path__)) + "/pool.yaml")
    table = draw_pictures(tmp_path, count=20)
    make_model(tmp_path / "model")
    results = with_pictures(read_results(table, "table"), tmp_path / "pictures")
    build_supervision(results, pool, test=0.4).save(tmp_path / "supervision")
    given = ExpertokenArguments(meta=str(tmp_path / "model"), data=str(tmp_path / "supervision"), l2=[0.01, 0.1])
    folder = train(given, TrainingArguments(output_dir=str(tmp_path / "composite"), use_cpu=True, report_to="none"))
    report = evaluate(folder, baselines=["text-only", "words"])
    reached = {row.name: row.mean_score for row in report.results}
    assert reached["composite"] >= 0.85
    chance = max(reached[name] for name in KINDS)
    for blind in ("text-only", "words", "without pictures"):
        assert reached[blind] <= chance

    model = CompositeModel.from_pretrained(folder)
    fresh = draw_pictures(tmp_path / "fresh", count=3, seed=1).parent / "pictures"
    right = 0
    for file in sorted(fresh.iterdir()):
        url = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTION},
        ]
        decision = asyncio.run(model.adecide([{"role": "user", "content": content}]))
        right += decision.dispatch.expert == file.name.split("-")[0]
    assert right >= 10
