"""Tables from the JSON that run.py wrote: `python bench/report.py FILE.json` prints Markdown."""

from __future__ import annotations

import argparse
import json
import pathlib


def is_ours(name: str) -> bool:
    """Whether a variant is kvcore's rather than a peer's."""
    return name.startswith("kvcore")


def _best_peer(case: dict, key: str = "") -> float:
    times = [v["median"] for n, v in case["variants"].items() if not is_ours(n) and key in n]
    return min(times) if times else float("nan")


def case_rows(case: dict, ceilings: dict) -> list[list[str]]:
    """One row per variant: name, milliseconds, spread, ratio, share of the ceiling, error."""
    read, rows = ceilings["read"]["value"], []
    best = _best_peer(case)
    bf16 = _best_peer(case, "bf16")
    for name, v in case["variants"].items():
        ms = f"{v['median'] * 1e3:.3f}"
        spread = f"{v['p10'] * 1e3:.3f}-{v['p90'] * 1e3:.3f}"
        against = f"{(bf16 if bf16 == bf16 else best) / v['median']:.2f}x"
        if v["bytes_read"]:
            rate = v["bytes_read"] / v["median"] / 1e9
            share = f"{rate:.1f} GB/s ({rate / read:.0%})"
        elif case["operations"]:
            share = f"{case['operations'] / v['median'] / 1e12:.3f} T(FL)OP/s"
        else:
            share = ""
        error = "" if v["error"] is None else f"{v['error']:.4f}"
        rows.append([name, ms, spread, against, share, error])
    return rows


HEADER = ["variant", "median ms", "p10-p90", "speed against", "rate (share of read)", "rel. error"]


def markdown(result: dict) -> str:
    """The whole result as Markdown."""
    m = result["machine"]
    lines = [
        f"{m['device']}, {m['threads']} threads, ISA {m['isa']}, torch {m['torch']}, "
        f"kvcore {m['kvcore']} at {m['commit'][:10]}{' (modified)' if m['modified'] else ''}, "
        f"{m['date']}; medians of {result['rounds']} interleaved rounds.",
        "",
        "Ceilings: "
        + ", ".join(f"{n} {c['value']:.2f} {c['unit']}" for n, c in result["ceilings"].items())
        + ".",
    ]
    for case in result["cases"]:
        cold = "cold cache" if case["cold"] else "warm"
        header = list(HEADER)
        header[3] += (
            " bf16" if _best_peer(case, "bf16") == _best_peer(case, "bf16") else " best peer"
        )
        lines += ["", f"### {case['name']} ({cold})", "", "| " + " | ".join(header) + " |"]
        lines.append("|" + "---|" * len(header))
        lines += ["| " + " | ".join(row) + " |" for row in case_rows(case, result["ceilings"])]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=pathlib.Path)
    print(markdown(json.loads(parser.parse_args().file.read_text())))


if __name__ == "__main__":
    main()
