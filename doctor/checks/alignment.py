"""Builds the fix for parts whose settings, plans or member lists differ: which setting to change on which part."""

import json
from collections.abc import Mapping

# Fields of the plan whose variable has another name.
VARIABLES = {"port_stride": "WORKER_INFO_PORT_NUM", "device": "RTP_DEVICE"}


def alignment(differences: Mapping[str, Mapping[str, str]]) -> str:
    """Returns instructions for the user, one line per difference, such as "on part1: TP_SIZE=2   as on part0".

    `differences`: {name of the setting, such as "plan.tp_size": {"part0": value, …}}. The value to copy is that of the
    first part in the mapping (part0) or, for the entry of a part in the member list, that of this part itself.
    """
    lines = []
    for key, values in differences.items():
        kind, _, name = key.partition(".")
        owner = name if kind == "members" and name in values else next(iter(values))
        others = ", ".join(part for part, value in values.items() if value != values[owner])
        lines.append(f"on {others}: {_setting(kind, name, values[owner])}   as on {owner}")
    return "\n".join(lines)


def _setting(kind: str, name: str, value: str) -> str:
    if kind != "members":
        return f"{VARIABLES.get(name, name.upper())}={value}"
    if " " not in value:  # the list of its own part lacks the member
        return f"no {name} in the member list"
    member, address = value.split(" ")
    ip, _, port = address.rpartition(":")
    # Only part 0's address is compared, so that another part may come back under a new one.
    entry = {"name": member} | ({"ip": ip} if ip else {}) | {"port": int(port)}
    return f'"{member}": {json.dumps(entry)} in the member list'
