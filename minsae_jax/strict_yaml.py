"""Strict reading of YAML: no duplicate keys, no merge bombs, and 1e-5 is a number."""

import re
from typing import Any

import yaml

MAX_MERGED_KEYS = 10_000  # of one mapping, with all that its merge keys (<<) bring in
MERGE_TAG = "tag:yaml.org,2002:merge"


def load_yaml(text: str) -> Any:
    """Return the content of a YAML text. Raises many types of errors if it is invalid."""
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (YAML 1.2) and rejects duplicate keys and merge bombs.

    A chain of mappings, each merging the one before several times, grows exponentially. Sizes are
    therefore added up while nodes are composed, before PyYAML copies any of the merged keys.
    """

    def __init__(self, stream: str):
        super().__init__(stream)
        self._merged_sizes: dict[yaml.Node, int] = {}  # keys of a mapping once merges are done

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        size = len(node.value)
        for key, value in node.value:
            if key.tag != MERGE_TAG:
                continue
            sources = [value]
            if isinstance(value, yaml.SequenceNode):
                sources = value.value
            # Anchors are known before their mapping is complete, so one that merges itself has no
            # size yet and counts as too large.
            size += sum(self._merged_sizes.get(source, MAX_MERGED_KEYS) for source in sources)
        if size > MAX_MERGED_KEYS:
            raise yaml.composer.ComposerError(
                problem="merge keys (<<) make this mapping too large", problem_mark=node.start_mark
            )
        self._merged_sizes[node] = size
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            # Several merge keys are valid. Keys that are lists or mappings are refused by PyYAML
            # itself, since they are not hashable.
            if key.tag == MERGE_TAG or not isinstance(key.value, str):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML follows, takes 1e-5 for text, since it has neither a point nor a sign.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
