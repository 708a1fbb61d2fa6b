from dmgen.table import aligned


def test_columns_are_as_wide_as_their_widest_cell():
    table = aligned([["a", "bb", "c"], ["aaa", "b", "c"]])
    assert table == "a    bb  c\naaa  b   c"


def test_a_row_may_be_short_and_no_line_ends_in_spaces():
    assert aligned([["a", "", ""], ["aa", "b"], []]) == "a\naa  b\n"
    assert aligned([]) == ""
