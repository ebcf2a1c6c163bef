import pytest
from transformers import TrainingArguments

from expertoken.data_prep.supervision import build_supervision
from expertoken.train.arguments import ExpertokenArguments
from expertoken.train.run import train


@pytest.fixture
def composite_folder(tmp_path, base_folder, results, pool):
    build_supervision(results, pool).save(tmp_path / "supervision")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "supervision"), verify=False)
    return train(options, TrainingArguments(output_dir=str(tmp_path / "composite"), use_cpu=True, report_to="none"))
