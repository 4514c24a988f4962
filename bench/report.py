"""Tables and plots from the JSON that run.py wrote, and from nothing else.

    python bench/report.py              rewrites the marked tables of the documents, and the plots
    python bench/report.py --check      changes nothing; exit code 1 if a document is not up to date
    python bench/report.py FILE.json    prints everything that a result says

A marked table lies between `<!-- bench: NAME DEVICE -->` and `<!-- end -->`, DEVICE being a folder
of results/; blocks.py says what NAME can be.
"""

from __future__ import annotations

import argparse
import difflib
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = ("README.md", "docs/*.md", "csrc/*/README.md")
_MARKED = re.compile(r"(<!-- bench: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def is_ours(name: str) -> bool:
    """Whether a variant is kvcore's rather than a peer's."""
    return name.startswith("kvcore")


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)] + [
        "| " + " | ".join(row) + " |" for row in rows
    ]


def fastest_peer(case: dict, key: str = "") -> str | None:
    """Name of the fastest peer's variant whose name contains ``key``; None if there is none."""
    times = {n: v["median"] for n, v in case["variants"].items() if not is_ours(n) and key in n}
    return min(times, key=times.get, default=None)


def _rate(case: dict, variant: dict) -> tuple[float, str] | None:
    """Bytes or operations a second, in the unit of the ceilings."""
    if variant["bytes_read"]:
        return variant["bytes_read"] / variant["median"] / 1e9, "GB/s"
    if case["operations"]:
        return case["operations"] / variant["median"] / 1e12, "T(FL)OP/s"
    return None


def share(case: dict, variant: dict, ceilings: dict) -> str:
    """The share of the machine's limit, if the variant is held against one."""
    found, ceiling = _rate(case, variant), variant.get("ceiling")
    if found is None or ceiling is None:
        return ""
    return f"{found[0] / ceilings[ceiling]['value']:.0%}"


def rate(case: dict, variant: dict, ceilings: dict) -> str:
    """Bytes or operations a second, with the share of the machine's limit."""
    found, of_limit = _rate(case, variant), share(case, variant, ceilings)
    if found is None:
        return ""
    text = f"{found[0]:.3g} {found[1]}"
    return f"{text} ({of_limit} of {variant['ceiling']})" if of_limit else text


def case_rows(case: dict, ceilings: dict) -> list[list[str]]:
    """One row per variant: milliseconds, spread, ratio, rate, peak of memory, error."""
    rows = []
    peer = fastest_peer(case)
    for name, v in case["variants"].items():
        ms = f"{v['median'] * 1e3:.3f}"
        spread = f"{v['p10'] * 1e3:.3f}-{v['p90'] * 1e3:.3f}"
        against = "" if peer is None else f"{case['variants'][peer]['median'] / v['median']:.2f}x"
        peak = v.get("peak_bytes")
        memory = "" if peak is None else f"{peak / 1e6:.1f}"
        error = "" if v["error"] is None else f"{v['error']:.4f}"
        rows.append([name, ms, spread, against, rate(case, v, ceilings), memory, error])
    return rows


def absent_rows(case: dict) -> list[list[str]]:
    """Variants that could not be timed, with the reason in place of the time."""
    return [[name, reason] for name, reason in case.get("absent", {}).items()]


HEADER = [
    "variant",
    "median ms",
    "p10-p90",
    "speed against fastest peer",
    "rate (share of limit)",
    "peak MB",
    "rel. error",
]


def described(result: dict) -> str:
    """Machine, versions and commit in a line."""
    m = result["machine"]
    # Cases that take long end earlier, but not before a few rounds.
    fewest = min((case.get("rounds", result["rounds"]) for case in result["cases"]), default=0)
    rounds = (
        result["rounds"] if fewest in (0, result["rounds"]) else f"{fewest} to {result['rounds']}"
    )
    return (
        f"{m['device']}, {m['threads']} threads, ISA {m['isa']}, torch {m['torch']}, "
        f"kvcore {m['kvcore']} at {m['commit'][:10]}{' (modified)' if m['modified'] else ''}, "
        f"{m['date']}; medians of {rounds} interleaved rounds."
    )


def markdown(result: dict) -> str:
    """The whole result as Markdown."""
    lines = [
        described(result),
        "",
        "Ceilings: "
        + ", ".join(f"{n} {c['value']:.2f} {c['unit']}" for n, c in result["ceilings"].items())
        + ".",
    ]
    lines += [f"Peer {name}: {text}." for name, text in result.get("peers", {}).items()]
    for case in result["cases"]:
        cold = "cold cache" if case["cold"] else "warm"
        lines += ["", f"### {case['name']} ({cold})", ""]
        empty = [""] * (len(HEADER) - 2)
        absent = [[*row, *empty] for row in absent_rows(case)]
        lines += table(HEADER, case_rows(case, result["ceilings"]) + absent)
    return "\n".join(lines)


def load(device: str, name: str) -> dict:
    """A result of a folder of results/."""
    return json.loads((RESULTS / device / f"{name}.json").read_text())


def filled(text: str) -> str:
    """A document with every marked table made anew."""
    from blocks import BLOCKS

    def block(match: re.Match) -> str:
        begin, name, device, end = match.groups()
        if name not in BLOCKS:
            raise SystemExit(f"no table is named {name}; there are {', '.join(BLOCKS)}")
        return f"{begin}{BLOCKS[name](device)}\n{end}"

    return _MARKED.sub(block, text)


def write_documents(check: bool) -> bool:
    """Rewrites the documents, or with ``check`` prints the differences. Whether there was none."""
    same = True
    for path in sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern)):
        old = path.read_text()
        new = filled(old)
        if new == old:
            continue
        same = False
        name = str(path.relative_to(ROOT))
        if check:
            lines = (text.splitlines(keepends=True) for text in (old, new))
            sys.stdout.writelines(difflib.unified_diff(*lines, name, f"{name} from the JSON"))
        else:
            path.write_text(new)
            print(name)
    return same


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=pathlib.Path, nargs="?")
    parser.add_argument("--check", action="store_true", help="exit code 1 if anything would change")
    args = parser.parse_args()
    if args.file is not None:
        print(markdown(json.loads(args.file.read_text())))
        return 0
    same = write_documents(args.check)
    import plots

    same = plots.write(args.check) and same
    return int(args.check and not same)


if __name__ == "__main__":
    sys.exit(main())
