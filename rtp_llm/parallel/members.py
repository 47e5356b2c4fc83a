"""Reads the member list of a gang, with one entry (member) per part, from DISTRIBUTE_CONFIG_FILE, GANG_CONFIG_STRING or
JSON_GANG_PARTS.

All validation of this member list happens here, before the ranks start. Errors name the setting or file, the key and
the value.
"""

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rtp_llm import files
from rtp_llm.config import Config
from rtp_llm.errors import ConfigError

_invalid = partial(ConfigError, check="C-02")
_PART = re.compile(r"part([0-9]{1,6})\Z")


@dataclass(frozen=True)
class Member:
    """One part in the member list. `index`: the number N in its name `…_partN`. `ip`: address or host name under which
    other parts reach it. `port`: its HTTP port (START_PORT).
    """

    index: int
    name: str
    ip: str
    port: int


@dataclass(frozen=True)
class _RawMember:
    """A valid entry of the list. `port` is None if the entry does not set it."""

    name: str
    ip: str
    port: int | None


def read_members(config: Config) -> tuple[Member, ...]:
    """Returns the members (one per part) sorted by part number; empty if no member list is configured.

    Raises ConfigError that names the setting or file, the key and the allowed values.
    """
    if config.distribute_config_file:
        source = f"DISTRIBUTE_CONFIG_FILE {config.distribute_config_file}"
        entries = _parse_json(_read(Path(config.distribute_config_file)), source)
    elif config.gang_config_string:
        source = "GANG_CONFIG_STRING"
        entries = _parse_string(config.gang_config_string)
    elif config.json_gang_parts:
        source = "JSON_GANG_PARTS"
        entries = _parse_json(config.json_gang_parts, source)
    else:
        return ()
    if config.zone_name:
        entries = [e for e in entries if e.name.split("_")[-2:-1] == [config.zone_name]]
        source += f" (ZONE_NAME={config.zone_name})"
    return _sort_by_index(entries, source, config.start_port)


def _read(path: Path) -> str:
    try:
        return files.read(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise _invalid(f"DISTRIBUTE_CONFIG_FILE {path}: cannot be read: {reason}") from None


def _parse_json(text: str, source: str) -> list[_RawMember]:
    try:
        table = json.loads(text, object_pairs_hook=lambda pairs: _reject_duplicate_keys(pairs, source))
    except json.JSONDecodeError as error:
        raise _invalid(f"{source}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        raise _invalid(f"{source}: malformed JSON: {error}") from None
    if not isinstance(table, dict) or not table:
        raise _invalid(
            f'{source}: must be a JSON object of members: {{"x_part0": {{"name": "x_part0", "ip": "…", "port": …}}, …}}'
        )
    return [_raw_member(key, value, source) for key, value in table.items()]


def _reject_duplicate_keys(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise _invalid(f"{source}: duplicate key {key!r}: each member and each field may appear once")
        table[key] = value
    return table


def _parse_string(text: str) -> list[_RawMember]:
    source = "GANG_CONFIG_STRING"
    entries = []
    for chunk in filter(None, (c.strip() for c in text.split(";"))):
        fields: dict[str, Any] = {}
        for pair in chunk.split(","):
            key, colon, value = pair.strip().partition(":")
            if not colon:
                raise _invalid(f"{source}: {pair!r} is not key:value; allowed: name:x_part0,ip:…,port:…;…")
            if key in fields:
                raise _invalid(f"{source}: duplicate key {key!r} in {chunk!r}; each key may appear once")
            fields[key] = int(value) if key == "port" and re.fullmatch("[0-9]{1,9}", value) else value
        entries.append(_raw_member(str(fields.get("name", "")), fields, source))
    if len({e.name for e in entries}) != len(entries):
        raise _invalid(f"{source}: two members have the same name; each part needs its own …_partN")
    if not entries:
        raise _invalid(f"{source}: contains no member; allowed: name:x_part0,ip:…,port:…;name:x_part1,…")
    return entries


def _raw_member(key: str, value: Any, source: str) -> _RawMember:
    prefix = f"{source}: member {key!r}"
    if not isinstance(value, dict):
        raise _invalid(f"{prefix}: is {json.dumps(value)}; allowed: an object with name, ip and port")
    unknown = sorted(value.keys() - {"name", "ip", "port"})
    if unknown:
        raise _invalid(f"{prefix}: unknown field {unknown[0]!r}; allowed: name, ip, port")
    name = value.get("name", key)
    if name != key:
        raise _invalid(f"{prefix}: its name is {name!r}; key and name must be the same")
    ip = value.get("ip")
    if not isinstance(ip, str) or not ip.strip() or re.search(r"[\s/]", ip):
        raise _invalid(f"{prefix}: ip is {json.dumps(ip)}; allowed: an address or host name as text")
    if ip.strip() in ("0.0.0.0", "255.255.255.255"):
        raise _invalid(f"{prefix}: ip is {ip!r}; allowed: the address of one machine")
    if ":" in ip:
        raise _invalid(f"{prefix}: ip is {ip!r}; IPv6 is not supported yet; allowed: an IPv4 address or a host name")
    port = value.get("port")
    if port is not None and (isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535):
        raise _invalid(f"{prefix}: port is {json.dumps(port)}; allowed: an integer from 1 to 65535 without quotes")
    if not _PART.search(key):
        raise _invalid(f"{prefix}: the name must end in part<N>, as in 'x_part0'")
    return _RawMember(key, ip, port)


def _sort_by_index(entries: list[_RawMember], source: str, start_port: int) -> tuple[Member, ...]:
    """Returns the members (one per part) sorted by part number, so that part2 comes before part10.

    A member without a port gets part 0's, or START_PORT if part 0 has none. Raises ConfigError if a part number is
    missing or used twice.
    """
    by_index: dict[int, _RawMember] = {}
    for entry in entries:
        index = int(_PART.search(entry.name)[1])  # type: ignore[index]  # _raw_member has checked the pattern
        if index in by_index:
            raise _invalid(
                f"{source}: {by_index[index].name!r} and {entry.name!r} are both part {index};"
                " each part needs its own number"
            )
        by_index[index] = entry
    if 0 not in by_index:
        raise _invalid(f"{source}: no member ends in _part0; there must be exactly one, it serves the API")
    gaps = [i for i in range(max(by_index)) if i not in by_index]
    if gaps:
        raise _invalid(f"{source}: part {gaps[0]} is missing; parts must be numbered 0 … {max(by_index)} without gaps")
    default_port = by_index[0].port or start_port
    return tuple(Member(i, e.name, e.ip, e.port or default_port) for i, e in sorted(by_index.items()))
