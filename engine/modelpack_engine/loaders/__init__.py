"""From the files of a model to a model and a tokenizer: GGUF and safetensors, without a copy.

    files = ModelFiles.from_model(model, store.blob_path)
    loaded = load(files, device="cpu")

The model is an unmodified class of `mlx_lm.models`. Reading: `loading`, then `gguf` or
`safetensors`, then `tokenizer`.
"""

from modelpack_engine import lean_mlx_lm
from modelpack_engine.loaders.files import ModelFiles as ModelFiles
from modelpack_engine.loaders.loading import LoadedModel as LoadedModel
from modelpack_engine.loaders.loading import load as load
from modelpack_engine.loaders.tokenizer import Tokenizer as Tokenizer

lean_mlx_lm.prepare()
