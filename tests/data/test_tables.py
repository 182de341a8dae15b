"""Tables: prepared as published, honest errors, and networks that standardise by themselves."""

from __future__ import annotations

import csv
import io
import random
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor

from robustexplain import System, data, models
from robustexplain.data import Data, TensorTable, credit, tables
from robustexplain.data.tables import CsvTable
from robustexplain.errors import DataWarning, InputError, MissingDataError
from robustexplain.evaluation.prepared import classifier
from robustexplain.interpreters import Gradient
from robustexplain.recipe.experiment import Model
from robustexplain.schema import make
from robustexplain.training import Session, Training, cross_entropy, fit

pytest.importorskip("pandas")


def whole(d: Data) -> tuple[Tensor, list[int]]:
    """Every row and label of a table, in the file's order."""
    dataset = d.train.dataset  # type: ignore[attr-defined]
    return dataset.rows, dataset.labels


def write(path: Path, rows: list[dict[str, Any]], newline: str = "\n") -> Path:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator=newline)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode())
    return path


# COMPAS, German credit, Communities and Crime -------------------------------------------------------------------------

RACES = ("African-American", "Caucasian", "Hispanic")


def defendants(count: int = 120) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = []
    for i in range(count):
        into = datetime(2013, 1, 1) + timedelta(days=rng.randrange(300), seconds=rng.randrange(86400))
        stay = timedelta(seconds=-9000 if i % 4 == 0 else rng.randrange(2_000_000))
        rows.append(
            {
                "id": i,
                "name": f"person {i}",
                "dob": "1980-01-01",
                "sex": rng.choice(["Male", "Female"]),
                "age": rng.randrange(18, 80),
                "race": rng.choice(RACES),
                "priors_count": rng.randrange(20),
                "days_b_screening_arrest": rng.choice(["", -31.0, -30.0, -1.0, 0.0, 30.0, 31.0]),
                "c_jail_in": f"{into:%Y-%m-%d %H:%M:%S}",
                "c_jail_out": f"{into + stay:%Y-%m-%d %H:%M:%S}",
                "c_charge_degree": rng.choice(["F", "M", "F", "M", "O"]),
                "is_recid": rng.choice([-1, 0, 1]),
                "score_text": rng.choice(["Low", "Medium", "High", "N/A"]),
                "two_year_recid": rng.randrange(2),
            }
        )
    return rows


def test_compas_keeps_propublicas_rows_and_slacks_columns(tmp_path: Path) -> None:
    """Against a plain loop over the file's lines."""
    expected, labels = [], []
    for row in defendants():
        arrest = row["days_b_screening_arrest"]
        if arrest == "" or not -30 <= float(arrest) <= 30 or row["is_recid"] == -1:
            continue
        if row["c_charge_degree"] == "O" or row["score_text"] == "N/A":
            continue
        ends = [datetime.strptime(row[f"c_jail_{end}"], "%Y-%m-%d %H:%M:%S") for end in ("in", "out")]
        numbers = [row["age"], row["two_year_recid"], row["priors_count"], (ends[1] - ends[0]).days]
        flags = [row["c_charge_degree"] == "F", row["c_charge_degree"] == "M"]
        flags += [row["sex"] == "Female", row["sex"] == "Male", row["race"] == "African-American"]
        expected.append([float(v) for v in numbers + flags])
        labels.append(0 if row["score_text"] == "High" else 1)
    d = data.load("compas", path=str(write(tmp_path / "c.csv", defendants())))
    assert 20 < len(expected) < 60
    assert min(row[3] for row in expected) == -1, "a stay that ends a moment before it begins counts as -1 day"
    assert d.features[:4] == ("age", "two_year_recid", "priors_count", "length_of_stay")
    assert d.features[4:] == ("c_charge_degree_F", "c_charge_degree_M", "sex_Female", "sex_Male", "race")
    assert (d.shape, d.classes, d.name) == ((9,), ("high score", "low or medium score"), "compas")
    x, y = whole(d)
    assert x.tolist() == expected
    assert y == labels


def communities(count: int = 42) -> list[dict[str, Any]]:
    rng = random.Random(1)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        unknown = i % 5 == 0
        rows.append(
            {
                "": i,
                "communityname string": f"town {i}",
                **{f"{word} numeric": rng.choice([1, "?"]) for word in ("state", "county", "community", "fold")},
                "racePctWhite numeric": round(rng.uniform(0, 100), 2),
                "PctPolicWhite numeric": "?" if i == 7 else 3,
                # Missing only where the crime is missing too: the column stays.
                "PopDens numeric": "?" if unknown else rng.randrange(1000),
                "ViolentCrimesPerPop numeric": "?" if unknown else round(rng.expovariate(1 / 500), 2),
            }
        )
    return rows


def test_communities_are_split_at_the_median_and_lose_columns_with_holes(tmp_path: Path) -> None:
    """The published file's lines end in a carriage return alone."""
    rows = [row for row in communities() if row["ViolentCrimesPerPop numeric"] != "?"]
    crime = sorted(row["ViolentCrimesPerPop numeric"] for row in rows)
    assert len(crime) == 33
    middle = crime[16]
    assert sum(crime) / 33 > crime[17], "the mean would split them elsewhere"
    d = data.load("communities-crime", path=str(write(tmp_path / "c.csv", communities(), newline="\r")))
    assert d.features == ("racePctWhite numeric", "PopDens numeric")
    x, y = whole(d)
    expected = torch.tensor([[row["racePctWhite numeric"], row["PopDens numeric"]] for row in rows])
    assert torch.equal(x, expected.float())
    assert y == [0 if row["ViolentCrimesPerPop numeric"] > middle else 1 for row in rows]
    assert d.classes == ("more violent crime", "less violent crime")


def loans(count: int = 30) -> list[dict[str, Any]]:
    rng = random.Random(2)
    return [
        {
            "GoodCustomer": 1 if i % 3 else -1,
            "Gender": rng.choice(["Male", "Female"]),
            "Age": rng.randrange(20, 70),
            "PurposeOfLoan": rng.choice(["Car", "Tent"]),
            "LoanRateAsPercentOfIncome": rng.randrange(1, 5),
        }
        for i in range(count)
    ]


def test_german_credit_drops_the_purpose_and_codes_men_as_one(tmp_path: Path) -> None:
    d = data.load("german-credit", path=str(write(tmp_path / "g.csv", loans())))
    assert d.features == ("Gender", "Age", "LoanRateAsPercentOfIncome")
    x, y = whole(d)
    assert x.tolist() == [
        [float(r["Gender"] == "Male"), float(r["Age"]), float(r["LoanRateAsPercentOfIncome"])] for r in loans()
    ]
    assert y == [int(r["GoodCustomer"] == 1) for r in loans()]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_unrelated_columns_are_coins_from_the_seed(count: int, tmp_path: Path) -> None:
    path = str(write(tmp_path / "g.csv", loans(300)))
    plain, d = data.load("german-credit", path=path), data.load("german-credit", path=path, unrelated=count)
    names = {0: (), 1: ("unrelated_column",), 2: ("unrelated_column_one", "unrelated_column_two")}[count]
    assert d.features == (*plain.features, *names)
    x, y = whole(d)
    coins = x[:, 3:]
    assert torch.equal(x[:, :3], whole(plain)[0])
    assert ((coins == 0) | (coins == 1)).all()
    if count:
        assert (coins.mean(0) - 0.5).abs().max() < 0.1
        assert torch.equal(coins, whole(data.load("german-credit", path=path, unrelated=count))[0][:, 3:])
        assert not torch.equal(coins, whole(data.load("german-credit", path=path, unrelated=count, seed=1))[0][:, 3:])
    if count == 2:
        assert 0.35 < (coins[:, 0] == coins[:, 1]).float().mean() < 0.65
    assert y == whole(plain)[1]


def test_a_table_that_is_not_there_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"compas-scores-two-years.csv in .*download: true .*propublica"):
        data.load("compas", root=tmp_path)
    with pytest.raises(MissingDataError, match="no file"):
        data.load("compas", path=str(tmp_path / "no.csv"))
    with pytest.raises(InputError, match="no column 'GoodCustomer'"):
        data.load("german-credit", path=str(write(tmp_path / "c.csv", defendants())))


def test_a_download_keeps_no_names_and_is_read_again_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write(tmp_path / "c.csv", defendants()).read_bytes()
    asked: list[str] = []

    def answer(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(credit, "urlopen", answer)
    with pytest.raises(MissingDataError, match=rf"gave {len(content)} bytes, and the table has at least"):
        data.load("compas", root=tmp_path / "cache", download=True)
    monkeypatch.setattr(credit.Compas, "least", 1000)
    fetched = data.load("compas", root=tmp_path / "cache", download=True)
    kept = (tmp_path / "cache" / "compas-scores-two-years.csv").read_text()
    assert "name" not in kept
    assert "person" not in kept
    assert "1980" not in kept
    monkeypatch.setattr(credit, "urlopen", None)
    again = data.load("compas", root=tmp_path / "cache")
    direct = data.load("compas", path=str(tmp_path / "c.csv"))
    assert torch.equal(whole(again)[0], whole(direct)[0])
    assert fetched.digest == again.digest == direct.digest
    assert len(asked) == 2


def test_a_download_of_something_else_or_without_a_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(url: str, timeout: float) -> io.BytesIO:
        raise URLError("no route")

    monkeypatch.setattr(credit, "urlopen", offline)
    with pytest.raises(MissingDataError, match=r"german-credit: the download from .* failed: .*no route"):
        data.load("german-credit", root=tmp_path, download=True)
    monkeypatch.setattr(credit, "urlopen", lambda url, timeout: io.BytesIO(b"a,b\n" + b"1,2\n" * 20_000))
    with pytest.raises(InputError, match="no column 'GoodCustomer'"):
        data.load("german-credit", root=tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []


# Your own tables ------------------------------------------------------------------------------------------------------

PEOPLE = "age,job,height,owns,paid\n30,cook,1.5,True,no\n40,nurse,1.7,False,yes\n35,cook,1.6,True,yes\n" * 5


@pytest.fixture
def people(tmp_path: Path) -> Path:
    header, *lines = PEOPLE.splitlines()
    path = tmp_path / "people.csv"
    path.write_text("\n".join([header, *(line for line in lines if line != header)]) + "\n")
    return path


def load(path: Path, **options: Any) -> Data:
    return data.load(f"csv-table:{path}", **{"target": "paid", **options})


def test_a_table_of_ones_own_by_hand(people: Path) -> None:
    d = load(people)
    assert d.features == ("age", "height", "owns", "job_cook", "job_nurse")
    assert (d.classes, d.name, d.shape) == (("no", "yes"), "csv-table:people", (5,))
    x, y = whole(d)
    first = torch.tensor([[30, 1.5, 1, 1, 0], [40, 1.7, 0, 0, 1], [35, 1.6, 1, 1, 0]])
    assert torch.equal(x, first.repeat(5, 1))
    assert y == [0, 1, 1] * 5


def test_one_hot_columns_are_those_of_pandas(people: Path) -> None:
    import pandas

    frame = pandas.read_csv(people).drop(columns="paid")
    oracle = pandas.get_dummies(frame, columns=["job", "age"]).astype("float32")
    d = load(people, categories=("job", "age"))
    assert set(d.features) == set(oracle.columns)
    assert torch.equal(whole(d)[0], torch.from_numpy(oracle[list(d.features)].to_numpy(copy=True)))


def test_class_one_is_what_positive_names(people: Path) -> None:
    d = load(people, positive="no")
    assert d.classes == ("yes", "no")
    assert whole(d)[1] == [1, 0, 0] * 5
    d = load(people, target="age", positive=(35, "40", 40.0), drop=("height",))
    assert d.classes == ("30", "35 or 40")
    assert whole(d)[1] == [0, 1, 1] * 5
    d = load(people, target="age", positive=30.0)
    assert d.classes == ("not 30", "30")
    d = load(people, target="owns", positive=True)
    assert whole(d)[1] == [1, 0, 1] * 5


def test_numbers_as_classes_are_sorted_by_size(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,y\n" + "".join(f"{i},{(10, 9, 2)[i % 3]}\n" for i in range(12)))
    d = load(path, target="y")
    assert d.classes == ("2", "9", "10")
    assert whole(d)[1][:3] == [2, 1, 0]


def test_text_around_numbers_and_other_delimiters_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("﻿a; b; y\n1; <=50K; 0\n2; >50K; 1\n".encode() + b"3; >50K; 1\n4; <=50K; 0\n")
    d = load(path, target="y", delimiter=";")
    assert d.features == ("a", "b_<=50K", "b_>50K")


def test_blanks_around_text_make_no_other_class_or_category(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "a,job,y\n" + "".join(f"{i},{('cook', 'cook ')[i % 2]},{('no', 'yes', 'yes ')[i % 3]}\n" for i in range(12))
    )
    d = load(path, target="y", positive="yes")
    assert d.features == ("a", "job_cook")
    assert whole(d)[1] == [0, 1, 1] * 4


def test_a_value_that_has_no_size_is_sorted_as_text_in_every_process(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,y\n" + "".join(f"{i},{('9', '10', 'nAn')[i % 3]}\n" for i in range(12)))
    with pytest.warns(DataWarning, match="numbers but for 'nAn'; if that stands for a missing value, name it in na"):
        assert load(path, target="y").classes == ("10", "9", "nAn")


HOLES = "a,b,c,y\n1,x,1,0\n2,?,2,1\n3,x,,0\n4,y,NA,1\n5,x,5,0\n6,y,6,1\n"


def test_missing_values_are_counted_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HOLES)
    with pytest.raises(
        InputError,
        match=r"values are missing: b \(1, first in sample 1\), c \(2, first in sample 2\) of 6 rows; set",
    ):
        load(path, target="y")
    rows = load(path, target="y", missing="drop-rows")
    assert rows.features == ("a", "c", "b_x", "b_y")
    assert whole(rows)[0][:, 0].tolist() == [1, 5, 6]
    columns = load(path, target="y", missing="drop-columns")
    assert columns.features == ("a",)
    assert len(whole(columns)[1]) == 6
    # What stands for a missing value is the table's own: here "?" is a category like others.
    kept = load(path, target="y", na=("", "NA"), drop=("c",))
    assert kept.features == ("a", "b_?", "b_x", "b_y")
    with pytest.raises(InputError, match=r"the target 'c' misses 2 values"):
        load(path, target="c", missing="drop-columns")


AMONG = "a,b,y\n" + "".join('"{}",' * (i == 3) + f"{i}," * (i != 3) + f"{i},{i % 2}\n" for i in range(20))


def otherwise(cell: str) -> str:
    return "a,y\n" + "".join(f"{cell.format(i)},{i % 2}\n" for i in range(1, 20))


WIDE = ",".join(f"c{j}" for j in range(200)) + ",y\n"
WIDE += "".join(",".join([f"v{i}"] * 200) + f",{i % 2}\n" for i in range(60))
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "empty": ("", {}, "is empty"),
    "header only": ("a,y\n", {}, r"a header \(2 columns\) and no rows"),
    "unknown target": ("a,paid_back\n1,0\n2,1\n", {"target": "paid"}, "no column 'paid'; did you mean 'paid_back'"),
    "unknown drop": ("a,y\n1,0\n2,1\n", {"drop": ("zzz",)}, "no column 'zzz'; it has: a, y"),
    "text": ("a,y\n1,0\nsix,1\n", {"categories": ()}, "'a' is not numeric: sample 1 holds 'six'; put it into categ"),
    "target is a feature": ("a,y\n1,0\n2,1\n", {"categories": ("y",)}, "'y' is the target and cannot be in categ"),
    "target dropped": ("a,b,y\n1,2,0\n2,3,1\n", {"drop": ("y",)}, "'y' is the target and cannot be in drop"),
    "copy of the target": ("a,b,y\n1,0,0.0\n2,1,1.0\n", {}, "column 'b' is a copy of the target 'y'"),
    "one class": ("a,y\n1,0\n2,0\n", {}, "at least two classes are needed, all rows have 0"),
    "all positive": ("a,y\n1,3\n2,4\n", {"positive": (3, 4)}, "at least two classes are needed"),
    "unknown positive": ("a,y\n1,no\n2,yes\n", {"positive": "Yes"}, "positive names 'Yes', but the values are no, yes"),
    "no feature": ("a,y\n1,0\n2,1\n", {"drop": ("a",)}, "no column is left besides the target"),
    "too many classes": ("a,y\n1,0.1\n3,0.2\n2,0.3\n", {"most": 2}, "3 different values, such as 0.1, 0.2, 0.3"),
    "names": ("a,y\nann,0\nbob,1\ncyd,1\n", {"most": 2}, "'a' has 3 different values, such as 'ann'"),
    "infinite": ("a,y\n1,0\ninf,1\n", {}, "'a' holds a number that is not finite"),
    "beyond float32": ("a,y\n1,0\n1e39,1\n", {}, "'a' holds a number that is not finite in float32"),
    "ragged": ("a,y\n1,0,7\n2,1\n", {}, "cannot read"),
    "not text": ("a,y\n1,\x00\xff\n", {}, "."),
    "drop and category": ("a,b,y\n1,x,0\n2,z,1\n", {"drop": ("b",), "categories": ("b",)}, "both in drop and in"),
    "delimiter": ("a,y\n1,0\n2,1\n", {"delimiter": ", "}, "delimiter must be one character"),
    "slip": (AMONG.format("unknown"), {}, r"'a' holds numbers but for 1 of 20 rows: sample 3 'unknown'; mend them"),
    "slips": (AMONG.format("1,5").replace("\n9,", '\n"$9",'), {}, r"2 of 20 rows: sample 3 '1,5', sample 9 '\$9'"),
    "text among classes too": (AMONG.format("-"), {"categories": ()}, "'a' is not numeric: sample 3 holds '-'"),
    "beyond 64 bits": (AMONG.format("9" * 30), {}, "'a' holds numbers as text"),
    "thousands": (otherwise('"{},000"'), {}, "'a' holds numbers of another notation, such as '1,000'; write them as"),
    "decimal comma": (otherwise('"{},5"'), {}, "numbers of another notation, such as '1,5'"),
    "money": (otherwise('"${}.000,50"'), {}, r"numbers of another notation, such as .\$1\.000,50"),
    "percent": (otherwise("{}%"), {}, "numbers of another notation, such as '1%'"),
    "dates": (otherwise("2020-01-{:02}"), {}, "'a' holds dates, such as '2020-01-01'; write them as a number"),
    "continuous": ("a,y\n" + "".join(f"{i},{i * 0.37:.2f}\n" for i in range(1, 20)), {}, "'y' is continuous: 19 diff"),
    "days": ("a,y\n" + "".join(f"{i},1/{i}/2020\n" for i in range(1, 20)), {}, "'y' is continuous: 19 different"),
    "columns of one name": ("a,b,a,y\n1,2,3,0\n2,3,4,1\n", {}, "two columns are called 'a'"),
    "one name but for spaces": ("a,a ,y\n1,2,0\n2,3,1\n", {}, "two columns are called 'a'"),
    "two targets": ("a,y,y\n1,2,0\n2,3,1\n", {}, "two columns are called 'y'"),
    "a value takes a column's name": ("b,b_x,y\nx,1,0\nz,2,1\n", {}, "'b' would get the 0/1 column 'b_x', which is"),
    "values meet in a name": ("a,a_b,y\nb_c,c,0\nz,z,1\n", {}, "'a_b' would get the 0/1 column 'a_b_c', which is"),
    "too many columns": (WIDE, {}, "more than 10000 columns"),
    "latin-1": ("a,y\né,0\nz,1\n", {}, "is not of encoding utf-8; set encoding to its own, such as latin-1"),
    "unknown encoding": ("a,y\n1,0\n2,1\n", {"encoding": "zip"}, "encoding must be one such as utf-8 or latin-1"),
    "semicolons": ("a;y\n1;0\n2;1\n", {}, "has one column, 'a;y': set delimiter to ';'"),
    "long header": ("a" * 200_000 + ",y\n1,0\n", {}, "cannot read .* field larger than field limit"),
    "open quote": ('a,y\n"1,0\n2,1\n', {}, "cannot read"),
    "missing": ("a,y\n1,0\n2,1\n", {"missing": "ignore"}, "missing must be one of 'refuse', 'drop-rows'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_table_is_refused_by_what_is_wrong_with_it(case: str, tmp_path: Path) -> None:
    content, options, message = REFUSED[case]
    (tmp_path / "t.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        load(tmp_path / "t.csv", **{"target": "y", **options})


@pytest.mark.parametrize(
    "word", ["None", "NULL", "null", "#N/A", "N/A", "n/a", "NaN", "nan", "NAN", "<NA>", "?", "", "1.#QNAN"]
)
def test_missing_values_are_known_in_all_usual_spellings(word: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(AMONG.format(word))
    with pytest.raises(InputError, match=r"values are missing: a \(1, first in sample 3\) of 20 rows"):
        load(tmp_path / "t.csv", target="y")
    assert load(tmp_path / "t.csv", target="y", missing="drop-rows").features == ("a", "b")
    (tmp_path / "t.csv").write_text(AMONG.format("."))
    assert load(tmp_path / "t.csv", target="y", missing="drop-rows", na=(".",)).features == ("a", "b")


def test_categories_that_look_like_numbers_are_taken_where_they_are_named_or_are_few(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b,y\n" + "".join(f"{'0123'[i % 4]}{'+' * (i % 4 > 2)},{i},{i // 10}\n" for i in range(20)))
    with pytest.raises(InputError, match=r"numbers but for 5 of 20 rows: sample 3 '3\+', .*, \.\.\.; mend"):
        load(path, target="y")
    assert load(path, target="y", categories=("a",)).features == ("b", "a_0", "a_1", "a_2", "a_3+")
    path.write_text("a,b,y\n" + "".join(f"{('18-25', '<5', '40+')[i % 3]},{i},{i // 10}\n" for i in range(20)))
    assert load(path, target="y").features == ("b", "a_18-25", "a_40+", "a_<5")


def test_true_and_false_stay_one_column_where_a_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b,y\n" + "".join(f"{i % 3 == 0 if i else ''},{i},{i // 10}\n" for i in range(20)))
    assert load(path, target="y", missing="drop-rows").features == ("a", "b")


@pytest.mark.parametrize(
    "text,words",
    [
        (",a,y\n" + "".join(f"{i},{i * i},{i % 2}\n" for i in range(20)), "without a name is read as 'Unnamed: 0'"),
        ("a,b,y\n" + "".join(f"7,{i},{i % 2}\n" for i in range(20)), "all rows have one value in 'a'"),
        ("a,y\n" + "".join(f"{i},{i % 2}\n" for i in range(20)) + "9,-\n", "numbers but for '-'; if that stands for"),
        ("a,y\n" + "".join(f"{i},{'pq'[i % 2]}\n" for i in range(20)) + "9,r\n", "the train part has none of 'r'"),
        (
            "a,b,y\n" + "".join(f"{1700000000 + i},{i},{i % 2}\n" for i in range(20)),
            "column 'a' has 20 different values and 1 in float32",
        ),
    ],
)
def test_what_may_not_be_meant_is_warned_of(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.warns(DataWarning, match=words):
        load(tmp_path / "t.csv", target="y", seed=1)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1", "utf-16", "cp1252"])
def test_a_table_of_another_encoding_is_read(encoding: str, tmp_path: Path) -> None:
    text = "größe,y\n" + "".join(f"{'é' if i % 2 else 'z'},{i // 10}\n" for i in range(20))
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    given = {} if encoding == "utf-8-sig" else {"encoding": encoding}
    assert load(tmp_path / "t.csv", target="y", **given).features == ("größe_z", "größe_é")


def test_a_recipe_reads_the_fields_of_a_table(people: Path) -> None:
    entry = {"path": str(people), "target": "paid", "positive": "yes", "drop": ["job"], "missing": "drop-rows"}
    made = make(CsvTable, entry, "data")
    assert made.load().features == ("age", "height", "owns")
    assert make(CsvTable, {**entry, "target": "age", "positive": [30, 35]}, "data").load().classes[1] == "30 or 35"
    with pytest.raises(InputError, match=r"data\.missing"):
        make(CsvTable, {**entry, "missing": "perhaps"}, "data")
    with pytest.raises(InputError, match=r"data\.unrelated"):
        make(credit.Compas, {"path": "x", "unrelated": 3}, "data")


def test_without_pandas_the_error_names_the_extra(people: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDataError, match=r"csv-table needs pandas: pip install 'robustexplain\[tabular\]'"):
        load(people)


# OpenML ---------------------------------------------------------------------------------------------------------------


def test_openml_goes_through_scikit_learn_and_is_encoded_alike(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas
    from sklearn.utils import Bunch

    asked: list[dict[str, Any]] = []

    def fetch(**options: Any) -> Bunch:
        asked.append(options)
        frame = pandas.read_csv(people).astype({"job": "category", "paid": "category"})
        return Bunch(frame=frame, details={"default_target_attribute": "paid"})

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    d = data.load("openml", dataset="people", root=tmp_path)
    same = load(people)
    assert (d.features, d.classes, d.name) == (same.features, same.classes, "openml:people")
    assert torch.equal(whole(d)[0], whole(same)[0])
    assert (asked[0]["name"], asked[0]["version"], asked[0]["data_home"]) == ("people", "active", str(tmp_path))
    data.load("openml", dataset=7, target="job")
    assert asked[1]["data_id"] == 7
    assert "version" not in asked[1]
    with pytest.raises(InputError, match="version belongs to a name"):
        data.load("openml", dataset=7, version=1)


def test_openml_without_a_network_or_a_table_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception) -> Any:
        def fetch(**options: Any) -> Any:
            raise error

        return fetch

    monkeypatch.setattr("sklearn.datasets.fetch_openml", failing(URLError("no route")))
    with pytest.raises(MissingDataError, match="OpenML cannot be reached"):
        data.load("openml", dataset="adult", root=tmp_path)
    monkeypatch.setattr("sklearn.datasets.fetch_openml", failing(ValueError("No active dataset aduld found")))
    with pytest.raises(InputError, match="openml 'aduld': No active dataset"):
        data.load("openml", dataset="aduld", root=tmp_path)


# Rows held in memory --------------------------------------------------------------------------------------------------


def test_rows_in_memory_are_a_data_set_like_others() -> None:
    rows = torch.arange(40.0).view(20, 2)
    d = tables.table("t", rows, [i % 2 for i in range(20)], classes=("a", "b"), features=("u", "v"))
    assert [len(part) for part in (d.train, d.defense, d.test)] == [10, 6, 4]  # type: ignore[arg-type]
    for part in (d.train, d.defense, d.test):
        assert sorted(data.labels_of(part)) == [0] * (len(part) // 2) + [1] * (len(part) // 2)  # type: ignore[arg-type]
    x, y = data.stack(data.take(d.test, 2))
    assert (x.shape, x.dtype, sorted(y.tolist())) == ((2, 2), torch.float32, [0, 1])
    assert all(int(row[0]) // 2 % 2 == label for row, label in zip(x, y, strict=True))


def test_the_digest_sees_content_names_and_split() -> None:
    rows = torch.arange(40.0).view(20, 2)
    base: dict[str, Any] = {"classes": ("a", "b"), "features": ("u", "v"), "seed": 0}

    def digest(x: Tensor = rows, shift: int = 0, **changes: Any) -> str:
        return tables.table("t", x, [(i + shift) % 2 for i in range(20)], **{**base, **changes}).digest

    others = [digest(rows + 1), digest(shift=1), digest(features=("u", "w")), digest(classes=("a", "c"))]
    others += [digest(seed=1), digest(fractions=(0.6, 0.2, 0.2))]
    assert digest() == digest()
    assert len({digest(), *others}) == 7


def test_rows_that_do_not_fit_are_refused() -> None:
    rows = torch.zeros(4, 2)
    with pytest.raises(InputError, match=r"floating point \[N, D\], got torch.int64"):
        TensorTable(rows.long(), [0] * 4)
    with pytest.raises(InputError, match="got 4 rows and 3 labels"):
        TensorTable(rows, [0] * 3)
    with pytest.raises(InputError, match="NaN"):
        TensorTable(rows / 0, [0] * 4)
    with pytest.raises(InputError, match="a name of its own for each column"):
        tables.table("t", rows, [0, 1, 0, 1], classes=("a", "b"), features=("u", "u"))
    with pytest.raises(InputError, match=r"at least two classes are needed, got \['a'\]"):
        tables.table("t", rows, [0] * 4, classes=("a", "b"), features=("u", "v"))
    part = TensorTable(rows, [0] * 4)
    with pytest.raises(InputError, match="features must hold"):
        Data("images", ("a",), (1, 2, 2), part, part, part, "", ("u",))


# Networks -------------------------------------------------------------------------------------------------------------


def rows(count: int = 200, seed: int = 0) -> Tensor:
    """Columns of very different scales, one of them constant, one of two values."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=rng) * torch.tensor([1, 1e4, 1e-3, 0, 1]) + torch.tensor([0, 5e4, 1, 0.1, 0])
    x[:, 4] = (x[:, 4] > 0).float()
    return x


def test_standardisation_is_that_of_scikit_learn() -> None:
    from sklearn.preprocessing import StandardScaler

    x = rows()
    model = models.build("linear", in_features=5)
    assert isinstance(model, models.TableClassifier)
    assert model.standardise(x) is model
    scaler = StandardScaler().fit(x.double().numpy())
    np.testing.assert_allclose(model.mean[0].numpy(), scaler.mean_, rtol=1e-6)
    np.testing.assert_allclose(model.std[0].numpy(), scaler.scale_, rtol=1e-6)
    assert model.std[0, 3] == 1, "a constant column is not divided by nothing"
    expected = model.net(torch.from_numpy(scaler.transform(x.double().numpy())).float())
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def test_an_mlp_has_the_layers_asked_for() -> None:
    model = models.load("mlp", in_features=3, num_classes=4, hidden=[7, 5], activation="relu")
    kinds = [type(layer).__name__ for layer in model.net]  # type: ignore[arg-type]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert [tuple(p.shape) for p in model.net.parameters() if p.dim() == 2] == [(7, 3), (5, 7), (4, 5)]
    assert not model.training
    assert isinstance(models.build("mlp").net[1], torch.nn.Softplus)


def test_a_model_of_a_table_is_rebuilt_from_its_spec() -> None:
    model = models.build("mlp", in_features=3, num_classes=4, hidden=(7,), seed=3)
    assert model.spec is not None
    assert model.spec.options == {"in_features": 3, "num_classes": 4, "hidden": (7,)}
    again = models.build(model.spec, seed=3)
    x = rows()[:, :3]
    assert torch.equal(model(x), again(x))
    assert not torch.equal(model(x), models.build(model.spec, seed=4)(x))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"in_channels": 3}, "model 'mlp' has no option in_channels; it has: num_classes, in_features, hidden"),
        ("small-cnn", {"in_features": 3}, "model 'small-cnn' has no option in_features"),
        ("mlp", {"in_features": 0}, "in_features must be an integer of at least 1"),
        ("mlp", {"hidden": ()}, "hidden must hold widths of at least 1"),
        ("mlp", {"hidden": (4, 0)}, "hidden must hold widths of at least 1"),
        ("mlp", {"activation": "gelu"}, "activation must be one of"),
    ],
)
def test_options_that_a_model_does_not_have_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.load(name, **options)
    with pytest.raises(InputError, match=message):
        models.build(name, **options)


def test_rows_of_another_width_are_refused_by_the_model() -> None:
    model = models.build("linear", in_features=3)
    for bad in (torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 3, 4, 4)):
        with pytest.raises(InputError, match=r"x must have shape \[B, 3\], the columns that linear takes"):
            model(bad)
    with pytest.raises(InputError, match="finite rows"):
        model.standardise(torch.zeros(0, 3))  # type: ignore[union-attr]


def xor(count: int = 400) -> Data:
    """Two columns of thousands whose signs, taken together, are the class."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=rng) * 1000 + 5000
    y = ((x[:, 0] > 5000) ^ (x[:, 1] > 5000)).long().tolist()
    return tables.table("xor", x, y, classes=("same", "other"), features=("a", "b"))


def accuracy(model: torch.nn.Module, d: Data) -> float:
    x, y = data.stack(d.test)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def test_a_recipes_table_model_is_standardised_then_trained() -> None:
    d = xor()
    settings = Model("mlp", train=Training(epochs=30, batch_size=32, lr=2e-2))
    model = classifier(settings, d, 0, Session(), "xor")
    assert isinstance(model, models.TableClassifier)
    x, _ = data.stack(d.train)
    torch.testing.assert_close(model.mean, x.mean(0, keepdim=True))
    assert accuracy(model, d) > 0.9
    assert accuracy(classifier(Model("linear", train=settings.train), d, 0, Session(), "l"), d) < 0.75
    raw = models.build("mlp", in_features=2)
    fit(raw, cross_entropy, d.train, Training(epochs=30, batch_size=32, lr=2e-2), name="raw")
    assert accuracy(raw, d) < accuracy(model, d), "thousands reach an mlp unscaled"


def test_a_recipes_weights_keep_their_standardisation(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    d = xor()
    trained = models.build("mlp", in_features=2)
    trained.standardise(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))  # type: ignore[union-attr]
    save_file(trained.state_dict(), str(tmp_path / "w.safetensors"))
    again = classifier(Model("mlp", weights=str(tmp_path / "w.safetensors")), d, 0, Session(), "xor")
    assert again.mean.tolist() == [[1.0, 3.0]]  # type: ignore[operator, union-attr]
    x, _ = data.stack(d.test)
    assert torch.equal(again(x), trained(x))


def test_a_table_system_is_saved_with_its_standardisation(tmp_path: Path) -> None:
    model = models.build("mlp", in_features=5, hidden=(6,))
    model.standardise(rows())  # type: ignore[union-attr]
    loaded = System.load(System(model, Gradient(model)).save(tmp_path))
    assert isinstance(loaded.model, models.TableClassifier)
    assert torch.equal(loaded.model(rows()), model(rows()))


def test_a_table_models_gradient_agrees_with_finite_differences() -> None:
    model = models.build("mlp", in_features=5, hidden=(6,))
    model.standardise(rows())  # type: ignore[union-attr]
    x = rows(3, seed=1).double().requires_grad_()
    step = model.double().std[0] * 1e-5  # type: ignore[operator, union-attr]
    (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    for j in range(5):
        shift = torch.zeros(5, dtype=torch.float64)
        shift[j] = step[j]
        with torch.no_grad():
            slope = (model(x + shift) - model(x - shift))[:, 1] / (2 * step[j])
        torch.testing.assert_close(gradient[:, j], slope, rtol=1e-6, atol=1e-12)
