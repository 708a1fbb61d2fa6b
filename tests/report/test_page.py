"""Templates: text is escaped, and a missing value is an error."""

import pytest
from jinja2 import UndefinedError

from dmgen.report.page import render


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError, match="title"):
        render("page.html")
