"""What several commands need: mistakes in a call, models, texts, devices."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

MODEL_HELP = "hybrid or control (shipped), the folder of a checkpoint, or a Hugging Face model id"


class UserError(Exception):
    """A mistake in the call: reported in one line, without a traceback."""


def refuse_given(args: argparse.Namespace, options: list[argparse.Action], needed: str) -> None:
    """Of options that mean something with ``needed`` alone, none may differ from its default."""
    for option in options:
        if getattr(args, option.dest) != option.default:
            raise UserError(f"{option.option_strings[0]} needs {needed}")


def write_json(path: str, value: Any) -> None:
    text = json.dumps(value, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from error


def read_text(path: str) -> str:
    try:
        if path == "-":
            return sys.stdin.buffer.read().decode(errors="replace")
        return Path(path).read_bytes().decode(errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def need_transformers() -> None:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "this command needs transformers, which is not installed; run pip install 'kvcore[hf]'"
        ) from error
    # Its notes on optional kernels and generation flags are not about this command.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device must be cpu or cuda, got {name}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device is {name}, but torch finds no GPU")


def check_isa() -> None:
    """A level that KVCORE_CPU_ISA names wrongly would else be found when the first op runs."""
    from kvcore import _native

    if _native.status()["_C"].loaded:
        from kvcore import _C

        try:
            _C.cpu_isa()
        except RuntimeError as error:
            raise UserError(str(error)) from error


def load_model(name: str, **kwargs: Any) -> Any:
    from kvcore.demo import models, textmodel

    check_device(kwargs["device"])
    if name in models.NAMES:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is here, so nothing may be asked for
    need_transformers()
    try:
        return textmodel.load(name, **kwargs)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


def add_model_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        parser.add_argument(
            "--dtype",
            default="auto",
            metavar="DTYPE",
            help="auto (as stored; float32 for the shipped models), float32, bfloat16 or float16",
        ),
        parser.add_argument("--device", default="cpu", help="cpu (default) or cuda"),
    ]


def read_texts(paths: list[str]) -> tuple[list[str], str]:
    """The texts, and the SHA-256 of all their bytes."""
    import hashlib

    texts, sha = [], hashlib.sha256()
    for path in paths:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"--text {path}: {error.strerror}") from error
        sha.update(data)
        texts.append(data.decode(errors="replace"))
    return texts, sha.hexdigest()
