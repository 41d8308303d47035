from __future__ import annotations

import pytest

from transfuse.core.errors import MissingExtraError, TransferError, nearest


def test_names_the_closest():
    assert nearest("temprature", ["temperature", "alpha"]) == "did you mean 'temperature'?"


def test_names_layers_that_end_alike():
    known = ["encoder.stages.0.attention", "head.norm"]
    assert nearest("a.norm", known) == "did you mean 'head.norm'?"


def test_lists_all_when_none_is_close_and_counts_many():
    assert nearest("zzz", ["b", "a"]) == "known: a, b."
    assert nearest("zzz", [f"layer{i}" for i in range(30)]).endswith("... (30 in all).")
    assert nearest("zzz", []) == "there are none."


def test_a_missing_extra_says_how_to_install_it():
    with pytest.raises(ImportError, match=r'reading tables needs pandas.*pip install "transfuse\[data\]"') as error:
        raise MissingExtraError("pandas", "data", "reading tables")
    assert isinstance(error.value, TransferError)
