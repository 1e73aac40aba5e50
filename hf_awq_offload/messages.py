"""Words that several messages share."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, metadata
from typing import Any

DISTRIBUTION = "hf_awq_offload"


def shortened(names: Sequence[str], most: int, between: str = ", ") -> str:
    """Returns up to `most` names with commas between them, and how many more there are: "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def type_name(value: Any) -> str:
    """Returns the type of a value with its article: "a str", "an int"; "None" for None."""
    name = type(value).__name__
    return "None" if value is None else f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def size_text(count_bytes: float) -> str:
    """Returns a size in GiB, or in MiB where GiB would show as less than 0.01: "3.21 GiB", "4.2 MiB"."""
    if count_bytes < 0.01 * 2**30:
        return f"{count_bytes / 2**20:.1f} MiB"
    return f"{count_bytes / 2**30:.2f} GiB"


def how_to_install() -> str:
    """Returns how to install this package: pip and the repository's address, if the package knows the address.

    No package index has the package yet. The address is `Repository` under `[project.urls]` in pyproject.toml, which
    installed packages hold in their metadata.
    """
    try:
        urls = metadata(DISTRIBUTION).get_all("Project-URL") or []
    except PackageNotFoundError:  # it runs from its source, not installed
        urls = []
    for url in urls:
        label, _, address = url.partition(", ")
        if label == "Repository":
            return f"`pip install git+{address}`"
    return f"`pip install .` in a clone of {DISTRIBUTION}'s repository"
