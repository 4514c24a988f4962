"""Times kvcore against its peers, in turn, and writes JSON.

    python bench/run.py [--family turbo|gdn|lexico] [--quick] [--cases TEXT] [--rounds N]
                         [--out DIR] [--device cpu|cuda] [--peers NAME,NAME|all|none]

Each case is checked against fp32 results before it is timed. A full run writes
`results/<device>/<family>.json` beside this file; --quick and --cases write only with --out.
Peers that are not part of torch, transformers or scikit-learn have environments of their own, see
docs/benchmarks.md; those that are not installed appear as such.
Beside it: report.py (tables and plots from the JSON), compare.py (two results) and ab.py (two
commits).
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys

import machine
import report
import torch
from families import FAMILIES
from memory import peak_bytes
from peers import registry
from timer import MIN_ROUNDS, CacheFlusher, interleave, summary

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
# A case ends after so long if it has had its least number of rounds.
CASE_SECONDS, QUICK_SECONDS = 5.0, 3.0


def run_case(
    case, rounds: int, ceilings: dict, device: torch.device, flush, seconds: float
) -> dict:
    """Times the variants of a case, and prints them."""
    variants = {n: v.run for n, v in case.variants.items()}
    peaks = {
        n: None if hasattr(run, "timed") else peak_bytes(run, device) for n, run in variants.items()
    }
    samples = interleave(variants, rounds, device, flush if case.cold else None, seconds)
    rounds = len(next(iter(samples.values())))
    for name, variant in case.variants.items():
        samples[name] = [seconds / variant.units for seconds in samples[name]]
    entry = {
        "name": case.name,
        "shape": case.shape,
        "cold": case.cold,
        "operations": case.operations,
        "rounds": rounds,
        "absent": case.absent,
        "variants": {
            n: {
                **summary(samples[n]),
                "bytes_read": v.bytes_read,
                "error": v.error,
                "ceiling": v.ceiling or ("read" if v.bytes_read else None),
                "peak_bytes": peaks[n],
                "samples": samples[n],
            }
            for n, v in case.variants.items()
        },
    }
    print(f"\n{case.name} ({rounds} rounds)")
    for row in report.case_rows(entry, ceilings):
        text = "  {:28s} {:>10s} ms  [{:>16s}] {:>8s}  {:24s} {:>8s} {}".format(*row)
        print(text)
    for variant, reason in report.absent_rows(entry):
        print(f"  {variant:28s} {reason}")
    sys.stdout.flush()
    return entry


def run_family(
    name: str,
    quick: bool,
    only: str,
    rounds: int,
    device: torch.device,
    peers: tuple[str, ...] = (),
    seconds: float = math.inf,
) -> dict:
    """Times every case of a family whose name contains ``only``; Ctrl-C keeps those before it."""
    result = {
        "family": name,
        "machine": machine.describe(device),
        "rounds": rounds,
        "ceilings": machine.ceilings(min(rounds, 10), device),
        "peers": registry.versions(peers),
        "cases": [],
    }
    flush = CacheFlusher(device)
    try:
        for build in FAMILIES[name](quick, device):
            # A case that does not say its name before has to be built for it.
            if only not in getattr(build, "name", only):
                continue
            case = build()
            if only in case.name:
                with registry.attached(case, peers):
                    entry = run_case(case, rounds, result["ceilings"], device, flush, seconds)
                result["cases"].append(entry)
    except KeyboardInterrupt:
        result["interrupted"] = True
        print("\ninterrupted: the cases that ended are kept")
    return result


def merged(old: dict, new: dict) -> dict:
    """Cases of both results, those of ``new`` in place of ``old``'s; ceilings are the higher ones.

    Raises:
        SystemExit: if they are not of the same commit, device, versions and rounds.
    """
    for key in ("device", "isa", "threads", "commit", "modified", "torch"):
        if old["machine"][key] != new["machine"][key]:
            raise SystemExit(
                f"--merge: the file's {key} must be {new['machine'][key]}, got "
                f"{old['machine'][key]}"
            )
    if old["rounds"] != new["rounds"]:
        raise SystemExit(f"--merge: the file's rounds must be {new['rounds']}, got {old['rounds']}")
    names = {case["name"] for case in new["cases"]}
    cases = [case for case in old["cases"] if case["name"] not in names] + new["cases"]
    ceilings = {
        name: max(old["ceilings"][name], ceiling, key=lambda c: c["value"])
        for name, ceiling in new["ceilings"].items()
    }
    peers = {**old.get("peers", {}), **new.get("peers", {})}
    return {**new, "cases": cases, "ceilings": ceilings, "peers": peers}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=[*FAMILIES, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--cases", default="", metavar="TEXT", help="only cases that contain TEXT")
    parser.add_argument("--rounds", type=int, help="at most so many; default 20, quick 5")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"a case ends after so long if it has had {MIN_ROUNDS} rounds; default "
        f"{CASE_SECONDS:g}, quick {QUICK_SECONDS:g}",
    )
    parser.add_argument(
        "--peers",
        metavar="NAME,NAME|all|none",
        help="which of those with an environment of their own; default: all that are installed",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=pathlib.Path, help="directory for the JSON files")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="keep the file's other cases, which must be of the same commit: a run in parts",
    )
    args = parser.parse_args()
    rounds = args.rounds or (5 if args.quick else 20)
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, got {rounds}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no GPU")
    try:
        peers = registry.choose(args.peers, args.device)
    except ValueError as error:
        parser.error(str(error))
    seconds = args.seconds or (QUICK_SECONDS if args.quick else CASE_SECONDS)
    found = False
    for family in FAMILIES if args.family == "all" else [args.family]:
        result = run_family(family, args.quick, args.cases, rounds, device, peers, seconds)
        found = found or bool(result["cases"]) or "interrupted" in result
        out = args.out
        if out is None and not args.quick and not args.cases:
            out = RESULTS / machine.slug(result["machine"])
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"{family}.json"
            if args.merge and path.exists():
                result = merged(json.loads(path.read_text()), result)
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(f"\n{path}")
    if not found:
        parser.error(f"--cases must be part of a case's name, got {args.cases!r}")


if __name__ == "__main__":
    main()
