"""sentence-transformers: the text encoder, with the modules that make its embeddings of what the graph returns.

Facts: sentence-transformers 5.7, `base/modules/transformer.py` (with `backend="onnx"` it opens `onnx/model.onnx` by
optimum's ORTModelForFeatureExtraction, fills texts up to the longest one, and reads `last_hidden_state`),
`sentence_transformer/modules/pooling.py` (`pooling_mode_cls_token` takes the first position) and `normalize.py`. Its
module for images and texts has no such back end.
"""

from __future__ import annotations

from vlm_export.bundle import layout
from vlm_export.layouts.consumer_graph import as_one_token, renamed
from vlm_export.layouts.packing import Packing

_STATES = "last_hidden_state"
_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def lay_out(packing: Packing) -> None:
    """The embedding as the states of one token, of which pooling makes the embedding again."""
    graph = packing.text_of_any_length()
    (embedding,) = graph.signature.outputs
    width, spec = embedding.shape[1], packing.text_spec
    packing.told_cleaning()
    packing.add("text", "onnx/model.onnx", renamed(as_one_token(graph), {embedding.name: _STATES}))
    packing.copy_tokenizer()
    packing.state_padding()
    # A type that every release reads; it computes nothing, and the sizes are those that are asked for.
    packing.write_json(
        layout.CONFIG_NAME,
        {
            "model_type": "bert",
            "hidden_size": width,
            "vocab_size": spec.vocab_size,
            "max_position_embeddings": spec.context_length,
            "pad_token_id": spec.pad_token_id,
        },
    )
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(_MODULES)
    ]
    packing.write_json("modules.json", modules)
    packing.write_json("sentence_bert_config.json", {"max_seq_length": spec.context_length, "do_lower_case": False})
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    packing.write_json("1_Pooling/config.json", {"word_embedding_dimension": width, **modes})
    packing.write_json("2_Normalize/config.json", {})
    packing.notes.append("sentence-transformers has no ONNX back end for images: this package holds the texts alone")
