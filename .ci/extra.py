"""Prints the requirements of one extra of pyproject.toml, for `pip install` without the project."""

import pathlib
import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

pyproject = pathlib.Path(__file__).parent.parent / "pyproject.toml"
extras = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
print(*extras[sys.argv[1]])
