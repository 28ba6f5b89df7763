"""Prints the requirements of a wheel, one a line, without its extras and without packages named."""

from __future__ import annotations

import argparse
import re
import zipfile
from email.parser import Parser


def requirements(wheel: str, without: list[str]) -> list[str]:
    """Those whose names do not begin with one of `without`."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    listed = metadata.get_all("Requires-Dist") or []
    left_out = re.compile("|".join(map(re.escape, without)) or r"\Z.")
    return [line for line in listed if not re.search(r";.*\bextra\b", line) and not left_out.match(line)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel")
    parser.add_argument("--without", nargs="*", default=[])
    arguments = parser.parse_args()
    print("\n".join(requirements(arguments.wheel, arguments.without)))
