"""Forged and broken folders of runs, given to those who run or score records anew."""

import pandas as pd
import pytest
from forged_runs import cover_up, forge, read

from mibench.errors import RecordError
from mibench.record import read_record
from mibench.reproduce import values_beside
from mibench.verdict import compare


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    forge(folder)
    return folder


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("no column 'sha256'", lambda table: table.drop(columns="sha256")),
        ("'psnr' holds no numbers", lambda table: table.assign(psnr=table["psnr"].astype(str))),
    ],
)
def test_a_table_that_is_none_is_refused_in_one_line(tmp_path, said, change):
    forge(tmp_path)
    path = tmp_path / "per_image.parquet"
    change(pd.read_parquet(path)).to_parquet(path, index=False)
    cover_up(tmp_path, read(tmp_path))
    with pytest.raises(RecordError, match=said):
        values_beside(read_record(tmp_path), tmp_path)


def test_a_single_image_is_compared_without_an_interval(honest):
    record, table = read_record(honest), pd.read_parquet(honest / "per_image.parquet").head(1)
    rows = compare(record, table, record, table).rows
    assert {(row.low, row.high) for row in rows if row.paired} == {(0.0, 0.0)}


def test_where_nothing_is_compared_nothing_is_the_same(honest):
    record, table = read_record(honest), pd.read_parquet(honest / "per_image.parquet")
    assert compare(record, table, record, table).word == "identical"
    lost = [
        one.model_copy(update={"value": None, "reason": "it was not to be had"})
        for one in record.scores
    ]
    after = record.model_copy(update={"scores": lost})
    assert compare(record, table, after, table).word == "different"
