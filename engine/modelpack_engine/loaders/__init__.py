"""From the files of a model to a model and a tokenizer: GGUF and safetensors, without a copy.

    files = ModelFiles.from_model(model, store.blob_path)
    loaded = load(files, device="cpu")

The model is an unmodified class of `mlx_lm.models`. Reading: `loading`, then `gguf` or
`safetensors`, then `tokenizer`.
"""

from modelpack_engine import blas, lean_mlx_lm

blas.prepare()  # before MLX, which everything below imports: whoever comes here first

from modelpack_engine.loaders.files import ModelFiles as ModelFiles  # noqa: E402
from modelpack_engine.loaders.loading import LoadedModel as LoadedModel  # noqa: E402
from modelpack_engine.loaders.loading import load as load  # noqa: E402
from modelpack_engine.loaders.tokenizer import Tokenizer as Tokenizer  # noqa: E402

lean_mlx_lm.prepare()
