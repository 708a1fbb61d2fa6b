"""Pages as trees, and checks that hold for each of them."""

import re
from xml.etree import ElementTree


def parsed(path):
    """Return the page as a tree, and its text; a strict reader refuses what is not escaped."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n")), text


def words_of(tree):
    return " ".join(" ".join(tree.itertext()).split())


def assert_self_contained(tree, text):
    for element in tree.iter():
        assert element.tag != "script"
        for name, value in element.attrib.items():
            if name in ("src", "href"):
                assert value.startswith("data:")
            assert not name.startswith("on")
    assert not re.search(r"url\(\s*['\"]?http", text)
