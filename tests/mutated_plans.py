"""Plan files with random damage, for tests and for `benchmarks/plan_file.py`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

VALUES = (
    None,
    True,
    0,
    1,
    -1,
    10**9,
    10**18,
    2**63,
    10**400,
    0.5,
    -0.0,
    1e308,
    "",
    "0F0",
    "gpu0:x.s1.j0.m0",
    "gpu99999999:weights.j0.s0",
    "host:gradients.j0.s0",
    "FB",
    "h2d",
    "e1",
    [],
    {},
    [[]],
    [0, 1],
    {"a": 1},
)


def mutate(content: bytes, random: random.Random) -> bytes:
    """One damaged copy of a file: bytes changed, or one to three places of its JSON."""
    if random.random() < 0.2:
        return _bytes(content, random)
    tree = json.loads(content)
    for _ in range(random.randint(1, 3)):
        _change(tree, random)
    return json.dumps(tree).encode()


def _bytes(content: bytes, random: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(random.randint(1, 5)):
        place = random.randrange(len(damaged))
        if random.random() < 0.5:
            damaged[place] = random.randrange(256)
        else:
            del damaged[place : place + random.randint(1, 50)]
        if not damaged:
            break
    return bytes(damaged[: random.randrange(len(damaged) + 1)] if random.random() < 0.2 else damaged)


def _change(tree: Any, random: random.Random) -> None:
    parent: Any = None
    key: Any = None
    node: Any = tree
    while isinstance(node, dict | list) and node and (parent is None or random.random() < 0.85):
        parent = node
        key = random.choice(list(node)) if isinstance(node, dict) else random.randrange(len(node))
        node = parent[key]
    kind = random.random()
    if kind < 0.15:
        del parent[key]
    elif kind < 0.3 and isinstance(parent, list):
        parent.insert(random.randrange(len(parent) + 1), parent[random.randrange(len(parent))])
    elif kind < 0.45 and isinstance(node, int) and not isinstance(node, bool):
        parent[key] = node + random.choice((-1, 1, 7, -(10**6)))
    elif kind < 0.5 and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    else:
        parent[key] = random.choice(VALUES)
