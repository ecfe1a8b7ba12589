"""Patterns are sets of names: exclusion wins, order does not matter, and an empty choice is an error."""

import pytest

from subspan.select import matcher, pick

NAMES = ("lm_head", "layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k", "layers.10.q")

ROWS: dict[str, tuple[str, ...]] = {
    "*": NAMES,
    "lm_head": ("lm_head",),
    "*.q": ("layers.0.q", "layers.1.q", "layers.10.q"),
    "layers.1.*": ("layers.1.q", "layers.1.k"),
    "layers.?.q": ("layers.0.q", "layers.1.q"),
    "layers.0.*|lm_head": ("lm_head", "layers.0.q", "layers.0.k"),
    " layers.0.* | lm_head ": ("lm_head", "layers.0.q", "layers.0.k"),
    "lm_head|": ("lm_head",),
    "!lm_head": NAMES[1:],
    "! lm_head": NAMES[1:],
    "!*.k|!lm_head": ("layers.0.q", "layers.1.q", "layers.10.q"),
    "*.q|!layers.0.*": ("layers.1.q", "layers.10.q"),
    "layers.0.q|!layers.0.*|*.k": ("layers.1.k",),
}


@pytest.mark.parametrize("pattern", ROWS)
def test_a_pattern_selects_exactly_these_names_in_their_order(pattern):
    assert pick(NAMES, pattern, what="site") == list(ROWS[pattern])


@pytest.mark.parametrize("pattern", ROWS)
def test_the_order_of_alternatives_does_not_matter(pattern):
    turned = "|".join(reversed(pattern.split("|")))
    assert pick(NAMES, turned, what="site") == list(ROWS[pattern])


@pytest.mark.parametrize("pattern", [p for p in ROWS if "!" not in p and p != "*"])
def test_an_exclusion_is_the_complement(pattern):
    refused = "|".join("!" + part.strip() for part in pattern.split("|") if part.strip())
    assert set(pick(NAMES, refused, what="site")) == set(NAMES) - set(ROWS[pattern])


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_name_selects_only_itself(name):
    assert pick(NAMES, name, what="site") == [name]


def test_case_counts():
    assert not matcher("LM_HEAD")("lm_head")


def test_a_function_is_its_own_test():
    def wanted(name: str) -> bool:
        return name.endswith("10.q")

    assert matcher(wanted) is wanted
    assert pick(NAMES, wanted, what="site") == ["layers.10.q"]


@pytest.mark.parametrize("pattern", ["", "  ", "|", " | ", "!"])
def test_an_empty_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="empty"):
        matcher(pattern)


def test_no_match_lists_what_exists():
    with pytest.raises(ValueError, match=r"'\*\.zz' matches no site; there are: lm_head, layers\.0\.q"):
        pick(NAMES, "*.zz", what="site")


def test_a_long_list_is_cut_and_counted():
    names = [f"site{i}" for i in range(20)]
    with pytest.raises(ValueError, match=r"site0, .*site7, \.\.\. \(20 in all\)"):
        pick(names, "zz", what="site")


def test_no_names_at_all_is_said():
    with pytest.raises(ValueError, match="none at all"):
        pick([], "*", what="site")
