"""The table of verbs that change a model: for the command line, and for recipes. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlm_export.errors import UsageError, suggestion
from vlm_export.graph.verb_arguments import Argument

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        function: `module:name` below `vlm_export.graph`; its first argument is the model.
        makes_model: it returns a new model instead of changing the one given.
        renames: the argument that maps old names of tensors to new ones.
        drops_outputs: outputs may be missing afterwards.
        changes_dtypes: inputs and outputs may have other dtypes afterwards.
    """

    name: str
    function: str
    help: str
    arguments: tuple[Argument, ...] = ()
    makes_model: bool = False
    renames: str = ""
    drops_outputs: bool = False
    changes_dtypes: bool = False

    def check_complete(self, values: Mapping[str, Any]) -> None:
        """UsageError where an argument that the verb needs is missing."""
        missing = [entry.name for entry in self.arguments if entry.must_be_given and entry.name not in values]
        if missing:
            raise UsageError(f"{self.name} lacks arguments", expected=", ".join(missing))

    def run(self, model: ir.Model, values: Mapping[str, Any]) -> tuple[ir.Model, Any]:
        """Returns the changed model, and what the function says it did; `values` by the names of the arguments.

        Raises:
            UsageError: an argument is missing.
            GraphError: what the function refuses; the model is then as it was.
        """
        self.check_complete(values)
        module, _, name = self.function.partition(":")
        function = getattr(import_module(f"vlm_export.graph.{module}"), name)
        given = {entry.target: values[entry.name] for entry in self.arguments if entry.name in values}
        absent = {entry.target: None for entry in self.arguments if entry.none_if_absent}
        result = function(model, **{**absent, **given})
        return (result, None) if self.makes_model else (model, result)


def verb_named(name: str) -> Verb:
    """Returns the verb; UsageError with the nearest name otherwise."""
    if name not in BY_NAME:
        raise UsageError(f"there is no verb {name!r}", fix=suggestion(name, BY_NAME))
    return BY_NAME[name]


_FUNCTION = Argument("function", "text", "inside this function's body: NAME or DOMAIN:NAME", metavar="NAME")
_NODE = Argument("node", "text", "a node's name, or that of a tensor that it makes", positional=True)
_ATTRIBUTES = Argument("attributes", "values", "KEY=VALUE: attributes; lists as [1, 2]", metavar="KEY=VALUE")
_DOMAIN = Argument("domain", "text", "the operator's domain, if not ONNX's", metavar="DOMAIN")
_OP_TYPE = Argument("op_type", "text", "operator", positional=True, metavar="OPERATOR")
_OPERANDS = "tensors' names, constants as int64:[0, 1], '' for an input that is left out"

NODE_VERBS = (
    Verb(
        "remove-node",
        "edits.node_edits:remove_node",
        "remove a node; what read it reads its input instead",
        (
            _NODE,
            Argument("connect", "pairs", "OUTPUT=INPUT: which input takes an output's place", metavar="OUTPUT=INPUT"),
            _FUNCTION,
        ),
    ),
    Verb(
        "insert-node",
        "edits.node_edits:insert_node",
        "put a node behind a tensor, or on one input of a node",
        (
            _OP_TYPE,
            Argument("after", "text", "tensor or node behind which it comes", metavar="NAME"),
            Argument("before", "text", "node before which it comes", metavar="NODE"),
            Argument("input_index", "integer", "which input of that node (default: 0)", metavar="N"),
            Argument("operands", "operands", f"its further inputs: {_OPERANDS}", keyword="inputs", metavar="INPUT"),
            _ATTRIBUTES,
            _DOMAIN,
            Argument("name", "text", "the node's name", metavar="NAME"),
            Argument("output_name", "text", "the new tensor's name", keyword="output", metavar="NAME"),
            _FUNCTION,
        ),
    ),
    Verb(
        "replace-node",
        "edits.node_edits:replace_node",
        "put another operator in a node's place",
        (
            _NODE,
            _OP_TYPE,
            Argument("operands", "operands", f"all of its inputs: {_OPERANDS}", keyword="inputs", metavar="INPUT"),
            _ATTRIBUTES,
            _DOMAIN,
            Argument("name", "text", "the new node's name", metavar="NAME"),
            _FUNCTION,
        ),
    ),
    Verb(
        "set-attribute",
        "edits.attributes:set_attribute",
        "set an attribute of a node",
        (
            _NODE,
            Argument("name", "text", "attribute", positional=True),
            Argument("value", "value", "number, text, or list as [1, 2]", positional=True),
            _FUNCTION,
        ),
    ),
    Verb(
        "delete-attribute",
        "edits.attributes:delete_attribute",
        "remove an attribute, so that its default holds",
        (_NODE, Argument("name", "text", "attribute", positional=True), _FUNCTION),
    ),
)

INTERFACE_VERBS = (
    Verb(
        "rename-tensor",
        "edits.io_edits:rename_tensors",
        "give tensors other names, wherever they are used",
        (Argument("names", "pairs", "OLD=NEW", positional=True, metavar="OLD=NEW"), _FUNCTION),
        renames="names",
    ),
    Verb(
        "set-shape",
        "edits.shapes:set_shape",
        "state shapes of inputs and outputs; those between are inferred anew",
        (Argument("shapes", "shapes", "NAME=AXES: sizes, names or ?", positional=True, metavar="NAME=1,3,h"),),
    ),
    Verb(
        "set-axis",
        "edits.shapes:set_axis",
        "fix a named axis of the inputs to a size, or rename it",
        (
            Argument("axis", "text", "name of the axis", positional=True),
            Argument("size", "axis", "size, or new name", positional=True),
        ),
    ),
    Verb(
        "set-dtype",
        "edits.dtypes:set_dtype",
        "change dtypes of inputs and outputs, with casts",
        (Argument("dtypes", "pairs", "NAME=DTYPE", positional=True, metavar="NAME=float16"),),
        changes_dtypes=True,
    ),
    Verb(
        "add-output",
        "edits.io_edits:add_output",
        "make tensors outputs",
        (Argument("tensors", "texts", "tensors", positional=True, metavar="TENSOR"),),
    ),
    Verb(
        "drop-output",
        "edits.io_edits:drop_output",
        "remove outputs, and what only they needed",
        (Argument("names", "texts", "outputs", positional=True, metavar="OUTPUT"),),
        drops_outputs=True,
    ),
    Verb(
        "reorder",
        "edits.io_edits:reorder_interface",
        "put inputs or outputs into another order",
        (
            Argument("input_order", "texts", "all inputs in the new order", keyword="inputs", metavar="INPUT"),
            Argument("output_order", "texts", "all outputs in the new order", keyword="outputs", metavar="OUTPUT"),
        ),
    ),
)

MODEL_VERBS = (
    Verb(
        "extract",
        "edits.extract:extract",
        "keep only what lies between tensors",
        (
            Argument("from", "texts", "new inputs (default: those of the model)", keyword="inputs", metavar="TENSOR",
                     none_if_absent=True),
            Argument("to", "texts", "new outputs", keyword="outputs", required=True, metavar="TENSOR"),
        ),
        makes_model=True,
        drops_outputs=True,
    ),
    Verb(
        "compose",
        "edits.compose:compose",
        "run a second model on the outputs of this one",
        (
            Argument("second", "model", "the second model", positional=True, metavar="SECOND"),
            Argument(
                "connect", "connections", "OUT=IN: output of the first, input of the second", keyword="connections",
                required=True, metavar="OUT=IN",
            ),
            Argument("prefix_first", "text", "put before all names of the first", metavar="TEXT"),
            Argument("prefix_second", "text", "put before all names of the second", metavar="TEXT"),
            Argument("shared_inputs", "texts", "inputs of both that become one", metavar="INPUT"),
            Argument("input_order", "texts", "order of the inputs", keyword="inputs", metavar="INPUT"),
            Argument("output_order", "texts", "the outputs to keep, in order", keyword="outputs", metavar="OUTPUT"),
        ),
        makes_model=True,
        drops_outputs=True,
    ),
)  # fmt: skip

PASS_VERBS = (
    Verb(
        "cancel-transposes",
        "passes.cancel_transposes:cancel_transposes",
        "remove Transposes that others undo, also across elementwise operators",
    ),
    Verb(
        "remove-noops",
        "passes.remove_noops:remove_noops",
        "remove Casts, Reshapes, Identities … that provably return their input",
    ),
    Verb(
        "static-arguments",
        "passes.static_arguments:make_arguments_static",
        "make computed axes, shapes, pads … constants where they are fixed",
    ),
    Verb(
        "fold-constants",
        "passes.constant_fold:fold_all_constants",
        "compute once what follows from constants alone",
        (
            Argument(
                "limit", "size", "of all folded values (default: 64MiB)", keyword="limit_bytes", metavar="SIZE"
            ),
            Argument(
                "growth", "size", "how much larger the model may become (default: 1MiB)",
                keyword="growth_bytes", metavar="SIZE",
            ),
        ),
    ),
    Verb("remove-dead-code", "passes.dead_code:remove_dead_code", "remove what no output depends on"),
    Verb("share-initializers", "passes.share_initializers:share_initializers", "make equal initializers one"),
    Verb("infer-shapes", "passes.infer_shapes:infer_shapes", "infer dtypes and shapes; nothing known gets lost"),
    Verb(
        "convert-opset",
        "passes.convert_opset:convert_opset",
        "convert to another version of ONNX's operators",
        (Argument("version", "integer", "opset", positional=True),),
    ),
    Verb(
        "add-opset-imports",
        "passes.opset_imports:add_opset_imports",
        "import every domain that nodes use",
        (Argument("versions", "versions", "DOMAIN=VERSION where it is known", metavar="DOMAIN=N"),),
    ),
    Verb(
        "share-storage",
        "passes.share_initializers:share_stored_weights",
        "store equal weights once, under all their names",
    ),
)  # fmt: skip

VERBS = (*NODE_VERBS, *INTERFACE_VERBS, *MODEL_VERBS, *PASS_VERBS)
BY_NAME: Mapping[str, Verb] = {verb.name: verb for verb in VERBS}
