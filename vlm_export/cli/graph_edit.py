"""The verbs of `vlm-export graph` that write: those of the table, `apply` for recipes, `split`, `store`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.graph_look import add_proof_options
from vlm_export.cli.output import print_json, print_line, print_warnings
from vlm_export.errors import UsageError, VerificationError

if TYPE_CHECKING:
    import onnx_ir as ir

    from vlm_export.graph.core.files import Storage
    from vlm_export.graph.prove.program import Program
    from vlm_export.graph.prove.prove import Proof
    from vlm_export.graph.recipe import Applied, Step
    from vlm_export.graph.verb_arguments import Argument


def add_parsers(verbs: Any) -> Iterator[argparse.ArgumentParser]:
    """One parser per verb."""
    from vlm_export.graph.verbs import VERBS

    for verb in VERBS:
        parser = verbs.add_parser(verb.name, help=verb.help)
        parser.add_argument("model", metavar="IN", help="an .onnx file")
        for argument in verb.arguments:
            _add_argument(parser, argument)
        parser.set_defaults(run=run_verb, graph_verb=verb.name)
        _add_writing_options(parser)
        yield parser
    apply = verbs.add_parser("apply", help="apply a recipe: a YAML list of verbs with their arguments")
    apply.add_argument("model", metavar="IN", help="an .onnx file")
    apply.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe")
    apply.set_defaults(run=run_recipe)
    store = verbs.add_parser("store", help="write a model as it is, with its weights elsewhere")
    store.add_argument("model", metavar="IN", help="an .onnx file")
    store.set_defaults(run=run_store)
    split = verbs.add_parser("split", help="cut a model in two at tensors; `compose` puts it together again")
    split.add_argument("model", metavar="IN", help="an .onnx file")
    split.add_argument("--at", nargs="+", required=True, metavar="TENSOR", help="the tensors")
    second = "where to write the second model; both are put in place in one step only in one directory, else OUT first"
    split.add_argument("--second", required=True, metavar="OUT2", help=second)
    split.set_defaults(run=run_split)
    for parser in (apply, store, split):
        _add_writing_options(parser)
        yield parser


def _add_argument(parser: argparse.ArgumentParser, argument: Argument) -> None:
    settings: dict[str, Any] = {"help": argument.help, "default": argparse.SUPPRESS}
    if argument.takes_several:
        settings["nargs"] = "+"
    if argument.metavar or argument.positional:
        settings["metavar"] = argument.metavar or argument.name.upper()
    if argument.positional:
        parser.add_argument(f"verb_{argument.name}", **settings)
        return
    option = f"--{argument.name.replace('_', '-')}"
    parser.add_argument(option, dest=f"verb_{argument.name}", required=argument.required, **settings)


def _add_writing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="where to write the model")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--verify", action="store_true", help="compare with IN in onnxruntime before writing")
    add_proof_options(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--external", action="store_true", help="weights in files beside the graph")
    where.add_argument("--embedded", action="store_true", help="weights in the graph file")
    parser.add_argument("--shard-size", metavar="SIZE", help="largest file of weights: 2GB")
    parser.add_argument("--threshold", metavar="SIZE", help="tensors up to this size stay in the graph (default: 1KiB)")


def run_verb(args: argparse.Namespace) -> int:
    from vlm_export.graph.recipe import Step
    from vlm_export.graph.verb_arguments import value_from_words
    from vlm_export.graph.verbs import verb_named

    verb = verb_named(args.graph_verb)
    given = {argument: getattr(args, f"verb_{argument.name}", None) for argument in verb.arguments}
    values = {entry.name: value_from_words(entry, words) for entry, words in given.items() if words is not None}
    return _run_steps(args, [Step(verb, values)])


def run_recipe(args: argparse.Namespace) -> int:
    from vlm_export.graph.recipe import read_recipe

    return _run_steps(args, read_recipe(Path(args.recipe)))


def run_store(args: argparse.Namespace) -> int:
    return _run_steps(args, [])


def _run_steps(args: argparse.Namespace, steps: Sequence[Step]) -> int:
    from vlm_export.graph.core.files import open_model, save_model
    from vlm_export.graph.core.transaction_files import check_output
    from vlm_export.graph.recipe import apply_steps

    storage = _storage(args)
    _check_proof_options(args)
    check_output(args.output, overwrite=args.overwrite)
    original = open_model(args.model)
    applied = apply_steps(open_model(args.model), list(steps))
    _validate(applied.model, original)
    proof = _prove(args, original, applied, steps) if args.verify else None
    opened = [original, *(model for step in steps for model in step.models)]
    files = save_model(applied.model, args.output, storage=storage, overwrite=args.overwrite, opened=opened)
    results = [(step.verb.name, _json_from(result)) for step, result in zip(steps, applied.results, strict=True)]
    _report(args, results, files, proof)
    return 0


def _prove(args: argparse.Namespace, original: ir.Model, applied: Applied, steps: Sequence[Step]) -> Proof:
    from vlm_export.graph.prove.program import Chain, ModelProgram

    first = ModelProgram(original)
    before: Program = first
    composed = [step.values for step in steps if step.verb.name == "compose"]
    if composed and len(steps) > 1:
        raise UsageError("a recipe that composes models cannot be verified", fix="use `graph compose --verify`")
    for values in composed:
        before = Chain(
            first,
            ModelProgram(values["second"]),
            values["connect"],
            shared_inputs=values.get("shared_inputs", ()),
            prefixes=(values.get("prefix_first", ""), values.get("prefix_second", "")),
        )
    return _proof(
        args,
        before,
        ModelProgram(applied.model),
        applied.renamed,
        may_drop_outputs=any(step.verb.drops_outputs for step in steps),
        may_change_dtypes=any(step.verb.changes_dtypes for step in steps),
    )


def _proof(
    args: argparse.Namespace,
    before: Program,
    after: Program,
    renamed: Mapping[str, str],
    *,
    may_drop_outputs: bool = False,
    may_change_dtypes: bool = False,
) -> Proof:
    from vlm_export.graph.prove.prove import prove

    try:
        return prove(
            before,
            after,
            inputs=[Path(name) for name in args.inputs],
            tolerance=args.tolerance,
            renamed=renamed,
            may_drop_outputs=may_drop_outputs,
            may_change_dtypes=may_change_dtypes,
        )
    except VerificationError as error:
        fix = "; ".join(part for part in ("nothing was written", error.fix) if part)
        raise VerificationError(error.what, expected=error.expected, got=error.got, fix=fix) from error


def run_split(args: argparse.Namespace) -> int:
    from vlm_export.graph.core.files import open_model, save_models
    from vlm_export.graph.core.transaction_files import check_output
    from vlm_export.graph.edits.extract import split
    from vlm_export.graph.prove.program import Chain, ModelProgram

    storage = _storage(args)
    _check_proof_options(args)
    if Path(args.output).resolve() == Path(args.second).resolve():
        raise UsageError("both parts would be written to one file", where=args.output, fix="give --second another name")
    for path in (args.output, args.second):
        check_output(path, overwrite=args.overwrite)
    original = open_model(args.model)
    parts = split(original, args.at)
    for part in (parts.first, parts.second):
        _validate(part, original)
    proof = None
    if args.verify:
        first, second = ModelProgram(parts.first), ModelProgram(parts.second)
        chain = Chain(first, second, parts.connections, shared_inputs=parts.shared_inputs)
        proof = _proof(args, ModelProgram(original), chain, {})
    targets = [(parts.first, args.output), (parts.second, args.second)]
    files = save_models(targets, storage=storage, overwrite=args.overwrite, opened=[original])
    _report(args, [("split", {"connections": list(map(list, parts.connections))})], files, proof)
    return 0


def _check_proof_options(args: argparse.Namespace) -> None:
    if not args.verify and (args.inputs or args.tolerance):
        raise UsageError("--inputs and --tolerance are for the comparison", fix="add --verify")


def _storage(args: argparse.Namespace) -> Storage:
    from vlm_export.graph.core.files import Storage
    from vlm_export.graph.verb_arguments import read_size

    sizes: dict[str, Any] = {}
    for option, field in (("shard_size", "shard_bytes"), ("threshold", "threshold_bytes")):
        text = getattr(args, option)
        try:
            sizes |= {} if text is None else {field: read_size(text)}
        except ValueError as error:
            raise UsageError(f"--{option.replace('_', '-')} is no size", expected=str(error), got=text) from error
    if args.embedded and args.shard_size is not None:
        raise UsageError("embedded weights have no shards", fix="leave out --embedded or --shard-size")
    external = True if args.external else False if args.embedded else None
    return Storage(external=external, **sizes)


def _validate(model: ir.Model, original: ir.Model) -> None:
    """Refuses a result that is not valid; of an original that was not valid either, only a warning says so."""
    from vlm_export.errors import GraphError
    from vlm_export.graph.core.inference import validate

    try:
        validate(model)
    except GraphError as error:
        try:
            validate(original)
        except GraphError:
            print_warnings([f"the model is not valid, and was not before: {error.what} {error.got}"])
            return
        raise


def _json_from(result: Any) -> Any:
    """What a verb says it did, as JSON; None where it only gives back an object."""
    if is_dataclass(result) and not isinstance(result, type):
        return asdict(result)
    return dict(result) if isinstance(result, dict) else result if isinstance(result, int | str) else None


def _report(
    args: argparse.Namespace, results: Sequence[tuple[str, Any]], files: Sequence[Path], proof: Proof | None
) -> None:
    if args.json:
        steps = [{"verb": name, "result": result} for name, result in results]
        data = {"steps": steps, "files": list(map(str, files)), "proof": proof.to_json() if proof else None}
        print_json(data)
        return
    for name, result in results:
        print_line(f"{name}: {'done' if result is None else _text(result)}")
    if proof is not None:
        print_line(proof)
    if not args.quiet:
        print_line("written: " + ", ".join(map(str, files)))


def _text(result: Any) -> str:
    if isinstance(result, dict):
        shown = {key: value for key, value in result.items() if value is not None and value != ()}
        return ", ".join(f"{key.replace('_', ' ')} {_text(value)}" for key, value in shown.items()) or "nothing"
    if isinstance(result, tuple):
        return str(len(result)) + "".join(f"\n  {entry}" for entry in result)
    return str(result)
