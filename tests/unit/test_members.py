"""Member lists (addresses of all parts): all formats, and for each error the message that says what to fix."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.config import Config
from rtp_llm.errors import ConfigError, ExitCode
from rtp_llm.parallel.members import Member, read_members

TWO = {
    "x_part0": {"name": "x_part0", "ip": "11.161.48.116", "port": 10000},
    "x_part1": {"name": "x_part1", "ip": "11.161.48.116", "port": 20000},
}
TWO_MEMBERS = (Member(0, "x_part0", "11.161.48.116", 10000), Member(1, "x_part1", "11.161.48.116", 20000))
STRING = "name:x_part0,ip:11.161.48.116,port:10000;name:x_part1,ip:11.161.48.116,port:20000"


def config(**settings: Any) -> Config:
    return Config.model_validate(settings)


def inline(text: str, **settings: Any) -> tuple[Member, ...]:
    return read_members(config(json_gang_parts=text, **settings))


def error_message(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read_members(config(**settings))
    assert caught.value.exit_code == ExitCode.BAD_CONFIG
    return str(caught.value)


def error_message_of(table: Any) -> str:
    return error_message(json_gang_parts=table if isinstance(table, str) else json.dumps(table))


def test_the_documented_file(tmp_path: Path) -> None:
    file = tmp_path / "gang.json"
    file.write_text(json.dumps(TWO))
    assert read_members(config(distribute_config_file=str(file))) == TWO_MEMBERS


def test_inline_json_and_string_give_the_same_members() -> None:
    assert inline(json.dumps(TWO)) == TWO_MEMBERS
    assert read_members(config(gang_config_string=STRING)) == TWO_MEMBERS
    assert read_members(config(gang_config_string=f" {STRING.replace(';', ' ; ').replace(',', ', ')};")) == TWO_MEMBERS


def test_file_overrides_string_overrides_inline_json(tmp_path: Path) -> None:
    file = tmp_path / "gang.json"
    file.write_text('{"a_part0": {"ip": "10.0.0.1"}}')
    other = {"gang_config_string": STRING, "json_gang_parts": '{"b_part0": {"ip": "10.0.0.2"}}'}
    assert read_members(config(distribute_config_file=str(file), **other))[0].name == "a_part0"
    assert read_members(config(**other)) == TWO_MEMBERS


def test_no_list_gives_no_members() -> None:
    assert read_members(config()) == ()


def test_parts_are_sorted_numerically() -> None:
    table = {f"x_part{n}": {"ip": f"10.0.0.{n}"} for n in (10, 2, 0, 1, 9, 3, 8, 4, 7, 5, 6)}
    members = inline(json.dumps(table))
    assert [m.index for m in members] == list(range(11))
    assert [m.ip for m in members] == [f"10.0.0.{n}" for n in range(11)]


def test_port_defaults_to_that_of_part_0() -> None:
    table = '{"x_part0": {"ip": "a", "port": 12345}, "x_part1": {"ip": "b"}}'
    assert [m.port for m in inline(table)] == [12345, 12345]


def test_port_of_part_0_defaults_to_start_port() -> None:
    assert [m.port for m in inline('{"x_part0": {"ip": "a"}, "x_part1": {"ip": "b"}}', start_port=11111)] == [11111] * 2


def test_name_is_optional() -> None:
    assert inline('{"x_part0": {"ip": "a", "port": 2000}}') == (Member(0, "x_part0", "a", 2000),)


def test_zone_name_filters_members() -> None:
    table = {f"x_{zone}_part{n}": {"ip": f"{zone}{n}"} for zone in ("east", "west") for n in (0, 1)}
    assert [m.ip for m in inline(json.dumps(table), zone_name="west")] == ["west0", "west1"]
    text = error_message(json_gang_parts=json.dumps(table), zone_name="north")
    assert (
        text
        == "JSON_GANG_PARTS (ZONE_NAME=north): no member ends in _part0; there must be exactly one, it serves the API"
    )
    assert "are both part 0" in error_message_of(table)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ('{"x_part0": {"ip": "a"} "x_part1": 1}', "line 1, column 25"),
        ('{\n  "x_part0": {"ip": "a" "port": 1}\n}', "line 2, column 25"),
        ("", "line 1, column 1"),
        ('{"x_part0": {"ip": "a"}} {}', "line 1, column 26"),
        ("{'x_part0': 1}", "line 1, column 2"),
    ],
)
def test_malformed_json_is_reported_with_its_position(tmp_path: Path, text: str, position: str) -> None:
    file = tmp_path / "gang.json"
    file.write_text(text)
    assert f"DISTRIBUTE_CONFIG_FILE {file}: malformed JSON at {position}" in error_message(
        distribute_config_file=str(file)
    )


@pytest.mark.parametrize("text", ["[]", "{}", "1", "null", '"x_part0"'])
def test_json_that_is_not_an_object_is_rejected(text: str) -> None:
    assert "must be a JSON object of members" in error_message_of(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"x_part0": {"ip": "a"}, "x_part0": {"ip": "b"}}', "duplicate key 'x_part0'"),
        ('{"x_part0": {"ip": "a", "ip": "b"}}', "duplicate key 'ip'"),
        ('{"x_part0": {"name": "y_part0", "ip": "a"}}', "member 'x_part0': its name is 'y_part0'; key and name"),
        ('{"x_part0": "10.0.0.1"}', "member 'x_part0': is \"10.0.0.1\"; allowed: an object with name, ip and port"),
        ('{"x_part0": {"ip": "a", "prot": 1}}', "member 'x_part0': unknown field 'prot'; allowed: name, ip, port"),
        ('{"x_part0": {}}', "member 'x_part0': ip is null; allowed: an address or host name as text"),
        ('{"x_part0": {"ip": ""}}', "member 'x_part0': ip is \"\""),
        ('{"x_part0": {"ip": 10}}', "member 'x_part0': ip is 10"),
        ('{"x_part0": {"ip": "http://a"}}', "member 'x_part0': ip is \"http://a\""),
        ('{"x_part0": {"ip": "a", "port": "10000"}}', 'port is "10000"; allowed: an integer from 1 to 65535 without'),
        ('{"x_part0": {"ip": "a", "port": 0}}', "port is 0"),
        ('{"x_part0": {"ip": "a", "port": 65536}}', "port is 65536"),
        ('{"x_part0": {"ip": "a", "port": true}}', "port is true"),
        ('{"x_part0": {"ip": "a", "port": 1.5}}', "port is 1.5"),
        ('{"x_part0": {"ip": "a"}, "x": {"ip": "b"}}', "member 'x': the name must end in part<N>, as in 'x_part0'"),
        ('{"x_part1": {"ip": "a"}}', "no member ends in _part0; there must be exactly one"),
        ('{"x_part0": {"ip": "a"}, "x_part2": {"ip": "b"}}', "part 1 is missing; parts must be numbered 0 … 2"),
        ('{"x_part0": {"ip": "a"}, "y_part0": {"ip": "b"}}', "'x_part0' and 'y_part0' are both part 0"),
        ('{"x_part0": {"ip": "a"}, "x_part00": {"ip": "b"}}', "'x_part0' and 'x_part00' are both part 0"),
    ],
)
def test_invalid_member_is_named(text: str, expected: str) -> None:
    message = error_message_of(text)
    assert message.startswith("JSON_GANG_PARTS: ")
    assert expected in message


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"x_part0": {"ip": "a"}, "x_part99999999999": {"ip": "b"}}', id="index"),
        pytest.param('{"x_part0": {"ip": "a"}, "x_part%s": {"ip": "b"}}' % ("9" * 5000), id="index-of-5000-digits"),
        pytest.param('{"x_part0": {"ip": "a", "port": %s}}' % ("9" * 5000), id="port-of-5000-digits"),
        pytest.param("[" * 100000, id="depth"),
    ],
)
@pytest.mark.timeout(10)
def test_oversized_input_is_rejected_fast(text: str) -> None:
    error_message_of(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name:x_part0,ip", "'ip' is not key:value"),
        ("name:x_part0,ip:a,ip:b", "duplicate key 'ip' in 'name:x_part0,ip:a,ip:b'"),
        ("name:x_part0,ip:a;name:x_part0,ip:b", "two members have the same name"),
        (";;", "contains no member"),
        ("ip:a,port:10000", "member '': the name must end in part<N>"),
        ("name:x_part0,ip:a,port:many", 'port is "many"'),
        ("name:x_part0,ip:a,port:", 'port is ""'),
        ("name:x_part0,ip:a,prot:1", "unknown field 'prot'"),
        (f"name:x_part0,ip:a,port:{'9' * 5000}", "port is"),
    ],
)
def test_invalid_string_is_reported(text: str, expected: str) -> None:
    message = error_message(gang_config_string=text)
    assert message.startswith("GANG_CONFIG_STRING: ")
    assert expected in message


def test_ipv6_address_is_rejected() -> None:
    message = error_message(gang_config_string="name:x_part0,ip:fd00::7,port:10000")
    assert "ip is 'fd00::7'; IPv6 is not supported yet" in message


def test_wildcard_address_is_rejected() -> None:
    message = error_message(gang_config_string="name:x_part0,ip:0.0.0.0,port:10000")
    assert "ip is '0.0.0.0'; allowed: the address of one machine" in message


def test_unreadable_file_is_reported_with_the_reason(tmp_path: Path) -> None:
    missing = tmp_path / "none.json"
    assert error_message(distribute_config_file=str(missing)) == (
        f"DISTRIBUTE_CONFIG_FILE {missing}: cannot be read: No such file or directory"
    )
    assert "Is a directory" in error_message(distribute_config_file=str(tmp_path))
    latin = tmp_path / "latin.json"
    latin.write_bytes(b'{"x_part0": {"ip": "\xe4"}}')
    assert "not UTF-8 text" in error_message(distribute_config_file=str(latin))


# Any text gives members or ConfigError.

NAMES = st.sampled_from(["x_part0", "x_part1", "x_part2", "x_part10", "y_part1", "part0", "x_part", "", "x_part0\n"])
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | NAMES
ENTRIES = st.dictionaries(st.sampled_from(["name", "ip", "port", "host"]), VALUES | st.integers(1, 65535), max_size=4)
GOOD = st.fixed_dictionaries({"ip": st.sampled_from(["a", "10.0.0.1"])}, optional={"port": st.integers(1, 65535)})
TABLES = st.dictionaries(NAMES | st.text(max_size=6), GOOD | ENTRIES | VALUES, max_size=4)


def assert_members_or_config_error(**settings: Any) -> None:
    try:
        members = read_members(config(**settings))
    except ConfigError:
        return
    assert [m.index for m in members] == list(range(len(members)))
    assert all(m.ip and 1 <= m.port <= 65535 for m in members)


@settings(max_examples=300, deadline=None)
@given(TABLES)
def test_any_table_gives_members_or_config_error(table: dict[str, Any]) -> None:
    assert_members_or_config_error(json_gang_parts=json.dumps(table) or " ")


@settings(max_examples=150, deadline=None)
@given(st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)))
def test_any_json_gives_members_or_config_error(value: Any) -> None:
    assert_members_or_config_error(json_gang_parts=json.dumps(value))


@settings(max_examples=150, deadline=None)
@given(st.text(min_size=1) | st.text('{}[]":,0123456789name_ipart', min_size=1))
def test_any_text_gives_members_or_config_error(text: str) -> None:
    assert_members_or_config_error(json_gang_parts=text)
    assert_members_or_config_error(gang_config_string=text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["name", "ip", "port", ""]), NAMES | st.text(max_size=3)), max_size=8))
def test_any_string_of_pairs_gives_members_or_config_error(pairs: list[tuple[str, str]]) -> None:
    assert_members_or_config_error(gang_config_string=",".join(f"{key}:{value}" for key, value in pairs) + ";")


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=40))
def test_any_file_gives_members_or_config_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.json"
    file.write_bytes(content)
    assert_members_or_config_error(distribute_config_file=str(file))
