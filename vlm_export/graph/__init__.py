"""ONNX → ONNX: models changed safely, of any size, in their subgraphs and functions too.

An operation changes the `onnx_ir.Model` it is given, wholly or not at all: it is tried on a copy that shares the
weights, and what would be invalid is refused there with a `GraphError` (`errors`). `extract`, `split` and `compose`
give new models. Weights are read only by operations that compute with them.

    files        open_model, save_model, Storage
    io_edits     rename_tensor, rename_tensors, add_output, drop_output, reorder_interface
    shapes       set_shape, set_axis
    dtypes       set_dtype
    node_edits   remove_node, insert_node, replace_node
    attributes   set_attribute, delete_attribute
    extract      extract, split
    compose      compose
    checks       validate
"""
