"""Two results of the same machine, side by side: what became slower or faster beyond the spread.

    python bench/compare.py OLD.json NEW.json

A variant counts as slower if its 10th percentile is above the other's 90th. Exit code 1 if one of
kvcore's is slower. Peers are shown too: if they changed as well, it was the machine.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from report import is_ours, table

SAME_MACHINE = ("device", "isa", "threads")


def verdict(old: dict, new: dict) -> str:
    """``slower``, ``faster`` or nothing, for two summaries of seconds."""
    if new["p10"] > old["p90"]:
        return "slower"
    return "faster" if new["p90"] < old["p10"] else ""


def compare(old: dict, new: dict) -> list[list[str]]:
    """Rows of case, variant, both medians in milliseconds, their ratio, and the verdict.

    Raises:
        SystemExit: if the results are of two families or machines, or share no case.
    """
    facts = {"family": (old["family"], new["family"])}
    facts |= {key: (old["machine"][key], new["machine"][key]) for key in SAME_MACHINE}
    for key, (mine, other) in facts.items():
        if mine != other:
            raise SystemExit(f"the {key} of both results must be the same, got {mine} and {other}")
    old_cases = {case["name"]: case for case in old["cases"]}
    rows = []
    for case in new["cases"]:
        before = old_cases.get(case["name"])
        if before is None or before["shape"] != case["shape"] or before["cold"] != case["cold"]:
            continue
        for name, variant in case["variants"].items():
            past = before["variants"].get(name)
            if past is None:
                continue
            ratio = f"{variant['median'] / past['median']:.2f}"
            medians = [f"{v['median'] * 1e3:.3f}" for v in (past, variant)]
            rows.append([case["name"], name, *medians, ratio, verdict(past, variant)])
    if not rows:
        raise SystemExit("the results share no case")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    args = parser.parse_args()
    rows = compare(*(json.loads(path.read_text()) for path in (args.old, args.new)))
    print("\n".join(table(["case", "variant", "old ms", "new ms", "new / old", ""], rows)))
    return int(any(is_ours(row[1]) and row[-1] == "slower" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
