"""Reading YAML from anywhere: what it may refer to, and what ends at once."""

import math

import pytest

from tim.typed_yaml import ConfigError, read_tree


def read(folder, text, *overrides):
    """The tree of a file with this text."""
    (folder / "file.yaml").write_text(text, encoding="utf-8")
    return read_tree(folder / "file.yaml", overrides)


def test_values_are_those_that_people_mean(tmp_path):
    text = "a: 1e-4\nb: -.5\nc: 10\nd: 2026-01-31\ne: [1.5, true, null, 0x10]\nf: .inf\ng: é\nh: 1_000.5\n"
    want = {
        "a": 1e-4,
        "b": -0.5,
        "c": 10,
        "d": "2026-01-31",
        "e": [1.5, True, None, 16],
        "f": math.inf,
        "g": "é",
        "h": 1000.5,
    }
    assert read(tmp_path, "\ufeff" + text) == want
    assert read(tmp_path, text, "a=3", "e=", "g=a=b", "x.y={z: [1]}") == want | {
        "a": 3,
        "e": None,
        "g": "a=b",
        "x": {"y": {"z": [1]}},
    }


def test_references_lead_to_other_keys(tmp_path):
    text = "a: {b: 3, c: [x, y]}\nwhole: ${a.b}\npart: n-${a.b}-${a.c.1}\nmapping: ${a}\nchain: ${part}\n"
    (tmp_path / "base.yaml").write_text(text)
    tree = read(tmp_path, "base: base.yaml\na: {b: 4}\n", "own=${whole}")
    assert (tree["whole"], tree["part"], tree["chain"], tree["own"]) == (4, "n-4-y", "n-4-y", 4) and tree["mapping"] == tree[
        "a"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a: ${oc.env:HOME}",
        "a: ${oc.env:ABSENT,default}",
        "a: ${oc.decode:'1'}",
        "a: ${b${c}}\nc: x",
        "a: ${${b}:HOME}\nb: oc.env",
        "a: '$${b}'\nb: '{oc.env:HOME}'",
        "a: ${b",
    ],
)
def test_nothing_is_asked_of_the_environment(tmp_path, text):
    with pytest.raises(ConfigError, match=r"a=.*(only \$\{a\.b\}, another key, is known|there is no)"):
        read(tmp_path, text)


def doubling(line: str, last: str) -> str:
    """Thirty keys, each of which is the one after it twice or more."""
    return "\n".join([*(line.format(k=k, n=k + 1) for k in range(30)), last])


@pytest.mark.parametrize(
    "text,match",
    [
        ("a: &a0 [x]\n" + "\n".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}, *a{k - 1}]" for k in range(1, 30)), "aliases count"),
        ("a: &a0 {x: 1}\n" + "\n".join(f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}]}}" for k in range(1, 30)), "aliases count"),
        ("a: &a [*a]", "in each other"),
        (doubling("k{k}: ${{k{n}}}${{k{n}}}", "k30: x"), "references count|letters"),
        (doubling("k{k}: {{a: '${{k{n}}}', b: '${{k{n}}}'}}", "k30: x"), "references count"),
        ("a: " + "[" * 60 + "]" * 60, "in each other"),
        ("a: " + "[" * 20000, "not valid YAML"),
        ("a: ${b}\nb: ${c}\nc: ${a}", "leads back to itself"),
        ("a: {b: '${a}'}", "leads back to itself"),
        ("a: " + "x" * 5000, "5000 letters"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 1\n" * 2, "the key 'a' stands twice"),
        ("\n".join(f"{k}: 1" for k in range(20000)) + "\n1: 1", "the key '1' stands twice"),
        ("a: " + "x" * 300000, "300003 bytes"),
        ("a: [" + "1," * 25000 + "]", "more than 20000 values"),
        ("1: x", "the key 1 in it is no word"),
        ("a: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
    ],
    ids=lambda value: value[:12] if len(value) > 40 else None,
)
def test_what_grows_without_end_is_one_error(tmp_path, text, match):
    with pytest.raises(ConfigError, match=match) as error:
        read(tmp_path, text)
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


def test_overrides_are_no_way_around(tmp_path):
    with pytest.raises(ConfigError, match="only"):
        read(tmp_path, "a: 1", "b=${oc.env:HOME}")
    with pytest.raises(ConfigError, match="in each other"):
        read(tmp_path, "a: 1", f"{'a.' * 500}b=1")


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "file.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match=r"file\.yaml is not valid YAML: .*utf-8"):
        read_tree(tmp_path / "file.yaml")
