"""ONNX → ONNX: models changed safely, of any size, in their subgraphs and functions too.

An operation changes the `onnx_ir.Model` that it is given, wholly or not at all: it is tried on a copy that shares the
weights, and what would be invalid is refused there with a `GraphError`. `extract`, `split` and `compose` return new
models. Only operations that compute with weights read them.

    core      open_model, save_model, save_models, Storage (`files`); validate (`inference`); remove_dead_code; and what
              all rooms share
    edits     rename_tensor, rename_tensors, add_output, drop_output, reorder_interface, set_dtype (`io_edits`);
              set_shape, set_axis (`shapes`); remove_node, insert_node, replace_node (`node_edits`);
              set_attribute, delete_attribute (`attributes`); extract, split (`extract`); compose (`compose`)
    passes    cancel_transposes, remove_noops, make_arguments_static, fold_all_constants,
              share_initializers, share_stored_weights, infer_shapes, convert_opset, add_opset_imports; `GraphPass`
    look      describe_model (`show`); find_nodes (`find`)
    prove     prove (`prove`)
    recipe    read_recipe, apply_steps
    verbs     the table behind `vlm-export graph` and recipes

Rooms import downwards only: core ← look, prove ← edits, passes ← verbs, recipe.
"""
