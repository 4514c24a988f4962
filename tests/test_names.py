"""Names, orders, defaults and constants agree wherever they are written down."""

import inspect
import re
import sys

import pytest
import torch

import kvcore
import kvcore.reference
from kvcore.cache import settings
from kvcore.hf import norms
from tree import CSRC, ROOT, code, families


def op_names():
    """The ops of the families, which are what this project offers."""
    names = torch._C._dispatch_get_all_op_names()
    names = {n.split("::")[1].split(".")[0] for n in names if n.startswith("kvcore::")}
    return sorted(name for name in names if name.split("_")[0] in families())


def schema_arguments(op):
    return getattr(torch.ops.kvcore, op).default._schema.arguments


def signature_of(function):
    empty = inspect.Parameter.empty
    result = []
    for p in inspect.signature(function).parameters.values():
        default = list(p.default) if isinstance(p.default, tuple) else p.default
        # Schemas number the dtypes in the order of ScalarType.
        default = 6 if default is torch.float32 else 1 if default is torch.int8 else default
        keyword_only = p.kind is inspect.Parameter.KEYWORD_ONLY
        result.append((p.name, keyword_only, "required" if default is empty else default))
    return result


def signature_of_schema(op):
    return [
        (a.name, a.kwarg_only, a.default_value if a.has_default_value() else "required")
        for a in schema_arguments(op)
    ]


# Functions beside the wrappers: they have no schema.
COMPOSED = {
    "check_errors",
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "merge_attention",
}


def test_ops_were_found():
    assert {"turbo_attention", "turbo_decode"} <= set(op_names())
    assert set(op_names()) | COMPOSED == set(kvcore.ops.__all__)


@pytest.mark.parametrize("op", op_names())
def test_tensors_are_positional_and_scalars_keyword_only(op):
    for argument in schema_arguments(op):
        is_tensor = "Tensor" in str(argument.type)
        assert argument.kwarg_only == (not is_tensor), argument.name
        assert argument.name != "mode", "opcheck breaks on an argument called mode"


@pytest.mark.parametrize("op", op_names())
def test_wrapper_agrees_with_schema(op):
    assert getattr(kvcore, op) is getattr(kvcore.ops, op)
    assert signature_of(getattr(kvcore, op)) == signature_of_schema(op)


@pytest.mark.parametrize("op", op_names())
def test_reference_agrees_with_schema(op):
    reference = getattr(kvcore.reference, op.split("_")[0])
    assert signature_of(getattr(reference, op)) == signature_of_schema(op)


@pytest.mark.parametrize("op", op_names())
def test_wrapper_documents_every_argument(op):
    documented = re.findall(r"^ {8}((?:\w+, )*\w+):", getattr(kvcore, op).__doc__, re.MULTILINE)
    documented = [name for names in documented for name in names.split(", ")]
    assert documented == [a.name for a in schema_arguments(op)]


# What an argument is called, or becomes, in the params structs; None: used up by op.cpp.
PARAMS_NAMES = {
    "pool": "slabs",
    "check_values": None,
    "dtype": None,
    "k_bits": None,
    "v_bits": None,
    "sink_pages": None,
    "allow_neg_eigval": "beta_scale",
}
# Ops that run another op's kernels.
PARAMS_OF = {"turbo_quantize": "AppendParams"}


def struct_fields(family):
    """Fields of the structs of params.h, fields of nested structs in their place."""
    headers = [CSRC / "core" / "view.h", CSRC / family / "params.h"]
    text = "".join(code(header) for header in headers)
    structs = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL):
        fields = []
        for kind, declared in re.findall(r"^ *(?:const )?(\w+)\*? ([^;()]+);", body, re.MULTILINE):
            names = [n.strip(" *") for n in declared.split(",")]
            nested = structs.get(kind, []) if kind not in ("InputView", "OutputView") else []
            fields += nested if nested and "*" not in declared else names
            fields += names if nested else []
        structs[name] = fields
    return structs


@pytest.mark.parametrize("op", op_names())
def test_params_agree_with_schema(op):
    family, rest = op.split("_", 1)
    name = PARAMS_OF.get(op, "".join(word.title() for word in rest.split("_")) + "Params")
    fields = struct_fields(family)[name]
    wanted = [PARAMS_NAMES.get(a.name, a.name) for a in schema_arguments(op)]
    assert [field for field in wanted if field is not None and field not in fields] == []


def test_python_constants_are_those_of_the_layout():
    text = code(CSRC / "turbo" / "layout.h")
    layout = dict(re.findall(r"constexpr int (k\w+) = (\d+);", text))
    blocks = sys.modules["kvcore.reference.turbo.blocks"]
    fake = sys.modules["kvcore.ops.fake"]
    for module in (blocks, fake, settings):
        assert int(layout["kPageTokens"]) == module.PAGE_TOKENS
    assert int(layout["kCodeMax"]) == blocks.CODE_MAX
    for module in (fake, settings):
        assert int(layout["kHeaderBytes"]) == module.HEADER_BYTES
        assert int(layout["kTailSlots"]) == module.TAIL_SLOTS
    assert int(layout["kSlabIndexBits"]) == settings.SLAB_INDEX_BITS
    gdn = dict(re.findall(r"constexpr int (k\w+) = (\d+);", code(CSRC / "gdn" / "layout.h")))
    for name in ("reference.gdn.chunk", "ops.gdn_autograd"):
        assert int(gdn["kChunk"]) == sys.modules[f"kvcore.{name}"].CHUNK
    assert int(gdn["kMaxNormChannels"]) == norms.MAX_CHANNELS


def test_python_constants_are_those_of_lexicos_layout():
    text = code(CSRC / "lexico" / "layout.h")
    layout = dict(re.findall(r"constexpr \w+ (k\w+) = ([^;]+);", text))
    codes = sys.modules["kvcore.reference.lexico.codes"]
    store = sys.modules["kvcore.reference.lexico.store"]
    fake = sys.modules["kvcore.ops.fake"]
    assert int(layout["kTileTokens"]) == store.TILE_TOKENS == fake.TILE_TOKENS
    assert int(layout["kBlockTiles"]) == store.BLOCK_TILES == fake.BLOCK_TILES
    assert int(layout["kBlockAlignment"]) == store.BLOCK_ALIGNMENT
    assert int(layout["kCoefficientMax"]) == codes.COEFFICIENT_MAX
    assert int(layout["kE4M3Max"]) == codes.E4M3_MAX
    assert float.fromhex(layout["kStopCorrelation"]) == codes.STOP_CORRELATION
    assert float.fromhex(layout["kMinDistanceSquared"]) == codes.MIN_DISTANCE_SQUARED


def test_lint_versions_have_one_value():
    pins = re.findall(r'"((?:ruff|clang-format)==[^"]+)"', (ROOT / "pyproject.toml").read_text())
    hooks = re.findall(r'\["([^"]+)"\]', (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(pins) == 2
    assert set(hooks) == set(pins)
