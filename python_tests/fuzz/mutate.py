"""Seeded damage: to bytes, to values of JSON, and to the fields of GGUF and safetensors headers."""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any

INTEGERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    15,
    16,
    31,
    64,
    255,
    1000,
    2**15,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
VALUES = [
    *(None, True, False, "", "x", "<s>", "▁", "\udc80", "é" * 40, [], {}, [[]], [None], {"a": 1}, [0, 1], ["a", "b"]),
    *(0.0, -1.0, 0.5, 1e-40, 1e40, float("inf"), float("nan"), 10**30, -(2**70)),
    *("silu", "llama3", "default", "LlamaForCausalLM", "bf16", "{{ messages }}", "{% for x in y %}", "{{ 1 / 0 }}"),
]  # fmt: skip


def damaged_bytes(random: Random, data: bytes, header: int) -> bytes:
    """One to four edits, most of them in the first ``header`` bytes."""
    edited = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        end = len(edited) if random.random() < 0.1 else min(header, len(edited))
        at, kind = random.randrange(max(end, 1)), random.randrange(7)
        if kind == 0 and edited:
            edited[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            edited[at : at + 1] = random.randbytes(1)
        elif kind == 2:
            edited[at : at + 8] = struct.pack("<Q", random.choice(INTEGERS) % 2**64)
        elif kind == 3:
            edited[at : at + 4] = struct.pack("<I", random.choice(INTEGERS) % 2**32)
        elif kind == 4:
            del edited[at : at + random.choice((1, 4, 8, 100))]
        elif kind == 5:
            edited[at:at] = edited[at : at + random.choice((1, 8, 64))]
        elif random.random() < 0.3:
            del edited[at:]
    return bytes(edited)


def odd_value(random: Random, value: Any) -> Any:
    """Another value in the place of ``value``."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and random.random() < 0.5:
        return random.choice(
            [value + 1, value - 1, -value, value * 2, value * 1000, value / 2, random.choice(INTEGERS)]
        )
    if isinstance(value, str) and value and random.random() < 0.5:
        at = random.randrange(len(value))
        return random.choice(
            [value[:at], value[at:], value * 2, value[:at] + "\0" + value[at:], value.upper(), value + " "]
        )
    return copy.deepcopy(random.choice([*VALUES, random.choice(INTEGERS)]))  # a list of VALUES is edited later


def damaged_json(random: Random, content: Any, donor: Any = None) -> Any:
    """A copy with one to four values replaced, removed, doubled or taken from elsewhere. donor: another document."""
    content = copy.deepcopy(content)
    for _ in range(random.choice((1, 1, 2, 4))):
        places = list(_places(content))
        if not places:
            return content
        # Half of the edits near the root: a vocabulary has most of the places.
        near = [place for place in places if place[2] <= 2]
        holder, key, _ = random.choice(near if near and random.random() < 0.5 else places)
        kind = random.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 1:
            holder[f"{key}x"] = holder.pop(key)
        elif kind == 2:
            holder[key] = copy.deepcopy(random.choice(places)[0])
        elif kind == 3 and donor is not None:
            other, there, _ = random.choice(list(_places(donor)))
            holder[key] = copy.deepcopy(other[there])
        else:
            holder[key] = odd_value(random, holder[key])
    return content


def _places(content: Any, depth: int = 1):
    """(holder, key, depth) of every value."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key, depth
        if depth < 6:
            yield from _places(value, depth + 1)


def json_bytes(random: Random, content: Any) -> bytes:
    """As a file; seldom damaged in its text too."""
    data = json.dumps(content, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    return damaged_bytes(random, data, len(data)) if random.random() < 0.1 else data


def damaged_safetensors(random: Random, data: bytes) -> bytes:
    """The header's fields damaged, its length right; or the bytes."""
    size = struct.unpack_from("<Q", data)[0]
    if random.random() < 0.3:
        return damaged_bytes(random, data, size + 8)
    header = damaged_json(random, json.loads(data[8 : 8 + size]))
    text = json_bytes(random, header)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


_CODES = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


def read_gguf(data: bytes) -> tuple[dict[str, list], list[list], int]:
    """{key: [type, value]}, tensors [name, dimensions, type, offset], and where the data begin; an array is [type, values]."""
    position = 24

    def scalar(code: str) -> Any:
        nonlocal position
        (value,) = struct.unpack_from("<" + code, data, position)
        position += struct.calcsize("<" + code)
        return value

    def text() -> str:
        nonlocal position
        size = scalar("Q")
        position += size
        return data[position - size : position].decode()

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            item, count = scalar("I"), scalar("Q")
            return [item, [value(item) for _ in range(count)]]
        return scalar(_CODES[kind])

    n_tensors, n_values = struct.unpack_from("<QQ", data, 8)
    metadata = {}
    for _ in range(n_values):
        key, kind = text(), scalar("I")
        metadata[key] = [kind, value(kind)]
    tensors = [[text(), [scalar("Q") for _ in range(scalar("I"))], scalar("I"), scalar("Q")] for _ in range(n_tensors)]
    return metadata, tensors, -(-position // 32) * 32


def write_gguf(metadata: dict[str, list], tensors: list[list], body: bytes) -> bytes:
    """The file. Values that do not fit their type take the nearest that does."""

    def scalar(kind: int, value: Any) -> bytes:
        code = _CODES.get(kind, "Q")
        try:
            return struct.pack("<" + code, value)
        except (struct.error, OverflowError):
            number = value if isinstance(value, (int, float)) and value == value and abs(value) < 2**70 else 0
            if code in "fd":
                return struct.pack("<" + code, number)
            return (int(number) % 2 ** (8 * struct.calcsize(code))).to_bytes(struct.calcsize(code), "little")

    def text(value: Any) -> bytes:
        data = str(value).encode("utf-8", "surrogateescape")
        return struct.pack("<Q", len(data)) + data

    def value(kind: int, content: Any) -> bytes:
        if kind == 8:
            return text(content)
        if kind == 9:
            item, items = content if isinstance(content, list) and len(content) == 2 else [4, []]
            item, items = item if isinstance(item, int) else 4, items if isinstance(items, list) else []
            return struct.pack("<IQ", item % 2**32, len(items)) + b"".join(value(item, each) for each in items)
        return scalar(kind, content)

    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, (kind, content) in metadata.items():
        out += [text(key), struct.pack("<I", kind % 2**32), value(kind, content)]
    for name, dimensions, kind, offset in tensors:
        out += [text(name), struct.pack("<I", len(dimensions)), *(scalar(10, each) for each in dimensions)]
        out += [scalar(4, kind), scalar(10, offset)]
    header = b"".join(out)
    return header + bytes(-len(header) % 32) + body


def damaged_gguf(random: Random, data: bytes) -> bytes:
    """Metadata and tensor entries damaged, the rest whole; or the bytes."""
    metadata, tensors, start = read_gguf(data)
    if random.random() < 0.3:
        return damaged_bytes(random, data, start)
    for _ in range(random.choice((1, 1, 2, 4))):
        key = random.choice(list(metadata))
        kind, value = metadata[key]
        choice = random.randrange(8)
        if choice == 0:
            del metadata[key]
        elif choice == 1:
            metadata[key] = [random.choice([*_CODES, 8, 9, 77]), value]
        elif choice == 2 and tensors:
            entry = random.choice(tensors)
            at = random.randrange(4)
            if at == 1:
                entry[at] = [odd_value(random, 64) for _ in range(random.randrange(5))]
            else:
                entry[at] = random.randrange(40) if at == 2 else odd_value(random, entry[at])
        elif choice == 3 and tensors:
            tensors.pop(random.randrange(len(tensors)))
        elif kind == 9 and isinstance(value, list) and value and isinstance(value[-1], list) and value[-1]:
            items = value[-1]
            at = random.randrange(len(items))
            edit = random.randrange(4)
            if edit == 0:
                del items[at:]
            elif edit == 1:
                items.append(items[at])
            else:
                items[at] = odd_value(random, random.choice(items))
        else:
            metadata[key] = [kind, odd_value(random, value)]
    return write_gguf(metadata, tensors, data[start:])
