"""The hardened YAML loader against YAML 1.2's core schema and hostile input."""

import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import RecipeError
from recipes.yaml_loader import RecipeDumper, dotted, parse_yaml


def value_of(text):
    return parse_yaml(f"x: {text}".encode(), "f.yaml").value["x"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # YAML 1.2.2, chapter 10.3.2 (core schema)
        ("1e-5", 1e-5),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("-12", -12),
        ("007", 7),
        ("0o17", 15),
        ("0xFF", 255),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        # what YAML 1.1 readers turn into something else
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("'1e-5'", "1e-5"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_scalars_follow_the_yaml_1_2_core_schema(text, expected):
    value = value_of(text)
    assert value == expected
    assert type(value) is type(expected)


def test_lines_of_keys_and_items():
    text = b"a: 1\nb:\n  # comment\n  c: 2\n  d:\n    - x\n    - e: 3\n"
    lines = parse_yaml(text, "f.yaml").lines
    assert {dotted(path): line for path, line in lines.items()} == {
        "a": 1, "b": 2, "b.c": 4, "b.d": 5, "b.d.0": 6, "b.d.1": 7, "b.d.1.e": 7,
    }  # fmt: skip


def test_empty_text_has_no_value():
    assert parse_yaml(b"", "f.yaml").value is None


def test_all_wrong_keys_are_reported_with_their_lines():
    text = b"a: 1\na: 2\n1: x\nb:\n  c: 1\n  c: 2\n<<: {d: 1}\n"
    problems = parse_yaml(text, "f.yaml").problems
    assert [(p.where, p.key) for p in problems] == [
        ("f.yaml:2", "a"), ("f.yaml:3", ""), ("f.yaml:6", "b.c"), ("f.yaml:7", ""),
    ]  # fmt: skip
    assert "line 1" in problems[0].message


def bomb():
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 12)]
    return "\n".join(rows).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bomb(), "Aliases expand"),
        (b"a: &a [*a]", "deeper"),
        (b"[" * 100_000, "deeper"),
        (b"{a: " * 100_000, "deeper"),
        (b"- " * 100_000, "deeper"),
        (b"x: '" + b"y" * 1_000_001 + b"'", "at most 1 MB"),
        (b"[" + b"1," * 20_000 + b"]", "more than 10,000"),
        (b"a:\n\tb: 1", "tab"),
        (b"\xef\xbb\xbfa: 1", "byte order mark"),
        ("a: 1".encode("utf-16"), "byte order mark"),
        (b"a: \0", "NUL"),
        (b'a: "\\0"', "NUL"),
        (b'a: "\\uD800"', "half a character"),
        (b'a: "\\UFFFFFFFF"', "not valid YAML"),
        (b"a: \xff", "not UTF-8"),
        (b"a: [1", "not valid YAML"),
        (b"a: 1\n---\nb: 2", "not valid YAML"),
        (b"a: *nowhere", "not valid YAML"),
        (b"a: !!python/object/apply:os.system [ls]", "not allowed"),
        (b"a: !!binary aGk=", "not allowed"),
        (b"a: !!set {x}", "not allowed"),
        (b"a: !!int abc", "not a int"),
        (b"a: " + b"9" * 30, "64 bits"),
        (b"a: " + b"9" * 10_000, "40 digits"),
    ],
)
def test_hostile_text_is_refused_quickly(data, message):
    start = time.perf_counter()
    with pytest.raises(RecipeError, match=message) as caught:
        parse_yaml(data, "f.yaml")
    assert time.perf_counter() - start < 5  # the bound is one second on an idle core
    assert str(caught.value).startswith("f.yaml")
    assert "Fix: " in str(caught.value)


def test_tab_is_named_with_its_line():
    with pytest.raises(RecipeError, match=r"^f\.yaml:3"):
        parse_yaml(b"a:\n  b: 1\n \tc: 1\n", "f.yaml")


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False)
    | text
    | st.sampled_from(["1e-5", "no", "true", "null", "~", "", ".inf", "0o7", "<", "- a", "a: b"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(text.filter(lambda key: key != "<<"), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(values)
@settings(max_examples=300, deadline=None)
def test_dumped_values_load_to_the_same_values(value):
    dumped = yaml.dump({"x": value}, Dumper=RecipeDumper, allow_unicode=True, sort_keys=False)
    document = parse_yaml(dumped.encode(), "f.yaml")
    assert document.problems == []
    loaded = document.value["x"]
    assert repr(loaded) == repr(value)  # repr tells 1, 1.0 and True apart


@given(
    st.binary(max_size=300)
    | st.text(alphabet="ab:-[]{}&*!|>'\"\\#%@`? \n\t0159.e<,~", max_size=200)
)
@settings(max_examples=500, deadline=None)
def test_only_recipe_errors_escape(data):
    data = data.encode() if isinstance(data, str) else data
    explained = None
    try:
        parse_yaml(data, "f.yaml")
    except RecipeError as error:
        explained = error
    assert explained is None or explained.problems
