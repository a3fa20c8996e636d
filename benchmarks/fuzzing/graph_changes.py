"""Changes of an ONNX model: its structure, its tensors, its external data, its metadata. Each returns a description."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from .values import mutate_bytes

OPERATORS = (
    "MatMul", "Gemm", "Conv", "QuantizeLinear", "DequantizeLinear", "Identity", "Cast", "Constant", "Reshape", "Transpose",
    "Mul", "Add", "Softmax", "Split", "Gather", "If", "Loop", "Einsum", "MatMulInteger", "QLinearMatMul", "Nothing", "",
)  # fmt: skip
INTEGERS = (0, 1, -1, 2, 7, -5, 64, 96, 2**31, 2**62, -(2**62))
LOCATIONS = (
    "",
    "/etc/passwd",
    "/dev/zero",
    "../guard/canary.txt",
    "missing",
    ".",
    "loop",
    "fifo",
    "x" * 300,
    "a/../m.onnx",
    "\0",
)


def _node(rng: random.Random, graph: Any) -> Any:
    return rng.choice(graph.node) if len(graph.node) else graph.node.add()


def _names(graph: Any) -> list[str]:
    names = [name for node in graph.node for name in (*node.input, *node.output)]
    return [*names, *(item.name for item in graph.initializer), "", "absent"]


def rewire(rng: random.Random, model: Any) -> str:
    """Give a node another input."""
    node = _node(rng, model.graph)
    if not len(node.input):
        node.input.append("x")
    at = rng.randrange(len(node.input))
    node.input[at] = rng.choice(_names(model.graph))
    return f"input {at} of {node.op_type} = {node.input[at]!r}"


def close_cycle(rng: random.Random, model: Any) -> str:
    """Put a cycle into the graph."""
    node = _node(rng, model.graph)
    if not len(node.output):
        return "nothing"
    if rng.random() < 0.5:
        node.input[:] = [node.output[0], *node.input[1:]]
        return f"{node.op_type} reads its own output"
    first, second = model.graph.node.add(), model.graph.node.add()
    kind = rng.choice(("Identity", "Cast", "Transpose", "Mul", "Reshape"))
    for item, source, target in ((first, "loop_b", "loop_a"), (second, "loop_a", "loop_b")):
        item.op_type = kind
        item.input.append(source)
        item.output.append(target)
    node.input[:] = ["loop_a", *node.input[1:]]
    return f"a cycle of {kind} before {node.op_type}"


def double_paths(rng: random.Random, model: Any) -> str:
    """Append a chain of `a op a`, whose number of paths doubles at each step."""
    node, depth = _node(rng, model.graph), rng.choice((25, 60, 2000))
    last = node.input[0] if len(node.input) else "x"
    kind = rng.choice(("Mul", "Add", "Concat", "Identity", "Transpose"))
    for number in range(depth):
        item = model.graph.node.add()
        item.op_type = kind
        item.input.extend([last, last] if kind in ("Mul", "Add", "Concat") else [last])
        last = f"deep{number}"
        item.output.append(last)
    node.input[:] = [last, *node.input[1:]]
    return f"{depth} of {kind} before {node.op_type}"


def rename_node(rng: random.Random, model: Any) -> str:
    """Change a node's operator, domain, name or output."""
    node = _node(rng, model.graph)
    kind = rng.randrange(4)
    if kind == 0:
        node.op_type = rng.choice(OPERATORS)
    elif kind == 1:
        node.domain = rng.choice(("com.microsoft", "ai.onnx.ml", "local", "x" * 10_000))
    elif kind == 2:
        node.name = rng.choice(("", "[/]", "[red]", "\x1b[31m", "<b>", "x" * 100_000, "\u202e", "a\nb"))
    elif len(node.output):
        node.output[0] = rng.choice(_names(model.graph))
    return f"node {node.domain:.20}::{node.op_type} {node.name!r:.30}"


def trim(rng: random.Random, model: Any) -> str:
    """Remove inputs, outputs or attributes of a node."""
    node = _node(rng, model.graph)
    field = rng.choice((node.input, node.output, node.attribute))
    kind = rng.choice(("pop", "clear", "blank"))
    if kind == "clear" or not len(field):
        del field[:]
    elif kind == "blank" and field is not node.attribute:
        field[rng.randrange(len(field))] = ""
    else:
        del field[-1]
    return f"{kind} of {node.op_type}"


def set_attribute(rng: random.Random, model: Any) -> str:
    """Give a node an attribute of another type or value."""
    import onnx

    node = _node(rng, model.graph)
    names = [item.name for item in node.attribute] + ["axis", "block_size", "output_dtype", "perm", "to", "saturate", "body"]
    name = rng.choice(names)
    for item in [item for item in node.attribute if item.name == name]:
        node.attribute.remove(item)
    makers: tuple[Callable[[], Any], ...] = (
        lambda: rng.choice(INTEGERS), lambda: 0.5, lambda: float("nan"), lambda: "text", lambda: b"\xff",
        lambda: [rng.choice(INTEGERS) for _ in range(rng.choice((1, 2, 5)))], lambda: [0.5], lambda: ["a"],
        lambda: onnx.helper.make_tensor("t", 1, [1], [0.5]), lambda: model.graph,
    )  # fmt: skip
    attribute = rng.choice(makers)()
    node.attribute.append(onnx.helper.make_attribute(name, attribute))
    return f"{node.op_type}.{name} = {attribute!r:.40}"


def change_initializer(rng: random.Random, model: Any) -> str:
    """Change the type, shape, content or name of a stored tensor."""
    if not len(model.graph.initializer):
        return rewire(rng, model)
    item = rng.choice(model.graph.initializer)
    kind = rng.randrange(6)
    if kind == 0:
        item.data_type = rng.choice((0, 1, 2, 3, 6, 7, 8, 9, 10, 16, 17, 21, 22, 23, 99, -1, 2**31 - 1))
    elif kind == 1:
        item.dims[:] = [rng.choice(INTEGERS) for _ in range(rng.choice((0, 1, 2, 3, 40)))]
    elif kind == 2:
        item.raw_data = mutate_bytes(rng, item.raw_data or b"\0" * 8)[0]
    elif kind == 3:
        item.float_data.extend([1.0, float("nan")])
    elif kind == 4:
        item.name = rng.choice(_names(model.graph))
    else:
        model.graph.initializer.remove(item)
    return f"initializer {item.name[:30]!r}, change {kind}, type {item.data_type}, shape {list(item.dims)[:5]}"


def change_value(rng: random.Random, model: Any) -> str:
    """Change the declared type, shape or name of a value."""
    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    if not values:
        return "nothing"
    item = rng.choice(values)
    kind = rng.randrange(5)
    if kind == 0:
        item.type.tensor_type.elem_type = rng.choice((0, 1, 2, 3, 8, 10, 21, 99))
    elif kind == 1:
        for _ in range(rng.choice((1, 40))):
            item.type.tensor_type.shape.dim.add().dim_value = rng.choice(INTEGERS)
    elif kind == 2:
        item.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif kind == 3:
        item.ClearField("type")
    else:
        item.name = rng.choice(_names(graph))
    return f"value {item.name[:30]!r}, change {kind}"


def nest(rng: random.Random, model: Any) -> str:
    """Move the graph into the body of an If or a Loop, or into a function of the model, once or many times deep."""
    import onnx

    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    kind, depth = rng.choice(("If", "Loop", "Scan", "function")), rng.choice((1, 1, 2, 12))
    if kind == "function":
        function = model.functions.add()
        function.name, function.domain = "inner", "local"
        function.node.extend(graph.node)
        function.input.extend(item.name for item in graph.input)
        function.output.extend(item.name for item in graph.output)
        call = onnx.helper.make_node("inner", [item.name for item in graph.input], [item.name for item in graph.output])
        call.domain = "local"
        if rng.random() < 0.3:
            function.node.append(call)  # it calls itself
        del model.graph.node[:]
        model.graph.node.append(call)
        return "in a function"
    for number in range(depth):
        node = onnx.helper.make_node(kind, ["cond"], [f"out{number}"], name=f"{kind}{number}")
        body = onnx.helper.make_attribute("then_branch" if kind == "If" else "body", graph)
        node.attribute.append(body)
        graph = onnx.GraphProto(name=f"g{number}", node=[node])
    del model.graph.node[:]
    model.graph.node.extend(graph.node)
    return f"in {kind} {depth} deep"


def externalize(rng: random.Random, model: Any) -> str:
    """Mark a stored tensor as external data."""
    if not len(model.graph.initializer):
        return rewire(rng, model)
    import onnx

    item = rng.choice(model.graph.initializer)
    item.ClearField("raw_data")
    item.data_location = onnx.TensorProto.EXTERNAL
    location = rng.choice(LOCATIONS)
    del item.external_data[:]
    numbers = ("0", "-1", "x", "1e9", str(2**63), "10", "", "99999999")
    entries = {"location": location, "offset": rng.choice(numbers), "length": rng.choice(numbers)}
    for key in rng.sample(sorted(entries), rng.choice((1, 2, 3, 3))):
        item.external_data.add(key=key, value=entries[key])
    return f"external data {[(entry.key, entry.value[:40]) for entry in item.external_data]}"


def change_model(rng: random.Random, model: Any) -> str:
    """Remove or change fields of the whole model."""
    kind = rng.choice(
        ("graph", "opset", "ir", "nodes", "outputs", "inputs", "opset 99", "domain", "metadata", "sparse", "quantization")
    )
    if kind == "graph":
        model.ClearField("graph")
    elif kind == "opset":
        del model.opset_import[:]
    elif kind == "ir":
        model.ir_version = rng.choice((0, 1, 99, 2**40))
    elif kind == "opset 99":
        model.opset_import[0].version = rng.choice((0, -1, 5, 99, 2**40))
    elif kind == "domain":
        model.opset_import.add(domain=rng.choice(("", "com.microsoft", "x")), version=1)
    elif kind == "metadata":
        model.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="[" * 3000)
    elif kind == "sparse":
        model.graph.sparse_initializer.add().dims.extend([2**40, 2**40])
    elif kind == "quantization":
        model.graph.quantization_annotation.add(tensor_name="x")
    else:
        del getattr(model.graph, {"nodes": "node", "outputs": "output", "inputs": "input"}[kind])[:]
    return kind


def annotate(rng: random.Random, model: Any) -> str:
    """Change the exporter's metadata of a node, which other exporters write in other forms."""
    node = _node(rng, model.graph)
    key = rng.choice(("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy", "dq_export", "namespace"))
    node.metadata_props.add(
        key=key, value=rng.choice(("", "[]", "['a']", "[1]", "[" * 3000, "['', '', '']", "x", "{}", "9" * 5000))
    )
    return f"note {key}"


CHANGES = (
    rewire, rewire, close_cycle, double_paths, rename_node, rename_node, trim, trim, set_attribute, set_attribute,
    change_initializer, change_initializer, change_value, nest, externalize, change_model, annotate,
)  # fmt: skip
"""What a mutant draws from; the changes that stand twice are drawn twice as often."""
