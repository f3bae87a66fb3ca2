"""ONNX → ONNX: models changed safely, of any size, in their subgraphs and functions too.

An operation changes the `onnx_ir.Model` it is given, wholly or not at all: it is tried on a copy that shares the
weights, and what would be invalid is refused there with a `GraphError` (`errors`). `extract`, `split` and `compose`
give new models. Weights are read only by operations that compute with them.

    files        open_model, save_model, save_models, Storage
    io_edits     rename_tensor, rename_tensors, add_output, drop_output, reorder_interface
    shapes       set_shape, set_axis
    dtypes       set_dtype
    node_edits   remove_node, insert_node, replace_node
    attributes   set_attribute, delete_attribute
    extract      extract, split
    compose      compose
    checks       validate
    passes       cancel_transposes, remove_noops, make_arguments_static, fold_all_constants, remove_dead_code,
                 share_initializers, infer_shapes, convert_opset, add_opset_imports; one module for each
    storage      share_stored_weights, describe_storage
    show         describe_model
    find         find_nodes
    draw         draw_graph
    prove        prove
    recipe       read_recipe, apply_steps
    verbs        the table behind `vlm-export graph` and recipes
"""
