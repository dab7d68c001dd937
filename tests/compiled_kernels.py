"""Run by test_gpu_kernels.py: compiles the kernels for GPUs that are not here; prints their shared memory in bytes as JSON."""

import json

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from caco import lars_kernels
from caco.bank_kernels import pulls, queries, search, softmaxes
from caco.data import crop_kernel, view_kernel

POINTERS = {"queries": "*bf16", "pulls": "*bf16", "places": "*i32", "images": "*u8"}
"""All others point to float32."""
ALIGNED = {"key_count", "query_count", "slot_count", "of_part", "of_group", "width", "height", "size"}


def shared_memory(kernel, architecture, constants, options, other_types=None):
    """Compile a kernel, and return what memory next to a processor it needs."""
    types, names = other_types or {}, kernel.arg_names
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        kind = types.get(name) or ("i32" if name in ALIGNED else POINTERS.get(name, "*fp32"))
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and (kind.startswith("*") or name in ALIGNED):
            attributes[(place,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options).metadata.shared


def main() -> None:
    found = {"roomy": {}, "others": {}}
    tables = (
        (search.ROUGH, search._rough, "KEYS", {}),
        (search.EXACT, search._exact, "KEYS", {"PRECISION": search.PRECISION}),
        (softmaxes.BLOCKS, softmaxes._softmax, "QUERIES", {"WITH_MEAN": True}),
        (pulls.BLOCKS, pulls._pulls, "QUERIES", {}),
    )
    for table, kernel, compared, more in tables:
        for width, (large, *small) in table.items():
            if width < 128:
                continue  # needs less than those
            for kind, architecture, choices in (("roomy", 90, [large]), ("others", 86, small)):
                for count, slots, warps, ahead in choices:
                    constants = {"WIDTH": width, compared: count, "SLOTS": slots, **more}
                    options = {"num_warps": warps, "num_stages": ahead}
                    types = {"keys": "*fp16"} if kernel is search._rough else {}
                    needed = shared_memory(kernel, architecture, constants, options, types)
                    found[kind][f"{kernel.__name__} {width}"] = needed
    sizes = {"WIDTH": 256, "PARTS": 512, "POSITIVES": 2, "OTHER_TEMPERATURE": False, "CHUNK": queries.CHUNK}
    floats = dict.fromkeys(("inverse_temperature", "to_slot_temperature", "hit_margin"), "fp32")
    types = floats | {"scaled": "*bf16", "positives": "*i64", "hits": "*u8", "part_count": "i32"}
    found["others"]["of_query"] = shared_memory(queries._of_query, 86, sizes, {}, types)
    types = {"positives": "*i64"}
    found["others"]["cooperate"] = shared_memory(pulls._cooperate, 86, {"WIDTH": 256}, {}, types)
    sides = {"ROWS": 32, "ROW": 32, "SIZE": 32}
    found["others"]["views"] = shared_memory(view_kernel._view, 86, sides, {"num_warps": 8})
    types = {"table": "*i64", "size": "i32"}
    constants = {"BLOCK": crop_kernel.BLOCK}
    found["others"]["crops"] = shared_memory(crop_kernel._crop, 86, constants, {"num_warps": 4}, types)
    types = {"rows": "*i64", "tensor_of_chunk": "*i64"} | dict.fromkeys(
        ("lr", "momentum", "weight_decay", "trust_coefficient"), "fp32"
    )
    for kernel, constants in ((lars_kernels._norms, {}), (lars_kernels._move, {"MOST": 1024})):
        constants = {"CHUNK": lars_kernels.CHUNK, **constants}
        found["others"][kernel.__name__] = shared_memory(kernel, 86, constants, {"num_warps": 8}, types)
    print(json.dumps(found))


main()
