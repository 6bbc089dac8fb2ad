"""Generated files: mutations of a valid one, by bytes or by the grammar of its format."""

import csv
import io
import json
import re
import struct
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

LONG = "x" * 200_000
DEEP = 100_000  # levels; parsers of any language stop before
HUGE = 10**400  # beyond float64; 401 digits
# Texts that mean something to a parser, a shell, a browser, a terminal or a file system.
ODD_TEXTS = (
    *("", " ", "nan", "-inf", "1e999", "-0", "0x1F", "1_000", "１２", "NULL", "~", "yes"),
    *("\0", "\ud800", "\udcff", "\ufeff", "\u202e", "\x1b[2J", "\r\n", "\t", "'", '"', "\\"),
    *("/dev/zero", "../../../etc/passwd", "a/" * 3000, LONG, "<script>alert(1)</script>"),
    *("$(touch hacked)", "`touch hacked`", "; touch hacked", "%s%n", "{0.__class__}", "=1+1"),
    *("!!python/object/apply:os.system ['touch hacked']", "__import__('os').abort()"),
    *(
        "[" * DEEP,
        "{" * DEEP,
        "- " * 50_000,
        " " * 100_000,
        "_" * 100_000,
        '{"a":' * DEEP,
        "&a [*a]",
        "<<: *a",
        "λ",
        "é",
        "🧠",
    ),
    *("9" * 5000, "1" + "0" * 400, "-" + "9" * 30, "b0000.npy", "float32"),
)
SPECIAL = (-0.0, 2.5, 1e308, float("nan"), float("inf"), -float("inf"), True, False)
NUMBERS = st.sampled_from((*SPECIAL, 0, -1, 1, 2, 2**31, 2**53, 2**63, 2**64, HUGE, -HUGE))
SCALARS = NUMBERS | st.none() | st.sampled_from(ODD_TEXTS) | st.text(max_size=20)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
PLACES = st.floats(0, 1, exclude_max=True)
BOM = "\ufeff".encode()


@st.composite
def changed_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Return a valid file after one to four changes at arbitrary places."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = int(draw(PLACES) * len(content))
        kind = draw(st.sampled_from(("flip", "set", "remove", "double", "insert", "end", "zeros")))
        length = draw(st.integers(1, 64))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "remove":
            del content[at : at + length]
        elif kind == "double":
            content[at:at] = content[at : at + length]
        elif kind == "insert":
            text = draw(st.sampled_from(ODD_TEXTS) | st.text(max_size=20))
            content[at:at] = text.encode("utf-8", "surrogatepass")
        elif kind == "end":
            del content[at:]
        else:
            content[at : at + length] = bytes(length)
    return bytes(content)


def recoded(valid: bytes) -> st.SearchStrategy[bytes]:
    """Return a valid text in other encodings and with other line breaks, or no text at all."""
    text = valid.decode()
    return st.sampled_from(
        (
            b"",
            BOM,
            b"\0" * 1000,
            b"\n" * 100_000,
            BOM + valid,
            BOM + BOM + valid,
            text.encode("utf-16"),
            text.encode("utf-32"),
            text.replace("\n", "\r\n").encode(),
            text.replace("\n", "\r").encode(),
            text.replace("e", "é").encode("latin-1", "replace"),
            valid * 2,
            valid + b"\0",
            valid.rstrip(b"\n"),
        )
    )


@st.composite
def changed_numbers(draw: st.DrawFn, valid: bytes) -> bytes:
    """Return a valid text with one of its numbers replaced."""
    text = valid.decode()
    number = draw(st.sampled_from(list(re.finditer(r"-?\d+(\.\d+)?", text))))
    other = draw(NUMBERS.map(repr) | st.sampled_from(ODD_TEXTS))
    changed = text[: number.start()] + other + text[number.end() :]
    return changed.encode("utf-8", "surrogatepass")


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every list and dict of a tree with each of its indices and keys."""
    if isinstance(tree, dict | list):
        for place in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, place
            yield from _places(tree[place])


@st.composite
def changed_tree(draw: st.DrawFn, valid: Any) -> Any:
    """Return a tree of lists and dicts with one to three nodes replaced, removed or added."""
    tree = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            return tree
        node, place = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "rename")))
        if kind == "replace":
            node[place] = draw(VALUES)
        elif kind == "remove":
            del node[place]
        elif kind == "add" and isinstance(node, list):
            node.insert(place, draw(st.just(node[place]) | VALUES))
        elif isinstance(node, dict):
            node[draw(st.sampled_from(ODD_TEXTS) | st.text(max_size=8))] = draw(VALUES)
    return tree


def to_json(value: Any) -> bytes:
    """Write a tree as JSON, which is YAML too; lone surrogates stay, escaped or not."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def json_files(valid: bytes) -> st.SearchStrategy[bytes]:
    """Return files like a valid JSON file."""
    tree = json.loads(valid)
    return st.one_of(
        changed_bytes(valid),
        changed_numbers(valid),
        changed_tree(tree).map(to_json),
        changed_tree(tree).map(to_json),
        VALUES.map(to_json),
        recoded(valid),
    )


def yaml_files(valid: bytes, tree: Any) -> st.SearchStrategy[bytes]:
    """Return files like a valid YAML file; tree: its content."""
    pieces = (
        *("train", "extract", "lr", "seed", ": ", "- ", "\n", "\n  ", "[", "]", "{", "}", ", "),
        *("&a ", "*a", "<<: ", "!!int ", "!!float ", "!!binary ", "!!timestamp ", "!!set ", "? "),
        *("!!python/name:os.system ", "!!python/object/new:os.system [id]", "---\n", "...\n"),
        *("%YAML 1.1\n", "|\n", ">-\n", "# ", "'", '"', "1e3", "2001-01-01", ".inf", "0b1", "1:2"),
    )
    words = st.lists(st.sampled_from(pieces) | st.sampled_from(ODD_TEXTS), max_size=12)
    return st.one_of(
        changed_bytes(valid),
        changed_numbers(valid),
        changed_tree(tree).map(to_json),
        changed_tree(tree).map(to_json),
        words.map(lambda pieces: "".join(pieces).encode("utf-8", "surrogatepass")),
        recoded(valid),
    )


@st.composite
def changed_table(draw: st.DrawFn, valid: bytes) -> bytes:
    """Return a valid CSV file with cells, rows or columns replaced, removed, added or exchanged."""
    rows = list(csv.reader(io.StringIO(valid.decode())))
    for _ in range(draw(st.integers(1, 4))):
        if not rows:
            break
        row = draw(st.sampled_from(rows))
        other = draw(st.sampled_from(rows))
        kind = draw(st.sampled_from(("cell", "cell", "cell", "shorter", "longer", "row", "double")))
        if kind == "cell" and row:
            row[draw(st.integers(0, len(row) - 1))] = str(draw(SCALARS))
        elif kind == "shorter":
            del row[draw(st.integers(0, len(row))) :]
        elif kind == "longer":
            row.append(str(draw(SCALARS)))
        elif kind == "row":
            rows.remove(row)
        else:
            rows.append(other)
    text = io.StringIO()
    delimiter = draw(st.sampled_from(",,,,,;\t"))
    csv.writer(
        text, delimiter=delimiter, lineterminator=draw(st.sampled_from(("\n", "\r\n")))
    ).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def csv_files(valid: bytes) -> st.SearchStrategy[bytes]:
    """Return files like a valid CSV file."""
    cells = st.sampled_from(ODD_TEXTS) | st.text(max_size=10)
    lines = st.lists(st.lists(cells, max_size=5).map(",".join), max_size=6)
    return st.one_of(
        changed_bytes(valid),
        changed_numbers(valid),
        changed_table(valid),
        changed_table(valid),
        lines.map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")),
        recoded(valid),
    )


@st.composite
def safetensors_files(draw: st.DrawFn, valid: bytes) -> bytes:
    """Return files like a valid safetensors file: a length in 8 bytes, a JSON header, numbers."""
    (length,) = struct.unpack_from("<Q", valid)
    header = valid[8 : 8 + length]
    numbers = valid[8 + length :]
    kind = draw(st.sampled_from(("bytes", "header", "header", "tree", "tree", "length", "numbers")))
    if kind == "bytes":
        return draw(changed_bytes(valid))
    if kind == "header":
        header = draw(changed_bytes(header) | changed_numbers(header))
        length = len(header)
    elif kind == "tree":
        header = to_json(draw(changed_tree(json.loads(header))))
        length = len(header)
    elif kind == "length":
        length = draw(st.integers(0, 2**64 - 1) | st.sampled_from((0, 1, 2**31, 10**8, 10**8 + 1)))
    else:
        numbers = draw(changed_bytes(numbers))
    return struct.pack("<Q", length) + header + numbers


def command_lines(valid: list[list[str]], flags: list[str]) -> st.SearchStrategy[list[str]]:
    """Return words of a command line: those of a valid one, flags and odd texts, mixed."""
    # The system passes neither NUL nor characters that are not bytes of the locale.
    odd = [text for text in ODD_TEXTS if "\0" not in text and "\ud800" not in text]
    word = st.one_of(
        st.sampled_from(flags),
        st.sampled_from(odd),
        NUMBERS.map(repr),
        st.builds("{}={}".format, st.sampled_from(flags), st.sampled_from(odd)),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=10),
        st.sampled_from(
            ("-", "--", "-h", "--help", "-hx", "--no_live", "@x", "--=", "--no_", "-1")
        ),
    )

    @st.composite
    def mixed(draw: st.DrawFn) -> list[str]:
        words = list(draw(st.sampled_from(valid)))
        for _ in range(draw(st.integers(0, 5))):
            at = draw(st.integers(0, len(words)))
            if draw(st.booleans()):
                words.insert(at, draw(word))
            else:
                words[at : at + 1] = [draw(word)]
        return words

    return mixed() | st.lists(word, max_size=8)
