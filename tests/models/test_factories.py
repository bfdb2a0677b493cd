from __future__ import annotations

import json

import pytest

from memopt.errors import UsageError
from memopt_models.factories import load_factory


def test_name_stands_for_the_function() -> None:
    assert load_factory("json:dumps") is json.dumps


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere:f",
            "'nowhere:f' cannot be imported: No module named 'nowhere'; hint: pkg.mod:function, with pkg on PYTHONPATH",
        ),
        ("..relative:f", "'..relative:f' cannot be imported"),
        (":f", "':f' cannot be imported"),
        ("json:", "module 'json' has no ''"),
        ("json:dump:s", "module 'json' has no 'dump:s'"),
        ("math:e", "'math:e' is a float, not a function"),
    ],
)
def test_what_is_no_function_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_factory(name)
    assert message in str(raised.value)
