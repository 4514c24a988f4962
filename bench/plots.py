"""Plots from the JSON under results/, beside it as PNG.

They change only with the JSON: a plot carries the checksum of what it was drawn from, and is drawn
again when that differs.
"""

from __future__ import annotations

import hashlib
import pathlib
import struct
import zlib
from collections.abc import Callable, Iterator

from report import RESULTS, is_ours, load

SOURCE = "kvcore-source"  # the key of the checksum among a PNG's texts


def source_of(path: pathlib.Path) -> str | None:
    """The checksum that a PNG carries, or None."""
    data = path.read_bytes()
    at = 8
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if kind == b"tEXt" and body.split(b"\0", 1)[0] == SOURCE.encode():
            return body.split(b"\0", 1)[1].decode()
        if (
            zlib.crc32(kind + body)
            != struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        ):
            return None
        at += 12 + length
    return None


def latency(result: dict, axes) -> None:
    """Decode of one token against context; dashed, how long it takes to read the bytes at most."""
    from matplotlib import pyplot

    cases = [
        case
        for case in result["cases"]
        if case["name"].startswith("decode")
        and case["shape"]["batch"] == case["shape"]["q_len"] == 1
        and case["shape"]["head_dim"] == 128
        and case["shape"]["kv_heads"] == 8
    ]
    cases.sort(key=lambda case: case["shape"]["kv_len"])
    read = result["ceilings"]["read"]["value"] * 1e9
    tokens = [case["shape"]["kv_len"] for case in cases]
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    for name in cases[0]["variants"]:
        # What failed for a shape has no point there.
        timed = [case for case in cases if name in case["variants"]]
        variants = [case["variants"][name] for case in timed]
        lengths = [case["shape"]["kv_len"] for case in timed]
        (line,) = axes.plot(
            lengths,
            [1e3 * v["median"] for v in variants],
            marker="o" if is_ours(name) else "x",
            linewidth=2 if is_ours(name) else 1,
            label=name,
        )
        floor = [1e3 * v["bytes_read"] / read for v in variants]
        axes.plot(lengths, floor, linestyle="--", linewidth=0.8, color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="milliseconds")
    axes.set_xticks(tokens, [f"{n // 1024}k" for n in tokens])
    axes.minorticks_off()
    axes.set_title("decode, one layer; dashed: the bytes at the read ceiling")
    # Beside the lines: with all peers it has fourteen.
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def tradeoff(result: dict, axes) -> None:
    """Speed against error at the longest context that the table has, 32k."""
    (case,) = (c for c in result["cases"] if c["name"] == "decode, 32768 tokens, batch 1, q_len 1")
    slowest = max(v["median"] for n, v in case["variants"].items() if "bf16" in n)
    peer = min(v["median"] for n, v in case["variants"].items() if "bf16" in n)
    for name, v in case["variants"].items():
        if v["median"] >= slowest or not v["error"]:
            continue
        axes.plot(v["error"], peer / v["median"], marker="o" if is_ours(name) else "x")
        axes.annotate(name, (v["error"], peer / v["median"]), fontsize=8)
    axes.set(xscale="log", xlabel="relative error, Gaussian data", ylabel="speed against SDPA bf16")
    axes.set_title("decode at 32k tokens: speed against error")


def _turbo(device: str, path: pathlib.Path, metadata: dict[str, str]) -> None:
    from matplotlib import pyplot

    result = load(device, "turbo")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5), layout="constrained")
    latency(result, left)
    tradeoff(result, right)
    figure.savefig(path, dpi=110, metadata=metadata)
    pyplot.close(figure)


def _evaluation(name: str) -> Callable[[str, pathlib.Path, dict[str, str]], None]:
    def draw(device: str, path: pathlib.Path, metadata: dict[str, str]) -> None:
        from kvcore.eval import plots as drawn_by_eval

        drawn_by_eval.PLOTS[name](load(device, "eval"), path, metadata)

    return draw


# By the names of the PNGs; up to its first hyphen a name is that of the JSON.
PLOTS: dict[str, Callable[[str, pathlib.Path, dict[str, str]], None]] = {
    "turbo": _turbo,
    "eval": _evaluation("eval"),
    "eval-needle": _evaluation("eval-needle"),
}


def _outdated() -> Iterator[tuple[str, str, pathlib.Path, str]]:
    for name in PLOTS:
        for source in sorted(RESULTS.glob(f"*/{name.split('-')[0]}.json")):
            checksum = hashlib.sha256(source.read_bytes()).hexdigest()
            path = source.with_name(f"{name}.png")
            if not path.exists() or source_of(path) != checksum:
                yield name, source.parent.name, path, checksum


def write(check: bool) -> bool:
    """Draws what is missing or of other figures; ``check`` names it only. Whether all was there."""
    same = True
    for name, device, path, checksum in _outdated():
        same = False
        print(f"{path}: {'not drawn from the JSON beside it' if check else 'drawn'}")
        if not check:
            import matplotlib

            matplotlib.use("Agg")
            PLOTS[name](device, path, {SOURCE: checksum, "Software": "matplotlib"})
    return same
