"""Commands that make the parts agree if their settings, plans or member lists differ."""

import json
from collections.abc import Mapping

# Fields of the plan whose variable has another name.
VARIABLES = {"port_stride": "WORKER_INFO_PORT_NUM", "device": "RTP_DEVICE"}


def alignment(differences: Mapping[str, Mapping[str, str]]) -> str:
    """Returns what to set on which part, one line per difference. `differences`: {dotted name: {part label: value}}.

    For a member's address, the value of that member's own part is taken as correct; for all other settings, part 0's.
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
